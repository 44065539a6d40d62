"""What of a record becomes a row, and what becomes of the rest: scores, marks, prompts, formats."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano import functions, records, store, tokenizer
from nano.config import UserError
from nano.records import BadRecord
from prepare import fields, instructions, preferences


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model directory whose tokens are bytes, so that they can be read as text."""
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    return str(tiny.model_dir(tmp_path_factory.mktemp("bytes"), special=special))


@pytest.fixture(scope="session")
def tok(model):
    return tokenizer.load(model, template="chatml")


def config(module, **keys):
    return module.Config(**(dict(source="any", model="", out="", max_length=100_000) | keys))


def encode(module, tok, record, **keys):
    """The Unit of a record."""
    return module.encode(config(module, **keys), tok, records.parse(record))


def row(tok, record, **keys):
    """(text of the row, [its targets]) of an instruction record; targets in their order."""
    [(ids, mask)] = encode(instructions, tok, record, **keys).rows
    targets, inside = [], False
    for i, on in zip(ids, mask, strict=True):
        if on and not inside:
            targets.append([])
        inside = bool(on)
        if on:
            targets[-1].append(i)
    return tok.decode(ids), [tok.decode(t) for t in targets]


def completions(tok, record, **keys):
    """The completions of a preference record, best first."""
    unit = encode(preferences, tok, record, **keys)
    return [tok.decode(ids[mask.index(1) :]) for ids, mask in unit.rows]


def user(content, **more):
    return dict(role="user", content=content, **more)


def said(content, **more):
    return dict(role="assistant", content=content, **more)


# ---- scores


SCORED = dict(prompt="Q", responses=["bad", "good"])
BY_SCORE = {
    "rewards": [-1.0, 2.0],
    "reward": [-1.0, 2.0],
    "scores": [1, 9],
    "score": ["1", "9"],
    "ratings": ["3", "5"],
    "rating": [3, 5],
    "human_ratings": [3, 5],
    "grades": [1, 2],
    "labels": [0, 1],
    "label": [False, True],
    "votes": [0, 3],
    "upvotes": [-2, 3],
    "likes": [0, 1],
    "quality": [0.1, 0.2],
    "preferences": [0, 1],
    "ranks": [2, 1],
    "rank": [2.0, 1.0],
    "rankings": [2, 1],
    "overallScore": [1, 2],
    "is_chosen": [False, True],
}


@pytest.mark.parametrize("name", BY_SCORE)
def test_completions_are_sorted_by_their_scores(tok, name):
    values = BY_SCORE[name]
    assert completions(tok, SCORED | {name: values}) == ["good", "bad"]
    inside = [{"text": t, name: v} for t, v in zip(["bad", "good"], values, strict=True)]
    assert completions(tok, dict(prompt="Q", completions=inside)) == ["good", "bad"]


@pytest.mark.parametrize(
    "more, says",
    [
        (dict(elo=[1, 2]), "looks like a score"),
        (dict(foo=[0.5, 1.5]), "looks like a score"),
        (dict(best=1), "looks like a score"),
        (dict(score=3), "looks like a score"),
        (dict(winner="b"), "looks like a score"),
        (dict(toxicity_scores=[0.1, 0.9]), "looks like a score"),
        (dict(preferred=["a", "b"]), "is no number"),
        (dict(scores=["good", "bad"]), "is no number"),
        (dict(scores=[math.inf, 1]), "is no number"),
        (dict(scores=[10**400, 1]), "is no number"),
        (dict(scores=[1]), "not one number for each"),
        (dict(scores=[1, 2], ranks=[1, 2]), "rank the responses differently"),
    ],
)
def test_what_cannot_rank_is_refused(tok, more, says):
    with pytest.raises(BadRecord, match=says):
        completions(tok, SCORED | more)
    assert completions(tok, SCORED | more, ignore=(*more,)) == ["bad", "good"]  # best first


def test_a_field_of_completions_that_looks_like_a_score_is_refused(tok):
    values = [dict(text="bad", helpfulness=1.0), dict(text="good", helpfulness=2.0)]
    with pytest.raises(BadRecord, match="field 'helpfulness' in them looks like a score"):
        completions(tok, dict(prompt="Q", completions=values))
    values = [v | dict(overall_score=v["helpfulness"]) for v in values]  # a part of the whole
    assert completions(tok, dict(prompt="Q", completions=values)) == ["good", "bad"]


