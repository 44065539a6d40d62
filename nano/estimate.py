"""What a training run will need, from first principles: the memory of one device, before anything is allocated.

print(estimate.describe(model, tokens=4 * 512, shards=1, dtype=torch.bfloat16, grad_checkpoint=False))
"""

import torch

from model import SHORT
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
    """Peak bytes of one device by part, for AdamW under autocast. tokens: of one forward on one device (B x T).
    shards: devices over which weights, gradients and moments are cut; 1 where each holds them whole. `tensor` of these share each
    layer: its projections, heads and units, and the vocabulary, but not norms and residual stream; and the loss gathers the head.
    The rest is FSDP's, and what it makes whole for a while is `gathered`: embedding, head and two layers (keep_gathered: all
    layers), and the gradients of one layer.

    Activations count what autograd keeps of a block: input and output of the two norms, q, k, v, the attention's output, and the
    four (T, F) tensors of SwiGLU. On a CPU the input of a norm is in fp32, and there twice where the norm is trained; and attention
    keeps its output twice, by document and joined, or of short documents in bf16 its probabilities, `document` numbers a token and
    head: the length that the average token finds its document to have. Casts are autocast's copies of trained weights, which FSDP
    does without. torch.compile keeps less.
    """
    cfg, size = model.cfg, dtype.itemsize
    dims = shard_dims(model, tensor)
    own = {  # numbers of a device before FSDP shards them
        p: p.numel() / (1 if dims[name] is None else tensor) for name, p in model.named_parameters()
    }
    fsdp = shards / tensor
    trained = sum(n for p, n in own.items() if p.requires_grad) / fsdp
    weights = sum(n * p.itemsize for p, n in own.items()) / fsdp
    layers = [sum(own[p] for p in layer.parameters()) for layer in model.layers]
    q, qk = cfg.n_heads * cfg.head_dim, (cfg.n_heads + cfg.n_kv_heads) * cfg.head_dim
    norm, attention = (
        size,
        2 * qk * size,
    )  # bytes that a norm keeps of a number in its input, and attention of a token
    if model.model["embed_tokens"].weight.device.type == "cpu":
        norm = 4 + 4 * model.layers[0].input_layernorm.weight.requires_grad
        attention += cfg.n_heads * document * size if size == 2 and document <= SHORT else q * size
    block = (
        2 * cfg.dim * (norm + size)
        + (attention + norm * qk * cfg.qk_norm + 4 * cfg.ffn_dim * size) / tensor
    )
    kept = cfg.n_layers * size * cfg.dim + block if grad_checkpoint else cfg.n_layers * block
    head = 0
    if cfg.head == "lm":
        chunk, exact = (
            min(f(model.head_weight.device), tokens * cfg.vocab_size)
            for f in (chunk_logits, block_logits)
        )
        head = chunk * size + exact * (4 + 4)
        head += cfg.vocab_size * cfg.dim * (size + 4 * model.head_weight.requires_grad)
        if tensor > 1:
            head += cfg.vocab_size * cfg.dim * (size if fsdp > 1 else model.head_weight.itemsize)
    gathered = casts = 0
    if fsdp > 1:
        rest = sum(own.values()) - sum(layers)
        grads = sum(own[p] for p in model.layers[0].parameters() if p.requires_grad)
        gathered = size * (rest + sum(layers if keep_gathered else layers[:2])) + 4 * grads
    elif size < 4:
        made = [
            size * sum(own[p] for p in layer.parameters() if p.requires_grad)
            for layer in model.layers
        ]
        casts = max(made) if grad_checkpoint else sum(made)
    return dict(
        weights=weights,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=tokens * kept,
        head=head,
        gathered=gathered,
        casts=casts,
    )


def describe(
    model,
    tokens,
    shards=1,
    dtype=torch.bfloat16,
    grad_checkpoint=False,
    keep_gathered=False,
    offload=False,
    tensor=1,
    document=SHORT,
):
    """One line for people: the parameters, and the parts of `memory` in GB. offload: what is cut waits in CPU memory."""
    parts = memory(model, tokens, shards, dtype, grad_checkpoint, keep_gathered, tensor, document)
    host = sum(parts.pop(name) for name in ("weights", "gradients", "optimizer")) if offload else 0
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    listed = " + ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return (
        f"{total:,} parameters, {trained:,} trained ({100 * trained / total:.1f}%); "
        f"estimated peak memory per device {sum(parts.values()) / 1e9:.1f} GB = {listed}"
        + (f"; {host / 1e9:.1f} GB for each in CPU memory" if offload else "")
    )


def for_run(model, rt, cfg, document=SHORT):
    """`describe` of a stage's model, by its Runtime and Config."""
    return describe(
        model,
        cfg.micro_batch * cfg.max_length,
        rt.weight_shards,
        rt.dtype,
        cfg.grad_checkpoint,
        cfg.parallel == "zero2",
        cfg.offload,
        rt.tensor,
        document,
    )
