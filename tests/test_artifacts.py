import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smlib.files.artifacts import Stage, StageError, StageMismatch, peak_mib, require
from smlib.files.atomic import DiskFullError, is_full

SETTINGS = {"seed": 0, "sampling": {"temperature": 0.8, "samples": 8}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def finished(run_dir, name="01_sampling", settings=SETTINGS, inputs=(), rows=({"n": 1}, {"n": 2})):
    stage = Stage(run_dir, name, settings, {one: ["samples.jsonl"] for one in inputs})
    with stage.recording():
        stage.write_rows("samples", rows)
    return stage


def test_a_stage_is_done_once_its_manifest_exists(tmp_path):
    stage = Stage(tmp_path, "01_sampling", SETTINGS)
    assert not stage.done
    with stage.recording():
        stage.write_rows("samples", [{"n": 1}, {"n": 2}])
        assert not stage.done
    assert stage.done
    assert Stage(tmp_path, "01_sampling", SETTINGS).read_rows("samples") == [{"n": 1}, {"n": 2}]


def test_the_manifest_says_what_made_the_stage(tmp_path):
    manifest = finished(tmp_path).manifest
    assert manifest["settings"] == SETTINGS
    assert manifest["counts"] == {"samples": 2}
    # the two lines '{"n": 1}' and '{"n": 2}', by coreutils' sha256sum
    expected = "8bc530da2d4a837766e1c6f8d47c9fc525e68757190ef7665c90c5e68894905d"
    assert manifest["files"] == {"samples.jsonl": {"bytes": 18, "sha256": expected}}
    assert set(manifest["versions"]) == {"python", "torch", "transformers", "trl", "peft", "datasets"}
    assert manifest["code"].startswith("0.")
    assert manifest["wall_seconds"] >= 0
    assert 1 < manifest["peak_mib"] <= peak_mib() + 1


def test_an_error_leaves_no_manifest_and_the_stage_can_be_made_again(tmp_path):
    stage = Stage(tmp_path, "04_ppo", SETTINGS)
    with pytest.raises(ZeroDivisionError), stage.recording():
        stage.write_json("checkpoint.json", {"update": 3})
        stage.write_rows("samples", [{"n": 1 / 0}])
    assert not stage.done
    assert not (stage.folder / "samples.jsonl").exists()
    assert stage.read_json("checkpoint.json") == {"update": 3}  # a trainer goes on from here
    with stage.recording():
        stage.write_rows("samples", [{"n": 1}])
    assert stage.done


@pytest.mark.parametrize(
    ("settings", "key", "old", "new"),
    [
        (SETTINGS | {"seed": 1}, "seed", "0", "1"),
        (SETTINGS | {"sampling": {"temperature": 1.0, "samples": 8}}, "sampling.temperature", "0.8", "1.0"),
        (SETTINGS | {"extra": "x"}, "extra", "(not set)", "'x'"),
        ({"seed": 0}, "sampling.temperature", "0.8", "(not set)"),
    ],
)
def test_other_settings_are_refused_by_the_differing_key(tmp_path, settings, key, old, new):
    finished(tmp_path)
    with pytest.raises(StageMismatch) as error:
        Stage(tmp_path, "01_sampling", settings).done  # noqa: B018
    message = str(error.value)
    assert key in message and old in message and new in message
    assert "another RUN_DIR" in message and str(tmp_path / "01_sampling") in message


def made_again(stage, rows):
    shutil.rmtree(stage.folder)
    return finished(stage.folder.parent, stage.name, rows=rows)


def test_a_stage_whose_input_was_made_again_with_other_contents_is_refused(tmp_path):
    first = finished(tmp_path)
    finished(tmp_path, "02_ranking", {"seed": 0}, [first])
    again = made_again(first, [{"n": 1}, {"n": 2}])
    assert Stage(tmp_path, "02_ranking", {"seed": 0}, {again: ["samples.jsonl"]}).done  # the contents are the same
    other = made_again(first, [{"n": 3}])
    with pytest.raises(StageMismatch) as error:
        Stage(tmp_path, "02_ranking", {"seed": 0}, {other: ["samples.jsonl"]}).done  # noqa: B018
    assert "another 01_sampling/samples.jsonl than there is now (SHA-256 8bc530da2d4a, now" in str(error.value)
    with pytest.raises(StageMismatch, match=r"made again since: delete the folder .*02_ranking"):
        require(tmp_path, "02_ranking")


def test_what_was_made_from_a_stage_that_is_out_of_date_is_out_of_date_too(tmp_path):
    first = finished(tmp_path)
    second = finished(tmp_path, "02_ranking", inputs=[first])
    finished(tmp_path, "03_reward_model", inputs=[second])
    assert require(tmp_path, "03_reward_model").done
    made_again(first, [{"n": 3}])
    with pytest.raises(StageMismatch, match=r"02_ranking was made from another 01_sampling/samples\.jsonl"):
        require(tmp_path, "03_reward_model")
    shutil.rmtree(first.folder)  # to save room, say
    assert require(tmp_path, "03_reward_model").done


def test_what_is_not_read_of_a_stage_does_not_put_later_ones_out_of_date(tmp_path):
    for clock in ("1.0", "2.0"):
        with (first := Stage(tmp_path, "01_sampling", {})).recording():
            first.write_rows("samples", [{"n": 1}])
            first.write_json("log.json", {"seconds": clock})
        if clock == "1.0":
            finished(tmp_path, "02_ranking", inputs=[first])
            shutil.rmtree(first.folder)
    assert require(tmp_path, "02_ranking").done


def test_files_that_nothing_speaks_for_are_not_taken_over(tmp_path):
    with pytest.raises(KeyboardInterrupt), Stage(tmp_path, "06_exploration", {"seed": 0}).recording() as stage:
        stage.write_json("shards/0.json", {})
        raise KeyboardInterrupt
    (stage.folder / "unfinished.json").unlink()
    other = Stage(tmp_path, "06_exploration", {"seed": 1})
    with pytest.raises(StageError, match=r"holds 'shards', and neither manifest\.json nor"), other.recording():
        pass


def test_a_kill_between_the_manifest_and_the_end_leaves_a_finished_stage(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    stage = Stage(tmp_path, "01_sampling", SETTINGS)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patched, stage.recording():
        stage.write_rows("samples", [{"n": 1}])
        patched.setattr(Path, "unlink", killed)
    assert Stage(tmp_path, "01_sampling", SETTINGS).done
    assert require(tmp_path, "01_sampling").read_rows("samples") == [{"n": 1}]
    with pytest.raises(StageMismatch, match="seed"):
        Stage(tmp_path, "01_sampling", {"seed": 1}).done  # noqa: B018


def test_one_process_at_a_time_makes_a_stage(tmp_path):
    stage = Stage(tmp_path, "04_ppo", SETTINGS)
    script = "import sys; from smlib.files.artifacts import Stage; import json\n"
    script += f"with Stage(sys.argv[1], '04_ppo', {SETTINGS!r}).recording(): pass"
    command = [sys.executable, "-c", script, str(tmp_path)]
    with stage.recording():
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert f"BusyError: another process ({os.getpid()} on {socket.gethostname()}, since 20" in done.stderr
        assert f"is making {stage.folder}: wait until it has ended, or stop it" in done.stderr
    with pytest.raises(StageError, match="is complete"), stage.recording():
        pass
    assert subprocess.run(command, capture_output=True).returncode == 1  # complete


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    script = "import os, signal, sys; from smlib.files.artifacts import Stage\n"
    script += f"with Stage(sys.argv[1], '04_ppo', {SETTINGS!r}).recording(): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert finished(tmp_path, "04_ppo").done


def test_a_stage_that_was_cut_off_is_not_taken_over_by_other_settings(tmp_path):
    with pytest.raises(KeyboardInterrupt), Stage(tmp_path, "04_ppo", {"seed": 0}).recording() as stage:
        stage.write_json("checkpoint.json", {})
        raise KeyboardInterrupt
    assert not Stage(tmp_path, "04_ppo", {"seed": 0}).done
    with pytest.raises(StageMismatch, match="seed"), Stage(tmp_path, "04_ppo", {"seed": 1}).recording():
        pass


def test_a_stage_that_fails_before_it_has_made_anything_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), Stage(tmp_path, "02_sft", {"seed": 0}).recording():
        raise ValueError("its input is damaged, say")
    assert os.listdir(tmp_path) == []
    assert finished(tmp_path, "02_sft", {"seed": 1}).done  # other settings are not refused


def test_a_finished_stage_is_not_overwritten(tmp_path):
    stage = finished(tmp_path)
    with pytest.raises(StageError, match="is complete"), stage.recording():
        pass
    assert stage.done


def test_the_fingerprint_depends_on_settings_and_what_is_read_and_on_nothing_else(tmp_path):
    first, same = (finished(tmp_path / name, rows=[{"n": 1}]) for name in "ab")
    other = finished(tmp_path / "c", rows=[{"n": 2}])
    assert first.fingerprint == same.fingerprint == other.fingerprint
    assert first.fingerprint != Stage(tmp_path, "01_sampling", SETTINGS | {"seed": 1}).fingerprint
    reads = [{stage: ["samples.jsonl"]} for stage in (first, same, other)]
    ranking = [Stage(tmp_path, "02_ranking", {"seed": 0}, inputs) for inputs in reads]
    assert ranking[0].fingerprint == ranking[1].fingerprint != ranking[2].fingerprint
    assert Stage("x", "s", {"a": 1, "b": 2}).fingerprint == Stage("y", "s", {"b": 2, "a": 1}).fingerprint


def test_dataclasses_and_tuples_match_what_comes_back_from_disk(tmp_path):
    @dataclass(frozen=True)
    class Group:
        tasks: tuple = ("coin_flip", "last_letters")

    finished(tmp_path, settings={"group": Group()}, rows=[Group()])
    stage = Stage(tmp_path, "01_sampling", {"group": Group()})
    assert stage.done
    assert stage.read_rows("samples") == [{"tasks": ["coin_flip", "last_letters"]}]


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=3))
def test_rows_come_back_as_they_were(rows):
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(folder, "s", {})
        stage.write_rows("rows", rows)
        assert stage.read_rows("rows") == rows


