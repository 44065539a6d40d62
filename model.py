"""A decoder-only transformer for the Llama family, in one file that needs torch alone.

Covers Llama 1/2/3/3.x, SmolLM2, Mistral, Qwen2/2.5 and Qwen3: pre-norm blocks with RMSNorm, rotary positions, grouped-query
attention, SwiGLU; what differs between them (biases, q/k norm, windows, rope scaling, tied head) is a field of ModelConfig.
Parameter names are Hugging Face's Llama names, so a checkpoint of the family needs no renaming.

    model = Transformer(ModelConfig(...))
    hidden = model.hidden(tokens)             # (B, T) -> (B, T, C)
    logits = model.logits(hidden)             # (B, T, V); training goes through losses.py, which never builds them all
    hidden = model(batch)                     # (M, C) of the positions batch["index"]: what a loss needs

Packed rows: `docs` (B, T) gives each token the id of its document, and attention never crosses documents. Padding is a document
of its own (id -1), so a padded row needs nothing else.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

SHORT = 512  # tokens of a document at most, for document_attention


@dataclass
class ModelConfig:
    vocab_size: int = 32000
    dim: int = 512  # C
    n_layers: int = 8
    n_heads: int = 8  # H
    n_kv_heads: int = 8  # K; fewer than n_heads: grouped-query attention
    head_dim: int = 64  # D; need not be C / H
    ffn_dim: int = 1408
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear", ...} as in config.json
    max_positions: int = 2048
    windows: tuple = ()  # tokens each layer looks back, itself included; 0: all; (): all, in every layer
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's q and k (Qwen3)
    tie_embeddings: bool = False
    head: str = "lm"  # lm: next-token logits; score: one number a token (reward and value models)
    family: str = "llama"  # the `model_type` that config.json says

    @property
    def parameter_count(self):
        with torch.device("meta"):
            return sum(p.numel() for p in Transformer(self).parameters())


def rope_frequencies(cfg):
    """Inverse frequencies (D/2,) of the rotary embedding, fp32. Source: Su et al. 2021 (arXiv:2104.09864); "llama3" scaling:
    the Llama 3.1 release, which stretches long wavelengths by `factor` and blends those between the two cut-offs."""
    inv = 1.0 / cfg.rope_theta ** (
        torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu") / cfg.head_dim
    )
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inv
    if kind == "linear":
        return inv / scaling["factor"]
    if kind == "llama3":
        turns = (
            scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
        )  # rotations over the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(
            0, 1
        )  # 1: a short wavelength, kept; 0: a long one, stretched
        return keep * inv + (1 - keep) * inv / scaling["factor"]
    raise ValueError(f"rope scaling {kind!r} is not supported (default, linear, llama3 are)")


def rotate(x, cos, sin):
    """x (B, T, heads, D); cos, sin (B, T, 1, D). Pairs are (i, i + D/2), Hugging Face's order."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)  # uncompiled, flex_attention builds all scores


def begins(docs):
    """docs (B, T) -> where in its row each token's document begins, (B, T)."""
    starts = torch.cat((torch.ones_like(docs[:, :1]), docs.diff(dim=1)), dim=1) != 0
    index = torch.arange(docs.shape[1], device=docs.device)
    return torch.where(starts, index, 0).int().cummax(dim=1).values  # XLA: wide rows fail in int64


