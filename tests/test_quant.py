"""Quantised bases: nano/quant.py against bitsandbytes, in models, adapters, directories and runs."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
import torch.nn as nn
from conftest import ROOT
from safetensors.torch import load_file, save_file

import lora
import sft
from nano import config, estimate, families, generate, losses, quant, runtime, weights
from nano.config import UserError
from prepare import weights as prepare_weights

KINDS = ["nf4", "fp4", "int8"]
TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))
WIDE = dict(dim=64, n_heads=4, head_dim=16, ffn_dim=96)  # rows of whole blocks, and of others


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes.functional, with its plain functions uncompiled, which is quicker here."""
    functional = pytest.importorskip("bitsandbytes").functional
    with torch._dynamo.config.patch(disable=True):
        yield functional


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("quant") / "base", **WIDE)


def method(kind, double=True):
    return quant.Method(kind, double)


def random_matrix(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(TOKENS))


def shake(model, seed=1):
    """Random numbers into the adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tiny.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


# ---- the codecs


def test_codebooks(bnb):
    for kind in ("nf4", "fp4"):
        assert torch.equal(quant.codebook(kind), bnb.get_4bit_type(kind, "cpu"))
    assert torch.equal(quant.codebook("scale"), bnb.create_dynamic_map())


@pytest.mark.parametrize("shape", [(64, 64), (130, 64), (48, 30), (7, 19), (300, 1000)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bit_matrices_are_those_of_bitsandbytes(bnb, kind, double, shape):
    # A block that is not whole is divided by its scale there, and multiplied by the inverse here as
    # in its CUDA kernel. For numbers of eight bits, which may lie right between two values, that
    # can make a difference.
    whole = shape[0] * shape[1] % quant.BLOCK == 0
    for dtype in (torch.float32, torch.bfloat16) if whole else (torch.float32,):
        matrix = random_matrix(shape, dtype)
        matrix[3] = 0
        packed = quant.quantize(matrix, method(kind, double))
        weight, state = bnb.quantize_4bit(matrix, quant_type=kind, compress_statistics=double)
        assert torch.equal(packed.tensors["weight"], weight)
        if double:
            compare_scales(bnb, packed, matrix, state)
            packed.tensors |= dict(absmax=state.absmax, nested_absmax=state.state2.absmax)
            packed.tensors["offset"] = state.offset[None]
        else:
            assert torch.equal(packed.tensors["absmax"], state.absmax)
        dense = quant.QuantLinear(packed).dense(dtype)
        assert torch.equal(dense, bnb.dequantize_4bit(weight, state))


def compare_scales(bnb, packed, matrix, state):
    """bitsandbytes rounds the mean of the scales otherwise (see quantize). Its CPU kernel takes a
    code beside the nearest for one scale of 600, which its CUDA kernel does not."""
    close = dict(rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(packed.tensors["offset"][0], state.offset, **close)
    torch.testing.assert_close(packed.tensors["nested_absmax"], state.state2.absmax, **close)
    _, plain = bnb.quantize_4bit(matrix, quant_type=packed.kind)
    ours, theirs = packed.tensors["absmax"], state.absmax
    errors = [
        (quant.scales(codes, *nested(packed)) - plain.absmax).abs() for codes in (ours, theirs)
    ]
    assert (errors[0] <= errors[1] + 1e-8).all()
    assert (ours != theirs).float().mean() <= 0.01 and (ours.int() - theirs.int()).abs().max() <= 1


def nested(packed):
    return packed.tensors["nested_absmax"], packed.tensors["offset"], quant.codebook("scale")


@pytest.mark.parametrize("shape", [(64, 64), (7, 9), (300, 1000)])
def test_int8_matrices_are_those_of_bitsandbytes(bnb, shape):
    matrix = random_matrix(shape, torch.float16)
    packed = quant.quantize(matrix, method("int8"))
    weight, absmax, _ = bnb.int8_vectorwise_quant(matrix)
    assert torch.equal(packed.tensors["weight"], weight)
    assert torch.equal(packed.tensors["absmax"], absmax)
    dense = quant.QuantLinear(packed).dense()
    assert torch.equal(dense, bnb.int8_vectorwise_dequant(weight, absmax))


@pytest.mark.parametrize("kind", KINDS)
def test_large_matrices_are_quantised_in_pieces(monkeypatch, kind):
    matrix = random_matrix((40, 96))
    whole = quant.quantize(matrix, method(kind)).tensors
    found = {name: (t.dtype, tuple(t.shape)) for name, t in whole.items()}
    assert found == quant.forms(kind, (40, 96), double=True)
    monkeypatch.setattr(quant, "PIECE", 1024)
    pieces = quant.quantize(matrix, method(kind)).tensors
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_zeros_stays_zero(kind):
    packed = quant.quantize(torch.zeros(4, 64), method(kind))
    assert not quant.QuantLinear(packed).dense().any()


# ---- the layer


@pytest.mark.parametrize("kernel", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_linear_layer_of_its_matrix(bnb, kind, kernel):
    packed = quant.quantize(random_matrix((96, 64)), method(kind))
    layer = quant.QuantLinear(packed, nn.Parameter(torch.randn(96), False), kernel)
    plain = nn.Linear(64, 96)
    plain.weight, plain.bias = nn.Parameter(layer.dense()), layer.bias
    inputs = [torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    for dtype in (torch.float32, torch.bfloat16):
        gradients = []
        for module, x in zip((layer, plain), inputs, strict=True):
            x.grad = None
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                y = module(x.requires_grad_())
            assert y.dtype == dtype
            y.float().square().sum().backward()
            gradients.append((y, x.grad))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_no_dense_matrix_waits_for_the_backward_pass(base):
    model = weights.load_model(base, method=method("nf4"))
    lora.apply(model, rank=2, alpha=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.hidden(TOKENS)
    matrices = {(m.out_features, m.in_features) for _, m in quant.layers(model)}
    assert matrices and not [t for t in kept if tuple(t.shape) in matrices]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer(kind):
    packed = quant.quantize(random_matrix((96, 64)), method(kind))
    layer = quant.QuantLinear(packed)
    x = torch.randn(3, 64, requires_grad=True)
    results = []
    for module in (layer, torch.compile(layer)):
        x.grad = None
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# ---- models


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantises_the_linear_layers_of_the_blocks(base, kind):
    plain = weights.load_model(base)
    model = weights.load_model(base, method=method(kind))
    names = [name for name, _ in quant.layers(model)]
    assert names == lora.linear_names(plain)
    assert model.flops_per_token(64) == plain.flops_per_token(64)
    for name in names:
        right = quant.quantize(plain.get_submodule(name).weight.detach(), method(kind))
        packed = model.get_submodule(name).packed()
        assert all(torch.equal(packed.tensors[key], t) for key, t in right.tensors.items())
    error = (logits(model) - logits(plain)).abs().max()
    assert 0 < error < (0.2 if kind == "int8" else 2)
    before = logits(model)
    quant.restore(model, torch.float32)
    assert not quant.layers(model) and torch.equal(logits(model), before)


def test_samples_and_adapters_on_a_quantised_model(base):
    """The decoder calls the quantised layer and adds the adapter, as the forward pass does."""
    model = weights.load_model(base, method=method("nf4"))
    lora.apply(model, rank=4, alpha=8)
    shake(model)
    tokens = TOKENS[0, :5].tolist()
    samples = generate.generate(model, [tokens], 6, temperature=0.0)
    for token, logprob in zip(samples.tokens[0], samples.logprobs[0], strict=True):
        with torch.no_grad():
            right = model.logits(model.hidden(torch.tensor([tokens])))[0, -1].log_softmax(-1)
        assert right.argmax() == token and abs(right[token] - logprob) < 1e-4
        tokens.append(token)


def test_an_adapter_on_another_base_than_its_run_had_is_noted(tmp_path, capsys):
    adapter = tmp_path / "run" / "last"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "config.cfg").write_text("model=m\nquant=nf4\n")
    quant.note_training(adapter, "nf4")
    assert capsys.readouterr().err == ""
    quant.note_training(adapter, "none")
    assert "was trained with quant=nf4, not none" in capsys.readouterr().err


def small(family, dir):
    """A directory of a family that fuses or transposes matrices, or that has an encoder."""
    if family == "t5":
        return tiny.t5_dir(dir)
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=264, n_layer=2, n_head=4)
    if family == "gpt2":
        peer = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=64, **sizes))
    else:
        peer = BloomForCausalLM(BloomConfig(hidden_size=64, **sizes))
    peer.save_pretrained(dir)
    return dir


@pytest.mark.parametrize("family", ["gpt2", "bloom", "t5"])
def test_families_are_quantised_after_their_tensors_are_split(tmp_path, family):
    dir = small(family, tmp_path)
    plain, model = (weights.load_model(dir, method=m) for m in (quant.NONE, method("nf4")))
    assert [name for name, _ in quant.layers(model)] == lora.linear_names(plain)
    for name, layer in quant.layers(model):
        right = quant.quantize(plain.get_submodule(name).weight.detach(), method("nf4"))
        assert torch.equal(layer.weight, right.tensors["weight"])
    lora.apply(model, rank=2, alpha=4)
    shake(model)
    micro = tiny.batch([tiny.rows(2)], 128, start_ids=model.start_ids)
    loss = sft.loss_sum(model, model(micro), micro)
    loss.backward()
    gradients = [p.grad for p in tiny.adapter_parameters(model)]
    assert all(grad.any() for grad in gradients)
    quant.restore(model, torch.float32)
    assert torch.equal(sft.loss_sum(model, model(micro), micro), loss)


# ---- directories of bitsandbytes


def saved_by_bitsandbytes(dir, source, **settings):
    """A directory that transformers has quantised, and its model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(**settings)
    like = dict(quantization_config=how, device_map="cpu", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, **like)
    model.save_pretrained(dir)
    return model


NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
FP4 = dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="float32")


@pytest.mark.parametrize("settings", [NF4, FP4], ids=["nf4", "fp4"])
def test_directories_of_bitsandbytes_open(bnb, tmp_path, base, settings):
    peer = saved_by_bitsandbytes(tmp_path / "model", base, **settings)
    model = weights.load_model(tmp_path / "model", method=method(settings["bnb_4bit_quant_type"]))
    with torch.no_grad():
        right = peer(TOKENS).logits
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-5)
    for name, layer in quant.layers(model):
        stored = peer.get_submodule(name).weight
        assert torch.equal(layer.weight, stored.data.view(torch.uint8).view(-1, 1))
    with pytest.raises(UserError, match="quantised already: leave out quant=int8"):
        weights.load_model(tmp_path / "model", method=method("int8"))
    with pytest.raises(UserError, match="only an adapter can be trained on it: give lora_rank="):
        sft.optim.choose_trained(model, "all", 0)


def test_an_int8_directory_of_bitsandbytes_opens(bnb, tmp_path, base):
    peer = saved_by_bitsandbytes(tmp_path, base, load_in_8bit=True)
    model = weights.load_model(tmp_path)
    plain = weights.load_model(base)
    for name, layer in quant.layers(model):
        module = peer.get_submodule(name)
        assert torch.equal(layer.weight, module.weight.data)
        assert (layer.dense() - plain.get_submodule(name).weight).abs().max() < 0.01


