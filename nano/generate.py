"""Batched sampling with a key/value cache: prompts of any lengths in, tokens and their log-probabilities out.

    made = generate(model, prompts, max_new_tokens=128, stop_ids=tok.stop_ids)      # prompts: lists of ids
    made.tokens[i], made.logprobs[i], made.finished[i]

`batch_size` rows are decoded together, one token a step. A row that ends makes room: the next prompt moves in, and when none
waits the batch shrinks, so that answers of unequal length cost their sum and not rows x longest. The sample drawn depends on
(seed, sample index) and the model alone, not on its neighbours in the batch, the order of refills or the device.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRALinear
from model import Attention
from nano.config import UserError

PREFILL = 8192  # tokens of prompt that one forward takes


@dataclass
class Samples:
    """One entry per sample, sample g of prompt i at i * group + g. A stop id is part of the tokens, the prompt is not."""

    tokens: list = field(default_factory=list)  # lists of ids
    logprobs: list = field(default_factory=list)  # lists of floats, see `choose`
    finished: list = field(
        default_factory=list
    )  # True: ended by a stop id or by on_token; False: cut at its length limit
    row_steps: int = (
        0  # rows computed, summed over the steps; the tokens' share of it is what was of use
    )


# ---------------------------------------------------------------------------------------------------- sampling


def keep_from(logits, top_k=0, top_p=1.0):
    """The smallest logit that stays in each row, (R, 1): of the top_k likeliest tokens (0: all), the fewest whose probabilities
    add up to top_p (Holtzman et al. 2019, arXiv:1904.09751). What equals it stays too."""
    V = logits.shape[-1]
    # sorting a whole vocabulary is slow on a CPU, and 1,024 tokens mostly hold top_p
    for count in (top_k,) if top_k else (1024, V) if logits.device.type == "cpu" else (V,):
        best = logits.topk(min(count, V)).values
        norm = best if top_k else logits
        probs = (best - norm.logsumexp(-1, keepdim=True)).exp()
        if top_k or count >= V or (probs.sum(-1) > top_p + 1e-3).all():
            break
    return best.masked_fill(probs.cumsum(-1) - probs >= top_p, torch.inf).amin(-1, keepdim=True)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token a row, drawn by inverting the distribution function at `uniform`. logits (R, V), uniform (R,) in [0, 1).

    -> tokens (R,), logprobs (R,) fp32. Temperature 0 takes the likeliest token. The log-probability is that under
    softmax(logits / temperature) *before* top_k and top_p (temperature 0: softmax(logits)): without those filters it is the
    distribution sampled from, which is what policy gradients need; with them the token was likelier than it says.
    """
    logits = logits.float()
    if temperature == 0:
        best, token = logits.log_softmax(-1).max(-1)
        return token, best
    logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    if top_k or top_p < 1:
        probs = probs.masked_fill(logits < keep_from(logits, top_k, top_p), 0.0)
    total = probs.cumsum(-1)
    # the first token at which the sum exceeds the threshold: one of probability 0 never is
    threshold = uniform[:, None] * total[:, -1:]
    if logits.device.type == "xla":  # has no searchsorted
        token = (total <= threshold).sum(-1, keepdim=True)
    else:
        token = torch.searchsorted(total, threshold, right=True)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


# ----------------------------------------------------------------------------------- the model, as decoding wants it


class FrozenLinear(nn.Module):
    """A linear layer that is only read. Packed, its weight lies as oneDNN's kernels read it, where F.linear lays it out anew in
    each call: on a CPU steps are 1.5x faster."""

    def __init__(self, weight, bias, pack):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.packed = (
            pack and weight.numel() >= 2**16
        )  # small ones cost more to call than to compute
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 16)

    def forward(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class DecodeAttention(Attention):
    """Attention with a cache, in its two forms. T > 1: prompts from their first token on. T = 1: a step; the query heads that
    share a key/value head are taken as one block, so that the cache is read once for all of them, and on a CPU plain batched
    products beat the fused kernel, which is made for long queries."""

    window = 0  # of this layer; 0: none

    def forward(self, x, rope, mask, positions, cache):
        B, T, _ = x.shape
        q, k, v = self.project(x, rope, positions, cache)
        keys, values = cache
        K, S, D = keys.shape[1:]
        if T > 1:
            causal = (
                not 0 < self.window < T
            )  # then no mask is needed, which lets the fastest kernels in
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            mask = None if causal else mask
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
            ).transpose(1, 2)
        elif x.device.type == "cpu":
            scores = torch.bmm(q.view(B * K, -1, D), keys.view(B * K, S, D).mT).view(B, K, -1, S)
            weights = (
                (scores.float() * D**-0.5).masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
            )
            y = torch.bmm(weights.view(B * K, -1, S), values.view(B * K, S, D))
        else:
            y = F.scaled_dot_product_attention(q.view(B, K, -1, D), keys, values, attn_mask=mask)
        return self.o_proj(y.reshape(B, T, -1))


