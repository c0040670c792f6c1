"""PPO: arithmetic against numbers worked out by hand, padding that never counts, learning, exact resume."""

import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from smlib.files.artifacts import StageMismatch
from smlib.judging import answers
from smlib.ppo import arithmetic, batches, checks, loop, rollouts, state, training_log, updates
from smlib.ppo.roles import Adapters, SeparateModels
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem, generate
from smlib.sampling import devices, models, packing
from smlib.sampling.params import Sample
from smlib.sampling.sampler import sample_ids

WORDS = [
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "Q:",
    "A:",
    "flip",
    "heads",
    "The",
    "answer",
    "is",
    "yes.",
    "no.",
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_masked_mean_and_whiten_see_real_tokens_only():
    x, mask = tensor([1, 3, 99], [5, 99, 99]), mask_of([1, 1, 0], [1, 0, 0])
    assert arithmetic.masked_mean(x, mask) == 3
    # mean 3, variance (4 + 0 + 4) / 3
    step = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(arithmetic.whiten(x, mask), tensor([-step, 0, 0], [step, 0, 0]))


def test_whitening_equal_numbers_gives_zeros():
    assert arithmetic.whiten(tensor([7, 7]), mask_of([1, 1])).tolist() == [[0, 0]]


def test_clip_scores_by_hand():
    scores = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    assert arithmetic.clip_scores(scores, 1.0).tolist() == [-1.0, -0.5, 0.0, 1.0]
    assert arithmetic.clip_scores(scores, 0.0).tolist() == scores.tolist()


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [2.0, 2.0]]])  # p = 1/4, 3/4; then 1/2, 1/2
    logp = packing.token_logprobs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(logp, tensor([0.75, 0.5]).log())


def test_kl_estimates_by_hand():
    logp, ref = tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log()
    torch.testing.assert_close(arithmetic.kl_estimate(logp, ref, "k1"), tensor([math.log(2), -math.log(2)]))
    # r = 1/2: 1/2 - 1 + log 2; r = 2: 2 - 1 - log 2
    torch.testing.assert_close(arithmetic.kl_estimate(logp, ref, "k3"), tensor([math.log(2) - 0.5, 1 - math.log(2)]))


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_both_kl_estimates_have_the_kl_as_their_mean(a, b):
    p, q = torch.tensor(a).double().log_softmax(0), torch.tensor(b).double().log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * arithmetic.kl_estimate(p, q, kind)).sum(), exact)
    assert (arithmetic.kl_estimate(p, q, "k3") >= -1e-12).all()


def test_score_lands_on_the_last_real_token():
    mask = mask_of([0, 1, 1, 0], [0, 0, 1, 1])  # the second is as long as the batch, as a cut completion is
    kl = tensor([9, 1, 2, 9], [9, 9, 3, 4])
    rewards = arithmetic.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, 9, 0], [0, 0, -1.5, 18]]


def test_completion_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no place for its score"):
        arithmetic.token_rewards(torch.ones(2), torch.zeros(2, 2), mask_of([1, 0], [0, 0]), 0.1)


def test_gae_by_hand():
    rewards, values = tensor([0, 0, 1]), tensor([0.5, 0.25, 0.5])
    advantages, returns = arithmetic.gae(rewards, values, mask_of([1, 1, 1]), gamma=0.5, lam=0.5)
    # deltas: 0.5 * 0.25 - 0.5 = -0.375; 0.5 * 0.5 - 0.25 = 0; 1 - 0.5 = 0.5
    # A_3 = 0.5; A_2 = 0 + 0.25 * 0.5 = 0.125; A_1 = -0.375 + 0.25 * 0.125 = -0.34375
    assert advantages.tolist() == [[-0.34375, 0.125, 0.5]]
    assert returns.tolist() == [[0.15625, 0.375, 1.0]]


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rewards, values, mask = tensor([9, -1, 2, 4, 9]), tensor([7, 1, 2, 3, 7]), mask_of([0, 1, 1, 1, 0])
    advantages, returns = arithmetic.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[0, 5, 6, 4, 0]]
    assert advantages.tolist() == [[0, 4, 4, 1, 0]]


def test_policy_loss_by_hand():
    # ratios 1.5, 0.5, 1.5 with clip 0.2: good made likelier is clipped, bad made rarer is clipped, bad made
    # likelier is not
    logp, old = tensor([1.5, 0.5, 1.5, 7]).log(), tensor([1, 1, 1, 1]).log()
    loss, clipped = arithmetic.policy_loss(logp, old, tensor([1, -1, -1, 5]), mask_of([1, 1, 1, 0]), clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 - 1.5) / 3)
    assert clipped.item() == pytest.approx(2 / 3)


def test_clipped_tokens_have_no_gradient():
    logp = tensor([1.5, 1.1]).log().requires_grad_()
    arithmetic.policy_loss(logp, torch.zeros(1, 2), tensor([1, 1]), mask_of([1, 1]), clip=0.2)[0].backward()
    assert logp.grad.tolist()[0] == pytest.approx([0, -1.1 / 2])


def test_value_loss_by_hand():
    # V 1.0 -> 2.0 is kept at 1.2: error 3.8 instead of 3.0 to R = 5, the larger counts; V 1 -> 1.1 is inside
    loss, clipped = arithmetic.value_loss(
        tensor([2, 1.1, 50]), tensor([1, 1, 1]), tensor([5, 1, 1]), mask_of([1, 1, 0]), clip=0.2
    )
    assert loss.item() == pytest.approx(0.5 * (3.8**2 + 0.1**2) / 2)
    assert clipped.item() == 0.5


def test_explained_variance():
    returns, mask = tensor([1, 3, 99]), mask_of([1, 1, 0])
    assert arithmetic.explained_variance(tensor([1, 3, 0]), returns, mask) == 1
    assert arithmetic.explained_variance(tensor([2, 2, 0]), returns, mask) == 0
    assert arithmetic.explained_variance(tensor([3, 1, 0]), returns, mask) == -3
    assert arithmetic.explained_variance(tensor([3, 1, 0]), tensor([2, 2, 2]), mask) == 0