def test_require_returns_the_stage_on_disk_with_its_fingerprint(tmp_path):
    first = finished(tmp_path)
    second = finished(tmp_path, "02_ranking", {"seed": 0}, [first])
    found = require(tmp_path, "02_ranking")
    assert found.done
    assert found.fingerprint == second.fingerprint
    assert found.read_rows("samples") == [{"n": 1}, {"n": 2}]


def test_a_missing_stage_names_the_notebook_to_run(tmp_path):
    with pytest.raises(StageError, match=r"does not exist: first run notebook 03 \(notebooks/03_\*\.ipynb\)"):
        require(tmp_path, "03_reward_model")
    with pytest.raises(ValueError), Stage(tmp_path, "03_reward_model", {}).recording() as stage:
        stage.write_rows("log", [])
        raise ValueError
    with pytest.raises(StageError, match="is not finished: first run notebook 03"):
        require(tmp_path, "03_reward_model")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])


def edit(path):
    path.write_bytes(path.read_bytes().replace(b"1", b"7"))


@pytest.mark.parametrize("damage", [cut_short, edit, Path.unlink])
def test_a_damaged_data_file_is_refused_by_name(tmp_path, damage):
    stage = finished(tmp_path)
    damage(stage.folder / "samples.jsonl")
    with pytest.raises(StageError, match=r"samples\.jsonl is missing, cut short or was edited.* notebook 01"):
        require(tmp_path, "01_sampling").read_rows("samples")


