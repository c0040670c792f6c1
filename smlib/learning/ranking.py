"""Stage 3: correctness ranks rationales, and the rank makes training data.

A rationale that leads to the right answer ranks above one of the same question that leads to a wrong one. No
human, no larger teacher and no preference label is asked.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

from smlib.learning.rows import Pair, Rationale
from smlib.problems.datasets import Problem


def side(rationale: Rationale) -> tuple[str | None, str]:
    """("+", "-" or None, why) of one rationale (method, stage 3).

    "+": the stated and the re-read answer are both right; "-": both wrong. Mixed rationales are dropped, and
    so are those that state no answer.
    """
    if rationale.answer is None:
        return None, "states no answer"
    if rationale.correct and rationale.reanswer_correct:
        return "+", "states and supports the right answer"
    if not rationale.correct and not rationale.reanswer_correct:
        return "-", "states and supports a wrong answer"
    if rationale.correct:
        return None, "states the right answer, supports another"
    return None, "states a wrong answer, supports the right one"


def rank(rationales: Sequence[Rationale], max_per_side: int) -> tuple[list[Rationale], Counter]:
    """The kept rationales with their `side`, and a count of what happened to all of them.

    Exact duplicates within a question go; of each question and side the first `max_per_side` stay.
    """
    seen: set[tuple[str, str]] = set()
    filled: Counter[tuple[str, str]] = Counter()
    kept, fate = [], Counter()
    for one in rationales:
        which, why = side(one)
        key = (one.id, one.text)
        if which is None:
            fate[f"dropped: {why}"] += 1
        elif key in seen:
            fate["dropped: duplicate"] += 1
        elif filled[one.id, which] >= max_per_side:
            fate["dropped: over the cap"] += 1
        else:
            seen.add(key)
            filled[one.id, which] += 1
            kept.append(replace(one, side=which))
            fate[f"kept: r{which}"] += 1
    return kept, fate


def coverage(ranked: Sequence[Rationale], problems: Sequence[Problem]) -> dict[str, float]:
    """Shares of the problems that have r+ only, r- only, both (these give pairs), or neither."""
    sides = defaultdict(set)
    for one in ranked:
        sides[one.id].add(one.side)
    shares = Counter("".join(sorted(sides[problem.id])) for problem in problems)
    names = {"+": "only right", "-": "only wrong", "+-": "both", "": "neither"}
    return {name: shares[key] / len(problems) for key, name in names.items()}


def held_out(identity: str) -> bool:
    """True for one question in eight: its pairs test the reward model and never train it."""
    return hashlib.sha256(f"held out/{identity}".encode()).digest()[0] < 32


def pairs(ranked: Sequence[Rationale], max_per_question: int, seed: int) -> list[Pair]:
    """Pairs (chosen r+, rejected r-), always of the same question and the same author model.

    Each r- is rejected once, for the next r+ in turn; of a question at most `max_per_question` are drawn. So a
    question that the author mostly gets right gives few pairs, and that is wanted: what it mostly gets right is often
    a habit that is right by luck (notebook 02 counts it). The `source` of a pair is that of its rejected side; its ids
    are the sides' tokens as drawn, without end-of-sequence.
    """
    rng = random.Random(f"pairs/{seed}")
    groups: dict[tuple[str, str], dict[str, list[Rationale]]] = defaultdict(lambda: {"+": [], "-": []})
    for one in ranked:
        groups[one.id, one.author][one.side].append(one)
    made = []
    for group in groups.values():
        right, false = (rng.sample(group[which], len(group[which])) for which in "+-")
        if not right:
            continue
        for chosen, rejected in zip(cycle(right), false[:max_per_question]):
            made.append(
                Pair(
                    id=chosen.id,
                    dataset=chosen.dataset,
                    author=chosen.author,
                    source=rejected.source,
                    chosen=chosen.text,
                    rejected=rejected.text,
                    held_out=held_out(chosen.id),
                    chosen_ids=chosen.token_ids,
                    rejected_ids=rejected.token_ids,
                )
            )
    return made
