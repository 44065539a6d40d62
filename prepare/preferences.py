"""Preference records to a prepared data folder of groups, for reward.py and dpo.py.

    python -m prepare.preferences source=hh_harmless_test.jsonl.gz model=... out=data/hh val=462
    python -m prepare.preferences source=dpo_en_demo.json model=models/smollm2 out=data/dpo val=50
    python -m prepare.preferences source=HuggingFaceH4/stack-exchange-preferences model=... out=...

A group is a prompt's completions, best first. `source` is a JSON, JSONL, CSV, TSV or Parquet file
(.gz too), a folder of such files, a training set such as ultrafeedback or hh_rlhf:harmless (a file
of tasks/), or a hub id. The shape of each record is recognised. The prompt has any of its usual
names and is a text or messages. The completions are

    chosen, rejected   texts, messages, lists of messages, or whole transcripts of \\n\\nHuman: and
                       \\n\\nAssistant: turns
    completions        (or responses, answers, candidates, output) a list. It is sorted where there
                       are scores (score, rating, reward, votes, rank, ...): a list beside it, or
                       a field in each completion. Of equal scores the first completion stays, and
                       completions without a score are left out. A field that looks like a score
                       and is none that is known is refused. Without any the best comes first.

Every completion is rendered behind its prompt as in supervised fine-tuning. Its row ends with the
last target token, the end of turn. Completions that are empty, too long or there twice are dropped,
and so is a group with fewer than two left. Nothing is truncated. A field that is neither rendered
nor known to be harmless drops its record, unless ignore= names it.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Literal

from nano import config
from nano.config import NonNegativeInt, PathText, PositiveInt, Seed, UserError
from nano.records import BadRecord
from prepare import convert, fields
from prepare.fields import Drop, message, text, turns


@dataclass
class Config:
    # what
    source: PathText  # file, folder, training set (tasks/) or hub id
    model: PathText  # model directory whose tokenizer is used
    out: PathText  # the prepared folder; an earlier one there is replaced at the end
    path: PathText | None = None  # local file or folder of a training set; none: the hub
    subset: str | None = None  # of a hub id: the configuration
    split: str = "train"  # of a hub id, or of a folder whose files are named by splits
    ignore: tuple[str, ...] = ()  # fields of records, messages or completions that may be lost
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
    show: NonNegativeInt = 0  # groups to print, target tokens marked


# ---------------------------------------------------------- record -> prompt and ranked completions

PROMPTS = "prompt question instruction query input".split()
TURNS = "conversations conversation messages".split()
LISTS = "completions responses answers candidates output".split()
TEXTS = "response text answer completion output".split()
# What scores are called, the most telling name first. -1: less is better. Plurals are known too.
FLAGS = "preferred chosen is_chosen accepted is_accepted selected best is_best correct is_correct"
FLAGS = FLAGS.split()  # true or false
SCORES = dict.fromkeys("overall_score pm_score score reward rating human_rating grade".split(), 1)
SCORES |= dict.fromkeys("vote upvote like quality preference label".split(), 1)
SCORES |= dict.fromkeys(("rank", "ranking", "human_rank"), -1) | dict.fromkeys(FLAGS, 1)
WHOLE = ("overall_score", "pm_score")  # other scores beside one of these are parts of it
# The words of a field that looks like a score, whether it is known or not.
LOOK = re.compile(
    r"(^|_)(scor|rat(e|ing)|rank|reward|vote|upvote|like|label|prefer|grade|utility|help|harm|win|"
    r"best|better|correct|accept|select|chosen|quality|judg|elo)(?!\w*(_id|_answers|_url)$)"
)
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
    key = fields.first(record, (*TURNS, *PROMPTS))
    if key is None:
        return fields.system(record)
    if isinstance(record[key], list):
        messages = turns(record.pop(key))
        return fields.after_system(fields.system(record), messages)
    if isinstance(record[key], str) and record[key].lstrip().startswith("Human:"):
        messages = transcript(text(record, key))
        if not messages[-1]["content"]:  # the Assistant's turn, which a completion fills
            messages.pop()
        return fields.system(record) + messages
    return fields.question(record, key)


def words(name):
    """A field's name in small letters, its words joined by underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[- ]", "_", name).lower()


def score_name(name):
    """The name in SCORES that a field's name stands for, or None."""
    name = words(name)
    return next((n for n in (name, name.removesuffix("s")) if n in SCORES), None)


def is_number(value):
    return isinstance(value, (int, float)) and not fields.is_empty(value)


def number(score, name):
    """A score as a float, None for a missing one. BadRecord for what is no number."""
    if fields.is_empty(score) or str(score).strip().lower() in ("n/a", "na", "none", "nan"):
        return None
    try:
        value = float(score)
        if math.isfinite(value):
            return value
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadRecord(f"the score {score!r:.60} in field '{name}' is no number")


