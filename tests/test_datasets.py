import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlib.problems import datasets, generators
from smlib.problems.datasets import KINDS, PUBLISHED, TASKS, Problem, generate, load, question_key, splits, with_options
from smlib.problems.downloads import DatasetError
from smlib.problems.generators import LETTERS
from smlib.problems.steps import worked_solution

PLAYERS = "(?:Alice|Bob|Claire)"
BENCHMARKS = [task for task in TASKS if task in PUBLISHED]  # the generated tasks that are published too


@pytest.fixture
def local_copy():
    """The folder of the published datasets, or a skip where there is none."""
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")
    return Path(os.environ["SML_DATA_DIR"])


@pytest.fixture
def published(local_copy):
    """Dataset -> the published questions of the generated tasks."""
    return {dataset: load(dataset, "all") for dataset in BENCHMARKS}


# ---------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_the_problems_and_a_smaller_n_gives_the_beginning(task):
    twenty = generate(task, 20, seed=3)
    assert generate(task, 20, seed=3) == twenty
    assert generate(task, 7, seed=3) == twenty[:7]
    assert generate(task, 20, seed=4) != twenty
    assert generate(task, 0, seed=3) == []


@pytest.mark.parametrize("task", TASKS)
@given(train_seed=st.integers(0, 2**40), test_seed=st.integers(0, 2**40))
@settings(max_examples=15)
def test_train_and_test_are_disjoint_for_any_seeds(task, train_seed, test_seed):
    train, test = generate(task, 25, train_seed), generate(task, 8, test_seed, split="test")
    assert not {p.question for p in train} & {p.question for p in test}
    assert not {p.id for p in train} & {p.id for p in test}


@pytest.mark.parametrize("task", TASKS)
def test_the_split_is_a_property_of_the_question_and_not_of_the_seed(task):
    for split, holds in (("train", lambda byte: byte >= 32), ("test", lambda byte: byte < 32)):
        for problem in generate(task, 40, seed=1, split=split):
            assert holds(hashlib.sha256(" ".join(problem.question.split()).encode()).digest()[0])
            assert problem.id.startswith(f"{task}/{split}/")


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_ids_are_distinct(task):
    made = generate(task, 500, seed=0)
    assert len({problem.question for problem in made}) == len({problem.id for problem in made}) == 500
    assert {(problem.dataset, problem.kind) for problem in made} == {(task, KINDS[task])}


def test_a_drawn_question_that_is_published_is_thrown_away(monkeypatch):
    flips = " ".join(f"{name} flips the coin." for name in ("Ronnie", "Kiki", "Alan", "Remy"))
    published = f'A coin is heads up. {flips} Is the coin still heads up? Note that "flip" here means "reverse".'
    drawn = [published, "What is new?"]
    assert {_split(question) for question in drawn} == {"train"}  # else the split alone would throw it away
    monkeypatch.setitem(generators.GENERATORS, "coin_flip", lambda rng: (rng.choice(drawn), "yes", ()))
    for seed in range(8):
        assert [p.question for p in generate("coin_flip", 1, seed)] == ["What is new?"]


def _split(question):
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 32 else "train"


def test_the_list_of_published_questions_is_complete(published):
    questions = [problem.question for group in published.values() for problem in group]
    digests = {hashlib.sha256(" ".join(q.split()).encode()).hexdigest()[:12] for q in questions}
    assert digests == set(Path(datasets.__file__).with_name("published_digests.txt").read_text("utf-8").split())
    assert len(digests) == 1750


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_generated_question_is_a_published_one(published, split):
    for task in BENCHMARKS:
        known = {problem.question for problem in published[task]}
        assert not known & {problem.question for problem in generate(task, 1000, seed=7, split=split)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k", 1, 0), "no generator for dataset 'gsm8k'; choose one of: coin_flip, last_letters"),
        (("coin_flip", 1, 0, "dev"), "unknown split 'dev'; allowed: 'train', 'test'"),
    ],
)
def test_generate_names_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


# -------------------------------------------------------------------- the gold answers, from another solver


