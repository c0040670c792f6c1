"""One notebook, executed by papermill: measured, interrupted with patience, and made a page."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import papermill
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines

from smlib.errors import UserError
from smlib.notebooks import pages
from smlib.signals import handling

KERNEL_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads and a fork in the same process warn and may hang
    "TQDM_DISABLE": "1",  # progress bars would make every run's notebooks differ; the runner shows its own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # of TRL, beside a vLLM that it was not tested with and that it does not use here
    "PYTHONWARNINGS": "ignore:TRL currently supports vLLM",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


PATIENCE = 600  # seconds for an interrupted notebook to save what it was at


class RunError(UserError):
    """A run that cannot start or go on; the message names the fault and the way out."""


class WatchedEngine(NBClientEngine):
    """papermill's own engine, which lets the watch see the cells that it executes."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, watch, **kwargs):
        watch.cells = nb_man.nb.cells
        return super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=Kernel, **kwargs)


class Kernel(AsyncKernelManager):
    """jupyter's own, which is to be found, so that one that is interrupted gets more time than one that has failed."""

    latest: "Kernel | None" = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Kernel.latest = self


ENGINE = "smlib"
papermill_engines.register(ENGINE, WatchedEngine)


def execute(source: Path, target: Path, values: dict, watch: "Watch") -> None:
    """Execute one notebook in its own folder, with the interpreter and the packages that run this command."""
    os.environ.update(KERNEL_ENVIRONMENT)
    here = str(Path(sys.prefix, "share", "jupyter"))  # before any kernel that a user has registered elsewhere
    if here not in os.environ.get("JUPYTER_PATH", "").split(os.pathsep):
        os.environ["JUPYTER_PATH"] = here + os.pathsep + os.environ.get("JUPYTER_PATH", "")
    try:
        with _announced(signal.SIGINT), _announced(signal.SIGTERM):
            papermill.execute_notebook(
                source,
                target,
                values,
                engine_name=ENGINE,
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=False,
                watch=watch,
                extra_arguments=["--log-level=50"],  # the kernel's own log is not for the reader
            )
    except papermill.PapermillExecutionError as error:
        cell = error.cell_index + (0 if values else 1)  # counted from 1, without the cell papermill put in
        raise RunError(
            f"notebook {source.stem} stopped at cell {cell} (In [{error.exec_count}]) with "
            f"{error.ename}: {error.evalue}\n"
            f"It is saved, up to that cell, in {target}. Once the cause is fixed, the same command resumes here."
        ) from None
    except DeadKernelError:
        raise RunError(
            f"notebook {source.stem}: its Python process died at cell {watch.cell}, having used up to "
            f"{watch.peak:.0f} MiB. If memory ran out, close other programs or choose a smaller preset."
        ) from None
    except (RuntimeError, NoSuchKernel) as error:
        if not str(error).startswith(("Kernel d", "No such kernel")):  # jupyter_client has no class of its own for it
            raise
        raise RunError(
            f"notebook {source.stem}: its Python process did not start ({error}). If the machine is busy, run the "
            f"same command again; else look for the cause with: {sys.executable} -m ipykernel_launcher"
        ) from error
    finally:
        if target.exists():
            pages.write_page(target)


@contextmanager
def _announced(number: int) -> Iterator[None]:
    """Within, the signal says before it is handled that its end may take some time."""

    def handler(*arguments):
        print(f"\nStopping: the current step may finish and be saved first. {again} again stops at once.", flush=True)
        if Kernel.latest:
            Kernel.latest.shutdown_wait_time = 2 * PATIENCE  # it takes half of it before SIGTERM
        before(*arguments)

    again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    before = signal.getsignal(number)
    with handling(number, handler) if callable(before) else nullcontext():
        yield


class Watch:
    """Beside a running notebook: measures time and memory, shows the running cell on a terminal.

    left: seconds that this notebook and those after it took in an earlier run, None where unknown.
    """

    def __init__(self, label: str, left: list[float | None]):
        self.label, self.left = label, left
        self.cells, self.peak, self.started = [], 0.0, time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self):
        if not sys.stdout.isatty():
            print(f"{self.label}{self._time_left()}", flush=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{start}{self.label} · {clock(self.seconds)} · {self.peak:.0f} MiB", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def cell(self) -> int:
        """Number of the running cell, from 1; 0 before the first."""
        states = [cell.metadata.get("papermill", {}).get("status") for cell in list(self.cells)]
        return sum(state in ("running", "completed", "failed") for state in states)

    def measured(self) -> dict:
        return {"seconds": round(self.seconds, 1), "peak_mib": round(self.peak), "cells": len(self.cells)}

    def _poll(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, _children_mib())
            if sys.stdout.isatty():
                state = f"cell {self.cell}/{len(self.cells)} · {clock(self.seconds)} · {self.peak:.0f} MiB"
                line = f"{self.label} · {state}{self._time_left()}"
                print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _time_left(self) -> str:
        if None in self.left:
            return ""
        seconds = max(0, self.left[0] - self.seconds) + sum(self.left[1:])
        return f" · about {clock(seconds)} left"


def _children_mib() -> float:
    """Resident memory of the processes below this one, in MiB; pages they share count in each."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total / 2**20


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
