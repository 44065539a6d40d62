r"""New instructions out of a few: a model writes tasks like the seeds, filters keep the new ones.

    python -m prepare.bootstrap generator=models/llama seeds=seeds.jsonl out=data/new count=5000
    python -m prepare.bootstrap generator=http://localhost:8000/v1 name=llama seeds=... out=...
    python -m prepare.bootstrap latin=false request=request.txt seeds=zh_seeds.json ...
    python -m prepare.instructions source=data/new/tasks.jsonl model=models/smollm2 out=data/train

This is Self-Instruct (Wang et al. 2022, arXiv:2212.10560) with the requests of Stanford Alpaca: a
request shows three seeds and asks for a list of twenty tasks. `generator` is a model directory, an
adapter's, or an OpenAI-compatible endpoint, whose key is in the environment variable
OPENAI_API_KEY. Seeds are records with instruction, input and output, or with instances.

A task is dropped where its form is broken or cut off, where the instruction is shorter than 4 or
longer than 150 words, opens oddly, asks for a program, or names what a text cannot hold, and where
its ROUGE-L with a seed or a kept task is above 0.7. OUT/tasks.jsonl holds the kept ones. The same
command goes on where it was interrupted.
"""

import contextlib
import hashlib
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex  # comes with tiktoken

from nano import config, files, records
from nano.config import (
    NonNegativeInt,
    PathText,
    PositiveInt,
    Seed,
    Share,
    Temperature,
    UserError,
    With,
)
from nano.records import BadRecord
from prepare.fields import without

BANNED = """image images picture pictures photo photos graph graphs plot diagram diagrams flowchart
draw map maps file files video videos audio music go_to""".split()


@dataclass
class Config:
    # what
    generator: PathText  # model directory, adapter, or endpoint such as http://localhost:8000/v1
    seeds: PathText  # file of seed tasks
    out: PathText  # folder of tasks.jsonl
    base: PathText | None = None  # for an adapter: the model to put it on
    name: str = ""  # of the model at an endpoint
    count: PositiveInt = 1000  # tasks to keep at least, seeds not counted
    max_requests: NonNegativeInt = 0  # the end in any case; 0: none
    # how it is asked
    shots: PositiveInt = 3  # seeds in a request
    tasks: PositiveInt = 20  # the list in an answer ends before this number
    request: PathText | None = None  # file with a text in the place of REQUEST in this file
    chat: Literal["auto", "true", "false"] = "auto"  # through the chat template, if there is one
    temperature: Temperature = 1.0
    top_p: Annotated[Share, With("temperature")] = 1.0
    max_new_tokens: PositiveInt = 1024  # of an answer
    batch_size: PositiveInt = 5  # requests at a time
    # what is kept
    latin: bool = True  # false: other scripts too, where a character may be a word
    similarity: Share = 0.7  # the highest ROUGE-L with any task before
    banned: tuple[str, ...] = tuple(BANNED)  # words that no instruction may have; _ is a space
    # device
    seed: Seed = 0  # of the seeds that are shown, and of sampling
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


# ------------------------------------------------------------------------------------ the request

REQUEST = """\
Write a list of {count} tasks for a language model. Each has an instruction, an input and an output.

- No two tasks are alike in their verb, their subject or the kind of work.
- The model reads and writes text, and does nothing else: it sees no pictures and opens no pages.
- An instruction is one or two sentences in English, a question or a command.
- The input is a concrete text that the instruction is about, of at most 100 words. Where the
  instruction needs none, it is <noinput>.
- The output is a good answer, of at most 100 words.

The {count} tasks:
"""


def request_of(text, shots):
    """(the request, how its list goes on). shots: the tasks that open the list."""
    for number, task in enumerate(shots, 1):
        text += (
            f"###\n{number}. Instruction: {task['instruction']}\n"
            f"{number}. Input:\n{task['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{task['output']}\n"
        )
    return f"{text}###\n", f"{len(shots) + 1}. Instruction:"


def parse(text, first, cut_off):
    """The tasks of an answer, dicts, and None for each broken one.

    first: the number of the first. cut_off: the answer has no end, so its last task is broken.
    """
    tasks = []
    items = text.removeprefix("###").split("###")
    for number, item in enumerate(items, first):
        parts = regex.split(rf"{number}\.\s+(Instruction|Input|Output):", item)
        if not item.strip():
            continue
        if parts[1::2] != ["Instruction", "Input", "Output"]:
            tasks.append(None)
            continue
        instruction, given, output = (part.strip() for part in parts[2::2])
        given = "" if given.lower() == "<noinput>" else given
        tasks.append(dict(instruction=instruction, input=given, output=output))
    return tasks[:-1] + [None] if cut_off and tasks else tasks


