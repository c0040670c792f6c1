import re
from dataclasses import FrozenInstanceError, asdict, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from smlib.errors import UsageError
from smlib.files.artifacts import Stage
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import TASKS
from smlib.runs import shared
from smlib.runs.settings import LARGE, PRESETS, preset
from smlib.sampling import devices

SELF_EXPLORE = ("mistral-7b", "llemma-7b", "deepseek-math-7b")


@pytest.mark.parametrize("name", ["tiny", "smoke", "tiny-lora", "rehearsal"])
def test_every_preset_can_be_made_for_all_tasks_and_for_one(name):
    assert preset(name).tasks == TASKS
    for task in ("coin_flip", "gsm8k"):
        settings = preset(name, task, seed=3)
        assert (settings.preset, settings.tasks, settings.seed, settings.base) == (name, (task,), 3, "tiny")


@pytest.mark.parametrize("name", SELF_EXPLORE)
@pytest.mark.parametrize(("task", "length"), [("gsm8k", 512), ("math", 1024)])
def test_presets_of_large_models_are_as_the_paper_has_it_with_rates_for_adapters(name, task, length):
    """Self-Explore, 2404.10346: its rates are for all weights, ours ten times as large."""
    settings = preset(name, task)
    assert "7b" in settings.base.lower() and settings.sampling.max_new_tokens == settings.ppo.max_new_tokens == length
    drawn, sft, dpo = settings.explore, settings.sft, settings.dpo
    assert (drawn.samples, drawn.temperature, drawn.k, drawn.max_per_question) == (100, 0.7, 4, 8)
    assert (sft.epochs, sft.batch, sft.learning_rate) == (5, 64, 1e-4)
    assert (dpo.epochs, dpo.batch, dpo.beta, dpo.learning_rate) == (3, 32, 0.1, 1e-5)
    assert settings.lora.rank and settings.hardware.dtype == "bfloat16"
    assert sft.batch % settings.hardware.micro_batch == dpo.batch % settings.hardware.micro_batch == 0


@pytest.mark.parametrize("name", LARGE)
def test_large_presets_name_their_model_by_revision(name):
    assert re.fullmatch(r"[\w-]+/[\w.-]+@[0-9a-f]{40}", PRESETS[name]["base"])


def test_what_the_hardware_needs_is_no_part_of_a_stage_but_for_the_precision():
    plain = shared.stage_keys(preset("tiny-lora"), "sft")
    assert "dtype" not in plain
    fits = {"micro_batch": 4, "gradient_checkpointing": True, "max_batch": 8}
    assert shared.stage_keys(preset("tiny-lora", hardware=fits), "sft") == plain
    rounded = preset("tiny-lora", hardware=fits | {"dtype": "bfloat16"})
    assert shared.stage_keys(rounded, "sft") == plain | {"dtype": "bfloat16"}


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_model_that_trains_whole_is_rounded_for_sampling_alone(monkeypatch, dtype):
    monkeypatch.setattr(devices, "_faster_dtype", lambda: "bfloat16")
    plain, rounded = preset("tiny"), preset("tiny", hardware={"dtype": dtype})
    assert shared.held_dtype(rounded) == "float32" and shared.held_dtype(rounded, samples=True) == "bfloat16"
    assert shared.stage_keys(rounded, "sft") == shared.stage_keys(plain, "sft")
    assert shared.engine_key(plain) == {} and shared.engine_key(rounded) == {"sampling_dtype": "bfloat16"}
    assert shared.engine_key(rounded, "rollout_engine") == {}  # PPO draws from the policy itself
    adapted = preset("tiny-lora", hardware={"dtype": dtype})
    assert shared.stage_keys(adapted)["dtype"] == "bfloat16" and shared.engine_key(adapted) == {}


def test_smoke_asks_for_less_than_tiny():
    smoke, tiny = preset("smoke"), preset("tiny")
    for group, field in [("sampling", "questions"), ("reward", "questions"), ("evaluation", "questions")]:
        assert getattr(getattr(smoke, group), field) < getattr(getattr(tiny, group), field) / 5
    assert smoke.ppo.updates * smoke.ppo.episodes < tiny.ppo.updates * tiny.ppo.episodes / 50


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        preset("tiny").sampling.temperature = 0.5


def test_overrides_reach_the_groups_and_leave_the_rest_alone():
    plain = preset("tiny")
    settings = preset("tiny", base="a/model", ppo={"updates": 7}, reward={"pairs": "base"})
    assert (settings.base, settings.ppo.updates, settings.reward.pairs) == ("a/model", 7, "base")
    assert settings.ppo.learning_rate == plain.ppo.learning_rate
    assert settings.sampling == plain.sampling


@pytest.mark.parametrize(("group", "name"), [("sampling", "temperature"), ("ppo", "updates"), ("sft", "epochs")])
def test_a_number_has_one_form_however_it_is_written(group, name):
    whole, fraction = (preset("tiny", **{group: {name: value}}) for value in (2, 2.0))
    assert whole == fraction and repr(whole) == repr(fraction)
    run = [Stage("runs", "a stage", shared.stage_keys(settings, group)) for settings in (whole, fraction)]
    assert run[0].fingerprint == run[1].fingerprint


def test_a_group_may_come_whole():
    assert repr(preset("tiny", ppo=PPOSettings(learning_rate=1)).ppo.learning_rate) == "1.0"


