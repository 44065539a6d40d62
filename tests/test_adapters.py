"""Adapters of every kind that peft writes: read here, saved here, read again by peft."""

import contextlib
import json
import math
import os
import shutil
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import lora
import ppo
import prepare.weights as prepare_weights
from nano import config, generate, tokenizer, weights
from nano.adapters import AdapterConfig
from nano.config import UserError
from nano.weights import PREFIX
from prepare import convert, instructions

SLOW = os.environ.get("NANO_SLOW") == "1"
TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(5))
BASES = dict(
    plain=dict(qkv_bias=True, o_bias=True),
    tied=dict(tie_embeddings=True),
    gpt2=dict(
        vocab_size=264,
        n_kv_heads=4,
        ffn_dim=128,
        norm="layer",
        positions="learned",
        mlp="plain",
        activation="gelu_tanh",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        family="gpt2",
    ),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny.model_dir(folder / name, **sizes) for name, sizes in BASES.items()}


def logits(model):
    with torch.no_grad():
        return model.logits(model.hidden(TOKENS))


def whole(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def in_peft(base, dir):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(whole(base), dir).eval()(TOKENS).logits


def of_peft(base, dir, **settings):
    """Writes an adapter of peft in which all that is trained has moved. Returns its logits."""
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM") | settings
    torch.manual_seed(0)
    model = peft.get_peft_model(whole(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.02 if "magnitude" in name else 0.1))
        out = model.eval()(TOKENS).logits
    model.save_pretrained(dir)
    return out


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "rank_pattern": ("plain", dict(target_modules=ALL, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 3})),
    "alpha_pattern": ("plain", dict(target_modules=ALL, alpha_pattern={"v_proj": 3, r"layers\.0\.mlp\..*": 5})),
    "both patterns, rslora": (
        "plain",
        dict(target_modules=ALL, use_rslora=True, rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 1}),
    ),
    "layers": ("plain", dict(target_modules=ALL, layers_to_transform=[1])),
    "regex": ("plain", dict(target_modules=r".*\.0\..*(q|v)_proj", exclude_modules=r".*v_proj")),
    "bias all": ("plain", dict(bias="all")),
    "bias lora_only": ("plain", dict(bias="lora_only")),
    "DoRA": ("plain", dict(target_modules=ALL, use_dora=True)),
    "whole layers": ("plain", dict(modules_to_save=["lm_head", "embed_tokens", "norm", "k_proj"])),
    "embedding, head": ("plain", dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embedding, head, patterns": (
        "tied",
        dict(
            target_modules=["q_proj", "embed_tokens", "lm_head"],
            use_rslora=True,
            rank_pattern={"lm_head": 2},
            alpha_pattern={"embed_tokens": 3},
        ),
    ),
    "embedding alone": ("plain", dict(target_modules=["embed_tokens"])),
    "rows": ("plain", dict(trainable_token_indices=[3, 5])),
    "gaussian": ("plain", dict(init_lora_weights="gaussian")),
    "orthogonal": ("plain", dict(init_lora_weights="orthogonal")),
    "mica": ("plain", dict(init_lora_weights="mica")),
    "tied: rows": ("tied", dict(trainable_token_indices=[3, 5])),
    "tied: rows of one": ("tied", dict(trainable_token_indices={"embed_tokens": [3], "lm_head": [5]})),
    "tied: whole embedding": ("tied", dict(modules_to_save=["embed_tokens"])),
    "tied: whole head": ("tied", dict(modules_to_save=["lm_head"])),
    "tied: both": ("tied", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied: embedding": ("tied", dict(target_modules=["q_proj", "embed_tokens"])),
    "tied: embedding and head": (
        "tied",
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "tied: head": ("tied", dict(target_modules=["q_proj", "lm_head"])),
    "GPT-2 rank_pattern": (
        "gpt2",
        dict(target_modules=["c_attn", "c_proj"], rank_pattern={"c_attn": 2}, fan_in_fan_out=True),
    ),
    "GPT-2 bias": ("gpt2", dict(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "GPT-2 DoRA": ("gpt2", dict(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True)),
    "GPT-2 whole layers": (
        "gpt2",
        dict(target_modules=["c_attn"], modules_to_save=["wte", "ln_f", "c_fc"], fan_in_fan_out=True),
    ),
    "GPT-2 embedding": ("gpt2", dict(target_modules=["c_attn", "wte"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind, bases, tmp_path):
    base, settings = KINDS[kind]
    base = bases[base]
    theirs = of_peft(base, tmp_path / "theirs", **settings)
    assert (theirs - logits(weights.load_model(base))).abs().max() > 0.02
    opened = weights.open(tmp_path / "theirs", base=base)
    assert (logits(opened.model) - theirs).abs().max() <= 1e-5
    # saved here: read by peft, and by us
    weights.save_adapter(opened.model, tmp_path / "ours", base=base, tok=opened.tok)
    assert (in_peft(base, tmp_path / "ours") - theirs).abs().max() <= 1e-5
    again = weights.open(tmp_path / "ours").model
    assert (logits(again) - theirs).abs().max() <= 1e-5
    ranks = [{len(m.lora_A["default"]) for _, m in lora.adapted(m)} for m in (opened.model, again)]
    assert ranks[0] == ranks[1]
    # the same trunk under a score head, without what belongs to the output matrix
    scorer = weights.open(tmp_path / "ours", head="score").model
    weights.save_adapter(scorer, tmp_path / "scorer", base=base)
    with torch.no_grad():
        hidden = [weights.open(tmp_path / d).model.hidden(TOKENS) for d in ("ours", "scorer")]
        assert (scorer.hidden(TOKENS) - hidden[0]).abs().max() <= 1e-5
        assert (hidden[1] - hidden[0]).abs().max() <= 1e-5
    # merged
    merged = weights.open(tmp_path / "ours", merge=True)
    weights.save_model(merged.model, tmp_path / "merged", like=base, tok=merged.tok)
    with torch.no_grad():
        assert (whole(tmp_path / "merged")(TOKENS).logits - theirs).abs().max() <= 1e-5


# ---- what is refused


def change(dir, **settings):
    config = json.loads((dir / "adapter_config.json").read_text()) | settings
    tiny.write(dir, "adapter_config.json", config)


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as e:
        weights.open(*args, **kwargs)
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """A plain adapter of peft on the base "plain", and its logits."""
    dir = tmp_path_factory.mktemp("plain") / "adapter"
    return dir, of_peft(bases["plain"], dir, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def adapter(plain, tmp_path):
    return shutil.copytree(plain[0], tmp_path / "adapter")


HARMLESS = [
    *(dict(init_lora_weights=how) for how in (True, False, "gaussian", "eva", "orthogonal", "mica")),
    dict(lora_dropout=0.3, inference_mode=False, revision="main", peft_version="9.9"),
    dict(eva_config=dict(rho=2.0), corda_config={}, qalora_group_size=8, fan_in_fan_out=True),
    dict(a_setting_of_tomorrow=None, another=False, one_more={}),
    dict(target_modules=r".*\.(q|v)_proj"),
    dict(target_modules=["q_proj", "v_proj", "k_proj"], exclude_modules=["k_proj"]),
    dict(target_modules=None),
]
REFUSED = [
    *(
        dict(init_lora_weights=how)
        for how in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow", 3)
    ),
    dict(a_setting_of_tomorrow=1.5),
    dict(megatron_config=dict(a=1)),
    dict(alora_invocation_tokens=[1]),
    dict(layer_replication=[[0, 1]]),
    dict(lora_bias=True),
    dict(use_qalora=True),
    dict(target_parameters=["experts"]),
    dict(velora_config=dict(a=1)),
    dict(kasa_config=dict(a=1)),
    dict(bias="some"),
    dict(r="4"),
    dict(r=True),
    dict(lora_alpha=float("nan")),
    dict(lora_alpha=None),
    dict(rank_pattern={"q_proj": 0}),
    dict(rank_pattern={"(": 2}),
    dict(rank_pattern=[1]),
    dict(alpha_pattern={"q_proj": "2"}),
    dict(target_modules=3),
    dict(target_modules="("),
    dict(modules_to_save="lm_head"),
    dict(layers_to_transform="1"),
    dict(trainable_token_indices=[999]),
    dict(trainable_token_indices={"q_proj": "a"}),
]


@pytest.mark.parametrize("settings", HARMLESS, ids=str)
def test_settings_that_change_no_trained_adapter_load(settings, bases, plain, adapter):
    change(adapter, **settings)
    ours = weights.open(adapter, base=bases["plain"]).model
    assert (logits(ours) - plain[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_other_settings_are_refused_by_name(settings, bases, adapter):
    change(adapter, **settings)
    refused(next(iter(settings)), adapter, base=bases["plain"])


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(target_modules=["q_proj", "v_proj", "k_proj"]), "names .*k_proj"),
        (dict(target_modules=["q_proj"]), "adapts .*v_proj"),
        (dict(layers_to_transform=[0]), "adapts .*1.self_attn"),
        (dict(modules_to_save=["lm_head"]), "names lm_head"),
        (dict(bias="lora_only"), "names .*bias"),
        (dict(bias="all"), "names .*bias"),
        (dict(use_dora=True), "missing: .*magnitude"),
        (dict(trainable_token_indices=[1, 2]), "missing: .*tokens_delta"),
        (dict(rank_pattern={"q_proj": 3}), "of another shape"),
        (dict(task_type="SEQ_CLS"), "names score"),
    ],
    ids=str,
)
def test_an_adapter_without_what_its_config_names_is_refused(settings, match, bases, adapter):
    change(adapter, **settings)
    refused(match, adapter, base=bases["plain"])


ODD = [None, True, -1, 2.5, math.nan, "(", [1], ["q"], {"a": 1}, {"q_proj": [1]}, [[1]], 10**30]


def test_odd_values_and_tensors_end_in_a_sentence(bases, tmp_path):
    of_peft(bases["plain"], tmp_path, **KINDS["embedding, head"][1])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = tiny.tensors(tmp_path, "adapter_model")

    def opens():
        with contextlib.suppress(UserError):
            weights.open(tmp_path, base=bases["plain"], merge=True)

    for key in AdapterConfig.__annotations__:
        for value in ODD:
            tiny.write(tmp_path, "adapter_config.json", config | {key: value})
            opens()
    tiny.write(tmp_path, "adapter_config.json", config)
    for key, t in tensors.items():
        for odd in (torch.zeros(()), torch.zeros(0), torch.zeros(2, 2, 2), t.long(), t[:1].clone()):
            weights.write_tensors((tensors | {key: odd}).items(), tmp_path, name="adapter_model")
            opens()


# ---- forms of a directory


def test_a_pickle_of_tensors_is_read_and_one_of_code_is_not(bases, plain, adapter):
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    opened = weights.open(adapter, base=bases["plain"])
    assert (logits(opened.model) - plain[1]).abs().max() <= 1e-5
    weights.save_adapter(opened.model, adapter, base=bases["plain"])  # leaves no older file behind
    assert not (adapter / "adapter_model.bin").exists()
    file.unlink()
    torch.save({"a": SimpleNamespace()}, adapter / "adapter_model.bin")
    refused("could run code", adapter, base=bases["plain"])


def test_an_adapter_is_one_file_of_any_size(bases, plain, tmp_path, monkeypatch):
    """peft cannot read shards."""
    monkeypatch.setattr(weights.write_tensors, "__defaults__", ("model", 100.0))
    opened = weights.open(plain[0], base=bases["plain"])
    weights.save_adapter(opened.model, tmp_path, base=bases["plain"])
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (in_peft(bases["plain"], tmp_path) - plain[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("base", ["plain", "tied"])
def test_an_adapter_may_bring_tokens_and_their_rows(base, bases, tmp_path):
    base, dir = bases[base], tmp_path / "adapter"
    their_tok = transformers.AutoTokenizer.from_pretrained(base)
    their_tok.add_special_tokens(dict(additional_special_tokens=["<tool>"]))
    their_tok.add_tokens([f"<new{i}>" for i in range(8)])
    their_tok.chat_template = tokenizer.load(base, template="alpaca").chat_template
    model = whole(base)
    model.resize_token_embeddings(len(their_tok))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    tokens = torch.tensor([[97, 259, 266, 98, 260]])
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    model.save_pretrained(dir)
    their_tok.save_pretrained(dir)
    opened = weights.open(dir, base=base)
    assert opened.model.cfg.vocab_size == len(their_tok) == 268
    assert opened.tok.dir == dir and opened.tok.encode("a<new3>") == [97, 263]
    with torch.no_grad():
        ours = opened.model.logits(opened.model.hidden(tokens))
    assert (ours - theirs).abs().max() <= 1e-5
    # every script, and the merged model, take the tokenizer beside the adapter
    asked = [dict(role="user", content="a")]
    how = dict(add_generation_prompt=True, return_dict=False)
    expected = their_tok.apply_chat_template(asked, **how)
    assert opened.tok.render(asked, True)[0] == expected
    change(dir, base_model_name_or_path=str(base))
    assert tokenizer.load(dir).fingerprint == opened.tok.fingerprint
    assert convert.setup(instructions.Config(source="s", model=str(dir), out="o"), None, None).render(asked, True)[0] == expected
    tiny.train("prepare.weights", [f"source={dir}", f"out={tmp_path}/merged"])
    merged = weights.open(tmp_path / "merged")
    assert merged.tok.fingerprint == opened.tok.fingerprint
    assert merged.tok.render(asked, True)[0] == expected
    merged_tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged_tok.apply_chat_template(asked, **how) == expected
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(opened.tok.stop_ids)
    with torch.no_grad():
        assert (whole(tmp_path / "merged")(tokens).logits - theirs).abs().max() <= 1e-5
    # an adapter that goes on from it keeps both
    weights.save_adapter(opened.model, tmp_path / "next", base=base, tok=opened.tok)
    again = weights.open(tmp_path / "next")
    assert again.tok.render(asked, True)[0] == expected and again.model.cfg.vocab_size == 268
    with torch.no_grad():
        assert (again.model.logits(again.model.hidden(tokens)) - theirs).abs().max() <= 1e-5


def test_a_template_beside_an_adapter_without_a_vocabulary(bases, plain, adapter):
    text = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tiny.write(adapter, "tokenizer_config.json", dict(chat_template=text))
    tok = weights.open(adapter, base=bases["plain"]).tok
    assert tok.chat_template == text and tok.dir == bases["plain"]


def test_another_base_in_prepare_and_hub_ids(bases, plain, tmp_path, monkeypatch):
    """source= may be the hub id of an adapter, and so may the base that it names."""
    hub = {"some/adapter": plain[0], "some/base": bases["plain"], "some/tied": bases["tied"]}
    monkeypatch.setattr(prepare_weights, "download", lambda repo: hub[repo])
    source = shutil.copytree(plain[0], tmp_path / "source")
    change(source, base_model_name_or_path="some/base")
    hub["some/adapter"] = source
    convert = lambda *args: tiny.train("prepare.weights", [f"out={tmp_path}/m", *args])  # noqa: E731
    for args in (["source=some/adapter"], [f"source={source}", f"base={bases['plain']}"]):
        convert(*args)
        assert (logits(weights.load_model(tmp_path / "m")) - plain[1]).abs().max() <= 1e-5
    with pytest.raises(UserError, match="names .*k_proj|do not fit|another base"):
        convert(f"source={source}", f"base={tiny.model_dir(tmp_path / 'narrow', dim=16)}")
    with pytest.raises(UserError, match="is no adapter: leave out base="):
        convert(f"source={bases['plain']}", f"base={bases['plain']}")
    with pytest.raises(UserError, match="would be written over"):
        tiny.train(
            "prepare.weights", [f"source={source}", f"base={tmp_path}/m", f"out={tmp_path}/m"]
        )


# ---- an adapter is trained further


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """base/, adapter/ on it with layers of every kind, and data for each stage."""
    folder = tmp_path_factory.mktemp("started")
    tiny.model_dir(folder / "base", qkv_bias=True, o_bias=True)
    settings = dict(
        target_modules=ALL, rank_pattern={"o_proj": 2}, alpha_pattern={"k_proj": 3}, bias="all"
    )
    of_peft(folder / "base", folder / "adapter", **settings, modules_to_save=["norm"])
    of_peft(folder / "base", folder / "dora", target_modules=ALL, use_dora=True)
    of_peft(folder / "base", folder / "low", target_modules=["q_proj", "v_proj"])
    tiny.store(folder / "rows", folder / "base")
    tiny.preferences(folder / "groups", folder / "base")
    (folder / "rewards.py").write_text("def a(p, r, f):\n    return len(r) % 5 + 0.1 * ('a' in r)\n")
    return folder


def go_on(started, stage, out, *more, adapter="adapter"):
    settings = f"model={started}/{adapter} out={out} lora_rank=4 device=cpu dtype=float32 steps=2 "
    settings += "batch_size=8 log_every=1 lr=1e-2 " + dict(
        sft=f"data={started}/rows max_length=64",
        dpo=f"data={started}/groups max_length=64 sample_tokens=0",
        reward=f"data={started}/groups max_length=64 norm_tokens=4 norm_samples=8",
        ppo=f"data={started}/rows reward={started}/rewards.py:a max_new_tokens=6 micro_batch=4",
    )[stage]
    tiny.train(stage, tiny.override(settings.split(), more))
    return out / "last"


# DoRA in two stages by default, and in all with NANO_SLOW=1
GOING_ON = [(stage, "adapter") for stage in ("sft", "dpo", "reward", "ppo")]
GOING_ON += [(stage, "dora") for stage in ("sft", "ppo", *("dpo", "reward") * SLOW)]


@pytest.mark.parametrize("stage, adapter", GOING_ON)
def test_a_stage_goes_on_with_an_adapter(stage, adapter, started, tmp_path):
    last = go_on(started, stage, tmp_path / "out", adapter=adapter)
    before, after = (tiny.tensors(dir, "adapter_model") for dir in (started / adapter, last))
    assert after.keys() - before.keys() == ({PREFIX + "score.weight"} if stage == "reward" else set())
    moved = {key for key in before if not torch.equal(before[key].float(), after[key])}
    low = {key for key in before if ".lora_" in key}  # the rest of it stays as it was
    assert moved <= low and len(moved) > 0.8 * len(low)
    config = weights.read_adapter_config(last)
    assert config["base_model_name_or_path"] == str(started / "base")
    opened = weights.open(last)
    if stage != "reward":
        assert (in_peft(started / "base", last) - logits(opened.model)).abs().max() <= 1e-5
    # a step of size 0 leaves the function as it was
    last = go_on(started, stage, tmp_path / "still", "lr=0", "steps=1", adapter=adapter)
    head = dict(head="score") if stage == "reward" else {}
    models = [weights.open(dir, **head).model for dir in (started / adapter, last)]
    with torch.no_grad():
        hidden = [model.hidden(TOKENS) for model in models]
    assert (hidden[0] - hidden[1]).abs().max() <= 1e-5


def test_a_stopped_run_goes_on_with_the_adapter(started, tmp_path, monkeypatch):
    whole = go_on(started, "dpo", tmp_path / "whole", "steps=4")
    with monkeypatch.context() as patch:
        tiny.stop_before(patch, 2)
        go_on(started, "dpo", tmp_path / "parts", "steps=4")
    parts = go_on(started, "dpo", tmp_path / "parts", "steps=4")
    assert tiny.same_tensors(whole, parts, "adapter_model")


def test_the_reference_is_the_adapter_as_it_was(started, tmp_path):
    go_on(started, "dpo", tmp_path / "dpo", "steps=3")
    first, *_, last = tiny.records(tmp_path / "dpo", "eval")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["margin"]) < 1e-5
    assert abs(last["margin"]) > 1e-4
    argv = f"model={started}/adapter lora_rank=4 reward={started}/rewards.py:a".split()
    cfg = config.load(ppo.Config, [*argv, f"data={started}/rows"])
    policy, reference, scorer, critic = ppo.build(cfg, tokenizer.load(started / "adapter"))
    assert scorer is None and critic.model is policy.model is reference.model
    right = logits(weights.open(started / "adapter").model)
    trained = {n for n, p in policy.model.named_parameters() if p.requires_grad}
    assert all(n.endswith((".policy", ".value", "value_head.weight")) for n in trained)
    for role in (policy, reference, critic):  # the critic starts from the policy
        lora.use(role.model, role.adapter)
        assert torch.equal(logits(role.model), right)
    with torch.no_grad():
        for p in tiny.adapter_parameters(policy.model, "policy"):
            p.add_(1.0)
    lora.use(policy.model, reference.adapter)
    assert torch.equal(logits(policy.model), right)


def test_a_score_adapter_joins_the_trunk_of_a_policy_that_goes_on(started, tmp_path):
    """If both change no weights of the base. Otherwise the reward model is a model of its own."""
    reward = go_on(started, "reward", tmp_path / "low", adapter="low")
    other = go_on(started, "reward", tmp_path / "other")
    for model, scorer, joins in (("low", reward, True), ("low", other, False), ("adapter", reward, False)):
        argv = f"model={started}/{model} reward={scorer} lora_rank=4 data={started}/rows".split()
        cfg = config.load(ppo.Config, argv)
        policy, _, scorer_role, _ = ppo.build(cfg, tokenizer.load(started / "low"))
        assert (scorer_role.model is policy.model) == joins
        lora.use(scorer_role.model, scorer_role.adapter)
        own = weights.open(scorer).model
        with torch.no_grad():
            expected = own.score(own.hidden(TOKENS))
            scores = scorer_role.head(scorer_role.model.hidden(TOKENS))
        assert (scores - expected).abs().max() <= 1e-5
        lora.use(policy.model, "policy")
        right = logits(weights.open(started / model).model)
        assert (logits(policy.model) - right).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "more, said",
    [
        (["lora_rank=8"], "has rank 4"),
        (["lora_alpha=64"], "lora_alpha= cannot change"),
        (["lora_targets=q_proj"], "lora_targets= cannot change"),
        (["lora_rslora=true"], "lora_rslora= cannot change"),
        (["base=gone"], "its base 'gone' is no model directory"),
    ],
)
def test_keys_that_contradict_the_adapter(more, said, started, tmp_path):
    with pytest.raises(UserError, match=said):
        go_on(started, "sft", tmp_path / "out", *more)


def test_base_is_a_key_of_the_stages(started, tmp_path):
    lost = shutil.copytree(started / "low", tmp_path / "lost")
    change(lost, base_model_name_or_path="gone/away")
    for more in ([], ["lora_rank=0"]):
        go_on(started, "sft", tmp_path / "out", f"model={lost}", f"base={started}/base", *more)
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match="no model directory here: name it with base="):
        go_on(started, "sft", tmp_path / "out", f"model={lost}")
    with pytest.raises(UserError, match="is a whole model, not an adapter: leave out base="):
        go_on(started, "sft", tmp_path / "out", f"model={started}/base", f"base={started}/base")


@pytest.mark.parametrize("adapter", ["adapter", "dora"])
def test_decoding_under_an_adapter_is_that_of_the_merged_model(adapter, started):
    opened = weights.open(started / adapter).model
    merged = weights.open(started / adapter, merge=True).model
    samples = [
        generate.generate(m, [[97, 98], [99]], 20, temperature=0.0, plan=dict(pack=pack)).tokens
        for m in (opened, merged)
        for pack in (False, True)
    ]
    assert samples[0] == samples[1] == samples[2] == samples[3]
