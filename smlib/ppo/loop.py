"""Token-level PPO for rationales with a learned reward (stage 04).

One update, in the order of the code:

    rollout -> score -> reference log-probs and values -> rewards -> GAE    `collect`
    -> minibatches                                                          `learn`
    -> log row -> checkpoint                                                `log`, `save_checkpoint`

Four roles: the *policy* that learns, the frozen *reference* it may not stray far from (the SFT model), the *reward*
that scores a finished text, and the *value* that predicts from every prefix the reward to come. `smlib.ppo.roles` holds
them in memory, `smlib.ppo.arithmetic` has the equations with their shapes, units and sources.

What is not in PPO's paper (1707.06347), each by a setting or said where it is done: shaped scores (`rollouts`); a KL
penalty in the rewards; whitened advantages; clipped values; gradients of policy and value clipped each by itself; an
update that stops early at max_update_kl. What is in the paper and not here: the entropy bonus.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from smlib.errors import UsageError
from smlib.judging.answers import Reward, grade_many
from smlib.ppo.arithmetic import (
    RunningMoments,
    explained_variance,
    gae,
    kl_estimate,
    learning_rate_scale,
    token_rewards,
    whiten,
)
from smlib.ppo.batches import Batch, autocast, local_share, rounds
from smlib.ppo.checks import check_engine, check_micro_batch, check_padding, check_shares
from smlib.ppo.prefix_values import values_by_rollouts
from smlib.ppo.roles import Roles, unsharded
from smlib.ppo.rollouts import (
    PolicyEngine,
    engine_gap,
    hand_over,
    questions_of_update,
    reward_scores,
    rollout,
    seed_of_update,
    shape_scores,
)
from smlib.ppo.settings import PPOSettings
from smlib.ppo.state import State, load_checkpoint, save_checkpoint, uninterrupted, uses_deepspeed, with_batch_saved
from smlib.ppo.training_log import check_collapse, completion_columns, start_logs, write_examples, write_row
from smlib.ppo.updates import NonFiniteError, logprobs_and_values, optimize
from smlib.problems.datasets import Problem
from smlib.progress import progress_bar
from smlib.sampling import devices
from smlib.sampling.params import Sample
from smlib.sampling.sampler import MAX_BATCH


@dataclass(frozen=True)
class Training:
    """What all updates of a training share; the arguments of `train` say what each of them is."""

    accelerator: Accelerator
    roles: Roles  # as accelerate has wrapped them
    optimizer: torch.optim.Optimizer  # its groups: the policy's weights, the value's weights
    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    settings: PPOSettings
    out: Path
    micro_batch: int
    max_batch: int
    engine: PolicyEngine | None


@dataclass(frozen=True)
class Experience:
    """What an update learns from, and what the log says of it."""

    batch: Batch  # with values, advantages and returns
    problems: list[Problem]  # of each completion, as all below
    samples: list[Sample]
    texts: list[str]
    scores: Tensor  # [B] as the reward gave them
    kl: Tensor  # [B] nats
    moments: RunningMoments  # with this update's scores in them
    columns: dict[str, float]  # of the log: with an engine "engine_gap", with values by rollouts "value_tokens"
    seconds: dict[str, float]  # of the log: for drawing, and for scores and log-probabilities


def collect(training: Training, asked: list[Problem], state: State, seed: int) -> Experience:
    """Draw completions of the problems `asked`, score them, and work out which token deserves what.

    Raises UsageError for scores that are not one finite number each, EngineMismatchError for an engine that has drawn
    from something else than the policy.
    """
    settings = training.settings
    plain = training.accelerator.unwrap_model(training.roles)
    if training.engine:
        hand_over(plain, training.engine, training.out / "hand-over")
    started = time.perf_counter()
    plain.eval()
    with unsharded(plain), autocast(settings, training.accelerator.device):
        batch, samples = rollout(
            plain.policy, training.tokenizer, asked, settings, seed, training.max_batch, training.engine
        )
    drawn = time.perf_counter()

    problems = [problem for problem in asked for _ in range(settings.samples_per_question)]
    scores = gather_object(reward_scores(training.reward, local_share(problems), local_share(samples)))
    scores = torch.tensor(scores, device=training.accelerator.device)
    shaped, moments = shape_scores(scores, samples, state.moments, settings)
    ref_logp, engine_columns = _read(training, batch, state.update)
    kl = kl_estimate(batch.logp, ref_logp, settings.kl_kind)
    rewards = token_rewards(shaped, kl, batch.mask, state.kl_coef)
    value_columns = {}
    if settings.value == "rollouts":
        with unsharded(plain):
            found = values_by_rollouts(
                plain.policy, training.tokenizer, training.reward, batch, problems, samples, scores, moments, settings,
                seed, training.max_batch, training.engine,
            )  # fmt: skip
        batch.values, value_columns = found.values, {"value_tokens": found.tokens}
        advantages, batch.returns = found.advantages(rewards, batch.mask, settings.lam)
    else:
        advantages, batch.returns = gae(rewards, batch.values, batch.mask, settings.gamma, settings.lam)
    batch.advantages = whiten(advantages, batch.mask)

    seconds = {"rollout_seconds": drawn - started, "score_seconds": time.perf_counter() - drawn}
    texts = [sample.text for sample in samples]
    columns = engine_columns | value_columns
    return Experience(batch, problems, samples, texts, scores, kl.sum(dim=1), moments, columns, seconds)


def _read(training: Training, batch: Batch, update: int) -> tuple[Tensor, dict[str, float]]:
    """Let the models read the batch: its values are filled in; the reference's log-probabilities [B, T] are returned.

    The old log-probabilities are those of the drawing, unless that rounds otherwise than a pass over all tokens does;
    then they are computed anew. With an engine the log's column "engine_gap" is returned, too, else {}.
    """
    roles, settings, drawn = training.roles, training.settings, batch.logp
    with autocast(settings, training.accelerator.device):
        ref_logp, batch.values = logprobs_and_values(roles, batch, settings.minibatch, True, training.micro_batch)
        if training.engine or rounds(settings):
            batch.logp, _ = logprobs_and_values(roles, batch, settings.minibatch, False, training.micro_batch)
    if not training.engine:
        return ref_logp, {}
    return ref_logp, {"engine_gap": engine_gap(drawn, batch.logp, ref_logp, batch.mask, update)}


def learn(training: Training, experience: Experience, state: State, seed: int) -> dict[str, float]:
    """Take the optimizer steps of an update; returns the columns of the log that are about them, and all seconds.

    Raises NonFiniteError, with the batch saved, before a weight is touched by what is not finite.
    """
    started, settings = time.perf_counter(), training.settings
    scale = learning_rate_scale(state.update, settings)
    training.optimizer.param_groups[0]["lr"] = settings.learning_rate * scale
    training.optimizer.param_groups[1]["lr"] = settings.value_learning_rate * scale
    shuffle = torch.Generator().manual_seed(seed)
    try:
        measured = optimize(
            training.accelerator, training.roles, training.optimizer, experience.batch, settings, shuffle,
            training.micro_batch,
        )  # fmt: skip
    except NonFiniteError as error:
        raise with_batch_saved(error, training.out, experience.batch, state) from error
    seconds = experience.seconds | {"update_seconds": time.perf_counter() - started}
    return measured | {"learning_rate": settings.learning_rate * scale} | seconds


def log(training: Training, experience: Experience, learned: dict[str, float], state: State, examples: bool) -> dict:
    """Write the row of an update to log.csv and to accelerate's trackers, and examples of its completions if asked.

    Here, after the optimizer's steps, is where the checker grades the completions: for the log alone.
    """
    batch, accelerator = experience.batch, training.accelerator
    verdicts = grade_many(experience.problems, experience.texts)
    row = {
        **completion_columns(state.update, batch, experience.samples, experience.scores, experience.kl, verdicts),
        **experience.columns,
        "kl_coef": state.kl_coef,
        "explained_variance": explained_variance(batch.values, batch.returns, batch.mask),
        **learned,
    }
    if accelerator.is_main_process:
        write_row(training.out, row)
        if examples:
            shown = experience.problems, experience.texts, experience.scores, experience.kl, verdicts
            write_examples(training.out, state.update, *shown)
    accelerator.log(row, step=state.update)
    return row


def train(
    roles: Roles,
    reward: Reward,
    problems: Callable[[int], list[Problem]],
    tokenizer: PreTrainedTokenizerBase,
    settings: PPOSettings,
    out: str | Path,
    *,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
    max_batch: int = MAX_BATCH,
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
    out: folder of log.csv, examples.jsonl (`smlib.ppo.training_log` has their columns) and the newest checkpoint. A
        folder with a checkpoint of the same settings is resumed; on a CPU the end is bit-equal to that of an
        uninterrupted run. StageMismatch for a checkpoint of other settings, StageError for a damaged one.
    accelerator: it says on what device and in how many processes (`accelerate launch`) to train, and where to log
        besides: `devices.accelerator(log_with="tensorboard", project_dir=out)`. None: one of its defaults.
    micro_batch: completions in one pass of a process, forward and backward, 0 = its share of the minibatch; it must
        divide that. gradient_checkpointing: activations in the backward pass. max_batch: completions drawn at
        once. What the hardware needs: the results are the same up to rounding, and a run may be resumed with others.
    engine: who draws in place of our own sampler, for `Adapters` in one process. Before every rollout it is handed the
        policy's adapter in out/hand-over, after it checked by `engine_gap`, which is in the log.
    checkpoint_every, examples_every: updates from one checkpoint, or one set of examples, to the next.
    progress: label of a progress bar on standard output; None prints nothing.

    Ctrl-C saves a checkpoint and raises KeyboardInterrupt. Raises UsageError for what `smlib.ppo.checks` refuses,
    CollapseError where going on is pointless, NonFiniteError with the batch saved, and EngineMismatchError before the
    update.
    """
    accelerator, out = accelerator or devices.accelerator(), Path(out)
    check_padding(tokenizer)
    check_micro_batch(settings, accelerator.num_processes, micro_batch)
    check_shares(settings, accelerator.num_processes)
    check_engine(engine, roles, accelerator.num_processes)
    out.mkdir(parents=True, exist_ok=True)
    roles, optimizer = _prepare(accelerator, roles, micro_batch, gradient_checkpointing)
    training = Training(accelerator, roles, optimizer, reward, tokenizer, settings, out, micro_batch, max_batch, engine)
    run = settings.keys() | {"seed": seed} | ({"engine": engine.name} if engine else {})
    state = load_checkpoint(out, roles, optimizer, run) or State(kl_coef=settings.kl_coef)
    if accelerator.is_main_process:
        start_logs(out, state)
    accelerator.init_trackers("ppo", run)
    bar = progress_bar(progress if accelerator.is_main_process else None, settings.updates, "update", state.update)
    try:
        while state.update < settings.updates:
            update_seed = seed_of_update(seed, state.update)
            asked = questions_of_update(problems, state.update, settings)
            experience = collect(training, asked, state, update_seed)
            with uninterrupted():
                learned = learn(training, experience, state, update_seed)
                row = log(training, experience, learned, state, examples=state.update % examples_every == 0)
                state.advance(row, experience.moments, settings)
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


def _prepare(
    accelerator: Accelerator, roles: Roles, micro_batch: int, gradient_checkpointing: bool
) -> tuple[Roles, torch.optim.Optimizer]:
    """The roles and their AdamW, wrapped by accelerate for its device and processes."""
    if gradient_checkpointing:
        roles.checkpoint_gradients()
    groups = [{"params": list(weights.values())} for weights in roles.weights().values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    roles, optimizer = accelerator.prepare(roles, optimizer)
    if micro_batch and uses_deepspeed(roles):
        raise UsageError(
            "DeepSpeed steps the optimizer after every backward pass: give micro_batch = 0 and a lower minibatch"
        )
    return roles, optimizer
