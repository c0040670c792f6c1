"""Short trainings by TRL, to be started in several processes by tests/test_training_processes.py: OUT."""

import json
import sys
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from test_dpo import PAIRS as DPO_PAIRS
from test_dpo import QUICK as DPO_QUICK
from test_reward_model import PAIRS, QUICK
from test_reward_model import PROBLEMS as PAIR_PROBLEMS
from test_sft import PROBLEMS, ROWS
from test_sft import QUICK as SFT_QUICK
from tiny_model import policy, tokenizer

from smlib.learning import dpo, reward_model, sft
from smlib.runs import shared
from smlib.sampling import models

# Rows: of the last batch of four, three or one are left. So an idle row stands beside others, and alone.
KINDS = {
    "whole": {"rows": 11, "options": {"epochs": 8}},
    "adapters": {"rows": 9, "options": {"epochs": 8, "micro_batch": 1, "gradient_checkpointing": True}},
}
TRAININGS = {
    "sft": lambda model, rows, options: sft.train_sft(
        model, tokenizer(), PROBLEMS, ROWS[:rows], **SFT_QUICK | options
    ),
    "reward": lambda model, rows, options: reward_model.train_reward_model(
        model, tokenizer(), PAIR_PROBLEMS, PAIRS[:rows], **QUICK | {"batch": 4} | options
    ),
    "dpo": lambda model, rows, options: dpo.train_dpo(model, tokenizer(), DPO_PAIRS[:rows], **DPO_QUICK | options),
}  # fmt: skip


def run(name: str, kind: str, out: Path, **options) -> None:
    """Train, and write the weights that train, in float32, and the log's losses."""
    model = policy()
    if kind == "adapters":
        model = models.add_lora(model.bfloat16(), rank=2, alpha=4, targets="all-linear", base="", seed=1)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    log = TRAININGS[name](model, KINDS[kind]["rows"], KINDS[kind]["options"] | options)
    if PartialState().is_main_process:
        out.mkdir(parents=True)
        save_file(
            {n: w.detach().clone() for n, w in model.named_parameters() if n in trained}, out / "weights.safetensors"
        )
        (out / "loss.json").write_text(json.dumps([row["loss"] for row in log]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, kind in product(TRAININGS, KINDS):
        run(name, kind, Path(sys.argv[1]) / name / kind)
    shared.end_process_group()
