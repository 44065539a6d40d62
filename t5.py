"""T5, an encoder-decoder (Raffel et al. 2020, arXiv:1910.10683), in one file that needs torch and
model.py alone. T5, T5 v1.1, Flan-T5 and mT5 are choices of ModelConfig.

    model = T5(ModelConfig(...))
    hidden = model(batch)           # (M, C), of the decoder's positions batch["index"]

The encoder reads a prompt, and each of its tokens sees all others. The decoder begins with
`start_ids` and predicts the answer. It sees the prompt through cross-attention. A position is known
by its distance alone: each head adds a trained number to the score of a distance, and nothing else
limits the length.

A batch has encoder_tokens and encoder_docs (B, S) for the encoder, and tokens and docs (B, T) for
the decoder. Document i of the encoder's row is the prompt of document i of the decoder's row.
Documents are numbered 0, 1, ... along a row, padding behind them has the id -1, and no attention
crosses documents. The stages call it as they call model.py: nano/batches.py splits the rows.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from model import MLP, Extras, RMSNorm, ScoreHead, remember


@dataclass
class ModelConfig(model.ModelConfig):
    """model.ModelConfig, of which it uses the sizes, mlp, activation, logit_scale and the like.
    n_layers are the encoder's."""

    norm_eps: float = 1e-6
    positions: str = "distance"
    max_positions: int = 2**31 - 1  # there is no last one
    mlp: str = "plain"
    activation: str = "relu"
    family: str = "t5"
    n_decoder_layers: int = 8
    buckets: int = 32  # of distances, in which they share a number
    far: int = 128  # from this distance on, all share the last bucket
    start_id: int = 0  # the token with which the decoder begins

    def build(self):
        return T5(self)


# ---------------------------------------------------------------------- distances


def bucket(distance, cfg, both):
    """The bucket of each distance, the position of a key less that of the query, int64.

    Half of the buckets are for short distances, one each, and half for longer ones, evenly in their
    logarithm. both: half of all are for keys behind the query. Otherwise there are no such keys.
    """
    count = cfg.buckets // 2 if both else cfg.buckets
    behind = count * (distance > 0) if both else 0
    length = distance.abs() if both else (-distance).clamp(min=0)
    exact = count // 2
    log = (length.clamp(min=1).float() / exact).log() / math.log(cfg.far / exact)
    longer = exact + (log * (count - exact)).long().clamp(max=count - exact - 1)
    return behind + torch.where(length < exact, length, longer)


# ---------------------------------------------------------------------- attention


def attend(q, k, v, seen):
    """softmax(q k^T + seen) v, without a scale, which T5's weights contain.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). seen: Documents, or numbers that are added
    to the scores, (B or 1, H or 1, T, S), which are -inf where a token must not look.
    """
    if isinstance(seen, Documents):
        return seen.attend(q, k, v)
    if q.shape[2] == 1 and q.device.type == "cpu":
        # plain products beat the fused kernel, which is made for long queries
        B, H, S, _ = k.shape
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = torch.bmm(q, k.mT).view(B, H, 1, S).float() + seen
        return torch.bmm(scores.softmax(-1).to(v.dtype).flatten(0, 1), v).view(B, H, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)


def by_document(docs):
    """Whether attention runs document by document. Elsewhere a mask tells documents apart."""
    return docs.device.type == "cpu"


def document_lengths(docs):
    """docs (B, T) -> the lengths of all documents along the flattened rows, and for each whether it
    is one. The padding at the end of a row is none, unless the row has nothing else."""
    lengths, real = [], []
    for row in docs:
        padding, *rest = torch.bincount(row + 1).tolist()
        lengths += [*rest, padding]
        real += [True] * len(rest) + [not rest]
    return lengths, real


@dataclass(eq=False)
class Documents:
    """What the tokens of packed rows see on a CPU: the document of the same number. queries, keys:
    the lengths of documents along the flattened rows. biases: of each document, what is added to
    its scores, (H or 1, T or 1, S or 1), or None where nothing is seen."""

    queries: list
    keys: list
    biases: list

    def attend(self, q, k, v):
        """Each document alone: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        lengths = self.queries, self.keys, self.keys
        flat = [t.transpose(0, 1).reshape(H, -1, D) for t in (q, k, v)]
        split = [t.split(n, dim=1) for t, n in zip(flat, lengths, strict=True)]
        parts = []
        for q, k, v, bias in zip(*split, self.biases, strict=True):
            if bias is None:
                parts.append(torch.zeros_like(q))
            else:
                parts.append(torch.baddbmm(bias, q, k.mT).softmax(-1) @ v)
        return torch.cat(parts, dim=1).view(H, B, T, D).transpose(0, 1)


# ---------------------------------------------------------------------- layers


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.extras = Extras(scale=1.0)  # nothing more, says nano/estimate.py
        width = cfg.n_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, width, bias=False)
        self.k_proj = nn.Linear(cfg.dim, width, bias=False)
        self.v_proj = nn.Linear(cfg.dim, width, bias=False)
        self.o_proj = nn.Linear(width, cfg.dim, bias=False)

    def heads(self, x):
        """(B, T, H D) -> (B, H, T, D)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x):
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def forward(self, x, k, v, seen):
        y = attend(self.heads(self.q_proj(x)), k, v, seen)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, cfg, decoder):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.cross_attn = None
        if decoder:
            self.cross_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
            self.cross_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, seen, memory=None, memory_seen=None, slots=None, cache=None):
        """x (B, T, C) -> (B, T, C). memory (B, S, C): what the encoder made of the prompts. In a
        cache (see T5.new_cache) their keys and values stand in the first slots of each row."""
        normed = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(normed)
        if cache is not None:
            k, v = (t[:, :, -seen.shape[-1] :] for t in remember(k, v, slots, cache))
        x = x + self.self_attn(normed, k, v, seen)
        if self.cross_attn is not None:
            if cache is None:
                k, v = self.cross_attn.keys_values(memory)
            else:
                k, v = (t[:, :, : memory_seen.shape[-1]] for t in cache)
            x = x + self.cross_attn(self.cross_layernorm(x), k, v, memory_seen)
        return x + self.mlp(self.post_attention_layernorm(x))

    def compile(self, *args, **kwargs):
        # each batch would need a new graph
        Documents.attend = torch.compiler.disable(Documents.attend)
        super().compile(*args, **kwargs)


