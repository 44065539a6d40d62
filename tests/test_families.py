"""Every family of models against transformers and peft, on tiny random models with odd sizes.

A family is a Case or several. The first of each is tested by default, and all with NANO_SLOW=1. To
add a family: an entry in nano/families.py, and a Case here.
"""

import itertools
import json
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import peft
import pytest
import stages
import tiny
import torch
import torch.nn.functional as F
import transformers as hf
from conftest import ROOT, SLOW
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import allowed, edited, edits, fuzz
from torch.utils.checkpoint import checkpoint

import lora
from model import Transformer, empty
from nano import estimate, evaluation, families, tokenizer, weights
from nano.config import UserError
from nano.generate import choose, generate
from nano.runtime import Runtime

VOCAB, LENGTH = 97, 40


@dataclass
class Case:
    """settings: keys of config.json of a tiny model. real: config.json of published models of the
    family, as far as it says something of the model."""

    config: type
    settings: dict
    real: list = field(default_factory=list)

    @property
    def family(self):
        return self.config.model_type


TINY = dict(
    vocab_size=VOCAB,
    hidden_size=56,
    intermediate_size=88,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
HEADS = dict(head_dim=16)
CAPS = dict(query_pre_attn_scalar=9, attn_logit_softcapping=1.5, final_logit_softcapping=2.5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.3, 1.9, 2.5],
    long_factor=[1.0, 1.5, 4.0, 9.0, 20.0],
)
SLIDING, FULL = "sliding_attention", "full_attention"


def sizes(hidden, ffn, layers, heads, kv_heads, vocab, **more):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    common = dict(zip(names, (hidden, ffn, layers, heads), strict=True))
    kv = dict(num_key_value_heads=kv_heads) if kv_heads else {}
    return common | kv | dict(vocab_size=vocab, **more)


