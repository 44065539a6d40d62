"""Parameter groups, AdamW and Muon, the learning-rate schedule, gradient clipping, averages.

    optimizer = optim.build(model, "adamw", lr=2e-5, weight_decay=0.1)
    lr = optim.lr_at(step, total_steps, lr=2e-5, schedule="cosine", warmup_steps=10)
    optim.set_lr(optimizer, lr)
    norm = optim.clip_(model.parameters(), 1.0)
    optim.step(optimizer, norm)  # nothing, where the norm is not finite

The trained parameters are to be fp32, and the forward under autocast. Next to a bf16 weight of 0.02
an AdamW step of 1e-5 is less than half a unit in the last place, so five weights of six would round
back to where they were.
"""

import contextlib
import math
from itertools import islice

import torch
from torch import nn

from nano import quant
from nano.config import UserError

FUSED = ("cpu", "cuda", "mps", "xpu")  # device types with a fused AdamW kernel; XLA raises on it


def choose_trained(model, train, freeze_layers):
    """Leaves requires_grad on what `train` names, above the first `freeze_layers` layers.

    train: all, attention or qv. UserError for more layers than there are, and for quantised ones.
    """
    quant.refuse_training(model)
    parts = dict(all=("",), attention=("_attn.",), qv=(".q_proj.", ".v_proj."))[train]
    for name, p in model.named_parameters():
        p.requires_grad = any(part in name for part in parts)
    if freeze_layers > len(model.layers):
        raise UserError(f"freeze_layers={freeze_layers}: the model has {len(model.layers)} layers")
    if freeze_layers:
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        for module in (*embeddings, *model.layers[:freeze_layers]):
            module.requires_grad_(False)


def param_groups(model, weight_decay):
    """The trainable parameters as groups of an optimizer, without the empty ones.

    Matrices decay. Embeddings, norms and biases do not."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    decay, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            matrix = p.ndim >= 2 and not name.endswith("bias") and p not in embeddings
            group = decay if matrix else rest
            group.append(p)
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return [group for group in groups if group["params"]]


def adamw(groups, lr, betas=(0.9, 0.999), eps=1e-8):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over `param_groups`, fused where the
    device has the kernel."""
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=lr,
        betas=betas,
        eps=eps,
        fused=devices <= set(FUSED),
        capturable="xla" in devices,  # its count of steps is on the device, where `step` skips
    )


