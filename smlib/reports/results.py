"""From the answers of stage 05 to tables: one run's results/evaluation.csv, and several seeds in one table.

Everything starts from one number per question and metric, so that two methods can be compared question by
question. Accuracies are shares between 0 and 1.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smlib.errors import UsageError
from smlib.files.artifacts import MANIFEST, Stage, lineage, require
from smlib.files.atomic import replacing
from smlib.judging.answers import grade
from smlib.problems.datasets import Problem
from smlib.problems.prompts import split_answer
from smlib.problems.steps import is_sound, knows
from smlib.reports import evaluation
from smlib.reports.evaluation import Answers

METHODS = {"base": "base", "sft": "SFT on r+", "sml": "SML (PPO)"}


CONTRASTS = (("sft", "base"), ("sml", "sft"))  # who is compared with whom
EXPLORE_METHODS = {
    "rft": "RFT",
    "outcome_dpo": "DPO, outcome pairs",
    "self_explore": "Self-Explore",
}  # of 06_evaluation
EXPLORE_CONTRASTS = (("self_explore", "rft"), ("self_explore", "outcome_dpo"), ("outcome_dpo", "rft"), ("rft", "sft"))
PUBLISHED = " (published)"  # ends the name of a published test set
# The test sets of the tasks taken together, where they have equally many questions, and where not.
MEAN, ALL = "mean of tasks", "all questions"
OUTCOMES = ("right, every step", "right, a step wrong", "wrong", "no answer")
UNCHECKED = ("right", "wrong", "no answer")  # the outcomes where the step checker does not know the dataset
COLUMNS = ("preset", "seed", "method", "test_set", "metric", "n", "value", "low", "high")
POOLED_COLUMNS = ("preset", "seeds", *COLUMNS[2:], "seeds_low", "seeds_high")
_SHARES = ("greedy", "greedy_invalid", "pass_at", "majority_at")  # one yes or no per question: Wilson's interval


def outcome(problem: Problem, text: str) -> str:
    """Which of OUTCOMES a completion is: the answer is judged by `grade`, the steps by the step checker.

    Which of UNCHECKED for a dataset that the checker does not know.
    """
    verdict = grade(problem, text)
    if verdict.extracted is None:
        return "no answer"
    if not verdict.correct:
        return "wrong"
    if not knows(problem.dataset):
        return "right"
    return "right, every step" if is_sound(problem, split_answer(text)[0]) else "right, a step wrong"


def outcome_shares(problems: Sequence[Problem], rows: Sequence[Answers]) -> dict[str, float]:
    """Outcome -> its percent of the sampled completions; rows[i] answers problems[i], all of one dataset."""
    found = Counter(
        outcome(problem, text) for problem, row in zip(problems, rows, strict=True) for text in row["sampled_texts"]
    )
    names = OUTCOMES if knows(problems[0].dataset) else UNCHECKED
    return {name: 100 * found[name] / found.total() for name in names}


def question_values(row: Answers, problem: Problem | None = None) -> dict[str, float]:
    """Metric -> this question's value.

    greedy, greedy_invalid; with k samples also avg_at_k, pass_at_k, majority_at_k and sampled_invalid; with their
    scores, best_of_k (the sample that the reward scores highest); with the problem of a generated task, sound_at_k,
    the share of samples that are right in the answer and in every step.
    """
    values = {"greedy": float(row["greedy_correct"]), "greedy_invalid": float(row["greedy_invalid"])}
    right = row["sampled_correct"]
    if k := len(right):
        winner = row["sampled_answers"].index(evaluation.majority_vote(row["sampled_answers"]))
        values |= {
            f"avg_at_{k}": sum(right) / k,
            f"pass_at_{k}": float(any(right)),
            f"majority_at_{k}": float(right[winner]),
            "sampled_invalid": row["sampled_invalid"] / k,
        }
        if "scores" in row:
            values[f"best_of_{k}"] = evaluation.best_of_n(row["scores"], right)
        if problem:
            values[f"sound_at_{k}"] = sum(outcome(problem, text) == OUTCOMES[0] for text in row["sampled_texts"]) / k
    return values


@dataclass(frozen=True)
class Answered:
    """The answers of a run's evaluation, and the questions that they answer."""

    preset: str
    seed: int
    problems: list[Problem]
    answers: list[Answers]


