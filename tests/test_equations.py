"""Equations of a text: which are found, and which are false."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.problems.equations import equations, false_equations


def test_equations_are_read():
    assert equations(" Ann: 9 + 4 = 13.\nBo has 2*$1,000=$2,000 now, 3 more.") == ("9+4=13", "2*1000=2000")
    assert equations("48/2=<<48/2=24>>24") == ("48/2=24",)
    assert equations("9 ** 9 ** 9 ** 9 = 1 and __import__('os').abort() = 3") == ("9**9**9**9=1",)
    assert equations("heads.\nSo x = y.") == ()


@pytest.mark.parametrize(
    "text",
    [
        "3 + 4 = 7", "$1,000 * 2 = $2,000.", "3 x 4 = 12", "12 ÷ 4 = 3", "2 * (3 + 4) = 14", "10 / 3 = 3.33",
        "10 - 3 - 2 = 5", "0.1 + 0.2 = 0.3", "20% * 50 = 10", "-3 + 5 = 2", "5 - 7 = -2",
        "x + 3 = 7", "n - 3 = 7", "nothing to compute",
    ],
)  # fmt: skip
def test_what_holds_is_not_false(text):
    assert false_equations(text) == ()


@pytest.mark.parametrize(
    "text", ["3 + 4 = 8", "- 3 + 4 = 8", "10 / 4 = 2", "10 / 3 = 3.3334", "2 * (3 + 4) = 10", "10 / 3 = 3"]
)
def test_what_does_not_hold_is_false(text):
    assert false_equations(text) == (text.removeprefix("- ").replace(" ", ""),)


@pytest.mark.parametrize(
    "text", ["9 ** 9 ** 9 ** 9 = 1", "5 / 0 = 0", "3(4) = 12", "(3 + 4 = 7", "1.2.3 + 1 = 2", "1" * 300 + " + 1 = 2"]
)
def test_what_cannot_be_computed_is_not_judged(text):
    assert false_equations(text) == ()


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.sampled_from("+-*/"), st.integers(-3, 3))
def test_exact_results_alone_hold(a, b, sign, off):
    exact = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b)}[sign]
    if exact.denominator == 1:
        assert bool(false_equations(f"{a} {sign} {b} = {exact + off}")) == (off != 0)


@given(st.text("0123456789.,()$%+-*/×÷x= ", max_size=60))
def test_any_text_is_read(text):
    assert set(false_equations(text)) <= set(equations(text))
