"""Kills of the five stages and of four prepare scripts at random moments, each followed by a
resume.

    OMP_NUM_THREADS=1 python -m bench.soak kills=200

Each script first runs to its end. Then it runs again under another name, is killed with SIGKILL at
a random moment of that time, and the same command runs to its end. The two folders must hold the
same files, byte for byte (of the log: but for time and speed). Nothing may be left beside the
folder, and no run may print a traceback. The model is that of the toy path, smaller still.

A process that has imported everything forks each run, because an import takes longer than a run.
"""

import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nano import config
from nano.config import PositiveInt, Seed, UserError

COMMON = "device=cpu dtype=float32 save_every=1 log_every=1 keep_last=2"
TUNE = f"{COMMON} eval_every=1 batch_size=4 steps=4"
# what the others start from, in turn: {name: script and its settings}; {d} is their folder
SOURCES = dict(
    toy="prepare.toy task=reviews rows=200 test=20 out={d}/data",
    text="prepare.text source={d}/data/pretrain.jsonl tokenizer={d}/data/tokenizer out={d}/text",
    base="pretrain data={d}/text size=toy max_length=32 micro_batch=4 sample_tokens=0 out={d}/base "
    + TUNE,
    rows="prepare.instructions source={d}/data/sft.jsonl model={d}/base/last template=plain val=20 "
    "workers=2 out={d}/rows",
    sft="sft model={d}/base/last data={d}/rows samples=0 out={d}/sft " + TUNE,
    ranked="prepare.toy task=preferences rows=40 model={d}/sft/last out={d}/data",
    groups="prepare.preferences source={d}/data/preferences.jsonl model={d}/sft/last "
    "template=plain val=8 out={d}/groups",
    score="reward model={d}/sft/last data={d}/groups norm_samples=8 norm_tokens=8 samples=0 "
    "out={d}/score " + TUNE,
)
# what is killed
JOBS = {
    "prepare.text": SOURCES["text"],
    "prepare.instructions": SOURCES["rows"],
    "prepare.preferences": SOURCES["groups"],
    "prepare.weights": "prepare.weights source={d}/sft/last dtype=bfloat16 out={d}/copy",
    "pretrain": SOURCES["base"] + " optimizer=muon",
    "sft": SOURCES["sft"] + " lora_rank=2",
    "reward": SOURCES["score"] + " ema=0.9",
    "dpo": "dpo model={d}/sft/last data={d}/groups samples=0 out={d}/dpo " + TUNE,
    "ppo": "ppo model={d}/sft/last reward={d}/score/last data={d}/groups batch_size=4 "
    f"micro_batch=4 steps=3 max_new_tokens=8 sample_every=-1 out={{d}}/ppo {COMMON}",
}


@dataclass
class Config:
    kills: PositiveInt = 200  # of all scripts together, in turn
    out: str = "out/soak"  # folder for everything; a failure's stays there
    seed: Seed = 0  # of the moments


def start(line, output):
    """Forks a run of a script, as `python` would run it -> its process id."""
    name, *argv = shlex.split(line)
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(output, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        script = importlib.import_module(name)
        sys.argv = [name, *argv]
        config.run(script.main, script.Config)
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finish(line, output):
    """Runs a script to its end -> seconds. UserError if it fails or prints a traceback."""
    began = time.perf_counter()
    _, status = os.waitpid(start(line, output), 0)
    text = Path(output).read_text()
    if status or "Traceback" in text:
        raise UserError(f"status {status} of: {line}\n{text[-3000:]}")
    return time.perf_counter() - began


def contents(dir):
    """{path: bytes} of what two equal runs have in common."""
    held = {}
    for path in sorted(p for p in Path(dir).rglob("*") if p.is_file()):
        name = str(path.relative_to(dir))
        if path.name == "log.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            held[name] = [
                {k: v for k, v in r.items() if k not in ("time", "memory_gb") and k[-2:] != "_s"}
                for r in records
            ]
        elif path.name == "config.cfg":
            lines = path.read_text().splitlines()
            held[name] = [line for line in lines if not line.startswith("out=")]
        elif "tfevents" not in path.name:  # a file a start, with its time in the name
            held[name] = path.read_bytes()
    return held


def kill(line, whole, dir, output, moment):
    """Kills a run after `moment` seconds, and lets the same command finish.

    Returns what was there when it died: "nothing", "a folder" or "a state"; "done" if it had ended.
    UserError where something is lost or left."""
    pid = start(line, output)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    text = Path(output).read_text()
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL) or "Traceback" in text:
        raise UserError(f"status {code} of: {line}\n{text[-3000:]}")
    if not code:
        return "done"
    there = "nothing"
    if (dir / "state").exists():
        there = "a state"
    elif dir.exists() or list(dir.parent.glob(dir.name + ".*")):
        there = "a folder"
    finish(line, output)
    a, b = contents(whole), contents(dir)
    if a != b:
        differ = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
        raise UserError(f"killed after {moment:.3f} s, {differ} differ in {dir}: {line}")
    left = [p.name for p in dir.parent.iterdir() if p.name not in (dir.name, output.name)]
    if left:
        raise UserError(f"killed after {moment:.3f} s, {left} is left beside {dir}: {line}")
    return there


def main(cfg):
    # what the runs import, once
    for name in ("torch.distributed.checkpoint", "torch.utils.tensorboard", "datasets"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in (*SOURCES.values(), *JOBS.values()):
        importlib.import_module(line.split()[0])

    root = Path(cfg.out).resolve()
    if root.exists() and any(root.iterdir()):
        raise UserError(f"out={cfg.out} is not empty: remove it, or give another out=")
    (root / "cut").mkdir(parents=True)
    for line in SOURCES.values():
        finish(line.format(d=root), root / "output")
    seconds, wholes = {}, {}
    for name, line in JOBS.items():
        wholes[name] = root / "whole" / name
        line = set_out(line.format(d=root), wholes[name])
        times = [finish(line, root / "output")]
        for _ in range(2):
            shutil.rmtree(wholes[name])
            times.append(finish(line, root / "output"))
        seconds[name] = statistics.median(times)
    rng = random.Random(cfg.seed)
    table = {name: Counter() for name in JOBS}
    began = time.perf_counter()
    total = 0
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: what is done so far
        while total < cfg.kills:
            name = min(JOBS, key=lambda name: table[name].total())
            dir = root / "cut" / "run"
            line = set_out(JOBS[name].format(d=root), dir)
            moment = rng.uniform(0, seconds[name])
            there = kill(line, wholes[name], dir, dir.with_name("output"), moment)
            shutil.rmtree(dir)
            if there == "done":
                continue
            table[name][there] += 1
            total += 1
            if total % 10 == 0:
                print(f"{total} kills after {time.perf_counter() - began:.0f} s", flush=True)
    print("| script | seconds of a run | kills | before it wrote | unfinished | with a state |")
    print("|---|---|---|---|---|---|")
    for name, counts in table.items():
        cells = [counts.total(), counts["nothing"], counts["a folder"], counts["a state"]]
        print(f"| {name} | {seconds[name]:.1f} | {' | '.join(map(str, cells))} |")
    print(f"{total} kills, each followed by a resume: {total} of {total} as if never killed")
    shutil.rmtree(root)


def set_out(line, dir):
    """The command with another out=."""
    words = [w for w in shlex.split(line) if not w.startswith("out=")]
    return shlex.join([*words, f"out={dir}"])


if __name__ == "__main__":
    config.run(main, Config)
