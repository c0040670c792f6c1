"""Which step does PPO blame? Is the first wrong step of a rationale the one with the lowest advantage?

    python benchmarks/credit.py --seeds 0 1 2 3 4

It takes the two policies of benchmarks/policies.py that differ in their value (a head on the policy's trunk, or the
mean of rollouts from each step's end), and trains those that are missing. Each policy writes rationales for fresh
questions of the train split, and the advantages are computed as in an update. The step checker finds the first wrong
step; no training uses it. Chance is the mean of 1 / number of steps. Writes results/credit.csv, with Wilson intervals
over rationales, which are somewhat too narrow, since rationales of one question are alike. explained_variance is that
of the returns by the values, on the same rationales.
"""

import argparse
from pathlib import Path

import policies
import torch
import variants
from ablations import write

from smlib.files.artifacts import Stage, require
from smlib.learning import exploration
from smlib.learning.reward_model import score_samples
from smlib.ppo import arithmetic, prefix_values, rollouts, state, updates
from smlib.ppo.arithmetic import RunningMoments
from smlib.reports import evaluation, pits
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings

COLUMNS = ("policy", "seed", "rationales", "lowest", "low", "high", "chance", "explained_variance")
NAMES = (policies.OWN, "PPO, values by rollouts")
DRAWN = 9_000_000  # the seed of the rationales, which no update has


def credit(stage: Stage, settings: Settings, each: int) -> dict:
    """The numbers of a trained policy, on `each` questions per task."""
    tuned, rewarder = (require(stage.folder.parent, name) for name in ("02_sft", "03_reward_model"))
    tokenizer, plan = shared.load_tokenizer(settings), settings.ppo
    roles = state.trained_roles(self_motivated.make_roles(settings, tuned, rewarder), stage.path("training"))
    reward = self_motivated.make_reward("learned", tuned, rewarder, tokenizer, roles)
    asked = questions.fresh_problems(settings, each)
    problems = [problem for problem in asked for _ in range(plan.samples_per_question)]
    batch, samples = rollouts.rollout(roles.policy, tokenizer, asked, plan, DRAWN)
    scores = torch.tensor(score_samples(reward, problems, samples), device=batch.mask.device)
    shaped, moments = rollouts.shape_scores(scores, samples, RunningMoments(), plan)
    ref_logp, batch.values = updates.logprobs_and_values(roles, batch, plan.minibatch, reference=True)
    kl = arithmetic.kl_estimate(batch.logp, ref_logp, plan.kl_kind)
    rewards = arithmetic.token_rewards(shaped, kl, batch.mask, plan.kl_coef)
    if plan.value == "rollouts":
        found = prefix_values.values_by_rollouts(
            roles.policy, tokenizer, reward, batch, problems, samples, scores, moments, plan, DRAWN
        )
        batch.values = found.values
        advantages, returns = found.advantages(rewards, batch.mask, plan.lam)
    else:
        advantages, returns = arithmetic.gae(rewards, batch.values, batch.mask, plan.gamma, plan.lam)
    lowest, chances = [], []
    for row, (problem, sample) in enumerate(zip(problems, samples, strict=True)):
        stepped = exploration.split(tokenizer, problem, batch.prompts[row], sample.token_ids)
        if (wrong := pits.wrong_step(tokenizer, stepped)) and len(stepped.ends) > 1:
            parts = advantages[row, batch.mask[row]].tensor_split(stepped.ends)[: len(stepped.ends)]
            lowest.append(min(range(len(parts)), key=lambda step: parts[step].mean()) == wrong - 1)
            chances.append(1 / len(parts))
    low, high = evaluation.accuracy_interval(sum(lowest), len(lowest))
    explained = arithmetic.explained_variance(batch.values, returns, batch.mask)
    numbers = (sum(lowest) / len(lowest), low, high, sum(chances) / len(chances), explained)
    return dict(zip(COLUMNS[2:], (len(lowest), *(round(float(number), 4) for number in numbers)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=40, help="questions per task (default 40)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("credit.csv"))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for name in NAMES:
            stage, settings = policies.trained(args.preset, args.task, seed, name)
            rows.append({"policy": name, "seed": seed} | credit(stage, settings, args.questions))
            print(rows[-1], flush=True)
        write(rows, COLUMNS, args.out)


if __name__ == "__main__":
    main()