GEMMA3_4B = sizes(2560, 10240, 34, 8, 4, 262208, model_type="gemma3_text", sliding_window=1024)
PHI4_LONG = dict(type="longrope", short_factor=[1.0] * 48, long_factor=[2.0] * 48)
OLMO3_YARN = dict(
    rope_type="yarn",
    factor=8.0,
    attention_factor=1.2079441541679836,
    beta_fast=32,
    beta_slow=1,
    original_max_position_embeddings=8192,
)
MINISTRAL_ROPE = dict(
    rope_type="yarn",
    factor=16.0,
    original_max_position_embeddings=16384,
    rope_theta=1e6,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
SIX_HEADS = IDS | dict(
    vocab_size=VOCAB,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=128,
)
BLOOM = IDS | dict(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6)
OPT = SIX_HEADS | dict(hidden_size=42, ffn_dim=72, word_embed_proj_dim=42)
BIGCODE = IDS | dict(vocab_size=VOCAB, n_embd=36, n_layer=2, n_head=6, n_positions=128)
NEOX = SIX_HEADS | dict(hidden_size=64, num_attention_heads=4, intermediate_size=72)
GRANITE = dict(embedding_multiplier=12.0, residual_multiplier=0.22, tie_word_embeddings=True)

CASES = {
    "gemma2": Case(
        hf.Gemma2Config,
        TINY | HEADS | CAPS | dict(sliding_window=7),
        [
            sizes(2304, 9216, 26, 8, 4, 256000, head_dim=256),
            sizes(4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
        ],
    ),
    "gemma2 untied, without caps": Case(
        hf.Gemma2Config,
        TINY
        | dict(head_dim=12, tie_word_embeddings=False, attention_bias=True)
        | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": Case(
        hf.Gemma3TextConfig,
        TINY
        | HEADS
        | dict(
            sliding_window=7,
            query_pre_attn_scalar=9,
            layer_types=[SLIDING, SLIDING, FULL],
            rope_parameters={
                SLIDING: dict(rope_type="default", rope_theta=100.0),
                FULL: dict(rope_type="linear", rope_theta=5000.0, factor=3.0),
            },
        ),
        [
            sizes(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512),
            dict(
                architectures=["Gemma3ForConditionalGeneration"],
                model_type="gemma3",
                text_config=GEMMA3_4B | dict(rope_scaling=dict(factor=8.0, rope_type="linear")),
            ),
        ],
    ),
    "olmo2": Case(
        hf.Olmo2Config,
        TINY | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        [
            sizes(2048, 8192, 16, 16, 16, 100352, rope_theta=500000, rms_norm_eps=1e-6),
            sizes(5120, 27648, 64, 40, 8, 100352, rope_theta=500000, rms_norm_eps=1e-6),
        ],
    ),
    "olmo3": Case(
        hf.Olmo3Config,
        TINY
        | dict(
            sliding_window=7,
            layer_types=[SLIDING, FULL, SLIDING],
            rope_parameters={
                SLIDING: dict(rope_type="default", rope_theta=700.0),
                FULL: YARN | dict(rope_theta=700.0),
            },
        ),
        [
            sizes(4096, 11008, 32, 32, 32, 100278, rope_scaling=OLMO3_YARN),
            sizes(5120, 27648, 64, 40, 8, 100278, rope_scaling=OLMO3_YARN),
        ],
    ),
    "smollm3": Case(
        hf.SmolLM3Config,
        TINY | dict(no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
        [
            sizes(2048, 11008, 36, 16, 4, 128256, rope_theta=2e6, no_rope_layer_interval=4),
            sizes(2048, 11008, 36, 16, 4, 128256, no_rope_layers=[1, 1, 1, 0] * 9),
        ],
    ),
    "smollm3 windows, biases": Case(
        hf.SmolLM3Config,
        TINY
        | dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7, mlp_bias=True),
    ),
    "phi3": Case(  # Phi-4-mini's rope, and documents beyond the original context
        hf.Phi3Config,
        TINY
        | dict(
            original_max_position_embeddings=16,
            rope_parameters=LONG | dict(rope_theta=100.0, partial_rotary_factor=0.75),
            tie_word_embeddings=True,
        ),
        [
            sizes(3072, 8192, 32, 32, 32, 32064, sliding_window=2047),
            sizes(
                *(3072, 8192, 32, 24, 8, 200064),
                partial_rotary_factor=0.75,
                rope_scaling=PHI4_LONG,
                max_position_embeddings=131072,
                tie_word_embeddings=True,
            ),
        ],
    ),
    "phi3 window": Case(hf.Phi3Config, TINY | dict(sliding_window=7)),
    "ministral3": Case(
        hf.Ministral3Config,
        TINY
        | HEADS
        | dict(rope_parameters=MINISTRAL_ROPE | dict(original_max_position_embeddings=16)),
        [
            sizes(3072, 9216, 26, 32, 8, 131072, rope_parameters=MINISTRAL_ROPE),
            dict(
                architectures=["Mistral3ForConditionalGeneration"],
                model_type="mistral3",
                text_config=sizes(
                    *(4096, 14336, 34, 32, 8, 131072),
                    model_type="ministral3",
                    rope_parameters=MINISTRAL_ROPE,
                ),
            ),
        ],
    ),
    "granite": Case(
        hf.GraniteConfig,
        TINY
        | dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            attention_multiplier=0.4,
            logits_scaling=1.3,
            attention_bias=True,
        ),
        [
            sizes(2048, 8192, 40, 32, 8, 49155, **GRANITE, attention_multiplier=0.015625),
            sizes(4096, 12800, 40, 32, 8, 49155, **GRANITE, logits_scaling=16.0),
        ],
    ),
    "seed_oss": Case(
        hf.SeedOssConfig,
        TINY | HEADS | dict(attention_dropout=0.0, residual_dropout=0.0),
        [sizes(5120, 27648, 64, 80, 8, 155136, head_dim=128, rope_theta=1e7)],
    ),
    "starcoder2": Case(
        hf.Starcoder2Config,
        TINY | dict(sliding_window=7, norm_epsilon=1e-3),
        [
            sizes(3072, 12288, 30, 24, 2, 49152, rope_theta=999999.4420358813, sliding_window=4096),
            sizes(6144, 24576, 40, 48, 4, 49152, rope_theta=1e5),
        ],
    ),
    "starcoder2 without biases": Case(hf.Starcoder2Config, TINY | dict(use_bias=False)),
    "qwen2 yarn": Case(
        hf.Qwen2Config,
        TINY | dict(rope_parameters=YARN | dict(rope_theta=1000.0, factor=2.5)),
        [sizes(3584, 18944, 28, 28, 4, 152064, rope_scaling=YARN | dict(factor=4.0))],
    ),
    "qwen3 yarn": Case(
        hf.Qwen3Config,
        TINY
        | HEADS
        | dict(rope_parameters=YARN | dict(rope_theta=1000.0, attention_factor=0.8707)),
    ),
    "bloom": Case(
        hf.BloomConfig,
        BLOOM,
        [
            dict(vocab_size=250880, n_embed=1024, n_layer=24, num_attention_heads=16),
            dict(vocab_size=250880, n_embed=4096, n_layer=30, num_attention_heads=32),
        ],
    ),
    "bloom of 4 heads": Case(hf.BloomConfig, BLOOM | dict(n_head=4, layer_norm_epsilon=1e-3)),
    "opt": Case(
        hf.OPTConfig,
        OPT,
        [
            dict(
                vocab_size=50272,
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                ffn_dim=4096,
                word_embed_proj_dim=512,
                do_layer_norm_before=False,
            ),
            dict(
                vocab_size=50272,
                hidden_size=4096,
                num_hidden_layers=32,
                num_attention_heads=32,
                ffn_dim=16384,
                word_embed_proj_dim=4096,
            ),
        ],
    ),
    "opt with norms of sums and projections": Case(
        hf.OPTConfig, OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=24)
    ),
    "galactica": Case(
        hf.OPTConfig,
        OPT
        | dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    ),
    "falcon": Case(
        hf.FalconConfig,
        SIX_HEADS | dict(new_decoder_architecture=True, num_kv_heads=2),
        [
            dict(
                vocab_size=65024,
                hidden_size=4544,
                num_hidden_layers=32,
                num_attention_heads=71,
                multi_query=True,
                parallel_attn=True,
            ),
            dict(
                vocab_size=65024,
                hidden_size=8192,
                num_hidden_layers=60,
                num_attention_heads=128,
                num_kv_heads=8,
                new_decoder_architecture=True,
            ),
            dict(
                vocab_size=50304,
                hidden_size=2048,
                num_hidden_layers=24,
                num_attention_heads=32,
                multi_query=False,
                parallel_attn=False,
                alibi=True,
                bias=True,
            ),
        ],
    ),
    "falcon with one key/value head and one norm": Case(hf.FalconConfig, SIX_HEADS),
    "falcon with two key/value heads and one norm": Case(
        hf.FalconConfig,
        SIX_HEADS
        | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)
        | dict(ffn_hidden_size=80, tie_word_embeddings=False),
    ),
    "falcon with alibi": Case(
        hf.FalconConfig,
        SIX_HEADS | dict(alibi=True, bias=True, multi_query=False, parallel_attn=False),
    ),
    "falcon with a key/value head for each": Case(
        hf.FalconConfig, SIX_HEADS | dict(multi_query=False, activation="relu")
    ),
    "bigcode": Case(
        hf.GPTBigCodeConfig,
        BIGCODE,
        [
            dict(
                vocab_size=49280, n_embd=2048, n_layer=24, n_head=16, n_inner=8192, n_positions=2048
            ),
            dict(
                vocab_size=49152,
                n_embd=6144,
                n_layer=40,
                n_head=48,
                n_inner=24576,
                n_positions=8192,
                activation_function="gelu",
            ),
        ],
    ),
    "bigcode with a key/value head for each": Case(
        hf.GPTBigCodeConfig,
        BIGCODE | dict(multi_query=False, n_inner=56, activation_function="gelu"),
    ),
    "neox": Case(
        hf.GPTNeoXConfig,
        NEOX,
        [
            sizes(512, 2048, 6, 8, None, 50304, rotary_pct=0.25, rotary_emb_base=10000),
            sizes(6144, 24576, 44, 64, None, 50432, hidden_act="gelu_fast"),
        ],
    ),
    "serial neox": Case(
        hf.GPTNeoXConfig,
        NEOX
        | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_theta=5e3, partial_rotary_factor=0.5)),
    ),
    "mistral": Case(
        hf.MistralConfig,
        TINY | HEADS | dict(sliding_window=7),
        [sizes(4096, 14336, 32, 32, 8, 32000, sliding_window=4096, rms_norm_eps=1e-5)],
    ),
    "gpt2": Case(
        hf.GPT2Config,
        dict(vocab_size=VOCAB, n_embd=40, n_layer=2, n_head=4, n_positions=128)
        | dict(bos_token_id=None, eos_token_id=None, pad_token_id=0),
        [dict(vocab_size=50257, n_embd=768, n_layer=12, n_head=12)],
    ),
    "llama": Case(
        hf.LlamaConfig,
        TINY | dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=2.0)),
        [sizes(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True, rope_theta=5e5)],
    ),
    "llama dynamic": Case(
        hf.LlamaConfig,
        TINY | dict(rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=2.0)),
    ),
}