def frozen(p, dtype):
    """A parameter in `dtype`. Where it is sharded (FSDP) it is gathered: all ranks must then generate together."""
    if hasattr(p, "full_tensor"):
        p = p.to(device_of(p)).full_tensor()
    return None if p is None else p.detach().to(dtype)


def device_of(p):
    """Where a parameter is used: not always where it waits (FSDP with offload)."""
    return torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device


def snapshot(module, dtype, pack):
    """A copy of a module for decoding: evaluation mode, not compiled, not sharded, all weights in `dtype`. It shares the tensors
    that need neither a cast nor packing, and is made anew for each call of generate, since training changes the weights."""
    if type(module) in (nn.Linear, LoRALinear):
        active = getattr(module, "active", None)
        if (
            active is None or pack
        ):  # where the weight is copied anyway, the adapter is folded into it
            weight = module.weight if active is None else module.weight + module.delta()
            return FrozenLinear(frozen(weight, dtype), frozen(module.bias, dtype), pack)
    sharded = hasattr(
        module, "unshard"
    )  # FSDP put a class of its own in front of the module's, and hooks on it
    kind = type(module).__mro__[2 * sharded]
    new = kind.__new__(DecodeAttention if kind is Attention else kind)
    new.__dict__.update(module.__dict__, training=False, _compiled_call_impl=None)
    if sharded or any(hasattr(p, "full_tensor") for p in module._parameters.values()):
        new.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
    new._parameters = {name: frozen(p, dtype) for name, p in module._parameters.items()}
    new._modules = {name: snapshot(child, dtype, pack) for name, child in module._modules.items()}
    return new


