"""Token-level PPO for rationales with a learned reward (stage 04).

One update, in the order of the code:

    rollout -> score -> reference log-probs, values -> per-token rewards -> GAE -> minibatches -> log row

Four roles: the *policy* that learns, the frozen *reference* it may not stray far from (the SFT model), the
*reward* that scores a finished text, and the *value* that predicts from every prefix the reward to come
(`smlib.roles` has the ways to hold them).

Shapes. B completions with their prompts are padded on the right to L tokens: `ids [B, L]`. Everything per
token is `[B, T]` with T = L - 1: column t speaks of the token ids[:, t + 1], predicted from ids[:, : t + 1].
`mask [B, T]` (bool) is True where that token belongs to the completion, its EOS included; these are the
*real* tokens. Prompt and padding are False and never count. Log-probabilities and KL are in nats.

Sources: PPO, Schulman et al. 2017 (1707.06347); GAE, Schulman et al. 2015 (1506.02438); PPO for language,
KL penalty and its controller, Ziegler et al. 2019 (1909.08593); k1 and k3, Schulman, "Approximating KL
divergence" (2020, joschu.net/blog/kl-approx.html).
"""

import csv
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.state_dict import StateDictOptions

from smlib import checkpoints, models
from smlib.answers import Reward, grade_many
from smlib.declared import Declared, Passes, Rate, Rows, RowsOrZero, Samples, ShareOrZero, Size, SizeOrZero, Tokens
from smlib.encoding import encode_question
from smlib.errors import UsageError, UserError
from smlib.files import replacing, write_text
from smlib.models import CONTINUATIONS_PER_ROW, group_size, launched, pack, pad_right
from smlib.problems import Problem
from smlib.progress import progress_bar
from smlib.reward_model import score_samples
from smlib.roles import Adapters, Roles, gathered
from smlib.sampling import MAX_BATCH, Sample, sample_ids

ALL = slice(None)
MAX_QUESTIONS = 1_000_000  # of a whole training: a slip that asks more would fill the memory with them
ENGINE_TOLERANCE = 0.05  # nats per token; two programs that round to bfloat16 by themselves are 0.01 to 0.02 apart
LEAST_SHARE = 0.25  # of the policy's way from the reference that an engine must show
SECONDS = ("rollout_seconds", "score_seconds", "update_seconds")  # phases in the log


@dataclass(frozen=True)
class PPOSettings(Declared):
    """Rollouts are always drawn at temperature 1: PPO's ratio is about the distribution that was sampled."""

    value: Literal["head", "model"] = "head"  # on the policy's trunk; or a trunk, or with LoRA an adapter, of its own
    updates: Rows = 60
    episodes: Rows = 128  # completions per update
    samples_per_question: Samples = 8  # of them, from the same question: the more, the better centred
    epochs: Passes = 1  # over the completions of one update
    minibatch: Rows = 16  # completions per optimizer step
    learning_rate: Rate = 2.5e-4
    value_learning_rate: Rate = 5e-4  # of the value head, and of its own trunk
    warmup_updates: RowsOrZero = 3  # linear warm-up, then linear decay to zero
    kl_coef: SizeOrZero = 0.08  # reward lost per nat of KL to the reference
    kl_target: SizeOrZero = 0.0  # nats per completion that kl_coef is steered to; 0 = kl_coef stays fixed
    kl_kind: Literal["k1", "k3"] = "k1"
    gamma: ShareOrZero = 1.0
    lam: ShareOrZero = 1.0  # below 1 a reward at the end hardly reaches the early steps, unless the value sees them
    clip: Size = 0.2
    value_clip: Size = 0.2
    value_coef: SizeOrZero = 0.1
    max_grad_norm: Size = 1.0  # of the policy and of the value, each by itself
    max_new_tokens: Tokens = 128
    missing_end_penalty: SizeOrZero = 1.0  # taken from the reward of a completion that was cut by its length
    center_by_question: bool = True  # score minus the mean score of the question's other samples (as in RLOO)
    normalize_reward: bool = True  # by the running mean and deviation of all scores so far
    reward_clip: SizeOrZero = 1.0  # bound on the size of a shaped score, so that outliers do not rule; 0 = none
    max_update_kl: Size = 0.05  # nats per token between the sampling policy and the new one; then stop early
    precision: Literal["float32", "bfloat16"] = "float32"  # of both passes; "bfloat16" where the hardware gains from it

    def __post_init__(self):
        super().__post_init__()
        if self.episodes % self.samples_per_question:
            raise UsageError(
                f"ppo.episodes = {self.episodes} is no multiple of ppo.samples_per_question = "
                f"{self.samples_per_question}; make it one, so that every question gets all its samples."
            )
        if self.center_by_question and self.samples_per_question < 2:
            raise UsageError(
                "ppo.center_by_question = True needs ppo.samples_per_question of at least 2; raise it, or give False."
            )
        if (asked := self.updates * self.questions) > MAX_QUESTIONS:
            raise UsageError(
                f"ppo.updates = {self.updates} with {self.questions} questions each asks {asked:,}, and at most "
                f"{MAX_QUESTIONS:,} are allowed: lower ppo.updates or ppo.episodes, or raise ppo.samples_per_question"
            )

    @property
    def questions(self) -> int:
        """Different questions in one update."""
        return self.episodes // self.samples_per_question