def test_a_file_that_the_stage_has_not_is_an_error_that_names_those_it_has(tmp_path):
    with pytest.raises(StageError, match=r"has no 'pairs\.jsonl'; it has: samples\.jsonl"):
        finished(tmp_path).read_rows("pairs")


def test_a_damaged_manifest_is_refused(tmp_path):
    stage = finished(tmp_path)
    cut_short(stage.folder / "manifest.json")
    with pytest.raises(StageError, match=r"manifest\.json is damaged: Invalid JSON"):
        stage.done  # noqa: B018


@pytest.mark.parametrize("damage", [cut_short, edit, lambda path: path.write_text("[]")])
def test_what_an_unfinished_stage_keeps_is_made_once_and_again_where_it_is_damaged(tmp_path, damage):
    made = []

    def make():
        made.append(1)
        return {"found": [1, 2.5, None]}

    with Stage(tmp_path, "06_exploration", {}).recording() as stage:
        assert stage.kept("shards/1.json", make) == stage.kept("shards/1.json", make) == {"found": [1, 2.5, None]}
        assert made == [1]
        damage(stage.folder / "shards" / "1.json")
        assert stage.kept("shards/1.json", make) == {"found": [1, 2.5, None]} and made == [1, 1]


WRONG = [
    "",
    "{",
    "[]",
    "3",
    "null",
    "{}",
    '{"settings": {}, "inputs": {}}',
    '{"settings": [], "inputs": 1, "files": {}}',
]


