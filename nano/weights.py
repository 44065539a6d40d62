"""Model directories, adapter directories and safetensors files.

A model directory is a Hugging Face directory: config.json, safetensors (one file, or shards with an
index) and the tokenizer's files. An adapter directory is a PEFT directory. What transformers and
peft write opens here, and the reverse. Nothing is pickled.

    opened = weights.open("models/smollm2")                       # .model, .tok, .base
    model = weights.load_model("models/smollm2", dtype=torch.bfloat16)
    weights.save_model(model, "out/sft/last", like="models/smollm2")  # and its tokenizer's files
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
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
    """Turns what goes wrong when the file `path` is read into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or incomplete ({e}): fetch or save it again") from None


def tensor_files(dir, name="model"):
    """Of a directory with {name}.safetensors, or with shards and their index:
    {name of a tensor: path of its file}.

    UserError for files that are missing, damaged or outside the directory."""
    dir = Path(dir)
    single = dir / f"{name}.safetensors"
    index = dir / f"{name}.safetensors.index.json"
    if single.exists():
        with damaged(single), safe_open(single, framework="pt") as f:
            return dict.fromkeys(f.keys(), single)
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UserError(f"{index} has no weight_map")
        for shard in shards.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise UserError(
                    f"{index}: its weight_map names something else than files beside it"
                )
        return {key: dir / shard for key, shard in shards.items()}
    hint = ""
    if name == "model" and (pickled := sorted(dir.glob("pytorch_model*.bin"))):
        hint = f"; `python -m prepare.weights source={dir} out=NEW` converts {pickled[0].name}"
    raise UserError(f"{dir} has no {single.name} and no {index.name}{hint}")


def read_tensors(dir, name="model"):
    """The tensors of `tensor_files` by name, memory-mapped: each takes memory only where it is
    read."""
    tensors, opened = {}, {}
    for key, path in tensor_files(dir, name).items():
        with damaged(path):
            if path not in opened:
                opened[path] = safe_open(path, framework="pt")
            tensors[key] = opened[path].get_tensor(key)
    return tensors


