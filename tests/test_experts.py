"""Mixtures of experts and attention sinks: their kernels, the auxiliary loss, MXFP4 files, runs."""

import json
import math
from functools import partial

import peft
import pytest
import tiny
import torch
import transformers as hf
from safetensors.torch import save_file
from stages import assert_same_curve, assert_same_weights
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import lora
import model as model_file
from model import Extras, ModelConfig, Stack, Transformer, attend, block_mask, plain_attention
from nano import estimate, generate, losses, optim, quant, store, tensor, tokenizer, weights
from nano.config import UserError

SHAPE = dict(
    vocab_size=61,
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    n_experts=5,
    experts_per_token=2,
    max_positions=64,
)


def mixture(**more):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE | more)).init_weights(0.2)


def tokens(batch=2, length=24):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def test_grouped_products_equal_the_loop():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16).bfloat16(), torch.randn(4, 24, 16).bfloat16()
    ends = torch.tensor([11, 11, 30, 40], dtype=torch.int32)  # the second expert has no token
    weight.requires_grad = x.requires_grad = True
    outs, grads = [], []
    for product in (Stack.grouped, Stack.product):
        outs.append(product(x, weight, ends))
        grads.append(torch.autograd.grad(outs[-1].float().square().sum(), (x, weight)))
    assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not grads[0][1][1].any()


def test_no_token_is_dropped_where_all_want_the_same_experts():
    model = mixture(router_bias=True)
    mlp = model.layers[0].mlp
    with torch.no_grad():
        mlp.gate.weight.zero_()
        mlp.gate.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0]))
        x = torch.randn(1, 30, 32)
        y = mlp(x)
        a, b = torch.tensor([3.0, 4.0]).exp() / mlp.gate.bias.exp().sum()
        by_hand = 0
        for weight, number in ((a, 1), (b, 3)):
            gate, up = (x @ mlp.experts.gate_up_proj.weight[number].T).chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
            by_hand = by_hand + weight * (hidden @ mlp.experts.down_proj.weight[number].T)
    assert (y - by_hand).abs().max() < 1e-5


@torch.no_grad()
def test_batch_mates_change_no_token():
    model, x = mixture(), tokens(4)
    together = model.hidden(x)
    alone = torch.cat([model.hidden(row[None]) for row in x])
    assert (together - alone).abs().max() < 1e-5  # fp32 products of another number of rows


@pytest.mark.parametrize("window", [0, 9])
def test_flex_attention_with_sinks_equals_plain_products(window):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 128, 16)
    k, v = torch.randn(2, 2, 128, 16), torch.randn(2, 2, 128, 16)
    sinks = torch.randn(4, requires_grad=True)
    docs = torch.zeros(2, 128, dtype=torch.int64)
    docs[0, 50:] = 1
    extras = Extras(0.25, sinks=sinks)
    outs = []
    # uncompiled, it builds all scores and runs on a CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_file, "_compiled_flex", lambda: flex_attention)
        outs.append(attend(q, k, v, block_mask(docs, window), extras))
    index = torch.arange(128)
    seen = (index <= index[:, None]) & (docs[:, :, None] == docs[:, None])
    if window:
        seen &= index > index[:, None] - window
    outs.append(plain_attention(q, k, v, seen[:, None], extras))
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    without = plain_attention(q, k, v, seen[:, None], Extras(0.25))
    assert (outs[1] - without).abs().max() > 0.1
    # by differences, because a CPU's flex_attention has no gradient
    step = torch.zeros(4)
    step[1] = 1e-2
    grad = torch.autograd.grad(outs[1].sum(), sinks)[0]
    sides = [
        plain_attention(q, k, v, seen[:, None], Extras(0.25, sinks=sinks + s))
        for s in (step, -step)
    ]
    assert abs((sides[0] - sides[1]).sum() / 2e-2 - grad[1]) < 1e-2


