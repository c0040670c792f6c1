"""The stages of Self-Explore on a dozen questions: what each leaves, that a stopped one goes on, what is refused."""

import json
import os
import re
from dataclasses import asdict, replace

import pytest
import torch
import variants

from smlib.cli import main
from smlib.files.artifacts import Stage, StageError, StageMismatch, require
from smlib.judging.answers import grade
from smlib.learning import dpo, exploration, selection, sft
from smlib.learning.rows import Pair, Rationale
from smlib.problems import prompts
from smlib.problems.datasets import TASKS, generate
from smlib.problems.steps import first_wrong_step
from smlib.reports import pits, results
from smlib.runs import questions, self_explore, self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models

SMALL = {
    "sampling": {"questions": 12, "samples": 4, "conditioned_questions": 1, "conditioned_samples": 1},
    "evaluation": {"questions": 4, "published": 0, "samples": 2},
    "explore": {"k": 3, "temperature": 1.0},
}
NAMES = (
    "06_solutions", "06_selection", "06_rft", "06_exploration", "06_pit_report", "06_step_dpo", "06_outcome_dpo",
    "06_evaluation",
)  # fmt: skip


def small(**overrides):
    return preset("smoke", "chain_arithmetic", **(SMALL | overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    self_explore.run(run, small(), progress=False)
    return run


def test_every_stage_leaves_its_folder_and_no_shards(finished):
    assert {path.name for path in finished.iterdir() if path.name.startswith("06")} == set(NAMES)
    for name in NAMES:
        assert require(finished, name).manifest["settings"]["seed"] == 0
        assert not (finished / name / shared.SHARDS).exists()


def test_solutions_are_of_the_training_questions_and_rft_of_the_right_ones(finished):
    rows = require(finished, "06_solutions").read_rows("solutions")
    assert len(rows) == 12 * small().explore.samples
    assert {row["id"] for row in rows} == {problem.id for problem in questions.training_problems(small())}
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
    fate, cost = stage.read_json("fate.json"), stage.read_json("cost.json")
    assert sum(fate.values()) == len(pairs)
    assert 0 < cost["completions"] < cost["completions without early exit"] <= 3 * sum(row["steps"] for row in explored)
    assert cost["completions"] <= sum(sum(row["drawn"]) for row in explored)  # shared prefixes are drawn for once
    assert cost["tokens"] >= cost["completions"]
    assert len(stage.read_rows("pairs")) == sum(n for why, n in fate.items() if why.startswith("kept"))


def test_rationales_without_steps_are_refused(finished, monkeypatch):
    """Fault: notebook 06 ended in an IndexError on translations, which have an answer alone."""
    run = variants.branch(finished, "no-steps", ("01_sampling", "06_selection", "06_rft"))
    split = exploration.split
    monkeypatch.setattr(exploration, "split", lambda *given: replace(split(*given), ends=()))
    with pytest.raises(ValueError, match=r"of chain_arithmetic have no steps, .* end with notebook 05"):
        self_explore.find_pits(run, small(), progress=False)
    assert not (run / "06_exploration" / "manifest.json").exists()


def test_training_reads_the_prompt_that_evaluation_asks(finished):
    tokenizer = models.load_tokenizer()
    asked = {
        one.id: encoding.encode_prompt(tokenizer, prompts.open_prompt(one))
        for one in questions.training_problems(small())
    }
    for name in ("06_selection", "06_exploration"):
        for pair in require(finished, name).read_rows("pairs"):
            head = asked[pair["id"]]
            assert pair["prompt_ids"][: len(head)] == head
            assert encoding.decode(tokenizer, pair["prompt_ids"][len(head) :]) == pair.get("prefix", "")
            assert pair["chosen_ids"][-1] == tokenizer.eos_token_id
            assert (pair["rejected_ids"][-1] == tokenizer.eos_token_id) == (name == "06_selection")


def test_rft_begins_at_the_base_and_dpo_at_rft(finished):
    """Made again by hand, from where the paper begins, they are the same to the bit."""
    settings, tokenizer, selected = small(), models.load_tokenizer(), require(finished, "06_selection")
    learning = {"epochs": settings.sft.epochs, "learning_rate": settings.sft.learning_rate, "batch": settings.sft.batch}
    problems, model = questions.training_problems(settings), models.load_policy("tiny")
    sft.train_sft(model, tokenizer, problems, selected.read_rows("rft", Rationale), seed=0, progress=None, **learning)
    assert_equal(model, finished / "06_rft" / "model")
    learning = asdict(settings.dpo)
    step_rate = learning.pop("step_learning_rate")
    sources = {
        "06_outcome_dpo": (selected, learning["learning_rate"]),
        "06_step_dpo": (require(finished, "06_exploration"), step_rate),
    }
    for name, (source, rate) in sources.items():
        model = models.load_policy(finished / "06_rft" / "model")
        how = learning | {"learning_rate": rate}
        dpo.train_dpo(model, tokenizer, source.read_rows("pairs", Pair), seed=0, progress=None, **how)
        assert_equal(model, finished / name / "model")


def assert_equal(model, path):
    for name, weight in models.load_policy(path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_evaluation_asks_every_method_the_questions_of_notebook_05(finished):
    rows = require(finished, "06_evaluation").read_rows("answers")
    asked = [problem.id for problem in questions.test_problems(small())["chain_arithmetic"]]
    for method in results.EXPLORE_METHODS:
        assert [row["id"] for row in rows if row["method"] == method] == asked
    trained = {problem.id for problem in questions.training_problems(small())}
    assert not trained & set(asked)


def test_a_question_that_was_trained_on_is_no_test_question():
    """Fault: evaluation on training rows."""
    some = generate("chain_arithmetic", 4, seed=0)
    self_explore.refuse_training_questions({"a set": some[:2]}, some[2:])
    with pytest.raises(ValueError, match=f"1 questions of test set a set were trained on, such as {some[1].id}"):
        self_explore.refuse_training_questions({"a set": some[:2]}, some[1:])
    with pytest.raises(ValueError, match="1 questions of test set a set were trained on"):
        loud = replace(some[1], question=some[1].question.upper().replace(",", " "))
        self_explore.refuse_training_questions({"a set": some[:2]}, [loud, *some[2:]])


def branch(finished, folder, names):
    folder.mkdir()
    for name in names:
        os.symlink(finished / name, folder / name, target_is_directory=True)
    return folder


def test_a_stopped_exploration_goes_on_from_its_shards(finished, tmp_path, monkeypatch):
    """Ctrl-C in the second shard: the first is not explored again, and the rows are those of a calm run."""
    run = branch(finished, tmp_path / "run", ["01_sampling", "06_selection", "06_rft"])
    real, parts = self_explore._explore_shard, []

    def explore_shard(tokenizer, draw, problems, outcome, *rest):
        parts.append(outcome)
        if len(parts) == 2:
            raise KeyboardInterrupt
        return real(tokenizer, draw, problems, outcome, *rest)

    monkeypatch.setattr(self_explore, "_explore_shard", explore_shard)
    monkeypatch.setattr(self_explore, "SHARD", 3)
    with pytest.raises(KeyboardInterrupt):
        self_explore.find_pits(run, small(), progress=False)
    stage = self_explore.find_pits(run, small(), progress=False)
    calm = require(finished, "06_exploration")
    assert parts[1] == parts[2] and len(parts) == 1 + -(-len(calm.read_rows("explored")) // 3)
    # a shard does not know what another drew for the same prefix, so only the pits are compared
    assert [row["pit"] for row in stage.read_rows("explored")] == [row["pit"] for row in calm.read_rows("explored")]
    assert [pair["rejected"] for pair in stage.read_rows("pairs")] == [
        pair["rejected"] for pair in calm.read_rows("pairs")
    ]


def test_a_finished_stage_is_loaded_and_other_settings_are_refused(finished):
    before = (finished / "06_exploration" / "manifest.json").read_bytes()
    self_explore.find_pits(finished, small(), progress=False)
    assert (finished / "06_exploration" / "manifest.json").read_bytes() == before
    with pytest.raises(StageMismatch, match=r"explore\.k = 3, and now explore\.k = 5"):
        self_explore.find_pits(finished, small(explore={"k": 5, "temperature": 1.0}), progress=False)
    # what only a later stage depends on leaves the earlier ones as they are
    self_explore.draw_solutions(finished, small(explore={"k": 5, "temperature": 1.0}), progress=False)


def test_a_missing_stage_names_the_notebook_to_run_first(tmp_path):
    with pytest.raises(StageError, match="first run notebook 01"):
        self_explore.draw_solutions(tmp_path, small())


def test_the_earlier_stages_do_not_depend_on_the_settings_of_these(finished):
    """Runs made before Self-Explore was there stay valid."""
    other = small(explore={"samples": 99, "choice": "random"}, dpo={"beta": 0.5})
    for stage in (self_motivated.sample_rationales, self_motivated.train_sft):
        assert stage(finished, other, progress=False).done


def test_the_pit_report_is_of_wrong_rationales_of_every_dataset(finished):
    rows = require(finished, "06_pit_report").read_rows("report")
    assert [(row["dataset"], row["k"]) for row in rows] == [("chain_arithmetic", k) for k in self_explore.KS]
    for row in rows:
        assert 0 < row["rationales"] <= len(require(finished, "06_selection").read_rows("pairs"))
        assert row["exact"] + row["early"] + row["late"] + row["none"] == pytest.approx(1)


def test_a_pit_report_takes_an_even_choice(finished, tmp_path, monkeypatch):
    run = branch(finished, tmp_path / "run", ["01_sampling", "06_selection", "06_rft"])
    monkeypatch.setattr(self_explore, "KS", (1,))
    [row] = self_explore.report_pits(run, small(explore={"reported": 2}), progress=False).read_rows("report")
    assert row["rationales"] == 2


def test_with_lora_rft_and_dpo_are_merged_and_start_where_they_should(finished, tmp_path):
    """RFT moves away from the base, each DPO from RFT, by low-rank changes of the same layers; all are whole models."""
    run, settings = branch(finished, tmp_path / "run", ["01_sampling", "06_selection"]), small(lora={"rank": 2})
    rft = self_explore.train_rft(run, settings, progress=False)
    self_explore.find_pits(run, settings, progress=False)
    before = {"06_rft": models.load_policy("tiny")}
    for train in (self_explore.train_step_dpo, self_explore.train_outcome_dpo):
        stage = train(run, settings, progress=False)
        assert stage.read_rows("log")[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference are one
        before[stage.name] = models.load_policy(rft.path("model"))
    for name, source in before.items():
        assert not (run / name / "model" / "adapter_config.json").exists()
        trained = models.load_policy(run / name / "model").state_dict()
        for layer, weight in source.state_dict().items():
            if layer.endswith("_proj.weight"):
                assert 1 <= torch.linalg.matrix_rank(trained[layer] - weight, atol=1e-4) <= 2
            else:
                assert torch.equal(trained[layer], weight)


def test_without_a_right_beside_a_wrong_solution_there_is_nothing_to_explore(finished, tmp_path, monkeypatch):
    run = branch(finished, tmp_path / "run", ["01_sampling", "06_solutions"])
    monkeypatch.setattr(selection, "outcome_pairs", lambda *_: [])
    with pytest.raises(ValueError, match=r"no question has a right and a wrong solution.* raise explore\.samples"):
        self_explore.select(run, small())


def test_the_fate_adds_up():
    counts = {"kept: pit at step 10": 1, "kept: pit at step 2": 1200, "dropped: no pit": 3, "dropped: duplicate": 4}
    lines = pits.fate(counts).splitlines()[2:]
    assert [line.strip("| ") for line in lines] == [
        "all, one of every outcome pair | 1,208", "step-level pairs | 1,201", "- pit at step 2 | 1,200",
        "- pit at step 10 | 1", "no pit | 3", "duplicates of a pair | 4", "no steps | 0",
    ]  # fmt: skip


def test_accuracies_stand_beside_those_of_stage_05_if_it_asked_the_same(finished, tmp_path):
    ours = require(finished, "06_evaluation")
    alone = pits.accuracies(finished)
    rows = [row for row in ours.read_rows("answers") if row["method"] == "rft"]
    for name, settings in (("same", ours.settings), ("other", ours.settings | {"seed": 7})):
        run = branch(finished, tmp_path / name, ["06_evaluation"])
        stage = Stage(run, "05_evaluation", settings)
        with stage.recording():
            stage.write_rows("problems", [])
            stage.write_rows("answers", [row | {"method": method} for method in results.METHODS for row in rows])
    assert pits.accuracies(tmp_path / "other") == (
        f"{alone}\n\n05_evaluation was made with other settings, and is left out."
    )
    both = pits.accuracies(tmp_path / "same")
    assert set(alone.splitlines()) <= set(both.splitlines())
    values = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+ \[.*\]) \|$", both, re.MULTILINE))
    assert values["base"] == values["SFT on r+"] == values["SML (PPO)"] == values["RFT"]


@pytest.mark.slow
def test_the_command_makes_everything_and_prints_it(tmp_path, monkeypatch, capsys):
    """Warnings of luck once a dataset though each explores in several shards; again, it reads what is there."""
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))  # no published sets
    monkeypatch.setattr(self_explore, "SHARD", 5)
    monkeypatch.setattr(self_explore, "KS", (1, 2))
    command, run = ["explore", "--preset", "smoke", "--out", str(tmp_path / "run")], tmp_path / "run"
    command += ["--set", "sampling.questions=8", "--set", "evaluation.questions=4"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert {path.name for path in run.iterdir()} == {"01_sampling", "02_ranking", "02_sft", *NAMES}
    for dataset, share in (("coin_flip", "75%"), ("shuffled_objects", "56%")):
        [line] = [line for line in shown.err.splitlines() if dataset in line]
        assert line.startswith(f"warning: {dataset} has ") and share in line
    assert "Traceback" not in shown.err and ".py" not in shown.err
    report = require(run, "06_pit_report").read_rows("report")
    assert {row["dataset"] for row in report} <= set(TASKS)
    fate = json.loads((run / "06_exploration" / "fate.json").read_text())
    assert f"| all, one of every outcome pair | {sum(fate.values()):,} |" in shown.out
    for label in results.EXPLORE_METHODS.values():
        assert re.search(rf"^\| {re.escape(label)} \| [\d.]+ \[[\d.]+, [\d.]+\]", shown.out, re.MULTILINE)
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == shown.out[shown.out.index("| wrong rationales |") :].strip()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"k": 0}, r"explore\.k = 0 is not allowed: give a whole number from 1"),
        ({"samples": 0}, r"explore\.samples = 0"),
        ({"choice": "longest"}, "explore.choice 'longest' is unknown; choose one of: shortest, random, most_likely"),
    ],
)
def test_settings_that_mean_nothing_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", explore=group)


