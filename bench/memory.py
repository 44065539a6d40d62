"""What a training run will need on given devices, from first principles: the memory of one device
by part, and the seconds of one step.

    # which method fits: a table of sizes and methods on one device
    python -m bench.memory 'table=[1b,3b,8b]' device="RTX 4090" max_length=2048
    python -m bench.memory size=70b device=H100 devices=64 batch_size=512 micro_batch=1
    python -m bench.memory model=models/llama-8b device="RTX 4090" devices=1 stage=dpo lora_rank=16
    # v5p-128: its name counts two cores a chip
    python -m bench.memory size=8b device="TPU v5p" devices=64 stage=pretrain
    python -m bench.memory size=1b device=H200 devices=8 stage=ppo parallel=ddp
    # the devices of a node share each layer
    python -m bench.memory size=70b device=H100 devices=64 tensor=8
    # an nf4 trunk for all four models of ppo
    python -m bench.memory size=8b device="RTX 4090" devices=1 stage=ppo lora_rank=16 quant=nf4 \\
        batch_size=32 max_length=768 max_new_tokens=256
    # weights and moments in CPU memory
    python -m bench.memory size=8b device="RTX 4090" devices=8 node=8 offload=true
    # run each method for two steps, and compare
    python -m bench.memory here=cpu model=models/smollm2 max_length=512 dtype=float32

Memory is that of nano/estimate.py, with what the stage adds to it. Time is counted and not
measured. Floating-point operations run at `utilisation` of the data sheet's peak. Ring collectives
and offloading send their bytes at `link_utilisation` of the link's speed. The truth lies between
the longest of these times, with the others hidden behind it, and their sum. Generation and AdamW on
the CPU hide nowhere.

Memory was compared with the peaks of torch's allocator over steps of two micro-batches. With one
micro-batch, gradients come as activations go. The plan differs from the peak by

    one H100, 1.1B, full and LoRA    -1%
    CPU, 24M                         -1% to +2%
    CPU, 24M, with recomputation     +3% to +14%
    two processes, fsdp              -5%
    two processes, tensor=2          -10%

Speed was compared on one H100, in tokens/s:

                         planned    measured    compiled
    1.1B, full            59,605      64,228      74,673
    1.1B, LoRA            87,198      66,717      87,971
    124M, pretraining    496,221                 448,978

Plans for several GPUs and for TPUs have not been checked.
"""

import contextlib
import gc
import importlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch

import nano  # noqa: F401  first, because bench/nano.py finds the others
import pretrain
from lora import apply as add_adapters
from lora import linear_names
from model import ModelConfig
from nano import config, estimate, families, log, quant, store, tensor, tokenizer, weights
from nano.config import (
    FourBit,
    LoRA,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    UserError,
    With,
    refuse,
)

# Memory in GB, its bandwidth in GB/s, and the GB/s that a device sends within its node, to other
# nodes and to the CPU. The makers' data sheets give the first three. The others are assumed: an
# adapter of 400 Gbit/s a device (200 for A100, 100 for cards), and PCIe 5 or 4 to the CPU. For a
# TPU all links of a chip count together.
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

# The shapes of Llama 3, beside those of pretrain.py: layers, dim, heads, kv-heads, ffn, tied
SIZES = {
    "8b": (32, 4096, 32, 8, 14336, False),
    "70b": (80, 8192, 64, 8, 28672, False),
    "405b": (126, 16384, 128, 8, 53248, False),
}


@dataclass
class Config:
    # what
    model: PathText = ""  # directory, of which only config.json is read; "": use size
    size: str = "8b"  # one of pretrain.py's sizes, or 8b, 70b, 405b
    vocab_size: PositiveInt = 128_256  # with size=
    stage: Literal["pretrain", "sft", "reward", "dpo", "ppo"] = "sft"
    lora_rank: NonNegativeInt = 0  # 0: all weights are trained
    quant: LoRA[Literal["none", "nf4", "fp4", "int8"]] = "none"  # of frozen matrices
    double_quant: FourBit[bool] = True
    table: tuple[str, ...] = ()  # sizes; each with each method on one device, one line each
    # this machine's device, on which each method is run with the model of the directory model=
    here: Literal["", "cpu", "cuda"] = ""
    out: Annotated[PathText, With("here")] = "out/bench/memory"  # scratch folder
    # on what
    device: str = "H100"
    devices: PositiveInt = 8
    node: PositiveInt = 8  # devices of one node
    memory: NonNegativeFloat = 0.0  # GB of a device; 0: the data sheet's
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp"] = "fsdp"
    tensor: PositiveInt = 1  # neighbouring devices of a node that share each layer
    offload: bool = False  # weights, gradients and moments in CPU memory
    host_bandwidth: PositiveFloat = 200.0  # GB/s of a node's CPU memory, for AdamW with offload
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


