"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) around the linear layers of a model.

    lora.apply(model, rank=16, alpha=32)   # freezes the base, trains the adapter "default"
    lora.use(model, None)                  # the base alone: the reference policy of DPO and PPO
    lora.merge(model)                      # folds the adapter into the weights and takes it off

An adapted layer computes base(x) + scale * B (A x) with A (r, in) and B (out, r) in fp32. The scale
is alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732). An
adapter of DoRA also has a magnitude (out,): the norm of each row of the adapted matrix (Liu et al.
2024, arXiv:2402.09353). The base needs nothing but in_features and out_features. The layers of E
experts are one base, which has their number as `experts` and multiplies by `product`. Its A is
(E, r, in), its B (E, out, r). One base can carry several adapters with different names.
nano/weights.py reads and writes adapters as PEFT directories.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def dense(module):
    """The matrix (out, in) of a linear layer, however the layer stores it. (E, out, in) of
    experts."""
    return module.dense() if hasattr(module, "dense") else module.weight


def plain(base, matrix):
    """A layer with this matrix, which stores it as it is, and the bias of `base`."""
    if hasattr(base, "experts"):
        layer = base.empty()
    else:
        layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    layer.bias = base.bias
    return layer


class LoRA(nn.Module):
    """A frozen linear layer `base` with named adapters around it. `active` is the name of the
    adapter that forward uses, or None."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features = base.in_features
        self.out_features = base.out_features
        if hasattr(base, "experts"):
            self.experts = base.experts
        self.product = getattr(base, "product", F.linear)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_magnitude = nn.ParameterDict()  # of the adapters of DoRA
        self.scales = {}
        self.dropouts = {}
        self.active = None

    def add(self, name, rank, scale, dropout=0.0):
        """Adds an adapter that changes nothing yet, because its B is 0."""
        tensor = next(iter(self.base.state_dict().values()))  # a parameter or a buffer
        stack = (self.experts,) if hasattr(self, "experts") else ()
        A = torch.empty(*stack, rank, self.in_features, device=tensor.device)
        # as nn.Linear and peft do
        nn.init.kaiming_uniform_(A.view(-1, self.in_features), a=math.sqrt(5))
        B = torch.zeros(*stack, self.out_features, rank, device=tensor.device)
        self.put(name, A, B, scale, dropout)

    def put(self, name, A, B, scale, dropout=0.0, magnitude=None):
        """Sets the adapter `name`: A (r, in), B (out, r), magnitude (out,) of DoRA. Of experts A
        (E, r, in), B (E, out, r)."""
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(B)
        if magnitude is not None:
            self.lora_magnitude[name] = nn.Parameter(magnitude)
        self.scales[name] = scale
        self.set_dropout(name, dropout)

    def set_dropout(self, name, dropout):
        """ValueError for experts, whose adapters have none in peft."""
        if dropout and hasattr(self, "experts"):
            raise ValueError(
                f"lora_dropout={dropout}: adapters of experts have no dropout in peft: leave it out"
            )
        self.dropouts[name] = dropout

    def dense(self):
        """The base's matrix with the active adapter folded in, in fp32."""
        if self.active is None:
            return dense(self.base)
        matrix = self.summed()
        if self.active in self.lora_magnitude:
            magnitude = self.lora_magnitude[self.active].float()
            matrix = matrix * (magnitude / matrix.norm(dim=1))[:, None]
        return matrix

    def summed(self):
        """The base's matrix plus the product of the active adapter, in fp32."""
        A, B = self.lora_A[self.active].float(), self.lora_B[self.active].float()
        return dense(self.base).float() + self.scales[self.active] * (B @ A)

    def forward(self, x, *ends):
        """ends: where each expert's rows of x end, if the base are layers of experts."""
        y = self.base(x, *ends)
        if self.active is None:
            return y
        A, B = self.lora_A[self.active], self.lora_B[self.active]
        x = F.dropout(x, self.dropouts[self.active], self.training)
        # scaled here, where the activations are only `rank` wide
        low = self.product(x, A.to(x.dtype), *ends) * self.scales[self.active]
        y = y + self.product(low, B.to(low.dtype), *ends)
        if self.active not in self.lora_magnitude:
            return y
        with torch.no_grad():  # the norm counts as a constant, section 4.3 of DoRA
            norm = self.summed().norm(dim=1)
        factor = (self.lora_magnitude[self.active] / norm).to(y.dtype)
        if self.base.bias is None:
            return y * factor
        bias = self.base.bias.to(y.dtype)  # is not scaled
        return (y - bias) * factor + bias


