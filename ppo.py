"""Reinforcement learning from a reward: PPO with a critic, or without one (algo=grpo, algo=rloo).

An iteration samples responses to prompts, scores them with a reward model or a Python function,
and takes a few clipped policy steps on them. A KL penalty holds the policy near the model it
started from. The models are four full ones, or with lora_rank one frozen trunk under adapters.

    python ppo.py model=out/sft/last reward=out/reward/last data=data/hh          # CPU or one GPU
    python ppo.py model=out/sft/last reward=out/reward/last data=data/hh lora_rank=16 lr=1e-4
    python ppo.py reward=bullets data=data/bullets algo=grpo group=8
    python ppo.py 'reward=[a.py:f,b.py:g]' 'reward_weights=[1,0.2]' data=data/hh  # their sum
    torchrun --nproc_per_node=8 ppo.py model=out/sft/last reward=out/reward/last data=data/hh
    PJRT_DEVICE=TPU python ppo.py device=xla parallel=fsdp model=out/sft/last data=data/hh

Sources: Schulman et al. 2017 (arXiv:1707.06347), Ziegler et al. 2019 (arXiv:1909.08593), Ouyang et
al. 2022 (arXiv:2203.02155), Huang et al. 2024 (arXiv:2403.17031); RLOO: Ahmadian et al. 2024
(arXiv:2402.14740); GRPO: Shao et al. 2024 (arXiv:2402.03300), Liu et al. 2025 (arXiv:2503.20783),
Yu et al. 2025 (arXiv:2503.14476).
"""

import contextlib
import functools
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
import torch

import lora
from model import ScoreHead
from nano import (
    batches,
    config,
    evaluation,
    families,
    files,
    functions,
    generate,
    losses,
    optim,
    quant,
    runtime,
    store,
    tokenizer,
    weights,
)
from nano.config import (
    Every,
    FourBit,
    Fraction,
    Full,
    LoRA,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Seed,
    Temperature,
    UnitFloat,
    UserError,
    With,
    Without,
)
from nano.run import Run

# annotations of keys that have an effect only with a critic, a KL penalty or adaptive KL
T = TypeVar("T")
Critic = Annotated[T, With("advantage", "gae")]
Penalised = Annotated[T, Without("kl_in", "none"), With("kl_coef")]
Adaptive = Annotated[T, With("kl_control", "adaptive")]


@dataclass
class Config:
    # what
    model: PathText = "out/sft/last"  # the policy to start from, and the reference to stay near
    base: PathText | None = None  # for adapters in model= and reward=: the model to put them on
    # one score model or adapter, functions file.py:function of your own, tasks (tasks/): their sum
    reward: tuple[PathText, ...] = ("out/reward/last",)
    reward_weights: tuple[float, ...] = ()  # of each reward in the sum; []: 1
    reward_special: bool = False  # functions see the names of control tokens in prompt and response
    gold: PathText = ""  # file.py:function that is only logged: the true reward, when there is one
    data: tuple[PathText, ...] = ("data/preferences",)  # prepared folders, for their prompts
    out: PathText = "out/ppo"  # run folder
    # rollouts
    steps: NonNegativeInt = 100  # iterations of rollout and update
    batch_size: PositiveInt = 64  # episodes of one iteration, over all ranks
    group: PositiveInt = 1  # samples of each prompt; all but advantage=gae need 2 or more
    rollout_batch: PositiveInt = 32  # responses that one device generates at the same time
    max_prompt: PositiveInt = 256  # longer prompts are left out
    max_new_tokens: PositiveInt = 128  # of a response
    temperature: Temperature = 1.0  # of sampling, and of all log-probabilities
    # reward
    missing_eos_penalty: float = 1.0  # off the score of a response that did not end
    truncate_at: tuple[str, ...] = ()  # a response ends behind the first of these strings
    truncate_penalty: Annotated[float, With("truncate_at")] = 1.0  # instead of the other one
    score_clip: NonNegativeFloat = 0.0  # scores are clipped to +- this; 0: off
    kl_in: Literal["reward", "loss", "none"] = "reward"  # what the KL is added to; loss: as in GRPO
    kl_coef: Annotated[NonNegativeFloat, Without("kl_in", "none")] = 0.05  # price of a nat
    kl_control: Penalised[Literal["fixed", "adaptive"]] = "fixed"
    kl_target: Adaptive[PositiveFloat] = 6.0  # nats a response that adaptive steers to
    kl_horizon: Adaptive[PositiveInt] = 10_000  # episodes over which the adaptive controller acts
    log_kl: bool = False  # log the KL also with kl_coef=0 or kl_in=none, which need no reference
    # advantage
    # gae: over a critic's prediction; group, group_std, rloo: over samples of the same prompt
    advantage: Literal["gae", "group", "group_std", "rloo"] = "gae"
    gamma: Critic[UnitFloat] = 1.0  # discount
    lam: Critic[UnitFloat] = 0.95  # bias against variance
    whiten_advantages: Critic[bool] = True  # mean 0 and variance 1 over all actions
    whiten_rewards: Critic[bool] = False  # rewards of variance 1; reported to be harmful
    # update
    ppo_epochs: PositiveInt = 4  # passes over an iteration's episodes
    minibatches: PositiveInt = 1  # optimizer steps of one pass
    micro_batch: PositiveInt = 8  # episodes of one forward on one device
    # the policy's loss is a mean over all tokens; in each sample, then over samples; or the sum
    # divided by batch_size x max_new_tokens
    loss_mean: Literal["tokens", "samples", "constant"] = "tokens"
    clip: NonNegativeFloat = 0.2  # of the probability ratio
    clip_high: NonNegativeFloat = 0.0  # of the ratio above 1; 0: the same as clip
    value_clip: Critic[NonNegativeFloat] = 0.2  # of the distance from the old value; 0: off
    entropy_coef: float = 0.0  # bonus for a nat of entropy
    aux_coef: NonNegativeFloat = 0.0  # of the loss that balances the policy's mixture of experts
    replay_experts: bool = False  # updates keep the experts that a token took before them
    target_kl: NonNegativeFloat = 0.0  # KL(old, new) a token that ends the passes; 0: off
    value_warmup: Critic[NonNegativeInt] = 0  # iterations that train the critic alone
    ptx_data: Annotated[
        tuple[PathText, ...], With("ptx_coef")
    ] = ()  # folders for a next-token loss
    ptx_coef: Annotated[NonNegativeFloat, With("ptx_data")] = 0.0  # its weight
    ptx_batch: Annotated[PositiveInt, With("ptx_data")] = 8  # packed rows a step
    # what is trained
    train: Full[Literal["all", "attention", "qv"]] = "all"  # which of the model's own weights
    freeze_layers: Full[NonNegativeInt] = 0  # freeze the embeddings and the first N layers
    lora_rank: NonNegativeInt = 0  # 0: full models; otherwise one frozen trunk with adapters
    lora_alpha: LoRA[PositiveFloat] = 32.0
    # suffixes of layer names; all-linear: all but the head and experts
    lora_targets: LoRA[tuple[str, ...]] = ("all-linear",)
    lora_rslora: LoRA[bool] = False  # scale alpha / sqrt(rank) instead of alpha / rank
    quant: LoRA[Literal["none", "nf4", "fp4", "int8"]] = "none"  # of frozen matrices (QLoRA)
    double_quant: FourBit[bool] = True  # 4.1 bits a weight, not 4.5: scales in 8 bits
    quant_kernel: FourBit[Literal["auto", "torch", "bitsandbytes"]] = "auto"  # what dequantises
    # no lora_dropout: the ratio compares two forwards, which must drop nothing
    # optimizer
    lr: NonNegativeFloat = 1e-6  # of the policy
    value_lr: Critic[NonNegativeFloat] = 5e-6  # of the critic
    min_lr: Annotated[NonNegativeFloat, Without("schedule", "constant")] = 0.0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    warmup_ratio: UnitFloat = 0.0  # of all steps
    warmup_steps: NonNegativeInt = 0  # if set, instead of warmup_ratio
    weight_decay: NonNegativeFloat = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    adam_eps: NonNegativeFloat = 1e-5
    grad_clip: NonNegativeFloat = 1.0  # global norm; 0: off
    # steps in a row that NaN or infinity in the gradient may take before the run fails; 0: any
    bad_steps: NonNegativeInt = 3
    # device
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    parallel: Literal["ddp", "fsdp", "zero2", "hsdp", "none"] = "ddp"  # XLA: ddp, fsdp
    tensor: PositiveInt = 1  # neighbouring devices that share each layer (tensor parallel)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the matrix work
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients on their way
    compile: bool = False  # torch.compile each layer: faster after half a minute
    grad_checkpoint: bool = False  # recompute activations: about 20% slower, a third of the memory
    # full models that are not at work wait in CPU memory; with fsdp, zero2, hsdp: weights and
    # optimizers
    offload: bool = False
    # bookkeeping
    seed: Seed = 0
    resume: Literal["auto", "true", "false", "anyway"] = "auto"  # anyway: on other data too
    save_every: Every = 20  # steps; 0: one pass over the prompts, -1: at the end
    keep_last: NonNegativeInt = 0  # saves that stay as step-N/ beside last/
    log_every: NonNegativeInt = 1  # steps; 0: the last step only
    track: str = ""  # wandb:PROJECT or trackio:PROJECT beside TensorBoard
    sample_every: Every = 10  # steps; 0: one pass over the prompts, -1: never
    samples: NonNegativeInt = 3  # responses shown each time
    # tasks (files of tasks/) that are measured at every evaluation, from step 0 on
    eval_every: Annotated[Every, With("eval_tasks")] = 0  # steps; 0: one pass, -1: never
    eval_tasks: tuple[str, ...] = ()  # names, or NAME:PART
    eval_shots: Annotated[evaluation.Shots, With("eval_tasks")] = (0,)  # one number, or one a task
    # local files in the place of the hub's, one a task; "": the hub
    eval_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_shot_files: Annotated[tuple[str, ...], With("eval_tasks")] = ()
    eval_limit: Annotated[NonNegativeInt, With("eval_tasks")] = 200  # records of a task; 0: all
    keep: Annotated[str, With("eval_tasks")] = ""  # TASK/METRIC, whose highest value makes best/

    PRESETS: ClassVar[dict] = {
        "algo": {
            "ppo": dict(advantage="gae", kl_in="reward", loss_mean="tokens"),
            "rloo": dict(advantage="rloo", kl_in="reward", loss_mean="tokens"),
            "grpo": dict(advantage="group_std", kl_in="loss", loss_mean="tokens"),
        }
    }

    @property
    def reward_model(self):
        """The score model or adapter among the rewards, or None."""
        return next((spec for spec in self.reward if not functions.is_function(spec)), None)

    @property
    def has_critic(self):
        return self.advantage == "gae"

    @property
    def has_kl(self):
        """Whether the KL to the reference acts on the policy."""
        return self.kl_in != "none" and self.kl_coef > 0

    @property
    def has_reference(self):
        return self.has_kl or self.log_kl

    @staticmethod
    def upgrade(lines):
        """The lines of a .cfg file as they mean today.

        The config.cfg of a first-edition run is known by holding both algo= and resume=. There
        sample_every=0 meant never, and save_every=0 meant at the end only.
        """
        keys = {line.partition("=")[0] for _, line in lines}
        if not {"algo", "resume"} <= keys:
            return lines
        today = {"sample_every=0": "sample_every=-1", "save_every=0": "save_every=-1"}
        for where, line in lines:
            if line in today:
                print(f"note: {where}{line} of the first edition is read as {today[line]}")
        return [(where, today.get(line, line)) for where, line in lines]


