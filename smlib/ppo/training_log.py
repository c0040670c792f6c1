"""The log of a training: log.csv has a row for each update, examples.jsonl some completions; and when to give up.

The columns of log.csv, means over the completions of an update where nothing else is said:

    update                                 its number, from 0
    reward                                 the reward's score, as it was given
    accuracy, invalid                      share of completions with the right answer; with no answer at all
    kl                                     nats per completion between policy and reference, before the update
    entropy                                nats per token of the policy
    length, tokens                         tokens per completion; of all completions
    cut                                    share of completions that ended at the limit of their length
    engine_gap                             nats per token between engine and policy (with an engine)
    value_tokens                           tokens drawn from prefixes (with values by rollouts)
    kl_coef                                reward lost per nat
    explained_variance                     share of the returns' variance that the value had predicted (PPO)
    policy_loss, value_loss                means over the minibatches (value_loss: PPO)
    clip_fraction, value_clip_fraction     share of tokens at which the clipped side counted (the latter: PPO)
    update_kl                              nats per token between the policy that drew and the one that trains (PPO)
    steps                                  optimizer steps taken
    learning_rate                          of the policy
    rollout_, score_, update_seconds       for drawing; for scores and log-probabilities; for the optimizer steps

A line of examples.jsonl is a completion: {"update", "id", "question", "completion", "reward", "kl" (nats), "correct",
"extracted" (the answer, or null)}.
"""

import csv
import json
import math
from pathlib import Path
from statistics import fmean

from torch import Tensor

from smlib.errors import UserError
from smlib.files import checkpoints
from smlib.files.atomic import write_text
from smlib.judging.answers import Verdict
from smlib.ppo.arithmetic import masked_mean
from smlib.ppo.batches import Batch
from smlib.ppo.state import State
from smlib.problems.datasets import Problem
from smlib.sampling.params import Sample

SECONDS = ("rollout_seconds", "score_seconds", "update_seconds")  # phases in the log


def completion_columns(
    update: int, batch: Batch, samples: list[Sample], scores: Tensor, kl: Tensor, verdicts: list[Verdict]
) -> dict[str, float]:
    """The part of a log row that is about the completions: scores [B], kl [B] in nats per completion."""
    return {
        "update": update,
        "reward": scores.mean().item(),
        "accuracy": fmean(verdict.correct for verdict in verdicts),
        "invalid": fmean(verdict.extracted is None for verdict in verdicts),
        "kl": kl.mean().item(),
        "entropy": -masked_mean(batch.logp, batch.mask).item(),  # Monte Carlo: -E log p
        "length": batch.mask.sum().item() / len(samples),
        "tokens": batch.mask.sum().item(),
        "cut": fmean(drawn.finish_reason == "length" for drawn in samples),
    }


class CollapseError(UserError, RuntimeError):
    """Training has reached a state that it does not leave."""


def check_collapse(rows: list[dict], last: int = 5) -> None:
    """Raise CollapseError if the last updates show no answer at all where once most completions had one, or
    a policy that is all but deterministic and earns less than it did at the start."""
    if len(rows) < 2 * last:
        return
    start, end = rows[:last], rows[-last:]
    advice = "start again with a lower learning_rate or a higher kl_coef; examples.jsonl shows what it writes."
    if min(row["invalid"] for row in end) == 1 and min(row["invalid"] for row in rows) < 0.5:
        raise CollapseError(f"no completion of the last {last} updates has an answer: {advice}")
    was, now = (sum(row["reward"] for row in part) / last for part in (start, end))
    if max(row["entropy"] for row in end) < 0.01 and now < was:
        raise CollapseError(
            f"the policy no longer explores (entropy below 0.01 nats per token for {last} updates), and its mean "
            f"reward of {now:.3g} is below the {was:.3g} it began with: {advice}"
        )


def start_logs(out: Path, state: State) -> None:
    """Take back what was logged after the checkpoint that training starts from, and remove older checkpoints."""
    checkpoints.keep_newest(out)
    (out / "log.csv").unlink(missing_ok=True)
    for row in state.rows:
        write_row(out, row)
    examples = out / "examples.jsonl"
    lines = examples.read_text(encoding="utf-8").splitlines(keepends=True) if examples.exists() else []
    write_text(examples, "".join(line for line in lines if _update_of(line) < state.update))


def _update_of(line: str) -> float:
    """The update of a line of examples.jsonl; of one that a kill has cut, one that never was."""
    try:
        return json.loads(line)["update"]
    except (ValueError, LookupError, TypeError):
        return math.inf


def write_row(out: Path, row: dict) -> None:
    """Append a row to log.csv, under a header if it is the first."""
    with open(out / "log.csv", "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def write_examples(
    out: Path, update: int, problems: list[Problem], texts: list[str], scores: Tensor, kl: Tensor,
    verdicts: list[Verdict],
) -> None:  # fmt: skip
    """Append eight completions of an update to examples.jsonl, evenly spaced, so of several questions, to be read."""
    rows = list(zip(problems, texts, scores.tolist(), kl.tolist(), verdicts, strict=True))
    with open(out / "examples.jsonl", "a", encoding="utf-8") as file:
        for problem, text, score, nats, verdict in rows[:: max(1, len(rows) // 8)][:8]:
            example = {"update": update, "id": problem.id, "question": problem.question, "completion": text}
            example |= {"reward": score, "kl": nats, "correct": verdict.correct, "extracted": verdict.extracted}
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
