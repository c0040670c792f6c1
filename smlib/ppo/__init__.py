"""Proximal policy optimisation of rationales by a learned reward; RLOO and GRPO beside it.

    from smlib import ppo
    rows = ppo.train(roles, reward, problems, tokenizer, ppo.PPOSettings(updates=10), "out")

The names below are there on demand, as reading the settings takes no torch. The rest, a module for each step:

    settings      the numbers that a training depends on
    roles         policy, reference and value, and how they are held in memory
    rollouts      completions and their scores
    batches       completions as tables and as packed rows
    arithmetic    the equations: KL, rewards, GAE, losses
    updates       log-probabilities, values and optimizer steps of one batch
    training_log  log.csv, examples.jsonl, and when to give up
    state         checkpoints
    checks        what is refused before any work
    loop          PPO: all of the above in order
    rloo_grpo     RLOO and GRPO by TRL's trainers, from the same rollouts
"""

from importlib import import_module

_PLACES = {"train": "loop", "PPOSettings": "settings"}
__all__ = [*_PLACES]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
