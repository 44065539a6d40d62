"""Prefill and decoding beside transformers and llama.cpp, and beside what the machine allows.

    python -m bench.infer model=models/smollm2                     # ours and transformers
    python -m bench.infer llama=../llama.cpp 'sides=[ours,llama]'  # and llama.cpp
    python -m bench.infer model=random-1b device=cuda 'batches=[1,64]' prompt=512 new=256

All sides have the same model, prompts and lengths, and decode greedily. A batch's speed is that
behind the first token: of `new` tokens a row less the time of one. "prefill" is a single prompt of
`prefill` tokens. "unequal" decodes 64 samples whose lengths are geometric with the mean new/4, at
most `new`, in batches of 16; transformers decodes each batch to its longest sample, and only the
tokens that were asked for count. "mixed" is for ours alone, in the largest of the batches: prompts
and answers have 100 to 1,024 tokens each, prefill counts, and so do the CUDA graphs recorded.

The bound of a step is the lower one of two speeds that are measured in the same run. One is that of
the step's matrix products alone, in the fastest layout that torch has for them at that number of
rows. The other is the time in which the memory delivers the weights and the filled cache once.

llama= is a folder of llama.cpp, for instance that in PyPI's source package llama-cpp-python:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-batched-bench

Its converter writes the model to out= in bf16 and in f16 the first time. The last line of standard
output is the whole result as JSON.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import nano  # noqa: F401  first, because bench/nano.py finds the others
from nano import config, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError

SIDES = ("ours", "transformers", "static", "llama")
Side = Annotated[str, (f"of {', '.join(SIDES)}", lambda side: side in SIDES)]


@dataclass
class Config:
    model: PathText = "models/smollm2"  # directory; random-1b, random-8b: Llama 3's shapes
    out: PathText = "out/bench/infer"  # scratch folder
    sides: tuple[Side, ...] = ("ours", "transformers")  # static: transformers' static cache
    llama: PathText | None = None  # folder of llama.cpp, for sides=llama
    batches: tuple[PositiveInt, ...] = (1, 4, 16, 64)  # rows decoded together
    prompt: PositiveInt = 32  # tokens of a prompt
    new: int = 64  # tokens of a sample, 2 or more
    prefill: NonNegativeInt = 512  # tokens of the prompt that is timed alone; 0: none
    unequal: NonNegativeInt = 64  # samples of unequal lengths; 0: none
    mixed: NonNegativeInt = 0  # samples with prompts and answers of 100 to 1,024 tokens
    rounds: PositiveInt = 2  # medians of so many
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bf16 where it is fast
    device: str = "cpu"  # cpu, cuda
    threads: PositiveInt = 2
    seed: Seed = 0


# Llama 3.2's and 3.1's shapes
SHAPES = {
    "random-1b": dict(dim=2048, n_layers=16, ffn_dim=8192, head_dim=64, tie_embeddings=True),
    "random-8b": dict(dim=4096, n_layers=32, ffn_dim=14336, head_dim=128),
}


def random_model(name):
    """Writes random weights of one of SHAPES, unless they are there -> their folder."""
    import torch

    from model import ModelConfig, Transformer

    dir = Path("out/bench") / name
    if not (dir / "config.json").exists():
        shape = dict(vocab_size=128256, n_heads=32, n_kv_heads=8, max_positions=8192)
        shape |= dict(rope_theta=5e5)
        model = Transformer(ModelConfig(**shape, **SHAPES[name])).init_weights()
        weights.save_model(model, dir, dtype=torch.bfloat16)
    return str(dir)


def seconds(function, rounds, wait=lambda: None):
    """The median time of a call."""
    times = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---------------------------------------------------------------------- what the machine allows


def read_speed(rt):
    """Bytes a second that the device reads."""
    import torch

    big = torch.zeros(2**27, dtype=torch.float32, device=rt.device)
    return big.nbytes / seconds(big.sum, 7, rt.wait)


def product_seconds(decoder, rows, rt, head=True):
    """{layout: time of all matrix products of a forward of `rows` tokens}, without anything else:
    the model's shapes, fused as in decoding, in each layout that this torch has for them."""
    import torch

    from nano import generate

    cfg = decoder.cfg
    heads = cfg.n_heads + 2 * cfg.n_kv_heads
    shapes = [
        (heads * cfg.head_dim, cfg.dim),
        (cfg.dim, cfg.n_heads * cfg.head_dim),
        ((2 if cfg.mlp == "gated" else 1) * cfg.ffn_dim, cfg.dim),
        (cfg.dim, cfg.ffn_dim),
    ]
    shapes = shapes * cfg.n_layers + [(cfg.vocab_size, cfg.dim)] * head
    like = dict(dtype=decoder.dtype, device=rt.device)
    layouts = ["plain"]
    if rt.device.type == "cpu" and (decoder.dtype == torch.float32 or generate.has_fast_bf16()):
        layouts.append("blocked")
    if rt.device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines:
        layouts.append("fp16")
    inputs = {n: torch.ones(rows, 1, n, **like) for _, n in shapes}
    result = {}
    for layout in layouts:
        # as many weights as the model has, because the processor's cache would hold a few
        linears = [generate.FrozenLinear(torch.full(s, 0.01, **like), None, layout) for s in shapes]

        def products(linears=linears):
            for linear in linears:
                linear(inputs[linear.in_features])

        products()
        result[layout] = seconds(products, 5, rt.wait)
    return result


