"""Model families against transformers and peft, in both directions: a table of small random models
with odd sizes, and one set of tests for all of them.

One size of each family runs by default. NANO_SLOW=1 runs the others."""

import os

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora
import model as decoder
from model import Transformer, empty
from nano import estimate, families, weights
from nano.config import UserError
from nano.generate import generate

SLOW = bool(os.environ.get("NANO_SLOW"))

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=96,
)
OPT = SIZES | dict(hidden_size=40, num_attention_heads=5, ffn_dim=72, word_embed_proj_dim=40)
NEOX = SIZES | dict(num_attention_heads=3, intermediate_size=72)
BIGCODE = dict(vocab_size=97, n_embd=40, n_layer=2, n_head=5, n_positions=96)
BLOOM = dict(vocab_size=97, hidden_size=48, n_layer=2, n_head=6)

CASES = {  # name: (class of transformers' config, its settings)
    "bloom": ("BloomConfig", BLOOM),
    "opt": ("OPTConfig", OPT),
    "falcon": ("FalconConfig", SIZES | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "bigcode": ("GPTBigCodeConfig", BIGCODE),
    "neox": ("GPTNeoXConfig", NEOX),
}
OTHER_CASES = {
    "bloom of 4 heads": ("BloomConfig", BLOOM | dict(n_head=4, layer_norm_epsilon=1e-3)),
    "opt-350m": ("OPTConfig", OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=24)),
    "galactica": (
        "OPTConfig",
        OPT
        | dict(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    ),
    "falcon-7b": ("FalconConfig", SIZES),
    "falcon-11b": (
        "FalconConfig",
        SIZES
        | dict(
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            ffn_hidden_size=80,
            tie_word_embeddings=False,
        ),
    ),
    "falcon-rw": (
        "FalconConfig",
        SIZES | dict(alibi=True, bias=True, multi_query=False, parallel_attn=False),
    ),
    "falcon of 6 key/value heads": (
        "FalconConfig",
        SIZES | dict(multi_query=False, activation="relu"),
    ),
    "bigcode of 5 key/value heads": (
        "GPTBigCodeConfig",
        BIGCODE | dict(multi_query=False, n_inner=56, activation_function="gelu"),
    ),
    "serial neox": (
        "GPTNeoXConfig",
        NEOX
        | dict(
            use_parallel_residual=False,
            attention_bias=False,
            hidden_act="gelu_fast",
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=5000.0, partial_rotary_factor=0.5),
        ),
    ),
}
SMALL = CASES | OTHER_CASES
NAMES = [*SMALL] if SLOW else [*CASES]
each = pytest.mark.parametrize("name", NAMES)

NONE = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
TOKENS = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.logging.set_verbosity_error()


