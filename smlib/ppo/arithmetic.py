"""The arithmetic of PPO, one small function for each equation, on tensors alone.

Shapes. B completions with their prompts are padded on the right to L tokens: `ids [B, L]`. Everything per token is
[B, T] with T = L - 1: column t speaks of the token ids[:, t + 1], which is predicted from ids[:, : t + 1].
`mask [B, T]` (bool) is True where that token belongs to the completion, its end token (EOS) included. These are the
*real* tokens. Prompt and padding are False and never count, whatever numbers stand there.

Units. Log-probabilities, KL and entropy are in nats. Rewards, values and advantages are in the unit of the scores.

Sources, with their numbers on arXiv:

    PPO                                              Schulman et al. 2017 (1707.06347)
    GAE                                              Schulman et al. 2015 (1506.02438)
    PPO for language, its KL penalty and controller  Ziegler et al. 2019 (1909.08593)
    k1 and k3                                        Schulman 2020, "Approximating KL divergence",
                                                     joschu.net/blog/kl-approx.html
    scores centred by question                       RLOO, Ahmadian et al. 2024 (2402.14740)
    clipped values                                   OpenAI's `baselines`; PPO's paper does not clip them
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smlib.ppo.settings import PPOSettings


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the real tokens: x, mask [B, T] -> scalar. ValueError where there is none."""
    real = x[mask]
    if not len(real):
        raise ValueError("there is no real token to take a mean of: the mask is False everywhere")
    return real.mean()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the real tokens, 0 elsewhere: x, mask [B, T] -> [B, T].

    The deviation is that of the N real tokens themselves (divided by N, not by N - 1). PPO's paper does not whiten
    advantages; nearly every implementation does, so that the step does not depend on the scale of the rewards.
    """
    real = x[mask]
    white = (x - real.mean()) / (real.std(correction=0) + 1e-8)
    return white.where(mask, 0.0)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Estimate of KL(policy || reference) in nats, at each token that the policy drew: [B, T], [B, T] -> [B, T].

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

    The last real token is the EOS, or the last drawn token of a completion that was cut by its length (1909.08593).
    ValueError for a completion without a real token.
    """
    if not mask.any(dim=1).all():
        raise ValueError("a completion without a real token has no place for its score; drop empty completions")
    rewards = (-kl_coef * kl).where(mask, 0.0)
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: rewards, values, mask [B, T] -> advantages, returns [B, T].

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t,  with
    V = A = 0 after the last real token (1506.02438, eq. 16). A completion that was cut by its length ends there, too:
    unlike in the paper, the value of what would have come is not added, since nobody is going to write it.
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


def gae_of_steps(rewards: Tensor, values: Tensor, steps: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """`gae` with steps of a rationale as the actions, undiscounted: [B, T] each -> advantages, returns [B, T].

    steps: the number of each token's step, ascending from 0; values: that of the prefix before the step, the same for
    all its tokens. Each token of a step has the step's advantage, and lam = 0 is what the step did to the value
    (VinePPO, 2410.01679). All rewards of a step count for each of its tokens, including the tokens after the reward.
    """
    most = int(steps.max()) + 1
    places = steps.where(mask, most)  # what is not real goes to a last column, which is cut off
    zeros = rewards.new_zeros(len(rewards), most + 1)
    earned = zeros.scatter_add(1, places, rewards)[:, :most]
    before = zeros.scatter(1, places, values)[:, :most]
    taken = zeros.scatter(1, places, torch.ones_like(rewards))[:, :most] > 0
    advantages, returns = gae(earned, before, taken, 1.0, lam)
    pad = torch.zeros_like(zeros[:, :1])
    return tuple(torch.cat((found, pad), 1).gather(1, places) for found in (advantages, returns))


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-mean min(rho A, clip(rho, 1 - c, 1 + c) A), rho = p / p_old (1707.06347, eq. 7); all [B, T].

    Returns the loss and the fraction of real tokens at which the clipped side is the smaller one. The paper's entropy
    bonus (eq. 9) is left out: the KL penalty keeps the policy from narrowing.
    """
    ratio = (logp - old_logp).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -masked_mean(torch.minimum(plain, clipped), mask), masked_mean((clipped < plain).float(), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Mean of 1/2 max((V - R)^2, (V_c - R)^2), V_c = V kept within V_old +- clip; all [B, T].

    As in OpenAI's `baselines`; the paper has (V - R)^2 alone. Returns the loss and the fraction of real tokens at which
    the clipped side is the larger one.
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
    """Steer the KL per completion to its target: coef (1 + 0.1 e), e = kl / target - 1 kept within +-0.2.

    kl, target: in nats per completion. One update changes the coefficient by at most 2 % (1909.08593, eq. 4).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)


def learning_rate_scale(update: int, settings: PPOSettings) -> float:
    """Factor on both learning rates in an update, from 0: linear up to 1 in the warm-up, then down to 0 after the
    last."""
    up = (update + 1) / max(settings.warmup_updates, 1)
    down = (settings.updates - update) / max(settings.updates - settings.warmup_updates, 1)
    return min(1.0, up, down)


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores seen, exact for any parts (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> "RunningMoments":
        """The moments with these scores [B] in them, too."""
        new, mean = len(scores), scores.double().mean().item()
        squares = ((scores.double() - mean) ** 2).sum().item()
        count, gap = self.count + new, mean - self.mean
        squares += self.squares + gap**2 * self.count * new / count
        return RunningMoments(count, self.mean + gap * new / count, squares)

    def normalize(self, scores: Tensor) -> Tensor:
        """(score - mean) / deviation: [B] -> [B]."""
        return (scores - self.mean) / ((self.squares / self.count) ** 0.5 + 1e-8)
