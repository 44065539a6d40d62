"""What every stage's loss is made of: token log-probabilities without a (B, T, V) tensor, and masked statistics.

The output matrix runs over chunks of rows and the softmax, on a CPU, over smaller blocks of these, so that a chunk's logits are the
largest thing that exists.
A loss is always a sum over tokens that the caller divides by the global number of target tokens: then the gradient does not
depend on how a batch is cut into micro-batches, ranks or packed rows.
"""

import functools
import math

import torch

CHUNK_LOGITS = 2**25  # on a CPU: 64 MB in bf16
BLOCK_LOGITS = 2**21  # on a CPU: 8 MB in fp32, which its cache holds

# Whether torch.compile fuses what is done with a chunk's logits: Runtime.distribute sets it, from
# compile=. A global, since a process compiles all of its models or none.
compiled = False
_compiled = functools.cache(torch.compile)


def chunk_logits(device):
    """Logits of one matrix product. A GPU takes 4 times as many: 1.3x faster with 50,000 words and 1.7x with 128,000, for 1.3 GB
    more."""
    return CHUNK_LOGITS * (
        4 if device.type in ("cuda", "meta") else 1
    )  # meta: bench/plan.py plans for GPUs


def block_logits(device):
    """Logits that are in fp32 at a time. On a CPU few, which stay in its cache: whole chunks would be fresh pages each time."""
    return min(BLOCK_LOGITS if device.type == "cpu" else math.inf, chunk_logits(device))


def _whole(head_weight):
    """The output matrix, gathered where a tensor group shares it."""
    return head_weight.full_tensor() if hasattr(head_weight, "full_tensor") else head_weight


def _compute_dtype(hidden):
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(hidden, weight):
    """(rows, logits) in slices of the N rows: the logits (n, V) of all rows at once would be the largest tensor of a model."""
    size = max(
        16, chunk_logits(hidden.device) // len(weight) // 8 * 8
    )  # oneDNN takes a quarter longer for an odd number of rows
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, hidden[rows] @ weight.t()


