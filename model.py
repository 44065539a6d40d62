"""A decoder-only transformer with slots, in one file that needs torch alone.

A slot is a field of ModelConfig with a named choice: norm, positions, mlp, activation, biases,
windows, the head. Llama, SmolLM2, Mistral, Qwen2, Qwen3 and GPT-2 are such choices. Nothing here
asks for a family's name; nano/families.py does. Every family has the parameter names of Hugging
Face's Llama.

    model = Transformer(ModelConfig(...))
    hidden = model.hidden(tokens)   # (B, T) -> (B, T, C)
    logits = model.logits(hidden)   # (B, T, V); nano/losses.py never builds them all
    hidden = model(batch)           # (M, C), of the positions batch["index"], which a loss needs

In packed rows `docs` (B, T) is the id of each token's document. Attention never crosses documents.
Padding is a document of its own with the id -1, so a padded row needs no other mask.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

SHORT = 512  # most tokens of a document that document_attention multiplies out

ACTIVATIONS = dict(
    silu=F.silu,
    gelu=F.gelu,
    gelu_tanh=functools.partial(F.gelu, approximate="tanh"),  # GPT-2's
    relu=F.relu,
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
    norm: str = "rms"  # rms | layer (with a bias), before each half of a block
    norm_eps: float = 1e-5
    positions: str = "rope"  # rope | learned: an embedding of max_positions
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" | "linear", ...} as in config.json
    max_positions: int = 2048
    windows: tuple = ()  # of each layer: how many tokens it sees, the current one included; 0: all
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's q and k
    mlp: str = "gated"  # gated: down(act(gate(x)) * up(x)) | plain: down(act(up(x)))
    activation: str = "silu"  # one of ACTIVATIONS
    mlp_bias: bool = False
    tie_embeddings: bool = False
    head: str = "lm"  # lm: next-token logits; score: one number a token (reward and value models)
    family: str = "llama"  # the `model_type` of config.json, for saving alone


# ---------------------------------------------------------------------- positions


def rope_frequencies(cfg):
    """Inverse frequencies (D/2,) of the rotary embedding, fp32 (Su et al. 2021, arXiv:2104.09864).

    "llama3" scaling is that of the Llama 3.1 release. It stretches long wavelengths by `factor` and
    blends those between the two limits. ValueError for a scaling that is not supported.
    """
    steps = torch.arange(0, cfg.head_dim, 2, dtype=torch.float32, device="cpu")
    inv = 1.0 / cfg.rope_theta ** (steps / cfg.head_dim)
    scaling = cfg.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return inv
    if kind == "linear":
        return inv / scaling["factor"]
    if kind == "llama3":
        # how often each frequency turns over the original context
        turns = scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # 1 keeps a short wavelength, 0 stretches a long one
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * inv + (1 - keep) * inv / scaling["factor"]
    raise ValueError(f"rope scaling {kind!r} is not supported (default, linear, llama3 are)")


def rotate(x, cos, sin):
    """Rotates x (B, T, heads, D) by cos, sin (B, T, 1, D). Pairs are (i, i + D/2), Hugging Face's
    order."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


# ---------------------------------------------------------------------- what a token sees


def begins(docs):
    """docs (B, T) -> (B, T): where in its row each token's document begins."""
    starts = docs.diff(dim=1, prepend=docs[:, :1] - 1) != 0
    index = torch.arange(docs.shape[1], device=docs.device)
    # int32, because XLA fails on wide rows in int64
    return (starts * index).int().cummax(dim=1).values


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


@dataclass(frozen=True)
class Extras:
    """What a layer adds to softmax(q k^T) v. ALiBi slopes, a soft cap or sinks would be a field
    here and a branch in `attend`."""

    scale: float


def attend(q, k, v, seen, extras):
    """Computes all attention, in training, for prompts and in decoding, and chooses the kernel.

    q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). seen: what attention_mask or cache_mask
    returned. With None every token sees itself and all before it, which the fastest kernels have
    built in.
    """
    if isinstance(seen, BlockMask):
        # a compiled layer takes flex_attention into its graph; uncompiled it builds all scores
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        return flex(q, k, v, block_mask=seen, scale=extras.scale, enable_gqa=True)
    if isinstance(seen, Documents):
        return seen.attend(q, k, v, extras)
    if q.shape[2] == 1 and seen is not None:
        return one_query(q, k, v, seen, extras)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=extras.scale, enable_gqa=True
    )


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention)


