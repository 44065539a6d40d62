"""Tokens per second of a training step: pretrain.py's own parts beside nanoGPT's model.py.

    python -m bench.pretrain                                 # ours, with and without compile
    python -m bench.pretrain nanogpt=../nanoGPT rounds=3     # beside a checkout of nanoGPT, in turn
    python -m bench.pretrain size=1b micro_batch=8 max_length=2048 'malloc=[tuned]' device=cuda

Both sides take the same tokens (pydoc's topics, prepared by prepare/text.py), layers, width,
vocabulary, threads and dtype, and both clip and step AdamW. Ours also masks documents from each
other. Each run is a process of its own and prints one line of JSON, and a summary follows.

malloc=default is glibc's. malloc=tuned keeps freed memory: runtime.py sets that by itself, and
nanoGPT gets it by environment variables. So users start nanoGPT with `default` and ours with
`tuned`.
"""

import importlib.util
import itertools
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt

TUNED = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_="-1", MALLOC_TOP_PAD_=str(256 << 20))


@dataclass
class Config:
    nanogpt: PathText = ""  # a checkout of it; "": ours alone
    size: str = "124m"  # of pretrain.py
    vocab_size: PositiveInt = 50304
    micro_batch: PositiveInt = 4  # windows of a step
    max_length: PositiveInt = 512  # tokens of a window
    isolate: bool = True  # ours: documents do not see each other
    steps: NonNegativeInt = 8  # timed, after two that are not
    rounds: int = 2  # how often each run is repeated, all in turn
    compile: tuple[bool, ...] = (True, False)
    malloc: tuple[str, ...] = ("default", "tuned")
    device: str = "auto"
    dtype: str = "auto"
    grad_checkpoint: bool = False
    threads: int = 2
    out: PathText = "out/bench/pretrain"
    side: str = ""  # of a single run: ours or nanogpt


def prepare(cfg):
    """pydoc's topics as a prepared folder."""
    from prepare import text

    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data" / "meta.json").exists():
        topics = pydoc_data.topics.topics.values()
        source, data = out / "topics.jsonl", out / "data"
        lines = (json.dumps(dict(text=topic)) + "\n" for topic in topics)
        source.write_text("".join(lines), encoding="utf-8")
        keys = dict(kind="bpe", val="0", workers=1)
        text.main(text.Config(str(source), "train:8000", str(data), **keys))


def steps_of_ours(cfg, rt, windows):
    """(a function of the step's number that trains one step, the model)"""
    import pretrain
    from model import Transformer
    from nano import optim

    sizes = pretrain.Config(size=cfg.size, max_length=cfg.max_length)
    model = Transformer(pretrain.model_config(sizes, cfg.vocab_size)).init_weights()
    net = rt.wrap(model, cfg.compile[0], cfg.grad_checkpoint)
    optimizer = optim.build(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)

    def step(i):
        micro = windows.batch(i)[0]
        rt.accumulate(True, net)
        batch = rt.put(micro)
        with rt.autocast():
            loss = pretrain.loss_sum(net, net(batch), batch) / float(micro["weights"].sum())
        rt.backward(loss)
        rt.step(optimizer, model.parameters(), 6e-4, 1.0)
        return loss

    return step, model


