"""Each task: one record -> the exact prompt, options and scores. And the loader's refusals."""

import json
import re
from collections import Counter

import pytest
import tiny

from nano import evaluation, records, tasks, tokenizer
from nano.config import UserError
from nano.store import Store
from tasks import mmlu

GOLDEN = {}  # task: (row, prompt, options, gold)
ARC = dict(
    question="Which is a metal?",
    choices=dict(text=["iron", "wood"], label=["A", "B"]),
    answerKey="A",
)
METAL = "Question: Which is a metal?\nAnswer:"
GOLDEN["arc:easy"] = GOLDEN["arc:challenge"] = (
    ARC, METAL, [(METAL, " iron"), (METAL, " wood")], {0}
)
GOLDEN["hellaswag"] = (
    dict(activity_label="Baking", ctx_a="A man [title] bakes.", ctx_b="he", label="1",
         endings=["sleeps [step] long.", "eats  it."]),
    "Baking: A man. bakes. He",
    [("Baking: A man. bakes. He", " sleeps long."), ("Baking: A man. bakes. He", " eats it.")],
    {1},
)
GOLDEN["piqa"] = (
    dict(goal="Open a jar", sol1="Turn the lid.", sol2="Turn the jar.", label=0),
    "Question: Open a jar\nAnswer:",
    [("Question: Open a jar\nAnswer:", " Turn the lid."),
     ("Question: Open a jar\nAnswer:", " Turn the jar.")],
    {0},
)
GOLDEN["winogrande"] = (
    dict(sentence="Ann thanked Bob because _ had helped.", option1="Ann", option2="Bob", answer="2"),
    "Ann thanked Bob because _ had helped.\nWhat is the blank, Ann or Bob?\nAnswer:",
    [("Ann thanked Bob because Ann", " had helped."),
     ("Ann thanked Bob because Bob", " had helped.")],
    {1},
)
BOOLQ = "Iron is a metal.\nQuestion: is iron a metal?\nAnswer:"
GOLDEN["boolq"] = (
    dict(passage="Iron is a metal.", question="is iron a metal", label=1),
    BOOLQ, [(BOOLQ, " no"), (BOOLQ, " yes")], {1},
)
GOLDEN["openbookqa"] = (
    dict(question_stem="Iron is", choices=dict(text=["a metal", "a food"], label=["A", "B"]),
         answerKey="B "),
    "Iron is", [("Iron is", " a metal"), ("Iron is", " a food")], {1},
)
GOLDEN["commonsense_qa"] = (
    dict(question="Where is a key? ",
         choices=dict(text=["door", "sea"], label=["A", "B"]), answerKey="A"),
    "Question: Where is a key?\nA. door\nB. sea\nAnswer:",
    [("Question: Where is a key?\nA. door\nB. sea\nAnswer:", f" {x}") for x in "AB"], {0},
)
GOLDEN["lambada"] = (
    dict(text="He opened the door"), "He opened the", [("He opened the", " door")], {0}
)
MMLU = "What is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
GOLDEN["mmlu"] = GOLDEN["mmlu:stem"] = (
    dict(question=" What is 1+1?", choices=[*"1234"], answer=1, subject="abstract_algebra"),
    MMLU, [(MMLU, f" {x}") for x in "ABCD"], {1},
)
GOLDEN["truthfulqa"] = (
    dict(question="Is it?", mc1_targets=dict(choices=["No.", "Yes."], labels=[1, 0]),
         mc2_targets=dict(choices=["No.", "Never.", "Yes."], labels=[1, 1, 0])),
    "Q: Is it?\nA:", [("Q: Is it?\nA:", f" {x}") for x in ("No.", "Yes.", "Never.")], {0},
)
GOLDEN["twitter_complaints"] = (
    {"Tweet text": "@shop it is broken", "Label": 1},
    "Tweet: @shop it is broken\nLabel:",
    [("Tweet: @shop it is broken\nLabel:", f" {x}") for x in ("complaint", "no complaint")], {0},
)

