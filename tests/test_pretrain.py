"""pretrain.py and the windows it reads: coverage over ranks, edges, mixes, losses by hand, exact
resume, what is written."""

import math
import sys
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import arguments, curve, records, same_tensors, stop_before

import pretrain
from model import Transformer, empty
from nano import config, runtime, tokenizer, weights
from nano.batches import Windows
from nano.config import UserError
from nano.store import Store, write_store

SMALL = dict(size="toy", dim=32, n_heads=4, n_kv_heads=2, ffn_dim=48)
BASE = dict(
    device="cpu",
    dtype="float32",
    max_length=32,
    batch_size=4,
    micro_batch=2,
    lr=3e-3,
    log_every=1,
    sample_tokens=0,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("pretrain") / "base")


def text_store(path, model, n=60, val=8, seed=1, **sizes):
    """A prepared folder of plain text for the tokenizer of the model directory `model`."""
    splits = dict(train=tiny.rows(n, seed, **sizes), val=tiny.rows(val, seed + 1, **sizes))
    size = {
        split: sum(len(tokens) - 1 for tokens, _ in rows) for split, rows in splits.items()
    }  # a byte a token, but EOS
    plain = {
        split: [(tokens, None) for tokens, _ in rows] for split, rows in splits.items() if rows
    }
    write_store(
        path, plain, dict(vocab_size=264, tokenizer=tokenizer.load(model).fingerprint, bytes=size)
    )
    (path / "tokenizer").mkdir()
    tokenizer.copy_files(model, path / "tokenizer")
    return path


@pytest.fixture(scope="module")
def store(base, tmp_path_factory):
    return text_store(tmp_path_factory.mktemp("pretrain") / "store", base)


def train(out, data, **settings):
    """Runs pretrain.py in this process; the records of its log."""
    sizes = {} if "model" in settings else SMALL
    tiny.train("pretrain", arguments(BASE | sizes | settings | dict(out=out, data=data)))
    return records(out)


def evals(log):
    return [(r["step"], r["loss"], r["bits_per_byte"]) for r in log if r["kind"] == "eval"]


# ---- windows


def numbered(path, lengths, first=0):
    """A store whose tokens are first, first + 1, ...: a token tells its place."""
    ends = np.cumsum([first, *lengths])
    rows = [(np.arange(a, b), None) for a, b in zip(ends, ends[1:], strict=False)]
    write_store(path, dict(train=rows), dict(vocab_size=60_000))
    return Store(path)


def targets(micros):
    """The targets that have a weight, of micro-batches."""
    return [int(t) for m in micros for t in m["targets"][m["weights"] > 0]]