@pytest.mark.parametrize("missing", [None, math.nan, "N/A", ""])
def test_completions_without_a_score_are_left_out_and_counted(tok, missing):
    record = dict(prompt="Q", responses=["a", "b", "c"], scores=[1, missing, 3])
    unit = encode(preferences, tok, record)
    assert len(unit.rows) == 2 and unit.counts == {"without a score": 1}
    assert completions(tok, record) == ["c", "a"]
    inside = [dict(text="a", score=1), dict(text="b", score=missing), dict(text="c", score=3)]
    assert completions(tok, dict(prompt="Q", completions=inside)) == ["c", "a"]
    del inside[1]["score"]
    assert completions(tok, dict(prompt="Q", completions=inside)) == ["c", "a"]


@pytest.mark.parametrize("scores", [None, [None, None], []])
def test_a_record_whose_scores_are_missing_has_no_order(tok, scores):
    with pytest.raises(fields.Drop, match="no completion has a score"):
        completions(tok, SCORED | dict(scores=scores))


@pytest.mark.parametrize("good, bad", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_scores_beside_a_pair(tok, good, bad):
    pair = dict(prompt="Q", chosen="a", rejected="b")
    assert completions(tok, pair | {good: 3, bad: 2}) == ["a", "b"]
    assert completions(tok, pair | {good: 3}) == ["a", "b"]
    with pytest.raises(fields.Drop, match="the answer 'rejected' has the better score"):
        completions(tok, pair | {good: 2, bad: 3})


# ---- marks


@pytest.mark.parametrize("name", fields.LEARNED + fields.MASKED)
@pytest.mark.parametrize("off, on", [(0, 1), (False, True), (0.0, 1.0), ("0", "1"), ("false", "True")])
def test_marked_answers_are_no_targets(tok, name, off, on):
    if name in fields.MASKED:
        off = on
    talk = [user("Q"), said("bad", **{name: off}), user("R"), said("good")]
    text, targets = row(tok, dict(messages=talk))
    assert targets == ["good"] and "bad" in text
    with pytest.raises(fields.Drop, match="no answer is to be learned"):
        row(tok, {"prompt": "Q", "completion": "bad", name: off})


@pytest.mark.parametrize("name", fields.LEARNED + fields.MASKED)
@pytest.mark.parametrize("value", [0.5, 2, "yes", [1, 0], {"a": 1}])
def test_marks_that_are_neither_0_nor_1_are_refused(tok, name, value):
    talk = [user("Q"), said("A", **{name: value})]
    with pytest.raises(BadRecord, match="neither 0 nor 1"):
        row(tok, dict(messages=talk))
    record = {"prompt": "Q", "completion": "A", name: value}
    with pytest.raises(BadRecord, match="neither 0 nor 1"):
        row(tok, record)
    assert row(tok, record, ignore=(name,))[1] == ["A"]
    assert row(tok, dict(messages=talk), ignore=(name,))[1] == ["A"]


def test_other_marks(tok):
    assert row(tok, dict(messages=[user("Q", weight=0), said("A", weight=1)]))[1] == ["A"]
    assert row(tok, dict(prompt="Q", completion="A", label=True))[1] == ["A"]
    for record, reason in (
        (dict(prompt="Q", completion="A", label=False), "no answer is to be learned"),
        (dict(messages=[user("Q", train=True), said("A")]), "a turn of the user that is marked"),
        (dict(messages=[user("Q"), said("A", train_detail=[dict(end=1)])]), "train_detail"),
    ):
        with pytest.raises(fields.Drop, match=reason):
            row(tok, record)


# ---- nothing is lost


@pytest.mark.parametrize("name", fields.SYSTEMS)
def test_a_system_prompt_under_any_name(tok, name):
    for record in (dict(prompt="Q", completion="A"), dict(messages=[user("Q"), said("A")])):
        assert row(tok, record | {name: "Be short."})[0].startswith("system\nBe short.\nuser\nQ")
    pair = dict(prompt="Q", chosen="a", rejected="b") | {name: "Be short."}
    [(ids, _), _] = encode(preferences, tok, pair).rows
    assert tok.decode(ids).startswith("system\nBe short.")


@pytest.mark.parametrize("shape", ["prompt/completion", "question/answer", "instruction/output"])
@pytest.mark.parametrize("module", [instructions, preferences])
def test_context_input_and_history_are_part_of_the_question(tok, shape, module):
    ask, reply = shape.split("/")
    record = {ask: "Q", "context": "C", "input": "I", "history": [["H", "J"]]}
    record |= {reply: "A"} if module is instructions else dict(chosen="A", rejected="B")
    (ids, _), *_ = encode(module, tok, record).rows
    assert tok.decode(ids) == "user\nH\nassistant\nJ\nuser\nQ\n\nC\n\nI\nassistant\nA"
    blank = record | dict(context=" \n", input="\t", history=[])
    (ids, _), *_ = encode(module, tok, blank).rows
    assert tok.decode(ids) == "user\nQ\nassistant\nA"


LOST = {
    "images": ["a.png"],
    "image": dict(bytes="x", path="y"),
    "videos": [["v"]],
    "audio": "a.wav",
    "notes": "read this",
    "source": "a text that is far too long for the name of a source. " * 5,
    "foo": 3,
    "flag": True,
    "extra": [user("x")],
}


@pytest.mark.parametrize("name", LOST)
def test_a_field_without_a_place_drops_the_record(tok, name):
    more = {name: LOST[name]}
    for record in (dict(prompt="Q", completion="A"), dict(messages=[user("Q"), said("A")])):
        with pytest.raises(fields.Drop, match=f"fields without a place in the row: {name}"):
            row(tok, record | more)
        assert row(tok, record | more, ignore=(name,))[1] == ["A"]
    with pytest.raises(fields.Drop, match=name):
        completions(tok, dict(prompt="Q", chosen="a", rejected="b") | more)
    talk = [user("Q"), said("A", **more)]
    with pytest.raises(fields.Drop, match=f"field of a message, or fields without a place.*{name}"):
        row(tok, dict(messages=talk))


HARMLESS = dict(id=7, prompt_id="x", source="web", dataset="d", category="c", tags=["a", "b"])
HARMLESS |= dict(timestamp="2024", model="m", score=3.5, num_turns=2, url="u", metadata=dict(a="b"))
HARMLESS |= dict(language="en", empty="", none=None, nothing=[], label=2, __index_level_0__=4)


def test_harmless_fields_and_copies_may_be_lost(tok):
    record = dict(prompt="Q", completion="A") | HARMLESS
    assert row(tok, record | dict(text="<q>Q</q><a>A</a>"))[1] == ["A"]  # rendered by somebody
    assert row(tok, HARMLESS | dict(messages=[user("Q"), said("A")], prompt="Q"))[1] == ["A"]
    with pytest.raises(fields.Drop, match="prompt"):
        row(tok, dict(messages=[user("Q"), said("A")], prompt="another"))
    assert completions(tok, HARMLESS | dict(prompt="Q", chosen="a", rejected="b")) == ["a", "b"]


ALPACA = "Below is an instruction that describes a task, paired with an input that provides further context. "
ALPACA += "Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    "rendered, ask, reply",
    [
        ("<s>[INST] 2+2 [/INST] 4 </s>", "2+2", "4"),
        ("### Human: answer me\n\n### Assistant: a", "answer me", "a"),
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nu<|im_end|>\n", "a", "u"),
        ("Question: a b\nAnswer:\na", "a b", "a"),
        ("Q: one A: two", "one", "two"),
        ("onetwo", "one", "two"),
        (ALPACA + "### Instruction:\none\n\n### Response:\ntwo", "one", "two"),
    ],
)
def test_only_the_row_itself_counts_as_rendered(tok, rendered, ask, reply):
    """A field that holds the texts of the row among others is not lost in silence."""
    record = dict(prompt=ask, completion=reply)
    assert row(tok, record | dict(notes=rendered))[1] == [reply]
    for more in (" Always answer in French.", " x", "7"):
        for notes in (rendered + more, more + rendered):
            with pytest.raises(fields.Drop, match="place in the row: notes"):
                row(tok, record | dict(notes=notes))
    with pytest.raises(fields.Drop, match="place in the row: notes"):
        row(tok, dict(prompt="2+2", completion="4", notes="2+2 is 4. Always answer in French."))


