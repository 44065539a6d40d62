import copy
import math

import pytest
import torch
from torch import nn

from nano import optim


class Tiny(nn.Module):
    """An embedding, a block with every kind of parameter and a head, with the names of model.py."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 6, bias=True)
        self.o_proj = nn.Linear(6, 8, bias=False)
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.norm(self.o_proj(self.q_proj(self.embed_tokens(tokens)))))


def names(model, group):
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_groups():
    model = Tiny()
    decay, rest = optim.param_groups(model, 0.1)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert names(model, decay) == ["q_proj.weight", "o_proj.weight", "lm_head.weight"]
    assert names(model, rest) == ["embed_tokens.weight", "q_proj.bias", "norm.weight"]


def test_groups_of_a_tied_and_partly_frozen_model():
    model = Tiny(tied=True)
    model.q_proj.requires_grad_(False)
    model.norm.requires_grad_(False)
    decay, rest = optim.param_groups(model, 0.1)
    assert names(model, decay) == ["o_proj.weight"]
    assert names(model, rest) == ["embed_tokens.weight"]  # once, though two modules hold it
    model.embed_tokens.requires_grad_(False)
    (only,) = optim.param_groups(model, 0.1)
    assert names(model, only) == ["o_proj.weight"]


def test_adamw_is_fused_where_the_device_has_it():
    def fused(device):
        return optim.adamw(
            [{"params": [torch.zeros(2, device=device, requires_grad=True)]}], 1e-3
        ).defaults["fused"]

    assert fused("cpu") is True
    assert fused("meta") is False  # as on XLA: a device without the kernel


def test_adamw_against_the_formula():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    lr, betas, eps, decay = 0.1, (0.8, 0.9), 1e-6, 0.3
    optimizer = optim.build(model, "adamw", lr, betas, eps, decay)
    w, m, v = model.weight.detach().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in range(1, 6):
        model.weight.grad = torch.randn(2, 3).double()
        model.bias.grad = torch.zeros(2).double()
        m = betas[0] * m + (1 - betas[0]) * model.weight.grad
        v = betas[1] * v + (1 - betas[1]) * model.weight.grad**2
        w = w * (1 - lr * decay) - lr * (m / (1 - betas[0] ** t)) / (
            (v / (1 - betas[1] ** t)).sqrt() + eps
        )
        bias = model.bias.detach().clone()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), w)
        assert torch.equal(model.bias, bias)  # no gradient, no decay: stays


def test_fp32_masters_move_and_bf16_weights_do_not():
    steps, lr = 20, 1e-5
    torch.manual_seed(0)
    start = (0.02 * torch.randn(256, 256)).bfloat16().float()
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(256, 256, bias=False)
        layer.weight = nn.Parameter(start.to(dtype, copy=True))
        optimizer = optim.build(layer, "adamw", lr)
        x = torch.rand(8, 256) + 0.5  # positive inputs: each weight's gradient keeps its sign
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                layer(x).float().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[dtype] = (start - layer.weight.detach().float()).mean().item() / (lr * steps)
    assert 0.95 <= moved[torch.float32] <= 1.01
    assert 0.0 < moved[torch.bfloat16] < 0.3


# the schedule


def sequence(n, **kw):
    return [optim.lr_at(step, n, lr=1.0, **kw) for step in range(n)]


@pytest.mark.parametrize(
    "n, kw, want",
    [
        (4, dict(schedule="constant"), [1, 1, 1, 1]),
        (4, dict(schedule="constant", warmup_steps=3), [1 / 4, 2 / 4, 3 / 4, 1]),
        (5, dict(schedule="linear"), [1, 3 / 4, 2 / 4, 1 / 4, 0]),
        (5, dict(schedule="linear", min_lr=0.2), [1, 0.8, 0.6, 0.4, 0.2]),
        (5, dict(schedule="linear", warmup_steps=2), [1 / 3, 2 / 3, 1, 1 / 2, 0]),
        (5, dict(schedule="cosine"), [1, 0.5 + 2**-1.5, 0.5, 0.5 - 2**-1.5, 0]),
        (4, dict(schedule="cosine", warmup_steps=1, min_lr=0.1), [1 / 2, 1, 0.55, 0.1]),
        (10, dict(schedule="wsd", decay_ratio=0.4), [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (
            8,
            dict(schedule="wsd", decay_ratio=0.25, warmup_steps=1, min_lr=0.5),
            [0.5, 1, 1, 1, 1, 1, 0.75, 0.5],
        ),
        (4, dict(schedule="wsd", decay_ratio=1.0, warmup_steps=1), [1 / 2, 1, 1 / 2, 0]),
        (1, dict(schedule="cosine"), [1]),
        (1, dict(schedule="linear", warmup_steps=3), [1 / 4]),
        (3, dict(schedule="cosine", warmup_steps=2), [1 / 3, 2 / 3, 1]),
    ],
)
def test_lr(n, kw, want):
    assert sequence(n, **kw) == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_lr_shape(schedule, warmup_steps):
    lrs = sequence(100, schedule=schedule, warmup_steps=warmup_steps, min_lr=0.1)
    assert lrs[0] > 0 and max(lrs) == lrs[warmup_steps] == 1.0
    assert lrs[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1))
    assert lrs[: warmup_steps + 1] == sorted(lrs[: warmup_steps + 1])
    assert lrs[warmup_steps:] == sorted(lrs[warmup_steps:], reverse=True)
    assert (
        optim.lr_at(500, 100, 1.0, schedule, warmup_steps, 0.1) == lrs[-1]
    )  # past the end: as at the end


def test_unknown_names():
    with pytest.raises(ValueError, match="wsd"):
        optim.lr_at(0, 10, 1.0, "cosin")
    with pytest.raises(ValueError, match="muon"):
        optim.build(Tiny(), "adam")


# clipping


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 0.0])
def test_clip(max_norm):
    model = Tiny()
    model(torch.arange(11)[None]).square().mean().backward()
    model.norm.weight.grad = None  # a parameter that took no part
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    want = math.sqrt(sum(g.double().square().sum().item() for g in before))
    scale = min(1.0, max_norm / want) if max_norm else 1.0
    norm = optim.clip_(model.parameters(), max_norm)
    assert norm.ndim == 0 and norm.item() == pytest.approx(want, rel=1e-5)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(after, [g * scale for g in before], rtol=1e-5, atol=1e-7)
    assert 0.5 < want < 5


# muon


def train(model, optimizer, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(11, (2, 5))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_takes_the_inner_matrices_alone():
    model = Tiny()
    optimizer = optim.build(model, "muon", lr=1e-3, weight_decay=0.1)
    *_, muon = optimizer.param_groups
    assert [names(model, group) for group in optimizer.param_groups] == [
        ["lm_head.weight"],
        ["embed_tokens.weight", "q_proj.bias", "norm.weight"],
        ["q_proj.weight", "o_proj.weight"],
    ]
    before = model.q_proj.weight.detach().clone()
    optim.set_lr(optimizer, 0.1)
    train(model, optimizer, 1, seed=0)
    # The update is orthogonal, scaled by 0.2 sqrt(max(rows, columns)), so that all singular values
    # are near 0.2 * sqrt(8) * lr.
    values = torch.linalg.svdvals(before * (1 - 0.1 * 0.1) - model.q_proj.weight.detach())
    assert ((values / (0.1 * 0.2 * math.sqrt(8)) - 1).abs() < 0.4).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_continues_bit_for_bit(name):
    straight, stopped = Tiny(), Tiny()
    optimizer = optim.build(straight, name, lr=1e-2)
    train(straight, optimizer, 3, seed=1)
    train(straight, optimizer, 3, seed=2)

    optimizer = optim.build(stopped, name, lr=1e-2)
    train(stopped, optimizer, 3, seed=1)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = optim.build(stopped, name, lr=1.0)
    resumed.load_state_dict(state)
    train(stopped, resumed, 3, seed=2)
    for p, q in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(p, q)
