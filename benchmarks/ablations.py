"""Which pairs should the reward model learn from? Measured: writes results/ablations.csv.

    python benchmarks/ablations.py --seeds 0 1 2

For every seed it takes the finished run runs/PRESET-all-seedSEED (`make run`), and trains a reward model for each
choice of pairs, in a folder of its own. Run the same command again to resume.
"""

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

import variants

from smlib.files.artifacts import StageError, require
from smlib.files.atomic import replacing
from smlib.runs import shared
from smlib.runs.settings import preset
from smlib.runs.shared import answer_fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=100, help="fresh questions per task (default 100)")
    parser.add_argument("--runs", default="", help="run folder, instead of runs/PRESET-TASK-seedSEED")
    parser.add_argument("--out", type=Path, default=variants.TABLE)
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        settings = preset(args.preset, args.task, seed)
        run = shared.run_folder(args.runs, args.preset, args.task, seed)
        try:
            tuned = require(run, "02_sft").path("model")
            require(run, "03_reward_model")
        except StageError as error:
            raise SystemExit(str(error)) from None
        answered = answer_fresh(settings, tuned, args.questions)
        for pairs, wrong in variants.PAIRS:
            rows += variants.reward_rows(run, settings, pairs, wrong, answered)
        write(rows, variants.COLUMNS, args.out)
        print(f"seed {seed}: {len(rows)} rows in all", flush=True)


def write(rows: list[dict], columns: Sequence[str], out: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with replacing(out) as tmp:
        tmp.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    main()
