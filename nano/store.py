"""The store of prepared data: rows of tokens on disk, memory-mapped. Write, read, mix, hold out.

A folder holds meta.json and, for each split NAME (`train`, `val`),

    NAME.tokens.bin   uint16 (vocabulary below 65,536) or uint32: all rows, one after another
    NAME.mask.bin     uint8: 1 where the token is a target. Plain text has none, because there every
                      token is a target
    NAME.rows.bin     int64: N+1 offsets of the rows into the tokens
    NAME.groups.bin   int64: G+1 offsets of the groups into the rows, for preference data. A group
                      is one prompt's completions, best first
    NAME.records.jsonl, NAME.records.bin
                      optional: the records of rows as JSON, a line each, and int64: N+1 offsets of
                      the lines. A reward or a benchmark reads them. A row without a record has an
                      empty span

A row without a target is a prompt alone. Tokens, masks and records stay on disk. Only the offsets
of rows and groups are read into memory.
"""

import contextlib
import hashlib
import json
import mmap
import re
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NotRequired, TypedDict

import numpy as np

from nano import files
from nano.config import PositiveInt, UserError

FORMAT, VERSION = "nanoInstruct store", 1
JSONL = "records.jsonl"
SOURCE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt)(\.gz)?$", re.I)
KINDS = {
    "tokens": None,
    "mask": np.uint8,
    "rows": np.int64,
    "groups": np.int64,
    "records": np.int64,
    JSONL: np.uint8,
}


# ------------------------------------------------------------------------------------------ writing


def check_target(dir):
    """UserError unless `dir` is free, empty or an earlier store, which may be replaced."""
    dir = Path(dir)
    names = {p.name for p in dir.iterdir()} if dir.is_dir() else set()
    pattern = r"tokenizer|meta\.json|\w+\.(tokens|mask|rows|groups|records)\.bin"
    pattern += r"|\w+\.records\.jsonl"
    ours = "meta.json" in names and all(re.fullmatch(pattern, name) for name in names)
    ours = ours and FORMAT in (dir / "meta.json").read_text(errors="replace")
    if dir.is_file() or names and not ours:
        raise UserError(
            f"{dir} exists and is not a prepared data folder: choose another out=, or move it away"
        )


class Hashed:
    """A new file, and the sha256 of what is written to it."""

    def __init__(self, path):
        self.file = open(path, "wb")
        self.name = self.file.name
        self.digest = hashlib.sha256()
        self.close = self.file.close

    def write(self, content):
        self.digest.update(content)
        self.file.write(content)


