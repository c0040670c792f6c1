"""The runner, on notebooks of a few cells that stand for the real ones."""

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from small_notebooks import PARAMETERS, VALUES, InProcess, engine, run, write_notebook

from smlib import cli
from smlib.cli import main
from smlib.errors import UserError
from smlib.files.artifacts import Stage
from smlib.files.atomic import BusyError, locked
from smlib.notebooks.execution import RunError, WatchedEngine
from smlib.notebooks.runner import parameters, publish, refresh, verify
from smlib.ppo import rollouts, training_log, updates
from smlib.problems import downloads

ROOT = Path(__file__).parents[1]
LOG = 'from pathlib import Path\nwith open(Path(RUN_DIR) / "log", "a") as f:\n    f.write("{} ")'


def log(out):
    """The names of the notebooks that were executed, in order."""
    return (out / "log").read_text().split()


@pytest.fixture
def notebooks(tmp_path):
    for name in ("00_start", "01_sampling", "02_ranking"):
        write_notebook(tmp_path / "notebooks", name, LOG.format(name[:2]))
    return tmp_path / "notebooks"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "x"


def output_text(path):
    cells = nbformat.read(path, 4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.usefixtures("in_process")
def test_a_run_executes_all_notebooks_in_order_and_leaves_an_account(notebooks, out, capsys):
    run(notebooks, out, VALUES)
    assert log(out) == ["00", "01", "02"]
    assert json.loads((out / "run.json").read_text()) == VALUES
    timings = json.loads((out / "timings.json").read_text())
    assert list(timings) == ["00_start", "01_sampling", "02_ranking"]
    for entry in timings.values():
        assert entry["seconds"] >= 0
        assert entry["cells"] == 4  # with the one that papermill put in
    index = (out / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', index)
    assert links == [f"notebooks/{name}.html" for name in timings]
    assert all("<html" in (out / link).read_text() for link in links)
    page = (out / links[0]).read_text()
    assert '<h1 id="00_start">' in page and "&lt;h1" not in page  # a sanitiser once showed the tags themselves
    assert "[2/3] 01_sampling" in capsys.readouterr().out

    run(notebooks, out, VALUES)
    assert log(out) == ["00", "01", "02"]  # all done before
    assert capsys.readouterr().out.count("already done") == 3

    timings["01_sampling"]["seconds"] = 75.9
    (out / "timings.json").write_text(json.dumps(timings))
    run(notebooks, out, VALUES, first=1, last=1)
    assert log(out) == ["00", "01", "02", "01"]
    assert re.search("about 1:1[0-5] left", capsys.readouterr().out)  # the time that it took before

    run(notebooks, out, VALUES)  # 02 read what 01 has made anew
    assert log(out)[4:] == ["02"]

    write_notebook(notebooks, "01_sampling", LOG.format("01"), "SEED + 1")
    run(notebooks, out, VALUES)
    assert log(out)[5:] == ["01", "02"]


@pytest.mark.usefixtures("in_process")
def test_parameters_reach_the_notebooks_that_have_them(tmp_path, out):
    folder = tmp_path / "notebooks"
    write_notebook(folder, "00_start", "print(repr(NAME))", parameters='NAME = "a"')
    write_notebook(folder, "01_sampling", "print(SEED, UPDATES, RUN_DIR)", parameters=PARAMETERS + "\nUPDATES = 4")
    run(folder, out, VALUES | {"SEED": 5, "UPDATES": 9})
    assert output_text(out / "notebooks" / "00_start.ipynb") == "'a'\n"
    assert output_text(out / "notebooks" / "01_sampling.ipynb") == f"5 9 {out}\n"


def test_the_kernel_is_this_interpreter_and_starts_in_the_notebooks_folder(tmp_path, out, monkeypatch, capfd):
    spec = tmp_path / "elsewhere" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text('{"argv": ["/nowhere/python"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "elsewhere"))
    cells = ["import os, sys\nprint(sys.prefix, os.getcwd())", "held = bytes(range(256)) * (300 * 2**12)"]
    cells += [
        "import time\nfrom tqdm.auto import tqdm\nfor _ in tqdm([1]):\n    time.sleep(1)",
        'raise ValueError("<b>bold</b>")',
    ]
    write_notebook(tmp_path / "notebooks", "00_start", *cells)
    with pytest.raises(RunError, match=r"00_start stopped at cell 6 \(In \[6\]\) with ValueError: <b>bold</b>"):
        run(tmp_path / "notebooks", out, VALUES)
    printed = output_text(out / "notebooks" / "00_start.ipynb")
    assert printed == f"{sys.prefix} {tmp_path / 'notebooks'}\n"  # no bar, no warning of tqdm's
    assert "<b>bold" not in (out / "notebooks" / "00_start.html").read_text()
    shown = capfd.readouterr()
    assert 300 < int(re.search(r"(\d+) MiB", shown.out)[1]) < 600  # the 300 MiB held, and an empty kernel
    assert shown.err == ""


@pytest.mark.usefixtures("in_process")
def test_a_failing_cell_stops_the_run_with_its_message_and_the_run_can_go_on(notebooks, out):
    write_notebook(notebooks, "01_sampling", "x = 1", 'raise ValueError("temperature must be positive")')
    with pytest.raises(RunError) as error:
        run(notebooks, out, VALUES)
    message = str(error.value)
    assert "notebook 01_sampling stopped at cell 4 (In [4])" in message
    assert "ValueError: temperature must be positive" in message
    assert "Traceback" not in message
    assert log(out) == ["00"]
    assert "not finished" in (out / "index.html").read_text()
    assert "temperature must be positive" in (out / "notebooks" / "01_sampling.html").read_text()

    write_notebook(notebooks, "01_sampling", LOG.format("01"))
    run(notebooks, out, VALUES)
    assert log(out) == ["00", "01", "02"]
    assert "not finished" not in (out / "index.html").read_text()


def test_a_kernel_that_dies_is_reported(tmp_path, out):
    write_notebook(tmp_path / "notebooks", "00_start", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match="00_start: its Python process died at cell 4"):
        run(tmp_path / "notebooks", out, VALUES)


class Hurried(WatchedEngine):
    @classmethod
    def execute_managed_notebook(cls, *arguments, **options):
        return super().execute_managed_notebook(*arguments, **options | {"start_timeout": 1})


def test_a_kernel_that_does_not_start_is_reported(tmp_path, out, monkeypatch):
    write_notebook(tmp_path / "notebooks", "00_start", "1")
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the kernel alone, as this process runs already
    said = r"00_start: its Python process did not start .*run the same command again"
    with engine(Hurried), pytest.raises(RunError, match=said):
        run(tmp_path / "notebooks", out, VALUES)


@pytest.mark.usefixtures("in_process")
def test_deleting_a_stage_makes_it_again(tmp_path, out):
    stage = 'from smlib.files.artifacts import Stage\nwith Stage(RUN_DIR, "01_rationales", {}).recording():\n    pass\n'
    write_notebook(tmp_path / "notebooks", "01_sampling", stage + LOG.format("01"))
    run(tmp_path / "notebooks", out, VALUES)
    run(tmp_path / "notebooks", out, VALUES)
    assert log(out) == ["01"]
    (out / "01_rationales" / "manifest.json").unlink()
    run(tmp_path / "notebooks", out, VALUES)
    assert log(out) == ["01", "01"]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("other")])
@pytest.mark.parametrize("lost", ["figures/a.png", "results/b.csv", "notebooks/01_a.html", "notebooks/01_a.ipynb"])
def test_a_page_or_figure_that_was_lost_is_made_again(tmp_path, out, lost, damage):
    writes = 'for name in ("figures/a.png", "results/b.csv"):\n    Path(RUN_DIR, name).parent.mkdir(exist_ok=True)\n'
    writes += '    Path(RUN_DIR, name).write_text("x")'
    write_notebook(tmp_path / "notebooks", "00_start", LOG.format("00"))
    write_notebook(tmp_path / "notebooks", "01_a", LOG.format("01") + "\n" + writes)
    run(tmp_path / "notebooks", out, VALUES)
    damage(out / lost)
    assert verify(out) == 1
    run(tmp_path / "notebooks", out, VALUES)
    assert log(out) == ["00", "01", "01"] and verify(out) == 0
    run(tmp_path / "notebooks", out, VALUES)
    assert log(out) == ["00", "01", "01"]


TIMED = '{"00_start": {"source": "a", "parameters": {}, "seconds": NaN, "peak_mib": 1, "cells": 1, "stages": [], '
TIMED += '"files": {}}}'
WRONG = ["", "{", "[]", "3", '{"00_start": 3}', '{"00_start": {"source": 1}}', "\udcff", TIMED]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("text", WRONG)
def test_a_damaged_timings_file_costs_time_alone(notebooks, out, text, capsys):
    run(notebooks, out, VALUES)
    (out / "timings.json").write_text(text, errors="surrogateescape")
    assert verify(out) == 1
    run(notebooks, out, VALUES)
    assert log(out) == ["00", "01", "02"] * 2
    assert "timings.json is damaged" in capsys.readouterr().err
    assert verify(out) == 0


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"OVERRIDES": 3}',
        '{"OVERRIDES": {"ppo": []}}',
        '{"SEED": "x"}',
        '{"OVERRIDES": {"hardware": "dtype"}}',
    ],
)
def test_a_damaged_run_file_is_written_anew(notebooks, out, text, capsys):
    run(notebooks, out, VALUES)
    whole = (out / "run.json").read_text()
    (out / "run.json").write_text(text)
    run(notebooks, out, VALUES)
    assert (out / "run.json").read_text() == whole and log(out) == ["00", "01", "02"]
    assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("file", ["run.json", "timings.json"])
