"""Variants of a run: they share its stages, leave it as it was, and give rows with intervals."""

from dataclasses import replace

import pytest
import variants

from smlib.files.artifacts import Stage, StageError, require
from smlib.runs import questions, self_motivated
from smlib.runs.settings import preset
from smlib.runs.shared import answer_fresh

SMALL = preset(
    "smoke",
    "coin_flip",
    sampling={"questions": 16, "samples": 4, "conditioned_questions": 8, "conditioned_samples": 1},
    reward={"questions": 16, "epochs": 1.0},
    ppo={"updates": 1, "episodes": 16, "minibatch": 8, "warmup_updates": 1, "max_new_tokens": 48},
)


def test_a_branch_reads_the_stages_of_its_run(tmp_path):
    stage = Stage(tmp_path, "01_sampling", {"seed": 0})
    with stage.recording():
        stage.write_rows("problems", [{"id": "a"}])
    folder = variants.branch(tmp_path, "variant", ["01_sampling"])
    assert folder == variants.branch(tmp_path, "variant", ["01_sampling"])
    assert require(folder, "01_sampling").read_rows("problems") == [{"id": "a"}]
    assert require(folder, "01_sampling").fingerprint == stage.fingerprint


def test_a_branch_of_an_unfinished_run_names_the_notebook_to_run(tmp_path):
    with pytest.raises(StageError, match="notebook 01"):
        variants.branch(tmp_path, "variant", ["01_sampling"])


def test_fresh_questions_are_in_no_stage_of_the_run_and_grow_by_the_end():
    used = {p.id for p in questions.training_problems(SMALL) + questions.second_problems(SMALL)}
    used |= {p.id for p in questions.ppo_problems(SMALL)(0)}
    used |= {p.id for problems in questions.test_problems(SMALL).values() for p in problems}
    fresh = questions.fresh_problems(SMALL, 30)
    assert len({p.id for p in fresh}) == 30 and not used & {p.id for p in fresh}
    assert questions.fresh_problems(SMALL, 10) == fresh[:10]
    assert all("/train/" in p.id for p in fresh)


@pytest.mark.slow
def test_variants_are_measured_and_the_run_stays_as_it_was(tmp_path):
    self_motivated.run(tmp_path, SMALL, progress=False)
    before = {path.name: require(tmp_path, path.name).fingerprint for path in tmp_path.iterdir()}
    answered = answer_fresh(SMALL, require(tmp_path, "02_sft").path("model"), 6, k=4)
    rows = variants.reward_rows(tmp_path, SMALL, "base", "open", answered, progress=False)
    stage = variants.policy(
        tmp_path, replace(SMALL, ppo=replace(SMALL.ppo, reward="checker")), "grpo", "grpo", progress=False
    )
    rows += variants.policy_rows(stage, SMALL, "GRPO", answered)
    (curve,) = variants.curve_rows(stage, SMALL, "GRPO")
    assert tuple(curve) == variants.CURVE_COLUMNS and curve["tokens"] == round(16 * curve["length"])
    assert all(tuple(row) == variants.COLUMNS for row in rows)
    assert all(row["low"] <= row["score"] <= row["high"] and row["n"] > 0 for row in rows)
    best, mean = ([row for row in rows if row["metric"] == f"{name} of 4"] for name in ("best", "mean"))
    assert len(best) == len(mean) == 1 and best[0]["n"] == 6
    assert {row["value"] for row in rows} == {"pairs base, wrong open", "GRPO"}
    after = {name: require(tmp_path, name).fingerprint for name in before}
    assert after == before
    made = require(tmp_path / "ablations" / "reward-base-open", "03_reward_model")
    assert made.settings["reward"]["pairs"] == "base"
