"""The log-likelihoods and the speed of eval.py beside EleutherAI's lm-eval, task by task.

    pip install lm-eval==0.4.13                 # for this script alone
    python -m bench.lm_eval data=bench model=models/smollm2 limit=200
    python -m bench.lm_eval data=bench limit=20 dtype=bfloat16 batch=32
    python -m bench.lm_eval data=bench tasks=gsm8k shots=2 limit=8        # greedy answers

Both get the same weights and the same records. `data` is a folder of llm-foundry's and QLoRA's
files. They are rewritten in the columns of the hub for lm-eval, whose task definitions write the
prompts. So equal log-likelihoods show that prompts, tokens and sums are equal. The shots are the
records behind the measured ones, in order. The times are those from records to results: seconds of
the process's cores on a CPU, elsewhere those of the wall.

"of peak" is the share of those seconds in which torch could compute the matrix products that the
task needs, with the model's shapes, as fast as it does in this run on rows of 512. Padding is not
needed, nor is what options and shots share needed twice.
"""

import json
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix  # of any sequences
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import nano  # noqa: F401  first, because bench/nano.py finds the others
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
ANSWERED = {"gsm8k": ("gsm8k", "../gsm8k_test.jsonl")}
METRICS = {  # ours: lm-eval's
    "acc": "acc,none",
    "acc_norm_chars": "acc_norm,none",
    "perplexity": "perplexity,none",
    "em": "exact_match,flexible-extract",
    "em_strict": "exact_match,strict-match",
}


@dataclass
class Config:
    data: PathText  # folder of the files of FILES
    model: PathText = "models/smollm2"
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
    if name == "gsm8k":
        return record
    return dict(question=record["question"], choices=record["options"], answer=record["gold"])


def their_task(name, records, shots, folder):
    """lm-eval's task over our records, of which some are shown."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager()
    theirs = (FILES | ANSWERED)[name][0]
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
    """(logprobs of each record's options, or its answer; metrics; seconds)"""
    from lm_eval.evaluator import evaluate

    name = task.task_name
    task.set_config("num_fewshot", cfg.shots)
    began = clock(cfg.device)
    # simple_evaluate would also list the versions of what is installed, for half a minute
    result = evaluate(lm, {name: task}, limit=cfg.limit, bootstrap_iters=0, log_samples=True)
    seconds = clock(cfg.device) - began
    # a task with several filters lists a record once for each
    samples = {sample["doc_id"]: sample for sample in result["samples"][name]}
    responses = [[resp[0] for resp in samples[n]["resps"]] for n in sorted(samples)]
    if name not in ANSWERED:
        responses = [[logprob for logprob, _ in options] for options in responses]
    return responses, result["results"][name], seconds


def product_seconds(cfg, shapes, dtype, device, rows=512):
    """Seconds a token that products of `rows` tokens with matrices of these shapes take."""
    total = 0.0
    for shape, count in Counter(shapes).items():
        x, w = (torch.randn(n, shape[1], dtype=dtype, device=device) for n in (rows, shape[0]))
        best = math.inf
        for _ in range(5):
            began = clock(cfg.device)
            (x @ w.t()).sum().item()
            best = min(best, clock(cfg.device) - began)
        total += count * best / rows
    return total


def needed(benchmark):
    """(tokens that a model has to see, positions that have to predict) for a task's options. What
    rows begin with alike has to be seen once."""
    pairs = [pair for pairs in benchmark.prompts for pair in pairs]
    rows = sorted(context + option[:-1] for context, option in pairs)
    shared = sum(len(commonprefix(two)) for two in pairwise(rows))
    return sum(map(len, rows)) - shared, sum(len(option) for _, option in pairs)


def compare(cfg, rt, opened, lm, name, folder):
    """The row of a task."""
    _, file = (FILES | ANSWERED)[name]
    task = tasks.load(name, str(Path(cfg.data, file)))
    records = task.records()
    records, shots = records[: cfg.limit], records[cfg.limit :][: cfg.shots]
    their = their_task(name, records, shots, folder)
    responses, their_metrics, their_seconds = their_results(their, lm, cfg)
    task.module.IN_ORDER = True
    task.records = lambda shots=False, both=(records, shots): both[shots]
    began = clock(cfg.device)
    benchmark = evaluation.prepare(
        task, opened.tok, opened.model.cfg, cfg.shots, cfg.limit, chat="false"
    )
    result = evaluation.measure(benchmark, opened.model, opened.tok, rt)
    seconds = clock(cfg.device) - began
    row = {"task": name, "n": result.count}
    pairs = [*zip(result.examples, responses, strict=True)]
    if task.has_choices:
        row["far"] = max(
            float(np.abs(np.array(example["logprobs"]) - other).max()) for example, other in pairs
        )
        layers = opened.model.layers
        shapes = [tuple(p.shape) for p in layers.parameters() if p.dim() == 2]
        where = rt.dtype, rt.device
        tokens, scored = needed(benchmark)
        needs = tokens * product_seconds(cfg, shapes, *where)
        needs += scored * product_seconds(cfg, [tuple(opened.model.head_weight.shape)], *where)
        row |= dict(tokens=tokens, of_peak=needs / seconds)
    else:
        same = [example["answer"].strip() == other[0].strip() for example, other in pairs]
        row["same answers"] = sum(same) / len(same)
    for ours, other in METRICS.items():
        if ours in result.metrics and other in their_metrics:
            row[ours] = [result.metrics[ours], their_metrics[other]]
    return row | dict(seconds=[seconds, their_seconds], ratio=their_seconds / seconds)


def main(cfg):
    from lm_eval.models.huggingface import HFLM

    with runtime.start(cfg, parallel="none") as rt:
        opened = weights.open(cfg.model, None, rt.device, rt.dtype)
    lm = HFLM(pretrained=str(cfg.model), dtype=cfg.dtype, device=cfg.device, batch_size=cfg.batch)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cfg.tasks:
            rows.append(compare(cfg, rt, opened, lm, name, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
            if cfg.out:
                Path(cfg.out).write_text("".join(json.dumps(r) + "\n" for r in rows))
    names = [name for name in METRICS if any(name in row for row in rows)]
    head = ["task", "n", "max diff", "same", *(f"{name}, lm-eval" for name in names)]
    body = []
    for row in rows:
        cells = [row["task"], str(row["n"])]
        cells.append(f"{row['far']:.1e}" if "far" in row else "")
        cells.append(f"{row['same answers']:.0%}" if "same answers" in row else "")
        cells += [", ".join(log.show(x) for x in row.get(name, ())) for name in names]
        cells += [f"{x:.1f}" for x in row["seconds"]] + [f"{row['ratio']:.2f}"]
        body.append([*cells, f"{row['of_peak']:.0%}" if "of_peak" in row else ""])
    print(log.table([[*head, "s", "lm-eval, s", "ratio", "of peak"], *body], 140))


if __name__ == "__main__":
    config.run(main, Config)
