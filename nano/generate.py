"""Batched sampling with a key/value cache: prompts of any lengths in, tokens and their
log-probabilities out.

    samples = generate(model, prompts, max_new_tokens=128, stop_ids=tok.stop_ids)  # lists of ids
    samples.tokens[i], samples.logprobs[i], samples.finished[i]

`batch_size` rows are decoded together, one token a step. A row that ends makes room for the next
prompt. When none waits, the batch shrinks. So answers of unequal length cost their sum and not
rows x longest.

The random numbers of a sample depend on (seed, sample index) alone, not on its neighbours in the
batch, the order of refills or the device. In fp32 the same holds for the tokens that are drawn,
unless the choice between two of them is a matter of rounding. In bf16 a matrix product rounds
otherwise in a batch of another shape, so there a sample may differ with the batch and the device.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from os.path import commonprefix  # of any sequences

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRA, dense
from model import Router, Stack, empty, soft_cap
from nano.config import UserError
from nano.quant import QuantLinear

PREFILL = 8192  # tokens of prompt that one forward takes
WORTH = 16  # tokens of a common beginning that are worth a forward of their own


@dataclass
class Samples:
    """One entry per sample. Sample g of prompt i is at i * group + g."""

    tokens: list  # lists of ids, with the stop id and without the prompt
    logprobs: list  # lists of floats, see `choose`
    finished: list  # True: ended by a stop id or by on_token; False: reached its length limit
    pasts: list = ()  # with generate(keep=True): a Past each


@dataclass
class Past:
    """The keys and values of what a prompt begins with, which it need not compute again."""

    ids: list  # the tokens they are of
    cache: list  # per layer (keys, values), each (K, len(ids), D)
    switch: int | None = None  # the frequencies of their ropes, as in Rope.switch

    def covers(self, prompt):
        """How many tokens of `prompt` they serve. The last one is left to the first step."""
        return len(commonprefix([self.ids, prompt[:-1]]))


# ---------------------------------------------------------------------- sampling


def nucleus_from(logits, top_p):
    """logits (V,) -> (1,): the smallest logit of the fewest tokens whose probabilities add up to
    top_p. Only those are sorted that may be among them."""
    probs = logits.softmax(-1)
    # all that are less likely add up to less than 1 - top_p
    least = (1 - top_p) / len(probs)
    few = (probs >= least).nonzero()[:, 0]
    while True:  # the bound rises for as long as enough is left
        least *= 8
        fewer = few[probs[few] >= least]
        if not probs[fewer].sum() > top_p + 1e-3:
            break
        few = fewer
    best, order = logits[few].sort(descending=True)
    probs = probs[few[order]]
    count = (probs.cumsum(0) - probs < top_p).sum()
    return best[count - 1 : count] if count else logits.amax(-1, keepdim=True)  # 0 for NaN


def keep_from(logits, top_k=0, top_p=1.0):
    """logits (R, V) -> (R, 1): the smallest logit that stays in each row.

    Of the top_k likeliest tokens (0: all), the fewest stay whose probabilities add up to top_p
    (Holtzman et al. 2019, arXiv:1904.09751). A tie with the smallest one stays too.
    """
    V = logits.shape[-1]
    if not top_k and logits.device.type == "cpu":  # which takes long to sort a whole vocabulary
        return torch.stack([nucleus_from(row, top_p) for row in logits])
    best = logits.topk(min(top_k or V, V)).values
    probs = best.softmax(-1)
    return best.masked_fill(probs.cumsum(-1) - probs >= top_p, torch.inf).amin(-1, keepdim=True)


def in_blocks(x, fill):
    """x (R, V) -> (R, V / 256, 256). A CPU reduces blocks many times as fast as one whole
    vocabulary."""
    missing = -x.shape[1] % 256
    if missing:
        x = F.pad(x, (0, missing), value=fill)
    return x.view(len(x), -1, 256)


def argmax(x):
    """x (R, V) -> (R, 1): where the largest number of each row is, the first of equals."""
    blocks = in_blocks(x, -torch.inf)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, best[..., None].expand(-1, -1, 256))[:, 0]
    return best * 256 + inside.argmax(-1, keepdim=True)


def first_above(total, threshold):
    """The first place of each row of growing sums (R, n) that is above threshold (R, 1). The sum
    has grown there, even if the threshold was rounded up to the last sum."""
    threshold = torch.minimum(threshold, total[:, -1:] * (1 - 2**-23))
    if total.device.type == "xla":  # which has no searchsorted
        return (total <= threshold).sum(-1, keepdim=True)
    return torch.searchsorted(total, threshold, right=True)


def draw(probs, uniform):
    """probs (R, V), which need not add up to 1, and uniform (R,) in [0, 1) -> tokens (R, 1), by
    inverting the cumulative distribution: first that of blocks, then within one."""
    blocks = in_blocks(probs, 0.0)
    total = blocks.sum(-1).cumsum(-1)
    threshold = uniform[:, None] * total[:, -1:]
    block = first_above(total, threshold).clamp(max=total.shape[1] - 1)  # beyond the end for NaN
    before = F.pad(total, (1, 0)).gather(1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, 256))[:, 0].cumsum(-1)
    token = block * 256 + first_above(inside, threshold - before)
    return token.clamp(max=probs.shape[1] - 1)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """logits (R, V), uniform (R,) in [0, 1) -> tokens (R,), logprobs (R,) fp32: one token a row.

    A token is drawn by inverting the cumulative distribution at `uniform`. Temperature 0 takes the
    likeliest token. The log-probability is that of softmax(logits / temperature) *before* top_k and
    top_p; at temperature 0 it is that of softmax(logits). Without the two filters this is the
    distribution sampled from, which policy gradients need.
    """
    logits = logits.float()
    if temperature == 0:
        token = argmax(logits)
        logprob = logits.log_softmax(-1).gather(1, token)
        return token[:, 0], logprob[:, 0]
    logits = logits / temperature
    probs = logits.softmax(-1)
    kept = probs
    if top_k or top_p < 1:
        kept = probs.masked_fill(logits < keep_from(logits, top_k, top_p), 0.0)
    token = draw(kept, uniform)
    return token[:, 0], probs.gather(1, token)[:, 0].log()


# ---------------------------------------------------------------------- the model for decoding


def has_fast_bf16():
    """Whether oneDNN has bf16 products for this processor. Builds for Apple silicon lack oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fits_fp16(weight):
    """Whether fp16 holds a weight to within 2^-25, which sums in fp32 round away. It holds every
    checkpoint that was saved in 16 bits, bf16 included, and next to no weight after training."""
    return all(
        (piece.half().float() - piece).abs_().amax() <= 2**-25
        for piece in weight.float().flatten().split(2**18)  # which stay in the processor's cache
    )