def scores_of(record, key, values):
    """{name in SCORES: [score or None of each value]}: what is known to rank the completions.

    Scores stand in lists beside the completions, which are taken out, or in each of them. BadRecord
    for a field that looks like a score and is not known to rank.
    """
    known = {}
    inner = {name for value in values if isinstance(value, dict) for name in value}
    whole = any(score_name(name) in WHOLE for name in inner)
    columns = [(name, value, "beside them") for name, value in record.items()]
    for name in sorted(inner - {*TEXTS, "role", "from", "content", "value"}):
        column = [value.get(name) if isinstance(value, dict) else None for value in values]
        columns.append((name, column, "in them"))
    for name, column, where in columns:
        score = score_name(name)
        items = column if isinstance(column, list) else [column]
        looks = LOOK.search(words(name))
        if all(map(fields.is_empty, items)):  # a table has nulls
            if score and score not in FLAGS:
                known.setdefault(score, [None] * len(values))
            continue
        if not looks and (not isinstance(column, list) or not all(map(is_number, items))):
            if where == "beside them" or not any(map(is_number, items)):
                continue
        if score and isinstance(column, list) and not any(known.get(score, ())):
            if len(column) != len(values):
                raise BadRecord(
                    f"the scores {column!r:.80} are not one number for each of the {len(values)} "
                    f"{key}"
                )
            known[score] = [number(x, name) for x in column]
        elif where == "in them" and (whole or fields.HARMLESS.fullmatch(name) and not looks):
            continue  # a part of a whole score, or an id
        elif where == "in them" or looks or not fields.HARMLESS.fullmatch(name):
            raise BadRecord(
                f"field '{name}' {where} looks like a score of the {key}, and what it says is not "
                f"known: call it scores or ranks, or leave it out with ignore=[{name}]"
            )
    for name in [*record]:
        if score_name(name) in known:
            del record[name]
    return known


def ranked(record):
    """(completions best first, in any form; Counter of those that are left out, by reason)."""
    for better, worse in (("chosen", "rejected"), ("response_j", "response_k")):
        if record.get(better) is not None and record.get(worse) is not None:
            check_pair(record, better, worse)
            return [record.pop(better), record.pop(worse)], Counter()
    key = next((key for key in LISTS if isinstance(record.get(key), list)), None)
    if key is None:
        raise BadRecord(
            f"unknown record shape (fields {', '.join(sorted(map(str, record))):.200}): known are "
            f"chosen and rejected, or a list of {', '.join(LISTS)}"
        )
    values = record.pop(key)
    known = scores_of(record, key, values)
    if not known:
        return values, Counter()
    known = {n: [x and SCORES[n] * x for x in known[n]] for n in SCORES if n in known}
    known = {n: column for n, column in known.items() if any(x is not None for x in column)}
    if not known:
        raise Drop("no completion has a score")
    name, *others = known
    for other in others if name not in WHOLE else ():
        pairs = [p for p in zip(known[name], known[other], strict=True) if None not in p]
        if any(a > c and b < d for a, b in pairs for c, d in pairs):
            raise BadRecord(
                f"'{name}' and '{other}' rank the {key} differently: leave one of them out with "
                f"ignore=[{other}]"
            )
    scored = [(-x, i) for i, x in enumerate(known[name]) if x is not None]
    best = {}  # score -> the first value of that score
    for score, i in sorted(scored):
        best.setdefault(score, values[i])
    lost = Counter({"score equal to another's": len(scored) - len(best)})
    lost["without a score"] = len(values) - len(scored)
    return [*best.values()], lost


def check_pair(record, better, worse):
    """Drop where scores beside a pair say that the worse answer is the better one.

    They are called score_chosen, chosen_rating and the like, and are taken out.
    """
    good, bad = (side.removeprefix("response_") for side in (better, worse))
    pairs = {}
    for name in [*record]:
        for side in (good, bad):
            bare = words(name).removesuffix(f"_{side}").removeprefix(f"{side}_")
            if bare != words(name) and score_name(bare):
                value = number(record.pop(name), name)
                pairs.setdefault(score_name(bare), {})[side] = value
                break
    for score, sides in pairs.items():
        values = [sides.get(good), sides.get(bad)]
        if None not in values and SCORES[score] * (values[0] - values[1]) < 0:
            raise Drop(f"the answer '{worse}' has the better score")


