"""Measures a model on tasks, the files of tasks/.

    benchmark = prepare(task, tok, model.cfg, shots=5, limit=200)   # the prompts, as ids
    result = measure(benchmark, model, tok, rt)                     # at any step of a training
    result.metrics["acc"], result.stderr["acc"], result.examples

There are two protocols. A metric's name says which one it comes from.

Log-likelihood, for tasks with choices. Each option is a continuation of the prompt, and the
likeliest option is the model's choice.

    acc             the likeliest by the sum over the option's tokens
    acc_norm        the likeliest by the sum over the option's length in UTF-8 bytes
    acc_norm_chars  the same by its length in characters
    acc, perplexity of a task with a single option: whether greedy decoding gives it, and e to the
                    power of its mean negative log-likelihood

Generation, for free answers. The model answers greedily.

    em              the mean of the task's score
    em_strict       the mean of its strict score

Every record counts. Neither the number of ranks nor the size of a batch changes the result.
"""

import math
from dataclasses import asdict, dataclass, field
from itertools import groupby
from os.path import commonprefix  # of any sequences
from typing import Annotated

import numpy as np
import torch

from nano import generate, losses, tasks
from nano.config import UserError

# Tokens of a batch with all that they see, and tokens that it computes. On a CPU small batches are
# faster: they stay in its cache.
SLOTS = dict(cpu=4096)
COMPUTED = dict(cpu=256)
GPU_SLOTS = 131072
PADDING = dict(cpu=16)  # tokens of padding in a batch that cost more than a forward more
PACKED = dict(cpu=4096)  # tokens from which on copying the weights into a faster layout pays off


# ------------------------------------------------------------------------------- log-likelihoods


@dataclass
class Question:
    """A context and its options, as ids. Questions of the same key begin alike.

    given: of each option how many of its first tokens belong to the context and are not scored, for
    options whose contexts are only in part the same; none of them by default."""

    context: list
    options: list  # of lists
    key: str = ""
    given: list | None = None

    def __post_init__(self):
        self.given = self.given or [0] * len(self.options)

    @property
    def length(self):
        return len(self.context) + max(map(len, self.options)) - 1


def batched(items, sizes, limits, padding=math.inf):
    """Lists of neighbours among `items`, each a batch with a row for each item.

    sizes(item): what the item's row has of each kind of tokens. Rows are padded to the longest of
    their batch. A batch has at most `limits` of each kind, and at most `padding` of the first."""
    batch, longest, real = [], (0,) * len(limits), 0
    for item in items:
        size = sizes(item)
        with_it = [*map(max, size, longest)]
        rows = len(batch) + 1
        full = any(rows * n > limit for n, limit in zip(with_it, limits, strict=True))
        if batch and (full or rows * with_it[0] - real - size[0] > padding):
            yield batch
            batch, with_it, real = [], size, 0
        batch.append(item)
        longest = with_it
        real += size[0]
    if batch:
        yield batch


