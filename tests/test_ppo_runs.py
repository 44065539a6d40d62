import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, few

import lora
import ppo
from nano import config, functions, generate, runtime, store, tokenizer, weights
from nano.batches import Rows, episodes
from nano.config import UserError
from nano.run import Run
from nano.store import Writer, mix, write_store

BASE = dict(
    device="cpu",
    dtype="float32",
    steps=2,
    batch_size=8,
    micro_batch=4,
    max_new_tokens=6,
    lr=1e-3,
    value_lr=1e-3,
    schedule="constant",
    sample_every=-1,
)
TIMES = (
    "time",
    "tokens_per_s",
    "memory_gb",
    "rollout_s",
    "score_s",
    "logprobs_s",
    "values_s",
    "update_s",
)
REWARDS = """
def last(prompt, response, finished):
    return sum(c in "stuvwxyz" for c in response) / max(len(response), 1)

def letters(prompt, response, finished):
    return float(sum(c in prompt for c in response)) + 0.1 * len(response) - 0.5 * finished

def zero(prompt, response, finished):
    return 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base, store; score: a score model of its own; adapter: one on the base; rewards.py"""
    path = tmp_path_factory.mktemp("ppo")
    tiny.model_dir(path / "base")
    tiny.store(path / "store", path / "base")
    model = weights.open(path / "base", head="score").model
    scale = dict(reward_gain=2.0, reward_bias=-0.5)
    weights.save_model(model, path / "score", like=path / "base", **scale)
    lora.apply(model, 2, 4)
    for p in tiny.adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    weights.save_adapter(model, path / "adapter", base=path / "base")
    tiny.write(path / "adapter", "score_scale.json", scale)
    (path / "rewards.py").write_text(REWARDS)
    return path


