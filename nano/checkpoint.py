"""Model directories and training state on disk.

A model directory is a Hugging Face directory: config.json, safetensors (one file, or shards with an index) and the
tokenizer's files. What transformers writes opens here, and the reverse. Nothing is pickled, and no file is ever
half-written: each is written under a temporary name, flushed to the disk and renamed, in an order that leaves the old
or the new whole whenever the power goes.

    model = load_model("models/smollm2", dtype=torch.bfloat16)
    save_model(model, "out/sft/last", like="models/smollm2")       # tokenizer files come from `like`
    save_training("out/sft/state", rt, trained, {"adamw": optimizer}, step=100)
    meta, _ = load_training("out/sft/state", rt, trained, {"adamw": optimizer})
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import ModelConfig, ScoreHead, Transformer
from nano import tokenizer
from nano.config import UserError

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}  # model_type: name in the class
HEADS = {"lm": "ForCausalLM", "score": "ForSequenceClassification"}
ARCHITECTURES = {
    name + suffix: (family, head)
    for family, name in FAMILIES.items()
    for head, suffix in HEADS.items()
}
STRETCH = 1 << 24  # bytes of a tensor that are converted at a time


# --- config.json ----------------------------------------------------------------------------------------------


def read_json(path):
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


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


# --- tensors --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def damaged(path):
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or incomplete ({e}): fetch or save it again") from None


class Tensors(Mapping):
    """name -> tensor, memory-mapped: a tensor takes memory only where it is read. files: name -> safetensors file."""

    def __init__(self, files):
        self.files, self.opened = files, {}
        for path in sorted(set(files.values())):
            with damaged(path):
                self.opened[path] = safe_open(path, framework="pt")

    def __getitem__(self, name):
        with damaged(self.files[name]):
            return self.opened[self.files[name]].get_tensor(name)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)

    def stretches(self, name):
        """Yields (row, rows from there on) in pieces of STRETCH bytes, each through a mapping of its own: the memory
        that the file's pages take is only given back when they are unmapped."""
        shape, width = self[name].shape, self[name][:1].nbytes
        step = max(1, STRETCH // max(1, width))
        for i in range(0, shape[0], step):
            with damaged(self.files[name]), safe_open(self.files[name], framework="pt") as f:
                yield i, f.get_slice(name)[i : i + step]

    def copy(self, name, dtype):
        """The tensor in memory of its own, as `dtype`."""
        out = torch.empty(self[name].shape, dtype=dtype)
        for i, rows in self.stretches(name):
            out[i : i + len(rows)] = rows
            del rows  # it holds the mapping
        return out


def read_tensors(path, name="model"):
    """A safetensors file, or a directory with {name}.safetensors or with {name}.safetensors.index.json -> Tensors."""
    path = Path(path)
    single, index = path / f"{name}.safetensors", path / f"{name}.safetensors.index.json"
    if not path.is_dir():
        single = path
    elif not single.exists():
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index} has no weight_map")
            if not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
            ):
                raise UserError(
                    f"{index}: its weight_map names something else than files beside it"
                )
            return Tensors({key: path / shard for key, shard in shards.items()})
        pickled = next(path.glob("*.bin"), None) or next(path.glob("*.pth"), None)
        convert = (
            f"; `python -m prepare.weights source={path} out=NEW` converts {pickled.name}"
            if pickled
            else ""
        )
        raise UserError(f"{path} has no {single.name} and no {index.name}{convert}")
    with damaged(single), safe_open(single, framework="pt") as f:
        return Tensors(dict.fromkeys(f.keys(), single))


