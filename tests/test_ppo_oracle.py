"""PPO's functions against what is known without them: a language whose optimum has a closed form,
and another implementation."""

import functools
from types import SimpleNamespace

import pytest
import tiny
import torch

import ppo
from nano import batches, runtime, weights

# ---- the tabular oracle
# A language of three words and EOS, two tokens at most: EOS, or a word and then any token. Of all
# policies, the one with the highest E[score] - BETA * KL(policy, reference) is reference *
# exp(score / BETA) / Z over whole texts (Ziegler et al. 2019).

V, EOS, BETA = 4, 3, 0.5
REFERENCE, SCORES = torch.randn(
    2, V, V, generator=torch.Generator().manual_seed(0)
)  # [state, token]; state 0: nothing said yet
ALONE = SimpleNamespace(all_sum=lambda x: x)


def texts(logits):
    """Log-probabilities of the 13 texts: a word and a token (12), EOS at once."""
    logprobs = logits.log_softmax(-1)
    return torch.cat(((logprobs[0, :EOS, None] + logprobs[1:]).flatten(), logprobs[0, EOS:]))


BEST = (texts(REFERENCE) + torch.cat((SCORES[:EOS].flatten(), SCORES[EOS, :1])) / BETA).softmax(0)


def distance(logits):
    """Total variation."""
    return 0.5 * (texts(logits).exp() - BEST).abs().sum().item()


def learn(
    advantage="gae",
    mutant=None,
    seed=0,
    iterations=300,
    episodes=512,
    epochs=2,
    lr=0.05,
    group=8,
    whiten=False,
):
    """A table of logits and a table of values learn by the functions of ppo.py, with the KL in the
    reward -> the distance to the optimum in the end."""
    generator = torch.Generator().manual_seed(seed)
    logits, values = REFERENCE.clone().requires_grad_(), torch.zeros(V, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=lr)
    for i in range(iterations):
        with torch.no_grad():
            probs = logits.softmax(-1)
            if mutant == "top-k":
                probs = torch.where(probs >= probs.topk(2).values[:, -1:], probs, 0.0)
            first = torch.multinomial(probs[0], episodes, replacement=True, generator=generator)
            state = torch.where(first == EOS, 0, first + 1)
            second = torch.multinomial(probs[state], 1, generator=generator)[:, 0]
            states = torch.stack((torch.zeros_like(state), state), 1)
            actions = torch.stack((first, second), 1)
            mask = torch.stack((torch.ones(episodes), (first != EOS).float()), 1)
            if mutant == "EOS untrained":
                mask *= actions != EOS

            def at(table):
                return table.log_softmax(-1)[states, actions]  # noqa: B023

            scores = torch.where(first == EOS, SCORES[EOS, 0], SCORES[first, second])
            old, old_values, ref = at(logits), values[states], at(REFERENCE)
            beta = -BETA if mutant == "KL sign" else BETA
            if advantage == "gae":
                rewards = ppo.shape_rewards(scores, old, ref, mask, beta)
                if mutant == "rewards whitened":
                    rewards = ppo.whiten(rewards, mask, ALONE, shift_mean=False)
                advantages, returns = ppo.gae(rewards, old_values, mask, 1.0, 0.95)
                advantages = ppo.whiten(advantages, mask, ALONE) if whiten else advantages
            else:
                kl = ((old - ref) * mask).sum(1)
                if mutant == "KL not left out":  # of its own baseline, as the scores are
                    advantages = ppo.group_advantages(scores, group, advantage)
                    advantages = advantages - beta * ppo.group_advantages(kl, group, "group")
                else:
                    advantages = ppo.penalised_advantages(scores, kl, group, advantage, beta)
                advantages = advantages[:, None] * mask
        for group_of in optimizer.param_groups:
            group_of["lr"] = lr * (1 - i / iterations)
        for _ in range(epochs):
            loss, _ = ppo.policy_loss(at(logits), old, advantages, mask, 0.2)
            if advantage == "gae":
                loss = loss + ppo.value_loss(values[states], old_values, returns, mask, 0.2)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return distance(logits.detach())


