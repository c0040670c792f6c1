"""Stages on disk: every arrow of the pipeline is a folder that a reader can open and a run can resume from.

A stage writes its data first and `manifest.json` last, each file in one atomic step. So a manifest means that
the stage is complete, and a killed run leaves either a whole file or none. The manifest has the size and the SHA-256 of
every file, and of every file of an earlier stage that was read: what was damaged, or made from what has been made again
since, is refused.

    stage = Stage(RUN_DIR, "02_ranking", {"seed": 0, "max_pairs": 8}, {sampling: ["rationales.jsonl"]})
    if not stage.done:
        with stage.recording():
            stage.write_rows("pairs", pairs)
    pairs = stage.read_rows("pairs")
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import ConfigDict, FiniteFloat
from typing_extensions import TypedDict

from smlib.errors import UserError
from smlib.files import atomic
from smlib.files.folders import checkout

try:
    import resource
except ModuleNotFoundError:  # on Windows
    resource = None

MANIFEST = "manifest.json"
UNFINISHED = "unfinished.json"  # what a stage that has begun and not ended was asked to do
LESS_MEMORY = (
    "Lower hardware.max_batch or hardware.cache_tokens (sampling) or hardware.micro_batch (training), set "
    "hardware.gradient_checkpointing = True, or begin another run with hardware.dtype = 'bfloat16' or 'nf4'."
)
ONE_RUN = ("seed", "tasks", "base", "base_sha256")  # equal in all stages of a run that have them
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets")


class StageError(UserError, RuntimeError):
    """A stage that is missing, damaged or could not be written; the message names the way out."""


class StageMismatch(StageError):
    """The folder holds a stage that was made with other settings, another seed or other inputs."""


class _Asked(TypedDict):
    """What a stage is asked to do: unfinished.json."""

    __pydantic_config__ = ConfigDict(extra="allow")
    settings: dict
    inputs: dict[str, dict[str, str]]  # stage -> file that is read of it -> SHA-256


class Manifest(_Asked):
    """What a finished stage has recorded; what is not named here is for the reader."""

    counts: dict[str, int]
    files: dict[str, atomic.FileRecord]
    wall_seconds: FiniteFloat
    digest: str  # of all else that is in it


class _Kept(TypedDict):
    digest: str
    value: dict


class Stage:
    """One stage folder, `run_dir/name`, with everything that decides its contents.

    settings: what the result depends on, the seed included, as plain JSON values or dataclasses.
    inputs: the finished stages that this one reads, each with the files or folders that it reads of it.
    """

    def __init__(
        self, run_dir: str | Path, name: str, settings: dict, inputs: Mapping["Stage", Iterable[str]] | None = None
    ):
        self.name = name
        self.folder = Path(run_dir) / name
        self.settings = json.loads(_dumps(settings))  # as it comes back from disk: tuples become lists
        self.inputs = {stage.name: stage.hashes(names) for stage, names in (inputs or {}).items()}
        for stage in inputs or {}:
            self._refuse_another_run(stage)

    @property
    def fingerprint(self) -> str:
        """A short hash of the settings and of what is read: the same on every machine and day for the same files."""
        return _digest([self.name, self.settings, self.inputs])[:16]

    @property
    def done(self) -> bool:
        """True: complete, read it. False: make it.

        StageMismatch: the folder belongs to other settings or inputs. StageError: it is damaged, as far as the sizes of
        its files tell; their contents are checked where they are read.
        """
        for found in (_recorded(self.folder / UNFINISHED, _Asked), manifest := self.manifest):
            if found:
                refuse_difference(self.folder, _flat(self.settings), _flat(found["settings"]), "RUN_DIR")
                _refuse_other_inputs(self.folder, self.inputs, found["inputs"])
        if manifest:
            self._check(manifest["files"], contents=False)
            with suppress(OSError):  # a kill between the two last steps of a stage leaves it
                (self.folder / UNFINISHED).unlink()
        return bool(manifest)

    @property
    def manifest(self) -> Manifest | None:
        """What a finished stage recorded: settings, versions, counts, files, wall_seconds, peak_mib; else None."""
        return _read_manifest(self.folder)

    def _refuse_another_run(self, stage: "Stage") -> None:
        """Raise StageMismatch where an input is of another seed, base or task: what hashes of files do not say."""
        for key in ONE_RUN:
            ours, theirs = self.settings.get(key), stage.settings.get(key)
            if key in self.settings and key in stage.settings and ours != theirs:
                raise StageMismatch(
                    f"{self.folder} would be made with {key} = {ours!r}, but {stage.folder}, which it reads, has "
                    f"{key} = {theirs!r}: choose another RUN_DIR, or the same {key}"
                )

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """File -> SHA-256 of these files and folders, by the manifest."""
        manifest = self.manifest
        return {file: record["sha256"] for name in names for file, record in self._records(manifest, name).items()}

    @contextmanager
    def recording(self) -> Iterator["Stage"]:
        """Measure the block that makes the stage; a clean exit writes the manifest, an error leaves none.

        One process at a time: BusyError where another is recording this stage. Files of a stage that was cut off stay,
        so that a trainer can go on from its checkpoint (wall_seconds is then that of the last part). peak_mib is this
        process's high-water mark, earlier work included.
        """
        with atomic.locked(self.folder.parent / ".locks" / f"{self.name}.lock", f"making {self.folder}"):
            if self.done:
                raise StageError(
                    f"{self.folder} is complete (another process may just have made it): run the same command again "
                    "to read it, or delete the folder to make it again"
                )
            for tmp in [*self.folder.rglob("*.tmp")]:  # left by a killed run
                atomic.remove(tmp)
            self._refuse_unknown()
            self.write_json(UNFINISHED, {"settings": self.settings, "inputs": self.inputs})
            started = time.perf_counter()
            try:
                yield self
            except BaseException as error:
                if [path.name for path in self.folder.iterdir()] == [UNFINISHED]:  # nothing was made, nothing stays
                    atomic.remove(self.folder)
                if type(error).__name__ == "OutOfMemoryError":  # torch's; importing it takes seconds
                    raise StageError(f"{self.folder}: the GPU's memory ran out. {LESS_MEMORY}") from error
                if atomic.is_full(error) and not isinstance(error, atomic.DiskFullError):
                    raise atomic.DiskFullError(atomic.explain(error, self.folder)) from error
                raise
            self._finish(time.perf_counter() - started)

    def _refuse_unknown(self) -> None:
        """Raise StageError where files are there and nothing says what they were made with: they may be of others."""
        there = sorted(self.folder.glob("[!.]*"))
        if there and self.folder / UNFINISHED not in there:
            raise StageError(
                f"{self.folder} holds {there[0].name!r}, and neither {MANIFEST} nor {UNFINISHED} says what it was made "
                f"with: choose another RUN_DIR, or delete the folder {self.folder}"
            )

    def _finish(self, seconds: float) -> None:
        files = {
            name: record for name, record in atomic.file_records(self.folder).items() if Path(name).name != UNFINISHED
        }
        manifest = {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "code": code_version(),
            "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
            "counts": {
                Path(name).stem: (self.folder / name).read_bytes().count(b"\n")
                for name in files
                if name.endswith(".jsonl")
            },
            "files": files,
            "wall_seconds": round(seconds, 2),
            "peak_mib": round(peak_mib()),
        }
        self.write_json(MANIFEST, manifest | {"digest": _digest(manifest)})
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Path of a file or folder of this stage; in a finished stage its contents are checked by SHA-256."""
        if manifest := self.manifest:
            self._verify(manifest, name)
        return self.folder / name

    def verify(self) -> None:
        """Read every file of a finished stage, and raise StageError for the first that is not as it was written."""
        require(self.folder.parent, self.name)
        for earlier in self.inputs:
            if not (self.folder.parent / earlier / MANIFEST).exists():
                raise StageError(f"{self.folder} was made from {earlier}, which no longer exists")
        manifest = self.manifest
        for name in sorted({file.split("/")[0] for file in manifest["files"]}):
            self._verify(manifest, name)

    def _verify(self, manifest: Manifest, name: str) -> None:
        """Raise StageError where a file, or a folder, is not as it was written, or holds a file that was not there."""
        records = self._records(manifest, name)
        self._check(records, contents=True)
        there = {file.relative_to(self.folder).as_posix() for file in (self.folder / name).rglob("[!.]*")}
        if strays := [file for file in sorted(there - set(records)) if (self.folder / file).is_file()]:
            raise StageError(f"{self.folder / strays[0]} does not belong to this stage: move it elsewhere")

    def _records(self, manifest: Manifest | None, name: str) -> dict[str, atomic.FileRecord]:
        """The record of a file, or of the files in a folder."""
        files = manifest["files"] if manifest else {}
        if not (found := {file: record for file, record in files.items() if f"{file}/".startswith(f"{name}/")}):
            raise StageError(f"{self.folder} has no {name!r}; it has: {', '.join(files)}")
        return found

    def _check(self, files: dict[str, atomic.FileRecord], contents: bool) -> None:
        for name, record in files.items():
            file = self.folder / name
            whole = file.is_file() and file.stat().st_size == record["bytes"]
            if not whole or (contents and atomic.sha256(file) != record["sha256"]):
                raise StageError(
                    f"{file} is missing, cut short or was edited after it was written: delete the folder "
                    f"{self.folder} and run notebook {self.name[:2]} again"
                )

    def write_rows(self, name: str, rows: Iterable) -> None:
        """Write rows to `name`.jsonl, one a line, whole or not at all: dicts, or dataclasses, whose `as_row` says what
        is written of them, or all their fields where they have none."""
        atomic.write_text(self.folder / f"{name}.jsonl", "".join(_dumps(row) + "\n" for row in rows))

    def read_rows(self, name: str, shape: type = dict[str, object]) -> list:
        """The rows of `name`.jsonl in the order written, each a dict or of another shape, as `atomic.load_jsonl` takes
        it. Raises DamagedError for a row of another shape, by the name of the key."""
        return atomic.load_jsonl(self.path(f"{name}.jsonl"), shape)

    def write_json(self, name: str, value) -> None:
        atomic.write_text(self.folder / name, _dumps(value, indent=1) + "\n")

    def read_json(self, name: str):
        return atomic.load_json(self.path(name), object)

    def kept(self, name: str, make: Callable[[], dict]) -> dict:
        """What `make` gives, or gave before this unfinished stage was cut off: kept in the file `name`, with a hash.

        A damaged file is made again.
        """
        with suppress(atomic.DamagedError):
            found = atomic.load_json(self.folder / name, _Kept)
            if found and found["digest"] == _digest(found["value"]):
                return found["value"]
        value = json.loads(_dumps(make()))
        self.write_json(name, {"digest": _digest(value), "value": value})
        return value

    def write_model(self, name: str, *parts) -> Path:
        """Save a model, and its tokenizer, into a folder: `stage.write_model("model", model, tokenizer)`."""
        with atomic.replacing(self.folder / name) as tmp:
            for part in parts:
                part.save_pretrained(tmp)
        return self.folder / name


