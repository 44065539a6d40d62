"""Every stage on 2 and 4 processes (gloo, CPU): as on one process, resumed by another number of
ranks, and with ranks that fail."""

import json
import re
import shutil
import time

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, few
from safetensors.torch import load_file
from stages import STAGES, STEPS, alone, assert_same_curve, assert_same_weights, job

from nano import files, weights
from nano.config import UserError

# Around the runs of a process. It notes the share of the parameters that it holds, and may fail.
BEFORE = """
import os, signal
import torch
from nano import files, state, weights

place, start, shares = runtime.Runtime.distribute, runtime.start, {}
runtime.catch_signals = lambda rt: None
runtime.Runtime.should_stop = lambda self: False

def start_on_nodes(cfg):
    os.environ["LOCAL_WORLD_SIZE"] = "2" if cfg.parallel == "hsdp" else os.environ["WORLD_SIZE"]
    return start(cfg)

def weigh(self, model, *args):
    place(self, model, *args)
    torch.rand(rank)  # rows of other lengths would leave the ranks' generators in other states too
    count = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
    shares[argv[0].removeprefix("out=")] = count / sum(p.numel() for p in model.parameters())

runtime.Runtime.distribute, runtime.start = weigh, start_on_nodes
fault, rank = os.environ.get("FAULT"), int(os.environ["RANK"])
if fault == "raise" and rank == 1:
    def broken(*args, **kwargs):
        raise ValueError("rank 1 cannot go on")
    from nano import losses
    losses.cross_entropy = broken
if fault == "kill in the save" and rank == 0:
    rename = os.replace
    def killed(old, new):  # between the two renames that put a new state in the place of the old
        if str(old).endswith("state.unfinished"):
            if files.read_json(f"{old}/state.json")["meta"]["step"] == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)
    os.replace = killed
if fault == "kill in its part" and rank == 1:
    fsync, calls = os.fsync, []
    def killed(file):  # when its part of the second state is written, but not yet on the disk
        calls.append(file)
        if len(calls) == 2:
            os.ftruncate(file, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)
    os.fsync = killed
"""
AFTER = """
with open(os.environ["SHARES"] + str(rank), "w") as f:
    json.dump(shares, f)
"""


def launch(world, jobs, dir, **environment):
    """Runs jobs on `world` processes -> (exit status, output, shares).

    shares: of each rank, {run folder: the share of the parameters that it holds}.
    """
    shares = f"{dir / 'shares.'}"
    status, output = tiny.processes(
        dir, jobs, world, BEFORE, AFTER, timeout=300, SHARES=shares, **environment
    )
    return (
        status,
        output,
        None if status else [json.loads(open(f"{shares}{rank}").read()) for rank in range(world)],
    )


ON_TWO = dict(  # a way to share the work -> the stages that run so by default
    ddp=few(STAGES, "pretrain", "sft", "dpo", "ppo", "grpo"),
    fsdp=few(STAGES, "sft", "sft_lora", "sft_t5", "sft_quant", "reward", "dpo", "ppo_lora"),
)
FOUR = [
    ("fsdp", "pretrain"),
    ("fsdp", "sft_frozen"),
    ("fsdp", "ppo_lora"),
    ("hsdp", "sft"),
    ("hsdp", "ppo_lora"),
    ("zero2", "reward"),
    ("ddp", "dpo"),
    ("ddp tensor=2", "sft"),
    ("fsdp tensor=2", "pretrain"),
    ("hsdp tensor=2", "reward"),
    ("fsdp tensor=2", "ppo_lora"),
]
FOUR = few(
    FOUR,
    ("fsdp", "sft_frozen"),
    ("hsdp", "ppo_lora"),
    ("zero2", "reward"),
    ("fsdp tensor=2", "pretrain"),
    ("hsdp tensor=2", "reward"),
)
PARTS = {"ddp": 1, "ddp tensor=2": 2, "hsdp": 2, "hsdp tensor=2": 2}  # of the weights; else 4
ON_FOUR = {
    "sft": "ddp",
    "sft_lora": "fsdp",
    "pretrain": "fsdp",
    "reward": "zero2",
    "ppo_lora": "hsdp",
    "ppo": "fsdp",
    "dpo": "fsdp tensor=2",
}  # half done -> by this
ON_FOUR = {name: ON_FOUR[name] for name in few(ON_FOUR, "sft", "ppo_lora", "dpo")}
HALF = few(STAGES, "sft", "sft_quant", "reward", "dpo", "ppo_lora")
FSDP_HALF = ["sft", "sft_lora", "sft_quant", "dpo", "ppo_lora", "ppo_quant"]
BF16 = ["sft", "sft_frozen", "sft_lora", "sft_quant", "reward", "ppo_lora"]
BF16 = few(BF16, "sft_frozen", "sft_quant", "reward", "ppo_lora")
TENSOR = few(["pretrain", "sft", "sft_lora", "sft_qwen", "ppo_lora"], "pretrain", "sft_qwen", "ppo_lora")


