"""Model families: config.json <-> ModelConfig, and tensors in files <-> parameters.

A family is an entry of FAMILIES. Its tables hold what tables can say, and two functions do the
rest. A family whose files name, fuse and lay out tensors as this model does needs no `tensors`."""

import difflib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import torch

from nano.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UserError
from nano.files import check_json, no_model_directory, read_json, recover_dir
from nano.vocab import TokenIds

# --- tensors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a layer of a file holds one or several layers of this model."""

    # q, k and v are interleaved: of one key/value head after another, its query heads, its key, its
    # value. Otherwise the rows (outputs) of one layer follow those of the other.
    by_head: bool = False
    # The weight is the transpose of a linear layer's, as in GPT-2's Conv1D.
    transposed: bool = False

    def split(self, tensor, shapes, cfg):
        """A weight or bias of the file -> those of the layers here, of these shapes. It stays
        memory-mapped where the file holds rows one after another."""
        if self.transposed and tensor.dim() > 1:
            tensor = tensor.t().contiguous()
        return self.split_rows(tensor, [shape[0] for shape in shapes], cfg)

    def fuse(self, parts, cfg):
        """Undoes `split`."""
        tensor = self.fuse_rows(parts, cfg)
        return tensor.t() if self.transposed and tensor.dim() > 1 else tensor

    def split_rows(self, tensor, counts, cfg):
        """Any tensor with a row for each output of the file's layer -> one for each layer here, of
        `counts` rows."""
        if not self.by_head:
            return tensor.split(counts)
        per_head = tensor.unflatten(0, (cfg.n_kv_heads, -1, cfg.head_dim))
        q, k, v = per_head.split((cfg.n_heads // cfg.n_kv_heads, 1, 1), dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)

    def fuse_rows(self, parts, cfg):
        """Undoes `split_rows`."""
        if self.by_head:
            heads = [part.unflatten(0, (cfg.n_kv_heads, -1, cfg.head_dim)) for part in parts]
            return torch.cat(heads, dim=1).flatten(0, 2)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class Stack(Layout):
    """A tensor of the file holds the matrices or biases of all experts: (E, out, in) or (E, out).
    With `transposed` a matrix is (in, out)."""

    interleaved: bool = False  # the outputs alternate between gate and up

    def split(self, tensor, shapes, cfg):
        if self.transposed and tensor.dim() > 2:
            tensor = tensor.mT
        return self.split_rows(tensor, [shape[0] for shape in shapes], cfg)

    def fuse(self, parts, cfg):
        tensor = self.fuse_rows(parts, cfg)
        return tensor.mT if self.transposed and tensor.dim() > 2 else tensor

    def split_rows(self, tensor, counts, cfg):
        """tensor (E, out, ...) -> that of each layer of each expert, of `counts` outputs."""
        if self.interleaved:
            tensor = tensor.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return tensor.flatten(0, 1).split(counts)

    def fuse_rows(self, parts, cfg):
        tensor = torch.cat(parts).unflatten(0, (cfg.n_experts, -1))
        if self.interleaved:
            tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return tensor


ROWS = Layout()
CONV1D = Layout(transposed=True)
BY_HEAD = Layout(by_head=True)


def by_expert(params):
    """{name: parameter} with a stack of experts in parts, which share its memory: the matrices and
    biases of each expert, under the names of linear layers."""
    out = {}
    for name, p in params.items():
        experts, _, leaves = name.rpartition(".experts.")
        if not experts:
            out[name] = p
            continue
        stack, _, leaf = leaves.partition(".")
        layers = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
        for i, part in enumerate(p.unbind()):
            for layer, piece in zip(layers, part.chunk(len(layers)), strict=True):
                out[f"{experts}.experts.{i}.{layer}.{leaf}"] = piece
    return out


def places(cfg, names, bare=False):
    """Where a file of the family keeps the parameters `names`.

    bare: the file leaves out the family's prefix. Returns {name in the file: ([names here],
    Layout)}."""
    family = FAMILIES[cfg.family]
    table = family.tensors(cfg) if callable(family.tensors) else family.tensors
    out = {}
    for name in names:
        stored = renamed(name, table) or name
        kinds = (NUMBER.sub(".{}", key) for key in (stored, stored.rpartition(".")[0]))
        layout = next((family.layouts[key] for key in kinds if key in family.layouts), ROWS)
        if bare:
            stored = stored.removeprefix(family.prefix)
        out.setdefault(stored, ([], layout))[0].append(name)
    return out


def stack_places(cfg, names):
    """What transformers calls the stacks of experts `names`, in memory and in adapters: {name
    there: (name here, Stack)}. Its files may hold the experts one by one."""
    family = FAMILIES[cfg.family]
    out = {}
    for name in names:
        there = name.replace(".mlp.experts.", f".{family.experts}.")
        layout = family.layouts.get(NUMBER.sub(".{}", there), Stack())
        out[there] = name, layout
    return out


NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def renamed(name, table):
    """The new name of a tensor by a table of modules or tensors, {old: new}, in which {} stands for
    a number.

    None if the table does not have it."""
    module, _, leaf = name.rpartition(".")
    for old, end in ((name, ""), (module, f".{leaf}")):
        if new := table.get(NUMBER.sub(".{}", old)):
            return new.format(*NUMBER.findall(old)) + end


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
    aliases: dict = field(default_factory=dict)  # another spelling of a key -> the key
    # module here -> module in the file; a function of ModelConfig where one dict will not do
    tensors: dict | Callable = field(default_factory=dict)
    layouts: dict = field(default_factory=dict)  # module in the file -> Layout other than ROWS
    prefix: str = ""  # of modules in the file; a file of the bare trunk leaves it out
    experts: str = "mlp.experts"  # the module of a layer that has them in transformers
    ignored: str = r"\.rotary_emb\.inv_freq$"  # regex of constants that old files hold
    module: str = "model"  # which has its ModelConfig
    # transformers 5 ties the output matrix in all configurations, and a file that has one of its
    # own is not tied all the same
    head_by_file: bool = False

    @property
    def config(self):
        return importlib.import_module(self.module).ModelConfig


def read_llama(c, fields):
    return read_rope(c) | {"activation": read_activation(c, "hidden_act")}


def write_llama(cfg):
    return write_rope(cfg) | {"hidden_act": activation_name(cfg)}


def read_mistral(c, fields):
    return read_llama(c, fields) | one_window(c, fields)


def write_mistral(cfg):
    return write_llama(cfg) | write_window(cfg)


def read_qwen(c, fields):
    out = read_llama(c, fields)
    if not c.get("use_sliding_window"):
        return out
    layers, full = fields["n_layers"], c["max_window_layers"]
    kinds = layer_types(c, [FULL if i < full else SLIDING for i in range(layers)])
    return out | windows_of(c, kinds)


def write_qwen(cfg):
    window = max(cfg.windows, default=0)
    out = write_llama(cfg) | {"use_sliding_window": window > 0}
    if window:
        first = cfg.windows.index(window)
        out |= {"sliding_window": window, "max_window_layers": first}
        if 0 in cfg.windows[first:]:
            out |= write_windows(cfg)
    return out


def read_gemma2(c, fields):
    refuse(c, ["use_bidirectional_attention"])
    kinds = layer_types(c, [FULL if i % 2 else SLIDING for i in range(fields["n_layers"])])
    return read_rope(c) | windows_of(c, kinds) | read_gemma(c, fields)


def write_gemma2(cfg):
    return write_rope(cfg) | write_windows(cfg) | write_gemma(cfg)


def read_gemma3(c, fields):
    refuse(c, ["use_bidirectional_attention"])
    every = c.get("sliding_window_pattern") or 6
    layers = range(1, fields["n_layers"] + 1)
    kinds = layer_types(c, [SLIDING if i % every else FULL for i in layers])
    ropes = read_ropes(c, kinds, c.get("rope_local_base_freq") or 10000.0)
    return ropes | windows_of(c, kinds) | read_gemma(c, fields)


def write_gemma3(cfg):
    local = {"rope_local_base_freq": cfg.rope_local_theta}
    return write_rope(cfg) | write_windows(cfg) | write_gemma(cfg) | local


def read_gemma(c, fields):
    return dict(
        activation=read_activation(c, "hidden_activation"),
        embed_scale=fields["dim"] ** 0.5,
        attn_scale=checked(c["query_pre_attn_scalar"], "query_pre_attn_scalar", int) ** -0.5,
        attn_cap=checked(c["attn_logit_softcapping"] or 0.0, "attn_logit_softcapping", float),
        logit_cap=checked(c["final_logit_softcapping"] or 0.0, "final_logit_softcapping", float),
    )


def write_gemma(cfg):
    return {
        "hidden_activation": activation_name(cfg),
        "query_pre_attn_scalar": round(cfg.attn_scale**-2) if cfg.attn_scale else cfg.head_dim,
        "attn_logit_softcapping": cfg.attn_cap or None,
        "final_logit_softcapping": cfg.logit_cap or None,
    }


def read_olmo3(c, fields):
    layers = range(1, fields["n_layers"] + 1)
    kinds = layer_types(c, [SLIDING if i % 4 else FULL for i in layers])
    activation = {"activation": read_activation(c, "hidden_act")}
    return read_ropes(c, kinds, c["rope_theta"]) | windows_of(c, kinds) | activation


def write_olmo3(cfg):
    # transformers 5 takes rope_theta for the layers without a window alone
    ropes = {
        kind: {"rope_type": "default", "rope_theta": cfg.rope_theta} for kind in (FULL, SLIDING)
    }
    ropes[SLIDING]["rope_theta"] = cfg.rope_local_theta
    return write_llama(cfg) | write_windows(cfg) | {"rope_parameters": ropes}


def read_smollm3(c, fields):
    layers = range(1, fields["n_layers"] + 1)
    every = c.get("no_rope_layer_interval") or 4
    rotated = c.get("no_rope_layers") or [int(i % every > 0) for i in layers]
    if len(rotated) < len(layers):
        raise UserError(f"no_rope_layers has {len(rotated)} numbers for {len(layers)} layers")
    kinds = ["global" if on else "none" for on, _ in zip(rotated, layers, strict=False)]
    out = read_llama(c, fields) | {"rope_layers": tuple(kinds)}
    if c.get("use_sliding_window") and c.get("sliding_window"):
        default = [FULL if kind == "global" else SLIDING for kind in kinds]
        out |= windows_of(c, layer_types(c, default))
    return out


def write_smollm3(cfg):
    kinds = cfg.rope_layers or ("global",) * cfg.n_layers
    return (
        write_llama(cfg)
        | write_windows(cfg)
        | {
            "no_rope_layers": [int(kind == "global") for kind in kinds],
            "use_sliding_window": any(cfg.windows),
        }
    )


def read_phi3(c, fields):
    rope = c.get("rope_scaling") or c.get("rope_parameters")
    if rope and rope_kind(rope) != "default":
        # the name in older files; transformers knows no other scaling here
        rope = rope | {"rope_type": "longrope"}
        rope["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    out = read_rope(c | {"rope_scaling": rope}, partial=True)
    return out | one_window(c, fields) | {"activation": read_activation(c, "hidden_act")}


def write_phi3(cfg):
    rope = dict(cfg.rope_scaling or {})
    original = rope.pop(ORIGINAL, cfg.max_positions)
    if rope:  # transformers 4 wants these names
        rope["type"] = rope.pop("rope_type")
    return write_mistral(cfg) | {
        "rope_scaling": rope or None,
        "partial_rotary_factor": cfg.rope_part,
        ORIGINAL: original,
    }


def read_ministral3(c, fields):
    out = read_mistral(c, fields)
    if (out["rope_scaling"] or {}).get("llama_4_scaling_beta") is None:
        raise UserError("rope_parameters without llama_4_scaling_beta are not supported")
    return out


def write_ministral3(cfg):
    rope = (cfg.rope_scaling or {}) | {"rope_theta": cfg.rope_theta}
    return {
        "hidden_act": activation_name(cfg),
        "rope_parameters": rope,
        "rope_scaling": None,
    } | write_window(cfg)


def read_granite(c, fields):
    scale = checked(c["logits_scaling"], "logits_scaling", float)
    if not scale:
        raise UserError("logits_scaling is 0")
    return read_llama(c, fields) | {"logit_scale": 1 / scale}


def write_granite(cfg):
    # 12 digits, because 1 / (1 / 13) need not be 13
    return write_llama(cfg) | {"logits_scaling": float(f"{1 / cfg.logit_scale:.12g}")}


def read_activation(c, key):
    """The field activation, from the key of config.json that names it."""
    if c[key] not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise UserError(f"{key} {c[key]!r} is not supported ({known} are)")
    return ACTIVATION_NAMES[c[key]]


def activation_name(cfg):
    return {ours: theirs for theirs, ours in reversed(ACTIVATION_NAMES.items())}.get(cfg.activation)


# what config.json calls an activation -> activation
ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def refuse(c, keys, value=True):
    """UserError if one of the keys has this value, which asks for what is not supported."""
    for key in keys:
        if c.get(key) is value:
            raise UserError(f"{key}={str(value).lower()} is not supported")


def all_heads(fields):
    """Fields of a family in which each query head has a key/value head of its own, and the heads
    share the width of the model."""
    heads = fields["n_heads"]
    return dict(n_kv_heads=heads, head_dim=fields["dim"] // heads)


def read_gpt2(c, fields):
    refuse(c, ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
    refuse(c, ["scale_attn_weights"], False)
    return all_heads(fields) | dict(
        ffn_dim=checked(c.get("n_inner") or 4 * fields["dim"], "n_inner", int),
        activation=read_activation(c, "activation_function"),
    )


def write_gpt2(cfg):
    return {"n_inner": cfg.ffn_dim, "activation_function": activation_name(cfg)}


def read_bigcode(c, fields):
    one = {"n_kv_heads": 1} if c["multi_query"] else {}
    return read_gpt2(c, fields) | one


def write_bigcode(cfg):
    return write_gpt2(cfg) | {"multi_query": cfg.n_kv_heads == 1}


def read_bloom(c, fields):
    refuse(c, ["apply_residual_connection_post_layernorm"])
    return all_heads(fields) | dict(ffn_dim=4 * fields["dim"])


def read_opt(c, fields):
    refuse(c, ["_remove_final_layer_norm"])
    width = checked(c.get("word_embed_proj_dim") or fields["dim"], "word_embed_proj_dim", int)
    bias = bool(c["enable_bias"])
    return all_heads(fields) | dict(
        norm="layer" if c["layer_norm_elementwise_affine"] else "layer_bare",
        norm_at="before" if c["do_layer_norm_before"] else "sum",
        embed_dim=0 if width == fields["dim"] else width,
        activation=read_activation(c, "activation_function"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def write_opt(cfg):
    return {
        "layer_norm_elementwise_affine": cfg.norm == "layer",
        "do_layer_norm_before": cfg.norm_at == "before",
        "word_embed_proj_dim": cfg.width,
        "activation_function": activation_name(cfg),
        "enable_bias": cfg.mlp_bias,
    }


def read_falcon(c, fields):
    """With ALiBi transformers rounds slope * position to bf16. Here it is fp32, so that it depends
    on the distance alone."""
    new, parallel = bool(c["new_decoder_architecture"]), bool(c["parallel_attn"])
    norms = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if new and not parallel or parallel and norms == 2 and not new:
        raise UserError(
            "new_decoder_architecture, parallel_attn and num_ln_in_parallel_attn contradict each "
            "other: transformers runs no such model"
        )
    heads = fields["n_heads"]
    if new:
        kv_heads = checked(c.get("num_kv_heads") or heads, "num_kv_heads", int)
    else:
        kv_heads = 1 if c["multi_query"] else heads
    bias = bool(c["bias"])
    out = {} if c["alibi"] else read_rope(c)
    return out | dict(
        n_kv_heads=kv_heads,
        head_dim=fields["dim"] // heads,
        ffn_dim=checked(c.get("ffn_hidden_size") or 4 * fields["dim"], "ffn_hidden_size", int),
        positions="alibi" if c["alibi"] else "rope",
        alibi_scaled=bool(c["alibi"]),
        residual=("parallel" if norms == 2 else "parallel_one_norm") if parallel else "serial",
        activation=read_activation(c, "activation"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )


def write_falcon(cfg):
    parallel = cfg.residual != "serial"
    new = parallel and (cfg.residual == "parallel" or 1 < cfg.n_kv_heads < cfg.n_heads)
    return write_rope(cfg) | {
        "new_decoder_architecture": new,
        "num_kv_heads": cfg.n_kv_heads,
        "multi_query": cfg.n_kv_heads == 1,
        "ffn_hidden_size": cfg.ffn_dim,
        "alibi": cfg.positions == "alibi",
        "parallel_attn": parallel,
        "num_ln_in_parallel_attn": 2 if cfg.residual == "parallel" else 1,
        "activation": activation_name(cfg),
        "bias": cfg.mlp_bias,
    }


def falcon_norms(cfg):
    """What a file calls the norms of a block. Two that run side by side have other names."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    stored = ["ln_attn", "ln_mlp"] if cfg.residual == "parallel" else norms
    block = "model.layers.{}.", "transformer.h.{}."
    return {block[0] + norm: block[1] + name for norm, name in zip(norms, stored, strict=True)}


def read_neox(c, fields):
    rope = {"rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    return all_heads(fields) | dict(
        read_rope(c | rope, partial=True),
        residual="parallel" if c["use_parallel_residual"] else "serial",
        activation=read_activation(c, "hidden_act"),
    )


def write_neox(cfg):
    return {
        "rotary_emb_base": cfg.rope_theta,
        "rotary_pct": cfg.rope_part,
        "rope_scaling": cfg.rope_scaling,
        "use_parallel_residual": cfg.residual == "parallel",
        "hidden_act": activation_name(cfg),
    }


def read_t5(c, fields):
    gate, _, name = c["feed_forward_proj"].rpartition("-")
    # the release calls its approximation of GELU so
    name = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else name
    if gate not in ("", "gated") or name not in ACTIVATION_NAMES:
        raise UserError(f"feed_forward_proj {c['feed_forward_proj']!r} is not supported")
    layers = c.get("num_decoder_layers") or fields["n_layers"]
    start = c.get("decoder_start_token_id")
    # of the distances in half of the buckets, half have one each
    if not 2 <= fields["buckets"] // 4 < fields["buckets"] // 2 < fields["far"]:
        raise UserError(
            "relative_attention_num_buckets must be 8 or more, and "
            "relative_attention_max_distance above half of it"
        )
    scaled = False
    if c.get("model_type") != "mt5":
        scaled = c.get("scale_decoder_outputs", c.get("tie_word_embeddings") is not False)
    return dict(
        n_kv_heads=fields["n_heads"],
        n_decoder_layers=checked(layers, "num_decoder_layers", int),
        start_id=(c.get("pad_token_id") or 0) if start is None else start,
        mlp="gated" if gate else "plain",
        activation=ACTIVATION_NAMES[name],
        logit_scale=1 / math.sqrt(fields["dim"]) if scaled else 1.0,
    )


def write_t5(cfg):
    proj = activation_name(cfg)
    if cfg.mlp == "gated":
        proj = "gated-gelu" if proj == "gelu_new" else f"gated-{proj}"
    return {
        "is_encoder_decoder": True,
        "num_decoder_layers": cfg.n_decoder_layers,
        "decoder_start_token_id": cfg.start_id,
        "feed_forward_proj": proj,
        "scale_decoder_outputs": cfg.logit_scale != 1.0,
    }


def t5_tensors(cfg):
    """A block of a file is a list: self-attention, in the decoder cross-attention, and MLP."""
    up = {"gate_proj": "wi_0", "up_proj": "wi_1"} if cfg.mlp == "gated" else {"up_proj": "wi"}
    out = {"model.embed_tokens": "shared"}
    for stack, mlp in (("encoder", 1), ("decoder", 2)):
        here, there = f"model.{stack}.layers.{{}}", f"{stack}.block.{{}}.layer"
        attention = {"self_attn": "0.SelfAttention", "cross_attn": "1.EncDecAttention"}
        for ours, theirs in attention.items():
            for letter in "qkvo":
                out[f"{here}.{ours}.{letter}_proj"] = f"{there}.{theirs}.{letter}"
        for ours, theirs in (up | {"down_proj": "wo"}).items():
            out[f"{here}.mlp.{ours}"] = f"{there}.{mlp}.DenseReluDense.{theirs}"
        norms = {"input": 0, "cross": 1, "post_attention": mlp}
        for ours, theirs in norms.items():
            out[f"{here}.{ours}_layernorm"] = f"{there}.{theirs}.layer_norm"
        first = f"{stack}.block.0.layer.0.SelfAttention"
        out[f"model.{stack}.distance_bias"] = f"{first}.relative_attention_bias"
        out[f"model.{stack}.norm"] = f"{stack}.final_layer_norm"
    return out


def read_mixtral(c, fields):
    return read_mistral(c, fields) | {"router": "chosen"}


def read_olmoe(c, fields):
    if c.get("clip_qkv") is not None:
        raise UserError("clip_qkv is not supported")
    return read_llama(c, fields) | read_router(c)


def write_olmoe(cfg):
    return write_llama(cfg) | write_router(cfg)


def read_qwen_moe(c, fields):
    refuse(c, ["use_sliding_window"])
    step, dense = c["decoder_sparse_step"], set(c.get("mlp_only_layers") or ())
    dense |= {i for i in range(fields["n_layers"]) if (i + 1) % step}
    return (
        read_llama(c, fields)
        | read_router(c)
        | {"dense_layers": tuple(i for i in range(fields["n_layers"]) if i in dense)}
    )


def write_qwen_moe(cfg):
    layers = {"decoder_sparse_step": 1, "mlp_only_layers": list(cfg.dense_layers)}
    return write_llama(cfg) | write_router(cfg) | layers | {"use_sliding_window": False}


def read_router(c):
    return {"router": "chosen" if c["norm_topk_prob"] else "all"}


def write_router(cfg):
    return {"norm_topk_prob": cfg.router == "chosen"}


def read_gpt_oss(c, fields):
    if c["swiglu_alpha"] != 1.702:
        raise UserError(f"swiglu_alpha={c['swiglu_alpha']} is not supported (1.702 is)")
    if not (c.get("rope_scaling") or c.get("rope_parameters")):
        c = c | {"rope_scaling": GPT_OSS_ROPE}
    kinds = layer_types(c, [FULL if i % 2 else SLIDING for i in range(fields["n_layers"])])
    return read_rope(c) | windows_of(c, kinds)


def write_gpt_oss(cfg):
    rope = (cfg.rope_scaling or {"rope_type": "default"}) | {"rope_theta": cfg.rope_theta}
    ropes = {
        "rope_parameters": rope,
        "rope_scaling": cfg.rope_scaling,
        "rope_theta": cfg.rope_theta,
    }
    return write_windows(cfg) | ropes | {"swiglu_alpha": 1.702, "hidden_act": "silu"}


FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(c, default):
    """The kind of each layer, FULL or SLIDING."""
    kinds = c.get("layer_types") or default
    if len(kinds) != len(default) or not {FULL, SLIDING}.issuperset(kinds):
        raise UserError(
            f"layer_types {kinds} is not supported ({SLIDING} or {FULL} for each layer is)"
        )
    return kinds


def windows_of(c, kinds):
    """The field windows, with a window where the kind of a layer is SLIDING."""
    window = c.get("sliding_window") or 0
    return {"windows": tuple(window if kind == SLIDING else 0 for kind in kinds)}


def write_windows(cfg):
    """layer_types, and the window of those that have one."""
    windows = cfg.windows or (0,) * cfg.n_layers
    kinds = [SLIDING if window else FULL for window in windows]
    return {"layer_types": kinds, "sliding_window": max(windows) or None}


def one_window(c, fields):
    """The field windows, with the same window in all layers."""
    return {"windows": (c.get("sliding_window") or 0,) * fields["n_layers"]}


def write_window(cfg):
    return {"sliding_window": max(cfg.windows, default=0) or None}


ORIGINAL = "original_max_position_embeddings"
ROPE = {  # kinds of rope scaling: the keys that they need, and those that they may have
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), ()),
    "yarn": (
        ("factor", ORIGINAL),
        (
            *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
            *("truncate", "llama_4_scaling_beta"),
        ),
    ),
    "longrope": (("short_factor", "long_factor", ORIGINAL), ("factor", "attention_factor")),
}


def rope_kind(rope):
    kind = rope.get("rope_type") or rope.get("type") or "default"
    # the three positions of mrope are one where there is text alone
    return "default" if kind == "mrope" else kind


def read_rope(c, partial=False):
    """The fields of the rotary embedding, which transformers 4 writes as two keys of these names,
    and transformers 5 as one dict rope_parameters.

    partial: whether the family can rotate a part of each head."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    checked(theta, "rope_theta", float)
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters that differ by layer are not supported")
    part = rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1.0
    if part != 1.0 and not partial or part > 1.0:
        raise UserError(f"partial_rotary_factor={part} is not supported")
    kind = rope_kind(rope)
    if kind not in ROPE:
        raise UserError(f"rope scaling {kind!r} is not supported ({', '.join(ROPE)} are)")
    needed, optional = ROPE[kind]
    rope = {ORIGINAL: c.get("max_position_embeddings")} | rope
    if any(rope.get(key) is None for key in needed):
        raise UserError(f"rope scaling {kind!r} needs {', '.join(needed)}")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise UserError("high_freq_factor of rope scaling 'llama3' must be above low_freq_factor")
    if kind in ("yarn", "longrope") and min(theta, rope[ORIGINAL]) <= 1:
        raise UserError(f"rope scaling {kind!r} needs a rope_theta and an {ORIGINAL} above 1")
    keys = [key for key in (*needed, *optional) if rope.get(key) is not None]
    scaling = {"rope_type": kind} | {key: rope[key] for key in keys}
    return dict(
        rope_theta=theta, rope_scaling=None if kind == "default" else scaling, rope_part=part
    )


def write_rope(cfg):
    return {"rope_theta": cfg.rope_theta, "rope_scaling": cfg.rope_scaling}


def read_ropes(c, kinds, local_theta):
    """The fields of two rotary embeddings: one of the layers whose kind is FULL, another without
    scaling of those whose kind is SLIDING."""
    ropes = c.get("rope_parameters") or {}
    full, local = (ropes.get(kind) or {} for kind in (FULL, SLIDING))
    out = read_rope(
        c | {"rope_parameters": None, "rope_scaling": full | (c.get("rope_scaling") or {})}
    )
    local = read_rope({"rope_parameters": {"rope_theta": local_theta} | local})
    if local["rope_scaling"]:
        raise UserError("rope scaling in the layers with a window is not supported")
    layers = tuple("local" if kind == SLIDING else "global" for kind in kinds)
    return out | {"rope_local_theta": local["rope_theta"], "rope_layers": layers}


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

GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}
OLMO = DEFAULTS | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
AFTER = {  # where norms stand behind both halves of a block
    "model.layers.{}.attn_output_norm": "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp_output_norm": "model.layers.{}.post_feedforward_layernorm",
}
AROUND = AFTER | {
    "model.layers.{}.post_attention_layernorm": "model.layers.{}.pre_feedforward_layernorm"
}
PLAIN = {"norm": "layer", "mlp": "plain"}
ALL_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
GPT2_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "n_embd",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
GPT2_DEFAULTS = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
GPT2_TENSORS = {
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
}
FALCON_TENSORS = {  # without the norms of blocks
    "model.embed_tokens": "transformer.word_embeddings",
    "model.layers.{}.self_attn.q_proj": "transformer.h.{}.self_attention.query_key_value",
    "model.layers.{}.self_attn.k_proj": "transformer.h.{}.self_attention.query_key_value",
    "model.layers.{}.self_attn.v_proj": "transformer.h.{}.self_attention.query_key_value",
    "model.layers.{}.self_attn.o_proj": "transformer.h.{}.self_attention.dense",
    "model.layers.{}.mlp.up_proj": "transformer.h.{}.mlp.dense_h_to_4h",
    "model.layers.{}.mlp.down_proj": "transformer.h.{}.mlp.dense_4h_to_h",
    "model.norm": "transformer.ln_f",
}
T5_DEFAULTS = {
    "d_kv": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}
T5 = dict(
    keys={
        "vocab_size": "vocab_size",
        "dim": "d_model",
        "ffn_dim": "d_ff",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "head_dim": "d_kv",
        "buckets": "relative_attention_num_buckets",
        "far": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    read=read_t5,
    write=write_t5,
    tensors=t5_tensors,
    # copies of the embedding, and a bias that the first releases never used
    ignored=r"^(en|de)coder\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias",
    module="t5",
    head_by_file=True,
)

QWEN_MOE = DEFAULTS | {
    "max_position_embeddings": 32768,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}
EXPERTS = {"n_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
LOCAL_EXPERTS = EXPERTS | {"n_experts": "num_local_experts"}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GRANITE_KEYS = {
    "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attn_scale": "attention_multiplier",
}
GRANITE_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 2048,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
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
    "gemma2": Family(
        {"lm": "Gemma2ForCausalLM", "score": "Gemma2ForSequenceClassification"},
        keys=KEYS | BIASES,
        defaults=GEMMA | {"max_position_embeddings": 8192},
        read=read_gemma2,
        write=write_gemma2,
        always={"norm": "rms1", "norm_at": "around"},
        tensors=AROUND,
    ),
    "gemma3_text": Family(
        {"lm": "Gemma3ForCausalLM", "score": "Gemma3TextForSequenceClassification"},
        keys=KEYS | BIASES,
        defaults=GEMMA
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        read=read_gemma3,
        write=write_gemma3,
        always={"norm": "rms1", "norm_at": "around", "qk_norm": "head"},
        tensors=AROUND,
    ),
    "olmo2": Family(
        {"lm": "Olmo2ForCausalLM", "score": "Olmo2ForSequenceClassification"},
        keys=KEYS | BIASES,
        defaults=OLMO,
        read=read_llama,
        write=write_llama,
        always={"norm_at": "after", "qk_norm": "whole"},
        tensors=AFTER,
    ),
    "olmo3": Family(
        {"lm": "Olmo3ForCausalLM", "score": "Olmo3ForSequenceClassification"},
        keys=KEYS | BIASES,
        defaults=OLMO | {"rope_theta": 500000.0, "sliding_window": 4096},
        read=read_olmo3,
        write=write_olmo3,
        always={"norm_at": "after", "qk_norm": "whole"},
        tensors=AFTER,
    ),
    "smollm3": Family(
        {"lm": "SmolLM3ForCausalLM", "score": "SmolLM3ForSequenceClassification"},
        keys=KEYS | BIASES | {"mlp_bias": "mlp_bias"},
        defaults=DEFAULTS
        | {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
        },
        read=read_smollm3,
        write=write_smollm3,
    ),
    "phi3": Family(  # Phi-4 too
        {"lm": "Phi3ForCausalLM", "score": "Phi3ForSequenceClassification"},
        keys=KEYS,
        defaults=DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, ORIGINAL: 4096},
        read=read_phi3,
        write=write_phi3,
        tensors={
            "model.layers.{}.self_attn.q_proj": "model.layers.{}.self_attn.qkv_proj",
            "model.layers.{}.self_attn.k_proj": "model.layers.{}.self_attn.qkv_proj",
            "model.layers.{}.self_attn.v_proj": "model.layers.{}.self_attn.qkv_proj",
            "model.layers.{}.mlp.gate_proj": "model.layers.{}.mlp.gate_up_proj",
            "model.layers.{}.mlp.up_proj": "model.layers.{}.mlp.gate_up_proj",
        },
    ),
    "ministral3": Family(
        {"lm": "Ministral3ForCausalLM", "score": "Ministral3ForSequenceClassification"},
        keys=KEYS,
        defaults=DEFAULTS
        | {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
        },
        read=read_ministral3,
        write=write_ministral3,
    ),
    "granite": Family(
        {"lm": "GraniteForCausalLM"},
        keys=KEYS | BIASES | {"mlp_bias": "mlp_bias"} | GRANITE_KEYS,
        defaults=GRANITE_DEFAULTS,
        read=read_granite,
        write=write_granite,
    ),
    "granitemoe": Family(  # Granite 3 with experts
        {"lm": "GraniteMoeForCausalLM"},
        keys=KEYS | BIASES | LOCAL_EXPERTS | GRANITE_KEYS,
        defaults=GRANITE_DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2},
        read=read_granite,
        write=write_granite,
        always={"router": "chosen"},
        tensors={
            "model.layers.{}.mlp.gate": "model.layers.{}.block_sparse_moe.router.layer",
            "model.layers.{}.mlp.experts.{}.gate_proj": (
                "model.layers.{}.block_sparse_moe.input_linear"
            ),
            "model.layers.{}.mlp.experts.{}.up_proj": (
                "model.layers.{}.block_sparse_moe.input_linear"
            ),
            "model.layers.{}.mlp.experts.{}.down_proj": (
                "model.layers.{}.block_sparse_moe.output_linear"
            ),
        },
        layouts={
            "model.layers.{}.block_sparse_moe.input_linear": Stack(),
            "model.layers.{}.block_sparse_moe.output_linear": Stack(),
        },
        experts="block_sparse_moe.experts",
    ),
    "mixtral": Family(
        {"lm": "MixtralForCausalLM", "score": "MixtralForSequenceClassification"},
        keys=KEYS | LOCAL_EXPERTS,
        defaults=DEFAULTS
        | {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        read=read_mixtral,
        write=write_mistral,
        tensors={
            "model.layers.{}.mlp.gate": "model.layers.{}.block_sparse_moe.gate",
            "model.layers.{}.mlp.experts.{}.gate_proj": (
                "model.layers.{}.block_sparse_moe.experts.{}.w1"
            ),
            "model.layers.{}.mlp.experts.{}.up_proj": (
                "model.layers.{}.block_sparse_moe.experts.{}.w3"
            ),
            "model.layers.{}.mlp.experts.{}.down_proj": (
                "model.layers.{}.block_sparse_moe.experts.{}.w2"
            ),
        },
    ),
    "olmoe": Family(
        {"lm": "OlmoeForCausalLM"},
        keys=KEYS | BIASES | EXPERTS,
        defaults=DEFAULTS
        | {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        read=read_olmoe,
        write=write_olmoe,
        always={"qk_norm": "whole"},
    ),
    "qwen2_moe": Family(
        {"lm": "Qwen2MoeForCausalLM", "score": "Qwen2MoeForSequenceClassification"},
        keys=KEYS
        | EXPERTS
        | {
            "qkv_bias": "qkv_bias",
            "expert_dim": "moe_intermediate_size",
            "shared_dim": "shared_expert_intermediate_size",
        },
        defaults=QWEN_MOE
        | {
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        read=read_qwen_moe,
        write=write_qwen_moe,
    ),
    "qwen3_moe": Family(
        {"lm": "Qwen3MoeForCausalLM", "score": "Qwen3MoeForSequenceClassification"},
        keys=KEYS | BIASES | EXPERTS | {"expert_dim": "moe_intermediate_size"},
        aliases={"num_local_experts": "num_experts"},  # transformers 5
        defaults=QWEN_MOE
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        read=read_qwen_moe,
        write=write_qwen_moe,
        always={"qk_norm": "head"},
    ),
    "gpt_oss": Family(
        {"lm": "GptOssForCausalLM", "score": "GptOssForSequenceClassification"},
        keys=KEYS | BIASES | LOCAL_EXPERTS | {"glu_limit": "swiglu_limit"},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        read=read_gpt_oss,
        write=write_gpt_oss,
        always={
            "activation": "gelu_sigmoid",
            "router": "chosen",
            "router_bias": True,
            "expert_bias": True,
            "sinks": True,
        },
        tensors={"model.layers.{}.mlp.gate": "model.layers.{}.mlp.router"}
        | {
            f"model.layers.{{}}.mlp.experts.{{}}.{ours}.{leaf}": (
                f"model.layers.{{}}.mlp.experts.{theirs}{ending}"
            )
            for leaf, ending in (("weight", ""), ("bias", "_bias"))
            for ours, theirs in (
                ("gate_proj", "gate_up_proj"),
                ("up_proj", "gate_up_proj"),
                ("down_proj", "down_proj"),
            )
        },
        layouts={
            "model.layers.{}.mlp.experts.gate_up_proj": Stack(transposed=True, interleaved=True),
            "model.layers.{}.mlp.experts.gate_up_proj_bias": Stack(interleaved=True),
            "model.layers.{}.mlp.experts.down_proj": Stack(transposed=True),
            "model.layers.{}.mlp.experts.down_proj_bias": Stack(),
        },
    ),
    "seed_oss": Family(
        {"lm": "SeedOssForCausalLM", "score": "SeedOssForSequenceClassification"},
        keys=KEYS
        | {"qkv_bias": "attention_bias", "o_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
        defaults=DEFAULTS
        | {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
        },
        read=read_llama,
        write=write_llama,
    ),
    "starcoder2": Family(
        {"lm": "Starcoder2ForCausalLM", "score": "Starcoder2ForSequenceClassification"},
        keys=KEYS
        | dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), "use_bias")
        | {"norm_eps": "norm_epsilon"},
        defaults={
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        read=read_mistral,
        write=write_mistral,
        always=PLAIN,
        tensors={
            "model.layers.{}.mlp.up_proj": "model.layers.{}.mlp.c_fc",
            "model.layers.{}.mlp.down_proj": "model.layers.{}.mlp.c_proj",
        },
    ),
    "gpt2": Family(
        {"lm": "GPT2LMHeadModel", "score": "GPT2ForSequenceClassification"},
        keys=GPT2_KEYS,
        defaults=GPT2_DEFAULTS | {"activation_function": "gelu_new"},
        read=read_gpt2,
        write=write_gpt2,
        always=PLAIN | ALL_BIASES | {"positions": "learned"},
        tensors=GPT2_TENSORS,
        layouts={
            "transformer.h.{}.attn.c_attn": CONV1D,
            "transformer.h.{}.attn.c_proj": CONV1D,
            "transformer.h.{}.mlp.c_fc": CONV1D,
            "transformer.h.{}.mlp.c_proj": CONV1D,
        },
        prefix="transformer.",
        ignored=r"\.attn\.(masked_)?bias$",
    ),
    "gpt_bigcode": Family(
        {"lm": "GPTBigCodeForCausalLM", "score": "GPTBigCodeForSequenceClassification"},
        keys=GPT2_KEYS,
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        defaults=GPT2_DEFAULTS | {"activation_function": "gelu_pytorch_tanh", "multi_query": True},
        read=read_bigcode,
        write=write_bigcode,
        always=PLAIN | ALL_BIASES | {"positions": "learned"},
        tensors=GPT2_TENSORS,
        layouts={"transformer.h.{}.attn.c_attn": BY_HEAD},
        prefix="transformer.",
        ignored=r"\.attn\.(masked_)?bias$",
    ),
    "bloom": Family(
        {"lm": "BloomForCausalLM", "score": "BloomForSequenceClassification"},
        keys={
            "vocab_size": "vocab_size",
            "dim": "hidden_size",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "max_positions": "seq_length",  # trained with; transformers sets no limit
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        aliases={
            "n_embed": "hidden_size",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
        },
        defaults={"seq_length": 2048, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        read=read_bloom,
        write=lambda cfg: {},
        always=PLAIN
        | ALL_BIASES
        | {"positions": "alibi", "activation": "gelu_tanh", "embed_norm": True},
        tensors=FALCON_TENSORS
        | {
            "model.embed_norm": "transformer.word_embeddings_layernorm",
            "model.layers.{}.input_layernorm": "transformer.h.{}.input_layernorm",
            "model.layers.{}.post_attention_layernorm": "transformer.h.{}.post_attention_layernorm",
        },
        layouts={"transformer.h.{}.self_attention.query_key_value": BY_HEAD},
        prefix="transformer.",
    ),
    "falcon": Family(
        {"lm": "FalconForCausalLM", "score": "FalconForSequenceClassification"},
        keys={
            "vocab_size": "vocab_size",
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "max_positions": "max_position_embeddings",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        aliases={"n_embed": "hidden_size"},
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "alibi": False,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
            "activation": "gelu",
        },
        read=read_falcon,
        write=write_falcon,
        always=PLAIN,
        tensors=lambda cfg: FALCON_TENSORS | falcon_norms(cfg),
        layouts={"transformer.h.{}.self_attention.query_key_value": BY_HEAD},
        prefix="transformer.",
    ),
    "opt": Family(  # Galactica too
        {"lm": "OPTForCausalLM", "score": "OPTForSequenceClassification"},
        keys={
            "vocab_size": "vocab_size",
            "dim": "hidden_size",
            "ffn_dim": "ffn_dim",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "max_positions": "max_position_embeddings",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "enable_bias": True,
            "activation_function": "relu",
        },
        read=read_opt,
        write=write_opt,
        always={"mlp": "plain", "norm_eps": 1e-5, "positions": "learned", "position_offset": 2},
        tensors={
            "model.embed_tokens": "model.decoder.embed_tokens",
            "model.embed_positions": "model.decoder.embed_positions",
            "model.project_in": "model.decoder.project_in",
            "model.project_out": "model.decoder.project_out",
            "model.layers.{}.input_layernorm": "model.decoder.layers.{}.self_attn_layer_norm",
            "model.layers.{}.self_attn.q_proj": "model.decoder.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj": "model.decoder.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj": "model.decoder.layers.{}.self_attn.v_proj",
            "model.layers.{}.self_attn.o_proj": "model.decoder.layers.{}.self_attn.out_proj",
            "model.layers.{}.post_attention_layernorm": "model.decoder.layers.{}.final_layer_norm",
            "model.layers.{}.attn_output_norm": "model.decoder.layers.{}.self_attn_layer_norm",
            "model.layers.{}.mlp_output_norm": "model.decoder.layers.{}.final_layer_norm",
            "model.layers.{}.mlp.up_proj": "model.decoder.layers.{}.fc1",
            "model.layers.{}.mlp.down_proj": "model.decoder.layers.{}.fc2",
            "model.norm": "model.decoder.final_layer_norm",
        },
        prefix="model.",
    ),
    "gpt_neox": Family(  # Pythia
        {"lm": "GPTNeoXForCausalLM", "score": "GPTNeoXForSequenceClassification"},
        keys=BIASES
        | {
            "vocab_size": "vocab_size",
            "dim": "hidden_size",
            "ffn_dim": "intermediate_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "max_positions": "max_position_embeddings",
            "norm_eps": "layer_norm_eps",
            "tie_embeddings": "tie_word_embeddings",
        },
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
            "use_parallel_residual": True,
            "hidden_act": "gelu",
        },
        read=read_neox,
        write=write_neox,
        always=PLAIN | {"mlp_bias": True},
        tensors={
            "model.embed_tokens": "gpt_neox.embed_in",
            "model.layers.{}.input_layernorm": "gpt_neox.layers.{}.input_layernorm",
            "model.layers.{}.self_attn.q_proj": "gpt_neox.layers.{}.attention.query_key_value",
            "model.layers.{}.self_attn.k_proj": "gpt_neox.layers.{}.attention.query_key_value",
            "model.layers.{}.self_attn.v_proj": "gpt_neox.layers.{}.attention.query_key_value",
            "model.layers.{}.self_attn.o_proj": "gpt_neox.layers.{}.attention.dense",
            "model.layers.{}.post_attention_layernorm": (
                "gpt_neox.layers.{}.post_attention_layernorm"
            ),
            "model.layers.{}.mlp.up_proj": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
            "model.layers.{}.mlp.down_proj": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
            "model.norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        layouts={"gpt_neox.layers.{}.attention.query_key_value": BY_HEAD},
        prefix="gpt_neox.",
        ignored=r"\.attention\.(masked_)?bias$|\.rotary_emb\.inv_freq$",
    ),
    "t5": Family({"lm": "T5ForConditionalGeneration"}, defaults=T5_DEFAULTS, **T5),
    "mt5": Family(
        {"lm": "MT5ForConditionalGeneration"},
        defaults=T5_DEFAULTS | {"feed_forward_proj": "gated-gelu"},
        **T5,
    ),
}

# --- config.json --------------------------------------------------------------------------------


class Rope(TypedDict, total=False):
    rope_type: str | None
    type: str | None
    rope_theta: PositiveFloat | None
    partial_rotary_factor: PositiveFloat | None
    factor: PositiveFloat | None
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveFloat | None
    attention_factor: PositiveFloat | None
    beta_fast: PositiveFloat | None
    beta_slow: PositiveFloat | None
    mscale: NonNegativeFloat | None
    mscale_all_dim: NonNegativeFloat | None
    truncate: bool | None
    llama_4_scaling_beta: NonNegativeFloat | None
    short_factor: list[PositiveFloat] | None
    long_factor: list[PositiveFloat] | None


class ConfigJson(TokenIds, total=False):
    """The fields that are read, of all families, beside the sizes in `keys` of a Family."""

    text_config: dict | None
    architectures: list[str] | None
    model_type: str | None
    id2label: dict | None
    num_labels: NonNegativeInt | None
    hidden_act: str
    hidden_activation: str
    activation_function: str
    feed_forward_proj: str
    decoder_start_token_id: NonNegativeInt | None
    scale_decoder_outputs: bool
    activation: str
    rms_norm_eps: NonNegativeFloat | None
    layer_norm_epsilon: NonNegativeFloat | None
    layer_norm_eps: NonNegativeFloat | None
    rotary_emb_base: PositiveFloat
    rotary_pct: NonNegativeFloat
    rope_theta: PositiveFloat | None
    rope_scaling: Rope | None
    rope_parameters: Rope | dict[str, Rope | None] | None
    rope_local_base_freq: PositiveFloat | None
    partial_rotary_factor: PositiveFloat | None
    original_max_position_embeddings: PositiveFloat
    no_rope_layers: list[int] | None
    no_rope_layer_interval: PositiveInt | None
    sliding_window_pattern: PositiveInt | None
    norm_epsilon: NonNegativeFloat
    sliding_window: NonNegativeInt | None
    use_sliding_window: bool | None
    max_window_layers: NonNegativeInt
    mlp_only_layers: list[NonNegativeInt] | None
    decoder_sparse_step: PositiveInt
    norm_topk_prob: bool
    swiglu_alpha: PositiveFloat
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
        check_json(c.get("text_config") or {}, ConfigJson, f"{where}: text_config")
        return read_config(c)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def read_config(c):
    c = text_part(c)
    kind, head = recognise(c)
    family = FAMILIES[kind]
    how = (c.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if how != "bitsandbytes" and (kind, how) != ("gpt_oss", "mxfp4"):
        raise UserError(
            f"weights quantised by {how} are not supported (bitsandbytes' nf4, fp4 and int8 are): "
            "give the original checkpoint"
        )
    # transformers leaves two labels out
    labels = len(c.get("id2label") or "") or c.get("num_labels") or 2
    if head == "score" and labels != 1:
        raise UserError(
            f"a classifier of {labels} labels is not supported (num_labels=1, a score, is)"
        )
    c = family.defaults | {family.aliases.get(key, key): value for key, value in c.items()}
    fields = {}
    for name, key in family.keys.items():
        value = c.get(key)
        # null, or absent where the family has no default of its own
        if value is None and name == "n_kv_heads":
            value = fields["n_heads"]
        elif value is None and name == "head_dim":
            value = fields["dim"] // fields["n_heads"]
        fields[name] = checked(value, key, family.config.__dataclass_fields__[name].type)
    fields |= family.always | family.read(c, fields)
    cfg = normal(family.config(**fields, head=head, family=kind))
    rotated = int(cfg.head_dim * cfg.rope_part) if cfg.positions == "rope" else 0
    for key in ("short_factor", "long_factor") if cfg.rope_switch else ():
        if len(cfg.rope_scaling[key]) != rotated // 2:
            raise UserError(f"{key} needs {rotated // 2} numbers: one for each rotated pair")
    if cfg.n_heads % cfg.n_kv_heads or rotated % 2:
        raise UserError(
            f"{cfg.n_heads} heads of {cfg.head_dim} numbers "
            f"do not go with {cfg.n_kv_heads} key/value heads"
        )
    if cfg.n_experts and cfg.experts_per_token > cfg.n_experts:
        raise UserError(
            f"each token takes {cfg.experts_per_token} experts, and there are {cfg.n_experts}"
        )
    return cfg


def normal(cfg):
    """The ModelConfig in one of several spellings: by layer nothing where all layers are plain."""
    windows = cfg.windows if any(cfg.windows) else ()
    ropes = () if set(cfg.rope_layers) == {"global"} else cfg.rope_layers
    return replace(cfg, windows=windows, rope_layers=ropes)


def checked(value, key, kind):
    """The value of a key of config.json; UserError where a field of ModelConfig cannot hold it."""
    if kind is bool:
        return bool(value)
    if kind is int and (type(value) is not int or not 1 <= value < 2**31):
        raise UserError(f"{key} is {value!r}, not a positive whole number")
    if kind is float and type(value) not in (int, float):
        raise UserError(f"{key} is {value!r}, not a number")
    return value


def text_part(c):
    """The config.json of the language model in one of a model that sees images too."""
    text = c.get("text_config")
    kind = (text or c).get("model_type")
    if text is None and kind not in VISION:
        return c
    # what stands beside text_config counts for it too
    whole = {k: v for k, v in c.items() if k in TokenIds.__annotations__ or k in SHARED}
    text = {k: v for k, v in (text or c).items() if k != "architectures"}
    return text | whole | {"model_type": VISION.get(kind, kind)}


SHARED = ("tie_word_embeddings", "quantization_config")
# model_type of the language model in a model that sees images -> that of the same model alone
VISION = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
}
VISION_TENSORS = r"^(model\.)?(vision_tower|visual|multi_modal_projector)\."


def text_names(names):
    """Names of the tensors in the files of a model that may see images -> {name in the files of its
    language model alone: name}."""
    out = {}
    for name in names:
        if not re.match(VISION_TENSORS, name):
            plain = name.removeprefix("language_model.")
            out[plain.replace("model.language_model.", "model.", 1)] = name
    return out


def recognise(c):
    """(model_type, head) of a config.json."""
    kind = c.get("model_type")
    if not c.get("architectures"):
        if kind not in FAMILIES:
            raise unknown("model_type", kind, FAMILIES, c)
        return kind, "lm"
    # LLaMA: as the first conversions spell it
    architecture = c["architectures"][0].replace("LLaMA", "Llama")
    known = {
        name: (family, head)
        for family, entry in FAMILIES.items()
        for head, name in entry.architectures.items()
    }
    if architecture not in known:
        raise unknown("architecture", architecture, known, c)
    family, head = known[architecture]
    if kind not in (None, family):
        raise UserError(f"model_type {kind!r} does not belong to architecture {architecture}")
    return family, head


# keys of config.json that ask for what the decoder has no slot for -> the slot
MISSING = {
    "num_experts": "this mixture of experts",
    "num_local_experts": "this mixture of experts",
    "n_routed_experts": "this mixture of experts",
    "kv_lora_rank": "latent attention",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "linear_num_value_heads": "linear attention",
    "is_encoder_decoder": "an encoder",
    "clip_qkv": "clipped q, k and v",
}


def unknown(what, name, known, c=None):
    """UserError for a family that is not in FAMILIES: the nearest that are, and the slot that a
    config.json `c` asks for and the decoder lacks."""
    near = difflib.get_close_matches(str(name), known, cutoff=0.0)
    slots = dict.fromkeys(slot for key, slot in MISSING.items() if (c or {}).get(key))
    lacks = f", and the decoder has no slot for {' and '.join(slots)}" if slots else ""
    return UserError(
        f"{what} {name} is not supported{lacks}; the nearest that are: {', '.join(near)}"
    )


def check_scores(cfg, dir):
    """UserError for a model of a family without score models. dir: of the model, for the message"""
    if "score" not in FAMILIES[cfg.family].architectures:
        raise UserError(
            f"model={dir} is of family {cfg.family}, of which transformers has no model with one "
            "score: give a model of another family"
        )


def config_json(cfg, like=None, **extra):
    """The dict of a config.json, in the spelling that transformers 4 and 5 both read.

    like: a model directory. What its config.json says beyond the architecture is kept, and from
    another family the token ids alone.
    extra: keys to set, such as eos_token_id.
    UserError when transformers has no architecture that is what `cfg` describes."""
    if cfg.family not in FAMILIES:
        raise unknown("model family", cfg.family, FAMILIES)
    family = FAMILIES[cfg.family]
    if cfg.head not in family.architectures:
        raise UserError(f"transformers has no score model of family {cfg.family} to save it as")
    # null, because transformers would assume 1 and 2
    out = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    old = read_json(Path(like) / "config.json", missing={}) if like else {}
    same = old.get("model_type") == cfg.family
    stale = (*REWRITTEN, *family.aliases)
    out |= {k: v for k, v in old.items() if k in out or same and k not in stale}
    out |= {"architectures": [family.architectures[cfg.head]], "model_type": cfg.family}
    out |= {key: getattr(cfg, name) for name, key in family.keys.items()}
    out |= family.write(cfg)
    if cfg.head == "score":
        out |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    out |= extra

    meant = asdict(normal(cfg))
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
    "quantization_config",  # of the weights before they were written here
    "auto_map",  # names .py files, which do not go along
)
