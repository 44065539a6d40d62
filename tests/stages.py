"""Every stage with settings for a tiny run, and how logs and weights of two runs are compared.

The tests of several processes, of CUDA and of XLA compare with the runs on one process, which the
fixture `stages_folder` has made.
"""

import os

import numpy as np
import tiny

from nano import store, tokenizer, weights

STEPS = 4
COMMON = f"device=cpu dtype=float32 schedule=constant resume=auto steps={STEPS}".split()
TUNE = "batch_size=8 eval_every=2 log_every=1 samples=1 sample_tokens=4 lr=1e-3".split()
ROWS = "model={}/model data={}/rows max_length=64 sample_every=2".split()
GROUPS = "model={}/model data={}/groups micro_batch=1 max_length=64".split()
RL = "data={}/groups batch_size=8 micro_batch=2 adam_eps=1e-3 ppo_epochs=2 max_new_tokens=6".split()
RL += "log_every=1 sample_every=-1 save_every=100".split()
STAGES = dict(  # name: stage and its settings, with the folder in place of {}
    pretrain=(
        "pretrain",
        "data={}/text tokenizer={}/model size=toy micro_batch=1 max_length=32".split()
        + ["sample_every=2", *(s for s in TUNE if s != "samples=1")],
    ),
    sft=("sft", [*ROWS, *TUNE, "micro_batch=2"]),
    sft_qwen=("sft", [*ROWS, *TUNE, "model={}/qwen", "micro_batch=4", "grad_checkpoint=true"]),
    sft_lora=("sft", [*ROWS, *TUNE, "micro_batch=1", "lora_rank=4", "lr=1e-2"]),
    # where a gradient is next to 0, Adam turns its rounding into a step: a small one
    sft_t5=("sft", [*ROWS, *TUNE, "model={}/t5", "micro_batch=2", "lr=1e-4"]),
    sft_quant=("sft", [*ROWS, *TUNE, "micro_batch=1", "lora_rank=4", "lr=1e-2", "quant=nf4"]),
    sft_frozen=("sft", [*ROWS, *TUNE, "micro_batch=2", "freeze_layers=1"]),
    # 7 groups a step, so that one of two ranks has a group more
    reward=(
        "reward",
        [*GROUPS, *(s for s in TUNE if "sample_tokens" not in s)]
        + ["batch_size=7", "norm_samples=4", "norm_tokens=4"],
    ),
    dpo=("dpo", [*GROUPS, *TUNE, "batch_size=7", "nll_weight=0.5"]),
    ppo=("ppo", ["model={}/model", "reward={}/scorer", "lr=1e-4", "value_lr=1e-4", *RL]),
    ppo_lora=(
        "ppo",
        "model={}/model reward={}/adapter/last lora_rank=2 lr=1e-3 value_lr=1e-3".split() + RL,
    ),
    grpo=(
        "ppo",
        "model={}/model reward={}/rewards.py:letters algo=grpo group=2 lr=1e-4".split() + RL,
    ),
)

if os.environ.get("NANO_SLOW"):
    STAGES["ppo_quant"] = ("ppo", [*STAGES["ppo_lora"][1], "quant=nf4"])


def job(folder, name, out, *more):
    """(stage, arguments) of a run of STAGES[name] in the folder `out`, with more settings."""
    stage, settings = STAGES[name]
    settings = tiny.override([f"out={out}"], COMMON, settings, more)
    return stage, [s.format(folder) for s in settings]


def alone(jobs):
    """Runs jobs one after another in this process."""
    for stage, argv in jobs:
        tiny.train(stage, argv)


def prepare(folder):
    """Models, data, a reward function and a reward adapter."""
    tiny.model_dir(folder / "model")
    tiny.model_dir(
        folder / "qwen",
        family="qwen3",
        qk_norm="head",
        qkv_bias=True,
        o_bias=True,
        vocab_size=265,
        tie_embeddings=True,
    )
    tiny.t5_dir(folder / "t5")
    tiny.model_dir(folder / "scorer", seed=1, head="score")
    tiny.store(folder / "rows", folder / "model", n=60)
    tiny.preferences(folder / "groups", folder / "model", n=60, val=8)
    meta = dict(vocab_size=264, tokenizer=tokenizer.load(folder / "model").fingerprint)
    for name, n in (("text", 60), ("more_text", 10)):
        texts = [(ids, [1] * len(ids)) for ids, _ in tiny.rows(n, 3)]
        store.write_store(folder / name, dict(train=texts, val=texts[:8]), meta)
    # Two responses hardly ever get the same reward. GRPO divides by their spread, and where that is
    # tiny differences of the last digit grow.
    letters = "sum(i * ord(c) for i, c in enumerate(response, 1)) % 101 / 16 - 3.0"
    (folder / "rewards.py").write_text(
        f"def letters(prompt, response, finished):\n    return {letters}\n"
    )
    more = ["lora_rank=2", "norm_samples=0", "norm_tokens=128", "lr=1e-2"]
    alone([job(folder, "reward", folder / "adapter", *more)])


def assert_same_curve(out, reference, tolerance=1e-5, counts=True):
    """Two runs have logged the same.

    counts=False: but for the shares of values above a threshold, which one rounding can move.
    """
    a, b = tiny.lines(out), tiny.lines(reference)
    assert [(r["kind"], r["step"]) for r in a] == [(r["kind"], r["step"]) for r in b]
    shares = ("accuracy", "clipfrac", "value_clipfrac")
    for x, y in zip(a, b, strict=True):
        keys = [k for k, v in y.items() if isinstance(v, (int, float))]
        keys = [k for k in keys if counts or k not in shares]
        values = [[r[k] for k in keys] for r in (x, y)]
        np.testing.assert_allclose(*values, rtol=tolerance, atol=tolerance, err_msg=f"{out} {keys}")


def assert_same_weights(a, b):
    """Two directories have the same model or adapter, but for rounding."""
    name = "model" if (b / "config.json").exists() else "adapter_model"
    a, b = weights.read_tensors(a, name), weights.read_tensors(b, name)
    assert a.keys() == b.keys()
    for key in b:
        np.testing.assert_allclose(a[key], b[key], rtol=0, atol=2e-5, err_msg=key)
