"""The exact state of a training run on disk: parameters, optimizer moments, random generators and
position.

    state.save_training("out/sft/state", rt, "sft", trained, {"adamw": optimizer}, step=100)
    meta, _ = state.load_training("out/sft/state", rt, "sft", trained, {"adamw": optimizer})
"""

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Required, TypedDict

import torch
from safetensors import safe_open

from nano.config import UserError
from nano.files import UNFINISHED, new_dir, read_json, recover_dir, replace_dir, write_json
from nano.weights import damaged, write_tensors


def with_prefix(prefix, tensors):
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def save_state(dir, tensors, meta):
    """{name: tensor} and JSON values -> state.safetensors and state.json in a folder that is
    replaced as a whole."""
    with new_dir(dir) as tmp:
        write_tensors(tensors.items(), tmp, name="state", shard_bytes=math.inf)
        write_json(tmp / "state.json", meta)


def params_of(optimizer):
    """The parameters of a torch optimizer, in the order by which its state_dict numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def flatten_optimizer(optimizer, prefix="optimizer."):
    """What a torch optimizer knows of its parameters -> ({name: tensor}, JSON values).

    restore_optimizer puts it back bit for bit. A name is the prefix, the number of the parameter
    and the key, as in "optimizer.3.exp_avg". The groups' settings (lr, betas, ...) are left out,
    because a run that goes on may have others."""
    tensors, scalars = {}, {}
    for i, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{i}.{key}"] = value
            else:
                scalars[f"{i}.{key}"] = value
    return tensors, {"scalars": scalars, "shapes": [list(p.shape) for p in params_of(optimizer)]}


def restore_optimizer(optimizer, tensors, meta, prefix="optimizer."):
    """Puts back what flatten_optimizer returned, in an optimizer that was built alike.

    UserError when it was not. It does without the optimizer's load_state_dict, which casts the
    moments to the parameter's dtype."""
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if [list(p.shape) for p, _ in params] != meta["shapes"]:
        raise UserError(
            "the saved optimizer is for other parameters: resume with the settings of the saved run"
        )
    optimizer.state.clear()
    for name, value in (meta["scalars"] | with_prefix(prefix, tensors)).items():
        i, key = name.split(".", 1)
        p, group = params[int(i)]
        # `step` stays on the host, unless the optimizer's kernel reads it on the device
        on_device = key != "step" or group.get("fused") or group.get("capturable")
        if isinstance(value, torch.Tensor) and on_device:
            value = value.to(p.device)
        optimizer.state[p][key] = value


def resumes(out, resume, rt):
    """Whether a run continues from the state in its folder `out`.

    resume: "auto" and "anyway" (if there is a state), "true" (it is an error if there is none) or
    "false".
    UserError where only some ranks see the state."""
    found = rt.once(_resumable, Path(out) / "state", resume)
    if 0 < rt.all_sum(int(found)) < rt.world:
        raise UserError(
            f"{out}/state is on some nodes and not on others: "
            "put out= on a file system that all see"
        )
    return found


