"""Model directories, adapter directories and safetensors files.

A model directory is a Hugging Face directory: config.json, safetensors (one file, or shards with an
index) and the tokenizer's files. An adapter directory is a PEFT directory. What transformers and
peft write opens here, and the reverse. Nothing is pickled.

    opened = weights.open("models/smollm2")                       # .model, .tok, .base
    model = weights.load_model("models/smollm2", dtype=torch.bfloat16)
    weights.save_model(model, "out/sft/last", like="models/smollm2")   # tokenizer files come from `like`
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lora
from model import ScoreHead, Transformer, empty
from nano import tokenizer
from nano.config import UserError
from nano.families import CONV1D, FAMILIES, config_json, load_config, places
from nano.files import read_json, sync, write_json, write_text

STRETCH = 1 << 24  # bytes of a tensor that are converted at a time
EMBEDDING = "model.embed_tokens.weight"  # its dtype is the model's


@contextlib.contextmanager
def damaged(path):
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or incomplete ({e}): fetch or save it again") from None


class Tensors(Mapping):
    """name -> tensor, memory-mapped: a tensor takes memory only where it is read. files: name ->
    safetensors file."""

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
        """Yields (row, rows from there on) in pieces of STRETCH bytes, each through a mapping of
        its own: the memory that the file's pages take is only given back when they are unmapped."""
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
    """A safetensors file, or a directory with {name}.safetensors or with
    {name}.safetensors.index.json -> Tensors."""
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
    """(key, tensor) pairs -> {name}.safetensors in `dir`, or shards with an index if they are over
    `shard_bytes` bytes.

    The pairs are consumed one by one, and one shard of them is in memory at a time. An older save
    stays whole until the new one is complete: new shards never take the names of those that the old
    index lists."""
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
        # within `tmp`, which the next save removes if this one is killed
        write_json(tmp / "index", {"metadata": {"total_size": total}, "weight_map": weight_map})
        os.replace(tmp / "index", index)
        sync(dir)
        single.unlink(missing_ok=True)
    for path in dir.glob(f"{name}-*-of-*.safetensors"):
        if path.name not in finals:
            path.unlink()
    tmp.rmdir()


def load_model(dir, device="cpu", dtype=None, head=None):
    """A model directory -> Transformer, on `device`, in `dtype` (None: the one its embedding is
    stored in).

    On the CPU and in the stored dtype the parameters are the file itself, memory-mapped, unless the
    family lays a tensor out in another way; otherwise they are converted in stretches, so no more
    than the weights is ever in memory. head="score" on a language model drops its output matrix and
    starts a fresh score head (from torch's generator); a score head is always fp32. UserError names
    tensors that are missing, unexpected or of another shape."""
    cfg = load_config(dir)
    fresh = head == "score" and cfg.head == "lm"
    if head == "lm" and cfg.head == "score":
        raise UserError(f"{dir} is a score model: it has no language-model head")
    cfg = dataclasses.replace(cfg, head=head or cfg.head)
    try:
        model = empty(cfg)
    except ValueError as e:
        raise UserError(f"{dir}: {e}") from None
    family = FAMILIES[cfg.family]
    tensors = read_tensors(dir)
    names = {name for name in tensors if not re.search(family.ignored, name)}
    bare = not any(name.startswith(family.prefix) for name in names)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    embedding = next(iter(places(cfg, [EMBEDDING], bare)))
    if fresh:
        names.discard("lm_head.weight")
        del shapes["score.weight"]
    elif cfg.tie_embeddings and {"lm_head.weight", embedding} <= names:
        names.remove("lm_head.weight")
        if not equal(tensors, "lm_head.weight", embedding):
            raise UserError(
                f"{dir}: config.json ties the output matrix to the embedding, but lm_head.weight differs from it; "
                'set "tie_word_embeddings" to false if lm_head.weight is meant'
            )
    stored = places(cfg, shapes, bare)
    wanted = {}  # {name in the file: shape}
    for name, (parts, layout) in stored.items():
        hollow = [torch.empty(shapes[part], device="meta") for part in parts]
        wanted[name] = layout.fuse(hollow, cfg).shape
    check_tensors(dir, wanted, {name: tensors[name] for name in names})

    dtype = dtype or tensors[embedding].dtype
    weights = {}
    for name, (parts, layout) in stored.items():
        kind = torch.float32 if name == "score.weight" else dtype
        tensor = tensors[name] if tensors[name].dtype == kind else tensors.copy(name, kind)
        pieces = layout.split(tensor, [shapes[part] for part in parts], cfg)
        weights |= {part: piece.to(device) for part, piece in zip(parts, pieces, strict=True)}
    if fresh:
        weights["score.weight"] = ScoreHead(cfg.dim).weight.detach().to(device)
    model.load_state_dict(weights, assign=True)
    return model


