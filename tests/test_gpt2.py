"""GPT-2, whose files fuse and transpose what this model keeps apart: against transformers and peft,
in both directions."""

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

import lora
from model import ModelConfig, Transformer
from nano import estimate, families, tokenizer, weights
from nano.config import UserError
from nano.generate import generate

TOKENS = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
SIZES = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
NONE = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
SETTINGS = {
    "gpt2": {},
    "narrow mlp, untied": dict(n_inner=48, tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "relu": dict(activation_function="relu"),
    "exact gelu": dict(activation_function="gelu"),
}


def theirs(kind=GPT2LMHeadModel, **settings):
    """A random model of transformers in which no bias is 0 and no norm 1."""
    torch.manual_seed(0)
    model = kind(GPT2Config(**SIZES | NONE | settings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.15)
    return model.float().eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    dir = tmp_path_factory.mktemp("gpt2")
    theirs().save_pretrained(dir)
    return dir


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.logits(model.hidden(tokens))


def worst(a, b):
    return (a - b).abs().max().item()


# ---- the model


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_loss_and_gradients_equal_transformers(name, tmp_path):
    reference = theirs(**SETTINGS[name])
    reference.save_pretrained(tmp_path)
    model = weights.load_model(tmp_path)
    assert (model.cfg.norm, model.cfg.positions, model.cfg.mlp) == ("layer", "learned", "plain")
    assert sum(p.numel() for p in model.parameters()) == reference.num_parameters()
    out = reference(TOKENS, labels=TOKENS)
    out.loss.backward()
    ours = model.logits(model.hidden(TOKENS))
    loss = F.cross_entropy(ours[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    assert out.logits.std() > 0.1 and worst(ours, out.logits) < 1e-4
    assert abs(loss.item() - out.loss.item()) < 1e-5
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    wanted = dict(reference.named_parameters())
    stored = families.places(model.cfg, [n.removesuffix(".grad") for n in grads])
    for layer, (parts, layout) in stored.items():
        fused = layout.fuse([grads[f"{part}.grad"] for part in parts], model.cfg)
        assert worst(fused, wanted[layer].grad) < 1e-4, layer
    assert wanted.keys() == stored.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_saved_opens_in_transformers(name, tmp_path):
    reference = theirs(**SETTINGS[name])
    reference.save_pretrained(tmp_path / "theirs")
    model = weights.load_model(tmp_path / "theirs")
    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is GPT2LMHeadModel
    assert not info["missing_keys"] and not info["unexpected_keys"]
    wanted = reference.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(t, wanted[key]) for key, t in back.state_dict().items())
    assert families.load_config(tmp_path / "ours") == model.cfg


def test_a_file_of_the_bare_trunk_with_constants(base, tmp_path):
    """The first releases: no prefix, and the causal mask among the tensors."""
    tensors = dict(weights.read_tensors(base))
    bare = {name.removeprefix("transformer."): t.clone() for name, t in tensors.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
    weights.write_tensors(bare.items(), tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert torch.equal(logits(weights.load_model(tmp_path)), logits(weights.load_model(base)))


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(activation_function="tanh"), "tanh"),
        (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (dict(scale_attn_weights=False), "scale_attn_weights"),
        (dict(add_cross_attention=True), "add_cross_attention"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, said):
    config = GPT2Config(**SIZES | settings).to_dict()
    with pytest.raises(UserError, match=said):
        families.parse_config(config | dict(architectures=["GPT2LMHeadModel"]), "config.json")


@pytest.mark.parametrize(
    "change", [dict(n_kv_heads=2), dict(mlp="gated"), dict(norm="rms"), dict(positions="rope")]
)
def test_a_model_that_transformers_lacks_is_not_saved_as_gpt2(base, change, tmp_path):
    cfg = families.load_config(base)
    for key, value in change.items():
        setattr(cfg, key, value)
    with pytest.raises(UserError, match=[*change][0]):
        weights.save_model(Transformer(cfg), tmp_path)


def test_packed_rows_equal_unpacked(base):
    """And padding may be longer than any document: it is given no position that the model lacks."""
    model = weights.load_model(base)
    tokens = torch.randint(1, 97, (1, 150), generator=torch.Generator().manual_seed(2))
    docs = torch.full((1, 150), -1)
    docs[0, :20], docs[0, 20:21], docs[0, 21:60] = 0, 1, 2
    packed = model.logits(model.hidden(tokens, docs=docs))
    for a, b in ((0, 20), (20, 21), (21, 60)):
        assert worst(packed[0, a:b], logits(model, tokens[:, a:b])[0]) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_keeps_one_dtype_along_the_stream(base, autocast):
    model = weights.load_model(base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.hidden(TOKENS)
    assert hidden.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert worst(model.logits(hidden.float()), logits(model)) < 0.3


def test_greedy_with_a_cache_equals_without_and_transformers(base):
    model, reference = weights.load_model(base), theirs()
    prompts = [TOKENS[0, :n].tolist() for n in (1, 7, 3, 20, 12)]
    samples = generate(model, prompts, 30, temperature=0.0, batch_size=3)
    for prompt, tokens in zip(prompts, samples.tokens, strict=True):
        ids = list(prompt)
        for _ in range(30):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        assert tokens == ids[len(prompt) :]
        row = torch.tensor([prompt])
        out = reference.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=30, do_sample=False
        )
        assert tokens == out[0, len(prompt) :].tolist()


def test_generation_ends_with_the_positions(base):
    samples = generate(weights.load_model(base), [[1] * 60, [2]], 100, temperature=0.0)
    assert [len(tokens) for tokens in samples.tokens] == [4, 63]


def test_score_head_equals_sequence_classification(tmp_path):
    reference = theirs(GPT2ForSequenceClassification, num_labels=1)
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
    back = GPT2ForSequenceClassification.from_pretrained(tmp_path / "ours").float().eval()
    with torch.no_grad():
        assert worst(back(tokens).logits[:, 0], expected) < 1e-4


def test_training_moves_every_parameter_and_counts_come_from_the_modules(base):
    model = weights.load_model(base)
    model(dict(tokens=TOKENS)).square().sum().backward()
    names = [n for n, p in model.named_parameters() if p.grad is None]
    assert names == []
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 97 * 32  # and no embedding but the tied head
    assert model.flops_per_token(10) == 6 * matrices + 6 * 2 * 32 * 10
    gated = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=128)
    plain = estimate.memory(model, 64)["activations"]
    assert plain < estimate.memory(Transformer(gated), 64)["activations"]


# ---- adapters

TARGETS = [["c_attn"], ["c_attn", "c_proj", "c_fc"], ["attn.c_proj"], ["mlp.c_proj", "c_attn"]]


def in_peft(base, dir):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), dir)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_what_peft_writes_is_read_here(base, tmp_path, targets, rslora):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=True,
        use_rslora=rslora,
    )
    model = peft.get_peft_model(theirs(), config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.1)
        expected = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path)
    ours = opened(base, tmp_path)
    assert worst(logits(ours), expected) < 1e-4
    assert worst(expected, logits(weights.load_model(base))) > 0.1

    # and back: the layers of c_attn share A, and the rank stays
    weights.save_adapter(ours, tmp_path / "again", base=base)
    assert weights.read_adapter_config(tmp_path / "again")["r"] == 4
    assert worst(in_peft(base, tmp_path / "again"), expected) < 1e-4
    assert worst(logits(opened(base, tmp_path / "again")), logits(ours)) < 1e-5
    assert worst(logits(lora.merge(ours)), expected) < 1e-4