@pytest.mark.parametrize("text", WRONG)
def test_a_damaged_file_of_a_neighbour_does_not_stop_a_run(notebooks, out, file, text):
    run(notebooks, out, VALUES)
    (out / file).write_text(text, errors="surrogateescape")
    run(notebooks, out.with_name("y"), VALUES)
    assert log(out.with_name("y")) == ["00", "01", "02"]


@pytest.mark.usefixtures("in_process")
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(notebooks, out):
    with locked(out / ".locks" / "run.lock", "at it"), pytest.raises(BusyError) as error:
        run(notebooks, out, VALUES)
    assert f"({os.getpid()} on " in str(error.value) and f"is running the notebooks of {out}" in str(error.value)
    assert not out.exists()
    run(notebooks, out, VALUES)
    assert not (out / ".locks").exists()


@pytest.mark.usefixtures("in_process")
def test_verify_names_what_is_not_finished_gone_or_no_folder_and_the_lost_index(tmp_path, out, capsys):
    write_notebook(tmp_path / "notebooks", "00_start", LOG.format("00"))
    run(tmp_path / "notebooks", out, VALUES)
    with Stage(out, "01_sampling", {}).recording() as first:
        first.write_rows("a", [{"n": 1}])
    with Stage(out, "02_ranking", {}, {first: ["a.jsonl"]}).recording() as second:
        second.write_rows("b", [{"n": 1}])
    assert verify(out) == 0
    with pytest.raises(ZeroDivisionError), Stage(out, "03_reward_model", {}).recording() as third:
        third.write_rows("a", [1 / len([])])
    (out / "03_reward_model" / "training").mkdir(parents=True)
    shutil.rmtree(out / "01_sampling")
    (out / "04_ppo").symlink_to("nowhere")
    (out / "05_evaluation" / "manifest.json").mkdir(parents=True)
    (out / "index.html").unlink()
    timings = json.loads((out / "timings.json").read_text())
    timings["00_start"]["files"]["x" * 5_000] = "no file has such a name"
    whole = (out / "timings.json").read_text()
    (out / "timings.json").write_text(json.dumps(timings))
    capsys.readouterr()
    assert verify(out) == 1
    (out / "timings.json").write_text(whole)
    said = capsys.readouterr().out
    for words in ("02_ranking was made from 01_sampling, which no longer exists", "03_reward_model is not finished",
                  "04_ppo is not finished", "is a folder, where a file belongs", "index.html is missing"):  # fmt: skip
        assert words in said
    run(tmp_path / "notebooks", out, VALUES)
    assert (out / "index.html").is_file() and log(out) == ["00"]


