"""Model families: config.json of a Hugging Face directory <-> model.ModelConfig."""

import dataclasses
from pathlib import Path

from model import ModelConfig
from nano.config import UserError
from nano.files import read_json

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
HEADS = {"lm": "ForCausalLM", "score": "ForSequenceClassification"}
ARCHITECTURES = {
    name + suffix: (family, head)
    for family, name in FAMILIES.items()
    for head, suffix in HEADS.items()
}


def load_config(dir):
    """config.json of a model directory -> ModelConfig. UserError names what this model.py does not do."""
    dir = Path(dir)
    if not dir.is_dir():
        raise UserError(f"there is no model directory {dir}")
    if not (dir / "config.json").exists():
        if (dir / "adapter_config.json").exists():
            raise UserError(
                f"{dir} is a LoRA adapter, not a model: give the base model, or merge the adapter into it"
            )
        if models := [str(dir / name) for name in ("last", "best") if (dir / name).is_dir()]:
            raise UserError(
                f"{dir} is the folder of a run: give a model in it, {' or '.join(models)}"
            )
        raise UserError(
            f"{dir} has no config.json, so it is no model directory; `python -m prepare.weights` makes one"
        )
    return parse_config(read_json(dir / "config.json"), dir / "config.json")


def parse_config(c, where):
    """The dict of a config.json, as transformers 4 or 5 writes it -> ModelConfig."""

    def refuse(what):
        raise UserError(f"{where}: {what}")

    def size(key, default=None):
        value = default if c.get(key) is None else c[key]
        if type(value) is not int or value < 1:
            refuse(f"{key} is {value!r}, not a positive whole number")
        return value

    eps = c.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float):
        refuse(f"rms_norm_eps is {eps!r}, not a number")
    architecture = (
        c.get("architectures") or [FAMILIES.get(c.get("model_type"), "none") + "ForCausalLM"]
    )[0]
    if architecture not in ARCHITECTURES:
        refuse(
            f"architecture {architecture} is not supported; these are: {', '.join(ARCHITECTURES)}"
        )
    family, head = ARCHITECTURES[architecture]
    if c.get("model_type", family) != family:
        refuse(f"model_type {c['model_type']!r} does not belong to architecture {architecture}")
    if c.get("quantization_config"):
        refuse("quantized weights are not supported: give the original checkpoint")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse(f"hidden_act {c['hidden_act']!r} is not supported (silu is)")
    labels = (
        len(c.get("id2label") or "") or c.get("num_labels") or 2
    )  # transformers leaves two labels out
    if head == "score" and labels != 1:
        refuse(f"a classifier of {labels} labels is not supported (num_labels=1, a score, is)")

    layers, heads = size("num_hidden_layers"), size("num_attention_heads")
    kv_default = {"llama": heads, "mistral": 8}.get(
        family, 32
    )  # absent: the family's; null: as many as heads
    kv_heads = size("num_key_value_heads", heads if "num_key_value_heads" in c else kv_default)
    head_dim = size(
        "head_dim",
        128 if family == "qwen3" and "head_dim" not in c else size("hidden_size") // heads,
    )
    if heads % kv_heads or head_dim % 2:
        refuse(f"{heads} heads of {head_dim} numbers do not go with {kv_heads} key/value heads")

    theta, scaling = parse_rope(c, refuse)
    windows = ()
    if family == "mistral":
        windows = (c.get("sliding_window", 4096) or 0,) * layers
    elif family in ("qwen2", "qwen3") and c.get("use_sliding_window"):
        window, first = c.get("sliding_window", 4096) or 0, c.get("max_window_layers", 28)
        kinds = c.get("layer_types") or [
            "sliding_attention" if i >= first else "full_attention" for i in range(layers)
        ]
        if len(kinds) != layers or not {"sliding_attention", "full_attention"}.issuperset(kinds):
            refuse(
                f"layer_types {kinds} is not supported (sliding_attention or full_attention for each layer is)"
            )
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    bias = bool(c.get("attention_bias")) and family in ("llama", "qwen3")
    return ModelConfig(
        vocab_size=size("vocab_size"),
        dim=size("hidden_size"),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=size("intermediate_size"),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=size(
            "max_position_embeddings", {"llama": 2048, "mistral": 131072}.get(family, 32768)
        ),
        windows=windows if any(windows) else (),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(c.get("mlp_bias")) and family == "llama",
        qk_norm=family == "qwen3",
        tie_embeddings=bool(c.get("tie_word_embeddings")),
        head=head,
        family=family,
    )


