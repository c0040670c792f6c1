"""Every prompt of the pipeline, and the one place where a model's text is cut and taken apart.

A document reads "Q: <question>\\nA: <step>\\n<step>\\nThe answer is <answer>." The completion starts with the
space after "A:", so that prompt and completion can be tokenised apart and joined without a seam. Exemplars of a
few-shot prompt are such documents, with a blank line after each.
"""

import json
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from smlib.errors import UsageError
from smlib.problems.datasets import KINDS, Problem, with_options
from smlib.problems.downloads import read_pinned
from smlib.problems.generators import LETTERS

ANSWER_LEAD = "The answer is"
_ANSWER_LINE = re.compile(rf"^[ \t]*{ANSWER_LEAD}\b[^\n]*", re.MULTILINE)
# What a model goes on with once it has answered, at the start of a line: "Q: ..." (no ratio, "Q:R = 2:3"), "Q2. ...?",
# "Question 2: ..." or a turn of a chat. It is searched in "\n" + text: a pattern that begins with a letter is fast.
_NEXT_QUESTION = re.compile(
    r"\n[ \t>*#]*+(?:Q:(?!\w{1,3} ?[:=])|Q(?:\.|\d{1,2}[.:])\s[^\n]*\?"
    r"|(?:Question|QUESTION|(?:Next|New) [Qq]uestion)(?: \d+)?\*{0,2}(?: ?[:.]| *(?:\n|$))"
    r"|(?:User|USER|Human|Assistant|ASSISTANT)\*{0,2}:|(?:(?<=#)|(?<=# ))(?:Instruction|Response)\b)"
)
# Marks of chats and of documents, spelled out in a text.
_MARKUP = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")


def show_answer(problem: Problem, answer: str) -> str:
    """The answer as an answer sentence writes it: an option letter in brackets, math in dollars, else as it is."""
    if problem.kind == "choice":
        return f"({answer})"
    return f"${answer}$" if problem.kind == "math" else answer


def answer_sentence(problem: Problem, answer: str) -> str:
    return f"{ANSWER_LEAD} {show_answer(problem, answer)}."


# --------------------------------------------------------------------- the prompts of Self-motivated Learning
# shots: exemplars to put first, as `few_shot` writes them; without any, the prompt is the question's own.


def open_prompt(problem: Problem, shots: str = "") -> str:
    """The question alone: what SFT, PPO and evaluation use."""
    return f"{shots}Q: {with_options(problem)}\nA:"


def conditioned_prompt(problem: Problem, given: str, shots: str = "") -> str:
    """The question and a given answer, right or wrong (stage 1, Self-motivated Learning, 2404.07017)."""
    return f"{shots}Q: {with_options(problem)}\nGiven answer: {show_answer(problem, given)}\nA:"


def reanswer_prompt(problem: Problem, rationale: str, shots: str = "") -> str:
    """The question and a rationale without its answer sentence; the model writes the answer (stage 2).

    With that answer it reads like any open document, so its shots are those of the open form. The pipeline asks by
    `encoding.encode_reanswer`, from the tokens that were drawn; this is its text.
    """
    return f"{open_prompt(problem, shots)}{rationale}\n{ANSWER_LEAD}"


# ------------------------------------------------------------------------------ few-shot chain of thought

_WORD_PROBLEMS = ("single_eq", "addsub", "multiarith", "gsm8k", "gsm8k_easy", "svamp")  # share one set of exemplars
_FORMS = ("open", "conditioned", "wrong")
SOURCES = ("smlib", "wei")  # who wrote the exemplars


@dataclass(frozen=True)
class Exemplar:
    """A worked question. given: the answer that the rationale reaches, which is gold unless it shows a mistake."""

    problem: Problem
    rationale: str
    given: str


