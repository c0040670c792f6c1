"""A sheet of rationales for a reader, and the agreement of two judges."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.problems.datasets import Problem, generate
from smlib.problems.prompts import answer_sentence
from smlib.problems.steps import worked_solution
from smlib.reports import agreement

PROBLEMS = generate("coin_flip", 6, seed=0) + generate("last_letters", 6, seed=0)
WRONG = "The answer is nonsense of many words."


def answered(problem, **fields):
    lines, answer = worked_solution(problem)
    sound = "\n".join(["", *lines, answer_sentence(problem, answer)]).strip()
    lucky = answer_sentence(problem, answer)
    row = {"sampled_texts": [f" {sound}", f" {lucky}", f" {WRONG}"], "sampled_correct": [True, True, False]}
    return row | fields


def test_a_sheet_has_as_many_of_each_task_and_knows_who_is_right_and_who_is_sound():
    rows = agreement.draw(PROBLEMS, [answered(one, scores=[3.0, 2.0, 1.0]) for one in PROBLEMS], 12, seed=0)
    assert [row["number"] for row in rows] == list(range(1, 13))
    assert {row["id"] for row in rows} == {problem.id for problem in PROBLEMS}
    assert [row["dataset"] for row in rows].count("coin_flip") == 6
    assert {row["score"]: (row["right"], row["sound"]) for row in rows} == {
        3.0: (True, True), 2.0: (True, False), 1.0: (False, False)
    }  # fmt: skip
    assert agreement.draw(PROBLEMS, [answered(one, scores=[3.0, 2.0, 1.0]) for one in PROBLEMS], 12, seed=1) != rows


def test_of_a_task_without_steps_the_sheet_knows_no_sound_ones():
    asked = Problem("gsm8k/test/0", "gsm8k", "How many?", "3", "number")
    row = {"sampled_texts": [" The answer is 3."], "sampled_correct": [True]}
    ((found),) = agreement.draw([asked], [row], 1, seed=0)
    assert (found["right"], found["sound"], found["score"]) == (True, None, None)


@pytest.mark.parametrize("n", [3, 14])
def test_a_sheet_that_cannot_be_filled_is_refused(n):
    with pytest.raises(ValueError, match=f"n = {n} is not allowed: give a multiple of the 2 datasets, at most 12"):
        agreement.draw(PROBLEMS, [answered(one) for one in PROBLEMS], n, seed=0)


def test_verdicts_are_read_whatever_their_blanks_and_case():
    assert agreement.read_verdicts("yn Y\nN", 4) == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ynx", "verdict 3 is 'x': write y for a sound rationale, n for any other"),
        ("yn", "2 verdicts for 3 rationales: write one letter, y or n, for each"),
        ("ynyy", "4 verdicts for 3 rationales"),
    ],
)
def test_other_verdicts_are_refused(text, told):
    with pytest.raises(ValueError, match=told):
        agreement.read_verdicts(text, 3)


def test_kappa_by_hand():
    # The textbook table: both yes 20, both no 15, first yes alone 5, second yes alone 10; chance 0.5, observed 0.7.
    one = [True] * 20 + [False] * 15 + [True] * 5 + [False] * 10
    other = [True] * 20 + [False] * 15 + [False] * 5 + [True] * 10
    value, low, high = agreement.kappa(one, other)
    assert value == pytest.approx(0.4) and low < 0.4 < high
    # its large-sample standard error is 0.127: 0.4 +- 0.25
    assert (low, high) == (pytest.approx(0.151, abs=0.04), pytest.approx(0.649, abs=0.04))


def test_judges_who_agree_on_all_have_kappa_one_and_opposites_minus_one():
    one = [True, False] * 5
    assert agreement.kappa(one, one)[0] == 1 and agreement.cohens_kappa(one, np.logical_not(one)) == -1


def test_an_almost_one_sided_sheet_has_an_interval():
    """Fault: one draw of the bootstrap with a single verdict took the interval away."""
    one = [True] * 54 + [False] * 6
    value, low, high = agreement.kappa(one, [True] * 55 + [False] * 5)
    assert low < value <= high and value == pytest.approx(0.9006, abs=1e-3)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ([True, None], [True, False], "1 of 2 verdicts are missing: the step checker knows only"),
        ([True], [True, False], "1 verdicts beside 2: give both judges the same rationales, at least one"),
        ([], [], "0 verdicts beside 0"),
    ],
)
def test_judges_who_cannot_be_compared_are_refused(one, other, told):
    with pytest.raises(ValueError, match=told):
        agreement.kappa(one, other)


def test_missing_verdicts_are_not_turned_round():
    with pytest.raises(ValueError, match="2 of 2 verdicts are missing"):
        agreement.turned([None, None], 0.1, seed=0)


def test_one_sided_judges_have_no_kappa():
    assert all(math.isnan(number) for number in agreement.kappa([True] * 5, [True] * 5))


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_kappa_is_symmetric_and_blind_to_what_yes_means(pairs):
    one, other = np.array(pairs).T
    value = agreement.cohens_kappa(one, other)
    np.testing.assert_allclose(agreement.cohens_kappa(other, one), value)
    np.testing.assert_allclose(agreement.cohens_kappa(~one, ~other), value)
    assert math.isnan(value) or -1 <= value <= 1


def test_a_judge_who_slips_turns_about_that_share_round():
    verdicts = [True, False] * 500
    slipped = agreement.turned(verdicts, 0.1, seed=0)
    assert 70 < sum(a != b for a, b in zip(verdicts, slipped, strict=True)) < 130
    assert agreement.turned(verdicts, 0.0, seed=0) == verdicts
