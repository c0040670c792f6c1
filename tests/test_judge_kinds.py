r"""Kinds of faults that evaluation harnesses, verifiers and trainers were reported for, each with cases of our own.

A line of a table is what stands after "The answer is"; gold is 18, (B), yes or yajo where nothing else is said.
"""

import json
import os
import time
from pathlib import Path

import pytest

from smlib.judging.answers import before_answer, grade
from smlib.problems.datasets import Problem

CHOICES = ("red ball", "Moby Dick.", "vitamin C", "a movie")
GOLD = {"number": "18", "choice": "B", "yes_no": "yes", "letters": "yajo", "math": "18"}


def problem(kind, gold=None, question="What is asked?"):
    return Problem("test/0", "test", question, gold or GOLD[kind], kind, CHOICES if kind == "choice" else ())


def judge(said, kind="number", gold=None, question="What is asked?"):
    return grade(problem(kind, gold, question), f"The answer is {said}")


def lines(table):
    return [line.strip() for line in table.strip().splitlines()]


# -------------------------------------------------------------------------------------------- the public reports

CASES = Path(os.environ.get("SML_JUDGE_CASES") or Path(__file__).parents[2] / "shared" / "cases")


def public_reports():
    path = CASES / "judge_public_reports.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


@pytest.mark.skipif(
    not public_reports(), reason="needs the cases of public reports: set SML_JUDGE_CASES to their folder"
)
@pytest.mark.parametrize("row", public_reports(), ids=lambda row: row["id"])
def test_public_report(row):
    asked = Problem("test/0", "test", "?", row["gold"], row["problem_kind"], tuple(row.get("choices", ())))
    verdict = grade(asked, row["output"])
    allowed = {
        "right": verdict.correct,
        "not right": not verdict.correct,
        "right or invalid": verdict.correct or verdict.extracted is None,
    }
    assert allowed[row["expect"]], verdict


# ----------------------------------------------------------------------------------------------- plain right answers

PLAIN = r"""
18
**18**
*18*
`18`
"18"
(18)
$18$
\(18\)
$18.00
\$18
18 dollars.
18€
18 apples
18 eggs that she can eat or sell
18 apples and 18 pears
18 (9 * 2)
18 (9 * 2 = 18)
18 (eighteen)
18 or eighteen
18 or 36/2
18, or 18.0
18 because 9 * 2 is 18
18, in total, so she earns that much
18 - that is all
18 - a lot of eggs
18 cm^2
18 m²
18^\circ
18 m
18kg
18 years old
18 more than Ann
18 times as many
18 of 20 students
18 pairs of shoes
18 points per game
18 rather than 17
18 (not 17)
18, not 17
18!
18...
18</s>
<answer>18</answer>
18\n
-> 18
=> 18
= 18
≈ 18
about 18
exactly 18 apples
a total of 18
a sum of 18 dollars
that the number of students who did not pass is 18
that she does not eat them, so she has 18
that the eggs add up to 18
that she has left over 18 eggs
the unknown number is 18
\text{18}
\textbf{18}
18\text{ eggs}
18\,\text{cm}
\boxed{\boxed{18}}
\boxed{\text{18 eggs}}
18. I hope this helps!
18. No further eggs are sold.
18 if this month has 30 days
"""


@pytest.mark.parametrize("said", lines(PLAIN))
def test_a_plain_right_answer_is_right(said):
    assert judge(said).correct, judge(said).reason


# ------------------------------------------------------------------------------------- thousands marks and characters

THOUSANDS = [
    ("9{,}500", "9500"),
    (r"12{,}345{,}678", "12345678"),
    (r"12\,345", "12345"),
    (r"$7\,250.50$", "7250.5"),
    (r"12,\!345,\!678", "12345678"),
    (r"4\ 000", "4000"),
    (r"4\;000", "4000"),
    (r"4{\,}000", "4000"),
    (r"\boxed{$4{,}000}", "4000"),
    (r"\boxed{\$9{,}500.00}", "9500"),
    ("4\u00a0000", "4000"),
    ("4\u2009000\u2009000 dollars", "4000000"),
    ("4\u202f000", "4000"),
    ("4\u2007000", "4000"),
    ("4'000", "4000"),
    ("4’000’000.25", "4000000.25"),
    ("4_000", "4000"),
    (r"4\_000", "4000"),
    ("-4'000", "-4000"),
    ("4٬000", "4000"),
    ("4,000,000", "4000000"),
]