def padded(rows, device):
    """Lists of ids -> (N, longest) int64, zeros behind each row's end."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return out.to(device)


def prefix_cache(model, ids, device):
    """The key/value cache of one row `ids`."""
    cache = model.new_cache(1, len(ids))
    model.hidden(torch.tensor([ids], device=device), cache=cache)
    return cache


class Memory:
    """The keys and values of contexts, without padding: of each layer a pair, both (N, K, D) for N
    tokens.

    prefix: how many tokens all contexts begin with; common: their cache, of one row. They are the
    first of the N tokens."""

    def __init__(self, prefix, common):
        self.prefix = prefix
        self.layers = [[[], []] for _ in common or ()]
        self.starts = {}  # number of a question -> where its tokens begin
        self.count = 0
        if common:
            self.add(common, [(None, prefix)], 0)

    def add(self, cache, rows, begin):
        """Takes over rows of a cache. rows: (number of a question, end) of each row, whose tokens
        stand in the slots begin ... end - 1."""
        self.layers = self.layers or [[[], []] for _ in cache]
        places = [(n, slot) for n, (_, end) in enumerate(rows) for slot in range(begin, end)]
        index, slots = torch.tensor(places, device=cache[0][0].device).T
        for layer, new in zip(self.layers, cache, strict=True):
            for parts, t in zip(layer, new, strict=True):
                parts.append(t[index, :, slots])
        for number, end in rows:
            self.starts[number] = self.count
            self.count += end - begin

    def cache(self, rows, room):
        """A cache whose rows begin with contexts, with `room` slots behind the longest.

        rows: (number of a question, tokens of its context) of each."""
        width = max(size for _, size in rows) + room
        index = torch.arange(width).repeat(len(rows), 1)
        for row, (number, size) in zip(index, rows, strict=True):
            row[self.prefix : size] += self.starts[number] - self.prefix
            row[size:] = 0  # to be written
        index = index.to(self.layers[0][0][0].device)
        for layer in self.layers:
            layer[:] = [parts if len(parts) == 1 else [torch.cat(parts)] for parts in layer]

        def copied(part):
            # indexing with the matrix would take thrice as long on a CPU
            rows = part.index_select(0, index.flatten())
            return rows.view(*index.shape, *part.shape[1:]).transpose(1, 2)

        return [tuple(copied(part) for (part,) in layer) for layer in self.layers]


def score(model, head, questions, prefix, common, limits, padding=math.inf):
    """Scores the options of some questions -> (logprobs, hits), both (N,) for N options in order.

    logprobs: the sum over an option's tokens. hits: whether greedy decoding would give them all.
    prefix, common: the number of tokens that all contexts begin with, and the cache of them.
    limits: tokens that a forward computes, and slots of its cache. padding: as in `batched`.

    A context is computed once, with what its options begin with alike. Its last position predicts
    the first token in which they differ. Then the rest of the longer options follows, those of
    similar length together, each behind a copy of its context's keys and values. A context with a
    single option is one row with it.
    """
    device = head.weight.device
    firsts = np.cumsum([0, *(len(q.options) for q in questions)])
    states, targets, owners = [], [], []  # owners: of each target the number of its option

    def predict(n, hidden, tokens):
        states.append(hidden)
        targets.extend(tokens)
        owners.extend([n] * len(tokens))

    memory = Memory(prefix, common)
    alike = [commonprefix([o[:-1] for o in q.options]) for q in questions]
    rows = [q.context + tokens for q, tokens in zip(questions, alike, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for batch in batched(order, lambda i: (len(rows[i]) - prefix, len(rows[i])), limits, padding):
        tokens = padded([rows[i][prefix:] for i in batch], device)
        remembered = [i for i in batch if len(questions[i].options) > 1]
        cache = positions = None
        if common or remembered:
            cache = model.new_cache(len(batch), prefix + tokens.shape[1])
        if common:
            for layer, new in zip(cache, common, strict=True):
                for t, n in zip(layer, new, strict=True):
                    t[:, :, :prefix] = n
            positions = prefix + torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        docs = None
        if cache is None and model.cfg.rope_switch:  # padding must not count as a part of a row
            docs = padded([[1] * len(rows[i]) for i in batch], device)
        hidden = model.hidden(tokens, positions, docs, cache)
        for row, i in zip(hidden, batch, strict=True):
            # the last state of the context, and those of what the options begin with
            row = row[len(questions[i].context) - prefix - 1 : len(rows[i]) - prefix]
            options = zip(questions[i].options, questions[i].given, strict=True)
            for n, (option, given) in enumerate(options, firsts[i]):
                predict(n, row[given : len(option)], option[given : len(row)])
        if remembered:
            # of a row that is not needed again, no slot is taken over
            ends = [len(rows[i]) if i in remembered else prefix for i in batch]
            memory.add(cache, [*zip(batch, ends, strict=True)], prefix)

    longer = [
        (i, n, option[len(alike[i]) :], given - len(alike[i]))
        for i, q in enumerate(questions)
        for n, (option, given) in enumerate(zip(q.options, q.given, strict=True), firsts[i])
        if len(option) > len(alike[i]) + 1
    ]
    longer.sort(key=lambda item: (-len(item[2]), -len(rows[item[0]])))

    def sizes(item):
        i, _, rest, _ = item
        return len(rest) - 1, len(rows[i]) + len(rest) - 1

    for batch in batched(longer, sizes, limits, padding):
        tokens = padded([rest[:-1] for _, _, rest, _ in batch], device)
        contexts = [(i, len(rows[i])) for i, _, _, _ in batch]
        starts = torch.tensor([size for _, size in contexts], device=device)
        positions = starts[:, None] + torch.arange(tokens.shape[1], device=device)
        cache = memory.cache(contexts, room=tokens.shape[1])
        hidden = model.hidden(tokens, positions, cache=cache)
        for row, (_, n, rest, given) in zip(hidden, batch, strict=True):
            first = max(given, 1)
            predict(n, row[first - 1 : len(rest) - 1], rest[first:])

    return summed(head, states, targets, owners, firsts[-1])


def score_answers(model, head, questions):
    """`score` for an encoder-decoder: the encoder reads each context once, and what it makes
    of it is copied for the options."""
    device = head.weight.device
    options = [(i, option) for i, q in enumerate(questions) for option in q.options]
    lengths = torch.tensor([len(q.context) for q in questions], device=device)
    tokens = padded([[*model.start_ids, *option[:-1]] for _, option in options], device)
    cache = model.new_cache(len(questions), int(lengths.max()) + tokens.shape[1])
    model.prefill(padded([q.context for q in questions], device), lengths, cache)
    sources = torch.tensor([i for i, _ in options], device=device)
    copies = [tuple(t[sources] for t in layer) for layer in cache]
    positions = lengths[sources, None] + torch.arange(tokens.shape[1], device=device)
    hidden = model.hidden(tokens, positions, cache=copies)
    states = [row[: len(option)] for row, (_, option) in zip(hidden, options, strict=True)]
    targets = [token for _, option in options for token in option]
    owners = [n for n, (_, option) in enumerate(options) for _ in option]
    return summed(head, states, targets, owners, len(options))


def summed(head, states, targets, owners, count):
    """(logprobs, hits) of `count` options, from the tokens of all of them. states: hidden states,
    as lists of rows. targets: the tokens that they predict. owners: the option of each."""
    targets = torch.tensor(targets, device=head.weight.device)
    logprobs, hits = (t.cpu() for t in losses.token_scores(torch.cat(states), head, targets))
    owners = torch.tensor(owners)
    totals = torch.zeros(count, dtype=torch.float64).index_add(0, owners, logprobs.double())
    return totals, torch.zeros(count).index_add(0, owners, 1 - hits) == 0


@torch.no_grad()
def loglikelihoods(model, rt, questions, slots=None):
    """[(logprobs, hits)] of each question's options, arrays as in `score`.

    Every rank calls it with the same questions. The ranks share them out, and each gets all
    results. slots: of the cache of a batch; by default what suits the device."""
    sizes = [len(q.options) for q in questions]
    switch = model.cfg.rope_switch
    apart = switch is not None and max(q.length for q in questions) > switch
    # There other rotary frequencies hold, so that no option goes on from the cache of its context.
    # An encoder has to read what is given of an option.
    if apart or (model.start_ids and any(any(q.given) for q in questions)):
        pairs = [(q, *pair) for q in questions for pair in zip(q.options, q.given, strict=True)]
        questions = [Question(q.context + o[:given], [o[given:]]) for q, o, given in pairs]
    kind = rt.device.type
    slots = slots or SLOTS.get(kind, GPU_SLOTS)
    limits = min(slots, COMPUTED.get(kind, slots)), slots
    padding = PADDING.get(kind, math.inf)
    length = sum(len(q.context) + sum(map(len, q.options)) for q in questions)
    copy = generate.snapshot(model, rt.dtype, pack=length >= PACKED.get(kind, math.inf))
    head = model.head._replace(weight=generate.frozen(model.head_weight, rt.dtype))
    firsts = np.cumsum([0, *(len(q.options) for q in questions)])
    totals = torch.zeros(2, firsts[-1], dtype=torch.float64)  # logprobs, hits
    turn = 0
    order = sorted(range(len(questions)), key=lambda i: questions[i].key)
    for _, same in groupby(order, key=lambda i: questions[i].key):
        numbers = sorted(same, key=lambda i: -questions[i].length)
        # an encoder reads the beginning of a prompt otherwise before another end
        prefix = 0
        if not apart and not copy.start_ids:
            prefix = generate.common_prefix([questions[i].context for i in numbers])
        common = None
        for part in batched(numbers, lambda i: (len(questions[i].context),), (slots,)):
            turn += 1
            if turn % rt.world != rt.rank:
                continue
            if prefix and common is None:
                ids = questions[part[0]].context[:prefix]
                common = prefix_cache(copy, ids, head.weight.device)
            chosen = [questions[i] for i in part]
            if copy.start_ids:
                scored = score_answers(copy, head, chosen)
            else:
                scored = score(copy, head, chosen, prefix, common, limits, padding)
            places = np.concatenate([np.arange(firsts[i], firsts[i + 1]) for i in part])
            totals[:, places] = torch.stack([t.double() for t in scored])
            rt.sync()
    logprobs, hits = rt.all_sum(totals.to(rt.device) if rt.world > 1 else totals).cpu().numpy()
    borders = np.cumsum(sizes)[:-1]
    return list(zip(np.split(logprobs, borders), np.split(hits > 0, borders), strict=True))


def answers(model, tok, rt, prompts, max_new_tokens, stops=(), batch_size=32):
    """Greedy answers to prompts (lists of ids) -> [(text, whether the answer ended by itself)].

    Every rank calls it with the same prompts and gets all answers. stops: strings that end an
    answer, which goes on from its prompt as one text. Without them the answer is a message."""
    # a rank without a prompt answers one all the same, because sharded weights take all ranks
    numbers = range(rt.rank, len(prompts), rt.world) or [0]
    ids = [[] for _ in numbers]

    def on_token(sample, token):
        ids[sample].append(token)
        return tok.decode_until(ids[sample], stops, inside=True)[1]

    with rt.autocast():
        samples = generate.generate(
            model,
            [prompts[i] for i in numbers],
            max_new_tokens,
            temperature=0.0,
            stop_ids=tok.stop_ids,
            batch_size=batch_size,
            on_token=on_token if stops else None,
            step_hook=rt.sync,
        )
    # one row a prompt: whether it is finished, how many tokens, the tokens
    table = torch.zeros(len(prompts), 2 + max_new_tokens, dtype=torch.int64)
    for i, tokens, finished in zip(numbers, samples.tokens, samples.finished, strict=True):
        if i % rt.world == rt.rank:
            row = [int(finished), len(tokens), *tokens]
            table[i, : len(row)] = torch.tensor(row)
    table = rt.all_sum(table.to(rt.device) if rt.world > 1 else table).tolist()
    return [
        (tok.decode_until(row[2 : 2 + row[1]], stops, inside=bool(stops))[0], bool(row[0]))
        for row in table
    ]


# --------------------------------------------------------------------------------------- tasks

# the annotations of the keys that name tasks, in eval.py and in the stages
Shots = Annotated[tuple[int, ...], ("0 or more each", lambda x: min(x, default=0) >= 0)]


def load_tasks(names, shots=(), files=(), shot_files=(), prefix=""):
    """[(Task, shots)] of the names in tasks=.

    shots is a number for each task, or one for all. files and shot_files have a path for each task,
    or are empty. prefix: of the keys that messages name. UserError for other lengths, and for a
    task that is named twice."""
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"the task {min(twice)} is named twice: name it once")
    count = len(names)
    lists = []
    for key, values, default in (
        ("shots", shots, 0),
        ("files", files, ""),
        ("shot_files", shot_files, ""),
    ):
        if len(values) not in (0, 1, count) or (len(values) == 1 < count and key != "shots"):
            raise UserError(
                f"{prefix}{key}= has {len(values)} elements for {count} tasks: give one for each"
                + (", or one number for all" if key == "shots" else ' ("" for the hub)')
            )
        lists.append(values * count if len(values) == 1 else values or (default,) * count)
    loaded = [
        (tasks.load(name, file, shot_file, prefix), n)
        for name, n, file, shot_file in zip(names, *lists, strict=True)
    ]
    for task, _ in loaded:
        if task.is_set:
            raise UserError(
                f"{prefix}tasks= names {task.name}, which is a training set: it measures nothing"
            )
    return loaded


# -------------------------------------------------------------------------------------- prompts


def draw_shots(task, pool, records, count, seed):
    """For each record the `count` records that are shown before it, never the record itself.

    They come from the record's group in `pool`: the first ones where the task is IN_ORDER, else
    drawn by the seed. The records of a group are shown the same ones, so that a model computes them
    once. UserError for a group that has fewer."""
    groups = {}
    for shot in pool:
        groups.setdefault(task.group_of(shot), []).append(shot)
    for name, group in groups.items():
        if not getattr(task.module, "IN_ORDER", False):
            order = np.random.default_rng(seed).permutation(len(group))
            groups[name] = [group[i] for i in order]
    shown = []
    for record in records:
        name = task.group_of(record)
        shots = [shot for shot in groups.get(name, [])[: count + 1] if shot != record][:count]
        if len(shots) < count:
            where = f" of {name}" if name else ""
            raise UserError(
                f"{task.name}: {count} shots do not come out of the {len(groups.get(name, []))} "
                f"records{where} that may be shown: lower {task.prefix}shots="
            )
        shown.append(shots)
    return shown


def split_ids(tok, context, continuation):
    """(ids of the context, ids of the continuation) of one text.

    They are those of lm-eval, so that numbers compare: white space at the end of the context
    belongs to the continuation, and what the context alone would be in tokens is taken from the
    whole. An empty context is BOS, or EOS where the model has no BOS. An encoder reads the context
    as a text of its own."""
    start = context.rstrip()
    if tok.prompt_end:
        return [*tok.encode(start), *tok.prompt_end], tok.encode(
            context[len(start) :] + continuation
        )
    ids = tok.encode(context + continuation, bos=tok.add_bos)
    if not start:
        first = tok.bos_id if tok.bos_id is not None else tok.eos_id
        return [first], ids[1:] if tok.add_bos else ids
    # at least one token is left to score
    size = min(len(tok.encode(start, bos=tok.add_bos)), len(ids) - 1)
    return ids[:size], ids[size:]


def conversation(task, record, shots):
    """The messages that ask for the record's answer, with the shots as earlier turns."""
    turns = []
    for shot in shots:
        turns += task.solved(shot)
    turns += task.request(record)
    turns[0] = turns[0] | dict(content=task.intro_of(record) + turns[0]["content"])
    return turns


