"""What does the rank add? SML beside the same PPO with a reward that has learned no rank; writes results/controls.csv.

    python benchmarks/controls.py --questions 100 --seeds 0 1 2 3 4
    make real  # the same of a real model, and one seed of its peers

Both start from the SFT model and differ only in the reward: the reward model after its training on the rank, or before
it, when it is the SFT model itself and prefers what that model finds likely. Any such reward sharpens the policy: its
samples at temperature 1 get better, although its likeliest answers do not change. So base, SFT and both policies answer
the test questions of stage 05 greedily and at several temperatures, and the entropy of each is measured too.

For every seed it takes stages 01 to 04 of the run runs/PRESET-all-seedSEED, makes those that are missing, and trains
the other policy in a folder of its own. Run the same command again to resume; delete the table to measure again. A row
is a share of right answers, or nats per token, of one model at one temperature, with an interval over questions. Seed
"all" has means over the seeds with their t intervals (none for the base, which no seed trains). "A minus B" has the
paired differences, question by question.

A policy that is surer of itself has less entropy at the same temperature. So the rows "right at SML's entropy" compare
at equal entropy: the accuracy of every model where its samples have the entropy of SML's at that temperature,
interpolated between the measured temperatures (mean of tasks, seed by seed).
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
import variants
from ablations import write

from smlib.judging.answers import grade
from smlib.problems import prompts
from smlib.problems.datasets import TASKS, Problem
from smlib.reports.evaluation import mean_interval
from smlib.reports.results import ALL, MEAN
from smlib.reports.wording import with_interval
from smlib.runs import questions, self_explore, self_motivated, shared
from smlib.runs.settings import Settings, preset
from smlib.sampling import encoding, packing
from smlib.sampling.engines import NativeEngine
from smlib.sampling.params import SamplingParams

COLUMNS = ("seed", "method", "task", "temperature", "metric", "value", "low", "high", "n")
KINDS = {"seed": int, "temperature": float, "value": float, "low": float, "high": float, "n": int}
TEMPERATURES = {0.0: 1, 0.25: 4, 0.5: 4, 0.75: 4, 1.0: 8}  # temperature -> samples of a question
UNTRAINED, LEARNED = "SML, untrained reward", "SML"
METHODS = ("base", "SFT", UNTRAINED, LEARNED)
SOURCES = {"SFT on open r+": "open", "SFT on conditioned r+": "conditioned"}  # of the same samples
WEI = "base, exemplars of Wei et al."
RLOO, EXPLORED = "RLOO", {"RFT": "06_rft", "Self-Explore": "06_step_dpo"}
CONTRASTS = (("SFT", "base"), (LEARNED, "SFT"), (UNTRAINED, "SFT"), (LEARNED, UNTRAINED))
MORE_CONTRASTS = (
    (WEI, "base"), *((one, "base") for one in SOURCES), *(("SFT", one) for one in SOURCES), (LEARNED, RLOO),
    (RLOO, "SFT"), ("RFT", "SFT"), ("Self-Explore", "RFT"), (LEARNED, "Self-Explore"),
)  # fmt: skip
EQUAL = "right at SML's entropy"
Values = dict[tuple[str, float, str], dict[str, float]]  # (method, temperature, metric) -> question id -> value


def model_of(method: str, run: Path, settings: Settings) -> Path | str:
    """The folder of a method's model, which is trained first where it is missing."""
    if method in ("base", WEI):
        return settings.base
    if method in ("SFT", *SOURCES):
        for stage in ("01_sampling", "02_ranking"):
            self_motivated.STAGES[stage](run, settings, progress=True)
        if method in SOURCES:
            run = variants.branch(run, method.replace(" ", "-"), ("01_sampling", "02_ranking"))
            settings = replace(settings, sft=replace(settings.sft, source=SOURCES[method]))
        return self_motivated.train_sft(run, settings).path("model")
    if method in EXPLORED:
        for name, make in (self_explore.BEFORE | self_explore.STAGES).items():
            if name != "06_pit_report":
                stage = make(run, settings, progress=True)
            if name == EXPLORED[method]:
                return stage.path("model")
    self_motivated.before_policy(run, settings)
    if method == LEARNED:
        return self_motivated.train_policy(run, settings).path("model")
    if method == RLOO:
        return variants.policy(run, settings, "RLOO-learned-reward", "rloo").path("model")
    other = replace(settings, ppo=replace(settings.ppo, reward="untrained"))
    return variants.policy(run, other, "PPO-untrained-reward", "ppo").path("model")


