"""Preference records to a prepared data folder of groups, for reward.py and dpo.py.

    python -m prepare.preferences source=hh_harmless_test.jsonl.gz model=... out=data/hh val=462
    python -m prepare.preferences source=dpo_en_demo.json model=models/smollm2 out=data/dpo val=50
    python -m prepare.preferences source=HuggingFaceH4/stack-exchange-preferences model=... out=...

A group is a prompt's completions, best first. `source` is a JSON, JSONL, CSV, TSV or Parquet file
(.gz too), a folder of such files, or a hub id. The shape of each record is recognised. The prompt
has any of its usual names and is a text or messages. The completions are

    chosen, rejected   texts, messages, lists of messages, or whole transcripts of \\n\\nHuman: and
                       \\n\\nAssistant: turns
    completions        (or responses, answers, candidates, output) a list, best first. It is sorted
                       where there are scores: a list `scores`, or a score, overall_score, pm_score
                       or rank in each completion. Of equal scores the first completion stays.

Every completion is rendered behind its prompt as in supervised fine-tuning. Its row ends with the
last target token, the end of turn. Completions that are empty, too long or there twice are dropped,
and so is a group with fewer than two left. Nothing is truncated.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError
from prepare import convert, records
from prepare.convert import Drop, history, message, system, task, text, turns
from prepare.records import BadRecord


@dataclass
class Config:
    # what
    source: PathText  # file, folder or hub id
    model: PathText  # model directory whose tokenizer is used
    out: PathText  # the prepared folder; an earlier one there is replaced at the end
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id
    # how it is rendered
    template: str | None = None  # chat template by name; none: the model's own
    template_options: tuple[str, ...] = ()  # for variables that it reads: enable_thinking=false
    learn_empty_thoughts: bool = False  # a target is also the empty thought that a template prints
    # how much
    max_length: PositiveInt = 1024  # tokens of a prompt with one completion
    max_completions: int = 8  # of a prompt; the best ones stay
    val: str = "0"  # groups to hold out: 100, or 5%
    seed: Seed = 0  # of the choice of those groups
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used
    workers: NonNegativeInt = 0  # processes; 0: one a core, and one in all for small files
    show: NonNegativeInt = 0  # groups to print, target tokens coloured


# ---------------------------------------------------------- record -> prompt and ranked completions

PROMPTS = "prompt question instruction query input".split()
TURNS = "conversations conversation messages".split()
LISTS = "completions responses answers candidates output".split()
TEXTS = "response text answer completion output".split()
SCORES = {"overall_score": 1, "score": 1, "pm_score": 1, "rank": -1}  # -1: less is better
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Post(HTMLParser):
    """The text of a forum's post in HTML; str() gives it with paragraphs, lists and code marked."""

    MARKS = {
        "p": "\n\n",
        "pre": "\n\n```\n",
        "/pre": "\n```\n\n",
        "code": "`",
        "/code": "`",
        "li": "\n- ",
        "br": "\n",
        "blockquote": "\n\n> ",
    }
    MARKS |= {f"{slash}h{n}": "\n\n" for slash in ("", "/") for n in range(1, 7)}

    def __init__(self, html):
        super().__init__()
        self.parts = []
        self.depth = 0  # of <pre>, where <code> has no mark and white space is kept
        self.feed(html)
        self.close()

    def mark(self, tag):
        if self.depth == 0 or tag not in ("code", "/code"):
            self.parts.append(self.MARKS.get(tag, ""))

    def handle_starttag(self, tag, attrs):
        self.depth += tag == "pre"
        self.mark(tag)

    def handle_endtag(self, tag):
        self.depth -= tag == "pre"
        self.mark(f"/{tag}")

    def handle_data(self, data):
        if self.depth or data.strip():
            self.parts.append(data)
        elif data.strip("\n"):
            self.parts.append(" ")

    def __str__(self):
        return re.sub(r"\n{3,}", "\n\n", "".join(self.parts)).strip()


def transcript(whole):
    """Messages of a text of Human: and Assistant: turns.

    Neighbouring turns of one side are joined, except for the last turn, which may be the answer.
    """
    start, *pieces = TURN.split(whole)
    if start.strip() or not pieces:
        raise BadRecord("a transcript has to begin with Human: or Assistant:")
    messages = []
    for i in range(0, len(pieces), 2):
        role = "user" if pieces[i] == "Human" else "assistant"
        content = pieces[i + 1].strip()
        if messages and messages[-1]["role"] == role and i < len(pieces) - 2:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append(message(role, content))
    return messages


def prompt(record):
    """Messages of the prompt; [] where the record has no field for it."""
    before = system(record)
    key = next((key for key in (*TURNS, *PROMPTS) if record.get(key)), None)
    if key is None:
        return before
    if isinstance(record[key], list):
        return before + turns(record[key])
    question = text(record, key)
    if question.lstrip().startswith("Human:"):
        messages = transcript(question)
        if not messages[-1]["content"]:  # the Assistant's turn, which a completion fills
            messages.pop()
        return before + messages
    context = record.get("input") or "" if key == "instruction" else ""
    if not isinstance(context, str):
        raise BadRecord("'input' is not text")
    for past_question, past_answer in history(record):
        before += task([["INSTRUCTION", past_question]], "RESPONSE", past_answer)
    last, _ = task([[key.upper(), question], ["INPUT", context]], "RESPONSE", "")
    if key == "instruction":
        last |= {"content": question, "input": context}
    return [*before, last]


