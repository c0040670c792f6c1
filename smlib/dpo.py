"""Direct preference optimisation (2305.18290) by TRL's DPOTrainer, on pairs that are token ids.

The loss is -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), where a log-ratio is log p of the side's
tokens under the policy minus that under the reference, the policy as it was before training. The same function learns
from outcome pairs, whose sides are whole rationales, and from the step-level pairs of Self-Explore (2404.10346, section
3.3), whose rejected side is one step that nothing ends.
"""

import copy
import tempfile
import warnings
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from smlib.sft import fit, trainer_options

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class _TokenTrainer(DPOTrainer):
    """TRL's trainer for tokens: of texts it would end both sides with end-of-sequence, and tokenise them."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def train_dpo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[dict],
    *,
    beta: float,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    progress: str | None = "DPO",
) -> list[dict]:
    """Fine-tune `model` in place on `pairs`; returns the log (loss, rewards/accuracies, rewards/margins, ...).

    pairs: rows with prompt_ids, chosen_ids and rejected_ids, trained on exactly as they are. batch: pairs per step. The
    linear schedule and the warm-up over a tenth of the steps are those of the Self-Explore reference code.

    Raises ValueError without pairs, for an empty side, and for a chosen side that does not end with end-of-sequence,
    from which the policy would not learn to stop.
    """
    if not pairs:
        raise ValueError("DPO needs at least one pair, got none: sample more, or explore with a smaller k")
    for pair in pairs:
        if empty := [name for name in COLUMNS if not pair[name]]:
            raise ValueError(f"a pair of {pair['id']} has an empty side: {', '.join(empty)}")
        if pair["chosen_ids"][-1] != tokenizer.eos_token_id:
            raise ValueError(f"the chosen side of a pair of {pair['id']} does not end with end-of-sequence")
    examples = []
    for pair in pairs:
        ids = {name: list(pair[name]) for name in COLUMNS}
        examples.append(ids | {"length": len(ids["prompt_ids"]) + max(len(ids[name]) for name in COLUMNS[1:])})
    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # TRL's own call, at every step
        options = trainer_options(epochs, learning_rate, batch, seed, out)
        options |= {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
        options |= {"remove_unused_columns": False}  # it would remove the lengths, by which pairs are grouped
        trainer = _TokenTrainer(
            model=model,
            ref_model=copy.deepcopy(model).requires_grad_(False),
            args=DPOConfig(**options, beta=beta, loss_type="sigmoid", max_length=None),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        log = fit(trainer, progress)
    model.eval()
    return log
