"""The whole path on a toy language, from random weights to PPO, and the worth of each stage.

    python -m bench.reviews                             # one seed
    python -m bench.reviews 'seeds=[0,1,2,3,4]'         # medians over seeds, one after another
    python -m bench.reviews 'runs=[ppo,ppo-no-kl]'      # without RLOO and DPO
    python -m bench.reviews svg=bench/reviews.svg       # where the curves of the last seed go

The language is that of `prepare.toy task=reviews`. Runs the stage scripts as a user would, and
prints each command. Then samples answers from every stage's model and prints a table. Its columns
are the reward model's score; gold, the true worth of an answer; the win rate against the SFT
model's answer to the same prompt, where ties count half; the share of answers that are
grammatical, and that end; and the KL to the SFT model in nats an answer.

The row "ppo-no-kl" is the negative control: with kl_coef=0 the reward model's score rises while
gold falls.
"""

import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nano import config, weights
from nano.config import NonNegativeInt, PathText

ROOT = Path(__file__).resolve().parent.parent

Run = Literal["ppo", "ppo-no-kl", "rloo", "dpo"]
COLUMNS = ("reward", "gold", "win", "grammatical", "eos", "kl")
LINES = (  # key of the log, dashes, colour, unit
    ("gold", "", "#0a7", 1),
    ("reward", "6 3", "#c40", 1),
    ("kl", "2 3", "#348", 5),
)


@dataclass
class Config:
    out: PathText = "out/reviews"
    seeds: tuple[int, ...] = (0,)
    samples: NonNegativeInt = 512  # answers per model
    threads: int = 1  # a model this small is fastest on one
    runs: tuple[Run, ...] = ("ppo", "ppo-no-kl", "rloo", "dpo")  # which of them
    jobs: int = 2  # how many of them run at a time
    svg: PathText = ""  # file of the curves; "": OUT/curves.svg


def commands(root, seed):
    """Arguments of python, in order. The last four commands do not depend on each other."""
    root = shlex.quote(root)
    data, sft, recipes = f"{root}/data", f"{root}/sft/last", "recipes/reviews"
    start = f"{root}/pretrain/last"
    plain = "template=plain max_length=32"
    rl = f"model={sft} reward={root}/reward/last data={data}/sft seed={seed}"
    ranked = f"model={sft} data={data}/preferences seed={seed}"
    lines = f"""
-m prepare.toy task=reviews out={data} seed={seed}
-m prepare.text source={data}/pretrain.jsonl tokenizer={data}/tokenizer out={data}/text
pretrain.py {recipes}/pretrain.cfg data={data}/text out={root}/pretrain seed={seed}
-m prepare.instructions source={data}/sft.jsonl model={start} {plain} val=200 out={data}/sft
sft.py {recipes}/sft.cfg model={start} data={data}/sft out={root}/sft seed={seed}
-m prepare.toy task=preferences model={sft} out={data} seed={seed}
-m prepare.preferences source={data}/preferences.jsonl model={sft} {plain} out={data}/preferences
reward.py {recipes}/reward.cfg {ranked} out={root}/reward
ppo.py {recipes}/ppo.cfg {rl} out={root}/ppo
ppo.py {recipes}/ppo.cfg {rl} kl_coef=0 log_kl=true schedule=constant steps=120 out={root}/ppo-no-kl
ppo.py {recipes}/rloo.cfg {rl} out={root}/rloo
dpo.py {recipes}/dpo.cfg {ranked} out={root}/dpo
"""
    return [shlex.split(line) for line in lines.strip().split("\n")]


def measure(root, stages, samples):
    """{stage: {column: value}} from fresh samples of every stage's model.

    All have the same prompts and the same random numbers.
    """
    import torch

    from nano import generate, losses, tokenizer
    from prepare.toy import gold

    torch.set_num_threads(1)
    tok = tokenizer.load(f"{root}/sft/last")
    lines = open(f"{root}/data/prompts.jsonl", encoding="utf-8")
    texts = [json.loads(line)["prompt"] for line in lines]
    texts = [*itertools.islice(itertools.cycle(texts), samples)]
    prompts = [tok.encode(text) for text in texts]
    sft = weights.load_model(f"{root}/sft/last").float()
    scorer = weights.load_model(f"{root}/reward/last").float()
    gain, bias = weights.read_score_scale(f"{root}/reward/last")
    table = {}
    sft_worth = None
    for stage in stages:
        model = weights.load_model(f"{root}/{stage}/last").float()
        answers = generate.generate(
            model, prompts, 16, stop_ids=tok.stop_ids, seed=1, batch_size=256
        )
        ends = answers.finished
        worth = [
            gold(text, tok.decode(tokens), ended)
            for text, tokens, ended in zip(texts, answers.tokens, ends, strict=True)
        ]
        sft_worth = sft_worth or worth
        kl, scores = [], []
        with torch.no_grad():
            rows = zip(prompts, answers.tokens, answers.logprobs, strict=True)
            for prompt, answer, logprobs in rows:
                row = torch.tensor([prompt + answer])
                hidden = sft.hidden(row)[0, len(prompt) - 1 : -1]
                targets = row[0, len(prompt) :]
                sft_logprobs = losses.token_logprobs(hidden, sft.head, targets)
                kl.append(sum(logprobs) - float(sft_logprobs.sum()))
                scores.append(gain * float(scorer.score(scorer.hidden(row))[0, -1]) + bias)
        wins = [1.0 * (a > b) + 0.5 * (a == b) for a, b in zip(worth, sft_worth, strict=True)]
        columns = (scores, worth, wins, [w > -2 for w in worth], ends, kl)
        table[stage] = dict(zip(COLUMNS, map(statistics.mean, columns), strict=True))
    return table


