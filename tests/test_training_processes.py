"""SFT, the reward model and DPO in two processes are those of one; and `python -m smlib stage`, in one and in two."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import COMMAND, in_two_processes
from safetensors.torch import load_file
from tiny_model import policy
from trainings_in_processes import KINDS, TRAININGS, run
from transformers import TrainingArguments

from smlib.cli import main
from smlib.learning import trainers
from smlib.runs import shared
from smlib.sampling import devices

SCRIPT = Path(__file__).parent / "trainings_in_processes.py"
SMOKE = ["--preset", "smoke", "--task", "coin_flip", "--out"]
NEEDED = ("06_exploration", "06_selection", "06_solutions", "03_second_sampling", "02_ranking", "01_sampling")
SHARED = ("02_sft", "03_reward_model", "06_rft", "06_outcome_dpo", "06_step_dpo")


def difference(one, other):
    """The greatest between the weights of two files."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """All trainings, in one start of two processes: to start them takes longer than to train."""
    out = tmp_path_factory.mktemp("two")
    done = in_two_processes(SCRIPT, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one(tmp_path, trained_by_two, name, kind):
    """24 steps, the last of an epoch with fewer rows, which leave a process without any."""
    run(name, kind, tmp_path / "one")
    trained = [tmp_path / "one", trained_by_two / name / kind]
    # Half of a batch is multiplied by other kernels than the whole: with adapters this adds up to 2e-5 on some CPUs.
    assert difference(*(out / "weights.safetensors" for out in trained)) < (1e-4 if kind == "adapters" else 1e-5)
    losses = [json.loads((out / "loss.json").read_text()) for out in trained]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-5)  # steps 1, 10 and 20


@pytest.mark.parametrize("name", TRAININGS)
def test_the_steps_are_large_enough_to_tell(tmp_path, name):
    """A batch of another size moves the weights by far more than the processes may differ."""
    for out, batch in (("one", 4), ("other", 6)):
        run(name, "whole", tmp_path / out, batch=batch, epochs=2)
    assert difference(*(tmp_path / out / "weights.safetensors" for out in ("one", "other"))) > 1e-3


@pytest.mark.parametrize(("batch", "micro_batch", "rows"), [(4, 0, 1), (8, 2, 2), (16, 1, 1), (16, 4, 4)])
def test_a_batch_is_shared_by_processes_and_micro_batches(monkeypatch, batch, micro_batch, rows):
    monkeypatch.setattr(devices, "process_state", lambda: SimpleNamespace(num_processes=4))
    options = trainers.trainer_options(policy(), 1, 1e-3, batch, 0, "", micro_batch)
    assert options["per_device_train_batch_size"] == rows
    assert options["gradient_accumulation_steps"] * rows * 4 == batch


@pytest.mark.parametrize(("seen", "taken"), [(0, 0), (1, 1), (8, 1)])
def test_a_process_trains_on_one_gpu_however_many_it_sees(seen, taken, tmp_path):
    """transformers would take all, and TRL refuses that."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = seen
    assert trainers.on_one_gpu(args).n_gpu == taken


@pytest.mark.parametrize("name", TRAININGS)
def test_all_trainings_begin_where_many_gpus_are_seen(name, tmp_path, monkeypatch):
    ours = trainers.on_one_gpu

    def many(args):
        args._n_gpu = 4
        return ours(args)

    monkeypatch.setattr(trainers, "on_one_gpu", many)
    run(name, "whole", tmp_path / "out", epochs=1)


@pytest.mark.parametrize(("batch", "micro_batch", "rows"), [(8, 4, 4), (6, 0, 1), (2, 0, 0), (8, 3, 3)])
def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, batch, micro_batch, rows):
    monkeypatch.setattr(devices, "process_state", lambda: SimpleNamespace(num_processes=4))
    message = f"a batch of {batch} cannot be split into micro batches of {rows} in each of 4 processes: give a"
    with pytest.raises(ValueError, match=message):
        trainers.trainer_options(policy(), 1, 1e-3, batch, 0, "", micro_batch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the stages that processes share and what they need, made by the command."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["stage", *NEEDED, *SHARED, *SMOKE, str(out), "--set", "explore.temperature=1.0"]) == 0
    return out


def test_the_command_makes_the_stages_named_in_their_order(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert {path.name for path in finished.iterdir()} == {*NEEDED, *SHARED}
    for name in ("01_sampling", "02_ranking"):
        shutil.copytree(finished / name, tmp_path / name)
    assert main(["stage", "02_sft", "02_ranking", *SMOKE, str(tmp_path)]) == 0
    ranking, trained = capsys.readouterr().out.splitlines()
    assert ranking.startswith(f"{tmp_path / '02_ranking'}: ") and ranking.endswith(" s (already done)")
    assert trained.startswith(f"{tmp_path / '02_sft'}: 1 log, ") and trained.endswith(" s")
    assert difference(*(out / "02_sft/model/model.safetensors" for out in (finished, tmp_path))) == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["02_sft", "07_more"], "stage '07_more' is unknown; choose from: 01_sampling, 02_ranking, 02_sft, "),
        (["02_ranking"], "01_sampling does not exist: first run notebook 01"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, capsys, names, message):
    assert main(["stage", *names, *SMOKE, str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


APART = (["02_sft"], ["06_rft"], ["03_reward_model", "06_step_dpo", "06_outcome_dpo"])


@pytest.mark.slow
@pytest.mark.parametrize("names", APART)
def test_the_command_shares_the_stages_that_train(finished, tmp_path, names):
    """Under torchrun, by a copy of the run in which they are missing. What sampled from a model stays its own."""
    assert {name for names in APART for name in names} == set(SHARED)
    shutil.copytree(finished, tmp_path / "two", ignore=shutil.ignore_patterns(*names))
    options = [*SMOKE, tmp_path / "two", "--set", "explore.temperature=1.0"]
    done = in_two_processes(COMMAND, "stage", *names, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        assert done.stdout.count(f"{tmp_path / 'two' / name}: ") == 1  # the main process alone prints
        assert difference(*(out / name / "model/model.safetensors" for out in (finished, tmp_path / "two"))) < 1e-5


@pytest.mark.slow
def test_what_one_process_makes_is_refused_in_two(tmp_path):
    """Really started; the commands, one by one, are refused below."""
    done = in_two_processes("-m", "smlib", "explore", *SMOKE, tmp_path / "run")
    assert done.returncode == 1 and "error: 01_sampling is made by one process, but 2 were started: " in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "alone"),
    [
        (["stage", "02_sft", "06_solutions", *SMOKE], "06_solutions"),
        (["explore", *SMOKE], "01_sampling"),
        (["run", *SMOKE], "a run of the notebooks"),
        (["sample", "coin_flip", "--out"], "a folder of samples"),
    ],
)
def test_every_command_for_one_process_is_refused_in_two(tmp_path, capsys, monkeypatch, command, alone):
    monkeypatch.setattr(shared, "process_state", lambda: SimpleNamespace(num_processes=2))
    assert main([*command, str(tmp_path / "run")]) == 1
    assert f"error: {alone} is made by one process, but 2 were started: start it without" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