HOWS = [dict(), dict(whiten=True), dict(advantage="rloo"), dict(advantage="group")]


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_the_optimum_of_a_tabular_language_is_reached(how):
    assert distance(REFERENCE) > 0.5
    assert learn(**how) < 0.004


@pytest.mark.parametrize(
    "how",
    [
        dict(mutant="KL sign"),
        dict(mutant="EOS untrained"),
        dict(mutant="rewards whitened"),
        dict(mutant="top-k"),
        dict(advantage="rloo", mutant="KL not left out"),
        dict(advantage="group_std"),  # right, but another fixed point
    ],
    ids=str,
)
def test_the_oracle_tells_mistakes_from_right(how):
    assert learn(**how) > 0.004


# ---- GRPO beside trl's and in float64
# Two prompts of four samples, of unequal lengths, in micro-batches cut anywhere.

PARTS = slice(0, 3), slice(3, 8)
LOSS_MEANS = dict(dapo="tokens", bnpo="tokens", grpo="samples", dr_grpo="constant")  # trl's names
LONGEST = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory.mktemp("grpo") / "base")


def sampled(seed=0):
    """(prompts, responses, scores) of eight samples"""
    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, 0, 256, generator=rng)
    prompts = [prompt for n in (3, 7) for prompt in [draw((n,)).tolist()] * 4]
    responses = [draw((n,)).tolist() for n in (LONGEST, 2, 1, 4, 5, LONGEST, 3, 2)]
    return prompts, responses, torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, 2.0, -1.0, 0.0])


