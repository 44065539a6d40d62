"""Seconds of a GRPO iteration (rollout, reward, update) beside TRL's GRPOTrainer: same model, prompts, lengths and groups, in bf16.

    python -m bench.rl model=models/smollm2 batch_size=16 group=8 new=128
    python -m bench.rl model=models/smollm2 ends=true                        # samples end where the model ends them

Every run is a process of its own and the two take turns; the table shows medians over all iterations but each run's first. One
optimizer step an iteration, TRL's default. TRL holds the weights in bf16, which is faster and coarser than our fp32 masters under
autocast, and takes the behaviour's log-probabilities for those of the update, where we compute them once more.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config
from nano.config import NonNegativeInt, PositiveInt, Seed, UserError

ROOT = Path(__file__).resolve().parent.parent

SIDES = ("ours", "trl")


@dataclass
class Config:
    model: str = "models/smollm2"
    out: str = "out/bench/rl"  # scratch folder
    batch_size: PositiveInt = 16  # episodes of an iteration
    group: PositiveInt = 8  # samples of a prompt
    micro_batch: PositiveInt = 8  # episodes of one forward of the update
    prompt: int = 32  # tokens of a prompt
    new: int = 128  # tokens of a response
    ends: bool = False  # false: every response has `new` tokens; true: or fewer, up to the end that the model samples
    steps: NonNegativeInt = 4  # iterations of a run; the first is not timed
    repeats: int = 3
    kl: float = 0.05  # coefficient of the KL to the reference model; 0: TRL then has none
    lora_rank: NonNegativeInt = 0  # 0: all weights
    device: str = "cpu"  # cpu, cuda
    threads: int = 2
    seed: Seed = 0
    side: Literal["both", "ours", "trl"] = "both"  # one: a run in this process


def reward(prompt, response, finished=True):
    """The share of letter e: it costs nothing and differs between samples."""
    return response.count("e") / max(len(response), 1)


def prompts(cfg):
    """Texts of `prompt` tokens, of words of the model's own, the same for both sides."""
    import numpy as np

    from nano import tokenizer

    tok, rng, found = tokenizer.load(cfg.model), np.random.default_rng(cfg.seed), []
    while len(found) < cfg.batch_size:
        ids = tok.encode(
            tok.decode(rng.integers(tok.vocab_size // 4, tok.vocab_size, 2 * cfg.prompt).tolist())
        )[: cfg.prompt]
        text = tok.decode(ids)
        if tok.encode(text) == ids and len(ids) == cfg.prompt:
            found.append((text, ids))
    return tok, found


def run_ours(cfg, folder):
    """-> (seconds of each iteration, of its rollout, response tokens of each)"""
    import ppo
    from nano import store, tokenizer

    tok, asked = prompts(cfg)
    rows = [(ids + [ids[0]], [0] * len(ids) + [1]) for _, ids in asked]
    store.write_store(
        folder / "data",
        dict(train=rows),
        dict(vocab_size=tok.vocab_size, tokenizer=tok.fingerprint),
    )
    if not cfg.ends:
        load = tokenizer.load

        def endless(*args):
            tok = load(*args)
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
    ends = [began, *(record["time"] for record in log)]
    seconds = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return (
        seconds,
        [record["rollout_s"] for record in log],
        [record["length"] * cfg.batch_size for record in log],
    )


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
    lora = (
        LoraConfig(
            r=cfg.lora_rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if cfg.lora_rank
        else None
    )

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
    seconds, rollout, tokens = (run_ours if cfg.side == "ours" else run_trl)(cfg, folder)
    assert len(seconds) == len(rollout) == len(tokens) == cfg.steps
    memory = (
        torch.cuda.max_memory_allocated() / 1e9 if cfg.device == "cuda" else 0
    )  # of a CPU the parent knows it
    print(
        json.dumps(dict(seconds=seconds[1:], rollout=rollout[1:], tokens=tokens[1:], memory=memory))
    )


def main(cfg):
    if cfg.batch_size % cfg.micro_batch or cfg.batch_size % cfg.group or cfg.steps < 2:
        raise UserError(
            f"batch_size={cfg.batch_size} must be a multiple of group= and of micro_batch=, and steps= 2 or more"
        )
    if cfg.side != "both":
        return run(cfg)
    results, memory = (
        {side: dict(seconds=[], rollout=[], tokens=[]) for side in SIDES},
        dict.fromkeys(SIDES, 0.0),
    )
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for _ in range(cfg.repeats):
        for side in SIDES:
            output = Path(cfg.out) / f"{side}.txt"
            command = [sys.executable, "-m", "bench.rl", *config.diff(cfg), f"side={side}"]
            environment = os.environ | dict(OMP_NUM_THREADS=str(cfg.threads))
            with open(output, "w", encoding="utf-8") as f:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT
                )
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
            lines = output.read_text(encoding="utf-8").splitlines()
            if child.returncode:
                raise UserError(
                    f"{side} ended with status {child.returncode}; {output} ends: {lines[-1:]}"
                )
            said = json.loads(lines[-1])
            resident = usage.ru_maxrss / 1e6 * (1e-3 if sys.platform == "darwin" else 1.024)
            memory[side] = max(memory[side], said.pop("memory") or resident)
            for key, values in said.items():
                results[side][key] += values
            print(f"{side}: {statistics.median(said['seconds']):.2f} s an iteration", flush=True)

    what = f"LoRA {cfg.lora_rank}" if cfg.lora_rank else "all weights"
    lengths = (
        f"prompts of {cfg.prompt} tokens, responses of {'at most ' if cfg.ends else ''}{cfg.new}"
    )
    print(
        f"\n{platform.machine()}, {cfg.device}, {cfg.threads} threads; {cfg.model}, {what}, bf16, KL coefficient {cfg.kl}; "
        f"{cfg.batch_size} episodes in groups of {cfg.group}, {lengths}; medians of {cfg.repeats} x {cfg.steps - 1} iterations\n"
    )
    print(
        "| program | s an iteration | (range) | rollout, s | the rest, s | response tokens/s | peak memory, GB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for side, r in results.items():
        rest = statistics.median(a - b for a, b in zip(r["seconds"], r["rollout"], strict=True))
        speed = sum(r["tokens"]) / sum(r["seconds"])
        print(
            f"| {side} | {statistics.median(r['seconds']):.2f} | {min(r['seconds']):.2f}-{max(r['seconds']):.2f} | "
            f"{statistics.median(r['rollout']):.2f} | {rest:.2f} | {speed:.1f} | {memory[side]:.2f} |"
        )
    medians = [statistics.median(results[side]["seconds"]) for side in SIDES]
    speeds = [sum(results[side]["tokens"]) / sum(results[side]["seconds"]) for side in SIDES]
    print(
        f"\nTRL takes {medians[1] / medians[0]:.2f} x our time; {speeds[0] / speeds[1]:.2f} x its response tokens/s"
    )


if __name__ == "__main__":
    config.run(main, Config)
