"""Model families: config.json <-> ModelConfig, and tensors in files <-> parameters.

A family is an entry of FAMILIES. Its tables hold what tables can say, and two functions do the
rest. A family whose files name, fuse and lay out tensors as this model does needs no `tensors`."""

import difflib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import torch

from model import ModelConfig
from nano.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, UserError
from nano.files import check_json, no_model_directory, read_json, recover_dir
from nano.vocab import TokenIds

# --- tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one tensor of a file holds one or several parameters."""

    split: Callable  # (tensor of the file, shapes of the parameters, ModelConfig) -> the parameters
    fuse: Callable  # (the parameters, ModelConfig) -> tensor of the file


# Rows one after another. A memory-mapped tensor stays memory-mapped.
ROWS = Layout(
    split=lambda tensor, shapes, cfg: tensor.split([shape[0] for shape in shapes]),
    fuse=lambda parts, cfg: parts[0] if len(parts) == 1 else torch.cat(parts),
)
# GPT-2's Conv1D: the transpose of a linear layer's weight. A bias, of one dimension, has none.
CONV1D = Layout(
    split=lambda tensor, shapes, cfg: ROWS.split(tensor.t().contiguous(), shapes, cfg),
    fuse=lambda parts, cfg: ROWS.fuse(parts, cfg).t(),
)


def places(cfg, names, bare=False):
    """Where a file of the family keeps the parameters `names`.

    bare: the file leaves out the family's prefix. Returns {name in the file: ([names here],
    Layout)}."""
    family = FAMILIES[cfg.family]
    out = {}
    for name in names:
        stored = renamed(name, family.tensors) or name
        layout = family.layouts.get(NUMBER.sub(".{}", stored.rpartition(".")[0]), ROWS)
        if bare:
            stored = stored.removeprefix(family.prefix)
        out.setdefault(stored, ([], layout))[0].append(name)
    return out


NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def renamed(name, table):
    """The new name of a tensor by a table of modules, {old: new}, in which {} stands for a number.

    None if the table does not have its module."""
    module, _, leaf = name.rpartition(".")
    new = table.get(NUMBER.sub(".{}", module))
    return new and f"{new.format(*NUMBER.findall(module))}.{leaf}"


# what GGUF files and Meta's releases call the modules
GGUF = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
META = {
    "tok_embeddings": "model.embed_tokens",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "output": "lm_head",
}

# --- the families -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    architectures: dict  # head -> class of transformers
    keys: dict  # field of ModelConfig -> key of config.json
    defaults: dict  # key of config.json -> what a file that leaves it out means
    read: Callable  # (config.json over the defaults, fields read by `keys`) -> {field: value}
    write: Callable  # ModelConfig -> {key: value}
    always: dict = field(default_factory=dict)  # fields that all models of the family share
    tensors: dict = field(default_factory=dict)  # module here -> module in the file
    layouts: dict = field(default_factory=dict)  # module in the file -> Layout other than ROWS
    prefix: str = ""  # of modules in the file; a file of the bare trunk leaves it out
    ignored: str = r"\.rotary_emb\.inv_freq$"  # regex of constants that old files hold


def read_llama(c, fields):
    if c["hidden_act"] not in ("silu", "swish"):
        raise UserError(f"hidden_act {c['hidden_act']!r} is not supported (silu is)")
    return read_rope(c)


def write_llama(cfg):
    return {"hidden_act": "silu", "rope_theta": cfg.rope_theta, "rope_scaling": cfg.rope_scaling}


def read_mistral(c, fields):
    return read_llama(c, fields) | {"windows": (c["sliding_window"] or 0,) * fields["n_layers"]}


def write_mistral(cfg):
    return write_llama(cfg) | {"sliding_window": max(cfg.windows, default=0) or None}


