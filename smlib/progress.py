"""One progress bar for everything that takes long: what, how far, how long still; on standard output."""

import os
import sys

from tqdm import tqdm


def progress_bar(label: str | None, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar that leaves nothing behind. It stays silent where label is None or TQDM_DISABLE is set (as the runner
    does, since a bar would make every executed notebook differ)."""
    silent = label is None or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    options = {"file": sys.stdout, "mininterval": 1, "leave": False, "disable": silent}
    return tqdm(desc=label, total=total, unit=unit, initial=initial, **options)