def conversation(before, value):
    """Messages of a prompt and one completion in any form."""
    if isinstance(value, str) and TURN.match(value.lstrip()):
        whole = transcript(value.lstrip())
        prompt = [message(m["role"], m["content"]) for m in before if m["role"] != "system"]
        if whole[:-1][: len(prompt)] == prompt:  # the transcript begins with the prompt
            return before[: len(before) - len(prompt)] + whole
    if isinstance(value, dict) and not {"role", "from"} & value.keys():
        value = fields.without(value, ())
        key = next((key for key in TEXTS if key in value), None)
        if key is None:
            raise BadRecord(f"a completion has none of the fields {', '.join(TEXTS)}")
        answer = message("assistant", text(value, key))
        if key := fields.first(value, fields.THOUGHTS):
            answer["reasoning_content"] = text(value, key)
        # scores_of has judged what is a number or looks like a score
        rest = {n: x for n, x in value.items() if not is_number(x) and not LOOK.search(words(n))}
        fields.check_rest(rest, [*fields.texts_of([answer])], "field of a completion, or field")
        return [*before, answer]
    if isinstance(value, str):
        return [*before, message("assistant", value)]
    messages = turns([value] if isinstance(value, dict) else value)
    if messages[0]["role"] == "system":
        return messages
    if messages[0]["role"] == "user":  # the whole conversation, perhaps without its system prompt
        before = [m for m in before[:1] if m["role"] == "system"]
    return before + messages


def recognise(record):
    """(messages of the prompt, assistant messages of the completions best first, tools, Counter of
    the completions left out). The fields that are used are taken out of `record`."""
    tools = fields.definitions(record)
    values, lost = ranked(record)
    before = prompt(record)
    prefix, completions = None, []
    html = any(isinstance(value, dict) and "pm_score" in value for value in values)
    for value in values:
        *start, last = conversation(before, value)
        if last["role"] != "assistant":
            raise Drop("a completion that does not end with the assistant")
        if last.get("weight") == 0:
            raise Drop("a completion that is marked as not to be learned")
        start = [{key: x for key, x in m.items() if key != "weight"} for m in start]
        if prefix is not None and start != prefix:
            raise Drop("completions of different prompts")
        prefix = start
        completions.append(last | {"content": str(Post(last["content"]))} if html else last)
    if not prefix:
        raise Drop("no prompt")
    if prefix[-1]["role"] == "assistant":
        raise Drop("a prompt that ends with the assistant")
    there = [*fields.texts_of(prefix), *fields.texts_of(completions)]
    if any(text not in there for text in fields.texts_of(before)):
        raise Drop("a prompt beside whole conversations that are not its own")
    if fields.learned(record) is False:
        raise Drop("marked as not to be learned")
    fields.check_rest(record, there)
    if html:
        for i, m in enumerate(prefix):
            content = str(Post(m["content"]))
            prefix[i] = m | {"content": content, "columns": [["QUESTION", content]]}
    return prefix, completions, tools, lost


# --------------------------------------------------------------------------------- messages -> rows


def encode(cfg, tok, record):
    """The Unit of a record, a group of rows best first, for convert.py.

    Its counts are the completions that are dropped, by reason.
    """
    nulls = {key: [] for key, x in record.items() if x is None and score_name(key)}
    nulls = {key: x for key, x in nulls.items() if key not in cfg.ignore}
    record = nulls | fields.without(record, cfg.ignore)
    before, completions, tools, dropped = recognise(record)
    rows, seen, long = [], set(), None
    for completion in completions:
        if fields.says_nothing(completion):
            dropped["empty"] += 1
            continue
        answer = {"columns": [["RESPONSE", completion["content"] or ""]]} | completion
        # the row ends with a target, where the score is read
        ids, mask = convert.render(tok, [*before, answer], True, tools)
        if ids.tobytes() in seen:
            dropped["the same text twice"] += 1
        elif len(ids) > cfg.max_length:
            dropped[f"longer than max_length={cfg.max_length}"] += 1
            long = (ids, mask)
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
        raise Drop(reason, rows[0] if rows else long)
    ids, mask = rows[0]
    return convert.Unit(rows, ids[: mask.index(1)], dropped)


# ------------------------------------------------------------------------------------ the whole job


def main(cfg):
    if cfg.max_completions < 2:
        raise UserError(f"max_completions={cfg.max_completions}: a preference needs 2 or more")
    _, writer = convert.start(cfg, encode, cfg.template)
    with writer:
        total = convert.fill(cfg, writer, "group", *convert.find(cfg, ranked=True))
        lost = total.counts
        writer.meta |= dict(dropped_groups=total.dropped, dropped_completions=lost) | total.bad
    mean = total.rows / len(total.sizes)
    lines = [("completions", total.rows, f"{mean:.2f} a group, best first")]
    lines += [("dropped of them", n, reason) for reason, n in lost.items()]
    convert.report(cfg, "group", total, "a completion with its prompt", before_tokens=lines)


if __name__ == "__main__":
    config.run(main, Config)
