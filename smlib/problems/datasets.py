"""Problems: the one record every stage shares, seeded generators, and fourteen published datasets.

Five tasks can be generated without limit. Three of them (coin_flip, last_letters, shuffled_objects) use the
wording of their published benchmarks, whose questions `load` reads for evaluation; chain_arithmetic is ours, and so is
translation, which takes no reasoning.
Train and test never meet: a question belongs to the test split if the first byte of its SHA-256 says so,
whatever the seed, and a generated question that equals a published one is thrown away.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from smlib.declared import Asked, checked
from smlib.errors import UsageError
from smlib.problems.downloads import FILES, DatasetError, read_pinned
from smlib.problems.generators import GENERATORS, LETTERS

_WORDS = re.compile(r"[^\W_]+")
GENERATED = tuple(GENERATORS)
STEPLESS = ("translation",)  # takes no reasoning: no rationale for a given answer, no steps to explore
TASKS = tuple(task for task in GENERATED if task not in STEPLESS)  # those of reasoning, which "all" stands for


def tasks_of(task: str) -> tuple[str, ...]:
    """The tasks that a name stands for: TASKS for "all", else itself."""
    return TASKS if task == "all" else (task,)


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer.

    id: "gsm8k/test/17" (row 17 of its file), "coin_flip/train/db9af1f5b217" (generated); stable and unique.
    question: as the dataset words it; options of a choice question are in `choices`, not here. answer:
    canonical gold ("18", "B", "yes", "yajo", r"\\frac{1}{2}"). kind: number | choice | yes_no | letters | math.
    """

    id: str
    dataset: str
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------- generators


def question_key(question: str) -> str:
    """What two wordings of one question have in common: letters and digits, whatever their case, marks and blanks.

    A split that promises "none of the test split" compares these: the published word problems repeat questions with
    another comma, capital or blank.
    """
    return " ".join(_WORDS.findall(unicodedata.normalize("NFKC", question).casefold()))


def _digest(question: str) -> str:
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


@cache
def _published_digests() -> frozenset[str]:
    """The first 12 hex digits of the SHA-256 of every published question of the three benchmarks."""
    return frozenset((Path(__file__).parent / "published_digests.txt").read_text(encoding="utf-8").split())


