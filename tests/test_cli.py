"""The command line: what its help and settings say, what it takes from a file, and what has to be installed."""

import errno
import json
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml

from smlib import cli, declared
from smlib.cli import main
from smlib.runs.settings import PRESETS, Settings, preset

GROUPS = {field.name: field.type for field in fields(Settings) if is_dataclass(field.type)}
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name.split(".")[0] in {names!r} else super().find_spec(name, *arguments)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
from smlib.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without(names, *arguments, **options) -> subprocess.CompletedProcess:
    """A command in a Python that lacks these packages."""
    command = [sys.executable, "-c", WITHOUT.format(names=names), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def shown(capsys, *arguments) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


# ---- help ----------------------------------------------------------------------------------------------------


def help_of(monkeypatch, capsys, *command) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_fits_a_screen_and_shows_three_examples_that_are_commands(monkeypatch, capsys):
    lines = help_of(monkeypatch, capsys).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    examples = [line.strip() for line in lines if line.startswith("  smlib ")]
    assert len(examples) == 3
    did = []
    for name in ("run_notebooks", "show_settings", "draw_samples"):
        monkeypatch.setattr(cli, name, lambda args, name=name: did.append(name))
    for example in examples:
        assert main(shlex.split(example)[1:]) == 0
    assert did == ["run_notebooks", "show_settings", "draw_samples"]


@pytest.mark.parametrize(
    "command", ["run", "stage", "train-policy", "explore", "sample", "results", "settings", "data", "pretrain"]
)
def test_every_command_has_help_that_does_not_wait_for_torch(command):
    script = "import sys; from smlib.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n"
    script += "    assert not {'torch', 'transformers', 'papermill'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: smlib {command} " in done.stdout, done.stderr


def test_sample_says_of_its_options_what_the_settings_say(monkeypatch, capsys):
    said = " ".join(help_of(monkeypatch, capsys, "sample").split())
    for group, names in {
        "sampling": ("shots", "prompt", "temperature", "top_p", "max_new_tokens"),
        "hardware": ("engine", "dtype", "max_batch", "cache_tokens", "workers"),
    }.items():
        for name in names:
            one = declared.described(GROUPS[group])[name]
            assert f"--{name.replace('_', '-')}" in said and one.meaning in said.replace("- ", "-")
            assert f"(default {one.default})" in said


# ---- settings ------------------------------------------------------------------------------------------------


def test_every_setting_has_a_meaning():
    for group in (Settings, *GROUPS.values()):
        for name, one in declared.described(group).items():
            assert one.meaning or name in ("preset", "tasks", "seed"), (group, name)
        assert group.__doc__


def test_the_defaults_are_those_of_tiny():
    for group, settings in asdict(preset("tiny")).items():
        if group in GROUPS:
            assert settings == {name: one.default for name, one in declared.described(GROUPS[group]).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_settings_prints_every_value_and_marks_what_is_not_tiny_s(name, capsys):
    said = shown(capsys, "settings", name)
    settings, tiny = (preset(one, "gsm8k") for one in (name, "tiny"))
    for group in GROUPS:
        for field, value in vars(getattr(settings, group)).items():
            default = getattr(getattr(tiny, group), field)
            line = f"\n  {group}.{field} = {value}\n" if value == default else (
                f"\n* {group}.{field} = {value}  (default {default})\n"
            )  # fmt: skip
            assert line in said
    assert f" base (--model) = {settings.base}" in said and max(map(len, said.splitlines())) <= 120


def test_settings_of_one_group_with_what_they_may_be_and_changed(capsys):
    said = shown(capsys, "settings", "tiny", "ppo", "--set", "ppo.updates=7", "--set", "ppo.reward=checker")
    assert "* ppo.updates = 7  (default 60)\n      rounds of sampling and training [a whole number from 1 to" in said
    assert "* ppo.reward = checker  (default learned)" in said and "[one of: k1, k3]" in said
    assert "sft." not in said


# ---- --config ------------------------------------------------------------------------------------------------


def asked(capsys, *arguments) -> str:
    """What `settings` shows of ppo, dpo and sampling for these options."""
    return shown(capsys, "settings", *arguments)


def test_a_run_file_and_a_yaml_file_ask_for_the_same(tmp_path, capsys):
    found = {"PRESET": "smoke", "TASK": "coin_flip", "SEED": 3, "OVERRIDES": {"ppo": {"learning_rate": 1e-5}}}
    found["OVERRIDES"]["base"] = "some/model"
    (tmp_path / "run.json").write_text(json.dumps(found))
    (tmp_path / "a.yaml").write_text(
        "PRESET: smoke\nTASK: coin_flip\nSEED: 3\nOVERRIDES:\n  base: some/model\n  ppo: {learning_rate: 1e-5}\n"
    )
    (tmp_path / "b.yml").write_text(yaml.safe_dump(found))
    said = {asked(capsys, "--config", str(tmp_path / name)) for name in ("run.json", "a.yaml", "b.yml")}
    (said,) = said
    assert said.startswith("Settings of smoke;") and "* ppo.learning_rate = 1e-05  (default 0.00025)" in said
    assert "* base (--model) = some/model" in said


def test_the_command_line_goes_before_the_file(tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("PRESET: smoke\nOVERRIDES: {base: other, ppo: {updates: 5, minibatch: 4}, dpo: {beta: 2}}\n")
    said = asked(capsys, "tiny", "--config", str(file), "--set", "ppo.updates=9", "--model", "tiny")
    assert said.startswith("Settings of tiny;") and "  base (--model) = tiny\n" in said
    for line in ("* ppo.updates = 9", "* ppo.minibatch = 4", "* dpo.beta = 2.0"):
        assert line in said


def test_what_a_file_asks_reaches_the_run(tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text("PRESET: smoke\nTASK: coin_flip\nSEED: 4\nOVERRIDES: {sampling: {questions: 9}}\n")
    monkeypatch.chdir(tmp_path)
    assert main(["stage", "01_sampling", "--config", "run.yaml", "--out", "out"]) == 0
    made = json.loads((tmp_path / "out" / "01_sampling" / "manifest.json").read_text())["settings"]
    assert (made["preset"], made["tasks"], made["seed"], made["sampling"]["questions"]) == (
        "smoke",
        ["coin_flip"],
        4,
        9,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: tiny", "has 'preset', which is unknown; choose one of: PRESET, TASK, SEED, OVERRIDES"),
        ("PRESET: huge", "preset 'huge' is unknown; choose one of: tiny, smoke"),
        ("TASK: chess", "task 'chess' is unknown"),
        ("SEED: one", "seed = 'one' is not allowed"),
        ("SEED: -1", "seed = -1 is not allowed"),
        ("RUN_DIR: x", "has 'RUN_DIR', which is unknown"),
        ("3: 4", "has '3', which is unknown"),
        ("- PRESET", "is not allowed: give lines such as PRESET: tiny"),
        ("OVERRIDES: 3", "is not allowed: give lines such as PRESET: tiny"),
        ("OVERRIDES: {ppo: 3}", "setting ppo = 3 is not allowed: ppo is a group of settings"),
        ("OVERRIDES: {ppo: {nope: 3}}", "setting 'ppo.nope' is unknown"),
        ("OVERRIDES: {ppo: {updates: many}}", "ppo.updates = 'many' is not allowed"),
        ("OVERRIDES: {ppo: {updates: 2026-01-01}}", "ppo.updates = '2026-01-01' is not allowed"),
        ("OVERRIDES: {base: 3}", "setting base = 3 is not allowed"),
        ("OVERRIDES: {tasks: [chess]}", "setting 'tasks' is unknown"),
        ("OVERRIDES: {seed: 4}", "setting 'seed' is unknown"),
        ("OVERRIDES: {1: {2: 3}}", "setting '1' is unknown"),
        ("OVERRIDES: {ppo: {updates: 010}}", "ppo.updates = '010' is not allowed"),
        ("SEED: 1:30", "seed = '1:30' is not allowed"),
        ("PRESET: smoke\nPRESET: tiny", "cannot be read ('PRESET' is given twice)"),
        ("OVERRIDES: {ppo: {updates: 1}, ppo: {epochs: 2}}", "cannot be read ('ppo' is given twice)"),
        ("OVERRIDES: {ppo: {updates: [&a [x], *a]}}", "an alias, *name, is not allowed"),
        ("? [PRESET]\n: smoke", "a name must be a word"),
        ("a: [", "cannot be read ("),
        ("a: !!python/object:os.system x", "cannot be read ("),
        ("[" * 2_000, "cannot be read ("),
        ("\0", "cannot be read ("),
    ],
)
def test_a_file_that_asks_for_what_is_not_is_refused_in_a_sentence(tmp_path, capsys, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    for command in ("run", "stage", "train-policy", "explore"):
        assert main([command, "--config", str(file), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_a_notebook_s_parameter_in_a_file_is_for_run_alone(tmp_path, capsys):
    """Other commands take another run's run.json with such parameters, and leave them aside."""
    for name in ("run.json", "run.yaml"):
        (tmp_path / name).write_text(json.dumps({"PRESET": "smoke", "HELD_OUT": 0}))
    for command, name, message in (
        ("run", "run.json", "HELD_OUT = 0 is not allowed: give a whole number from 1"),
        ("stage", "run.yaml", "has 'HELD_OUT', which is unknown; choose one of: PRESET, TASK, SEED, OVERRIDES\n"),
    ):
        assert main([command, "--config", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    assert asked(capsys, "--config", str(tmp_path / "run.json")).startswith("Settings of smoke;")


def test_a_setting_that_is_an_option_of_its_own_is_refused_by_name(capsys):
    assert main(["settings", "--set", "seed.x=3"]) == 1
    assert "setting 'seed' is unknown; choose one of: base, sampling" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["settings", "--set", "base=tiny"])
    assert "base has an option of its own, --model" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_named(capsys, monkeypatch):
    def denied(_):
        raise PermissionError(errno.EACCES, "Permission denied", "/shut/run/run.json.tmp")

    monkeypatch.setattr(cli, "show_data", denied)
    assert main(["data"]) == 1
    assert capsys.readouterr().err == (
        "error: no permission to write /shut/run or to read files in it: name another folder, or change its "
        "permissions\n"
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"PRESET: \xe9")
    for name in (".", "nowhere.yaml", "latin.yaml"):
        assert main(["run", "--config", str(tmp_path / name)]) == 1
        assert f"--config {tmp_path / name} cannot be read (" in capsys.readouterr().err


# ---- what has to be installed --------------------------------------------------------------------------------

NOTEBOOKS = ("papermill", "nbformat", "nbconvert", "nbclient", "jupyter_client", "matplotlib", "IPython", "bleach")


def test_a_stage_needs_no_notebooks(tmp_path):
    small = ["--preset", "smoke", "--task", "coin_flip", "--set", "sampling.questions=8", "--out", tmp_path]
    small += ["--set", "sampling.conditioned_questions=4", "--set", "sampling.max_new_tokens=48"]
    done = without(NOTEBOOKS, "stage", "01_sampling", "02_ranking", *small)
    assert done.returncode == 0, done.stderr
    done = without(NOTEBOOKS, "train-policy", *small)
    assert done.returncode == 1 and "02_sft does not exist: first run notebook 02" in done.stderr


def test_what_the_extra_is_for_says_so_in_a_sentence(tmp_path):
    done = without(("papermill",), "run", "--preset", "smoke", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stderr == "error: papermill is not installed: pip install 'smlib[notebooks]'\n"
    assert not (tmp_path / "out").exists()
    script = WITHOUT.format(names=("matplotlib",)).replace("from smlib.cli import main", "import smlib.reports.plots")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.endswith("MissingLibrary: matplotlib is not installed: pip install 'smlib[notebooks]'\n")


def test_outside_a_repository_there_is_nothing_to_publish_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("smlib.files.folders.checkout", lambda: None)
    for option in ("--publish", "--refresh"):
        assert main(["run", "--preset", "smoke", "--out", str(tmp_path / "out"), option]) == 1
        assert "write into the repository: run them in a clone of it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
