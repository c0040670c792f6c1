"""Token-level PPO for rationales with a learned reward (stage 04).

One update, in the order of the code:

    rollout -> score -> reference log-probs, values -> per-token rewards -> GAE -> minibatches -> log row

Four roles: the *policy* that learns, the frozen *reference* it may not stray far from (the SFT model), the
*reward* that scores a finished text, and the *value* that predicts from every prefix the reward to come.

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
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smlib.answers import Reward, grade_many
from smlib.models import encode_prompt, token_logprobs
from smlib.problems import Problem
from smlib.progress import progress_bar
from smlib.prompts import open_prompt
from smlib.sampling import Sample, sample_ids

SECONDS = ("rollout_seconds", "score_seconds", "update_seconds")  # phases in the log


@dataclass(frozen=True)
class PPOSettings:
    """Rollouts are always drawn at temperature 1: PPO's ratio is about the distribution that was sampled."""

    updates: int = 60
    episodes: int = 128  # completions per update
    samples_per_question: int = 8  # of them, from the same question: the more, the better centred
    epochs: int = 1  # passes over the completions of one update
    minibatch: int = 16  # completions per optimizer step
    learning_rate: float = 2.5e-4
    value_learning_rate: float = 5e-4  # of the value model, or of the value head
    warmup_updates: int = 3  # linear warm-up, then linear decay to zero
    kl_coef: float = 0.08  # reward lost per nat of KL to the reference
    kl_target: float = 0.0  # nats per completion that kl_coef is steered to; 0 = kl_coef stays fixed
    kl_kind: str = "k1"
    gamma: float = 1.0
    lam: float = 1.0  # below 1 a reward at the end hardly reaches the early steps, unless the value sees them coming
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    max_grad_norm: float = 1.0  # of the policy and of the value, each by itself
    max_new_tokens: int = 128
    missing_end_penalty: float = 1.0  # taken from the reward of a completion that was cut by its length
    center_by_question: bool = True  # score minus the mean score of the question's other samples (as in RLOO)
    normalize_reward: bool = True  # by the running mean and deviation of all scores so far
    reward_clip: float = 1.0  # bound on the size of a shaped score, so that outliers do not rule; 0 = none
    max_update_kl: float = 0.05  # nats per token between the sampling policy and the new one; then stop early

    def __post_init__(self):
        if self.kl_kind not in ("k1", "k3"):
            raise ValueError(f"kl_kind {self.kl_kind!r} is unknown; choose 'k1' or 'k3'.")
        if self.episodes % self.samples_per_question:
            raise ValueError(
                f"episodes = {self.episodes} is no multiple of samples_per_question = "
                f"{self.samples_per_question}; make it one, so that every question gets all its samples."
            )
        if self.center_by_question and self.samples_per_question < 2:
            raise ValueError("center_by_question needs samples_per_question of at least 2; raise it or switch it off.")

    @property
    def questions(self) -> int:
        """Different questions in one update."""
        return self.episodes // self.samples_per_question


# ---- the arithmetic, one small function per equation -------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the real tokens: x, mask [B, T] -> scalar."""
    return x[mask].mean()


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

    ids: Tensor  # [B, L]
    mask: Tensor  # [B, T], as all below
    logp: Tensor  # under the policy that drew them
    lengths: Tensor  # [B] tokens of prompt and completion
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def minibatches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple]:
        """Yield (rows, width): completions of similar length, and the T that is enough for them.

        Sorting by length saves most of the padding. With a generator, ties and the order are shuffled.
        """
        order = torch.randperm(len(self.ids), generator=generator) if generator else torch.arange(len(self.ids))
        groups = order[self.lengths[order].argsort(stable=True)].split(size)
        turn = torch.randperm(len(groups), generator=generator) if generator else range(len(groups))
        for group in turn:
            rows = groups[group]
            yield rows.to(self.ids.device), int(self.lengths[rows].max()) - 1


def collate(prompts: list[list[int]], samples: list[Sample], pad_id: int, device="cpu") -> Batch:
    """Join each prompt to its completion, pad on the right, and lay the drawn log-probabilities beside it."""
    lengths = torch.tensor([len(p) + len(s.token_ids) for p, s in zip(prompts, samples, strict=True)])
    ids = torch.full((len(prompts), int(lengths.max())), pad_id)
    mask = torch.zeros(len(prompts), ids.shape[1] - 1, dtype=torch.bool)
    logp = torch.zeros(mask.shape)
    for row, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True)):
        start, end = len(prompt), len(prompt) + len(drawn.token_ids)
        ids[row, :end] = torch.tensor([*prompt, *drawn.token_ids])
        mask[row, start - 1 : end - 1] = True
        logp[row, start - 1 : end - 1] = torch.tensor(drawn.logprobs)
    return Batch(ids.to(device), mask.to(device), logp.to(device), lengths)


