"""Random numbers that depend on a seed alone, whatever the process has drawn before.

with own_draws(seed_of(settings.seed, "02_sft", "adapter")):
    ...  # torch, numpy and Python's random begin at that seed; after the block they are as they were before it
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import set_seed


def seed_of(*parts: str | int) -> int:
    """A seed below 2^32, as numpy wants it, for what a draw belongs to: the run's seed, the stage, the purpose."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "little")


@contextmanager
def own_draws(seed: int) -> Iterator[None]:
    """Let the process's generators begin at this seed within, and go on afterwards as if nothing had been drawn.

    For what can draw from those alone: peft's new weights, transformers' Trainer. Of several GPUs it is about the
    current one, which is all that a process here uses.
    """
    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            set_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