def converted(mapped, dtype, path, name):
    """A memory-mapped tensor in memory of its own, as `dtype`. path, name: its file, and its name
    there.

    It is read in pieces of STRETCH bytes, and each piece through a mapping of its own. The pages of
    a mapped file stay in memory until the file is unmapped."""
    out = torch.empty_like(mapped, dtype=dtype)
    rows = max(1, STRETCH // mapped[0].nbytes)
    for i in range(0, len(out), rows):
        with safe_open(path, framework="pt") as f:
            out[i : i + rows] = f.get_slice(name)[i : i + rows]
    return out


def in_shards(tensors, shard_bytes):
    """(key, tensor) pairs -> dicts of at most `shard_bytes` bytes, or of one larger tensor.

    The receiver clears each dict, so that one shard at a time is in memory."""
    shard = {}
    size = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            size = 0
        shard[key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    yield shard


def write_tensors(tensors, dir, name="model", shard_bytes=5e9):
    """(key, tensor) pairs -> {name}.safetensors in `dir`, or shards with an index if they are over
    `shard_bytes` bytes.

    The pairs are consumed one by one, and one shard of them is in memory at a time. An older save
    stays whole until the new one is complete, because new shards never take the names of those that
    the old index lists."""
    dir = Path(dir)
    single = dir / f"{name}.safetensors"
    index = dir / f"{name}.safetensors.index.json"
    tmp = dir / f"{name}.safetensors.tmp"
    written = []  # the keys of each shard, which is the file tmp / its number
    total = 0
    shutil.rmtree(tmp, ignore_errors=True)  # what a killed save left
    try:
        tmp.mkdir(parents=True)
        for shard in in_shards(tensors, shard_bytes):
            path = tmp / str(len(written))
            save_file(shard, path, metadata={"format": "pt"})
            # save_file leaves a file that the owner alone can read
            path.chmod(tmp.stat().st_mode & 0o666)
            sync(path)
            written.append(list(shard))
            total += sum(tensor.nbytes for tensor in shard.values())
            shard.clear()
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    weight_map = {}
    if len(written) == 1:
        os.replace(tmp / "0", single)
        sync(dir)
        index.unlink(missing_ok=True)  # while both stand, readers take the single file
    else:
        listed = read_json(index, missing={}).get("weight_map", {})
        stem = f"{name}-b" if any(f.startswith(f"{name}-0") for f in listed.values()) else name
        for i, keys in enumerate(written):
            final = f"{stem}-{i + 1:05d}-of-{len(written):05d}.safetensors"
            os.replace(tmp / str(i), dir / final)
            weight_map |= dict.fromkeys(keys, final)
        sync(dir)
        # The index is written within `tmp`, which the next save removes if this one is killed.
        write_json(tmp / "index", {"metadata": {"total_size": total}, "weight_map": weight_map})
        os.replace(tmp / "index", index)
        sync(dir)
        single.unlink(missing_ok=True)
    for path in dir.glob(f"{name}-*-of-*.safetensors"):
        if path.name not in weight_map.values():
            path.unlink()
    tmp.rmdir()


def load_model(dir, device="cpu", dtype=None, head=None):
    """A model directory -> Transformer, on `device`, in `dtype` (None: the one that its embedding
    is stored in).

    On the CPU and in the stored dtype the parameters are the file itself, memory-mapped, unless the
    family lays a tensor out in another way. Otherwise they are converted piece by piece, so that no
    more than the weights is ever in memory. head="score" on a language model drops its output
    matrix and starts a fresh score head (from torch's generator). A score head is always fp32.
    UserError names tensors that are missing, unexpected or of another shape."""
    cfg = load_config(dir)
    fresh = head == "score" and cfg.head == "lm"
    if head == "lm" and cfg.head == "score":
        raise UserError(f"{dir} is a score model: it has no language-model head")
    cfg = replace(cfg, head=head or cfg.head)
    try:
        model = empty(cfg)
    except ValueError as e:
        raise UserError(f"{dir}: {e}") from None
    family = FAMILIES[cfg.family]
    files = tensor_files(dir)
    tensors = {n: t for n, t in read_tensors(dir).items() if not re.search(family.ignored, n)}
    bare = not any(name.startswith(family.prefix) for name in tensors)
    params = dict(model.named_parameters())
    (embedding,) = places(cfg, [EMBEDDING], bare)
    if fresh:
        tensors.pop("lm_head.weight", None)
        del params["score.weight"]
    elif cfg.tie_embeddings and {"lm_head.weight", embedding} <= tensors.keys():
        if not torch.equal(tensors.pop("lm_head.weight"), tensors[embedding]):
            raise UserError(
                f"{dir}: config.json ties the output matrix to the embedding, "
                "but lm_head.weight differs from it; "
                'set "tie_word_embeddings" to false if lm_head.weight is meant'
            )
    stored = places(cfg, params, bare)
    # `params` are on the meta device, and fused there they have the shapes of the file
    hollow = {name: [params[part] for part in parts] for name, (parts, _) in stored.items()}
    wanted = {name: layout.fuse(hollow[name], cfg).shape for name, (_, layout) in stored.items()}
    check_tensors(dir, wanted, tensors)

    dtype = dtype or tensors[embedding].dtype
    weights = {}
    for name, (parts, layout) in stored.items():
        kind = torch.float32 if name == "score.weight" else dtype
        tensor = tensors[name]
        if tensor.dtype != kind:
            tensor = converted(tensor, kind, files[name], name)
        pieces = layout.split(tensor, [p.shape for p in hollow[name]], cfg)
        weights |= {part: piece.to(device) for part, piece in zip(parts, pieces, strict=True)}
    if fresh:
        weights["score.weight"] = ScoreHead(cfg.dim).weight.detach().to(device)
    model.load_state_dict(weights, assign=True)
    return model


def fingerprint(params):
    """16 hex digits that name the values of parameters on the CPU, [(name, parameter)]."""

    def digest(named):
        name, p = named
        content = p.detach().contiguous().flatten().view(torch.uint8).numpy()
        return name.encode() + hashlib.sha256(content).digest()

    with ThreadPoolExecutor() as pool:  # sha256 lets other threads run
        return hashlib.sha256(b"".join(pool.map(digest, params))).hexdigest()[:16]


def check_tensors(where, wanted, tensors, what="its config.json"):
    """UserError unless `tensors` {name: tensor} are floats of exactly the names and shapes in
    `wanted` {name: shape}, which `what` asks for."""
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    faults = {
        "missing": wanted.keys() - tensors.keys(),
        "unexpected": tensors.keys() - wanted.keys(),
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name])}"
            for name in wanted.keys() & tensors.keys()
            if tensors[name].shape != wanted[name]
        ],
        "not of a float type": [
            f"{n} {t.dtype}" for n, t in tensors.items() if t.dtype not in floats
        ],
    }
    said = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            said.append(f"{fault}: {', '.join(sorted(names)[:4])}{more}")
    if said:
        raise UserError(f"the tensors in {where} do not fit {what} - {'; '.join(said)}")


