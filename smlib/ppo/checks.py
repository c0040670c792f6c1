"""What a training cannot be done with, refused by UsageError before any work."""

from transformers import PreTrainedTokenizerBase

from smlib.errors import UsageError
from smlib.ppo.roles import Adapters, Roles
from smlib.ppo.rollouts import PolicyEngine
from smlib.ppo.settings import PPOSettings
from smlib.sampling.packing import group_size


def check_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a pad token of its own."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageError(
            f"pad token {tokenizer.pad_token!r} must exist and differ from the end token "
            f"{tokenizer.eos_token!r}: add a separate pad token, or training would mask the end tokens as padding"
        )


def check_micro_batch(settings: PPOSettings, processes: int, micro_batch: int) -> None:
    """Refuse micro batches (completions, 0 = no micro batches) that do not divide a process's share of a minibatch."""
    if micro_batch and settings.minibatch % (processes * micro_batch):
        raise UsageError(
            f"minibatch = {settings.minibatch} in {processes} processes cannot be split into micro batches of "
            f"micro_batch = {micro_batch} completions: give a micro_batch that divides each process's share"
        )


def check_shares(settings: PPOSettings, processes: int) -> None:
    """Refuse a number of processes that cannot divide the questions of an update, or a minibatch, evenly."""
    size = settings.minibatch
    groups = size // group_size(size, settings.samples_per_question)
    if processes > 1 and (settings.questions % processes or groups % processes or settings.episodes % size):
        raise UsageError(
            f"{settings.questions} questions per update and {groups} groups of completions in a minibatch of {size} "
            f"cannot be shared by {processes} processes: make both multiples of {processes}, and episodes = "
            f"{settings.episodes} a multiple of minibatch = {size}"
        )


def check_engine(engine: PolicyEngine | None, roles: Roles, processes: int) -> None:
    """Refuse an engine for several processes, or for roles without an adapter to hand over."""
    if engine is not None and processes > 1:
        raise UsageError(
            f"engine {engine.name!r} samples for one process, not for {processes}: sample with the native engine, or "
            "train without accelerate launch or torchrun"
        )
    if engine is not None and not isinstance(roles, Adapters):
        raise UsageError(
            f"engine {engine.name!r} can load adapters, but not all weights of {type(roles).__name__}: train with LoRA "
            "(lora.rank of at least 1), or sample with the native engine"
        )
