"""Configuration: one dataclass per script, filled from `key=value` arguments and `.cfg` presets.

    python sft.py recipes/lora.cfg lr=1e-4 data=[alpaca,dolly] steps=1_000
    python sft.py help

Later arguments win. A preset holds one `key=value` a line. `#` at the start of a line or after a space
begins a comment. A value or list element in double quotes is a JSON string, so that any text fits on one
line. Nothing is ever evaluated as code.

A Config may have built-in presets, such as algo=grpo: PRESETS = {"algo": {"grpo": {key: value, ...}}}. Such
a preset expands where it stands, and config.cfg holds the keys that it sets.
"""

import ast
import dataclasses
import difflib
import errno
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import textwrap
import tokenize
import types
import typing
from pathlib import Path

QUOTED = r'"(?:[^"\\]|\\.)*"'
COMMENT = re.compile(
    rf"(?<=[=,\[])\s*{QUOTED}|((?:^|\s)#.*)"
)  # a quoted value is stepped over, '#' and all
ELEMENT = re.compile(rf"\s*({QUOTED}|[^,]*?)\s*(?:,|$)")
BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class Range(typing.NamedTuple):
    """The values that a number may take: a test, and the words of the error message."""

    words: str
    holds: typing.Callable[[float], bool]


# The annotations of a Config's numbers. `steps: NonNegativeInt = 0` is an int with this range.
NonNegativeInt = typing.Annotated[int, Range("0 or more", lambda x: x >= 0)]
PositiveInt = typing.Annotated[int, Range("1 or more", lambda x: x >= 1)]
NonNegativeFloat = typing.Annotated[float, Range("0 or more", lambda x: x >= 0)]
PositiveFloat = typing.Annotated[float, Range("above 0", lambda x: x > 0)]
UnitFloat = typing.Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
Fraction = typing.Annotated[float, Range("0 or more and below 1", lambda x: 0 <= x < 1)]
Share = typing.Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
Every = typing.Annotated[int, Range("-1 or more", lambda x: x >= -1)]  # a number of steps, 0 or -1
Seed = typing.Annotated[int, Range("from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63)]  # as in torch


class UserError(Exception):
    """Something the user can put right, in one plain sentence: what, where (file:line), what to do."""


class Quoted(str):
    """Text that stood in double quotes: never `none`, a number or a list, always the text itself."""


def unquote(text):
    return Quoted(json.loads(text)) if re.fullmatch(QUOTED, text) else text


def cast(kind, text):
    """The value that `text` stands for under the annotation `kind`; ValueError when it stands for none."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        members = sorted(
            args, key=lambda k: k is not types.NoneType
        )  # unquoted `none` is None, not the str "none"
        if isinstance(text, Quoted):
            members = [
                k for k in members if k in (str, Path) or typing.get_origin(k) is typing.Literal
            ]
        for member in members:
            try:
                return cast(member, text)
            except ValueError:
                pass
    elif origin is typing.Literal:
        for option in args:
            try:
                if cast(type(option), text) == option:
                    return option
            except ValueError:
                pass
    elif (origin or kind) in (list, tuple):
        inner = text.strip()
        if inner.startswith("["):
            if not inner.endswith("]"):
                raise ValueError(text)
            inner = inner[1:-1].strip()
        items = [match[1] for match in ELEMENT.finditer(inner + ",")][:-1] if inner else []
        kinds = args or (str, ...)
        kinds = kinds[:1] * len(items) if origin is not tuple or kinds[-1] is ... else kinds
        if "" in items or len(kinds) != len(items):
            raise ValueError(text)
        return (origin or kind)(
            cast(k, unquote(item)) for k, item in zip(kinds, items, strict=True)
        )
    elif kind is types.NoneType:
        if text.strip().lower() == "none":
            return None
    elif kind is bool:
        if text.strip().lower() in BOOLS:
            return BOOLS[text.strip().lower()]
    elif kind is float:
        if math.isfinite(value := float(text)):
            return value
    elif kind in (int, str, Path):
        return str(text) if kind is str else kind(text)
    else:
        raise TypeError(f"no cast for the annotation {kind}")
    raise ValueError(text)


def show(kind, value):
    """The text from which a preset line reads `value` back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(
                k for k in typing.get_args(kind) if (typing.get_origin(k) or k) is type(value)
            )
        args = typing.get_args(kind) or (str,)
        kinds = (
            args
            if typing.get_origin(kind) is tuple and args[-1] is not ...
            else args[:1] * len(value)
        )
        return f"[{','.join(show(k, v) for k, v in zip(kinds, value, strict=True))}]"
    if isinstance(value, (str, Path)):
        text = str(value)
        plain = (
            text.isprintable()
            and re.fullmatch(r'[^\s"#,\[\]]+', text)
            and cast(kind, text) == value
        )
        return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
    return repr(value)


def describe(kind):
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(member) for member in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(option) for option in args)
    if origin in (list, tuple) and args and args[-1] is not ... and origin is tuple:
        return f"{len(args)} values [{','.join(describe(k) for k in args)}]"
    if (origin or kind) in (list, tuple):
        return f"list of {describe(args[0]) if args else 'str'}"
    return {types.NoneType: "none", bool: "true or false", Path: "path"}.get(kind) or kind.__name__


def nearest(name, keys):
    """The key closest in spelling or by initials (`learning_rate` for `lr`, `bs` for `batch_size`), or None."""

    def initials(words):
        return "".join(word[:1] for word in words.split("_"))

    def score(key):
        if initials(name) == key or initials(key) == name:
            return 0.9
        return difflib.SequenceMatcher(None, name, key).ratio()

    name = name.replace("-", "_")
    best = max(keys, key=score, default="")
    return best if score(best) >= 0.5 else None


def read_preset(path):
    """[(where, line)] of the lines that hold something; `where` is file:line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"preset {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"preset {path} cannot be read as UTF-8 text: {e}") from None
    lines = [COMMENT.sub(lambda m: "" if m[1] else m[0], line).strip() for line in text.split("\n")]
    return [(f"{path}:{i}: ", line) for i, line in enumerate(lines, 1) if line]


def parse(Config, argv):
    kinds, values, given = typing.get_type_hints(Config), {}, set()
    fields = {f.name: f for f in dataclasses.fields(Config)}
    presets = getattr(Config, "PRESETS", {})  # {key: {option: {other key: value}}}

    def put(where, line):
        key, equals, text = line.partition("=")
        key = key.strip().removeprefix("--")
        if not equals:
            raise UserError(
                f"{where}'{line}' is not key=value"
                + (f"; write {key}=VALUE" if key in fields else "")
            )
        if key not in fields and key not in presets:
            near = nearest(key, [*fields, *presets])
            hint = f"did you mean '{near}'?" if near else "`help` lists every key"
            raise UserError(f"{where}unknown key '{key}'; {hint}")
        if not where:  # the command line
            if key in given:
                raise UserError(f"key '{key}' is given twice on the command line")
            given.add(key)
        if key in presets:
            if text.strip() not in presets[key]:
                options = ", ".join(presets[key])
                raise UserError(f"{where}{key}={text.strip()}: expected one of {options}")
            values.update(presets[key][text.strip()])
            return
        try:
            values[key] = cast(kinds[key], unquote(text.strip()) if where else text)
        except ValueError:
            raise UserError(
                f"{where}{key}={text.strip()}: expected {describe(kinds[key])}"
            ) from None

    for arg in argv:
        key, equals, _ = arg.partition("=")
        if arg.endswith(".cfg") and not (equals and key.removeprefix("--").isidentifier()):
            lines = read_preset(arg)
            for where, line in Config.upgrade(lines) if hasattr(Config, "upgrade") else lines:
                put(where, line)
        else:
            put("", arg)
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and default(f) is dataclasses.MISSING
    ]
    if missing:
        raise UserError(
            f"'{missing[0]}' has no default: give {missing[0]}=VALUE ({describe(kinds[missing[0]])})"
        )
    return Config(**values)


def load(Config, argv=None):
    """A `Config` dataclass filled from `argv` (the command line when None).

    A mistake ends the program with status 2 and a sentence on stderr; `help`, `-h`, `--help` print every key and exit.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(arg in ("help", "-h", "--help") for arg in argv):
        print(help_text(Config))
        sys.exit(0)
    try:
        return parse(Config, argv)
    except UserError as e:
        fail(e)


def check(cfg):
    """UserError for a number out of the range in its field's annotation."""
    for key, kind in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, key, None)
        for limit in getattr(kind, "__metadata__", ()):
            if not limit.holds(value):
                raise UserError(f"{key}={value}: must be {limit.words}")
    lr, min_lr = getattr(cfg, "lr", 0), getattr(cfg, "min_lr", 0)
    if min_lr > lr and cfg.schedule != "constant":
        raise UserError(f"min_lr={min_lr} is above lr={lr}, from which it is to fall: lower it too")


