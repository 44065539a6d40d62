"""Speed and memory of fine-tuning, full, LoRA and QLoRA (nf4), beside bench/sft_trl.py.

    python -m bench.sft data=alpaca_en_demo.json                   # sft.py, TRL padded, TRL packed
    python -m bench.sft data=alpaca_en_demo.json 'sides=[ours,compiled,trl]' steps=40 repeats=1
    python -m bench.sft data=alpaca_en_demo.json device=cuda model=DIR micro_batch=16 trl_batch=80

`data` holds instruction records of a shape that prepare.instructions reads. Every run is a process
of its own, the sides take turns, and the table shows medians.

Tokens are real ones, without padding, from the second step on, and of a compiled run after half of
its steps. Peak memory is the process's largest resident set, and on a GPU what torch allocated
there. The first step counts from the start of the process to the end of the first optimizer step.
Of TRL the step alone is timed, and its process start is not, which favours it a little.
"""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    data: PathText  # instruction records: JSON or JSONL
    model: PathText = "models/smollm2"
    out: PathText = "out/bench/sft"  # scratch folder
    methods: tuple[Literal["full", "lora", "qlora"], ...] = ("full", "lora")
    sides: tuple[Literal["ours", "compiled", "trl", "trl-packed"], ...] = (
        "ours",
        "trl",
        "trl-packed",
    )
    steps: NonNegativeInt = 8  # optimizer steps of a run
    repeats: int = 3
    micro_batch: PositiveInt = 4  # rows of one forward
    accumulate: int = 1  # forwards of one optimizer step
    max_length: PositiveInt = 512
    trl_batch: int = 0  # rows of TRL's padded forward, which hold a document each; 0: micro_batch
    lora_rank: NonNegativeInt = 16
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the matrix work
    threads: int = 2


def python(*script, **keys):
    """The command that runs a script with key=value arguments."""
    return [sys.executable, *script, *(f"{key}={value}" for key, value in keys.items())]


def prepare(cfg):
    """The same rows for both: a prepared folder."""
    keys = dict(
        source=cfg.data,
        model=cfg.model,
        out=f"{cfg.out}/data",
        max_length=cfg.max_length,
        over_length="truncate",
    )
    subprocess.run(python("-m", "prepare.instructions", **keys), cwd=ROOT, check=True)


def command(cfg, side, method):
    """The command line of one run; both scripts take key=value."""
    common = dict(
        model=cfg.model,
        data=f"{cfg.out}/data",
        out=f"{cfg.out}/run",
        steps=cfg.steps,
        micro_batch=cfg.micro_batch,
        max_length=cfg.max_length,
        lora_rank=0 if method == "full" else cfg.lora_rank,
        lora_alpha=32,
        quant="nf4" if method == "qlora" else "none",
        dtype=cfg.dtype,
    )
    if side.startswith("trl"):
        if side == "trl" and cfg.trl_batch:
            common["micro_batch"] = cfg.trl_batch
        return python(
            "-m",
            "bench.sft_trl",
            **common,
            accumulate=cfg.accumulate,
            packing=side == "trl-packed",
            threads=cfg.threads,
        )
    return python(
        "sft.py",
        **common,
        batch_size=cfg.micro_batch * cfg.accumulate,
        compile=side == "compiled",
        device=cfg.device,
        log_every=1,
        samples=0,
        save_every=10**9,
    )


def finish(command, path, threads):
    """Runs a command with its output in the file `path` -> (its last line, peak memory in GB)"""
    env = os.environ | dict(OMP_NUM_THREADS=str(threads))
    with open(path, "w", encoding="utf-8") as output:
        pipes = dict(stdout=output, stderr=subprocess.STDOUT)
        child = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    last = ["", *path.read_text(encoding="utf-8").splitlines()][-1]
    if child.returncode:
        raise UserError(f"status {child.returncode} of {' '.join(command)}; {path} ends: {last}")
    return last, usage.ru_maxrss / 1e6 * (1e-3 if sys.platform == "darwin" else 1.024)