class Stack(nn.Module):
    """The encoder, or the decoder."""

    def __init__(self, cfg, decoder):
        super().__init__()
        self.cfg = cfg
        self.decoder = decoder
        self.distance_bias = nn.Embedding(cfg.buckets, cfg.n_heads)  # of all layers
        count = cfg.n_decoder_layers if decoder else cfg.n_layers
        self.layers = nn.ModuleList(Block(cfg, decoder) for _ in range(count))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)

    def bias(self, distance, dtype):
        """distance (..., T, S) -> what is added to the scores (..., H, T, S). The decoder does not
        look behind."""
        bias = self.distance_bias(bucket(distance, self.cfg, not self.decoder))
        bias = bias.movedim(-1, -3).to(dtype)
        if self.decoder:
            bias = bias.masked_fill((distance > 0).unsqueeze(-3), -math.inf)
        return bias

    def seen(self, docs, dtype):
        """What the tokens of rows with docs (B, T) see of their own row, for `attend`."""

        def bias(length):
            index = torch.arange(length, device=docs.device)
            return self.bias(index - index[:, None], dtype)

        if by_document(docs):
            lengths, real = document_lengths(docs)
            # each length once, so that all layers add to the same gradient
            by_length = {n: bias(n) for n, is_one in zip(lengths, real, strict=True) if is_one}
            biases = [by_length[n] if r else None for n, r in zip(lengths, real, strict=True)]
            return Documents(lengths, lengths, biases)
        return bias(docs.shape[1]).masked_fill(~same_document(docs, docs), -math.inf)


def same_document(docs, others):
    """docs (B, T), others (B, S) -> bool (B, 1, T, S): whether tokens of both belong together.

    A token that belongs to none, which is padding, sees all, because softmax needs some.
    """
    same = docs[:, :, None] == others[:, None, :]
    return (same | ~same.any(-1, keepdim=True))[:, None]


def cross_seen(docs, memory_docs, dtype):
    """What the tokens of the decoder see of the encoder's, for `attend`. Distances do not count."""
    zero = torch.zeros(1, 1, 1, 1, dtype=dtype, device=docs.device)
    if by_document(docs):
        (queries, real), (keys, _) = document_lengths(docs), document_lengths(memory_docs)
        return Documents(queries, keys, [zero[0] if is_one else None for is_one in real])
    return zero.masked_fill(~same_document(docs, memory_docs), -math.inf)


# ---------------------------------------------------------------------- the model