@pytest.mark.parametrize(("said", "gold"), THOUSANDS)
def test_a_thousands_mark_is_read(said, gold):
    assert judge(said, gold=gold).correct, judge(said, gold=gold).reason
    first = gold.lstrip("-")[: 2 if gold.startswith("12") else 1]
    assert not judge(said, gold=first).correct


@pytest.mark.parametrize(
    "said", ["4'00", "4_00", r"4\,00", "4\u00a000", "4'0000", "4000'000", "4'11", "4·000", "4;000", "4 000", "4`000"]
)
def test_what_only_looks_like_a_thousands_mark_is_invalid(said):
    for gold in ("4", "400", "4000", "4000000"):
        assert judge(said, gold=gold).extracted is None


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("１８", "18"),
        ("١٨", "18"),
        ("1\u200b8", "18"),
        ("\u200e18\u200f", "18"),
        ("\u206618\u2069", "18"),
        ("18½", "18.5"),
        ("18 ¾", "18.75"),
        ("½", "0.5"),
        ("1⁄2", "0.5"),
        ("18²", None),
        ("18₂", None),
        ("1\u03388", None),
        ("18\u0338", None),
        ("1\ufe0f\u20e38\ufe0f\u20e3", None),
        ("\u202e81", None),
        ("XVIII", None),
        ("①8", None),
    ],
)
def test_characters_mean_what_a_reader_sees(said, value):
    assert judge(said).extracted == value


# ---------------------------------------------------------------------------------------------------- multipliers


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("5 million", "5000000"),
        ("1.5 Million dollars", "1500000"),
        ("**5** million", "5000000"),
        (r"\boxed{5} million", "5000000"),
        (r"5 \text{ thousand}", "5000"),
        ("$5 billion", "5000000000"),
        ("5-thousand", "5000"),
        ("18 hundred", "1800"),
        ("2 dozen eggs", "24"),
        ("5 hundred thousand", None),
        ("5 million 200 thousand", None),
        ("5 and a half million", None),
        ("a hundred and 18", None),
        ("$18k", None),
        ("18K", None),
        ("18 k", None),
        ("18M", None),
        ("$18m", None),
        ("$18B", None),
        ("18bn", None),
        ("18 lakh", None),
        ("18 crore", None),
        ("2 score", None),
        (r"\boxed{18}k", None),
        ("18 m", "18"),
        ("18kg", "18"),
        ("18 thousandths", None),
    ],
)
def test_a_multiplier_is_read_or_invalid(said, value):
    assert judge(said).extracted == value


def test_a_multiplier_that_the_question_asks_for_is_a_unit():
    assert judge("3 dozen", gold="3", question="How many dozen eggs does she sell?").correct
    assert judge("3 million", gold="3", question="How many million people live there?").correct
    assert judge("3 dozen", gold="36", question="She sells 3 dozen. How many eggs are that?").correct


# -------------------------------------------------------------------------------------------- a piece of a formula

PIECES = r"""
\sqrt{18}
\sqrt 18
\sqrt[3]{18}
√18
sqrt(18)
the square root of 18
\frac{18}{x}
\frac{x}{18}
\frac{18.5}{2}
\log 18
f(18)
2(18)
2 \cdot 18
2*18
18²
18^{2}
18^2
x^{18}
x_{18}
18_{20}
18x
18 x
18n
18i
18π
18 \pi
18√2
\boxed{18}\sqrt{2}
\boxed{18}^2
2\boxed{18}
-\boxed{18}
-(18)
|18|
$18!$
18!/17!
18 \cdot 10^3
18 × 10³
18e3
18 + 2
18 - x
18 * age
18 + her age
x + 18
her age plus 18
n / 18
18/7/2
18:30
18 plus 2
18 times 2
18 divided by 2
half of 18
half 18
a third of 18
two thirds of 18
10% of 18
twice 18
double 18
three times 18
the square of 18
18 squared
18 factorial
18 and a half
18 and three quarters
18 thirds
18 point five
18 hours 30 minutes
18 feet 6 inches
18 more than 3
the sum of 18 and 18
18 degrees below zero
18%
18\%
18％
18‰
"""