def layout_of(weight):
    """How a CPU reads a weight fastest (bench/README.md): plain, as F.linear takes it, which
    rearranges it in every call; blocked by oneDNN; or in FBGEMM's fp16, half of an fp32 weight's
    bytes, whose products are fp32 all the same."""
    if weight.numel() < 2**16:  # the call would cost more than the product
        return "plain"
    if weight.dtype == torch.bfloat16 and has_fast_bf16():
        return "blocked"
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return "plain"
    if fits_fp16(weight):
        return "fp16"
    blocked = weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return "blocked" if blocked else "plain"


class FrozenLinear(nn.Module):
    """A linear layer for inference, with its weight in one of the layouts of `layout_of`."""

    def __init__(self, weight, bias, layout="plain"):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.layout = weight, bias, layout
        if layout == "fp16":
            bias = None if bias is None else bias.float()
            self.weight = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)
        elif layout == "blocked":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)

    def forward(self, x):
        if self.layout == "fp16":
            return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.weight).to(x.dtype)
        if self.layout == "blocked":
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Fused:
    """Layers that read the same input, as one product. The first that is called computes it for
    all of them."""

    def __init__(self, linear, sizes):
        self.linear = linear
        self.sizes = sizes  # outputs of each layer
        self.x = None
        self.parts = {}

    def take(self, number, x):
        if self.x is not x:
            self.x = x
            self.parts = dict(enumerate(self.linear(x).split(self.sizes, dim=-1)))
        part = self.parts.pop(number)
        if not self.parts:  # the memory is free for the next layer
            self.x = None
        return part


