"""What the notebooks print and draw through `smlib.reports.plots`."""

from smlib.problems.datasets import Problem
from smlib.reports import plots


def test_steps_are_printed_with_a_finding_where_the_checker_knows_the_dataset(capsys):
    question = "A jar holds 16 pens. Ann adds 5. How many pens are in the jar?"
    jar = Problem("x", "chain_arithmetic", question, "21", "number")
    plots.print_steps(jar, " Ann: 16 + 5 = 22.\nThe answer is 22.")
    assert capsys.readouterr().out.splitlines() == [
        "  WRONG  Ann: 16 + 5 = 22.",
        "         should be: Ann: 16 + 5 = 21.",
        "  WRONG  The answer is 22. [said 22, gold 21]",
    ]


def test_steps_of_a_published_question_are_printed_without_one(capsys):
    eggs = Problem("gsm8k/test/0", "gsm8k", "How many eggs?", "3", "number")
    plots.print_steps(eggs, " 1 hen lays 1.\n1 + 2 = 3.\nThe answer is 3.")
    assert capsys.readouterr().out.splitlines() == [
        "         1 hen lays 1.",
        "         1 + 2 = 3.",
        "  right  The answer is 3. [said 3, gold 3]",
    ]
