"""A mixture of experts of Qwen3-MoE's shape and random weights, beside transformers: training steps
and decoding.

    python -m bench.experts                            # both in fp32, transformers in two ways
    python -m bench.experts 'dtypes=[float32,bfloat16]' 'sides=[ours,grouped_mm]'

The model has the proportions of Qwen3-30B-A3B: 128 experts of which a token takes 8, each 3/8 as
wide as the model. Both sides read the same file. A step is forward, backward, clipping and AdamW on
fp32 weights, with torch's fused kernel on both sides. Decoding is greedy, from prompts of 32
tokens, and its speed is that behind the first token. grouped_mm, eager and batched_mm are
transformers' ways to run experts; the first is its default.

"of peak" is the share of the time of a step in which the device's fastest product, of two matrices
of 2048 x 2048, would have done the operations of the parameters that a token uses. Each run is a
process of its own, the sides take turns, and the table shows medians.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nano  # noqa: F401  first, because bench/nano.py finds the others
from nano import config
from nano.config import PathText, PositiveInt, UserError


@dataclass
class Config:
    dim: PositiveInt = 768  # a multiple of 64
    n_layers: PositiveInt = 4
    vocab_size: PositiveInt = 32000
    sides: tuple[Literal["ours", "grouped_mm", "eager", "batched_mm"], ...] = (
        "ours",
        "grouped_mm",
        "eager",
    )
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    rows: PositiveInt = 4  # of a training step
    length: PositiveInt = 256  # tokens of a row
    steps: PositiveInt = 4  # timed, after one that is not
    batches: tuple[PositiveInt, ...] = (1, 16)  # rows decoded together
    new: PositiveInt = 32  # tokens of a sample
    rounds: PositiveInt = 2  # runs of each side
    device: str = "cpu"
    threads: PositiveInt = 2
    out: PathText = "out/bench/experts"  # scratch folder
    side: str = ""  # of a single run, which takes the first of dtypes


def model_dir(cfg):
    """Writes the model, unless it is there -> its folder."""
    import torch

    from model import ModelConfig, Transformer
    from nano import weights

    dir = Path(cfg.out) / f"model-{cfg.dim}-{cfg.n_layers}-{cfg.vocab_size}"
    if not (dir / "config.json").exists():
        torch.manual_seed(0)
        shape = ModelConfig(
            vocab_size=cfg.vocab_size,
            dim=cfg.dim,
            n_layers=cfg.n_layers,
            n_heads=cfg.dim // 64,
            n_kv_heads=cfg.dim // 64 // 4 or 1,
            head_dim=128,
            qk_norm="head",
            n_experts=128,
            experts_per_token=8,
            expert_dim=cfg.dim * 3 // 8,
            router="chosen",
            tie_embeddings=True,
            family="qwen3_moe",
        )
        weights.save_model(Transformer(shape).init_weights(), dir, dtype=torch.bfloat16)
    return dir


def loaded(cfg, dtype):
    """The model of a side."""
    import torch
    from transformers import AutoModelForCausalLM

    from nano import weights

    if cfg.side == "ours":
        return weights.load_model(model_dir(cfg), dtype=dtype).to(cfg.device)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir(cfg), dtype=torch.float32, experts_implementation=cfg.side
    )
    return model.to(device=cfg.device, dtype=dtype)


def train_seconds(cfg, rt, model):
    """Seconds of a training step."""
    import torch

    from nano import losses, optim

    shape = cfg.rows, cfg.length + 1
    text = torch.randint(cfg.vocab_size, shape, device=rt.device)
    tokens, targets = text[:, :-1], text[:, 1:].flatten()
    if cfg.side == "ours":
        net = rt.wrap(model)
        optimizer = optim.build(model, lr=1e-4)
    else:
        net = model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    weights = torch.full(targets.shape, 1 / len(targets), device=rt.device)

    def loss_of():
        if cfg.side != "ours":
            return net(text[:, :-1], labels=text[:, :-1], use_cache=False).loss
        return losses.cross_entropy(net(dict(tokens=tokens)), net.head, targets, weights)

    times = []
    for _ in range(1 + cfg.steps):
        rt.wait()
        began = time.perf_counter()
        with rt.autocast():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rt.wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def decode_speeds(cfg, rt, model):
    """{rows: tokens/s}"""
    import torch

    from nano import generate

    if cfg.side == "ours":
        model = generate.Decoder(model)

    def run(prompts, new):
        rt.wait()
        began = time.perf_counter()
        if cfg.side == "ours":
            generate.generate(model, prompts.tolist(), new, temperature=0.0)
        else:
            mask = torch.ones_like(prompts)
            settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
            model.generate(prompts, attention_mask=mask, **settings)
        rt.wait()
        return time.perf_counter() - began

    speeds = {}
    for batch in cfg.batches:
        prompts = torch.randint(cfg.vocab_size, (batch, 32), device=rt.device)
        run(prompts, 2)  # warm up
        speeds[batch] = batch * (cfg.new - 1) / (run(prompts, cfg.new) - run(prompts, 1))
    return speeds


def product_peak(rt):
    """Operations a second of the largest product."""
    import torch

    a, b = torch.randn(2, 2048, 2048, dtype=rt.dtype, device=rt.device)
    times = []
    for _ in range(6):
        rt.wait()
        began = time.perf_counter()
        a @ b
        rt.wait()
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times)


def measure(cfg):
    """One run in this process."""
    import torch
    from transformers.utils import logging

    from model import empty
    from nano import families, runtime

    logging.set_verbosity_error()
    torch.set_num_threads(cfg.threads)
    keys = dict(device=cfg.device, dtype=cfg.dtypes[0], parallel="none", seed=0)
    rt = runtime.start(cfg, **keys)
    shape = empty(families.load_config(model_dir(cfg)))
    with torch.no_grad():
        decoding = decode_speeds(cfg, rt, loaded(cfg, rt.dtype).eval())
    model = loaded(cfg, torch.float32)
    seconds = train_seconds(cfg, rt, model)
    count = cfg.rows * cfg.length
    result = dict(
        train=count / seconds,
        of_peak=count / seconds * shape.flops_per_token(cfg.length) / product_peak(rt),
        memory_gb=rt.peak_memory() / 1e9,
        decode={str(batch): speed for batch, speed in decoding.items()},
    )
    print(json.dumps(result), flush=True)


def describe(cfg):
    """The parameters, all and of a token, in one line."""
    from model import empty
    from nano import estimate, families

    model = empty(families.load_config(model_dir(cfg)))
    total = estimate.count(model)
    return f"{total:,} parameters, {total - estimate.idle(model):,} of a token"


def main(cfg):
    if cfg.side:
        measure(cfg)
        return
    print(describe(cfg), flush=True)
    results = {(dtype, side): [] for dtype in cfg.dtypes for side in cfg.sides}
    for _ in range(cfg.rounds):
        for (dtype, side), runs in results.items():
            one = replace(cfg, side=side, dtypes=(dtype,))
            env = os.environ | dict(OMP_NUM_THREADS=str(cfg.threads))
            command = [sys.executable, "-m", "bench.experts", *config.diff(one)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"the run {' '.join(command[1:])} failed")
            line = done.stdout.splitlines()[-1]
            print(dtype, side, line, flush=True)
            runs.append(json.loads(line))
    decoding = " | ".join(f"decoding {batch}, tokens/s" for batch in cfg.batches)
    print(f"\n| dtype | side | training, tokens/s | of peak | GB | {decoding} |")
    print("| --- | --- | ---: | ---: | ---: |" + " ---: |" * len(cfg.batches))
    for (dtype, side), runs in results.items():
        middle = {
            key: statistics.median(r[key] for r in runs) for key in runs[0] if key != "decode"
        }
        speeds = [statistics.median(r["decode"][str(n)] for r in runs) for n in cfg.batches]
        cells = f"{middle['train']:.0f} | {middle['of_peak']:.2f} | {middle['memory_gb']:.1f}"
        print(f"| {dtype} | {side} | {cells} | " + " | ".join(f"{x:.1f}" for x in speeds) + " |")


if __name__ == "__main__":
    config.run(main, Config)
