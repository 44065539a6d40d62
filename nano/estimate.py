"""What a training run will need, from first principles: the memory of one device, before anything
is allocated.

    run.log.text(estimate.describe(model, rt, cfg, train.document_length))
"""

import math

import torch

from model import SHORT, Stack
from nano import quant
from nano.losses import block_logits, chunk_logits
from nano.tensor import shard_dims


def memory(
    model,
    tokens,
    shards=1,
    dtype=torch.bfloat16,
    grad_checkpoint=False,
    keep_gathered=False,
    tensor=1,
    document=SHORT,
):
    """Peak bytes of one device by part, for AdamW under autocast -> {part: bytes}.

    tokens: of one forward on one device (B x T).
    shards: devices over which weights, gradients and moments are sharded. 1: each holds them whole.
    dtype: of the matrix products.
    tensor: how many of the shards share each layer. FSDP shards over the rest.
    keep_gathered: FSDP keeps what a forward gathered (zero2).
    document: mean document length, weighted by tokens.

    weights      as the parameters are held
    gradients    fp32, of what is trained
    optimizer    two fp32 moments of what is trained
    activations  what autograd keeps of each block; with grad_checkpoint of one, and all inputs
    head         a chunk of logits, a block of it twice in fp32, the output matrix in `dtype`, its
                 gradient
    gathered     by FSDP: embedding, head, two layers or all, and the gradients of one layer
    dense        the largest quantised matrix while it is multiplied, in fp32 and in `dtype`
    casts        autocast's copies of trained weights, which FSDP does without

    torch.compile keeps less.
    """
    cfg, size = model.cfg, dtype.itemsize
    dims = shard_dims(model, tensor)
    # numbers of each parameter that a device of a tensor group holds, before FSDP shards them
    numbers = {
        p: p.numel() / (1 if dims[name] is None else tensor) for name, p in model.named_parameters()
    }
    # the same of what is trained
    trainable = {p: n for p, n in numbers.items() if p.requires_grad}
    fsdp = shards / tensor
    trained = sum(trainable.values()) / fsdp
    weights = sum(n * p.itemsize for p, n in numbers.items()) / fsdp
    # of each layer
    grads = [sum(trainable.get(p, 0) for p in layer.parameters()) for layer in model.layers]
    block = block_bytes(model, size, tensor, document)
    kept = cfg.n_layers * size * cfg.dim + block if grad_checkpoint else cfg.n_layers * block
    head = gathered = casts = dense = 0
    quantised = [module for _, module in quant.layers(model)]
    if quantised:
        largest = max(m.largest for m in quantised)
        dense = largest * (size if size == 4 or quantised[0].fused() else 4 + size)
    if cfg.head == "lm":
        W = model.head_weight
        logits = tokens * cfg.vocab_size
        chunk = min(chunk_logits(W.device), logits)
        exact = min(block_logits(W.device), logits)
        copies = size * (W.dtype != dtype) + 4 * W.requires_grad
        if tensor > 1:
            copies += size if fsdp > 1 else W.itemsize
        head = chunk * size + 8 * exact + copies * W.numel()
    if fsdp > 1:
        stored = {p for m in quantised for p in m.parameters()}  # gathered as they are
        width = {p: p.itemsize if p in stored else size for p in numbers}
        units = [sum(width[p] * numbers[p] for p in layer.parameters()) for layer in model.layers]
        rest = sum(width[p] * n for p, n in numbers.items()) - sum(units)
        gathered = rest + sum(units if keep_gathered else units[:2]) + 4 * grads[0]
    elif size < 4:
        casts = size * (max(grads) if grad_checkpoint else sum(grads))
    return dict(
        weights=weights,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=tokens * kept,
        head=head,
        gathered=gathered,
        casts=casts,
    ) | (dict(dense=dense) if dense else {})


def count(model):
    """How many parameters a model has. A quantised matrix counts as what it stands for."""
    packed = [(m, m.packed().tensors.values()) for _, m in quant.layers(model)]
    more = sum(math.prod(m.shape) - sum(t.numel() for t in ts) for m, ts in packed)
    return sum(p.numel() for p in model.parameters()) + more


