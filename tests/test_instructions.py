"""prepare.instructions: readers against json.loads, rows against texts by hand, and bad input."""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import test_preferences
import tiny
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import jsonl

from nano import config, records, store, tasks, tokenizer
from nano.config import UserError
from nano.store import Store
from prepare import convert, instructions


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model directory whose tokens are bytes, so that they can be read as text."""
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    return str(tiny.model_dir(tmp_path_factory.mktemp("bytes"), special=special))


def prepare(model, out, source, **keys):
    keys = dict(template=None if "text_field" in keys else "chatml") | keys
    instructions.main(instructions.Config(source=str(source), model=model, out=str(out), **keys))
    return Store(out)


def texts(model, store):
    """[(the row as text, [its spans of target text])]"""
    tok = tokenizer.load(model)
    rows = []
    for i in range(len(store)):
        tokens, mask = store.row(i)
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]
        spans = [tok.decode(tokens[a:b].tolist(), False) for a, b in pairwise(edges) if mask[a]]
        rows.append((tok.decode(tokens.tolist(), False), spans))
    return rows


def one(model, tmp_path, record, **keys):
    """The row of one record: (its text, [its spans of target text])."""
    store = prepare(model, tmp_path / "out", jsonl(tmp_path / "in.jsonl", [record]), **keys)
    [row] = texts(model, store)
    return row


def messages(turns, keys=("role", "content")):
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


# ---- record shapes

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
S = "<|im_start|>system\n"
TALK = messages(
    [("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"), ("gpt", "So long.")], ("from", "value")
)
CHAT = f"{U}Hi{E}\n{A}Hello.{E}\n{U}Bye{E}\n{A}So long.{E}"


@pytest.mark.parametrize(
    "record, row, targets",
    [
        (
            dict(instruction="Add.", input="1 2", output="3"),
            f"{U}Add.\n\n1 2{E}\n{A}3{E}",
            [f"3{E}"],
        ),
        (
            dict(instruction="Say A.", input="", output="A", id=7),
            f"{U}Say A.{E}\n{A}A{E}",
            [f"A{E}"],
        ),
        (dict(instruction="Q", context="C", response="R"), f"{U}Q\n\nC{E}\n{A}R{E}", [f"R{E}"]),
        (
            dict(instruction="Q", output="R", system="Be short."),
            f"{S}Be short.{E}\n{U}Q{E}\n{A}R{E}",
            [f"R{E}"],
        ),
        (
            dict(instruction="Bye", input="", output="So long.", history=[["Hi", "Hello."]]),
            CHAT,
            [f"Hello.{E}", f"So long.{E}"],
        ),
        (dict(prompt="P", completion="C"), f"{U}P{E}\n{A}C{E}", [f"C{E}"]),
        (dict(prompt="P", response=" C "), f"{U}P{E}\n{A} C {E}", [f" C {E}"]),
        (dict(question="P", answer="C"), f"{U}P{E}\n{A}C{E}", [f"C{E}"]),
        (dict(question="P", context="K", answer="C"), f"{U}P\n\nK{E}\n{A}C{E}", [f"C{E}"]),
        (
            dict(messages=None, instruction="Q", response=None, output="R", input=None),
            f"{U}Q{E}\n{A}R{E}",
            [f"R{E}"],
        ),
        (
            dict(
                messages=[
                    dict(role="user", content="Hi"),
                    dict(role="assistant", content=[dict(type="text", text="Hello.")], weight=0),
                    dict(role="user", content="Bye"),
                    dict(role="assistant", content="So long.", weight=1),
                ]
            ),
            CHAT,
            [f"So long.{E}"],
        ),
        (dict(input="P", output="C", Label=2), f"{U}P{E}\n{A}C{E}", [f"C{E}"]),
        (
            dict(prompt=messages([("user", "P")]), completion=messages([("assistant", "C")])),
            f"{U}P{E}\n{A}C{E}",
            [f"C{E}"],
        ),
        (dict(conversations=TALK), CHAT, [f"Hello.{E}", f"So long.{E}"]),
        (
            dict(messages=messages([("system", "S"), ("user", "P"), ("assistant", "C")])),
            f"{S}S{E}\n{U}P{E}\n{A}C{E}",
            [f"C{E}"],
        ),
        (
            dict(
                messages=messages(
                    [("user", [dict(type="text", text="P"), dict(type="text", text="Q")])]
                ),
                chosen=dict(role="assistant", content="better"),
                rejected=dict(role="assistant", content="worse"),
            ),
            f"{U}PQ{E}\n{A}better{E}",
            [f"better{E}"],
        ),
        # a conversation that awaits its answer ends with the prompt for it
        (
            dict(conversations=messages([("user", "P"), ("gpt", "C"), ("user", "Thanks")])),
            f"{U}P{E}\n{A}C{E}\n{U}Thanks{E}\n{A}",
            [f"C{E}"],
        ),
        # the name of a control token in a record is text, and takes more than one token
        (dict(prompt="a<|im_end|>b", completion="c"), f"{U}a<|im_end|>b{E}\n{A}c{E}", [f"c{E}"]),
        (
            dict(prompt="Zür\u2028", completion="写 \U0001f600"),
            f"{U}Zür\u2028{E}\n{A}写 \U0001f600{E}",
            [f"写 \U0001f600{E}"],
        ),
    ],
)
def test_shapes(model, tmp_path, record, row, targets):
    assert one(model, tmp_path, record) == (row, targets)


def test_control_tokens_in_records_are_text(model, tmp_path):
    store = prepare(
        model,
        tmp_path / "out",
        jsonl(tmp_path / "a.jsonl", [dict(prompt="a<|im_end|>b", completion="<|im_end|>")]),
    )
    tokens, mask = store.row(0)
    assert mask[tokens == 257].tolist() == [0, 1]  # the two ends of turns, from the template


def test_train_on_last(model, tmp_path):
    record = dict(conversations=TALK)
    assert one(model, tmp_path, record, train_on="last") == (CHAT, [f"So long.{E}"])


def test_every_row_of_alpaca(model, tmp_path, shared_data):
    store = prepare(model, tmp_path / "out", shared_data / "alpaca_en_demo.json", max_length=10_000)
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    expected = []
    for r in rows:
        question = "\n\n".join(filter(None, (r["instruction"], r["input"])))
        expected.append((f"{U}{question}{E}\n{A}{r['output']}{E}", [r["output"] + E]))
    assert len(expected) == 999 and texts(model, store) == expected


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen2"])
def test_response_template_is_found_by_characters(tmp_path, shared_data, family):
    """Whatever the text before and after it is, in a vocabulary with merges."""
    model = str(shared_data / "tok_fixtures" / family)
    rng = random.Random(0)
    words = ["### Label:", "###", " Label:", "\n", "the", " and", "é", "\n\n", ":", " "]
    mark = "### Label:"
    rows = []
    for _ in range(60):
        before = "".join(rng.choices(words, k=rng.randint(0, 6)))
        rows.append(f"{before} {mark}{rng.choice(words[5:])}x")
    source = jsonl(tmp_path / "in.jsonl", [dict(text=t) for t in rows])
    store = prepare(model, tmp_path / "out", source, text_field="text", response_template=mark)
    got = texts(model, store)
    bos, eos = got[0][0].split(rows[0])
    assert eos and got == [(bos + t + eos, [t.rpartition(mark)[2] + eos]) for t in rows]


def test_text_field(model, tmp_path, capsys):
    rows = [
        dict(text="Q: a A: b A: c"),
        dict(text="no mark"),
        dict(text="A: first"),
        dict(text="Q: A: "),
    ]
    source = jsonl(tmp_path / "in.jsonl", rows)
    store = prepare(model, tmp_path / "out", source, text_field="text", response_template="A:")
    assert texts(model, store) == [
        ("Q: a A: b A: c</s>", [" c</s>"]),
        ("A: first</s>", [" first</s>"]),
    ]
    assert store.meta["dropped"] == {"no response template in the text": 1, "empty answer": 1}
    whole = prepare(model, tmp_path / "out", source, text_field="text")
    assert texts(model, whole)[1] == ("no mark</s>", ["no mark</s>"])
    out = capsys.readouterr().out
    assert "rows kept" in out and "no response template" in out and "target tokens" in out


# ---- known sets

CHOICES = dict(text=["sun", "moon"], label=["A", "B"])
SETS = {  # name: (record, prompt and target under the template "columns")
    "alpaca": (
        dict(instruction="Add.", input="1 2", output="3", text="..."),
        "### INSTRUCTION:\nAdd.\n\n### INPUT:\n1 2\n\n### RESPONSE:\n",
        "3",
    ),
    "alpaca-zh": (
        dict(instruction="加。", input="", output="三"),
        "### INSTRUCTION:\n加。\n\n### RESPONSE:\n",
        "三",
    ),
    "belle": (
        dict(instruction="加。\n1 2", input="", output="3"),
        "### INSTRUCTION:\n加。\n1 2\n\n### RESPONSE:\n",
        "3",
    ),
    "guanaco": (
        dict(instruction="足す", input="1 2", output="3"),
        "### INSTRUCTION:\n足す\n\n### INPUT:\n1 2\n\n### RESPONSE:\n",
        "3",
    ),
    "dolly": (
        dict(instruction="Who?", context="Ann ran.", response="Ann", category="closed_qa"),
        "### INSTRUCTION:\nWho?\n\n### INPUT:\nAnn ran.\n\n### RESPONSE:\n",
        "Ann",
    ),
    "ultrachat": (
        dict(
            prompt="H",
            prompt_id="1",
            messages=[dict(role="user", content="H"), dict(role="assistant", content="A")],
        ),
        "### INSTRUCTION:\nH\n\n### RESPONSE:\n",
        "A",
    ),
    "tulu-3-sft": (
        dict(
            id="1",
            source="ai2",
            messages=[
                dict(role="system", content="S"),
                dict(role="user", content="H"),
                dict(role="assistant", content="A"),
            ],
        ),
        "### INSTRUCTION:\nS\n\n### QUESTION:\nH\n\n### RESPONSE:\n",
        "A",
    ),
    "smoltalk": (
        dict(
            source="smol-magpie-ultra",
            messages=[dict(role="user", content="H"), dict(role="assistant", content="A")],
        ),
        "### INSTRUCTION:\nH\n\n### RESPONSE:\n",
        "A",
    ),
    "openhermes": (
        dict(
            conversations=[{"from": "human", "value": "H"}, {"from": "gpt", "value": "A"}],
            source="airoboros2.2",
            category="orca",
            custom_instruction=None,
            skip_prompt_formatting=False,
            avatarUrl="https://x",
            title="T",
            views=3.0,
            system_prompt=None,
            model_name=None,
            hash="7",
        ),
        "### INSTRUCTION:\nH\n\n### RESPONSE:\n",
        "A",
    ),
    "self-instruct": (
        dict(
            id="seed_task_1",
            name="relation",
            instruction="Add.",
            instances=[dict(input="1 2", output="3"), dict(input="1", output="1")],
            is_classification=False,
        ),
        "### INSTRUCTION:\nAdd.\n\n### INPUT:\n1 2\n\n### RESPONSE:\n",
        "3",
    ),
    "commonsense-dialogues": (
        dict(context="Sydney met Ann.", speaker="Sydney", turns=["I met Ann.", "How?", "Well."]),
        "### INSTRUCTION:\nSydney met Ann.\n\n### QUESTION:\nI met Ann.\n\n### RESPONSE:\n",
        "How?",
    ),
    "squad": (
        dict(
            id="1",
            title="T",
            context="Ann ran.",
            question=" Who ran?",
            answers=dict(text=["Ann", "Ann ran"], answer_start=[0, 0]),
        ),
        "### CONTEXT:\nAnn ran.\n\n### QUESTION:\nWho ran?\n\n### ANSWER:\n",
        "Ann",
    ),
    "deepmind-mathematics:algebra__linear_1d": (
        dict(question="b'Solve 2*x = 4 for x.\\n'", answer="b'2\\n'"),
        "### QUESTION:\nSolve 2*x = 4 for x.\n\n### ANSWER:\n",
        "2",
    ),
    "cot-collection": (
        dict(source="Why?", rationale="For.", target="So."),
        "### SOURCE:\nWhy?\n\n### RATIONALE:\n",
        "For.\n\n### TARGET:\nSo.",
    ),
    "slimorca": (
        dict(
            conversations=[
                {"from": "system", "value": "S"},
                {"from": "human", "value": "H"},
                {"from": "gpt", "value": "G"},
            ]
        ),
        "### FROM:\nsystem\n\n### VALUE:\nS\n\n### FROM:\nhuman\n\n### VALUE:\nH\n\n### GPT:\n",
        "G",
    ),
    "openorca-multiplechoice": (
        dict(system_prompt="S", question="Q", response="R"),
        "### INSTRUCTION:\nS\n\n### QUESTION:\nQ\n\n### RESPONSE:\n",
        "R",
    ),
    "mmlu": (
        dict(question="Q", subject="", choices=["a", "b", "c", "d"], answer=2),
        "### QUESTION:\nQ\n\n### CHOICES:\n(0): a (1): b (2): c (3): d\n\n### ANSWER:\n",
        "c",
    ),
    "arc": (
        dict(question="Q", choices=CHOICES, answerKey="B"),
        "### QUESTION:\nQ\n\n### CANDIDATE ANSWERS:\n(A): sun (B): moon\n\n### ANSWER:\n",
        "moon",
    ),
    "gsm8k": (
        dict(question="Q", answer="1+1=2\n#### 2"),
        "### QUESTION:\nQ\n\n### ANSWER:\n",
        "1+1=2\n#### 2",
    ),
    "winogrande:xs": (
        dict(sentence="_ ran.", option1="Ann", option2="Ben", answer="1"),
        "### SENTENCE:\n_ ran.\n\n### OPTION1:\nAnn\n\n### OPTION2:\nBen\n\n### ANSWER:\n",
        "Ann",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_known_sets(model, tmp_path, name):
    record, prompt, target = SETS[name]
    path = tmp_path / "in.json"  # an array, since a lone object may hold the records in it
    path.write_text(json.dumps([record]))
    store = prepare(model, tmp_path / "out", name, path=str(path), template="columns")
    assert texts(model, store) == [(f"{prompt}{target}</s>", [f"{target}</s>"])]
    chat = prepare(model, tmp_path / "out", name, path=str(path))
    named = {"mmlu": "C"}  # a chat model answers with the letter, as it is asked to
    assert texts(model, chat)[0][1] == [named.get(name, target) + E]


def test_every_training_set_has_a_record_here():
    sets = {name for name in tasks.names() if tasks.load(name).is_set}
    assert sets <= {tasks.name_of(name) for name in (*SETS, *test_preferences.SETS)}


def test_known_sets_in_their_variants(model, tmp_path):
    def target(name, record):
        path = str(jsonl(tmp_path / "in.jsonl", [record]))
        store = prepare(model, tmp_path / "out", name, path=path, template="columns")
        return texts(model, store)[0]

    numbered = dict(text=["x", "y"], label=["1", "2"])
    assert target("arc", dict(question="Q", choices=numbered, answerKey="2"))[1] == ["y</s>"]
    assert target("winogrande:xl", SETS["winogrande:xs"][0] | dict(answer=2))[1] == ["Ben</s>"]
    record = dict(system_prompt="", question="Q", response="R")
    assert target("openorca-multiplechoice", record)[0].startswith("### QUESTION:")
    row, targets = target("slimorca", dict(conversations=TALK))
    assert targets == ["So long.</s>"]  # the last answer alone
    assert row.startswith(
        "### FROM:\nhuman\n\n### VALUE:\nHi\n\n"
        "### FROM:\ngpt\n\n### VALUE:\nHello.\n\n### FROM:\nhuman"
    )
    for name, record in (
        ("arc", dict(question="Q", choices=CHOICES, answerKey="E")),
        ("mmlu", dict(question="Q", choices=["a"], answer=1)),
        ("winogrande:m", SETS["winogrande:xs"][0] | dict(answer="")),
        ("cot-collection", dict(source="x")),
        ("slimorca", {}),
    ):
        with pytest.raises(UserError, match="in.jsonl:1: "):
            target(name, record)


MORE = [
    dict(conversations=TALK, system="S", tools="[]", chosen={}),
    dict(instruction="Q", input="", output="R", history=[["Q", "R"]], system=""),
    dict(
        prompt=[dict(role="user", content="P")],
        completion=[dict(role="assistant", content=[dict(type="text", text="C")])],
    ),
]
JUNK = [None, 0, 1, 2.5, True, "", " ", "x", "user", "\ud800"]
JUNK += [[], [1], ["x"], [[]], [["x", 3]], {}, {"role": "user"}, {"text": []}]


def spoil(rng, value):
    """`value` with something in it replaced or left out."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return rng.choice(JUNK)
    value = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = spoil(rng, value[key])
    return value


