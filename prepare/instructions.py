"""Instruction records to a prepared data folder: rendered, tokenized, the target tokens marked.

    python -m prepare.instructions source=alpaca.json model=models/smollm2 out=data/alpaca val=100
    python -m prepare.instructions source=chats/ model=models/llama train_on=last out=data/chats
    python -m prepare.instructions source=tweets.csv text_field=text response_template="Label:" ...
    python -m prepare.instructions source=gsm8k path=train.jsonl template=columns model=... out=...
    python -m prepare.instructions source=gsm8k train_on=none model=models/smollm2 out=data/gsm8k

`source` is a JSON, JSONL, CSV, TSV or Parquet file (.gz too), a folder of such files or of
datasets.save_to_disk, a task or training set (a file of tasks/), or a hub id. The shape of each
record is recognised: Alpaca (instruction, input, output), messages or conversations (role/content
or from/value, with tools and calls), or pairs such as prompt/completion. With text_field= a record
is one text.

A record without an answer is a prompt alone: {"prompt": ...}, or a conversation that ends with the
user. train_on=none makes prompts of all records. ppo.py answers them, and hands the record, with
its answer key and all other fields, to a reward function. Of the other records nothing may be
lost: a field that is neither rendered nor known to be harmless drops the row, unless ignore= names
it. Answers are no targets where they are empty, part of a prompt, or marked (weight, loss, train,
mask, ... 0 or 1).

Rows keep the order of the records; sft.py shuffles them in every epoch. The rows to hold out are
chosen by the hash of their prompts, so that answers to one prompt stay together.
"""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, With, Without
from nano.records import BadRecord
from prepare import convert, fields
from prepare.fields import Drop, message, text, turns


@dataclass
class Config:
    # what
    source: PathText  # file, folder, task or training set (tasks/), or hub id
    model: PathText  # model directory whose tokenizer is used
    out: PathText  # the prepared folder; an earlier one there is replaced at the end
    path: PathText | None = None  # local file or folder of a task or set; none: the hub
    subset: str | None = None  # of a hub id: the configuration
    # of a hub id, or of a folder whose files are named by splits. Of a task: train or test
    split: str = "train"
    ignore: Annotated[tuple[str, ...], Without("text_field")] = ()  # fields that may be lost
    # how it is rendered
    template: str | None = None  # chat template by name; none: the model's own
    template_options: tuple[str, ...] = ()  # for variables that it reads: enable_thinking=false
    learn_empty_thoughts: Annotated[bool, Without("rendered")] = False  # printed ones are targets
    text_field: str | None = None  # every record is one text, in this field (template: plain)
    rendered: Annotated[bool, With("text_field")] = False  # a chat template has made that text
    response_template: str | None = None  # the target is the text after it; none: all
    # targets: every assistant turn, the last one, or none, so that each row is a prompt alone
    train_on: Literal["all", "last", "none"] = "all"
    # how much
    max_length: PositiveInt = 2048  # tokens of a row
    # a longer row goes, or loses its end, or its beginning
    over_length: Literal["drop", "truncate", "truncate_left"] = "drop"
    val: str = "0"  # rows to hold out: 100, or a share such as 5%
    seed: Seed = 0  # of the choice of those rows
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used
    workers: NonNegativeInt = 0  # processes; 0: one a core, and one in all for small files
    show: NonNegativeInt = 0  # examples to print, target tokens marked


# ------------------------------------------------------------------------------- record -> messages

PAIRS = "instruction/response instruction/output prompt/completion prompt/response "
PAIRS += "question/answer query/response input/output"
PAIRS = [pair.split("/") for pair in PAIRS.split()]
PROMPTS = "prompt question problem instruction query input".split()


def recognise(record):
    """Messages of a record in one of the common shapes. They end with the user where the record has
    no answer. The fields that are used are taken out of `record`."""
    key = fields.first(record, fields.TURNS)
    if key:
        messages = fields.after_system(fields.system(record), turns(record.pop(key)))
        if messages[-1]["role"] != "assistant" and isinstance(record.get("chosen"), dict):
            # the better answer of preference data
            record.pop("rejected", None)
            messages = as_prompt(messages) + turns([record.pop("chosen")])
        return with_thought(messages, record)
    pair = next((pair for pair in PAIRS if pair[0] in record and pair[1] in record), None)
    ask = pair[0] if pair else fields.first(record, PROMPTS)
    if ask is None:
        pairs = ", ".join(map("/".join, PAIRS))
        raise BadRecord(
            f"unknown record shape (fields {', '.join(sorted(map(str, record))):.200}): known are "
            f"messages, conversations, {pairs}, a prompt alone; or give text_field="
        )
    if isinstance(record[ask], list):
        messages = turns(record.pop(ask))
        messages = as_prompt(fields.after_system(fields.system(record), messages))
    else:
        messages = fields.question(record, ask)
    if not pair:
        return messages
    answer = record[pair[1]]
    if isinstance(answer, (list, dict)):
        del record[pair[1]]
        return messages + turns(answer if isinstance(answer, list) else [answer])
    answer = message("assistant", text(record, pair[1]))
    if "columns" in messages[-1]:
        answer["columns"] = [[pair[1].upper(), answer["content"]]]
    return with_thought([*messages, answer], record)


