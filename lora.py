"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) put on and taken off a model from outside, several by name on one base.

    lora.apply(model, rank=16, alpha=32)            # freezes the base, trains the adapter "default"
    lora.use(model, None)                           # the base alone: the reference policy of DPO and PPO
    lora.merge(model)                               # adds the active adapter to the weights for good

Every adapted layer computes  W x + scale * B (A x)  with A (r, in), B (out, r) in fp32, scale = alpha / r, or alpha / sqrt(r)
when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with named adapters, of which `active` (a name or None) takes part in forward."""

    @classmethod
    def around(cls, linear):
        with torch.device("meta"):
            self = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scales, self.dropouts, self.active = {}, {}, None
        return self

    def add(self, name, rank, scale, dropout):
        new = dict(dtype=torch.float32, device=self.weight.device)
        self.lora_A[name] = nn.Parameter(torch.empty(rank, self.in_features, **new))
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, **new))
        nn.init.kaiming_uniform_(
            self.lora_A[name], a=math.sqrt(5)
        )  # peft's: the scale of nn.Linear's own
        self.scales[name], self.dropouts[name] = scale, dropout

    def delta(self):
        """scale * B A of the active adapter, (out, in), fp32."""
        return self.scales[self.active] * (
            self.lora_B[self.active].float() @ self.lora_A[self.active].float()
        )

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.active is None:
            return y
        x = F.dropout(x, self.dropouts[self.active], self.training)
        low = (
            F.linear(x, self.lora_A[self.active].to(x.dtype)) * self.scales[self.active]
        )  # here, where it is `rank` wide
        return y + F.linear(low, self.lora_B[self.active].to(low.dtype))


def adapted(model):
    """(name, LoRALinear) of every adapted layer."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


def linear_names(model):
    """The linear layers that may carry adapters: those of the blocks. The head never does, losses.py reads its weight."""
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.startswith("model.layers.")
    ]


def _wrap(model, name):
    parent, leaf = name.rpartition(".")[::2]
    module = model.get_submodule(name)
    if not isinstance(module, LoRALinear):
        module = LoRALinear.around(module)
        setattr(model.get_submodule(parent), leaf, module)
    return module


def apply(model, rank, alpha, dropout=0.0, targets="all-linear", name="default", rslora=False):
    """Freezes the base and adds a trainable adapter to the linear layers that `targets` names: a list of suffixes such as
    ["q_proj", "v_proj"], or "all-linear": every linear layer of the blocks, not the head. Makes it the active one."""
    if rank < 1:
        raise ValueError(f"lora_rank={rank}: must be 1 or more")
    linears = linear_names(model)
    chosen = linears
    suffixes = [targets] if isinstance(targets, str) else list(targets)
    if suffixes != ["all-linear"]:
        for s in suffixes:
            if not any(n == s or n.endswith("." + s) for n in linears):
                leaves = sorted({n.rpartition(".")[2] for n in linears})
                raise ValueError(
                    f"lora_targets: no layer ends in {s!r}; the linear layers are {', '.join(leaves)}"
                )
        chosen = [n for n in linears if any(n == s or n.endswith("." + s) for s in suffixes)]
    if not chosen:
        raise ValueError(
            "lora_targets names no layer: give suffixes such as [q_proj,v_proj], or all-linear"
        )
    if not adapted(model):
        model.requires_grad_(False)
    for n in chosen:
        _wrap(model, n).add(name, rank, alpha / (math.sqrt(rank) if rslora else rank), dropout)
    use(model, name)


def use(model, name):
    """Switches every adapted layer to the adapter `name`, or to the bare base with None. Layers without it run bare."""
    layers = adapted(model)
    if name is not None and not any(name in m.scales for _, m in layers):
        raise KeyError(f"there is no adapter {name!r} on this model")
    for _, m in layers:
        m.active = name if name in m.scales else None


@torch.no_grad()
def merge(model):
    """Folds the active adapter into the weights for good, in fp32, and takes all adapters off. Returns the model."""
    for name, m in adapted(model):
        if m.active is not None:
            m.weight.data = (m.weight.float() + m.delta()).to(m.weight.dtype)
        plain = nn.Linear(1, 1, bias=False, device="meta")
        plain.in_features, plain.out_features = m.in_features, m.out_features
        plain.weight, plain.bias = m.weight, m.bias
        parent, leaf = name.rpartition(".")[::2]
        setattr(model.get_submodule(parent), leaf, plain)
    return model
