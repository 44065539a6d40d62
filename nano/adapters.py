"""adapter_config.json of a PEFT directory: what it may ask for, its base, and the layers it names.

nano/weights.py reads and writes the tensors. This file needs no torch."""

import math
import re
from pathlib import Path
from typing import Annotated, Required, TypedDict

from nano.config import NonNegativeInt, PositiveInt, UserError
from nano.files import check_json, read_json

# What these settings say is read here, or has no effect on a trained adapter.
KNOWN = """
    peft_type task_type base_model_name_or_path r lora_alpha lora_dropout rank_pattern alpha_pattern
    use_rslora use_dora bias modules_to_save trainable_token_indices target_modules exclude_modules
    target_parameters layers_to_transform layers_pattern init_lora_weights fan_in_fan_out
    ensure_weight_tying inference_mode revision peft_version auto_mapping runtime_config
    megatron_core merge_weights loftq_config eva_config corda_config lora_ga_config
    qalora_group_size
""".split()
# The ways to initialise an adapter that leave the base as it was. The others, such as pissa, take
# the first adapter off the base, so the file alone is only a part of the change.
HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


Bias = Annotated[str, ("none, all or lora_only", lambda x: x in ("none", "all", "lora_only"))]


class AdapterConfig(TypedDict, total=False):
    """The fields that are read."""

    base_model_name_or_path: str | None
    task_type: str | None
    r: Required[PositiveInt]
    lora_alpha: Required[float]
    rank_pattern: dict[str, PositiveInt] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None
    use_dora: bool | None
    bias: Bias | None
    modules_to_save: list[str] | None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    target_parameters: list[str] | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    ensure_weight_tying: bool | None


def is_adapter(dir):
    return (Path(dir) / "adapter_config.json").exists()


def is_scorer(dir):
    """Whether an adapter directory is that of a score model."""
    return read_adapter_config(dir).get("task_type") == "SEQ_CLS"


def read_adapter_config(dir):
    """adapter_config.json of a PEFT directory as a dict.

    UserError when it asks for something that is not supported here."""
    path = Path(dir) / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{dir} is no adapter directory: it has no adapter_config.json")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported (only 'LORA' is)"
        )
    for key, value in config.items():
        if key not in KNOWN and value not in (None, False, "", [], {}):
            raise UserError(f"{path}: {key}={value!r} is not supported, or not known here")
    how = config.get("init_lora_weights")
    if how not in HARMLESS_INIT:
        raise UserError(
            f"{path}: init_lora_weights={how!r} is not supported: it has changed the base model "
            "too, and that change is not in this directory. Save the adapter anew with peft's "
            "path_initial_model_for_weight_conversion="
        )
    check_json(config, AdapterConfig, path)
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(config.get(key), str):
            check_regex(path, key, config[key])
    for key in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        if not isinstance(config.get(key), str):
            for pattern in config.get(key) or ():
                check_regex(path, key, pattern)
    return config


def check_regex(path, key, pattern):
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(f"{path}: {key} has {pattern!r:.60}, which is no regex: {e}") from None


def find_base(dir, base=None):
    """The model directory that an adapter directory names, or None if it is not here.

    base: takes the place of the one that it names."""
    named = str(base or read_adapter_config(dir).get("base_model_name_or_path") or "")
    for place in (Path(named), Path(dir) / named):
        if named and (place / "config.json").exists():
            return place
    return None


def base_of(dir, base=None):
    """The model directory, which holds config.json, of a model or adapter directory.

    base: takes the place of the one that the adapter names. UserError for a base that is not there,
    and for a base= of a whole model."""
    if not is_adapter(dir):
        if base:
            raise UserError(f"{dir} is a whole model, not an adapter: leave out base={base}")
        return Path(dir)
    if place := find_base(dir, base):
        return place
    named = str(base or read_adapter_config(dir).get("base_model_name_or_path") or "")
    raise UserError(
        f"{dir}: its base {named!r} is no model directory here: "
        "name it with base=, or as base_model_name_or_path in adapter_config.json"
    )


def shape(config, layer):
    """(rank, scale) of the adapter of a layer.

    As in peft, the first pattern counts that matches the end of the layer's name."""

    def value(key, patterns):
        for pattern, number in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return number
        return config[key]

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def ends_with(name, endings):
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def saves(config, layer):
    """Whether modules_to_save names the layer, or a module around it."""
    parts = layer.split(".")
    names = config.get("modules_to_save") or []
    return any(ends_with(".".join(parts[: i + 1]), names) for i in range(len(parts)))


STACKS = ("gate_up_proj", "down_proj")  # of experts, in the order in which peft wraps them


def nested(stack, stacks):
    """Where a file keeps the adapter of a stack of experts, if `stacks` are adapted.

    peft wraps the module of the experts once for each of its stacks, so "base_layer" and not a name
    tells them apart: experts.base_layer.lora_A is that of the stack which is wrapped first."""
    experts, _, leaf = stack.rpartition(".")
    adapted = [s for s in STACKS if f"{experts}.{s}" in stacks]
    return experts + ".base_layer" * (len(adapted) - 1 - adapted.index(leaf))


def unnested(name, targets):
    """The name of a tensor in a file with that of its stack of experts in it. Other names stay.

    targets: target_parameters of adapter_config.json."""
    match = re.fullmatch(r"(.+\.experts)((?:\.base_layer)*)(\.lora_[AB]\..+)", name)
    if not match:
        return name
    experts, layers, leaf = match.groups()
    adapted = [s for s in STACKS if ends_with(f"{experts}.{s}", targets)]
    outside = layers.count(".")
    return f"{experts}.{adapted[-1 - outside]}{leaf}" if outside < len(adapted) else name


def targeted(config, layers, stacks=()):
    """Which of `layers`, names in the file, target_modules and the settings beside it select, and
    which stacks of experts target_parameters does.

    None where it does not say. The rules are peft's."""
    parameters = {
        stack for stack in stacks if ends_with(stack, config.get("target_parameters") or [])
    }
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if targets is None or targets == "all-linear":
        return None
    only, pattern = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    only = [only] if isinstance(only, int) else only
    patterns = [pattern] if isinstance(pattern, str) else pattern

    def matches(layer, names):
        if isinstance(names, str):
            return re.fullmatch(names, layer)
        return ends_with(layer, names)

    def selected(layer):
        if matches(layer, excluded) or saves(config, layer) or not matches(layer, targets):
            return False
        if not only or layer in targets:
            return True
        found = (re.match(rf".*\.{pattern}\.(\d+)\.", layer) for pattern in patterns)
        return any(match and int(match[1]) in only for match in found)

    return {layer for layer in layers if selected(layer)} | parameters
