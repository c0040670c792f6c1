import json
import os
import random
import re
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.judging.answers import grade
from smlib.problems import prompts
from smlib.problems.datasets import KINDS, PUBLISHED, TASKS, Problem, generate, load, splits
from smlib.problems.downloads import DatasetError
from smlib.problems.steps import check_steps, first_wrong_step, worked_solution

NUMBER = Problem("n/0", "n", "How many?", "18", "number")
CHOICE = Problem("c/0", "c", "Which one?", "B", "choice", ("red ball", "Moby Dick", "a pen"))
YES_NO = Problem("y/0", "y", "Is it?", "no", "yes_no")
LETTERS = Problem("l/0", "l", "Which letters?", "yajo", "letters")
MATH = Problem("m/0", "m", "Solve it.", r"\frac{1}{2}", "math")
WORD_PROBLEMS = ("single_eq", "addsub", "multiarith", "gsm8k", "svamp")


def begins_a_question(line):
    """The rule of `before_next_question` for one line, in other words, as far as the texts here go."""
    line = line.lstrip(" \t>*#")
    return line.startswith("Q:") and not re.match(r"Q:\w{1,3} ?[:=]", line)


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
        (MATH, r"The answer is $\frac{1}{2}$."),
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
        (" one Q: next?\nA: two\nThe answer is 6.", " one Q: next?\nA: two\nThe answer is 6."),
        ("Q: next?", ""),
        (" one\nThe answer is 5. See the FAQ: all\ntwo", " one\nThe answer is 5. See the FAQ: all"),
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
    assert not any(map(begins_a_question, kept.split("\n")))


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (" 5.\n\nQ: next?\nA: 6.\n\nQ: third?", " 5."),
        (" 5. \t\n Q:", " 5."),
        (" 5. **Q:** next?", " 5. **Q:** next?"),
        (" 5.\n**Q:** next?", " 5."),
        (" Restating the Q: how many?\nThe answer is 5.", " Restating the Q: how many?\nThe answer is 5."),
        (" P:Q:R = 2:3:4\nQ:R = 3:4\nQ:3 = 2", " P:Q:R = 2:3:4\nQ:R = 3:4\nQ:3 = 2"),
        (" 5.\nQ. next?", " 5."),
        (" 5.\nQ2: next?\nA: 6", " 5."),
        (" Q1: 5 + 3 = 8.\nQ2: 8 + 1 = 9.", " Q1: 5 + 3 = 8.\nQ2: 8 + 1 = 9."),
        (" of P and\nQ. Then x = 5.", " of P and\nQ. Then x = 5."),
        (" 5.\n### Question 3\nnext", " 5."),
        ("System: x + y = 3", "System: x + y = 3"),
        (" 5.\nPoint Q.\nQ.E.D.", " 5.\nPoint Q.\nQ.E.D."),
        (" 5.\n\nQuestion: next?", " 5."),
        (" 5.\n\n**Question 2:** next?", " 5."),
        (" 5.\n\nNext question: next?", " 5."),
        (" 5.\nNo question: next?", " 5.\nNo question: next?"),
        (" The question: how many?\nQuestionable: 5.", " The question: how many?\nQuestionable: 5."),
        (" 5.\nUser: next?", " 5."),
        (" 5.\nHuman: next?\nAssistant: 6.", " 5."),
        (" 5.\n### Instruction\nnext", " 5."),
        (" 5.<|im_end|>\n<|im_start|>user\nnext?", " 5."),
        (" 5. [INST] next? [/INST]", " 5."),
        (" 5.</s><s> next", " 5."),
        (" 5.<end_of_turn>\n<start_of_turn>user", " 5."),
        (" a < b, [1, 2] and |x|", " a < b, [1, 2] and |x|"),
        (" 5. The FAQ: 6. _Q: 7. q: 8. Q.", " 5. The FAQ: 6. _Q: 7. q: 8. Q."),
        (" 5. \n", " 5. \n"),
        ("Q:Q:", "Q:Q:"),
        ("Q: Q:", ""),
        ("", ""),
    ],
)
def test_before_next_question_by_hand(text, before):
    assert prompts.before_next_question(text) == before


