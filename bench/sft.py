"""Speed and memory of fine-tuning, beside TRL's SFTTrainer (bench/sft_trl.py) on the same rows: full and LoRA, both in bf16.

    python -m bench.sft data=alpaca_en_demo.json                                     # sft.py, TRL padded, TRL packed
    python -m bench.sft data=alpaca_en_demo.json sides=[ours,compiled,trl] steps=40 repeats=1
    python -m bench.sft data=alpaca_en_demo.json device=cuda model=DIR micro_batch=16 max_length=1024 trl_batch=80

`data` holds instruction records of a shape that prepare.instructions reads. Every run is a process of its own, the sides take
turns, and the table shows medians. Tokens are real ones, without padding, from the second step on (compiled: after half of the
steps); peak memory is the process's largest resident set, on a GPU what torch allocated there; the first step counts from the
start of the process to the end of the first optimizer step. Of TRL the step alone is timed, and its process start is not, which
favours it a little.
"""

import importlib.metadata
import json
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
from nano.config import NonNegativeInt, PositiveInt, UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    data: str  # instruction records: JSON or JSONL
    model: str = "models/smollm2"
    out: str = "out/bench/sft"  # scratch folder
    methods: tuple[Literal["full", "lora"], ...] = ("full", "lora")
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
    threads: int = 2


def prepare(cfg):
    """The same rows for both: a prepared folder."""
    keys = [
        f"source={cfg.data}",
        f"model={cfg.model}",
        f"out={cfg.out}/data",
        f"max_length={cfg.max_length}",
    ]
    subprocess.run(
        [sys.executable, "-m", "prepare.instructions", *keys, "over_length=truncate"],
        cwd=ROOT,
        check=True,
    )


def command(cfg, side, method):
    """The command line of one run; both scripts take key=value."""
    common = dict(
        model=cfg.model,
        out=f"{cfg.out}/run",
        steps=cfg.steps,
        micro_batch=cfg.micro_batch,
        max_length=cfg.max_length,
        lora_rank=cfg.lora_rank if method == "lora" else 0,
        lora_alpha=32,
    )
    if side.startswith("trl"):
        script = ["-m", "bench.sft_trl"]
        keys = dict(
            data=f"{cfg.out}/data",
            accumulate=cfg.accumulate,
            packing=side == "trl-packed",
            threads=cfg.threads,
        )
        if side == "trl" and cfg.trl_batch:
            keys["micro_batch"] = cfg.trl_batch
    else:
        script = ["sft.py"]
        keys = dict(
            data=f"{cfg.out}/data",
            batch_size=cfg.micro_batch * cfg.accumulate,
            compile=side == "compiled",
            device=cfg.device,
            dtype="bfloat16",
            log_every=1,
            samples=0,
            save_every=10**9,
        )
    return [sys.executable, *script, *(f"{key}={value}" for key, value in (common | keys).items())]


def measure(cfg, side, method):
    """One run -> (real tokens/s, peak memory in GB, seconds to the end of the first step)."""
    folder = Path(cfg.out)
    shutil.rmtree(folder / "run", ignore_errors=True)
    with open(folder / "output.txt", "w+", encoding="utf-8") as output:
        began = time.time()
        environment = os.environ | dict(OMP_NUM_THREADS=str(cfg.threads))
        child = subprocess.Popen(
            command(cfg, side, method),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().splitlines()
    if child.returncode:
        raise UserError(
            f"{side} ({method}) ended with status {child.returncode}; {folder / 'output.txt'} ends: {lines[-1:]}"
        )
    memory = usage.ru_maxrss / 1e6 * (1e-3 if sys.platform == "darwin" else 1.024)
    if side.startswith("trl"):
        said = json.loads(lines[-1])
        return said["real_tokens_per_s"], said.get("peak_device_gb", memory), said["first_step_s"]
    log = [json.loads(line) for line in open(folder / "run" / "log.jsonl", encoding="utf-8")]
    log = [record for record in log if record["kind"] == "train"]
    if cfg.device == "cuda":
        memory = log[-1]["memory_gb"]
    timed = range(len(log) // 2 if side == "compiled" else 1, len(log))
    seconds = [log[i]["time"] - log[i - 1]["time"] for i in timed]
    tokens = [log[i]["tokens_per_s"] * s for i, s in zip(timed, seconds, strict=True)]
    return sum(tokens) / sum(seconds), memory, log[0]["time"] - began


def machine(cfg):
    """What a figure depends on, in one line."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        model = next(
            (x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")),
            model,
        )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "trl", "peft")
    )
    load = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start"
    if cfg.device == "cuda":
        import torch

        model = f"{torch.cuda.get_device_name()}, {model}"
    return f"{model}, {load}; Python {platform.python_version()}, {versions}"


def main(cfg):
    if cfg.steps < 2 or cfg.repeats < 1:
        raise UserError(
            f"steps={cfg.steps} repeats={cfg.repeats}: the first step is not timed, so 2 steps and 1 repeat at least"
        )
    about = machine(cfg)
    prepare(cfg)
    results = {(method, side): [] for method in cfg.methods for side in cfg.sides}
    for _ in range(cfg.repeats):
        for (method, side), runs in results.items():
            try:
                runs.append(measure(cfg, side, method))
            except UserError as e:  # out of memory, mostly: the others go on
                print(e, flush=True)
                continue
            speed, memory, first = runs[-1]
            print(
                f"{method} {side}: {speed:.0f} tokens/s, {memory:.2f} GB, first step after {first:.1f} s",
                flush=True,
            )
    if not any(results.values()):
        raise UserError("every run failed")
    shutil.rmtree(Path(cfg.out) / "run", ignore_errors=True)

    rows = f"{cfg.micro_batch} x {cfg.max_length} tokens (TRL padded: {cfg.trl_batch or cfg.micro_batch} rows)"
    shape = f"{rows}, {cfg.accumulate} forwards a step, {cfg.steps} steps"
    print(f"\n{about}; {cfg.threads} threads, {shape}, medians of {cfg.repeats}\n")
    print(
        "| training | program | real tokens/s | x TRL padded | peak memory, GB | x TRL padded | first step, s |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (method, side), runs in results.items():
        if not runs:
            print(f"| {method} | {side} | failed | | | | |")
            continue
        speed, memory, first = (statistics.median(column) for column in zip(*runs, strict=True))
        peer = results.get((method, "trl"))
        peer = (
            [statistics.median(column) for column in zip(*peer, strict=True)]
            if peer
            else [float("nan")] * 3
        )
        print(
            f"| {method} | {side} | {speed:.0f} | {speed / peer[0]:.2f} | {memory:.2f} | {memory / peer[1]:.2f} | {first:.1f} |"
        )


if __name__ == "__main__":
    config.run(main, Config)
