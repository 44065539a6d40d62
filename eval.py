"""Measures what a model can do: tasks, text, a prepared folder, answers beside another model's.

    python eval.py model=models/smollm2 'tasks=[arc,gsm8k]' 'shots=[25,5]' limit=200
    python eval.py model=out/lora/last base=models/smollm2 tasks=mmlu shots=5 out=out/eval
    python eval.py model=out/sft/last tasks=arc:easy files=arc_easy.jsonl      # without the hub
    python eval.py model=out/sft/last tasks=zbench files=zbench/ out=out/zbench    # people judge
    python eval.py model=models/smollm2 text=book.txt                          # bits per byte
    python eval.py model=models/smollm2 data=data/alpaca                       # loss, accuracy
    python eval.py model=out/dpo/last against=out/sft/last reward=out/reward/last prompts=p.txt
    torchrun --nproc_per_node=8 eval.py model=models/smollm2 'tasks=[arc,mmlu]'

`model` is a model directory or an adapter's (PEFT). A task is a file in tasks/, or a part of one:
arc:easy. Tasks with choices compare the log-likelihoods of the options (acc, acc_norm), the others
let the model answer greedily and score the answer (em). nano/evaluation.py says what each metric
is. The last line of the output is the result as JSON. out= keeps it as results.json, beside a file
of examples for each task, and the same command goes on where it was interrupted.
"""

import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

import lora
from nano import (
    batches,
    config,
    evaluation,
    files,
    log,
    losses,
    quant,
    records,
    runtime,
    sheets,
    store,
    weights,
)
from nano.config import FourBit, NonNegativeInt, PathText, PositiveInt, Seed, UserError, With
from sample import conversation, read_prompts


@dataclass
class Config:
    # what
    model: PathText = "models/smollm2"  # model or adapter directory
    base: PathText | None = None  # for an adapter: the model to put it on
    out: Path | None = None  # folder of results.json and the examples; none: neither
    # tasks
    tasks: tuple[str, ...] = ()  # names of files in tasks/, or NAME:PART
    shots: Annotated[evaluation.Shots, With("tasks")] = (0,)  # one number, or one a task
    files: Annotated[tuple[str, ...], With("tasks")] = ()  # a local file a task; "": the hub
    shot_files: Annotated[tuple[str, ...], With("tasks")] = ()  # the same for the shots
    limit: Annotated[NonNegativeInt, With("tasks")] = 0  # the first records of a task; 0: all
    # through the chat template, if there is one
    chat: Annotated[Literal["auto", "true", "false"], With("tasks")] = "auto"
    template: str | None = None  # chat template; none: the model's own
    seed: Annotated[Seed, With("tasks")] = 0  # draws the shots
    # text, data
    text: Path | None = None  # file of texts: .txt is one, .jsonl and others have a field text
    data: PathText = ""  # prepared folder: its validation split, or else all of it
    max_length: NonNegativeInt = 0  # tokens of a window of text, or of a row; 0: the model's
    # answers beside another model's
    prompts: Path | None = None  # file of prompts, as in sample.py
    against: Annotated[PathText, With("prompts")] = ""  # the other model or adapter
    reward: Annotated[PathText, With("prompts")] = ""  # score model or adapter that judges
    max_new_tokens: Annotated[PositiveInt, With("prompts")] = 256  # of an answer
    # device
    batch_size: PositiveInt = 32  # answers decoded together
    slots: NonNegativeInt = 0  # tokens of options in a forward, with all they see; 0: the device's
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # the linear layers of the blocks, in fewer bits a weight
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: FourBit[bool] = True  # 4.1 bits a weight, not 4.5: scales in 8 bits
    quant_kernel: FourBit[Literal["auto", "torch", "bitsandbytes"]] = "auto"  # what dequantises


def open_model(cfg, path, rt):
    """The model and tokenizer of a directory (weights.Opened). UserError for a score model."""
    method = quant.of(cfg)
    if rt.is_main:
        quant.note_training(path, cfg.quant)
    opened = weights.open(path, cfg.base, rt.device, rt.dtype, template=cfg.template, method=method)
    if opened.model.cfg.head != "lm":
        raise UserError(f"{path} is a score model: it gives no text and no log-likelihoods")
    return opened