def weight_bytes(decoder):
    """What a step reads of the weights, as the decoder stores them: its layers and its head."""
    from nano.generate import FrozenLinear

    modules = [m for m in (*decoder.model.layers.modules(), decoder.head)]
    modules += [m.shared.linear for m in modules if hasattr(m, "shared") and m.number == 0]
    size = dict(fp16=2)
    return sum(
        m.in_features * m.out_features * size.get(m.layout, decoder.dtype.itemsize)
        for m in modules
        if isinstance(m, FrozenLinear)
    )


# ---------------------------------------------------------------------- the sides


def ours(decoder, rt):
    """-> run(prompts, lengths, batch) and prefill(ids)"""
    from nano import generate

    def run(prompts, lengths, batch):
        with rt.autocast():
            generate.generate(decoder, prompts, lengths, temperature=0.0, batch_size=batch)

    def prefill(ids):
        run([ids], 1, 1)

    return run, prefill


def transformers(cfg, dir, rt, static):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dir, dtype=rt.dtype).to(rt.device).eval()
    cache = dict(cache_implementation="static") if static else {}

    def run(prompts, lengths, batch):
        for i in range(0, len(prompts), batch):
            tokens = torch.tensor(prompts[i : i + batch], device=rt.device)
            n = max(lengths[i : i + batch])
            with contextlib.redirect_stderr(None):
                model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=n,
                    min_new_tokens=n,
                    pad_token_id=0,
                    do_sample=False,
                    **cache,
                )

    return run, lambda ids: run([ids], [1], 1)


def converted(cfg, dir, kind):
    """The model as a GGUF file of this type, written by llama.cpp's converter the first time."""
    folder = Path(cfg.llama)
    file = Path(cfg.out) / f"{Path(dir).name}-{kind}.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, folder / "convert_hf_to_gguf.py", dir]
        environment = os.environ | dict(PYTHONPATH=str(folder / "gguf-py"))
        command += ["--outtype", kind, "--outfile", file]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return file


def llama(cfg, file):
    """{"prefill": tokens/s, batch: tokens/s} of llama-batched-bench."""
    program = Path(cfg.llama) / "build/bin/llama-batched-bench"

    def batched(prompt, new, batches):
        slots = max(batches) * (prompt + new)
        command = [program, "-m", file, "-npp", prompt, "-ntg", new, "-c", slots, "-fa", "on"]
        command += ["-npl", ",".join(map(str, batches)), "-t", cfg.threads, "-tb", cfg.threads]
        command += ["-ngl", 0 if cfg.device == "cpu" else 999, "--output-format", "jsonl"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines]

    runs = [batched(cfg.prompt, cfg.new, cfg.batches) for _ in range(cfg.rounds)]
    speeds = {}
    for i, batch in enumerate(cfg.batches):
        speeds[batch] = statistics.median(run[i]["speed_tg"] for run in runs)
    if cfg.prefill:
        runs = [batched(cfg.prefill, 1, [1])[0]["speed_pp"] for _ in range(cfg.rounds)]
        speeds["prefill"] = statistics.median(runs)
    return speeds


# ---------------------------------------------------------------------- the table


def measure(cfg, run, prefill, prompts, unequal, rt):
    """{case: tokens/s} of a side: a batch size, "prefill" or "unequal"."""

    def timed(batch, new):
        rows = prompts[:batch]
        return seconds(lambda: run(rows, [new] * batch, batch), cfg.rounds, rt.wait)

    speeds = {}
    for batch in cfg.batches:
        run(prompts[:batch], [2] * batch, batch)  # warm up
        speeds[batch] = batch * (cfg.new - 1) / (timed(batch, cfg.new) - timed(batch, 1))
    if cfg.prefill:
        ids = [token for row in prompts for token in row] * cfg.prefill
        ids = ids[: cfg.prefill]
        prefill(ids)
        speeds["prefill"] = cfg.prefill / seconds(lambda: prefill(ids), cfg.rounds, rt.wait)
    if cfg.unequal:
        wall = seconds(lambda: run(prompts[: cfg.unequal], unequal, 16), 1, rt.wait)
        speeds["unequal"] = sum(unequal) / wall
    return speeds


def mixed(cfg, decoder, run, rng, rt):
    """-> (tokens/s, tokens/s that the memory allows, CUDA graphs recorded) of mixed lengths"""
    import torch

    prompts, lengths = rng.integers(100, 1025, (2, cfg.mixed)).tolist()
    prompts = [rng.integers(5, decoder.cfg.vocab_size, n).tolist() for n in prompts]
    recorded = 0

    class Counted(torch.cuda.CUDAGraph):
        def __new__(cls, *args):
            nonlocal recorded
            recorded += 1
            return super().__new__(cls, *args)

    plain, torch.cuda.CUDAGraph = torch.cuda.CUDAGraph, Counted
    batch = max(cfg.batches)
    wall = seconds(lambda: run(prompts, lengths, batch), 1, rt.wait)
    torch.cuda.CUDAGraph = plain
    pairs = zip(prompts, lengths, strict=True)
    cached = sum(n * (len(prompt) + n / 2) for prompt, n in pairs) * token_bytes(decoder)
    steps = sum(lengths) / batch
    memory = (steps * weight_bytes(decoder) + cached) / read_speed(rt)
    return sum(lengths) / wall, sum(lengths) / memory, recorded


