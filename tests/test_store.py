"""The store: what is written is read, all or nothing; damaged folders; the mix of folders."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from nano.config import UserError
from nano.store import (
    Store,
    Writer,
    mix,
    names_of,
    parse_size,
    shares,
    taken,
    validation,
    write_store,
)


def make_rows(lengths, seed=0, vocab=1000):
    """Rows whose first two tokens name the row, with a random mask that holds a target."""
    rng, rows = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        tokens, mask = rng.integers(0, vocab, n), rng.integers(0, 2, n)
        tokens[:2] = [i % vocab, i // vocab][: len(tokens)]
        mask[-1] = 1
        rows.append((tokens, mask))
    return rows


def make_store(dir, lengths, split="train", seed=0, vocab=1000, **meta):
    write_store(dir, {split: make_rows(lengths, seed, vocab)}, dict(vocab_size=vocab, **meta))
    return Store(dir, split)


# ---- the store


@pytest.mark.parametrize(
    "vocab, dtype", [(1000, "uint16"), (65535, "uint16"), (65536, "uint32"), (200_000, "uint32")]
)
def test_roundtrip(tmp_path, vocab, dtype):
    rows, val = make_rows([5, 1, 9, 3], vocab=vocab), make_rows([2, 2], seed=1, vocab=vocab)
    rows[0][0][3] = vocab - 1
    meta = dict(vocab_size=vocab, tokenizer="abc", template="chatml")
    write_store(tmp_path / "d", {"train": rows, "val": val}, meta)
    for split, expected in (("train", rows), ("val", val)):
        store = Store(tmp_path / "d", split, SimpleNamespace(fingerprint="abc"))
        assert len(store) == len(expected) and store.groups is None
        assert store.lengths.tolist() == [len(t) for t, _ in expected]
        for i, (tokens, mask) in enumerate(expected):
            got, got_mask = store.row(i)
            assert got.dtype == dtype and (got == tokens).all() and (got_mask == mask).all()
    counts = store.meta["splits"]["train"]
    assert (counts["rows"], counts["tokens"], counts["target_tokens"]) == (
        4,
        18,
        sum(int(m.sum()) for _, m in rows),
    )
    assert store.meta["dtype"] == dtype and store.meta["template"] == "chatml"
    assert (tmp_path / "d/train.tokens.bin").stat().st_size == 18 * np.dtype(dtype).itemsize
    assert np.fromfile(tmp_path / "d/train.rows.bin", np.int64).tolist() == [0, 5, 6, 15, 18]
    assert np.fromfile(tmp_path / "d/train.mask.bin", np.uint8).tolist() == [
        int(x) for _, m in rows for x in m
    ]


def test_plain_text_has_no_mask_file(tmp_path):
    write_store(tmp_path / "d", {"train": [([1, 2, 3], None), ([4], None)]}, dict(vocab_size=10))
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "meta.json",
        "train.rows.bin",
        "train.tokens.bin",
    ]
    store = Store(tmp_path / "d")
    assert store.lengths.tolist() == [3, 1] and store.row(0)[1].tolist() == [1, 1, 1]
    with (
        pytest.raises(ValueError, match="all of its rows or for none"),
        Writer(tmp_path / "e", 10) as w,
    ):
        w.add("train", [1, 2], None)
        w.add("train", [1, 2], [0, 1])


def test_groups(tmp_path):
    a, b, c, d, e = make_rows([3, 4, 2, 2, 5])
    write_store(tmp_path / "d", {"train": [[a, b], [c, d, e]]}, dict(vocab_size=1000))
    store = Store(tmp_path / "d")
    assert store.groups.tolist() == [0, 2, 5] and (store.row(4)[0] == e[0]).all()
    assert np.fromfile(tmp_path / "d/train.groups.bin", np.int64).tolist() == [0, 2, 5]


def test_writer_is_all_or_nothing(tmp_path):
    make_store(tmp_path / "d", [3, 4])
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "d", 1000) as w:
        w.add("train", [1, 2, 3], [0, 1, 1])
        assert len(list(tmp_path.iterdir())) == 2  # the old one and the one in the making
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    make_store(tmp_path / "d", [7], split="val")
    assert sorted(p.name for p in (tmp_path / "d").iterdir())[1:] == [
        "val.mask.bin",
        "val.rows.bin",
        "val.tokens.bin",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_writer_on_a_full_disk(tmp_path):
    """Files may not grow past 64 KB. That fails as a full disk does: when buffers are written, and
    again when files are closed."""
    make_store(tmp_path / "d", [3, 4])
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"), Writer(tmp_path / "d", 1000) as w:
            for _ in range(1000):
                w.add("train", np.ones(100), np.ones(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before


def test_writer_refuses(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("mine")
    make_store(tmp_path / "mixed", [3])
    (tmp_path / "mixed/thesis.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/meta.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "alone/tokenizer").mkdir(
        parents=True
    )  # one of our own names, but nothing says that it is ours
    for name in ("foreign", "mixed", "model", "file", "alone"):
        with pytest.raises(UserError, match=f"{name} exists and is not a prepared data folder"):
            make_store(tmp_path / name, [3])
    assert (
        (tmp_path / "foreign/thesis.txt").read_text()
        == (tmp_path / "mixed/thesis.txt").read_text()
        == "mine"
    )
    (tmp_path / "empty").mkdir()
    make_store(tmp_path / "empty", [3])  # an empty folder may be filled
    for tokens, what in (
        ([1, 1000], "token id 1000 is outside the vocabulary of 1000"),
        ([1, -1], "outside"),
    ):
        with pytest.raises(UserError, match=what), Writer(tmp_path / "new", 1000) as w:
            w.add("train", tokens, [0, 1])
    for tokens, mask in (([], []), ([1, 2], [1])):
        with (
            pytest.raises(ValueError, match="lengths must add up"),
            Writer(tmp_path / "new", 1000) as w,
        ):
            w.add("train", tokens, mask)
    with pytest.raises(UserError, match="no rows to write"), Writer(tmp_path / "new", 1000):
        pass
    with pytest.raises(ValueError, match="end_group"), Writer(tmp_path / "new", 1000) as w:
        w.add("train", [1], [1])
        w.end_group("train")
        w.add("train", [1], [1])
    assert not (tmp_path / "new").exists() and len(list(tmp_path.iterdir())) == 6


def damage(dir, what):
    meta = json.loads((dir / "meta.json").read_text())
    tokens, rows = dir / "train.tokens.bin", dir / "train.rows.bin"
    if what == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-2])
    elif what == "long":
        tokens.write_bytes(tokens.read_bytes() + b"xx")
    elif what == "no mask":
        (dir / "train.mask.bin").unlink()
    elif what == "offsets":
        rows.write_bytes(np.array([0, 9, 4, 12], np.int64).tobytes())
    elif what == "foreign":
        (dir / "meta.json").write_text('{"something": "else"}')
    elif what == "no json":
        (dir / "meta.json").write_text('{"format": "nanoIns')
    elif what == "version":
        (dir / "meta.json").write_text(json.dumps({**meta, "version": 99}))
    elif what == "no meta":
        (dir / "meta.json").unlink()


@pytest.mark.parametrize(
    "what, says",
    [
        ("cut", r"train.tokens.bin has 22 bytes and not 24"),
        ("long", r"train.tokens.bin has 26 bytes and not 24"),
        ("no mask", r"train.mask.bin is missing"),
        ("offsets", r"train.rows.bin is damaged \(offsets out of order\)"),
        ("foreign", r"meta.json is damaged or not of a prepared"),
        ("no json", r"meta.json is damaged or not of a prepared"),
        ("version", r"meta.json has format version 99"),
        ("no meta", r"is not a prepared data folder \(it has no meta.json\)"),
    ],
)
def test_damaged_store(tmp_path, what, says):
    make_store(tmp_path / "d", [5, 4, 3])
    damage(tmp_path / "d", what)
    with pytest.raises(UserError, match=says):
        Store(tmp_path / "d")


def test_damaged_tokens(tmp_path):
    """They would index beyond the embeddings in the middle of a run."""
    rows = make_store(tmp_path / "d", [5, 4, 3], vocab=50)
    tokens = np.array(rows.tokens)
    tokens[6] = 50
    tokens.tofile(tmp_path / "d" / "train.tokens.bin")
    damaged = Store(tmp_path / "d")
    assert damaged.row(0)[0].tolist() == rows.row(0)[0].tolist()
    with pytest.raises(UserError, match="train.tokens.bin is damaged: token id 50 is outside the"):
        damaged.row(1)


def test_store_that_does_not_fit(tmp_path):
    make_store(tmp_path / "d", [5, 4], tokenizer="a" * 64)
    with pytest.raises(UserError, match="no split 'val', only train"):
        Store(tmp_path / "d", "val")
    with pytest.raises(UserError, match="another tokenizer than the model's .*aaaa.*bbbb"):
        Store(tmp_path / "d", tokenizer=SimpleNamespace(fingerprint="b" * 64))
    (tmp_path / "d/tokenizer").mkdir()  # one that was trained on the text may lie there
    make_store(tmp_path / "d", [5])
    with pytest.raises(UserError, match="nothing/here does not exist"):
        Store(tmp_path / "nothing/here")


def test_a_folder_that_names_no_tokenizer_gets_a_notice(tmp_path, capsys):
    rows = {"train": [([1, 2], None)]}
    write_store(tmp_path / "old", rows, dict(vocab_size=9))
    write_store(tmp_path / "new", rows, dict(vocab_size=9, tokenizer="a" * 64))
    tok = SimpleNamespace(fingerprint="a" * 64)
    assert len(Store(tmp_path / "old", tokenizer=tok)) == 1
    out, err = capsys.readouterr()
    assert out == "" and "old does not say which tokenizer prepared it" in err
    assert len(mix([tmp_path / "old", tmp_path / "new"], tokenizer=tok)) == 2


# ---- the mix


@pytest.mark.parametrize(
    "size, n, count",
    [
        ("all", 7, 7),
        ("10%", 999, 99),
        ("0.29", 100, 29),
        ("29%", 100, 29),
        ("2.5%", 1000, 25),
        ("3", 7, 3),
    ]
    + [("1_000", 1000, 1000), ("100%", 7, 7), ("0", 7, 0), (5, 7, 5)],
)
def test_size_grammar(size, n, count):
    assert parse_size(size, n) == count


@pytest.mark.parametrize("size", ["8", "101%", "-1", "ten", "", "1.5", "%", "all%", "5 %x"])
def test_size_grammar_refuses(size):
    with pytest.raises(UserError, match="size"):
        parse_size(size, 7)


def test_mix(tmp_path):
    a, b = (
        make_store(tmp_path / "a", range(2, 32)),
        make_store(tmp_path / "b", range(40, 60), seed=5),
    )
    dirs = [tmp_path / "a", tmp_path / "b"]
    rows = mix(dirs, ["all", "25%"], seed=3)
    assert len(rows) == 35 and rows.lengths[:30].tolist() == a.lengths.tolist()
    of_b = [int(n) - 40 for n in rows.lengths[30:]]
    assert len(set(of_b)) == 5 and of_b != list(range(5))  # shuffled before taking
    assert all((rows.row(30 + j)[0] == b.row(i)[0]).all() for j, i in enumerate(of_b))
    again, other = mix(dirs, ["all", "25%"], seed=3), mix(dirs, ["all", "25%"], seed=4)
    assert again.lengths.tolist() == rows.lengths.tolist() != other.lengths.tolist()
    assert mix(dirs, ["0", "3"]).lengths.shape == (3,) and len(mix(dirs)) == 50
    with pytest.raises(UserError, match="2 folders and sizes= has 1 elements"):
        mix(dirs, ["all"])
    with pytest.raises(UserError, match="b: sizes=21 is more than the 20 rows"):
        mix(dirs, ["all", "21"])
    make_store(tmp_path / "c", [3], tokenizer="one")
    make_store(tmp_path / "d", [3], tokenizer="other")
    with pytest.raises(UserError, match="different tokenizers"):
        mix([tmp_path / "a", tmp_path / "c", tmp_path / "d"])


@pytest.mark.parametrize(
    "totals, weights, counts",
    [
        ([100, 10], [1, 1], [100, 100]),
        ([100, 10], [3, 1], [100, 33]),
        ([10, 100], [9, 1], [900, 100]),
        ([100, 10], [0.5, 0.05], [100, 10]),
        ([100, 10], [1, 0.01], [1000, 10]),
        ([7], [5], [7]),
        ([4, 4, 2], [1, 2, 1], [4, 8, 4]),
    ],
)
def test_weights_grammar(totals, weights, counts):
    """Every row is in an epoch, and the numbers of rows stand in the ratio of the weights."""
    assert shares(totals, weights) == counts


def test_mix_by_weights(tmp_path):
    make_store(tmp_path / "a", range(2, 32))
    make_store(tmp_path / "b", range(40, 52), seed=5)
    dirs = [tmp_path / "a", tmp_path / "b"]
    rows = mix(dirs, seed=3, weights=[1, 1])
    counts = np.bincount(rows.lengths)
    assert counts[2:32].tolist() == [1] * 30
    assert sorted(counts[40:52]) == [2] * 6 + [3] * 6  # as evenly as can be
    other = mix(dirs, seed=4, weights=[1, 1])
    assert rows.fingerprint() == mix(dirs, seed=3, weights=[1, 1]).fingerprint()
    assert rows.fingerprint() != other.fingerprint()
    head, first, second = taken(rows).split("\n")
    assert head.split() == ["data", "rows", "taken", "tokens", "of", "all"]
    tokens = rows.lengths[30:].sum()
    assert first.split()[:4] == ["a", "30", "30", str(sum(range(2, 32)))]
    assert second.split() == ["b", "12", "30", f"{tokens:,}", f"{tokens / rows.lengths.sum():.1%}"]
    with pytest.raises(UserError, match="2 folders and weights= has 3 elements"):
        mix(dirs, weights=[1, 1, 1])
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"weights= holds {wrong}: give each"):
            mix(dirs, weights=[1, wrong])
    with pytest.raises(UserError, match="repeats a folder .* times in an epoch: bring"):
        mix(dirs, weights=[1, 1e-12])


def test_names_of_folders_tell_them_apart():
    assert names_of(["data/a", "out/b"]) == ["a", "b"]
    assert names_of(["data/a", "out/a"]) == ["data/a", "out/a"]


def test_a_folder_with_an_identity_compares_by_it(tmp_path):
    meta = dict(tokenizer="a" * 64, tokenizer_identity="c" * 64)
    make_store(tmp_path / "d", [3, 4], **meta)
    saved_again = SimpleNamespace(fingerprint="b" * 64, identity="c" * 64)
    assert len(Store(tmp_path / "d", tokenizer=saved_again)) == 2
    with pytest.raises(UserError, match="another tokenizer"):
        Store(tmp_path / "d", tokenizer=SimpleNamespace(fingerprint="a" * 64, identity="d" * 64))
    make_store(tmp_path / "e", [3, 4], tokenizer="b" * 64)  # of the first edition
    assert len(Store(tmp_path / "e", tokenizer=saved_again)) == 2
    assert len(mix([tmp_path / "d", tmp_path / "e"], tokenizer=saved_again)) == 4


def test_validation_of_folders_that_do_not_all_have_it(tmp_path):
    make_store(tmp_path / "a", [3, 4])
    write_store(
        tmp_path / "b", {"train": make_rows([5]), "val": make_rows([6, 7])}, dict(vocab_size=1000)
    )
    assert validation([tmp_path / "a", tmp_path / "b"]).lengths.tolist() == [6, 7]
    assert validation([tmp_path / "a"]) is None
