"""Reinforcement learning from a reward: PPO with a critic, or critic-free with algo=grpo and algo=rloo.

An iteration samples responses to prompts, scores them (a reward model, or a Python function), and takes a few clipped policy
steps on them, held near the model it started from by a KL penalty. Two layouts of the models, one loop: full models (policy,
critic, reward, reference; offload=true parks the idle ones in CPU memory), or with lora_rank one frozen trunk under a policy
adapter, a value adapter and a reward adapter, whose reference is the trunk with all adapters off.

    python ppo.py model=out/sft/last reward=out/reward/last data=data/preferences                    # a CPU or one GPU
    python ppo.py model=out/sft/last reward=out/reward/last lora_rank=16 lr=1e-4 data=data/preferences
    python ppo.py model=models/smollm2 reward=prepare/toy.py:three_bullets algo=grpo group=8 data=data/bullets/store
    torchrun --nproc_per_node=8 ppo.py model=out/sft/last reward=out/reward/last data=data/preferences
    PJRT_DEVICE=TPU python ppo.py device=xla parallel=fsdp model=out/sft/last reward=out/reward/last data=data/preferences

Sources: Schulman et al. 2017 (arXiv:1707.06347), Ziegler et al. 2019 (arXiv:1909.08593), Ouyang et al. 2022 (arXiv:2203.02155),
Huang et al. 2024 (arXiv:2403.17031); RLOO: Ahmadian et al. 2024 (arXiv:2402.14740); GRPO: Shao et al. 2024 (arXiv:2402.03300).
"""

import functools
import importlib.util
import math
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import lora
from nano import (
    batches,
    config,
    generate,
    log,
    losses,
    optim,
    roles,
    runtime,
    state,
    store,
    tokenizer,
    weights,
)
from nano.config import (
    Every,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitFloat,
    UserError,
)


@dataclass
class Config:
    # what
    model: str = "out/sft/last"  # the policy to start from, and the reference to stay near
    reward: str = "out/reward/last"  # score model or adapter directory, or file.py:function(prompt, response, finished) -> float
    gold: str = ""  # file.py:function that is only logged: the true reward, when there is one
    data: tuple[str, ...] = (
        "data/preferences",
    )  # prepared folders; the prompts are the tokens before the first target
    out: str = "out/ppo"
    algo: Literal["ppo", "grpo", "rloo"] = "ppo"  # ppo: a critic; grpo, rloo: the group
    # rollouts
    steps: NonNegativeInt = 100  # iterations of rollout and update
    batch_size: PositiveInt = 64  # episodes of one iteration, over all ranks
    group: PositiveInt = 1  # samples of each prompt (grpo and rloo need 2 or more)
    rollout_batch: PositiveInt = 32  # responses that one device generates at the same time
    max_prompt: PositiveInt = 256  # longer prompts are left out
    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 1.0  # of the policy, the behaviour and the reference alike
    # reward
    missing_eos_penalty: float = 1.0  # off the score of a response that did not end
    truncate_at: tuple[
        str, ...
    ] = ()  # a response is cut behind the first of these strings, and pays the next penalty instead
    truncate_penalty: float = 1.0
    score_clip: NonNegativeFloat = 0.0  # scores are cut to +- this; 0: off
    kl_coef: NonNegativeFloat = 0.05  # reward lost per nat of log(policy / reference)
    kl_control: Literal["fixed", "adaptive"] = "fixed"  # adaptive: steer to kl_target
    kl_target: PositiveFloat = 6.0  # nats a response
    kl_horizon: PositiveInt = 10_000  # episodes over which the adaptive controller acts
    gamma: UnitFloat = 1.0  # discount
    lam: UnitFloat = 0.95  # of GAE
    whiten_advantages: bool = True  # ppo only
    whiten_rewards: bool = False  # scale the rewards to variance 1; reported to be harmful
    # update
    ppo_epochs: PositiveInt = 4  # passes over an iteration's episodes
    minibatches: PositiveInt = 1  # optimizer steps of one pass
    micro_batch: PositiveInt = 8  # episodes of one forward on one device
    clip: NonNegativeFloat = 0.2  # of the probability ratio
    value_clip: NonNegativeFloat = 0.2
    entropy_coef: float = 0.0
    target_kl: NonNegativeFloat = (
        0.0  # ends the passes when KL(old, new) per token exceeds it; 0: off
    )
    value_warmup: NonNegativeInt = 0  # iterations that train the critic alone
    ptx_data: tuple[str, ...] = ()  # prepared folders whose next-token loss is mixed in
    ptx_coef: NonNegativeFloat = 0.0  # its weight
    ptx_batch: PositiveInt = 8  # packed rows of it in an optimizer step
    # what is trained
    freeze_layers: NonNegativeInt = 0  # freeze the embeddings and the first N layers
    train: Literal["all", "attention", "qv"] = "all"
    lora_rank: NonNegativeInt = 0  # 0: full models; otherwise one frozen trunk with adapters
    lora_alpha: PositiveFloat = 32.0
    lora_targets: tuple[str, ...] = ("all-linear",)
    # optimizer
    lr: NonNegativeFloat = 1e-6  # of the policy
    value_lr: NonNegativeFloat = 5e-6  # of the critic
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_ratio: UnitFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: NonNegativeFloat = 1.0
    adam_eps: NonNegativeFloat = 1e-5
    # device
    device: str = "auto"
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp", "none"] = "ddp"  # XLA: ddp, fsdp
    tensor: PositiveInt = 1  # neighbouring devices that share each layer (tensor parallel), for models too large for fsdp alone
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients on their way
    compile: bool = False
    grad_checkpoint: bool = False
    offload: bool = False  # full models that are not at work wait in CPU memory; with fsdp, zero2, hsdp: weights and optimizers
    # bookkeeping
    seed: Seed = 0
    resume: Literal["auto", "true", "false"] = "auto"
    save_every: Every = 20  # steps; 0: at the end
    log_every: NonNegativeInt = 1  # steps; 0: the last step only
    sample_every: Every = 10  # 0: never
    samples: NonNegativeInt = 3


