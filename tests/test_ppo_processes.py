"""PPO in two processes is PPO in one: with the weights whole in each (DDP), and sharded over them (FSDP)."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_ppo import QUICK, Killed, dies_at, run

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def in_two_processes(kind, wrapper, out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, HERE / "ppo_in_processes.py", kind, wrapper, out],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def assert_close(one, other):
    ours, theirs = (load_file(out / f"checkpoint-{QUICK.updates:06d}" / "weights.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


@pytest.mark.parametrize(("kind", "wrapper"), [("model", "ddp"), ("adapters", "ddp"), ("head", "fsdp")])
def test_two_processes_train_as_one(tmp_path, kind, wrapper):
    run(tmp_path / "one", kind=kind)
    in_two_processes(kind, wrapper, tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two")
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 1 + QUICK.updates


def test_what_one_process_began_two_can_finish_sharded(tmp_path):
    run(tmp_path / "one", kind="adapters")
    with pytest.raises(Killed):
        run(tmp_path / "two", kind="adapters", reward=dies_at(2, Killed), checkpoint_every=2)
    in_two_processes("adapters", "fsdp", tmp_path / "two")
    assert_close(tmp_path / "one", tmp_path / "two")


def test_the_steps_are_large_enough_to_tell(tmp_path):
    """Another minibatch moves the weights by far more than the processes may differ."""
    run(tmp_path / "one")
    run(tmp_path / "other", replace(QUICK, minibatch=4))
    with pytest.raises(AssertionError):
        assert_close(tmp_path / "one", tmp_path / "other")
