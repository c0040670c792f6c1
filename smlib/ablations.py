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

from smlib import dpo, evaluation, explore, explore_pipeline, models, pipeline, reward_model
from smlib.artifacts import Stage, require
from smlib.settings import Settings

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


def answers(settings: Settings, path: str | Path, questions: int, k: int = 8, progress=None) -> list[dict]:
    """Greedy and k sampled answers of the model in a folder to fresh questions; with equal settings, to the same."""
    with pipeline.load_engine(settings, path) as engine:
        return evaluation.evaluate(
            engine, pipeline.fresh_problems(settings, questions), k=k, temperature=settings.evaluation.temperature,
            max_new_tokens=settings.sampling.max_new_tokens, seed=settings.seed, progress=progress,
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
    judge, tokenizer = models.load_policy(stage.path("model")), pipeline.load_tokenizer(settings)
    fresh = pipeline.fresh_problems(settings, len(answered) // len(settings.tasks))
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


def policy(
    run_dir: str | Path, settings: Settings, name: str, method: str, reward: str, progress: bool = True
) -> Stage:
    """The policy of a run trained another way (`pipeline.train_policy`), in the variant `name`."""
    folder = branch(run_dir, f"policy-{name}", (*SAMPLED, "03_reward_model"))
    return pipeline.train_policy(folder, settings, method, reward, progress=progress)


def curve_rows(stage: Stage, settings: Settings, name: str) -> list[dict]:
    """The log of a trained policy, a row for each update: CURVE_COLUMNS; tokens are all drawn so far."""
    with stage.path("training/log.csv").open(encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    rows, tokens = [], 0
    for row in log:
        tokens += int(row["tokens"])
        numbers = [round(float(row[column]), 4) for column in CURVE_COLUMNS[4:]]
        rows.append(dict(zip(CURVE_COLUMNS, (name, settings.seed, int(row["update"]), tokens, *numbers), strict=True)))
    return rows


def policy_rows(stage: Stage, settings: Settings, name: str, answered: list[dict], before: str = "SFT") -> list[dict]:
    """A trained policy's accuracy on the questions of `answered`, the `answers` of the model that it started from
    (`before`), and its gain over it, question by question."""
    questions = len(answered) // len(settings.tasks)
    after = answers(settings, stage.path("model"), questions, len(answered[0]["sampled_texts"]))
    row = _labelled(settings, "policy", name)
    rows = []
    for metric, values in _accuracies(after).items():
        share = metric == "greedy"
        interval = (
            evaluation.accuracy_interval(int(sum(values)), len(values)) if share else evaluation.mean_interval(values)
        )
        rows.append(row(metric, sum(values) / len(values), interval, len(values)))
        test = evaluation.paired_test(values, _accuracies(answered)[metric])
        rows.append(
            row(f"{metric}, gain over {before}", test["mean_difference"], (test["low"], test["high"]), test["n"])
        )
    return rows


def step_pairs(run_dir: str | Path, settings: Settings, progress: bool = True) -> dict[str, list[dict]]:
    """Step-level pairs of a run with stages 06, made otherwise from the same wrong rationales; name -> pairs.

    "random chosen", "most likely chosen": another of the completions that recover. REST: the rejected side goes on to
    the end of the wrong rationale, end-of-sequence included. "first wrong step": the step checker says where, in place
    of the search; chosen is what k completions from before it find.
    """
    tokenizer = pipeline.load_tokenizer(settings)
    outcome = require(run_dir, "06_selection").read_rows("pairs")
    known = {problem.id: problem for problem in pipeline.training_problems(settings)}
    wrong = explore_pipeline.wrong_rationales(tokenizer, known, outcome)
    solutions = [pair["chosen_ids"] for pair in outcome]
    with pipeline.load_engine(settings, require(run_dir, "06_rft").path("model")) as engine:
        draw, k = explore_pipeline.drawing(engine, settings), settings.explore.k
        found = explore.explore(tokenizer, wrong, draw, k, "exploration" if progress else None)
        at_wrong_steps = _at_wrong_steps(tokenizer, wrong, solutions, draw, k)
    made = {
        f"{choice.replace('_', ' ')} chosen": explore.granular_pairs(tokenizer, wrong, found, solutions, choice)[0]
        for choice in ("random", "most_likely")
    }
    own = [explore.granular_pair(tokenizer, one, found, s, "shortest") for one, s in zip(wrong, solutions, strict=True)]
    made[REST] = [
        pair | {"rejected_ids": list(one.ids[len(one.prefix(pair["step"] - 1)) :])}
        for one, pair in zip(wrong, own, strict=True)
        if pair
    ]
    return made | {"first wrong step": at_wrong_steps}


def _at_wrong_steps(tokenizer, rationales: list, solutions: list, draw, k: int) -> list[dict]:
    """Step-level pairs where the checker finds the first wrong step, as if it were the first pit."""
    cases = []
    for one, solution in zip(rationales, solutions, strict=True):
        if step := explore.wrong_step(tokenizer, one):
            # The steps before the wrong one count as one, so that the pit can be at 1 or at 2.
            cases.append((replace(one, ends=(one.ends[: step - 1][-1:] + one.ends[step - 1 : step])), solution))
    before = [replace(one, ends=one.ends[:1]) for one, _ in cases if len(one.ends) == 2]
    found = explore.explore_all(tokenizer, before, draw, k)
    kept = []
    for one, solution in cases:
        good = len(one.ends) == 1 or explore.first_pit(explore.outcomes(one, found)) is None
        if good:
            kept.append((one, solution))
            found = found | {one.key(len(one.ends)): [explore.Attempt(None, False)]}
    rationales, solutions = zip(*kept, strict=True)
    return explore.granular_pairs(tokenizer, rationales, found, solutions, "shortest")[0]


def step_policy(
    run_dir: str | Path, settings: Settings, name: str, pairs: list[dict], rate: float, progress: bool = True
) -> Stage:
    """The RFT model of a run after DPO on other pairs, or at another learning rate, in the variant `name`."""
    folder, chosen = branch(run_dir, f"pairs-{name.replace(' ', '-')}", ("06_rft",)), settings.dpo
    tuned = require(folder, "06_rft")
    how = {"beta": chosen.beta, "epochs": chosen.epochs, "learning_rate": rate, "batch": chosen.batch}
    stage = Stage(folder, "06_step_dpo", {"pairs": name, "seed": settings.seed} | how, {tuned: ["model"]})
    if stage.done:
        return stage
    with stage.recording():
        tokenizer, model = pipeline.load_tokenizer(settings), models.load_policy(tuned.path("model"))
        label = f"DPO, {name}" if progress else None
        stage.write_rows("log", dpo.train_dpo(model, tokenizer, pairs, seed=settings.seed, progress=label, **how))
        stage.write_model("model", model, tokenizer)
    return stage


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
