"""Plain text to a prepared data folder for pretraining.

    python -m prepare.text source=books/ tokenizer=models/smollm2 out=data/books val=0.01
    python -m prepare.text source=web.jsonl.gz tokenizer=train:8000 out=data/web
    python -m prepare.text source=stories.txt separator="<|endoftext|>" \\
        tokenizer=data/web/tokenizer out=data/stories
    python -m prepare.text source=HuggingFaceFW/fineweb-edu subset=sample-10BT max_mb=5000 \\
        tokenizer=... out=data/edu

`source` is one of these:

    .txt                              one document, or several with a separator between them
    .json .jsonl .csv .tsv .parquet   one document a record, in text_field
    a folder                          of such files
    a hub id                          streamed

All but Parquet may be gzipped (.gz). Documents are tokenized on all cores, and each ends with EOS.
A text of over 16 MB is split at the end of a line. The tokenizer is copied to OUT/tokenizer, so
pretrain.py needs no other.

Finished shards (64 MB of text each) lie in OUT.work. After an interruption the same command resumes
from them.
"""

import contextlib
import gzip
import hashlib
import heapq
import io
import json
import math
import re
import sys
import zlib
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import regex
import sentencepiece

from nano import config, files, records, tokenizer, vocab
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError
from nano.records import BadRecord
from nano.store import Writer, check_target, read_meta
from prepare.vocab import added_tokens_decoder, byte_level_json

SUFFIXES = (".txt", *records.SUFFIXES)
BLOCK = 1 << 22  # bytes of a text file that are read at once
LIMIT = 1 << 24  # bytes of the longest document
CHUNK = 1 << 20  # characters that a worker gets at once
SHARD = 1 << 26  # characters of a shard


@dataclass
class Config:
    # what
    source: PathText  # file, folder or hub id
    tokenizer: PathText  # directory, or train:8000 to train one of that many tokens on the source
    out: PathText  # the prepared folder; an earlier one there is replaced at the end
    text_field: str = "text"  # of records: the field that holds the text
    separator: str = ""  # between documents of .txt files (\n: line break); "": one document a file
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id, or of a folder whose files are named by splits
    max_mb: NonNegativeInt = 0  # stop after so many megabytes of the source; 0: all of it
    # a new tokenizer
    kind: Literal["sentencepiece", "bpe"] = "sentencepiece"  # what train: makes
    train_mb: PositiveInt = 200  # megabytes it is trained on, evenly spaced (hub: the first)
    # how
    val: str = "0.01"  # documents to hold out: a share such as 0.01 or 1%, or a number of them
    seed: Seed = 0  # of the choice of those documents
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used
    workers: NonNegativeInt = 0  # processes; 0: one a core, and one in all for small files


# --------------------------------------------------------------------------------------------------
# source -> documents


def find_files(cfg):
    """The files that cfg.source stands for, or None for a hub id. UserError for anything else."""
    path = Path(cfg.source)
    if path.is_dir():
        outputs = {Path(cfg.out).resolve(), work_folder(cfg)}
        return records.files_below(path, SUFFIXES, outputs, cfg.split)
    if not path.exists():
        if cfg.source.count("/") == 1 and records.suffix(path) not in SUFFIXES:
            return None
        raise UserError(f"there is no file or folder {path}")
    if records.suffix(path) not in SUFFIXES:
        raise UserError(
            f"{path}: cannot tell its format, "
            f"the name must end in {', '.join(SUFFIXES)}, or these and .gz"
        )
    return [path]


