"""Checkpoints of a training: folders checkpoint-N that are there as a whole or not at all, and are verified when read.

The last file of one is its book: JSON of what the training says of its state, with the size and SHA-256 of every other
file and a SHA-256 of the book itself. What the files are, `smlib.ppo` and `smlib.trl_policy` decide.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smlib.artifacts import StageError
from smlib.files import replacing, sha256


def newest(out: Path) -> Path | None:
    """The checkpoint of the highest number, if there is one."""
    return max(_all(out), key=_number, default=None)


@contextmanager
def saving(folder: Path, book: str, said: dict) -> Iterator[Path]:
    """Yield an empty folder; if the block ends well it becomes `folder` in one step, and older checkpoints are removed.

    book: the name of the last file, which is written here, of `said` (as JSON). A full disk is a DiskFullError.
    """
    with replacing(folder) as tmp:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed run
        tmp.mkdir()
        yield tmp
        files = {file.relative_to(tmp).as_posix(): _measured(file) for file in sorted(tmp.rglob("*")) if file.is_file()}
        sealed = json.loads(json.dumps(said | {"files": files}))
        (tmp / book).write_text(json.dumps(sealed | {"sha256": _digest(sealed)}), encoding="utf-8")
    keep_newest(folder.parent)


def keep_newest(out: Path) -> None:
    """Remove all checkpoints but the newest, and what a killed run has left of one."""
    kept = newest(out)
    for old in out.glob("checkpoint-*"):
        if old != kept:
            shutil.rmtree(old)


def opened(folder: Path, book: str) -> dict:
    """What was said when it was saved. Raises StageError for the first file that is not as it was written."""
    try:
        said = json.loads((folder / book).read_text(encoding="utf-8"))
        whole = said.pop("sha256") == _digest(said)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise _damaged(folder, book)
    for name, measured in said["files"].items():
        file = folder / name
        if not file.is_file() or _measured(file) != measured:
            raise _damaged(folder, name)
    return said


def _all(out: Path) -> list[Path]:
    return [folder for folder in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _measured(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _digest(said: dict) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path, name: str) -> StageError:
    older = max((one for one in _all(folder.parent) if one != folder), key=_number, default=None)
    then = f"goes on from {older.name}" if older else "begins anew"
    return StageError(
        f"{folder / name} is missing or damaged, or of another version of this package: delete the folder {folder}; "
        f"the training then {then}."
    )
