"""RLOO and GRPO: PPO's completions, scores and log; the papers' advantages; learning, exact resume, no trace left."""

import copy
import csv
import json
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ppo import Killed, dies_at, make_policy, make_tokenizer, questions, says_yes
from trl import GRPOTrainer, RLOOTrainer

from smlib.files.artifacts import StageMismatch
from smlib.judging import answers
from smlib.ppo import arithmetic, rloo_grpo, rollouts, training_log, updates
from smlib.ppo.settings import PPOSettings
from smlib.problems.prompts import open_prompt
from smlib.sampling.encoding import encode_prompt

QUICK = PPOSettings(
    samples_per_question=4, kl_coef=0.05, reward_clip=0.0, updates=4, episodes=16, epochs=2, minibatch=8,
    learning_rate=3e-3, warmup_updates=1, max_new_tokens=6,
)  # fmt: skip
BARE = {"center_by_question": False, "normalize_reward": False, "missing_end_penalty": 0.0}

both = pytest.mark.parametrize("method", ["rloo", "grpo"])


def run(method, out, plan=QUICK, policy=None, reward=says_yes, problems=None, tokenizer=None, **options):
    """Train from the same start -> (rows, policy)."""
    policy = policy or make_policy()
    problems, tokenizer = problems or questions(plan.questions), tokenizer or make_tokenizer()
    return rloo_grpo.train(policy, reward, problems, tokenizer, plan, out, method=method, **options), policy


def lora_policy():
    torch.manual_seed(0)
    return get_peft_model(make_policy(), LoraConfig(r=4, target_modules="all-linear"))


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(a, b) for (name, a), (again, b) in pairs)


def without_times(rows):
    return [{name: cell for name, cell in row.items() if name not in training_log.SECONDS} for row in rows]


@pytest.fixture
def minibatches(monkeypatch):
    """What TRL's loss is computed from, minibatch by minibatch: [(trainer, inputs)]."""
    seen = []

    def recorded(compute_loss):
        def record(trainer, model, inputs, *args):
            seen.append((trainer, inputs))
            return compute_loss(trainer, model, inputs, *args)

        return record

    change_loss(monkeypatch, recorded)
    return seen


def change_loss(monkeypatch, change):
    """Replace the loss of both of TRL's trainers."""
    for trainer in (RLOOTrainer, GRPOTrainer):
        monkeypatch.setattr(trainer, "compute_loss", change(trainer.compute_loss))


def advantages(minibatches):
    """Advantages of one update's completions, in the order drawn."""
    found = {}
    for _, one in minibatches:
        found |= zip(one["row"].tolist(), one["advantages"].tolist(), strict=True)
    return torch.tensor([found[row] for row in sorted(found)])


# ---- what is drawn, scored and compared --------------------------------------------------------------------


@both
def test_completions_scores_and_tokens_are_those_of_ppo(method, tmp_path, minibatches):
    asked, plan = [], replace(QUICK, updates=1, epochs=1)
    run(method, tmp_path, plan, reward=lambda *given: asked.append(given) or says_yes(*given), seed=7)
    _, samples = rollouts.rollout(make_policy(), make_tokenizer(), questions(4)(0), plan, seed=7 * 1_000_003)
    repeated = [problem for problem in questions(4)(0) for _ in range(4)]
    assert asked == [(repeated, [one.text for one in samples])]

    ids = {}
    for _, one in minibatches:
        for place, row in enumerate(one["row"].tolist()):
            parts = [one[f"{part}_ids"][place][one[f"{part}_mask"][place].bool()] for part in ("prompt", "completion")]
            ids[row] = tuple(part.tolist() for part in parts)
    assert ids == {
        row: (encode_prompt(make_tokenizer(), open_prompt(repeated[row])), list(one.token_ids))
        for row, one in enumerate(samples)
    }
    assert ids[0][0].count(0) == 1  # <bos>


@both
def test_log_probabilities_are_those_of_trls_own_pass(method, tmp_path, monkeypatch):
    trainer_class, compared = rloo_grpo.METHODS[method][0], []
    ours = trainer_class._get_per_token_logps_and_entropies
    theirs = trainer_class.__mro__[2]._get_per_token_logps_and_entropies

    def compare(trainer, model, *args, **kwargs):
        found = ours(trainer, model, *args, **kwargs)
        expected = theirs(trainer, trainer.policy if model == "reference" else model, *args, **kwargs)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        compared.append(torch.is_grad_enabled())
        return found

    monkeypatch.setattr(trainer_class, "_get_per_token_logps_and_entropies", compare)
    run(method, tmp_path, replace(QUICK, updates=1))
    assert compared == [False, False, True, True, True, True]  # policy and reference before the first step


