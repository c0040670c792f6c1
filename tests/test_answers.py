import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smlib.judging.answers import Verdict, before_answer, extract, grade, grade_many
from smlib.problems.datasets import Problem


def problem(kind, answer, choices=()):
    return Problem("test/0", "test", "What is asked?", answer, kind, choices)


NUMBER = problem("number", "18")
YES = problem("yes_no", "yes")
LETTERS = problem("letters", "yajo")
CHOICE = problem("choice", "B", ("red ball", "Moby Dick.", "vitamin C", "a movie"))


@pytest.mark.parametrize(
    "output",
    [
        " 9 * 2 = 18\nThe answer is 18.",
        "Therefore, the answer is 18",
        "Therefore, the answer (arabic numerals) is 18.",
        "Therefore, the answer (arabic numerals) is:\n\n18 eggs",
        "A: 18",
        "She has $<<9*2=18>>18 left.\n#### 18",
        "A: $<<9*2=18>>18",
        r"So we get \boxed{18}.",
        r"The answer is $\boxed{18}$.",
        "**Answer:** 18",
        "the final answer is 18.0 dollars",
        "The answer is $18.00.",
        "The answer is 36/2.",
        "The answer is 9 + 9 = 18.",
        "The answer is 18 because 9 + 10 is too much.",
        "The answer is 18. I hope this helps!",
        "The answer (arabic numerals) is 18.\nThe answer (in words) is eighteen.",
        "The answer is 3.\nNo: the answer is 18.",
        "The answer is 18.\n\nQ: And of 5?\nA: The answer is 5.",
    ],
)
def test_every_form_of_answer_sentence_is_read(output):
    assert grade(NUMBER, output) == Verdict(True, "18", "said 18, gold 18")


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1,234,567", "1234567"),
        ("$1,000.50", "1000.5"),
        ("-5", "-5"),
        ("−$5", "-5"),
        ("$-5", "-5"),
        ("minus 5", "-5"),
        (".5", "0.5"),
        ("3/4", "0.75"),
        ("2/6", "1/3"),
        ("1 1/2", "1.5"),
        (r"\frac{3}{4}", "0.75"),
        ("007", "7"),
        ("-0", "0"),
        ("5kg", "5"),
        ("about 12 apples", "12"),
        ("3/5, or 0.6", "0.6"),
        ("5 crackers and 5 cakes", "5"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
    ],
)
def test_numbers_have_one_canonical_form(written, canonical):
    assert extract(NUMBER, f"The answer is {written}.") == canonical
    assert grade(problem("number", written), f"The answer is {canonical}").correct


def test_numbers_are_compared_exactly_except_with_a_gold_that_is_a_printed_float():
    assert not grade(problem("number", "1/3"), "The answer is 0.33.").correct
    assert not grade(problem("number", "0.3"), "The answer is 0.30000000000000004.").correct
    assert grade(problem("number", "0.6666666666666666"), "The answer is 2/3.").correct
    assert not grade(problem("number", "0.6666666666666666"), "The answer is 0.67.").correct


def test_a_percentage_is_a_number_only_where_gold_or_the_question_says_percent():
    """GSM8K asks "what percentage" and writes 50; elsewhere 5% may mean 5 or 0.05."""
    asked = Problem("test/0", "test", "What percentage of her weekend is it?", "50", "number")
    assert grade(asked, "The answer is 50%.") == Verdict(True, "50", "said 50, gold 50")
    assert grade(asked, "The answer is 50 percent.").correct
    assert grade(asked, r"The answer is \boxed{50\%}.").correct
    assert grade(asked, "The answer is 50.").correct
    assert not grade(asked, "The answer is 0.5.").correct
    for answer in ("5%", "5 %", r"5\%", "5 per cent"):
        assert grade(problem("number", "5%"), f"The answer is {answer}.").correct
        assert grade(problem("number", answer), "The answer is 5.").correct
        for gold in ("5", "0.05"):
            assert grade(problem("number", gold), f"The answer is {answer}.").reason.startswith("invalid: a percentage")
    assert not grade(problem("number", "5%"), "The answer is 0.05.").correct


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("x = 18", "18"),
        ("3x = 54, so x = 18", "18"),
        ("x = 9 + 9 = 18", "18"),
        ("3 x 6 = 18", "18"),
        ("2 x (4 + 5) = 18", "18"),
        ("**18** eggs", "18"),
        ("x + 4 = 18", None),
        ("2x = 18", None),
        ("3(x) = 18", None),
        (r"\frac{2}{x} = \frac{36}{2}", None),
        ("18*age", None),
        ("18 * age + 2", None),
        ("18 + her age", None),
    ],
)
def test_an_equation_says_its_result_unless_it_is_not_solved(answer, said):
    assert extract(NUMBER, f"The answer is {answer}") == said


