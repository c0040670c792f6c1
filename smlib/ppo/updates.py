"""What the models do with a batch: log-probabilities and values without gradients, and an update's optimizer steps.

Every process runs its share of each minibatch, in micro batches where memory is short; sums over tokens are what the
processes add up, so that neither the number of processes nor the size of micro batches changes an update by more than
rounding.
"""

import math
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from torch.optim import Optimizer

from smlib.errors import UserError
from smlib.ppo.arithmetic import kl_estimate, masked_mean, policy_loss, value_loss
from smlib.ppo.batches import Batch, autocast, local_part, micro_batches, unpack
from smlib.ppo.roles import Roles
from smlib.ppo.rollouts import EngineMismatchError
from smlib.ppo.settings import PPOSettings


@torch.no_grad()
def logprobs_and_values(
    roles: Roles, batch: Batch, size: int, reference: bool, micro_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """What `Roles.forward` gives, for all completions: log-probabilities (nats) and values, each [B, T], 0 elsewhere.

    reference: the log-probabilities are the reference's in place of the policy's. The passes are in minibatches of
    `size`, and of those `micro_batch` completions at a time in every process, 0 = all.
    """
    logp, values = torch.zeros_like(batch.logp), torch.zeros_like(batch.logp)
    for rows in chain.from_iterable(
        micro_batches(rows, micro_batch) for rows in batch.minibatches(size, part=local_part())
    ):
        logp[rows], values[rows] = (unpack(flat, batch.mask[rows]) for flat in roles(batch.pack(rows), reference))
    return reduce(logp, "sum"), reduce(values, "sum")


class NonFiniteError(UserError, RuntimeError):
    """A loss or a gradient is not a finite number."""


MEASURED = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "update_kl")


def losses(roles: Roles, batch: Batch, rows: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor]:
    """What to minimise over these rows [R] of the batch (a scalar), and the numbers MEASURED [5].

    Both are sums over the real tokens, so that micro batches and processes add up.
    """
    mask, old_logp, old_values = batch.mask[rows], batch.logp[rows], batch.values[rows]
    advantages, returns = batch.advantages[rows], batch.returns[rows]
    with autocast(settings, mask.device):
        logp, values = (unpack(flat, mask) for flat in roles(batch.pack(rows)))
    p_loss, p_clipped = policy_loss(logp, old_logp, advantages, mask, settings.clip)
    if not settings.value_learns:
        values = old_values + 0 * values  # which keeps every weight in the graph, as DDP wants it
    v_loss, v_clipped = value_loss(values, old_values, returns, mask, settings.value_clip)
    update_kl = masked_mean(kl_estimate(old_logp, logp.detach(), "k3"), mask)
    found = torch.stack([p_loss, v_loss, p_clipped, v_clipped, update_kl]).detach()
    return (p_loss + settings.value_coef * v_loss) * mask.sum(), found * mask.sum()


def optimize(
    accelerator: Accelerator, roles: Roles, optimizer: Optimizer, batch: Batch, settings: PPOSettings,
    generator: torch.Generator, micro_batch: int = 0,
) -> dict:  # fmt: skip
    """Epochs of minibatches over one batch; returns the means of MEASURED over the minibatches, and "steps" taken.

    A minibatch weighs by its tokens: as they are sorted by length, tokens of short completions would weigh
    more otherwise. Policy and value, the optimizer's two groups, have their gradients clipped by norms of their own.
    Stops early once the policy is max_update_kl (k3, nats per token) away from the one that drew the batch, which PPO's
    paper does not. Raises NonFiniteError before the weights are touched by what is not finite, and EngineMismatchError
    where the policy is as far away before any step.

    micro_batch: completions of a minibatch in one forward and backward pass of a process, 0 = all; gradients add up,
    and everything else is decided for the minibatch.
    """
    measured, steps = [], 0
    tokens_per_step = batch.mask.sum() * min(settings.minibatch / len(batch.ids), 1.0)
    passes = (batch.minibatches(settings.minibatch, generator, local_part()) for _ in range(settings.epochs))
    for rows in chain.from_iterable(passes):
        *parts, last = micro_batches(rows, micro_batch)
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
            f"before its first step the policy is {measured[-1][-1]:.3g} nats per token from its own rollouts, more "
            f"than max_update_kl = {settings.max_update_kl}; sample with the weights and precision that are trained"
        )
    return dict(zip(MEASURED, torch.stack(measured).mean(dim=0).tolist(), strict=True)) | {"steps": steps}