def save_model(model, dir, dtype=None, like=None, tensors=None, shard_bytes=5e9, tok=None, **extra):
    """Transformer -> a model directory.

    dtype: of the file. None: as the model holds it. A score head keeps its own dtype.
    like: the directory that the model came from. Its tokenizer files and generation_config.json are
    copied byte for byte, and what its config.json says beyond the architecture is kept.
    tensors: {name: tensor}, the weights where the model does not hold them whole (sharded over
    ranks).
    tok: the Tokenizer that the model was trained with. Its chat template may be another than the
    directory's.
    extra: keys of config.json to set.
    config.json comes last, because a directory without it is no model."""
    dir = Path(dir)
    tensors = tensors or dict(model.named_parameters())
    stored_as = str(dtype or tensors[EMBEDDING].dtype).removeprefix("torch.")
    config = config_json(model.cfg, like, **{"torch_dtype": stored_as} | extra)

    def stored():
        for name, (parts, layout) in places(model.cfg, tensors).items():
            kind = None if name == "score.weight" else dtype
            parts = [tensors[part].detach().to(dtype=kind) for part in parts]
            yield name, layout.fuse(parts, model.cfg)

    write_tensors(stored(), dir, shard_bytes=shard_bytes)
    if like:
        tokenizer.copy_files(like, dir)
    if tok and tok.adopted:
        write_template(tok, dir, config)
    write_json(dir / "config.json", config)
    # an earlier run with lora_rank= may have left an adapter here
    for name in ("adapter_config.json", "adapter_model.safetensors", "score_scale.json"):
        (dir / name).unlink(missing_ok=True)


def write_template(tok, dir, config):
    """Makes the chat template of `tok` the model directory's own.

    The tokens that end its turns become the stop ids in generation_config.json. config: the model's
    config.json, which gives the other token ids where there is no generation_config.json."""
    write_text(dir / "chat_template.jinja", tok.chat_template)
    settings = read_json(dir / "tokenizer_config.json", missing={})
    if "chat_template" in settings:  # not every program looks for the .jinja first
        del settings["chat_template"]
        write_json(dir / "tokenizer_config.json", settings, ensure_ascii=False)
    ids = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    generation = read_json(dir / "generation_config.json", missing=ids)
    ends = sorted(tok.stop_ids, key=lambda id: id != tok.eos_id)  # EOS first
    write_json(dir / "generation_config.json", generation | {"eos_token_id": ends})


class ScoreScale(TypedDict, total=False):
    reward_gain: float
    reward_bias: float


def read_score_scale(dir):
    """(gain, bias) of a reward model's or score adapter's directory, (1.0, 0.0) where none were
    fitted.

    gain * score + bias has mean 0 and variance 1 over the responses of the policy that the reward
    model was trained for. An adapter keeps them in score_scale.json."""
    values = {}
    for name in ("config.json", "score_scale.json"):
        values |= read_json(Path(dir) / name, missing={}, kind=ScoreScale)
    return float(values.get("reward_gain", 1.0)), float(values.get("reward_bias", 0.0))


# --- PEFT directories -------------------------------------------------------------------------

PREFIX = "base_model.model."


def adapter_places(model):
    """Which layers of a file may carry adapters: {layer in the file: [names here]}.

    A layer that the family's files fuse has several names here."""
    stored = places(model.cfg, [f"{name}.weight" for name in lora.linear_names(model)])
    return {
        layer.removesuffix(".weight"): [part.removesuffix(".weight") for part in parts]
        for layer, (parts, _) in stored.items()
    }


