import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch

import lora
import sft
from nano import evaluation, files, generate, tasks, tokenizer, weights
from nano.config import UserError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("lora") / "base")


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(TOKENS))


def shake(model, name="default", seed=1):
    """Random numbers into the adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tiny.adapter_parameters(model, name):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def adapter(dir, base, name="default", seed=1, **settings):
    """A PEFT directory with random weights, written by weights.save_adapter."""
    model = weights.load_model(base)
    lora.apply(model, **dict(rank=4, alpha=8) | settings, name=name)
    weights.save_adapter(shake(model, name, seed), dir, name=name, base=base)
    return logits(model.eval())


def change(dir, **settings):
    tiny.write(dir, "adapter_config.json", weights.read_adapter_config(dir) | settings)


def digest(dir):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(dir.iterdir())
    }


def test_a_new_adapter_changes_nothing():
    model = tiny.model()
    before = logits(model)
    lora.apply(model, rank=4, alpha=8, dropout=0.5)
    model.eval()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 4.0)])
def test_the_update_is_scale_times_b_a(rslora, scale):
    model = tiny.model()
    lora.apply(model, rank=4, alpha=8, rslora=rslora)
    shake(model)
    layer, x = model.layers[1].mlp.up_proj, torch.randn(3, 32)
    right = x @ (layer.base.weight + scale * layer.lora_B["default"] @ layer.lora_A["default"]).t()
    torch.testing.assert_close(layer(x), right)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["mlp.down_proj"], "all-linear", ["all-linear"], "o_proj"]
)
def test_targets_and_parameter_count(targets):
    model = tiny.model()
    total = sum(p.numel() for p in model.parameters())
    lora.apply(model, rank=3, alpha=8, targets=targets)
    suffixes = (
        ALL if "all-linear" in targets else [targets] if isinstance(targets, str) else targets
    )
    names = [n for n, _ in lora.adapted(model)]
    assert len(names) == 2 * len(suffixes) and all(
        any(n.endswith(s) for s in suffixes) for n in names
    )
    shapes = dict(
        q_proj=(32, 32),
        k_proj=(16, 32),
        v_proj=(16, 32),
        o_proj=(32, 32),
        gate_proj=(48, 32),
        up_proj=(48, 32),
    )
    shapes["down_proj"] = (32, 48)
    count = sum(2 * 3 * sum(shapes[s.rpartition(".")[2]]) for s in suffixes)
    assert sum(p.numel() for p in tiny.adapter_parameters(model)) == count
    assert sum(p.numel() for p in model.parameters()) == total + count
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names) and all(".lora_" in n for n in trained)


@pytest.mark.parametrize(
    "targets", [["w_proj"], ["lm_head"], ["q_proj", "roj"], ["embed_tokens"], []]
)
def test_unknown_targets(targets):
    with pytest.raises(ValueError, match="lora_targets"):
        lora.apply(tiny.model(), rank=4, alpha=8, targets=targets)
    cfg = SimpleNamespace(lora_rank=4, lora_alpha=8.0, lora_dropout=0.0, lora_rslora=False)
    cfg.lora_targets = targets
    with pytest.raises(UserError, match="lora_targets"):
        weights.add_adapter(tiny.model(), sft.Config(lora_rank=4, lora_targets=tuple(targets)))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one(rank):
    with pytest.raises(ValueError, match="lora_rank"):
        lora.apply(tiny.model(), rank=rank, alpha=8)


def test_merged_equals_unmerged():
    model = tiny.model()
    base = logits(model)
    lora.apply(model, rank=4, alpha=8)
    before, names = logits(shake(model)), {n for n, _ in tiny.model().named_parameters()}
    assert (before - base).abs().max() > 0.1
    lora.merge(model)
    assert not lora.adapted(model) and {n for n, _ in model.named_parameters()} == names
    assert (logits(model) - before).abs().max() <= 1e-5


def test_merging_a_bare_model_or_a_switched_off_adapter_gives_the_base():
    model = tiny.model()
    before = logits(model)
    assert torch.equal(logits(lora.merge(model)), before)
    lora.apply(model, rank=4, alpha=8)
    lora.use(shake(model), None)
    assert torch.equal(logits(lora.merge(model)), before)


def test_named_adapters_share_one_base():
    model = tiny.model()
    base = logits(model)
    lora.apply(model, rank=4, alpha=8, name="policy")
    lora.apply(model, rank=2, alpha=8, targets=["q_proj"], name="value")
    policy = logits(lora.use(shake(model, "policy"), "policy") or model)
    lora.use(shake(model, "value", seed=2), "value")
    value = logits(model)
    assert (
        (policy - base).abs().max() > 0.1
        and (value - base).abs().max() > 0.1
        and (value - policy).abs().max() > 0.1
    )

    lora.use(model, "policy")  # training one leaves the other and the base alone
    optimizer = torch.optim.AdamW(tiny.adapter_parameters(model, "policy"), lr=1e-2)
    model.logits(model.hidden(TOKENS)).square().mean().backward()
    assert all(p.grad is None for p in tiny.adapter_parameters(model, "value"))
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)
    optimizer.step()
    assert not torch.equal(logits(model), policy)
    lora.use(model, "value")
    assert torch.equal(logits(model), value)
    lora.use(model, None)
    assert torch.equal(logits(model), base)
    with pytest.raises(KeyError, match="reward"):
        lora.use(model, "reward")


def test_dropout_acts_in_training_only():
    model = tiny.model()
    lora.apply(model, rank=4, alpha=8, dropout=0.5)
    shake(model)
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))
    bare = tiny.model()
    lora.apply(bare, rank=4, alpha=8)
    shake(bare).train()
    state = torch.get_rng_state()
    assert torch.equal(logits(bare), logits(model)) and torch.equal(torch.get_rng_state(), state)


def test_a_bf16_base_carries_fp32_adapters():
    model = tiny.model().bfloat16()
    lora.apply(model, rank=4, alpha=8)
    assert all(p.dtype == torch.float32 for p in tiny.adapter_parameters(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.logits(model.hidden(TOKENS)).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in tiny.adapter_parameters(model))


class Halves(torch.nn.Module):
    """A linear layer whose weight is kept in another form, as in a quantised one."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("ints", (linear.weight.detach() * 256).round().to(torch.int16))

    def dense(self):
        return self.ints.float() / 256

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dense().to(x.dtype), self.bias)