def parse_rope(c, refuse):
    """(theta, scaling): from rope_theta and rope_scaling (transformers 4) or the one dict rope_parameters (5)."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        refuse(f"rope scaling {rope!r} is not supported")
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    if type(theta) not in (int, float):
        refuse(f"rope_theta is {theta!r}, not a number")
    if any(isinstance(value, dict) for value in rope.values()):
        refuse("rope_parameters that differ by layer are not supported")
    if (rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse("partial_rotary_factor is not supported")
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in keys:
        refuse(f"rope scaling {kind!r} is not supported ({', '.join(keys)} are)")
    if not all(isinstance(rope.get(key), (int, float)) for key in keys[kind]):
        refuse(f"rope scaling {kind!r} needs the numbers {', '.join(keys[kind])}")
    return theta, None if kind == "default" else {
        "rope_type": kind,
        **{key: rope[key] for key in keys[kind]},
    }


def config_json(cfg, like=None, **extra):
    """The dict of a config.json, in the spelling that transformers 4 and 5 both read.

    like: a model directory; what its config.json says beyond the architecture is kept (from another family: token ids).
    extra: keys to set, such as eos_token_id. UserError when no architecture of transformers is what `cfg` describes."""
    out = {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }  # null: transformers would assume 1 and 2
    if like and (Path(like) / "config.json").exists():
        old = read_json(Path(like) / "config.json")
        out |= (
            old
            if old.get("model_type") == cfg.family
            else {key: old[key] for key in out if key in old}
        )
        for key in (
            "rope_parameters",
            "layer_types",
            "dtype",
            "id2label",
            "label2id",
            "num_labels",
            "problem_type",
        ):
            out.pop(key, None)
    out |= {
        "architectures": [FAMILIES.get(cfg.family, cfg.family) + HEADS[cfg.head]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": cfg.rope_scaling,
        "tie_word_embeddings": cfg.tie_embeddings,
    }
    windows = cfg.windows if any(cfg.windows) else (0,) * cfg.n_layers
    if cfg.family in ("llama", "qwen3"):
        out["attention_bias"] = cfg.qkv_bias and cfg.o_bias
    if cfg.family == "llama":
        out["mlp_bias"] = cfg.mlp_bias
    elif cfg.family == "mistral":
        out["sliding_window"] = windows[0] or None
    elif any(windows):
        first = next(i for i, window in enumerate(windows) if window)
        out |= {
            "use_sliding_window": True,
            "sliding_window": windows[first],
            "max_window_layers": first,
        }
        if not all(windows[first:]):
            out["layer_types"] = [
                "sliding_attention" if window else "full_attention" for window in windows
            ]
    else:
        out["use_sliding_window"] = False
    if cfg.head == "score":
        out |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    out |= extra

    said = dataclasses.asdict(parse_config(out, "config.json"))  # what a reader will understand
    meant = dataclasses.asdict(cfg) | {"windows": tuple(windows) if any(windows) else ()}
    lost = [key for key in meant if meant[key] != said[key]]
    if lost:
        pairs = ", ".join(f"{key}={meant[key]!r}" for key in lost)
        raise UserError(
            f"a model of family {cfg.family} cannot be saved with {pairs}: transformers has no such model"
        )
    return out
