"""What a step of pretraining waits for its data: from a cold disk, and beside a step that computes.

    python -m bench.data_loading                    # a store of 3 GB, dropped from memory first
    python -m bench.data_loading gb=40 out=/disk    # one that is larger than memory

The first table reads batches from a store that is not in memory. `advised` is what nano/store.py
does: it tells the kernel that reads are random. `plain` is the kernel's own readahead. Read MB is
what the process fetched from the disk (/proc/self/io, so Linux alone).

The second table times whole steps, in which a matrix product stands for the forward and backward.
`ahead` reads and collates the next batch in a thread meanwhile, as nano/batches.py does. `in turn`
reads it before the step. `no data` is the product alone. All sides take turns.
"""

import mmap
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nano import batches, config, store
from nano.config import PositiveFloat, PositiveInt

VOCAB = 32_000


@dataclass
class Config:
    gb: PositiveFloat = 3.0  # size of the store's tokens
    out: str = "out/data_loading"  # folder for the store, which stays there
    batch_size: PositiveInt = 64  # windows of a step
    max_length: PositiveInt = 1024  # tokens of a window
    rounds: PositiveInt = 3  # of each side
    steps: PositiveInt = 20  # of a round
    dim: PositiveInt = 2048  # rows and columns of the product that stands for a step


def make(cfg):
    """A store of random documents of 200 to 2,000 tokens, about `gb` in all -> its folder."""
    dir = Path(cfg.out) / f"{cfg.gb:g}gb"
    if dir.exists():
        return dir
    rng = np.random.default_rng(0)
    with store.Writer(dir, VOCAB) as writer:
        left = int(cfg.gb * 1e9 / 2)
        while left > 0:
            lengths = rng.integers(200, 2000, 10_000)
            writer.extend("train", rng.integers(0, VOCAB, lengths.sum()), None, lengths)
            left -= int(lengths.sum())
    return dir


def cold(dir):
    """Drops the store's files from memory."""
    for path in dir.glob("*.bin"):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_mb():
    """MB that this process has fetched from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"]) / 1e6


def windows(cfg, dir, seed):
    data = store.Store(dir)
    return batches.Windows([data], cfg.batch_size, 16, cfg.max_length, seed=seed), data


def from_disk(cfg, dir, advice, seed):
    """(seconds, MB) of each step, read from a cold store under an advice to the kernel."""
    train, data = windows(cfg, dir, seed)
    data.maps["tokens"].madvise(advice)
    cold(dir)
    rows = []
    for step in range(cfg.steps):
        before, began = read_mb(), time.perf_counter()
        batches.read(train, step)
        rows.append((time.perf_counter() - began, read_mb() - before))
    return rows


def beside_a_step(cfg, dir, side, seed):
    """Seconds of each step: the batch of a cold store, and a product."""
    train, _ = windows(cfg, dir, seed)
    cold(dir)
    x = torch.randn(cfg.dim, cfg.dim)
    seconds = []
    for step in range(cfg.steps + 1):
        began = time.perf_counter()
        if side == "ahead":
            train.batch(step)
        elif side == "in turn":
            batches.read(train, step)
        for _ in range(2):
            x @ x
        seconds.append(time.perf_counter() - began)
    return seconds[1:]  # nothing was read ahead of the first one


def main(cfg):
    dir = make(cfg)
    advice = {"advised": mmap.MADV_RANDOM, "plain": mmap.MADV_NORMAL}
    disk = {side: [] for side in advice}
    steps = {side: [] for side in ("ahead", "in turn", "no data")}
    for seed in range(cfg.rounds):
        for side in disk:
            disk[side] += from_disk(cfg, dir, advice[side], seed)
        for side in steps:
            steps[side] += beside_a_step(cfg, dir, side, seed)
    windows = f"{cfg.batch_size} windows of {cfg.max_length:,} tokens"
    print(
        f"{windows} a step, a store of {cfg.gb:g} GB, medians of {cfg.rounds} x {cfg.steps} steps"
    )
    print(f"{'cold disk':<12}{'ms a step':>12}{'read MB':>12}")
    for side, rows in disk.items():
        seconds, mb = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{side:<12}{1e3 * seconds:>12.1f}{mb:>12.1f}")
    print(f"{'with a step':<12}{'ms a step':>12}")
    for side, seconds in steps.items():
        print(f"{side:<12}{1e3 * statistics.median(seconds):>12.1f}")


if __name__ == "__main__":
    config.run(main, Config)
