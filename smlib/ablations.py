"""Change one choice of a finished run and measure what it does: the reward model's pairs, or how the policy learns.

A variant is a folder inside the run that links the run's earlier stages and makes its own from there on: by the
same stage functions, resumable, and without touching the run. Everything is measured on fresh questions of the
train split, never on a test set.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from smlib import evaluation, models, pipeline, reward_model
from smlib.artifacts import Stage, require
from smlib.settings import Settings

PAIRS = (("both", "both"), ("base", "both"), ("both", "open"), ("both", "conditioned"))  # reward.pairs, reward.wrong
SAMPLED = ("01_sampling", "02_ranking", "02_sft", "03_second_sampling")
TABLE = Path(__file__).parents[1] / "results" / "ablations.csv"  # what benchmarks/ablations.py writes
CURVE_COLUMNS = ("policy", "seed", "update", "tokens", "reward", "accuracy", "kl", "entropy", "length")
COLUMNS = ("seed", "setting", "value", "metric", "score", "low", "high", "n")


def branch(run_dir: str | Path, name: str, stages: Sequence[str]) -> Path:
    """The folder of a variant, `run_dir`/ablations/`name`, with links to the run's finished stages."""
    folder = Path(run_dir) / "ablations" / name
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        require(run_dir, stage)
        if not (folder / stage).exists():
            (folder / stage).symlink_to(Path("..", "..", stage), target_is_directory=True)
    return folder


def answers(settings: Settings, model, questions: int, k: int = 8, progress=None) -> list[dict]:
    """Greedy and k sampled answers of a model to fresh questions; with equal settings, to the same ones."""
    return evaluation.evaluate(
        model, models.load_tokenizer(settings.base), pipeline.fresh_problems(settings, questions), k=k,
        temperature=settings.evaluation.temperature, max_new_tokens=settings.sampling.max_new_tokens,
        seed=settings.seed, progress=progress,
    )  # fmt: skip


def reward_rows(
    run_dir: str | Path, settings: Settings, pairs: str, wrong: str, answered: list[dict], progress: bool = True
) -> list[dict]:
    """Train the reward model on other pairs (see RewardSettings), or take the run's own where they are the same;
    measure it on all held-out pairs, and by best of k.

    answered: `answers` of the SFT model. Shares have Wilson intervals over pairs (those of one question are alike, so
    the intervals are somewhat narrow); mean and best of k have t intervals over questions.
    """
    own = settings.reward
    settings = replace(settings, reward=replace(own, pairs=pairs, wrong=wrong))
    folder = run_dir if settings.reward == own else branch(run_dir, f"reward-{pairs}-{wrong}", SAMPLED)
    stage = pipeline.train_reward_model(folder, settings, progress=progress)
    row = _labelled(settings, "reward model's pairs", f"pairs {pairs}, wrong {wrong}")
    rows = []
    for author, name in (("base", "base"), ("sft", "SFT model")):
        ranked = [pair["ranked_right"] for pair in stage.read_rows("held_out") if pair["author"] == author]
        if ranked:
            interval = evaluation.accuracy_interval(sum(ranked), len(ranked))
            rows.append(row(f"held-out pairs of the {name}", sum(ranked) / len(ranked), interval, len(ranked)))
    judge, tokenizer = models.load_policy(stage.path("model")), models.load_tokenizer(settings.base)
    fresh = pipeline.fresh_problems(settings, len(answered) // len(settings.tasks))
    problems = {problem.id: problem for problem in fresh}
    best, mean = [], []
    for answer in answered:
        asked = [problems[answer["id"]]] * len(answer["sampled_texts"])
        scores = reward_model.score(judge, tokenizer, asked, answer["sampled_texts"])
        best.append(evaluation.best_of_n(scores, answer["sampled_correct"]))
        mean.append(sum(answer["sampled_correct"]) / len(asked))
    rows.append(row(f"best of {len(asked)}", sum(best) / len(best), evaluation.mean_interval(best), len(best)))
    rows.append(row(f"mean of {len(asked)}", sum(mean) / len(mean), evaluation.mean_interval(mean), len(mean)))
    return rows


def policy(
    run_dir: str | Path, settings: Settings, name: str, method: str, reward: str, progress: bool = True
) -> Stage:
    """The policy of a run trained another way (`pipeline.train_policy`), in the variant `name`."""
    folder = branch(run_dir, f"policy-{name}", (*SAMPLED, "03_reward_model"))
    return pipeline.train_policy(folder, settings, method, reward, progress=progress)


def curve_rows(stage: Stage, settings: Settings, name: str) -> list[dict]:
    """The log of a trained policy, a row for each update: CURVE_COLUMNS; tokens are all drawn so far."""
    with stage.path("training/log.csv").open() as file:
        log = list(csv.DictReader(file))
    rows, tokens = [], 0
    for row in log:
        tokens += int(row["tokens"])
        numbers = [round(float(row[column]), 4) for column in CURVE_COLUMNS[4:]]
        rows.append(dict(zip(CURVE_COLUMNS, (name, settings.seed, int(row["update"]), tokens, *numbers), strict=True)))
    return rows


def policy_rows(stage: Stage, settings: Settings, name: str, answered: list[dict]) -> list[dict]:
    """A trained policy's accuracy on the questions of `answered`, the SFT model's `answers`, and its gain over it,
    question by question."""
    trained, questions = models.load_policy(stage.path("model")), len(answered) // len(settings.tasks)
    after = answers(settings, trained, questions, len(answered[0]["sampled_texts"]))
    row = _labelled(settings, "policy", name)
    rows = []
    for metric, values in _accuracies(after).items():
        share = metric == "greedy"
        interval = (
            evaluation.accuracy_interval(int(sum(values)), len(values)) if share else evaluation.mean_interval(values)
        )
        rows.append(row(metric, sum(values) / len(values), interval, len(values)))
        test = evaluation.paired_test(values, _accuracies(answered)[metric])
        rows.append(row(f"{metric}, gain over SFT", test["mean_difference"], (test["low"], test["high"]), test["n"]))
    return rows


def _accuracies(answered: list[dict]) -> dict[str, list[float]]:
    k = len(answered[0]["sampled_correct"])
    return {
        "greedy": [float(row["greedy_correct"]) for row in answered],
        f"avg@{k}": [sum(row["sampled_correct"]) / k for row in answered],
    }


def _labelled(settings: Settings, setting: str, value: str):
    def row(metric: str, score: float, interval: tuple[float, float], n: int) -> dict:
        numbers = [round(number, 4) for number in (score, *interval)]
        return dict(zip(COLUMNS, (settings.seed, setting, value, metric, *numbers, n), strict=True))

    return row
