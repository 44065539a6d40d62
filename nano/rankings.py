"""Preference data from prepared folders to micro-batches: groups, each one prompt's completions, best first.

    rows = rankings.load(["data/hh"], tokenizer=tok)
    train = rankings.Batches(rows, batch_size=16, micro_batch=1, max_length=4096)
    for micro in train.batch(step): ...                       # dicts of CPU tensors, see `collate`

A group stays together: its completions are neighbouring documents of one packed row, so that one forward holds all of its pairs.
"""

import hashlib

import numpy as np
import torch

from nano import data
from nano.config import UserError

STEP = 64  # lengths are rounded up to this, so that few shapes occur


class Groups:
    """Groups of several stores behind one index: len(), group(g). .lengths (G,): tokens of all completions of a group, .longest
    (G,): of its longest one, .squares (G,): the sum of their squares; .first (G+1,): the number of each group's first completion,
    counted over all groups."""

    def __init__(self, stores, picks):
        self.stores, self.picks = stores, np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        spans = [(s, s.groups[p], s.groups[p + 1]) for s, p in zip(stores, picks, strict=True)]
        self.lengths = np.concatenate([s.offsets[b] - s.offsets[a] for s, a, b in spans])
        longest = [
            np.maximum.reduceat(s.lengths, s.groups[:-1])[p]
            for s, p in zip(stores, picks, strict=True)
        ]
        squares = [
            np.add.reduceat(s.lengths**2, s.groups[:-1])[p]
            for s, p in zip(stores, picks, strict=True)
        ]
        self.longest, self.squares = np.concatenate(longest), np.concatenate(squares)
        self.first = np.cumsum(np.concatenate([[0], *(b - a for _, a, b in spans)]))

    def __len__(self):
        return len(self.picks)

    def group(self, g):
        """[(tokens (T,), mask (T,)), ...] best first"""
        store, pick = self.stores[self.store_of[g]], self.picks[g]
        return [store.row(row) for row in range(store.groups[pick], store.groups[pick + 1])]

    def prompt(self, g):
        """Its ids, as a list: the tokens before the first target."""
        tokens, mask = self.group(g)[0]
        return tokens[: mask.argmax()].tolist()

    def fingerprint(self):
        """sha256 in hex over all of their content."""
        digest = hashlib.sha256(self.first.tobytes())
        for g in range(len(self)):
            for tokens, mask in self.group(g):
                digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes() + mask.tobytes())
        return digest.hexdigest()


def load(dirs, sizes=(), seed=0, split="train", tokenizer=None):
    """Groups of several data folders; of each all, K groups or P% by the entry of `sizes` (): all), chosen by `seed`.
    A split other than train is taken whole from the folders that have it; None when none has."""
    if split != "train":
        dirs, sizes = [dir for dir in dirs if data.has_split([dir], split)], ()
        if not dirs:
            return None
    sizes = sizes or ["all"] * len(dirs)
    if len(dirs) != len(sizes) or not dirs:
        raise UserError(
            f"data= names {len(dirs)} folders and sizes= {len(sizes)} sizes: give one size for each folder"
        )
    stores, picks = [data.Store(dir, split, tokenizer) for dir in dirs], []
    for i, (store, size) in enumerate(zip(stores, sizes, strict=True)):
        if store.groups is None or np.diff(store.groups).min() < 2:
            raise UserError(
                f"{dirs[i]} holds no groups of two and more completions: prepare it with prepare.preferences"
            )
        try:
            count = data.parse_share(size, len(store.groups) - 1)
        except UserError as e:
            raise UserError(f"{dirs[i]}: {e}") from None
        picks.append(
            np.sort(np.random.default_rng([seed, i]).permutation(len(store.groups) - 1)[:count])
        )
    return Groups(stores, picks)


def pairs(offsets):
    """Row offsets (G+1,) of groups that are ranked best first -> better (P,), worse (P,), share (P,): the rows of every pair, and
    1 / the number of pairs of its group, so that each group counts once."""
    better, worse, share = [], [], []
    for a, b in zip(offsets[:-1], offsets[1:], strict=True):
        i, j = np.triu_indices(b - a, 1)
        better.append(a + i)
        worse.append(a + j)
        share.append(np.full(len(i), 1 / max(len(i), 1), np.float32))
    return [np.concatenate(x) if x else np.zeros(0, np.int64) for x in (better, worse, share)]