@pytest.fixture(autouse=True)
def handlers():
    """A run takes over the signals of its process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def arguments(folder, out, settings):
    settings = (
        BASE
        | dict(model=folder / "base", data=folder / "store", reward="letters", out=out)
        | settings
    )
    if settings.get("algo", "ppo") != "ppo" or settings.get("advantage", "gae") != "gae":
        settings.pop("value_lr")  # there is no critic
    if settings["reward"] in ("last", "letters", "zero"):
        settings["reward"] = f"{folder / 'rewards.py'}:{settings['reward']}"
    text = {
        k: str(v).lower() if isinstance(v, bool) else ",".join(v) if isinstance(v, list) else v
        for k, v in settings.items()
    }
    return [f"{key}={value}" for key, value in text.items()]


def train(folder, out, **settings):
    """Runs ppo.py in this process; the records of its log."""
    ppo.main(config.load(ppo.Config, arguments(folder, out, settings)))
    return records(out)


def records(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def tensors(dir, name="model"):
    return {key: tensor.clone() for key, tensor in weights.read_tensors(dir, name=name).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[key].float() - b[key].float()).abs().max().item() for key in a)


def stop_at(monkeypatch, call):
    """The run is asked to stop at its call-th look: two an iteration, before it and after its
    rollout."""
    calls = iter(range(10**6))
    monkeypatch.setattr(runtime.Runtime, "should_stop", lambda self: next(calls) == call)


def spy(monkeypatch, module, name):
    """Arguments and results of every call of a function from now on."""
    calls, function = [], getattr(module, name)

    def called(*args, **kwargs):
        calls.append((args, kwargs, function(*args, **kwargs)))
        return calls[-1][2]

    monkeypatch.setattr(module, name, called)
    return calls


LAYOUTS = {
    "full": dict(reward="score"),
    "lora": dict(reward="adapter", lora_rank=2, lr=1e-2, value_lr=1e-2),
    "grpo": dict(algo="grpo", group=4),
    "rloo": dict(algo="rloo", group=2, lora_rank=2),
    "samples": dict(algo="grpo", group=2, loss_mean="samples", advantage="group", clip_high=0.3),
    "apart": dict(
        reward="score", lora_rank=2
    ),  # adapters for policy and critic, a reward model of its own
}


def settings_of(folder, layout):
    settings = dict(LAYOUTS[layout])
    if settings.get("reward") in ("score", "adapter"):
        settings["reward"] = folder / settings["reward"]
    return settings


# ---- what a run begins with


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_the_first_update_policy_is_reference(folder, tmp_path, layout, dtype):
    """KL 0 and ratio 1, exactly: the same numbers through the same kernels."""
    (record,) = train(folder, tmp_path, **settings_of(folder, layout), dtype=dtype, steps=1)
    assert record["kl"] == record["kl_k3"] == record["first_ratio_off"] == 0
    assert 0 < record["logprob_gap"] < (0.2 if dtype == "bfloat16" else 1e-5)
    assert record["updates"] == 4 and record["approx_kl"] > 0 and record["policy_grad_norm"] > 0
    assert (
        ("value_loss" in record)
        == ("explained_variance" in record)
        == ("equal_groups" not in record)
        == (layout in ("full", "lora", "apart"))
    )


def test_a_merged_adapter_starts_at_its_reference_too(folder, tmp_path):
    """Policy in fp32 and reference in bf16 are both rounded once, from the same sum of base and
    adapter."""
    model = weights.open(folder / "base").model
    lora.apply(model, 2, 4)
    for p in tiny.adapter_parameters(model):
        torch.nn.init.normal_(p, std=0.3)
    weights.save_adapter(model, tmp_path / "adapter", base=folder / "base")
    train(folder, tmp_path / "out", model=tmp_path / "adapter", dtype="bfloat16", steps=1)


@pytest.mark.parametrize("layout", ["full", "lora"])
def test_roles(folder, tmp_path, monkeypatch, layout):
    """The critic starts as the reward model, in its units; only policy and critic are trained, all
    else stays to the bit."""
    built = spy(monkeypatch, ppo, "build")
    train(folder, tmp_path, **settings_of(folder, layout), steps=0)
    policy, reference, scorer, critic = built[0][2]
    batch = episodes([([5, 6, 8, 9, 258], [0, 0, 1, 1, 1]), ([7, 10, 258], [0, 1, 1])])
    with torch.no_grad():
        right = weights.open(folder / ("score" if layout == "full" else "adapter")).model
        for i, row in enumerate([[5, 6, 8, 9, 258], [7, 10, 258]]):
            scores = 2 * right.score(right.hidden(torch.tensor([row])))[0] - 0.5
            torch.testing.assert_close(scorer.scores(batch)[i], scores[-1])
            n, actions = ((2, slice(0, 3)), (1, slice(3, 5)))[i]
            torch.testing.assert_close(critic.values(batch)[actions], scores[n - 1 : -1])
        assert torch.equal(policy.logprobs(batch, 1.0)[0], reference.logprobs(batch, 1.0)[0])

    built.clear()
    train(folder, tmp_path / "trained", **settings_of(folder, layout))
    start = built[0][2]  # trained by now
    policy, reference, scorer, critic = start
    names = {name for role in (policy, critic) for name in role.params}
    if layout == "full":
        base, score = tensors(folder / "base"), tensors(folder / "score")
        assert same(base, dict(reference.model.named_parameters())) and same(
            score, dict(scorer.model.named_parameters())
        )
        for role, before in ((policy, base), (critic, score)):
            assert role.params.keys() == before.keys() and not any(
                torch.equal(p, before[n]) for n, p in role.params.items()
            )
    else:
        assert len({id(role.model) for role in start}) == 1
        everything, read = (
            dict(policy.model.named_parameters()),
            tensors(folder / "adapter", "adapter_model"),
        )
        base = tensors(folder / "base")
        trunk = {name.replace(".base.", "."): p for name, p in everything.items()}
        assert same(base, {name: trunk[name] for name in base})
        for name, p in everything.items():
            original = read.get(
                weights.PREFIX + name.removesuffix(".reward").removesuffix(".value") + ".weight"
            )
            if name.endswith(".reward") or name.endswith(".value"):
                assert torch.equal(p, original) == name.endswith(".reward")
        score = read[weights.PREFIX + "score.weight"]
        assert torch.equal(everything["reward_head.weight"], score) and not torch.equal(
            everything["value_head.weight"], score
        )
        assert names == {n for n in everything if n.endswith((".policy", ".value"))} | {
            "value_head.weight"
        }
        assert all(p.abs().max() > 0 for n, p in policy.params.items())


@pytest.mark.parametrize("train_what, freeze", [("all", 1), ("attention", 0), ("qv", 1)])
def test_what_is_frozen_stays(folder, tmp_path, monkeypatch, train_what, freeze):
    built = spy(monkeypatch, ppo, "build")
    train(folder, tmp_path, train=train_what, freeze_layers=freeze)
    policy, _, _, critic = built[0][2]
    before = tensors(folder / "base")
    moved = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    parts = dict(
        all=("layers.1", "norm", "lm_head"), attention=("self_attn",), qv=("q_proj", "v_proj")
    )[train_what]
    free = {
        n for n in before if any(part in n for part in parts) and not (freeze and "layers.0" in n)
    }
    assert moved == policy.params.keys() == free
    assert (
        "score.weight" in critic.params and critic.model.score.weight.abs().max() > 0
    )  # its head in full, from zero


def test_the_saved_model_is_the_policy(folder, tmp_path, monkeypatch):
    """A model directory, or an adapter on the base that `peft` and transformers open."""
    built = spy(monkeypatch, ppo, "build")
    for layout in ("full", "lora"):
        train(folder, tmp_path / layout, **settings_of(folder, layout))
        policy = built[-1][2][0]
        lora.use(policy.model, policy.adapter)
        opened = weights.open(tmp_path / layout / "last")
        model, base = opened.model, opened.base
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(
                model.logits(model.hidden(ids)), policy.model.logits(policy.model.hidden(ids))
            )
        assert tokenizer.load(base).fingerprint == tokenizer.load(folder / "base").fingerprint


# ---- learning


@pytest.fixture(scope="module")
def sharp(folder):
    """A base whose frozen head can still say one thing with certainty, if an adapter asks it to."""
    model = tiny.model()
    model.lm_head.weight.data *= 4
    weights.save_model(model, folder / "sharp", like=folder / "base")
    return folder / "sharp"


FEW = "q_proj,v_proj,down_proj"
HOWS = [
    dict(algo="ppo"),
    dict(algo="grpo", group=8),
    dict(algo="rloo", group=8, lora_rank=8, lora_targets=FEW),
]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how["algo"])
def test_rewarded_tokens_are_learned(folder, sharp, tmp_path, how):
    """The share of the last eight letters in a response, from 1 in 33 to nearly all."""
    log = train(
        folder,
        tmp_path,
        model=sharp,
        reward="last",
        steps=12,
        batch_size=64,
        micro_batch=64,
        rollout_batch=64,
        ppo_epochs=2,
        max_new_tokens=3,
        lr=2e-2,
        value_lr=1e-2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        **how,
    )
    rewards = [r["reward"] for r in log]
    assert rewards[0] < 0.1 and max(rewards) > 0.9, rewards


def test_lr_0_leaves_the_policy_to_the_bit(folder, tmp_path):
    log = train(folder, tmp_path, reward=folder / "score", lr=0, value_lr=0, weight_decay=0.1)
    assert same(tensors(tmp_path / "last"), tensors(folder / "base"))
    assert [r["kl"] for r in log] == [0, 0] and log[0]["policy_grad_norm"] > 0


def test_value_warmup_leaves_the_policy(folder, tmp_path):
    log = train(
        folder, tmp_path / "warm", steps=2, value_warmup=2, kl_control="adaptive", kl_coef=0.1
    )
    assert same(tensors(tmp_path / "warm" / "last"), tensors(folder / "base"))
    assert (
        "policy_loss" not in log[0]
        and log[1]["kl_coef"] == 0.1
        and log[1]["value_loss"] != log[0]["value_loss"]
    )
    log = train(folder, tmp_path / "then", steps=3, value_warmup=2)
    assert "policy_loss" in log[2] and not same(
        tensors(tmp_path / "then" / "last"), tensors(folder / "base")
    )


def rl_gradients(cfg, role, batch):
    role.model.zero_grad()
    rt = runtime.Runtime("cpu", "none", "float32")
    ppo.rl_gradient(cfg, rt, role, None, [batch], float(len(batch["index"])))
    return {n: p.grad.clone() for n, p in role.model.named_parameters()}


@pytest.fixture
def episode(folder):
    """(policy, a batch of two episodes with five actions as the update sees it)"""
    model = weights.load_model(folder / "base")
    policy = ppo.Role(model, net=model)
    batch = episodes([([5, 6, 8, 9, 258], [0, 0, 1, 1, 1]), ([7, 10, 11], [0, 1, 1])])
    with torch.no_grad():
        old_logprobs, _ = policy.logprobs(batch, 1.0)
    batch |= dict(loss_weights=torch.full((5,), 0.2))
    return policy, batch | dict(old_logprobs=old_logprobs, advantages=torch.zeros(5))


def test_the_entropy_bonus_raises_the_entropy(episode):
    policy, batch = episode
    for coef in (0.5, -0.5):
        gradients = rl_gradients(ppo.Config(entropy_coef=coef), policy, batch)
        with torch.no_grad():
            before = policy.logprobs(batch, 1.0)[1].sum()
            params = dict(policy.model.named_parameters())
            for name, p in params.items():
                p -= 0.1 * gradients[name]
            after = policy.logprobs(batch, 1.0)[1].sum()
            for name, p in params.items():
                p += 0.1 * gradients[name]
        assert (after - before) * coef > 0.01
    assert not any(g.any() for g in rl_gradients(ppo.Config(), policy, batch).values())


def test_ptx_adds_its_gradient(folder, episode):
    """ptx_coef times that of the mean next-token loss on other text, to whatever is there."""
    policy, batch = episode
    batch["advantages"] = torch.randn(5, generator=torch.Generator().manual_seed(0))
    cfg, rt = ppo.Config(ptx_coef=3.0), runtime.Runtime("cpu", "none", "float32")
    rows = mix([str(folder / "store")])
    batches = Rows(rows, 8, 2, 64)
    alone = rl_gradients(cfg, policy, batch)
    loss = ppo.ptx_gradient(cfg, rt, policy, batches, update=1)
    both = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    total = count = 0
    for pack in batches.plan(1):
        for i in pack:
            tokens, mask = (
                torch.from_numpy(np.array(x, dtype=np.int64)) for x in rows.row(batches.index[i])
            )
            logprobs = policy.model.logits(policy.model.hidden(tokens[None]))[0, :-1].log_softmax(
                -1
            )
            total = total - (logprobs[range(len(tokens) - 1), tokens[1:]] * mask[1:]).sum()
            count += mask[1:].sum()
    (3.0 * total / count).backward()
    torch.testing.assert_close(loss, (total / count).detach())
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(both[name], alone[name] + p.grad, rtol=1e-4, atol=1e-6)


def test_a_run_with_ptx(folder, tmp_path):
    settings = dict(
        ptx_data=folder / "store", ptx_coef=5.0, ptx_batch=2, lr=3e-3, steps=4, reward="zero"
    )
    first, *_, last = train(folder, tmp_path / "ptx", **settings)
    assert last["ptx_loss"] < first["ptx_loss"] - 0.1
    assert (
        "ptx_loss" in train(folder, tmp_path / "lora", **settings | dict(steps=1), lora_rank=2)[0]
    )


# ---- the KL, groups


@pytest.mark.parametrize("how", [dict(), dict(lora_rank=2), dict(algo="grpo", group=2)], ids=str)
def test_no_reference_without_a_use_for_it(folder, tmp_path, monkeypatch, how):
    """With kl_coef=0 there is no reference forward and no KL in the log, unless log_kl asks for
    it."""
    built = spy(monkeypatch, ppo, "build")
    off = [dict(kl_coef=0.0), dict(kl_in="none")]
    logs = []
    for i, settings in enumerate([*off, *(x | dict(log_kl=True) for x in off)]):
        logs.append(train(folder, tmp_path / str(i), **how | settings))
        reference = built[-1][2][1]
        assert (reference is not None) == ("kl" in logs[-1][0]) == ("kl_coef" in logs[-1][0])
        assert (reference is not None) == ("log_kl" in settings)
    shown = ("kl", "kl_k3", "kl_coef")
    for log in logs:  # and none of it has a part in the training
        assert [{k: v for k, v in r.items() if k not in shown} for r in log] == logs[0]
    assert logs[2][0]["kl"] == 0 and logs[2][1]["kl_k3"] > 0


@pytest.mark.parametrize("kl_in", ["loss", "reward", "none"])
def test_where_the_kl_goes(folder, tmp_path, monkeypatch, kl_in):
    """In the second iteration, when there is one: into the loss with the reference's log-
    probabilities and kl_coef, or into the advantages beside the normalised scores."""
    calls = spy(monkeypatch, ppo, "rl_gradient")
    judged = spy(monkeypatch, functions, "judge")
    settings = dict(advantage="group_std", group=4, kl_in=kl_in, lr=1e-2, ppo_epochs=1, log_kl=True)
    log = train(folder, tmp_path, **settings, kl_coef=0.5 if kl_in != "none" else 0.05)
    (*_, micro_batches, count, kl_coef), _, stats = calls[1]
    base, kl = ppo.Role(weights.load_model(folder / "base")), []
    for batch in micro_batches:
        with torch.no_grad():
            ref_logprobs, _ = base.logprobs(batch, 1.0)
        assert ("ref_logprobs" in batch) == (kl_in == "loss")
        if kl_in == "loss":
            torch.testing.assert_close(batch["ref_logprobs"], ref_logprobs)
        log_ratio = batch["old_logprobs"] - ref_logprobs
        kl.append(torch.zeros(4).index_add(0, batch["rows"], log_ratio))
    kl = torch.cat(kl)
    assert kl.abs().min() > 1e-3 and math.isclose(kl.mean(), log[1]["kl"], rel_tol=1e-3)
    (_, _, _, _, finished, *_), _, scores = judged[1]
    rewards = scores - (1 - finished)
    price = 0.5 if kl_in == "reward" else 0.0
    right = ppo.penalised_advantages(rewards, kl, 4, "group_std", price)
    rows = torch.cat([batch["rows"] + 4 * i for i, batch in enumerate(micro_batches)])
    advantages = torch.cat([batch["advantages"] for batch in micro_batches])
    torch.testing.assert_close(advantages, right[rows], rtol=1e-3, atol=1e-5)
    assert ("kl_loss" in log[1]) == ("kl_loss" in stats) == (kl_in == "loss")
    if kl_in == "loss":  # at the old policy
        assert kl_coef == 0.5
        assert math.isclose(log[1]["kl_loss"], log[1]["kl_k3"] * 8 / count, rel_tol=1e-4)


SOME = """
def some(prompt, response, finished):
    return None if sum(map(ord, response)) % 3 == 0 else len(response) / 8

