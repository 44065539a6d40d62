"""Records to a prepared data folder: what prepare.instructions and prepare.preferences share.

A script has a function encode(cfg, tok, record) that returns a Unit. It raises Drop or BadRecord
for a record without rows. A unit is what one record gives: a row, or a group of rows.

This file reads the records and encodes them on all cores. It writes the rows in the order of the
records, holds some of them out, and prints a report.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import sys
from array import array
from collections import Counter
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nano import config, records, tasks, tokenizer
from nano.chat import NotFollowed
from nano.config import UserError, refuse
from nano.files import refuse_overwrite
from nano.records import BadRecord
from nano.store import Store, Writer, check_target, read_meta
from prepare.fields import Drop, message, names_in

RUN = 1024  # rows that are copied into a split at once
REASONS = 12  # reasons of dropped records that are shown


@dataclass
class Unit:
    """The rows of a record."""

    rows: list  # [(ids (T,), mask (T,) bytes), ...]: one row, or ranked completions, best first
    key: object  # ids whose hash decides whether the rows are held out: equal keys are in one split
    counts: dict  # {name: number} of anything else that is to be summed over all records
    record: bytes = b""  # a line of JSON that is kept beside the row


# ------------------------------------------------------------- records -> rows, in a worker process

job = SimpleNamespace()  # cfg, encode, template and tok of this process; `setup` fills it


def setup(cfg, encode, template):
    """Prepares this process for encode_chunk. `template` goes to tokenizer.load. Returns tok."""
    job.cfg = cfg
    job.encode = encode
    job.template = template
    job.tok = tokenizer.load(cfg.model, template=template, options=cfg.template_options)
    job.tok.empty_thoughts = cfg.learn_empty_thoughts
    return job.tok


def render(tok, messages, last_only=False, tools=None):
    """(ids (T,), mask (T,) bytes) of a conversation. BadRecord where it is none, and Drop where the
    template cannot lay it out.

    Behind a last answer that is a target they end with it, because nothing is learned from what
    follows. A conversation that awaits an answer ends with the prompt for it.
    """
    awaits = messages[-1]["role"] != "assistant"
    layout = dict(add_generation_prompt=awaits, last_only=last_only)
    try:
        ids, mask = tok.render(messages, **layout, tools=tools)
        if tools and ids == tok.render(messages, **layout)[0]:
            raise Drop("the chat template leaves out the definitions of tools")
    except NotFollowed as e:
        raise Drop(e.reason) from None
    except UserError as e:
        raise BadRecord(str(e)) from None
    if awaits or messages[-1].get("weight") == 0:
        return array("I", ids), bytes(mask)
    return to_last_target(ids, mask)


def to_last_target(ids, mask):
    """The row as arrays up to its last target, because nothing is learned from what follows it."""
    mask = bytes(mask)
    end = mask.rfind(1) + 1
    return array("I", ids[:end]), mask[:end]


def encode_chunk(chunk):
    """What the records of a chunk become: U units of N rows.

    .tokens, .mask     of all rows, one after another
    .lengths (N,)      of the rows, in tokens
    .sizes (U,)        of the units, in rows
    .hashes (U,)       of their keys
    .records (U,)      what is kept of the records
    .counts            Counter of the counts of `encode`
    .closed            Counter of answers to which the end of the turn was added, by that token
    .dropped           Counter of the records without rows, by reason
    .unwritten         [(reason, ids, mask)] of some of them that were rendered
    .ignored           set of the names in cfg.ignore that the records have
    .bad               "file:line: reason" of each record that cannot be used
    """
    name, items = chunk
    part = SimpleNamespace(
        tokens=array("I"),
        mask=bytearray(),
        lengths=[],
        sizes=array("I"),
        hashes=array("Q"),
        records=[],
        counts=Counter(),
        closed=Counter(),
        dropped=Counter(),
        unwritten=[],
        ignored=set(),
        bad=[],
    )
    seed = job.cfg.seed.to_bytes(8, "little", signed=True)
    task = named(job.cfg.source).task
    by_task = task and not task.is_set  # its records may be told apart by their files
    for line, raw in items:
        try:
            record = records.parse(raw)
            if by_task:
                record = {"file": Path(name).stem} | record
            if job.cfg.ignore:
                part.ignored |= names_in(record, job.cfg.ignore)
            unit = job.encode(job.cfg, job.tok, record)
        except Drop as e:
            part.dropped[str(e)] += 1
            if e.row and len(part.unwritten) < job.cfg.show:
                part.unwritten.append((str(e), *e.row))
        except BadRecord as e:
            part.bad.append(f"{name}:{line}: {shorten(str(e))}")
        else:
            digest = hashlib.blake2b(unit.key, digest_size=8, key=seed).digest()
            part.hashes.append(int.from_bytes(digest, "little"))
            part.sizes.append(len(unit.rows))
            part.records.append(unit.record)
            for what, number in unit.counts.items():
                part.counts[what] += number
            if job.tok.counts:
                part.closed.update(job.tok.counts)
                job.tok.counts.clear()
            for ids, mask in unit.rows:
                part.tokens += ids
                part.mask += mask
                part.lengths.append(len(ids))
    return part


def shorten(reason, limit=400):
    """A message that stays a sentence where a record's content is part of it."""
    return reason if len(reason) <= limit else f"{reason[:limit]} ..."


