"""Problems: the one record every stage shares, seeded generators, and the published test sets.

Four tasks can be generated without limit. Three of them (coin_flip, last_letters, shuffled_objects) use the
wording of their published benchmarks, whose questions `load` reads for evaluation; chain_arithmetic is ours.
Train and test never meet: a question belongs to the test split if the first byte of its SHA-256 says so,
whatever the seed, and a generated question that equals a published one is thrown away.
"""

import hashlib
import json
import os
import random
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path

TASKS = ("coin_flip", "last_letters", "shuffled_objects", "chain_arithmetic")
KINDS = {
    "coin_flip": "yes_no",
    "last_letters": "letters",
    "shuffled_objects": "choice",
    "chain_arithmetic": "number",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer.

    id: "coin_flip/test/17", stable and unique. question: as the dataset words it; options of a choice
    question are in `choices`, not here. answer: canonical gold ("18", "B", "yes", "yajo"). kind: number |
    choice | yes_no | letters.
    """

    id: str
    dataset: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- generators


@cache
def _names() -> tuple[str, ...]:
    return tuple((Path(__file__).parent / "names.txt").read_text().split())


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


_GENERATORS: dict[str, Callable[[random.Random], tuple[str, str, tuple[str, ...]]]] = {
    "coin_flip": _coin_flip,
    "last_letters": _last_letters,
    "shuffled_objects": _shuffled_objects,
    "chain_arithmetic": _chain_arithmetic,
}


def _digest(question: str) -> str:
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


@cache
def _published_digests() -> frozenset[str]:
    """The first 12 hex digits of the SHA-256 of every published question of the three benchmarks."""
    return frozenset((Path(__file__).parent / "published_digests.txt").read_text().split())


def generate(dataset: str, n: int, seed: int, split: str = "train") -> list[Problem]:
    """n distinct generated problems of one task.

    The same (dataset, n, seed, split) gives the same list, and a smaller n gives its beginning. One question
    in eight belongs to split "test", the others to "train", decided by the question's own hash: no seed can
    leak a test question into training. Raises ValueError for an unknown dataset or split.
    """
    if dataset not in _GENERATORS:
        raise ValueError(f"no generator for dataset {dataset!r}; there are: {', '.join(_GENERATORS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; allowed: 'train', 'test'")
    rng = random.Random(f"{dataset}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < n:
        question, answer, choices = _GENERATORS[dataset](rng)
        digest = _digest(question)
        in_test = int(digest[:2], 16) < 32
        if digest[:12] in problems or digest[:12] in _published_digests() or in_test != (split == "test"):
            continue
        identity = f"{dataset}/{split}/{digest[:12]}"
        problems[digest[:12]] = Problem(identity, dataset, question, answer, KINDS[dataset], choices)
    return list(problems.values())


# ------------------------------------------------------------------------------------------ published sets


@dataclass(frozen=True)
class _Source:
    path: str  # below SML_DATA_DIR, and below dataset/ upstream
    sha256: str


# The repository of Kojima et al. (2205.11916); the SHA-256 pins the content, whatever the branch holds later.
_UPSTREAM = "https://raw.githubusercontent.com/kojima-takeshi188/zero_shot_cot/main/dataset/"
_SOURCES = {
    "coin_flip": _Source(
        "coin_flip/coin_flip.json", "68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a"
    ),
    "last_letters": _Source(
        "last_letters/last_letters.json", "60e8d092d0a6423d3256e87e0c249b69aefea4cd27985082095fa4e93931fb02"
    ),
    "shuffled_objects": _Source(
        "Bigbench_object_tracking/task.json",
        "74b74d3c8827c0387a3f24ee9efa7edd90b2d53af3daacb9961341af66f750a0",
    ),
}
PUBLISHED = tuple(_SOURCES)


class DatasetError(ValueError):
    """A dataset file is missing, truncated, altered, or cannot be fetched."""


def _checked(raw: bytes, source: _Source, where: str) -> bytes:
    found = hashlib.sha256(raw).hexdigest()
    if found != source.sha256:
        raise DatasetError(
            f"{where} has SHA-256 {found} ({len(raw)} bytes), expected {source.sha256}: truncated or another "
            "version. Delete it and fetch it again, or point SML_DATA_DIR at an intact copy."
        )
    return raw


def _read_source(dataset: str, data_dir: Path | None) -> bytes:
    source = _SOURCES[dataset]
    if data_dir is None and os.environ.get("SML_DATA_DIR"):
        data_dir = Path(os.environ["SML_DATA_DIR"])
    if data_dir is not None:
        path = Path(data_dir) / source.path
        if not path.is_file():
            raise DatasetError(f"{path} is not there; SML_DATA_DIR must hold {source.path}, or be unset to download.")
        return _checked(path.read_bytes(), source, str(path))
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    path = cache_home / "smlib" / source.path
    if path.is_file():
        return _checked(path.read_bytes(), source, str(path))
    try:
        with urllib.request.urlopen(_UPSTREAM + source.path, timeout=20) as reply:
            raw = _checked(reply.read(), source, _UPSTREAM + source.path)
    except (OSError, HTTPException) as error:
        raise DatasetError(
            f"{dataset}: download of {_UPSTREAM + source.path} failed ({error}). Set SML_DATA_DIR to a local "
            "copy; the generated tasks run without it."
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_bytes(raw)
    partial.replace(path)
    return raw


def load(dataset: str, split: str, *, data_dir: Path | None = None, limit: int | None = None) -> list[Problem]:
    """The published test questions of a benchmark, in file order.

    dataset: coin_flip (500), last_letters (500) or shuffled_objects (750 rows, of which the file repeats
    none); split: "test", the only one they have. Read from `data_dir`, else SML_DATA_DIR, else downloaded to
    the user's cache; always checked by SHA-256. The option order of shuffled_objects is the file's own (gold
    is spread evenly over A, B and C). limit: the first so many questions. Raises ValueError for an unknown
    name and DatasetError for a file that is missing, altered or out of reach.
    """
    if dataset not in _SOURCES:
        raise ValueError(f"unknown dataset {dataset!r}; published sets here: {', '.join(_SOURCES)}")
    if split != "test":
        raise ValueError(f"{dataset} has no split {split!r}; it has: 'test'")
    rows = json.loads(_read_source(dataset, data_dir))["examples"]
    problems = []
    for index, row in enumerate(rows[:limit]):
        choices: tuple[str, ...] = ()
        if dataset == "shuffled_objects":
            choices = tuple(choice.rstrip(".") for choice in row["target_scores"])
            answer = LETTERS[list(row["target_scores"].values()).index(1)]
        else:
            answer = row["answer"]
        question = row["question" if dataset != "shuffled_objects" else "input"].strip()
        problems.append(Problem(f"{dataset}/published/{index}", dataset, question, answer, KINDS[dataset], choices))
    return problems


def with_options(problem: Problem) -> str:
    """The question as a reader sees it: a choice question is followed by its lettered options."""
    if not problem.choices:
        return problem.question
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem.choices, strict=False))
    return f"{problem.question}\nAnswer Choices: {options}"
