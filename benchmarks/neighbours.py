"""What related work does otherwise, on the same stages: other rewards, rationales and pairs; writes
results/neighbours.csv.

    python benchmarks/neighbours.py --seeds 0 1 2 3 4

For every seed it takes stages 01 to 04 of the run runs/PRESET-all-seedSEED, makes those that are missing, and trains
each of NEIGHBOURS in a folder of its own. All models answer the same test questions, greedily and eight times at
temperature 1. Run the same command again to resume; delete the table to measure again.

Metrics: "greedy" and "avg@8" (right answers), "sound@8" (right answers with every step right, by the step checker; of a
rationale that corrects itself the steps after the correction), "tokens" (of a sampled answer), "drawn" (tokens that all
stages draw, stage 01 included) and "seconds" (of all stages, on one thread of a machine that did other work beside it);
of the model that learns from corrections also "corrected" (samples that say they were wrong) and "rightly corrected"
(the share of these in which a step before that is wrong).
A row "A minus B" has the paired differences. Seed "all" has means over the seeds with their t intervals.
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import controls
import numpy as np
import variants
from ablations import write

from smlib.files.artifacts import Stage, require
from smlib.learning import neighbours, reward_model, sft
from smlib.learning.rows import Pair, Rationale
from smlib.problems import steps
from smlib.reports import evaluation, results
from smlib.reports.results import MEAN
from smlib.reports.wording import with_interval
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings, preset

COLUMNS = ("seed", "method", "task", "metric", "value", "low", "high", "n")
SAMPLES, SHARES = 8, {"greedy": "greedy", "avg@8": "avg_at_8", "sound@8": "sound_at_8"}
FIRST = ("01_sampling", "02_ranking", "02_sft")
Train = Callable[[Path, Settings, str], list[Stage]]  # run, settings, name -> the stages it takes; the last has model/


def by_reward(formula: str) -> Train:
    """The same PPO for another reward; the control is that of benchmarks/controls.py."""

    def train(run, settings, name):
        other = preset(settings.preset, "all", settings.seed, ppo={"reward": formula})
        stage = variants.policy(run, other, name + "-reward" * (formula == "untrained"), "ppo")
        learned = ["03_second_sampling", "03_reward_model"] if "learned" in formula else []
        return [*(require(run, one) for one in [*FIRST, *learned]), stage]

    return train


def own(*stages: str) -> Train:
    return lambda run, settings, name: [require(run, stage) for stage in stages]


def on_rationales(choose: Callable) -> Train:
    """SFT on other rationales of stage 01; choose: tokenizer, all rationales, ranked ones, seed -> r+."""

    def train(run, settings, name):
        folder = variants.branch(run, f"sft-{name}", ("01_sampling", "02_ranking"))
        sampled, ranked = require(folder, "01_sampling"), require(folder, "02_ranking")
        read = {sampled: ["problems.jsonl", "rationales.jsonl"], ranked: ["ranked.jsonl"]}
        keys = {"rationales": name, "learned": "after AGAIN"}
        stage = Stage(folder, "02_sft", shared.stage_keys(settings, "sft") | keys, read)
        if not stage.done:

            def tune(model, tokenizer):
                kept = ranked.read_rows("ranked", Rationale)
                chosen = choose(tokenizer, sampled.read_rows("rationales", Rationale), kept, settings.seed)
                options = shared.trainer_kwargs(settings, "sft") | {"progress": name}
                given = partial(neighbours.wrong_tokens, tokenizer)
                return sft.train_sft(model, tokenizer, shared.problems_of(sampled), chosen, **options, given=given)

            shared.record_training(stage, settings, settings.base, tune)
        return [sampled, stage]

    return train


def more(times: int) -> Train:
    """SFT on the r+ of so many times as many questions."""

    def train(run, settings, name):
        many = settings.sampling
        asked = {"questions": times * many.questions, "conditioned_questions": times * many.conditioned_questions}
        other = preset(settings.preset, "all", settings.seed, sampling=asked)
        folder = Path(run) / "ablations" / f"sft-{times}-times"
        return [self_motivated.STAGES[stage](folder, other, progress=True) for stage in FIRST]

    return train


def by_edits(run: Path, settings: Settings, name: str) -> list[Stage]:
    """A reward model on the run's pairs, each followed by its edit; then PPO."""
    folder = variants.branch(run, "reward-edits", variants.SAMPLED)
    ranked, second = require(folder, "02_ranking"), require(folder, "03_second_sampling")
    sampled, tuned = require(folder, "01_sampling"), require(folder, "02_sft")
    read = {ranked: ["pairs.jsonl"], second: ["problems.jsonl", "pairs.jsonl"], tuned: ["model"]}
    stage = Stage(folder, "03_reward_model", shared.stage_keys(settings, "reward") | {"edits": True}, read)
    if not stage.done:
        with stage.recording():
            tokenizer = shared.load_tokenizer(settings)
            model = shared.load_trainable(settings, tuned.path("model"), stage.name)
            pairs = ranked.read_rows("pairs", Pair) + second.read_rows("pairs", Pair)
            problems = shared.problems_of(sampled) + shared.problems_of(second)
            both = [one for pair in pairs for one in (pair, *neighbours.edits(tokenizer, [pair]))]
            options = shared.trainer_kwargs(settings, "reward") | {"epochs": settings.reward.epochs / 2}
            stage.write_rows(
                "log", reward_model.train_reward_model(model, tokenizer, problems, both, **options, progress=name)
            )
            stage.write_model("model", model, tokenizer)
    return [sampled, tuned, second, stage, self_motivated.train_policy(folder, settings)]


