"""The README promises commands, files and numbers; here they are held to it."""

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


def test_its_links_lead_somewhere(readme):
    links = [link for link in re.findall(r"\]\(([^)\s#]+)", readme) if "://" not in link]
    links += re.findall(r'(?:src|href)="([^"#:]+)"', readme)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_notebooks_it_names_exist(readme):
    named = re.findall(r"\b(\d\d_\w+)\.ipynb", readme)
    assert named
    assert [name for name in named if not (ROOT / "notebooks" / f"{name}.ipynb").exists()] == []


def test_its_tables_are_those_of_the_results(readme):
    """Paste what `python -m smlib results runs/...` prints: it writes results/tiny.csv, too."""
    rows = results.read_csv(ROOT / "results" / "tiny.csv")
    for table in [*results.markdown(rows).split("\n\n"), results.explore_markdown(rows)]:
        assert table in readme


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