# ---- the arithmetic, one small function per equation -------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the real tokens: x, mask [B, T] -> scalar."""
    real = x[mask]
    if not len(real):
        raise ValueError("there is no real token to take a mean of: the mask is False everywhere.")
    return real.mean()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the real tokens, 0 elsewhere: x, mask [B, T] -> [B, T]."""
    real = x[mask]
    white = (x - real.mean()) / (real.std(correction=0) + 1e-8)
    return white.where(mask, 0.0)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Estimate of KL(policy || reference) at each token that the policy drew: [B, T], [B, T] -> [B, T].

    With r = p_ref / p:  k1 = -log r,  k3 = r - 1 - log r.  Both have the KL as their mean; k1 may be
    negative, k3 may not and varies less while the two policies are close.
    """
    log_r = ref_logp - logp
    return -log_r if kind == "k1" else log_r.exp() - 1 - log_r


def center(scores: Tensor, samples: int) -> Tensor:
    """Each score minus the mean of the other samples' scores of its question: scores [B], neighbours by question.

    What remains says which rationale is better, not which question is easier, so that the value need not learn the
    latter first. The mean leaves the sample itself out, hence no bias (RLOO, Ahmadian et al. 2024, 2402.14740).
    """
    groups = scores.view(-1, samples)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def clip_scores(scores: Tensor, bound: float) -> Tensor:
    """Scores [B] kept within +- bound; as they are where it is 0.

    A log-likelihood has a long tail of very unlikely texts, and PPO has little to learn from how unlikely.
    """
    return scores.clamp(-bound, bound) if bound else scores


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef * kl_t, plus the score at the last real token: scores [B], kl, mask [B, T] -> [B, T].

    The last real token is the EOS, or the last drawn token of a completion that was cut by its length.
    """
    if not mask.any(dim=1).all():
        raise ValueError("a completion without a real token has no place for its score; drop empty completions.")
    rewards = (-kl_coef * kl).where(mask, 0.0)
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: rewards, values, mask [B, T] -> advantages, returns [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t,  with
    V = A = 0 after the last real token. A cut completion ends there too: nothing is bootstrapped.
    """
    values, rewards = values.where(mask, 0.0), rewards.where(mask, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-mean min(rho A, clip(rho, 1 - c, 1 + c) A), rho = p / p_old (1707.06347, eq. 7); all [B, T].

    Returns the loss and the fraction of real tokens at which the clipped side is the smaller one.
    """
    ratio = (logp - old_logp).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -masked_mean(torch.minimum(plain, clipped), mask), masked_mean((clipped < plain).float(), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """mean of 1/2 max((V - R)^2, (V_c - R)^2), V_c = V kept within V_old +- clip; all [B, T].

    Returns the loss and the fraction of real tokens at which the clipped side is the larger one.
    """
    kept = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (kept - returns) ** 2
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), masked_mean((clipped > plain).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(R - V) / Var(R) over the real tokens: 1 is perfect, 0 no better than a constant.

    0 too where R is constant. All [B, T].
    """
    returns, values = returns[mask], values[mask]
    spread = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0


def adapt_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Steer the KL per completion to its target (1909.08593, eq. 4): coef (1 + 0.1 e), e = kl / target - 1
    kept within +-0.2. So one update changes the coefficient by at most 2 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)


def learning_rate_scale(update: int, settings: PPOSettings) -> float:
    """Factor on both learning rates: linear up to 1 in the warm-up, then down to 0 after the last."""
    up = (update + 1) / max(settings.warmup_updates, 1)
    down = (settings.updates - update) / max(settings.updates - settings.warmup_updates, 1)
    return min(1.0, up, down)


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> "RunningMoments":
        new, mean = len(scores), scores.double().mean().item()
        squares = ((scores.double() - mean) ** 2).sum().item()
        count, gap = self.count + new, mean - self.mean
        squares += self.squares + gap**2 * self.count * new / count
        return RunningMoments(count, self.mean + gap * new / count, squares)

    def normalize(self, scores: Tensor) -> Tensor:
        return (scores - self.mean) / ((self.squares / self.count) ** 0.5 + 1e-8)


# ---- batches and forward passes ----------------------------------------------------------------------------


