"""Stages whose samples vLLM draws: sampling, exploration from prefixes, evaluation; `make test-vllm`."""

import os

import pandas as pd
import pytest
import torch
from processes import children

from smlib.files.artifacts import StageMismatch, require
from smlib.learning import exploration
from smlib.learning.rows import Pair
from smlib.reports import evaluation
from smlib.runs import questions, self_explore, self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import models, packing
from smlib.sampling.params import SamplingParams

for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
    os.environ.setdefault(name, value)
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` runs these tests in its environment")

from smlib.sampling import vllm_engine  # noqa: E402

SMALL = {
    "sampling": {"questions": 12, "samples": 4, "conditioned_questions": 2, "conditioned_samples": 1},
    "explore": {"samples": 8, "k": 3},
}


def small(engine):
    return preset("smoke", "chain_arithmetic", **SMALL, hardware={"engine": engine})


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Without compiling, which on a CPU takes longer than all the rest."""
    made = vllm_engine.VLLMEngine.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vllm_engine.VLLMEngine,
            "__init__",
            lambda self, *given, **options: made(self, *given, enforce_eager=True, **options),
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, eager):
    run, settings = tmp_path_factory.mktemp("runs") / "vllm", small("auto")
    before = children()
    self_motivated.sample_rationales(run, settings, progress=False)
    self_motivated.rank_rationales(run, settings)
    self_motivated.train_sft(run, settings, progress=False)
    self_explore.draw_solutions(run, settings, progress=False)
    self_explore.select(run, settings)
    self_explore.train_rft(run, settings, progress=False)
    self_explore.find_pits(run, settings, progress=False)
    assert not children() - before
    return run


def test_stages_record_vllm_and_are_refused_to_another_engine(finished):
    for name in ("01_sampling", "06_solutions", "06_exploration"):
        assert require(finished, name).settings["engine"] == "vllm"
    assert "engine" not in require(finished, "02_sft").settings
    with pytest.raises(StageMismatch, match="engine = 'vllm', and now engine"):
        self_motivated.sample_rationales(finished, small("native"), progress=False)


def test_the_sampling_stage_is_whole(finished):
    rows = require(finished, "01_sampling").read_rows("rationales")
    assert len(rows) == 12 * 4 + 2 * 2
    assert sum(row["correct"] for row in rows) > 0 and all("reanswer_correct" in row for row in rows)


def test_exploration_and_evaluation_are_what_the_engine_draws_and_the_model_says(finished):
    """Every prefix anew: the same outcomes, and log-probabilities as in a forward pass of the RFT model."""
    settings, path = small("vllm"), require(finished, "06_rft").path("model")
    model, tokenizer = models.load_policy(path), models.load_tokenizer(str(path))
    problems = questions.training_problems(settings)
    outcome = require(finished, "06_selection").read_rows("pairs", Pair)
    wrong = self_explore.wrong_rationales(tokenizer, {one.id: one for one in problems}, outcome)
    with shared.load_engine(settings, path) as engine:
        found = exploration.explore(engine, wrong, settings.explore.k, shared.sampling_params(settings, "explore"))
        params = SamplingParams(temperature=1.0, max_new_tokens=96, seed=0)
        answered = evaluation.evaluate(engine, problems, 2, params)
    explored = require(finished, "06_exploration").read_rows("explored")
    assert [row["right"] for row in explored] == [
        [sum(drawn) for drawn in exploration.outcomes(one, found)] for one in wrong
    ]
    assert evaluation.summarise(answered)["avg_at_k"]["value"] > 0.2
    worst = 0.0
    for one in wrong[:6]:
        for attempt in found[one.key(1)]:
            ids = [*one.prompt_ids, *one.prefix(1), *attempt.sample.token_ids]
            count = len(attempt.sample.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -count - 1 : -1]
            expected = packing.token_logprobs(logits, torch.tensor(attempt.sample.token_ids))
            worst = max(worst, (torch.tensor(attempt.sample.logprobs) - expected).abs().max().item())
    assert worst < 1e-4


def test_ppo_draws_by_vllm_from_the_adapter_as_it_learns(tmp_path):
    """The first update draws from the adapter at zero, the later ones from what has moved; float32 on both sides."""
    moving = {"updates": 4, "learning_rate": 5e-3, "warmup_updates": 0}
    settings = preset(
        "smoke", "chain_arithmetic", **SMALL, lora={"rank": 4}, ppo=moving, hardware={"rollout_engine": "vllm"}
    )
    before = children()
    self_motivated.before_policy(tmp_path, settings, progress=False)
    trained = self_motivated.train_policy(tmp_path, settings, progress=False)
    assert trained.settings["engine"] == "vllm" and not children() - before
    log = pd.read_csv(trained.path("training/log.csv"))
    assert len(log) == 4 and log["engine_gap"].max() < 1e-3
    assert log["kl"].iloc[-1] > 100 * log["engine_gap"].iloc[-1]  # so a lost adapter would show
