"""What tests share: a model directory of a few thousand weights with a tokenizer of single bytes,
data folders that fit it, runs of a stage in one process and in several, and what a run leaves."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT

import t5
from model import ModelConfig, Transformer
from nano import config, files, runtime, tokenizer, vocab, weights
from nano.batches import collate
from nano.store import write_store
from prepare.vocab import byte_level_json

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 256, 257, 258
SIZES = dict(
    vocab_size=264,
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_positions=256,
)


def model(seed=0, **changes):
    """A random Transformer whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**SIZES | changes)).init_weights(std=0.1)


def model_dir(path, seed=0, special=SPECIAL, **changes):
    weights.save_model(model(seed, **changes), path)
    return with_tokenizer(path, special)


def t5_dir(path, seed=0, **changes):
    """A directory of a random T5, with the same tokenizer."""
    torch.manual_seed(seed)
    sizes = dict(n_layers=2, n_decoder_layers=2, n_kv_heads=4, mlp="gated", activation="gelu_tanh")
    sizes = {key: n for key, n in SIZES.items() if key != "max_positions"} | sizes
    cfg = t5.ModelConfig(**sizes | dict(buckets=8, far=20) | changes)
    weights.save_model(t5.T5(cfg).init_weights(), path, pad_token_id=0)
    return with_tokenizer(path)


def with_tokenizer(path, special=SPECIAL):
    """Writes a tokenizer of single bytes into a model directory -> the directory."""
    added = [vocab.added_token(256 + i, name) for i, name in enumerate(special)]
    tokens = {char: byte for byte, char in vocab.BYTE_CHAR.items()}
    tokens |= {name: 256 + i for i, name in enumerate(special)}
    write(path, "tokenizer.json", byte_level_json(tokens, [], added))
    write(
        path,
        "tokenizer_config.json",
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=special[1],
            eos_token=special[2],
            pad_token=special[2],
            add_bos_token=False,
        ),
    )
    return path


def write(dir, name, value):
    (Path(dir) / name).write_text(json.dumps(value, indent=1), encoding="utf-8")


def jsonl(path, records):
    """A file with one record a line."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def rows(n, seed=0, low=5, high=40):
    """n documents of `low` to `high` tokens. The first half of each determines the later half."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        prompt = rng.integers(97, 123, rng.integers(low, high) // 2)
        answer = [*(prompt ^ 1), 258]
        out.append(([*prompt, *answer], [0] * len(prompt) + [1] * len(answer)))
    return out


def store(path, model, n=24, val=6, **sizes):
    """A prepared data folder for the model directory `model`."""
    splits = dict(train=rows(n, 1, **sizes)) | (dict(val=rows(val, 2, **sizes)) if val else {})
    write_store(path, splits, dict(vocab_size=264, tokenizer=tokenizer.load(model).fingerprint))
    return path


def ranked(n, seed=0, completions=(2, 4)):
    """n groups of rows, best first. The first letter of a completion, H down to A, is its worth."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        prompt = rng.integers(97, 110, rng.integers(3, 8))
        count = rng.integers(completions[0], completions[1] + 1)
        worths = sorted(rng.choice(8, count, replace=False) + 65, reverse=True)
        answers = [[worth, *rng.integers(97, 110, rng.integers(2, 9)), 258] for worth in worths]
        out.append(
            [([*prompt, *answer], [0] * len(prompt) + [1] * len(answer)) for answer in answers]
        )
    return out


def preferences(path, model, n=48, val=16, **settings):
    """A prepared folder of groups for the model directory `model`."""
    splits = dict(train=ranked(n, 1, **settings)) | (
        dict(val=ranked(val, 2, **settings)) if val else {}
    )
    write_store(path, splits, dict(vocab_size=264, tokenizer=tokenizer.load(model).fingerprint))
    return path


def batch(packs, length, **settings):
    """Packs of rows as the micro-batch that sft.loss_sum takes."""
    return collate(packs, length, **settings)


def adapter_parameters(model, name="default"):
    """The tensors of one adapter."""
    return [p for key, p in model.named_parameters() if key.endswith(f".{name}")]


# ---- a run in this process


def arguments(settings):
    """{key: value} -> ["key=value"], as on a command line."""

    def show(value):
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(map(str, value)) if isinstance(value, list) else value

    return [f"{key}={show(value)}" for key, value in settings.items()]


def override(*settings):
    """Lists of key=value as one, in which a later value of a key takes the earlier one's place."""
    return list({s.partition("=")[0]: s for part in settings for s in part}.values())