def equal(tensors, a, b):
    """Whether two matrices of a Tensors are the same, read in stretches."""
    if tensors[a].shape != tensors[b].shape:
        return False
    pairs = zip(tensors.stretches(a), tensors.stretches(b), strict=True)
    return all(torch.equal(x, y) for (_, x), (_, y) in pairs)


def check_tensors(where, wanted, found, what="its config.json"):
    """UserError unless `found` {name: tensor} holds floats of exactly the names and shapes in
    `wanted` {name: shape}, which `what` asks for."""

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
        "of another shape": {f"{n} {a} for {b}" for n, (a, b) in shapes.items() if a != b},
        "not of a float type": {
            f"{n} {t.dtype}" for n, t in found.items() if t.dtype not in floats
        },
    }
    if any(faults.values()):
        said = "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)
        raise UserError(f"the tensors in {where} do not fit {what} - {said}")


def save_model(model, dir, dtype=None, like=None, tensors=None, shard_bytes=5e9, tok=None, **extra):
    """Transformer -> a model directory. dtype: of the file (None: as the model holds it; a score
    head stays fp32).

    like: the directory that the model came from: its tokenizer files and generation_config.json are
    copied byte for byte, and what its config.json says beyond the architecture is kept. tok: the
    Tokenizer that the model was trained with, whose chat template may be another than the
    directory's. tensors {name: tensor}: the weights, where the model does not hold them whole
    (sharded over ranks). extra: keys of config.json to set. config.json comes last: without it
    there is no model."""
    dir, cfg = Path(dir), model.cfg
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    main = dtype or tensors[EMBEDDING].dtype
    config = config_json(cfg, like, **{"torch_dtype": str(main).removeprefix("torch.")} | extra)

    def cast(name):
        tensor = tensors[name].detach()
        return tensor if dtype is None or name == "score.weight" else tensor.to(dtype)

    stored = (
        (name, layout.fuse([cast(part) for part in parts], cfg))
        for name, (parts, layout) in places(cfg, tensors).items()
    )
    write_tensors(stored, dir, shard_bytes=shard_bytes)
    if like:
        tokenizer.copy_files(like, dir)
    if tok and tok.adopted:
        write_template(tok, dir, config)
    write_json(dir / "config.json", config)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "score_scale.json",
    ):  # of an earlier run with lora_rank=
        (dir / name).unlink(missing_ok=True)