class Writer:
    """`with Writer(dir, vocab_size, meta) as w: w.add("train", tokens, mask)` writes a whole store,
    or nothing.

    Rows stream into a folder beside `dir`. When the block ends without an exception, it replaces
    `dir`. Otherwise it is removed (files.new_dir). `meta` is a dict that may grow until the end. It
    is written to meta.json: template, source, counts, and as `tokenizer` and `tokenizer_identity`
    what Store compares. UserError for a folder that may not be replaced and for ids outside the
    vocabulary.
    """

    def __init__(self, dir, vocab_size, meta=None):
        self.dir = Path(dir).resolve()
        self.vocab_size = vocab_size
        self.meta = {} if meta is None else meta
        self.dtype = np.dtype(np.uint16 if vocab_size < 65536 else np.uint32)
        self.folder = files.new_dir(self.dir)
        self.splits = {}

    def __enter__(self):
        files.recover_dir(self.dir)
        check_target(self.dir)
        self.tmp = self.folder.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                self.finish()
        except BaseException as e:
            kind, error, trace = type(e), e, e.__traceback__
            raise
        finally:
            for split in self.splits.values():
                for f in split.files.values():
                    with contextlib.suppress(OSError):  # on a full disk closing fails again
                        f.close()
            self.folder.__exit__(kind, error, trace)

    def open(self, split, kind):
        f = Hashed(self.tmp / f"{split}.{kind}{'' if kind == JSONL else '.bin'}")
        if kind in ("rows", "groups", "records"):
            f.write(bytes(8))  # offset 0
        return f

    def add(self, split, tokens, mask=None):
        """One row: tokens (T,) ints, mask (T,) of 0 and 1, or None for plain text."""
        self.extend(split, tokens, mask, [len(tokens)])

    def extend(self, split, tokens, mask, lengths, records=()):
        """Many rows at once: tokens and mask (sum of lengths,), lengths (N,) of at least 1 each.

        records: N lines of JSON as bytes, b"" for a row without one. () stands for none at all.
        """
        lengths = np.asarray(lengths, np.int64)
        if not len(lengths):
            return
        columns = dict(tokens=np.asarray(tokens))
        if mask is not None:
            columns["mask"] = np.asarray(mask, np.uint8)
        total = int(lengths.sum())
        if lengths.min() < 1 or any(column.shape != (total,) for column in columns.values()):
            raise ValueError(
                "rows must not be empty, and lengths must add up to the tokens and the mask"
            )
        tokens = columns["tokens"]
        if tokens.max() >= self.vocab_size or tokens.min() < 0:
            raise UserError(
                f"token id {tokens.max()} is outside the vocabulary of {self.vocab_size}"
            )
        if split not in self.splits:
            opened = {kind: self.open(split, kind) for kind in ("rows", *columns)}
            counts = dict(rows=0, tokens=0, target_tokens=0, prompts=0)
            self.splits[split] = SimpleNamespace(files=opened, counts=counts, grouped=0, kept=0)
        s = self.splits[split]
        if ("mask" in s.files) != ("mask" in columns):
            raise ValueError("a split has a mask for all of its rows or for none")
        for kind, column in columns.items():
            s.files[kind].write(np.ascontiguousarray(column, KINDS[kind] or self.dtype))
        ends = np.cumsum(lengths)
        s.files["rows"].write((s.counts["tokens"] + ends).tobytes())
        if any(records):
            self.keep(s, split, records)
        elif JSONL in s.files:
            self.keep(s, split, [b""] * len(lengths))
        s.counts["rows"] += len(lengths)
        if mask is not None:
            s.counts["prompts"] += int(
                (np.maximum.reduceat(columns["mask"], ends - lengths) == 0).sum()
            )
        s.counts["tokens"] += total
        s.counts["target_tokens"] += total if mask is None else int(columns["mask"].sum())

    def keep(self, s, split, records):
        """Writes the records of the next rows of a split. Rows before the first one have none."""
        if JSONL not in s.files:
            s.files |= {kind: self.open(split, kind) for kind in (JSONL, "records")}
            s.files["records"].write(bytes(8 * s.counts["rows"]))
        ends = s.kept + np.cumsum([len(record) for record in records])
        s.kept = ends[-1]  # bytes
        s.files[JSONL].write(b"".join(records))
        s.files["records"].write(ends.astype(np.int64).tobytes())

    def end_group(self, split):
        """Makes one group of the rows added since the last call, which are completions, best
        first."""
        s = self.splits[split]
        if "groups" not in s.files:
            s.files["groups"] = self.open(split, "groups")
            s.counts["groups"] = 0
        if s.counts["rows"] == s.grouped:
            raise ValueError("a group needs a row")
        s.grouped = s.counts["rows"]
        s.files["groups"].write(np.int64(s.grouped).tobytes())
        s.counts["groups"] += 1

    def finish(self):
        if not self.splits:
            raise UserError(f"no rows to write into {self.dir}")
        splits = {}
        for name, s in sorted(self.splits.items()):
            if s.grouped not in (0, s.counts["rows"]):
                raise ValueError("rows after the last end_group")
            for f in s.files.values():
                f.close()
                files.sync(f.name)
            hashes = {kind: f.digest.hexdigest() for kind, f in sorted(s.files.items())}
            splits[name] = s.counts | dict(files=sorted(s.files), sha256=hashes)
        head = dict(format=FORMAT, version=VERSION, dtype=self.dtype.name)
        head |= dict(vocab_size=self.vocab_size, splits=splits)
        # json escapes all but ASCII, because the names of a user's files need not be valid UTF-8
        files.write_text(self.tmp / "meta.json", json.dumps(head | self.meta, indent=1))


def write_store(dir, splits, meta):
    """Writes a whole store in one call.

    `splits`: name -> iterable of rows (tokens, mask or None), or of groups, which are lists of
    rows, best first. `meta` must have vocab_size.
    """
    with Writer(dir, meta["vocab_size"], meta) as w:
        for split, items in splits.items():
            for item in items:
                for tokens, mask in item if isinstance(item, list) else [item]:
                    w.add(split, tokens, mask)
                if isinstance(item, list):
                    w.end_group(split)


