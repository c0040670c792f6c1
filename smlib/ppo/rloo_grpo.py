"""Stage 04 by TRL's stable trainers: RLOO and GRPO in place of PPO, from the same samples and the same scores.

Neither has a value: what a completion earned is compared with what the other completions of its question did. With the
n rewards r_i of one question, every token of completion i has the advantage

    RLOO    A_i = r_i - (mean of the n - 1 others),    r_i = score_i - kl_coef * kl_i           (2402.14740)
    GRPO    A_i = (r_i - mean of all n) / deviation,   kl_coef * k3 of each token in the loss   (2402.03300)

The ratio p / p_old that is clipped is a whole completion's in RLOO and a token's in GRPO. GRPO averages the loss over
the tokens of a completion and then over completions. Dr. GRPO (2503.20783) leaves out the deviation, by which a
question counts as much where scores hardly differ, and the average by length: GRPO below is where to change that.

TRL's are advantages, losses, clipping and the loop over minibatches. Ours are the completions: `rollouts.rollout` draws
them, so that an update has those that PPO draws from the same weights; their scores, shaped as PPO shapes them; their
log-probabilities; and the log, with PPO's columns in PPO's units. The papers have the scores as the reward gives them;
`train` says what shaping them does to the advantages.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.files import checkpoints
from smlib.files.artifacts import refuse_difference
from smlib.judging.answers import Reward, grade_many
from smlib.learning.trainers import on_one_gpu, prepare
from smlib.ppo import arithmetic, batches, checks, rollouts, state, training_log, updates
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem
from smlib.problems.prompts import open_prompt
from smlib.progress import progress_bar
from smlib.sampling.models import CHECKPOINTING
from smlib.sampling.packing import packed_logprobs
from smlib.sampling.sampler import MAX_BATCH

GRPO = {"scale_rewards": "group", "loss_type": "grpo"}  # 2402.03300; "none" and "dr_grpo" are 2503.20783
CPU_ROWS = 4  # completions in one pass on a CPU: less padding, and they fit its cache
STATE_FILE = "smlib.json"  # the last file of a checkpoint: settings and `state.State`; transformers writes the others


class _PolicyTrainer:
    """What both trainers do as PPO does. An update begins in `_generate_and_score_completions` and ends in `log`."""

    def begin(self, policy, reward, problems, settings, run, reached, max_batch, examples_every, bar):
        """What TRL's constructor does not take. run: the settings with method and seed; reached: `state.State`."""
        self.policy, self.reward, self.problems, self.settings = policy, reward, problems, settings
        self.run, self.reached, self.max_batch = run, reached, max_batch
        self.examples_every, self.bar, self.held_signals = examples_every, bar, ExitStack()
        self.out = self.checkpoint_folder = Path(self.args.output_dir)
        self.ref_model = "reference"  # TRL just hands it to `_get_per_token_logps_and_entropies`
        self.initial_weights = [(weight, weight.detach().clone()) for weight in _trainable(policy)]

    def _generate_and_score_completions(self, inputs):
        """Draw and score an update's completions, then let TRL work out the advantages. `inputs` are placeholders."""
        settings, update, self.beta = self.settings, self.reached.update, self.reached.kl_coef
        started = time.perf_counter()
        update_seed = rollouts.seed_of_update(self.run["seed"], update)
        torch.manual_seed(update_seed)  # TRL's shuffle of the completions, too, depends on seed and update alone
        asked = rollouts.questions_of_update(self.problems, update, settings)
        with batches.autocast(settings, self.policy.device):
            self.drawn, self.samples = rollouts.rollout(
                self.policy, self.processing_class, asked, settings, update_seed, self.max_batch
            )
        drawn = time.perf_counter()

        self.asked = [problem for problem in asked for _ in range(settings.samples_per_question)]
        self.scores = torch.tensor(rollouts.reward_scores(self.reward, self.asked, self.samples))
        self.shaped, self.moments = rollouts.shape_scores(self.scores, self.samples, self.reached.moments, settings)
        everything = torch.arange(len(self.samples))
        with torch.no_grad():
            self._swap_reference()
            try:
                self.ref_logp = self._logprobs(everything)
            finally:
                self._swap_reference()
            if batches.rounds(settings):  # rounds token by token otherwise than in one pass
                self.drawn.logp = self._logprobs(everything)
        self.scored = time.perf_counter()
        self.seconds = {"rollout_seconds": drawn - started, "score_seconds": self.scored - drawn}
        self.held_signals.enter_context(state.uninterrupted())
        inputs = [{"prompt": open_prompt(problem)} for problem in self.asked]
        return super()._generate_and_score_completions(inputs) | {"row": everything}

    def _swap_reference(self) -> None:
        """Exchange the weights that train with those that training began with, which are the reference's."""
        for weight, other in self.initial_weights:
            weight.data, other.data = other.data, weight.data

    def _logprobs(self, rows: Tensor) -> Tensor:
        """The policy's log-probabilities of these rows of `self.drawn`, 0 but for real tokens: [R] -> [R, T]."""
        logp = torch.zeros_like(self.drawn.logp)
        at_once = CPU_ROWS if logp.device.type == "cpu" else self.args.per_device_train_batch_size
        for some in rows.sort().values.split(at_once):  # neighbours are of one question, or at least of one task
            with batches.autocast(self.settings, logp.device):
                flat = packed_logprobs(self.policy, self.drawn.pack(some))
            logp[some] = batches.unpack(flat, self.drawn.mask[some])
        return logp[rows]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.minibatch_rows = inputs["row"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Log-probabilities of completions [R, C], padded on the right; in place of their entropies -log p.

        Without a gradient TRL asks for what is known: the policy's came with the samples, the reference's are in the
        log. With one, PPO's pass takes half the time of TRL's, which runs through all padding and scores prompts.
        """
        if torch.is_grad_enabled():
            logp, mask = self._logprobs(self.minibatch_rows), self.drawn.mask[self.minibatch_rows]
        else:
            logp, mask = self.ref_logp if model is self.ref_model else self.drawn.logp, self.drawn.mask
        table = batches.unpack(logp[mask], attention_mask[:, -logits_to_keep:].bool())
        return table, -table.detach(), None

    def log(self, logs, start_time=None):
        """End an update, of which TRL gives its numbers: write PPO's row of the log, and count the update."""
        super().log(logs, start_time)
        if "loss" not in logs:
            return  # TRL's summary at the end
        if not math.isfinite(logs["loss"] + logs["grad_norm"]):
            raise updates.NonFiniteError(
                f"loss {logs['loss']}, gradient norm {logs['grad_norm']} in update {self.reached.update}: the last "
                "checkpoint is intact; start again in another folder with a lower learning_rate or reward_clip"
            )
        seconds = self.seconds | {"update_seconds": time.perf_counter() - self.scored}
        row = self._write_log(logs, seconds)
        self.reached.advance(row, self.moments, self.settings)
        self.bar.update()
        self.bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row['accuracy']:.2f}")
        self.held_signals.close()  # a Ctrl-C from within the update takes effect here
        training_log.check_collapse(self.reached.rows)

    def _write_log(self, logs: dict, seconds: dict[str, float]) -> dict:
        """The update's row of log.csv, and now and then its examples."""
        reached, settings, texts = self.reached, self.settings, [sample.text for sample in self.samples]
        kl = arithmetic.kl_estimate(self.drawn.logp, self.ref_logp, settings.kl_kind).sum(dim=1)  # per completion
        verdicts = grade_many(self.asked, texts)
        row = {
            **training_log.completion_columns(reached.update, self.drawn, self.samples, self.scores, kl, verdicts),
            "kl_coef": reached.kl_coef,
            "policy_loss": logs["loss"],
            "clip_fraction": logs["clip_ratio/region_mean"],
            "steps": self.args.logging_steps,
            "learning_rate": settings.learning_rate * arithmetic.learning_rate_scale(reached.update, settings),
            **seconds,
        }
        training_log.write_row(self.out, row)
        if reached.update % self.examples_every == 0:
            training_log.write_examples(self.out, reached.update, self.asked, texts, self.scores, kl, verdicts)
        return row

    def _save_checkpoint(self, model, trial):
        folder = self.out / f"checkpoint-{self.state.global_step}"
        if (folder / STATE_FILE).exists():
            return
        saved = {"run": self.run, "state": asdict(self.reached)}
        with checkpoints.new_checkpoint(folder, STATE_FILE, saved) as self.checkpoint_folder:
            super()._save_checkpoint(model, trial)  # writes checkpoint_folder/checkpoint-N
            for file in (self.checkpoint_folder / folder.name).iterdir():
                file.rename(self.checkpoint_folder / file.name)
            (self.checkpoint_folder / folder.name).rmdir()

    def save_if_between_updates(self) -> None:
        """Save a checkpoint, unless training was stopped before the first update, or amid one."""
        steps = self.reached.update * self.args.logging_steps
        if steps and self.state.global_step == steps:
            self._save_checkpoint(self.policy, None)

    def _get_output_dir(self, trial):
        return str(self.checkpoint_folder)

    def create_model_card(self, *args, **kwargs):
        """TRL's would be a README.md in `out`; a stage has a manifest."""


