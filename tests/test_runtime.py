"""The Runtime on one process: what it refuses, which device and dtype it takes, how a model is
sharded, signals, random states."""

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

import lora
from nano import generate, runtime, tensor
from nano.config import UserError
from nano.xla import XLA, partition_spec


@pytest.fixture
def rt():
    denormals = torch.tensor([1e-40]) * 1 == 0
    yield runtime.Runtime("cpu", dtype="float32")
    torch.set_flush_denormal(bool(denormals))


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(device="gpu"), "device=gpu: use auto, cpu, cuda, mps or xla"),
        (dict(device="xla", offload=True), "device=xla has no offload="),
        (
            dict(device="xla", reduce_dtype="bfloat16"),
            "no offload= and no reduce_dtype=: its gradients are summed in float32",
        ),
    ],
)
def test_wrong_keys(keys, said):
    with pytest.raises(UserError, match=said):
        runtime.start(types.SimpleNamespace(**keys))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_devices_that_are_not_there():
    assert runtime.Runtime("auto").device.type == "cpu"
    with pytest.raises(UserError, match="device=cuda: this torch .* finds no such device"):
        runtime.Runtime("cuda")


def test_only_devices_that_are_served_are_taken(monkeypatch):
    mps = lambda check_available=False: torch.device("mps")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.Runtime("auto").device.type == "cpu"
    with pytest.raises(UserError, match="device=cuda: this torch .* finds no such device"):
        runtime.Runtime("cuda")


ENVIRONMENT = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
ENVIRONMENT |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")


def test_processes_that_torchrun_did_not_start(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError,
        match="LOCAL_RANK and LOCAL_WORLD_SIZE and MASTER_ADDR and MASTER_PORT is empty or not there",
    ):
        runtime.Runtime("cpu")
    for name, value in dict(ENVIRONMENT, RANK="two").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="must be numbers .*'two'.*: start it with torchrun"):
        runtime.Runtime("cpu")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        with pytest.raises(UserError, match=f"but .*{name} is empty .* or unset RANK"):
            runtime.Runtime("cpu")


def test_more_processes_than_devices(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        UserError, match="2 processes on this node share 1 devices: lower --nproc_per_node"
    ):
        runtime.Runtime("cuda")


@pytest.mark.skipif("torch_xla" in sys.modules, reason="torch_xla is there")
def test_xla_without_torch_xla():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_xla", None)  # an import of it then fails
        with pytest.raises(UserError, match="device=xla needs torch_xla"):
            runtime.start(types.SimpleNamespace(device="xla"))