# variant of a stage: its name in STAGES and more settings
VARIANTS = dict(
    muon=("pretrain", ["optimizer=muon"]),
    mix=(
        "pretrain",
        "data={0}/text,{0}/more_text weights=0.5,0.5 isolate=false parallel=fsdp".split(),
    ),
    reward_lora=("reward", ["lora_rank=2"]),
    dpo_lora=("dpo", ["lora_rank=2"]),
)


def variant(folder, name, out):
    stage, settings = VARIANTS[name]
    return job(folder, stage, out, *settings)


@pytest.fixture(scope="module")
def folder(stages_folder):
    return stages_folder


# ---- as one process


@pytest.fixture(scope="module")
def two(folder):
    """All stages on two processes in two/, and half of their steps in half/."""
    runs = {f"two/{mode}-{name}": (name, mode, STEPS) for mode in ON_TWO for name in ON_TWO[mode]}
    runs |= {f"half/{name}": (name, "fsdp" if name in FSDP_HALF else "ddp", 2) for name in HALF}
    jobs = [
        job(folder, name, folder / run, f"parallel={mode}", f"steps={n}")
        for run, (name, mode, n) in runs.items()
    ]
    jobs += [
        job(folder, name, folder / "bf16" / name, "parallel=fsdp", "dtype=bfloat16")
        for name in BF16
    ]
    for mode in ("ddp", "fsdp"):
        jobs.append(
            job(
                folder,
                "sft",
                folder / "reduced" / mode,
                f"parallel={mode}",
                "reduce_dtype=bfloat16",
            )
        )
    jobs += [
        job(folder, name, folder / "offload" / name, "parallel=fsdp", "offload=true")
        for name in ("sft", "ppo_lora")
    ]
    jobs += [
        job(folder, name, folder / "tensor" / name, "parallel=none", "tensor=2") for name in TENSOR
    ]
    jobs.append(
        job(folder, "sft", folder / "tensor" / "half", "parallel=none", "tensor=2", "steps=2")
    )
    drop = ["parallel=fsdp", "lora_dropout=0.1", "eval_every=100", "save_every=100"]
    for run, *more in (["whole"], ["cut", "steps=2"], ["cut"]):
        jobs.append(job(folder, "sft_quant", folder / "dropout" / run, *drop, *more))
    jobs += [variant(folder, name, folder / "variants" / name) for name in VARIANTS]
    status, output, shares = launch(2, jobs, folder)
    assert status == 0, output[-5000:]
    return shares


