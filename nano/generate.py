"""Batched sampling with a key/value cache: prompts of any lengths in, tokens and their
log-probabilities out.

    samples = generate(model, prompts, max_new_tokens=128, stop_ids=tok.stop_ids)  # lists of ids
    samples.tokens[i], samples.logprobs[i], samples.finished[i]

`batch_size` rows are decoded together, one token a step. A row that ends makes room: the next
prompt moves in, and when none waits the batch shrinks, so that answers of unequal length cost their
sum and not rows x longest. The sample drawn depends on (seed, sample index) and the model alone,
not on its neighbours in the batch, the order of refills or the device."""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import LoRA, dense
from model import empty
from nano.config import UserError

PREFILL = 8192  # tokens of prompt that one forward takes


@dataclass
class Samples:
    """One entry per sample, sample g of prompt i at i * group + g. A stop id is part of the tokens,
    the prompt is not."""

    tokens: list  # lists of ids
    logprobs: list  # lists of floats, see `choose`
    finished: list  # True: ended by a stop id or by on_token; False: cut at its length limit
    row_steps: int = 0  # rows computed, summed over the steps; the tokens' share of it was of use


# ---------------------------------------------------------------------- sampling


def keep_from(logits, top_k=0, top_p=1.0):
    """The smallest logit that stays in each row, (R, 1): of the top_k likeliest tokens (0: all),
    the fewest whose probabilities add up to top_p (Holtzman et al. 2019, arXiv:1904.09751). What
    equals it stays too."""
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
    """One token a row, drawn by inverting the distribution function at `uniform`. logits (R, V),
    uniform (R,) in [0, 1).

    -> tokens (R,), logprobs (R,) fp32. Temperature 0 takes the likeliest token. The log-probability
    is that under softmax(logits / temperature) *before* top_k and top_p (temperature 0:
    softmax(logits)): without those filters it is the distribution sampled from, which is what
    policy gradients need; with them the token was likelier than it says."""
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


# ---------------------------------------------------------------------- the model for decoding


