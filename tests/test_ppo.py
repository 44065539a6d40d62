import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import ppo
from nano import batches, config, functions, store, tokenizer
from nano.config import UserError

NAN, INF = math.nan, math.inf
ALONE = SimpleNamespace(all_sum=lambda x: x)  # one rank
REWARDS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Seen:  # which looks for its module in sys.modules
    count: int = 0

def letters(prompt, response, finished):
    return sum(c in prompt for c in response) + 0.1 * len(response) - 0.5 * finished
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("ppo") / "base")


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def ragged(lengths, seed=0):
    """(mask (N, R), a function that gives random matrices with NaN outside the mask)"""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    return mask, lambda: torch.where(mask > 0, torch.randn(mask.shape, generator=generator), NAN)


# ---- rewards, advantages


def test_shape_rewards_by_hand():
    mask = matrix([1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0])
    scores, logprobs = (
        torch.tensor([10.0, 20, 30, 40]),
        matrix([-1, -2, -3], [-1, NAN, -INF], [NAN, 0, 0], [0, 0, 9]),
    )
    ref = matrix([-1.5, -1, -3], [-2, 0, NAN], [0, 0, NAN], [0, -1, 9])
    rewards = ppo.shape_rewards(scores, logprobs, ref, mask, 0.1)
    torch.testing.assert_close(
        rewards, matrix([-0.05, 0.1, 10], [19.9, 0, 0], [0, 0, 0], [0, 39.9, 0])
    )
    assert torch.equal(rewards, ppo.shape_rewards(scores, logprobs, ref, mask.bool(), 0.1))