@pytest.mark.usefixtures("in_process")
def test_verify_names_what_is_damaged_and_what_is_out_of_date(tmp_path, out):
    stage = "from smlib.files.artifacts import Stage\n"
    stage += "first = Stage(RUN_DIR, '01_sampling', {})\nwith first.recording():\n"
    stage += "    first.write_rows('a', [{'n': 1}])\nsecond = Stage(RUN_DIR, '01_more', {}, {first: ['a.jsonl']})\n"
    stage += "with second.recording():\n    second.write_rows('b', [{'n': 1}])\n"
    write_notebook(tmp_path / "notebooks", "01_sampling", stage)
    run(tmp_path / "notebooks", out, VALUES)
    assert verify(out) == 0
    whole = (out / "01_more" / "b.jsonl").read_text()
    (out / "01_more" / "b.jsonl").write_text(whole.replace("1", "2"))  # of the same size
    assert verify(out) == 1
    (out / "01_more" / "b.jsonl").write_text(whole)
    shutil.rmtree(out / "01_sampling")
    with Stage(out, "01_sampling", {}).recording() as other:
        other.write_rows("a", [{"n": 2}])
    assert verify(out) == 1
    with pytest.raises(RunError, match="holds no run"):
        verify(out / "nowhere")


@pytest.mark.usefixtures("in_process")
def test_starting_after_a_missing_stage_names_the_notebook_to_run_first(notebooks, out):
    write_notebook(
        notebooks, "02_ranking", 'from smlib.files.artifacts import require\nrequire(RUN_DIR, "01_sampling")'
    )
    with pytest.raises(RunError, match=r"02_ranking stopped at cell 3 .* first run notebook 01"):
        run(notebooks, out, VALUES, first=2)


