"""Checkpoints: whole or not there, verified when they are read, and refused in one sentence where they are damaged."""

import json
import shutil
from dataclasses import replace

import pytest
import test_ppo
import test_rloo_grpo
import torch
from safetensors import SafetensorError
from test_ppo import QUICK, Killed, dies_at, same_weights, without_times

from smlib.files import checkpoints
from smlib.files.artifacts import StageError
from smlib.files.atomic import DiskFullError
from smlib.ppo import rloo_grpo, state

STATE_FILES = {"ppo": state.STATE_FILE, "rloo": rloo_grpo.STATE_FILE, "grpo": rloo_grpo.STATE_FILE}
SHORT = replace(QUICK, updates=1, warmup_updates=0)


def run(method, out, plan=SHORT, **options):
    """A short training -> (rows, what was trained)."""
    if method == "ppo":
        return test_ppo.run(out, plan, **options)
    return test_rloo_grpo.run(method, out, plan, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """method -> a finished training's folder."""
    out = tmp_path_factory.mktemp("trained")
    for method in STATE_FILES:
        run(method, out / method)
    return {method: out / method for method in STATE_FILES}


@pytest.fixture(scope="module")
def read_back(trained):
    """method -> (rows, what was trained), from the finished training's folder."""
    return {method: run(method, trained[method]) for method in STATE_FILES}


def cut(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


def flip(folder, name):
    found = bytearray((folder / name).read_bytes())
    found[-1] ^= 1
    (folder / name).write_bytes(found)


def write(text):
    return lambda folder, name: (folder / name).write_text(text)


def edit(folder, name):
    """Another state, of the right shape."""
    saved = json.loads((folder / name).read_text())
    saved["state"]["update"] = 0
    (folder / name).write_text(json.dumps(saved))


def remove(folder, name):
    (folder / name).unlink()


FILES = [
    *(("ppo", name) for name in ("weights.safetensors", "optimizer.safetensors", state.STATE_FILE)),
    *(("rloo", name) for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", rloo_grpo.STATE_FILE)),
    ("grpo", "scheduler.pt"),
]
SHAPES = ("[]", "{}", "null", '{"sha256": 3}', '{"run": {}, "state": [], "files": {}, "sha256": ""}', "[" * 100_000)


@pytest.mark.parametrize(
    ("method", "name", "harm"),
    [(*file, harm) for file in FILES for harm in (cut, flip, remove)]
    + [(method, STATE_FILES[method], harm) for method in ("ppo", "grpo") for harm in (edit, *map(write, SHAPES))],
)
def test_a_damaged_checkpoint_is_refused_with_its_file_and_the_way_out(
    trained, read_back, tmp_path, method, name, harm
):
    out = tmp_path / "out"
    shutil.copytree(trained[method], out)
    [folder] = out.glob("checkpoint-*")
    harm(folder, name)
    with pytest.raises(StageError) as raised:
        run(method, out)
    assert str(raised.value) == (
        f"{folder / name} is missing or damaged, or from another version of this package: delete the folder {folder}; "
        "the training then starts again."
    )
    shutil.rmtree(folder)  # the way out
    rows, policy = run(method, out)
    whole, other = read_back[method]
    assert without_times(rows) == without_times(whole) and same_weights(policy, other)


def test_where_there_is_an_older_checkpoint_the_way_out_names_it(trained, tmp_path):
    shutil.copytree(trained["ppo"], tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "checkpoint-000001", tmp_path / "out" / "checkpoint-000010")
    flip(tmp_path / "out" / "checkpoint-000010", "weights.safetensors")
    with pytest.raises(StageError, match=r"000010; the training then continues from checkpoint-000001\."):
        run("ppo", tmp_path / "out")
    with pytest.raises(StageError, match=r"weights\.safetensors is missing or damaged"):
        state.trained_roles(test_ppo.make_roles(), tmp_path / "out")


def test_a_checkpoint_of_ppo_holds_no_pickle(trained, monkeypatch):
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, lambda *_, **__: 1 / 0)
    run("ppo", trained["ppo"])
    names = {file.name for file in (trained["ppo"] / "checkpoint-000001").iterdir()}
    assert names == {"weights.safetensors", "optimizer.safetensors", state.STATE_FILE}


@pytest.mark.parametrize("method", STATE_FILES)
def test_a_full_disk_leaves_the_older_checkpoint_and_no_half_of_another(method, tmp_path, monkeypatch):
    plan = replace(QUICK, updates=2)
    whole, roles = run(method, tmp_path / "whole", plan, checkpoint_every=1)
    saves = iter(range(9))

    def full(save):
        def writes(*given, **options):
            if next(saves) >= (2 if method == "ppo" else 1):  # of the second checkpoint
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            return save(*given, **options)

        return writes

    with monkeypatch.context() as patch:
        if method == "ppo":
            patch.setattr(state, "save_file", full(state.save_file))
        else:
            trainer = rloo_grpo.METHODS[method][0]
            patch.setattr(trainer, "_save_optimizer_and_scheduler", full(trainer._save_optimizer_and_scheduler))
        with pytest.raises(DiskFullError, match=r"No space left on the disk to write .*checkpoint-\d+: .* Free"):
            run(method, tmp_path / "full", plan, checkpoint_every=1)
    first = {"ppo": "checkpoint-000001"}.get(method, "checkpoint-4")
    assert [folder.name for folder in (tmp_path / "full").glob("checkpoint*")] == [first]
    rows, again = run(method, tmp_path / "full", plan, checkpoint_every=1)
    assert without_times(rows) == without_times(whole) and same_weights(roles, again)


def test_the_older_checkpoint_goes_only_when_the_newer_one_is_there(tmp_path):
    with checkpoints.new_checkpoint(tmp_path / "checkpoint-1", "state.json", {"a": 1}) as first:
        (first / "file").write_bytes(b"one")
    (tmp_path / "checkpoint-10.tmp").mkdir()  # left by a killed run
    (tmp_path / "checkpoint-10.tmp" / "half").touch()
    with checkpoints.new_checkpoint(tmp_path / "checkpoint-10", "state.json", {"a": (2.5, None)}) as second:
        (second / "folder").mkdir()
        (second / "folder" / "file").write_bytes(b"two")
        assert checkpoints.newest(tmp_path).name == "checkpoint-1"
        assert checkpoints.read_state(tmp_path / "checkpoint-1", "state.json")["a"] == 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-10"]
    saved = checkpoints.read_state(tmp_path / "checkpoint-10", "state.json")
    assert saved["a"] == [2.5, None] and list(saved["files"]) == ["folder/file"]
    with pytest.raises(Killed), checkpoints.new_checkpoint(tmp_path / "checkpoint-20", "state.json", {}):
        raise Killed
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-10"]


def test_the_newest_is_that_of_the_highest_number(tmp_path):
    assert checkpoints.newest(tmp_path) is None
    for name in ("checkpoint-4", "checkpoint-16", "checkpoint-9", "checkpoint-20.tmp", "checkpoint-last"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest(tmp_path) == tmp_path / "checkpoint-16"


def test_a_killed_training_leaves_a_whole_checkpoint(tmp_path):
    with pytest.raises(Killed):
        test_ppo.run(tmp_path, reward=dies_at(3, Killed), checkpoint_every=1)
    folder = checkpoints.newest(tmp_path)
    assert folder.name == "checkpoint-000003"
    assert checkpoints.read_state(folder, state.STATE_FILE)["state"]["update"] == 3
