"""Preference records to a prepared data folder of groups: one prompt's completions, best first, for reward.py and dpo.py.

    python -m prepare.preferences source=hh_harmless_test.jsonl.gz model=models/smollm2 out=data/hh val=462
    python -m prepare.preferences source=dpo_en_demo.json model=models/smollm2 out=data/dpo val=50 max_length=2048
    python -m prepare.preferences source=HuggingFaceH4/stack-exchange-preferences model=... out=data/stack val=1%

`source` is a JSON, JSONL, CSV, TSV or Parquet file (.gz too), a folder of such files, or a hub id. Record shapes are recognised
one by one, for any of the usual names of the prompt (a text, or messages):

    chosen, rejected        texts, messages or lists of messages; whole transcripts of \\n\\nHuman: and \\n\\nAssistant: turns
    completions             or responses, answers, candidates, output: a list, best first, or with scores (a list `scores`, or a
                            score, overall_score, pm_score or rank in each): then they are sorted, and of equal ones the first stays

Every completion is rendered behind its prompt as in supervised fine-tuning, and its row ends with the last target token: the
end of turn. Completions that are empty, too long, or there twice are dropped, never cut; so is a group with fewer than two left.
"""

import contextlib
import hashlib
import math
import re
import shutil
from array import array
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Literal

import numpy as np

from nano import config, tokenizer
from nano.config import NonNegativeInt, PositiveInt, Seed, UserError
from nano.store import Store, Writer, check_target, read_meta
from prepare import records
from prepare.instructions import Drop, history, show, task, text, turns
from prepare.records import BadRecord


@dataclass
class Config:
    # what
    source: str  # file, folder or hub id
    model: str  # model directory whose tokenizer is used
    out: str  # the prepared folder; an earlier one there is replaced at the end
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id
    # how it is rendered
    template: str | None = None  # chat template by name; none: the model's own
    # how much
    max_length: PositiveInt = 1024  # tokens of a prompt with one completion
    max_completions: int = 8  # of a prompt; the best ones stay
    val: str = "0"  # groups to hold out: 100, or 5%
    seed: Seed = 0  # of the choice of those groups
    on_error: Literal["stop", "skip"] = "stop"  # at a record that cannot be used
    workers: NonNegativeInt = 0  # processes; 0: one a core, and one in all for small files
    show: NonNegativeInt = 0  # groups to print, target tokens coloured


# ---------------------------------------------------------------------------------------------------------------------
# record -> prompt and ranked completions

PROMPTS = "prompt question instruction query input".split()
TURNS = "conversations conversation messages".split()
LISTS = "completions responses answers candidates output".split()
TEXTS = "response text answer completion output".split()
SCORES = {
    "overall_score": 1,
    "score": 1,
    "pm_score": 1,
    "rank": -1,
}  # field: whether more is better
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Post(HTMLParser):
    """The text of a forum's post: paragraphs, lists and code as plain text would have them."""

    MARKS = {
        "p": "\n\n",
        "pre": "\n\n```\n",
        "/pre": "\n```\n\n",
        "li": "\n- ",
        "br": "\n",
        "blockquote": "\n\n> ",
    }
    MARKS |= {f"{slash}h{n}": "\n\n" for slash in ("", "/") for n in range(1, 7)}

    def __init__(self, html):
        super().__init__()
        self.parts, self.depth = [], 0
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.depth += tag == "pre"
        self.parts.append("`" if tag == "code" and not self.depth else self.MARKS.get(tag, ""))

    def handle_endtag(self, tag):
        self.depth -= tag == "pre"
        self.parts.append(
            "`" if tag == "code" and not self.depth else self.MARKS.get("/" + tag, "")
        )

    def handle_data(self, data):
        self.parts.append(data if self.depth or data.strip() else " " * bool(data.strip("\n")))

    def __str__(self):
        return re.sub(r"\n{3,}", "\n\n", "".join(self.parts)).strip()


def transcript(whole):
    """Messages of a text of Human: and Assistant: turns. Neighbouring turns of one side are joined, except to the last one."""
    start, *pieces = TURN.split(whole)
    if start.strip() or not pieces:
        raise BadRecord("a transcript has to begin with Human: or Assistant:")
    messages = []
    for i in range(0, len(pieces), 2):
        role, content = "user" if pieces[i] == "Human" else "assistant", pieces[i + 1].strip()
        if messages and messages[-1]["role"] == role and i < len(pieces) - 2:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages


def prompt(record):
    """Messages of the prompt, [] where the record has none of its own."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    key = next((key for key in (*TURNS, *PROMPTS) if record.get(key)), None)
    if key is None:
        return system
    ask = record[key]
    if isinstance(ask, list):
        return system + turns(ask)
    ask = text(record, key)
    if ask.lstrip().startswith("Human:"):  # whose last turn, the Assistant's, is empty
        messages = transcript(ask)
        return system + [m for i, m in enumerate(messages) if m["content"] or i < len(messages) - 1]
    context = record.get("input") or "" if key == "instruction" else ""
    if not isinstance(context, str):
        raise BadRecord("'input' is not text")
    said = iter(m["content"] for m in history(record))
    past = [m for q in said for m in task([["INSTRUCTION", q]], "RESPONSE", next(said))]
    question = task([[key.upper(), ask], ["INPUT", context]], "RESPONSE", "")[0]
    return (
        system
        + past
        + [question | ({"content": ask, "input": context} if key == "instruction" else {})]
    )


def ranked(record):
    """(values best first, number dropped for equal scores): completions in whatever form the record has them."""
    for better, worse in (("chosen", "rejected"), ("response_j", "response_k")):
        if record.get(better) is not None and record.get(worse) is not None:
            return [record[better], record[worse]], 0
    key = next((key for key in LISTS if isinstance(record.get(key), list)), None)
    if key is None:
        raise BadRecord(
            f"unknown record shape (fields {', '.join(sorted(map(str, record)))}): known are chosen and rejected, or a "
            f"list of {', '.join(LISTS)}"
        )
    values, scores, sign = record[key], record.get("scores"), 1
    if scores is None and values and all(isinstance(v, dict) for v in values):
        field = next((f for f in SCORES if all(v.get(f) is not None for v in values)), None)
        scores, sign = (None, 1) if field is None else ([v[field] for v in values], SCORES[field])
    if scores is None:
        return values, 0
    try:
        order = sorted(
            zip((-sign * float(score) for score in scores), range(len(values)), strict=True)
        )
        if not all(math.isfinite(score) for score, _ in order):  # missing ones, of a table
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadRecord(
            f"the scores {scores!r:.80} are not one number for each of the {len(values)} {key}"
        ) from None
    first = [order[i] for i in range(len(order)) if i == 0 or order[i][0] != order[i - 1][0]]
    return [values[i] for _, i in first], len(values) - len(first)


def conversation(before, value):
    """Messages of one completion behind its prompt."""
    if isinstance(value, str) and TURN.match(value.lstrip()):
        whole, asked = transcript(value.lstrip()), [m for m in before if m["role"] != "system"]
        if [(m["role"], m["content"]) for m in whole[:-1]][: len(asked)] == [
            (m["role"], m["content"]) for m in asked
        ]:
            return before[: len(before) - len(asked)] + whole  # the prompt stands in it once more
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        key = next((key for key in TEXTS if key in value), None)
        if key is None:
            raise BadRecord(f"a completion has none of the fields {', '.join(TEXTS)}")
        value = text(value, key)
    if isinstance(value, str):
        return [*before, {"role": "assistant", "content": value, "columns": [["RESPONSE", value]]}]
    messages = turns([value] if isinstance(value, dict) else value)
    if (
        messages[0]["role"] == "user"
    ):  # the whole conversation; its system message may be a field of its own
        return [m for m in before[:1] if m["role"] == "system"] + messages
    return messages if messages[0]["role"] == "system" else before + messages


def recognise(record):
    """(messages of the prompt, texts of the completions best first, Counter of the completions left out)."""
    values, tied = ranked(record)
    dropped = Counter({"score equal to another's": tied})
    before, prefix, completions = prompt(record), None, []
    html = any(isinstance(v, dict) and "pm_score" in v for v in values)
    for value in values:
        *start, last = conversation(before, value)
        if last["role"] != "assistant":
            raise Drop("a completion that does not end with the assistant")
        if prefix is not None and start != prefix:
            raise Drop("completions of different prompts")
        prefix = start
        completions.append(str(Post(last["content"])) if html else last["content"])
    if not prefix or prefix[-1]["role"] == "assistant":
        raise Drop("a prompt that ends with the assistant" if prefix else "no prompt")
    if html:
        prefix = [m | {"content": str(Post(m["content"]))} for m in prefix]
        prefix = [m | {"columns": [["QUESTION", m["content"]]]} for m in prefix]
    return prefix, completions, dropped


# ---------------------------------------------------------------------------------------------------------------------
# messages -> tokens and targets

work = SimpleNamespace()  # the configuration and tokenizer of this process


def setup(cfg):
    work.cfg, work.tok = cfg, tokenizer.load(cfg.model, template=cfg.template)


def encode(record):
    """([(ids, mask bytes), ...] best first, Counter of the completions left out) of a record; Drop or BadRecord without a group."""
    before, completions, dropped = recognise(record)
    rows, seen = [], set()
    for completion in completions:
        if not completion.strip():
            dropped["empty"] += 1
            continue
        answer = {"role": "assistant", "content": completion, "columns": [["RESPONSE", completion]]}
        try:
            ids, mask = work.tok.render([*before, answer], last_only=True)
        except UserError as e:
            raise BadRecord(str(e)) from None
        end = len(mask) - mask[::-1].index(1)  # the last token is a target: the score is read there
        if tuple(ids[:end]) in seen:
            dropped["the same text twice"] += 1
        elif end > work.cfg.max_length:
            dropped[f"longer than max_length={work.cfg.max_length}"] += 1
        elif len(rows) == work.cfg.max_completions:
            dropped[f"beyond max_completions={work.cfg.max_completions}"] += 1
        else:
            seen.add(tuple(ids[:end]))
            rows.append((ids[:end], bytes(mask[:end])))
    if len(rows) < 2:
        why = (+dropped).most_common(1)
        raise Drop("fewer than two completions left" + (f" (others: {why[0][0]})" if why else ""))
    return rows, +dropped


def convert(chunk):
    """(tokens, mask, lengths, completions of each group, hashes of the prompts as arrays; completions dropped and groups dropped by
    reason, bad records) of a chunk."""
    name, items = chunk
    tokens, masks, lengths, sizes, hashes, bad = array("I"), bytearray(), [], [], [], []
    lost, dropped = Counter(), Counter()
    key = work.cfg.seed.to_bytes(8, "little", signed=True)
    for line, raw in items:
        try:
            rows, reasons = encode(records.parse(raw))
        except Drop as e:
            dropped[str(e)] += 1
            continue
        except BadRecord as e:
            bad.append(f"{name}:{line}: {e}")
            continue
        ids, mask = rows[0]
        asked = array("I", ids[: mask.index(1)])
        hashes.append(
            int.from_bytes(hashlib.blake2b(asked, digest_size=8, key=key).digest(), "little")
        )
        lost += reasons
        sizes.append(len(rows))
        for ids, mask in rows:
            tokens += array("I", ids)
            masks += mask
            lengths.append(len(ids))
    arrays = (
        np.frombuffer(tokens, np.uint32),
        np.frombuffer(masks, np.uint8),
        np.array(lengths, np.int64),
    )
    return *arrays, np.array(sizes, np.int64), np.array(hashes, np.uint64), lost, dropped, bad


# ---------------------------------------------------------------------------------------------------------------------
# the whole job


def find_sources(cfg):
    """(files, None), or (None, [(hub id, rows)])"""
    files = records.find_files(cfg.source, cfg.out)
    if files is None and (
        "/" not in cfg.source or records.suffix(records.Path(cfg.source)) in records.SUFFIXES
    ):
        raise UserError(f"there is no file or folder {cfg.source}")
    return (
        (files, None)
        if files
        else (None, [(cfg.source, records.read_hub(cfg.source, [cfg.subset], cfg.split))])
    )


def fill(cfg, writer):
    """The source's groups into the split "all" of `writer`; (hashes (G,), completions and groups dropped by reason, bad)."""
    files, sources = find_sources(cfg)
    total = sum(f.stat().st_size for f in files) if files else None
    workers = cfg.workers or (records.cores() if total is None or total > 4e6 else 1)
    hashes, lost, dropped, bad, shown = [], Counter(), Counter(), [], 0
    with records.progress(total, "B" if files else " groups") as bar:
        if files:
            sources = ((f, records.read_file(f, bar)) for f in files)
        parts = records.ordered_map(convert, records.chunks(sources), workers, setup, (cfg,))
        with contextlib.closing(parts):
            for tokens, mask, lengths, sizes, part_hashes, part_lost, part_dropped, errors in parts:
                if errors and cfg.on_error == "stop":
                    raise UserError(
                        f"{errors[0]}; mend it, or skip and count such records with on_error=skip"
                    )
                row_at, token_at = np.cumsum([0, *sizes]), np.cumsum([0, *lengths])
                for a, b in zip(row_at[:-1], row_at[1:], strict=True):
                    span = slice(token_at[a], token_at[b])
                    writer.extend("all", tokens[span], mask[span], lengths[a:b])
                    writer.end_group("all")
                    for i in range(a, b) if shown < cfg.show else ():
                        show(
                            work.tok,
                            tokens[token_at[i] : token_at[i + 1]],
                            mask[token_at[i] : token_at[i + 1]],
                        )
                    shown += 1
                hashes.append(part_hashes)
                lost += part_lost
                dropped += part_dropped
                bad += errors
                if not files:
                    bar.update(len(sizes))
    if not sum(map(len, hashes)):
        why = [f"{n} dropped: {reason}" for reason, n in dropped.most_common()]
        why += [f"{len(bad)} bad, the first is {bad[0]}"] if bad else []
        raise UserError(f"{cfg.source} gives no group ({'; '.join(why) or 'it holds no record'})")
    return np.concatenate(hashes), lost, dropped, bad


