"""The log-likelihoods and the speed of eval.py beside EleutherAI's lm-eval, task by task.

    pip install lm-eval==0.4.13                 # for this script alone
    python -m bench.lm_eval model=models/smollm2 data=../shared/data/bench limit=200
    python -m bench.lm_eval limit=20 dtype=bfloat16 batch=32

Both get the same weights and the same records. `data` is a folder of llm-foundry's and QLoRA's
files. They are rewritten in the columns of the hub for lm-eval, whose task definitions write the
prompts. So equal log-likelihoods show that prompts, tokens and sums are equal. The shots are the
records behind the measured ones, in order. The times are those from records to results: seconds of
the process's cores on a CPU, elsewhere those of the wall. The product peak is what torch multiplies
in the same dtype in this run.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import nano  # noqa: F401  first, because bench/nano.py finds the others
from model import Transformer
from nano import config, evaluation, log, runtime, tasks, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed

FILES = {  # task: (its name in lm-eval, its file)
    "arc:easy": ("arc_easy", "arc_easy.jsonl"),
    "arc:challenge": ("arc_challenge", "arc_challenge.jsonl"),
    "winogrande": ("winogrande", "winogrande.jsonl"),
    "piqa": ("piqa", "piqa.jsonl"),
    "lambada": ("lambada_openai", "lambada_openai.jsonl"),
    "hellaswag": ("hellaswag", "hellaswag_val.jsonl"),
    "boolq": ("boolq", "boolq.jsonl"),
    "mmlu:anatomy": ("mmlu_anatomy", "mmlu_val_zero_shot.jsonl"),
    "mmlu:high_school_physics": ("mmlu_high_school_physics", "mmlu_val_zero_shot.jsonl"),
    "mmlu:philosophy": ("mmlu_philosophy", "mmlu_val_zero_shot.jsonl"),
}


@dataclass
class Config:
    model: PathText = "models/smollm2"
    data: PathText = "../shared/data/bench"
    tasks: tuple[str, ...] = tuple(FILES)
    limit: PositiveInt = 200  # records of a task
    shots: NonNegativeInt = 0  # answered examples in front
    batch: PositiveInt = 16  # lm-eval's batch size
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    out: PathText = ""  # file of the table as JSON lines; "": none
    seed: Seed = 0


def clock(device):
    """Seconds of this process's CPUs, which other programs do not lengthen. On a GPU those of the
    wall."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def hub_row(name, record):
    """A record of ours as a row of the task's set on the hub."""
    if name.startswith("arc"):
        labels = [*"ABCDE"[: len(record["choices"])]]
        choices = dict(text=record["choices"], label=labels)
        return dict(question=record["question"], choices=choices, answerKey=labels[record["gold"]])
    if name == "winogrande":
        first, second = record["names"]
        answer = str(record["gold"] + 1)
        return dict(sentence=record["sentence"], option1=first, option2=second, answer=answer)
    if name == "piqa":
        first, second = record["choices"]
        return dict(goal=record["goal"], sol1=first, sol2=second, label=record["gold"])
    if name == "lambada":
        return dict(text=f"{record['start']} {record['word']}")
    if name == "hellaswag":
        return dict(query=record["start"], choices=record["endings"], label=record["gold"])
    if name == "boolq":
        return record | dict(label=record["gold"])
    return dict(question=record["question"], choices=record["options"], answer=record["gold"])