# ---------------------------------------------------------------------------------------------- the algorithm, as pure functions
# N episodes, R response tokens: matrices are (N, R), right-padded; mask (N, R) is 1 on the actions, the EOS among them. What
# stands outside the mask counts as zero, even where it is NaN.


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Per-token reward (N, R): -kl_coef * log(policy / reference) at every action, and the score (N,) at the last one.
    The estimator of the KL is k1, the one whose expected reward has the KL's gradient (Ziegler et al. 2019, Eq. 2)."""
    last = (
        mask.long().flip(1).cumsum(1).flip(1) * mask.long() == 1
    )  # (N, R): true at each row's last action
    return torch.where(mask > 0, -kl_coef * (logprobs - ref_logprobs), 0.0) + torch.where(
        last, scores[:, None], 0.0
    )


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, Eq. 16) -> (advantages, returns), both (N, R).
    The value after the last action is 0: a response cut short ends there too."""
    rewards, values = (torch.where(mask > 0, x, 0.0) for x in (rewards, values))
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        after = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        running = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def group_advantages(returns, group, algo):
    """Advantage of each sample over its group's, (N,) -> (N,); samples of one prompt stand side by side.
    rloo: minus the mean of the others. grpo: minus the group's mean, over its standard deviation."""
    r = returns.view(-1, group)
    centred = r - r.mean(1, keepdim=True)
    if algo == "rloo":
        return (centred * group / (group - 1)).flatten()
    return (centred / (r.std(1, keepdim=True) + 1e-4)).flatten()