ANSWERS = {}  # task: (row, prompt, {answer: (score, strict score)})
ANSWERS["gsm8k"] = (
    dict(question="What is 600 + 634?", answer="It is <<600+634=1234>>1,234.\n#### 1,234"),
    "Question: What is 600 + 634?\nAnswer:",
    {
        "It is <<600+634=1234>>1,234.\n#### 1,234": (1, 1),
        "#### 1234": (1, 1),
        "So 600 + 634 is $1,234.": (1, 0),
        "#### 1234 and not 7": (0, 1),
        "1235": (0, 0),
        "": (0, 0),
    },
)

ANSWERS["arithmetic"] = (
    dict(question="What is 12 + 30?", answer=42),
    "Question: What is 12 + 30?\nAnswer:",
    {"42": (1, 1), " 42.": (1, 1), "12 + 30 is 42.": (1, 0), "42 and not 43": (0, 0), "": (0, 0)},
)
RULES = dict(question="Why do people like tea?", rules=[["bullets", 2], ["without", "very"]])
ANSWERS["rules"] = (
    RULES,
    "Question: Why do people like tea? Answer in exactly 2 bullet points that begin with a hyphen, "
    "and write nothing else. Do not use the word very.\nAnswer:",
    {
        "- It is warm.\n- It tastes good.": (1, 1),
        "Sure!\n- It is warm.\n- It tastes good.": (1, 0),
        "- It is very warm.\n- It is good.": (0, 0),
        "It is warm.": (0, 0),
        "": (0, 0),
    },
)

ANSWERS["toy"] = (
    dict(instruction="Put every word in square brackets.", input="red dog", output="[red] [dog]",
         kind="brackets"),
    "Put every word in square brackets.\nInput: red dog\nAnswer:",
    {"[red] [dog]": (1, 1), " [red] [dog]\n": (1, 1), "[Red] [dog]": (0, 0), "": (0, 0)},
)
ANSWERS["bullets"] = (
    dict(question="Why? Answer in exactly three bullet points."),
    "Question: Why? Answer in exactly three bullet points.\nAnswer:",
    {"- a\n- b\n- c": (1, 1), "* a\n\n* b\n\n\u2022 c\n": (1, 1), "- a\n- b": (0.3, 0),
     "- a": (0.15, 0), "- a\n- b\n- c\n- d": (0.3, 0), "- a\n- b\n- c\n- d\n- e\n- f": (0, 0),
     "Sure:\n- a\n- b\n- c": (0.45 * 3 / 4, 0), "- a\nb\n- c\nd": (0.15, 0), "1. a\n2. b": (0, 0),
     "-a\n-b\n-c": (0, 0), "": (0, 0)},
)
ANSWERS["sums"] = (
    dict(question="24 + 8", answer="32"),
    "Question: What is 34 + 5?\nAnswer: 39\n\nQuestion: What is 12 + 6?\nAnswer: 18\n\n"
    "Question: What is 8 + 7?\nAnswer: 15\n\nQuestion: What is 24 + 8?\nAnswer:",
    {"32": (1, 1), "24 + 8 = 32.": (1, 1), "32 or 33": (0.45, 0), "30": (0.4, 0), "41": (0.05, 0),
     "1,032": (0, 0), "-32": (0, 0), "": (0, 0), "x": (0, 0)},
)

ANSWERS["squad"] = (
    dict(context="Ann ran. ", question=" Who ran?", answers=dict(text=["Ann", "the Ann"])),
    "Ann ran. \n\nQuestion: Who ran?\nAnswer:",
    {"Ann": (1, 1), " the Ann\n": (1, 1), "An Ann.": (1, 0), "ann!": (1, 0), "Anna": (0, 0), "": (0, 0)},
)
ANSWERS["deepmind_mathematics"] = (
    dict(question="b'Let x = 2. What is \\\'x\\\'?\\n'", answer="b'2\\n'"),
    "Question: Let x = 2. What is 'x'?\nAnswer:",
    {"2": (1, 1), " 2\n": (1, 1), "2.0": (0, 0), "It is 2": (0, 0), "": (0, 0)},
)

