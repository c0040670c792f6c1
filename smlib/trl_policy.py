"""Stage 04 by TRL's stable trainers: RLOO and GRPO in place of PPO, from the same samples and the same scores.

Neither has a value: what a completion earned is compared with what the other completions of its question did. With the
n rewards r_i of one question, every token of completion i has the advantage

    RLOO    A_i = r_i - (mean of the n - 1 others),    r_i = score_i - kl_coef * kl_i           (2402.14740)
    GRPO    A_i = (r_i - mean of all n) / deviation,   kl_coef * k3 of each token in the loss   (2402.03300)

The ratio p / p_old that is clipped is a whole completion's in RLOO and a token's in GRPO. GRPO averages the loss over
the tokens of a completion and then over completions. Dr. GRPO (2503.20783) leaves out the deviation, by which a
question counts as much where scores hardly differ, and the average by length: GRPO below is where to change that.

TRL's are advantages, losses, clipping and the loop over minibatches. Ours are the completions: `ppo.rollout` draws
them, so that an update has those that PPO draws from the same weights; their scores, shaped as PPO shapes them; their
log-probabilities; and the log, with PPO's columns in PPO's units.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from smlib import checkpoints, ppo
from smlib.answers import Reward, grade_many
from smlib.artifacts import refuse_difference
from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.models import RECOMPUTING, packed_logprobs
from smlib.ppo import PPOSettings
from smlib.problems import Problem
from smlib.progress import progress_bar
from smlib.prompts import open_prompt
from smlib.sampling import MAX_BATCH
from smlib.sft import keep_adapters_exact, on_one_gpu

GRPO = {"scale_rewards": "group", "loss_type": "grpo"}  # 2402.03300; "none" and "dr_grpo" are 2503.20783
CPU_ROWS = 4  # completions in one pass on a CPU: less padding, and they fit its cache
BOOK = "smlib.json"  # the last file of a checkpoint: settings and `ppo.State`; transformers writes the others


class _Ours:
    """What both trainers do our way. An update begins in `_generate_and_score_completions` and ends in `log`."""

    def begin(self, policy, reward, problems, settings, run, so_far, ways, examples_every, bar):
        self.policy, self.reward, self.problems, self.ways = policy, reward, problems, ways  # of drawing
        self.settings, self.run, self.so_far = settings, run, so_far
        self.examples_every, self.bar, self.deferred = examples_every, bar, ExitStack()
        self.place = Path(self.args.output_dir)  # where transformers writes checkpoints
        self.ref_model = "reference"  # TRL just hands it to `_get_per_token_logps_and_entropies`
        self.start = [(weight, weight.detach().clone()) for weight in policy.parameters() if weight.requires_grad]

    def _generate_and_score_completions(self, inputs):
        """Draw and score an update's completions, then let TRL work out the advantages. `inputs` are placeholders."""
        plan, update, self.beta = self.settings, self.so_far.update, self.so_far.kl_coef
        self.clock = [time.perf_counter()]
        update_seed = self.run["seed"] * 1_000_003 + update
        torch.manual_seed(update_seed)  # TRL's shuffle of the completions, too, depends on seed and update alone
        asked = ppo.questions(self.problems, update, plan)
        with ppo.autocast(plan, self.policy.device):
            self.drawn, self.samples = ppo.rollout(
                self.policy, self.processing_class, asked, plan, update_seed, **self.ways
            )
        self.clock.append(time.perf_counter())

        self.asked = [problem for problem in asked for _ in range(plan.samples_per_question)]
        self.texts = [one.text for one in self.samples]
        self.scores = torch.tensor(ppo.scored(self.reward, self.asked, self.samples))
        self.shaped, self.moments = ppo.shape(self.scores, self.samples, self.so_far.moments, plan)
        everything = torch.arange(len(self.samples))
        with torch.no_grad():
            self._swap()
            try:
                self.ref_logp = self._logprobs(everything)
            finally:
                self._swap()
            if plan.precision == "bfloat16":  # rounds token by token otherwise than in one pass
                self.drawn.logp = self._logprobs(everything)
        self.clock.append(time.perf_counter())
        self.deferred.enter_context(ppo.uninterrupted())
        inputs = [{"prompt": open_prompt(problem)} for problem in self.asked]
        return super()._generate_and_score_completions(inputs) | {"row": everything}

    def _swap(self) -> None:
        """Exchange the weights that train with those that training began with, which are the reference's."""
        for weight, other in self.start:
            weight.data, other.data = other.data, weight.data

    def _logprobs(self, rows: Tensor) -> Tensor:
        """The policy's log-probabilities of these rows of `self.drawn`, 0 but for real tokens: [R] -> [R, T]."""
        logp = torch.zeros_like(self.drawn.logp)
        few = CPU_ROWS if logp.device.type == "cpu" else self.args.per_device_train_batch_size
        for some in rows.sort().values.split(few):  # neighbours are of one question, or at least of one task
            with ppo.autocast(self.settings, logp.device):
                flat = packed_logprobs(self.policy, self.drawn.pack(some))
            logp[some] = ppo.spread(flat, self.drawn.mask[some])
        return logp[rows]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.rows_at_hand = inputs["row"]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """Log-probabilities of completions [R, C], padded on the right; in place of their entropies -log p.

        Without a gradient TRL asks for what is known: the policy's came with the samples, the reference's are in the
        log. With one, PPO's pass takes half the time of TRL's, which runs through all padding and scores prompts.
        """
        if torch.is_grad_enabled():
            logp, mask = self._logprobs(self.rows_at_hand), self.drawn.mask[self.rows_at_hand]
        else:
            logp, mask = self.ref_logp if model is self.ref_model else self.drawn.logp, self.drawn.mask
        placed = ppo.spread(logp[mask], attention_mask[:, -logits_to_keep:].bool())
        return placed, -placed.detach(), None

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" not in logs:
            return  # TRL's summary at the end
        if not math.isfinite(logs["loss"] + logs["grad_norm"]):
            raise ppo.NonFiniteError(
                f"loss {logs['loss']}, gradient norm {logs['grad_norm']} in update {self.so_far.update}: the last "
                "checkpoint is as it was; start again in another folder with a lower learning_rate or reward_clip."
            )
        self.clock.append(time.perf_counter())
        so_far, plan, out = self.so_far, self.settings, Path(self.args.output_dir)
        kl = ppo.kl_estimate(self.drawn.logp, self.ref_logp, plan.kl_kind).sum(dim=1)  # per completion
        verdicts = grade_many(self.texts, self.asked)
        row = {
            **ppo.observed(so_far.update, self.drawn, self.samples, self.scores, kl, verdicts),
            "kl_coef": so_far.kl_coef,
            "policy_loss": logs["loss"],
            "clip_fraction": logs["clip_ratio/region_mean"],
            "steps": self.args.logging_steps,
            "learning_rate": plan.learning_rate * ppo.learning_rate_scale(so_far.update, plan),
            **dict(zip(ppo.SECONDS, (end - start for start, end in pairwise(self.clock)), strict=True)),
        }
        ppo.write_row(out, row)
        if so_far.update % self.examples_every == 0:
            ppo.write_examples(out, so_far.update, self.asked, self.texts, self.scores, kl, verdicts)
        if plan.kl_target:
            so_far.kl_coef = ppo.adapt_kl_coef(so_far.kl_coef, row["kl"], plan.kl_target)
        so_far.moments = self.moments
        so_far.rows.append(row)
        so_far.update += 1
        self.bar.update()
        self.bar.set_postfix(reward=f"{row['reward']:.2f}", accuracy=f"{row['accuracy']:.2f}")
        self.deferred.close()  # a Ctrl-C from within the update takes effect here
        ppo.check_collapse(so_far.rows)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if (folder / BOOK).exists():
            return
        with checkpoints.saving(folder, BOOK, {"run": self.run, "state": asdict(self.so_far)}) as self.place:
            super()._save_checkpoint(model, trial)  # writes place/checkpoint-N
            for file in (self.place / folder.name).iterdir():
                file.rename(self.place / file.name)
            (self.place / folder.name).rmdir()

    def _get_output_dir(self, trial):
        return str(self.place)

    def create_model_card(self, *args, **kwargs):
        """TRL's would be a README.md in `out`; a stage has a manifest."""


