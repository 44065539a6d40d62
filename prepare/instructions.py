"""Instruction records to a prepared data folder: rendered, tokenized on all cores, with the target tokens marked.

    python -m prepare.instructions source=alpaca.json model=models/smollm2 out=data/alpaca val=100
    python -m prepare.instructions source=chats/ model=models/llama max_length=4096 train_on=last out=data/chats
    python -m prepare.instructions source=tweets.jsonl text_field=output response_template="### Label:" ...
    python -m prepare.instructions source=gsm8k path=gsm8k_train.jsonl template=columns model=... out=data/gsm8k

`source` is a JSON, JSONL, CSV, TSV or Parquet file (.gz too), a folder of such files, a known set's name or a hub id.
Record shapes are recognised one by one: Alpaca (instruction, input, output), messages or conversations (role/content or
from/value), prompt/completion and its like; text_field= takes whole texts. Rows keep their order (sft.py shuffles them
in every epoch); those to hold out are chosen by the hash of their content.
"""

import contextlib
import hashlib
import os
import re
import shutil
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from nano import config, tokenizer
from nano.config import NonNegativeInt, PositiveInt, Seed, UserError
from nano.store import Store, Writer, check_target, read_meta
from prepare import records
from prepare.records import BadRecord


@dataclass
class Config:
    # what
    source: str  # file, folder, known set (see `SETS` in this file) or hub id
    model: str  # model directory whose tokenizer is used
    out: str  # the prepared folder; an earlier one there is replaced at the end
    path: str | None = None  # local file or folder of a known set; none: the hub
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id
    # how it is rendered
    template: str | None = None  # chat template by name; none: the model's own
    text_field: str | None = None  # every record is one text, in this field (template: plain)
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


# ---------------------------------------------------------------------------------------------------------------------
# record -> messages


class Drop(Exception):
    """A record that is in order but gives no row; the text is the reason it is counted under."""


ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
PAIRS = "prompt/completion prompt/response question/answer query/response input/output".split()


def text(record, key):
    value = record.get(key)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise BadRecord(
            f"field '{key}' is {kind} and not text"
            if key in record
            else f"field '{key}' is missing"
        )
    return value


def turns(items):
    """Messages of a list of {role, content} or {from, value}."""
    if not isinstance(items, list) or not items:
        raise BadRecord("the conversation is not a list of messages")
    messages = []
    for item in items:
        if not isinstance(item, dict):
            raise BadRecord("a message is not an object with a role and a content")
        role = text(item, "role" if "role" in item else "from")
        if role not in ROLES:
            raise BadRecord(f"unknown role '{role}'; known are {', '.join(ROLES)}")
        if item.get("tool_calls"):
            raise Drop("structured tool calls (not rendered)")
        content = item.get("content", item.get("value"))
        if isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") == "text" for p in content
        ):
            item = item | {"content": "".join(text(p, "text") for p in content)}
        weight = (
            {"weight": 0} if item.get("weight") == 0 else {}
        )  # OpenAI's mark of an answer that nothing is learned from
        messages.append(
            {
                "role": ROLES[role],
                "content": text(item, "content" if "content" in item else "value"),
            }
            | weight
        )
    return messages


