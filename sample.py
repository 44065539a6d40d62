"""Talk to a model, complete a prompt, or answer a file of prompts.

    python sample.py model=out/sft/last            # a chat, where /help lists the commands
    python sample.py model=out/lora/last base=models/smollm2 prompt="Why is the sky blue?"
    python sample.py model=models/smollm2 prompts=prompts.txt out=result.json temperature=0
    python sample.py model=models/base template=plain prompt="Once upon a time"    # completion
    python sample.py model=out/calls/last tools=tools.json      # a chat that asks for results

`model` is a model directory or an adapter's (PEFT). A prompt is laid out by the model's chat
template, or by template=. Without either it is completed as plain text. prompts= names a file with
a prompt a line, or a .json list or .jsonl lines of strings, conversations
([{"role": ..., "content": ...}, ...]) and records such as {"prompt": ...} or {"messages": [...]}.
The result is a JSON list of {"input", "output"}.

tools= names a JSON file with the definitions of functions, as OpenAI's API takes them. When an
answer calls them, the chat asks for the results, and goes on with the answer to these. The answers
to prompts= have their "tool_calls", and a record may bring "tools" of its own.
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from nano import config, files, quant, runtime, tokenizer, tools, weights
from nano.config import (
    FourBit,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Seed,
    Share,
    Temperature,
    UserError,
    With,
)
from nano.generate import Decoder, generate
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
    tools: Path | None = None  # JSON file of the functions that the model may call
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
    # the linear layers of the blocks, in fewer bits a weight
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    double_quant: FourBit[bool] = True  # 4.1 bits a weight, not 4.5: scales in 8 bits
    quant_kernel: FourBit[Literal["auto", "torch", "bitsandbytes"]] = "auto"  # what dequantises


class TooLong(UserError):
    """A prompt that leaves the model no room to answer."""


class Sampler:
    """A model with its tokenizer and the settings of a run.

    .chats: whether a chat template lays out the prompts.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.rt = runtime.start(cfg, parallel="none")
        # On a CPU the decoder packs the weights straight from their file.
        dtype = None if self.rt.device.type == "cpu" else self.rt.dtype
        quant.note_training(cfg.model, cfg.quant)
        opened = weights.open(
            cfg.model, cfg.base, self.rt.device, dtype, template=cfg.template, method=quant.of(cfg)
        )
        self.tok = opened.tok
        if cfg.template_options:
            options = cfg.template_options
            self.tok = tokenizer.load(cfg.model, cfg.template, options, cfg.base)
        if opened.model.cfg.head != "lm":
            raise UserError(f"{cfg.model} is a score model: it cannot write text")
        self.chats = self.tok.template not in (None, "plain")
        if self.tok.template is None:
            self.tok = tokenizer.load(opened.tok.dir, template="plain")
        self.tools = None
        if cfg.tools:
            self.tools = read_tools(cfg.tools)
            self.check_tools()
        self.decoder = Decoder(opened.model, self.rt.dtype)
        self.past = None  # of the conversation: its next turn goes on from there

    def check_tools(self):
        """UserError where the chat template does not write calls so that they can be read."""
        if not self.chats:
            raise UserError("tools need a chat template, and the model has none: give template=")
        if not self.tok.tools.call:
            raise UserError(
                "tools: the chat template writes the arguments of calls in no JSON, so they are "
                "not read: template=chatml writes them so"
            )

    def render(self, messages, tools=None):
        """The ids of a prompt. TooLong for one that leaves the model no room to answer.

        tools: in the place of those of tools=."""
        if tools:
            self.check_tools()
        ids, _ = self.tok.render(messages, add_generation_prompt=True, tools=tools or self.tools)
        positions = self.decoder.cfg.max_positions
        if len(ids) >= positions:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, the model takes {positions}: shorten it"
            )
        return ids

    def text(self, ids):
        """(the text of ids up to the first stop string, whether there was one)."""
        return self.tok.decode_until(ids, self.cfg.stop, inside=not self.chats)

    def answer(self, prompts, seed, on_text=None):
        """The answers to rendered prompts, as ids.

        on_text(piece) streams the answer. It is for a single prompt, and Ctrl-C then ends the
        answer: the ids so far are returned.
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
            samples = generate(
                self.decoder,
                prompts,
                cfg.max_new_tokens,
                cfg.temperature,
                cfg.top_k,
                cfg.top_p,
                self.tok.stop_ids,
                seed=seed,
                batch_size=cfg.batch_size,
                on_token=on_token if on_text or cfg.stop else None,
                step_hook=self.rt.sync,
                pasts=[self.past] if on_text else None,
                keep=on_text is not None,
            )
            ids = samples.tokens
            if on_text:
                (self.past,) = samples.pasts
        except KeyboardInterrupt:
            if not on_text:
                raise
        if on_text:
            on_text(self.text(ids[0])[0][shown:])
        return ids

    def message(self, ids):
        """The message of an answer that may call tools, with the calls apart from the text."""
        message = tools.answer_of(self.tok, ids)
        return message if "tool_calls" in message else message | dict(content=self.text(ids)[0])


def conversation(user, system, history=()):
    """A list of messages that ends with the user's. system: text, or None or "" for none."""
    messages = [*history, dict(role="user", content=user)]
    return [dict(role="system", content=system), *messages] if system else messages


