"""Where what is fetched is kept: never in the working tree, and somewhere on a machine without a home."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from smlib.files import folders
from smlib.files.folders import CacheError, cache_folder
from smlib.problems import downloads
from smlib.problems.downloads import DatasetError, read_pinned
from smlib.runs import questions
from smlib.runs.settings import preset

ROOT = Path(__file__).parents[1]
NOWHERE = "/dev/null/none"  # no user, not even root, makes a folder here


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A user with a home, a working folder and temporary files, all empty."""
    for name in ("home", "here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SML_DATA_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert os.listdir(tmp_path / "here") == []


def no_home(*_):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("given", ["", "cache", "./cache", "~/cache", NOWHERE])
def test_a_cache_that_is_not_named_by_its_whole_path_or_cannot_be_made_is_the_homes(monkeypatch, tmp_path, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == tmp_path / "home" / ".cache" / "smlib"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "smlib"


@pytest.mark.parametrize("home", [NOWHERE, "relative", None])
def test_without_a_home_a_private_folder_beside_the_temporary_files(monkeypatch, tmp_path, home):
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr(folders.Path, "home", no_home)
    folder = cache_folder()
    assert folder == tmp_path / "temporary" / f"smlib-{os.getuid()}" == cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fault", ["open", "link", "file"])
def test_a_folder_that_others_may_write_is_not_taken(monkeypatch, tmp_path, fault):
    monkeypatch.setenv("HOME", NOWHERE)
    folder = tmp_path / "temporary" / f"smlib-{os.getuid()}"
    if fault == "open":
        folder.mkdir()
        folder.chmod(0o777)
    elif fault == "link":
        folder.symlink_to(tmp_path / "home")
    else:
        folder.write_text("")
    with pytest.raises(CacheError, match="is not a folder that only this user can write to: delete it, or set XDG"):
        cache_folder()
    with pytest.raises(DatasetError, match=r"gsm8k/train.jsonl cannot be read, or there is nowhere to keep it \(/"):
        read_pinned("gsm8k/train.jsonl")
    found, missing = questions.published_problems(preset("smoke", "coin_flip"))
    assert not found and "nowhere to keep it" in missing


def test_the_working_folder_is_not_the_last_resort(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "here"))  # what Python takes where it finds no other
    with pytest.raises(CacheError, match="no folder for temporary files can be written: set XDG_CACHE_HOME"):
        cache_folder()


def test_a_filled_cache_need_not_be_one_that_can_be_written(monkeypatch, tmp_path):
    kept = tmp_path / "home" / ".cache" / "smlib" / "x.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"rows")
    pinned = downloads.Pinned(hashlib.sha256(b"rows").hexdigest(), "http://127.0.0.1:1/x.json")
    monkeypatch.setitem(downloads.FILES, "x.json", pinned)
    monkeypatch.setattr(folders, "_writable", lambda folder: False)
    assert read_pinned("x.json") == b"rows"


LIBRARIES = """
import smlib, os
from pathlib import Path
from huggingface_hub import constants
from datasets import config
import matplotlib
for folder in (Path.home(), constants.HF_HOME, config.HF_DATASETS_CACHE, matplotlib.get_cachedir()):
    assert os.path.isabs(folder), folder
print(constants.HF_HOME)
"""


@pytest.mark.parametrize("changes", [{"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "here"}, {"HOME": NOWHERE}])
def test_libraries_stay_out_of_the_working_folder(changes, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")} | changes
    environment.pop("HF_HOME", None)
    command = [sys.executable, "-c", LIBRARIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    private = tmp_path / "temporary" / f"smlib-{os.getuid()}"
    expected = private if changes.get("HOME") else tmp_path / "home" / ".cache"
    assert done.stdout.strip() == str(expected / "huggingface")


def test_a_user_whom_the_machine_does_not_know_gets_a_home(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(folders.Path, "home", lambda: Path(os.environ["HOME"]) if "HOME" in os.environ else no_home())
    folders.settle_libraries()
    assert os.environ["HOME"] == str(tmp_path / "temporary" / f"smlib-{os.getuid()}")


@pytest.mark.parametrize("changes", [{"HOME": NOWHERE}, {"XDG_CACHE_HOME": ""}])
def test_a_notebook_runs_where_the_home_cannot_be_written(changes, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")} | changes
    command = [sys.executable, "-m", "smlib", "run", "--preset", "smoke", "--task", "coin_flip", "--to", "0"]
    command += ["--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Open " in done.stdout, done.stderr