class Part(nn.Module):
    """One of the layers of a Fused."""

    def __init__(self, shared, number):
        super().__init__()
        self.shared = shared
        self.number = number

    def forward(self, x):
        return self.shared.take(self.number, x)


def device_of(p):
    """The device that computes with a parameter. FSDP with offload stores it on another one."""
    return torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device


def frozen(p, dtype):
    """A parameter, or None, in `dtype`. A sharded one is gathered, so all ranks must generate
    together."""
    if hasattr(p, "full_tensor"):
        p = p.to(device_of(p)).full_tensor()
    return None if p is None else p.detach().to(dtype)


def base_of(module):
    return module.base if isinstance(module, LoRA) else module


def is_plain(module):
    """Whether a linear layer has a plain matrix. A quantised one has a method `dense`."""
    return not hasattr(base_of(module), "dense")


def frozen_linear(module, dtype, pack):
    """A linear layer for decoding. The adapter is folded in where packing copies the weight anyway.
    A base that is no plain matrix is called as it is, and so are stacks of experts."""
    base = base_of(module)
    active = getattr(module, "active", None)
    stack = isinstance(base, Stack)
    plain = is_plain(module) and not stack
    if isinstance(base, QuantLinear):
        base = base.mapped(lambda p: frozen(p, p.dtype))
    # the norm that DoRA divides by is not worth computing at each step
    folded = active is None or plain and (pack or active in module.lora_magnitude)
    linear = base
    if stack:
        linear = base.empty()
        for key, p in base.named_parameters():
            setattr(linear, key, nn.Parameter(frozen(p, dtype), requires_grad=False))
    if plain:
        weight = frozen(dense(module) if folded else base.weight, dtype)
        layout = layout_of(weight) if pack else "plain"
        linear = FrozenLinear(weight, frozen(base.bias, dtype), layout)
    if folded:
        return linear
    adapted = LoRA(linear)
    adapted.training = False  # eval() would also reach a base that training shares
    A, B = (frozen(t[active], dtype) for t in (module.lora_A, module.lora_B))
    magnitude = frozen(dict(module.lora_magnitude).get(active), dtype)
    adapted.put(active, A, B, module.scales[active], magnitude=magnitude)
    adapted.active = active
    return adapted


def fused(modules, dtype):
    """Plain linear layers that read the same input, packed as one: a Part for each."""
    weight = torch.cat([frozen(dense(m), dtype) for m in modules])
    biases = [frozen(base_of(m).bias, dtype) for m in modules]
    bias = None if biases[0] is None else torch.cat(biases)
    linear = FrozenLinear(weight, bias, layout_of(weight))
    shared = Fused(linear, [base_of(m).out_features for m in modules])
    return [Part(shared, i) for i in range(len(modules))]


def snapshot(model, dtype, pack):
    """A copy of the model for decoding, in evaluation mode, without its head.

    A new model and no deepcopy, because the hooks of FSDP, tensor parallelism and torch.compile
    must stay behind. It shares the tensors that need neither a cast nor packing. With `pack` the
    layers that read the same input become one product.
    """
    new = empty(model.cfg).eval()
    for name, module in list(new.model.named_modules(prefix="model")):
        if isinstance(module, (nn.Linear, Stack)):  # its parent has replaced it
            continue
        source = model.get_submodule(name)
        names = [n for n, c in module.named_children() if isinstance(c, (nn.Linear, Stack))]
        linears = {n: source.get_submodule(n) for n in names}
        together = [n for n in getattr(module, "SAME_INPUT", ()) if n in linears]
        if pack and len(together) > 1 and all(is_plain(linears[n]) for n in together):
            parts = fused([linears.pop(n) for n in together], dtype)
            for n, part in zip(together, parts, strict=True):
                setattr(module, n, part)
        for n, linear in linears.items():
            setattr(module, n, frozen_linear(linear, dtype, pack))
        for key, p in source.named_parameters(recurse=False):
            # a router of other numbers would choose other experts than in training
            kept = p.dtype if isinstance(module, Router) else dtype
            setattr(module, key, nn.Parameter(frozen(p, kept), requires_grad=False))
    if device_of(model.head_weight).type == "xla":
        for layer, source in zip(new.layers, model.layers, strict=True):
            layer._forward_hooks = source._forward_hooks  # they keep activations sharded by row
    return new


