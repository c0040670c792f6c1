"""Which reward model ranks a model's own samples? Writes results/reward_models.csv.

    python benchmarks/reward_models.py --seeds 0 1 2 3 4 --writers SFT base SML
    python benchmarks/reward_models.py --seeds 0 1 2 3 4 --writers "held-out pairs"
    python benchmarks/reward_models.py --seeds 0 1 2 --pairs 2000 5000 20000
    python benchmarks/reward_models.py --seeds 0 1 2 --pairs 5000 --writers SFT SML \\
        --kinds likelihood margin "three of them" "half of SML's pairs"

For every seed the models of the run runs/PRESET-all-seedSEED, the writers, answer fresh questions of the train split,
eight times each. All writers are judged by the SFT model's own likelihood (the reward before training, which a reward
model has to beat) and by the run's reward model. With --pairs, reward models of these kinds are trained from the SFT
model for each of these numbers, on that many pairs of other samples of the SFT model, in one pass:

likelihood            as in stage 03, with its learning rate
scalar head           on the last token, as in the paper and most of the field, with TRL's own RewardTrainer; all
                      weights learn, at a rate of SCALAR_RATES, that of tiny the best of four on the fresh questions of
                      seed 10 after 5,000 pairs
margin                a likelihood whose loss asks a pair's rewards to be MARGIN apart: -log sigmoid(R+ - R- - MARGIN)
three of them         the mean of three likelihoods that read the pairs in another order each
half of SML's pairs   a likelihood, half of whose pairs are samples of the policy that PPO trained

Metrics, in shares with intervals over questions: "pairs ranked right", of pairs of a question's distinct right and
wrong answers; "sound above lucky", of pairs of right answers, one with all steps right and one with a wrong step (by
the step checker; no training uses it); "best of 8". The writer "held-out pairs" stands for the pairs of the SFT model's
samples that stage 03 held out from the reward model's training, which are fewer, and not all of a question. A row
"A minus B" has the paired differences. Seed "all" has means over the seeds with their t intervals. A seed's rows are
written when they are complete, and the next call keeps them; delete the table to measure again.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest import mock

import controls
import numpy as np
import torch
import variants
from ablations import write
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from smlib.draws import own_draws
from smlib.files.artifacts import require
from smlib.learning import ranking, rationales, reward_model
from smlib.learning.rows import Pair
from smlib.learning.trainers import dataset, fit, trainer_options
from smlib.problems import steps
from smlib.problems.datasets import TASKS, Problem
from smlib.problems.prompts import split_answer
from smlib.reports import evaluation
from smlib.reports.evaluation import Answers
from smlib.reports.results import ALL
from smlib.reports.wording import with_interval
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings, preset
from smlib.sampling import models

COLUMNS = ("seed", "reward", "pairs", "writer", "task", "metric", "value", "low", "high", "n")
KINDS = {"seed": int, "pairs": int, "value": float, "low": float, "high": float, "n": int}
UNTRAINED, OWN = "untrained", "reward model"
RANKED, SOUND, BEST = "pairs ranked right", "sound above lucky", "best of 8"
SAMPLES, MARGIN, ORDERS = 8, 1.0, 3
SCALAR_RATES = {"tiny": 5e-4, "smoke": 5e-4, "smollm2": 2e-5}
HELD_OUT = "held-out pairs"
WRITERS = ("SFT", "base", "SML", HELD_OUT)
PER_QUESTION = {"SFT": 1.5, "SML": 0.35}  # pairs of a writer that a question gives at least, on the mean
Score = Callable[[Sequence[Problem], Sequence[Sequence[int]]], list[float]]
Judgements = dict[tuple[str, int, str], dict[str, dict[str, float]]]  # (reward, pairs, writer) -> metric -> by question


def wins(scores: Sequence[float], above: Sequence[int], below: Sequence[int]) -> float | None:
    """The share of pairs (one of `above`, one of `below`) in which the first has the higher score; None without any."""
    pairs = list(product(above, below))
    return sum(scores[a] > scores[b] for a, b in pairs) / len(pairs) if pairs else None


def judged(score: Score, problems: dict[str, Problem], answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """Metric -> question id -> value."""
    ids = [tokens for answer in answers for tokens in answer["sampled_ids"]]
    asked = [problems[answer["id"]] for answer in answers for _ in answer["sampled_ids"]]
    flat, found = iter(score(asked, ids)), defaultdict(dict)
    for answer in answers:
        scores = [next(flat) for _ in answer["sampled_ids"]]
        texts, correct = answer["sampled_texts"], answer["sampled_correct"]
        distinct = {text: place for place, text in enumerate(texts)}
        right = [place for place in distinct.values() if correct[place]]
        wrong = [place for place in distinct.values() if not correct[place]]
        problem = problems[answer["id"]]
        values = {RANKED: wins(scores, right, wrong)}
        if steps.knows(problem.dataset):
            sound = [place for place in right if steps.is_sound(problem, split_answer(texts[place])[0])]
            values[SOUND] = wins(scores, sound, [place for place in right if place not in sound])
        values[BEST] = evaluation.best_of_n(scores, correct)
        for metric, value in values.items():
            if value is not None:
                found[metric][answer["id"]] = value
    return dict(found)


def judged_pairs(score: Score, problems: dict[str, Problem], pairs: Sequence[Pair]) -> dict[str, dict[str, float]]:
    """The same of pairs: question id -> the share of its pairs that are ranked right."""
    asked = [problems[pair.id] for pair in pairs]
    sides = [pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]
    won = defaultdict(list)
    for pair, good, bad in zip(pairs, *(score(asked, side) for side in sides), strict=True):
        won[pair.id].append(good > bad)
    return {RANKED: {name: float(np.mean(values)) for name, values in won.items()}}


def contrasts(judgements: Judgements) -> Iterator[tuple[tuple[str, int, str], tuple[str, int, str]]]:
    """What is compared with what: all with the untrained reward, other kinds with a likelihood of as many pairs."""
    for reward, pairs, writer in judgements:
        others = [(UNTRAINED, 0, writer)] if reward != UNTRAINED else []
        others += [("likelihood", pairs, writer)] if pairs and reward != "likelihood" else []
        yield from (((reward, pairs, writer), other) for other in others if other in judgements)


def rows_of(seed: int, judgements: Judgements, tasks: dict[str, str]) -> list[dict]:
    """Rows of every (reward, number of pairs, writer), and of the differences; tasks: by question."""
    shown = dict(judgements)
    for (reward, pairs, writer), other in contrasts(judgements):
        found, before = judgements[reward, pairs, writer], judgements[other]
        gain = {
            metric: {name: value - before[metric][name] for name, value in values.items() if name in before[metric]}
            for metric, values in found.items()
        }
        shown[f"{reward} minus {other[0]}", pairs, writer] = gain
    rows = []
    for key, found in shown.items():
        for metric, values in found.items():
            for task in (*dict.fromkeys(tasks.values()), ALL):
                kept = [value for name, value in values.items() if task in (tasks[name], ALL)]
                if len(kept) > 1:
                    numbers = [round(float(x), 5) for x in (np.mean(kept), *evaluation.mean_interval(kept))]
                    rows.append(dict(zip(COLUMNS, (seed, *key, task, metric, *numbers, len(kept)), strict=True)))
    return rows


def own_pairs(settings: Settings, writer: str, run: Path, most: int, each: int = 0) -> tuple[list[Problem], list[Pair]]:
    """(questions, at least `most` pairs) of a writer's samples on questions that come after those of stage 01.

    each: questions per task, by default as many as PER_QUESTION says; half as many again where these are too few.
    """
    each = each or int(most / PER_QUESTION[writer] / len(settings.tasks))
    problems = questions.second_problems(replace(settings, reward=replace(settings.reward, questions=each)))
    with shared.load_engine(settings, controls.model_of(writer, run, settings)) as engine:
        params = shared.sampling_params(settings, "reward")
        written = rationales.sample_open(engine, problems, SAMPLES, params, author="sft", progress=f"{writer}'s pairs")
        written = rationales.reanswer(engine, problems, written, seed=settings.seed)
    ranked, _ = ranking.rank(written, settings.ranking.max_per_side)
    made = ranking.pairs(ranked, settings.ranking.max_pairs_per_question, settings.seed)
    made = [pair for pair in made if not pair.held_out]
    told = f"{len(problems):,} questions of {writer} gave {len(made):,} pairs, not {most:,}"
    if 2 * len(made) < most:
        raise SystemExit(f"{told}: it is rarely wrong; give fewer --pairs")
    if len(made) < most:
        print(f"{told}: asking more", flush=True)
        return own_pairs(settings, writer, run, most, each * 3 // 2)
    place = {problem.id: number % each for number, problem in enumerate(problems)}  # within its task
    return problems, sorted(
        made, key=lambda pair: place[pair.id]
    )  # the first n are of the same questions, for any `most`


def likelihood(
    settings: Settings, folder: Path, problems: list[Problem], pairs: list[Pair], order: int = 0, margin: float = 0.0
) -> Score:
    """A reward model of stage 03, trained on these pairs in one pass."""
    model, tokenizer = shared.load_trainable(settings, folder, "03_reward_model"), shared.load_tokenizer(settings)
    options = shared.trainer_kwargs(settings, "reward") | {"epochs": 1.0, "seed": settings.seed + 1_000 * order}
    plain = reward_model.pair_loss
    with mock.patch.object(reward_model, "pair_loss", lambda chosen, rejected: plain(chosen - margin, rejected)):
        reward_model.train_reward_model(model, tokenizer, problems, pairs, **options, progress="likelihood")
    return lambda asked, ids: reward_model.score(model, tokenizer, asked, ids)


def three_of_them(settings: Settings, folder: Path, problems: list[Problem], pairs: list[Pair]) -> Score:
    scores = [likelihood(settings, folder, problems, pairs, order) for order in range(ORDERS)]
    return lambda asked, ids: np.mean([score(asked, ids) for score in scores], axis=0).tolist()


def scalar_head(settings: Settings, folder: Path, problems: list[Problem], pairs: list[Pair]) -> Score:
    """A head on the last token of the SFT model's trunk, trained on these pairs in one pass."""
    tokenizer, by_id = shared.load_tokenizer(settings), {problem.id: problem for problem in problems}
    rows = [
        {f"{side}_ids": reward_model.encode(tokenizer, by_id[pair.id], getattr(pair, f"{side}_ids"))
         for side in ("chosen", "rejected")} for pair in pairs
    ]  # fmt: skip
    rows = [row | {"length": sum(map(len, row.values()))} for row in rows]
    with tempfile.TemporaryDirectory() as out, own_draws(settings.seed):
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        options = trainer_options(model, 1.0, SCALAR_RATES[settings.preset], settings.reward.batch, settings.seed, out)
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**options, max_length=None, remove_unused_columns=False),
            train_dataset=dataset(rows, {}),
            processing_class=tokenizer,
        )
        fit(trainer, "scalar head")
    model.eval()

    @torch.inference_mode()
    def score(asked, ids):
        texts = [reward_model.encode(tokenizer, problem, tokens) for problem, tokens in zip(asked, ids, strict=True)]
        order, found = sorted(range(len(texts)), key=lambda place: len(texts[place])), [0.0] * len(texts)
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            padded = tokenizer.pad({"input_ids": [texts[place] for place in places]}, return_tensors="pt")
            for place, value in zip(places, model(**padded).logits[:, 0].tolist(), strict=True):
                found[place] = value
        return found

    return score