def answered(*stages: Stage) -> Answered:
    """What stages 05_evaluation and 06_evaluation of one run hold together."""
    problems = {problem.id: problem for stage in stages for problem in stage.read_rows("problems", Problem)}
    answers = [row for stage in stages for row in stage.read_rows("answers", Answers)]
    return Answered(stages[0].settings["preset"], stages[0].settings["seed"], list(problems.values()), answers)


def table_of(run: Answered) -> dict[tuple[str, str, str], dict[str, float]]:
    """(method, test set, metric) -> {question id: value}; the test sets of the tasks together are test set MEAN, or ALL
    where they are of different sizes."""
    tasks = Counter(row["test_set"] for row in run.answers if not is_published(row["test_set"]))
    together = MEAN if len(set(tasks.values())) == 1 else ALL
    problems = {problem.id: problem for problem in run.problems} if knows(*tasks) else {}
    table = defaultdict(dict)
    for row in run.answers:
        for metric, value in question_values(row, problems.get(row["id"])).items():
            table[row["method"], row["test_set"], metric][row["id"]] = value
            if len(tasks) > 1 and row["test_set"] in tasks:
                table[row["method"], together, metric][row["id"]] = value
    return dict(table)


def is_published(test_set: str) -> bool:
    """Whether the test set is a published one beside the generated questions of its task."""
    return test_set.endswith(PUBLISHED)


def contrasts(
    table: dict, pairs: Sequence[tuple[str, str]] = CONTRASTS
) -> dict[tuple[str, str, str], dict[str, float]]:
    """("sml - sft", test set, metric) -> {question id: difference}, for every one of `pairs`: (better, worse), and
    every metric that both have: stages 06 have no reward model's scores."""
    return {
        (f"{better} - {method}", test_set, metric): {
            identity: table[better, test_set, metric][identity] - value for identity, value in values.items()
        }
        for better, worse in pairs
        for (method, test_set, metric), values in table.items()
        if method == worse and (better, test_set, metric) in table
    }


def rows_from_answers(run: Answered, pairs: Sequence[tuple[str, str]] = CONTRASTS) -> list[dict]:
    """The rows of results/evaluation.csv (COLUMNS) from one run's answers: methods, then differences, `pairs`.

    n counts questions. low, high: 95 % interval, Wilson's where every question gives a yes or no, else Student's
    t over questions; for differences, t over the questions' differences.
    """
    table = table_of(run)
    rows = []
    for (method, test_set, metric), values in (table | contrasts(table, pairs)).items():
        values = list(values.values())
        if not _is_contrast(method) and metric.startswith(_SHARES):
            low, high = evaluation.accuracy_interval(int(sum(values)), len(values))
        else:
            low, high = _interval(method, values)
        cell = (run.preset, run.seed, method, test_set, metric, len(values))
        rows.append(dict(zip(COLUMNS, (*cell, float(np.mean(values)), low, high), strict=True)))
    return rows


