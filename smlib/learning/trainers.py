"""What all trainings by TRL share: their options, their bar, and their batches in several processes."""

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from smlib.errors import UsageError
from smlib.progress import progress_bar
from smlib.sampling import devices, models

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


def micro_batch_rows(batch: int, micro_batch: int, processes: int) -> int:
    """Rows per forward pass of one process; ValueError where the batch does not come out even."""
    rows = micro_batch or batch // processes
    if rows < 1 or batch % (rows * processes):
        many = f" in each of {processes} processes" * (processes > 1)
        raise UsageError(
            f"a batch of {batch} cannot be split into micro batches of {rows}{many}: give a hardware.micro_batch that "
            "divides it, or another batch"
        )
    return rows


def trainer_options(
    model: PreTrainedModel,
    epochs: float,
    learning_rate: float,
    batch: int,
    seed: int,
    out: str,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
) -> dict:
    """What SFT, DPO and the reward model have in common, where the model is: on a GPU or a CPU.

    No mixed precision: a model computes in the precision that it was loaded in, and adapters of it in float32.
    batch: rows per step of all processes together. micro_batch: rows per forward pass of one, 0 = all at once. The
    batch's rows and its gradient depend on neither; it must come out even (ValueError).
    """
    processes = devices.process_state().num_processes
    rows = micro_batch_rows(batch, micro_batch, processes)
    return {
        "output_dir": out,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch // (rows * processes),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "optim": "adamw_torch_fused",
        "seed": seed,
        "use_cpu": model.device.type == "cpu",
        "bf16": False,
        models.CHECKPOINTING: gradient_checkpointing,
        "logging_steps": 10,
        "logging_first_step": True,  # a short run has a log, too
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
        "ddp_find_unused_parameters": False,  # there are none, and looking for them takes time
    }


def prepare(trainer: Trainer) -> None:
    """Take off the Trainer's own printing, and bring the adapters of a 4-bit base back to float32: TRL rounds them to
    bfloat16, where small steps are lost."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if getattr(trainer.model, "is_loaded_in_4bit", False):
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()


def dataset(examples: list[dict], idle: dict) -> Dataset:
    """The examples for a trainer with `SharedBatches`.

    idle: one that teaches nothing and has pads for tokens. It comes last in several processes, which all take as many
    rows: those of the last batch that have none take this one.
    """
    return Dataset.from_list(examples + [idle] * (devices.process_state().num_processes > 1))


class _SharedSampler(LengthGroupedSampler):
    """The order of one process, and then the idle example until the last micro batch of every process is full."""

    def __init__(self, lengths: list[int], batch: int, together: int):
        super().__init__(batch, lengths=lengths[:-1])
        self.together = together  # rows of all processes in one forward pass

    def __len__(self):
        return -(-len(self.lengths) // self.together) * self.together

    def __iter__(self):
        examples = len(self.lengths)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size) + [examples] * (len(self) - examples))


def on_one_gpu(args: TrainingArguments) -> TrainingArguments:
    """A process has one GPU, however many it sees: transformers takes all for DataParallel, which TRL refuses."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


class SharedBatches:
    """Of a Trainer, which has one GPU a process: in several the batches, one after the other, are those of one process.

    transformers would group by length what is one process's share. Its micro batches, dealt out in turns, it fills up
    with rows from the beginning, which then count twice.
    """

    def __init__(self, *, args, **options):
        super().__init__(args=on_one_gpu(args), **options)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        processes = self.accelerator.num_processes
        if processes == 1:
            return sampler
        return _SharedSampler(sampler.lengths, sampler.batch_size * processes, self._train_batch_size * processes)

    def sum_over_processes(self, counts: list[int]) -> list[int]:
        return self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum").tolist()


def fit(trainer, label: str | None) -> list[dict]:
    """Train with our bar in place of the Trainer's printing; returns its log rows that hold a loss."""
    prepare(trainer)
    trainer.add_callback(Progress(label if trainer.is_world_process_zero() else None))
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]
