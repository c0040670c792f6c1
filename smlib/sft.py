"""Supervised fine-tuning on r+ by TRL's SFTTrainer: the warm-up of the method, and the RFT/STaR baseline."""

import tempfile
from collections.abc import Sequence

from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from smlib import models, prompts
from smlib.problems import Problem
from smlib.progress import progress_bar

disable_progress_bars()  # the datasets library's own bars, about a second's work, go to standard error


class Progress(TrainerCallback):
    """One bar on standard output with the running loss; the Trainer's own bar writes to standard error."""

    def __init__(self, label: str | None):
        self.label, self.bar = label, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = progress_bar(self.label, state.max_steps, "step")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def trainer_options(
    model: PreTrainedModel,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    out: str,
    micro_batch: int = 0,
    recompute: bool = False,
) -> dict:
    """What SFT, DPO and the reward model have in common, where the model is: on a GPU or a CPU.

    No mixed precision: a model computes in the precision that it was loaded in, and adapters of it in float32.
    micro_batch: rows per forward pass, 0 = the batch at once; it must divide the batch (ValueError), whose rows and
    gradient do not depend on it.
    """
    rows = micro_batch or batch
    if rows < 1 or batch % rows:
        raise ValueError(f"a batch of {batch} cannot be made of micro batches of {rows}: give a number that divides it")
    return {
        "output_dir": out,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch // rows,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "optim": "adamw_torch_fused",
        "seed": seed,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        models.RECOMPUTING: recompute,
        "logging_steps": 10,
        "logging_first_step": True,  # a short run has a log, too
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
    }


def fit(trainer, label: str | None) -> list[dict]:
    """Train with our bar in place of the Trainer's printing; returns its log rows that hold a loss."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(label))
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rows: list[dict],
    *,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    micro_batch: int = 0,
    recompute: bool = False,
    progress: str | None = "SFT",
) -> list[dict]:
    """Fine-tune `model` in place on the r+ among `rows`; returns the training log.

    Each example is the question-only prompt and the rationale, whatever prompt drew it; the loss is on the
    completion and its end-of-sequence alone (our choice). micro_batch, recompute: `settings.HardwareSettings`.
    """
    by_id = {problem.id: problem for problem in problems}
    examples = []
    for row in rows:
        if row["side"] == "+":
            head = models.encode_prompt(tokenizer, prompts.open_prompt(by_id[row["id"]]))
            tail = models.encode_completion(tokenizer, row["text"])
            mask = [0] * len(head) + [1] * len(tail)
            examples.append({"input_ids": head + tail, "completion_mask": mask, "length": len(mask)})
    if not examples:
        raise ValueError("SFT needs at least one r+ rationale, got none: sample more, or from a stronger base")
    with tempfile.TemporaryDirectory() as out:
        options = trainer_options(model, epochs, learning_rate, batch, seed, out, micro_batch, recompute)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**options, max_length=None, completion_only_loss=True, loss_type="nll"),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        log = fit(trainer, progress)
    model.eval()
    return log
