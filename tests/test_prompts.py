import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib import prompts
from smlib.problems import TASKS, Problem, generate

NUMBER = Problem("n/0", "n", "How many?", "18", "number")
CHOICE = Problem("c/0", "c", "Which one?", "B", "choice", ("red ball", "Moby Dick", "a pen"))
YES_NO = Problem("y/0", "y", "Is it?", "no", "yes_no")
LETTERS = Problem("l/0", "l", "Which letters?", "yajo", "letters")

# Texts that hold many answer sentences, whole and in part.
WRITTEN = st.lists(
    st.sampled_from([" a step", "\n", "\n\n", "The answer is", " 5.", "  ", "Q: next?", "A:", "isn't", "\r"])
    | st.text(max_size=3)
).map("".join)


def test_every_prompt_word_for_word():
    assert prompts.open_prompt(NUMBER) == "Q: How many?\nA:"
    assert prompts.open_prompt(CHOICE) == ("Q: Which one?\nAnswer Choices: (A) red ball (B) Moby Dick (C) a pen\nA:")
    assert prompts.conditioned_prompt(NUMBER, "7") == "Q: How many?\nGiven answer: 7\nA:"
    assert prompts.conditioned_prompt(CHOICE, "C") == (
        "Q: Which one?\nAnswer Choices: (A) red ball (B) Moby Dick (C) a pen\nGiven answer: (C)\nA:"
    )
    assert prompts.reanswer_prompt(NUMBER, " 9 * 2 = 18.\nSo 18.") == (
        "Q: How many?\nA: 9 * 2 = 18.\nSo 18.\nThe answer is"
    )


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (NUMBER, "The answer is 18."),
        (CHOICE, "The answer is (B)."),
        (YES_NO, "The answer is no."),
        (LETTERS, "The answer is yajo."),
    ],
)
def test_the_answer_sentence_of_every_kind(problem, sentence):
    assert prompts.answer_sentence(problem, problem.answer) == sentence


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" one\ntwo\nThe answer is 5.", " one\ntwo\nThe answer is 5."),
        (" one\nThe answer is 5.\nThe answer is 6.", " one\nThe answer is 5."),
        (" one\nThe answer is 5.\n\nQ: next?\nA: no", " one\nThe answer is 5."),
        (" The answer is 5.\nmore", " The answer is 5."),
        (" one\n  The answer is 5. I think.\nmore", " one\n  The answer is 5. I think."),
        (" one\n\nQ: next?\nA: two\nThe answer is 6.", " one"),
        (" one, so The answer is 5.\ntwo", " one, so The answer is 5.\ntwo"),
        (" The answer isn't 5.\ntwo", " The answer isn't 5.\ntwo"),
        (" one\ntwo", " one\ntwo"),
        ("", ""),
    ],
)
def test_cut_ends_with_the_first_answer_sentence_or_before_a_next_question(text, kept):
    assert prompts.cut(text) == kept


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (" one\ntwo\nThe answer is 5.", (" one\ntwo", "The answer is 5.")),
        (" one\n\nThe answer is 5.\nmore", (" one", "The answer is 5.")),
        (" The answer is 5.", ("", "The answer is 5.")),
        (" one\ntwo\n", (" one\ntwo", "")),
        (" one\nQ: next?\nThe answer is 6.", (" one", "")),
    ],
)
def test_split_answer_by_hand(text, parts):
    assert prompts.split_answer(text) == parts


@given(WRITTEN)
def test_cut_gives_a_beginning_and_cuts_once(text):
    kept = prompts.cut(text)
    assert text.startswith(kept)
    assert prompts.cut(kept) == kept
    assert "\nQ:" not in kept


@given(WRITTEN)
def test_split_answer_takes_the_answer_sentence_away(text):
    rationale, sentence = prompts.split_answer(text)
    assert prompts.split_answer(prompts.cut(text)) == (rationale, sentence)
    assert prompts.split_answer(rationale) == (rationale, "")
    assert not rationale.endswith("\n")
    assert sentence == "" or sentence.startswith("The answer is")


@given(task=st.sampled_from(TASKS), seed=st.integers(0, 1000))
def test_a_completion_is_taken_apart_and_put_together_again(task, seed):
    problem = generate(task, 1, seed)[0]
    sentence = prompts.answer_sentence(problem, problem.answer)
    assert prompts.split_answer(f" one\ntwo\n{sentence}") == (" one\ntwo", sentence)


def test_wrong_answers_of_every_kind():
    rng = random.Random(0)
    others = [
        Problem(f"l/{i}", "l", "?", answer, "letters") for i, answer in enumerate(["abcd", "efg", "yajo", "hijk"])
    ]
    others.append(Problem("m/0", "m", "?", "wxyz", "letters"))  # of another dataset
    assert sorted(map(int, prompts.wrong_answers(NUMBER, rng, []))) == [n for n in range(101) if n != 18]
    assert sorted(prompts.wrong_answers(CHOICE, rng, [])) == ["A", "C"]
    assert prompts.wrong_answers(YES_NO, rng, []) == ["yes"]
    assert sorted(prompts.wrong_answers(LETTERS, rng, others)) == ["abcd", "hijk"]
    assert prompts.wrong_answers(LETTERS, rng, others[1:3]) == ["efg"]  # no other of the same length
    assert prompts.wrong_answers(LETTERS, rng, [others[2]]) == []


@pytest.mark.parametrize("task", TASKS)
def test_wrong_answers_are_distinct_random_and_never_gold(task):
    problems = generate(task, 30, seed=0)
    for index, problem in enumerate(problems):
        wrong = prompts.wrong_answers(problem, random.Random(index), problems)
        assert wrong and problem.answer not in wrong and len(set(wrong)) == len(wrong)
        assert wrong == prompts.wrong_answers(problem, random.Random(index), problems)
    if task != "coin_flip":
        assert len({tuple(prompts.wrong_answers(problems[0], random.Random(i), problems)) for i in range(9)}) > 1