def parse_share(text, n, key, words=""):
    """How many of `n` rows `text` asks for.

    It is a number such as "100", or a share such as "5%" or "0.05", rounded down. UserError for
    anything else, and for more than `n`. key: where the text comes from, and words: what else may
    stand there, for the message.
    """
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%|(0?\.\d+)", text):
        # a Fraction, because in floating point 29% of 100 is 28
        share = Fraction(match[1]) / 100 if match[1] else Fraction(match[2])
        count = int(n * share) if share <= 1 else n + 1
    elif re.fullmatch(r"\d{1,18}", text.replace("_", "")):
        count = int(text.replace("_", ""))
    else:
        raise UserError(
            f"{key}={text} is not {words}a number of rows such as 1000, or a share such as 10%"
        )
    if count > n:
        raise UserError(f"{key}={text} is more than the {n} rows there are")
    return count


def parse_size(text, n):
    """How many of `n` rows an element of sizes= asks for: "all", or what parse_share takes."""
    return n if str(text).strip() == "all" else parse_share(text, n, "sizes", "all, ")


# ------------------------------------------------------------------------------------------ reading


def check_prepared(dirs, script, keys):
    """UserError, with the command that prepares it, for a file, a folder of files, or an id of the
    hub (org/name) in the place of a prepared folder.

    script, keys: the program in prepare/ that does, and the keys of it that the stage knows.
    """
    for dir in dirs:
        path = Path(dir)
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(dir)) and not path.parent.exists()
        is_id = is_id and path.parent.name not in ("data", "out", "..")
        holds_files = path.is_dir() and not (path / "meta.json").exists()
        holds_files = holds_files and any(SOURCE.search(p.name) for p in path.iterdir())
        if path.is_file() or holds_files or (is_id and not path.exists()):
            folder = shlex.quote(f"data/{path.name.partition('.')[0] or 'prepared'}")
            source = shlex.quote(str(dir))
            raise UserError(
                f"data={dir} is not prepared yet: run `python -m prepare.{script} source={source} "
                f"{keys} out={folder}`, and then this with data={folder}"
            )


class Counts(TypedDict):
    rows: PositiveInt
    tokens: PositiveInt
    groups: NotRequired[PositiveInt]
    prompts: NotRequired[int]
    files: list[str]


class Meta(TypedDict):
    format: Annotated[str, (repr(FORMAT), FORMAT.__eq__)]
    version: int
    dtype: Annotated[str, ("uint16 or uint32", ("uint16", "uint32").__contains__)]
    vocab_size: PositiveInt
    splits: dict[str, Counts]
    tokenizer: NotRequired[str | None]
    chat_template: NotRequired[str | None]


def read_meta(dir):
    """meta.json of a prepared data folder as a dict. UserError when there is none."""
    files.recover_dir(dir)
    path = Path(dir) / "meta.json"
    if not path.exists():
        what = "does not exist"
        if Path(dir).is_dir():
            what = "is not a prepared data folder (it has no meta.json)"
        raise UserError(
            f"data folder {dir} {what}: make one with python -m prepare.text, prepare.instructions "
            f"or prepare.preferences and out={dir}"
        )
    try:
        meta = files.read_json(path, kind=Meta)
    except UserError as e:
        reason = str(e).removeprefix(f"{path}: ").removeprefix(f"{path} ")
        raise UserError(
            f"{path} is damaged or not of a prepared data folder ({reason}): prepare it again"
        ) from None
    if meta["version"] != VERSION:
        raise UserError(
            f"{path} has format version {meta['version']}, this program reads {VERSION}: "
            "prepare it again"
        )
    return meta


def open_mapped(path):
    """The bytes of a file, memory-mapped."""
    with open(path, "rb") as f:
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


