"""Model directories: shards, damage, kills and memory. Training state: bit for bit."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import ModelConfig, Transformer
from nano import families, files, state, store, weights
from nano.config import UserError

CFG = ModelConfig(
    vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48
)


def make(seed=0, **more):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**vars(CFG), **more}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def same(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read(dir):
    """The file's tensors in memory of their own: the tests write over the file."""
    return {name: t.clone() for name, t in load_file(dir / "model.safetensors").items()}


def edit_config(dir, **change):
    path = Path(dir) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# ---- saving and loading


@pytest.mark.parametrize("shard_bytes, files", [(5e9, 1), (20_000, 4), (1, 21)])
def test_shards(shard_bytes, files, tmp_path):
    model = make()
    weights.save_model(model, tmp_path, shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert same(weights.load_model(tmp_path), model)
    x = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(x).logits - model.logits(model.hidden(x))).abs().max() < 1e-3
    mode = (tmp_path / "config.json").stat().st_mode
    assert all(path.stat().st_mode == mode for path in tmp_path.iterdir())
    assert not list(tmp_path.glob("*.tmp"))


def test_their_shards_open(tmp_path):
    model = make()
    weights.save_model(model, tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(
        tmp_path / "many", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert same(weights.load_model(tmp_path / "many"), model)


def test_dtypes(tmp_path):
    model = make()
    weights.save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = weights.load_model(tmp_path)
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert same(stored, make().bfloat16())
    assert same(weights.load_model(tmp_path, dtype=torch.float32), make().bfloat16().float())
    assert all(p.requires_grad and not p.is_meta for p in stored.parameters())


def test_an_old_mixed_file_becomes_one_dtype(tmp_path):
    weights.save_model(make(), tmp_path)
    tensors = {name: t.bfloat16() if t.dim() > 1 else t for name, t in read(tmp_path).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert {p.dtype for p in weights.load_model(tmp_path).parameters()} == {torch.bfloat16}


def test_training_on_a_mapped_model_leaves_the_file_alone(tmp_path):
    weights.save_model(make(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = weights.load_model(tmp_path)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    weights.save_model(model, tmp_path)  # onto the very file that it is mapped from
    assert same(weights.load_model(tmp_path), model)
    assert not same(weights.load_model(tmp_path), make())


def test_tied_head_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "STRETCH", 1)  # row by row
    model = make(tie_embeddings=True)
    weights.save_model(model, tmp_path)
    tensors = read(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same(weights.load_model(tmp_path), model)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        weights.load_model(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.cat(
        (embedding, embedding[:1])
    )  # equal as far as the embedding goes
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        weights.load_model(tmp_path)


def test_like_keeps_what_the_source_says(tmp_path):
    source = tmp_path / "source"
    weights.save_model(
        make(family="qwen2", qkv_bias=True),
        source,
        eos_token_id=[7, 8],
        note="kept",
        layer_types=None,
    )
    (source / "tokenizer.json").write_bytes(b'{"\xc3\xa9": 1}\r\n')
    (source / "generation_config.json").write_bytes(b'{"eos_token_id" : [7,8]}')
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}")
    (source / "README.md").write_text("not ours to copy")
    model = weights.load_model(source, head="score")
    weights.save_model(model, tmp_path / "out", like=source, pad_token_id=3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["note"], config["pad_token_id"]) == ([7, 8], "kept", 3)
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["id2label"] == {
        "0": "LABEL_0"
    }
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()

    weights.save_model(
        make(), tmp_path / "other", like=source
    )  # a model of another family, with this tokenizer
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["eos_token_id"] == [7, 8] and "note" not in config


def test_gathered_tensors_take_the_place_of_the_models(tmp_path):
    with torch.device("meta"):
        hollow = Transformer(CFG)
    whole = make()
    weights.save_model(hollow, tmp_path, torch.bfloat16, tensors=dict(whole.named_parameters()))
    assert same(weights.load_model(tmp_path), whole.bfloat16())


# ---- families whose files differ


STORED = {
    "model.embed_tokens": "transformer.wte",
    "model.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
    **{f"model.layers.{{}}.self_attn.{x}_proj": "transformer.h.{}.attn.c_attn" for x in "qkv"},
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.c_proj",
    "model.layers.{}.mlp.gate_proj": "transformer.h.{}.mlp.c_fc",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
    "model.norm": "transformer.ln_f",
}


@pytest.fixture
def made_up(monkeypatch):
    """Adds a family whose files name, fuse and transpose tensors: a function of the layout of its
    c_attn."""

    def add(layout):
        family = dataclasses.replace(
            families.FAMILIES["llama"],
            architectures={"lm": "MadeUpLMHeadModel", "score": "MadeUpForSequenceClassification"},
            tensors=STORED,
            layouts={
                "transformer.h.{}.attn.c_attn": layout,
                "transformer.h.{}.attn.c_proj": families.CONV1D,
            },
            prefix="transformer.",
            ignored=r"\.attn\.bias$",
        )
        monkeypatch.setitem(families.FAMILIES, "made_up", family)

    return add


@pytest.mark.parametrize("layout", ["rows", "transposed", "interleaved"])
@pytest.mark.parametrize("head", ["lm", "score"])
def test_names_and_layouts_of_a_family(layout, head, made_up, tmp_path):
    layouts = dict(rows=families.ROWS, transposed=families.CONV1D, interleaved=families.BY_HEAD)
    made_up(layouts[layout])
    model = make(family="made_up", n_kv_heads=4, qkv_bias=True, o_bias=True, head=head)
    weights.save_model(model, tmp_path, shard_bytes=20_000)
    stored = dict(weights.read_tensors(tmp_path))
    attention = model.layers[1].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    fused = stored["transformer.h.1.attn.c_attn.weight"]
    if layout == "interleaved":
        assert torch.equal(fused[8:16], k[:8]) and torch.equal(fused[24:32], q[8:16])
    else:
        assert torch.equal(fused if layout == "rows" else fused.T, torch.cat((q, k, v)))
    assert stored["transformer.h.1.attn.c_attn.bias"].shape == (96,)
    assert torch.equal(stored["transformer.h.1.attn.c_proj.weight"], attention.o_proj.weight.T)
    assert torch.equal(stored["transformer.h.1.attn.c_proj.bias"], attention.o_proj.bias)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (96, 32)
    assert "model.layers.0.mlp.down_proj.weight" in stored  # not in the table
    assert not any("self_attn" in name or "embed" in name for name in stored)

    again = weights.load_model(tmp_path)
    assert again.cfg == model.cfg and same(again, model)
    assert all(p.is_contiguous() for p in again.parameters())
    half = weights.load_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.layers[1].self_attn.k_proj.weight, k.bfloat16())
    weights.save_model(again, tmp_path / "again")
    assert same(weights.load_model(tmp_path / "again"), model)


def test_files_without_the_familys_prefix(made_up, tmp_path):
    made_up(families.CONV1D)
    model = make(family="made_up", tie_embeddings=True)
    weights.save_model(model, tmp_path)
    bare = {name.removeprefix("transformer."): t for name, t in read(tmp_path).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a constant
    save_file(bare, tmp_path / "model.safetensors")
    assert same(weights.load_model(tmp_path), model)
    save_file(bare | {"lm_head.weight": bare["wte.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        weights.load_model(tmp_path)
    bare["h.1.attn.c_attn.weight"] = torch.ones(64, 32)
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"h.1.attn.c_attn.weight \(64, 32\) for \(32, 64\)"):
        weights.load_model(tmp_path)


def test_fused_rows_stay_memory_mapped(made_up, tmp_path):
    made_up(families.ROWS)
    weights.save_model(make(family="made_up"), tmp_path)
    attention = weights.load_model(tmp_path).layers[0].self_attn
    first, second = attention.q_proj.weight, attention.k_proj.weight
    assert second.data_ptr() == first.data_ptr() + first.nbytes  # not copied


def test_an_unknown_family():
    with pytest.raises(UserError, match="model_type lama is not supported; .* are: llama"):
        families.parse_config(dict(model_type="lama"), "config.json")
    with pytest.raises(UserError, match="MistalForCausalLM is not supported; .*MistralForCausalLM"):
        families.parse_config(dict(architectures=["MistalForCausalLM"]), "config.json")
    with pytest.raises(UserError, match="model family qwen is not supported; .*qwen2"):
        families.config_json(ModelConfig(family="qwen"))


# ---- what a user can get wrong


def test_missing_directory_and_adapter(tmp_path):
    with pytest.raises(UserError, match="no model directory"):
        weights.load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no config.json"):
        weights.load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="LoRA adapter"):
        weights.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{'single': quotes}")
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        weights.load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        weights.load_model(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_file(size, sharded, tmp_path):
    weights.save_model(make(), tmp_path, shard_bytes=20_000 if sharded else 5e9)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(UserError, match=f"{file.name} is damaged or incomplete") as e:
        weights.load_model(tmp_path)
    assert "\n" not in str(e.value)


def test_missing_files(tmp_path):
    weights.save_model(make(), tmp_path, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        weights.load_model(tmp_path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(UserError, match=f"{shards[1].name} is damaged or incomplete"):
        weights.load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        weights.load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="prepare.weights .* converts pytorch_model.bin"):
        weights.load_model(tmp_path)


def test_shards_lie_beside_their_index(tmp_path):
    weights.save_model(make(), tmp_path / "model", shard_bytes=20_000)
    index = tmp_path / "model" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    key, shard = next(iter(good["weight_map"].items()))
    (tmp_path / "model" / shard).rename(tmp_path / shard)
    for other in (f"../{shard}", str(tmp_path / shard), 3):
        index.write_text(json.dumps(good | dict(weight_map=good["weight_map"] | {key: other})))
        with pytest.raises(UserError, match="names something else than files beside it"):
            weights.load_model(tmp_path / "model")


def test_tensors_that_do_not_fit(tmp_path):
    weights.save_model(make(), tmp_path)
    good = read(tmp_path)

    def refused(said, **change):
        tensors = {name: t for name, t in (good | change).items() if t is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said):
            weights.load_model(tmp_path)

    name = "model.layers.1.mlp.up_proj.weight"
    refused(rf"missing: {name}$", **{name: None})
    refused(r"unexpected: model.layers.2.extra$", **{"model.layers.2.extra": torch.ones(2)})
    refused(rf"another shape.*: {name} \(48, 31\) for \(48, 32\)", **{name: torch.ones(48, 31)})
    refused(rf"float type: {name} torch.int8", **{name: torch.ones(48, 32, dtype=torch.int8)})
    refused(
        "missing: lm_head.weight; unexpected: score.weight",
        **{"lm_head.weight": None, "score.weight": torch.ones(1, 32)},
    )
    save_file(good, tmp_path / "model.safetensors")
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(
        UserError, match="unexpected: model.layers.1.input_layernorm.weight, .* and 5 more"
    ):
        weights.load_model(tmp_path)


def test_score_model_is_no_language_model(tmp_path):
    weights.save_model(make(head="score"), tmp_path)
    assert weights.load_model(tmp_path).cfg.head == "score"
    with pytest.raises(UserError, match="score model"):
        weights.load_model(tmp_path, head="lm")


# ---- kills


def killed_at(step, action):
    """Runs `action` in a child process that ends like kill -9 before its `step`-th change to the
    file system. -> whether it was"""
    child = os.fork()
    if child == 0:
        count = 0

        def guarded(call):
            def wrapper(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return call(*args, **kwargs)

            return wrapper

        for name in ("replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, guarded(getattr(os, name)))
        weights.save_file = guarded(save_file)
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize(
    "before, after", [(5e9, 5e9), (5e9, 2e4), (2e4, 5e9), (2e4, 2e4), (2e4, 1.3e4)]
)
def test_a_kill_leaves_the_old_or_the_new_model(before, after, tmp_path, monkeypatch):
    for module in (files, weights):  # it takes its time, and a kill loses no written page
        monkeypatch.setattr(module, "sync", lambda path: None)
    old, new = make(1), make(2)
    step, seen = 0, []
    while True:
        step += 1
        dir = tmp_path / str(step)
        weights.save_model(old, dir, shard_bytes=before)
        killed = killed_at(step, lambda dir=dir: weights.save_model(new, dir, shard_bytes=after))
        now = weights.load_model(dir)
        seen.append(same(now, new))
        assert seen[-1] or same(now, old)
        weights.save_model(old, dir, shard_bytes=before)  # and the next save works, and clears up
        assert same(weights.load_model(dir), old)
        fresh = tmp_path / "fresh"
        weights.save_model(old, fresh, shard_bytes=before)
        assert len(list(dir.glob("*.safetensors*"))) == len(list(fresh.glob("*.safetensors*")))
        if not killed:
            break
    assert seen == sorted(seen) and not seen[0] and seen[-1] and step > 4


def test_a_kill_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    for module in (files, weights):
        monkeypatch.setattr(module, "sync", lambda path: None)
    states = [({"a": torch.full((3,), float(i))}, {"step": i}) for i in range(2)]
    step, seen = 0, []
    while True:
        step += 1
        dir = tmp_path / str(step) / "state"
        state.save_state(dir, *states[0])
        killed = killed_at(step, lambda dir=dir: state.save_state(dir, *states[1]))
        assert state.resumes(dir.parent, "auto", Rank)
        tensors, meta = tiny.state(dir)
        assert tensors["a"][0] == meta["step"]
        seen.append(meta["step"])
        state.save_state(dir, *states[0])
        assert tiny.state(dir)[1] == {"step": 0}
        assert not [p for p in dir.parent.iterdir() if p.suffix]
        if not killed:
            break
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and step > 4


def test_a_kill_leaves_the_old_or_the_new_data_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sync", lambda path: None)
    rows = {name: {"train": [([i] * 3, None)] * 2} for i, name in enumerate(("old", "new"))}
    meta = dict(vocab_size=9)
    step, seen = 0, []
    while True:
        step += 1
        dir = tmp_path / str(step) / "data"
        store.write_store(dir, rows["old"], meta)
        killed = killed_at(step, lambda dir=dir: store.write_store(dir, rows["new"], meta))
        seen.append(int(store.Store(dir, "train").row(0)[0][0]))
        store.write_store(dir, rows["old"], meta)
        assert not dir.with_name(dir.name + files.REPLACED).exists()
        if not killed:
            break
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and step > 4


def test_a_neighbour_of_a_replaced_folder_is_left_alone(tmp_path):
    for name in ("data.old", "data.tmp"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        store.write_store(tmp_path / "data", {"train": [([1], None)]}, dict(vocab_size=9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "data.old", "data.tmp"]


def test_a_failure_leaves_nothing_half_written(tmp_path):
    weights.save_model(make(1), tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def tensors():
        yield "a", torch.ones(9)
        yield "b", torch.ones(9)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        weights.write_tensors(tensors(), tmp_path / "model", shard_bytes=40)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    with pytest.raises(TypeError):
        state.save_state(tmp_path / "state", {}, {"not JSON": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- memory

MEASURE = """
import re, sys, torch
from nano import weights
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
dtype = getattr(torch, sys.argv[2])
weights.load_model(sys.argv[3], dtype=dtype)  # imports and allocator pools
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before, anonymous = status("VmRSS"), status("RssAnon")
model = weights.load_model(sys.argv[1], dtype=dtype)
weights = sum(p.nbytes for p in model.parameters())
touched = sum(float(p.sum()) for p in model.parameters())
print((status("VmHWM") - before) / weights, (status("RssAnon") - anonymous) / weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "stored, wanted", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_peak_memory_at_load(stored, wanted, tmp_path):
    """The embedding is most of this model, so that a second copy of it would show."""
    cfg = dict(
        vars(CFG),
        vocab_size=80_000,
        dim=512,
        ffn_dim=2048,
        n_layers=2,
        head_dim=128,
        tie_embeddings=True,
    )
    model = Transformer(ModelConfig(**cfg)).to(getattr(torch, stored))
    weights.save_model(model, tmp_path / "big")
    weights.save_model(make(tie_embeddings=True), tmp_path / "small", getattr(torch, stored))
    command = [sys.executable, "-c", MEASURE, tmp_path / "big", wanted, tmp_path / "small"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    peak, anonymous = map(float, done.stdout.split())
    print(f"peak {peak:.2f}, anonymous {anonymous:.2f} times the weights")
    assert 0.9 < peak < 1.3
    if stored == wanted:
        assert anonymous < 0.1  # the weights are the file


# ---- training state


class Rank:
    """What nano/state.py asks of a runtime, on one process."""

    is_main, world = True, 1
    once = staticmethod(lambda f, *args: f(*args))
    all_sum = staticmethod(lambda x: x)
    rng_state = staticmethod(lambda: {"cpu": torch.get_rng_state()})
    saving_group = staticmethod(lambda: None)
    gather = staticmethod(lambda tensors: {name: t.detach().clone() for name, t in tensors.items()})
    init_moments = staticmethod(lambda optimizer: None)

    @staticmethod
    def set_rng_state(state):
        torch.set_rng_state(state["cpu"])


def trainer(kind, dtype=torch.float32):
    model = make().to(dtype)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        dict(params=decayed, weight_decay=0.1),
        dict(params=[p for p in model.parameters() if p.dim() == 1]),
    ]
    options = (
        dict(lr=1e-2, betas=(0.9, 0.95))
        if kind is torch.optim.AdamW
        else dict(lr=1e-2, momentum=0.9)
    )
    return model, kind(groups, **options)


def steps(model, optimizer, n):
    for _ in range(n):
        x = torch.randint(0, 50, (2, 8))  # from the generator that the state holds
        model.logits(model.hidden(x)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_for_bit(kind, dtype, tmp_path):
    straight, optimizer = trainer(kind, dtype)
    torch.manual_seed(5)
    steps(straight, optimizer, 3)
    half = dict(straight.named_parameters())
    extra = {"order": torch.arange(4)}
    state.save_training(
        tmp_path / "state", Rank, "sft", half, {"main": optimizer}, extra, step=3, best=0.1 + 0.2
    )
    steps(straight, optimizer, 3)

    resumed, other = trainer(kind, dtype)
    torch.manual_seed(99)
    meta, back = state.load_training(
        tmp_path / "state", Rank, "sft", dict(resumed.named_parameters()), {"main": other}
    )
    assert meta == {"step": 3, "best": 0.1 + 0.2} and torch.equal(back["order"], extra["order"])
    steps(resumed, other, 3)
    assert same(straight, resumed)
    a, b = optimizer.state_dict(), other.state_dict()
    assert all(
        torch.equal(a["state"][i][k], b["state"][i][k]) for i in a["state"] for k in a["state"][i]
    )


def test_a_resumed_run_may_have_other_settings():
    """The groups' learning rate, decay and betas are what the command says, not what an earlier one
    said."""
    model, optimizer = trainer(torch.optim.AdamW)
    steps(model, optimizer, 1)
    tensors, meta = state.flatten_optimizer(optimizer)
    groups = [dict(params=g["params"]) for g in optimizer.param_groups]
    other = torch.optim.AdamW(groups, lr=3e-4, betas=(0.8, 0.9), weight_decay=0.5)
    state.restore_optimizer(other, tensors, json.loads(json.dumps(meta)))
    assert all(
        (g["lr"], g["betas"], g["weight_decay"]) == (3e-4, (0.8, 0.9), 0.5)
        for g in other.param_groups
    )
    assert all(
        torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        for p in model.parameters()
    )


def test_moments_keep_their_own_dtype():
    """torch's load_state_dict would cast them to the parameter's."""
    model, optimizer = trainer(torch.optim.AdamW, torch.bfloat16)
    steps(model, optimizer, 1)
    for moments in optimizer.state.values():
        moments |= {
            "exp_avg": moments["exp_avg"].float() + 1e-6,
            "exp_avg_sq": moments["exp_avg_sq"].to(torch.uint8),
            "age": 3,
        }
    tensors, meta = state.flatten_optimizer(optimizer)
    model, other = trainer(torch.optim.AdamW, torch.bfloat16)
    state.restore_optimizer(other, tensors, json.loads(json.dumps(meta)))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a["age"] == b["age"]
        assert all(
            torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype
            for k in ("step", "exp_avg", "exp_avg_sq")
        )


def test_a_state_of_another_run_is_refused(tmp_path):
    model, optimizer = trainer(torch.optim.AdamW)
    steps(model, optimizer, 1)
    named = dict(model.named_parameters())
    state.save_training(tmp_path / "state", Rank, "sft", named, {"main": optimizer}, step=1)
    fewer = {name: p for name, p in named.items() if "mlp" not in name}
    with pytest.raises(UserError, match="other parameters"):
        state.load_training(tmp_path / "state", Rank, "sft", fewer, {"main": optimizer})
    with pytest.raises(UserError, match="other parameters"):
        state.load_training(tmp_path / "state", Rank, "sft", named, {"policy": optimizer})
    with pytest.raises(UserError, match="other parameters"):
        state.load_training(
            tmp_path / "state", Rank, "sft", named, {"main": torch.optim.AdamW(fewer.values())}
        )
    with pytest.raises(UserError, match="state of a run of sft.py"):
        state.load_training(tmp_path / "state", Rank, "dpo", named, {"main": optimizer})
    file = tmp_path / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="state.safetensors is damaged or incomplete"):
        state.load_training(tmp_path / "state", Rank, "sft", named, {"main": optimizer})


def test_resumes(tmp_path):
    assert not state.resumes(tmp_path, "auto", Rank)
    with pytest.raises(UserError, match="no saved state"):
        state.resumes(tmp_path, "true", Rank)
    state.save_state(tmp_path / "state", {}, {})
    assert state.resumes(tmp_path, "auto", Rank) and state.resumes(tmp_path, "true", Rank)
    assert not state.resumes(tmp_path, "false", Rank)


def test_ranks_that_see_different_folders(tmp_path):
    """A disk of its own on each node: one would go on from a state and the other start anew."""
    state.save_state(tmp_path / "here" / "state", {}, {})

    class Two(Rank):
        world = 2
        other = 0
        all_sum = classmethod(lambda cls, x: x + cls.other)

    for name in ("here", "none"):
        Two.other = int(name == "none")
        with pytest.raises(UserError, match="on some nodes and not on others"):
            state.resumes(tmp_path / name, "auto", Two)
    assert not state.resumes(tmp_path / "here", "false", type("All", (Two,), dict(other=0)))
    assert state.resumes(tmp_path / "here", "auto", type("All", (Two,), dict(other=1)))
