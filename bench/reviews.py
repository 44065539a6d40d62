"""The whole path on the toy language of `prepare.toy task=reviews`, from random weights to PPO, and what each stage is worth.

    python -m bench.reviews                             # one seed
    python -m bench.reviews seeds=[0,1,2,3,4]           # medians over seeds, one after another

Runs the stage scripts as a user would and prints each command. Then samples answers from every stage's model and prints a table:
gold, the true worth of an answer; its win rate against the SFT model's answer to the same prompt (ties count half); the shares that
are grammatical and that end; and the KL to the SFT model in nats an answer. The curves of the last seed go to curves.svg.
The row "ppo, no KL" is the negative control: with kl_coef=0 the reward model's score rises while gold falls.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nano import config, weights
from nano.config import NonNegativeInt

ROOT = Path(__file__).resolve().parent.parent

STAGES = ("sft", "ppo", "ppo, no KL", "rloo", "dpo")
COLUMNS = ("reward", "gold", "win", "grammatical", "eos", "kl")


@dataclass
class Config:
    out: str = "out/reviews"
    seeds: tuple[int, ...] = (0,)
    samples: NonNegativeInt = 512  # answers per model
    threads: int = 1  # a model this small is fastest on one
    jobs: int = 2  # of PPO, its control, RLOO and DPO, how many run at a time


def commands(root, seed):
    """Arguments of python, in order; the last four do not depend on each other."""
    data, sft = f"{root}/data", f"{root}/sft/last"
    rl = [f"model={sft}", f"reward={root}/reward/last", f"data={data}/sft", f"seed={seed}"]
    yield ["-m", "prepare.toy", "task=reviews", f"out={data}", f"seed={seed}"]
    yield [
        "-m",
        "prepare.text",
        f"source={data}/pretrain.jsonl",
        f"tokenizer={data}/tokenizer",
        f"out={data}/text",
    ]
    yield [
        "pretrain.py",
        "recipes/reviews/pretrain.cfg",
        f"data={data}/text",
        f"out={root}/pretrain",
        f"seed={seed}",
    ]
    source = [
        f"source={data}/sft.jsonl",
        f"model={root}/pretrain/last",
        "template=plain",
        "max_length=32",
        "val=200",
    ]
    yield ["-m", "prepare.instructions", *source, f"out={data}/sft"]
    start = [f"model={root}/pretrain/last", f"data={data}/sft", f"out={root}/sft", f"seed={seed}"]
    yield ["sft.py", "recipes/reviews/sft.cfg", *start]
    yield ["-m", "prepare.toy", "task=preferences", f"model={sft}", f"out={data}", f"seed={seed}"]
    source = [f"source={data}/preferences.jsonl", f"model={sft}", "template=plain", "max_length=32"]
    yield ["-m", "prepare.preferences", *source, f"out={data}/preferences"]
    start = [f"model={sft}", f"data={data}/preferences", f"seed={seed}"]
    yield ["reward.py", "recipes/reviews/reward.cfg", *start, f"out={root}/reward"]
    yield ["ppo.py", "recipes/reviews/ppo.cfg", *rl, f"out={root}/ppo"]
    control = ["kl_coef=0", "schedule=constant", "steps=80", f"out={root}/ppo-no-kl"]
    yield ["ppo.py", "recipes/reviews/ppo.cfg", *rl, *control]
    yield ["ppo.py", "recipes/reviews/rloo.cfg", *rl, f"out={root}/rloo"]
    yield ["dpo.py", "recipes/reviews/dpo.cfg", *start, f"out={root}/dpo"]


def measure(root, samples):
    """{stage: {column: value}} from fresh samples of every stage's model, the same prompts and random numbers for each."""
    import torch

    from nano import generate, losses, tokenizer
    from prepare.toy import gold

    torch.set_num_threads(1)
    tok = tokenizer.load(f"{root}/sft/last")
    asked = [
        json.loads(line)["prompt"] for line in open(f"{root}/data/prompts.jsonl", encoding="utf-8")
    ]
    asked = (asked * (samples // len(asked) + 1))[:samples]
    prompts = [tok.encode(text) for text in asked]
    sft, scorer = (
        weights.load_model(f"{root}/sft/last"),
        weights.load_model(f"{root}/reward/last"),
    )
    gain, bias = weights.read_score_scale(f"{root}/reward/last")
    table, worth_of_sft = {}, None
    for stage in STAGES:
        model = weights.load_model(f"{root}/{stage.replace(', no KL', '-no-kl')}/last").float()
        made = generate.generate(model, prompts, 16, stop_ids=tok.stop_ids, seed=1, batch_size=256)
        worth = [
            gold(p, tok.decode(t), f)
            for p, t, f in zip(asked, made.tokens, made.finished, strict=True)
        ]
        kl, score = 0.0, 0.0
        with torch.no_grad():
            for prompt, answer, logprobs in zip(prompts, made.tokens, made.logprobs, strict=True):
                row = torch.tensor([prompt + answer])
                hidden = sft.float().hidden(row)[0, len(prompt) - 1 : -1]
                kl += sum(logprobs) - float(
                    losses.token_logprobs(hidden, sft.head_weight, row[0, len(prompt) :]).sum()
                )
                score += float(scorer.score(scorer.float().hidden(row))[0, -1]) * gain + bias
        worth_of_sft = worth_of_sft or worth
        table[stage] = dict(
            reward=score / samples,
            gold=sum(worth) / samples,
            win=sum((a > b) + (a == b) / 2 for a, b in zip(worth, worth_of_sft, strict=True))
            / samples,
            grammatical=sum(w > -2 for w in worth) / samples,
            eos=sum(made.finished) / samples,
            kl=kl / samples,
        )
    return table


def curves(root, path, width=720, height=260):
    """gold (solid), the reward model's score (dashed) and KL / 5 (dotted) over the iterations of each run, as an SVG."""
    parts, panel = [], width // 3
    for i, run in enumerate(("ppo", "ppo-no-kl", "rloo")):
        rows = [json.loads(line) for line in open(f"{root}/{run}/log.jsonl", encoding="utf-8")]
        rows = [r for r in rows if r["kind"] == "train"]
        left, low, high = i * panel + 40, -2.5, 5.0
        x = lambda step: left + (panel - 60) * step / max(r["step"] for r in rows)  # noqa: B023, E731
        y = lambda v: 30 + (height - 60) * (high - min(max(v, low), high)) / (high - low)  # noqa: B023, E731
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{run}</text>')
        for tick in (-2, 0, 2, 4):
            parts.append(
                f'<line x1="{left}" x2="{left + panel - 60}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>'
            )
            parts.append(f'<text x="{left - 18}" y="{y(tick) + 4}">{tick}</text>')
        for key, dash, color, scale in (
            ("gold", "", "#0a7", 1),
            ("reward", "6 3", "#c40", 1),
            ("kl", "2 3", "#348", 0.2),
        ):
            points = " ".join(
                f"{x(r['step']):.1f},{y(r[key] * scale):.1f}" for r in rows if r[key] is not None
            )
            line = f'fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{points}" {line}/>')
    legend = (
        "green: gold, red dashed: the reward model's score, blue dotted: KL / 5; over iterations"
    )
    parts.append(f'<text x="40" y="{height - 6}">{legend}</text>')
    style = "font-family:sans-serif;font-size:12px;background:white"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" style="{style}">'
    Path(path).write_text("\n".join([svg, *parts, "</svg>", ""]), encoding="utf-8")


def run(arguments, env, show):
    """One command, as a user would give it. -> its output, unless that was shown while it ran."""
    pipe = {} if show else dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, **pipe)
    if done.returncode:
        print(done.stdout or "")
        raise config.UserError(f"the command failed: python {' '.join(arguments)}")
    return done.stdout