# -------------------------------------------------------------------------------------- the filters

# scripts that put no spaces between words
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORDS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[\p{{L}}\p{{M}}\p{{N}}--[{UNSPACED}]]+", regex.V1)


def words_of(text, latin=True):
    """The words that ROUGE-L compares. latin: those of the package rouge_score, which knows ASCII
    alone. Otherwise those of all scripts."""
    return regex.findall(r"[a-z0-9]+", text.lower()) if latin else WORDS.findall(text.lower())


def rouge_l(words, others):
    """ROUGE-L (Lin 2004, F1 of the longest common subsequence) with each of `others`, a list.

    The length of the subsequence is counted in the bits of one integer (Hyyrö 2004), a few
    operations for each word of the other text.
    """
    places = Counter()  # word -> the bits of its places
    for i, word in enumerate(words):
        places[word] |= 1 << i
    ones = (1 << len(words)) - 1
    scores = []
    for other in others:
        bits = ones
        for word in other:
            match = bits & places.get(word, 0)
            bits = (bits + match | bits - match) & ones
        common = len(words) - bits.bit_count()
        # as rouge_score has it, to the last bit
        precision = common / max(len(words), 1)
        recall = common / max(len(other), 1)
        scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return scores


def fault(cfg, task):
    """Why a task is dropped, or None. Its likeness with others is not looked at."""
    text = task["instruction"]
    if not text or not task["output"]:
        return "no instruction or no output"
    count = len(text.split() if cfg.latin else words_of(text, False))
    if not 4 <= count <= 150:
        return "not 4 to 150 words"
    for word in cfg.banned:
        word = regex.escape(word.replace("_", " "))
        edge = r"\b" if cfg.latin else ""  # there are no borders of words to look for
        if regex.search(f"{edge}{word}{edge}", text, regex.I):
            return "a banned word"
    if text.lower().startswith("write a program"):
        return "asks for a program"
    if not text[0].isalnum() or (cfg.latin and not text[0].isascii()):
        return "opens with a sign" if not text[0].isalnum() else "opens with another script"
    return None


class Pool:
    """The tasks that a new one is compared with: the seeds and what was kept."""

    def __init__(self, cfg, tasks):
        self.cfg = cfg
        self.texts = []
        self.words = []
        for task in tasks:
            self.add(task)

    def add(self, task):
        self.texts.append(task["instruction"])
        self.words.append(words_of(task["instruction"], self.cfg.latin))

    def judge(self, task):
        """(why a task is dropped or None, the task with what it is like)."""
        if task is None:
            return "broken or cut off", None
        if reason := fault(self.cfg, task):
            return reason, None
        scores = rouge_l(words_of(task["instruction"], self.cfg.latin), self.words)
        if max(scores) > self.cfg.similarity:
            return f"ROUGE-L above {self.cfg.similarity}", None
        nearest = sorted(range(len(scores)), key=lambda i: -scores[i])[:10]
        likeness = {self.texts[i]: scores[i] for i in nearest}
        mean = sum(scores) / len(scores)
        return None, task | dict(most_similar_instructions=likeness, avg_similarity_score=mean)


# ------------------------------------------------------------------------------------- generators
# A generator takes [(request, how its list goes on), ...] and the number of the first request. It
# returns [(answer, whether it was cut off), ...]. An answer begins with how its list goes on.


def stops(cfg):
    return [f"\n{cfg.tasks}."]


