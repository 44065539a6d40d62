"""prepare.preferences: record shapes against groups written by hand, what is dropped, bad input."""

import gzip
import json
import subprocess
import sys
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from conftest import ROOT

from nano import config, store, tokenizer
from nano.config import UserError
from prepare import instructions, preferences


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("preferences") / "model")


def main(model, dir, *settings):
    argv = [f"model={model}", f"out={dir / 'out'}", "template=chatml", *settings]
    preferences.main(config.load(preferences.Config, argv))
    return dir / "out"


@pytest.fixture
def prepare(model, tmp_path):
    """Runs the script on records (or lines of bytes); returns the prepared folder."""

    def run(records, *settings, name="records.jsonl"):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        raw = b"\n".join(lines)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return main(model, tmp_path, f"source={tmp_path / name}", *settings)

    return run


def groups(dir, tok, split="train"):
    """[(prompt, [completion, ...]), ...] as text, control tokens shown."""
    rows = store.Store(dir, split, tok)
    out = []
    for a, b in pairwise(rows.groups):
        prompts, completions = set(), []
        for tokens, mask in map(rows.row, range(a, b)):
            length = int(mask.argmax())  # of the prompt
            # the last answer alone is a target, and the row ends with it
            assert mask[length:].all() and not mask[:length].any()
            prompts.add(tok.decode(tokens[:length].tolist(), skip_special=False))
            completions.append(tok.decode(tokens[length:].tolist(), skip_special=False))
        [prompt] = prompts
        out.append((prompt, completions))
    return out


def chat(*turns):
    """The prompt as chatml lays it out. A turn is (role, text), or a text of user and assistant."""
    out = ""
    for i, turn in enumerate(turns):
        role, text = turn if isinstance(turn, tuple) else (("user", "assistant")[i % 2], turn)
        out += f"<|im_start|>{role}\n{text}<|im_end|>\n"
    return out + "<|im_start|>assistant\n"


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def pair(good, bad, **prompt):
    return {**prompt, "chosen": good, "rejected": bad}


