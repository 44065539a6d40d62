"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) put on and taken off a model from outside, several by name on one base.

    lora.apply(model, rank=16, alpha=32)            # freezes the base, trains the adapter "default"
    lora.use(model, None)                           # the base alone: the reference policy of DPO and PPO
    lora.save(model, "out/adapter", base="models/smollm2")     # a PEFT directory, which `peft` loads
    model, base = lora.open_model("out/adapter")    # a model or adapter directory, whichever it is

Every adapted layer computes  W x + scale * B (A x)  with A (r, in), B (out, r) in fp32, scale = alpha / r, or alpha / sqrt(r)
when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732).
"""

import contextlib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ScoreHead
from nano import checkpoint
from nano.config import UserError


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
        raise UserError(f"lora_rank={rank}: must be 1 or more")
    linears = linear_names(model)
    chosen = linears
    suffixes = [targets] if isinstance(targets, str) else list(targets)
    if suffixes != ["all-linear"]:
        for s in suffixes:
            if not any(n == s or n.endswith("." + s) for n in linears):
                leaves = sorted({n.rpartition(".")[2] for n in linears})
                raise UserError(
                    f"lora_targets: no layer ends in {s!r}; the linear layers are {', '.join(leaves)}"
                )
        chosen = [n for n in linears if any(n == s or n.endswith("." + s) for s in suffixes)]
    if not chosen:
        raise UserError(
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


def parameters(model, name="default"):
    """The adapter's own tensors."""
    return [
        p for _, m in adapted(model) if name in m.scales for p in (m.lora_A[name], m.lora_B[name])
    ]


@contextlib.contextmanager
@torch.no_grad()
def merged(model):
    """Within: the active adapter is folded into the weights (added in fp32), so that a forward costs what the base's does.
    After: the very same base tensors are back, nothing is subtracted."""
    layers = [(m, m.active, m.weight.data) for _, m in adapted(model) if m.active is not None]
    try:
        for m, _, weight in layers:
            m.weight.data = (weight.float() + m.delta()).to(weight.dtype)
            m.active = None
        yield model
    finally:
        for m, active, weight in layers:
            m.weight.data, m.active = weight, active


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


# ---------------------------------------------------------------------------------------------- PEFT directories

PREFIX = "base_model.model."


def save(model, dir, name="default", base="", tensors=None, tok=None):
    """Writes the adapter as a PEFT directory. A trained head (`score`) goes along in full, as modules_to_save.
    base: the model directory it belongs to, kept in adapter_config.json. tensors: the model's tensors where they are gathered
    already (sharded training); default: its own. tok: the Tokenizer trained with; a chat template that is not the base's own goes
    along."""
    layers = [(n, m) for n, m in adapted(model) if name in m.scales]
    if not layers:
        raise KeyError(f"there is no adapter {name!r} on this model")
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    out = {}
    for n, _ in layers:
        for ab in ("lora_A", "lora_B"):
            out[f"{PREFIX}{n}.{ab}.weight"] = (
                tensors[f"{n}.{ab}.{name}"].detach().cpu().contiguous()
            )
    rank, scale = layers[0][1].lora_A[name].shape[0], layers[0][1].scales[name]
    score = "score.weight" in tensors
    if score:
        out[PREFIX + "score.weight"] = tensors["score.weight"].detach().cpu().contiguous()
    names = {n for n, _ in layers}
    leaves = {n.rpartition(".")[2] for n in names}
    whole = all(
        n in names for n in linear_names(model) if n.rpartition(".")[2] in leaves
    )  # a suffix says it all
    config = dict(
        peft_type="LORA",
        task_type="SEQ_CLS" if score else "CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=layers[0][1].dropouts[name],
        target_modules=sorted(leaves if whole else names),
        modules_to_save=["score"] if score else None,
        bias="none",
        use_rslora=False,
        use_dora=False,
        fan_in_fan_out=False,
        inference_mode=True,
        init_lora_weights=True,
        rank_pattern={},
        alpha_pattern={},
        layers_to_transform=None,
    )
    checkpoint.write_tensors(out.items(), dir, name="adapter_model")
    if tok and tok.adopted:
        checkpoint.write_text(Path(dir) / "chat_template.jinja", tok.chat_template)
    else:
        Path(dir, "chat_template.jinja").unlink(missing_ok=True)
    checkpoint.write_text(Path(dir) / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    for path in (
        Path(dir, "config.json"),
        *Path(dir).glob("model*.safetensors*"),
    ):  # of an earlier run without lora_rank=
        path.unlink(missing_ok=True)


def read_config(dir):
    """adapter_config.json of a PEFT directory, refused when it says something that this file does not do."""
    path = Path(dir) / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{dir} is no adapter directory: it has no adapter_config.json")
    config = checkpoint.read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported (only 'LORA' is)"
        )
    unsupported = dict(
        use_dora=False,
        bias="none",
        fan_in_fan_out=False,
        rank_pattern={},
        alpha_pattern={},
        megatron_config=None,
        alora_invocation_tokens=None,
    )
    for key, plain in unsupported.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{path}: {key}={config[key]!r} is not supported (only {plain!r} is)")
    if str(config.get("init_lora_weights")).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        how = config["init_lora_weights"]
        again = "save it anew with peft's path_initial_model_for_weight_conversion="
        raise UserError(
            f"{path}: init_lora_weights={how!r} has changed the base model too, which is not here: {again}"
        )
    if (
        type(config.get("r")) is not int
        or config["r"] < 1
        or not isinstance(config.get("lora_alpha"), (int, float))
    ):
        raise UserError(
            f"{path}: r={config.get('r')!r} and lora_alpha={config.get('lora_alpha')!r} must be numbers, r 1 or more"
        )
    return config