@dataclass(frozen=True)
class Neighbour:
    """gold: which stages read gold answers."""

    paper: str
    gold: str
    train: Train


SML, ALL_STAGES = "Self-motivated Learning, 2404.07017", "all"
NEIGHBOURS = {
    "SFT on r+": Neighbour(SML, ALL_STAGES, own(*FIRST)),
    "SML": Neighbour(SML, ALL_STAGES, own(*FIRST, "03_second_sampling", "03_reward_model", "04_ppo")),
    "PPO, untrained": Neighbour("a control", "SFT", by_reward("untrained")),
    "PPO, checker": Neighbour("a control", ALL_STAGES, by_reward("checker")),
    "PPO, majority": Neighbour("LMSI, 2210.11610", "SFT", by_reward("majority")),
    "PPO, gold": Neighbour("LaTRO, 2411.04282", ALL_STAGES, by_reward("gold")),
    "PPO, gold - 0.1*words": Neighbour("Rational Metareasoning, 2410.05563", ALL_STAGES, by_reward("gold - 0.1*words")),
    "PPO, learned + 5*checker": Neighbour("LM-guided CoT, 2404.03414", ALL_STAGES, by_reward("learned + 5*checker")),
    "PPO, checker + 0.02*words": Neighbour("RLSP, 2502.06773", ALL_STAGES, by_reward("checker + 0.02*words")),
    "SFT on the majority": Neighbour(
        "LMSI, 2210.11610", "none", on_rationales(lambda t, written, ranked, seed: neighbours.of_the_majority(written))
    ),
    "SFT on r+ and corrections": Neighbour(
        "S²R, 2502.12853",
        ALL_STAGES,
        on_rationales(lambda t, written, ranked, seed: [*ranked, *neighbours.corrections(t, ranked, seed)]),
    ),
    "SML, half of the pairs edited": Neighbour("CLOMO, 2311.17438", ALL_STAGES, by_edits),
    "SFT on r+, twice the questions": Neighbour("more data", ALL_STAGES, more(2)),
    "SFT on r+, four times the questions": Neighbour("more data", ALL_STAGES, more(4)),
}
CONTRASTS = (
    *((name, "SFT on r+") for name in NEIGHBOURS if name != "SFT on r+"),
    *((name, "SML") for name in NEIGHBOURS if name not in ("SFT on r+", "SML")),
)


def drawn_tokens(stages: Sequence[Stage]) -> int:
    """Tokens that stages draw: of the samples of 01 and 03, and of all rollouts."""
    tokens = 0
    for stage in stages:
        if stage.name == "01_sampling":
            tokens += sum(len(one.token_ids) + 1 for one in stage.read_rows("rationales", Rationale))
        if stage.name == "03_second_sampling":  # it keeps those that are ranked
            kept = [len(one.token_ids) + 1 for one in stage.read_rows("ranked", Rationale)]
            fate = stage.read_json("fate.json")
            tokens += round(sum(fate.values()) * sum(kept) / len(kept))
        if stage.name == "04_ppo":
            with stage.path("training/log.csv").open(encoding="utf-8") as file:
                tokens += sum(int(row["tokens"]) for row in csv.DictReader(file))
    return tokens