def local(cfg):
    """The generator of a model directory."""
    from nano import evaluation, runtime, weights
    from nano.generate import generate

    rt = runtime.start(cfg, parallel="none")
    opened = weights.open(cfg.generator, cfg.base, rt.device, rt.dtype)
    model, tok = opened.model, opened.tok
    if model.cfg.head != "lm":
        raise UserError(f"{cfg.generator} is a score model: it cannot write text")
    chats = evaluation.uses_chat(cfg.chat, tok)

    def answers(requests, number):
        prompts = []
        for request, lead in requests:
            if chats:
                ids, _ = tok.render([dict(role="user", content=request)], True)
                prompts.append(ids + tok.encode(lead))
            else:
                prompts.append(tok.encode(request + lead, bos=tok.add_bos))
        longest = max(map(len, prompts))
        if longest >= model.cfg.max_positions:
            raise UserError(
                f"a request has {longest} tokens, and the model takes {model.cfg.max_positions}: "
                "lower shots=, or take shorter seeds"
            )
        ids = [[] for _ in prompts]

        def on_token(sample, token):
            ids[sample].append(token)
            return tok.decode_until(ids[sample], stops(cfg), inside=True)[1]

        samples = generate(
            model,
            prompts,
            cfg.max_new_tokens,
            cfg.temperature,
            top_p=cfg.top_p,
            stop_ids=tok.stop_ids,
            seed=(cfg.seed, number),
            batch_size=cfg.batch_size,
            on_token=on_token,
            step_hook=rt.sync,
        )
        texts = (tok.decode_until(tokens, stops(cfg), inside=True)[0] for tokens in samples.tokens)
        return [
            (lead + text, not finished)
            for (_, lead), text, finished in zip(requests, texts, samples.finished, strict=True)
        ]

    return answers


def endpoint(cfg):
    """The generator of an OpenAI-compatible endpoint."""
    chats = cfg.chat != "false"
    url = f"{cfg.generator.rstrip('/')}/{'chat/completions' if chats else 'completions'}"

    def answer(request, lead, seed):
        sampling = dict(temperature=cfg.temperature, top_p=cfg.top_p, seed=seed)
        body = dict(model=cfg.name, max_tokens=cfg.max_new_tokens, stop=stops(cfg), **sampling)
        if chats:
            text = f"{request}{lead}"
            body["messages"] = [dict(role="user", content=text)]
        else:
            body["prompt"] = request + lead
        choice = post(url, body)
        text = choice["message"]["content"] or "" if chats else choice["text"]
        begun = text.lstrip("# \n").startswith(lead)  # a chat model may repeat how the list goes on
        return text.lstrip() if begun else lead + text, choice.get("finish_reason") == "length"

    def answers(requests, number):
        seeds = (cfg.seed * 1_000_003 + number + i for i in range(len(requests)))
        with ThreadPoolExecutor(len(requests)) as pool:
            return [*pool.map(answer, *zip(*requests, strict=True), (s % 2**31 for s in seeds))]

    return answers


