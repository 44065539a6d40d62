"""Talk to a model, complete a prompt, or answer a file of prompts. Takes a model directory or an adapter's (PEFT).

    python sample.py model=out/sft/last                                            # chat; /help lists its commands
    python sample.py model=out/lora/last base=models/smollm2 prompt="Why is the sky blue?"
    python sample.py model=models/smollm2 prompts=prompts.txt out=result.json temperature=0
    python sample.py model=models/base template=plain prompt="Once upon a time"    # text completion, no chat

A prompt is laid out by the model's chat template, or by template=; without either it is completed as plain text. prompts= names a
file with a prompt a line, or a .json list or .jsonl lines of strings and conversations ([{"role": ..., "content": ...}, ...]); the
result is a JSON list of {"input", "output"}.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nano import config, files, runtime, tokenizer, weights
from nano.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, Share, UserError
from nano.generate import generate

HELP = """/reset         forget the conversation
/system TEXT   start anew under this system message (no text: under the template's own)
/quit, Ctrl-D  leave; Ctrl-C ends a reply"""


@dataclass
class Config:
    # what
    model: str = "models/smollm2"  # model or adapter directory
    base: str | None = None  # for an adapter: the model to put it on
    prompt: str | None = None  # complete this one and leave
    prompts: Path | None = None  # complete this file and leave
    out: Path | None = None  # JSON file for the answers to prompts=; none: the terminal
    echo: bool = False  # outputs repeat the prompt in front
    # how it is laid out
    template: str | None = None  # chat template: none: the model's own; plain: text completion
    system: str | None = None  # system message; the conversations of prompts= bring their own
    # how it is sampled
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 0.7  # 0: always the likeliest token
    top_k: NonNegativeInt = 0  # 0: off
    top_p: Share = 0.95
    stop: tuple[str, ...] = ()  # strings that end an answer; they are cut off
    seed: Seed = 0
    batch_size: PositiveInt = 16  # prompts of a file that are answered together
    # device
    device: str = "auto"  # auto, cpu, cuda or xla
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"


class Sampler:
    """A model with its tokenizer and the settings of a run."""

    def __init__(self, cfg):
        self.cfg, self.rt = cfg, runtime.start(cfg, parallel="none")
        opened = weights.open(
            cfg.model, cfg.base, self.rt.device, self.rt.dtype, template=cfg.template
        )
        self.model, self.tok = opened.model, opened.tok
        if self.model.cfg.head != "lm":
            raise UserError(f"{cfg.model} is a score model: it cannot write text")
        self.chats = self.tok.template not in (None, "plain")
        if self.tok.template is None:
            self.tok = tokenizer.load(opened.base, template="plain")

    def messages(self, user, system, history=()):
        return [dict(role="system", content=system)] * bool(system) + [
            *history,
            dict(role="user", content=user),
        ]

    def render(self, messages):
        ids, _ = self.tok.render(messages, add_generation_prompt=True)
        if len(ids) >= self.model.cfg.max_positions:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model takes {self.model.cfg.max_positions}: shorten it"
            )
        return ids

    def text(self, ids):
        """Without a stop string and what follows it -> (text, whether there was one)."""
        text = self.tok.decode(ids, inside=not self.chats)
        cut = min((text.index(s) for s in self.cfg.stop if s in text), default=None)
        return text[:cut], cut is not None

    def answer(self, prompts, seed, on_text=None):
        """Texts for the rendered prompts. on_text(piece) streams the answer, for a single prompt."""
        cfg, ids, shown = self.cfg, [[] for _ in prompts], 0
        margin = (
            max(map(len, cfg.stop), default=1) - 1
        )  # what may be the beginning of a stop string is not shown yet

        def on_token(sample, token):
            nonlocal shown
            ids[sample].append(token)
            text, stopped = self.text(ids[sample])
            ready = (
                len(text) if stopped else len(text.rstrip("\ufffd")) - margin
            )  # half a character waits too
            if on_text and ready > shown:
                on_text(text[shown:ready])
                shown = ready
            return stopped

        try:
            made = generate(
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
            )
            texts = [self.text(tokens)[0] for tokens in made.tokens]
        except KeyboardInterrupt:
            if not on_text:
                raise
            texts = [
                self.text(tokens)[0] for tokens in ids
            ]  # of a reply that is cut short, what there is
        if on_text:
            on_text(texts[0][shown:])
        return texts


def read_prompts(path):
    """The prompts of a file: strings, or conversations (lists of messages)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prompts={path} cannot be read as UTF-8 text: {e}") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    try:
        entries = (
            json.loads(text)
            if path.suffix == ".json"
            else list(map(json.loads, lines))
            if path.suffix == ".jsonl"
            else lines
        )
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from None
    entries = json.loads(tokenizer.mend(json.dumps(entries, ensure_ascii=False)))
    if not isinstance(entries, list) or not all(
        isinstance(entry, (str, list)) for entry in entries
    ):
        raise UserError(
            f"{path} must hold strings and conversations (lists of messages), and nothing else"
        )
    if not entries:
        raise UserError(f"{path} holds no prompt")
    return entries


def answer_file(sampler, entries, cfg):
    prompts = []
    for i, entry in enumerate(entries, 1):
        try:
            prompts.append(
                sampler.render(
                    sampler.messages(entry, cfg.system) if isinstance(entry, str) else entry
                )
            )
        except UserError as e:
            raise UserError(f"{cfg.prompts}, prompt {i}: {e}") from None
    began = time.perf_counter()
    texts = sampler.answer(prompts, cfg.seed)
    said = [entry if isinstance(entry, str) else entry[-1]["content"] for entry in entries]
    texts = [a + b for a, b in zip(said, texts, strict=True)] if cfg.echo else texts
    records = [dict(input=entry, output=text) for entry, text in zip(entries, texts, strict=True)]
    result = json.dumps(records, ensure_ascii=False, indent=2) + "\n"
    if cfg.out:
        files.write_text(cfg.out, result)
    else:
        print(result, end="")
    print(
        f"{len(texts)} prompts in {time.perf_counter() - began:.1f} s",
        *["->", cfg.out][: 2 * bool(cfg.out)],
        file=sys.stderr,
    )


def show(piece):
    print(piece, end="", flush=True)


def chat(sampler, cfg):
    try:
        import readline  # noqa: F401  line editing and history, where the platform has it
    except ImportError:
        pass
    print(
        f"{cfg.model}: {'a chat' if sampler.chats else 'no chat template, so each line is completed as plain text'}; /help"
    )
    system, history, turn = cfg.system, [], 0
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
            system, history = rest.strip() or None, []
        elif command.startswith("/") and command[1:].isalpha():
            print(HELP)
        else:
            try:
                history, turn = reply(sampler, line, system, history, (cfg.seed, turn)), turn + 1
            except UserError as e:  # a message that does not fit ends no conversation
                print(f"error: {e}")


def reply(sampler, line, system, history, seed):
    """Shows the answer to `line`; returns the longer history."""
    positions = sampler.model.cfg.max_positions
    room = min(sampler.cfg.max_new_tokens, positions // 2)
    while True:
        try:
            ids = sampler.render(sampler.messages(line, system, history))
            if len(ids) + room <= positions or not history:
                break
        except UserError:
            if not history:
                raise
        history = history[2:]
        print("(the oldest turn no longer fits and is forgotten)")
    (text,) = sampler.answer([ids], seed, show)
    print()
    return (
        [*history, dict(role="user", content=line), dict(role="assistant", content=text)]
        if sampler.chats
        else []
    )


def main(cfg):
    if cfg.prompt is not None and cfg.prompts:
        raise UserError("give prompt= or prompts=, not both")
    if cfg.out and not cfg.prompts:
        raise UserError("out= is for the answers to prompts=; give that too")
    if not all(cfg.stop):
        raise UserError("stop= holds an empty string, which would end every answer at once")
    if cfg.out and (cfg.out.is_dir() or not cfg.out.absolute().parent.is_dir()):
        raise UserError(f"out={cfg.out} must be a file in a folder that exists")
    entries = read_prompts(cfg.prompts) if cfg.prompts else []
    sampler = Sampler(cfg)
    if cfg.prompts:
        answer_file(sampler, entries, cfg)
    elif cfg.prompt is not None:
        ids = sampler.render(sampler.messages(cfg.prompt, cfg.system))
        show(cfg.prompt if cfg.echo else "")
        sampler.answer([ids], cfg.seed, show)
        print()
    else:
        chat(sampler, cfg)


if __name__ == "__main__":
    config.run(main, Config)
