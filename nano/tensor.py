"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): N devices share each layer.
They see the same rows.

A module's class says how its layers are shared, as tuples of names:

COLUMN      Weights are sharded by output. Each device computes some heads, or units of the MLP.
ROW         Weights are sharded by input. Each device computes a summand of the output.
ALL         Each device computes the output for its other heads: a key/value head that all share.
PER_HEAD    The layer runs on each head alone. Weights are replicated, activations sharded by head.
WHOLE       The layer runs on all heads at once. Weights are replicated, activations are gathered.
VOCABULARY  Embedding and output matrix are sharded by token.

All other parameters are replicated. A LoRA adapter is shared as the layer around which it stands.
"""

import functools

import torch.nn as nn

from lora import LoRA
from nano.config import UserError


def check(cfg, size):
    """UserError unless `size` devices can share the layers of a model with this ModelConfig."""
    if size > 1 and cfg.positions == "distance":
        raise UserError(
            f"tensor={size} does not share out what distances add to the scores of heads: "
            "use parallel=fsdp alone"
        )
    if size > 1 and (cfg.n_experts or cfg.sinks):
        raise UserError(
            f"tensor={size} does not share out experts and attention sinks: use parallel=fsdp alone"
        )
    kv_heads = 0 if cfg.n_kv_heads == 1 else cfg.n_kv_heads  # one serves the heads of each device
    if any(n % size for n in (cfg.n_heads, kv_heads, cfg.ffn_dim)):
        raise UserError(
            f"tensor={size} must divide the model's {cfg.n_heads} heads, {cfg.n_kv_heads} "
            f"key/value heads and {cfg.ffn_dim} units of its MLP"
        )


def shared_layers(model):
    """{name of a module: how it is shared} for each layer that some module of the model lists."""
    modules = dict(model.named_modules())
    styles = {}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        for style in ("COLUMN", "ROW", "ALL", "PER_HEAD", "WHOLE", "VOCABULARY"):
            for child in getattr(module, style, ()):
                if prefix + child in modules:
                    styles[prefix + child] = style
    return styles


def shard_dims(model, size):
    """{name of a parameter: its dimension that is sharded over `size` devices}. None stands for a
    replicated parameter."""
    dims = {name: None for name, _ in model.named_parameters()}
    for layer, style in shared_layers(model).items():
        for name, p in model.get_submodule(layer).named_parameters():
            dim = None
            if style == "VOCABULARY" or style == "COLUMN" and "lora_A." not in name:
                dim = 0
            elif style == "ROW" and (name.endswith("weight") or "lora_A." in name):
                dim = 1
            if dim is not None and p.shape[dim] % size == 0:
                dims[f"{layer}.{name}"] = dim
    return dims


def shard(model, mesh, dtype_of):
    """Makes each parameter a DTensor over the devices of `mesh` (one dimension), cast to
    dtype_of(module, parameter).

    Each layer still takes and returns plain tensors. A sharded input or output is this device's
    shard. Replicated parameters are DTensors too, because an optimizer's kernels take no mixture.
    Hooks do it and not torch's parallelize_module, which does not know layers with adapters. Each
    rank must have read the whole model, because nothing is sent.
    """
    # imported here, because it takes a second that other runs need not wait
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    dims = shard_dims(model, mesh.size())
    for name, p in list(model.named_parameters()):
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        placement = Replicate() if dims[name] is None else Shard(dims[name])
        full = p.detach().to(dtype_of(module, p))
        sharded = distribute_tensor(full, mesh, [placement], src_data_rank=None)
        module.register_parameter(key, nn.Parameter(sharded, requires_grad=p.requires_grad))

    inputs = dict(ROW=Shard(-1), PER_HEAD=Shard(2), WHOLE=Shard(-1))
    outputs = dict(COLUMN=Shard(-1), PER_HEAD=Shard(2), WHOLE=Shard(-1))
    styles = shared_layers(model)
    hooked = ()
    for name, module in model.named_modules():
        # a layer with adapters gets its hooks as a whole
        if (module._parameters or isinstance(module, LoRA)) and not name.startswith(hooked):
            hooked += (f"{name}.",)
            style = styles.get(name)
            placement = inputs.get(style, Replicate())
            computed = Replicate() if style == "WHOLE" else placement
            enter = functools.partial(_enter, mesh, placement, computed)
            # the gradient of what ALL computes is a sum over the devices
            grads = [Partial()] if style == "ALL" else None
            leave = functools.partial(_leave, outputs.get(style, Replicate()), grads)
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        if hasattr(module, "keep_heads"):
            module.keep_heads(mesh.get_local_rank(), mesh.size())


def _enter(mesh, placement, computed, module, inputs):
    """Forward pre-hook: plain tensors become DTensors, redistributed to `computed`."""
    from torch.distributed.tensor import DTensor

    inputs = [DTensor.from_local(x, mesh, [placement], run_check=False) for x in inputs]
    return tuple(x.redistribute(placements=[computed]) for x in inputs)


def _leave(placement, grads, module, inputs, output):
    """Forward hook: a DTensor is redistributed to `placement` and becomes a plain tensor.

    grads: the placements of its gradient where they are not those of its value."""
    return output.redistribute(placements=[placement]).to_local(grad_placements=grads)
