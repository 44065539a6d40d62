"""The memmap store of prepared rows: write, read, mix and pack them, and cut them into batches.

A folder holds meta.json and, for each split NAME (`train`, `val`),

    NAME.tokens.bin   uint16 (vocabulary below 65,536) or uint32, all rows one after another
    NAME.mask.bin     uint8, 1 where the token is a target; absent for plain text, where every token is one
    NAME.rows.bin     int64, N+1 row offsets into the tokens
    NAME.groups.bin   int64, G+1 row offsets; preference data only: one prompt's completions, best first

Tokens and masks stay memory-mapped; only lengths and offsets are held in memory. `Batches` is a pure function of
(seed, step), so the step number is the whole data cursor of a resumed run.
"""

import contextlib
import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nano import files
from nano.config import UserError

FORMAT, VERSION = "nanoInstruct store", 1
KINDS = {"tokens": None, "mask": np.uint8, "rows": np.int64, "groups": np.int64}
CHUNK = 1 << 22  # tokens looked at in one piece where a whole file is read


# ---------------------------------------------------------------------------------------------------------------------
# writing


def check_target(dir):
    """UserError unless `dir` is free, empty or an earlier store: only those may be replaced."""
    dir = Path(dir)
    names = {p.name for p in dir.iterdir()} if dir.is_dir() else set()
    ours = all(
        re.fullmatch(r"tokenizer|meta\.json|\w+\.(tokens|mask|rows|groups)\.bin", name)
        for name in names
    )
    ours = (
        ours and "meta.json" in names and FORMAT in (dir / "meta.json").read_text(errors="replace")
    )
    if dir.is_file() or names and not ours:
        raise UserError(
            f"{dir} exists and is not a prepared data folder: choose another out=, or move it away"
        )


class Writer:
    """`with Writer(dir, vocab_size, meta) as w: w.add("train", tokens, mask)` writes a store, or nothing.

    Rows stream into `<dir>.tmp-<pid>`, which takes the place of `dir` when the block ends well and goes when it does
    not. `meta` (a dict, may grow until the end) is kept in meta.json: template, source, counts, and
    `tokenizer`, the fingerprint that Store compares.
    """

    def __init__(self, dir, vocab_size, meta=None):
        self.dir, self.vocab_size, self.meta = (
            Path(dir).resolve(),
            vocab_size,
            {} if meta is None else meta,
        )
        self.dtype = np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)
        self.tmp = self.dir.with_name(f"{self.dir.name}.tmp-{os.getpid()}")
        self.splits = {}

    def __enter__(self):
        files.recover_dir(self.dir)
        check_target(self.dir)
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(parents=True)
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.commit()
        finally:
            for f in (f for s in self.splits.values() for f in s.files.values()):
                with contextlib.suppress(OSError):  # on a full disk closing fails again
                    f.close()
            shutil.rmtree(self.tmp, ignore_errors=True)

    def start(self, split, kinds):
        files = {kind: open(self.tmp / f"{split}.{kind}.bin", "wb") for kind in kinds}
        files["rows"].write(bytes(8))  # offset 0
        self.splits[split] = SimpleNamespace(
            files=files, rows=0, tokens=0, target_tokens=0, groups=0, grouped=0
        )
        return self.splits[split]

    def add(self, split, tokens, mask=None):
        """One row: tokens (T,) ints, mask (T,) of 0 and 1, or None for plain text."""
        self.extend(split, tokens, mask, [len(tokens)])

    def extend(self, split, tokens, mask, lengths):
        """Many rows at once: tokens and mask (sum of lengths,), lengths (N,) of at least 1 each."""
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        mask = None if mask is None else np.asarray(mask, np.uint8)
        if not len(lengths):
            return
        if (
            lengths.min() < 1
            or lengths.sum() != len(tokens)
            or (mask is not None and mask.shape != tokens.shape)
        ):
            raise ValueError(
                "rows must not be empty, and lengths must add up to the tokens and the mask"
            )
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            raise UserError(
                f"token id {tokens.max()} is outside the vocabulary of {self.vocab_size}"
            )
        s = self.splits.get(split) or self.start(
            split, ["tokens", "rows"] + ["mask"] * (mask is not None)
        )
        if ("mask" in s.files) != (mask is not None):
            raise ValueError("a split has a mask for all of its rows or for none")
        s.files["tokens"].write(np.ascontiguousarray(tokens, self.dtype))
        s.files["rows"].write((s.tokens + np.cumsum(lengths)).tobytes())
        if mask is not None:
            s.files["mask"].write(np.ascontiguousarray(mask))
        s.rows += len(lengths)
        s.tokens += len(tokens)
        s.target_tokens += len(tokens) if mask is None else int(mask.sum())

    def end_group(self, split):
        """The rows added since the last call are one prompt's completions, best first."""
        s = self.splits[split]
        if "groups" not in s.files:
            s.files["groups"] = open(self.tmp / f"{split}.groups.bin", "wb")
            s.files["groups"].write(bytes(8))
        if s.rows == s.grouped:
            raise ValueError("a group needs a row")
        s.files["groups"].write(np.int64(s.rows).tobytes())
        s.groups, s.grouped = s.groups + 1, s.rows

    def commit(self):
        if not self.splits:
            raise UserError(f"no rows to write into {self.dir}")
        splits = {}
        for name, s in sorted(self.splits.items()):
            if "groups" in s.files and s.grouped != s.rows:
                raise ValueError("rows after the last end_group")
            for f in s.files.values():
                f.flush()
                os.fsync(f.fileno())
                f.close()
            counts = {
                k: v
                for k, v in vars(s).items()
                if k not in ("files", "grouped") and (k != "groups" or v)
            }
            splits[name] = {**counts, "files": sorted(s.files)}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
        }
        files.write_json(self.tmp / "meta.json", {**head, "splits": splits, **self.meta})
        files.replace_dir(self.tmp, self.dir)


