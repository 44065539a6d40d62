"""T5, T5 v1.1 and mT5 against transformers and peft on tiny random models, in both directions, and
the stages on them."""

import dataclasses
import io

import numpy as np
import peft
import pytest
import sentencepiece
import tiny
import torch
import torch.nn.functional as F
from conftest import few
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

import lora
import sample
import t5
from model import empty
from nano import batches, evaluation, families, generate, losses, runtime, tokenizer, weights
from nano.config import UserError
from nano.store import Store, write_store

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


# ---- configurations and numbers

FLAN = dict(model_type="t5", architectures=["T5ForConditionalGeneration"], vocab_size=32128)
FLAN |= dict(d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
REAL = {  # the sizes in the config.json of the releases, and their numbers of parameters
    "flan-t5-small": (FLAN, (512, 1024, 8, 6), 76_961_152),
    "flan-t5-base": (FLAN, (768, 2048, 12, 12), 247_577_856),
    "flan-t5-xl": (FLAN, (2048, 5120, 24, 32), 2_849_757_184),
    "flan-t5-xxl": (FLAN, (4096, 10240, 24, 64), 11_135_332_352),
    "mt5-base": (
        dict(
            FLAN, model_type="mt5", architectures=["MT5ForConditionalGeneration"], vocab_size=250112
        ),
        (768, 2048, 12, 12),
        582_401_280,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations_have_transformers_names_and_shapes(name):
    settings, (dim, ffn_dim, layers, heads), count = REAL[name]
    settings = settings | dict(d_model=dim, d_ff=ffn_dim, num_layers=layers, num_heads=heads)
    model = empty(families.parse_config(settings, "config.json"))
    assert sum(p.numel() for p in model.parameters()) == count
    stored = families.places(model.cfg, dict(model.named_parameters()))
    with torch.device("meta"):
        if settings["model_type"] == "mt5":
            reference = MT5ForConditionalGeneration(MT5Config(**settings))
        else:
            reference = T5ForConditionalGeneration(T5Config(**settings))
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    wanted = {n: t.shape for n, t in reference.state_dict().items() if n not in copies}
    shapes = {n: model.get_parameter(parts[0]).shape for n, (parts, _) in stored.items()}
    assert shapes == wanted


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(feed_forward_proj="gated-tanh"), "feed_forward_proj 'gated-tanh'"),
        (dict(feed_forward_proj="relu-relu-x"), "feed_forward_proj"),
        (dict(relative_attention_num_buckets=4), "relative_attention_num_buckets"),
        (dict(relative_attention_max_distance=16), "relative_attention_max_distance"),
        (dict(architectures=["T5EncoderModel"]), "T5EncoderModel is not supported"),
        (dict(num_decoder_layers=-1), "num_decoder_layers"),
        (dict(d_model=None), "d_model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, said):
    settings = FLAN | dict(d_model=32, d_ff=64, num_layers=2, num_heads=4)
    families.parse_config(settings, "config.json")
    with pytest.raises(UserError, match=said):
        families.parse_config(settings | change, "config.json")


def test_bf16_does_not_overflow_and_float16_says_where(tmp_path):
    """An MLP that writes more than 65,504 to the residual stream, as those of the releases do."""
    model = loaded(theirs("t5 v1.1"), tmp_path)
    with torch.no_grad():
        model.model["encoder"].layers[1].mlp.down_proj.weight *= 1e5
        exact = model(batch())
        rounded = model.bfloat16()(batch())
        # scores in bf16 are off by up to 2^-8 of tens, which a softmax turns into tenths
        assert rounded.isfinite().all() and (rounded - exact).norm() < 0.1 * exact.norm()
        with pytest.raises(ValueError, match="layer 1 of the encoder .* 65,504.*bfloat16"):
            model.half()(batch())


def test_counts_come_from_the_modules():
    cfg = t5.ModelConfig(vocab_size=50, dim=8, n_layers=2, n_decoder_layers=2, buckets=8, far=20)
    cfg = dataclasses.replace(cfg, n_heads=2, n_kv_heads=2, head_dim=4, ffn_dim=16)
    model = t5.T5(cfg)
    attention, mlp = 4 * 8 * 8, 2 * 8 * 16
    encoder, decoder = 2 * (attention + mlp) + 16, 2 * (2 * attention + mlp) + 16
    assert model.flops_per_token(10) == 6 * ((encoder + decoder + 50 * 8) / 2) + 6 * 2 * 8 * 10


# ---- the tokenizer and the prompts

TEXTS = ["Hello, world!", "  a  b\n\nc ", "na\u00efve \ufb01 \uff11", "tab\tx", "quick < fox </s>"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A directory with a Unigram vocabulary as T5's: spiece.model, 100 extra ids."""
    dir = tmp_path_factory.mktemp("vocabulary")
    words = "the quick brown fox jumps over lazy dogs and hello world again".split()
    rng = np.random.default_rng(0)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words, 9)) for _ in range(300)),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (dir / "spiece.model").write_bytes(model.getvalue())
    names = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tiny.write(dir, "tokenizer_config.json", names | dict(tokenizer_class="T5Tokenizer"))
    tiny.write(dir, "config.json", FLAN | dict(is_encoder_decoder=True))
    return dir


def test_both_kinds_of_files_give_transformers_ids(vocabulary, tmp_path):
    reference = T5Tokenizer.from_pretrained(vocabulary)
    reference.save_pretrained(tmp_path)  # writes a tokenizer.json
    tiny.write(tmp_path, "config.json", FLAN | dict(is_encoder_decoder=True))
    one, other = (tokenizer.load(dir, template="plain") for dir in (vocabulary, tmp_path))
    assert one.identity == other.identity and one.vocab_size == other.vocab_size
    assert one.prompt_end == other.prompt_end == one.encode("", eos=True) == [1]
    for text in TEXTS[:-1]:
        ids = reference(text)["input_ids"][:-1]
        assert one.encode(text) == other.encode(text) == ids
        assert one.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    for name in ("<extra_id_0>", "<extra_id_99>"):
        (id,) = reference.convert_tokens_to_ids([name])
        assert one.added[name]["id"] == other.added[name]["id"] == id
        assert id not in one.encode(name)
    assert 1 not in one.encode(TEXTS[-1])  # text never becomes a control token


def test_plain_and_alpaca_close_the_prompt(vocabulary):
    reference = T5Tokenizer.from_pretrained(vocabulary)
    talk = [dict(role="user", content="the quick fox"), dict(role="assistant", content="jumps")]
    plain, alpaca = (tokenizer.load(vocabulary, template=name) for name in ("plain", "alpaca"))
    prompt, answer = reference("the quick fox")["input_ids"], reference("jumps")["input_ids"]
    ids, mask = plain.render(talk)
    assert ids == prompt + answer and mask == [0] * len(prompt) + [1] * len(answer)
    assert plain.render(talk[:1], add_generation_prompt=True)[0] == prompt

    ids, mask = alpaca.render(talk)
    start = mask.index(1)
    assert ids[start:] == answer and ids[start - 1] == 1 and 1 not in ids[: start - 1]
    assert (
        ids[: start - 1]
        == reference(
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nthe quick fox\n\n### Response:"
        )["input_ids"][:-1]
    )
    assert alpaca.render(talk[:1], add_generation_prompt=True)[0] == ids[:start]


# ---- batches


def test_an_encoder_needs_a_prompt(tmp_path):
    rows = [([5, 6, 7], [1, 1, 1])]
    write_store(tmp_path / "text", dict(train=rows), dict(vocab_size=10))
    with pytest.raises(UserError, match="begins with a target"):
        batches.collate([rows], 8, start_ids=(0,))
    with pytest.raises(UserError, match="prompt_loss_weight"):
        batches.Rows(Store(tmp_path / "text"), 1, 1, 8, prompt_weight=0.1, start_ids=(0,))


def test_collate_splits_rows():
    rows = [([5, 6, 7, 8], [0, 0, 1, 1]), ([3, 4, 2], [0, 1, 0])]
    micro = batches.collate([rows], 9, start_ids=(0,))
    assert micro["encoder_tokens"].tolist() == [[5, 6, 3]]
    assert micro["encoder_docs"].tolist() == [[0, 0, 1]]
    assert micro["tokens"].tolist() == [[0, 7, 8, 0, 4, 2]]
    assert micro["docs"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert micro["targets"].tolist() == [7, 8, 4] and micro["index"].tolist() == [0, 1, 3]
    assert micro["n_targets"] == 3 and micro["n_tokens"] == 7
    fixed = batches.collate([rows, []], 9, fixed_shapes=True, start_ids=(0,))
    assert fixed["tokens"].shape == fixed["encoder_tokens"].shape == (2, 9)


# ---- the stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    tiny.t5_dir(path / "model")
    tiny.store(path / "rows", path / "model")
    tiny.preferences(path / "groups", path / "model")
    (path / "rewards.py").write_text(
        "def letters(prompt, response, finished):\n    return sum(map(ord, response)) % 7 / 4\n"
    )
    return path


COMMON = "device=cpu dtype=float32 steps=2 lr=1e-3 log_every=1 micro_batch=2".split()


def test_packing_and_micro_batches_do_not_change_the_gradient(folder, tmp_path):
    """One step with everything packed into a row, and one with a document a row."""
    shapes = {
        "packed": "batch_size=1 micro_batch=1 max_length=4000".split(),
        "alone": "batch_size=24 micro_batch=3 max_length=64 packing=false".split(),
    }
    moments = {}
    for name, settings in shapes.items():
        argv = [f"model={folder}/model", f"data={folder}/rows", f"out={tmp_path / name}"]
        tiny.train("sft", tiny.override(argv, COMMON, ["steps=1", "samples=0"], settings))
        tensors, _ = tiny.state(tmp_path / name / "state")
        moments[name] = {n: t for n, t in tensors.items() if n.endswith("exp_avg")}
    assert moments["packed"].keys() == moments["alone"].keys()
    for name, t in moments["packed"].items():
        assert worst(t, moments["alone"][name]) < 1e-6, name


@pytest.mark.parametrize(
    "more", few([[], ["lora_rank=2"], ["train=attention", "freeze_layers=1"]], ["lora_rank=2"])
)
def test_sft_trains_it(folder, tmp_path, more):
    argv = [f"model={folder}/model", f"data={folder}/rows", f"out={tmp_path}"]
    argv += ["batch_size=2", "max_length=64", "grad_checkpoint=true", "steps=30", "lr=1e-2"]
    tiny.train("sft", tiny.override(COMMON, argv, more))
    losses = [r["loss"] for r in tiny.records(tmp_path, "eval")]
    assert losses[-1] < losses[0] - 0.1
    assert any(r["kind"] == "samples" for r in tiny.records(tmp_path))
    opened = weights.open(tmp_path / "last", folder / "model" if more == ["lora_rank=2"] else None)
    assert isinstance(opened.model, t5.T5)
    if more == ["lora_rank=2"]:
        keys = dict(source=tmp_path / "last", base=folder / "model", out=tmp_path / "merged")
        tiny.train("prepare.weights", tiny.arguments(keys))
        assert isinstance(weights.load_model(tmp_path / "merged"), t5.T5)


def test_dpo_trains_it(folder, tmp_path):
    argv = [f"model={folder}/model", f"data={folder}/groups", f"out={tmp_path}"]
    argv += ["batch_size=4", "max_length=128", "steps=12", "lr=1e-2", "nll_weight=0.1"]
    tiny.train("dpo", tiny.override(COMMON, argv))
    first, *_, last = tiny.records(tmp_path, "eval")
    assert abs(first["margin"]) < 1e-5 < 0.05 < last["margin"]


@pytest.mark.parametrize(
    "more", few([["algo=grpo", "group=4"], ["algo=ppo"], ["algo=rloo", "group=2", "lora_rank=2"]], ["algo=ppo"])
)
def test_ppo_trains_it_with_a_function(folder, tmp_path, more):
    """main itself checks that the first ratios are 1 and the first KL is 0."""
    argv = [f"model={folder}/model", f"data={folder}/groups", f"out={tmp_path}", "batch_size=8"]
    argv += [f"reward={folder}/rewards.py:letters", "max_new_tokens=8", "sample_every=1"]
    tiny.train("ppo", tiny.override(COMMON, argv, more))
    for record in tiny.records(tmp_path, "train"):
        assert record["logprob_gap"] < 1e-5 and record["policy_grad_norm"] > 0


def test_reward_and_pretrain_say_that_they_do_not(folder, tmp_path):
    argv = [f"model={folder}/model", f"data={folder}/groups", f"out={tmp_path}"]
    with pytest.raises(UserError, match="family t5, of which transformers has no model"):
        tiny.train("reward", argv)
    with pytest.raises(UserError, match="encoder-decoder, which answers prompts"):
        tiny.train("pretrain", [argv[0], f"data={folder}/rows", argv[2]])


def test_evaluation_of_options_equals_forwards(folder):
    """Contexts of unequal lengths with options of unequal lengths, some of them alike."""
    model = weights.load_model(folder / "model").eval()
    rng = np.random.default_rng(1)
    questions = []
    for n in (3, 1, 4):
        options = [rng.integers(97, 120, rng.integers(1, 6)).tolist() for _ in range(n)]
        context = rng.integers(97, 120, rng.integers(1, 40)).tolist()
        questions.append(evaluation.Question(context, options))
    rt = runtime.Runtime("cpu", "none", "float32")
    scored = evaluation.loglikelihoods(model, rt, questions)
    for question, (logprobs, hits) in zip(questions, scored, strict=True):
        for option, logprob, hit in zip(question.options, logprobs, hits, strict=True):
            packed = batch([(question.context, option)], [(0,)])
            with torch.no_grad():
                all_logprobs = model.logits(model(packed)).log_softmax(-1)
            expected = all_logprobs[range(len(option)), option].sum()
            assert abs(logprob - expected) < 1e-4
            assert hit == (all_logprobs.argmax(-1).tolist() == option)


def test_eval_and_sample(folder, tmp_path, capsys):
    """eval.py's loss is sft.py's, and what sample.py writes are generate's tokens."""
    tiny.train("eval", [f"model={folder}/model", f"data={folder}/rows", "dtype=float32"])
    document = tiny.json.loads(capsys.readouterr().out.splitlines()[-1])
    argv = [f"model={folder}/model", f"data={folder}/rows", f"out={tmp_path}", "max_length=64"]
    tiny.train("sft", [*argv, "epochs=0", "dtype=float32", "samples=0"])
    (record,) = tiny.records(tmp_path, "eval")
    assert abs(document["data"]["metrics"]["loss"] - record["loss"]) < 1e-4
    with pytest.raises(UserError, match="text= has none"):
        (tmp_path / "a.txt").write_text("abc")
        tiny.train("eval", [f"model={folder}/model", f"text={tmp_path}/a.txt"])

    (tmp_path / "prompts.txt").write_text("abc\nxyz\n")
    argv = [f"model={folder}/model", f"prompts={tmp_path}/prompts.txt", f"out={tmp_path}/out.json"]
    tiny.train("sample", [*argv, "temperature=0", "max_new_tokens=8", "dtype=float32"])
    opened = weights.open(folder / "model", template="plain")
    prompts = [[*text.encode(), 258] for text in ("abc", "xyz")]
    samples = generate.generate(
        opened.model, prompts, 8, temperature=0.0, stop_ids=opened.tok.stop_ids
    )
    written = tiny.json.loads((tmp_path / "out.json").read_text())
    assert [r["output"] for r in written] == [opened.tok.decode(t) for t in samples.tokens]


def test_a_chat_encodes_each_prompt_as_a_whole(folder, capsys):
    """The second turn does not go on from what the first one left."""
    cfg = sample.Config(f"{folder}/model", template="alpaca", temperature=0.0, max_new_tokens=6)
    sampler = sample.Sampler(dataclasses.replace(cfg, device="cpu", dtype="float32"))
    history = []
    for text in ("abc", "xyz"):
        history = sample.reply(sampler, text, None, history, 0)
    opened = weights.open(folder / "model", template="alpaca")
    for count in (1, 3):
        ids, _ = opened.tok.render(history[:count], add_generation_prompt=True)
        samples = generate.generate(
            opened.model, [ids], 6, temperature=0.0, stop_ids=opened.tok.stop_ids
        )
        assert history[count]["content"] == opened.tok.decode(samples.tokens[0])
