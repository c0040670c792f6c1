"""Published files, pinned by SHA-256: read from SML_DATA_DIR, else from the user's cache, else fetched once.

A file is fetched raw from its first publisher. If that fails and the Hub has the same rows, they are written in the raw
file's own form and must have its SHA-256 too. So both sources give the same bytes, or the file is refused.
"""

import hashlib
import json
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from filelock import FileLock

from smlib.errors import UserError
from smlib.files.folders import cache_folder, cache_homes
from smlib.progress import progress_bar


class DatasetError(UserError, ValueError):
    """A dataset file is missing, truncated, altered, or cannot be fetched, or holds a row that cannot be used."""


@dataclass(frozen=True)
class Pinned:
    """sha256: of the raw file. hub: (repository, revision, file, row of that file -> row of the raw file) or None."""

    sha256: str
    url: str
    hub: tuple[str, str, str, Callable[[dict], dict]] | None = None


def _commonsense_qa_row(row: dict) -> dict:
    choices = [{"label": label, "text": text} for label, text in zip(*row["choices"].values(), strict=True)]
    question = {"question_concept": row["question_concept"], "choices": choices, "stem": row["question"]}
    return {"answerKey": row["answerKey"], "id": row["id"], "question": question}


def _in_order(*keys: str) -> Callable[[dict], dict]:
    return lambda row: {key: row[key] for key in keys}


_RAW_ROWS = {  # repository on the Hub -> how a row of its files becomes one of the raw file
    "openai/gsm8k": _in_order("question", "answer"),
    "tau/commonsense_qa": _commonsense_qa_row,
    "deepmind/aqua_rat": _in_order("question", "options", "rationale", "correct"),
}


def _pinned(sha256: str, url: str, hub: tuple[str, str, str] | None = None) -> Pinned:
    return Pinned(sha256, url, hub and (*hub, _RAW_ROWS[hub[0]]))


# Path below SML_DATA_DIR and below the cache -> what it must be and where it comes from. Kojima et al. (2205.11916)
# collected ten of the sets; the SHA-256 pins the content, whatever a branch holds later. The Hub's own loader of AQuA
# recorded its two.
_LISTED = json.loads((Path(__file__).parent / "published_files.json").read_text(encoding="utf-8"))
FILES = {path: _pinned(**one) for path, one in _LISTED.items()}


def read_pinned(path: str) -> bytes:
    """The content of a published file, checked by SHA-256.

    Read from SML_DATA_DIR, else the cache (`cache_folder`), else fetched into the cache: raw, or else from the Hub. A
    broken download goes on where it stopped. Raises DatasetError, which says what to do.
    """
    try:
        return _read_pinned(path)
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read, or there is nowhere to keep it ({error}). Set SML_DATA_DIR to a local copy; the "
            "generated tasks run without it."
        ) from error


def _read_pinned(path: str) -> bytes:
    pinned = FILES[path]
    if data_dir := os.environ.get("SML_DATA_DIR"):
        local = Path(data_dir) / path
        if not local.is_file():
            raise DatasetError(f"{local} does not exist; SML_DATA_DIR must hold {path}, or be unset to download it")
        return _checked(local.read_bytes(), pinned, str(local))
    for home in cache_homes():
        filled = home / "smlib" / path
        if os.path.isfile(filled):  # also in a folder that cannot be written
            return _checked(filled.read_bytes(), pinned, str(filled))
    cached = cache_folder() / path
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cached}.lock"):
        if not cached.is_file():
            _fetch(path, pinned, cached)
        return _checked(cached.read_bytes(), pinned, str(cached))


def _checked(raw: bytes, pinned: Pinned, where: str) -> bytes:
    digest = hashlib.sha256(raw).hexdigest()
    if digest != pinned.sha256:
        raise DatasetError(
            f"{where} has SHA-256 {digest} ({len(raw)} bytes), expected {pinned.sha256}: truncated or another "
            "version. Delete it and fetch it again, or point SML_DATA_DIR at an intact copy."
        )
    return raw


def _fetch(path: str, pinned: Pinned, cached: Path) -> None:
    """Put the checked file at `cached`. A broken download stays in a .part file, from which the next call goes on."""
    partial = cached.with_name(cached.name + ".part")
    try:
        _download(pinned.url, partial, path)
        origin = pinned.url
    except (OSError, HTTPException) as error:
        if pinned.hub is None:
            raise DatasetError(_unreachable(path, f"{pinned.url} failed ({error})")) from error
        origin = f"{pinned.hub[0]} on the Hub"
        try:
            partial.write_bytes(_from_hub(*pinned.hub))
        except OSError as second:
            failed = f"{pinned.url} failed ({error}), and so did {origin} ({second})"
            raise DatasetError(_unreachable(path, failed)) from second
    try:
        _checked(partial.read_bytes(), pinned, origin)
    except DatasetError:
        partial.unlink()
        raise
    partial.replace(cached)


def _unreachable(path: str, failed: str) -> str:
    return (
        f"{path}: download from {failed}. Try again later (the download resumes), or set SML_DATA_DIR to a local "
        "copy; the generated tasks run without it."
    )


def _download(url: str, partial: Path, label: str) -> None:
    """Append the missing bytes of url to `partial`."""
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=20)
    except HTTPError as error:
        if error.code == 416:  # nothing is missing: the last call was stopped between the last byte and the check
            return
        raise
    with reply:
        resumes = reply.status == 206
        length = int(reply.headers.get("Content-Length", 0)) + (have if resumes else 0)
        with (
            partial.open("ab" if resumes else "wb") as file,
            progress_bar(f"fetching {label}", length, "B", have if resumes else 0) as bar,
        ):
            while block := reply.read(1 << 16):
                file.write(block)
                bar.update(len(block))
        if length and partial.stat().st_size < length:
            raise OSError(f"connection closed after {partial.stat().st_size} of {length} bytes")


def _from_hub(repository: str, revision: str, file: str, raw_row: Callable[[dict], dict]) -> bytes:
    from datasets import Dataset
    from huggingface_hub import hf_hub_download

    fetched = hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    return "".join(json.dumps(raw_row(row)) + "\n" for row in Dataset.from_parquet(fetched)).encode()
