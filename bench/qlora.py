"""Where the same steps of LoRA lead on a plain base, on an nf4 base, and on that of peft and
bitsandbytes.

    python -m prepare.instructions source=alpaca_en_demo.json model=models/smollm2 \\
        out=out/bench/qlora val=64 max_length=128 over_length=drop
    python -m bench.qlora

The three see the same rows, without packing, start from the same adapter, and compute in fp32. The
validation loss is that of the target tokens of all held-out rows. A step is the median of all.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import nano  # noqa: F401  first, because bench/nano.py finds the others
import sft
from lora import adapted, apply
from nano import batches, config, quant, runtime, store, weights
from nano.config import NonNegativeFloat, PathText, PositiveFloat, PositiveInt, Seed


@dataclass
class Config:
    data: PathText = "out/bench/qlora"  # prepared folder with a validation split
    model: PathText = "models/smollm2"
    steps: PositiveInt = 30
    batch_size: PositiveInt = 4  # rows of a step
    max_length: PositiveInt = 128
    lr: NonNegativeFloat = 2e-4
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveFloat = 32.0
    threads: PositiveInt = 1
    seed: Seed = 0


def ours(cfg, kind):
    """-> (the model with a fresh adapter, its loss: micro-batch -> sum over targets)"""
    model = weights.load_model(cfg.model, dtype=torch.float32, method=quant.Method(kind))
    torch.manual_seed(cfg.seed)
    apply(model, cfg.lora_rank, cfg.lora_alpha)
    return model, lambda micro: sft.loss_sum(model, model(micro), micro)


def theirs(cfg, start):
    """The same of peft and bitsandbytes. start: our model, whose adapter is copied."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        cfg.model, dtype=torch.float32, quantization_config=how, device_map="cpu"
    )
    adapter = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, adapter)
    with torch.no_grad():
        for name, layer in adapted(start):
            peer = model.base_model.model.get_submodule(name)
            peer.lora_A["default"].weight.copy_(layer.lora_A["default"])

    def loss(micro):  # padding stands behind the tokens, which do not see it
        logits = model(input_ids=micro["tokens"]).logits.flatten(0, 1)
        nll = F.cross_entropy(logits[micro["index"]], micro["targets"], reduction="none")
        return (nll * micro["weights"]).sum()

    return model, loss


def measure(cfg, model, loss, train, val):
    """Trains -> (validation loss before, after, seconds of a step)."""

    @torch.no_grad()
    def evaluate():
        micros = [micro for step in range(val.steps_per_epoch) for micro in val.batch(step)]
        return sum(loss(m).item() for m in micros) / sum(m["n_targets"] for m in micros)

    before, seconds = evaluate(), []
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=cfg.lr)
    for step in range(cfg.steps):
        (micro,) = train.batch(step)
        began = time.perf_counter()
        (loss(micro) / micro["n_targets"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return before, evaluate(), statistics.median(seconds)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    runtime.start(cfg, device="cpu", parallel="none", dtype="float32")
    train, val = (
        batches.Rows(
            store.Store(cfg.data, split),
            cfg.batch_size,
            cfg.batch_size,
            cfg.max_length,
            packing=False,
            seed=cfg.seed,
        )
        for split in ("train", "val")
    )
    print("| base | loss before | after | a step |\n| --- | ---: | ---: | ---: |")
    for name in ("plain", "nf4", "nf4, peft + bitsandbytes"):
        model, loss = ours(cfg, "none" if name == "plain" else "nf4")
        if "peft" in name:
            model, loss = theirs(cfg, model)
        before, after, seconds = measure(cfg, model, loss, train, val)
        print(f"| {name} | {before:.4f} | {after:.4f} | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    config.run(main, Config)