# --------------------------------------------------------------------------------------- the source


@functools.cache
def named(source):
    """What the name of a task or of a training set (tasks/) stands for.

    .task       a Task, or None where `source` is no such name
    .messages   the messages of a row, or None where its shape is to be recognised
    .ignore, .last_only   fields that may be lost, whether the last answer alone is a target
    """
    if tasks.name_of(source) not in tasks.names():
        return SimpleNamespace(task=None, messages=None, ignore=(), last_only=False)
    task = tasks.load(source)
    return SimpleNamespace(
        task=task,
        messages=None if task.is_set and not hasattr(task.module, "turns") else task.conversation,
        ignore=getattr(task.module, "IGNORE", ()),
        last_only=getattr(task.module, "LAST_ONLY", False),
    )


def find(cfg, ranked=False):
    """(the files of the source or None, what read_hub takes of it), as `fill` needs them.

    ranked: the script is prepare.preferences. UserError where the source is neither a file nor a
    folder, nor may be an id of the hub, and for a training set of the other script.
    """
    known = named(cfg.source)
    if known.task and getattr(known.task.module, "RANKED", False) != ranked:
        script = "instructions" if ranked else "preferences"
        raise UserError(f"source={cfg.source} is for python -m prepare.{script}")
    if cfg.path and not known.task:
        raise UserError(
            f"path= goes with the name of a task or set ({', '.join(tasks.names())}), and "
            f"source={cfg.source} is none"
        )
    path = cfg.path or cfg.source
    by_name = known.task and not cfg.path
    hub = known.task.source_of(cfg.split) if by_name else (cfg.source, [cfg.subset], cfg.split)
    files = None if by_name else records.find_files(path, cfg.out, cfg.split)
    if files == [Path(path)]:
        refuse(cfg, "split", f"with {path}, a single file", "path=" if cfg.path else "source=")
    if known.task or files:
        refuse(cfg, "subset", f"with source={cfg.source}, which is no hub id", "source=")
    if by_name and hub[2] is None:  # a program writes its rows
        return None, hub
    # org/name is an id of the hub, unless it looks like a mistyped path
    is_path = records.suffix(Path(hub[0])) in records.SUFFIXES or Path(hub[0]).parent.exists()
    if not files and (cfg.path or is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub[0])):
        near = config.nearest(cfg.source, tasks.names())
        hint = f"known sets are {', '.join(tasks.names())}"
        hint = f"did you mean '{near}'?" if near and not known.task else hint
        raise UserError(f"there is no file or folder {path}; {hint}")
    return files, hub


# ------------------------------------------------------------------------------------ the whole job