def read_qwen(c, fields):
    out = read_llama(c, fields)
    if not c.get("use_sliding_window"):
        return out
    layers, full = fields["n_layers"], c["max_window_layers"]
    kinds = c.get("layer_types") or [FULL if i < full else SLIDING for i in range(layers)]
    if len(kinds) != layers or not {FULL, SLIDING}.issuperset(kinds):
        raise UserError(
            f"layer_types {kinds} is not supported ({SLIDING} or {FULL} for each layer is)"
        )
    window = c["sliding_window"] or 0
    return out | {"windows": tuple(window if kind == SLIDING else 0 for kind in kinds)}


def write_qwen(cfg):
    window = max(cfg.windows, default=0)
    out = write_llama(cfg) | {"use_sliding_window": window > 0}
    if window:
        first = cfg.windows.index(window)
        out |= {"sliding_window": window, "max_window_layers": first}
        if 0 in cfg.windows[first:]:
            out["layer_types"] = [SLIDING if window else FULL for window in cfg.windows]
    return out


def read_gpt2(c, fields):
    name = c["activation_function"]
    if name not in GPT2_ACTIVATIONS:
        known = ", ".join(GPT2_ACTIVATIONS)
        raise UserError(f"activation_function {name!r} is not supported ({known} are)")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if c.get(key):
            raise UserError(f"{key} is not supported")
    if c.get("scale_attn_weights") is False:
        raise UserError("scale_attn_weights=false is not supported")
    return dict(
        n_kv_heads=fields["n_heads"],
        head_dim=fields["dim"] // fields["n_heads"],
        ffn_dim=checked(c.get("n_inner") or 4 * fields["dim"], "n_inner", int),
        activation=GPT2_ACTIVATIONS[name],
    )


def write_gpt2(cfg):
    names = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
    return {"n_inner": cfg.ffn_dim, "activation_function": names.get(cfg.activation)}