def steps_of_nanogpt(cfg, rt, windows):
    import torch

    import pretrain

    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, dim, heads, *_ = pretrain.SIZES[cfg.size]
    shape = module.GPTConfig(
        block_size=cfg.max_length,
        vocab_size=cfg.vocab_size,
        n_layer=layers,
        n_head=heads,
        n_embd=dim,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(shape).to(rt.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), rt.device.type)
    net = torch.compile(model) if cfg.compile[0] else model

    def step(i):
        micro = rt.put(windows.batch(i)[0])
        with rt.autocast():
            _, loss = net(micro["tokens"], micro["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, model


def measure(cfg):
    """One run in this process."""
    import torch

    from nano import batches, log, runtime, store

    torch.set_num_threads(cfg.threads)
    if cfg.side == "nanogpt":
        runtime._tune_cpu = lambda: None
    elif cfg.malloc[0] == "default":
        runtime._tune_cpu = lambda: torch.set_flush_denormal(True)
    rt = runtime.start(cfg, parallel="none")
    isolate = cfg.isolate and cfg.side == "ours"
    windows = batches.Windows(
        [store.Store(Path(cfg.out) / "data")],
        cfg.micro_batch,
        cfg.micro_batch,
        cfg.max_length,
        isolate=isolate,
    )
    build = steps_of_ours if cfg.side == "ours" else steps_of_nanogpt
    step, model = build(cfg, rt, windows)
    # We count the steps of an epoch without its last one, which may be padded.
    whole = int(windows.starts[-1]) // cfg.micro_batch
    if not whole:
        raise config.UserError(
            f"micro_batch={cfg.micro_batch} is more than the text's {windows.starts[-1]} windows: "
            "set fewer"
        )
    wall, cpu = [], []
    for i in range(2 + cfg.steps):
        rt.wait()
        began, used = time.perf_counter(), time.process_time()
        loss = step(i // whole * windows.steps_per_epoch + i % whole)
        rt.wait()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    count = cfg.micro_batch * cfg.max_length
    result = dict(
        side=cfg.side,
        compile=cfg.compile[0],
        malloc=cfg.malloc[0],
        size=cfg.size,
        parameters=sum(p.numel() for p in model.parameters()),
        batch=[cfg.micro_batch, cfg.max_length],
        isolate=isolate,
        dtype=str(rt.dtype),
        device=rt.name,
        threads=cfg.threads,
        loss=round(loss.item(), 3),
        first_step_s=round(wall[0], 1),
        tokens_per_s=round(count / statistics.median(wall[2:]), 1),
        tokens_per_s_best=round(count / min(wall[2:]), 1),
        tokens_per_cpu_s=round(count / statistics.median(cpu[2:]), 1),
        memory_gb=round(rt.peak_memory() / 1e9, 2),
        load=round(os.getloadavg()[0], 1),
    )
    peak = log.peak_flops(rt.name)
    if peak and cfg.side == "ours":
        result["mfu"] = round(
            result["tokens_per_s"] * model.flops_per_token(cfg.max_length) / peak, 3
        )
    print(json.dumps(result), flush=True)


def main(cfg):
    if cfg.side:
        measure(cfg)
        return
    prepare(cfg)
    sides = ["nanogpt", "ours"] if cfg.nanogpt else ["ours"]
    results = {run: [] for run in itertools.product(cfg.compile, cfg.malloc, sides)}
    for _ in range(cfg.rounds):
        for (compiled, malloc, side), runs in results.items():
            one = replace(cfg, compile=(compiled,), malloc=(malloc,), side=side)
            env = {name: value for name, value in os.environ.items() if name not in TUNED}
            env["OMP_NUM_THREADS"] = str(cfg.threads)
            if malloc == "tuned" and side == "nanogpt":
                env |= TUNED
            command = [sys.executable, "-m", "bench.pretrain", *config.diff(one)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise config.UserError(f"the run {' '.join(command[1:])} failed")
            line = done.stdout.splitlines()[-1]  # nanoGPT prints lines of its own before
            print(line, flush=True)
            runs.append(json.loads(line))
    columns = f"{'tokens/s':>10}{'best':>10}{'GB':>7}   median of {cfg.rounds} runs"
    print(f"\n{'compile':<9}{'malloc':<9}{'side':<9}{columns}")
    for (compiled, malloc, side), runs in results.items():
        speed = statistics.median(r["tokens_per_s"] for r in runs)
        memory = statistics.median(r["memory_gb"] for r in runs)
        best = max(r["tokens_per_s_best"] for r in runs)
        name = f"{compiled!s:<9}{malloc:<9}{side:<9}"
        print(f"{name}{speed:>10,.0f}{best:>10,.0f}{memory:>7.1f}")


if __name__ == "__main__":
    config.run(main, Config)
