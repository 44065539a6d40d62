"""Instruction records to a prepared data folder: rendered, tokenized, the target tokens marked.

    python -m prepare.instructions source=alpaca.json model=models/smollm2 out=data/alpaca val=100
    python -m prepare.instructions source=chats/ model=models/llama train_on=last out=data/chats
    python -m prepare.instructions source=tweets.csv text_field=text response_template="Label:" ...
    python -m prepare.instructions source=gsm8k path=train.jsonl template=columns model=... out=...

`source` is a JSON, JSONL, CSV, TSV or Parquet file (.gz too), a folder of such files, the name of a
known set, or a hub id. The shape of each record is recognised: Alpaca (instruction, input, output),
messages or conversations (role/content or from/value), or pairs such as prompt/completion.
With text_field= a record is one text.

Rows keep the order of the records; sft.py shuffles them in every epoch. The rows to hold out are
chosen by the hash of their content.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError, With
from prepare import convert, records
from prepare.convert import Drop, history, message, system, task, text, turns
from prepare.records import BadRecord


@dataclass
class Config:
    # what
    source: PathText  # file, folder, known set (see `SETS` in this file) or hub id
    model: PathText  # model directory whose tokenizer is used
    out: PathText  # the prepared folder; an earlier one there is replaced at the end
    path: PathText | None = None  # local file or folder of a known set; none: the hub
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id
    # how it is rendered
    template: str | None = None  # chat template by name; none: the model's own
    template_options: tuple[str, ...] = ()  # for variables that it reads: enable_thinking=false
    learn_empty_thoughts: bool = False  # a target is also the empty thought that a template prints
    text_field: str | None = None  # every record is one text, in this field (template: plain)
    rendered: Annotated[bool, With("text_field")] = False  # a chat template has made that text
    response_template: str | None = None  # the target is the text after it; none: all
    train_on: Literal["all", "last"] = "all"  # targets: every assistant turn, or the last one
    # how much
    max_length: PositiveInt = 2048  # tokens of a row
    over_length: Literal["drop", "truncate"] = "drop"  # a longer row goes, or loses its end
    val: str = "0"  # rows to hold out: 100, or a share such as 5%
    seed: Seed = 0  # of the choice of those rows
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used
    workers: NonNegativeInt = 0  # processes; 0: one a core, and one in all for small files
    show: NonNegativeInt = 0  # examples to print, target tokens coloured


# ------------------------------------------------------------------------------- record -> messages

PAIRS = "prompt/completion prompt/response question/answer query/response input/output".split()


def recognise(record):
    """Messages of a record in one of the common shapes."""
    if record.get("tools") not in (None, "", [], "[]"):
        raise Drop("tool definitions (not rendered)")
    # a table has nulls in the fields that a record does not use
    record = {key: value for key, value in record.items() if value is not None}
    before = system(record)
    for key in ("messages", "conversations", "conversation"):
        if key in record:
            messages = before + turns(record[key])
            if messages[-1]["role"] != "assistant" and isinstance(record.get("chosen"), dict):
                messages += turns([record["chosen"]])  # the better answer of preference data
            return messages
    if "instruction" in record:
        answer = text(record, "response" if "response" in record else "output")
        question = message("user", text(record, "instruction"))
        more = next((key for key in ("input", "context") if record.get(key)), None)
        if more:
            question["input"] = text(record, more)
        for past_question, past_answer in history(record):
            before += [message("user", past_question), message("assistant", past_answer)]
        return [*before, question, message("assistant", answer)]
    for pair in PAIRS:
        ask, reply = pair.split("/")
        if ask not in record or reply not in record:
            continue
        if isinstance(record[ask], list) and isinstance(record[reply], list):
            return before + turns(record[ask] + record[reply])
        columns = [[ask.upper(), text(record, ask)]]
        if ask == "question" and record.get("context"):
            columns.append(["CONTEXT", text(record, "context")])
        return before + task(columns, reply.upper(), text(record, reply))
    raise BadRecord(
        f"unknown record shape (fields {', '.join(sorted(map(str, record)))}): known are "
        f"instruction/output, messages, conversations, {', '.join(PAIRS)}; or give text_field="
    )


# Training sets that are known by name. The parts of a record become columns.


def cot(r):
    answer = f"{text(r, 'rationale')}\n\n### TARGET:\n{text(r, 'target')}"
    return task([["SOURCE", text(r, "source")]], "RATIONALE", answer)


def slimorca(r):
    messages = turns(r.get("conversations"))
    if [m["role"] for m in messages].count("assistant") == 1:
        # the template "columns" lays out conversations with more answers like this by itself
        for m, speaker in zip(messages, r["conversations"], strict=True):
            m["columns"] = [["FROM", text(speaker, "from")], ["VALUE", m["content"]]]
        messages[-1]["columns"] = [["GPT", messages[-1]["content"]]]
    return messages


def openorca(r):
    prompt = text(r, "system_prompt")
    messages = task([["QUESTION", text(r, "question")]], "RESPONSE", text(r, "response"))
    if prompt:
        messages.insert(0, message("system", prompt, columns=[["INSTRUCTION", prompt]]))
    return messages


def choices(r, column, labels, texts, label):
    """Messages of a question with several answers, of which the one with `label` is right."""
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise BadRecord("'choices' is not a list of answers, with a label each")
    if label not in labels:
        raise BadRecord(f"the answer {label!r} is none of the choices")
    options = " ".join(f"({a}): {t}" for a, t in zip(labels, texts, strict=True))
    answer = text({"choices": texts[labels.index(label)]}, "choices")
    return task([["QUESTION", text(r, "question")], [column, options]], "ANSWER", answer)


def mmlu(r):
    options = r.get("choices")
    labels = list(range(len(options))) if isinstance(options, list) else None
    return choices(r, "CHOICES", labels, options, r.get("answer"))


def arc(r):
    options = r["choices"] if isinstance(r.get("choices"), dict) else {}
    labels, texts = options.get("label"), options.get("text")
    return choices(r, "CANDIDATE ANSWERS", labels, texts, r.get("answerKey"))


def winogrande(r):
    answer = str(r.get("answer"))  # "1" or "2"; the files hold text, some copies numbers
    if answer not in ("1", "2"):
        raise BadRecord(f"'answer' is {answer!r} and neither 1 nor 2")
    columns = [[key.upper(), text(r, key)] for key in ("sentence", "option1", "option2")]
    return task(columns, "ANSWER", text(r, f"option{answer}"))


SETS = {  # name: (hub id, configurations, split, record -> messages)
    "alpaca": ("tatsu-lab/alpaca", [None], "train", recognise),
    "cot-collection": ("kaist-ai/CoT-Collection", [None], "train", cot),
    "slimorca": ("Open-Orca/SlimOrca", [None], "train", slimorca),
    "openorca-multiplechoice": ("beaugogh/openorca-multiplechoice-10k", [None], "train", openorca),
    "mmlu": ("cais/mmlu", ["all"], "auxiliary_train", mmlu),
    "arc": ("allenai/ai2_arc", ["ARC-Challenge", "ARC-Easy"], "train", arc),
    "gsm8k": ("openai/gsm8k", ["main"], "train", recognise),
    **{
        f"winogrande_{size}": ("allenai/winogrande", [f"winogrande_{size}"], "train", winogrande)
        for size in ("xs", "s", "m", "l", "xl")
    },
}


def split_text(cfg, record):
    """Messages of a whole text. The answer begins after the last response template in it."""
    whole = text(record, cfg.text_field)
    if not cfg.response_template:
        return [message("assistant", whole)]
    before, mark, answer = whole.rpartition(cfg.response_template)
    if not mark:
        raise Drop("no response template in the text")
    return [message("user", before + mark), message("assistant", answer)]


def read_rendered(cfg, tok, record):
    """(ids (T,), mask (T,) bytes) of a text that a chat template has made.

    The targets are the answers, or the text after the last response template.
    """
    whole = text(record, cfg.text_field)
    if cfg.response_template:
        before, mark, _ = whole.rpartition(cfg.response_template)
        spans = [(len(before) + len(mark), len(whole))] if mark else []
    else:
        spans = tok.layout.answers_in(whole)
    if not spans:
        raise Drop("no response template in the text" if cfg.response_template else "no answer")
    return convert.to_last_target(*tok.read_rendered(whole, spans))


# -------------------------------------------------------------------------------- messages -> a row


def encode(cfg, tok, record):
    """([(ids (T,), mask (T,) bytes)], ids, {"truncated": 0 or 1}) of a record, for convert.py."""
    counts = {}
    if cfg.rendered:
        return fit(cfg, *read_rendered(cfg, tok, record), counts)
    if cfg.text_field:
        messages = split_text(cfg, record)
        if any(tok.spells_out(m["content"]) for m in messages):
            counts = {"with control tokens": 1}
    elif cfg.source in SETS:
        messages = SETS[cfg.source][3](record)
    else:
        messages = recognise(record)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        raise Drop("no assistant turn")
    if not answers[-1].strip():
        raise Drop("empty answer")
    last_only = cfg.train_on == "last" or cfg.source == "slimorca"
    return fit(cfg, *convert.render(tok, messages, last_only), counts)


def fit(cfg, ids, mask, counts):
    """A row as `encode` returns it, within max_length. counts: its others."""
    truncated = len(ids) > cfg.max_length
    if truncated and cfg.over_length == "drop":
        raise Drop(f"longer than max_length={cfg.max_length}")
    ids, mask = ids[: cfg.max_length], mask[: cfg.max_length]
    if 1 not in mask[1:]:  # the first token is predicted from nothing
        limit = f"left in max_length={cfg.max_length}" if truncated else "token"
        raise Drop(f"no target {limit}")
    return [(ids, mask)], ids, counts | {"truncated": int(truncated)}


# ------------------------------------------------------------------------------------ the whole job


def find_files(cfg, hub):
    """The files of the source; None for those of the hub. UserError where it can be neither."""
    known = cfg.source in SETS
    if cfg.path and not known:
        raise UserError(
            f"path= goes with the name of a known set ({', '.join(SETS)}), and "
            f"source={cfg.source} is none"
        )
    path = cfg.path or cfg.source
    files = records.find_files(path, cfg.out) if path != cfg.source or not known else None
    # org/name is an id of the hub, unless it looks like a mistyped path
    is_path = records.suffix(Path(hub)) in records.SUFFIXES or Path(hub).parent.exists()
    if not files and (cfg.path or is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub)):
        near = config.nearest(cfg.source, SETS)
        hint = (
            f"did you mean '{near}'?" if near and not known else f"known sets are {', '.join(SETS)}"
        )
        raise UserError(f"there is no file or folder {path}; {hint}")
    return files


def main(cfg):
    plain = cfg.text_field and not cfg.rendered
    template = cfg.template or ("plain" if plain else None)
    tok, writer = convert.start(cfg, encode, template)
    if tok.layout is None or tok.layout.broken:
        tok.render([message("user", "")])  # raises what says so
    hub = SETS.get(cfg.source, (cfg.source, [cfg.subset], cfg.split))[:3]
    with writer:
        total = convert.fill(cfg, writer, "row", find_files(cfg, hub[0]), hub)
        truncated = total.counts.get("truncated", 0)
        writer.meta |= dict(truncated=truncated, dropped=total.dropped) | total.bad
    note = f"at max_length={cfg.max_length}" if truncated else ""
    lines = [("rows truncated", truncated, note)]
    if spelled := total.counts.get("with control tokens"):
        note = "spelled out; rendered=true takes the text of a chat template as it is"
        lines.append(("control tokens", spelled, f"rows name some: {note}"))
    convert.report(cfg, "row", total, "a row", after_kept=lines)


if __name__ == "__main__":
    config.run(main, Config)