def solve(problem):
    """The answer, from the words of the question alone, by other means than the generators and the writers."""
    text = problem.question
    if problem.dataset == "coin_flip":
        return "no" if text.count(" flips the coin.") % 2 else "yes"
    if problem.dataset == "last_letters":
        return "".join(re.findall(r"(\S)(?= )", text.split('"')[1] + " "))
    if problem.dataset == "shuffled_objects":
        story = text.split("\n\n")[1]
        *swaps, asked = re.findall(rf"{PLAYERS} and {PLAYERS}|{PLAYERS}", story)
        for pair in reversed(swaps):  # follow the thing back in time to whoever had it at the start
            first, second = pair.split(" and ")
            asked = {first: second, second: first}.get(asked, asked)
        return "ABC"[("Alice", "Bob", "Claire").index(asked)]
    total, *numbers = map(int, re.findall(r"\d+", text))
    for sentence in text.split(". ")[1:-1]:
        total += total if "doubles" in sentence else numbers.pop(0) * (1 if "adds" in sentence else -1)
        assert 1 <= total <= 99
    assert not numbers
    return str(total)


def test_the_other_solver_on_examples_solved_by_hand():
    def ask(dataset, question):
        return solve(Problem("x", dataset, question, "", KINDS[dataset], ("a", "b", "c")))

    assert ask("coin_flip", "Whitney flips the coin. Tj does not flip the coin. Still heads up?") == "no"
    assert ask("last_letters", 'Take the last letters of each words in "Whitney Tj" and') == "yj"
    swaps = "First, Alice and Bob swap. Then, Bob and Claire swap. Finally, Alice and Bob swap. At the end, "
    assert ask("shuffled_objects", f"\n\n{swaps}Alice has the") == "C"
    assert ask("chain_arithmetic", "A box holds 5 nuts. Ann adds 7. Bo doubles the nuts. How many?") == "24"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_are_right(task, split):
    for problem in generate(task, 300, seed=11, split=split):
        assert problem.answer == solve(problem), problem


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_much_more_frequent_than_chance(task):
    answers = [problem.answer for problem in generate(task, 600, seed=5)]
    most = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert most < {"coin_flip": 0.58, "shuffled_objects": 0.41}.get(task, 0.1)


def test_chain_arithmetic_has_two_to_six_steps():
    steps = [len(worked_solution(problem)[0]) for problem in generate("chain_arithmetic", 200, seed=0)]
    assert set(steps) == {2, 3, 4, 5, 6}


# ------------------------------------------------------------------------- the wording, against the benchmark


def template(problem):
    """The question with its names and things taken out: what is left is the benchmark's wording."""
    text = problem.question
    if problem.dataset == "coin_flip":
        return re.sub(r"(?:[^.]+ (?:flips|does not flip) the coin\. )+", "<acts> ", text)
    if problem.dataset == "last_letters":
        return re.sub(r'"[^"]+"', '"<words>"', text)
    start, story = text.split("\n\n")
    for choice in problem.choices:
        start = start.replace(choice, "<thing>")
    return start + "\n\n" + re.sub(rf"\b{PLAYERS}\b", "<who>", story)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_generated_questions_use_the_wording_of_the_benchmark(published, task):
    generated = generate(task, 200, seed=2)
    assert {template(problem) for problem in generated} == {template(problem) for problem in published[task]}


def test_generated_things_are_those_of_the_benchmark_in_the_same_story(published):
    def things(group):
        return {(template(problem), choice) for problem in group for choice in problem.choices}

    assert things(generate("shuffled_objects", 600, seed=2)) == things(published["shuffled_objects"])


@pytest.mark.parametrize("task", ["coin_flip", "last_letters"])
def test_the_length_of_the_benchmark_is_among_the_generated_ones(published, task):
    def lengths(group):
        return {len(worked_solution(problem)[0]) for problem in group}

    # Double names make some of the published last_letters five words long.
    assert lengths(published[task]) == ({4, 5} if task == "last_letters" else {4})
    assert 4 in lengths(generate(task, 100, seed=2)) and len(lengths(generate(task, 100, seed=2))) == 3


# -------------------------------------------------------------------------------------- published datasets

