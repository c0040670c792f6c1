"""A handler for a signal, for as long as a block runs."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def handling(number: int, handler) -> Iterator[None]:
    """Within, that handler for a signal; where Python lets no handler be set, outside the main thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
