"""What the person who runs a command can put right. The command line prints it in one line, without a traceback.

Every class here and every error class of smlib derives from `UserError`, and from the built-in class whose place it
takes. Its message names the value, what is allowed, and the way out. Any other exception is a bug and keeps its
traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the code is wrong: a value, a file, a machine, a training that fails."""


class UsageError(UserError, ValueError):
    """A value that is not allowed."""


class ModelError(UserError, OSError):
    """A model that cannot be loaded; the message names the way out."""


class MissingLibrary(UserError, ModuleNotFoundError):
    """A library that is not part of the plain installation."""


@contextmanager
def of_extra(extra: str) -> Iterator[None]:
    """Imports within need an extra of this package; MissingLibrary says which where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingLibrary) or (error.name or "").split(".")[0] in ("", "smlib"):
            raise
        raise MissingLibrary(f"{error.name} is not installed: pip install 'smlib[{extra}]'") from error
