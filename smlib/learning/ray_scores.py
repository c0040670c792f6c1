"""A reward model's scores by several workers of Ray's: `score` of `reward_model`, spread over processes."""

import os
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from smlib.learning import reward_model
from smlib.problems.datasets import Problem
from smlib.sampling import models
from smlib.sampling.ray_workers import spread, start, stop

SCORED_QUESTIONS = 64  # a batch of a worker's that scores


def score(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem],
    rationales: Sequence[str | Sequence[int]], *, workers: int, dtype: str = "float32", progress: str | None = None,
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
        arguments = (str(path), dtype, workers, tokenizer.pad_token_id)
        done = spread(_Scorer, arguments, rows, size, itemgetter("scores"), workers, progress, "question")
    finally:
        if started:
            stop()
    return reward_model.in_order(questions, keys, done)


class _Scorer:
    """A reward model in a process of its own; scores one batch of questions after the other."""

    def __init__(self, path: str, dtype: str, workers: int, pad_id: int):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.model, self.pad_id = models.load_policy(path, dtype), pad_id

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Columns number, head (ids of the question), tails (of its rationales) -> number, scores."""
        questions = list(zip(batch["head"].to_pylist(), batch["tails"].to_pylist(), strict=True))
        return pa.table(
            {"number": batch["number"], "scores": reward_model.score_ids(self.model, questions, self.pad_id)}
        )