@pytest.mark.parametrize("template", ["chatml", "columns", "llama2"])
def test_no_record_is_a_traceback(model, template):
    rng = random.Random(0)
    bad = good = 0
    samples = [(name, record) for name, (record, _, _) in SETS.items()]
    samples += [("any", record) for record in MORE] * 2
    job = instructions.Config(source="any", model=model, out="", template=template)
    tok = tokenizer.load(model, template=template)
    for _ in range(3000):
        job.source, record = rng.choice(samples)
        for _ in range(rng.randint(1, 2)):
            record = spoil(rng, record)
        try:
            unit = instructions.encode(job, tok, records.parse(record))
        except (convert.Drop, records.BadRecord) as e:
            assert str(e)
            bad += 1
        else:
            [(ids, mask)] = unit.rows
            assert len(ids) == len(mask) and "truncated" not in unit.counts
            assert unit.record or 1 in mask
            good += 1
    assert bad > 1000 and good > 100


# ---- lengths


def test_over_length_and_no_target(model, tmp_path):
    rows = [dict(prompt="p", completion="c" * n) for n in (1, 10, 40)]
    rows += [dict(prompt="p" * 60, completion="c"), dict(prompt="p", completion=" \n")]
    rows.append(dict(messages=[dict(role="assistant", content="?")]))
    source = jsonl(tmp_path / "in.jsonl", rows)
    head = len("suser\npe\nsassistant\n")  # s and e are one control token each
    limit = head + 20
    store = prepare(model, tmp_path / "out", source, max_length=limit)
    assert store.lengths.tolist() == [head + 2, head + 11]
    assert store.meta["dropped"] == {
        f"longer than max_length={limit}": 2,
        "empty answer": 1,
        "no turn of the user": 1,
    }
    store = prepare(model, tmp_path / "out", source, max_length=limit, over_length="truncate")
    assert store.lengths.tolist() == [head + 2, head + 11, limit] and store.meta["truncated"] == 1
    assert store.meta["dropped"] == {
        f"no target left in max_length={limit}": 1,
        "empty answer": 1,
        "no turn of the user": 1,
    }
    assert store.row(2)[1].tolist() == [0] * head + [1] * 20
    store = prepare(model, tmp_path / "out", source, max_length=limit, over_length="truncate_left")
    assert store.lengths.tolist() == [head + 2, head + 11, limit, limit]
    assert store.row(3)[1].tolist() == [0] * (limit - 2) + [1, 1] and store.meta["truncated"] == 2
    alone = jsonl(tmp_path / "alone.jsonl", [dict(prompt="q" + "p" * 60)])
    store = prepare(model, tmp_path / "out", alone, max_length=limit, over_length="truncate_left")
    assert store.lengths.tolist() == [limit] and store.prompts == 1


