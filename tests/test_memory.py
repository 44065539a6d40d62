"""bench/memory.py against numbers worked by hand, and against estimate.py."""

import json
import os
import subprocess
import sys
import types

import pytest
import tiny
import torch
from conftest import ROOT

import lora
from bench import memory as bench
from model import ModelConfig, Transformer
from nano import estimate, weights
from nano.config import UserError


def plan(**settings):
    return bench.plan(bench.Config(**settings))


def test_llama_8b_on_eight_h100_by_hand():
    p = plan(size="8b", device="H100", devices=8, batch_size=16, micro_batch=1, max_length=4096)
    P, embedding = 8_030_261_248, 128_256 * 4096  # P: what the model card says
    assert p["parameters"] == p["trained"] == P
    assert (
        p["memory"]["weights"] == p["memory"]["gradients"] == 4 * P / 8
        and p["memory"]["optimizer"] == 8 * P / 8
    )
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    assert p["memory"]["gathered"] == 2 * (2 * embedding + 4096 + 2 * layer) + 4 * layer
    matrices = P - embedding - (2 * 32 + 1) * 4096
    token = (
        6 * matrices + 6 * 32 * 4096 * 4096
    )  # forward and backward; causal attention looks at half of the 4,096
    assert p["compute"] == pytest.approx(
        16 * 4096 * token * 4 / 3 / (8 * 990e12 * 0.4)
    )  # 4/3: the forward is done twice
    assert p["useful"] == pytest.approx(16 * 4096 * token / (8 * 990e12))
    # two micro-batches: weights in bf16 gathered for forward and backward, gradients in fp32
    # reduced
    assert p["communicate"] == pytest.approx(2 * 7 / 8 * (2 * 2 * P + 4 * P) / (450e9 * 0.7))
    assert p["generate"] == 0 and p["room"] == 80e9


def test_what_parallel_changes():
    common = dict(size="8b", device="H100", devices=16, batch_size=32, micro_batch=1)
    P, near, far = 8_030_261_248, 450e9 * 0.7, 50e9 * 0.7
    ddp, fsdp, zero2, hsdp = (
        plan(**common, parallel=mode) for mode in ("ddp", "fsdp", "zero2", "hsdp")
    )
    ring = 8 * far  # the adapters of a node together
    assert ddp["communicate"] == pytest.approx(
        2 * 15 / 16 * 4 * P / ring
    )  # once a step, however many micro-batches
    assert fsdp["communicate"] == pytest.approx(2 * 15 / 16 * 8 * P / ring)
    assert zero2["communicate"] == pytest.approx(2 * 15 / 16 * 6 * P / ring)
    assert hsdp["communicate"] == pytest.approx(
        2 * (7 / 8 * 8 * P / near + 2 * 1 / 2 * 4 * P / 8 / far)
    )
    small = plan(**common, parallel="ddp", reduce_dtype="bfloat16")
    assert (
        small["communicate"] == pytest.approx(ddp["communicate"] / 2)
        and small["memory"] == ddp["memory"]
    )
    weights = [p["memory"]["weights"] / (4 * P) for p in (ddp, fsdp, zero2, hsdp)]
    assert weights == [1, 1 / 16, 1 / 16, 1 / 8]
    assert (
        ddp["memory"]["gathered"] == 0
        and zero2["memory"]["gathered"] > 2 * P > fsdp["memory"]["gathered"]
    )
    assert len({p["compute"] for p in (ddp, fsdp, zero2, hsdp)}) == 1


def test_memory_is_that_of_the_stages(tmp_path):
    tiny.model_dir(tmp_path)
    for head, stage in (("lm", "sft"), ("score", "reward")):
        model = tiny.model(head=head).to("meta")  # plan's devices are no CPUs
        p = plan(
            model=str(tmp_path),
            stage=stage,
            devices=4,
            batch_size=8,
            micro_batch=2,
            max_length=64,
            grad_checkpoint=False,
        )
        assert p["memory"] == estimate.memory(model, 2 * 64, 4, torch.bfloat16, False)