def test_the_auxiliary_loss_is_that_of_transformers():
    model, x = mixture(dense_layers=(1,)), tokens()
    docs = torch.zeros_like(x)
    docs[1, 15:] = -1
    model.hidden(x, docs=docs)
    scores = model.router_scores()
    assert len(scores) == 2 and model.router_scores() == []
    for router, kept in zip(
        (model.layers[0].mlp.gate, model.layers[2].mlp.gate), scores, strict=True
    ):
        router.scores = kept
    stats = losses.routing(model, dict(docs=docs))
    wanted = load_balancing_loss_func(tuple(scores), 5, 2, (docs >= 0).float())
    assert abs(stats["aux_loss"] - wanted) < 1e-5
    assert stats["min_load"] <= 1 <= stats["max_load"] and 0 < stats["router_entropy"] <= 1


def test_recomputation_counts_the_auxiliary_loss_once():
    grads = []
    for recompute in (None, partial(checkpoint, use_reentrant=False)):
        model, x = mixture(), tokens()
        model.recompute = recompute
        hidden = model(dict(tokens=x))
        aux = losses.routing(model, dict(tokens=x))["aux_loss"]
        (hidden.square().mean() + aux).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    aux_grad = [p for n, p in model.named_parameters() if n.endswith("gate.weight")]
    assert all(p.grad.abs().sum() > 0 for p in aux_grad)


@torch.no_grad()
def test_replayed_experts_keep_the_probability_ratio_at_one():
    """Where scores are nearly equal, a small change of the router changes which experts a token
    takes, but hardly how they are weighted."""
    model, x = mixture(dense_layers=(1,)), tokens()
    gates = [layer.mlp.gate.weight for layer in (model.layers[0], model.layers[2])]
    for gate in gates:
        gate.mul_(1e-6)

    def logprobs(**more):
        return model.logits(model(dict(tokens=x, **more))).log_softmax(-1)

    old = logprobs()
    experts = losses.chosen_experts(model)
    for gate in gates:
        gate.add_(1e-6 * torch.randn_like(gate))
    assert (logprobs(experts=experts) - old).abs().max() < 1e-4  # the weights' own change
    assert (logprobs() - old).abs().max() > 0.1
    assert (losses.chosen_experts(model) != experts).float().mean() > 0.2


def test_the_stages_balance_and_replay(tmp_path, capsys):
    sizes = dict(family="qwen3_moe", qk_norm="head", n_experts=4, expert_dim=24, router="chosen")
    tiny.model_dir(tmp_path / "model", **sizes)
    tiny.model_dir(tmp_path / "dense")
    tiny.store(tmp_path / "rows", tmp_path / "model", n=8, val=2)
    tiny.preferences(tmp_path / "groups", tmp_path / "model", n=8, val=2)
    (tmp_path / "rewards.py").write_text("def a(p, r, f):\n    return len(r) % 5\n")
    keys = "device=cpu dtype=float32 steps=1 batch_size=4 log_every=1 lora_rank=2 aux_coef=0.1"
    keys += " lora_targets=[q_proj,gate_up_proj,down_proj] grad_checkpoint=true lr=1e-2"
    stages = dict(
        dpo="data={0}/groups max_length=64 sample_tokens=0",
        reward="data={0}/groups max_length=64 norm_tokens=2 norm_samples=4",
        ppo="data={0}/rows reward={0}/rewards.py:a max_new_tokens=4 micro_batch=2 algo=grpo group=2"
        " replay_experts=true ppo_epochs=2",
    )
    for stage, more in stages.items():
        argv = [*keys.split(), *more.format(tmp_path).split()]
        tiny.train(stage, [f"model={tmp_path}/model", f"out={tmp_path}/{stage}", *argv])
        line = tiny.lines(tmp_path / stage, "train")[-1]
        assert line["aux_loss"] > 1 and line["min_load"] <= 1 <= line["max_load"]
        assert line.get("first_ratio_off", 0) < 1e-5
    argv = [key for key in argv if not key.startswith(("aux_coef", "lora_targets"))]
    with pytest.raises(UserError, match="has no experts"):
        tiny.train("ppo", [f"model={tmp_path}/dense", f"out={tmp_path}/refused", *argv])


def test_the_estimate_counts_active_parameters_apart():
    model = mixture()
    E, k, one = 5, 2, 3 * 32 * 48
    assert estimate.idle(model) == 3 * (E - k) * one
    dense = Transformer(ModelConfig(**SHAPE | dict(n_experts=0, ffn_dim=2 * 48)))
    router = 3 * E * 32  # the only other difference
    assert model.flops_per_token(16) == dense.flops_per_token(16) + 6 * router