# ---- the held-out


def contents(store):
    return [bytes(store.row(i)[0]) for i in range(len(store))]


@pytest.mark.parametrize("val, count", [("100", 100), ("7", 7), ("10%", 40), ("0.025", 10)])
def test_val_is_exact(model, tmp_path, val, count):
    rows = [dict(prompt=f"p{i}", completion="c") for i in range(400)]
    train = prepare(model, tmp_path / "out", jsonl(tmp_path / "in.jsonl", rows), val=val)
    held_out = store.Store(tmp_path / "out", "val")
    assert (len(train), len(held_out)) == (400 - count, count)
    prepare(model, tmp_path / "whole", tmp_path / "in.jsonl")
    whole = contents(store.Store(tmp_path / "whole"))
    assert sorted(contents(train) + contents(held_out)) == sorted(whole)
    rest = [row for row in whole if row not in set(contents(held_out))]
    assert contents(train) == rest  # the order stays


def test_val_goes_by_content(model, tmp_path):
    rows = [dict(prompt=f"p{i % 150}", completion="c") for i in range(200)]  # fifty are there twice
    jsonl(tmp_path / "a.jsonl", rows)
    jsonl(tmp_path / "b.jsonl", rows[::-1])
    held_out = {}
    for name, seed in (("a", 0), ("b", 0), ("a", 1)):
        train = prepare(model, tmp_path / "out", tmp_path / f"{name}.jsonl", val="40", seed=seed)
        val = Store(tmp_path / "out", "val")
        assert len(val) == 40 and not set(contents(train)) & set(contents(val))
        held_out[name, seed] = sorted(contents(val))
    assert held_out["a", 0] == held_out["b", 0] != held_out["a", 1]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(0, 39))