def their_task(name, records, shots, folder):
    """lm-eval's task over our records, of which some are shown."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager()
    theirs = FILES[name][0]
    paths = {}
    for split, part in dict(test=records, dev=shots or records[:1]).items():
        paths[split] = str(folder / f"{theirs}.{split}.jsonl")
        text = "".join(json.dumps(hub_row(name, r)) + "\n" for r in part)
        Path(paths[split]).write_text(text)
    settings = load_yaml(manager.task_index[theirs].yaml_path, resolve_func=True)
    for key in ("tag", "group", "process_docs"):
        settings.pop(key, None)
    settings |= dict(
        dataset_path="json",
        dataset_name=None,
        dataset_kwargs=dict(data_files=paths),
        training_split=None,
        validation_split=None,
        test_split="test",
        fewshot_split="dev",
        fewshot_config=dict(sampler="first_n"),
    )
    return manager.load([settings])["tasks"][theirs]


def their_results(task, lm, cfg):
    """(logprobs of each record's options, metrics, seconds)"""
    from lm_eval.evaluator import evaluate

    name = task.task_name
    task.set_config("num_fewshot", cfg.shots)
    began = clock(cfg.device)
    # simple_evaluate would also list the versions of what is installed, for half a minute
    result = evaluate(lm, {name: task}, limit=cfg.limit, bootstrap_iters=0, log_samples=True)
    seconds = clock(cfg.device) - began
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    logprobs = [[resp[0][0] for resp in sample["resps"]] for sample in samples]
    return logprobs, result["results"][name], seconds


def product_peak(cfg, dtype, device, size=2048):
    """FLOP/s of torch's matrix product."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = 0.0
    for _ in range(5):
        began = clock(cfg.device)
        (a @ b).sum().item()
        best = max(best, 2 * size**3 / (clock(cfg.device) - began))
    return best


def count_tokens():
    """[0], which grows by the tokens of each forward."""
    total = [0]
    whole = Transformer.hidden

    def hidden(self, tokens, *args, **kwargs):
        total[0] += tokens.numel()
        return whole(self, tokens, *args, **kwargs)

    Transformer.hidden = hidden
    return total


def main(cfg):
    from lm_eval.models.huggingface import HFLM

    with runtime.start(cfg, parallel="none") as rt:
        opened = weights.open(cfg.model, None, rt.device, rt.dtype)
    lm = HFLM(pretrained=str(cfg.model), dtype=cfg.dtype, device=cfg.device, batch_size=cfg.batch)
    total = count_tokens()
    matrices = opened.model.flops_per_token(0) / 6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cfg.tasks:
            theirs, file = FILES[name]
            task = tasks.load(name, str(Path(cfg.data, file)))
            records = task.records()
            records, shots = records[: cfg.limit], records[cfg.limit :][: cfg.shots]
            their = their_task(name, records, shots, Path(folder))
            their_logprobs, their_metrics, their_seconds = their_results(their, lm, cfg)
            total[0] = 0
            peak = product_peak(cfg, rt.dtype, rt.device)
            began = clock(cfg.device)
            task.module.IN_ORDER = True
            task.records = lambda shots=False, both=(records, shots): both[shots]
            benchmark = evaluation.prepare(
                task, opened.tok, opened.model.cfg, cfg.shots, cfg.limit, chat="false"
            )
            result = evaluation.measure(benchmark, opened.model, opened.tok, rt)
            seconds = clock(cfg.device) - began
            far = max(
                float(np.abs(np.array(example["logprobs"]) - other).max())
                for example, other in zip(result.examples, their_logprobs, strict=True)
            )
            row = {"task": name, "n": result.count, "far": far}
            for ours, other in (
                ("acc", "acc"),
                ("acc_norm_chars", "acc_norm"),
                ("perplexity",) * 2,
            ):
                if ours in result.metrics and f"{other},none" in their_metrics:
                    row[other] = [result.metrics[ours], their_metrics[f"{other},none"]]
            row |= dict(
                seconds=[seconds, their_seconds],
                ratio=their_seconds / seconds,
                tokens=total[0],
                of_peak=total[0] * 2 * matrices / seconds / peak,
                peak=peak,
            )
            rows.append(row)
            print(json.dumps(row), flush=True)
            if cfg.out:
                Path(cfg.out).write_text("".join(json.dumps(r) + "\n" for r in rows))
    head = "task|n|max diff|acc|lm-eval|acc_norm|lm-eval|s|lm-eval|ratio|of peak".split("|")
    body = [
        [
            row["task"],
            str(row["n"]),
            f"{row['far']:.1e}",
            *(log.show(x) for x in row["acc"]),
            *(log.show(x) for x in row.get("acc_norm", ["", ""])),
            *(f"{x:.1f}" for x in row["seconds"]),
            f"{row['ratio']:.2f}",
            f"{row['of_peak']:.0%}",
        ]
        for row in rows
    ]
    print(log.table([head, *body], 140))


if __name__ == "__main__":
    config.run(main, Config)