def read_tools(path):
    """The definitions of functions in a JSON file. UserError where it holds anything else."""
    try:
        definitions = fields.definitions(dict(tools=json.loads(files.read_text(path))))
    except (ValueError, fields.Drop):
        definitions = None
    if not definitions:
        raise UserError(f"tools={path} must hold a JSON list of the definitions of functions")
    return definitions


def read_prompts(path):
    """The prompts of a file: [(a string or a conversation, which is a list of messages, tools)].

    tools: the definitions of functions that a record brings, or None.

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
    prompts = []
    for i, entry in enumerate(entries):
        definitions = None
        if isinstance(entry, dict):
            try:
                record = fields.without(entry, ())
                definitions = fields.definitions(record)
                entry = instructions.recognise(record)
            except (fields.Drop, BadRecord) as e:
                raise UserError(f"{path}, prompt {i + 1}: {e}") from None
        prompts.append((entry, definitions))
        last = entry[-1] if isinstance(entry, list) and entry else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            raise UserError(
                f"{path}, prompt {i + 1} ends with an answer of the assistant: leave that turn out"
            )
    return prompts


def answer_file(sampler, entries, cfg):
    """Answers all prompts and writes them to out=, or to the terminal."""
    prompts = []
    for i, (entry, definitions) in enumerate(entries, 1):
        messages = conversation(entry, cfg.system) if isinstance(entry, str) else entry
        try:
            prompts.append(sampler.render(messages, definitions))
        except UserError as e:
            raise UserError(f"{cfg.prompts}, prompt {i}: {e}") from None
    began = time.perf_counter()
    records = []
    answers = sampler.answer(prompts, cfg.seed)
    for (entry, definitions), ids in zip(entries, answers, strict=True):
        text = sampler.text(ids)[0]
        message = sampler.message(ids) if definitions or sampler.tools else {}
        text = message.get("content", text)
        if cfg.echo:
            text = (entry if isinstance(entry, str) else entry[-1]["content"]) + text
        calls = {key: message[key] for key in message if key == "tool_calls"}
        records.append(dict(input=entry, output=text) | calls)
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
            except EOFError:  # in the place of a call's result
                print()
                return


def reply(sampler, line, system, history, seed):
    """Shows the answer to `line`. Returns the history with both, or [] where nothing chats.

    Where the answer calls tools, their results are read, and the answer to them is shown.
    """
    talk = conversation(line, system, history)
    for count in itertools.count():
        ids, talk = fitting(sampler, talk)
        (tokens,) = sampler.answer([ids], (seed, count) if count else seed, show)
        print()
        if not sampler.chats:
            return []
        if not sampler.tools:
            talk = [*talk, dict(role="assistant", content=sampler.text(tokens)[0])]
            break
        message = sampler.message(tokens)
        calls = message.get("tool_calls", ())
        talk = [*talk, message, *(tools.result_of(call, input(prompt_of(call))) for call in calls)]
        if not calls:
            break
    return talk[talk[0]["role"] == "system" :]


def prompt_of(call):
    """What stands on the terminal before the result of a call: `add({"a": 1}) = `."""
    name, arguments = (call["function"][key] for key in ("name", "arguments"))
    return f"{name}({json.dumps(arguments, ensure_ascii=False)}) = "


def fitting(sampler, talk):
    """(the ids of a prompt, its messages) without the oldest turns that leave an answer no room.

    The room is max_new_tokens, or half of the model's positions where that is less.
    """
    positions = sampler.decoder.cfg.max_positions
    room = min(sampler.cfg.max_new_tokens, positions // 2)
    while True:
        users = [i for i, message in enumerate(talk) if message["role"] == "user"]
        try:
            ids = sampler.render(talk)
            if len(ids) + room <= positions or len(users) < 2:
                return ids, talk
        except TooLong:
            if len(users) < 2:
                raise
        talk = talk[: users[0]] + talk[users[1] :]
        print("(the oldest turn no longer fits and is forgotten)")


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