def policy_loss(new_logprobs, old_logprobs, advantages, mask, clip, count=None):
    """Clipped surrogate (Schulman et al. 2017, Eq. 7), summed over the actions and divided by `count` -> (loss, stats).
    stats: "clipfrac" and "approx_kl" (k3 of old against new), averaged like the loss, and "ratio", its largest distance from 1."""
    count = mask.sum().clamp(min=1) if count is None else count
    log_ratio = torch.where(mask > 0, new_logprobs - old_logprobs, 0.0).clamp(-20, 20)
    advantages, ratio = torch.where(mask > 0, advantages, 0.0), log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    free, held = -advantages * ratio, -advantages * clipped
    loss = torch.maximum(free, held).sum() / count
    with torch.no_grad():
        stats = dict(
            clipfrac=(held > free).sum() / count,
            approx_kl=(ratio - 1 - log_ratio).sum() / count,
            ratio=(ratio - 1).abs().max(),
        )
    return loss, stats


def value_loss(values, old_values, returns, mask, clip, count=None):
    """Half the squared error, the larger of it and that of the value held within `clip` of the old one -> (loss, stats)."""
    count = mask.sum().clamp(min=1) if count is None else count
    values, old_values, returns = (
        torch.where(mask > 0, x, 0.0) for x in (values, old_values, returns)
    )
    held = old_values + (values - old_values).clamp(-clip, clip)
    free, held = (values - returns) ** 2, (held - returns) ** 2
    loss = 0.5 * torch.maximum(free, held).sum() / count
    return loss, dict(clipfrac=(held > free).sum().detach() / count)


class AdaptiveKL:
    """A coefficient that drives the KL to `target` nats an episode (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, init, target, horizon):
        self.coef, self.target, self.horizon = init, target, horizon

    def update(self, kl, episodes):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * episodes / self.horizon
        return self.coef


def variance(x, mask, rt):
    """Over the actions of all ranks (biased)."""
    count = rt.all_sum(mask.sum())
    mean = rt.all_sum((x * mask).sum()) / count
    return rt.all_sum(((x - mean) ** 2 * mask).sum()) / count


def whiten(x, mask, rt, shift_mean=True):
    """losses.masked_whiten over the actions of all ranks."""
    mean = rt.all_sum((x * mask).sum()) / rt.all_sum(mask.sum())
    return (
        (x - mean) * (variance(x, mask, rt) + 1e-8).rsqrt() + (0 if shift_mean else mean)
    ) * mask


# ---------------------------------------------------------------------------------------------- prompts, rewards, warnings


def check(cfg, rt):
    """UserError for settings that do not go together."""
    own = cfg.batch_size // (rt.world * cfg.minibatches)
    if cfg.batch_size % (cfg.minibatches * cfg.micro_batch * rt.shards) or own % cfg.group:
        raise UserError(
            f"batch_size={cfg.batch_size} must be a multiple of minibatches={cfg.minibatches} x micro_batch={cfg.micro_batch} x "
            f"{rt.shards} devices, and a rank's share of a minibatch ({own}) one of group={cfg.group}"
        )
    if cfg.algo != "ppo" and cfg.group < 2:
        raise UserError(
            f"algo={cfg.algo} compares the samples of one prompt: it needs group=2 or more"
        )
    if cfg.algo != "ppo" and cfg.value_warmup:
        raise UserError(
            f"value_warmup={cfg.value_warmup} trains a critic, which algo={cfg.algo} has not: leave it out"
        )
    if cfg.temperature <= 0:
        raise UserError(f"temperature={cfg.temperature}: must be above 0, where samples differ")
    if bool(cfg.ptx_coef) != bool(cfg.ptx_data):
        raise UserError("ptx_data= and ptx_coef= go together: give both or neither")
    if cfg.lora_rank and (cfg.train != "all" or cfg.freeze_layers):
        raise UserError(
            "train= and freeze_layers= choose among the model's own weights: with lora_rank= use lora_targets="
        )
    if cfg.offload and cfg.lora_rank and rt.weight_shards == 1:
        raise UserError(
            "offload=true parks full models, or what fsdp cuts: leave it out with lora_rank= on its own"
        )


def load_function(spec):
    """file.py:function -> the function. The file is the user's own code, run because the command line says so."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"{spec}: give it as file.py:function; there is no such file here")
    found = importlib.util.spec_from_file_location(path, path)
    sys.modules[path] = module = importlib.util.module_from_spec(
        found
    )  # where dataclasses and pickle look it up
    try:
        found.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{spec}: {path} does not run: {type(e).__name__}: {e}") from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"{spec}: {path} has no function {name}")
    return getattr(module, name)