def opened(base, dir):
    model = weights.load_model(base)
    weights.load_adapter(model, dir)
    return model


@pytest.mark.parametrize(
    "targets, rank, leaves",
    [
        ("all-linear", 4, ["c_attn", "c_fc", "c_proj"]),
        (["q_proj", "v_proj"], 8, ["c_attn"]),
        (["k_proj"], 4, ["c_attn"]),
        (["up_proj"], 4, ["c_fc"]),
        (["o_proj"], 4, [f"transformer.h.{i}.attn.c_proj" for i in range(2)]),
    ],
    ids=str,
)
def test_peft_reads_what_is_written_here(base, tmp_path, targets, rank, leaves):
    model = weights.load_model(base)
    lora.apply(model, rank=4, alpha=8, targets=targets)
    with torch.no_grad():
        for p in tiny.adapter_parameters(model):
            p.normal_(std=0.1)
    weights.save_adapter(model, tmp_path, base=base)
    config = weights.read_adapter_config(tmp_path)
    assert (config["r"], config["lora_alpha"] / config["r"]) == (rank, 2.0)
    assert config["rank_pattern"] == ({"c_attn": 12} if targets == "all-linear" else {})
    assert config["target_modules"] == leaves and config["fan_in_fan_out"] is True
    assert worst(in_peft(base, tmp_path), logits(model)) < 1e-4
    again = opened(base, tmp_path)
    assert worst(logits(again), logits(model)) < 1e-5
    # layers with an A of their own have the same rank after each save
    assert {len(m.lora_A["default"]) for _, m in lora.adapted(again)} == {4}
    weights.save_adapter(again, tmp_path, base=base)
    assert weights.read_adapter_config(tmp_path) == config
    samples = generate(model, [[1, 2, 3]], 20, temperature=0.0)
    merged = generate(lora.merge(model), [[1, 2, 3]], 20, temperature=0.0)
    assert samples.tokens == merged.tokens


# ---- the tokenizer


def test_the_tokenizer_of_a_gpt2_repository(tmp_path):
    """vocab.json and merges.txt, and the tokenizer.json that transformers makes of them."""
    from transformers import GPT2Tokenizer

    chars = list(tokenizer.BYTE_CHAR.values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o"]
    vocab = chars + [m.replace(" ", "") for m in merges] + ["<|endoftext|>"]
    tiny.write(tmp_path, "vocab.json", {token: i for i, token in enumerate(vocab)})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    tok = tokenizer.load(tmp_path / "saved", template="plain")
    for text in ("hello world", "it's  1,234\n\n naïve 日本", " hello w"):
        assert tok.encode(text) == theirs(text)["input_ids"]
        assert tok.decode(tok.encode(text)) == text
