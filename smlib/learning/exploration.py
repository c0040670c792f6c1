"""Self-Explore, stages 4 to 6 (2404.10346, section 3): where a wrong rationale goes wrong, found by its own author.

From the prefix (question, steps 1..i) of a wrong rationale the model writes k completions. The *first pit* is the first
step i after which none of the k reaches the gold answer. There the pair of step-level preference learning is made: the
pit step alone is rejected, and chosen is a completion from the prefix before it that does reach the answer.

A pit is k failures, not a proven error: where a completion recovers with probability p, all k fail with (1 - p)^k.

    rationales = [split(tokenizer, problem, prompt_ids, token_ids), ...]
    found = explore(engine, rationales, 4, params)      # 4 completions of a prefix
    pits = [first_pit(outcomes(rationale, found)) for rationale in rationales]

Tokens, not texts, go from one stage to the next: a prefix is a rationale's own tokens as drawn, so that exploration,
training and test share every boundary. Steps count from 1.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from smlib.declared import Completion
from smlib.errors import UsageError
from smlib.judging.answers import answer_start, grade
from smlib.learning.rows import Pair
from smlib.problems import prompts
from smlib.problems.datasets import KINDS, TASKS, Problem
from smlib.sampling import encoding
from smlib.sampling.engines import Engine
from smlib.sampling.params import Sample, SamplingParams

CHOICES = get_args(Completion)  # which of the correct completions is chosen
# Datasets in whose rationales one line is one step, the word problems and our tasks; in all others sentences are.
LINES = tuple(dataset for dataset, kind in KINDS.items() if kind == "number" or dataset in TASKS)
SHORT, MOST = 20, 10  # characters below which a sentence joins the next; steps of sentences at most

_LINE_END = r"(?<=\n)(?!\n)"
_SENTENCE_END = r"(?<=[.!?])(?=[ \t])|(?<=[.!?][\"')\]$])(?=[ \t])"


class LuckWarning(UserWarning):
    """Blind guesses recover so often that a wrong step may seem recoverable."""


# ------------------------------------------------------------------------------------------------------ steps


def step_texts(text: str, dataset: str) -> list[str]:
    """The reasoning steps of a rationale; joined, they are its beginning, and its answer is in none of them.

    A step ends after its line break, so that what follows begins a new line; a blank line belongs to the step before.
    In LINES one line is one step, if there are two. Else a sentence or line is, where those below SHORT characters join
    the next, and then the shortest neighbours each other until at most MOST are left (the paper: MATH has about 10).
    """
    body, sentence = prompts.split_answer(text)
    if sentence:
        body = body + "\n" * (len(text[len(body) :]) - len(text[len(body) :].lstrip("\n")))
    by_line = dataset in LINES and "\n" in body.strip()
    pieces = _join_short(
        re.split(_LINE_END if by_line else f"{_LINE_END}|{_SENTENCE_END}", body), 1 if by_line else SHORT
    )
    # An answer in words of its own, "So it is \boxed{5}.", is no step either, nor what follows it.
    if not sentence and (start := answer_start(body)) is not None:
        pieces = [piece for piece, end in zip(pieces, accumulate(map(len, pieces)), strict=True) if end <= start]
    while not by_line and len(pieces) > MOST:
        sizes = [len(a) + len(b) for a, b in pairwise(pieces)]
        place = sizes.index(min(sizes))
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def _join_short(pieces: list[str], least: int) -> list[str]:
    """Pieces below `least` characters joined to the next, the last to the one before; none where all is blank."""
    joined = [""]
    for piece in pieces:
        if len(joined[-1].strip()) < least:
            joined[-1] += piece
        else:
            joined.append(piece)
    if len(joined) > 1 and len(joined[-1].strip()) < least:
        joined[-2:] = ["".join(joined[-2:])]
    return [piece for piece in joined if piece.strip()]


@dataclass(frozen=True)
class SteppedRationale:
    """A wrong rationale, cut into steps.

    prompt_ids: tokens of its question, as evaluation asks it. ids: its own tokens, as drawn. ends: how many of `ids`
    are in step 1, in steps 1 and 2, ...; empty if it has no step.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def prefix(self, steps: int) -> tuple[int, ...]:
        """Tokens of its first steps; () for 0."""
        return self.ids[: self.ends[steps - 1]] if steps else ()

    def key(self, steps: int) -> str:
        """Names a prefix: two rationales of a question that begin with the same tokens share what is drawn there."""
        return f"{self.problem.id}|{' '.join(map(str, self.prefix(steps)))}"


def split(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, prompt_ids: Sequence[int], ids: Sequence[int]
) -> SteppedRationale:
    """A rationale's tokens cut into steps. A token that holds characters of two steps belongs to the first."""
    steps = step_texts(encoding.decode(tokenizer, ids), problem.dataset)
    ends = {encoding.count_tokens(tokenizer, ids, end) for end in accumulate(map(len, steps))}
    return SteppedRationale(problem, tuple(prompt_ids), tuple(ids), tuple(sorted(ends)))