def _interval(method: str, values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval, for a method kept within 0 and 1, where its share must be; a difference may be below 0."""
    low, high = evaluation.mean_interval(values)
    return (low, high) if _is_contrast(method) else (max(low, 0.0), min(high, 1.0))


def _is_contrast(method: str) -> bool:
    return " - " in method


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows as csv in one atomic step, numbers with four decimals."""
    with replacing(path) as tmp, tmp.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_run(run_dir: str | Path) -> Answered:
    """The answers of a finished run."""
    return answered(*evaluations(run_dir, "05_evaluation"))


def evaluations(run_dir: str | Path, name: str) -> list[Stage]:
    """The evaluation called `name`, and the other one of 05 and 06 where it is there and asked the same: 05 first."""
    stage = require(run_dir, name)
    there = [one for one in ("05_evaluation", "06_evaluation") if (Path(run_dir) / one / MANIFEST).exists()]
    found = [require(run_dir, one) for one in there]
    return found if all(one.settings == stage.settings for one in found) else [stage]


def _decided(run_dir: str | Path) -> dict[str, object]:
    """All that decided the answers of a run, of every stage, but the seed."""
    found = {key: value for stage in evaluations(run_dir, "05_evaluation") for key, value in lineage(stage).items()}
    return {key: value for key, value in found.items() if not key.endswith(": seed")}


def combine(paths: Sequence[str | Path]) -> list[dict]:
    """Pool finished runs that differ in their seed alone; returns rows with POOLED_COLUMNS.

    value: mean over seeds. low, high: questions are the draws, each with its mean over the seeds (all seeds
    answer the same questions, so they are no draws of their own): about the models trained here. seeds_low,
    seeds_high: seeds are the draws: about training once more; None for a single run and for the base, which
    is not trained. Raises ValueError for runs that do not belong together.
    """
    tables = {}
    for path in paths:
        run = read_run(path)
        if run.seed in tables:
            raise UsageError(f"{path} has seed {run.seed}, like another of the runs: give each seed once")
        if tables:
            _refuse_other_run(path, paths[0])
        table = table_of(run)
        methods = {method for method, _, _ in table}
        tables[run.seed] = table | contrasts(table, [p for p in CONTRASTS + EXPLORE_CONTRASTS if methods >= set(p)])
    cells = list(next(iter(tables.values())))
    if any(list(table) != cells for table in tables.values()):
        raise UsageError(
            "the runs have different test sets or methods: evaluate all with the published sets, or none, and run "
            "Self-Explore in all of them, or in none"
        )
    rows = []
    for method, test_set, metric in cells:
        by_seed = {seed: table[method, test_set, metric] for seed, table in tables.items()}
        ids = list(next(iter(by_seed.values())))
        means = [float(np.mean([values[identity] for values in by_seed.values()])) for identity in ids]
        row = (run.preset, " ".join(map(str, tables)), method, test_set, metric, len(ids), float(np.mean(means)))
        low, high = _interval(method, means)
        over_seeds = (None, None)
        if len(by_seed) > 1 and method != "base":
            over_seeds = _interval(method, [float(np.mean(list(values.values()))) for values in by_seed.values()])
        rows.append(dict(zip(POOLED_COLUMNS, (*row, low, high, *over_seeds), strict=True)))
    return rows


def _refuse_other_run(path: str | Path, first: str | Path) -> None:
    """Raise UsageError for the first key by which two runs differ, in any stage that both have."""
    expected, made = _decided(first), _decided(path)
    shared = {key.split(":")[0] for key in expected} & {key.split(":")[0] for key in made}
    for key in expected | made:
        one, other = expected.get(key, "(not set)"), made.get(key, "(not set)")
        if one != other and key.split(":")[0] in shared:
            raise UsageError(
                f"{path} was made with {key} = {other!r}, and {first} with {one!r}: runs that differ in more than "
                "their seed cannot be pooled"
            )


def read_csv(path: Path) -> list[dict]:
    """What `write_csv` wrote of `combine`'s rows: numbers are floats again, an empty cell is None."""
    names = ("n", "value", "low", "high", "seeds_low", "seeds_high")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: float(row[name]) if row[name] else None for name in names} for row in rows]