@pytest.mark.parametrize("repeated", ["#", " ", ">#", "Q", "\nQ", "\n#", "Q. "])
def test_a_text_of_one_mark_takes_no_longer_than_its_length(repeated):
    """A policy may write a mark without end; a pattern that tries every way through it would stall the training."""
    started = time.process_time()
    prompts.before_next_question("\n" + repeated * (40_000 // len(repeated)))
    assert time.process_time() - started < 0.5


@given(WRITTEN | st.text("Q:a_ \n"))
def test_before_next_question_cuts_where_a_line_begins_one(text):
    lines = text.split("\n")
    count = next((number for number, line in enumerate(lines) if begins_a_question(line)), None)
    assert prompts.before_next_question(text) == (text if count is None else "\n".join(lines[:count]).rstrip())


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


def test_wrong_answers_of_math_are_answers_of_other_problems_of_the_dataset():
    others = [Problem(f"m/{i}", "m", "?", answer, "math") for i, answer in enumerate(["3", r"\frac{3}{4}", "x + 1"])]
    assert prompts.wrong_answers(MATH, random.Random(0), others) == [r"\frac{3}{4}"]


# -------------------------------------------------------------------------------------- zero-shot chain of thought

# One question of each dataset's form, and every text written out.
ASKED = {
    "single_eq": ("How many?", ()),
    "addsub": ("How many?", ()),
    "multiarith": ("How many?", ()),
    "gsm8k": ("How many?", ()),
    "svamp": ("How many?", ()),
    "aqua": ("What is x?", ("1", "2", "3", "4", "5")),
    "commonsense_qa": ("Where is it?", ("bank", "library", "store", "mall", "new york")),
    "strategy_qa": ("Would it sink?", ()),
    "date_understanding": ("What is the date?", ("01/01/2001", "01/02/2001", "01/03/2001", "01/04/2001", "a", "b")),
    "shuffled_objects": ("At the end, Bob has the", ("red ball", "blue ball", "pink ball")),
    "last_letters": ('Take the last letters of each words in "Bo Al" and concatenate them.', ()),
    "coin_flip": ("Is the coin still heads up?", ()),
    "math": ("Solve $2x = 1$.", ()),
}
QUESTION_TEXTS = {
    **dict.fromkeys(WORD_PROBLEMS, "Q: How many?\nA:"),
    "aqua": "Q: What is x?\nAnswer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5\nA:",
    "commonsense_qa": ("Q: Where is it?\nAnswer Choices: (A) bank (B) library (C) store (D) mall (E) new york\nA:"),
    "strategy_qa": "Q: Would it sink?\nA:",
    "date_understanding": (
        "Q: What is the date?\n"
        "Answer Choices: (A) 01/01/2001 (B) 01/02/2001 (C) 01/03/2001 (D) 01/04/2001 (E) a (F) b\nA:"
    ),
    "shuffled_objects": ("Q: At the end, Bob has the\nAnswer Choices: (A) red ball (B) blue ball (C) pink ball\nA:"),
    "last_letters": 'Q: Take the last letters of each words in "Bo Al" and concatenate them.\nA:',
    "coin_flip": "Q: Is the coin still heads up?\nA:",
    "math": "Q: Solve $2x = 1$.\nA:",
}
DATASETS = tuple(ASKED)


def asked(dataset: str, answer: str = "") -> Problem:
    question, choices = ASKED[dataset]
    return Problem(f"{dataset}/test/0", dataset, question, answer, KINDS[dataset], choices)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (NUMBER, "Therefore, the answer (arabic numerals) is 18."),
        (NUMBER, "Therefore, the answer (arabic numerals) is:\n\n18 apples"),
        (CHOICE, "Therefore, among A through C, the answer is B."),
        (CHOICE, "Therefore, among A through C, the answer is (B) Moby Dick."),
        (YES_NO, "Therefore, the answer (Yes or No) is No, it is not."),
        (LETTERS, 'Therefore, the answer is "y-a-j-o".'),
        (MATH, r"Therefore, the final answer is $\frac{1}{2}$."),
    ],
)
def test_the_judge_reads_what_follows_the_answer_trigger_of_zero_shot_prompts(problem, said):
    """The words of Kojima et al. (2205.11916), whose outputs benchmarks/judging.py judges; those of math are ours."""
    assert grade(problem, said).correct


