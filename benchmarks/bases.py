"""How do SML's gain and the reward model's accuracy change with the base? Writes results/bases.csv.

    python benchmarks/bases.py --seeds 0 1 2 --bases llama-96 llama-128 llama-192 llama-352
    python benchmarks/bases.py --seeds 0 1 2 --bases gpt2-128 mistral-128 qwen3-128 translation

A base is named by its architecture and width: 3 layers that have read what the package's own has (`smlib pretrain
--architecture ... --hidden ...`); llama-128 is the package's own. "translation" is one like the package's own that has
read 40,000 translations instead, a task that takes no reasoning, and is asked for translations. A base that is missing
is made in runs/bases, in hours: on one core of an AMD EPYC, beside other work, in 0.4, 0.9 and 2.5 hours for Llamas of
width 96, 192 and 352. Every base goes through stages 01 to 04 with the settings of preset tiny, and nothing is tuned
for it.

Rows of results/bases.csv: for every base and seed, accuracy of base, SFT model, SML model and the control of
results/controls.csv (PPO with the untrained reward) on the test questions of stage 05, greedily and at temperature 1,
with paired differences; and what rewards say of the SFT model's own samples on fresh questions of the train split, as
in results/reward_models.csv: the untrained one, the run's reward model, and a likelihood and a scalar head after as
many PAIRS (not of translations, of which the SFT model gets too few wrong). Seed "all" has means over the seeds with
their t intervals. Run the same command again to resume; delete the table to measure again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import controls
import reward_models
import variants
from ablations import write

from smlib import pretraining
from smlib.reports.results import ALL, MEAN
from smlib.reports.wording import with_interval
from smlib.runs import shared
from smlib.runs.settings import preset
from smlib.sampling import models

COLUMNS = ("seed", "method", "base", "parameters", "task", "temperature", "metric", "value", "low", "high", "n")
KINDS = controls.KINDS | {"parameters": int}
OWN, TRANSLATION = "llama-128", "translation"  # the package's base; the one that translates
QUESTIONS, FRESH, PAIRS = 100, 200, (5_000,)  # questions per task


def base_of(name: str, folder: Path) -> str:
    """The base of that name, trained where it is missing."""
    if name == OWN:
        return "tiny"
    if not (folder / name).exists():
        if name == TRANSLATION:
            pretraining.make_base(folder / name, task=TRANSLATION, documents=40_000)
        else:
            architecture, _, width = name.partition("-")
            pretraining.make_base(folder / name, hidden=int(width), architecture=architecture)
    return str(folder / name)


def rows_of(seed: int, name: str, folder: Path) -> list[dict]:
    """All rows of a base and a seed."""
    base = base_of(name, folder)
    settings = preset("tiny", TRANSLATION if name == TRANSLATION else "all", seed, base=base)
    run = shared.run_folder("", "tiny", "all", seed) if base == "tiny" else folder / f"{name}-seed{seed}"
    made = ((method, controls.model_of(method, run, settings)) for method in controls.METHODS)
    answered = controls.rows_of_seed(controls.asking(settings, QUESTIONS), made, (0.0, 1.0))
    pairs = () if name == TRANSLATION else PAIRS  # its SFT model errs too rarely for so many
    judged = reward_models.measure(settings, run, FRESH, ("SFT",), ("likelihood", "scalar head"), pairs)
    rewards = [
        row | {"method": f"{row['reward']}, {row['pairs']:,} pairs" if row["pairs"] else row["reward"]}
        for row in judged
        if " minus " not in row["reward"] or row["reward"].endswith(f"minus {reward_models.UNTRAINED}")
    ]
    own = {"base": name, "parameters": models.model_size(models.load_policy(base)), "temperature": 1.0}
    return [{column: (own | row)[column] for column in COLUMNS} for row in answered + rewards]


def markdown(rows: Sequence[dict]) -> str:
    """The table of docs/results.md, from the rows over seeds, in percent; a translation's is of its own task."""
    shown = {
        "SFT, greedy": ("SFT", 0.0, "right"),
        "SML minus SFT, greedy": ("SML minus SFT", 0.0, "right"),
        "SML minus untrained reward, greedy": (f"SML minus {controls.UNTRAINED}", 0.0, "right"),
        "SML minus SFT, samples": ("SML minus SFT", 1.0, "right"),
        "pairs ranked right, untrained": (reward_models.UNTRAINED, 1.0, reward_models.RANKED),
        "likelihood": ("likelihood, 5,000 pairs", 1.0, reward_models.RANKED),
        "scalar head": ("scalar head, 5,000 pairs", 1.0, reward_models.RANKED),
    }
    found = {(row["base"], row["method"], float(row["temperature"]), row["metric"]): row for row in rows
             if row["seed"] == "all" and row["task"] in (MEAN, ALL)}  # fmt: skip
    sizes = {row["base"]: int(row["parameters"]) for row in rows}
    lines = [f"| % | parameters | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for base, size in sorted(sizes.items(), key=lambda one: (not one[0].startswith("llama"), one[1])):
        cells = [f"{size / 1e6:.2f} M"]
        for method, *place in shown.values():
            row = found.get((base, method, *place))
            signed = " minus " in method
            numbers = [100 * float(row[name]) for name in ("value", "low", "high")] if row else []
            cells.append("" if not row else with_interval(*numbers, signed) if signed else f"{numbers[0]:.1f}")
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bases", nargs="+", default=[OWN], metavar="NAME", help="such as llama-192")
    parser.add_argument("--folder", type=Path, default=Path("runs", "bases"), help="of bases and their runs")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("bases.csv"))
    args = parser.parse_args()
    rows = controls.measured(args.out, KINDS)
    for seed in args.seeds:
        for name in args.bases:
            if any((row["seed"], row["base"]) == (seed, name) for row in rows):
                continue
            rows += rows_of(seed, name, args.folder)
            write(rows + controls.over_seeds(rows, COLUMNS), COLUMNS, args.out)
            print(f"seed {seed}, {name}: done", flush=True)
    if pooled := controls.over_seeds(rows, COLUMNS):
        print(f"\n{markdown(pooled)}")


if __name__ == "__main__":
    main()