ROUTED = dict(num_experts=6, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=6, num_experts_per_tok=2)
CASES |= {
    "qwen3 moe": Case(
        hf.Qwen3MoeConfig,
        TINY
        | HEADS
        | ROUTED
        | dict(moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1]),
        [
            sizes(
                *(2048, 6144, 48, 32, 4, 151936),
                head_dim=128,
                moe_intermediate_size=768,
                num_experts=128,
                num_experts_per_tok=8,
                norm_topk_prob=True,
            )
        ],
    ),
    "qwen3 moe, every other layer": Case(
        hf.Qwen3MoeConfig,
        TINY | HEADS | ROUTED | dict(moe_intermediate_size=24, decoder_sparse_step=2),
    ),
    "qwen2 moe": Case(
        hf.Qwen2MoeConfig,
        TINY | ROUTED | dict(moe_intermediate_size=24, shared_expert_intermediate_size=40),
        [sizes(2048, 5632, 24, 16, 16, 151936, max_window_layers=21, sliding_window=32768)],
    ),
    "mixtral": Case(
        hf.MixtralConfig,
        TINY | LOCAL | dict(sliding_window=7),
        [sizes(4096, 14336, 32, 32, 8, 32000, rope_theta=1e6, num_local_experts=8)],
    ),
    "olmoe": Case(
        hf.OlmoeConfig,
        TINY | ROUTED,
        [sizes(2048, 1024, 16, 16, 16, 50304, num_experts=64, num_experts_per_tok=8)],
    ),
    "granite moe": Case(
        hf.GraniteMoeConfig,
        TINY
        | LOCAL
        | dict(
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            attention_multiplier=0.4,
            logits_scaling=1.3,
        ),
        [sizes(1024, 512, 24, 16, 8, 49155, num_local_experts=32, **GRANITE, logits_scaling=6.0)],
    ),
    "gpt-oss": Case(
        hf.GptOssConfig,
        TINY | HEADS | LOCAL | dict(sliding_window=7, layer_types=[SLIDING, FULL, SLIDING]),
        [
            sizes(
                *(2880, 2880, 24, 64, 8, 201088),
                head_dim=64,
                num_local_experts=32,
                num_experts_per_tok=4,
                sliding_window=128,
                rope_theta=150000,
                quantization_config=dict(quant_method="mxfp4"),
                rope_scaling=YARN
                | dict(factor=32.0, truncate=False, original_max_position_embeddings=4096),
            )
        ],
    ),
}


