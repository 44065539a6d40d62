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
from model import Router, empty, soft_cap
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


# ---------------------------------------------------------------------- sampling


def keep_from(logits, top_k=0, top_p=1.0):
    """logits (R, V) -> (R, 1): the smallest logit that stays in each row.

    Of the top_k likeliest tokens (0: all), the fewest stay whose probabilities add up to top_p
    (Holtzman et al. 2019, arXiv:1904.09751). A tie with the smallest one stays too.
    """
    V = logits.shape[-1]
    # sorting a whole vocabulary is slow on a CPU, and 1,024 tokens mostly hold top_p
    count = top_k or (1024 if logits.device.type == "cpu" else V)
    best = logits.topk(min(count, V)).values
    norm = (best if top_k else logits).logsumexp(-1, keepdim=True)
    probs = (best - norm).exp()
    if not top_k and count < V and not (probs.sum(-1) > top_p + 1e-3).all():
        best = logits.topk(V).values
        probs = (best - norm).exp()
    return best.masked_fill(probs.cumsum(-1) - probs >= top_p, torch.inf).amin(-1, keepdim=True)


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """logits (R, V), uniform (R,) in [0, 1) -> tokens (R,), logprobs (R,) fp32: one token a row.

    A token is drawn by inverting the cumulative distribution at `uniform`. Temperature 0 takes the
    likeliest token. The log-probability is that of softmax(logits / temperature) *before* top_k and
    top_p; at temperature 0 it is that of softmax(logits). Without the two filters this is the
    distribution sampled from, which policy gradients need.
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
    # the first token at which the sum exceeds the threshold, which never has probability 0
    threshold = uniform[:, None] * total[:, -1:]
    if logits.device.type == "xla":  # which has no searchsorted
        token = (total <= threshold).sum(-1, keepdim=True)
    else:
        token = torch.searchsorted(total, threshold, right=True)
        token = token.clamp(max=logits.shape[-1] - 1)  # beyond the end for NaN, see `collect`
    return token[:, 0], logprobs.gather(1, token)[:, 0]


# ---------------------------------------------------------------------- the model for decoding


def has_fast_bf16():
    """Whether oneDNN has bf16 products for this processor. Builds for Apple silicon lack oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class FrozenLinear(nn.Module):
    """A linear layer for inference.

    With `pack` the weight is stored in oneDNN's blocked layout, which F.linear would rebuild in
    every call. Steps on a CPU are then 1.5x faster.
    """

    def __init__(self, weight, bias, pack):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # for small weights the call of oneDNN costs more than the product
        self.packed = pack and weight.numel() >= 2**16
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self.weight = weight

    def forward(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def device_of(p):
    """The device that computes with a parameter. FSDP with offload stores it on another one."""
    return torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device


def frozen(p, dtype):
    """A parameter, or None, in `dtype`. A sharded one is gathered, so all ranks must generate
    together."""
    if hasattr(p, "full_tensor"):
        p = p.to(device_of(p)).full_tensor()
    return None if p is None else p.detach().to(dtype)


def frozen_linear(module, dtype, pack):
    """A linear layer for decoding. The adapter is folded in where packing copies the weight anyway.
    A base that is no plain matrix (it has a method `dense`) is called as it is."""
    base = module.base if isinstance(module, LoRA) else module
    active = getattr(module, "active", None)
    plain = not hasattr(base, "dense")
    if isinstance(base, QuantLinear):
        base = base.mapped(lambda p: frozen(p, p.dtype))
    # the norm that DoRA divides by is not worth computing at each step
    folded = active is None or plain and (pack or active in module.lora_magnitude)
    linear = base
    if plain:
        weight = dense(module) if folded else base.weight
        linear = FrozenLinear(frozen(weight, dtype), frozen(base.bias, dtype), pack)
    if folded:
        return linear
    adapted = LoRA(linear)
    adapted.training = False  # eval() would also reach a base that training shares
    A, B = (frozen(t[active], dtype) for t in (module.lora_A, module.lora_B))
    magnitude = frozen(dict(module.lora_magnitude).get(active), dtype)
    adapted.put(active, A, B, module.scales[active], magnitude=magnitude)
    adapted.active = active
    return adapted


def snapshot(model, dtype, pack):
    """A copy of the model for decoding, in evaluation mode, without its head.

    A new model and no deepcopy, because the hooks of FSDP, tensor parallelism and torch.compile
    must stay behind. It shares the tensors that need neither a cast nor packing. Each call of
    generate builds it anew, since training changes the weights.
    """
    new = empty(model.cfg).eval()
    for name, module in list(new.model.named_modules(prefix="model")):
        source = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            new.set_submodule(name, frozen_linear(source, dtype, pack))
            continue
        for key, p in source.named_parameters(recurse=False):
            # a router of other numbers would choose other experts than in training
            kept = p.dtype if isinstance(module, Router) else dtype
            setattr(module, key, nn.Parameter(frozen(p, kept), requires_grad=False))
    if device_of(model.head_weight).type == "xla":
        for layer, source in zip(new.layers, model.layers, strict=True):
            layer._forward_hooks = source._forward_hooks  # they keep activations sharded by row
    return new


def common_prefix(rows):
    """How many tokens all rows (lists of ids) have in common at their beginning.

    Each row keeps at least one token of its own. Fewer than WORTH tokens, or those of a single row,
    count as none."""
    count = min(len(commonprefix(rows)), min(map(len, rows)) - 1)
    return count if count >= WORTH and min(rows) != max(rows) else 0


class Batch:
    """The rows being decoded: key/value cache and state, on the device and updated in place.

    So a step has a fixed shape, nothing in it waits for the device, and CUDA can replay it as a
    graph. prefix: the ids with which all prompts begin. longest: most new tokens of a sample.
    sampling: keyword arguments of `choose`.
    """

    def __init__(self, model, rows, prefix, longest, stop_ids, sampling, plan):
        device = device_of(model.head_weight)
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
        self.model = snapshot(model, self.dtype, plan.pack)
        self.head = FrozenLinear(frozen(model.head_weight, self.dtype), None, plan.pack)
        _, self.logit_scale, self.logit_cap = model.head
        self.sampling = sampling
        self.device = device
        self.prefix = prefix
        self.common = None  # the cache of the prefix, of one row
        self.stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        self.cache = self.model.new_cache(rows, 0, self.dtype)
        # experts one by one wait for the device, which a graph cannot
        self.use_graphs = plan.graphs and not model.cfg.n_experts
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

    def prefill(self, prompts, rows, width):
        """The cache of `prompts`, tensors (rows, K, width, D), right-padded.

        What stands behind a prompt's end is overwritten before any token can see it. The last token
        of a prompt is left to the first step.
        """
        begin = len(self.prefix)
        tokens = torch.zeros(rows, width - begin, dtype=torch.int64)
        lengths = torch.zeros(rows, dtype=torch.int64)
        for i, ids in enumerate(prompts):
            lengths[i] = len(ids) - 1 - begin
            tokens[i, : len(ids) - 1 - begin] = torch.tensor(ids[begin:-1])
        cache = self.model.new_cache(rows, width, self.dtype)
        positions = None
        if begin:
            if self.common is None:
                self.common = self.model.new_cache(1, begin, self.dtype)
                ids = torch.tensor([self.prefix], device=self.device)
                self.model.hidden(ids, cache=self.common)
            for t, prefix in zip(chain(*cache), chain(*self.common), strict=True):
                t[:, :, :begin] = prefix
            positions = torch.arange(begin, width, device=self.device).expand_as(tokens)
        if width > begin:
            tokens, lengths = tokens.to(self.device), lengths.to(self.device)
            self.model.prefill(tokens, lengths, cache, positions)
        return cache

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
        logits = soft_cap(self.head(hidden[:, 0] * self.logit_scale), self.logit_cap)
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
    pack: bool = False  # copies the weights into oneDNN's layout, in as much memory again
    graphs: bool = False  # replays steps as CUDA graphs
    span: int = 64  # the cache grows by so many slots: few shapes, and short samples stay cheap

    @classmethod
    def for_device(cls, device, longest):
        """longest: most new tokens of a sample. Copying the weights pays off from 16 on."""
        if device.type == "cpu":
            return cls("free", 1, pack=has_fast_bf16() and longest >= 16)
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

    def __post_init__(self):
        prompts = self.prompts
        # samples of one prompt stay together, prompts of similar length too
        self.waiting = deque(sorted(range(len(prompts)), key=lambda s: (-len(prompts[s]), s)))
        self.live = {}  # row -> sample
        self.seen = [0] * len(prompts)  # of each sample: tokens handed out so far
        self.where = {}  # number of a prompt -> its row in `prefilled`, the latest prefill's cache
        self.samples = Samples(*([None] * len(prompts) for _ in range(3)))
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
        prompts = [self.prompts[i * self.group] for i in numbers]
        self.prefilled = self.batch.prefill(prompts, rows, width)

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
):
    """Samples `group` continuations of each prompt (a list of ids) under the caller's autocast.

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
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    check(prompts, model.cfg)
    if not prompts:
        return Samples([], [], [])
    prompts = [[*prompt, *model.start_ids] for prompt in prompts]
    room = [model.cfg.max_positions - len(prompt) for prompt in prompts]
    limits = [min(pair) for pair in zip(limits, room, strict=True) for _ in range(group)]
    prompts = [prompt for prompt in prompts for _ in range(group)]
    sample_ids = sample_ids or range(len(prompts))
    device = device_of(model.head_weight)
    plan = replace(Plan.for_device(device, max(limits)), **(plan or {}))
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
        # an encoder reads the beginning of a prompt otherwise before another end
        prefix = [] if model.start_ids else prompts[0][: common_prefix(prompts)]
        batch = Batch(model, rows, prefix, longest, stop_ids, sampling, plan)
        for rope in batch.model.ropes.values():
            rope.switch = switch
        scheduler = Scheduler(batch, plan, rows, prompts, limits, group, uniforms)
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

    numbers = range(len(prompts))
    samples = Samples([[] for _ in numbers], [[] for _ in numbers], [False for _ in numbers])
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
