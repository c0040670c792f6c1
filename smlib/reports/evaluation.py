"""Measure a model: answers per problem, accuracies with intervals, and tests of one model against another.

Accuracies are shares between 0 and 1; only the published reference line below is in percent. All intervals
are 95 % and two-sided. They say how far another draw of questions could move the number; how far another
training seed could is what `smlib.reports.results.combine` says.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NotRequired

import numpy as np
from scipy import stats
from typing_extensions import TypedDict

from smlib.errors import UsageError
from smlib.judging.answers import grade, majority_vote
from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.sampling.encoding import encode_question, first_characters
from smlib.sampling.engines import Engine
from smlib.sampling.params import Sample, SamplingParams

# Zero-shot chain-of-thought accuracy (percent) of text-davinci-002, the model the paper compares with, as
# published by Kojima et al. 2022 (arXiv 2205.11916) with its outputs; the comment is the number of questions.
TEXT_DAVINCI_002 = {
    "single_eq": 77.95,  # 508
    "addsub": 69.62,  # 395
    "multiarith": 78.67,  # 600
    "gsm8k": 40.71,  # 1,319 (test)
    "svamp": 62.10,  # 1,000
    "aqua": 33.46,  # 254 (test)
    "commonsense_qa": 64.62,  # 1,221 (dev)
    "strategy_qa": 54.76,  # 2,290
    "date_understanding": 67.48,  # 369
    "shuffled_objects": 52.40,  # 750 (three objects)
    "last_letters": 57.60,  # 500 (four words)
    "coin_flip": 91.40,  # 500 (four people)
}


# -------------------------------------------------------------------------------------------------- intervals


def accuracy_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson interval (low, high) of the share correct / n: for one right-or-wrong answer per question."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} correct of {n} is not a share: n must be at least 1 and 0 <= correct <= n")
    interval = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student t interval (low, high) of the mean of independent values, at least two.

    For avg@k pass one value per question, the mean of its k samples: the samples of one question are alike,
    and an interval over all samples would be too narrow.
    """
    if len(values) < 2:
        raise UsageError(f"an interval needs at least 2 values, got {len(values)}: evaluate more questions")
    values = np.asarray(values, dtype=float)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


# ------------------------------------------------------------------------------ several samples of a question


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated without bias from c right ones among n >= k.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}) is undefined: it takes 1 <= k <= n and 0 <= c <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def best_of_n(scores: Sequence[float], correct: Sequence[bool], n: int | None = None) -> float:
    """Expected correctness of the highest-scored among n samples of one question, drawn without replacement.

    n: by default all samples. Samples with equal scores are equally likely to be chosen. Exact, with nothing
    drawn: the best of n lies in a group of equal scores if the draw meets that group and none above it. With
    the correctness itself as score this is pass@n, with a constant score it is the mean.
    """
    total = len(scores)
    n = total if n is None else n
    if len(correct) != total or not 1 <= n <= total or any(map(math.isnan, scores)):
        raise UsageError(
            f"best of n={n} from {total} scores and {len(correct)} verdicts is undefined: give one score, no "
            "NaN, per verdict, and 1 <= n <= their number"
        )
    groups = defaultdict(list)
    for score, right in zip(scores, correct, strict=True):
        groups[score].append(float(right))
    expected, not_above = 0.0, total
    for score in sorted(groups, reverse=True):
        verdicts = groups[score]
        below = not_above - len(verdicts)
        chance = (math.comb(not_above, n) - math.comb(below, n)) / math.comb(total, n)
        expected += chance * sum(verdicts) / len(verdicts)
        not_above = below
    return expected


def best_of_n_curve(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[bool]]) -> dict[int, float]:
    """Mean over questions of best_of_n, for n = 1, 2, 4, ... up to the fewest samples of any question.

    scores, correct: [question][sample]. The value at n = 1 is avg@k, whatever the scores are.
    """
    pairs = list(zip(scores, correct, strict=True))
    powers = [2**i for i in range(min(map(len, scores)).bit_length())]
    return {n: float(np.mean([best_of_n(s, c, n) for s, c in pairs])) for n in powers}


# ---------------------------------------------------------------------------------- one model against another