def test_a_base_that_is_no_matrix():
    """An adapter stands around whatever multiplies: forward, merge, decoding, names."""
    model, plain = tiny.model(), tiny.model()
    for name in lora.linear_names(model):
        model.set_submodule(name, Halves(model.get_submodule(name)))
        layer = plain.get_submodule(name)
        layer.weight.data = model.get_submodule(name).dense()
    assert lora.linear_names(model) == lora.linear_names(plain)
    for m in (model, plain):
        lora.apply(m, rank=4, alpha=8)
        shake(m)
    assert lora.linear_names(model) == lora.linear_names(plain) and len(lora.adapted(model)) == 14
    assert torch.equal(logits(model), logits(plain))
    samples = [
        generate.generate(m, [[1, 2, 3]], 20, temperature=0.0, plan=dict(pack=pack)).tokens
        for m in (model, plain)
        for pack in (False, True)
    ]
    assert samples[0] == samples[1] == samples[2] == samples[3]
    lora.use(model, None)
    assert generate.generate(model, [[1, 2, 3]], 20, temperature=0.0).tokens != samples[0]
    assert model.training and all(m.training for m in model.modules())
    lora.use(model, "default")
    merged = lora.merge(model)
    assert torch.equal(logits(merged), logits(lora.merge(plain)))


# ---- PEFT directories