class Store:
    """One split of a prepared data folder, memory-mapped: len(), row(i), prompt(i), line(i).

    .tokens and .mask (all tokens,), .offsets (N+1,), .lengths (N,), .groups (G+1,), .meta the dict
    of meta.json; mask and groups may be None. .prompts is the number of prompts alone. `tokenizer`
    is the one whose ids the folder must hold. A folder that names no tokenizer gets a notice on
    stderr. UserError where a file is missing, has another size than meta.json says, or was made
    with another tokenizer.
    """

    def __init__(self, dir, split="train", tokenizer=None):
        self.dir = Path(dir)
        self.split = split
        self.meta = read_meta(dir)
        if split not in self.meta["splits"]:
            raise UserError(f"{dir} has no split '{split}', only {', '.join(self.meta['splits'])}")
        if tokenizer is not None:
            self._check(tokenizer)
        counts = self.meta["splits"][split]
        self.maps = {}  # {kind: the file in memory}
        self.tokens = self._open("tokens", counts["tokens"])
        self.mask = self._open("mask", counts["tokens"]) if "mask" in counts["files"] else None
        self.offsets = self._offsets("rows", counts["rows"], counts["tokens"])
        self.groups = None
        if "groups" in counts["files"]:
            if "groups" not in counts:
                raise UserError(
                    f"{dir}/meta.json is damaged (no number of groups): prepare it again"
                )
            self.groups = self._offsets("groups", counts["groups"], counts["rows"])
        self.prompts = counts.get("prompts", 0)
        self.records = self.record_offsets = None
        if JSONL in counts["files"]:
            self.record_offsets = self._open("records", counts["rows"] + 1)
            self.records = self._open(JSONL, int(self.record_offsets[-1]))
        self.lengths = np.diff(self.offsets)

    def _check(self, tokenizer):
        """UserError where another tokenizer prepared the folder.

        Tokenizers are the same that give the same ids, in whatever files they were saved. Folders
        of the first edition name the content of the files instead."""
        key = "identity" if "tokenizer_identity" in self.meta else "fingerprint"
        prepared_with = self.meta.get("tokenizer_identity") or self.meta.get("tokenizer")
        expected = getattr(tokenizer, key)
        if prepared_with is None:
            print(
                f"note: {self.dir} does not say which tokenizer prepared it; "
                "the model's is assumed",
                file=sys.stderr,
            )
        elif prepared_with != expected:
            raise UserError(
                f"{self.dir} was prepared with another tokenizer than the model's "
                f"(sha256 {prepared_with[:12]}, the model's has {expected[:12]}): "
                "prepare it again with model= of this model"
            )

    def _open(self, kind, count):
        """A file of `count` numbers, memory-mapped."""
        path = self.dir / f"{self.split}.{kind}{'' if kind == JSONL else '.bin'}"
        dtype = np.dtype(KINDS[kind] or self.meta["dtype"])
        if not path.exists():
            raise UserError(f"{path} is missing: prepare {self.dir} again")
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes and not {count * dtype.itemsize}: "
                f"it is damaged, prepare {self.dir} again"
            )
        self.maps[kind] = open_mapped(path)
        return np.frombuffer(self.maps[kind], dtype)

    def fingerprint(self):
        """sha256 of all content, in hex.

        A folder of the first edition does not say the sha256 of its files, so they are read."""
        counts = self.meta["splits"][self.split]
        hashes = counts.get("sha256") or {
            kind: hashlib.sha256(open_mapped(self.dir / f"{self.split}.{kind}.bin")).hexdigest()
            for kind in counts["files"]
        }
        return hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()

    def read_randomly(self):
        """Tells the kernel that rows will be read in random order.

        It otherwise reads far ahead of each row, hundreds of megabytes a step from a cold disk,
        and throws out of memory what other steps need."""
        if hasattr(mmap, "MADV_RANDOM"):
            for kind in ("tokens", "mask"):
                if kind in self.maps:
                    self.maps[kind].madvise(mmap.MADV_RANDOM)

    def _offsets(self, kind, count, end):
        """The offsets (count+1,) of a file, in memory. They grow from 0 to `end`."""
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
        """A row: tokens (T,) uint16 or uint32, mask (T,) uint8."""
        return self.span(self.offsets[i], self.offsets[i + 1])

    def line(self, i):
        """The record of a row as a line of JSON, b"" where it has none."""
        if self.records is None:
            return b""
        return self.records[self.record_offsets[i] : self.record_offsets[i + 1]].tobytes()

    def prompt(self, i):
        """The tokens of a row (T,) that a policy answers: those before the first target.

        A row that has a record and does not end with a target awaits its answer: all of it.
        """
        tokens, mask = self.row(i)
        if not mask[-1] and self.line(i):
            return tokens
        return tokens[: mask.argmax()] if mask.any() else tokens

    def span(self, a, b):
        """The tokens from a up to b, and their mask. UserError for ids outside the vocabulary."""
        tokens = self.tokens[a:b]
        if len(tokens) and tokens.max() >= self.meta["vocab_size"]:
            raise UserError(
                f"{self.dir}/{self.split}.tokens.bin is damaged: token id {tokens.max()} is "
                f"outside the vocabulary of {self.meta['vocab_size']}; prepare {self.dir} again"
            )
        return tokens, np.ones(len(tokens), np.uint8) if self.mask is None else self.mask[a:b]