def test_held_out_never_parts_copies(hashes, val):
    hashes = np.array(hashes, np.uint64)
    try:
        picks = records.held_out(hashes, str(val))
    except UserError:
        return
    assert not set(hashes[picks]) & set(hashes[~picks])  # tests/test_records.py has their number


def test_val_that_cannot_be(model, tmp_path):
    jsonl(tmp_path / "in.jsonl", [dict(prompt="p", completion="c")] * 10)
    cases = {
        "10": "leaves none of the 10",
        "11": "more than the 10 rows",
        "3": "all rows have the same prompt or text",
        "x": "val=x is not a number of rows",
        "-1": "val=-1 is not a number of rows",
        "all": "val=all is not a number of rows",
    }
    for val, says in cases.items():
        with pytest.raises(UserError, match=says):
            prepare(model, tmp_path / "out", tmp_path / "in.jsonl", val=val)
        assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# ---- the readers

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.dictionaries(st.text(), json_values, max_size=4), max_size=8),
    st.integers(1, 40),
    st.data(),
)
def test_array_reader_is_json_loads(items, block, draw):
    styles = [
        dict(),
        dict(indent=2),
        dict(ensure_ascii=False),
        dict(indent="\t", separators=(" ,", " :\n")),
    ]
    style = draw.draw(st.sampled_from(styles))
    errors = "surrogatepass" if style.get("ensure_ascii", True) else "replace"
    raw = json.dumps(items, **style).encode("utf-8", errors)
    old = records.BLOCK
    records.BLOCK = block
    try:
        read = list(records.read_array(io.BytesIO(raw), "f"))
        assert [item for _, item in read] == json.loads(raw)
        for line, item in read:
            first_line = json.dumps(item, **style).split("\n")[0]
            assert first_line in raw.decode().split("\n")[line - 1]
        cut = draw.draw(st.integers(1, len(raw) - 1))
        with pytest.raises(UserError, match=r"f:\d+: not "):
            list(records.read_array(io.BytesIO(raw[:cut]), "f"))
    finally:
        records.BLOCK = old


