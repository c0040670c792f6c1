"""Self-Explore, stages 1 to 3 (2404.10346, section 3): many solutions a question, and what is kept of them.

Of the distinct correct ones the most different make the RFT set (Yuan et al., 2308.01825), on which the base is
fine-tuned anew; each wrong one beside a correct one makes an outcome pair. A solution keeps the tokens that were drawn,
so that no later stage tokenises it again. What is kept does not depend on the order of the samples.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle

import numpy as np
from transformers import PreTrainedTokenizerBase

from smlib import encoding, prompts
from smlib.answers import grade
from smlib.engines import Engine
from smlib.problems import Problem
from smlib.sampling import Sample

# "9 + 4 = 13", "$5 * (3 + 2) = $25": an arithmetic expression, "=" and a number.
_EQUATION = re.compile(r"[($€£]*\d[\d .,()$€£%+\-*/×÷x]*= *[-$€£]*\d[\d,.]*")
_NOT_IN_EQUATIONS = re.compile(r"[ ,$€£]|\.$")


def draw_solutions(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    n: int,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    progress: str | None = None,
) -> list[dict]:
    """n solutions per problem from the question alone, judged, as rows in the order of the problems.

    Row: id, dataset, index, text (up to the answer sentence), token_ids (of that text, as drawn, without
    end-of-sequence), answer (None: invalid), correct.
    """
    drawn = engine.sample_ids(
        [encoding.encode_question(tokenizer, problem) for problem in problems],
        n,
        keys=[problem.id for problem in problems],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        progress=progress,
    )
    return [
        _row(tokenizer, problem, index, one)
        for problem, samples in zip(problems, drawn, strict=True)
        for index, one in enumerate(samples)
    ]


def _row(tokenizer, problem: Problem, index: int, one: Sample) -> dict:
    text = prompts.cut(one.text)
    ids = encoding.first_characters(tokenizer, one.token_ids, len(text))
    verdict = grade(text, problem)
    row = {"id": problem.id, "dataset": problem.dataset, "index": index, "text": text, "token_ids": ids}
    return row | {"answer": verdict.extracted, "correct": verdict.correct}


def equations(text: str) -> tuple[str, ...]:
    """The equations of a text in their order, as strings without blanks and currency; nothing is computed.

    >>> equations("Ann: 9 + 4 = 13.\\nBo has 2*$1,000=$2,000 now.")
    ('9+4=13', '2*1000=2000')
    """
    return tuple(_NOT_IN_EQUATIONS.sub("", found) for found in _EQUATION.findall(text))


def _signature(row: dict) -> tuple[str, ...]:
    """What makes a solution the same as another: its equations, or without any the words of its text."""
    return equations(row["text"]) or tuple(row["text"].split())


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


def diverse(rows: Sequence[dict], most: int) -> list[dict]:
    """At most `most` distinct solutions of one question, each far in edit distance from those before it.

    Solutions are distinct if their equations are, or where they have none their words; of equal ones the shortest
    stays. The shortest of all comes first, then always the one whose nearest kept solution is farthest, of equals the
    shorter, then the first in the alphabet. (The paper keeps the farthest; where to begin is our choice.)
    """
    ordered = sorted(rows, key=lambda row: (len(row["token_ids"]), row["text"], row["token_ids"]))
    distinct = {}
    for row in ordered:
        distinct.setdefault(_signature(row), row)
    left, kept = list(distinct), []
    nearest = np.full(len(left), np.inf)
    while left and len(kept) < most:
        place = int(nearest.argmax())
        kept.append(left.pop(place))
        if left:
            nearest = np.minimum(np.delete(nearest, place), edit_distances(kept[-1], left))
    return [distinct[signature] for signature in kept]


def rft_set(rows: Sequence[dict], most: int) -> list[dict]:
    """The correct solutions to fine-tune the base on, at most `most` per question, as r+ (`side` "+") for `sft`."""
    return [row | {"side": "+"} for group in _by_question(rows, correct=True).values() for row in diverse(group, most)]


def outcome_pairs(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rft: Sequence[dict],
    rows: Sequence[dict],
    most: int,
    seed: int,
) -> list[dict]:
    """At most `most` pairs per question: a wrong solution, each used once, beside the RFT solutions in turn.

    Wrong solutions are distinct texts that state an answer, drawn in a random order that the seed and the question
    decide. Row: id, dataset, chosen and rejected (texts), prompt_ids, chosen_ids and rejected_ids; both sides are whole
    rationales and end with end-of-sequence.
    """
    wrong = _by_question([row for row in rows if row["answer"] is not None], correct=False)
    right = _by_question(rft, correct=True)
    pairs = []
    for problem in problems:
        texts = {row["text"]: row for row in sorted(wrong[problem.id], key=lambda row: row["token_ids"], reverse=True)}
        unused = random.Random(f"outcome/{seed}/{problem.id}").sample(sorted(texts), len(texts))
        head = encoding.encode_question(tokenizer, problem)
        for chosen, text in zip(cycle(right[problem.id]), unused[:most]):
            pair = {"id": problem.id, "dataset": problem.dataset, "chosen": chosen["text"], "rejected": text}
            ids = {"prompt_ids": head, "chosen_ids": chosen["token_ids"], "rejected_ids": texts[text]["token_ids"]}
            ids |= {name: [*ids[name], tokenizer.eos_token_id] for name in ("chosen_ids", "rejected_ids")}
            pairs.append(pair | ids)
    return pairs


def _by_question(rows: Sequence[dict], correct: bool) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        if row["correct"] is correct:
            groups[row["id"]].append(row)
    return groups