def theirs(name, auto=AutoModelForCausalLM, **settings):
    """A random model of transformers in which no bias is 0 and no norm 1."""
    kind, sizes = SMALL[name]
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, kind)(**NONE | sizes | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.15)
    return model.float().eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of theirs(name), written once."""
    root = tmp_path_factory.mktemp("families")

    def directory(name):
        if not (root / name / "config.json").exists():
            theirs(name).save_pretrained(root / name)
        return root / name

    return directory


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model.hidden(tokens))


def worst(a, b):
    return (a - b).abs().max().item()


# ---- the model


@each
def test_logits_loss_and_gradients_equal_transformers(base, name):
    reference, model = theirs(name), weights.load_model(base(name))
    assert sum(p.numel() for p in model.parameters()) == reference.num_parameters()
    out = reference(TOKENS, labels=TOKENS)
    out.loss.backward()
    ours = model.logits(model.hidden(TOKENS))
    loss = F.cross_entropy(ours[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    assert out.logits.std() > 0.1 and worst(ours, out.logits) < 1e-4
    assert abs(loss.item() - out.loss.item()) < 1e-5
    params = dict(model.named_parameters())
    wanted = dict(reference.named_parameters())
    stored = families.places(model.cfg, params)
    for layer, (parts, layout) in stored.items():
        fused = layout.fuse([params[part].grad for part in parts], model.cfg)
        right = wanted[layer.replace("embed_out", "lm_head")].grad
        assert worst(fused, right) < 1e-4 * max(1.0, right.abs().max()), layer


@each
def test_what_is_saved_opens_in_transformers(base, name, tmp_path):
    model = weights.load_model(base(name))
    weights.save_model(model, tmp_path, like=base(name))
    assert weights.tensor_files(tmp_path).keys() == weights.tensor_files(base(name)).keys()
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = theirs(name).state_dict()
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[key]) for key, t in back.state_dict().items())
    assert worst(back.float()(TOKENS).logits, logits(model)) < 1e-4
    assert families.load_config(tmp_path) == model.cfg


@each
def test_packed_rows_equal_unpacked(base, name):
    model = weights.load_model(base(name))
    tokens = torch.randint(1, 97, (1, 150), generator=torch.Generator().manual_seed(2))
    docs = torch.full((1, 150), -1)
    docs[0, :30], docs[0, 30:31], docs[0, 31:100] = 0, 1, 2
    packed = model.logits(model.hidden(tokens, docs=docs))
    for a, b in ((0, 30), (30, 31), (31, 100)):
        assert worst(packed[0, a:b], logits(model, tokens[:, a:b])[0]) < 1e-4


@each
def test_autocast_and_recomputation_give_the_same_gradients(base, name):
    model = weights.load_model(base(name))
    docs = torch.zeros_like(TOKENS)
    docs[:, 25:] = 1
    norms = []
    for recompute in (
        None,
        lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=0),
    ):
        model.recompute = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(TOKENS, docs=docs)
        assert hidden.dtype == torch.bfloat16
        hidden.float().square().mean().backward()
        grads = [p.grad for n, p in model.named_parameters() if n != "lm_head.weight"]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        model.zero_grad()
    exact = model.hidden(TOKENS, docs=docs)
    assert worst(hidden.float(), exact) < 0.1 * exact.abs().max()  # bf16 has 8 significant bits
    assert norms[0] == norms[1] > 0


@each
def test_greedy_with_a_cache_equals_without(base, name):
    model = weights.load_model(base(name))
    prompts = [TOKENS[0, :n].tolist() for n in (1, 7, 3, 20)]
    samples = generate(model, prompts, 20, temperature=0.0, batch_size=3)
    for prompt, tokens in zip(prompts, samples.tokens, strict=True):
        rows = torch.tensor([prompt + tokens])
        assert logits(model, rows)[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens


@each
def test_score_head_equals_sequence_classification(name, tmp_path):
    reference = theirs(name, AutoModelForSequenceClassification, num_labels=1)
    tokens = TOKENS.clone()
    tokens[0, 30:] = 0  # padding: theirs scores the last token before it
    with torch.no_grad():
        expected = reference(tokens).logits[:, 0]
    reference.save_pretrained(tmp_path / "theirs")
    model = weights.load_model(tmp_path / "theirs")
    assert model.cfg.head == "score"
    with torch.no_grad():
        score = model.score(model.hidden(tokens))
    assert worst(score[[0, 1], [29, 39]], expected) < 1e-4
    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    back = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").float().eval()
    with torch.no_grad():
        assert worst(back(tokens).logits[:, 0], expected) < 1e-4


@each
def test_the_estimate_counts_what_autograd_keeps(base, name):
    model = weights.load_model(base(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = tiny.peak_memory(lambda: [model.hidden(TOKENS)])
    guess = estimate.memory(model, TOKENS.numel(), document=40)["activations"]
    assert 0.5 < guess / kept < 2.0
    assert model.flops_per_token(40) > 6 * sum(p.numel() for p in model.layers.parameters())


# ---- adapters


def shaken(model, names="lora_"):
    with torch.no_grad():
        for n, p in model.named_parameters():
            if names in n:
                p.normal_(std=0.1)
    return model


def in_peft(base, dir):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), dir)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def opened(base, dir):
    model = weights.load_model(base)
    weights.load_adapter(model, dir)
    return model


@each
def test_what_peft_writes_is_read_here_and_back(base, name, tmp_path):
    layers = {
        layer.rpartition(".")[2] for layer in weights.adapter_places(weights.load_model(base(name)))
    }
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=sorted(layers), task_type="CAUSAL_LM"
    )
    model = shaken(peft.get_peft_model(theirs(name), config))
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path / "theirs")
    ours = opened(base(name), tmp_path / "theirs")
    assert worst(logits(ours), expected) < 1e-4
    assert worst(expected, logits(weights.load_model(base(name)))) > 0.1
    weights.save_adapter(ours, tmp_path / "ours", base=base(name))
    # parts that share A are one adapter of its rank again
    assert weights.read_adapter_config(tmp_path / "ours")["r"] == 4
    assert not weights.read_adapter_config(tmp_path / "ours")["rank_pattern"]
    assert worst(in_peft(base(name), tmp_path / "ours"), expected) < 1e-4
    assert worst(logits(lora.merge(ours)), expected) < 1e-4


@each
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_peft_reads_what_is_written_here(base, name, targets, tmp_path):
    model = weights.load_model(base(name))
    lora.apply(model, rank=4, alpha=8, targets=targets)
    shaken(model)
    weights.save_adapter(model, tmp_path, base=base(name))
    assert worst(in_peft(base(name), tmp_path), logits(model)) < 1e-4
    config = weights.read_adapter_config(tmp_path)
    again = opened(base(name), tmp_path)
    assert worst(logits(again), logits(model)) < 1e-5
    # layers with an A of their own have the same rank after each save
    weights.save_adapter(again, tmp_path, base=base(name))
    assert weights.read_adapter_config(tmp_path) == config
    samples = generate(model, [[1, 2, 3]], 20, temperature=0.0)
    merged = generate(lora.merge(model), [[1, 2, 3]], 20, temperature=0.0)
    assert samples.tokens == merged.tokens


# ---- the sizes that people have


def config(kind, architecture, **settings):
    return dict(model_type=kind, architectures=[architecture], **settings)


def bloom(**settings):
    return config(
        "bloom",
        "BloomForCausalLM",
        vocab_size=250880,
        apply_residual_connection_post_layernorm=False,
        layer_norm_epsilon=1e-5,
        n_inner=None,
        **settings,
    )


def opt(**settings):
    return config(
        "opt",
        "OPTForCausalLM",
        vocab_size=50272,
        max_position_embeddings=2048,
        activation_function="relu",
        **settings,
    )


def falcon(**settings):
    return config("falcon", "FalconForCausalLM", layer_norm_epsilon=1e-5, **settings)


def bigcode(**settings):
    return config("gpt_bigcode", "GPTBigCodeForCausalLM", layer_norm_epsilon=1e-5, **settings)


def neox(**settings):
    return config(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        rotary_pct=0.25,
        rotary_emb_base=10000,
        max_position_embeddings=2048,
        layer_norm_eps=1e-5,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        **settings,
    )


REAL = {  # name: config.json
    "bloom-560m": bloom(n_embed=1024, n_layer=24, num_attention_heads=16),
    "opt-350m": opt(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        ffn_dim=4096,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "falcon-7b": falcon(
        vocab_size=65024,
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
    ),
    "santacoder": bigcode(
        vocab_size=49280,
        n_embd=2048,
        n_layer=24,
        n_head=16,
        n_inner=8192,
        n_positions=2048,
        activation_function="gelu_pytorch_tanh",
        multi_query=True,
    ),
    "pythia-70m": neox(
        vocab_size=50304,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        hidden_act="gelu",
    ),
}
OTHER_REAL = {
    "bloomz-7b1": bloom(n_embed=4096, n_layer=30, num_attention_heads=32),
    "opt-6.7b": opt(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        ffn_dim=16384,
        word_embed_proj_dim=4096,
        do_layer_norm_before=True,
    ),
    "falcon-40b": falcon(
        vocab_size=65024,
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
        parallel_attn=True,
        alibi=False,
        bias=False,
    ),
    "falcon-rw-1b": falcon(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        multi_query=False,
        parallel_attn=False,
        new_decoder_architecture=False,
        alibi=True,
        bias=True,
    ),
    "starcoder": bigcode(
        vocab_size=49152,
        n_embd=6144,
        n_layer=40,
        n_head=48,
        n_inner=24576,
        n_positions=8192,
        activation_function="gelu",
        multi_query=True,
    ),
    "gpt-neox-20b": neox(
        vocab_size=50432,
        hidden_size=6144,
        num_hidden_layers=44,
        num_attention_heads=64,
        intermediate_size=24576,
        hidden_act="gelu_fast",
    ),
}
ALL_REAL = REAL | OTHER_REAL


@pytest.mark.parametrize("name", [*ALL_REAL] if SLOW else [*REAL])
def test_a_real_config_has_the_tensors_of_transformers(name):
    """Built on the meta device: what a save would write, by names and shapes."""
    c = ALL_REAL[name]
    cfg = families.parse_config(c, name)
    params = dict(empty(cfg).named_parameters())
    ours = {}
    for stored, (parts, layout) in families.places(cfg, params).items():
        ours[stored] = tuple(layout.fuse([params[part] for part in parts], cfg).shape)
    kind = transformers.AutoConfig.for_model(**c)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(kind)
    output = "embed_out" if cfg.family == "gpt_neox" else "lm_head"
    wanted = {n: tuple(p.shape) for n, p in reference.named_parameters()}
    assert ours == {n.replace("lm_head", output): shape for n, shape in wanted.items()}
    written = families.config_json(cfg)
    again = transformers.AutoConfig.for_model(**written).to_dict()
    right = kind.to_dict()
    same = set(families.FAMILIES[cfg.family].keys.values()) & right.keys()
    assert {key: again[key] for key in same} == {key: right[key] for key in same}


# ---- ALiBi


def right_attention(q, k, v, slopes, scale):
    """softmax(scale q k^T - slope * distance) v with a causal mask, in float64."""
    H, T = q.shape[1:3]
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    index = torch.arange(T)
    bias = torch.tensor(slopes).double()[:, None, None] * (index - index[:, None])
    scores = scale * q @ k.mT + bias.masked_fill(index > index[:, None], -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)], ids=str)
def test_alibi_is_the_same_in_every_kernel(monkeypatch, heads, dtype):
    """Documents on a CPU, a dense mask, no mask, a cache with one or many queries, and the
    score_mod of flex_attention."""
    monkeypatch.setattr(decoder, "_compiled_flex", lambda: decoder.flex_attention)
    generator = torch.Generator().manual_seed(0)
    T, D = 150, 16
    q = torch.randn(1, heads[0], T, D, generator=generator).to(dtype)
    k, v = (torch.randn(1, heads[1], T, D, generator=generator).to(dtype) for _ in range(2))
    extras = decoder.Extras(0.3, slopes=decoder.alibi_slopes(heads[0]))
    docs = torch.zeros(1, T, dtype=torch.int64)
    docs[:, 70:] = 1
    parts = [(slice(0, 70)), (slice(70, T))]
    whole = right_attention(q, k, v, extras.slopes, 0.3)
    packed = [right_attention(*(t[:, :, p] for t in (q, k, v)), extras.slopes, 0.3) for p in parts]
    packed = torch.cat(packed, dim=2)
    slots = torch.arange(T)[None]
    dense = decoder.cache_mask(slots, T, 0) & (docs[:, None] == docs[:, :, None])[:, None]
    cache = decoder.cache_mask(slots, T, 0)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2  # bf16 rounds probabilities and values
    for seen, right in (
        (None, whole),
        (cache, whole),
        (dense, packed),
        (decoder.attention_mask(docs, 0, D), packed),
        (decoder.block_mask(docs, 0), packed),
    ):
        assert worst(decoder.attend(q, k, v, seen, extras), right) < tolerance
    for t in (0, 69, 70, 149):
        y = decoder.attend(q[:, :, t : t + 1], k, v, cache[:, :, t : t + 1], extras)
        assert worst(y, whole[:, :, t : t + 1]) < tolerance


def test_alibi_slopes_are_those_of_the_paper():
    """2^(-8i/n), and where n is no power of two every other slope of twice the heads behind it."""
    assert decoder.alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    twice = decoder.alibi_slopes(16)
    assert decoder.alibi_slopes(12) == decoder.alibi_slopes(8) + twice[:8:2]


# ---- several devices

SHARDED = """
import torch
import lora
from nano import weights
from nano.runtime import Runtime
tokens = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
docs = torch.zeros_like(tokens)
docs[:, 25:] = 1
for dir in {dirs}:
    for settings in (dict(parallel="none", tensor=2), dict(parallel="fsdp")):
        for adapted in (False, True):
            grads = []
            for rt in (None, Runtime(device="cpu", dtype="float32", **settings)):
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
                out = dict(hidden=hidden)
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        g = p.grad
                        out[name] = g.full_tensor() if hasattr(g, "full_tensor") else g
                grads.append(out)
            right, sharded = grads
            assert right.keys() == sharded.keys()
            for name, g in right.items():
                assert (g - sharded[name]).abs().max() <= 1e-5 * max(1, g.abs().max()), (dir, name)
