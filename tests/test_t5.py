"""T5, T5 v1.1 and mT5 against transformers and peft on tiny random models, in both directions, and
the stages on them."""

import json
import os
import shutil

import numpy as np
import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import lora
import t5
from nano import batches, families, generate, losses, runtime, weights
from nano.config import UserError

SLOW = bool(os.environ.get("NANO_SLOW"))
SIZES = dict(vocab_size=97, d_model=32, d_kv=6, d_ff=40, num_layers=2, num_heads=3)
# few buckets and short distances, so that all of them occur
SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
SIZES |= dict(dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
GATED = dict(feed_forward_proj="gated-gelu")
KINDS = {
    "t5": (T5Config, {}),
    "t5 v1.1": (T5Config, dict(tie_word_embeddings=False, num_decoder_layers=1, **GATED)),
    "t5 v1.1, untied": (T5Config, dict(tie_word_embeddings=False, **GATED)),
    "t5, gated relu": (T5Config, dict(feed_forward_proj="gated-relu")),
    "mt5, untied": (MT5Config, {}),
}
ROWS = [  # (prompt, answer)
    (range(2, 25), range(30, 47)),
    (range(50, 52), range(60, 61)),
    (range(70, 95), range(2, 40)),
    (range(9, 18), range(80, 91)),
]
ROWS = [(list(prompt), list(answer)) for prompt, answer in ROWS]


def theirs(kind, **more):
    """A random model of transformers in which no norm is 1."""
    Config, settings = KINDS[kind]
    torch.manual_seed(0)
    config = Config(**SIZES | settings | more)
    # not from_config of the Auto class, which would take MT5's for T5's
    model = {T5Config: T5ForConditionalGeneration, MT5Config: MT5ForConditionalGeneration}[Config]
    model = model(config).float().eval()
    if "untied" in kind:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 32))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return model


def batch(rows=ROWS, packs=((0, 1), (2, 3)), **settings):
    """A micro-batch of rows of prompt and answer, packed as `packs` says."""
    rows = [(np.array([*p, *a]), np.array([0] * len(p) + [1] * len(a))) for p, a in rows]
    packed = [[rows[i] for i in pack] for pack in packs]
    return batches.collate(packed, 200, start_ids=(0,), **settings)


def their_logits(model, rows=ROWS):
    """The logits of each answer's tokens, one row at a time, (M, V) in the order of rows."""
    out = []
    for prompt, answer in rows:
        labels = torch.tensor([answer])
        out.append(model(input_ids=torch.tensor([prompt]), labels=labels).logits[0])
    return torch.cat(out)


def loaded(model, dir):
    model.save_pretrained(dir)
    return weights.load_model(dir)


def worst(a, b):
    return (a - b).abs().max().item()