@pytest.mark.parametrize(
    "answer",
    [
        "3 or 18",
        "18 or maybe 20",
        "18 apples and 3 pears",
        "18 to 20",
        "18-20",
        "18:30",
        "18, 19, 20",
        "1 8",
        "18/0",
        "9 + 9",
        "9 * 2 =",
        "not 18",
        "eighteen",
        "_____.",
        "",
        r"\boxed{3} or \boxed{18}",
        "1,80",
        "18e5",
        "9" * 1000,
    ],
)
def test_a_number_that_hedges_or_cannot_be_read_is_invalid(answer):
    verdict = grade(NUMBER, f"The answer is {answer}")
    assert (verdict.correct, verdict.extracted) == (False, None)
    assert verdict.reason.startswith("invalid: ")


def test_reasons_tell_the_reader_what_happened():
    assert grade(NUMBER, "The answer is 12.").reason == "said 12, gold 18"
    assert grade(NUMBER, "It is 18.").reason == "invalid: no answer sentence; gold 18"
    assert grade(NUMBER, "The answer is 3 or 7").reason == "invalid: several answers, 3 and 7; gold 18"
    assert grade(CHOICE, "The answer is F.").reason == "invalid: F is not one of the options A to D; gold B"


def test_only_the_part_before_the_next_question_counts():
    assert extract(NUMBER, "9 * 2 is 18.\nQ: What else?\nThe answer is 18.") is None
    assert extract(NUMBER, "As the FAQ: says, the answer is 18.") == "18"


def test_the_given_answer_of_a_conditioned_prompt_is_no_answer():
    assert extract(NUMBER, "Given answer: 18\nSo she has 9 * 2.") is None


@pytest.mark.parametrize(
    "answer",
    [
        "(B)",
        "(B).",
        "B",
        "B.",
        "B)",
        "(b)",
        "B: Moby Dick",
        "B, Moby Dick",
        "(B) Moby Dick.",
        "option B",
        "most likely (B)",
        "Moby Dick",
        "moby dick.",
        '"Moby Dick."',
        "B because A is red",
        "the book, (B)",
    ],
)
def test_a_choice_is_named_by_label_or_by_exact_text(answer):
    assert extract(CHOICE, f"Therefore, among A through D, the answer is {answer}") == "B"


@pytest.mark.parametrize(
    "answer",
    [
        "Because",
        "Both",
        "BC",
        "A movie theatre",
        "Moby",
        "A or B",
        "(A) or maybe (B)",
        "either C or B",
        "A, B, C",
        "(B) Moby Dick or (C) vitamin C",
        "neither (A) nor (B)",
        "D / B",
        "not B",
        "E",
        "B's book",
        "none of them",
    ],
)
def test_a_choice_is_never_a_capital_out_of_a_word_and_never_a_hedge(answer):
    assert extract(CHOICE, f"The answer is {answer}") is None


def test_option_text_goes_before_the_capitals_in_it():
    assert extract(CHOICE, "The answer is vitamin C.") == "C"
    assert extract(CHOICE, "The answer is a movie.") == "D"
    assert extract(CHOICE, "The answer is A.") == "A"


def test_an_option_may_begin_with_not():
    asked = problem("choice", "A", ("not listening", "listening"))
    assert extract(asked, "The answer is not listening.") == "A"
    assert extract(asked, "The answer is not (B).") is None


