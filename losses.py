"""What every stage's loss is made of: token log-probabilities without a (B, T, V) tensor, and masked statistics.

The output matrix and the softmax run over chunks of rows, so that the fp32 logits of a chunk are the largest thing that exists.
A loss is always a sum over tokens that the caller divides by the global number of target tokens: then the gradient does not
depend on how a batch is cut into micro-batches, ranks or packed rows.
"""

import functools

import torch

CHUNK_LOGITS = 2**25  # on a CPU: 128 MB in fp32

compiled = False  # whether torch.compile takes what is done with a chunk's logits; runtime.py sets it with compile=true
_compiled = functools.cache(torch.compile)


def chunk_logits(device):
    """Logits of one chunk. A GPU takes 4 times as many: 1.3x faster with 50,000 words and 1.7x with 128,000, for 1.3 GB more."""
    return CHUNK_LOGITS * (4 if device.type in ("cuda", "meta") else 1)  # meta: bench/plan.py plans for GPUs


def _whole(head_weight):
    """The output matrix, gathered where a tensor group shares it."""
    return head_weight.full_tensor() if hasattr(head_weight, "full_tensor") else head_weight


def _compute_dtype(hidden):
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _chunks(hidden, weight, targets):
    """The N rows in slices."""
    size = max(16, chunk_logits(hidden.device) // len(weight) // 8 * 8)  # oneDNN takes a quarter longer for an odd number of rows
    return (slice(start, start + size) for start in range(0, len(targets), size))


def _of_chunk(function, *args):
    """Calls one of the functions of a chunk below: compiled, it reads and writes the chunk's logits a third as often."""
    return (_compiled(function) if compiled else function)(*args)


def _log_softmax(hidden, weight, temperature=1.0):
    """fp32 log-probabilities (n, V) of a chunk."""
    logits = (hidden @ weight.t()).float()
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=-1)


def _pick(logprobs, targets):
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def _add_at(x, targets, values):
    """x (n, V) with values_n added at targets_n, in place or not."""
    if torch.compiler.is_compiling():  # a scatter would stand alone: memory for x in fp32, once more written and read
        return x + torch.where(torch.arange(x.shape[1], device=x.device) == targets[:, None], values[:, None], 0)
    return x.scatter_add_(1, targets[:, None], values[:, None])


def _nll(hidden, weight, targets, weights, gradient):
    """-> (summed loss of a chunk, its gradient by the logits or None)."""
    logprobs = _log_softmax(hidden, weight)
    loss = -(_pick(logprobs, targets) * weights).sum()
    if not gradient:
        return loss, None
    grad = logprobs.exp_().mul_(weights[:, None])  # d loss / d logits = weight * (softmax - onehot)
    return loss, _add_at(grad, targets, -weights).to(hidden.dtype)


def _picked(hidden, weight, targets, temperature):
    """-> (log p of the targets, entropy) of a chunk."""
    logprobs = _log_softmax(hidden, weight, temperature)
    return _pick(logprobs, targets), -(logprobs.exp() * logprobs).sum(-1)


def _picked_backward(hidden, weight, targets, temperature, entropy, grad_picked, grad_entropy):
    """-> the gradient by a chunk's logits: d log p_t = onehot - p, d H = -p (log p + H)."""
    logprobs = _log_softmax(hidden, weight, temperature)
    p = logprobs.exp()
    grad = logprobs.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_picked[:, None]).mul_(p).neg_()
    return _add_at(grad, targets, grad_picked).div_(temperature).to(hidden.dtype)