# ---- the model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_transformers(kind, tmp_path):
    """Of packed rows, whose documents do not see each other in either stack."""
    reference = theirs(kind)
    model = loaded(reference, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == reference.num_parameters()
    expected = their_logits(reference)
    packed = batch()
    hidden = model(packed)
    ours = model.logits(hidden)
    assert expected.std() > 0.1 and worst(ours, expected) < 1e-4

    targets = torch.tensor([token for _, answer in ROWS for token in answer])
    assert torch.equal(packed["targets"], targets)
    loss = losses.cross_entropy(hidden, model.head, targets, packed["weights"]) / len(targets)
    their_loss = F.cross_entropy(expected, targets)
    loss.backward()
    their_loss.backward()
    assert abs(loss - their_loss) < 1e-5
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    stored = families.places(model.cfg, [n.removesuffix(".grad") for n in grads])
    wanted = dict(reference.named_parameters())
    assert wanted.keys() == stored.keys()
    for name, (parts, layout) in stored.items():
        fused = layout.fuse([grads[f"{part}.grad"] for part in parts], model.cfg)
        assert worst(fused, wanted[name].grad) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_opens_in_transformers(kind, tmp_path):
    reference = theirs(kind)
    model = loaded(reference, tmp_path / "theirs")
    weights.save_model(model, tmp_path / "ours", like=tmp_path / "theirs")
    back, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(reference)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert worst(their_logits(back.float().eval()), their_logits(reference)) < 1e-5
    again = weights.load_model(tmp_path / "ours")
    assert again.cfg == model.cfg


@pytest.mark.parametrize("dense", [False, True], ids=["by document", "dense"])
def test_packed_rows_equal_unpacked(dense, tmp_path, monkeypatch):
    """Padding gives no NaN, and no gradient crosses documents."""
    if dense:  # as on other devices than a CPU
        monkeypatch.setattr(t5, "by_document", lambda docs: False)
    model = loaded(theirs("t5 v1.1"), tmp_path)
    with torch.no_grad():
        packed = model(batch(packs=[(0, 1), (3,), (2,), ()]))
        order = [0, 1, 3, 2]
        alone = torch.cat([model(batch([ROWS[i]], [(0,)])) for i in order])
    assert worst(packed, alone) < 1e-5

    reached = {}
    for name in ("encoder_tokens", "tokens"):
        micro = batch(packs=[(0, 1, 3)])
        reached[name] = reach(model, micro, name, len(ROWS[0][1]), len(ROWS[1][1]))
    counts = [len(p) for p, _ in ROWS]
    a, b = counts[0], counts[0] + counts[1]
    assert reached["encoder_tokens"] == list(range(a, b))
    assert reached["tokens"] == [len(ROWS[0][1]) + 1]


def reach(model, micro, name, start, count):
    """The positions of the embeddings `name` that the hidden states from `start` on depend on."""
    inputs = {}
    embed = model.embed

    def remembered(tokens):
        x = embed(tokens).detach().requires_grad_()
        inputs["encoder_tokens" if tokens is micro["encoder_tokens"] else "tokens"] = x
        return x

    model.embed = remembered
    model(micro)[start : start + count].square().sum().backward()
    model.embed = embed
    return (inputs[name].grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()


# ---- generation


STOPS = tuple(range(1, 40))


def prompts_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 97, rng.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", ["t5", "mt5, untied"])
def test_greedy_equals_transformers(kind, tmp_path):
    """Token for token, while rows of unequal prompts leave the batch and others come in."""
    reference = theirs(kind)
    model = loaded(reference, tmp_path)
    prompts = prompts_of(7)
    settings = dict(temperature=0.0, stop_ids=STOPS, batch_size=3)
    samples = generate.generate(model, prompts, 30, **settings)
    assert len({len(tokens) for tokens in samples.tokens}) > 1
    for prompt, tokens, finished in zip(prompts, samples.tokens, samples.finished, strict=True):
        row = torch.tensor([prompt])
        out = reference.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=[*STOPS],
        )
        assert tokens == out[0, 1:].tolist()  # theirs begins with the start token
        assert finished == (tokens[-1] in STOPS)
    for plan in (
        dict(pack=True),
        dict(shapes="few", sync_every=8),
        dict(shapes="fixed", sync_every=4),
    ):
        again = generate.generate(model, prompts, 30, **settings, plan=plan)
        assert again.tokens == samples.tokens, plan


def test_samples_have_the_log_probabilities_of_a_forward(tmp_path):
    model = loaded(theirs("t5 v1.1"), tmp_path)
    prompts = prompts_of(4)
    samples = generate.generate(model, prompts, 12, group=2, seed=3, batch_size=5)
    rows = [(prompts[i // 2], tokens) for i, tokens in enumerate(samples.tokens)]
    packed = batch(rows, [range(8)])
    with torch.no_grad():
        expected = losses.token_logprobs(model(packed), model.head, packed["targets"])
    ours = torch.tensor([x for row in samples.logprobs for x in row])
    assert worst(ours, expected) < 1e-4
    assert samples.tokens[0] != samples.tokens[1]


# ---- adapters

TARGETS = [["q", "v"], ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], ["EncDecAttention.k", "wo"]]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_adapters_go_to_peft_and_back(targets, tmp_path):
    reference = theirs("t5 v1.1, untied")
    reference.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, task_type="SEQ_2_SEQ_LM", lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(theirs("t5 v1.1, untied"), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
        expected = their_logits(wrapped.eval())
    close = 5e-5 * expected.abs().max()  # rounding in fp32
    wrapped.save_pretrained(tmp_path / "theirs")

    model = weights.load_model(tmp_path / "base")
    weights.load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        ours = model.logits(model(batch()))
    assert worst(ours, expected) < close < 0.1 < worst(ours, their_logits(reference))

    weights.save_adapter(model, tmp_path / "ours", base=tmp_path / "base")
    assert weights.read_adapter_config(tmp_path / "ours")["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").float()
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        assert worst(their_logits(back), expected) < close
        merged = lora.merge(model)
        assert worst(merged.logits(merged(batch())), expected) < close


def test_all_linear_layers_of_both_stacks_get_adapters(tmp_path):
    model = loaded(theirs("t5"), tmp_path)
    lora.apply(model, rank=2, alpha=4)
    names = {name.rpartition(".")[2] for name, _ in lora.adapted(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert len(lora.adapted(model)) == 2 * 6 + 2 * 10
    model(batch()).sum().backward()
    assert all(p.grad is not None for p in tiny.adapter_parameters(model))