def test_the_text_of_two_equal_options_names_none():
    assert extract(problem("choice", "A", ("8.75", "8.79", "8.75")), "The answer is 8.75.") is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"),
        ("Yes, it is.", "yes"),
        (':\n\n"No".', "no"),
        ("YES", "yes"),
        ("most likely No", "no"),
        ("yes or no", None),
        ("No and yes", None),
        ("nothing", None),
        ("It depends", None),
        ("not yes", None),
    ],
)
def test_yes_or_no_is_the_first_whole_word(answer, said):
    assert extract(YES, f"Therefore, the answer (Yes or No) is {answer}") == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yajo.", "yajo"),
        ('"yajo."', "yajo"),
        ("Y-A-J-O", "yajo"),
        ("y a j o", "yajo"),
        ("'y', 'a'", "ya"),
        ('the word "yajo".', "yajo"),
        ('"ya" or "jo"', None),
        ("yajo or jo", None),
        ("yajo4", None),
        ("?", None),
        ("me\u0301yl", "méyl"),
    ],
)
def test_letters_drop_hyphens_quotes_and_spaces(answer, said):
    assert extract(LETTERS, f"The answer is {answer}") == said


def test_math_is_judged_by_value():
    asked = problem("math", r"\frac{1}{2}")
    said = r"\frac{1}{2}"
    assert grade(asked, r"So it is $\boxed{\dfrac{3}{6}}$.") == Verdict(True, said, f"said {said}, gold {said}")
    assert grade(asked, "The answer is $0.5$.").correct
    assert grade(asked, "The answer is 1/3.").reason == rf"said \frac{{1}}{{3}}, gold {said}"
    assert grade(asked, "It is 0.5.") == Verdict(False, None, f"invalid: no box and no answer sentence; gold {said}")
    assert grade(problem("math", r"2\sqrt{3}"), r"\boxed{\sqrt{12}}").correct
    assert extract(asked, r"\boxed{0.5}") == said
    assert extract(asked, "The answer is 0.5 or 0.6.") is None


def test_problems_that_cannot_be_judged_raise():
    with pytest.raises(ValueError, match="'essay' cannot be judged"):
        grade(problem("essay", "1"), "The answer is 1.")
    with pytest.raises(ValueError, match="the gold answer '\\$' is empty"):
        grade(problem("math", "$"), "The answer is 1.")
    with pytest.raises(ValueError):
        grade_many([], ["The answer is 1."])


@pytest.mark.parametrize(
    ("kind", "answer", "allowed"),
    [
        ("number", "many", "one number"),
        ("number", "yes", "one number"),
        ("number", "3 or 4", "one number"),
        ("number", "", "one number"),
        ("choice", "E", "E is not one of the options A to D; allowed is the letter"),
        ("choice", "18", "the letter of one of the options"),
        ("yes_no", "18", "yes or no"),
        ("yes_no", "maybe", "yes or no"),
        ("letters", "18", "one word of letters"),
        ("letters", "two words", "one word of letters"),
    ],
)
def test_gold_of_the_wrong_kind_is_named_with_its_problem(kind, answer, allowed):
    asked = problem(kind, answer, CHOICE.choices if kind == "choice" else ())
    with pytest.raises(ValueError, match=rf"test/0: the gold answer '{answer}' .* kind '{kind}': .*{allowed}"):
        grade(asked, "The answer is 1.")


