"""A decoder-only transformer with slots, in one file that needs torch alone.

A slot is a field of ModelConfig with a named choice: norms and where they stand, positions, mlp,
activation, biases, windows, multipliers, caps, the head. Every family is such choices. Nothing here
asks for a family's name; nano/families.py does. All have the parameter names of Hugging Face's
Llama.

    model = Transformer(ModelConfig(...))
    hidden = model.hidden(tokens)   # (B, T) -> (B, T, C)
    logits = model.logits(hidden)   # (B, T, V); nano/losses.py never builds them all
    hidden = model(batch)           # (M, C), of the positions batch["index"], which a loss needs

In packed rows `docs` (B, T) is the id of each token's document. Attention never crosses documents.
Padding is a document of its own with the id -1, so a padded row needs no other mask.
"""

import functools
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

SHORT = 512  # most tokens of a document that document_attention multiplies out

ACTIVATIONS = dict(
    silu=F.silu,
    gelu=F.gelu,
    gelu_tanh=functools.partial(F.gelu, approximate="tanh"),  # GPT-2's
    relu=F.relu,
    gelu_sigmoid=lambda x: x * torch.sigmoid(1.702 * x),  # another approximation of GELU
)


@dataclass
class ModelConfig:
    vocab_size: int = 32000
    dim: int = 512  # C
    n_layers: int = 8
    n_heads: int = 8  # H
    n_kv_heads: int = 8  # K; fewer than n_heads: grouped-query attention
    head_dim: int = 64  # D; need not be C / H
    ffn_dim: int = 1408  # F
    # rms | rms1: times 1 + weight | layer: with a bias | layer_bare: no weight and no bias
    norm: str = "rms"
    # before, after or around each half of a block, or of its sum with the residual stream, which
    # leaves nothing for a last norm
    norm_at: str = "before"
    norm_eps: float = 1e-5
    # rope | learned: an embedding of max_positions | alibi: the further back, the lower the score
    positions: str = "rope"
    position_offset: int = 0  # rows of the learned embedding that no position uses, its first
    alibi_scaled: bool = False  # attn_scale multiplies what ALiBi adds too
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "yarn", ...} as in config.json
    rope_part: float = 1.0  # how much of each head is rotated, its first numbers
    rope_layers: tuple = ()  # of each layer: global | local | none; (): global everywhere
    rope_local_theta: float = 10000.0  # of the local layers, which have no scaling
    max_positions: int = 2048
    windows: tuple = ()  # of each layer: how many tokens it sees, the current one included; 0: all
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"  # none | head: over each head's q and k | whole: over all heads at once
    attn_scale: float = 0.0  # of q k^T; 0: 1 / sqrt(D)
    attn_cap: float = 0.0  # soft cap of the scores, see soft_cap; 0: none
    sinks: bool = False  # each head has a learned score that attends to nothing
    mlp: str = "gated"  # gated: down(act(gate(x)) * up(x)) | plain: down(act(up(x)))
    activation: str = "silu"  # one of ACTIVATIONS
    mlp_bias: bool = False
    # clamps a gate from above and what it multiplies on both sides, to which 1 is added; 0: not
    glu_limit: float = 0.0
    n_experts: int = 0  # E: MLPs of which each token takes a few; 0: one MLP
    experts_per_token: int = 2
    expert_dim: int = 0  # F of each expert; 0: ffn_dim
    dense_layers: tuple = ()  # numbers of the layers that have one MLP all the same
    # whose scores a token's experts are weighted by, after a softmax: over all experts, or
    # over those that it takes (the same as dividing the first by their sum)
    router: str = "all"
    router_bias: bool = False
    expert_bias: bool = False
    shared_dim: int = 0  # F of an expert that every token takes, weighted by a gate; 0: none
    # serial | parallel: both halves of a block read its input | parallel_one_norm: through one norm
    residual: str = "serial"
    embed_dim: int = 0  # of the embedding and the head, with projections from and to C; 0: C
    embed_norm: bool = False  # a norm behind the embedding
    embed_scale: float = 1.0  # multiplies the embeddings
    residual_scale: float = 1.0  # multiplies what each half of a block adds
    logit_scale: float = 1.0
    logit_cap: float = 0.0  # soft cap of the logits
    tie_embeddings: bool = False
    head: str = "lm"  # lm: next-token logits; score: one number a token (reward and value models)
    family: str = "llama"  # the `model_type` of config.json, for saving alone

    @property
    def rope_switch(self):
        """The length beyond which a document has other rotary frequencies ("longrope"), or None."""
        scaling = self.rope_scaling or {}
        longrope = scaling.get("rope_type") == "longrope"
        return int(scaling["original_max_position_embeddings"]) if longrope else None

    @property
    def width(self):
        """Of the embedding, and of the hidden states that the head reads."""
        return self.embed_dim or self.dim

    def build(self):
        """The model of this configuration, with fresh weights."""
        return Transformer(self)


# ---------------------------------------------------------------------- positions


