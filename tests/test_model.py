"""Every family against transformers on random tiny models, both directions; packing, windows and
the cache against plain forwards."""

import dataclasses
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from model import (
    Extras,
    ModelConfig,
    Transformer,
    attention_mask,
    block_mask,
    document_attention,
    rope_frequencies,
)
from nano import families, weights
from nano.config import UserError

TINY = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=0,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
SLIDING = dict(use_sliding_window=True, sliding_window=7)
FAMILIES = {
    "llama2": (LlamaConfig, dict(rms_norm_eps=1e-5)),
    "llama3.2": (
        LlamaConfig,
        dict(num_key_value_heads=2, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    ),
    "llama linear rope": (
        LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=5e3, factor=3.0)),
    ),
    "llama biases": (LlamaConfig, dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True)),
    "llama wide heads": (LlamaConfig, dict(num_key_value_heads=2, head_dim=32)),
    "smollm2": (
        LlamaConfig,
        dict(
            hidden_size=48, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True
        ),
    ),
    "mistral": (MistralConfig, dict(num_key_value_heads=2, sliding_window=7)),
    "mistral no window": (
        MistralConfig,
        dict(num_key_value_heads=2, sliding_window=None, head_dim=24),
    ),
    "qwen2": (Qwen2Config, dict(num_key_value_heads=2)),
    "qwen2 tied": (Qwen2Config, dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen2 upper windows": (
        Qwen2Config,
        dict(num_key_value_heads=2, max_window_layers=1, **SLIDING),
    ),
    "qwen3": (Qwen3Config, dict(num_key_value_heads=2, head_dim=32)),
    "qwen3 biases": (Qwen3Config, dict(num_key_value_heads=4, head_dim=16, attention_bias=True)),
    "qwen3 mixed windows": (
        Qwen3Config,
        dict(
            num_key_value_heads=2,
            head_dim=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=True,
            **SLIDING,
        ),
    ),
}


@torch.no_grad()
def randomize(model, seed=0):
    """Random values everywhere. Biases that start at 0 and norms at 1 would hide mistakes."""
    torch.manual_seed(seed)
    for p in model.parameters():
        p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.15)
    return model


def theirs(family, auto=AutoModelForCausalLM, **more):
    Config, settings = FAMILIES[family]
    return randomize(auto.from_config(Config(**{**TINY, **settings, **more}))).float().eval()


def tokens(batch=2, length=40, vocab=97):
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_both_directions(family, tmp_path):
    reference, x = theirs(family), tokens()
    expected = reference(x).logits
    assert expected.std() > 0.1

    reference.save_pretrained(tmp_path / "theirs")
    model = weights.load_model(tmp_path / "theirs")
    assert (model.logits(model.hidden(x)) - expected).abs().max() < 1e-4
    assert sum(p.numel() for p in model.parameters()) == reference.num_parameters()

    weights.save_model(model, tmp_path / "ours")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert (
        type(back) is type(reference) and not info["missing_keys"] and not info["unexpected_keys"]
    )
    assert (back.float().eval()(x).logits - expected).abs().max() < 1e-4
    assert families.load_config(tmp_path / "ours") == model.cfg


@pytest.mark.parametrize("family", ["llama3.2", "mistral", "qwen2", "qwen3"])
def test_score_head_equals_sequence_classification(family, tmp_path):
    reference, x = theirs(family, AutoModelForSequenceClassification, num_labels=1), tokens()
    x[0, 30:] = 0  # padding: theirs scores the last token before it
    expected = reference(x).logits[:, 0]
    reference.save_pretrained(tmp_path / "theirs")
    model = weights.load_model(tmp_path / "theirs")
    assert model.cfg.head == "score"
    score = model.score(model.hidden(x))
    assert score.dtype == torch.float32
    assert (score[[0, 1], [29, 39]] - expected).abs().max() < 1e-4

    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").float().eval()
    assert (back(x).logits[:, 0] - expected).abs().max() < 1e-4


def test_fresh_score_head_keeps_the_trunk(tmp_path):
    for family in ("llama2", "llama3.2"):
        reference = theirs(family)
        reference.save_pretrained(tmp_path / family)
        model = weights.load_model(tmp_path / family, head="score", dtype=torch.bfloat16)
        assert model.score.weight.shape == (1, 64) and model.score.weight.dtype == torch.float32
        assert 0.5 < model.score.weight.std() * 65**0.5 < 1.5
        assert not hasattr(model, "lm_head")
        for p in reference.parameters():
            p.copy_(p.bfloat16())
        assert (
            model.float().hidden(tokens()) - reference.model(tokens()).last_hidden_state
        ).abs().max() < 1e-4