def read_text(path, separator, bar, counts):
    """Yields (line number, bytes) of each document of a text file, plain or gzipped.

    A document longer than LIMIT comes in pieces of whole lines, counted in counts. A line break in
    the separator matches a Windows line break too. UserError for a file that cannot be read.
    """
    line, held, more, done = 1, b"", True, 0
    border = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n"))
    try:
        with (
            open(path, "rb") as on_disk,
            gzip.open(on_disk) if path.suffix.lower() == ".gz" else on_disk as f,
        ):
            while more:
                more = f.read(BLOCK)
                held += more.removeprefix(records.BOM) if line == 1 and not held else more
                documents = border.split(held) if separator else [held]
                held = documents.pop() if more else b""
                for document in documents:
                    yield line, document
                    line += document.count(b"\n") + separator.count(b"\n")
                while len(held) > LIMIT:
                    cut = held.rfind(b"\n", 0, LIMIT - 2 * len(separator)) + 1 or LIMIT
                    while held[cut] & 0xC0 == 0x80 and cut > LIMIT - 4:  # the middle of a character
                        cut -= 1
                    yield line, held[:cut]
                    line, held = line + held.count(b"\n", 0, cut), held[cut:]
                    counts["documents cut"] += 1
                bar.update(on_disk.tell() - done)
                done = on_disk.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file: {e}") from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied") from None


def documents(cfg, paths, bar, counts):
    """Yields (where, plain, raw) of every document.

    where: file and line, for messages. raw: the bytes of the text if plain, otherwise what
    records.parse takes.
    """
    separator = cfg.separator.replace("\\n", "\n").encode()
    if paths is None:
        for line, record in records.read_hub(cfg.source, [cfg.subset], cfg.split):
            yield (
                f"{cfg.source}:{line}",
                False,
                {k: v for k, v in record.items() if k == cfg.text_field} or record,
            )
    for path in paths or ():
        plain = records.suffix(path) == ".txt"
        if plain:
            items = read_text(path, separator, bar, counts)
        elif records.suffix(path) == ".parquet":
            items = records.read_parquet(path, bar, cfg.text_field)
        else:
            items = records.read_file(path, bar)
        for line, raw in items:
            yield f"{path}:{line}", plain, raw


def chunks(cfg, paths, bar, counts):
    """Yields (size, documents) of about CHUNK characters each, until max_mb. size: characters."""
    chunk, size, left = [], 0, cfg.max_mb * 1e6 or math.inf
    for item in documents(cfg, paths, bar, counts):
        raw = item[2]
        text = raw.get(cfg.text_field) if isinstance(raw, dict) else raw
        chunk.append(item)
        size += len(text) if isinstance(text, (str, bytes)) else 0
        if size >= CHUNK or len(chunk) == 1 << 16:
            yield size, chunk
            if paths is None:
                bar.update(size)
            left -= size
            chunk, size = [], 0
            if left <= 0:
                return
    if chunk:
        yield size, chunk


def read(plain, raw, field):
    """The text of a document; BadRecord when there is none."""
    if plain:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            line = raw.count(b"\n", 0, e.start) + 1
            raise BadRecord(
                f"not UTF-8 (byte 0x{raw[e.start]:02x} in line {line} of the document)"
            ) from None
    record = records.parse(raw)
    value = record.get(field)
    if not isinstance(value, str):
        known = f"there are {', '.join(map(str, record))}" if record else "the record is empty"
        kind = type(value).__name__
        raise BadRecord(
            f"field '{field}' is {kind} and not text"
            if field in record
            else f"no field '{field}' ({known})"
        )
    return value


# --------------------------------------------------------------------------------------------------
# documents -> tokens

state = SimpleNamespace()  # of this worker process: cfg and tok


def setup(cfg, directory=None):
    """Prepares a worker process. directory: of the tokenizer, or None while it is trained."""
    state.cfg = cfg
    state.tok = directory and tokenizer.load(directory, template="plain")


