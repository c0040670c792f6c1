"""A reward model's scores by several workers of Ray's: `score` of `reward_model`, spread over processes."""

import os
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from smlib.learning import reward_model
from smlib.problems.datasets import Problem
from smlib.sampling import models
from smlib.sampling.ray_workers import Pool

SCORED_QUESTIONS = 64  # a batch of a worker's that scores


def score(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem],
    rationales: Sequence[str | Sequence[int]], *, workers: int, dtype: str = "float32", progress: str | None = None,
) -> list[float]:  # fmt: skip
    """`reward_model.score` of the model in a folder, on so many workers, which end with the call: a stage makes one.

    The rationales of a question go to one worker, which reads it once. Errors are those of `RayEngine.sample_ids`.
    """
    questions, keys = reward_model.by_question(tokenizer, problems, rationales)
    heads = [one for _, one in questions]
    if not heads:
        return []
    size = min(SCORED_QUESTIONS, -(-len(heads) // workers))
    batches = [heads[first : first + size] for first in range(0, len(heads), size)]
    with closing(Pool(_Scorer, (str(path), dtype, workers, tokenizer.pad_token_id), workers)) as pool:
        done = list(chain(*pool.map(batches, (), progress, "question")))
    return reward_model.in_order(questions, keys, done)


class _Scorer:
    """A reward model in a process of its own; scores one batch of questions after the other."""

    def __init__(self, path: str, dtype: str, workers: int, pad_id: int):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.model, self.pad_id = models.load_policy(path, dtype), pad_id

    def __call__(self, batch: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """Scores of the rationales of each question: (its ids, those of its rationales)."""
        return reward_model.score_ids(self.model, batch, self.pad_id)