def measured(settings: Settings, model: Path, asked: list) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(metric -> question id -> value, of SHARES and "tokens"; what corrections there are in the samples)."""
    params = shared.sampling_params(settings, "evaluation")
    params = replace(params, max_new_tokens=2 * params.max_new_tokens)  # a correction is as long as two rationales
    with shared.load_engine(settings, model) as engine:
        rows = evaluation.evaluate(engine, asked, SAMPLES, params, progress="")
    found, before = defaultdict(dict), []
    for row, problem in zip(rows, asked, strict=True):
        before += [
            (problem, text.split(neighbours.AGAIN)[0]) for text in row["sampled_texts"] if neighbours.AGAIN in text
        ]
        last = row | {"sampled_texts": [text.split(neighbours.AGAIN)[-1] for text in row["sampled_texts"]]}
        values = results.question_values(last, problem)
        for metric, name in SHARES.items():
            found[metric][problem.id] = values[name]
        found["tokens"][problem.id] = float(np.mean([len(ids) for ids in row["sampled_ids"]]))
    if not before:
        return dict(found), {}
    rightly = np.mean(
        [
            any(check.line and not check.correct for check in steps.check_steps(problem, text))
            for problem, text in before
        ]
    )
    corrected = {"corrected": len(before) / (SAMPLES * len(asked)), "rightly corrected": float(rightly)}
    return dict(found), {name: round(share, 5) for name, share in corrected.items()}


def rows_of(seed: int, values: dict[str, dict], costs: dict[str, dict[str, float]], tasks: dict[str, list[str]]):
    """Of one seed: every method's values, costs and contrasts; values: method -> metric -> question id -> value."""
    shown = dict(values)
    for one, other in CONTRASTS:
        shown[f"{one} minus {other}"] = {
            metric: {name: value - values[other][metric][name] for name, value in values[one][metric].items()}
            for metric in SHARES
        }
    rows = []
    for method, metrics in shown.items():
        for metric, found in metrics.items():
            for task, names in tasks.items():
                kept = [found[name] for name in names]
                numbers = [round(float(x), 5) for x in (np.mean(kept), *evaluation.mean_interval(kept))]
                rows.append(dict(zip(COLUMNS, (seed, method, task, metric, *numbers, len(kept)), strict=True)))
        for metric, cost in costs.get(method, {}).items():
            rows.append(dict(zip(COLUMNS, (seed, method, MEAN, metric, cost, "", "", 1), strict=True)))
    return rows


def of_seed(settings: Settings, run: Path) -> list[dict]:
    """All rows of a seed."""
    self_motivated.before_policy(run, settings)
    self_motivated.train_policy(run, settings)
    sets = questions.test_problems(settings)
    asked, values, costs = [problem for problems in sets.values() for problem in problems], {}, {}
    tasks = {task: [problem.id for problem in problems] for task, problems in sets.items()}
    tasks[MEAN] = [name for names in tasks.values() for name in names]
    for name, neighbour in NEIGHBOURS.items():
        stages = neighbour.train(run, settings, re.sub(r"[^\w.+]+", "-", name))
        values[name], corrected = measured(settings, stages[-1].path("model"), asked)
        seconds = sum(stage.manifest["wall_seconds"] for stage in stages)
        costs[name] = {"drawn": drawn_tokens(stages), "seconds": round(seconds, 1)} | corrected
        print(f"seed {settings.seed}: {name} ({neighbour.paper}; reads gold answers: {neighbour.gold})", flush=True)
    return rows_of(settings.seed, values, costs, tasks)


def markdown(rows: Sequence[dict]) -> str:
    """The table of docs/results.md, from the rows over seeds: shares and differences in percent, means over tasks."""
    found = {(row["method"], row["metric"]): row for row in rows if row["seed"] == "all" and row["task"] == MEAN}

    def percent(method: str, metric: str) -> str:
        numbers = [100 * float(found[method, metric][name]) for name in ("value", "low", "high")]
        return with_interval(*numbers, " minus " in method)

    heads = [*SHARES, "greedy, minus SFT on r+", "tokens", "drawn, thousands", "seconds", "gold answers"]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, neighbour in NEIGHBOURS.items():
        cells = [percent(name, metric) for metric in SHARES]
        cells.append("" if name == "SFT on r+" else percent(f"{name} minus SFT on r+", "greedy"))
        tokens, drawn, seconds = (float(found[name, metric]["value"]) for metric in ("tokens", "drawn", "seconds"))
        cells += [f"{tokens:.0f}", f"{drawn / 1000:,.0f}", f"{seconds:,.0f}", neighbour.gold]
        lines.append(f"| {name} ({neighbour.paper}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=100, help="test questions per task (default 100)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("neighbours.csv"))
    args = parser.parse_args()
    rows = controls.measured(args.out, {"seed": int, "value": float, "n": int})
    if other := {row["method"] for row in rows if " minus " not in row["method"]} - NEIGHBOURS.keys():
        raise SystemExit(f"{args.out} has other methods ({', '.join(sorted(other))}): delete it to measure again")
    for seed in args.seeds:
        if any(row["seed"] == seed for row in rows):
            continue
        settings = controls.asking(preset(args.preset, "all", seed), args.questions)
        rows += of_seed(settings, shared.run_folder("", args.preset, "all", seed))
        write(rows + controls.over_seeds(rows, COLUMNS), COLUMNS, args.out)
    if pooled := controls.over_seeds(rows, COLUMNS):
        print(f"\n{markdown(pooled)}")


if __name__ == "__main__":
    main()
