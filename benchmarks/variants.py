"""Change one choice of a finished run and measure what it does: the reward model's pairs, how the policy learns, or
the step-level pairs of Self-Explore.

A variant is a folder inside the run that links the run's earlier stages and makes its own from there on: by the
same stage functions, resumable, and without touching the run. Everything is measured on fresh questions of the
train split, never on a test set.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from smlib.files.artifacts import Stage, require
from smlib.learning import dpo, exploration, reward_model
from smlib.learning.exploration import SteppedRationale
from smlib.learning.rows import Pair
from smlib.reports import evaluation, pits
from smlib.reports.evaluation import Answers
from smlib.runs import questions, self_explore, self_motivated, shared
from smlib.runs.settings import Settings
from smlib.runs.shared import answer_fresh
from smlib.sampling import models

PAIRS = (("both", "both"), ("base", "both"), ("both", "open"), ("both", "conditioned"))  # reward.pairs, reward.wrong
SAMPLED = ("01_sampling", "02_ranking", "02_sft", "03_second_sampling")
TABLE = Path(__file__).parents[1] / "results" / "ablations.csv"  # what benchmarks/ablations.py writes
CURVE_COLUMNS = ("policy", "seed", "update", "tokens", "reward", "accuracy", "kl", "entropy", "length")
REST = "all that follows rejected"  # of `step_pairs`
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


def reward_rows(
    run_dir: str | Path, settings: Settings, pairs: str, wrong: str, answered: list[Answers], progress: bool = True
) -> list[dict]:
    """Train the reward model on other pairs (see RewardSettings), or take the run's own where they are the same;
    measure it on all held-out pairs, and by best of k.

    answered: `answer_fresh` of the SFT model. Shares have Wilson intervals over pairs (those of one question are alike,
    so the intervals are somewhat narrow); mean and best of k have t intervals over questions.
    """
    own = settings.reward
    settings = replace(settings, reward=replace(own, pairs=pairs, wrong=wrong))
    folder = run_dir if settings.reward == own else branch(run_dir, f"reward-{pairs}-{wrong}", SAMPLED)
    stage = self_motivated.train_reward_model(folder, settings, progress=progress)
    row = _labelled(settings, "reward model's pairs", f"pairs {pairs}, wrong {wrong}")
    rows = []
    for author, name in (("base", "base"), ("sft", "SFT model")):
        ranked = [pair.ranked_right for pair in stage.read_rows("held_out", Pair) if pair.author == author]
        if ranked:
            interval = evaluation.accuracy_interval(sum(ranked), len(ranked))
            rows.append(row(f"held-out pairs of the {name}", sum(ranked) / len(ranked), interval, len(ranked)))
    judge, tokenizer = models.load_policy(stage.path("model")), shared.load_tokenizer(settings)
    fresh = questions.fresh_problems(settings, len(answered) // len(settings.tasks))
    problems = {problem.id: problem for problem in fresh}
    best, mean = [], []
    for answer in answered:
        asked = [problems[answer["id"]]] * len(answer["sampled_ids"])
        scores = reward_model.score(judge, tokenizer, asked, answer["sampled_ids"])
        best.append(evaluation.best_of_n(scores, answer["sampled_correct"]))
        mean.append(sum(answer["sampled_correct"]) / len(asked))
    rows.append(row(f"best of {len(asked)}", sum(best) / len(best), evaluation.mean_interval(best), len(best)))
    rows.append(row(f"mean of {len(asked)}", sum(mean) / len(mean), evaluation.mean_interval(mean), len(mean)))
    return rows


def policy(run_dir: str | Path, settings: Settings, name: str, method: str, progress: bool = True) -> Stage:
    """The policy of a run trained another way (`self_motivated.train_policy`), in the variant `name`."""
    folder = branch(run_dir, f"policy-{name}", (*SAMPLED, "03_reward_model"))
    return self_motivated.train_policy(folder, settings, method, progress=progress)


def curve_rows(stage: Stage, settings: Settings, name: str) -> list[dict]:
    """The log of a trained policy, a row for each update: CURVE_COLUMNS; tokens are all drawn so far."""
    with stage.path("training/log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    rows, tokens = [], 0
    for row in log:
        tokens += int(row["tokens"]) + int(row.get("value_tokens") or 0)
        numbers = [round(float(row[column]), 4) for column in CURVE_COLUMNS[4:]]
        rows.append(dict(zip(CURVE_COLUMNS, (name, settings.seed, int(row["update"]), tokens, *numbers), strict=True)))
    return rows


def policy_rows(
    stage: Stage, settings: Settings, name: str, answered: list[Answers], before: str = "SFT"
) -> list[dict]:
    """A trained policy's accuracy on the questions of `answered`, the `answer_fresh` of the model that it started from
    (`before`), and its gain over it, question by question."""
    questions = len(answered) // len(settings.tasks)
    after = answer_fresh(settings, stage.path("model"), questions, len(answered[0]["sampled_texts"]))
    row = _labelled(settings, "policy", name)
    rows = []
    for metric, values in accuracies(after).items():
        share = metric == "greedy"
        interval = (
            evaluation.accuracy_interval(int(sum(values)), len(values)) if share else evaluation.mean_interval(values)
        )
        rows.append(row(metric, sum(values) / len(values), interval, len(values)))
        test = evaluation.paired_test(values, accuracies(answered)[metric])
        rows.append(
            row(f"{metric}, gain over {before}", test["mean_difference"], (test["low"], test["high"]), test["n"])
        )
    return rows


def step_pairs(run_dir: str | Path, settings: Settings, progress: bool = True) -> dict[str, list[Pair]]:
    """Step-level pairs of a run with stages 06, made otherwise from the same wrong rationales; name -> pairs.

    "random chosen", "most likely chosen": another of the completions that recover. REST: the rejected side goes on to
    the end of the wrong rationale, end-of-sequence included. "first wrong step": the step checker says where, in place
    of the search; chosen is what k completions from before it find.
    """
    tokenizer = shared.load_tokenizer(settings)
    outcome = require(run_dir, "06_selection").read_rows("pairs", Pair)
    known = {problem.id: problem for problem in questions.training_problems(settings)}
    wrong = self_explore.wrong_rationales(tokenizer, known, outcome)
    solutions = [pair.chosen_ids for pair in outcome]
    with shared.load_engine(settings, require(run_dir, "06_rft").path("model")) as engine:
        params, k = shared.sampling_params(settings, "explore"), settings.explore.k
        found = exploration.explore(engine, wrong, k, params, progress="exploration" if progress else None)
        at_wrong_steps = _at_wrong_steps(engine, wrong, solutions, k, params)
    made = {
        f"{choice.replace('_', ' ')} chosen": exploration.granular_pairs(tokenizer, wrong, found, solutions, choice)[0]
        for choice in ("random", "most_likely")
    }
    own = [
        exploration.granular_pair(tokenizer, one, found, s, "shortest") for one, s in zip(wrong, solutions, strict=True)
    ]
    made[REST] = [
        replace(pair, rejected_ids=one.ids[len(one.prefix(pair.step - 1)) :])
        for one, pair in zip(wrong, own, strict=True)
        if pair
    ]
    return made | {"first wrong step": at_wrong_steps}


def _at_wrong_steps(engine, rationales: Sequence[SteppedRationale], solutions: Sequence, k: int, params) -> list[Pair]:
    """Step-level pairs where the checker finds the first wrong step, as if it were the first pit."""
    tokenizer, cases = engine.tokenizer, []
    for one, solution in zip(rationales, solutions, strict=True):
        if step := pits.wrong_step(tokenizer, one):
            # The steps before the wrong one count as one, so that the pit can be at 1 or at 2.
            cases.append((replace(one, ends=(one.ends[: step - 1][-1:] + one.ends[step - 1 : step])), solution))
    before = [replace(one, ends=one.ends[:1]) for one, _ in cases if len(one.ends) == 2]
    found = exploration.explore_all(engine, before, k, params)
    kept = []
    for one, solution in cases:
        good = len(one.ends) == 1 or exploration.first_pit(exploration.outcomes(one, found)) is None
        if good:
            kept.append((one, solution))
            found = found | {one.key(len(one.ends)): [exploration.Attempt(None, False)]}
    rationales, solutions = zip(*kept, strict=True)
    return exploration.granular_pairs(tokenizer, rationales, found, solutions, "shortest")[0]


def step_policy(
    run_dir: str | Path, settings: Settings, name: str, pairs: Sequence[Pair], rate: float, progress: bool = True
) -> Stage:
    """The RFT model of a run after DPO on other pairs, or at another learning rate, in the variant `name`."""
    folder, chosen = branch(run_dir, f"pairs-{name.replace(' ', '-')}", ("06_rft",)), settings.dpo
    tuned = require(folder, "06_rft")
    how = {"beta": chosen.beta, "epochs": chosen.epochs, "learning_rate": rate, "batch": chosen.batch}
    stage = Stage(folder, "06_step_dpo", {"pairs": name, "seed": settings.seed} | how, {tuned: ["model"]})
    if stage.done:
        return stage
    with stage.recording():
        tokenizer, model = shared.load_tokenizer(settings), models.load_policy(tuned.path("model"))
        label = f"DPO, {name}" if progress else None
        stage.write_rows("log", dpo.train_dpo(model, tokenizer, pairs, seed=settings.seed, progress=label, **how))
        stage.write_model("model", model, tokenizer)
    return stage


def accuracies(answered: Sequence[Answers]) -> dict[str, list[float]]:
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
