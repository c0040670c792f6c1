"""Sampling and scoring spread over worker processes, on one machine or many, by Ray Data.

    with RayEngine("tiny", workers=2) as engine:
        engine.sample(prompts, n=8, keys=keys, temperature=0.7, max_new_tokens=128, seed=0)
    score("runs/x/03_reward_model/model", problems, texts, workers=2)

Each worker holds an engine, or a reward model, of its own and takes batch after batch. If its process dies, Ray starts
another one, which does that batch anew: the same samples, since their random numbers depend on (seed, key, number)
only, and the same scores, up to rounding.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from smlib import models, reward_model
from smlib.declared import Processes, Rows, checked
from smlib.engines import ENGINES, Engine, make_engine
from smlib.errors import UsageError, UserError
from smlib.problems import Problem
from smlib.progress import progress_bar
from smlib.sampling import MAX_BATCH, Sample, check_drawing, check_lengths

RETRIES = 3  # of one batch; a batch that kills every worker must end in an error
SCORED_QUESTIONS = 64  # a batch of a worker's that scores


class WorkerError(UserError, RuntimeError):
    """A worker died, or failed for a cause that the user can put right."""


class RayEngine(Engine):
    """Engines on `workers` processes of a Ray cluster: the one this process is connected to, else the one at
    RAY_ADDRESS, else one on this machine that `close`, or leaving the `with` block, ends.

    base:    "tiny", a folder (there on every machine) or a hub id.
    inner:   the engine of a worker, "native" or "vllm". A worker takes one processor of the cluster, and a GPU, if
             there are any.
    weights, cache_tokens, cuda_graphs, prompt: of the workers' engines, as in `engines.make_engine`.
    rows:    samples that a worker draws together. A worker that dies loses as many.

    Every call of `sample` or `sample_ids` starts its workers anew, which takes tens of seconds: give it many prompts.
    """

    shard = 4_096  # a call takes long to begin

    def __init__(
        self,
        base: str,
        workers: int = 2,
        inner: str = "native",
        weights: str | None = None,
        rows: int = MAX_BATCH,
        cache_tokens: int = 0,
        cuda_graphs: bool = False,
        prompt: str = "plain",
    ):
        if inner not in ENGINES:
            raise UsageError(f"inner is {inner!r}, but must be one of: {', '.join(ENGINES)}.")
        checked("workers", workers, Processes, 1)
        checked("rows", rows, Rows, MAX_BATCH)
        self.base, self.workers, self.inner, self.rows = base, workers, inner, rows
        self.held = {"weights": weights, "rows": rows, "cache_tokens": cache_tokens, "cuda_graphs": cuda_graphs}
        self.held["prompt"] = prompt
        self.name = inner  # the samples are those of the inner engine, whatever the number of workers
        self.tokenizer = models.load_tokenizer(base, prompt)
        adapter = models.adapter_config(base)
        config = models.load_config(adapter.base_model_name_or_path if adapter else base)
        self.limit = getattr(config, "max_position_embeddings", None)
        self._started = False

    def close(self) -> None:
        """End the Ray that this engine started, if it did."""
        if self._started:
            _stop()
            self._started = False

    def sample_ids(
        self,
        prompt_ids,
        n,
        *,
        keys,
        temperature,
        max_new_tokens,
        seed,
        top_p=1.0,
        top_k=0,
        stop=(),
        first=0,
        until=None,
        progress=None,
    ) -> list[list[Sample]]:
        """As `sampling.sample_ids`. With the inner engine "native" it draws the same samples, up to float rounding.

        until: is sent to the workers and called there, on a copy of all that it refers to; what it changes in its
            copy stays there.

        Raises ValueError for bad arguments and TypeError for an `until` that cannot be sent, before anything starts;
        RuntimeError for an error in a worker, and for a batch on which RETRIES + 1 worker processes died.
        """
        check_drawing(n, temperature, max_new_tokens, top_p, top_k, stop, keys, first, seed, len(prompt_ids))
        check_lengths(prompt_ids, keys, max_new_tokens, self.limit)
        if not prompt_ids:
            return []

        import ray

        drawing = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "top_p": top_p}
        drawing |= {"top_k": top_k, "stop": tuple(stop), "first": first}
        try:
            ray.cloudpickle.dumps(until)
        except Exception as error:
            raise TypeError(f"until is sent to the workers, but cannot be pickled: {error}") from error
        self._start()
        # Prompts of similar length share a batch, so that little is padded. With `until`, a prompt is one row.
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
        size = min(self.rows if until else max(1, self.rows // n), -(-len(prompt_ids) // self.workers))
        rows = [{"number": i, "ids": list(prompt_ids[i]), "key": keys[i]} for i in order]
        arguments = (self.base, self.inner, self.held, self.workers, drawing, until)
        return _spread(_Worker, arguments, rows, size, _samples, self.workers, progress, "prompt")

    def _start(self) -> None:
        self._started |= start(self.workers)


def score(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem],
    rationales: Sequence[str | Sequence[int]], *, workers: int, weights: str = "float32", progress: str | None = None,
) -> list[float]:  # fmt: skip
    """`reward_model.score` of the model in a folder, on so many workers; they load it anew for every call.

    The rationales of a question go to one worker, which reads it once. Errors are those of `RayEngine.sample_ids`.
    """
    questions, keys = reward_model.by_question(tokenizer, problems, rationales)
    rows = [{"number": number, "head": head, "tails": tails} for number, (_, (head, tails)) in enumerate(questions)]
    if not rows:
        return []
    started = start(workers)
    try:
        size = min(SCORED_QUESTIONS, -(-len(rows) // workers))
        arguments = (str(path), weights, workers, tokenizer.pad_token_id)
        done = _spread(_Scorer, arguments, rows, size, itemgetter("scores"), workers, progress, "question")
    finally:
        if started:
            _stop()
    return reward_model.in_order(questions, keys, done)


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


def _stop() -> None:
    import ray

    ray.shutdown()


def _spread(
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


def _samples(row: dict) -> list[Sample]:
    return [
        Sample(one["text"], tuple(one["token_ids"]), tuple(one["logprobs"]), one["finish_reason"])
        for one in row["samples"]
    ]


class _Worker:
    """An engine in a process of its own; draws for one batch of prompts after the other."""

    def __init__(self, base: str, inner: str, held: dict, workers: int, drawing: dict, until):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.engine = make_engine(inner, base, **held)
        self.drawing, self.until = drawing, until

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns number, ids, key -> number, samples (Arrow lists of structs, exact to the last bit)."""
        numbers, prompt_ids, keys = (batch[name].to_pylist() for name in ("number", "ids", "key"))
        until = self.until and (lambda i, newest: self.until(numbers[i], newest))
        found = self.engine.sample_ids(prompt_ids, keys=keys, until=until, **self.drawing)
        return pa.table({"number": numbers, "samples": [list(map(asdict, samples)) for samples in found]})


class _Scorer:
    """A reward model in a process of its own; scores one batch of questions after the other."""

    def __init__(self, path: str, weights: str, workers: int, pad_id: int):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.model, self.pad_id = models.load_policy(path, weights), pad_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns number, head (ids of the question), tails (of its rationales) -> number, scores."""
        questions = list(zip(batch["head"].to_pylist(), batch["tails"].to_pylist(), strict=True))
        return pa.table(
            {"number": batch["number"], "scores": reward_model.score_ids(self.model, questions, self.pad_id)}
        )