def test_biases_of_experts_do_not_decay():
    model = mixture(expert_bias=True)
    decay = {id(p) for p in optim.param_groups(model, 0.1)[0]["params"]}
    experts = model.layers[0].mlp.experts
    assert id(experts.down_proj.weight) in decay and id(experts.down_proj.bias) not in decay


def test_tensor_parallelism_refuses_experts():
    with pytest.raises(UserError, match="does not share out experts"):
        tensor.check(ModelConfig(**SHAPE), 2)


def shaken(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tiny.adapter_parameters(model):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def test_an_adapter_of_one_stack_goes_to_peft_and_back(tmp_path):
    """Its place in the file says nothing of which stack it is, so the other one must not take it."""
    base = tiny.model_dir(tmp_path / "base", family="mixtral", n_experts=4, router="chosen")
    x = tokens()
    for stack in ("gate_up_proj", "down_proj", "layers.1.mlp.experts.down_proj"):
        model = weights.load_model(base)
        lora.apply(model, rank=2, alpha=8, targets=stack, rslora=True)
        weights.save_adapter(shaken(model), tmp_path / "ours", base=base)
        with torch.no_grad():
            ours = model.logits(model.hidden(x))
            inner = hf.AutoModelForCausalLM.from_pretrained(base).float()
            theirs = peft.PeftModel.from_pretrained(inner, tmp_path / "ours").eval()
            assert (theirs(x).logits - ours).abs().max() < 1e-4
            theirs.save_pretrained(tmp_path / "theirs")
            again = weights.open(tmp_path / "theirs", base=base).model
            assert (again.logits(again.hidden(x)) - ours).abs().max() < 1e-5
            plain = weights.load_model(base)
            assert (plain.logits(plain.hidden(x)) - ours).abs().max() > 0.05
    with pytest.raises(ValueError, match="no dropout in peft"):
        lora.apply(plain, rank=2, alpha=8, dropout=0.1, targets="down_proj")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_experts_are_the_experts_of_their_matrices(kind, tmp_path):
    """Values, gradients and samples, with an adapter around them. No matrix is a stack's whole."""
    sizes = dict(family="qwen2_moe", qkv_bias=True, n_experts=5, shared_dim=40, expert_dim=24)
    base = tiny.model_dir(tmp_path / "base", **sizes)
    model, plain = (weights.load_model(base, method=quant.Method(kind)) for _ in range(2))
    original = weights.load_model(base)
    assert [name for name, _ in quant.layers(model)] == lora.linear_names(original)
    for name, layer in quant.layers(model):
        weight = original.get_submodule(name).weight
        assert (layer.dense() - weight).norm() < 0.15 * weight.norm()  # nf4: 0.09
    quant.restore(plain, torch.float32)
    assert estimate.count(model) == estimate.count(plain) == estimate.count(original)
    assert estimate.idle(model) == estimate.idle(plain)
    assert model.flops_per_token(16) == plain.flops_per_token(16)
    x, outs, grads, sizes = tokens(), [], [], []
    dequantize = quant.dequantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "dequantize", lambda *a: sizes.append(a[0][1]) or dequantize(*a))
        for m in (model, plain):
            lora.apply(m, rank=2, alpha=8, targets=["all-linear", "gate_up_proj", "down_proj"])
            hidden = shaken(m)(dict(tokens=x))
            hidden.square().mean().backward()
            outs.append(hidden)
            grads.append([p.grad for p in tiny.adapter_parameters(m)])
    assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert max(map(math.prod, sizes)) == 40 * 32  # that of the shared expert
    greedy = [generate.generate(m, [[1, 2, 3]], 8, temperature=0.0).tokens for m in (model, plain)]
    assert greedy[0] == greedy[1]