def load(model, dir, name="default"):
    """Reads a PEFT directory into the adapter `name`: made active, not frozen, without the dropout that it was trained with (RL
    trains on it further, and must see the same probabilities twice). Raises UserError for another base's adapter."""
    config = read_config(dir)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if not adapted(model):
        model.requires_grad_(False)
    linears, found = set(linear_names(model)), {}  # found: (layer, "lora_A" or "lora_B") -> tensor
    for key, tensor in checkpoint.read_tensors(dir, name="adapter_model").items():
        module, _, ab = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if module in linears and ab in ("lora_A", "lora_B"):
            linear = model.get_submodule(module)
            size = (rank, linear.in_features) if ab == "lora_A" else (linear.out_features, rank)
        elif (module, ab) in (("", "score"), ("score", "modules_to_save")):
            if not hasattr(model, "score"):
                raise UserError(
                    f"{dir}: the adapter carries a score head, but the model was not opened as a score model"
                )
            size = tuple(model.score.weight.shape)
        else:
            raise UserError(
                f"{dir}: tensor {key} belongs to no layer that is adapted here: an adapter for another base?"
            )
        if tuple(tensor.shape) != size:
            raise UserError(
                f"{dir}: {key} is {tuple(tensor.shape)}, this model takes {size}: an adapter for another base?"
            )
        found[module, ab] = tensor
    layers = dict.fromkeys(module for module, ab in found if ab.startswith("lora_"))
    if not layers or any(
        (module, ab) not in found for module in layers for ab in ("lora_A", "lora_B")
    ):
        raise UserError(
            f"{dir}: adapter_model.safetensors is incomplete: a layer needs both lora_A and lora_B"
        )
    for module in layers:
        _wrap(model, module).add(name, rank, scale, 0.0)
    for (module, ab), tensor in found.items():
        target = (
            getattr(model.get_submodule(module), ab)[name]
            if module in layers
            else model.score.weight
        )
        target.data.copy_(tensor)
    use(model, name)


def load_scorer(model, dir, name):
    """Reads a score adapter (reward.py's) into the adapter `name` of a language model and returns its head, a model.ScoreHead."""
    if read_config(dir).get("task_type") != "SEQ_CLS":
        raise UserError(f"{dir} is an adapter of a language model, not of a score model")
    model.score = ScoreHead(model.cfg.dim).to(model.model["embed_tokens"].weight.device)
    load(model, dir, name)
    head = model.score
    del model.score
    return head


def is_adapter(dir):
    return (Path(dir) / "adapter_config.json").exists()


def chat_template(dir):
    """The chat template, in Jinja, that an adapter directory brings for the tokenizer of its base; None: the base's own serves."""
    path = Path(dir, "chat_template.jinja")
    return path.read_text(encoding="utf-8") if is_adapter(dir) and path.exists() else None


def base_of(dir, base=None):
    """The model directory, which holds config and tokenizer, of a model or adapter directory. `base` takes the place of the one
    that the adapter names."""
    if not is_adapter(dir):
        if base:
            raise UserError(f"{dir} is a whole model, not an adapter: leave out base={base}")
        return Path(dir)
    named = base or read_config(dir).get("base_model_name_or_path") or ""
    found = next(
        (p for p in (Path(named), Path(dir) / named) if named and (p / "config.json").exists()),
        None,
    )
    if found is None:
        raise UserError(
            f"{dir}: its base {str(named)!r} is no model directory here: name it with base=, or in adapter_config.json"
        )
    return found


def open_model(dir, base=None, device="cpu", dtype=None, head=None, as_base=False):
    """Opens a model directory or an adapter directory -> (model, directory of the model that holds config and tokenizer).
    `base` takes the place of the base that the adapter names, in memory: no file is changed. as_base: the model is to carry a
    new adapter, whose directory will name `dir` as its base, so an adapter directory is refused."""
    if is_adapter(dir) and as_base:
        raise UserError(
            f"{dir} is an adapter; a new one needs a base on disk: merge it, python -m prepare.weights source={dir}"
        )
    found = base_of(dir, base)
    if head is None and is_adapter(dir) and read_config(dir).get("task_type") == "SEQ_CLS":
        head = "score"
    model = checkpoint.load_model(found, device=device, dtype=dtype, head=head)
    if is_adapter(dir):
        load(model, dir)
    return model, found


def open_whole(dir, head=None, as_base=False):
    """open_model for training: an adapter is merged into its base, in fp32; a model is its file, memory-mapped, until runtime.place
    gives its parameters their dtypes and devices."""
    model, found = open_model(
        dir, dtype=torch.float32 if is_adapter(dir) else None, head=head, as_base=as_base
    )
    return merge(model), found
