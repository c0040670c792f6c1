import math
from dataclasses import asdict
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tokenizer, written_sample

from smlib.judging.answers import majority_vote
from smlib.problems.datasets import Problem
from smlib.problems.prompts import few_shot
from smlib.reports.evaluation import (
    accuracy_interval,
    best_of_n,
    best_of_n_curve,
    evaluate,
    mean_interval,
    paired_test,
    pass_at_k,
    summarise,
)
from smlib.sampling.params import SamplingParams

# ----------------------------------------------------------------------------------------------- intervals


def test_wilson_interval():
    assert accuracy_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = accuracy_interval(5, 5)
    # at 0 or n right the Wilson interval ends at n / (n + z^2) with z = 1.96
    assert (low, high) == pytest.approx((5 / (5 + 1.959964**2), 1), abs=1e-6)
    with pytest.raises(ValueError, match="not a share"):
        accuracy_interval(0, 0)
    with pytest.raises(ValueError, match="not a share"):
        accuracy_interval(6, 5)


def test_t_interval_of_the_mean():
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2 degrees) = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert mean_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), abs=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1])


# --------------------------------------------------------------------------------------- pass@k and best of n


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # one of the six pairs holds no right sample
    assert pass_at_k(4, 0, 4) == 0
    assert pass_at_k(4, 1, 4) == 1
    with pytest.raises(ValueError, match="1 <= k <= n"):
        pass_at_k(4, 2, 5)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
@settings(deadline=None)
def test_pass_at_k_starts_at_the_mean_and_grows_with_k(case):
    n, c = case
    curve = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert curve[0] == pytest.approx(c / n)
    assert curve == sorted(curve)
    assert curve[-1] == (c > 0)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["a", "b", "b"], "b"),
        (["b", "a", "a", "b"], "b"),  # a tie: first seen
        ([None, None, "a"], "a"),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_vote(answers, winner):
    assert majority_vote(answers) == winner


def test_best_of_n_by_hand():
    scores, correct = [3.0, 2.0, 1.0], [False, True, False]
    assert best_of_n(scores, correct) == 0  # the best is wrong
    assert best_of_n(scores, correct, 2) == pytest.approx(1 / 3)  # the right one wins one pair of three
    assert best_of_n(scores, correct, 1) == pytest.approx(1 / 3)
    assert best_of_n([2.0, 2.0, 1.0], [True, False, False]) == 0.5  # a tie at the top is averaged
    assert best_of_n([0.0, 1.0], [0.25, 0.75]) == 0.75


@pytest.mark.parametrize(
    ("scores", "correct", "n"),
    [
        ([1.0], [True], 2),
        ([1.0], [True], 0),
        ([1.0], [True, False], 1),
        ([math.nan], [True], 1),
        ([], [], None),
    ],
)
def test_best_of_n_refuses_what_is_undefined(scores, correct, n):
    with pytest.raises(ValueError, match="undefined"):
        best_of_n(scores, correct, n)


SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7)


@given(SAMPLES)
@settings(deadline=None)
def test_best_of_n_is_the_average_over_all_subsets(samples):
    scores, correct = zip(*samples, strict=True)

    def top(subset):
        tied = [right for score, right in subset if score == max(s for s, _ in subset)]
        return sum(tied) / len(tied)

    for n in range(1, len(samples) + 1):
        subsets = list(combinations(samples, n))
        assert best_of_n(scores, correct, n) == pytest.approx(sum(map(top, subsets)) / len(subsets))


@given(SAMPLES)
@settings(deadline=None)
def test_constant_scores_give_the_mean_and_oracle_scores_give_pass_at_n(samples):
    correct = [right for _, right in samples]
    total, right = len(correct), sum(correct)
    for n in range(1, total + 1):
        assert best_of_n([0.5] * total, correct, n) == pytest.approx(right / total)
        assert best_of_n([float(c) for c in correct], correct, n) == pytest.approx(pass_at_k(total, right, n))


def test_best_of_n_curve_averages_questions_at_powers_of_two():
    scores = [[4, 3, 2, 1], [1, 2, 3, 4, 5]]
    correct = [[True, False, False, False], [True, True, True, True, False]]
    curve = best_of_n_curve(scores, correct)
    assert list(curve) == [1, 2, 4]
    assert curve[1] == pytest.approx((1 / 4 + 4 / 5) / 2)
    assert curve[2] == pytest.approx((1 / 2 + 6 / 10) / 2)  # pairs with the first; pairs without the last
    assert curve[4] == pytest.approx((1 + 1 / 5) / 2)


# ------------------------------------------------------------------------------------------- comparing models


def test_paired_test_on_right_and_wrong():
    a, b = [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]
    result = paired_test(a, b)
    assert result["mean_difference"] == pytest.approx(4 / 6)
    assert result["p_exact"] == pytest.approx(2 / 2**4)  # four of four differing questions on one side
    # differences 1,1,1,1,0,0: variance 4/15, t = (2/3) / sqrt(4/15/6) = sqrt(10), 5 degrees: p = 0.02503
    assert result["p_value"] == pytest.approx(0.02503, abs=1e-5)
    half = 2.570582 * math.sqrt(4 / 15 / 6)
    assert (result["low"], result["high"]) == pytest.approx((4 / 6 - half, 4 / 6 + half), abs=1e-6)


def test_paired_test_on_means_has_no_exact_test():
    assert paired_test([0.5, 1, 0.25], [0, 0.5, 0.5])["p_exact"] is None


