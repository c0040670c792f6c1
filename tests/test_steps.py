import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.pretraining import write
from smlib.problems.datasets import KINDS, TASKS, Problem, generate
from smlib.problems.steps import check_steps, first_wrong_step, is_sound, knows, parse, worked_solution


def problem(dataset, question, answer, choices=()):
    return Problem(f"{dataset}/0", dataset, question, answer, KINDS[dataset], choices)


COIN = problem(
    "coin_flip",
    "A coin is heads up. Whitney flips the coin. Erika does not flip the coin. Tj does not flip the coin. "
    'Benito flips the coin. Is the coin still heads up? Note that "flip" here means "reverse".',
    "yes",
)
LETTERS = problem(
    "last_letters",
    'Take the last letters of each words in "Whitney Felipe Tj" and concatenate them.',
    "yej",
)
OBJECTS = problem(
    "shuffled_objects",
    "Alice, Bob, and Claire are playing a game. At the start of the game, they are each holding a ball: "
    "Alice has a red ball, Bob has a blue ball, and Claire has a green ball. \n\nAs the game progresses, pairs "
    "of players trade balls. First, Alice and Bob swap balls. Then, Claire and Alice swap balls. Finally, Bob "
    "and Claire swap balls. At the end of the game, Bob has the",
    "B",
    ("red ball", "blue ball", "green ball"),
)
CHAIN = problem(
    "chain_arithmetic",
    "A basket holds 27 apples. Ann adds 15. Bo takes 8. Cleo doubles the apples. How many apples are in the basket?",
    "68",
)
BY_HAND = {
    "coin_flip": (
        COIN,
        "Whitney flips: tails.|Erika does not flip: tails.|Tj does not flip: tails.|Benito flips: heads.",
    ),
    "last_letters": (LETTERS, '"Whitney" ends in "y".|"Felipe" ends in "e".|"Tj" ends in "j".'),
    "shuffled_objects": (
        OBJECTS,
        "Start: Alice A, Bob B, Claire C."
        "|Alice and Bob: Alice B, Bob A, Claire C."
        "|Claire and Alice: Alice C, Bob A, Claire B."
        "|Bob and Claire: Alice C, Bob B, Claire A."
        "|Bob ends with B.",
    ),
    "chain_arithmetic": (CHAIN, "Ann: 27 + 15 = 42.|Bo: 42 - 8 = 34.|Cleo: 34 + 34 = 68."),
}  # fmt: skip

