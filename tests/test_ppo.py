"""PPO: arithmetic against numbers worked out by hand, padding that never counts, learning, exact resume."""

import csv
import json
import math
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from smlib import ppo
from smlib.ppo import PPOSettings
from smlib.problems import Problem
from smlib.sampling import Sample

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
    assert ppo.masked_mean(x, mask) == 3
    # mean 3, variance (4 + 0 + 4) / 3
    step = 2 / math.sqrt(8 / 3)
    torch.testing.assert_close(ppo.whiten(x, mask), tensor([-step, 0, 0], [step, 0, 0]))


def test_whitening_equal_numbers_gives_zeros():
    assert ppo.whiten(tensor([7, 7]), mask_of([1, 1])).tolist() == [[0, 0]]


def test_clip_scores_by_hand():
    scores = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    assert ppo.clip_scores(scores, 1.0).tolist() == [-1.0, -0.5, 0.0, 1.0]
    assert ppo.clip_scores(scores, 0.0).tolist() == scores.tolist()


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [2.0, 2.0]]])  # p = 1/4, 3/4; then 1/2, 1/2
    logp = ppo.token_logprobs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(logp, tensor([0.75, 0.5]).log())


def test_kl_estimates_by_hand():
    logp, ref = tensor([0.5, 0.25]).log(), tensor([0.25, 0.5]).log()
    torch.testing.assert_close(ppo.kl_estimate(logp, ref, "k1"), tensor([math.log(2), -math.log(2)]))
    # r = 1/2: 1/2 - 1 + log 2; r = 2: 2 - 1 - log 2
    torch.testing.assert_close(ppo.kl_estimate(logp, ref, "k3"), tensor([math.log(2) - 0.5, 1 - math.log(2)]))


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_both_kl_estimates_have_the_kl_as_their_mean(a, b):
    p, q = torch.tensor(a).double().log_softmax(0), torch.tensor(b).double().log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * ppo.kl_estimate(p, q, kind)).sum(), exact)
    assert (ppo.kl_estimate(p, q, "k3") >= -1e-12).all()


def test_score_lands_on_the_last_real_token():
    mask = mask_of([0, 1, 1, 0], [0, 0, 1, 1])  # the second is as long as the batch, as a cut completion is
    kl = tensor([9, 1, 2, 9], [9, 9, 3, 4])
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, 9, 0], [0, 0, -1.5, 18]]


def test_completion_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no place for its score"):
        ppo.token_rewards(torch.ones(2), torch.zeros(2, 2), mask_of([1, 0], [0, 0]), 0.1)


def test_gae_by_hand():
    rewards, values = tensor([0, 0, 1]), tensor([0.5, 0.25, 0.5])
    advantages, returns = ppo.gae(rewards, values, mask_of([1, 1, 1]), gamma=0.5, lam=0.5)
    # deltas: 0.5 * 0.25 - 0.5 = -0.375; 0.5 * 0.5 - 0.25 = 0; 1 - 0.5 = 0.5
    # A_3 = 0.5; A_2 = 0 + 0.25 * 0.5 = 0.125; A_1 = -0.375 + 0.25 * 0.125 = -0.34375
    assert advantages.tolist() == [[-0.34375, 0.125, 0.5]]
    assert returns.tolist() == [[0.15625, 0.375, 1.0]]


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rewards, values, mask = tensor([9, -1, 2, 4, 9]), tensor([7, 1, 2, 3, 7]), mask_of([0, 1, 1, 1, 0])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[0, 5, 6, 4, 0]]
    assert advantages.tolist() == [[0, 4, 4, 1, 0]]


def test_policy_loss_by_hand():
    # ratios 1.5, 0.5, 1.5 with clip 0.2: good made likelier is clipped, bad made rarer is clipped, bad made
    # likelier is not
    logp, old = tensor([1.5, 0.5, 1.5, 7]).log(), tensor([1, 1, 1, 1]).log()
    loss, clipped = ppo.policy_loss(logp, old, tensor([1, -1, -1, 5]), mask_of([1, 1, 1, 0]), clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 - 1.5) / 3)
    assert clipped.item() == pytest.approx(2 / 3)


