"""Records of JSON, JSONL, CSV, TSV, Parquet and Arrow files (.gz too), of folders and of the hub.

JSON is an array of records, a record after another, pretty-printed or not, an object that holds the
records ({"data": [...]}), or an object of columns ({"prompt": [...], "completion": [...]}).

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
import itertools
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
from nano.files import read_json
from nano.store import parse_share

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
# what a file is called for its split, such as train-00000-of-00002.parquet or data/test.jsonl
SPLITS = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?:ation)?(?=[-_./]|$)")
ROWS = ("data", "rows", "records", "examples", "instances", "train")  # keys of a list of records
# bytes of one record; a longer one is a quote that never closes, or a file of another format
MAX_RECORD = 1 << 26
BLOCK = 1 << 20
SPACE = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a character in JSON, alone or beside the other
BOM = b"\xef\xbb\xbf"


class BadRecord(Exception):
    """One record that cannot be used; the text is the reason."""


def once(pairs):
    """The dict of a JSON object's pairs; BadRecord where it has a key twice, since one is lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRecord(f"the key '{twice:.40}' is given twice")
    return record


DECODER = json.JSONDecoder(object_pairs_hook=once)


def check_characters(value):
    """BadRecord where a text of a JSON value holds half a character, which is no Unicode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(e.object[e.start]):04x}"
        raise BadRecord(f"text that is no Unicode ({half} without its other half)") from None


def suffix(path):
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_below(path, suffixes, outputs, split="train"):
    """The files of these formats in a folder, sorted, or those of datasets.save_to_disk.

    Files in hidden folders are left out, and those below `outputs`, a set of resolved folders. Of a
    folder that holds several splits by the names of its files, only `split` is read. What is read
    is printed. Raises UserError where there is none.
    """
    files = saved_files(path, split)
    if files is None:
        files = []
        for p in path.rglob("*"):
            hidden = any(part.startswith(".") for part in p.relative_to(path).parts)
            if p.is_file() and suffix(p) in suffixes and not hidden:
                if outputs.isdisjoint(p.resolve().parents):
                    files.append(p)
        if not files:
            raise UserError(f"folder {path} holds no {', '.join(suffixes)} file")
    splits = {f: SPLITS.findall(str(f.relative_to(path)).lower()) for f in files}
    chosen = [f for f in files if split in splits[f]]
    others = [f for f in files if splits[f] and f not in chosen] if chosen else []
    files = sorted(f for f in files if f not in others)
    if len(files) > 1 or others:
        names = ", ".join(str(f.relative_to(path)) for f in files)
        print(f"{path}: reads {len(files)} file{'s' * (len(files) > 1)}: {names:.200}")
    if others:
        names = ", ".join(str(f.relative_to(path)) for f in sorted(others))
        print(f"{path}: split={split} leaves out {names:.200}")
    return files


def find_files(source, out, split="train"):
    """The files of a file or folder `source`, without those below `out`; None if it is neither."""
    path = Path(source)
    if path.is_dir():
        return files_below(path, SUFFIXES, {Path(out).resolve()}, split)
    if path.exists() and suffix(path) not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell its format, the name must end in {', '.join(SUFFIXES)}, "
            "or these and .gz"
        )
    return [path] if path.exists() else None


def saved_files(path, split):
    """The files of a folder that datasets.save_to_disk wrote, or None for any other folder.

    A folder of several splits holds a folder for each.
    """
    if (path / "dataset_dict.json").is_file():
        if not (path / split).is_dir():
            splits = sorted(f.parent.name for f in path.glob("*/state.json"))
            raise UserError(
                f"{path} has no split '{split}': give split= one of {', '.join(splits)}"
            )
        path = path / split
    if not (path / "state.json").is_file() or not (path / "dataset_info.json").is_file():
        return None
    state = read_json(path / "state.json")
    files = [path / str(f.get("filename")) for f in state.get("_data_files") or ()]
    missing = [f for f in files if not f.is_file()]
    if missing or not files or state.get("_indices_data_files"):
        raise UserError(f"{path} is no whole folder of datasets.save_to_disk: write it again")
    return files


def parse(raw):
    """The record (dict) of what a reader yields; BadRecord when there is none."""
    if isinstance(raw, bytes):
        try:
            text = raw.decode("utf-8")
            raw = DECODER.decode(text)
            if "\\u" in text and SURROGATE.search(text):
                check_characters(raw)
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


def read_array(f, name, brackets=True):
    """(line, element) of a JSON array; one block of the file and one element are in memory.

    Without brackets the elements stand one after another, with white space or nothing between them.
    """
    lenient = json.JSONDecoder()
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

    def scan(text, at):
        try:
            element, end = DECODER.raw_decode(text, at)
        except BadRecord as e:
            return e, lenient.raw_decode(text, at)[1]
        if text.find("\\u", at, end) >= 0 and SURROGATE.search(text, at, end):
            try:
                check_characters(element)
            except BadRecord as e:
                element = e
        return element, end

    def broken(what, where):
        raise UserError(
            f"{name}:{where}: not valid JSON ({what}): mend it; "
            "only in JSONL can a record be skipped"
        )

    next_char()
    at += brackets  # behind the opening one
    more = next_char() != "]" if brackets else True
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
        if not brackets:
            more = next_char() != ""
            continue
        more = next_char() == ","
        if not more and next_char() != "]":
            broken("no comma or closing bracket after a record", line)
        at += 1
    if next_char():
        broken("something follows the closing bracket", line)


def read_objects(f, name):
    """(line, record) of a file that begins with an object.

    Each line is a record, or the file is one object or several over many lines. A file of a single
    object may hold the records in it.
    """
    first = f.readline(MAX_RECORD).removeprefix(BOM)
    second = f.readline(MAX_RECORD).strip() if len(first) < MAX_RECORD else b""
    f.seek(0)
    try:
        whole = json.loads(first)
    except (ValueError, RecursionError):
        whole = None
    over_lines = whole is None and first.strip().endswith((b"{", b"[", b",", b":"))
    if not over_lines and (whole is None or second):
        yield from read_lines(f, name)  # a mistake in a line is its own
        return
    items = read_array(f, name, brackets=False)
    head = [*itertools.islice(items, 2)]
    if len(head) == 1 and (table := rows_of(head[0][1], name)) is not None:
        yield from enumerate(table, 1)
        return
    yield from head
    yield from items


def rows_of(value, name):
    """The records that a single object holds, or None where it is a record itself."""
    if not isinstance(value, dict):
        return None
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows]
    lists = [key for key in lists if all(isinstance(row, dict) for row in value[key])]
    if rows := [key for key in lists if key in ROWS]:
        if len(lists) > 1:
            raise UserError(
                f"{name} is one object with several lists of records ({', '.join(lists):.100}): "
                "write the one to read into a file of its own"
            )
        return value[rows[0]]
    columns = [*value.values()]
    if not columns or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return None
    # a record may have messages in lists of equal length; the columns of a table hold no messages
    if any(isinstance(x, dict) and {"role", "from"} & x.keys() for c in columns for x in c):
        return None
    if len(columns) == 1 and not all(isinstance(x, (str, list)) for x in columns[0]):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


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
            yield from enumerate(to_records(batch), row + 1)
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


def read_arrow(path, bar):
    """(row, record) of an Arrow file, as datasets.save_to_disk writes it."""
    import pyarrow

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in pyarrow.ipc.open_stream(source):
                for start in range(0, len(batch), 256):
                    part = batch.slice(start, 256)
                    yield from enumerate(to_records(part), row + 1)
                    row += len(part)
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not a readable Arrow file: {str(e).splitlines()[0]}") from None
    bar.update(path.stat().st_size)


def to_records(batch):
    """The rows of an Arrow batch as dicts.

    A value that Python has no form for, such as a date beyond the year 9999, becomes text.
    """
    import pyarrow

    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except UnicodeDecodeError:
            raise
        except (ValueError, OverflowError, pyarrow.ArrowException):
            try:
                columns.append(column.cast(pyarrow.string()).to_pylist())
            except (ValueError, pyarrow.ArrowException):
                columns.append([f"<a value of '{name}' that cannot be read>"] * len(column))
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def read_hub(name, subsets, split):
    """(row, record) of the configurations `subsets` of a dataset on the hub, streamed.

    One that ends with / is a folder of it."""
    import datasets

    # its warnings about retries say no more than the last error, which is reported below
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for subset in subsets:
            folder = dict(data_dir=subset) if subset and subset.endswith("/") else {}
            subset = None if folder else subset
            rows = datasets.load_dataset(name, subset, split=split, streaming=True, **folder)
            yield from enumerate(rows, 1)
    except Exception as e:  # the errors of the hub's client have no common type
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(
            f"there is no file or folder {name}, and the hub does not give it: {reason}"
        ) from e


def read_file(path, bar):
    """(line, raw) of every record in a file; `bar` moves with the bytes read."""
    if suffix(path) in (".parquet", ".arrow"):
        yield from (read_parquet if suffix(path) == ".parquet" else read_arrow)(path, bar)
        return
    with open_file(path) as (f, on_disk):
        head = f.read(BLOCK)
        if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in head[:4]:
            raise UserError(f"{path} is UTF-16 or UTF-32 text: convert it to UTF-8 (iconv does)")
        first = head.removeprefix(BOM).lstrip()[:1]
        f.seek(0)
        if suffix(path) == ".csv":
            names = head.partition(b"\n")[0]
            semicolons = b";" in names and b"," not in names
            items = read_table(f, path, ";" if semicolons else ",")
        elif suffix(path) == ".tsv":
            items = read_table(f, path, "\t")
        elif first == b"[":
            items = read_array(f, path)
        elif first == b"{":
            items = read_objects(f, path)
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
    """Which rows to hold out, (N,) bool: `val` of them ("100", "5%", "0.05").

    They are chosen by the `hashes` (N,) of their prompts or texts, the smallest first: a row's
    place does not matter, and rows of equal hash are all held out or all kept. Where that leaves no
    way to hold out exactly `val`, it is the nearest number that can be had. UserError where none
    can.
    """
    count = parse_share(val, len(hashes), "val")
    if count >= len(hashes):
        raise UserError(f"val={val} leaves none of the {len(hashes)} rows to train on")
    values, copies = np.unique(hashes, return_counts=True)
    if count and len(values) < 2:
        raise UserError(
            f"val={val}: all rows have the same prompt or text, so none can be held out"
        )
    chosen = np.zeros(len(values), bool)
    left = count
    for i, size in enumerate(copies):
        if not left:
            break
        if size <= left:
            chosen[i] = True
            left -= int(size)
    if left:
        chosen = nearest_sum(copies, count)
    return np.isin(hashes, values[chosen])


def nearest_sum(sizes, count):
    """Which groups to take, (U,) bool, so that their sizes (U,) add up to a number near `count`.

    It is the nearest that at least one of them, and not all, can give."""
    kinds, numbers = np.unique(sizes, return_counts=True)
    limit = min(int(sizes.sum()) - 1, count + int(kinds[-1]))
    bits = (1 << (limit + 1)) - 1
    # bit r of sums[i] says whether the first i items, groups of one size, can add up to r
    items, sums = [], [1]
    for size, number in zip(kinds.tolist(), numbers.tolist(), strict=True):
        power = 1
        while number:
            taken = min(power, number)
            items.append((size, taken))
            sums.append((sums[-1] | sums[-1] << size * taken) & bits)
            number -= taken
            power *= 2
    can = (r for r in range(1, limit + 1) if sums[-1] >> r & 1)
    rest = min(can, key=lambda r: abs(r - count))
    take = dict.fromkeys(kinds.tolist(), 0)
    for i, (size, taken) in reversed([*enumerate(items)]):
        if not sums[i] >> rest & 1:
            take[size] += taken
            rest -= size * taken
    chosen = np.zeros(len(sizes), bool)
    for size, number in take.items():
        chosen[np.flatnonzero(sizes == size)[:number]] = True
    return chosen