# ------------------------------------------------------------------------------------------------ exploration


@dataclass(frozen=True)
class Attempt:
    """One completion of a prefix, and whether the judge finds the gold answer in prefix and completion together."""

    sample: Sample
    correct: bool


Found = dict[str, list[Attempt]]  # SteppedRationale.key of a prefix -> its completions, in the order drawn


def explore(
    engine: Engine,
    rationales: Sequence[SteppedRationale],
    k: int,
    params: SamplingParams,
    *,
    progress: str | None = None,
) -> Found:
    """Complete the prefixes of every rationale up to its first pit, with an early exit where one recovers.

    All rationales are at the same step together, so that their prefixes make one batch, and equal prefixes are drawn
    for once. A prefix gets 1 completion, then up to 4, 16, ... and k in all, until one recovers: most recover at once
    or hardly ever, and every look reads the prefix anew, so that looking after each one would cost more than it saves.
    Nothing is drawn behind a pit. The prefix before it then gets the rest of its k, to choose the chosen side from.

    The paper draws all (`explore_all`). Since samples are numbered, the first pits and the pairs are the very ones that
    it would give, but for float rounding in a batch of another shape.

    Raises ValueError if k < 1. Warns where blind guesses would recover more often than not (`luck`).
    """
    _check(rationales, k)
    found: Found = defaultdict(list)
    for step in range(1, max((len(one.ends) for one in rationales), default=0) + 1):
        left = [one for one in rationales if len(one.ends) >= step and (step == 1 or _recovers(found, one, step - 1))]
        done = 0
        while done < k:
            numbers = range(done, min(k, 4 * done or 1))
            asked = [(one, step) for one in left if not _recovers(found, one, step)]
            label = f"{progress}, step {step}" if progress else None
            _complete(engine, asked, numbers, params, found, label)
            done = numbers.stop
    pits = [(one, first_pit(outcomes(one, found))) for one in rationales]
    before = [(one, pit - 1) for one, pit in pits if pit and pit > 1]
    for drawn in sorted({len(found[one.key(step)]) for one, step in before} - {k}):
        asked = [(one, step) for one, step in before if len(found[one.key(step)]) == drawn]
        _complete(engine, asked, range(drawn, k), params, found, progress)
    return {key: attempts for key, attempts in found.items() if attempts}


def explore_all(
    engine: Engine,
    rationales: Sequence[SteppedRationale],
    n: int,
    params: SamplingParams,
    *,
    progress: str | None = None,
) -> Found:
    """n completions of every prefix of every rationale: for `pit_report`, and to see what `explore` saves."""
    _check(rationales, n)
    found: Found = defaultdict(list)
    asked = [(one, step) for one in rationales for step in range(1, len(one.ends) + 1)]
    _complete(engine, asked, range(n), params, found, progress)
    return dict(found)


def _complete(engine, asked, numbers: range, params: SamplingParams, found: Found, progress: str | None) -> None:
    """Add to `found` the completions with these numbers of the prefixes `asked`, (rationale, steps), each once."""
    places = {rationale.key(steps): (rationale, rationale.prefix(steps)) for rationale, steps in asked}
    if not places:
        return
    drawn = engine.sample_ids(
        [[*rationale.prompt_ids, *start] for rationale, start in places.values()],
        len(numbers),
        params,
        keys=list(places),
        first=numbers.start,
        progress=progress,
    )
    for (key, (rationale, start)), samples in zip(places.items(), drawn, strict=True):
        for sample in samples:
            text = prompts.cut(encoding.decode(engine.tokenizer, (*start, *sample.token_ids)))
            found[key].append(Attempt(sample, grade(rationale.problem, text).correct))


def _recovers(found: Found, rationale: SteppedRationale, steps: int) -> bool:
    return any(one.correct for one in found[rationale.key(steps)])


def outcomes(rationale: SteppedRationale, found: Found) -> list[list[bool]]:
    """[step][number]: which completions of each explored prefix of a rationale recover, step after step."""
    explored = []
    for step in range(1, len(rationale.ends) + 1):
        if not (attempts := found.get(rationale.key(step))):
            break
        explored.append([one.correct for one in attempts])
    return explored


def first_pit(recovers: Sequence[Sequence[bool]]) -> int | None:
    """The first step (from 1) after which no completion recovers; None if after every step one does."""
    return next((step for step, found in enumerate(recovers, 1) if not any(found)), None)


def luck(problem: Problem, k: int) -> float:
    """Chance that one of k blind guesses is the gold answer: 1 - (1 - 1/m)^k with m possible answers; 0 if open."""
    possible = 2 if problem.kind == "yes_no" else len(problem.choices)
    return 1 - (1 - 1 / possible) ** k if possible else 0.0


