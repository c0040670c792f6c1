"""Seconds per update of TRL 1.12's PPOTrainer, for benchmarks/ppo.py, which starts it; its environment is that of
trl_ppo.py.

    .venv-trl/bin/python benchmarks/peers/trl_ppo_speed.py < job.json

The job says the model's folder, the prompts as token ids and the settings; the last line of the output is JSON: per
update its seconds, whole and by phase, the tokens drawn, and the length of every completion, question by question.

`PPOTrainer.train` runs as it is. The clock is read in functions put around `batch_generation`, the function `forward`
and `PPOTrainer.log`, which change nothing: rollout is `batch_generation`; score (reference, value, reward, advantages)
goes on until policy and value are first read to train; update ends at the log line. What is left belongs to the whole
update alone. An update ends where the next one's generation starts, so one more than asked for is run.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock:
    """Times of an update's turning points, one list entry per update, and the lengths of what was drawn."""

    def __init__(self, prompts: list[list[int]], pad: int, eos: int):
        self.prompts, self.pad, self.eos = prompts, pad, eos
        self.started, self.drawn, self.trained, self.logged, self.lengths = [], [], [], [], []

    def watch(self, trainer: PPOTrainer) -> None:
        generate, forward, log = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log

        def generation(model, queries, *rest):
            self.started.append(time.perf_counter())
            found = generate(model, queries, *rest)
            self.drawn.append(time.perf_counter())
            self.lengths.append(self.count(queries, found[0][:, queries.shape[1] :]))
            return found

        def noted_forward(model, *rest):
            if model is trainer.model and len(self.trained) < len(self.started):
                self.trained.append(time.perf_counter())
            return forward(model, *rest)

        def noted_log(*rest):
            self.logged.append(time.perf_counter())
            log(*rest)

        ppo_trainer.batch_generation, ppo_trainer.forward, trainer.log = generation, noted_forward, noted_log

    def count(self, queries, responses) -> list[int]:
        """Tokens of each completion with its end token, in the order of the questions: TRL shuffles them."""
        ended = (responses == self.eos).int()
        lengths = (ended.cumsum(1) - ended == 0).sum(1).tolist()
        asked = [self.prompts.index([token for token in row if token != self.pad]) for row in queries.tolist()]
        return [lengths[row] for row in sorted(range(len(asked)), key=asked.__getitem__)]

    def found(self) -> dict:
        def between(starts, ends):
            return [end - start for start, end in zip(starts, ends, strict=True)][:-1]

        return {
            "seconds": [end - start for start, end in pairwise(self.started)],
            "rollout": between(self.started, self.drawn),
            "score": between(self.drawn, self.trained),
            "update": between(self.trained, self.logged),
            "lengths": self.lengths[:-1],
            "tokens": [sum(lengths) for lengths in self.lengths[:-1]],
        }


def make_trainer(job: dict, folder: str) -> PPOTrainer:
    """Episodes in one batch, and num_mini_batches for the optimizer steps: gradient accumulation would take fewer."""
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    rows = [prompt for prompt in job["prompts"] for _ in range(job["samples"])]
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, num_sample_generations=0, seed=0, stop_token="eos",
        missing_eos_penalty=1.0, temperature=1.0, learning_rate=job["learning_rate"], num_ppo_epochs=job["epochs"],
        response_length=job["new_tokens"], per_device_train_batch_size=len(rows),
        num_mini_batches=len(rows) // job["minibatch"], total_episodes=len(rows) * (job["updates"] + 1),
        local_rollout_forward_batch_size=job["rollout_batch"],
    )  # fmt: skip
    return PPOTrainer(config, tokenizer, policy, reference, reward, Dataset.from_dict({"input_ids": rows}), value)


def main() -> None:
    if trl.__version__ != "1.12.0":
        raise SystemExit(f"this is trl {trl.__version__}; the comparison is with 1.12.0: pip install trl==1.12.0")
    job = json.load(sys.stdin)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(job, folder)
        tokenizer = trainer.processing_class
        clock = Clock(job["prompts"], tokenizer.pad_token_id, tokenizer.eos_token_id)
        clock.watch(trainer)
        trainer.train()
    print("\n" + json.dumps(clock.found() | {"engine": f"trl {trl.__version__}", "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