@pytest.mark.parametrize("text", WRONG)
def test_json_of_another_shape_in_place_of_a_manifest_is_refused(tmp_path, text):
    stage = finished(tmp_path)
    (stage.folder / "manifest.json").write_text(text)
    for use in (lambda: stage.done, lambda: require(tmp_path, "01_sampling"), lambda: stage.path("samples.jsonl")):
        with pytest.raises(StageError, match=r"manifest\.json is damaged: .*delete the folder .*01_sampling"):
            use()


def test_a_flipped_byte_anywhere_is_found(tmp_path):
    """In the data when it is read, in the manifest at once."""
    stage = finished(tmp_path)
    for file in ("manifest.json", "samples.jsonl"):
        path, whole = stage.folder / file, (stage.folder / file).read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
            with pytest.raises((StageError, StageMismatch)):
                require(tmp_path, "01_sampling").read_rows("samples")
        path.write_bytes(whole)
    assert require(tmp_path, "01_sampling").read_rows("samples") == [{"n": 1}, {"n": 2}]


class Model:
    """Stands for a model or tokenizer: saves one file into a folder."""

    def __init__(self, file, text="weights"):
        self.file, self.text = file, text

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, self.file).write_text(self.text)


def test_a_model_folder_is_replaced_whole_and_checked(tmp_path):
    stage = Stage(tmp_path, "03_reward_model", {})
    with stage.recording():
        stage.write_model("model", Model("old.bin"))
        stage.write_model("model", Model("weights.bin"), Model("tokenizer.json", "{}"))
    assert sorted(os.listdir(stage.path("model"))) == ["tokenizer.json", "weights.bin"]
    (stage.folder / "model" / "weights.bin").write_text("others")
    with pytest.raises(StageError, match=r"weights\.bin"):
        stage.path("model")


def test_a_file_that_came_into_a_model_folder_later_is_refused(tmp_path):
    stage = Stage(tmp_path, "02_sft", {})
    with stage.recording():
        stage.write_model("model", Model("weights.bin"))
    (stage.folder / "model" / "adapter_config.json").write_text("{}")  # the loader would take it for an adapter
    with pytest.raises(StageError, match=r"adapter_config\.json does not belong to this stage"):
        require(tmp_path, "02_sft").path("model")


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# What safetensors and torch.save say, whose errors are not the system's; torch.save one of two things by what is left.
FULL = (
    "Error while serializing: I/O error: No space left on device (os error 28)",
    "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed",
    "basic_ios::clear: iostream error",
)


