"""The exact state of a training run on disk: parameters, optimizer moments, random generators,
position.

state.save_training("out/sft/state", rt, "sft", trained, {"adamw": optimizer}, step=100)
meta, _ = state.load_training("out/sft/state", rt, "sft", trained, {"adamw": optimizer})
"""

import math
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from nano.config import UserError
from nano.files import read_json, recover_dir, replace_dir, write_json
from nano.weights import damaged, write_tensors


def save_state(dir, tensors, meta):
    """{name: tensor} and JSON values -> state.safetensors and state.json in a folder that is
    replaced as a whole."""
    dir = Path(dir)
    tmp = dir.with_name(dir.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        write_tensors(tensors.items(), tmp, name="state", shard_bytes=math.inf)
        write_json(tmp / "state.json", meta)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    replace_dir(tmp, dir)


def flatten_optimizer(optimizer, prefix="optimizer."):
    """What a torch optimizer knows of its parameters -> ({name: tensor}, JSON values), which
    restore_optimizer puts back bit for bit. Names carry the number of the parameter: prefix +
    "3.exp_avg". The groups' settings are the run's own, and may change."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for i, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{i}.{key}"] = value
            else:
                scalars[f"{i}.{key}"] = value
    shapes = [list(p.shape) for group in optimizer.param_groups for p in group["params"]]
    return tensors, {"scalars": scalars, "shapes": shapes}


def restore_optimizer(optimizer, tensors, meta, prefix="optimizer."):
    """Puts back what flatten_optimizer returned, in an optimizer that was built alike. UserError
    when it was not."""
    params = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    if [list(p.shape) for _, p in params] != meta["shapes"]:
        raise UserError(
            "the saved optimizer is for other parameters: resume with the settings of the saved run"
        )
    values = dict(meta["scalars"])
    values |= {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    optimizer.state.clear()
    for key, value in values.items():
        i, key = key.split(".", 1)
        group, p = params[int(i)]
        on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
        if (
            isinstance(value, torch.Tensor) and not on_host
        ):  # not by load_state_dict, which casts to the parameter's dtype
            value = value.to(p.device)
        optimizer.state[p][key] = value


def resumes(out, resume, rt, *sources):
    """Whether a run continues from the state in its folder `out`. resume: "auto" (when there is
    one), "true" (an error without) or "false". UserError where the folder cannot be written to,
    holds one of the models that the run starts from (`sources`) where it will write its own, or has
    a state that only some ranks see."""
    for source in filter(None, sources):
        if Path(source).resolve() in [(Path(out) / name).resolve() for name in ("last", "best")]:
            raise UserError(
                f"the run would write over {source}, from which it starts: give another out="
            )
    found = rt.once(_resumable, Path(out) / "state", resume)
    if 0 < rt.all_sum(int(found)) < rt.world:
        raise UserError(
            f"{out}/state is on some nodes and not on others: put out= on a file system that all see"
        )
    return found


def _resumable(dir, resume):
    place = next(p for p in dir.absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(
            f"{place} is {'not writable' if place.is_dir() else 'a file, not a folder'}: give another out="
        )
    recover_dir(dir)
    if resume == "true" and not dir.is_dir():
        raise UserError(f"resume=true, but there is no saved state {dir}")
    return resume != "false" and dir.is_dir()


def save_training(dir, rt, stage, trained, optimizers, extra=None, **meta):
    """Everything that a resume of a stage bit for bit needs: the trained parameters {name: p}, the
    optimizers {name: optimizer}, the generators of `rt` (a Runtime), more tensors {name: tensor},
    and JSON values. Every rank calls it; one writes, or each its own part where the parameters are
    sharded over ranks (save_shards).

    The parameters are here because the model directory beside it is written at another instant, in
    another dtype."""
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    tensors |= {f"extra.{name}": t for name, t in (extra or {}).items()}
    tensors |= {f"rng.{name}": t for name, t in rt.rng_state().items()}
    settings = {}
    for name, optimizer in optimizers.items():
        flat, settings[name] = flatten_optimizer(optimizer, f"{name}.")
        tensors |= flat
    saved = {"stage": stage, "meta": meta, "optimizers": settings}
    if any(hasattr(p, "placements") for p in trained.values()):
        rt.finish_saving()
        rt.saving = save_shards(dir, tensors, saved, rt.saving_group())
    else:
        tensors = rt.gather(tensors)
        if rt.is_main:
            save_state(dir, tensors, saved)


def save_shards(dir, tensors, meta, group):
    """Each rank writes its shards of `tensors` to a safetensors file of its own, in the background,
    from a copy in CPU memory; when all have, rank 0 puts the folder in place. `dir` must be on a
    file system that all ranks see. group: gloo, for this alone. Returns a function that waits until
    the state is on the disk. torch.distributed.checkpoint's own format would need pickle to be
    read; it speaks safetensors too."""
    import torch.distributed.checkpoint as dcp  # a second that others need not wait

    dir = Path(dir)
    tmp = dir.with_name(dir.name + ".tmp")

    class Writer(dcp.HuggingFaceStorageWriter):
        def prepare_global_plan(
            self, plans
        ):  # on rank 0, when all ranks have made sure of the folder and none has written
            shutil.rmtree(tmp)  # what a killed save left
            tmp.mkdir()
            return super().prepare_global_plan(plans)

        def finish(self, metadata, results):  # on rank 0, when all ranks have written
            files = sorted(path.name for path in tmp.glob("*.safetensors"))
            write_json(tmp / "state.json", meta | {"files": files})
            replace_dir(tmp, dir)

    saving = dcp.async_save(
        tensors, storage_writer=Writer(tmp, save_distributed=True), process_group=group
    )

    def wait():
        try:
            saving.result()
        except dcp.api.CheckpointException as e:
            shutil.rmtree(tmp, ignore_errors=True)
            raise next(iter(e.failures.values()))[0] from None

    return wait


@torch.no_grad()
def load_training(dir, rt, stage, trained, optimizers):
    """Puts back what save_training saved, on any number of ranks -> (meta, extra). Each rank reads
    what it holds of the parameters and moments, whichever way they were cut. UserError when the
    run's stage or parameters are others."""
    import torch.distributed.checkpoint as dcp

    recover_dir(dir)
    saved = read_json(Path(dir) / "state.json")
    if not {"stage", "meta", "optimizers"} <= saved.keys():
        raise UserError(
            f"{dir}/state.json is damaged: restore the folder, or start anew with resume=false"
        )
    if saved["stage"] != stage:
        raise UserError(
            f"{dir} is the state of a run of {saved['stage']}.py: give another out=, or resume=false"
        )
    for file in saved.get("files", ["state.safetensors"]):
        with damaged(Path(dir) / file), safe_open(Path(dir) / file, framework="pt"):
            pass
    reader = dcp.HuggingFaceStorageReader(dir)
    found = reader.read_metadata().state_dict_metadata  # name -> size, properties.dtype
    wanted = {f"model.{name}": p for name, p in trained.items()}
    sizes = {name: value.size for name, value in found.items() if name.startswith("model.")}
    if (
        sizes != {name: p.shape for name, p in wanted.items()}
        or saved["optimizers"].keys() != optimizers.keys()
    ):
        raise UserError(
            f"{dir} is the state of a run that trains other parameters: give its settings, or resume=false"
        )
    owners = dict(
        wanted
    )  # of the moments, by the numbers that flatten_optimizer gives the parameters
    for name, optimizer in optimizers.items():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        owners |= {f"{name}.{i}": p for i, p in enumerate(params)}
    tensors = {}
    for name, value in found.items():
        p, dtype = owners.get(name, owners.get(name.rpartition(".")[0])), value.properties.dtype
        if p is None or p.shape != value.size or p.device.type == "xla":
            tensors[name] = torch.empty(value.size, dtype=dtype)
        else:  # where it belongs, and cut as its parameter is
            tensors[name] = (
                p if name in wanted else torch.empty_like(p, dtype=dtype, requires_grad=False)
            )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is"
        )  # ... not in use: it says so to every single process
        dcp.load(tensors, storage_reader=reader, process_group=rt.saving_group())
    for name, p in wanted.items():
        if p.device.type == "xla":
            p.copy_(tensors[name])
    for name, optimizer in optimizers.items():
        restore_optimizer(optimizer, tensors, saved["optimizers"][name], f"{name}.")
        rt.init_moments(optimizer)
    rt.set_rng_state(
        {name.removeprefix("rng."): t for name, t in tensors.items() if name.startswith("rng.")}
    )
    return saved["meta"], {
        k.removeprefix("extra."): t for k, t in tensors.items() if k.startswith("extra.")
    }
