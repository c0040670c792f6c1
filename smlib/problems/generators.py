"""The wording and the random draws of the generated tasks: rng -> (question, gold answer, options)."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from smlib.problems import translation

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@cache
def _names() -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "names.txt").read_text(encoding="utf-8").split())


def _name(rng: random.Random) -> str:
    """A common first name, or (two in five) a made-up one: the head of one name and the tail of another."""
    name = rng.choice(_names())
    if rng.random() < 0.4:
        tail = rng.choice(_names())
        name = name[: rng.randint(1, 4)] + tail[-min(len(tail) - 1, rng.randint(2, 4)) :].lower()
    return name


def _people(rng: random.Random, count: int) -> list[str]:
    people: list[str] = []
    while len(people) < count:
        name = _name(rng)
        if name not in people:
            people.append(name)
    return people


def _coin_flip(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    people = _people(rng, rng.choice((3, 4, 4, 5)))
    flips = [rng.random() < 0.5 for _ in people]
    acts = [
        f"{who} flips the coin." if flip else f"{who} does not flip the coin."
        for who, flip in zip(people, flips, strict=True)
    ]
    question = (
        f'A coin is heads up. {" ".join(acts)} Is the coin still heads up? Note that "flip" here means "reverse".'
    )
    return question, "yes" if sum(flips) % 2 == 0 else "no", ()


def _last_letters(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    words = _people(rng, rng.choice((2, 3, 4, 4)))
    question = f'Take the last letters of each words in "{" ".join(words)}" and concatenate them.'
    return question, "".join(word[-1] for word in words), ()


@cache
def _stories() -> list[dict]:
    """The benchmark's stories, in its own words, which mix presents and balls: what each player holds, and may hold."""
    return json.loads((Path(__file__).parent / "stories.json").read_text(encoding="utf-8"))


PLAYERS = ("Alice", "Bob", "Claire")


def _shuffled_objects(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    opening, holds, values, middle, verb, end = rng.choice(_stories()).values()
    things = rng.sample(values, 3)
    owned = dict(zip(PLAYERS, things, strict=True))
    start = [f"{who} {holds.format(thing)}" for who, thing in owned.items()]
    swaps = [rng.sample(PLAYERS, 2) for _ in range(3)]
    for a, b in swaps:
        owned[a], owned[b] = owned[b], owned[a]
    asked = rng.choice(PLAYERS)
    said = [f"{when}, {a} and {b} {verb}." for when, (a, b) in zip(("First", "Then", "Finally"), swaps, strict=True)]
    question = (
        f"Alice, Bob, and Claire are {opening} {start[0]}, {start[1]}, and {start[2]}. \n\n"
        f"{middle} {' '.join(said)} {end.format(asked)}"
    )
    return question, LETTERS[things.index(owned[asked])], tuple(things)


# Short names that the arithmetic stories share and names.txt does not hold: the tiny tokenizer takes each as one
# token, while the letters of the names in names.txt stay visible.
_HANDS = ("Ann", "Bo", "Cleo", "Dov", "Finn", "Gus", "Hana", "Ivo", "Jun", "Kai", "Lin", "Noa")
_THINGS = ("apples", "coins", "marbles", "pens", "shells", "stamps", "eggs", "nuts")
_HOLDERS = ("basket", "box", "bag", "jar")


def _chain_arithmetic(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """2-6 steps in natural language; every running total stays within 1..99."""
    holder, things = rng.choice(_HOLDERS), rng.choice(_THINGS)
    total = rng.randint(5, 40)
    sentences = [f"A {holder} holds {total} {things}."]
    for _ in range(rng.randint(2, 6)):
        hand = rng.choice(_HANDS)
        action = rng.choice(("adds", "adds", "takes", "takes", "doubles"))
        if action == "doubles" and total > 49:
            action = "takes"
        if action == "adds" and total > 89:
            action = "takes"
        if action == "takes" and total < 12:
            action = "adds"
        if action == "doubles":
            total *= 2
            sentences.append(f"{hand} doubles the {things}.")
        elif action == "adds":
            count = rng.randint(2, min(20, 99 - total))
            total += count
            sentences.append(f"{hand} adds {count}.")
        else:
            count = rng.randint(2, min(20, total - 1))
            total -= count
            sentences.append(f"{hand} takes {count}.")
    question = f"{' '.join(sentences)} How many {things} are in the {holder}?"
    return question, str(total), ()


GENERATORS: dict[str, Callable[[random.Random], tuple[str, str, tuple[str, ...]]]] = {
    "coin_flip": _coin_flip,
    "last_letters": _last_letters,
    "shuffled_objects": _shuffled_objects,
    "chain_arithmetic": _chain_arithmetic,
    "translation": translation.draw,
}