@pytest.mark.parametrize(
    "message",
    [
        said([dict(type="text", text="A"), dict(type="image_url", image_url="x")]),
        said([dict(type="text", text="A", image="x")]),
        said("A", name="Bob"),
        said("A", recipient="tool"),
        said("A", reasoning_content=dict(a=1)),
        said("", function_call=dict(arguments="{}")),
    ],
)
def test_parts_of_a_message_that_have_no_place(tok, message):
    with pytest.raises((fields.Drop, BadRecord)):
        row(tok, dict(messages=[user("Q"), message]))


def test_parsed_messages():
    """What becomes of thoughts and calls, in the form that templates take."""
    call = dict(type="function", function=dict(name="f", arguments=dict(x=1)))
    for form in (
        said(None, tool_calls=[call]),
        said("", tool_calls=[dict(id="1", function=dict(name="f", arguments='{"x": 1}'))]),
        said("", function_call=dict(name="f", arguments='{"x": 1}')),
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "tool_call", "value": '[{"name": "f", "parameters": {"x": 1}}]'},
    ):
        [message] = fields.turns([form])
        [got] = message["tool_calls"]
        assert message["role"] == "assistant" and got["function"] == call["function"]
    for key in fields.THOUGHTS:
        assert fields.turns([said("A", **{key: "why"})])[0]["reasoning_content"] == "why"
    parts = [dict(type="thinking", thinking="why"), dict(type="text", text="A")]
    assert fields.turns([said(parts)]) == [said("A", reasoning_content="why")]
    for tools in ([call["function"]], json.dumps([call["function"]]), call["function"]):
        [tool] = fields.definitions(dict(tools=tools))
        assert tool == dict(type="function", function=call["function"])


