"""The store of prepared data: rows of tokens on disk, memory-mapped. Write, read, mix, hold out.

A folder holds meta.json and, for each split NAME (`train`, `val`),

    NAME.tokens.bin   uint16 (vocabulary below 65,536) or uint32: all rows, one after another
    NAME.mask.bin     uint8: 1 where the token is a target. Plain text has none: every token is one
    NAME.rows.bin     int64: N+1 offsets of the rows into the tokens
    NAME.groups.bin   int64: G+1 offsets of the groups into the rows. Preference data only: a group
                      is one prompt's completions, best first

Tokens and masks stay on disk. Only the offsets are read into memory.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nano import files
from nano.config import UserError

FORMAT, VERSION = "nanoInstruct store", 1
KINDS = {"tokens": None, "mask": np.uint8, "rows": np.int64, "groups": np.int64}


# ------------------------------------------------------------------------------------------ writing


def check_target(dir):
    """UserError unless `dir` is free, empty or an earlier store. Only those may be replaced."""
    dir = Path(dir)
    names = {p.name for p in dir.iterdir()} if dir.is_dir() else set()
    pattern = r"tokenizer|meta\.json|\w+\.(tokens|mask|rows|groups)\.bin"
    ours = "meta.json" in names and all(re.fullmatch(pattern, name) for name in names)
    ours = ours and FORMAT in (dir / "meta.json").read_text(errors="replace")
    if dir.is_file() or names and not ours:
        raise UserError(
            f"{dir} exists and is not a prepared data folder: choose another out=, or move it away"
        )


class Writer:
    """`with Writer(dir, vocab_size, meta) as w: w.add("train", tokens, mask)` writes a whole store,
    or nothing.

    Rows stream into `<dir>.tmp-<pid>`. When the block ends without an exception, that folder takes
    the place of `dir`; otherwise it is removed. `meta` is a dict that may grow until the end. It is
    kept in meta.json: template, source, counts, and as `tokenizer` the fingerprint that Store
    compares.
    """

    def __init__(self, dir, vocab_size, meta=None):
        self.dir = Path(dir).resolve()
        self.vocab_size = vocab_size
        self.meta = {} if meta is None else meta
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
            for split in self.splits.values():
                for f in split.files.values():
                    with contextlib.suppress(OSError):  # on a full disk closing fails again
                        f.close()
            shutil.rmtree(self.tmp, ignore_errors=True)

    def start(self, split, kinds):
        opened = {kind: open(self.tmp / f"{split}.{kind}.bin", "wb") for kind in kinds}
        opened["rows"].write(bytes(8))  # offset 0
        self.splits[split] = SimpleNamespace(
            files=opened, rows=0, tokens=0, target_tokens=0, groups=0, grouped=0
        )
        return self.splits[split]

    def add(self, split, tokens, mask=None):
        """One row: tokens (T,) ints, mask (T,) of 0 and 1, or None for plain text."""
        self.extend(split, tokens, mask, [len(tokens)])

    def extend(self, split, tokens, mask, lengths):
        """Many rows at once: tokens and mask (sum of lengths,), lengths (N,) of at least 1 each."""
        tokens = np.asarray(tokens)
        lengths = np.asarray(lengths, np.int64)
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
        kinds = ["tokens", "rows"] if mask is None else ["tokens", "rows", "mask"]
        s = self.splits.get(split) or self.start(split, kinds)
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
        """Makes one group of the rows added since the last call: completions, best first."""
        s = self.splits[split]
        if "groups" not in s.files:
            s.files["groups"] = open(self.tmp / f"{split}.groups.bin", "wb")
            s.files["groups"].write(bytes(8))
        if s.rows == s.grouped:
            raise ValueError("a group needs a row")
        s.files["groups"].write(np.int64(s.rows).tobytes())
        s.groups += 1
        s.grouped = s.rows

    def commit(self):
        if not self.splits:
            raise UserError(f"no rows to write into {self.dir}")
        splits = {}
        for name, s in sorted(self.splits.items()):
            if "groups" in s.files and s.grouped != s.rows:
                raise ValueError("rows after the last end_group")
            for f in s.files.values():
                f.close()
                files.sync(f.name)
            counts = dict(rows=s.rows, tokens=s.tokens, target_tokens=s.target_tokens)
            if s.groups:
                counts["groups"] = s.groups
            splits[name] = counts | dict(files=sorted(s.files))
        head = dict(format=FORMAT, version=VERSION, dtype=self.dtype.name)
        meta = head | dict(vocab_size=self.vocab_size, splits=splits) | self.meta
        # json escapes all but ASCII: the names of a user's files need not be valid UTF-8
        files.write_text(self.tmp / "meta.json", json.dumps(meta, indent=1))
        files.replace_dir(self.tmp, self.dir)


def write_store(dir, splits, meta):
    """A whole store in one call. `splits`: name -> iterable of rows (tokens, mask or None), or of
    groups, which are lists of rows, best first. `meta` must hold vocab_size."""
    with Writer(dir, meta["vocab_size"], {k: v for k, v in meta.items() if k != "vocab_size"}) as w:
        for split, items in splits.items():
            for item in items:
                for tokens, mask in item if isinstance(item, list) else [item]:
                    w.add(split, tokens, mask)
                if isinstance(item, list):
                    w.end_group(split)


def parse_share(text, n):
    """How many of `n` rows `text` asks for: "all", a number such as "100", or a share such as "5%"
    or "0.05", of which the whole part is taken. UserError for anything else, or more than `n`."""
    text = str(text).strip()
    if text == "all":
        return n
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%|(0?\.\d+)", text):
        # a Fraction is exact: 29% of 100 is 29
        share = Fraction(match[1]) / 100 if match[1] else Fraction(match[2])
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


# ------------------------------------------------------------------------------------------ reading


def read_meta(dir):
    """meta.json of a prepared data folder as a dict. UserError when there is none."""
    files.recover_dir(dir)
    path = Path(dir) / "meta.json"
    if not path.exists():
        what = "does not exist"
        if Path(dir).is_dir():
            what = "is not a prepared data folder (it has no meta.json)"
        raise UserError(
            f"data folder {dir} {what}: make one with python -m prepare.NAME ... out={dir}"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["version"]
        np.dtype(meta["dtype"])
        ours = meta["format"] == FORMAT and "vocab_size" in meta
        for counts in meta["splits"].values():
            ours = ours and counts.keys() >= {"rows", "tokens", "files"}
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
    """One split of a prepared data folder, memory-mapped: len(), row(i).

    .tokens and .mask (all tokens,), .offsets (N+1,), .lengths (N,), .groups (G+1,), .meta the dict
    of meta.json; mask and groups may be None. `tokenizer` is the one whose `.fingerprint` must fit.
    A folder that names no tokenizer gets a notice on stderr. UserError where a file is missing, has
    another size than meta.json says, or was made with another tokenizer.
    """

    def __init__(self, dir, split="train", tokenizer=None):
        self.dir = Path(dir)
        self.split = split
        self.meta = read_meta(dir)
        if split not in self.meta["splits"]:
            raise UserError(f"{dir} has no split '{split}', only {', '.join(self.meta['splits'])}")
        prepared_with = self.meta.get("tokenizer")
        if tokenizer is not None and prepared_with is None:
            print(
                f"note: {dir} does not say which tokenizer prepared it; the model's is assumed",
                file=sys.stderr,
            )
        elif tokenizer is not None and prepared_with != tokenizer.fingerprint:
            raise UserError(
                f"{dir} was prepared with another tokenizer than the model's "
                f"(sha256 {prepared_with[:12]}, the model's has {tokenizer.fingerprint[:12]}): "
                "prepare it again with model= of this model"
            )
        counts = self.meta["splits"][split]
        self.tokens = self._open("tokens", counts["tokens"])
        self.mask = self._open("mask", counts["tokens"]) if "mask" in counts["files"] else None
        self.offsets = self._offsets("rows", counts["rows"], counts["tokens"])
        self.groups = None
        if "groups" in counts["files"]:
            self.groups = self._offsets("groups", counts["groups"], counts["rows"])
        self.lengths = np.diff(self.offsets)

    def _open(self, kind, count):
        """A file of `count` numbers, memory-mapped."""
        path = self.dir / f"{self.split}.{kind}.bin"
        dtype = np.dtype(KINDS[kind] or self.meta["dtype"])
        if not path.exists():
            raise UserError(f"{path} is missing: prepare {self.dir} again")
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes and not {count * dtype.itemsize}: "
                f"it is damaged, prepare {self.dir} again"
            )
        return np.memmap(path, dtype, "r")

    def _offsets(self, kind, count, end):
        """The offsets (count+1,) of a file, in memory: 0, then growing up to `end`."""
        offsets = np.array(self._open(kind, count + 1))
        if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 1).any():
            raise UserError(
                f"{self.dir}/{self.split}.{kind}.bin is damaged (offsets out of order): "
                f"prepare {self.dir} again"
            )
        return offsets

    def __len__(self):
        return len(self.lengths)

    def row(self, i):
        """(tokens (T,) uint, mask (T,) uint8)"""
        span = slice(self.offsets[i], self.offsets[i + 1])
        tokens = self.tokens[span]
        return tokens, np.ones(len(tokens), np.uint8) if self.mask is None else self.mask[span]


# ------------------------------------------------------------------------------------------ mixing


class Mix:
    """Rows of several stores behind one index: len(), row(i). .lengths (N,)

    picks: of each store the numbers of its rows that are in the mix."""

    def __init__(self, stores, picks):
        self.stores = stores
        self.picks = np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        self.lengths = np.concatenate([s.lengths[p] for s, p in zip(stores, picks, strict=True)])

    def __len__(self):
        return len(self.picks)

    def row(self, i):
        return self.stores[self.store_of[i]].row(self.picks[i])


class GroupMix:
    """Preference groups of several stores behind one index: len(), group(g), prompt(g).

    .lengths (G,)   tokens of all completions of a group
    .squares (G,)   sum of the squares of its completions' lengths
    .longest (G,)   tokens of its longest completion
    .first (G+1,)   number of its first completion, counted over all groups
    """

    def __init__(self, stores, picks):
        def of_groups(reduce):
            return np.concatenate([reduce(s)[p] for s, p in zip(stores, picks, strict=True)])

        self.stores = stores
        self.picks = np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        self.lengths = of_groups(lambda s: np.add.reduceat(s.lengths, s.groups[:-1]))
        self.squares = of_groups(lambda s: np.add.reduceat(s.lengths**2, s.groups[:-1]))
        self.longest = of_groups(lambda s: np.maximum.reduceat(s.lengths, s.groups[:-1]))
        sizes = of_groups(lambda s: np.diff(s.groups))
        self.first = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self):
        return len(self.picks)

    def group(self, g):
        """[(tokens (T,), mask (T,)), ...], best first"""
        store = self.stores[self.store_of[g]]
        a, b = store.groups[self.picks[g] : self.picks[g] + 2]
        return [store.row(row) for row in range(a, b)]

    def prompt(self, g):
        """The ids of a group's prompt, as a list: the tokens before the first target."""
        tokens, mask = self.group(g)[0]
        return tokens[: mask.argmax()].tolist()

    def fingerprint(self):
        """sha256 of all content, in hex."""
        digest = hashlib.sha256(self.first.tobytes())
        for g in range(len(self)):
            for tokens, mask in self.group(g):
                digest.update(np.int64(len(tokens)).tobytes() + tokens.tobytes() + mask.tobytes())
        return digest.hexdigest()