def rope_frequencies(cfg, long=False):
    """Inverse frequencies of the rotary embedding, fp32, one for each pair of rotated numbers (Su
    et al. 2021, arXiv:2104.09864).

    "llama3" scaling (the Llama 3.1 release) and "yarn" (Peng et al. 2023, arXiv:2309.00071) stretch
    long wavelengths by `factor`, keep short ones, and blend those between. "longrope" (Ding et al.
    2024, arXiv:2402.13753) has a factor for each frequency, and with `long` those for documents
    beyond the original context. "dynamic" begins behind max_positions, where nothing here goes.
    ValueError for a scaling that is not supported.
    """
    dim = int(cfg.head_dim * cfg.rope_part)
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    inv = 1.0 / cfg.rope_theta ** (steps / dim)
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind in ("default", "dynamic"):
        return inv
    if kind == "linear":
        return inv / scaling["factor"]
    if kind == "longrope":
        return inv / torch.tensor(scaling["long_factor" if long else "short_factor"], device="cpu")
    # keep: 1 keeps a short wavelength, 0 stretches a long one
    original = scaling.get("original_max_position_embeddings")
    if kind == "llama3":
        turns = original * inv / (2 * math.pi)  # of each frequency over the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        # between which indices of frequencies the blend lies; its ends are given in turns
        turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        logs = [math.log(original / (2 * math.pi * t)) / math.log(cfg.rope_theta) for t in turns]
        first, last = (dim * log / 2 for log in logs)
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        keep = 1 - ((steps / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    else:
        kinds = "default, dynamic, linear, llama3, longrope, yarn"
        raise ValueError(f"rope scaling {kind!r} is not supported ({kinds} are)")
    return keep * inv + (1 - keep) * inv / scaling["factor"]


def rope_magnitude(cfg):
    """By what "yarn" and "longrope" multiply cos and sin, so that attention stays as sharp over a
    longer context."""
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    original = scaling["original_max_position_embeddings"]
    log = math.log(max(scaling.get("factor") or cfg.max_positions / original, 1.0))
    if kind == "longrope":
        return math.sqrt(1 + log / math.log(original))
    scale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scale and all_dims:
        return (0.1 * scale * log + 1) / (0.1 * all_dims * log + 1)
    return 0.1 * log + 1


class Rope:
    """The rotary embedding of some layers. Its frequencies are fp32, and no buffers, because they
    must stay fp32 when the model is cast."""

    def __init__(self, cfg):
        scaling = cfg.rope_scaling or {}
        self.inv_freq = rope_frequencies(cfg)
        self.magnitude = rope_magnitude(cfg)
        # documents of more tokens have the frequencies `long`; generate changes it
        self.switch = cfg.rope_switch
        self.long = None if self.switch is None else rope_frequencies(cfg, long=True)
        self.original = scaling.get("original_max_position_embeddings")
        self.beta = scaling.get("llama_4_scaling_beta")

    def __call__(self, positions, lengths, dtype):
        """What `rotate` needs, in dtype: cos and sin (B, T, 1, rotated numbers), sin negative in
        the first half, and in models with llama_4_scaling_beta the factor of each query
        (B, T, 1, 1).

        positions (B, T). lengths() -> (B, T): of each token's document, for "longrope".
        """
        inv_freq = self.inv_freq = self.inv_freq.to(positions.device)
        if self.switch is not None:
            self.long = self.long.to(positions.device)
            inv_freq = torch.where(lengths()[..., None] > self.switch, self.long, inv_freq)
        angles = positions[..., None, None].float() * inv_freq.unsqueeze(-2)
        angles = torch.cat((-angles, angles), dim=-1)
        out = [angles.cos() * self.magnitude, angles.sin() * self.magnitude]
        if self.beta:
            beyond = (positions // self.original)[..., None, None]
            out.append(1 + self.beta * torch.log1p(beyond.float()))
        return [t.to(dtype) for t in out]


def rotate(x, cos, sin):
    """Rotates the first numbers of each head of x (B, T, heads, D), as many as cos and sin
    (B, T, 1, .) have. Pairs are (i, i + half), Hugging Face's order."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        x, rest = x.tensor_split([rotated], dim=-1)
        return torch.cat((rotate(x, cos, sin), rest), dim=-1)
    return x * cos + x.roll(rotated // 2, dims=-1) * sin


# ---------------------------------------------------------------------- what a token sees


def begins(docs):
    """docs (B, T) -> (B, T): where in its row each token's document begins."""
    starts = docs.diff(dim=1, prepend=docs[:, :1] - 1) != 0
    index = torch.arange(docs.shape[1], device=docs.device)
    # int32, because XLA fails on wide rows in int64
    return (starts * index).int().cummax(dim=1).values


def document_lengths(positions, docs, cached):
    """(B, T): how many tokens the document of each token has. In a cache it ends with the token."""
    if cached:
        return positions + 1
    if docs is None:
        return torch.full_like(positions, positions.shape[1])
    ends = docs.shape[1] - begins(docs.flip(1)).flip(1)
    return ends - begins(docs)


def block_mask(docs, window, size=128):
    """attention_mask for flex_attention.

    What a token sees is one stretch of its row. So two numbers for each block of queries tell which
    blocks of keys to visit. torch's create_block_mask looks at all T x T pairs and takes 20 times
    as long.
    """
    T = docs.shape[1]
    index = torch.arange(T, device=docs.device)
    oldest = begins(docs)
    if window:
        oldest = torch.maximum(oldest, index - window + 1)
    keys = index[::size] // size  # numbers of the blocks
    queries = keys[:, None]
    first = oldest[:, ::size, None]
    last = oldest[:, (index[::size] + size - 1).clamp(max=T - 1), None]
    # both (B, blocks of queries, blocks of keys)
    seen = (keys <= queries) & (keys >= first // size)
    # in these blocks every pair is seen, so the kernel need not look at each
    whole = (keys < queries) & (keys * size >= last) & ((queries + 1) * size <= T)

    def listed(blocks):
        which = blocks.int().argsort(dim=-1, descending=True, stable=True)  # those first
        return blocks.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]

    def visible(b, h, q, k):
        return (q >= k) & (k >= oldest[b, q])

    return BlockMask.from_kv_blocks(*listed(seen & ~whole), *listed(whole), size, visible, (T, T))


def attention_mask(docs, window, head_dim):
    """What each token of a row may see: earlier tokens of its document, at most `window` back
    (0: all). A document is one stretch of a row.

    docs (B, T) -> Documents on a CPU without a window, where attention runs document by document; a
    BlockMask on CUDA; else a bool (B, 1, T, T).
    """
    B, T = docs.shape
    if not window and docs.device.type == "cpu":
        starts = (begins(docs) == torch.arange(T)).flatten().nonzero()[:, 0]
        return Documents(starts.diff(append=torch.tensor([B * T])).tolist())
    if docs.is_cuda and head_dim >= 16:  # its kernels take no smaller heads
        return block_mask(docs, window)
    ones = torch.ones(T, T, dtype=torch.bool, device=docs.device)
    causal = ones.tril()
    if window:
        causal &= ones.triu(1 - window)
    return (causal & (docs[:, :, None] == docs[:, None, :]))[:, None]


def cache_mask(positions, span, window):
    """A token at position p sees the slots 0..p of a cache, at most `window` of them (0: all).

    positions (B, T) -> bool (B, 1, T, span).
    """
    slots = torch.arange(span, device=positions.device)
    mask = slots <= positions[..., None]
    if window:
        mask &= slots > positions[..., None] - window
    return mask[:, None]


# ---------------------------------------------------------------------- attention


def soft_cap(x, cap):
    """cap * tanh(x / cap), which stays between -cap and cap (Gemma Team 2024, arXiv:2408.00118).
    x itself if cap is 0."""
    return cap * torch.tanh(x / cap) if cap else x


def alibi_slopes(n_heads):
    """How much ALiBi takes off a head's scores for each token back, as a tuple (Press et al. 2022,
    arXiv:2108.12409, and its code where n_heads is no power of two)."""
    power = 2 ** int(math.log2(n_heads))
    steps = [i + 1 if i < power else i - power + 0.5 for i in range(n_heads)]
    return tuple(2 ** (-8 * step / power) for step in steps)


@functools.cache
def constant(numbers, device):
    """A tuple as a tensor. It is kept, because a CUDA graph must not copy it from the CPU."""
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class Extras:
    """What a layer adds to softmax(q k^T) v."""

    scale: float
    cap: float = 0.0
    slopes: tuple = ()  # of ALiBi, one a head; with tensor parallelism those of this device's heads
    # (H,): scores that take part in the softmax and have no value (OpenAI 2025, arXiv:2508.10925)
    sinks: torch.Tensor | None = None

    @property
    def fused(self):
        """Whether the fused kernels can compute it."""
        return not self.cap and not self.slopes and self.sinks is None

    def score_mod(self, device):
        """flex_attention's score_mod: what becomes of q k^T * scale. None: nothing."""
        if not self.cap and not self.slopes:
            return None
        slopes = constant(self.slopes, device)

        def score_mod(score, b, h, q, k):
            score = soft_cap(score, self.cap)
            return score + slopes[h] * (k - q) if self.slopes else score

        return score_mod

    def bias(self, seen):
        """What ALiBi adds to the scores, (B, H, T, S) fp32. seen (..., T, S) bool. The token itself
        is the last that it sees."""
        keys = torch.arange(seen.shape[-1], device=seen.device)
        distance = keys - (seen * keys).amax(-1, keepdim=True)
        return constant(self.slopes, seen.device)[:, None, None] * distance


def attend(q, k, v, seen, extras):
    """Computes all attention, in training, for prompts and in decoding, and chooses the kernel.

    q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). seen: what attention_mask or cache_mask
    returned. With None every token sees itself and all before it, which the fastest kernels have
    built in.
    """
    if isinstance(seen, BlockMask):
        # a compiled layer takes flex_attention into its graph; uncompiled it builds all scores
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        score_mod = extras.score_mod(q.device)
        settings = dict(block_mask=seen, scale=extras.scale, enable_gqa=True)
        if extras.sinks is None:
            return flex(q, k, v, score_mod, **settings)
        y, aux = flex(q, k, v, score_mod, **settings, return_aux=AuxRequest(lse=True))
        # what is left of the attention to the tokens where a sink takes part in the softmax
        return y * torch.sigmoid(aux.lse - extras.sinks[:, None].float())[..., None].to(y.dtype)
    if isinstance(seen, Documents):
        return seen.attend(q, k, v, extras)
    if not extras.fused:
        return plain_attention(q, k, v, seen, extras)
    if q.shape[2] == 1 and seen is not None:
        return one_query(q, k, v, seen, extras)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=extras.scale, enable_gqa=True
    )


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)


def plain_attention(q, k, v, seen, extras):
    """`attend` as two products, with all scores in memory, for what the fused kernels lack.

    The query heads that share a key/value head form one block, so its keys are read once for all of
    them.
    """
    B, K, S, D = k.shape
    H, T = q.shape[1:3]
    q, k, v = (t.reshape(B * K, -1, D) for t in (q, k, v))
    # bmm, because matmul of four dimensions would copy the cache
    scores = torch.bmm(q, k.mT).view(B, H, T, S).float() * extras.scale
    scores = soft_cap(scores, extras.cap)
    if seen is None:
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if extras.slopes:
        scores = scores + extras.bias(seen)
    scores = scores.masked_fill(~seen, -torch.inf)
    if extras.sinks is not None:
        sinks = extras.sinks.float().view(H, 1, 1).expand(B, H, T, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    probs = scores.softmax(-1)[..., :S].to(v.dtype)
    return torch.bmm(probs.reshape(B * K, -1, S), v).view(B, H, T, D)


def one_query(q, k, v, seen, extras):
    """A decoding step: q (B, H, 1, D), seen (B, 1, 1, S) -> (B, H, 1, D).

    On a CPU plain products beat the fused kernel, which is made for long queries, and is many calls
    within.
    """
    B, K, S, D = k.shape
    if q.device.type != "cpu":
        q = q.reshape(B, K, -1, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=extras.scale)
        return y.reshape(B, -1, 1, D)
    q, k, v = (t.reshape(B * K, -1, D) for t in (q, k, v))
    mask = torch.where(seen, 0.0, -torch.inf).to(q.dtype).expand(B, K, 1, S)
    scores = torch.baddbmm(mask.reshape(B * K, 1, S), q, k.mT, alpha=extras.scale)
    return torch.bmm(scores.softmax(-1), v).view(B, -1, 1, D)


def document_attention(q, k, v, extras):
    """Causal attention within one document, on a CPU: q (H, T, D), k and v (K, T, D) -> (H, T, D).

    A short document in bf16 is two matrix products, which take a third of the time of torch's CPU
    kernel (bench/attention.py). autograd then keeps H x T x T probabilities, so longer ones stay
    with the kernel.
    """
    H = len(q)
    K, T, D = k.shape
    if not extras.fused or q.dtype != torch.bfloat16 or T > SHORT:
        return attend(q[None], k[None], v[None], None, extras)[0]
    causal = q.new_full((T, T), -math.inf).triu(1).repeat(H // K, 1)
    # (K, H/K T, T)
    scores = torch.baddbmm(causal, q.reshape(K, -1, D), k.transpose(1, 2), alpha=extras.scale)
    return (scores.softmax(-1) @ v).view(H, T, D)


@dataclass(eq=False)
class Documents:
    """What the tokens of packed rows see on a CPU: their documents, as lengths along the flattened
    rows. A class and not a list, because torch.compile guards on what is in a list. It would
    compile anew for every batch."""

    lengths: list

    def attend(self, q, k, v, extras):
        """Each document alone: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
        B, _, T, D = q.shape
        flat = [t.transpose(0, 1).reshape(-1, B * T, D) for t in (q, k, v)]
        parts = zip(*(t.split(self.lengths, dim=1) for t in flat), strict=True)
        y = torch.cat([document_attention(*part, extras) for part in parts], dim=1)
        return y.view(-1, B, T, D).transpose(0, 1)


@functools.cache
def _keep_lengths_uncompiled():
    """A compiled layer leaves its graph for documents and for experts one by one, because each
    batch has other lengths and would need a new graph."""
    Documents.attend = torch.compiler.disable(Documents.attend)
    Stack.looped = staticmethod(torch.compiler.disable(Stack.looped))


# ---------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class RMSNorm1(RMSNorm):
    """RMSNorm that multiplies by 1 + weight. The sum is fp32, because in bf16 1 + weight would lose
    what a small weight says."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        # autocast would return fp32; the kernel computes in fp32 in any case
        with torch.autocast(x.device.type, enabled=False):
            parameters = [None if p is None else p.to(x.dtype) for p in (self.weight, self.bias)]
            return F.layer_norm(x, self.normalized_shape, *parameters, self.eps)


NORMS = dict(
    rms=RMSNorm,
    rms1=RMSNorm1,
    layer=LayerNorm,
    layer_bare=functools.partial(LayerNorm, elementwise_affine=False),
)


class Attention(nn.Module):
    SAME_INPUT = ("q_proj", "k_proj", "v_proj")  # one product in decoding (nano/generate.py)
    # how the devices of a tensor group share the layers (nano/tensor.py)
    COLUMN = SAME_INPUT
    ROW = ("o_proj",)

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = D = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * D, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_heads * D, cfg.dim, bias=cfg.o_bias)
        norm = nn.Identity if cfg.qk_norm == "none" else NORMS[cfg.norm]
        self.whole = cfg.qk_norm == "whole"
        self.q_norm = norm(D * cfg.n_heads if self.whole else D, cfg.norm_eps)
        self.k_norm = norm(D * cfg.n_kv_heads if self.whole else D, cfg.norm_eps)
        setattr(self, "WHOLE" if self.whole else "PER_HEAD", ("q_norm", "k_norm"))
        if cfg.n_kv_heads == 1:
            self.COLUMN, self.ALL = ("q_proj",), ("k_proj", "v_proj")
        scale = cfg.attn_scale or 1 / math.sqrt(D)
        slopes = alibi_slopes(cfg.n_heads) if cfg.positions == "alibi" else ()
        if cfg.alibi_scaled:
            slopes = tuple(scale * slope for slope in slopes)
        self.extras = Extras(scale, cfg.attn_cap, slopes)
        self.sinks = nn.Parameter(torch.zeros(cfg.n_heads)) if cfg.sinks else None

    def keep_heads(self, rank, size):
        """Called where `size` devices share the heads, on device number `rank`."""
        count = len(self.extras.slopes) // size
        slopes = self.extras.slopes[rank * count : (rank + 1) * count]
        self.extras = replace(self.extras, slopes=slopes)

    def forward(self, x, rope, seen, slots=None, cache=None):
        heads = *x.shape[:2], -1, self.head_dim
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)  # (B, T, H, D), k, v (B, T, K, D)
        if not self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            cos, sin, *temperature = rope
            q, k = (rotate(t.to(v.dtype), cos, sin) for t in (q, k))
            for factor in temperature:
                q = q * factor
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = remember(k, v, slots, cache)
        extras = self.extras if self.sinks is None else replace(self.extras, sinks=self.sinks)
        y = attend(q, k, v, seen, extras)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def remember(k, v, slots, cache):
    """Writes k, v (B, K, T, D) to a layer's cache (keys, values), each (B, K, S, D).

    Returns the keys and values to attend to. slots (B, T) are the places of the tokens, and the
    whole cache is returned. With None the tokens begin their rows, in the slots 0..T-1, and nothing
    else is there to see.
    """
    if slots is None:
        for cached, new in zip(cache, (k, v), strict=True):
            cached[:, :, : new.shape[2]] = new
        return k, v
    slots = slots[:, None, :, None].expand_as(k)
    for cached, new in zip(cache, (k, v), strict=True):
        cached.scatter_(2, slots, new.to(cached.dtype))
    return [cached.to(k.dtype) for cached in cache]


class MLP(nn.Module):
    SAME_INPUT = COLUMN = ("gate_proj", "up_proj")
    ROW = ("down_proj",)

    def __init__(self, cfg, ffn_dim=0):
        super().__init__()
        ffn_dim = ffn_dim or cfg.ffn_dim
        self.gated = cfg.mlp == "gated"
        self.activation = ACTIVATIONS[cfg.activation]
        if self.gated:
            self.gate_proj = nn.Linear(cfg.dim, ffn_dim, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.dim, ffn_dim, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(ffn_dim, cfg.dim, bias=cfg.mlp_bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Router(nn.Module):
    """Chooses the experts of each token: x (N, C) -> their weights (N, k) and numbers (N, k). With
    `chosen` (N, k) they are those.

    It computes in fp32, because the choice should not hang on how bf16 rounds. It keeps its scores
    (N, E) as `.scores`, with which a loss may balance the experts (nano/losses.py)."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cfg.n_experts, cfg.dim))
        self.bias = nn.Parameter(torch.zeros(cfg.n_experts)) if cfg.router_bias else None
        nn.init.normal_(self.weight, std=0.02)
        self.k = cfg.experts_per_token
        self.over_all = cfg.router == "all"
        self.scores = None

    def forward(self, x, chosen=None):
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            self.scores = F.linear(x.float(), self.weight.float(), bias)
            if chosen is None:
                chosen = self.scores.topk(self.k, dim=-1).indices
            top = self.scores.gather(-1, chosen)
            if self.over_all:
                return (top - self.scores.logsumexp(-1, keepdim=True)).exp(), chosen
            return top.softmax(-1), chosen


class Stack(nn.Module):
    """The linear layers of E experts: weight (E, out, in) and bias (E, out)."""

    def __init__(self, experts, in_features, out_features, bias=False):
        super().__init__()
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(experts, out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x, ends):
        """x (S, in), of which expert e has the rows ends[e - 1] to ends[e] -> (S, out)."""
        return self.biased(self.product(x, self.weight, ends), ends)

    def biased(self, y, ends):
        if self.bias is None:
            return y
        counts = ends.diff(prepend=ends.new_zeros(1))
        return y + self.bias.to(y.dtype).repeat_interleave(counts, dim=0, output_size=len(y))

    def empty(self):
        """A stack of this shape without memory and without a bias."""
        with torch.device("meta"), NoInit():
            return Stack(self.experts, self.in_features, self.out_features)

    @staticmethod
    def product(x, weight, ends):
        """The rows of each expert times its matrix of weight (E, out, in)."""
        x = autocasted(x)
        if has_grouped_mm(x, weight):
            return Stack.grouped(x, weight, ends)
        return Stack.looped(x, ends, weight.shape, stack_matrix, weight)

    @staticmethod
    def looped(*args):
        return Looped.apply(*args)

    @staticmethod
    def grouped(x, weight, ends):
        return F.grouped_mm(x, weight.to(x.dtype).mT, offs=ends)


class Looped(torch.autograd.Function):
    """The products of a stack, one expert after another: x (S, in), ends (E,) -> (S, out).

    shape: (E, out, in). matrix(e, dtype, *stored) -> (out, in) of an expert. stored: tensors, of
    which the first may be trained, if it is the weight of a Stack. autograd's own products would
    stack the gradients of all experts, and take 2.5 times as long."""

    @staticmethod
    def forward(ctx, x, ends, shape, matrix, *stored):
        ctx.shape, ctx.matrix = shape, matrix
        ctx.rows = [*pairwise([0, *ends.tolist()])]
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, *stored)
        out = x.new_empty(len(x), shape[1])
        for e, (start, end) in enumerate(ctx.rows):
            if start < end:
                torch.mm(x[start:end], matrix(e, x.dtype, *stored).t(), out=out[start:end])
        return out

    @staticmethod
    def backward(ctx, grad):
        x, *stored = ctx.saved_tensors
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad.new_empty(len(grad), ctx.shape[2])
            for e, (start, end) in enumerate(ctx.rows):
                if start < end:
                    matrix = ctx.matrix(e, grad.dtype, *stored)
                    torch.mm(grad[start:end], matrix, out=x_grad[start:end])
        if ctx.needs_input_grad[4]:
            weight_grad = grad.new_empty(ctx.shape)
            for e, (start, end) in enumerate(ctx.rows):  # without rows it is 0
                torch.mm(grad[start:end].t(), x[start:end], out=weight_grad[e])
        return x_grad, None, None, None, weight_grad, *[None for _ in stored[1:]]


def stack_matrix(e, dtype, weight):
    return weight[e].to(dtype)


def autocasted(x):
    """x in the dtype of autocast, where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def has_grouped_mm(x, weight):
    """Whether F.grouped_mm has a kernel: on CUDA in bf16, for rows of a multiple of 16 bytes."""
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and x.is_cuda and x.dtype == torch.bfloat16 and aligned


class Experts(nn.Module):
    """The gated MLPs of E experts."""

    def __init__(self, cfg):
        super().__init__()
        E, ffn_dim = cfg.n_experts, cfg.expert_dim or cfg.ffn_dim
        self.gate_up_proj = Stack(E, cfg.dim, 2 * ffn_dim, cfg.expert_bias)
        self.down_proj = Stack(E, ffn_dim, cfg.dim, cfg.expert_bias)
        self.count = E
        self.activation = ACTIVATIONS[cfg.activation]
        self.limit = cfg.glu_limit

    def forward(self, x, chosen):
        """x (N, C), chosen (N, k): numbers of experts -> what they make of each token (N, k, C).

        Every token gets all experts that its router chose, however many others want them too."""
        N, k = chosen.shape
        # the N k pairs of a token and an expert, in the order of the experts
        numbers, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.count, device=x.device)
        ends = torch.searchsorted(numbers, experts, right=True, out_int32=True)
        # index_select, because the gradient of x[...] takes ten times as long on a CPU
        gate, up = self.gate_up_proj(x.index_select(0, order // k), ends).chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
        y = self.down_proj(self.activation(gate) * up, ends)
        return y.index_select(0, order.argsort()).view(N, k, -1)


class Mixture(nn.Module):
    """An MLP of experts (Shazeer et al. 2017, arXiv:1701.06538). The names are those of Qwen's."""

    def __init__(self, cfg):
        super().__init__()
        self.gate = Router(cfg)
        self.experts = Experts(cfg)
        self.shared_expert = self.shared_expert_gate = None
        if cfg.shared_dim:
            self.shared_expert = MLP(cfg, cfg.shared_dim)
            self.shared_expert_gate = nn.Linear(cfg.dim, 1, bias=False)

    def forward(self, x, chosen=None):
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat, chosen)
        y = self.experts(flat, chosen)
        # summed in the order of the scores, so that a token's sum is the same in any batch
        y = torch.bmm(weights.to(y.dtype)[:, None], y).view_as(x)
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


class Block(nn.Module):
    def __init__(self, cfg, number=0):
        super().__init__()

        def norm(*places):
            stands = cfg.norm_at in places
            return NORMS[cfg.norm](cfg.dim, cfg.norm_eps) if stands else nn.Identity()

        self.input_layernorm = norm("before", "around")
        self.self_attn = Attention(cfg)
        self.attn_output_norm = norm("after", "around", "sum")
        if cfg.residual != "parallel_one_norm":
            self.post_attention_layernorm = norm("before", "around")
        mixed = cfg.n_experts and number not in cfg.dense_layers
        self.mlp = Mixture(cfg) if mixed else MLP(cfg)
        self.mlp_output_norm = norm("after", "around", "sum")
        self.after_sum = cfg.norm_at == "sum"
        self.residual = cfg.residual
        self.residual_scale = cfg.residual_scale

    def forward(self, x, rope, seen, slots=None, cache=None, experts=None):
        normed = self.input_layernorm(x)
        y = self.self_attn(normed, rope, seen, slots, cache)
        between = self.added(x, y, self.attn_output_norm)
        if self.residual == "serial":
            normed = self.post_attention_layernorm(between)
        elif self.residual == "parallel":
            normed = self.post_attention_layernorm(x)
        y = self.mlp(normed) if experts is None else self.mlp(normed, experts)
        return self.added(between, y, self.mlp_output_norm)

    def added(self, x, y, norm):
        """The residual stream x plus what a half of the block gives."""
        if self.after_sum:
            return norm(torch.add(x, y, alpha=self.residual_scale))
        return torch.add(x, norm(y), alpha=self.residual_scale)

    def compile(self, *args, **kwargs):
        _keep_lengths_uncompiled()
        super().compile(*args, **kwargs)


class ScoreHead(nn.Linear):
    """hidden (..., C) -> one fp32 number a token (...). bf16 has 8 significant bits, and the scores
    of a pair would tie."""

    def __init__(self, dim):
        super().__init__(dim, 1, bias=False)
        # Stiennon et al. 2020 (arXiv:2009.01325)
        nn.init.normal_(self.weight, std=1 / math.sqrt(dim + 1))

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class Head(NamedTuple):
    """How hidden states become logits: soft_cap(scale * hidden @ weight^T, cap)."""

    weight: torch.Tensor  # (V, C)
    scale: float = 1.0
    cap: float = 0.0


# ---------------------------------------------------------------------- the model


class Transformer(nn.Module):
    VOCABULARY = ("model.embed_tokens", "lm_head")
    # tokens with which an answer begins, behind a prompt that an encoder reads (t5.py); none here
    start_ids = ()

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(cfg.vocab_size, cfg.width)
        if cfg.embed_norm:
            self.model["embed_norm"] = NORMS[cfg.norm](cfg.width, cfg.norm_eps)
        if cfg.embed_dim:
            self.model["project_in"] = nn.Linear(cfg.width, cfg.dim, bias=False)
            self.model["project_out"] = nn.Linear(cfg.dim, cfg.width, bias=False)
        if cfg.positions == "learned":
            rows = cfg.max_positions + cfg.position_offset
            self.model["embed_positions"] = nn.Embedding(rows, cfg.dim)
        self.model["layers"] = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layers))
        norm = nn.Identity if cfg.norm_at == "sum" else NORMS[cfg.norm]
        self.model["norm"] = norm(cfg.dim, cfg.norm_eps)
        if cfg.head == "score":
            self.score = ScoreHead(cfg.width)
        elif not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.width, cfg.vocab_size, bias=False)
        self.windows = cfg.windows or (0,) * cfg.n_layers
        rotated = "global" if cfg.positions == "rope" else "none"
        self.rope_layers = cfg.rope_layers or (rotated,) * cfg.n_layers
        local = replace(cfg, rope_theta=cfg.rope_local_theta, rope_scaling=None)
        kinds = {"global": cfg, "local": local}
        self.ropes = {kind: Rope(kinds[kind]) for kind in set(self.rope_layers) - {"none"}}
        # a function(layer, *inputs) that recomputes activations in backward; None: they are kept
        self.recompute = None

    def init_weights(self, std=0.02):
        """N(0, std) for matrices, norms that multiply by 1, 0 for biases. The two projections that
        write to the residual stream are scaled by 1/sqrt(2L), as in GPT-2. Returns the model."""
        one = 0.0 if self.cfg.norm == "rms1" else 1.0
        for name, p in self.named_parameters():
            if p.dim() < 2 or name.endswith("bias"):
                nn.init.constant_(p, one if name.endswith("weight") else 0.0)
            elif name != "score.weight":
                residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                nn.init.normal_(p, std=std / math.sqrt(2 * self.cfg.n_layers) if residual else std)
        return self

    @property
    def layers(self):
        return self.model["layers"]

    @property
    def head_weight(self):
        """The output matrix (V, C). With tied embeddings it is the embedding's."""
        return self.model["embed_tokens"].weight if self.cfg.tie_embeddings else self.lm_head.weight

    @property
    def head(self):
        """The Head, which nano/losses.py takes."""
        return Head(self.head_weight, self.cfg.logit_scale, self.cfg.logit_cap)

    def logits(self, hidden):
        weight, scale, cap = self.head
        return soft_cap(F.linear(hidden * scale, weight), cap)

    def forward(self, batch):
        """Hidden states (M, C) of the flat positions batch["index"] (M,), or of all positions,
        (B * T, C), if the batch has no "index".

        It reads "tokens" (B, T) and, if they are there, "positions" and "docs" (B, T) and
        "experts", as `hidden` does. It reads integers only, because FSDP casts the floating tensors
        of its arguments to bf16.
        """
        more = {name: batch.get(name) for name in ("positions", "docs", "experts")}
        hidden = self.hidden(batch["tokens"], **more)
        hidden = hidden.flatten(0, 1)
        return hidden[batch["index"]] if "index" in batch else hidden

    def hidden(self, tokens, positions=None, docs=None, cache=None, experts=None):
        """tokens (B, T) -> hidden states (B, T, C) after the last norm, for .logits, .score or
        nano/losses.py.

        positions (B, T): where each token stands in its document. By default it is counted.
        docs (B, T): document ids. By default a row is one document.
        cache: per layer (keys, values), each (B, K, S, D). With a cache, `positions` are also the
        slots of the tokens, which see all slots up to their own. Without positions they begin their
        rows.
        experts (mixtures, B * T, k): those that each token takes in each mixture. By default the
        routers choose.
        """
        slots = None if cache is None else positions
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            if docs is not None:
                positions = positions - begins(docs)
        seen = {w: self.seen(w, positions, docs, cache, slots) for w in set(self.windows)}
        x = self.model["embed_tokens"](tokens)
        if self.cfg.embed_scale != 1.0:
            # rounded to the dtype of the embedding, with which the models were trained
            x = x * torch.tensor(self.cfg.embed_scale, device="cpu").to(x.dtype).item()
        for name in ("embed_norm", "project_in"):
            if name in self.model:
                x = self.model[name](x)
        if self.cfg.positions == "learned":
            # padding may count further than any document, but nobody looks at it
            rows = positions.clamp(max=self.cfg.max_positions - 1) + self.cfg.position_offset
            x = x + self.model["embed_positions"](rows)
        if torch.is_autocast_enabled(x.device.type):
            # one dtype along the residual stream, whatever the dtype of the weights
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cached = cache is not None
        lengths = functools.partial(document_lengths, positions, docs, cached)
        ropes = {kind: rope(positions, lengths, x.dtype) for kind, rope in self.ropes.items()}
        kinds = zip(self.layers, self.windows, self.rope_layers, strict=True)
        choices = iter(() if experts is None else experts)
        for i, (layer, window, kind) in enumerate(kinds):
            chosen = next(choices, None) if isinstance(layer.mlp, Mixture) else None
            layer_cache = None if cache is None else cache[i]
            inputs = x, ropes.get(kind), seen[window], slots, layer_cache, chosen
            if self.recompute is not None and torch.is_grad_enabled():
                x = self.recompute(layer, *inputs)
            else:
                x = layer(*inputs)
        x = self.model["norm"](x)
        return self.model["project_out"](x) if self.cfg.embed_dim else x

    def seen(self, window, positions, docs, cache, slots):
        """The `seen` of attend for layers with this window."""
        if docs is not None:
            return attention_mask(docs, window, self.cfg.head_dim)
        if slots is not None:
            return cache_mask(slots, cache[0][0].shape[2], window)
        T = positions.shape[1]
        if not 0 < window < T:
            return None
        if cache is not None:  # dense, because a prompt is not worth compiling flex_attention
            return cache_mask(positions, T, window)
        return attention_mask(torch.zeros_like(positions), window, self.cfg.head_dim)

    def prefill(self, tokens, lengths, cache, positions=None):
        """Puts prompts, the first lengths (B,) of tokens (B, T), into the slots `positions` (B, T)
        of a cache, or its first ones. What stands behind a prompt's end is to be overwritten before
        any token can see it."""
        self.hidden(tokens, positions, cache=cache)

    def router_scores(self):
        """Of each mixture of experts: the scores (B * T, E) of the last forward. It lets go of
        them, and is empty where nothing has run since."""
        routers = [m for m in self.modules() if isinstance(m, Router) and m.scores is not None]
        scores = [router.scores for router in routers]
        for router in routers:
            router.scores = None
        return scores

    def new_cache(self, batch, slots, dtype=None):
        """An empty key/value cache: per layer (keys, values), each (batch, K, slots, D)."""
        weight = self.model["embed_tokens"].weight
        shape = batch, self.cfg.n_kv_heads, slots, self.cfg.head_dim
        like = dict(dtype=dtype or weight.dtype, device=weight.device)
        return [tuple(torch.zeros(shape, **like) for _ in range(2)) for _ in self.layers]

    def flops_per_token(self, length, trained="all"):
        """Floating-point operations of one token in a training step, forward and backward, on rows
        of `length` tokens.

        6 per matrix weight that a token uses, or 4 where only adapters are trained and weights get
        no gradient. Of experts it uses those that it takes. Plus 12 L H D T/2 for causal attention
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), and less in layers with a window.
        """
        # looking up a row of an embedding is no product
        modules = [m for m in self.modules() if not isinstance(m, nn.Embedding)]
        matrices = sum(matrix_size(m, self.cfg.experts_per_token) for m in modules)
        if self.cfg.tie_embeddings and self.cfg.head == "lm":
            matrices += self.head_weight.numel()
        # of all layers, how many tokens a token sees on average, twice
        seen = [w * (2 * length - w) / length if 0 < w < length else length for w in self.windows]
        attention = self.cfg.n_heads * self.cfg.head_dim * sum(seen)
        return (6 if trained == "all" else 4) * matrices + 6 * attention


def matrix_size(module, taken):
    """How many numbers the matrices of a module have that a token uses, without those of its
    children. A quantised layer has them all, in fewer bytes. Of a stack a token uses `taken`."""
    own = list(module.parameters(recurse=False))
    if own and hasattr(module, "in_features"):
        used = taken if hasattr(module, "experts") else 1
        return used * module.in_features * module.out_features
    sizes = [p[:taken] if p.dim() == 3 else p for p in own if p.dim() > 1]
    return sum(p.numel() for p in sizes)


class NoInit(torch.overrides.TorchFunctionMode):
    """Turns the functions of torch.nn.init off. On the meta device they would compute nothing, but
    import the compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (args or tuple(kwargs.values()))[0]
        return func(*args, **(kwargs or {}))


def empty(cfg):
    """A model without memory. Its parameters are on the meta device, to be assigned."""
    with torch.device("meta"), NoInit():
        return cfg.build()