def test_gae_by_hand():
    rewards, values, mask = matrix([1, 0, 2, 7]), matrix([0.5, 1, 1.5, 9]), matrix([1, 1, 1, 0])
    advantages, returns = ppo.gae(rewards, values, mask, 0.9, 0.5)
    third = 2 - 1.5  # nothing comes after the last action
    second = 0 + 0.9 * 1.5 - 1 + 0.45 * third
    first = 1 + 0.9 * 1 - 0.5 + 0.45 * second
    torch.testing.assert_close(advantages, matrix([first, second, third, 0]))
    torch.testing.assert_close(returns, matrix([first + 0.5, second + 1, 2, 0]))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum_and_sees_no_padding(gamma, lam):
    lengths = (1, 7, 3, 5, 0)
    mask, draw = ragged(lengths)
    rewards, values = draw(), draw()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        v = [*values[row, :n].tolist(), 0.0]
        delta = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        sums = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        torch.testing.assert_close(advantages[row], torch.tensor(sums + [0.0] * (7 - n)))
        torch.testing.assert_close(
            returns[row],
            torch.tensor([a + b for a, b in zip(sums, v, strict=False)] + [0.0] * (7 - n)),
        )
    if (gamma, lam) == (1.0, 1.0):  # then a return is the sum of the rewards to come
        torch.testing.assert_close(returns[1], rewards[1].flip(0).cumsum(0).flip(0))


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    others = torch.tensor([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    torch.testing.assert_close(ppo.group_advantages(scores, 3, "rloo"), others)
    centred = torch.tensor([-2.0, -1, 3, 0, 0, 0])
    torch.testing.assert_close(ppo.group_advantages(scores, 3, "group"), centred)
    std = math.sqrt((4 + 1 + 9) / 2)
    right = centred / (std + 1e-4)
    torch.testing.assert_close(ppo.group_advantages(scores, 3, "group_std"), right)


HOWS = ["group", "group_std", "rloo"]


@pytest.mark.parametrize("how", HOWS)
def test_group_advantages_of_any_scores(how):
    many = ppo.group_advantages(torch.randn(64), 8, how).view(8, 8)
    assert many.sum(1).abs().max() < 1e-5 and many.abs().max() > 0.1
    # The mean of eight fp32 numbers 20000.3 is not 20000.3: what is left must not be divided by
    # eps.
    for score in (20000.3, 0.1, -7.7, 1e-30):
        equal = ppo.group_advantages(torch.full((24,), score), 8, how)
        assert torch.equal(equal, torch.zeros(24)), score


@pytest.mark.parametrize("how", HOWS)
def test_the_kl_is_charged_outside_of_the_normalisation(how):
    """Halving kl_coef halves the KL's share of an advantage, also where all scores are equal, and
    scores of another scale leave that share as it is."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(24, generator=generator)
    kl = torch.rand(24, generator=generator)

    def share(scores, kl_coef):
        with_kl = ppo.penalised_advantages(scores, kl, 8, how, kl_coef)
        return with_kl - ppo.group_advantages(scores, 8, how)

    for scores in (random, 100 * random, torch.full((24,), 20000.3)):
        torch.testing.assert_close(share(scores, 0.02), 2 * share(scores, 0.01), atol=1e-4, rtol=0)
        rows = kl.view(3, 8)
        centred = (rows - rows.mean(1, keepdim=True)).flatten()
        right = -0.02 * centred * (8 / 7 if how == "rloo" else 1)
        torch.testing.assert_close(share(scores, 0.02), right, atol=1e-4, rtol=0)
    tiny_kl = 1e-6 * kl
    equal = ppo.penalised_advantages(torch.ones(24), tiny_kl, 8, how, 0.05)
    assert 0 < equal.abs().max() < 1e-7


def test_group_and_rloo_with_the_kl_are_those_of_the_penalised_score():
    generator = torch.Generator().manual_seed(0)
    scores, kl = torch.randn(2, 24, generator=generator)
    for how in ("group", "rloo"):
        right = ppo.group_advantages(scores - 0.3 * kl, 8, how)
        torch.testing.assert_close(ppo.penalised_advantages(scores, kl, 8, how, 0.3), right)


def test_whitening_over_all_actions():
    mask, draw = ragged((3, 1, 5))
    x = torch.where(mask > 0, draw(), 0.0)
    actions = x[mask > 0]
    white = (x - actions.mean()) / actions.std(correction=0) * mask
    torch.testing.assert_close(ppo.whiten(x, mask, ALONE), white)
    kept = (white + actions.mean()) * mask
    torch.testing.assert_close(ppo.whiten(x, mask, ALONE, shift_mean=False), kept)
    same = torch.full((4,), 3.0)  # no variance: no NaN
    assert ppo.whiten(same, torch.ones(4), ALONE).abs().max() == 0
    assert torch.allclose(ppo.variance(x, mask, ALONE), x[mask > 0].var(correction=0))
    two = SimpleNamespace(all_sum=lambda t: 2 * t)  # another rank with the same episodes
    torch.testing.assert_close(ppo.whiten(x, mask, two), ppo.whiten(x, mask, ALONE))


# ---- losses


def test_policy_loss_by_hand():
    """Ratios 1.5, 0.5, 1.1, 1 with clip 0.2: held where the step has gone far enough in the
    direction that the advantage asks."""
    mask, old = matrix([1, 1, 1, 1], [1, 1, 0, 0]), torch.zeros(2, 4)
    new = matrix([1.5, 0.5, 1.1, 1], [1.5, 0.5, 3, NAN]).log().requires_grad_()
    advantages = matrix([1, 1, 1, 1], [-1, -1, 9, NAN])
    loss, stats = ppo.policy_loss(new, old, advantages, mask, 0.2)
    terms = [-1.2, -0.5, -1.1, -1.0, 1.5, 0.8]
    assert math.isclose(loss.detach(), sum(terms) / 6, rel_tol=1e-6)
    assert math.isclose(stats["clipfrac"], 2 / 6, rel_tol=1e-6) and math.isclose(
        stats["ratio"], 0.5, rel_tol=1e-6
    )
    k3 = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1, 1, 1.5, 0.5)) / 6
    assert math.isclose(stats["approx_kl"], k3, rel_tol=1e-5)
    loss.backward()
    torch.testing.assert_close(
        new.grad, matrix([0, -0.5, -1.1, -1], [1.5, 0, 0, 0]) / 6
    )  # of a held one: none
    with torch.no_grad():
        counted, stats = ppo.policy_loss(new, old, advantages, mask, 0.2, count=12)
    loss = loss.detach()
    assert math.isclose(counted, loss / 2, rel_tol=1e-6) and math.isclose(
        stats["clipfrac"], 2 / 12, rel_tol=1e-6
    )
    assert ppo.policy_loss(new, old, advantages, torch.zeros(2, 4), 0.2)[0] == 0


def test_clip_high_is_the_upper_end_of_the_range():
    mask, old = torch.ones(1, 4), torch.zeros(1, 4)
    new, advantages = matrix([1.25, 1.5, 0.7, 0.7]).log(), matrix([1, 1, -1, 1])
    for clip_high, upper in ((0.0, 1.2), (0.28, 1.28), (0.6, 1.6)):
        loss, stats = ppo.policy_loss(new, old, advantages, mask, 0.2, clip_high)
        terms = [-min(1.25, upper), -min(1.5, upper), 0.8, -0.7]
        assert math.isclose(loss, sum(terms) / 4, rel_tol=1e-6)
        clipped = (1.25 > upper) + (1.5 > upper) + 1
        assert math.isclose(stats["clipfrac"], clipped / 4, rel_tol=1e-6)


def test_what_an_action_weighs():
    mask = matrix([1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]) > 0
    weights = ppo.loss_weights(mask, "tokens", 14, 6, 5)  # another rank has 7 actions more
    torch.testing.assert_close(weights, mask / 14)
    weights = ppo.loss_weights(mask, "samples", 14, 6, 5)
    torch.testing.assert_close(weights, matrix([1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]) / 24)
    weights = ppo.loss_weights(mask, "constant", 14, 6, 5)
    torch.testing.assert_close(weights, mask / 30)
    # a loss with the same term at every action: the mean is that term, where the weights sum to 1
    old, advantages = torch.zeros(3, 4), torch.full((3, 4), -2.0)
    for loss_mean, right in (("tokens", 2.0), ("samples", 2.0), ("constant", 2 * 7 / 15)):
        weights = ppo.loss_weights(mask, loss_mean, 7, 3, 5)
        loss, stats = ppo.policy_loss(old + 0.1, old, advantages, mask, 0.5, weights=weights)
        assert math.isclose(loss, right * math.exp(0.1), rel_tol=1e-5), loss_mean
        assert math.isclose(stats["approx_kl"], math.exp(0.1) - 1.1, rel_tol=1e-3)  # a token


def test_k3():
    """exp(d) - 1 - d, d = log(reference / policy): not negative, with the mean KL(policy,
    reference)."""
    mask = matrix([1, 1, 1, 0])
    policy, ref = matrix([-1, -2, -3, NAN]), matrix([-1, -1.5, -5, -INF])
    right = matrix([0, math.exp(0.5) - 1.5, math.exp(-2) + 1, 0])
    torch.testing.assert_close(ppo.k3(policy, ref, mask), right)
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    policy, ref = logits.double().log_softmax(-1)
    k3 = ppo.k3(policy, ref, torch.ones(7))
    kl = (policy.exp() * (policy - ref)).sum()
    assert k3.min() >= 0 and torch.allclose((policy.exp() * k3).sum(), kl)


def test_the_first_gradient_is_that_of_reinforce():
    mask, draw = ragged((4, 2, 1))
    new, advantages = draw(), draw()
    loss, stats = ppo.policy_loss(new.requires_grad_(), new.detach(), advantages, mask, 0.2)
    loss.backward()
    torch.testing.assert_close(new.grad, torch.where(mask > 0, -advantages, 0.0) / 7)
    assert stats["ratio"] == stats["clipfrac"] == stats["approx_kl"] == 0


def test_value_loss_by_hand():
    mask, old = matrix([1, 1, 1, 1], [1, 0, 0, 0]), matrix([0, 0, 0, 0], [1, NAN, 0, 0])
    values = matrix([0.5, 0.5, -0.5, 0.1], [1.0, 0, NAN, 0]).requires_grad_()
    returns = matrix([1, 0.1, 1, 0], [3, 0, 0, NAN])
    # near the return, but moved by more than 0.2 from the old value: the error of the held value
    # counts, without a gradient
    terms = [(0.2 - 1) ** 2, (0.5 - 0.1) ** 2, (-0.5 - 1) ** 2, 0.1**2, 2.0**2]
    loss, stats = ppo.value_loss(values, old, returns, mask, 0.2)
    assert math.isclose(loss.detach(), 0.5 * sum(terms) / 5, rel_tol=1e-6) and math.isclose(
        stats["clipfrac"], 1 / 5, rel_tol=1e-6
    )
    loss.backward()
    torch.testing.assert_close(values.grad, matrix([0, 0.4, -1.5, 0.1], [-2, 0, 0, 0]) / 5)
    with torch.no_grad():
        assert math.isclose(
            ppo.value_loss(values, old, returns, mask, 0.2, count=10)[0],
            loss.detach() / 2,
            rel_tol=1e-6,
        )


@pytest.mark.parametrize("cut", [[2, 2, 2], [1, 5], [3, 3]], ids=str)
def test_losses_of_micro_batches_add_up(cut):
    mask, draw = ragged((4, 1, 3, 2, 4, 1))
    new, old, advantages = draw(), draw(), draw()
    whole = [f(new, old, advantages, mask, 0.2) for f in (ppo.policy_loss, ppo.value_loss)]
    for f, (loss, stats) in zip((ppo.policy_loss, ppo.value_loss), whole, strict=True):
        parts = [
            f(*x, 0.2, count=mask.sum())
            for x in zip(*(t.split(cut) for t in (new, old, advantages, mask)), strict=True)
        ]
        torch.testing.assert_close(sum(p for p, _ in parts), loss)
        torch.testing.assert_close(sum(s["clipfrac"] for _, s in parts), stats["clipfrac"])


def test_the_adaptive_coefficient():
    controller = ppo.AdaptiveKL(0.15, target=6.0, horizon=10_000)
    assert math.isclose(
        controller.update(12.0, 256), 0.15 * (1 + 0.2 * 256 / 10_000)
    )  # held at +20%
    assert math.isclose(
        controller.update(6.6, 512), 0.15 * (1 + 0.2 * 256 / 10_000) * (1 + 0.1 * 512 / 10_000)
    )
    controller = ppo.AdaptiveKL(1.0, target=6.0, horizon=100)
    for _ in range(10):
        controller.update(0.0, 50)
    assert math.isclose(controller.coef, 0.9**10)


# ---- episodes


PROMPTS, RESPONSES = [[5, 6, 7], [9], [3, 4, 3, 4, 3]], [[8, 258], [1, 2, 3, 4], [258]]


@pytest.mark.parametrize("length", [0, 16], ids=["packed", "fixed shapes"])
def test_a_batch_of_episodes_gives_what_each_gives_alone(length):
    """Log-probabilities and entropies of the actions, values before them, scores at the end,
    whatever the temperature. The third episode's actions do not stand side by side."""
    model = tiny.model(windows=(16, 16) if length else ())
    head = tiny.model(1, head="score").score
    role = ppo.Role(model, head=head, scale=(2.0, -1.0))
    rows = [
        (prompt + response, [0] * len(prompt) + [1] * len(response))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    rows[2] = rows[2][0], [0, 1, 0, 1, 0, 1]
    batch = batches.episodes(rows, length)
    is_action = batch["weights"] > 0
    mask = torch.arange(4) < torch.tensor([[2], [4], [3]])
    assert batch["tokens"].shape == ((3, 16) if length else (1, 16))
    with torch.no_grad():
        outputs = [*role.logprobs(batch, 0.7), role.values(batch)]
        logprobs, entropy, values = (ppo.to_matrix(x, is_action, mask) for x in outputs)
        scores = role.scores(batch)
        for i, (tokens, actions) in enumerate(rows):
            hidden = model.hidden(torch.tensor([tokens]))
            before = torch.tensor(actions).nonzero().flatten() - 1
            right = (model.logits(hidden)[0, before] / 0.7).log_softmax(-1)
            m = len(before)
            chosen = right[range(m), torch.tensor(tokens)[before + 1]]
            padding = (0, 4 - m)
            torch.testing.assert_close(logprobs[i], F.pad(chosen, padding))
            torch.testing.assert_close(entropy[i], F.pad(-(right.exp() * right).sum(-1), padding))
            torch.testing.assert_close(values[i], F.pad(head(hidden)[0, before] * 2 - 1, padding))
            torch.testing.assert_close(scores[i], head(hidden)[0, -1] * 2 - 1)
    for x in (logprobs, entropy, values):
        flat = ppo.to_flat(x, is_action, mask)
        assert flat.shape == batch["index"].shape and not flat[~is_action].any()
        assert torch.equal(ppo.to_matrix(flat, is_action, mask), x)


def test_prompts_come_in_shuffled_passes():
    prompts = [[i] for i in range(7)]
    passes = [[ppo.pick(prompts, 7 * epoch + i, seed=3)[0] for i in range(7)] for epoch in range(3)]
    assert all(sorted(p) == list(range(7)) for p in passes) and len({tuple(p) for p in passes}) == 3
    assert passes[1] == [ppo.pick(prompts, 7 + i, seed=3)[0] for i in range(7)]
    assert passes[0] != [ppo.pick(prompts, i, seed=4)[0] for i in range(7)]


def test_prompts_of_a_folder(base, tmp_path):
    tok, stop = tokenizer.load(base), 258
    rows = [
        ([1, 2, 3, stop], [0, 0, 1, 1]),
        ([1, 2, 9, stop], [0, 0, 1, 1]),
        ([4, 5, 4, 6, stop], [0, 1, 0, 1, 1]),
        ([7, 8, 9, 10, 11], [0, 0, 0, 0, 1]),
        ([5, 5], [1, 1]),
        ([6, 6], [0, 0]),
    ]
    store.write_store(tmp_path, dict(train=rows), dict(vocab_size=264, tokenizer=tok.fingerprint))
    prompts, rows, left_out = ppo.prompts_of(
        SimpleNamespace(data=[str(tmp_path)], seed=0, max_prompt=3), tok
    )
    # once each, up to the first target, or whole where there is none; one is too long
    assert prompts == [((1, 2), 0), ((4,), 2), ((6, 6), 5)] and left_out == 1
    assert all(type(i) is int for p, _ in prompts for i in p)
    with pytest.raises(UserError, match="max_prompt=0"):
        ppo.prompts_of(SimpleNamespace(data=[str(tmp_path)], seed=0, max_prompt=0), tok)


def test_a_response_is_cut_behind_a_string(base):
    tok = tokenizer.load(base)
    ids = list(b"say. then more. end")
    assert ppo.cut_at((), tok, ids) == (ids, False) and ppo.cut_at(("?",), tok, ids) == (ids, False)
    assert ppo.cut_at((". ",), tok, ids) == (list(b"say. "), True)
    assert ppo.cut_at(("more", "hen"), tok, ids) == (
        list(b"say. then"),
        True,
    )  # the one that is complete first
    ids = [*b"say", 257, *b" then", 258]  # <|im_start|>, which the text leaves out
    assert ppo.cut_at(("<|im_start|>",), tok, ids) == ([*b"say", 257], True)
    assert ppo.cut_at(("say then",), tok, ids) == (ids, False)


@pytest.mark.parametrize("how", ["group", "group_std", "rloo"])
def test_samples_without_a_score_are_left_out_of_their_group(how):
    """The others of a group have the advantages of a group of them alone, the KL's part too."""
    nan = float("nan")
    scores = torch.tensor([1.0, nan, 4.0, 2.0, nan, nan, nan, 3.0, nan, nan, nan, nan])
    kl = torch.arange(12.0)
    got = ppo.penalised_advantages(scores, kl, 4, how, 0.1).view(3, 4)
    alone = ppo.penalised_advantages(torch.tensor([1.0, 4.0, 2.0]), kl[[0, 2, 3]], 3, how, 0.1)
    torch.testing.assert_close(got[0, [0, 2, 3]], alone)
    assert got[0, 1] == 0 and not got[1:].any()
    mean = 7 / 3
    if how == "group":  # by hand
        torch.testing.assert_close(got[0, 0], torch.tensor(1 - mean - 0.1 * (0 - 5 / 3)))


def test_the_sum_of_rewards():
    nan = float("nan")
    parts = [torch.tensor([1.0, nan, nan, 0.0]), torch.tensor([2.0, 3.0, nan, -1.0])]
    with pytest.raises(UserError, match="beyond float32"):
        ppo.total_score([torch.tensor([3e38]), torch.tensor([3e38])], [1.0, 1.0])
    # a reward of weight 0 is only logged
    silent = ppo.total_score([torch.tensor([torch.nan, 1.0]), torch.tensor([5.0, 5.0])], [1.0, 0.0])
    assert silent.isnan().tolist() == [True, False]
    total = ppo.total_score(parts, [1.0, 0.5])
    assert total[[0, 1, 3]].tolist() == [2.0, 1.5, -0.5] and total[2].isnan()


def test_reward_functions(base, tmp_path):
    tok = tokenizer.load(base)
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    function = functions.load_function(f"{path}:letters")
    scores = functions.judge(
        function, tok, [[*b"abc"], [*b"x"]], ([*b"aaz", 258], [*b"y"]), torch.tensor([1.0, 0.0])
    )
    torch.testing.assert_close(
        scores, torch.tensor([2 + 0.3 - 0.5, 0.1])
    )  # special tokens are no text
    for spec, said in [
        ("none.py:f", "no file none.py"),
        (f"{path}:nothing", "no function nothing"),
        (f"{base / 'config.json'}:x", "file.py:function"),
        ("x", "file.py:function"),
    ]:
        with pytest.raises(UserError, match=said):
            functions.load_function(spec)


@pytest.mark.parametrize(
    "body, said",
    [
        (
            "def f(prompt, response, finished): raise KeyError('k')",
            r"function f failed in .*r.py:1: KeyError: 'k'",
        ),
        (
            "def f(prompt): return 1.0",
            "the function f must take prompt, response and finished, and may take the record",
        ),
        ("def f(a, b, c, d, e): return 1.0", "the function f must take prompt, response and"),
        ("def f(a, b, c, *, d): return 1.0", "the function f must take prompt, response and"),
        (
            "def f(*args): return 'good'",
            "function f returned 'good' for the response 'x', which is neither a number nor None",
        ),
        ("class F:\n def __call__(self, a, b, c): return [1]\nf = F()",
         r"the function F returned \[1\] for"),
        ("def f(*args): return float('nan')", "function f gave nan for the response 'x'"),
        ("def f(*args): return 1e39", r"function f gave 1e\+39 for .* finite number in float32"),
        ("def f(*args): return -1e39", r"function f gave -1e\+39 for the response 'x'"),
        ("def f(*args): return 10**400", "function f gave inf for the response 'x'"),
    ],
)
def test_reward_functions_that_fail(base, tmp_path, body, said):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(UserError, match=said):
        functions.judge(
            functions.load_function(f"{tmp_path}/r.py:f"),
            tokenizer.load(base),
            [[*b"a"]],
            [[*b"x"]],
            torch.tensor([1.0]),
        )


def test_a_reward_file_imports_a_module_beside_it(base, tmp_path, monkeypatch):
    """When it is read, and later when the function runs. It hides no module of the program."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "worth_of_letters.py").write_text("WORTH = 2.5")
    (tmp_path / "bonus_of_letters.py").write_text("BONUS = 0.25")
    (tmp_path / "lora.py").write_text("raise SystemExit")
    (tmp_path / "r.py").write_text(
        "from worth_of_letters import WORTH\nimport lora\ndef f(*args):\n"
        "    from bonus_of_letters import BONUS\n    return WORTH + BONUS"
    )
    function = functions.load_function(f"{tmp_path}/r.py:f")
    text = [[*b"a"]]
    scores = functions.judge(function, tokenizer.load(base), text, text, torch.tensor([1.0]))
    assert scores.tolist() == [2.75]


@pytest.mark.parametrize(
    "body, said", [("import nothing_here", "ModuleNotFoundError"), ("def f(:", "SyntaxError")]
)
def test_reward_files_that_do_not_run(tmp_path, body, said):
    (tmp_path / "r.py").write_text(body)
    with pytest.raises(UserError, match=f"r.py does not run: {said}"):
        functions.load_function(f"{tmp_path}/r.py:f")


def test_correlation():
    x, y = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.3, 0.1, 0.2, -3.0])
    mean = lambda x: x.sum() / 4  # noqa: E731
    assert math.isclose(ppo.correlation(x, y, mean), np.corrcoef(x, y)[0, 1], rel_tol=1e-6)
    assert ppo.correlation(x, torch.full((4,), 0.3), mean) == 0


def test_diseases():
    well = dict(
        kl=2.0, length=20.0, length_reward_corr=0.3, reward=1.0, gold=0.5, entropy=2.0, eos_rate=0.9
    )
    assert not list(ppo.diseases(well, well))
    cases = {
        "KL is negative": dict(kl=-1.0),
        "grow": dict(length=40.0, length_reward_corr=0.7),
        "entropy": dict(entropy=0.3),
        "exploits": dict(reward=3.0, gold=-1.0),
        "stop ending": dict(eos_rate=0.2),
    }
    for said, change in cases.items():
        (found,) = ppo.diseases(well | change, well)
        assert said in found


def test_settings_that_do_not_go_together():
    rt = SimpleNamespace(world=2, micro_batch=lambda n: n, weight_shards=1)
    ppo.check(ppo.Config(batch_size=64, minibatches=2, micro_batch=8, group=4), rt)
    ppo.check(ppo.Config(advantage="gae", kl_in="loss", kl_control="adaptive"), rt)
    ptx = dict(ptx_data=("x",), ptx_coef=1.0)
    pairs = dict(advantage="group", group=2)
    ppo.check(ppo.Config(**pairs), rt)
    wrong = {
        "batch_size=24 must be a multiple of": dict(batch_size=24),
        "gives a rank 16 episodes of a minibatch": dict(
            batch_size=64, minibatches=2, group=5, micro_batch=1
        ),
        "advantage=group_std .* compares .* group=2": dict(advantage="group_std"),
        "temperature=0": dict(temperature=0.0),
        "offload=true parks": dict(offload=True, lora_rank=4),
        "truncate_at= holds an empty string": dict(truncate_at=("a", "")),
        "ptx_batch=3 must be a multiple of the 2 ranks": ptx | dict(ptx_batch=3),
        "ptx_batch=24 gives a rank 12 rows, .* of the 8 of a forward": ptx | dict(ptx_batch=24),
        # 0.2 x 64 / 12 is above 1: a low KL would make the coefficient negative
        "kl_horizon=12 must be above a fifth of batch_size=64": dict(
            kl_control="adaptive", kl_horizon=12
        ),
    }
    for batch in (2, 6, 16, 32):  # one row a rank, fewer rows than a forward takes, and more
        ppo.check(ppo.Config(**ptx | dict(ptx_batch=batch)), rt)
    controller = ppo.AdaptiveKL(1.0, target=6.0, horizon=13)
    ppo.check(ppo.Config(kl_control="adaptive", kl_horizon=13), rt)
    assert 0 < controller.update(0.0, 64) < 0.02
    for said, settings in wrong.items():
        with pytest.raises(UserError, match=said):
            ppo.check(ppo.Config(**settings), rt)


def test_algo_is_a_preset_that_expands_where_it_stands():
    def keys(*argv):
        cfg = config.parse(ppo.Config, argv)
        return cfg.advantage, cfg.kl_in, cfg.loss_mean

    assert keys() == keys("algo=ppo") == ("gae", "reward", "tokens")
    assert keys("algo=rloo") == ("rloo", "reward", "tokens")
    assert keys("algo=grpo") == ("group_std", "loss", "tokens")
    assert keys("algo=grpo", "advantage=group", "loss_mean=constant") == (
        "group",
        "loss",
        "constant",
    )
    assert keys("advantage=group", "algo=grpo") == ("group_std", "loss", "tokens")
    text = config.to_cfg(config.parse(ppo.Config, ["algo=grpo"]))
    assert "algo" not in text and "advantage=group_std\n" in text and "kl_in=loss\n" in text
    with pytest.raises(UserError, match="algo=trpo: expected one of ppo, rloo, grpo"):
        keys("algo=trpo")


def test_the_models_that_a_run_needs():
    needs = lambda **keys: (ppo.Config(**keys).has_critic, ppo.Config(**keys).has_reference)  # noqa: E731
    assert needs() == (True, True)
    assert needs(kl_coef=0.0) == needs(kl_in="none") == (True, False)
    assert needs(kl_coef=0.0, log_kl=True) == needs(kl_in="none", log_kl=True) == (True, True)
    for advantage in ("group", "group_std", "rloo"):
        assert needs(advantage=advantage, kl_in="loss") == (False, True)


def test_a_config_of_the_first_edition(tmp_path, capsys):
    """There 0 meant never to sample, and to save at the end. A preset of today keeps its 0."""
    old = Path(__file__).parent / "first_edition" / "cfg" / "ppo_sample_every_0.cfg"
    cfg = config.parse(ppo.Config, [str(old)])
    assert (cfg.sample_every, cfg.save_every, cfg.log_every) == (-1, -1, 1)
    said = capsys.readouterr().out
    assert "sample_every=0 of the first edition is read as sample_every=-1" in said
    assert "save_every=0 of the first edition is read as save_every=-1" in said
    (tmp_path / "new.cfg").write_text(config.to_cfg(ppo.Config(sample_every=0, save_every=0)))
    (tmp_path / "recipe.cfg").write_text("algo=grpo\nsample_every=0\nsave_every=0\n")
    for name in ("new", "recipe"):
        cfg = config.parse(ppo.Config, [f"{tmp_path}/{name}.cfg"])
        assert (cfg.sample_every, cfg.save_every) == (0, 0) and capsys.readouterr().out == ""