HH = "\n\nHuman: {}\n\nAssistant: {}"
ONE = (chat("Q"), ["good", "bad"])
THREE = (chat("A", "B", "C"), ["good", "bad"])
RANKED = (chat("Q"), ["good", "fair", "bad"])
SHARED = [human("A"), gpt("B"), human("C")]
TURNS = [user("A"), said("B"), user("C")]
CONTEXT = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"
POSTS = [
    {"text": "<p>Two:</p>\n<pre><code>a  b\n c</code></pre>", "pm_score": 1, "selected": False},
    {
        "text": "<p>Use <code>x</code></p>\n<ul>\n<li>one</li>\n<li>two</li>\n</ul>",
        "pm_score": 4,
        "selected": True,
    },
    {"text": "<p>tied</p>", "pm_score": 1, "selected": False},
]
TEXTS = ["Use `x`\n- one\n- two", "Two:\n\n```\na  b\n c\n```"]
SCORED = [{"response": "bad", "overall_score": 2.5}, {"response": "good", "overall_score": 8}]
ORDERED = [{"answer": "bad", "rank": 3.0}, {"answer": "good", "rank": 1.0}]
SHAPES = {
    "strings": (pair("good", "bad", prompt="Q"), ONE),
    "question and system": (
        pair("good", "bad", system="S", question="Q"),
        (chat(("system", "S"), ("user", "Q")), ["good", "bad"]),
    ),
    "all messages, beside a text": (
        pair([user("Q"), said("good")], [user("Q"), said("bad")], prompt="Q", score_chosen=8.0),
        ONE,
    ),
    "all messages": (pair([user("Q"), said("good")], [user("Q"), said("bad")]), ONE),
    "several turns": (pair([*TURNS, said("good")], [*TURNS, said("bad")]), THREE),
    "prompt and completion messages": (pair([said("good")], [said("bad")], prompt=TURNS), THREE),
    "ShareGPT": (pair(gpt("good"), gpt("bad"), conversations=SHARED), THREE),
    "Alpaca": (pair("good", "bad", instruction="I", input="X"), (chat("I\n\nX"), ["good", "bad"])),
    "hh": (pair(CONTEXT + " good", CONTEXT + " bad"), THREE),
    "hh, neighbouring turns": (
        pair("\n\nHuman: A" + HH.format("B", "good"), "\n\nHuman: A" + HH.format("B", "bad")),
        (chat("A\n\nB"), ["good", "bad"]),
    ),
    "hh, prompt apart": (pair("good", "bad", prompt=CONTEXT), THREE),
    "ranked": ({"prompt": "Q", "completions": ["good", "fair", "bad"]}, RANKED),
    "list of scores": (
        {"prompt": "Q", "responses": ["bad", "good", "fair", "fine"], "scores": [1, 9, 5, 5]},
        RANKED,
    ),
    "ranked messages": (
        {"prompt": [user("Q")], "completions": [[said("good")], [said("bad")]]},
        ONE,
    ),
    "UltraFeedback": ({"instruction": "Q", "completions": SCORED}, ONE),
    "ranks": ({"prompt": HH.format("Q", ""), "answers": ORDERED}, ONE),
    "Stack Exchange": (
        {"question": "<p>How <em>much</em>?</p>\n\n<p>Say &lt;x&gt;.</p>", "answers": POSTS},
        (chat("How much?\n\nSay <x>."), TEXTS),
    ),
    "system beside whole conversations": (
        pair([user("Q"), said("good")], [user("Q"), said("bad")], system="S"),
        (chat(("system", "S"), ("user", "Q")), ["good", "bad"]),
    ),
    "hh, prompt apart and in the transcripts": (
        pair(CONTEXT + " good", CONTEXT + " bad", prompt=CONTEXT),
        THREE,
    ),
    "an answer that looks like a transcript": (
        pair("Human: A", "bad", prompt="Q"),
        (chat("Q"), ["Human: A", "bad"]),
    ),
    "Stack Exchange pairs": ({"question": "Q", "response_j": "good", "response_k": "bad"}, ONE),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, prepare, model):
    record, (prompt, completions) = SHAPES[shape]
    assert groups(prepare([record]), tokenizer.load(model)) == [
        (prompt, [c + "<|im_end|>" for c in completions])
    ]


def test_rows_are_what_fine_tuning_renders_and_end_where_the_score_is_read(prepare, model):
    tok = tokenizer.load(model, template="chatml")
    rows = store.Store(prepare([SHAPES["ShareGPT"][0]]), "train", tok)
    for i, answer in enumerate(("good", "bad")):
        messages = [user("A"), said("B"), user("C"), said(answer)]
        ids, mask = tok.render(messages, last_only=True)
        end = len(mask) - mask[::-1].index(1)
        assert rows.row(i)[0].tolist() == ids[:end] and rows.row(i)[1].tolist() == mask[:end]
        assert rows.row(i)[0][-1] in tok.stop_ids


def test_control_tokens_in_text_stay_text(prepare, model):
    record = {"prompt": "Q<|im_end|>", "chosen": "<|im_start|>a", "rejected": "b"}
    rows = store.Store(prepare([record]), "train")
    assert (rows.tokens[rows.offsets[0] : rows.offsets[1]] == 258).sum() == 2  # one for each turn


LEFT = "fewer than two completions left"
DROPS = {
    "completions of different prompts": [
        pair(HH.format("A", "x"), HH.format("B", "y")),
        pair(HH.format("A", "x\n\nAssistant: z"), HH.format("A", "y")),
    ],
    f"{LEFT} (others: empty)": [
        pair(HH.format("A", ""), HH.format("A", "y")),
        pair(" \n", "y", prompt="Q"),
    ],
    f"{LEFT} (others: the same text twice)": [pair("x", "x", prompt="Q")],
    f"{LEFT} (others: longer than max_length=64)": [pair("x" * 64, "y", prompt="Q")],
    f"{LEFT} (others: score equal to another's)": [
        {"prompt": "Q", "completions": ["x", "y"], "scores": [1, 1]}
    ],
    LEFT: [{"prompt": "Q", "completions": ["x"]}],
    "a completion that does not end with the assistant": [
        pair([user("a")], [user("a")]),
        pair(HH.format("A", "x\n\nHuman: y"), HH.format("A", "z")),
    ],
    "a prompt that ends with the assistant": [pair("x", "y", conversations=[human("a"), gpt("b")])],
    "no prompt": [pair("x", "y")],
}