def main(cfg):
    if cfg.max_completions < 2:
        raise UserError(f"max_completions={cfg.max_completions}: a preference needs 2 or more")
    check_target(cfg.out)
    setup(cfg)
    tok = work.tok
    meta = dict(tokenizer=tok.fingerprint, template=tok.template, chat_template=tok.chat_template)
    meta |= dict(source=cfg.source, model=cfg.model, seed=cfg.seed)
    with Writer(cfg.out, tok.vocab_size, meta) as writer:
        with Writer(
            writer.tmp / "all", tok.vocab_size
        ) as every:  # the groups to hold out are known when all hashes are
            hashes, lost, dropped, bad = fill(cfg, every)
        rows = Store(writer.tmp / "all", "all")
        held_out = (
            records.held_out(hashes, cfg.val) if cfg.val != "0" else np.zeros(len(hashes), bool)
        )
        for a, b, pick in zip(rows.groups[:-1], rows.groups[1:], held_out, strict=True):
            span = slice(rows.offsets[a], rows.offsets[b])
            writer.extend(
                "val" if pick else "train", rows.tokens[span], rows.mask[span], rows.lengths[a:b]
            )
            writer.end_group("val" if pick else "train")
        shutil.rmtree(writer.tmp / "all")
        meta.update(
            dropped_groups=dict(dropped.most_common()),
            dropped_completions=dict(lost.most_common()),
            bad_records=len(bad),
            first_bad=bad[:20],
        )
    report(cfg, tok, read_meta(cfg.out))


