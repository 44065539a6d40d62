"""Measures a model on tasks (the files of tasks/).

    result = evaluate(task, model, tok, rt, shots=5, limit=200)
    result.metrics["acc"], result.stderr["acc"], result.examples

There are two protocols, and a metric's name says which one it comes from.

Log-likelihood, for tasks with choices: each option is a continuation of the prompt, and the one of
the highest log-likelihood is the model's choice.
    acc             by the sum over the option's tokens
    acc_norm        by the sum over its length in UTF-8 bytes
    acc_norm_chars  by the sum over its length in characters
    perplexity      of tasks with a single option, whose acc counts what greedy decoding would give

Generation, for free answers: the model answers greedily.
    em              the mean of the task's score
    em_strict       the mean of its strict score

Every record counts, on any number of ranks and for any size of batch.
"""

import math
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch

from nano import generate, losses
from nano.config import UserError

TOKENS = 8192  # slots of the cache of one batch


# ------------------------------------------------------------------------------- log-likelihoods


@dataclass
class Question:
    """A context and its options, as ids. key: questions of the same key share a prefix."""

    context: list
    options: list  # of lists
    key: str = ""


def shared_prefix(questions):
    """How many tokens all contexts begin with alike. Each keeps a token of its own."""
    first, last = (pick(q.context for q in questions) for pick in (min, max))
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(map(len, (first, last))))  # noqa: B905, E501
    return min(same, len(first) - 1, len(last) - 1)


def batches_of(questions, tokens):
    """Lists of the numbers of questions that are scored together: of the same key and of similar
    length, of at most `tokens` slots in all."""
    length = [len(q.context) + max(map(len, q.options)) for q in questions]
    order = sorted(range(len(questions)), key=lambda i: (questions[i].key, -length[i]))
    for _, numbers in groupby(order, key=lambda i: questions[i].key):
        batch = []
        for i in numbers:
            rows = sum(len(questions[j].options) for j in (*batch, i))
            if batch and rows * length[batch[0]] > tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch


def padded(rows, device):
    """(N, longest) int64, zeros behind each row's end."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return out.to(device)


def score_batch(model, head, questions):
    """Of each option of some questions, in order: (sum of its log-probabilities, whether greedy
    decoding would give it), two tensors.

    The context that all have in common is computed once. Then come the rest of the contexts, a row
    for each question, and then the options, a row for each."""
    device = head.device
    prefix = shared_prefix(questions)
    ends = torch.tensor([len(q.context) for q in questions], device=device)
    longest = max(len(option) for q in questions for option in q.options)
    cache = model.new_cache(len(questions), int(ends.max()) + longest - 1)
    if prefix:
        common = model.new_cache(1, prefix)
        model.hidden(torch.tensor([questions[0].context[:prefix]], device=device), cache=common)
        for layer, new in zip(cache, common, strict=True):
            for t, n in zip(layer, new, strict=True):
                t[:, :, :prefix] = n
    tokens = padded([q.context[prefix:] for q in questions], device)
    positions = prefix + torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    hidden = model.hidden(tokens, positions if prefix else None, cache=cache)
    # a context's last position predicts the first token of each of its options
    last = hidden[torch.arange(len(questions)), ends - prefix - 1]  # (Q, C)
    options = [(i, option) for i, q in enumerate(questions) for option in q.options]
    states = [last[[i for i, _ in options]]]
    targets = [option[0] for _, option in options]
    owners = [*range(len(options))]
    # the tokens of an option predict those that follow
    rows = [n for n, (_, option) in enumerate(options) if len(option) > 1]
    if rows:
        sources = torch.tensor([options[n][0] for n in rows], device=device)
        copies = [tuple(t[sources] for t in layer) for layer in cache]
        tokens = padded([options[n][1][:-1] for n in rows], device)
        positions = ends[sources, None] + torch.arange(tokens.shape[1], device=device)
        hidden = model.hidden(tokens, positions, cache=copies)
        for row, n in zip(hidden, rows, strict=True):
            rest = options[n][1][1:]
            states.append(row[: len(rest)])
            targets += rest
            owners += [n] * len(rest)
    states, targets = torch.cat(states), torch.tensor(targets, device=device)
    logprobs = losses.token_logprobs(states, head, targets)
    hits = losses.hits(states, head, targets)
    owners = torch.tensor(owners)
    sums = torch.zeros(len(options)).index_add(0, owners, logprobs.float().cpu())
    wrong = torch.zeros(len(options)).index_add(0, owners, 1 - hits.float().cpu())
    return sums, wrong == 0


@torch.no_grad()
def loglikelihoods(model, dtype, questions, tokens=TOKENS):
    """[(log-likelihoods, greedy hits)] of the options of each question, two arrays each."""
    copy = generate.snapshot(model, dtype, pack=False)
    head = generate.frozen(model.head_weight, dtype)
    results = [None] * len(questions)
    for numbers in batches_of(questions, tokens):
        sums, hits = score_batch(copy, head, [questions[i] for i in numbers])
        sizes = [len(questions[i].options) for i in numbers]
        parts = zip(sums.split(sizes), hits.split(sizes), strict=True)
        for i, (logprobs, greedy) in zip(numbers, parts, strict=True):
            results[i] = logprobs.double().numpy(), greedy.numpy()
    return results


# -------------------------------------------------------------------------------------- prompts


def draw_shots(task, pool, record, count, seed):
    """`count` records of the record's group, never the record itself: the first ones where the task
    says so, else drawn by the seed, the same for all records of a group."""
    group = [r for r in pool if task.group_of(r) == task.group_of(record) and r != record]
    if len(group) < count:
        raise UserError(
            f"{task.name}: shots={count}, but there are only {len(group)} records to show"
        )
    if getattr(task.module, "IN_ORDER", False):
        return group[:count]
    order = np.random.default_rng(seed).permutation(len(group))
    return [group[i] for i in order[:count]]


def split_ids(tok, context, continuation):
    """The ids of a text, cut where the continuation begins, as lm-eval cuts them: white space at
    the end of the context belongs to the continuation."""
    spaces = context[len(context.rstrip()) :]
    context = context.rstrip()
    ids = tok.encode(context + spaces + continuation, bos=tok.bos_first)
    start = len(tok.encode(context, bos=tok.bos_first)) if context else 0
    start = start or 1  # the first token is predicted from nothing
    return ids[:start], ids[start:]


def plain_options(task, tok, record, shots):
    """[(context ids, option ids)] in plain text."""
    before = task.intro_of(record) + "".join(task.shot(shot) + "\n\n" for shot in shots)
    return [split_ids(tok, before + start, end) for start, end in task.options_of(record)]


def messages(task, record, shots):
    """The conversation that asks for the record's answer, with the shots as earlier turns."""
    turns = []
    for shot in shots:
        turns += asked(task, shot)
        turns.append(dict(role="assistant", content=task.answer_of(shot)))
    turns += asked(task, record)
    turns[0] = turns[0] | dict(content=task.intro_of(record) + turns[0]["content"])
    return turns


