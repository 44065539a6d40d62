"""What a training run will need on given devices, from first principles: the memory of one device
by part, and the seconds of one step.

    python -m bench.plan size=70b devices=64 batch_size=512 micro_batch=1 max_length=4096
    python -m bench.plan model=models/llama-8b device="RTX 4090" devices=1 stage=dpo lora_rank=16
    python -m bench.plan size=8b device="TPU v5p" devices=64 stage=pretrain
    python -m bench.plan size=1b device=H200 devices=8 stage=ppo parallel=ddp
    python -m bench.plan size=70b devices=64 tensor=8           # a node's devices share each layer
    python -m bench.plan size=8b device="RTX 4090" offload=true # weights and moments in CPU memory

64 devices of TPU v5p are a v5p-128, because that name counts two cores a chip.

Memory is that of estimate.py, with what the stage adds to it. Time is counted, not measured. It is
floating-point operations at `utilisation` of the data sheet's peak, and the bytes that ring
collectives and offloading send at `link_utilisation` of the link's. The truth lies between the
longest of these, which hides everything else, and their sum. AdamW on the CPU hides nowhere.

Memory was compared with the peaks of torch's allocator, of two micro-batches a step (with one,
gradients come as activations go). On one H100 it is -1% off for 1.1B, full and LoRA. On a CPU it is
-1% to +2% off for 24M, with recomputation +3% to +14%, and on two processes -5% with fsdp and -10%
with tensor=2. Speed on one H100, in tokens/s as planned against as measured (and compiled): 1.1B
full 59,605 against 64,228 (74,673), LoRA 87,198 against 66,717 (87,971), pretraining 124M 496,221
against 448,978 compiled. Several GPUs and TPUs were not checked.
"""

from dataclasses import dataclass
from typing import Literal

import torch

import lora
import pretrain
from model import ModelConfig, Transformer
from nano import config, estimate, families, log, tensor
from nano.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError

# memory in GB, and in GB/s its bandwidth and what a device sends within its node, to other nodes
# and to the CPU. The first three are from the makers' data sheets. The others are assumed: a
# network adapter of 400 Gbit/s a device, 200 for A100 and 100 for cards, and PCIe 5 or 4. For TPUs
# it is all links of a chip together.
DEVICES = {
    "B200": (180, 8000, 900, 50, 64),
    "H200": (141, 4800, 450, 50, 64),
    "H100 PCIe": (80, 2000, 64, 50, 64),
    "H100": (80, 3350, 450, 50, 64),
    "A100": (80, 2039, 300, 25, 32),
    "MI300X": (192, 5300, 448, 50, 64),
    "L40S": (48, 864, 32, 12, 32),
    "L4": (24, 300, 32, 12, 32),
    "RTX 4090": (24, 1008, 32, 12, 32),
    "RTX 3090": (24, 936, 32, 12, 32),
    "TPU v4": (32, 1228, 300, 300, 0),
    "TPU v5e": (16, 819, 200, 200, 0),
    "TPU v5p": (95, 2765, 600, 600, 0),
    "TPU v6e": (32, 1640, 448, 448, 0),
}

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
    vocab_size: PositiveInt = 128_256  # with size=
    stage: Literal["pretrain", "sft", "reward", "dpo", "ppo"] = "sft"
    lora_rank: NonNegativeInt = 0  # 0: all weights are trained
    # on what
    device: str = "H100"
    devices: PositiveInt = 8
    node: PositiveInt = 8  # devices of one node
    memory: NonNegativeFloat = 0.0  # GB of a device; 0: the data sheet's
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp"] = "fsdp"
    tensor: PositiveInt = 1  # neighbouring devices of a node that share each layer
    offload: bool = False  # weights, gradients and moments in CPU memory
    host_bandwidth: PositiveFloat = 200.0  # GB/s of a node's CPU memory, where AdamW works then
    utilisation: PositiveFloat = 0.4  # of the peak FLOP/s, recomputation included
    link_utilisation: PositiveFloat = 0.7
    # how
    batch_size: PositiveInt = 64  # rows (ppo: episodes) of one step, over all devices
    micro_batch: PositiveInt = 1  # rows of one forward on one device
    max_length: PositiveInt = 4096  # tokens of a row (ppo: of prompt and response)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    grad_checkpoint: bool = True
    # ppo
    max_new_tokens: PositiveInt = 512
    rollout_batch: PositiveInt = 32  # responses that one device generates at the same time
    ppo_epochs: PositiveInt = 4