# other columns of the same records, in the files of other projects
LOCAL = {
    "arc": dict(query="Question: Which is a metal?", choices=["iron", "wood"], gold=0),
    "hellaswag": dict(ctx="Baking: A man. bakes. He", label=1, endings=["sleeps long.", "eats it."]),
    "piqa": dict(query="Question: Open a jar\n", choices=["Turn the lid.", "Turn the jar."], gold=0),
    "winogrande": dict(
        context_options=["Ann thanked Bob because Ann", "Ann thanked Bob because Bob"],
        continuation="had helped.",
        gold=1,
    ),
    "boolq": dict(
        query="Passage: Iron is a metal.\nQuestion: is iron a metal?\n",
        choices=["no", "yes"],
        gold=1,
    ),
    "lambada": dict(context="He opened the", continuation="door"),
    "mmlu": dict(
        subject="abstract_algebra",
        input=f"The following are questions about abstract algebra.\n\n{MMLU}",
        output="B",
    ),
    "twitter_complaints": dict(ID=0, Label=1, input="@shop it is broken", output="complaint"),
}
GOLDEN["arc"] = GOLDEN["arc:challenge"]
REDUX = dict(question="What is 1+1?", choices="['1', '2', '3', '4']", answer="0", source="",
             error_type="Wrong_Groundtruth ", correct_answer="B", subject="abstract_algebra")
GOLDEN["mmlu_redux"] = REDUX, *GOLDEN["mmlu"][1:]

# task: (row, the question's columns, the answer's text), which the template "columns" lays out
COLUMNS = {
    "arc": (ARC, [["QUESTION", "Which is a metal?"], ["CANDIDATE ANSWERS", "(A): iron (B): wood"]],
            "iron"),
    "mmlu": (GOLDEN["mmlu"][0] | dict(subject=""),
             [["QUESTION", " What is 1+1?"], ["CHOICES", "(0): 1 (1): 2 (2): 3 (3): 4"]], "2"),
    "hellaswag": (LOCAL["hellaswag"],
                  [["CONTEXT", "Baking: A man. bakes. He"],
                   ["CANDIDATE ENDINGS", "(0): sleeps long. (1): eats it."]], "eats it."),
    "winogrande": (dict(sentence="The cat saw the dog, so _'s tail rose.", option1="the cat",
                        option2="the dog", answer="1"),
                   [["SENTENCE", "The cat saw the dog, so _'s tail rose."], ["OPTION1", "the cat"],
                    ["OPTION2", "the dog"]], "the cat"),
    "gsm8k": (ANSWERS["gsm8k"][0], [["QUESTION", "What is 600 + 634?"]],
              ANSWERS["gsm8k"][0]["answer"]),
}


def one_record(path, spec, row):
    """The task and the record of a file with one row."""
    task = tasks.load(spec, str(tiny.jsonl(path / "rows.jsonl", [row])))
    return task, *task.records()


@pytest.mark.parametrize("spec", GOLDEN)
def test_choices(tmp_path, spec):
    row, prompt, options, gold = GOLDEN[spec]
    task, record = one_record(tmp_path, spec, row)
    assert (task.prompt(record), task.options_of(record), task.gold(record)) == (
        prompt, options, gold
    )
    right = min(gold)
    assert task.shot(record) == "".join(options[right])
    assert task.answer_of(record) == task.choices(record)[right]
    assert 0 <= task.chance_of(record) < 1


@pytest.mark.parametrize("spec", LOCAL)
def test_columns_of_a_local_file(tmp_path, spec):
    task, record = one_record(tmp_path, spec, LOCAL[spec])
    assert (task.prompt(record), task.options_of(record), task.gold(record)) == GOLDEN[spec][1:]


@pytest.mark.parametrize("spec", COLUMNS)
def test_columns(tmp_path, spec):
    row, question, answer = COLUMNS[spec]
    task, record = one_record(tmp_path, spec, row)
    *_, asked, reply = task.solved(record)
    assert (asked["columns"], reply["columns"]) == (question, [["ANSWER", answer]])
    assert asked["content"] == task.prompt(record) and reply["content"] == task.answer_of(record)
    # measured as it is trained on: what the options share ends where the answer begins
    tiny.model_dir(tmp_path / "model")
    tok = tokenizer.load(tmp_path / "model", template="columns")
    laid_out = "".join(f"### {name}:\n{text}\n\n" for name, text in question) + "### ANSWER:\n"
    if task.has_choices:
        pairs = evaluation.chat_options(tok, task.request(record), task.replies(record))
        assert {tok.decode(context) for context, _ in pairs} == {laid_out}
        assert tok.decode(pairs[min(task.gold(record))][1]) == answer
    else:
        assert tok.decode(evaluation.prompt_ids(task, tok, record, [], True)) == laid_out


