"""One set of pins in three files: requirements.lock, environment.yml (the same) and pyproject.toml (some)."""

import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from smlib import gguf_models

ROOT = Path(__file__).parents[1]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    found = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), f"{line!r} is not NAME==VERSION"
        name, pinned = line.split("==")
        found[canonicalize_name(name)] = pinned
    return found


def test_conda_users_get_the_pins_of_the_lock():
    from_pip = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert from_pip == [LOCK]


def test_conda_gives_a_python_that_the_package_allows():
    (python,) = [entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python=")]
    assert python.removeprefix("python=") in Requirement("python" + PROJECT["requires-python"]).specifier


def test_what_the_package_asks_for_is_in_the_lock():
    asked = pins(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    locked = pins(LOCK)
    assert {name: locked.get(name) for name in asked} == asked
    assert locked["torch"] == "2.13.0"


def test_the_real_model_s_pins_are_those_of_its_extra():
    lines = [line.split(" --hash")[0] for line in (ROOT / "requirements-real.lock").read_text().splitlines()]
    found = pins(line for line in lines if not line.startswith("#"))
    assert found == pins(PROJECT["optional-dependencies"]["real"])
    assert all(f"{name}=={pinned}" in gguf_models.INSTALL for name, pinned in found.items())


def test_no_package_is_locked_twice():
    assert len(pins(LOCK)) == len(LOCK)


@pytest.mark.skipif(not Path(sys.prefix, ".ready").exists(), reason="not the environment that make built")
def test_this_environment_is_the_locked_one():
    locked = pins(LOCK)
    assert {name: version(name).split("+")[0] for name in locked} == locked