def markdown(rows: list[dict], labels: dict[str, str] = METHODS, pairs: Sequence[tuple[str, str]] = CONTRASTS) -> str:
    """The README's tables from the rows of `combine` or `rows_from_answers`, in percent: avg@k and greedy on the
    generated test sets, greedy on the published ones. labels: method -> its name; pairs: who is compared with whom."""
    sets = list(dict.fromkeys(row["test_set"] for row in rows))
    generated = sorted((name for name in sets if not is_published(name)), key=lambda name: name not in (MEAN, ALL))
    published = [name for name in sets if is_published(name)]
    tables = [(f"{_sampled(rows).replace('_at_', '@')}, %", _sampled(rows), generated)] if _sampled(rows) else []
    tables += [("greedy, %", "greedy", generated), ("greedy, published questions, %", "greedy", published)]
    return "\n\n".join(
        _table(rows, labels, pairs, title, {_head(name): (name, metric) for name in names})
        for title, metric, names in tables
        if names
    )


def explore_markdown(rows: list[dict]) -> str:
    """Self-Explore beside the methods of 05_evaluation, from the rows of `combine`, on the tasks taken together.

    avg@k, the share of samples that are right in every step too, and greedy, in percent.
    """
    place = next((row["test_set"] for row in rows if row["test_set"] in (MEAN, ALL)), rows[0]["test_set"])
    metrics = [row["metric"] for row in rows if row["metric"].startswith(("avg_at", "sound_at"))]
    columns = {name.replace("_at_", "@"): (place, name) for name in [*dict.fromkeys(metrics), "greedy"]}
    pairs = (*EXPLORE_CONTRASTS, CONTRASTS[-1])
    return _table(rows, METHODS | EXPLORE_METHODS, pairs, f"{_head(place)}, %", columns)


def _sampled(rows: list[dict]) -> str | None:
    return next((row["metric"] for row in rows if row["metric"].startswith("avg_at")), None)


def _head(test_set: str) -> str:
    return test_set.removesuffix(PUBLISHED).replace("_", " ")


def _table(rows: list[dict], labels: dict, pairs: Sequence, title: str, columns: dict[str, tuple[str, str]]) -> str:
    """One table: a row per method, then per contrast, with questions and, of several runs, with seeds as the draws.

    columns: head -> (test set, metric).
    """
    cells = {(row["method"], row["test_set"], row["metric"]): row for row in rows}

    def line(label: str, shown) -> str:
        return f"| {label} | {' | '.join(shown)} |"

    lines = [line(title, columns), "|---" * (len(columns) + 1) + "|"]
    for method, label in labels.items():
        lines.append(line(label, [_percent(cells[method, *place]) for place in columns.values()]))
    sets = [test_set for test_set, _ in columns.values()]
    if is_published(sets[0]):
        known = [evaluation.TEXT_DAVINCI_002[name.removesuffix(PUBLISHED)] for name in sets]
        lines.append(line("text-davinci-002, zero-shot CoT", [f"{value:.1f}" for value in known]))
    for better, worse in pairs:
        found = [cells[f"{better} - {worse}", *place] for place in columns.values()]
        label = f"{labels[better]} minus {labels[worse]}"
        lines.append(line(label, [_percent(row, sign="+") for row in found]))
        if found[0].get("seeds_low") is not None:
            over = [row | {"low": row["seeds_low"], "high": row["seeds_high"]} for row in found]
            lines.append(line("the same, interval over seeds", [_percent(row, sign="+") for row in over]))
    return "\n".join(lines)


def _percent(row: dict, sign: str = "") -> str:
    return f"{100 * row['value']:{sign}z.1f} [{100 * row['low']:{sign}.1f}, {100 * row['high']:{sign}.1f}]"


def main(paths: Sequence[str], folder: Path) -> None:
    """Print the tables of several runs and write folder/PRESET.csv."""
    rows = combine(paths)
    target = folder / f"{rows[0]['preset']}.csv"
    write_csv(target, rows)
    print(markdown(read_csv(target)))
    if any(row["method"] == "self_explore" for row in rows):
        print(f"\n{explore_markdown(read_csv(target))}")
    print(f"\n{len(paths)} run(s), seeds {rows[0]['seeds']}; [ ]: 95 % intervals. Written: {target}")