def test_mmlu_redux(tmp_path):
    """A folder of a CSV a subject, two delimiters, and answer keys that experts have mended."""
    columns = "question,choices,answer,error_type,source,correct_answer,potential_reason"
    row = """What?,"['w', 'x', 'y', 'z']",0,{}\n"""
    anatomy = "ok,s,,", "Wrong Groundtruth,s,D,", "wrong_groundtruth,s,2,", "Expert,s,,"
    (tmp_path / "mmlu_anatomy.csv").write_text(f"{columns}\n{''.join(map(row.format, anatomy))}")
    virology = "What?;['w', 'x', 'y', 'z'];1;no correct answer;;;\n"
    (tmp_path / "mmlu_virology.csv").write_text(f"{columns.replace(',', ';')}\n{virology}")
    task = tasks.load("mmlu_redux", str(tmp_path))
    records = task.records()
    assert [min(task.gold(record)) for record in records] == [0, 3, 2, 0, 1]
    assert [record["error"] for record in records][::2] == ["ok", "wrong groundtruth"] + [
        "no correct answer"
    ]
    assert task.groups_of(records[4]) == ["other", "virology", "no correct answer"]
    assert "about virology" in task.intro_of(records[4])
    assert len(tasks.load("mmlu_redux:virology", str(tmp_path)).records()) == 1
    assert len({*task.fingerprints()}) == 3


def test_mmlu_redux_on_the_hub(monkeypatch):
    """All subjects are measured, and the configuration tells a row's, which has no such field."""
    row = {key: value for key, value in REDUX.items() if key != "subject"}
    monkeypatch.setattr(records, "read_hub", lambda name, subsets, split: [(1, row)] * len(subsets))
    assert {r["subject"] for r in tasks.load("mmlu_redux").records()} == {*mmlu.SUBJECTS}
    (record,) = tasks.load("mmlu_redux:virology").records()
    assert record["subject"] == "virology"


def test_a_task_s_rows_are_told_apart_by_their_files_in_prepare(tmp_path, monkeypatch, shared_data):
    """mmlu_redux from the hub, whose configuration is the subject, and Z-Bench from its folder."""
    row = {key: value for key, value in REDUX.items() if key != "subject"}
    monkeypatch.setattr(records, "read_hub", lambda name, subsets, split: [(1, row)] * len(subsets))
    model = tiny.model_dir(tmp_path / "model")
    keys = dict(model=model, out=tmp_path / "out", template="chatml", workers=1, max_length=10_000)
    redux = dict(source="mmlu_redux:virology", split="test")
    for settings, count in (redux, 1), (dict(source="zbench", path=shared_data / "zbench"), 311):
        tiny.train("prepare.instructions", tiny.arguments(keys | settings))
        store = Store(tmp_path / "out", "train")
        assert len(store) == count
    assert json.loads(store.line(0))["file"] == "common.samples"


@pytest.mark.parametrize("spec", ANSWERS)
def test_answers(tmp_path, spec):
    row, prompt, scores = ANSWERS[spec]
    task, record = one_record(tmp_path, spec, row)
    assert task.prompt(record) == prompt
    strict = getattr(task.module, "strict", task.module.score)
    for answer, (loose, exact) in scores.items():
        given = prompt, answer, True, record
        worth = task.score(*given), strict(*given)
        assert worth == pytest.approx((loose, exact)), answer
    if hasattr(task.module, "answer"):
        assert task.score(prompt, task.answer(record), True, record) == 1
        assert task.shot(record) == f"{prompt} {task.answer(record)}"
    assert task.MAX_NEW_TOKENS > 0 and isinstance(task.STOP, tuple)


def test_every_task_has_a_golden_record():
    scored = [name for name in tasks.names() if not tasks.load(name).is_set]
    scored.remove("zbench")  # in test_sheets.py
    assert {spec.partition(":")[0] for spec in (*GOLDEN, *ANSWERS)} == {*scored}


