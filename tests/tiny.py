"""A model directory of a few thousand weights with a tokenizer of single bytes, and data folders that fit it: for the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT

from model import ModelConfig, Transformer
from nano import files, tokenizer, vocab, weights
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
    """n documents of `low` to `high` tokens, the later half of each a copy of bytes that its first half determines."""
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
    """n groups of rows, best first: what a completion is worth shows in its first letter, H down to A."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        prompt, count = (
            rng.integers(97, 110, rng.integers(3, 8)),
            rng.integers(completions[0], completions[1] + 1),
        )
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


def state(dir):
    """(tensors, meta) of a training state in one file."""
    return dict(weights.read_tensors(dir, name="state")), files.read_json(Path(dir) / "state.json")


def first_moments(out):
    """exp_avg, whole, in the training state of a run folder, one file or one a rank. After one step: (1 - beta1) x the gradient."""
    reader = dcp.HuggingFaceStorageReader(out / "state")
    found = {
        k: v for k, v in reader.read_metadata().state_dict_metadata.items() if k.endswith("exp_avg")
    }
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in found.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


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
    """Runs jobs, each a stage and its arguments, on `world` processes -> (exit status, output). before, after: code around them."""
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


def two_processes(dir, stage, argvs):
    """Runs of a stage, each with its arguments, on two processes."""
    status, output = processes(dir, [(stage, argv) for argv in argvs])
    assert status == 0, output[-3000:]