def measure(cfg, side, method):
    """One run -> (real tokens/s, peak memory in GB, seconds to the end of the first step)."""
    folder = Path(cfg.out)
    shutil.rmtree(folder / "run", ignore_errors=True)
    began = time.time()
    last, memory = finish(command(cfg, side, method), folder / "output.txt", cfg.threads)
    if side.startswith("trl"):
        result = json.loads(last)
        memory = result.get("peak_device_gb", memory)
        return result["real_tokens_per_s"], memory, result["first_step_s"]
    log = [json.loads(line) for line in open(folder / "run" / "log.jsonl", encoding="utf-8")]
    log = [record for record in log if record["kind"] == "train"]
    if cfg.device == "cuda":
        memory = log[-1]["memory_gb"]
    timed = range(len(log) // 2 if side == "compiled" else 1, len(log))
    seconds = [log[i]["time"] - log[i - 1]["time"] for i in timed]
    tokens = [log[i]["tokens_per_s"] * s for i, s in zip(timed, seconds, strict=True)]
    return sum(tokens) / sum(seconds), memory, log[0]["time"] - began


def machine(device, packages=()):
    """What a figure depends on, in one line."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = (
            x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")
        )
        model = next(names, model)
    packages = ["torch", "transformers", *packages]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start"
    if device == "cuda":
        import torch

        model = f"{torch.cuda.get_device_name()}, {model}"
    return f"{model}, {load}; Python {platform.python_version()}, {versions}"


def main(cfg):
    if cfg.steps < 2 or cfg.repeats < 1:
        raise UserError(
            f"steps={cfg.steps} repeats={cfg.repeats}: take 2 steps or more, for the first is not "
            "timed, and 1 repeat or more"
        )
    quantised = ["bitsandbytes"] if "qlora" in cfg.methods else []
    about = machine(cfg.device, ["trl", "peft", *quantised])
    prepare(cfg)
    results = {(method, side): [] for method in cfg.methods for side in cfg.sides}
    for _ in range(cfg.repeats):
        for (method, side), runs in results.items():
            try:
                runs.append(measure(cfg, side, method))
            except UserError as e:  # mostly out of memory, and the other runs go on
                print(e, flush=True)
                continue
            speed, memory, first = runs[-1]
            figures = f"{speed:.0f} tokens/s, {memory:.2f} GB, first step after {first:.1f} s"
            print(f"{method} {side}: {figures}", flush=True)
    if not any(results.values()):
        raise UserError("every run failed")
    shutil.rmtree(Path(cfg.out) / "run", ignore_errors=True)

    print(
        f"\n{about}; {cfg.threads} threads, {cfg.dtype}, {cfg.micro_batch} x {cfg.max_length} "
        f"tokens (TRL padded: {cfg.trl_batch or cfg.micro_batch} rows), {cfg.accumulate} forwards "
        f"a step, {cfg.steps} steps, medians of {cfg.repeats}\n"
    )
    columns = "real tokens/s | x TRL padded | peak memory, GB | x TRL padded | first step, s"
    print(f"| training | program | {columns} |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    medians = {
        key: [*map(statistics.median, zip(*runs, strict=True))]
        for key, runs in results.items()
        if runs
    }
    for method, side in results:
        if (method, side) not in medians:
            print(f"| {method} | {side} | failed | | | | |")
            continue
        speed, memory, first = medians[method, side]
        peer_speed, peer_memory, _ = medians.get((method, "trl"), [math.nan] * 3)
        cells = (
            f"{speed:.0f} | {speed / peer_speed:.2f} | {memory:.2f} | {memory / peer_memory:.2f}"
        )
        print(f"| {method} | {side} | {cells} | {first:.1f} |")


if __name__ == "__main__":
    config.run(main, Config)