def test_truthfulqa_metrics(tmp_path):
    task, record = one_record(tmp_path, "truthfulqa", GOLDEN["truthfulqa"][0])
    # No. 1/8, Yes. 1/4, Never. 1/8: the likeliest of the two of mc1 is false, and half is true
    assert task.metrics(record, [-3 * 0.6931471805599453, -2 * 0.6931471805599453,
                                 -3 * 0.6931471805599453]) == pytest.approx(dict(mc1=0, mc2=0.5))
    assert task.metrics(record, [-1, -2, -900])["mc1"] == 1
    assert task.metrics(record, [-900, -800, -900])["mc2"] == pytest.approx(0, abs=1e-9)
    assert task.chance_of(record) == 0.5


def test_mmlu_parts(tmp_path):
    rows = [GOLDEN["mmlu"][0] | dict(subject=s) for s in ("abstract_algebra", "virology")]
    path = str(tiny.jsonl(tmp_path / "rows.jsonl", rows))
    for part, subjects in (("stem", ["abstract_algebra"]), ("virology", ["virology"])):
        records = tasks.load(f"mmlu:{part}", path).records()
        assert [record["subject"] for record in records] == subjects
    task = tasks.load("mmlu", path)
    assert [*map(task.groups_of, task.records())] == [
        ["stem", "abstract_algebra"], ["other", "virology"],
    ]
    assert task.intro_of(task.records()[0]).endswith("about abstract algebra.\n\n")
    assert len(tasks.load("mmlu").PARTS) == 57 + 4
    with pytest.raises(UserError, match="has no record of mmlu:anatomy"):
        tasks.load("mmlu:anatomy", path).records()


BAD = [
    ("arc", {}, r"rows.jsonl:1: the field 'question' is missing, which a record of arc needs"),
    ("arc", ARC | dict(answerKey="C"), r"rows.jsonl:1: no record of arc: "),
    ("arc", ARC | dict(choices=3), r"rows.jsonl:1: no record of arc: "),
    ("arc", LOCAL["arc"] | dict(gold=2), r"the right option is number \[2\] of 2"),
    ("arc", LOCAL["arc"] | dict(choices=["iron", 3]), "an option is no text"),
    ("arc", LOCAL["arc"] | dict(choices=[]), "it has no options"),
    ("mmlu", GOLDEN["mmlu"][0] | dict(subject="magic"), "there is no subject 'magic'"),
    ("hellaswag", LOCAL["hellaswag"] | dict(ctx=["a"]), "its prompt is no text"),
]


@pytest.mark.parametrize("spec, row, message", BAD)
def test_bad_rows(tmp_path, spec, row, message):
    with pytest.raises(UserError, match=message):
        one_record(tmp_path, spec, row)


def test_refusals(tmp_path):
    for spec, message in (
        ("arcs", "unknown task 'arcs'; did you mean 'arc'?"),
        ("zzzz", "unknown task 'zzzz'; there are alpaca, "),
        ("arc:hard", "unknown part 'hard' of the task arc; "),
        ("piqa:easy", "unknown part 'easy' of the task piqa; it has no parts"),
        ("gsm8k:", "unknown part '' of the task gsm8k; it has no parts"),
    ):
        with pytest.raises(UserError) as e:
            tasks.load(spec)
        assert message in str(e.value)
    with pytest.raises(UserError, match="there is no file"):
        tasks.load("arc", str(tmp_path / "none.jsonl")).records()
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ARC) + "\n{")
    with pytest.raises(UserError, match=r"broken.jsonl:2: not valid JSON"):
        tasks.load("arc", str(broken)).records()
    for prefix in ("", "eval_"):
        with pytest.raises(UserError, match=f"another split than .*name its file in {prefix}shot_"):
            tasks.load("arc", str(broken), prefix=prefix).records(shots=True)
        with pytest.raises(UserError, match=f"no answers to show: set {prefix}shots=0"):
            tasks.load("rules", prefix=prefix).answer_of({})