def test_what_gives_no_group_is_counted_by_reason(prepare, model):
    good = SHAPES["strings"][0]
    dir = prepare([good, *chain(*DROPS.values())], "max_length=64")
    meta = store.read_meta(dir)
    assert meta["dropped_groups"] == {reason: len(records) for reason, records in DROPS.items()}
    assert groups(dir, tokenizer.load(model)) == [(ONE[0], ["good<|im_end|>", "bad<|im_end|>"])]


def test_completions_left_out_of_a_group_are_counted(prepare, model):
    record = {"prompt": "Q", "completions": ["a", "", "b", "x" * 99, "a", "c", "d"]}
    dir = prepare([record], "max_length=99", "max_completions=3")
    assert groups(dir, tokenizer.load(model))[0][1] == ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>"]
    assert store.read_meta(dir)["dropped_completions"] == {
        "empty": 1,
        "longer than max_length=99": 1,
        "the same text twice": 1,
        "beyond max_completions=3": 1,
    }


def test_val_holds_out_whole_groups_and_all_of_a_prompt(prepare, model):
    records = [
        {"prompt": f"Q{i % 40}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)
    ]
    dir = prepare(records, "val=12", name="records.jsonl.gz")
    tok = tokenizer.load(model)
    train, val = groups(dir, tok, "train"), groups(dir, tok, "val")
    assert len(train) == 48 and len(val) == 12
    assert all(len(answers) == 2 for _, answers in train + val)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in val}
    again = groups(prepare(records[::-1], "val=12"), tok, "val")
    assert sorted(again) == sorted(val)  # a record's place does not matter


def test_workers_do_not_change_the_store(prepare):
    records = [
        {"prompt": f"Q{i}", "chosen": "good" * (i % 7 + 1), "rejected": "bad"} for i in range(600)
    ]
    stores = []
    for workers in (1, 2):
        rows = store.Store(prepare(records, f"workers={workers}"), "train")
        stores.append([np.array(x) for x in (rows.tokens, rows.mask, rows.offsets, rows.groups)])
    assert all(np.array_equal(a, b) for a, b in zip(*stores, strict=True))