def adapted(model):
    """(name, LoRA) of every adapted layer."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRA)]


def linear_names(model):
    """The names of the linear layers of the blocks, adapted or not. The layers of all experts are
    one. The head is not among them, because nano/losses.py reads its weight."""
    return [
        name
        for name, module in model.named_modules()
        if ".layers." in name and hasattr(module, "in_features") and not name.endswith(".base")
    ]


def is_stack(name):
    """Whether a layer of that name holds the layers of all experts."""
    return ".mlp.experts." in name


def target_names(model):
    """The names of the layers that may carry adapters. In a mixture of experts they are those of
    attention and of experts, because peft takes the names of the others for experts."""
    names = linear_names(model)
    mixed = any(map(is_stack, names))
    return [n for n in names if ".self_attn." in n or is_stack(n)] if mixed else names


def wrap(model, name):
    """The LoRA around the layer `name`. It is put there if there is none yet."""
    module = model.get_submodule(name)
    if not isinstance(module, LoRA):
        module = LoRA(module)
        model.set_submodule(name, module)
    return module


def apply(model, rank, alpha, dropout=0.0, targets="all-linear", name="default", rslora=False):
    """Freezes the base, adds a trainable adapter to linear layers, and makes it the active one.

    targets: a list of suffixes of layer names such as ["q_proj", "v_proj"]. "all-linear" means
    every linear layer of the blocks that may carry one, not the head, and not experts, which are
    named beside it: ["all-linear", "gate_up_proj", "down_proj"]. ValueError for a rank below 1, for
    targets that name no layer, and for dropout on experts, which peft has not.
    """
    if rank < 1:
        raise ValueError(f"lora_rank={rank}: must be 1 or more")
    names = target_names(model)
    chosen = set()
    for suffix in [targets] if isinstance(targets, str) else targets:
        if suffix == "all-linear":
            named = [n for n in names if not is_stack(n)]
        else:
            named = [n for n in names if f".{n}".endswith(f".{suffix}")]
        if not named:
            leaves = sorted({n.rpartition(".")[2] for n in names})
            raise ValueError(
                f"lora_targets: no layer ends in {suffix!r}; the linear layers are "
                + ", ".join(leaves)
            )
        chosen.update(named)
    if not chosen:
        raise ValueError(
            "lora_targets names no layer: give suffixes such as [q_proj,v_proj], or all-linear"
        )
    if not adapted(model):
        model.requires_grad_(False)
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    for layer in names:  # in the order of the model, in which random numbers are drawn
        if layer in chosen:
            wrap(model, layer).add(name, rank, scale, dropout)
    use(model, name)


def use(model, name):
    """Switches every adapted layer to the adapter `name`, or to its base with None. A layer without
    this adapter runs its base. KeyError if no layer has it."""
    layers = adapted(model)
    if name is not None and not any(name in m.scales for _, m in layers):
        raise KeyError(f"there is no adapter {name!r} on this model")
    for _, m in layers:
        m.active = name if name in m.scales else None


@torch.no_grad()
def copy(model, name, new):
    """Adds the adapter `new` with the numbers of the adapter `name`."""
    for _, m in adapted(model):
        if name in m.scales:
            A, B = m.lora_A[name].clone(), m.lora_B[name].clone()
            magnitude = m.lora_magnitude[name].clone() if name in m.lora_magnitude else None
            m.put(new, A, B, m.scales[name], m.dropouts[name], magnitude)


@torch.no_grad()
def merge(model):
    """Folds the active adapter into the weights in fp32, takes all adapters off, and returns the
    model."""
    for name, m in adapted(model):
        merged = m.base
        if m.active is not None:
            merged = plain(m.base, m.dense().to(dense(m.base).dtype))
        model.set_submodule(name, merged)
    return model