def digest(value):
    """16 hex digits that name the content of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint(opened):
    """16 hex digits that name all that decides what a model says: its weights, its configuration,
    its tokenizer and its chat template."""
    model, tok = opened.model, opened.tok
    params = [(name, p.detach().cpu()) for name, p in model.named_parameters()]
    scales = [layer.scales for _, layer in lora.adapted(model)]
    words = tok.identity, tok.chat_template, tok.add_bos, tok.stop_ids
    return digest([weights.fingerprint(params), repr(model.cfg), scales, *words])


class Results:
    """The measurements of a model, {name: values}, in out/results.json after each of them.

    A measurement that is there already, made with the same settings, is not made again. The
    settings name the content of all files that it was made from, which may have changed."""

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

    def create_folder(self):
        """Before hours of measuring, because it may fail."""
        if self.out and self.is_main:
            self.out.mkdir(parents=True, exist_ok=True)

    def add(self, name, settings, values, examples):
        """Keeps a measurement, and its examples as a line each."""
        self.values[name] = values | dict(settings=settings)
        if self.out and self.is_main:
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
            contents=task.fingerprints(),
        )
        if task.is_judged and not (cfg.out and task.file):
            raise UserError(
                f"people judge the answers to {task.name}: name the folder of its CSV files by "
                "files=, and by out= where they get a column with the answers"
            )
        if not results.known(task.name, settings):
            benchmark = evaluation.prepare(
                task, opened.tok, opened.model.cfg, shots, cfg.limit, cfg.chat, cfg.seed
            )
            waiting.append((task, settings, benchmark))
    if waiting:
        results.create_folder()
    for task, settings, benchmark in waiting:
        began = time.perf_counter()
        if task.is_judged:
            values, examples = fill_sheets(cfg, rt, opened, benchmark, settings)
        else:
            result = evaluation.measure(
                benchmark, opened.model, opened.tok, rt, cfg.slots, cfg.batch_size
            )
            values, examples = result.as_json(), result.examples
        seconds = time.perf_counter() - began
        if rt.is_main:
            print(f"{task.name}: {values['count']} records in {seconds:.1f} s", file=sys.stderr)
        results.add(task.name, settings, values | dict(seconds=seconds), examples)


def fill_sheets(cfg, rt, opened, benchmark, settings):
    """Writes the answers to a task that people judge into its CSV files -> (values, examples).

    Its parts share the column of a model."""
    keys = ("model", "fingerprint", "dtype", "shots", "chat", "template", "seed")
    column = f"{cfg.model} ({digest([settings[key] for key in keys])[:8]})"
    texts = sheets.fill(benchmark, opened.model, opened.tok, rt, cfg.out, column, cfg.batch_size)
    answered = sum(map(bool, texts)) / len(texts)
    values = dict(metrics=dict(answered=answered), count=len(texts), column=column)
    values |= dict(shots=benchmark.shots, chat=benchmark.chat)
    rows = zip(benchmark.records, texts, strict=True)
    return values, [dict(record, answer=text) for record, text in rows]


def read_texts(path):
    """The texts of a file. UserError for a file without any, and for a record without a text."""
    if not path.is_file():
        raise UserError(f"text={path} is no file")
    if records.suffix(path) not in records.SUFFIXES:
        texts = [files.read_text(path)]
    else:
        texts = []
        with records.progress(None, "B") as bar:
            for line, raw in records.read_file(path, bar):
                try:
                    text = records.parse(raw).get("text")
                except records.BadRecord as e:
                    raise UserError(f"{path}:{line}: {e}") from None
                if not isinstance(text, str):
                    raise UserError(f"{path}:{line} has no field text that holds a text")
                texts.append(text)
    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"text={path} holds no text")
    return texts


def open_text(cfg, rt, opened):
    """(what names the content, what `measure_text` takes) of text=."""
    texts = read_texts(cfg.text)
    return digest(texts), (texts,)


def measure_text(cfg, rt, opened, texts):
    """Perplexity and bits per byte of texts -> (values, examples).

    A text is predicted in windows of max_length tokens. Each begins anew with one token of context,
    which for the first is BOS, or EOS where the model has no BOS. Every token counts once."""
    tok = opened.tok
    if tok.prompt_end:
        raise UserError(
            f"{cfg.model} answers prompts, and text= has none: measure it by tasks= or data="
        )
    size = min(cfg.max_length or math.inf, opened.model.cfg.max_positions)
    questions, owners = [], []
    for number, text in enumerate(texts):
        ids = [tok.eos_id if tok.bos_id is None else tok.bos_id, *tok.encode(text)]
        for begin in range(0, len(ids) - 1, size):
            window = ids[begin + 1 : begin + 1 + size]
            questions.append(evaluation.Question(ids[begin : begin + 1], [window]))
            owners.append(number)
    examples = [dict(number=i, text=text[:200], tokens=0, nll=0.0) for i, text in enumerate(texts)]
    scored = evaluation.loglikelihoods(opened.model, rt, questions, cfg.slots)
    for owner, question, (logprobs, _) in zip(owners, questions, scored, strict=True):
        examples[owner]["nll"] -= float(logprobs[0])
        examples[owner]["tokens"] += len(question.options[0])
    nll = sum(example["nll"] for example in examples)
    tokens = sum(example["tokens"] for example in examples)
    size = sum(len(text.encode()) for text in texts)
    metrics = dict(
        bits_per_byte=nll / math.log(2) / size, perplexity=math.exp(min(nll / tokens, 700))
    )
    return dict(metrics=metrics, count=len(texts), tokens=tokens, bytes=size), examples


def open_data(cfg, rt, opened):
    """(what names the content, what `measure_data` takes) of data=."""
    rows = store.validation([cfg.data], opened.tok) or store.mix([cfg.data], tokenizer=opened.tok)
    return rows.fingerprint(), (rows,)


def measure_data(cfg, rt, opened, rows):
    """Loss, perplexity and accuracy over the target tokens of a prepared folder -> (values, [])."""
    model = opened.model
    size = min(cfg.max_length or math.inf, rows.lengths.max(), model.cfg.max_positions)
    layout = dict(rank=rt.rank, world=rt.world, packing=False, start_ids=model.start_ids)
    data = batches.Rows(rows, 8 * rt.world, 8, int(size), **layout)
    sums = torch.zeros(3, dtype=torch.float64)  # loss, hits, targets
    with rt.evaluating(model):
        for step in range(data.steps_per_epoch):
            for micro in data.batch(step):
                batch = rt.put(micro)
                with rt.autocast():
                    hidden = model(batch)
                    logprobs, hits = losses.token_scores(hidden, model.head, batch["targets"])
                counted = batch["weights"]
                part = torch.stack((-logprobs @ counted, hits @ counted, counted.sum()))
                sums += part.cpu().double()
    loss, hits, count = (rt.all_sum(float(x)) for x in sums)
    loss /= max(count, 1)
    metrics = dict(loss=loss, perplexity=math.exp(min(loss, 700)), accuracy=hits / max(count, 1))
    return dict(metrics=metrics, count=len(data.index), targets=int(count)), []


def answers_of(cfg, rt, opened, entries):
    """The greedy answers of a model to prompts, as texts."""
    tok = opened.tok
    prompts = []
    for number, (messages, tools) in enumerate(entries, 1):
        if tok.template is None:
            ids = tok.encode("\n".join(m["content"] for m in messages), bos=tok.add_bos)
            ids += tok.prompt_end
        else:
            ids, _ = tok.render(messages, add_generation_prompt=True, tools=tools)
        if len(ids) >= opened.model.cfg.max_positions:
            raise UserError(
                f"{cfg.prompts}, prompt {number} has {len(ids)} tokens, and the model takes "
                f"{opened.model.cfg.max_positions}: shorten it"
            )
        prompts.append(ids)
    new = cfg.max_new_tokens
    pairs = evaluation.answers(opened.model, tok, rt, prompts, new, batch_size=cfg.batch_size)
    return [text for text, _ in pairs]


@torch.no_grad()
def judge(rt, scorer, conversations):
    """What a score model gives to the last answers of conversations, a list of floats.

    conversations: [(messages, tools or None), ...]"""
    model, tok = scorer.model, scorer.tok
    scores = []
    for messages, tools in conversations:
        if tok.template is None:
            ids = tok.encode("\n".join(m["content"] for m in messages), bos=tok.add_bos, eos=True)
        else:
            ids, mask = tok.render(messages, last_only=True, tools=tools)
            ids = ids[: len(mask) - mask[::-1].index(1)]  # up to the end of the answer
        ids = ids[-model.cfg.max_positions :]
        with rt.autocast():
            hidden = model.hidden(torch.tensor([ids], device=rt.device))
            scores.append(model.score(hidden[:, -1]).float().item())
        rt.sync()
    return scores


def open_wins(cfg, rt, opened):
    """(what names the content, what `measure_wins` takes) of prompts=, against= and reward=."""
    entries = [
        (conversation(entry, None) if isinstance(entry, str) else entry, tools)
        for entry, tools in read_prompts(cfg.prompts)
    ]
    scorer = weights.open(cfg.reward, None, rt.device, rt.dtype, method=quant.of(cfg))
    if scorer.model.cfg.head != "score":
        raise UserError(f"reward={cfg.reward} is a language model: give a score model of reward.py")
    scorer.model.eval()
    other = open_model(cfg, cfg.against, rt)
    names = [digest(entries), fingerprint(other), fingerprint(scorer)]
    return names, (entries, other, scorer)


def measure_wins(cfg, rt, opened, entries, other, scorer):
    """How often the score model prefers the model's answers to the other's -> (values, examples).

    It sees one answer at a time, so the order of the two cannot matter. Both rates are told, and a
    tie counts half in each."""
    ours = answers_of(cfg, rt, opened, entries)
    theirs = answers_of(cfg, rt, other, entries)
    scores = [
        judge(
            rt,
            scorer,
            [
                ([*messages, dict(role="assistant", content=text)], tools)
                for (messages, tools), text in zip(entries, texts, strict=True)
            ],
        )
        for texts in (ours, theirs)
    ]
    wins = [float(a > b) + (a == b) / 2 for a, b in zip(*scores, strict=True)]
    prompts = [messages for messages, _ in entries]
    rows = zip(prompts, ours, theirs, *scores, strict=True)
    names = ("prompt", "answer", "against", "score", "score_against")
    rate = sum(wins) / len(wins)
    values = dict(
        metrics=dict(win_rate=rate, win_rate_against=1 - rate),
        stderr=dict.fromkeys(("win_rate", "win_rate_against"), evaluation.stderr(wins)),
        count=len(wins),
        ties=sum(win == 0.5 for win in wins),
    )
    return values, [dict(zip(names, row, strict=True)) for row in rows]


def main(cfg):
    kinds = dict(
        text=(open_text, measure_text),
        data=(open_data, measure_data),
        prompts=(open_wins, measure_wins),
    )
    if not cfg.tasks and not any(getattr(cfg, kind) for kind in kinds):
        raise UserError("nothing to measure: give tasks=, text=, data= or prompts=")
    if cfg.prompts and not (cfg.against and cfg.reward):
        raise UserError("prompts= needs against=, another model, and reward=, a score model")
    for key, (a, b) in dict(
        max_length=("text", "data"),
        template=("tasks", "prompts"),
        batch_size=("tasks", "prompts"),
        slots=("tasks", "text"),
    ).items():
        if not (getattr(cfg, a) or getattr(cfg, b)):
            config.refuse(cfg, key, f"without {a}= and {b}=", f"{a}= or {b}=")
    if cfg.out and cfg.out.exists() and not cfg.out.is_dir():
        raise UserError(f"out={cfg.out} is a file: give a folder")
    with runtime.start(cfg, parallel="ddp") as rt:
        evaluate(cfg, rt, kinds)


def evaluate(cfg, rt, kinds):
    opened = open_model(cfg, cfg.model, rt)
    header = dict(
        model=str(cfg.model),
        fingerprint=fingerprint(opened),
        device=rt.name,
        dtype=str(rt.dtype).removeprefix("torch."),
    )
    if cfg.quant != "none":
        header["quant"] = cfg.quant
    results = Results(cfg, rt, header)
    measure_tasks(cfg, rt, opened, results)
    for kind, (open_source, measure) in kinds.items():
        if not getattr(cfg, kind):
            continue
        keys = (kind, "max_length")
        if kind == "prompts":
            keys = (kind, "against", "reward", "max_new_tokens", "template")
        contents, source = open_source(cfg, rt, opened)
        settings = header | {key: str(getattr(cfg, key)) for key in keys}
        settings["contents"] = contents
        if not results.known(kind, settings):
            results.create_folder()
            results.add(kind, settings, *measure(cfg, rt, opened, *source))
    if rt.is_main:
        results.show()


if __name__ == "__main__":
    config.run(main, Config)
