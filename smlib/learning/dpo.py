"""Direct preference optimisation (2305.18290) by TRL's DPOTrainer, on pairs that are token ids.

The loss is -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), where a log-ratio is log p of the side's
tokens under the policy minus that under the reference, the policy as it was before training. The same function learns
from outcome pairs, whose sides are whole rationales, and from the step-level pairs of Self-Explore (2404.10346, section
3.3), whose rejected side is one step that nothing ends.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Sequence

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.learning.rows import Pair
from smlib.learning.trainers import SharedBatches, dataset, fit, trainer_options

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class _TokenTrainer(SharedBatches, DPOTrainer):
    """TRL's trainer for tokens: of texts it would end both sides with end-of-sequence, and tokenise them.

    Of a step's micro batches, in all processes, each counts by its pairs: to TRL all are alike, and the last one may be
    smaller. An idle pair, whose sides are empty, has a loss of log 2 that nothing can change; it is taken off.
    """

    loss_is_scaled_for_ga = True  # by compute_loss

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def get_batch_samples(self, *arguments):
        batches, _ = super().get_batch_samples(*arguments)
        return batches, self.sum_over_processes([sum(len(batch["input_ids"]) - _idle(batch) for batch in batches)])[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs)
        if not num_items_in_batch:
            return loss
        loss = loss * (len(inputs["input_ids"]) / num_items_in_batch)
        loss = loss - math.log(2) * _idle(inputs) / num_items_in_batch
        return loss * self.accelerator.num_processes  # which average their gradients


def _idle(batch: dict) -> int:
    """How many rows, two of a pair, have no token to learn from."""
    return int((batch["completion_mask"].sum(1) == 0).sum())


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    beta: float,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
    progress: str | None = "DPO",
) -> list[dict]:
    """Fine-tune `model` in place on `pairs`; returns the log (loss, rewards/accuracies, rewards/margins, ...).

    pairs: with prompt_ids; all three lists of tokens are trained on exactly as they are. batch: pairs per step. The
    linear schedule and the warm-up over a tenth of the steps are those of the Self-Explore reference code. model: with
    a new adapter on it, its base is the reference. micro_batch, gradient_checkpointing: `settings.HardwareSettings`.

    Raises ValueError without pairs, for an empty side, and for a chosen side that does not end with end-of-sequence,
    from which the policy would not learn to stop.
    """
    if not pairs:
        raise UsageError("DPO needs at least one pair, got none: sample more, or explore with a smaller k")
    for pair in pairs:
        if empty := [name for name in COLUMNS if not getattr(pair, name)]:
            raise UsageError(f"a pair of {pair.id} has an empty side: {', '.join(empty)}; give every side its tokens")
        if pair.chosen_ids[-1] != tokenizer.eos_token_id:
            raise UsageError(
                f"the chosen side of a pair of {pair.id} does not end with end-of-sequence: append token id "
                f"{tokenizer.eos_token_id}"
            )
    examples = []
    for pair in pairs:
        ids = {name: list(getattr(pair, name)) for name in COLUMNS}
        examples.append(ids | {"length": len(ids["prompt_ids"]) + max(len(ids[name]) for name in COLUMNS[1:])})
    with tempfile.TemporaryDirectory() as out, own_draws(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # TRL's own calls, at every step
        options = trainer_options(model, epochs, learning_rate, batch, seed, out, micro_batch, gradient_checkpointing)
        options |= {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
        options |= {"remove_unused_columns": False}  # it would remove the lengths, by which pairs are grouped
        idle = {"prompt_ids": [tokenizer.pad_token_id] * 2, "chosen_ids": [], "rejected_ids": [], "length": 2}
        trainer = _TokenTrainer(
            model=model,
            ref_model=None if is_peft_model(model) else copy.deepcopy(model).requires_grad_(False),
            args=DPOConfig(**options, beta=beta, loss_type="sigmoid", max_length=None),
            train_dataset=dataset(examples, idle),
            processing_class=tokenizer,
        )
        log = fit(trainer, progress)
    if is_peft_model(model):
        model.delete_adapter("ref")  # the reference: TRL's copy of the adapter as it was
    model.eval()
    return log