def generate(dataset: str, n: int, seed: int, split: str = "train") -> list[Problem]:
    """n distinct generated problems of one task.

    The same (dataset, n, seed, split) gives the same list, and a smaller n gives its beginning. One question
    in eight belongs to split "test", the others to "train", decided by the question's own hash: no seed can
    leak a test question into training. Raises ValueError for an unknown dataset or split, and for an n that is not
    allowed, or larger than the task.
    """
    checked("n", n, Asked)
    if dataset not in GENERATORS:
        raise UsageError(f"no generator for dataset {dataset!r}; choose one of: {', '.join(GENERATORS)}")
    if split not in ("train", "test"):
        raise UsageError(f"unknown split {split!r}; allowed: 'train', 'test'")
    rng = random.Random(f"{dataset}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    draws = 0  # since the last new question
    while len(problems) < n:
        question, answer, choices = GENERATORS[dataset](rng)
        draws += 1
        if draws > 10_000:
            raise UsageError(
                f"{dataset} has hardly more than {len(problems):,} {split} questions: ask for fewer than {n:,}"
            )
        digest = _digest(question)
        in_test = int(digest[:2], 16) < 32
        if digest[:12] in problems or digest[:12] in _published_digests() or in_test != (split == "test"):
            continue
        draws, identity = 0, f"{dataset}/{split}/{digest[:12]}"
        problems[digest[:12]] = Problem(identity, dataset, question, answer, KINDS[dataset], choices)
    return list(problems.values())


# -------------------------------------------------------------------------------------- published datasets

# A reader takes one row of a file and its place there: row, index -> (question, gold answer, options).
_Read = tuple[str, str, tuple[str, ...]]


def _word_problem(row: dict, index: int) -> _Read:
    return row["sQuestion"], _plain_number(row["lSolutions"][0]), ()


def _svamp(row: dict, index: int) -> _Read:
    return f"{row['Body'].strip().removesuffix('.')}. {row['Question']}", _plain_number(row["Answer"]), ()


def _gsm8k(row: dict, index: int) -> _Read:
    return row["question"], row["answer"].rpartition("####")[2].replace(",", ""), ()


def _easy(row: dict) -> bool:
    """At most two calculations in the solution, which marks them: <<48/2=24>>."""
    return row["answer"].count("<<") <= 2


def _aqua(row: dict, index: int) -> _Read:
    return row["question"], row["correct"], tuple(option.partition(")")[2].strip() for option in row["options"])


def _commonsense_qa(row: dict, index: int) -> _Read:
    asked = row["question"]
    return asked["stem"], row["answerKey"], tuple(choice["text"] for choice in asked["choices"])


def _big_bench_choice(row: dict, index: int) -> _Read:
    options = row["target_scores"]
    return row["input"], LETTERS[list(options.values()).index(1)], tuple(option.rstrip(".") for option in options)


def _date_understanding(row: dict, index: int) -> _Read:
    """Gold is the first option of 364 of the file's 369 rows, so each row's options are shuffled by a fixed seed."""
    question, gold, options = _big_bench_choice(row, index)
    order = random.Random(f"date_understanding/{index}").sample(range(len(options)), len(options))
    return question, LETTERS[order.index(LETTERS.index(gold))], tuple(options[place] for place in order)


def _strategy_qa(row: dict, index: int) -> _Read:
    return row["input"], "yes" if row["target_scores"]["Yes"] else "no", ()


def _question_answer(row: dict, index: int) -> _Read:
    return row["question"], row["answer"], ()


def _math(row: dict, index: int) -> _Read:
    return row["problem"], row["answer"], ()


def _plain_number(value: float | str) -> str:
    return str(value).removesuffix(".0")


def _lines(raw: bytes) -> list[dict]:
    return [json.loads(line) for line in raw.decode().split("\n") if line]


def _examples(raw: bytes) -> list[dict]:
    return json.loads(raw)["examples"]


_EITHER = ("train", "test")  # the publisher names no split: see seventy_thirty


@dataclass(frozen=True)
class _Dataset:
    kind: str  # of its answers, as in `Problem`
    files: dict[str, tuple[str, ...]]  # path -> the splits that its rows may be of; a third one holds all its rows
    rows: Callable[[bytes], list[dict]]
    read: Callable[[dict, int], _Read]
    has: Callable[[dict], bool] = lambda row: True  # which rows are in it


_DATASETS = {
    "single_eq": _Dataset("number", {"SingleEq/questions.json": _EITHER}, json.loads, _word_problem),
    "addsub": _Dataset("number", {"AddSub/AddSub.json": _EITHER}, json.loads, _word_problem),
    "multiarith": _Dataset("number", {"MultiArith/MultiArith.json": _EITHER}, json.loads, _word_problem),
    "gsm8k": _Dataset("number", {"gsm8k/train.jsonl": ("train",), "gsm8k/test.jsonl": ("test",)}, _lines, _gsm8k),
    "gsm8k_easy": _Dataset(
        "number", {"gsm8k/train.jsonl": ("train",), "gsm8k/test.jsonl": ("test",)}, _lines, _gsm8k, _easy
    ),
    "svamp": _Dataset("number", {"SVAMP/SVAMP.json": _EITHER}, json.loads, _svamp),
    "aqua": _Dataset("choice", {"AQuA/train.json": ("train",), "AQuA/test.json": ("test",)}, _lines, _aqua),
    "commonsense_qa": _Dataset(
        "choice",
        {"CommonsenseQA/train_rand_split.jsonl": ("train",), "CommonsenseQA/dev_rand_split.jsonl": ("test",)},
        _lines,
        _commonsense_qa,
    ),
    "strategy_qa": _Dataset("yes_no", {"StrategyQA/task.json": _EITHER}, _examples, _strategy_qa),
    "date_understanding": _Dataset("choice", {"Bigbench_Date/task.json": _EITHER}, _examples, _date_understanding),
    "shuffled_objects": _Dataset(
        "choice", {"Bigbench_object_tracking/task.json": _EITHER}, _examples, _big_bench_choice
    ),
    "last_letters": _Dataset("letters", {"last_letters/last_letters.json": _EITHER}, _examples, _question_answer),
    "coin_flip": _Dataset("yes_no", {"coin_flip/coin_flip.json": _EITHER}, _examples, _question_answer),
    # PRM800K cuts MATH anew, into 12,000 and 500; MATH's own split stands in a row's unique_id.
    "math": _Dataset("math", {"math/train.jsonl": _EITHER, "math/test.jsonl": (*_EITHER, "test_500")}, _lines, _math),
}
PUBLISHED = tuple(_DATASETS)
KINDS = {"chain_arithmetic": "number", "translation": "letters"}
KINDS |= {name: dataset.kind for name, dataset in _DATASETS.items()}


def splits(dataset: str) -> tuple[str, ...]:
    """The splits that `load` knows of a published dataset. Raises ValueError for an unknown dataset."""
    if dataset not in _DATASETS:
        raise UsageError(f"unknown dataset {dataset!r}; published datasets: {', '.join(PUBLISHED)}")
    return (*dict.fromkeys(split for named in _DATASETS[dataset].files.values() for split in named), "all")


# Several published datasets that make one task; a question that two of them share is asked once.
GROUPS = {"word_problems": ("single_eq", "addsub", "svamp", "multiarith", "gsm8k_easy")}
# What a run can be about besides GENERATED.
TRAIN_SETS = (*(name for name in PUBLISHED if name not in TASKS), *GROUPS)


def pinned_files(dataset: str) -> dict[str, str]:
    """path -> SHA-256 of the files behind a published dataset, for a run's manifest."""
    return {path: FILES[path].sha256 for path in _DATASETS[dataset].files}


def seventy_thirty(rows: int) -> list[str]:
    """The split, "train" or "test", of each row of a dataset that ships without one: the published 70/30 by index.

    It is the one of Ho et al. (2212.10071), who publish its indices: a permutation by numpy's frozen RandomState(0).
    MultiArith repeats 20 questions, some of them across the two parts.
    """
    order = np.random.RandomState(0).permutation(rows)
    train = set(order[: round(0.7 * rows)].tolist())
    return ["train" if row in train else "test" for row in range(rows)]


def load(dataset: str, split: str, *, limit: int | None = None) -> list[Problem]:
    """The questions of a published dataset, in file order; limit: the first so many.

    split: "train" or "test", or "all" for both. gsm8k (7,473 / 1,319; gsm8k_easy are its 2,674 / 440 questions with at
    most two calculations) and aqua (97,467 / 254) come with a split of
    their own; commonsense_qa's published development set is its "test" (9,741 / 1,221), since the test answers are
    secret. math has 7,500 / 5,000, and "test_500", the 500 of the 5,000 that PRM800K tests on. The others ship
    without a split and get the published one, see `seventy_thirty`: single_eq 508 rows, addsub 395, multiarith 600,
    svamp 1,000, strategy_qa 2,290, date_understanding 369, shuffled_objects 750 (three objects), last_letters 500,
    coin_flip 500. Published zero-shot accuracies of text-davinci-002 are over "all" of these.

    A choice question keeps the file's order of options, except date_understanding (see `_date_understanding`).
    Files come from SML_DATA_DIR, or else from a checked download (see `downloads`). Raises ValueError
    for an unknown dataset or split, DatasetError for a file or a row that cannot be used.
    """
    if split not in splits(dataset):
        raise UsageError(f"{dataset} has no split {split!r}; it has: {', '.join(splits(dataset))}")
    if limit is not None:
        checked("limit", limit, Asked)
    source = _DATASETS[dataset]
    problems = []
    for path, named in source.files.items():
        if split == "all" or split in named:
            rows = source.rows(read_pinned(path))
            drawn = seventy_thirty(len(rows)) if named == _EITHER else named[:1] * len(rows)
            for index, (row, place) in enumerate(zip(rows, drawn, strict=True)):
                if not source.has(row):
                    continue
                problem = _problem(dataset, path, f"{place}/{index}", index, row)
                if split in ("all", problem.id.split("/")[1], *named[2:]):
                    problems.append(problem)
    return problems[:limit]


def _problem(dataset: str, path: str, name: str, index: int, row: dict) -> Problem:
    """One row as a Problem; its name in the id is "split/row", except in MATH, whose rows bring their own."""
    try:
        if dataset == "math":
            name = row["unique_id"].removesuffix(".json")
        question, answer, choices = _DATASETS[dataset].read(row, index)
        return _valid(Problem(f"{dataset}/{name}", dataset, question.strip(), answer.strip(), KINDS[dataset], choices))
    except KeyError as missing:
        raise DatasetError(f"{path}, row {index + 1}: it has no field {missing}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}, row {index + 1}: {error}") from None


def _valid(problem: Problem) -> Problem:
    """The problem, if its gold answer is of its kind."""
    answer, letters = problem.answer, LETTERS[: len(problem.choices)]
    if not problem.question:
        raise ValueError("the question is empty")
    if problem.kind == "choice" and (len(answer) != 1 or answer not in letters):
        raise ValueError(f"gold {answer!r} is not one of the options {', '.join(letters)}")
    if problem.kind == "yes_no" and answer not in ("yes", "no"):
        raise ValueError(f"gold {answer!r} is neither 'yes' nor 'no'")
    if problem.kind == "number":
        Fraction(answer)  # "12.3", "-4" and "3/4"; its error names the text
    if problem.kind in ("letters", "math") and not answer:
        raise ValueError("the gold answer is empty")
    return problem


def with_options(problem: Problem) -> str:
    """The question as a reader sees it: a choice question is followed by its lettered options."""
    if not problem.choices:
        return problem.question
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem.choices, strict=False))
    return f"{problem.question}\nAnswer Choices: {options}"