@pytest.mark.usefixtures("in_process")
def test_a_notebook_of_long_results_is_executed_only_where_it_is_named(notebooks, out):
    write_notebook(notebooks, "07_beyond", LOG.format("07"))
    write_notebook(notebooks, "08_gpu", LOG.format("08"))

    run(notebooks, out, VALUES)
    assert log(out) == ["00", "01", "02", "08"]
    run(notebooks, out, VALUES, first=2)
    assert log(out)[4:] == ["02", "08"]
    run(notebooks, out, VALUES, first=7)
    assert log(out)[6:] == ["07", "08"]
    run(notebooks, out, VALUES, first=7, last=7)
    assert log(out)[8:] == ["07"]
    run(notebooks, out, VALUES)
    assert log(out)[9:] == []  # 08 reads nothing of 07, so it is still done


@pytest.mark.usefixtures("in_process")
def test_a_refresh_leaves_a_notebook_on_request_as_it_is_until_it_is_executed(notebooks, out):
    write_notebook(notebooks, "07_beyond", 'print("seven")', parameters=PARAMETERS.replace("../runs/x", ""))
    for path in sorted(notebooks.glob("0[0-2]*")):
        write_notebook(notebooks, path.stem, 'print("other")', parameters=PARAMETERS.replace("../runs/x", ""))
    run(notebooks, out, VALUES)
    refresh(out, notebooks)
    assert (output_text(notebooks / "07_beyond.ipynb"), output_text(notebooks / "00_start.ipynb")) == ("", "other\n")
    run(notebooks, out, VALUES, first=7)
    refresh(out, notebooks)
    assert output_text(notebooks / "07_beyond.ipynb") == "seven\n"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"UPDATE": 4}, {}, "no notebook has a parameter UPDATE; --set can change none"),
        ({"SEED": "zero"}, {}, "SEED = 'zero' is not allowed: give a whole number, such as 0"),
        ({}, {"first": 7}, r"--from 7: there is no such notebook; choose one of \[0, 1, 2\]"),
        ({}, {"last": 7}, r"--to 7: there is no such notebook"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(notebooks, out, values, options, message):
    with pytest.raises(RunError, match=message):
        run(notebooks, out, VALUES | values, **options)
    assert not out.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            VALUES | {"SEED": 1},
            "holds a run with SEED = 0, and now SEED = 1 is asked for: choose another --out",
        ),
        (VALUES | {"UPDATES": 4}, r"with UPDATES = '\(not set\)', and now UPDATES = 4 is asked for"),
    ],
)
def test_a_run_folder_of_other_settings_is_refused(tmp_path, out, values, message):
    write_notebook(tmp_path / "notebooks", "00_start", LOG.format("00"), parameters=PARAMETERS + "\nUPDATES = 4")
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps(VALUES))
    with pytest.raises(RunError, match=message):
        run(tmp_path / "notebooks", out, values)
    assert os.listdir(out) == ["run.json"]


def test_a_folder_without_notebooks_is_refused(tmp_path, out):
    with pytest.raises(RunError, match="no numbered notebooks"):
        run(tmp_path, out, VALUES)


@pytest.mark.usefixtures("in_process")
def test_what_a_run_was_asked_for_is_escaped_in_the_index(tmp_path, out):
    write_notebook(tmp_path / "notebooks", "00_start", parameters=PARAMETERS + '\nNAME = "a"')
    run(tmp_path / "notebooks", out, VALUES | {"NAME": "<script>x</script>"})
    index = (out / "index.html").read_text()
    assert "<script>" not in index
    assert "&lt;script&gt;" in index


