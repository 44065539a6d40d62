"""One log for every stage: a console line, `log.jsonl`, TensorBoard events, tables of samples.

    log = Log(out, rt, start_step)
    log.settings("sft", cfg, resumed=False)
    log.begin(total_steps, flops_per_token)
    log.step(step, tokens=n, targets=m, memory=rt.peak_memory(), loss=loss, lr=lr)
    with log.paused():
        log.eval(step, loss=val_loss, accuracy=accuracy)
    log.samples(step, [{"prompt": "...", "response": "..."}])

A step is counted when it is done: the first is 1, and step 0 is the untrained model. Metrics may be 0-d tensors on any
device; they are read here and nowhere else. Every rank makes the same calls, the main one writes.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
import textwrap
import time
from pathlib import Path

from nano import config, files

# Peak dense bf16 FLOP/s (fp32 accumulation) from the makers' data sheets; V100: fp16, by words of the device's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "GH200": 990e12,
    "H200": 990e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 990e12,
    "A100": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6e": 918e12,
}


def peak_flops(device):
    """FLOP/s of one device by its name ("NVIDIA H100 80GB HBM3"); None when it is not in the table."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device, re.I)), None
    )


WIDTH = 120  # columns of a line on the console
IN_WORDS = ("tokens_per_s", "targets_per_s", "mfu", "memory_gb")  # shown in words of their own