def test_kl_controller_moves_at_most_two_percent_towards_the_target():
    assert arithmetic.adapt_kl_coef(0.1, kl=6.6, target=6.0) == pytest.approx(0.1 * 1.01)
    assert arithmetic.adapt_kl_coef(0.1, kl=60.0, target=6.0) == pytest.approx(0.1 * 1.02)
    assert arithmetic.adapt_kl_coef(0.1, kl=-1.0, target=6.0) == pytest.approx(0.1 * 0.98)


def test_learning_rate_rises_and_falls_linearly():
    schedule = PPOSettings(updates=6, warmup_updates=2)
    scales = [arithmetic.learning_rate_scale(update, schedule) for update in range(6)]
    assert scales == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


@given(st.lists(st.lists(st.integers(-50, 50), min_size=1, max_size=5), min_size=1, max_size=5))
def test_running_moments_equal_those_of_all_scores_at_once(parts):
    moments = arithmetic.RunningMoments()
    for part in parts:
        moments = moments.add(torch.tensor(part, dtype=torch.float32))
    everything = torch.tensor([float(x) for part in parts for x in part], dtype=torch.float64)
    assert moments.mean == pytest.approx(everything.mean().item(), abs=1e-9)
    assert moments.squares == pytest.approx(((everything - everything.mean()) ** 2).sum().item(), abs=1e-6)
    if everything.std(correction=0) > 0:
        scaled = moments.normalize(everything)
        assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
        assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_padding_changes_nothing(spans, left, right, seed):
    """Columns added on either side, whatever they hold, leave losses, rewards and advantages as they were."""
    width = max(start + length for start, length in spans)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (start, length) in enumerate(spans):
        mask[row, start : start + length] = True
    logp, old, ref, values, old_values = torch.randn(5, len(spans), width, generator=generator)
    scores = torch.randn(len(spans), generator=generator)

    def everything(mask, logp, old, ref, values, old_values):
        rewards = arithmetic.token_rewards(scores, arithmetic.kl_estimate(old, ref), mask, 0.1)
        advantages, returns = arithmetic.gae(rewards, old_values, mask, 0.9, 0.8)
        losses = arithmetic.policy_loss(logp, old, arithmetic.whiten(advantages, mask), mask, 0.2)
        losses += arithmetic.value_loss(values, old_values, returns, mask, 0.2)
        losses += (torch.tensor(arithmetic.explained_variance(old_values, returns, mask)),)
        return rewards[mask], advantages[mask], returns[mask], torch.stack(losses)

    def widen(x):
        junk = torch.full((len(spans), left), math.nan), torch.full((len(spans), right), math.inf)
        return torch.cat([junk[0], x, junk[1]], dim=1)

    wide_mask = torch.nn.functional.pad(mask, (left, right))
    tensors = (logp, old, ref, values, old_values)
    for plain, wide in zip(everything(mask, *tensors), everything(wide_mask, *map(widen, tensors)), strict=True):
        torch.testing.assert_close(plain, wide, rtol=0, atol=0)


# ---- models and batches ------------------------------------------------------------------------------------


def make_tokenizer():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_config(**changes):
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=True, **changes,
    )  # fmt: skip


def make_policy(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config()).eval()


KINDS = ["head", "model", "adapters", "adapters, one trunk"]


def make_roles(kind="head", dtype=torch.float32):
    policy, reference = make_policy().to(dtype), make_policy().to(dtype)
    if kind.startswith("adapters"):
        return Adapters(models.add_lora(policy, 4, 8, "all-linear", base="base"), share_trunk=kind != "adapters")
    return SeparateModels(policy, reference, make_policy(1).get_decoder() if kind == "model" else None)


def shuffled(roles):
    """The roles with every trained weight moved away from its start."""
    torch.manual_seed(5)
    for weights in roles.weights().values():
        for weight in weights.values():
            weight.data.add_(0.05 * torch.randn_like(weight))
    return roles


def questions(n):
    """The same question n times, new ids in every update."""
    return lambda update: [
        Problem(f"toy/train/{update * n + i}", "toy", "flip heads", "yes", "yes_no") for i in range(n)
    ]


def says_yes(problems, texts):
    """A bandit: reward for the share of the wanted word."""
    return [text.split().count("yes.") / 4 for text in texts]


def some_batch(policy):
    """Two prompts and completions of different length, the second cut by length."""
    prompts = [[0, 4, 6, 5], [0, 4, 6, 7, 7, 5]]
    samples = [
        Sample("", (8, 9, 1), (-1.0, -2.0, -3.0), "stop"),
        Sample("", (8, 9, 10, 11), (-4.0,) * 4, "length"),
    ]
    return batches.collate(prompts, samples, pad_id=2), prompts, samples


def test_collate_aligns_completions_with_the_tokens_that_predict_them():
    batch, *_ = some_batch(make_policy())
    assert batch.ids.tolist() == [[0, 4, 6, 5, 8, 9, 1, 2, 2, 2], [0, 4, 6, 7, 7, 5, 8, 9, 10, 11]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.logp[0].tolist() == [0, 0, 0, -1, -2, -3, 0, 0, 0]
    assert batch.ids[:, 1:][batch.mask].tolist() == [8, 9, 1, 8, 9, 10, 11]
    assert batch.completions == [[8, 9, 1], [8, 9, 10, 11]]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_passes_equal_one_completion_at_a_time(kind):
    roles = shuffled(make_roles(kind))
    batch, prompts, samples = some_batch(make_policy())
    tables = [table for reference in (True, False) for table in updates.logprobs_and_values(roles, batch, 2, reference)]
    if "adapters" in kind:
        peft = roles.model
        value = roles.trained[-1]
    for row, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        ids, start, real = torch.tensor([[*prompt, *drawn.token_ids]]), len(prompt) - 1, batch.mask[row]
        with torch.no_grad():
            if "adapters" in kind:  # by peft's own switches
                with peft.disable_adapter():
                    reference = peft(ids).logits
                peft.set_adapter(value)
                states = peft(ids, output_hidden_states=True).hidden_states[-1]
                peft.set_adapter("default")
                policy = peft(ids).logits
            else:
                reference, policy = make_policy()(ids).logits, roles.policy(ids).logits
                trunk = roles.policy.get_decoder() if kind == "head" else roles.value
                states = trunk(ids).last_hidden_state
            values = roles.head(states)[0, start:-1, 0]
        expected = [
            logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start:, 0] for logits in (reference, policy)
        ]
        for table, numbers in zip(tables, [expected[0], values, expected[1], values], strict=True):
            torch.testing.assert_close(table[row][real], numbers)
            assert (table[row][~real] == 0).all()
        assert not torch.allclose(*expected)