# activation_function -> activation
GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {  # kinds of rope scaling, and the numbers that they need
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(c):
    """The fields rope_theta and rope_scaling.

    transformers 4 writes them as two keys of these names, and transformers 5 as one dict
    rope_parameters."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    checked(theta, "rope_theta", float)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters that differ by layer are not supported")
    if (rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError("partial_rotary_factor is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE:
        raise UserError(f"rope scaling {kind!r} is not supported ({', '.join(ROPE)} are)")
    if not all(isinstance(rope.get(key), (int, float)) for key in ROPE[kind]):
        raise UserError(f"rope scaling {kind!r} needs the numbers {', '.join(ROPE[kind])}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError("high_freq_factor of rope scaling 'llama3' must be above low_freq_factor")
    scaling = {"rope_type": kind} | {key: rope[key] for key in ROPE[kind]}
    return dict(rope_theta=theta, rope_scaling=None if kind == "default" else scaling)


KEYS = {  # of Llama and those that follow it
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
QWEN = DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES = {  # by model_type
    "llama": Family(
        {"lm": "LlamaForCausalLM", "score": "LlamaForSequenceClassification"},
        keys=KEYS | BIASES | {"mlp_bias": "mlp_bias"},
        defaults=DEFAULTS | {"max_position_embeddings": 2048},
        read=read_llama,
        write=write_llama,
    ),
    "mistral": Family(
        {"lm": "MistralForCausalLM", "score": "MistralForSequenceClassification"},
        keys=KEYS,
        defaults=DEFAULTS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        read=read_mistral,
        write=write_mistral,
    ),
    "qwen2": Family(
        {"lm": "Qwen2ForCausalLM", "score": "Qwen2ForSequenceClassification"},
        keys=KEYS,
        defaults=QWEN,
        read=read_qwen,
        write=write_qwen,
        always={"qkv_bias": True},
    ),
    "qwen3": Family(
        {"lm": "Qwen3ForCausalLM", "score": "Qwen3ForSequenceClassification"},
        keys=KEYS | BIASES,
        defaults=QWEN | {"head_dim": 128},
        read=read_qwen,
        write=write_qwen,
        always={"qk_norm": "head"},
    ),
    "gpt2": Family(
        {"lm": "GPT2LMHeadModel", "score": "GPT2ForSequenceClassification"},
        keys={
            "vocab_size": "vocab_size",
            "dim": "n_embd",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "activation_function": "gelu_new",
        },
        read=read_gpt2,
        write=write_gpt2,
        always={
            "norm": "layer",
            "positions": "learned",
            "mlp": "plain",
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
        tensors={
            "model.embed_tokens": "transformer.wte",
            "model.embed_positions": "transformer.wpe",
            "model.layers.{}.input_layernorm": "transformer.h.{}.ln_1",
            "model.layers.{}.self_attn.q_proj": "transformer.h.{}.attn.c_attn",
            "model.layers.{}.self_attn.k_proj": "transformer.h.{}.attn.c_attn",
            "model.layers.{}.self_attn.v_proj": "transformer.h.{}.attn.c_attn",
            "model.layers.{}.self_attn.o_proj": "transformer.h.{}.attn.c_proj",
            "model.layers.{}.post_attention_layernorm": "transformer.h.{}.ln_2",
            "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.c_fc",
            "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.c_proj",
            "model.norm": "transformer.ln_f",
        },
        layouts={
            "transformer.h.{}.attn.c_attn": CONV1D,
            "transformer.h.{}.attn.c_proj": CONV1D,
            "transformer.h.{}.mlp.c_fc": CONV1D,
            "transformer.h.{}.mlp.c_proj": CONV1D,
        },
        prefix="transformer.",
        ignored=r"\.attn\.(masked_)?bias$",
    ),
}

# --- config.json --------------------------------------------------------------------------------


class Rope(TypedDict, total=False):
    rope_type: str | None
    type: str | None
    rope_theta: PositiveFloat | None
    partial_rotary_factor: float | None
    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveFloat


class ConfigJson(TokenIds, total=False):
    """The fields that are read, of all families, beside the sizes in `keys` of a Family."""

    architectures: list[str] | None
    model_type: str | None
    id2label: dict | None
    num_labels: NonNegativeInt | None
    hidden_act: str
    activation_function: str
    rms_norm_eps: NonNegativeFloat | None
    layer_norm_epsilon: NonNegativeFloat | None
    rope_theta: PositiveFloat | None
    rope_scaling: Rope | None
    rope_parameters: Rope | dict[str, Rope | None] | None
    partial_rotary_factor: float | None
    sliding_window: NonNegativeInt | None
    use_sliding_window: bool | None
    max_window_layers: NonNegativeInt
    layer_types: list[str] | None


def load_config(dir):
    """config.json of a model directory -> ModelConfig. UserError names what is not supported."""
    dir = Path(dir)
    recover_dir(dir)
    if not dir.is_dir():
        raise no_model_directory(dir)
    if not (dir / "config.json").exists():
        if (dir / "adapter_config.json").exists():
            raise UserError(
                f"{dir} is a LoRA adapter, not a model: "
                "give the base model, or merge the adapter into it"
            )
        if models := [str(dir / name) for name in ("last", "best") if (dir / name).is_dir()]:
            raise UserError(
                f"{dir} is the folder of a run: give a model in it, {' or '.join(models)}"
            )
        kinds = ("*.gguf", "consolidated.*.pth")
        hint = ""
        if others := [path for kind in kinds for path in sorted(dir.glob(kind))]:
            source, name = others[0], others[0].name
            source = source if source.suffix == ".gguf" else dir
            hint = f"; `python -m prepare.weights source={source} out=NEW` converts {name}"
        raise UserError(f"{dir} has no config.json, so it is no model directory{hint}")
    return parse_config(read_json(dir / "config.json"), dir / "config.json")


def parse_config(c, where):
    """The dict of a config.json, as transformers 4 or 5 writes it -> ModelConfig.

    UserError, which names the file `where`, for what is not supported."""
    check_json(c, ConfigJson, where)
    try:
        return read_config(c)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def read_config(c):
    kind, head = recognise(c)
    family = FAMILIES[kind]
    if c.get("quantization_config"):
        raise UserError("quantized weights are not supported: give the original checkpoint")
    # transformers leaves two labels out
    labels = len(c.get("id2label") or "") or c.get("num_labels") or 2
    if head == "score" and labels != 1:
        raise UserError(
            f"a classifier of {labels} labels is not supported (num_labels=1, a score, is)"
        )
    c = family.defaults | c
    fields = {}
    for name, key in family.keys.items():
        value = c.get(key)
        # null, or absent where the family has no default of its own
        if value is None and name == "n_kv_heads":
            value = fields["n_heads"]
        elif value is None and name == "head_dim":
            value = fields["dim"] // fields["n_heads"]
        fields[name] = checked(value, key, ModelConfig.__annotations__[name])
    fields |= family.always | family.read(c, fields)
    if not any(fields.get("windows", ())):
        fields["windows"] = ()
    cfg = ModelConfig(**fields, head=head, family=kind)
    if cfg.n_heads % cfg.n_kv_heads or cfg.head_dim % 2:
        raise UserError(
            f"{cfg.n_heads} heads of {cfg.head_dim} numbers "
            f"do not go with {cfg.n_kv_heads} key/value heads"
        )
    return cfg


def checked(value, key, kind):
    """The value of a key of config.json; UserError where a field of ModelConfig cannot hold it."""
    if kind is bool:
        return bool(value)
    if kind is int and (type(value) is not int or not 1 <= value < 2**31):
        raise UserError(f"{key} is {value!r}, not a positive whole number")
    if kind is float and type(value) not in (int, float):
        raise UserError(f"{key} is {value!r}, not a number")
    return value


def recognise(c):
    """(model_type, head) of a config.json."""
    kind = c.get("model_type")
    if not c.get("architectures"):
        if kind not in FAMILIES:
            raise unknown("model_type", kind, FAMILIES)
        return kind, "lm"
    architecture = c["architectures"][0]
    known = {
        name: (family, head)
        for family, entry in FAMILIES.items()
        for head, name in entry.architectures.items()
    }
    if architecture not in known:
        raise unknown("architecture", architecture, known)
    family, head = known[architecture]
    if kind not in (None, family):
        raise UserError(f"model_type {kind!r} does not belong to architecture {architecture}")
    return family, head


def unknown(what, name, known):
    near = difflib.get_close_matches(str(name), known, cutoff=0.0)
    return UserError(f"{what} {name} is not supported; the nearest that are: {', '.join(near)}")


def config_json(cfg, like=None, **extra):
    """The dict of a config.json, in the spelling that transformers 4 and 5 both read.

    like: a model directory. What its config.json says beyond the architecture is kept, and from
    another family the token ids alone.
    extra: keys to set, such as eos_token_id.
    UserError when transformers has no architecture that is what `cfg` describes."""
    if cfg.family not in FAMILIES:
        raise unknown("model family", cfg.family, FAMILIES)
    family = FAMILIES[cfg.family]
    # null, because transformers would assume 1 and 2
    out = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    old = read_json(Path(like) / "config.json", missing={}) if like else {}
    same = old.get("model_type") == cfg.family
    out |= {k: v for k, v in old.items() if k in out or same and k not in REWRITTEN}
    out |= {"architectures": [family.architectures[cfg.head]], "model_type": cfg.family}
    out |= {key: getattr(cfg, name) for name, key in family.keys.items()}
    out |= family.write(cfg)
    if cfg.head == "score":
        out |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    out |= extra

    meant = asdict(cfg)
    if not any(cfg.windows):
        meant["windows"] = ()
    said = asdict(parse_config(out, "config.json"))  # what a reader will understand
    if lost := [f"{key}={meant[key]!r}" for key in meant if meant[key] != said[key]]:
        raise UserError(
            f"a model of family {cfg.family} cannot be saved with {', '.join(lost)}: "
            "transformers has no such model"
        )
    return out


# keys that are written anew, or under another name
REWRITTEN = (
    "rope_parameters",
    "layer_types",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "auto_map",  # names .py files, which do not go along
)