def judge(function, tok, prompts, responses, finished):
    """What a Python function gives each response, (n,) fp32. UserError where it fails, or gives no finite number: that would make
    every weight NaN."""
    name, scores = getattr(function, "__name__", function), []
    for prompt, response, f in zip(prompts, responses, finished.tolist(), strict=True):
        try:
            scores.append(float(function(tok.decode(prompt), tok.decode(response), f > 0)))
        except Exception as e:
            at = traceback.extract_tb(e.__traceback__)[-1]
            raise UserError(
                f"the function {name} failed in {at.filename}:{at.lineno}: {type(e).__name__}: {e}"
            ) from None
        if not math.isfinite(scores[-1]):
            raise UserError(
                f"the function {name} gave {scores[-1]} for the response {tok.decode(response)!r}"
            )
    return torch.tensor(scores)


def prompts_of(cfg, tok):
    """(the prompts of the prepared folders as lists of ids: each row's tokens before its first target, every prompt once; how many
    are left out as too long)."""
    rows = store.mix(cfg.data, seed=cfg.seed, tokenizer=tok)
    prompts = (
        tuple(tokens[: int(mask.argmax())].tolist())
        for tokens, mask in map(rows.row, range(len(rows)))
    )
    prompts = [list(prompt) for prompt in dict.fromkeys(prompts) if prompt]
    short = [prompt for prompt in prompts if len(prompt) <= cfg.max_prompt]
    if not short:
        raise UserError(
            f"{', '.join(cfg.data)}: no prompt has between 1 and max_prompt={cfg.max_prompt} tokens"
        )
    return short, len(prompts) - len(short)