TOOLS = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_tools_are_laid_out(model, tok):
    """By a template that takes them, or in plain form; in preferences and a prompt alone too."""
    able = tokenizer.load(model, template=TOOLS)
    tools = [dict(name="add", parameters={})]
    talk = [{"from": "human", "value": "Q"}]
    talk += [{"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'}]
    talk += [{"from": "observation", "value": "R"}, {"from": "gpt", "value": "A"}]
    text, targets = row(able, dict(conversations=talk, tools=json.dumps(tools)))
    assert '"name": "add"' in text and targets == ['CALL add {"x": 1}', "A"]
    pair = dict(prompt="Q", chosen="a", rejected="b")
    assert completions(able, pair | dict(tools=tools)) == ["a", "b"]
    for module, record in (
        (instructions, dict(prompt="Q", completion="A")),
        (instructions, dict(prompt="Q")),
        (preferences, pair),
    ):
        [(ids, _), *_] = encode(module, able, record | dict(tools=tools)).rows
        assert '"name": "add"' in able.decode(ids)
        [(ids, _), *_] = encode(module, tok, record | dict(tools=tools)).rows
        assert '<tools>\n{"type": "function", "function": {"name": "add"' in tok.decode(ids)
        encode(module, tok, record | dict(tools="[]"))  # none


def test_two_system_prompts(tok):
    talk = [dict(role="system", content="S"), user("Q"), said("A")]
    assert row(tok, dict(messages=talk, system="S"))[0].count("system") == 1
    for record in (dict(messages=talk, system="T"), dict(prompt="Q", completion="A", system="S", system_prompt="T")):
        with pytest.raises(fields.Drop, match="two system prompts"):
            row(tok, record)


TEXT = st.text("xyz", min_size=1, max_size=3).map(lambda t: f"<{t}>")
VALUE = st.one_of(TEXT, st.just(""), st.just(None), st.lists(TEXT, max_size=2))
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "Human", "gpt"])
MESSAGE = st.builds(
    lambda role, content, more: dict(role=role, content=content, **more),
    ROLE,
    st.one_of(TEXT, st.just(""), st.just(" \n")),
    st.dictionaries(st.sampled_from(["name", "weight", "reasoning", "foo"]), st.one_of(VALUE, st.sampled_from([0, 1])), max_size=1),
)
TALK = st.lists(MESSAGE, max_size=5)
NAMES = [*fields.TURNS, *instructions.PROMPTS, *fields.SYSTEMS, *fields.THOUGHTS, "completion"]
NAMES += "response answer output context history chosen rejected notes text responses tools images".split()


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUE, TALK), max_size=5))
def test_each_text_of_a_record_is_in_its_row_or_the_record_is_dropped(tok, record):
    for module in (instructions, preferences):
        try:
            unit = encode(module, tok, record)
        except (fields.Drop, BadRecord) as e:
            assert str(e)
            continue
        whole = "".join(tok.decode(ids) for ids, _ in unit.rows) + unit.record.decode()
        if module is instructions and isinstance(record.get("chosen"), dict):
            continue  # the better answer is taken
        for text in fields.strings(record):
            assert text is None or text in fields.ROLES or text.strip() in whole or text.lower() in fields.ROLES, (module, text)


# ---- answers in a prompt, and empty ones


@pytest.mark.parametrize("answer", ["RIGHT", [said("RIGHT")], said("RIGHT")])
def test_answers_in_a_prompt_are_no_targets(tok, answer):
    prompt = [user("Q"), said("WRONG"), user("R")]
    for name in ("completion", "response"):
        text, targets = row(tok, {"prompt": prompt, name: answer})
        assert targets == ["RIGHT"] and "WRONG" in text
    record = dict(messages=prompt, chosen=said("RIGHT"), rejected=said("x"))
    assert row(tok, record)[1] == ["RIGHT"]