class FrozenLinear(nn.Module):
    """A linear layer that is only read. With `pack` the weight is stored as oneDNN's kernels read
    it, where F.linear would lay it out anew in each call: on a CPU steps are 1.5x faster."""

    def __init__(self, weight, bias, pack):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # small ones cost more to call than to compute
        self.packed = pack and weight.numel() >= 2**16
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
        self.weight = weight

    def forward(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def device_of(p):
    """Where a parameter is used: not always where it waits (FSDP with offload)."""
    return torch.device(p.device_mesh.device_type) if hasattr(p, "device_mesh") else p.device


def frozen(p, dtype):
    """A parameter in `dtype`. Where it is sharded (FSDP) it is gathered: all ranks must then
    generate together."""
    if hasattr(p, "full_tensor"):
        p = p.to(device_of(p)).full_tensor()
    return None if p is None else p.detach().to(dtype)


def frozen_linear(module, dtype, pack):
    """A linear layer of the model for decoding. Where its weight is copied in any case, the adapter
    is folded into it. A base that is no plain matrix is called as it is."""
    base = module.base if isinstance(module, LoRA) else module
    active = getattr(module, "active", None)
    linear = base
    if not hasattr(base, "dense"):
        folded = active is None or pack
        weight = dense(module) if folded else base.weight
        linear = FrozenLinear(frozen(weight, dtype), frozen(base.bias, dtype), pack)
        if folded:
            return linear
    if active is None:
        return linear
    adapted = LoRA(linear)
    adapted.training = False  # not by eval(), which would reach a base that training shares
    A, B = (frozen(t[active], dtype) for t in (module.lora_A, module.lora_B))
    adapted.put(active, A, B, module.scales[active])
    adapted.active = active
    return adapted


def snapshot(model, dtype, pack):
    """The model for decoding: a new one of the same shape, in evaluation mode, with nothing of
    FSDP, tensor parallelism or torch.compile around it. It shares the tensors that need neither a
    cast nor packing, and is built anew for each call of generate, since training changes the
    weights. The head is not part of it."""
    new = empty(model.cfg).eval()
    for name, module in list(new.named_modules()):
        if not name.startswith("model."):
            continue
        source = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            new.set_submodule(name, frozen_linear(source, dtype, pack))
            continue
        for key, p in source._parameters.items():
            setattr(module, key, nn.Parameter(frozen(p, dtype), requires_grad=False))
    if device_of(model.head_weight).type == "xla":
        for layer, source in zip(new.layers, model.layers, strict=True):
            layer._forward_hooks = source._forward_hooks  # they keep the rows on their devices
    return new


class Batch:
    """The rows being decoded: key/value cache and state, on the device and updated in place, so
    that a step has a fixed shape, nothing in it waits for the device, and CUDA can replay it as one
    graph."""

    def __init__(self, model, rows, request, plan):
        device = device_of(model.head_weight)
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
        self.model = snapshot(model, self.dtype, plan.pack)
        self.head = FrozenLinear(frozen(model.head_weight, self.dtype), None, plan.pack)
        self.sampling = request.sampling
        self.device = device
        self.stop = torch.tensor(list(request.stop_ids), dtype=torch.int64, device=device)
        self.cache = self.model.new_cache(rows, 0, self.dtype)
        self.graphs = {} if plan.graphs else None  # rows -> graph; None: seen once

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.last = zeros()  # the next input
        self.position = zeros()  # its slot
        self.count = zeros()  # tokens sampled
        self.limit = zeros()  # tokens allowed
        self.done = ~zeros(dtype=torch.bool)
        # a row that is done writes on behind its end, where nobody reads: hence one column more
        width = request.longest + 1
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
        """Another number of slots. Copied rather than viewed: kernels want the cache of a row and
        head in one piece."""
        change = slots - self.slots
        self.cache = [tuple(F.pad(t, (0, 0, 0, change)) for t in layer) for layer in self.cache]
        if self.graphs:
            self.graphs.clear()  # they point to the old cache

    def prefill(self, prompts, rows, width):
        """Cache (rows, K, width, D) of the prompts, right-padded; what stands behind a prompt's end
        is overwritten before any token can see it. The last token of a prompt is left to the first
        step."""
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        for row, ids in zip(tokens, prompts, strict=False):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])
        cache = self.model.new_cache(rows, width, self.dtype)
        if width:
            self.model.hidden(tokens.to(self.device), cache=cache)
        return cache

    def place(self, slots, prompts, limits, uniforms, cache, sources):
        """New samples for the rows `slots`: their prompts, and where in a prefilled cache each
        prompt stands."""
        slots, sources = (torch.tensor(i, device=self.device) for i in (slots, sources))
        for layer, filled in zip(self.cache, cache, strict=True):
            for t, new in zip(layer, filled, strict=True):
                t[slots, :, : new.shape[2]] = new[sources]
        self.last[slots] = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.position[slots] = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        self.limit[slots] = torch.tensor(limits, device=self.device)
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


# ---------------------------------------------------------------------- who is decoded when


