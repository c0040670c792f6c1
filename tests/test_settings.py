from dataclasses import FrozenInstanceError

import pytest

from smlib.problems import TASKS
from smlib.settings import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_made_for_all_tasks_and_for_one(name):
    assert preset(name).tasks == TASKS
    settings = preset(name, "coin_flip", seed=3)
    assert (settings.preset, settings.tasks, settings.seed, settings.base) == (
        name,
        ("coin_flip",),
        3,
        "tiny",
    )


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


def test_a_whole_number_may_stand_for_a_fraction():
    assert preset("tiny", sampling={"temperature": 1}).sampling.temperature == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preset("huge"), "preset 'huge' is unknown; choose one of: tiny, smoke"),
        (lambda: preset("tiny", "chess"), "task 'chess' is unknown; choose one of: all, coin_flip"),
        (lambda: preset("tiny", seed=-1), "seed -1 is not allowed; give a whole number from 0"),
        (lambda: preset("tiny", seed="1"), "seed '1' is not allowed"),
        (
            lambda: preset("tiny", temperature=1.0),
            "setting 'temperature' is unknown; choose one of: base, sampl",
        ),
        (lambda: preset("tiny", tasks=("chess",)), "setting 'tasks' is unknown"),
        (lambda: preset("tiny", ppo={"steps": 1}), "setting 'ppo.steps' is unknown; .*ppo.updates"),
        (
            lambda: preset("tiny", ppo={"updates": 0.5}),
            "ppo.updates = 0.5 is of type float; give one of type int",
        ),
        (lambda: preset("tiny", ppo=3), "setting ppo = 3 is of type int"),
        (lambda: preset("tiny", reward={"wrong": "none"}), "'none' is unknown; choose one of: open, cond"),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(call, message):
    with pytest.raises(ValueError, match=message):
        call()