WAITING = LOG.format("01") + '\nimport time\nif not Path(RUN_DIR, "go").exists():\n    time.sleep(60)'


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_run_goes_on_where_it_was(notebooks, out, sent, code):
    write_notebook(notebooks, "01_sampling", WAITING)
    script = "import signal, sys; from smlib import cli\n"
    # a shell that starts tests in the background has them ignore Ctrl-C, which a child would inherit
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "sys.exit(cli.main(['run', '--preset', 'smoke', '--out', sys.argv[1]]))"
    # a repository with these notebooks, and this package
    (notebooks.parent / "pyproject.toml").touch()
    (notebooks.parent / "smlib").symlink_to(ROOT / "smlib")
    command = [sys.executable, "-c", script, str(out)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    there = {"cwd": notebooks.parent, "env": os.environ | {"PYTHONPATH": str(notebooks.parent)}}
    with subprocess.Popen(command, **piped, **there) as process:
        while process.poll() is None and not ((out / "log").exists() and "01" in log(out)):
            time.sleep(0.1)
        process.send_signal(sent)
        shown, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert "Traceback" not in errors
    if sent != signal.SIGKILL:
        assert "Run the same command again to resume" in errors and "Stopping: the current step may finish" in shown
    (out / "go").touch()
    assert log(out) == ["00", "01"]
    with engine(InProcess):
        run(notebooks, out, VALUES | {"PRESET": "smoke"})
    assert log(out) == ["00", "01", "01", "02"]


def test_the_command_line_refuses_in_one_line(capsys):
    assert main(["run", "--seed", "-1"]) == 1
    said = "error: --seed = -1 is not allowed: give a whole number from 0 to 4,294,967,295\n"
    assert capsys.readouterr().err == said
    for option, value, message in [
        ("--preset", "huge", "invalid choice: 'huge' (choose from 'tiny', 'smoke', 'tiny-lora', 'smollm2', "),
        ("--task", "chess", "invalid choice: 'chess' (choose from 'all', 'coin_flip', 'last_letters', "),
        ("--set", "UPDATES", "is not NAME=VALUE"),
        ("--set", "SEED=3", "has an option of its own"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["run", option, value])
        assert stopped.value.code == 2
        assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")  # newer Pythons quote no choices


TERMINAL = """
import sys
from smlib import cli
from smlib.errors import UserError
from smlib.files.atomic import BusyError, locked
from smlib.notebooks import execution
from smlib.progress import progress_bar

def data(names):
    with execution.Watch("[1/8] 01 · ½ … \\u2588 いい \\U0001d465", [12.0]):
        pass
    with progress_bar("αβγ ·", 3, "…") as bar:
        bar.update(2)
        bar.refresh()
    raise UserError("“no” · \\ud800")

cli.show_data = data
for arguments in (["--help"], ["run", "--help"], ["data"]):
    try:
        code = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == (arguments == ["data"]), code
"""


@pytest.mark.parametrize("encoding", ["euc_jp", "ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_lacks_a_character_does_not_stop_a_command(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    environment.pop("TQDM_DISABLE", None)
    done = subprocess.run([sys.executable, "-c", TERMINAL], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"error: " in done.stderr and b"[1/8] 01 " in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.parametrize("written", ["true", "True", "TRUE", "false", "False"])
def test_a_bool_may_be_written_as_shells_and_as_python_do(written, capsys):
    assert main(["settings", "tiny", "hardware", "--set", f"hardware.gradient_checkpointing={written}"]) == 0
    assert f"hardware.gradient_checkpointing = {written.title()}" in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "message"), [("epochs=0", "ppo.epochs = 0 is not"), ("lam=null", "give a number")])
def test_a_setting_that_cannot_be_is_one_line(setting, message, capsys):
    assert main(["run", "--set", f"ppo.{setting}"]) == 1
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("error: ") and shown.count("\n") == 1


@pytest.mark.usefixtures("in_process")
def test_a_parameter_has_one_form_however_it_is_written(tmp_path, out):
    write_notebook(tmp_path / "notebooks", "00_start", "print(SHARE, COUNT)", parameters="SHARE = 0.5\nCOUNT = 8")
    run(tmp_path / "notebooks", out, {"SHARE": 2, "COUNT": 2.0})
    assert "2.0 2" in output_text(out / "notebooks" / "00_start.ipynb")
    assert json.loads((out / "run.json").read_text()) == {"SHARE": 2.0, "COUNT": 2}


def error_classes(base=UserError):
    for one in base.__subclasses__():
        yield one
        yield from error_classes(one)


def test_each_error_that_a_user_can_put_right_is_one_line_and_with_debug_its_traceback(monkeypatch, capsys):
    classes = set(error_classes())
    assert (
        len(classes) >= 10
        and {training_log.CollapseError, updates.NonFiniteError, rollouts.EngineMismatchError} < classes
    )
    for kind in (*sorted(classes, key=str), PermissionError):

        def fail(*_, kind=kind):
            raise kind("too many cooks: take one")

        monkeypatch.setattr(cli, "show_data", fail)
        assert main(["data"]) == 1
        assert capsys.readouterr().err == "error: too many cooks: take one\n"
        for arguments in (["data", "--debug"], ["--debug", "data"]):
            assert main(arguments) == 1
            shown = capsys.readouterr().err
            assert "in fail" in shown and shown.endswith("error: too many cooks: take one\n")


def test_every_error_class_of_the_package_is_the_users_or_is_caught_inside():
    inner = {"Invalid", "Gone", "LuckWarning"}
    for path in sorted((ROOT / "smlib").rglob("[!_]*.py")):
        found = vars(importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))).values()
        kinds = [one for one in found if isinstance(one, type) and issubclass(one, Exception)]
        ours = {one for one in kinds if one.__module__.startswith("smlib.")}
        assert {one.__name__ for one in ours if not issubclass(one, UserError)} <= inner


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, ModuleNotFoundError, KeyError])
def test_a_bug_in_torch_keeps_its_traceback(monkeypatch, tmp_path, kind):
    def planted(*_, **__):
        raise kind("planted")

    monkeypatch.setattr(torch.nn.functional, "embedding", planted)
    with pytest.raises(kind, match="planted"):
        main(["stage", "01_sampling", "--preset", "smoke", "--task", "coin_flip", "--out", str(tmp_path)])


