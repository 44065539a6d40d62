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
import pickle
import re
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lora
from model import ScoreHead, Transformer, empty
from nano import adapters, quant, tokenizer
from nano.adapters import base_of, ends_with, is_adapter, is_scorer, read_adapter_config
from nano.config import UserError
from nano.families import (
    FAMILIES,
    by_expert,
    config_json,
    load_config,
    places,
    stack_places,
    text_names,
)
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


def mapped(path, name):
    """A tensor of a file through a mapping of its own, whose pages leave the memory with it."""
    with safe_open(path, framework="pt") as f:
        return f.get_tensor(name)


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


def load_pickle(path):
    """{name: tensor} of a .pth or .bin file, memory-mapped.

    Nothing but tensors is unpickled. UserError for a file that is damaged or holds anything else.
    """
    try:
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL (\S+)", str(e))
        what = (
            f"it holds {name[1]}, which could run code"
            if name
            else "it is damaged, or holds more than tensors"
        )
        raise UserError(f"{path} is refused: {what}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise UserError(f"{path} is damaged or incomplete: download it again") from None

    def plain(name, t):
        strided = isinstance(t, torch.Tensor) and t.layout is torch.strided
        return isinstance(name, str) and strided

    if not isinstance(tensors, dict) or not all(map(plain, tensors.keys(), tensors.values())):
        raise UserError(f"{path} holds something else than named tensors")
    return tensors


def in_shards(tensors, shard_bytes):
    """(key, tensor) pairs -> dicts of at most `shard_bytes` bytes, or of one larger tensor.

    The receiver clears each dict, so that one shard at a time is in memory."""
    shard = {}
    size = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            size = 0
        if tensor.dtype == torch.float16 and not tensor.isfinite().all():
            raise UserError(
                f"{key} has numbers beyond 65,504, which float16 cannot hold: "
                "choose dtype=bfloat16 or float32"
            )
        tensor = tensor.detach().cpu().contiguous()
        # The tensors of a pickle may share memory, which no safetensors file can say.
        shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[key] = tensor.clone() if shared else tensor
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


def load_model(dir, device="cpu", dtype=None, head=None, tensors=None, method=quant.NONE):
    """A model directory -> Transformer, on `device`, in `dtype` (None: the one that its embedding
    is stored in).

    On the CPU and in the stored dtype the parameters are the file itself, memory-mapped, unless the
    family lays a tensor out in another way. Otherwise they are converted piece by piece, so that no
    more than the weights is ever in memory. head="score" on a language model drops its output
    matrix and starts a fresh score head (from torch's generator). A score head is always fp32.
    tensors: {name in the file: tensor}, where they are in no safetensors file.
    method: how the linear layers of the blocks are quantised. They are read one at a time, and a
    directory of bitsandbytes keeps its bytes.
    UserError names tensors that are missing, unexpected or of another shape."""
    cfg = load_config(dir)
    fresh = head == "score" and cfg.head == "lm"
    if head == "lm" and cfg.head == "score":
        raise UserError(f"{dir} is a score model: it has no language-model head")
    cfg = replace(cfg, head=head or cfg.head)
    family = FAMILIES[cfg.family]
    files = {} if tensors else tensor_files(dir)
    tensors = tensors or read_tensors(dir)
    names = {
        plain: n for plain, n in text_names(tensors).items() if not re.search(family.ignored, n)
    }
    tensors = {plain: tensors[name] for plain, name in names.items()}
    packed = quant.read_packed(dir, tensors, method)
    bare = not any(name.startswith(family.prefix) for name in tensors)
    embedding, output = places(cfg, [EMBEDDING, "lm_head.weight"], bare)
    if family.head_by_file and {output, embedding} <= tensors.keys():
        tied = torch.equal(tensors[output], tensors[embedding])
        cfg = replace(cfg, tie_embeddings=cfg.tie_embeddings and tied)
    try:
        model = empty(cfg)
    except ValueError as e:
        raise UserError(f"{dir}: {e}") from None
    params = by_expert(dict(model.named_parameters()))
    if fresh:
        tensors.pop(output, None)
        del params["score.weight"]
    elif cfg.tie_embeddings and {output, embedding} <= tensors.keys():
        if not torch.equal(tensors.pop(output), tensors[embedding]):
            raise UserError(
                f"{dir}: config.json ties the output matrix to the embedding, "
                f"but {output} differs from it; "
                f'set "tie_word_embeddings" to false if {output} is meant'
            )
    stored = places(cfg, params, bare)
    # `params` are on the meta device, and fused there they have the shapes of the file
    hollow = {name: [params[part] for part in parts] for name, (parts, _) in stored.items()}
    wanted = {name: layout.fuse(hollow[name], cfg).shape for name, (_, layout) in stored.items()}
    for name in packed.keys() & stored.keys():
        if stored[name][1].transposed:  # what is quantised is not
            tensors[name] = tensors[name].mT
    check_tensors(dir, wanted, tensors)

    dtype = dtype or tensors[embedding].dtype
    # the matrices of each linear layer, of which a stack of experts has many
    matrices = {
        layer: list(by_expert({f"{layer}.weight": model.get_submodule(layer).weight}))
        for layer in lora.linear_names(model)
    }
    # MXFP4 stays as it is only where the other layers are quantised.
    kept = {name for name, p in packed.items() if p.kind != "mxfp4" or method.kind != "none"}
    read = [parts for name, (parts, _) in stored.items() if name in kept or method.kind != "none"]
    quantised = {part for parts in read for part in parts}
    quantised &= {part for parts in matrices.values() for part in parts}
    # A stack of experts is filled part by part.
    stacks = {
        name: torch.empty(p.shape, dtype=dtype, device=device)
        for name, p in model.named_parameters()
        if name not in params and quantised.isdisjoint(by_expert({name: p}))
    }
    parts_of_stacks = by_expert(stacks)
    weights = dict(stacks)
    packed_parts = {}
    for name, (parts, layout) in stored.items():
        kind = torch.float32 if name == "score.weight" else dtype
        tensor = tensors[name]
        path = files.get(names.get(name))
        shapes = [p.shape for p in hollow[name]]
        if quantised.issuperset(parts):
            if name in packed:
                pieces = packed[name].split(layout, shapes, cfg)
            else:
                matrix = mapped(path, names[name]) if path else tensor
                pieces = layout.split(matrix, shapes, cfg)
                pieces = [quant.quantize(piece, method) for piece in pieces]
            pieces = [piece.to(device) for piece in pieces]
            packed_parts |= zip(parts, pieces, strict=True)
            continue
        if name in packed:
            pieces = (piece.dense(kind) for piece in packed[name].split(layout, shapes, cfg))
        else:
            if tensor.dtype != kind:
                tensor = converted(tensor, kind, path, names[name]) if path else tensor.to(kind)
            pieces = layout.split(tensor, shapes, cfg)
        for part, piece in zip(parts, pieces, strict=True):
            if part in parts_of_stacks:
                parts_of_stacks[part].copy_(piece)
            else:
                weights[part] = piece.to(device)
    for layer, parts in matrices.items():
        if quantised.isdisjoint(parts):
            continue
        try:
            quant.put(model, layer, [packed_parts.pop(part) for part in parts], method.kernel)
        except (KeyError, ValueError):
            raise UserError(
                f"{dir}: {layer} is quantised in part, or in several ways: give the original "
                "weights"
            ) from None
    for layer, module in quant.layers(model):
        weights |= {f"{layer}.{key}": t for key, t in module.packed().tensors.items()}
    if fresh:
        weights["score.weight"] = ScoreHead(cfg.width).weight.detach().to(device)
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
            said.append(f"{fault}: {some(names)}")
    if said:
        raise UserError(f"the tensors in {where} do not fit {what} - {'; '.join(said)}")


def some(names):
    """A few of the names, in words."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(sorted(names)[:4])}{more}"


def save_model(model, dir, dtype=None, like=None, tensors=None, shard_bytes=5e9, tok=None, **extra):
    """Transformer -> a model directory.

    dtype: of the file. None: as the model holds it. A score head keeps its own dtype.
    like: the directory that the model came from. What its config.json says beyond the architecture
    is kept. Its tokenizer files and generation_config.json are copied.
    tensors: {name: tensor}, the weights where the model does not hold them whole (sharded over
    ranks).
    tok: the Tokenizer that the model was trained with. Its files are copied instead, and its chat
    template may be another than theirs. A score model pads with a token that ends no completion.
    extra: keys of config.json to set.
    config.json comes last, because a directory without it is no model."""
    dir = Path(dir)
    tensors = tensors or dict(model.named_parameters())
    stored_as = str(dtype or tensors[EMBEDDING].dtype).removeprefix("torch.")
    cfg = model.cfg
    if scores := tok and cfg.head == "score":
        _, extra["pad_token_id"] = tok.padding()
        # The token may be a new one, which nothing but padding needs.
        cfg = replace(cfg, vocab_size=max(cfg.vocab_size, extra["pad_token_id"] + 1))
    config = config_json(cfg, like, **{"torch_dtype": stored_as} | extra)

    def stored():
        params = by_expert(tensors)
        for name, (parts, layout) in places(cfg, params).items():
            kind = None if name == "score.weight" else dtype
            pieces = [params[part].detach().to(dtype=kind) for part in parts]
            if parts == [EMBEDDING] and len(pieces[0]) < cfg.vocab_size:
                pieces = [F.pad(pieces[0], (0, 0, 0, cfg.vocab_size - len(pieces[0])))]
            yield name, layout.fuse(pieces, cfg)

    write_tensors(stored(), dir, shard_bytes=shard_bytes)
    if tok or like:
        tokenizer.copy_files(tok.dir if tok else like, dir)
    # An adapter with a tokenizer of its own has seldom a generation_config.json.
    other = tok and like and tok.dir.resolve() != Path(like).resolve()
    generation = dir / "generation_config.json"
    if other and not generation.exists() and (Path(like) / generation.name).exists():
        write_json(generation, read_json(Path(like) / generation.name))
    if tok and (tok.adopted or other):
        write_ends(tok, dir, config)
    if tok and tok.adopted:
        write_template(tok, dir)
    if scores:
        tokenizer.write_padding(tok, dir)
    write_json(dir / "config.json", config)
    # an earlier run with lora_rank= may have left an adapter here
    for name in ("adapter_config.json", "adapter_model.safetensors", "score_scale.json"):
        (dir / name).unlink(missing_ok=True)


def write_template(tok, dir):
    """Makes the chat template of `tok` that of the directory."""
    write_text(dir / "chat_template.jinja", tok.chat_template)
    settings = read_json(dir / "tokenizer_config.json", missing={})
    if "chat_template" in settings:  # not every program looks for the .jinja first
        del settings["chat_template"]
        write_json(dir / "tokenizer_config.json", settings, ensure_ascii=False)


def write_ends(tok, dir, config):
    """Makes the tokens that end a turn the stop ids in a model directory's generation_config.json.

    config: the model's config.json, which gives the other token ids where there is no such file."""
    ids = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    if "decoder_start_token_id" in config:
        ids["decoder_start_token_id"] = config["decoder_start_token_id"]
    generation = read_json(dir / "generation_config.json", missing=ids)
    ends = sorted(tok.stop_ids, key=lambda id: id != tok.eos_id)  # EOS first
    write_json(dir / "generation_config.json", generation | {"eos_token_id": ends})


class ScoreScale(TypedDict, total=False):
    reward_gain: float
    reward_bias: float
    prompt_template: str | None


def read_score_scale(dir):
    """(gain, bias) of a reward model's or score adapter's directory, (1.0, 0.0) where none were
    fitted.

    gain * score + bias has mean 0 and variance 1 over the responses of the policy that the reward
    model was trained for. An adapter keeps them in score_scale.json."""
    values = read_score_keys(dir)
    return float(values.get("reward_gain", 1.0)), float(values.get("reward_bias", 0.0))


def read_score_keys(dir):
    """What a reward model's or score adapter's directory says beside the architecture."""
    values = {}
    for name in ("config.json", "score_scale.json"):
        values |= read_json(Path(dir) / name, missing={}, kind=ScoreScale)
    return values


# --- PEFT directories -------------------------------------------------------------------------

PREFIX = "base_model.model."
# <layer>.lora_A.weight and the like; a magnitude may come without .weight
LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Extras:
    """What an adapter directory holds beside the low-rank adapters of the blocks.

    It is put into the weights of the model when the adapter is read, and is not trained further.
    So the adapter is saved again with the same tensors."""

    tensors: dict  # {name in the file: tensor}
    shapes: dict  # {embedding or output layer: (rank, scale)} of low-rank adapters there
    settings: dict  # keys of adapter_config.json


def extras_of(model):
    """The Extras of the adapter that was read into the model, or None."""
    return getattr(model, "extras", None)


def adapter_places(model):
    """Which layers of a file may carry adapters: {layer in the file: ([names here], Layout)}.

    A layer that the family's files fuse has several names here. Stacks of experts are not among
    them."""
    names = [name for name in lora.target_names(model) if not lora.is_stack(name)]
    stored = places(model.cfg, [f"{name}.weight" for name in names])
    return {
        layer.removesuffix(".weight"): ([part.removesuffix(".weight") for part in parts], layout)
        for layer, (parts, layout) in stored.items()
    }


def adapter_stacks(model):
    """Which stacks of experts may carry adapters: {name in the file: (name here, Stack)}."""
    return stack_places(model.cfg, filter(lora.is_stack, lora.target_names(model)))


def save_adapter(model, dir, name="default", base="", tensors=None, tok=None):
    """Writes the adapter `name` as a PEFT directory. KeyError if the model has none of that name.

    A trained head (`score`) goes along in full, as modules_to_save.
    base: the model directory that the adapter belongs to, which adapter_config.json names.
    tensors: {name: tensor} where they are gathered already (sharded training). None: the model's.
    tok: the Tokenizer trained with. Its files go along if they are not the base's or if the adapter
    is that of a score model (see save_model), and its chat template if it is not the files' own.

    There is one file of any size, because peft reads no shards."""
    dir = Path(dir)
    layers = {n: m for n, m in lora.adapted(model) if name in m.scales}
    extras = extras_of(model) or Extras({}, {}, {})
    if not layers and not extras.tensors:
        raise KeyError(f"there is no adapter {name!r} on this model")
    tensors = tensors or dict(model.named_parameters())
    stored = adapter_places(model)
    out = {}
    shapes = dict(extras.shapes)  # {layer in the file: (rank, scale)}
    for layer, (parts, layout) in stored.items():
        if adapter := fused(model, name, layers, tensors, parts, layout):
            A, B, magnitude, scale = adapter
            out[f"{PREFIX}{layer}.lora_A.weight"] = A
            out[f"{PREFIX}{layer}.lora_B.weight"] = B
            if magnitude is not None:
                out[f"{PREFIX}{layer}.lora_magnitude_vector"] = magnitude
            shapes[layer] = len(A), scale
    stacks = adapter_stacks(model)
    adapted_stacks = [stack for stack, (part, _) in stacks.items() if part in layers]
    for stack in adapted_stacks:
        part, layout = stacks[stack]
        A, B = (tensors[f"{part}.lora_{half}.{name}"].detach().float().cpu() for half in "AB")
        key = PREFIX + adapters.nested(stack, adapted_stacks)
        out[f"{key}.lora_A.weight"] = A.flatten(0, 1)
        # peft reads it as (out, r, E)
        B = layout.fuse_rows([B.flatten(0, 1)], model.cfg)
        out[f"{key}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1)
        shapes[stack] = A.shape[1], layers[part].scales[name]
    score = "score.weight" in tensors
    if score:
        out[PREFIX + "score.weight"] = tensors["score.weight"]
    modules = sorted(shapes.keys() - stacks.keys())
    rank = Counter(rank for rank, _ in shapes.values()).most_common(1)[0][0]
    alphas = {layer: rank * scale for layer, (rank, scale) in shapes.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    saved = [*extras.settings.get("modules_to_save", ()), *(["score"] if score else [])]
    config = extras.settings | dict(  # other keys have peft's defaults
        peft_type="LORA",
        task_type="SEQ_CLS" if score else "SEQ_2_SEQ_LM" if model.start_ids else "CAUSAL_LM",
        base_model_name_or_path=str(base),
        r=rank,
        lora_alpha=alpha,
        rank_pattern=patterns({layer: r for layer, (r, _) in shapes.items()}, rank),
        alpha_pattern=patterns(alphas, alpha),
        use_dora=any(name in m.lora_magnitude for m in layers.values()),
        lora_dropout=max((m.dropouts[name] for m in layers.values()), default=0.0),
        target_modules=suffixes(modules, stored),
        target_parameters=suffixes(adapted_stacks, stacks, count=3) or None,
        modules_to_save=saved or None,
        bias=extras.settings.get("bias", "none"),
        fan_in_fan_out=any(layout.transposed for _, layout in stored.values()),
        inference_mode=True,
    )
    write_tensors((out | extras.tensors).items(), dir, name="adapter_model", shard_bytes=math.inf)
    (dir / "adapter_model.bin").unlink(missing_ok=True)
    if tok and (score or tok.dir.resolve() != Path(base).resolve()):
        tokenizer.copy_files(tok.dir, dir)
    elif not tok or tok.dir.resolve() != dir.resolve():
        for path in tokenizer.files_of(dir):
            path.unlink()
    if tok and tok.adopted:
        write_template(tok, dir)
    if tok and score:
        tokenizer.write_padding(tok, dir)
    write_json(dir / "adapter_config.json", config)
    # an earlier run without lora_rank= may have left a whole model here
    for path in (dir / "config.json", *dir.glob("model*.safetensors*")):
        path.unlink(missing_ok=True)


def fused(model, name, layers, tensors, parts, layout):
    """The adapter `name` of a layer in the file, whose modules here are `parts`.

    layers: {name: LoRA}. tensors: {name: tensor}. Returns (A, B, magnitude or None, scale), or None
    if no part has the adapter. Parts that share A share its rows in the file. Otherwise A is
    stacked, and B has zeros where a row serves another part, so that each part keeps its product.
    """
    adapted = [part for part in parts if part in layers]
    if not adapted:
        return None

    def get(kind, part):
        return tensors[f"{part}.{kind}.{name}"].detach().float().cpu()

    As = {part: get("lora_A", part) for part in adapted}
    different = []
    for A in As.values():
        if not any(torch.equal(A, other) for other in different):
            different.append(A)

    def block(part, A):
        if part in As and torch.equal(As[part], A):
            return get("lora_B", part)
        return torch.zeros(model.get_submodule(part).out_features, len(A))

    Bs = [torch.cat([block(part, A) for A in different], dim=1) for part in parts]
    B = layout.fuse_rows(Bs, model.cfg)
    module = layers[adapted[0]]
    magnitude = None
    if name in module.lora_magnitude:
        magnitude = layout.fuse_rows([get("lora_magnitude", part) for part in parts], model.cfg)
    return torch.cat(different), B, magnitude, module.scales[name]


def suffixes(layers, places, count=1):
    """The last `count` parts of the names of layers, sorted, if these name no others of `places`.
    Else the names."""

    def ending(layer):
        return ".".join(layer.split(".")[-count:])

    endings = {ending(layer) for layer in layers}
    whole = all(layer in layers for layer in places if ending(layer) in endings)
    return sorted(endings if whole else layers)


def patterns(values, default):
    """rank_pattern or alpha_pattern of {layer in the file: number}. Where all layers of a name have
    the same number, the name stands for them."""
    out = {}
    for layer, value in values.items():
        leaf = layer.rpartition(".")[2]
        same = {other for name, other in values.items() if name.rpartition(".")[2] == leaf}
        if value != default:
            out[leaf if len(same) == 1 else layer] = value
    return out


def read_adapter_tensors(dir):
    """The tensors of an adapter directory: ({plain name: tensor}, {plain name: name in the file}).

    A plain name has no prefix and does not say how peft wraps the module. It is that of the stack
    in adapters of experts."""
    targets = read_adapter_config(dir).get("target_parameters") or []
    if (Path(dir) / "adapter_model.bin").exists() and not any(Path(dir).glob("*.safetensors*")):
        tensors = load_pickle(Path(dir) / "adapter_model.bin")
    else:
        tensors = read_tensors(dir, name="adapter_model")
    keys = {}
    for key in tensors:
        stem = adapters.unnested(key.removeprefix(PREFIX), targets)
        stem = WRAPPED.sub("", stem)
        keys[LOW_RANK.sub(r"\1.\2", stem)] = key
    return {stem: tensors[key] for stem, key in keys.items()}, keys


class AdapterFile:
    """What a PEFT directory holds, checked against a model.

    .linears      {layer of the blocks, as the file names it: ([names here], Layout)}
    .stacks       {stack of experts, as the file names it: (name here, Stack)}
    .vocabulary   the file's names of the embedding and, in a language model, the output matrix
    .count        how many tokens there are: more than the base has, if the file adds some
    .stored       {parameter, as the file names it: ([names here], Layout)}
    .tensors      {plain name: tensor}, see read_adapter_tensors
    .shapes       {layer: (rank, scale)} of the low-rank adapters in the file
    .rows         {layer of .vocabulary: ids of its trained rows}
    """

    def __init__(self, model, dir):
        """UserError for a file that is incomplete or of another base's adapter."""
        self.dir = dir
        self.config = config = read_adapter_config(dir)
        self.tensors, self.keys = read_adapter_tensors(dir)
        self.scorer = config.get("task_type") == "SEQ_CLS"
        if self.scorer and not hasattr(model, "score"):
            raise UserError(
                f"{dir} is an adapter of a score model, and a language model is needed here"
            )
        self.linears, self.stacks = adapter_places(model), adapter_stacks(model)
        names = [n.replace(".base.", ".") for n, _ in model.named_parameters() if ".lora_" not in n]
        self.stored = places(model.cfg, [n for n in names if not lora.is_stack(n)])
        (embedding,) = places(model.cfg, [EMBEDDING])
        self.vocabulary = [embedding.removesuffix(".weight")]
        if not self.scorer:
            self.vocabulary.append("lm_head")
        self.check_complete()
        if model.cfg.head == "score" and not self.scorer:
            # The output matrix of a language model stays behind, as that of the base does.
            self.vocabulary.pop()
            kept = {n: t for n, t in self.tensors.items() if not n.startswith("lm_head.")}
            self.tensors = kept
        self.check_tensors(model)

    def weight(self, layer):
        return self.tensors.get(f"{layer}.weight")

    def has_adapter(self, layer):
        return any(name.startswith(f"{layer}.lora_") for name in self.tensors)

    def saves(self, layer):
        return adapters.saves(self.config, layer)

    def check_complete(self):
        """UserError unless the file has what adapter_config.json names, and adapters of no layer
        that is not named there."""
        for target in self.config.get("target_parameters") or []:
            if not any(ends_with(stack, [target]) for stack in self.stacks):
                raise UserError(
                    f"{self.dir}: target_parameters in adapter_config.json names {target}, and the "
                    "model has no experts of that name"
                )
        layers = [*self.linears, *self.vocabulary]
        adapted = {layer for layer in [*layers, *self.stacks] if self.has_adapter(layer)}
        named = adapters.targeted(self.config, layers, self.stacks)
        named = adapted if named is None else named
        if self.config.get("ensure_weight_tying") and self.vocabulary[0] in named:
            named |= adapted & {"lm_head"}
        missing = named - adapted
        modules = [name.rpartition(".")[0] for name in self.tensors]
        for name in self.config.get("modules_to_save") or []:
            alone = {"modules_to_save": [name]}
            if not any(adapters.saves(alone, module) for module in modules):
                missing.add(name)
        if self.scorer:
            missing -= {"classifier", "score"}  # peft names both, whichever the model has
            missing |= {"score.weight"} - self.tensors.keys()
        for name in self.stored:
            layer, _, leaf = name.rpartition(".")
            which = self.config.get("bias")
            if leaf == "bias" and (which == "all" or which == "lora_only" and layer in adapted):
                missing |= {name} - self.tensors.keys()
        if missing:
            raise UserError(
                f"{self.dir} is incomplete, or of an adapter for another base: its "
                f"adapter_config.json names {some(missing)}, which is not in its adapter_model"
            )
        if unnamed := adapted - named:
            raise UserError(
                f"{self.dir}: its adapter_model adapts {some(unnamed)}, which target_modules in "
                "adapter_config.json does not name: one of the two files is of another adapter"
            )

    def check_tensors(self, model):
        """UserError unless the tensors have names and shapes that fit the model."""
        dim, config = model.cfg.width, self.config
        self.count = model.cfg.vocab_size
        whole = [self.weight(layer) for layer in self.vocabulary if self.weight(layer) is not None]
        if whole and (model.cfg.tie_embeddings or len(whole) == len(self.vocabulary)):
            self.count = len(whole[0]) if whole[0].dim() else 0
        self.rows = self.token_rows()
        wanted = {f"{layer}{TOKENS}": (len(ids), dim) for layer, ids in self.rows.items()}
        for layer in self.vocabulary:
            if self.weight(layer) is not None:
                wanted[f"{layer}.weight"] = (self.count, dim)
        self.shapes = {}
        for layer in filter(self.has_adapter, (*self.linears, *self.stacks, *self.vocabulary)):
            rank, _ = self.shapes[layer] = adapters.shape(config, layer)
            if layer in self.stacks:
                stack = model.get_submodule(self.stacks[layer][0])
                outs, ins = stack.out_features, stack.in_features
                rank *= stack.experts
            elif layer in self.linears:
                modules = [model.get_submodule(part) for part in self.linears[layer][0]]
                outs, ins = sum(m.out_features for m in modules), modules[0].in_features
                if config.get("use_dora"):
                    wanted[f"{layer}.lora_magnitude_vector"] = (outs,)
            elif config.get("use_dora"):
                raise UserError(f"{self.dir}: use_dora is not supported for {layer}")
            else:
                outs, ins = self.count, dim
            if layer == self.vocabulary[0]:
                wanted[f"{layer}.lora_embedding_A"] = (rank, outs)
                wanted[f"{layer}.lora_embedding_B"] = (ins, rank)
            else:
                wanted[f"{layer}.lora_A"] = (rank, ins)
                wanted[f"{layer}.lora_B"] = (outs, rank)
        for name in self.tensors.keys() & self.stored.keys() - wanted.keys():
            parts, layout = self.stored[name]
            hollow = [torch.empty_like(parameter(model, part), device="meta") for part in parts]
            wanted[name] = layout.fuse(hollow, model.cfg).shape
        what = (
            "the model: they are incomplete, of an adapter for another base, or of a kind that is "
            "not read here"
        )
        check_tensors(self.dir, wanted, self.tensors, what)
        if not self.tensors.keys() - {"score.weight"}:
            raise UserError(f"{self.dir}: its adapter_model is empty")

    def token_rows(self):
        """trainable_token_indices as {layer of .vocabulary: ids}."""
        value = self.config.get("trainable_token_indices") or {}
        if isinstance(value, list):
            value = {self.vocabulary[0]: value}
        out = {}
        for name, ids in value.items():
            layers = [layer for layer in self.vocabulary if ends_with(layer, [name])]
            if any(id >= self.count for id in ids):
                raise UserError(
                    f"{self.dir}: trainable_token_indices in adapter_config.json has ids beyond "
                    f"the {self.count} tokens of the model"
                )
            out |= dict.fromkeys(layers, ids)
        return out

    def change_base(self, model):
        """Puts what the file holds beside adapters of the blocks into the weights of the model, and
        keeps it as model.extras."""
        blocks = {"score.weight"}
        for layer in (*self.linears, *self.stacks):
            blocks |= {f"{layer}.{kind}" for kind in ("lora_A", "lora_B", "lora_magnitude_vector")}
        extra = self.tensors.keys() - blocks
        if not extra:
            return
        if lora.adapted(model):
            raise UserError(f"{self.dir} changes weights of its base, which other adapters share")
        for name in extra & self.stored.keys() - {f"{layer}.weight" for layer in self.vocabulary}:
            parts, layout = self.stored[name]
            params = [parameter(model, part) for part in parts]
            shapes = [param.shape for param in params]
            pieces = layout.split(self.tensors[name], shapes, model.cfg)
            for param, piece in zip(params, pieces, strict=True):
                param.data = piece.to(param, copy=True)
        self.change_vocabulary(model)
        modules = {name.rpartition(".")[0] for name in extra}
        saved = self.config.get("modules_to_save") or []
        kept = [
            n for n in saved if any(adapters.saves({"modules_to_save": [n]}, m) for m in modules)
        ]
        model.extras = Extras(
            {self.keys[name]: self.tensors[name] for name in extra},
            {layer: self.shapes[layer] for layer in self.vocabulary if layer in self.shapes},
            dict(
                modules_to_save=kept,
                bias=self.config.get("bias") or "none",
                trainable_token_indices=self.rows or None,
                ensure_weight_tying=bool(self.config.get("ensure_weight_tying")),
            ),
        )

    def change_vocabulary(self, model):
        """Puts what the file says of the embedding and the output matrix into them.

        As in peft, an embedding that is adapted or saved alone leaves the output matrix of a tied
        model as it is, which is then no longer tied. Trained rows of tokens are rows of both."""
        cfg, table = model.cfg, model.model["embed_tokens"]
        embedding, *heads = self.vocabulary
        tied = cfg.tie_embeddings and bool(heads)
        new = {embedding: self.tensors.get(f"{embedding}.weight", table.weight)}
        for head in heads:
            both = tied and not self.saves(embedding)
            old = new[embedding] if both else model.head_weight
            new[head] = self.tensors.get(f"{head}.weight", old)
        for layer in new.keys() & self.shapes.keys():
            kind = "lora_embedding_" if layer == embedding else "lora_"
            A, B = (self.tensors[f"{layer}.{kind}{half}"].float() for half in "AB")
            change = self.shapes[layer][1] * (B @ A)
            new[layer] = new[layer].float() + (change.t() if layer == embedding else change)
        for layer in new:
            source = layer if layer in self.rows else embedding
            if source in self.rows and (tied or source == layer):
                new[layer] = new[layer].float().clone()
                new[layer][self.rows[source]] = self.tensors[f"{source}{TOKENS}"].float()
        for layer, matrix in new.items():
            new[layer] = nn.Parameter(
                matrix.detach().to(table.weight.detach()), requires_grad=False
            )
        table.weight = new[embedding]
        for head in heads:
            if not tied or not torch.equal(new[head], new[embedding]):
                model.lm_head = nn.Linear(cfg.width, self.count, bias=False, device="meta")
                model.lm_head.weight = new[head]
                tied = False
        tied = tied if heads else cfg.tie_embeddings
        model.cfg = replace(cfg, vocab_size=self.count, tie_embeddings=tied)

    def add(self, model, name):
        """Puts the adapters of the blocks on the model."""
        new = dict(dtype=torch.float32, device=model.model["embed_tokens"].weight.device, copy=True)
        for layer in self.shapes.keys() & self.linears.keys():
            parts, layout = self.linears[layer]
            A, B = self.tensors[f"{layer}.lora_A"], self.tensors[f"{layer}.lora_B"]
            widths = [model.get_submodule(part).out_features for part in parts]
            magnitude = self.tensors.get(f"{layer}.lora_magnitude_vector")
            Bs = layout.split_rows(B, widths, model.cfg)
            magnitudes = [None] * len(parts)
            if magnitude is not None:
                magnitudes = layout.split_rows(magnitude, widths, model.cfg)
            for part, b, m in zip(parts, Bs, magnitudes, strict=True):
                keep = ranks_of(A, B, b)
                if m is not None:
                    m = m.to(**new)
                    keep[0] |= not keep.any()
                if keep.any():
                    a, b = A[keep].to(**new), b[:, keep].to(**new)
                    lora.wrap(model, part).put(name, a, b, self.shapes[layer][1], magnitude=m)
        for layer in self.shapes.keys() & self.stacks.keys():
            part, layout = self.stacks[layer]
            rank, scale = self.shapes[layer]
            A, B = self.tensors[f"{layer}.lora_A"], self.tensors[f"{layer}.lora_B"]
            B = B.unflatten(1, (rank, -1)).permute(2, 0, 1)  # (E, out, r)
            (B,) = layout.split_rows(B, [len(B) * B.shape[1]], model.cfg)
            A, B = (t.unflatten(0, (model.cfg.n_experts, -1)).to(**new) for t in (A, B))
            lora.wrap(model, part).put(name, A, B.contiguous(), scale)


def load_adapter(model, dir, name="default"):
    """Reads a PEFT directory into the adapter `name`, which becomes the active one.

    The low-rank adapters of the blocks are trainable, and the dropout that they were trained with
    is left out: RL trains them further, and must see the same probabilities twice. The adapter of a
    layer that the family's files fuse becomes adapters of its parts. All else that the directory
    holds (see Extras) replaces weights of the model. UserError for another base's adapter."""
    file = AdapterFile(model, dir)
    file.change_base(model)
    if not lora.adapted(model):
        model.requires_grad_(False)
    file.add(model, name)
    if file.scorer:
        model.score.weight.data.copy_(file.tensors["score.weight"])
    if lora.adapted(model):
        lora.use(model, name)


def parameter(model, name):
    """The parameter of that name in a model whose layers may be adapted."""
    layer, _, leaf = name.rpartition(".")
    module = model.get_submodule(layer)
    return getattr(module.base if isinstance(module, lora.LoRA) else module, leaf)


def ranks_of(A, B, part):
    """Which rows of A (r, in) serve a part (n, r) of the rows of B (out, r): bool (r,).

    A layer that was saved as parts with adapters of their own has zeros in B where a row of A
    serves another part. They are left out, so that the rank does not grow from save to save."""
    used, idle = (part != 0).any(0), ~(B != 0).any(0)
    return used | idle & (A != 0).any(1)


def only_blocks(dir):
    """Whether an adapter directory holds nothing but adapters of the blocks, and a score head. Such
    an adapter can share its base with others."""
    tensors, _ = read_adapter_tensors(dir)
    ours = re.compile(r"score\.weight|.*\.\d+\..*\.(lora_A|lora_B|lora_magnitude_vector)")
    return all(ours.fullmatch(stem) for stem in tensors)


def load_scorer(model, dir, name):
    """Reads a score adapter (reward.py's) into the adapter `name` of a language model.

    Returns its head, a model.ScoreHead. UserError for an adapter of a language model."""
    if not is_scorer(dir):
        raise UserError(f"{dir} is an adapter of a language model, not of a score model")
    model.score = ScoreHead(model.cfg.width).to(model.model["embed_tokens"].weight.device)
    load_adapter(model, dir, name)
    head = model.score
    del model.score
    return head


def add_adapter(model, cfg, name="default", dropout=None):
    """Puts a new adapter on the model by the lora_* keys of a stage's Config, or goes on with the
    adapter `name` that it has.

    UserError for what lora.apply refuses, and for keys that contradict the adapter that is there.
    """
    dropout = cfg.lora_dropout if dropout is None else dropout
    layers = [m for _, m in lora.adapted(model) if name in m.scales]
    if not layers:
        try:
            lora.apply(
                model,
                cfg.lora_rank,
                cfg.lora_alpha,
                dropout,
                cfg.lora_targets,
                name,
                cfg.lora_rslora,
            )
        except ValueError as e:
            raise UserError(str(e)) from None
        return
    rank = max(len(m.lora_A[name]) for m in layers)
    if cfg.lora_rank != rank:
        raise UserError(
            f"the adapter in model= has rank {rank} and is trained further with it: "
            f"give lora_rank={rank}, or merge it first (python -m prepare.weights)"
        )
    for key in ("lora_alpha", "lora_targets", "lora_rslora"):
        if getattr(cfg, key) != getattr(type(cfg), key):
            raise UserError(
                f"{key}= cannot change the adapter in model=, which is trained further: leave it "
                "out, or merge the adapter first (python -m prepare.weights)"
            )
    for layer in layers:
        try:
            layer.set_dropout(name, dropout)
        except ValueError as e:
            raise UserError(str(e)) from None


# --- a directory of either kind -----------------------------------------------------------------


@dataclass
class Opened:
    model: Transformer
    tok: tokenizer.Tokenizer
    base: Path  # the model directory that holds config.json


def open(
    dir,
    base=None,
    device="cpu",
    dtype=None,
    head=None,
    merge=False,
    template=None,
    name="default",
    method=quant.NONE,
):
    """Opens a model directory or an adapter directory with its tokenizer -> Opened.

    base: takes the place of the base that the adapter names, in memory. No file is changed.
    dtype, head: as in load_model. An adapter of a score model opens as a score model.
    merge: an adapter is added to its base, by default in fp32. A whole model stays its file,
    memory-mapped. On a quantised base the adapter stays beside it, because the sum has no exact
    quantised form.
    template: as in tokenizer.load.
    name: of the adapter, if it is not merged.
    method: as in load_model."""
    place = base_of(dir, base)
    adapter = is_adapter(dir)
    if adapter and head is None and is_scorer(dir):
        head = "score"
    if adapter and merge:
        dtype = dtype or torch.float32
    model = load_model(place, device, dtype, head, method=method)
    if adapter:
        load_adapter(model, dir, name)
    if merge and not quant.layers(model):
        lora.merge(model)
        model.extras = None
    tok = tokenizer.load(dir, template, base=base)
    tok.check_embeddings(model.cfg.vocab_size, place)
    return Opened(model, tok, place)