def convert(chunk):
    """Tokenizes a chunk. Returns (size, tokens, lengths, sizes, hashes, empty, bad).

    size: characters of the chunk. tokens: uint16 or uint32, all documents in a row. lengths: tokens
    of each document. sizes: bytes of each document. hashes: uint64, of each document's tokens and
    the seed. empty: number of empty documents. bad: messages about bad records.
    """
    size, documents = chunk
    tok = state.tok
    key = state.cfg.seed.to_bytes(8, "little", signed=True)
    tokens = array("I")
    lengths = []
    sizes = []
    hashes = []
    empty = 0
    bad = []
    for where, plain, raw in documents:
        try:
            text = read(plain, raw, state.cfg.text_field)
        except BadRecord as e:
            bad.append(f"{where}: {e}")
            continue
        if not text or text.isspace():
            empty += 1
            continue
        row = array("I", tok.encode(text, bos=tok.bos_first, eos=True))
        tokens += row
        lengths.append(len(row))
        sizes.append(len(text) if text.isascii() else len(text.encode("utf-8", "replace")))
        hashes.append(
            int.from_bytes(hashlib.blake2b(row, digest_size=8, key=key).digest(), "little")
        )
    tokens = np.frombuffer(tokens, np.uint32).astype(
        np.uint16 if tok.vocab_size < 65536 else np.uint32
    )
    return (
        size,
        tokens,
        np.array(lengths, np.int64),
        np.array(sizes, np.int64),
        np.array(hashes, np.uint64),
        empty,
        bad,
    )


# --------------------------------------------------------------------------------------------------
# documents -> a new tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORD = 64  # bytes of the longest piece that merges are learned from
SENTENCE = 4096  # characters that sentencepiece gets at once


def count_words(chunk):
    """Counter of the pieces of text (bytes) inside which byte-level BPE merges."""
    find, words = regex.compile(vocab.DIGITS_GPT2).findall, Counter()
    for _, plain, raw in chunk[1]:
        with contextlib.suppress(BadRecord):  # the tokenizing pass reports it
            words.update(find(read(plain, raw, state.cfg.text_field)))
    return Counter(
        {
            raw: n
            for word, n in words.items()
            if 1 < len(raw := word.encode("utf-8", "replace")) <= WORD
        }
    )


def learn_merges(words, count):
    """Byte-pair merges: a list of up to `count` pairs of ids.

    words: {bytes: how often they occur}. Ids 0-255 are bytes, and 256 + i is the product of merge
    i. Each merge takes the most frequent pair; of equals the one with the smaller ids.
    Source: Sennrich et al. 2016 (arXiv:1508.07909). Each word is processed once and weighted with
    its count.
    """
    parts = [list(word) for word in words]
    times = list(words.values())
    pairs = Counter()
    places = defaultdict(set)
    for i, part in enumerate(parts):
        for pair in zip(part, part[1:], strict=False):
            pairs[pair] += times[i]
            places[pair].add(i)
    # A count in the queue may be too high, since it is not updated when the pair gets rarer. It is
    # corrected when the pair comes up.
    queue = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(queue)
    merges = []
    tokens = [bytes([b]) for b in range(256)]
    known = set()
    while queue and len(merges) < count:
        n, pair = heapq.heappop(queue)
        if pairs[pair] != -n:
            if 0 < pairs[pair] < -n:
                heapq.heappush(queue, (-pairs[pair], pair))
            continue
        product = tokens[pair[0]] + tokens[pair[1]]
        if product in known:  # an overlap: a+aa beside aa+a. A token is the product of one merge
            continue
        new = 256 + len(merges)
        merges.append(pair)
        tokens.append(product)
        known.add(product)
        a, b = pair
        change = defaultdict(int)
        for i in places.pop(pair):
            part, n, at = parts[i], times[i], 0
            while at < len(part) - 1:
                if part[at] == a and part[at + 1] == b:
                    part[at : at + 2] = [new]
                    if at:
                        before = part[at - 1]
                        change[before, a] -= n
                        change[before, new] += n
                        places[before, new].add(i)
                    if at + 1 < len(part):
                        after = part[at + 1]
                        change[b, after] -= n
                        change[new, after] += n
                        places[new, after].add(i)
                at += 1
        pairs[pair] = 0
        for changed, n in change.items():
            pairs[changed] += n
            if n > 0:
                heapq.heappush(queue, (-pairs[changed], changed))
    return merges