def test_memory_is_near_what_an_h100_took():
    """41.3 and 28.2 GB (bench/README.md). With one micro-batch a step, gradients come as
    activations go."""
    with torch.device("meta"):
        model = Transformer(
            ModelConfig(
                vocab_size=49152,
                dim=2048,
                n_layers=16,
                n_heads=32,
                n_kv_heads=8,
                head_dim=64,
                ffn_dim=8192,
                tie_embeddings=True,
            )
        )
        full = estimate.memory(model, 16 * 1024)
        lora.apply(model.to(torch.bfloat16), 16, 32.0)
    adapters = estimate.memory(model, 16 * 1024)
    assert sum(full.values()) - full["gradients"] == pytest.approx(41.3e9, rel=0.02)
    assert sum(adapters.values()) == pytest.approx(28.2e9, rel=0.02)


def test_ppo_by_hand():
    common = dict(
        size="8b", device="H200", devices=8, batch_size=64, max_length=1024, grad_checkpoint=False
    )
    rl = dict(stage="ppo", max_new_tokens=256, rollout_batch=4)
    p, sft, P = plan(**common, **rl), plan(**common), 8_030_261_248
    assert p["compute"] == pytest.approx(
        sft["compute"] * (4 / 3 + 2 * 4)
    )  # four forwards, four passes of two models
    assert p["memory"]["critic"] == 16 * P / 8 and p["memory"]["reference, reward"] == 2 * 2 * P / 8
    cache = (
        4 * 1024 * 32 * 2 * 8 * 128 * 2
    )  # rows, slots, layers, keys and values, heads, numbers, bytes
    assert p["generate"] == pytest.approx(
        2 * 256 * (2 * P + cache / 2) / (4800e9 * 0.6)
    )  # eight episodes, four at a time
    adapters = plan(**common, **rl, lora_rank=8)
    assert adapters["memory"]["reference, reward"] == 0 and adapters["memory"]["critic"] < 1e9


def test_qlora_by_hand():
    common = dict(size="8b", device="RTX 4090", devices=1, parallel="ddp", lora_rank=16)
    p, plain = plan(**common, quant="nf4"), plan(**common)
    assert p["parameters"] == plain["parameters"] and p["trained"] == plain["trained"]
    matrices = 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    # four bits a weight, eight a block of 64, fp32 for 256 blocks
    stored = matrices * (4 + 8 / 64 + 32 / 64 / 256) / 8
    saved = plain["memory"]["weights"] - p["memory"]["weights"]
    assert saved == pytest.approx(2 * matrices - stored, rel=1e-5)
    assert p["memory"]["dense"] == 4096 * 14336 * (4 + 2)
    passes = 64 * 3  # micro-batches; forward, recomputation and backward
    dense = passes * matrices * 2 * 2 / 1008e9
    assert p["compute"] == pytest.approx(plain["compute"] + dense)
    ppo = dict(common, stage="ppo", max_new_tokens=256, batch_size=32)
    ppo = [plan(**ppo, **more) for more in (dict(), dict(quant="nf4"))]
    saved = ppo[0]["memory"]["weights"] - ppo[1]["memory"]["weights"]
    assert saved == pytest.approx(2 * matrices - stored, rel=1e-5)


def test_the_table(capsys):
    bench.main(bench.Config(table=("8b",), device="RTX 4090", max_length=2048))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    used = {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in rows}
    assert used.keys() == bench.METHODS.keys()
    assert used["full"].endswith("*") and used["LoRA"].endswith("*")
    assert float(used["QLoRA, recomputation"]) < 12