def token_bytes(decoder):
    """Of a token in the cache."""
    model = decoder.cfg
    return 2 * model.n_layers * model.n_kv_heads * model.head_dim * decoder.dtype.itemsize


def bounds(cfg, decoder, rt):
    """-> ({case: tokens/s}, {case: {layout: ms}}, bytes a second)"""
    bandwidth = read_speed(rt)
    length = cfg.prompt + cfg.new / 2  # of a row, on average
    result, products = {}, {}
    for batch in cfg.batches:
        products[batch] = product_seconds(decoder, batch, rt)
        memory = (weight_bytes(decoder) + batch * length * token_bytes(decoder)) / bandwidth
        result[batch] = batch / max(memory, min(products[batch].values()))
    if cfg.prefill:
        products["prefill"] = product_seconds(decoder, cfg.prefill, rt, head=False)
        result["prefill"] = cfg.prefill / min(products["prefill"].values())
    products = {
        case: {layout: 1e3 * s for layout, s in layouts.items()}
        for case, layouts in products.items()
    }
    return result, products, bandwidth


def main(cfg):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if cfg.new < 2:
        raise UserError("new= must be 2 or more")
    if "llama" in cfg.sides and not cfg.llama:
        raise UserError("sides=llama needs llama=, a folder of llama.cpp")
    import numpy as np
    import torch

    from nano import runtime
    from nano.generate import Decoder

    torch.set_num_threads(cfg.threads)
    rt = runtime.start(cfg, parallel="none")
    dir = random_model(cfg.model) if cfg.model in SHAPES else cfg.model
    began = time.perf_counter()
    stored = None if rt.device.type == "cpu" else rt.dtype
    decoder = Decoder(weights.load_model(dir, device=rt.device, dtype=stored), rt.dtype)
    loaded = time.perf_counter() - began
    rng = np.random.default_rng(cfg.seed)
    count = max(*cfg.batches, cfg.unequal)
    prompts = rng.integers(5, decoder.cfg.vocab_size, (count, cfg.prompt)).tolist()
    unequal = np.minimum(rng.geometric(4 / cfg.new, cfg.unequal), cfg.new).tolist()

    bound, products, bandwidth = bounds(cfg, decoder, rt)
    speeds = {}
    for side in cfg.sides:
        if side == "llama":
            for kind in ("bf16", "f16"):
                speeds[f"llama.cpp {kind}"] = llama(cfg, converted(cfg, dir, kind))
            continue
        run, prefill = (
            ours(decoder, rt) if side == "ours" else transformers(cfg, dir, rt, side == "static")
        )
        speeds[side] = measure(cfg, run, prefill, prompts, unequal, rt)
        if side == "ours" and cfg.mixed:
            speeds[side]["mixed"], bound["mixed"], graphs = mixed(cfg, decoder, run, rng, rt)
            print(f"mixed lengths: {graphs} CUDA graphs recorded")
        del run, prefill

    cases = [*cfg.batches, *["prefill"] * (cfg.prefill > 0), *["unequal"] * (cfg.unequal > 0)]
    cases += ["mixed"] * ("mixed" in bound)
    print(
        f"{rt.name}, {cfg.threads} threads, {rt.dtype}: reads {bandwidth / 1e9:.1f} GB/s; a step "
        f"reads {weight_bytes(decoder) / 1e6:.0f} MB of weights; loaded and packed in "
        f"{loaded:.1f} s; prompts of {cfg.prompt} tokens, {cfg.new} new\n"
    )
    print(
        "| tokens/s | "
        + " | ".join(f"batch {c}" if isinstance(c, int) else c for c in cases)
        + " |"
    )
    print("| --- |" + " ---: |" * len(cases))
    rows = speeds | {"bound": bound}
    if "ours" in speeds:
        rows["ours / bound"] = {c: speeds["ours"][c] / bound[c] for c in bound}
        for side in speeds:
            if side != "ours":
                ratio = {c: speeds["ours"][c] / v for c, v in speeds[side].items()}
                rows[f"ours / {side}"] = ratio
    for name, row in rows.items():
        digits = 2 if "/" in name else 1
        cells = [f"{row[c]:.{digits}f}" if c in row else "" for c in cases]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nall products of a step, ms, by layout:")
    for case, layouts in products.items():
        print(f"  {case}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in layouts.items()))
    document = dict(
        device=rt.name,
        torch=torch.__version__,
        dtype=str(rt.dtype),
        threads=cfg.threads,
        bandwidth=bandwidth,
        products_ms=products,
        rows=rows,
    )
    print(json.dumps(document))


if __name__ == "__main__":
    config.run(main, Config)
