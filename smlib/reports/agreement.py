"""A sheet of rationales for a reader to judge, and how far two judges agree.

rows = draw(problems, answers, 60, seed=0)      # what is on the sheet, the verdict hidden
mine = read_verdicts("ynnyy ...", len(rows))    # a reader's, one letter for each rationale
value, low, high = kappa(mine, step_checker)
"""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy import stats

from smlib.errors import UsageError
from smlib.problems.datasets import Problem, with_options
from smlib.problems.prompts import split_answer
from smlib.problems.steps import is_sound, knows
from smlib.reports.evaluation import Answers

VERDICTS = {"y": True, "n": False}


def draw(problems: Sequence[Problem], answers: Sequence[Answers], n: int, seed: int) -> list[dict]:
    """n samples of a model for a sheet, of each dataset as many, and of every question at most one.

    problems: those of `answers`, which are rows of stage 05, in the same order. A row has number (from 1), id, dataset,
    question with its options, rationale (with its answer sentence), right (its answer, by the checker), sound (every
    step too, by the step checker; None of a task that it does not know) and score (by the reward model; None without
    one). Raises ValueError where there are too few questions.
    """
    rng, pools = random.Random(f"sheet/{seed}"), defaultdict(list)
    for problem, answer in zip(problems, answers, strict=True):
        pools[problem.dataset].append((problem, answer))
    each, odd = divmod(n, len(pools))
    if odd or any(len(pool) < each for pool in pools.values()):
        fewest = min(len(pool) for pool in pools.values())
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
    """Verdicts of which some are turned round, each with probability `share`: a judge who slips."""
    rng = random.Random(f"turned/{seed}")
    return [verdict != (rng.random() < share) for verdict in verdicts]


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

    The ends are nan where the sheet is too short, or too one-sided, for the bootstrap.
    """
    value = float(cohens_kappa(one, other))
    if np.isnan(value) or value == 1:
        return value, np.nan, np.nan
    drawn = stats.bootstrap(
        (np.asarray(one, dtype=int), np.asarray(other, dtype=int)), cohens_kappa, paired=True, vectorized=True,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return value, float(drawn.low), float(drawn.high)