def post(url, body, tries=6):
    """The first choice of an endpoint's reply. What a server may mend by itself is tried again.

    UserError for a refusal, and for an answer that is none."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                choice = json.load(reply)["choices"][0]
            choice["message"]["content"] if "messages" in body else choice["text"]
            return choice
        except urllib.error.HTTPError as e:
            reason = f"status {e.code}: {e.read(300).decode(errors='replace')}"
            again = e.code in (408, 409, 429) or e.code >= 500
        except http.client.InvalidURL as e:
            raise UserError(f"{url} is no address: {e}") from None
        except (OSError, http.client.HTTPException) as e:
            refused = isinstance(getattr(e, "reason", e), ConnectionRefusedError)
            reason, again = str(e), not refused
        except (ValueError, LookupError, TypeError):
            reason, again = "its reply is not that of an OpenAI-compatible server", False
        if not again or attempt == tries - 1:
            raise UserError(f"{url} gives no answer ({' '.join(reason.split())})")
        print(f"{url}: {' '.join(reason.split()):.100}; again in {2**attempt} s", file=sys.stderr)
        time.sleep(2**attempt)


# ---------------------------------------------------------------------------------- the whole job


def read_seeds(path):
    """The tasks of a file. UserError for a record that is no task, and for a file without any."""
    files.check_file(path)
    tasks = []
    with records.progress(None, "B") as bar:
        for line, raw in records.read_file(Path(path), bar):
            try:
                row = without(records.parse(raw), ())
                instances = row.get("instances") or [row]
                given, output = instances[0].get("input", ""), instances[0]["output"]
                task = dict(instruction=row["instruction"], input=given, output=output)
                if not all(isinstance(text, str) for text in task.values()):
                    raise TypeError
            except BadRecord as e:
                raise UserError(f"{path}:{line}: {e}") from None
            except (LookupError, TypeError, AttributeError):
                raise UserError(
                    f"{path}:{line}: a seed needs instruction and output (and input), or instances "
                    "with them"
                ) from None
            tasks.append(task)
    if not tasks:
        raise UserError(f"{path} holds no seed task")
    return tasks


class Kept:
    """OUT/tasks.jsonl and OUT/state.json, which says how much of it counts.

    .requests, .dropped (Counter of reasons), .tasks: what is there already.
    UserError for a folder that other settings wrote."""

    def __init__(self, out, settings):
        self.path = Path(out) / "tasks.jsonl"
        self.state = Path(out) / "state.json"
        self.settings = settings
        state = files.read_json(self.state, missing={})
        if not state and self.path.exists() and self.path.stat().st_size:
            raise UserError(f"{self.path} is there without {self.state.name}: choose another out=")
        changed = [k for k, v in settings.items() if state and state["settings"].get(k) != v]
        if changed:
            raise UserError(
                f"{out} was written with other settings ({', '.join(changed)}): "
                "give those, or another out="
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = files.lock(self.path.parent)
        if self.lock is None:
            raise UserError(f"another process writes into {out}")
        self.requests = state.get("requests", 0)
        self.dropped = Counter(state.get("dropped", {}))
        self.file = open(self.path, "ab")
        self.file.truncate(state.get("bytes", 0))  # what a kill left half-written
        with open(self.path, encoding="utf-8") as f:
            self.tasks = [json.loads(line) for line in f]

    def add(self, tasks, requests):
        """Keeps the tasks of some requests. A kill leaves all of them or none."""
        lines = (json.dumps(task, ensure_ascii=False) + "\n" for task in tasks)
        self.file.write("".join(lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.tasks += tasks
        self.requests += requests
        state = dict(requests=self.requests, bytes=self.file.tell(), dropped=self.dropped)
        files.write_json(self.state, state | dict(settings=self.settings))

    def close(self):
        self.file.close()
        os.close(self.lock)


def main(cfg):
    remote = cfg.generator.startswith(("http://", "https://"))
    for key in ("base", "device", "dtype"):
        if remote:
            config.refuse(cfg, key, "with an endpoint", "another generator=")
    if remote != bool(cfg.name):
        raise UserError(
            f"generator={cfg.generator} "
            + ("needs name=, the model at the endpoint" if remote else "takes no name=")
        )
    seeds = read_seeds(cfg.seeds)
    if len(seeds) < cfg.shots:
        raise UserError(f"{cfg.seeds} has {len(seeds)} seeds: lower shots={cfg.shots}")
    if cfg.tasks <= cfg.shots + 1:
        raise UserError(f"tasks={cfg.tasks} leaves no room for a new task: give {cfg.shots + 2}")
    text = files.read_text(cfg.request) if cfg.request else REQUEST
    text = text.replace("{count}", str(cfg.tasks))
    keys = "generator base name shots tasks chat temperature top_p max_new_tokens batch_size latin "
    keys += "similarity banned seed"
    settings = {key: getattr(cfg, key) for key in keys.split()} | dict(banned=[*cfg.banned])
    settings["contents"] = hashlib.sha256(json.dumps([seeds, text]).encode()).hexdigest()[:16]
    with contextlib.closing(Kept(cfg.out, settings)) as kept:
        if len(kept.tasks) < cfg.count:
            write_tasks(cfg, (endpoint if remote else local)(cfg), text, seeds, kept)
    print(f"{kept.path}: {len(kept.tasks)} tasks of {kept.requests} requests")
    for reason, number in kept.dropped.most_common():
        print(f"  dropped {number:>8,}  {reason}")


def write_tasks(cfg, generator, text, seeds, kept):
    """Asks and filters until there are cfg.count tasks. text: of a request, before its seeds."""
    pool = Pool(cfg, seeds + kept.tasks)
    began = time.perf_counter()
    while len(kept.tasks) < cfg.count:
        # What a request shows depends on the seed and its number alone, so a resume is exact.
        numbers = range(kept.requests, kept.requests + cfg.batch_size)
        if cfg.max_requests:
            numbers = numbers[: max(cfg.max_requests - kept.requests, 0)]
        if not numbers:
            break
        draws = (np.random.default_rng([cfg.seed, n]).permutation(len(seeds)) for n in numbers)
        requests = [request_of(text, [seeds[i] for i in draw[: cfg.shots]]) for draw in draws]
        new = []
        for answer, cut_off in generator(requests, kept.requests):
            for task in parse(answer, cfg.shots + 1, cut_off):
                reason, task = pool.judge(task)
                if reason:
                    kept.dropped[reason] += 1
                else:
                    pool.add(task)
                    new.append(task)
        kept.add(new, len(requests))
        print(
            f"{kept.requests} requests | {len(kept.tasks)}/{cfg.count} tasks | "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    config.run(main, Config)
