"""eval.py and nano/evaluation.py: log-likelihoods beside plain forwards, what a model that knows
and one that guesses get, shots, and the files of a run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from test_tasks import ANSWERS, GOLDEN, MMLU

import eval as eval_script
from nano import config, evaluation, runtime, tasks, tokenizer
from nano.config import UserError

FAMILIES = dict(
    llama={},
    windows=dict(windows=(8, 0), family="mistral"),
    learned=dict(positions="learned", norm="layer", mlp="plain", activation="gelu", mlp_bias=True,
                 qkv_bias=True, o_bias=True, family="gpt2", n_kv_heads=4),
)


class OneProcess:
    device = "cpu"
    dtype = "float32"
    seed = 0


@pytest.fixture(scope="module")
def rt():
    with runtime.start(OneProcess, parallel="none") as rt:
        yield rt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and files of records: nine of ARC, of which three may be shown, and of GSM8K."""
    path = tmp_path_factory.mktemp("eval")
    tiny.model_dir(path / "model")
    tiny.model_dir(path / "scorer", head="score")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        choices = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))) for _ in range(4)]
        rows.append(dict(query=f"Question: {i} or {i % 5}?", choices=choices, gold=i % 4))
    tiny.jsonl(path / "arc.jsonl", rows[:9])
    tiny.jsonl(path / "arc_shots.jsonl", rows[9:])
    sums = [dict(question=f"{i}+1?", answer=f"It is {i + 1}.\n#### {i + 1}") for i in range(5)]
    tiny.jsonl(path / "gsm8k.jsonl", sums)
    return path


def task_of(folder, spec="arc:easy"):
    name = spec.partition(":")[0]
    shots = folder / f"{name}_shots.jsonl"
    return tasks.load(spec, str(folder / f"{name}.jsonl"), str(shots) if shots.exists() else "")


# ------------------------------------------------------------------------------ log-likelihoods


def plain_logprobs(model, context, option):
    """The log-probabilities of an option's tokens and the likeliest tokens, by one plain forward."""
    ids = torch.tensor([context + option])
    with torch.no_grad():
        logprobs = model.logits(model.hidden(ids))[0].log_softmax(-1)
    rows = logprobs[len(context) - 1 : -1]
    return rows[range(len(option)), option].sum().item(), rows.argmax(-1).tolist() == option


def questions(seed, options=(1, 4), length=(1, 9), prefix=0):
    """Random questions. `prefix` tokens are common to those of a key."""
    rng = np.random.default_rng(seed)

    def ids(n):
        return rng.integers(0, 256, n).tolist()

    beginnings = {key: ids(prefix) for key in "abc"}
    made = []
    for _ in range(13):
        key = rng.choice([*"abc"])
        answers = [ids(rng.integers(*length)) for _ in range(rng.integers(options[0], options[1]))]
        made.append(
            evaluation.Question(beginnings[key] + ids(rng.integers(1, 20)), answers, str(key))
        )
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [(1, 2), (4, 5), (1, 4)])
@pytest.mark.parametrize("prefix", [0, 40])
def test_loglikelihoods_equal_plain_forwards(rt, family, options, prefix):
    model = tiny.model(**FAMILIES[family])
    asked = questions(1, options, prefix=prefix)
    wanted = [[plain_logprobs(model, q.context, option) for option in q.options] for q in asked]
    for slots in (1, 300, 10**6):
        scored = evaluation.loglikelihoods(model, rt, asked, slots)
        for (logprobs, hits), expected in zip(scored, wanted, strict=True):
            # the kernels of cached and of plain attention round differently
            np.testing.assert_allclose(logprobs, [e[0] for e in expected], rtol=0, atol=2e-4)
            assert hits.tolist() == [e[1] for e in expected]


def test_what_is_given_of_an_option_is_not_scored(rt):
    model, asked = tiny.model(), questions(3, (1, 4), (6, 9))
    for number, question in enumerate(asked):
        if number % 2:  # options that begin alike
            question.options = [[7, 8, 9, *option] for option in question.options]
        question.given = [(number + n) % 6 for n, _ in enumerate(question.options)]
    for slots in (1, 300, 10**6):
        scored = evaluation.loglikelihoods(model, rt, asked, slots)
        for question, (logprobs, hits) in zip(asked, scored, strict=True):
            wanted = [
                plain_logprobs(model, question.context + option[:given], option[given:])
                for option, given in zip(question.options, question.given, strict=True)
            ]
            np.testing.assert_allclose(logprobs, [w[0] for w in wanted], rtol=0, atol=2e-4)
            assert hits.tolist() == [w[1] for w in wanted]


