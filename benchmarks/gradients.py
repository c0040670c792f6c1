"""How long, and how true, are the gradients of PPO, RLOO and GRPO? Writes results/gradients.csv.

    python benchmarks/gradients.py --seed 10

One model, the SFT model of the run runs/PRESET-TASK-seedSEED, writes the completions of some updates; stages 01 to 03
are made where they are missing. Every method takes its own advantages of the same completions and the same scores (PPO
without a value, as its head begins at zero), and its own mean: over tokens for PPO, over completions of the sum of
their tokens for RLOO, of the mean of their tokens for GRPO.

Rows "norm": the norm of a minibatch's gradient, value the median, low and high the least and the greatest. PPO's
minibatches are those of its trainer, whole questions; those of the others are completions in random order, as TRL's.
Rows "cosine": that of the gradient of one update's completions with that of all completions of other updates, whose
scores count as RLOO counts them; the mean over updates with its t interval. "RLOO, scores as they are" does not clip
them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import variants
from ablations import write
from torch import Tensor

from smlib.files.artifacts import require
from smlib.judging.answers import Reward
from smlib.ppo import arithmetic, batches, rollouts
from smlib.ppo.batches import Batch
from smlib.reports.evaluation import mean_interval
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings, preset
from smlib.sampling import models
from smlib.sampling.packing import packed_logprobs

COLUMNS = ("seed", "method", "metric", "value", "low", "high", "n")
UNCLIPPED = "RLOO, scores as they are"


def draw(policy, reward: Reward, tokenizer, settings: Settings, updates: int) -> list[tuple[Batch, Tensor, Tensor]]:
    """The completions of some updates [B], their scores [B], and what these are shaped to [B]."""
    plan, asked, moments, found = settings.ppo, questions.ppo_problems(settings), arithmetic.RunningMoments(), []
    for update in range(updates):
        seed = rollouts.seed_of_update(settings.seed, update)
        batch, samples = rollouts.rollout(policy, tokenizer, asked(update), plan, seed)
        problems = [problem for problem in asked(update) for _ in range(plan.samples_per_question)]
        scores = torch.tensor(rollouts.reward_scores(reward, problems, samples))
        shaped, moments = rollouts.shape_scores(scores, samples, moments, plan)
        found.append((batch, scores, shaped))
    return found


def weights_of_tokens(batch: Batch, scores: Tensor, shaped: Tensor, count: int) -> dict[str, Tensor]:
    """Method -> what each token's log-probability is weighed with, [B, T]; the policy is still its reference."""
    nothing, tokens = torch.zeros_like(batch.logp), batch.mask.sum(dim=1, keepdim=True)
    rewards = arithmetic.token_rewards(shaped, nothing, batch.mask, 0.0)
    advantages, _ = arithmetic.gae(rewards, nothing, batch.mask, 1.0, 1.0)
    groups = shaped.view(-1, count)
    ranked = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)
    each = {
        "RLOO": arithmetic.center(shaped, count)[:, None],
        "GRPO": ranked.view(-1, 1) / tokens,
        UNCLIPPED: arithmetic.center(scores, count)[:, None],
    }
    weights = {name: (value * batch.mask) / len(batch.ids) for name, value in each.items()}
    return {"PPO": arithmetic.whiten(advantages, batch.mask) / tokens.sum()} | weights


def gradient(policy, batch: Batch, weights: Tensor, rows: Tensor) -> Tensor:
    """Of the sum over the tokens of these rows [R] of weights [B, T] times log-probabilities: one flat vector."""
    for some in rows.split(16):
        logp = batches.unpack(packed_logprobs(policy, batch.pack(some)), batch.mask[some])
        (logp * weights[some]).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    policy.zero_grad(set_to_none=True)
    return found


def measure(policy, drawn: list, settings: Settings) -> dict[tuple[str, str], list[float]]:
    """(method, "norm" or "cosine") -> its values. The first half of the updates is what cosines are taken with."""
    plan, half = settings.ppo, len(drawn) // 2
    everything, parts = torch.arange(plan.episodes), plan.episodes // plan.minibatch
    weighed = [weights_of_tokens(*one, plan.samples_per_question) for one in drawn]
    target = sum(
        gradient(policy, batch, weights["RLOO"], everything)
        for (batch, *_), weights in zip(drawn[:half], weighed[:half], strict=True)
    )
    found: dict[tuple[str, str], list[float]] = {}
    for (batch, *_), weights in zip(drawn[half:], weighed[half:], strict=True):
        for method, weight in weights.items():
            whole = gradient(policy, batch, weight, everything)
            cosine = torch.nn.functional.cosine_similarity(whole, target, dim=0)
            found.setdefault((method, "cosine"), []).append(float(cosine))
            generator = torch.Generator().manual_seed(0)
            some = batch.minibatches(plan.minibatch, generator) if method == "PPO" else None
            for rows in some or torch.randperm(plan.episodes, generator=generator).split(plan.minibatch):
                norm = float(gradient(policy, batch, weight, rows).norm()) * parts
                found.setdefault((method, "norm"), []).append(norm)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--updates", type=int, default=32, help="updates whose completions are drawn (default 32)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("gradients.csv"))
    args = parser.parse_args()
    settings = preset(args.preset, args.task, args.seed)
    run = shared.run_folder("", args.preset, args.task, args.seed)
    self_motivated.before_policy(run, settings)
    tuned, rewarder = require(run, "02_sft"), require(run, "03_reward_model")
    policy, tokenizer = models.load_policy(tuned.path("model")), shared.load_tokenizer(settings)
    reward = self_motivated.make_reward("learned", tuned, rewarder, tokenizer)
    drawn = draw(policy, reward, tokenizer, settings, args.updates)
    rows = []
    for (method, metric), values in sorted(measure(policy, drawn, settings).items()):
        middle = np.median(values) if metric == "norm" else np.mean(values)
        ends = (min(values), max(values)) if metric == "norm" else mean_interval(values)
        numbers = [round(float(number), 3) for number in (middle, *ends)]
        rows.append(dict(zip(COLUMNS, (args.seed, method, metric, *numbers, len(values)), strict=True)))
        print(rows[-1], flush=True)
    write(rows, COLUMNS, args.out)


if __name__ == "__main__":
    main()