def test_clipped_tokens_have_no_gradient():
    logp = tensor([1.5, 1.1]).log().requires_grad_()
    ppo.policy_loss(logp, torch.zeros(1, 2), tensor([1, 1]), mask_of([1, 1]), clip=0.2)[0].backward()
    assert logp.grad.tolist()[0] == pytest.approx([0, -1.1 / 2])


def test_value_loss_by_hand():
    # V 1.0 -> 2.0 is kept at 1.2: error 3.8 instead of 3.0 to R = 5, the larger counts; V 1 -> 1.1 is inside
    loss, clipped = ppo.value_loss(
        tensor([2, 1.1, 50]), tensor([1, 1, 1]), tensor([5, 1, 1]), mask_of([1, 1, 0]), clip=0.2
    )
    assert loss.item() == pytest.approx(0.5 * (3.8**2 + 0.1**2) / 2)
    assert clipped.item() == 0.5


def test_explained_variance():
    returns, mask = tensor([1, 3, 99]), mask_of([1, 1, 0])
    assert ppo.explained_variance(tensor([1, 3, 0]), returns, mask) == 1
    assert ppo.explained_variance(tensor([2, 2, 0]), returns, mask) == 0
    assert ppo.explained_variance(tensor([3, 1, 0]), returns, mask) == -3
    assert ppo.explained_variance(tensor([3, 1, 0]), tensor([2, 2, 2]), mask) == 0


def test_kl_controller_moves_at_most_two_percent_towards_the_target():
    assert ppo.adapt_kl_coef(0.1, kl=6.6, target=6.0) == pytest.approx(0.1 * 1.01)
    assert ppo.adapt_kl_coef(0.1, kl=60.0, target=6.0) == pytest.approx(0.1 * 1.02)
    assert ppo.adapt_kl_coef(0.1, kl=-1.0, target=6.0) == pytest.approx(0.1 * 0.98)


def test_learning_rate_rises_and_falls_linearly():
    schedule = PPOSettings(updates=6, warmup_updates=2)
    scales = [ppo.learning_rate_scale(update, schedule) for update in range(6)]
    assert scales == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


@given(st.lists(st.lists(st.integers(-50, 50), min_size=1, max_size=5), min_size=1, max_size=5))
def test_running_moments_equal_those_of_all_scores_at_once(parts):
    moments = ppo.RunningMoments()
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
        rewards = ppo.token_rewards(scores, ppo.kl_estimate(old, ref), mask, 0.1)
        advantages, returns = ppo.gae(rewards, old_values, mask, 0.9, 0.8)
        losses = ppo.policy_loss(logp, old, ppo.whiten(advantages, mask), mask, 0.2)
        losses += ppo.value_loss(values, old_values, returns, mask, 0.2)
        losses += (torch.tensor(ppo.explained_variance(old_values, returns, mask)),)
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
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
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


def make_value(kind, policy):
    if kind == "head":
        return ppo.value_head(policy)
    torch.manual_seed(1)
    return LlamaForTokenClassification(tiny_config(num_labels=1)).eval()


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
    return ppo.collate(prompts, samples, pad_id=2), prompts, samples


def test_collate_aligns_completions_with_the_tokens_that_predict_them():
    batch, *_ = some_batch(make_policy())
    assert batch.ids.tolist() == [[0, 4, 6, 5, 8, 9, 1, 2, 2, 2], [0, 4, 6, 7, 7, 5, 8, 9, 10, 11]]
    assert batch.mask.int().tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.logp[0].tolist() == [0, 0, 0, -1, -2, -3, 0, 0, 0]
    assert batch.ids[:, 1:][batch.mask].tolist() == [8, 9, 1, 8, 9, 10, 11]
    assert batch.lengths.tolist() == [7, 10]


