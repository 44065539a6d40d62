"""The four models of RLHF - policy, reference, reward model ("scorer") and critic - and what each says of a batch of episodes.

    policy, reference, scorer, critic = roles.build(cfg, tok)         # Roles; None where there is no such model
    batch = rt.put(roles.episode_batch(prompts, responses, response_length))
    logprobs, entropy = policy.logprobs(batch, temperature)           # b episodes of R response tokens: all are (b, R),
    values, scores = critic.values(batch), scorer.scores(batch)       # right-padded with zeros; scores (b,)

Two layouts. Full: each role is a model of its own. With lora_rank: one frozen trunk, on which policy, critic and reward model are
adapters and the reference is no adapter at all, so that a 7B model and its RLHF fit one 24 GB GPU.
"""

import contextlib
from dataclasses import dataclass, field

import torch

import lora
from model import ScoreHead
from nano import families, losses, optim, tokenizer, weights
from nano.config import UserError


@dataclass
class Role:
    """A model as the algorithm uses it for one purpose: which adapter is on, which score head it has, and the head's units."""

    model: torch.nn.Module
    adapter: str | None = None
    head: ScoreHead | None = None
    scale: tuple = (1.0, 0.0)  # gain, bias
    params: dict = field(default_factory=dict)  # {name: parameter} of what it trains, see `learn`
    net: torch.nn.Module | None = None  # what to call so that gradients meet over ranks

    def learn(self, rt, weight_decay, eps):
        """Makes the placed model ready to train -> the optimizer of this role's own parameters: all that are trainable, or its
        adapter and head."""
        for name, p in self.model.named_parameters():
            mine = (
                self.adapter is None
                or name.endswith("." + self.adapter)
                or (self.head and p is self.head.weight)
            )
            if p.requires_grad and mine:
                self.params[name] = p
        self.net, ids = rt.replicate(self.model, self.params), {id(p) for p in self.params.values()}
        groups = optim.param_groups(self.model, weight_decay)
        groups = [
            group | {"params": [p for p in group["params"] if id(p) in ids]} for group in groups
        ]
        optimizer = optim.adamw([group for group in groups if group["params"]], lr=0.0, eps=eps)
        rt.prime(optimizer)
        return optimizer

    def hidden(self, batch, training=False):
        """(M, C), of batch["index"]. training: in a way that the backward pass sums gradients over ranks."""
        lora.use(self.model, self.adapter)
        return (self.net if training else self.model)(batch)

    def logprobs(self, batch, temperature, training=False):
        """Of the actions, under the distribution that they were sampled from: log-probabilities and entropies, both (b, R)."""
        hidden = self.hidden(batch, training)
        actions = batch["response"].flatten()[batch["slots"]]
        logprobs, entropy = losses.token_logprobs(
            hidden, self.model.head_weight, actions, temperature, entropy=True
        )
        return spread(logprobs, batch), spread(entropy, batch)

    def values(self, batch, training=False):
        """The head's number before each action, (b, R) fp32."""
        return spread(self._heads(batch, training), batch)

    def scores(self, batch):
        """The head's number at each episode's last token, (b,) fp32."""
        return self._heads(batch | dict(index=batch["last"]))

    def _heads(self, batch, training=False):
        return self.head(self.hidden(batch, training)) * self.scale[0] + self.scale[1]


# ---------------------------------------------------------------------------------------------- episodes


def episode_batch(prompts, responses, response_length, static_length=0):
    """Episodes, lists of ids, as CPU tensors. b episodes, R = response_length:

    tokens, docs: the episodes one after another in one row without padding, (1, sum of lengths); with static_length, for backends
    that compile each shape anew, a row of that many slots each, (b, static_length).
    response, mask (b, R). index: flat positions in tokens whose hidden state predicts an action; slots: the flat positions in
    (b, R) of these actions; last (b,): flat position in tokens of each episode's last token.
    """
    b, R = len(prompts), response_length
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    width = [static_length or len(row) for row in rows]
    starts = [sum(width[:i]) for i in range(b)]
    tokens, docs = torch.zeros(sum(width), dtype=torch.int64), torch.full((sum(width),), -1)
    response, mask = torch.zeros(b, R, dtype=torch.int64), torch.zeros(b, R)
    for i, (row, answer, a) in enumerate(zip(rows, responses, starts, strict=True)):
        tokens[a : a + len(row)], docs[a : a + len(row)] = torch.tensor(row), i
        response[i, : len(answer)], mask[i, : len(answer)] = torch.tensor(answer), 1.0
    first = torch.tensor([a + len(p) - 1 for a, p in zip(starts, prompts, strict=True)])
    slots = torch.arange(b * R) if static_length else mask.flatten().nonzero().squeeze(1)
    index = (first[:, None] + torch.arange(R)).flatten()[slots].clamp(max=len(tokens) - 1)
    last = torch.tensor([a + len(row) - 1 for a, row in zip(starts, rows, strict=True)])
    shape = (b, static_length) if static_length else (1, -1)
    return dict(
        tokens=tokens.view(shape),
        docs=docs.view(shape),
        response=response,
        mask=mask,
        index=index,
        slots=slots,
        last=last,
    )