def idle(model):
    """How many parameters of experts a token does not use. A quantised matrix counts as what it
    stands for."""
    stacks = [m for m in model.modules() if isinstance(m, (Stack, quant.QuantStack))]
    one = sum(m.out_features * (m.in_features + (m.bias is not None)) for m in stacks)
    return one * (model.cfg.n_experts - model.cfg.experts_per_token)


def block_bytes(model, size, tensor, document):
    """Bytes of activations that autograd keeps of a token in one block.

    size: bytes of a number. tensor, document: as in memory(). These are the input and output of the
    norms, q, k, v, the attention's output, and the (T, F) tensors of the MLP: four where it is
    gated, two where it is plain.

    On a CPU RMSNorm keeps its input in fp32, and twice where it is trained. There attention keeps
    its output twice, by document and joined. Of short documents in bf16 it keeps its probabilities
    instead, `document` numbers a token and head. With ALiBi or a cap it keeps them of all documents
    in fp32 and in bf16, and with a cap the capped scores."""
    cfg = model.cfg
    on_cpu = model.model["embed_tokens"].weight.device.type == "cpu"
    q = cfg.n_heads * cfg.head_dim
    qk = q + cfg.n_kv_heads * cfg.head_dim
    attention = 2 * qk * size
    extras = model.layers[0].self_attn.extras
    if on_cpu and (cfg.sinks or not extras.fused):
        numbers = 4 + size % 4 + 4 * (extras.cap > 0)
        attention += cfg.n_heads * document * numbers
    elif on_cpu:
        short = size == 2 and document <= SHORT
        attention += cfg.n_heads * document * size if short else q * size
    norm = size  # of a number in its input
    norms = {"around": 4}.get(cfg.norm_at, 1 if cfg.residual == "parallel_one_norm" else 2)
    trained = any(p.requires_grad for p in model.layers[0].parameters() if p.dim() == 1)
    if cfg.norm == "rms1":
        norm = 4 * (1 + trained + on_cpu)
    elif on_cpu and cfg.norm == "rms":
        norm = 4 + 4 * trained
    if cfg.qk_norm != "none":
        attention += norm * qk
    units = 4 if cfg.mlp == "gated" else 2
    mlp = units * cfg.ffn_dim * size
    if cfg.n_experts:
        # of each expert the MLP's, its input, and its output by expert, by token and in the sum;
        # of all experts the scores and what autograd keeps of them
        numbers = 5 * (cfg.expert_dim or cfg.ffn_dim) + 3 * cfg.dim
        experts = cfg.experts_per_token * numbers * size + 12 * cfg.n_experts + 4 * cfg.dim
        experts += units * cfg.shared_dim * size
        mlp += (experts - mlp) * (1 - len(cfg.dense_layers) / cfg.n_layers)
    shared = attention + mlp
    return norms * cfg.dim * (norm + size) + shared / tensor


def describe(model, rt, cfg, document=SHORT):
    """One line for people: the parameters, and the parts of `memory` in GB.

    rt, cfg: the Runtime and Config of a stage. document: as in memory(). With cfg.offload the
    sharded parts are counted in CPU memory."""
    parts = memory(
        model,
        cfg.micro_batch * cfg.max_length,
        rt.weight_shards,
        rt.dtype,
        cfg.grad_checkpoint,
        cfg.parallel == "zero2",
        rt.tensor,
        document,
    )
    if getattr(cfg, "ema", 0.0):
        parts["average"] = parts["optimizer"] / 2  # fp32, of what is trained
    note = ""
    if cfg.offload:
        names = {"weights", "gradients", "optimizer", "average"} & parts.keys()
        host = sum(parts.pop(name) for name in names)
        note = f"; {host / 1e9:.1f} GB for each in CPU memory"
    total = count(model)
    active = f" ({total - idle(model):,} for each token)" if model.cfg.n_experts else ""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    listed = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return (
        f"{total:,} parameters{active}, {trained:,} trained ({100 * trained / total:.1f}%); "
        f"estimated peak memory per device {sum(parts.values()) / 1e9:.1f} GB = {listed}{note}"
    )