def default(f):
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def help_text(Config):
    """The script's docstring, then each key with default, type and comment, under the comment that heads its group."""
    heads, notes = {}, {}
    try:
        source = textwrap.dedent(inspect.getsource(Config))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}
        (tree,) = ast.parse(source).body
        last = tree.lineno
        for node in tree.body:
            if isinstance(node, ast.AnnAssign):
                heads[node.target.id] = [
                    comments[r] for r in range(last + 1, node.lineno) if comments.get(r)
                ]
                notes[node.target.id] = comments.get(node.end_lineno, "")
            last = node.end_lineno
    except OSError:
        pass  # no source at hand (an interactive session): the keys alone
    kinds, lines = (
        typing.get_type_hints(Config),
        [(sys.modules[Config.__module__].__doc__ or "").strip(), ""],
    )
    for f in dataclasses.fields(Config):
        lines += ["", *heads[f.name]] if heads.get(f.name) else []
        value = "" if default(f) is dataclasses.MISSING else show(kinds[f.name], default(f))
        lines.append(
            f"  {f.name + '=' + value:<32} {describe(kinds[f.name]):<14} {notes.get(f.name, '')}".rstrip()
        )
    for key, options in getattr(Config, "PRESETS", {}).items():
        lines += ["", f"{key}= sets several keys at once, where it stands"]
        for option, keys in options.items():
            pairs = " ".join(f"{name}={show(kinds[name], value)}" for name, value in keys.items())
            lines.append(f"  {key + '=' + option:<32} {pairs}")
    return "\n".join(lines).strip("\n")