@pytest.mark.parametrize("said", lines(PIECES))
def test_a_piece_of_a_formula_is_no_answer(said):
    assert not judge(said).correct, judge(said).reason


@pytest.mark.parametrize(
    ("said", "value"),
    [
        (r"\frac12", "0.5"),
        (r"\frac{1}2", "0.5"),
        (r"-\frac{1}{2}", "-0.5"),
        (r"2\frac{1}{2}", "2.5"),
        (r"\dfrac{36}{2}", "18"),
        (r"9 \times 2 = 18", "18"),
        (r"\left( 18 \right)", "18"),
        (r"x = \frac{36}{2} = 18", "18"),
    ],
)
def test_latex_of_a_number_is_read(said, value):
    assert judge(said).extracted == value


# ---------------------------------------------------------------------------------------------------------- hedges

NUMBER_HEDGES = r"""
18 or 17
17 or 18
18 or seventeen
18 (or 17)
18 (17)
18, or else 17
18 or possibly 17
18, maybe 17
18, perhaps 17
18 but maybe 17
18, but it could also be 17
18 | 17
18; 17
18 / 17
18 & 17
18 and 17
18, 17
18 17
18-20
18–20
18—20
18~20
18...20
18… 20
18 to 20
18 to twenty
18 through 20
18 vs. 20
18 → 20
18 -> 20
18, no wait, 20
18, I mean 20
18, sorry, 20
18 if it rains, otherwise 20
18 if it rains, 20 if it does not
18 unless it rains, then 20
18 normally, 20 if it rains
18, depending on the tip
either 18, 19 or 20
between 17 and 19
x = 18 or x = 20
x = 17 or x = 18
x = 17, y = 18
18. Or 20.
18. Or maybe it is 20.
18. Alternatively, 20.
18. Wait, it is 20.
18. Actually, 20.
18. No, it is 20.
18 != 20
18 ≠ 20
\boxed{18} or \boxed{20}
\boxed{18}, \boxed{20}
\boxed{18}\boxed{20}
"""
CHOICE_HEDGES = r"""
A | B
B | A
(B) (A)
(A)(B)(C)(D)
(B)(C)
B A
B. A. C. D.
A, B, C, D
B/A
B & A
B + A
B-D
B to D
B through D
B (or A)
(b) or (c)
B, maybe C
B, possibly (C)
B or else C
B, but it could also be C
B if it floats, otherwise C
B vs. C
B as well as C
B together with C
both (B) and (C)
one of B, C
B. Or C.
B. Wait, C.
B, no wait, C
\boxed{B} or \boxed{C}
\boxed{B}\boxed{C}
"""
YES_NO_HEDGES = """
yes or no
yes | no
yes/no
yes, no
yes no
yes, but no
yes and no
yes; no
yes-no
yes (or no)
yes or maybe no
yes, then no
yes... no
yes if heads, otherwise no
yes if heads and no if tails
yes in part, no in part
partly yes, partly no
maybe yes, maybe no
either yes or no
yes. No.
yes. Or no.
yes. Wait, no.
yes, no wait
"""
LETTERS_HEDGES = """
yajo or jo
"yajo" or jo
"yajo" or "jo"
"yajo" (or jo)
yajo/jo
yajo | jo
yajo, jo
yajo. Or jo.
"yajo", maybe jo
"yajo" and "jo"
"""
MATH_HEDGES = r"""
18 or 20
18 (or 20)
18 & 20
18; 20
18, maybe 20
18. Or 20.
18 if it rains, otherwise 20
between 17 and 19
$\boxed{20}$ or $\boxed{18}$
$\boxed{18}$ or $20$
\boxed{20} \text{ or } \boxed{18}
\boxed{20} | \boxed{18}
\boxed{20} \boxed{18}
\boxed{20}\boxed{18}
\boxed{20}, maybe \boxed{18}
\boxed{20}, otherwise \boxed{18}
"""
HEDGES = {
    "number": NUMBER_HEDGES,
    "choice": CHOICE_HEDGES,
    "yes_no": YES_NO_HEDGES,
    "letters": LETTERS_HEDGES,
    "math": MATH_HEDGES,
}