@both
def test_kl_is_in_nats_per_completion(method, tmp_path):
    weights, policy = [], make_policy()

    def reward(problems, completions):
        weights.append(copy.deepcopy(policy.state_dict()))
        return says_yes(problems, completions)

    rows, _ = run(
        method,
        tmp_path,
        replace(QUICK, updates=3, learning_rate=2 * QUICK.learning_rate),
        policy,
        reward,
        examples_every=1,
    )
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(rows[2]["kl"]) > 0.01  # its estimate may be negative
    then = make_policy()
    then.load_state_dict(weights[2])
    batch, _ = rollouts.rollout(then, make_tokenizer(), questions(4)(2), QUICK, seed=2)
    sums = []
    for model in (then, make_policy()):
        with torch.no_grad():
            logp = model(batch.ids).logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
        sums.append(logp.where(batch.mask, 0.0).sum(1))
    assert rows[2]["kl"] == pytest.approx((sums[0] - sums[1]).mean().item(), rel=1e-3)
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert examples[-8]["kl"] == pytest.approx((sums[0] - sums[1])[0].item(), rel=1e-3, abs=1e-5)


def numbered(scores):
    return lambda problems, texts: scores


def test_advantages_of_rloo_by_hand(tmp_path, minibatches):
    plan = replace(QUICK, updates=1, epochs=1, kl_coef=0.0, **BARE)
    run("rloo", tmp_path, plan, reward=numbered([1.0, 0.0, 0.0, 2.0] + [0.5] * 12))
    # each less the mean of the other three: 1 - 2/3, 0 - 1, 0 - 1, 2 - 1/3
    torch.testing.assert_close(advantages(minibatches), torch.tensor([1 / 3, -1, -1, 5 / 3] + [0.0] * 12))


def test_advantages_of_grpo_by_hand(tmp_path, minibatches):
    plan = replace(QUICK, updates=1, epochs=1, kl_coef=0.0, **BARE)
    run("grpo", tmp_path, plan, reward=numbered([1.0, 0.0, 0.0, 1.0] + [0.5] * 12))
    step = 0.5 / (1 / 3) ** 0.5  # mean 1/2, squared deviations 4 * 1/4 over 3
    expected = torch.tensor([step, -step, -step, step] + [0.0] * 12)
    torch.testing.assert_close(advantages(minibatches), expected, rtol=1e-3, atol=0)


@both
def test_equal_scores_teach_nothing(method, tmp_path):
    plan = replace(QUICK, kl_coef=0.0, **BARE)
    _, policy = run(method, tmp_path, plan, reward=numbered([0.5] * 16))
    assert same_weights(policy, make_policy())


def test_rloo_takes_the_kl_from_the_score(tmp_path, minibatches):
    plan = replace(QUICK, updates=2, epochs=1, warmup_updates=0, kl_coef=0.5, **BARE)
    run("rloo", tmp_path, plan, reward=says_yes)
    trainer = minibatches[-1][0]
    earned = torch.tensor([float(x) for x in trainer.scores]) - 0.5 * (trainer.drawn.logp - trainer.ref_logp).sum(1)
    assert (trainer.drawn.logp - trainer.ref_logp).abs().max() > 0.01
    torch.testing.assert_close(advantages(minibatches[2:]), arithmetic.center(earned, 4))


# ---- training ----------------------------------------------------------------------------------------------


@both
def test_policy_learns_the_rewarded_word(method, tmp_path):
    rows, _ = run(method, tmp_path, replace(QUICK, updates=16, episodes=32, kl_coef=0.01))
    assert rows[0]["reward"] < 0.2
    assert sum(row["reward"] for row in rows[-3:]) / 3 > 0.8
    assert rows[-1]["kl"] > 1 and rows[-1]["entropy"] < rows[0]["entropy"]


@pytest.mark.parametrize(("method", "make"), [("rloo", make_policy), ("grpo", lora_policy)])
def test_recomputing_activations_changes_nothing(method, make, tmp_path):
    plain, _ = run(method, tmp_path / "plain", policy=make())
    again, policy = run(method, tmp_path / "again", policy=make(), gradient_checkpointing=True)
    numbers = [[[row[name] for name in ("reward", "kl", "policy_loss")] for row in rows] for rows in (plain, again)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-4, atol=1e-5)
    assert not policy.is_activation_checkpointing