def test_padding_on_the_right_needs_no_attention_mask():
    policy = make_policy()
    batch, *_ = some_batch(policy)
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        without, given = policy(batch.ids).logits, policy(batch.ids, attention_mask=real.long()).logits
    torch.testing.assert_close(without[real], given[real], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(without[~real], given[~real])  # the padding itself does differ


@pytest.mark.parametrize("kind", ["head", "model"])
def test_forward_passes_equal_one_completion_at_a_time(kind):
    policy = make_policy()
    value = make_value(kind, policy)
    if kind == "head":
        torch.nn.init.normal_(value.weight)
    batch, prompts, samples = some_batch(policy)
    ref_logp, values = ppo.reference_and_values(policy, policy, value, batch, size=2)
    for row, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        ids = torch.tensor([[*prompt, *drawn.token_ids]])
        with torch.no_grad():
            output = policy(ids, output_hidden_states=True)
            scalar = value(output.hidden_states[-1]) if kind == "head" else value(ids).logits
        logp = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        start, real = len(prompt) - 1, batch.mask[row]
        torch.testing.assert_close(ref_logp[row][real], logp[start:])
        torch.testing.assert_close(values[row][real], scalar[0, start:-1, 0])
        assert (ref_logp[row][~real] == 0).all() and (values[row][~real] == 0).all()


def test_minibatches_hold_every_completion_once_and_are_sorted_by_length():
    lengths = torch.tensor([5, 9, 3, 8, 4, 7, 6])
    batch = ppo.Batch(torch.zeros(7, 9), torch.zeros(7, 8), torch.zeros(7, 8), lengths)
    parts = list(batch.minibatches(3, torch.Generator().manual_seed(0)))
    assert sorted(row for rows, _ in parts for row in rows.tolist()) == list(range(7))
    assert sorted((sorted(lengths[rows].tolist()), width) for rows, width in parts) == [
        ([3, 4, 5], 4),
        ([6, 7, 8], 7),
        ([9], 8),
    ]


def test_rollout_carries_the_log_probabilities_of_a_training_forward():
    policy, plan = make_policy(), PPOSettings(episodes=8, samples_per_question=4, max_new_tokens=6)
    batch, samples = ppo.rollout(policy, make_tokenizer(), questions(2)(0), plan, seed=0)
    again, _ = ppo.reference_and_values(policy, policy, ppo.value_head(policy), batch, size=8)
    torch.testing.assert_close(batch.logp, again, rtol=1e-5, atol=1e-5)
    assert batch.mask.sum(1).tolist() == [len(drawn.token_ids) for drawn in samples]


def test_every_token_weighs_the_same_however_the_minibatches_fall():
    policy = make_policy()
    value = ppo.value_head(policy)
    batch, *_ = some_batch(policy)  # 3 and 4 real tokens
    batch.logp, batch.values = ppo.reference_and_values(policy, policy, value, batch, size=2)
    batch.advantages, batch.returns = torch.randn(2, *batch.mask.shape, generator=torch.Generator().manual_seed(0))

    class Recorder(torch.optim.SGD):
        total = 0

        def step(self):
            self.total = self.total + policy.lm_head.weight.grad

    gradients = []
    for minibatch in (1, 2):
        plan = PPOSettings(epochs=1, minibatch=minibatch, max_grad_norm=1e9)
        recorder = Recorder([*policy.parameters(), *value.parameters()], lr=0.1)
        steps = ppo.optimize(policy, value, recorder, batch, plan, torch.Generator())["steps"]
        gradients.append(recorder.total / steps)
    torch.testing.assert_close(*gradients)


# ---- training ----------------------------------------------------------------------------------------------

QUICK = PPOSettings(
    samples_per_question=4, kl_coef=0.05, lam=0.95, reward_clip=0.0,
    updates=4, episodes=16, epochs=2, minibatch=8, learning_rate=3e-3, value_learning_rate=1e-2,
    warmup_updates=1, kl_target=2.0, max_new_tokens=6, max_update_kl=0.5,
)  # fmt: skip


def run(out, plan=QUICK, kind="head", reward=says_yes, problems=None, tokenizer=None, **options):
    """Train from the same start -> (rows, policy, value)."""
    policy, reference = make_policy(), make_policy()
    value = make_value(kind, policy)
    problems = problems or questions(plan.questions)
    tokenizer = tokenizer or make_tokenizer()
    rows = ppo.train(policy, reference, value, reward, problems, tokenizer, plan, out, **options)
    return rows, policy, value


def without_times(rows):
    return [{name: cell for name, cell in row.items() if name not in ppo.SECONDS} for row in rows]


@pytest.mark.parametrize("kind", ["head", "model"])
def test_policy_learns_the_rewarded_word(tmp_path, kind):
    plan = replace(QUICK, updates=25, episodes=32, kl_coef=0.01, kl_target=0.0)
    rows, *_ = run(tmp_path, plan, kind)
    first, last = rows[0]["reward"], sum(row["reward"] for row in rows[-3:]) / 3
    assert first < 0.2
    assert last > 0.8
    assert rows[-1]["kl"] > rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    assert max(row["explained_variance"] for row in rows) > 0.3


def test_large_kl_coefficient_keeps_the_policy_at_the_reference(tmp_path):
    free, *_ = run(tmp_path / "free", replace(QUICK, updates=12, kl_coef=0.0, kl_target=0.0))
    held, *_ = run(tmp_path / "held", replace(QUICK, updates=12, kl_coef=5.0, kl_target=0.0))
    assert held[-1]["kl"] < 0.2 * free[-1]["kl"]


def test_kl_coefficient_follows_the_kl(tmp_path):
    rows, *_ = run(tmp_path)
    for row, after in pairwise(rows):
        assert after["kl_coef"] == ppo.adapt_kl_coef(row["kl_coef"], row["kl"], QUICK.kl_target)
    assert rows[1]["kl_coef"] == pytest.approx(QUICK.kl_coef * 0.98)  # no KL yet, so the penalty falls


def test_missing_end_is_punished(tmp_path):
    plan = replace(QUICK, updates=15, episodes=32, kl_coef=0.0, kl_target=0.0, missing_end_penalty=1.0)
    rows, *_ = run(tmp_path, plan, reward=lambda problems, texts: [0.0] * len(texts))
    assert rows[0]["cut"] > 0.3
    assert rows[-1]["cut"] < 0.2 * rows[0]["cut"]


def test_update_stops_early_beyond_its_kl(tmp_path):
    plan = replace(QUICK, updates=2, epochs=5, warmup_updates=0, learning_rate=3e-2, max_update_kl=0.02)
    rows, *_ = run(tmp_path, plan)
    assert 1 <= rows[0]["steps"] < plan.epochs * plan.episodes // plan.minibatch


def test_rollout_of_another_policy_is_refused(tmp_path, monkeypatch):
    honest = ppo.rollout

    def wrong(*args):
        batch, samples = honest(*args)
        batch.logp -= 2
        return batch, samples

    monkeypatch.setattr(ppo, "rollout", wrong)
    with pytest.raises(RuntimeError, match="sample with the weights and the precision that train"):
        run(tmp_path)


def test_log_and_examples_are_on_disk(tmp_path):
    rows, *_ = run(tmp_path, examples_every=2)
    with open(tmp_path / "log.csv") as file:
        logged = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert logged == rows
    assert {"reward", "accuracy", "invalid", "kl", "entropy", "length", "clip_fraction"} <= set(rows[0])
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [example["update"] for example in examples] == [0] * 8 + [2] * 8
    assert {"id", "question", "completion", "reward", "kl", "correct"} <= set(examples[0])


def test_accuracy_is_logged_and_never_trained_on(tmp_path, monkeypatch):
    rows, policy, _ = run(tmp_path / "a")
    verdict = ppo.grade_many(["The answer is yes."], questions(1)(0))[0]
    assert verdict.correct
    monkeypatch.setattr(ppo, "grade_many", lambda texts, problems: [verdict] * len(texts))
    fooled, same, _ = run(tmp_path / "b")
    assert [row["accuracy"] for row in fooled] == [1.0] * len(fooled) != [row["accuracy"] for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), same.parameters(), strict=True))


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


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
def test_resumed_run_ends_bit_equal(tmp_path, kind, error):
    options = {"kind": kind, "checkpoint_every": 2, "examples_every": 1}
    rows, policy, value = run(tmp_path / "whole", **options)
    with pytest.raises(error):
        run(tmp_path / "killed", reward=dies_at(3, error), **options)
    saved = [folder.name for folder in (tmp_path / "killed").glob("checkpoint*")]
    assert saved == ["checkpoint-000003" if error is KeyboardInterrupt else "checkpoint-000002"]

    resumed, policy_again, value_again = run(tmp_path / "killed", **options)
    assert without_times(resumed) == without_times(rows)
    for one, other in ((policy, policy_again), (value, value_again)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert len((tmp_path / "killed" / "log.csv").read_text().splitlines()) == 1 + QUICK.updates
    examples = [(tmp_path / name / "examples.jsonl").read_text() for name in ("whole", "killed")]
    assert examples[0] == examples[1]


def test_interrupt_inside_an_update_waits_for_its_end(tmp_path, monkeypatch):
    rows, policy, _ = run(tmp_path / "whole")
    optimize = ppo.optimize

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return optimize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "optimize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoint-000001").is_dir()
    resumed, policy_again, _ = run(tmp_path / "stopped")
    assert without_times(resumed) == without_times(rows)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), policy_again.parameters(), strict=True))


