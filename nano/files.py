"""Atomic writes, folders that are replaced as a whole, locks, and JSON.

Each file is written under a temporary name, flushed to the disk and renamed, so that a kill or a
power failure leaves either the old content or the new one."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from nano.config import UserError

# after the name of a folder:
UNFINISHED = ".unfinished"  # its new content, until it is complete
REPLACED = ".replaced"  # its old content, until the new one is in place


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


def read_text(path):
    """The text of a UTF-8 file. UserError for a file that cannot be read as such."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as UTF-8 text: {e}") from None


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