@pytest.mark.parametrize("spelling", [4, 5])
def test_both_spellings_of_config_json(spelling, tmp_path):
    config = dict(
        TINY,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        num_key_value_heads=None,
        head_dim=None,
    )
    if spelling == 4:
        rope = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
        config |= dict(rope_theta=10000.0, rope_scaling=rope)
    else:
        config |= dict(rope_parameters=LLAMA3_ROPE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = families.load_config(tmp_path)
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.tie_embeddings) == (
        4,
        16,
        10000.0,
        False,
    )
    assert cfg.rope_scaling == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}


def test_defaults_of_absent_keys_are_transformers(tmp_path):
    for name, Config in dict(
        Llama=LlamaConfig, Mistral=MistralConfig, Qwen2=Qwen2Config, Qwen3=Qwen3Config
    ).items():
        config = dict(
            vocab_size=9,
            hidden_size=256,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=32,
        )
        reference = Config(**config)
        config |= dict(architectures=[name + "ForCausalLM"], model_type=name.lower())
        (tmp_path / "config.json").write_text(json.dumps(config))
        cfg = families.load_config(tmp_path)
        assert cfg.n_kv_heads == reference.num_key_value_heads
        assert cfg.head_dim == (getattr(reference, "head_dim", None) or 8)
        assert cfg.norm_eps == reference.rms_norm_eps
        assert cfg.rope_theta == reference.rope_parameters["rope_theta"]
        assert cfg.max_positions == reference.max_position_embeddings
        assert cfg.tie_embeddings == reference.tie_word_embeddings
        assert cfg.windows == ((reference.sliding_window,) * 2 if name == "Mistral" else ())


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(architectures=["CohereForCausalLM"], model_type="cohere"), "CohereForCausalLM"),
        (dict(architectures=["DbrxForCausalLM"], model_type="dbrx"), "DbrxForCausalLM"),
        (dict(model_type="gemma"), "gemma"),
        (dict(model_type="dbrx", architectures=None, num_local_experts=8), "mixture of exp"),
        (dict(hidden_act="relu2"), "relu2"),
        (dict(rope_scaling=dict(rope_type="yarn")), "'yarn' needs factor"),
        (dict(rope_scaling=dict(rope_type="ntk", factor=4.0)), "ntk"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=4.0)), "short_factor, long_factor"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=4.0)), "low_freq_factor"),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "differ by layer"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantised by gptq"),
        (dict(architectures=["LlamaForSequenceClassification"]), "2 labels"),
        (
            dict(
                architectures=["LlamaForSequenceClassification"],
                id2label={"0": "a", "1": "b", "2": "c"},
            ),
            "3 labels",
        ),
        (dict(hidden_size=None), "hidden_size"),
        (dict(num_hidden_layers="3"), "num_hidden_layers"),
        (dict(num_key_value_heads=3), "3 key/value heads"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, said, tmp_path):
    config = dict(TINY, architectures=["LlamaForCausalLM"], model_type="llama")
    (tmp_path / "config.json").write_text(json.dumps(config))
    families.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said) as e:
        families.load_config(tmp_path)
    assert "config.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(qkv_bias=True),
        dict(qk_norm="head"),
        dict(windows=(4, 0)),
        dict(family="mistral", o_bias=True),
    ],
)
def test_a_model_that_transformers_lacks_is_not_saved_as_another(change):
    with pytest.raises(UserError, match=[*change][-1]):
        families.config_json(ModelConfig(n_layers=2, **change))


# ---- packing


def tiny(**more):
    cfg = ModelConfig(
        vocab_size=97, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96
    )
    return randomize(Transformer(dataclasses.replace(cfg, **more)))


@pytest.mark.parametrize("windows", [(), (4, 0), (4, 4), (100, 100)])
def test_packed_rows_equal_unpacked(windows):
    """By document, and (with a window) by a dense mask."""
    model = tiny(windows=windows)
    x = tokens(2, 24)
    cuts = [
        [0, 5, 6, 17],
        [0, 9],
    ]  # the first row has three documents and 7 tokens of padding, the second one document
    docs = torch.full((2, 24), -1)
    for row, (edges, end) in enumerate(zip(cuts, (17, 24), strict=True)):
        for i, (a, b) in enumerate(zip(edges, [*edges[1:], end], strict=True)):
            docs[row, a:b] = i
    packed = model.logits(model.hidden(x, docs=docs))
    assert packed.isfinite().all()
    for row in range(2):
        for i in docs[row].unique():
            here = docs[row] == i
            alone = model.logits(model.hidden(x[row, here][None]))[0]
            assert (packed[row, here] - alone).abs().max() < 1e-5
    assert (
        packed[0, 6:17] - model.logits(model.hidden(x))[0, 6:17]
    ).abs().max() > 1e-3  # which a plain forward does not


