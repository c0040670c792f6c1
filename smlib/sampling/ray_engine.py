"""Sampling spread over worker processes, on one machine or many, by Ray.

    with RayEngine("tiny", workers=2) as engine:
        engine.sample(prompts, 8, SamplingParams(temperature=0.7, max_new_tokens=128, seed=0), keys=keys)

Each worker holds an engine of its own and takes batch after batch. If its process dies, Ray starts another one, which
does that batch anew: the same samples, since their random numbers depend on (seed, key, number) only.
"""

import os
from itertools import chain

import torch

from smlib.declared import Processes, Rows, checked
from smlib.errors import UsageError
from smlib.sampling import models
from smlib.sampling.engines import ENGINES, Engine
from smlib.sampling.limits import MAX_BATCH
from smlib.sampling.local_engines import local_engine
from smlib.sampling.params import Sample, SamplingParams, check_request
from smlib.sampling.ray_workers import Pool


class RayEngine(Engine):
    """Engines on `workers` processes of a Ray cluster: the one this process is connected to, else the one at
    RAY_ADDRESS, else one on this machine, which ends when the last such engine is closed.

    base:    "tiny", a folder (there on every machine) or a Hub id.
    inner:   the engine of a worker, "native" or "vllm". A worker takes a GPU for itself, if the cluster has any. The
             processors are shared: more workers than there are of them gain nothing.
    dtype, cache_tokens, prompt: of the workers' engines, as in `factory.make_engine`.
    max_batch: samples that a worker draws together. A worker that dies loses as many.

    The first call of `sample` or `sample_ids` starts the workers, which takes tens of seconds. They stay until `close`,
    or until an error or Ctrl-C ends a call; the next one starts others.
    """

    shard = 4_096  # at the end of each call workers wait for the last one

    def __init__(
        self,
        base: str,
        workers: int = 2,
        inner: str = "native",
        dtype: str | None = None,
        max_batch: int = MAX_BATCH,
        cache_tokens: int = 0,
        prompt: str = "plain",
    ):
        if inner not in ENGINES:
            raise UsageError(f"inner is {inner!r}, but must be one of: {', '.join(ENGINES)}")
        checked("workers", workers, Processes, 1)
        checked("max_batch", max_batch, Rows, MAX_BATCH)
        self.workers, self.max_batch = workers, max_batch
        engine_kwargs = {"dtype": dtype, "max_batch": max_batch, "cache_tokens": cache_tokens, "prompt": prompt}
        self.name = inner  # the samples are those of the inner engine, whatever the number of workers
        self.tokenizer = models.load_tokenizer(base, prompt)
        self.limit = getattr(models.load_config(base), "max_position_embeddings", None)
        self._pool = Pool(_Worker, (base, inner, engine_kwargs, workers), workers)

    def start(self) -> None:
        """Start the workers now, and Ray where none is running; else the first samples do."""
        self._pool.start()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def sample_ids(self, prompt_ids, n, params, *, keys, first=0, progress=None) -> list[list[Sample]]:
        """As `sampler.sample_ids`. With the inner engine "native" it draws the same samples, up to float rounding.

        Raises ValueError for bad arguments, before anything starts; RuntimeError for an error in a worker, and for a
        batch on which RETRIES + 1 worker processes died; WorkerError, one of its kind, where the cluster has too few
        GPUs free.
        """
        check_request(prompt_ids, n, params, keys, first, self.limit)
        if not prompt_ids:
            return []
        # Prompts of similar length share a batch, so that little is padded.
        order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
        size = min(max(1, self.max_batch // n), -(-len(prompt_ids) // self.workers))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        given = [[(list(prompt_ids[i]), keys[i]) for i in batch] for batch in batches]
        found = self._pool.map(given, (n, params, first), progress, "sample", each=n)
        drawn = dict(zip(chain(*batches), chain(*found), strict=True))
        return [drawn[i] for i in range(len(prompt_ids))]


class _Worker:
    """An engine in a process of its own; draws for one batch of prompts after the other."""

    def __init__(self, base: str, inner: str, engine_kwargs: dict, workers: int):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.engine = local_engine(inner, base, **engine_kwargs)

    def __call__(
        self, batch: list[tuple[list[int], str]], n: int, params: SamplingParams, first: int
    ) -> list[list[Sample]]:
        """The samples of each prompt (its ids and key) of a batch."""
        prompt_ids, keys = zip(*batch, strict=True)
        return self.engine.sample_ids(list(prompt_ids), n, params, keys=list(keys), first=first)
