"""Every prompt of the pipeline, and the one place where a model's text is cut and taken apart.

A document reads "Q: <question>\\nA: <step>\\n<step>\\nThe answer is <answer>." The completion starts with the
space after "A:", so that prompt and completion can be tokenised apart and joined without a seam.
"""

import random
import re

from smlib.problems import LETTERS, Problem, with_options

ANSWER_LEAD = "The answer is"
_ANSWER_LINE = re.compile(rf"^[ \t]*{ANSWER_LEAD}\b[^\n]*", re.MULTILINE)
_NEXT_QUESTION = re.compile(r"\n\s*Q:")


def show_answer(problem: Problem, answer: str) -> str:
    """The answer as an answer sentence writes it: an option letter in brackets, anything else as it is."""
    return f"({answer})" if problem.kind == "choice" else answer


def answer_sentence(problem: Problem, answer: str) -> str:
    return f"{ANSWER_LEAD} {show_answer(problem, answer)}."


def open_prompt(problem: Problem) -> str:
    """The question alone: what SFT, PPO and evaluation use."""
    return f"Q: {with_options(problem)}\nA:"


def conditioned_prompt(problem: Problem, given: str) -> str:
    """The question and a given answer, right or wrong (stage 1, Self-motivated Learning)."""
    return f"Q: {with_options(problem)}\nGiven answer: {show_answer(problem, given)}\nA:"


def reanswer_prompt(problem: Problem, rationale: str) -> str:
    """The question and a rationale without its answer sentence; the model writes the answer (stage 2)."""
    return f"{open_prompt(problem)}{rationale}\n{ANSWER_LEAD}"


def cut(text: str) -> str:
    """The text up to and including its first answer sentence, and never into a next question ("Q:")."""
    text = _NEXT_QUESTION.split(text, maxsplit=1)[0]
    match = _ANSWER_LINE.search(text)
    return text[: match.end()] if match else text


def split_answer(text: str) -> tuple[str, str]:
    """(rationale, answer sentence) of a completion; the sentence is "" where there is none."""
    text = cut(text)
    match = _ANSWER_LINE.search(text)
    return (text[: match.start()].rstrip("\n"), match[0].strip()) if match else (text.rstrip("\n"), "")


def wrong_answers(problem: Problem, rng: random.Random, others: list[Problem]) -> list[str]:
    """Every wrong answer to offer as given (method, stage 1), in random order.

    number: the integers 0-100 except gold; choice: the other options; yes/no: the opposite; letters: other
    problems' answers of the same length (our choice: the paper's text does not say).
    """
    if problem.kind == "number":
        pool = [str(value) for value in range(101) if str(value) != problem.answer]
    elif problem.kind == "choice":
        pool = [letter for letter in LETTERS[: len(problem.choices)] if letter != problem.answer]
    elif problem.kind == "yes_no":
        pool = ["no" if problem.answer == "yes" else "yes"]
    else:
        answers = {other.answer for other in others if other.dataset == problem.dataset} - {problem.answer}
        pool = sorted(answer for answer in answers if len(answer) == len(problem.answer)) or sorted(answers)
    return rng.sample(pool, len(pool))
