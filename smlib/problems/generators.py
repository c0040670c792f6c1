"""The wording and the random draws of the four generated tasks: rng -> (question, gold answer, options)."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

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


_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_POSITIONS = (
    "striker",
    "benchwarmer",
    "center midfielder",
    "cheerleader",
    "right winger",
    "right midfielder",
    "goalkeeper",
    "fullback",
    "left midfielder",
    "left winger",
)
_BOOKS = (
    "Catch-22",
    "Moby Dick",
    "The Great Gatsby",
    "Hound of the Baskervilles",
    "Frankenstein",
    "The Odyssey",
    "Ulysses",
    "Lolita",
    "The Pearl",
    "The Fellowship of the Ring",
)
_DANCERS = ("Patrick", "Karl", "Izzi", "Jamie", "Helga", "Lola", "Ophelia", "Melissa", "Sam", "Rodrigo")
# Opening, what each holds, its possible values, middle, the swap's verb, the end: the benchmark's stories.
_STORIES = (
    (
        "playing a game. At the start of the game, they are each holding a ball:",
        "has a {}",
        tuple(f"{c} ball" for c in _COLOURS),
        "As the game progresses, pairs of players trade balls.",
        "swap balls",
        "At the end of the game, {} has the",
    ),
    (
        "holding a white elephant gift exchange. At the start of the event, they are each holding a present "
        "of a different color:",
        "has a {}",
        # The benchmark itself mixes presents and balls here; we keep its words.
        tuple(f"{c} {'ball' if c in ('orange', 'black', 'pink') else 'present'}" for c in _COLOURS),
        "As the event progresses, pairs of people swap gifts.",
        "swap their gifts",
        "At the end of the event, {} has the",
    ),
    (
        "on the same team in a soccer match. At the start of the match, they are each assigned to a position:",
        "is playing {}",
        _POSITIONS,
        "As the game progresses, pairs of players occasionally swap positions.",
        "trade positions",
        "At the end of the match, {} is playing",
    ),
    (
        "friends and avid readers who occasionally trade books. At the start of the semester, they each buy "
        "one new book:",
        "gets {}",
        _BOOKS,
        "As the semester proceeds, they start trading around the new books.",
        "swap books",
        "At the end of the semester, {} has",
    ),
    (
        "dancers at a square dance. At the start of a song, they each have a partner:",
        "is dancing with {}",
        _DANCERS,
        "Throughout the song, the dancers often trade partners.",
        "switch partners",
        "At the end of the dance, {} is dancing with",
    ),
)
PLAYERS = ("Alice", "Bob", "Claire")


def _shuffled_objects(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    opening, holds, values, middle, verb, end = rng.choice(_STORIES)
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
}