BAD = {
    "not valid JSON": [b'{"prompt": '],
    "not UTF-8": [b'{"prompt": "\xff"}'],
    "unknown record shape": [{"text": "x"}],
    "unknown role 'robot'": [{"chosen": [{"role": "robot", "content": "x"}], "rejected": "y"}],
    "the scores [1, 2] are not one number for each": [
        {"prompt": "Q", "completions": ["x"], "scores": [1, 2]}
    ],
    "in field 'scores' is no number": [
        {"prompt": "Q", "responses": ["x", "y"], "scores": [1, 10**400]}
    ],
    "'history' is not a list of [question, answer]": [
        pair("x", "y", instruction="Q", history=[[1, "b"]])
    ],
    "a number of thousands of digits": [b'{"prompt": 1' + b"0" * 5000 + b"}"],
    "has none of the fields": [{"prompt": "Q", "completions": [{"foo": "1"}, {"foo": "2"}]}],
    "the conversation is not a list of messages": [{"prompt": "Q", "chosen": [], "rejected": "x"}],
    "is int and not text": [{"prompt": 3, "chosen": "x", "rejected": "y"}],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_is_named_or_skipped(reason, prepare, tmp_path):
    good = SHAPES["strings"][0]
    with pytest.raises(UserError) as e:
        prepare([good, *BAD[reason]])
    assert "records.jsonl:2: " in str(e.value) and reason in str(e.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.*"))
    meta = store.read_meta(prepare([good, *BAD[reason]], "on_error=skip"))
    assert meta["bad_records"] == 1 and meta["splits"]["train"]["groups"] == 1


def test_a_failure_leaves_the_earlier_folder_alone(prepare, model):
    dir = prepare([SHAPES["strings"][0]])
    with pytest.raises(UserError, match="gives no group.*1 dropped: no prompt"):
        prepare([{"chosen": "x", "rejected": "y"}])
    assert len(groups(dir, tokenizer.load(model))) == 1


@pytest.mark.parametrize(
    "setting", ["source=nowhere.jsonl", "max_completions=1", "template=nothing", "val=all"]
)
def test_mistakes_end_with_a_sentence(setting, model, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(SHAPES["strings"][0]))
    keys = dict(source=f"{tmp_path}/a.jsonl", model=model, out=f"{tmp_path}/out", template="chatml")
    key, _, value = setting.partition("=")
    argv = [f"{k}={v}" for k, v in (keys | {key: value}).items()]
    with pytest.raises(UserError):
        preferences.main(config.load(preferences.Config, argv))
    assert not (tmp_path / "out").exists()


def test_the_command_line(model, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(SHAPES["ranked"][0]) + "\n{}\n")
    command = [sys.executable, "-m", "prepare.preferences", f"source={tmp_path}/a.jsonl"]
    command += [f"model={model}", f"out={tmp_path}/out", "template=chatml"]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 2
    assert "a.jsonl:2: unknown record shape" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    command += ["on_error=skip", "show=1"]
    env = {"NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0
    assert "«good<|im_end|>»" in done.stdout and "groups kept" in done.stdout


def test_real_files(shared_data, model, tmp_path):
    source = f"source={shared_data}/hh_harmless_test.jsonl.gz"
    meta = store.read_meta(main(model, tmp_path, source, "val=462", "max_length=100000"))
    assert meta["dropped_groups"] == {
        "completions of different prompts": 5,
        "fewer than two completions left (others: empty)": 4,
    }
    assert meta["splits"]["train"]["groups"] == 1841 and meta["splits"]["val"]["groups"] == 462
    source = f"source={shared_data}/dpo_en_demo.json"
    meta = store.read_meta(main(model, tmp_path, source, "max_length=100000"))
    assert meta["splits"]["train"]["groups"] == 300
    assert not meta["dropped_groups"] and not meta["bad_records"]


# ---- training sets that are known by name

SETS = {
    "ultrafeedback": dict(
        prompt="Hi",
        prompt_id="1",
        chosen=[dict(role="user", content="Hi"), dict(role="assistant", content="Hello")],
        rejected=[dict(role="user", content="Hi"), dict(role="assistant", content="No")],
        messages=[dict(role="user", content="Hi"), dict(role="assistant", content="Hello")],
        score_chosen=8.0,
        score_rejected=2.0,
    ),
    "hh-rlhf:harmless": dict(
        chosen="\n\nHuman: Hi\n\nAssistant: Hello", rejected="\n\nHuman: Hi\n\nAssistant: No"
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_known_sets(name, model, tmp_path):
    path = tiny.jsonl(tmp_path / "in.jsonl", [SETS[name]])
    out = main(model, tmp_path, f"source={name}", f"path={path}")
    tok = tokenizer.load(model, template="chatml")
    rows = store.Store(out)
    texts = [tok.decode(rows.row(i)[0]) for i in range(2)]
    assert rows.groups.tolist() == [0, 2]
    assert texts == [f"user\nHi\nassistant\n{answer}" for answer in ("Hello", "No")]


def test_known_sets_of_the_other_script(model, tmp_path):
    with pytest.raises(UserError, match="source=alpaca is for python -m prepare.instructions"):
        main(model, tmp_path, "source=alpaca")
    argv = [f"model={model}", f"out={tmp_path / 'out'}", "source=ultrafeedback", "template=chatml"]
    with pytest.raises(UserError, match="ultrafeedback is for python -m prepare.preferences"):
        instructions.main(config.load(instructions.Config, argv))


def test_known_sets_on_the_hub(model, tmp_path, monkeypatch):
    """A configuration that is a folder is asked for as one."""
    calls = []

    def load_dataset(name, subset, **more):
        calls.append((name, subset, more.get("data_dir"), more["split"]))
        return [SETS["hh-rlhf:harmless"]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    main(model, tmp_path, "source=hh_rlhf")
    assert calls == [
        ("Anthropic/hh-rlhf", None, f"{x}-base/", "train") for x in ("helpful", "harmless")
    ]
