"""The CUDA paths against the CPU's: stages, packed rows in flex_attention, CUDA graphs.

    python -m pytest -q tests/test_cuda.py        # skipped without a GPU

All is in fp32, where torch's matrix products differ in the order of sums alone, unless TF32 is
allowed.
"""

import numpy as np
import pytest
import tiny
import torch
from stages import STAGES, alone, assert_same_curve, assert_same_weights, job
from test_generate import FAMILIES, ragged
from test_generate import tiny as small

import sft
from nano import losses, runtime
from nano.generate import generate

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

DEVICE = "cuda"


@pytest.fixture(autouse=True, scope="module")
def wide_heads():
    """flex_attention takes no head smaller than 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SIZES, "head_dim", 16)
        yield


@pytest.fixture(scope="module")
def folder(wide_heads, stages_folder):
    return stages_folder


def moved(model):
    """The model with its weights on the device."""
    return model.to(DEVICE)


# ---- stages


@pytest.mark.parametrize("name", STAGES)
def test_stages_do_what_they_do_on_a_cpu(folder, name):
    out = folder / "cuda" / name
    alone([job(folder, name, out, f"device={DEVICE}")])
    assert_same_curve(out, folder / "one" / name, tolerance=1e-4)
    assert_same_weights(out / "last", folder / "one" / name / "last")


@pytest.mark.parametrize("name", ["pretrain", "sft", "sft_lora", "dpo", "ppo"])
def test_compiled_layers_do_the_same(folder, name):
    torch.compiler.reset()
    out = folder / "compiled" / name
    alone([job(folder, name, out, f"device={DEVICE}", "compile=true")])
    assert_same_curve(
        out, folder / "one" / name, tolerance=1e-4, counts=False
    )  # DPO's first margin is 0, but for rounding


@pytest.mark.parametrize("name", STAGES)
def test_bf16_is_near(folder, name):
    """As exact as bf16 is; PPO itself checks that policy and reference agree at the start."""
    out = folder / "bf16" / name
    alone([job(folder, name, out, f"device={DEVICE}", "dtype=bfloat16")])
    logs = [tiny.records(path, "train") for path in (out, folder / "one" / name)]
    if STAGES[name][0] == "ppo":  # of the first step alone, for then samples may differ
        a, b = (log[0]["reward"] for log in logs)
        tolerance = 0.2
    else:
        a, b = ([r["loss"] for r in log[:2]] for log in logs)
        tolerance = 0.02
    np.testing.assert_allclose(a, b, rtol=0.02, atol=tolerance)


@pytest.mark.parametrize("name", ["sft", "sft_lora", "ppo"])
def test_a_resume_is_exact(folder, tmp_path, name):
    more = [f"device={DEVICE}", *(["lora_dropout=0.1"] if name == "sft_lora" else [])]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    alone(
        [
            job(folder, name, whole, *more),
            job(folder, name, cut, *more, "steps=2"),
            job(folder, name, cut, *more),
        ]
    )
    kind = "model" if (whole / "last" / "config.json").exists() else "adapter_model"
    assert tiny.same_tensors(whole / "last", cut / "last", kind)


# ---- attention, loss


EXTRAS = [dict(), dict(positions="alibi"), dict(attn_cap=0.5)]


@pytest.mark.parametrize("head_dim", [8, 16])
@pytest.mark.parametrize("windows", [(), (7, 0)])
@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_packed_rows_equal_rows_alone(extras, windows, head_dim):
    model = moved(tiny.model(windows=windows, head_dim=head_dim, **extras))
    rows = [np.array(ids) for ids, _ in tiny.rows(8, low=20, high=60)]
    lengths = [len(r) for r in rows]
    docs = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None].to(DEVICE)
    packed = model.logits(
        model.hidden(torch.from_numpy(np.concatenate(rows))[None].to(DEVICE), docs=docs)
    )[0]
    for row, logits in zip(rows, packed.split(lengths), strict=True):
        alone = model.logits(model.hidden(torch.from_numpy(row)[None].to(DEVICE)))[0]
        assert (logits - alone).abs().max() < 1e-5


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_gradients_of_packed_rows(extras):
    """Through flex_attention's backward: beside the CPU's, document by document."""
    gradients = []
    for device in ("cpu", DEVICE):
        model = tiny.model(**extras).to(device)
        packs = [
            [(np.array(ids), np.array(mask)) for ids, mask in tiny.rows(4, seed)] for seed in (0, 1)
        ]
        batch = tiny.batch(packs, 200)
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        sft.loss_sum(model, model(batch), batch).backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert (gradients[1][name] - grad).abs().max() <= 1e-5 * max(1, grad.abs().max()), name


def test_losses():
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 64), torch.randn(1000, 64)
    targets, weights = torch.randint(0, 1000, (300,)), torch.rand(300)
    results = []
    for device in ("cpu", DEVICE):
        h, w = (t.clone().to(device).requires_grad_() for t in (hidden, head))
        loss = losses.cross_entropy(h, w, targets.to(device), weights.to(device))
        logprobs, entropy = losses.token_logprobs(h, w, targets.to(device), 0.7, entropy=True)
        (loss + (logprobs * entropy).sum()).backward()
        results.append([t.detach().cpu() for t in (loss, logprobs, entropy, h.grad, w.grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# ---- generation


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_equal_the_cpus(name):
    """With refills, a batch that shrinks, and a cache that grows past a recorded graph."""
    std = 0.1 if name == "packed" else 0.3
    model, prompts = small(std=std, max_positions=512, **FAMILIES[name]), ragged(9)
    lengths = [20, 330, 3, 70, 70, 140, 8, 1, 300]
    expected = generate(model, prompts, lengths, temperature=0.0, batch_size=4)
    samples = generate(moved(model), prompts, lengths, temperature=0.0, batch_size=4)
    assert samples.tokens == expected.tokens
    for a, b in zip(samples.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("settings", [dict(), dict(top_k=5), dict(top_p=0.8, temperature=1.3)])
def test_samples_equal_the_cpus(settings):
    """The same random numbers choose them. Between two tokens the last digit may decide."""
    model, prompts = small(), ragged(6)
    expected = generate(
        model, prompts, 60, batch_size=5, group=3, seed=(3, 4), stop_ids=(7,), **settings
    )
    samples = generate(
        moved(model), prompts, 60, batch_size=5, group=3, seed=(3, 4), stop_ids=(7,), **settings
    )
    same = sum(a == b for a, b in zip(samples.tokens, expected.tokens, strict=True))
    assert same >= len(expected.tokens) - 1
    assert len(set(map(tuple, samples.tokens))) > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_do_what_steps_do(dtype):
    model, prompts = moved(small()).to(dtype), ragged(9)
    samples = [
        generate(model, prompts, 150, batch_size=4, seed=1, stop_ids=(5,), plan=dict(graphs=graphs))
        for graphs in (True, False)
    ]
    assert samples[0].tokens == samples[1].tokens and samples[0].logprobs == samples[1].logprobs


def test_again_and_again_without_growing():
    """What the graphs of one call took is free for the next."""
    model, prompts, used = moved(small()), ragged(8), []
    for _ in range(6):
        generate(model, prompts, 130, batch_size=8)
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[1]


# ---- device


def test_runtime():
    rt = runtime.Runtime("auto", "ddp", "auto")
    assert rt.device.type == "cuda" and "NVIDIA" in rt.name
    batch = rt.put(dict(tokens=torch.arange(6).view(2, 3), index=torch.arange(2)))
    assert all(t.is_cuda for t in batch.values()) and rt.to_cpu(batch["tokens"]).tolist() == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    state, first = rt.rng_state(), torch.rand(3, device=rt.device)
    rt.set_rng_state(state)
    assert torch.equal(torch.rand(3, device=rt.device), first)


def test_one_process_of_torchrun(folder, tmp_path):
    """nccl, DDP and FSDP's process group; a second rank needs a second GPU."""
    jobs = [
        job(folder, "sft", tmp_path / mode, f"device={DEVICE}", f"parallel={mode}")
        for mode in ("ddp", "fsdp")
    ]
    status, output = tiny.processes(tmp_path, jobs, world=1)
    assert status == 0, output[-3000:]
    for mode in ("ddp", "fsdp"):
        assert_same_curve(tmp_path / mode, folder / "one" / "sft", tolerance=1e-4)