def spread(x, batch):
    """What was computed for the actions, (M,) -> (b, R), zero elsewhere."""
    return (
        x.new_zeros(batch["mask"].numel()).index_copy(0, batch["slots"], x).view_as(batch["mask"])
        * batch["mask"]
    )


# ---------------------------------------------------------------------------------------------- layouts


def build(cfg, tok):
    """The roles by cfg.lora_rank, before runtime.place. A cfg.reward that is file.py:function needs no scorer, other than ppo no
    critic."""
    judged = ".py:" in cfg.reward
    if not judged:
        check_scorer(cfg.reward, tok)
    return (one_trunk if cfg.lora_rank else full_models)(cfg, judged)


def check_scorer(dir, tok):
    """UserError unless `dir` is a score model, or an adapter of one, that reads the policy's tokens."""
    base, adapter = weights.base_of(dir), weights.is_adapter(dir)
    if (
        (weights.read_adapter_config(dir).get("task_type") != "SEQ_CLS")
        if adapter
        else (families.load_config(dir).head != "score")
    ):
        raise UserError(
            f"reward={dir} is a language model: train a score model with reward.py, or give file.py:function"
        )
    if tokenizer.load(base).fingerprint != tok.fingerprint:
        raise UserError(
            f"reward={dir} has another tokenizer than the policy: its tokens would mean something else there"
        )


def full_models(cfg, judged):
    """Layout (a): each role has a model of its own. What a frozen one holds in bf16 is what autocast makes of the same weights in
    fp32: policy and reference start equal to the bit."""

    def frozen(dir, head=None):
        return weights.open_whole(dir, head)[0].requires_grad_(False)

    def trainable(dir, head=None):
        model, _ = weights.open_whole(dir, head)
        optim.choose_trained(model, cfg.train, cfg.freeze_layers)
        return model

    policy, reference, scorer, critic = (
        Role(trainable(cfg.model)),
        Role(frozen(cfg.model)),
        None,
        None,
    )
    if not any(p.requires_grad for p in policy.model.parameters()):
        raise UserError(
            f"freeze_layers={cfg.freeze_layers} with train={cfg.train} leaves nothing to train"
        )
    if not judged:
        model = frozen(cfg.reward, "score")
        scorer = Role(model, head=model.score, scale=weights.read_score_scale(cfg.reward))
    if cfg.algo == "ppo":  # the critic starts as the reward model and speaks in its units
        model = trainable(cfg.model if judged else cfg.reward, "score")
        model.score.requires_grad_(True)  # in full, whatever else is trained
        critic = Role(model, head=model.score, scale=(1.0, 0.0) if judged else scorer.scale)
        if judged:
            torch.nn.init.zeros_(model.score.weight)
    return policy, reference, scorer, critic


def one_trunk(cfg, judged):
    """Layout (b): the roles are one frozen trunk under different adapters; the reference is the trunk alone. The reward model
    joins them when it is an adapter on the same trunk; otherwise it is a frozen model of its own."""
    model, base = weights.open_whole(cfg.model, as_base=True)
    adapter = dict(rank=cfg.lora_rank, alpha=cfg.lora_alpha, targets=cfg.lora_targets)
    lora.apply(model, name="policy", **adapter)
    policy, reference, scorer, critic = Role(model, "policy"), Role(model), None, None
    joined = (
        not judged
        and weights.is_adapter(cfg.reward)
        and weights.base_of(cfg.reward).resolve() == base.resolve()
    )
    scale = (1.0, 0.0) if judged else weights.read_score_scale(cfg.reward)
    if joined:
        model.reward_head = weights.load_scorer(model, cfg.reward, "reward")
        scorer = Role(model, "reward", model.reward_head, scale)
    elif not judged:
        other = weights.open_whole(cfg.reward, "score")[0].requires_grad_(False)
        scorer = Role(other, head=other.score, scale=scale)
    if (
        cfg.algo == "ppo" and joined
    ):  # the critic starts as a copy of the reward adapter and its head
        model.value_head = weights.load_scorer(model, cfg.reward, "value")
        critic = Role(model, "value", model.value_head, scale)
    elif cfg.algo == "ppo":
        lora.apply(model, name="value", **adapter)
        model.value_head = ScoreHead(model.cfg.dim)
        torch.nn.init.zeros_(model.value_head.weight)
        critic = Role(model, "value", model.value_head)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith((".policy", ".value")) or name.startswith("value_head.")
    return policy, reference, scorer, critic


class Parking:
    """When `on`, models and optimizer states wait in CPU memory and are on the device only inside `with parking(role, ...)`."""

    def __init__(self, on, device, things):
        self.on, self.device = on, device
        if on:
            self.move(things, "cpu")

    @staticmethod
    def move(things, device):
        """things: models, and optimizers with all of their state (the fused kernels read the step count on the device)."""
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