def few_shot(dataset: str, count: int | None = None, *, form: str = "open", source: str = "smlib") -> str:
    """Exemplars as a prefix for a prompt: the first `count`, or all (few-shot CoT, Wei et al., 2201.11903).

    form "open" is for open_prompt and reanswer_prompt. For conditioned_prompt there are "conditioned", where the
    right answer is given, and "wrong", where a wrong answer is given and the rationale makes the mistake that
    leads there; without the latter a model has seen no reason to follow a wrong answer. Join the two, so that
    right and wrong given answers get the same prefix and the reward model cannot tell their rationales apart by it:

        shots = few_shot("gsm8k", form="wrong") + few_shot("gsm8k", form="conditioned")
        conditioned_prompt(problem, given, shots)

    source "smlib": written for this package; "wei": those of Wei et al., fetched, see `exemplars`. Raises ValueError
    for an unknown name, for exemplars that do not exist, and for a count larger than there are.
    """
    if form not in _FORMS:
        raise UsageError(f"unknown form {form!r}; allowed: {', '.join(_FORMS)}")
    shown = exemplars(dataset, wrong=form == "wrong", source=source)
    if count is not None and not 0 <= count <= len(shown):
        raise UsageError(f"count = {count} exemplars for {dataset}, form {form!r}; allowed: 0 to {len(shown)}")
    return "".join(_document(one, form) + "\n\n" for one in shown[:count])


@cache
def shots(dataset: str, source: str, *, conditioned: bool = False) -> str:
    """What a run with `sampling.shots` = source puts before every question of a dataset: nothing for "none".

    conditioned: for prompts with a given answer. Exemplars with a wrong one are ours: nobody else wrote any.
    """
    if source == "none":
        return ""
    if not conditioned:
        return few_shot(dataset, source=source)
    return few_shot(dataset, form="wrong") + few_shot(dataset, form="conditioned", source=source)


def stop(source: str) -> tuple[str, ...]:
    """Stop strings to sample with: shown exemplars, a model goes on with a next question. `cut` takes off the rest."""
    return () if source == "none" else ("\nQ: ",)


def chat(problem: Problem, given: str | None = None, source: str = "none") -> list[dict[str, str]]:
    """The turns of a chat that ask a question, for a chat template; the exemplars are turns that went before.

    given: an answer to write a rationale for, or None. source: of the exemplars, as in `shots`.
    """
    turns = []
    if source != "none":
        shown = exemplars(problem.dataset, source=source)
        shown = shown if given is None else exemplars(problem.dataset, wrong=True) + shown
        for one in shown:
            said = f"{one.rationale}\n{answer_sentence(one.problem, one.given)}"
            turns += [_asked(one.problem, given and one.given), {"role": "assistant", "content": said}]
    return [*turns, _asked(problem, given)]


def _asked(problem: Problem, given: str | None) -> dict[str, str]:
    hint = "" if given is None else f"\nGiven answer: {show_answer(problem, given)}"
    return {"role": "user", "content": with_options(problem) + hint}


def _document(one: Exemplar, form: str) -> str:
    prompt = open_prompt(one.problem) if form == "open" else conditioned_prompt(one.problem, one.given)
    return f"{prompt} {one.rationale}\n{answer_sentence(one.problem, one.given)}"


def exemplars(dataset: str, *, wrong: bool = False, source: str = "smlib") -> list[Exemplar]:
    """The exemplars behind `few_shot`; wrong: those whose rationale reaches a wrong answer, two per dataset.

    The sets of word problems share theirs. In coin_flip, last_letters and shuffled_objects ours have the
    house wording of `smlib.problems.steps`, so a rationale written after them can be checked step by step. Those of
    Wei et al. (2201.11903), for eleven of the datasets, keep their words, slips included, and take our layout: the
    answer sentence on a line of its own, where `cut` looks for it. Theirs for commonsense_qa, strategy_qa,
    date_understanding, coin_flip and last_letters are rows of the published files, and five of them (three of
    strategy_qa, two of date_understanding) are in the test split: leave these rows out when you measure with them.
    """
    rows = _rows(dataset, "wrong" if wrong else "right", source)
    return [
        Exemplar(
            Problem(row["id"], dataset, row["question"], row["answer"], KINDS[dataset], tuple(row["choices"])),
            "\n".join(row["rationale"]),
            row.get("given", row["answer"]),
        )
        for row in rows
    ]