def completion_states(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states from which the N real tokens are predicted: ids [B, T + 1], mask [B, T] -> [N, H].

    No attention mask: padding is on the right, and a causal model never looks there. Only these states go on
    to the vocabulary, whose logits are what takes the memory.
    """
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][mask]


def completion_logprobs(model, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the real tokens from their states [N, H] -> [B, T], 0 elsewhere."""
    logits = model.get_output_embeddings()(states)
    return _spread(token_logprobs(logits, ids[:, 1:][mask]), mask)


def completion_values(value, states: Tensor, mask: Tensor) -> Tensor:
    """Values of the prefixes before the real tokens from their states [N, H] -> [B, T], 0 elsewhere."""
    head = value if isinstance(value, nn.Linear) else value.score
    states = states.to(next(head.parameters()).dtype)  # a float32 head on a bfloat16 trunk
    return _spread(head(states).squeeze(-1).float(), mask)


def _spread(flat: Tensor, mask: Tensor) -> Tensor:
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def value_head(policy) -> nn.Linear:
    """A value that costs no second model: a scalar linear head on the policy's own last hidden state.

    It starts at zero, so at first it predicts the mean of normalised rewards and does not disturb the trunk.
    """
    head = nn.Linear(policy.config.hidden_size, 1).to(policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


# ---- one update --------------------------------------------------------------------------------------------


def rollout(policy, tokenizer, problems: list[Problem], settings: PPOSettings, seed: int):
    """Draw the completions of one update -> (Batch, list[Sample]); those of one question are neighbours."""
    prompts = [encode_prompt(tokenizer, open_prompt(problem)) for problem in problems]
    drawn = sample_ids(
        policy,
        prompts,
        settings.samples_per_question,
        temperature=1.0,
        max_new_tokens=settings.max_new_tokens,
        seed=seed,
        keys=[problem.id for problem in problems],
        tokenizer=tokenizer,
    )
    samples = [one for group in drawn for one in group]
    repeated = [prompt for prompt in prompts for _ in range(settings.samples_per_question)]
    return collate(repeated, samples, tokenizer.pad_token_id, policy.device), samples


@torch.no_grad()
def reference_and_values(policy, reference, value, batch: Batch, size: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities under the reference and values before the update: both [B, T]."""
    ref_logp, values = torch.zeros_like(batch.logp), torch.zeros_like(batch.logp)
    trunk = policy if isinstance(value, nn.Linear) else value
    for rows, width in batch.minibatches(size):
        ids, mask = batch.ids[rows, : width + 1], batch.mask[rows, :width]
        states = completion_states(reference, ids, mask)
        ref_logp[rows, :width] = completion_logprobs(reference, states, ids, mask)
        values[rows, :width] = completion_values(value, completion_states(trunk, ids, mask), mask)
    return ref_logp, values


def optimize(policy, value, optimizer, batch: Batch, settings: PPOSettings, generator) -> dict:
    """Epochs of minibatches over one batch; returns the means of what was measured on the way.

    A minibatch weighs by its tokens: as they are sorted by length, tokens of short completions would weigh
    more otherwise. Stops early once the policy is max_update_kl away from the one that drew the batch.
    """
    measured, steps = [], 0
    tokens_per_step = batch.mask.sum() * min(settings.minibatch / len(batch.ids), 1.0)
    passes = (batch.minibatches(settings.minibatch, generator) for _ in range(settings.epochs))
    for rows, width in chain.from_iterable(passes):
        ids, mask = batch.ids[rows, : width + 1], batch.mask[rows, :width]
        old_logp, old_values = batch.logp[rows, :width], batch.values[rows, :width]
        advantages, returns = batch.advantages[rows, :width], batch.returns[rows, :width]

        states = completion_states(policy, ids, mask)
        logp = completion_logprobs(policy, states, ids, mask)
        value_states = states if isinstance(value, nn.Linear) else completion_states(value, ids, mask)
        values = completion_values(value, value_states, mask)

        p_loss, p_clipped = policy_loss(logp, old_logp, advantages, mask, settings.clip)
        v_loss, v_clipped = value_loss(values, old_values, returns, mask, settings.value_clip)
        update_kl = masked_mean(kl_estimate(old_logp, logp.detach(), "k3"), mask)
        measured.append(torch.stack([p_loss, v_loss, p_clipped, v_clipped, update_kl]).detach())
        if update_kl > settings.max_update_kl:
            break

        loss = (p_loss + settings.value_coef * v_loss) * mask.sum() / tokens_per_step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], settings.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        steps += 1
    if not steps:
        raise RuntimeError(
            f"before any step the policy is {update_kl:.3g} nats per token from its own rollout, more than "
            f"max_update_kl = {settings.max_update_kl}; sample with the weights and the precision that train."
        )
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl")
    return dict(zip(names, torch.stack(measured).mean(dim=0).tolist(), strict=True)) | {"steps": steps}


@dataclass
class State:
    """What an update changes besides weights and optimizer. Randomness is not in it: all that update u draws
    comes from (seed, u), so a resumed run needs no generator's state."""

    update: int = 0  # updates done
    kl_coef: float = 0.0
    moments: RunningMoments = RunningMoments()
    rows: list[dict] = field(default_factory=list)  # the log so far


def train(
    policy,
    reference,
    value,
    reward: Reward,
    problems: Callable[[int], list[Problem]],
    tokenizer,
    settings: PPOSettings,
    out: str | Path,
    *,
    seed: int = 0,
    checkpoint_every: int = 10,
    examples_every: int = 10,
    progress: str | None = None,
) -> list[dict]:
    """Train `policy` and `value` in place; return one row (dict) per update, as in out/log.csv.

    policy, reference: causal language models of one class; the reference is frozen here. What has
        requires_grad is what trains, so LoRA roles work as full models do.
    value: `value_head(policy)`, or a model of its own: a transformers token classifier with one label.
    reward: any callable(problems, completion texts) -> scores. The checker (`grade_many`) is called too, but
        its accuracy goes to the log only and never into training.
    problems: update number (from 0) -> `settings.questions` problems. A pure function, so that resuming is
        exact; fresh questions in every update keep the policy from learning them by heart.
    out: folder of log.csv, examples.jsonl and the newest checkpoint. A folder with a checkpoint of the same
        settings is resumed; on a CPU the end is bit-equal to that of an uninterrupted run.
    progress: label of a progress bar on standard output; None prints nothing.

    Ctrl-C saves a checkpoint and raises KeyboardInterrupt. Raises CollapseError where going on is pointless.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad token {tokenizer.pad_token!r} must exist and differ from the end token "
            f"{tokenizer.eos_token!r}: give padding a token of its own, or ends are taken for padding."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    reference.requires_grad_(False)
    for model in (policy, reference, value):
        model.eval()  # no dropout: the first ratio of an update is 1
    groups = [{"params": list(_trained(model).values())} for model in (policy, value)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    run = asdict(settings) | {"seed": seed}
    state = load_checkpoint(out, policy, value, optimizer, run) or State(kl_coef=settings.kl_coef)
    _start_logs(out, state)
    bar = progress_bar(progress, settings.updates, "update", initial=state.update)
    try:
        while state.update < settings.updates:
            clock = [time.perf_counter()]
            update_seed = seed * 1_000_003 + state.update
            asked = _asked(problems, state.update, settings)
            batch, samples = rollout(policy, tokenizer, asked, settings, update_seed)
            clock.append(time.perf_counter())

            asked = [problem for problem in asked for _ in range(settings.samples_per_question)]
            texts = [drawn.text for drawn in samples]
            scores = _scores(reward, asked, texts).to(policy.device)
            shaped = center(scores, settings.samples_per_question) if settings.center_by_question else scores
            moments = state.moments.add(shaped)
            shaped = moments.normalize(shaped) if settings.normalize_reward else shaped
            shaped = clip_scores(shaped, settings.reward_clip)
            cut = torch.tensor([drawn.finish_reason == "length" for drawn in samples], device=policy.device)
            shaped = shaped - settings.missing_end_penalty * cut

            ref_logp, batch.values = reference_and_values(policy, reference, value, batch, settings.minibatch)
            kl = kl_estimate(batch.logp, ref_logp, settings.kl_kind)
            rewards = token_rewards(shaped, kl, batch.mask, state.kl_coef)
            advantages, batch.returns = gae(rewards, batch.values, batch.mask, settings.gamma, settings.lam)
            batch.advantages = whiten(advantages, batch.mask)
            clock.append(time.perf_counter())

            with _uninterrupted():
                scale = learning_rate_scale(state.update, settings)
                optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
                optimizer.param_groups[1]["lr"] = settings.value_learning_rate * scale
                generator = torch.Generator().manual_seed(update_seed)
                measured = optimize(policy, value, optimizer, batch, settings, generator)
                clock.append(time.perf_counter())

                verdicts = grade_many(texts, asked)
                kl = kl.sum(dim=1)  # per completion
                row = {
                    "update": state.update,
                    "reward": scores.mean().item(),
                    "accuracy": _share(verdict.correct for verdict in verdicts),
                    "invalid": _share(verdict.extracted is None for verdict in verdicts),
                    "kl": kl.mean().item(),
                    "kl_coef": state.kl_coef,
                    "entropy": -masked_mean(batch.logp, batch.mask).item(),  # Monte Carlo: -E log p
                    "length": batch.mask.sum().item() / len(samples),
                    "cut": _share(cut.tolist()),
                    "explained_variance": explained_variance(batch.values, batch.returns, batch.mask),
                    **measured,
                    "learning_rate": settings.learning_rate * scale,
                    **dict(zip(SECONDS, (end - start for start, end in pairwise(clock)), strict=True)),
                }
                _write_row(out, row, first=not state.rows)
                if state.update % examples_every == 0:
                    _write_examples(out, state.update, asked, texts, scores, kl, verdicts)
                if settings.kl_target:
                    state.kl_coef = adapt_kl_coef(state.kl_coef, row["kl"], settings.kl_target)
                state.moments = moments
                state.rows.append(row)
                state.update += 1
                if state.update % checkpoint_every == 0 or state.update == settings.updates:
                    save_checkpoint(out, policy, value, optimizer, state, run)
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row['accuracy']:.2f}")
            check_collapse(state.rows)
    except KeyboardInterrupt:
        save_checkpoint(out, policy, value, optimizer, state, run)
        raise
    finally:
        bar.close()
    return state.rows


class CollapseError(RuntimeError):
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


def save_checkpoint(out: Path, policy, value, optimizer, state: State, run: dict) -> None:
    """Write out/checkpoint-UPDATE in one atomic step, then remove older ones. It holds what training changes:
    the weights that train, the optimizer and the state."""
    folder, tmp = out / f"checkpoint-{state.update:06d}", out / "checkpoint.tmp"
    if folder.exists():
        return
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    save_file(_trained(policy), tmp / "policy.safetensors")
    save_file(_trained(value), tmp / "value.safetensors")
    plain = {"state": asdict(state), "optimizer": optimizer.state_dict(), "run": run}
    torch.save(plain, tmp / "state.pt")
    tmp.rename(folder)
    for old in out.glob("checkpoint-*"):
        if old != folder:
            shutil.rmtree(old)


def load_checkpoint(out: Path, policy, value, optimizer, run: dict) -> State | None:
    """Put the newest checkpoint of `out` into policy, value and optimizer; None if there is none."""
    folder = max(out.glob("checkpoint-*"), default=None)
    if folder is None:
        return None
    plain = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    for name, now in run.items():
        if plain["run"].get(name) != now:
            raise ValueError(
                f"{folder} was trained with {name} = {plain['run'].get(name)!r}, not {now!r}: give another "
                "folder, or delete this one to start again."
            )
    for model, file in ((policy, "policy.safetensors"), (value, "value.safetensors")):
        model.load_state_dict(load_file(folder / file), strict=False)
    optimizer.load_state_dict(plain["optimizer"])
    return State(**plain["state"] | {"moments": RunningMoments(**plain["state"]["moments"])})


def _trained(model) -> dict[str, Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _start_logs(out: Path, state: State) -> None:
    """Take back what was logged after the checkpoint that training starts from."""
    (out / "log.csv").unlink(missing_ok=True)
    for number, row in enumerate(state.rows):
        _write_row(out, row, first=number == 0)
    examples = out / "examples.jsonl"
    lines = examples.read_text(encoding="utf-8").splitlines(keepends=True) if examples.exists() else []
    kept = [line for line in lines if json.loads(line)["update"] < state.update]
    examples.write_text("".join(kept), encoding="utf-8")


def _write_row(out: Path, row: dict, first: bool) -> None:
    with open(out / "log.csv", "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if first:
            writer.writeheader()
        writer.writerow(row)


def _write_examples(out: Path, update: int, problems, texts, scores: Tensor, kl: Tensor, verdicts) -> None:
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


def _asked(problems, update: int, settings: PPOSettings) -> list[Problem]:
    asked = problems(update)
    if len(asked) != settings.questions:
        raise ValueError(
            f"problems({update}) gave {len(asked)} problems; give episodes / samples_per_question = "
            f"{settings.questions}."
        )
    return asked


def _scores(reward: Reward, problems: list[Problem], texts: list[str]) -> Tensor:
    scores = torch.tensor(reward(problems, texts), dtype=torch.float32)
    if scores.shape != (len(texts),) or not scores.isfinite().all():
        raise ValueError(
            f"the reward gave shape {tuple(scores.shape)} with {int(scores.isfinite().sum())} finite numbers "
            f"for {len(texts)} completions; give one finite number for each."
        )
    return scores


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return sum(flags) / len(flags)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end, so that a checkpoint never holds half an update."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C only ever reaches the main thread
        return
    arrived = []
    before = signal.signal(signal.SIGINT, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        raise KeyboardInterrupt
