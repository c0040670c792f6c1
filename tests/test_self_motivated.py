"""The whole pipeline on a handful of questions: what each stage leaves, that it repeats, and what it refuses."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import real_model
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smlib.cli import main
from smlib.errors import UsageError
from smlib.files.artifacts import StageError, StageMismatch, require
from smlib.learning import rationales, reward_model
from smlib.learning.rows import Pair
from smlib.ppo import loop
from smlib.problems.datasets import TASKS
from smlib.reports import results
from smlib.runs import questions, self_motivated
from smlib.runs.questions import ppo_problems, second_problems, training_problems
from smlib.runs.settings import preset
from smlib.sampling import devices, engines, models, vllm_engine
from smlib.sampling.engines import NativeEngine

SMALL = {
    "sampling": {"questions": 8, "samples": 4, "conditioned_questions": 4, "conditioned_samples": 1},
    "reward": {"questions": 8, "epochs": 1.0},
    "ppo": {"updates": 1, "episodes": 16, "minibatch": 8, "warmup_updates": 1, "max_new_tokens": 48},
    "evaluation": {"questions": 4, "published": 4, "samples": 2},
}


def small(**overrides):
    return preset("smoke", **(SMALL | overrides))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    self_motivated.run(run, small(), progress=False)
    return run


def test_a_precision_that_the_machine_chooses_is_noted_as_the_one_that_it_chose(finished, monkeypatch):
    """So a run goes on where the choice is the same, and is refused where it would round otherwise."""
    chosen = small(ppo=SMALL["ppo"] | {"precision": "auto"})
    monkeypatch.setattr(devices, "_faster_dtype", lambda: "float32")
    assert self_motivated.train_policy(finished, chosen).manifest["settings"]["ppo"]["precision"] == "float32"
    monkeypatch.setattr(devices, "_faster_dtype", lambda: "bfloat16")
    with pytest.raises(StageMismatch, match=r"ppo\.precision"):
        self_motivated.train_policy(finished, chosen)


def test_every_stage_leaves_its_folder_with_a_manifest(finished):
    names = ["01_sampling", "02_ranking", "02_sft", "03_second_sampling", "03_reward_model", "04_ppo", "05_evaluation"]
    for name in names:
        manifest = require(finished, name).manifest
        assert manifest["settings"]["seed"] == 0
        assert manifest["wall_seconds"] >= 0 and manifest["peak_mib"] > 100
    assert sorted(path.name for path in finished.iterdir()) == sorted(names)


def test_what_the_stages_have_left_is_told(finished):
    """benchmarks/real_model.py, part stages."""
    rows = {(row["setting"], row["metric"]): row for row in real_model.left(finished, 0)}
    assert {stage for stage, metric in rows if metric == "seconds"} == set(self_motivated.STAGES)
    written = require(finished, "01_sampling").read_rows("rationales")
    right = [row["correct"] for row in written if row["source"] == "open"]
    row = rows["01_sampling", "open: states the gold answer"]
    assert (row["value"], row["n"]) == (pytest.approx(np.mean(right), abs=1e-5), len(right))
    kept = rows["02_ranking", "kept: r+"]
    ranked = require(finished, "02_ranking").read_rows("ranked")
    assert round(kept["value"] * kept["n"]) == sum(row["side"] == "+" for row in ranked)
    assert rows["04_ppo", "accuracy, last five updates"]["n"] == 1  # update


def test_a_reward_model_at_another_rate_leaves_the_run_as_it_was(finished):
    """benchmarks/real_model.py, part reward."""
    pairs = require(finished, "03_reward_model").read_rows("held_out", Pair)
    before = real_model.before_training(small(), finished)
    assert [row["n"] for row in before] == [sum(pair.author == author for pair in pairs) for author in ("base", "sft")]
    own = real_model.after_training(small(), finished, small().reward.learning_rate)
    assert not (finished / "ablations").exists()
    assert own[0]["value"] == pytest.approx(np.mean([pair.ranked_right for pair in pairs if pair.author == "base"]))
    real_model.after_training(small(), finished, 1e-3)
    assert (
        require(finished / "ablations" / "reward-0.001", "03_reward_model").settings["reward"]["learning_rate"] == 1e-3
    )
    shutil.rmtree(finished / "ablations")


def test_sampling_asks_each_task_openly_and_with_right_and_wrong_answers(finished):
    rows = require(finished, "01_sampling").read_rows("rationales")
    for task in TASKS:
        mine = [row for row in rows if row["dataset"] == task]
        assert sum(row["source"] == "open" for row in mine) == 8 * 4
        given = [row["given"] for row in mine if row["source"] == "conditioned"]
        assert len(given) == 4 * 1 * 2
        assert all("reanswer_correct" in row for row in mine)


def test_training_second_sampling_ppo_and_test_questions_never_meet():
    settings = small()
    asked = ppo_problems(settings)
    groups = [
        training_problems(settings),
        second_problems(settings),
        [problem for update in range(settings.ppo.updates) for problem in asked(update)],
    ]
    tests = {problem.id for problems in questions.test_problems(settings).values() for problem in problems}
    worded = {problem.question for problems in questions.test_problems(settings).values() for problem in problems}
    for group in groups:
        assert not tests & {problem.id for problem in group}
        assert not worded & {problem.question for problem in group}


@pytest.mark.parametrize("seed", [9, 10])  # with these a generator writes a question of stage 01 again
def test_no_question_is_asked_again_where_two_seeds_write_the_same(seed):
    settings = preset("tiny", "all", seed)
    first, second = questions.training_problems(settings), questions.second_problems(settings)
    asked = questions.ppo_problems(settings)
    third = [problem for update in range(settings.ppo.updates) for problem in asked(update)]
    fresh = questions.fresh_problems(settings, 50)
    ids = [problem.id for problem in first + second + third + fresh]
    assert len(ids) == len(set(ids))
    assert len(second) == len(settings.tasks) * settings.reward.questions


def test_ppo_draws_fresh_questions_from_every_task_in_every_update():
    settings = small(ppo={"updates": 5, "episodes": 32, "samples_per_question": 4})
    asked = questions.ppo_problems(settings)
    seen = [problem.id for update in range(5) for problem in asked(update)]
    assert len(seen) == len(set(seen)) == 5 * 8
    for update in range(5):
        assert [problem.dataset for problem in asked(update)] == [task for task in TASKS for _ in range(2)]


def test_the_same_seed_gives_the_same_policy_and_another_seed_another(finished, tmp_path):
    for part in (self_motivated.before_policy, self_motivated.train_policy):
        part(tmp_path / "again", small(), progress=False)
    other = replace(small(), seed=1)
    self_motivated.sample_rationales(tmp_path / "other", other, progress=False)

    def weights(run):
        return models.load_policy(require(run, "04_ppo").path("model")).state_dict()

    ours, theirs = weights(finished), weights(tmp_path / "again")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    first = require(finished, "01_sampling").read_rows("rationales")
    assert first != require(tmp_path / "other", "01_sampling").read_rows("rationales")


def test_ppo_moved_the_policy_away_from_the_sft_model(finished):
    before = models.load_policy(require(finished, "02_sft").path("model")).state_dict()
    after = models.load_policy(require(finished, "04_ppo").path("model")).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_evaluation_holds_every_method_on_every_test_set(finished):
    stage = require(finished, "05_evaluation")
    rows = stage.read_rows("answers")
    sets = {row["test_set"] for row in rows}
    assert set(TASKS) <= sets
    for method in results.METHODS:
        for name in sets:
            mine = [row for row in rows if (row["method"], row["test_set"]) == (method, name)]
            assert len(mine) == 4
            assert all(len(row["scores"]) == len(row["sampled_correct"]) for row in mine)


def test_a_finished_stage_is_loaded_and_other_settings_are_refused(finished):
    before = (finished / "02_sft" / "manifest.json").read_bytes()
    self_motivated.train_sft(finished, small(), progress=False)
    assert (finished / "02_sft" / "manifest.json").read_bytes() == before
    with pytest.raises(StageMismatch, match=r"sft\.learning_rate"):
        self_motivated.train_sft(finished, small(sft={"learning_rate": 1e-5}), progress=False)
    with pytest.raises(StageMismatch, match=r"ppo\.reward"):
        self_motivated.train_policy(finished, small(ppo=SMALL["ppo"] | {"reward": "checker"}), progress=False)
    with pytest.raises(StageMismatch, match=r"03_second_sampling.*\btemperature = 0\.5"):
        self_motivated.sample_again(finished, small(reward=SMALL["reward"] | {"temperature": 0.5}), progress=False)


def test_the_sft_model_has_a_temperature_of_its_own(finished, tmp_path, monkeypatch):
    def stop(engine, problems, n, params, **other):
        raise InterruptedError(f"T = {params.temperature}")

    monkeypatch.setattr(rationales, "sample_open", stop)
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("0[345]_*"))
    with pytest.raises(InterruptedError, match=r"T = 0\.5"):
        self_motivated.sample_again(tmp_path / "run", small(reward=SMALL["reward"] | {"temperature": 0.5}))


def test_a_missing_stage_names_the_notebook_to_run_first(tmp_path):
    with pytest.raises(StageError, match="first run notebook 01"):
        self_motivated.rank_rationales(tmp_path / "nothing", small())


def test_an_unknown_reward_or_method_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"ppo\.reward = 'human' is not allowed: give a sum of learned, untrained, checker"
    ):
        small(ppo=SMALL["ppo"] | {"reward": "human"})
    with pytest.raises(ValueError, match="method 'a2c' is unknown; choose one of: ppo, rloo, grpo"):
        self_motivated.train_policy(tmp_path, small(), method="a2c")


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_other_methods_leave_the_same_files(finished, method):
    settings = small(ppo=SMALL["ppo"] | {"reward": "learned + 2*checker"})
    stage = self_motivated.train_policy(finished, settings, method=method, progress=False)
    ppo = require(finished, "04_ppo")
    for file in ("training/log.csv", "training/examples.jsonl"):
        assert stage.path(file).read_text()
    ours, theirs = (pd.read_csv(one.path("training/log.csv")) for one in (stage, ppo))
    shared = ["update", "accuracy", "kl", "entropy", "length", "tokens", "cut"]  # drawn from the same SFT model
    pd.testing.assert_frame_equal(ours[shared], theirs[shared], atol=1e-5)  # the KL is zero up to rounding
    before = models.load_policy(require(finished, "02_sft").path("model")).state_dict()
    after = models.load_policy(stage.path("model")).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "adapters"
    settings = small(lora={"rank": 4}, ppo=SMALL["ppo"] | {"value": "model"})
    self_motivated.run(run, settings, progress=False)
    return run, settings


def test_with_lora_one_base_holds_every_role(with_adapters, tmp_path):
    """The SFT model is whole; reward model and policy are adapters of it, in peft's format, and move with the run."""
    run, _ = with_adapters
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    base = models.load_policy(require(moved, "02_sft").path("model"))
    for name in ("03_reward_model", "04_ppo"):
        folder = require(moved, name).path("model")
        assert not (folder / "model.safetensors").exists()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "../../02_sft/model" and config["r"] == 4
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        ids = torch.tensor([[1, 5, 9, 20]])
        with torch.no_grad():
            logits = adapted(ids).logits
            torch.testing.assert_close(models.load_policy(folder)(ids).logits, logits, rtol=1e-4, atol=1e-4)
            assert not torch.equal(base(ids).logits, logits)
    assert (require(moved, "04_ppo").path("model") / "value" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_second_round_asks_other_questions_of_the_policy_an_adapter_too(with_adapters, tmp_path, capsys):
    run, _ = with_adapters
    file, copied = tmp_path / "settings.yaml", tmp_path / "run"
    overrides = SMALL | {"lora": {"rank": 4}, "ppo": SMALL["ppo"] | {"value": "model"}}
    file.write_text(json.dumps({"PRESET": "smoke", "OVERRIDES": overrides}), encoding="utf-8")
    shutil.copytree(run, copied)
    command = ["stage", "01_sampling", "02_ranking", "02_sft", "--rounds", "2", "--config", str(file), "--out"]
    assert main([*command, str(copied)]) == 0
    assert f"{copied / 'rounds' / '2' / '02_sft'}: 1 log" in capsys.readouterr().out
    second = require(copied / "rounds" / "2", "01_sampling")
    assert second.settings["base"] == str(copied / "04_ppo" / "model") and second.settings["seed"] == 1000
    asked = [{row["id"] for row in one.read_rows("problems")} for one in (require(run, "01_sampling"), second)]
    assert not asked[0] & asked[1]
    for name in ("04_ppo", "01_sampling"):
        shutil.rmtree(copied / name)
    assert main([*command, str(copied)]) == 1 and "04_ppo does not exist" in capsys.readouterr().err
    assert not (copied / "01_sampling").exists()  # refused before any work


def test_a_base_in_4_bits_has_one_round(tmp_path):
    settings = small(lora={"rank": 4}, hardware={"dtype": "nf4"})
    assert self_motivated.rounds(tmp_path, settings, 1) == [(tmp_path, settings)]
    with pytest.raises(UsageError, match=r"give hardware\.dtype = 'bfloat16', or one round"):
        self_motivated.rounds(tmp_path, settings, 2)


def test_later_rounds_answer_without_exemplars():
    first = preset("smollm2", "word_problems")
    assert first.sampling.shots == "smlib"
    sampling = replace(first.sampling, shots="none")
    assert self_motivated.next_round(first, "model") == replace(first, base="model", seed=1000, sampling=sampling)


def test_the_reward_adapter_scores_as_the_reward_model_did(with_adapters):
    """Within PPO's roles the reward is an adapter; its scores are those that were recorded when it was trained."""
    run, settings = with_adapters
    tuned, rewarder = require(run, "02_sft"), require(run, "03_reward_model")
    tokenizer, roles = models.load_tokenizer(), self_motivated.make_roles(settings, tuned, rewarder)
    reward = self_motivated.make_reward("learned", tuned, rewarder, tokenizer, roles)
    problems = {p.id: p for p in questions.training_problems(settings) + questions.second_problems(settings)}
    pairs = rewarder.read_rows("held_out")
    assert pairs
    scores = reward([problems[pair["id"]] for pair in pairs], [pair["chosen"] for pair in pairs])
    assert scores == pytest.approx([pair["chosen_score"] for pair in pairs], abs=1e-3)
    assert roles.adapter == "default"


def test_with_lora_the_other_methods_train_an_adapter(with_adapters):
    run, settings = with_adapters
    folder = self_motivated.train_policy(run, settings, method="grpo", progress=False).path("model")
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()


class Recorded:
    def __init__(self, base, rank, **options):
        self.base, self.rank, self.options = base, rank, options


def test_vllm_draws_ppos_rollouts_where_the_settings_want_it(with_adapters, monkeypatch):
    run, settings = with_adapters
    tuned = require(run, "02_sft")
    monkeypatch.setattr(vllm_engine, "VLLMEngine", Recorded)
    monkeypatch.setattr(engines, "find_spec", lambda name: True)

    def engine(**hardware):
        return self_motivated.rollout_engine(replace(settings, hardware=replace(settings.hardware, **hardware)), tuned)

    for name in ("auto", "vllm"):
        found = engine(rollout_engine=name, dtype="bfloat16")
        assert (found.base, found.rank) == (str(run / "02_sft" / "model"), settings.lora.rank)
        assert found.options == {"prompt": "plain", "dtype": "bfloat16", "gpu_memory_utilization": 0.35}
    assert engine(engine="vllm") is None
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engine(rollout_engine="auto") is None


def test_what_ppo_takes_of_the_hardware(with_adapters, monkeypatch, tmp_path):
    run, settings = with_adapters
    for name in ("02_sft", "03_reward_model"):
        shutil.copytree(run / name, tmp_path / name)
    seen, train = {}, loop.train
    monkeypatch.setattr(loop, "train", lambda *given, **options: seen.update(options) or train(*given, **options))
    hardware = replace(settings.hardware, micro_batch=2, gradient_checkpointing=True, max_batch=5)
    self_motivated.train_policy(tmp_path, replace(settings, hardware=hardware), progress=False)
    assert (seen["micro_batch"], seen["gradient_checkpointing"], seen["max_batch"], seen["engine"]) == (
        2,
        True,
        5,
        None,
    )


def test_tensorboard_gets_what_the_log_gets(finished, tmp_path):
    for name in ("02_sft", "03_reward_model"):
        shutil.copytree(finished / name, tmp_path / name)
    stage = self_motivated.train_policy(tmp_path, small(), progress=False, tracker="tensorboard")
    events = EventAccumulator(str(next((stage.folder / "training").rglob("events.*")).parent))
    events.Reload()
    log = pd.read_csv(stage.path("training/log.csv"))
    for column in log.columns.drop("update"):
        assert [event.value for event in events.Scalars(column)] == pytest.approx(list(log[column]), rel=1e-5)


@pytest.mark.parametrize("tracker", ["abacus", "comet_ml"])
def test_a_tracker_that_is_not_there_is_refused_before_any_work(tracker, tmp_path):
    said = f"tracker '{tracker}' is unknown or not installed here; install it, or choose one of: 'tensorboard', 'all'"
    with pytest.raises(UsageError, match=said):
        self_motivated.train_policy(tmp_path, small(), tracker=tracker)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_what_a_method_does_not_heed_is_refused_before_any_work(method, tmp_path):
    with pytest.raises(UsageError, match=f"tracker 'tensorboard' is for method 'ppo': '{method}' only writes"):
        self_motivated.train_policy(tmp_path, small(), method, tracker="tensorboard")
    settings = preset("tiny-lora", hardware={"rollout_engine": "vllm"})
    with pytest.raises(UsageError, match=f"rollout_engine = 'vllm' is for method 'ppo': '{method}' samples with"):
        self_motivated.train_policy(tmp_path, settings, method)
    assert list(tmp_path.iterdir()) == []


def test_missing_published_sets_are_named_and_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))
    found, missing = questions.published_problems(small())
    assert found == {}
    assert "SML_DATA_DIR" in missing and json.dumps(missing)