def _over_blocks(function, logits, *args):
    """Calls one of the functions of a block below on slices of a chunk's rows -> what it returns, for the chunk. Compiled, it keeps
    no fp32 logits, and takes the chunk as it is."""
    size = max(1, block_logits(logits.device) // logits.shape[1])
    if compiled or size >= len(logits):
        return (_compiled(function) if compiled else function)(logits, *args)
    blocks = (slice(start, start + size) for start in range(0, len(logits), size))
    parts = [
        function(*(t[rows] if torch.is_tensor(t) else t for t in (logits, *args)))
        for rows in blocks
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _add_product(grad_w, logits, x):
    """grad_w (V, C) += logits^T (V, n) x (n, C), by blocks of the vocabulary: the bf16 products are the smaller."""
    size = max(1, block_logits(x.device) // x.shape[1])
    for grad, columns in zip(grad_w.split(size), logits.split(size, dim=1), strict=True):
        grad += columns.t() @ x


def _log_softmax(logits, temperature=1.0):
    """fp32 log-probabilities (n, V) of a block."""
    logits = logits.float()
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=-1)


def _pick(logprobs, targets):
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def _add_at(x, targets, values):
    """x (n, V) with values_n added at targets_n, in place or not."""
    if (
        torch.compiler.is_compiling()
    ):  # a scatter would stand alone: memory for x in fp32, once more written and read
        return x + torch.where(
            torch.arange(x.shape[1], device=x.device) == targets[:, None], values[:, None], 0
        )
    return x.scatter_add_(1, targets[:, None], values[:, None])


def _nll(logits, targets, weights, gradient):
    """-> (loss (n,),) of a block. With `gradient`, the logits become the gradient by them: weight * (softmax - onehot)."""
    logprobs = _log_softmax(logits)
    loss = -_pick(logprobs, targets) * weights
    if gradient:
        logits.copy_(_add_at(logprobs.exp_().mul_(weights[:, None]), targets, -weights))
    return (loss,)


def _picked(logits, targets, temperature):
    """-> (log p of the targets, entropy) of a block."""
    logprobs = _log_softmax(logits, temperature)
    return _pick(logprobs, targets), -(logprobs.exp() * logprobs).sum(-1)


def _picked_backward(logits, targets, temperature, entropy, grad_picked, grad_entropy):
    """The logits of a block become the gradient by them: d log p_t = onehot - p, d H = -p (log p + H)."""
    logprobs = _log_softmax(logits, temperature)
    p = logprobs.exp()
    grad = (
        logprobs.add_(entropy[:, None])
        .mul_(grad_entropy[:, None])
        .add_(grad_picked[:, None])
        .mul_(p)
        .neg_()
    )
    logits.copy_(_add_at(grad, targets, grad_picked).div_(temperature))
    return ()


class _CrossEntropy(torch.autograd.Function):
    """sum_n weights_n * -log p(target_n). The gradients are made in the forward pass, while a chunk's softmax is at hand."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, dtype):
        x, w = hidden.to(dtype), head.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = (
            torch.zeros(head.shape, dtype=torch.float32, device=x.device)
            if ctx.needs_input_grad[1]
            else None
        )
        for rows, logits in _chunks(x, w):
            (nll,) = _over_blocks(
                _nll, logits, targets[rows], weights[rows], any(ctx.needs_input_grad)
            )
            loss += nll.sum()
            if grad_x is not None:
                grad_x[rows] = logits @ w
            if grad_w is not None:
                _add_product(grad_w, logits, x[rows])
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        out = [
            None if g is None else g.mul_(grad).to(d)
            for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *out, None, None, None


def cross_entropy(hidden, head_weight, targets, weights):
    """Summed next-token loss. hidden (N, C), head_weight (V, C), targets (N,) int64, weights (N,) fp32, 0 for no target.

    Returns sum_n weights_n * -log softmax(hidden_n @ head_weight^T)[targets_n] in fp32: divide by the global token count yourself.
    """
    head_weight = _whole(head_weight)
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad
        hidden, head_weight = hidden.detach(), head_weight.detach()
    return _CrossEntropy.apply(
        hidden, head_weight, targets, weights.float(), _compute_dtype(hidden)
    )


class _TokenLogprobs(torch.autograd.Function):
    """log p(target_n) and the entropy of p at n; the backward pass recomputes a chunk's softmax."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, dtype):
        x, w = hidden.to(dtype), head.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        entropy = torch.empty_like(out)
        for rows, logits in _chunks(x, w):
            out[rows], entropy[rows] = _over_blocks(_picked, logits, targets[rows], temperature)
        ctx.save_for_backward(hidden, head, targets, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        return out, entropy

    @staticmethod
    def backward(ctx, grad_out, grad_entropy):
        hidden, head, targets, entropy = ctx.saved_tensors
        x, w = hidden.to(ctx.dtype), head.to(ctx.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = (
            torch.zeros(head.shape, dtype=torch.float32, device=x.device)
            if ctx.needs_input_grad[1]
            else None
        )
        for rows, logits in _chunks(x, w):
            grads = entropy[rows], grad_out[rows], grad_entropy[rows]
            _over_blocks(_picked_backward, logits, targets[rows], ctx.temperature, *grads)
            if grad_x is not None:
                grad_x[rows] = logits @ w
            if grad_w is not None:
                _add_product(grad_w, logits, x[rows])
        return (
            None if grad_x is None else grad_x.to(hidden.dtype),
            None if grad_w is None else grad_w.to(head.dtype),
            None,
            None,
            None,
        )


def token_logprobs(hidden, head_weight, targets, temperature=1.0, entropy=False):
    """log softmax(hidden @ head_weight^T / temperature)[targets]: hidden (N, C), head_weight (V, C), targets (N,) -> (N,) fp32.

    Differentiable and chunked. With entropy=True returns (logprobs, entropy of the whole distribution), both (N,).
    """
    out = _TokenLogprobs.apply(
        hidden, _whole(head_weight), targets, temperature, _compute_dtype(hidden)
    )
    return out if entropy else out[0]


@torch.no_grad()
def hits(hidden, head_weight, targets):
    """For validation: whether the likeliest token is the target, (M,) float32. hidden (M, C)."""
    dtype, head_weight = _compute_dtype(hidden), _whole(head_weight)
    hit = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for rows, logits in _chunks(hidden.to(dtype), head_weight.to(dtype)):
        hit[rows] = (logits.argmax(-1) == targets[rows]).float()
    return hit
