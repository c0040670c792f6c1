"""Self-Explore, stages 1 to 3 (2404.10346, section 3): many solutions a question, and what is kept of them.

Of the distinct correct ones the most different make the RFT set (Yuan et al., 2308.01825), on which the base is
fine-tuned anew; each wrong one beside a correct one makes an outcome pair. A solution keeps the tokens that were drawn,
so that no later stage tokenises it again. What is kept does not depend on the order of the samples.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
from transformers import PreTrainedTokenizerBase

from smlib.learning.rationales import sample_open
from smlib.learning.rows import Pair, Rationale
from smlib.problems.datasets import Problem
from smlib.problems.equations import equations
from smlib.sampling import encoding
from smlib.sampling.engines import Engine
from smlib.sampling.params import SamplingParams


def draw_solutions(
    engine: Engine, problems: Sequence[Problem], n: int, params: SamplingParams, *, progress: str | None = None
) -> list[Rationale]:
    """n solutions per problem from the question alone, judged, in the order of the problems."""
    drawn = sample_open(engine, problems, n, params, author=None, progress=progress)
    return [replace(one, source=None, reason=None) for one in drawn]  # of so many nobody reads the reason


def _signature(solution: Rationale) -> tuple[str, ...]:
    """What makes a solution the same as another: its equations, or without any the words of its text."""
    return equations(solution.text) or tuple(solution.text.split())


def edit_distances(one: Sequence[str], others: Sequence[Sequence[str]]) -> np.ndarray:
    """Levenshtein distance of a sequence to each of `others` [O]; the tables are filled row by row, all at once."""
    width = max(map(len, others))
    numbers = {item: number for number, item in enumerate(dict.fromkeys(one))}
    codes = np.array([[numbers.get(item, -1) for item in other] + [-1] * (width - len(other)) for other in others])
    places = np.arange(width + 1)
    row = np.tile(places, (len(others), 1))
    for count, item in enumerate(one, 1):
        best = np.minimum(row[:, 1:] + 1, row[:, :-1] + (codes.reshape(len(others), width) != numbers[item]))
        best = np.hstack([np.full((len(others), 1), count), best])
        row = np.minimum.accumulate(best - places, axis=1) + places  # insertions, from the left
    return row[np.arange(len(others)), [len(other) for other in others]]


def diverse(solutions: Sequence[Rationale], most: int) -> list[Rationale]:
    """At most `most` distinct solutions of one question, each far in edit distance from those before it.

    Solutions are distinct if their equations are, or where they have none their words; of equal ones the shortest
    stays. The shortest of all comes first, then always the one whose nearest kept solution is farthest, of equals the
    shorter, then the first in the alphabet. (The paper keeps the farthest; where to begin is our choice.)
    """
    distinct = {}
    for one in sorted(solutions, key=lambda one: (len(one.token_ids), one.text, one.token_ids)):
        distinct.setdefault(_signature(one), one)
    left, kept = list(distinct), []
    nearest = np.full(len(left), np.inf)
    while left and len(kept) < most:
        place = int(nearest.argmax())
        kept.append(left.pop(place))
        if left:
            nearest = np.minimum(np.delete(nearest, place), edit_distances(kept[-1], left))
    return [distinct[signature] for signature in kept]


def rft_set(solutions: Sequence[Rationale], most: int) -> list[Rationale]:
    """The correct solutions to fine-tune the base on, at most `most` per question, as r+ (`side` "+") for `sft`."""
    right = _by_question(solutions, correct=True)
    return [replace(one, side="+") for group in right.values() for one in diverse(group, most)]


def outcome_pairs(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rft: Sequence[Rationale],
    solutions: Sequence[Rationale],
    most: int,
    seed: int,
) -> list[Pair]:
    """At most `most` pairs per question: a wrong solution, each used once, beside the RFT solutions in turn.

    rft: `rft_set` of the solutions. Wrong solutions are distinct texts that state an answer, drawn in a random order
    that the seed and the question decide. Both sides are whole rationales and end with end-of-sequence.
    """
    wrong = _by_question([one for one in solutions if one.answer is not None], correct=False)
    right = _by_question(rft, correct=True)
    pairs = []
    for problem in problems:
        texts = {one.text: one for one in sorted(wrong[problem.id], key=lambda one: one.token_ids, reverse=True)}
        unused = random.Random(f"outcome/{seed}/{problem.id}").sample(sorted(texts), len(texts))
        head = tuple(encoding.encode_question(tokenizer, problem))
        for chosen, text in zip(cycle(right[problem.id]), unused[:most]):
            sides = {"chosen": chosen.text, "rejected": text, "prompt_ids": head}
            sides["chosen_ids"] = (*chosen.token_ids, tokenizer.eos_token_id)
            sides["rejected_ids"] = (*texts[text].token_ids, tokenizer.eos_token_id)
            pairs.append(Pair(id=problem.id, dataset=problem.dataset, **sides))
    return pairs


def _by_question(solutions: Sequence[Rationale], correct: bool) -> dict[str, list[Rationale]]:
    groups = defaultdict(list)
    for one in solutions:
        if one.correct is correct:
            groups[one.id].append(one)
    return groups
