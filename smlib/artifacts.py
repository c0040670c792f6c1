"""Stages on disk: every arrow of the pipeline is a folder that a reader can open and a run can resume from.

A stage writes its data first and `manifest.json` last, each file in one atomic step. So a manifest means that
the stage is complete, and a killed run leaves either a whole file or none.

    stage = Stage(RUN_DIR, "02_ranking", {"seed": 0, "max_pairs": 8}, inputs=[sampling])
    if not stage.done:
        with stage.recording():
            stage.write_rows("pairs", pairs)
    pairs = stage.read_rows("pairs")
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil

from smlib.errors import UserError

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # what a stage that has begun and not ended was asked to do
LESS_MEMORY = (
    "Lower hardware.rollout_rows or hardware.cache_tokens (sampling) or hardware.micro_batch (training), set "
    "hardware.recompute = True, or begin another run with hardware.weights = 'bfloat16' or 'nf4'."
)
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")


class StageError(UserError, RuntimeError):
    """A stage that is missing, damaged or could not be written; the message names the way out."""


class StageMismatch(StageError):
    """The folder holds a stage that was made with other settings, another seed or other inputs."""


class Stage:
    """One stage folder, `run_dir/name`, with everything that decides its contents.

    settings: what the result depends on, the seed included, as plain JSON values or dataclasses.
    inputs: the finished stages that this one reads.
    """

    def __init__(self, run_dir: str | Path, name: str, settings: dict, inputs: Sequence["Stage"] = ()):
        self.name = name
        self.folder = Path(run_dir) / name
        self.settings = json.loads(_dumps(settings))  # as it comes back from disk: tuples become lists
        self.inputs = {stage.name: stage.fingerprint for stage in inputs}

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings and of the inputs' fingerprints: the same on every machine and day."""
        text = _dumps([self.name, self.settings, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def done(self) -> bool:
        """True: complete, read it. False: make it. StageMismatch: the folder belongs to other settings."""
        for file in (UNFINISHED, MANIFEST):
            if found := _load(self.folder / file):
                # inputs come second: a setting that differs is named before a fingerprint that does
                ours = _flat(self.settings) | _flat(self.inputs)
                theirs = _flat(found["settings"]) | _flat(found["inputs"])
                refuse_difference(self.folder, ours, theirs, "RUN_DIR")
        return bool(found)

    @property
    def manifest(self) -> dict:
        """What a finished stage recorded: settings, versions, counts, files, wall_seconds, peak_mib."""
        return _load(self.folder / MANIFEST) or {}

    @contextmanager
    def recording(self) -> Iterator["Stage"]:
        """Measure the block that makes the stage; a clean exit writes the manifest, an error leaves none.

        Files of a stage that was cut off stay, so that a trainer can go on from its checkpoint (wall_seconds
        is then that of the last part). peak_mib is this process's high-water mark, earlier work included.
        """
        if self.done:
            raise StageError(f"{self.folder} is complete: read it, or delete the folder to make it again.")
        for tmp in self.folder.glob("*.tmp"):  # left by a killed run
            _remove(tmp)
        self.write_json(UNFINISHED, {"settings": self.settings, "inputs": self.inputs})
        started = time.perf_counter()
        try:
            yield self
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it takes seconds
                raise StageError(f"{self.folder}: the GPU's memory ran out. {LESS_MEMORY}") from error
            raise
        seconds = time.perf_counter() - started
        (self.folder / UNFINISHED).unlink()
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        manifest = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "code": code_version(),
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
            "counts": {f.stem: f.read_bytes().count(b"\n") for f in files if f.suffix == ".jsonl"},
            "files": {f.relative_to(self.folder).as_posix(): _sha256(f) for f in files},
            "wall_seconds": round(seconds, 2),
            "peak_mib": round(peak_mib()),
        }
        self.write_json(MANIFEST, manifest)

    def path(self, name: str) -> Path:
        """Path of a file or folder of this stage; in a finished stage its contents are checked by SHA-256."""
        if files := self.manifest.get("files"):
            wanted = [file for file in files if file == name or file.startswith(f"{name}/")]
            if not wanted:
                raise StageError(f"{self.folder} has no {name!r}; it has: {', '.join(files)}.")
            for file in (self.folder / file for file in wanted):
                if not file.exists() or _sha256(file) != files[file.relative_to(self.folder).as_posix()]:
                    raise StageError(
                        f"{file} is missing, cut short or was edited after it was written: delete the folder "
                        f"{self.folder} and run notebook {self.name[:2]} again."
                    )
        return self.folder / name

    def write_rows(self, name: str, rows: Iterable) -> None:
        """Write rows (dicts or dataclasses) to `name`.jsonl, one a line, whole or not at all."""
        with replacing(self.folder / f"{name}.jsonl") as tmp, tmp.open("w", encoding="utf-8") as file:
            file.writelines(_dumps(row) + "\n" for row in rows)

    def read_rows(self, name: str) -> list[dict]:
        """The rows of `name`.jsonl as dicts, in the order written."""
        with self.path(f"{name}.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write_json(self, name: str, value) -> None:
        with replacing(self.folder / name) as tmp:
            tmp.write_text(_dumps(value, indent=1) + "\n", encoding="utf-8")

    def read_json(self, name: str):
        return _load(self.path(name))

    def write_model(self, name: str, *parts) -> Path:
        """Save a model, and its tokenizer, into a folder: `stage.write_model("model", model, tokenizer)`."""
        with replacing(self.folder / name) as tmp:
            for part in parts:
                part.save_pretrained(tmp)
        return self.folder / name


def require(run_dir: str | Path, name: str) -> Stage:
    """The finished stage `name` of a run; where it is not on disk, an error names the notebook to run."""
    folder = Path(run_dir) / name
    if not (found := _load(folder / MANIFEST)):
        state = "is not finished" if folder.exists() else "does not exist"
        notebook = f"notebook {name[:2]} (notebooks/{name[:2]}_*.ipynb)"
        raise StageError(f"{folder} {state}: first run {notebook} with the same RUN_DIR.")
    stage = Stage(run_dir, name, found["settings"])
    stage.inputs = found["inputs"]
    return stage


def refuse_difference(folder: Path, ours: dict, theirs: dict, place: str) -> None:
    """Raise StageMismatch for the first key in which what made `folder` (theirs) is not what is asked for (ours).

    place: what the reader can choose another of.
    """
    for key in ours | theirs:
        mine, other = ours.get(key, "(not set)"), theirs.get(key, "(not set)")
        if mine != other:
            raise StageMismatch(
                f"{folder} was made with {key} = {other!r}, and now {key} = {mine!r} is "
                f"asked for: choose another {place}, or delete the folder {folder}."
            )


def peak_mib() -> float:
    """The most memory this process has held so far (resident set), in MiB."""
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 2**20  # elsewhere what it holds now
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB


def code_version() -> str:
    """Package version and, in a git checkout, its commit: "0.1.0+1a2b3c4d5e6f-dirty"."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return version("smlib") + f"+{commit}" * bool(commit)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path that takes target's place if the block ends well, and is removed if not."""
    tmp = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        for path in [tmp, *tmp.rglob("*")]:
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())  # the contents are on the disk before the name is
        if target.is_dir():
            _remove(target)
        os.replace(tmp, target)
    except BaseException as error:
        _remove(tmp)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            raise StageError(
                f"No space left on the disk to write {target}: free some space, or choose another RUN_DIR; "
                "no half-written file was left behind."
            ) from error
        raise


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _dumps(value, **kwargs) -> str:
    # NaN and infinity are not JSON, and in a result they are a fault that should not travel on
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=dataclasses.asdict, **kwargs)


def _load(path: Path):
    """The JSON value in a file, or None where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise StageError(f"{path} is not valid JSON ({error}): delete the folder {path.parent}.") from error


def _flat(values: dict, prefix: str = "") -> dict:
    """{"ppo.epochs": 4, ...} from nested dicts."""
    flat = {}
    for key, item in values.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