def _check(rationales: Sequence[SteppedRationale], k: int) -> None:
    if k < 1:
        raise UsageError(f"k is {k}, but a prefix needs at least 1 completion")
    lucky = {one.problem.dataset: one.problem for one in rationales if luck(one.problem, k) >= 0.5}
    for dataset, problem in lucky.items():
        answers = len(problem.choices) or 2
        warnings.warn(
            f"{dataset} has {answers} possible answers: of k = {k} blind guesses at least one is right with a "
            f"probability of {luck(problem, k):.0%}, so a wrong step may seem recoverable; a smaller k finds more pits",
            LuckWarning,
            stacklevel=3,
        )


# --------------------------------------------------------------------------------------------- granular pairs


def granular_pair(
    tokenizer: PreTrainedTokenizerBase, rationale: SteppedRationale, found: Found, solution: Sequence[int], choice: str
) -> Pair | None:
    """The step-level pair of a rationale at its first pit i; None without a pit.

    prompt: the question and steps 1..i-1. rejected: step i alone, without end-of-sequence, since the rationale goes on
    there. chosen: to its end-of-sequence, a correct completion of that prompt; for i = 1 `solution`, the correct
    rationale of the outcome pair. choice: "shortest" in tokens (the paper's), "random" (the first drawn; all are drawn
    alike) or "most_likely" (greatest log-probability).
    """
    if choice not in CHOICES:
        raise UsageError(f"choice {choice!r} is unknown; choose one of: {', '.join(CHOICES)}")
    pit = first_pit(outcomes(rationale, found))
    if pit is None:
        return None
    start, eos, lengths = rationale.prefix(pit - 1), tokenizer.eos_token_id, None
    if pit == 1:
        chosen = tuple(solution)
    else:
        attempts = [one.sample for one in found[rationale.key(pit - 1)] if one.correct]
        by_choice = {name: _choose(tokenizer, start, attempts, name) for name in CHOICES}
        chosen = (*by_choice[choice], eos)
        lengths = {name: len(ids) + 1 for name, ids in by_choice.items()}
    rejected = rationale.ids[len(start) : rationale.ends[pit - 1]]
    prefix = encoding.decode(tokenizer, start)
    return Pair(
        id=rationale.problem.id,
        dataset=rationale.problem.dataset,
        step=pit,
        steps=len(rationale.ends),
        prefix=prefix,
        chosen=encoding.decode(tokenizer, start + chosen).removeprefix(prefix),
        rejected=encoding.decode(tokenizer, start + rejected).removeprefix(prefix),
        prompt_ids=rationale.prompt_ids + start,
        chosen_ids=chosen,
        rejected_ids=rejected,
        lengths=lengths,
    )


def _choose(tokenizer, start: Sequence[int], samples: Sequence[Sample], choice: str) -> list[int]:
    """The tokens, to the end of its answer, of one of the correct completions of a prefix; of equals the earlier."""
    closed = []
    for one in samples:
        ids = [*start, *one.token_ids]
        kept = encoding.first_characters(tokenizer, ids, len(prompts.cut(encoding.decode(tokenizer, ids))))
        closed.append((kept[len(start) :], sum(one.logprobs[: len(kept) - len(start)])))
    if choice == "random":
        return closed[0][0]
    return min(closed, key=lambda found: len(found[0]) if choice == "shortest" else -found[1])[0]


def granular_pairs(
    tokenizer: PreTrainedTokenizerBase,
    rationales: Sequence[SteppedRationale],
    found: Found,
    solutions: Sequence[Sequence[int]],
    choice: str,
) -> tuple[list[Pair], Counter]:
    """The pairs of all rationales, each once, and a count of what became of them.

    solutions: the chosen side (with end-of-sequence) of each rationale's outcome pair. Rationales of a question that
    fail at the same step after the same ones give the same pair; the others of them are left out (our choice).
    """
    pairs, fate = {}, Counter()
    for rationale, solution in zip(rationales, solutions, strict=True):
        pair = granular_pair(tokenizer, rationale, found, solution, choice)
        if pair is None:
            fate["dropped: no pit" if rationale.ends else "dropped: no steps"] += 1
            continue
        key = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        fate["dropped: duplicate" if key in pairs else f"kept: pit at step {pair.step}"] += 1
        pairs.setdefault(key, pair)
    return list(pairs.values()), fate


def mean_lengths(pairs: Sequence[Pair]) -> dict[str, float]:
    """Of step-level pairs: mean tokens of the chosen side by choice, where there was one to make, and of the rejected
    side there."""
    chosen = [pair for pair in pairs if pair.lengths]
    means = {name: float(np.mean([pair.lengths[name] for pair in chosen])) for name in CHOICES if chosen}
    return means | ({"rejected": float(np.mean([len(pair.rejected_ids) for pair in chosen]))} if chosen else {})
