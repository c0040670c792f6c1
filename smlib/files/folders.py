"""Folders outside a run: of the repository or the package, and the user's, where what is fetched or made once is kept,
on machines without a home too."""

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from smlib.errors import UserError


def checkout() -> Path | None:
    """The repository that this package is part of; None where it was installed from a wheel."""
    root = Path(__file__).parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def home() -> Path:
    """The folder that has runs/ and results/: the repository, or else the one that the command was given in."""
    return checkout() or Path.cwd()


def notebooks_folder() -> Path:
    """The folder of the notebooks: the repository's, or in a wheel the copy that came with the package."""
    return (checkout() or Path(__file__).parents[1] / "course") / "notebooks"


def results_folder() -> Path:
    """The folder of the tables that ship with the notebooks, beside theirs."""
    return notebooks_folder().parent / "results"


class CacheError(UserError, OSError):
    """There is no folder to keep what is fetched or made once."""


_CACHE_OUT = "set XDG_CACHE_HOME to the absolute path of a folder that can be written"


def cache_folder() -> Path:
    """The folder, made here, of what is fetched or made once: smlib/ in XDG_CACHE_HOME, else in ~/.cache, and where
    neither can be written a private one beside the temporary files.

    As XDG's rules have it, an empty or relative XDG_CACHE_HOME counts as not set, so that nothing goes into the working
    tree. Raises CacheError where there is no such folder.
    """
    for home in cache_homes():
        if _writable(home / "smlib"):
            return home / "smlib"
    return _private_folder()


def cache_homes() -> list[Path]:
    """Where XDG's rules have caches, best first."""
    given, home = os.environ.get("XDG_CACHE_HOME", ""), _home()
    return [Path(given)] * os.path.isabs(given) + ([home / ".cache"] if home else [])


def _home() -> Path | None:
    try:
        return Path.home() if Path.home().is_absolute() else None
    except RuntimeError:  # a user whom the machine does not know
        return None


def _writable(folder: Path) -> bool:
    """Whether the folder is there, or can be made, and takes a file: permissions do not say it of every disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> Path:
    """A folder of this user's alone where all users keep temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    parent = Path(tempfile.gettempdir())
    usual = [os.environ.get(name, "/tmp") for name in ("TMPDIR", "TEMP", "TMP")]
    if parent == Path.cwd() and str(parent) not in (*usual, "/var/tmp"):  # Python's last resort
        raise CacheError(f"no folder for temporary files can be written: {_CACHE_OUT}")
    folder = parent / f"smlib-{user}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    theirs = hasattr(os, "getuid") and (found.st_uid != user or found.st_mode & 0o077)
    if theirs or folder.is_symlink() or not _writable(folder):
        raise CacheError(f"{folder} is not a folder that only this user can write to: delete it, or {_CACHE_OUT}")
    return folder


def settle_libraries() -> None:
    """Keep the libraries' files out of the working tree, and let them begin without a home. Before they are imported.

    Some take an empty or relative XDG_CACHE_HOME for a folder here, and so "~" where nobody knows the user's home;
    others fail. The hub's cache comes into ours where it is not there and cannot be made.
    """
    if not os.path.isabs(os.environ.get("XDG_CACHE_HOME") or "."):
        os.environ.pop("XDG_CACHE_HOME", None)
    with suppress(OSError):
        if _home() is None:
            os.environ["HOME"] = str(_private_folder())
        hub = cache_homes()[0] / "huggingface"
        above = next(folder for folder in hub.parents if os.path.exists(folder))
        if not os.path.isdir(hub) and not (above.is_dir() and os.access(above, os.W_OK)):
            os.environ.setdefault("HF_HOME", str(cache_folder() / "huggingface"))
