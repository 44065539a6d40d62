"""Talk to a model, complete a prompt, or answer a file of prompts.

    python sample.py model=out/sft/last            # a chat, where /help lists the commands
    python sample.py model=out/lora/last base=models/smollm2 prompt="Why is the sky blue?"
    python sample.py model=models/smollm2 prompts=prompts.txt out=result.json temperature=0
    python sample.py model=models/base template=plain prompt="Once upon a time"    # completion

`model` is a model directory or an adapter's (PEFT). A prompt is laid out by the model's chat
template, or by template=. Without either it is completed as plain text. prompts= names a file with
a prompt a line, or a .json list or .jsonl lines of strings, conversations
([{"role": ..., "content": ...}, ...]) and records such as {"prompt": ...} or {"messages": [...]}.
The result is a JSON list of {"input", "output"}.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nano import config, files, runtime, tokenizer, weights
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
from nano.generate import generate
from nano.records import BadRecord
from prepare import fields, instructions

HELP = """/reset         forget the conversation
/system TEXT   start anew under this system message (no text: under the template's own)
/quit, Ctrl-D  leave; Ctrl-C ends a reply"""


@dataclass
class Config:
    # what
    model: PathText = "models/smollm2"  # model or adapter directory
    base: PathText | None = None  # for an adapter: the model to put it on
    prompt: str | None = None  # complete this one and leave
    prompts: Path | None = None  # complete this file and leave
    out: Annotated[Path | None, With("prompts")] = None  # JSON file; none: the terminal
    echo: bool = False  # outputs repeat the prompt in front
    # how it is laid out
    template: str | None = None  # chat template: none: the model's own; plain: text completion
    template_options: tuple[str, ...] = ()  # for variables that it reads: enable_thinking=false
    system: str | None = None  # system message; the conversations of prompts= bring their own
    # how it is sampled
    max_new_tokens: PositiveInt = 256
    temperature: Temperature = 0.7  # 0: always the likeliest token
    top_k: Annotated[NonNegativeInt, With("temperature")] = 0  # 0: off
    top_p: Annotated[Share, With("temperature")] = 0.95
    stop: tuple[str, ...] = ()  # strings or control tokens that end an answer; cut off
    seed: Annotated[Seed, With("temperature")] = 0
    batch_size: Annotated[PositiveInt, With("prompts")] = 16  # answered together
    # device
    device: str = "auto"  # auto, cpu, cuda, mps or xla
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class TooLong(UserError):
    """A prompt that leaves the model no room to answer."""


class Sampler:
    """A model with its tokenizer and the settings of a run.

    .chats: whether a chat template lays out the prompts.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.rt = runtime.start(cfg, parallel="none")
        opened = weights.open(
            cfg.model, cfg.base, self.rt.device, self.rt.dtype, template=cfg.template
        )
        self.model = opened.model
        self.tok = opened.tok
        if cfg.template_options:
            options = cfg.template_options
            self.tok = tokenizer.load(cfg.model, cfg.template, options, cfg.base)
        if self.model.cfg.head != "lm":
            raise UserError(f"{cfg.model} is a score model: it cannot write text")
        self.chats = self.tok.template not in (None, "plain")
        if self.tok.template is None:
            self.tok = tokenizer.load(opened.tok.dir, template="plain")

    def render(self, messages):
        """The ids of a prompt. TooLong for one that leaves the model no room to answer."""
        ids, _ = self.tok.render(messages, add_generation_prompt=True)
        positions = self.model.cfg.max_positions
        if len(ids) >= positions:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, the model takes {positions}: shorten it"
            )
        return ids

    def text(self, ids):
        """(the text of ids up to the first stop string, whether there was one)."""
        return self.tok.decode_until(ids, self.cfg.stop, inside=not self.chats)

    def answer(self, prompts, seed, on_text=None):
        """The answers to rendered prompts, as texts.

        on_text(piece) streams the answer. It is for a single prompt, and Ctrl-C then ends the
        answer: the text so far is returned.
        """
        cfg = self.cfg
        ids = [[] for _ in prompts]
        shown = 0
        # The last characters may be the beginning of a stop string. They are shown later.
        margin = max(map(len, cfg.stop), default=1) - 1

        def on_token(sample, token):
            nonlocal shown
            ids[sample].append(token)
            text, stopped = self.text(ids[sample])
            # Half a character decodes to \ufffd. It waits for its other bytes.
            ready = len(text) if stopped else len(text.rstrip("\ufffd")) - margin
            if on_text and ready > shown:
                on_text(text[shown:ready])
                shown = ready
            return stopped

        try:
            ids = generate(
                self.model,
                prompts,
                cfg.max_new_tokens,
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
                self.tok.stop_ids,
                seed=seed,
                batch_size=cfg.batch_size,
                on_token=on_token if on_text or cfg.stop else None,
                plan=dict(sync_every=1) if on_text else None,
                step_hook=self.rt.sync,
            ).tokens
        except KeyboardInterrupt:
            if not on_text:
                raise
        texts = [self.text(tokens)[0] for tokens in ids]
        if on_text:
            on_text(texts[0][shown:])
        return texts