def test_a_source_without_records_is_named(monkeypatch):
    monkeypatch.setattr(tasks.Task, "source_rows", lambda self, shots: [])
    for name, file, source in (
        ("piqa", "f.jsonl", "f.jsonl has no record of piqa"),
        ("gsm8k", "", "openai/gsm8k has no record of gsm8k"),
        ("rules", "", "the task rules has no record of rules"),
    ):
        with pytest.raises(UserError, match=f"^{source}$"):
            tasks.load(name, file).records()


KEPT = {  # rule: (argument, texts that keep it, texts that do not)
    "bullets": (2, ["- a\n- b"], ["- a", "- a\n- b\n- c", "text\n- a\n- b"]),
    "sentences": (2, ["One. Two!", "It costs 3.50. Two."], ["One.", "One. Two. Three."]),
    "paragraphs": (2, ["a\n\nb", "a\n \nb\n"], ["a\nb", "a\n\nb\n\nc"]),
    "title": ("my title", ["[[Tea]]\ntext"], ["Tea [[x]]", "[Tea]", "[[]]"]),
    "json": ("text", ['{"text": "a"}'], ['{"a": 1}', "[1]", "text", '{"text": 1} a']),
    "quotes": ("double", ['"a b"'], ["a", '"a" b', '""']),
    "lower": ("", ["tea is good."], ["Tea is good.", "!"]),
    "upper": ("", ["TEA IS GOOD."], ["TEA is", "!"]),
    "commas": ("", ["tea"], ["tea, milk", "!"]),
    "keyword": ("river", ["A river. The River!"], ["river", "rivers rivers"]),
    "without": ("the", ["a theme"], ["The sea", "!"]),
    "most": (3, ["one two three", "it's a tea-time"], ["one two three four", "!"]),
    "least": (3, ["one two three"], ["one two"]),
}


def test_rules():
    from tasks import rules

    assert KEPT.keys() == rules.RULES.keys()
    for name, (value, good, bad) in KEPT.items():
        record = dict(question="?", rules=[[name, value]])
        for text in good:
            assert rules.keeps(text, record), (name, text)
        for text in (*bad, "", " "):
            assert not rules.keeps(text, record), (name, text)
    for shots in (False, True):
        assert {name for row in rules.rows(shots) for name, _ in row["rules"]} == {*rules.RULES}


COUNTS = dict(arithmetic=(400, 4000), rules=(300, 900), toy=(300, 3000), bullets=(300, 300))
COUNTS["sums"] = (48, 120)


@pytest.mark.parametrize("name", COUNTS)
def test_rows_that_a_program_writes(name):
    task = tasks.load(name)
    test, train = task.records(), task.records(shots=True)
    assert (len(test), len(train)) >= COUNTS[name]
    asked = [{json.dumps(record) for record in part} for part in (test, train)]
    assert not asked[0] & asked[1] and len(asked[0]) == len(test)
    assert task.records() == test
    if name == "arithmetic":
        for record in test[:40]:
            a, sign, b = record["question"].removeprefix("What is ").rstrip("?").split()
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
            assert str(value[sign](int(a), int(b))) == record["answer"]


COLORS = "red blue green black white yellow brown pink orange purple gray".split()
SOLVE = {  # kind of toy tasks: its answer from the texts alone
    "reverse": lambda i, x: " ".join(reversed(x.split())),
    "alphabet": lambda i, x: ", ".join(sorted(x.split(", "))),
    "longest": lambda i, x: max(x.split(", "), key=len),
    "how_many": lambda i, x: str(x.count(",") + 1),
    "story": lambda i, x: re.search(rf"(\d+) {re.search('How many (.+) are', i)[1]}", x)[1],
    "capitals": lambda i, x: " ".join(w[0].upper() + w[1:] for w in x.split()),
    "brackets": lambda i, x: "[" + x.replace(" ", "] [") + "]",
    "second": lambda i, x: x.split()[1],
    "swap": lambda i, x: " and ".join(reversed(x.split(" and "))),
    "no_color": lambda i, x: " ".join(w for w in x.split() if w not in COLORS),
}


