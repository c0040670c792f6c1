"""Values by Monte Carlo: by hand, against plain GAE, and in a training."""

from dataclasses import replace

import pytest
import test_ppo as toy
import torch
from hypothesis import given
from hypothesis import strategies as st

from smlib.errors import UsageError
from smlib.ppo import arithmetic, rollouts
from smlib.ppo.prefix_values import prefix_values
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem
from smlib.sampling import models
from smlib.sampling.params import Sample, SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_new_tokens=64, seed=0)
ROLLOUTS = replace(toy.QUICK, value="rollouts", value_samples=2, lam=0.0)


def test_gae_of_steps_by_hand():
    mask = toy.mask_of([0, 1, 1, 1, 1], [1, 1, 0, 0, 0])
    steps = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]])
    values = toy.tensor([0, 0.5, 0.5, -0.25, 0.75], [0.2, 0.2, 0, 0, 0])
    rewards = toy.tensor([9, -0.1, -0.1, 0, 1.0], [0, -1, 9, 9, 9])
    advantages, returns = arithmetic.gae_of_steps(rewards, values, steps, mask, lam=0.0)
    # step 0: -0.2 - 0.25 - 0.5; step 1: 0.75 + 0.25; step 2: 1 - 0.75; the other row has one step: -1 - 0.2
    torch.testing.assert_close(advantages, toy.tensor([0, -0.95, -0.95, 1.0, 0.25], [-1.2, -1.2, 0, 0, 0]))
    advantages, returns = arithmetic.gae_of_steps(rewards, values, steps, mask, lam=1.0)
    torch.testing.assert_close(returns, toy.tensor([0, 0.8, 0.8, 1.0, 1.0], [-1, -1, 0, 0, 0]))
    torch.testing.assert_close(advantages, (returns - values).where(mask, 0.0))


@given(st.lists(st.floats(-2, 2), min_size=12, max_size=12), st.floats(0, 1), st.integers(1, 6))
def test_where_every_token_is_a_step_it_is_gae(numbers, lam, length):
    rewards, values = torch.tensor(numbers).view(2, 1, 6)
    mask = torch.arange(6)[None] < length
    steps = torch.arange(6)[None]
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    plain = arithmetic.gae(rewards, values, mask, 1.0, lam)
    torch.testing.assert_close(arithmetic.gae_of_steps(rewards, values, steps, mask, lam), plain)


def test_what_the_others_earn_by_hand():
    plan = PPOSettings(episodes=3, samples_per_question=3, minibatch=3, reward_clip=1.5)
    samples = [Sample("", (1,), (0.0,), reason) for reason in ("stop", "length", "stop")]
    scores, others = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([6.0, 5.0, 2.0])  # the means of the other two
    found = rollouts.earned_by_others(scores, others, samples, arithmetic.RunningMoments(1, 0.0, 16.0), plan)
    # (score - what centres the first) / 4, within 1.5, less 1 where it was cut; then the mean of the two others
    first = ((3 - 6) / 4 - 1 + (9 - 6) / 4) / 2
    second = ((1 - 5) / 4 + (9 - 5) / 4) / 2
    third = ((1 - 2) / 4 + (3 - 2) / 4 - 1) / 2
    torch.testing.assert_close(found, torch.tensor([first, second, third]))


def test_a_prefix_has_the_budget_of_the_policy():
    """What the policy would not have had the tokens to end counts as cut, and pays for it."""
    tokenizer = models.load_tokenizer()
    problem = Problem("chain_arithmetic/train/1", "chain_arithmetic", "What?", "3", "number")
    whole = sampled(tokenizer, " 1 + 1 = 2.\n2 + 1 = 3.\nThe answer is 3.")
    draw, _ = drawing(tokenizer, ["2 + 1 = 3.\nThe answer is 3."])
    mask = torch.ones(1, len(whole.token_ids), dtype=torch.bool)
    for limit, reason in ((len(whole.token_ids), "stop"), (len(whole.token_ids) - 1, "length")):
        seen: list[Sample] = []
        prefix_values(
            draw, lambda _, drawn, seen=seen: seen.extend(drawn) or [0.0] * len(drawn), lambda scores, *_: scores,
            tokenizer, [problem], [[1]], [whole], mask, torch.zeros(1), 1, replace(PARAMS, max_new_tokens=limit),
        )  # fmt: skip
        assert seen[0].finish_reason == reason and len(seen[0].token_ids) <= limit


