"""benchmarks/real_texts.py: questions of our own, what is told of the answers, and the sheet."""

import json
import os

import pytest
import real_texts

from smlib.errors import UsageError
from smlib.problems.datasets import Problem, load

ASKED = [Problem(f"own/{number}", "own", f"How many are {number}?", str(number), "number") for number in range(20)]


def answers(right):
    """Of one model: the first `right` samples of every question state its answer."""
    return [
        {
            "greedy_text": f" So {one.answer}.\n", "greedy_correct": True, "greedy_score": -1.234,
            "sampled_texts": [f" Sample {k}.\n" for k in range(8)], "scores": [-float(k) for k in range(8)],
            "sampled_correct": [k < right for k in range(8)],
        }
        for one in ASKED
    ]  # fmt: skip


def test_a_row_tells_of_the_greedy_answer_and_counts_the_samples():
    first, *others = real_texts.text_rows(ASKED, {"base": answers(3)})
    assert len(others) == 19
    assert first == {
        "model": "base", "question": "How many are 0?", "gold": "0", "greedy": "So 0.", "greedy_right": True,
        "greedy_score": -1.23, "samples_right": 3, "samples": 8,
    }  # fmt: skip


def test_the_sheet_has_right_samples_alone_of_every_model_as_many():
    rows = real_texts.sheet_rows(ASKED, {name: answers(2) for name in ("base", "SFT", "control", "SML")})
    assert [row["number"] for row in rows] == list(range(1, 61))
    assert {name: sum(row["model"] == name for row in rows) for name in ("base", "SML")} == {"base": 15, "SML": 15}
    assert {row["rationale"] for row in rows} == {"Sample 0.", "Sample 1."}
    assert len({(row["model"], row["question"], row["rationale"]) for row in rows}) == 60
    assert real_texts.sheet_rows(ASKED, {"base": answers(0)}) == []


@pytest.mark.skipif("SML_DATA_DIR" not in os.environ, reason="needs the published data")
def test_no_published_word_problem_is_one_of_ours(tmp_path, monkeypatch):
    assert len(real_texts.own_questions()) == 30
    copied = tmp_path / "questions.jsonl"
    row = {"question": load("addsub", "train")[0].question.upper(), "answer": "1"}
    copied.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(real_texts, "QUESTIONS", copied)
    with pytest.raises(UsageError, match="published word problems are, or nearly are"):
        real_texts.own_questions()