def build(cfg, head):
    """A Transformer on the meta device, in the dtypes that the stages give it."""
    if cfg.model:
        shape = families.load_config(cfg.model)
    else:
        sizes = pretrain.SIZES | SIZES
        if cfg.size not in sizes:
            raise UserError(f"size={cfg.size}: use {', '.join(sizes)}, or model=")
        layers, dim, heads, kv_heads, ffn, tied = sizes[cfg.size]
        shape = ModelConfig(
            vocab_size=cfg.vocab_size,
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=dim // heads,
            ffn_dim=ffn,
            tie_embeddings=tied,
        )
    shape.head = head
    with torch.device("meta"):
        model = Transformer(shape)
        if cfg.lora_rank:
            model.to(getattr(torch, cfg.dtype))
            lora.apply(model, cfg.lora_rank, 32.0)
    return model


def check(cfg, shape):
    """What runtime.py and ppo.py refuse, for the same reasons."""
    config.check(cfg)
    local = min(cfg.node, cfg.devices)
    if cfg.devices % local:
        raise UserError(f"devices={cfg.devices} is no multiple of node={cfg.node}")
    if cfg.tensor > 1 and cfg.offload:
        raise UserError(f"tensor={cfg.tensor} must be 1 with offload=true")
    if local % cfg.tensor:
        raise UserError(f"tensor={cfg.tensor} must divide the number of devices of a node, {local}")
    tensor.check(shape, cfg.tensor)
    if cfg.batch_size % (cfg.devices // cfg.tensor * cfg.micro_batch):
        devices = f"{cfg.devices} devices" + f" / tensor={cfg.tensor}" * (cfg.tensor > 1)
        raise UserError(
            f"batch_size={cfg.batch_size} is no multiple of "
            f"micro_batch={cfg.micro_batch} x {devices}"
        )
    if cfg.stage == "ppo" and cfg.max_new_tokens >= cfg.max_length:
        raise UserError(
            f"max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt "
            f"in max_length={cfg.max_length}"
        )
    if "tpu" in cfg.device.lower():
        if cfg.offload or cfg.reduce_dtype != "float32":
            raise UserError(
                "device=xla, for TPUs, has no offload=, and no reduce_dtype=: "
                "its gradients are summed in float32"
            )
        if cfg.parallel not in ("ddp", "fsdp"):
            raise UserError(f"parallel={cfg.parallel}: on TPUs use ddp or fsdp")
    shards = dict(ddp=1, hsdp=local).get(cfg.parallel, cfg.devices)
    if cfg.offload and shards == 1 and (cfg.stage != "ppo" or cfg.lora_rank):
        raise UserError(
            "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts: "
            "set parallel= to one of them"
        )


def plan(cfg):
    """What a run needs -> dict.

    memory: {part: bytes of one device}. room: bytes that the device has. host: bytes of CPU memory
    for it.
    parameters, trained: numbers of the model. tokens: of a step.
    compute, communicate, transfer (to and from CPU memory), update (there), generate: seconds of a
    step. useful: seconds of the work without recomputation, at the full peak."""
    peak = log.peak_flops(cfg.device)
    name = next((name for name in DEVICES if name.lower() in cfg.device.lower()), None)
    if peak is None or name is None:
        raise UserError(f"device={cfg.device}: use {', '.join(DEVICES)}")
    room, bandwidth = (1e9 * x for x in DEVICES[name][:2])
    near, far, bus = (1e9 * x * cfg.link_utilisation for x in DEVICES[name][2:])
    local = min(cfg.node, cfg.devices)
    # A ring that leaves the node runs in as many strands as it has network adapters there. There is
    # one adapter a device, and tensor groups share them.
    link = min(near, far * local / cfg.tensor) if cfg.devices > cfg.node else near
    dtype, tensor = getattr(torch, cfg.dtype), cfg.tensor
    model = build(cfg, "score" if cfg.stage == "reward" else "lm")
    check(cfg, model.cfg)
    shards = dict(ddp=tensor, hsdp=local).get(cfg.parallel, cfg.devices)
    fsdp = shards // tensor  # devices over which FSDP shards
    groups = cfg.devices // tensor  # groups of devices that see rows of their own
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # Memory. ppo holds a critic of the policy's kind, and two more models that are only read. With
    # LoRA all four have one trunk.
    rows = cfg.micro_batch * cfg.max_length  # tokens of one forward
    memory = estimate.memory(
        model, rows, shards, dtype, cfg.grad_checkpoint, cfg.parallel == "zero2", tensor
    )
    if cfg.stage == "ppo":
        extra = memory["gradients"] + memory["optimizer"]
        memory["critic"] = extra + (0 if cfg.lora_rank else memory["weights"])
        memory["reference, reward"] = 0 if cfg.lora_rank else 2 * dtype.itemsize * total / shards
        slots = min(cfg.rollout_batch, cfg.batch_size // groups) * cfg.max_length
        heads = model.cfg.n_kv_heads * model.cfg.head_dim
        cache = 2 * model.cfg.n_layers * heads * dtype.itemsize * slots
        # decoding reads a whole copy in the matrix dtype
        copy = dtype.itemsize * total if shards > 1 or not cfg.lora_rank else 0
        # activations and head are not there at that time
        memory["rollout"] = max(0, cache + copy - memory["activations"] - memory["head"])
    host = 0
    if cfg.offload and shards == 1:
        # ppo parks the models that are not at work. Policy and critic meet in the update alone.
        host = sum(memory[part] for part in ("weights", "optimizer", "critic", "reference, reward"))
        frozen = memory.pop("reference, reward")
        moved = 2 * (5 * memory["weights"] + 2 * memory["optimizer"] + frozen)  # there and back
        memory.pop("rollout")
    elif cfg.offload:
        host = sum(
            memory.pop(part, 0)
            for part in ("weights", "gradients", "optimizer", "critic", "reference, reward")
        )

    # floating-point operations; a forward is a third of a step that trains all weights
    forward = model.flops_per_token(cfg.max_length) / 3
    train = model.flops_per_token(cfg.max_length, "adapter" if cfg.lora_rank else "all")
    head = model.head_weight.numel() if model.cfg.head == "lm" else 0
    again = (tensor - 1) * head  # each device of a tensor group does the whole head
    passes = train + (4 if cfg.lora_rank else 6) * again + (forward if cfg.grad_checkpoint else 0)
    tokens = cfg.batch_size * cfg.max_length
    if cfg.stage == "ppo":
        # log-probabilities of policy and reference, score and value once, then policy and critic in
        # each pass
        passes = 4 * forward + 2 * 2 * again + 2 * cfg.ppo_epochs * passes
        useful = 4 * forward + 2 * cfg.ppo_epochs * train
    else:
        useful = train
    compute = tokens * passes / (cfg.devices * peak * cfg.utilisation)

    def ring(size, n):
        """Bytes that each of n ranks sends in an all-gather or a reduce-scatter of `size` bytes.

        An all-reduce is both."""
        return size * (n - 1) / n

    micros = cfg.batch_size // (groups * cfg.micro_batch)
    gradients = getattr(torch, cfg.reduce_dtype).itemsize * trained / tensor
    weights = dtype.itemsize * total / tensor
    gathers = 1 if cfg.parallel == "zero2" else 2  # forward and backward
    rounds = micros * (cfg.ppo_epochs * 2 if cfg.stage == "ppo" else 1)
    alone = micros * 4 if cfg.stage == "ppo" else 0  # forwards without a backward
    if cfg.parallel == "ddp":  # with tensor=, gradients meet in each micro-batch
        communicate = (
            2 * ring(gradients, groups) * (rounds if tensor > 1 else rounds / micros) / link
        )
    elif cfg.parallel == "hsdp":
        nodes = -(-cfg.devices // cfg.node)
        communicate = rounds * (gathers * ring(weights, fsdp) + ring(gradients, fsdp)) / near
        communicate += rounds * 2 * ring(gradients / fsdp, nodes) / far
    else:
        communicate = rounds * (gathers * ring(weights, fsdp) + ring(gradients, fsdp)) / link
    if fsdp > 1:
        communicate += alone * ring(weights, fsdp) / link
    if cfg.stage == "ppo" and shards > 1:
        communicate += ring(weights * tensor, shards) / link  # the copy for decoding
    if tensor > 1:
        # sums of (tokens, dim). Forward there are two a layer and one of embeddings. Backward there
        # are five a layer (q, k, v, gate and up), and one that recomputation repeats. The head is
        # gathered.
        summed = 2 * ring(dtype.itemsize * rows * model.cfg.dim, tensor)
        once = (2 * model.cfg.n_layers + 1) * summed + ring(dtype.itemsize * head, tensor)
        communicate += (
            (rounds + alone) * once
            + rounds * (5 + cfg.grad_checkpoint) * model.cfg.n_layers * summed
        ) / near

    # Offload. FSDP copies its shards as they are held, before the cast, at each gathering, and the
    # gradient back. AdamW reads four numbers and writes three. Before that, clipping reads one
    # twice and writes it.
    transfer = update = 0.0
    if cfg.offload and shards == 1:
        transfer = moved / bus
    elif cfg.offload:
        held = sum(p.numel() * p.itemsize for p in model.parameters())
        transfer = ((rounds * gathers + alone) * held + rounds * 4 * trained) / shards / bus
        updates = 2 * cfg.ppo_epochs if cfg.stage == "ppo" else 1
        update = updates * (28 + 12) * trained / shards * local / (1e9 * cfg.host_bandwidth)

    generate = 0.0
    if cfg.stage == "ppo":  # a decoding step reads the weights and, on average, half of the cache
        turns = -(-(cfg.batch_size // groups) // cfg.rollout_batch)
        generate = (
            turns * cfg.max_new_tokens * (dtype.itemsize * total + cache / 2) / (bandwidth * 0.6)
        )
    return dict(
        memory=memory,
        room=1e9 * cfg.memory or room,
        host=host,
        parameters=total,
        trained=trained,
        tokens=tokens,
        compute=compute,
        communicate=communicate,
        transfer=transfer,
        update=update,
        generate=generate,
        useful=tokens * useful / (cfg.devices * peak),
    )


def main(cfg):
    p = plan(cfg)
    used = sum(p["memory"].values())
    print(" ".join(["plan:", *config.diff(cfg)]))
    cut = f"parallel={cfg.parallel}" + f" tensor={cfg.tensor}" * (cfg.tensor > 1)
    print(
        f"{p['parameters']:,} parameters, {p['trained']:,} trained; "
        f"{cfg.devices} x {cfg.device}, {cut}"
    )
    for part, size in p["memory"].items():
        print(f"  {part:20} {size / 1e9:9.2f} GB")
    verdict = (
        "fits" if used < 0.92 * p["room"] else "is tight" if used < p["room"] else "DOES NOT FIT"
    )
    print(f"  {'a device needs':20} {used / 1e9:9.2f} GB of {p['room'] / 1e9:.0f}: {verdict}")
    if p["host"]:
        print(
            f"  {'in CPU memory':20} {p['host'] / 1e9:9.2f} GB, "
            f"{p['host'] * min(cfg.node, cfg.devices) / 1e9:.0f} of a node"
        )
    at_once = [p["compute"], p["communicate"], p["transfer"]]
    best, worst = (p["generate"] + p["update"] + f(at_once) for f in (max, sum))
    names = dict(
        compute="work",
        communicate="communication",
        transfer="transfers",
        update="AdamW",
        generate="generation",
    )
    parts = [
        f"{name} {p[part]:.2f} s"
        for part, name in names.items()
        if p[part] or part in ("compute", "communicate")
    ]
    print(f"a step of {p['tokens']:,} tokens: {best:.2f} to {worst:.2f} s = {', '.join(parts)}")
    speed = f"{p['tokens'] / worst:,.0f} to {p['tokens'] / best:,.0f} tokens/s"
    print(f"{speed}, mfu {p['useful'] / worst:.0%} to {p['useful'] / best:.0%}")


if __name__ == "__main__":
    config.run(main, Config)