def numbered_batch(sizes, samples):
    """Completions of these sizes, `samples` of one question as neighbours, all prompts of 2 tokens."""
    prompts = [prompt for prompt in [[0, 4] for _ in range(len(sizes) // samples)] for _ in range(samples)]
    drawn = [Sample("", (7,) * size, (-1.0,) * size, "length") for size in sizes]
    return batches.collate(prompts, drawn, pad_id=2)


def test_minibatches_hold_every_completion_once_and_are_sorted_by_length():
    batch = numbered_batch([3, 7, 1, 6, 2, 5, 4], samples=1)
    parts = list(batch.minibatches(3, torch.Generator().manual_seed(0)))
    assert sorted(row for rows in parts for row in rows.tolist()) == list(range(7))
    sizes = batch.mask.sum(dim=1)
    assert sorted(sorted(sizes[rows].tolist()) for rows in parts) == [[1, 2, 3], [4, 5, 6], [7]]


@pytest.mark.parametrize(
    ("samples", "size", "together"), [(8, 16, 4), (4, 8, 4), (6, 12, 3), (4, 6, 2), (5, 10, 1), (2, 3, 1)]
)
def test_completions_of_one_question_share_its_prompt(samples, size, together):
    sizes = torch.randint(1, 9, (4 * samples,), generator=torch.Generator().manual_seed(samples)).tolist()
    batch = numbered_batch(sizes, samples)
    parts = list(batch.minibatches(size, torch.Generator().manual_seed(0)))
    assert sorted(row for rows in parts for row in rows.tolist()) == list(range(len(sizes)))
    for rows in parts:
        groups = rows.view(-1, together)
        assert (groups[:, :1] + torch.arange(together) == groups).all()  # neighbours
        assert all(batch.prompts[row] is batch.prompts[group[0]] for group in groups for row in group)
        packed = batch.pack(rows)
        assert len(packed["input_ids"]) <= len(groups)  # two groups may meet again
        assert packed["targets"].tolist() == [7] * sum(sizes[row] for row in rows)


def test_processes_divide_every_minibatch_among_them():
    batch = numbered_batch(list(range(1, 33)), samples=8)
    everyones = list(batch.minibatches(16, torch.Generator().manual_seed(3)))
    parts = [list(batch.minibatches(16, torch.Generator().manual_seed(3), slice(k, None, 2))) for k in (0, 1)]
    for whole, one, other in zip(everyones, *parts, strict=True):
        assert sorted(one.tolist() + other.tolist()) == sorted(whole.tolist()) and len(one) == len(other)


def test_rollout_carries_the_log_probabilities_of_a_training_forward():
    roles, plan = make_roles(), PPOSettings(episodes=8, samples_per_question=4, max_new_tokens=6)
    batch, samples = rollouts.rollout(roles.policy, make_tokenizer(), questions(2)(0), plan, seed=0)
    again, _ = updates.logprobs_and_values(roles, batch, 8, reference=False)
    torch.testing.assert_close(batch.logp, again, rtol=1e-5, atol=1e-5)
    assert batch.mask.sum(1).tolist() == [len(drawn.token_ids) for drawn in samples]


def measured_batch(roles):
    """A batch of 3 and 4 real tokens, with random advantages and returns."""
    batch, *_ = some_batch(roles.policy)
    batch.logp, batch.values = updates.logprobs_and_values(roles, batch, 2, reference=False)
    batch.advantages, batch.returns = torch.randn(2, *batch.mask.shape, generator=torch.Generator().manual_seed(0))
    return batch


def gradients(roles, plan, batch=None, micro_batch=0):
    """Gradients of one pass over the batch, averaged over its optimizer steps."""

    class Recorder(torch.optim.SGD):
        totals = ()

        def step(self):
            found = [weight.grad.clone() for group in self.param_groups for weight in group["params"]]
            self.totals = [a + b for a, b in zip(self.totals, found, strict=True)] if self.totals else found

    groups = [{"params": list(weights.values())} for weights in roles.weights().values()]
    recorder = Recorder(groups, lr=0.1)
    batch = batch or measured_batch(roles)
    steps = updates.optimize(devices.accelerator(), roles, recorder, batch, plan, torch.Generator(), micro_batch)[
        "steps"
    ]
    return [total / steps for total in recorder.totals]


def test_every_token_weighs_the_same_however_the_minibatches_fall():
    plans = [PPOSettings(epochs=1, minibatch=minibatch, max_grad_norm=1e9) for minibatch in (1, 2)]
    one, other = (gradients(make_roles(), plan) for plan in plans)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_gradients_of_micro_batches_add_up_to_those_of_the_minibatch(kind, micro_batch):
    """Of two minibatches with 8 completions of 1 to 6 tokens, 4 of one question."""
    roles = shuffled(make_roles(kind))
    batch = numbered_batch([3, 1, 6, 2, 5, 4, 1, 6, 2, 2, 5, 3, 4, 6, 1, 2], samples=4)
    batch.logp, batch.values = updates.logprobs_and_values(roles, batch, 8, False)
    for few, whole in zip(
        updates.logprobs_and_values(roles, batch, 8, False, micro_batch), (batch.logp, batch.values), strict=True
    ):
        torch.testing.assert_close(few, whole)
    batch.advantages, batch.returns = torch.randn(2, *batch.mask.shape, generator=torch.Generator().manual_seed(0))
    plan = PPOSettings(epochs=1, minibatch=8, max_grad_norm=1e9)
    torch.testing.assert_close(gradients(roles, plan, batch, micro_batch), gradients(roles, plan, batch))


def test_micro_batches_share_prompts():
    batch = numbered_batch([3, 1, 6, 2, 5, 4, 1, 6], samples=4)
    for micro_batch, rows, together in ((0, 2, 4), (4, 1, 4), (2, 1, 2), (1, 1, 1)):
        for minibatch in batch.minibatches(8):
            for part in batches.micro_batches(minibatch, micro_batch):
                packed = batch.pack(part)
                assert len(packed["input_ids"]) == rows and packed["rows"][-1] + 1 == rows * together


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_give_the_same_gradients(kind):
    plan = PPOSettings(epochs=1, minibatch=2, max_grad_norm=1e9)
    kept, again = shuffled(make_roles(kind)), shuffled(make_roles(kind))
    again.checkpoint_gradients()
    batch = measured_batch(kept)
    torch.testing.assert_close(gradients(kept, plan, batch), gradients(again, plan, batch))


def test_dropout_is_refused_where_activations_are_recomputed():
    roles = make_roles()
    roles.policy.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1"):
        roles.checkpoint_gradients()


# ---- training ----------------------------------------------------------------------------------------------

QUICK = PPOSettings(
    samples_per_question=4, kl_coef=0.05, lam=0.95, reward_clip=0.0,
    updates=4, episodes=16, epochs=2, minibatch=8, learning_rate=3e-3, value_learning_rate=1e-2,
    warmup_updates=1, kl_target=2.0, max_new_tokens=6, max_update_kl=0.5,
)  # fmt: skip


def run(out, plan=QUICK, kind="head", reward=says_yes, problems=None, tokenizer=None, roles=None, **options):
    """Train from the same start -> (rows, roles)."""
    roles, problems = roles or make_roles(kind), problems or questions(plan.questions)
    return loop.train(roles, reward, problems, tokenizer or make_tokenizer(), plan, out, **options), roles


def same_weights(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def without_times(rows):
    return [{name: cell for name, cell in row.items() if name not in training_log.SECONDS} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_policy_learns_the_rewarded_word(tmp_path, kind):
    plan = replace(QUICK, updates=25, episodes=32, kl_coef=0.01, kl_target=0.0)
    plan = replace(plan, learning_rate=2e-2, value_learning_rate=5e-2) if "adapters" in kind else plan
    roles = make_roles(kind)
    if "adapters" in kind:  # their head is frozen, and the logits of freshly drawn weights are all but zero
        roles.policy.get_output_embeddings().weight.data.mul_(8)
    rows, _ = run(tmp_path, plan, roles=roles)
    first, last = rows[0]["reward"], sum(row["reward"] for row in rows[-3:]) / 3
    assert first < 0.2
    assert last > 0.8
    assert rows[-1]["kl"] > rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["entropy"] < rows[0]["entropy"]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rounds_the_passes_and_not_the_weights(tmp_path, kind):
    plan = replace(QUICK, updates=2, epochs=1, minibatch=16, precision="bfloat16")
    rows, roles = run(tmp_path / "rounded", plan, kind)
    exact, _ = run(tmp_path / "exact", replace(plan, precision="float32"), kind)
    assert {weight.dtype for weight in roles.parameters()} == {torch.float32}
    for row, other in zip(rows, exact, strict=True):
        assert row["update_kl"] < 1e-6  # the old log-probabilities have the rounding of the new ones
        assert row["entropy"] == pytest.approx(other["entropy"], rel=0.05) and row["entropy"] != other["entropy"]


@pytest.mark.parametrize("kind", KINDS)
def test_value_learns_what_is_to_come(tmp_path, kind):
    """A question that begins with "flip" earns 1, another nothing: the value can know from the prompt."""

    def asked(update):
        words = ["flip heads", "heads"] * 2
        return [Problem(f"toy/train/{update * 4 + i}", "toy", word, "yes", "yes_no") for i, word in enumerate(words)]

    def pays(problems, texts):
        return [float("flip" in problem.question) for problem in problems]

    plan = replace(QUICK, updates=15, learning_rate=1e-6, value_learning_rate=1e-2, kl_coef=0.0, kl_target=0.0)
    plan = replace(plan, center_by_question=False, missing_end_penalty=0.0, value_clip=1.0)
    rows, _ = run(tmp_path, plan, kind, reward=pays, problems=asked)
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=0.01)
    last = max(row["explained_variance"] for row in rows[-3:])
    assert last > (0.95 if kind in ("model", "adapters") else 0.3)  # a linear head on the policy's states sees less


def test_large_kl_coefficient_keeps_the_policy_at_the_reference(tmp_path):
    free, _ = run(tmp_path / "free", replace(QUICK, updates=12, kl_coef=0.0, kl_target=0.0))
    held, _ = run(tmp_path / "held", replace(QUICK, updates=12, kl_coef=5.0, kl_target=0.0))
    assert held[-1]["kl"] < 0.2 * free[-1]["kl"]


def test_kl_coefficient_follows_the_kl(tmp_path):
    rows, _ = run(tmp_path)
    for row, after in pairwise(rows):
        assert after["kl_coef"] == arithmetic.adapt_kl_coef(row["kl_coef"], row["kl"], QUICK.kl_target)
    assert rows[1]["kl_coef"] == pytest.approx(QUICK.kl_coef * 0.98)  # no KL yet, so the penalty falls


def test_missing_end_is_punished(tmp_path):
    plan = replace(QUICK, updates=15, episodes=32, kl_coef=0.0, kl_target=0.0, missing_end_penalty=1.0)
    rows, _ = run(tmp_path, plan, reward=lambda problems, texts: [0.0] * len(texts))
    assert rows[0]["cut"] > 0.3
    assert rows[-1]["cut"] < 0.2 * rows[0]["cut"]


def test_update_stops_early_beyond_its_kl(tmp_path):
    plan = replace(QUICK, updates=2, epochs=5, warmup_updates=0, learning_rate=3e-2, max_update_kl=0.02)
    rows, _ = run(tmp_path, plan)
    assert 1 <= rows[0]["steps"] < plan.epochs * plan.episodes // plan.minibatch


def close(one, other):
    """Two trainings, each (rows, roles), that differ by rounding alone, at steps of up to 1e-2.

    A token at the bound of clipping may flip, and where a gradient is all but zero Adam makes much of its rounding.
    """
    for row, same in zip(without_times(one[0]), without_times(other[0]), strict=True):
        fractions = ("clip_fraction", "value_clip_fraction", "engine_gap")
        numbers = ({name: row[name] for name in row if name not in fractions} for row in (row, same))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-3, abs=1e-5)
    pairs = zip(one[1].parameters(), other[1].parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 5e-5


@pytest.mark.parametrize(
    ("kind", "hardware"),
    [
        ("head", {"micro_batch": 2}),
        ("model", {"micro_batch": 4, "gradient_checkpointing": True}),
        ("adapters", {"micro_batch": 2, "gradient_checkpointing": True, "max_batch": 3}),
        ("adapters, one trunk", {"micro_batch": 1}),
    ],
)
def test_what_the_hardware_needs_changes_nothing_but_rounding(tmp_path, kind, hardware):
    """Not even which updates stop early, and where."""
    rate = 1e-2 if "adapters" in kind else QUICK.learning_rate
    plan = replace(QUICK, epochs=3, max_update_kl=0.004, updates=3, learning_rate=rate)
    whole = run(tmp_path / "whole", plan, kind, seed=2)  # at seed 0 a gradient is all but zero
    assert len({row["steps"] for row in whole[0]}) > 1
    close(whole, run(tmp_path / "parts", plan, kind, seed=2, **hardware))


def test_no_more_rows_are_drawn_at_once_than_allowed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        rollouts,
        "sample_ids",
        lambda *given, **options: seen.append(options["max_batch"]) or sample_ids(*given, **options),
    )
    run(tmp_path, replace(QUICK, updates=2), max_batch=5)
    assert seen == [5, 5]


def test_rollout_of_another_policy_is_refused(tmp_path, monkeypatch):
    honest = rollouts.rollout

    def wrong(*args):
        batch, samples = honest(*args)
        batch.logp -= 2
        return batch, samples

    monkeypatch.setattr(loop, "rollout", wrong)
    with pytest.raises(RuntimeError, match="sample with the weights and precision that are trained"):
        run(tmp_path)


def test_log_and_examples_are_on_disk(tmp_path):
    rows, _ = run(tmp_path, examples_every=2)
    with open(tmp_path / "log.csv") as file:
        logged = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert logged == rows
    assert {"reward", "accuracy", "invalid", "kl", "entropy", "length", "clip_fraction"} <= set(rows[0])
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [example["update"] for example in examples] == [0] * 8 + [2] * 8
    assert {"id", "question", "completion", "reward", "kl", "correct"} <= set(examples[0])


def test_accuracy_is_logged_and_never_trained_on(tmp_path, monkeypatch):
    rows, roles = run(tmp_path / "a")
    verdict = answers.grade_many(questions(1)(0), ["The answer is yes."])[0]
    assert verdict.correct
    monkeypatch.setattr(loop, "grade_many", lambda problems, texts: [verdict] * len(texts))
    fooled, same = run(tmp_path / "b")
    assert [row["accuracy"] for row in fooled] == [1.0] * len(fooled) != [row["accuracy"] for row in rows]
    assert same_weights(roles, same)


# ---- resume ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def dies_at(update, error):
    """A reward that raises when it is called for the given update."""
    calls = iter(range(1000))

    def reward(problems, texts):
        if next(calls) == update:
            raise error
        return says_yes(problems, texts)

    return reward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_resumed_run_ends_bit_equal(tmp_path, kind, error):
    options = {"kind": kind, "checkpoint_every": 2, "examples_every": 1}
    rows, roles = run(tmp_path / "whole", **options)
    with pytest.raises(error):
        run(tmp_path / "killed", reward=dies_at(3, error), **options)
    saved = [folder.name for folder in (tmp_path / "killed").glob("checkpoint*")]
    assert saved == ["checkpoint-000003" if error is KeyboardInterrupt else "checkpoint-000002"]

    resumed, again = run(tmp_path / "killed", **options)
    assert without_times(resumed) == without_times(rows)
    assert same_weights(roles, again)
    assert len((tmp_path / "killed" / "log.csv").read_text().splitlines()) == 1 + QUICK.updates
    examples = [(tmp_path / name / "examples.jsonl").read_text() for name in ("whole", "killed")]
    assert examples[0] == examples[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_inside_an_update_waits_for_its_end(tmp_path, monkeypatch, number, interrupts):
    rows, roles = run(tmp_path / "whole")
    optimize = updates.optimize

    def interrupted(*args):
        os.kill(os.getpid(), number)
        return optimize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoint-000001").is_dir()
    resumed, again = run(tmp_path / "stopped")
    assert without_times(resumed) == without_times(rows)
    assert same_weights(roles, again)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_held_back_means_what_it_meant(number):
    seen, before = [], signal.getsignal(number)

    def handler(*given):
        seen.append(given[0])

    for handled, means in ((handler, [number]), (signal.SIG_IGN, [])):
        signal.signal(number, handled)
        try:
            with state.uninterrupted():
                for _ in range(2):
                    os.kill(os.getpid(), number)
                assert seen == []
            assert seen == means and signal.getsignal(number) is handled
            with pytest.raises(ZeroDivisionError), state.uninterrupted():
                seen.clear()
                1 / 0  # noqa: B018
            assert signal.getsignal(number) is handled
        finally:
            signal.signal(number, before)


def test_a_signal_that_ends_a_process_ends_it_after_the_block():
    lines = [
        "import os, signal",
        "from smlib.ppo import state",
        "with state.uninterrupted():",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    print('to the end', flush=True)",
        "print('and on')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True)
    assert done.stdout == b"to the end\n" and done.returncode == -signal.SIGTERM


def test_a_killed_run_goes_on_with_other_micro_batches(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "killed", reward=dies_at(2, Killed), checkpoint_every=2, micro_batch=4)
    close(run(tmp_path / "killed", micro_batch=2, gradient_checkpointing=True, max_batch=7), run(tmp_path / "whole"))


def test_finished_run_is_loaded_and_not_repeated(tmp_path):
    rows, roles = run(tmp_path)
    again, loaded = run(tmp_path, reward=dies_at(0, Killed))
    assert again == rows
    assert same_weights(roles, loaded)


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(StageMismatch, match=r"kl_coef = 0\.05, and now kl_coef = 0\.1 .*choose another folder"):
        run(tmp_path, replace(QUICK, kl_coef=0.1))


def test_checkpoint_that_was_not_finished_is_ignored(tmp_path):
    (tmp_path / "checkpoint-000004.tmp").mkdir()
    (tmp_path / "checkpoint-000004.tmp" / "weights.safetensors").write_bytes(b"half")
    rows, _ = run(tmp_path)
    assert len(rows) == QUICK.updates
    [checkpoint] = tmp_path.glob("checkpoint*")
    files = ["optimizer.safetensors", "state.json", "weights.safetensors"]
    assert sorted(file.name for file in checkpoint.iterdir()) == files  # and nothing that is pickled


def test_frozen_weights_stay_and_are_not_saved(tmp_path):
    roles = make_roles()
    embedding = roles.policy.get_input_embeddings().requires_grad_(False)
    before = embedding.weight.clone()
    run(tmp_path, roles=roles)
    assert torch.equal(embedding.weight, before)
    saved = load_file(tmp_path / "checkpoint-000004" / "weights.safetensors")
    assert saved and not any("embed_tokens" in name or "reference" in name for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_and_saves_its_adapters_only(tmp_path, dtype):
    roles, base = make_roles("adapters", dtype), make_policy().to(dtype)
    start = {name: weight.clone() for part in roles.weights().values() for name, weight in part.items()}
    run(tmp_path, roles=roles)
    kept = {name.replace("base_layer.", ""): weight for name, weight in roles.policy.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in base.named_parameters())
    saved = load_file(tmp_path / "checkpoint-000004" / "weights.safetensors")
    assert {name.removeprefix("model.").removeprefix("head.") for name in saved} == {
        name.removeprefix("head.") for name in start
    }
    assert all(not torch.equal(weight, start[name]) for name, weight in roles.weights()["policy"].items())


def test_adapters_are_saved_in_the_format_of_peft(tmp_path):
    """The folder is an adapter of the base, as its value/ is; together they compute what the roles did."""
    roles = shuffled(make_roles("adapters"))
    roles.save_pretrained(tmp_path)
    ids = torch.tensor([[0, 4, 6, 5, 8, 9, 1]])
    with torch.no_grad():
        logp, values = roles(packing.pack([([0, 4, 6, 5], [[8, 9, 1]])], 2))
        policy = PeftModel.from_pretrained(make_policy(), tmp_path)
        again = policy(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        value = PeftModel.from_pretrained(make_policy(), tmp_path / "value")
        head = load_file(tmp_path / "value" / "head.safetensors")
        states = value(ids, output_hidden_states=True).hidden_states[-1]
        scalars = (states @ head["weight"].T + head["bias"])[0, :-1, 0]
    torch.testing.assert_close(again[3:], logp)
    torch.testing.assert_close(scalars[3:], values)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_policy_and_value_are_saved(tmp_path, kind):
    roles = shuffled(make_roles(kind))
    roles.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same_weights(again, roles.policy)
    saved = load_file(tmp_path / "value" / "value.safetensors")
    assert saved.keys() == roles.weights()["value"].keys()
    assert all(torch.equal(saved[name], weight) for name, weight in roles.weights()["value"].items())


# ---- bad input and collapse --------------------------------------------------------------------------------


def test_pad_that_is_the_end_token_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="must exist and differ from the end token '<eos>'"):
        run(tmp_path, tokenizer=tokenizer)


def test_wrong_number_of_problems_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"problems\(0\) gave 3 problems; .* = 4"):
        run(tmp_path, problems=questions(3))


@pytest.mark.parametrize("scores", [[1.0] * 15, [float("nan")] * 16, [[1.0]] * 16])
def test_reward_that_is_not_one_finite_number_each_is_refused(tmp_path, scores):
    with pytest.raises(ValueError, match="one finite number for each"):
        run(tmp_path, reward=lambda problems, texts: scores)


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match=r"multiple of ppo\.samples_per_question"):
        PPOSettings(episodes=10, samples_per_question=4)
    with pytest.raises(ValueError, match=r"ppo\.kl_kind 'k2' is unknown; choose one of: k1, k3"):
        PPOSettings(kl_kind="k2")


def log_rows(**columns):
    length = max(len(column) for column in columns.values())
    defaults = {"invalid": [0.0] * length, "entropy": [1.0] * length, "reward": [1.0] * length}
    columns = defaults | columns
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def test_collapse_to_no_answers_is_reported():
    with pytest.raises(training_log.CollapseError, match="has an answer"):
        training_log.check_collapse(log_rows(invalid=[0.2] * 5 + [1.0] * 5))
    training_log.check_collapse(log_rows(invalid=[0.2] * 6 + [1.0] * 4))
    training_log.check_collapse(log_rows(invalid=[0.9] * 5 + [1.0] * 5))  # hardly had answers at any time


def test_collapse_of_exploration_is_reported():
    flat = [1.0] * 5 + [0.001] * 5
    with pytest.raises(training_log.CollapseError, match="no longer explores"):
        training_log.check_collapse(log_rows(entropy=flat, reward=[0.5] * 5 + [0.4] * 5))
    training_log.check_collapse(log_rows(entropy=flat, reward=[0.5] * 5 + [0.9] * 5))  # converged, not collapsed


# ---- batches at the edge -----------------------------------------------------------------------------------


def test_mask_without_a_real_token_is_refused():
    with pytest.raises(ValueError, match="no real token"):
        arithmetic.masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("samples", [[], [Sample("", (), (), "stop")]])
def test_empty_batch_and_empty_completion_are_refused(samples):
    with pytest.raises(ValueError, match="at least one token in each"):
        batches.collate([[0, 4]] * len(samples), samples, pad_id=2)


def test_the_tiny_base_learns_the_same_bits_on_one_thread_and_on_two(tmp_path):
    """Its passes are long enough for torch to share them out among threads; those of the toys here are not."""
    plan = PPOSettings(updates=1, episodes=32, warmup_updates=0)
    asked = generate("coin_flip", 2, seed=0) + generate("chain_arithmetic", 2, seed=0)
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        roles = SeparateModels(models.load_policy(), models.load_policy(), None)
        run(
            tmp_path / str(threads), plan, problems=lambda update: asked, tokenizer=models.load_tokenizer(), roles=roles
        )
        ends.append(roles.policy)
    assert same_weights(*ends) and not same_weights(ends[0], models.load_policy())


def test_equal_rewards_leave_the_policy_where_it_is(tmp_path):
    plan = replace(QUICK, kl_coef=0.0, kl_target=0.0, missing_end_penalty=0.0, value_coef=0.0)
    rows, roles = run(tmp_path, plan, reward=lambda problems, texts: [3.0] * len(texts))
    assert same_weights(roles.policy, make_policy())
    assert {row["reward"] for row in rows} == {3.0}


@pytest.mark.parametrize("kind", ["head", "model"])
def test_rationale_of_one_token(tmp_path, kind):
    """Every completion is one token, cut or EOS; there is still something to learn from."""
    plan = replace(QUICK, max_new_tokens=1, updates=8)
    rows, _ = run(tmp_path, plan, kind, reward=lambda problems, texts: [float(text == "yes.") for text in texts])
    assert {row["length"] for row in rows} == {1.0}
    assert all(math.isfinite(cell) for row in rows for cell in row.values())
    assert rows[-1]["reward"] > rows[0]["reward"]


def test_rationale_cut_at_its_limit_has_its_score_on_the_last_token(tmp_path, monkeypatch):
    seen = []
    honest = arithmetic.token_rewards

    def noted(scores, kl, mask, kl_coef):
        rewards = honest(scores, kl, mask, kl_coef)
        seen.append((scores.clone(), mask, rewards + kl_coef * kl * mask))
        return rewards

    monkeypatch.setattr(loop, "token_rewards", noted)
    plan = replace(QUICK, max_new_tokens=3, updates=1, missing_end_penalty=2.0, normalize_reward=False)
    rows, _ = run(tmp_path, plan, reward=lambda problems, texts: [0.0] * len(texts))
    scores, mask, terminal = seen[0]
    cut = scores == -2.0
    assert 0 < cut.float().mean().item() == rows[0]["cut"]
    for row in range(len(scores)):
        last = mask[row].nonzero().max()
        assert terminal[row, last].item() == pytest.approx(scores[row].item(), abs=1e-6)
        assert terminal[row].abs().sum().item() == pytest.approx(abs(scores[row].item()), abs=1e-5)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_nan_stops_with_the_batch_saved_and_the_weights_whole(tmp_path, monkeypatch, where, micro_batch):
    run(tmp_path, replace(QUICK, updates=2), checkpoint_every=1)  # so far so good
    roles = make_roles()
    shutil.rmtree(tmp_path)
    honest, bad = arithmetic.policy_loss, 10 if micro_batch else 5  # there it is the first part of the minibatch
    calls = iter(range(1000))

    def broken(logp, *others):
        loss, clipped = honest(logp, *others)
        if next(calls) == bad:  # the second optimizer step of the second update: an update has four
            loss = loss * math.nan if where == "loss" else loss + 0 * logp.sum().sqrt()
        return loss, clipped

    monkeypatch.setattr(updates, "policy_loss", broken)
    with pytest.raises(updates.NonFiniteError, match=r"update 1: .*nonfinite\.safetensors"):
        run(tmp_path, QUICK, roles=roles, checkpoint_every=1, micro_batch=micro_batch)
    assert all(weight.grad is None for weight in roles.parameters())
    saved = load_file(tmp_path / "nonfinite.safetensors")
    assert {"ids", "mask", "logp", "values", "advantages", "returns"} <= saved.keys()
    assert all(weight.isfinite().all() for weight in roles.parameters())
    assert (tmp_path / "checkpoint-000001").is_dir()
    monkeypatch.setattr(updates, "policy_loss", honest)
    rows, _ = run(tmp_path, QUICK, checkpoint_every=1)  # and goes on from there
    assert len(rows) == QUICK.updates


def several(processes):
    """As much of an accelerator of several processes as is looked at before any work."""
    return SimpleNamespace(num_processes=processes)


def test_shares_that_do_not_come_out_even_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 groups of completions in a minibatch of 8 cannot be shared by 3 processes"):
        run(tmp_path, replace(QUICK, episodes=48, minibatch=8), accelerator=several(3))
    assert list(tmp_path.iterdir()) == []
    rows, _ = run(tmp_path, replace(QUICK, episodes=20, minibatch=8, updates=1, warmup_updates=0, epochs=1))
    assert rows[0]["steps"] == 3  # one process takes what is left over in a minibatch of its own


def test_micro_batches_that_do_not_come_out_even_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"minibatch = 8 in 1 processes .* micro_batch = 3 "):
        run(tmp_path, micro_batch=3)
    with pytest.raises(ValueError, match=r"minibatch = 8 in 2 processes .* micro_batch = 8 "):
        run(tmp_path, micro_batch=8, accelerator=several(2))
    checks.check_micro_batch(QUICK, 2, 4)


def test_the_room_itself_has_what_a_notebook_calls():
    lines = [
        "import sys, smlib",
        "assert smlib.ppo.PPOSettings(updates=2).updates == 2 and 'torch' not in sys.modules",
        "from smlib import ppo",
        "from smlib.ppo import loop",
        "assert ppo is smlib.ppo and ppo.train is loop.train",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


# ---- another engine ----------------------------------------------------------------------------------------

MANY = replace(QUICK, episodes=64, minibatch=32)  # a share of the policy's way wants some tokens to be measured by


class Copy:
    """The native sampler on another copy of the base, which takes over an adapter by peft."""

    name = "copy"

    def __init__(self, seed=0, noise=0.0):
        self.seed, self.noise, self.loaded = seed, noise, 0

    def load_adapter(self, folder):
        self.model, self.loaded = PeftModel.from_pretrained(make_policy(self.seed), folder).eval(), self.loaded + 1

    def sample_ids(self, prompt_ids, n, params, *, keys):
        found = sample_ids(self.model.get_base_model(), make_tokenizer(), prompt_ids, n, params, keys=keys)
        generator = torch.Generator().manual_seed(params.seed)

        def rounded(one):
            noise = self.noise * torch.randn(len(one.logprobs), generator=generator)
            return replace(one, logprobs=tuple((torch.tensor(one.logprobs) + noise).tolist()))

        return [[rounded(one) for one in group] for group in found]


class Deaf(Copy):
    """It keeps the first adapter, which changes nothing, whatever it is handed later."""

    def load_adapter(self, folder):
        if not self.loaded:
            super().load_adapter(folder)


def drawn_ids(monkeypatch):
    """Completions of the updates to come, as lists of ids."""
    seen, collate = [], batches.collate
    monkeypatch.setattr(rollouts, "collate", lambda *given: seen.append(collate(*given)) or seen[-1])
    return seen


def test_an_engine_draws_what_the_policy_would(tmp_path, monkeypatch):
    seen, engine = drawn_ids(monkeypatch), Copy()
    native = run(tmp_path / "native", kind="adapters")
    drawn = run(tmp_path / "engine", kind="adapters", engine=engine)
    close(native, drawn)
    assert [one.completions for one in seen[:4]] == [one.completions for one in seen[4:]]
    assert all(0 <= row["engine_gap"] < 1e-5 for row in drawn[0]) and "engine_gap" not in native[0][0]
    assert engine.loaded == QUICK.updates
    files = {file.name for file in (tmp_path / "engine" / "hand-over").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(StageMismatch, match=r"made with engine = 'copy', and now engine = '\(not set\)'"):
        run(tmp_path / "engine", kind="adapters")


@pytest.mark.parametrize(("rate", "why"), [(1e-3, "seems to sample from the reference"), (3e-1, "more than 0.05")])
def test_an_engine_that_lost_the_adapter_is_caught_in_the_second_update(tmp_path, rate, why):
    roles = make_roles("adapters")
    with pytest.raises(rollouts.EngineMismatchError, match=f"update 1: .*{why}"):
        run(tmp_path, replace(MANY, learning_rate=rate, max_update_kl=9.0), roles=roles, engine=Deaf())
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2  # nothing was learned from what it drew


def test_an_engine_with_other_weights_is_caught_at_once(tmp_path):
    roles = make_roles("adapters")
    before = copy.deepcopy(roles)
    with pytest.raises(rollouts.EngineMismatchError, match=r"update 0: .* more than 0\.05: the engine must have the"):
        run(tmp_path, roles=roles, engine=Copy(seed=3))
    assert same_weights(roles, before)


def test_an_engine_that_rounds_is_no_other_one(tmp_path):
    rows, _ = run(tmp_path, replace(MANY, learning_rate=1e-4), kind="adapters", engine=Copy(noise=0.03))
    assert all(0.02 < row["engine_gap"] < 0.03 for row in rows)  # mean |x| of a normal is 0.8 deviations


@given(st.integers(0, 2**31), st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.1]))
@settings(max_examples=100, deadline=None)
def test_rounding_alone_never_looks_like_a_lost_adapter(seed, moved):
    """Policy, reference and engine each off by 0.02 nats of their own, after a way of any length; where it is long,
    the adapter's loss is seen in it."""
    generator = torch.Generator().manual_seed(seed)
    reference = -torch.rand(32, 64, generator=generator)
    policy = reference + moved * torch.randn(32, 64, generator=generator)
    logp, ref_logp, good, lost = (
        x + 0.02 * torch.randn(32, 64, generator=generator) for x in (policy, reference, policy, reference)
    )
    mask = torch.ones(32, 64, dtype=torch.bool)
    assert rollouts.engine_gap(good, logp, ref_logp, mask, 0) < 0.05
    if moved == 0.1:
        with pytest.raises(rollouts.EngineMismatchError):
            rollouts.engine_gap(lost, logp, ref_logp, mask, 0)


def test_engine_gap_by_hand():
    mask = torch.ones(1, 1024, dtype=torch.bool)
    reference, policy = torch.full((1, 1024), -2.0), torch.full((1, 1024), -1.98)
    assert rollouts.engine_gap(policy + 0.01, policy, reference, mask, 0) == pytest.approx(0.01, abs=1e-6)
    assert rollouts.engine_gap(reference, reference, reference, mask, 0) == 0  # as in the first update
    with pytest.raises(rollouts.EngineMismatchError, match=r"update 3: .* show -?0\.00 \+- 0\.03 of the policy's"):
        rollouts.engine_gap(reference.clone(), policy, reference, mask, 3)
    with pytest.raises(rollouts.EngineMismatchError, match=r"update 3: .* 0\.06 nats per token"):
        rollouts.engine_gap(policy + 0.06, policy, reference, mask, 3)
    with pytest.raises(rollouts.EngineMismatchError):
        rollouts.engine_gap(policy * math.nan, policy, reference, mask, 3)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_an_engine_for_whole_models_is_refused(tmp_path, kind):
    with pytest.raises(
        ValueError, match="'copy' can load adapters, but not all weights of SeparateModels: train with LoRA"
    ):
        run(tmp_path, kind=kind, engine=Copy())


def test_an_engine_for_several_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'copy' samples for one process, not for 2: sample with the native"):
        run(tmp_path, kind="adapters", engine=Copy(), accelerator=several(2))
