"""Seconds of a GRPO iteration (rollout, reward, update) beside TRL's GRPOTrainer, in bf16.

    python -m bench.rl model=models/smollm2 batch_size=16 group=8 new=128
    python -m bench.rl model=models/smollm2 ends=true      # samples end where the model ends them

Both sides have the same model, prompts, lengths and groups. Every run is a process of its own and
the two take turns. The table shows medians over all iterations but each run's first. An iteration
is one optimizer step, TRL's default.

TRL holds the weights in bf16, which is faster and coarser than our fp32 masters under autocast. It
takes the sampler's log-probabilities for those of the update, and we compute them once more.
"""

import itertools
import json
import os
import platform
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import nano  # noqa: F401  first, because bench/nano.py finds the others
from bench.sft import finish, python
from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError

SIDES = ("ours", "trl")


@dataclass
class Config:
    model: PathText = "models/smollm2"
    out: PathText = "out/bench/rl"  # scratch folder
    batch_size: PositiveInt = 16  # episodes of an iteration
    group: PositiveInt = 8  # samples of a prompt
    micro_batch: PositiveInt = 8  # episodes of one forward of the update
    prompt: int = 32  # tokens of a prompt
    new: int = 128  # tokens of a response
    ends: bool = False  # false: a response has `new` tokens; true: or fewer
    steps: NonNegativeInt = 4  # iterations of a run; the first is not timed
    repeats: int = 3
    kl: float = 0.05  # coefficient of the KL to the reference model; 0: TRL then has none
    lora_rank: NonNegativeInt = 0  # 0: all weights
    device: str = "cpu"  # cpu, cuda
    threads: int = 2
    seed: Seed = 0
    side: Literal["both", "ours", "trl"] = "both"  # one: a run in this process


def reward(prompt, response, finished=True):
    """The share of the letter e. It costs nothing and differs between samples."""
    return response.count("e") / max(len(response), 1)


def prompts(cfg):
    """-> (tokenizer, [(text, ids)]): random texts of `prompt` tokens, the same for both sides."""
    import numpy as np

    from nano import tokenizer

    tok = tokenizer.load(cfg.model)
    rng = np.random.default_rng(cfg.seed)
    pairs = []
    while len(pairs) < cfg.batch_size:
        words = rng.integers(tok.vocab_size // 4, tok.vocab_size, 2 * cfg.prompt)
        ids = tok.encode(tok.decode(words.tolist()))[: cfg.prompt]
        text = tok.decode(ids)
        if tok.encode(text) == ids and len(ids) == cfg.prompt:
            pairs.append((text, ids))
    return tok, pairs


def run_ours(cfg, folder):
    """-> (seconds of each iteration, of its rollout, response tokens of each)"""
    import ppo
    from nano import store, tokenizer

    tok, pairs = prompts(cfg)
    rows = [([*ids, ids[0]], [0] * len(ids) + [1]) for _, ids in pairs]
    meta = dict(vocab_size=tok.vocab_size, tokenizer=tok.fingerprint)
    store.write_store(folder / "data", dict(train=rows), meta)
    if not cfg.ends:
        load = tokenizer.load

        def endless(*args, **keys):
            tok = load(*args, **keys)
            tok.stop_ids = ()
            return tok

        tokenizer.load = endless
    settings = dict(
        model=cfg.model,
        reward=f"{__file__}:reward",
        data=folder / "data",
        out=folder / "run",
        algo="grpo",
        group=cfg.group,
        steps=cfg.steps,
        batch_size=cfg.batch_size,
        micro_batch=cfg.micro_batch,
        rollout_batch=cfg.batch_size,
        ppo_epochs=1,
        max_new_tokens=cfg.new,
        kl_coef=cfg.kl,
        missing_eos_penalty=0,
        schedule="constant",
        lr=1e-6,
        lora_rank=cfg.lora_rank,
        device=cfg.device,
        dtype="bfloat16",
        save_every=-1,
        sample_every=-1,
        seed=cfg.seed,
    )
    began = time.time()
    ppo.main(config.load(ppo.Config, [f"{key}={value}" for key, value in settings.items()]))
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    seconds = [b - a for a, b in itertools.pairwise([began, *(record["time"] for record in log)])]
    rollouts = [record["rollout_s"] for record in log]
    return seconds, rollouts, [record["length"] * cfg.batch_size for record in log]


def run_trl(cfg, folder):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    texts = [text for text, _ in prompts(cfg)[1]]
    seconds, rollouts, tokens = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.perf_counter() - self.began)

    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=cfg.steps,
        per_device_train_batch_size=cfg.micro_batch,
        gradient_accumulation_steps=cfg.batch_size // cfg.micro_batch,
        num_generations=cfg.group,
        max_completion_length=cfg.new,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=cfg.kl,
        use_bias_correction_kl=False,  # k3 alone, as in ours
        num_iterations=1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=cfg.device == "cpu",
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=cfg.seed,
        generation_kwargs={} if cfg.ends else dict(min_new_tokens=cfg.new),
    )
    lora = None
    if cfg.lora_rank:
        shape = dict(r=cfg.lora_rank, lora_alpha=32, target_modules="all-linear")
        lora = LoraConfig(**shape, task_type="CAUSAL_LM")

    def rewards(completions, **_):
        return [reward("", text) for text in completions]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.bfloat16),
        args=args,
        reward_funcs=rewards,
        train_dataset=Dataset.from_list([dict(prompt=text) for text in texts]),
        callbacks=[Clock()],
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(cfg.model, padding_side="left"),
    )
    generate = trainer._generate_single_turn

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = generate(*args, **kwargs)
        rollouts.append(time.perf_counter() - began)
        tokens.append(sum(map(len, out[0])))
        return out

    trainer._generate_single_turn = timed
    trainer.train()
    return seconds, rollouts, tokens


