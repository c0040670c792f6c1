"""The README promises commands, files and numbers; here they are held to it."""

import csv
import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from smlib.reports import results

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TARGETS = re.findall(r"^(\w+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture
def readme():
    return README.read_text(encoding="utf-8")


def test_its_make_commands_are_targets(readme):
    asked = re.findall(r"\bmake (?:\w+=\S+ )*(\w+)", "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL)))
    assert {"run", "test"} <= set(asked)
    assert set(asked) <= set(TARGETS)


def test_its_first_command_leaves_what_its_second_compares_the_notebooks_with():
    """`make run` wrote results/, and where another processor rounds otherwise `make test` failed after it."""
    recipe = re.search(r"^run:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert recipe.split()[1:] == ["run", "--preset", "tiny"]


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link]
    links += re.findall(r'(?:src|href)="([^"#:]+)"', text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_its_first_page_stays_short(readme):
    assert len(readme.split()) <= 900


def test_the_notebooks_it_names_exist(readme):
    named = re.findall(r"\b(\d\d_\w+)\.ipynb", readme)
    assert named
    assert [name for name in named if not (ROOT / "notebooks" / f"{name}.ipynb").exists()] == []


def test_tables_are_those_of_the_results():
    """Paste what `smlib results runs/...` prints into docs/results.md: it writes results/tiny.csv, too."""
    rows = results.read_csv(ROOT / "results" / "tiny.csv")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = [*results.markdown(rows).split("\n\n"), results.explore_markdown(rows)]
    for table in tables:
        assert table in page


def test_ci_calls_the_test_command(readme):
    script = ROOT / ".ci" / "run"
    assert "make test" in readme
    assert script.read_text().rstrip().endswith("\nmake test")
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_made(target):
    """A dry run: no missing prerequisite, no misspelt recipe."""
    shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_a_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", f"READY={tmp_path / 'ready'}", "test"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode != 0
    assert "is not Python 3.11 or newer: install one, then make PYTHON=python3.11 test" in shown.stderr


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    with (ROOT / "results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return module, list(csv.DictReader(file))


def test_the_tables_of_the_policies_are_those_of_the_results():
    policies, rows = benchmark("policies")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for names in policies.TABLES:
        assert policies.markdown(rows, names) in page
    with (ROOT / "results" / "policy_seconds.csv").open(newline="", encoding="utf-8") as file:
        assert policies.seconds_markdown(list(csv.DictReader(file))) in page


def test_the_tables_of_the_controls_are_those_of_the_results(readme):
    controls, rows = benchmark("controls")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for columns in controls.TABLES:
        assert controls.markdown(rows, columns) in page
    # the README's own table: greedy and at temperature 1, without the lines about base and control against SFT
    lines = controls.markdown(rows, [controls.TABLES[0][0], controls.TABLES[0][2]]).splitlines()[2:]
    cells = [line.split(" | ")[1:] for number, line in enumerate(lines) if number not in (4, 6)]
    own = [line for line in readme[readme.index("## Results") :].splitlines() if line.startswith("|")]
    assert [line.split(" | ")[1:] for line in own[2 : 2 + len(cells)]] == cells
    told = " ".join(readme.split())
    equal = controls.markdown(rows, [("equal", controls.MEAN, 1.0, controls.EQUAL)]).splitlines()
    control, more = (line.split(" | ")[1].strip(" |").replace("+", "") for line in equal[-2:])
    assert f"it is {control} points above SFT, and SML is {more} above the control." in told


def test_the_real_model_s_gain_is_that_of_the_results(readme):
    with (ROOT / "results" / "smollm2.csv").open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if (row["temperature"], row["metric"]) == ("0.0", "right")]
    seed = "all" if any(row["seed"] == "all" for row in found) else "0"
    rows = {(row["method"], row["task"]): row for row in found if row["seed"] == seed}
    value, low, high = (100 * float(rows["SFT minus base", "all questions"][name]) for name in ("value", "low", "high"))
    base, tuned = (f"{100 * float(rows[name, 'all questions']['value']):.1f} %" for name in ("base", "SFT"))
    told = " ".join(readme.split())
    assert f"no significant difference ({value:+.1f} [{low:+.1f}, {high:+.1f}] points" in told and low < 0
    assert f"are {tuned} right; the base's, with eight exemplars, {base}:" in told


def test_the_tables_of_the_reward_models_are_those_of_the_results():
    reward_models, rows = benchmark("reward_models")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for table in (reward_models.markdown, reward_models.by_writer, reward_models.by_pairs, reward_models.of_kinds):
        assert table(rows) in page
    assert f"held out from training, {reward_models.of_held_out(rows)}" in " ".join(page.split())


def test_the_table_of_the_bases_is_that_of_the_results():
    bases, rows = benchmark("bases")
    assert bases.markdown(rows) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_table_of_related_work_is_that_of_the_results():
    neighbours, rows = benchmark("neighbours")
    assert neighbours.markdown(rows) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_table_of_the_rounds_is_that_of_the_results():
    rounds, rows = benchmark("rounds")
    assert rounds.markdown(rows, 3) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
