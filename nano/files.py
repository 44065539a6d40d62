"""Atomic writes, folders that are replaced as a whole, and JSON.

Each file is written under a temporary name, flushed to the disk and renamed, so that a kill or a
power failure leaves either the old content or the new one."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from nano.config import UserError

REPLACED = ".replaced"  # after the name of a folder: its old content, until the new one is in place


def read_json(path, missing=None):
    """The object in a JSON file as a dict. missing: what to return if there is no such file.

    UserError for a file that cannot be read, and for one that holds no object."""
    if missing is not None and not Path(path).exists():
        return missing
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def sync(path):
    """Waits until a file's content, or a directory's list of names, has reached the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    if Path(dir).exists():
        os.replace(dir, old)
    os.replace(tmp, dir)
    sync(Path(dir).parent)
    shutil.rmtree(old, ignore_errors=True)