def test_an_mxfp4_checkpoint_is_dequantised(tmp_path):
    sizes = dict(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    reference = hf.AutoModelForCausalLM.from_config(hf.GptOssConfig(**sizes)).bfloat16().eval()
    reference.save_pretrained(tmp_path)
    stored = tiny.tensors(tmp_path)
    dense = {}
    for name in [n for n in stored if n.endswith(("gate_up_proj", "down_proj"))]:
        E, ins, outs = stored.pop(name).shape
        blocks = torch.randint(0, 256, (E, outs, ins // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (E, outs, ins // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="mxfp4")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = weights.load_model(tmp_path)
    params = dict(reference.named_parameters())
    x = tokens()
    with torch.no_grad():
        for name, matrix in dense.items():
            params[name].copy_(matrix)
        exact = reference.float()(x).logits
        ours = model.float()
        assert (ours.logits(ours.hidden(x)) - exact).abs().max() < 1e-4
        # its experts keep their bytes where the other layers are quantised
        kept = weights.load_model(tmp_path, method=quant.Method("int8"))
        kinds = {name.rpartition(".")[2]: layer.kind for name, layer in quant.layers(kept)}
        assert kinds["gate_up_proj"] == kinds["down_proj"] == "mxfp4" and kinds["q_proj"] == "int8"
        for name, layer in quant.layers(kept):
            if layer.kind == "mxfp4":
                assert torch.equal(layer.dense(), ours.get_submodule(name).weight)
                assert layer.weight.nbytes + layer.absmax.nbytes == 17 / 32 * math.prod(layer.shape)
    weights.save_model(ours, tmp_path / "saved", dtype=torch.bfloat16, like=tmp_path)
    again = tiny.tensors(tmp_path / "saved")
    assert all(torch.equal(again[name], matrix) for name, matrix in dense.items())
    stored.pop("model.layers.0.mlp.experts.down_proj_scales")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="blocks and scales do not fit"):
        weights.load_model(tmp_path)


def test_sharded_experts_learn_what_one_process_does(tmp_path):
    sizes = dict(n_experts=4, expert_dim=24, dense_layers=(0,), router="chosen", n_layers=3)
    tiny.model_dir(tmp_path / "model", family="qwen3_moe", qk_norm="head", **sizes)
    tiny.store(tmp_path / "rows", tmp_path / "model", n=24)
    settings = f"model={tmp_path}/model data={tmp_path}/rows device=cpu dtype=float32 steps=3"
    settings += " batch_size=4 micro_batch=1 max_length=64 aux_coef=0.1 lr=1e-3 log_every=1"
    settings += " sample_every=-1 schedule=constant"
    one, two = tmp_path / "one", tmp_path / "two"
    tiny.train("sft", [*settings.split(), f"out={one}"])
    argv = [*settings.split(), f"out={two}", "parallel=fsdp", "grad_checkpoint=true"]
    status, output = tiny.processes(tmp_path, [("sft", argv)])
    assert status == 0, output
    assert_same_curve(two, one)
    assert_same_weights(two / "last", one / "last")
    lines = [line for line in tiny.lines(one) if line["kind"] == "train"]
    assert all(line["min_load"] <= 1 <= line["max_load"] for line in lines)
    assert all(line["aux_loss"] > 0 for line in lines)


def test_a_mixture_is_pretrained_as_mixtral(tmp_path, capsys):
    tiny.model_dir(tmp_path / "model")
    texts = [(ids, [1] * len(ids)) for ids, _ in tiny.rows(24, 3)]
    meta = dict(vocab_size=264, tokenizer=tokenizer.load(tmp_path / "model").fingerprint)
    store.write_store(tmp_path / "text", dict(train=texts, val=texts[:4]), meta)
    argv = f"data={tmp_path}/text tokenizer={tmp_path}/model size=toy device=cpu"
    argv = [
        *argv.split(),
        *"max_length=32 steps=2 batch_size=4 micro_batch=2 sample_tokens=0".split(),
    ]
    mixed = [*argv, f"out={tmp_path}/out", "n_experts=4", "aux_coef=0.01", "grad_checkpoint=true"]
    tiny.train("pretrain", mixed)
    model = weights.load_model(tmp_path / "out" / "last")
    assert (model.cfg.family, model.cfg.n_experts, model.cfg.experts_per_token) == ("mixtral", 4, 2)
    assert "for each token" in capsys.readouterr().out
    with pytest.raises(UserError, match="this model has none"):
        tiny.train("pretrain", [*argv, "aux_coef=0.01", f"out={tmp_path}/dense"])