def diff(cfg):
    """["key=value"] of what differs from the defaults."""
    kinds = typing.get_type_hints(type(cfg))
    pairs = [(f, getattr(cfg, f.name)) for f in dataclasses.fields(cfg)]
    return [f"{f.name}={show(kinds[f.name], value)}" for f, value in pairs if value != default(f)]


def to_cfg(cfg):
    """The text of a preset that reproduces `cfg`."""
    kinds = typing.get_type_hints(type(cfg))
    return "".join(
        f"{f.name}={show(kinds[f.name], getattr(cfg, f.name))}\n" for f in dataclasses.fields(cfg)
    )


def changes(cfg, old):
    """["key old -> new"] of what has another value in `old`, a text that to_cfg made. resume= is no setting of the run itself."""
    new, old = (
        dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        for text in (to_cfg(cfg), old)
    )
    return [
        f"{key} {old[key]} -> {new[key]}"
        for key in new
        if key != "resume" and old.get(key, new[key]) != new[key]
    ]


def fail(message):
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(
        f"{rank}error: {message}\n", end="", file=sys.stderr
    )  # in one write: ranks share a terminal
    sys.exit(2)


def leave(status):
    """Ends a rank without taking the interpreter down: a thread of gloo may still hold a tensor of the last collective, and to let
    go of one in a dying interpreter aborts the process (pytorch/pytorch#190489), after which torchrun calls a good run failed."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(main, Config):
    """What a script calls: `attempt`, and the end of the process."""
    try:
        attempt(main, Config)
    except SystemExit as e:
        if isinstance(e.code, int):  # else the exit of a user's own function, with words to print
            leave(e.code)
        raise
    leave(0)


def attempt(main, Config):
    """`main(load(Config))`, numbers checked; a mistake, what may not be written, a full disk or device and Ctrl-C end in a
    sentence, all else in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # what a terminal cannot show ends nothing
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # so that what is half-written goes, and workers do
    try:
        cfg = load(Config)
        check(cfg)
        main(cfg)
        sys.stdout.flush()
    except UserError as e:
        fail(e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (
        BrokenPipeError
    ):  # the reader of our output left (`| head`): end as quietly as a shell's own tools
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as e:
        # safetensors and torch report a full disk in their own exception types, by text
        if getattr(e, "errno", None) in (
            errno.ENOSPC,
            errno.EDQUOT,
        ) or "No space left on device" in str(e):
            fail(f"the disk is full ({e}): free some space, then run the same command again")
        if type(e).__name__ == "OutOfMemoryError":  # torch's, which this file does not import
            keys = [
                f"{key}="
                for key in ("micro_batch", "rollout_batch", "max_length", "batch_size")
                if hasattr(cfg, key)
            ]
            fail(f"{str(e).splitlines()[0]} - lower {' or '.join(keys[:2])}")
        if (
            getattr(e, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
            and e.filename
        ):
            fail(f"{e.filename}: {e.strerror}")
        raise