def drawing(tokenizer, texts):
    """An engine that writes texts[i % len] after every prefix, and a note of what it was asked."""
    asked = []

    def draw(prompts, n, params, keys):
        asked.append((prompts, keys))
        samples = []
        for _ in prompts:
            ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts[:n]]
            samples.append(
                [Sample(text, one, (0.0,) * len(one), "stop") for text, one in zip(texts, ids, strict=False)]
            )
        return samples

    return draw, asked


def sampled(tokenizer, text):
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Sample(text, ids, (0.0,) * len(ids), "stop")


def test_each_prefix_is_worth_the_mean_of_what_follows_it():
    tokenizer = models.load_tokenizer()
    problem = Problem("chain_arithmetic/train/1", "chain_arithmetic", "What?", "3", "number")
    samples = [
        sampled(tokenizer, " 1 + 1 = 2.\n2 + 1 = 3.\nThe answer is 3."),
        sampled(tokenizer, " 1 + 1 = 2.\n2 + 1 = 4.\nThe answer is 4."),
        sampled(tokenizer, "The answer is 3."),
    ]
    prompt = [1, 5]
    draw, asked = drawing(tokenizer, ["The answer is 3.", "The answer is 8."])
    longest = max(len(one.token_ids) for one in samples)
    mask = torch.zeros(3, longest + 1, dtype=torch.bool)
    for row, one in enumerate(samples):
        mask[row, 1 : 1 + len(one.token_ids)] = True

    def score(problems, whole):
        """1 for the right answer, and 10 for every right second step before it."""
        return [float(one.text.endswith("is 3.")) + 10 * ("2 + 1 = 3" in one.text) for one in whole]

    found = prefix_values(
        draw, score, lambda scores, group, row: scores + 100 * row, tokenizer, [problem] * 3, [prompt] * 3, samples,
        mask, torch.tensor([0.1, 0.2, 0.3]), 2, PARAMS,
    )  # fmt: skip
    [(prompts, keys)] = asked
    assert len(prompts) == 3 and len(set(keys)) == 3  # after step 1, which two share; after each second step
    assert all(ids[:2] == prompt for ids in prompts)
    assert (
        found.tokens
        == sum(len(sampled(tokenizer, text).token_ids) for text in ("The answer is 3.", "The answer is 8.")) * 3
    )
    assert found.values[0][mask[0]].unique_consecutive().tolist() == pytest.approx([0.1, 0.5, 10.5])
    assert found.values[1][mask[1]].unique_consecutive().tolist() == pytest.approx([0.2, 100.5])
    assert found.steps[1][mask[1]].unique_consecutive().tolist() == [0, 1, 2]
    assert found.values[2][mask[2]].unique().tolist() == pytest.approx([0.3])
    assert not found.values[~mask].any() and not found.steps[~mask].any()
    for row, one in enumerate(samples[:2]):
        text = [
            tokenizer.decode(
                [token for token, step in zip(one.token_ids, found.steps[row][mask[row]], strict=True) if step == s]
            )
            for s in range(3)
        ]
        assert "".join(text) == one.text and text[2].startswith("The answer")


def test_it_learns_without_a_value_that_learns(tmp_path):
    plan = replace(ROLLOUTS, updates=25, episodes=32, kl_coef=0.01, kl_target=0.0)
    rows, roles = toy.run(tmp_path, plan)
    assert rows[0]["reward"] < 0.2 < 0.8 < sum(row["reward"] for row in rows[-3:]) / 3
    assert all(row["value_tokens"] >= 0 for row in rows) and any(row["value_tokens"] for row in rows)
    assert not roles.head.weight.any() and not roles.head.bias.any()


def test_a_resumed_run_ends_bit_equal(tmp_path):
    whole, roles = toy.run(tmp_path / "whole", ROLLOUTS)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tmp_path / "cut", ROLLOUTS, reward=toy.dies_at(5, KeyboardInterrupt))
    rows, again = toy.run(tmp_path / "cut", ROLLOUTS)
    assert toy.without_times(rows) == toy.without_times(whole)
    assert toy.same_weights(roles, again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 0.9}, r"ppo.gamma = 0.9 discounts per token, but ppo.value = 'rollouts' values whole"),
        ({"samples_per_question": 1, "center_by_question": False}, "ppo.samples_per_question = 1, but"),
        ({"value": "oracle"}, "ppo.value 'oracle' is unknown; choose one of: head, model, rollouts"),
        ({"value_samples": 0}, "ppo.value_samples = 0 is not allowed"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        PPOSettings(**{"value": "rollouts"} | changes)
