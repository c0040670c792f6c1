"""Stages 1 and 2 of Self-motivated Learning: the model writes rationales, then answers again from them.

A row is one rationale: where it comes from (`source` "open" or "conditioned", `author` "base" or "sft"), the
answer it was given, if any, the answer it states, the answer the model reads off it once its answer sentence
is taken away, and both verdicts.
"""

import random
from collections.abc import Sequence

from smlib import encoding, prompts
from smlib.answers import before_answer, grade
from smlib.engines import Engine
from smlib.problems import Problem
from smlib.sampling import Sample


def sample_open(
    engine: Engine,
    problems: Sequence[Problem],
    n: int,
    *,
    author: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    shots: str = "none",
    progress: str | None = None,
) -> list[dict]:
    """n rationales per problem from the question alone (stage 1b), as rows in the order of the problems.

    shots: whose exemplars come before the question, "none", "smlib" or "wei" (`prompts.few_shot`); a model that has
    not read our documents needs them to know the form.
    """
    drawn = engine.sample_ids(
        [encoding.encode_question(engine.tokenizer, problem, shots=shots) for problem in problems],
        n,
        stop=prompts.stop(shots),
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        keys=[problem.id for problem in problems],
        progress=progress,
    )
    return [
        _row(engine.tokenizer, problem, one, source="open", author=author, given=None, index=index)
        for problem, samples in zip(problems, drawn, strict=True)
        for index, one in enumerate(samples)
    ]


def sample_conditioned(
    engine: Engine,
    problems: Sequence[Problem],
    n: int,
    *,
    author: str,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    shots: str = "none",
    progress: str | None = None,
) -> list[dict]:
    """n rationales per problem for its gold answer and n for wrong given answers (stage 1).

    The wrong answers are drawn without repetition from `prompts.wrong_answers`; where there are fewer than n
    (yes/no has one), they are used in turn. shots: as in `sample_open`; right and wrong given answers get the same
    exemplars, of both kinds.
    """
    rng = random.Random(f"given/{seed}")
    asked: list[tuple[Problem, str, int]] = []
    for problem in problems:
        wrong = prompts.wrong_answers(problem, rng, problems)
        asked += [(problem, problem.answer, index) for index in range(n)]
        asked += [(problem, wrong[index % len(wrong)], index) for index in range(n) if wrong]
    drawn = engine.sample_ids(
        [encoding.encode_question(engine.tokenizer, problem, given=given, shots=shots) for problem, given, _ in asked],
        1,
        stop=prompts.stop(shots),
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
        keys=[f"{problem.id}|{given}|{index}" for problem, given, index in asked],
        progress=progress,
    )
    return [
        _row(engine.tokenizer, problem, one, source="conditioned", author=author, given=given, index=index)
        for (problem, given, index), [one] in zip(asked, drawn, strict=True)
    ]


def _row(tokenizer, problem: Problem, one: Sample, *, source: str, author: str, given: str | None, index: int) -> dict:
    text = prompts.cut(one.text)
    verdict = grade(text, problem)
    return {
        "id": problem.id,
        "dataset": problem.dataset,
        "author": author,
        "source": source,
        "given": given,
        "index": index,
        "text": text,
        "token_ids": encoding.first_characters(tokenizer, one.token_ids, len(text)),
        "answer": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
    }


def reanswer(
    engine: Engine,
    problems: Sequence[Problem],
    rows: list[dict],
    *,
    seed: int,
    shots: str = "none",
    progress: str | None = None,
) -> list[dict]:
    """The rows with "reanswer" and "reanswer_correct" added (stage 2).

    The rationale without its answer goes back under its question, and the model, greedy, writes the answer. Taking
    away all that the judge would read as an answer is our choice: left in, the filter would only read the hint back.
    Equal rationales of one question are answered once. Open rationales were given no answer that they could repeat:
    what they state counts as what can be read off them.
    """
    by_id = {problem.id: problem for problem in problems}
    keys = [
        (row["id"], _reanswer_prompt(engine.tokenizer, by_id[row["id"]], row, shots))
        if row["given"] is not None
        else None
        for row in rows
    ]
    asked = list(dict.fromkeys(key for key in keys if key))
    drawn = engine.sample_ids(
        [list(ids) for _, ids in asked],
        1,
        stop=prompts.stop(shots),
        temperature=0.0,
        max_new_tokens=16,
        seed=seed,
        keys=[f"{identity}|{' '.join(map(str, ids))}" for identity, ids in asked],
        progress=progress,
    )
    verdicts = {
        key: grade(prompts.cut(prompts.ANSWER_LEAD + one.text), by_id[key[0]])
        for key, [one] in zip(asked, drawn, strict=True)
    }
    answered = []
    for row, key in zip(rows, keys, strict=True):
        read, right = row["answer"], row["correct"]
        if key:
            read, right = verdicts[key].extracted, verdicts[key].correct
        answered.append(row | {"reanswer": read, "reanswer_correct": right})
    return answered


def _reanswer_prompt(tokenizer, problem: Problem, row: dict, shots: str) -> tuple[int, ...]:
    """A question and a rationale before anything that the judge would read as its answer, to answer anew."""
    characters = len(before_answer(row["text"], problem))
    return tuple(encoding.encode_reanswer(tokenizer, problem, row["token_ids"], characters, shots))
