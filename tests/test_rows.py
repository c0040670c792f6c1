"""Rationales and pairs in files: what is left out, what is null, and what is refused."""

import json

import pytest

import smlib
from smlib.files.artifacts import Stage
from smlib.files.atomic import DamagedError, load_jsonl
from smlib.learning.rows import Pair, Rationale

SOLUTION = {"id": "q", "dataset": "coin_flip", "index": 0, "text": " A.", "token_ids": [5, 6]}
SOLUTION |= {"answer": None, "correct": False}
OPEN = {"id": "q", "dataset": "coin_flip", "author": "base", "source": "open", "given": None, "index": 0}
OPEN |= {"text": " A.", "token_ids": [5, 6], "answer": None, "correct": False, "reason": "states no answer"}
ANSWERED = OPEN | {"reanswer": None, "reanswer_correct": False}
OUTCOME = {"id": "q", "dataset": "coin_flip", "chosen": " A.", "rejected": " B.", "prompt_ids": [4]}
OUTCOME |= {"chosen_ids": [5, 2], "rejected_ids": [6, 2]}
RANKED = {"id": "q", "dataset": "coin_flip", "author": "sft", "source": "open", "chosen": " A.", "rejected": " B."}
RANKED |= {"held_out": True, "chosen_ids": [5], "rejected_ids": [6]}
STEP = {"id": "q", "dataset": "coin_flip", "step": 1, "steps": 3, "prefix": "", "chosen": " A.", "rejected": " B."}
STEP |= {"prompt_ids": [4], "chosen_ids": [5, 2], "rejected_ids": [6], "lengths": None}
ROWS = [
    (Rationale, SOLUTION),
    (Rationale, SOLUTION | {"answer": "yes", "side": "+"}),
    (Rationale, OPEN),
    (Rationale, OPEN | {"source": "conditioned", "given": "no"}),
    (Rationale, ANSWERED),
    (Rationale, ANSWERED | {"reanswer": "yes", "reanswer_correct": True, "side": "-"}),
    (Pair, OUTCOME),
    (Pair, RANKED),
    (Pair, RANKED | {"held_out": False, "chosen_score": -1.5, "rejected_score": -2.0, "ranked_right": True}),
    (Pair, STEP),
    (Pair, STEP | {"step": 2, "prefix": " C.", "lengths": {"shortest": 2, "random": 4, "most_likely": 3}}),
]


@pytest.mark.parametrize(("shape", "row"), ROWS)
def test_a_file_holds_the_fields_that_a_row_has_in_their_order(shape, row, tmp_path):
    line = json.dumps(row) + "\n"
    (tmp_path / "before.jsonl").write_text(line)
    read = load_jsonl(tmp_path / "before.jsonl", shape)
    assert isinstance(read[0], shape)
    stage = Stage(tmp_path, "01_sampling", {})
    with stage.recording():
        stage.write_rows("rows", read)
    assert (tmp_path / "01_sampling" / "rows.jsonl").read_text() == line
    assert stage.read_rows("rows", shape) == read and stage.read_rows("rows") == [row]


@pytest.mark.parametrize(
    ("shape", "row", "said"),
    [
        (Rationale, OUTCOME, "text: Field required"),
        (Pair, OPEN, "chosen: Field required"),
        (Pair, RANKED | {"score": 1.0}, "score: Unexpected keyword argument"),
        (Rationale, OPEN | {"correct": "yes"}, "correct: Input should be a valid boolean"),
        (Rationale, OPEN | {"token_ids": [5, 6.5]}, "token_ids.1: Input should be a valid integer"),
        (Rationale, OPEN | {"answer": 7}, "answer: Input should be a valid string"),
        (Pair, [], "Input should be an object"),
    ],
)
def test_a_foreign_or_damaged_row_is_refused_by_the_name_of_its_key(shape, row, said, tmp_path):
    good = SOLUTION if shape is Rationale else OUTCOME
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DamagedError) as raised:
        load_jsonl(tmp_path / "rows.jsonl", shape)
    assert str(raised.value) == f"{tmp_path / 'rows.jsonl'}, line 2 is damaged: {said}"


def test_the_package_names_them():
    assert (smlib.Rationale, smlib.Pair) == (Rationale, Pair)