def block_mask(docs, window, size=128):
    """attention_mask's for flex_attention. What a token sees is one stretch of its row, so that two numbers for each block of
    queries tell which blocks of keys to visit; torch's create_block_mask would look at all T x T pairs, in 20 times the time."""
    T = docs.shape[1]
    index = torch.arange(T, device=docs.device)
    oldest = begins(docs)
    if window:
        oldest = torch.maximum(oldest, index - window + 1)
    keys = index[::size] // size  # blocks
    queries = keys[:, None]
    first, last = (
        oldest[:, ::size, None],
        oldest[:, (index[::size] + size - 1).clamp(max=T - 1), None],
    )
    seen = (keys <= queries) & (keys >= first // size)  # (B, blocks of queries, blocks of keys)
    whole = (
        (keys < queries) & (keys * size >= last) & ((queries + 1) * size <= T)
    )  # all pairs: no need to look at each

    def listed(blocks):
        which = blocks.int().argsort(dim=-1, descending=True, stable=True)  # those first
        return blocks.sum(-1, dtype=torch.int32)[:, None], which.int()[:, None]

    def visible(b, h, q, k):
        return (q >= k) & (k >= oldest[b, q])

    return BlockMask.from_kv_blocks(*listed(seen & ~whole), *listed(whole), size, visible, (T, T))


class Documents:
    """The documents' lengths along flattened rows: a mask of its own kind, since torch.compile guards what is in a list."""

    def __init__(self, lengths):
        self.lengths = lengths


def attention_mask(docs, window, head_dim):
    """What each token may see: earlier tokens of its document, at most `window` back (0: all). A document is one stretch of a row.
    docs (B, T) -> a BlockMask for flex_attention on CUDA; elsewhere a bool (B, 1, T, T) for scaled_dot_product_attention, or, on a
    CPU without a window, Documents: there attention runs document by document."""
    B, T = docs.shape
    if not window and docs.device.type == "cpu":
        starts = torch.ones(B, T, dtype=torch.bool)
        starts[:, 1:] = docs[:, 1:] != docs[:, :-1]
        edges = [*starts.flatten().nonzero().squeeze(1).tolist(), B * T]
        return Documents([b - a for a, b in zip(edges, edges[1:], strict=False)])
    if docs.is_cuda and head_dim >= 16:  # its kernels take no smaller ones
        return block_mask(docs, window)
    ones = torch.ones(T, T, dtype=torch.bool, device=docs.device)
    causal = ones.tril() if not window else ones.tril() & ones.triu(1 - window)
    return (causal & (docs[:, :, None] == docs[:, None, :]))[:, None]


def cache_mask(positions, span, window):
    """Decoding: a token at position p sees the cache slots 0..p. positions (B, T) -> bool (B, 1, T, span)."""
    slots = torch.arange(span, device=positions.device)
    mask = slots <= positions[..., None]
    if window:
        mask &= slots > positions[..., None] - window
    return mask[:, None]


def document_attention(q, k, v):
    """Causal attention within one document, on a CPU: q (H, T, D), k and v (K, T, D) -> (H, T, D). A short one in bf16 is two
    matrix products, which take a third of the time of torch's CPU kernel (bench/attention.py); autograd then keeps the H x T x T
    probabilities, which is why longer ones stay with the kernel."""
    (K, T, D), H = k.shape, len(q)
    if q.dtype != torch.bfloat16 or T > SHORT:
        return F.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, enable_gqa=True
        )[0]
    causal = q.new_full((T, T), -math.inf).triu(1).repeat(H // K, 1)
    scores = torch.baddbmm(
        causal, q.reshape(K, -1, D), k.transpose(1, 2), alpha=D**-0.5
    )  # (K, H/K T, T)
    return (scores.softmax(-1) @ v).view(H, T, D)


def by_document(q, k, v, documents):
    """Attention of packed rows on a CPU, each document alone: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D)."""
    B, _, T, D = q.shape
    flat = (
        t.transpose(0, 1).reshape(-1, B * T, D).split(documents.lengths, dim=1) for t in (q, k, v)
    )
    y = torch.cat([document_attention(*document) for document in zip(*flat, strict=True)], dim=1)
    return y.view(-1, B, T, D).transpose(0, 1)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    COLUMN = ("q_proj", "k_proj", "v_proj")  # how devices share it: nano/tensor.py
    ROW = ("o_proj",)
    PER_HEAD = ("q_norm", "k_norm")

    def __init__(self, cfg):
        super().__init__()
        self.head_dim, D = cfg.head_dim, cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * D, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_heads * D, cfg.dim, bias=cfg.o_bias)
        self.q_norm = RMSNorm(D, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.by_document = by_document  # a compiled layer leaves its graph for it (nano/runtime.py)

    def project(self, x, rope, positions, cache):
        """q (B, T, H, D), k and v (B, T, K, D), rotated; k and v are written to the cache too, if there is one."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = rotate(q.to(v.dtype), *rope), rotate(k.to(v.dtype), *rope)
        if cache is not None:  # slot = position, row by row
            keys, values = cache  # (B, K, S, D)
            rows = torch.arange(B, device=x.device)[:, None]
            keys[rows, :, positions], values[rows, :, positions] = (
                k.to(keys.dtype),
                v.to(values.dtype),
            )
        return q, k, v

    def forward(self, x, rope, mask, positions, cache):
        B, T, _ = x.shape
        q, k, v = self.project(x, rope, positions, cache)
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache)  # (B, K, S, D)
        else:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        q = q.transpose(1, 2)
        if isinstance(mask, BlockMask):
            flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
            y = flex(q, k, v, block_mask=mask, enable_gqa=True)
        elif isinstance(mask, Documents):
            y = self.by_document(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    COLUMN = ("gate_proj", "up_proj")
    ROW = ("down_proj",)

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.dim, bias=cfg.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, mask, positions=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class ScoreHead(nn.Linear):
    """hidden (B, T, C) -> one fp32 number a token (B, T). fp32 because a bf16 score has 8 significant bits: pairs would tie."""

    def __init__(self, dim):
        super().__init__(dim, 1, bias=False)
        nn.init.normal_(
            self.weight, std=1 / math.sqrt(dim + 1)
        )  # Stiennon et al. 2020 (arXiv:2009.01325)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class Transformer(nn.Module):
    VOCABULARY = ("model.embed_tokens", "lm_head")

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(cfg.vocab_size, cfg.dim),
                layers=nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers)),
                norm=RMSNorm(cfg.dim, cfg.norm_eps),
            )
        )
        if cfg.head == "score":
            self.score = ScoreHead(cfg.dim)
        elif not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(
            cfg
        )  # no buffer: it must stay fp32 whatever dtype the model is cast to
        self.recompute = (
            None  # set to a function(layer, *inputs) to recompute activations in the backward pass
        )

    def init_weights(self, std=0.02):
        """N(0, std) for matrices, with the two projections that write to the residual stream scaled by 1/sqrt(2L) (GPT-2)."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.ones_(p) if name.endswith("weight") else nn.init.zeros_(p)
            elif name != "score.weight":
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std / math.sqrt(2 * self.cfg.n_layers) if residual else std)
        return self

    @property
    def layers(self):
        return self.model["layers"]

    @property
    def head_weight(self):
        """(V, C): the output matrix, which is the embedding's when they are tied."""
        return self.model["embed_tokens"].weight if self.cfg.tie_embeddings else self.lm_head.weight

    def logits(self, hidden):
        return F.linear(hidden, self.head_weight)

    def rotary(self, positions):
        """cos, sin (B, T, 1, D) in fp32."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos(), angles.sin()

    def forward(self, batch):
        """batch, a dict -> hidden states (M, C) of the flat positions batch["index"] (M,); without
        "index" of all positions, (B * T, C).

        It reads "tokens" (B, T) and, where the batch has them, "positions" and "docs" (B, T): see
        `hidden`. These are integers. FSDP casts the floating tensors of its arguments to bf16, so
        weights and the like are left to the loss, which has the batch as it was.
        """
        hidden = self.hidden(batch["tokens"], batch.get("positions"), batch.get("docs"))
        hidden = hidden.flatten(0, 1)
        return hidden[batch["index"]] if "index" in batch else hidden

    def hidden(self, tokens, positions=None, docs=None, cache=None):
        """tokens (B, T) -> hidden (B, T, C) after the last norm; feed it to .logits, .score or losses.py.

        positions (B, T): rotary positions; default: restarting with each document. docs (B, T): document ids; default: one.
        cache: per layer (keys, values), each (B, K, S, D); this call's go to the slots `positions`, which are then required.
        """
        B, T = tokens.shape
        if positions is None:
            index = torch.arange(T, device=tokens.device).expand(B, T)
            positions = index
            if docs is not None:
                positions = index - begins(docs)
        windows = self.cfg.windows or (0,) * self.cfg.n_layers
        masks = {}  # None where plain causal attention is right: the fastest kernels have it built in
        for w in set(windows):
            if cache is not None:
                masks[w] = cache_mask(positions, cache[0][0].shape[2], w)
            elif docs is not None:
                masks[w] = attention_mask(docs, w, self.cfg.head_dim)
            else:
                masks[w] = (
                    attention_mask(torch.zeros_like(tokens), w, self.cfg.head_dim)
                    if 0 < w < T
                    else None
                )
        x = self.model["embed_tokens"](tokens)
        if torch.is_autocast_enabled(
            x.device.type
        ):  # one dtype along the residual stream, whatever the weights are held in
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = [r.to(x.dtype) for r in self.rotary(positions)]
        for i, layer in enumerate(self.layers):
            inputs = (x, rope, masks[windows[i]])
            if cache is not None:
                x = layer(*inputs, positions, cache[i])
            elif self.recompute is not None and torch.is_grad_enabled():
                x = self.recompute(layer, *inputs)
            else:
                x = layer(*inputs)
        return self.model["norm"](x)

    def new_cache(self, batch, slots, dtype=None):
        """Empty key/value cache: per layer (keys, values), each (batch, K, slots, D)."""
        weight = self.model["embed_tokens"].weight
        shape = (batch, self.cfg.n_kv_heads, slots, self.cfg.head_dim)
        new = functools.partial(
            torch.zeros, shape, dtype=dtype or weight.dtype, device=weight.device
        )
        return [(new(), new()) for _ in range(self.cfg.n_layers)]

    def flops_per_token(self, length, trained="all"):
        """Floating-point operations a token costs in one training step (forward and backward) on rows of `length` tokens.
        6 per matrix weight (4 where only adapters are trained: no weight gradients) + 12 L H D T/2 for causal attention
        (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        matrices = sum(
            p.numel()
            for n, p in self.named_parameters()
            if p.dim() == 2 and "embed_tokens" not in n
        )
        matrices += (
            self.head_weight.numel() if self.cfg.tie_embeddings and self.cfg.head == "lm" else 0
        )
        attention = self.cfg.n_layers * self.cfg.n_heads * self.cfg.head_dim * length
        return (6 if trained == "all" else 4) * matrices + 6 * attention