def build(cfg):
    """A model in the dtypes that the stage gives it. It is on the meta device, without memory, or
    with here=cpu in memory that nothing writes to."""
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
    shape.head = "score" if cfg.stage == "reward" else "lm"
    with torch.device("cpu" if cfg.here == "cpu" else "meta"):
        model = shape.build()
        if cfg.lora_rank:
            model.to(getattr(torch, cfg.dtype))
            quantise(model, cfg)
            add_adapters(model, cfg.lora_rank, 32.0)
    return model


def quantise(model, cfg):
    """Puts quantised layers of the right sizes in the place of those of the blocks, with quant=."""
    if cfg.quant == "none":
        return
    for name in linear_names(model):
        *experts, out, ins = model.get_submodule(name).weight.shape
        shape = out, ins
        forms = quant.forms(cfg.quant, shape, cfg.double_quant)
        tensors = {key: torch.empty(size, dtype=dtype) for key, (dtype, size) in forms.items()}
        matrices = [quant.Packed(cfg.quant, shape, tensors)] * math.prod(experts)
        quant.put(model, name, matrices, "auto")


def check(cfg, shape, local, shards):
    """UserError for what runtime.py and ppo.py refuse, for the same reasons.

    shape: the ModelConfig. local, shards: as in Job."""
    config.check(cfg)
    if cfg.devices % local:
        raise UserError(f"devices={cfg.devices} is no multiple of node={cfg.node}")
    if cfg.tensor > 1 and cfg.offload:
        raise UserError(f"tensor={cfg.tensor} must be 1 with offload=true")
    if local % cfg.tensor:
        raise UserError(f"tensor={cfg.tensor} must divide the number of devices of a node, {local}")
    tensor.check(shape, cfg.tensor)
    if cfg.batch_size % (cfg.devices // cfg.tensor * cfg.micro_batch):
        devices = f"{cfg.devices} devices"
        if cfg.tensor > 1:
            devices += f" / tensor={cfg.tensor}"
        raise UserError(
            f"batch_size={cfg.batch_size} is no multiple of "
            f"micro_batch={cfg.micro_batch} x {devices}"
        )
    if cfg.stage == "ppo" and cfg.max_new_tokens >= cfg.max_length:
        raise UserError(
            f"max_new_tokens={cfg.max_new_tokens} leaves no room for a prompt in "
            f"max_length={cfg.max_length}"
        )
    if "tpu" in cfg.device.lower():
        if cfg.offload or cfg.reduce_dtype != "float32":
            raise UserError(
                "device=xla, for TPUs, has no offload=, and no reduce_dtype=: its gradients are "
                "summed in float32"
            )
        if cfg.parallel not in ("ddp", "fsdp"):
            raise UserError(f"parallel={cfg.parallel}: on TPUs use ddp or fsdp")
    if cfg.offload and shards == 1 and (cfg.stage != "ppo" or cfg.lora_rank):
        raise UserError(
            "offload=true keeps in CPU memory what fsdp, zero2 or hsdp cuts: set parallel= to one "
            "of them"
        )


class Job:
    """The numbers that the memory and the times of a run depend on. UserError for a bad config.

    peak: FLOP/s of a device. room: bytes of its memory. bandwidth: bytes/s of its memory.
    near, far, bus: bytes/s that it sends within its node, to other nodes and to the CPU.
    link: bytes/s that it sends in a ring of all devices.
    local: devices of a node.
    shards: parts of a model. FSDP makes `fsdp` of them, and tensor= the rest.
    groups: tensor groups, each of which has rows of its own.
    total, trained: parameters. head: those of the output matrix, 0 without one.
    copy: bytes of all parameters in `dtype`, that of the matrix products, or as they are quantised.
    packed: weights that are quantised.
    gathers: how often FSDP gathers the weights in a forward and its backward.
    updates: optimizer steps of a step, each with a forward and a backward of every row. In ppo
    policy and critic take one each in every epoch.
    alone: forwards of every row without a backward. In ppo they give the log-probabilities of
    policy and reference, the score and the value.
    micros: micro-batches of a device that make up the batch.
    rounds: forwards with a backward of a device in a step.
    """

    def __init__(self, cfg):
        self.peak = log.peak_flops(cfg.device)
        name = next((name for name in DEVICES if name.lower() in cfg.device.lower()), None)
        if self.peak is None or name is None:
            raise UserError(f"device={cfg.device}: use {', '.join(DEVICES)}")
        self.dtype = getattr(torch, cfg.dtype)
        self.model = model = build(cfg)
        self.local = local = min(cfg.node, cfg.devices)
        self.shards = dict(ddp=cfg.tensor, hsdp=local).get(cfg.parallel, cfg.devices)
        check(cfg, model.cfg, local, self.shards)
        room, self.bandwidth, *links = (1e9 * x for x in DEVICES[name])
        self.room = 1e9 * cfg.memory or room
        self.near, self.far, self.bus = (x * cfg.link_utilisation for x in links)
        # A ring that leaves the node runs in as many strands as the node has adapters. Each device
        # has one, and the rings of a tensor group's devices share them.
        strands = self.far * local / cfg.tensor
        self.link = min(self.near, strands) if cfg.devices > cfg.node else self.near
        self.groups = cfg.devices // cfg.tensor
        self.fsdp = self.shards // cfg.tensor
        self.total = estimate.count(model)
        self.packed = sum(math.prod(m.shape) for _, m in quant.layers(model))
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.head = model.head_weight.numel() if model.cfg.head == "lm" else 0
        self.copy = self.dtype.itemsize * self.total
        if self.packed:
            self.copy = sum(p.numel() * p.itemsize for p in model.parameters())
        self.tokens = cfg.batch_size * cfg.max_length
        self.gathers = 1 if cfg.parallel == "zero2" else 2
        self.updates = 2 * cfg.ppo_epochs if cfg.stage == "ppo" else 1
        self.alone = 4 if cfg.stage == "ppo" else 0
        self.micros = cfg.batch_size // (self.groups * cfg.micro_batch)
        self.rounds = self.micros * self.updates


def cache_bytes(cfg, job):
    """Bytes of the keys and values of the responses that one device generates at the same time."""
    shape = job.model.cfg
    slots = min(cfg.rollout_batch, cfg.batch_size // job.groups) * cfg.max_length
    return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * job.dtype.itemsize * slots


def device_memory(cfg, job):
    """{part: bytes of one device}, as if nothing was offloaded."""
    memory = estimate.memory(
        job.model,
        cfg.micro_batch * cfg.max_length,
        job.shards,
        job.dtype,
        cfg.grad_checkpoint,
        cfg.parallel == "zero2",
        cfg.tensor,
    )
    if cfg.stage == "ppo":
        # ppo has a critic of the policy's kind, and two more models that are only read. With LoRA
        # all four share one trunk.
        memory["critic"] = memory["gradients"] + memory["optimizer"]
        memory["reference, reward"] = 0
        if not cfg.lora_rank:
            memory["critic"] += memory["weights"]
            memory["reference, reward"] = 2 * job.copy / job.shards
        # Decoding reads a whole copy of the weights in the matrix dtype. Activations and logits of
        # training are not there at that time.
        copy = job.copy if job.shards > 1 or not cfg.lora_rank else 0
        if cfg.here == "cpu" and cfg.lora_rank:
            # A CPU packs the head in fp16, and the layers with the adapter folded in.
            layers = 0 if job.packed else job.total - job.head
            copy = 2 * job.head + job.dtype.itemsize * layers
        memory["rollout"] = max(
            0, cache_bytes(cfg, job) + copy - memory["activations"] - memory["head"]
        )
    return memory


def offload(cfg, job, memory):
    """Takes the parts that offload= keeps in CPU memory out of `memory`, that of device_memory.

    -> bytes of CPU memory for one device, and of a step the seconds of the transfers to and from it
    and the seconds of AdamW there."""
    if not cfg.offload:
        return 0, 0.0, 0.0
    if job.shards == 1:
        # ppo parks the models that are not at work. Only in the update policy and critic meet.
        host = sum(memory[part] for part in ("weights", "optimizer", "critic", "reference, reward"))
        frozen = memory.pop("reference, reward")
        memory.pop("rollout")
        # there and back
        moved = 2 * (5 * memory["weights"] + 2 * memory["optimizer"] + frozen)
        return host, moved / job.bus, 0.0
    parts = ("weights", "gradients", "optimizer", "critic", "reference, reward")
    host = sum(memory.pop(part, 0) for part in parts)
    # At each gathering FSDP copies its shard before the cast. It copies the gradient back.
    stored = sum(p.numel() * p.itemsize for p in job.model.parameters())
    moved = (job.rounds * job.gathers + job.micros * job.alone) * stored
    moved += job.rounds * 4 * job.trained
    # AdamW reads four numbers and writes three. Before it, clipping reads one twice and writes it.
    adamw = job.updates * (28 + 12) * job.trained / job.shards * job.local
    return host, moved / job.shards / job.bus, adamw / (1e9 * cfg.host_bandwidth)


def compute_time(cfg, job):
    """Seconds of the floating-point operations of a step -> all of them at `utilisation`, and those
    of the work without recomputation at the full peak."""
    # A forward is a third of a step that trains all weights.
    forward = job.model.flops_per_token(cfg.max_length) / 3
    train = job.model.flops_per_token(cfg.max_length, "adapter" if cfg.lora_rank else "all")
    useful = job.alone * forward + job.updates * train
    # Each device of a tensor group computes the whole head.
    again = (cfg.tensor - 1) * job.head
    passes = train + (4 if cfg.lora_rank else 6) * again + (forward if cfg.grad_checkpoint else 0)
    # Half of the forwards without a backward have a head, and it takes two operations a number.
    # That is `again` for each.
    passes = job.alone * (forward + again) + job.updates * passes
    peak = cfg.devices * job.peak
    # To dequantise takes no operations to speak of, but the matrix is written once and read once
    # more than it would be: in each forward, and again in each backward.
    again = 2 + cfg.grad_checkpoint
    dense = 2 * job.dtype.itemsize * job.packed * (job.rounds * again + job.micros * job.alone)
    seconds = job.tokens * passes / (peak * cfg.utilisation) + dense / job.bandwidth
    return seconds, job.tokens * useful / peak


def ring(size, n):
    """Bytes that each of n ranks sends in an all-gather or a reduce-scatter of `size` bytes. An
    all-reduce is both."""
    return size * (n - 1) / n


def communicate_time(cfg, job):
    """Seconds in which one device sends to the others in a step."""
    gradients = getattr(torch, cfg.reduce_dtype).itemsize * job.trained / cfg.tensor
    weights = job.copy / cfg.tensor
    # Under hsdp shards are gathered and reduced within a node, and replicas of them across nodes. A
    # ring of one rank sends nothing.
    inner = outer = job.link
    if cfg.parallel == "hsdp":
        inner = job.near
        outer = job.far
    # ddp reduces gradients once an update. With tensor= it does so in each micro-batch.
    reductions = job.updates if cfg.parallel == "ddp" and cfg.tensor == 1 else job.rounds
    replicas = job.groups // job.fsdp
    sharded = job.gathers * ring(weights, job.fsdp) + ring(gradients, job.fsdp)
    seconds = job.rounds * sharded / inner
    seconds += reductions * 2 * ring(gradients / job.fsdp, replicas) / outer
    seconds += job.micros * job.alone * ring(weights, job.fsdp) / job.link
    if cfg.stage == "ppo":
        # the copy for decoding
        seconds += ring(weights * cfg.tensor, job.shards) / job.link
    return seconds + tensor_bytes(cfg, job) / job.near


def tensor_bytes(cfg, job):
    """Bytes that one device sends to its tensor group in a step."""
    shape = job.model.cfg
    size = job.dtype.itemsize
    # an all-reduce of (B * T, C)
    summed = 2 * ring(size * cfg.micro_batch * cfg.max_length * shape.dim, cfg.tensor)
    # A forward sums twice a layer and once for the embeddings, and gathers the head.
    forward = (2 * shape.n_layers + 1) * summed + ring(size * job.head, cfg.tensor)
    # A backward sums once a layer for each of q, k, v, gate and up. Recomputation repeats one sum.
    backward = (5 + cfg.grad_checkpoint) * shape.n_layers * summed
    return (job.rounds + job.micros * job.alone) * forward + job.rounds * backward


def generate_time(cfg, job):
    """Seconds in which one device generates the responses of a step."""
    if cfg.stage != "ppo":
        return 0.0
    turns = -(-(cfg.batch_size // job.groups) // cfg.rollout_batch)
    # A decoding step reads the weights and, on average, half of the cache.
    read = job.copy + cache_bytes(cfg, job) / 2
    return turns * cfg.max_new_tokens * read / (job.bandwidth * 0.6)


def plan(cfg):
    """What the run of `cfg` needs, as a dict. UserError for a bad config.

    memory      {part: bytes of one device}
    room        bytes that a device has
    host        bytes of CPU memory for one device
    parameters, trained    their numbers
    tokens      of one step

    The others are seconds of one step:

    compute      floating-point operations
    communicate  with other devices
    transfer     to and from CPU memory
    update       AdamW on the CPU
    generate     responses of ppo
    useful       the work without recomputation, at the full peak
    """
    job = Job(cfg)
    memory = device_memory(cfg, job)
    host, transfer, update = offload(cfg, job, memory)
    compute, useful = compute_time(cfg, job)
    return dict(
        memory=memory,
        room=job.room,
        host=host,
        parameters=job.total,
        trained=job.trained,
        tokens=job.tokens,
        compute=compute,
        communicate=communicate_time(cfg, job),
        transfer=transfer,
        update=update,
        generate=generate_time(cfg, job),
        useful=useful,
    )


METHODS = {  # of a table
    "full": dict(grad_checkpoint=False),
    "full, recomputation": dict(),
    "LoRA": dict(lora_rank=16, grad_checkpoint=False),
    "LoRA, recomputation": dict(lora_rank=16),
    "QLoRA": dict(lora_rank=16, quant="nf4", grad_checkpoint=False),
    "QLoRA, recomputation": dict(lora_rank=16, quant="nf4"),
    "PPO, four models": dict(stage="ppo"),
    "PPO, LoRA on one trunk": dict(stage="ppo", lora_rank=16),
    "PPO, QLoRA on one trunk": dict(stage="ppo", lora_rank=16, quant="nf4"),
}


def print_table(cfg):
    """Memory in GB of each method on one device with one row a forward; a * where it does not
    fit."""
    alone = dict(devices=1, parallel="ddp", batch_size=32, micro_batch=1, table=())
    for key in sorted({*alone, *chain(*METHODS.values()), "size", "model"} - {"table"}):
        refuse(cfg, key, "with table=, which sets it", "table=")
    print(f"| one {cfg.device}, {cfg.max_length} tokens a forward | {' | '.join(cfg.table)} |")
    print(f"| --- |{' ---: |' * len(cfg.table)}")
    for name, settings in METHODS.items():
        cells = []
        for size in cfg.table:
            p = plan(replace(cfg, **alone, **settings, size=size))
            used = sum(p["memory"].values())
            cells.append(f"{used / 1e9:.1f}{'*' if used > 0.92 * p['room'] else ''}")
        print(f"| {name} | {' | '.join(cells)} |")


# ---- runs on this machine


def prepare(cfg):
    """Rows of random tokens, as long as they may be, and what ppo needs: prompts and rewards."""
    out, tok = Path(cfg.out), tokenizer.load(cfg.model)
    shutil.rmtree(out, ignore_errors=True)
    tokens = torch.randint(tok.vocab_size, (8, cfg.max_length)).tolist()
    meta = dict(vocab_size=tok.vocab_size, tokenizer=tok.fingerprint)
    prompt = cfg.max_length - cfg.max_new_tokens
    for name, start in dict(sft=1, ppo=prompt).items():
        mask = [int(i >= start) for i in range(cfg.max_length)]
        store.write_store(out / name, dict(train=[(row, mask) for row in tokens]), meta)
    scorer = weights.load_model(cfg.model, head="score")
    weights.save_model(scorer, out / "scorer", like=cfg.model, tok=tok)
    function = "def length(prompt, response, finished):\n    return len(response) / 1000\n"
    (out / "rewards.py").write_text(function)


def peak_memory(device, function):
    """Calls function(), a run of two steps -> the most bytes that torch had allocated at a time.

    On a CPU a mapped file counts as a whole, and while a model is loaded it is mapped more than
    once. So the peak is that from the first optimizer step on, when a file of another dtype than
    dtype= is no longer mapped."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = top = 0
    stepped = False
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        stepped = stepped or event.name().startswith("Optimizer.step")
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now * stepped)
    return top


def measure(cfg):
    """Runs a method for two steps of two micro-batches -> (bytes at the peak, tokens/s)."""
    stage = importlib.import_module(cfg.stage)
    settings = dict(
        model=cfg.model,
        data=(f"{cfg.out}/{cfg.stage}",),
        out=f"{cfg.out}/run",
        device=cfg.here,
        dtype=cfg.dtype,
        parallel="none",
        steps=2,
        batch_size=cfg.batch_size,
        micro_batch=cfg.micro_batch,
        lora_rank=cfg.lora_rank,
        quant=cfg.quant,
        grad_checkpoint=cfg.grad_checkpoint,
        resume="false",
        log_every=1,
        save_every=-1,
    )
    if cfg.stage == "ppo":
        reward = "rewards.py:length" if cfg.lora_rank else "scorer"
        settings |= dict(
            reward=(f"{cfg.out}/{reward}",),
            max_prompt=cfg.max_length,
            max_new_tokens=cfg.max_new_tokens,
            rollout_batch=cfg.rollout_batch,
            ppo_epochs=cfg.ppo_epochs,
            sample_every=-1,
        )
    else:
        settings |= dict(max_length=cfg.max_length, samples=0)
    with open(f"{cfg.out}/output.txt", "a") as output, contextlib.redirect_stdout(output):
        peak = peak_memory(cfg.here, lambda: stage.main(stage.Config(**settings)))
    gc.collect()
    log = [json.loads(line) for line in open(f"{cfg.out}/run/log.jsonl", encoding="utf-8")]
    speeds = [record["tokens_per_s"] for record in log if record["kind"] == "train"]
    return peak, speeds[-1]


def compare(cfg, settings):
    """-> (predicted bytes, bytes at the peak, tokens/s) of a method, on what `prepare` wrote."""
    alone = dict(devices=1, parallel="ddp", batch_size=2, micro_batch=1, rollout_batch=2)
    cfg = replace(cfg, **alone, **settings, ppo_epochs=1)
    return sum(device_memory(cfg, Job(cfg)).values()), *measure(cfg)


def print_runs(cfg):
    """Beside each method's predicted memory its peak on this machine, and its tokens/s."""
    if not cfg.model:
        raise UserError(f"here={cfg.here} needs a model's directory in model=")
    prepare(cfg)
    print(f"| {cfg.model}, {cfg.max_length} tokens a forward | predicted | measured | | tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, settings in METHODS.items():
        predicted, measured, speed = compare(cfg, settings)
        figures = f"{predicted / 1e9:.2f} GB | {measured / 1e9:.2f} GB"
        print(f"| {name} | {figures} | {predicted / measured - 1:+.0%} | {speed:.0f} |", flush=True)


def main(cfg):
    if cfg.here:
        return print_runs(cfg)
    if cfg.table:
        return print_table(cfg)
    p = plan(cfg)
    used = sum(p["memory"].values())
    print(" ".join(["plan:", *config.diff(cfg)]))
    layout = f"parallel={cfg.parallel}"
    if cfg.tensor > 1:
        layout += f" tensor={cfg.tensor}"
    print(
        f"{p['parameters']:,} parameters, {p['trained']:,} trained; "
        f"{cfg.devices} x {cfg.device}, {layout}"
    )
    for part, size in p["memory"].items():
        print(f"  {part:20} {size / 1e9:9.2f} GB")
    verdict = (
        "fits" if used < 0.92 * p["room"] else "is tight" if used < p["room"] else "DOES NOT FIT"
    )
    print(f"  {'a device needs':20} {used / 1e9:9.2f} GB of {p['room'] / 1e9:.0f}: {verdict}")
    if p["host"]:
        host = p["host"] / 1e9
        node = host * min(cfg.node, cfg.devices)
        print(f"  {'in CPU memory':20} {host:9.2f} GB, {node:.0f} of a node")
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