def start(cfg, encode, template):
    """(tokenizer, Writer of the prepared folder). A script may add to .meta of the Writer."""
    refuse_overwrite([cfg.out], [cfg.source, cfg.model])
    check_target(cfg.out)
    tok = setup(cfg, encode, template)
    if cfg.learn_empty_thoughts and tok.layout and not prints_empty_thoughts(tok):
        refuse(cfg, "learn_empty_thoughts", "with a template that prints no thought", "template=")
    meta = dict(tokenizer=tok.fingerprint, tokenizer_identity=tok.identity)
    meta |= dict(template=tok.template, chat_template=tok.chat_template)
    meta |= dict(source=cfg.source, model=cfg.model, seed=cfg.seed)
    return tok, Writer(cfg.out, tok.vocab_size, meta)


def prints_empty_thoughts(tok):
    """Whether the chat template may print an empty thought: it does, or its text is about them."""
    trial = [message("user", "a"), message("assistant", "b")]
    masks = []
    for learned in (False, True):
        tok.empty_thoughts = learned
        with contextlib.suppress(NotFollowed):
            masks.append(tok.render(trial)[1])
    tok.counts.clear()  # these are no records
    return masks[:1] != masks[1:] or "think" in (tok.chat_template or "")


def fill(cfg, writer, unit, files, hub):
    """Writes the units that cfg.val asks for into the split val, and the others into train.

    unit: "group" where the rows of a record are a group, else "row". files: the paths to read, or
    None for records.read_hub(*hub), or for the rows that a task writes, where the split is None.
    Returns .rows, their number; .sizes, .hashes and .ignored as encode_chunk does; .counts and
    .dropped as dicts, largest number first; .bad, a dict for meta.json.
    Raises UserError for a bad record under on_error=stop, and where there is no unit.
    """
    if cfg.val == "0" and unit == "row":
        return fill_split(cfg, writer, "train", unit, files, hub)
    # the hashes of all units decide which ones are held out, so all rows are copied a second time
    with Writer(writer.tmp / "all", writer.vocab_size) as every:
        total = fill_split(cfg, every, "all", unit, files, hub)
    held_out = records.held_out(np.asarray(total.hashes), cfg.val)
    store = Store(writer.tmp / "all", "all")
    first_rows = np.insert(np.cumsum(total.sizes, dtype=np.int64), 0, 0)  # (U + 1,)
    edges = np.arange(len(held_out) + 1)
    if unit == "row":  # copy neighbours that go into one split together
        changes = np.flatnonzero(np.diff(held_out)) + 1
        edges = np.union1d(changes, [*edges[::RUN], edges[-1]])
    for a, b in pairwise(edges):
        rows = slice(first_rows[a], first_rows[b])
        span = slice(store.offsets[rows.start], store.offsets[rows.stop])
        split = "val" if held_out[a] else "train"
        kept = []
        if store.records is not None:
            kept = [store.line(i) for i in range(rows.start, rows.stop)]
        writer.extend(split, store.tokens[span], store.mask[span], store.lengths[rows], kept)
        if unit == "group":
            writer.end_group(split)
    shutil.rmtree(writer.tmp / "all")
    return total


