"""Files that are whole or not there: atomic writes, hashes, locks, and what is said of a full disk."""

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from smlib.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on the size of files


class DiskFullError(UserError, OSError):
    """There is no room for a file; the message says where, and how much is missing."""


class DamagedError(UserError, ValueError):
    """A file of ours does not hold what was written to it; the message names it."""


class BusyError(UserError, RuntimeError):
    """Another process is at work on the same files."""


@contextmanager
def replacing(target: Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path that takes target's place if the block ends well, and is removed if not.

    size: bytes that will be written, where that is known. A full disk is a DiskFullError.
    """
    tmp = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        for path in [tmp, *tmp.rglob("*")]:
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())  # the contents are on the disk before the name is
        if target.is_dir():
            remove(target)
        os.replace(tmp, target)
    except BaseException as error:
        written = _bytes_of(tmp)
        remove(tmp)
        if is_full(error):
            raise DiskFullError(_no_room(target, max(size or 0, written + 1))) from error
        raise


def write_text(target: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    data = text.encode()
    with replacing(target, len(data)) as tmp:
        tmp.write_bytes(data)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_full(error: BaseException) -> bool:
    """Whether that is a full disk's error: libraries that write by themselves have classes of their own for it."""
    said = ("No space left on device", "inline_container.cc", "iostream error")  # safetensors; torch.save, both
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in said)


def explain(error: Exception, folder: str | Path | None = None) -> str:
    """The error in a sentence. folder: where is written, should the error not say it."""
    if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError) and error.filename:
        return _wrong_kind(Path(error.filename))
    if isinstance(error, PermissionError) and error.filename:
        folder = Path(error.filename).parent
        return f"no permission to write {folder} or to read files in it: name another folder, or change its permissions"
    if not is_full(error) or isinstance(error, DiskFullError):
        return str(error)
    if name := getattr(error, "filename", None):
        return _no_room(Path(name), 0)
    if folder:
        return _no_room(Path(folder) / "its files", 0)
    return f"{error}: no space for the output, such as redirected standard output; free some space there"


def _wrong_kind(path: Path) -> str:
    """What stands where a file or a folder of ours belongs."""
    file = next((one for one in (path, *path.parents) if one.is_file()), None)
    found = f"{file} is a file, where a folder belongs" if file else f"{path} is a folder, where a file belongs"
    return f"{found}: move it elsewhere, or name another folder"


def _no_room(target: Path, size: int) -> str:
    folder = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    missing = f"at least {mib(size - free)} more are needed" if size > free else "a quota is used up"
    return (
        f"No space left on the disk to write {target}: {mib(free)} are free in {folder}, and {missing}. Free some "
        "space there, or choose another folder, and run the same command again; no half-written file was left behind."
    )


def mib(size: int) -> str:
    """Bytes as MiB, rounded up, so that none is "0 MiB"."""
    return f"{-(-size // 2**20):,} MiB"


def _bytes_of(path: Path) -> int:
    with suppress(OSError):
        return sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file())
    return 0


def load_json(path: Path, shape=dict[str, object]):
    """The JSON value in a file, or None where there is no file.

    shape: a type as pydantic knows it, such as a TypedDict. Raises DamagedError where the file holds no such value.
    """
    try:
        return _parsed(path.read_bytes(), shape, path)
    except FileNotFoundError:
        return None


def load_jsonl(path: Path, shape=dict[str, object]) -> list:
    """The JSON values in a file, one a line; of a TypedDict or a dataclass no more keys than it has.

    Raises DamagedError for the first line that is no such value.
    """
    with path.open("rb") as file:
        return [_parsed(line, shape, f"{path}, line {number}", "forbid") for number, line in enumerate(file, 1)]


def _parsed(text: bytes, shape, where: Path | str, extra: str | None = None):
    """extra: what becomes of keys that the shape does not name, by default what the shape itself says."""
    try:
        return _adapter(shape).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DamagedError(f"{where} is damaged: {place}{': ' * bool(place)}{first['msg']}") from None


@lru_cache
def _adapter(shape) -> TypeAdapter:
    return TypeAdapter(shape)


def sha256(path: Path) -> str:
    """SHA-256 of a file, read once by a process as long as its size and its time stay the same."""
    found = path.stat()
    return _sha256(str(path.resolve()), found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileRecord(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def file_records(folder: Path) -> dict[str, FileRecord]:
    """The size and the SHA-256 of every file below a folder, by its path from there, such as "model/config.json"."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def json_sha256(value, **options) -> str:
    """SHA-256 of a value as JSON.

    options: those of `json.dumps`. They are part of a file's format: the same value has another hash under others.
    """
    return hashlib.sha256(json.dumps(value, **options).encode()).hexdigest()


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, one process at a time; BusyError at once where another has it.

    The operating system takes the lock from a process that has ended, however it ended, so that none is ever stale.
    what: what is being done, for the message.
    """
    new = [folder for folder in (path.parent, path.parent.parent) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(path, timeout=0), path.with_suffix(".owner")
    try:
        lock.acquire()
    except (Timeout, FileNotFoundError):  # the folder went with another's lock just now
        raise BusyError(f"another process{_owner(owner)} is {what}: wait until it has ended, or stop it") from None
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        write_text(owner, json.dumps(me))
        yield
    finally:
        owner.unlink(missing_ok=True)
        with suppress(OSError):  # others hold a lock here, or it is Windows
            path.unlink()  # who is waiting for it sees that it has lost its name, and begins again
            for folder in new:
                folder.rmdir()  # nothing was written
        lock.release()


def _owner(path: Path) -> str:
    """Who holds a lock, as it has said of itself."""
    with suppress(UserError, OSError, KeyError):
        found = load_json(path) or {}
        return f" ({found['pid']} on {found['host']}, since {found['since']})"
    return ""