class T5(model.Transformer):
    """An encoder-decoder that the stages call as they call a decoder."""

    def __init__(self, cfg):
        nn.Module.__init__(self)
        self.cfg = cfg
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.model["encoder"] = Stack(cfg, decoder=False)
        self.model["decoder"] = Stack(cfg, decoder=True)
        if cfg.head == "score":
            self.score = ScoreHead(cfg.dim)
        elif not cfg.tie_embeddings:
            self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        self.start_ids = (cfg.start_id,)
        self.ropes = {}
        self.recompute = None  # as in Transformer

    def init_weights(self, std=1.0):
        """N(0, std^2 / inputs) for matrices, N(0, std) for the embedding, 1 for norms. The query's
        is divided by D too, in the place of attention's scale. Returns the model."""
        cfg = self.cfg
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.ones_(p)
            elif name != "score.weight":
                width = p.shape[1] * (cfg.head_dim if "q_proj" in name else 1)
                width = 1 if "embed_tokens" in name else width
                width = cfg.dim if "distance_bias" in name else width
                nn.init.normal_(p, std=std / math.sqrt(width))
        return self

    @property
    def layers(self):
        """All blocks, the encoder's first."""
        return [*self.model["encoder"].layers, *self.model["decoder"].layers]

    def forward(self, batch):
        """Hidden states (M, C) of the decoder's flat positions batch["index"] (M,), or of all of
        them, (B * T, C). ValueError for a batch without prompts."""
        if "encoder_tokens" not in batch:
            raise ValueError("an encoder-decoder needs prompts for its encoder: encoder_tokens")
        docs, memory_docs = batch["docs"], batch["encoder_docs"]
        memory = self.encode(batch["encoder_tokens"], memory_docs)
        x = self.embed(batch["tokens"])
        seen = self.model["decoder"].seen(docs, x.dtype)
        memory_seen = cross_seen(docs, memory_docs, x.dtype)
        hidden = self.run("decoder", x, seen, memory, memory_seen).flatten(0, 1)
        return hidden[batch["index"]] if "index" in batch else hidden

    def embed(self, tokens):
        x = self.model["embed_tokens"](tokens)
        if torch.is_autocast_enabled(x.device.type):
            # one dtype along the residual stream, whatever the dtype of the weights
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def encode(self, tokens, docs):
        """tokens, docs (B, S) -> the encoder's last hidden states (B, S, C)."""
        x = self.embed(tokens)
        return self.run("encoder", x, self.model["encoder"].seen(docs, x.dtype))

    def run(self, stack, x, *inputs, slots=None, cache=None):
        """The layers and the last norm of a stack. ValueError where float16 overflows."""
        for i, layer in enumerate(self.model[stack].layers):
            if self.recompute is not None and torch.is_grad_enabled():
                x = self.recompute(layer, x, *inputs)
            elif cache is None:
                x = layer(x, *inputs)
            else:
                x = layer(x, *inputs, slots, cache[i])
            if x.dtype == torch.float16 and not x.isfinite().all():
                raise ValueError(
                    f"layer {i} of the {stack} gives numbers beyond 65,504, which float16 cannot "
                    "hold, as the MLP of a T5 often does: use bfloat16 or float32"
                )
        return self.model[stack].norm(x)

    # ---- decoding

    def new_cache(self, batch, slots, dtype=None):
        """An empty key/value cache: per layer of the decoder (keys, values), each
        (batch, H, slots, D), and last (ends,), int64 (batch, 1, slots, 1).

        The first slots of a row hold the prompt's keys and values for cross-attention, and those
        behind them the decoder's own. So one number of slots and one position serve both. Where a
        row's prompt ends stands in its first slot of `ends`.
        """
        cfg, weight = self.cfg, self.model["embed_tokens"].weight
        shape = batch, cfg.n_heads, slots, cfg.head_dim
        like = dict(dtype=dtype or weight.dtype, device=weight.device)
        layers = self.model["decoder"].layers
        pairs = [tuple(torch.zeros(shape, **like) for _ in range(2)) for _ in layers]
        return [*pairs, (torch.zeros(batch, 1, slots, 1, dtype=torch.int64, device=weight.device),)]

    def prefill(self, tokens, lengths, cache, positions=None):
        """Puts prompts, the first lengths (B,) of tokens (B, S), into a cache. positions: None,
        because an encoder reads a prompt as a whole."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        memory = self.encode(tokens, torch.where(index < lengths[:, None], 0, -1))
        *layers, (ends,) = cache
        for layer, pair in zip(self.model["decoder"].layers, layers, strict=True):
            remember(*layer.cross_attn.keys_values(memory), None, pair)
        ends[:] = lengths[:, None, None, None]

    def hidden(self, tokens, positions, cache):
        """What the decoder makes of tokens (B, T), which go into the slots `positions` (B, T) of a
        cache -> hidden states (B, T, C). The first slot of a row is that behind its prompt."""
        *layers, (ends,) = cache
        ends = ends[:, 0, 0, 0]
        first, last = 0, layers[0][0].shape[2]
        if tokens.device.type == "cpu":  # reads no more of the cache than some row needs
            first, last = int(ends.min()), int(ends.max())
        x = self.embed(tokens)
        slots = torch.arange(layers[0][0].shape[2], device=tokens.device)
        prompt = slots[:last] < ends[:, None]
        memory_seen = torch.zeros_like(prompt, dtype=x.dtype).masked_fill(~prompt, -math.inf)
        # (B, T, S). A row that is done idles in slot 0, and its token has to see something.
        places = positions.clamp(min=first)[..., None]
        before = slots[first:] < torch.minimum(ends[:, None, None], places)
        seen = self.model["decoder"].bias(slots[first:] - places, x.dtype)
        seen = seen.masked_fill(before[:, None], -math.inf)
        inputs = seen, None, memory_seen[:, None, None]
        return self.run("decoder", x, *inputs, slots=positions, cache=layers)

    def flops_per_token(self, length, trained="all"):
        """As Transformer.flops_per_token, for rows whose tokens are half the encoder's. A token
        goes through one of the two stacks."""
        matrices = sum(p.numel() for p in self.model.parameters() if p.dim() == 2) / 2
        matrices -= self.model["embed_tokens"].weight.numel() / 2
        if self.cfg.head == "lm":
            matrices += self.head_weight.numel() / 2
        attention = self.cfg.n_layers * self.cfg.n_heads * self.cfg.head_dim * length
        return (6 if trained == "all" else 4) * matrices + 6 * attention
