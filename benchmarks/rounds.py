"""What does a second round bring? SML again from the SML model; writes results/rounds.csv.

    python benchmarks/rounds.py --questions 100 --rounds 3 --seeds 0 1 2 3 4

A round is stages 01 to 04: the model of the round before is the base that answers new questions, is trained on its own
right rationales (SFT), samples again, gets a new reward model, and is trained by PPO. Three controls could explain a
gain away: in every round the same PPO with a reward that has learned no rank; in the first round twice as many updates,
which cost as much PPO as two rounds; and rounds of SFT alone, on the same questions, in which nothing has learned a
rank. All models answer the same test questions, greedily and at temperature 1.

For every seed it takes stages 01 to 04 of the run runs/PRESET-TASK-seedSEED, makes those that are missing, and keeps
the later rounds in its folder `rounds`. Run the same command again to resume; delete the table to measure again. The
rows are those of results/controls.csv.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import controls
import variants
from ablations import write

from smlib.runs import self_motivated, shared
from smlib.runs.settings import preset

TABLE = variants.TABLE.with_name("rounds.csv")
NAMES = ("SFT alone", "SFT", "untrained reward", "SML")  # of a round's models; in the first both kinds of SFT are one
LONGER = "round 1, twice the updates"
SHOWN = [("greedy", controls.MEAN, 0.0, "right"), ("temperature 1", controls.MEAN, 1.0, "right")]


def models_of(preset_name: str, task: str, seed: int, rounds: int) -> Iterator[tuple[str, Path | str]]:
    """(name, folder) of the base and of every round's models, trained where they are missing."""
    run, first = shared.run_folder("", preset_name, task, seed), preset(preset_name, task, seed)
    alone, alone_settings = run / "02_sft" / "model", first
    yield "base", first.base
    for number, (folder, settings) in enumerate(self_motivated.rounds(run, first, rounds), 1):
        if number > 1:
            alone_settings = self_motivated.next_round(alone_settings, alone)
            alone = controls.model_of("SFT", run / "rounds" / f"{number}-sft-alone", alone_settings)
            yield f"round {number}, SFT alone", alone
        yield f"round {number}, SFT", controls.model_of("SFT", folder, settings)
        yield f"round {number}, untrained reward", controls.model_of(controls.UNTRAINED, folder, settings)
        yield f"round {number}, SML", controls.model_of(controls.LEARNED, folder, settings)
        if number == 1:
            longer = replace(settings, ppo=replace(settings.ppo, updates=2 * settings.ppo.updates))
            yield LONGER, variants.policy(folder, longer, "PPO-twice-the-updates", "ppo").path("model")


def contrasts(rounds: int) -> list[tuple[str, str]]:
    """Who is compared with whom."""
    pairs = [("round 1, SML", "base"), ("round 1, SML", "round 1, untrained reward"), (LONGER, "round 1, SML")]
    for number in range(2, rounds + 1):
        last, now, alone = f"round {number - 1}, SML", f"round {number}, SML", f"round {number}, SFT alone"
        before = "round 1, SFT" if number == 2 else f"round {number - 1}, SFT alone"
        pairs += [(now, last), (now, LONGER), (now, alone), (alone, before), (f"round {number}, SFT", last)]
        pairs += [(f"round {number}, untrained reward", last), (now, f"round {number}, untrained reward")]
    return pairs


def markdown(rows: Sequence[dict], rounds: int) -> str:
    """The table of docs/results.md, from the rows over seeds."""
    methods = ["base", *(f"round {number}, {name}" for number in range(1, rounds + 1) for name in NAMES)]
    methods.remove("round 1, SFT alone")
    methods.insert(methods.index("round 1, SML") + 1, LONGER)
    return controls.markdown(rows, SHOWN, methods, contrasts(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=0, help="questions per task (default: as in stage 05)")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    rows = controls.measured(args.out, controls.KINDS)
    for seed in args.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        settings = controls.asking(preset(args.preset, args.task, seed), args.questions)
        models = models_of(args.preset, args.task, seed, args.rounds)
        rows += controls.rows_of_seed(settings, models, (0.0, 1.0), contrasts(args.rounds))
        write([*rows, *controls.over_seeds(rows)], controls.COLUMNS, args.out)
    if args.task == "all" and (pooled := controls.over_seeds(rows)):
        print(f"\n{markdown(pooled, args.rounds)}")


if __name__ == "__main__":
    main()