def test_pairs_made_otherwise_differ_where_they_should(finished, tmp_path):
    tokenizer, known = models.load_tokenizer(), {one.id: one for one in questions.training_problems(small())}
    run = branch(
        finished, tmp_path / "run", ["01_sampling", "06_solutions", "06_selection", "06_rft", "06_exploration"]
    )
    own = require(run, "06_exploration").read_rows("pairs", Pair)
    made = variants.step_pairs(run, small(), progress=False)
    starts = {(pair.prompt_ids, pair.rejected_ids) for pair in own}
    for name in ("random chosen", "most likely chosen"):
        assert {(pair.prompt_ids, pair.rejected_ids) for pair in made[name]} == starts
    for pair in made["all that follows rejected"]:
        ids = pair.rejected_ids
        assert ids[-1] == tokenizer.eos_token_id
        assert any(pair.prompt_ids == head and ids[: len(step)] == step for head, step in starts)
    assert made["first wrong step"]
    for pair in made["first wrong step"]:
        problem = known[pair.id]
        wrong = first_wrong_step(problem, pair.prefix + pair.rejected)
        assert first_wrong_step(problem, pair.prefix) in (None, wrong)  # the prefix is right as far as it goes
        assert wrong == len((pair.prefix + pair.rejected).strip().splitlines()) - 1
        assert grade(problem, pair.prefix + pair.chosen).correct
    stage = variants.step_policy(run, small(), "first wrong step", made["first wrong step"][:8], 1e-4, progress=False)
    assert stage.folder == run / "ablations" / "pairs-first-wrong-step" / "06_step_dpo"
    assert stage.read_rows("log") and (stage.path("model") / "model.safetensors").exists()
