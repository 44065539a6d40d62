"""prepare/text.py: the store against direct tokenization, interruptions, new tokenizers against
Hugging Face's, bad input."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT

from bench.tokenizers import with_specials
from nano import config, records, tokenizer
from nano.config import UserError
from nano.store import Store, read_meta
from prepare import text

DOCS = [
    "One.\nTwo  lines\n",
    "tab\there, 12 345",
    "ünïcödé 漢字 🙂",
    "x",
    "\n\nblank lines\n\n",
    "the end",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer of bytes: EOS 258."""
    return tiny.model_dir(tmp_path_factory.mktemp("text") / "model")


def jsonl(path, docs, **more):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": d} | more, ensure_ascii=False) + "\n" for d in docs)
    return path


def prepare(source, model, out, **settings):
    settings = dict(val="0", workers=1) | settings
    argv = [
        f"{k}={v}" for k, v in (dict(source=source, tokenizer=model, out=out) | settings).items()
    ]
    text.main(config.load(text.Config, argv))
    return rows(out)


def rows(out, split="train"):
    store = Store(out, split)
    return [store.row(i)[0].tolist() for i in range(len(store))]


def ids(docs, eos=258):
    return [[*d.encode(), eos] for d in docs]


def files(dir):
    return {p.relative_to(dir).as_posix(): p.read_bytes() for p in dir.rglob("*") if p.is_file()}


# ---- what comes out


def test_every_format_gives_the_same_rows(model, tmp_path):
    import pyarrow
    import pyarrow.parquet

    sep = "<|endoftext|>"
    (tmp_path / "a.txt").write_text(sep.join(DOCS), encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as f:
        f.write(sep.join(DOCS))
    (tmp_path / "lines.txt").write_text("\n\n\n".join(d.strip() for d in DOCS), encoding="utf-8")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, d in enumerate(DOCS):
        (tmp_path / "folder" / f"{'sub/' * (i > 3)}{i}.txt").write_text(d, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps([{"text": d} for d in DOCS]))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1] * 6, "text": DOCS}), tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl", DOCS, n=1)
    jsonl(tmp_path / "a.jsonl.gz", DOCS)
    for name, settings in {
        "a.txt": dict(separator=sep),
        "a.txt.gz": dict(separator=sep),
        "folder": {},
        "a.json": {},
        "a.parquet": {},
        "a.jsonl": {},
        "a.jsonl.gz": {},
    }.items():
        assert prepare(tmp_path / name, model, tmp_path / "out", **settings) == ids(DOCS), name
    assert prepare(tmp_path / "lines.txt", model, tmp_path / "out", separator=r"\n\n\n") == ids(
        d.strip() for d in DOCS
    )
    assert prepare(tmp_path / "a.txt", model, tmp_path / "out") == ids([sep.join(DOCS)])
    out = Store(tmp_path / "out", tokenizer=tokenizer.load(tmp_path / "out" / "tokenizer"))
    assert (
        out.mask is None
        and out.tokens.dtype == np.uint16
        and out.meta["bytes"] == {"train": len(sep.join(DOCS).encode())}
    )
    assert not list(tmp_path.glob("*.work*")) and not list(tmp_path.glob("*.tmp*"))


def test_a_bos_that_the_tokenizer_adds(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(add_bos_token=True)))
    source = jsonl(tmp_path / "a.jsonl", DOCS)
    assert prepare(source, tmp_path / "model", tmp_path / "out") == [
        [257, *row] for row in ids(DOCS)
    ]