@dataclass
class Batch:
    """The completions of one update; the last three fields are filled in once they are scored."""

    prompts: list[list[int]]  # one for each completion; those of one question are one object
    completions: list[list[int]]
    ids: Tensor  # [B, L]
    mask: Tensor  # [B, T], as all below
    logp: Tensor  # under the policy that drew them
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def minibatches(self, size: int, generator: torch.Generator | None = None, part: slice = ALL) -> Iterator[Tensor]:
        """Yield the row numbers of `size` completions at a time, `part` of them.

        Neighbours of one question stay together in groups, so that `pack` lets them share their prompt, and groups of
        similar length come together, which saves padding. With a generator, ties and the order are shuffled.
        """
        groups = torch.tensor(self._groups(size))  # [number, completions in each]
        lengths = self.mask.sum(dim=1).cpu()[groups].sum(dim=1)
        lengths += torch.tensor([len(self.prompts[row]) for row in groups[:, 0].tolist()])
        order = torch.randperm(len(groups), generator=generator) if generator else torch.arange(len(groups))
        batches = order[lengths[order].argsort(stable=True)].split(size // groups.shape[1])
        turn = torch.randperm(len(batches), generator=generator) if generator else range(len(batches))
        for number in turn:
            yield groups[batches[number]][part].flatten()

    def _groups(self, size: int) -> list[range]:
        """Neighbours with the same prompt in groups of one size, the largest that comes out even everywhere."""
        together = group_size(size, *(len(list(run)) for _, run in groupby(self.prompts, key=id)))
        return [range(start, start + together) for start in range(0, len(self.prompts), together)]

    def pack(self, rows: Tensor, pad_id: int = 0) -> dict[str, Tensor]:
        """These completions for a forward pass (`models.pack`), neighbours of one question in one row."""
        groups: list[tuple] = []
        for row in rows.tolist():
            prompt, completion = self.prompts[row], self.completions[row]
            if groups and groups[-1][0] is prompt and len(groups[-1][1]) < CONTINUATIONS_PER_ROW:
                groups[-1][1].append(completion)
            else:
                groups.append((prompt, [completion]))
        return pack(groups, pad_id, self.ids.device)


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the N real tokens in their table, 0 elsewhere: [N], mask [B, T] -> [B, T]."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def collate(prompts: list[list[int]], samples: list[Sample], pad_id: int, device="cpu") -> Batch:
    """Join each prompt to its completion, pad on the right, and lay the drawn log-probabilities beside it."""
    if not samples or not all(drawn.token_ids for drawn in samples):
        raise ValueError(f"{len(samples)} completions, some without a token: PPO needs at least one token in each.")
    completions = [list(drawn.token_ids) for drawn in samples]
    ids = pad_right([prompt + tail for prompt, tail in zip(prompts, completions, strict=True)], pad_id)
    mask = torch.zeros(len(prompts), ids.shape[1] - 1, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, completions, strict=True)):
        mask[row, len(prompt) - 1 : len(prompt) + len(tail) - 1] = True
    logp = spread(torch.tensor([number for drawn in samples for number in drawn.logprobs]), mask)
    return Batch(prompts, completions, ids.to(device), mask.to(device), logp.to(device))


# ---- one update --------------------------------------------------------------------------------------------
#
# With several processes each draws, scores and differentiates its share; what they found is gathered, so that all
# have the whole batch, and an update is the same, up to rounding, for any number of them.


class PolicyEngine(Protocol):
    """Another program that draws from the policy, such as `vllm_engine.VLLMEngine` on the adapters' base."""

    name: str

    def load_adapter(self, folder: Path) -> None:
        """From now on draw from the base with the adapter in `folder` (peft's format)."""

    def sample_ids(
        self, prompt_ids: list[list[int]], n: int, *, keys: list[str], temperature: float, max_new_tokens: int,
        seed: int,
    ) -> list[list[Sample]]: ...  # fmt: skip


def rollout(
    policy, tokenizer, problems: list[Problem], settings: PPOSettings, seed: int, rows: int = MAX_BATCH,
    cuda_graphs: bool = False, engine: PolicyEngine | None = None,
) -> tuple[Batch, list[Sample]]:  # fmt: skip
    """Draw the completions of one update; those of one question are neighbours.

    By our own sampler, at most `rows` at once, or by an engine that has been handed the policy.
    """
    prompts = [encode_question(tokenizer, problem) for problem in problems]
    ways = {"tokenizer": tokenizer, "max_batch": rows, "cuda_graphs": cuda_graphs}
    draw = engine.sample_ids if engine else partial(sample_ids, policy, **ways)
    drawn = draw(
        _mine(prompts),
        settings.samples_per_question,
        temperature=1.0,
        max_new_tokens=settings.max_new_tokens,
        seed=seed,
        keys=[problem.id for problem in _mine(problems)],
    )
    samples = gather_object([one for group in drawn for one in group])
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_question)]
    return collate(repeated, samples, tokenizer.pad_token_id, policy.device), samples


def hand_over(roles: Adapters, engine: PolicyEngine, folder: Path) -> None:
    """Let the engine draw from the policy as it is now, by way of its adapter in `folder`."""
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
        "it must have the weights that train, in the same precision, and take over the adapter that it is handed "
        "before every rollout; or sample by the native engine."
    )
    if not found <= ENGINE_TOLERANCE:
        raise EngineMismatchError(
            f"update {update}: the engine's log-probabilities of what it drew are {found:.3g} nats per token from the "
            f"policy's, more than {ENGINE_TOLERANCE}: {advice}"
        )
    if length:
        share = 1 + (gap @ way).item() / length**2
        error = gap.square().mean().sqrt().item() / length
        if share + 4 * error < LEAST_SHARE:
            raise EngineMismatchError(
                f"update {update}: the engine's log-probabilities show {share:.2f} +- {error:.2f} of the policy's way "
                f"from the reference, so it seems to draw from the reference ({found:.3g} nats per token from the "
                f"policy): {advice}"
            )
    return found