def test_tensor_by_hand():
    common = dict(
        size="8b",
        device="H100",
        devices=16,
        batch_size=16,
        micro_batch=1,
        max_length=4096,
        tensor=4,
    )
    P, V, C, L, near, far = 8_030_261_248, 128_256, 4096, 32, 450e9 * 0.7, 50e9 * 0.7
    norms = (2 * L + 1) * C  # each device of a group has them whole
    fsdp, ddp, hsdp = (plan(**common, parallel=mode) for mode in ("fsdp", "ddp", "hsdp"))
    for p, rest in ((fsdp, 4), (ddp, 1), (hsdp, 2)):  # parts of a quarter
        assert (
            p["memory"]["weights"]
            == p["memory"]["gradients"]
            == 4 * ((P - norms) / 4 + norms) / rest
        )
        assert p["memory"]["optimizer"] == 2 * p["memory"]["weights"]
    alone = plan(**common | dict(tensor=1))
    cut = (
        4096 + 2 * 1024 + 4096 + 4 * 14336
    )  # q, k, v, what attention gives, SwiGLU: of a block in bf16
    assert alone["memory"]["activations"] - fsdp["memory"]["activations"] == 4096 * 2 * cut * 3 / 4
    assert (
        fsdp["memory"]["head"] - alone["memory"]["head"] == 2 * V * C
    )  # gathered whole for the loss
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert fsdp["memory"]["gathered"] == 2 * (2 * V * C / 4 + C + 2 * (layer / 4 + 2 * C)) + 4 * (
        layer / 4 + 2 * C
    )
    assert ddp["memory"]["gathered"] == 0
    # four micro-batches of a row: (row, C) summed twice a layer and once for embeddings, five times
    # backward, once in recomputation
    rounds, row = 4, 2 * 3 / 4 * 2 * 4096 * C
    shared = rounds * (row * (L * (2 + 5 + 1) + 1) + 3 / 4 * 2 * V * C) / near
    assert fsdp["communicate"] == pytest.approx(shared + rounds * 3 / 4 * 8 * P / 4 / (2 * far))
    assert ddp["communicate"] == pytest.approx(
        shared + rounds * 2 * 3 / 4 * 4 * P / 4 / (2 * far)
    )  # in every micro-batch
    assert hsdp["communicate"] == pytest.approx(
        shared + rounds * (1 / 2 * 8 * P / 4 / near + 2 * 1 / 2 * 4 * P / 8 / far)
    )
    head = 16 * 4096 * 6 * V * C / (16 * 990e12 * 0.4)
    assert (
        fsdp["compute"] == pytest.approx(alone["compute"] + 3 * head)
        and fsdp["useful"] == alone["useful"]
    )


def test_what_recomputation_keeps_between_layers_is_in_the_matrix_dtype():
    with torch.device("meta"):
        models = [Transformer(ModelConfig(n_layers=n)) for n in (4, 8)]
    few, many = (
        estimate.memory(model, 64, grad_checkpoint=True)["activations"] for model in models
    )
    assert many - few == 4 * 64 * models[0].cfg.dim * 2


def test_a_vocabulary_that_tensor_does_not_divide_stays_whole():
    with torch.device("meta"):
        models = [Transformer(ModelConfig(vocab_size=size)) for size in (32000, 32001)]
    even, odd = (estimate.memory(model, 64, 2, tensor=2)["weights"] for model in models)
    assert odd - even == 2 * 4 * 512 * (32001 - 32000 / 2)


def test_offload_by_hand():
    common = dict(
        size="8b", device="RTX 4090", devices=16, batch_size=32, micro_batch=1, host_bandwidth=100.0
    )
    P, bus = 8_030_261_248, 32e9 * 0.7
    p, kept = plan(**common, offload=True), plan(**common)
    waits = {"weights", "gradients", "optimizer"}
    assert p["memory"] == {part: size for part, size in kept["memory"].items() if part not in waits}
    assert p["host"] == 16 * P / 16 and kept["host"] == kept["transfer"] == kept["update"] == 0
    assert p["transfer"] == pytest.approx(
        2 * (2 * 4 + 4) * P / 16 / bus
    )  # two micro-batches; fp32 there twice, the gradient back
    assert p["update"] == pytest.approx(
        40 * P / 16 * 8 / 100e9
    )  # the eight devices of a node share its memory
    assert (p["compute"], p["communicate"]) == (kept["compute"], kept["communicate"])
    assert plan(**common, offload=True, parallel="zero2")["transfer"] == pytest.approx(
        2 * (4 + 4) * P / 16 / bus
    )
    adapters = plan(**common, offload=True, lora_rank=8)
    assert adapters["host"] == pytest.approx((2 * P + 16 * adapters["trained"]) / 16, rel=0.01)
    assert adapters["update"] < 0.01 * p["update"]