# ------------------------------------------------------------------------------------------ mixing


class Mix:
    """Rows of several stores behind one index: len(), row(i), prompt(i), line(i) as of a Store.

    .lengths (N,) are their tokens.

    picks: for each store the numbers of its rows that are in the mix.
    """

    def __init__(self, stores, picks):
        self.stores = stores
        self.picks = np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        self.lengths = np.concatenate([s.lengths[p] for s, p in zip(stores, picks, strict=True)])
        self.prompts = sum(store.prompts for store in stores)  # of the whole stores

    def __len__(self):
        return len(self.picks)

    def row(self, i):
        return self.stores[self.store_of[i]].row(self.picks[i])

    def prompt(self, i):
        return self.stores[self.store_of[i]].prompt(self.picks[i])

    def line(self, i):
        return self.stores[self.store_of[i]].line(self.picks[i])

    def read_randomly(self):
        for store in self.stores:
            store.read_randomly()

    def fingerprint(self):
        return fingerprint(self.stores, [self.store_of, self.picks])


class GroupMix:
    """Preference groups of several stores behind one index: len(), group(g), prompt(g).

    .lengths (G,)   tokens of all completions of a group
    .squares (G,)   sum of the squares of its completions' lengths
    .longest (G,)   tokens of its longest completion
    .first (G+1,)   number of its first completion, counted over all groups
    """

    def __init__(self, stores, picks):
        self.stores = stores
        self.picks = np.concatenate(picks)
        self.store_of = np.repeat(np.arange(len(stores)), [len(p) for p in picks])
        parts = []
        for store, pick in zip(stores, picks, strict=True):
            lengths = store.lengths
            starts = store.groups[:-1]
            totals = [np.add.reduceat(n, starts) for n in (lengths, lengths**2)]
            longest = np.maximum.reduceat(lengths, starts)
            parts.append(np.stack([*totals, longest, np.diff(store.groups)])[:, pick])
        self.lengths, self.squares, self.longest, sizes = np.concatenate(parts, axis=1)
        self.first = np.cumsum([0, *sizes])

    def __len__(self):
        return len(self.picks)

    def group(self, g):
        """[(tokens (T,), mask (T,)), ...], best first"""
        store = self.stores[self.store_of[g]]
        a, b = store.groups[self.picks[g] : self.picks[g] + 2]
        return [store.row(row) for row in range(a, b)]

    def read_randomly(self):
        for store in self.stores:
            store.read_randomly()

    def prompt(self, g):
        """The ids of a group's prompt as a list, which are the tokens before the first target."""
        tokens, mask = self.group(g)[0]
        return tokens[: mask.argmax()].tolist()

    def fingerprint(self):
        return fingerprint(self.stores, [self.store_of, self.picks])


def fingerprint(stores, picks=None):
    """sha256 in hex of stores, and of what is picked from them, if given: (2, N) the numbers of the
    stores and of the rows or groups."""
    parts = [store.fingerprint() for store in stores]
    numbers = b"" if picks is None else np.asarray(picks, np.int64).tobytes()
    return hashlib.sha256(repr(parts).encode() + numbers).hexdigest()