ROWS = {  # dataset -> split -> rows, as the publishers count them
    "single_eq": {"train": 356, "test": 152, "all": 508},
    "addsub": {"train": 276, "test": 119, "all": 395},
    "multiarith": {"train": 420, "test": 180, "all": 600},
    "gsm8k": {"train": 7473, "test": 1319, "all": 8792},
    "svamp": {"train": 700, "test": 300, "all": 1000},
    "commonsense_qa": {"train": 9741, "test": 1221, "all": 10962},
    "strategy_qa": {"train": 1603, "test": 687, "all": 2290},
    "date_understanding": {"train": 258, "test": 111, "all": 369},
    "shuffled_objects": {"train": 525, "test": 225, "all": 750},
    "last_letters": {"train": 350, "test": 150, "all": 500},
    "coin_flip": {"train": 350, "test": 150, "all": 500},
}


@pytest.mark.parametrize("dataset", ROWS)
def test_rows_splits_and_ids(local_copy, dataset):
    parts = {split: load(dataset, split) for split in splits(dataset)}
    assert {split: len(rows) for split, rows in parts.items()} == ROWS[dataset]
    everything = parts.pop("all")
    assert len({row.id for row in everything}) == len(everything)
    assert sorted(row.id for rows in parts.values() for row in rows) == sorted(row.id for row in everything)
    for split, rows in parts.items():
        assert all(row.id.startswith(f"{dataset}/{split}/") for row in rows)
        chosen = {row.id for row in rows}
        assert [row for row in everything if row.id in chosen] == rows  # file order
    assert {(row.dataset, row.kind) for row in everything} == {(dataset, KINDS[dataset])}
    assert load(dataset, "test", limit=3) == parts["test"][:3]


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("single_eq", "single_eq"),
        ("addsub", "addsub"),
        ("multiarith", "multiarith"),
        ("svamp", "svamp"),
        ("strategy_qa", "strategy_qa"),
        ("date_understanding", "date_understanding"),
        ("shuffled_objects", "tracking_shuffled_objects"),
        ("last_letters", "last_letter_concatenation"),
        ("coin_flip", "coin_flip"),
    ],
)
def test_the_split_is_the_published_one(local_copy, dataset, name):
    published = json.loads((local_copy / "reasoning_teacher_splits" / f"{name}__default.json").read_text())
    for split in ("train", "test"):
        assert sorted(int(row.id.rpartition("/")[2]) for row in load(dataset, split)) == published[split]


@pytest.mark.parametrize(
    ("dataset", "place", "question", "answer", "choices"),
    [
        ("single_eq", 11, "The sum of three consecutive even numbers is 162. What is the smallest", "52", ()),
        ("addsub", 0, "Joan found 70 seashells on the beach . she gave Sam some of her seashells .", "43", ()),
        ("multiarith", 0, "For Halloween Debby and her sister combined the candy they received.", "39", ()),
        ("gsm8k", 7473, "Janet\u2019s ducks lay 16 eggs per day.", "18", ()),
        ("svamp", 1, "Dan had $ 3 left with him after he bought a candy bar. If he had $ 4 at the start. How", "1", ()),
        ("aqua", 5, "20 marbles were pulled out of a bag", "D", ("40", "200", "380", "400", "3200")),
        ("strategy_qa", 0, "Is it common to see frost during some college commencements?", "yes", ()),
        (
            "commonsense_qa",
            9741,
            "A revolving door is convenient for two direction travel",
            "A",
            ("bank", "library", "department store", "mall", "new york"),
        ),
        (
            "date_understanding",
            0,
            "Yesterday was April 30, 2021. What is the date today in MM/DD/YYYY?",
            "F",
            ("02/23/2021", "03/11/2021", "04/29/2021", "05/09/2021", "06/12/2021", "05/01/2021"),
        ),
        ("coin_flip", 0, "A coin is heads up. Whitney flips the coin. Erika does not flip", "yes", ()),
        ("last_letters", 0, 'Take the last letters of each words in "Whitney Erika Tj Benito"', "yajo", ()),
        ("shuffled_objects", 0, "Alice, Bob, and Claire are", "C", ("orange ball", "white ball", "blue ball")),
    ],
)
def test_rows_are_read_right(local_copy, dataset, place, question, answer, choices):
    row = load(dataset, "test" if dataset == "aqua" else "all")[place]
    assert row.question.startswith(question)
    assert (row.answer, row.choices) == (answer, choices)


