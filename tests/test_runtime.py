"""runtime.py on one process: what it refuses, which device and dtype it takes, how a model is cut, signals, random states."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import types

import pytest
import tiny
import torch
from conftest import ROOT

from nano import runtime
from nano.config import UserError


@pytest.fixture
def rt():
    denormals = torch.tensor([1e-40]) * 1 == 0
    yield runtime.Runtime("cpu", dtype="float32")
    torch.set_flush_denormal(bool(denormals))


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(device="gpu"), "device=gpu: use auto, cpu, cuda, xla or tpu"),
        (dict(device="xla", offload=True), "device=xla has no offload="),
        (
            dict(device="xla", reduce_dtype="bfloat16"),
            "no reduce_dtype=: its gradients are summed in float32",
        ),
        (dict(device="cpu", dtype="float16"), "dtype=float16: use auto, bfloat16 or float32"),
    ],
)
def test_wrong_keys(keys, said):
    with pytest.raises(UserError, match=said):
        runtime.Runtime(**keys)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_devices_that_are_not_there():
    assert runtime.Runtime("auto").kind == "cpu"
    with pytest.raises(UserError, match="device=cuda: this torch .* finds no such device"):
        runtime.Runtime("cuda")


def test_only_devices_that_are_served_are_taken(monkeypatch):
    monkeypatch.setattr(runtime, "accelerator", lambda: "mps")
    assert runtime.Runtime("auto").kind == "cpu"
    with pytest.raises(UserError, match="device=cuda: this torch .* finds no such device"):
        runtime.Runtime("cuda")


def test_processes_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match="not all of WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE: start it with torchrun",
    ):
        runtime.Runtime("cpu")


def test_more_processes_than_devices(monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="2 processes on this node share 1 devices: lower --nproc_per_node"
    ):
        runtime.Runtime("cuda")


@pytest.mark.skipif("torch_xla" in sys.modules, reason="torch_xla is there")
def test_xla_without_torch_xla():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_xla", None)  # an import of it then fails
        with pytest.raises(UserError, match="device=xla needs torch_xla"):
            runtime.Runtime("xla")


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_hosts_of_a_slice_share_results_and_mistakes(rt, monkeypatch):
    sent = []

    def host(main, f):
        rt.kind, rt.processes, rt.is_main = "xla", 2, main
        monkeypatch.setattr(
            runtime.dist,
            "broadcast_object_list",
            lambda box: sent.append([*box]) if main else box.__setitem__(slice(None), sent[-1]),
        )
        return rt.once(f)

    def mistake():
        raise UserError("no state")

    assert host(True, lambda: 3) == host(False, lambda: 4) == 3
    for main in (True, False):
        with pytest.raises(UserError, match="no state"):
            host(main, mistake if main else lambda: 4)


def test_gaps_between_tensors_go_back_to_the_kernel(rt, monkeypatch):
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    kept = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
    del kept[::2]
    monkeypatch.setattr(runtime, "TRIM", -1.0)
    before = resident()
    rt.sync()
    assert before - resident() > 80e6


def test_the_matrix_dtype_is_bf16_where_the_cpu_has_it(monkeypatch):
    for able, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda able=able: able)
        assert runtime.Runtime("cpu").dtype == dtype
    rt = runtime.Runtime("cpu", dtype="bfloat16")
    with rt.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert runtime.Runtime("cpu", dtype="float32").autocast().__class__ is contextlib.nullcontext


def test_one_process_wraps_nothing(rt):
    model = tiny.model()
    assert rt.wrap(model) is model and rt.world == rt.shards == rt.weight_shards == 1 and rt.is_main
    assert rt.all_sum(3.5) == 3.5 and rt.compiles() == {} and not rt.should_stop()
    x = torch.randn(3, requires_grad=True)
    full = rt.full({"x": x})
    assert torch.equal(full["x"], x.detach()) and not full["x"].requires_grad


def test_several_processes_must_say_how(rt):
    rt.world, rt.parallel = 2, "none"
    with pytest.raises(UserError, match="2 processes need parallel=ddp or parallel=fsdp"):
        rt.place(tiny.model())


def test_offload_needs_shards(rt):
    rt.offload = True
    with pytest.raises(UserError, match="offload=true keeps in CPU memory what fsdp"):
        rt.wrap(tiny.model())


def test_over_how_many_devices_weights_are_cut(rt):
    rt.world = rt.shards = 16
    rt.local_world = 8
    found = {}
    for rt.parallel in ("none", "ddp", "fsdp", "zero2", "hsdp"):
        found[rt.parallel] = rt.weight_shards
    assert found == dict(none=1, ddp=1, fsdp=16, zero2=16, hsdp=8)


def test_what_xla_cuts(rt):
    rt.shards, rt.parallel = 4, "fsdp"
    spec = lambda *shape, name="norm.weight": rt._shard_spec(name, torch.empty(*shape))  # noqa: E731
    assert spec(8, 16) == (None, "data") and spec(16, 8) == ("data", None)
    assert spec(8, 18) == ("data", None)  # the larger one does not divide
    assert spec(6, 10) == (None, None) and spec(16) == (None,)
    rt.shards = rt.tensor = 2
    layer = "model.layers.0.self_attn."
    assert spec(8, 16, name=layer + "q_proj.weight") == ("tensor", "data")
    assert spec(8, 16, name="lm_head.weight") == (None, "data")
    assert spec(16, 8, name=layer + "o_proj.weight") == ("data", "tensor") and spec(
        8, name=layer + "q_proj.bias"
    ) == ("tensor",)
    assert spec(8, 4, name=layer + "q_proj.lora_B.default") == ("tensor", "data")
    assert spec(3, 8, name=layer + "q_proj.lora_A.default") == (None, "data")
    assert spec(3, 8, name=layer + "o_proj.lora_A.default") == (None, "tensor")


def test_what_a_tensor_group_does_not_share(rt, monkeypatch):
    rt.tensor = 3
    with pytest.raises(
        UserError, match="tensor=3 must divide the model's 4 heads, 2 key/value heads and 48 units"
    ):
        rt.place(tiny.model())
    with pytest.raises(
        UserError, match="tensor=2 must divide the number of processes of a node, 1"
    ):
        runtime.Runtime("cpu", tensor=2)
    with pytest.raises(UserError, match="tensor=2 must be 1 or more, and 1 with offload=true"):
        runtime.Runtime("cpu", "fsdp", tensor=2, offload=True)


def test_random_states_come_back(rt):
    state, first = rt.rng_state(), torch.rand(4)
    rt.set_rng_state(
        state | dict(cuda=torch.zeros(1, 16, dtype=torch.uint8))
    )  # saved on a GPU, continued here
    assert torch.equal(torch.rand(4), first)
    rt.seed(7)
    second = torch.rand(4)
    rt.seed(7)
    assert torch.equal(torch.rand(4), second) and not torch.equal(first, second)


def test_recomputation_gives_the_same_gradients(rt):
    grads = []
    for grad_checkpoint in (False, True):
        model = tiny.model()
        net = rt.wrap(model, grad_checkpoint=grad_checkpoint)
        net(dict(tokens=torch.arange(12).view(2, 6))).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


SCRIPT = """
import os, signal
from nano import runtime
rt = runtime.Runtime("cpu")
rt.catch_signals()
os.kill(os.getpid(), signal.{0})
assert rt.should_stop()
print("asked", flush=True)
os.kill(os.getpid(), signal.{0})
print("never reached")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_second_signal_ends_the_process(name):
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(name)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{name}: finishing this step, then saving (again: stop at once)" in done.stdout
    assert "asked" in done.stdout and "never reached" not in done.stdout
    assert done.returncode == -getattr(signal, name) or "KeyboardInterrupt" in done.stderr


def test_importing_has_no_side_effect():
    code = (
        "import sys, json, torch; from nano import runtime; "
        "print(json.dumps([torch.distributed.is_initialized(), 'torch_xla' in sys.modules]))"
    )
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    ).stdout
    assert json.loads(out) == [False, False]


def test_the_clock_adds_up(rt):
    times = iter([0.0, 2.0, 5.0, 6.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
        clock = runtime.Clock(rt)
        with clock("a"):
            pass
        with clock("a"):
            pass
    assert clock.seconds == {"a": 3.0}
