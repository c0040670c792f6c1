"""What a test sees of the processes below its own."""

import psutil


def children() -> set[psutil.Process]:
    """Those that live, without Python's own tracker of what they share, which stays to the end."""
    found = set()
    for one in psutil.Process().children(recursive=True):
        try:
            if one.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(one.cmdline()):
                found.add(one)
        except psutil.Error:  # it ended meanwhile
            continue
    return found