def shots_text(task, record, shots):
    return task.intro_of(record) + "".join(task.shot(shot) + "\n\n" for shot in shots)


def chat_options(tok, turns, replies):
    """[(context ids, option ids)] of the assistant's replies in a conversation, without the tokens
    that end a reply."""
    pairs = []
    for answer in replies:
        ids, mask = tok.render([*turns, answer], last_only=True)
        start = mask.index(1)
        end = len(mask) - mask[::-1].index(1)
        while end > start + 1 and ids[end - 1] in tok.stop_ids:
            end -= 1
        pairs.append((ids[:start], ids[start:end]))
    return pairs


def option_ids(task, tok, record, shots, chat):
    """[(context ids, option ids)] of a record with choices."""
    if chat:
        return chat_options(tok, conversation(task, record, shots), task.replies(record))
    before = shots_text(task, record, shots)
    return [split_ids(tok, before + start, end) for start, end in task.options_of(record)]


def prompt_ids(task, tok, record, shots, chat):
    """The ids after which the free answer to a record begins."""
    if chat:
        turns = conversation(task, record, shots)
        if tok.template == "columns" and hasattr(task.module, "columns"):
            return chat_options(tok, turns, task.replies(record))[0][0]  # the answer has a name
        return tok.render(turns, add_generation_prompt=True)[0]
    text = shots_text(task, record, shots) + task.prompt(record)
    return [*tok.encode(text, bos=tok.add_bos), *tok.prompt_end]