def one_query(q, k, v, seen, extras):
    """A decoding step: q (B, H, 1, D), seen (B, 1, 1, S) -> (B, H, 1, D).

    The query heads that share a key/value head form one block, so the cache is read once for all of
    them. On a CPU plain products beat the fused kernel, which is made for long queries.
    """
    B, K, S, D = k.shape
    if q.device.type != "cpu":
        q = q.reshape(B, K, -1, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=extras.scale)
        return y.reshape(B, -1, 1, D)
    q, k, v = (t.reshape(B * K, -1, D) for t in (q, k, v))
    # bmm, because matmul of four dimensions would copy the cache
    scores = torch.bmm(q, k.mT).view(B, K, -1, S).float() * extras.scale
    probs = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
    return torch.bmm(probs.view(B * K, -1, S), v).view(B, -1, 1, D)


def document_attention(q, k, v, extras):
    """Causal attention within one document, on a CPU: q (H, T, D), k and v (K, T, D) -> (H, T, D).

    A short document in bf16 is two matrix products, which take a third of the time of torch's CPU
    kernel (bench/attention.py). autograd then keeps H x T x T probabilities, so longer ones stay
    with the kernel.
    """
    H = len(q)
    K, T, D = k.shape
    if q.dtype != torch.bfloat16 or T > SHORT:
        q, k, v = q[None], k[None], v[None]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=extras.scale, enable_gqa=True
        )[0]
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
def _keep_documents_uncompiled():
    """A compiled layer leaves its graph for documents. Each batch would need a new graph."""
    Documents.attend = torch.compiler.disable(Documents.attend)


# ---------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        # autocast would return fp32; the kernel computes in fp32 in any case
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)


NORMS = dict(rms=RMSNorm, layer=LayerNorm)