class _RLOO(_Ours, RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return [list(one.token_ids) for one in self.samples]


class _GRPO(_Ours, GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations):
        # no log-probabilities: what TRL does with them here, it does with vLLM alone
        return [list(one.token_ids) for one in self.samples], None


METHODS = {"rloo": (_RLOO, RLOOConfig, {}), "grpo": (_GRPO, GRPOConfig, GRPO)}


def train(
    method: str,
    policy,
    tokenizer,
    reward: Reward,
    problems: Callable[[int], list[Problem]],
    settings: PPOSettings,
    out: str | Path,
    *,
    seed: int = 0,
    micro_batch: int = 0,
    recompute: bool = False,
    rollout_rows: int = MAX_BATCH,
    cuda_graphs: bool = False,
    checkpoint_every: int = 10,
    examples_every: int = 10,
    progress: str | None = None,
) -> list[dict]:
    """Train `policy` in place by "rloo" or "grpo"; return one row (dict) per update, as in out/log.csv.

    policy: a causal language model, or a peft model with a "default" adapter. As it is when this is called, it is also
        the reference, so pass the same weights again to resume.
    reward, problems, out, seed, micro_batch, recompute, rollout_rows, cuda_graphs, progress: as in `ppo.train`, and
        so are resuming and Ctrl-C. One process only, and no engine but our own sampler.
    settings: kl_coef is TRL's beta, clip its epsilon, epochs its num_iterations; scores are centred, normalised,
        clipped and fined for a missing end as PPO's are, before the advantages above are taken of them (of centred
        scores RLOO's are n / (n - 1) times the scores, a factor that Adam does not see). There being no
        value and no discount, value*, gamma and lam mean nothing; nor does max_update_kl: no update stops early,
        clipping alone holds it back.

    In the log policy_loss is TRL's loss (GRPO's with the KL in it) and clip_fraction that of completions for RLOO.
    """
    _check(method, policy, tokenizer, settings, micro_batch)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = {"method": method} | asdict(settings) | {"seed": seed}
    checkpoint = checkpoints.newest(out)
    so_far = ppo.State(kl_coef=settings.kl_coef)
    if checkpoint:
        said = checkpoints.opened(checkpoint, BOOK)
        refuse_difference(checkpoint, run, said["run"], "folder")
        so_far = ppo.restored(said["state"])
    ppo.start_logs(out, so_far)
    fitting = {"micro_batch": micro_batch, "recompute": recompute}
    ways = {"rows": rollout_rows, "cuda_graphs": cuda_graphs}
    with own_draws(seed):  # TRL's trainers seed and read the process's generators
        trainer = _make_trainer(method, policy, tokenizer, settings, out, seed, checkpoint_every, **fitting)
        bar = progress_bar(progress, settings.updates, "update", so_far.update)
        trainer.begin(policy, reward, problems, settings, run, so_far, ways, examples_every, bar)
        try:
            with _quiet():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            steps = so_far.update * trainer.args.logging_steps
            if steps and trainer.state.global_step == steps:  # not amid an update
                trainer._save_checkpoint(policy, None)
            raise
        finally:
            bar.close()
            _clean(policy)
            trainer.deferred.close()
    return so_far.rows


def _make_trainer(
    method: str, policy, tokenizer, settings: PPOSettings, out: Path, seed: int, checkpoint_every: int,
    micro_batch: int, recompute: bool,
):  # fmt: skip
    trainer_class, config_class, options = METHODS[method]
    rows = micro_batch or settings.minibatch
    steps = settings.epochs * settings.episodes // settings.minibatch  # of the optimizer, in one update
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: ppo.learning_rate_scale(step // steps, settings))
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
        **{RECOMPUTING: recompute},
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
    keep_adapters_exact(policy)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off standard error what is no fault: an old name in TRL's code, tied weights that a checkpoint has once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _clean(policy) -> None:
    """Take back what TRL has changed of the policy besides its weights."""
    base = policy.get_base_model() if is_peft_model(policy) else policy
    del base.forward  # TRL's own, which can do without logits
    if getattr(base, f"is_{RECOMPUTING}"):
        getattr(base, f"{RECOMPUTING}_disable")()
    if base is not policy and "ref" in policy.peft_config:  # RLOO's copy of the adapter
        policy.delete_adapter("ref")
    policy.eval()


def _check(method: str, policy, tokenizer, settings: PPOSettings, micro_batch: int) -> None:
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; choose one of: {', '.join(METHODS)}.")
    ppo.check_padding(tokenizer)
    ppo.check_micro_batch(settings, 1, micro_batch)
    if settings.episodes % settings.minibatch:
        raise UsageError(
            f"episodes = {settings.episodes} is no multiple of minibatch = {settings.minibatch}; make it one, as "
            "TRL's minibatches are all of one size."
        )
    if dropout := getattr(policy.config, "attention_dropout", 0):
        raise UsageError(f"attention_dropout = {dropout} must be 0: set it in the policy's config before loading it.")