@pytest.mark.parametrize("length", [300, 384])
@pytest.mark.parametrize("window", [0, 20, 200])
def test_block_mask(window, length):
    """As torch's own mask, which looks at every pair. flex_attention, here without its kernels,
    sees what a dense mask shows."""
    edges = [[0, 10, 130, 131, 260], [0, 256], [0]]  # with padding from 290 on
    docs = torch.full((3, length), -1)
    for row, starts in enumerate(edges):
        for i, (a, b) in enumerate(zip(starts, [*starts[1:], 290], strict=True)):
            docs[row, a:b] = i
    dense = attention_mask(docs, window or length, 16)
    ours = block_mask(docs, window)
    theirs = create_block_mask(
        lambda b, h, q, k: dense[b, 0, q, k], 3, None, length, length, device="cpu"
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("", "full_"):
        for num, indices in (
            (f"{kind}kv_num_blocks", f"{kind}kv_indices"),
            (f"{kind}q_num_blocks", f"{kind}q_indices"),
        ):
            a, b = ((getattr(mask, num), getattr(mask, indices)) for mask in (ours, theirs))
            assert torch.equal(a[0], b[0])
            used = torch.arange(a[1].shape[-1]) < a[0][..., None]
            assert torch.equal(a[1][used], b[1][used])
    q, k, v = torch.randn(3, 3, 2, length, 16)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    assert (flex_attention(q, k, v, block_mask=ours) - y).abs().max() < 1e-5


@pytest.mark.parametrize("windows", [(), (16, 16)], ids=["by document", "dense mask"])
def test_no_gradient_crosses_documents(windows):
    model = tiny(windows=windows)
    docs = torch.tensor([[0] * 6 + [1] * 6 + [-1] * 4])
    with torch.enable_grad():
        x = model.model["embed_tokens"](tokens(1, 16)).detach().requires_grad_()
        model.model["embed_tokens"].forward = lambda _: x
        model.hidden(tokens(1, 16), docs=docs)[0, 6:12].square().sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 6 + [True] * 6 + [False] * 4


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.01), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("T", [1, 7, 200, 512, 513])
@torch.enable_grad()
def test_attention_of_one_document(T, dtype, bound):
    """Output and gradients against float64. bf16 rounds scores and probabilities to 2^-9, and the
    errors end below 0.6%."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, back = (
        torch.randn(heads, T, 16, generator=generator).to(dtype) for heads in (6, 2, 2, 6)
    )

    def right(q, k, v):
        scores = q @ k.repeat_interleave(3, 0).mT / 4
        return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(
            -1
        ) @ v.repeat_interleave(3, 0)

    def result(attention, dtype):
        inputs = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        y = attention(*inputs)
        y.backward(back.to(dtype))
        return [y.detach(), *(t.grad for t in inputs)]

    for ours, exact in zip(
        result(partial(document_attention, extras=Extras(scale=0.25)), dtype),
        result(right, torch.float64),
        strict=True,
    ):
        assert ours.dtype == dtype and (ours - exact).norm() <= bound * exact.norm() + 1e-6


def test_explicit_positions_are_the_default_ones():
    model, x = tiny(), tokens(1, 12)
    docs = torch.tensor([[3] * 5 + [7] * 7])
    positions = torch.tensor([[*range(5), *range(7)]])
    assert torch.equal(model.hidden(x, docs=docs), model.hidden(x, positions=positions, docs=docs))
    shifted = model.hidden(x, positions=positions + 50, docs=docs)  # rotary positions are relative
    assert (shifted - model.hidden(x, docs=docs)).abs().max() < 1e-4


@pytest.mark.parametrize("windows", [(), (5, 0)])
def test_cache_equals_a_whole_forward(windows):
    """Rows of unequal prompts: each row's tokens go to the slots of its own positions."""
    model, x = tiny(windows=windows), tokens(2, 20)
    whole = model.hidden(x)
    cache = model.new_cache(2, 24)
    starts = torch.tensor([4, 9])
    prompt = torch.arange(9).expand(2, 9)
    out = model.hidden(
        x[:, :9], positions=prompt, cache=cache
    )  # row 0 runs past its prompt; those slots are overwritten below
    assert (out[1] - whole[1, :9]).abs().max() < 1e-5
    for step in range(11):
        at = (starts + step)[:, None]
        out = model.hidden(x.gather(1, at), positions=at, cache=cache)
        for row in range(2):
            assert (out[row, 0] - whole[row, at[row, 0]]).abs().max() < 1e-5


def test_rope_stays_fp32_and_has_transformers_frequencies():
    cfg = ModelConfig(
        dim=64, n_layers=1, n_heads=4, head_dim=16, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE
    )
    model = Transformer(cfg).bfloat16()
    assert model.ropes["global"].inv_freq.dtype == torch.float32
    scaled = LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE | dict(rope_theta=500000.0))
    reference = AutoModelForCausalLM.from_config(scaled).model.rotary_emb.inv_freq
    assert torch.allclose(rope_frequencies(cfg), reference, rtol=1e-6)
    assert not torch.allclose(
        rope_frequencies(dataclasses.replace(cfg, rope_scaling=None)), reference, rtol=0.1
    )