def test_a_model_against_itself_shows_no_difference():
    same = paired_test([1, 0, 1], [1, 0, 1])
    assert (same["mean_difference"], same["p_value"], same["p_exact"]) == (0, 1, 1)


def test_paired_test_needs_the_same_questions():
    with pytest.raises(ValueError, match="same questions"):
        paired_test([1, 0], [1])


# ----------------------------------------------------------------------------------------- the evaluation run

PROBLEMS = [
    Problem("p/0", "chain_arithmetic", "1 + 1?", "2", "number"),
    Problem("p/1", "chain_arithmetic", "2 + 3?", "5", "number"),
]
WRITTEN = {
    "p/0": ("The answer is 2.", ["The answer is 3.", "The answer is 2.0.", "The answer is 2."]),
    "p/1": ("The answer is 4.", ["The answer is 4.", "The answer is 4.", "no idea"]),
}


PARAMS = SamplingParams(temperature=0.7, max_new_tokens=9, seed=5)


class Writer:
    """An engine that writes WRITTEN; `calls` are what it was asked."""

    tokenizer = tokenizer()

    def __init__(self):
        self.calls = []

    def sample_ids(self, prompt_ids, n, params, *, keys, progress):
        prompts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
        self.calls.append({"prompts": prompts, "n": n, "keys": keys, "progress": progress, **asdict(params)})
        written = [[WRITTEN[key][0]] if params.temperature == 0 else WRITTEN[key][1] for key in keys]
        return [[written_sample(text) for text in texts] for texts in written]


@pytest.fixture
def engine():
    return Writer()


def test_evaluate_asks_the_question_alone_greedily_and_k_times(engine):
    rows = evaluate(engine, PROBLEMS, 3, PARAMS)
    assert [(c["n"], c["temperature"]) for c in engine.calls] == [(1, 0), (3, 0.7)]
    for call in engine.calls:
        assert call["prompts"] == ["Q: 1 + 1?\nA:", "Q: 2 + 3?\nA:"]
        assert (call["keys"], call["seed"], call["max_new_tokens"]) == (["p/0", "p/1"], 5, 9)
    assert rows[1] == {
        "id": "p/1",
        "dataset": "chain_arithmetic",
        "gold": "5",
        "greedy_text": "The answer is 4.",
        "greedy_answer": "4",
        "greedy_correct": False,
        "greedy_invalid": False,
        "sampled_texts": WRITTEN["p/1"][1],
        "sampled_ids": [list(written_sample(text).token_ids[:-1]) for text in WRITTEN["p/1"][1]],
        "sampled_answers": ["4", "4", None],
        "sampled_correct": [False, False, False],
        "sampled_invalid": 1,
    }


def test_exemplars_come_first_where_asked_for(engine):
    coin = Problem("p/0", "coin_flip", "Heads up?", "yes", "yes_no")
    evaluate(engine, [coin], 0, PARAMS, shots="smlib")
    (call,) = engine.calls
    assert call["prompts"] == [few_shot("coin_flip") + "Q: Heads up?\nA:"] and call["stop"] == ("\nQ: ",)


def test_text_after_the_answer_does_not_count(engine, monkeypatch):
    monkeypatch.setitem(WRITTEN, "p/0", ("The answer is 2.\n\nQ: 3 + 3?\nA: The answer is 6.", []))
    (row,) = evaluate(engine, PROBLEMS[:1], 0, PARAMS)
    assert row["greedy_correct"] and row["greedy_text"] == "The answer is 2."


def test_summary_by_hand(engine):
    summary = summarise(evaluate(engine, PROBLEMS, 3, PARAMS))
    assert summary["k"] == 3
    assert summary["greedy"]["value"] == 0.5
    assert (summary["greedy"]["low"], summary["greedy"]["high"]) == accuracy_interval(1, 2)
    assert summary["avg_at_k"]["value"] == pytest.approx(1 / 3)  # (2/3 + 0) / 2
    assert (summary["avg_at_k"]["low"], summary["avg_at_k"]["high"]) == mean_interval([2 / 3, 0])
    assert summary["pass_at_k"]["value"] == 0.5
    assert summary["majority_at_k"]["value"] == 0.5  # "2.0" and "2" are one vote
    assert summary["sampled_invalid"] == pytest.approx(1 / 6)
    assert summary["greedy_invalid"] == 0
    assert {summary[name]["n"] for name in ("greedy", "avg_at_k", "pass_at_k", "majority_at_k")} == {2}


def test_greedy_only(engine):
    rows = evaluate(engine, PROBLEMS, 0, PARAMS)
    assert len(engine.calls) == 1
    assert set(summarise(rows)) == {"k", "greedy", "greedy_invalid"}


def test_summarise_refuses_rows_of_different_runs(engine):
    rows = evaluate(engine, PROBLEMS, 3, PARAMS) + evaluate(engine, PROBLEMS, 0, PARAMS)
    with pytest.raises(ValueError, match=r"\[0, 3\] samples"):
        summarise(rows)


def test_a_question_with_only_invalid_answers_is_lost_by_the_vote(monkeypatch, engine):
    monkeypatch.setitem(WRITTEN, "p/0", ("?", ["?", "?", "?"]))
    summary = summarise(evaluate(engine, PROBLEMS, 3, PARAMS))
    assert (summary["majority_at_k"]["value"], summary["greedy_invalid"]) == (0, 0.5)