@dataclass
class Request:
    """What is wanted: `group` samples of each prompt, of which sample s continues prompt s //
    group."""

    prompts: list  # lists of ids
    limits: list  # most new tokens, for each prompt
    group: int
    sampling: dict  # temperature, top_k, top_p
    stop_ids: tuple
    seed: tuple
    sample_ids: list  # the number that each sample draws its random numbers by

    @property
    def longest(self):
        return max(self.limits)

    def prompt(self, sample):
        return self.prompts[sample // self.group]

    def limit(self, sample):
        return self.limits[sample // self.group]

    def uniforms(self, sample):
        """The random numbers (longest + 1,) of a sample, which depend on its number and the seed
        alone."""
        if self.sampling["temperature"] == 0:
            return np.zeros(self.longest + 1, dtype=np.float32)
        entropy = [*self.seed, self.sample_ids[sample]]
        return np.random.default_rng(entropy).random(self.longest + 1, dtype=np.float32)


def check(prompts, limits, temperature, top_k, top_p, group, batch_size, cfg):
    """UserError for what no model, or not this one, can do."""
    if not (temperature >= 0 and 0 < top_p <= 1 and top_k >= 0 and group >= 1 and batch_size >= 1):
        raise UserError(
            f"temperature={temperature} top_k={top_k} top_p={top_p} group={group} "
            f"batch_size={batch_size}: temperature and top_k must be 0 or more, top_p in (0, 1], "
            "group and batch_size 1 or more"
        )
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
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
        if limit < 1:
            raise UserError(f"max_new_tokens={limit}: must be 1 or more")


@dataclass
class Plan:
    """How a device likes to decode. `for_device` knows; generate(plan=) changes some of it."""

    # free: computes the live rows and no others; few: the batch, its half, quarter ...; fixed: runs
    # each batch to its end in one shape
    shapes: str
    sync_every: int  # steps between two looks at which rows are done
    pack: bool  # copies the weights into oneDNN's layout, which takes as much memory as they do
    graphs: bool  # replays steps as CUDA graphs
    span: int  # the cache grows by so many slots: short sequences stay cheap, and few shapes occur

    @classmethod
    def for_device(cls, device, longest):
        """longest: most new tokens of a sample. A copy of the weights is worth its time from 16
        on."""
        if device.type == "cpu":
            able = torch.backends.mkldnn.is_available()
            able = able and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            return cls("free", 1, pack=able and longest >= 16, graphs=False, span=64)
        if device.type == "xla":  # each shape is compiled: one
            return cls("fixed", 8, pack=False, graphs=False, span=64)
        cuda = device.type == "cuda"  # each shape is recorded: few
        return cls("few", 8, pack=False, graphs=cuda, span=256 if cuda else 64)


class Scheduler:
    """Decides which samples are in the batch. A row that ends makes room for the next prompt; when
    none waits, the batch shrinks."""

    def __init__(self, batch, request, plan, rows):
        self.batch, self.request, self.plan = batch, request, plan
        self.rows = rows  # of the batch
        # samples of one prompt stay together, prompts of similar length too
        count = len(request.prompts) * request.group
        order = sorted(range(count), key=lambda s: (-len(request.prompt(s)), s))
        self.waiting = deque(order)
        self.live = {}  # row -> sample
        self.seen = {}  # sample -> tokens handed out so far
        self.prefilled = None  # the latest prefill's cache
        self.where = {}  # prompt -> its row there
        self.samples = Samples([[]] * count, [[]] * count, [False] * count)
        self.whole_width = 0  # of every prefill, with fixed shapes
        if plan.shapes == "fixed":
            self.whole_width = self.round_up(max(map(len, request.prompts)) - 1)

    def round_up(self, n):
        return -(-n // self.plan.span) * self.plan.span

    def wants_refill(self):
        """Whether enough rows are free for the next prompts: a few at a time, or all where shapes
        are fixed."""
        if not self.waiting or not self.live:
            return bool(self.waiting)
        return self.plan.shapes != "fixed" and self.rows - len(self.live) >= self.rows / 8

    def refill(self, step_hook):
        """Moves waiting samples into the free rows. Each prompt is prefilled once for its whole
        group."""
        free = deque(row for row in range(self.rows) if row not in self.live)
        while free and self.waiting:
            if self.waiting[0] // self.request.group not in self.where:
                self.prefill(len(free))
            rows, samples = [], []
            while free and self.waiting and self.waiting[0] // self.request.group in self.where:
                rows.append(free.popleft())
                samples.append(self.waiting.popleft())
            self.place(rows, samples, free)
            if step_hook:
                step_hook()

    def prefill(self, free):
        """Prefills the next waiting prompts, no more than there are free rows, and not too many
        tokens at once."""
        fixed = self.plan.shapes == "fixed"
        width = self.whole_width or len(self.request.prompt(self.waiting[0])) - 1
        samples = [s for _, s in zip(range(free), self.waiting, strict=False)]
        numbers = list(dict.fromkeys(s // self.request.group for s in samples))
        if not fixed:
            numbers = numbers[: max(1, PREFILL // max(width, 1))]
        self.where = {prompt: row for row, prompt in enumerate(numbers)}
        prompts = [self.request.prompts[i] for i in numbers]
        self.prefilled = self.batch.prefill(prompts, self.rows if fixed else len(prompts), width)

    def place(self, rows, samples, free):
        """Puts prefilled samples into rows of the batch."""
        request = self.request
        self.live.update(zip(rows, samples, strict=True))
        self.seen.update((s, 0) for s in samples)
        width = self.prefilled[0][0].shape[2]
        if width > self.batch.slots:
            self.batch.resize(width)
        prompts = [request.prompt(s) for s in samples]
        limits = [request.limit(s) for s in samples]
        uniforms = [request.uniforms(s) for s in samples]
        sources = [self.where[s // request.group] for s in samples]
        if self.plan.shapes == "fixed":  # rows left over are done from the start
            for row in free:
                rows.append(row)
                prompts.append([0])
                limits.append(0)
                uniforms.append(np.zeros_like(uniforms[0]))
                sources.append(0)
        self.batch.place(rows, prompts, limits, np.stack(uniforms), self.prefilled, sources)

    def shrink(self):
        """Moves live rows to the front, where there are few -> how many rows the next steps
        compute."""
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
        request, live = self.request, self.live.values()
        steps = min(self.plan.sync_every, max(request.limit(s) - self.seen[s] for s in live))
        reach = max(len(request.prompt(s)) - 1 + self.seen[s] for s in live) + steps
        if self.plan.shapes == "fixed":
            reach = self.whole_width + self.round_up(request.longest)
        slots = self.round_up(reach)
        if slots > self.batch.slots or 2 * slots <= self.batch.slots:
            self.batch.resize(slots)
        return steps

    def collect(self, on_token):
        """Shows the new tokens to on_token, and takes the samples that are done out of the
        batch."""
        batch = self.batch
        counts, dones = torch.stack((batch.count, batch.done.long())).tolist()
        if on_token or any(dones[row] for row in self.live):
            tokens, logprobs = batch.tokens.cpu(), batch.logprobs.cpu()
        for row, sample in list(self.live.items()):
            begin, end = self.seen[sample], counts[row]
            stopped = False
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
                self.samples.finished[sample] = stopped or ids[-1] in self.request.stop_ids


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
    plan=None,
):
    """Samples `group` continuations of each prompt (a list of ids) under the caller's autocast ->
    Samples.

    max_new_tokens: an int, or a list with one a prompt; a sample also ends at the model's
    max_positions. temperature (0: greedy), top_k (0: off), top_p: a token that they remove has
    probability exactly 0. stop_ids end a sample and belong to it. on_token(sample, token) sees each
    token in order and ends the sample by returning True: streaming and stop strings. seed: an int
    or a sequence of them, for instance (seed, step). sample_ids: the number that each sample draws
    its random numbers by (default 0, 1, ...), so that ranks can share out the samples of one call.
    batch_size: rows decoded together; the first prefill of a prompt serves its whole group.
    step_hook is called after each step and prefill: XLA cuts its graph there. plan: fields of Plan
    that are to differ from what the device likes, for instance dict(sync_every=1) to stream
    smoothly. Raises UserError for an empty or too long prompt, and for settings out of range."""
    several = isinstance(max_new_tokens, (list, tuple))
    limits = list(max_new_tokens) if several else [max_new_tokens] * len(prompts)
    check(prompts, limits, temperature, top_k, top_p, group, batch_size, model.cfg)
    if not prompts:
        return Samples([], [], [])
    room = [model.cfg.max_positions - len(prompt) for prompt in prompts]
    count = len(prompts) * group
    request = Request(
        prompts,
        [min(pair) for pair in zip(limits, room, strict=True)],
        group,
        dict(temperature=temperature, top_k=top_k, top_p=top_p),
        stop_ids,
        seed if isinstance(seed, (list, tuple)) else (seed,),
        sample_ids or range(count),
    )
    plan = replace(Plan.for_device(device_of(model.head_weight), request.longest), **(plan or {}))
    rows = min(batch_size, count)
    batch = Batch(model, rows, request, plan)
    scheduler = Scheduler(batch, request, plan, rows)
    while scheduler.waiting or scheduler.live:
        if scheduler.wants_refill():
            scheduler.refill(step_hook)
        live_rows = scheduler.shrink()
        steps = scheduler.make_room()
        for _ in range(steps):
            batch.advance(live_rows)
            if step_hook:
                step_hook()
        scheduler.samples.row_steps += live_rows * steps
        scheduler.collect(on_token)
    return scheduler.samples
