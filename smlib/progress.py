"""One progress bar for everything that takes long: what, how far, how long still; on standard output, and in a notebook
as a widget."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext

from tqdm import auto, tqdm


def progress_bar(
    label: str | tqdm | None, total: int, unit: str, initial: int = 0
) -> AbstractContextManager[tqdm] | tqdm:
    """A bar that leaves nothing behind. It stays silent where label is None or TQDM_DISABLE is set (as the runner
    does, since a bar would make every executed notebook differ).

    label: a bar instead is that of the whole of which this is a part: it counts on, and stays.
    """
    if isinstance(label, tqdm):
        return nullcontext(label)
    silent = label is None or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    options = {"file": sys.stdout, "mininterval": 1, "leave": False, "disable": silent}
    return auto.tqdm(desc=label, total=total, unit=unit, initial=initial, **options)