def check_place(out):
    """UserError where the run folder `out` cannot be written to."""
    out = Path(out).absolute()
    place = next(p for p in (out, *out.parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"{place} is a file, not a folder: give another out=")
    if not os.access(place, os.W_OK):
        raise UserError(f"{place} is not writable: give another out=")


def _resumable(dir, resume):
    recover_dir(dir)
    if dir.exists() and not dir.is_dir():
        raise UserError(f"{dir} is a file, where a run keeps its state: move it away")
    if resume == "true" and not dir.is_dir():
        raise UserError(f"resume=true, but there is no saved state {dir}")
    return resume != "false" and dir.is_dir()


class OptimizerJson(TypedDict):
    scalars: dict
    shapes: list[list[int]]


class MetaJson(TypedDict, total=False):
    step: Required[int]
    made_from: dict[str, str | None]


class StateJson(TypedDict):
    stage: str
    meta: MetaJson
    optimizers: dict[str, OptimizerJson]


def save_training(dir, rt, stage, trained, optimizers, extra=None, **meta):
    """Saves everything that a resume of a stage bit for bit needs.

    trained: {name: parameter}. optimizers: {name: optimizer}. extra: {name: tensor}. meta: JSON
    values. The generators of `rt` (a Runtime) go along. Every rank calls it. One writes, or each
    its own part where the parameters are sharded over ranks (save_shards).

    The parameters are saved here too, because last/ may be from another step, and is in bf16."""
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    tensors |= {f"extra.{name}": t for name, t in (extra or {}).items()}
    tensors |= {f"rng.{name}": t for name, t in rt.rng_state().items()}
    settings = {}
    for name, optimizer in optimizers.items():
        moments, settings[name] = flatten_optimizer(optimizer, f"{name}.")
        tensors |= moments
    saved = {"stage": stage, "meta": meta, "optimizers": settings}
    if any(hasattr(p, "placements") for p in trained.values()):
        rt.finish_saving()
        rt.saving = save_shards(dir, tensors, saved, rt.saving_group())
    else:
        tensors = rt.gather(tensors)
        if rt.is_main:
            save_state(dir, tensors, saved)


def save_shards(dir, tensors, meta, group):
    """Writes each rank's shards of `tensors` to a safetensors file of its own, in the background
    and from a copy in CPU memory.

    When all ranks have written, rank 0 puts the folder in place. `dir` must be on a file system
    that all ranks see. group: a gloo process group for this alone. Returns a function that waits
    until the state is on the disk.

    torch.distributed.checkpoint's own format needs pickle to be read, so its safetensors writer is
    used."""
    import torch.distributed.checkpoint as dcp  # imported here: others need not wait a second

    tmp = Path(f"{dir}{UNFINISHED}")

    class Writer(dcp.HuggingFaceStorageWriter):
        def prepare_global_plan(self, plans):
            # rank 0 calls it when all ranks have made sure of the folder, and before any writes
            shutil.rmtree(tmp)  # what a killed save left
            tmp.mkdir()
            return super().prepare_global_plan(plans)

        def finish(self, metadata, results):
            # rank 0 calls it when all ranks have written
            files = sorted(path.name for path in tmp.glob("*.safetensors"))
            write_json(tmp / "state.json", meta | {"files": files})
            replace_dir(tmp, dir)

    writer = Writer(tmp, save_distributed=True)
    saving = dcp.async_save(tensors, storage_writer=writer, process_group=group)

    def wait():
        try:
            saving.result()
        except dcp.api.CheckpointException as e:
            shutil.rmtree(tmp, ignore_errors=True)
            raise next(iter(e.failures.values()))[0] from None

    return wait


@torch.no_grad()
def load_training(dir, rt, stage, trained, optimizers):
    """Puts back what save_training saved, on any number of ranks -> (meta, extra).

    Each rank reads its shards of the parameters and moments, whichever way they were sharded when
    they were saved. UserError when the run's stage or parameters are others."""
    import torch.distributed.checkpoint as dcp

    dir = Path(dir)
    recover_dir(dir)
    try:
        saved = read_json(dir / "state.json", kind=StateJson)
    except UserError as e:
        raise UserError(
            f"{e}: the file is damaged; restore the folder, or start anew with resume=false"
        ) from None
    if saved["stage"] != stage:
        raise UserError(
            f"{dir} is the state of a run of {saved['stage']}.py: "
            "give another out=, or resume=false"
        )
    for file in saved.get("files", ["state.safetensors"]):
        with damaged(dir / file), safe_open(dir / file, framework="pt"):
            pass
    reader = dcp.HuggingFaceStorageReader(dir)
    stored = reader.read_metadata().state_dict_metadata  # {name: size, properties.dtype}
    sizes = {name: value.size for name, value in with_prefix("model.", stored).items()}
    fits = sizes == {name: p.shape for name, p in trained.items()}
    if not fits or saved["optimizers"].keys() != optimizers.keys():
        raise UserError(
            f"{dir} is the state of a run that trains other parameters: "
            "give its settings, or resume=false"
        )
    params = {f"model.{name}": p for name, p in trained.items()}
    owners = dict(params)  # {what a tensor's name begins with: its parameter}
    owners |= {f"extra.average.{name}": p for name, p in trained.items()}
    for name, optimizer in optimizers.items():
        owners |= {f"{name}.{i}": p for i, p in enumerate(params_of(optimizer))}
    tensors = {}
    for name, value in stored.items():
        p = owners.get(name, owners.get(name.rpartition(".")[0]))
        dtype = value.properties.dtype
        if p is None or p.shape != value.size or p.device.type == "xla":
            tensors[name] = torch.empty(value.size, dtype=dtype)
        elif name in params:
            tensors[name] = p
        else:  # a moment or an average, on the device and sharded as its parameter is
            tensors[name] = torch.empty_like(p, dtype=dtype, requires_grad=False)
    with warnings.catch_warnings():
        # dcp warns every single process that torch.distributed is not in use
        warnings.filterwarnings("ignore", "torch.distributed is")
        dcp.load(tensors, storage_reader=reader, process_group=rt.saving_group())
    for name, p in params.items():
        if p.device.type == "xla":
            p.copy_(tensors[name])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, tensors, saved["optimizers"][name], f"{name}.")
        rt.init_moments(optimizer)
    rt.set_rng_state(with_prefix("rng.", tensors))
    return saved["meta"], with_prefix("extra.", tensors)
