"""How fast prepare/text.py is, and how much memory it takes, on text that every machine has.

    python -m bench.prepare_text mb=1000 tokenizer=models/smollm2
    python -m bench.prepare_text mb=1000 tokenizer=train:8000 format=txt

The text is Python's own library, one document a file, and pydoc's topics, repeated until `mb`
megabytes are written. Repetition makes caches look good. Pieces of text repeat in any corpus, so
compare it with your own (source=). Prints one line of JSON. The speed is of the whole command,
which includes its start and the assembly of the store.
"""

import itertools
import json
import os
import pydoc_data.topics
import resource
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config
from nano.config import NonNegativeInt, PathText

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    mb: int = 1000  # megabytes of text to make
    source: PathText = ""  # your own text instead
    format: Literal["jsonl", "txt"] = "jsonl"
    tokenizer: PathText = "train:8000"  # as in prepare/text.py
    kind: str = "sentencepiece"
    workers: NonNegativeInt = 2
    out: PathText = "out/bench/text"


def documents():
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")
    yield from pydoc_data.topics.topics.values()


def make_text(path, size, format):
    written = 0
    with open(path, "w", encoding="utf-8") as f:
        for text in itertools.cycle(list(documents())):
            if format == "jsonl":
                f.write(json.dumps(dict(text=text), ensure_ascii=False) + "\n")
            else:
                f.write(text + "<|endoftext|>")
            written += len(text)
            if written >= size:
                break


def watch(pid, peak):
    """Appends the resident KiB of a process and its children to `peak`, three times a second."""
    while True:
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:
                continue
            if pid in (int(fields["Pid"]), int(fields["PPid"])) and "VmRSS" in fields:
                total += int(fields["VmRSS"].split()[0])
        peak.append(total)
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.3)


def main(cfg):
    out = Path(cfg.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    source = Path(cfg.source or out / f"text-{cfg.mb}.{cfg.format}")
    if not source.exists():
        make_text(source, cfg.mb * 1e6, cfg.format)
    shutil.rmtree(out / "store", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "prepare.text",
        f"source={source}",
        f"tokenizer={cfg.tokenizer}",
        f"kind={cfg.kind}",
        f"workers={cfg.workers}",
        f"out={out / 'store'}",
    ]
    command += ["separator=<|endoftext|>"] if cfg.format == "txt" else []
    began = time.perf_counter()
    env = os.environ | dict(OMP_NUM_THREADS="1")
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    peak = []
    watcher = threading.Thread(target=watch, args=(child.pid, peak), daemon=True)
    watcher.start()
    output = child.communicate()[0]
    seconds = time.perf_counter() - began
    if child.returncode:
        raise config.UserError(f"prepare.text failed: {output}")
    meta = json.loads((out / "store" / "meta.json").read_text())
    size = sum(meta["bytes"].values()) / 1e6
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = dict(
        tokenizer=cfg.tokenizer,
        kind=cfg.kind,
        format=cfg.format,
        workers=cfg.workers,
        megabytes=round(size, 1),
        tokens=sum(split["tokens"] for split in meta["splits"].values()),
        seconds=round(seconds, 1),
        mb_per_s=round(size / seconds, 2),
        mb_per_cpu_s=round(size / (cpu.ru_utime + cpu.ru_stime), 2),
        peak_rss_gb=round(max(peak) / 2**20, 2),
        load=round(os.getloadavg()[0], 1),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    config.run(main, Config)
