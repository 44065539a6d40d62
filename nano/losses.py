"""What every stage's loss is made of: token log-probabilities without a (B, T, V) tensor.

The product with the output matrix runs over chunks of rows, so a chunk's logits are the largest
tensor that exists. On a CPU the softmax runs over smaller blocks of a chunk.

A loss is a sum over tokens. The caller divides it by the global number of target tokens. Then the
gradient does not depend on how a batch is split into micro-batches, ranks or packed rows.
"""

import functools
import math

import torch

from model import Head, soft_cap
from nano.config import UserError

CHUNK_LOGITS = 2**25  # on a CPU: 64 MB in bf16
BLOCK_LOGITS = 2**21  # on a CPU: 8 MB in fp32, which its cache holds

# Whether torch.compile fuses the operations on a chunk's logits. Runtime.distribute sets it from
# compile=. It is a global, because a process compiles all of its models or none.
compiled = False
_compiled = functools.cache(torch.compile)


def chunk_logits(device):
    """Logits of one matrix product. A GPU takes 4 times as many, for 1.3 GB more memory: it is 1.3x
    faster with a vocabulary of 50,000 and 1.7x with 128,000."""
    # bench/memory.py plans for GPUs on the meta device
    return CHUNK_LOGITS * (4 if device.type in ("cuda", "meta") else 1)


def block_logits(device):
    """Logits that are in fp32 at a time. They stay in the cache of a CPU, where a whole chunk would
    be written to fresh pages each time."""
    return min(BLOCK_LOGITS if device.type == "cpu" else math.inf, chunk_logits(device))


