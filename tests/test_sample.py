"""sample.py as its users run it: a file of prompts, one prompt, a chat; and what it says when
something is wrong."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT

import lora
import sample
from nano import config, tokenizer, weights
from nano.generate import Samples, generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("sample") / "model")


def run(monkeypatch, capsys, *argv, lines=None):
    """(status, stdout, stderr) of `python sample.py *argv` with `lines` typed."""
    typed = iter(lines or ())

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "argv", ["sample.py", "dtype=float32", "device=cpu", *map(str, argv)])
    status = 0
    try:
        config.run(sample.main, sample.Config)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def answer(model_dir, text, new, template="plain", open=weights.load_model, messages=None):
    """The greedy answer, worked out without sample.py."""
    tok = tokenizer.load(model_dir, template=template)
    ids, _ = tok.render(messages or [dict(role="user", content=text)], add_generation_prompt=True)
    model = open(model_dir, dtype=torch.float32)
    return tok.decode(generate(model, [ids], new, temperature=0.0, stop_ids=tok.stop_ids).tokens[0])


def test_a_file_of_prompts_as_a_command(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello there\n\n  Wie geht's? 你好  \n", encoding="utf-8")
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "sample.py",
        f"model={model}",
        f"prompts={tmp_path / 'prompts.txt'}",
        f"out={out}",
        "temperature=0",
    ]
    done = subprocess.run(
        [*command, "max_new_tokens=9", "dtype=float32"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    records = json.loads(out.read_text(encoding="utf-8"))
    assert [set(r) for r in records] == [{"input", "output"}] * 2
    assert [r["input"] for r in records] == ["Hello there", "Wie geht's? 你好"]
    for record in records:
        assert record["output"] == answer(model, record["input"], 9)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_a_json_file_holds_conversations(model, tmp_path, monkeypatch, capsys):
    talk = [
        dict(role="user", content="a"),
        dict(role="assistant", content="b"),
        dict(role="user", content="c\nd"),
    ]
    tiny.write(tmp_path, "prompts.json", ["x\ny", talk])
    settings = (
        f"model={model}",
        f"prompts={tmp_path / 'prompts.json'}",
        "temperature=0",
        "max_new_tokens=5",
        "template=chatml",
    )
    status, out, err = run(monkeypatch, capsys, *settings)
    first, second = json.loads(out)
    assert status == 0 and first["input"] == "x\ny" and second["input"] == talk
    assert first["output"] == answer(model, "x\ny", 5, "chatml")
    assert second["output"] == answer(model, None, 5, "chatml", messages=talk)
    assert first["output"] != answer(model, "x\ny", 5, "plain")
    (tmp_path / "prompts.jsonl").write_text(
        f"{json.dumps('x' + chr(10) + 'y')}\n{json.dumps(talk)}\n"
    )
    lines = [s.replace("prompts.json", "prompts.jsonl") for s in settings]
    assert run(monkeypatch, capsys, *lines)[1] == out
    status, out, err = run(monkeypatch, capsys, *settings, "echo=true")
    assert [r["output"] for r in json.loads(out)] == [
        "x\ny" + first["output"],
        "c\nd" + second["output"],
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_prompts_may_be_records(tmp_path, name):
    entries = ["x", [dict(role="user", content="y")], dict(prompt="z", id=3)]
    entries += [dict(messages=[{"role": "Human", "content": "w"}], answer="4")]
    text = json.dumps(entries) if name == "a.json" else "\n".join(map(json.dumps, entries))
    (tmp_path / name).write_text(text)
    prompts, definitions = zip(*sample.read_prompts(tmp_path / name), strict=True)
    assert definitions == (None,) * 4
    first, second, third, fourth = prompts
    assert (first, second) == ("x", entries[1]) and third[0]["content"] == "z"
    assert fourth == [dict(role="user", content="w")]


def test_only_length_makes_a_chat_forget(model, monkeypatch, capsys):
    """Any other refusal is said as it is, and the history stays."""
    sampler = sample.Sampler(sample.Config(model=str(model), device="cpu", template="llama2"))
    history = [dict(role=role, content="x") for role in ("user", "user")]  # take no turns
    with pytest.raises(config.UserError, match="take turns"):
        sample.reply(sampler, "z", None, history, 0)
    assert "no longer fits" not in capsys.readouterr().out


def test_one_prompt_streams_what_a_batch_gives(model, monkeypatch, capsys):
    whole = answer(model, "Say it", 40)
    status, out, err = run(
        monkeypatch, capsys, f"model={model}", "prompt=Say it", "temperature=0", "max_new_tokens=40"
    )
    assert (status, out, err) == (0, whole + "\n", "")
    stop = re.search(r"[!-~]{2}", whole[3:])[0]
    cut = whole[: whole.index(stop)]
    args = (
        f"model={model}",
        "prompt=Say it",
        "temperature=0",
        "max_new_tokens=40",
        f"stop=[{json.dumps(stop)},nowhere]",
    )
    assert run(monkeypatch, capsys, *args)[:2] == (0, cut + "\n")
    status, out, _ = run(monkeypatch, capsys, *args, "echo=true")
    assert out == "Say it" + cut + "\n"


def test_streamed_pieces_are_whole_characters(model, monkeypatch):
    text = "né 你好 <en 🙂 <end> gone"

    def scripted(model, prompts, *settings, on_token, **more):
        tokens = list(text.encode())
        at = next(i for i, token in enumerate(tokens, 1) if on_token(0, token))
        return Samples([tokens[:at]], [[0.0] * at], [True], [None])

    monkeypatch.setattr(sample, "generate", scripted)
    sampler = sample.Sampler(sample.Config(model=str(model), device="cpu", stop=("<end>",)))
    pieces = []
    (ids,) = sampler.answer([[1]], 0, pieces.append)
    assert sampler.text(ids) == ("né 你好 <en 🙂 ", True) and "".join(pieces) == "né 你好 <en 🙂 "
    assert len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("on_text", [None, lambda piece: None])
def test_a_control_token_stops(model, monkeypatch, on_text):
    def scripted(model, prompts, *settings, on_token, **more):
        tokens = [*b"one", 257, *b"two"]
        at = next(i for i, token in enumerate(tokens, 1) if on_token(0, token))
        return Samples([tokens[:at]], [[0.0] * at], [True], [None])

    monkeypatch.setattr(sample, "generate", scripted)
    cfg = sample.Config(model=str(model), device="cpu", stop=("<|im_start|>",))
    sampler = sample.Sampler(cfg)
    (ids,) = sampler.answer([[1]], 0, on_text)
    assert sampler.text(ids) == ("one", True)


def test_ctrl_c_ends_a_reply_and_keeps_it(model, monkeypatch, capsys):
    def interrupted(model, prompts, *settings, on_token, **more):
        for token in b"half":
            on_token(0, token)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    asked, out = chat_of(monkeypatch, capsys, model, "template=chatml", lines=["hi", "go on"])
    assert asked[1][1] == dict(role="assistant", content="half") and out.count("half\n") == 2


def test_seeds(model, monkeypatch, capsys):
    args = (f"model={model}", "prompt=Say it", "temperature=1", "max_new_tokens=30")
    one, again, other = (run(monkeypatch, capsys, *args, f"seed={seed}")[1] for seed in (1, 1, 2))
    assert one == again != other


def test_an_adapter_and_another_base(model, tmp_path, monkeypatch, capsys):
    other = tiny.model_dir(tmp_path / "other", seed=1)
    adapted = weights.load_model(model)
    lora.apply(adapted, rank=4, alpha=8)
    for p in tiny.adapter_parameters(adapted):
        torch.nn.init.normal_(p, std=0.3)
    weights.save_adapter(adapted, tmp_path / "adapter", base=model)
    before = (tmp_path / "adapter" / "adapter_config.json").read_bytes()

    def opened(base):
        return lambda dir, dtype: weights.open(tmp_path / "adapter", base, dtype=dtype).model

    args = (f"model={tmp_path / 'adapter'}", "prompt=Hello", "temperature=0", "max_new_tokens=20")
    shown = [run(monkeypatch, capsys, *args, *more)[1] for more in ((), (f"base={other}",))]
    assert shown == [answer(model, "Hello", 20, open=opened(base)) + "\n" for base in (None, other)]
    assert len({*shown, answer(model, "Hello", 20) + "\n"}) == 3
    assert (tmp_path / "adapter" / "adapter_config.json").read_bytes() == before


def chat_of(monkeypatch, capsys, model, *argv, lines):
    """What was asked of the model, turn by turn, and what stood on the terminal."""
    asked = []
    original = sample.Sampler.render
    monkeypatch.setattr(
        sample.Sampler,
        "render",
        lambda self, messages: (asked.append(messages), original(self, messages))[1],
    )
    argv = (f"model={model}", "temperature=0", "max_new_tokens=6", *argv)
    status, out, err = run(monkeypatch, capsys, *argv, lines=lines)
    assert status == 0 and err == ""
    return asked, out


def test_chat(model, monkeypatch, capsys):
    lines = [
        "hi",
        "",
        "and you?",
        "/what",
        "/reset",
        "new",
        "/system Be terse.",
        "hello",
        "/quit",
        "never read",
    ]
    asked, out = chat_of(monkeypatch, capsys, model, "template=chatml", lines=lines)
    said = [answer(model, None, 6, "chatml", messages=messages) for messages in asked]
    user = [dict(role="user", content=text) for text in ("hi", "and you?", "new", "hello")]
    assert asked[0] == [user[0]]
    assert asked[1] == [user[0], dict(role="assistant", content=said[0]), user[1]]  # it remembers
    assert asked[2] == [user[2]]  # until told to forget
    assert asked[3] == [dict(role="system", content="Be terse."), user[3]]
    assert len(asked) == 4 and all(text + "\n" in out for text in said) and sample.HELP in out


def test_turns_are_forgotten_until_the_answer_has_room(model):
    """Not when only the prompt no longer fits: then replies would end after a token."""
    sampler = sample.Sampler(
        sample.Config(
            model=str(model), device="cpu", template="chatml", max_new_tokens=64, temperature=0.0
        )
    )
    history = [dict(role=role, content="x" * 50) for role in ("user", "assistant")]
    taken = []
    sampler.answer = lambda prompts, *rest: taken.append(len(prompts[0])) or [[121]]
    for n in (1, 2):
        assert (
            len(sample.reply(sampler, "z", None, history * n, 0)) == 4
        )  # at most one turn of before, and this one
    assert len(set(taken)) == 1 and taken[0] + 64 <= 256 < taken[0] + 100 + 64
    sampler.cfg.max_new_tokens = 1000  # more than there is: half of the positions
    sample.reply(sampler, "z", None, history * 2, 0)
    assert taken[-1] + 128 <= 256


def test_half_an_emoji_in_a_file_of_prompts(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.json").write_text('["ok", "a \\ud83d b"]')
    argv = (
        f"model={model}",
        f"prompts={tmp_path}/prompts.json",
        f"out={tmp_path}/out.json",
        "max_new_tokens=2",
    )
    assert run(monkeypatch, capsys, *argv)[0] == 0
    assert [
        r["input"] for r in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ] == ["ok", "a \ufffd b"]


def test_a_continuation_keeps_the_space_between(monkeypatch):
    """sentencepiece's words begin with their space; only at the beginning of a text it is not
    meant."""
    tok = tokenizer.Tokenizer.__new__(tokenizer.Tokenizer)
    tok.bytes, tok.control, tok.model = (
        {1: b" there", 2: b" was"},
        set(),
        tokenizer.SentencePiece.__new__(tokenizer.SentencePiece),
    )
    tok.model.prefix = "always"
    sampler = sample.Sampler.__new__(sample.Sampler)
    sampler.tok, sampler.cfg = tok, sample.Config(model="")
    for sampler.chats, text in ((True, "there was"), (False, " there was")):
        assert sampler.text([1, 2]) == (text, False)


def test_chat_without_template_completes_lines(model, monkeypatch, capsys):
    asked, out = chat_of(monkeypatch, capsys, model, lines=["one", "two"])
    assert asked == [[dict(role="user", content="one")], [dict(role="user", content="two")]]
    assert "no chat template" in out and answer(model, "two", 6) + "\n" in out


def test_a_long_chat_forgets_its_beginning(model, monkeypatch, capsys):
    lines = [
        "a" * 90,
        "b" * 90,
        "c" * 300,
        "d",
    ]  # the model has 256 positions, and a byte is a token
    asked, out = chat_of(monkeypatch, capsys, model, "template=chatml", lines=lines)
    assert "oldest turn no longer fits" in out and "error: the prompt has" in out
    assert [m["content"][0] for m in asked[-1] if m["role"] == "user"][-1] == "d"


BAD = {
    "no model": (["model=nowhere"], "nowhere"),
    "no prompts file": (["prompts=nowhere.txt"], "nowhere.txt"),
    "a folder of prompts": (["prompts={dir}"], "cannot be read"),
    "empty prompts file": (["prompts={dir}/empty.txt"], "holds no prompt"),
    "prompts that are not UTF-8": (["prompts={dir}/latin.txt"], "UTF-8"),
    "broken JSON": (["prompts={dir}/broken.json"], "no JSON"),
    "JSON of another kind": (["prompts={dir}/object.json"], "and nothing else"),
    "records": (["prompts={dir}/records.jsonl"], "prompt 2: unknown record shape"),
    "an answered conversation": (["prompts={dir}/answered.ndjson"], "prompt 2 ends with an answer"),
    "a conversation without roles": (["prompts={dir}/roles.json"], "prompt 2"),
    "tools in plain text": (["prompts={dir}/tools.jsonl", "template=plain"], "need a chat template"),
    "out in no folder": (
        ["prompts={dir}/good.txt", "out={dir}/no/out.json"],
        "a folder that exists",
    ),
    "out is a folder": (["prompts={dir}/good.txt", "out={dir}"], "must be a file"),
    "out without prompts": (["prompt=x", "out={dir}/out.json"], "prompts="),
    "prompt and prompts": (["prompt=x", "prompts={dir}/good.txt"], "not both"),
    "unknown template": (["prompt=x", "template=chatlm"], "unknown template"),
    "too long a prompt": (["prompt=" + "x" * 300], "shorten it"),
    "empty prompt": (["prompt="], "empty"),
    "a stop string of nothing": (["prompt=x", 'stop=[""]'], "empty string"),
    "no new tokens": (["prompt=x", "max_new_tokens=0"], "max_new_tokens"),
    "top_p out of range": (["prompt=x", "top_p=1.5"], "top_p"),
    "an adapter without its base": (["model={dir}/adapter", "prompt=x"], "base="),
    "a score model": (["model={dir}/score", "prompt=x"], "score model"),
}


@pytest.fixture(scope="module")
def shelf(model, tmp_path_factory):
    dir = tmp_path_factory.mktemp("bad")
    (dir / "empty.txt").write_text("\n \n")
    (dir / "good.txt").write_text("good\n")
    (dir / "latin.txt").write_bytes("ärger\n".encode("latin-1"))
    (dir / "broken.json").write_text('["a", ')
    (dir / "object.json").write_text("{}")
    (dir / "records.jsonl").write_text('"a"\n{"answer": "b"}\n')
    (dir / "answered.ndjson").write_text('"a"\n{"prompt": "b", "completion": "c"}\n')
    (dir / "tools.jsonl").write_text('{"prompt": "a", "tools": [{"name": "f"}]}\n')
    (dir / "roles.json").write_text('["a", [{"content": "b"}]]')
    adapted = weights.load_model(model)
    lora.apply(adapted, rank=2, alpha=4)
    weights.save_adapter(adapted, dir / "adapter", base="gone")
    weights.save_model(weights.load_model(model, head="score"), dir / "score", like=model)
    return dir


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_a_sentence(case, model, shelf, monkeypatch, capsys):
    argv, words = BAD[case]
    before = sorted(shelf.rglob("*"))
    argv = [f"model={model}"] * ("model=" not in argv[0]) + [arg.format(dir=shelf) for arg in argv]
    status, out, err = run(monkeypatch, capsys, *argv)
    assert status == 2 and out == "", (out, err)
    assert re.fullmatch(r"error: .+\n", err) and words in err
    assert sorted(shelf.rglob("*")) == before


def test_a_conversation_that_the_template_does_not_take(model, tmp_path, monkeypatch, capsys):
    """It costs a sentence. Nothing is completed as plain text in silence."""
    path = tmp_path / "model"
    shutil.copytree(model, path)
    (path / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    prompt = (f"model={path}", "prompt=x")
    status, out, err = run(monkeypatch, capsys, *prompt)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "does not take this conversation (no users); template=chatml lays it out" in err
    status, out, err = run(monkeypatch, capsys, f"model={path}", lines=["x"])
    assert (
        status == 0 and "error: the chat template does not take" in out and "forgotten" not in out
    )