def asked(task, record):
    if hasattr(task.module, "messages"):
        return task.module.messages(record)
    return [dict(role="user", content=task.prompt(record))]


def chat_options(task, tok, record, shots):
    """[(context ids, option ids)] through the model's chat template: the options are answers."""
    turns = messages(task, record, shots)
    pairs = []
    for choice in task.choices(record):
        ids, mask = tok.render([*turns, dict(role="assistant", content=choice)], last_only=True)
        start = list(mask).index(1)
        end = len(mask) - list(mask)[::-1].index(1)
        while end > start + 1 and ids[end - 1] in tok.stop_ids:
            end -= 1
        pairs.append((list(ids[:start]), list(ids[start:end])))
    return pairs


def fitting(build, shots, room, name):
    """What `build(shots)` returns, with as many shots as fit into `room` tokens: the oldest ones go
    first, and whole. UserError where not even none fits."""
    for first in range(len(shots) + 1):
        result, longest = build(shots[first:])
        if longest <= room:
            return result
    raise UserError(
        f"{name}: a record has {longest} tokens without any shot, and the model takes {room}"
    )


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """What a model got in a task. metrics and stderr {name: value}; chance: the accuracy of
    guessing; groups {name: accuracy}; examples: what is written of each record."""

    task: str
    protocol: str
    count: int
    metrics: dict
    stderr: dict
    chance: float = 0.0
    groups: dict = field(default_factory=dict)
    examples: list = field(default_factory=list)


def accuracies(task, record, logprobs, greedy):
    """{metric: value} of one record from the log-likelihoods of its options."""
    gold = task.gold(record)
    if hasattr(task.module, "metrics"):
        return task.module.metrics(record, logprobs)
    if len(logprobs) == 1:
        return dict(acc=float(greedy[0]), nll=-float(logprobs[0]))
    texts = task.choices(record)
    lengths = dict(
        acc=np.ones(len(texts)),
        acc_norm=np.array([max(len(text.encode()), 1) for text in texts]),
        acc_norm_chars=np.array([max(len(text), 1) for text in texts]),
    )
    return {name: float(np.argmax(logprobs / n) in gold) for name, n in lengths.items()}


def evaluate(task, model, tok, rt, shots=0, limit=0, chat=False, seed=0, records=None, pool=None):
    """The Result of a model in a task. Every rank calls it with the same arguments.

    shots: how many records are shown first. limit: the first so many records; 0: all. chat: through
    the chat template. records, pool: what was read before."""
    records = task.records() if records is None else records
    records = records[:limit] if limit else records
    pool = task.records(shots=True) if shots and pool is None else pool or []
    shown = [draw_shots(task, pool, record, shots, seed) if shots else [] for record in records]
    run = by_loglikelihood if task.has_choices else by_generation
    own = range(rt.rank, len(records), rt.world)
    rows, examples = run(
        task, model, tok, rt, [records[i] for i in own], [shown[i] for i in own], chat
    )
    names = sorted({name for row in rows for name in row}) if rows else []
    return summarise(task, rt, records, own, rows, names, examples, "loglikelihood" if task.has_choices else "generation")  # noqa: E501