def report(cfg, tok, meta):
    splits, dropped = meta["splits"], meta["dropped_groups"]
    groups, rows, tokens, targets = (
        sum(s[k] for s in splits.values()) for k in ("groups", "rows", "tokens", "target_tokens")
    )
    table = [
        ("records read", groups + sum(dropped.values()) + meta["bad_records"], ""),
        ("groups kept", groups, ", ".join(f"{name} {s['groups']:,}" for name, s in splits.items())),
        *(("groups dropped", n, reason) for reason, n in dropped.items()),
        *(
            ("bad records", meta["bad_records"], f"skipped; the first: {bad}")
            for bad in meta["first_bad"][:1]
        ),
        ("completions", rows, f"{rows / groups:.2f} a group, best first"),
        *(("dropped of them", n, reason) for reason, n in meta["dropped_completions"].items()),
        ("tokens", tokens, f"{tokens / rows:.1f} a completion with its prompt"),
        ("target tokens", targets, f"{targets / tokens:.1%} of all"),
    ]
    print(f"{cfg.out}: {cfg.source} for the tokenizer of {cfg.model}, template {tok.template}")
    for name, n, note in table:
        print(f"  {name:<16}{n:>14,}  {note}".rstrip())


if __name__ == "__main__":
    config.run(main, Config)
