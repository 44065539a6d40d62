"""Packing, collate and the batches of rows: against hand-worked cases and brute force, and what
must hold for any loader."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import make_rows, make_store

from nano import batches
from nano.batches import Groups, Rows, Windows, bucket, collate, episodes, pack, read
from nano.config import UserError
from nano.store import Store, mix, write_store


class InMemory:
    """Rows with the interface of a Store."""

    def __init__(self, rows):
        self.prompts = 0
        self.row, self.lengths = rows.__getitem__, np.array([len(tokens) for tokens, _ in rows])

    def __len__(self):
        return len(self.lengths)

    def read_randomly(self):
        pass


# ---- packing


def best_fit(lengths, max_length):
    """Best fit decreasing, row by row: the fills of the packs."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else max_length) - n)
    return sorted(max_length - r for r in rooms)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(0, 20), st.integers(0, 9))
def test_pack_is_best_fit_decreasing(lengths, more, seed):
    max_length = max(lengths, default=1) + more
    packs = pack(lengths, max_length, seed)
    assert sorted(i for p in packs for i in p) == list(
        range(len(lengths))
    )  # every row exactly once
    fills = sorted(sum(lengths[i] for i in p) for p in packs)
    assert all(f <= max_length for f in fills)
    assert fills == best_fit(lengths, max_length)


def test_pack_by_hand():
    assert sorted(sorted(p.tolist()) for p in pack([6, 5, 4, 3, 2], 10)) == [[0, 2], [1, 3, 4]]
    assert pack([], 10) == []
    for bad in ([0, 3], [11]):
        with pytest.raises(ValueError, match="1 ... 10"):
            pack(bad, 10)


def test_pack_shuffles_ties_and_keeps_the_count():
    lengths = np.repeat([5, 7, 9], 40)
    one, two = (pack(lengths, 16, seed) for seed in (0, 1))
    assert (
        [p.tolist() for p in one]
        == [p.tolist() for p in pack(lengths, 16, 0)]
        != [p.tolist() for p in two]
    )
    assert len(one) == len(two)


def test_pack_of_many_rows_is_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 0.8, 200_000).astype(int) + 5, 2048)
    packs = pack(lengths, 2048)
    assert lengths.sum() / len(packs) / 2048 > 0.999


def test_bucket():
    lengths = np.random.default_rng(0).integers(1, 1000, 1001)
    batches = bucket(lengths, 8, seed=1)
    assert sorted(np.concatenate(batches)) == list(range(1001))
    assert sorted(map(len, batches)) == [1] + [8] * 125
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    assert spread < 0.1 * 2000  # batches of random rows span about 780
    means = [lengths[b].mean() for b in batches[:32]]
    assert abs(np.corrcoef(means, range(32))[0, 1]) < 0.5  # in no order of length
    assert [b.tolist() for b in bucket(lengths, 8, 1)] == [b.tolist() for b in batches]


# ---- batches


