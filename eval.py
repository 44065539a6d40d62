"""Measures what a model can do: tasks, text, a prepared folder, answers beside another model's.

    python eval.py model=models/smollm2 tasks=[arc,hellaswag,gsm8k] shots=[25,10,5] limit=200
    python eval.py model=out/lora/last base=models/smollm2 tasks=mmlu shots=5 out=out/eval
    python eval.py model=out/sft/last tasks=arc:easy files=arc_easy.jsonl      # without the hub
    python eval.py model=models/smollm2 text=book.txt                          # bits per byte
    python eval.py model=models/smollm2 data=data/alpaca                       # loss, accuracy
    python eval.py model=out/dpo/last against=out/sft/last reward=out/reward/last prompts=p.txt
    torchrun --nproc_per_node=8 eval.py model=models/smollm2 tasks=[arc,mmlu]

`model` is a model directory or an adapter's (PEFT). A task is a file in tasks/, or a part of one:
arc:easy. Tasks with choices compare the log-likelihoods of the options (acc, acc_norm), the others
let the model answer greedily and score the answer (em). nano/evaluation.py says what each metric
is. The last line of the output is the result as JSON. out= keeps it as results.json, beside a file
of examples for each task, and the same command goes on where it was interrupted.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nano import config, evaluation, files, log, runtime, weights
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError, With


@dataclass
class Config:
    # what
    model: PathText = "models/smollm2"  # model or adapter directory
    base: PathText | None = None  # for an adapter: the model to put it on
    out: Path | None = None  # folder of results.json and the examples; none: neither
    # tasks
    tasks: tuple[str, ...] = ()  # names of files in tasks/, or NAME:PART
    shots: Annotated[evaluation.Shots, With("tasks")] = (
        0,
    )  # answered examples in front: one number, or one a task
    files: Annotated[
        tuple[str, ...], With("tasks")
    ] = ()  # local files in the place of the hub's, one a task; "": the hub
    shot_files: Annotated[
        tuple[str, ...], With("tasks")
    ] = ()  # the same for the split of the shots
    limit: Annotated[NonNegativeInt, With("tasks")] = (
        0  # the first so many records of each task; 0: all
    )
    chat: Literal["auto", "true", "false"] = "auto"  # through the chat template, if there is one
    template: str | None = None  # chat template; none: the model's own
    seed: Annotated[Seed, With("tasks")] = 0  # draws the shots
    # device
    batch_size: PositiveInt = 32  # answers decoded together
    slots: NonNegativeInt = 0  # tokens of options in a forward, with all they see; 0: the device's
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


def open_model(cfg, path, rt):
    """The model and tokenizer of a directory (weights.Opened). UserError for a score model."""
    opened = weights.open(path, cfg.base, rt.device, rt.dtype, template=cfg.template)
    if opened.model.cfg.head != "lm":
        raise UserError(f"{path} is a score model: it gives no text and no log-likelihoods")
    return opened


class Results:
    """The measurements of a model, {name: values}, in out/results.json after each of them.

    A measurement that is there already, made with the same settings, is not made again."""

    def __init__(self, cfg, rt, header):
        self.out = cfg.out
        self.is_main = rt.is_main
        self.header = header
        self.before = {}
        self.values = {}
        if self.out:
            old = files.read_json(self.out / "results.json", missing={})
            self.before = {name: v for name, v in old.items() if isinstance(v, dict)}

    def known(self, name, settings):
        """Whether the measurement is there already. It is then among the values."""
        old = self.before.get(name, {})
        if old.get("settings") != settings:
            return False
        self.values[name] = old
        return True

    def add(self, name, settings, values, examples):
        """Keeps a measurement, and its examples as a line each."""
        self.values[name] = values | dict(settings=settings)
        if self.out and self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            files.write_text(self.out / f"{name.replace(':', '-')}.jsonl", "".join(lines))
            self.write()

    def document(self):
        """All of it as one JSON object."""
        centred = [v["centred"] for v in self.values.values() if "centred" in v]
        average = dict(average=sum(centred) / len(centred)) if centred else {}
        return self.header | average | self.values

    def write(self):
        # what other settings measured stays until it is measured again
        old = {name: v for name, v in self.before.items() if name not in self.values}
        files.write_json(self.out / "results.json", self.document() | old)

    def show(self):
        """The table, and the document as the last line."""
        rows = [["what", "how", "n", "metric", "value", "stderr"]]
        for name, values in self.values.items():
            how = ""
            if "shots" in values:
                how = f"shots {values['shots']}, {'chat' if values['chat'] else 'plain'}"
            first = [name, how, f"{values['count']:,}"]
            for metric, value in values["metrics"].items():
                error = values.get("stderr", {}).get(metric)
                rows.append(
                    [*first, metric, log.show(value), "" if error is None else log.show(error)]
                )
                first = ["", "", ""]
        document = self.document()
        if "average" in document:
            rows.append(["average", "centred", "", "", log.show(document["average"]), ""])
        print(log.table(rows, shutil.get_terminal_size().columns))
        print(json.dumps(document, ensure_ascii=False), flush=True)


def measure_tasks(cfg, rt, opened, results):
    """Measures the tasks of tasks=. All prompts are built before the first forward, so that a
    mistake costs no time."""
    waiting = []
    for task, shots in evaluation.load_tasks(cfg.tasks, cfg.shots, cfg.files, cfg.shot_files):
        settings = dict(
            results.header,
            shots=shots,
            limit=cfg.limit,
            chat=cfg.chat,
            template=cfg.template,
            seed=cfg.seed,
            file=task.file,
            shot_file=task.shot_file,
        )
        if not results.known(task.name, settings):
            benchmark = evaluation.prepare(
                task, opened.tok, opened.model.cfg, shots, cfg.limit, cfg.chat, cfg.seed
            )
            waiting.append((task.name, settings, benchmark))
    for name, settings, benchmark in waiting:
        began = time.perf_counter()
        result = evaluation.measure(
            benchmark, opened.model, opened.tok, rt, cfg.slots, cfg.batch_size
        )
        seconds = time.perf_counter() - began
        if rt.is_main:
            print(f"{name}: {result.count} records in {seconds:.1f} s", file=sys.stderr)
        results.add(name, settings, result.as_json() | dict(seconds=seconds), result.examples)


def main(cfg):
    if not cfg.tasks:
        raise UserError("nothing to measure: give tasks=")
    if cfg.out and cfg.out.exists() and not cfg.out.is_dir():
        raise UserError(f"out={cfg.out} is a file: give a folder")
    with runtime.start(cfg, parallel="ddp") as rt:
        evaluate(cfg, rt)


def evaluate(cfg, rt):
    opened = open_model(cfg, cfg.model, rt)
    header = dict(
        model=str(cfg.model),
        weights=weights.fingerprint(
            [(name, p.detach().cpu()) for name, p in opened.model.named_parameters()]
        ),
        device=rt.name,
        dtype=str(rt.dtype).removeprefix("torch."),
    )
    results = Results(cfg, rt, header)
    measure_tasks(cfg, rt, opened, results)
    if rt.is_main:
        results.show()


if __name__ == "__main__":
    config.run(main, Config)
