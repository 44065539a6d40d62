"""Configuration: one dataclass per script, filled from `key=value` arguments and `.cfg` presets.

    python sft.py recipes/smollm2-toy-lora.cfg lr=1e-4 'data=[alpaca,dolly]' steps=1_000
    python sft.py help

Later arguments win. A preset holds one `key=value` a line. `#` at the start of a line or after a
space begins a comment. A value or list element in double quotes is a JSON string, so that any text
fits on one line. Nothing is ever evaluated as code.

On the command line a value keeps its white space. A list may stand in brackets, and there the
spaces around its elements do not count. `~` at the start of a path is the home directory, whether
or not the shell knows.

A Config may have built-in presets, such as algo=grpo. They stand in its class variable
PRESETS = {"algo": {"grpo": {key: value, ...}}}. Such a preset expands where it stands, and
config.cfg holds the keys that it sets.
"""

import difflib
import errno
import inspect
import io
import json
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

QUOTED = r'"(?:[^"\\]|\\.)*"'
# A quoted value is stepped over, '#' and all.
COMMENT = re.compile(rf"(?<=[=,\[])\s*{QUOTED}|((?:^|\s)#.*)")
ELEMENT = re.compile(rf"\s*({QUOTED})\s*,|([^,]*),")
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
UNIONS = (Union, UnionType)
# What a system says about a path that cannot be opened or created.
PATH_ERRORS = "EACCES EPERM EROFS ENOTDIR ENOENT ENAMETOOLONG EEXIST ELOOP EINVAL".split()
PATH_ERRORS = [getattr(errno, name) for name in PATH_ERRORS]


