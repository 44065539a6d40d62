"""One log for every stage: a console line, `log.jsonl`, TensorBoard events, tables of samples.

    log = Log(out, rt, start_step, track="wandb:PROJECT")
    log.settings("sft", cfg)
    log.begin(total_steps, flops_per_token)
    log.step(step, tokens=n, targets=m, memory=rt.peak_memory(), loss=loss, lr=lr)
    with log.paused():
        log.eval(step, loss=val_loss, accuracy=accuracy)
    log.samples(step, [{"prompt": "...", "response": "..."}])

A step is counted when it is done: the first is 1, and step 0 is the untrained model. Metrics may be
0-d tensors on any device. They are read here and nowhere else. Every rank makes the same calls, and
the main one writes.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import math
import re
import shutil
import signal
import statistics
import sys
import textwrap
import time
import uuid
from collections import deque
from pathlib import Path

from nano import config, files
from nano.config import UserError

# Peak dense bf16 FLOP/s (fp32 accumulation) from the makers' data sheets, by words of the device's
# name. That of V100 is fp16.
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
    """FLOP/s of one device by its name ("NVIDIA H100 80GB HBM3"), None if the table lacks it."""
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device, re.I):
            return peak


WIDTH = 120  # columns of a line on the console
TRACKERS = ("wandb", "trackio")  # packages of the same interface


class Log:
    """What a run says: on the console, in dir/log.jsonl, in TensorBoard events, and to a tracker.

    dir: the run folder. rt: the Runtime. start_step: the steps done before a resume. What an
    earlier run wrote after that step is dropped. track: "wandb:PROJECT" or "trackio:PROJECT"; "":
    no tracker. Every rank makes the same calls, and the main one writes.
    """

    def __init__(self, dir, rt, start_step=0, track=""):
        self.dir = Path(dir)
        self.rt = rt
        self.is_main = rt.is_main
        self.start_step = start_step
        self.peak = (peak_flops(rt.name) or 0.0) * rt.devices
        self.columns = {}  # kind of line: the names of its metrics that the console shows
        self.recent = deque(maxlen=20)  # losses of the last training lines
        self.tracker = None
        self.begin(0)
        kind, _, project = track.partition(":")
        if not self.is_main:
            return
        # The import takes a quarter of a second, which other ranks need not wait.
        from torch.utils.tensorboard import SummaryWriter

        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "log.jsonl"
        records, damaged = read_records(path) if start_step else ([], 0)
        if damaged:
            self.text(f"note: {path} had {damaged} damaged lines, which are left out")
        records = [r for r in records if r["step"] <= start_step]
        # An evaluation at start_step may be there already, from before the stop.
        self.known = {(r["kind"], r["step"]) for r in records if r["step"] == start_step}
        losses = [r.get("loss") for r in records if r["kind"] == "train"]
        self.recent.extend(loss for loss in losses if loss is not None)
        files.write_text(path, "".join(map(dumps, records)))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # line by line: `tail -f` works
        self.board = SummaryWriter(str(dir), purge_step=start_step + 1 if start_step else None)
        if track:
            ids = [r["id"] for r in records if r["kind"] == "tracker"]  # of the run that goes on
            self.id = ids[0] if ids else f"{self.dir.resolve().name}-{uuid.uuid4().hex[:8]}"
            if not ids:
                self._record("tracker", 0, {"id": self.id})
            self.tracker = start_tracker(kind, project, self.id)

    def begin(self, total_steps, flops_per_token=0.0):
        """Starts the clock. flops_per_token: of forward and backward, for the FLOPs utilisation."""
        self.total_steps = total_steps
        self.flops = flops_per_token
        self.began = self.mark = time.perf_counter()  # mark: from when the next line counts tokens

    def settings(self, stage, cfg, old=""):
        """Says what differs from the defaults, and from `old`, the .cfg text of the settings with
        which the state of a run that goes on was saved.

        Then it writes config.cfg, with resume=auto, so that the file continues the run."""
        if self.is_main:
            text = config.to_cfg(dataclasses.replace(cfg, resume="auto"))
            files.write_text(self.dir / "config.cfg", text)
        if self.tracker:
            self.tracker.config.update(config.texts(cfg))
        self.text(" ".join([f"{stage}:", *config.diff(cfg)]))
        if changed := config.changes(cfg, old):
            self.text(f"note: the run goes on with other settings: {', '.join(changed)}")

    def step(self, step, tokens=0, targets=0, memory=0, **metrics):
        """The line of a training step.

        tokens, targets: of all ranks since the last line. memory: peak bytes of a device."""
        metrics = plain(metrics)  # reading them waits for the device, which belongs to the time
        now = time.perf_counter()
        seconds = now - self.mark
        self.mark = now
        pace = (now - self.began) / max(step - self.start_step, 1)  # seconds a step
        rates, words = {}, []
        if tokens:
            rates["tokens_per_s"] = speed = int(tokens) / seconds
            words.append(f"{speed:,.0f} tok/s")
        if targets:
            rates["targets_per_s"] = int(targets) / seconds
        if tokens and self.flops and self.peak:
            rates["mfu"] = speed * self.flops / self.peak
            words.append(f"mfu {rates['mfu']:.1%}")
        if memory:
            rates["memory_gb"] = memory / 1e9
            words.append(f"mem {memory / 1e9:.1f} GB")
        words.append(f"eta {duration(pace * (self.total_steps - step))}")
        self._write("train", step, metrics, rates, words)
        loss = metrics.get("loss", math.nan)
        if words := spike(loss, self.recent):
            self.text(f"warning at step {step}: {words}")
        if math.isfinite(loss):
            self.recent.append(loss)

    def eval(self, step, **metrics):
        """The line of an evaluation."""
        self._write("eval", step, plain(metrics), {}, [])

    def samples(self, step, rows):
        """A table of what the model writes: one dict a row, the same keys in each."""
        rows = [plain(row) for row in rows]
        if not self.is_main or not rows or not self._record("samples", step, {"rows": rows}):
            return
        head = list(rows[0])
        body = [[show(value) for value in row.values()] for row in rows]
        width = shutil.get_terminal_size().columns
        self.text(f"samples at step {step}\n{table([head, *body], width)}")
        markdown = []
        for cells in head, ["---"] * len(head), *body:
            line = " | ".join(cell.replace("|", "\\|") for cell in cells)
            markdown.append(f"| {line} |".replace("\n", "<br>"))
        self.board.add_text("samples", "\n".join(markdown), step)

    def text(self, message):
        """A line for the console. Where its reader has left (`| head`), the run stops and saves."""
        if self.is_main and not config.say(message):
            self.rt.signal = self.rt.signal or signal.SIGPIPE

    @contextlib.contextmanager
    def paused(self):
        """A context whose time (evaluation, saving, samples) does not count in the tokens per
        second."""
        began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - began

    def close(self):
        """Closes the files and ends the tracker's run. A second call does nothing."""
        if self.is_main:
            self.file.close()
            self.board.close()
        if self.tracker:
            self.tracker.finish()
        self.tracker = None

    def _write(self, kind, step, metrics, rates, words):
        """Writes metrics and rates to the files.

        The console gets `words`, which say the rates, and the first metrics, as many as WIDTH
        takes."""
        if not self.is_main or not self._record(kind, step, metrics | rates):
            return
        values = {f"{kind}/{name}": value for name, value in (metrics | rates).items()}
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(values, step=step)
        head = "step" if kind == "train" else kind
        head = f"{head} {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        if kind not in self.columns:  # chosen once, so that all lines show the same
            room = WIDTH - len(" | ".join([head, *words]))
            # two more characters each, for numbers that grow
            sizes = itertools.accumulate(len(f" | {n} {show(v)}") + 2 for n, v in metrics.items())
            self.columns[kind] = [n for n, size in zip(metrics, sizes, strict=True) if size <= room]
        shown = [f"{n} {show(metrics[n])}" for n in self.columns[kind] if n in metrics]
        self.text(" | ".join([head, *shown, *words]))

    def _record(self, kind, step, values):
        """Writes a line of log.jsonl. False if it is there already."""
        if (kind, step) in self.known:
            return False
        self.file.write(dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values))
        return True


