"""A sheet of rationales for a reader to judge; writes results/sheet.csv.

    python benchmarks/sheet.py --run runs/tiny-all-seed0

60 samples of the SFT model from stage 05 of a finished run, as `smlib.reports.agreement.draw` takes them. The column
"judged" is filled in as an example by the step checker, with one verdict in ten turned round at random, and the column
"by" says so: no person has judged it.
"""

import argparse
from pathlib import Path

import variants
from ablations import write

from smlib.files.artifacts import require
from smlib.reports import agreement, results
from smlib.reports.evaluation import Answers
from smlib.runs import shared

COLUMNS = ("number", "id", "dataset", "question", "rationale", "right", "sound", "score", "judged", "by")
ROWS, SLIPS = 60, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs", "tiny-all-seed0"))
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("sheet.csv"))
    args = parser.parse_args()
    stage = require(args.run, "05_evaluation")
    written = {
        row["id"]: row
        for row in stage.read_rows("answers", Answers)
        if row["method"] == "sft" and not results.is_published(row["test_set"])
    }
    asked = [problem for problem in shared.problems_of(stage) if problem.id in written]
    rows = agreement.draw(asked, [written[problem.id] for problem in asked], ROWS, seed=0)
    for row, verdict in zip(rows, agreement.turned([row["sound"] for row in rows], SLIPS, seed=0), strict=True):
        row |= {"judged": "y" if verdict else "n", "by": f"step checker, {SLIPS:.0%} of verdicts turned round"}
    write(rows, COLUMNS, args.out)


if __name__ == "__main__":
    main()