@pytest.mark.parametrize("isolate", [True, False])
def test_ranks_together_visit_every_window_once(tmp_path, isolate):
    rng = np.random.default_rng(0)
    a, b = (
        numbered(tmp_path / "a", rng.integers(1, 30, 300)),
        numbered(tmp_path / "b", rng.integers(1, 30, 200), 30_000),
    )
    predicted = {
        *a.tokens[1:].tolist(),
        *b.tokens[1:].tolist(),
    }  # nothing comes before the first token
    if isolate:
        predicted -= {int(s.tokens[i]) for s in (a, b) for i in s.offsets[:-1]}
    count = sum(-(-(len(s.tokens) - 1) // 4) for s in (a, b))
    for world in range(1, 9) if isolate else (1, 3):
        ranks = [
            Windows([a, b], 840, 1, 4, isolate=isolate, rank=rank, world=world)
            for rank in range(world)
        ]
        steps = ranks[0].steps_per_epoch
        assert steps == -(-count // 840) == 3
        for epoch in range(2 if world == 3 else 1):
            parts = [
                [m for step in range(steps) for m in rank.batch(steps * epoch + step)]
                for rank in ranks
            ]
            assert len({len(part) for part in parts}) == 1  # as many micro-batches on each
            assert Counter(t for part in parts for t in targets(part)) == Counter(
                predicted
            )  # all of them, and none twice


def test_another_number_of_ranks_goes_on_where_the_first_stopped(tmp_path):
    a = numbered(tmp_path / "a", [700] * 12)
    for before in range(1, 9):
        seen = []
        for world, steps in ((before, [0]), (9 - before, [1, 2])):
            ranks = [
                Windows([a], 840, 1, 4, isolate=False, rank=rank, world=world)
                for rank in range(world)
            ]
            seen += [t for rank in ranks for step in steps for t in targets(rank.batch(step))]
        assert ranks[0].steps_per_epoch == 3 and sorted(seen) == a.tokens[1:].tolist()


def test_epochs_are_shuffled_anew_and_by_seed(tmp_path):
    a = numbered(tmp_path / "a", [400])
    w = Windows([a], 100, 1, 4)
    first, second, other = (
        w.plan(0).tolist(),
        w.plan(1).tolist(),
        Windows([a], 100, 1, 4, seed=1).plan(0).tolist(),
    )
    assert first != second != other != first and sorted(first) == sorted(second) == sorted(
        other
    ) == list(range(100))
    assert (
        Windows([a], 100, 1, 4).plan(1).tolist() == second
    )  # no need to have gone through the first


@pytest.mark.parametrize("isolate", [True, False])
def test_targets_at_the_edges(tmp_path, isolate):
    rows = [([1, 2, 3, 9], None), ([4, 9], None), ([5, 6, 7, 8, 9], None)]
    write_store(tmp_path / "a", dict(train=rows), dict(vocab_size=10))
    batch = Windows([Store(tmp_path / "a")], 4, 4, 4, isolate=isolate).micro(np.arange(3))
    assert ("docs" in batch) == isolate and (batch["n_tokens"], batch["n_targets"]) == (
        11,
        int(batch["weights"].sum()),
    )
    got = {name: t.tolist() for name, t in batch.items() if torch.is_tensor(t)}
    assert got["tokens"] == [[1, 2, 3, 9], [4, 9, 5, 6], [7, 8, 9, 0], [0, 0, 0, 0]]
    if isolate:
        assert got["index"] == [0, 1, 2, 4, 6, 7, 8, 9] and got["weights"] == [1] * 8
        assert got["targets"] == [2, 3, 9, 9, 6, 7, 8, 9]
        assert got["positions"] == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 0], [0, 0, 0, 0]]
        assert got["docs"] == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, -1], [-1, -1, -1, -1]]
    else:
        assert got["index"] == list(range(10)) and got["weights"] == [1] * 10
        assert got["targets"] == [2, 3, 9, 4, 9, 5, 6, 7, 8, 9]
        assert got["positions"] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]


def test_weights_are_kept_and_a_store_that_is_used_up_begins_again(tmp_path):
    a, b, c = (
        numbered(tmp_path / name, [4 * n + 1]) for name, n in (("a", 500), ("b", 10), ("c", 70))
    )
    w = Windows([a, b, c], 20, 5, 4, weights=(7, 1, 2), seed=3)
    assert w.share.tolist() == [45875, 6554, 13107] and w.steps_per_epoch == 29
    drawn = np.concatenate([w.plan(step) for step in range(200)])
    stores = np.searchsorted(w.starts, drawn, "right") - 1
    for n in (100, 1000, 4000):
        assert np.abs(np.bincount(stores[:n]) - np.array([0.7, 0.1, 0.2]) * n).max() <= 2
    for i, count in enumerate((500, 10, 70)):
        mine = drawn[stores == i] - w.starts[i]
        passes = [mine[k : k + count].tolist() for k in range(0, len(mine) - count + 1, count)]
        assert (
            len(passes) >= 2
            and all(sorted(p) == list(range(count)) for p in passes)
            and passes[0] != passes[1]
        )
    for world in (1, 2, 4):  # what is drawn depends on neither the ranks nor the steps before
        ranks = [
            Windows([a, b, c], 20, 5, 4, weights=(0.7, 0.1, 0.2), seed=3, rank=r, world=world)
            for r in range(world)
        ]
        firsts = [int(t) for rank in ranks for m in rank.batch(150) for t in m["tokens"][:, 0]]
        assert sorted(firsts) == sorted(4 * (drawn[3000:3020] - w.starts[stores[3000:3020]]))
    both = np.concatenate([w.plan(step) for step in range(3400)])
    assert (
        np.bincount(np.searchsorted(w.starts, both[:65536], "right") - 1).tolist()
        == w.share.tolist()
    )  # one cycle
    mine = both[(both >= w.starts[1]) & (both < w.starts[2])]
    assert all(len({*mine[k : k + 10]}) == 10 for k in range(6500, 6600, 10))