def test_empty_answers(tok):
    middle = [user("Q"), said(""), user("R"), said("A")]
    assert row(tok, dict(messages=middle))[1] == ["A"]
    last = [user("Q"), said("A"), user("R"), said(" \n")]
    text, targets = row(tok, dict(messages=last))
    assert targets == ["A"] and text.endswith("user\nR\nassistant\n")
    for record in (dict(prompt="Q", completion=" "), dict(messages=[user("Q"), said("")])):
        with pytest.raises(fields.Drop, match="empty answer"):
            row(tok, record)


# ---- prompts alone


ALONE = {
    "prompt": (dict(prompt="Q", answer="4", extra=[1, 2]), "user\nQ\nassistant\n"),
    "problem": (dict(problem="Q", solution="4"), "user\nQ\nassistant\n"),
    "question": (dict(question="Q", ground_truth=4), "user\nQ\nassistant\n"),
    "instruction": (dict(instruction="Q", input="I"), "user\nQ\n\nI\nassistant\n"),
    "messages": (dict(messages=[user("Q")], answer="4"), "user\nQ\nassistant\n"),
    "prompt of messages": (
        dict(prompt=[user("Q"), said("A"), user("R")], answer="4"),
        "user\nQ\nassistant\nA\nuser\nR\nassistant\n",
    ),
    "system": (dict(prompt="Q", system="S"), "system\nS\nuser\nQ\nassistant\n"),
    "null answer": (dict(prompt="Q", completion=None), "user\nQ\nassistant\n"),
}


@pytest.mark.parametrize("shape", ALONE)
def test_a_prompt_alone_keeps_its_record(tok, shape):
    record, text = ALONE[shape]
    unit = encode(instructions, tok, record)
    [(ids, mask)] = unit.rows
    assert tok.decode(ids) == text and not any(mask) and json.loads(unit.record) == record
    assert list(ids)[-3:] == tok.render([user("Q")], add_generation_prompt=True)[0][-3:]


def test_train_on_none_makes_a_prompt_of_a_pair(tok):
    record = dict(question="Q", answer="because #### 4", system="S")
    unit = encode(instructions, tok, record, train_on="none")
    [(ids, mask)] = unit.rows
    assert tok.decode(ids) == "system\nS\nuser\nQ\nassistant\n" and not any(mask)
    assert json.loads(unit.record) == record
    talk = dict(messages=[user("Q"), said("A"), user("R"), said("B")])
    assert row(tok, talk, train_on="none") == ("user\nQ\nassistant\nA\nuser\nR\nassistant\n", [])


def test_prompts_are_dropped_whole_and_images_with_them(tok):
    for over in ("drop", "truncate"):
        with pytest.raises(fields.Drop, match="longer than max_length=5"):
            row(tok, dict(prompt="Q"), max_length=5, over_length=over)
    with pytest.raises(fields.Drop, match="images"):
        row(tok, dict(prompt="Q", images=["x"]))


def prepare(model, out, path, **keys):
    keys = dict(template="chatml") | keys
    instructions.main(instructions.Config(source=str(path), model=model, out=str(out), **keys))
    return store.Store(out)


def test_records_on_disk(model, tok, tmp_path, capsys):
    """They are in both splits, rows without a record among them, and read by their row's number."""
    rows = [dict(prompt=f"p{i}", **({} if i % 3 else {"completion": "c"}), key=f"k\u00e9{i}") for i in range(60)]
    rows = [r | dict(key="") if "completion" in r else r for r in rows]
    path = tiny.jsonl(tmp_path / "in.jsonl", rows)
    prepare(model, tmp_path / "out", path, val="20")
    seen = 0
    for split in ("train", "val"):
        s = store.Store(tmp_path / "out", split)
        assert s.prompts == sum(not s.row(i)[1].any() for i in range(len(s)))
        for i in range(len(s)):
            text = tok.decode(s.prompt(i).tolist()).removeprefix("user\n").removesuffix("\nassistant\n")
            record = json.loads(s.line(i) or "null")
            number = int(text[1:])
            assert record == (rows[number] if number % 3 else None)
            seen += 1
    assert seen == 60 and "prompts alone" in capsys.readouterr().out
    prepare(model, tmp_path / "out", path)  # an earlier folder with records may be replaced
    (tmp_path / "out/train.records.jsonl").write_bytes(b"x")
    with pytest.raises(UserError, match="train.records.jsonl has 1 bytes"):
        store.Store(tmp_path / "out")
    old = tmp_path / "old"
    store.write_store(old, dict(train=[([1, 2, 3], [0, 1, 0])]), dict(vocab_size=264))
    s = store.Store(old)
    assert s.line(0) == b"" and s.prompt(0).tolist() == [1]


