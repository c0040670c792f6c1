"""Stages 1 and 2 of Self-motivated Learning: the model writes rationales, then answers again from them.

A `Rationale` says where it comes from, the answer it was given, if any, the answer it states, the answer the model
reads off it once its answer sentence is taken away, and both verdicts.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from smlib.judging.answers import before_answer, grade
from smlib.learning.rows import Rationale
from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.sampling import encoding
from smlib.sampling.engines import Engine
from smlib.sampling.params import Sample, SamplingParams

REANSWER_TOKENS = 16  # that an answer read off a rationale may have


def sample_open(
    engine: Engine,
    problems: Sequence[Problem],
    n: int,
    params: SamplingParams,
    *,
    author: str | None,
    shots: str = "none",
    progress: str | None = None,
) -> list[Rationale]:
    """n rationales per problem from the question alone (stage 1b), in the order of the problems.

    params: how to draw; with exemplars shown, a sample ends at a next question, too.
    shots: whose exemplars come before the question, "none", "smlib" or "wei" (`prompts.few_shot`); a model that has
    not read our documents needs them to know the form.
    """
    drawn = engine.sample_ids(
        [encoding.encode_question(engine.tokenizer, problem, shots=shots) for problem in problems],
        n,
        params.stopping_at(prompts.stop(shots)),
        keys=[problem.id for problem in problems],
        progress=progress,
    )
    return [
        judged(engine.tokenizer, problem, one, source="open", author=author, index=index)
        for problem, samples in zip(problems, drawn, strict=True)
        for index, one in enumerate(samples)
    ]


def sample_conditioned(
    engine: Engine,
    problems: Sequence[Problem],
    n: int,
    params: SamplingParams,
    *,
    author: str,
    shots: str = "none",
    progress: str | None = None,
) -> list[Rationale]:
    """n rationales per problem for its gold answer and n for wrong given answers (stage 1).

    The wrong answers are drawn without repetition from `prompts.wrong_answers`; where there are fewer than n
    (yes/no has one), they are used in turn. params, shots: as in `sample_open`, but that params.seed draws the wrong
    answers, too, and that right and wrong given answers get the same exemplars, of both kinds.
    """
    rng = random.Random(f"given/{params.seed}")
    asked: list[tuple[Problem, str, int]] = []
    for problem in problems:
        wrong = prompts.wrong_answers(problem, rng, problems)
        asked += [(problem, problem.answer, index) for index in range(n)]
        asked += [(problem, wrong[index % len(wrong)], index) for index in range(n) if wrong]
    drawn = engine.sample_ids(
        [encoding.encode_question(engine.tokenizer, problem, given=given, shots=shots) for problem, given, _ in asked],
        1,
        params.stopping_at(prompts.stop(shots)),
        keys=[f"{problem.id}|{given}|{index}" for problem, given, index in asked],
        progress=progress,
    )
    return [
        judged(engine.tokenizer, problem, one, source="conditioned", author=author, given=given, index=index)
        for (problem, given, index), [one] in zip(asked, drawn, strict=True)
    ]


def judged(tokenizer: PreTrainedTokenizerBase, problem: Problem, sample: Sample, **origin) -> Rationale:
    """A sample up to its answer sentence, with its verdict; origin: fields of `Rationale` that say where it is from."""
    text = prompts.cut(sample.text)
    verdict = grade(problem, text)
    return Rationale(
        id=problem.id,
        dataset=problem.dataset,
        text=text,
        token_ids=tuple(encoding.first_characters(tokenizer, sample.token_ids, len(text))),
        answer=verdict.extracted,
        correct=verdict.correct,
        reason=verdict.reason,
        **origin,
    )


def reanswer(
    engine: Engine,
    problems: Sequence[Problem],
    rationales: Sequence[Rationale],
    *,
    seed: int,
    shots: str = "none",
    progress: str | None = None,
) -> list[Rationale]:
    """The rationales with `reanswer` and `reanswer_correct` (stage 2); problems: those of the rationales, by id.

    The rationale without its answer goes back under its question, and the model, greedy, writes the answer. Taking
    away all that the judge would read as an answer is our choice: left in, the filter would only read the hint back.
    Equal rationales of one question are answered once. Open rationales were given no answer that they could repeat:
    what they state counts as what can be read off them.
    """
    by_id = {problem.id: problem for problem in problems}
    keys = [
        (one.id, _reanswer_prompt(engine.tokenizer, by_id[one.id], one, shots)) if one.given is not None else None
        for one in rationales
    ]
    asked = list(dict.fromkeys(key for key in keys if key))
    greedy = SamplingParams(temperature=0.0, max_new_tokens=REANSWER_TOKENS, seed=seed)
    drawn = engine.sample_ids(
        [list(ids) for _, ids in asked],
        1,
        greedy.stopping_at(prompts.stop(shots)),
        keys=[f"{identity}|{' '.join(map(str, ids))}" for identity, ids in asked],
        progress=progress,
    )
    verdicts = {
        key: grade(by_id[key[0]], prompts.cut(prompts.ANSWER_LEAD + one.text))
        for key, [one] in zip(asked, drawn, strict=True)
    }
    answered = []
    for one, key in zip(rationales, keys, strict=True):
        read, right = one.answer, one.correct
        if key:
            read, right = verdicts[key].extracted, verdicts[key].correct
        answered.append(replace(one, reanswer=read, reanswer_correct=right))
    return answered


def _reanswer_prompt(tokenizer, problem: Problem, rationale: Rationale, shots: str) -> tuple[int, ...]:
    """A question and a rationale before anything that the judge would read as its answer, to answer anew."""
    characters = len(before_answer(rationale.text))
    return tuple(encoding.encode_reanswer(tokenizer, problem, rationale.token_ids, characters, shots))
