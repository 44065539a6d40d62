"""ALiBi and soft caps in every kernel of model.attend, against float64."""

import pytest
import torch

import model as decoder


def worst(a, b):
    return (a - b).abs().max().item()


def right_attention(q, k, v, extras):
    """softmax(cap(scale q k^T) - slope * distance) v with a causal mask, in float64."""
    H, T = q.shape[1:3]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    index = torch.arange(T)
    slopes = torch.tensor(extras.slopes or (0.0,)).double()
    bias = slopes[:, None, None] * (index - index[:, None])
    scores = extras.scale * q @ k.mT
    if extras.cap:
        scores = extras.cap * torch.tanh(scores / extras.cap)
    scores = scores + bias.masked_fill(index > index[:, None], -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("kind", ["alibi", "cap", "both"])
def test_attention_is_the_same_in_every_kernel(monkeypatch, kind, heads, dtype):
    """Documents on a CPU, a dense mask, no mask, a cache with one or many queries, and the
    score_mod of flex_attention."""
    monkeypatch.setattr(decoder, "_compiled_flex", lambda: decoder.flex_attention)
    generator = torch.Generator().manual_seed(0)
    T, D = 150, 16
    q = torch.randn(1, heads[0], T, D, generator=generator).to(dtype)
    k, v = (torch.randn(1, heads[1], T, D, generator=generator).to(dtype) for _ in range(2))
    cap = 0.0 if kind == "alibi" else 0.8
    slopes = () if kind == "cap" else decoder.alibi_slopes(heads[0])
    extras = decoder.Extras(0.3, cap, slopes)
    docs = torch.zeros(1, T, dtype=torch.int64)
    docs[:, 70:] = 1
    parts = [(slice(0, 70)), (slice(70, T))]
    whole = right_attention(q, k, v, extras)
    packed = [right_attention(*(t[:, :, p] for t in (q, k, v)), extras) for p in parts]
    packed = torch.cat(packed, dim=2)
    slots = torch.arange(T)[None]
    dense = decoder.cache_mask(slots, T, 0) & (docs[:, None] == docs[:, :, None])[:, None]
    cache = decoder.cache_mask(slots, T, 0)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2  # bf16 rounds probabilities and values
    for seen, right in (
        (None, whole),
        (cache, whole),
        (dense, packed),
        (decoder.attention_mask(docs, 0, D), packed),
        (decoder.block_mask(docs, 0), packed),
    ):
        assert worst(decoder.attend(q, k, v, seen, extras), right) < tolerance
    for t in (0, 69, 70, 149):
        y = decoder.attend(q[:, :, t : t + 1], k, v, cache[:, :, t : t + 1], extras)
        assert worst(y, whole[:, :, t : t + 1]) < tolerance


def test_alibi_slopes_are_those_of_the_paper():
    """2^(-8i/n), and where n is no power of two every other slope of twice the heads behind it."""
    assert decoder.alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    twice = decoder.alibi_slopes(16)
    assert decoder.alibi_slopes(12) == decoder.alibi_slopes(8) + twice[:8:2]


def test_a_compiled_layer_takes_alibi_into_its_graph():
    q, k, v = (torch.randn(1, 4, 9, 16) for _ in range(3))
    extras = decoder.Extras(0.3, slopes=decoder.alibi_slopes(4))
    seen = decoder.cache_mask(torch.arange(9)[None], 9, 0)
    compiled = torch.compile(decoder.attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, seen, extras), decoder.attend(q, k, v, seen, extras))
