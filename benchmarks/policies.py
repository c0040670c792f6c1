"""PPO, RLOO and GRPO from the same start, with equally many completions; and a policy that cheats.

    python benchmarks/policies.py --seeds 0 1 2 3 4
    python benchmarks/policies.py --tune --seeds 10
    python benchmarks/policies.py --time

Writes results/policies.csv (accuracy on fresh questions of the train split, and the gain over the SFT model) and
results/policy_curves.csv (every update of every training). For every seed it takes stages 01 to 03 of the run
runs/PRESET-all-seedSEED, makes those that are missing, and trains each policy in a folder of its own. Run the same
command again to resume.

With --tune it trains PPO, RLOO and GRPO at every setting of GRID, and writes results/policy_tuning.csv. With --time it
measures what an update of TIMED takes, in turn in one process, and writes results/policy_seconds.csv: the time of LONG
updates less that of SHORT ones, so without loading, the better of two rounds.
"""

import argparse
import csv
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

import variants
from ablations import write

from smlib.files.artifacts import Stage, require
from smlib.reports import evaluation
from smlib.reports.wording import with_interval
from smlib.runs import self_motivated, shared
from smlib.runs.settings import Settings, preset
from smlib.runs.shared import answer_fresh

OWN = "PPO, learned reward"  # what the run itself trains, or has trained
UNTRAINED = "PPO, untrained reward"
ROLLOUTS = {"value": "rollouts", "lam": 0.0}
POLICIES = {  # name: method, what differs from the preset's settings of PPO
    OWN: ("ppo", {}),
    UNTRAINED: ("ppo", {"reward": "untrained"}),
    "PPO, checker": ("ppo", {"reward": "checker"}),
    "PPO, values by rollouts": ("ppo", ROLLOUTS),
    "RLOO, learned reward": ("rloo", {}),
    "GRPO, learned reward": ("grpo", {}),
    # the best setting of GRID (results/policy_tuning.csv), by the mean of greedy and avg@8
    "PPO, tuned": ("ppo", {"max_grad_norm": 0.02}),
    "RLOO, tuned": ("rloo", {"learning_rate": 5e-4}),
    "GRPO, tuned": ("grpo", {"max_grad_norm": 0.02}),
}
COMPARED = ("PPO, learned reward", "RLOO, learned reward", "GRPO, learned reward")
TABLES = ((*COMPARED, "PPO, checker", UNTRAINED), ("PPO, tuned", "RLOO, tuned", "GRPO, tuned"))  # of docs/benchmarks.md
GRID = tuple(
    {"learning_rate": rate, "kl_coef": kl, "max_grad_norm": norm}
    for norm, rate, kl in product((1.0, 0.02), (2.5e-4, 5e-4), (0.02, 0.08))
)
TIMED, SHORT, LONG = (OWN, "PPO, values by rollouts", "RLOO, learned reward", "GRPO, learned reward"), 2, 8
TIME_COLUMNS = ("policy", "seconds_per_update", "tokens_per_update")
TUNING_COLUMNS = ("policy", "seed", "learning_rate", "kl_coef", "max_grad_norm", "greedy", "avg@8", "kl")
# A reward that is easy to please without solving anything, first at no price for leaving the reference, then at one.
BRIEF = "learned - 5*words"
HASTY = {"reward": BRIEF, "updates": 30, "learning_rate": 5e-4}
HACKED = {"brevity, no price on KL": HASTY | {"kl_coef": 0.0}, "brevity, KL at a price": HASTY | {"kl_coef": 0.5}}


def trained(preset_name: str, task: str, seed: int, name: str) -> tuple[Stage, Settings]:
    """One of POLICIES, trained where it is not yet, from stages 01 to 03 of its seed's run; and its settings."""
    method, changes = POLICIES[name]
    settings, run = preset(preset_name, task, seed, ppo=changes), shared.run_folder("", preset_name, task, seed)
    self_motivated.before_policy(run, preset(preset_name, task, seed))
    if name == OWN:
        return self_motivated.train_policy(run, settings), settings
    return variants.policy(run, settings, folder_name(name), method), settings


def tune(args: argparse.Namespace) -> list[dict]:
    """The methods named at every setting of GRID, on seeds that no result is from: accuracies on fresh questions."""
    rows = []
    for seed in args.seeds:
        run = shared.run_folder("", args.preset, args.task, seed)
        self_motivated.before_policy(run, preset(args.preset, args.task, seed))
        for name, setting in product(args.policies or COMPARED, GRID):
            method, changes = POLICIES[name]
            settings = preset(args.preset, args.task, seed, ppo=changes | setting)
            stage = variants.policy(run, settings, "-".join([folder_name(name), *map(str, setting.values())]), method)
            with stage.path("training/log.csv").open(encoding="utf-8") as file:
                last = list(csv.DictReader(file))[-10:]
            answered = answer_fresh(settings, stage.path("model"), args.questions)
            greedy, avg = (sum(values) / len(values) for values in variants.accuracies(answered).values())
            kl = sum(float(row["kl"]) for row in last) / len(last)
            numbers = (round(number, 4) for number in (greedy, avg, kl))
            rows.append(dict(zip(TUNING_COLUMNS, (name, seed, *setting.values(), *numbers), strict=True)))
            print(rows[-1], flush=True)
    return rows