PIECES = [
    "The answer is ",
    "\nA:",
    "####",
    r"\boxed{",
    "}",
    r"\frac{1}{0}",
    "Q:",
    "or",
    " and ",
    "yes",
    "no",
    "(B)",
]
PIECES += [
    "A",
    " ",
    "\n",
    ",",
    ".",
    "-",
    "/",
    "=",
    "$",
    "1",
    "000",
    "(",
    ")",
    '"',
    "<<",
    ">>",
    "likely ",
    "²",
    "٣",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_a_verdict(text):
    for asked in (NUMBER, YES, LETTERS, CHOICE):
        verdict = grade(asked, text)
        assert verdict.extracted == extract(asked, text)
        assert verdict.correct == (verdict.extracted == asked.answer)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
@settings(deadline=None)
def test_a_number_is_read_back_whatever_its_separators(value):
    assert grade(problem("number", f"{value}"), f"The answer is {value:,}.").correct


@given(st.text(), st.sampled_from([NUMBER, YES, LETTERS, CHOICE]))
@settings(deadline=None)
def test_what_stands_before_the_answer_sentence_has_no_influence(text, asked):
    answer = f"\nThe answer is {asked.answer}."
    assert grade(asked, text.replace("Q:", "") + answer).correct


@given(st.sampled_from(PIECES), st.sampled_from(PIECES))
@settings(deadline=None, max_examples=40)
def test_judging_takes_linear_time(first, second):
    text = "The answer is " + (first + second) * 5_000
    start = time.process_time()
    for asked in (NUMBER, YES, LETTERS, CHOICE):
        grade(asked, text)
    assert time.process_time() - start < 1  # some milliseconds; a quadratic search takes minutes


def test_last_letters_may_spell_not():
    """A question of the published set has this gold."""
    problem = Problem("last_letters/published/x", "last_letters", "Take the last letters", "not", "letters")
    assert grade(problem, "The answer is not.").correct
    assert grade(problem, "The answer is not yet clear.").extracted is None


# ------------------------------------------------------------------------------------------ before the answer

MATH = problem("math", "5")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Ann: heads.\nBob: tails.\nThe answer is yes.", " Ann: heads.\nBob: tails."),
        (" 9 * 2 = 18\nSo the answer is 18.", " 9 * 2 = 18"),
        ("Bob: tails.\nTherefore, the final answer is: no", "Bob: tails."),
        ("One.\nTherefore, among A through E, the answer is (B)", "One."),
        ("She sells nine, so the answer is 18", "She sells nine"),
        ("x\n#### 18", "x"),
        ("x\n**The answer is 18.**", "x"),
        ("x\n\n**Final Answer:** 18", "x"),
        ("x\n\n### Final Answer\n\n\\boxed{18}", "x"),
        ("x\nA: 18", "x"),
        ("So 9 * 2 = \\boxed{18}.", "So 9 * 2"),
        ("We have 5.\n\n\\[\n\\boxed{5}\n\\]", "We have 5."),
        ("It is \\fbox{5}", "It"),
        ("- one\n- two\n\n- Answer: 5", "- one\n- two"),
        ("It costs 5$ The answer is 5", "It costs 5$"),
        ("1 The answer is 5. 2 The answer is 6.", "1"),
        ("x.\n\nQ: And of 5?\nA: 5", "x."),
        ("The answer is 18", ""),
        ('"Tina" ends in "a".\nThe answer is iaca.', '"Tina" ends in "a".'),  # no article before the announcement
        ("Bob has an A.\n\n**Answer:** A", "Bob has an A."),
        ("no announcement, so the \n", "no announcement, so the"),
        ("Given answer: 5. Two and two.", "Given answer: 5. Two and two."),
        ("", ""),
    ],
)
def test_before_answer_is_the_text_up_to_the_first_announcement(text, kept):
    assert before_answer(text) == kept


REASONING = [
    " Ann: heads.",
    "Bob: tails.",
    " 9 * 2 = 18",
    "$x = 5$",
    "So ",
    "Therefore, the final ",
    "**",
    "#### ",
    "the ",
]
REASONING += [
    "- ",
    "A: ",
    "A: There are 15 trees. ",
    "A: Ann.",
    "Given answer: 3",
    " answer",
    " is",
    "Is",
    " (in words)",
]
REASONING += ["\n", "\n\n", " ", ".", ":", "among A through E, ", "\r", "\x0b", "Q:", "\nQ: ", "\\", "$", "5"]
ANNOUNCED = [
    "The answer is 18.",
    "The answer is yes",
    "answer is (B)",
    "**Answer:** 5",
    "\n#### 18",
    "\nA: 18",
    "\\boxed{5}",
]
ANNOUNCED += ["ANSWER: 5", "\\fbox{5}", "the answer (in words) is five", "the answer (Yes or No) is no", "answer:"]


@given(
    st.lists(st.sampled_from(REASONING + ANNOUNCED), max_size=12).map("".join) | st.text(),
    st.sampled_from([NUMBER, YES, LETTERS, CHOICE, MATH]),
)
@settings(deadline=None, max_examples=500)
@example("Q:Q:The answer is 18.", NUMBER)  # what is left of it reads like a next question
def test_before_answer_holds_no_answer_and_is_a_beginning(text, asked):
    kept = before_answer(text)
    assert text.startswith(kept)
    assert kept == kept.rstrip()
    assert before_answer(kept) == kept
    verdict = grade(asked, kept)
    assert verdict.extracted is None
    assert "no answer sentence" in verdict.reason