def read_records(path):
    """(the records of a log.jsonl, how many of its lines are damaged)."""
    records, damaged = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            if not isinstance(record["kind"], str) or type(record["step"]) is not int:
                raise TypeError
            records.append(record)
        except (ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError
            damaged += 1
    return records, damaged


def check_tracker(track):
    """UserError for a track= that names no tracker, and where its package is missing."""
    kind, _, project = track.partition(":")
    if track and (kind not in TRACKERS or not project):
        raise UserError(f"track={track}: use wandb:PROJECT or trackio:PROJECT")
    there = kind in sys.modules and sys.modules[kind]
    if track and not there and (kind in sys.modules or not importlib.util.find_spec(kind)):
        raise UserError(f"track={kind} needs the package: pip install {kind}")


def start_tracker(kind, project, id):
    """A run of the package `kind`, with .config, .log and .finish. The id says which run goes on.

    UserError where the package cannot be imported, and where it cannot start."""
    try:
        package = importlib.import_module(kind)
    except ImportError as e:
        raise UserError(f"track={kind}: the package cannot be imported ({e})") from None
    try:
        known = dict(id=id) if kind == "wandb" else {}  # trackio knows a run by its name
        return package.init(project=project, name=id, resume="allow", **known)
    except Exception as e:  # whatever the package and the network come up with
        raise UserError(f"track={kind}:{project}: {kind} cannot start: {e}") from None


def spike(loss, recent):
    """What a jump of the loss means, in words; None where there is none.

    recent: the losses of the lines before. A jump leads beyond all of them, by twice their range or
    more, and to 1.5 times their median or more."""
    if len(recent) < 8 or not math.isfinite(loss):
        return None
    low, middle, high = min(recent), statistics.median(recent), max(recent)
    if loss > high + 2 * (high - low) and loss > middle + 0.5 * abs(middle):
        return (
            f"the loss jumped to {show(loss)} from about {show(middle)}: if it stays up, lower lr= "
            "or grad_clip=, or take a longer warm-up; if it comes back, look at the rows of this "
            "step"
        )


def plain(values):
    """A dict with its tensors as numbers."""
    return {name: x.item() if hasattr(x, "item") else x for name, x in values.items()}


def dumps(record):
    """One line of strict JSON. A number that is not finite becomes null.

    json.dumps has no such option. json.loads has: it hands over each NaN and Infinity."""
    return json.dumps(json.loads(json.dumps(record), parse_constant=lambda name: None)) + "\n"


def show(value):
    """A value as text of a few characters: 12,345, 0.123, 1.0e-04."""
    if type(value) not in (int, float):
        return str(value)
    if type(value) is int or 10_000 <= abs(value) < math.inf:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"


def duration(seconds):
    """4m12s, 1h03m, 2d04h."""
    minutes, s = divmod(max(round(seconds), 0), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


def table(rows, width, lines=8):
    """Rows of texts as one text, at most `width` columns wide where it can be, each cell at most
    `lines` high."""
    # A model may write anything. Control characters must not reach the terminal.
    cells = [[printable(text) for text in row] for row in rows]
    # at least as wide as the dots of a cell that is cut short
    widths = [max(4, *map(len, column)) for column in zip(*cells, strict=True)]
    room = width - 3 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > 8:  # the widest column gives way
        widths[widths.index(max(widths))] -= 1
    out = []
    for r in cells:
        wrapped = [
            textwrap.wrap(cell, w, max_lines=lines, placeholder=" ...") or [""]
            for cell, w in zip(r, widths, strict=True)
        ]
        for line in itertools.zip_longest(*wrapped, fillvalue=""):
            padded = (text.ljust(w) for text, w in zip(line, widths, strict=True))
            out.append(" | ".join(padded).rstrip())
        out.append("-+-".join("-" * w for w in widths))
    return "\n".join(out)


def printable(text):
    """Text for a terminal: no line breaks, and no control characters."""
    text = text.replace("\n", "⏎ ")
    return "".join(c if c.isprintable() else " " for c in text)