def test_a_fused_matrix_of_bitsandbytes_is_split_exactly(bnb, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=264, n_positions=64, n_embd=64, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "plain")
    peer = saved_by_bitsandbytes(tmp_path / "nf4", tmp_path / "plain", **NF4)
    with torch.no_grad():
        right = peer(TOKENS).logits
    model = weights.load_model(tmp_path / "nf4")
    assert len(quant.layers(model)) == 12
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-5)


def test_a_fused_matrix_whose_rows_share_blocks_is_refused():
    packed = quant.quantize(random_matrix((6, 20)), method("nf4"))
    with pytest.raises(UserError, match="layers of 20 inputs cannot be split"):
        packed.split(families.ROWS, [(2, 20), (4, 20)], None)


def damage(dir, change):
    tensors = load_file(dir / "model.safetensors")
    change(tensors, "model.layers.1.mlp.up_proj.weight")
    save_file(tensors, dir / "model.safetensors", metadata={"format": "pt"})


def state(**changes):
    def change(tensors, name):
        key = f"{name}.quant_state.bitsandbytes__nf4"
        old = json.loads(bytes(tensors[key].tolist()))
        tensors[key] = torch.tensor(list(json.dumps(old | changes).encode()), dtype=torch.uint8)

    return change


def part(suffix, function):
    def change(tensors, name):
        tensors[name + suffix] = function(tensors[name + suffix])

    return change


def without(suffix):
    return lambda tensors, name: tensors.pop(name + suffix)


