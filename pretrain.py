"""Pretraining: a Llama-style model learns to predict the next token of prepared text, from scratch or from a model directory.

A step takes batch_size windows of max_length tokens; each window of each corpus comes once an epoch, whatever the number of
ranks, or corpora are mixed by weights=. The loss is a sum over target tokens divided by their global number.

    python -m prepare.text source=web.jsonl.gz tokenizer=train:32000 out=data/web

    python pretrain.py size=toy data=data/web max_length=256 batch_size=16                          # a CPU or one GPU
    python pretrain.py size=350m data=[data/web,data/code] weights=[0.7,0.3] optimizer=muon compile=true
    python pretrain.py model=models/smollm2 data=data/books lr=1e-4 min_lr=1e-5                     # continued
    torchrun --nproc_per_node=8 pretrain.py size=1b data=data/web parallel=fsdp grad_checkpoint=true
    torchrun --nproc_per_node=8 pretrain.py size=7b data=data/web parallel=fsdp tensor=2            # pairs share each layer
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 pretrain.py size=7b parallel=hsdp
    PJRT_DEVICE=TPU python pretrain.py device=xla parallel=fsdp size=1b data=data/web               # a TPU VM
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd REPO; PJRT_DEVICE=TPU python pretrain.py device=xla ..."  # slice
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model import ModelConfig, Transformer
from nano import (
    batches,
    config,
    estimate,
    generate,
    log,
    losses,
    optim,
    runtime,
    state,
    store,
    tokenizer,
    weights,
)
from nano.config import (
    Every,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitFloat,
    UserError,
)


@dataclass
class Config:
    # what
    data: tuple[str, ...] = ("data/web",)  # prepared folders
    weights: tuple[
        float, ...
    ] = ()  # the folders' shares of the windows; (): every window of all of them once an epoch
    tokenizer: str = ""  # directory; "": the model's, or else DATA/tokenizer of the first folder
    out: str = "out/pretrain"  # run folder
    # the model
    model: str = ""  # model directory to continue from; "": from scratch, of the `size`
    size: Literal["toy", "15m", "124m", "350m", "1b", "3b", "7b"] = "124m"
    n_layers: NonNegativeInt = 0  # this and the next four: in place of the size's own; 0: its own
    dim: NonNegativeInt = 0
    n_heads: NonNegativeInt = 0
    n_kv_heads: NonNegativeInt = 0
    ffn_dim: NonNegativeInt = 0
    rope_theta: PositiveFloat = 10000.0
    # how long
    epochs: NonNegativeFloat = 1.0
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 512  # windows of one optimizer step, over all ranks and micro-batches
    micro_batch: PositiveInt = 16  # windows of one forward on one device
    max_length: PositiveInt = 1024  # tokens of a window
    isolate: bool = True  # documents do not see each other; false: a window is one stretch of text
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices
    lr: NonNegativeFloat = 6e-4
    min_lr: NonNegativeFloat = 6e-5
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: UnitFloat = 0.02  # of all steps
    warmup_steps: NonNegativeInt = 0  # if set, instead of warmup_ratio
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0: off
    # device
    device: str = "auto"  # auto, cpu, cuda or xla
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp", "none"] = "ddp"  # XLA: ddp, fsdp
    tensor: PositiveInt = 1  # neighbouring devices that share each layer (tensor parallel), for models too large for fsdp alone
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matrix work
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients on their way
    compile: bool = False  # torch.compile each layer: faster after half a minute
    grad_checkpoint: bool = False  # recompute activations: about 20% slower, a third of the memory
    offload: bool = False  # with fsdp, zero2, hsdp: weights and optimizer wait in CPU memory; for models that fit no other way
    # bookkeeping
    seed: Seed = 0
    resume: Literal["auto", "true", "false"] = "auto"  # auto: if there is a state
    eval_every: Every = 250  # steps; 0: once an epoch. Needs a validation split
    eval_windows: NonNegativeInt = 1000  # of the validation split, the same each time; 0: all
    save_every: Every = 1000  # steps; 0: once an epoch
    log_every: NonNegativeInt = 10  # steps; 0: the last step only
    sample_every: Every = 0  # steps; 0: with every evaluation
    prompts: tuple[
        str, ...
    ] = ()  # texts to go on from; (): the beginnings of two validation documents
    sample_tokens: NonNegativeInt = 64  # 0: no samples
    temperature: NonNegativeFloat = 0.8  # of the samples


# name: layers, dim, heads, key/value heads, ffn, tied embeddings. The name counts the parameters with a vocabulary of about
# 32,000 (124m and 350m: 50,000; toy: 64). 15m: Karpathy's stories15M; 1b, 3b: the shapes of Llama 3.2; 7b: Llama 2's
SIZES = {
    "toy": (2, 64, 4, 2, 192, False),
    "15m": (6, 288, 6, 6, 768, True),
    "124m": (12, 768, 12, 12, 2048, True),
    "350m": (24, 1024, 16, 16, 2752, True),
    "1b": (16, 2048, 32, 8, 8192, True),
    "3b": (28, 3072, 24, 8, 8192, True),
    "7b": (32, 4096, 32, 32, 11008, False),
}


def model_config(cfg, vocab_size):
    """The ModelConfig of size= and the keys that change it; the vocabulary is rounded up to a multiple of 64."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim, tied = SIZES[cfg.size]
    n_layers, dim, ffn_dim = cfg.n_layers or n_layers, cfg.dim or dim, cfg.ffn_dim or ffn_dim
    n_heads, n_kv_heads = cfg.n_heads or n_heads, cfg.n_kv_heads or cfg.n_heads or n_kv_heads
    if dim % (2 * n_heads) or n_heads % n_kv_heads:
        raise UserError(
            f"dim={dim} must be an even number of times n_heads={n_heads}, and that divide by n_kv_heads={n_kv_heads}"
        )
    return ModelConfig(
        vocab_size=-(-vocab_size // 64) * 64,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        ffn_dim=ffn_dim,
        rope_theta=cfg.rope_theta,
        max_positions=cfg.max_length,
        tie_embeddings=tied,
    )


def fresh(rt, shape, dir):
    """A model of random weights. Where it is to be cut, one process makes it and all map its file `dir`: no other ever holds it."""
    if rt.processes == 1 or rt.weight_shards == 1:
        return Transformer(shape).init_weights()
    if rt.is_main:
        weights.save_model(Transformer(shape).init_weights(), dir)
    rt.barrier()
    return weights.load_model(dir)


def loss_sum(net, batch):
    """The sum of next-token losses over the target tokens of a micro-batch, fp32."""
    rows = batch["index"]  # the head runs on target tokens only
    return losses.cross_entropy(
        net(batch),  # (M, C)
        net.head_weight,
        batch["targets"].flatten()[rows],
        batch["weights"].flatten()[rows],
    )


def tokens_per_byte(stores, free_bos):
    """Predicted tokens for each byte of text: the ends of documents count, a BOS that is given (free_bos) does not.
    None where a store does not know its bytes."""
    counts = [
        (
            s.meta["splits"][s.split]["tokens"] - free_bos * len(s),
            s.meta.get("bytes", {}).get(s.split),
        )
        for s in stores
    ]
    return (
        None
        if any(size is None for _, size in counts)
        else sum(n for n, _ in counts) / sum(size for _, size in counts)
    )


@torch.no_grad()
def evaluate(rt, net, windows, steps, density):
    """Loss, perplexity and, given `density` in tokens per byte, bits per byte over the first `steps` steps of `windows`."""
    net.eval()
    sums = torch.zeros(2, dtype=torch.float32, device=rt.device)  # loss, targets
    for step in range(steps):
        for micro in windows.batch(step):
            batch = rt.put(micro)
            with rt.autocast():
                part = loss_sum(net, batch)
            sums += torch.stack((part, batch["weights"].sum()))
            rt.sync()
    net.train()
    loss, count = rt.all_sum(sums).tolist()
    loss /= max(count, 1)
    bits = {} if density is None else dict(bits_per_byte=loss / math.log(2) * density)
    return dict(loss=loss, perplexity=math.exp(min(loss, 700)), **bits)


def continuations(rt, model, tok, documents, cfg):
    """What the model writes after each prompt, or after the first words of two documents."""
    prompts = [tok.encode(text, bos=tok.bos_first) or [tok.eos_id] for text in cfg.prompts]
    if not prompts:
        rows = [documents.row(i)[0] for i in range(min(2, len(documents)))]
        prompts = [row[: max(1, min(8, len(row) // 2))].tolist() for row in rows]
    with rt.autocast():
        made = generate.generate(
            model,
            prompts,
            cfg.sample_tokens,
            temperature=cfg.temperature,
            stop_ids=tok.stop_ids,
            seed=cfg.seed,
        )
    return [
        dict(prompt=tok.decode(p), text=tok.decode(t, inside=True))
        for p, t in zip(prompts, made.tokens, strict=True)
    ]


def main(cfg):
    # ------------------------------------------------------------------------------------------ setup
    rt = runtime.start(cfg)
    rt.catch_signals()
    out = Path(cfg.out)
    resume = state.resumes(out, cfg.resume, rt, cfg.model)
    own = {"tokenizer", "size", "n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim", "rope_theta"}
    ignored = [pair for pair in config.diff(cfg) if pair.split("=")[0] in own]
    if cfg.model and ignored:
        raise UserError(
            f"model={cfg.model} has a shape and a tokenizer of its own: leave out {', '.join(ignored)}"
        )

    # ------------------------------------------------------------------------------------------ data
    metas = [store.read_meta(dir) for dir in cfg.data]
    base = cfg.model or cfg.tokenizer or Path(cfg.data[0]) / "tokenizer"
    if not Path(base).is_dir() and not cfg.model and not cfg.tokenizer:
        raise UserError(
            f"there is no {base}: name the tokenizer that the data was prepared with by tokenizer= or model="
        )
    tok = tokenizer.load(base, template="plain")
    stores = [store.Store(dir, "train", tok) for dir in cfg.data]
    held = [
        store.Store(dir, "val", tok)
        for dir, meta in zip(cfg.data, metas, strict=True)
        if "val" in meta["splits"]
    ]
    cut = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        isolate=cfg.isolate,
        seed=cfg.seed,
        rank=rt.rank,
        world=rt.world,
        fixed_shapes=rt.static_shapes,
    )
    train = batches.Windows(stores, cfg.batch_size, weights=cfg.weights, **cut)
    val = batches.Windows(held, cut["micro_batch"] * rt.world, **cut) if held else None
    steps = cfg.steps or max(1, round(cfg.epochs * train.steps_per_epoch))
    eval_every, save_every = (
        cfg.eval_every or train.steps_per_epoch,
        cfg.save_every or train.steps_per_epoch,
    )
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)
    if val:
        wanted = -(-cfg.eval_windows // val.batch_size) or val.steps_per_epoch
        eval_steps = min(wanted, val.steps_per_epoch)
        density = tokens_per_byte(held, free_bos=cfg.isolate and tok.bos_first)

    # ------------------------------------------------------------------------------------------ model
    if cfg.model:
        model = weights.load_model(cfg.model)
        batches.check_reach(cfg.max_length, model.cfg.max_positions, cfg.model)
        tok.check_embeddings(model.cfg.vocab_size, base)
    else:
        model = fresh(rt, model_config(cfg, tok.vocab_size), out / "init.tmp")

    # ------------------------------------------------------------------------------------------ optimizer, resume
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    rt.barrier()
    if rt.is_main:
        shutil.rmtree(out / "init.tmp", ignore_errors=True)
    trained = dict(model.named_parameters())
    optimizer = optim.build(
        model, cfg.optimizer, cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    start, best = 0, math.inf
    if resume:
        meta, _ = state.load_training(
            out / "state", rt, "pretrain", trained, {cfg.optimizer: optimizer}
        )
        start, best = meta["step"], meta["best"]

    flops = model.flops_per_token(cfg.max_length)
    logger = log.Log(out, rt.is_main, steps, start, flops, rt.name, rt.devices)
    logger.settings("pretrain", cfg, resume)
    spread = (
        rt.weight_shards,
        rt.dtype,
        cfg.grad_checkpoint,
        cfg.parallel == "zero2",
        cfg.offload,
        rt.tensor,
    )
    logger.text(estimate.describe(model, cfg.micro_batch * cfg.max_length, *spread))
    total = steps * cfg.batch_size * cfg.max_length
    peak = log.peak_flops(rt.name)
    time = (
        f", about {log.duration(total * flops / (0.4 * peak * rt.devices))} at 40% of the peak"
        if peak
        else ""
    )
    logger.text(
        f"{sum(len(s.tokens) for s in stores):,} tokens in {len(stores)} folders: {train.steps_per_epoch} steps an epoch, {steps} "
        f"in all from step {start}; {total:,} tokens, {total * flops:.2e} FLOPs{time}; {rt.devices} x {rt.name}, {rt.dtype}"
    )

    def save(dir):
        tensors = rt.gather(trained)
        if rt.is_main:
            ids = (
                {}
                if cfg.model
                else dict(bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
            )
            weights.save_model(model, dir, rt.dtype, like=base, tensors=tensors, **ids)

    # ------------------------------------------------------------------------------------------ loop
    tokens = targets = 0  # of this rank, since the last line of the log
    stop = False
    model.train()
    for step in range(start, steps + 1):
        stop = rt.should_stop()

        # evaluate, show samples, save
        with logger.paused():
            evaluated = val and not stop and (step % eval_every == 0 or step == steps)
            if evaluated:
                metrics = evaluate(rt, net, val, eval_steps, density)
                logger.eval(step, **metrics)
                if step and metrics["loss"] < best:
                    best = metrics["loss"]
                    save(out / "best")
            if (
                cfg.sample_tokens
                and not stop
                and (step % cfg.sample_every == 0 if cfg.sample_every else evaluated)
            ):
                logger.samples(step, continuations(rt, model, tok, (held or stores)[0], cfg))
            if step > start and (stop or step == steps or step % save_every == 0):
                save(out / "last")
                state.save_training(
                    out / "state",
                    rt,
                    "pretrain",
                    trained,
                    {cfg.optimizer: optimizer},
                    step=step,
                    best=best,
                )
        if stop or step == steps:
            break

        # accumulate the gradient over micro-batches
        micros = train.batch(step)
        weight = rt.all_sum(sum(float(m["weights"].sum()) for m in micros))
        loss = 0.0
        for i, micro in enumerate(micros):
            rt.accumulate(i == len(micros) - 1, net)
            with rt.autocast():
                part = loss_sum(net, rt.put(micro)) / max(weight, 1e-9)
            rt.backward(part)
            loss = loss + part.detach()
            tokens += micro["n_tokens"]
            targets += micro["n_targets"]

        # clip, step
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # log
        if (step + 1) % (cfg.log_every or steps) == 0 or step + 1 == steps:
            seen = dict(
                tokens=rt.all_sum(tokens),
                targets=rt.all_sum(targets),
                memory=rt.peak_memory(),
                **rt.compiles(),
            )
            logger.step(step + 1, loss=rt.all_sum(loss), grad_norm=norm, lr=lr, **seen)
            tokens = targets = 0

    if stop:
        logger.text(
            f"stopped at step {step}: the same command continues from here, unless it says resume=false"
        )
    elif start >= steps and resume:
        logger.text(
            f"{out} stands at step {start} already: more steps= or epochs= go on, resume=false starts anew"
        )
    logger.close()
    rt.close()


if __name__ == "__main__":
    config.run(main, Config)