UNREAD = ("architectures", "quantization_config")  # by a model of random weights
# parameters that transformers now calls otherwise than its files do
OLD_NAMES = {"embed_out.weight": "lm_head.weight"}


def first_of_each():
    """The names of the cases: one of each family, or all with NANO_SLOW=1."""
    first = {case.family: name for name, case in reversed(CASES.items())}
    return [name for name, case in CASES.items() if SLOW or first[case.family] == name]


every_case = pytest.mark.parametrize("name", first_of_each())


def config(case, **more):
    return case.config(**case.settings | more)


@torch.no_grad()
def theirs(name, auto=hf.AutoModelForCausalLM, **more):
    """A random model of transformers in which no bias is 0 and no norm 1."""
    torch.manual_seed(0)
    model = auto.from_config(config(CASES[name], **more))
    for p in model.parameters():
        p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.2)
    return model.float().eval()


def tokens(batch=2, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A function from the name of a case to a directory that transformers wrote."""
    folders = {}

    def base(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("base")
            theirs(name).save_pretrained(folders[name])
        return folders[name]

    return base


@torch.no_grad()
def logits(model, x, docs=None):
    return model.logits(model.hidden(x, docs=docs))


def worst(a, b):
    return (a - b).abs().max().item()


@every_case
def test_logits_loss_and_gradients_equal_transformers(name, bases, tmp_path):
    reference, model, x = theirs(name), weights.load_model(bases(name)), tokens()
    assert sum(p.numel() for p in model.parameters()) == reference.num_parameters()
    out = reference(x, labels=x)
    out.loss.backward()
    hidden = model(dict(tokens=x)).view(*x.shape, -1)
    ours = model.logits(hidden)
    assert out.logits.std() > 0.1 and worst(ours, out.logits) < 1e-4
    loss = F.cross_entropy(ours[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    assert abs(loss.item() - out.loss.item()) < 1e-5
    with torch.no_grad():  # so that its gradients have the names and the layout of a file
        for p in reference.parameters():
            p.copy_(p.grad)
    reference.save_pretrained(tmp_path)
    wanted = weights.read_tensors(tmp_path)
    grads = families.by_expert({key: p.grad for key, p in model.named_parameters()})
    for stored, (parts, layout) in families.places(model.cfg, grads).items():
        fused = layout.fuse([grads[part] for part in parts], model.cfg)
        exact = wanted[stored]
        assert worst(fused, exact) < 1e-4 * max(1.0, exact.abs().max()), stored


@every_case
def test_what_is_saved_is_what_transformers_saves(name, bases, tmp_path):
    model, x = weights.load_model(bases(name)), tokens()
    weights.save_model(model, tmp_path, like=bases(name))
    ours, wanted = weights.read_tensors(tmp_path), weights.read_tensors(bases(name))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[key]) for key, t in ours.items())
    assert families.load_config(tmp_path) == model.cfg
    back, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert worst(back.float().eval()(x).logits, logits(model, x)) < 1e-4


@every_case
def test_packed_rows_equal_unpacked(name, bases):
    model, x = weights.load_model(bases(name)), tokens(1, 110)
    docs = torch.full_like(x, -1)
    edges = (0, 5, 6, 100)  # and 10 tokens of padding
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        docs[0, a:b] = i
    packed = logits(model, x, docs)
    assert packed.isfinite().all()
    for a, b in zip(edges, edges[1:], strict=False):
        assert worst(packed[0, a:b], logits(model, x[:, a:b])[0]) < 1e-4


@every_case
def test_autocast_and_recomputation_give_the_same_gradients(name, bases):
    model, x = weights.load_model(bases(name)), tokens()
    docs = torch.zeros_like(x)
    docs[:, 25:] = 1
    norms = []
    for recompute in (None, partial(checkpoint, use_reentrant=False)):
        model.recompute = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(x, docs=docs)
        assert hidden.dtype == torch.bfloat16
        hidden.float().square().mean().backward()
        grads = [p.grad for n, p in model.named_parameters() if n != "lm_head.weight"]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        model.zero_grad()
    exact = model.hidden(x, docs=docs)
    # bf16 has 8 significant bits, and with them a token may choose another expert
    near = (hidden.float() - exact).abs().amax(-1) < 0.1 * exact.abs().max()
    assert near.float().mean() > (0.7 if model.cfg.n_experts else 0.999)
    assert norms[0] == norms[1] > 0


@every_case
def test_the_estimate_counts_what_autograd_keeps(name, bases):
    model, x = weights.load_model(bases(name)), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = tiny.peak_memory(lambda: [model.hidden(x)])
    guess = estimate.memory(model, x.numel(), document=LENGTH)["activations"]
    assert 0.5 < guess / kept < 2.0
    active = sum(p.numel() for p in model.layers.parameters()) - estimate.idle(model)
    assert 6 * active < model.flops_per_token(LENGTH) < 12 * active


@every_case
def test_greedy_with_a_cache_equals_greedy_without(name, bases):
    model, x = weights.load_model(bases(name)), tokens(3)
    prompts = [x[0, :3].tolist(), x[1, :25].tolist(), x[2, :9].tolist()]
    samples = generate(model, prompts, 12, temperature=0.0, batch_size=2)
    for prompt, sample in zip(prompts, samples.tokens, strict=True):
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        assert sample == ids[len(prompt) :]


def shaken(model):
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.1)
    return model


def opened(base, dir):
    model = weights.load_model(base)
    weights.load_adapter(model, dir)
    return model


@every_case
def test_what_peft_writes_is_read_and_written_back(name, bases, tmp_path):
    base, x = bases(name), tokens()
    plain = weights.load_model(base)
    leaves = {layer.rpartition(".")[2] for layer in weights.adapter_places(plain)}
    settings = dict(r=4, lora_alpha=8, target_modules=sorted(leaves), task_type="CAUSAL_LM")
    settings["target_parameters"] = list(weights.adapter_stacks(plain)) or None
    reference = shaken(peft.get_peft_model(theirs(name), peft.LoraConfig(**settings))).eval()
    with torch.no_grad():
        expected = reference(x).logits
    reference.save_pretrained(tmp_path / "theirs")
    ours = opened(base, tmp_path / "theirs")
    assert worst(logits(ours, x), expected) < 1e-4 < 0.05 < worst(logits(plain, x), expected)
    weights.save_adapter(ours, tmp_path / "ours", base=base)
    # parts that share A are one adapter of its rank again
    written = weights.read_adapter_config(tmp_path / "ours")
    assert written["r"] == 4 and not written["rank_pattern"]
    assert worst(in_peft(base, tmp_path / "ours", x), expected) < 1e-4
    assert worst(logits(lora.merge(ours), x), expected) < 1e-4


def in_peft(base, dir, x):
    inner = hf.AutoModelForCausalLM.from_pretrained(base).float()
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(inner, dir).eval()(x).logits


@every_case
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_peft_reads_what_is_written_here(name, bases, targets, tmp_path):
    base, x = bases(name), tokens()
    model = weights.load_model(base)
    if model.cfg.n_experts and targets == "all-linear":
        targets = [targets, "gate_up_proj", "down_proj"]
    lora.apply(model, rank=4, alpha=8, targets=targets)
    shaken(model)
    weights.save_adapter(model, tmp_path, base=base)
    assert worst(in_peft(base, tmp_path, x), logits(model, x)) < 1e-4
    config = weights.read_adapter_config(tmp_path)
    again = opened(base, tmp_path)
    assert worst(logits(again, x), logits(model, x)) < 1e-5
    # layers with an A of their own have the same rank after each save
    weights.save_adapter(again, tmp_path, base=base)
    assert weights.read_adapter_config(tmp_path) == config


def with_scores():
    """The cases whose family has a model of transformers that gives scores."""
    scored = [n for n in first_of_each() if "score" in architectures(CASES[n])]
    return pytest.mark.parametrize("name", scored)


def test_the_table_in_the_readme():
    """It has each family, and says of each whether there are reward models."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[:1] == ["`model_type`"])
    assert rows[start][2:] == ["load", "save", "train", "LoRA", "generate", "reward"]
    table = {row[0]: row[2:] for row in itertools.takewhile(bool, rows[start + 2 :])}
    scored = {kind: "score" in family.architectures for kind, family in families.FAMILIES.items()}
    yes = {True: "yes", False: "no"}
    assert table == {kind: ["yes"] * 5 + [yes[score]] for kind, score in scored.items()}
    # tests/test_t5.py has the encoder-decoders
    assert table.keys() - {"t5", "mt5"} == {case.family for case in CASES.values()}


def architectures(case):
    return families.FAMILIES[case.family].architectures


@with_scores()
def test_scores_equal_sequence_classification(name, tmp_path):
    reference, x = theirs(name, hf.AutoModelForSequenceClassification, num_labels=1), tokens()
    x[0, 30:] = 0  # padding: theirs scores the last token before it
    with torch.no_grad():
        expected = reference(x).logits[:, 0]
        reference.save_pretrained(tmp_path / "theirs")
        model = weights.load_model(tmp_path / "theirs")
        assert model.cfg.head == "score"
        # documents of their own, because the long one alone may be beyond an original context
        scores = [model.score(model.hidden(row[None]))[0, -1] for row in (x[0, :30], x[1])]
    assert expected.std() > 0 and worst(torch.stack(scores), expected) < 1e-4
    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    back = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").float().eval()
    with torch.no_grad():
        assert worst(back(x).logits[:, 0], expected) < 1e-4


# ---- the stages


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    stages.prepare(folder)
    return folder


@pytest.mark.skipif(not SLOW, reason="NANO_SLOW=1 runs the stages of each family")
@every_case
def test_stages_train_it_and_resume_exactly(name, bases, data, tmp_path):
    cfg = replace(families.load_config(bases(name)), vocab_size=264)
    dirs = dict(lm="model", score="scorer")
    for head, dir in ((head, dirs[head]) for head in architectures(CASES[name])):
        torch.manual_seed(0)
        model = Transformer(replace(cfg, head=head)).init_weights(std=0.1)
        weights.save_model(model, tmp_path / dir)
        tokenizer.copy_files(data / "model", tmp_path / dir)
    mine = [f"model={tmp_path}/model"]
    cut, whole = ([f"out={tmp_path}/{run}", *mine] for run in ("cut", "whole"))
    jobs = [
        stages.job(data, "sft", "", *whole),
        stages.job(data, "sft", "", *cut, "steps=2"),
        stages.job(data, "sft", "", *cut),
    ]
    if "score" in architectures(CASES[name]):
        jobs.append(stages.job(data, "reward", tmp_path / "reward", *mine))
        scorer = f"reward={tmp_path}/scorer"
        jobs.append(stages.job(data, "ppo", tmp_path / "ppo", *mine, scorer))
    for stage in ("sft_lora", "dpo", "grpo"):
        jobs.append(stages.job(data, stage, tmp_path / stage, *mine))
    stages.alone(jobs)
    assert tiny.same_tensors(tmp_path / "whole" / "last", tmp_path / "cut" / "last")
    losses = [record["loss"] for record in tiny.records(tmp_path / "whole", "train")]
    assert losses[-1] < losses[0]


# ---- several devices

SHARDED = """
import torch
import lora
from nano import weights
from nano.runtime import Runtime
tokens = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
docs = torch.zeros_like(tokens)
docs[:, 25:] = 1
settings = dict(parallel="none", tensor=2), dict(parallel="fsdp")
runtimes = [Runtime(device="cpu", dtype="float32", **s) for s in settings]


def gradients(dir, adapted, rt):
    model = weights.load_model(dir)
    if adapted:
        torch.manual_seed(0)
        lora.apply(model, rank=2, alpha=4)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    if rt is not None:
        model = rt.wrap(model)
    hidden = model(dict(tokens=tokens, docs=docs))
    hidden.square().mean().backward()
    grads = dict(hidden=hidden)
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    return grads


for dir in {dirs}:
    for adapted in (False, True):
        right = gradients(dir, adapted, None)
        for rt in runtimes:
            sharded = gradients(dir, adapted, rt)
            assert right.keys() == sharded.keys()
            for name, g in right.items():
                assert (g - sharded[name]).abs().max() <= 1e-5 * max(1, g.abs().max()), (dir, name)
"""


def test_shared_and_sharded_layers_give_the_same_gradients(bases, tmp_path):
    """tensor=2 and fsdp on two processes, with adapters and without."""
    some = ["gemma3", "olmo3", "phi3", "bloom", "falcon"]  # whose slots devices share differently
    dirs = [str(bases(name)) for name in (first_of_each() if SLOW else some)]
    status, output = tiny.processes(tmp_path, [], before=SHARDED.format(dirs=dirs), timeout=300)
    assert status == 0, output[-3000:]


# ---- "longrope", by which a document that grows has other frequencies


def test_log_likelihoods_beyond_the_original_context(bases):
    """Contexts with options that stay within the 16 tokens, that cross them and that are beyond."""
    model, x = weights.load_model(bases("phi3")), tokens(4)
    rt = Runtime(device="cpu", dtype="float32")
    questions, expected = [], []
    for row, n in zip(x.tolist(), (3, 13, 14, 30), strict=True):
        options = [row[n : n + 2], row[n + 2 : n + 7]]
        questions.append(evaluation.Question(row[:n], options, key="a"))
        for option in options:
            logprobs = logits(model, torch.tensor([row[:n] + option[:-1]]))[0].log_softmax(-1)
            targets = torch.tensor(option)[:, None]
            expected.append(logprobs[n - 1 :].gather(1, targets).sum().item())
    scored = evaluation.loglikelihoods(model, rt, questions)
    assert [len(logprobs) for logprobs, _ in scored] == [2] * 4
    ours = torch.tensor([value for logprobs, _ in scored for value in logprobs])
    assert worst(ours, torch.tensor(expected)) < 1e-4


@pytest.mark.parametrize("stop", [3, 11])
def test_samples_that_cross_the_original_context(stop, bases):
    """They are as without a cache, with the same random numbers, until on_token stops them."""
    model, x = weights.load_model(bases("phi3")), tokens(2)
    prompts = [x[0, :9].tolist(), x[1, :14].tolist()]
    seen = {}

    def on_token(sample, token):
        seen.setdefault(sample, []).append(token)
        return len(seen[sample]) == stop

    samples = generate(model, prompts, 12, temperature=0.7, seed=3, group=2, on_token=on_token)
    assert samples.finished == [True] * 4 and samples.tokens == [seen[i] for i in range(4)]
    for i, (ids, logprobs) in enumerate(zip(samples.tokens, samples.logprobs, strict=True)):
        uniform = np.random.default_rng([3, i]).random(13, dtype=np.float32)
        assert len(ids) == len(logprobs) == stop
        for n in range(stop):
            row = torch.tensor([prompts[i // 2] + ids[:n]])
            right = choose(logits(model, row)[:, -1], torch.tensor(uniform[n : n + 1]), 0.7)
            assert right[0].item() == ids[n] and abs(right[1].item() - logprobs[n]) < 1e-4


# ---- the language model in one that sees images too

SEES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
VISION = {
    "gemma3": lambda: hf.Gemma3Config(
        text_config=CASES["gemma3"].settings | dict(model_type="gemma3_text"),
        vision_config=SEES | dict(model_type="siglip_vision_model"),
        mm_tokens_per_image=4,
    ),
    "qwen2.5-vl": lambda: hf.Qwen2_5_VLConfig(
        text_config=TINY
        | dict(
            model_type="qwen2_5_vl_text",
            rope_parameters=dict(rope_type="default", mrope_section=[2, 2, 3], rope_theta=500.0),
        ),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, out_hidden_size=56),
    ),
    "mistral3": lambda: hf.Mistral3Config(
        text_config=CASES["ministral3"].settings | dict(model_type="ministral3"),
        vision_config=SEES | dict(model_type="pixtral"),
    ),
}


@pytest.mark.parametrize("older", [False, True], ids=["names of today", "older names"])
@pytest.mark.parametrize("kind", VISION)
def test_the_text_part_of_a_model_that_sees_images(kind, older, tmp_path):
    torch.manual_seed(0)
    reference, x = (
        hf.AutoModelForImageTextToText.from_config(VISION[kind]()).float().eval(),
        tokens(),
    )
    with torch.no_grad():
        for p in reference.parameters():
            p.normal_(std=0.2)
        expected = reference(input_ids=x).logits
    reference.save_pretrained(tmp_path / "theirs", save_original_format=older)
    model = weights.load_model(tmp_path / "theirs")
    assert expected.std() > 0.1 and worst(logits(model, x), expected) < 1e-4
    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    alone, info = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert worst(alone.float().eval()(x).logits, expected) < 1e-4


def test_the_first_spelling_of_llama_opens():
    """As in the first conversions of LLaMA."""
    c = sizes(64, 96, 2, 4, 4, 99, architectures=["LLaMAForCausalLM"], model_type="llama")
    assert families.parse_config(c, "config.json").family == "llama"


# ---- what is refused


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("phi3", dict(rope_parameters=LONG | dict(long_factor=[1.0, 2.0])), "short_factor needs 7"),
        ("ministral3", dict(rope_parameters=YARN), "llama_4_scaling_beta"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ("granite", dict(logits_scaling=0), "logits_scaling"),
        ("smollm3", dict(no_rope_layers=[1]), "1 numbers for 3 layers"),
        ("olmo3", dict(layer_types=["chunked_attention"] * 3), "chunked_attention"),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), "apply_residual"),
        ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        ("falcon", dict(num_ln_in_parallel_attn=2, new_decoder_architecture=False), "contradict"),
        ("bigcode", dict(scale_attn_weights=False), "scale_attn_weights"),
        ("neox", dict(hidden_act="tanh"), "tanh"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, change, said):
    c = config(CASES[name]).to_dict() | change
    with pytest.raises(UserError, match=said):
        families.parse_config(c, "config.json")


@pytest.mark.parametrize(
    "name, change",
    [
        ("gemma2", dict(norm_at="before")),
        ("gemma3", dict(rope_layers=())),
        ("olmo2", dict(qk_norm="head")),
        ("smollm3", dict(rope_layers=("local", "none", "global"))),
        ("phi3", dict(logit_cap=3.0)),
        ("ministral3", dict(rope_part=0.5)),
        ("qwen2 yarn", dict(embed_scale=2.0)),
        ("bloom", dict(embed_norm=False)),
        ("bloom", dict(positions="rope")),
        ("opt", dict(position_offset=0)),
        ("opt", dict(norm_at="around")),
        ("falcon", dict(alibi_scaled=True)),
        ("bigcode", dict(residual="parallel")),
        ("neox", dict(n_kv_heads=1)),
    ],
    ids=str,
)
def test_a_model_that_transformers_lacks_is_not_saved(name, change, bases):
    cfg = replace(families.load_config(bases(name)), **change)
    with pytest.raises(UserError, match=[*change][0]):
        families.config_json(cfg)


def dictionaries():
    """{name of a case: its whole config.json}, and one with a text_config."""
    out = {
        name: json.loads(config(case).to_json_string(use_diff=False))
        for name, case in CASES.items()
    }
    for name, c in out.items():
        c["architectures"] = [architectures(CASES[name])["lm"]]
    whole = dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3")
    return out | {"gemma3 that sees": whole | dict(text_config=out["gemma3"])}


DICTIONARIES = dictionaries()


@fuzz(300)
@given(st.sampled_from([*DICTIONARIES]), edits)
def test_damaged_configs_are_read_or_refused(name, changes):
    c = edited(DICTIONARIES[name], changes)
    cfg = allowed(families.parse_config, c, "config.json") if isinstance(c, dict) else None
    if cfg and cfg.n_layers < 9:
        allowed(families.config_json, cfg)
        empty(cfg)


# ---- published models, on the meta device


def published():
    """(name of a case, which of its published models): the first, or all with NANO_SLOW=1."""
    pairs = [(name, i) for name, case in CASES.items() for i in range(len(case.real))]
    return [(name, i) for name, i in pairs if SLOW or i == 0]


@pytest.mark.parametrize("name, which", published())
def test_published_models_have_transformers_names_and_shapes(name, which):
    """Of what would be written, and of the model that transformers builds of our config.json."""
    case = CASES[name]
    real = case.real[which]
    if "architectures" not in real:
        real = dict(real, architectures=[architectures(case)["lm"]], model_type=case.family)
    cfg = families.parse_config(real, "config.json")
    params = families.by_expert(dict(empty(cfg).named_parameters()))
    ours = {}
    for stored, (parts, layout) in families.places(cfg, params).items():
        ours[stored] = layout.fuse([params[part] for part in parts], cfg).shape

    text = real.get("text_config", real)
    written = families.config_json(cfg)
    for source in (text, written):
        wanted = case.config(**{k: v for k, v in source.items() if k not in UNREAD})
        with torch.device("meta"):
            reference = hf.AutoModelForCausalLM.from_config(wanted)
        if cfg.n_experts:  # transformers 5 stacks in memory what its files have one by one
            size = sum(shape.numel() for shape in ours.values())
            assert size == sum(p.numel() for p in reference.parameters())
            continue
        names = {OLD_NAMES.get(key, key): shape for key, shape in ours.items()}
        assert names == {key: p.shape for key, p in reference.named_parameters()}