def test_ppo_parks_what_is_not_at_work():
    common = dict(
        size="8b", device="H200", batch_size=64, max_length=1024, stage="ppo", parallel="ddp"
    )
    p, kept, P = plan(**common, offload=True), plan(**common), 8_030_261_248
    assert kept["memory"].keys() - p["memory"].keys() == {"reference, reward", "rollout"}
    assert p["host"] == (12 + 16 + 4) * P and p["update"] == 0
    assert p["transfer"] == pytest.approx(2 * (5 * 4 + 2 * 8 + 2 * 2) * P / (64e9 * 0.7))
    sharded = plan(**common | dict(parallel="fsdp"), offload=True)
    assert sharded["memory"].keys() == {"activations", "head", "gathered", "casts", "rollout"}


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(device="abacus"), "device=abacus: use B200, "),
        (dict(size="9b"), "size=9b: use toy, "),
        (dict(batch_size=7), "batch_size=7 is no multiple of micro_batch=1 x 8 devices"),
        (dict(devices=0), "devices=0: must be 1 or more"),
        (dict(devices=12), "devices=12 is no multiple of node=8"),
        (dict(tensor=0), "tensor=0: must be 1 or more"),
        (dict(utilisation=0.0), "utilisation=0.0: must be above 0"),
        (dict(link_utilisation=0.0), "link_utilisation=0.0: must be above 0"),
        (dict(host_bandwidth=0.0), "host_bandwidth=0.0: must be above 0"),
        (dict(tensor=3), "tensor=3 must divide the number of devices of a node, 8"),
        (dict(tensor=8, node=4), "tensor=8 must divide the number of devices of a node, 4"),
        (
            dict(tensor=16, node=16, devices=16),
            "tensor=16 must divide the model's 32 heads, 8 key/value heads and 14336 units of",
        ),
        (
            dict(tensor=2, batch_size=6),
            "batch_size=6 is no multiple of micro_batch=1 x 8 devices / tensor=2",
        ),
        (dict(tensor=2, offload=True), "tensor=2 must be 1 with offload=true"),
        (
            dict(offload=True, parallel="ddp"),
            "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts",
        ),
        (
            dict(offload=True, devices=1),
            "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts",
        ),
        (
            dict(offload=True, parallel="ddp", stage="ppo", lora_rank=8),
            "offload=true keeps in CPU memory what fsdp",
        ),
        (
            dict(offload=True, parallel="hsdp", node=1),
            "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts",
        ),
        (dict(offload=True, device="TPU v5p"), "device=xla, for TPUs, has no offload="),
        (dict(reduce_dtype="bfloat16", device="TPU v5p"), "and no reduce_dtype="),
        (dict(parallel="zero2", device="TPU v5p"), "parallel=zero2: on TPUs use ddp or fsdp"),
        (dict(stage="ppo", max_new_tokens=4096), "leaves no room for a prompt"),
        (dict(out="here"), "out=here has no effect"),
    ],
)
def test_mistakes(settings, text):
    with pytest.raises(UserError, match=text):
        plan(**settings)


PEAK = """
import json, sys
import torch
import torch.distributed as dist
import sft, tiny
from nano import config, estimate, losses, optim, runtime

begin = dist.init_process_group
dist.init_process_group = lambda *args: dist.is_initialized() or begin(*args)
losses.CHUNK_LOGITS = 2**16
found = []
for parallel, tensor in ("fsdp", 1), ("none", 2):
    rt = runtime.Runtime("cpu", parallel, "bfloat16", tensor=tensor)
    model = tiny.model(n_layers=3, dim=128, n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=352, vocab_size=2048)
    net = rt.wrap(model)
    optimizer = optim.build(model)
    micro = tiny.batch([tiny.rows(4, low=25, high=32) for _ in range(8)], 128)

    def step():
        for _ in range(2):
            with rt.autocast():
                loss = sft.loss_sum(net, net(micro), micro)
            rt.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    held = top = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    with rt.evaluating(net):
        pass
    weights = 3 * sum(p.to_local().nbytes for p in model.parameters())  # and two moments
    parts = estimate.memory(model, 8 * 128, rt.weight_shards, rt.dtype, tensor=tensor, document=28)
    found.append([sum(parts.values()), weights + top, parts["weights"] + parts["optimizer"], weights])
if rt.is_main:
    with open(sys.argv[1], "w") as f:
        json.dump(found, f)
config.leave(0)
"""