def conversation(user, system, history=()):
    """A list of messages that ends with the user's. system: text, or None or "" for none."""
    messages = [*history, dict(role="user", content=user)]
    return [dict(role="system", content=system), *messages] if system else messages


def read_prompts(path):
    """The prompts of a file: a list of strings and conversations (lists of messages).

    UserError for a file that cannot be read, holds anything else, or holds nothing, and for a
    conversation that the assistant has answered already.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prompts={path} cannot be read as UTF-8 text: {e}") from None
    entries = [line.strip() for line in text.split("\n") if line.strip()]
    try:
        if path.suffix.lower() == ".json":
            entries = json.loads(text)
        elif path.suffix.lower() in (".jsonl", ".ndjson"):
            entries = [json.loads(line) for line in entries]
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from None
    entries = json.loads(tokenizer.mend(json.dumps(entries, ensure_ascii=False)))
    if not isinstance(entries, list) or any(not isinstance(e, (str, list, dict)) for e in entries):
        raise UserError(
            f"{path} must hold strings, conversations (lists of messages) and records, and nothing "
            "else"
        )
    if not entries:
        raise UserError(f"{path} holds no prompt")
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            try:
                entries[i] = entry = instructions.recognise(fields.without(entry, ()))
            except (fields.Drop, BadRecord) as e:
                raise UserError(f"{path}, prompt {i + 1}: {e}") from None
        last = entry[-1] if isinstance(entry, list) and entry else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            raise UserError(
                f"{path}, prompt {i + 1} ends with an answer of the assistant: leave that turn out"
            )
    return entries


def answer_file(sampler, entries, cfg):
    """Answers all prompts and writes them to out=, or to the terminal."""
    prompts = []
    for i, entry in enumerate(entries, 1):
        messages = conversation(entry, cfg.system) if isinstance(entry, str) else entry
        try:
            prompts.append(sampler.render(messages))
        except UserError as e:
            raise UserError(f"{cfg.prompts}, prompt {i}: {e}") from None
    began = time.perf_counter()
    records = []
    for entry, text in zip(entries, sampler.answer(prompts, cfg.seed), strict=True):
        if cfg.echo:
            text = (entry if isinstance(entry, str) else entry[-1]["content"]) + text
        records.append(dict(input=entry, output=text))
    result = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    said = f"{len(records)} prompts in {time.perf_counter() - began:.1f} s"
    if cfg.out:
        files.write_text(cfg.out, result)
        said += f" -> {cfg.out}"
    else:
        print(result, end="")
    print(said, file=sys.stderr)


def show(piece):
    print(piece, end="", flush=True)


def chat(sampler, cfg):
    """Reads lines and answers them until /quit or Ctrl-D."""
    try:
        import readline  # noqa: F401  line editing and history, where the platform has it
    except ImportError:
        pass
    kind = (
        "a chat" if sampler.chats else "no chat template, so each line is completed as plain text"
    )
    print(f"{cfg.model}: {kind}; /help")
    system = cfg.system
    history = []
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command == "/quit":
            return
        if command == "/reset":
            history = []
        elif command == "/system":
            system = rest.strip()
            history = []
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP)
        else:
            try:
                history = reply(sampler, line, system, history, (cfg.seed, turn))
                turn += 1
            except UserError as e:  # a message that does not fit ends no conversation
                print(f"error: {e}")


def reply(sampler, line, system, history, seed):
    """Shows the answer to `line`. Returns the history with both, or [] where nothing chats.

    The oldest turns are forgotten until the answer has room: max_new_tokens, or half of the model's
    positions where that is less.
    """
    positions = sampler.model.cfg.max_positions
    room = min(sampler.cfg.max_new_tokens, positions // 2)
    while True:
        try:
            ids = sampler.render(conversation(line, system, history))
            if len(ids) + room <= positions or not history:
                break
        except TooLong:
            if not history:
                raise
        history = history[2:]
        print("(the oldest turn no longer fits and is forgotten)")
    (text,) = sampler.answer([ids], seed, show)
    print()
    if not sampler.chats:
        return []
    return [*conversation(line, None, history), dict(role="assistant", content=text)]


def main(cfg):
    if cfg.prompt is not None and cfg.prompts:
        raise UserError("give prompt= or prompts=, not both")
    if not all(cfg.stop):
        raise UserError("stop= holds an empty string, which would end every answer at once")
    if cfg.out and (cfg.out.is_dir() or not cfg.out.absolute().parent.is_dir()):
        raise UserError(f"out={cfg.out} must be a file in a folder that exists")
    if cfg.out:
        files.refuse_overwrite([cfg.out], [cfg.prompts, cfg.model, cfg.base])
    entries = read_prompts(cfg.prompts) if cfg.prompts else []
    sampler = Sampler(cfg)
    if cfg.prompts:
        answer_file(sampler, entries, cfg)
    elif cfg.prompt is not None:
        ids = sampler.render(conversation(cfg.prompt, cfg.system))
        show(cfg.prompt if cfg.echo else "")
        sampler.answer([ids], cfg.seed, show)
        print()
    else:
        chat(sampler, cfg)


if __name__ == "__main__":
    config.run(main, Config)