def history(record):
    """Messages of the rounds before an instruction: a list of [question, answer]."""
    past = record.get("history") or []
    if not isinstance(past, list) or not all(
        isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in past
    ):
        raise BadRecord("'history' is not a list of [question, answer]")
    return [
        {"role": role, "content": said}
        for pair in past
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def task(columns, name, answer):
    """A question in named parts and its answer: as columns for the column template, joined for the others."""
    columns = [[n, t] for n, t in columns if t]
    question = {"role": "user", "content": "\n\n".join(t for _, t in columns), "columns": columns}
    return [question, {"role": "assistant", "content": answer, "columns": [[name, answer]]}]


def recognise(record):
    """Messages of a record in one of the common shapes."""
    if record.get("tools") not in (None, "", [], "[]"):
        raise Drop("tool definitions (not rendered)")
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    record = {
        key: value for key, value in record.items() if value is not None
    }  # a table has nulls where another shape has fields
    for key in ("messages", "conversations", "conversation"):
        if key in record:
            messages = system + turns(record[key])
            if messages[-1]["role"] != "assistant" and isinstance(record.get("chosen"), dict):
                messages += turns([record["chosen"]])  # preference data: the better answer
            return messages
    if "instruction" in record:
        answer = text(record, "response" if "response" in record else "output")
        asked = {"role": "user", "content": text(record, "instruction")}
        given = next((key for key in ("input", "context") if record.get(key)), None)
        asked |= {"input": text(record, given)} if given else {}
        return system + history(record) + [asked, {"role": "assistant", "content": answer}]
    for ask, reply in (pair.split("/") for pair in PAIRS):
        if ask in record and reply in record:
            if isinstance(record[ask], list) and isinstance(record[reply], list):
                return system + turns(record[ask] + record[reply])
            given = (
                [["CONTEXT", text(record, "context")]]
                if ask == "question" and record.get("context")
                else []
            )
            return system + task(
                [[ask.upper(), text(record, ask)], *given], reply.upper(), text(record, reply)
            )
    raise BadRecord(
        f"unknown record shape (fields {', '.join(sorted(map(str, record)))}): known are instruction/output, messages, "
        f"conversations, {', '.join(PAIRS)}; or give text_field="
    )


# the training sets that go by name, each to the columns of its template


def cot(r):
    answer = f"{text(r, 'rationale')}\n\n### TARGET:\n{text(r, 'target')}"
    return task([["SOURCE", text(r, "source")]], "RATIONALE", answer)


def slimorca(r):
    messages = turns(r.get("conversations"))
    if [m["role"] for m in messages].count(
        "assistant"
    ) == 1:  # the column template lays out longer ones like this itself
        for m, speaker in zip(messages, r["conversations"], strict=True):
            m["columns"] = [["FROM", text(speaker, "from")], ["VALUE", m["content"]]]
        messages[-1]["columns"] = [["GPT", messages[-1]["content"]]]
    return messages


def openorca(r):
    system = text(r, "system_prompt")
    first = (
        [{"role": "system", "content": system, "columns": [["INSTRUCTION", system]]}]
        if system
        else []
    )
    return first + task([["QUESTION", text(r, "question")]], "RESPONSE", text(r, "response"))


def choices(r, column, labels, texts, label):
    if not (isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels)):
        raise BadRecord("'choices' is not a list of answers, with a label each")
    if label not in labels:
        raise BadRecord(f"the answer {label!r} is none of the choices")
    shown = " ".join(f"({a}): {t}" for a, t in zip(labels, texts, strict=True))
    answer = text({"choices": texts[labels.index(label)]}, "choices")
    return task([["QUESTION", text(r, "question")], [column, shown]], "ANSWER", answer)


def mmlu(r):
    options = r.get("choices")
    return choices(
        r,
        "CHOICES",
        list(range(len(options))) if isinstance(options, list) else None,
        options,
        r.get("answer"),
    )


def arc(r):
    options = r["choices"] if isinstance(r.get("choices"), dict) else {}
    return choices(
        r, "CANDIDATE ANSWERS", options.get("label"), options.get("text"), r.get("answerKey")
    )


def winogrande(r):
    answer = str(r.get("answer"))  # "1" or "2"; the files hold text, some copies numbers
    if answer not in ("1", "2"):
        raise BadRecord(f"'answer' is {answer!r} and neither 1 nor 2")
    columns = [["SENTENCE", "sentence"], ["OPTION1", "option1"], ["OPTION2", "option2"]]
    return task(
        [[name, text(r, key)] for name, key in columns], "ANSWER", text(r, f"option{answer}")
    )