def curves(root, runs, path, width=720, height=260):
    """An SVG with a panel a run: gold (solid), score (dashed), KL / 5 (dotted) over iterations."""
    panel = width // max(len(runs), 1)
    low, high = -2.5, 5.0
    parts = []
    for i, run in enumerate(runs):
        rows = [json.loads(line) for line in open(f"{root}/{run}/log.jsonl", encoding="utf-8")]
        rows = [r for r in rows if r["kind"] == "train"]
        left = i * panel + 40
        scale_x = (panel - 60) / max(r["step"] for r in rows)
        scale_y = (height - 60) / (high - low)
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{run}</text>')
        for tick in (-2, 0, 2, 4):
            y = 30 + scale_y * (high - tick)
            line = f'x1="{left}" x2="{left + panel - 60}" y1="{y}" y2="{y}" stroke="#ddd"'
            parts.append(f'<line {line}/><text x="{left - 18}" y="{y + 4}">{tick}</text>')
        for key, dash, color, unit in LINES:
            points = []
            for row in rows:
                if row.get(key) is not None:
                    y = 30 + scale_y * (high - min(max(row[key] / unit, low), high))
                    points.append(f"{left + scale_x * row['step']:.1f},{y:.1f}")
            line = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{" ".join(points)}" {line}/>')
    legend = "green: gold, red dashed: reward model, blue dotted: KL / 5; over iterations"
    parts.append(f'<text x="40" y="{height - 6}">{legend}</text>')
    style = "font-family:sans-serif;font-size:12px;background:white"
    size = f'width="{width}" height="{height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([svg, *parts, "</svg>", ""]), encoding="utf-8")


def run(arguments, env, show):
    """Runs a command as a user would -> its output. show: it appears as it comes instead."""
    pipe = {} if show else dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, **pipe)
    if done.returncode:
        print(done.stdout or "")
        raise config.UserError(f"the command failed: python {' '.join(arguments)}")
    return done.stdout


def main(cfg):
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}
    svg = Path(cfg.svg or f"{cfg.out}/curves.svg")
    stages = ("sft", *cfg.runs)
    tables, seconds = [], []
    for seed in cfg.seeds:
        began = time.perf_counter()
        root = f"{cfg.out}/seed{seed}"
        shutil.rmtree(root, ignore_errors=True)
        *first, ppo, control, rloo, dpo = commands(root, seed)
        last = dict(zip(get_args(Run), (ppo, control, rloo, dpo), strict=True))
        last = [last[name] for name in cfg.runs]
        for arguments in first:
            print("\n$ python", *arguments, flush=True)
            run(arguments, env, show=True)
        with ThreadPoolExecutor(cfg.jobs) as pool:
            outputs = pool.map(lambda arguments: run(arguments, env, show=False), last)
            for arguments, output in zip(last, outputs, strict=True):
                print("\n$ python", *arguments)
                print(output, flush=True)
        seconds.append(time.perf_counter() - began)
        tables.append(measure(root, stages, cfg.samples))
        curves(root, [name for name in cfg.runs if name != "dpo"], svg)
        golds = (f"{stage} {tables[-1][stage]['gold']:.2f}" for stage in stages)
        print(f"\nseed {seed}: gold {', '.join(golds)}", flush=True)
    head = f"seed {cfg.seeds[0]}"
    if len(cfg.seeds) > 1:
        head = f"{len(cfg.seeds)} seeds, median (least to most)"
    print(f"\n| {head} | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for stage in stages:
        cells = []
        for column in COLUMNS:
            values = [t[stage][column] for t in tables]
            cell = f"{statistics.median(values):.2f}"
            if len(values) > 1:
                cell += f" ({min(values):.2f} to {max(values):.2f})"
            cells.append(cell)
        print(f"| {stage} | {' | '.join(cells)} |")
    print(f"\n{statistics.median(seconds):.0f} s for the whole path; curves: {svg}")


if __name__ == "__main__":
    config.run(main, Config)
