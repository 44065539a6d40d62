"""PPO's functions against what is known without them: a language whose optimum has a closed form, and another implementation."""

import functools
from types import SimpleNamespace

import pytest
import tiny
import torch

import ppo
from nano import batches, runtime, weights

# ---------------------------------------------------------------------------------------------- the tabular oracle
# A language of three words and EOS, two tokens at most: EOS, or a word and then any token. Of all policies, the one with the
# highest E[score] - BETA * KL(policy, reference) is reference * exp(score / BETA) / Z over whole texts (Ziegler et al. 2019).

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


# ---------------------------------------------------------------------------------------------- GRPO beside trl's


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(model directory, a function (loss_type, temperature) -> trl's trainer of it in transformers)"""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny.model_dir(tmp_path_factory.mktemp("trl") / "base")

    def trainer(loss_type, temperature):
        args = trl.GRPOConfig(
            output_dir=str(base / "trl"),
            per_device_train_batch_size=8,
            num_generations=4,
            loss_type=loss_type,
            beta=0.0,
            epsilon=0.2,
            temperature=temperature,
            max_completion_length=6,
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

    return base, trainer


@pytest.mark.parametrize("loss_type, temperature", [("dapo", 1.0), ("bnpo", 0.7)])
def test_grpo_loss_and_gradient_are_trl_s(peer, loss_type, temperature):
    """dapo is trl's default: a mean over the tokens of the batch, as here. Two prompts of four samples, of unequal lengths."""
    base, make = peer
    rng = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randint, 0, 256, generator=rng)
    prompts = [p for n in (3, 7) for p in [draw((n,)).tolist()] * 4]
    responses = [draw((n,)).tolist() for n in (6, 2, 1, 4, 5, 6, 3, 2)]
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, 2.0, -1.0, 0.0])

    # ours
    model = weights.load_model(base)
    cfg = SimpleNamespace(temperature=temperature, clip=0.2, entropy_coef=0.0)
    rt, policy = runtime.Runtime("cpu", "none", "float32"), roles.Role(model, net=model)
    micros = [
        roles.episode_batch(prompts[p], responses[p], 6) for p in (slice(0, 3), slice(3, 8))
    ]  # cut anywhere
    with torch.no_grad():
        old = torch.cat([policy.logprobs(b, temperature)[0] for b in micros])
    old = old + 0.3 * torch.randn(old.shape, generator=rng)  # ratios on both sides of the clip
    mask, advantages = (
        torch.cat([b["mask"] for b in micros]),
        ppo.group_advantages(rewards, 4, "grpo"),
    )
    for b, p in zip(micros, (slice(0, 3), slice(3, 8)), strict=True):
        b |= dict(old_logprobs=old[p], advantages=(advantages[:, None] * mask)[p])
    stats = ppo.rl_gradient(cfg, rt, policy, None, micros, float(mask.sum()))

    # theirs
    trainer = make(loss_type, temperature)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    left = [torch.tensor([258] * (7 - len(p)) + p) for p in prompts]
    inputs = dict(
        prompt_ids=torch.stack(left),
        prompt_mask=torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts]),
        completion_ids=torch.cat([b["response"] for b in micros]),
        completion_mask=mask.long(),
        old_per_token_logps=old,
        advantages=advantages,
        num_items_in_batch=mask.sum(),
    )
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()

    assert 0.1 < stats["clipfrac"] < 0.9 and abs(loss) > 1e-3
    torch.testing.assert_close(stats["policy_loss"], loss.detach(), rtol=1e-4, atol=1e-6)
    ours, theirs = dict(model.named_parameters()), dict(trainer.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        torch.testing.assert_close(
            p.grad, theirs[name].grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item()
        )
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    assert abs(stats["clipfrac"] - clipped) < 1e-6
