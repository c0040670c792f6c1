"""Values by Monte Carlo, in place of a value that is learned (VinePPO, Kazemnejad et al. 2024, 2410.01679).

From the end of every step of a completion the policy writes k others, and the value there is the mean of what these
earn. What the next step does to that value is the step's credit: so a wrong step has a lower advantage than what stands
before it, which one score at the end cannot say. The steps and their prefixes are those of Self-Explore's exploration.

It needs no value model and no training, and it costs k completions for each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smlib.judging.answers import Reward
from smlib.learning.exploration import SteppedRationale, split
from smlib.ppo.arithmetic import RunningMoments, center, gae_of_steps
from smlib.ppo.batches import Batch, autocast
from smlib.ppo.rollouts import PolicyEngine, drawer, earned, earned_by_others, reward_scores, rollout_params
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem
from smlib.sampling.devices import process_state
from smlib.sampling.encoding import decode
from smlib.sampling.params import Sample, SamplingParams
from smlib.sampling.sampler import MAX_BATCH

Draw = Callable[..., list[list[Sample]]]  # prompt ids, n, params, keys= -> samples, as `sampler.sample_ids`
Score = Callable[[list[Problem], list[Sample]], list[float]]
# scores [N] of these completions of the prefixes of a row -> what they earn [N]
Shape = Callable[[Tensor, list[Sample], int], Tensor]


@dataclass(frozen=True)
class PrefixValues:
    """values [B, T]: of the prefix at whose end the token's step begins. steps [B, T]: the number of the token's step,
    from 0; the answer sentence is the last one. tokens: that were drawn for it."""

    values: Tensor
    steps: Tensor
    tokens: int

    def advantages(self, rewards: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        """Advantages of the steps, and the returns that the values foretell, those of lam = 1: all [B, T]."""
        advantages, _ = gae_of_steps(rewards, self.values, self.steps, mask, lam)
        _, returns = gae_of_steps(rewards, self.values, self.steps, mask, 1.0)
        return advantages, returns


def values_by_rollouts(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reward: Reward, batch: Batch, problems: list[Problem],
    samples: list[Sample], scores: Tensor, moments: RunningMoments, settings: PPOSettings, seed: int,
    max_batch: int = MAX_BATCH, engine: PolicyEngine | None = None,
) -> PrefixValues:  # fmt: skip
    """The values of the prefixes of an update's B completions, in the unit of their shaped scores.

    batch, samples: what `rollouts.rollout` drew; scores [B]: as the reward gave them; moments: with these in them. What
    is drawn from a prefix is centred as the completion itself is: by the other samples of its question, whose mean is
    the value of the bare question.
    """
    others = scores - center(scores, settings.samples_per_question) if settings.center_by_question else 0 * scores
    engine_or_sampler = drawer(policy, tokenizer, max_batch, engine)

    def draw(*arguments, **options):
        with autocast(settings, policy.device):  # as the completions were drawn; they were scored without
            return engine_or_sampler(*arguments, **options)

    return prefix_values(
        draw,
        partial(reward_scores, reward),
        lambda found, drawn, row: earned(found.to(others.device) - others[row], drawn, moments, settings),
        tokenizer, problems, batch.prompts, samples, batch.mask,
        earned_by_others(scores, others, samples, moments, settings), settings.value_samples,
        rollout_params(settings, seed),
    )  # fmt: skip


def prefix_values(
    draw: Draw, score: Score, shape: Shape, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem],
    prompts: Sequence[list[int]], samples: Sequence[Sample], mask: Tensor, first: Tensor, k: int,
    params: SamplingParams,
) -> PrefixValues:  # fmt: skip
    """The values of all prefixes of B completions at their steps' ends.

    first [B]: the values of the bare questions, for which there are completions already. mask [B, T]: the real tokens.
    Equal prefixes of one question are completed once.
    """
    stepped = [
        split(tokenizer, problem, prompt, sample.token_ids)
        for problem, prompt, sample in zip(problems, prompts, samples, strict=True)
    ]
    ends = [[end for end in one.ends if end < len(one.ids)] for one in stepped]
    places = {
        one.key(step): (one, step) for one, at in zip(stepped, ends, strict=True) for step in range(1, len(at) + 1)
    }
    state = process_state()
    mine = list(places)[state.process_index :: state.num_processes]
    drawn = draw([_prompt(*places[key]) for key in mine], k, params, keys=mine) if mine else []
    limit = params.max_new_tokens
    whole = [
        [_joined(tokenizer, *places[key], one, limit) for one in group] for key, group in zip(mine, drawn, strict=True)
    ]
    asked = [places[key][0].problem for key in mine for _ in range(k)]
    scores = score(asked, [one for group in whole for one in group]) if mine else []
    parts = [scores[start : start + k] for start in range(0, len(scores), k)]
    completed = {key: found for key, *found in gather_object(list(zip(mine, whole, parts, strict=True)))}

    values = torch.zeros(mask.shape, device=mask.device)
    steps = torch.zeros(mask.shape, dtype=torch.long, device=mask.device)
    for row, (one, at) in enumerate(zip(stepped, ends, strict=True)):
        found = [completed[one.key(step)] for step in range(1, len(at) + 1)]
        worth = [shape(torch.tensor(scores), group, row).mean().cpu() for group, scores in found]
        numbers = torch.bucketize(torch.arange(len(one.ids)), torch.tensor(at), right=True)
        values[row, mask[row]] = torch.stack([first[row].cpu(), *worth])[numbers].to(mask.device)
        steps[row, mask[row]] = numbers.to(mask.device)
    tokens = sum(len(one.logprobs) for group, _ in completed.values() for one in group)
    return PrefixValues(values, steps, tokens)


def _prompt(rationale: SteppedRationale, step: int) -> list[int]:
    return [*rationale.prompt_ids, *rationale.prefix(step)]


def _joined(tokenizer, rationale: SteppedRationale, step: int, sample: Sample, limit: int) -> Sample:
    """A prefix and its completion as one sample, cut where the policy's own would be."""
    ids = (*rationale.prefix(step), *sample.token_ids)
    reason = "length" if len(ids) > limit else sample.finish_reason
    return Sample(decode(tokenizer, ids[:limit]), ids[:limit], sample.logprobs, reason)