def test_memory_is_near_the_peak_of_two_processes(tmp_path):
    """fsdp, and tensor=2: as in test_sft.py, what torch holds at most from the second step on."""
    (tmp_path / "peak.py").write_text(PEAK)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "peak.py",
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = subprocess.run(
        [*launch, tmp_path / "found"], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for estimated, measured, whole, held in json.loads((tmp_path / "found").read_text()):
        assert 0.85 < estimated / measured < 1.1 and whole == pytest.approx(held, rel=0.001)


@pytest.mark.skipif(not os.environ.get("NANO_SLOW"), reason="NANO_SLOW=1 runs each method")
@pytest.mark.parametrize("name", bench.METHODS)
def test_a_method_is_run_here(tmp_path, name):
    sizes = dict(n_layers=6, dim=256, ffn_dim=768, head_dim=64, max_positions=512)
    weights.save_model(tiny.model(**sizes).bfloat16(), tmp_path / "model")
    tiny.with_tokenizer(tmp_path / "model")
    keys = dict(here="cpu", model=str(tmp_path / "model"), out=str(tmp_path / "out"))
    keys |= dict(max_length=256, max_new_tokens=32, dtype="float32")
    cfg = bench.Config(**keys)
    bench.prepare(cfg)
    predicted, measured, speed = bench.compare(cfg, bench.METHODS[name])
    assert 0.9 < predicted / measured < 1.1 and speed > 0


def test_the_text(capsys):
    bench.main(bench.Config(size="70b", devices=8))
    assert "DOES NOT FIT" in capsys.readouterr().out
    bench.main(bench.Config(size="70b", devices=64, device="TPU v5p"))
    assert "of 95: fits" in capsys.readouterr().out
    bench.main(bench.Config(device="RTX 4090", offload=True))
    out = capsys.readouterr().out
    assert (
        "in CPU memory            16.06 GB, 128 of a node" in out
        and "transfers 4.30 s, AdamW 1.61 s" in out
    )
    bench.main(bench.Config(tensor=2))
    assert "8 x H100, parallel=fsdp tensor=2" in capsys.readouterr().out


def describe(model, tensor=1, offload=False):
    """What a stage says of `model` at its start: 4096 tokens a forward, 2 devices."""
    rt = types.SimpleNamespace(weight_shards=2, dtype=torch.bfloat16, tensor=tensor)
    cfg = types.SimpleNamespace(
        micro_batch=4, max_length=1024, grad_checkpoint=False, parallel="fsdp", offload=offload
    )
    return estimate.describe(model, rt, cfg)


def test_what_is_offloaded_takes_no_memory_of_the_device():
    with torch.device("meta"):
        model = Transformer(ModelConfig(dim=2048))
    said = describe(model, offload=True)
    parts = estimate.memory(model, 4096, 2)
    host = sum(parts.pop(name) for name in ("weights", "gradients", "optimizer")) / 1e9
    assert (
        f"device {sum(parts.values()) / 1e9:.1f} GB" in said
        and f"; {host:.1f} GB for each in CPU memory" in said
        and host > 1
    )


def test_what_is_said_at_the_start_counts_tensor():
    with torch.device("meta"):
        model = Transformer(ModelConfig(dim=2048))
    parts = estimate.memory(model, 4096, 2, tensor=2)
    said = describe(model, tensor=2)
    whole = estimate.memory(model, 4096)["activations"]
    assert f"activations {parts['activations'] / 1e9:.2f}" in said and parts["activations"] < whole