def byte_level_bpe(words, size):
    """{file name: content} of a Hugging Face byte-level BPE of `size` tokens.

    words: {bytes: how often they occur}. UserError where they hold fewer tokens.
    """
    specials = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    merges = learn_merges(words, size - len(specials) - 256)
    if len(specials) + 256 + len(merges) < size:
        raise UserError(
            f"the text has no more than {len(specials) + 256 + len(merges)} tokens to learn, "
            f"not {size}: ask for less"
        )
    tokens = [vocab.BYTE_CHAR[b] for b in range(256)]
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    spec = byte_level_json(
        {token: i for i, token in enumerate([*specials, *tokens])},
        [f"{tokens[a]} {tokens[b]}" for a, b in merges],
        [vocab.added_token(i, name) for i, name in enumerate(specials)],
        vocab.DIGITS_GPT2,
    )
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=specials[0],
        eos_token=specials[0],
        pad_token=specials[1],
    )
    return {"tokenizer.json": spec, "tokenizer_config.json": settings | dict(chat_template=CHATML)}


def sentencepiece_bpe(texts, size):
    """{file name: content} of a sentencepiece BPE of `size` tokens, with the settings of Llama 2.

    Rare characters are encoded as bytes, digits stand alone, and text is not normalized. UserError
    where the texts hold fewer tokens.
    """
    lines = (
        line[a : a + SENTENCE]
        for text in texts
        for line in text.split("\n")
        for a in range(0, len(line), SENTENCE)
    )
    if (first := next(lines, None)) is None:
        raise UserError("there is no text to train a tokenizer on")
    model, specials = io.BytesIO(), ["<pad>", "<|im_start|>", "<|im_end|>"]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=8 * SENTENCE,
            control_symbols=specials,
            num_threads=records.cores(),
            minloglevel=2,
        )
    except RuntimeError as e:
        limit = re.search(r"<= (\d+)", str(e))
        reason = (
            f"the text has no more than {limit[1]} tokens to learn, not {size}: ask for less"
            if limit
            else str(e)
        )
        raise UserError(f"sentencepiece trains no tokenizer: {reason}") from None
    names = ["<unk>", "<s>", "</s>", *specials]
    added = [vocab.added_token(i, name) for i, name in enumerate(names)]
    settings = dict(
        tokenizer_class="LlamaTokenizer",
        legacy=False,
        add_bos_token=True,
        add_eos_token=False,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
        added_tokens_decoder=added_tokens_decoder(added),
    )
    return {"tokenizer.model": model.getvalue(), "tokenizer_config.json": settings}


def train_tokenizer(cfg, paths, size, folder, workers):
    """Trains a tokenizer of `size` tokens on the source and writes it into `folder`."""
    if size < 300:
        raise UserError(
            f"tokenizer=train:{size}: 256 bytes and the special tokens need 300 or more"
        )
    total = sum(f.stat().st_size for f in paths) if paths else None
    every = max(1, round((total or 0) / (cfg.train_mb * 1e6)))  # one chunk of so many

    def sample(bar):
        taken = 0
        for chunk in islice(chunks(cfg, paths, bar, Counter()), 0, None, every):
            yield chunk
            taken += chunk[0]
            if taken >= cfg.train_mb * 1e6:
                return

    def texts(bar):
        for _, items in sample(bar):
            for _, plain, raw in items:
                with contextlib.suppress(BadRecord):
                    yield read(plain, raw, cfg.text_field)

    print(f"training a {cfg.kind} tokenizer of {size:,} tokens")
    with records.progress(total, "B") as bar:
        if cfg.kind == "bpe":
            words = Counter()
            with contextlib.closing(
                records.ordered_map(count_words, sample(bar), workers, setup, (cfg,))
            ) as parts:
                for part in parts:
                    words.update(part)
            content = byte_level_bpe(words, size)
        else:
            content = sentencepiece_bpe(texts(bar), size)
    with files.new_dir(folder) as tmp:
        for name, value in content.items():
            if isinstance(value, bytes):
                files.write_bytes(tmp / name, value)
            else:
                files.write_json(tmp / name, value, ensure_ascii=False)


