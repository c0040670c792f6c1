"""The stages of Self-Explore on a dozen questions: what each leaves, that a stopped one goes on, what is refused."""

import os
from dataclasses import asdict

import pytest
import torch

from smlib import dpo, explore_pipeline, models, pipeline, prompts, sft
from smlib.artifacts import StageError, StageMismatch, require
from smlib.problems import generate
from smlib.settings import preset

SMALL = {
    "sampling": {"questions": 12, "samples": 4, "conditioned_questions": 1, "conditioned_samples": 1},
    "evaluation": {"questions": 4, "published": 0, "samples": 2},
    "explore": {"k": 3, "temperature": 1.0},
}
NAMES = ("06_solutions", "06_selection", "06_rft", "06_exploration", "06_step_dpo", "06_outcome_dpo", "06_evaluation")


def small(**overrides):
    return preset("smoke", "chain_arithmetic", **(SMALL | overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.sample_rationales(run, small(), progress=False)
    pipeline.rank_rationales(run, small())
    pipeline.train_sft(run, small(), progress=False)
    explore_pipeline.run(run, small(), progress=False)
    return run


def test_every_stage_leaves_its_folder_and_no_shards(finished):
    assert {path.name for path in finished.iterdir() if path.name.startswith("06")} == set(NAMES)
    for name in NAMES:
        assert require(finished, name).manifest["settings"]["seed"] == 0
        assert not (finished / name / pipeline.SHARDS).exists()


def test_solutions_are_of_the_training_questions_and_rft_of_the_right_ones(finished):
    rows = require(finished, "06_solutions").read_rows("solutions")
    assert len(rows) == 12 * small().explore.samples
    assert {row["id"] for row in rows} == {problem.id for problem in pipeline.training_problems(small())}
    kept = require(finished, "06_selection").read_rows("rft")
    assert kept and all(row["correct"] for row in kept)


def test_exploration_follows_its_settings(finished):
    """Faults: k hard-coded, and the number of samples tied to T = 0.7; here k = 3 at T = 1."""
    stage, pairs = require(finished, "06_exploration"), require(finished, "06_selection").read_rows("pairs")
    explored = stage.read_rows("explored")
    assert [row["id"] for row in explored] == [pair["id"] for pair in pairs]
    assert any(row["pit"] for row in explored)
    for row in explored:
        assert len(row["right"]) == (row["pit"] or row["steps"])
        if row["pit"]:
            assert row["drawn"][row["pit"] - 1] == 3 and row["right"][row["pit"] - 1] == 0
        assert max(row["drawn"]) <= 3
    fate = stage.read_json("fate.json")
    assert sum(fate.values()) == len(pairs)
    assert len(stage.read_rows("pairs")) == sum(n for why, n in fate.items() if why.startswith("kept"))


def test_training_reads_the_prompt_that_evaluation_asks(finished):
    tokenizer = models.load_tokenizer()
    asked = {
        one.id: models.encode_prompt(tokenizer, prompts.open_prompt(one)) for one in pipeline.training_problems(small())
    }
    for name in ("06_selection", "06_exploration"):
        for pair in require(finished, name).read_rows("pairs"):
            head = asked[pair["id"]]
            assert pair["prompt_ids"][: len(head)] == head
            assert models.decode(tokenizer, pair["prompt_ids"][len(head) :]) == pair.get("prefix", "")
            assert pair["chosen_ids"][-1] == tokenizer.eos_token_id
            assert (pair["rejected_ids"][-1] == tokenizer.eos_token_id) == (name == "06_selection")


def test_rft_begins_at_the_base_and_dpo_at_rft(finished):
    """Made again by hand, from where the paper begins, they are the same to the bit."""
    settings, tokenizer, selected = small(), models.load_tokenizer(), require(finished, "06_selection")
    learning = {"epochs": settings.sft.epochs, "learning_rate": settings.sft.learning_rate, "batch": settings.sft.batch}
    problems, model = pipeline.training_problems(settings), models.load_policy("tiny")
    sft.train_sft(model, tokenizer, problems, selected.read_rows("rft"), seed=0, progress=None, **learning)
    assert_equal(model, finished / "06_rft" / "model")
    for name, source in (("06_outcome_dpo", selected), ("06_step_dpo", require(finished, "06_exploration"))):
        model = models.load_policy(finished / "06_rft" / "model")
        dpo.train_dpo(model, tokenizer, source.read_rows("pairs"), seed=0, progress=None, **asdict(settings.dpo))
        assert_equal(model, finished / name / "model")


def assert_equal(model, path):
    for name, weight in models.load_policy(path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_evaluation_asks_every_method_the_questions_of_notebook_05(finished):
    rows = require(finished, "06_evaluation").read_rows("answers")
    asked = [problem.id for problem in pipeline.test_problems(small())["chain_arithmetic"]]
    for method in explore_pipeline.METHODS:
        assert [row["id"] for row in rows if row["method"] == method] == asked
    trained = {problem.id for problem in pipeline.training_problems(small())}
    assert not trained & set(asked)


def test_a_question_that_was_trained_on_is_no_test_question():
    """Fault: evaluation on training rows."""
    some = generate("chain_arithmetic", 4, seed=0)
    explore_pipeline.refuse_training_questions({"a set": some[:2]}, some[2:])
    with pytest.raises(ValueError, match=f"1 questions of test set a set were trained on, such as {some[1].id}"):
        explore_pipeline.refuse_training_questions({"a set": some[:2]}, some[1:])


def branch(finished, folder, names):
    folder.mkdir()
    for name in names:
        os.symlink(finished / name, folder / name, target_is_directory=True)
    return folder


def test_a_stopped_exploration_goes_on_from_its_shards(finished, tmp_path, monkeypatch):
    """Ctrl-C in the second shard: the first is not explored again, and the rows are those of a calm run."""
    run = branch(finished, tmp_path / "run", ["06_selection", "06_rft"])
    real, parts = explore_pipeline._explore_shard, []

    def explore_shard(tokenizer, draw, problems, outcome, *rest):
        parts.append(outcome)
        if len(parts) == 2:
            raise KeyboardInterrupt
        return real(tokenizer, draw, problems, outcome, *rest)

    monkeypatch.setattr(explore_pipeline, "_explore_shard", explore_shard)
    monkeypatch.setattr(explore_pipeline, "SHARD", 3)
    with pytest.raises(KeyboardInterrupt):
        explore_pipeline.find_pits(run, small(), progress=False)
    stage = explore_pipeline.find_pits(run, small(), progress=False)
    calm = require(finished, "06_exploration")
    assert parts[1] == parts[2] and len(parts) == 1 + -(-len(calm.read_rows("explored")) // 3)
    # a shard does not know what another drew for the same prefix, so only the pits are compared
    assert [row["pit"] for row in stage.read_rows("explored")] == [row["pit"] for row in calm.read_rows("explored")]
    assert [pair["rejected"] for pair in stage.read_rows("pairs")] == [
        pair["rejected"] for pair in calm.read_rows("pairs")
    ]


def test_a_finished_stage_is_loaded_and_other_settings_are_refused(finished):
    before = (finished / "06_exploration" / "manifest.json").read_bytes()
    explore_pipeline.find_pits(finished, small(), progress=False)
    assert (finished / "06_exploration" / "manifest.json").read_bytes() == before
    with pytest.raises(StageMismatch, match=r"explore\.k = 3, and now explore\.k = 5"):
        explore_pipeline.find_pits(finished, small(explore={"k": 5, "temperature": 1.0}), progress=False)
    # what only a later stage depends on leaves the earlier ones as they are
    explore_pipeline.draw_solutions(finished, small(explore={"k": 5, "temperature": 1.0}), progress=False)


def test_a_missing_stage_names_the_notebook_to_run_first(tmp_path):
    with pytest.raises(StageError, match="first run notebook 02"):
        explore_pipeline.draw_solutions(tmp_path, small())


def test_the_earlier_stages_do_not_depend_on_the_settings_of_these(finished):
    """Runs made before Self-Explore was there stay valid."""
    other = small(explore={"samples": 99, "choice": "random"}, dpo={"beta": 0.5})
    for stage in (pipeline.sample_rationales, pipeline.train_sft):
        assert stage(finished, other, progress=False).done


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"k": 0}, "explore.k is 0, but must be at least 1"),
        ({"samples": 0}, "explore.samples is 0"),
        ({"choice": "longest"}, "explore.choice 'longest' is unknown; choose one of: shortest, random, most_likely"),
    ],
)
def test_settings_that_mean_nothing_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", explore=group)