def each(settings, prefix=""):
    hints = get_type_hints(type(settings))
    for name, value in vars(settings).items():
        yield from each(value, f"{name}.") if is_dataclass(value) else [(prefix + name, value, hints[name])]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_values_of_the_declared_types(name):
    """So a value that is given again is the same setting."""
    for setting, value, kind in each(preset(name, "gsm8k")):
        if get_origin(kind) is Literal:
            assert value in get_args(kind), setting
        else:
            assert type(value) is (get_origin(kind) or kind), setting


@pytest.mark.parametrize("name", ["updates", "episodes", "samples_per_question", "epochs", "minibatch"])
@pytest.mark.parametrize("value", [0, -4])
def test_ppo_needs_one_of_each_at_least(name, value):
    with pytest.raises(UsageError, match=f"ppo.{name} = {value} is not allowed: give a whole number from 1 to"):
        preset("tiny", ppo={name: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("huge"), "preset 'huge' is unknown; choose one of: tiny, smoke"),
        (lambda: preset("tiny", "chess"), "task 'chess' is unknown; choose one of: all, coin_flip"),
        (lambda: preset("mistral-7b"), "preset 'mistral-7b' shows exemplars .*choose another task, such as gsm"),
        (lambda: preset("llama2-7b", "chain_arithmetic"), "task 'chain_arithmetic' has none: choose another task"),
        (lambda: preset("tiny", hardware={"dtype": "nf4"}), "lora.rank = 0 is not allowed, since 4-bit weights cannot"),
        (
            lambda: preset("tiny", hardware={"rollout_engine": "vllm"}),
            "needs LoRA and a base that is not in 4 bits",
        ),
        (
            lambda: preset("llama2-7b-24gb", "gsm8k", hardware={"rollout_engine": "vllm"}),
            "hardware.rollout_engine = 'vllm' needs LoRA",
        ),
        (lambda: preset("tiny", hardware={"cache_tokens": -1}), "hardware.cache_tokens = -1 is not allowed: give a wh"),
        (lambda: preset("tiny", hardware={"dtype": "int8"}), "hardware.dtype 'int8' is unknown; choose one of: fl"),
        (lambda: preset("tiny", seed=-1), "seed = -1 is not allowed: give a whole number from 0"),
        (lambda: preset("tiny", seed="1"), "seed = '1' is not allowed"),
        (
            lambda: preset("tiny", temperature=1.0),
            "setting 'temperature' is unknown; choose one of: base, sampl",
        ),
        (lambda: preset("tiny", tasks=("chess",)), "setting 'tasks' is unknown"),
        (lambda: preset("tiny", ppo={"steps": 1}), "setting 'ppo.steps' is unknown; .*ppo.updates"),
        (
            lambda: preset("tiny", ppo={"updates": 0.5}),
            "ppo.updates = 0.5 is not allowed: give a whole number",
        ),
        (lambda: preset("tiny", ppo=3), "setting ppo = 3 is not allowed: ppo is a group of settings"),
        (lambda: preset("tiny", ppo={"warmup_updates": -1}), "ppo.warmup_updates = -1 is not allowed: give a whole"),
        (lambda: preset("tiny", ppo={"max_new_tokens": 0}), "ppo.max_new_tokens = 0 is not allowed: give a whole"),
        (lambda: preset("tiny", ppo={"updates": True}), "ppo.updates = True is not allowed: give a whole number f"),
        (lambda: preset("tiny", ppo={"lam": False}), "ppo.lam = False is not allowed: give a number from 0 to 1"),
        (lambda: preset("tiny", ppo={"updates": None}), "ppo.updates = None is not allowed: give a whole number f"),
        (lambda: preset("tiny", ppo={"lam": float("nan")}), "ppo.lam = nan is not allowed: give .* such as 1.0"),
        (lambda: preset("tiny", ppo={"lam": float("inf")}), "ppo.lam = inf is not allowed: give a number from 0"),
        (lambda: preset("tiny", ppo={"updates": float("inf")}), "ppo.updates = inf is not allowed: give a whole"),
        (lambda: preset("tiny", ppo={"lam": 10**400}), r"ppo.lam = 10+\.\.\. is not allowed: give a number"),
        (
            lambda: preset("tiny", ppo={"normalize_reward": 1}),
            "normalize_reward = 1 is not allowed: give True or False",
        ),
        (lambda: preset("tiny", ppo={"normalize_reward": "true"}), "= 'true' is not allowed: give True or False"),
        (lambda: preset("tiny", sampling={"shots": None}), "shots None is unknown; choose one of: none, sm"),
        (lambda: preset("tiny", reward={"wrong": "none"}), "'none' is unknown; choose one of: open, cond"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_rehearsal_takes_every_path_of_code_that_llama2_7b_takes():
    """Of what decides a path nothing differs, but that a laptop has no exemplars to show and no vLLM to ask for."""
    small, large = preset("rehearsal", "coin_flip"), preset("llama2-7b", "coin_flip")
    for group in ("ranking", "lora"):
        assert getattr(small, group) == getattr(large, group)
    held, wanted = asdict(small.hardware), asdict(large.hardware)
    paths = ("dtype", "gradient_checkpointing", "workers")
    assert [held[name] for name in paths] == [wanted[name] for name in paths] and held["micro_batch"]
    assert held["micro_batch"] < min(small.sft.batch, small.reward.batch, small.dpo.batch, small.ppo.minibatch)
    numbers = ("updates", "episodes", "minibatch", "warmup_updates", "learning_rate", "value_learning_rate")
    ppo = {name: value for name, value in asdict(large.ppo).items() if name not in (*numbers, "max_new_tokens")}
    assert ppo.items() <= asdict(small.ppo).items()
    assert (small.reward.pairs, small.sft.source) == (large.reward.pairs, large.sft.source)