class Attention(nn.Module):
    # how the devices of a tensor group share the layers (nano/tensor.py)
    COLUMN = ("q_proj", "k_proj", "v_proj")
    ROW = ("o_proj",)
    PER_HEAD = ("q_norm", "k_norm")

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = D = cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * D, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * D, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.n_heads * D, cfg.dim, bias=cfg.o_bias)
        norm = RMSNorm if cfg.qk_norm else nn.Identity
        self.q_norm = norm(D, cfg.norm_eps)
        self.k_norm = norm(D, cfg.norm_eps)
        self.extras = Extras(scale=1 / math.sqrt(D))

    def forward(self, x, rope, seen, slots=None, cache=None):
        heads = *x.shape[:2], -1, self.head_dim
        q = self.q_norm(self.q_proj(x).view(heads))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (B, T, K, D)
        v = self.v_proj(x).view(heads)
        if rope is not None:
            q = rotate(q.to(v.dtype), *rope)
            k = rotate(k.to(v.dtype), *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = remember(k, v, slots, cache)
        y = attend(q, k, v, seen, self.extras)
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
    rows = torch.arange(len(k), device=k.device)[:, None]
    for cached, new in zip(cache, (k, v), strict=True):
        cached[rows, :, slots] = new.transpose(1, 2).to(cached.dtype)
    return [cached.to(k.dtype) for cached in cache]


class MLP(nn.Module):
    COLUMN = ("gate_proj", "up_proj")
    ROW = ("down_proj",)

    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.mlp == "gated"
        self.activation = ACTIVATIONS[cfg.activation]
        if self.gated:
            self.gate_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=cfg.mlp_bias)
        self.up_proj = nn.Linear(cfg.dim, cfg.ffn_dim, bias=cfg.mlp_bias)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.dim, bias=cfg.mlp_bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.activation(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = NORMS[cfg.norm]
        self.input_layernorm = norm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = norm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, seen, slots=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, seen, slots, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def compile(self, *args, **kwargs):
        _keep_documents_uncompiled()
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


# ---------------------------------------------------------------------- the model


class Transformer(nn.Module):
    VOCABULARY = ("model.embed_tokens", "lm_head")

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(cfg.vocab_size, cfg.dim)
        if cfg.positions == "learned":
            self.model["embed_positions"] = nn.Embedding(cfg.max_positions, cfg.dim)
        self.model["layers"] = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.model["norm"] = NORMS[cfg.norm](cfg.dim, cfg.norm_eps)
        if cfg.head == "score":
            self.score = ScoreHead(cfg.dim)
        elif not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        # not a buffer, because it must stay fp32 when the model is cast
        self.inv_freq = rope_frequencies(cfg) if cfg.positions == "rope" else None
        # a function(layer, *inputs) that recomputes activations in backward; None: they are kept
        self.recompute = None

    def init_weights(self, std=0.02):
        """N(0, std) for matrices, 1 for norms, 0 for biases. The two projections that write to the
        residual stream are scaled by 1/sqrt(2L), as in GPT-2. Returns the model."""
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
        """The output matrix (V, C). With tied embeddings it is the embedding's."""
        return self.model["embed_tokens"].weight if self.cfg.tie_embeddings else self.lm_head.weight

    def logits(self, hidden):
        return F.linear(hidden, self.head_weight)

    def forward(self, batch):
        """Hidden states (M, C) of the flat positions batch["index"] (M,), or of all positions,
        (B * T, C), if the batch has no "index".

        It reads "tokens" (B, T) and, if they are there, "positions" and "docs" (B, T), as `hidden`
        does. It reads integers only, because FSDP casts the floating tensors of its arguments to
        bf16.
        """
        hidden = self.hidden(batch["tokens"], batch.get("positions"), batch.get("docs"))
        hidden = hidden.flatten(0, 1)
        return hidden[batch["index"]] if "index" in batch else hidden

    def hidden(self, tokens, positions=None, docs=None, cache=None):
        """tokens (B, T) -> hidden states (B, T, C) after the last norm, for .logits, .score or
        nano/losses.py.

        positions (B, T): where each token stands in its document. By default it is counted.
        docs (B, T): document ids. By default a row is one document.
        cache: per layer (keys, values), each (B, K, S, D). With a cache, `positions` are also the
        slots of the tokens, which see all slots up to their own. Without positions they begin their
        rows.
        """
        slots = None if cache is None else positions
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            if docs is not None:
                positions = positions - begins(docs)
        windows = self.cfg.windows or (0,) * self.cfg.n_layers
        seen = {w: self.seen(w, positions, docs, cache, slots) for w in set(windows)}
        x = self.model["embed_tokens"](tokens)
        if self.cfg.positions == "learned":
            # padding may count further than any document, but nobody looks at it
            x = x + self.model["embed_positions"](positions.clamp(max=self.cfg.max_positions - 1))
        if torch.is_autocast_enabled(x.device.type):
            # one dtype along the residual stream, whatever the dtype of the weights
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rope = None
        if self.cfg.positions == "rope":
            rope = [r.to(x.dtype) for r in self.rotary(positions)]
        for i, (layer, window) in enumerate(zip(self.layers, windows, strict=True)):
            if self.recompute is not None and torch.is_grad_enabled():
                x = self.recompute(layer, x, rope, seen[window])
            else:
                layer_cache = None if cache is None else cache[i]
                x = layer(x, rope, seen[window], slots, layer_cache)
        return self.model["norm"](x)

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

    def rotary(self, positions):
        """positions (B, T) -> cos, sin (B, T, 1, D) in fp32."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None, None].float() * self.inv_freq.repeat(2)
        return angles.cos(), angles.sin()

    def new_cache(self, batch, slots, dtype=None):
        """An empty key/value cache: per layer (keys, values), each (batch, K, slots, D)."""
        weight = self.model["embed_tokens"].weight
        shape = batch, self.cfg.n_kv_heads, slots, self.cfg.head_dim
        like = dict(dtype=dtype or weight.dtype, device=weight.device)
        return [tuple(torch.zeros(shape, **like) for _ in range(2)) for _ in self.layers]

    def flops_per_token(self, length, trained="all"):
        """Floating-point operations of one token in a training step, forward and backward, on rows
        of `length` tokens.

        6 per matrix weight, or 4 where only adapters are trained and weights get no gradient. Plus
        12 L H D T/2 for causal attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
        """
        # looking up a row of an embedding is no product
        modules = [m for m in self.modules() if not isinstance(m, nn.Embedding)]
        matrices = sum(map(matrix_size, modules))
        if self.cfg.tie_embeddings and self.cfg.head == "lm":
            matrices += self.head_weight.numel()
        attention = self.cfg.n_layers * self.cfg.n_heads * self.cfg.head_dim * length
        return (6 if trained == "all" else 4) * matrices + 6 * attention


def matrix_size(module):
    """How many numbers the matrices of a module have, without those of its children. A quantised
    layer has them all, in fewer bytes."""
    own = list(module.parameters(recurse=False))
    if own and hasattr(module, "in_features"):
        return module.in_features * module.out_features
    return sum(p.numel() for p in own if p.dim() == 2)


class NoInit(torch.overrides.TorchFunctionMode):
    """Turns the functions of torch.nn.init off. On the meta device they would compute nothing, but
    import the compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (args or tuple(kwargs.values()))[0]
        return func(*args, **(kwargs or {}))


def empty(cfg):
    """A Transformer without memory. Its parameters are on the meta device, to be assigned."""
    with torch.device("meta"), NoInit():
        return Transformer(cfg)