def build(model, optimizer="adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """The torch.optim.Optimizer of the trainable parameters of `model`: "adamw" or "muon".

    "muon" orthogonalises the updates of the matrices between embedding and head (Liu et al. 2025,
    arXiv:2502.16982). They are scaled to the size of AdamW's, so that one lr serves both.
    Embeddings, head, norms and biases stay with AdamW. UserError if nothing is trained."""
    groups = param_groups(model, weight_decay)
    if not groups:
        raise UserError("train= and freeze_layers= leave nothing to train")
    if optimizer == "adamw":
        return adamw(groups, lr, betas, eps)
    if optimizer != "muon":
        raise ValueError(f"no optimizer {optimizer!r}: adamw or muon")
    head = {p for n, p in model.named_parameters() if n in ("lm_head.weight", "score.weight")}
    matrices = [p for p in groups[0]["params"] if p.ndim == 2 and p not in head]
    groups[0]["params"] = [p for p in groups[0]["params"] if p.ndim != 2 or p in head]
    others = adamw([group for group in groups if group["params"]], lr, betas, eps)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Chain(others, muon)


class Chain(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters as one: one list of groups, and one state."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self.share()

    def share(self):
        """Lets each optimizer work on its part of the groups, and on the one state."""
        groups = iter(self.param_groups)
        for o in self.optimizers:
            o.state = self.state
            o.param_groups = list(islice(groups, len(o.param_groups)))

    def step(self, closure=None):
        for o in self.optimizers:
            o.step()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)  # puts new dicts in place of the shared ones
        self.share()


def lr_at(step, total_steps, lr, schedule="cosine", warmup_steps=0, min_lr=0.0, decay_ratio=0.1):
    """The learning rate of optimizer step `step`, counted from 0 to total_steps - 1.

    A linear warm-up of `warmup_steps` steps leads to lr. Its first step has lr / (warmup_steps + 1)
    and never 0. Then "constant" stays. "linear" and "cosine" fall to reach min_lr at the last step.
    "wsd" (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395) stays until it falls in a line
    over the last `decay_ratio` of all steps. ValueError for another schedule."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    last = total_steps - 1
    start = warmup_steps  # the last step with lr
    if schedule == "wsd":
        start = max(warmup_steps, last - round(decay_ratio * total_steps))
    x = min(max((step - start) / max(last - start, 1), 0.0), 1.0)  # 0 at `start`, 1 at `last`
    if schedule == "constant":
        return lr
    if schedule not in ("linear", "cosine", "wsd"):
        raise ValueError(f"no schedule {schedule!r}: constant, linear, cosine or wsd")
    fall = 0.5 + 0.5 * math.cos(math.pi * x) if schedule == "cosine" else 1 - x
    return min_lr + (lr - min_lr) * fall


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_(params, max_norm):
    """Scales the gradients down to a global 2-norm of at most `max_norm` (0: leaves them).

    Returns the norm that they had: a 0-d tensor on the device, the same on every rank of a sharded
    model. Nothing waits for the device."""
    norm = nn.utils.clip_grad_norm_(params, max_norm or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a DTensor under FSDP


@torch.no_grad()
def step(optimizer, norm):
    """optimizer.step(), unless `norm`, the gradients' norm (0-d), is not finite. Such a step leaves
    parameters and optimizer state as they are, bit for bit.

    optimizer.skips (3,) counts on the device: steps skipped so far, those in a row up to now, and
    the longest such row. Nothing waits for the device."""
    bad = ~norm.isfinite()
    skips = getattr(optimizer, "skips", torch.zeros(3))
    total, row, longest = skips.to(norm.device).unbind()
    row = (row + 1) * bad
    optimizer.skips = torch.stack((total + bad, row, torch.maximum(longest, row)))
    for part in getattr(optimizer, "optimizers", [optimizer]):
        if part.defaults.get("fused"):
            part.found_inf = bad.float()  # the kernels read it, as they do under a GradScaler
            part.step()
        else:
            with unless(part, bad):
                part.step()
    if hasattr(optimizer, "average"):
        optimizer.average.update(bad)


@contextlib.contextmanager
def unless(optimizer, bad):
    """Where `bad` (0-d bool) is true, what the block does to parameters and state is undone.

    It is for optimizers whose kernels cannot skip. Their parameters and state are copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params = [p for p in params if p.grad is not None]

    def tensors():
        """{(parameter, key): tensor of this device}"""
        values = {(p, None): p for p in params}
        values |= {(p, key): t for p in params for key, t in optimizer.state[p].items()}
        return {key: getattr(t, "_local_tensor", t) for key, t in values.items()}

    before = {key: t.clone() for key, t in tensors().items()}
    yield
    for key, t in tensors().items():  # state that the first step has created began with zeros
        old = before.get(key, torch.zeros((), dtype=t.dtype, device=t.device))
        t.copy_(torch.where(bad.to(t.device), old, t))


class Average:
    """An exponential moving average of parameters: values = d * values + (1 - d) * params.

    d is `decay`, but at most (1 + n) / (10 + n) at step n. Otherwise the average of a short run
    would be little else than the weights at its start. As optimizer.average it is updated by each
    `step`. params, values: {name: tensor}. `with average.swapped():` puts the values into the
    parameters, and the parameters into the values."""

    def __init__(self, params, decay):
        self.params = params
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in params.items()}
        self.count = 0

    @torch.no_grad()
    def begin(self, count):
        """Starts from the parameters as they are, after `count` steps."""
        self.count = count
        for name, p in self.params.items():
            self.values[name].copy_(p)

    @torch.no_grad()
    def update(self, bad):
        """Takes in the parameters of a step. bad (0-d bool): the step was skipped."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        weight = (1 - decay) * (~bad).float()
        for name, p in self.params.items():
            value, p = (getattr(t, "_local_tensor", t) for t in (self.values[name], p.detach()))
            value.lerp_(p, weight.to(p.device))

    @torch.no_grad()
    def swap(self):
        for p, value in zip(self.params.values(), self.values.values(), strict=True):
            kept = p.clone()
            p.copy_(value)
            value.copy_(kept)

    @contextlib.contextmanager
    def swapped(self):
        self.swap()
        try:
            yield
        finally:
            self.swap()
