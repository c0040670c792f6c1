"""Worked solutions of the generated tasks of reasoning, and the exact step checker built on them.

A solution is a list of lines, one reasoning step each, in the house wording that the tiny base has read. The
checker knows the one right line at every position, so it can say of any rationale which steps are right and
where it first goes wrong: an independent judgement that no stage of training ever sees.

Every writer takes the operation that an author may get wrong as an argument; `smlib.pretraining` passes the
misconceptions, everybody else leaves the right one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from smlib.problems.datasets import Problem
from smlib.problems.generators import LETTERS, PLAYERS

_COIN = re.compile(r"(\S+) (flips|does not flip) the coin\.")
_WORDS = re.compile(r'words in "([^"]+)"')
_SWAP = re.compile(r"(?:First|Then|Finally), (Alice|Bob|Claire) and (Alice|Bob|Claire) ")
_ASKED = re.compile(r"At the end of [^.]*?, (Alice|Bob|Claire) ")
_CHAIN = re.compile(r"(\w+) (?:(adds|takes) (\d+)|(doubles) the \w+)\.")


def parse(problem: Problem) -> dict:
    """What a question of a generated task of reasoning says, as data. Raises ValueError for any other."""
    text = problem.question
    if problem.dataset == "coin_flip" and (acts := _COIN.findall(text)):
        return {"acts": [(who, act == "flips") for who, act in acts]}
    if problem.dataset == "last_letters" and (words := _WORDS.search(text)):
        return {"words": words[1].split()}
    if problem.dataset == "shuffled_objects" and (asked := _ASKED.search(text)):
        return {"swaps": _SWAP.findall(text), "asked": asked[1]}
    if problem.dataset == "chain_arithmetic" and (start := re.search(r"holds (\d+) ", text)):
        operations = [(who, verb or double, int(count or 2)) for who, verb, count, double in _CHAIN.findall(text)]
        return {"start": int(start[1]), "operations": operations}
    raise ValueError(f"{problem.id}: not worded like a question of a generated task of reasoning: {text[:60]!r}")


def turn(heads: bool, flips: bool) -> bool:
    return heads != flips


def swap(owned: dict[str, str], a: str, b: str) -> dict[str, str]:
    return owned | {a: owned[b], b: owned[a]}


def compute(verb: str, total: int, count: int) -> tuple[str, int]:
    """The equation's left side and its result, for one operation of chain_arithmetic."""
    if verb == "adds":
        return f"{total} + {count}", total + count
    if verb == "takes":
        return f"{total} - {count}", total - count
    return f"{total} + {total}", total + total


def write_coin_flip(facts: dict, turn: Callable = turn) -> tuple[list[str], str]:
    heads, lines = True, []
    for who, flips in facts["acts"]:
        heads = turn(heads, flips)
        lines.append(f"{who} {'flips' if flips else 'does not flip'}: {'heads' if heads else 'tails'}.")
    return lines, "yes" if heads else "no"


def write_last_letters(facts: dict, pick: Callable = lambda word: word[-1]) -> tuple[list[str], str]:
    letters = [pick(word) for word in facts["words"]]
    lines = [f'"{word}" ends in "{letter}".' for word, letter in zip(facts["words"], letters, strict=True)]
    return lines, "".join(letters)


def write_shuffled_objects(facts: dict, swap: Callable = swap) -> tuple[list[str], str]:
    """Objects go by their option letters; the options stand in the order of the players at the start."""
    owned = dict(zip(PLAYERS, LETTERS, strict=False))

    def state() -> str:
        return ", ".join(f"{who} {letter}" for who, letter in owned.items()) + "."

    lines = [f"Start: {state()}"]
    for a, b in facts["swaps"]:
        owned = swap(owned, a, b)
        lines.append(f"{a} and {b}: {state()}")
    last = owned[facts["asked"]]
    lines.append(f"{facts['asked']} ends with {last}.")
    return lines, last


def write_chain_arithmetic(facts: dict, compute: Callable = compute) -> tuple[list[str], str]:
    total, lines = facts["start"], []
    for who, verb, count in facts["operations"]:
        left, total = compute(verb, total, count)
        lines.append(f"{who}: {left} = {total}.")
    return lines, str(total)


WRITERS: dict[str, Callable[..., tuple[list[str], str]]] = {
    "coin_flip": write_coin_flip,
    "last_letters": write_last_letters,
    "shuffled_objects": write_shuffled_objects,
    "chain_arithmetic": write_chain_arithmetic,
}


ONLY_GENERATED = "(No word on steps: the step checker only knows the generated tasks of reasoning.)"


def knows(*datasets: str) -> bool:
    """Whether the checker can judge steps of all these datasets: it knows the generated tasks of reasoning."""
    return all(dataset in WRITERS for dataset in datasets)


def worked_solution(problem: Problem) -> tuple[list[str], str]:
    """The right lines of a generated problem and its answer, as a careful author writes them."""
    facts = parse(problem)
    return WRITERS[problem.dataset](facts)


@dataclass(frozen=True)
class StepCheck:
    line: str
    correct: bool
    reason: str


def check_steps(problem: Problem, rationale: str) -> list[StepCheck]:
    """Judge every line of a rationale (without its answer sentence) of a generated task.

    A step is right if it is the line that a careful author writes at that place; spaces and letter case do
    not count. What a rationale leaves out is reported as one last, wrong, empty step. The checker knows the
    house wording only: a right thought in other words is reported as wrong.
    """
    expected, _ = worked_solution(problem)
    lines = [line.strip() for line in rationale.strip().split("\n") if line.strip()]
    checks = []
    for index, line in enumerate(lines):
        if index >= len(expected):
            checks.append(StepCheck(line, False, "one step too many"))
        elif " ".join(line.lower().split()) == " ".join(expected[index].lower().split()):
            checks.append(StepCheck(line, True, "right"))
        else:
            checks.append(StepCheck(line, False, f"should be: {expected[index]}"))
    if len(lines) < len(expected):
        checks.append(StepCheck("", False, f"left out: {expected[len(lines)]}"))
    return checks


def is_sound(problem: Problem, rationale: str) -> bool:
    """True if every step is right and none is missing, whatever the answer sentence says."""
    return all(check.correct for check in check_steps(problem, rationale))


def first_wrong_step(problem: Problem, rationale: str) -> int | None:
    """The index (from 0) of the first wrong or missing step, or None if the rationale is sound."""
    return next((i for i, check in enumerate(check_steps(problem, rationale)) if not check.correct), None)