# ---- losses


@pytest.mark.parametrize("isolate", [True, False])
def test_the_loss_is_that_of_the_next_token(store, isolate):
    model, rows = tiny.model(), Store(store)
    windows = Windows([rows], 6, 6, 32, isolate=isolate)
    micro = windows.micro(np.arange(6))
    expected, stream = 0.0, torch.from_numpy(rows.tokens[: 6 * 32 + 1].astype(np.int64))
    with torch.no_grad():
        for a in range(0, 6 * 32, 32):
            cuts = (
                [a, *(int(c) for c in rows.offsets if a < c < a + 33), a + 33]
                if isolate
                else [a, a + 33]
            )
            for i, j in zip(cuts, cuts[1:], strict=False):
                logits = model.logits(model.hidden(stream[None, i : min(j, a + 32)]))[0]
                count = j - i - 1
                expected += (
                    F.cross_entropy(
                        logits[:count], stream[i + 1 : i + 1 + count], reduction="sum"
                    ).item()
                    if count
                    else 0
                )
        got = pretrain.loss_sum(model, model(micro), micro)
    np.testing.assert_allclose(got.item(), expected, rtol=1e-5)
    assert micro["weights"].sum() == (
        6 * 32 if not isolate else 6 * 32 - sum(0 < c <= 6 * 32 for c in rows.offsets)
    )


def test_bits_per_byte_by_hand(base, store, tmp_path):
    uniform = tiny.model()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    weights.save_model(uniform, tmp_path / "uniform", like=base)
    first = train(tmp_path / "out", store, model=tmp_path / "uniform", steps=1)[0]
    rows = [tokens for tokens, _ in tiny.rows(8, 2)]
    tokens, size = sum(map(len, rows)), sum(len(r) - 1 for r in rows)
    np.testing.assert_allclose(
        [first["loss"], first["perplexity"]], [math.log(264), 264], rtol=1e-5
    )
    np.testing.assert_allclose(
        first["bits_per_byte"], 8.0443941 * tokens / size, rtol=1e-5
    )  # log2(264) bits a token

    val = Store(store, "val")
    assert pretrain.tokens_per_byte([val], False) == tokens / size
    assert (
        pretrain.tokens_per_byte([val, val], True) == (tokens - 8) / size
    )  # a BOS that is given costs nothing
    write_store(tmp_path / "old", dict(val=[([1, 2], None)]), dict(vocab_size=264))
    assert pretrain.tokens_per_byte([val, Store(tmp_path / "old", "val")], False) is None


def test_evaluation_is_over_the_validation_split(base, store, tmp_path):
    log = train(tmp_path / "out", store, model=base, steps=1, eval_windows=0)
    model, val = weights.load_model(base), Store(store, "val")
    windows = Windows([val], 1, 1, 32)
    with torch.no_grad():
        micros = [windows.micro(np.array([i])) for i in range(windows.starts[-1])]
        total = sum(pretrain.loss_sum(model, model(m), m).item() for m in micros)
    np.testing.assert_allclose(
        log[0]["loss"], total / sum(float(m["weights"].sum()) for m in micros), rtol=1e-5
    )
    part = train(tmp_path / "part", store, model=base, steps=1, eval_windows=2)
    assert part[0]["loss"] != log[0]["loss"]


def test_micro_batches_do_not_change_a_run(store, tmp_path):
    a = train(tmp_path / "a", store, steps=4, micro_batch=1)
    b = train(tmp_path / "b", store, steps=4, micro_batch=4)
    np.testing.assert_allclose(curve(a), curve(b), rtol=1e-5)