def all_of(tables):
    return [(kind, said) for kind, table in tables.items() for said in lines(table)]


@pytest.mark.parametrize(("kind", "said"), all_of(HEDGES))
def test_a_hedge_is_no_answer(kind, said):
    assert not judge(said, kind).correct, judge(said, kind).reason


@pytest.mark.parametrize(
    "output",
    [
        "It is 17 or the answer is 18.",
        "The answer is 17 or maybe the answer is 18.",
        "The answer is 18,\nor 20.",
        r"17 or \boxed{18}",
        r"\boxed{17} \boxed{18}",
        r"\boxed{17} or \boxed{18}",
    ],
)
def test_a_hedge_around_the_announcement_is_no_answer(output):
    for kind in ("number", "math"):
        assert not grade(problem(kind), output).correct


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("The answer is 17. The answer is 18.", "18"),
        ("The answer is 18. The answer is 17.", "17"),
        ("The answer is\nThe answer is 18", "18"),
        ("The answer is 18. The answer is", None),
        ("Whether you add or multiply, the answer is 18.", "18"),
        (r"First \boxed{3}. But no: \boxed{18}", "18"),
        ("\\boxed{3}\n\n\\boxed{18}", "18"),
    ],
)
def test_of_several_announcements_the_last_counts(output, said):
    assert grade(problem("number"), output).extracted == said


# ------------------------------------------------------------------------------------------- denials and bounds

DENIED = {
    "number": """
        not 18
        definitely not 18
        not equal to 18
        not, I think, 18
        isn't 18
        cannot be 18
        can't possibly be 18
        anything but 18
        any number except 18
        other than 18
        neither 18 nor 20
        far from 18
        different from 18
        unknown, but it is not 18
        unknown, maybe 18
        that she does not earn $18
        18 is wrong
        18 is not correct
        18 cannot be right
        18 can be ruled out
        """,
    "choice": """
        not (B)
        definitely not (B)
        not option B
        isn't (B)
        cannot be (B)
        anything but (B)
        all but (B)
        everything except (B)
        other than (B)
        rules out (B)
        rules out (B), leaving (D)
        eliminating (B)
        neither (B) nor (C)
        unlikely to be B
        incorrect: (B)
        (B) is wrong
        (B) is not correct
        (B) can be ruled out
        """,
    "yes_no": """
        not yes
        definitely not yes
        anything but yes
        hardly yes
        unlikely yes
        yes is wrong
        yes cannot be right
        """,
    "letters": """
        not yajo
        not "yajo"
        anything but "yajo"
        never "yajo"
        other than "yajo"
        the reverse of "yajo"
        "yajo" reversed
        "yajo" without the y
        "yajo" followed by k
        "yajo" is wrong
        """,
    "math": r"""
        not 18
        definitely not \boxed{18}
        anything but \boxed{18}
        $x \neq \boxed{18}$
        \boxed{18} is wrong
        $\boxed{18}$ is not correct
        """,
}
BOUNDS = {
    "number": r"""
        more than 18
        less than 18
        fewer than about 18
        no more than 18
        greater than or equal to 18
        at least 18
        at most 18
        up to 18
        over 18
        under 18
        above 18
        nearly 18
        almost 18
        close to 18
        that it costs more than 18 dollars
        > 18
        <18
        >= 18
        ≤ 18
        x > 18
        x >= 18
        x \geq 18
        x \lt 18
        18 or more
        18 apples or fewer
        18 at least
        18 at the most
        18+
        18 and up
        """,
    "choice": "less than (B)",
    "math": r"""
        more than 18
        at least 18
        less than \boxed{18}
        at least $\boxed{18}$
        $x > \boxed{18}$
        """,
}


