"""Every stage on XLA, compiled for the CPU: one device, and four virtual ones (SPMD).

    bash test.sh xla

What torch_xla sets up holds for a process. So the runs on one device share a process, and those on
four devices another one. The CPU's devices cannot belong to several hosts, so two processes with
two devices each test what the hosts of a pod slice must do alike.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from stages import STAGES, assert_same_curve, assert_same_weights, job

if importlib.util.find_spec("torch_xla") is None:
    pytest.skip("no torch_xla here: bash test.sh xla", allow_module_level=True)

WORKER = """
import importlib, json, sys
from nano import config

for stage, argv in json.loads(sys.argv[1]):
    stage = importlib.import_module(stage)
    stage.main(config.load(stage.Config, argv))
"""
# A host of a slice of two. Only the first may change files, and neither ends before the other.
HOST = """
import importlib, json, os, signal, sys
import torch.distributed as dist
import torch_xla.debug.metrics as metrics
import torch_xla.runtime as xr
from nano import config, functions, optim, runtime

host, out = int(sys.argv[2]), sys.argv[3]
xr.process_index, xr.process_count = lambda: host, lambda: 2
begin, lr_at = dist.init_process_group, optim.lr_at
dist.init_process_group = lambda *args, **keys: dist.is_initialized() or begin(*args, **keys)
runtime.Runtime.close = lambda self: None

def only_reads(event, args):
    changes = event in ("os.mkdir", "os.rename", "os.remove")
    if event == "open":
        changes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if changes and str(args[0]).startswith(out):
        raise PermissionError(f"{event} {args}")

def asked_to_stop(step, *args):
    if step == 1 and not os.path.exists(out + "/cut/state"):
        os.kill(os.getpid(), signal.SIGTERM)
    return lr_at(step, *args)

if host == 1:
    sys.addaudithook(only_reads)
    optim.lr_at = asked_to_stop
    functions.judge = None
for stage, argv in json.loads(sys.argv[1]):
    stage = importlib.import_module(stage)
    stage.main(config.load(stage.Config, argv))