class Batch:
    """The rows being decoded: key/value cache and state, on the device and updated in place, so that a step has a fixed shape,
    nothing in it waits for the device, and CUDA can replay it as one graph."""

    def __init__(self, model, rows, new, stop_ids, sampling, pack, graphs):
        device = device_of(model.head_weight)
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
        self.model, self.sampling, self.device = snapshot(model, self.dtype, pack), sampling, device
        for layer, window in zip(self.model.layers, model.cfg.windows, strict=False):
            layer.self_attn.window = window
        self.head = FrozenLinear(frozen(model.head_weight, self.dtype), None, pack)
        self.stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        self.cache = self.model.new_cache(rows, 0, self.dtype)
        self.graphs = {} if graphs else None  # rows -> graph; None: seen once

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.last, self.position, self.count, self.limit = (
            zeros() for _ in range(4)
        )  # next input, its slot; made, allowed
        self.done = ~zeros(dtype=torch.bool)
        # a row that is done writes on behind its end, where nobody reads: hence one column more than there are tokens
        self.tokens, self.logprobs, self.uniform = (
            zeros(new + 1, dtype=t) for t in (torch.int64, torch.float32, torch.float32)
        )
        self.state = [
            self.last,
            self.position,
            self.count,
            self.limit,
            self.done,
            self.uniform,
            self.tokens,
            self.logprobs,
        ]

    @property
    def slots(self):
        return self.cache[0][0].shape[2]

    def resize(self, slots):
        """Another number of slots. Copied rather than viewed: kernels want the cache of a row and head in one piece."""
        change = slots - self.slots
        self.cache = [tuple(F.pad(t, (0, 0, 0, change)) for t in layer) for layer in self.cache]
        if self.graphs:
            self.graphs.clear()  # they point to the old cache

    def prefill(self, prompts, rows, width):
        """Cache (rows, K, width, D) of the prompts, right-padded; what stands behind a prompt's end is overwritten before any
        token can see it. The last token of a prompt is left to the first step."""
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        for row, ids in zip(tokens, prompts, strict=False):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        cache = self.model.new_cache(rows, width, self.dtype)
        if width:
            positions = torch.arange(width, device=self.device).expand(rows, width)
            self.model.hidden(tokens.to(self.device), positions, cache=cache)
        return cache

    def place(self, slots, prompts, limits, uniforms, cache, sources):
        """New samples for the rows `slots`: their prompts, and where in a prefilled cache each prompt stands."""
        slots, sources = (torch.tensor(i, device=self.device) for i in (slots, sources))
        for layer, filled in zip(self.cache, cache, strict=True):
            for t, new in zip(layer, filled, strict=True):
                t[slots, :, : new.shape[2]] = new[sources]
        put = dict(
            last=[p[-1] for p in prompts], position=[len(p) - 1 for p in prompts], limit=limits
        )
        for name, values in put.items():
            getattr(self, name)[slots] = torch.tensor(values, device=self.device)
        self.count[slots] = 0
        self.done[slots] = self.limit[slots] == 0
        self.uniform[slots] = torch.from_numpy(uniforms).to(self.device)

    def move(self, sources, slots):
        slots, sources = (torch.tensor(i, device=self.device) for i in (slots, sources))
        for t in (*self.state, *(t for layer in self.cache for t in layer)):
            t[slots] = t[sources]

    def step(self, rows):
        """One more token for the first `rows` rows."""
        last, position, count, limit, done, uniform, tokens, logprobs = (
            t[:rows] for t in self.state
        )
        cache = [(keys[:rows], values[:rows]) for keys, values in self.cache]
        hidden = self.model.hidden(last[:, None], position[:, None], cache=cache)
        at = count[:, None]
        token, logprob = choose(
            self.head(hidden[:, 0]), uniform.gather(1, at)[:, 0], **self.sampling
        )
        tokens.scatter_(1, at, token[:, None])
        logprobs.scatter_(1, at, logprob[:, None])
        last.copy_(token)
        count += ~done
        done |= (token[:, None] == self.stop).any(-1) | (count >= limit)
        position.add_(1).masked_fill_(done, 0)  # a row that is done idles in its slot 0

    def advance(self, rows):
        """A step, replayed from a CUDA graph the second time that its shape comes."""
        if self.graphs is None or rows not in self.graphs:
            self.step(rows)
            if self.graphs is not None:
                self.graphs[rows] = None
            return
        if self.graphs[rows] is None:
            self.graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows]):
                self.step(rows)
        self.graphs[rows].replay()


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_ids=(),
    seed=0,
    group=1,
    batch_size=32,
    on_token=None,
    step_hook=None,
    sample_ids=None,
    sync_every=None,
    shapes=None,
    pack=None,
    graphs=None,
):
    """Samples `group` continuations of each prompt (a list of ids) under the caller's autocast -> Samples.

    max_new_tokens: an int, or a list with one a prompt; a sample also ends at the model's max_positions.
    temperature (0: greedy), top_k (0: off), top_p: a token that they remove has probability exactly 0.
    stop_ids end a sample and belong to it. on_token(sample, token) sees each token in order and ends the sample by returning
    True: streaming and stop strings. seed: an int or a sequence of them, for instance (seed, step). sample_ids: the number that
    each sample draws its random numbers by (default 0, 1, ...), so that ranks can share out the samples of one call.
    batch_size: rows decoded together; the first prefill of a prompt serves its whole group.

    sync_every: steps between looks at which rows are done (CPU 1, else 8). shapes: "free" (CPU) computes the live rows and no
    others; "few" (CUDA) the batch, its half, quarter ...; "fixed" (XLA) runs each batch to its end in one shape. step_hook is
    called after each step and prefill: XLA cuts its graph there.
    pack: copy the weights into oneDNN's layout (default: on a CPU that has it, for 16 tokens and more); the copy costs as much
    memory as the weights. graphs: replay steps as CUDA graphs (default: on CUDA).
    Raises UserError for an empty or too long prompt, and for settings out of range.
    """
    device, V, longest = device_of(model.head_weight), model.cfg.vocab_size, model.cfg.max_positions
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and group >= 1 and batch_size >= 1):
        raise UserError(
            f"temperature={temperature} top_k={top_k} top_p={top_p} group={group} batch_size={batch_size}: temperature and "
            "top_k must be 0 or more, top_p in (0, 1], group and batch_size 1 or more"
        )
    asked = (
        list(max_new_tokens)
        if isinstance(max_new_tokens, (list, tuple))
        else [max_new_tokens] * len(prompts)
    )
    for i, (prompt, limit) in enumerate(zip(prompts, asked, strict=True)):
        if not prompt:
            raise UserError(
                f"prompt {i} is empty: give it at least one token (BOS where the model has one)"
            )
        if len(prompt) >= longest:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, but the model takes {longest} in all: shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise UserError(
                f"prompt {i} holds ids outside 0..{V - 1}: it was encoded with another model's tokenizer"
            )
        if limit < 1:
            raise UserError(f"max_new_tokens={limit}: must be 1 or more")
    made = Samples(
        [[]] * len(prompts) * group, [[]] * len(prompts) * group, [False] * len(prompts) * group
    )
    if not prompts:
        return made
    limits = [
        min(limit, longest - len(prompt)) for prompt, limit in zip(prompts, asked, strict=True)
    ]

    # ---- how this device likes it
    on_cpu = device.type == "cpu"
    shapes = shapes or dict(cpu="free", xla="fixed").get(device.type, "few")
    fixed = shapes == "fixed"
    sync_every = sync_every or (1 if on_cpu else 8)
    if pack is None:
        able = (
            on_cpu
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        pack = able and max(limits) >= 16
    graphs = device.type == "cuda" if graphs is None else graphs
    # the cache grows by this many slots: short sequences stay cheap, and few shapes occur, of which CUDA records each anew
    span = 256 if device.type == "cuda" else 64
    R, new = min(batch_size, len(made.tokens)), max(limits)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    batch = Batch(model, R, new, stop_ids, sampling, pack, graphs)

    def uniforms(sample):
        if sample is None or temperature == 0:
            return np.zeros(new + 1, dtype=np.float32)
        entropy = [
            *(seed if isinstance(seed, (list, tuple)) else (seed,)),
            sample_ids[sample] if sample_ids else sample,
        ]
        return np.random.default_rng(entropy).random(new + 1, dtype=np.float32)

    def round_up(n):
        return -(-n // span) * span

    # ---- samples of one prompt stay together, prompts of similar length too
    waiting = deque(sorted(range(len(made.tokens)), key=lambda s: (-len(prompts[s // group]), s)))
    live, seen = {}, {}  # row -> sample; sample -> tokens handed out so far
    filled, where = None, {}  # the latest prefill, and the row of each prompt in it
    whole_width = round_up(max(map(len, prompts)) - 1) if fixed else 0

    def fill():
        """Moves waiting samples into the free rows."""
        nonlocal filled, where
        free = [row for row in range(R) if row not in live]
        while free and waiting:
            if waiting[0] // group not in where:
                width = whole_width or len(prompts[waiting[0] // group]) - 1
                take = list(dict.fromkeys(s // group for _, s in zip(free, waiting, strict=False)))
                take = take if fixed else take[: max(1, PREFILL // max(width, 1))]
                where = {p: row for row, p in enumerate(take)}
                filled = batch.prefill([prompts[p] for p in take], R if fixed else len(take), width)
            rows, samples = [], []
            while free and waiting and waiting[0] // group in where:
                rows.append(free.pop(0))
                samples.append(waiting.popleft())
            live.update(zip(rows, samples, strict=True))
            if fixed:  # rows left over are done from the start
                rows, samples = rows + free, samples + [None] * len(free)
            if filled[0][0].shape[2] > batch.slots:
                batch.resize(filled[0][0].shape[2])
            batch.place(
                rows,
                [[0] if s is None else prompts[s // group] for s in samples],
                [0 if s is None else limits[s // group] for s in samples],
                np.stack([uniforms(s) for s in samples]),
                filled,
                [0 if s is None else where[s // group] for s in samples],
            )
            seen.update((s, 0) for s in samples)
            if step_hook:
                step_hook()

    while waiting or live:
        # ---- refill, shrink
        if waiting and (not live or not fixed and R - len(live) >= R / 8):
            fill()
        rows = len(live) if shapes == "free" else R
        while shapes == "few" and len(live) <= rows // 2:
            rows //= 2
        beyond = [row for row in live if row >= rows]
        if beyond:
            holes = [row for row in range(rows) if row not in live][: len(beyond)]
            batch.move(beyond, holes)
            live.update([(hole, live.pop(row)) for hole, row in zip(holes, beyond, strict=True)])

        # ---- room for the next steps
        steps = min(sync_every, max(limits[s // group] - seen[s] for s in live.values()))
        reach = max(len(prompts[s // group]) - 1 + seen[s] for s in live.values()) + steps
        if fixed:
            reach = whole_width + round_up(new)
        if round_up(reach) > batch.slots or 2 * round_up(reach) <= batch.slots:
            batch.resize(round_up(reach))
        for _ in range(steps):
            batch.advance(rows)
            if step_hook:
                step_hook()
        made.row_steps += rows * steps

        # ---- look who is done
        counts, dones = torch.stack((batch.count, batch.done.long())).tolist()
        if on_token or any(dones[row] for row in live):
            tokens, logprobs = batch.tokens.cpu(), batch.logprobs.cpu()
        for row, sample in list(live.items()):
            begin, end, done = seen[sample], counts[row], dones[row]
            ended = False
            if on_token:
                for i, token in enumerate(tokens[row, begin:end].tolist(), begin + 1):
                    if on_token(sample, token):
                        end, ended = i, True
                        batch.done[row], batch.position[row] = True, 0
                        break
            seen[sample] = end
            if done or ended:
                del live[row]
                made.tokens[sample] = tokens[row, :end].tolist()
                made.logprobs[sample] = logprobs[row, :end].tolist()
                made.finished[sample] = ended or made.tokens[sample][-1] in stop_ids
    return made