def _rows(dataset: str, side: str, source: str) -> list[dict]:
    own, shared = _own_exemplars(), "word_problems" if dataset in _WORD_PROBLEMS else dataset
    if dataset not in KINDS or shared not in own:
        known = (*_WORD_PROBLEMS, *(name for name in own if name in KINDS))
        raise UsageError(f"no exemplars for dataset {dataset!r}; choose one of: {', '.join(known)}")
    if source not in SOURCES:
        raise UsageError(f"unknown exemplar source {source!r}; allowed: {', '.join(SOURCES)}")
    if source == "wei" and side == "wrong":
        raise UsageError("Wei et al. wrote no exemplars with a wrong given answer; take them from source 'smlib'")
    rows = own[shared][side] if source == "smlib" else _wei_exemplars(dataset)
    return [row | {"id": f"{dataset}/exemplar/{source}/{side}/{index}"} for index, row in enumerate(rows)]


@cache
def _own_exemplars() -> dict[str, dict[str, list[dict]]]:
    """set -> "right" or "wrong" -> rows; "mistake", in the wrong ones, tells a reader what is wrong."""
    return json.loads((Path(__file__).parent / "exemplars.json").read_text(encoding="utf-8"))


def _wei_exemplars(dataset: str) -> list[dict]:
    """Wei et al.'s exemplars as rows like ours; their rationale is one line."""
    published = json.loads(read_pinned("few_shot_cot_prompts.json"))
    key = {"last_letters": "last_letter_concatenation", "gsm8k_easy": "gsm8k"}.get(dataset, dataset)
    if key not in published:
        raise UsageError(f"Wei et al. have no exemplars for {dataset!r}; take them from source 'smlib'")
    rows = []
    for document in ("\n" + published[key]["prompt"]).split("\nQ: ")[1:]:
        asked, _, worked = document.partition("\nA: ")
        question, _, options = asked.partition(" Answer choices: ")
        rationale, _, answer = worked.strip().rpartition(f" {ANSWER_LEAD} ")
        choices = re.split(r",? ?\([A-Z]\) ?", options.removesuffix("."))[1:]
        rows.append(
            {"question": question, "choices": choices, "rationale": [rationale], "answer": answer.removesuffix(".")}
        )
    return rows


# ------------------------------------------------------------------------------ taking a model's text apart


def before_next_question(text: str) -> str:
    """The text before a next question, or before the next turn of a chat.

    A model goes on with one once it has answered. Sampling, training and judging all cut it off here. "Q:" counts at
    the start of a line only: "Restating the Q: ..." goes on, and so does "P:Q:R = 2:3:4".
    """
    following = _NEXT_QUESTION.search("\n" + text)
    markup = _MARKUP.search(text) if "<" in text or "[" in text else None
    if following is None and markup is None:
        return text
    ends = [max(following.start() - 1, 0)] if following else []
    return text[: min([*ends, markup.start()] if markup else ends)].rstrip()


def cut(text: str) -> str:
    """The text up to and including its first answer sentence, and never into a next question."""
    text = before_next_question(text)
    match = _ANSWER_LINE.search(text)
    return text[: match.end()] if match else text


def split_answer(text: str) -> tuple[str, str]:
    """(rationale, answer sentence) of a completion; the sentence is "" where there is none."""
    text = cut(text)
    match = _ANSWER_LINE.search(text)
    return (text[: match.start()].rstrip("\n"), match[0].strip()) if match else (text.rstrip("\n"), "")


def wrong_answers(problem: Problem, rng: random.Random, others: list[Problem]) -> list[str]:
    """Every wrong answer to offer as given (method, stage 1), in random order.

    number: the integers 0-100 except gold; choice: the other options; yes/no: the opposite; letters and math:
    other problems' answers of the same length (our choice: the paper's text does not say).
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