@pytest.mark.parametrize("mode, name", [(mode, name) for mode in ON_TWO for name in ON_TWO[mode]])
def test_two_processes_do_what_one_does(folder, two, name, mode):
    parts = 2 if mode == "fsdp" else 1
    out = folder / "two" / f"{mode}-{name}"
    assert_same_curve(out, folder / "one" / name)
    assert_same_weights(out / "last", folder / "one" / name / "last")
    assert all(
        share[str(out)] <= 1.02 / parts for share in two
    )  # what does not divide by two makes one rank's share larger


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_do_what_one_does_with_other_settings(folder, two, tmp_path, name):
    alone([variant(folder, name, tmp_path / "one")])
    out = folder / "variants" / name
    if name == "muon":  # orthogonalises in bf16
        assert_same_curve(out, tmp_path / "one", tolerance=1e-4)
    else:
        assert_same_curve(out, tmp_path / "one")
        assert_same_weights(out / "last", tmp_path / "one" / "last")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_two_processes_compute_the_reference_of_one(folder, two, mode, split):
    paths = [
        next((folder / run).glob(f"reference.{split}.*.bin"))
        for run in (f"two/{mode}-dpo", "one/dpo")
    ]
    a, b = (np.fromfile(path, np.float32) for path in paths)
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", TENSOR)
def test_two_processes_share_each_layer(folder, two, name):
    out = folder / "tensor" / name
    assert_same_curve(out, folder / "one" / name)
    assert_same_weights(out / "last", folder / "one" / name / "last")
    whole = (
        0.27 if name == "sft_qwen" else 0.04
    )  # an odd vocabulary is not cut, nor are norms and half of the adapters
    assert all(share[str(out)] <= 0.5 + whole for share in two)


def test_offloaded_shards(folder, two):
    """On a CPU this runs what a GPU does, but moves nothing."""
    for name in ("sft", "ppo_lora"):
        assert_same_curve(folder / "offload" / name, folder / "one" / name)
        assert_same_weights(folder / "offload" / name / "last", folder / "one" / name / "last")


WATCH = """
place, cast, whole = runtime.Runtime.distribute, runtime.cast_parameters, []

def watch_placing(self, model, *args):
    global placed
    placed = model
    place(self, model, *args)

def watch_casting(part, dtype):
    cast(part, dtype)
    params = list(placed.parameters())
    full = [p for p in params if p.dtype == torch.float32 and not hasattr(p, "placements")]
    whole.append(sum(p.numel() for p in full) / sum(p.numel() for p in params))

import json, os, torch
runtime.Runtime.distribute, runtime.cast_parameters = watch_placing, watch_casting
"""
WHOLE = """
with open(os.environ["WHOLE"] + os.environ["RANK"], "w") as f:
    json.dump(whole, f)
"""


def test_no_process_ever_holds_a_whole_model_that_is_sharded(folder, tmp_path):
    """A bf16 model is its memory-mapped file until each layer is cast to fp32 and sharded."""
    model = tiny.model(vocab_size=264, n_layers=8)
    weights.save_model(model, tmp_path / "model", torch.bfloat16, like=folder / "model")
    run = job(
        folder, "sft", tmp_path / "out", "parallel=fsdp", f"model={tmp_path / 'model'}", "steps=1"
    )
    status, output = tiny.processes(
        tmp_path, [run], before=WATCH, after=WHOLE, WHOLE=f"{tmp_path / 'whole.'}"
    )
    assert status == 0, output[-3000:]
    for rank in range(2):
        whole = json.loads((tmp_path / f"whole.{rank}").read_text())
        assert len(whole) == 9 and max(whole) < 0.25


def test_weights_are_gathered_in_bf16(folder, two):
    """As exact as bf16 is. PPO itself checks that policy and reference start equal.

    A score head stays fp32.
    """
    for name in BF16:
        keys, steps, tolerance = ["loss"], 2, 0.02
        if name == "ppo_lora":  # in a second iteration the samples may differ
            keys, steps = ["reward", "entropy", "policy_grad_norm", "value_grad_norm"], 1
            tolerance = 0.05  # a gradient is a long sum of products that bf16 rounds
        logs = [tiny.records(folder / run / name, "train")[:steps] for run in ("bf16", "one")]
        a, b = ([[r[key] for key in keys] for r in log] for log in logs)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=0.02, err_msg=name)
    sharp = weights.read_tensors(folder / "bf16" / "reward" / "last")["score.weight"]
    assert sharp.dtype == torch.float32 and (sharp != sharp.bfloat16()).any()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_gradients_are_summed_in_bf16(folder, two, mode):
    """A bf16 has 8 bits, so the gradient norm is near that of fp32. The first loss is the same."""
    (a, *_), (b, *_) = (
        tiny.records(folder / run, "train") for run in (f"reduced/{mode}", "one/sft")
    )
    assert abs(a["loss"] - b["loss"]) < 1e-5
    assert 1e-5 < abs(a["grad_norm"] / b["grad_norm"] - 1) < 2**-8


