"""How fast instruction data is prepared: prepare.instructions beside TRL's SFTTrainer.

    python -m bench.data_prep data=alpaca_en_demo.json model=models/smollm2

Both sides read the JSON file, render it with the model's chat template, tokenize it and mark the
targets. Each run is a process of its own on one core, and the sides take turns. `prepare` is the
work itself, in MB of UTF-8 text of the records for a second of CPU time. `tokenizer` is the time
that loading it takes before, `imports` the time that the program's imports take. TRL's part is the
construction of an SFTTrainer around a model of a few thousand weights, after one with 8 records.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nano import config, tokenizer
from nano.config import PathText, PositiveInt


@dataclass
class Config:
    data: PathText  # JSON array of Alpaca records
    model: PathText = "models/smollm2"  # its tokenizer is used
    copies: int = 4  # of the file's records
    max_length: PositiveInt = 512  # of a row
    runs: int = 3  # of each side
    side: Literal["all", "ours", "trl", "trl-packed"] = "all"  # one side: a single run, as JSON


def ours(cfg, path, timed):
    with timed("imports"):
        from prepare import instructions
    with tempfile.TemporaryDirectory() as out:
        keys = dict(
            source=path, model=cfg.model, out=f"{out}/data", max_length=cfg.max_length, workers=1
        )
        job = instructions.Config(**keys, over_length="truncate")
        with timed("tokenizer"):
            tok = tokenizer.load(cfg.model)
        tokenizer.load = lambda *_, **__: tok  # loaded already
        with timed("prepare"):
            instructions.main(job)


def trl(cfg, path, timed, packing):
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with timed("imports"):
        import datasets
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig, SFTTrainer
    datasets.disable_caching()
    with timed("tokenizer"):
        tok = AutoTokenizer.from_pretrained(cfg.model)
    tiny = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), **tiny))

    def conversation(r):
        question = r["instruction"] + ("\n\n" + r["input"] if r["input"] else "")
        prompt = dict(role="user", content=question)
        return dict(prompt=[prompt], completion=[dict(role="assistant", content=r["output"])])

    def prepare(count=None):
        with open(path, encoding="utf-8") as f:
            rows = datasets.Dataset.from_list([conversation(r) for r in json.load(f)[:count]])
        with tempfile.TemporaryDirectory() as out:
            args = SFTConfig(
                output_dir=out,
                max_length=cfg.max_length,
                packing=packing,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            )
            SFTTrainer(model, args, train_dataset=rows, processing_class=tok)

    prepare(8)
    with timed("prepare"):
        prepare()


def run_one(cfg):
    """One run of one side. Prints JSON: seconds of CPU time and of wall time of each part."""
    seconds = {}

    @contextlib.contextmanager
    def timed(name):
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        seconds[name] = [time.process_time() - cpu, time.perf_counter() - wall]

    with tempfile.TemporaryDirectory() as dir, contextlib.redirect_stdout(sys.stderr):
        records = json.loads(Path(cfg.data).read_text(encoding="utf-8")) * cfg.copies
        path = Path(dir) / "records.json"
        path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        if cfg.side == "ours":
            ours(cfg, str(path), timed)
        else:
            trl(cfg, path, timed, packing=cfg.side == "trl-packed")
    size = sum(len((r["instruction"] + r["input"] + r["output"]).encode()) for r in records)
    print(json.dumps(dict(rows=len(records), megabytes=size / 1e6, seconds=seconds)))


def main(cfg):
    if cfg.side != "all":
        return run_one(cfg)
    sides = {"ours": [], "trl": [], "trl-packed": []}
    for i in range(cfg.runs):
        for side, results in sides.items():
            print(f"run {i + 1} of {cfg.runs}: {side}", file=sys.stderr)
            argv = [sys.executable, "-m", "bench.data_prep", *config.diff(replace(cfg, side=side))]
            env = os.environ | dict(OMP_NUM_THREADS="1")
            done = subprocess.run(argv, env=env, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr}")
            results.append(json.loads(done.stdout))
    size = sides["ours"][0]
    speeds = {
        side: [r["megabytes"] / r["seconds"]["prepare"][0] for r in results]
        for side, results in sides.items()
    }
    base = statistics.median(speeds["trl"])
    what = f"{size['rows']:,} records, {size['megabytes']:.2f} MB of text"
    print(f"{what}; medians of {cfg.runs} runs (lowest-highest)\n")
    print("|  | prepare, MB per CPU second | ratio | tokenizer, CPU s | imports, wall s |")
    print("|---|---|---|---|---|")
    for side, results in sides.items():
        middle, low, high = (f(speeds[side]) for f in (statistics.median, min, max))
        load = statistics.median(r["seconds"]["tokenizer"][0] for r in results)
        start = statistics.median(r["seconds"]["imports"][1] for r in results)
        speed = f"{middle:.2f} ({low:.2f}-{high:.2f}) | {middle / base:.2f}"
        print(f"| {side} | {speed} | {load:.2f} | {start:.1f} |")


if __name__ == "__main__":
    config.run(main, Config)