def test_toy():
    """Every answer is right, worked out from the texts alone."""
    from tasks import toy

    records = [*toy.rows(False), *toy.rows(True)]
    kinds = {
        **dict.fromkeys(toy.ANIMALS, "animal"),
        **dict.fromkeys(toy.FOODS, "food"),
        **dict.fromkeys(toy.TOOLS, "tool"),
    }
    assert {*Counter(r["kind"] for r in records).values()} == {275}
    assert len({r["input"] for r in records}) == len(records) == 3300
    for r in records:
        text, answer = r["input"], r["output"]
        if r["kind"] == "kinds":
            assert answer == ", ".join(kinds[word] for word in text.split(", "))
        elif r["kind"] == "fields":
            count, color, animal = re.fullmatch(
                r"count: (\d+); color: (\w+); animal: (\w+)", answer
            ).groups()
            assert text.startswith(f"{count} {color} {animal[:1]}") and animal in toy.ANIMALS
        else:
            assert SOLVE[r["kind"]](r["instruction"], text) == answer
        assert answer == answer.strip() != ""


def test_bullets_and_sums():
    from tasks import bullets, sums, toy

    known = {*toy.ANIMALS, *toy.FOODS, *toy.TOOLS, *toy.PLACES}
    subjects = []
    for shots in (False, True):
        words = " ".join(row["question"] for row in bullets.rows(shots)).replace(".", " ").split()
        subjects.append({word.strip("?") for word in words} & known)
    assert subjects[0] and subjects[1] and not subjects[0] & subjects[1]
    assert bullets.score("", "- a\n- b\n- c", False, {}) == 0.45
    for row in [*sums.rows(False), *sums.rows(True)]:
        a, b = row["question"].split(" + ")
        assert int(a) + int(b) == int(row["answer"])
    assert sums.score("", "32", False, dict(answer="32")) == 0
    turns = sums.messages(dict(question="1 + 1"))
    assert all(turn.get("weight", 1) == (turn["role"] == "user") for turn in turns)


def test_a_task_prepares_rows_and_scores_as_a_reward(tmp_path):
    """source=TASK and reward=TASK: prompts with their records, the answers of those that have one,
    and an iteration of PPO that the task scores."""
    from nano import store
    from prepare import instructions

    tiny.model_dir(tmp_path / "model")
    tok = tokenizer.load(tmp_path / "model", template="chatml")
    given = dict(model=str(tmp_path / "model"), template="chatml", workers=1)

    def prepare(name, source, **more):
        cfg = instructions.Config(source=source, out=str(tmp_path / name), **given | more)
        instructions.main(cfg)
        return store.Store(tmp_path / name)

    rows = prepare("sums", "arithmetic")
    assert len(rows) == 4000
    text = tok.decode(rows.row(0)[0], skip_special=False)
    first = tasks.load("arithmetic").rows(shots=True)[0]
    assert text.startswith(f"<|im_start|>user\n{first['question']}<|im_end|>\n<|im_start|>assistant")
    assert f"\n{first['answer']}<|im_end|>" in text
    path = tiny.jsonl(tmp_path / "rules.jsonl", [RULES])
    rows = prepare("rules", "rules", path=str(path))
    assert json.loads(rows.line(0)) == RULES | dict(file="rules") and not rows.row(0)[1].any()
    path = tiny.jsonl(tmp_path / "arc.jsonl", [ARC])
    (row,) = [prepare("arc", "piqa", path=str(tiny.jsonl(tmp_path / "p.jsonl", [LOCAL["piqa"]])))]
    assert "Turn the lid." in tok.decode(row.row(0)[0])
    for source, message in (("lambada", "has no split to train on beside"), ("piq", "there is no")):
        with pytest.raises(UserError, match=message):
            prepare("none", source)

    settings = dict(model=tmp_path / "model", data=tmp_path / "rules", out=tmp_path / "run", steps=1,
                    reward="rules", batch_size=4, micro_batch=2, group=2, algo="grpo",
                    max_new_tokens=8, max_prompt=250, device="cpu", dtype="float32")
    tiny.train("ppo", tiny.arguments(settings))
    (line,) = tiny.records(tmp_path / "run", "train")
    assert 0 <= line["reward"] <= 1
    for reward, message in (("arc", "scores no answers; those that do are arithmetic, bullets, deepmind"),
                            ("gsm8k", "a prompt comes with the field 'question'|'answer'")):
        with pytest.raises(UserError, match=message):
            tiny.train("ppo", tiny.arguments(settings | dict(reward=reward, out=tmp_path / "r")))