def run(cfg):
    """One side, in this process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(cfg.threads)
    folder = Path(cfg.out)
    shutil.rmtree(folder / "run", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    side = run_ours if cfg.side == "ours" else run_trl
    seconds, rollout, tokens = side(cfg, folder)
    assert len(seconds) == len(rollout) == len(tokens) == cfg.steps
    result = dict(seconds=seconds[1:], rollout=rollout[1:], tokens=tokens[1:])
    if cfg.device == "cuda":
        result["memory"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(result))


def main(cfg):
    if cfg.batch_size % cfg.micro_batch or cfg.batch_size % cfg.group or cfg.steps < 2:
        raise UserError(
            f"batch_size={cfg.batch_size} must be a multiple of group= and of micro_batch=, "
            "and steps= 2 or more"
        )
    if cfg.side != "both":
        return run(cfg)
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = {side: dict(seconds=[], rollout=[], tokens=[]) for side in SIDES}
    memory = dict.fromkeys(SIDES, 0.0)
    for _ in range(cfg.repeats):
        for side in SIDES:
            command = python("-m", "bench.rl") + config.diff(replace(cfg, side=side))
            last, resident = finish(command, folder / f"{side}.txt", cfg.threads)
            result = json.loads(last)
            memory[side] = max(memory[side], result.pop("memory", resident))
            for key, values in result.items():
                results[side][key] += values
            print(f"{side}: {statistics.median(result['seconds']):.2f} s an iteration", flush=True)

    what = f"LoRA {cfg.lora_rank}" if cfg.lora_rank else "all weights"
    print(
        f"\n{platform.machine()}, {cfg.device}, {cfg.threads} threads; {cfg.model}, {what}, bf16, "
        f"KL coefficient {cfg.kl}; {cfg.batch_size} episodes in groups of {cfg.group}, prompts of "
        f"{cfg.prompt} tokens, responses of {'at most ' if cfg.ends else ''}{cfg.new}; medians of "
        f"{cfg.repeats} x {cfg.steps - 1} iterations\n"
    )
    columns = "rollout, s | the rest, s | response tokens/s | peak memory, GB"
    print(f"| program | s an iteration | (range) | {columns} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    medians, speeds = {}, {}
    for side, r in results.items():
        seconds, rollout = r["seconds"], r["rollout"]
        medians[side] = statistics.median(seconds)
        speeds[side] = sum(r["tokens"]) / sum(seconds)
        rest = statistics.median(a - b for a, b in zip(seconds, rollout, strict=True))
        cells = f"{medians[side]:.2f} | {min(seconds):.2f}-{max(seconds):.2f}"
        cells += f" | {statistics.median(rollout):.2f} | {rest:.2f}"
        print(f"| {side} | {cells} | {speeds[side]:.1f} | {memory[side]:.2f} |")
    slower = medians["trl"] / medians["ours"]
    faster = speeds["ours"] / speeds["trl"]
    print(f"\nTRL takes {slower:.2f} x our time; {faster:.2f} x its response tokens/s")


if __name__ == "__main__":
    config.run(main, Config)