def test_four_processes_do_what_one_does_and_go_on_from_two(folder, two, tmp_path):
    """hsdp: as on two nodes of two processes. Four finish what two have left half done."""
    runs = {f"{mode}-{name}": (mode, name) for mode, name in FOUR}
    jobs = [
        job(folder, name, tmp_path / run, *f"parallel={mode}".split())
        for run, (mode, name) in runs.items()
    ]
    for name, mode in ON_FOUR.items():
        shutil.copytree(folder / "half" / name, tmp_path / name)
        jobs.append(job(folder, name, tmp_path / name, *f"parallel={mode}".split()))
    status, output, shares = launch(4, jobs, tmp_path)
    assert status == 0, output[-5000:]
    for run, (mode, name) in runs.items():
        assert_same_curve(tmp_path / run, folder / "one" / name)
        assert_same_weights(tmp_path / run / "last", folder / "one" / name / "last")
        assert all(share[str(tmp_path / run)] <= 1.1 / PARTS.get(mode, 4) for share in shares), (
            run,
            shares,
        )
    for name in ON_FOUR:
        assert_same_curve(tmp_path / name, folder / "one" / name)
        assert_same_weights(tmp_path / name / "last", folder / "one" / name / "last")


@pytest.mark.parametrize("run", [*(f"half/{name}" for name in HALF), "tensor/half"])
def test_one_process_goes_on_from_two(folder, two, tmp_path, run):
    name = run.removeprefix("half/").replace("tensor/half", "sft")
    shutil.copytree(folder / run, tmp_path / "out")
    alone([job(folder, name, tmp_path / "out")])
    assert_same_curve(tmp_path / "out", folder / "one" / name)
    assert_same_weights(tmp_path / "out" / "last", folder / "one" / name / "last")


FLOATS = """
import torch
import sft
import tiny
from model import Transformer
from nano.batches import collate

forward, seen = Transformer.forward, {}

def spy(self, batch):
    seen.update({name: t.dtype for name, t in batch.items() if torch.is_tensor(t)})
    return forward(self, batch)

Transformer.forward = spy
rt = runtime.Runtime("cpu", "fsdp", "bfloat16")
net = rt.wrap(tiny.model(vocab_size=2048).requires_grad_())
rows = [([1999, 3, 1003, 7, 2047, 5], [0, 0, 0, 1, 1, 1]), ([513, 1025, 2], [0, 1, 1])]
with torch.no_grad(), rt.autocast():
    sums = {}
    for weight in (0.0, 0.3, 1.0):  # a bf16 is 0.3008
        batch = rt.put(collate([rows], 32, prompt_weight=weight, fixed_shapes=True))
        sums[weight] = sft.loss_sum(net, net(batch), batch).item()
    floats = {name for name, dtype in seen.items() if dtype.is_floating_point}
    hidden = [net(b) for b in (batch, {name: t for name, t in batch.items() if name not in floats})]
assert seen["weights"] == torch.bfloat16 and batch["weights"].dtype == torch.float32
assert floats == {"weights"} and seen["tokens"] == torch.int64
assert torch.equal(*hidden)
right = sums[0.0] + 0.3 * (sums[1.0] - sums[0.0])
assert abs(sums[0.3] / right - 1) < 1e-5, sums
"""