def require(run_dir: str | Path, name: str) -> Stage:
    """The finished stage `name` of a run; where it is not on disk, an error names the notebook to run.

    Raises StageMismatch where it, or one that it was made from, was made from what has been made again since.
    """
    folder = Path(run_dir) / name
    if not (found := _read_manifest(folder)):
        state = "is not finished" if folder.exists() else "does not exist"
        notebook = f"notebook {name[:2]} (notebooks/{name[:2]}_*.ipynb)"
        raise StageError(f"{folder} {state}: first run {notebook} with the same RUN_DIR")
    stage = Stage(run_dir, name, found["settings"])
    stage.inputs = found["inputs"]
    for earlier, files in stage.inputs.items():
        if (Path(run_dir) / earlier / MANIFEST).exists():  # else it was deleted, to save room
            there = require(run_dir, earlier).manifest["files"]
            now = {file: there[file]["sha256"] for file in files if file in there}
            _refuse_other_inputs(folder, {earlier: now}, {earlier: files})
    stage._check(found["files"], contents=False)
    return stage


def lineage(stage: Stage) -> dict[str, object]:
    """Everything that decided a finished stage: {"02_sft: sft.epochs": 1.0, ...} of it and of all that it was made
    from, the earliest first. Raises StageError where one of these is not there any more."""
    found = {}
    for earlier in stage.inputs:
        found |= lineage(require(stage.folder.parent, earlier))
    return found | {f"{stage.name}: {key}": value for key, value in _flat(stage.settings).items()}