def ranked(record):
    """(completions best first, in any form; the number of others, whose score is not their own)."""
    for better, worse in (("chosen", "rejected"), ("response_j", "response_k")):
        if record.get(better) is not None and record.get(worse) is not None:
            return [record[better], record[worse]], 0
    key = next((key for key in LISTS if isinstance(record.get(key), list)), None)
    if key is None:
        raise BadRecord(
            f"unknown record shape (fields {', '.join(sorted(map(str, record)))}): known are "
            f"chosen and rejected, or a list of {', '.join(LISTS)}"
        )
    values = record[key]
    scores = record.get("scores")
    sign = 1
    if scores is None and values and all(isinstance(v, dict) for v in values):
        for field, direction in SCORES.items():
            if all(v.get(field) is not None for v in values):
                scores = [v[field] for v in values]
                sign = direction
                break
    if scores is None:
        return values, 0
    try:
        keys = [-sign * float(score) for score in scores]
        order = sorted(zip(keys, range(len(values)), strict=True))
        if not all(map(math.isfinite, keys)):  # a table has NaN where a score is missing
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(
            f"the scores {scores!r:.80} are not one number for each of the {len(values)} {key}"
        ) from None
    best = {}  # score -> the first value of that score
    for score, i in order:
        best.setdefault(score, values[i])
    return [*best.values()], len(values) - len(best)


def conversation(before, value):
    """Messages of a prompt and one completion in any form."""
    if isinstance(value, str) and TURN.match(value.lstrip()):
        whole = transcript(value.lstrip())
        prompt = [message(m["role"], m["content"]) for m in before if m["role"] != "system"]
        if whole[:-1][: len(prompt)] == prompt:  # the transcript begins with the prompt
            return before[: len(before) - len(prompt)] + whole
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        key = next((key for key in TEXTS if key in value), None)
        if key is None:
            raise BadRecord(f"a completion has none of the fields {', '.join(TEXTS)}")
        value = text(value, key)
    if isinstance(value, str):
        return [*before, message("assistant", value)]
    messages = turns([value] if isinstance(value, dict) else value)
    if messages[0]["role"] == "system":
        return messages
    if messages[0]["role"] == "user":  # the whole conversation, perhaps without its system prompt
        before = [m for m in before[:1] if m["role"] == "system"]
    return before + messages


def recognise(record):
    """(messages of the prompt, texts of the completions best first, Counter of those dropped)."""
    values, ties = ranked(record)
    before = prompt(record)
    prefix, completions = None, []
    html = any(isinstance(value, dict) and "pm_score" in value for value in values)
    for value in values:
        *start, last = conversation(before, value)
        if last["role"] != "assistant":
            raise Drop("a completion that does not end with the assistant")
        if prefix is not None and start != prefix:
            raise Drop("completions of different prompts")
        prefix = start
        completions.append(str(Post(last["content"])) if html else last["content"])
    if not prefix:
        raise Drop("no prompt")
    if prefix[-1]["role"] == "assistant":
        raise Drop("a prompt that ends with the assistant")
    if html:
        for i, m in enumerate(prefix):
            content = str(Post(m["content"]))
            prefix[i] = m | {"content": content, "columns": [["QUESTION", content]]}
    return prefix, completions, Counter({"score equal to another's": ties})


# --------------------------------------------------------------------------------- messages -> rows


def encode(cfg, tok, record):
    """([(ids (T,), mask (T,) bytes), ...] best first, ids of the prompt, Counter), for convert.py.

    The Counter has the completions that are dropped, by reason.
    """
    before, completions, dropped = recognise(record)
    rows, seen = [], set()
    for completion in completions:
        if not completion.strip():
            dropped["empty"] += 1
            continue
        answer = message("assistant", completion, columns=[["RESPONSE", completion]])
        # the row ends with a target, where the score is read
        ids, mask = convert.render(tok, [*before, answer], last_only=True)
        if ids.tobytes() in seen:
            dropped["the same text twice"] += 1
        elif len(ids) > cfg.max_length:
            dropped[f"longer than max_length={cfg.max_length}"] += 1
        elif len(rows) == cfg.max_completions:
            dropped[f"beyond max_completions={cfg.max_completions}"] += 1
        else:
            seen.add(ids.tobytes())
            rows.append((ids, mask))
    dropped = +dropped  # without zeros
    if len(rows) < 2:
        reason = "fewer than two completions left"
        if dropped:
            reason += f" (others: {dropped.most_common(1)[0][0]})"
        raise Drop(reason)
    ids, mask = rows[0]
    return rows, ids[: mask.index(1)], dropped


# ------------------------------------------------------------------------------------ the whole job


def find_files(cfg):
    """The files of the source; None for those of the hub. UserError where it can be neither."""
    files = records.find_files(cfg.source, cfg.out)
    is_path = "/" not in cfg.source or records.suffix(Path(cfg.source)) in records.SUFFIXES
    if not files and is_path:
        raise UserError(f"there is no file or folder {cfg.source}")
    return files


def main(cfg):
    if cfg.max_completions < 2:
        raise UserError(f"max_completions={cfg.max_completions}: a preference needs 2 or more")
    _, writer = convert.start(cfg, encode, cfg.template)
    with writer:
        hub = (cfg.source, [cfg.subset], cfg.split)
        total = convert.fill(cfg, writer, "group", find_files(cfg), hub)
        lost = total.counts
        writer.meta |= dict(dropped_groups=total.dropped, dropped_completions=lost) | total.bad
    mean = total.rows / len(total.sizes)
    lines = [("completions", total.rows, f"{mean:.2f} a group, best first")]
    lines += [("dropped of them", n, reason) for reason, n in lost.items()]
    convert.report(cfg, "group", total, "a completion with its prompt", before_tokens=lines)


if __name__ == "__main__":
    config.run(main, Config)