def as_prompt(messages):
    """Messages of a prompt: what the assistant says there is no target."""
    return [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]


def with_thought(messages, record):
    """`messages` with the thought that stands beside the last answer in the record."""
    key = fields.first(record, fields.THOUGHTS)
    if key and messages[-1]["role"] == "assistant":
        messages[-1]["reasoning_content"] = text(record, key)
    return messages


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
    """The Unit of a record, one row, for convert.py."""
    if cfg.rendered:
        counts = {}
        ids, mask = fit(cfg, *read_rendered(cfg, tok, record), counts)
        return convert.Unit([(ids, mask)], ids, counts)
    named = convert.named(cfg.source)
    rest = fields.without(record, (*cfg.ignore, *named.ignore))
    known = cfg.text_field or named.messages  # what such records may lose is known
    tools = None if known else fields.definitions(rest)
    counts = {}
    if cfg.text_field:
        messages = split_text(cfg, rest)
        counts["spelled out"] = int(any(tok.spells_out(m["content"]) for m in messages))
    elif known:
        messages = named.messages(rest)
    else:
        messages = recognise(rest)

    # An empty last answer is none. Earlier ones would teach the model to stop at once.
    empty = False
    while messages and fields.says_nothing(messages[-1]):
        messages = messages[:-1]
        empty = True
    if cfg.train_on == "none":
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        messages = as_prompt(messages)
    elif empty and all(m["role"] != "assistant" for m in messages):
        raise Drop("empty answer")
    asked = not {"system", "assistant"}.issuperset(m["role"] for m in messages)
    if not messages or not asked and not cfg.text_field:
        raise Drop("no turn of the user")
    awaits = messages[-1]["role"] != "assistant"
    if rest and not known:
        if not awaits or fields.has_answers(messages):
            if fields.learned(rest) is False:
                messages = as_prompt(messages)
        if not awaits:
            fields.check_rest(rest, [*fields.texts_of(messages)])
        elif media := [key for key in rest if fields.MEDIA.fullmatch(key)]:
            fields.check_rest({key: rest[key] for key in media}, ())
    messages = [m | {"weight": 0} if fields.says_nothing(m) else m for m in messages]
    if awaits:
        counts["prompts"] = 1
    elif silent := len([m for m in messages if "weight" in m]):
        counts["silent"] = silent

    last_only = cfg.train_on == "last" or named.last_only
    ids, mask = fit(cfg, *convert.render(tok, messages, last_only, tools), counts)
    line = json.dumps(record, default=str).encode() + b"\n" if awaits else b""
    begin = mask.find(1)
    key = ids[:begin] if asked and begin > 0 else ids
    return convert.Unit([(ids, mask)], key, counts, line)


def fit(cfg, ids, mask, counts):
    """The row within max_length. It counts in `counts` whether the row lost a part.

    Drop for a row that is too long, and for one without a target that is no prompt alone."""
    alone = "prompts" in counts
    if len(ids) > cfg.max_length:
        left = cfg.over_length == "truncate_left"
        if cfg.over_length == "drop" or (alone and not left):
            raise Drop(f"longer than max_length={cfg.max_length}", (ids, mask))
        counts["truncated"] = 1
        end = mask.rfind(1, 0, cfg.max_length) + 1
        part = slice(-cfg.max_length, None) if left else slice(end)
        ids, mask = ids[part], mask[part]
        if not alone and 1 not in mask[1:]:  # the first token is predicted from nothing
            raise Drop(f"no target left in max_length={cfg.max_length}")
    elif not alone and 1 not in mask[1:]:
        why = "no answer is to be learned" if "silent" in counts else "no target token"
        raise Drop(why, (ids, mask))
    return ids, mask


# ------------------------------------------------------------------------------------ the whole job


def main(cfg):
    plain = cfg.text_field and not cfg.rendered
    template = cfg.template or ("plain" if plain else None)
    tok, writer = convert.start(cfg, encode, template)
    if tok.layout is None or tok.layout.broken:
        tok.render([message("user", "")])  # raises what says so
    with writer:
        total = convert.fill(cfg, writer, "row", *convert.find(cfg))
        counts = Counter(total.counts)
        writer.meta |= dict(truncated=counts["truncated"], dropped=total.dropped) | total.bad
    note = f"at max_length={cfg.max_length}" if counts["truncated"] else ""
    lines = [("rows truncated", counts["truncated"], note)]
    if counts["prompts"]:
        lines.append(("prompts alone", counts["prompts"], "their records are kept, for ppo.py"))
    if counts["silent"]:
        lines.append(
            ("answers apart", counts["silent"], "no targets: empty, marked or in a prompt")
        )
    if counts["spelled out"]:
        note = "spelled out; rendered=true takes the text of a chat template as it is"
        lines.append(("control tokens", counts["spelled out"], f"rows name some: {note}"))
    convert.report(cfg, "row", total, "a row", after_kept=lines)


if __name__ == "__main__":
    config.run(main, Config)