def test_pretrain_passes_its_options_on(monkeypatch, tmp_path):
    asked = []
    pretraining = types.SimpleNamespace(make_base=lambda out, **options: asked.append((out, options)))
    monkeypatch.setitem(sys.modules, "smlib.pretraining", pretraining)
    monkeypatch.setattr("smlib.pretraining", pretraining, raising=False)
    assert main(["pretrain", "--out", str(tmp_path / "base"), "--seed", "1"]) == 0
    ((out, options),) = asked
    assert out == tmp_path / "base" and options.pop("seed") == 1
    assert options.pop("architecture") == "llama"
    rest = {
        "task": "all",
        "documents": 150_000,
        "hidden": 128,
        "layers": 3,
        "start_from": None,
        "tokens_per_batch": 4096,
    }
    assert options == rest


def test_parameters_are_the_literals_of_the_tagged_cell():
    cells = [new_code_cell("X = 1"), new_code_cell("A = 1.5\nB = None", metadata={"tags": ["parameters"]})]
    assert parameters(new_notebook(cells=cells)) == {"A": 1.5, "B": None}
    assert parameters(new_notebook(cells=cells[:1])) == {}


def test_publish_copies_figures_and_results_and_writes_what_the_notebooks_took(tmp_path):
    files = ["figures/curve.png", "figures/curve.pdf", "results/accuracy.csv", "results/notes.txt"]
    for file in files:
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(file)
    took = {"source": "a", "parameters": {}, "seconds": 1.5, "peak_mib": 700, "cells": 3, "stages": [], "files": {}}
    (tmp_path / "run" / "timings.json").write_text(json.dumps({"00_start": took}))
    publish(tmp_path / "run", tmp_path, times=False)
    assert os.listdir(tmp_path / "results") == ["accuracy.csv"]
    publish(tmp_path / "run", tmp_path, times=True)
    assert (tmp_path / "results" / "accuracy.csv").read_text() == "results/accuracy.csv"
    assert os.listdir(tmp_path / "figures") == ["curve.png"]
    assert sorted(os.listdir(tmp_path / "results")) == ["accuracy.csv", "run_times.csv"]
    times = (tmp_path / "results" / "run_times.csv").read_text()
    assert times == "notebook,seconds,peak_mib\n00_start,1.5,700\n"


