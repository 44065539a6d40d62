"""How fast prepare/text.py is, and how much memory it takes, on text that every machine has: Python's own library.

    python -m bench.prepare_text mb=1000 tokenizer=models/smollm2
    python -m bench.prepare_text mb=1000 tokenizer=train:8000 format=txt

The sources of the standard library and pydoc's topics, one document a file, are repeated until `mb` megabytes are written;
repetition makes caches look good, but pieces of text repeat in any corpus: compare it with your own (source=).
Prints one line of JSON. The speed is of the whole command, start and assembly of the store included.
"""

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
from nano.config import NonNegativeInt

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    mb: int = 1000  # megabytes of text to make
    source: str = ""  # your own text instead
    format: Literal["jsonl", "txt"] = "jsonl"
    tokenizer: str = "train:8000"  # as in prepare/text.py
    kind: str = "sentencepiece"
    workers: NonNegativeInt = 2
    out: str = "out/bench/text"


def documents():
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")
    yield from pydoc_data.topics.topics.values()


def make_text(path, size, format):
    texts, written = list(documents()), 0
    with open(path, "w", encoding="utf-8") as f:
        while written < size:
            for text in texts:
                f.write(
                    json.dumps({"text": text}, ensure_ascii=False) + "\n"
                    if format == "jsonl"
                    else text + "<|endoftext|>"
                )
                written += len(text)
                if written >= size:
                    break


def watch(pid, peak):
    """Adds up the resident memory of a process and its children, a few times a second."""
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
    ]
    command += [f"workers={cfg.workers}", f"out={out / 'store'}"]
    command += ["separator=<|endoftext|>"] if cfg.format == "txt" else []
    began, peak = time.perf_counter(), []
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    watcher = threading.Thread(target=watch, args=(child.pid, peak), daemon=True)
    watcher.start()
    said = child.communicate()[0]
    seconds = time.perf_counter() - began
    if child.returncode:
        raise config.UserError(f"prepare.text failed: {said}")
    meta = json.loads((out / "store" / "meta.json").read_text())
    size, tokens = sum(meta["bytes"].values()), sum(s["tokens"] for s in meta["splits"].values())
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            dict(
                tokenizer=cfg.tokenizer,
                kind=cfg.kind,
                format=cfg.format,
                workers=cfg.workers,
                megabytes=round(size / 1e6, 1),
                tokens=tokens,
                seconds=round(seconds, 1),
                mb_per_s=round(size / 1e6 / seconds, 2),
                mb_per_cpu_s=round(size / 1e6 / (cpu.ru_utime + cpu.ru_stime), 2),
                peak_rss_gb=round(max(peak) / 2**20, 2),
                load=round(os.getloadavg()[0], 1),
            )
        )
    )


if __name__ == "__main__":
    config.run(main, Config)