def timed(args: argparse.Namespace) -> list[dict]:
    """Seconds and drawn tokens of an update of TIMED, which starts from the first seed's run."""
    seed, best, tokens = args.seeds[0], {}, {}
    run = shared.run_folder("", args.preset, args.task, seed)
    self_motivated.before_policy(run, preset(args.preset, args.task, seed))
    for name in TIMED * 2:
        method, changes = POLICIES[name]
        seconds = {}
        for updates in (SHORT, LONG):
            settings = preset(args.preset, args.task, seed, ppo=changes | {"updates": updates})
            folder = f"timed-{folder_name(name)}-{updates}"
            shutil.rmtree(run / "ablations" / f"policy-{folder}", ignore_errors=True)  # of a call that was killed
            stage = variants.policy(run, settings, folder, method)
            seconds[updates] = stage.manifest["wall_seconds"]
            tokens[name] = variants.curve_rows(stage, settings, name)[-1]["tokens"] / updates
            shutil.rmtree(stage.folder.parent)
        each = (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)
        best[name] = min(each, best.get(name, each))
        print(f"{name}: {each:.2f} s an update", flush=True)
    return [dict(zip(TIME_COLUMNS, (one, round(best[one], 2), round(tokens[one])), strict=True)) for one in TIMED]


def seconds_markdown(rows: Sequence[dict]) -> str:
    """What an update takes, as a table of docs/benchmarks.md."""
    lines = ["| | seconds per update | relative to PPO | tokens drawn per update |", "|---|---|---|---|"]
    own = float(rows[0]["seconds_per_update"])
    for row in rows:
        each, drawn = float(row["seconds_per_update"]), int(row["tokens_per_update"])
        lines.append(f"| {row['policy']} | {each:.1f} | {each / own:.1f} times | {drawn:,} |")
    return "\n".join(lines)


def folder_name(policy: str) -> str:
    return policy.replace(", ", "-").replace(" ", "-")


def merged(table: Path, rows: list[dict], policy: str) -> list[dict]:
    """The rows of a table with these in place of those of their seeds and policies; policy: that column."""
    if not table.exists():
        return rows
    new = {(str(row["seed"]), row[policy]) for row in rows}
    with table.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if (row["seed"], row[policy]) not in new] + rows


def markdown(rows: list[dict], names: Sequence[str]) -> str:
    """The table of docs/benchmarks.md for some policies, from results/policies.csv: means over seeds with t intervals
    over seeds, in points, also of the difference from the first."""
    gains = {(row["value"], row["metric"], row["seed"]): 100 * float(row["score"]) for row in rows}
    seeds = sorted({seed for name, _, seed in gains if name == names[0]})
    lines = ["| | avg@8 | minus PPO's | greedy | minus PPO's |", "|---|---|---|---|---|"]
    for name in names:
        cells = []
        for metric in ("avg@8, gain over SFT", "greedy, gain over SFT"):
            gained, own = ([gains[one, metric, seed] for seed in seeds] for one in (name, names[0]))
            more = [a - b for a, b in zip(gained, own, strict=True)]
            for values in [gained] if name == names[0] else [gained, more]:
                cells.append(with_interval(mean(values), *evaluation.mean_interval(values), signed=True))
            cells += [""] if name == names[0] else []
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hacked", type=int, nargs="*", default=[0], help="seeds of the cheating policy (default 0)")
    parser.add_argument("--questions", type=int, default=100, help="fresh questions per task (default 100)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.parent)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=[], metavar="NAME", help="only these")
    parser.add_argument("--tune", action="store_true", help="instead try settings, of those that are compared")
    parser.add_argument("--time", action="store_true", help="instead measure what an update takes")
    args = parser.parse_args()
    if args.tune:
        write(tune(args), TUNING_COLUMNS, args.out / "policy_tuning.csv")
        return
    if args.time:
        rows = timed(args)
        write(rows, TIME_COLUMNS, args.out / "policy_seconds.csv")
        print(f"\n{seconds_markdown(rows)}")
        return
    rows, curves = [], []
    for seed in args.seeds:
        settings = preset(args.preset, args.task, seed)
        run = shared.run_folder("", args.preset, args.task, seed)
        self_motivated.before_policy(run, settings)
        answered = answer_fresh(settings, require(run, "02_sft").path("model"), args.questions)
        found = {name: trained(args.preset, args.task, seed, name) for name in args.policies or POLICIES}
        for name, changes in HACKED.items() if seed in args.hacked and not args.policies else ():
            chosen = preset(args.preset, args.task, seed, ppo=changes)
            found[name] = variants.policy(run, chosen, folder_name(name), "ppo"), chosen
        for name, (stage, chosen) in found.items():
            curves += variants.curve_rows(stage, chosen, name)
            rows += variants.policy_rows(stage, chosen, name, answered)
            print(f"seed {seed}: {name}", flush=True)
        for table, columns, new, policy in (
            ("policies.csv", variants.COLUMNS, rows, "value"),
            ("policy_curves.csv", variants.CURVE_COLUMNS, curves, "policy"),
        ):
            write(merged(args.out / table, new, policy), columns, args.out / table)
    with (args.out / "policies.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = {row["value"] for row in rows}
    for names in TABLES:
        if measured >= set(names):
            print(f"\n{markdown(rows, names)}")


if __name__ == "__main__":
    main()