def fitting(build, size, shots, room):
    """(build(shots), how many shots are in it), with as many shots as fit into `room` tokens by
    `size`. The oldest shots go first, and whole."""
    for first in range(len(shots) + 1):
        built = build(shots[first:])
        if size(built) <= room:
            break
    return built, len(shots) - first


def uses_chat(chat, tok):
    """Whether prompts go through the chat template. chat: auto, true or false. UserError for true
    where the model has none."""
    has_template = tok.template not in (None, "plain")
    if chat == "true" and not has_template:
        raise UserError("chat=true needs a chat template, and the model has none: set chat=false")
    return has_template and chat != "false"


@dataclass
class Benchmark:
    """A task, ready for the models of one tokenizer: its records and their prompts as ids.

    prompts: of each record, with choices a list of (context ids, option ids), else the ids of one
    prompt. fewer_shots, truncated: how many records lost shots, or the beginning of their own text,
    because the model has no room for them."""

    task: tasks.Task
    records: list
    prompts: list
    keys: list  # of each record, the text that it shares with others
    shots: int
    chat: bool
    max_new_tokens: int = 0
    fewer_shots: int = 0
    truncated: int = 0


def prepare(task, tok, model_cfg, shots=0, limit=0, chat="auto", seed=0):
    """The Benchmark of a task. limit: the first so many records; 0: all. UserError for a task of
    which no shot fits beside any record, and for an option longer than the model."""
    chat = uses_chat(chat, tok)
    records = task.records()
    records = records[:limit] if limit else records
    pool = task.records(shots=True) if shots else []
    shown = draw_shots(task, pool, records, shots, seed)
    room = model_cfg.max_positions
    new = 0 if task.has_choices else min(task.module.MAX_NEW_TOKENS, room // 2)
    benchmark = Benchmark(task, records, [], [], shots, chat, new)
    kept = 0
    for number, (record, examples) in enumerate(zip(records, shown, strict=True), 1):
        built = option_ids if task.has_choices else prompt_ids

        def build(examples, built=built, record=record):
            return built(task, tok, record, examples, chat)

        def size(prompt):
            if not task.has_choices:
                return len(prompt) + new
            return max(len(context) + len(option) - 1 for context, option in prompt)

        prompt, count = fitting(build, size, examples, room)
        key = shots_text(task, record, examples[len(examples) - count :])
        if size(prompt) > room:
            prompt = shortened(prompt, room - new, f"{task.name}, record {number}")
            key = f"record {number}"  # it begins like no other
            benchmark.truncated += 1
        kept += count
        benchmark.fewer_shots += count < shots
        benchmark.prompts.append(prompt)
        benchmark.keys.append(key)
    if shots and not kept:
        raise UserError(
            f"{task.name}: not one shot fits beside a record into the model's {room} tokens: "
            f"set {task.prefix}shots=0"
        )
    return benchmark


def shortened(prompt, room, name):
    """A prompt of a Benchmark whose beginning is left out, so that it fits into `room` tokens."""
    if isinstance(prompt[0], int):
        return prompt[-room:]
    longest = max(len(option) for _, option in prompt)
    if longest > room:
        raise UserError(f"{name}: an option has {longest} tokens, and the model takes {room}")
    return [(context[-(room + 1 - len(option)) :], option) for context, option in prompt]


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """What a model got in a task. metrics and stderr: {name: value}. chance: the accuracy of
    guessing. groups: {name: accuracy}. examples: one dict a record."""

    task: str
    protocol: str
    chat: bool
    shots: int
    count: int
    metrics: dict
    stderr: dict
    chance: float = 0.0
    groups: dict = field(default_factory=dict)
    fewer_shots: int = 0
    truncated: int = 0
    examples: list = field(default_factory=list)

    @property
    def main(self):
        """The name of the metric that stands for the task in the average."""
        return next(iter(self.metrics))

    @property
    def centred(self):
        """The main metric with guessing at 0 and the best at 1."""
        return (self.metrics[self.main] - self.chance) / (1 - self.chance)

    def as_json(self):
        values = asdict(self)
        del values["examples"]
        return values | dict(centred=self.centred)


def choice_values(task, record, logprobs, hits, texts):
    """{metric: value} of one record. texts: of its options, by whose lengths the sums are normed.

    A task with a single option has "nll" in the place of its perplexity."""
    if hasattr(task.module, "metrics"):
        return task.module.metrics(record, logprobs)
    if len(logprobs) == 1:
        return dict(acc=float(hits[0]), nll=-float(logprobs[0]))
    gold = task.gold(record)
    lengths = dict(
        acc=np.ones(len(texts)),
        acc_norm=np.array([max(len(text.encode()), 1) for text in texts]),
        acc_norm_chars=np.array([max(len(text), 1) for text in texts]),
    )
    return {name: float(np.argmax(logprobs / n) in gold) for name, n in lengths.items()}


def by_loglikelihood(benchmark, model, rt, slots=None):
    """(values, examples), one dict a record each, from the log-likelihoods of the options."""
    task = benchmark.task
    questions, owners = [], []
    for i, pairs in enumerate(benchmark.prompts):
        # an encoder reads a context as a whole
        shared = [] if model.start_ids else commonprefix([context for context, _ in pairs])
        for _, same in groupby(pairs, key=lambda pair: shared or pair[0]):
            part = list(same)
            context = shared or part[0][0]
            options = [begin[len(context) :] + option for begin, option in part]
            given = [len(begin) - len(context) for begin, _ in part]
            questions.append(Question(context, options, benchmark.keys[i], given))
            owners.append(i)
    parts = [([], []) for _ in benchmark.records]
    scored = loglikelihoods(model, rt, questions, slots)
    for i, (logprobs, hits) in zip(owners, scored, strict=True):
        parts[i][0].extend(logprobs)
        parts[i][1].extend(hits)
    values, examples = [], []
    for record, (logprobs, hits) in zip(benchmark.records, parts, strict=True):
        if benchmark.chat:
            texts = task.choices(record)
        else:
            texts = [end.removeprefix(" ") for _, end in task.options_of(record)]
        logprobs = np.array(logprobs)
        values.append(choice_values(task, record, logprobs, hits, texts))
        examples.append(
            dict(
                prompt=task.prompt(record),
                options=task.choices(record),
                logprobs=logprobs.tolist(),
                answer=int(logprobs.argmax()),
                gold=sorted(task.gold(record)),
            )
        )
    return values, examples


def by_generation(benchmark, model, tok, rt, batch_size=32):
    """(values, examples), one dict a record each, from greedy answers."""
    task = benchmark.task
    stops = () if benchmark.chat else task.module.STOP
    texts = answers(model, tok, rt, benchmark.prompts, benchmark.max_new_tokens, stops, batch_size)
    values, examples = [], []
    for record, (text, finished) in zip(benchmark.records, texts, strict=True):
        prompt = task.prompt(record)
        row = dict(em=task.score(prompt, text, finished, record))
        if hasattr(task.module, "strict"):
            row["em_strict"] = task.module.strict(prompt, text, finished, record)
        values.append(row)
        examples.append(dict(prompt=prompt, answer=text, finished=finished))
        if hasattr(task.module, "answer"):
            examples[-1]["gold"] = task.answer(record)
    return values, examples


def stderr(values):
    """The standard error of a mean: the sample's standard deviation over the root of its size."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def measure(benchmark, model, tok, rt, slots=None, batch_size=32):
    """The Result of a model. Every rank calls it with the same arguments and gets all of it.

    slots, batch_size: what is computed together, of options and of answers."""
    task = benchmark.task
    if task.has_choices:
        values, examples = by_loglikelihood(benchmark, model, rt, slots)
    else:
        values, examples = by_generation(benchmark, model, tok, rt, batch_size)
    columns = {name: [row[name] for row in values] for name in values[0]}
    metrics = {name: float(np.mean(column)) for name, column in columns.items()}
    errors = {name: stderr(column) for name, column in columns.items()}
    if "nll" in metrics:  # the error of e^x is e^x times that of x
        metrics["perplexity"] = math.exp(min(metrics.pop("nll"), 700))
        errors["perplexity"] = metrics["perplexity"] * errors.pop("nll")
    first = next(iter(columns))
    groups = {}
    for record, value in zip(benchmark.records, columns[first], strict=True):
        for name in task.groups_of(record):
            groups.setdefault(name, []).append(value)
    for number, (row, example) in enumerate(zip(values, examples, strict=True)):
        examples[number] = dict(number=number, **example, **row)
    return Result(
        task=task.name,
        protocol="loglikelihood" if task.has_choices else "generation",
        chat=benchmark.chat,
        shots=benchmark.shots,
        count=len(benchmark.records),
        metrics=metrics,
        stderr=errors,
        chance=float(np.mean([task.chance_of(record) for record in benchmark.records])),
        groups={name: float(np.mean(group)) for name, group in sorted(groups.items())},
        fewer_shots=benchmark.fewer_shots,
        truncated=benchmark.truncated,
        examples=examples,
    )


# ------------------------------------------------------------------------------- while training


def metric_names(benchmark):
    """The names of the metrics of which more is better."""
    task, record = benchmark.task, benchmark.records[0]
    if not task.has_choices:
        return ["em", "em_strict"] if hasattr(task.module, "strict") else ["em"]
    texts = task.choices(record)
    zeros = np.zeros(len(texts))
    return [name for name in choice_values(task, record, zeros, zeros, texts) if name != "nll"]


def for_training(cfg, tok, model_cfg):
    """The Benchmarks of the keys eval_tasks=, eval_shots= and so on of a stage.

    UserError for a mistake in them, and for a keep= that names no metric of theirs."""
    loaded = load_tasks(
        cfg.eval_tasks, cfg.eval_shots, cfg.eval_files, cfg.eval_shot_files, "eval_"
    )
    for task, _ in loaded:
        if task.is_judged:
            raise UserError(
                f"eval_tasks= names {task.name}, whose answers people judge: eval.py writes them"
            )
    benchmarks = [prepare(task, tok, model_cfg, shots, cfg.eval_limit) for task, shots in loaded]
    known = [f"{b.task.name}/{name}" for b in benchmarks for name in metric_names(b)]
    if cfg.keep and cfg.keep not in known:
        raise UserError(f"keep={cfg.keep} names no metric of eval_tasks=: give {', '.join(known)}")
    return benchmarks


def measure_all(benchmarks, model, tok, rt):
    """{TASK/METRIC: value} of a model in training. A collective, also where it is sharded."""
    metrics = {}
    for benchmark in benchmarks:
        result = measure(benchmark, model, tok, rt)
        metrics |= {f"{result.task}/{name}": value for name, value in result.metrics.items()}
    return metrics
