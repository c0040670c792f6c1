"""What related work trains on, made from the same samples."""

from dataclasses import replace

import pytest
from tiny_model import tokenizer, written, written_pair

from smlib.judging.answers import grade
from smlib.learning import neighbours
from smlib.problems.datasets import generate
from smlib.problems.prompts import answer_sentence, split_answer
from smlib.problems.steps import first_wrong_step, worked_solution
from smlib.sampling import encoding

PROBLEM, OTHER = generate("coin_flip", 2, seed=3)
NO = {"yes": "no", "no": "yes"}[PROBLEM.answer]
STEPS = worked_solution(PROBLEM)[0]
SLIPPED = [line.replace("tails", "heads") if "tails" in line else line.replace("heads", "tails") for line in STEPS]


def told(lines, answer, problem=PROBLEM):
    return " " + "\n".join([*lines, answer_sentence(problem, answer)])


GOOD, BAD = told(STEPS, PROBLEM.answer), told(SLIPPED, NO)


def sampled(text, problem=PROBLEM, source="open", **fields):
    verdict = grade(problem, text)
    one = replace(written(problem, text, "+" if verdict.correct else "-"), author="base", source=source, **fields)
    return replace(one, answer=verdict.extracted)


def test_the_majority_is_of_a_question_s_open_rationales_and_reads_no_gold_answer():
    wrong, other = told(SLIPPED, NO) + " ", told(worked_solution(OTHER)[0], OTHER.answer, OTHER)
    given = [sampled(GOOD), sampled(BAD), sampled(BAD), sampled(wrong), sampled(GOOD, source="conditioned")]
    found = neighbours.of_the_majority([*given, sampled(other, OTHER), sampled(" nothing said", OTHER)])
    assert [(one.id, one.text) for one in found] == [(PROBLEM.id, BAD), (PROBLEM.id, wrong), (OTHER.id, other)]
    assert {one.side for one in found} == {"+"} and not found[0].correct


def test_a_correction_is_a_wrong_start_and_a_right_rationale_that_the_judge_accepts():
    ranked = [sampled(GOOD), sampled(BAD), sampled(told(worked_solution(OTHER)[0], OTHER.answer, OTHER), OTHER)]
    (made,) = neighbours.corrections(tokenizer(), ranked, seed=0)  # OTHER has no wrong one
    assert made.text == " " + "\n".join(SLIPPED) + neighbours.AGAIN + GOOD and made.side == "+"
    assert encoding.decode(tokenizer(), made.token_ids) == made.text
    assert grade(PROBLEM, made.text).correct
    assert split_answer(made.text.split(neighbours.AGAIN)[1])[0] == " " + "\n".join(STEPS)
    wrong = neighbours.wrong_tokens(tokenizer(), made)
    assert encoding.decode(tokenizer(), made.token_ids[:wrong]) == " " + "\n".join(SLIPPED)
    assert neighbours.wrong_tokens(tokenizer(), ranked[0]) == 0


def test_an_edit_changes_one_line_and_keeps_the_answer():
    (made,) = neighbours.edits(tokenizer(), [written_pair(PROBLEM, GOOD, BAD)])
    assert made.chosen == GOOD and encoding.decode(tokenizer(), made.rejected_ids) == made.rejected
    before, after = GOOD.split("\n"), made.rejected.split("\n")
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] + [True] * (len(before) - 1)
    assert grade(PROBLEM, made.rejected).correct
    assert first_wrong_step(PROBLEM, split_answer(made.rejected)[0]) == 0


@pytest.mark.parametrize("rejected", [told(STEPS, NO), told([], NO), f" The answer is {NO}."])
def test_sides_whose_steps_do_not_differ_give_no_edit(rejected):
    assert neighbours.edits(tokenizer(), [written_pair(PROBLEM, GOOD, rejected)]) == []