@pytest.mark.parametrize(("kind", "said"), all_of(DENIED) + all_of(BOUNDS))
def test_a_denied_or_bounded_candidate_is_no_answer(kind, said):
    assert not judge(said, kind).correct, judge(said, kind).reason


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("choice", "The answer is the one that is not red, (B)"),
        ("choice", "The answer is (B), not (A)."),
        ("choice", "The answer is B rather than A"),
        ("choice", "The answer is (B), as (A) is red"),
        ("choice", "Answer: It is not A, the answer is B"),
        ("choice", "The answer is B. A is red."),
        ("choice", "The answer is most likely (B), but it could also be (C)."),
        ("choice", "The answer is (B) Moby Dick."),
        ("yes_no", "The answer is yes, there is no doubt."),
        ("yes_no", "The answer is yes. No further flips happen."),
        ("yes_no", "The answer is yes, because no one flips it."),
        ("letters", 'The answer is the word "yajo", which joins the last letters.'),
        ("math", r"Since x is not 0, we get \boxed{18}."),
        ("math", r"So we need at least \boxed{18} socks."),
        ("math", r"As $x \ne 0$, it is less than 20, so \boxed{18}."),
        ("math", r"There are 20; those not divisible by 10 are \textbf{\boxed{18}}."),
    ],
)
def test_words_about_something_else_do_not_make_an_answer_invalid(kind, output):
    verdict = grade(problem(kind), output)
    assert verdict.correct, verdict.reason


# --------------------------------------------------------------------------- no as a word before another, and A: ...


NOT_NO = """
no one knows
no-one knows
No doubt it is heads up
no idea
no way to tell
no clear answer
no. 5
no 5
no coin was flipped, so heads
no longer known
no answer
no yes
no, yes
not no
nobody
"""
NO = """
no
No.
"No."
**No**
No, it is not
No, there is no way
No - it is tails
No! Tails.
no because it is tails
no it is not
no (tails up)
no, as two flips cancel out
most likely No
"""


@pytest.mark.parametrize("said", lines(NOT_NO))
def test_no_before_another_word_is_not_the_answer_no(said):
    assert not judge(said, "yes_no", gold="no").correct


@pytest.mark.parametrize("said", lines(NO))
def test_no_is_the_answer_no(said):
    assert judge(said, "yes_no", gold="no").correct


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("A: 18", "18"),
        ("A:\n18", "18"),
        ("A: $18 per day.", "18"),
        ("A: **18**", "18"),
        ("A: 9 * 2 = 18", "18"),
        ("A: 18 because 9 * 2 is 18", "18"),
        ("A: 18\nExplanation: 9 * 2 is 18.", "18"),
        ("A: There are 18 trees at first. Then there are 21. So they planted 21 - 18 = 3.", None),
        ("A: There are 18 trees.\nThen there are 21.", None),
        ("A: 18 trees were in the grove at first. Then there are 21.", None),
        ("A: First, Ann has 18 eggs. Then she has 3.", None),
        ("Answer: There are 18 trees at first. Then there are 21. So they planted 21 - 18 = 3.", None),
        ("Answer: Janet makes $18 every day.", "18"),
        ("Answer: 18 eggs. She keeps 3 more.", "18"),
        ("#### Step 1: 18 trees", None),
        ("#### $18", "18"),
    ],
)
def test_the_first_step_of_a_rationale_is_not_its_answer(output, said):
    assert grade(problem("number"), output).extracted == said


def test_a_pronoun_is_no_option():
    asked = Problem("test/0", "test", "?", "I", "choice", tuple("abcdefghi"))
    assert not grade(asked, "Answer: I think it is (C)").correct
    assert grade(asked, "Answer: I.").correct
    assert grade(asked, "Answer: I is right").correct


@pytest.mark.parametrize("kind", ["number", "math"])
def test_an_answer_sentence_in_a_box_is_read(kind):
    assert grade(problem(kind), r"\boxed{\text{The answer is 18}}").correct
    assert not grade(problem(kind), r"\boxed{\text{The answer is 18 or 20}}").correct


@pytest.mark.parametrize("kind", sorted(GOLD))
@pytest.mark.parametrize(
    "piece", ["not ", "18 or ", "more than ", "x very ly ", "(B)\\text{", "1'000 ", "\u00a0 ", "or, the "]
)
def test_a_long_text_takes_milliseconds(kind, piece):
    text = ("The answer is 18 " + piece * 20_000)[:20_000]
    started = time.process_time()
    grade(problem(kind), text)
    before_answer(text)
    assert time.process_time() - started < 0.5  # some milliseconds; a pattern that tries every way takes minutes