def in_peft(base, dir, kind="AutoModelForCausalLM"):
    """The logits that `peft` gets from an adapter directory, on transformers' own model."""
    import peft
    import transformers

    model = getattr(transformers, kind).from_pretrained(
        base, dtype=torch.float32, **dict(num_labels=1) if "Seq" in kind else {}
    )
    model = peft.PeftModel.from_pretrained(model, dir)
    with torch.no_grad():
        if "Seq" in kind:
            return model.base_model.model.score(
                model.base_model.model.model(TOKENS).last_hidden_state
            ).squeeze(-1)
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(rslora=True),
        dict(targets=["q_proj", "v_proj"], dropout=0.1),
        dict(targets=["layers.1.self_attn.q_proj"]),
    ],
    ids=str,
)
def test_peft_reads_what_is_written_here(base, tmp_path, settings, recwarn):
    ours = adapter(tmp_path / "adapter", base, **settings)
    assert (ours - in_peft(base, tmp_path / "adapter")).abs().max() <= 1e-5
    assert not [w for w in recwarn if "missing" in str(w.message) and "adapter" in str(w.message)]
    opened = weights.open(tmp_path / "adapter")
    model, home = opened.model, opened.base
    assert home == base and torch.equal(logits(model.train()), ours)  # loaded without dropout
    assert set(digest(tmp_path / "adapter")) == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "settings", [{}, dict(use_rslora=True), dict(target_modules=["q_proj", "down_proj"])], ids=str
)
def test_what_peft_writes_is_read_here(base, tmp_path, settings):
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        **dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | settings
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.1)
        theirs = model(TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    ours = weights.open(tmp_path / "adapter", base=base).model
    assert (logits(ours) - theirs).abs().max() <= 1e-5
    assert (logits(lora.merge(ours)) - theirs).abs().max() <= 1e-5


def test_a_score_adapter_there_and_back(base, tmp_path):
    import peft
    import transformers

    model = weights.load_model(base, head="score")
    lora.apply(model, rank=4, alpha=8)
    shake(model)
    weights.save_adapter(model, tmp_path / "ours", base=base)
    with torch.no_grad():
        ours = model.score(model.hidden(TOKENS))
    assert (
        ours - in_peft(base, tmp_path / "ours", "AutoModelForSequenceClassification")
    ).abs().max() <= 1e-5
    again = weights.open(tmp_path / "ours").model
    with torch.no_grad():
        assert again.cfg.head == "score" and torch.equal(again.score(again.hidden(TOKENS)), ours)

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n or "score" in n:
                p.normal_(std=0.1)
        scores = theirs.base_model.model.score(
            theirs.base_model.model.model(TOKENS).last_hidden_state
        ).squeeze(-1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = weights.open(tmp_path / "theirs", base=base).model
    with torch.no_grad():
        assert (model.score(model.hidden(TOKENS)) - scores).abs().max() <= 1e-5
    with pytest.raises(UserError, match="score"):
        weights.load_adapter(weights.load_model(base), tmp_path / "theirs")


def test_a_merged_model_opens_in_transformers(base, tmp_path):
    import transformers

    ours = adapter(tmp_path / "adapter", base)
    opened = weights.open(tmp_path / "adapter")
    model, home = opened.model, opened.base
    weights.save_model(lora.merge(model), tmp_path / "merged", like=home)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    with torch.no_grad():
        assert (theirs(TOKENS).logits - ours).abs().max() <= 1e-5
    assert (logits(weights.load_model(tmp_path / "merged")) - ours).abs().max() <= 1e-5


def test_another_base_by_key_changes_no_file(base, tmp_path):
    other = tiny.model_dir(tmp_path / "other", seed=7)
    adapter(tmp_path / "adapter", base)
    before = [digest(d) for d in (base, other, tmp_path / "adapter")]
    opened = weights.open(tmp_path / "adapter", base=other)
    model, home = opened.model, opened.base
    assert home == other and not torch.equal(
        logits(model), logits(weights.open(tmp_path / "adapter").model)
    )
    lora.use(model, None)
    assert torch.equal(logits(model), logits(weights.load_model(other)))
    assert [digest(d) for d in (base, other, tmp_path / "adapter")] == before


def test_a_base_beside_the_adapter_is_found(base, tmp_path):
    ours = adapter(tmp_path / "adapter", base)
    (tmp_path / "adapter" / "base").symlink_to(base)
    change(tmp_path / "adapter", base_model_name_or_path="base")
    assert torch.equal(logits(weights.open(tmp_path / "adapter").model), ours)


def test_a_folder_holds_an_adapter_or_a_model(base, tmp_path):
    """A run with the other kind of training in the same folder leaves nothing else to be opened."""
    dir, whole = tmp_path / "last", weights.load_model(base)
    adapter(dir, base)
    files.write_text(dir / "score_scale.json", "{}")
    weights.save_model(whole, dir, like=base)
    assert not {p.name for p in dir.iterdir()} & {
        "adapter_config.json",
        "adapter_model.safetensors",
        "score_scale.json",
    }
    assert torch.equal(logits(weights.open(dir).model), logits(whole))
    weights.save_model(whole, dir, like=base, shard_bytes=20000)  # several files and their index
    ours = adapter(dir, base)
    assert not (dir / "config.json").exists() and not list(dir.glob("model*"))
    assert torch.equal(logits(weights.open(dir).model), ours)


def test_adapters_that_do_not_fit(base, tmp_path):
    dir = tmp_path / "adapter"
    adapter(dir, base)
    narrow = tiny.model_dir(tmp_path / "narrow", dim=16)
    shallow = tiny.model_dir(tmp_path / "shallow", n_layers=1)

    def refused(match, *args, **kwargs):
        with pytest.raises(UserError, match=match) as e:
            weights.open(*args, **kwargs)
        assert str(dir) in str(e.value) or "lonely" in str(e.value)

    refused("another base", dir, base=narrow)
    refused("another base", dir, base=shallow)
    refused("no model directory", dir, base=tmp_path / "nowhere")
    with pytest.raises(UserError, match="whole model"):
        weights.open(base, base=base)

    good = dict(weights.read_tensors(dir, name="adapter_model"))
    lonely = tmp_path / "lonely"
    for match, tensors in (
        ("incomplete", {k: t for k, t in good.items() if "lora_B" not in k}),
        ("incomplete", dict(list(good.items())[:-1])),
        ("lm_head", good | {weights.PREFIX + "lm_head.lora_A.weight": torch.zeros(4, 32)}),
        (
            "model.embed_tokens",
            good | {weights.PREFIX + "model.embed_tokens.lora_embedding_A": torch.zeros(4, 32)},
        ),
        ("another base", good | {weights.PREFIX + "model.experts.weight": torch.zeros(4, 32)}),
    ):
        weights.write_tensors(tensors.items(), lonely, name="adapter_model")
        tiny.write(lonely, "adapter_config.json", weights.read_adapter_config(dir))
        refused(match, lonely)
    for settings in (
        dict(peft_type="PROMPT_TUNING"),
        dict(r="4"),
        dict(r=0),
        dict(lora_alpha=None),
    ):
        config = weights.read_adapter_config(dir)
        change(dir, **settings)
        refused(next(iter(settings)), dir)
        tiny.write(dir, "adapter_config.json", config)
    (dir / "adapter_config.json").write_text("{")
    refused("JSON", dir)
    (dir / "adapter_config.json").unlink()
    refused("config", dir)


def test_an_adapter_opens_under_the_template_that_it_was_trained_with(base, tmp_path):
    model, tok = weights.load_model(base), tokenizer.load(base, template="alpaca")
    lora.apply(model, rank=4, alpha=8)
    weights.save_adapter(model, tmp_path / "alpaca", base=base, tok=tok)
    weights.save_adapter(model, tmp_path / "plain", base=base, tok=tokenizer.load(base))
    ask = [dict(role="user", content="Why?")]
    opened = weights.open(tmp_path / "alpaca")
    assert opened.base == base and opened.tok.render(ask, True) == tok.render(ask, True)
    assert tokenizer.load(tmp_path / "alpaca").template == "alpaca"
    assert weights.open(tmp_path / "alpaca", merge=True, template="zephyr").tok.template == "zephyr"
    assert weights.open(tmp_path / "plain").tok.template == tokenizer.load(base).template


def test_a_benchmark_asks_under_the_template_of_the_adapter(base, tmp_path):
    model = weights.load_model(base)
    tok = tokenizer.load(base, template="alpaca")
    lora.apply(model, rank=4, alpha=8)
    weights.save_adapter(model, tmp_path / "adapter", base=base, tok=tok)
    opened = weights.open(tmp_path / "adapter")
    benchmark = evaluation.prepare(tasks.load("arithmetic"), opened.tok, opened.model.cfg, limit=1)
    ask = [dict(role="user", content=benchmark.records[0]["question"])]
    assert benchmark.prompts == [tok.render(ask, True)[0]]


def test_the_scale_survives_the_directory(base, tmp_path):
    adapter(tmp_path / "a", base, rank=3, alpha=5, rslora=True)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert math.isclose(config["lora_alpha"] / config["r"], 5 / math.sqrt(3)) and not config.get(
        "use_rslora"
    )
    assert config["base_model_name_or_path"] == str(base) and config["target_modules"] == sorted(
        ALL
    )
