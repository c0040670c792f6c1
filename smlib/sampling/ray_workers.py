"""Work spread over processes, on one machine or many, by Ray Data."""

import logging
import os
import warnings
from collections.abc import Callable

from smlib.errors import UserError
from smlib.progress import progress_bar

RETRIES = 3  # of one batch; a batch that kills every worker must end in an error


class WorkerError(UserError, RuntimeError):
    """A worker died, or failed for a cause that the user can put right."""


def start(workers: int) -> bool:
    """Connect to a cluster, or start one on this machine; whether it was not there before."""
    import ray

    if ray.is_initialized():
        return False
    # It would warn that workers could not be replaced if this process lost their arguments, which it keeps.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report its use to its makers
        ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
    return True


def stop() -> None:
    import ray

    ray.shutdown()


def spread(
    worker: type, arguments: tuple, rows: list[dict], size: int, read: Callable[[dict], list], workers: int,
    progress: str | None, unit: str,
) -> list[list]:  # fmt: skip
    """What so many workers make of the rows, `size` at a time.

    worker: a class. One of worker(*arguments) is made in each process, and called with tables of rows it returns tables
    of theirs; in both a row has its "number", which is its place in the result. read(row): what is kept of theirs.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, and the bar is ours
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size))
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.raise_original_map_exception = True
    dataset.context.execution_no_progress_timeout_s = -1  # else a batch may take half an hour at most
    with warnings.catch_warnings(action="ignore", category=ray.util.annotations.RayDeprecationWarning):
        dataset = dataset.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=None,  # a whole block
            batch_format="pyarrow",
            # A batch that waited behind another one could not go to a worker that has nothing left to do.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=1 if ray.cluster_resources().get("GPU") else None,
            max_task_retries=RETRIES,  # without it there is no limit; deprecated before it has a successor
        )

    results: list[list | None] = [None] * len(rows)
    with progress_bar(progress, len(rows), unit) as bar:
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    if results[row["number"]] is not None:
                        raise RuntimeError(f"the results of {unit} {row['number']} came twice")
                    results[row["number"]] = read(row)
                bar.update(batch.num_rows)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)  # what the worker raised; its traceback is in `error`
            # without a cause the worker died, most often for want of memory
            kind = WorkerError if cause is error or isinstance(cause, UserError) else RuntimeError
            raise kind(f"a worker failed: {type(cause).__name__}: {cause}") from error
    if None in results:
        raise RuntimeError(f"the results of {results.count(None)} of {len(rows)} {unit}s did not come")
    return results
