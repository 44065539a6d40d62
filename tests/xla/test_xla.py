"""Every stage on XLA, compiled for the CPU: one device, and four virtual ones (SPMD). Run by `bash test.sh xla`.

What torch_xla sets up holds for a process, so the runs on one device share a process, and those on four another one.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_parallel import STAGES, alone, assert_same_curve, assert_same_weights, folder, job, quiet, records  # noqa: F401

import checkpoint

if importlib.util.find_spec("torch_xla") is None:
    pytest.skip("no torch_xla here: bash test.sh xla", allow_module_level=True)

WORKER = """
import importlib, json, sys
import config

for stage, argv in json.loads(sys.argv[1]):
    stage = importlib.import_module(stage)
    stage.main(config.load(stage.Config, argv))
"""
ONE = [name for name in STAGES if name not in ("sft_frozen", "sft_qwen")]
SPMD = dict(ddp=["sft", "reward"], fsdp=["pretrain", "sft", "sft_lora", "reward", "dpo", "ppo"])
SPMD |= {"ddp tensor=2": ["sft"], "fsdp tensor=2": ["pretrain", "ppo_lora"]}


def launch(devices, jobs):
    flags = "--xla_backend_optimization_level=0"  # compiles in half the time
    env = os.environ | dict(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices), TF_CPP_MIN_LOG_LEVEL="2", XLA_FLAGS=flags)
    env |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", WORKER, json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]


@pytest.fixture(scope="module")
def one(folder):  # noqa: F811
    def run(name, out, *more):
        return job(folder, name, folder / "xla" / out, "device=xla", "parallel=none", *more)

    drop = "lora_dropout=0.1"
    whole, half, rest = run("sft_lora", "whole", drop), run("sft_lora", "cut", drop, "steps=2"), run("sft_lora", "cut", drop)
    launch(1, [*(run(name, name) for name in ONE), whole, half, rest])
    return folder / "xla"


@pytest.fixture(scope="module")
def four(folder):  # noqa: F811
    def run(name, mode, out, *more):
        return job(folder, name, folder / "spmd" / out, "device=xla", *f"parallel={mode}".split(), *more)

    jobs = [run(name, mode, f"{mode}-{name}") for mode, names in SPMD.items() for name in names]
    launch(4, [*jobs, run("sft", "fsdp", "cut", "steps=2"), run("sft", "fsdp", "cut")])
    return folder / "spmd"


def assert_runs_alike(out, reference):
    assert_same_curve(out, reference, tolerance=1e-4)
    assert_same_weights(out / "last", reference / "last")
    graphs = [r["graphs"] for r in records(out) if r["kind"] == "train"]
    assert 0 < graphs[0] and len(set(graphs[2:])) == 1  # nothing is compiled after the first save, which follows the second step


@pytest.mark.parametrize("name", ONE)
def test_one_device_does_what_eager_torch_does(folder, one, name):  # noqa: F811
    assert_runs_alike(one / name, folder / "one" / name)


@pytest.mark.parametrize("mode, name", [(mode, name) for mode, names in SPMD.items() for name in names])
def test_four_devices_do_what_eager_torch_does(folder, four, mode, name):  # noqa: F811
    assert_runs_alike(four / f"{mode}-{name}", folder / "one" / name)


def same(a, b, name):
    a, b = checkpoint.read_tensors(a, name), checkpoint.read_tensors(b, name)
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in b)


def test_a_resume_is_exact(one, four):
    for whole, cut, name in ((one / "whole", one / "cut", "adapter_model"), (four / "fsdp-sft", four / "cut", "model")):
        assert same(whole / "last", cut / "last", name)
        losses = [[r["loss"] for r in records(out) if "loss" in r] for out in (whole, cut)]
        assert losses[0] == losses[1]