def fill_split(cfg, writer, split, unit, files, hub):
    """Writes all rows into one split, without groups; returns and raises what `fill` does."""
    size = sum(f.stat().st_size for f in files) if files else None
    workers = cfg.workers or (records.cores() if size is None or size > 4e6 else 1)
    total = SimpleNamespace(rows=0, sizes=array("I"), hashes=array("Q"), ignored=set())
    counts, closed, dropped, bad, unwritten = Counter(), Counter(), Counter(), [], []
    with records.progress(size, "B" if files else f" {unit}s") as bar:
        if files:
            sources = ((f, records.read_file(f, bar)) for f in files)
        elif hub[2] is None:
            sources = [(hub[0], enumerate(tasks.load(hub[0]).rows(cfg.split == "train"), 1))]
        else:
            name, configurations, of = hub
            sources = (
                (f"{name}/{part}" if part else name, records.read_hub(name, [part], of))
                for part in configurations
            )
        settings = (cfg, job.encode, job.template)
        chunks = records.chunks(sources)
        parts = records.ordered_map(encode_chunk, chunks, workers, setup, settings)
        with contextlib.closing(parts):
            for part in parts:
                show(part, max(cfg.show - len(total.sizes), 0))
                if part.bad and cfg.on_error == "stop":
                    raise UserError(
                        f"{part.bad[0]}; mend it, or skip and count such records with on_error=skip"
                    )
                writer.extend(split, part.tokens, part.mask, part.lengths, part.records)
                total.rows += len(part.lengths)
                total.sizes += part.sizes
                total.hashes += part.hashes
                total.ignored |= part.ignored
                counts += part.counts
                closed += part.closed
                dropped += part.dropped
                bad += part.bad
                unwritten += part.unwritten[: max(cfg.show - len(unwritten), 0)]
                if not files:
                    bar.update(len(part.sizes))
    if not total.sizes:
        for reason, ids, mask in unwritten:
            print(f"dropped, {reason}:")
            show_row(ids, mask)
        why = [f"{n} dropped: {shorten(reason)}" for reason, n in dropped.most_common(3)]
        why += [f"{len(dropped) - 3} reasons more"] if len(dropped) > 3 else []
        why += [f"{len(bad)} bad, the first is {bad[0]}"] if bad else []
        reasons = "; ".join(why) or "it holds no record"
        raise UserError(f"{cfg.source} gives no {unit} ({reasons})")
    total.counts = dict(counts.most_common())
    total.closed = dict(closed.most_common())
    total.dropped = dict(dropped.most_common())
    total.bad = dict(bad_records=len(bad), first_bad=bad[:20])
    return total


def show(part, count):
    """Prints the rows of the first `count` units of a chunk."""
    a = 0
    for length in part.lengths[: sum(part.sizes[:count])]:
        show_row(part.tokens[a : a + length], part.mask[a : a + length])
        a += length


def show_row(ids, mask):
    """Prints a row. Targets are green on a terminal, and in «» elsewhere or if NO_COLOR is set."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    on, off = ("\033[32m", "\033[0m") if colours else ("«", "»")
    for target, run in groupby(zip(ids, mask, strict=True), key=itemgetter(1)):
        piece = job.tok.decode([token for token, _ in run], skip_special=False)
        print(f"{on}{piece}{off}" if target else piece, end="")
    print("\n" + "-" * 80)


def report(cfg, unit, total, each, after_kept=(), before_tokens=()):
    """Prints a table of lines (name, number, note).

    total: what `fill` returned. each: what follows the mean length of a row. The last two are
    lines of the script.
    """
    meta = read_meta(cfg.out)
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    targets = sum(split["target_tokens"] for split in meta["splits"].values())
    kept, bad = len(total.sizes), total.bad["bad_records"]
    reasons = [(n, shorten(reason)) for reason, n in total.dropped.items()]
    if len(reasons) > REASONS:
        rest = sum(n for n, _ in reasons[REASONS:])
        reasons = [*reasons[:REASONS], (rest, f"{len(reasons) - REASONS} reasons more")]
    splits = [f"{name} {split[f'{unit}s']:,}" for name, split in meta["splits"].items()]
    table = [
        ("records read", kept + sum(total.dropped.values()) + bad, ""),
        (f"{unit}s kept", kept, ", ".join(splits)),
        *after_kept,
        *((f"{unit}s dropped", n, reason) for n, reason in reasons),
        *(("bad records", bad, f"skipped; the first: {e}") for e in total.bad["first_bad"][:1]),
        *(
            ("fields ignored", 0, f"no record has a field '{name}'")
            for name in cfg.ignore
            if name not in total.ignored
        ),
        *before_tokens,
        *(
            ("answers closed", n, f"with {stop}, which the template leaves out at the end")
            for stop, n in total.closed.items()
        ),
        ("tokens", tokens, f"{tokens / total.rows:.1f} {each}"),
        ("target tokens", targets, f"{targets / tokens:.1%} of all"),
    ]
    template = meta["template"]
    print(f"{cfg.out}: {cfg.source} for the tokenizer of {cfg.model}, template {template}")
    for name, n, note in table:
        print(f"  {name:<16}{n:>14,}  {note}".rstrip())