@torch.inference_mode()
def entropy(engine: NativeEngine, prompt: list[int], completions: list[list[int]], temperature: float) -> float:
    """Nats per token of what the completions [of one prompt] were drawn from."""
    packed = packing.pack([(prompt, completions)], engine.tokenizer.pad_token_id, engine.model.device)
    logits = engine.model.get_output_embeddings()(packing.packed_states(engine.model, packed)).float()
    logp = (logits / temperature).log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def answer(
    engine: NativeEngine, problems: Sequence[Problem], settings: Settings, shots: str, temperatures: Sequence[float]
) -> dict[tuple[float, str], dict[str, float]]:
    """(temperature, metric) -> question id -> the share of its samples that are right, or their entropy. With
    exemplars in the prompt no entropy is measured, as reading the samples again takes longer than drawing them."""
    asked = [encoding.encode_question(engine.tokenizer, problem, shots=shots) for problem in problems]
    found = defaultdict(dict)
    for temperature in temperatures:
        params = SamplingParams(temperature, settings.sampling.max_new_tokens, settings.seed)
        drawn = engine.sample_ids(
            asked, TEMPERATURES.get(temperature, 8), params.stopping_at(prompts.stop(shots)),
            keys=[problem.id for problem in problems], progress=f"T = {temperature}",
        )  # fmt: skip
        for problem, prompt, samples in zip(problems, asked, drawn, strict=True):
            right = [grade(problem, prompts.cut(one.text)).correct for one in samples]
            found[temperature, "right"][problem.id] = float(np.mean(right))
            if temperature and shots == "none":
                completions = [list(one.token_ids) for one in samples]
                found[temperature, "entropy"][problem.id] = entropy(engine, prompt, completions, temperature)
    return dict(found)


def rows_of(
    seed: int | str, values: Values, tasks: dict[str, list[str]], contrasts: Sequence[tuple[str, str]] = CONTRASTS
) -> list[dict]:
    """Of one seed: a row for every method, task, temperature and metric, and for every contrast."""
    methods = {method for method, *_ in values}
    shown = {(method, *rest): found for (method, *rest), found in values.items()} | {
        (f"{one} minus {other}", temperature, "right"): {
            name: value - values[other, temperature, "right"][name]
            for name, value in values[one, temperature, "right"].items()
        }
        for one, other in contrasts
        if {one, other} <= methods
        for temperature in dict.fromkeys(temperature for _, temperature, _ in values)
    }
    rows = []
    for (method, temperature, metric), found in shown.items():
        for task, names in tasks.items():
            kept = [found[name] for name in names]
            numbers = [round(float(number), 5) for number in (np.mean(kept), *mean_interval(kept))]
            rows.append(dict(zip(COLUMNS, (seed, method, task, temperature, metric, *numbers, len(kept)), strict=True)))
    return rows


def asking(settings: Settings, questions: int) -> Settings:
    """The same, with so many test questions per task; 0 leaves them."""
    return replace(settings, evaluation=replace(settings.evaluation, questions=questions)) if questions else settings


def rows_of_seed(
    settings: Settings,
    models: Iterable[tuple[str, Path | str]],
    temperatures: Sequence[float],
    contrasts: Sequence[tuple[str, str]] = CONTRASTS,
) -> list[dict]:
    """`rows_of` what the models, (name, folder), answer to the test questions of stage 05. The base gets exemplars as
    in stage 01, or those that its name says. A folder is asked for when its turn has come, so that it may be trained
    then."""
    sets = questions.test_problems(settings)
    tasks = {task: [problem.id for problem in problems] for task, problems in sets.items()}
    together = MEAN if len({len(names) for names in tasks.values()}) == 1 else ALL
    tasks |= {together: [name for names in tasks.values() for name in names]}
    asked, values = [problem for problems in sets.values() for problem in problems], {}
    for name, path in models:
        with shared.load_engine(settings, path) as engine:
            shots = {"base": settings.sampling.shots, WEI: "wei"}.get(name, "none")
            found = answer(engine, asked, settings, shots, temperatures)
        values |= {(name, *key): per_question for key, per_question in found.items()}
        print(f"seed {settings.seed}: {name}", flush=True)
    return rows_of(settings.seed, values, tasks, contrasts)


def over_seeds(rows: Sequence[dict], columns: Sequence[str] = COLUMNS) -> list[dict]:
    """The means over seeds, with t intervals over seeds, n of them; nothing of what has one seed.

    columns: "seed", those that name what was measured, "value", "low", "high", "n".
    """
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in columns[1:-4])].append(row["value"])
    pooled = []
    for key, values in groups.items():
        if len(values) > 1:  # of the base the seeds change the samples alone
            low, high = ("", "") if key[0] == "base" else (round(float(end), 5) for end in mean_interval(values))
            numbers = round(float(np.mean(values)), 5), low, high
            pooled.append(dict(zip(columns, ("all", *key, *numbers, len(values)), strict=True)))
    return pooled