def test_hits_are_what_greedy_decoding_gives(rt):
    model = tiny.model()
    context = [1, 2, 3]
    greedy = []
    for _ in range(4):
        ids = torch.tensor([context + greedy])
        greedy.append(model.logits(model.hidden(ids))[0, -1].argmax().item())
    other = [*greedy[:-1], (greedy[-1] + 1) % 256]
    for options in ([greedy], [greedy, other, greedy[:1], other[-1:]]):
        ((_, hits),) = evaluation.loglikelihoods(model, rt, [evaluation.Question(context, options)])
        assert hits.tolist() == [True, False, True, False][: len(options)]


def test_adapters_count(rt):
    import lora

    model = tiny.model()
    asked = questions(2)
    before = evaluation.loglikelihoods(model, rt, asked)[0][0]
    lora.apply(model, rank=2, alpha=8, targets=("q_proj",))
    for p in tiny.adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.5)
    lora.use(model, "default")
    after = evaluation.loglikelihoods(model, rt, asked)[0][0]
    wanted = [plain_logprobs(model, asked[0].context, option)[0] for option in asked[0].options]
    np.testing.assert_allclose(after, wanted, atol=2e-4)
    assert abs(after - before).max() > 0.1


# -------------------------------------------------------------------------------------- prompts


def test_split_ids():
    class Words:  # a tokenizer of words with the space before them
        add_bos = False
        bos_id = None
        eos_id = 0
        prompt_end = []

        def encode(self, text, bos=False):
            import re

            return re.findall(r" ?\S+|\s+", text)

    split = evaluation.split_ids
    assert split(Words(), "a b", " c d") == (["a", " b"], [" c", " d"])
    assert split(Words(), "a b ", "c d") == (["a", " b"], [" c", " d"])  # the space moves
    assert split(Words(), "", "c d") == ([0], ["c", " d"])
    assert split(Words(), "a b", "c") == (["a"], [" bc"])  # a token across the border is scored
    with_bos = Words()
    with_bos.add_bos, with_bos.bos_id = True, 1
    with_bos.encode = lambda text, bos=False: [1, *Words().encode(text)]
    assert split(with_bos, "a b", " c") == ([1, "a", " b"], [" c"])
    assert split(with_bos, "", "c") == ([1], ["c"])


def test_shots(folder):
    task = task_of(folder)
    pool, records = task.records(shots=True), task.records()
    shown = evaluation.draw_shots(task, pool, records, 2, seed=0)
    assert all(shots == shown[0] and len(shots) == 2 for shots in shown)
    draws = {tuple(r["question"] for r in evaluation.draw_shots(task, pool, records, 2, s)[0])
             for s in range(20)}
    assert len(draws) == 6  # ordered pairs out of three
    # a record is never shown to itself
    for record, shots in zip(pool, evaluation.draw_shots(task, pool, pool, 2, 0), strict=True):
        assert record not in shots and len(shots) == 2
    with pytest.raises(UserError, match="4 shots do not come out of the 3 records that may be"):
        evaluation.draw_shots(task, pool, records, 4, 0)


def test_shots_in_order_and_of_the_same_subject(tmp_path):
    subjects = ["anatomy", "virology"]
    rows = [GOLDEN["mmlu"][0] | dict(subject=s, question=f"{s} {i}")
            for i in range(3) for s in subjects]
    path = str(tiny.jsonl(tmp_path / "rows.jsonl", rows))
    task = tasks.load("mmlu", path, path)
    records = task.records()
    shown = evaluation.draw_shots(task, records, records, 2, seed=5)
    assert [r["question"] for r in shown[5]] == ["virology 0", "virology 1"]
    assert [r["question"] for r in shown[0]] == ["anatomy 1", "anatomy 2"]