@both
def test_micro_batches_change_nothing(method, tmp_path):
    whole, _ = run(method, tmp_path / "whole")
    parts, _ = run(method, tmp_path / "parts", micro_batch=2, max_batch=3)
    numbers = [[[row[name] for name in ("reward", "kl", "policy_loss")] for row in rows] for rows in (whole, parts)]
    torch.testing.assert_close(*map(torch.tensor, numbers), rtol=1e-4, atol=1e-5)


@both
def test_large_kl_coefficient_keeps_the_policy_at_the_reference(method, tmp_path):
    free, _ = run(method, tmp_path / "free", replace(QUICK, updates=8, kl_coef=0.0))
    held, _ = run(method, tmp_path / "held", replace(QUICK, updates=8, kl_coef=5.0))
    assert abs(held[-1]["kl"]) < 0.3 * free[-1]["kl"]


def test_missing_end_is_punished(tmp_path):
    plan = replace(QUICK, updates=15, episodes=32, kl_coef=0.0)
    rows, _ = run("rloo", tmp_path, plan, reward=lambda problems, texts: [0.0] * len(texts))
    assert rows[0]["cut"] > 0.3
    assert rows[-1]["cut"] < 0.2 * rows[0]["cut"]


@both
def test_log_and_examples_are_on_disk_with_the_columns_of_ppo(method, tmp_path):
    rows, _ = run(method, tmp_path, replace(QUICK, kl_target=2.0), examples_every=2)
    with open(tmp_path / "log.csv") as file:
        assert [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)] == rows
    assert set(rows[0]) == {
        "update", "reward", "accuracy", "invalid", "kl", "entropy", "length", "tokens", "cut", "kl_coef",
        "policy_loss", "clip_fraction", "steps", "learning_rate", *training_log.SECONDS,
    }  # fmt: skip
    assert [row["steps"] for row in rows] == [4] * 4
    assert [row["tokens"] for row in rows] == [row["length"] * 16 for row in rows]
    assert [row["learning_rate"] for row in rows] == pytest.approx([3e-3, 3e-3, 2e-3, 1e-3])
    for row, after in pairwise(rows):
        assert after["kl_coef"] == arithmetic.adapt_kl_coef(row["kl_coef"], row["kl"], 2.0)
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [example["update"] for example in examples] == [0] * 8 + [2] * 8
    assert {"id", "question", "completion", "reward", "kl", "correct"} <= set(examples[0])


def test_learning_rate_of_the_log_is_the_optimizers(tmp_path, minibatches):
    rows, _ = run("grpo", tmp_path, replace(QUICK, updates=3, epochs=1))
    assert len(minibatches) == 6
    history = minibatches[0][0].state.log_history
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([row["learning_rate"] for row in rows])


def test_accuracy_is_logged_and_never_trained_on(tmp_path, monkeypatch):
    rows, policy = run("rloo", tmp_path / "a")
    verdict = answers.grade_many(questions(1)(0), ["The answer is yes."])[0]
    monkeypatch.setattr(rloo_grpo, "grade_many", lambda problems, texts: [verdict] * len(texts))
    fooled, same = run("rloo", tmp_path / "b")
    assert [row["accuracy"] for row in fooled] == [1.0] * len(fooled) != [row["accuracy"] for row in rows]
    assert same_weights(policy, same)