class _RLOO(_PolicyTrainer, RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [list(one.token_ids) for one in self.samples]


class _GRPO(_PolicyTrainer, GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        # no log-probabilities: what TRL does with them here, it does with vLLM alone
        return [list(one.token_ids) for one in self.samples], None


METHODS = {"rloo": (_RLOO, RLOOConfig, {}), "grpo": (_GRPO, GRPOConfig, GRPO)}


def train(
    policy: PreTrainedModel | PeftModel,
    reward: Reward,
    problems: Callable[[int], list[Problem]],
    tokenizer: PreTrainedTokenizerBase,
    settings: PPOSettings,
    out: str | Path,
    *,
    method: str,
    seed: int = 0,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
    max_batch: int = MAX_BATCH,
    checkpoint_every: int = 10,
    examples_every: int = 10,
    progress: str | None = None,
) -> list[dict]:
    """Train `policy` in place by `method`, "rloo" or "grpo"; return one row (dict) per update, as in out/log.csv.

    policy: a causal language model, or a peft model with a "default" adapter. As it is when this is called, it is also
        the reference, so pass the same weights again to resume.
    All else is as in `ppo.train`, resuming and Ctrl-C, too. One process only, and no engine but our own sampler.
    settings: kl_coef is TRL's beta, clip its epsilon, epochs its num_iterations; scores are centred, normalised,
        clipped and fined for a missing end as PPO's are, before the advantages above are taken of them (of centred
        scores RLOO's are n / (n - 1) times the scores, a factor that Adam does not see). There being no
        value and no discount, value*, gamma and lam mean nothing; nor does max_update_kl: no update stops early,
        clipping alone holds it back.

    In the log policy_loss is TRL's loss (GRPO's with the KL in it) and clip_fraction that of completions for RLOO.
    Raises UsageError for what cannot be trained, StageMismatch for a checkpoint of other settings and StageError for a
    damaged one, CollapseError where going on is pointless, NonFiniteError after a step that was not finite.
    """
    _check(method, policy, tokenizer, settings, micro_batch)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = {"method": method} | settings.keys() | {"seed": seed}
    checkpoint, reached = checkpoints.newest(out), state.State(kl_coef=settings.kl_coef)
    if checkpoint:
        saved = checkpoints.read_state(checkpoint, STATE_FILE)
        refuse_difference(checkpoint, run, saved["run"], "folder")
        reached = state.State.from_json(saved["state"])
    training_log.start_logs(out, reached)
    with own_draws(seed):  # TRL's trainers seed and read the process's generators
        trainer = _make_trainer(
            method, policy, tokenizer, settings, out, seed, checkpoint_every, micro_batch, gradient_checkpointing
        )
        bar = progress_bar(progress, settings.updates, "update", reached.update)
        trainer.begin(policy, reward, problems, settings, run, reached, max_batch, examples_every, bar)
        try:
            with _without_false_alarms():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            trainer.save_if_between_updates()
            raise
        finally:
            bar.close()
            _undo_changes_by_trl(policy)
            trainer.held_signals.close()
    return reached.rows


def _make_trainer(
    method: str, policy, tokenizer, settings: PPOSettings, out: Path, seed: int, checkpoint_every: int,
    micro_batch: int, gradient_checkpointing: bool,
):  # fmt: skip
    trainer_class, config_class, options = METHODS[method]
    rows = micro_batch or settings.minibatch
    steps = settings.epochs * settings.episodes // settings.minibatch  # of the optimizer, in one update
    optimizer = torch.optim.AdamW(_trainable(policy), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: arithmetic.learning_rate_scale(step // steps, settings))
    config = config_class(
        output_dir=str(out),
        max_steps=settings.updates * steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=settings.minibatch // rows,
        generation_batch_size=settings.episodes,
        num_generations=settings.samples_per_question,
        num_iterations=settings.epochs,
        max_completion_length=settings.max_new_tokens,
        beta=0.0,  # until `begin`, so that no reference is loaded
        epsilon=settings.clip,
        max_grad_norm=settings.max_grad_norm,
        disable_dropout=True,
        bf16=False,  # `_logprobs` has the precision
        use_cpu=policy.device.type == "cpu",
        seed=seed,
        logging_steps=steps,
        logging_nan_inf_filter=False,
        save_steps=checkpoint_every * steps,
        ignore_data_skip=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{CHECKPOINTING: gradient_checkpointing},
        **options,
    )
    trainer = trainer_class(
        model=policy,
        reward_funcs=lambda trainer_state, **kwargs: trainer.shaped.tolist(),
        args=on_one_gpu(config),
        train_dataset=Dataset.from_list([{"prompt": ""}] * settings.questions),  # one epoch of them is one update
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )
    prepare(trainer)
    return trainer


def _trainable(policy: PreTrainedModel | PeftModel) -> list[Tensor]:
    return [weight for weight in policy.parameters() if weight.requires_grad]


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """Keep off standard error what is no fault: an old name in TRL's code, tied weights that a checkpoint has once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _undo_changes_by_trl(policy: PreTrainedModel | PeftModel) -> None:
    """Take back what TRL has changed of the policy besides its weights."""
    base = policy.get_base_model() if is_peft_model(policy) else policy
    del base.forward  # TRL's own, which can do without logits
    if getattr(base, f"is_{CHECKPOINTING}"):
        getattr(base, f"{CHECKPOINTING}_disable")()
    if base is not policy and "ref" in policy.peft_config:  # RLOO's copy of the adapter
        policy.delete_adapter("ref")
    policy.eval()


def _check(method: str, policy, tokenizer, settings: PPOSettings, micro_batch: int) -> None:
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; choose one of: {', '.join(METHODS)}")
    checks.check_padding(tokenizer)
    checks.check_micro_batch(settings, 1, micro_batch)
    if settings.episodes % settings.minibatch:
        raise UsageError(
            f"episodes = {settings.episodes} is not a multiple of minibatch = {settings.minibatch}; make it one, "
            "since all of TRL's minibatches have one size"
        )
    if dropout := getattr(policy.config, "attention_dropout", 0):
        raise UsageError(f"attention_dropout = {dropout} must be 0: set it in the policy's config before loading it")
