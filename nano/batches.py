"""From prepared rows to the micro-batches of an optimizer step: pack, bucket, collate.

    train = Rows(store.mix(["data/alpaca"]), batch_size=16, micro_batch=4, max_length=512)
    for micro in train.batch(step):            # dicts of CPU tensors, see `collate`
        hidden = net(rt.put(micro))            # (M, C), of the positions micro["index"]

Rows are documents (sft). Windows are stretches of a text (pretrain). Groups are ranked completions
(reward, dpo). Episodes are what a policy has sampled (ppo). All go through one `collate`.

What a step holds is a function of (seed, step, batch_size). It depends neither on the number of
ranks nor on micro_batch, so the step number is all that a resumed run needs to know. An epoch's
last step may be smaller. Ranks without rows get padding of weight 0, so that all run the same
number of micro-batches.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from nano.config import UserError

STEP = 64  # lengths are rounded up to a multiple of this, so that few shapes occur


# ------------------------------------------------------------------------------------------ packs


def pack(lengths, max_length, seed=0):
    """Packs of at most `max_length` tokens from rows of `lengths` (N,), by best fit.

    Returns a list of int arrays of row indices, every row once. The longest rows are placed first.
    `seed` decides which of equally long rows goes where, but not the number of packs. ValueError
    for a length outside 1 ... max_length.

    A run of equal lengths is placed at once, because a Python loop over millions of rows takes
    minutes. Best fit fills the fullest open pack until it has no room, so packs with equal room are
    filled alike. The cost is a sort, and one numpy call for each run and room.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > max_length:
        raise ValueError(f"lengths must lie in 1 ... {max_length}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of = np.empty(len(lengths), np.int64)
    n_packs = 0
    open_packs = {}  # room -> list of arrays of packs with that much room
    rooms = 0  # bit r is set when open_packs[r] is not empty, so a shift finds the smallest room
    sizes, starts = np.unique(-lengths[order], return_index=True)
    runs = pairwise([*starts.tolist(), len(order)])
    for size, (a, end) in zip((-sizes).tolist(), runs, strict=True):
        while a < end:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                packs = open_packs[room].pop()
                if not open_packs[room]:
                    rooms ^= 1 << room
            else:
                room = max_length
                new = -(-(end - a) // (max_length // size))
                packs = np.arange(n_packs, n_packs + new)
                n_packs += new
            each = min(room // size, end - a)
            count = min(len(packs), (end - a) // each)
            pack_of[order[a : a + count * each]] = np.repeat(packs[:count], each)
            a += count * each
            for left, some in ((room - size * each, packs[:count]), (room, packs[count:])):
                if left and len(some):
                    open_packs.setdefault(left, []).append(some)
                    rooms |= 1 << left
    return np.split(np.argsort(pack_of, kind="stable"), np.cumsum(np.bincount(pack_of))[:-1])


def bucket(lengths, rows, seed=0):
    """Lists of `rows` row indices of similar length, in random order. One list may be shorter.

    The rows are shuffled, then sorted by length within stretches of 32 lists.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    lists = []
    for a in range(0, len(order), 32 * rows):
        part = order[a : a + 32 * rows]
        part = part[np.argsort(-lengths[part], kind="stable")]
        lists += [part[i : i + rows] for i in range(0, len(part), rows)]
    return [lists[i] for i in rng.permutation(len(lists))]


def check_reach(longest, reach, dir):
    """UserError when a row of `longest` tokens goes beyond the `reach` positions of a model.

    The configuration saved with the trained model would contradict what it was trained on. `dir` is
    the model's directory, for the message.
    """
    if longest > reach:
        raise UserError(
            f"a row has {longest:,} tokens, {dir} takes {reach:,} "
            "(max_position_embeddings in its config.json): lower max_length="
        )


def check_sizes(batch_size, micro_batch, world):
    """UserError unless every rank gets the same number of whole micro-batches of a step."""
    if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
        raise UserError(
            f"batch_size={batch_size} is not a multiple of micro_batch={micro_batch} "
            f"x {world} ranks: lower micro_batch= or raise batch_size="
        )


READER = ThreadPoolExecutor(1)  # reads and collates the next step while the device computes


def micro_batches(batches, step):
    """This rank's micro-batches at a step, which is counted from the start of training.

    Rows, Windows and Groups have it as their method `batch`. It asks a thread for the next step of
    the same epoch, and returns what it asked for at the step before."""
    future = batches.ahead.pop(step, None)
    result = future.result() if future else read(batches, step)
    batches.ahead.clear()
    if (step + 1) % batches.steps_per_epoch:
        batches.ahead[step + 1] = READER.submit(read, batches, step + 1)
    return result


def read(batches, step):
    """The micro-batches of a step. `plan(step)` is a list over all ranks, and `micro` makes a
    micro-batch of up to `micro_batch` of its items. Every rank gets the same number of
    micro-batches; the last ones may hold fewer items, or padding alone.
    """
    size = batches.micro_batch
    plan = batches.plan(step)
    across = size * batches.world
    starts = range(batches.rank * size, -(-len(plan) // across) * across, across)
    return [batches.micro(plan[a : a + size]) for a in starts]


# ------------------------------------------------------------------------------------------ tensors


def collate(packs, length, prompt_weight=0.0, fixed_shapes=False, start_ids=()):
    """A micro-batch of CPU tensors from B packs, each a list of rows (tokens, mask). T is `length`.

    tokens     int64 (B, T), padded with 0
    positions  int64 (B, T), from 0 in each document
    docs       int64 (B, T), 0, 1, ... along a row of the batch; -1 on padding

    index      int64 (M,), the flat positions whose hidden state predicts a target of weight other
               than 0; with `fixed_shapes` all B x T positions
    targets    int64 (M,), the next token of the same document; 0 where there is none
    weights    float32 (M,), the target's mask, with `prompt_weight` in place of 0; 0 at the end of
               a document and on padding

    n_tokens   int, tokens of the rows, which are no padding
    n_targets  int, targets of weight 1

    A pack may have one token more than `length`, which is a target only.

    start_ids: of an encoder-decoder (t5.py). The tokens of a row before its first target are then
    the encoder's. The decoder reads start_ids in their place, and all else above is about what it
    reads. Without fixed_shapes S and T are what the longest pack needs.

    encoder_tokens  int64 (B, S), padded with 0
    encoder_docs    int64 (B, S), 0, 1, ... along a row, as the documents in docs; -1 on padding
    """
    more, n_more = {}, 0
    if start_ids:
        prompts, packs = split_at_answers(packs, start_ids)
        widths = length, length
        if not fixed_shapes:
            widths = (max(1, *map(width, part)) for part in (prompts, packs))
        size, length = widths
        inputs = collate(prompts, size)
        more = dict(encoder_tokens=inputs["tokens"], encoder_docs=inputs["docs"])
        n_more = inputs["n_tokens"] - len(start_ids) * sum(map(len, packs))
    integers = np.zeros((4, len(packs), length + 1), np.int64)
    tokens, targets, positions, docs = integers
    weights = np.zeros(docs.shape, np.float32)
    docs[:] = -1
    for b, rows in enumerate(packs):
        a = 0
        for doc, (row, mask) in enumerate(rows):
            end = a + len(row)
            tokens[b, a:end] = row
            targets[b, a : end - 1] = row[1:]
            weights[b, a : end - 1] = np.where(mask[1:], np.float32(1), np.float32(prompt_weight))
            positions[b, a:end] = np.arange(len(row))
            docs[b, a:end] = doc
            a = end
    tokens, targets, positions, docs = integers[:, :, :length].copy()
    weights = weights[:, :length].flatten()
    index = np.arange(weights.size) if fixed_shapes else np.flatnonzero(weights)
    arrays = dict(tokens=tokens, positions=positions, docs=docs, index=index)
    arrays |= dict(targets=targets.flat[index], weights=weights[index])
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()} | more
    n_tokens = int((docs >= 0).sum()) + n_more
    return batch | dict(n_tokens=n_tokens, n_targets=int((weights == 1).sum()))


def split_at_answers(packs, start_ids):
    """Packs of rows (tokens, mask) -> (packs of what an encoder reads, packs of what the decoder
    reads): the tokens before the first target; start_ids and the tokens from there on.

    UserError for a row that begins with a target."""
    prompts, answers = [], []
    start = np.array(start_ids)
    for rows in packs:
        firsts = [int(np.argmax(mask)) for _, mask in rows]
        if 0 in firsts:
            raise UserError(
                "a row begins with a target, and an encoder-decoder needs a prompt before it: "
                "prepare the data with prompts"
            )
        cut = list(zip(rows, firsts, strict=True))
        prompts.append([(tokens[:n], mask[:n]) for (tokens, mask), n in cut])
        answers.append(
            [
                (np.append(start, tokens[n:]), np.append(np.zeros(len(start)), mask[n:]))
                for (tokens, mask), n in cut
            ]
        )
    return prompts, answers


def width(rows):
    """How many tokens a pack of rows has."""
    return sum(len(tokens) for tokens, _ in rows)


def tell_rows_apart(batch):
    """Two tensors more for a collated batch with N rows in all.

    rows   int64 (M,), which of the N rows the target of each position in `index` belongs to
    last   int64 (N,), the flat position of each row's last token
    """
    real = batch["docs"].flatten() >= 0
    first = real & (batch["positions"].flatten() == 0)
    rows = (first.cumsum(0) - 1).clamp(min=0)  # padding gets some row, as its weight is 0
    last = (real & (first | ~real).roll(-1)).nonzero()[:, 0]
    return dict(rows=rows[batch["index"]], last=last)


def pairs(offsets):
    """The pairs of groups that are ranked best first -> better, worse, share, each (P,).

    offsets (G+1,): where each group's rows begin. better and worse int64 are the two rows of a
    pair. share float32 is 1 / the number of pairs in its group, so that each group counts once.
    """
    ranked = [a + np.array(np.triu_indices(b - a, 1)) for a, b in pairwise(offsets)]
    better, worse = np.concatenate([np.zeros((2, 0), np.int64), *ranked], axis=1)
    counts = np.array([group.shape[1] for group in ranked], np.int64)
    share = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
    return better, worse, share


def collate_groups(packs, B, max_length, fixed_shapes=False, start_ids=()):
    """The tensors of `collate` for at most B packs of groups with N completions and P pairs in all.

    A pack is a list of groups (number of the first completion, [(tokens, mask), ...] best first).
    T is at most max_length. Further tensors:

    rows    int64 (M,), which completion the target of each position in `index` belongs to
    last    int64 (N,), the flat position of each completion's last token
    number  int64 (N,), the number of the completion in the data
    real    float32 (N,), 1
    best    float32 (N,), 1 where the completion is its group's best
    better, worse int64 (P,), share float32 (P,): see `pairs`

    With fixed_shapes T is max_length, `index` is all positions, and N and P are padded with zeros
    to multiples of 64. start_ids: as in `collate`.
    """
    documents = [[row for _, group in pack for row in group] for pack in packs]
    documents += [[]] * (B - len(packs))
    longest = max(1, *map(width, documents))
    T = max_length if fixed_shapes else min(-(-longest // STEP) * STEP, max_length)
    batch = collate(documents, T, fixed_shapes=fixed_shapes, start_ids=start_ids)
    batch |= tell_rows_apart(batch)

    groups = [group for pack in packs for group in pack]
    offsets = np.cumsum([0, *(len(rows) for _, rows in groups)])
    numbers = [first + i for first, rows in groups for i in range(len(rows))]
    best = np.zeros(len(numbers), np.float32)
    best[offsets[:-1]] = 1
    better, worse, share = pairs(offsets)
    arrays = dict(
        last=batch["last"].numpy(),
        number=np.array(numbers, np.int64),
        real=np.ones_like(best),
        best=best,
        better=better,
        worse=worse,
        share=share,
    )
    if fixed_shapes:
        for name, a in arrays.items():
            arrays[name] = np.pad(a, (0, -len(a) % STEP if len(a) else STEP))
    return batch | {name: torch.from_numpy(a) for name, a in arrays.items()}


def episodes(rows, length=0, start_ids=()):
    """The tensors of `collate` for N episodes, rows (tokens, action mask), with M actions in all.

    Further tensors:

    actions  int64 (M,), the token ids that the positions in `index` predict
    rows     int64 (M,), which episode each action belongs to
    last     int64 (N,), the flat position of each episode's last token

    The actions of an episode need not stand side by side. Its first token is no action, because
    nothing predicts it. The episodes are packed without padding (B = 1). With `length`, for fixed
    shapes, each has a row of so many tokens (B = N), and `index` is all positions: `weights` is 0
    where there is no action. start_ids: as in `collate`.
    """
    packs = [[row] for row in rows] if length else [rows]
    T = length or width(rows)
    batch = collate(packs, T, fixed_shapes=length > 0, start_ids=start_ids)
    return batch | tell_rows_apart(batch) | dict(actions=batch["targets"])


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Rows:
    """The micro-batches of documents, for one rank.

    A step takes `batch_size` packs over all ranks, or rows with packing=False. T is max_length.
    Without packing T is the length of a micro-batch's longest row, rounded up to a multiple of 64,
    unless `fixed_length` or `fixed_shapes`. A row over max_length loses its end. It is dropped when
    that leaves no target, or with over_length="drop".

    .index (N,) numbers of the rows that are trained on, .lengths (N,) their tokens,
    .steps_per_epoch, .dropped and .truncated: how many rows over max_length, .longest: tokens of
    the longest row.
    """

    rows: object  # a Store or a Mix
    batch_size: int
    micro_batch: int
    max_length: int
    packing: bool = True
    seed: int = 0
    rank: int = 0
    world: int = 1
    prompt_weight: float = 0.0
    over_length: str = "truncate"
    length_key: str = "max_length"  # the key, or the sum of keys, that sets max_length
    fixed_length: bool = False
    fixed_shapes: bool = False
    start_ids: tuple = ()  # the model's, see `collate`

    batch = micro_batches

    def __post_init__(self):
        check_sizes(self.batch_size, self.micro_batch, self.world)
        if self.start_ids and self.prompt_weight:
            raise UserError(
                "prompt_loss_weight= has no effect on an encoder-decoder, which reads the prompt "
                "and does not predict it: leave it out"
            )
        self.ahead = {}
        keep = np.ones(len(self.rows), bool)
        if self.rows.prompts:
            for i in range(len(self.rows)):
                keep[i] = self.rows.row(i)[1].any()
            if not keep.any():
                raise UserError(
                    f"none of the {len(self.rows)} rows has an answer to learn: such prompts alone "
                    "are for ppo.py"
                )
        prompts = int((~keep).sum())
        long = np.flatnonzero(self.rows.lengths > self.max_length)
        for i in long:
            mask = self.rows.row(i)[1][1 : self.max_length]
            keep[i] &= self.over_length == "truncate" and mask.any()
        self.index = np.flatnonzero(keep)
        self.dropped = len(keep) - len(self.index)
        self.truncated = int(keep[long].sum())
        if not len(self.index):
            raise UserError(
                f"none of the {len(self.rows)} rows fits into "
                f"{self.length_key}={self.max_length}: raise it"
            )
        self.rows.read_randomly()
        self.lengths = lengths = np.minimum(self.rows.lengths[self.index], self.max_length)
        self.longest = lengths.max()
        # the mean length weighted by tokens, because the cost of attention depends on it
        self.document_length = (lengths**2).sum() / lengths.sum()
        self.summary = (
            f"{len(lengths):,} rows, {lengths.sum():,} tokens "
            f"({self.dropped} dropped, {self.truncated} truncated"
            f"{f', {prompts} of the dropped are prompts alone' if prompts else ''})"
        )
        self.steps_of = functools.lru_cache(1)(self.steps_of)
        self.steps_per_epoch = len(self.steps_of(0))  # the same in every epoch

    def steps_of(self, epoch):
        """The epoch's steps, each a list of packs (arrays of indices into self.index)."""
        seed = [self.seed, epoch]
        if not self.packing:
            lists = bucket(self.lengths, self.batch_size, seed)
            return [np.split(rows, len(rows)) for rows in lists]
        packs = pack(self.lengths, self.max_length, seed)
        # `pack` returns packs of long rows first
        packs = [packs[i] for i in np.random.default_rng([*seed, 1]).permutation(len(packs))]
        return [packs[i : i + self.batch_size] for i in range(0, len(packs), self.batch_size)]

    def plan(self, step):
        """The packs of a step, over all ranks."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.steps_of(epoch)[i]

    def micro(self, packs):
        packs = [
            [tuple(x[: self.max_length] for x in self.rows.row(self.index[i])) for i in numbers]
            for numbers in packs
        ]
        length = self.max_length
        if not (self.packing or self.fixed_length or self.fixed_shapes):
            longest = max((len(tokens) for rows in packs for tokens, _ in rows), default=1)
            length = min(length, -(-longest // STEP) * STEP)
        packs += [[]] * (self.micro_batch - len(packs))
        return collate(packs, length, self.prompt_weight, self.fixed_shapes, self.start_ids)


@dataclass
class Windows:
    """The micro-batches of pretraining, for one rank: windows of `max_length` tokens over stores.

    Windows follow each other without a gap. The target of a window's last token is the next
    window's first token, so every token but a store's first is predicted. A store's last window may
    be shorter. With `isolate`, documents do not see each other, positions restart with each
    document, and the token behind a document's end is no target. Without it a window is one
    stretch of text, and a micro-batch has no "docs", because plain causal attention has the fastest
    kernels.

    Without `weights` an epoch has every window of all stores once, shuffled together. With
    `weights` each store gets its share of every CYCLE windows, evenly spread. It goes through its
    windows in random order, then again in another order, at its own pace. steps_per_epoch then
    counts as many windows as all stores have.
    """

    stores: list
    batch_size: int
    micro_batch: int
    max_length: int
    weights: tuple = ()
    isolate: bool = True
    seed: int = 0
    rank: int = 0
    world: int = 1
    fixed_shapes: bool = False

    CYCLE = 1 << 16
    batch = micro_batches

    def __post_init__(self):
        check_sizes(self.batch_size, self.micro_batch, self.world)
        stores, weights = self.stores, self.weights
        if weights and len(weights) != len(stores):
            raise UserError(
                f"weights= has {len(weights)} for {len(stores)} data folders: give each one above 0"
            )
        if weights and min(weights) <= 0:
            raise UserError(f"weights= holds {min(weights)}: give each data folder one above 0")
        self.ahead = {}
        for store in stores:
            store.read_randomly()
        self.counts = np.array([-(-(len(s.tokens) - 1) // self.max_length) for s in stores])
        self.starts = np.cumsum([0, *self.counts])  # windows are numbered through all stores
        if self.counts.min() < 1:
            raise UserError(
                f"{stores[self.counts.argmin()].dir} holds a single token: "
                "there is nothing to predict"
            )
        self.steps_per_epoch = int(-(-self.starts[-1] // self.batch_size))
        self.orders = {}
        if not weights:
            return
        ends = np.rint(np.cumsum(weights) / sum(weights) * self.CYCLE).astype(np.int64)
        self.share = np.maximum(np.diff(ends, prepend=0), 1)  # windows of each store in a cycle
        draws = np.concatenate([np.arange(n) for n in self.share])
        times = draws + np.random.default_rng([self.seed, 0]).random(len(draws))
        order = np.argsort(times / np.repeat(self.share, self.share))
        # for each place of a cycle, the store that it draws from, and how many of the cycle's draws
        # from that store come before it
        self.store_at = np.repeat(np.arange(len(stores)), self.share)[order]
        self.draw_at = draws[order]

    def order(self, store, epoch):
        """The numbers of a store's windows (-1: of all windows) in the order of an epoch."""
        kept, numbers = self.orders.get(store, (None, None))
        if kept != epoch:
            first, end = self.starts[[0, -1]] if store < 0 else self.starts[store : store + 2]
            rng = np.random.default_rng([self.seed, epoch, store + 2])
            numbers = first + rng.permutation(end - first)
            self.orders[store] = epoch, numbers
        return numbers

    def plan(self, step):
        """The numbers of a step's windows, over all ranks."""
        if not self.weights:
            epoch, i = divmod(step, self.steps_per_epoch)
            return self.order(-1, epoch)[i * self.batch_size : (i + 1) * self.batch_size]
        draws = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        cycles, places = np.divmod(draws, len(self.store_at))
        stores = self.store_at[places]
        draws = cycles * self.share[stores] + self.draw_at[places]  # each store's own count
        epochs, places = np.divmod(draws, self.counts[stores])
        drawn = np.stack((stores, epochs, places), axis=1).tolist()
        return np.array([self.order(store, epoch)[i] for store, epoch, i in drawn])

    def micro(self, windows):
        packs = [self.documents(w) for w in windows]
        packs += [[]] * (self.micro_batch - len(packs))
        batch = collate(packs, self.max_length, fixed_shapes=self.fixed_shapes)
        if not self.isolate:
            del batch["docs"]
        return batch

    def documents(self, window):
        """The rows of `collate` for a window and the one token behind it."""
        i = int(np.searchsorted(self.starts, window, "right")) - 1
        store = self.stores[i]
        a = int(window - self.starts[i]) * self.max_length
        b = min(a + self.max_length + 1, len(store.tokens))
        if not self.isolate:
            return [store.span(a, b)]
        inside = slice(*np.searchsorted(store.offsets, (a + 1, b)))
        return [store.span(*edges) for edges in pairwise([a, *store.offsets[inside].tolist(), b])]


@dataclass
class Groups:
    """The micro-batches of ranked completions, for one rank. For the tensors see `collate_groups`.

    A step takes `batch_size` groups over all ranks and packs them into rows of at most max_length
    tokens. A group stays together: its completions are neighbouring documents of one packed row, so
    that one forward sees all of its pairs.

    .index (N,) numbers of the groups that are trained on, .steps_per_epoch, .dropped: how many
    groups are over max_length, .longest: tokens of the longest completion.
    """

    groups: object  # a GroupMix
    batch_size: int
    micro_batch: int
    max_length: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    fixed_shapes: bool = False
    start_ids: tuple = ()  # the model's, see `collate`

    batch = micro_batches

    def __post_init__(self):
        if min(self.batch_size, self.micro_batch) < 1:
            raise UserError("batch_size= and micro_batch= must be 1 or more")
        self.ahead = {}
        self.groups.read_randomly()
        self.index = np.flatnonzero(self.groups.lengths <= self.max_length)
        self.dropped = len(self.groups) - len(self.index)
        if not len(self.index):
            raise UserError(
                f"none of the {len(self.groups)} groups fits into max_length={self.max_length}, "
                "all completions together: raise it"
            )
        tokens = self.groups.lengths[self.index].sum()
        self.longest = self.groups.longest[self.index].max()
        # the mean length weighted by tokens, because the cost of attention depends on it
        self.document_length = self.groups.squares[self.index].sum() / tokens
        completions = self.groups.first[-1] / len(self.groups)
        self.summary = (
            f"{len(self.index):,} groups of {completions:.1f} completions, {tokens:,} tokens "
            f"({self.dropped} over max_length dropped)"
        )
        self.steps_per_epoch = -(-len(self.index) // self.batch_size)
        self.order = functools.lru_cache(1)(self.order)

    def order(self, epoch):
        """The numbers of all groups in the order of an epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.index)

    def members(self, step):
        """The numbers of a step's groups, over all ranks."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[i * self.batch_size : (i + 1) * self.batch_size]

    def plan(self, step):
        """The packs of a step, over all ranks: arrays of numbers of groups."""
        members = self.members(step)
        packs = pack(self.groups.lengths[members], self.max_length, [self.seed, step])
        return [members[numbers] for numbers in packs]

    def micro(self, packs):
        packs = [
            [(self.groups.first[g], self.groups.group(g)) for g in numbers] for numbers in packs
        ]
        return collate_groups(
            packs, self.micro_batch, self.max_length, self.fixed_shapes, self.start_ids
        )
