"""benchmarks/reward_models.py: what is counted of a score, and what is pooled."""

import controls
import pytest
import reward_models
from reward_models import BEST, RANKED, SOUND

from smlib.problems.datasets import generate
from smlib.problems.prompts import answer_sentence
from smlib.problems.steps import worked_solution


def test_wins_are_counted_over_all_pairs_and_a_draw_is_none():
    assert reward_models.wins([3.0, 1.0, 2.0, 1.0], above=[0, 1], below=[2, 3]) == pytest.approx(2 / 4)
    assert reward_models.wins([1.0], above=[0], below=[]) is None


@pytest.fixture
def answered():
    """Two questions: sound, lucky and wrong answers, one of them drawn twice; and right answers alone."""
    first, second = generate("coin_flip", 2, seed=3)
    flipped = {"yes": "no", "no": "yes"}[first.answer]

    def text(problem, answer, lines):
        return " " + "\n".join([*lines, answer_sentence(problem, answer)])

    good, other = worked_solution(first)[0], worked_solution(second)[0]
    texts = [text(first, first.answer, good), text(first, first.answer, good[:-1]), text(first, flipped, good)]
    rows = []
    for problem, sampled in ((first, [*texts, texts[-1]]), (second, [text(second, second.answer, other)] * 4)):
        correct = [problem.answer in one.split(" answer is ")[-1] for one in sampled]
        rows.append({"id": problem.id, "sampled_texts": sampled, "sampled_correct": correct,
                     "sampled_ids": [[place] for place in range(4)]})  # fmt: skip
    return {problem.id: problem for problem in (first, second)}, rows


def test_scores_are_judged_by_question(answered):
    problems, answers = answered
    assert answers[0]["sampled_correct"] == [True, True, False, False]
    scores = iter([1.0, 3.0, 2.0, 2.0] + [0.0] * 4)  # lucky above wrong above sound; a wrong one stands twice
    found = reward_models.judged(lambda asked, ids: [next(scores) for _ in asked], problems, answers)
    first, second = problems
    assert found == {RANKED: {first: 0.5}, SOUND: {first: 0.0}, BEST: {first: 1.0, second: 1.0}}


def test_gains_are_paired_and_seeds_pooled():
    tasks, rows = {"a": "coin_flip", "b": "coin_flip"}, []
    for seed, gain in ((0, 0.1), (1, 0.3)):
        before = {RANKED: {"a": 0.2, "b": 0.6}}
        after = {RANKED: {name: value + gain for name, value in before[RANKED].items()}}
        rows += reward_models.rows_of(seed, {("untrained", 0, "SFT"): before, ("reward model", 0, "SFT"): after}, tasks)
    gains = [row for row in rows if row["reward"] == "reward model minus untrained" and row["task"] == "coin_flip"]
    assert [row["value"] for row in gains] == pytest.approx([0.1, 0.3])
    assert gains[0]["low"] == pytest.approx(gains[0]["high"]) == pytest.approx(0.1)  # the same for every question
    pooled = [
        row
        for row in controls.over_seeds(rows, reward_models.COLUMNS)
        if row["reward"] == "reward model minus untrained"
    ]
    assert {row["seed"] for row in pooled} == {"all"} and {row["value"] for row in pooled} == {0.2}