def write_store(dir, splits, meta):
    """A whole store in one call. `splits`: name -> iterable of rows (tokens, mask or None), or of lists of rows
    (groups, best first); `meta` must hold vocab_size."""
    with Writer(dir, meta["vocab_size"], {k: v for k, v in meta.items() if k != "vocab_size"}) as w:
        for split, items in splits.items():
            for item in items:
                for tokens, mask in item if isinstance(item, list) else [item]:
                    w.add(split, tokens, mask)
                if isinstance(item, list):
                    w.end_group(split)


def parse_share(text, n):
    """How many of `n` rows `text` asks for: "all", "100" of them, or the whole part of a share, "5%" or "0.05"."""
    text = str(text).strip()
    if text == "all":
        return n
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%|(0?\.\d+)", text):
        share = (
            Fraction(match[1]) / 100 if match[1] else Fraction(match[2])
        )  # exact: 29% of 100 is 29
        count = int(n * share) if share <= 1 else n + 1
    elif re.fullmatch(r"\d[\d_]*", text):
        count = int(text)
    else:
        raise UserError(
            f"size '{text}' is not all, a number of rows such as 1000, or a share such as 10%"
        )
    if count > n:
        raise UserError(f"size '{text}' is more than the {n} rows there are")
    return count


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_meta(dir):
    """meta.json of a prepared data folder; UserError when there is none."""
    files.recover_dir(dir)
    path = Path(dir) / "meta.json"
    if not path.exists():
        what = (
            "is not a prepared data folder (it has no meta.json)"
            if Path(dir).is_dir()
            else "does not exist"
        )
        raise UserError(
            f"data folder {dir} {what}: make one with python -m prepare.NAME ... out={dir}"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        ours, version, splits = meta["format"] == FORMAT, meta["version"], meta["splits"]
        (
            np.dtype(meta["dtype"]),
            [s["rows"] + s["tokens"] for s in splits.values()],
            meta["vocab_size"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{path} is damaged or not of a prepared data folder: prepare it again")
    if version != VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {VERSION}: prepare it again"
        )
    return meta


class Store:
    """One split of a prepared data folder, memory-mapped. `tokenizer`: the one that must fit (its `.fingerprint`).

    .lengths (N,) int64, .targets (N,) int64 target tokens of each row, .groups (G+1,) int64 or None, .meta the dict.
    UserError where a file is missing, of another size than meta.json says, or made with another tokenizer.
    """

    def __init__(self, dir, split="train", tokenizer=None):
        self.dir, self.split, self.meta = Path(dir), split, read_meta(dir)
        if split not in self.meta["splits"]:
            raise UserError(f"{dir} has no split '{split}', only {', '.join(self.meta['splits'])}")
        made_with = self.meta.get("tokenizer")
        if tokenizer is not None and made_with != tokenizer.fingerprint:
            raise UserError(
                f"{dir} was prepared with another tokenizer than the model's (sha256 {str(made_with)[:12]}, the "
                f"model's has {tokenizer.fingerprint[:12]}): prepare it again with model= of this model"
            )
        counts = self.meta["splits"][split]
        lengths = {"rows": counts["rows"] + 1, "groups": counts.get("groups", 0) + 1}
        arrays = {}
        for kind in counts["files"]:
            path = self.dir / f"{split}.{kind}.bin"
            dtype = np.dtype(KINDS[kind] or self.meta["dtype"])
            expected = lengths.get(kind, counts["tokens"]) * dtype.itemsize
            if not path.exists():
                raise UserError(f"{path} is missing: prepare {dir} again")
            if path.stat().st_size != expected:
                size = path.stat().st_size
                raise UserError(
                    f"{path} has {size} bytes and not {expected}: it is damaged, prepare {dir} again"
                )
            arrays[kind] = np.memmap(path, dtype, "r")
        self.tokens, self.mask, self.offsets = (
            arrays["tokens"],
            arrays.get("mask"),
            np.array(arrays["rows"]),
        )
        self.groups = np.array(arrays["groups"]) if "groups" in arrays else None
        for name, offsets, end in (
            ("rows", self.offsets, counts["tokens"]),
            ("groups", self.groups, counts["rows"]),
        ):
            if offsets is not None and (
                offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 1).any()
            ):
                raise UserError(
                    f"{self.dir}/{split}.{name}.bin is damaged (offsets out of order): prepare {dir} again"
                )
        self.lengths = np.diff(self.offsets)

    def __len__(self):
        return len(self.lengths)

    def row(self, i):
        """(tokens (T,) uint, mask (T,) uint8)"""
        span = slice(self.offsets[i], self.offsets[i + 1])
        tokens = self.tokens[span]
        return tokens, np.ones(len(tokens), np.uint8) if self.mask is None else self.mask[span]

    @property
    def targets(self):
        if self.mask is None:
            return self.lengths
        counts, a = np.empty(len(self), np.int64), 0
        while a < len(self):
            b = max(a + 1, np.searchsorted(self.offsets, self.offsets[a] + CHUNK, "right") - 1)
            ends = np.cumsum(self.mask[self.offsets[a] : self.offsets[b]], dtype=np.int64)
            counts[a:b] = np.diff(
                ends[self.offsets[a + 1 : b + 1] - self.offsets[a] - 1], prepend=0
            )
            a = b
        return counts


class Mix:
    """Rows of several stores behind one index: len(), row(i), .lengths, .targets."""

    def __init__(self, stores, picks):
        self.stores, self.picks = stores, np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        self.lengths = np.concatenate([s.lengths[p] for s, p in zip(stores, picks, strict=True)])

    def __len__(self):
        return len(self.picks)

    def row(self, i):
        return self.stores[self.store_of[i]].row(self.picks[i])

    @property
    def targets(self):
        return np.concatenate(
            [s.targets[self.picks[self.store_of == i]] for i, s in enumerate(self.stores)]
        )


def has_split(dirs, split):
    """Whether one of the data folders has the split."""
    return any(split in read_meta(dir)["splits"] for dir in dirs)


def chat_template(dirs):
    """The chat template, in Jinja, by which the rows of the data folders are laid out; None: the model's own, or no chat at all."""
    found = {template: dir for dir in dirs if (template := read_meta(dir).get("chat_template"))}
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(map(str, found.values()))} were prepared with different chat templates: use one template="
        )
    return next(iter(found), None)