# --------------------------------------------------------------------------------------------------
# the whole job


def work_folder(cfg):
    out = Path(cfg.out).resolve()
    return out.with_name(out.name + ".work")


def open_work(cfg, paths):
    """The folder of finished shards. Shards of another job are removed."""
    inputs = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in paths or ()]
    same = (
        "source",
        "tokenizer",
        "text_field",
        "separator",
        "subset",
        "split",
        "max_mb",
        "kind",
        "train_mb",
        "seed",
    )
    job = dict(sizes=[BLOCK, LIMIT, CHUNK, SHARD], inputs=inputs) | {
        key: getattr(cfg, key) for key in same
    }
    if not cfg.tokenizer.startswith("train:"):
        job["fingerprint"] = tokenizer.load(cfg.tokenizer, template="plain").fingerprint
    text = json.dumps(job, indent=1)
    work = work_folder(cfg)
    if work.exists():
        if not (work / "job.json").exists():
            raise UserError(
                f"{work} is in the way and not ours: move it away, or choose another out="
            )
        if (work / "job.json").read_text(encoding="utf-8") == text:
            return work
        files.remove_dir(work)
    with files.new_dir(work) as tmp:
        files.write_text(tmp / "job.json", text)
    return work


def write_shard(path, parts):
    """Writes a shard. parts: what convert returned for its chunks."""
    _, tokens, lengths, sizes, hashes, empty, bad = zip(*parts, strict=True)
    bad = [error for errors in bad for error in errors]
    about = dict(chunks=len(parts), empty=sum(empty), bad=len(bad), first_bad=bad[:20])
    with files.replacing(path) as f:
        np.savez(
            f,
            tokens=np.concatenate(tokens),
            lengths=np.concatenate(lengths),
            sizes=np.concatenate(sizes),
            hashes=np.concatenate(hashes),
            about=np.array(json.dumps(about)),
        )


def read_about(path):
    with np.load(path) as shard:
        return json.loads(str(shard["about"]))


def check_errors(cfg, errors):
    if errors and cfg.on_error == "stop":
        raise UserError(f"{errors[0]}; mend it, or skip and count such records with on_error=skip")


def fill(cfg, paths, work, directory, workers, counts):
    """Tokenizes what the finished shards in `work` lack. Returns the paths of all shards."""
    shards = []
    while (path := work / f"{len(shards):05d}.npz").exists():
        shards.append(path)
    done = 0
    for about in map(read_about, shards):
        done += about["chunks"]
        check_errors(cfg, about["first_bad"])
    if shards:
        print(f"going on after the {len(shards)} finished shards in {work}")
    total = sum(f.stat().st_size for f in paths) if paths else None
    parts, size = [], 0

    def close():
        path = work / f"{len(shards):05d}.npz"
        write_shard(path, parts)
        shards.append(path)

    with records.progress(total, "B") as bar:
        todo = islice(chunks(cfg, paths, bar, counts), done, None)
        with contextlib.closing(
            records.ordered_map(convert, todo, workers, setup, (cfg, directory))
        ) as results:
            for part in results:
                check_errors(cfg, part[6])
                parts.append(part)
                size += part[0]
                if size >= SHARD:
                    close()
                    parts, size = [], 0
    if parts:
        close()
    return shards