def write_tensors(tensors, dir, name="model", shard_bytes=5e9):
    """(key, tensor) pairs -> {name}.safetensors in `dir`, or shards with an index if they are over `shard_bytes` bytes.

    The pairs are consumed one by one, and one shard of them is in memory at a time. An older save stays whole until the
    new one is complete: new shards never take the names of those that the old index lists."""
    dir = Path(dir)
    tmp, single, index = (
        dir / f"{name}.safetensors{suffix}" for suffix in (".tmp", "", ".index.json")
    )
    written, shard, size, total = [], {}, 0, 0  # written: (temporary file, its keys)

    def flush():
        path = tmp / str(len(written))
        path.touch()
        mode = path.stat().st_mode
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)  # save_file leaves a file that the owner alone can read
        sync(path)
        written.append((path, list(shard)))
        shard.clear()

    shutil.rmtree(tmp, ignore_errors=True)  # what a killed save left
    try:
        tmp.mkdir(parents=True)
        for key, tensor in tensors:
            if shard and size + tensor.nbytes > shard_bytes:
                flush()
                size = 0
            shard[key] = tensor.detach().cpu().contiguous()
            size += tensor.nbytes
            total += tensor.nbytes
        flush()
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    finals = []
    if len(written) == 1:  # where both stand, readers take the single file
        os.replace(written[0][0], single)
        sync(dir)
        index.unlink(missing_ok=True)
    else:
        listed = read_json(index).get("weight_map", {}).values() if index.exists() else ()
        stem = f"{name}-b" if any(file.startswith(f"{name}-0") for file in listed) else name
        finals = [
            f"{stem}-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))
        ]
        for (path, _), final in zip(written, finals, strict=True):
            os.replace(path, dir / final)
        sync(dir)
        weight_map = {
            key: final for (_, keys), final in zip(written, finals, strict=True) for key in keys
        }
        write_text(
            tmp / "index",
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n",
        )
        os.replace(tmp / "index", index)
        sync(dir)
        single.unlink(missing_ok=True)
    for path in dir.glob(f"{name}-*-of-*.safetensors"):
        if path.name not in finals:
            path.unlink()
    tmp.rmdir()


# --- files that are whole or absent ---------------------------------------------------------------------------


def sync(path):
    """Makes sure that a file's content, or a directory's list of names, has reached the disk."""
    if os.name == "posix" or Path(path).is_file():
        fd = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(path, data):
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_bytes(data)
        sync(tmp)
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path, text):
    write_bytes(path, text.encode())


def recover_dir(dir):
    """Finishes what a kill in the middle of replace_dir left. Several ranks may do so at once."""
    dir = Path(dir)
    old = dir.with_name(dir.name + ".old")
    if dir.exists():
        shutil.rmtree(old, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, dir)


def replace_dir(tmp, dir):
    """Puts the finished folder `tmp` in the place of `dir` by two renames; recover_dir repairs a kill between them."""
    dir = Path(dir)
    recover_dir(dir)
    old = dir.with_name(dir.name + ".old")
    if dir.exists():
        os.replace(dir, old)
    os.replace(tmp, dir)
    sync(dir.parent)
    shutil.rmtree(old, ignore_errors=True)


# --- models ---------------------------------------------------------------------------------------------------


