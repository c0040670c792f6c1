"""PPO, RLOO and GRPO from the same start, with as many completions each; and a policy that cheats.

    python benchmarks/policies.py --seeds 0 1 2 3 4

Writes results/policies.csv (accuracy on fresh questions of the train split, and the gain over the SFT model) and
results/policy_curves.csv (every update of every training). For every seed it takes stages 01 to 03 of the run
runs/PRESET-all-seedSEED, makes what is missing of them, and trains in folders of their own. A stopped run goes on.
"""

import argparse
from pathlib import Path

import variants
from ablations import write

from smlib.files.artifacts import require
from smlib.runs import self_motivated, shared
from smlib.runs.settings import preset
from smlib.runs.shared import answer_fresh

OWN = "PPO, learned reward"  # what the run itself trains, or has trained
POLICIES = {  # name: method, reward
    OWN: ("ppo", "learned"),
    "PPO, checker": ("ppo", "checker"),
    "RLOO, learned reward": ("rloo", "learned"),
    "GRPO, learned reward": ("grpo", "learned"),
}
# A reward that is easy to please without solving anything, first at no price for leaving the reference, then at one.
BRIEF = "learned - 5*words"
HASTY = {"reward": BRIEF, "updates": 30, "learning_rate": 5e-4}
HACKED = {"brevity, no price on KL": HASTY | {"kl_coef": 0.0}, "brevity, KL at a price": HASTY | {"kl_coef": 0.5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hacked", type=int, nargs="*", default=[0], help="seeds of the cheating policy (default 0)")
    parser.add_argument("--questions", type=int, default=100, help="fresh questions per task (default 100)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.parent)
    args = parser.parse_args()
    rows, curves = [], []
    for seed in args.seeds:
        settings = preset(args.preset, args.task, seed)
        run = shared.run_folder("", args.preset, args.task, seed)
        self_motivated.before_policy(run, settings)
        answered = answer_fresh(settings, require(run, "02_sft").path("model"), args.questions)
        jobs = [(name, method, {"reward": reward}) for name, (method, reward) in POLICIES.items()]
        jobs += [(name, "ppo", changes) for name, changes in HACKED.items() if seed in args.hacked]
        for name, method, changes in jobs:
            chosen = preset(args.preset, args.task, seed, ppo=changes)
            if name == OWN:
                stage = self_motivated.train_policy(run, settings)
            else:
                stage = variants.policy(run, chosen, name.replace(", ", "-").replace(" ", "-"), method)
            curves += variants.curve_rows(stage, chosen, name)
            rows += variants.policy_rows(stage, chosen, name, answered)
            print(f"seed {seed}: {name}", flush=True)
        write(rows, variants.COLUMNS, args.out / "policies.csv")
        write(curves, variants.CURVE_COLUMNS, args.out / "policy_curves.csv")


if __name__ == "__main__":
    main()