def assemble(cfg, directory, shards, counts):
    """Writes the store from the shards, documents in order, split by records.held_out."""
    abouts = [read_about(path) for path in shards]
    empty, bad = sum(about["empty"] for about in abouts), sum(about["bad"] for about in abouts)
    first_bad = [error for about in abouts for error in about["first_bad"]][:20]
    hashes = []
    for path in shards:
        with np.load(path) as shard:
            hashes.append(shard["hashes"])
    hashes = np.concatenate(hashes or [np.zeros(0, np.uint64)])
    if not len(hashes):
        for path in shards:
            path.unlink()
        first = "".join(f"; the first: {error}" for error in first_bad[:1])
        raise UserError(
            f"{cfg.source} holds no text ({empty} documents are empty, {bad} bad{first})"
        )
    tok = state.tok
    in_val = records.held_out(hashes, cfg.val)
    size = Counter()
    meta = dict(
        tokenizer=tok.fingerprint,
        tokenizer_identity=tok.identity,
        source=cfg.source,
        seed=cfg.seed,
        dropped={"empty": empty},
        **counts,
        bad_records=bad,
        first_bad=first_bad,
        bytes=size,
    )
    with Writer(cfg.out, tok.vocab_size, meta) as writer:
        at = 0
        for path in shards:
            with np.load(path) as shard:
                tokens, lengths, sizes = shard["tokens"], shard["lengths"], shard["sizes"]
            pick = in_val[at : at + len(lengths)]
            at += len(lengths)
            inside = np.repeat(pick, lengths)  # (tokens,) bool: of a held-out document
            for split, rows, of_rows in (("train", ~pick, ~inside), ("val", pick, inside)):
                writer.extend(split, tokens[of_rows], None, lengths[rows])
                size[split] += int(sizes[rows].sum())
        size += Counter()  # drops a split without bytes
        folder = writer.tmp / "tokenizer"
        folder.mkdir()
        tokenizer.copy_files(directory, folder)


def main(cfg):
    files.refuse_overwrite([cfg.out], [cfg.source])
    check_target(cfg.out)
    train = re.fullmatch(r"train:(\d[\d_]*)", cfg.tokenizer)
    paths = find_files(cfg)
    work = open_work(cfg, paths)
    counts = Counter()
    directory = work / "tokenizer" if train else Path(cfg.tokenizer)
    workers = cfg.workers or (
        records.cores() if paths is None or sum(f.stat().st_size for f in paths) > 4e6 else 1
    )
    try:
        setup(cfg)
        if train and not directory.exists():
            train_tokenizer(cfg, paths, int(train[1]), directory, workers)
        setup(cfg, directory)
        shards = fill(cfg, paths, work, directory, workers, counts)
        assemble(cfg, directory, shards, counts)
    except BaseException:
        if any(work.glob("*.npz")) or directory == work / "tokenizer" and directory.exists():
            print(
                f"what is done stays in {work}: the same command goes on from there",
                file=sys.stderr,
            )
        else:
            files.remove_dir(work)
        raise
    files.remove_dir(work)
    report(cfg, read_meta(cfg.out))


def report(cfg, meta):
    splits, size = meta["splits"], sum(meta["bytes"].values())
    rows, tokens = (sum(s[key] for s in splits.values()) for key in ("rows", "tokens"))
    each = f"{tokens:,} tokens of {meta['vocab_size']:,}, {size / tokens:.2f} bytes each"
    print(f"{cfg.out}: {rows:,} documents, {size:,} bytes, {each}")
    for name, s in splits.items():
        print(f"  {name:<8}{s['rows']:>14,} documents {s['tokens']:>16,} tokens")
    if "val" not in splits and cfg.val != "0":
        print(
            f"  val={cfg.val} of {rows} documents is none: no validation split "
            "(separator= cuts a text into documents)"
        )
    if meta["dropped"]["empty"]:
        print(f"  {meta['dropped']['empty']:,} empty documents left out")
    if meta["bad_records"]:
        print(f"  {meta['bad_records']:,} bad records left out; the first: {meta['first_bad'][0]}")
    if meta.get("documents cut"):
        print(f"  texts of over {LIMIT >> 20} MB cut at {meta['documents cut']} places")


if __name__ == "__main__":
    config.run(main, Config)
