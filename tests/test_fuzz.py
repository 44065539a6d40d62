"""Damaged and odd input of every kind: what comes out is a result or a UserError, and nothing else.

700 cases run here, always the same ones, and 20,000 others with NANO_SLOW=1.
"""

import copy
import importlib
import json
import shutil
from base64 import b64encode
from itertools import islice

import pytest
import tiny
import torch
from conftest import SLOW
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora
from nano import batches, config, store, tokenizer, vocab, weights
from nano.config import UserError
from prepare import instructions, preferences


def fuzz(cases):
    """A test of a third of so many cases. In the slow run they are ten times as many, drawn anew."""
    return settings(
        max_examples=cases * 10 if SLOW else cases // 3,
        derandomize=not SLOW,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- what is drawn

NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 7, 257, 2**16, 2**31, 2**64, 10**30]
WORDS = """ByteLevel Sequence Split Digits Punctuation Metaspace Prepend Replace NFC Isolated Removed
Regex String BPE WordPiece Unigram TemplateProcessing always first never Ġ Ċ ▁ <0x0A> <|im_end|>
llama qwen2 gpt2 mistral linear llama3 full_attention LlamaForCausalLM GPT2LMHeadModel silu LORA
SEQ_CLS q_proj score all none default user assistant system uint32 float64 ( [ \\p{L} {{ {% { a\nb
train ../model.safetensors base_model.model""".split(" ")
words = st.sampled_from([w for part in WORDS for w in (part, *part.split("\n"))])
text = words | st.text(max_size=8) | st.sampled_from(["", "\ud800", "a\0b", "x" * 300])
numbers = st.sampled_from(NUMBERS) | st.floats()
scalars = st.none() | st.booleans() | numbers | text
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
# An edit: the way down to a place, by the number of the child at each level, and what happens.
ways = st.lists(st.integers(0, 300), min_size=1, max_size=5)
kinds = st.sampled_from(["replace", "delete", "insert", "repeat", "rename"])
edits = st.lists(st.tuples(ways, kinds, values, text), min_size=1, max_size=3)


def edited(tree, changes):
    """A JSON value with some of its parts changed."""
    tree = copy.deepcopy(tree)
    for way, kind, value, name in changes:
        parent, key, node = None, None, tree
        for number in way:
            if not isinstance(node, (dict, list)) or not node:
                break
            parent = node
            key = number % len(node) if isinstance(node, list) else list(node)[number % len(node)]
            node = node[key]
        if parent is None:
            return value
        if kind == "replace":
            parent[key] = value
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, value if kind == "insert" else copy.deepcopy(node))
        elif kind == "insert":
            parent[name] = value
        else:
            parent[name] = parent.pop(key) if kind == "rename" else copy.deepcopy(node)
    return tree


# A change of bytes: from where on (as a share), how many are removed, and what is put there.
cuts = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 1, 2, 8, 10**9]), st.binary(max_size=9)),
    min_size=1,
    max_size=3,
)


def damaged(raw, changes):
    for share, removed, new in changes:
        at = int(share * len(raw))
        raw = raw[:at] + new + raw[at + removed :]
    return raw


damage = st.tuples(st.just(True), edits) | st.tuples(st.just(False), cuts)


def hurt(path, change):
    """Changes a file: the values in it where it is JSON, or its bytes."""
    is_json, changes = change
    raw = path.read_bytes()
    if is_json and path.suffix == ".json":
        raw = json.dumps(edited(json.loads(raw), changes)).encode()
    else:
        raw = damaged(raw, changes if not is_json else [(0.5, 1, b"\xff")])
    path.write_bytes(raw)


