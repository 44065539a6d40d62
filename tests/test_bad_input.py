"""What a user can get wrong with a run ends in one sentence and status 2, and leaves nothing.

What can be wrong with records and tokenizer files is tested beside their code.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors import SafetensorError

import lora
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
    assert len(err) < 450 and "<class" not in err and "Error(" not in err


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
        (dict(data="{model}"), ["meta.json", "prepare"]),
        (dict(model="{data}"), ["no config.json", "prepare.weights"]),
        (dict(sizes="[all,10]"), ["1 folders", "2 sizes"]),
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
        (dict(lora_rank=4, train="qv"), ["train=", "lora_targets"]),
        (dict(lora_rank=4, freeze_layers=1), ["freeze_layers=", "lora_targets"]),
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
            "would write over",
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
        (dict(rope_scaling="linear"), ["config.json", "rope scaling 'linear' is not supported"]),
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
    refused(run(steps=4), "state.json is damaged")
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
