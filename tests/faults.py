"""Break a stage while it is made, and look at what is left: run by tests/test_faults.py in a process of its own.

    python tests/faults.py calm FOLDER full            make all stages, undisturbed
    python tests/faults.py kill FOLDER full 04_ppo=5   kill -9 before every fifth of its file operations, go on, compare

To start takes longer than to make a stage: one process takes several stages, as 02_sft=6 04_ppo=11.

The process that forks computes nothing itself, so that its children may use torch; each child makes one stage.
"""

import csv
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

from smlib.ppo import loop, rloo_grpo
from smlib.runs import self_explore, self_motivated
from smlib.runs.settings import Settings, preset

for trainer in (loop, rloo_grpo):
    trainer.train.__kwdefaults__["checkpoint_every"] = 1  # so that there are checkpoints to be killed amid
self_explore.SHARD = 8

POLICIES = {f"04_{name}": partial(self_motivated.train_policy, method=name) for name in ("rloo", "grpo")}
STAGES = self_motivated.STAGES | POLICIES | self_explore.STAGES
# of a checkpoint or stage, with times and paths in them: they differ in every run
OWN = ("state.json", "smlib.json", "trainer_state.json", "training_args.bin", "manifest.json")


def settings(mode: str) -> Settings:
    """A few questions of one task; mode "full" trains all weights, "lora" adapters."""
    rates = {"sft": {"epochs": 2.0, "batch": 8}, "reward": {"questions": 8, "epochs": 1.0, "batch": 8}}
    return preset(
        "smoke", "coin_flip", **rates,
        sampling={"questions": 10, "samples": 4, "conditioned_questions": 4, "max_new_tokens": 60},
        ppo={"updates": 3, "episodes": 8, "samples_per_question": 4, "minibatch": 4, "max_new_tokens": 40},
        evaluation={"questions": 4, "samples": 2, "published": 0}, explore={"samples": 4, "k": 1},
        lora={"rank": 2 if mode == "lora" else 0},
    )  # fmt: skip


def attempt(run: Path, mode: str, stage: str, hook=None, seconds: float | None = None) -> tuple[int, str]:
    """Make the stage in a child; its exit code (or minus a signal) and what it printed of an error.

    hook: an audit hook of the child's. seconds: it is killed after so many.
    """
    report = run.with_name(f"{run.name}.error")
    report.unlink(missing_ok=True)
    if not (child := os.fork()):
        try:
            if hook:
                sys.addaudithook(hook)
            STAGES[stage](run, settings(mode), progress=False)
            os._exit(0)
        except BaseException as error:
            report.write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, report.read_text() if report.exists() else ""


class FileOperations:
    """An audit hook that counts what changes files below a folder, and kills its process before operation `kill_at`."""

    def __init__(self, folder: Path, kill_at: int | None = None):
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if self._changes(event, arguments):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            if self.kill_at is None:
                Path(f"{self.folder}.count").write_text(str(self.count))

    def _changes(self, event: str, arguments: tuple) -> bool:
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # of shutil.rmtree, which names files by their folder's descriptor
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            return str(arguments[0]).startswith(f"{self.folder}/")
        if event == "open" and str(arguments[0]).startswith(f"{self.folder}/"):
            return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        return False


def without(calm: Path, stage: str, folder: Path) -> Path:
    """A copy of a run without one stage."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(calm, folder, ignore=shutil.ignore_patterns(stage, ".locks"))
    return folder


def contents(folder: Path) -> dict[str, object]:
    """File -> its bytes; of a log.csv the columns that are no seconds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "log.csv":
            rows = list(csv.DictReader(path.open(encoding="utf-8")))
            found[str(path.relative_to(folder))] = [
                {key: value for key, value in row.items() if "seconds" not in key} for row in rows
            ]
        elif path.is_file() and path.name not in OWN:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def difference(calm: Path, run: Path, stage: str) -> str:
    one, other = contents(calm / stage), contents(run / stage)
    different = [name for name in one | other if one.get(name) != other.get(name)]
    return f"{stage}: {', '.join(different)} differ from an undisturbed run" if different else ""


def goes_on(calm: Path, run: Path, mode: str, stage: str) -> str:
    """Make the stage again after a fault; what is wrong, or ""."""
    code, error = attempt(run, mode, stage)
    return f"the next attempt ended with {code}: {error}" if code else difference(calm, run, stage)