def test_collate_by_hand():
    one, two, three = (
        (np.array([7, 8, 9, 4], np.uint16), [0, 1, 0, 1]),
        ([5, 6], [1, 1]),
        ([3], [1]),
    )
    b = collate([[one, two], [three], []], length=8, prompt_weight=0.25)
    assert b["tokens"].tolist() == [[7, 8, 9, 4, 5, 6, 0, 0], [3] + [0] * 7, [0] * 8]
    assert b["targets"].tolist() == [8, 9, 4, 6]
    assert b["weights"].tolist() == [1, 0.25, 1, 1]
    assert b["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0], [0] * 8, [0] * 8]
    assert b["docs"].tolist() == [[0, 0, 0, 0, 1, 1, -1, -1], [0] + [-1] * 7, [-1] * 8]
    assert b["index"].tolist() == [0, 1, 2, 4] and (b["n_tokens"], b["n_targets"]) == (7, 3)
    tensors = {name: t for name, t in b.items() if not name.startswith("n_")}
    floats = {name for name, t in tensors.items() if t.dtype != torch.int64}
    assert floats == {"weights"} and b["weights"].dtype == torch.float32
    assert all(t.is_contiguous() for t in tensors.values())
    fixed = collate([[one, two], [three], []], 8, 0.25, fixed_shapes=True)
    assert fixed["index"].tolist() == list(range(24))
    assert fixed["targets"].tolist() == [8, 9, 4, 0, 6, 0, 0, 0] + [0] * 16
    assert fixed["weights"].tolist() == [1, 0.25, 1, 0, 1, 0, 0, 0] + [0] * 16


def test_a_token_behind_the_length_is_a_target_only():
    b = collate([[([7, 8, 9, 4], [1, 1, 1, 1])], [([5, 6], [1, 1]), ([3, 2], [1, 1])]], 3)
    assert b["tokens"].tolist() == [[7, 8, 9], [5, 6, 3]]
    assert b["targets"].tolist() == [8, 9, 4, 6, 2]
    assert b["index"].tolist() == [0, 1, 2, 3, 5] and b["n_tokens"] == 6


EPISODES = [  # the second one's actions are interrupted, and its first token cannot be one
    ([5, 6, 7, 8, 258], [0, 0, 0, 1, 1]),
    ([1, 2, 3, 4, 5, 6], [1, 1, 0, 0, 1, 0]),
    ([9, 258], [0, 1]),
]


def test_episodes_by_hand():
    b = episodes(EPISODES)
    assert b["tokens"].tolist() == [[5, 6, 7, 8, 258, 1, 2, 3, 4, 5, 6, 9, 258]]
    assert b["docs"].tolist() == [[0] * 5 + [1] * 6 + [2] * 2]
    assert b["index"].tolist() == [2, 3, 5, 8, 11] and b["actions"].tolist() == [8, 258, 2, 5, 258]
    assert b["rows"].tolist() == [0, 0, 1, 1, 2] and b["last"].tolist() == [4, 10, 12]
    assert b["n_tokens"] == 13 and b["n_targets"] == 5


def test_episodes_of_fixed_shapes_hold_the_same_actions():
    packed, fixed = episodes(EPISODES), episodes(EPISODES, length=8)
    assert fixed["tokens"].shape == (3, 8) and fixed["index"].tolist() == list(range(24))
    real = fixed["weights"] > 0
    for name in ("actions", "rows"):
        assert fixed[name][real].tolist() == packed[name].tolist()
    flat = [b["tokens"].flatten()[b["last"]].tolist() for b in (packed, fixed)]
    assert flat[0] == flat[1] == [258, 6, 258]


def documents(batch):
    """The documents of a collated batch: a Counter of (tokens, weights of being predicted)."""
    found = Counter()
    flat = torch.zeros(batch["tokens"].numel())
    flat[batch["index"]] = batch["weights"]
    all_weights = flat.view(batch["tokens"].shape)
    following = batch["tokens"].flatten().roll(-1)[batch["index"]]
    assert torch.equal(following, batch["targets"])
    for b in range(len(batch["tokens"])):
        for doc in range(int(batch["docs"][b].max()) + 1):
            at = (batch["docs"][b] == doc).nonzero()[:, 0]
            assert batch["positions"][b, at].tolist() == list(range(len(at)))
            weights = all_weights[b, at]
            assert weights[-1] == 0
            found[tuple(batch["tokens"][b, at].tolist()), tuple(weights.tolist())] += 1
        assert (all_weights[b][batch["docs"][b] < 0] == 0).all()
    return found


def expected(rows):
    return Counter((tuple(map(int, t)), (*map(float, m[1:]), 0.0)) for t, m in rows)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_ranks_share_every_row_once(draw):
    world = draw.draw(st.integers(1, 8))
    micro, accumulate = draw.draw(st.integers(1, 3)), draw.draw(st.integers(1, 3))
    lengths = draw.draw(st.lists(st.integers(1, 20), min_size=1, max_size=60))
    packing = draw.draw(st.booleans())
    made = make_rows(lengths)
    rows, batch_size = InMemory(made), world * micro * accumulate
    ranks = [
        Rows(rows, batch_size, micro, 20, packing=packing, rank=r, world=world)
        for r in range(world)
    ]
    steps = ranks[0].steps_per_epoch
    for epoch in range(2):
        found = Counter()
        for step in range(steps):
            parts = [b.batch(epoch * steps + step) for b in ranks]
            assert len({len(p) for p in parts}) == 1  # as many micro-batches on every rank
            full = step < steps - 1 and packing
            assert len(parts[0]) == accumulate if full else 1 <= len(parts[0]) <= accumulate
            for part in parts:
                for m in part:
                    assert m["tokens"].shape == (micro, 20)
                    found += documents(m)
        assert found == expected(made)


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_same_however_it_is_cut(tmp_path, packing):
    rows = make_store(tmp_path / "d", np.random.default_rng(0).integers(2, 60, 300))
    for step in (0, 3):
        whole = None
        for micro, world in ((16, 1), (1, 1), (4, 1), (4, 2), (1, 16), (2, 8)):
            cut = dict(packing=packing, seed=1, world=world)
            parts = [Rows(rows, 16, micro, 64, rank=r, **cut).batch(step) for r in range(world)]
            found = sum((documents(m) for p in parts for m in p), Counter())
            whole = whole or found
            assert found == whole and sum(len(p) for p in parts) * micro == 16


@pytest.mark.parametrize("packing", [True, False])
def test_resume_needs_the_step_alone(tmp_path, packing):
    rows = make_store(tmp_path / "d", np.random.default_rng(0).integers(2, 60, 100))
    straight = Rows(rows, 8, 4, 64, packing=packing, seed=2)
    batches = [straight.batch(step) for step in range(3 * straight.steps_per_epoch)]
    for start in (1, straight.steps_per_epoch, straight.steps_per_epoch + 2):
        resumed = Rows(rows, 8, 4, 64, packing=packing, seed=2)
        for step in range(start, len(batches)):
            for a, b in zip(resumed.batch(step), batches[step], strict=True):
                assert all(np.array_equal(a[k], b[k]) for k in a)
    first, second = (
        sum((documents(m) for m in batches[e * straight.steps_per_epoch]), Counter())
        for e in (0, 1)
    )
    assert first != second  # epochs differ


def test_padding_mode_pads_little(tmp_path):
    rows = make_store(tmp_path / "d", np.random.default_rng(0).integers(2, 500, 256))
    batches = Rows(rows, 8, 4, 500, packing=False)
    micros = [m for step in range(batches.steps_per_epoch) for m in batches.batch(step)]
    widths = {m["tokens"].shape[1] for m in micros}
    assert len(widths) > 3 and all(w % 64 == 0 or w == 500 for w in widths)
    real = sum((m["docs"] >= 0).sum() for m in micros) / sum(m["docs"].numel() for m in micros)
    assert real > 0.8  # batches of random rows padded to their longest: about 0.6
    static = Rows(rows, 8, 4, 500, packing=False, fixed_shapes=True)
    assert {m["tokens"].shape for m in static.batch(0)} == {(4, 500)}


def test_rows_over_max_length(tmp_path):
    rows = [([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]), ([6, 7, 8, 9], [0, 0, 0, 1]), ([1, 2], [0, 1])]
    write_store(tmp_path / "d", {"train": rows}, dict(vocab_size=10))
    store = Store(tmp_path / "d")
    cut = Rows(store, 1, 1, 3)
    assert (cut.dropped, cut.truncated) == (
        1,
        1,
    )  # the second row has no target among its first three
    found = sum((documents(m) for s in range(cut.steps_per_epoch) for m in cut.batch(s)), Counter())
    assert found == expected([([1, 2, 3], [0, 0, 1]), ([1, 2], [0, 1])])
    dropped = Rows(store, 1, 1, 4, over_length="drop")
    assert (dropped.dropped, dropped.truncated, len(dropped.index)) == (1, 0, 2)
    with pytest.raises(UserError, match=r"none of the 3 rows fits into a \+ b=1: raise it"):
        Rows(store, 1, 1, 1, length_key="a + b")
    with pytest.raises(UserError, match="none of the 3 rows fits into max_length=1"):
        Rows(store, 1, 1, 1)


def test_packs_come_in_no_order(tmp_path):
    rows = make_store(tmp_path / "d", np.random.default_rng(0).integers(2, 60, 600))
    batches = Rows(rows, 8, 8, 64)
    longest = [
        rows.lengths[max(pack, key=rows.lengths.__getitem__)]
        for step in range(batches.steps_per_epoch)
        for pack in batches.plan(step)
    ]
    assert (
        abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3
    )  # as they are made, the longest rows come first


@pytest.mark.parametrize("batch, micro, world", [(4, 3, 1), (4, 4, 2), (0, 1, 1), (4, 0, 1)])
def test_batch_that_does_not_divide(tmp_path, batch, micro, world):
    with pytest.raises(
        UserError,
        match=f"batch_size={batch} is not a multiple of micro_batch={micro} x {world} ranks",
    ):
        Rows(make_store(tmp_path / "d", [3, 4]), batch, micro, 8, world=world)


def test_alpaca_packs_full(shared_data):
    """Best fit leaves under 1.5 % of 512-token rows empty on Alpaca's lengths (characters / 4)."""
    records = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    lengths = np.array([min(512, 20 + sum(map(len, r.values())) // 4) for r in records])
    assert lengths.sum() / len(pack(lengths, 512)) / 512 > 0.985


# ---- reading ahead


@pytest.mark.parametrize("kind", ["rows", "windows", "groups"])
def test_steps_in_any_order_are_the_steps_in_order(kind, tmp_path):
    """The thread that reads ahead changes nothing, whichever step is asked for next."""
    splits = dict(train=[[row, row] for row in make_rows([9, 30, 17, 5] * 20, seed=3)])
    if kind != "groups":
        splits = dict(train=make_rows([9, 30, 17, 5] * 20, seed=3))
    write_store(tmp_path / "s", splits, dict(vocab_size=1000))
    size = dict(batch_size=4, micro_batch=2, max_length=64)

    def fresh():
        if kind == "rows":
            return Rows(mix([tmp_path / "s"]), **size)
        if kind == "windows":
            return Windows([Store(tmp_path / "s")], **size)
        return Groups(mix([tmp_path / "s"], groups=True), 4, 2, 256)

    steps = fresh().steps_per_epoch
    assert steps > 3
    expected = {step: read(fresh(), step) for step in range(2 * steps)}
    train = fresh()
    for step in [*range(2 * steps), 1, 0, steps - 1, steps, 2, 2, 3]:
        for a, b in zip(train.batch(step), expected[step], strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in b)
        ahead = {} if (step + 1) % steps == 0 else {step + 1}
        assert set(train.ahead) == set(ahead)  # the last step of an epoch asks for nothing


def test_a_failure_of_the_thread_is_raised(tmp_path, monkeypatch):
    make_store(tmp_path / "s", [9, 30, 17, 5] * 20)
    train = Windows([Store(tmp_path / "s")], 4, 2, 64)
    monkeypatch.setattr(Windows, "micro", lambda self, windows: 1 / 0)
    train.ahead[1] = batches.READER.submit(read, train, 1)
    with pytest.raises(ZeroDivisionError):
        train.batch(1)