def main(cfg):
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}
    tables, seconds = [], []
    for seed in cfg.seeds:
        root, began = f"{cfg.out}/seed{seed}", time.perf_counter()
        shutil.rmtree(root, ignore_errors=True)
        *first, ppo, control, rloo, dpo = commands(root, seed)
        for arguments in first:
            print("\n$ python", *arguments, flush=True)
            run(arguments, env, show=True)
        with ThreadPoolExecutor(cfg.jobs) as pool:  # these do not depend on each other
            last = (ppo, control, rloo, dpo)
            for arguments, output in zip(
                last, pool.map(lambda a: run(a, env, show=False), last), strict=True
            ):
                print("\n$ python", *arguments)
                print(output, flush=True)
        seconds.append(time.perf_counter() - began)
        tables.append(measure(root, cfg.samples))
        curves(root, f"{cfg.out}/curves.svg")
    head = (
        f"{len(cfg.seeds)} seeds, median (least to most)"
        if len(cfg.seeds) > 1
        else f"seed {cfg.seeds[0]}"
    )
    print(f"\n| {head} | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for stage in STAGES:
        cells = []
        for column in COLUMNS:
            values = [t[stage][column] for t in tables]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.2f}{spread}")
        print(f"| {stage} | {' | '.join(cells)} |")
    print(f"\n{statistics.median(seconds):.0f} s for the whole path; curves: {cfg.out}/curves.svg")


if __name__ == "__main__":
    config.run(main, Config)