SETS = {  # name: (hub id, configurations, split, record -> messages)
    "alpaca": ("tatsu-lab/alpaca", [None], "train", recognise),
    "cot-collection": ("kaist-ai/CoT-Collection", [None], "train", cot),
    "slimorca": ("Open-Orca/SlimOrca", [None], "train", slimorca),
    "openorca-multiplechoice": ("beaugogh/openorca-multiplechoice-10k", [None], "train", openorca),
    "mmlu": ("cais/mmlu", ["all"], "auxiliary_train", mmlu),
    "arc": ("allenai/ai2_arc", ["ARC-Challenge", "ARC-Easy"], "train", arc),
    "gsm8k": ("openai/gsm8k", ["main"], "train", recognise),
    **{
        w: ("allenai/winogrande", [w], "train", winogrande)
        for w in ("winogrande_" + n for n in ("xs", *"sml", "xl"))
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# messages -> tokens and targets


work = SimpleNamespace()  # the configuration and tokenizer of this process


def setup(cfg):
    work.cfg, work.tok = (
        cfg,
        tokenizer.load(cfg.model, template=cfg.template or ("plain" if cfg.text_field else None)),
    )


def split_text(record):
    """A whole text as prompt and answer, cut by characters behind the last occurrence of the response template."""
    whole = text(record, work.cfg.text_field)
    cut = 0
    if work.cfg.response_template:
        cut = whole.rfind(work.cfg.response_template) + len(work.cfg.response_template)
        if cut < len(work.cfg.response_template):
            raise Drop("no response template in the text")
    prompt = [{"role": "user", "content": whole[:cut]}] * bool(cut)
    return [*prompt, {"role": "assistant", "content": whole[cut:]}]


def encode(record):
    """(ids (T,), mask (T,) bytes, truncated) of one record; Drop or BadRecord when there is no row in it."""
    to_messages = SETS[work.cfg.source][3] if work.cfg.source in SETS else recognise
    messages = split_text(record) if work.cfg.text_field else to_messages(record)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        raise Drop("no assistant turn")
    if not answers[-1].strip():
        raise Drop("empty answer")
    last_only = work.cfg.train_on == "last" or work.cfg.source == "slimorca"
    try:
        ids, mask = work.tok.render(messages, last_only=last_only)
    except UserError as e:
        raise BadRecord(str(e)) from None
    mask = bytes(mask)
    end = mask.rfind(1) + 1  # nothing is learned from what follows the last target
    truncated = end > work.cfg.max_length
    if truncated and work.cfg.over_length == "drop":
        raise Drop(f"longer than max_length={work.cfg.max_length}")
    end = min(end, work.cfg.max_length)
    if 1 not in mask[1:end]:  # the first token is nothing's next token
        raise Drop(
            f"no target left in max_length={work.cfg.max_length}"
            if truncated
            else "no target token"
        )
    return ids[:end], mask[:end], truncated


def convert(chunk):
    """(tokens, mask, lengths, hashes as arrays; rows truncated, reason -> rows dropped, bad records) of a chunk."""
    name, items = chunk
    tokens, masks, lengths, hashes, cut, dropped, bad = (
        array("I"),
        bytearray(),
        [],
        [],
        0,
        Counter(),
        [],
    )
    key = work.cfg.seed.to_bytes(8, "little", signed=True)
    for line, raw in items:
        try:
            ids, mask, truncated = encode(records.parse(raw))
        except Drop as e:
            dropped[str(e)] += 1
        except BadRecord as e:
            bad.append(f"{name}:{line}: {e}")
        else:
            row = array("I", ids)
            tokens += row
            masks += mask
            lengths.append(len(row))
            hashes.append(
                int.from_bytes(hashlib.blake2b(row, digest_size=8, key=key).digest(), "little")
            )
            cut += truncated
    arrays = (
        np.frombuffer(tokens, np.uint32),
        np.frombuffer(masks, np.uint8),
        np.array(lengths, np.int64),
    )
    return *arrays, np.array(hashes, np.uint64), cut, dropped, bad


# ---------------------------------------------------------------------------------------------------------------------
# the whole job


def find_sources(cfg):
    """(files, None), or (None, [(name, records)]) where they come from the hub."""
    known = cfg.source in SETS
    hub, subsets, split = SETS[cfg.source][:3] if known else (cfg.source, [cfg.subset], cfg.split)
    if cfg.path and not known:
        raise UserError(
            f"path= goes with the name of a known set ({', '.join(SETS)}), and source={cfg.source} is none"
        )
    files = records.find_files(cfg.path or cfg.source, cfg.out) if cfg.path or not known else None
    if files:
        return files, None
    # org/name is an id of the hub, unless it looks like a path with a slip in it
    on_hub = (
        re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and records.suffix(Path(hub)) not in records.SUFFIXES
    )
    if cfg.path or not on_hub or Path(hub).parent.exists():
        near = config.nearest(cfg.source, SETS)
        hint = (
            f"did you mean '{near}'?" if near and not known else f"known sets are {', '.join(SETS)}"
        )
        raise UserError(f"there is no file or folder {cfg.path or cfg.source}; {hint}")
    return None, [(hub, records.read_hub(hub, subsets, split))]


def show(tok, tokens, mask):
    """The row as text, target tokens green (or in guillemets where NO_COLOR is set)."""
    on, off = ("«", "»") if os.environ.get("NO_COLOR") else ("\033[32m", "\033[0m")
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        piece = tok.decode(tokens[a:b].tolist(), skip_special=False)
        print(f"{on}{piece}{off}" if mask[a] else piece, end="")
    print("\n" + "-" * 80)


def fill(cfg, tok, writer, split):
    """The source's rows into `split` of `writer`; (hashes (N,), rows truncated, dropped by reason, bad records)."""
    files, sources = find_sources(cfg)
    total = sum(f.stat().st_size for f in files) if files else None
    workers = cfg.workers or (records.cores() if total is None or total > 4e6 else 1)
    hashes, truncated, dropped, bad, shown = [], 0, Counter(), [], 0
    with records.progress(total, "B" if files else " rows") as bar:
        if files:
            sources = ((f, records.read_file(f, bar)) for f in files)
        parts = records.ordered_map(convert, records.chunks(sources), workers, setup, (cfg,))
        with contextlib.closing(parts):
            for tokens, mask, lengths, part_hashes, cut, reasons, errors in parts:
                if errors and cfg.on_error == "stop":
                    raise UserError(
                        f"{errors[0]}; mend it, or skip and count such records with on_error=skip"
                    )
                for a, n in zip(
                    np.cumsum(lengths) - lengths, lengths[: cfg.show - shown], strict=False
                ):
                    show(tok, tokens[a : a + n], mask[a : a + n])
                    shown += 1
                writer.extend(split, tokens, mask, lengths)
                hashes.append(part_hashes)
                truncated += cut
                dropped += reasons
                bad += errors
                if not files:
                    bar.update(len(lengths))
    kept = sum(map(len, hashes))
    if not kept:
        why = [f"{n} dropped: {reason}" for reason, n in dropped.most_common()]
        why += [f"{len(bad)} bad, the first is {bad[0]}"] if bad else []
        raise UserError(f"{cfg.source} gives no row ({'; '.join(why) or 'it holds no record'})")
    return np.concatenate(hashes), truncated, dropped, bad


def divide(writer, rows, picks):
    """The rows with picks[i] into the split val, the others into train; neighbours of one fate together, 1,024 at most."""
    changes = np.flatnonzero(np.diff(picks)) + 1
    edges = np.unique(np.concatenate([changes, np.arange(0, len(picks), 1024), [len(picks)]]))
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        span = slice(rows.offsets[a], rows.offsets[b])
        writer.extend(
            "val" if picks[a] else "train", rows.tokens[span], rows.mask[span], rows.lengths[a:b]
        )


def main(cfg):
    check_target(cfg.out)
    setup(cfg)
    tok = work.tok
    tok.render(
        [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    )  # says so if there is no template
    meta = dict(tokenizer=tok.fingerprint, template=tok.template, chat_template=tok.chat_template)
    meta |= dict(source=cfg.source, model=cfg.model, seed=cfg.seed)
    with Writer(cfg.out, tok.vocab_size, meta) as writer:
        if cfg.val == "0":
            hashes, truncated, dropped, bad = fill(cfg, tok, writer, "train")
        else:  # the rows to hold out are known when all hashes are
            with Writer(writer.tmp / "all", tok.vocab_size) as every:
                hashes, truncated, dropped, bad = fill(cfg, tok, every, "all")
            divide(writer, Store(writer.tmp / "all", "all"), records.held_out(hashes, cfg.val))
            shutil.rmtree(writer.tmp / "all")
        meta.update(
            truncated=truncated,
            dropped=dict(dropped.most_common()),
            bad_records=len(bad),
            first_bad=bad[:20],
        )
    report(cfg, tok, read_meta(cfg.out))


def report(cfg, tok, meta):
    splits, dropped = meta["splits"], meta["dropped"]
    rows, tokens, targets = (
        sum(s[k] for s in splits.values()) for k in ("rows", "tokens", "target_tokens")
    )
    table = [
        ("records read", rows + sum(dropped.values()) + meta["bad_records"], ""),
        ("rows kept", rows, ", ".join(f"{name} {s['rows']:,}" for name, s in splits.items())),
        (
            "rows truncated",
            meta["truncated"],
            f"at max_length={cfg.max_length}" if meta["truncated"] else "",
        ),
        *(("rows dropped", n, reason) for reason, n in dropped.items()),
        *(
            ("bad records", meta["bad_records"], f"skipped; the first: {bad}")
            for bad in meta["first_bad"][:1]
        ),
        ("tokens", tokens, f"{tokens / rows:.1f} a row"),
        ("target tokens", targets, f"{targets / tokens:.1%} of all"),
    ]
    print(f"{cfg.out}: {cfg.source} for the tokenizer of {cfg.model}, template {tok.template}")
    for name, n, note in table:
        print(f"  {name:<16}{n:>14,}  {note}".rstrip())


if __name__ == "__main__":
    config.run(main, Config)
