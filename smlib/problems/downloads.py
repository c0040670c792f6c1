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


# Kojima et al. (2205.11916) collected ten of the sets; the SHA-256 pins the content, whatever a branch holds later.
_KOJIMA = "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset/"
_GSM8K = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
_PRM800K = "https://github.com/openai/prm800k/raw/00811d6de065642a6967b9017d4cee59550c0ef4/prm800k/math_splits/"
_EXEMPLARS = "https://raw.githubusercontent.com/itsnamgyu/reasoning-teacher/f8471666e5889e517c3bed04f9b346a1e6b8929b/"
_GSM8K_HUB = ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866")
_COMMONSENSE_QA_HUB = ("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155")
_AQUA = "https://raw.githubusercontent.com/google-deepmind/AQuA/6e99097ff2e05b406f4ddca8cbf25e7e9efb7cb5/"
_AQUA_HUB = ("deepmind/aqua_rat", "33301c6a050c96af81f63cad5562cb5363e88971")
_aqua_row = _in_order("question", "options", "rationale", "correct")

# Path below SML_DATA_DIR and below the cache -> what it must be and where it comes from.
FILES = {
    "gsm8k/train.jsonl": Pinned(
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        _GSM8K + "train.jsonl",
        (*_GSM8K_HUB, "main/train-00000-of-00001.parquet", _in_order("question", "answer")),
    ),
    "gsm8k/test.jsonl": Pinned(
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        _GSM8K + "test.jsonl",
        (*_GSM8K_HUB, "main/test-00000-of-00001.parquet", _in_order("question", "answer")),
    ),
    "CommonsenseQA/train_rand_split.jsonl": Pinned(
        "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
        _KOJIMA + "CommonsenseQA/train_rand_split.jsonl",
        (*_COMMONSENSE_QA_HUB, "data/train-00000-of-00001.parquet", _commonsense_qa_row),
    ),
    "CommonsenseQA/dev_rand_split.jsonl": Pinned(
        "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
        _KOJIMA + "CommonsenseQA/dev_rand_split.jsonl",
        (*_COMMONSENSE_QA_HUB, "data/validation-00000-of-00001.parquet", _commonsense_qa_row),
    ),
    # The SHA-256 that the Hub's own loader of this set recorded; beside it stood the one of test.json below.
    "AQuA/train.json": Pinned(
        "35b70c7cb1660c34d302bb932dfd3656ce3d05e8c982c797767fec31d7d1e0ba",
        _AQUA + "train.json",
        (*_AQUA_HUB, "raw/train-00000-of-00001.parquet", _aqua_row),
    ),
    "AQuA/test.json": Pinned(
        "de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c",
        _KOJIMA + "AQuA/test.json",
        (*_AQUA_HUB, "raw/test-00000-of-00001.parquet", _aqua_row),
    ),
    "SingleEq/questions.json": Pinned(
        "051507bd2b489c257057b485774a83d2710c23a4bc0f4a58e1822ae2773ef05e",
        _KOJIMA + "SingleEq/questions.json",
    ),
    "AddSub/AddSub.json": Pinned(
        "21930fa90385c72b5a15f4b9a4dda27276b889ae9ff44285505cdd9fa0a20df8",
        _KOJIMA + "AddSub/AddSub.json",
    ),
    "MultiArith/MultiArith.json": Pinned(
        "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
        _KOJIMA + "MultiArith/MultiArith.json",
    ),
    "SVAMP/SVAMP.json": Pinned(
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
        _KOJIMA + "SVAMP/SVAMP.json",
    ),
    "StrategyQA/task.json": Pinned(
        "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
        _KOJIMA + "StrategyQA/task.json",
    ),
    "Bigbench_Date/task.json": Pinned(
        "ff716f0e399109146db3a998281c39954907b78268a9b633a95582d63847822f",
        _KOJIMA + "Bigbench_Date/task.json",
    ),
    "Bigbench_object_tracking/task.json": Pinned(
        "74b74d3c8827c0387a3f24ee9efa7edd90b2d53af3daacb9961341af66f750a0",
        _KOJIMA + "Bigbench_object_tracking/task.json",
    ),
    "last_letters/last_letters.json": Pinned(
        "60e8d092d0a6423d3256e87e0c249b69aefea4cd27985082095fa4e93931fb02",
        _KOJIMA + "last_letters/last_letters.json",
    ),
    "coin_flip/coin_flip.json": Pinned(
        "68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a",
        _KOJIMA + "coin_flip/coin_flip.json",
    ),
    "math/train.jsonl": Pinned(
        "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076",
        _PRM800K + "train.jsonl",
    ),
    "math/test.jsonl": Pinned(
        "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
        _PRM800K + "test.jsonl",
    ),
    "few_shot_cot_prompts.json": Pinned(
        "72bb973daf1ab1217ec5bc1cc95a8be8ab78d05ff42356a3176341d848956d19",
        _EXEMPLARS + "data/few_shot_cot_prompts.json",
    ),
}


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
            raise DatasetError(f"{local} is not there; SML_DATA_DIR must hold {path}, or be unset to download.")
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
        f"{path}: download from {failed}. Try again later (it goes on where it stopped), or set SML_DATA_DIR to a "
        "local copy; the generated tasks run without it."
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
