"""A published dataset as a run's task: which of its questions each stage gets."""

import hashlib
import json
from itertools import chain

import pytest

from smlib.problems import downloads
from smlib.problems.datasets import PUBLISHED, TASKS, TRAIN_SETS, splits
from smlib.runs import questions as asked_in
from smlib.runs.questions import (
    fresh_problems,
    ppo_problems,
    published_problems,
    second_problems,
    training_problems,
)
from smlib.runs.settings import preset

PPO = {"updates": 5, "episodes": 8, "samples_per_question": 2, "minibatch": 4}


@pytest.fixture(autouse=True)
def gsm8k(tmp_path, monkeypatch):
    """Thirty-two train questions: one of them twice, once in capitals, and two of the six test questions among them."""
    train = [f"How many are {n} nuts?" for n in range(28)] + ["How many are 3 nuts?", "How many are 101 nuts?"]
    train += ["HOW MANY, are 4 nuts", "how many are 102  nuts ?"]
    test = [f"How many are {n} nuts?" for n in range(100, 106)]
    (tmp_path / "gsm8k").mkdir()
    for split, questions in (("train", train), ("test", test)):
        rows = "".join(json.dumps({"question": text, "answer": "#### 1"}) + "\n" for text in questions).encode()
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_bytes(rows)
        pinned = downloads.Pinned(hashlib.sha256(rows).hexdigest(), "nowhere")
        monkeypatch.setitem(downloads.FILES, f"gsm8k/{split}.jsonl", pinned)
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path))


def small(first=8, second=6, seed=0, **overrides):
    sizes = {"sampling": {"questions": first}, "reward": {"questions": second}, "evaluation": {"questions": 4}}
    return preset("smoke", "gsm8k", seed, **(sizes | {"ppo": PPO} | overrides))


def questions(problems):
    return [problem.question for problem in problems]


def of_ppo(settings):
    asked = ppo_problems(settings)
    return [questions(asked(update)) for update in range(settings.ppo.updates)]


def test_there_is_a_run_about_every_published_dataset():
    assert set(TRAIN_SETS) | set(TASKS) > set(PUBLISHED) and all("train" in splits(name) for name in PUBLISHED)


def test_the_stages_share_the_train_split_and_nobody_gets_a_test_question():
    settings = small()
    first, second = questions(training_problems(settings)), questions(second_problems(settings))
    fresh = questions(fresh_problems(small(ppo=PPO | {"updates": 1}), 100))
    asked = of_ppo(settings)
    assert (len(first), len(second), len(fresh)) == (8, 6, 28 - 8 - 6 - 4)
    assert len({*first, *second, *fresh, *asked[0]}) == 28 == len([*first, *second, *fresh, *asked[0]])
    (tested,) = asked_in.test_problems(settings).values()
    assert len(set(questions(tested))) == 4 and all(problem.id.startswith("gsm8k/test/") for problem in tested)
    everything = {f"How many are {n} nuts?" for n in range(28)}
    assert {*first, *second, *fresh, *chain(*asked)} == everything and not everything & set(questions(tested))


def test_a_seed_decides_the_order_and_fewer_questions_are_the_first_of_more():
    first = questions(training_problems(small()))
    assert questions(training_problems(small())) == first
    assert questions(training_problems(small(first=20)))[:8] == first
    assert questions(training_problems(small(seed=1))) != first
    assert asked_in.test_problems(small(seed=1)) == asked_in.test_problems(small())  # the same for all runs


def test_more_questions_than_there_are_is_all_of_them():
    settings = small(first=10_000, second=0, evaluation={"questions": 10_000})
    assert len(training_problems(settings)) == 28
    assert second_problems(settings) == []
    assert len(asked_in.test_problems(settings)["gsm8k"]) == 6


def test_ppo_goes_round_in_another_order_and_asks_no_question_twice_in_an_update():
    settings = small()
    asked, used = of_ppo(settings), {*questions(training_problems(settings))}
    used |= {*questions(second_problems(settings))}
    assert [len(set(update)) for update in asked] == [4] * 5
    assert not used & {*chain(*asked)}  # fourteen are left, of which each round asks three times four
    assert len({*chain(*asked[:3])}) == 12 and asked[3] != asked[0]
    assert of_ppo(settings) == asked and of_ppo(small(seed=1)) != asked


def test_ppo_asks_all_questions_where_none_are_left_for_it():
    asked = of_ppo(small(first=26, second=2, ppo=PPO | {"updates": 7}))
    assert len({*chain(*asked)}) == 28


@pytest.mark.parametrize(
    ("ask", "settings", "message"),
    [
        (second_problems, {"first": 28}, "gsm8k has 28 train questions, .* lower sampling.questions = 28"),
        (
            lambda settings: fresh_problems(settings, 1),
            {"first": 20, "ppo": PPO | {"updates": 7}},
            "stages use all 28 train .* lower sampl",
        ),
        (ppo_problems, {"ppo": PPO | {"episodes": 64}}, "asks 32 questions per update, but there are only 28: low"),
    ],
)
def test_where_nothing_is_left_the_error_names_what_to_lower(ask, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(small(**settings))


def test_its_own_test_split_is_not_asked_again_as_a_published_set():
    assert published_problems(small()) == ({}, "")