def mix(dirs, sizes=(), seed=0, split="train", tokenizer=None, groups=False):
    """A Mix of the rows, or with `groups` a GroupMix of the preference groups, of several folders.

    `sizes` says for each folder how much of it is taken (see parse_share); () takes all. Which rows
    are taken is drawn from `seed`. data=[arc,mmlu,orca] sizes=[all,10%,1000]
    """
    sizes = sizes or ["all"] * len(dirs)
    if len(dirs) != len(sizes) or not dirs:
        raise UserError(
            f"data= names {len(dirs)} folders and sizes= {len(sizes)} sizes: "
            "give one size for each folder"
        )
    stores = [Store(dir, split, tokenizer) for dir in dirs]
    if len({s.meta.get("tokenizer") for s in stores} - {None}) > 1:
        raise UserError(
            f"{', '.join(map(str, dirs))} were prepared with different tokenizers: "
            "use one model= for all"
        )
    picks = []
    for i, (store, size) in enumerate(zip(stores, sizes, strict=True)):
        if groups and (store.groups is None or np.diff(store.groups).min() < 2):
            raise UserError(
                f"{dirs[i]} holds no groups of two and more completions: "
                "prepare it with prepare.preferences"
            )
        n = len(store.groups) - 1 if groups else len(store)
        try:
            count = parse_share(size, n)
        except UserError as e:
            raise UserError(f"{dirs[i]}: {e}") from None
        picks.append(np.sort(np.random.default_rng([seed, i]).permutation(n)[:count]))
    if not any(map(len, picks)):
        raise UserError(
            f"sizes={','.join(map(str, sizes))} takes no row of {', '.join(map(str, dirs))}: "
            "ask for more"
        )
    return (GroupMix if groups else Mix)(stores, picks)


def validation(dirs, tokenizer=None, groups=False):
    """`mix` of the val splits of the folders that have one; None where no folder has."""
    dirs = [dir for dir in dirs if has_split([dir], "val")]
    return mix(dirs, split="val", tokenizer=tokenizer, groups=groups) if dirs else None


def has_split(dirs, split):
    """Whether one of the data folders has the split."""
    return any(split in read_meta(dir)["splits"] for dir in dirs)


def chat_template(dirs):
    """The chat template, in Jinja, by which the rows of the data folders are laid out. None stands
    for the model's own template, or for data without chats."""
    templates = {text: dir for dir in dirs if (text := read_meta(dir).get("chat_template"))}
    if len(templates) > 1:
        raise UserError(
            f"{' and '.join(map(str, templates.values()))} were prepared with different chat "
            "templates: use one template="
        )
    return next(iter(templates), None)
