"""Attention of a packed row on a CPU: model.document_attention beside torch's kernel.

    python -m bench.attention
    python -m bench.attention 'documents=[500,500,500,500]' rounds=30

torch's kernel runs in the row's dtype and in fp32. A run is the forward and backward of one layer.
Every side runs once a round, in turn, and the table shows medians. An error is the norm of the
difference to float64 over the norm: of the output, and of the worst gradient.
"""

import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import nano  # noqa: F401  first, because bench/nano.py finds the others
from model import Extras, document_attention
from nano import config, runtime
from nano.config import NonNegativeInt


@dataclass
class Config:
    documents: tuple[int, ...] = (352, 301, 270, 240, 220, 190, 160, 130, 90, 53)  # their lengths
    n_heads: NonNegativeInt = 9
    n_kv_heads: NonNegativeInt = 3
    dim: NonNegativeInt = 64  # of a head
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rounds: int = 15
    threads: int = 2


def kernel(q, k, v):
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, enable_gqa=True
    )[0]


def kernel_in_fp32(q, k, v):
    return kernel(q.float(), k.float(), v.float()).to(q.dtype)


def run(attention, documents, inputs, back):
    """-> (seconds of a forward and backward, [output, *gradients of the inputs])"""
    for t in inputs:
        t.grad = None
    began = time.perf_counter()
    parts = zip(*(t.split(documents, dim=1) for t in inputs), strict=True)
    y = torch.cat([attention(*part) for part in parts], dim=1)
    y.backward(back)
    return time.perf_counter() - began, [y.detach(), *(t.grad for t in inputs)]


def main(cfg):
    torch.set_num_threads(cfg.threads)
    runtime.Runtime("cpu")  # allocation and denormals as in training
    torch.manual_seed(0)
    total = sum(cfg.documents)
    dtype = getattr(torch, cfg.dtype)
    q, k, v, back = (
        torch.randn(n, total, cfg.dim).to(dtype)
        for n in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads, cfg.n_heads)
    )
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    _, right = run(kernel, cfg.documents, exact, back.double())
    inputs = [t.requires_grad_() for t in (q, k, v)]
    ours = partial(document_attention, extras=Extras(cfg.dim**-0.5))
    sides = dict(kernel=kernel, kernel_in_fp32=kernel_in_fp32, document_attention=ours)
    times = {name: [] for name in sides}
    for turn in range(cfg.rounds + 1):
        for name, attention in sides.items():
            seconds, results = run(attention, cfg.documents, inputs, back)
            if turn:  # the first round warms up
                times[name].append(seconds)
                continue
            pairs = zip(results, right, strict=True)
            output, *gradients = [((a - b).norm() / b.norm()).item() for a, b in pairs]
            print(f"{name:20} error of the output {output:.4f}, of a gradient {max(gradients):.4f}")
    machine = f"{cfg.threads} threads, torch {torch.__version__}, {platform.machine()}"
    print(f"{len(cfg.documents)} documents, {total:,} tokens, {cfg.dtype}; {machine}")
    for name, seconds in times.items():
        middle, low, high = (1e3 * f(seconds) for f in (statistics.median, min, max))
        print(f"{name:20} {middle:7.1f} ms ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    config.run(main, Config)