def test_numbers_are_written_as_a_reader_would(local_copy):
    assert {"12.3", "0.5"} < {row.answer for row in load("addsub", "all")}
    assert not [
        row for name in ("single_eq", "multiarith", "svamp") for row in load(name, "all") if row.answer.endswith(".0")
    ]
    assert not [row for row in load("gsm8k", "all") if "," in row.answer]


def test_gold_stands_at_every_place(local_copy):
    for dataset in ("aqua", "commonsense_qa", "date_understanding", "shuffled_objects"):
        rows = load(dataset, "test")
        for letter in "ABC":  # three options at least
            assert 0.1 < sum(row.answer == letter for row in rows) / len(rows) < 0.4


def test_shuffled_options_still_hold_gold(local_copy):
    raw = json.loads((local_copy / "Bigbench_Date" / "task.json").read_text())["examples"]
    for row, read in zip(raw, load("date_understanding", "all"), strict=True):
        gold = next(option for option, score in row["target_scores"].items() if score)
        assert read.choices[LETTERS.index(read.answer)] == gold
        assert sorted(read.choices) == sorted(row["target_scores"])


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_published_gold_agrees_with_both_solvers_but_for_double_names(published, dataset):
    """15 questions of last_letters hold a double name ("Jose Antonio"), of which gold takes one letter."""
    odd = [p for p in published[dataset] if worked_solution(p)[1] != p.answer]
    assert all(solve(problem) == worked_solution(problem)[1] for problem in published[dataset])
    assert len(odd) == (15 if dataset == "last_letters" else 0)
    assert all(len(p.answer) == 4 and len(worked_solution(p)[0]) == 5 for p in odd)


MATH = {
    "math/train.jsonl": [
        {"problem": "What is $1+1$?", "answer": "2", "unique_id": "train/algebra/1.json"},
        {"problem": "Halve $1$.", "answer": "\\frac{1}{2}", "unique_id": "test/prealgebra/7.json"},
    ],
    "math/test.jsonl": [{"problem": "Find $x$.", "answer": "(3, 4)", "unique_id": "test/geometry/9.json"}],
}


def test_math_has_its_own_split_and_the_five_hundred(monkeypatch):
    lines = {path: "".join(json.dumps(row) + "\n" for row in rows).encode() for path, rows in MATH.items()}
    monkeypatch.setattr(datasets, "read_pinned", lambda path: lines[path])
    assert splits("math") == ("train", "test", "test_500", "all")
    assert [row.id for row in load("math", "train")] == ["math/train/algebra/1"]
    assert [row.id for row in load("math", "test")] == ["math/test/prealgebra/7", "math/test/geometry/9"]
    assert [row.id for row in load("math", "test_500")] == ["math/test/geometry/9"]
    assert len(load("math", "all")) == 3
    half = load("math", "test")[0]
    assert (half.question, half.answer, half.kind) == ("Halve $1$.", r"\frac{1}{2}", "math")


def test_aqua_has_its_own_split(monkeypatch):
    row = {"question": "A shop sells ice ...", "options": ["A)125", "B)150"], "rationale": "", "correct": "B"}
    rows = {"AQuA/train.json": [row, row | {"correct": "A"}], "AQuA/test.json": [row]}
    lines = {path: "".join(json.dumps(row) + "\n" for row in found).encode() for path, found in rows.items()}
    monkeypatch.setattr(datasets, "read_pinned", lambda path: lines[path])
    assert [(row.id, row.answer) for row in load("aqua", "all")] == [
        ("aqua/train/0", "B"), ("aqua/train/1", "A"), ("aqua/test/0", "B"),
    ]  # fmt: skip
    assert load("aqua", "train")[0].choices == ("125", "150")


