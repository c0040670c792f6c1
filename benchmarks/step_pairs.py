"""Self-Explore beside outcome DPO: where does the difference come from, and what if both may sample equally much?

    python benchmarks/step_pairs.py --seeds 0 1 2

Writes results/step_pairs.csv: accuracy on fresh questions of the train split, and the gain over RFT, for
- DPO on outcome pairs and on the step-level pairs of Self-Explore, as the run trains them;
- each of the two at the other's learning rate;
- step-level pairs made otherwise (`variants.step_pairs`): another choice of the chosen side, pits at the first
  wrong step by the step checker, and a rejected side to the end of the rationale (at the rate of outcome pairs);
- RFT and DPO on outcome pairs with more solutions per question (--samples), to sample as much as Self-Explore does.
For every seed it takes the run runs/PRESET-all-seedSEED, makes those of stages 01, 02 and 06 that are missing, and
trains in folders of their own. Run the same command again to resume.
"""

import argparse
from pathlib import Path

import variants
from ablations import write

from smlib.files.artifacts import require
from smlib.learning.rows import Pair
from smlib.runs import self_explore, shared
from smlib.runs.settings import preset
from smlib.runs.shared import answer_fresh

OWN = {"outcome pairs": "06_outcome_dpo", "first pit (Self-Explore)": "06_step_dpo"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=16, help="solutions per question for equal samples (default 16)")
    parser.add_argument("--questions", type=int, default=100, help="fresh questions per task (default 100)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.parent / "step_pairs.csv")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        settings = preset(args.preset, args.task, seed)
        run = shared.run_folder("", args.preset, args.task, seed)
        self_explore.run(run, settings)
        trained = {
            "outcome pairs": require(run, "06_outcome_dpo"),
            "first pit (Self-Explore)": require(run, "06_step_dpo"),
        }
        whole, steps = settings.dpo.learning_rate, settings.dpo.step_learning_rate
        jobs = {f"outcome pairs, rate {steps:g}": (require(run, "06_selection").read_rows("pairs", Pair), steps)}
        jobs[f"first pit, rate {whole:g}"] = require(run, "06_exploration").read_rows("pairs", Pair), whole
        for name, pairs in variants.step_pairs(run, settings).items():
            jobs[name] = pairs, whole if name == variants.REST else steps
        for name, (pairs, rate) in jobs.items():
            trained[name] = variants.step_policy(run, settings, name, pairs, rate)
        more = preset(args.preset, args.task, seed, explore={"samples": args.samples})
        wide = variants.branch(run, f"solutions-{args.samples}", variants.SAMPLED[:3])
        self_explore.draw_solutions(wide, more)
        self_explore.select(wide, more)
        trained[f"RFT, {args.samples} solutions"] = self_explore.train_rft(wide, more)
        trained[f"outcome pairs, {args.samples} solutions"] = self_explore.train_outcome_dpo(wide, more)
        answered = answer_fresh(settings, require(run, "06_rft").path("model"), args.questions)
        for name, stage in trained.items():
            rows += variants.policy_rows(stage, settings, name, answered, before="RFT")
            print(f"seed {seed}: {name}", flush=True)
        write(rows, variants.COLUMNS, args.out)


if __name__ == "__main__":
    main()
