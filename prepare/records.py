"""Records of JSON arrays, JSONL, CSV, TSV and Parquet files (.gz too), of folders and of the hub.

Files are streamed in bounded memory. All cores work on the records, which keep their order. The
choice of the rows to hold out is here too.

A reader yields (line, raw): `raw` is a line of JSONL as bytes, a record (dict) or a BadRecord.
`parse` makes a record of it in the worker. Parquet and the hub count rows instead of lines.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import logging
import os
import re
import signal
import sys
import threading
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nano.config import UserError
from nano.store import parse_share

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
# bytes of one record; a longer one is a quote that never closes, or a file of another format
MAX_RECORD = 1 << 26
BLOCK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
BOM = b"\xef\xbb\xbf"


class BadRecord(Exception):
    """One record that cannot be used; the text is the reason."""


def suffix(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_below(path, suffixes, outputs):
    """The files of these formats in a folder, sorted.

    Files in hidden folders are left out, and those below `outputs`, a set of resolved folders.
    Raises UserError where there is none.
    """
    files = []
    for p in path.rglob("*"):
        hidden = any(part.startswith(".") for part in p.relative_to(path).parts)
        if p.is_file() and suffix(p) in suffixes and not hidden:
            if outputs.isdisjoint(p.resolve().parents):
                files.append(p)
    if not files:
        raise UserError(f"folder {path} holds no {', '.join(suffixes)} file")
    return sorted(files)


def find_files(source, out):
    """The files of a file or folder `source`, without those below `out`; None if it is neither."""
    path = Path(source)
    if path.is_dir():
        return files_below(path, SUFFIXES, {Path(out).resolve()})
    if path.exists() and suffix(path) not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell its format, the name must end in {', '.join(SUFFIXES)}, "
            "or these and .gz"
        )
    return [path] if path.exists() else None


def parse(raw):
    """The record (dict) of what a reader yields; BadRecord when there is none."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise BadRecord(
                f"not UTF-8 (byte 0x{e.object[e.start]:02x} in column {e.start + 1})"
            ) from None
        except json.JSONDecodeError as e:
            raise BadRecord(f"not valid JSON ({e.msg} in column {e.colno})") from None
        except ValueError:  # Python reads no integer of over 4,300 digits
            raise BadRecord("not valid JSON (a number of thousands of digits)") from None
        except RecursionError:
            raise BadRecord("not valid JSON (nested too deeply)") from None
    if isinstance(raw, BadRecord):
        raise raw
    if not isinstance(raw, dict):
        raise BadRecord(f"a JSON {type(raw).__name__} and not an object")
    return raw


def read_lines(f, name):
    line = 0
    while raw := f.readline(MAX_RECORD):
        line += 1
        if len(raw) == MAX_RECORD:
            raise UserError(
                f"{name}:{line}: a line of over {MAX_RECORD >> 20} MB; "
                "JSONL has one record on each line"
            )
        if line == 1:
            raw = raw.removeprefix(BOM)
        if raw := raw.strip():
            yield line, raw


def read_array(f, name):
    """(line, element) of a JSON array; one block of the file and one element are in memory."""
    scan = json.JSONDecoder().raw_decode
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    text = ""  # the buffer
    at = 0  # text[at:] is not read yet
    line = 1  # of text[at]

    def fill():
        nonlocal text, at
        raw = f.read(max(BLOCK, len(text) - at))
        try:
            text = text[at:] + decode(raw, not raw)
            at = 0
        except UnicodeDecodeError as e:
            bad = line + text.count("\n", at) + e.object.count(b"\n", 0, e.start)
            raise UserError(
                f"{name}:{bad}: not UTF-8 (byte 0x{e.object[e.start]:02x}): convert the file"
            ) from None
        return raw

    def move(end):
        nonlocal at, line
        line += text.count("\n", at, end)
        at = end

    def next_char():
        while True:
            move(SPACE.match(text, at).end())
            if at < len(text) or not fill():
                return text[at : at + 1]

    def broken(what, where):
        raise UserError(
            f"{name}:{where}: not valid JSON ({what}): mend it; "
            "only in JSONL can a record be skipped"
        )

    next_char()
    at += 1  # behind the opening bracket
    more = next_char() != "]"
    if not more:
        at += 1
    while more:
        next_char()
        start = line
        while True:
            try:
                element, end = scan(text, at)
                break
            except json.JSONDecodeError as e:
                # an element may go on behind the buffer: then it fails near the end of the buffer,
                # or in a string that stays open
                cut_off = e.msg.startswith("Unterminated string") or e.pos > len(text) - 16
                if not cut_off or len(text) - at > MAX_RECORD or not fill():
                    broken(e.msg, start + text.count("\n", at, e.pos))
            except ValueError:
                broken("a number of thousands of digits", start)
            except RecursionError:
                broken("nested too deeply", start)
        move(end)
        yield start, element
        more = next_char() == ","
        if not more and next_char() != "]":
            broken("no comma or closing bracket after a record", line)
        at += 1
    if next_char():
        broken("something follows the closing bracket", line)