class NoInit(torch.overrides.TorchFunctionMode):
    """torch.nn.init does nothing. On the meta device it would compute nothing either, but import seconds of compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (args or tuple(kwargs.values()))[0]
        return func(*args, **(kwargs or {}))


def load_model(dir, device="cpu", dtype=None, head=None):
    """A model directory -> Transformer, on `device`, in `dtype` (None: the one its embedding is stored in).

    On the CPU and in the stored dtype the parameters are the file itself, memory-mapped; otherwise they are converted
    in stretches, so no more than the weights is ever in memory. head="score" on a language model drops its output
    matrix and starts a fresh score head (from torch's generator); a score head is always fp32. UserError names tensors
    that are missing, unexpected or of another shape."""
    cfg = load_config(dir)
    fresh = head == "score" and cfg.head == "lm"
    if head == "lm" and cfg.head == "score":
        raise UserError(f"{dir} is a score model: it has no language-model head")
    cfg = dataclasses.replace(cfg, head=head or cfg.head)
    with torch.device("meta"), NoInit():
        model = Transformer(cfg)
    tensors = read_tensors(dir)
    names = {
        name for name in tensors if not name.endswith("rotary_emb.inv_freq")
    }  # a constant that old files hold
    wanted = {name: p.shape for name, p in model.named_parameters()}
    if fresh:
        names.discard("lm_head.weight")
        del wanted["score.weight"]
    elif cfg.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= names:
        names.remove("lm_head.weight")
        head, embedding = (
            tensors[name].shape for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        pairs = zip(
            tensors.stretches("lm_head.weight"),
            tensors.stretches("model.embed_tokens.weight"),
            strict=True,
        )
        if head != embedding or not all(torch.equal(a, b) for (_, a), (_, b) in pairs):
            raise UserError(
                f"{dir}: config.json ties the output matrix to the embedding, but lm_head.weight differs from it; "
                'set "tie_word_embeddings" to false if lm_head.weight is meant'
            )
    check_tensors(dir, wanted, {name: tensors[name] for name in names})

    dtype = dtype or tensors["model.embed_tokens.weight"].dtype
    weights = {}
    for name in wanted:
        kind = torch.float32 if name == "score.weight" else dtype
        weights[name] = (
            tensors[name] if tensors[name].dtype == kind else tensors.copy(name, kind)
        ).to(device)
    if fresh:
        weights["score.weight"] = ScoreHead(cfg.dim).weight.detach().to(device)
    model.load_state_dict(weights, assign=True)
    return model


def check_tensors(where, wanted, found):
    """UserError unless `found` {name: tensor} holds floats of exactly the names and shapes in `wanted` {name: shape}."""

    def some(names):
        names = sorted(names)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    shapes = {
        name: (tuple(found[name].shape), tuple(shape))
        for name, shape in wanted.items()
        if name in found
    }
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape than config.json says": {
            f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b
        },
        "not of a float type": {
            f"{n} {t.dtype}" for n, t in found.items() if t.dtype not in floats
        },
    }
    if any(faults.values()):
        said = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
        raise UserError(f"the tensors in {where} do not fit its config.json - {said}")


def save_model(model, dir, dtype=None, like=None, tensors=None, shard_bytes=5e9, tok=None, **extra):
    """Transformer -> a model directory. dtype: of the file (None: as the model holds it; a score head stays fp32).

    like: the directory that the model came from: its tokenizer files and generation_config.json are copied byte for
    byte, and what its config.json says beyond the architecture is kept. tok: the Tokenizer that the model was trained with, whose
    chat template may be another than the directory's. tensors {name: tensor}: the weights, where the
    model does not hold them whole (sharded over ranks). extra: keys of config.json to set. config.json comes last:
    without it there is no model."""
    dir, cfg = Path(dir), model.cfg
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    main = dtype or tensors["model.embed_tokens.weight"].dtype
    config = config_json(cfg, like, **{"torch_dtype": str(main).removeprefix("torch.")} | extra)
    kept = {"score.weight"} if dtype else tensors.keys()
    casts = (
        (name, t.detach() if name in kept else t.detach().to(dtype)) for name, t in tensors.items()
    )
    write_tensors(casts, dir, shard_bytes=shard_bytes)
    copy_tokenizer(like, dir)
    if tok and tok.adopted:
        write_template(tok, dir, config)
    write_text(dir / "config.json", json.dumps(config, indent=2) + "\n")
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "score_scale.json",
    ):  # of an earlier run with lora_rank=
        (dir / name).unlink(missing_ok=True)


def copy_tokenizer(source, dir):
    """Copies tokenizer files and generation_config.json, byte for byte, to `dir` if that is not the source itself. Such files of
    another model that lie there are removed."""
    if source and Path(source).resolve() != Path(dir).resolve():
        new, old = (
            {p.name: p for pattern in tokenizer.FILES for p in Path(d).glob(pattern)}
            for d in (source, dir)
        )
        for name in old.keys() - new.keys():
            old[name].unlink()
        for name, path in sorted(new.items()):
            write_bytes(Path(dir) / name, path.read_bytes())


def write_template(tok, dir, config):
    """Makes the chat template of `tok` that of the model directory, and the tokens that end its turns stop what others generate.
    config: the model's config.json, for the token ids that no generation_config.json says."""
    write_text(dir / "chat_template.jinja", tok.chat_template)
    settings, generation = dir / "tokenizer_config.json", dir / "generation_config.json"
    if settings.exists() and "chat_template" in (
        said := read_json(settings)
    ):  # not every program looks for the .jinja first
        del said["chat_template"]
        write_text(settings, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    said = (
        read_json(generation)
        if generation.exists()
        else {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    )
    ends = sorted(tok.stop_ids, key=lambda id: id != tok.eos_id)  # EOS first
    write_text(generation, json.dumps(said | {"eos_token_id": ends}, indent=2) + "\n")


def read_score_scale(dir):
    """(gain, bias) of a reward model's or score adapter's directory: gain * score + bias has mean 0 and variance 1 over what the
    policy it was made for says. An adapter keeps them in score_scale.json. (1.0, 0.0) where none were fitted."""
    path = next(
        (
            path
            for path in (Path(dir) / "score_scale.json", Path(dir) / "config.json")
            if path.exists()
        ),
        None,
    )
    values = read_json(path) if path else {}
    return float(values.get("reward_gain", 1.0)), float(values.get("reward_bias", 0.0))


# --- training state -------------------------------------------------------------------------------------------


def save_state(dir, tensors, meta):
    """{name: tensor} and JSON values -> state.safetensors and state.json in a folder that is replaced as a whole."""
    dir = Path(dir)
    tmp = dir.with_name(dir.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        write_tensors(tensors.items(), tmp, name="state", shard_bytes=math.inf)
        write_text(tmp / "state.json", json.dumps(meta) + "\n")
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    replace_dir(tmp, dir)


def load_state(dir):
    """(tensors, meta) as save_state got them, the tensors memory-mapped; None where there is no state."""
    recover_dir(dir)
    if not Path(dir).is_dir():
        return None
    return dict(read_tensors(dir, name="state")), read_json(Path(dir) / "state.json")


def flatten_optimizer(optimizer, prefix="optimizer."):
    """What a torch optimizer knows of its parameters -> ({name: tensor}, JSON values), which restore_optimizer puts back bit for
    bit. Names carry the number of the parameter: prefix + "3.exp_avg". The groups' settings are the run's own, and may change."""
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
    """Puts back what flatten_optimizer returned, in an optimizer that was built alike. UserError when it was not."""
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
    """Whether a run continues from the state in its folder `out`. resume: "auto" (when there is one), "true" (an error without) or
    "false". UserError where the folder cannot be written to, holds one of the models that the run starts from (`sources`) where it
    will write its own, or has a state that only some ranks see."""
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
    """Everything that a resume of a stage bit for bit needs: the trained parameters {name: p}, the optimizers {name: optimizer},
    the generators of `rt` (a Runtime), more tensors {name: tensor}, and JSON values. Every rank calls it; one writes, or
    each its own part where the parameters are sharded over ranks (save_shards).

    The parameters are here because the model directory beside it is written at another instant, in another dtype."""
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
        tensors = rt.full(tensors)
        if rt.is_main:
            save_state(dir, tensors, saved)


def save_shards(dir, tensors, meta, group):
    """Each rank writes its shards of `tensors` to a safetensors file of its own, in the background, from a copy in CPU memory;
    when all have, rank 0 puts the folder in place. `dir` must be on a file system that all ranks see. group: gloo, for this
    alone. Returns a function that waits until the state is on the disk. torch.distributed.checkpoint's own format would
    need pickle to be read; it speaks safetensors too."""
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
            write_text(tmp / "state.json", json.dumps(meta | {"files": files}) + "\n")
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
    """Puts back what save_training saved, on any number of ranks -> (meta, extra). Each rank reads what it holds of the
    parameters and moments, whichever way they were cut. UserError when the run's stage or parameters are others."""
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
        rt.prime(optimizer)
    rt.set_rng_state(
        {name.removeprefix("rng."): t for name, t in tensors.items() if name.startswith("rng.")}
    )
    return saved["meta"], {
        k.removeprefix("extra."): t for k, t in tensors.items() if k.startswith("extra.")
    }