def save_adapter(model, dir, name="default", base="", tensors=None, tok=None):
    """Writes the adapter `name` as a PEFT directory. KeyError if the model has none of that name.

    A trained head (`score`) goes along in full, as modules_to_save.
    base: the model directory that the adapter belongs to, which adapter_config.json names.
    tensors: {name: tensor} where they are gathered already (sharded training). None: the model's.
    tok: the Tokenizer trained with. A chat template that is not the base's own goes along.

    The adapters of k layers that the family's files fuse into one become one of up to k times the
    rank: A is stacked, and B is block-diagonal, so that each layer keeps its own product. A
    directory has one rank, so the others are padded with zeros."""
    dir = Path(dir)
    layers = {n: m for n, m in lora.adapted(model) if name in m.scales}
    if not layers:
        raise KeyError(f"there is no adapter {name!r} on this model")
    tensors = tensors or dict(model.named_parameters())
    stored = adapter_places(model)
    adapted = {}  # {layer in the file: (A, B)}
    for layer, parts in stored.items():
        As, Bs = [], []
        for part in parts:
            if part in layers:
                As.append(tensors[f"{part}.lora_A.{name}"].detach().float().cpu())
                Bs.append(tensors[f"{part}.lora_B.{name}"].detach().float().cpu())
            else:
                Bs.append(torch.zeros(model.get_submodule(part).out_features, 0))
        if As:
            adapted[layer] = torch.cat(As), torch.block_diag(*Bs)
    rank = max(len(A) for A, _ in adapted.values())
    out = {}
    for layer, (A, B) in adapted.items():
        missing = rank - len(A)
        out[f"{PREFIX}{layer}.lora_A.weight"] = F.pad(A, (0, 0, 0, missing))
        out[f"{PREFIX}{layer}.lora_B.weight"] = F.pad(B, (0, missing))
    score = "score.weight" in tensors
    if score:
        out[PREFIX + "score.weight"] = tensors["score.weight"]
    leaves = {layer.rpartition(".")[2] for layer in adapted}
    # whether a suffix names these layers and no others
    whole = all(layer in adapted for layer in stored if layer.rpartition(".")[2] in leaves)
    first = next(iter(layers.values()))
    config = dict(  # other keys have peft's defaults
        peft_type="LORA",
        task_type="SEQ_CLS" if score else "CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=first.scales[name] * rank,
        lora_dropout=first.dropouts[name],
        target_modules=sorted(leaves if whole else adapted),
        modules_to_save=["score"] if score else None,
        bias="none",
        fan_in_fan_out=CONV1D in FAMILIES[model.cfg.family].layouts.values(),
        inference_mode=True,
    )
    write_tensors(out.items(), dir, name="adapter_model")
    template = dir / "chat_template.jinja"
    if tok and tok.adopted:
        write_text(template, tok.chat_template)
    else:
        template.unlink(missing_ok=True)
    write_json(dir / "adapter_config.json", config)
    # an earlier run without lora_rank= may have left a whole model here
    for path in (dir / "config.json", *dir.glob("model*.safetensors*")):
        path.unlink(missing_ok=True)


class AdapterConfig(TypedDict, total=False):
    base_model_name_or_path: str | None
    task_type: str | None
    use_rslora: bool | None


def read_adapter_config(dir):
    """adapter_config.json of a PEFT directory as a dict.

    UserError when it asks for something that is not supported here."""
    path = Path(dir) / "adapter_config.json"
    if not path.exists():
        raise UserError(f"{dir} is no adapter directory: it has no adapter_config.json")
    config = read_json(path, kind=AdapterConfig)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported (only 'LORA' is)"
        )
    supported = dict(
        use_dora=False,
        bias="none",
        rank_pattern={},
        alpha_pattern={},
        megatron_config=None,
        alora_invocation_tokens=None,
    )
    for key, plain in supported.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{path}: {key}={config[key]!r} is not supported (only {plain!r} is)")
    how = config.get("init_lora_weights")
    if str(how).split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        raise UserError(
            f"{path}: init_lora_weights={how!r} has changed the base model too, "
            "which is not here: "
            "save it anew with peft's path_initial_model_for_weight_conversion="
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, (int, float)):
        raise UserError(f"{path}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r 1 or more")
    return config


def load_adapter(model, dir, name="default"):
    """Reads a PEFT directory into the adapter `name`, which becomes the active one.

    It is not frozen, and the dropout that it was trained with is left out: RL trains it further,
    and must see the same probabilities twice. The adapter of a layer that the family's files fuse
    becomes adapters of its parts here, each with the same A. UserError for another base's
    adapter."""
    config = read_adapter_config(dir)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = {}
    for key, tensor in read_tensors(dir, name="adapter_model").items():
        stem = key.removeprefix(PREFIX).removesuffix(".weight")
        tensors[stem.removesuffix(".modules_to_save")] = tensor
    stored = adapter_places(model)
    layers = {}  # {layer in the file: its modules here}
    wanted = {}
    for layer, parts in stored.items():
        A, B = f"{layer}.lora_A", f"{layer}.lora_B"
        if A in tensors or B in tensors:
            layers[layer] = modules = [model.get_submodule(part) for part in parts]
            wanted[A] = (rank, modules[0].in_features)
            wanted[B] = (sum(m.out_features for m in modules), rank)
    if "score" in tensors:
        if not hasattr(model, "score"):
            raise UserError(
                f"{dir}: the adapter carries a score head, "
                "but the model was not opened as a score model"
            )
        wanted["score"] = model.score.weight.shape
    what = "the model: they are incomplete, or of an adapter for another base"
    check_tensors(dir, wanted, tensors, what)
    if not layers:
        raise UserError(f"{dir}: adapter_model.safetensors is incomplete: it adapts no layer")
    if not lora.adapted(model):
        model.requires_grad_(False)
    new = dict(dtype=torch.float32, device=model.model["embed_tokens"].weight.device, copy=True)
    for layer, modules in layers.items():
        A = tensors[f"{layer}.lora_A"]
        Bs = tensors[f"{layer}.lora_B"].split([m.out_features for m in modules])
        for part, B in zip(stored[layer], Bs, strict=True):
            lora.wrap(model, part).put(name, A.to(**new), B.to(**new), scale)
    if "score" in tensors:
        model.score.weight.data.copy_(tensors["score"])
    lora.use(model, name)