def collate(packs, rows, max_length, static=False):
    """Packs, each a list of groups (number of its first completion, [(tokens, mask), ...]), as the tensors of data.collate
    (B = rows, T <= max_length) with, for their N completions and P pairs,

    index   int64 (M,), flat positions of the target tokens; `of` (M,), the completion each of them is of
    last    int64 (N,), flat position of each completion's last token, which its length tells and no token id
    number  int64 (N,), which completion of the Groups it is
    real    float32 (N,), 1; best float32 (N,), 1 where it is its group's best
    better  int64 (P,), worse (P,), share float32 (P,): see `pairs`

    static: T is max_length, and N and P are filled up with zeros to multiples of 64, so that shapes hardly change (XLA).
    """
    documents = [[row for _, group in pack for row in group] for pack in packs]
    documents += [[]] * (rows - len(packs))
    lengths = [np.array([len(tokens) for tokens, _ in row], np.int64) for row in documents]
    longest = max(max((int(n.sum()) for n in lengths), default=0), 1)
    T = max_length if static else min(-(-longest // STEP) * STEP, max_length)
    micro = data.target_index(data.collate(documents, T), static)
    before = np.cumsum([0, *map(len, documents)])[:-1]  # completions in the rows above
    of = (micro["docs"].clamp(min=0) + torch.from_numpy(before)[:, None]).flatten()[micro["index"]]

    sizes = [len(group) for pack in packs for _, group in pack]
    firsts = [number for pack in packs for number, _ in pack]
    offsets = np.cumsum([0, *sizes])
    last = [b * T + np.cumsum(n) - 1 for b, n in enumerate(lengths)]
    number = [first + np.arange(size) for first, size in zip(firsts, sizes, strict=True)]
    best = np.zeros(offsets[-1], np.float32)
    best[offsets[:-1]] = 1
    better, worse, share = pairs(offsets)
    arrays = dict(
        last=np.concatenate(last),
        number=np.concatenate([np.zeros(0, np.int64), *number]),
        better=better,
        worse=worse,
        share=share.astype(np.float32),
        real=np.ones(offsets[-1], np.float32),
        best=best,
    )
    if static:
        arrays = {
            name: np.pad(a, (0, -len(a) % STEP or STEP * (not len(a))))
            for name, a in arrays.items()
        }
    return micro | dict(of=of) | {name: torch.from_numpy(a) for name, a in arrays.items()}


class Batches:
    """The micro-batches of every optimizer step, for one rank. A step takes `batch_size` groups over all ranks, packs them into
    rows of at most max_length tokens and cuts these into micro-batches of `micro_batch` rows.

    What a step holds depends on (seed, step, batch_size) alone. An epoch's last step is as short as it comes out; a rank that has
    no row left gets padding, so that all do the same number of micro-batches. .dropped counts groups over max_length.
    """

    def __init__(
        self, rows, batch_size, micro_batch, max_length, seed=0, rank=0, world=1, static=False
    ):
        if batch_size < 1 or micro_batch < 1:
            raise UserError(
                f"batch_size={batch_size} micro_batch={micro_batch}: both must be 1 or more"
            )
        self.rows, self.batch_size, self.micro_batch, self.max_length = (
            rows,
            batch_size,
            micro_batch,
            max_length,
        )
        self.seed, self.rank, self.world, self.static = seed, rank, world, static
        self.index = np.flatnonzero(rows.lengths <= max_length)
        self.dropped = len(rows) - len(self.index)
        if not len(self.index):
            raise UserError(
                f"none of the {len(rows)} groups fits into max_length={max_length}, all completions together: raise it"
            )
        self.steps_per_epoch = -(-len(self.index) // batch_size)
        self.epoch, self.order = None, None

    def members(self, step):
        """The groups (numbers) of a step, over all ranks."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(self.index),
            )
        return self.order[at * self.batch_size : (at + 1) * self.batch_size]

    def batch(self, step):
        """This rank's micro-batches (see `collate`) at a step counted from the start of training."""
        members = self.members(step)
        packs = [
            members[p]
            for p in data.pack(self.rows.lengths[members], self.max_length, [self.seed, step])
        ]
        across = self.micro_batch * self.world
        return [
            self.micro(packs[a : a + self.micro_batch])
            for a in range(self.rank * self.micro_batch, -(-len(packs) // across) * across, across)
        ]

    def micro(self, packs):
        packs = [[(self.rows.first[g], self.rows.group(g)) for g in pack] for pack in packs]
        return collate(packs, self.micro_batch, self.max_length, self.static)
