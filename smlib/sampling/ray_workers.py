"""Work spread over processes, on one machine or many, by Ray."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import islice
from weakref import WeakSet

from tqdm import tqdm

from smlib.errors import UserError
from smlib.progress import progress_bar
from smlib.signals import handling

RETRIES = 3  # of one batch; a batch that kills every process must end in an error
# Of a processor, in Ray's books: pools share the processors, so that none waits for another to close. With 0, machines
# that were to give none would get processes, too.
CPU = 0.01
PATIENCE = 30  # seconds that a pool waits for GPUs which another one still holds


class WorkerError(UserError, RuntimeError):
    """A worker died, failed for a cause that the user can put right, or has no place in the cluster."""


class Pool:
    """So many processes, spread over the machines of a Ray cluster: the one this process is connected to, else the one
    at RAY_ADDRESS, else one on this machine, which ends when the last of its pools is closed.

    worker: a class. One worker(*arguments) is made in each process for its first batch, and stays until `close`. A
    process takes a GPU for itself, where the cluster has any; one that dies is started anew.
    """

    def __init__(self, worker: type, arguments: tuple, workers: int):
        self.worker, self.arguments, self.workers = worker, arguments, workers
        self._places, self._processes = None, []

    def start(self) -> None:
        """Start the processes, if they are not there; WorkerError where the cluster has no place for them."""
        with _own_sigterm():
            self._start()

    def _start(self) -> None:
        import ray
        from ray.util import placement_group, scheduling_strategies

        if self._processes and ray.is_initialized():  # else somebody has ended it
            return
        _connect(self)
        place = {"CPU": CPU, "GPU": 1} if ray.cluster_resources().get("GPU") else {"CPU": CPU}
        self._places = placement_group([place] * self.workers, strategy="SPREAD")
        if not self._places.wait(PATIENCE):
            self._refuse("GPU" if "GPU" in place else "CPU")
        process = ray.remote(_Process).options(
            num_cpus=CPU,
            num_gpus=place.get("GPU"),
            scheduling_strategy=scheduling_strategies.PlacementGroupSchedulingStrategy(self._places),
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        self._processes = [process.remote(self.worker, self.arguments) for _ in range(self.workers)]

    def close(self) -> None:
        """End the processes, and the Ray that was started for them; a second time does nothing."""
        import ray
        from ray.util import remove_placement_group

        places, processes = self._places, self._processes
        self._places, self._processes = None, []
        if places and ray.is_initialized():
            with suppress(ray.exceptions.ActorHandleNotFoundError):  # somebody has ended their Ray and begun another
                for process in processes:
                    ray.kill(process)
                remove_placement_group(places)
        if self in _ours:
            _ours.remove(self)
            if not _ours:
                ray.shutdown()

    def map(
        self, batches: Sequence[Sequence], arguments: tuple, progress: str | tqdm | None, unit: str, each: int = 1
    ) -> list[list]:
        """worker(batch, *arguments) for every batch: a list with one result for each of its items, which the bar
        counts as `each` units.

        Raises WorkerError for a batch on which RETRIES + 1 processes died, and for an error in a worker that the user
        can put right; RuntimeError for any other one.
        """
        with _own_sigterm():
            import ray

        results: list[list] = [[] for _ in batches]
        try:
            self.start()
            with progress_bar(progress, each * sum(map(len, batches)), unit) as bar:
                for number, found in self._done(batches, arguments):
                    results[number] = found
                    bar.update(each * len(found))
        except BaseException as error:  # Ctrl-C, too
            self.close()  # the others would go on with their batches, and the next call wait for them
            if isinstance(error, ray.exceptions.RayError):
                cause = getattr(error, "cause", error)  # what the worker raised; its traceback is in `error`
                # without a cause the worker died, most often for want of memory
                kind = WorkerError if cause is error or isinstance(cause, UserError) else RuntimeError
                raise kind(f"a worker failed: {type(cause).__name__}: {cause}") from error
            raise
        return results

    def _done(self, batches: Sequence[Sequence], arguments: tuple) -> Iterator[tuple[int, list]]:
        """(number of a batch, its results), as they come. A process gets the next batch when it is done with one."""
        import ray

        waiting, at_work = iter(enumerate(batches)), {}

        def give(process) -> None:
            for number, batch in islice(waiting, 1):
                at_work[process.work.remote(batch, arguments)] = number, process

        for process in self._processes:
            give(process)
        while at_work:
            [done], _ = ray.wait(list(at_work))
            number, process = at_work.pop(done)
            found = ray.get(done)
            give(process)  # before anybody looks at what it found
            yield number, found

    def _refuse(self, what: str) -> None:
        import ray

        there, free = (found.get(what, 0) for found in (ray.cluster_resources(), ray.available_resources()))
        self.close()
        raise WorkerError(
            f"workers = {self.workers}, and Ray found no place for them within {PATIENCE} seconds. {what}s in the "
            f"cluster: {there:g}, free: {free:g}. Lower workers, or close other engines and programs."
        )


_ours: WeakSet[Pool] = WeakSet()  # the pools in the Ray that the first of them connected to; the last one ends it


def _own_sigterm() -> AbstractContextManager:
    """Within, Ray may put handlers of its own in the place of this process's for SIGTERM, which ends with it."""
    return handling(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def _connect(pool: Pool) -> None:
    """Connect to a cluster, or start one on this machine, unless this process has one."""
    import ray

    if ray.is_initialized():
        if _ours:
            _ours.add(pool)
        return
    # It would warn that workers could not be replaced if this process lost their arguments, which it keeps.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report its use to its makers
        ray.init("local", num_cpus=pool.workers, include_dashboard=False, **quiet)
    _ours.add(pool)


class _Process:
    """What runs in a process. It makes the worker with the first batch, so that a failure to is an error of the batch:
    one while Ray starts the process would have no type of its own, and a death no end."""

    def __init__(self, worker: type, arguments: tuple):
        self.make, self.worker = partial(worker, *arguments), None

    def work(self, batch: Sequence, arguments: tuple) -> list:
        if self.worker is None:
            self.worker = self.make()
        return self.worker(batch, *arguments)