def mix(dirs, sizes=(), seed=0, split="train", tokenizer=None, groups=False, weights=()):
    """A Mix of the rows of several folders, or with `groups` a GroupMix of their preference groups.

    `sizes` says for each folder how much of it is taken, see parse_share. () takes all. `seed`
    draws which rows are taken. For example data=[arc,mmlu,orca] sizes=[all,10%,1000]. `weights`
    stand in its place, see `shares`. UserError for folders that do not fit together or hold too
    little.
    """
    if not dirs:
        raise UserError("data= names no folder: give at least one")
    for key, values in dict(sizes=sizes, weights=weights).items():
        if values and len(values) != len(dirs):
            raise UserError(
                f"data= names {len(dirs)} folders and {key}= has {len(values)} elements: "
                "give one for each folder"
            )
    stores = [Store(dir, split, tokenizer) for dir in dirs]
    if tokenizer is None and len({s.meta.get("tokenizer") for s in stores} - {None}) > 1:
        raise UserError(
            f"{', '.join(map(str, dirs))} were prepared with different tokenizers: "
            "use one model= for all"
        )
    for store in stores:
        if groups and (store.groups is None or np.diff(store.groups).min() < 2):
            raise UserError(
                f"{store.dir} holds no groups of two and more completions: "
                "prepare it with prepare.preferences"
            )
    totals = [len(store.groups) - 1 if groups else len(store) for store in stores]
    if weights:
        counts = shares(totals, weights)
    else:
        counts = []
        for store, n, size in zip(stores, totals, sizes or ["all"] * len(dirs), strict=True):
            try:
                counts.append(parse_size(size, n))
            except UserError as e:
                raise UserError(f"{store.dir}: {e}") from None
    if not any(counts):
        raise UserError(
            f"sizes={','.join(map(str, sizes))} takes no row of {', '.join(map(str, dirs))}: "
            "ask for more"
        )
    picks = []
    for i, (n, count) in enumerate(zip(totals, counts, strict=True)):
        copies, rest = divmod(count, n)
        drawn = np.sort(np.random.default_rng([seed, i]).permutation(n)[:rest])
        picks.append(np.concatenate([*[np.arange(n)] * copies, drawn]))
    return (GroupMix if groups else Mix)(stores, picks)


def shares(totals, weights):
    """How many rows of each folder an epoch has, so that they stand in the ratio of `weights`.

    Every row is in it. The folder with the most rows for its weight (`totals` are the numbers of
    rows) is taken once, and the others repeat. UserError for a weight that is not above 0.
    """
    if min(weights) <= 0:
        raise UserError(f"weights= holds {min(weights)}: give each data folder one above 0")
    scale = max(n / weight for n, weight in zip(totals, weights, strict=True))
    counts = [max(round(weight * scale), n) for n, weight in zip(totals, weights, strict=True)]
    most = max(count / max(n, 1) for n, count in zip(totals, counts, strict=True))
    if most > 1000:
        raise UserError(
            f"weights={','.join(map(str, weights))} repeats a folder {most:,.0f} times in an "
            "epoch: bring the weights nearer to each other, 1,000 times is the most"
        )
    return counts


def names_of(dirs):
    """Names of folders for a log: the last parts of their paths, or where two are alike, all of
    them."""
    names = [Path(dir).name for dir in dirs]
    return names if len({*names}) == len(names) else [*map(str, dirs)]


def taken(mix):
    """A table, as a text, of what a Mix or a GroupMix takes of each folder."""
    unit = "groups" if isinstance(mix, GroupMix) else "rows"
    total = mix.lengths.sum()
    lines = [f"{'data':<24}{unit:>12}{'taken':>12}{'tokens':>16}{'of all':>9}"]
    for i, (store, name) in enumerate(
        zip(mix.stores, names_of([store.dir for store in mix.stores]), strict=True)
    ):
        n = len(store.groups) - 1 if unit == "groups" else len(store)
        here = mix.store_of == i
        tokens = mix.lengths[here].sum()
        lines.append(f"{name:<24}{n:>12,}{here.sum():>12,}{tokens:>16,}{tokens / total:>9.1%}")
    return "\n".join(lines)


def validation(dirs, tokenizer=None, groups=False):
    """`mix` of the val splits of the folders that have one; None where no folder has."""
    dirs = [dir for dir in dirs if "val" in read_meta(dir)["splits"]]
    return mix(dirs, split="val", tokenizer=tokenizer, groups=groups) if dirs else None


def chat_template(dirs):
    """The chat template in Jinja with which the data folders were prepared. None stands for the
    model's own template, or for data without chats. UserError if the folders differ."""
    templates = {text: dir for dir in dirs if (text := read_meta(dir).get("chat_template"))}
    if len(templates) > 1:
        raise UserError(
            f"{' and '.join(map(str, templates.values()))} were prepared with different chat "
            "templates: use one template="
        )
    return next(iter(templates), None)


def unwritten_template(dirs):
    """The name of the template, plain or columns, with which the data folders were prepared. A
    model directory cannot hold it. None for any other template."""
    names = [read_meta(dir).get("template") for dir in dirs]
    return next((name for name in names if name in ("plain", "columns")), None)