def nothing(prompt, response, finished):
    return None

def key(prompt, response, finished, record):
    return float(record["answer"]) if "<" in response else 0.0
"""


@pytest.mark.parametrize("how", ["group_std", "gae"])
def test_an_episode_without_a_score_has_no_part_in_the_update(folder, tmp_path, monkeypatch, how):
    (tmp_path / "some.py").write_text(SOME)
    calls, judged = spy(monkeypatch, ppo, "rl_gradient"), spy(monkeypatch, functions, "judge")
    settings = dict(reward=f"{tmp_path}/some.py:some", advantage=how, group=4, batch_size=16)
    log = train(folder, tmp_path / "out", **settings, kl_in="reward" if how == "gae" else "loss")
    for r, (_, _, scores), (args, _, _) in zip(log, judged, calls[:1] + calls[4:5], strict=True):
        known = ~scores.isnan()
        assert 0 < known.sum() < 16 and math.isclose(r["unscored"], 1 - known.double().mean())
        assert math.isclose(r["reward"], scores[known].mean(), rel_tol=1e-6)
        (*_, micro_batches, count, kl_coef) = args
        at = torch.cat([batch["rows"] + 4 * i for i, batch in enumerate(micro_batches)])
        weights = torch.cat([batch["weights"] for batch in micro_batches])
        assert torch.equal(weights > 0, known[at]) and count == weights.sum()
        loss_weights = torch.cat([batch["loss_weights"] for batch in micro_batches])
        torch.testing.assert_close(loss_weights, weights / count)
        assert all(math.isfinite(v) for v in r.values() if isinstance(v, float))
    with pytest.raises(UserError, match="gives None for all 16 responses of step 1"):
        train(folder, tmp_path / "none", **settings | dict(reward=f"{tmp_path}/some.py:nothing"))


def test_several_rewards_and_the_record(folder, tmp_path, monkeypatch):
    """Each is logged, their weighted sum is the reward, a score model may be among them."""
    (tmp_path / "some.py").write_text(SOME)
    tok = tokenizer.load(folder / "base")
    meta = dict(vocab_size=264, tokenizer=tok.fingerprint)
    with Writer(tmp_path / "store", 264, meta) as w:
        for i in range(8):
            line = json.dumps(dict(answer=i)).encode() + b"\n"
            w.extend("train", [97 + i, 98, 258], [0, 0, 0], [3], [line])
    judged = spy(monkeypatch, functions, "judge")
    functions_ = [f"{tmp_path}/some.py:key", f"{folder / 'rewards.py'}:letters"]
    settings = dict(data=tmp_path / "store", reward=[*functions_, str(folder / "score")], steps=1)
    log = train(folder, tmp_path / "out", **settings, reward_weights=["1", "0.5", "2"])
    [r] = log[:1]
    expected = r["reward_key"] + 0.5 * r["reward_letters"] + 2 * r["reward_model"]
    assert math.isclose(r["reward"], expected, rel_tol=1e-5)
    (_, _, prompts, _, _, records, _), _, _ = judged[0]
    assert [record["answer"] for record in records] == [prompt[0] - 97 for prompt in prompts]
    bad = {
        "takes the record of a prompt": dict(reward=functions_[0]),
        "has 1 numbers for 2 rewards": dict(reward=functions_[1:] * 2, reward_weights=["1"]),
        "give one score model": dict(reward=[str(folder / "score"), str(folder / "adapter")]),
    }
    for says, change in bad.items():
        with pytest.raises(UserError, match=says):
            train(folder, tmp_path / "bad", **change)


def test_equal_scores_teach_nothing(folder, tmp_path):
    """All groups are without variance, which the log says, and the policy stays to the bit."""
    settings = dict(reward="zero", missing_eos_penalty=0, group=4)
    for how in ("group", "group_std", "rloo"):
        log = train(folder, tmp_path / how, **settings, advantage=how)
        assert [r["equal_groups"] for r in log] == [1, 1]
        assert same(tensors(tmp_path / how / "last"), tensors(folder / "base"))
    log = train(folder, tmp_path / "letters", group=4, algo="grpo", max_new_tokens=2)
    assert 0 <= log[0]["equal_groups"] < 1


def test_the_share_of_equal_groups(folder, tmp_path, monkeypatch):
    """Of rewards, which is after penalties: two of four groups have equal ones."""
    function = generate.generate

    def ended(*args, **kwargs):
        samples = function(*args, **kwargs)
        samples.finished = [True, True, True, False, False, False, True, False]
        return samples

    monkeypatch.setattr(generate, "generate", ended)
    log = train(folder, tmp_path, reward="zero", group=2, advantage="group")
    assert [r["equal_groups"] for r in log] == [0.5, 0.5]


def test_the_gap_between_decoder_and_training_forward(folder, tmp_path, monkeypatch):
    """The mean over all actions of the distance of the two log-probabilities, and nothing else."""
    function = generate.generate

    def shifted(*args, **kwargs):
        samples = function(*args, **kwargs)
        samples.logprobs = [
            [x + 0.25 - 0.5 * (i % 2) for i, x in enumerate(row)] for row in samples.logprobs
        ]
        return samples

    right = train(folder, tmp_path / "right")
    assert all(0 < r.pop("logprob_gap") < 1e-5 for r in right)
    monkeypatch.setattr(generate, "generate", shifted)
    ends = dict(truncate_at=["a", "b", "c", "d"], truncate_penalty=1.0, max_new_tokens=24)
    wrong = train(folder, tmp_path / "wrong", **ends, batch_size=32)
    assert all(math.isclose(r["logprob_gap"], 0.25, rel_tol=1e-4) for r in wrong)
    assert all(r["length"] < 24 for r in wrong)
    wrong = train(folder, tmp_path / "same")
    assert all(math.isclose(r.pop("logprob_gap"), 0.25, rel_tol=1e-4) for r in wrong)
    assert wrong == right


# ---- rewards of a run


def test_what_is_scored(folder, tmp_path, monkeypatch):
    """Of each episode: the reward function's number, clipped, less one penalty for a bad end, which
    only the response decides: the prompts here hold stop ids too."""
    tok = tokenizer.load(folder / "base")
    rows = [([97 + i, 258, 98, 256, 99, 258], [0, 0, 0, 0, 1, 1]) for i in range(8)]
    write_store(
        tmp_path / "store", dict(train=rows), dict(vocab_size=264, tokenizer=tok.fingerprint)
    )
    made, shaped = spy(monkeypatch, generate, "generate"), spy(monkeypatch, ppo, "shape_rewards")
    seen = spy(monkeypatch, functions, "judge")
    log = train(
        folder,
        tmp_path / "out",
        data=tmp_path / "store",
        steps=1,
        batch_size=128,
        micro_batch=64,
        rollout_batch=64,
        ppo_epochs=1,
        max_new_tokens=24,
        missing_eos_penalty=0.25,
        truncate_at=["a", "b"],
        truncate_penalty=3.0,
        score_clip=1.5,
        gold=f"{folder / 'rewards.py'}:last",
    )
    samples, ((scores, logprobs, ref, mask, coef), _, rewards) = made[0][2], shaped[0]
    (_, _, prompts, answers, *_), _, judged = seen[0]
    assert all(258 in prompt for prompt in prompts) and judged.max() > 1.5
    ends = {"stop": 0, "cut": 0, "long": 0}
    for i, (tokens, answer) in enumerate(zip(samples.tokens, answers, strict=True)):
        n = next((n for n, t in enumerate(tokens, 1) if t in (97, 98)), None)
        end = "cut" if n else "stop" if tokens[-1] in tok.stop_ids else "long"
        ends[end] += 1
        assert answer == tokens[:n] and int(mask[i].sum()) == len(answer)
        assert math.isclose(
            scores[i], min(judged[i], 1.5) - dict(stop=0, cut=3.0, long=0.25)[end], abs_tol=1e-6
        )
        last = len(answer) - 1
        assert math.isclose(
            rewards[i, last], scores[i] - coef * (logprobs[i, last] - ref[i, last]), abs_tol=1e-6
        )
    assert min(ends.values()) > 5, ends
    assert math.isclose(log[0]["eos_rate"], ends["stop"] / 128) and log[0]["gold"] >= 0
    assert math.isclose(log[0]["reward"], judged.mean(), rel_tol=1e-5)
    assert math.isclose(log[0]["length"], np.mean([len(a) for a in answers]), rel_tol=1e-6)


def test_the_first_losses_by_hand(folder, tmp_path, monkeypatch):
    """What reaches the update: log-probabilities at the temperature, the critic's values, GAE
    whitened over all episodes."""
    shaped, found = spy(monkeypatch, ppo, "shape_rewards"), spy(monkeypatch, ppo, "rl_gradient")
    made = spy(monkeypatch, generate, "generate")
    train(
        folder,
        tmp_path,
        reward=folder / "score",
        steps=1,
        temperature=0.7,
        minibatches=2,
        micro_batch=2,
        lam=0.5,
        gamma=0.9,
        kl_coef=0.3,
    )
    (_, prompts, *_), kwargs, samples = made[0]
    assert kwargs["sample_ids"] == list(range(8))
    first_pass = [args for args, _, _ in found[:2]]
    seen = [batch for args in first_pass for batch in args[4]]
    n_actions = sum(map(len, samples.tokens))
    assert len(seen) == 4 and sum(args[5] for args in first_pass) == n_actions
    model, critic = weights.load_model(folder / "base"), weights.load_model(folder / "score")
    values, logprobs = torch.zeros(8, 6), torch.zeros(8, 6)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(prompts, samples.tokens, strict=True)):
            ids, n, m = torch.tensor([prompt + response]), len(prompt), len(response)
            right = (model.logits(model.hidden(ids))[0, n - 1 : -1] / 0.7).log_softmax(-1)
            logprobs[i, :m] = right[range(m), response]
            torch.testing.assert_close(
                torch.tensor(samples.logprobs[i]), logprobs[i, :m], atol=1e-4, rtol=0
            )
            values[i, :m] = 2 * critic.score(critic.hidden(ids))[0, n - 1 : -1] - 0.5
    (_, rollout, ref, mask, coef), _, rewards = shaped[0]
    assert coef == 0.3 and torch.equal(rollout, ref)
    torch.testing.assert_close(rollout, logprobs)
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.5)
    right = dict(
        old_logprobs=logprobs,
        old_values=values,
        advantages=ppo.whiten(advantages, mask, runtime.Runtime("cpu", "none", "float32")),
        returns=returns,
    )
    # the minibatches come in any order; each micro-batch holds two episodes, one after the other
    parts = [slice(i, i + 2) for i in range(0, 8, 2)]
    actions = [[t for row in samples.tokens[part] for t in row] for part in parts]
    for batch in seen:
        part = parts[actions.index(batch["actions"].tolist())]
        for key, x in right.items():
            flat = x[part][mask[part]]
            torch.testing.assert_close(batch[key], flat, rtol=1e-4, atol=1e-5)


def test_target_kl_ends_the_passes(folder, tmp_path):
    log = train(
        folder, tmp_path, target_kl=1e-4, lr=1e-2, ppo_epochs=6, minibatches=2, micro_batch=2
    )
    assert log[0]["updates"] in (2, 4)
    assert (
        train(
            folder, tmp_path / "off", lr=1e-2, ppo_epochs=6, minibatches=2, micro_batch=2, steps=1
        )[0]["updates"]
        == 12
    )


# ---- how it is cut, stopped, parked


@pytest.mark.parametrize("layout", few(["full", "lora", "grpo", "samples"], "lora", "samples"))
def test_an_update_does_not_depend_on_the_micro_batch(folder, tmp_path, layout):
    runs = {}
    for micro_batch in (8, 2, 1):
        out = tmp_path / str(micro_batch)
        log = train(
            folder,
            out,
            **settings_of(folder, layout),
            micro_batch=micro_batch,
            rollout_batch=3 * micro_batch,
        )
        runs[micro_batch] = log, tensors(out / "state", "state")
    for log, saved in runs.values():
        assert [r["length"] for r in log] == [r["length"] for r in runs[8][0]]
        models = [
            {k: v for k, v in s.items() if k.startswith("model.")} for s in (saved, runs[8][1])
        ]
        assert distance(*models) < 1e-5


STOPS = [(layout, at) for layout in ("full", "lora", "grpo") for at in (4, 5)]


@pytest.mark.parametrize("layout, at", few(STOPS, ("full", 4), ("lora", 5), ("grpo", 5)))
def test_a_stopped_run_goes_on_bit_for_bit(folder, tmp_path, layout, at):
    """Weights, both optimizers, the controller, the prompts' and the other text's order, what was
    warned of."""
    settings = settings_of(folder, layout) | dict(
        steps=4,
        kl_control="adaptive",
        kl_target=0.1,
        kl_horizon=50,
        schedule="linear",
        minibatches=2,
        ptx_data=folder / "store",
        ptx_coef=0.1,
        ptx_batch=2,
        gold=f"{folder / 'rewards.py'}:last",
    )
    whole = train(folder, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, at)
        train(folder, tmp_path / "cut", **settings)
    assert tiny.state(tmp_path / "cut" / "state")[1]["meta"]["step"] == 2
    cut = train(folder, tmp_path / "cut", **settings)
    assert cut == whole and len(whole) == 4 and len({r["kl_coef"] for r in whole}) == 4
    a, b = (tiny.state(tmp_path / run / "state") for run in ("whole", "cut"))
    assert same(a[0], b[0]) and a[1] == b[1]
    assert any(key.startswith("value.") for key in a[0]) == (layout != "grpo")
    name = "adapter_model" if layout == "lora" else "model"
    assert same(
        tensors(tmp_path / "whole" / "last", name), tensors(tmp_path / "cut" / "last", name)
    )


def test_a_finished_run_says_so(folder, tmp_path, capsys):
    train(folder, tmp_path, steps=1)
    before = tensors(tmp_path / "last")
    for steps in (1, 0):
        assert (
            len(train(folder, tmp_path, steps=steps)) == 1
            and "is at step 1 already" in capsys.readouterr().out
        )
    assert same(before, tensors(tmp_path / "last"))


class Poisoned(ppo.Parking):
    """Parks where nothing can be computed: whoever is used without being fetched makes NaN."""

    kept, fetched = {}, []

    def __init__(self, on, device, things):
        super().__init__(True, "here", things)

    @classmethod
    def move(cls, things, device):
        for thing in things:
            states = [
                (s, k)
                for s in getattr(thing, "state", {}).values()
                for k in s
                if torch.is_tensor(s[k])
            ]
            for x in [*getattr(thing, "parameters", list)(), *(s[k] for s, k in states)]:
                if device == "cpu":
                    cls.kept[id(x)] = x.detach().clone()
                    x.data.fill_(math.nan)
                elif id(x) in cls.kept:
                    x.data.copy_(cls.kept.pop(id(x)))
        if device != "cpu":
            cls.fetched.append(len(things))


def test_parked_models_are_fetched_when_they_work(folder, tmp_path, monkeypatch):
    settings = dict(reward=folder / "score", batch_size=4, steps=3)
    whole = train(folder, tmp_path / "whole", **settings)
    monkeypatch.setattr(ppo, "Parking", Poisoned)
    assert train(folder, tmp_path / "parked", **settings) == whole
    assert set(Poisoned.fetched) == {
        1,
        4,
    }  # one model at a time; for the update policy, critic and their optimizers


def test_sigterm_in_a_rollout_saves_and_the_same_command_goes_on(folder, tmp_path):
    settings = dict(
        lora_rank=2,
        steps=400,
        max_new_tokens=60,
        batch_size=8,
        save_every=1000,
        kl_control="adaptive",
        lr=1e-2,
    )
    command = [sys.executable, "ppo.py", *arguments(folder, tmp_path / "cut", settings)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, deadline = tmp_path / "cut" / "log.jsonl", time.time() + 90
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    done = tiny.state(tmp_path / "cut" / "state")[1]["meta"]["step"]
    assert process.returncode == 143 and not err and 2 <= done < 400
    assert (
        "SIGTERM: finishing this step" in out
        and f"stopped at step {done}: the same command continues" in out
    )
    for run, steps in (("cut", 1), ("whole", done + 1)):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 2 * steps)
            train(folder, tmp_path / run, **settings)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    a, b = (tiny.state(tmp_path / run / "state") for run in ("whole", "cut"))
    assert same(a[0], b[0]) and a[1] == b[1]


def environment():
    return os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))


def test_two_processes_do_what_one_does(folder, tmp_path):
    """The same episodes whoever rolls them out, and the same gradients, when minibatches, groups
    and other text are cut over ranks and two nets share a trunk. (tests/test_parallel.py has the
    plain runs.)"""
    settings = dict(
        reward=folder / "adapter",
        lora_rank=2,
        lr=1e-2,
        batch_size=16,
        micro_batch=2,
        minibatches=2,
        ppo_epochs=2,
        group=2,
        whiten_rewards=True,
        target_kl=1.0,
        ptx_data=folder / "store",
        ptx_coef=0.5,
        ptx_batch=4,
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "ppo.py",
    ]
    command += arguments(folder, tmp_path / "two", settings)
    result = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=170
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for a, b in zip(
        train(folder, tmp_path / "one", **settings), records(tmp_path / "two"), strict=True
    ):
        assert a.keys() == b.keys()
        for key, x in a.items():
            assert x == b[key] or math.isclose(x, b[key], rel_tol=1e-3, abs_tol=1e-5), (
                key,
                x,
                b[key],
            )
    states = [tensors(tmp_path / run / "state", "state") for run in ("one", "two")]
    assert (
        distance(*({k: v for k, v in s.items() if k.startswith("model.")} for s in states)) < 1e-5
    )
    assert (
        distance(*(tensors(tmp_path / run / "last", "adapter_model") for run in ("one", "two")))
        < 1e-5
    )


def test_when_a_run_saves_and_shows_samples(folder, tmp_path, monkeypatch):
    """0: once in a pass over the 24 prompts; -1: never, but a run saves at its end. No step:
    nothing."""
    save = Run.save_model

    for every, shown, saved in ((0, [0, 3, 6], [3, 6, 7]), (-1, [], [7]), (4, [0, 4], [4, 7])):
        out, saves = tmp_path / str(every), []

        def save_model(run, dir, saves=saves):
            saves.append(run.step)
            save(run, dir)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "save_model", save_model)
            settings = dict(steps=7, ppo_epochs=1, sample_every=every, save_every=every)
            log = train(folder, out, **settings, log_every=0)
        assert [r["step"] for r in log if r["kind"] == "samples"] == shown
        assert [r["step"] for r in log if r["kind"] == "train"] == [7] and saves == saved
    assert train(folder, tmp_path / "none", steps=0) == []
    assert not (tmp_path / "none" / "last").exists() and not (tmp_path / "none" / "state").exists()


def test_warmup_and_betas_reach_the_optimizer(folder, tmp_path, monkeypatch):
    made = spy(monkeypatch, ppo.optim, "adamw")
    settings = dict(steps=4, lr=0.5, schedule="linear", warmup_steps=2, warmup_ratio=0.9)
    log = train(folder, tmp_path, **settings | dict(lr=4e-3), beta1=0.8, beta2=0.95, ppo_epochs=1)
    assert all(optimizer.defaults["betas"] == (0.8, 0.95) for _, _, optimizer in made) and made
    assert [round(r["lr"], 9) for r in log] == [round(x, 9) for x in (4e-3 / 3, 8e-3 / 3, 4e-3, 0)]


def test_rank_stabilised_adapters(folder, tmp_path):
    for rslora, scale in ((False, 8.0), (True, 16.0)):
        out = tmp_path / str(rslora)
        train(folder, out, steps=1, lora_rank=4, lora_rslora=rslora, ppo_epochs=1)
        config_json = json.loads((out / "last" / "adapter_config.json").read_text())
        r, alpha = config_json["r"], config_json["lora_alpha"]
        assert math.isclose(alpha / (r**0.5 if config_json.get("use_rslora") else r), scale)


# ---- what is shown, what is refused


def test_samples_and_warnings(folder, tmp_path, capsys):
    log = train(
        folder,
        tmp_path,
        steps=4,
        sample_every=2,
        samples=2,
        log_every=3,
        lr=0.1,
        kl_coef=0.0,
        entropy_coef=-1.0,
    )
    shown = {r["step"]: r["rows"] for r in log if r["kind"] == "samples"}
    assert list(shown) == [0, 2]
    for rows in shown.values():
        assert len(rows) == 2 and list(rows[0]) == ["prompt", "response", "reward"]
    assert [r["step"] for r in log if r["kind"] == "train"] == [3, 4]
    assert capsys.readouterr().out.count("the entropy has collapsed") == 1
    assert any(
        "entropy" in disease for disease in tiny.state(tmp_path / "state")[1]["meta"]["warned"]
    )


def other_tokenizer(folder, name, head="lm"):
    tiny.model_dir(folder / name, special=["<|end|>", "<|im_start|>", "<|im_end|>"], head=head)
    return folder / name


def test_mistakes_end_in_a_sentence(folder, tmp_path):
    meta = dict(vocab_size=264, tokenizer=tokenizer.load(folder / "base").fingerprint)
    write_store(tmp_path / "text", dict(train=[([5, 6, 7], None)]), meta)
    long = tiny.store(tmp_path / "long", folder / "base", low=600, high=700)
    wrong = {
        "no model directory": dict(reward=folder / "nothing"),
        "there is no file": dict(reward=f"{folder}/nothing.py:f"),
        "has no function": dict(reward=f"{folder}/rewards.py:f"),
        "reward=.*/base is a language model": dict(reward=folder / "base"),
        "reward=.* has another tokenizer": dict(
            reward=other_tokenizer(folder, "other-score", "score")
        ),
        "prepared with another tokenizer": dict(model=other_tokenizer(folder, "other")),
        "no prompt has between 1 and max_prompt=256": dict(data=tmp_path / "text"),
        "max_prompt=1 ": dict(max_prompt=1),
        "batch_size=10 must be a multiple": dict(batch_size=10),
        "advantage=group_std .* compares": dict(algo="grpo"),
        "is an adapter of a score model": dict(model=folder / "adapter", lora_rank=2),
        "is a score model": dict(model=folder / "score"),
        "leaves nothing to train": dict(freeze_layers=2, train="qv"),
        "resume=true": dict(resume="true"),
        "max_new_tokens=6 make .* takes 256": dict(max_prompt=1000, data=long),
    }
    for said, settings in wrong.items():
        with pytest.raises(UserError, match=said):
            train(folder, tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "last").exists()
    command = [sys.executable, "ppo.py", *arguments(folder, tmp_path / "out", dict(algo="rloo"))]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: group=1 with advantage=rloo")
        and result.stderr.count("\n") == 1
    )


# ---- the reward model reads what the policy writes


def test_a_reward_model_of_another_template_is_refused(folder, tmp_path):
    def data(template):
        tok = tokenizer.load(folder / "base", template)
        meta = dict(vocab_size=264, tokenizer=tok.fingerprint, template=template)
        meta["chat_template"] = tok.chat_template
        ask = [dict(role="user", content="a"), dict(role="assistant", content="b")]
        write_store(tmp_path / f"data-{template}", dict(train=[tok.render(ask)] * 8), meta)
        return tmp_path / f"data-{template}"

    def scorer(template, recorded=True, adapted=False):
        dir = tmp_path / f"{template}-{recorded}-{adapted}"
        tok = tokenizer.load(folder / "base", template)
        model = weights.open(folder / "base", head="score").model
        unwritten = template if template in ("plain", "columns") else None
        keys = dict(prompt_template=unwritten) if recorded else {}
        if adapted:
            lora.apply(model, 2, 4)
            weights.save_adapter(model, dir, base=folder / "base", tok=tok)
            tiny.write(dir, "score_scale.json", keys)
        else:
            weights.save_model(model, dir, like=folder / "base", tok=tok, **keys)
        return dir

    def check(template, reward):
        cfg = ppo.Config(reward=(str(reward),), data=(data(template),))
        ppo.check_scorer(cfg, tokenizer.load(folder / "base", store.chat_template(cfg.data)))

    for adapted in (False, True):
        for template in ("chatml", "alpaca", "zephyr", "plain", "columns"):
            check(template, scorer(template, adapted=adapted))
            other = "alpaca" if template != "alpaca" else "chatml"
            with pytest.raises(UserError, match="in the chat template"):
                check(other, scorer(template, adapted=adapted))
    with pytest.raises(UserError, match="in the chat template"):
        check("plain", scorer("alpaca"))
    # an older reward model does not say that it was trained in `plain`
    check("plain", scorer("plain", recorded=False))


def test_rows_beyond_the_positions_of_the_reward_model_are_refused_at_the_start(folder, tmp_path):
    tiny.model_dir(tmp_path / "short", head="score", max_positions=32)
    long = tiny.store(tmp_path / "long", folder / "base", low=80, high=90)
    for settings in (dict(), dict(advantage="group", group=2), dict(lora_rank=2)):
        with pytest.raises(UserError, match="max_new_tokens=6 make .* takes 32"):
            train(folder, tmp_path / "out", data=long, reward=tmp_path / "short", **settings)
    tiny.model_dir(tmp_path / "policy", max_positions=64)
    rows = tiny.store(tmp_path / "rows", folder / "base", low=10, high=20)
    ptx = dict(ptx_data=[str(long)], ptx_coef=0.1, ptx_batch=4, max_prompt=100)
    with pytest.raises(UserError, match="has 8. tokens, .*policy takes 64"):
        train(folder, tmp_path / "out", model=tmp_path / "policy", data=rows, **ptx)
    assert not (tmp_path / "out" / "last").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_validation_rows_beyond_the_positions_are_refused_at_the_start(stage, tmp_path):
    base = tiny.model_dir(tmp_path / "base", max_positions=48)
    if stage == "sft":
        splits = dict(train=tiny.rows(16), val=tiny.rows(8, low=60, high=70))
    else:
        splits = dict(train=tiny.ranked(16), val=tiny.ranked(8, completions=(2, 2)))
        splits["val"] = [
            [([97] * 40 + ids, [0] * 40 + mask) for ids, mask in group] for group in splits["val"]
        ]
    meta = dict(vocab_size=264, tokenizer=tokenizer.load(base).fingerprint)
    write_store(tmp_path / "data", splits, meta)
    argv = f"model={base} data={tmp_path}/data out={tmp_path}/out max_length=128 device=cpu".split()
    with pytest.raises(UserError, match="tokens, .*base takes 48"):
        tiny.train(stage, [*argv, "steps=1", "batch_size=8"])


def test_a_resume_needs_the_models_and_the_prompts_of_the_run(folder, tmp_path, capsys):
    tiny.model_dir(tmp_path / "other", seed=5)
    tiny.store(tmp_path / "more", folder / "base", n=30)
    for more in (dict(), dict(lora_rank=2, lr=1e-3)):
        out, settings = tmp_path / f"out{len(more)}", dict(reward=folder / "score", **more)
        train(folder, out, steps=1, **settings)
        train(folder, out, steps=2, **settings)  # new adapters and heads are no other model
        for change, words in [
            (dict(model=tmp_path / "other"), "another model"),
            (dict(data=tmp_path / "more"), "other data"),
        ]:
            with pytest.raises(UserError, match=f"was made from {words} "):
                train(folder, out, steps=3, **settings | change)
        train(folder, out, steps=3, **settings, data=tmp_path / "more", resume="anyway")
        assert "goes on from other data" in capsys.readouterr().out