# --------------------------------------------------------------------------------------- few-shot chain of thought

COUNTS = {
    **dict.fromkeys(WORD_PROBLEMS, 8),
    "aqua": 4,
    "commonsense_qa": 7,
    "strategy_qa": 6,
    "date_understanding": 6,
    "shuffled_objects": 3,
    "last_letters": 4,
    "coin_flip": 8,
    "math": 4,
}
FIRST = {
    **dict.fromkeys(
        WORD_PROBLEMS,
        "Q: A ferry with 12 lifeboats leaves the island with 46 passengers. At the first pier 19 of them get off and "
        "7 people get on. How many passengers are on the ferry now?\n"
        "A: The lifeboats do not count.\n"
        "After 19 get off: 46 - 19 = 27 passengers.\n"
        "After 7 get on: 27 + 7 = 34 passengers.\n"
        "The answer is 34.\n\n",
    ),
    "aqua": (
        "Q: A printer prints 18 pages in 45 seconds. How many pages does it print in 4 minutes at this rate?\n"
        "Answer Choices: (A) 72 (B) 84 (C) 96 (D) 108 (E) 120\n"
        "A: It prints 18 / 45 = 0.4 pages a second.\n"
        "4 minutes are 4 * 60 = 240 seconds.\n"
        "In this time it prints 240 * 0.4 = 96 pages.\n"
        "The answer is (C).\n\n"
    ),
    "commonsense_qa": (
        "Q: Where would you hang a dripping raincoat when you come home?\n"
        "Answer Choices: (A) oven (B) hallway hook (C) bookshelf (D) pillow (E) mailbox\n"
        "A: A dripping raincoat has to hang near the front door.\n"
        "A hallway hook holds coats and is near the front door.\n"
        "The answer is (B).\n\n"
    ),
    "strategy_qa": (
        "Q: Could somebody born in 1950 have seen the first Moon landing on television?\n"
        "A: The first Moon landing was in 1969 and was shown on television.\n"
        "Somebody born in 1950 was about 19 years old then.\n"
        "The answer is yes.\n\n"
    ),
    "date_understanding": (
        "Q: A library book is due on 03/14/2012, and that is 5 days from now. What is the date today in MM/DD/YYYY?\n"
        "Answer Choices: (A) 03/19/2012 (B) 03/08/2012 (C) 03/09/2012 (D) 02/09/2012 (E) 03/10/2012 (F) 03/09/2011\n"
        "A: Today is 5 days before 03/14/2012.\n"
        "14 - 5 = 9, so today is 03/09/2012.\n"
        "The answer is (C).\n\n"
    ),
    "shuffled_objects": (
        "Q: Alice, Bob, and Claire are playing a game. At the start of the game, they are each holding a ball: Alice "
        "has a silver ball, Bob has a golden ball, and Claire has a gray ball. \n\n"
        "As the game progresses, pairs of players trade balls. First, Bob and Claire swap balls. Then, Alice and Bob "
        "swap balls. Finally, Claire and Alice swap balls. At the end of the game, Alice has the\n"
        "Answer Choices: (A) silver ball (B) golden ball (C) gray ball\n"
        "A: Start: Alice A, Bob B, Claire C.\n"
        "Bob and Claire: Alice A, Bob C, Claire B.\n"
        "Alice and Bob: Alice C, Bob A, Claire B.\n"
        "Claire and Alice: Alice B, Bob A, Claire C.\n"
        "Alice ends with B.\n"
        "The answer is (B).\n\n"
    ),
    "last_letters": (
        'Q: Take the last letters of each words in "Rosa Henrik Tilda Yusuf" and concatenate them.\n'
        'A: "Rosa" ends in "a".\n'
        '"Henrik" ends in "k".\n'
        '"Tilda" ends in "a".\n'
        '"Yusuf" ends in "f".\n'
        "The answer is akaf.\n\n"
    ),
    "coin_flip": (
        "Q: A coin is heads up. Priya flips the coin. Kofi does not flip the coin. Mei flips the coin. Sven does not "
        'flip the coin. Is the coin still heads up? Note that "flip" here means "reverse".\n'
        "A: Priya flips: tails.\n"
        "Kofi does not flip: tails.\n"
        "Mei flips: heads.\n"
        "Sven does not flip: heads.\n"
        "The answer is yes.\n\n"
    ),
    "math": (
        "Q: Solve $7(x - 3) = 4x + 6$ for $x$.\n"
        "A: The left side is $7x - 21$, so $7x - 21 = 4x + 6$.\n"
        "Subtracting $4x$ and adding $21$ gives $3x = 27$.\n"
        "Dividing by $3$ gives $x = 9$.\n"
        "The answer is $9$.\n\n"
    ),
}
LAST_LINES = {
    **dict.fromkeys(WORD_PROBLEMS, "\nThe pump needs 180 / 15 = 12 minutes.\nThe answer is 12.\n\n"),
    "aqua": "\nSo they need 4 hours.\nThe answer is (B).\n\n",
    "commonsense_qa": "\nThe bubbles make dough rise, so without yeast it stays flat.\nThe answer is (A).\n\n",
    "strategy_qa": "\nThere, winter is from June to August.\nThe answer is yes.\n\n",
    "date_understanding": ("\nJune has 30 days, so the day after 06/30/1999 is 07/01/1999.\nThe answer is (F).\n\n"),
    "shuffled_objects": "\nClaire ends with C.\nThe answer is (C).\n\n",
    "last_letters": '\n"Bjorn" ends in "n".\nThe answer is ryen.\n\n',
    "coin_flip": "\nOlek does not flip: tails.\nThe answer is no.\n\n",
    "math": "\nMoved $3$ units down it is $(7, 11 - 3) = (7, 8)$.\nThe answer is $(7, 8)$.\n\n",
}