def test_plain_prompts_and_conversations(tmp_path, folder):
    tok = tokenizer.load(folder / "model", template="chatml")
    row = GOLDEN["mmlu"][0]
    path = str(tiny.jsonl(tmp_path / "rows.jsonl", [row]))
    shots = str(tiny.jsonl(tmp_path / "shots.jsonl", [row | dict(question="What is it?")]))
    cfg = tiny.model(max_positions=2048).cfg
    intro = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    shot = MMLU.replace("What is 1+1?", "What is it?")

    def prompts(chat):
        benchmark = evaluation.prepare(tasks.load("mmlu", path, shots), tok, cfg, 1, chat=chat)
        return [[tok.decode(ids, skip_special=False) for ids in pair]
                for pair in benchmark.prompts[0]]

    assert prompts("false") == [[f"{intro}{shot} B\n\n{MMLU}", f" {x}"] for x in "ABCD"]
    chat = (
        f"<|im_start|>user\n{intro}{shot}<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        f"<|im_start|>user\n{MMLU}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts("auto") == prompts("true") == [[chat, x] for x in "ABCD"]
    plain = tokenizer.load(folder / "model", template="plain")
    assert not evaluation.uses_chat("auto", plain)
    with pytest.raises(UserError, match="chat=true needs a chat template"):
        evaluation.uses_chat("true", plain)


def test_shots_that_do_not_fit(folder):
    task = task_of(folder)
    tok = tokenizer.load(folder / "model")

    def prepare(positions, shots=2):
        cfg = tiny.model(max_positions=positions).cfg
        return evaluation.prepare(task, tok, cfg, shots, chat="false")

    whole = prepare(1000)
    assert (whole.fewer_shots, whole.truncated) == (0, 0)
    one = prepare(65)
    assert one.fewer_shots == 9 and one.truncated == 0
    # the oldest shot went: what is left is the end of the whole prompt
    for fewer, all_shots in zip(one.prompts, whole.prompts, strict=True):
        (context, option), (longer, same) = fewer[0], all_shots[0]
        assert option == same and longer[-len(context) :] == context
    none = prepare(20, shots=0)
    assert none.truncated == 9 and len(none.prompts) == 9
    assert all(len(c) + len(o) - 1 <= 20 for pairs in none.prompts for c, o in pairs)
    with pytest.raises(UserError, match="not one shot fits beside a record into the model's 40"):
        prepare(40)
    task.prefix = "eval_"
    with pytest.raises(UserError, match="40 tokens: set eval_shots=0$"):
        prepare(40)
    with pytest.raises(UserError, match="an option has 9 tokens, and the model takes 5"):
        prepare(5, shots=0)


# ------------------------------------------------------------------------------------ measuring


def scripted(monkeypatch, choose, answer):
    """Models that need no weights. choose(benchmark, i) -> logprobs of the options of record i.
    answer(record) -> text."""
    at = {}

    def logliks(model, rt, asked, slots):
        flat = iter([x for i in range(len(at["b"].records)) for x in choose(at["b"], i)])
        return [
            (np.array([next(flat) for _ in q.options]), np.array([at["knows"]] * len(q.options)))
            for q in asked
        ]

    def answers(*args):
        return [(answer(at["b"].task, record), True) for record in at["b"].records]

    monkeypatch.setattr(evaluation, "loglikelihoods", logliks)
    monkeypatch.setattr(evaluation, "answers", answers)

    def measure(benchmark, knows=True):
        at["b"], at["knows"] = benchmark, knows
        model = SimpleNamespace(start_ids=())
        return evaluation.measure(benchmark, model, None, None)

    return measure


@pytest.mark.parametrize("spec", [*GOLDEN, *ANSWERS])
def test_models_that_know_guess_and_say_nothing(tmp_path, folder, monkeypatch, spec):
    row = (GOLDEN | ANSWERS)[spec][0]
    path = str(tiny.jsonl(tmp_path / "rows.jsonl", [row] * 400))
    tok = tokenizer.load(folder / "model")
    cfg = tiny.model(max_positions=4096).cfg
    benchmark = evaluation.prepare(tasks.load(spec, path), tok, cfg, chat="false")
    rng = np.random.default_rng(0)

    def knowing(benchmark, i):
        record = benchmark.records[i]
        gold = benchmark.task.gold(record)
        return [0.0 if n in gold else -90.0 for n in range(len(benchmark.task.choices(record)))]

    def guessing(benchmark, i):
        # of the same value in bytes, so that every norm guesses
        texts = benchmark.task.choices(benchmark.records[i])
        return rng.permutation(len(texts)) - len(texts)

    right = next(iter(ANSWERS[spec][2])) if spec in ANSWERS else None
    measure = scripted(monkeypatch, knowing, lambda task, record: right)
    known = measure(benchmark)
    values = {k: v for k, v in known.metrics.items() if k != "perplexity"}
    assert values == pytest.approx(dict.fromkeys(values, 1.0)) and known.centred == 1
    assert known.metrics.get("perplexity", 1) == 1 and known.count == 400
    assert known.stderr[known.main] == pytest.approx(0, abs=1e-9)

    measure = scripted(monkeypatch, guessing, lambda task, record: "")
    guessed = measure(benchmark, knows=False)
    # four standard errors of a coin with the chance of the task
    error = 4 * math.sqrt(guessed.chance * (1 - guessed.chance) / 400) + 1e-9
    assert abs(guessed.metrics[guessed.main] - guessed.chance) <= error
    if not benchmark.task.has_choices:
        assert guessed.metrics[guessed.main] == guessed.chance == 0
    assert len(guessed.examples) == 400 and guessed.examples[7]["number"] == 7


def test_norms_and_standard_errors():
    task = tasks.load("arc")
    record = dict(question="?", choices=["é" * 6, "abcdefgh"], gold=0)
    # by the sum 1, by bytes -12/12 = -1 and -8.1/8, by characters -2 and -1.01
    values = evaluation.choice_values(
        task, record, np.array([-12.0, -8.1]), None, record["choices"]
    )
    assert values == dict(acc=0, acc_norm=1, acc_norm_chars=0)
    assert evaluation.stderr([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 3) / 2)
    assert evaluation.stderr([1]) == 0


def test_perplexity_of_single_options(rt, tmp_path, folder):
    rows = [dict(context="ab", continuation="cd"), dict(context="x", continuation="y")]
    task = tasks.load("lambada", str(tiny.jsonl(tmp_path / "l.jsonl", rows)))
    model, tok = tiny.model(), tokenizer.load(folder / "model")
    result = evaluation.measure(
        evaluation.prepare(task, tok, model.cfg, chat="false"), model, tok, rt
    )
    nll = [-plain_logprobs(model, tok.encode(c), tok.encode(o))[0]
           for c, o in (("ab", " cd"), ("x", " y"))]
    assert result.metrics["perplexity"] == pytest.approx(math.exp(sum(nll) / 2), rel=1e-3)
    error = abs(nll[0] - nll[1]) / 2 * result.metrics["perplexity"]
    assert result.stderr["perplexity"] == pytest.approx(error, rel=1e-3)


def test_answers_end_at_stop_strings(rt, folder):
    from nano import generate

    model, tok = tiny.model(), tokenizer.load(folder / "model")
    prompts = [tok.encode(text) for text in ("one", "two", "three or more")]
    samples = generate.generate(model, prompts, 12, temperature=0.0, stop_ids=tok.stop_ids)
    whole = [tok.decode(ids, inside=True) for ids in samples.tokens]
    for batch_size in (1, 2, 32):
        assert evaluation.answers(model, tok, rt, prompts, 12, (), batch_size) == [
            (tok.decode(ids), finished)
            for ids, finished in zip(samples.tokens, samples.finished, strict=True)
        ]
    stop = whole[2][3]
    texts = evaluation.answers(model, tok, rt, prompts, 12, (stop,))
    for (text, finished), full in zip(texts, whole, strict=True):
        assert text == full.partition(stop)[0]
        assert finished or stop not in full


# --------------------------------------------------------------------------------------- eval.py


def arguments(folder, *more):
    return [
        f"model={folder}/model",
        "tasks=[arc:easy,gsm8k]",
        f"files=[{folder}/arc.jsonl,{folder}/gsm8k.jsonl]",
        f'shot_files=[{folder}/arc_shots.jsonl,""]',
        "shots=[1,0]",
        "chat=false",
        "device=cpu",
        "dtype=float32",
        *more,
    ]


def run(folder, *more):
    cfg = config.load(eval_script.Config, tiny.override(arguments(folder), more))
    config.check(cfg)
    eval_script.main(cfg)


def results(out):
    return json.loads((out / "results.json").read_text())


def without_time(document):
    return {
        name: {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value
        for name, value in document.items()
    }


def test_a_run_its_files_and_its_resume(tmp_path, folder, capsys, monkeypatch):
    run(folder, f"out={tmp_path}/out")
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert document == results(tmp_path / "out")
    assert set(document["arc:easy"]["metrics"]) == {"acc", "acc_norm", "acc_norm_chars"}
    assert document["gsm8k"]["metrics"].keys() == {"em", "em_strict"}
    centred = [document[name]["centred"] for name in ("arc:easy", "gsm8k")]
    assert document["average"] == pytest.approx(sum(centred) / 2)
    assert centred[0] == pytest.approx((document["arc:easy"]["metrics"]["acc"] - 0.25) / 0.75)
    assert any(line.startswith("arc:easy") and "shots 1, plain" in line
               for line in table)
    examples = [json.loads(line) for line in (tmp_path / "out/arc-easy.jsonl").open()]
    accuracy = np.mean([e["acc"] for e in examples])
    assert len(examples) == 9 and accuracy == document["arc:easy"]["metrics"]["acc"]
    assert all(np.argmax(e["logprobs"]) == e["answer"] for e in examples)
    answers = [json.loads(line) for line in (tmp_path / "out/gsm8k.jsonl").open()]
    assert {"prompt", "answer", "gold", "em"} <= answers[0].keys()

    # the same command measures nothing, and another setting measures one task anew
    measured = []
    whole = evaluation.measure
    monkeypatch.setattr(
        evaluation, "measure", lambda b, *args: measured.append(b.task.name) or whole(b, *args)
    )
    run(folder, f"out={tmp_path}/out")
    assert not measured and results(tmp_path / "out") == document
    run(folder, f"out={tmp_path}/out", "shots=[2,0]")
    assert measured == ["arc:easy"]
    assert results(tmp_path / "out")["gsm8k"] == document["gsm8k"]
    # what one task has finished is kept when the next one fails
    measured.clear()
    monkeypatch.setattr(evaluation, "answers", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, f"out={tmp_path}/new")
    assert without_time(results(tmp_path / "new"))["arc:easy"] == (
        without_time(document)["arc:easy"]
    )
    monkeypatch.undo()
    run(folder, f"out={tmp_path}/new")
    assert without_time(results(tmp_path / "new")) == without_time(document)


def test_what_has_changed_under_its_name_is_measured_anew(tmp_path, folder, capsys, monkeypatch):
    for name in ("model", "other", "scorer"):
        tiny.model_dir(tmp_path / name, seed=len(name), head="score" if name == "scorer" else "lm")
    for name in ("arc.jsonl", "arc_shots.jsonl", "gsm8k.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "t.txt").write_text("Some text.")
    (tmp_path / "p.txt").write_text("one")
    tiny.store(tmp_path / "rows", tmp_path / "model", n=4, val=2)
    done = []
    add = eval_script.Results.add
    monkeypatch.setattr(
        eval_script.Results, "add", lambda self, name, *args: done.append(name) or add(self, name, *args)
    )

    def again():
        done.clear()
        run(
            tmp_path, f"out={tmp_path}/out", f"text={tmp_path}/t.txt", f"data={tmp_path}/rows",
            f"prompts={tmp_path}/p.txt", f"against={tmp_path}/other", f"reward={tmp_path}/scorer",
            "max_new_tokens=2", "limit=2",
        )
        return done

    def append(name, text):
        with (tmp_path / name).open("a") as f:
            f.write(text)

    whole = ["arc:easy", "gsm8k", "text", "data", "prompts"]
    assert again() == whole
    assert again() == []
    for name, text, anew in (
        ("t.txt", " More.", "text"),
        ("p.txt", "\ntwo", "prompts"),
        ("arc.jsonl", "\n", "arc:easy"),
        ("arc_shots.jsonl", "\n", "arc:easy"),
        ("gsm8k.jsonl", "\n", "gsm8k"),
    ):
        append(name, text)
        assert again() == [anew], name
    for name in ("other", "scorer"):
        tiny.model_dir(tmp_path / name, seed=99, head="score" if name == "scorer" else "lm")
        assert again() == ["prompts"], name
    tiny.store(tmp_path / "rows", tmp_path / "model", n=6, val=3)
    assert again() == ["data"]
    # the configuration is a part of the model
    settings = json.loads((tmp_path / "model/config.json").read_text())
    settings["rms_norm_eps"] = 0.1
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    assert again() == whole


def test_ranks_and_batches_change_nothing(tmp_path, folder):
    run(folder, f"out={tmp_path}/one")
    one = without_time(results(tmp_path / "one"))
    run(folder, f"out={tmp_path}/small", "slots=1", "batch_size=1")
    small = without_time(results(tmp_path / "small"))
    assert small["arc:easy"]["metrics"] == one["arc:easy"]["metrics"]
    assert small["gsm8k"] == one["gsm8k"]
    jobs = [("eval", tiny.override(arguments(folder), [f"out={tmp_path}/two"]))]
    jobs.append(("eval", tiny.override(arguments(folder), [f"out={tmp_path}/few", "limit=1"])))
    status, output = tiny.processes(tmp_path, jobs)
    assert status == 0, output
    assert without_time(results(tmp_path / "two")) == one  # to the last digit
    for name in ("arc-easy", "gsm8k"):
        a, b = ((tmp_path / f"{dir}/{name}.jsonl").read_text() for dir in ("one", "two"))
        assert a == b
    assert results(tmp_path / "few")["gsm8k"]["count"] == 1


def test_refusals(tmp_path, folder):
    for more, message in (
        (["tasks=[arcs,gsm8k]"], "unknown task 'arcs'; did you mean 'arc'?"),
        (["tasks=[arc,gsm8k,piqa]"], "shots= has 2 elements for 3 tasks: give one for each, or one "
                                     "number for all"),
        (["files=[a.jsonl]"], 'files= has 1 elements for 2 tasks: give one for each ("" for the'),
        (["tasks=[gsm8k,gsm8k]"], "the task gsm8k is named twice"),
        (["tasks=[]", "shots=[0]", "files=[]", "shot_files=[]", "chat=auto"], "nothing to measure: give tasks=, text="),
        (["tasks=[]"], "has no effect with tasks=[]"),
        ([f"model={folder}/scorer"], "scorer is a score model: it gives no text and no log-"),
        (["shots=[-1,0]"], "must be 0 or more each"),
        (["shots=[4,0]"], "arc:easy: 4 shots do not come out of the 3 records that may be shown"),
        ([f"files=[{folder}/gsm8k.jsonl,{folder}/gsm8k.jsonl]"], "gsm8k.jsonl:1: the field"),
        (["shots=[0,1]"], "the shots of gsm8k come from another split than"),
        ([f"out={folder}/arc.jsonl"], "is a file: give a folder"),
    ):
        with pytest.raises(UserError) as e:
            run(folder, f"out={tmp_path}/out", *more)
        assert message in str(e.value), more
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["tasks", "text"])
def test_a_folder_that_cannot_be_created_costs_no_time(tmp_path, folder, monkeypatch, what):
    for owner, name in ((evaluation, "measure"), (eval_script, "measure_text")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("measures"))
    more = [] if what == "tasks" else [
        "tasks=[]", "shots=[0]", "files=[]", "shot_files=[]", "chat=auto", f"text={tmp_path}/t.txt"]
    (tmp_path / "t.txt").write_text("a text")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    with pytest.raises(FileExistsError, match="link"):
        run(folder, *more, f"out={tmp_path}/link")


# -------------------------------------------------------------------------- text, data, win rate


def measured(capsys, *argv):
    cfg = config.load(eval_script.Config, ["device=cpu", "dtype=float32", *argv])
    config.check(cfg)
    eval_script.main(cfg)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_perplexity_of_text(tmp_path, folder, capsys):
    texts = ["A text of some length.", "é" * 20, "", "Short."]
    path = tiny.jsonl(tmp_path / "t.jsonl", [dict(text=text) for text in texts])
    model = eval_script.weights.open(folder / "model").model
    nll = tokens = 0
    for text in texts:
        ids = [257, *text.encode()]  # BOS, and single bytes
        for begin in range(0, len(ids) - 1, 8):
            window = ids[begin + 1 : begin + 9]
            nll -= plain_logprobs(model, ids[begin : begin + 1], window)[0]
            tokens += len(window)
    given = f"model={folder}/model", f"text={path}", "max_length=8", f"out={tmp_path}/out"
    for _ in range(2):  # the second time from the file
        text = measured(capsys, *given)["text"]
        size = sum(len(text.encode()) for text in texts)
        assert (text["tokens"], text["bytes"], text["count"]) == (tokens, size, 3)
        wanted = dict(bits_per_byte=nll / math.log(2) / size, perplexity=math.exp(nll / tokens))
        assert text["metrics"] == pytest.approx(wanted, rel=1e-4)
    (tmp_path / "t.txt").write_text(texts[0])
    whole = measured(capsys, f"model={folder}/model", f"text={tmp_path}/t.txt")["text"]
    assert whole["tokens"] == len(texts[0]) and whole["count"] == 1


def test_loss_of_a_prepared_folder(tmp_path, folder, capsys):
    tiny.store(tmp_path / "rows", folder / "model", n=9, val=5)
    document = measured(capsys, f"model={folder}/model", f"data={tmp_path}/rows")
    settings = dict(model=folder / "model", data=tmp_path / "rows", out=tmp_path / "sft", epochs=0,
                    device="cpu", dtype="float32", samples=0, max_length=64)
    tiny.train("sft", tiny.arguments(settings))
    (line,) = tiny.records(tmp_path / "sft", "eval")
    for name, value in document["data"]["metrics"].items():
        assert value == pytest.approx(line[name], rel=1e-5), name
    assert document["data"]["count"] == 5


def test_win_rate(tmp_path, folder, capsys):
    tiny.model_dir(tmp_path / "other", seed=7)
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")

    def rates(model, against):
        values = measured(
            capsys, f"model={model}", f"against={against}", f"reward={folder}/scorer",
            f"prompts={tmp_path}/prompts.txt", "max_new_tokens=6", f"out={tmp_path}/out",
        )["prompts"]
        examples = [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").open()]
        return values, examples

    values, examples = rates(folder / "model", tmp_path / "other")
    swapped, others = rates(tmp_path / "other", folder / "model")
    assert values["metrics"]["win_rate"] == swapped["metrics"]["win_rate_against"]
    assert [e["answer"] for e in examples] == [e["against"] for e in others]
    scores = np.array([[e["score"], e["score_against"]] for e in examples])
    assert values["metrics"]["win_rate"] == np.mean(scores[:, 0] > scores[:, 1])
    assert len({*scores.flat}) > 5
    # the score is that of the last token of prompt, answer and EOS
    scorer = eval_script.weights.open(folder / "scorer", head="score").model
    ids = [*f"{examples[0]['prompt'][0]['content']}\n{examples[0]['answer']}".encode(), 258]
    assert scorer.score(scorer.hidden(torch.tensor([ids])))[0, -1].item() == (
        pytest.approx(scores[0, 0], abs=1e-4)
    )
    same, _ = rates(folder / "model", folder / "model")
    assert same["metrics"]["win_rate"] == 0.5 and same["ties"] == 5


def test_refusals_of_text_and_win_rate(tmp_path, folder, capsys):
    (tmp_path / "p.txt").write_text("one\n")
    (tmp_path / "e.jsonl").write_text('{"other": 1}\n')
    model = f"model={folder}/model"
    for argv, message in (
        ([f"prompts={tmp_path}/p.txt"], "prompts= needs against="),
        ([f"against={folder}/model"], "has no effect with prompts="),
        ([f"prompts={tmp_path}/p.txt", f"against={folder}/model", f"reward={folder}/model"],
         "is a language model: give a score model"),
        ([f"prompts={tmp_path}/p.txt", f"against={folder}/scorer", f"reward={folder}/scorer"],
         "is a score model"),
        ([f"text={tmp_path}/none.txt"], "is no file"),
        ([f"text={tmp_path}/e.jsonl"], "e.jsonl:1 has no field text"),
        ([f"text={tmp_path}/p.txt", "chat=true"], "chat=true has no effect with tasks="),
        ([f"text={tmp_path}/p.txt", "template=chatml"], "has no effect without tasks= and prompts="),
        ([f"data={folder}", "batch_size=2"], "batch_size=2 has no effect without tasks= and prompts="),
        ([f"data={folder}", "slots=2"], "slots=2 has no effect without tasks= and text="),
        (["max_length=5", "tasks=arc"], "max_length=5 has no effect without text= and data="),
    ):
        with pytest.raises(UserError) as e:
            measured(capsys, model, *argv)
        assert message in str(e.value), argv