# ----------------------------------------------------------------- the algorithm, as pure functions
# N episodes of up to R actions: matrices are (N, R), right-padded. Column k holds an episode's k-th
# action, whichever of its tokens that is. mask (N, R) is 1 on the actions, the EOS among them. What
# stands outside the mask counts as zero, even where it is NaN. The losses take any shape, so the
# update feeds them flat.


def shape_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Reward of each action (N, R): -kl_coef * log(policy / reference), and at the last one the
    score (N,) too. This estimator of the KL is k1, whose expected reward has the KL's gradient
    (Ziegler et al. 2019, Eq. 2)."""
    actions_left = mask.long().flip(1).cumsum(1).flip(1) * mask.long()
    kl = torch.where(mask > 0, logprobs - ref_logprobs, 0.0)
    return -kl_coef * kl + torch.where(actions_left == 1, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, Eq. 16) ->
    (advantages, returns), both (N, R). The value after the last action is 0, also where the
    response was cut off."""
    rewards = torch.where(mask > 0, rewards, 0.0)
    values = torch.where(mask > 0, values, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values


def group_advantages(scores, group, how):
    """Advantage of each sample over its group's, (N,) -> (N,). The samples of one prompt stand side
    by side.

    group: less the group's mean (Liu et al. 2025). group_std: that over the group's standard
    deviation (Shao et al. 2024). rloo: less the mean of the others (Ahmadian et al. 2024). Equal
    scores give exactly 0. A sample without a score, NaN, is left out of its group and gets 0, and
    so does a sample that is alone. The scores must not hold the KL yet: see
    `penalised_advantages`."""
    scores = scores.view(-1, group)
    scored = ~scores.isnan()
    count = scored.sum(1, keepdim=True)
    # the mean of equal numbers is not quite that number in fp32
    first = scores.gather(1, scored.int().argmax(1, keepdim=True))
    scores = torch.where(scored, scores - first, 0.0)
    advantages = torch.where(scored, scores - scores.sum(1, keepdim=True) / count, 0.0)
    if how == "group_std":
        variance = (advantages**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    elif how == "rloo":
        advantages = advantages * (count / (count - 1).clamp(min=1))
    return advantages.flatten()


def penalised_advantages(scores, kl, group, how, kl_coef):
    """group_advantages of the scores (N,), less kl_coef times each sample's KL (N,) over its
    group's.

    Only the scores are normalised. In a group of equal scores the KL is all that varies, and a
    division by its deviation would blow it up to size 1, whatever kl_coef is."""
    baseline = "rloo" if how == "rloo" else "group"
    kl = kl.masked_fill(scores.isnan(), torch.nan)  # the same samples are left out
    return group_advantages(scores, group, how) - kl_coef * group_advantages(kl, group, baseline)


def total_score(parts, weights):
    """Weighted sum (N,) of rewards, each (N,). NaN, of a reward that does not judge a response,
    counts nothing. A response that no reward with a weight judges has NaN. UserError for a sum
    beyond float32."""
    parts = torch.stack(parts)
    total = (torch.tensor(weights)[:, None] * parts.nan_to_num(0.0)).sum(0)
    if not total.isfinite().all():
        raise UserError("the sum of the rewards is beyond float32: lower reward_weights=")
    judged = ~parts[torch.tensor(weights) != 0].isnan()
    return total.masked_fill(~judged.any(0), torch.nan)


def k3(logprobs, ref_logprobs, mask):
    """Estimate of KL(policy, reference) at each action, never negative: exp(d) - 1 - d, d =
    log(reference / policy) (Schulman 2020, http://joschu.net/blog/kl-approx.html; Shao et al. 2024,
    Eq. 4)."""
    log_ratio = torch.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return log_ratio.exp() - 1 - log_ratio


def loss_weights(mask, loss_mean, count, episodes, max_new_tokens):
    """What each action of some episodes weighs in the mean over a minibatch, (N, R).

    tokens: all actions alike, 1 / count (trl's dapo). samples: all episodes alike, so the actions
    of a long one count less (trl's grpo). constant: 1 / (episodes * max_new_tokens), whatever the
    lengths (trl's dr_grpo). count, episodes: of the minibatch, over all ranks."""
    if loss_mean == "tokens":
        return mask / count
    if loss_mean == "samples":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / episodes
    return mask / (episodes * max_new_tokens)


def policy_loss(
    new_logprobs, old_logprobs, advantages, mask, clip, clip_high=0.0, weights=None, count=None
):
    """Clipped surrogate (Schulman et al. 2017, Eq. 7) -> (loss, stats).

    The ratio is clipped to [1 - clip, 1 + clip_high]; clip_high=0 means clip. weights: see
    loss_weights; default: the mean over the mask. count: the number of actions by which the stats
    are divided; default: the mask's. stats: "clipfrac", "approx_kl" (k3 of old against new), and
    "ratio", its largest distance from 1."""
    count = mask.sum().clamp(min=1) if count is None else count
    weights = mask / count if weights is None else weights
    log_ratio = torch.where(mask > 0, new_logprobs - old_logprobs, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    advantages = torch.where(mask > 0, advantages, 0.0)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + (clip_high or clip))
    loss = (weights * torch.maximum(free, clipped)).sum()
    with torch.no_grad():
        stats = dict(
            clipfrac=(clipped > free).sum() / count,
            approx_kl=(ratio - 1 - log_ratio).sum() / count,
            ratio=(ratio - 1).abs().max(),
        )
    return loss, stats


def value_loss(values, old_values, returns, mask, clip, count=None):
    """Half the squared error, or that of the value held within `clip` of the old one if it is
    larger; the mean over the actions -> (loss, stats). count: as in policy_loss."""
    count = mask.sum().clamp(min=1) if count is None else count
    values = torch.where(mask > 0, values, 0.0)
    old_values = torch.where(mask > 0, old_values, 0.0)
    returns = torch.where(mask > 0, returns, 0.0)
    near = old_values + (values - old_values).clamp(-clip, clip) if clip else values
    free = (values - returns) ** 2
    clipped = (near - returns) ** 2
    loss = 0.5 * torch.maximum(free, clipped).sum() / count
    return loss, dict(clipfrac=(clipped > free).sum().detach() / count)


class AdaptiveKL:
    """A coefficient that drives the KL to `target` nats an episode (Ziegler et al. 2019, section
    2.2)."""

    def __init__(self, init, target, horizon):
        self.coef = init
        self.target = target
        self.horizon = horizon

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
    """x (N, R) scaled to variance 1 over the actions of all ranks and, with shift_mean, to mean
    0."""
    mean = rt.all_sum((x * mask).sum()) / rt.all_sum(mask.sum())
    scaled = (x - mean) * (variance(x, mask, rt) + 1e-8).rsqrt()
    return (scaled if shift_mean else scaled + mean) * mask


# -------------------------------------------------------------------------- the four models of RLHF
# The policy is the language model that learns: it writes the responses, and its weights are the
# result. The reference is the policy as it was at the start: log(policy / reference) says how far
# the policy has moved, and the KL penalty makes every nat of that cost something, so that the
# policy does not leave the texts on which the reward model can be trusted. The reward model (here
# "scorer") reads a whole response and gives it one number, at its last token; a Python function can
# take its place. The critic looks at the response before each action and predicts the reward to
# come: an action is good when things went better than it predicted. Without a critic the other
# samples of the same prompt say what was to be expected.
#
# Two layouts. Full: each of the four is a model of its own. With lora_rank: one frozen trunk, on
# which policy, critic and reward model are adapters and the reference is no adapter at all, so that
# RLHF of a 7B model fits one 24 GB GPU.


@dataclass
class Role:
    """A model in one of its roles: which adapter is on, which score head it has, and the head's
    units."""

    model: torch.nn.Module
    adapter: str | None = None
    head: ScoreHead | None = None
    scale: tuple = (1.0, 0.0)  # gain, bias
    params: dict = field(default_factory=dict)  # {name: parameter} of what it trains, see `learn`
    net: torch.nn.Module | None = None  # what to call so that gradients are summed over ranks
    replays: bool = False  # whether its tokens take the "experts" of a batch

    def learn(self, cfg, rt):
        """Call this behind rt.distribute -> the optimizer of this role's own parameters: all that
        are trainable, or its adapter and head."""
        head = self.head.weight if self.head else None
        for name, p in self.model.named_parameters():
            mine = self.adapter is None or name.endswith("." + self.adapter) or p is head
            if p.requires_grad and mine:
                self.params[name] = p
        self.net = rt.wrap_ddp(self.model, self.params)
        ids = {id(p) for p in self.params.values()}
        groups = []
        for group in optim.param_groups(self.model, cfg.weight_decay):
            params = [p for p in group["params"] if id(p) in ids]
            if params:
                groups.append(group | {"params": params})
        betas = (cfg.beta1, cfg.beta2)
        return optim.adamw(groups, lr=0.0, betas=betas, eps=cfg.adam_eps)

    def hidden(self, batch, training=False):
        """(M, C), before each of the M actions. training: so that backward sums gradients over
        ranks."""
        lora.use(self.model, self.adapter)
        if not self.replays:
            batch = {name: t for name, t in batch.items() if name != "experts"}
        return (self.net if training else self.model)(batch)

    def logprobs(self, batch, temperature, training=False):
        """Log-probabilities of the actions, and entropies, under the distribution that they were
        sampled from; both (M,)."""
        hidden = self.hidden(batch, training)
        head = self.model.head
        return losses.token_logprobs(hidden, head, batch["actions"], temperature, entropy=True)

    def values(self, batch, training=False):
        """The head's number before each action, (M,) fp32."""
        gain, bias = self.scale
        return self.head(self.hidden(batch, training)) * gain + bias

    def scores(self, batch):
        """The head's number at each episode's last token, (N,) fp32."""
        return self.values(batch | dict(index=batch["last"]))


def build(cfg, tok):
    """Policy, reference, scorer, critic: Roles on the CPU, or None for one that the run does
    without. It has no scorer where Python functions alone give the reward."""
    sources = [dir for dir in (cfg.model, cfg.reward_model) if dir]
    if cfg.base and not any(map(weights.is_adapter, sources)):
        raise UserError(
            f"neither model= nor reward= is an adapter: leave out base={cfg.base}, which has no "
            "effect"
        )
    if cfg.reward_model:
        check_scorer(cfg, tok)
    return one_trunk(cfg) if cfg.lora_rank else full_models(cfg)


def base_for(cfg, dir):
    """base=, if `dir` is an adapter."""
    return cfg.base if weights.is_adapter(dir) else None


def check_scorer(cfg, tok):
    """UserError unless reward= is a score model, or an adapter of one, that reads the policy's
    tokens in the chat template of the policy's prompts."""
    dir = cfg.reward_model
    if weights.is_adapter(dir):
        is_scorer = weights.is_scorer(dir)
    else:
        is_scorer = families.load_config(dir).head == "score"
    if not is_scorer:
        raise UserError(
            f"reward={dir} is a language model: train a score model with reward.py, or give "
            "file.py:function"
        )
    other = tokenizer.load(dir, base=base_for(cfg, dir))
    if other.identity != tok.identity:
        raise UserError(
            f"reward={dir} has another tokenizer than the policy: its tokens would mean something "
            "else there"
        )
    keys = weights.read_score_keys(dir)
    asks, wants = store.unwritten_template(cfg.data), keys.get("prompt_template")
    if "prompt_template" not in keys and asks:
        return  # an older reward model does not tell whether it was trained in plain or columns
    if asks != wants or not asks and probe(other) != probe(tok):
        raise UserError(
            f"reward={dir} was trained in the chat template {wants or other.template}, and the "
            f"prompts are in {asks or tok.template}: its scores would mean little. Prepare both "
            "with the same template="
        )


def probe(tok):
    """How the template lays out a short conversation: ids and mask. None if it does not."""
    try:
        return tok.render([dict(role="user", content="a"), dict(role="assistant", content="b")])
    except UserError:
        return None


def open_scorer(cfg):
    """A frozen reward model of its own."""
    dir = cfg.reward_model
    method = quant.of(cfg)
    opened = weights.open(dir, base_for(cfg, dir), head="score", merge=True, method=method)
    model = opened.model.requires_grad_(False)
    return Role(model, head=model.score, scale=weights.read_score_scale(dir))


def full_models(cfg):
    """Each role has a model of its own. Frozen models are held in bf16. Autocast rounds the trained
    fp32 weights to the same bf16 values, so policy and reference start bitwise equal."""

    def trainable(dir, head="lm"):
        model = weights.open(dir, base_for(cfg, dir), head=head, merge=True).model
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)
        return model

    policy = Role(trainable(cfg.model))
    if not any(p.requires_grad for p in policy.model.parameters()):
        raise UserError(
            f"freeze_layers={cfg.freeze_layers} with train={cfg.train} leaves nothing to train"
        )
    reference = scorer = critic = None
    if cfg.has_reference:
        model = weights.open(cfg.model, base_for(cfg, cfg.model), head="lm", merge=True).model
        reference = Role(model.requires_grad_(False))
    if cfg.reward_model:
        scorer = open_scorer(cfg)
    if cfg.has_critic and scorer:  # it starts as the reward model and speaks in its units
        model = trainable(cfg.reward_model, "score")
        critic = Role(model, head=model.score, scale=scorer.scale)
    elif cfg.has_critic:
        model = trainable(cfg.model, "score")
        torch.nn.init.zeros_(model.score.weight)
        critic = Role(model, head=model.score)
    if critic:
        critic.head.requires_grad_(True)  # in full, whatever else is trained
    return policy, reference, scorer, critic


def one_trunk(cfg):
    """The roles are one frozen trunk under different adapters; the reference is the trunk alone, or
    a copy of the adapter that the policy starts from. The reward model joins them when it is an
    adapter on the same trunk. Otherwise it is a frozen model of its own."""
    base = base_for(cfg, cfg.model)
    opened = weights.open(cfg.model, base, head="lm", name="policy", method=quant.of(cfg))
    model = opened.model
    goes_on = bool(lora.adapted(model))
    if goes_on:
        lora.copy(model, "policy", "reference")

    # Adapters drop nothing: the ratio compares the probabilities of two forwards.
    weights.add_adapter(model, cfg, "policy", dropout=0.0)
    policy = Role(model, "policy")
    reference = Role(model, "reference" if goes_on else None) if cfg.has_reference else None
    scorer = critic = None
    dir = cfg.reward_model
    joins = dir and weights.is_adapter(dir) and not weights.extras_of(model)
    joins = joins and weights.only_blocks(dir)
    if joins:
        trunk = weights.base_of(dir, base_for(cfg, dir))
        joins = trunk.resolve() == opened.base.resolve()
    if joins:
        model.reward_head = weights.load_scorer(model, dir, "reward")
        scale = weights.read_score_scale(dir)
        scorer = Role(model, "reward", model.reward_head, scale)
    elif dir:
        scorer = open_scorer(cfg)
    if cfg.has_critic and joins:  # it starts as a copy of the reward adapter and its head
        model.value_head = weights.load_scorer(model, dir, "value")
        critic = Role(model, "value", model.value_head, scorer.scale)
    elif cfg.has_critic:  # it starts as the policy, and its head at zero
        if goes_on:
            lora.copy(model, "policy", "value")
        else:
            weights.add_adapter(model, cfg, "value", dropout=0.0)
        model.value_head = ScoreHead(model.cfg.width)
        torch.nn.init.zeros_(model.value_head.weight)
        critic = Role(model, "value", model.value_head)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith((".policy", ".value")) or name.startswith("value_head.")
    return policy, reference, scorer, critic


class Parking:
    """When `on`, models and optimizer states wait in CPU memory and are on the device only inside
    `with parking(role, ...)`."""

    def __init__(self, on, device, things):
        self.on = on
        self.device = device
        if on:
            self.move(things, "cpu")

    @staticmethod
    def move(things, device):
        """things: models, and optimizers with all of their state (the fused kernels read the step
        count on the device)."""
        for thing in things:
            if isinstance(thing, torch.nn.Module):
                thing.to(device)
            for state in getattr(thing, "state", {}).values():
                state.update({key: x.to(device) for key, x in state.items() if torch.is_tensor(x)})

    @contextlib.contextmanager
    def __call__(self, *things):
        things = [thing.model if isinstance(thing, Role) else thing for thing in things if thing]
        if self.on:
            self.move(things, self.device)
        yield
        if self.on:
            self.move(things, "cpu")


# --------------------------------------------------------------------- settings, prompts, responses


def check(cfg, rt):
    """UserError for settings that do not go together."""
    models = [spec for spec in cfg.reward if not functions.is_function(spec)]
    if not cfg.reward or len(models) > 1:
        raise UserError(
            f"reward={','.join(cfg.reward)}: give one score model, functions file.py:function or "
            "tasks, or both"
        )
    if len(cfg.reward_weights) not in (0, len(cfg.reward)):
        raise UserError(
            f"reward_weights= has {len(cfg.reward_weights)} numbers for {len(cfg.reward)} rewards: "
            "give one for each"
        )
    share = cfg.batch_size // (rt.world * cfg.minibatches)
    micro_batch = rt.micro_batch(cfg.micro_batch)  # episodes of this process's forward
    if cfg.batch_size % (cfg.minibatches * micro_batch * rt.world):
        raise UserError(
            f"batch_size={cfg.batch_size} must be a multiple of minibatches={cfg.minibatches} x "
            f"{micro_batch} episodes of a forward (micro_batch=) x {rt.world} ranks"
        )
    if share % cfg.group:
        raise UserError(
            f"batch_size={cfg.batch_size} gives a rank {share} episodes of a minibatch, which "
            f"must be a multiple of group={cfg.group}"
        )
    if not cfg.has_critic and cfg.group < 2:
        raise UserError(
            f"group={cfg.group} with advantage={cfg.advantage} (which algo=grpo and rloo set "
            "too): it compares the samples of one prompt, so give group=2 or more"
        )
    if cfg.kl_control == "adaptive" and cfg.kl_horizon <= cfg.batch_size / 5:
        raise UserError(
            f"kl_horizon={cfg.kl_horizon} must be above a fifth of batch_size={cfg.batch_size}: "
            "one iteration could take the adaptive coefficient of the KL to 0 or below"
        )
    if not all(cfg.truncate_at):
        raise UserError("truncate_at= holds an empty string, which would end each response at once")
    if cfg.temperature <= 0:
        raise UserError(f"temperature={cfg.temperature}: must be above 0, where samples differ")
    rows = cfg.ptx_batch // rt.world
    if cfg.ptx_coef and cfg.ptx_batch % rt.world:
        raise UserError(f"ptx_batch={cfg.ptx_batch} must be a multiple of the {rt.world} ranks")
    if cfg.ptx_coef and rows > micro_batch and rows % micro_batch:
        raise UserError(
            f"ptx_batch={cfg.ptx_batch} gives a rank {rows} rows, which must be a multiple of the "
            f"{micro_batch} of a forward (micro_batch=), or fewer"
        )
    if cfg.offload and cfg.lora_rank and rt.weight_shards == 1:
        raise UserError(
            "offload=true parks full models, or what fsdp shards: leave it out with lora_rank= on "
            "its own"
        )


def check_reach(cfg, policy, scorer, longest_prompt):
    """UserError where the longest prompt and its response go beyond the positions of the policy or
    the reward model. The other two models are copies of these."""
    longest = longest_prompt + cfg.max_new_tokens
    for dir, role in ((cfg.model, policy), (cfg.reward_model, scorer)):
        if role and longest > (reach := role.model.cfg.max_positions):
            raise UserError(
                f"the longest prompt and max_new_tokens={cfg.max_new_tokens} make {longest} "
                f"tokens, {dir} takes {reach}: lower max_prompt= or max_new_tokens="
            )


def check_resume(out):
    """UserError for the folder of a first-edition run with algo=grpo, whose config.cfg says so."""
    path = Path(out) / "config.cfg"
    if path.exists() and "algo=grpo" in files.read_text(path).splitlines():
        raise UserError(
            f"{out} is a run of the first edition with algo=grpo, which normalised the KL with the "
            "scores and cannot go on: give another out=, or start anew with resume=false"
        )


def prompts_of(cfg, tok):
    """(prompts, rows, how many prompts are left out as too long) of the prepared folders.

    prompts: [(ids as a tuple, the number of its row in `rows`)]. The same prompt counts once,
    unless its records differ: another answer may be right."""
    rows = store.mix(cfg.data, seed=cfg.seed, tokenizer=tok)
    prompts = {}
    for i in range(len(rows)):
        prompts.setdefault((tuple(rows.prompt(i).tolist()), rows.line(i)), i)
    prompts = [(prompt, i) for (prompt, _), i in prompts.items() if prompt]
    short = [(prompt, i) for prompt, i in prompts if len(prompt) <= cfg.max_prompt]
    if not short:
        raise UserError(
            f"{', '.join(cfg.data)}: no prompt has between 1 and max_prompt={cfg.max_prompt} tokens"
        )
    return short, rows, len(prompts) - len(short)


def load_rewards(cfg, rows):
    """{name: function, or None for the score model} of reward=, in its order, and the gold function
    or None. UserError where a function needs the record of a prompt, and there is none."""
    rewards = {}
    for spec in cfg.reward:
        function = functions.load_function(spec) if functions.is_function(spec) else None
        name = spec.rpartition(":")[2] if ".py:" in spec else spec if function else "model"
        names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        rewards[next(name for name in names if name not in rewards)] = function
    gold = functions.load_function(cfg.gold) if cfg.gold else None
    takers = [function for function in (*rewards.values(), gold) if function]
    takers = [function for function in takers if functions.needs_record(function)]
    without = [str(folder.dir) for folder in rows.stores if folder.records is None]
    if takers and without:
        raise UserError(
            f"the function {functions.name_of(takers[0])} takes the record of a prompt, and "
            f"{without[0]} holds none: "
            "prepare it again, with train_on=none where records have answers"
        )
    return rewards, gold


@functools.lru_cache(2)
def shuffled(count, epoch, seed):
    return np.random.default_rng([seed, epoch]).permutation(count)


def pick(prompts, position, seed):
    """The prompt at a position of an endless sequence of shuffled passes over all of them: a
    function of the seed alone."""
    epoch, i = divmod(position, len(prompts))
    return prompts[shuffled(len(prompts), epoch, seed)[i]]


def cut_at(strings, tok, tokens):
    """(tokens up to the one that completes the first of `strings`, whether there was one). A string
    may name a control token."""

    def complete(n):
        return tok.decode_until(tokens[:n], strings)[1]

    if not complete(len(tokens)):
        return tokens, False
    return tokens[: next(n for n in range(1, len(tokens) + 1) if complete(n))], True


# A forward gives a number for each of M positions, the algorithm wants a matrix (N, R). Both hold
# the actions in the same order, episode by episode. So all it takes is to know where there is one:
# is_action (M,), which is all True unless shapes are fixed, and mask (N, R).


def to_matrix(x, is_action, mask):
    """(M,) -> (N, R), zero outside the mask."""
    return torch.zeros(mask.shape).masked_scatter(mask, x[is_action])


def to_flat(x, is_action, mask):
    """(N, R) -> (M,), zero where there is no action."""
    return torch.zeros(is_action.shape).masked_scatter(is_action, x[mask])


# ----------------------------------------------------------------------------------------- warnings


def correlation(x, y, mean):
    """Pearson's, over all episodes; 0 where one of them does not vary."""
    x = x.double() - mean(x.double())
    y = y.double() - mean(y.double())
    scale = (mean(x**2) * mean(y**2)) ** 0.5
    return mean(x * y) / scale if scale > 1e-9 else 0.0


def diseases(now, first):
    """What experience says is going wrong, in words. now, first: the metrics of this iteration and
    of the first one."""
    if now.get("kl", 0) < -0.5:
        yield (
            "the KL is negative: sampling and log-probabilities disagree (a filter, a temperature, "
            "dropout?)"
        )
    if now["length"] > 1.5 * first["length"] and now["length_reward_corr"] > 0.5:
        yield (
            "responses grow and the reward follows their length: the reward may be paying for "
            "length"
        )
    better = now["reward"] > first["reward"] + 0.5
    if "gold" in now and better and now["gold"] < first["gold"] - 0.25:
        yield (
            "the reward rises while gold falls: the policy exploits the reward model; raise "
            "kl_coef or stop earlier"
        )
    if now["entropy"] < 0.2 * first["entropy"]:
        yield (
            "the entropy has collapsed: samples hardly differ any more; lower lr or raise kl_coef "
            "or entropy_coef"
        )
    if now["eos_rate"] < first["eos_rate"] - 0.3:
        yield "responses stop ending: raise missing_eos_penalty or max_new_tokens"


# ---------------------------------------------------------------------------------------- gradients


def ptx_gradient(cfg, rt, policy, ptx, update):
    """Adds ptx_coef times the gradient of the next-token loss on a batch of other text (Ouyang et
    al. 2022, Eq. 2) -> the loss."""
    micro_batches = ptx.batch(update)
    count = rt.all_sum(sum(float(batch["weights"].sum()) for batch in micro_batches))
    total = 0.0
    for i, batch in enumerate(micro_batches):
        rt.accumulate(i == len(micro_batches) - 1, policy.net)
        batch = rt.put(batch)
        with rt.autocast():
            hidden = policy.hidden(batch, training=True)
            head = policy.model.head
            loss = losses.cross_entropy(hidden, head, batch["targets"], batch["weights"])
            loss = loss / max(count, 1e-9)
        rt.backward(cfg.ptx_coef * loss)
        total = total + loss.detach()
    return total


def rl_gradient(cfg, rt, policy, critic, micro_batches, count, kl_coef=0.0):
    """Adds the gradient of a minibatch. Of each micro-batch (a) the policy's loss: the clipped
    surrogate, less the entropy bonus, with kl_in=loss plus the KL; (b) the critic's loss.

    policy, critic: Roles; None: not trained now. count: the minibatch's actions on all ranks.
    Returns this rank's part of the stats, which sum to those of the minibatch ("ratio": whose
    maximum is)."""
    parts = []
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        mask = batch["weights"]  # (M,): 1 where there is an action
        part = {}

        # (a) the policy
        if policy:
            rt.accumulate(last, policy.net)
            with rt.autocast():
                new_logprobs, entropy = policy.logprobs(batch, cfg.temperature, training=True)
                surrogate, part = policy_loss(
                    new_logprobs,
                    batch["old_logprobs"],
                    batch["advantages"],
                    mask,
                    cfg.clip,
                    cfg.clip_high,
                    batch["loss_weights"],
                    count,
                )
                loss = surrogate - cfg.entropy_coef * (entropy * mask).sum() / count
                if cfg.kl_in == "loss" and kl_coef:
                    kl = k3(new_logprobs, batch["ref_logprobs"], mask)
                    kl_loss = (batch["loss_weights"] * kl).sum()
                    loss = loss + kl_coef * kl_loss
                    part["kl_loss"] = kl_loss.detach()
            # a mixture of experts adds its balance, each micro-batch the same part of it
            share = 1 / (len(micro_batches) * rt.world)
            loss = loss + cfg.aux_coef * losses.add_routing(part, policy.model, batch, share)
            rt.backward(loss)
            part["policy_loss"] = surrogate.detach()

        # (b) the critic
        if critic:
            rt.accumulate(last, critic.net)
            with rt.autocast():
                loss, clipped = value_loss(
                    critic.values(batch, training=True),
                    batch["old_values"],
                    batch["returns"],
                    mask,
                    cfg.value_clip,
                    count,
                )
            rt.backward(loss)
            part |= dict(value_loss=loss.detach(), value_clipfrac=clipped["clipfrac"])
        parts.append(part)
    stats = {name: sum(part[name] for part in parts) for name in parts[0]}
    if policy:
        stats["ratio"] = max(part["ratio"] for part in parts)
    return stats


# ----------------------------------------------------------------------------------------- the loop


@runtime.started
def main(cfg, rt):
    # ---- setup
    # The runtime knows the device and the other processes. The run knows its folder: whether it
    # holds a state to continue from, and where the log and the models go.
    check(cfg, rt)
    run = Run("ppo", cfg, rt)
    if run.resumes:
        check_resume(run.out)

    # ---- prompts
    # The policy answers the prompts of prepared data. The answers that stand there are not read. A
    # reward function may look into the record of a prompt, which may hold the right answer.
    store.check_prepared((*cfg.data, *cfg.ptx_data), "instructions", f"model={cfg.model}")
    base = base_for(cfg, cfg.model)
    tok = tokenizer.load(cfg.model, store.chat_template(cfg.data), base=base)
    base = weights.base_of(cfg.model, base)
    all_prompts, rows, too_long = prompts_of(cfg, tok)
    rewards, gold_function = load_rewards(cfg, rows)
    reward_weights = cfg.reward_weights or [1.0] * len(rewards)
    longest_prompt = max(len(prompt) for prompt, _ in all_prompts)

    # ---- models, optimizers
    # Several of the four may share one module, which goes to the device once. The policy learns,
    # and so does the critic if there is one; each has an optimizer over its own parameters.
    policy, reference, scorer, critic = build(cfg, tok)
    losses.check_experts(policy.model, cfg.aux_coef, cfg.replay_experts)
    policy.replays = cfg.replay_experts
    check_reach(cfg, policy, scorer, longest_prompt)
    micro_batch = rt.micro_batch(cfg.micro_batch)

    # Other text may help the policy to keep its language: a next-token loss beside the reward.
    ptx = None
    if cfg.ptx_coef:
        ptx = batches.Rows(
            store.mix(cfg.ptx_data, seed=cfg.seed, tokenizer=tok),
            cfg.ptx_batch,
            min(micro_batch, cfg.ptx_batch // rt.world),
            cfg.max_prompt + cfg.max_new_tokens,
            length_key="max_prompt + max_new_tokens",
            seed=cfg.seed,
            rank=rt.rank,
            world=rt.world,
            fixed_shapes=rt.fixed_shapes,
            start_ids=policy.model.start_ids,
        )
        batches.check_reach(ptx.longest, policy.model.cfg.max_positions, cfg.model)
    benchmarks = evaluation.for_training(cfg, tok, policy.model.cfg)

    # A state is only continued from the models and the data that it was made from. New adapters and
    # heads are drawn anew by each start, so they do not count.
    params = [
        (name, p)
        for role in (policy, scorer)
        for name, p in (role.model.named_parameters() if role else ())
        if not name.endswith((".policy", ".value")) and not name.startswith("value_head.")
    ]
    stores = [store.Store(dir) for dir in (*cfg.data, *cfg.ptx_data)]
    run.identify(params, store.fingerprint(stores))
    roles = [role for role in (policy, reference, scorer, critic) if role]
    models = {id(role.model): role.model for role in roles}.values()
    if cfg.compile:
        # Compiled code keeps fp32 where eager code rounds to bf16. Without this switch graphs with
        # and without gradients would differ by tenths of a nat.
        torch._inductor.config.emulate_precision_casts = True
    for model in models:
        rt.distribute(model, cfg.compile, cfg.grad_checkpoint)
    learners = {"policy": policy}
    if critic:
        learners["value"] = critic
    optimizers = {name: role.learn(cfg, rt) for name, role in learners.items()}
    parks = cfg.offload and rt.weight_shards == 1 and rt.device.type != "cpu"
    parking = Parking(parks, rt.device, [*models, *optimizers.values()])

    # ---- resume
    # A resume needs what is trained, and what the loop counts and remembers: run.meta. Policy and
    # critic may have parameters of the same names, so each name says whose it is.
    trained = {}
    for name, role in learners.items():
        trained |= {f"{name}:{key}": p for key, p in role.params.items()}
    run.meta = dict(updates=0, first=None, warned=[], kl_coef=cfg.kl_coef)
    run.attach(policy.model, trained, optimizers, tok, base, policy.adapter)
    controller = AdaptiveKL(cfg.kl_coef, cfg.kl_target, cfg.kl_horizon)
    if cfg.kl_control == "adaptive":
        controller.coef = run.meta["kl_coef"]
    steps = run.total_steps(math.ceil(len(all_prompts) * cfg.group / cfg.batch_size))
    warmup = cfg.warmup_steps or round(cfg.warmup_ratio * steps)
    sizes = {name: sum(p.numel() for p in role.params.values()) for name, role in learners.items()}
    trains = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    left_out = f" ({too_long:,} over max_prompt left out)" if too_long else ""
    run.describe(f"{len(all_prompts):,} prompts{left_out}; trained parameters: {trains}")

    # ---- this rank's share
    # Every rank takes an equal share of each minibatch, in whole groups. An episode is known by its
    # number in the iteration, and all that is random about it comes from that number. So the
    # episodes are the same on any number of ranks.
    share = cfg.batch_size // (rt.world * cfg.minibatches)
    numbers = []
    for m in range(cfg.minibatches):
        begin = (m * rt.world + rt.rank) * share
        numbers += range(begin, begin + share)
    slices = [slice(i, i + micro_batch) for i in range(0, len(numbers), micro_batch)]
    # Code that is compiled for each shape gets rows of one length. Otherwise there is no padding.
    one_shape = cfg.compile or rt.fixed_shapes
    length = longest_prompt + cfg.max_new_tokens if one_shape else 0

    def mean(x):
        """Over the episodes of all ranks."""
        return rt.all_sum(x.sum()) / cfg.batch_size

    def known_mean(x):
        """Over those episodes of all ranks that have a number; 0 where none has."""
        count = rt.all_sum(float((~x.isnan()).sum()))
        return rt.all_sum(x.nansum()) / max(count, 1.0)

    # ---- loop
    for step in run.steps():
        # Evaluate and save what the iteration before has left. The last turn of the loop is there
        # for that alone.
        with run.paused():
            if benchmarks and run.due(cfg.eval_every):
                lora.use(policy.model, policy.adapter)
                with parking(policy):
                    metrics = evaluation.measure_all(benchmarks, policy.model, tok, rt)
                run.evaluated(metrics, keep=cfg.keep)
            if run.due(cfg.save_every) or run.ending:
                run.save()
        if run.ending:
            break
        clock = runtime.Clock(rt)

        # 1. Roll out: the policy answers its prompts. We sample from the plain distribution,
        # without top-k or top-p: the policy gradient is only right for samples of the very
        # distribution that it changes.
        picked = [
            pick(all_prompts, (step * cfg.batch_size + number) // cfg.group, cfg.seed)
            for number in numbers
        ]
        prompts = [list(prompt) for prompt, _ in picked]
        lora.use(policy.model, policy.adapter)
        with clock("rollout"), parking(policy), rt.autocast():
            samples = generate.generate(
                policy.model,
                prompts[:: cfg.group],
                cfg.max_new_tokens,
                cfg.temperature,
                stop_ids=tok.stop_ids,
                group=cfg.group,
                seed=(cfg.seed, step),
                sample_ids=numbers,
                batch_size=rt.micro_batch(cfg.rollout_batch),
                step_hook=rt.sync,
            )
        # A rollout takes long, so we look again whether we are to stop. The iteration is then
        # dropped: it is a function of the state and its number, and a resume rolls it out again.
        if run.poll():
            run.save()
            break
        responses, truncated = [], []
        for tokens in samples.tokens:
            response, was_cut = cut_at(cfg.truncate_at, tok, tokens)
            responses.append(response)
            truncated.append(was_cut)
        truncated = torch.tensor(truncated)
        finished = (torch.tensor(samples.finished) & ~truncated).float()

        # 2. Make episodes: the tokens of prompt and response, and a mask that says which of them
        # are actions. Everything below goes by the mask. We cut the micro-batches once: old and new
        # log-probabilities then come from the same shapes, so that the first ratio is exactly 1.
        episodes = [
            (prompt + response, [0] * len(prompt) + [1] * len(response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        lengths = torch.tensor([sum(actions) for _, actions in episodes])
        mask = torch.arange(cfg.max_new_tokens) < lengths[:, None]  # (N, R)
        start_ids = policy.model.start_ids
        micro_batches = [batches.episodes(episodes[part], length, start_ids) for part in slices]
        is_action = [batch["weights"] > 0 for batch in micro_batches]  # each (M,)
        micro_batches = [rt.put(batch) for batch in micro_batches]

        def matrix(parts):
            """What the micro-batches gave, each (M,), as a matrix (N, R) on the CPU."""
            flat = torch.cat([rt.to_cpu(x) for x in parts])
            return to_matrix(flat, torch.cat(is_action), mask)  # noqa: B023

        # 3. Let each model say its part. The old log-probabilities are those of the training
        # forward: the decoder's (sampled_logprobs) come from other kernels, and the ratio would see
        # the difference. Their gap is logged, because a gap that grows means that the decoder
        # samples from another policy.
        with torch.no_grad():
            with clock("score"), parking(scorer), rt.autocast():
                records = [json.loads(rows.line(i) or "null") for _, i in picked]
                episode = (tok, prompts, responses, finished, records, cfg.reward_special)
                parts = {}
                for name, function in rewards.items():
                    if function:
                        parts[name] = rt.once(functions.judge, function, *episode)
                    else:
                        outputs = [rt.to_cpu(scorer.scores(batch)) for batch in micro_batches]
                        parts[name] = torch.cat(outputs)
                scores = total_score([*parts.values()], reward_weights)
            with clock("logprobs"), parking(policy), rt.autocast():
                # Compiled, a graph without gradients would not round as the update's graph does.
                outputs = []
                with torch.set_grad_enabled(cfg.compile):
                    for batch in micro_batches:
                        outputs.append(policy.logprobs(batch, cfg.temperature))
                        if policy.replays:
                            batch["experts"] = losses.chosen_experts(policy.model)
                old_logprobs, entropy = map(matrix, zip(*outputs, strict=True))
            if reference:
                with clock("logprobs"), parking(reference), rt.autocast():
                    outputs = [
                        reference.logprobs(batch, cfg.temperature) for batch in micro_batches
                    ]
                    ref_logprobs = matrix([logprobs for logprobs, _ in outputs])
            else:
                ref_logprobs = old_logprobs  # the KL has no part in what follows
            if critic:
                with clock("values"), parking(critic), rt.autocast():
                    values = matrix([critic.values(batch) for batch in micro_batches])
        sampled_logprobs = torch.zeros(mask.shape)
        for row, logprobs, n in zip(sampled_logprobs, samples.logprobs, lengths, strict=True):
            row[:n] = torch.tensor(logprobs[:n])
        log_ratio = old_logprobs - ref_logprobs
        off = log_ratio.abs().max()
        if step == 0 and not one_shape and not off <= 1e-6:
            raise RuntimeError(
                f"before the first update log(policy / reference) is {off:.2g}, not 0"
            )

        # 4. Reward: what an episode is worth is its score, less what a bad end costs. Nothing is
        # learned from an episode without a score, whose reward is NaN.
        worth = scores
        if cfg.score_clip:
            worth = worth.clamp(-cfg.score_clip, cfg.score_clip)
        unfinished = cfg.missing_eos_penalty * (1 - finished)
        worth = worth - torch.where(truncated, cfg.truncate_penalty, unfinished)
        scored = ~scores.isnan()
        n_scored = rt.all_sum(float(scored.sum()))
        if not n_scored:
            raise UserError(
                f"reward={','.join(cfg.reward)} gives None for all {cfg.batch_size} responses of "
                f"step {step + 1}, so that nothing can be learned: give a number for some"
            )
        learned = mask & scored[:, None]  # (N, R)
        kl_in_reward = controller.coef if cfg.kl_in == "reward" else 0.0

        # 5. Advantages: did an action turn out better than expected? The critic expects something
        # before every action, so each gets an advantage of its own. The group expects what its
        # samples got on average, so all actions of an episode share one.
        if critic:
            known = worth.nan_to_num(0.0)
            action_rewards = shape_rewards(known, old_logprobs, ref_logprobs, mask, kl_in_reward)
            if cfg.whiten_rewards:
                action_rewards = whiten(action_rewards, learned, rt, shift_mean=False)
            advantages, returns = gae(action_rewards, values, learned, cfg.gamma, cfg.lam)
            if cfg.whiten_advantages:
                advantages = whiten(advantages, learned, rt)
        else:
            episode_kl = log_ratio.sum(1)
            advantages = penalised_advantages(
                worth, episode_kl, cfg.group, cfg.advantage, kl_in_reward
            )
            advantages = advantages[:, None] * mask

        # The loss of a minibatch is a mean over all of its micro-batches on all ranks, so we count
        # its actions first and give each one its weight in that mean.
        counts, action_weights = [], []
        for part in learned.split(share):
            counts.append(max(rt.all_sum(float(part.sum())), 1.0))
            episodes = max(rt.all_sum(float(part.any(1).sum())), 1.0)
            totals = (counts[-1], episodes, cfg.max_new_tokens)
            action_weights.append(loss_weights(part, cfg.loss_mean, *totals))
        targets = dict(old_logprobs=old_logprobs, advantages=advantages, weights=learned.float())
        targets["loss_weights"] = torch.cat(action_weights)
        if critic:
            targets |= dict(old_values=values, returns=returns)
        if cfg.kl_in == "loss":
            targets["ref_logprobs"] = ref_logprobs
        # The update wants all of this flat, as its forwards give the new log-probabilities.
        for batch, on, part in zip(micro_batches, is_action, slices, strict=True):
            batch |= rt.put({name: to_flat(x[part], on, mask[part]) for name, x in targets.items()})

        # 6. Update: several passes over the minibatches, each in an order of its own. The clip
        # keeps the policy near the one that sampled. While the critic warms up it learns alone.
        schedule = (cfg.schedule, warmup, cfg.min_lr)
        learning_rates = dict(
            policy=optim.lr_at(step, steps, cfg.lr, *schedule),
            value=optim.lr_at(step, steps, cfg.value_lr, *schedule),
        )
        active = dict(learners)
        if step < cfg.value_warmup:
            del active["policy"]
        shuffle = torch.Generator().manual_seed((cfg.seed * 1_000_003 + step) % 2**63)
        per_minibatch = share // micro_batch
        updates = []  # the stats of each optimizer step
        with clock("update"), parking(*active.values(), *optimizers.values()):
            for _ in range(cfg.ppo_epochs):
                for m in torch.randperm(cfg.minibatches, generator=shuffle).tolist():
                    minibatch = micro_batches[m * per_minibatch : (m + 1) * per_minibatch]
                    stats = rl_gradient(
                        cfg, rt, active.get("policy"), critic, minibatch, counts[m], controller.coef
                    )
                    if ptx and "policy" in active:
                        stats["ptx_loss"] = ptx_gradient(cfg, rt, policy, ptx, run.meta["updates"])
                    if not updates and not stats.get("ratio", 0.0) <= 1e-3 and not rt.fixed_shapes:
                        raise RuntimeError(
                            f"step {step}: the first minibatch's ratios differ from 1 by "
                            f"{stats['ratio']:.2g}"
                        )
                    for name, role in active.items():
                        to_step = (optimizers[name], role.params.values(), learning_rates[name])
                        stats[f"{name}_grad_norm"] = rt.step(*to_step, cfg.grad_clip)
                    updates.append(stats)
                    run.meta["updates"] += 1
                # A policy that has moved too far from the one that sampled has used up its samples.
                passed = updates[-cfg.minibatches :]
                approx_kl = sum(stats.get("approx_kl", 0.0) for stats in passed) / len(passed)
                if cfg.target_kl and rt.all_sum(approx_kl) > cfg.target_kl:
                    break

        # 7. Say what the iteration was like. Judge a run by gold and by reading samples, never by
        # the reward alone: the policy is paid to find what the reward model gets wrong.
        metrics = dict(reward=known_mean(scores))
        if len(parts) > 1:
            metrics |= {f"reward_{name}": known_mean(part) for name, part in parts.items()}
        if n_scored < cfg.batch_size:
            metrics["unscored"] = 1 - n_scored / cfg.batch_size
        if gold_function:
            metrics["gold"] = known_mean(rt.once(functions.judge, gold_function, *episode))
        if reference:
            metrics["kl"] = mean(log_ratio)
            metrics["kl_k3"] = mean(k3(old_logprobs, ref_logprobs, mask))
            metrics["kl_coef"] = controller.coef
        n_actions = mean(mask)
        metrics |= dict(
            entropy=mean(entropy) / n_actions,
            logprob_gap=mean((sampled_logprobs - old_logprobs).abs()) / n_actions,
            length=n_actions,
            eos_rate=mean(finished),
            length_reward_corr=correlation(lengths[scored], scores[scored], known_mean),
        )
        if critic:
            error = variance(returns - values, learned, rt)
            spread = variance(returns, learned, rt).clamp(min=1e-8)
            metrics["explained_variance"] = 1 - error / spread
        else:
            groups = worth.view(-1, cfg.group)
            low, high = groups.nan_to_num(math.inf).amin(1), groups.nan_to_num(-math.inf).amax(1)
            equal = low >= high  # such a group teaches nothing but the KL
            metrics["equal_groups"] = mean(equal) * cfg.group
        metrics["first_ratio_off"] = updates[0].pop("ratio", 0.0)
        for name in updates[0]:
            total = sum(stats[name] for stats in updates) / len(updates)
            metrics[name] = total if name.endswith("_norm") else rt.all_sum(total)
        metrics["updates"] = len(updates)
        metrics["lr"] = learning_rates["policy"]
        metrics = {name: float(x) for name, x in metrics.items()}
        run.tokens += int(mask.sum())
        if run.logs:
            seconds = {f"{phase}_s": seconds for phase, seconds in clock.seconds.items()}
            run.log_step(**metrics, **seconds)
        if run.due(cfg.sample_every):
            table = []
            for i in range(min(cfg.samples, len(prompts))):
                row = dict(prompt=tok.decode(prompts[i]), response=tok.decode(responses[i]))
                row["reward"] = scores[i] if scored[i] else "none"
                if reference:
                    row["kl"] = log_ratio[i].sum()
                table.append(row)
            run.log.samples(step, table)

        # The next iteration's price of the KL, and what has gone wrong since the first one, each
        # said once.
        if cfg.kl_control == "adaptive" and "policy" in active:
            controller.update(metrics["kl"], cfg.batch_size)
        run.meta["kl_coef"] = controller.coef
        run.meta["first"] = run.meta["first"] or metrics
        for disease in diseases(metrics, run.meta["first"]):
            if disease not in run.meta["warned"]:
                run.meta["warned"].append(disease)
                run.log.text(f"warning at step {step + 1}: {disease}")

    return run.close()


if __name__ == "__main__":
    config.run(main, Config)