# ---- runs


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(optimizer="muon", isolate=False), dict(weights=[0.6, 0.4], schedule="wsd")],
    ids=["adamw", "muon", "weights"],
)
def test_a_run_goes_on_bit_for_bit(base, store, tmp_path, monkeypatch, settings):
    where = store
    if "weights" in settings:
        where = f"{store},{text_store(tmp_path / 'other', base, n=10, val=0, seed=5)}"
    settings = dict(steps=14, eval_every=5, save_every=4) | settings  # more than an epoch
    whole = train(tmp_path / "whole", where, **settings)
    with monkeypatch.context() as patch:
        stop_before(patch, 6)
        train(tmp_path / "cut", where, **settings)
    assert [r["step"] for r in records(tmp_path / "cut") if r["kind"] == "train"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    cut = train(tmp_path / "cut", where, **settings)
    assert curve(cut) == curve(whole) and evals(cut) == evals(whole) and len(evals(cut)) == 4
    assert same_tensors(tmp_path / "cut" / "last", tmp_path / "whole" / "last")
    assert same_tensors(tmp_path / "cut" / "state", tmp_path / "whole" / "state", "state")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_learns(store, tmp_path, optimizer):
    log = train(
        tmp_path / "out", store, steps=40, batch_size=8, micro_batch=8, lr=1e-2, optimizer=optimizer
    )
    losses = [r["loss"] for r in log if r["kind"] == "train"]
    assert losses[0] > 5.4 and np.mean(losses[-5:]) < 3.4  # 26 letters and EOS: ln 27 = 3.3
    state = weights.read_tensors(tmp_path / "out" / "state", name="state")
    momenta = [state[name].shape for name in state if name.endswith("momentum_buffer")]
    assert len(momenta) == (7 * 2 if optimizer == "muon" else 0)
    assert all(32 in shape and max(shape) <= 48 for shape in momenta)  # neither embedding nor head
    first, last = evals(log)[0], evals(log)[-1]
    assert last[1] < first[1] and last[2] < first[2]


def test_what_is_written_opens_in_transformers(base, store, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tmp_path / "out", store, steps=2)
    for name in ("last", "best"):
        peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        model = weights.load_model(tmp_path / "out" / name)
        ids = torch.randint(0, 264, (2, 30))
        with torch.no_grad():
            assert (peer(ids).logits - model.logits(model.hidden(ids))).abs().max() < 1e-5
    assert model.cfg.vocab_size == 320 and model.cfg.max_positions == 32  # 259 tokens, rounded up
    assert (
        peer.config.bos_token_id,
        peer.config.eos_token_id,
        peer.generation_config.eos_token_id,
    ) == (257, 258, 258)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "last").encode("abc") == [97, 98, 99]
    assert tokenizer.load(tmp_path / "out" / "last").fingerprint == tokenizer.load(base).fingerprint


def test_a_model_directory_is_continued(base, store, tmp_path):
    log = train(
        tmp_path / "out",
        store,
        model=base,
        steps=2,
        schedule="constant",
        warmup_ratio=0,
        lr=1e-30,
        weight_decay=0,
    )
    assert same_tensors(tmp_path / "out" / "last", base) and evals(log)[0][1:] == evals(log)[1][1:]
    train(tmp_path / "more", store, model=tmp_path / "out" / "last", steps=2)
    assert not same_tensors(tmp_path / "more" / "last", base)