@pytest.mark.parametrize(
    "change, words",
    [
        (without(".absmax"), "its absmax is missing and not"),
        (without(""), "its weight is missing and not"),
        (without(".quant_state.bitsandbytes__nf4"), "do not fit"),
        (part("", lambda t: t[:-8]), r"its weight is torch.uint8 \(3064, 1\) and not"),
        (part(".absmax", lambda t: t[1:].clone()), r"its absmax is torch.uint8 \(95,\) and not"),
        (part(".quant_map", lambda t: t.flip(0)), "its quant_map is not that of nf4"),
        (part(".quant_state.bitsandbytes__nf4", lambda t: t[:9].clone()), "quant_state is damaged"),
        (state(blocksize=128), "blocksize is 128, not a whole number, 64"),
        (state(quant_type="af4"), "quant_type is 'af4'"),
        (state(shape=[48, 128]), "of another shape: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_damaged_directories(bnb, tmp_path, quantised, change, words):
    for path in quantised.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path, change)
    with pytest.raises(UserError, match=words):
        weights.load_model(tmp_path)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, base, bnb):
    """A directory in nf4, with the tokenizer of `base`."""
    dir = tmp_path_factory.mktemp("nf4")
    saved_by_bitsandbytes(dir, base, **NF4)
    for path in base.glob("tokenizer*"):
        (dir / path.name).write_bytes(path.read_bytes())
    return dir


def test_other_quantised_directories_are_refused(tmp_path, base):
    config = json.loads((base / "config.json").read_text())
    tiny.write(tmp_path, "config.json", config | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UserError, match="weights quantised by gptq are not supported"):
        weights.load_model(tmp_path)


# ---- adapters


def test_adapters_go_to_peft_and_back(bnb, tmp_path, quantised):
    """Ours on a quantised base in peft over bitsandbytes, and peft's here. Gradients agree too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = weights.open(quantised).model
    lora.apply(model, rank=4, alpha=8)
    shake(model)
    weights.save_adapter(model, tmp_path / "ours", base=quantised)
    peer = AutoModelForCausalLM.from_pretrained(quantised, device_map="cpu", dtype=torch.float32)
    peer = PeftModel.from_pretrained(peer, tmp_path / "ours", is_trainable=True)
    theirs, ours = peer(TOKENS).logits, model.logits(model.hidden(TOKENS))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    for output in (theirs, ours):
        output.square().sum().backward()
    gradients = dict(peer.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer, _, half = name.removesuffix(".default").rpartition(".")
            right = gradients[f"base_model.model.{layer}.{half}.default.weight"].grad
            torch.testing.assert_close(p.grad, right, rtol=1e-4, atol=1e-5 * right.abs().max())
    peer.save_pretrained(tmp_path / "peft")
    again = weights.open(tmp_path / "peft", quantised).model
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def convert(capsys, **settings):
    prepare_weights.main(config.parse(prepare_weights.Config, tiny.arguments(settings)))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    """(directory, logits) of an adapter on the base in nf4."""
    dir = tmp_path_factory.mktemp("adapter") / "last"
    opened = weights.open(base, method=method("nf4"))
    lora.apply(opened.model, rank=4, alpha=8)
    shake(opened.model)
    weights.save_adapter(opened.model, dir, base=base, tok=opened.tok)
    return dir, logits(opened.model)


def test_merging_into_the_quantised_base_changes_no_output(tmp_path, capsys, adapter):
    dir, right = adapter
    said = convert(capsys, source=dir, out=tmp_path / "out", quant="nf4", dtype="float32")
    merged = weights.load_model(tmp_path / "out")
    assert (logits(merged) - right).abs().max() <= 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    before, after = said.split("loss ")[1].split("\n")[0].split(" for ")
    assert abs(float(before) - float(after)) <= 1e-4


def test_merging_into_the_original_base_says_what_it_changes(tmp_path, capsys, base, adapter):
    dir, right = adapter
    out = tmp_path / "out"
    said = convert(capsys, source=dir, out=out, quant="nf4", merge_on="original", dtype="float32")
    model = weights.open(dir, base).model
    merged = logits(weights.load_model(out))
    assert (merged - logits(model)).abs().max() <= 1e-4
    assert (merged - right).abs().max() > 0.01
    assert float(said.split("by ")[1].split(" ")[0]) > 0.01


def test_a_sum_that_differs_is_not_written(tmp_path, capsys, monkeypatch, adapter):
    merge = prepare_weights.merge_adapters

    def wrong(model):
        model = merge(model)
        model.layers[0].self_attn.q_proj.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(prepare_weights, "merge_adapters", wrong)
    with pytest.raises(UserError, match="gives other outputs than beside it"):
        convert(capsys, source=adapter[0], out=tmp_path / "out", quant="nf4")
    assert not (tmp_path / "out").exists()


def test_a_quantised_directory_becomes_plain_weights(tmp_path, capsys, quantised):
    convert(capsys, source=quantised, out=tmp_path / "out")
    model, plain = weights.load_model(quantised), weights.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(quant="nf4"), "quant=nf4 has no effect with lora_rank=0"),
        (dict(lora_rank=4, double_quant=False), "double_quant=false has no effect with quant=none"),
        (
            dict(lora_rank=4, quant="int8", quant_kernel="torch"),
            "quant_kernel=torch has no effect with quant=int8",
        ),
    ],
)
def test_keys_without_effect(settings, words):
    with pytest.raises(UserError, match=words):
        config.check(sft.Config(**settings))


def test_bitsandbytes_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(quant, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="quant_kernel=bitsandbytes needs the package"):
        quant.of(sft.Config(lora_rank=4, quant="nf4", quant_kernel="bitsandbytes"))


def test_a_quantised_base_given_to_full_training(tmp_path, quantised):
    data = tiny.store(tmp_path / "rows", quantised)
    argv = [f"model={quantised}", f"data={data}", f"out={tmp_path / 'out'}", "steps=1"]
    with pytest.raises(UserError, match="the model is quantised \\(nf4\\)"):
        tiny.train("sft", argv)


# ---- memory


@pytest.mark.parametrize("kind, grad_checkpoint", [("nf4", True), ("int8", False)])
def test_the_memory_estimate_counts_quantised_weights(tmp_path, kind, grad_checkpoint, monkeypatch):
    """As in test_sft.py. The model is most of what there is, and its layers are quantised."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 2**16)
    tiny.model_dir(tmp_path, n_layers=6, dim=256, ffn_dim=768, head_dim=64)
    model = weights.load_model(tmp_path, method=method(kind))
    plain = sum(p.numel() for p in weights.load_model(tmp_path).parameters())
    assert estimate.count(model) == plain
    lora.apply(model, rank=2, alpha=4)
    runtime.Runtime("cpu", dtype="float32").wrap(model, grad_checkpoint=grad_checkpoint)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    micro = tiny.batch([tiny.rows(2, low=25, high=32)], 64)

    def step():
        for _ in range(2):
            sft.loss_sum(model, model(micro), micro).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = sum(p.nbytes + 8 * p.numel() * p.requires_grad for p in model.parameters())
    peak += tiny.peak_memory(step)
    parts = estimate.memory(model, 64, dtype=torch.float32, grad_checkpoint=grad_checkpoint)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert 0.9 < sum(parts.values()) / peak < 1.1


LOAD = """
import sys
from nano import quant, weights

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))

weights.load_model(sys.argv[2], method=quant.Method("nf4"))  # what a first call imports and keeps
before, highest = anonymous(), 0
quantize = quant.quantize
def watched(*args):
    global highest
    out = quantize(*args)
    highest = max(highest, anonymous())
    return out
quant.quantize = watched
model = weights.load_model(sys.argv[1], method=quant.Method("nf4"))
size = sum(p.nbytes for _, m in quant.layers(model) for p in m.parameters())
largest = max(2 * m.in_features * m.out_features for _, m in quant.layers(model))
print(max(highest, anonymous()) - before, size, largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_quantised_size_and_a_tensor(tmp_path, base):
    """A model of 67 MB, and with NANO_SLOW=1 of 1 GB."""
    dim = 2048 if os.environ.get("NANO_SLOW") else 512
    sizes = dict(dim=dim, ffn_dim=4 * dim, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=dim // 8)
    with torch.device("meta"):
        model = tiny.Transformer(tiny.ModelConfig(**tiny.SIZES | sizes))
    model = model.to_empty(device="cpu").bfloat16()
    for p in model.parameters():
        p.data.copy_(torch.rand(1) * 0.01)
    weights.save_model(model, tmp_path)
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", LOAD, tmp_path, base]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    used, size, largest = map(int, done.stdout.split())
    assert used < 1.3 * size + largest