class FullDiskModel(Model):
    def save_pretrained(self, folder):
        super().save_pretrained(folder)
        raise RuntimeError(self.said)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch):
    stage = Stage(tmp_path, "01_sampling", {})
    stage.write_rows("samples", [{"n": 1}])
    for said in FULL:
        model = FullDiskModel("weights.bin")
        model.said = said
        with pytest.raises(DiskFullError, match=r"No space left on the disk to write .*model"):
            stage.write_model("model", model)
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DiskFullError, match=r"No space left on the disk to write .*samples\.jsonl"):
        stage.write_rows("samples", [{"n": 2}])
    assert os.listdir(stage.folder) == ["samples.jsonl"]
    assert stage.read_rows("samples") == [{"n": 1}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, the disk that is always full")
@pytest.mark.parametrize("numbers", [1, 100_000])
def test_a_full_disk_is_known_by_what_torch_says_of_it(numbers):
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(numbers), "/dev/full")
    assert is_full(raised.value)


def test_a_number_that_is_no_number_does_not_reach_the_disk(tmp_path):
    stage = Stage(tmp_path, "05_evaluation", {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        stage.write_rows("accuracy", [{"accuracy": float("nan")}])
    assert not stage.folder.exists()


def test_files_left_by_a_kill_are_cleared_away(tmp_path):
    stage = Stage(tmp_path, "01_sampling", {})
    (stage.folder / "model.tmp").mkdir(parents=True)
    (stage.folder / "model.tmp" / "weights.bin").write_text("half")
    with stage.recording():
        stage.write_rows("samples", [])
    assert sorted(os.listdir(stage.folder)) == ["manifest.json", "samples.jsonl"]
    assert json.loads((stage.folder / "manifest.json").read_text())["counts"] == {"samples": 0}


def test_where_the_memory_of_a_gpu_runs_out_the_stage_and_the_settings_are_named(tmp_path):
    stage = Stage(tmp_path, "02_sft", SETTINGS)
    with pytest.raises(StageError) as raised, stage.recording():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert str(raised.value).startswith(f"{stage.folder}: the GPU's memory ran out. Lower hardware.max_batch")
    for setting in ("max_batch", "micro_batch", "gradient_checkpointing", "dtype"):
        assert f"hardware.{setting}" in str(raised.value)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError) and not stage.done
    with pytest.raises(RuntimeError, match="another fault"), stage.recording():
        raise RuntimeError("another fault")


def test_where_the_module_resource_is_missing_as_on_windows_commands_work(tmp_path):
    # psutil comes first, as its part for Linux needs the module
    script = "import sys, psutil; sys.modules['resource'] = None\nfrom smlib.cli import main\n"
    script += "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
    script += "sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    wanted = ["stage", "01_sampling", "--preset", "smoke", "--task", "coin_flip", "--out", str(tmp_path)]
    command = [sys.executable, "-c", script, *wanted, "--set", "sampling.questions=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "usage: smlib" in done.stdout and "01_sampling: " in done.stdout, done.stderr
    assert require(tmp_path, "01_sampling").manifest["peak_mib"] > 100


def test_a_stage_killed_between_its_last_two_steps_is_finished_by_whoever_looks_next(tmp_path):
    """Fault: manifest.json was there and unfinished.json stayed for good."""
    with (stage := Stage(tmp_path, "01_sampling", {"seed": 0})).recording():
        stage.write_rows("rows", [{"n": 1}])
        left = (stage.folder / "unfinished.json").read_bytes()
    (stage.folder / "unfinished.json").write_bytes(left)
    assert Stage(tmp_path, "01_sampling", {"seed": 0}).done
    assert sorted(path.name for path in stage.folder.iterdir()) == ["manifest.json", "rows.jsonl"]