class Decoder:
    """A model as it decodes: a copy in evaluation mode, cast and packed.

    generate makes one for each call. Where the weights stand still over many calls, make it once
    and give it to generate in the model's place. dtype: by default autocast's, or the model's.
    """

    def __init__(self, model, dtype=None, pack=None):
        self.cfg = model.cfg
        self.start_ids = model.start_ids
        self.device = device = device_of(model.head_weight)
        if dtype is None and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.dtype = dtype = dtype or model.head_weight.dtype
        pack = device.type == "cpu" if pack is None else pack
        self.model = snapshot(model, dtype, pack)
        weight = frozen(model.head_weight, dtype)
        self.head = FrozenLinear(weight, None, layout_of(weight) if pack else "plain")
        _, self.scale, self.cap = model.head

    def logits(self, hidden):
        return soft_cap(self.head(hidden * self.scale), self.cap)


def common_prefix(rows):
    """How many tokens all rows (lists of ids) have in common at their beginning.

    Each row keeps at least one token of its own. Fewer than WORTH tokens, or those of a single row,
    count as none."""
    count = min(len(commonprefix(rows)), min(map(len, rows)) - 1)
    return count if count >= WORTH and min(rows) != max(rows) else 0


class Batch:
    """The rows being decoded: key/value cache and state, on the device and updated in place.

    So a step has a fixed shape, nothing in it waits for the device, and CUDA can replay it as a
    graph. longest: most new tokens of a sample. sampling: keyword arguments of `choose`. switch:
    of the model's ropes.
    """

    def __init__(self, decoder, rows, longest, stop_ids, sampling, plan, switch=None):
        self.decoder = decoder
        self.model = decoder.model
        self.switch = switch
        for rope in self.model.ropes.values():
            rope.switch = switch
        self.dtype = decoder.dtype
        self.device = device = decoder.device
        self.sampling = sampling
        self.stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        self.cache = self.model.new_cache(rows, 0, self.dtype)
        # experts one by one wait for the device, which a graph cannot
        self.use_graphs = plan.graphs and not self.model.cfg.n_experts
        self.graphs = {}  # rows -> graph; None: to be recorded the next time

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.last = zeros()  # the next input
        self.position = zeros()  # its slot
        self.count = zeros()  # tokens sampled
        self.limit = zeros()  # tokens allowed
        self.done = ~zeros(dtype=torch.bool)
        # a row that is done goes on writing behind its end, hence one column more
        width = longest + 1
        self.tokens = zeros(width)
        self.logprobs = zeros(width, dtype=torch.float32)
        self.uniform = zeros(width, dtype=torch.float32)
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
        """Changes the number of slots. The cache is copied and not viewed, because the kernels want
        the cache of a row and head contiguous."""
        change = slots - self.slots
        self.cache = [tuple(F.pad(t, (0, 0, 0, change)) for t in layer) for layer in self.cache]
        self.graphs.clear()  # they point to the old cache

    def prefill(self, prompts, pasts, rows, width):
        """The cache of `prompts`, keys and values (rows, K, S, D) per layer, right-padded. pasts: a
        Past or None for each.

        What stands behind a prompt's end is overwritten before any token can see it. The last token
        of a prompt is left to the first step.
        """
        known = [past.covers(p) if past else 0 for past, p in zip(pasts, prompts, strict=True)]
        rest = [prompt[n:-1] for n, prompt in zip(known, prompts, strict=True)]
        # fixed shapes need one number of columns, which they have where all know as much
        columns = max(map(len, rest)) if len(set(known)) > 1 else width - known[0]
        tokens = torch.zeros(rows, columns, dtype=torch.int64)
        lengths = torch.zeros(rows, dtype=torch.int64)
        for i, ids in enumerate(rest):
            lengths[i] = len(ids)
            tokens[i, : len(ids)] = torch.tensor(ids)
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        # padding that stands beyond the width shares one slot more
        cache = self.model.new_cache(rows, width + any(known), self.dtype)
        positions = None
        if any(known):
            for row, (past, n) in enumerate(zip(pasts, known, strict=True)):
                for new, old in zip(chain(*cache), chain(*past.cache) if n else (), strict=False):
                    new[row, :, :n] = old[:, :n]
            begins = torch.tensor(known + [0] * (rows - len(known)), device=self.device)
            positions = begins[:, None] + torch.arange(columns, device=self.device)
            positions = positions.clamp(max=width)
        if columns:
            self.model.prefill(tokens, lengths, cache, positions)
        return cache

    def computed(self, ids):
        """The Past of `ids`."""
        cache = self.model.new_cache(1, len(ids), self.dtype)
        self.model.hidden(torch.tensor([ids], device=self.device), cache=cache)
        return Past(ids, [(keys[0], values[0]) for keys, values in cache], self.switch)

    def past(self, row, ids):
        """The Past of the tokens `ids`, which stand in the first slots of a row."""
        n = len(ids)
        cache = [tuple(t[row, :, :n].clone() for t in layer) for layer in self.cache]
        return Past(ids, cache, self.switch)

    def place(self, rows, prompts, limits, uniforms, sources, cache):
        """Starts samples in `rows`. sources: the row of each one's prompt in a prefilled cache."""
        ends = [p[-1] for p in prompts], [len(p) - 1 for p in prompts]
        rows, sources, last, position, limit = (
            torch.tensor(x, device=self.device) for x in (rows, sources, *ends, limits)
        )
        for t, new in zip(chain(*self.cache), chain(*cache), strict=True):
            t[rows, :, : new.shape[2]] = new[sources]
        self.last[rows] = last
        self.position[rows] = position
        self.limit[rows] = limit
        self.count[rows] = 0
        self.done[rows] = limit == 0
        self.uniform[rows] = torch.from_numpy(np.stack(uniforms)).to(self.device)

    def move(self, sources, rows):
        """Copies the rows `sources` over `rows`."""
        rows, sources = (torch.tensor(i, device=self.device) for i in (rows, sources))
        for t in chain(self.state, *self.cache):
            t[rows] = t[sources]

    def step(self, rows):
        """One more token for the first `rows` rows."""
        last, position, count, limit, done, uniform, tokens, logprobs = (
            t[:rows] for t in self.state
        )
        cache = [tuple(t[:rows] for t in layer) for layer in self.cache]
        hidden = self.model.hidden(last[:, None], position[:, None], cache=cache)
        at = count[:, None]
        logits = self.decoder.logits(hidden[:, 0])
        token, logprob = choose(logits, uniform.gather(1, at)[:, 0], **self.sampling)
        tokens.scatter_(1, at, token[:, None])
        logprobs.scatter_(1, at, logprob[:, None])
        last.copy_(token)
        count += ~done
        done |= (token[:, None] == self.stop).any(-1) | (count >= limit)
        position.add_(1).masked_fill_(done, 0)  # a row that is done idles in its slot 0

    def advance(self, rows):
        """A step. CUDA records it the second time that its shape comes, and then replays it."""
        if rows not in self.graphs:
            self.step(rows)
            if self.use_graphs:
                self.graphs[rows] = None
            return
        if self.graphs[rows] is None:
            self.graphs[rows] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[rows]):
                self.step(rows)
        self.graphs[rows].replay()


