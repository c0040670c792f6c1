"""Our judge beside published verdicts, on outputs of real models; writes results/judging.csv and docs/judging.md.

    python benchmarks/judging.py FOLDER

FOLDER (or SML_MODEL_OUTPUTS) holds two files of JSON lines, each with dataset, index, question, output, gold and
published_correct: text_davinci_002_zero_shot_cot.jsonl, the logs of Kojima et al. (2205.11916) on every second
question of twelve datasets, and gsm8k_gpt3_solutions.jsonl, GSM8K solutions by four models from
openai/grade-school-math (with `model`). Every row on which the verdicts differ was read; the decisions are in
results/judging_differences.jsonl. A row that differs and is not there stops the script.
"""

import argparse
import csv
import io
import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from smlib.files.atomic import replacing
from smlib.judging import math_answers
from smlib.judging.answers import Verdict, grade, grade_many
from smlib.problems.datasets import KINDS, Problem
from smlib.reports.evaluation import TEXT_DAVINCI_002
from smlib.reports.results import write_csv

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "judging.md"
TABLE = ROOT / "results" / "judging.csv"
SPEEDS = ROOT / "results" / "judging_speed.csv"
DECISIONS = ROOT / "results" / "judging_differences.jsonl"
MODEL = "text-davinci-002"
FILES = ("text_davinci_002_zero_shot_cot.jsonl", "gsm8k_gpt3_solutions.jsonl")
SPELLING = {"singleeq": "single_eq", "commonsensqa": "commonsense_qa", "strategyqa": "strategy_qa"}
# What a verdict calls invalid, by the words of its reason.
REASONS = {
    "neither yes nor no": "begins with neither yes nor no",
    "several answers": "several answers",
    "no number": "no number, or one in words",
    "is empty": "an empty answer sentence",
    "is not one number": "a piece of a calculation, a time or a list",
    "no answer sentence": "no answer sentence",
    "not solved": "an equation that is not solved",
    "a percentage": "a percentage where none is asked for",
    "not one of the options": "a letter that is no option",
    "no option": "no option named",
}


# What the slowest text is looked for among: every two of these pieces, over and over, judged as every kind.
PIECES = (
    "The answer is ",
    "\nA:",
    "\\boxed{",
    "}",
    "\\frac{1}{0}",
    "or",
    " and ",
    "no",
    "(B)",
    "A",
    " ",
    ",",
    ".",
    "-",
)
PIECES += ("/", "=", "$", "1", "000", "(", '"', "likely ", "not ", "more than ", "18 or ", "\u00a0", "So the ")
ANSWERS = (("number", "18", ()), ("choice", "B", ("red", "Moby Dick")), ("yes_no", "yes", ()), ("letters", "yajo", ()))


@dataclass(frozen=True)
class Judged:
    """One row: who wrote it, where it stands, and the two verdicts."""

    model: str
    index: int
    problem: Problem
    published: bool
    ours: Verdict

    @property
    def key(self) -> tuple[str, str, int]:
        return self.model, self.problem.dataset, self.index


def problem_of(row: dict) -> Problem:
    """The Problem of one row. Its choices stand in the question: "... Answer Choices: (A) red (B) blue"."""
    dataset = SPELLING.get(row["dataset"], row["dataset"])
    question, choices = row["question"], ()
    if KINDS[dataset] == "choice":
        question, options = question.rsplit(" Answer Choices: ", 1)
        choices = tuple(text.strip() for text in re.split(r" ?\([A-Z]\) ", options)[1:])
    return Problem(f"{dataset}/{row['index']}", dataset, question, row["gold"], KINDS[dataset], choices)


def read(folder: Path) -> list[dict]:
    """The rows of both files."""
    return [json.loads(line) for name in FILES for line in (folder / name).read_text("utf-8").splitlines()]


def judge(folder: Path) -> list[Judged]:
    """Every row of both files, judged, in the order of the table."""
    judged = []
    for row in read(folder):
        problem = problem_of(row)
        verdict = grade(problem, row["output"])
        judged.append(Judged(row.get("model", MODEL), row["index"], problem, row["published_correct"], verdict))
    order = list(TEXT_DAVINCI_002)
    return sorted(judged, key=lambda one: (one.model != MODEL, one.model, order.index(one.problem.dataset), one.index))


def speeds(folder: Path) -> list[dict]:
    """How fast the judge is, in processor time of one core; MATH, which works in a second process, on the clock."""
    rows = read(folder)
    outputs, problems = [row["output"] for row in rows], [problem_of(row) for row in rows]
    seconds = min(_seconds(lambda: grade_many(problems, outputs), time.process_time) for _ in range(3))
    asked = [Problem(f"x/{kind}", "x", "?", gold, kind, choices) for kind, gold, choices in ANSWERS]
    texts = ["The answer is " + (first + second) * 5_000 for first in PIECES for second in PIECES]
    slowest = max(
        _seconds(lambda: grade(one, text[:20_000]), time.process_time)  # noqa: B023 (called at once)
        for text in texts
        for one in asked
    )
    formulas = [(rf"\sqrt{{{i}}} + {i}x", rf"{i}x + \sqrt{{{i}}}") for i in range(2, 102)]
    math_answers.equal("x + 1", "1 + x")  # starts the process
    compared = _seconds(lambda: [math_answers.equal(*pair) for pair in formulas], time.perf_counter)
    hanging = _seconds(lambda: math_answers.equal(r"x + 9^{9^{9^{9}}}", "x + 9", seconds=2.0), time.perf_counter)
    return [
        {"what": "verdicts per second, all 7,495 outputs", "value": round(len(rows) / seconds)},
        {"what": "slowest verdict on 20,000 characters of pieces of answers (ms)", "value": round(1000 * slowest, 1)},
        {"what": "different MATH formulas compared per second", "value": round(len(formulas) / compared)},
        {"what": "a MATH answer that hangs, with a limit of 2 s (s)", "value": round(hanging, 2)},
    ]