def mix(dirs, sizes=None, seed=0, split="train", tokenizer=None):
    """Rows of several data folders: each is shuffled by `seed`, then all of it, K rows or P% are taken.

    data=[arc,mmlu,orca] sizes=[all,10%,1000]; the two lists must be equally long (sizes None: all of all).
    """
    sizes = ["all"] * len(dirs) if sizes is None else sizes
    if len(dirs) != len(sizes) or not dirs:
        raise UserError(
            f"data= names {len(dirs)} folders and sizes= {len(sizes)} sizes: give one size for each folder"
        )
    stores = [Store(dir, split, tokenizer) for dir in dirs]
    if len({s.meta.get("tokenizer") for s in stores}) > 1:
        raise UserError(
            f"{', '.join(map(str, dirs))} were prepared with different tokenizers: use one model= for all"
        )
    picks = []
    for i, (store, size) in enumerate(zip(stores, sizes, strict=True)):
        try:
            count = parse_share(size, len(store))
        except UserError as e:
            raise UserError(f"{dirs[i]}: {e}") from None
        picks.append(np.sort(np.random.default_rng([seed, i]).permutation(len(store))[:count]))
    if not any(map(len, picks)):
        raise UserError(
            f"sizes={','.join(sizes)} takes no row of {', '.join(map(str, dirs))}: ask for more"
        )
    return Mix(stores, picks)