class Log:
    """What a run says: on the console, in dir/log.jsonl and in TensorBoard events.

    dir: the run folder. start_step: the steps done before a resume. What an earlier run wrote behind
    that step is dropped. Every rank makes the same calls, and the main one writes.
    """

    def __init__(self, dir, rt, start_step=0):
        self.dir, self.is_main, self.start_step = Path(dir), rt.is_main, start_step
        self.peak = (peak_flops(rt.name) or 0.0) * rt.devices
        self.columns = {}  # kind of line: the names of its metrics that the console shows
        self.begin(0)
        if not self.is_main:
            return
        # The import takes a quarter of a second, which other ranks need not wait.
        from torch.utils.tensorboard import SummaryWriter

        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "log.jsonl"
        records = keep(path, start_step) if start_step else []
        # an evaluation at start_step may be there already, from before the stop
        self.known = {(r["kind"], r["step"]) for r in records if r["step"] == start_step}
        files.write_text(path, "".join(map(dumps, records)))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # line by line: `tail -f` works
        self.board = SummaryWriter(str(dir), purge_step=start_step + 1 if start_step else None)

    def begin(self, total_steps, flops_per_token=0.0):
        """The clock starts. flops_per_token: of forward and backward, for the FLOPs utilisation."""
        self.total_steps, self.flops = total_steps, flops_per_token
        self.began = self.mark = time.perf_counter()  # mark: from when the next line counts tokens

    def settings(self, stage, cfg, resumed):
        """Says what differs from the defaults, and from the run's config.cfg; then writes config.cfg."""
        path = self.dir / "config.cfg"
        old = path.read_text(encoding="utf-8") if resumed and path.exists() else ""
        if self.is_main:  # with resume=auto the file continues the run
            files.write_text(path, config.to_cfg(dataclasses.replace(cfg, resume="auto")))
        self.text(" ".join([f"{stage}:", *config.diff(cfg)]))
        if changed := config.changes(cfg, old):
            self.text(f"note: the run goes on with other settings: {', '.join(changed)}")

    def step(self, step, tokens=0, targets=0, memory=0, **metrics):
        """The line of a training step. tokens, targets: of all ranks since the last line; memory: bytes."""
        metrics = {name: plain(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self.mark = now - self.mark, now
        speed = int(tokens) / seconds
        left = self.total_steps - step
        eta = (now - self.began) / max(step - self.start_step, 1) * left
        words = []
        if tokens:
            metrics["tokens_per_s"] = speed
            words.append(f"{speed:,.0f} tok/s")
        if targets:
            metrics["targets_per_s"] = int(targets) / seconds
        if tokens and self.flops and self.peak:
            metrics["mfu"] = speed * self.flops / self.peak
            words.append(f"mfu {metrics['mfu']:.1%}")
        if memory:
            metrics["memory_gb"] = memory / 1e9
            words.append(f"mem {memory / 1e9:.1f} GB")
        self._write("train", step, metrics, [*words, f"eta {duration(eta)}"])

    def eval(self, step, **metrics):
        """The line of an evaluation."""
        self._write("eval", step, {name: plain(value) for name, value in metrics.items()}, [])

    def samples(self, step, rows):
        """A table of what the model writes: one dict a row, the same keys in each."""
        rows = [{name: plain(value) for name, value in row.items()} for row in rows]
        if not self.is_main or not rows or not self._record("samples", step, {"rows": rows}):
            return
        print(
            f"samples at step {step}\n{table(rows, shutil.get_terminal_size().columns)}", flush=True
        )
        cells = [list(rows[0]), ["---"] * len(rows[0])] + [
            list(map(show, row.values())) for row in rows
        ]
        markdown = [[c.replace("|", "\\|").replace("\n", "<br>") for c in row] for row in cells]
        self.board.add_text(
            "samples", "\n".join(f"| {' | '.join(row)} |" for row in markdown), step
        )

    def text(self, message):
        """A line for the console."""
        if self.is_main:
            print(message, flush=True)

    @contextlib.contextmanager
    def paused(self):
        """What runs inside (evaluation, saving, samples) does not count in the tokens per second."""
        began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - began

    def close(self):
        if self.is_main:
            self.file.close()
            self.board.close()

    def _write(self, kind, step, metrics, words):
        """All metrics go to the files. The console gets the first ones, as many as WIDTH takes."""
        if not self.is_main or not self._record(kind, step, metrics):
            return
        for name, value in metrics.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        head = "step" if kind == "train" else kind
        head = f"{head} {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        if kind not in self.columns:  # chosen once, so that all lines show the same
            room = WIDTH - len(" | ".join([head, *words]))
            names = [name for name in metrics if name not in IN_WORDS]
            # two more characters each, for numbers that grow
            sizes = itertools.accumulate(len(f" | {n} {show(metrics[n])}") + 2 for n in names)
            self.columns[kind] = [n for n, size in zip(names, sizes, strict=True) if size <= room]
        shown = [f"{n} {show(metrics[n])}" for n in self.columns[kind] if n in metrics]
        print(" | ".join([head, *shown, *words]), flush=True)

    def _record(self, kind, step, values):
        if (kind, step) in self.known:
            return False
        self.file.write(dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values))
        return True


def keep(path, step):
    """The records of a log up to `step`. A last line that a crash cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [r for r in records if r["step"] <= step]


def plain(value):
    return value.item() if hasattr(value, "item") else value


def dumps(record):
    """One line of strict JSON: a number that is not finite becomes null."""

    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(record), allow_nan=False) + "\n"


def show(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10_000 and math.isfinite(value):
        return f"{value:,.0f}"
    return (
        f"{value:.3f}"
        if value == 0 or abs(value) >= 1e-3 or not math.isfinite(value)
        else f"{value:.1e}"
    )


def duration(seconds):
    """4m12s, 1h03m, 2d04h."""
    s = max(round(seconds), 0)
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
    return (
        f"{s // 3600}h{s % 3600 // 60:02d}m"
        if s < 86400
        else f"{s // 86400}d{s % 86400 // 3600:02d}h"
    )


def table(rows, width, lines=8):
    """Rows of one set of keys as text, at most `width` columns wide where it can be, each cell at most `lines` high."""
    # a model may write anything: control characters must not reach the terminal
    cells = [list(rows[0])] + [[show(v) for v in row.values()] for row in rows]
    cells = [
        ["".join(c if c.isprintable() else "⏎ " if c == "\n" else " " for c in cell) for cell in r]
        for r in cells
    ]
    natural = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    room, widths = width - 3 * (len(natural) - 1), list(natural)
    for i, c in enumerate(
        sorted(range(len(natural)), key=natural.__getitem__)
    ):  # narrow columns leave room to wide
        widths[c] = min(natural[c], max(room // (len(natural) - i), 8))
        room -= widths[c]
    out = []
    for r in cells:
        pairs = zip(r, widths, strict=True)
        wrapped = [
            textwrap.wrap(cell, w, max_lines=lines, placeholder=" ...") or [""] for cell, w in pairs
        ]
        for i in range(max(map(len, wrapped))):
            line = (c[i] if i < len(c) else "" for c in wrapped)
            out.append(" | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip())
        out.append("-+-".join("-" * w for w in widths))
    return "\n".join(out)