# The annotations of a Config's numbers: the words of the error message, and a test of the value.
# `steps: NonNegativeInt = 0` is an int with this range.
NonNegativeInt = Annotated[int, ("0 or more", lambda x: x >= 0)]
PositiveInt = Annotated[int, ("1 or more", lambda x: x >= 1)]
NonNegativeFloat = Annotated[float, ("0 or more", lambda x: x >= 0)]
PositiveFloat = Annotated[float, ("above 0", lambda x: x > 0)]
UnitFloat = Annotated[float, ("from 0 to 1", lambda x: 0 <= x <= 1)]
Fraction = Annotated[float, ("0 or more and below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, ("above 0 and at most 1", lambda x: 0 < x <= 1)]
# Logits divided by a smaller number than this overflow, and 0 stands for the likeliest token.
Temperature = Annotated[float, ("0, or 1e-6 or more", lambda x: x == 0 or x >= 1e-6)]
Every = Annotated[int, ("-1 or more", lambda x: x >= -1)]  # a number of steps, 0 or -1
Seed = Annotated[int, ("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)]  # as in torch


class With:
    """In a field's annotation: the key has an effect only with another key.

    With("lora_rank"): where lora_rank is not 0, false, none or empty. With("advantage", "gae"):
    where it is one of these values. `check` refuses a value that has no effect, unless it is the
    default, because the config.cfg of a run holds every key."""

    words = "only with"

    def __init__(self, key, *values):
        self.key = key
        self.values = values

    def fits(self, cfg):
        value = getattr(cfg, self.key)
        return value in self.values if self.values else bool(value)

    def __str__(self):
        return f"{self.words} {self.key}={' or '.join(map(str, self.values))}"


class Without(With):
    """In a field's annotation: the key has an effect only where `With` of the same would not fit.

    Without("lora_rank"): where lora_rank is 0, false, none or empty."""

    words = "not with"

    def fits(self, cfg):
        return not super().fits(cfg)


# `lora_alpha: LoRA[PositiveFloat] = 32.0` has an effect only with lora_rank=.
T = TypeVar("T")
LoRA = Annotated[T, With("lora_rank")]
Full = Annotated[T, Without("lora_rank")]
FourBit = Annotated[T, With("quant", "nf4", "fp4")]


class UserError(Exception):
    """A mistake of the user's. One plain sentence says what, where (file:line) and what to do."""


class Quoted(str):
    """Text that stood in double quotes. It is always text, and never `none`, a number or several
    elements of a list."""


class AsTyped(str):
    """Text of the command line, whose white space counts."""


class PathText(str):
    """The annotation of a key that names a path, or a path or something else, such as a hub id."""


def unquote(text):
    """Text in double quotes as a JSON string, in which a line break may stand as it is."""
    quoted = re.fullmatch(QUOTED, text)
    return Quoted(json.loads(text, strict=False)) if quoted else text


def elements(text):
    """The texts of a list's elements.

    The spaces around them count where they stand on the command line and not in brackets."""
    inner = text.strip(" ")
    if inner.startswith("["):
        if not inner.endswith("]") or inner == "[":
            raise ValueError(text)
        text = inner[1:-1].strip(" ")
    if not text:
        return []
    edges = "" if isinstance(text, AsTyped) else " \t"
    items = [
        unquote(quoted) if quoted else plain.strip(edges)
        for quoted, plain in ELEMENT.findall(text + ",")
    ]
    if any(item == "" and not isinstance(item, Quoted) for item in items):
        raise ValueError(text)
    return items


def element_kinds(kind, count):
    """The annotations of the `count` elements of a value that is annotated list[...] or
    tuple[...]."""
    args = get_args(kind)
    each = get_origin(kind) is tuple and args[-1] is not ...
    return args if each else args[:1] * count


def cast(kind, text):
    """The value that `text` stands for under the annotation `kind`.

    ValueError if it stands for none."""
    origin, args = get_origin(kind), get_args(kind)
    word = text.strip().lower()
    if origin in UNIONS:
        # None comes first: unquoted `none` is not the str "none".
        for member in sorted(args, key=lambda k: k is not NoneType):
            textual = member in (str, PathText, Path) or get_origin(member) is Literal
            if textual or not isinstance(text, Quoted):
                with suppress(ValueError):
                    return cast(member, text)
    elif origin is Literal:
        for option in args:
            with suppress(ValueError):
                if cast(type(option), text) == option:
                    return option
    elif origin in (list, tuple):
        items = [text] if isinstance(text, Quoted) else elements(text)
        kinds = element_kinds(kind, len(items))
        if len(kinds) != len(items):
            raise ValueError(text)
        return origin(cast(k, item) for k, item in zip(kinds, items, strict=True))
    elif kind is NoneType and word == "none":
        return None
    elif kind is bool and word in BOOLS:
        return BOOLS[word]
    elif kind is float and abs(value := float(text)) <= FLOAT32_MAX:  # nor is NaN
        return value
    elif kind in (PathText, Path):
        # in quotes ~ is an ordinary character, as it is in a shell
        path = str(text) if isinstance(text, Quoted) else os.path.expanduser(text)
        return Path(path) if kind is Path else path
    elif kind in (int, str):
        return kind(str(text))
    raise ValueError(text)


def show(kind, value):
    """The text from which a preset line reads `value` back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        if get_origin(kind) in UNIONS:
            members = get_args(kind)
            kind = next(k for k in members if get_origin(k) is type(value))
        pairs = zip(element_kinds(kind, len(value)), value, strict=True)
        return f"[{','.join(show(k, v) for k, v in pairs)}]"
    if isinstance(value, (str, Path)):
        text = str(value)
        plain = text.isprintable() and re.fullmatch(r'[^\s"#,\[\]]+', text)
        if plain and cast(kind, text) == value:
            return text
        return json.dumps(text, ensure_ascii=not text.isprintable())
    return repr(value)


def describe(kind):
    """The words for an annotation in `help` and in messages, such as "list of str"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        return " or ".join(map(describe, args))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple and args[-1] is not ...:
        return f"{len(args)} values [{','.join(map(describe, args))}]"
    if origin in (list, tuple):
        return f"list of {describe(args[0])}"
    words = {NoneType: "none", bool: "true or false", Path: "path", PathText: "path"}
    return words.get(kind, kind.__name__)


def nearest(name, keys):
    """The key closest in spelling or by initials, or None.

    `learning_rate` finds `lr`, and `bs` finds `batch_size`."""

    def initials(words):
        return "".join(word[:1] for word in words.split("_"))

    name = name.replace("-", "_")
    for key in keys:
        if initials(name) == key or initials(key) == name:
            return key
    return next(iter(difflib.get_close_matches(name, keys, 1, 0.6)), None)


def read_preset(path):
    """[(where, line)] of the lines that hold something. `where` is file:line."""
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"preset {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"preset {path} cannot be read as UTF-8 text: {e}") from None
    lines = [COMMENT.sub(lambda m: "" if m[1] else m[0], line).strip() for line in text.split("\n")]
    return [(f"{path}:{i}: ", line) for i, line in enumerate(lines, 1) if line]


def parse(Config, argv):
    """A `Config` filled from the arguments `argv`. UserError for a mistake in one of them."""
    hints = get_type_hints(Config)
    presets = getattr(Config, "PRESETS", {})  # {key: {option: {other key: value}}}
    kinds = {f.name: hints[f.name] for f in fields(Config)}
    kinds |= {key: Literal[tuple(options)] for key, options in presets.items()}
    lines = []  # (where, line), where is "" on the command line
    for arg in argv:
        key, equals, _ = arg.partition("=")
        if arg.endswith(".cfg") and not (equals and key.removeprefix("--").isidentifier()):
            preset = read_preset(arg)
            lines += Config.upgrade(preset) if hasattr(Config, "upgrade") else preset
        else:
            lines.append(("", arg))
    values, given = {}, set()
    for where, line in lines:
        key, equals, text = line.partition("=")
        key = key.strip().removeprefix("--")
        if not equals:
            hint = f"; write {key}=VALUE" if key in kinds else ""
            raise UserError(f"{where}'{line}' is not key=value{hint}")
        if key not in kinds:
            near = nearest(key, kinds)
            hint = f"did you mean '{near}'?" if near else "`help` lists every key"
            raise UserError(f"{where}unknown key '{key}'; {hint}")
        if not where:
            if key in given:
                raise UserError(f"key '{key}' is given twice on the command line")
            given.add(key)
        try:
            # on the command line a value is taken as it is, quotes and spaces too
            value = cast(kinds[key], unquote(text.strip()) if where else AsTyped(text))
        except ValueError:
            expected = describe(kinds[key])
            raise UserError(f"{where}{key}={text.strip()}: expected {expected}") from None
        values |= presets[key][value] if key in presets else {key: value}
    for f in fields(Config):
        if f.name not in values and default(f) is MISSING:
            kind = describe(kinds[f.name])
            raise UserError(f"'{f.name}' has no default: give {f.name}=VALUE ({kind})")
    return Config(**values)


def load(Config, argv):
    """A `Config` dataclass filled from the arguments `argv`.

    A mistake ends the program with status 2 and a sentence on stderr. `help`, `-h` and `--help`
    print every key and exit. What follows an argument `#` is a comment.
    """
    if "#" in argv:  # zsh passes on the comment behind a command that was pasted into it
        argv = argv[: argv.index("#")]
    if {"help", "-h", "--help"} & set(argv):
        print(help_text(Config))
        sys.exit(0)
    try:
        return parse(Config, argv)
    except UserError as e:
        fail(e)


def annotations(Config):
    """{key: ([(words, test) of its range], [With or Without])} from the annotations of a Config."""
    notes = {}
    kinds = get_type_hints(Config, include_extras=True)
    for key in (f.name for f in fields(Config)):
        extras = getattr(kinds[key], "__metadata__", ())
        others = [extra for extra in extras if isinstance(extra, With)]
        notes[key] = [extra for extra in extras if extra not in others], others
    return notes


def refuse(cfg, key, why, change):
    """UserError where a key without effect differs from its default, so that somebody gave it.

    why: words such as "with lora_rank=0". change: what else would mend it, such as "lora_rank=".
    """
    values = {f.name: default(f) for f in fields(cfg)}
    if getattr(cfg, key) != values[key]:
        raise UserError(
            f"{key}={texts(cfg)[key]} has no effect {why}: leave it out, or change {change}"
        )


def check(cfg):
    """UserError for a number out of the range in its field's annotation, and for a key that has no
    effect beside the others."""
    notes = annotations(type(cfg))
    for key, (ranges, _) in notes.items():
        for words, holds in ranges:
            if not holds(getattr(cfg, key)):
                raise UserError(f"{key}={getattr(cfg, key)}: must be {words}")
    for key, (_, others) in notes.items():
        for other in others:
            if not other.fits(cfg):
                refuse(cfg, key, f"with {other.key}={texts(cfg)[other.key]}", f"{other.key}=")
    lr, min_lr = getattr(cfg, "lr", 0), getattr(cfg, "min_lr", 0)
    if min_lr > lr and cfg.schedule != "constant":
        raise UserError(f"min_lr={min_lr} is above lr={lr}, from which it is to fall: lower it too")


def default(f):
    """The default of a dataclass field, or MISSING."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def comments(Config):
    """({key: lines of comment above it}, {key: comment behind it}) of a Config.

    They are read from its source, so that the file and `help` show the same words. Without source
    (an interactive session) there are none."""
    heads, notes = {}, {}
    above, key = [], None
    with suppress(OSError):
        for line in inspect.getsource(Config).splitlines():
            code, _, comment = line.partition("# ")
            if code.lstrip().startswith("def "):
                break
            if match := re.match(r"\s+(\w+): ", code):
                key = match[1]
                heads[key], above = above, []
            if comment and code.strip():
                notes[key] = comment
            elif comment:
                above.append(comment)
    return heads, notes


def help_text(Config):
    """The script's docstring, then each key with default, type and comment.

    A comment line in the Config heads the group of keys below it."""
    heads, notes = comments(Config)
    effects = annotations(Config)
    kinds = get_type_hints(Config)
    lines = [(sys.modules[Config.__module__].__doc__ or "").strip(), ""]
    for f in fields(Config):
        if heads.get(f.name):
            lines += ["", *heads[f.name]]
        value = "" if default(f) is MISSING else show(kinds[f.name], default(f))
        line = f"  {f.name + '=' + value:<32} {describe(kinds[f.name]):<14} "
        others = ", ".join(map(str, effects[f.name][1]))
        note = notes.get(f.name, "") + (f" ({others})" if others else "")
        lines.append((line + note.strip()).rstrip())
    for key, options in getattr(Config, "PRESETS", {}).items():
        lines += ["", f"{key}= sets several keys at once, where it stands"]
        for option, keys in options.items():
            pairs = " ".join(f"{name}={show(kinds[name], value)}" for name, value in keys.items())
            lines.append(f"  {key + '=' + option:<32} {pairs}")
    return "\n".join(lines).strip("\n")


def texts(cfg):
    """{key: text of its value} of a Config."""
    kinds = get_type_hints(type(cfg))
    return {f.name: show(kinds[f.name], getattr(cfg, f.name)) for f in fields(cfg)}


def diff(cfg):
    """["key=value"] of what differs from the defaults."""
    said = texts(cfg)
    changed = [f.name for f in fields(cfg) if getattr(cfg, f.name) != default(f)]
    return [f"{key}={said[key]}" for key in changed]


def to_cfg(cfg):
    """The text of a preset that reproduces `cfg`."""
    return "".join(f"{key}={text}\n" for key, text in texts(cfg).items())


def changes(cfg, old):
    """["key old -> new"] of what has another value in `old`, a text that to_cfg made.

    resume= is left out, because it is no setting of the run itself."""
    before = dict(line.split("=", 1) for line in old.splitlines() if "=" in line)
    after = texts(cfg).items()
    return [
        f"{key} {before[key]} -> {text}"
        for key, text in after
        if key != "resume" and before.get(key, text) != text
    ]


def say(message):
    """Prints a line. False where its reader has left.

    A terminal that is gone (a closed connection) loses the line, which is no reason to stop."""
    try:
        print(message, flush=True)
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return e.errno == errno.EIO
    return True


def fail(message):
    """Ends the process with status 2 and the message on stderr."""
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK") else ""
    # one write, line break included, because ranks share a terminal
    sys.stderr.write(f"{rank}error: {message}\n")
    sys.exit(2)


def leave(status):
    """Ends the process, and a rank of torchrun by os._exit, without taking the interpreter down.

    A thread of gloo may still hold a tensor of the last collective. Freeing it while the
    interpreter shuts down aborts the process (pytorch/pytorch#190489), and torchrun would call a
    good run failed."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(main, Config):
    """What a script calls: `attempt`, and the end of the process.

    A main that returns the name of a signal was stopped by it. As in a shell the status is then 128
    and the signal's number, so that what follows in a script does not take the run for finished."""
    try:
        ended = attempt(main, Config)
    except SystemExit as e:
        if isinstance(e.code, int):  # else the exit of a user's own function, with words to print
            leave(e.code)
        raise
    stopped = isinstance(ended, str) and ended.startswith("SIG")
    leave(128 + signal.Signals[ended] if stopped else 0)


def open_streams():
    """Gives a closed stdin, stdout or stderr (`python sft.py >&-`) the null device.

    Otherwise the next file that is opened would get the number of the stream, and whatever prints
    would write into it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in closed:
        setattr(sys, name, open(os.devnull, "w"))
    if closed:
        print(f"note: {' and '.join(closed)} is closed: what goes there is lost", file=sys.stderr)


def attempt(main, Config):
    """Loads and checks the config of the command line -> what main(cfg) returns.

    Expected failures (UserError, a path that cannot be opened or created, a full disk, a full
    device, Ctrl-C) end in one sentence and an exit status. Anything else keeps its traceback."""
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # an exception, so that what is half-written is removed and workers end
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cfg = load(Config, sys.argv[1:])
        check(cfg)
        ended = main(cfg)
        sys.stdout.flush()
        return ended
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left (`| head`). End as quietly as a shell's own tools.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as e:
        code = getattr(e, "errno", None)
        # safetensors and torch report a full disk in their own exception types, by text
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(e):
            fail(f"the disk is full ({e}): free some space, then run the same command again")
        if type(e).__name__ == "OutOfMemoryError":  # torch's, which this file does not import
            keys = ("micro_batch", "rollout_batch", "max_length", "batch_size")
            lower = [f"{key}=" for key in keys if hasattr(cfg, key)]
            fail(f"{str(e).splitlines()[0]} - lower {' or '.join(lower[:2])}")
        if type(e) is RuntimeError and str(e).startswith("Symlink loop"):  # before Python 3.13
            fail(e)
        if code in PATH_ERRORS and e.filename:
            fail(f"{e.filename}: {e.strerror}")
        raise