def refuse_difference(folder: Path, ours: dict, theirs: dict, place: str) -> None:
    """Raise StageMismatch for the first key in which what made `folder` (theirs) is not what is asked for (ours).

    place: what the reader can choose another of.
    """
    for key in ours | theirs:
        mine, other = ours.get(key, "(not set)"), theirs.get(key, "(not set)")
        if mine != other:
            raise StageMismatch(
                f"{folder} was made with {key} = {other!r}, and now {key} = {mine!r} is "
                f"asked for: choose another {place}, or delete the folder {folder}"
            )


def _refuse_other_inputs(folder: Path, ours: dict, theirs: dict) -> None:
    """Raise StageMismatch for the first file that `folder` was made from (theirs) and that is now another (ours)."""
    was = {f"{stage}/{file}": digest for stage, files in theirs.items() for file, digest in files.items()}
    now = {f"{stage}/{file}": digest for stage, files in ours.items() for file, digest in files.items()}
    for file in was | now:
        if was.get(file) != now.get(file):
            raise StageMismatch(
                f"{folder} was made from another {file} than there is now (SHA-256 {was.get(file, 'none')[:12]}, now "
                f"{now.get(file, 'none')[:12]}), as {file.split('/')[0]} was made again since: delete the folder "
                f"{folder} to make it again too, or choose another RUN_DIR"
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
    root, commit = checkout(), ""
    if root and shutil.which("git"):
        git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return version("smlib") + f"+{commit}" * bool(commit)


def _as_dict(value) -> dict:
    return value.as_row() if hasattr(value, "as_row") else dataclasses.asdict(value)


# NaN and infinity are not JSON, and in a result they are a fault that should not travel on
_FORMAT = {"ensure_ascii": False, "allow_nan": False, "default": _as_dict}


def _dumps(value, **options) -> str:
    return json.dumps(value, **_FORMAT, **options)


def _recorded(path: Path, shape: type):
    """What a stage has written of itself, or None where there is no file."""
    try:
        return atomic.load_json(path, shape)
    except atomic.DamagedError as error:
        raise StageError(
            f"{error} (or another version of smlib wrote it): delete the folder {path.parent}, and make that stage "
            "again"
        ) from error


def _read_manifest(folder: Path) -> Manifest | None:
    found = _recorded(folder / MANIFEST, Manifest)
    if found and found["digest"] != _digest({key: value for key, value in found.items() if key != "digest"}):
        raise StageError(
            f"{folder / MANIFEST} was edited or damaged after it was written: delete the folder {folder}, and make "
            "that stage again"
        )
    return found


def _digest(value) -> str:
    return atomic.json_sha256(value, **_FORMAT, sort_keys=True)


def _flat(values: dict, prefix: str = "") -> dict:
    """{"ppo.epochs": 4, ...} from nested dicts."""
    flat = {}
    for key, item in values.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat
