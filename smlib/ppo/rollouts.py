"""Rollouts: the completions of one update, who draws them, and what they earn.

A completion is drawn at temperature 1 from the whole distribution, as the ratio of PPO is about the distribution that
was sampled. It earns the reward's score, which is made comparable first: centred by question, normalised by the running
mean and deviation of all scores, clipped, and less a penalty where the completion was cut by its length. None of the
four is in PPO's paper, and each is a setting.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smlib.errors import UsageError, UserError
from smlib.files.atomic import replacing
from smlib.judging.answers import Reward
from smlib.learning.reward_model import score_samples
from smlib.ppo.arithmetic import RunningMoments, center, clip_scores
from smlib.ppo.batches import Batch, collate, local_share
from smlib.ppo.roles import Adapters
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem
from smlib.sampling.encoding import encode_question
from smlib.sampling.params import Sample, SamplingParams
from smlib.sampling.sampler import MAX_BATCH, sample_ids

ENGINE_TOLERANCE = 0.05  # nats per token; two programs that round to bfloat16 by themselves are 0.01 to 0.02 apart
LEAST_SHARE = 0.25  # of the policy's way from the reference that an engine must show


class PolicyEngine(Protocol):
    """Another program that draws from the policy, such as `vllm_engine.VLLMEngine` on the adapters' base."""

    name: str

    def load_adapter(self, folder: Path) -> None:
        """From now on draw from the base with the adapter in `folder` (peft's format)."""

    def sample_ids(
        self, prompt_ids: list[list[int]], n: int, params: SamplingParams, *, keys: list[str]
    ) -> list[list[Sample]]: ...


def rollout(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], settings: PPOSettings,
    seed: int, max_batch: int = MAX_BATCH, engine: PolicyEngine | None = None,
) -> tuple[Batch, list[Sample]]:  # fmt: skip
    """Draw `settings.samples_per_question` completions for each problem: B in all, those of one question neighbours.

    By our own sampler, at most `max_batch` at once, or by an engine that has been handed the policy. The batch has the
    log-probabilities of the drawing, and neither values nor advantages yet.
    """
    prompts = [encode_question(tokenizer, problem) for problem in problems]
    draw, params = drawer(policy, tokenizer, max_batch, engine), rollout_params(settings, seed)
    keys = [problem.id for problem in local_share(problems)]
    drawn = draw(local_share(prompts), settings.samples_per_question, params, keys=keys)
    samples = gather_object([one for group in drawn for one in group])
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_question)]
    return collate(repeated, samples, tokenizer.pad_token_id, policy.device), samples


def drawer(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch: int, engine: PolicyEngine | None):
    """Who draws, a function like `sampler.sample_ids` without model and tokenizer."""
    return engine.sample_ids if engine else partial(sample_ids, policy, tokenizer, max_batch=max_batch)


def rollout_params(settings: PPOSettings, seed: int) -> SamplingParams:
    """How the completions of an update are drawn."""
    return SamplingParams(temperature=1.0, max_new_tokens=settings.max_new_tokens, seed=seed)


def hand_over(roles: Adapters, engine: PolicyEngine, folder: Path) -> None:
    """Let the engine draw from the policy as it is now: write its adapter into `folder`, and have it read there."""
    with replacing(folder) as tmp:
        roles.save_policy(tmp)
    engine.load_adapter(folder)


class EngineMismatchError(UserError, RuntimeError):
    """A rollout was not drawn from the policy that trains."""