def paired_test(a: Sequence[float], b: Sequence[float]) -> dict:
    """Compare two models on the same questions: a[i], b[i] are their values (0/1, or avg@k) on question i.

    Returns n, mean_difference (a - b), low and high (t interval), p_value (paired t test), and p_exact: exact
    McNemar test (binomial on the questions where they differ) if all values are 0 or 1, else None.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: give both models the same questions, in the same order")
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    difference = a - b
    low, high = mean_interval(difference)
    p_exact = None
    if np.isin(np.concatenate([a, b]), (0, 1)).all():
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        p_exact = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return {
        "n": len(difference),
        "mean_difference": float(difference.mean()),
        "low": low,
        "high": high,
        # without any spread scipy would divide by zero
        "p_value": float(stats.ttest_rel(a, b).pvalue) if np.ptp(difference) else float(not difference.any()),
        "p_exact": p_exact,
    }


def _mean(values: list[float]) -> dict:
    low, high = mean_interval(values)
    return {"value": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def _share(correct: list[bool]) -> dict:
    low, high = accuracy_interval(sum(correct), len(correct))
    return {"value": sum(correct) / len(correct), "low": low, "high": high, "n": len(correct)}


# ------------------------------------------------------------------------------------------------- evaluation


class Answers(TypedDict):
    """What one model answers to one question, greedily and in k samples: a row of answers.jsonl.

    An invalid answer is None and counts as wrong. method and test_set: in a file, where rows of several stand together;
    scores, in nats: by the reward model, of the samples of stage 05.
    """

    method: NotRequired[str]
    test_set: NotRequired[str]
    id: str  # of the question, as its dataset and gold answer are
    dataset: str
    gold: str
    greedy_text: str
    greedy_answer: str | None
    greedy_correct: bool
    greedy_invalid: bool
    sampled_texts: list[str]
    sampled_ids: list[list[int]]  # the tokens of these texts, as drawn
    sampled_answers: list[str | None]
    sampled_correct: list[bool]
    sampled_invalid: int
    scores: NotRequired[list[float]]


def evaluate(
    engine: Engine,
    problems: list[Problem],
    k: int,
    params: SamplingParams,
    *,
    shots: str = "none",
    progress: str | None = None,
) -> list[Answers]:
    """One row per problem: the greedy answer and k sampled ones to the question alone (k = 0: greedy only).

    params: of the sampled answers; the greedy one differs in its temperature alone. shots: as in
    `rationales.sample_open`. Texts are cut as in training (`prompts.cut`).
    """
    prompt_ids = [encode_question(engine.tokenizer, problem, shots=shots) for problem in problems]
    keys, params = [problem.id for problem in problems], params.stopping_at(prompts.stop(shots))
    greedy = engine.sample_ids(prompt_ids, 1, replace(params, temperature=0.0), keys=keys, progress=progress)
    drawn = engine.sample_ids(prompt_ids, k, params, keys=keys, progress=progress) if k else [[] for _ in problems]
    return [
        _row(engine.tokenizer, problem, prompts.cut(first.text), samples)
        for problem, [first], samples in zip(problems, greedy, drawn, strict=True)
    ]


def _row(tokenizer, problem: Problem, greedy_text: str, samples: list[Sample]) -> Answers:
    greedy = grade(problem, greedy_text)
    sampled_texts = [prompts.cut(one.text) for one in samples]
    sampled = [grade(problem, text) for text in sampled_texts]
    return {
        "id": problem.id,
        "dataset": problem.dataset,
        "gold": problem.answer,
        "greedy_text": greedy_text,
        "greedy_answer": greedy.extracted,
        "greedy_correct": greedy.correct,
        "greedy_invalid": greedy.extracted is None,
        "sampled_texts": sampled_texts,
        "sampled_ids": [
            first_characters(tokenizer, one.token_ids, len(text))
            for one, text in zip(samples, sampled_texts, strict=True)
        ],
        "sampled_answers": [verdict.extracted for verdict in sampled],
        "sampled_correct": [verdict.correct for verdict in sampled],
        "sampled_invalid": sum(verdict.extracted is None for verdict in sampled),
    }


def summarise(rows: Sequence[Answers]) -> dict:
    """Headline numbers of `evaluate`'s rows, all with the same k.

    greedy, avg_at_k, pass_at_k, majority_at_k: {"value", "low", "high", "n"} with n the number of questions
    (avg_at_k has a t interval over questions, the others Wilson); greedy_invalid and sampled_invalid: shares;
    k. With k = 0 only the greedy entries are there.
    """
    ks = {len(row["sampled_correct"]) for row in rows}
    if len(ks) != 1:
        raise ValueError(f"the rows have {sorted(ks)} samples per question: give the rows of one `evaluate` run")
    k, n = ks.pop(), len(rows)
    summary = {
        "k": k,
        "greedy": _share([row["greedy_correct"] for row in rows]),
        "greedy_invalid": sum(row["greedy_invalid"] for row in rows) / n,
    }
    if k == 0:
        return summary
    return summary | {
        "avg_at_k": _mean([sum(row["sampled_correct"]) / k for row in rows]),
        "pass_at_k": _share([any(row["sampled_correct"]) for row in rows]),
        "majority_at_k": _share([_majority_correct(row) for row in rows]),
        "sampled_invalid": sum(row["sampled_invalid"] for row in rows) / (n * k),
    }


def _majority_correct(row: Answers) -> bool:
    """Equal canonical answers have equal verdicts, so the winner's first sample decides."""
    answers = row["sampled_answers"]
    return row["sampled_correct"][answers.index(majority_vote(answers))]