def test_floats_of_a_batch_are_exact_under_fsdp(tmp_path):
    """FSDP hands bf16 copies of them to forward, which reads none."""
    path = f"{ROOT}:{ROOT / 'tests'}"
    status, output = tiny.processes(tmp_path, [], before=FLOATS, PYTHONPATH=path)
    assert status == 0, output[-3000:]


# ---- training state


def test_each_rank_writes_its_part_of_the_state(folder, two):
    one, shards = (
        files.read_json(folder / run / "state" / "state.json") for run in ("one/sft", "half/sft")
    )
    assert "files" not in one and len(shards["files"]) == 2
    whole = (folder / "one" / "sft" / "state" / "state.safetensors").stat().st_size
    sizes = [(folder / "half" / "sft" / "state" / file).stat().st_size for file in shards["files"]]
    assert max(sizes) < 0.55 * whole


def test_a_resume_with_as_many_ranks_is_exact(folder, two):
    """On a quantised base with dropout, and generators that differ from rank to rank."""
    whole, cut = folder / "dropout" / "whole", folder / "dropout" / "cut"
    states = [
        f["rng.cpu"]
        for f in map(load_file, (cut / "state").glob("*.safetensors"))
        if "rng.cpu" in f
    ]
    assert len(states) == 1 and (states[0][0] != states[0][1]).any()
    a, b = (weights.read_tensors(out / "last", "adapter_model") for out in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = ([r["loss"] for r in tiny.records(out, "train")] for out in (whole, cut))
    assert a == b and len(a) == STEPS


def test_a_state_with_a_part_missing_is_refused(folder, two, tmp_path):
    """Nor is a pickle, which torch's own format of sharded states needs, ever opened."""
    shutil.copytree(folder / "half" / "sft", tmp_path / "out")
    state = tmp_path / "out" / "state"
    (state / ".metadata").write_bytes(b"cos\n_exit\n(I1\ntR.")  # unpickled, it ends this process
    lost = state / files.read_json(state / "state.json")["files"][0]
    lost.rename(tmp_path / "lost")
    with pytest.raises(UserError, match=f"{lost.name} is missing"):
        alone([job(folder, "sft", tmp_path / "out")])
    (tmp_path / "lost").rename(lost)
    alone([job(folder, "sft", tmp_path / "out")])


# ---- ranks that fail


def test_a_rank_that_raises_ends_the_job(folder, tmp_path):
    began = time.time()
    status, output, _ = launch(
        2, [job(folder, "sft", tmp_path / "out", "parallel=fsdp")], tmp_path, FAULT="raise"
    )
    assert status == 1 and "ValueError: rank 1 cannot go on" in output and time.time() - began < 90
    root = output[output.index("Root Cause (first observed failure)") :]
    assert (
        re.search(r"rank *: 1 \(local_rank: 1\)\s+exitcode *: 1 ", root)
        and "rank 1 cannot go on" in root
    )


@pytest.mark.parametrize("fault", few(["kill in the save", "kill in its part"], "kill in its part"))
def test_a_rank_killed_while_saving_loses_nothing(folder, tmp_path, fault):
    settings, state = (
        job(folder, "sft", tmp_path / "out", "save_every=2", "parallel=fsdp"),
        tmp_path / "out" / "state",
    )
    status, output, _ = launch(2, [settings], tmp_path, FAULT=fault)
    assert status == 1 and "Signal 9 (SIGKILL)" in output
    if fault == "kill in the save":  # between the two renames
        assert not state.exists()
        state = state.with_name("state.replaced")
    else:
        assert (
            sorted(
                path.stat().st_size
                for path in state.with_name("state.unfinished").glob("*.safetensors")
            )[0]
            == 1000
        )
    assert files.read_json(state / "state.json")["meta"]["step"] == 2
    alone([settings])
    assert_same_curve(tmp_path / "out", folder / "one" / "sft")
    assert_same_weights(tmp_path / "out" / "last", folder / "one" / "sft" / "last")
    assert not list((tmp_path / "out").glob("state.*"))
