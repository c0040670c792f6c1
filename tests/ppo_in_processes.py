"""Short PPO trainings, to be started in several processes by tests/test_ppo_processes.py: OUT KIND:WRAPPER ...

KIND is one of test_ppo's, or as the presets of large models train: adapters of a bfloat16 base, its attention with a
key for every head ("large") or for two ("large, grouped").
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from test_ppo import QUICK, make_roles, make_tokenizer, questions, says_yes, tiny_config
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from smlib.ppo import loop
from smlib.ppo.roles import Adapters
from smlib.runs import shared
from smlib.sampling import models


class Sharding(Accelerator):
    """accelerate leaves FSDP to GPUs; this shards on CPUs as it would there (FSDP 2, a unit for each layer)."""

    def prepare(self, roles, optimizer):
        names = [[_name(roles, weight) for weight in group["params"]] for group in optimizer.param_groups]
        for layer in [module for module in roles.modules() if isinstance(module, LlamaDecoderLayer)]:
            fully_shard(layer)
        fully_shard(roles)
        weights = dict(roles.named_parameters())
        for group, mine in zip(optimizer.param_groups, names, strict=True):
            group["params"] = [weights[name] for name in mine]
        return roles, super().prepare(optimizer)


def _name(roles, weight):
    return next(name for name, other in roles.named_parameters() if other is weight)


class SaysYes:
    """A reward that reads tokens: `says_yes` of all that was drawn, behind special tokens, too."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def of_samples(self, problems, samples):
        drawn = [self.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in samples]
        return says_yes(problems, drawn)


def large_roles(grouped: bool) -> Adapters:
    config = tiny_config()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2 if grouped else 4, 8
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).bfloat16().eval()
    # Drawn from some seeds, such as 0, the weights differ by up to 2e-3 after: bfloat16 rounds a sum of two halves.
    return Adapters(models.add_lora(base, 4, 8, "all-linear", base="base", seed=2))


def train(kind: str, out: Path, accelerator: Accelerator | None = None):
    """The training that all processes share, or that one does alone."""
    plan, hardware, large = QUICK, {}, kind.startswith("large")
    if large:
        plan = replace(QUICK, precision="bfloat16")
        hardware = {"micro_batch": 2, "gradient_checkpointing": True, "max_batch": 6}
    roles = large_roles(kind == "large, grouped") if large else make_roles(kind)
    problems, tokenizer = questions(4), make_tokenizer()
    reward = SaysYes(tokenizer) if large else says_yes
    loop.train(roles, reward, problems, tokenizer, plan, out, accelerator=accelerator, checkpoint_every=2, **hardware)
    return roles


def main(out: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    for case in cases:
        kind, wrapper = case.split(":")
        roles = train(kind, out / case, (Sharding if wrapper == "fsdp" else Accelerator)(cpu=True))
        if wrapper == "fsdp":
            assert all(hasattr(weight, "full_tensor") for weight in roles.parameters())  # sharded to the end
        del roles
    shared.end_process_group()
    os._exit(0)  # torch's caches keep the group of sharded weights, and so its threads, when all others let go


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
