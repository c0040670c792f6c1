"""PPO in two processes is PPO in one: with the weights whole in each (DDP), and sharded over them (FSDP)."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ppo_in_processes
import processes
import pytest
from processes import COMMAND
from safetensors.torch import load_file
from test_ppo import QUICK, Killed, dies_at, run

from smlib.errors import UsageError
from smlib.runs import self_motivated
from smlib.runs.settings import preset
from smlib.sampling import devices

SCRIPT = Path(__file__).parent / "ppo_in_processes.py"
pytestmark = pytest.mark.slow


def in_two_processes(*arguments):
    done = processes.in_two_processes(*arguments, timeout=300, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one, other, least=1e-5):
    ours, theirs = (load_file(out / f"checkpoint-{QUICK.updates:06d}" / "weights.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < least


SMALL = ["model:ddp", "adapters:ddp", "head:fsdp"]
LARGE = ["large:ddp", "large, grouped:ddp", "large, grouped:fsdp"]  # bfloat16, in micro batches
BEGUN = "adapters:fsdp"  # by one process, which was killed


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """All of them, in one start of two processes: to start them takes longer than to train."""
    out = tmp_path_factory.mktemp("two")
    with pytest.raises(Killed):
        run(out / BEGUN, kind="adapters", reward=dies_at(2, Killed), checkpoint_every=2)
    in_two_processes(SCRIPT, out, *SMALL, *LARGE, BEGUN)
    return out


@pytest.mark.parametrize("case", SMALL + LARGE)
def test_two_processes_train_as_one(tmp_path, trained_by_two, case):
    ppo_in_processes.train(case.split(":")[0], tmp_path / "one")
    # Half of a batch is multiplied by other kernels than the whole: on some processors bfloat16 rounds otherwise then,
    # by less than a step, which moves a weight by 3e-3.
    assert_close(tmp_path / "one", trained_by_two / case, 1e-3 if case in LARGE else 1e-5)
    logs = [(out / "log.csv").read_text().splitlines() for out in (tmp_path / "one", trained_by_two / case)]
    assert len(logs[0]) == len(logs[1]) == 1 + QUICK.updates


def test_what_one_process_began_two_can_finish_sharded(tmp_path, trained_by_two):
    run(tmp_path / "one", kind="adapters")
    assert_close(tmp_path / "one", trained_by_two / BEGUN)


def test_the_steps_are_large_enough_to_tell(tmp_path):
    """Another minibatch moves the weights by far more than the processes may differ."""
    run(tmp_path / "one")
    run(tmp_path / "other", replace(QUICK, minibatch=4))
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "one", tmp_path / "other")


def test_the_command_line_trains_in_two_processes(tmp_path, monkeypatch):
    settings = preset("smoke", "coin_flip")
    self_motivated.before_policy(tmp_path / "one", settings, progress=False)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one = self_motivated.train_policy(tmp_path / "one", settings, progress=False)
    in_two_processes(COMMAND, "train-policy", "--preset", "smoke", "--task", "coin_flip", "--out", tmp_path / "two")
    two = self_motivated.train_policy(tmp_path / "two", settings, progress=False)  # is done, and read
    for file in ("model.safetensors", "value/value.safetensors"):
        ours, theirs = (load_file(stage.path("model") / file) for stage in (one, two))
        assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    monkeypatch.setattr(devices, "accelerator", lambda **_: SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match="'grpo' trains in one process"):
        self_motivated.train_policy(tmp_path / "two", settings, method="grpo", progress=False)