def test_a_large_vocabulary_takes_four_bytes(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"][2]["id"] = spec["model"]["vocab"]["<|im_end|>"] = 70_000  # EOS
    path.write_text(json.dumps(spec))
    assert prepare(jsonl(tmp_path / "a.jsonl", DOCS), tmp_path / "model", tmp_path / "out") == ids(
        DOCS, 70_000
    )
    assert Store(tmp_path / "out").tokens.dtype == np.uint32


def test_a_hub_id_is_streamed(model, tmp_path, monkeypatch):
    asked = []

    def read_hub(name, subsets, split):
        asked.append((name, subsets, split))
        yield from ((i, {"text": d, "url": "x"}) for i, d in enumerate(DOCS, 1))

    monkeypatch.setattr(records, "read_hub", read_hub)
    got = prepare("someone/corpus", model, tmp_path / "out", subset="small", split="validation")
    assert got == ids(DOCS) and asked == [("someone/corpus", ["small"], "validation")]


def test_how_the_work_is_cut_does_not_show(model, tmp_path, monkeypatch):
    rng = random.Random(0)
    docs = ["".join(rng.choices("ab \né漢🙂", k=rng.randint(1, 300))) + "z" for _ in range(120)]
    (tmp_path / "a.txt").write_text("--".join(docs), encoding="utf-8")
    expected = ids(docs)
    for block, chunk, shard in ((1 << 22, 1 << 20, 1 << 26), (7, 50, 400), (64, 1, 1)):
        for name, value in dict(BLOCK=block, CHUNK=chunk, SHARD=shard).items():
            monkeypatch.setattr(text, name, value)
        assert prepare(tmp_path / "a.txt", model, tmp_path / "out", separator="--") == expected


def test_two_workers_do_what_one_does(model, tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [f"{i} " + "word " * (i % 50) for i in range(3000)])
    prepare(source, model, tmp_path / "two", val="0.01", workers=2)
    prepare(source, model, tmp_path / "one", val="0.01")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_text_over_the_limit_is_cut_at_lines(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "LIMIT", 100)
    monkeypatch.setattr(text, "BLOCK", 30)
    lines = "".join(f"line {i} é\n" for i in range(100))
    (tmp_path / "a.txt").write_text(lines + "漢" * 200, encoding="utf-8")
    got = [bytes(row[:-1]) for row in prepare(tmp_path / "a.txt", model, tmp_path / "out")]
    assert b"".join(got) == (lines + "漢" * 200).encode()
    assert all(len(piece) <= 100 for piece in got) and all(piece.decode() for piece in got)
    assert all(
        piece.endswith(b"\n") for piece in got if b"line" in piece and "漢".encode() not in piece
    )
    assert read_meta(tmp_path / "out")["documents cut"] == len(got) - 1
    assert f"cut at {len(got) - 1} places" in capsys.readouterr().out


def test_a_text_of_no_characters_is_cut_somewhere(model, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LIMIT", 100)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes(b"\x80" * 250)
    (tmp_path / "texts/b.txt").write_text("fine")
    assert prepare(tmp_path / "texts", model, tmp_path / "out", on_error="skip") == ids(["fine"])


@pytest.mark.parametrize(
    "separator, whole", [(r"\n\n", ["one\nstill one", "two"]), (r"\n", ["one", "still one", "two"])]
)
def test_lines_of_windows(model, tmp_path, monkeypatch, separator, whole):
    monkeypatch.setattr(text, "BLOCK", 7)  # also between the two characters of a line's end
    (tmp_path / "a.txt").write_bytes(b"one\r\nstill one\r\n\r\ntwo\r\n")
    got = [
        bytes(row[:-1]).decode()
        for row in prepare(tmp_path / "a.txt", model, tmp_path / "out", separator=separator)
    ]
    assert [doc.replace("\r\n", "\n").strip("\n") for doc in got] == whole


def test_max_mb_stops_early(model, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 1000)
    docs = ["x" * 100] * 30_000
    source = jsonl(tmp_path / "a.jsonl", docs)
    read = (
        len(prepare(source, model, tmp_path / "out", max_mb=1)) * source.stat().st_size / len(docs)
    )
    assert 1e6 <= read <= 1.02e6


# ---- held out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 100)
    monkeypatch.setattr(text, "SHARD", 500)


def test_held_out_documents(model, tmp_path, small):
    docs = [f"document {i // 2 if i < 20 else i}" for i in range(200)]  # ten of them twice
    source = jsonl(tmp_path / "a.jsonl", docs)
    train = prepare(source, model, tmp_path / "out", val="0.3")
    val = rows(tmp_path / "out", "val")
    assert Counter(map(tuple, train + val)) == Counter(map(tuple, ids(docs))) and not {
        *map(tuple, train)
    } & {*map(tuple, val)}
    assert len(val) == 60
    order = {tuple(row): i for i, row in enumerate(ids(docs))}
    assert [order[tuple(row)] for row in val] == sorted(order[tuple(row)] for row in val)
    sizes = read_meta(tmp_path / "out")["bytes"]
    assert sizes == {
        split: sum(len(row) - 1 for row in part) for split, part in (("train", train), ("val", val))
    }

    shuffled = jsonl(tmp_path / "b.jsonl", random.Random(1).sample(docs, len(docs)))
    prepare(shuffled, model, tmp_path / "b", val="0.3")  # a document's place does not matter
    assert sorted(rows(tmp_path / "b", "val")) == sorted(val)
    prepare(source, model, tmp_path / "c", val="0.3", seed=1)
    assert sorted(rows(tmp_path / "c", "val")) != sorted(val)


def test_a_share_that_comes_to_nothing_is_told(model, tmp_path, capsys):
    prepare(jsonl(tmp_path / "a.jsonl", DOCS), model, tmp_path / "out", val="0.01")
    assert "val=0.01 of 6 documents is none" in capsys.readouterr().out
    assert [*read_meta(tmp_path / "out")["splits"]] == ["train"]


# ---- interruptions


def kill_at(monkeypatch, n):
    """Interrupts the work at its n-th chunk; the list of chunks done."""
    done, convert = [], text.convert

    def counted(chunk):
        if len(done) == n:
            raise KeyboardInterrupt
        done.append(chunk)
        return convert(chunk)

    monkeypatch.setattr(text, "convert", counted)
    return done


@pytest.mark.parametrize("trained", [False, True], ids=["tokenizer", "new tokenizer"])
def test_an_interrupted_job_goes_on(model, tmp_path, monkeypatch, small, capsys, trained):
    rng = random.Random(0)
    source = jsonl(
        tmp_path / "a.jsonl", [f"{i} " + "".join(rng.choices("abcde ", k=20)) for i in range(200)]
    )
    settings = dict(val="0.1", **(dict(kind="bpe") if trained else {}))
    which = "train:300" if trained else model
    prepare(source, which, tmp_path / "whole", **settings)
    prepare(
        source, which, tmp_path / "out", **settings | dict(val="0.2")
    )  # an older one, which stays until the end
    before = files(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        all_done = kill_at(patch, 20)
        prepare(source, which, tmp_path / "out", **settings)
    work = tmp_path / "out.work"
    shards = sorted(p.name for p in work.glob("*.npz"))
    assert len(all_done) == 20 and 2 <= len(shards) < 10 and files(tmp_path / "out") == before
    (work / f"{len(shards):05d}.tmp").write_bytes(b"killed while a shard was written")
    with monkeypatch.context() as patch:
        done = kill_at(patch, None)
        patch.setattr(text, "train_tokenizer", None)  # it is there
        prepare(source, which, tmp_path / "out", **settings)
    assert f"going on after the {len(shards)} finished shards" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not work.exists()
    total = sum(len(chunk[1]) for chunk in done)
    assert 200 - sum(len(chunk[1]) for chunk in all_done) <= total < 200  # not all over again


def test_a_killed_process_goes_on(model, tmp_path, small, capsys):
    """kill -9 in the middle: no handler runs."""
    source = jsonl(tmp_path / "a.jsonl", [f"the text number {i}" for i in range(400)])
    script = (
        "import os, sys\nfrom prepare import text\nfrom nano import config\n"
        "text.CHUNK, text.SHARD, convert, done = 100, 500, text.convert, []\n"
        "def killed(chunk):\n    done.append(1)\n    return convert(chunk) if len(done) < 40 else os.kill(os.getpid(), 9)\n"
        "text.convert = killed\nconfig.run(text.main, text.Config)\n"
    )
    settings = [f"source={source}", f"tokenizer={model}", f"out={tmp_path / 'out'}", "workers=1"]
    assert (
        subprocess.run(
            [sys.executable, "-c", script, *settings], cwd=ROOT, capture_output=True
        ).returncode
        == -9
    )
    assert not (tmp_path / "out").exists() and (tmp_path / "out.work" / "00001.npz").exists()
    prepare(source, model, tmp_path / "out", val="0.01")
    assert "going on after" in capsys.readouterr().out
    prepare(source, model, tmp_path / "whole", val="0.01")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_another_job_starts_anew(model, tmp_path, monkeypatch, small):
    docs = [f"the text number {i}" for i in range(200)]
    source = jsonl(tmp_path / "a.jsonl", docs)
    for change in ("input", "settings"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_at(patch, 20)
            prepare(source, model, tmp_path / "out")
        if change == "input":
            docs = [f"another {i}" for i in range(200)]
            jsonl(source, docs)
            assert prepare(source, model, tmp_path / "out") == ids(docs)
        else:
            assert len(prepare(source, model, tmp_path / "out", seed=3)) == 200
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "mine").write_text("x")
    with pytest.raises(UserError, match="out.work is in the way"):
        prepare(source, model, tmp_path / "out")
    assert (tmp_path / "out.work" / "mine").exists()


# ---- new tokenizers


def naive_merges(words, count):
    parts, merges, made = (
        {tuple(w): n for w, n in words.items()},
        [],
        [bytes([b]) for b in range(256)],
    )
    while len(merges) < count:
        pairs = Counter()
        for part, n in parts.items():
            for pair in zip(part, part[1:], strict=False):
                pairs[pair] += n
        pairs = {p: n for p, n in pairs.items() if made[p[0]] + made[p[1]] not in made[256:]}
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        made.append(made[best[0]] + made[best[1]])
        merged = Counter()
        for part, n in parts.items():
            out, at = [], 0
            while at < len(part):
                hit = part[at : at + 2] == best
                out.append(255 + len(merges) if hit else part[at])
                at += 1 + hit
            merged[tuple(out)] += n
        parts = merged
    return merges


def test_merges_are_those_of_counting_anew_each_time():
    for seed in range(150):
        rng = random.Random(seed)
        letters = "abcd"[: rng.randint(1, 4)]
        some = (
            "".join(rng.choices(letters, k=rng.randint(2, 12))).encode()
            for _ in range(rng.randint(1, 30))
        )
        words = Counter({word: rng.randint(1, 5) for word in some})
        assert text.learn_merges(words, 20) == naive_merges(words, 20), seed


SAMPLES = [
    *(
        "Hello world, it's 12345 o'clock.",
        "  two  spaces\n\n\ttabs\r\n",
        "ünïcödé 漢字 🙂\u200d",
        "<|im_start|> in text",
        " x",
        "",
    ),
    "aaaaaaaaaaa",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Prose and code of Python's own library."""
    import argparse
    import pydoc_data.topics

    docs = (
        [*pydoc_data.topics.topics.values()][:60]
        + [Path(argparse.__file__).read_text()]
        + SAMPLES * 3
    )
    return jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", docs), docs


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_new_tokenizer_is_hugging_faces(corpus, tmp_path, kind):
    from transformers import AutoTokenizer

    source, docs = corpus
    prepare(source, "train:800", tmp_path / "out", kind=kind, val="5")
    tok = tokenizer.load(tmp_path / "out" / "tokenizer")
    peer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tok.vocab_size == len(peer) == 800
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (
        peer.bos_token_id,
        peer.eos_token_id,
        peer.pad_token_id,
    )
    for doc in docs:
        assert with_specials(tok, doc) == peer.encode(doc, add_special_tokens=False)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    assert tok.template == "chatml" and tok.render(chat)[0] == peer.apply_chat_template(
        chat, return_dict=False
    )
    assert tok.eos_id in tok.stop_ids and len(tok.stop_ids) == 2
    plain = tokenizer.load(tmp_path / "out" / "tokenizer", template="plain")
    assert plain.bos_first == (kind == "sentencepiece")
    every = {tuple(plain.encode(d, bos=plain.bos_first, eos=True)) for d in docs if d.strip()}
    assert {
        tuple(row) for split in ("train", "val") for row in rows(tmp_path / "out", split)
    } == every
    assert all(
        tok.decode(tok.encode(doc)) == doc
        for doc in docs
        if not (kind == "sentencepiece" and doc.startswith(" "))
    )
    assert (
        sum(map(len, rows(tmp_path / "out"))) < 0.6 * read_meta(tmp_path / "out")["bytes"]["train"]
    )  # merges do merge


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_half_an_emoji_is_a_bad_record(tmp_path, kind):
    """It is counted like a byte that is not UTF-8, and the tokenizer is trained without it."""
    docs = [f"{' '.join(SAMPLES)} \ud83d", *SAMPLES]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs))
    with pytest.raises(UserError, match="a.jsonl:1: text that is no Unicode"):
        prepare(tmp_path / "a.jsonl", "train:300", tmp_path / "out", kind=kind)
    prepare(tmp_path / "a.jsonl", "train:300", tmp_path / "out", kind=kind, on_error="skip")
    assert len(rows(tmp_path / "out")) == sum(not sample.isspace() for sample in SAMPLES if sample)
    assert read_meta(tmp_path / "out")["bad_records"] == 1


def test_a_new_tokenizer_serves_another_corpus(corpus, tmp_path):
    prepare(corpus[0], "train:400", tmp_path / "a", kind="bpe")
    prepare(jsonl(tmp_path / "b.jsonl", DOCS), tmp_path / "a" / "tokenizer", tmp_path / "b")
    assert read_meta(tmp_path / "a")["tokenizer"] == read_meta(tmp_path / "b")["tokenizer"]
    assert files(tmp_path / "a" / "tokenizer") == files(tmp_path / "b" / "tokenizer")
    prepare(
        jsonl(tmp_path / "b.jsonl", DOCS[:3]), tmp_path / "a" / "tokenizer", tmp_path / "a"
    )  # from the folder it replaces
    assert (
        len(rows(tmp_path / "a")) == 3
        and (tmp_path / "a" / "tokenizer" / "tokenizer.json").exists()
    )


def test_a_new_tokenizer_is_trained_on_a_sample_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 1000)
    rng = random.Random(0)
    made = ["".join(rng.choices("abcdefg", k=6)) for _ in range(40)]
    docs = [
        " ".join([word, *rng.choices(made, k=150)])
        for word in ("alpha", "beta", "gamma", "delta")
        for _ in range(1000)
    ]
    seen, count_words = [], text.count_words
    monkeypatch.setattr(text, "count_words", lambda chunk: seen.append(chunk) or count_words(chunk))
    prepare(
        jsonl(tmp_path / "a.jsonl", docs), "train:300", tmp_path / "out", kind="bpe", train_mb=1
    )
    assert 0.9e6 < sum(size for size, _ in seen) < 1.2e6
    assert {json.loads(raw)["text"].split()[0] for _, items in seen for _, _, raw in items} == {
        "alpha",
        "beta",
        "gamma",
        "delta",
    }


# ---- bad input


def latin(path, name):
    """A Parquet file whose column of text is not UTF-8."""
    import pyarrow
    import pyarrow.parquet

    _, offsets, content = pyarrow.array([b"\xff"]).buffers()
    pyarrow.parquet.write_table(
        pyarrow.table({name: pyarrow.StringArray.from_buffers(1, offsets, content)}), path
    )
    return path


def bad(tmp_path, model, content, name="a.jsonl", **settings):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(tmp_path / name, model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists() and (
        (tmp_path / "out.work").exists() == bool(settings.get("val"))
    )
    return str(error.value)


def test_bad_records_are_named(model, tmp_path):
    ok = b'{"text": "fine"}\n'
    assert "a.jsonl:2: not valid JSON" in bad(tmp_path, model, ok + b"{broken\n")
    assert "a.jsonl:2: no field 'text' (there are body)" in bad(
        tmp_path, model, ok + b'{"body": "x"}\n'
    )
    assert "a.jsonl:1: field 'text' is int and not text" in bad(tmp_path, model, b'{"text": 3}\n')
    said = bad(tmp_path, model, b"a\n|b\n\xff", "a.txt", separator=r"\n|")
    assert "a.txt:2: not UTF-8 (byte 0xff in line 2 of the document)" in said
    assert "holds no text (2 documents are empty, 0 bad)" in bad(
        tmp_path, model, b'{"text": ""}\n{"text": " \\n"}\n'
    )
    assert "damaged gzip" in bad(tmp_path, model, b"no gzip", "a.txt.gz")
    assert "not a readable Parquet file" in bad(tmp_path, model, b"no parquet", "a.parquet")
    with pytest.raises(UserError, match="text.parquet holds text that is not UTF-8"):
        prepare(latin(tmp_path / "text.parquet", "text"), model, tmp_path / "out")
    assert "cannot tell its format" in bad(tmp_path, model, b"x", "a.xyz")


def test_bad_records_can_be_skipped(model, tmp_path, small):
    lines = [
        json.dumps({"text": f"number {i}"}).encode() if i % 10 else b"{broken" for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    got = prepare(tmp_path / "a.jsonl", model, tmp_path / "out", on_error="skip")
    assert got == ids(f"number {i}" for i in range(100) if i % 10)
    meta = read_meta(tmp_path / "out")
    assert meta["bad_records"] == 10 and "a.jsonl:11: not valid JSON" in meta["first_bad"][1]


def test_wrong_settings(model, tmp_path):
    content = b'{"text": "fine"}\n{"text": "fine, too"}\n'
    assert "leaves none of the 2 rows" in bad(tmp_path, model, content, val="2")
    shutil.rmtree(tmp_path / "out.work")  # what was done serves a run with another val=
    assert "need 300 or more" in bad(tmp_path, "train:100", content)
    assert "there is no text to train a tokenizer on" in bad(
        tmp_path, "train:400", b'{"text": ""}\n'
    )
    for kind in ("bpe", "sentencepiece"):
        assert "no more than" in bad(tmp_path, "train:5000", content, kind=kind)
    assert "no model directory" in bad(tmp_path, tmp_path / "none", content)
    for source in ("none", "none.jsonl", "a/b.jsonl", str(tmp_path / "none" / "x")):
        with pytest.raises(UserError, match="there is no file or folder"):
            prepare(source, model, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no .txt"):
        prepare(tmp_path / "empty", model, tmp_path / "out")
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"})
    )
    assert "needs EOS" in bad(tmp_path, tmp_path / "model", content)


def test_a_mistake_ends_with_status_2(model, tmp_path):
    settings = [f"source={tmp_path / 'none.txt'}", f"tokenizer={model}", f"out={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "prepare.text", *settings], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: there is no file")
        and "Traceback" not in done.stderr
    )


def test_a_folder_may_hold_what_comes_of_it(model, tmp_path):
    jsonl(tmp_path / "a.jsonl", DOCS)
    for _ in range(2):
        assert prepare(tmp_path, model, tmp_path / "out") == ids(DOCS)


def test_a_folder_of_other_things_is_not_replaced(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("x")
    with pytest.raises(UserError, match="is not a prepared data folder"):
        prepare(jsonl(tmp_path / "a.jsonl", DOCS), model, tmp_path / "out")
    assert files(tmp_path / "out") == {"notes": b"x"}
