"""bench/plan.py against numbers worked by hand, and against estimate.py."""

import importlib.util

import pytest
import tiny
import torch
from conftest import ROOT

import estimate
from config import UserError
from model import ModelConfig, Transformer

spec = importlib.util.spec_from_file_location("bench_plan", ROOT / "bench" / "plan.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def plan(**settings):
    return bench.plan(bench.Config(**settings))


def test_llama_8b_on_eight_h100_by_hand():
    p = plan(size="8b", device="H100", devices=8, batch_size=16, micro_batch=1, max_length=4096)
    P, embedding = 8_030_261_248, 128_256 * 4096  # P: what the model card says
    assert p["parameters"] == p["trained"] == P
    assert p["memory"]["weights"] == p["memory"]["gradients"] == 4 * P / 8 and p["memory"]["optimizer"] == 8 * P / 8
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    assert p["memory"]["gathered"] == 2 * (2 * embedding + 4096 + 2 * layer) + 4 * layer
    matrices = P - embedding - (2 * 32 + 1) * 4096
    token = 6 * matrices + 6 * 32 * 4096 * 4096  # forward and backward; causal attention looks at half of the 4,096
    assert p["compute"] == pytest.approx(16 * 4096 * token * 4 / 3 / (8 * 990e12 * 0.4))  # 4/3: the forward is done twice
    assert p["useful"] == pytest.approx(16 * 4096 * token / (8 * 990e12))
    # two micro-batches: weights in bf16 gathered for forward and backward, gradients in fp32 reduced
    assert p["communicate"] == pytest.approx(2 * 7 / 8 * (2 * 2 * P + 4 * P) / (450e9 * 0.7))
    assert p["generate"] == 0 and p["room"] == 80e9


def test_what_parallel_changes():
    common = dict(size="8b", device="H100", devices=16, batch_size=32, micro_batch=1)
    P, near, far = 8_030_261_248, 450e9 * 0.7, 50e9 * 0.7
    ddp, fsdp, zero2, hsdp = (plan(**common, parallel=mode) for mode in ("ddp", "fsdp", "zero2", "hsdp"))
    assert ddp["communicate"] == pytest.approx(2 * 15 / 16 * 4 * P / far)  # once a step, however many micro-batches
    assert fsdp["communicate"] == pytest.approx(2 * 15 / 16 * 8 * P / far)
    assert zero2["communicate"] == pytest.approx(2 * 15 / 16 * 6 * P / far)
    assert hsdp["communicate"] == pytest.approx(2 * (7 / 8 * 8 * P / near + 2 * 1 / 2 * 4 * P / 8 / far))
    weights = [p["memory"]["weights"] / (4 * P) for p in (ddp, fsdp, zero2, hsdp)]
    assert weights == [1, 1 / 16, 1 / 16, 1 / 8]
    assert ddp["memory"]["gathered"] == 0 and zero2["memory"]["gathered"] > 2 * P > fsdp["memory"]["gathered"]
    assert len({p["compute"] for p in (ddp, fsdp, zero2, hsdp)}) == 1


def test_memory_is_that_of_the_stages(tmp_path):
    tiny.model_dir(tmp_path)
    for head, stage in (("lm", "sft"), ("score", "reward")):
        model = tiny.model(head=head)
        p = plan(model=str(tmp_path), stage=stage, devices=4, batch_size=8, micro_batch=2, max_length=64, grad_checkpoint=False)
        assert p["memory"] == estimate.memory(model, 2 * 64, 4, torch.bfloat16, False)


def test_ppo_by_hand():
    common = dict(size="8b", device="H200", devices=8, batch_size=64, max_length=1024, grad_checkpoint=False)
    rl = dict(stage="ppo", max_new_tokens=256, rollout_batch=4)
    p, sft, P = plan(**common, **rl), plan(**common), 8_030_261_248
    assert p["compute"] == pytest.approx(sft["compute"] * (4 / 3 + 2 * 4))  # four forwards, four passes of two models
    assert p["memory"]["critic"] == 16 * P / 8 and p["memory"]["reference, reward"] == 2 * 2 * P / 8
    cache = 4 * 1024 * 32 * 2 * 8 * 128 * 2  # rows, slots, layers, keys and values, heads, numbers, bytes
    assert p["generate"] == pytest.approx(2 * 256 * (2 * P + cache / 2) / (4800e9 * 0.6))  # eight episodes, four at a time
    adapters = plan(**common, **rl, lora_rank=8)
    assert adapters["memory"]["reference, reward"] == 0 and adapters["memory"]["critic"] < 1e9


@pytest.mark.parametrize("settings", [dict(device="abacus"), dict(size="9b"), dict(batch_size=7)])
def test_mistakes(settings):
    with pytest.raises(UserError, match=str(*settings.values())):
        plan(**settings)


def test_the_text(capsys):
    bench.main(bench.Config(size="70b", devices=8))
    assert "DOES NOT FIT" in capsys.readouterr().out
    bench.main(bench.Config(size="70b", devices=64, device="TPU v5p"))
    assert "of 95: fits" in capsys.readouterr().out


def test_what_is_offloaded_takes_no_memory_of_the_device():
    with torch.device("meta"):
        model = Transformer(ModelConfig(dim=2048))
    said = estimate.describe(model, 4096, 2, offload=True)
    parts = estimate.memory(model, 4096, 2)
    host = sum(parts.pop(name) for name in ("weights", "gradients", "optimizer")) / 1e9
    assert f"device {sum(parts.values()) / 1e9:.1f} GB" in said and f"; {host:.1f} GB for each in CPU memory" in said and host > 1