def test_two_corpora_without_weights_are_one(base, store, tmp_path):
    other = text_store(tmp_path / "other", base, n=10, val=0, seed=5)
    windows = Windows([Store(store), Store(other)], 4, 2, 32)
    log = train(tmp_path / "out", f"{store},{other}", epochs=1, log_every=1)
    steps = [r for r in log if r["kind"] == "train"]
    assert len(steps) == windows.steps_per_epoch == -(-windows.counts.sum() // 4)


def test_samples_go_on_from_prompts_or_documents(store, tmp_path, capsys):
    log = train(tmp_path / "a", store, steps=1, sample_tokens=4, prompts=["abc", "x"])
    shown = [r for r in log if r["kind"] == "samples"]
    assert [r["step"] for r in shown] == [0, 1] and [row["prompt"] for row in shown[0]["rows"]] == [
        "abc",
        "x",
    ]
    log = train(tmp_path / "b", store, steps=1, sample_tokens=4)
    rows = [bytes(tokens[: min(8, len(tokens) // 2)]).decode() for tokens, _ in tiny.rows(8, 2)[:2]]
    assert [row["prompt"] for r in log if r["kind"] == "samples" for row in r["rows"]] == rows * 2
    assert "samples at step 1" in capsys.readouterr().out


def test_other_folders_in_out_stay(store, tmp_path):
    (tmp_path / "out" / "init").mkdir(parents=True)
    train(tmp_path / "out", store, steps=1)
    assert (tmp_path / "out" / "init").is_dir() and not (tmp_path / "out" / "init.tmp").exists()


def test_the_cost_is_told_first(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime.Runtime, "name", "NVIDIA A100-SXM4-80GB")
    train(tmp_path / "out", store, steps=1)
    said = capsys.readouterr().out
    assert (
        "estimated peak memory per device" in said
        and "128 tokens, " in said
        and "FLOPs, about 0s at 40% of the peak" in said
    )
    assert said.index("estimated peak") < said.index("step 1/1")


def test_sizes():
    named = {
        "toy": (64, 107e3),
        "15m": (32_000, 15.2e6),
        "124m": (50_257, 124e6),
        "350m": (50_257, 355e6),
        "1b": (32_000, 1.04e9),
        "3b": (32_000, 2.92e9),
        "7b": (32_000, 6.74e9),
    }
    assert named.keys() == pretrain.SIZES.keys()
    for size, (vocab, expected) in named.items():
        cfg = pretrain.model_config(pretrain.Config(size=size), vocab)
        count = sum(p.numel() for p in empty(cfg).parameters())
        assert abs(count / expected - 1) < 0.01, (size, count)
    cfg = pretrain.model_config(
        pretrain.Config(size="1b", n_layers=3, dim=96, n_heads=6, ffn_dim=128, max_length=77), 100
    )
    assert (cfg.n_layers, cfg.dim, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.ffn_dim) == (
        3,
        96,
        6,
        6,
        16,
        128,
    )
    assert (cfg.vocab_size, cfg.max_positions) == (128, 77)
    assert Transformer(cfg).hidden(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 96)


# ---- mistakes


def test_mistakes_are_told(base, store, tmp_path, monkeypatch, capsys):
    other = tiny.model_dir(tmp_path / "other", special=["<a>", "<b>", "<c>"])
    foreign = text_store(tmp_path / "foreign", other)
    write_store(
        tmp_path / "one",
        dict(train=[([1], None)]),
        dict(vocab_size=264, tokenizer=tokenizer.load(base).fingerprint),
    )
    for settings, message in (
        (dict(data=tmp_path / "none"), "none does not exist"),
        (dict(data=store, batch_size=5), "batch_size=5 is not a multiple of micro_batch=2"),
        (dict(data=store, weights=[0.5, 0.5]), "weights= has 2 for 1 data folders"),
        (dict(data=store, weights=[0.0]), "weights= holds 0.0: give each data folder one above 0"),
        (dict(data=store, dim=36), "dim=36 must be an even multiple of n_heads=4"),
        (dict(data=store, n_kv_heads=3), "a multiple of n_kv_heads=3"),
        (dict(data=f"{store},{foreign}"), "foreign was prepared with another tokenizer"),
        (dict(data=foreign, model=base), "foreign was prepared with another tokenizer"),
        (dict(data=f"{store},{tmp_path / 'one'}"), "one holds a single token"),
        (dict(data=store, model=tmp_path / "none"), "no model directory"),
        (dict(data=store, tokenizer=tmp_path / "none"), "no model directory"),
        (dict(data=store, resume="true"), "there is no saved state"),
        (dict(data=store, model=base, max_length=512), "512 tokens, .* takes 256"),
        (
            dict(data=store, model=base, dim=64),
            "dim=64 has no effect with model=",
        ),
        (dict(data=tmp_path / "one"), "one/tokenizer: name the tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "out", **dict(steps=1) | settings)
    monkeypatch.setattr(
        sys,
        "argv",
        ["pretrain.py", f"data={tmp_path / 'none'}", f"out={tmp_path / 'out'}", "size=huge"],
    )
    with pytest.raises(SystemExit) as stopped:
        config.run(pretrain.main, pretrain.Config)
    assert stopped.value.code == 2 and "expected one of toy, 15m" in capsys.readouterr().err
