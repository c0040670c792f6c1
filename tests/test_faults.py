"""Kills, full disks, damage, two processes: what a stage leaves is whole, goes on to the same bytes, or is refused.

`make test-faults` breaks every stage at every one of its file operations; `make test` at a few of them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smlib.files.artifacts import StageError, require
from smlib.notebooks.runner import verify

SCRIPT = Path(__file__).with_name("faults.py")
STAGES = (
    "01_sampling", "02_ranking", "02_sft", "03_second_sampling", "03_reward_model", "04_ppo", "04_rloo", "04_grpo",
    "05_evaluation", "06_solutions", "06_selection", "06_rft", "06_exploration", "06_pit_report", "06_step_dpo",
    "06_outcome_dpo", "06_evaluation",
)  # fmt: skip
SOME = {"02_ranking": 7, "02_sft": 9, "04_ppo": 16, "06_exploration": 13}  # in the short form: every so many operations


def faults(*arguments):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """mode -> a run that nothing disturbed, made once."""
    folder, made = tmp_path_factory.mktemp("faults"), {}

    def make(mode):
        if mode not in made:
            made[mode] = folder / mode
            faults("calm", made[mode], mode)
        return made[mode]

    return make


@pytest.fixture(scope="module")
def killed(calm):
    """stage -> what was found, for those in SOME."""
    return faults("kill", calm("full"), "full", *(f"{stage}={every}" for stage, every in SOME.items()))


def check_kills(found, every):
    assert found["faults"] == []
    assert found["operations"] >= 8 and found["kills"] >= found["operations"] // every


@pytest.mark.slow
@pytest.mark.parametrize("stage", SOME)
def test_a_killed_stage_goes_on_to_the_same_bytes(killed, stage):
    check_kills(killed[stage], SOME[stage])


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_file_operation_a_stage_goes_on_to_the_same_bytes(calm, stage, mode):
    check_kills(faults("kill", calm(mode), mode, f"{stage}=1")[stage], 1)


def check_full_disk(calm, mode, stages, places, folder):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", folder], capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    subprocess.run(["umount", folder], check=True)
    for stage, found in faults("full", calm(mode), mode, folder, *(f"{stage}={places}" for stage in stages)).items():
        assert found["faults"] == [] and found["filled"] >= 1, stage


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_then_the_stage_goes_on(calm, tmp_path):
    check_full_disk(calm, "full", ["02_sft", "04_ppo"], 3, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("stage", STAGES)
def test_wherever_the_disk_is_full_a_stage_goes_on_to_the_same_bytes(calm, stage, mode, tmp_path):
    check_full_disk(calm, mode, [stage], 8, tmp_path)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_to_any_file_of_a_run_is_found_by_name(calm, damage, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(calm("full"), run)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 100
    assert verify(run) == 0
    for path in files:
        whole, stage = path.read_bytes(), path.relative_to(run).parts[0]
        damage(path)
        capsys.readouterr()
        found = verify(run)
        assert found == 1
        if path.name == "manifest.json" and damage is Path.unlink:  # then the stage is not finished
            assert f"{run / stage} is not finished" in capsys.readouterr().out
            with pytest.raises(StageError, match="is not finished: first run notebook"):
                require(run, stage)
        else:
            assert str(path) in capsys.readouterr().out
        if damage is not flip and path.name != "manifest.json":  # sizes are looked at without any reading
            with pytest.raises(StageError, match=path.name):
                require(run, stage)
        path.write_bytes(whole)
    assert verify(run) == 0


@pytest.mark.slow
def test_of_two_processes_one_makes_a_stage_and_nothing_is_damaged(calm, tmp_path):
    run = tmp_path / "run"
    *before, last = faults("together", run, "full", 0, 8)
    for code, error in (ended for both in before for ended in both):
        assert code == 0 or "another process " in error or "is complete" in error
    assert before and last == [[0, ""], [0, ""]] and verify(run) == 0
    for stage in ("01_sampling", "02_sft", "04_ppo", "05_evaluation"):
        one, other = (require(folder, stage).manifest["files"] for folder in (calm("full"), run))
        same = [name for name in one if not name.endswith((".csv", "state.json"))]  # which hold seconds
        assert {name: one[name] for name in same} == {name: other.get(name) for name in same}


@pytest.mark.slow
def test_of_two_processes_with_different_settings_one_is_refused(tmp_path):
    [ended] = faults("together", tmp_path / "run", "full", 1, 1)
    assert sorted(code for code, _ in ended) == [0, 1]
    (error,) = [error for code, error in ended if code]
    assert "another process " in error or "was made with seed = " in error or "is complete" in error
    assert verify(tmp_path / "run") == 0  # all of one seed
    seeds = {require(tmp_path / "run", stage).settings["seed"] for stage in STAGES[:6] + STAGES[8:9]}
    assert len(seeds) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_an_update_end_and_saves_it(calm, sent, code, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(calm("full"), run, ignore=shutil.ignore_patterns("04_*"))
    script = "import sys, faults; from smlib import cli; from smlib.ppo import loop\n"
    script += "loop.train.__kwdefaults__['checkpoint_every'] = 99\n"
    script += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "cli.preset = lambda *_, **__: faults.settings('full')\nsys.exit(cli.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[1]}:{SCRIPT.parent}"}
    command = [sys.executable, "-c", script, "stage", "04_ppo", "--preset", "smoke", "--out", str(run)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (run / "04_ppo" / "training" / "log.csv").exists():
            time.sleep(0.01)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == code and "Stopped. Run the same command again to resume." in errors
    assert list((run / "04_ppo" / "training").glob("checkpoint-*"))  # none would be due before the end
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights = [(folder / "04_ppo" / "model" / "model.safetensors").read_bytes() for folder in (calm("full"), run)]
    assert weights[0] == weights[1]