def at_equal_entropy(rows: Sequence[dict]) -> list[dict]:
    """For every seed: each method's share of right answers at SML's entropy, and every contrast."""
    curves = defaultdict(dict)  # seed, method, metric -> temperature -> mean of tasks
    together = MEAN if any(row["task"] == MEAN for row in rows) else ALL
    for row in (row for row in rows if row["task"] == together and " minus " not in row["method"]):
        curves[row["seed"], row["method"], row["metric"]][row["temperature"]] = row["value"]
    found = []
    for seed in dict.fromkeys(seed for seed, *_ in curves):
        methods = [method for one, method, metric in curves if (one, metric) == (seed, "entropy")]
        for temperature, level in curves.get((seed, LEARNED, "entropy"), {}).items():
            values = {}
            for method in methods:
                right = curves[seed, method, "right"]
                entropies = [curves[seed, method, "entropy"].get(one, 0.0) for one in right]  # greedy has none
                values[method] = float(np.interp(level, entropies, list(right.values())))
            values |= {f"{a} minus {b}": values[a] - values[b] for a, b in CONTRASTS if {a, b} <= values.keys()}
            for method, value in values.items():
                cells = (seed, method, together, temperature, EQUAL, round(value, 5), "", "", "")
                found.append(dict(zip(COLUMNS, cells, strict=True)))
    return found


def measured(table: Path, kinds: dict[str, type]) -> list[dict]:
    """The rows of the seeds that a table has; kinds: of the columns that are no texts."""
    if not table.exists():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] != "all" and row["metric"] != EQUAL]
    return [{name: kinds.get(name, str)(value) for name, value in row.items()} for row in rows]


def markdown(
    rows: Sequence[dict],
    columns: Sequence[tuple[str, str, float, str]],
    methods: Sequence[str] = METHODS,
    contrasts: Sequence[tuple[str, str]] = CONTRASTS,
) -> str:
    """A table of docs/results.md from the rows over seeds, in percent; columns: head, task, temperature, metric."""
    names = ("method", "task", "metric")
    found = {(*(row[name] for name in names), float(row["temperature"])): row for row in rows if row["seed"] == "all"}
    lines = [f"| right answers, % | {' | '.join(head for head, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    differences = [f"{one} minus {other}" for one, other in contrasts]
    for method in (*methods, *differences):
        cells = []
        for _, task, temperature, metric in columns:
            row = found[method, task, metric, temperature]
            numbers = [100 * float(row[name]) for name in ("value", "low", "high") if row[name] != ""]
            with_ends = len(numbers) == 3
            cells.append(with_interval(*numbers, method in differences) if with_ends else f"{numbers[0]:.1f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = (  # of docs/results.md
    [("greedy", MEAN, 0.0, "right"), ("temperature 0.5", MEAN, 0.5, "right"), ("temperature 1", MEAN, 1.0, "right")],
    [(f"at SML's entropy, temperature {temperature:g}", MEAN, temperature, EQUAL) for temperature in (0.5, 1.0)],
    [(f"greedy, {task.replace('_', ' ')}", task, 0.0, "right") for task in TASKS],
    [(f"temperature 1, {task.replace('_', ' ')}", task, 1.0, "right") for task in TASKS],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *SOURCES, WEI, RLOO, *EXPLORED), default=METHODS)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[*TEMPERATURES])
    parser.add_argument("--questions", type=int, default=0, help="questions per task (default: as in stage 05)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("controls.csv"))
    args = parser.parse_args()
    rows = measured(args.out, KINDS)
    for seed in args.seeds:
        done = {(row["method"], row["temperature"]) for row in rows if row["seed"] == seed}
        if done >= set(product(args.methods, args.temperatures)):
            continue
        rows = [row for row in rows if row["seed"] != seed]  # differences need all methods together
        settings = asking(preset(args.preset, args.task, seed), args.questions)
        run = shared.run_folder("", args.preset, args.task, seed)
        models = ((method, model_of(method, run, settings)) for method in args.methods)
        rows += rows_of_seed(settings, models, args.temperatures, (*CONTRASTS, *MORE_CONTRASTS))
        write(rows, COLUMNS, args.out)
    equal = at_equal_entropy(rows)
    pooled = over_seeds(rows + equal)
    write(rows + equal + pooled, COLUMNS, args.out)
    for columns in TABLES if args.task == "all" and pooled else ():
        print(f"\n{markdown(pooled, columns)}")


if __name__ == "__main__":
    main()
