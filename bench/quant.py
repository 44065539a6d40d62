"""What quantised weights cost: loss, size and the time to dequantise, beside bitsandbytes.

    python -m bench.quant model=models/smollm2 text=book.txt

The loss is that of next tokens in the first windows of the text, in fp32. bitsandbytes' int8 also
quantises activations. Its 4-bit matrices have the same numbers as ours, so their loss differs by
rounding alone. A pass dequantises every matrix of the model once, to bf16; the best of three.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import nano  # noqa: F401  first, because bench/nano.py finds the others
from nano import config, quant, runtime, weights
from nano.config import PathText, PositiveInt


@dataclass
class Config:
    text: Path
    model: PathText = "models/smollm2"
    windows: PositiveInt = 2
    max_length: PositiveInt = 512  # tokens of a window
    threads: PositiveInt = 1


def loss_of(logits, tokens):
    """logits(windows (1, T)) -> (1, T, V). The mean next-token loss over all windows."""
    with torch.no_grad():
        losses = [F.cross_entropy(logits(row[None])[0, :-1], row[1:]).item() for row in tokens]
    return sum(losses) / len(losses)


def theirs(cfg, kind, tokens):
    """The loss of the model as transformers and bitsandbytes quantise it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = dict(load_in_8bit=True)
    if kind != "int8":
        how = dict(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        cfg.model,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**how),
        device_map="cpu",
    )
    return loss_of(lambda x: model(x).logits, tokens)


def pass_time(model, kernel):
    """Seconds to dequantise all matrices once."""
    best = math.inf
    for _, layer in quant.layers(model):
        layer.kernel = kernel
    for _ in range(3):
        began = time.perf_counter()
        for _, layer in quant.layers(model):
            layer.dense(torch.bfloat16)
        best = min(best, time.perf_counter() - began)
    return best


def main(cfg):
    torch.set_num_threads(cfg.threads)
    runtime.start(cfg, device="cpu", parallel="none", dtype="float32", seed=0)
    opened = weights.open(cfg.model, dtype=torch.float32)
    count = cfg.windows * cfg.max_length
    ids = opened.tok.encode(cfg.text.read_text(encoding="utf-8")[: 8 * count])[:count]
    tokens = torch.tensor(ids).view(cfg.windows, -1)
    plain = loss_of(lambda x: opened.model.logits(opened.model.hidden(x)), tokens)
    print("| | bits a weight | loss | bitsandbytes' loss | a pass, torch | a pass, bitsandbytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| as stored | 16 | {plain:.4f} | | | |", flush=True)
    for kind in ("nf4", "fp4", "int8"):
        model = weights.load_model(cfg.model, dtype=torch.float32, method=quant.Method(kind))
        layers = [layer for _, layer in quant.layers(model)]
        stored = sum(p.nbytes for layer in layers for p in layer.packed().tensors.values())
        bits = 8 * stored / sum(math.prod(layer.shape) for layer in layers)
        ours = loss_of(lambda x: model.logits(model.hidden(x)), tokens)  # noqa: B023
        passes = [pass_time(model, kernel) for kernel in ("torch", "bitsandbytes")]
        times = " | ".join(f"{seconds * 1e3:.0f} ms" for seconds in passes)
        print(
            f"| {kind} | {bits:.2f} | {ours:.4f} | {theirs(cfg, kind, tokens):.4f} | {times} |",
            flush=True,
        )


if __name__ == "__main__":
    config.run(main, Config)