def _seconds(work, clock) -> float:
    started = clock()
    work()
    return clock() - started


def differing(judged: list[Judged]) -> list[Judged]:
    return [one for one in judged if one.ours.correct != one.published]


@cache
def decisions() -> dict[tuple[str, str, int], dict]:
    """Every disagreement, read: the answer sentence, both verdicts, who is right, and why."""
    with open(DECISIONS, encoding="utf-8") as lines:
        return {(MODEL, row["dataset"], row["index"]): row for row in map(json.loads, lines)}


def table(judged: list[Judged]) -> list[dict]:
    """One row per model and dataset, the twelve of text-davinci-002 also together. Percentages are of the rows."""
    groups: dict[tuple[str, str], list[Judged]] = {
        (MODEL, dataset): [] for dataset in (*TEXT_DAVINCI_002, "all twelve")
    }
    for one in judged:
        groups.setdefault((one.model, one.problem.dataset), []).append(one)
        if one.model == MODEL:
            groups[MODEL, "all twelve"].append(one)
    return [_table_row(*names, members) for names, members in groups.items()]


def _table_row(model: str, dataset: str, members: list[Judged]) -> dict:
    percent = 100 / len(members)
    upstream = TEXT_DAVINCI_002.get(dataset) if model == MODEL else None
    read = decisions()
    right = Counter(read[one.key]["right"] for one in differing(members))
    return {
        "model": model,
        "dataset": dataset,
        "rows": len(members),
        "published right (%)": f"{percent * sum(one.published for one in members):.2f}",
        "ours right (%)": f"{percent * sum(one.ours.correct for one in members):.2f}",
        "agreement (%)": f"{percent * (len(members) - right.total()):.2f}",
        "differ": right.total(),
        "ours is right": right["ours"],
        "published is right": right["published"],
        "invalid": sum(one.ours.extracted is None for one in members),
        "upstream, all questions (%)": f"{upstream:.2f}" if upstream else "",
    }


def invalid(judged: list[Judged]) -> list[dict]:
    """How many rows are invalid for which reason, and in which datasets."""
    where: dict[str, Counter] = {}
    for one in judged:
        if one.ours.extracted is None:
            reason = next(label for words, label in REASONS.items() if words in one.ours.reason)
            where.setdefault(reason, Counter())[one.problem.dataset] += 1
    return [
        {
            "reason": reason,
            "rows": count.total(),
            "where": ", ".join(f"{name} {rows}" for name, rows in count.most_common()),
        }
        for reason, count in sorted(where.items(), key=lambda item: -item[1].total())
    ]


def differences(judged: list[Judged]) -> list[dict]:
    """Every row on which the verdicts differ, with the decision."""
    words = {True: "right", False: "wrong"}
    rows = []
    for one in differing(judged):
        read = decisions()[one.key]
        said = "invalid" if one.ours.extracted is None else words[one.ours.correct]
        rows.append(
            {
                "dataset": read["dataset"],
                "row": read["index"],
                "gold": read["gold"],
                "the model's answer": read["output"].replace("\n", " ⏎ ").replace("$", "\\$").replace("*", "\\*"),
                "published": words[one.published],
                "ours": said,
                "who is right, and why": f"{read['right']}: {read['why']}",
            }
        )
    return rows


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str, **regions: str) -> str:
    """The page with the text between "<!-- name -->" and "<!-- end -->" replaced."""
    for name, text in regions.items():
        page, found = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: f"{m[1]}\n{text}\n\n{m[2]}", page, flags=re.S
        )
        if found != 1:
            raise SystemExit(f"{PAGE} has no place for the table {name!r}: put <!-- {name} --> and <!-- end --> there")
    return page


def pages(judged: list[Judged]) -> tuple[str, str]:
    """What results/judging.csv and docs/judging.md should hold."""
    rows = table(judged)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    tables = {
        "agreement": markdown(rows),
        "differences": markdown(differences(judged)),
        "invalid": markdown(invalid(judged)),
    }
    return text.getvalue(), fill(PAGE.read_text(encoding="utf-8"), **tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=os.environ.get("SML_MODEL_OUTPUTS"))
    folder = parser.parse_args().folder
    if not folder:
        raise SystemExit(f"name the folder that holds {' and '.join(FILES)}, or set SML_MODEL_OUTPUTS to it")
    if missing := [name for name in FILES if not (Path(folder) / name).is_file()]:
        raise SystemExit(f"{folder} does not hold {' and '.join(missing)}")
    judged = judge(Path(folder))
    if strange := {one.key for one in differing(judged)} ^ set(decisions()):
        raise SystemExit(f"read these rows, and bring {DECISIONS.name} up to date: {sorted(strange)}")

    for path, content in zip((TABLE, PAGE), pages(judged), strict=True):
        with replacing(path) as partial:
            partial.write_text(content, encoding="utf-8")
    print(markdown(table(judged)))
    measured = speeds(Path(folder))
    write_csv(SPEEDS, measured)
    print("", *(f"{row['what']}: {row['value']:,}" for row in measured), sep="\n")


if __name__ == "__main__":
    main()
