"""Numbers as a reader sees them."""

from smlib.reports import wording


def test_an_interval_keeps_the_sign_of_an_end_that_rounds_to_zero():
    assert wording.with_interval(86.55, 85.2, 87.94) == "86.5 [85.2, 87.9]"
    assert wording.with_interval(-0.01, -0.04, 0.02, signed=True) == "+0.0 [-0.0, +0.0]"


def test_a_change_whose_interval_includes_zero_is_not_significant():
    assert wording.judged(7.7, 4.1, 11.2) == "+7.7 [+4.1, +11.2] points"
    assert wording.judged(-7.7, -11.2, -4.1) == "-7.7 [-11.2, -4.1] points"
    assert wording.judged(0.3, -2.7, 3.4) == "+0.3 [-2.7, +3.4] points (not significant)"
    assert wording.judged(0.3, 0.0, 0.6).endswith("(not significant)")


def test_tasks_are_named_as_in_a_sentence():
    assert wording.named([]) == "none"
    assert wording.named(["coin_flip"]) == "coin flip"
    assert wording.named(["coin_flip", "svamp", "last_letters"]) == "coin flip, svamp and last letters"