def test_refresh_puts_back_notebooks_as_if_executed_in_place(notebooks, out):
    write_notebook(notebooks, "00_start", "import os\nprint(RUN_DIR, os.getcwd())", "SEED")
    before = nbformat.read(notebooks / "00_start.ipynb", 4)
    run(notebooks, out, VALUES)
    refresh(out, notebooks)
    after = nbformat.read(notebooks / "00_start.ipynb", 4)
    assert [cell.source for cell in after.cells] == [cell.source for cell in before.cells]
    assert [cell.get("execution_count") for cell in after.cells] == [None, 1, 2, 3]
    assert output_text(notebooks / "00_start.ipynb") == "../runs/x ../notebooks\n"
    assert after.cells[3].outputs[0].execution_count == 3
    assert after.cells[1].metadata == {"tags": ["parameters"]}
    assert after.cells[2].metadata == {}
    assert "papermill" not in after.metadata
    assert after.metadata.kernelspec.name == "python3"
    assert str(out) not in (notebooks / "00_start.ipynb").read_text()
    run(notebooks, out, VALUES)
    assert log(out) == ["01", "02"]  # a refreshed notebook is the same notebook


@pytest.mark.usefixtures("in_process")
def test_refresh_refuses_a_run_that_the_parameters_cells_do_not_describe(notebooks, out):
    run(notebooks, out, VALUES | {"SEED": 1}, last=0)
    with pytest.raises(RunError, match="--refresh needs SEED = 0, as in 00_start"):
        refresh(out, notebooks)
    with pytest.raises(RunError, match="has not finished 01_sampling"):
        run(notebooks, out.with_name("y"), VALUES, last=0)
        refresh(out.with_name("y"), notebooks)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\n", "a\nb\n"),
        ("\r 10%\r100%\n", "100%\n"),
        ("\r 10%\r      \r", ""),
        ("\r 10%\r      \rdone\nnext\n", "done\nnext\n"),
        ("kept\n\r 10%\r     \r", "kept\n"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_what_carriage_returns_wrote_over_is_not_kept(tmp_path, out, text, shown):
    write_notebook(tmp_path / "notebooks", "00_start", f"print({text!r}, end='')")
    run(tmp_path / "notebooks", out, VALUES)
    refresh(out, tmp_path / "notebooks")
    assert output_text(tmp_path / "notebooks" / "00_start.ipynb") == shown


def test_data_counts_rows_and_says_what_cannot_be_used(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))
    assert main(["data", "coin_flip"]) == 1
    assert "coin_flip          cannot be used:" in capsys.readouterr().out
    assert main(["data", "coin flip"]) == 1
    assert "unknown dataset 'coin flip'; published datasets: single_eq" in capsys.readouterr().err


def test_data_counts_the_splits_that_are_there(monkeypatch, tmp_path, capsys):
    rows = json.dumps({"question": "Which?", "options": ["A)4", "B)5"], "correct": "B"}).encode()
    (tmp_path / "AQuA").mkdir()
    (tmp_path / "AQuA" / "test.json").write_bytes(rows)
    pinned = downloads.Pinned(hashlib.sha256(rows).hexdigest(), "nowhere")
    monkeypatch.setitem(downloads.FILES, "AQuA/test.json", pinned)
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))
    assert main(["data", "aqua"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"aqua {15}test 1   cannot be used: .*AQuA/train.json does not exist; SML_DATA_DIR .*", line)


@pytest.mark.skipif(not os.environ.get("SML_DATA_DIR"), reason="needs the published questions: set SML_DATA_DIR")
def test_data_prints_the_rows_of_every_split(capsys):
    assert main(["data", "gsm8k", "strategy_qa"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "gsm8k              train 7,473   test 1,319   all 8,792",
        "strategy_qa        train 1,603   test 687   all 2,290",
    ]


def test_a_notebook_that_cannot_be_read_is_named(notebooks, out):
    (notebooks / "01_sampling.ipynb").write_text("{half")
    with pytest.raises(RunError, match=r"01_sampling.ipynb cannot be read as a notebook"):
        run(notebooks, out, VALUES)


def test_a_parameter_that_is_no_literal_is_named(tmp_path, out):
    write_notebook(tmp_path / "notebooks", "00_start", parameters="SEED = len([1])")
    with pytest.raises(RunError, match="a cell tagged 'parameters' may assign only literals"):
        run(tmp_path / "notebooks", out, {"SEED": 1})
