"""A sheet of rationales for a reader to judge, and how far two judges agree.

A judge says of every rationale whether it is sound, right in the answer and in every step:

    rows = draw(problems, answers, 60, seed=0)  # question, rationale, and what programs say of it
    mine = read_verdicts("ynnyy ...", len(rows))  # a reader's, one letter for each rationale
    value, low, high = kappa(mine, [row["sound"] for row in rows])
"""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from smlib.declared import Questions, checked
from smlib.errors import UsageError
from smlib.problems.datasets import Problem, with_options
from smlib.problems.prompts import split_answer
from smlib.problems.steps import is_sound, knows
from smlib.reports.evaluation import Answers

VERDICTS = {"y": True, "n": False}
DRAWS = 10_000  # of the bootstrap


def draw(problems: Sequence[Problem], answers: Sequence[Answers], n: int, seed: int) -> list[dict]:
    """n samples of a model for a sheet, of each dataset as many, and of every question at most one.

    problems: those of `answers`, which are rows of stage 05, in the same order. A row has number (from 1), id, dataset,
    question with its options, rationale (with its answer sentence), right (its answer, by the checker), sound (every
    step too, by the step checker; None of a task that it does not know) and score (by the reward model; None without
    one). Raises ValueError where there are too few questions.
    """
    checked("n", n, Questions)
    rng, pools = random.Random(f"sheet/{seed}"), defaultdict(list)
    for problem, answer in zip(problems, answers, strict=True):
        pools[problem.dataset].append((problem, answer))
    if not pools:
        raise UsageError("a sheet needs questions, got none: give the rows of a finished stage 05")
    each, odd = divmod(n, len(pools))
    fewest = min(len(pool) for pool in pools.values())
    if odd or fewest < each:
        raise UsageError(
            f"n = {n} is not allowed: give a multiple of the {len(pools)} datasets, at most {fewest * len(pools)}"
        )
    rows = []
    for problem, answer in (one for pool in pools.values() for one in rng.sample(pool, each)):
        place = rng.randrange(len(answer["sampled_texts"]))
        text, right = answer["sampled_texts"][place], answer["sampled_correct"][place]
        sound = right and is_sound(problem, split_answer(text)[0]) if knows(problem.dataset) else None
        score = answer["scores"][place] if "scores" in answer else None
        names = {"id": problem.id, "dataset": problem.dataset, "question": with_options(problem)}
        rows.append(names | {"rationale": text.strip(), "right": right, "sound": sound, "score": score})
    rng.shuffle(rows)
    return [{"number": number} | row for number, row in enumerate(rows, start=1)]


def read_verdicts(text: str, n: int) -> list[bool]:
    """A reader's verdicts, "y" or "n" for each of n rationales; blanks and line breaks do not count.

    Raises ValueError for another letter, and for too few or too many.
    """
    letters = "".join(text.split()).lower()
    for place, letter in enumerate(letters, start=1):
        if letter not in VERDICTS:
            raise UsageError(f"verdict {place} is {letter!r}: write y for a sound rationale, n for any other")
    if len(letters) != n:
        raise UsageError(f"{len(letters)} verdicts for {n} rationales: write one letter, y or n, for each")
    return [VERDICTS[letter] for letter in letters]


def turned(verdicts: Sequence[bool], share: float, seed: int) -> list[bool]:
    """Verdicts of which some are turned round, each with probability `share`: a judge who slips.

    Raises ValueError where one is missing (None).
    """
    _refuse_missing(verdicts)
    rng = random.Random(f"turned/{seed}")
    return [verdict != (rng.random() < share) for verdict in verdicts]


def _refuse_missing(verdicts: Sequence[bool | None]) -> None:
    if missing := sum(one is None for one in verdicts):
        raise UsageError(
            f"{missing} of {len(verdicts)} verdicts are missing: the step checker knows only the generated tasks of "
            "reasoning; take a sheet of these, or another judge"
        )


def cohens_kappa(one: Sequence[bool], other: Sequence[bool], axis: int = -1) -> np.ndarray:
    """(observed agreement - agreement by chance) / (1 - agreement by chance), along an axis; Cohen (1960).

    nan where both judges always say the same, and one thing only: chance explains it all.
    """
    one, other = np.asarray(one, dtype=int), np.asarray(other, dtype=int)
    n, yes, yes_too = one.shape[axis], one.sum(axis), other.sum(axis)
    observed, chance = n * (one == other).sum(axis), yes * yes_too + (n - yes) * (n - yes_too)  # times n squared
    with np.errstate(invalid="ignore"):
        return (observed - chance) / (n * n - chance)


def kappa(one: Sequence[bool], other: Sequence[bool]) -> tuple[float, float, float]:
    """Cohen's kappa of two judges of the same rationales, and the ends of its 95 % bootstrap interval over them.

    nan where kappa is not defined; of judges who agree on everything the interval has no width. Raises ValueError for a
    verdict that is missing, and for judges of different numbers of rationales, or of none.
    """
    _refuse_missing(one)
    _refuse_missing(other)
    if len(one) != len(other) or not len(one):
        raise UsageError(f"{len(one)} verdicts beside {len(other)}: give both judges the same rationales, at least one")
    places = np.random.default_rng(0).integers(len(one), size=(DRAWS, len(one)))
    drawn = cohens_kappa(np.asarray(one)[places], np.asarray(other)[places])
    drawn = drawn[~np.isnan(drawn)]  # a draw may have one verdict only
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    return float(cohens_kappa(one, other)), float(low), float(high)