@functools.lru_cache(2)
def order(count, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(count)


def pick(prompts, position, seed):
    """The prompt at a position of an endless sequence of shuffled passes over all of them: a function of the seed alone."""
    epoch, i = divmod(position, len(prompts))
    return prompts[order(len(prompts), epoch, seed)[i]]


def cut_at(strings, tok, tokens):
    """(tokens up to the one that completes the first of `strings`, whether one was found)."""
    if any(s in tok.decode(tokens) for s in strings):
        n = next(
            n
            for n in range(1, len(tokens) + 1)
            if any(s in tok.decode(tokens[:n]) for s in strings)
        )
        return tokens[:n], True
    return tokens, False


def correlation(x, y, mean):
    """Pearson's, over all episodes; 0 where one of them does not vary."""
    x, y = x.double() - mean(x.double()), y.double() - mean(y.double())
    scale = (mean(x**2) * mean(y**2)) ** 0.5
    return mean(x * y) / scale if scale > 1e-9 else 0.0


def diseases(now, first):
    """What experience says is going wrong, in words. now, first: the metrics of this iteration and of the first one."""
    if now["kl"] < -0.5:
        yield "the KL is negative: sampling and log-probabilities disagree (a filter, a temperature, dropout?)"
    if now["length"] > 1.5 * first["length"] and now["length_reward_corr"] > 0.5:
        yield "responses grow and the reward follows their length: the reward may be paying for length"
    if (
        "gold" in now
        and now["reward"] > first["reward"] + 0.5
        and now["gold"] < first["gold"] - 0.25
    ):
        yield "the reward rises while gold falls: the policy exploits the reward model; raise kl_coef or stop earlier"
    if now["entropy"] < 0.2 * first["entropy"]:
        yield "the entropy has collapsed: samples hardly differ any more; lower lr or raise kl_coef or entropy_coef"
    if now["eos_rate"] < first["eos_rate"] - 0.3:
        yield "responses stop ending: raise missing_eos_penalty or max_new_tokens"


# ---------------------------------------------------------------------------------------------- gradients


def rl_gradient(cfg, rt, policy, critic, micros, count):
    """Adds the gradient of a minibatch, given as micro-batches: of the policy's loss and the critic's (None: not trained now).
    count: its actions on all ranks. -> this rank's part of the stats."""
    parts = []
    for i, b in enumerate(micros):
        last, part = i == len(micros) - 1, {}
        if policy:
            rt.accumulate(last, policy.net)
            with rt.autocast():
                new_logprobs, entropy = policy.logprobs(b, cfg.temperature, training=True)
                loss, part = policy_loss(
                    new_logprobs, b["old_logprobs"], b["advantages"], b["mask"], cfg.clip, count
                )
            rt.backward(loss - cfg.entropy_coef * entropy.sum() / count)
            part["policy_loss"] = loss.detach()
        if critic:
            rt.accumulate(last, critic.net)
            with rt.autocast():
                new_values = critic.values(b, training=True)
                loss, clipped = value_loss(
                    new_values, b["old_values"], b["returns"], b["mask"], cfg.value_clip, count
                )
            rt.backward(loss)
            part |= dict(value_loss=loss.detach(), value_clipfrac=clipped["clipfrac"])
        parts.append(part)
    return {
        k: max(p[k] for p in parts) if k == "ratio" else sum(p[k] for p in parts) for k in parts[0]
    }


def ptx_gradient(cfg, rt, policy, other, update):
    """Adds ptx_coef times the gradient of the next-token loss on a batch of other text (Ouyang et al. 2022, Eq. 2) -> the loss."""
    micros = other.batch(update)
    count = rt.all_sum(sum(float(m["weights"].sum()) for m in micros))
    total = 0.0
    for i, micro in enumerate(micros):
        rt.accumulate(i == len(micros) - 1, policy.net)
        b = rt.put(micro)
        with rt.autocast():
            hidden = policy.hidden(b, training=True)
            targets, weights = (b[key].flatten()[b["index"]] for key in ("targets", "weights"))
            loss = losses.cross_entropy(hidden, policy.model.head_weight, targets, weights) / max(
                count, 1e-9
            )
        rt.backward(cfg.ptx_coef * loss)
        total = total + loss.detach()
    return total


# ---------------------------------------------------------------------------------------------- the loop


def main(cfg):
    # ------------------------------------------------------------------------------------------ setup
    rt = runtime.start(cfg)
    rt.catch_signals()
    check(cfg, rt)
    out = Path(cfg.out)
    resume = state.resumes(out, cfg.resume, rt, cfg.model, cfg.reward)
    reward_function = load_function(cfg.reward) if ".py:" in cfg.reward else None
    gold_function = load_function(cfg.gold) if cfg.gold else None

    # ------------------------------------------------------------------------------------------ models, data, optimizers
    base = weights.base_of(cfg.model)
    tok = tokenizer.load(base, store.chat_template(cfg.data) or weights.chat_template(cfg.model))
    prompts, too_long = prompts_of(cfg, tok)
    if cfg.compile:  # round to bf16 where eager code does: or else graphs with and without gradients differ by tenths of a nat
        torch._inductor.config.emulate_precision_casts = True
    policy, reference, scorer, critic = roles.build(cfg, tok)
    tok.check_embeddings(policy.model.cfg.vocab_size, base)
    models = {
        id(role.model): role.model for role in (policy, reference, scorer, critic) if role
    }.values()
    for model in models:
        rt.place(model, cfg.compile, cfg.grad_checkpoint)
    learners = {"policy": policy} | ({"value": critic} if critic else {})
    optimizers = {
        name: role.learn(rt, cfg.weight_decay, cfg.adam_eps) for name, role in learners.items()
    }
    parking = roles.Parking(
        cfg.offload and rt.weight_shards == 1 and rt.kind != "cpu",
        rt.device,
        [*models, *optimizers.values()],
    )
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)

    own = cfg.batch_size // (rt.world * cfg.minibatches)  # episodes of this rank in one minibatch,
    micro_batch = cfg.micro_batch * rt.shards // rt.world  # and in one micro-batch
    static_length = (
        max(map(len, prompts)) + cfg.max_new_tokens if rt.static_shapes or cfg.compile else 0
    )
    ptx = None
    if cfg.ptx_coef:
        rows, size = (
            store.mix(cfg.ptx_data, seed=cfg.seed, tokenizer=tok),
            min(micro_batch, cfg.ptx_batch // rt.world),
        )
        cut = dict(max_length=cfg.max_prompt + cfg.max_new_tokens, rank=rt.rank, world=rt.world)
        cut["fixed_shapes"] = rt.static_shapes
        ptx = batches.Rows(rows, cfg.ptx_batch, size, seed=cfg.seed, **cut)

    # ------------------------------------------------------------------------------------------ resume
    trained = {f"{name}:{n}": p for name, role in learners.items() for n, p in role.params.items()}
    start, updates, first, warned = 0, 0, None, []
    if resume:
        meta, _ = state.load_training(out / "state", rt, "ppo", trained, optimizers)
        start, updates, first, warned = meta["step"], meta["updates"], meta["first"], meta["warned"]
        controller.coef = meta["kl_coef"]
    logger = log.Log(out, rt.is_main, cfg.steps, start, device=rt.name, devices=rt.devices)
    logger.settings("ppo", cfg, resume)
    counts = ", ".join(
        f"{name} {sum(p.numel() for p in role.params.values()):,}"
        for name, role in learners.items()
    )
    left_out = f" ({too_long:,} over max_prompt left out)" if too_long else ""
    logger.text(
        f"{len(prompts):,} prompts{left_out}; trained parameters: {counts}; {rt.devices} x {rt.name}, {rt.dtype}"
    )

    def save(step):
        tensors = rt.full(policy.params if cfg.lora_rank else dict(policy.model.named_parameters()))
        if rt.is_main and cfg.lora_rank:
            weights.save_adapter(
                policy.model, out / "last", "policy", base=base, tensors=tensors, tok=tok
            )
        elif rt.is_main:
            weights.save_model(
                policy.model, out / "last", rt.dtype, like=base, tensors=tensors, tok=tok
            )
        meta = dict(step=step, updates=updates, first=first, warned=warned, kl_coef=controller.coef)
        state.save_training(out / "state", rt, "ppo", trained, optimizers, **meta)

    def mean(x):
        """Over the episodes of all ranks."""
        return rt.all_sum(x.sum()) / cfg.batch_size

    # ------------------------------------------------------------------------------------------ loop
    tokens = 0  # of responses, since the last line of the log
    stop = False
    for step in range(start, cfg.steps + 1):
        stop = rt.should_stop()
        if step > start and (
            stop or step == cfg.steps or step % (cfg.save_every or cfg.steps) == 0
        ):
            with logger.paused():
                save(step)
        if stop or step == cfg.steps:
            break
        clock = runtime.Clock(rt)

        # 1. roll out this rank's episodes: of every minibatch an equal share, in whole groups
        episodes = [
            (m * rt.world + rt.rank) * own + i for m in range(cfg.minibatches) for i in range(own)
        ]
        asked = [
            pick(prompts, (step * cfg.batch_size + e) // cfg.group, cfg.seed) for e in episodes
        ]
        lora.use(policy.model, policy.adapter)
        with clock("rollout"), parking(policy), rt.autocast():
            made = generate.generate(
                policy.model,
                asked[:: cfg.group],
                cfg.max_new_tokens,
                cfg.temperature,
                stop_ids=tok.stop_ids,
                group=cfg.group,
                seed=(cfg.seed, step),
                sample_ids=episodes,
                batch_size=cfg.rollout_batch * rt.shards // rt.world,
                step_hook=rt.sync,
            )
        if (
            stop := rt.should_stop()
        ):  # an iteration is a function of the state and its number: a resume rolls it out again
            save(step)
            break
        answers, truncated = zip(
            *(cut_at(cfg.truncate_at, tok, tokens) for tokens in made.tokens), strict=True
        )
        truncated = torch.tensor(truncated)
        finished = (torch.tensor(made.finished) & ~truncated).float()

        # 2. cut the micro-batches once: old and new log-probabilities come from the same shapes, so that the first ratio is 1
        pieces = [slice(i, i + micro_batch) for i in range(0, len(episodes), micro_batch)]
        micros = [
            roles.episode_batch(asked[p], answers[p], cfg.max_new_tokens, static_length)
            for p in pieces
        ]
        mask = torch.cat([b["mask"] for b in micros])
        micros = [rt.put(b) for b in micros]

        # 3. score; log-probabilities and values by the forward that training uses. (n, R) matrices live on the CPU
        with torch.no_grad():
            with clock("score"), parking(scorer), rt.autocast():
                if reward_function:
                    scores = rt.once(judge, reward_function, tok, asked, answers, finished)
                else:
                    scores = torch.cat([rt.host(scorer.scores(b)) for b in micros])
            with (
                clock("logprobs"),
                parking(policy),
                rt.autocast(),
                torch.set_grad_enabled(cfg.compile),
            ):
                parts = [[rt.host(x) for x in policy.logprobs(b, cfg.temperature)] for b in micros]
                rollout_logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
            with clock("logprobs"), parking(reference), rt.autocast():
                ref_logprobs = torch.cat(
                    [rt.host(reference.logprobs(b, cfg.temperature)[0]) for b in micros]
                )
            if critic:
                with clock("values"), parking(critic), rt.autocast():
                    values = torch.cat([rt.host(critic.values(b)) for b in micros])
        log_ratio = rollout_logprobs - ref_logprobs
        if (
            step == 0
            and not (cfg.compile or rt.static_shapes)
            and not log_ratio.abs().max() <= 1e-6
        ):
            raise RuntimeError(
                f"before the first update log(policy / reference) is {log_ratio.abs().max():.2g}, not 0"
            )

        # 4. rewards: the score at the last action, less what a bad end costs, and the KL at every action
        reward = scores.clamp(-cfg.score_clip, cfg.score_clip) if cfg.score_clip else scores
        reward = reward - torch.where(
            truncated, cfg.truncate_penalty, cfg.missing_eos_penalty * (1 - finished)
        )
        rewards = shape_rewards(reward, rollout_logprobs, ref_logprobs, mask, controller.coef)
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, rt, shift_mean=False)

        # 5. advantages
        fixed = dict(old_logprobs=rollout_logprobs)
        if critic:
            fixed["old_values"] = values
            fixed["advantages"], fixed["returns"] = gae(rewards, values, mask, cfg.gamma, cfg.lam)
            if cfg.whiten_advantages:
                fixed["advantages"] = whiten(fixed["advantages"], mask, rt)
        else:
            fixed["advantages"] = (
                group_advantages(rewards.sum(1), cfg.group, cfg.algo)[:, None] * mask
            )
        micros = [
            b | rt.put({name: x[p] for name, x in fixed.items()})
            for b, p in zip(micros, pieces, strict=True)
        ]

        # 6. update: several passes over the minibatches, each in an order of its own
        lrs, warmup = dict(policy=cfg.lr, value=cfg.value_lr), round(cfg.warmup_ratio * cfg.steps)
        for name, optimizer in optimizers.items():
            optim.set_lr(
                optimizer, optim.lr_at(step, cfg.steps, lrs[name], cfg.schedule, warmup, cfg.min_lr)
            )
        active = {
            name: role
            for name, role in learners.items()
            if name == "value" or step >= cfg.value_warmup
        }
        shuffle = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        stats = []
        with clock("update"), parking(*active.values(), *optimizers.values()):
            for _ in range(cfg.ppo_epochs):
                for m in torch.randperm(cfg.minibatches, generator=shuffle).tolist():
                    batch = micros[m * own // micro_batch : (m + 1) * own // micro_batch]
                    count = rt.all_sum(float(mask[m * own : (m + 1) * own].sum()))
                    found = rl_gradient(cfg, rt, active.get("policy"), critic, batch, count)
                    if ptx and "policy" in active:
                        found["ptx_loss"] = ptx_gradient(cfg, rt, policy, ptx, updates)
                    if not stats and not found.get("ratio", 0.0) <= 1e-3 and not rt.static_shapes:
                        raise RuntimeError(
                            f"step {step}: the first minibatch's ratios differ from 1 by {found['ratio']:.2g}"
                        )
                    for name, role in active.items():
                        found[f"{name}_grad_norm"] = optim.clip_(
                            role.params.values(), cfg.grad_clip
                        )
                        optimizers[name].step()
                        optimizers[name].zero_grad(set_to_none=True)
                    rt.sync()
                    stats.append(found)
                    updates += 1
                kl_of_pass = (
                    sum(x.get("approx_kl", 0.0) for x in stats[-cfg.minibatches :])
                    / cfg.minibatches
                )
                if cfg.target_kl and rt.all_sum(kl_of_pass) > cfg.target_kl:
                    break

        # 7. what the iteration was like, and the KL controller
        length = mask.sum(1)
        metrics = dict(reward=mean(scores))
        if gold_function:
            metrics["gold"] = mean(rt.once(judge, gold_function, tok, asked, answers, finished))
        metrics |= dict(
            kl=mean(log_ratio),
            kl_k3=mean((-log_ratio).exp() - 1 + log_ratio),
            kl_coef=controller.coef,
            entropy=mean(entropy) / mean(mask),
            length=mean(length),
            eos_rate=mean(finished),
            length_reward_corr=correlation(length, scores, mean),
        )
        if critic:
            returns = fixed["returns"]
            metrics["explained_variance"] = 1 - variance(returns - values, mask, rt) / variance(
                returns, mask, rt
            ).clamp(min=1e-8)
        metrics["first_ratio_off"] = stats[0].pop("ratio", 0.0)
        for name in stats[0]:
            total = sum(x[name] for x in stats) / len(stats)
            metrics[name] = total if name.endswith("_norm") else rt.all_sum(total)
        metrics |= dict(updates=len(stats), lr=optimizers["policy"].param_groups[0]["lr"])
        metrics = {name: float(x) for name, x in metrics.items()}
        if cfg.kl_control == "adaptive" and "policy" in active:
            controller.update(metrics["kl"], cfg.batch_size)
        first = first or metrics

        tokens += int(rt.all_sum(mask.sum()))
        if (step + 1) % (cfg.log_every or cfg.steps) == 0 or step + 1 == cfg.steps:
            seconds = {f"{phase}_s": seconds for phase, seconds in clock.seconds.items()}
            logger.step(
                step + 1,
                tokens=tokens,
                memory=rt.peak_memory(),
                **metrics,
                **seconds,
                **rt.compiles(),
            )
            tokens = 0
        if cfg.sample_every and (step == 0 or (step + 1) % cfg.sample_every == 0):
            shown = zip(
                asked[: cfg.samples],
                answers,
                scores.tolist(),
                log_ratio.sum(1).tolist(),
                strict=False,
            )
            rows = [
                dict(prompt=tok.decode(a), response=tok.decode(r), reward=s, kl=k)
                for a, r, s, k in shown
            ]
            logger.samples(step + 1, rows)
        for disease in diseases(metrics, first):
            if disease not in warned:
                warned.append(disease)
                logger.text(f"warning at step {step + 1}: {disease}")

    if stop:
        logger.text(
            f"stopped at step {step}: the same command continues from here, unless it says resume=false"
        )
    elif start >= cfg.steps and resume:
        logger.text(
            f"{out} stands at step {start} already: more steps= go on, resume=false starts anew"
        )
    logger.close()
    rt.close()


if __name__ == "__main__":
    config.run(main, Config)