def test_the_test_set_of_aqua_needs_no_train_file(local_copy):
    rows = load("aqua", "test")
    assert len(rows) == 254 and rows[7].id == "aqua/test/7"
    assert {len(row.choices) for row in rows} == {5}


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        ("gsm", "test", "unknown dataset 'gsm'; published datasets: single_eq, addsub, multiarith, gsm8k"),
        ("coin_flip", "dev", "coin_flip has no split 'dev'; it has: train, test, all"),
    ],
)
def test_load_names_what_there_is(dataset, split, message):
    with pytest.raises(ValueError, match=message):
        load(dataset, split)


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("gsm8k", {"question": "How many?"}, r"gsm8k/test.jsonl, row 2: it has no field 'answer'"),
        ("gsm8k", {"question": "How many?", "answer": "#### many"}, r"row 2: Invalid literal for Fraction: 'many'"),
        ("gsm8k", {"question": " ", "answer": "#### 4"}, r"row 2: the question is empty"),
        ("gsm8k", {"question": 5, "answer": "#### 4"}, r"row 2: .*'int'"),
        (
            "aqua",
            {"question": "Which?", "options": ["A)4", "B)5"], "correct": "C"},
            r"AQuA/test.json, row 2: gold 'C' is not one of the options A, B",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(monkeypatch, dataset, row, message):
    good = {"question": "Which?", "options": ["A)4", "B)5"], "correct": "B", "answer": "#### 5"}
    lines = "".join(json.dumps(line) + "\n" for line in (good, row)).encode()
    monkeypatch.setattr(datasets, "read_pinned", lambda path: lines)
    with pytest.raises(DatasetError, match=message):
        load(dataset, "test")


def test_a_row_of_math_without_its_name_is_named(monkeypatch):
    row = json.dumps({"problem": "Halve $1$.", "answer": "0.5"}).encode()
    monkeypatch.setattr(datasets, "read_pinned", lambda path: row)
    with pytest.raises(DatasetError, match=r"math/train.jsonl, row 1: it has no field 'unique_id'"):
        load("math", "train")


@pytest.mark.parametrize("answer", ["Yes", "maybe", ""])
def test_gold_of_another_kind_is_refused(monkeypatch, answer):
    rows = json.dumps({"examples": [{"question": "Still heads up?", "answer": answer}]}).encode()
    monkeypatch.setattr(datasets, "read_pinned", lambda path: rows)
    with pytest.raises(DatasetError, match=f"row 1: gold '{answer}' is neither 'yes' nor 'no'"):
        load("coin_flip", "all")


# --------------------------------------------------------------------------------------------------- options


def test_options_follow_a_choice_question_only():
    choice = Problem("x/0", "x", "Which one?", "B", "choice", ("red ball", "Moby Dick"))
    assert with_options(choice) == "Which one?\nAnswer Choices: (A) red ball (B) Moby Dick"
    assert with_options(Problem("x/1", "x", "How many?", "3", "number")) == "How many?"


# -------------------------------------------------------------------------------------------- equal questions


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("How many  nuts?", "how many nuts ?", True),
        ("Ann's 3 nuts, and Bo's 4.", "ANN’S 3 nuts and Bo's 4", True),
        ("Ａｎｎ has １２ nuts", "Ann has 12 nuts", True),
        ("It costs $1.50.", "It costs 1 50", True),
        ("It costs $1.50.", "It costs 150", False),
        ("Ann has 3 nuts.", "Ann has 4 nuts.", False),
        ("Ann has nuts.", "Anna has nuts.", False),
    ],
)
def test_questions_are_equal_by_their_letters_and_digits(one, other, same):
    assert (question_key(one) == question_key(other)) is same


def test_published_sets_share_questions_as_they_are_known_to(local_copy):
    keys = {
        (name, split): [question_key(problem.question) for problem in load(name, split)]
        for name in ("single_eq", "addsub", "multiarith")
        for split in ("train", "test")
    }
    both = lambda tested, trained: sum(key in set(keys[trained]) for key in keys[tested])  # noqa: E731
    assert both(("multiarith", "test"), ("multiarith", "train")) == 5
    assert both(("single_eq", "test"), ("addsub", "train")) == 24
    assert both(("addsub", "test"), ("single_eq", "train")) == 19