def allowed(function, *args, **kwargs):
    """function(...), or None where it refuses its input in one sentence."""
    try:
        return function(*args, **kwargs)
    except UserError as e:
        assert str(e) and "Error(" not in str(e) and "<class" not in str(e)
        return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good input of every kind, which the tests copy."""
    path = tmp_path_factory.mktemp("fuzz")
    model = tiny.model_dir(path / "model", n_layers=1)
    tiny.store(path / "store", model, n=6, val=2)
    tiny.preferences(path / "groups", model, n=3, val=0)
    net = weights.load_model(model)
    lora.apply(net, rank=2, alpha=4)
    weights.save_adapter(net, path / "adapter", base=model)
    return path


def fresh(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


# ---- config lines

SCRIPTS = ["pretrain", "sft", "reward", "dpo", "ppo", "sample"]
SCRIPTS += [f"prepare.{name}" for name in ("text", "instructions", "preferences", "weights", "toy")]
CONFIGS = [importlib.import_module(name).Config for name in SCRIPTS]


@st.composite
def lines(draw):
    Config = draw(st.sampled_from(CONFIGS))
    keys = st.sampled_from([*Config.__dataclass_fields__, "algo", "help me", "--lr", "#"]) | text
    signs = st.sampled_from(["=", "=", "=", " = ", ""])
    marks = st.text("[]\",\\ \n\t#~=_.-+eE0123456789%naif", max_size=12)
    line = st.tuples(keys, signs, text | marks | numbers.map(str)).map("".join)
    return Config, draw(st.lists(line, max_size=4))


@fuzz(450)
@given(lines(), st.booleans())
def test_config_lines(tmp_path_factory, drawn, as_preset):
    Config, argv = drawn
    if as_preset:
        path = tmp_path_factory.getbasetemp() / "fuzz.cfg"
        path.write_text("\n".join(argv), encoding="utf-8", errors="surrogatepass")
        argv = [str(path)]
    cfg = allowed(config.parse, Config, argv)
    if cfg is not None:
        allowed(config.check, cfg)
        path = tmp_path_factory.getbasetemp() / "round.cfg"
        path.write_text(config.to_cfg(cfg), encoding="utf-8")
        assert config.parse(Config, [str(path)]) == cfg


# ---- records

RECORDS = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"prompt": "Q", "completion": "A"},
    {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    {"prompt": "Q", "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 0}]},
    {"question": "Q", "answers": [{"text": "a", "pm_score": 3}, {"text": "b", "pm_score": 1}]},
]


@st.composite
def files_of_records(draw):
    """(suffix, bytes)"""
    some = [edited(draw(st.sampled_from(RECORDS)), draw(edits)) for _ in range(draw(st.integers(1, 3)))]
    some.insert(0, draw(st.sampled_from(RECORDS)))
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "tsv"]))
    if kind == "jsonl":
        raw = "\n".join(map(json.dumps, some)).encode()
    elif kind == "json":
        raw = json.dumps(some).encode()
    else:
        sign = "," if kind == "csv" else "\t"
        flat = RECORDS[draw(st.sampled_from([0, 3, 4, 5]))]
        rows = [list(flat), *([json.dumps(v) for v in flat.values()] for _ in range(2))]
        rows = [[draw(st.just(cell) | text) for cell in row] for row in rows]
        raw = "\n".join(map(sign.join, rows)).encode("utf-8", "surrogatepass")
    return kind, damaged(raw, draw(cuts)) if draw(st.booleans()) else raw


@fuzz(400)
@given(files_of_records(), st.sampled_from([instructions, preferences]), st.booleans())
def test_records(place, file, script, skip):
    kind, raw = file
    source = place / f"records.{kind}"
    source.write_bytes(raw)
    cfg = script.Config(
        source=str(source),
        model=str(place / "model"),
        out=str(place / "prepared"),
        template="chatml",
        on_error="skip" if skip else "stop",
        workers=1,
    )
    shutil.rmtree(place / "prepared", ignore_errors=True)
    allowed(script.main, cfg)


# ---- model directories, adapters


@fuzz(300)
@given(
    st.sampled_from(["config.json"] * 4 + ["model.safetensors", "model.safetensors.index.json"]),
    damage,
)
def test_model_directories(place, name, change):
    model = fresh(place / "model", place / "hurt")
    if name.endswith("index.json"):
        tensors = tiny.tensors(model)
        weights.write_tensors(tensors.items(), model, shard_bytes=20_000)
    hurt(model / name, change)
    opened = allowed(weights.open, model)
    if opened:
        allowed(weights.save_model, opened.model, place / "saved", like=model)
        opened.model.logits(opened.model.hidden(torch.tensor([[1, 2, 3]])))


@fuzz(200)
@given(st.sampled_from(["adapter_config.json"] * 3 + ["adapter_model.safetensors"]), damage)
def test_adapters(place, name, change):
    adapter = fresh(place / "adapter", place / "hurt_adapter")
    hurt(adapter / name, change)
    opened = allowed(weights.open, adapter, merge=True)
    if opened:
        opened.model.logits(opened.model.hidden(torch.tensor([[1, 2, 3]])))


# ---- tokenizer files


@pytest.fixture(scope="module")
def tokenizers(place):
    """{name: folder with a tokenizer of that kind}"""
    whole = place / "model"
    pair, spm, fallback, ranks = (place / name for name in ("pair", "spm", "fallback", "ranks"))
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    for folder in (pair, spm, fallback, ranks):
        folder.mkdir()
        kind = "GPT2Tokenizer" if folder == pair else "LlamaTokenizer"
        tiny.write(folder, "tokenizer_config.json", settings | dict(tokenizer_class=kind))
    spec = json.loads((whole / "tokenizer.json").read_text())
    spec["model"]["merges"] = [["a", "b"], ["ab", "c"]]
    spec["model"]["vocab"] |= {"ab": 262, "abc": 263}
    tiny.write(whole, "tokenizer.json", spec)
    tiny.write(whole, "generation_config.json", {"eos_token_id": [258], "pad_token_id": 258})
    tiny.write(pair, "vocab.json", spec["model"]["vocab"])
    (pair / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    tiny.write(pair, "added_tokens.json", {"<|im_start|>": 257, "<|im_end|>": 258})
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [("<unk>", 0.0, vocab.UNKNOWN), ("<s>", 0.0, vocab.CONTROL), ("</s>", 0.0, vocab.CONTROL)]
    pieces += [(name, 0.0, vocab.BYTE) for name in names]
    pieces += [(piece, -i, vocab.NORMAL) for i, piece in enumerate(["▁", "a", "b", "ab", "▁ab"])]
    proto = vocab.sentencepiece_proto(pieces, True, (0, 1, 2, -1))
    (spm / "tokenizer.model").write_bytes(proto)
    added = [vocab.added_token(i, name) for i, name in enumerate(["<unk>", "<s>", "</s>"])]
    model = dict(
        type="BPE",
        byte_fallback=True,
        vocab={piece: i for i, (piece, _, _) in enumerate(pieces)},
        merges=["a b", "▁ ab"],
        unk_token="<unk>",
    )
    replace = dict(type="Replace", pattern={"String": " "}, content="▁")
    normalizer = dict(type="Sequence", normalizers=[dict(type="Prepend", prepend="▁"), replace])
    fallback_json = dict(added_tokens=added, normalizer=normalizer, pre_tokenizer=None, model=model)
    tiny.write(fallback, "tokenizer.json", fallback_json)
    lines = (f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (ranks / "small.tiktoken").write_text("".join(lines))
    folders = [whole, pair, spm, fallback, ranks]
    known = (vocab.GPT2, None, None, "<|end|>", 256, ["<|end|>"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tokenizer.TIKTOKEN, 256, known)
        assert all(tokenizer.load(folder) for folder in folders)
        yield folders


@fuzz(450)
@given(st.data(), damage)
def test_tokenizer_files(place, tokenizers, data, change):
    folder = fresh(data.draw(st.sampled_from(tokenizers)), place / "hurt_tokenizer")
    names = sorted({path.name for path in tokenizer.files_of(folder)} - {"model.safetensors"})
    main = [name for name in names if name.startswith(("tokenizer.", "vocab", "merges", "small"))]
    hurt(folder / data.draw(st.sampled_from(names + main * 3)), change)
    tok = allowed(tokenizer.load, folder)
    if tok:
        for sample in ("abc ab  é\n 12<|im_end|>", "", "\ud800"):
            ids = allowed(tok.encode, sample, bos=True, eos=True)
            if ids:
                tok.decode(ids), tok.decode_until(ids, ["b"])
        messages = [dict(role="user", content="abc"), dict(role="assistant", content="d <s>")]
        allowed(tok.render, messages)


# ---- stores


@fuzz(200)
@given(st.sampled_from(["store", "groups"]), st.data(), damage)
def test_stores(place, kind, data, change):
    folder = fresh(place / kind, place / "hurt_store")
    names = sorted(path.name for path in folder.iterdir())
    hurt(folder / data.draw(st.sampled_from(names + ["meta.json"] * 4)), change)
    groups = kind == "groups"
    tok = tokenizer.load(place / "model")
    size = data.draw(st.sampled_from(["all", "1", "50%", "0", "1_0", "1__0", "x", "9" * 5000]))
    mixed = allowed(store.mix, [folder], [size], tokenizer=tok, groups=groups)
    allowed(store.validation, [folder], tok, groups=groups)
    if mixed:
        how = batches.Groups if groups else batches.Rows
        planned = allowed(how, mixed, 2, 2, 64)
        if planned:
            allowed(lambda: list(islice(map(planned.batch, range(2)), 2)))