"""


def test_shared_and_sharded_layers_give_the_same_gradients(base, tmp_path):
    """tensor=2 and fsdp on two processes, with adapters and without. A model whose heads two
    devices cannot share is told so."""
    names = [n for n in NAMES if not families.load_config(base(n)).n_heads % 2]
    dirs = [str(base(name)) for name in names]
    status, output = tiny.processes(tmp_path, [], before=SHARDED.format(dirs=dirs), timeout=300)
    assert status == 0, output[-3000:]


# ---- what is refused


@pytest.mark.parametrize(
    "c, said",
    [
        (
            bloom(n_embed=64, n_layer=2, n_head=4)
            | dict(apply_residual_connection_post_layernorm=True),
            "apply_residual",
        ),
        (
            opt(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                _remove_final_layer_norm=True,
            ),
            "_remove_final",
        ),
        (
            falcon(
                vocab_size=99,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_ln_in_parallel_attn=2,
            ),
            "contradict",
        ),
        (
            bigcode(vocab_size=99, n_embd=64, n_layer=2, n_head=4, scale_attn_weights=False),
            "scale_attn_weights",
        ),
        (
            neox(
                vocab_size=99,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                hidden_act="tanh",
            ),
            "tanh",
        ),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(c, said):
    with pytest.raises(UserError, match=said):
        families.parse_config(c, "config.json")


@pytest.mark.parametrize(
    "name, change",
    [
        ("bloom", dict(embed_norm=False)),
        ("bloom", dict(positions="rope")),
        ("opt", dict(position_offset=0)),
        ("opt", dict(norm_at="around")),
        ("falcon", dict(residual="serial")),
        ("bigcode", dict(residual="parallel")),
        ("neox", dict(n_kv_heads=1)),
    ],
    ids=str,
)
def test_a_model_that_transformers_lacks_is_not_saved(base, name, change, tmp_path):
    cfg = families.load_config(base(name))
    for key, value in change.items():
        setattr(cfg, key, value)
    with pytest.raises(UserError, match=[*change][0]):
        weights.save_model(Transformer(cfg), tmp_path)
