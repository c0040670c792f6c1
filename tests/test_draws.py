"""Random draws depend on the seed, the stage and the purpose, and on nothing that the process drew before."""

import hashlib
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from test_dpo import PAIRS as DPO_PAIRS
from test_dpo import QUICK as DPO_QUICK
from test_ppo import make_policy
from test_reward_model import PAIRS, QUICK
from test_reward_model import PROBLEMS as PAIR_PROBLEMS
from test_sft import PROBLEMS, ROWS
from test_sft import QUICK as SFT_QUICK
from tiny_model import policy, tokenizer

from smlib.draws import own_draws, seed_of
from smlib.learning import dpo, exploration, reward_model, sft
from smlib.ppo import loop, rollouts
from smlib.ppo.roles import Adapters
from smlib.runs import self_explore, self_motivated
from smlib.runs.settings import preset
from smlib.sampling import models


def disturb():
    return torch.rand(1).item(), np.random.rand(), random.random()


def state():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_a_seed_is_of_all_its_parts_and_fits_numpy():
    assert seed_of(0, "02_sft", "adapter") == seed_of(0, "02_sft", "adapter") < 2**32
    others = {seed_of(*parts) for parts in [(0, "02_sft"), (0, "02_sft/adapter"), ("0", "02_sft", "adapter"), (1,)]}
    assert len(others) == 4 and seed_of(0, "02_sft", "adapter") not in others


def test_the_block_begins_at_its_seed_and_leaves_no_trace():
    before = state()
    with own_draws(7):
        first = disturb()
    assert state() == before
    disturb()
    with pytest.raises(ZeroDivisionError), own_draws(7):
        assert disturb() == first
        before = 1 / 0
    with own_draws(8):
        assert disturb() != first


def adapters(seed):
    return Adapters(models.add_lora(make_policy(), 4, 8, "all-linear", base="", seed=seed), seed=seed + 1)


def lora(seed=0):
    return models.add_lora(policy(), 4, 8, "all-linear", base="", seed=seed)


@pytest.mark.parametrize("make", [lora, adapters])
def test_new_adapters_are_drawn_from_their_seed_alone(make):
    torch.manual_seed(0)
    roles = make(3)
    disturb()
    again, other = make(3), make(4)
    new = [name for name, weight in roles.named_parameters() if "lora_A" in name and weight.requires_grad]
    weights, same, different = (dict(one.named_parameters()) for one in (roles, again, other))
    assert new and all(torch.equal(weights[name], same[name]) for name in new)
    assert not any(torch.equal(weights[name], different[name]) for name in new)
    if make is adapters:
        first = next(weights[name] for name in new if ".default" in name)
        assert not torch.equal(first, next(weights[name] for name in new if ".value" in name))


def test_neither_adding_nor_loading_weights_moves_the_generators(tmp_path):
    whole, base = policy(), make_policy()
    whole.save_pretrained(tmp_path / "base")
    before = state()
    lora = models.add_lora(whole, 4, 8, "all-linear", base="../base", seed=3)
    lora.save_pretrained(tmp_path / "adapter")
    for name in ("base", "adapter"):
        models.load_policy(tmp_path / name)
    roles = Adapters(models.add_lora(base, 4, 8, "all-linear", base=""), seed=3)
    roles.save_policy(tmp_path / "reward")
    assert state() == before
    base = make_policy()
    before = state()
    Adapters(models.add_lora(base, 4, 8, "all-linear", base=""), tmp_path / "reward")
    assert state() == before


TRAININGS = {
    "sft": lambda model: sft.train_sft(model, tokenizer(), PROBLEMS, ROWS[:9], **SFT_QUICK),
    "reward": lambda model: reward_model.train_reward_model(model, tokenizer(), PAIR_PROBLEMS, PAIRS[:9], **QUICK),
    "dpo": lambda model: dpo.train_dpo(model, tokenizer(), DPO_PAIRS[:9], **DPO_QUICK),
}


@pytest.mark.parametrize("make", [lambda: policy(), lora], ids=["whole", "adapter"])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_neither_heeds_nor_moves_the_generators(name, make):
    trained = [make(), make()]
    TRAININGS[name](trained[0])
    disturb()
    before = state()
    TRAININGS[name](trained[1])
    assert state() == before
    for one, other in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------- whole stages

SMALL = {
    "sampling": {"questions": 12, "samples": 8, "conditioned_questions": 4, "conditioned_samples": 1},
    "reward": {"questions": 8, "epochs": 1.0},
    "ppo": {"updates": 2, "episodes": 16, "minibatch": 8, "warmup_updates": 1, "max_new_tokens": 48, "value": "model"},
    "explore": {"samples": 8, "k": 2},
}
TRAINED = {
    "02_sft": self_motivated.train_sft,
    "03_reward_model": self_motivated.train_reward_model,
    "04_ppo": self_motivated.train_policy,
    "04_rloo": lambda *given, **options: self_motivated.train_policy(*given, method="rloo", **options),
    "04_grpo": lambda *given, **options: self_motivated.train_policy(*given, method="grpo", **options),
    "06_rft": self_explore.train_rft,
    "06_step_dpo": self_explore.train_step_dpo,
    "06_outcome_dpo": self_explore.train_outcome_dpo,
}
STAGES = self_motivated.STAGES | self_explore.STAGES | TRAINED


@pytest.fixture(scope="module", params=["whole", "adapters"])
def calm(request, tmp_path_factory):
    """A run of all stages that train, and of those that they need: (folder, settings)."""
    settings = preset(
        "smoke", "chain_arithmetic", **SMALL, **({"lora": {"rank": 4}} if request.param == "adapters" else {})
    )
    run = tmp_path_factory.mktemp(request.param) / "calm"
    before = ["06_solutions", "06_selection", "06_rft", "06_exploration"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exploration.LuckWarning)
        for name in [*list(self_motivated.STAGES)[:6], *before, *TRAINED]:
            STAGES[name](run, settings, progress=False)
    return run, settings


def weights(run, name):
    """SHA-256 of every file of weights of the stage's model."""
    folder = run / name / "model"
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.safetensors")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_stage_gives_the_same_bytes_whatever_was_drawn_before(calm, name, tmp_path):
    run, settings = calm
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / name)
    disturb()
    STAGES[name](tmp_path / "run", settings, progress=False)
    assert weights(tmp_path / "run", name) == weights(run, name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_a_stage_that_was_stopped_and_resumed_gives_the_same_bytes(calm, method, tmp_path, monkeypatch):
    run, settings = calm
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"04_{method}")
    scores, calls = rollouts.reward_scores, iter(range(9))

    def stopped(*given):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return scores(*given)

    with monkeypatch.context() as patch:
        for module in (loop, rollouts):
            patch.setattr(module, "reward_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            self_motivated.train_policy(tmp_path / "run", settings, method=method, progress=False)
    assert list((tmp_path / "run" / f"04_{method}" / "training").glob("checkpoint-*"))
    disturb()
    self_motivated.train_policy(tmp_path / "run", settings, method=method, progress=False)
    assert weights(tmp_path / "run", f"04_{method}") == weights(run, f"04_{method}")