def test_hosts_of_a_slice_share_results_and_mistakes(monkeypatch):
    rt = object.__new__(XLA)  # without torch_xla
    sent = []

    def host(main, f):
        rt.processes, rt.is_main = 2, main
        monkeypatch.setattr(
            torch.distributed,
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and /proc")
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
    gathered = rt.gather({"x": x})
    assert torch.equal(gathered["x"], x.detach()) and not gathered["x"].requires_grad


def test_several_processes_must_say_how(rt):
    rt.world, rt.parallel = 2, "none"
    with pytest.raises(UserError, match="2 processes need parallel=ddp or parallel=fsdp"):
        rt.distribute(tiny.model())


def test_offload_needs_shards(rt):
    rt.offload = True
    with pytest.raises(UserError, match="offload=true keeps in CPU memory what fsdp"):
        rt.wrap(tiny.model())


def test_over_how_many_devices_weights_are_sharded(rt):
    rt.world = rt.shards = 16
    rt.local_world = 8
    shards = {}
    for rt.parallel in ("none", "ddp", "fsdp", "zero2", "hsdp"):
        shards[rt.parallel] = rt.weight_shards
    assert shards == dict(none=1, ddp=1, fsdp=16, zero2=16, hsdp=8)


def test_what_xla_shards():
    assert partition_spec((8, 16), None, 4) == (None, "data")
    assert partition_spec((16, 8), None, 4) == ("data", None)
    assert partition_spec((8, 18), None, 4) == ("data", None)  # the larger one does not divide
    assert partition_spec((6, 10), None, 4) == (None, None)
    assert partition_spec((16,), None, 4) == (None,)
    assert partition_spec((8, 16), 0, 2) == ("tensor", "data")
    assert partition_spec((16, 8), 1, 2) == ("data", "tensor")
    assert partition_spec((8,), 0, 2) == ("tensor",)
    assert partition_spec((8, 16), None, 1) == (None, None)  # parallel=ddp


def test_what_devices_share_of_a_layer():
    model = tiny.model(qkv_bias=True, o_bias=True, qk_norm="head", tie_embeddings=False)
    lora.apply(model, rank=3, alpha=8)
    dims = tensor.shard_dims(model, 2)
    assert dims.keys() == {name for name, _ in model.named_parameters()}
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for column in ("q_proj", "k_proj", "v_proj"):
        assert dims[f"{attention}{column}.base.weight"] == 0
        assert dims[f"{attention}{column}.base.bias"] == 0
        assert dims[f"{attention}{column}.lora_B.default"] == 0
        assert dims[f"{attention}{column}.lora_A.default"] is None
    assert dims[attention + "o_proj.base.weight"] == dims[attention + "o_proj.lora_A.default"] == 1
    assert dims[attention + "o_proj.base.bias"] is dims[attention + "o_proj.lora_B.default"] is None
    assert dims[attention + "q_norm.weight"] is dims[attention + "k_norm.weight"] is None
    assert dims[mlp + "gate_proj.base.weight"] == dims[mlp + "up_proj.base.weight"] == 0
    assert dims[mlp + "down_proj.base.weight"] == 1
    assert dims["model.embed_tokens.weight"] == dims["lm_head.weight"] == 0
    assert dims["model.norm.weight"] is None
    # what the devices cannot share equally is replicated
    assert tensor.shard_dims(tiny.model(vocab_size=265), 2)["model.embed_tokens.weight"] is None


def test_what_a_tensor_group_does_not_share(rt, monkeypatch):
    rt.tensor = 3
    with pytest.raises(
        UserError, match="tensor=3 must divide the model's 4 heads, 2 key/value heads and 48 units"
    ):
        rt.distribute(tiny.model())
    with pytest.raises(
        UserError, match="tensor=2 must divide the number of processes of a node, 1"
    ):
        runtime.Runtime("cpu", tensor=2)
    with pytest.raises(UserError, match="tensor=2 must be 1 with offload=true"):
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


def test_a_step_clips_and_drops_the_gradients(rt):
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([p], lr=100.0)
    (p * torch.tensor([6.0, 8.0])).sum().backward()
    norm = rt.step(optimizer, [p], 0.5, 5.0)
    assert norm.item() == pytest.approx(10) and p.grad is None
    torch.testing.assert_close(p.detach(), torch.tensor([1.5, 2.0]))  # less half of (3, 4)


def test_evaluating(rt):
    model = tiny.model().train()
    with rt.evaluating(model):
        assert not model.training and not model.layers[0].training
        assert not torch.is_grad_enabled()
    assert model.layers[0].training and torch.is_grad_enabled()


def test_ddp_has_the_attributes_of_its_model(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny.model()
        net = runtime.DDP(model, None, torch.float32)
        assert net.cfg is model.cfg and net.head_weight is model.head_weight
        assert len(net.layers) == len(model.layers) and not hasattr(net, "nothing")
        hidden = net(dict(tokens=torch.arange(6).view(2, 3)))
        assert torch.equal(net.logits(hidden), model.logits(hidden))
        one = {"norm": model.model["norm"].weight}
        runtime.DDP(model, one, torch.float32)
        assert all(p.requires_grad for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


SCRIPT = """
import os, signal
from nano import runtime
rt = runtime.Runtime("cpu")
runtime.catch_signals(rt)
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


def test_apple_silicon(monkeypatch):
    """Its builds of torch lack oneDNN, and its GPU runs one process without compiling."""
    with pytest.raises(UserError, match="device=mps: this torch .* finds no such device"):
        runtime.start(types.SimpleNamespace(), device="mps")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert runtime.start(types.SimpleNamespace(), device="cpu").dtype == torch.float32
    assert generate.layout_of(torch.randn(300, 300)) == "plain"
    assert generate.layout_of(torch.randn(300, 300).bfloat16()) in ("plain", "fp16")
    assert not generate.Plan.for_device(torch.device("mps"), 100).graphs
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.choose_device("mps") == "mps" and runtime.choose_device("auto") == "cpu"
    monkeypatch.setattr(runtime, "join", lambda device: (0, 2, 0, 2))
    with pytest.raises(UserError, match="single GPU, which 2 processes cannot share"):
        runtime.start(types.SimpleNamespace(), device="mps")


def test_windows_is_told(monkeypatch):
    monkeypatch.setattr(runtime, "resource", None)
    with pytest.raises(UserError, match="Windows is not supported"):
        runtime.start(types.SimpleNamespace(), device="cpu")


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