@torch.no_grad()
def tabulate(roles: Roles, batch: Batch, size: int, reference: bool, micro_batch: int = 0) -> tuple[Tensor, Tensor]:
    """What `Roles.forward` gives, for all completions: log-probabilities and values [B, T].

    In minibatches of `size`, and of those `micro_batch` at a time in every process, 0 = all.
    """
    logp, values = torch.zeros_like(batch.logp), torch.zeros_like(batch.logp)
    for rows in chain.from_iterable(_split(rows, micro_batch) for rows in batch.minibatches(size, part=_my_part())):
        logp[rows], values[rows] = (spread(flat, batch.mask[rows]) for flat in roles(batch.pack(rows), reference))
    return reduce(logp, "sum"), reduce(values, "sum")


class NonFiniteError(UserError, RuntimeError):
    """A loss or a gradient is not a finite number."""


MEASURED = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl")


def losses(roles: Roles, batch: Batch, rows: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    """What to minimise over these rows of the batch (a scalar), and the numbers MEASURED [5]; sums over the tokens."""
    mask, old_logp, old_values = batch.mask[rows], batch.logp[rows], batch.values[rows]
    advantages, returns = batch.advantages[rows], batch.returns[rows]
    with autocast(settings, mask.device):
        logp, values = (spread(flat, mask) for flat in roles(batch.pack(rows)))
    p_loss, p_clipped = policy_loss(logp, old_logp, advantages, mask, settings.clip)
    v_loss, v_clipped = value_loss(values, old_values, returns, mask, settings.value_clip)
    update_kl = masked_mean(kl_estimate(old_logp, logp.detach(), "k3"), mask)
    found = torch.stack([p_loss, v_loss, p_clipped, v_clipped, update_kl]).detach()
    return (p_loss + settings.value_coef * v_loss) * mask.sum(), found * mask.sum()


def optimize(
    accelerator: Accelerator, roles: Roles, optimizer, batch: Batch, settings: PPOSettings,
    generator: torch.Generator, micro_batch: int = 0,
) -> dict:  # fmt: skip
    """Epochs of minibatches over one batch; returns the means of what was measured on the way.

    A minibatch weighs by its tokens: as they are sorted by length, tokens of short completions would weigh
    more otherwise. Stops early once the policy is max_update_kl away from the one that drew the batch.
    Raises NonFiniteError before the weights are touched by what is not finite.

    micro_batch: completions of a minibatch in one forward and backward pass of a process, 0 = all; gradients add up,
    and everything else is decided for the minibatch.
    """
    measured, steps = [], 0
    tokens_per_step = batch.mask.sum() * min(settings.minibatch / len(batch.ids), 1.0)
    passes = (batch.minibatches(settings.minibatch, generator, _my_part()) for _ in range(settings.epochs))
    for rows in chain.from_iterable(passes):
        *parts, last = _split(rows, micro_batch)
        sums = torch.zeros(len(MEASURED), device=batch.mask.device)
        try:
            for part in parts:
                loss, found = losses(roles, batch, part, settings)
                accelerator.backward(loss / tokens_per_step * accelerator.num_processes)
                sums += found
            loss, found = losses(roles, batch, last, settings)
            measured.append(reduce(sums + found, "sum") / reduce(batch.mask[rows].sum(), "sum"))
            if not measured[-1].isfinite().all():
                p_loss, v_loss, *_, update_kl = measured[-1].tolist()
                raise NonFiniteError(
                    f"policy loss {p_loss}, value loss {v_loss}, KL {update_kl} at optimizer step {steps}"
                )
            if measured[-1][-1] > settings.max_update_kl:
                break
            # the processes' gradients are averaged, so that their sum needs their number
            accelerator.backward(loss / tokens_per_step * accelerator.num_processes)
            for group in optimizer.param_groups:
                norm = accelerator.clip_grad_norm_(group["params"], settings.max_grad_norm)
                if norm is not None and not math.isfinite(norm):  # None: DeepSpeed has clipped and stepped by itself
                    raise NonFiniteError(f"gradient norm {norm} at optimizer step {steps}")
            optimizer.step()
        finally:  # no gradient takes memory outside the backward pass, nor adds to the next one's after an error
            optimizer.zero_grad(set_to_none=True)
        steps += 1
    if not steps:
        raise EngineMismatchError(
            f"before any step the policy is {measured[-1][-1]:.3g} nats per token from its own rollout, more than "
            f"max_update_kl = {settings.max_update_kl}; sample with the weights and the precision that train."
        )
    return dict(zip(MEASURED, torch.stack(measured).mean(dim=0).tolist(), strict=True)) | {"steps": steps}


def autocast(settings: PPOSettings, device: torch.device) -> torch.autocast:
    """The context of `settings.precision`: with "bfloat16" matrix products are rounded to it, weights are not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


def _split(rows: Tensor, micro_batch: int) -> tuple[Tensor, ...]:
    """These rows of a batch, `micro_batch` at a time, 0 = all. Neighbours stay neighbours, so they share prompts."""
    return rows.split(micro_batch or len(rows))


def _mine(rows: list) -> list:
    """This process's share of a list: neighbours, in the order of the processes."""
    state = launched()
    each = len(rows) // state.num_processes
    return rows[state.process_index * each :][:each]


def _my_part() -> slice:
    """This process's share of a minibatch whose groups are sorted by length: every n-th, for equal work."""
    state = launched()
    return slice(state.process_index, None, state.num_processes)


@dataclass(frozen=True)
class Experience:
    """What an update learns from, and what the log says of it."""

    batch: Batch  # with values, advantages and returns
    problems: list[Problem]  # of each completion, as all below
    samples: list[Sample]
    texts: list[str]
    scores: Tensor  # [B] as the reward gave them
    kl: Tensor  # [B] nats
    moments: "RunningMoments"
    clock: list[float]  # seconds: the start, after the rollout, at the end
    gap: dict[str, float]  # {"engine_gap": nats per token} where an engine has drawn


def experience(
    accelerator: Accelerator, roles: Roles, reward: Reward, asked: list[Problem], tokenizer, settings: PPOSettings,
    state: "State", seed: int, micro_batch: int = 0, rollout_rows: int = MAX_BATCH, cuda_graphs: bool = False,
    engine: PolicyEngine | None = None,
) -> Experience:  # fmt: skip
    """Draw, score, and work out which token deserves what. An engine has been handed the policy; it is checked here."""
    clock = [time.perf_counter()]
    plain = accelerator.unwrap_model(roles)
    plain.eval()
    with gathered(plain), autocast(settings, accelerator.device):
        batch, samples = rollout(plain.policy, tokenizer, asked, settings, seed, rollout_rows, cuda_graphs, engine)
    clock.append(time.perf_counter())

    problems = [problem for problem in asked for _ in range(settings.samples_per_question)]
    texts = [drawn.text for drawn in samples]
    scores = torch.tensor(gather_object(scored(reward, _mine(problems), _mine(samples))), device=accelerator.device)
    shaped, moments = shape(scores, samples, state.moments, settings)
    drawn = batch.logp
    with autocast(settings, accelerator.device):
        ref_logp, batch.values = tabulate(roles, batch, settings.minibatch, True, micro_batch)
        if engine or settings.precision == "bfloat16":  # rounds token by token otherwise than in one pass
            batch.logp, _ = tabulate(roles, batch, settings.minibatch, False, micro_batch)
    gap = {"engine_gap": engine_gap(drawn, batch.logp, ref_logp, batch.mask, state.update)} if engine else {}
    kl = kl_estimate(batch.logp, ref_logp, settings.kl_kind)
    rewards = token_rewards(shaped, kl, batch.mask, state.kl_coef)
    advantages, batch.returns = gae(rewards, batch.values, batch.mask, settings.gamma, settings.lam)
    batch.advantages = whiten(advantages, batch.mask)
    clock.append(time.perf_counter())
    return Experience(batch, problems, samples, texts, scores, kl.sum(dim=1), moments, clock, gap)


@dataclass
class State:
    """What an update changes besides weights and optimizer. Randomness is not in it: all that update u draws
    comes from (seed, u), so a resumed run needs no generator's state."""

    update: int = 0  # updates done
    kl_coef: float = 0.0
    moments: RunningMoments = RunningMoments()
    rows: list[dict] = field(default_factory=list)  # the log so far


def train(
    roles: Roles,
    reward: Reward,
    problems: Callable[[int], list[Problem]],
    tokenizer,
    settings: PPOSettings,
    out: str | Path,
    *,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    micro_batch: int = 0,
    recompute: bool = False,
    rollout_rows: int = MAX_BATCH,
    cuda_graphs: bool = False,
    engine: PolicyEngine | None = None,
    checkpoint_every: int = 10,
    examples_every: int = 10,
    progress: str | None = None,
) -> list[dict]:
    """Train policy and value of `roles` in place; return one row (dict) per update, as in out/log.csv.

    reward: any callable(problems, completion texts) -> scores; one that has `of_samples`, as the reward model, reads
        the drawn tokens. The checker (`grade_many`) is called too, but its accuracy goes to the log only and never into
        training.
    problems: update number (from 0) -> `settings.questions` problems. A pure function, so that resuming is
        exact; fresh questions in every update keep the policy from learning them by heart.
    out: folder of log.csv, examples.jsonl and the newest checkpoint. A folder with a checkpoint of the same
        settings is resumed; on a CPU the end is bit-equal to that of an uninterrupted run.
    accelerator: it says on what device and in how many processes (`accelerate launch`) to train, and where to log
        besides: `Accelerator(log_with="tensorboard", project_dir=out)`. None: one of its defaults.
    micro_batch: completions in one pass of a process, forward and backward, 0 = its share of the minibatch; it must
        divide that. recompute: activations in the backward pass. rollout_rows, cuda_graphs: completions drawn
        at once, and whether by recorded steps (`sampling.sample`). What the hardware needs: the results are the same up
        to rounding, and a run may be resumed with others.
    engine: who draws in place of our own sampler, for `Adapters` in one process. Before every rollout it is handed the
        policy's adapter in out/hand-over, after it checked by `engine_gap`, which is in the log.
    progress: label of a progress bar on standard output; None prints nothing.

    Ctrl-C saves a checkpoint and raises KeyboardInterrupt. Raises CollapseError where going on is pointless,
    NonFiniteError with the batch saved, and EngineMismatchError before the update.
    """
    check_padding(tokenizer)
    accelerator = accelerator or models.accelerator()
    check_micro_batch(settings, accelerator.num_processes, micro_batch)
    _check_shares(settings, accelerator.num_processes)
    _check_engine(engine, roles, accelerator.num_processes)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if recompute:
        roles.recompute_activations()
    groups = [{"params": list(weights.values())} for weights in roles.weights().values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    roles, optimizer = accelerator.prepare(roles, optimizer)
    if micro_batch and _by_deepspeed(roles):
        raise UsageError("DeepSpeed steps after every backward pass: give micro_batch = 0 and a lower minibatch.")
    run = asdict(settings) | {"seed": seed} | ({"engine": engine.name} if engine else {})
    state = load_checkpoint(out, roles, optimizer, run) or State(kl_coef=settings.kl_coef)
    if accelerator.is_main_process:
        start_logs(out, state)
    accelerator.init_trackers("ppo", run)
    bar = progress_bar(progress if accelerator.is_main_process else None, settings.updates, "update", state.update)
    try:
        while state.update < settings.updates:
            update_seed = seed * 1_000_003 + state.update
            asked = questions(problems, state.update, settings)
            if engine:
                hand_over(accelerator.unwrap_model(roles), engine, out / "hand-over")
            found = experience(
                accelerator, roles, reward, asked, tokenizer, settings, state, update_seed, micro_batch, rollout_rows,
                cuda_graphs, engine,
            )  # fmt: skip

            with uninterrupted():
                scale = learning_rate_scale(state.update, settings)
                optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
                optimizer.param_groups[1]["lr"] = settings.value_learning_rate * scale
                generator = torch.Generator().manual_seed(update_seed)
                try:
                    measured = optimize(accelerator, roles, optimizer, found.batch, settings, generator, micro_batch)
                except NonFiniteError as error:
                    raise _with_batch(error, out, found.batch, state) from error
                clock = [*found.clock, time.perf_counter()]
                verdicts = grade_many(found.texts, found.problems)
                batch = found.batch
                row = {
                    **observed(state.update, batch, found.samples, found.scores, found.kl, verdicts),
                    **found.gap,
                    "kl_coef": state.kl_coef,
                    "explained_variance": explained_variance(batch.values, batch.returns, batch.mask),
                    **measured,
                    "learning_rate": settings.learning_rate * scale,
                    **dict(zip(SECONDS, (end - start for start, end in pairwise(clock)), strict=True)),
                }
                if accelerator.is_main_process:
                    write_row(out, row)
                    if state.update % examples_every == 0:
                        write_examples(out, state.update, found.problems, found.texts, found.scores, found.kl, verdicts)
                accelerator.log(row, step=state.update)
                if settings.kl_target:
                    state.kl_coef = adapt_kl_coef(state.kl_coef, row["kl"], settings.kl_target)
                state.moments = found.moments
                state.rows.append(row)
                state.update += 1
                if state.update % checkpoint_every == 0 or state.update == settings.updates:
                    save_checkpoint(out, roles, optimizer, state, run)
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row['accuracy']:.2f}")
            check_collapse(state.rows)
    except KeyboardInterrupt:
        save_checkpoint(out, roles, optimizer, state, run)
        raise
    finally:
        bar.close()
        for tracker in accelerator.trackers:
            tracker.finish()
    return state.rows


def shape(
    scores: Tensor, samples: list[Sample], moments: RunningMoments, settings: PPOSettings
) -> tuple[Tensor, RunningMoments]:
    """What a completion earns, besides the KL it pays: scores [B] -> [B], and the moments with these scores in them.

    Centred by question, normalised, clipped, and less the penalty where a completion was cut by its length.
    """
    shaped = center(scores, settings.samples_per_question) if settings.center_by_question else scores
    moments = moments.add(shaped)
    shaped = clip_scores(moments.normalize(shaped) if settings.normalize_reward else shaped, settings.reward_clip)
    cut = torch.tensor([drawn.finish_reason == "length" for drawn in samples], device=scores.device)
    return shaped - settings.missing_end_penalty * cut, moments


def observed(update: int, batch: Batch, samples: list[Sample], scores: Tensor, kl: Tensor, verdicts) -> dict:
    """The part of a log row that is about the completions: scores [B], kl [B] in nats per completion."""
    return {
        "update": update,
        "reward": scores.mean().item(),
        "accuracy": _share(verdict.correct for verdict in verdicts),
        "invalid": _share(verdict.extracted is None for verdict in verdicts),
        "kl": kl.mean().item(),
        "entropy": -masked_mean(batch.logp, batch.mask).item(),  # Monte Carlo: -E log p
        "length": batch.mask.sum().item() / len(samples),
        "tokens": batch.mask.sum().item(),
        "cut": _share(drawn.finish_reason == "length" for drawn in samples),
    }


class CollapseError(UserError, RuntimeError):
    """Training has reached a state that it does not leave."""


def check_collapse(rows: list[dict], last: int = 5) -> None:
    """Raise CollapseError if the last updates show no answer at all where once most completions had one, or
    a policy that is all but deterministic and earns less than it did at the start."""
    if len(rows) < 2 * last:
        return
    start, end = rows[:last], rows[-last:]
    way_out = "start again with a lower learning_rate or a higher kl_coef; examples.jsonl shows what it writes."
    if min(row["invalid"] for row in end) == 1 and min(row["invalid"] for row in rows) < 0.5:
        raise CollapseError(f"no completion of the last {last} updates has an answer: {way_out}")
    was, now = (sum(row["reward"] for row in part) / last for part in (start, end))
    if max(row["entropy"] for row in end) < 0.01 and now < was:
        raise CollapseError(
            f"the policy explores no more (entropy below 0.01 nats per token for {last} updates) at a mean "
            f"reward of {now:.3g}, below the {was:.3g} it began with: {way_out}"
        )


# ---- files -------------------------------------------------------------------------------------------------


# A full state is the same for one process and for many, sharded or not; frozen weights are not in it.
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
BOOK = "state.json"  # the last file of a checkpoint: settings, state and the optimizer's numbers


def save_checkpoint(out: Path, roles: Roles, optimizer, state: State, run: dict) -> None:
    """Write out/checkpoint-UPDATE in one atomic step, then remove older ones. It holds what training changes:
    the weights that train, the optimizer and the state. All processes call it, the first one writes (with DeepSpeed,
    which knows no whole optimizer, each its part, in files of its own)."""
    folder, parts, processes = out / f"checkpoint-{state.update:06d}", out / "deepspeed.tmp", launched()
    if folder.exists():
        return
    names = {name.removeprefix("module.") for name, weight in roles.named_parameters() if weight.requires_grad}
    weights = states.get_model_state_dict(roles, options=_FULL)
    weights = {name.removeprefix("module."): weight for name, weight in weights.items()}
    moments = {}
    if _by_deepspeed(roles):
        if processes.is_main_process:
            shutil.rmtree(parts, ignore_errors=True)
        processes.wait_for_everyone()
        roles.save_checkpoint(str(parts), tag="deepspeed", exclude_frozen_parameters=True)
    else:
        moments = states.get_optimizer_state_dict(roles, optimizer, options=_FULL)
    processes.wait_for_everyone()  # all have seen that there is no such folder
    if processes.is_main_process:
        said = {"run": run, "state": asdict(state), "optimizer": moments.get("param_groups")}
        with checkpoints.saving(folder, BOOK, said) as tmp:
            save_file({name: weight for name, weight in weights.items() if name in names}, tmp / "weights.safetensors")
            if _by_deepspeed(roles):
                shutil.copytree(parts, tmp, dirs_exist_ok=True)
                shutil.rmtree(parts)
            else:
                save_file(_flat(moments["state"]), tmp / "optimizer.safetensors")
    processes.wait_for_everyone()


def load_checkpoint(out: Path, roles: Roles, optimizer, run: dict) -> State | None:
    """Put the newest checkpoint of `out` into roles and optimizer; None if there is none. Raises StageError for a
    damaged one."""
    folder = checkpoints.newest(out)
    if folder is None:
        return None
    said = checkpoints.opened(folder, BOOK)
    for name in said["run"] | run:
        then, now = said["run"].get(name), run.get(name)
        if then != now:
            raise UsageError(
                f"{folder} was trained with {name} = {then!r}, not {now!r}: give another "
                "folder, or delete this one to start again."
            )
    if (said["optimizer"] is None) != _by_deepspeed(roles):
        raise UsageError(
            f"{folder} was trained {'with' if said['optimizer'] is None else 'without'} DeepSpeed: go on so."
        )
    if _by_deepspeed(roles):
        roles.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
    else:
        states.set_model_state_dict(roles, load_file(folder / "weights.safetensors"), options=_FULL)
        moments = _nested(load_file(folder / "optimizer.safetensors"))
        moments = {"state": moments, "param_groups": said["optimizer"]}
        states.set_optimizer_state_dict(roles, optimizer, moments, options=_FULL)
    return restored(said["state"])


def _flat(moments: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """An optimizer's state of each weight, by names such as "head.weight/exp_avg"."""
    return {f"{weight}/{name}": moment for weight, of_it in moments.items() for name, moment in of_it.items()}


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`_flat` taken back."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, moment in flat.items():
        weight, _, name = key.rpartition("/")
        moments.setdefault(weight, {})[name] = moment
    return moments


def restored(said: dict) -> State:
    """The state that was said as a dict."""
    return State(**said | {"moments": RunningMoments(**said["moments"])})


def _by_deepspeed(roles) -> bool:
    return hasattr(roles, "save_checkpoint")  # the engine that DeepSpeed wraps a module in


def trained_roles(roles: Roles, out: Path) -> Roles:
    """Fresh roles with the weights of the newest checkpoint of `out`, whole, whatever parts trained them."""
    folder = checkpoints.newest(out)
    checkpoints.opened(folder, BOOK)  # verifies the files
    roles.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    return roles


def _with_batch(error: NonFiniteError, out: Path, batch: Batch, state: State) -> NonFiniteError:
    """The same error, after the batch was saved: it says where and what next."""
    path = out / "nonfinite.safetensors"
    if launched().is_main_process:
        tensors = {name: value.cpu() for name, value in vars(batch).items() if isinstance(value, Tensor)}
        save_file(tensors, path)
    return NonFiniteError(
        f"update {state.update}: {error}. Its batch is in {path}; the weights of the last checkpoint are as they were. "
        "A lower learning_rate, a lower reward_clip, or float32 in place of bfloat16 are the knobs."
    )


def start_logs(out: Path, state: State) -> None:
    """Take back what was logged after the checkpoint that training starts from, and remove older checkpoints."""
    checkpoints.keep_newest(out)
    (out / "log.csv").unlink(missing_ok=True)
    for row in state.rows:
        write_row(out, row)
    examples = out / "examples.jsonl"
    lines = examples.read_text(encoding="utf-8").splitlines(keepends=True) if examples.exists() else []
    write_text(examples, "".join(line for line in lines if _update_of(line) < state.update))


def _update_of(line: str) -> float:
    """The update of a line of examples.jsonl; of one that a kill has cut, one that never was."""
    try:
        return json.loads(line)["update"]
    except (ValueError, LookupError, TypeError):
        return math.inf


def write_row(out: Path, row: dict) -> None:
    with open(out / "log.csv", "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def write_examples(out: Path, update: int, problems, texts, scores: Tensor, kl: Tensor, verdicts) -> None:
    """Eight completions of an update, evenly spaced, so of several questions, for a human to read."""
    rows = list(zip(problems, texts, scores.tolist(), kl.tolist(), verdicts, strict=True))
    with open(out / "examples.jsonl", "a", encoding="utf-8") as file:
        for problem, text, score, nats, verdict in rows[:: max(1, len(rows) // 8)][:8]:
            example = {"update": update, "id": problem.id, "question": problem.question, "completion": text}
            example |= {
                "reward": score,
                "kl": nats,
                "correct": verdict.correct,
                "extracted": verdict.extracted,
            }
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


# ---- small helpers -----------------------------------------------------------------------------------------


def questions(problems, update: int, settings: PPOSettings) -> list[Problem]:
    """The problems of an update, refused if their number is not that of the settings."""
    asked = problems(update)
    if len(asked) != settings.questions:
        raise UsageError(
            f"problems({update}) gave {len(asked)} problems; give episodes / samples_per_question = "
            f"{settings.questions}."
        )
    return asked


def check_padding(tokenizer) -> None:
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageError(
            f"pad token {tokenizer.pad_token!r} must exist and differ from the end token "
            f"{tokenizer.eos_token!r}: give padding a token of its own, or ends are taken for padding."
        )


def check_micro_batch(settings: PPOSettings, processes: int, micro_batch: int) -> None:
    if micro_batch and settings.minibatch % (processes * micro_batch):
        raise UsageError(
            f"minibatch = {settings.minibatch} in {processes} processes cannot be made of micro batches of "
            f"micro_batch = {micro_batch} completions: give a number that divides each process's share."
        )


def _check_engine(engine: PolicyEngine | None, roles: Roles, processes: int) -> None:
    if engine is not None and processes > 1:
        raise UsageError(
            f"engine {engine.name!r} draws for one process, not for {processes}: sample by the native engine, or train "
            "without accelerate launch or torchrun."
        )
    if engine is not None and not isinstance(roles, Adapters):
        raise UsageError(
            f"engine {engine.name!r} takes over adapters, not all weights of {type(roles).__name__}: train by LoRA "
            "(lora.rank from 1), or sample by the native engine."
        )


def _check_shares(settings: PPOSettings, processes: int) -> None:
    size = settings.minibatch
    groups = size // group_size(size, settings.samples_per_question)
    if processes > 1 and (settings.questions % processes or groups % processes or settings.episodes % size):
        raise UsageError(
            f"{settings.questions} questions per update and {groups} groups of completions in a minibatch of {size} "
            f"cannot be shared by {processes} processes: make both a multiple of them, and episodes = "
            f"{settings.episodes} a multiple of minibatch = {size}."
        )


def scored(reward: Reward, problems: list[Problem], samples: list[Sample]) -> list[float]:
    """The reward of each completion, refused if it is not one finite number for each."""
    scores = torch.tensor(score_samples(reward, problems, samples), dtype=torch.float32)
    if scores.shape != (len(samples),) or not scores.isfinite().all():
        raise UsageError(
            f"the reward gave shape {tuple(scores.shape)} with {int(scores.isfinite().sum())} finite numbers "
            f"for {len(samples)} completions; give one finite number for each."
        )
    return scores.tolist()


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and a request to end (SIGTERM) inside take effect at the end, as whoever handles them has it, so that a
    checkpoint never holds half an update."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever reach the main thread
        return
    arrived = []
    before = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in dict.fromkeys(arrived):
        signal.raise_signal(number)