def write_template(tok, dir, config):
    """Makes the chat template of `tok` that of the model directory, and the tokens that end its
    turns stop what others generate.
    config: the model's config.json, for the token ids that no generation_config.json says."""
    write_text(dir / "chat_template.jinja", tok.chat_template)
    settings, generation = dir / "tokenizer_config.json", dir / "generation_config.json"
    if settings.exists() and "chat_template" in (
        said := read_json(settings)
    ):  # not every program looks for the .jinja first
        del said["chat_template"]
        write_json(settings, said, ensure_ascii=False)
    said = (
        read_json(generation)
        if generation.exists()
        else {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    )
    ends = sorted(tok.stop_ids, key=lambda id: id != tok.eos_id)  # EOS first
    write_json(generation, said | {"eos_token_id": ends})


def read_score_scale(dir):
    """(gain, bias) of a reward model's or score adapter's directory: gain * score + bias has mean 0
    and variance 1 over what the policy it was made for says. An adapter keeps them in
    score_scale.json. (1.0, 0.0) where none were fitted."""
    values = {}
    for path in (Path(dir) / "config.json", Path(dir) / "score_scale.json"):
        if path.exists():
            values |= read_json(path)
    return float(values.get("reward_gain", 1.0)), float(values.get("reward_bias", 0.0))


# --- PEFT directories -------------------------------------------------------------------------

PREFIX = "base_model.model."


def adapter_places(cfg, names):
    """Which layers of a file carry the adapters of the linear layers `names`: {layer in the file:
    [names here]}. A layer that the file fuses has several names here."""
    stored = places(cfg, [f"{name}.weight" for name in names])
    return {
        layer.removesuffix(".weight"): [part.removesuffix(".weight") for part in parts]
        for layer, (parts, _) in stored.items()
    }


def save_adapter(model, dir, name="default", base="", tensors=None, tok=None):
    """Writes the adapter as a PEFT directory. A trained head (`score`) goes along in full, as
    modules_to_save. base: the model directory it belongs to, kept in adapter_config.json. tensors:
    the model's tensors where they are gathered already (sharded training); default: its own. tok:
    the Tokenizer trained with; a chat template that is not the base's own goes along.

    The adapters of k layers that the family's files fuse into one become one of k times the rank,
    see fuse_adapters. A directory has one rank: other layers are filled up with zeros."""
    layers = {n: m for n, m in lora.adapted(model) if name in m.scales}
    if not layers:
        raise KeyError(f"there is no adapter {name!r} on this model")
    tensors = dict(model.named_parameters()) if tensors is None else tensors
    stored = adapter_places(model.cfg, lora.linear_names(model))
    adapted = {layer: parts for layer, parts in stored.items() if layers.keys() & set(parts)}
    first = next(iter(layers.values()))
    ranks = {n: m.lora_A[name].shape[0] for n, m in layers.items()}
    rank = max(sum(ranks.get(part, 0) for part in parts) for parts in adapted.values())
    out = {}
    for layer, parts in adapted.items():
        pairs = []
        for part in parts:
            A, B = (tensors.get(f"{part}.{ab}.{name}") for ab in ("lora_A", "lora_B"))
            pairs.append((A, B, model.get_submodule(part).out_features))
        A, B = fuse_adapters(pairs, rank)
        out[f"{PREFIX}{layer}.lora_A.weight"] = A
        out[f"{PREFIX}{layer}.lora_B.weight"] = B
    score = "score.weight" in tensors
    if score:
        out[PREFIX + "score.weight"] = tensors["score.weight"].detach().cpu().contiguous()
    leaves = {layer.rpartition(".")[2] for layer in adapted}
    # whether a suffix names these layers and no others
    whole = all(layer in adapted for layer in stored if layer.rpartition(".")[2] in leaves)
    layouts = [layout for _, layout in places(model.cfg, [f"{n}.weight" for n in layers]).values()]
    config = dict(  # what else there is has peft's defaults
        peft_type="LORA",
        task_type="SEQ_CLS" if score else "CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=first.scales[name] * rank,
        lora_dropout=first.dropouts[name],
        target_modules=sorted(leaves if whole else adapted),
        modules_to_save=["score"] if score else None,
        bias="none",
        fan_in_fan_out=CONV1D in layouts,
        inference_mode=True,
    )
    write_tensors(out.items(), dir, name="adapter_model")
    if tok and tok.adopted:
        write_text(Path(dir) / "chat_template.jinja", tok.chat_template)
    else:
        Path(dir, "chat_template.jinja").unlink(missing_ok=True)
    write_json(Path(dir) / "adapter_config.json", config)
    for path in (
        Path(dir, "config.json"),
        *Path(dir).glob("model*.safetensors*"),
    ):  # of an earlier run without lora_rank=
        path.unlink(missing_ok=True)


def fuse_adapters(pairs, rank):
    """The adapters of layers that are one in the file, [(A, B, rows of the layer)], as one: A
    (rank, in), B (out, rank). Each has rows of A and columns of B for itself, so that the products
    are theirs. A and B are None where a layer has none."""
    rows = sum(size for _, _, size in pairs)
    filled = [(A, B) for A, B, _ in pairs if A is not None]
    A = torch.zeros(rank, filled[0][0].shape[1])
    B = torch.zeros(rows, rank)
    row = column = 0
    for part_A, part_B, size in pairs:
        if part_A is not None:
            end = column + len(part_A)
            A[column:end] = part_A.detach()
            B[row : row + size, column:end] = part_B.detach()
            column = end
        row += size
    return A, B


def read_adapter_config(dir):
    """adapter_config.json of a PEFT directory, refused when it says something that this file does
    not do."""
    path = Path(dir) / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{dir} is no adapter directory: it has no adapter_config.json")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported (only 'LORA' is)"
        )
    unsupported = dict(
        use_dora=False,
        bias="none",
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


def load_adapter(model, dir, name="default"):
    """Reads a PEFT directory into the adapter `name`: made active, not frozen, without the dropout
    that it was trained with (RL trains on it further, and must see the same probabilities twice).
    The adapter of a layer that the family's files fuse becomes adapters of its parts here, each
    with the same A. Raises UserError for another base's adapter."""
    config = read_adapter_config(dir)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    stored = adapter_places(model.cfg, lora.linear_names(model))
    found, wanted = {}, {}
    layers = {}  # layer in the file -> its parts here
    for key, tensor in read_tensors(dir, name="adapter_model").items():
        stem = key.removeprefix(PREFIX).removesuffix(".weight")
        layer, _, ab = stem.rpartition(".")
        if stem in ("score", "score.modules_to_save"):
            found["score"] = tensor
        elif layer in stored and ab in ("lora_A", "lora_B"):
            found[stem] = tensor
            layers[layer] = stored[layer]
        else:
            raise UserError(
                f"{dir}: tensor {key} belongs to no layer that is adapted here: an adapter for another base?"
            )
    if "score" in found:
        if not hasattr(model, "score"):
            raise UserError(
                f"{dir}: the adapter carries a score head, but the model was not opened as a score model"
            )
        wanted["score"] = model.score.weight.shape
    if not layers:
        raise UserError(f"{dir}: adapter_model.safetensors is incomplete: it adapts no layer")
    for layer, parts in layers.items():
        modules = [model.get_submodule(part) for part in parts]
        wanted[f"{layer}.lora_A"] = rank, modules[0].in_features
        wanted[f"{layer}.lora_B"] = sum(m.out_features for m in modules), rank
    check_tensors(
        dir, wanted, found, "the model: they are incomplete, or of an adapter for another base"
    )
    if not lora.adapted(model):
        model.requires_grad_(False)
    new = dict(dtype=torch.float32, device=model.model["embed_tokens"].weight.device, copy=True)
    for layer, parts in layers.items():
        modules = [lora.wrap(model, part) for part in parts]
        pieces = found[f"{layer}.lora_B"].split([m.out_features for m in modules])
        for module, B in zip(modules, pieces, strict=True):
            module.put(name, found[f"{layer}.lora_A"].to(**new), B.to(**new), scale)
    if "score" in found:
        model.score.weight.data.copy_(found["score"])
    lora.use(model, name)


def load_scorer(model, dir, name):
    """Reads a score adapter (reward.py's) into the adapter `name` of a language model and returns
    its head, a model.ScoreHead."""
    if read_adapter_config(dir).get("task_type") != "SEQ_CLS":
        raise UserError(f"{dir} is an adapter of a language model, not of a score model")
    model.score = ScoreHead(model.cfg.dim).to(model.model["embed_tokens"].weight.device)
    load_adapter(model, dir, name)
    head = model.score
    del model.score
    return head


def add_adapter(model, cfg, name="default", dropout=None):
    """Puts a new adapter on the model by the lora_* keys of a stage. What lora.apply refuses is the
    user's mistake."""
    dropout = cfg.lora_dropout if dropout is None else dropout
    try:
        lora.apply(
            model,
            cfg.lora_rank,
            cfg.lora_alpha,
            dropout,
            cfg.lora_targets,
            name=name,
            rslora=cfg.lora_rslora,
        )
    except ValueError as e:
        raise UserError(str(e)) from None


# --- a directory of either kind -----------------------------------------------------------------


def is_adapter(dir):
    return (Path(dir) / "adapter_config.json").exists()


def base_of(dir, base=None):
    """The model directory, which holds config and tokenizer, of a model or adapter directory.
    `base` takes the place of the one that the adapter names."""
    if not is_adapter(dir):
        if base:
            raise UserError(f"{dir} is a whole model, not an adapter: leave out base={base}")
        return Path(dir)
    named = base or read_adapter_config(dir).get("base_model_name_or_path") or ""
    for place in (Path(named), Path(dir) / named):
        if named and (place / "config.json").exists():
            return place
    raise UserError(
        f"{dir}: its base {str(named)!r} is no model directory here: name it with base=, or in adapter_config.json"
    )


def load_tokenizer(dir, base=None, template=None):
    """The Tokenizer of a model or adapter directory. template: a name or Jinja; None: the one that
    the adapter was trained with, or else the model's own."""
    path = Path(dir, "chat_template.jinja")
    if template is None and is_adapter(dir) and path.exists():
        template = path.read_text(encoding="utf-8")
    return tokenizer.load(base_of(dir, base), template)


@dataclass
class Opened:
    model: Transformer
    tok: tokenizer.Tokenizer
    base: Path  # the model directory that holds config.json and the tokenizer


def open(
    dir, base=None, device="cpu", dtype=None, head=None, merge=False, as_base=False, template=None
):
    """Opens a model directory or an adapter directory with its tokenizer -> Opened.

    base: takes the place of the base that the adapter names, in memory: no file is changed.
    dtype, head: as in load_model; an adapter of a score model opens as one.
    merge: an adapter is added to its base, by default in fp32; a model is its file, memory-mapped.
    as_base: the model is to carry a new adapter, whose directory will name `dir` as its base;
    UserError for an adapter.
    template: as in load_tokenizer."""
    adapter = is_adapter(dir)
    if adapter and as_base:
        raise UserError(
            f"{dir} is an adapter; a new one needs a base on disk: merge it, python -m prepare.weights source={dir}"
        )
    place = base_of(dir, base)
    if adapter and head is None and read_adapter_config(dir).get("task_type") == "SEQ_CLS":
        head = "score"
    if adapter and merge:
        dtype = dtype or torch.float32
    model = load_model(place, device, dtype, head)
    if adapter:
        load_adapter(model, dir)
    if merge:
        model = lora.merge(model)
    tok = load_tokenizer(dir, base, template)
    tok.check_embeddings(model.cfg.vocab_size, place)
    return Opened(model, tok, place)