def load_scorer(model, dir, name):
    """Reads a score adapter (reward.py's) into the adapter `name` of a language model.

    Returns its head, a model.ScoreHead. UserError for an adapter of a language model."""
    if not is_scorer(dir):
        raise UserError(f"{dir} is an adapter of a language model, not of a score model")
    model.score = ScoreHead(model.cfg.dim).to(model.model["embed_tokens"].weight.device)
    load_adapter(model, dir, name)
    head = model.score
    del model.score
    return head


def add_adapter(model, cfg, name="default", dropout=None):
    """Puts a new adapter on the model by the lora_* keys of a stage's Config.

    UserError for what lora.apply refuses."""
    dropout = cfg.lora_dropout if dropout is None else dropout
    try:
        lora.apply(
            model, cfg.lora_rank, cfg.lora_alpha, dropout, cfg.lora_targets, name, cfg.lora_rslora
        )
    except ValueError as e:
        raise UserError(str(e)) from None


# --- a directory of either kind -----------------------------------------------------------------


def is_adapter(dir):
    return (Path(dir) / "adapter_config.json").exists()


def is_scorer(dir):
    """Whether an adapter directory is that of a score model."""
    return read_adapter_config(dir).get("task_type") == "SEQ_CLS"


def base_of(dir, base=None):
    """The model directory, which holds config.json and the tokenizer, of a model or adapter
    directory.

    base: takes the place of the one that the adapter names. UserError for a base that is not there,
    and for a base= of a whole model."""
    if not is_adapter(dir):
        if base:
            raise UserError(f"{dir} is a whole model, not an adapter: leave out base={base}")
        return Path(dir)
    named = base or read_adapter_config(dir).get("base_model_name_or_path") or ""
    for place in (Path(named), Path(dir) / named):
        if named and (place / "config.json").exists():
            return place
    raise UserError(
        f"{dir}: its base {str(named)!r} is no model directory here: "
        "write where it is as base_model_name_or_path into adapter_config.json"
    )


def load_tokenizer(dir, base=None, template=None, options=()):
    """The Tokenizer of a model or adapter directory.

    template: a name or Jinja. None: the one that the adapter was trained with, or else the model's
    own. options: as in tokenizer.load."""
    path = Path(dir, "chat_template.jinja")
    if template is None and is_adapter(dir) and path.exists():
        template = path.read_text(encoding="utf-8")
    return tokenizer.load(base_of(dir, base), template, options)


@dataclass
class Opened:
    model: Transformer
    tok: tokenizer.Tokenizer
    base: Path  # the model directory that holds config.json and the tokenizer


def open(
    dir, base=None, device="cpu", dtype=None, head=None, merge=False, as_base=False, template=None
):
    """Opens a model directory or an adapter directory with its tokenizer -> Opened.

    base: takes the place of the base that the adapter names, in memory. No file is changed.
    dtype, head: as in load_model. An adapter of a score model opens as a score model.
    merge: an adapter is added to its base, by default in fp32. A whole model stays its file,
    memory-mapped.
    as_base: the model is to carry a new adapter, whose directory will name `dir` as its base.
    UserError for an adapter.
    template: as in load_tokenizer."""
    adapter = is_adapter(dir)
    if adapter and as_base:
        raise UserError(
            f"{dir} is an adapter; a new one needs a base on disk: "
            f"merge it, python -m prepare.weights source={dir} out=NEW"
        )
    place = base_of(dir, base)
    if adapter and head is None and is_scorer(dir):
        head = "score"
    if adapter and merge:
        dtype = dtype or torch.float32
    model = load_model(place, device, dtype, head)
    if adapter:
        load_adapter(model, dir)
    if merge:
        lora.merge(model)
    tok = load_tokenizer(dir, base, template)
    tok.check_embeddings(model.cfg.vocab_size, place)
    return Opened(model, tok, place)