def test_an_open_conversation_is_a_prompt_for_ppo_and_answers_for_sft(model, tok, tmp_path):
    talk = dict(messages=[user("Q"), said("A"), user("R")], answer="4")
    s = prepare(model, tmp_path / "out", tiny.jsonl(tmp_path / "in.jsonl", [talk]))
    assert tok.decode(s.prompt(0).tolist()) == "user\nQ\nassistant\nA\nuser\nR\nassistant\n"
    assert tok.decode(s.row(0)[0][s.row(0)[1] == 1].tolist()) == "A" and s.prompts == 0


def test_prompts_alone_are_not_trained_on(model, tmp_path):
    from nano.batches import Rows

    path = tiny.jsonl(tmp_path / "in.jsonl", [dict(prompt="p", answer="4")])
    prepare(model, tmp_path / "out", path)
    with pytest.raises(UserError, match="such prompts alone are for ppo.py"):
        Rows(store.mix([tmp_path / "out"]), 1, 1, 64)
    path = tiny.jsonl(tmp_path / "in.jsonl", [dict(prompt="p"), dict(prompt="q", completion="c")])
    prepare(model, tmp_path / "out", path)
    rows = Rows(store.mix([tmp_path / "out"]), 1, 1, 64)
    assert rows.index.tolist() == [1] and "1 of the dropped are prompts alone" in rows.summary


# ---- rewards


REWARDS = """
def three(prompt, response, finished): return 1.0
def four(prompt, response, finished, record): return float(record["answer"])
def default(prompt, response, finished, record=None): return float(record["answer"])
def other(prompt, response, finished, scale=None): return float(scale["answer"])
def without(prompt, response, finished, scale=2.0): return scale
def none(prompt, response, finished): return None if response == "x" else 0.5
def shown(prompt, response, finished): return float("<|im_end|>" in response)
"""


def test_rewards_with_records_and_none(model, tok, tmp_path):
    (tmp_path / "r.py").write_text(REWARDS)

    def judge(name, special=False, records=(dict(answer="4"), dict(answer="5"))):
        function = functions.load_function(f"{tmp_path}/r.py:{name}")
        ids = [[*b"x"], [*b"y", 257]]
        finished = torch.tensor([1.0, 1.0])
        return functions.judge(function, tok, ids, ids, finished, records, special).tolist()

    assert judge("three") == [1, 1]
    assert judge("four") == judge("default") == judge("other") == [4, 5]
    # where there is no record, the parameter keeps its default
    assert judge("without", records=None) == [2, 2]
    first, second = judge("none")
    assert math.isnan(first) and second == 0.5
    assert judge("shown") == [0, 0] and judge("shown", special=True) == [0, 1]


# ---- files


ROWS = [dict(prompt="a", completion="b"), dict(prompt="c", completion="d")]
JSON = {
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty records": "\n".join(json.dumps(r, indent=2) for r in ROWS),
    "records without space": "".join(json.dumps(r, indent=1) for r in ROWS),
    "data": json.dumps(dict(version="1", data=ROWS)),
    "pretty data": json.dumps(dict(data=ROWS), indent=2),
    "rows": json.dumps(dict(rows=ROWS)),
    "columns": json.dumps(dict(prompt=["a", "c"], completion=["b", "d"])),
    "pretty columns": json.dumps(dict(prompt=["a", "c"], completion=["b", "d"]), indent=2),
    "lines": "\n".join(map(json.dumps, ROWS)),
}


def read(path):
    bar = SimpleNamespace(update=lambda n: None)
    return [records.parse(raw) for _, raw in records.read_file(path, bar)]


@pytest.mark.parametrize("form", JSON)
def test_forms_of_json(tmp_path, form):
    (tmp_path / "a.json").write_text(JSON[form])
    assert read(tmp_path / "a.json") == ROWS
    (tmp_path / "a.jsonl").write_text(JSON[form])
    assert read(tmp_path / "a.jsonl") == ROWS