def shown(dataset: str, form: str) -> list[str]:
    """Each exemplar alone: what a count of one more adds."""
    texts = [prompts.few_shot(dataset, count, form=form) for count in range(COUNTS[dataset] + 1)]
    return [after.removeprefix(before) for before, after in pairwise(texts)]


def normal(question: str) -> str:
    return "".join(question.split()).casefold()


def needs_data() -> None:
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_few_shot_prompt_from_its_first_exemplar_to_the_question(dataset):
    shots = prompts.few_shot(dataset)
    assert prompts.few_shot(dataset, 1) == FIRST[dataset]
    assert shots.startswith(FIRST[dataset] + "Q: ")
    prompt = prompts.open_prompt(asked(dataset), shots)
    assert prompt.endswith(LAST_LINES[dataset] + QUESTION_TEXTS[dataset])
    assert prompt == shots + prompts.open_prompt(asked(dataset))
    assert len(shown(dataset, "open")) == COUNTS[dataset] == sum(map(begins_a_question, shots.split("\n")))
    assert prompts.few_shot(dataset, 0) == ""


def test_shots_in_a_conditioned_and_in_a_reanswer_prompt():
    shots = prompts.few_shot("gsm8k", 1, form="wrong") + prompts.few_shot("gsm8k", 1, form="conditioned")
    assert prompts.conditioned_prompt(NUMBER, "7", shots) == (
        "Q: A florist ties 63 tulips into bunches of 7 and sells 4 bunches. How many bunches does she have left?\n"
        "Given answer: 59\n"
        "A: She had 63 and sold 4 of them.\n"
        "So 63 - 4 = 59 are left.\n"
        "The answer is 59.\n\n"
        "Q: A ferry with 12 lifeboats leaves the island with 46 passengers. At the first pier 19 of them get off and "
        "7 people get on. How many passengers are on the ferry now?\n"
        "Given answer: 34\n"
        "A: The lifeboats do not count.\n"
        "After 19 get off: 46 - 19 = 27 passengers.\n"
        "After 7 get on: 27 + 7 = 34 passengers.\n"
        "The answer is 34.\n\n"
        "Q: How many?\nGiven answer: 7\nA:"
    )
    shots = prompts.few_shot("last_letters", 1)
    assert prompts.reanswer_prompt(LETTERS, " One.\nTwo.", shots) == (
        FIRST["last_letters"] + "Q: Which letters?\nA: One.\nTwo.\nThe answer is"
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_open_shots_are_what_the_reanswer_prompt_asks_for(dataset):
    for one, text in zip(prompts.exemplars(dataset), shown(dataset, "open"), strict=True):
        prompt = prompts.reanswer_prompt(one.problem, f" {one.rationale}")
        assert text == f"{prompt} {prompts.show_answer(one.problem, one.given)}.\n\n"


@pytest.mark.parametrize("form", ["open", "conditioned"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_every_exemplar_is_judged_right_as_it_is_shown(dataset, form):
    for one, text in zip(prompts.exemplars(dataset), shown(dataset, form), strict=True):
        prompt = (
            prompts.open_prompt(one.problem)
            if form == "open"
            else prompts.conditioned_prompt(one.problem, one.problem.answer)
        )
        completion = text.removeprefix(prompt)
        assert completion != text and grade(one.problem, completion).correct
        assert prompts.split_answer(completion)[0] == f" {one.rationale}"
        assert 2 <= len(one.rationale.split("\n")) <= 6
        assert one.given == one.problem.answer


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_wrong_exemplar_is_judged_to_reach_its_wrong_answer(dataset):
    ours = prompts.exemplars(dataset, wrong=True)
    assert len(ours) == 2
    for one in ours:
        completion = f" {one.rationale}\n{prompts.answer_sentence(one.problem, one.given)}"
        prompt = prompts.conditioned_prompt(one.problem, one.given)
        assert f"{prompt}{completion}\n\n" in prompts.few_shot(dataset, form="wrong")
        gold = prompts.answer_sentence(one.problem, one.problem.answer)
        verdict = grade(one.problem, completion)
        assert not verdict.correct and verdict.extracted is not None and grade(one.problem, gold).correct
        assert grade(Problem("x", dataset, "?", one.given, one.problem.kind, one.problem.choices), completion).correct


@pytest.mark.parametrize("dataset", ["coin_flip", "last_letters", "shuffled_objects"])
def test_every_step_of_an_exemplar_of_a_generated_task_is_checked(dataset):
    for one in prompts.exemplars(dataset):
        assert worked_solution(one.problem) == (one.rationale.split("\n"), one.problem.answer)
    for one in prompts.exemplars(dataset, wrong=True):
        assert worked_solution(one.problem)[1] == one.problem.answer
        assert first_wrong_step(one.problem, one.rationale) is not None
        assert len(check_steps(one.problem, one.rationale)) == len(one.rationale.split("\n"))


@pytest.mark.parametrize("dataset", ["gsm8k", "aqua", "strategy_qa"])
def test_every_equation_of_an_exemplar_holds(dataset):
    equation = re.compile(r"([\d.]+) ([-+*/]) ([\d.]+) = (\d+(?:\.\d+)?)(?! / )")
    value = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    found = [parts for one in prompts.exemplars(dataset) for parts in equation.findall(one.rationale)]
    assert found
    for left, sign, right, result in found:
        assert value[sign](float(left), float(right)) == pytest.approx(float(result))


def test_gold_answers_are_spread():
    def golds(dataset):
        return sorted(one.problem.answer for one in prompts.exemplars(dataset))

    assert golds("aqua") == ["A", "B", "C", "E"]
    assert golds("commonsense_qa") == ["A", "A", "B", "C", "D", "D", "E"]
    assert golds("date_understanding") == ["A", "B", "C", "D", "E", "F"]
    assert golds("shuffled_objects") == ["A", "B", "C"]
    assert golds("strategy_qa") == ["no"] * 3 + ["yes"] * 3
    assert golds("coin_flip") == ["no"] * 4 + ["yes"] * 4
    for dataset in DATASETS:
        distinct = {one.problem.id for wrong in (False, True) for one in prompts.exemplars(dataset, wrong=wrong)}
        assert len(distinct) == COUNTS[dataset] + 2
        if KINDS[dataset] in ("number", "letters", "math"):
            assert len(set(golds(dataset))) == COUNTS[dataset]


def test_options_are_distinct_and_as_many_as_the_benchmark_has():
    expected = {"aqua": {5}, "commonsense_qa": {5}, "date_understanding": {5, 6}, "shuffled_objects": {3}}
    for dataset in DATASETS:
        ours = [one.problem.choices for wrong in (False, True) for one in prompts.exemplars(dataset, wrong=wrong)]
        assert {len(choices) for choices in ours} == expected.get(dataset, {0})
        assert all(len(set(choices)) == len(choices) for choices in ours)


@pytest.mark.parametrize("form", ["open", "conditioned", "wrong"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_few_shot_is_pure_and_ends_with_one_blank_line(dataset, form):
    shots = prompts.few_shot(dataset, form=form)
    assert shots == prompts.few_shot(dataset, form=form)
    assert shots.endswith(".\n\n") and "\n\n\n" not in shots
    assert shots.startswith(prompts.few_shot(dataset, 1, form=form))


def test_every_wrong_exemplar_says_what_its_mistake_is():
    for rows in json.loads(Path(prompts.__file__).with_name("exemplars.json").read_text("utf-8")).values():
        assert all(not {"given", "mistake"} & set(row) for row in rows["right"])
        assert all(row["mistake"] and row["given"] != row["answer"] for row in rows["wrong"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "gsm9k"}, "no exemplars for dataset 'gsm9k'; choose one of: single_eq, addsub, .*, math$"),
        ({"dataset": "word_problems"}, "no exemplars for dataset 'word_problems'"),
        ({"dataset": "chain_arithmetic"}, "no exemplars for dataset 'chain_arithmetic'"),
        ({"dataset": "aqua", "count": 5}, "count = 5 exemplars for aqua, form 'open'; allowed: 0 to 4"),
        ({"dataset": "aqua", "count": -1}, "count = -1 exemplars for aqua, form 'open'; allowed: 0 to 4"),
        ({"dataset": "aqua", "count": 3, "form": "wrong"}, "count = 3 .* form 'wrong'; allowed: 0 to 2"),
        ({"dataset": "aqua", "form": "closed"}, "unknown form 'closed'; allowed: open, conditioned, wrong"),
        ({"dataset": "aqua", "source": "web"}, "unknown exemplar source 'web'; allowed: smlib, wei"),
        ({"dataset": "aqua", "source": "wei", "form": "wrong"}, "no exemplars with a wrong given answer; .*'smlib'"),
    ],
)
def test_what_few_shot_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        prompts.few_shot(**arguments)


# ------------------------------------------------------------------------------------------- Wei et al.'s exemplars

WEI = {
    **dict.fromkeys(WORD_PROBLEMS, 8),
    "aqua": 4,
    "commonsense_qa": 7,
    "strategy_qa": 6,
    "date_understanding": 6,
    "last_letters": 8,
    "coin_flip": 8,
}


def test_exemplars_of_wei_are_put_into_our_layout(monkeypatch):
    # Invented questions in the form of the published file.
    written = {
        "svamp": (
            "Q: Ann has 2 nuts. How many?\nA: She has 2. So 2. The answer is 2.\n"
            "Q: And?\nA: The answer is what one reads: 3. The answer is 3."
        ),
        "aqua": "Q: Which? Answer choices: (A) 1,000 km, (B)2/3, (C) 2.5.\nA: It is the last. The answer is C.",
        "last_letter_concatenation": 'Q: Take "Al".\nA: It ends in "l". The answer is l.',
    }
    published = {name: {"prompt": prompt} for name, prompt in written.items()}
    monkeypatch.setattr(prompts, "read_pinned", lambda path: json.dumps(published).encode())
    assert prompts.few_shot("svamp", source="wei") == (
        "Q: Ann has 2 nuts. How many?\nA: She has 2. So 2.\nThe answer is 2.\n\n"
        "Q: And?\nA: The answer is what one reads: 3.\nThe answer is 3.\n\n"
    )
    assert prompts.few_shot("aqua", source="wei", form="conditioned") == (
        "Q: Which?\nAnswer Choices: (A) 1,000 km (B) 2/3 (C) 2.5\nGiven answer: (C)\n"
        "A: It is the last.\nThe answer is (C).\n\n"
    )
    assert prompts.few_shot("last_letters", source="wei") == 'Q: Take "Al".\nA: It ends in "l".\nThe answer is l.\n\n'
    for dataset in ("shuffled_objects", "math"):
        with pytest.raises(ValueError, match=f"Wei et al. have no exemplars for '{dataset}'; .* source 'smlib'"):
            prompts.few_shot(dataset, source="wei")
    with pytest.raises(ValueError, match="count = 3 exemplars for svamp, form 'open'; allowed: 0 to 2"):
        prompts.few_shot("svamp", 3, source="wei")


def test_the_published_exemplars_of_wei_are_judged_right():
    needs_data()
    for dataset, count in WEI.items():
        theirs = prompts.exemplars(dataset, source="wei")
        assert len(theirs) == count
        for one in theirs:
            text = f" {one.rationale}\n{prompts.answer_sentence(one.problem, one.given)}"
            assert grade(one.problem, text).correct and "The answer is" not in one.rationale
            assert bool(one.problem.choices) == (one.problem.kind == "choice")
    prompt = prompts.open_prompt(asked("gsm8k"), prompts.few_shot("gsm8k", source="wei"))
    assert prompt.endswith("So she has 23 - 15 dollars left. 23 - 15 is 8.\nThe answer is 8.\n\nQ: How many?\nA:")


@pytest.fixture(scope="module")
def published() -> dict[str, str]:
    """Question, without spaces and letter case -> where it stands."""
    needs_data()
    found = {}
    for dataset in PUBLISHED:
        for split in splits(dataset):
            with suppress(DatasetError):  # a local copy may lack math, and the train split of aqua
                found |= {normal(problem.question): problem.id for problem in load(dataset, split)}
    return found


@pytest.mark.parametrize("dataset", DATASETS)
def test_no_exemplar_of_ours_is_a_published_question(dataset, published):
    theirs = {normal(one.problem.question) for name in WEI for one in prompts.exemplars(name, source="wei")}
    for wrong in (False, True):
        for one in prompts.exemplars(dataset, wrong=wrong):
            assert normal(one.problem.question) not in published
            assert normal(one.problem.question) not in theirs


def test_five_exemplars_of_wei_are_test_questions(published):
    tested = set()
    for dataset in WEI:
        for one in prompts.exemplars(dataset, source="wei"):
            asks = one.problem.question.removeprefix("Yes or no: ").removesuffix(" Which choice is true?")
            where = published.get(normal(asks.replace("’", "'")), "")
            tested |= {where} if "/test/" in where else set()
    assert tested == {
        "strategy_qa/test/0",
        "strategy_qa/test/3",
        "strategy_qa/test/7",
        "date_understanding/test/53",
        "date_understanding/test/143",
    }