@both
@pytest.mark.parametrize("make", [make_policy, lora_policy])
def test_nothing_of_trl_is_left_behind(method, make, tmp_path, capfd):
    policy, before = make(), make()
    names = list(before.state_dict())
    run(method, tmp_path, policy=policy, progress=None)
    assert capfd.readouterr() == ("", "")
    assert list(policy.state_dict()) == names and not any(module.training for module in policy.modules())
    assert not any("forward" in vars(module) for module in policy.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-16", "examples.jsonl", "log.csv"]
    trains = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trains == [name for name, weight in before.named_parameters() if weight.requires_grad]
    after, start = dict(policy.named_parameters()), dict(before.named_parameters())
    assert all(torch.equal(after[name], start[name]) == (name not in trains) for name in start)


def test_lora_starts_at_its_own_reference_even_where_it_is_not_the_base(tmp_path):
    policy = lora_policy()
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    rows, _ = run("grpo", tmp_path, policy=policy)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 1e-3


# ---- resume ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("make", "error"), [(make_policy, Killed), (make_policy, KeyboardInterrupt), (lora_policy, Killed)]
)
def test_resumed_run_ends_bit_equal(method, make, error, tmp_path):
    options = {"plan": replace(QUICK, kl_target=2.0), "checkpoint_every": 2, "examples_every": 1}
    rows, policy = run(method, tmp_path / "whole", policy=make(), **options)
    with pytest.raises(error):
        run(method, tmp_path / "killed", policy=make(), reward=dies_at(3, error), **options)
    saved = [folder.name for folder in (tmp_path / "killed").glob("checkpoint*")]
    assert saved == ["checkpoint-12" if error is KeyboardInterrupt else "checkpoint-8"]

    torch.manual_seed(123)  # whatever the process drew before
    resumed, again = run(method, tmp_path / "killed", policy=make(), **options)
    assert without_times(resumed) == without_times(rows)
    assert same_weights(policy, again)
    assert len((tmp_path / "killed" / "log.csv").read_text().splitlines()) == 1 + QUICK.updates
    examples = [(tmp_path / name / "examples.jsonl").read_text() for name in ("whole", "killed")]
    assert examples[0] == examples[1]


@both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_inside_an_update_waits_for_its_end(method, tmp_path, monkeypatch, number, interrupts):
    rows, policy = run(method, tmp_path / "whole")

    def interrupted(compute_loss):
        def compute(*args):
            os.kill(os.getpid(), number)
            return compute_loss(*args)

        return compute

    with monkeypatch.context() as patch:
        change_loss(patch, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(method, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoint-4" / rloo_grpo.STATE_FILE).is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed, again = run(method, tmp_path / "stopped")
    assert without_times(resumed) == without_times(rows) and same_weights(policy, again)


@both
def test_finished_run_is_loaded_and_not_repeated(method, tmp_path):
    rows, policy = run(method, tmp_path)
    again, loaded = run(method, tmp_path, reward=dies_at(0, Killed))
    assert again == rows and same_weights(policy, loaded)


def test_checkpoint_that_was_not_finished_is_ignored(tmp_path):
    (tmp_path / "checkpoint-16.tmp").mkdir()
    (tmp_path / "checkpoint-16.tmp" / "model.safetensors").write_bytes(b"half")
    rows, _ = run("rloo", tmp_path)
    assert len(rows) == QUICK.updates
    assert [folder.name for folder in tmp_path.glob("checkpoint*")] == ["checkpoint-16"]


@both
def test_checkpoint_of_other_settings_is_refused(method, tmp_path):
    run(method, tmp_path, replace(QUICK, updates=1))
    with pytest.raises(StageMismatch, match=r"kl_coef = 0\.05, and now kl_coef = 0\.1 .*choose another folder"):
        run(method, tmp_path, replace(QUICK, updates=1, kl_coef=0.1))
    with pytest.raises(StageMismatch, match=f"made with method = '{method}'"):
        run("grpo" if method == "rloo" else "rloo", tmp_path, replace(QUICK, updates=1))


# ---- bad input ---------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="method 'ppo' is unknown; choose one of: rloo, grpo"):
        run("ppo", tmp_path)
    with pytest.raises(ValueError, match="minibatch = 12; make it one"):
        run("rloo", tmp_path, replace(QUICK, minibatch=12))
    with pytest.raises(ValueError, match=r"at least 2 generations"):
        run("grpo", tmp_path, replace(QUICK, samples_per_question=1, center_by_question=False))
    policy = make_policy()
    policy.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.1 must be 0"):
        run("grpo", tmp_path, policy=policy)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="must exist and differ from the end token '<eos>'"):
        run("grpo", tmp_path, tokenizer=tokenizer)


def test_wrong_number_of_problems_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"problems\(0\) gave 3 problems; .* = 4"):
        run("grpo", tmp_path, problems=questions(3))


@pytest.mark.parametrize("scores", [[1.0] * 15, [float("nan")] * 16])
def test_reward_that_is_not_one_finite_number_each_is_refused(scores, tmp_path):
    with pytest.raises(ValueError, match="one finite number for each"):
        run("rloo", tmp_path, reward=numbered(scores))


@both
def test_loss_that_is_not_finite_ends_training(method, tmp_path, monkeypatch):
    def broken(compute_loss):
        return lambda trainer, model, *args: next(model.parameters()).sum() * float("nan")

    change_loss(monkeypatch, broken)
    with pytest.raises(updates.NonFiniteError, match=r"in update 0: .* lower learning_rate"):
        run(method, tmp_path)