@pytest.mark.parametrize(
    "record",
    [
        dict(messages=[user("Q"), said("A")]),
        dict(prompt=[user("Q")], completion=[said("A")]),
        dict(prompt="Q", responses=["a", "b"]),
        dict(messages=[user("Q")], tools=[dict(name="f")]),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_record_stays_a_record(tmp_path, record, indent):
    (tmp_path / "a.json").write_text(json.dumps(record, indent=indent))
    assert read(tmp_path / "a.json") == [record]


def test_files_that_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "two.json").write_text(json.dumps(dict(train=ROWS, test=ROWS)))
    with pytest.raises(UserError, match="several lists of records .train, test."):
        read(tmp_path / "two.json")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        for name in ("a.json", "a.jsonl", "a.csv"):
            (tmp_path / name).write_text(JSON["lines"], encoding=encoding)
            with pytest.raises(UserError, match="UTF-16 or UTF-32 text: convert it"):
                read(tmp_path / name)


def test_long_messages_are_cut(model, tmp_path):
    long = {f"field{i}": "x" * 500 for i in range(2000)}
    path = tiny.jsonl(tmp_path / "in.jsonl", [long, dict(messages=[dict(role="x" * 9999, content="")])])
    with pytest.raises(UserError) as e:
        prepare(model, tmp_path / "out", path, on_error="skip")
    assert len(str(e.value)) < 1500
    path = tiny.jsonl(tmp_path / "in.jsonl", [dict(prompt="p", completion="c", **{f"odd{i}": "x"}) for i in range(50)])
    with pytest.raises(UserError, match="47 reasons more") as e:
        prepare(model, tmp_path / "out", path)
    assert len(str(e.value)) < 1500


def test_parquet_dates_beyond_9999(model, tmp_path):
    import pyarrow
    import pyarrow.parquet

    days = pyarrow.array([10_000_000, 1], pyarrow.int32()).cast(pyarrow.date32())
    moments = pyarrow.array([3 * 10**14, 1], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    table = pyarrow.table(dict(prompt=["a", "c"], completion=["b", "d"], date=days, created=moments))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(prepare(model, tmp_path / "out", tmp_path / "a.parquet")) == 2
    prompts = table.drop_columns(["completion"])
    pyarrow.parquet.write_table(prompts, tmp_path / "a.parquet")
    s = prepare(model, tmp_path / "out", tmp_path / "a.parquet")
    assert json.loads(s.line(1)).keys() == {"prompt", "date", "created"}


def test_a_folder_of_save_to_disk(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [dict(prompt=f"p{i}", completion="c") for i in range(300)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one", num_shards=2)
    assert len(prepare(model, tmp_path / "out", tmp_path / "one")) == 300
    splits = dict(train=datasets.Dataset.from_list(rows[:9]), test=datasets.Dataset.from_list(rows[9:12]))
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert len(prepare(model, tmp_path / "out", tmp_path / "two")) == 9
    assert len(prepare(model, tmp_path / "out", tmp_path / "two", split="test")) == 3
    with pytest.raises(UserError, match="has no split 'dev': give split= one of test, train"):
        prepare(model, tmp_path / "out", tmp_path / "two", split="dev")


@pytest.mark.parametrize(
    "names, read, left_out",
    [
        (["train-0.jsonl", "train-1.jsonl", "test-0.jsonl"], 2, "test-0.jsonl"),
        (["data/train.jsonl", "data/validation.jsonl"], 1, "data/validation.jsonl"),
        (["train/a.jsonl", "test/a.jsonl"], 1, "test/a.jsonl"),
        (["a.jsonl", "b.jsonl"], 2, None),
        (["testimony.jsonl", "train.jsonl"], 2, None),
        (["test-0.jsonl"], 1, None),
    ],
)
def test_splits_in_a_folder(model, tmp_path, capsys, names, read, left_out):
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        tiny.jsonl(tmp_path / "in" / name, [dict(prompt=f"p{i}", completion="c")])
    assert len(prepare(model, tmp_path / "out", tmp_path / "in")) == read
    out = capsys.readouterr().out
    assert (f"split=train leaves out {left_out}" in out) == bool(left_out)


@pytest.mark.parametrize(
    "name, role",
    [("Assistant", "assistant"), (" AI ", "assistant"), ("GPT", "assistant"), ("Human", "user")]
    + [(tool, "tool") for tool in ("ipython", "tool_response", "tool_result", "observation", "function")],
)
def test_role_names(name, role):
    assert fields.turns([dict(role=name, content="x")]) == [dict(role=role, content="x")]


# ---- the held-out


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.data())
def test_the_nearest_number_is_held_out(sizes, data):
    hashes = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    count = data.draw(st.integers(1, len(hashes) - 1))
    picks = records.held_out(hashes, str(count))
    assert not set(hashes[picks]) & set(hashes[~picks])
    sums = {0}
    for size in sizes:
        sums |= {s + size for s in sums}
    assert abs(int(picks.sum()) - count) == min(abs(s - count) for s in sums - {0, len(hashes)})


def test_answers_to_one_prompt_stay_together(model, tok, tmp_path):
    rows = [dict(prompt=f"p{i % 20}", completion=f"c{i}") for i in range(100)]
    train = prepare(model, tmp_path / "out", tiny.jsonl(tmp_path / "in.jsonl", rows), val="9%")
    val = store.Store(tmp_path / "out", "val")
    asked = [{tok.decode(s.prompt(i).tolist()) for i in range(len(s))} for s in (train, val)]
    assert len(val) == 10 and not asked[0] & asked[1]


# ---- what JSON may not hold


@pytest.mark.parametrize(
    "bad, says",
    [
        ('{"prompt": "x", "a": 1, "prompt": "y"}', "the key 'prompt' is given twice"),
        ('{"messages": [{"role": "user", "content": "x", "content": "]}{"}]}', "the key 'content' is given twice"),
        (r'{"prompt": "\ud83d"}', r"text that is no Unicode \(\\ud83d without its other half\)"),
        (r'{"a": {"b": ["\uDE00 x"]}}', r"text that is no Unicode \(\\ude00 without its other half\)"),
    ],
)
@pytest.mark.parametrize("layout", ["lines", "array", "objects"])
def test_a_record_that_would_lose_something_is_bad(tmp_path, monkeypatch, layout, bad, says):
    """A key given twice, or half a character. The records around it are read."""
    monkeypatch.setattr(records, "BLOCK", 16)  # each record comes in pieces
    good = r'{"prompt": "\ud83d\ude00 \\ud83d é"}'
    items = [good, bad, good]
    whole = dict(
        lines="\n".join(items),
        array=f"[{','.join(items)}]",
        objects="\n".join(item.replace("{", "{\n", 1) for item in items),
    )[layout]
    (tmp_path / "a.json").write_text(whole)
    read = []
    for _, raw in records.read_file(tmp_path / "a.json", SimpleNamespace(update=lambda n: None)):
        try:
            read.append(records.parse(raw))
        except BadRecord as e:
            read.append(e)
    assert read[0] == read[2] == {"prompt": "\U0001f600 \\ud83d é"}
    with pytest.raises(BadRecord, match=says):
        raise read[1]


# ---- what a user sees


def test_show_prints_rows_when_nothing_is_written(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    path = tiny.jsonl(tmp_path / "in.jsonl", [dict(prompt="p", completion="c" * 50)])
    with pytest.raises(UserError, match="gives no row"):
        prepare(model, tmp_path / "out", path, max_length=20, show=1)
    out = capsys.readouterr().out
    assert "dropped, longer than max_length=20:" in out and f"«{'c' * 50}<|im_end|>»" in out
    path = tiny.jsonl(tmp_path / "in.jsonl", [dict(prompt="p", completion="c"), dict(x=1)])
    with pytest.raises(UserError, match="in.jsonl:2"):
        prepare(model, tmp_path / "out", path, show=1)
    assert "«c<|im_end|>»" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "org-x/set-1", "folder"])
@pytest.mark.parametrize(
    "stage, command",
    [
        ("sft", "prepare.instructions source={} model={}"),
        ("dpo", "prepare.preferences source={} model={}"),
        ("reward", "prepare.preferences source={} model={}"),
        ("ppo", "prepare.instructions source={} model={}"),
        ("pretrain", "prepare.text source={} tokenizer={}"),
    ],
)
def test_data_that_is_not_prepared_names_the_command(model, tmp_path, monkeypatch, stage, command, name):
    monkeypatch.chdir(tmp_path)
    tiny.jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    tiny.jsonl(tmp_path / "folder/a.json", ROWS)
    (tmp_path / "r.py").write_text(REWARDS)
    argv = [f"model={model}", f"data={name}", "out=out/run", "device=cpu"]
    argv += ["reward=r.py:three"] if stage == "ppo" else []
    with pytest.raises(UserError) as e:
        tiny.train(stage, argv)
    folder = f"data/{name.rpartition('/')[2].partition('.')[0]}"
    expected = f"data={name} is not prepared yet: run `python -m {command.format(name, model)} out={folder}`"
    assert str(e.value).startswith(expected)