def test_finished_run_is_loaded_and_not_repeated(tmp_path):
    rows, policy, _ = run(tmp_path)
    again, loaded, _ = run(tmp_path, reward=dies_at(0, Killed))
    assert again == rows
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), loaded.parameters(), strict=True))


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"kl_coef = 0\.05, not 0\.1"):
        run(tmp_path, replace(QUICK, kl_coef=0.1))


def test_checkpoint_that_was_not_finished_is_ignored(tmp_path):
    (tmp_path / "checkpoint.tmp").mkdir()
    (tmp_path / "checkpoint.tmp" / "policy.safetensors").write_bytes(b"half")
    rows, *_ = run(tmp_path)
    assert len(rows) == QUICK.updates


def test_frozen_weights_stay_and_are_not_saved(tmp_path):
    policy, reference = make_policy(), make_policy()
    policy.get_input_embeddings().requires_grad_(False)
    value = ppo.value_head(policy)
    before = policy.get_input_embeddings().weight.clone()
    ppo.train(policy, reference, value, says_yes, questions(4), make_tokenizer(), QUICK, tmp_path)
    assert torch.equal(policy.get_input_embeddings().weight, before)
    saved = ppo.load_file(tmp_path / "checkpoint-000004" / "policy.safetensors")
    assert saved and "model.embed_tokens.weight" not in saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_and_saves_its_adapters_only(tmp_path, dtype):
    policy = get_peft_model(make_policy().to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    base = policy.get_base_model().model.embed_tokens.weight.clone()
    start = {name: weight.clone() for name, weight in policy.named_parameters() if weight.requires_grad}
    reference, value = make_policy().to(dtype), ppo.value_head(policy)
    ppo.train(policy, reference, value, says_yes, questions(4), make_tokenizer(), QUICK, tmp_path)
    assert torch.equal(policy.get_base_model().model.embed_tokens.weight, base)
    saved = ppo.load_file(tmp_path / "checkpoint-000004" / "policy.safetensors")
    assert saved.keys() == start.keys() and all("lora" in name for name in saved)
    assert any(not torch.equal(saved[name], start[name]) for name in saved)


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
    with pytest.raises(ValueError, match="multiple of samples_per_question"):
        PPOSettings(episodes=10, samples_per_question=4)
    with pytest.raises(ValueError, match="'k1' or 'k3'"):
        PPOSettings(kl_kind="k2")


def log_rows(**columns):
    length = max(len(column) for column in columns.values())
    defaults = {"invalid": [0.0] * length, "entropy": [1.0] * length, "reward": [1.0] * length}
    columns = defaults | columns
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def test_collapse_to_no_answers_is_reported():
    with pytest.raises(ppo.CollapseError, match="has an answer"):
        ppo.check_collapse(log_rows(invalid=[0.2] * 5 + [1.0] * 5))
    ppo.check_collapse(log_rows(invalid=[0.2] * 6 + [1.0] * 4))
    ppo.check_collapse(log_rows(invalid=[0.9] * 5 + [1.0] * 5))  # hardly had answers at any time


def test_collapse_of_exploration_is_reported():
    flat = [1.0] * 5 + [0.001] * 5
    with pytest.raises(ppo.CollapseError, match="explores no more"):
        ppo.check_collapse(log_rows(entropy=flat, reward=[0.5] * 5 + [0.4] * 5))
    ppo.check_collapse(log_rows(entropy=flat, reward=[0.5] * 5 + [0.9] * 5))  # converged, not collapsed
