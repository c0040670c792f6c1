"""Supervised fine-tuning on r+ by TRL's SFTTrainer: the warm-up of the method."""

import tempfile
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.learning.rows import Rationale
from smlib.learning.trainers import SharedBatches, dataset, fit, trainer_options
from smlib.problems.datasets import Problem
from smlib.sampling import encoding


class _Trainer(SharedBatches, SFTTrainer):
    """Its loss is the mean over the tokens of all micro batches and processes: by TRL, which averages the gradients."""


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rationales: Sequence[Rationale],
    *,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
    progress: str | None = "SFT",
    given: Callable[[Rationale], int] = lambda one: 0,
) -> list[dict]:
    """Fine-tune `model` in place on the r+ among `rationales`, those of `side` "+"; returns the training log.

    Each example is the question-only prompt and the rationale's tokens as drawn, whatever prompt drew it. The loss is
    on the completion and its end-of-sequence alone (our choice). problems: those of the rationales, by id.
    micro_batch, gradient_checkpointing: `settings.HardwareSettings`. given: how many of a rationale's first tokens are
    read without a loss, like the question.
    """
    by_id = {problem.id: problem for problem in problems}
    examples = []
    for one in rationales:
        if one.side == "+":
            head = encoding.encode_question(tokenizer, by_id[one.id])
            tail = encoding.closed(tokenizer, one.token_ids)
            read = len(head) + min(given(one), len(tail))
            mask = [0] * read + [1] * (len(head) + len(tail) - read)
            examples.append({"input_ids": head + tail, "completion_mask": mask, "length": len(mask)})
    if not examples:
        raise UsageError("SFT needs at least one r+ rationale, got none: sample more, or from a stronger base")
    with tempfile.TemporaryDirectory() as out, own_draws(seed):  # the Trainer seeds itself, and draws from all
        options = trainer_options(model, epochs, learning_rate, batch, seed, out, micro_batch, gradient_checkpointing)
        pads = [tokenizer.pad_token_id] * 2
        trainer = _Trainer(
            model=model,
            args=SFTConfig(**options, max_length=None, completion_only_loss=True, loss_type="nll"),
            train_dataset=dataset(examples, {"input_ids": pads, "completion_mask": [0, 0], "length": 2}),
            processing_class=tokenizer,
        )
        log = fit(trainer, progress)
    model.eval()
    return log