def read_table(f, name, delimiter):
    """(line, record) of a CSV or TSV file; the first row names the fields."""
    csv.field_size_limit(MAX_RECORD)
    text = io.TextIOWrapper(f, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
    except csv.Error as e:
        raise UserError(
            f"{name}:1: the names of the columns are not valid CSV ({e}): mend the file"
        ) from None
    check_names(header, f"{name}:1")
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            # an open quote takes in the rows that follow, and skipping it would lose them
            if "unexpected end" in str(e) or "field limit" in str(e):
                raise UserError(
                    f"{name}:{line}: a quote opens in this row and never closes: mend the file"
                ) from None
            yield line, BadRecord(f"not valid CSV ({e})")
            continue
        if not row:  # an empty line
            continue
        if len(row) != len(header):
            yield line, BadRecord(f"{len(row)} columns, the header has {len(header)}")
        elif re.search(r"[\udc80-\udcff]", "".join(row)):  # what surrogateescape makes of a byte
            yield line, BadRecord("not UTF-8")
        else:
            yield line, dict(zip(header, row, strict=True))


def check_names(names, where):
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise UserError(f"{where}: two columns are called '{min(twice)}': rename one")


def read_parquet(path, bar, field=None):
    """(row, record) of a Parquet file. field: the only column to read."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        check_names(names, path)
        if field and field not in names:
            raise UserError(
                f"{path} has no column '{field}': give text_field= one of {', '.join(names)}"
            )
        row = 0
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(256, columns=[field] if field else None):
            yield from enumerate(batch.to_pylist(), row + 1)
            row += len(batch)
            bar.update(size * len(batch))
    except pyarrow.ArrowException as e:
        raise UserError(
            f"{path} is not a readable Parquet file: {str(e).splitlines()[0]}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path} holds text that is not UTF-8: write it anew, or store the column as binary"
        ) from None


def read_hub(name, subsets, split):
    """(row, record) of the configurations `subsets` of a dataset on the hub, streamed."""
    import datasets

    # its warnings about retries say no more than the last error, which is reported below
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for subset in subsets:
            rows = datasets.load_dataset(name, subset, split=split, streaming=True)
            yield from enumerate(rows, 1)
    except Exception as e:  # the errors of the hub's client have no common type
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(
            f"there is no file or folder {name}, and the hub does not give it: {reason}"
        ) from e


def read_file(path, bar):
    """(line, raw) of every record in a file; `bar` moves with the bytes read."""
    if suffix(path) == ".parquet":
        yield from read_parquet(path, bar)
        return
    with open_file(path) as (f, on_disk):
        first = f.read(BLOCK).removeprefix(BOM).lstrip()[:1]
        f.seek(0)
        if suffix(path) == ".csv":
            items = read_table(f, path, ",")
        elif suffix(path) == ".tsv":
            items = read_table(f, path, "\t")
        elif first == b"[":
            items = read_array(f, path)
        else:
            items = read_lines(f, path)
        done = 0
        for i, item in enumerate(items):
            if i % 256 == 0:
                bar.update(on_disk.tell() - done)
                done = on_disk.tell()
            yield item
        bar.update(path.stat().st_size - done)


@contextlib.contextmanager
def open_file(path):
    """(the file, decompressed if it is .gz; the file on disk). UserError if it cannot be read."""
    try:
        with open(path, "rb") as on_disk:
            if path.suffix.lower() == ".gz":
                yield gzip.open(on_disk), on_disk
            else:
                yield on_disk, on_disk
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file: {e}") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied") from None


def size(raw):
    """The bytes that a reader's `raw` takes, roughly."""
    if isinstance(raw, (str, bytes)):
        return len(raw)
    if isinstance(raw, dict):
        raw = raw.values()
    elif not isinstance(raw, list):
        return 16
    return 16 + sum(map(size, raw))


def chunks(sources):
    """(name, [(line, raw), ...]) of up to 256 records or about 1 MB.

    sources: (name, iterator of (line, raw)) pairs.
    """
    for name, items in sources:
        chunk = []
        total = 0
        for line, raw in items:
            chunk.append((line, raw))
            total += size(raw)
            if len(chunk) == 256 or total > BLOCK:
                yield name, chunk
                chunk = []
                total = 0
        if chunk:
            yield name, chunk


def progress(total, unit):
    """A bar for a terminal; for a log file a line now and then."""
    wait = 0.2 if sys.stderr.isatty() else 20
    return tqdm(total=total, unit=unit, unit_scale=True, delay=wait, mininterval=wait, leave=False)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker(setup, args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    threading.Thread(target=follow, daemon=True).start()
    setup(*args)


def follow():
    """Ends this process when the main one has been killed: it would wait for work forever."""
    parent_process().join()
    os._exit(1)


def ordered_map(work, items, workers, setup, args):
    """work(item) of every item, in order, on `workers` processes. Each calls setup(*args) first.

    workers=1 is this process, which has called it. At most eight items a worker are under way, so
    that a fast reader does not fill the memory. Raises UserError when a worker process dies.
    """
    if workers == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (setup, args)) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == 8 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, most likely for want of memory: try again with workers=1"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def held_out(hashes, val):
    """Which rows to hold out, (N,) bool: exactly `val` of them ("100", "5%", "0.05").

    They are chosen by `hashes` (N,) of their content: a row's place does not matter, and copies of
    a row are all held out or all kept. Raises UserError where that cannot be.
    """
    count = parse_share(val, len(hashes), "val")
    if count >= len(hashes):
        raise UserError(f"val={val} leaves none of the {len(hashes)} rows to train on")
    chosen = []
    left = count
    for value, copies in zip(*np.unique(hashes, return_counts=True), strict=True):
        if not left:
            break
        if copies <= left:
            chosen.append(value)
            left -= int(copies)
    if left:
        raise UserError(
            f"val={val}: too many rows are copies of one another to hold out {count} "
            "that train has not"
        )
    return np.isin(hashes, chosen)