def _before_and_after(rows: Sequence[dict], places: dict[str, tuple[str, str]]) -> str:
    """A table of what training adds, from the rows over seeds; places: label of a line -> its task and writer."""
    found = {(row["metric"], row["task"], row["writer"], row["reward"]): row for row in rows
             if row["seed"] == "all" and int(row["pairs"]) == 0}  # fmt: skip
    names = {UNTRAINED: "untrained", OWN: "trained", f"{OWN} minus {UNTRAINED}": "difference"}
    heads = [f"{metric}: untrained | trained | difference" for metric in (RANKED, BEST)]
    lines = [f"| % | {' | '.join(heads)} |", "|---" * (1 + 2 * len(names)) + "|"]
    for label, place in places.items():
        cells = []
        for metric, (reward, name) in product((RANKED, BEST), names.items()):
            numbers = [100 * float(found[metric, *place, reward][part]) for part in ("value", "low", "high")]
            cells.append(with_interval(*numbers, signed=True) if name == "difference" else f"{numbers[0]:.1f}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(rows: Sequence[dict]) -> str:
    """The first table of docs/results.md: what training adds on the SFT model's samples, by task."""
    return _before_and_after(rows, {task.replace("_", " "): (task, "SFT") for task in (*TASKS, ALL)})


def by_writer(rows: Sequence[dict]) -> str:
    """The second: on whose samples."""
    return _before_and_after(rows, {f"samples of {writer}": (ALL, writer) for writer in ("base", "SFT", "SML")})


def of_held_out(rows: Sequence[dict]) -> str:
    """Held-out pairs over seeds: "80.1 % right before training and 83.3 % after: +3.2 [+1.0, +5.4] points"."""
    names = UNTRAINED, OWN, f"{OWN} minus {UNTRAINED}"
    found = {row["reward"]: row for row in rows if (row["seed"], row["writer"], row["task"]) == ("all", HELD_OUT, ALL)}
    before, after, more = ([100 * float(found[name][x]) for x in ("value", "low", "high")] for name in names)
    told = f"{before[0]:.1f} % right before training and {after[0]:.1f} % after"
    return f"{told}: {with_interval(*more, signed=True)} points"


def of_kinds(rows: Sequence[dict], seed: int = 0, pairs: int = 5_000) -> str:
    """The fourth: other kinds of reward model beside a likelihood, of one seed, with intervals over questions."""
    found = {(row["reward"], row["writer"], row["metric"]): row for row in rows
             if (row["seed"], row["pairs"], row["task"]) == (str(seed), str(pairs), ALL)}  # fmt: skip
    places = list(product(("SFT", "SML"), (RANKED, BEST)))
    lines = [f"| % | {' | '.join(f'{metric}, samples of {writer}' for writer, metric in places)} |", "|---" * 5 + "|"]
    for kind in KINDS_OF_REWARD:
        if kind == "scalar head":
            continue
        cells = []
        for place in places:
            value = f"{100 * float(found[kind, *place]['value']):.1f}"
            if more := found.get((f"{kind} minus likelihood", *place)):
                value += f" ({with_interval(*(100 * float(more[x]) for x in ('value', 'low', 'high')), signed=True)})"
            cells.append(value)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_pairs(rows: Sequence[dict]) -> str:
    """The third: likelihood and scalar head after as many pairs, means over seeds, and in brackets every seed."""
    found = {(row["reward"], int(row["pairs"]), row["metric"], row["seed"]): 100 * float(row["value"]) for row in rows
             if row["task"] == ALL and row["writer"] == "SFT"}  # fmt: skip
    names, metrics = ("likelihood", "scalar head"), (RANKED, SOUND, BEST)
    lines = [f"| %, all questions | {' | '.join(f'{metric}: {names[0]} | {names[1]}' for metric in metrics)} |"]
    lines.append("|---" * (1 + len(metrics) * len(names)) + "|")
    for pairs in sorted({pairs for name, pairs, *_ in found if name in names}):
        cells = []
        for place in ((name, pairs, metric) for metric in metrics for name in names):
            seeds = sorted(seed for *one, seed in found if tuple(one) == place and seed != "all")
            each = ", ".join(f"{found[*place, seed]:.1f}" for seed in seeds)
            cells.append(f"{found[*place, 'all']:.1f} ({each})")
        lines.append(f"| {' | '.join([f'{pairs:,} pairs', *cells])} |")
    return "\n".join(lines)


KINDS_OF_REWARD = {
    "likelihood": likelihood,
    "scalar head": scalar_head,
    "margin": lambda *made: likelihood(*made, margin=MARGIN),
    "three of them": three_of_them,
    "half of SML's pairs": likelihood,
}


def answers_of(writer: str, run: Path, settings: Settings, fresh: list[Problem]) -> list[Answers]:
    with shared.load_engine(settings, controls.model_of(writer, run, settings)) as engine:
        how, shots = shared.sampling_params(settings, "evaluation"), settings.sampling.shots
        shots = shots if writer == "base" else "none"
        return evaluation.evaluate(engine, fresh, SAMPLES, how, shots=shots, progress=f"{writer}, seed {settings.seed}")


def rewards(
    settings: Settings, run: Path, kinds: Sequence[str], numbers: Sequence[int]
) -> Iterator[tuple[str, int, Score, set[str]]]:
    """(reward, number of pairs, its score, ids of the questions that it was trained on): the untrained one, the run's
    own, and one of every kind for every number of pairs."""
    self_motivated.before_policy(run, settings)
    tuned, tokenizer = controls.model_of("SFT", run, settings), shared.load_tokenizer(settings)
    for reward, folder in ((UNTRAINED, tuned), (OWN, require(run, "03_reward_model").path("model"))):
        model = models.load_policy(folder)
        yield reward, 0, lambda asked, ids, model=model: reward_model.score(model, tokenizer, asked, ids), set()
    sources = ("SFT", "SML") if "half of SML's pairs" in kinds else ("SFT",)
    drawn = {writer: own_pairs(settings, writer, run, max(numbers)) for writer in sources if numbers}
    for n, kind in product(numbers, kinds):
        problems, pairs = drawn["SFT"]
        if kind == "half of SML's pairs":
            more, others = drawn["SML"]
            problems = list({problem.id: problem for problem in problems + more}.values())
            pairs = pairs[: n // 2] + others[: n - n // 2]
        yield kind, n, KINDS_OF_REWARD[kind](settings, tuned, problems, pairs[:n]), {pair.id for pair in pairs}


def measure(
    settings: Settings, run: Path, number: int, writers: Sequence[str], kinds: Sequence[str], numbers: Sequence[int]
) -> list[dict]:
    """All rows of a seed; number: of questions per task."""
    fresh = {problem.id: problem for problem in questions.fresh_problems(settings, number)}
    second = {problem.id: problem for problem in questions.second_problems(settings)}
    answers = {one: answers_of(one, run, settings, [*fresh.values()]) for one in writers if one != HELD_OUT}
    judgements = {}
    for reward, pairs, score, used in rewards(settings, run, kinds, numbers):
        for writer in (one for one in writers if one != HELD_OUT or reward in (UNTRAINED, OWN)):
            if writer == HELD_OUT:
                kept = require(run, "03_reward_model").read_rows("held_out", Pair)
                found = judged_pairs(score, second, [pair for pair in kept if pair.author == "sft"])
            else:
                unseen = [answer for answer in answers[writer] if answer["id"] not in used]
                found = judged(score, fresh, unseen)
            judgements[reward, pairs, writer] = found
            shown = {metric: round(100 * float(np.mean(list(v.values()))), 1) for metric, v in found.items()}
            print(f"seed {settings.seed}, {writer}'s samples by {reward}, {pairs} pairs: {shown}", flush=True)
    return rows_of(settings.seed, judgements, {name: one.dataset for name, one in (fresh | second).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, nargs="*", default=[], help="numbers of pairs to train on (default: none)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS_OF_REWARD, default=["likelihood", "scalar head"])
    parser.add_argument("--writers", nargs="+", choices=WRITERS, default=["SFT"], help="whose samples (default: SFT's)")
    parser.add_argument("--questions", type=int, default=200, help="questions per task (default 200)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("reward_models.csv"))
    args = parser.parse_args()
    rows, key = controls.measured(args.out, KINDS), lambda row: tuple(row[name] for name in COLUMNS[:4])
    asked = [*product((UNTRAINED, OWN), [0], args.writers), *product(args.kinds, args.pairs, args.writers)]
    for seed in args.seeds:
        known = {key(row) for row in rows}
        if {(seed, *one) for one in asked} <= known:
            continue
        settings = preset(args.preset, args.task, seed)
        run = shared.run_folder("", args.preset, args.task, seed)
        found = measure(settings, run, args.questions, args.writers, args.kinds, args.pairs)
        rows += [row for row in found if key(row) not in known]
        write(rows + controls.over_seeds(rows, COLUMNS), COLUMNS, args.out)
    if args.task == "all" and len({row["seed"] for row in rows}) > 1:
        pooled = controls.over_seeds(rows, COLUMNS)
        print(markdown(pooled), by_pairs(rows + pooled), sep="\n\n")


if __name__ == "__main__":
    main()