def validation(dirs, tokenizer=None):
    """The val splits of the data folders as one Mix; None where no folder has one."""
    dirs = [dir for dir in dirs if has_split([dir], "val")]
    return mix(dirs, split="val", tokenizer=tokenizer) if dirs else None


# ---------------------------------------------------------------------------------------------------------------------
# rows -> batches


def pack(lengths, max_length, seed=0):
    """Rows into packs of at most `max_length` tokens by best fit, longest first: a list of int arrays of row indices,
    every row once. Which of equally long rows goes where is drawn from `seed`; the number of packs is not.

    A run of equal lengths is placed at once: best fit fills the fullest open pack that has room until it has none,
    so all packs of equal room are filled alike. O(N log N) for the sort, and one numpy call for each run and room.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > max_length:
        raise ValueError(f"lengths must lie in 1 ... {max_length}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    pack_of, n_packs = np.empty(len(lengths), np.int64), 0
    open_packs = {}  # room -> list of arrays of packs with that much room
    rooms = 0  # bit r is set when open_packs[r] holds something: the smallest fitting room is one shift away
    sizes, starts = np.unique(-lengths[order], return_index=True)
    for size, a, end in zip(
        (-sizes).tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True
    ):
        while a < end:
            if fitting := rooms >> size:
                room = size + (fitting & -fitting).bit_length() - 1
                packs = open_packs[room].pop()
                if not open_packs[room]:
                    rooms ^= 1 << room
            else:
                room, new = max_length, -(-(end - a) // (max_length // size))
                packs, n_packs = np.arange(n_packs, n_packs + new), n_packs + new
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
    """Batches of `rows` row indices (one of them may be short) of similar length, in random order: the rows are
    shuffled, then sorted by length within stretches of 32 batches."""
    rng = np.random.default_rng(seed)
    lengths, order, batches = np.asarray(lengths), rng.permutation(len(lengths)), []
    for a in range(0, len(order), 32 * rows):
        part = order[a : a + 32 * rows]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[i : i + rows] for i in range(0, len(part), rows)]
    return [batches[i] for i in rng.permutation(len(batches))]


def collate(packs, length, prompt_weight=0.0):
    """Packs, each a list of rows (tokens, mask), as tensors (B, T = length) on the CPU:

    tokens     int64, padded with 0
    targets    int64, the next token of the same document; 0 where there is none
    weights    float32, of the target: its mask, with `prompt_weight` for 0; 0 at each document's end and on padding
    positions  int64, from 0 in each document
    docs       int64, 0, 1, ... along the row; -1 on padding
    """
    import torch  # here, so that the prepare scripts start without it

    shape = len(packs), length
    tokens, docs = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    targets, positions, weights = (
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.float32),
    )
    for b, rows in enumerate(packs):
        a = 0
        for doc, (row, mask) in enumerate(rows):
            end = a + len(row)
            tokens[b, a:end], docs[b, a:end], positions[b, a:end] = row, doc, np.arange(len(row))
            targets[b, a : end - 1] = row[1:]
            weights[b, a : end - 1] = np.where(mask[1:], np.float32(1), np.float32(prompt_weight))
            a = end
    arrays = {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "positions": positions,
        "docs": docs,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def target_index(micro, static=False):
    """The micro-batch with "index": the flat positions of its target tokens, the only ones whose logits are needed.
    Found on the CPU, before the batch moves to the device. static: all positions, so that shapes never change (XLA)."""
    import torch

    weights = micro["weights"].flatten()
    return micro | {"index": torch.arange(len(weights)) if static else weights.nonzero().squeeze(1)}


def fit(rows, max_length, over_length="truncate"):
    """(index (M,) of the rows that can be trained on, dropped, truncated): a row over `max_length` is dropped, or loses
    its end - and is dropped all the same when no target is left."""
    keep, long = np.ones(len(rows), bool), np.flatnonzero(rows.lengths > max_length)
    for i in long:
        keep[i] = over_length == "truncate" and rows.row(i)[1][1:max_length].any()
    return np.flatnonzero(keep), int((~keep).sum()), int(keep[long].sum())


def check_reach(longest, reach, dir):
    """UserError when a row of `longest` tokens goes beyond the `reach` positions of the model in `dir`: it would be trained where
    its configuration, which is saved with it, says that it cannot be used."""
    if longest > reach:
        raise UserError(
            f"a row has {longest:,} tokens, {dir} takes {reach:,} (max_position_embeddings in its config.json): lower max_length="
        )


class Batches:
    """The micro-batches of every optimizer step, for one rank. `rows`: a Store or a Mix.

    A step takes `batch_size` packs (rows, when packing=False) over all ranks and micro-batches of `micro_batch` each.
    What a step holds depends on (seed, step, batch_size) alone, not on how it is cut. The last step of an epoch is
    as short as it comes out: ranks that have nothing left get padding of weight 0, so that all do the same number of
    micro-batches. Packs have T = max_length; without packing T is the longest row's length, rounded up to 64, unless
    `static`. steps_per_epoch is the same for every epoch; .dropped and .truncated count rows over max_length.
    """

    def __init__(
        self,
        rows,
        batch_size,
        micro_batch,
        max_length,
        packing=True,
        seed=0,
        rank=0,
        world=1,
        prompt_weight=0.0,
        over_length="truncate",
        static=False,
    ):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            raise UserError(
                f"batch_size={batch_size} is not a multiple of micro_batch={micro_batch} x {world} ranks: change one"
            )
        self.rows, self.batch_size, self.micro_batch, self.max_length = (
            rows,
            batch_size,
            micro_batch,
            max_length,
        )
        self.packing, self.seed, self.rank, self.world = packing, seed, rank, world
        self.prompt_weight, self.static = prompt_weight, static
        self.index, self.dropped, self.truncated = fit(rows, max_length, over_length)
        if not len(self.index):
            raise UserError(
                f"none of the {len(rows)} rows fits into max_length={max_length}: raise it"
            )
        self.lengths = np.minimum(rows.lengths[self.index], max_length)
        self.epoch, self.steps = None, None
        self.steps_per_epoch = len(self.plan(0))

    def plan(self, epoch):
        """The epoch's steps, each a list of packs (arrays of indices into self.index), over all ranks."""
        if epoch != self.epoch:
            seed = [self.seed, epoch]
            if self.packing:
                packs = pack(self.lengths, self.max_length, seed)
                packs = [
                    packs[i] for i in np.random.default_rng([*seed, 1]).permutation(len(packs))
                ]
                steps = [
                    packs[i : i + self.batch_size] for i in range(0, len(packs), self.batch_size)
                ]
            else:
                steps = [
                    np.split(step, len(step))
                    for step in bucket(self.lengths, self.batch_size, seed)
                ]
            self.epoch, self.steps = epoch, steps
        return self.steps

    def batch(self, step):
        """This rank's micro-batches (see `collate`; B = micro_batch) at a step counted from the start of training."""
        packs = self.plan(step // self.steps_per_epoch)[step % self.steps_per_epoch]
        across = self.micro_batch * self.world
        return [
            self.micro(packs[a : a + self.micro_batch])
            for a in range(self.rank * self.micro_batch, -(-len(packs) // across) * across, across)
        ]

    def micro(self, packs):
        packs = [
            [tuple(part[: self.max_length] for part in self.rows.row(self.index[i])) for i in p]
            for p in packs
        ]
        length = self.max_length
        if not self.packing and not self.static:
            longest = max((len(tokens) for p in packs for tokens, _ in p), default=1)
            length = min(length, -(-longest // 64) * 64)
        return collate(packs + [[]] * (self.micro_batch - len(packs)), length, self.prompt_weight)


class Windows:
    """The micro-batches of pretraining, for one rank: windows of `max_length` tokens over whole stores, end to end.

    The last token's target is the next window's first token, so nothing is lost between windows; a store's last window is
    as short as it comes out. isolate: documents do not see each other, positions restart with each, and the token behind a
    document's end is no target; otherwise a window is one stretch of text.

    Without `weights` an epoch has every window of all stores once, shuffled together; its last step is as short as it comes
    out. With them, of every CYCLE windows a store gives its share, rounded and evenly spread; each store goes through its
    windows in random order, then again in another, at its own pace; `steps_per_epoch` is then as many windows as all have.
    What a step holds depends on (seed, step, batch_size) alone, not on how it is cut: see Batches.
    """

    CYCLE = 1 << 16

    def __init__(
        self,
        stores,
        batch_size,
        micro_batch,
        max_length,
        weights=(),
        isolate=True,
        seed=0,
        rank=0,
        world=1,
    ):
        if batch_size < 1 or micro_batch < 1 or batch_size % (micro_batch * world):
            raise UserError(
                f"batch_size={batch_size} is not a multiple of micro_batch={micro_batch} x {world} ranks: change one"
            )
        if weights and (len(weights) != len(stores) or min(weights) <= 0):
            raise UserError(
                f"weights= has {len(weights)} for {len(stores)} data folders: give each one above 0"
            )
        self.stores, self.batch_size, self.micro_batch, self.max_length = (
            stores,
            batch_size,
            micro_batch,
            max_length,
        )
        self.isolate, self.seed, self.rank, self.world = isolate, seed, rank, world
        self.counts = np.array([-(-(len(s.tokens) - 1) // max_length) for s in stores])
        self.starts = np.cumsum([0, *self.counts])  # windows are numbered through all stores
        if self.counts.min() < 1:
            raise UserError(
                f"{stores[self.counts.argmin()].dir} holds a single token: there is nothing to predict"
            )
        self.steps_per_epoch = int(-(-self.starts[-1] // batch_size))
        self.orders, self.share = {}, None
        if weights:
            ends = np.rint(np.cumsum(weights) / sum(weights) * self.CYCLE).astype(np.int64)
            self.share = np.maximum(np.diff(ends, prepend=0), 1)  # windows of each store in a cycle
            rng = np.random.default_rng([seed, 0])
            times = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in self.share])
            order = np.argsort(times)
            self.store_at = np.repeat(np.arange(len(stores)), self.share)[
                order
            ]  # which store, at each place of the cycle
            self.draw_at = np.concatenate([np.arange(n) for n in self.share])[
                order
            ]  # and how many of it came before

    def order(self, store, epoch):
        """The numbers of a store's windows (None: of all) in the order of an epoch."""
        if self.orders.get(store, (None,))[0] != epoch:
            first, end = (0, self.starts[-1]) if store is None else self.starts[store : store + 2]
            rng = np.random.default_rng([self.seed, epoch, 1 if store is None else store + 2])
            self.orders[store] = epoch, first + rng.permutation(end - first)
        return self.orders[store][1]

    def plan(self, step):
        """The numbers of a step's windows, over all ranks."""
        if self.share is None:
            epoch, at = divmod(step, self.steps_per_epoch)
            return self.order(None, epoch)[at * self.batch_size : (at + 1) * self.batch_size]
        cycle, at = np.divmod(
            np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(self.store_at)
        )
        stores = self.store_at[at]
        epochs, places = np.divmod(
            cycle * self.share[stores] + self.draw_at[at], self.counts[stores]
        )
        return np.array(
            [
                self.order(*x)[i]
                for *x, i in zip(stores.tolist(), epochs.tolist(), places.tolist(), strict=True)
            ]
        )

    def batch(self, step):
        """This rank's micro-batches (see `collate`; B = micro_batch, T = max_length) at a step counted from the start."""
        plan, across = self.plan(step), self.micro_batch * self.world
        return [
            self.micro(plan[a : a + self.micro_batch])
            for a in range(self.rank * self.micro_batch, -(-len(plan) // across) * across, across)
        ]

    def micro(self, windows):
        packs = [self.documents(w) for w in windows] + [[]] * (self.micro_batch - len(windows))
        batch = collate(packs, self.max_length + 1)  # with the last target, which is then cut off
        return {name: t[:, : self.max_length].contiguous() for name, t in batch.items()}

    def documents(self, window):
        """The rows of `collate` for a window and the one token behind it."""
        i = int(np.searchsorted(self.starts, window, "right")) - 1
        store, a = self.stores[i], int(window - self.starts[i]) * self.max_length
        b = min(a + self.max_length + 1, len(store.tokens))
        cuts = (
            store.offsets[slice(*np.searchsorted(store.offsets, (a + 1, b)))].tolist()
            if self.isolate
            else []
        )
        spans = [slice(*span) for span in zip([a, *cuts], [*cuts, b], strict=True)]
        return [
            (store.tokens[s], np.ones(s.stop - s.start) if store.mask is None else store.mask[s])
            for s in spans
        ]