# ---------------------------------------------------------------------- who is decoded when


def check(prompts, cfg):
    """UserError for prompts that a model with this ModelConfig cannot take."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {i} is empty: give it at least one token (BOS where the model has one)"
            )
        if len(prompt) >= cfg.max_positions:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, but the model takes {cfg.max_positions} in "
                "all: shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < cfg.vocab_size:
            raise UserError(
                f"prompt {i} holds ids outside 0..{cfg.vocab_size - 1}: it was encoded with "
                "another model's tokenizer"
            )


@dataclass
class Plan:
    """How a device decodes best. `for_device` knows; generate(plan=) changes some of it."""

    # free: the live rows alone are computed; few: the batch, its half, its quarter ...; fixed: each
    # batch runs to its end in one shape
    shapes: str
    sync_every: int  # steps between two looks at which rows are done
    pack: bool = False  # copies the weights into a layout for the CPU
    graphs: bool = False  # replays steps as CUDA graphs
    span: int = 64  # the cache grows by so many slots: few shapes, and short samples stay cheap

    @classmethod
    def for_device(cls, device, longest):
        """longest: most new tokens of a sample. Copying the weights pays off from 16 on."""
        if device.type == "cpu":
            return cls("free", 1, pack=longest >= 16)
        if device.type == "xla":  # compiles each shape
            return cls("fixed", 8)
        graphs = device.type == "cuda"  # which records each shape
        return cls("few", 8, graphs=graphs, span=256)


@dataclass
class Scheduler:
    """Decides which samples are in the batch. A row that ends makes room for the next prompt. When
    none waits, the batch shrinks."""

    batch: Batch
    plan: Plan
    rows: int  # of the batch
    prompts: list  # of each sample: list of ids; each `group` neighbours share a prompt
    limits: list  # of each sample: most new tokens
    group: int
    uniforms: Callable  # sample -> its random numbers
    pasts: list  # of each sample: a Past or None
    keep: bool  # whether each sample leaves a Past

    def __post_init__(self):
        prompts = self.prompts
        # samples of one prompt stay together, prompts of similar length too
        self.waiting = deque(sorted(range(len(prompts)), key=lambda s: (-len(prompts[s]), s)))
        self.live = {}  # row -> sample
        self.seen = [0] * len(prompts)  # of each sample: tokens handed out so far
        self.where = {}  # number of a prompt -> its row in `prefilled`, the latest prefill's cache
        self.samples = Samples(*([None] * len(prompts) for _ in range(4)))
        self.fixed = self.plan.shapes == "fixed"
        self.whole_width = self.round_up(max(map(len, prompts)) - 1)  # of a fixed prefill

    def round_up(self, n):
        return -(-n // self.plan.span) * self.plan.span

    def wants_refill(self):
        """Whether enough rows are free to refill: an eighth, or all with fixed shapes."""
        enough = self.rows if self.fixed else self.rows / 8
        return bool(self.waiting) and self.rows - len(self.live) >= enough

    def refill(self, step_hook):
        """Moves waiting samples into the free rows. A prompt is prefilled once for its group."""
        free = deque(row for row in range(self.rows) if row not in self.live)
        while free and self.waiting:
            if self.waiting[0] // self.group not in self.where:
                self.prefill(len(free))
            placed = {}  # row -> sample
            while free and self.waiting and self.waiting[0] // self.group in self.where:
                placed[free.popleft()] = self.waiting.popleft()
            self.place(placed, free)
            step_hook()

    def prefill(self, free):
        """Prefills the next waiting prompts: at most `free`, and not too many tokens at once."""
        numbers = list(dict.fromkeys(s // self.group for s in islice(self.waiting, free)))
        rows = self.rows
        width = self.whole_width
        if not self.fixed:
            width = len(self.prompts[self.waiting[0]]) - 1
            numbers = numbers[: max(1, PREFILL // max(width, 1))]
            rows = len(numbers)
        self.where = {prompt: row for row, prompt in enumerate(numbers)}
        prompts, pasts = (
            [values[i * self.group] for i in numbers] for values in (self.prompts, self.pasts)
        )
        self.prefilled = self.batch.prefill(prompts, pasts, rows, width)

    def place(self, placed, free):
        """Puts prefilled samples into rows of the batch. placed: row -> sample."""
        self.live |= placed
        width = self.prefilled[0][0].shape[2]
        if width > self.batch.slots:
            self.batch.resize(width)
        starts = [
            (row, self.prompts[s], self.limits[s], self.uniforms(s), self.where[s // self.group])
            for row, s in placed.items()
        ]
        if self.fixed:  # rows left over are done from the start
            starts += [(row, [0], 0, np.zeros_like(starts[0][3]), 0) for row in free]
        self.batch.place(*zip(*starts, strict=True), self.prefilled)

    def shrink(self):
        """Moves the live rows to the front -> how many rows the next steps compute."""
        rows = len(self.live) if self.plan.shapes == "free" else self.rows
        while self.plan.shapes == "few" and len(self.live) <= rows // 2:
            rows //= 2
        beyond = [row for row in self.live if row >= rows]
        if beyond:
            holes = [row for row in range(rows) if row not in self.live][: len(beyond)]
            self.batch.move(beyond, holes)
            for hole, row in zip(holes, beyond, strict=True):
                self.live[hole] = self.live.pop(row)
        return rows

    def make_room(self):
        """Gives the cache the slots that the next steps need -> how many steps."""
        live = self.live.values()
        steps = min(self.plan.sync_every, max(self.limits[s] - self.seen[s] for s in live))
        reach = max(len(self.prompts[s]) - 1 + self.seen[s] for s in live) + steps
        if self.fixed:
            reach = self.whole_width + self.round_up(max(self.limits))
        slots = self.round_up(reach)
        if slots > self.batch.slots or 2 * slots <= self.batch.slots:
            self.batch.resize(slots)
        return steps

    def collect(self, on_token, stop_ids):
        """Shows the new tokens to on_token, and takes finished samples out of the batch.

        UserError if the model gave NaN, of which no token can be drawn."""
        batch = self.batch
        counts, dones = torch.stack((batch.count, batch.done.long())).tolist()
        if on_token or any(dones[row] for row in self.live):
            tokens, logprobs = batch.tokens.cpu(), batch.logprobs.cpu()
        for row, sample in list(self.live.items()):
            begin, end = self.seen[sample], counts[row]
            stopped = False
            if (on_token or dones[row]) and not logprobs[row, :end].isfinite().all():
                raise UserError(
                    "the model gives NaN or infinity where probabilities should be: its weights "
                    "are damaged, or too large for the dtype (try dtype=float32)"
                )
            if on_token:
                for i, token in enumerate(tokens[row, begin:end].tolist(), begin + 1):
                    if on_token(sample, token):
                        end, stopped = i, True
                        batch.done[row] = True
                        batch.position[row] = 0
                        break
            self.seen[sample] = end
            if dones[row] or stopped:
                del self.live[row]
                ids = tokens[row, :end].tolist()
                self.samples.tokens[sample] = ids
                self.samples.logprobs[sample] = logprobs[row, :end].tolist()
                self.samples.finished[sample] = stopped or ids[-1] in stop_ids
                if self.keep:
                    self.samples.pasts[sample] = batch.past(row, self.prompts[sample] + ids[:-1])


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
    step_hook=lambda: None,
    sample_ids=None,
    plan=None,
    pasts=None,
    keep=False,
):
    """Samples `group` continuations of each prompt (a list of ids) under the caller's autocast.
    model: a Transformer or a Decoder.

    Returns Samples. UserError for an empty or too long prompt, and for ids that the model lacks.

    max_new_tokens: an int, or a list with one a prompt; a sample also ends at the model's
        max_positions.
    temperature (0: greedy), top_k (0: off), top_p: a token that they remove has probability 0.
    stop_ids: they end a sample and belong to it.
    seed: an int or a sequence of them, for instance (seed, step).
    batch_size: rows decoded together.
    on_token(sample, token): sees each token in order and ends the sample by returning True, for
        streaming and stop strings.
    step_hook: called after each step and prefill; XLA runs its graph there.
    sample_ids: the number by which each sample draws its random numbers (default 0, 1, ...), so
        that ranks can share out the samples of one call.
    plan: fields of Plan that differ from the device's, such as dict(sync_every=1) for streaming.
    keep, pasts: with keep=True the samples have .pasts. One of them or None for each prompt of a
        later call spares it the tokens that its conversation begins with.
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    check(prompts, model.cfg)
    if not prompts:
        return Samples([], [], [], [])
    prompts = [[*prompt, *model.start_ids] for prompt in prompts]
    room = [model.cfg.max_positions - len(prompt) for prompt in prompts]
    limits = [min(pair) for pair in zip(limits, room, strict=True) for _ in range(group)]
    pasts = [past for past in pasts or [None] * len(prompts) for _ in range(group)]
    prompts = [prompt for prompt in prompts for _ in range(group)]
    sample_ids = sample_ids or range(len(prompts))
    decoder = model if isinstance(model, Decoder) else None
    device = decoder.device if decoder else device_of(model.head_weight)
    plan = replace(Plan.for_device(device, max(limits)), **(plan or {}))
    if keep:  # a row that is done would idle in its slot 0
        plan.sync_every = 1
    decoder = decoder or Decoder(model, pack=plan.pack)
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)

    def decode(numbers, prompts, limits, group=1, switch=None):
        """Goes on with the samples of these numbers, each behind its prompt."""
        starts = [len(samples.tokens[number]) for number in numbers]
        longest = max(limits)

        def uniforms(i):
            """The random numbers of a sample depend on its number and the seed alone."""
            rng = np.random.default_rng([seed, sample_ids[numbers[i]]])
            return rng.random(starts[i] + longest + 1, dtype=np.float32)[starts[i] :]

        def show(i, token):
            return on_token(numbers[i], token)

        rows = min(batch_size, len(prompts))
        batch = Batch(decoder, rows, longest, stop_ids, sampling, plan, switch)
        mine = [None] * len(numbers)
        if not model.start_ids:  # an encoder reads a prompt's beginning by its end
            common = common_prefix(prompts)
            common = batch.computed(prompts[0][:common]) if common else None
            mine = [pasts[number] for number in numbers]
            mine = [past if past and past.switch == switch else common for past in mine]
        scheduler = Scheduler(batch, plan, rows, prompts, limits, group, uniforms, mine, keep)
        while scheduler.waiting or scheduler.live:
            if scheduler.wants_refill():
                scheduler.refill(step_hook)
            live_rows = scheduler.shrink()
            for _ in range(scheduler.make_room()):
                batch.advance(live_rows)
                step_hook()
            scheduler.collect(on_token and show, stop_ids)
        for i, number in enumerate(numbers):
            samples.tokens[number] += scheduler.samples.tokens[i]
            samples.logprobs[number] += scheduler.samples.logprobs[i]
            samples.finished[number] = scheduler.samples.finished[i]
            samples.pasts[number] = scheduler.samples.pasts[i]

    numbers = range(len(prompts))
    samples = Samples(*([value() for _ in numbers] for value in (list, list, bool, lambda: None)))
    switch = model.cfg.rope_switch
    if not switch:
        decode(numbers, prompts, limits, group)
        return samples
    # A document that grows beyond `switch` tokens gets other rotary frequencies, and a new cache.
    short = [i for i in numbers if len(prompts[i]) <= switch]
    if short:
        room = [min(limits[i], switch + 1 - len(prompts[i])) for i in short]
        decode(short, [prompts[i] for i in short], room, group)
    long = [i for i in numbers if not samples.finished[i] and len(samples.tokens[i]) < limits[i]]
    if long:
        rest = [limits[i] - len(samples.tokens[i]) for i in long]
        decode(long, [prompts[i] + samples.tokens[i] for i in long], rest, switch=0)
    return samples
