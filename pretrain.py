"""Pretraining: a decoder learns to predict the next token of prepared text.

It starts from scratch (size=) or from a model directory (model=). A step takes batch_size windows
of max_length tokens. Every window of every corpus comes once an epoch, whatever the number of
ranks; or corpora are mixed by weights=. The loss is a sum over target tokens, divided by their
global number.

    python -m prepare.text source=web.jsonl.gz tokenizer=train:32000 out=data/web

    # a CPU or one GPU; two corpora and Muon; a model directory, continued
    python pretrain.py size=toy data=data/web max_length=256 batch_size=16
    python pretrain.py 'data=[data/web,data/code]' 'weights=[0.7,0.3]' optimizer=muon compile=true
    python pretrain.py model=models/smollm2 data=data/books lr=1e-4 min_lr=1e-5

    # 8 GPUs; pairs of them that share each layer; 4 nodes
    torchrun --nproc_per_node=8 pretrain.py size=1b data=data/web parallel=fsdp grad_checkpoint=true
    torchrun --nproc_per_node=8 pretrain.py size=7b data=data/web parallel=fsdp tensor=2
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        pretrain.py size=7b data=data/web parallel=hsdp

    # a TPU VM; on a slice of several hosts, run it on all of them at once
    PJRT_DEVICE=TPU python pretrain.py device=xla parallel=fsdp size=1b data=data/web
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch

from model import ModelConfig, Transformer
from nano import (
    batches,
    config,
    estimate,
    evaluation,
    generate,
    log,
    losses,
    optim,
    quant,
    runtime,
    store,
    tokenizer,
    weights,
)
from nano.config import (
    Every,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    Temperature,
    UnitFloat,
    UserError,
    With,
    Without,
)
from nano.run import Run, refuse_validation

# annotation of keys that have no effect when model= brings a shape and a tokenizer of its own
Fresh = Annotated[TypeVar("T"), Without("model")]


@dataclass
class Config:
    # what
    data: tuple[PathText, ...] = ("data/web",)  # prepared folders
    weights: tuple[float, ...] = ()  # shares of the folders; []: every window once an epoch
    tokenizer: Fresh[PathText] = ""  # directory; "": DATA/tokenizer of the first folder
    out: PathText = "out/pretrain"  # run folder
    # the model
    model: PathText = ""  # model directory to continue from; "": from scratch, of the `size`
    size: Fresh[Literal["toy", "15m", "124m", "350m", "1b", "3b", "7b"]] = "124m"
    n_layers: Fresh[NonNegativeInt] = 0  # this and the next four: 0 is that of the size
    dim: Fresh[NonNegativeInt] = 0
    n_heads: Fresh[NonNegativeInt] = 0
    n_kv_heads: Fresh[NonNegativeInt] = 0
    ffn_dim: Fresh[NonNegativeInt] = 0
    rope_theta: Fresh[PositiveFloat] = 10000.0
    n_experts: Fresh[NonNegativeInt] = 0  # MLPs of ffn_dim in a layer (Mixtral); 0: one
    # how many of them a token takes
    experts_per_token: Annotated[Fresh[PositiveInt], With("n_experts")] = 2
    # how long
    epochs: NonNegativeFloat = 1.0  # 0: evaluate once and save nothing
    steps: NonNegativeInt = 0  # optimizer steps; 0: as many as `epochs` takes
    batch_size: PositiveInt = 512  # windows of an optimizer step, over all ranks
    micro_batch: PositiveInt = 16  # windows of one forward on one device
    max_length: PositiveInt = 1024  # tokens of a window
    isolate: bool = True  # documents do not see each other; false: a window is one stretch of text
    aux_coef: NonNegativeFloat = 0.0  # of the loss that balances a mixture of experts
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices
    lr: NonNegativeFloat = 6e-4  # the highest learning rate
    min_lr: Annotated[NonNegativeFloat, Without("schedule", "constant")] = 6e-5  # the last one
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: UnitFloat = 0.02  # of all steps
    warmup_steps: NonNegativeInt = 0  # if set, instead of warmup_ratio
    weight_decay: NonNegativeFloat = 0.1  # of matrices; never of embeddings, norms and biases
    beta1: Fraction = 0.9  # AdamW: decay of the mean gradient
    beta2: Fraction = 0.95  # AdamW: decay of the mean square
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
    eval_every: Every = 250  # steps; 0: once an epoch, -1: never. Needs a validation split
    eval_windows: NonNegativeInt = 1000  # of the validation split, the same each time; 0: all
    save_every: Every = 1000  # steps; 0: once an epoch, -1: at the end only
    keep_last: NonNegativeInt = 0  # saves that stay as step-N/ beside last/
    # evaluations without a better one that end the run; 0: off
    patience: Annotated[NonNegativeInt, Without("eval_every", -1)] = 0
    log_every: NonNegativeInt = 10  # steps; 0: the last step only
    track: str = ""  # wandb:PROJECT or trackio:PROJECT beside TensorBoard
    sample_every: Every = 0  # steps; 0: once an epoch, -1: never
    prompts: tuple[str, ...] = ()  # texts to go on from; []: the starts of two documents
    sample_tokens: NonNegativeInt = 64  # 0: no samples
    temperature: Temperature = 0.8  # of the samples
    # tasks (files of tasks/) that are measured at every evaluation, from step 0 on
    eval_tasks: tuple[str, ...] = ()  # names, or NAME:PART
    eval_shots: Annotated[evaluation.Shots, With("eval_tasks")] = (0,)  # one number, or one a task
    # local files in the place of the hub's, one a task; "": the hub
    eval_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_shot_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_limit: Annotated[NonNegativeInt, With("eval_tasks")] = 200  # records of a task; 0: all
    keep: Annotated[str, With("eval_tasks")] = ""  # TASK/METRIC, whose highest value makes best/


# name: layers, dim, heads, key/value heads, ffn, tied embeddings. The name counts the parameters
# with a vocabulary of about 32,000 (124m and 350m: 50,000; toy: 64). 15m: Karpathy's stories15M;
# 1b, 3b: the shapes of Llama 3.2; 7b: Llama 2's
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
    """The ModelConfig of size= and of the keys that change it. The vocabulary is rounded up to a
    multiple of 64."""
    n_layers, dim, n_heads, n_kv_heads, ffn_dim, tied = SIZES[cfg.size]
    n_layers, dim, ffn_dim = cfg.n_layers or n_layers, cfg.dim or dim, cfg.ffn_dim or ffn_dim
    n_heads, n_kv_heads = cfg.n_heads or n_heads, cfg.n_kv_heads or cfg.n_heads or n_kv_heads
    if dim % (2 * n_heads) or n_heads % n_kv_heads:
        raise UserError(
            f"dim={dim} must be an even multiple of n_heads={n_heads}, "
            f"and n_heads a multiple of n_kv_heads={n_kv_heads}"
        )
    mixture = {}
    if cfg.n_experts:
        if cfg.experts_per_token > cfg.n_experts:
            raise UserError(
                f"experts_per_token={cfg.experts_per_token} must be at most n_experts="
                f"{cfg.n_experts}"
            )
        mixture = dict(
            n_experts=cfg.n_experts,
            experts_per_token=cfg.experts_per_token,
            router="chosen",
            family="mixtral",
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
        **mixture,
    )


def fresh(rt, shape, dir):
    """A model of random weights.

    If it will be sharded, rank 0 writes the weights to `dir` and all ranks memory-map that file, so
    no other process ever holds a full copy.
    """
    if rt.processes == 1 or rt.weight_shards == 1:
        return Transformer(shape).init_weights()
    if rt.is_main:
        weights.save_model(Transformer(shape).init_weights(), dir)
    rt.barrier()
    return weights.load_model(dir)


def loss_sum(net, hidden, batch):
    """The sum of next-token losses over the target tokens of a micro-batch, fp32.

    hidden (M, C): the last hidden states at the M positions that predict a target. sft.py's
    function of this name says how to change it.
    """
    return losses.cross_entropy(hidden, net.head, batch["targets"], batch["weights"])


def tokens_per_byte(stores, free_bos):
    """Predicted tokens for each byte of text; None where a store does not know its bytes.

    The ends of documents are predicted too. A BOS that is given (free_bos) is not.
    """
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


def evaluate(rt, net, windows, steps, density):
    """Loss and perplexity over the first `steps` steps of `windows`, and bits per byte of text
    where the number of tokens per byte (`density`) is known."""
    sums = torch.zeros(2, device=rt.device)  # loss, targets
    with rt.evaluating(net):
        for step in range(steps):
            for micro in windows.batch(step):
                batch = rt.put(micro)
                with rt.autocast():
                    loss = loss_sum(net, net(batch), batch)
                sums += torch.stack((loss, batch["weights"].sum()))
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
        samples = generate.generate(
            model,
            prompts,
            cfg.sample_tokens,
            temperature=cfg.temperature,
            stop_ids=tok.stop_ids,
            seed=cfg.seed,
        )
    return [
        dict(prompt=tok.decode(p), text=tok.decode(t, inside=True))
        for p, t in zip(prompts, samples.tokens, strict=True)
    ]


@runtime.started
def main(cfg, rt):
    # ---- setup
    # The runtime knows the device and the other processes. The run knows its folder: whether it
    # holds a state to continue from, and where the log and the models go.
    run = Run("pretrain", cfg, rt)

    # ---- data
    # A store is one long array of tokens on disk, memory-mapped. A window is max_length of them.
    # Which windows a step takes is a function of the seed and the step's number alone, so a resume
    # needs no data position.
    if not cfg.data:
        raise UserError("data= names no folder: give at least one")
    like = cfg.model or cfg.tokenizer or "train:32000"
    store.check_prepared(cfg.data, "text", f"tokenizer={like}")
    metas = [store.read_meta(dir) for dir in cfg.data]
    base = cfg.model or cfg.tokenizer or Path(cfg.data[0]) / "tokenizer"
    if not Path(base).is_dir() and not cfg.model and not cfg.tokenizer:
        raise UserError(
            f"there is no {base}: name the tokenizer of the data by tokenizer= or model="
        )
    tok = tokenizer.load(base, template="plain")
    if cfg.model and tok.prompt_end:
        raise UserError(
            f"model={cfg.model} is an encoder-decoder, which answers prompts: plain text has none, "
            "so train it with sft.py"
        )
    stores = [store.Store(dir, "train", tok) for dir in cfg.data]
    with_val = [dir for dir, meta in zip(cfg.data, metas, strict=True) if "val" in meta["splits"]]
    val_stores = [store.Store(dir, "val", tok) for dir in with_val]
    layout = dict(
        micro_batch=rt.micro_batch(cfg.micro_batch),
        max_length=cfg.max_length,
        isolate=cfg.isolate,
        seed=cfg.seed,
        rank=rt.rank,
        world=rt.world,
        fixed_shapes=rt.fixed_shapes,
    )
    train = batches.Windows(stores, cfg.batch_size, weights=cfg.weights, **layout)
    steps = run.total_steps(train.steps_per_epoch)
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)
    val = None
    if not val_stores:
        refuse_validation(cfg, "eval_every", "patience", "eval_windows")
    else:
        val = batches.Windows(val_stores, layout["micro_batch"] * rt.world, **layout)
        eval_steps = -(-cfg.eval_windows // val.batch_size) or val.steps_per_epoch
        eval_steps = min(eval_steps, val.steps_per_epoch)
        density = tokens_per_byte(val_stores, free_bos=cfg.isolate and tok.bos_first)

    # ---- model
    # Random weights of the shape that size= names, or a model directory to continue from.
    if cfg.model:
        model = weights.load_model(cfg.model)
        quant.refuse_training(model)
        batches.check_reach(cfg.max_length, model.cfg.max_positions, cfg.model)
        tok.check_embeddings(model.cfg.vocab_size, base)
    else:
        model = fresh(rt, model_config(cfg, tok.vocab_size), run.out / "init.tmp")
        run.model_keys = dict(
            bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id
        )

    benchmarks = evaluation.for_training(cfg, tok, model.cfg)

    # A state is only continued from the model and the data that it was made from.
    params = model.named_parameters() if cfg.model else ()
    validation = store.fingerprint(val_stores) if val_stores else None
    run.identify(params, store.fingerprint(stores), validation)

    losses.check_experts(model, cfg.aux_coef)

    # ---- optimizer, resume
    # `net` is what we call, `model` is what owns the weights: DDP wraps the model, FSDP shards it
    # in place. The weights are fp32 and autocast does the matrix work in bf16.
    net = rt.wrap(model, cfg.compile, cfg.grad_checkpoint)
    rt.barrier()
    if rt.is_main:
        shutil.rmtree(run.out / "init.tmp", ignore_errors=True)
    trained = dict(model.named_parameters())
    optimizer = optim.build(
        model, cfg.optimizer, cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
    )
    run.attach(model, trained, {cfg.optimizer: optimizer}, tok, base)
    run.log.text(estimate.describe(model, rt, cfg))
    flops = model.flops_per_token(cfg.max_length)
    total = steps * cfg.batch_size * cfg.max_length
    time = ""
    if peak := log.peak_flops(rt.name):
        seconds = total * flops / (0.4 * peak * rt.devices)
        time = f", about {log.duration(seconds)} at 40% of the peak"
    run.log.text(
        f"{sum(len(s.tokens) for s in stores):,} tokens in {len(stores)} folders: "
        f"{train.steps_per_epoch} steps an epoch, {steps} in all from step {run.start}; "
        f"{total:,} tokens, {total * flops:.2e} FLOPs{time}; "
        f"{rt.devices} x {rt.name}, {rt.dtype}"
    )

    # ---- loop
    # A step is counted when it is done: step 0 is the untrained model, and at the last number there
    # is nothing left to train, only to evaluate and to save.
    for step in run.steps(flops):
        # Every rank evaluates and saves at the same step, for gathering sharded weights takes them
        # all. The time this takes is not counted in the tokens per second.
        with run.paused():
            if (val or benchmarks) and run.due(cfg.eval_every):
                metrics = evaluate(rt, net, val, eval_steps, density) if val else {}
                metrics |= evaluation.measure_all(benchmarks, model, tok, rt)
                run.evaluated(metrics, keep=cfg.keep or "loss")
            if cfg.sample_tokens and run.due(cfg.sample_every):
                texts = continuations(rt, model, tok, (val_stores or stores)[0], cfg)
                run.log.samples(step, texts)
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

        # Clip the global gradient norm, step the optimizer, clear the gradients.
        lr = optim.lr_at(step, steps, cfg.lr, cfg.schedule, warmup, cfg.min_lr)
        norm = rt.step(optimizer, trained.values(), lr, cfg.grad_clip)

        # Reading a number from the device waits for it, so we read only when a line is due.
        if run.logs:
            routing = {name: rt.all_sum(value) for name, value in routing.items()}
            run.log_step(loss=rt.all_sum(loss), grad_norm=norm, lr=lr, **routing)

    return run.close()


if __name__ == "__main__":
    config.run(main, Config)