def engine_gap(drawn: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, update: int) -> float:
    """Mean |log p by the engine - log p by the policy| of the tokens that the engine drew, in nats; all [B, T].

    Raises EngineMismatchError where it exceeds ENGINE_TOLERANCE, and where the engine seems to draw from the reference:
    with d = policy - reference and e = engine - reference over the N real tokens, e.d / d.d is the share of the
    policy's way that the engine shows, about 1, or 0 where the adapter got lost. (Where rounding is more than the way,
    it is 1/2 in both cases, and nobody knows.) Four standard errors above it must be LEAST_SHARE or more.
    """
    drawn, logp, ref_logp = drawn[mask], logp[mask], ref_logp[mask]
    gap, way = drawn - logp, logp - ref_logp
    found, length = gap.abs().mean().item(), way.norm().item()
    advice = (
        "the engine must have the weights that are trained, in the same precision, and load the adapter that it is "
        "given before every rollout; or sample with the native engine."
    )
    if not found <= ENGINE_TOLERANCE:
        raise EngineMismatchError(
            f"update {update}: the engine's log-probabilities of its samples differ from the policy's by {found:.3g} "
            f"nats per token, more than {ENGINE_TOLERANCE}: {advice}"
        )
    if length:
        share = 1 + (gap @ way).item() / length**2
        error = gap.square().mean().sqrt().item() / length
        if share + 4 * error < LEAST_SHARE:
            raise EngineMismatchError(
                f"update {update}: the engine's log-probabilities show {share:.2f} +- {error:.2f} of the policy's "
                f"change since the reference, so it seems to sample from the reference ({found:.3g} nats per token "
                f"from the policy): {advice}"
            )
    return found


def shape_scores(
    scores: Tensor, samples: list[Sample], moments: RunningMoments, settings: PPOSettings
) -> tuple[Tensor, RunningMoments]:
    """What a completion earns, besides the KL it pays: scores [B] -> [B], and the moments with these scores in them."""
    centred = center(scores, settings.samples_per_question) if settings.center_by_question else scores
    moments = moments.add(centred)
    return earned(centred, samples, moments, settings), moments


def earned(centred: Tensor, samples: list[Sample], moments: RunningMoments, settings: PPOSettings) -> Tensor:
    """What completions with these centred scores [N] earn: [N]."""
    shaped = clip_scores(moments.normalize(centred) if settings.normalize_reward else centred, settings.reward_clip)
    cut = torch.tensor([drawn.finish_reason == "length" for drawn in samples], device=centred.device)
    return shaped - settings.missing_end_penalty * cut


def earned_by_others(
    scores: Tensor, others: Tensor, samples: list[Sample], moments: RunningMoments, settings: PPOSettings
) -> Tensor:
    """What the other completions of a completion's question earn on average, centred as it is itself: [B].

    others [B]: what was taken from each score to centre it.
    """
    count = settings.samples_per_question
    groups = torch.arange(len(scores), device=scores.device).view(-1, count)
    pairs = scores[groups][:, None, :] - others[groups][:, :, None]  # [question, itself, other]
    repeated = [samples[other] for group in groups.tolist() for _ in group for other in group]
    found = earned(pairs.flatten(), repeated, moments, settings).view_as(pairs)
    own = found.diagonal(dim1=1, dim2=2)
    return ((found.sum(2) - own) / (count - 1)).flatten()


def seed_of_update(seed: int, update: int) -> int:
    """The seed of all that an update draws. It depends on nothing before it, so a resumed run draws the same."""
    return seed * 1_000_003 + update


def questions_of_update(problems: Callable[[int], list[Problem]], update: int, settings: PPOSettings) -> list[Problem]:
    """The problems of an update; UsageError if their number is not that of the settings."""
    asked = problems(update)
    if len(asked) != settings.questions:
        raise UsageError(
            f"problems({update}) gave {len(asked)} problems; give episodes / samples_per_question = "
            f"{settings.questions}"
        )
    return asked


def reward_scores(reward: Reward, problems: list[Problem], samples: list[Sample]) -> list[float]:
    """The reward of each completion; UsageError if it is not one finite number for each."""
    scores = torch.tensor(score_samples(reward, problems, samples), dtype=torch.float32)
    if scores.shape != (len(samples),) or not scores.isfinite().all():
        raise UsageError(
            f"the reward gave shape {tuple(scores.shape)} with {int(scores.isfinite().sum())} finite numbers "
            f"for {len(samples)} completions; give one finite number for each"
        )
    return scores.tolist()
