"""Questions that datasets share, whatever their wording."""

import os

import pytest

from smlib.problems.datasets import GROUPS, Problem, load, question_key
from smlib.problems.duplicates import shared_questions
from smlib.runs import questions
from smlib.runs.settings import preset


def asks(name: str, question: str, kind: str = "number") -> Problem:
    return Problem(name, "toy", question, "1", kind)


published = pytest.mark.skipif("SML_DATA_DIR" not in os.environ, reason="needs the published data")

TREES = (
    "There are 1,107 walnut trees in the park. Workers will plant 104 more walnut trees today. How many will it have?"
)


@pytest.mark.parametrize(
    ("question", "same"),
    [
        (TREES.upper().replace(".", " ."), True),
        (TREES.replace("park.", "park !"), True),
        (TREES.replace("1,107", "1107").replace("more ", ""), True),
        (TREES.replace("104", "105"), False),  # another question of one template
        ("Bo has 1,107 cards and buys 104. How many now?", False),  # the numbers alone
    ],
)
def test_a_word_problem_is_known_by_its_numbers_and_most_of_its_words(question, same):
    assert shared_questions([asks("a", question)], [asks("b", TREES)]) == ({"a": "b"} if same else {})


def test_without_numbers_or_in_another_kind_of_task_only_equal_questions_are_the_same():
    date = "Today is the 3 of May. What is the date tomorrow in MM/DD/YYYY, please?"
    other = date.replace("tomorrow", "yesterday")
    assert not shared_questions([asks("a", date, "choice")], [asks("b", other, "choice")])
    assert shared_questions([asks("a", date, "choice")], [asks("b", date.replace(",", ""), "choice")]) == {"a": "b"}
    plain = "How many hours are in a day and a half, would you say?"
    assert not shared_questions([asks("a", plain)], [asks("b", plain.replace("say", "think"))])


def assert_asked_once(problems):
    """Within a dataset SVAMP asks the same numbers in nearly the same words on purpose: there only equal ones count."""
    assert len({(one.dataset, question_key(one.question)) for one in problems}) == len(problems)
    for dataset in {problem.dataset for problem in problems}:
        own = [problem for problem in problems if problem.dataset == dataset]
        assert not shared_questions(own, [problem for problem in problems if problem.dataset != dataset])


@published
@pytest.mark.parametrize("task", ["word_problems", "single_eq", "multiarith"])
def test_no_train_question_is_a_test_question_and_none_comes_twice(task):
    members = GROUPS.get(task, (task,))
    train, left_out = questions.train_questions(task)
    tests = [problem for dataset in members for problem in load(dataset, "test")]
    assert not shared_questions(train, tests)
    assert len({problem.id for problem in train}) == len(train)
    everything = sum(len(load(dataset, "train")) for dataset in members)
    assert len(train) + sum(left_out.values()) == everything
    assert_asked_once(train)


@published
def test_word_problems_leave_out_what_the_datasets_share():
    """Counted by hand once more: 98 train questions stand in a test split; exact text finds half of them."""
    _, left_out = questions.train_questions("word_problems")
    assert left_out == {"asked in a test split": 98, "asked before": 136}
    sets = questions.test_problems(preset("tiny", "word_problems", evaluation={"questions": 10_000}))
    assert {name: len(found) for name, found in sets.items()} == {
        "single_eq": 152, "addsub": 92, "svamp": 300, "multiarith": 177, "gsm8k_easy": 440,
    }  # fmt: skip
    assert_asked_once([problem for found in sets.values() for problem in found])


@published
def test_a_run_on_a_group_asks_every_dataset_and_no_question_twice():
    settings = preset("tiny", "word_problems", sampling={"questions": 400}, reward={"questions": 300})
    first, second = questions.training_problems(settings), questions.second_problems(settings)
    asked = questions.ppo_problems(settings)
    third = [problem for update in range(settings.ppo.updates) for problem in asked(update)]
    assert {problem.dataset for problem in first} == set(GROUPS["word_problems"])
    names = [{problem.id for problem in some} for some in (first, second, third)]
    assert [len(some) for some in names[:2]] == [400, 300]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    assert first != questions.training_problems(preset("tiny", "word_problems", 1, sampling={"questions": 400}))


@published
def test_the_easy_end_of_gsm8k_has_at_most_two_calculations():
    easy, whole = load("gsm8k_easy", "test"), {one.question: one for one in load("gsm8k", "test")}
    assert len(easy) == 440 and all(one.question in whole for one in easy)
    assert all(one.id == whole[one.question].id.replace("gsm8k", "gsm8k_easy") for one in easy)


@published
def test_a_group_has_fresh_questions_of_every_dataset():
    settings = preset("tiny", "word_problems", sampling={"questions": 400}, reward={"questions": 300})
    fresh = questions.fresh_problems(settings, 3)
    assert [problem.dataset for problem in fresh] == [name for name in GROUPS["word_problems"] for _ in range(3)]
    assert settings.datasets == GROUPS["word_problems"] and preset("tiny", "svamp").datasets == ("svamp",)