# (problem, author, the rationale that this author writes, the first wrong step)
MISCONCEPTIONS = [
    (
        COIN,
        "everyone flips",
        "Whitney flips: tails.|Erika does not flip: heads.|Tj does not flip: tails.|Benito flips: heads.",
        1,
    ),
    (
        COIN,
        "last one ignored",
        "Whitney flips: tails.|Erika does not flip: tails.|Tj does not flip: tails.",
        3,
    ),
    (
        COIN,
        "a flip means tails",
        "Whitney flips: tails.|Erika does not flip: tails.|Tj does not flip: tails.|Benito flips: tails.",
        3,
    ),
    (LETTERS, "silent e", '"Whitney" ends in "y".|"Felipe" ends in "p".|"Tj" ends in "j".', 1),
    (LETTERS, "first letters", '"Whitney" ends in "w".|"Felipe" ends in "f".|"Tj" ends in "t".', 0),
    (LETTERS, "last word ignored", '"Whitney" ends in "y".|"Felipe" ends in "e".', 2),
    (
        OBJECTS,
        "wrong pair",
        "Start: Alice A, Bob B, Claire C."
        "|Alice and Bob: Alice B, Bob A, Claire C."
        "|Claire and Alice: Alice A, Bob B, Claire C."
        "|Bob and Claire: Alice A, Bob C, Claire B."
        "|Bob ends with C.",
        2,
    ),
    (
        OBJECTS,
        "last swap ignored",
        "Start: Alice A, Bob B, Claire C."
        "|Alice and Bob: Alice B, Bob A, Claire C."
        "|Claire and Alice: Alice C, Bob A, Claire B."
        "|Bob ends with A.",
        3,
    ),
    (
        OBJECTS,
        "one-way swaps",
        "Start: Alice A, Bob B, Claire C."
        "|Alice and Bob: Alice B, Bob B, Claire C."
        "|Claire and Alice: Alice B, Bob B, Claire B."
        "|Bob and Claire: Alice B, Bob B, Claire B."
        "|Bob ends with B.",
        1,
    ),
    (CHAIN, "no carry", "Ann: 27 + 15 = 32.|Bo: 32 - 8 = 24.|Cleo: 24 + 24 = 48.", 0),
    (CHAIN, "takes means adds", "Ann: 27 + 15 = 42.|Bo: 42 + 8 = 50.|Cleo: 50 + 50 = 100.", 1),
    (CHAIN, "doubling adds two", "Ann: 27 + 15 = 42.|Bo: 42 - 8 = 34.|Cleo: 34 + 2 = 36.", 2),
    (CHAIN, "last one ignored", "Ann: 27 + 15 = 42.|Bo: 42 - 8 = 34.", 2),
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_the_worked_solution_by_hand(task):
    asked, text = BY_HAND[task]
    assert worked_solution(asked) == (text.split("|"), asked.answer)
    assert is_sound(asked, text.replace("|", "\n"))
    assert first_wrong_step(asked, text.replace("|", "\n")) is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_worked_solutions_are_sound_and_end_in_gold(task, split):
    for asked in generate(task, 100, seed=1, split=split):
        lines, answer = worked_solution(asked)
        assert answer == asked.answer
        assert [check.correct for check in check_steps(asked, "\n".join(lines))] == [True] * len(lines)


@pytest.mark.parametrize(("asked", "author", "text", "wrong"), MISCONCEPTIONS)
def test_each_misconception_is_found_at_its_first_wrong_step(asked, author, text, wrong):
    lines, _ = write(asked, author, random.Random(0))
    assert lines == text.split("|")
    assert first_wrong_step(asked, "\n".join(lines)) == wrong
    assert not is_sound(asked, "\n".join(lines))


def test_a_right_answer_by_wrong_steps_is_not_sound():
    lines, answer = write(COIN, "everyone flips", random.Random(0))
    assert answer == COIN.answer
    assert not is_sound(COIN, "\n".join(lines))


def test_reasons_say_what_should_be_there():
    text = '"Whitney" ends in "y".\n"Felipe" ends in "p".'
    right, wrong, missing = check_steps(LETTERS, text)
    assert (right.line, right.correct, right.reason) == ('"Whitney" ends in "y".', True, "right")
    assert (wrong.correct, wrong.reason) == (False, 'should be: "Felipe" ends in "e".')
    assert (missing.line, missing.correct, missing.reason) == ("", False, 'left out: "Tj" ends in "j".')


def test_a_step_too_many_is_wrong_though_all_others_are_right():
    lines, _ = worked_solution(CHAIN)
    checks = check_steps(CHAIN, "\n".join([*lines, "So there are 68 apples."]))
    assert [check.correct for check in checks] == [True, True, True, False]
    assert checks[-1].reason == "one step too many"


def test_spaces_letter_case_and_empty_lines_do_not_count():
    assert is_sound(CHAIN, "\n  ann:  27 + 15 = 42.\n\n Bo: 42 - 8 = 34. \nCLEO: 34 + 34 = 68.\n")


def test_an_empty_rationale_leaves_out_the_first_step():
    assert first_wrong_step(CHAIN, " \n ") == 0


@pytest.mark.parametrize("task", TASKS)
@given(text=st.text(alphabet=st.sampled_from("A:b=1 \n\r\t\"'.\\é\u2028\x00")) | st.text())
def test_any_text_is_judged_without_an_error(task, text):
    asked, _ = BY_HAND[task]
    checks = check_steps(asked, text)
    assert checks and not all(check.correct for check in checks)


@pytest.mark.parametrize("task", TASKS)
@given(data=st.data())
def test_damage_to_one_line_is_found_at_that_line(task, data):
    asked = generate(task, 1, seed=data.draw(st.integers(0, 10_000)))[0]
    lines, _ = worked_solution(asked)
    index = data.draw(st.integers(0, len(lines) - 1))
    line = lines[index]
    place = data.draw(st.integers(0, len(line)))
    damaged = line[:place] + data.draw(st.sampled_from("xX0.-")) + line[place:]
    for kept in ([damaged], [], [line, line]):  # altered, left out, said twice
        broken = "\n".join(lines[:index] + kept + lines[index + 1 :])
        assert first_wrong_step(asked, broken) == index + len(kept[1:])


@pytest.mark.parametrize(
    "asked",
    [
        Problem("gsm8k/test/0", "gsm8k", "How many eggs?", "3", "number"),
        problem("coin_flip", "Is the coin heads up?", "yes"),
    ],
)
def test_a_question_in_another_wording_is_refused(asked):
    with pytest.raises(ValueError, match=f"{asked.id}: not worded like a question of a generated task"):
        check_steps(asked, "some step")


def test_which_datasets_the_checker_knows():
    assert knows(*TASKS) and all(knows(task) for task in TASKS)
    assert not any(knows(name) for name in KINDS if name not in TASKS) and not knows("coin_flip", "gsm8k")


def test_parse_gives_the_facts():
    assert parse(COIN) == {"acts": [("Whitney", True), ("Erika", False), ("Tj", False), ("Benito", True)]}
    assert parse(LETTERS) == {"words": ["Whitney", "Felipe", "Tj"]}
    assert parse(OBJECTS) == {
        "swaps": [("Alice", "Bob"), ("Claire", "Alice"), ("Bob", "Claire")],
        "asked": "Bob",
    }
    assert parse(CHAIN) == {
        "start": 27,
        "operations": [("Ann", "adds", 15), ("Bo", "takes", 8), ("Cleo", "doubles", 2)],
    }
