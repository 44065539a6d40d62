"""Tokens per second of generate.py beside transformers' generate.

    python -m bench.generate model=models/smollm2 batch_size=16 new=128
    python -m bench.generate model=random-1b device=cuda batch_size=64 prompt=512 new=512

Both sides have the same model, prompts and lengths, and take turns in one process. There are two
cases. In the first every sample has `new` tokens. In the second `prompts` samples have unequal
lengths, which are geometric with the mean new/4, and at most `new`. There transformers decodes
each batch to its longest sample, and only the tokens that were asked for count.

The figures are medians over the rounds, by wall time and by the process's CPU time, which is
fairer where other programs run. MBU is a bound over the time taken: the time in which the memory
could deliver the weights and the filled cache of each step once.
"""

import contextlib
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config, weights
from nano.config import PathText, PositiveInt, Seed, Temperature


@dataclass
class Config:
    model: PathText = "models/smollm2"  # directory; random-1b: Llama-3.2-1B's shape
    batch_size: PositiveInt = 16
    prompts: int = 64  # of the unequal case
    prompt: int = 32  # tokens of a prompt
    new: int = 128  # tokens of a sample
    temperature: Temperature = 0.0
    rounds: int = 3
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: str = "cpu"  # cpu, cuda
    threads: int = 1
    static: bool = False  # transformers' static cache (which it compiles on CUDA)
    peer: bool = True  # false: ours alone
    seed: Seed = 0


def random_model(dir):
    """Writes random weights of Llama-3.2-1B's shape to `dir`, unless they are there. -> dir"""
    import torch

    import pretrain
    from model import Transformer

    if not (Path(dir) / "config.json").exists():
        sizes = pretrain.Config(size="1b", rope_theta=5e5, max_length=131072)
        model = Transformer(pretrain.model_config(sizes, 128256)).init_weights()
        weights.save_model(model, dir, dtype=torch.bfloat16)
    return dir


def main(cfg):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import numpy as np
    import torch

    from nano import runtime
    from nano.generate import generate

    torch.set_num_threads(cfg.threads)
    rt = runtime.start(cfg, parallel="none")
    dir = random_model("out/bench/random-1b") if cfg.model == "random-1b" else cfg.model
    ours = weights.load_model(dir, device=rt.device, dtype=rt.dtype)
    rng = np.random.default_rng(cfg.seed)
    prompts = rng.integers(5, ours.cfg.vocab_size, (cfg.prompts, cfg.prompt)).tolist()
    unequal = np.minimum(rng.geometric(4 / cfg.new, cfg.prompts), cfg.new).tolist()

    def run_ours(prompts, lengths):
        return generate(
            ours, prompts, lengths, temperature=cfg.temperature, batch_size=cfg.batch_size
        )

    sides = dict(ours=run_ours)
    if cfg.peer:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(dir, dtype=rt.dtype).to(rt.device).eval()
        sampling = dict(do_sample=False)
        if cfg.temperature:
            sampling = dict(do_sample=True, temperature=cfg.temperature, top_k=0)
        if cfg.static:
            sampling["cache_implementation"] = "static"

        def run_theirs(prompts, lengths):
            for i in range(0, len(prompts), cfg.batch_size):
                tokens = torch.tensor(prompts[i : i + cfg.batch_size], device=rt.device)
                n = max(lengths[i : i + cfg.batch_size])
                with contextlib.redirect_stderr(None):
                    theirs.generate(
                        tokens,
                        attention_mask=torch.ones_like(tokens),
                        max_new_tokens=n,
                        min_new_tokens=n,
                        pad_token_id=0,
                        **sampling,
                    )

        sides["transformers"] = run_theirs

    # ---- memory bandwidth
    big = torch.zeros(2**27, dtype=torch.float32, device=rt.device)
    reads = []
    for _ in range(5):
        rt.wait()
        began = time.perf_counter()
        big.sum()
        rt.wait()
        reads.append(big.nbytes / (time.perf_counter() - began))
    bandwidth = max(reads)
    del big
    weight_bytes = sum(p.numel() for p in ours.parameters()) * rt.dtype.itemsize
    kv_size = 2 * ours.cfg.n_layers * ours.cfg.n_kv_heads * ours.cfg.head_dim
    token_bytes = kv_size * rt.dtype.itemsize  # of the cache
    print(
        f"{rt.name}, {cfg.threads} threads, {cfg.dtype}: {weight_bytes / 1e6:.0f} MB of weights, "
        f"reads at {bandwidth / 1e9:.1f} GB/s"
    )

    # ---- runs
    batch = cfg.batch_size
    cases = dict(equal=(prompts[:batch], [cfg.new] * batch), unequal=(prompts, unequal))
    for name, (inputs, lengths) in cases.items():
        for run in sides.values():  # warm up
            run(inputs[:batch], [min(8, n) for n in lengths[:batch]])
        times = {side: [] for side in sides}  # of each run: wall, CPU
        for _ in range(cfg.rounds):
            for side, run in sides.items():
                rt.wait()
                began, cpu_began = time.perf_counter(), time.process_time()
                run(inputs, lengths)
                rt.wait()
                seconds = time.perf_counter() - began, time.process_time() - cpu_began
                times[side].append(seconds)
        medians = {
            side: [*map(statistics.median, zip(*times[side], strict=True))] for side in sides
        }
        tokens = sum(lengths)
        # Every step reads the weights once for a full batch, and each row its own cache.
        cached = sum(n * (cfg.prompt + n / 2) for n in lengths)
        bound = (tokens / min(batch, len(inputs)) * weight_bytes + cached * token_bytes) / bandwidth
        print(f"\n{name}: {len(inputs)} samples, {tokens} tokens, batch {batch}")
        for side, (wall, cpu) in medians.items():
            speeds = f"{tokens / wall:8.1f} tokens/s   {tokens / cpu:8.1f} tokens/CPU-s"
            print(f"  {side:<13} {speeds}   MBU {bound / wall:.0%}")
        if cfg.peer:
            wall, cpu = (
                a / b for a, b in zip(medians["transformers"], medians["ours"], strict=True)
            )
            print(f"  ratio         {wall:8.2f} (wall) {cpu:14.2f} (CPU)")


if __name__ == "__main__":
    config.run(main, Config)
