"""A short PPO training, to be started in several processes by tests/test_ppo_processes.py: KIND WRAPPER OUT."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from test_ppo import QUICK, make_roles, make_tokenizer, questions, says_yes
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from smlib import ppo


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


def main(kind: str, wrapper: str, out: Path) -> None:
    torch.set_num_threads(1)
    roles = make_roles(kind)
    accelerator = (Sharding if wrapper == "fsdp" else Accelerator)(cpu=True)
    ppo.train(roles, says_yes, questions(4), make_tokenizer(), QUICK, out, accelerator=accelerator, checkpoint_every=2)
    if wrapper == "fsdp":
        assert all(hasattr(weight, "full_tensor") for weight in roles.parameters())  # sharded to the end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
