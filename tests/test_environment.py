"""One set of pins in three files: requirements.lock, environment.yml (the same) and pyproject.toml (some)."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from smlib.sampling import gguf_models

ROOT = Path(__file__).parents[1]
LOCK = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def pins(lines):
    found = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), f"{line!r} is not NAME==VERSION"
        name, pinned = line.split("==")
        found[canonicalize_name(name)] = pinned
    return found


def locked_in(name):
    """The pins of a lock file, without its hashes."""
    lines = [line.split(" --hash")[0] for line in (ROOT / name).read_text().splitlines()]
    return pins(line for line in lines if not line.startswith("#"))


def test_conda_users_get_the_pins_of_the_lock():
    from_pip = [entry["pip"] for entry in CONDA if isinstance(entry, dict)]
    assert from_pip == [LOCK]


def test_conda_gives_a_python_that_the_package_allows():
    (python,) = [entry for entry in CONDA if isinstance(entry, str) and entry.startswith("python=")]
    assert python.removeprefix("python=") in Requirement("python" + PROJECT["requires-python"]).specifier


@pytest.mark.parametrize("lock", [path.name for path in sorted(ROOT.glob("requirements*.lock"))])
def test_every_pin_allows_the_oldest_python_that_the_package_does(lock):
    """Debian 12 has 3.11.2, and a package that wants 3.11.5 ended the installation there. Those of a lock that are not
    installed here are not looked at."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    refused = {}
    for name, pinned in locked_in(lock).items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        if found["Version"] == pinned and oldest not in SpecifierSet(found["Requires-Python"] or ""):
            refused[name] = found["Requires-Python"]
    assert not refused, f"not installed by Python {oldest}: {refused}"


def test_what_the_package_asks_for_is_in_the_lock():
    extras = PROJECT["optional-dependencies"]
    asked = pins(PROJECT["dependencies"] + extras["notebooks"] + extras["dev"])
    locked = pins(LOCK)
    assert {name: locked.get(name) for name in asked} == asked
    assert locked["torch"] == "2.13.0"


def test_the_browser_s_pins_have_those_of_its_extra():
    found = locked_in("requirements-browser.lock")
    assert found.items() >= pins(PROJECT["optional-dependencies"]["browser"]).items()


def test_the_real_model_s_pins_are_those_of_its_extra():
    found = locked_in("requirements-real.lock")
    assert found == pins(PROJECT["optional-dependencies"]["real"])
    assert all(f"{name}=={pinned}" in gguf_models.INSTALL for name, pinned in found.items())


DISTRIBUTIONS = {"bs4": "beautifulsoup4", "yaml": "PyYAML"}  # of modules that have another name
EXTRAS = {
    "notebooks": ["smlib/notebooks", "smlib/reports/plots.py", "smlib/reports/wording.py"],
    "ray": ["ray_engine.py", "ray_workers.py", "ray_s"],
}


def third_party() -> dict[str, set[str]]:
    """module -> our files that import it, at their top or in a function."""
    found = {}
    for path in sorted((ROOT / "smlib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in {name.split(".")[0] for name in names} - {"smlib", *sys.stdlib_module_names}:
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_import_of_the_package_is_declared_where_it_is_needed():
    """A dependency, or of an extra where its files alone import it; vLLM has an environment of its own."""
    needed, extras = set(), {name: set() for name in EXTRAS}
    for module, files in third_party().items():
        distribution = canonicalize_name(DISTRIBUTIONS.get(module, module))
        homes = [extra for extra, places in EXTRAS.items() if all(any(p in f for p in places) for f in files)]
        if module != "vllm":
            (extras[homes[0]] if homes else needed).add(distribution)
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert needed <= declared
    assert declared - needed == {"antlr4-python3-runtime"}  # latex2sympy2_extended wants one of its versions
    for extra, names in extras.items():
        lines = PROJECT["optional-dependencies"][extra]
        assert names <= {canonicalize_name(Requirement(line).name) for line in lines} | declared, extra


def test_every_room_is_in_the_wheel():
    packages = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "smlib").rglob("*.py")}
    assert set(SETUPTOOLS["packages"]) == packages | set(SETUPTOOLS["package-dir"])
    assert set(SETUPTOOLS["package-dir"].values()) == {"notebooks", "results"}


@pytest.mark.slow
def test_a_wheel_runs_the_notebooks_in_the_folder_that_one_is_in(tmp_path):
    source, target, here = (tmp_path / name for name in ("source", "target", "here"))
    for name in ("smlib", "notebooks", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    here.mkdir()
    pip = [sys.executable, "-m", "pip"]
    recent = Version(version("setuptools")) >= Version("77") if find_spec("setuptools") else False
    build = [*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source, *["--no-build-isolation"] * recent]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True)

    def installed() -> set[Path]:
        return {path for path in target.rglob("*") if "__pycache__" not in path.parts}

    whole, environment = installed(), os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, target / "bin" / "smlib"]
    arguments = ["run", "--preset", "smoke", "--task", "coin_flip", "--to", "1"]
    done = subprocess.run([*command, *arguments], cwd=here, env=environment, capture_output=True, text=True)
    run = here / "runs" / "smoke-coin_flip-seed0"
    assert done.returncode == 0 and f"Open {run / 'index.html'}" in done.stdout, done.stdout + done.stderr
    assert list(json.loads((run / "timings.json").read_text())) == ["00_start_here", "01_sampling"]
    assert json.loads((run / "01_sampling" / "manifest.json").read_text())["code"] == PROJECT["version"]
    assert installed() == whole, "nothing was written beside the package"
    done = subprocess.run([*command, "run", "--refresh"], cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "run them in a clone of it" in done.stderr


def test_no_package_is_locked_twice():
    assert len(pins(LOCK)) == len(LOCK)


@pytest.mark.skipif(not Path(sys.prefix, ".ready").exists(), reason="not the environment that make built")
def test_this_environment_is_the_locked_one():
    locked = pins(LOCK)
    assert {name: version(name).split("+")[0] for name in locked} == locked