def train(stage, argv):
    """Runs a stage in this process, its settings checked as on a command line -> how it ended."""
    stage = importlib.import_module(stage)
    cfg = config.load(stage.Config, argv)
    config.check(cfg)
    return stage.main(cfg)


def stop_before(monkeypatch, step, how=lambda: True):
    """The run is asked to stop when `step` steps are done. `how` may raise instead."""
    calls = iter(range(10**6))
    monkeypatch.setattr(
        runtime.Runtime, "should_stop", lambda self: how() if next(calls) == step else False
    )


def peak_memory(function):
    """The bytes that torch allocates at most, at a time, for the tensors of function()."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    now = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


# ---- what a run leaves behind


def records(out, kind=None):
    """The records of a run's log, all or those of a kind. NaN and Infinity are not JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (Path(out) / "log.jsonl").read_text(encoding="utf-8")
    log = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [r for r in log if kind in (None, r["kind"])]


def lines(out, kind=None):
    """The records without what differs from run to run: time, speed and memory."""
    return [
        {k: v for k, v in r.items() if k not in ("time", "memory_gb") and not k.endswith("_s")}
        for r in records(out, kind)
    ]


def curve(log, *keys):
    """(step, loss, grad_norm, lr), or step and `keys`, of each training step in a log."""
    keys = ("step", *(keys or ("loss", "grad_norm", "lr")))
    return [tuple(r[key] for key in keys) for r in log if r["kind"] == "train"]


def tensors(dir, name="model"):
    """The tensors of a file in memory of their own, so that a later run may write over the file."""
    return {key: tensor.clone() for key, tensor in weights.read_tensors(dir, name=name).items()}


def same_tensors(a, b, name="model"):
    """Whether two directories have the same tensors, bit for bit."""
    a, b = (weights.read_tensors(dir, name=name) for dir in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)


def state(dir):
    """(tensors, meta) of a training state in one file."""
    return dict(weights.read_tensors(dir, name="state")), files.read_json(Path(dir) / "state.json")


def first_moments(out):
    """Adam's first moments in a run folder's training state, gathered from the files of all ranks.

    After one step they are (1 - beta1) times the gradient.
    """
    reader = dcp.HuggingFaceStorageReader(out / "state")
    metadata = reader.read_metadata().state_dict_metadata
    metadata = {name: m for name, m in metadata.items() if name.endswith("exp_avg")}
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


# ---- a run in several processes

WORKER = """
import importlib, json, sys
import torch.distributed as dist
from nano import config, runtime

begin = dist.init_process_group  # several runs in one process: one start is slow enough
dist.init_process_group = lambda *args: dist.is_initialized() or begin(*args)
runtime.Runtime.close = runtime.Runtime.finish_saving
{before}
for stage, argv in json.loads(sys.argv[1]):
    stage = importlib.import_module(stage)
    stage.main(config.load(stage.Config, argv))
{after}
dist.destroy_process_group()
config.leave(0)
"""


def processes(dir, jobs, world=2, before="", after="", timeout=100, **environment):
    """Runs jobs, each a stage and its arguments, on `world` processes -> (exit status, output).

    before, after: code that each process runs before and after them. environment: its variables.
    """
    script = Path(dir) / "worker.py"
    script.write_text(WORKER.format(before=before, after=after))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world}",
        script,
        json.dumps(jobs),
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | environment
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # torchrun ends its children
    return process.returncode, output