@pytest.mark.parametrize(
    "raw, says",
    [
        (b'[{"a": 1},\n {"a": tru}]', "f:2: not valid JSON"),
        (b'[{"a": 1}\n {"a": 1}]', "f:2: not valid JSON .no comma"),
        (b'[\n{"a": 1}]\n\nx', "f:4: not valid JSON .something follows"),
        (b'[\n\n{"a": "\xff"}]', "f:3: not UTF-8 .byte 0xff"),
        (b'[{"a": "\x00"}]', "f:1: not valid JSON .Invalid control"),
        (b"[" * 100_000, "f:1: not valid JSON .nested too deeply"),
        (b'[{"a": "' + b"x" * 3000, "f:1: not valid JSON .Unterminated"),
    ],
)
def test_array_reader_names_the_line(raw, says, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD", 2000)
    for block in (5, 1 << 20):
        monkeypatch.setattr(records, "BLOCK", block)
        with pytest.raises(UserError, match=says):
            list(records.read_array(io.BytesIO(raw), "f"))


class Endless(io.RawIOBase):
    """A JSON array of `total` bytes that is written while it is read."""

    def __init__(self, total):
        self.left = total
        self.record = b'{"instruction": "' + b"word " * 200 + b'", "output": "x"},\n'
        self.rest = b"["

    def read(self, n):
        while len(self.rest) < n and self.left > 0:
            self.rest += self.record * 100
            self.left -= 100 * len(self.record)
            if self.left <= 0:
                self.rest += self.record[:-2] + b"]"
        out, self.rest = self.rest[:n], self.rest[n:]
        return out


def peak_memory(run):
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


def test_array_reader_needs_little_memory(monkeypatch):
    count, peak = peak_memory(lambda: sum(1 for _ in records.read_array(Endless(30_000_000), "f")))
    assert count > 28_000 and peak < 8e6

    def open_quote():  # takes in records until it is too long for one
        file = Endless(30_000_000)
        file.rest = b'[{"a": "'
        file.record = file.record.translate(None, b'"\n')
        with pytest.raises(UserError, match="f:1: not valid JSON .Unterminated string"):
            list(records.read_array(file, "f"))

    monkeypatch.setattr(records, "MAX_RECORD", 1 << 20)
    assert peak_memory(open_quote)[1] < 16e6


def test_all_formats_give_the_same_rows(model, tmp_path):
    rng = random.Random(0)
    odd = ['"x"', "a,b", "é\n2", "tab\t", "{}"]
    rows = [
        dict(instruction=f"q{i} {rng.choice(odd)}", input=rng.choice(["", "in"]), output=f"a {i}")
        for i in range(300)
    ]
    text = "".join(json.dumps(r) + "\n\n" for r in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "a.json").write_text(
        json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8"
    )
    # each of the two formats under the other's name
    (tmp_path / "b.json").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff " + json.dumps(rows), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(text)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as f:
            table = csv.DictWriter(f, rows[0], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=70
    )
    (tmp_path / "dir/sub").mkdir(parents=True)
    jsonl(tmp_path / "dir/0.jsonl", rows[:100])
    jsonl(tmp_path / "dir/sub/1.json", rows[100:])
    (tmp_path / "dir/README.md").write_text("no data")
    expected = contents(prepare(model, tmp_path / "out", tmp_path / "a.jsonl"))
    assert len(expected) == 300
    for name in ("a.json", "b.json", "b.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "dir"):
        assert contents(prepare(model, tmp_path / "out", tmp_path / name)) == expected, name


def test_workers_do_not_matter(model, tmp_path):
    rows = [dict(prompt=f"p{i}", completion="c" * (i % 50)) for i in range(1500)]
    rows[700] = dict(completion="p")
    source = jsonl(tmp_path / "in.jsonl", rows)
    keys = dict(on_error="skip", val="50", max_length=60)
    alone = prepare(model, tmp_path / "one", source, workers=1, **keys)
    shared = prepare(model, tmp_path / "two", source, workers=2, **keys)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert alone.meta["bad_records"] == shared.meta["bad_records"] == 1


def test_hub(model, tmp_path, monkeypatch):
    """The calls of `datasets`, and what its errors become; the hub itself is not needed."""
    calls = []

    def load_dataset(name, subset, split, streaming):
        calls.append((name, subset, split, streaming))
        if subset == "secret":
            raise ConnectionError("no network\nlong story")
        return [dict(question=f"{subset} {i}", choices=CHOICES, answerKey="A") for i in range(2)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    store = prepare(model, tmp_path / "out", "arc", template="columns")
    assert calls == [
        ("allenai/ai2_arc", subset, "train", True) for subset in ("ARC-Challenge", "ARC-Easy")
    ]
    questions = [text.split("\n")[1] for text, _ in texts(model, store)]
    assert questions == ["ARC-Challenge 0", "ARC-Challenge 1", "ARC-Easy 0", "ARC-Easy 1"]
    with pytest.raises(UserError, match="the hub does not give it: no network$"):
        prepare(model, tmp_path / "other", "org/name-v1.5", subset="secret", split="test")
    assert calls[-1] == ("org/name-v1.5", "secret", "test", True)


def double(x):
    return 2 * x


def test_ordered_map_does_not_run_ahead():
    taken = []
    out = records.ordered_map(double, (taken.append(i) or i for i in range(100)), 2, int, ())
    assert next(out) == 0 and len(taken) == 16  # 8 a worker
    assert [0, *out] == [2 * i for i in range(100)]


# ---- bad inputs

GOOD = json.dumps(dict(prompt="p", completion="c")).encode()
BAD = {  # file name: (content, part of the error message)
    "cut.jsonl": (
        GOOD + b"\n" + GOOD[:-3] + b"\n",
        "cut.jsonl:2: not valid JSON (Unterminated string",
    ),
    "latin.jsonl": (
        GOOD + b'\n{"prompt": "caf\xe9"}\n',
        "latin.jsonl:2: not UTF-8 (byte 0xe9 in column 16)",
    ),
    "list.jsonl": (GOOD + b"\n\n[1]\n", "list.jsonl:3: a JSON list and not an object"),
    "field.jsonl": (
        GOOD + b'\n{"completion": "p"}\n',
        "field.jsonl:2: unknown record shape (fields completion)",
    ),
    "number.jsonl": (
        b'{"prompt": "p", "completion": 3}\n',
        "number.jsonl:1: field 'completion' is int and not text",
    ),
    "role.json": (
        b'[{"messages": [{"role": "narrator", "content": "x"}]}]',
        "role.json:1: unknown role 'narrator'",
    ),
    "order.json": (
        b'[{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}, '
        b'{"role": "gpt", "content": "x"}]}]',
        "order.json:1: message 2",
    ),
    "array.json": (b"[" + GOOD + b",\n" + GOOD + b",\n{]", "array.json:3: not valid JSON"),
    "columns.csv": (
        b"prompt,completion\na,b\n\na,b,c\n",
        "columns.csv:4: 3 columns, the header has 2",
    ),
    "quote.csv": (
        b'prompt,completion\na,b\na,"b\n',
        "quote.csv:3: a quote opens in this row and never closes",
    ),
    "header.csv": (
        b'"prompt"x,completion\na,b\n',
        "header.csv:1: the names of the columns are not valid CSV",
    ),
    "double.csv": (
        b"prompt,completion,prompt\na,b,c\n",
        "double.csv:1: two columns are called 'prompt': rename one",
    ),
    "digits.jsonl": (
        b'{"prompt": 1' + b"0" * 5000 + b"}",
        "digits.jsonl:1: not valid JSON (a number of thousands of digits)",
    ),
    "digits.json": (
        b'[{"prompt": 1' + b"0" * 5000 + b"}]",
        "digits.json:1: not valid JSON (a number of thousands of digits)",
    ),
    "latin.csv": (b"prompt,completion\na,b\na,\xff\n", "latin.csv:3: not UTF-8"),
    "empty.jsonl": (b"", "empty.jsonl gives no row (it holds no record)"),
    "empty.json": (b" []\n", "empty.json gives no row (it holds no record)"),
    "names.csv": (b"prompt,completion\n", "names.csv gives no row (it holds no record)"),
    "silent.jsonl": (
        b'{"prompt": "p", "completion": " "}\n',
        "silent.jsonl gives no row (1 dropped: empty answer)",
    ),
    "cut.jsonl.gz": (gzip.compress(GOOD * 1000)[:60], "cut.jsonl.gz is a damaged gzip file"),
    "no.jsonl.gz": (GOOD, "no.jsonl.gz is a damaged gzip file"),
    "no.parquet": (GOOD, "no.parquet is not a readable Parquet file"),
    "notes.txt": (b"hello", "notes.txt: cannot tell its format"),
}


def arguments(model, dir, name, *more):
    """The command line for a file in `dir`."""
    keys = [f"source={dir / name}", f"model={model}", f"out={dir / 'out'}", "template=chatml"]
    return [*keys, *more]


def snapshot(dir):
    return {path: path.read_bytes() for path in dir.rglob("*") if path.is_file()}


def run_main(monkeypatch, capfd, *argv):
    """(exit status, stderr) of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare.instructions", *argv])
    with pytest.raises(SystemExit) as e:
        config.run(instructions.main, instructions.Config)
    return e.value.code, capfd.readouterr().err


@pytest.mark.parametrize("name", BAD)
def test_bad_files(model, tmp_path, monkeypatch, capfd, name):
    content, says = BAD[name]
    (tmp_path / name).write_bytes(content)
    prepare(model, tmp_path / "out", jsonl(tmp_path / "good.jsonl", [json.loads(GOOD)]))
    before = snapshot(tmp_path)
    status, err = run_main(monkeypatch, capfd, *arguments(model, tmp_path, name))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert snapshot(tmp_path) == before  # nothing is lost, and nothing left behind


@pytest.mark.parametrize(
    "keys, says",
    [
        (dict(source="nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        (dict(source="no/such/thing.json"), "there is no file or folder no/such/thing.json"),
        (dict(source="gsm8"), "did you mean 'gsm8k'?"),
        (dict(source="arithmetic", split="val"), "split=val: a task has train, and test, which"),
        (dict(source="gsm8k", path="nowhere.jsonl"), "there is no file or folder nowhere.jsonl"),
        (dict(source="zbench"), "name their file or folder, files=, or path= of prepare"),
        (dict(split="test"), "split=test has no effect with in.jsonl, a single file: leave it out"),
        (dict(path="in.jsonl"), "path= goes with the name of a task or set"),
        (dict(model="nowhere"), "there is no model directory nowhere"),
        (dict(template="none"), "the model has no chat template"),
        (dict(template="nope"), "unknown template 'nope'"),
        (dict(out="tests"), "tests exists and is not a prepared data folder"),
        (dict(source="."), "folder . holds no"),
        (dict(text_field="body"), "in.jsonl:1: field 'body' is missing"),
    ],
)
def test_bad_keys(model, tmp_path, monkeypatch, capfd, keys, says):
    monkeypatch.chdir(tmp_path)
    source = "in.jsonl" if keys.get("source") != "." else "in.txt"
    jsonl(tmp_path / source, [json.loads(GOOD)])
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/mine").write_text("mine")
    keys = dict(source=source, model=model, out="out", template="chatml") | keys
    status, err = run_main(monkeypatch, capfd, *(f"{k}={v}" for k, v in keys.items()))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted([source, "tests", "mine"])


def test_on_error_skip(model, tmp_path, capsys):
    lines = [GOOD, b'{"prompt": "caf\xe9"}', b"{", GOOD, b'{"x": 1}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    store = prepare(model, tmp_path / "out", tmp_path / "in.jsonl", on_error="skip")
    assert len(store) == 2 and store.meta["bad_records"] == 3
    lines = [message.split(": ")[0].rsplit(":")[-1] for message in store.meta["first_bad"]]
    assert lines == ["2", "3", "5"]
    assert "bad records" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [1 << 20, 100])
def test_an_open_quote_is_not_skipped(model, tmp_path, monkeypatch, limit):
    """All rows behind it would be skipped with it, and not counted."""
    monkeypatch.setattr(records, "MAX_RECORD", limit)
    (tmp_path / "in.csv").write_text('prompt,completion,,\na,b,,\nc,"d\n' + "e,f,,\n" * 50)
    with pytest.raises(UserError, match="in.csv:3: a quote opens in this row and never closes"):
        prepare(model, tmp_path / "out", tmp_path / "in.csv", on_error="skip")


def test_parquet_with_two_columns_of_a_name_or_text_that_is_none(model, tmp_path):
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array(["a"])
    doubled = pyarrow.Table.from_arrays([column] * 3, ["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(doubled, tmp_path / "two.parquet")
    with pytest.raises(UserError, match="two.parquet: two columns are called 'prompt'"):
        prepare(model, tmp_path / "out", tmp_path / "two.parquet")
    latin = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([b"\xff"]).buffers()[1], pyarrow.array([b"\xff"]).buffers()[2]
    )
    pyarrow.parquet.write_table(
        pyarrow.table(dict(prompt=column, completion=latin)), tmp_path / "latin.parquet"
    )
    with pytest.raises(UserError, match="latin.parquet holds text that is not UTF-8"):
        prepare(model, tmp_path / "out", tmp_path / "latin.parquet")


def test_a_folder_may_hold_its_store_and_hidden_copies(model, tmp_path):
    jsonl(tmp_path / "in.jsonl", [json.loads(GOOD)])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    jsonl(tmp_path / ".ipynb_checkpoints/in.jsonl", [json.loads(GOOD)])
    for _ in range(2):
        assert len(prepare(model, tmp_path / "store", tmp_path)) == 1


def test_a_name_in_ignore_that_no_record_has_is_told(model, tmp_path, capsys):
    talk = [dict(role="user", content="a", inner=1), dict(role="assistant", content="b")]
    path = jsonl(tmp_path / "in.jsonl", [dict(messages=talk), dict(prompt="a", completion="b", outer=1)])
    assert len(prepare(model, tmp_path / "out", path, ignore=("inner", "nope", "outer"))) == 2
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines() if "ignored" in line] == [
        "fields ignored 0 no record has a field 'nope'".split()
    ]


def test_names_that_are_not_utf8(model, tmp_path):
    """Names of files and fields only appear in messages."""
    source = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    source.write_bytes(
        GOOD + b'\n{"\\ud83d": 1}\n{"messages": [{"role": "\\ud83d", "content": "x"}]}\n'
    )
    store = prepare(model, tmp_path / "out", source, on_error="skip")
    assert len(store) == 1 and store.meta["bad_records"] == 2
    assert r"(\ud83d without its other half)" in store.meta["first_bad"][0]


def test_chunks_are_cut_by_bytes_too():
    """Otherwise 8 x workers x 256 long records could be in memory."""
    long = [(i, dict(messages=[dict(role="user", content="x" * 400_000)])) for i in range(7)]
    cases = {
        (3, 3, 1): long,
        (256, 256, 88): [(0, b"x")] * 600,
        (1, 1): [(0, b"x" * 2_000_000)] * 2,
    }
    for sizes, items in cases.items():
        assert tuple(len(chunk) for _, chunk in records.chunks([("a", items)])) == sizes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_job_leaves_no_process(model, tmp_path, number):
    """After SIGTERM it leaves no half-written folder either."""
    with open(tmp_path / "in.jsonl", "wb") as f:
        f.write((GOOD + b"\n") * 400_000)
    argv = arguments(model, tmp_path, "in.jsonl", "workers=2")
    job = subprocess.Popen(
        [sys.executable, "-m", "prepare.instructions", *argv], cwd=ROOT, start_new_session=True
    )

    def alive():
        processes = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
                if int(session) == job.pid and state != "Z":
                    processes.append(path)
        return processes

    def wait(holds):
        end = time.time() + 60
        while not holds():
            assert time.time() < end and (job.poll() is None or holds != started)
            time.sleep(0.05)

    def started():
        return len(alive()) >= 4 and any(p.stat().st_size for p in tmp_path.glob("out.unfinished/*.bin"))

    wait(started)
    job.send_signal(number)
    assert job.wait(60) == (143 if number == signal.SIGTERM else -number)
    wait(lambda: not alive())
    assert number == signal.SIGKILL or [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_as_a_program(model, tmp_path):
    """A process with workers exits with status 2 and one sentence. It imports no slow package."""
    jsonl(tmp_path / "in.jsonl", [json.loads(GOOD)] * 600)
    with open(tmp_path / "in.jsonl", "ab") as f:
        f.write(b"{oops\n")
    argv = arguments(model, tmp_path, "in.jsonl", "workers=2")
    command = [sys.executable, "-m", "prepare.instructions", *argv]
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 2 and p.stdout == ""
    assert p.stderr.startswith(f"error: {tmp_path / 'in.jsonl'}:601: not valid JSON (")
    assert p.stderr.count("\n") == 1
    assert [x.name for x in tmp_path.iterdir()] == ["in.jsonl"]
    code = (
        "import sys, prepare.instructions\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("terminal, no_color", [(True, ""), (True, "1"), (False, "")])
def test_show(model, tmp_path, capsys, monkeypatch, terminal, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    plain = no_color or not terminal
    rows = [dict(prompt="p", completion=f"c{i}") for i in range(5)]
    prepare(model, tmp_path / "out", jsonl(tmp_path / "in.jsonl", rows), show=3)
    out = capsys.readouterr().out
    on, off = ("«", "»") if plain else ("\033[32m", "\033[0m")
    assert [f"{A}{on}c{i}{E}{off}\n" in out for i in range(5)] == [True, True, True, False, False]
    assert ("\033" in out) == (not plain)


THINKING = (  # in the manner of Qwen3's template
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TURNS = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


def test_text_that_is_rendered_already(model, tmp_path, capsys):
    """Its control tokens are tokens with rendered=true. Else they are spelled out, which is said."""
    talk = TURNS + TURNS.replace("b", "c") + "<|im_start|>user\nd<|im_end|>\n"
    path = jsonl(tmp_path / "in.jsonl", [dict(text=talk), dict(text="none")])
    store = prepare(model, tmp_path / "out", path, text_field="text")
    assert 256 not in store.row(0)[0] and len(store) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "control tokens 1 rows name some: spelled out; rendered=true takes" in said
    store = prepare(
        model, tmp_path / "out", path, text_field="text", rendered=True, template="chatml"
    )
    ((text, spans),) = texts(model, store)
    assert text == talk[: talk.index("c<") + 11] and spans == ["b<|im_end|>", "c<|im_end|>"]
    ids, mask = tokenizer.load(model, template="chatml").render(
        [dict(role=role, content=text) for text in "bc" for role, text in (("user", "a"), ("assistant", text))]
    )
    assert store.row(0)[0].tolist() == ids[: len(store.row(0)[0])]
    assert store.row(0)[1].tolist() == mask[: len(store.row(0)[0])]
    assert store.meta["template"] == "chatml" and store.meta["dropped"] == {"no answer": 1}
    keys = dict(text_field="text", rendered=True, response_template="assistant\n")
    store = prepare(model, tmp_path / "out", path, template="plain", **keys)
    assert texts(model, store)[0][1] == ["c<|im_end|>\n<|im_start|>user\nd<|im_end|>\n"]
    with pytest.raises(UserError, match="nothing that asks for an answer.* response_template="):
        prepare(model, tmp_path / "out", path, **keys | dict(response_template=None, template="plain"))


def test_options_of_the_template_go_with_the_data(model, tmp_path):
    """The template that the data name, and a stage saves, asks like the rows that were learned."""
    record = dict(prompt="a", completion="b")
    store = prepare(
        model,
        tmp_path / "out",
        jsonl(tmp_path / "in.jsonl", [record]),
        template=THINKING,
        template_options=("enable_thinking=false",),
    )
    tok = tokenizer.load(model, template=store.meta["chat_template"])
    prompt, _ = tok.render([dict(role="user", content="a")], add_generation_prompt=True)
    ids, mask = store.row(0)
    assert ids.tolist()[: len(prompt)] == prompt and not mask[: len(prompt)].any()
    assert tok.bytes_of(prompt).endswith(b"<think>\n\n</think>\n\n")
    spans = [one(model, tmp_path, record, template=THINKING, learn_empty_thoughts=more)[1] for more in (False, True)]
    assert spans == [["b<|im_end|>"], ["<think>\n\n</think>\n\nb<|im_end|>"]]
    twice = ("enable_thinking=false", "enable_thinking=true")
    with pytest.raises(UserError, match="template_options: 'enable_thinking' is given twice"):
        one(model, tmp_path, record, template=THINKING, template_options=twice)
    with pytest.raises(UserError, match="learn_empty_thoughts=true has no effect with a template"):
        one(model, tmp_path, record, learn_empty_thoughts=True)
    with pytest.raises(UserError, match="template_options: .* reads no 'thinking'"):
        one(model, tmp_path, record, template_options=("thinking=false",))


def test_what_the_template_does_not_follow_is_dropped_with_its_reason(model, tmp_path, capsys):
    forgets = "{% for m in messages[-2:] %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    talk = [dict(role=role, content=role) for role in ("user", "assistant", "user", "assistant")]
    path = jsonl(tmp_path / "in.jsonl", [dict(messages=talk), dict(messages=talk[:2])])
    store = prepare(model, tmp_path / "out", path, template=forgets)
    assert store.meta["dropped"] == {"the chat template leaves out this user message": 1}


def test_an_answer_that_the_template_leaves_open_is_closed_and_counted(model, tmp_path, capsys):
    open_ended = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    )
    record = dict(prompt="a", completion="b")
    own = tmp_path / "model"
    tiny.model_dir(own, special=["<|im_start|>", "<|im_end|>", "</s>"])
    tiny.write(own, "generation_config.json", dict(eos_token_id=[258, 257]))
    assert one(str(own), tmp_path, record, template=open_ended)[1] == ["b<|im_end|>"]
    said = " ".join(capsys.readouterr().out.split())
    assert "answers closed 1 with <|im_end|>, which the template leaves out" in said