def test_a_stopped_sampling_stage_goes_on_from_its_shards(tmp_path, monkeypatch):
    """Ctrl-C in the second of three drawings: the first is not drawn again, and the rows are those of a calm run."""
    small = preset("smoke", "coin_flip")
    calm = self_motivated.sample_rationales(tmp_path / "calm", small, progress=False).read_rows("rationales")
    real, asked = NativeEngine.sample_ids, []

    def sample_ids(self, prompts, n, params, **given):
        asked.append((len(prompts), n))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(self, prompts, n, params, **given)

    monkeypatch.setattr(NativeEngine, "sample_ids", sample_ids)
    with pytest.raises(KeyboardInterrupt):
        self_motivated.sample_rationales(tmp_path / "stopped", small, progress=False)
    assert list((tmp_path / "stopped" / "01_sampling" / "shards" / "open").glob("shard-*"))
    stage = self_motivated.sample_rationales(tmp_path / "stopped", small, progress=False)
    assert stage.read_rows("rationales") == calm
    assert [n for _, n in asked] == [4, 1, 1, 1] and asked[1] == asked[2]  # open; stopped; conditioned; re-answering
    assert not (stage.folder / "shards").exists()


def test_the_untrained_reward_is_the_sft_model_s_log_likelihood(with_adapters):
    """With adapters it is the model with all of them off; alone it is loaded."""
    run, settings = with_adapters
    tuned, rewarder = require(run, "02_sft"), require(run, "03_reward_model")
    tokenizer, roles = models.load_tokenizer(), self_motivated.make_roles(settings, tuned, rewarder)
    problems = questions.second_problems(settings)[:4]
    texts = [f" It is so.\nThe answer is {problem.answer}." for problem in problems]
    own = reward_model.score(models.load_policy(tuned.path("model")), tokenizer, problems, texts)
    for given in (roles, None):
        reward = self_motivated.make_reward("untrained", tuned, rewarder, tokenizer, given)
        assert reward(problems, texts) == pytest.approx(own, abs=1e-3)
        learned = self_motivated.make_reward("learned - untrained", tuned, rewarder, tokenizer, given)
        assert learned(problems, texts) != pytest.approx([0.0] * 4, abs=1e-3)


def test_a_question_of_stage_01_is_not_asked_again(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("0[345]_*"))
    monkeypatch.setattr(self_motivated, "second_problems", training_problems)
    with pytest.raises(StageError, match=r"01_sampling has asked .*, which should be a fresh question"):
        self_motivated.sample_again(run, small(), progress=False)
