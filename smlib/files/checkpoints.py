"""Checkpoints of a training: folders checkpoint-N that are there as a whole or not at all, and are verified when read.

The last file of a checkpoint is its state file: a JSON object of the training's settings and state, with the size and
the SHA-256 of every other file ("files") and a SHA-256 of all else in it ("sha256"). `smlib.ppo.state` and
`smlib.ppo.rloo_grpo` decide what the files are.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ConfigDict
from typing_extensions import TypedDict

from smlib.files.artifacts import StageError
from smlib.files.atomic import DamagedError, FileRecord, file_records, json_sha256, load_json, replacing


class _StateFile(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    files: dict[str, FileRecord]
    sha256: str


def newest(out: Path) -> Path | None:
    """The checkpoint of the highest number, if there is one."""
    return next(reversed(_all(out)), None)


@contextmanager
def new_checkpoint(folder: Path, state_file: str, state: dict) -> Iterator[Path]:
    """Yield an empty folder; if the block ends well it becomes `folder` in one step, and older checkpoints are removed.

    state: JSON values, written to the file `state_file` after the block. A full disk is a DiskFullError.
    """
    with replacing(folder) as tmp:
        shutil.rmtree(tmp, ignore_errors=True)  # left by a killed run
        tmp.mkdir()
        yield tmp
        written = json.loads(json.dumps(state | {"files": file_records(tmp)}))
        written["sha256"] = json_sha256(written, sort_keys=True)
        (tmp / state_file).write_text(json.dumps(written), encoding="utf-8")
    keep_newest(folder.parent)


def keep_newest(out: Path) -> None:
    """Remove all checkpoints but the newest, and what a killed run has left of one."""
    kept = newest(out)
    for old in out.glob("checkpoint-*"):
        if old != kept:
            shutil.rmtree(old)


def read_state(folder: Path, state_file: str) -> dict:
    """The state that `folder` was saved with, and "files". Raises StageError for the first file that is not as it was
    written."""
    try:
        state = load_json(folder / state_file, _StateFile)
    except (DamagedError, OSError):
        state = None
    if not state or state.pop("sha256") != json_sha256(state, sort_keys=True):
        raise _damaged(folder, state_file)
    found = file_records(folder)
    for name, record in state["files"].items():
        if found.get(name) != record:
            raise _damaged(folder, name)
    return state


def _all(out: Path) -> list[Path]:
    """The checkpoints by their numbers."""
    found = [folder for folder in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


def _damaged(folder: Path, name: str) -> StageError:
    older = next((one for one in reversed(_all(folder.parent)) if one != folder), None)
    then = f"continues from {older.name}" if older else "starts again"
    return StageError(
        f"{folder / name} is missing or damaged, or from another version of this package: delete the folder {folder}; "
        f"the training then {then}."
    )