def gradient(model, cfg):
    """The gradient of ppo.rl_gradient on these samples, in model -> (stats, targets): old and
    reference log-probabilities, drawn so that some ratios are beyond the clip, and the advantages."""
    prompts, responses, scores = sampled()
    rng = torch.Generator().manual_seed(1)
    rt, policy = runtime.Runtime("cpu", "none", "float32"), ppo.Role(model, net=model)
    rows = [
        (prompt + response, [0] * len(prompt) + [1] * len(response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(LONGEST) < lengths[:, None]
    micro_batches = [batches.episodes(rows[part]) for part in PARTS]
    with torch.no_grad():
        now = torch.cat([policy.logprobs(batch, cfg.temperature)[0] for batch in micro_batches])
    now = torch.zeros(mask.shape).masked_scatter(mask, now)
    advantages = ppo.group_advantages(scores, 4, cfg.advantage)
    count = float(mask.sum())
    targets = dict(
        old_logprobs=now + 0.3 * torch.randn(mask.shape, generator=rng),
        ref_logprobs=now + 0.3 * torch.randn(mask.shape, generator=rng),
        advantages=advantages[:, None] * mask,
        loss_weights=ppo.loss_weights(mask, cfg.loss_mean, count, len(rows), LONGEST),
    )
    for batch, part in zip(micro_batches, PARTS, strict=True):
        batch |= {name: x[part][mask[part]] for name, x in targets.items()}
    stats = ppo.rl_gradient(cfg, rt, policy, None, micro_batches, count, cfg.kl_coef)
    return stats, targets | dict(mask=mask, scores=advantages)


def config(loss_mean, kl_coef, temperature, clip_high=0.0):
    return ppo.Config(
        advantage="group_std",
        group=4,
        kl_in="loss",
        kl_coef=kl_coef,
        loss_mean=loss_mean,
        temperature=temperature,
        clip_high=clip_high,
    )


@pytest.mark.parametrize("loss_mean", ["tokens", "samples", "constant"])
@pytest.mark.parametrize("kl_coef, temperature, clip_high", [(0.0, 1.0, 0.0), (0.3, 0.7, 0.28)])
def test_grpo_gradient_is_that_of_the_formula_in_float64(
    base, loss_mean, kl_coef, temperature, clip_high
):
    """Shao et al. 2024 (arXiv:2402.03300), Eq. 3 and 4, written out for one action after
    another."""
    model, right = weights.load_model(base), weights.load_model(base).double()
    cfg = config(loss_mean, kl_coef, temperature, clip_high)
    stats, targets = gradient(model, cfg)
    prompts, responses, scores = sampled()
    n_actions = sum(map(len, responses))
    loss = kl_loss = 0.0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        group = scores[4 * (i // 4) : 4 * (i // 4) + 4].double()
        advantage = (scores[i].double() - group.mean()) / (group.std() + 1e-4)
        hidden = right.hidden(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]
        logprobs = (hidden @ right.head_weight.t() / temperature).log_softmax(-1)
        weight = dict(
            tokens=1 / n_actions, samples=1 / (8 * len(response)), constant=1 / (8 * LONGEST)
        )[loss_mean]
        for t, token in enumerate(response):
            ratio = (logprobs[t, token] - targets["old_logprobs"][i, t].double()).exp()
            held = ratio.clamp(0.8, 1 + (clip_high or 0.2))
            loss = loss - weight * torch.minimum(ratio * advantage, held * advantage)
            d = targets["ref_logprobs"][i, t].double() - logprobs[t, token]
            kl_loss = kl_loss + weight * (d.exp() - d - 1)
    (loss + kl_coef * kl_loss).backward()
    assert 0.1 < stats["clipfrac"] < 0.9
    assert abs(stats["policy_loss"] - loss.item()) < 1e-6
    if kl_coef:
        assert abs(stats["kl_loss"] - kl_loss.item()) < 1e-6 and kl_loss > 0.01
    else:
        assert "kl_loss" not in stats
    exact = dict(right.named_parameters())
    for name, p in model.named_parameters():
        scale = exact[name].grad.abs().max().item()
        torch.testing.assert_close(p.grad.double(), exact[name].grad, rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def peer(base):
    """A function (loss_type, beta, temperature) -> trl's trainer of the model in transformers."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def trainer(loss_type, beta, temperature):
        args = trl.GRPOConfig(
            output_dir=str(base / "trl"),
            per_device_train_batch_size=8,
            num_generations=4,
            loss_type=loss_type,
            beta=beta,
            use_bias_correction_kl=False,  # k3 alone, as in Shao et al. 2024
            epsilon=0.2,
            temperature=temperature,
            max_completion_length=LONGEST,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        return trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=args,
            train_dataset=Dataset.from_list([dict(prompt="a")] * 8),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=AutoTokenizer.from_pretrained(base),
        )

    return trainer


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    "loss_type, temperature", [("dapo", 1.0), ("bnpo", 0.7), ("grpo", 1.0), ("dr_grpo", 0.7)]
)
def test_grpo_loss_and_gradient_are_trl_s(base, peer, loss_type, temperature, beta):
    """trl means by grpo a mean over each sample, then over samples; by bnpo one over the tokens of
    a micro-batch, which here is the batch; by dapo, its default, one over the tokens of the
    batch."""
    model = weights.load_model(base)
    cfg = config(LOSS_MEANS[loss_type], beta, temperature)
    stats, targets = gradient(model, cfg)

    trainer = peer(loss_type, beta, temperature)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    prompts, responses, _ = sampled()
    longest = max(map(len, prompts))
    mask = targets["mask"].long()
    inputs = dict(
        prompt_ids=torch.tensor([[258] * (longest - len(p)) + p for p in prompts]),
        prompt_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        completion_ids=torch.tensor([r + [258] * (LONGEST - len(r)) for r in responses]),
        completion_mask=mask,
        old_per_token_logps=targets["old_logprobs"],
        ref_per_token_logps=targets["ref_logprobs"],
        advantages=targets["scores"],
        num_items_in_batch=mask.sum(),
    )
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    ours = stats["policy_loss"] + beta * stats.get("kl_loss", 0.0)
    assert 0.1 < stats["clipfrac"] < 0.9 and abs(loss) > 1e-3
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-4, atol=1e-6)
    ours, theirs = dict(model.named_parameters()), dict(trainer.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-4 * scale)
    logged = trainer._metrics["train"]
    assert abs(stats["clipfrac"] - logged["clip_ratio/region_mean"][-1]) < 1e-6
    if beta and loss_type != "grpo" and loss_type != "dr_grpo":  # there trl's kl is another mean
        assert abs(stats["kl_loss"] - logged["kl"][-1]) < 1e-6