def make_calm(run: Path, mode: str) -> None:
    for stage in STAGES:
        code, error = attempt(run, mode, stage)
        if code:
            sys.exit(f"{stage}: {code} {error}")


def kill(calm: Path, mode: str, stage: str, every: int) -> dict:
    """kill -9 before every `every`-th file operation of a stage, and at a quarter as many moments; then go on."""
    run = without(calm, stage, calm.with_name(f"{calm.name}-{stage}"))
    started = time.monotonic()
    code, error = attempt(run, mode, stage, FileOperations(run))
    seconds, operations = time.monotonic() - started, int(Path(f"{run}.count").read_text())
    faults, kills = [f"undisturbed: {code} {error}"] * bool(code), 0
    moments = random.Random(stage)
    for number in range(0, operations, every):
        at_random = [{"seconds": moments.uniform(0, seconds)}] * (number // every % 4 == 0)
        for how in [{"hook": FileOperations(run, number)}, *at_random]:
            run = without(calm, stage, run)
            code, error = attempt(run, mode, stage, **how)
            kills += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL) or ("hook" in how and code == 0):
                faults.append(f"operation {number}: ended with {code} {error}")
            elif wrong := goes_on(calm, run, mode, stage):
                faults.append(f"operation {number}, {how}: {wrong}")
    shutil.rmtree(run)
    return {"operations": operations, "kills": kills, "faults": faults}


def full(calm: Path, mode: str, stage: str, mount: Path, places: int) -> dict:
    """Make the stage on a small file system that is full at `places` points; then there is room, and it goes on."""
    needed = sum(path.stat().st_size for path in (calm / stage).rglob("*") if path.is_file())
    faults, filled = [], 0
    for number in range(places):
        _system(f"mount -t tmpfs -o size=1G none {mount}")
        try:
            run = without(calm, stage, mount / "run")
            held = shutil.disk_usage(mount).used
            _system(f"mount -o remount,size={held + 4096 + needed * number // places} {mount}")
            code, error = attempt(run, mode, stage)
            filled += code == 1
            if code and not error.startswith("DiskFullError: No space left on the disk to write"):
                faults.append(f"{number}: {code} {error}")
            if code and (run / stage / "manifest.json").exists():
                faults.append(f"{number}: a manifest in spite of the error")
            _system(f"mount -o remount,size=1G {mount}")
            if wrong := goes_on(calm, run, mode, stage):
                faults.append(f"{number}: {wrong}")
        finally:
            _system(f"umount {mount}")
    return {"filled": filled, "faults": faults}


def _system(command: str) -> None:
    subprocess.run(command.split(), check=True)


def together(run: Path, first: dict, second: dict) -> list[tuple[int, str]]:
    """Two processes make the stages 01 to 05 in the same folder at the same time; changes of their settings."""
    children = []
    for number, changes in enumerate((first, second)):
        report = run.with_name(f"{run.name}.{number}.error")
        report.write_text("")
        if not (child := os.fork()):
            try:
                self_motivated.run(run, replace(settings("full"), **changes), progress=False)
                os._exit(0)
            except BaseException as error:
                report.write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
        children.append((child, report))
    return [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), report.read_text()) for child, report in children]


def until_done(run: Path, first: dict, second: dict, rounds: int) -> list[list[tuple[int, str]]]:
    """`together` again and again, as each time at least one gets further: how they ended, round by round."""
    ended = []
    while len(ended) < rounds and (not ended or any(code for code, _ in ended[-1])):
        ended.append(together(run, first, second))
    return ended


if __name__ == "__main__":
    gc.freeze()  # else every child looks through all that is imported, whenever a stage frees its model
    what, folder, mode, *rest = sys.argv[1:]
    run, stages = (
        Path(folder),
        {name: int(number) for name, number in (part.split("=") for part in rest if "=" in part)},
    )
    if what == "calm":
        make_calm(run, mode)
    elif what == "kill":
        print(json.dumps({stage: kill(run, mode, stage, every) for stage, every in stages.items()}))
    elif what == "full":
        print(json.dumps({stage: full(run, mode, stage, Path(rest[0]), places) for stage, places in stages.items()}))
    elif what == "together":
        print(json.dumps(until_done(run, {}, {"seed": int(rest[0])}, int(rest[1]))))