def _operands(hidden, matrix):
    """hidden and the output matrix in the dtype of their product, autocast's where it is on."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.to(dtype), matrix.to(dtype)


def _parts(hidden, head):
    """hidden times the scale of the head, the output matrix, gathered where a tensor group shards
    it, and the cap of the logits."""
    weight, scale, cap = head if isinstance(head, Head) else Head(head)
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return hidden if scale == 1.0 else hidden * scale, weight, cap


def _chunks(hidden, weight):
    """Yields (rows, logits) for slices of the N rows. All logits at once, (N, V), would be the
    largest tensor of a model."""
    # a multiple of 8: oneDNN takes a quarter longer for an odd number of rows
    size = max(16, chunk_logits(hidden.device) // len(weight) // 8 * 8)
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, hidden[rows] @ weight.t()


def _over_blocks(function, logits, *args):
    """Applies `function` to blocks of a chunk's rows and concatenates each of its results.

    When compiled, the fused kernel keeps no fp32 logits, so the chunk goes through whole.
    """
    size = max(1, block_logits(logits.device) // logits.shape[1])
    if compiled:
        return _compiled(function)(logits, *args)
    if size >= len(logits):
        return function(logits, *args)
    parts = []
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        parts.append(function(*(t[rows] if torch.is_tensor(t) else t for t in (logits, *args))))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _log_softmax(logits, cap, temperature=1.0):
    """The fp32 log-probabilities (n, V) of a block."""
    logits = soft_cap(logits.float(), cap)
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def _through_cap(grad, logits, cap):
    """The gradient by the logits of a block, from that by the capped ones, in place."""
    return grad.mul_(1 - torch.tanh(logits.float() / cap) ** 2) if cap else grad


def _pick(logprobs, targets):
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def _add_at(x, targets, values):
    """x (n, V) with values (n,) added at targets (n,), in place unless it is compiled."""
    if torch.compiler.is_compiling():
        # a scatter would not be fused, and would write and read x once more
        hit = torch.arange(x.shape[1], device=x.device) == targets[:, None]
        return x + torch.where(hit, values[:, None], 0)
    return x.scatter_add_(1, targets[:, None], values[:, None])


def _nll(logits, targets, weights, cap, gradient):
    """The loss (n,) of a block, in a tuple. With `gradient` the logits become the gradient by them,
    weight * (softmax - onehot)."""
    logprobs = _log_softmax(logits, cap)
    loss = -_pick(logprobs, targets) * weights
    if gradient:
        grad = _add_at(logprobs.exp_().mul_(weights[:, None]), targets, -weights)
        logits.copy_(_through_cap(grad, logits, cap))
    return (loss,)


def _picked(logits, targets, cap, temperature):
    """The log-probabilities of the targets and the entropies of a block, both (n,)."""
    logprobs = _log_softmax(logits, cap, temperature)
    return _pick(logprobs, targets), -(logprobs.exp() * logprobs).sum(-1)


def _picked_backward(logits, targets, cap, temperature, entropy, grad_picked, grad_entropy):
    """The logits of a block become the gradient by them: d log p_t = onehot - p for the
    log-probability, d H = -p (log p + H) for the entropy."""
    logprobs = _log_softmax(logits, cap, temperature)
    p = logprobs.exp()
    grad = logprobs.add_(entropy[:, None]).mul_(grad_entropy[:, None])
    grad = grad.add_(grad_picked[:, None]).mul_(p).neg_()
    grad = _add_at(grad, targets, grad_picked).div_(temperature)
    logits.copy_(_through_cap(grad, logits, cap))
    return ()


class _Gradients:
    """The gradients of hidden and of the output matrix, each None where it is not needed."""

    def __init__(self, ctx, x, w):
        needs_x, needs_w = ctx.needs_input_grad[:2]
        self.x = torch.empty_like(x) if needs_x else None
        self.w = None
        if needs_w:
            self.w = torch.zeros(w.shape, dtype=torch.float32, device=w.device)

    def add(self, rows, grad, x, w):
        """Adds what the gradient `grad` (n, V) by the logits of `rows` gives."""
        if self.x is not None:
            self.x[rows] = grad @ w
        if self.w is not None:
            # by blocks of the vocabulary, so that the bf16 products stay small
            size = max(1, block_logits(x.device) // x.shape[1])
            for part, columns in zip(self.w.split(size), grad.split(size, dim=1), strict=True):
                part += columns.t() @ x[rows]


class _CrossEntropy(torch.autograd.Function):
    """sum_n weights_n * -log p(target_n).

    The forward pass computes the gradients too, while a chunk's softmax exists: a backward pass
    would have to compute all logits again.
    """

    @staticmethod
    def forward(ctx, hidden, matrix, targets, weights, cap):
        x, w = _operands(hidden, matrix)
        grads = _Gradients(ctx, x, w)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        needed = any(ctx.needs_input_grad)
        for rows, logits in _chunks(x, w):
            (nll,) = _over_blocks(_nll, logits, targets[rows], weights[rows], cap, needed)
            loss += nll.sum()
            grads.add(rows, logits, x, w)
        ctx.save_for_backward(grads.x, grads.w)
        return loss

    @staticmethod
    def backward(ctx, grad):
        # autograd casts what is returned to the dtypes of hidden and matrix
        return *(None if g is None else g.mul_(grad) for g in ctx.saved_tensors), None, None, None


def cross_entropy(hidden, head, targets, weights):
    """The summed next-token loss, fp32: divide it by the global number of target tokens.

    hidden (N, C), head: a model's Head or an output matrix (V, C), targets (N,) int64, weights
    (N,), 0 for no target. Returns sum_n weights_n * -log softmax(hidden_n @ matrix^T)[targets_n],
    with the logits scaled and capped as the Head says.
    """
    hidden, matrix, cap = _parts(hidden, head)
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden, matrix = hidden.detach(), matrix.detach()
    return _CrossEntropy.apply(hidden, matrix, targets, weights.float(), cap)


class _TokenLogprobs(torch.autograd.Function):
    """log p(target_n), and the entropy of p at n. The backward pass recomputes the softmax."""

    @staticmethod
    def forward(ctx, hidden, matrix, targets, cap, temperature):
        x, w = _operands(hidden, matrix)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        entropy = torch.empty_like(out)
        for rows, logits in _chunks(x, w):
            block = targets[rows], cap, temperature
            out[rows], entropy[rows] = _over_blocks(_picked, logits, *block)
        ctx.save_for_backward(hidden, matrix, targets, entropy)
        ctx.settings = cap, temperature
        ctx.dtype = x.dtype
        return out, entropy

    @staticmethod
    def backward(ctx, grad_out, grad_entropy):
        hidden, matrix, targets, entropy = ctx.saved_tensors
        x, w = hidden.to(ctx.dtype), matrix.to(ctx.dtype)
        grads = _Gradients(ctx, x, w)
        for rows, logits in _chunks(x, w):
            given = entropy[rows], grad_out[rows], grad_entropy[rows]
            _over_blocks(_picked_backward, logits, targets[rows], *ctx.settings, *given)
            grads.add(rows, logits, x, w)
        return grads.x, grads.w, None, None, None


def token_logprobs(hidden, head, targets, temperature=1.0, entropy=False):
    """log softmax(logits / temperature)[targets], (N,) fp32.

    hidden (N, C), head: a model's Head or an output matrix (V, C), targets (N,). Differentiable.
    With entropy=True it returns (logprobs, entropies of the whole distributions), both (N,).
    """
    hidden, matrix, cap = _parts(hidden, head)
    out = _TokenLogprobs.apply(hidden, matrix, targets, cap, temperature)
    return out if entropy else out[0]


def _scored(logits, targets, cap):
    """The log-probabilities of a block's targets, and where these are the likeliest, both (n,)."""
    likeliest = logits.argmax(-1) == targets
    logits = soft_cap(logits.float(), cap)
    return _pick(logits, targets) - logits.logsumexp(-1), likeliest.float()


@torch.no_grad()
def token_scores(hidden, head, targets):
    """For evaluation: `token_logprobs` and `hits` of one product with the output matrix."""
    hidden, matrix, cap = _parts(hidden, head)
    logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    hit = torch.empty_like(logprobs)
    for rows, logits in _chunks(*_operands(hidden, matrix)):
        logprobs[rows], hit[rows] = _over_blocks(_scored, logits, targets[rows], cap)
    return logprobs, hit


def routing(model, batch):
    """How the last forward of `model` on `batch` spread its tokens over experts -> {name: number},
    0-d tensors. {} of a model without experts.

    aux_loss        E * sum over experts of f P, where f is how often a token takes the expert and P
                    its mean probability, over the tokens of all layers; k where they are in balance
                    (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6; transformers has it of all
                    families here). It alone has a gradient.
    max_load        how many times the tokens of a balanced expert the busiest takes
    min_load        the same of the idlest
    router_entropy  of a token's probabilities, as a share of log E

    Padding does not count.
    """
    scores = model.router_scores() if model.cfg.n_experts else []
    if not scores:
        return {}
    E, k = model.cfg.n_experts, model.cfg.experts_per_token
    probs = torch.stack(scores).softmax(-1)  # (layers, N, E)
    real = torch.ones_like(probs[0, :, 0])
    if "docs" in batch:
        real = (batch["docs"].flatten() >= 0).to(probs.dtype)
    weights = (real / (real.sum() * len(scores)).clamp(min=1)).expand(len(scores), -1)
    taken = torch.zeros(E, device=probs.device)
    chosen = probs.detach().topk(k, dim=-1).indices
    taken.scatter_add_(0, chosen.flatten(), weights[..., None].expand_as(chosen).flatten())
    mean = (probs * weights[..., None]).sum((0, 1))
    entropy = torch.special.entr(probs.detach()).sum(-1) / math.log(E)
    return dict(
        aux_loss=E * (taken * mean).sum(),
        max_load=taken.max() * E / k,
        min_load=taken.min() * E / k,
        router_entropy=(entropy * weights).sum(),
    )


def add_routing(stats, model, batch, share):
    """Adds a micro-batch's `routing`, times its share of the step's targets, to the dict stats.

    Returns what the micro-batch adds to the auxiliary loss, with its gradient; 0 without experts.
    """
    values = {name: share * value for name, value in routing(model, batch).items()}
    for name, value in values.items():
        stats[name] = stats.get(name, 0.0) + value.detach()
    return values.get("aux_loss", 0.0)


def chosen_experts(model):
    """The experts that the tokens took in the last forward, (mixtures, B * T, k), as "experts" of a
    batch."""
    scores = torch.stack(model.router_scores())
    return scores.topk(model.cfg.experts_per_token, dim=-1).indices


def check_experts(model, aux_coef, replay=False):
    """UserError for an aux_coef= or replay_experts= without experts."""
    if aux_coef and not model.cfg.n_experts:
        raise UserError(f"aux_coef={aux_coef} balances experts, and this model has none")
    if replay and not model.cfg.n_experts:
        raise UserError("replay_experts=true: this model has no experts")


@torch.no_grad()
def hits(hidden, head, targets):
    """For validation: 1.0 where the likeliest token is the target, else 0.0, (N,) float32.

    hidden (N, C), head: a model's Head or an output matrix (V, C), targets (N,).
    """
    hidden, matrix, _ = _parts(hidden, head)  # no cap changes which logit is the largest
    hit = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for rows, logits in _chunks(*_operands(hidden, matrix)):
        hit[rows] = (logits.argmax(-1) == targets[rows]).float()
    return hit
