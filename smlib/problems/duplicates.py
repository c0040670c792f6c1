"""Questions that two datasets, or two splits of one, have in common, whatever their wording.

The published word problems copy from each other: SingleEq and AddSub share dozens of questions across their splits,
some with another comma, some with a word left out ("plant 6 more trees", "plant 6 trees"). Trained on one and tested on
the other, a model is tested on what it has read.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from smlib.problems.datasets import Problem, question_key

SAME_WORDS = 0.8  # of the words of both questions; the same template with other numbers is another question
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


def shared_questions(problems: Iterable[Problem], others: Iterable[Problem]) -> dict[str, str]:
    """id of a problem -> id of the first of the others that asks the same.

    Two questions are the same if `question_key` says so. Two word problems are also the same if they have the same
    numbers (at least one) and share SAME_WORDS of their words (Jaccard's index: words in both by words in either). In
    other datasets one word may be the whole difference: the date tomorrow, the date yesterday.
    """
    equal: dict[str, str] = {}
    alike: dict[tuple[str, ...], list[tuple[frozenset[str], str]]] = defaultdict(list)
    for other in others:
        words, numbers = _words(other)
        equal.setdefault(question_key(other.question), other.id)
        alike[numbers].append((words, other.id))
    found = {}
    for problem in problems:
        words, numbers = _words(problem)
        same = equal.get(question_key(problem.question))
        if same is None and numbers and problem.kind == "number":
            near = (name for seen, name in alike[numbers] if len(words & seen) >= SAME_WORDS * len(words | seen))
            same = next(near, None)
        if same is not None:
            found[problem.id] = same
    return found


def _words(problem: Problem) -> tuple[frozenset[str], tuple[str, ...]]:
    """The words of a question, and its numbers in ascending order."""
    pieces = question_key(_THOUSANDS.sub("", problem.question)).split()
    numbers = [piece for piece in pieces if piece[0].isdigit()]
    return frozenset(pieces) - frozenset(numbers), tuple(sorted(numbers))