print("fetched", metrics.metric_data("TransferFromDeviceTime")[0])
"""
ONE = [name for name in STAGES if name not in ("sft_frozen", "sft_qwen")]
SPMD = dict(
    ddp=["sft", "reward"], fsdp=["pretrain", "sft", "sft_lora", "sft_t5", "reward", "dpo", "ppo"]
)
SPMD |= {"ddp tensor=2": ["sft"], "fsdp tensor=2": ["pretrain", "ppo_lora"]}


def process(devices, script, *args, **env):
    flags = "--xla_backend_optimization_level=0"  # compiles in half the time
    env |= dict(
        PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(devices), TF_CPP_MIN_LOG_LEVEL="2", XLA_FLAGS=flags
    )
    env |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(
        [sys.executable, "-c", script, *args], cwd=ROOT, env=os.environ | env, **pipes
    )


def launch(devices, jobs):
    worker = process(devices, WORKER, json.dumps(jobs))
    output, _ = worker.communicate(timeout=1200)
    assert worker.returncode == 0, output[-7000:]


def launch_hosts(jobs, dir):
    """Runs jobs on two hosts of two devices -> of each (exit status, output, hashes of graphs)."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]))
    graphs, results = [dir / f"graphs.{host}" for host in (0, 1)], []
    hosts = [
        process(
            2,
            HOST,
            json.dumps(jobs[host]),
            str(host),
            str(dir),
            XLA_SAVE_TENSORS_FILE=str(graphs[host]),
            **address,
        )
        for host in (0, 1)
    ]
    try:
        outputs = [host.communicate(timeout=600)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, output, path in zip(hosts, outputs, graphs, strict=True):
        lines = [
            line for path in dir.glob(path.name + "*") for line in path.read_text().splitlines()
        ]
        results.append(
            (host.returncode, output, [line for line in lines if line.startswith("Graph Hash")])
        )
    return results


@pytest.fixture(scope="module")
def folder(stages_folder):
    return stages_folder


@pytest.fixture(scope="module")
def one(folder):
    def run(name, out, *more):
        return job(folder, name, folder / "xla" / out, "device=xla", "parallel=none", *more)

    drop = "lora_dropout=0.1"
    whole, half, rest = (
        run("sft_lora", "whole", drop),
        run("sft_lora", "cut", drop, "steps=2"),
        run("sft_lora", "cut", drop),
    )
    launch(1, [*(run(name, name) for name in ONE), whole, half, rest])
    return folder / "xla"


@pytest.fixture(scope="module")
def four(folder):
    def run(name, mode, out, *more):
        return job(
            folder, name, folder / "spmd" / out, "device=xla", *f"parallel={mode}".split(), *more
        )

    jobs = [run(name, mode, f"{mode}-{name}") for mode, names in SPMD.items() for name in names]
    launch(4, [*jobs, run("sft", "fsdp", "cut", "steps=2"), run("sft", "fsdp", "cut")])
    return folder / "spmd"


def assert_runs_alike(out, reference):
    assert_same_curve(out, reference, tolerance=1e-4)
    assert_same_weights(out / "last", reference / "last")
    graphs = [r["graphs"] for r in tiny.records(out, "train")]
    # Nothing is compiled after the first save, which follows the second step.
    assert 0 < graphs[0] and len(set(graphs[2:])) == 1


@pytest.mark.parametrize("name", ONE)
def test_one_device_does_what_eager_torch_does(folder, one, name):
    assert_runs_alike(one / name, folder / "one" / name)


@pytest.mark.parametrize(
    "mode, name", [(mode, name) for mode, names in SPMD.items() for name in names]
)
def test_four_devices_do_what_eager_torch_does(folder, four, mode, name):
    assert_runs_alike(four / f"{mode}-{name}", folder / "one" / name)


def test_a_resume_is_exact(one, four):
    for whole, cut, name in (
        (one / "whole", one / "cut", "adapter_model"),
        (four / "fsdp-sft", four / "cut", "model"),
    ):
        assert tiny.same_tensors(whole / "last", cut / "last", name)
        losses = [[r["loss"] for r in tiny.records(out) if "loss" in r] for out in (whole, cut)]
        assert losses[0] == losses[1]


def test_hosts_of_a_slice_do_the_same(folder, tmp_path):
    """SIGTERM reaches the second one alone, in the second step of `cut`."""

    def run(name, mode, out):
        return job(folder, name, tmp_path / out, "device=xla", f"parallel={mode}")

    jobs = [
        run("sft", "fsdp", "cut"),
        run("sft", "fsdp", "cut"),
        run("dpo", "ddp", "dpo"),
        run("grpo", "fsdp", "grpo"),
    ]
    (status, output, graphs), (other_status, other_output, other_graphs) = launch_hosts(
        [jobs, jobs], tmp_path
    )
    assert status == other_status == 0, output[-5000:] + other_output[-5000:]
    assert "stopped at step 2" in output and "step" not in other_output
    assert graphs == other_graphs and len(graphs) > 100
    assert output.splitlines()[-1] == other_output.splitlines()[-1]  # how many tensors it fetched
    for name in ("sft", "dpo", "grpo"):
        assert_runs_alike(tmp_path / name.replace("sft", "cut"), folder / "one" / name)


def test_a_host_that_fails_ends_the_job(folder, tmp_path):
    jobs = [
        [job(folder, "sft", tmp_path / "out", "device=xla", "parallel=fsdp", f"model={model}")]
        for model in (folder / "model", tmp_path / "lost")
    ]
    (status, output, _), (other_status, other_output, _) = launch_hosts(jobs, tmp_path)
    assert other_status == 1 and f"there is no model directory {tmp_path}/lost" in other_output
    assert status == 1 and "gloo" in output.lower()