class _CrossEntropy(torch.autograd.Function):
    """sum_n weights_n * -log p(target_n). The gradients are made in the forward pass, while a chunk's softmax is at hand."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights, dtype):
        x, w = hidden.to(dtype), head.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros(head.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[1] else None
        for rows in _chunks(x, w, targets):
            nll, grad = _of_chunk(_nll, x[rows], w, targets[rows], weights[rows], any(ctx.needs_input_grad))
            loss += nll
            if grad_x is not None:
                grad_x[rows] = grad @ w
            if grad_w is not None:
                grad_w += grad.t() @ x[rows]
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        out = [None if g is None else (g * grad).to(d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *out, None, None, None


def cross_entropy(hidden, head_weight, targets, weights):
    """Summed next-token loss. hidden (N, C), head_weight (V, C), targets (N,) int64, weights (N,) fp32, 0 for no target.

    Returns sum_n weights_n * -log softmax(hidden_n @ head_weight^T)[targets_n] in fp32: divide by the global token count yourself.
    """
    head_weight = _whole(head_weight)
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad
        hidden, head_weight = hidden.detach(), head_weight.detach()
    return _CrossEntropy.apply(hidden, head_weight, targets, weights.float(), _compute_dtype(hidden))


class _TokenLogprobs(torch.autograd.Function):
    """log p(target_n) and the entropy of p at n; the backward pass recomputes a chunk's softmax."""

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, dtype):
        x, w = hidden.to(dtype), head.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        entropy = torch.empty_like(out)
        for rows in _chunks(x, w, targets):
            out[rows], entropy[rows] = _of_chunk(_picked, x[rows], w, targets[rows], temperature)
        ctx.save_for_backward(hidden, head, targets, entropy)
        ctx.temperature, ctx.dtype = temperature, dtype
        return out, entropy

    @staticmethod
    def backward(ctx, grad_out, grad_entropy):
        hidden, head, targets, entropy = ctx.saved_tensors
        x, w = hidden.to(ctx.dtype), head.to(ctx.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros(head.shape, dtype=torch.float32, device=x.device) if ctx.needs_input_grad[1] else None
        for rows in _chunks(x, w, targets):
            grads = entropy[rows], grad_out[rows], grad_entropy[rows]
            grad = _of_chunk(_picked_backward, x[rows], w, targets[rows], ctx.temperature, *grads)
            if grad_x is not None:
                grad_x[rows] = grad @ w
            if grad_w is not None:
                grad_w += grad.t() @ x[rows]
        return (
            None if grad_x is None else grad_x.to(hidden.dtype),
            None if grad_w is None else grad_w.to(head.dtype),
            None, None, None,
        )  # fmt: skip


def token_logprobs(hidden, head_weight, targets, temperature=1.0, entropy=False):
    """log softmax(hidden @ head_weight^T / temperature)[targets]: hidden (N, C), head_weight (V, C), targets (N,) -> (N,) fp32.

    Differentiable and chunked. With entropy=True returns (logprobs, entropy of the whole distribution), both (N,).
    """
    out = _TokenLogprobs.apply(hidden, _whole(head_weight), targets, temperature, _compute_dtype(hidden))
    return out if entropy else out[0]


@torch.no_grad()
def evaluate_tokens(hidden, head_weight, targets):
    """For validation: (loss (N,) fp32, hit (N,) bool: the likeliest token is the target) of each row."""
    dtype, head_weight = _compute_dtype(hidden), _whole(head_weight)
    loss = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    hit = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    hidden, weight = hidden.to(dtype), head_weight.to(dtype)
    for rows in _chunks(hidden, weight, targets):
        logprobs = _log_softmax(hidden[rows], weight)
        loss[rows] = -_pick(logprobs, targets[rows])
        hit[rows] = logprobs.argmax(-1) == targets[rows]
    return loss, hit


def masked_mean(x, mask):
    """Mean of x where mask is 1; 0 where there is nothing to average."""
    mask = mask.to(x.dtype)
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x scaled to variance 1 (biased) and, with shift_mean, mean 0 over the mask; zero outside it."""
    mask = mask.to(x.dtype)
    mean = masked_mean(x, mask)
    scale = (masked_mean((x - mean) ** 2, mask) + 1e-8).rsqrt()
    return ((x - mean) * scale + (0 if shift_mean else mean)) * mask
