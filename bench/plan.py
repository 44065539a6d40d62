"""What a training run will need on given devices, from first principles: memory of one device by part, and seconds of one step.

    python bench/plan.py size=70b device=H100 devices=64 batch_size=512 micro_batch=1 max_length=4096
    python bench/plan.py model=models/llama-8b device="RTX 4090" devices=1 stage=dpo lora_rank=16
    python bench/plan.py size=8b device="TPU v5p" devices=64 stage=pretrain             # v5p-128: it counts two cores a chip
    python bench/plan.py size=1b device=H200 devices=8 stage=ppo parallel=ddp

Memory is that of estimate.py, with what the stage adds to it. Time is counted, not measured: floating-point operations at
`utilisation` of the data sheet's peak, and the bytes that ring collectives send at `link_utilisation` of the link's; the truth lies
between the longer of the two (all communication hidden behind the work) and their sum.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import config
import estimate
import log
import lora
import pretrain
from config import UserError
from model import ModelConfig, Transformer

# From the makers' data sheets: memory GB, its bandwidth GB/s, GB/s that a device sends within its node; and, assumed, to other
# nodes: an adapter of 400 Gbit/s a device, 200 for A100, 100 for cards. TPUs: all links of a chip together.
DEVICES = {
    "B200": (180, 8000, 900, 50), "H200": (141, 4800, 450, 50), "H100 PCIe": (80, 2000, 64, 50), "H100": (80, 3350, 450, 50),
    "A100": (80, 2039, 300, 25), "MI300X": (192, 5300, 448, 50), "L40S": (48, 864, 32, 12), "L4": (24, 300, 32, 12),
    "RTX 4090": (24, 1008, 32, 12), "RTX 3090": (24, 936, 32, 12),
    "TPU v4": (32, 1228, 300, 300), "TPU v5e": (16, 819, 200, 200), "TPU v5p": (95, 2765, 600, 600),
    "TPU v6e": (32, 1640, 448, 448),
}  # fmt: skip

# Shapes beyond those of pretrain.py (layers, dim, heads, key/value heads, ffn, tied): Llama 3's
SIZES = {
    "8b": (32, 4096, 32, 8, 14336, False),
    "70b": (80, 8192, 64, 8, 28672, False),
    "405b": (126, 16384, 128, 8, 53248, False),
}


@dataclass
class Config:
    # what
    model: str = ""  # model directory, of which only config.json is read; "": the size
    size: str = "8b"  # toy, 15m, 124m, 350m, 1b, 3b, 7b as in pretrain.py; 8b, 70b, 405b
    vocab_size: int = 128_256  # with size=
    stage: Literal["pretrain", "sft", "reward", "dpo", "ppo"] = "sft"
    lora_rank: int = 0  # 0: all weights are trained
    # on what
    device: str = "H100"
    devices: int = 8
    node: int = 8  # devices of one node
    memory: float = 0.0  # GB of a device; 0: the data sheet's
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp"] = "fsdp"
    utilisation: float = 0.4  # of the peak FLOP/s, recomputation included
    link_utilisation: float = 0.7
    # how
    batch_size: int = 64  # rows (ppo: episodes) of one step, over all devices
    micro_batch: int = 1  # rows of one forward on one device
    max_length: int = 4096  # tokens of a row (ppo: of prompt and response)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    grad_checkpoint: bool = True
    # ppo
    max_new_tokens: int = 512
    rollout_batch: int = 32  # responses that one device generates at the same time
    ppo_epochs: int = 4


def build(cfg, head):
    """The model without memory: a Transformer on the meta device, in the dtypes that the stages give it."""
    if cfg.model:
        shape = checkpoint.load_config(cfg.model)
    else:
        sizes = pretrain.SIZES | SIZES
        if cfg.size not in sizes:
            raise UserError(f"size={cfg.size}: use {', '.join(sizes)}, or model=")
        layers, dim, heads, kv_heads, ffn, tied = sizes[cfg.size]
        shape = ModelConfig(vocab_size=cfg.vocab_size, dim=dim, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads,
                            head_dim=dim // heads, ffn_dim=ffn, tie_embeddings=tied)  # fmt: skip
    shape.head = head
    with torch.device("meta"):
        model = Transformer(shape)
        if cfg.lora_rank:
            model.to(getattr(torch, cfg.dtype))
            lora.apply(model, cfg.lora_rank, 32.0)
    return model


def plan(cfg):
    """-> dict: memory {part: bytes of one device}, room (bytes it has); parameters, trained; of a step its tokens, the seconds to
    compute, communicate and generate, and those that the work without recomputation takes at the full peak: useful."""
    peak = log.peak_flops(cfg.device)
    name = next((name for name in DEVICES if name.lower() in cfg.device.lower()), None)
    if peak is None or name is None:
        raise UserError(f"device={cfg.device}: use {', '.join(DEVICES)}")
    room, bandwidth, near, far = (1e9 * x for x in DEVICES[name])
    across = cfg.devices > cfg.node  # then every ring goes over the network, and is as fast as that
    link = (far if across else near) * cfg.link_utilisation
    if cfg.batch_size % (cfg.devices * cfg.micro_batch):
        raise UserError(f"batch_size={cfg.batch_size} is no multiple of micro_batch={cfg.micro_batch} x {cfg.devices} devices")
    dtype = getattr(torch, cfg.dtype)
    shards = dict(ddp=1, hsdp=min(cfg.node, cfg.devices)).get(cfg.parallel, cfg.devices)
    model = build(cfg, "score" if cfg.stage == "reward" else "lm")
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # memory; ppo holds a critic of the policy's kind, and two more models that are only read, or one trunk for all four with LoRA
    memory = estimate.memory(model, cfg.micro_batch * cfg.max_length, shards, dtype, cfg.grad_checkpoint, cfg.parallel == "zero2")
    if cfg.stage == "ppo":
        extra = memory["gradients"] + memory["optimizer"]
        memory["critic"] = extra + (0 if cfg.lora_rank else memory["weights"])
        memory["reference, reward"] = 0 if cfg.lora_rank else 2 * dtype.itemsize * total / shards
        slots = min(cfg.rollout_batch, cfg.batch_size // cfg.devices) * cfg.max_length
        cache = 2 * model.cfg.n_layers * model.cfg.n_kv_heads * model.cfg.head_dim * dtype.itemsize * slots
        copy = dtype.itemsize * total if shards > 1 or not cfg.lora_rank else 0  # decoding reads a whole copy in the matrix dtype
        memory["rollout"] = max(0, cache + copy - memory["activations"] - memory["head"])  # which are not there at that time

    # floating-point operations; a forward is a third of a step that trains all weights
    forward = model.flops_per_token(cfg.max_length) / 3
    train = model.flops_per_token(cfg.max_length, "adapter" if cfg.lora_rank else "all")
    passes = train + (forward if cfg.grad_checkpoint else 0)
    tokens = cfg.batch_size * cfg.max_length
    if cfg.stage == "ppo":  # log-probabilities of policy and reference, score and value once; then policy and critic in each pass
        passes, useful = 4 * forward + 2 * cfg.ppo_epochs * passes, 4 * forward + 2 * cfg.ppo_epochs * train
    else:
        useful = train
    compute = tokens * passes / (cfg.devices * peak * cfg.utilisation)

    def ring(size, n):
        """Bytes that each of n ranks sends in an all-gather or a reduce-scatter of `size` bytes; an all-reduce is both."""
        return size * (n - 1) / n

    micros = cfg.batch_size // (cfg.devices * cfg.micro_batch)
    gradients, weights = 4 * trained, dtype.itemsize * total
    gathers = 1 if cfg.parallel == "zero2" else 2  # forward and backward
    rounds = micros * (cfg.ppo_epochs * 2 if cfg.stage == "ppo" else 1)
    if cfg.parallel == "ddp":
        communicate = 2 * ring(gradients, cfg.devices) * (rounds / micros) / link
    elif cfg.parallel == "hsdp":
        nodes = -(-cfg.devices // cfg.node)
        communicate = rounds * (gathers * ring(weights, shards) + ring(gradients, shards)) / (near * cfg.link_utilisation)
        communicate += rounds * 2 * ring(gradients / shards, nodes) / (far * cfg.link_utilisation)
    else:
        communicate = rounds * (gathers * ring(weights, shards) + ring(gradients, shards)) / link
    if cfg.stage == "ppo" and shards > 1:
        communicate += (micros * 4 + 1) * ring(weights, shards) / link  # the four forwards, and the copy for decoding

    generate = 0.0
    if cfg.stage == "ppo":  # a decoding step reads the weights and, on average, half of the cache
        turns = -(-(cfg.batch_size // cfg.devices) // cfg.rollout_batch)
        generate = turns * cfg.max_new_tokens * (dtype.itemsize * total + cache / 2) / (bandwidth * 0.6)
    return dict(
        memory=memory, room=1e9 * cfg.memory or room, compute=compute, communicate=communicate, generate=generate, tokens=tokens,
        parameters=total, trained=trained, useful=tokens * useful / (cfg.devices * peak),
    )  # fmt: skip


def main(cfg):
    p = plan(cfg)
    used = sum(p["memory"].values())
    print(" ".join(["plan:", *config.diff(cfg)]))
    print(f"{p['parameters']:,} parameters, {p['trained']:,} trained; {cfg.devices} x {cfg.device}, parallel={cfg.parallel}")
    for part, size in p["memory"].items():
        print(f"  {part:20} {size / 1e9:9.2f} GB")
    verdict = "fits" if used < 0.92 * p["room"] else "is tight" if used < p["room"] else "DOES NOT FIT"
    print(f"  {'a device needs':20} {used / 1e9:9.2f} GB of {p['room'] / 1e9:.0f}: {verdict}")
    best = p["generate"] + max(p["compute"], p["communicate"])
    worst = p["generate"] + p["compute"] + p["communicate"]
    parts = [f"work {p['compute']:.2f} s", f"communication {p['communicate']:.2f} s"]
    parts += [f"generation {p['generate']:.2f} s"] if p["generate"] else []
    print(f"a step of {p['tokens']:,} tokens: {best:.2f} to {worst:.2f} s = {', '.join(parts)}")
    speed = f"{p['tokens'] / worst:,.0f} to {p['tokens'] / best:,.0f} tokens/s"
    print(f"{speed}, mfu {p['useful'] / worst:.0%} to {p['useful'] / best:.0%}")


if __name__ == "__main__":
    config.run(main, Config)
