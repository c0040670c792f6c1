"""Which reward model ranks the SFT model's own samples? Writes results/reward_models.csv.

    python benchmarks/reward_models.py --seeds 0 1 2 3 4
    python benchmarks/reward_models.py --seeds 0 1 --pairs 2000 5000 20000

For every seed the SFT model of the run runs/PRESET-all-seedSEED answers fresh questions of the train split, eight times
each. It judges the SFT model's own likelihood (the reward before training, which a reward model has to beat) and the
run's reward model. With --pairs it also trains two reward models from the SFT model for each of these numbers, on that
many pairs of other samples of the SFT model: a likelihood, as in stage 03, and a scalar head on the last token, as in
the paper and most of the field, with TRL's own RewardTrainer. Both take one pass; the head's SCALAR_RATE is the best of
four rates on the fresh questions of seed 10 after 5,000 pairs, and the likelihood keeps the rate of stage 03.

Metrics, in shares with intervals over questions: "pairs ranked right", of pairs of a question's distinct right and
wrong answers; "sound above lucky", of pairs of right answers, one with all steps right and one with a wrong step (by
the step checker; no training uses it); "best of 8". A row "A minus B" has the paired differences. Seed "all" has means
over the seeds with their t intervals. A seed's rows are written when they are complete, and the next call keeps them;
delete the table to measure again.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

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
from smlib.problems.datasets import Problem
from smlib.problems.prompts import split_answer
from smlib.reports import evaluation
from smlib.reports.evaluation import Answers
from smlib.reports.results import ALL
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings, preset
from smlib.sampling import models

COLUMNS = ("seed", "reward", "pairs", "task", "metric", "value", "low", "high", "n")
KINDS = {"seed": int, "pairs": int, "value": float, "low": float, "high": float, "n": int}
UNTRAINED, OWN = "untrained", "reward model"
RANKED, SOUND, BEST = "pairs ranked right", "sound above lucky", "best of 8"
SAMPLES, SCALAR_RATE, PER_QUESTION = 8, 5e-4, 1.5  # PER_QUESTION: pairs that a question gives at least, on the mean
Score = Callable[[Sequence[Problem], Sequence[Sequence[int]]], list[float]]


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
        sound = [place for place in right if steps.is_sound(problem, split_answer(texts[place])[0])]
        lucky = [place for place in right if place not in sound]
        values = {RANKED: wins(scores, right, wrong), SOUND: wins(scores, sound, lucky)}
        values[BEST] = evaluation.best_of_n(scores, correct)
        for metric, value in values.items():
            if value is not None:
                found[metric][answer["id"]] = value
    return dict(found)


def rows_of(seed: int, judgements: dict[tuple[str, int], dict[str, dict[str, float]]], tasks: dict[str, str]):
    """Rows of every (reward, number of pairs), and of what each has above the untrained reward; tasks: by question."""
    before = judgements[UNTRAINED, 0]
    shown = dict(judgements)
    for (reward, pairs), found in judgements.items():
        if reward != UNTRAINED:
            gain = {metric: {name: value - before[metric][name] for name, value in values.items()}
                    for metric, values in found.items()}  # fmt: skip
            shown[f"{reward} minus {UNTRAINED}", pairs] = gain
    rows = []
    for (reward, pairs), found in shown.items():
        for metric, values in found.items():
            for task in (*dict.fromkeys(tasks.values()), ALL):
                kept = [value for name, value in values.items() if task in (tasks[name], ALL)]
                if len(kept) > 1:
                    numbers = [round(float(x), 5) for x in (np.mean(kept), *evaluation.mean_interval(kept))]
                    cells = (seed, reward, pairs, task, metric, *numbers, len(kept))
                    rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def own_pairs(settings: Settings, most: int, folder: Path) -> tuple[list[Problem], list[Pair]]:
    """(questions, at least `most` pairs) of the SFT model's samples on questions that come after those of stage 01."""
    each = int(most / PER_QUESTION / len(settings.tasks))
    problems = questions.second_problems(preset(settings.preset, "all", settings.seed, reward={"questions": each}))
    with shared.load_engine(settings, folder) as engine:
        params = shared.sampling_params(settings, "sampling")
        written = rationales.sample_open(engine, problems, SAMPLES, params, author="sft", progress="pairs")
        written = rationales.reanswer(engine, problems, written, seed=settings.seed)
    ranked, _ = ranking.rank(written, settings.ranking.max_per_side)
    made = ranking.pairs(ranked, settings.ranking.max_pairs_per_question, settings.seed)
    made = [pair for pair in made if not pair.held_out]
    if len(made) < most:
        raise SystemExit(f"{len(problems)} questions gave {len(made)} pairs, fewer than {most}: lower PER_QUESTION")
    order = np.random.default_rng(settings.seed).permutation(len(made))
    return problems, [made[place] for place in order]


def likelihood(settings: Settings, folder: Path, problems: list[Problem], pairs: list[Pair]) -> Score:
    """A reward model of stage 03, trained on these pairs in one pass."""
    model, tokenizer = models.load_policy(folder), shared.load_tokenizer(settings)
    options = shared.trainer_kwargs(settings, "reward") | {"epochs": 1.0}
    reward_model.train_reward_model(model, tokenizer, problems, pairs, **options, progress="likelihood")
    return lambda asked, ids: reward_model.score(model, tokenizer, asked, ids)


def scalar_head(
    settings: Settings, folder: Path, problems: list[Problem], pairs: list[Pair], rate: float = SCALAR_RATE
) -> Score:
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
        options = trainer_options(model, 1.0, rate, settings.reward.batch, settings.seed, out)
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


def markdown(rows: Sequence[dict]) -> str:
    """The table of docs/results.md: what training adds, by task, from the rows over seeds."""
    found = {(row["metric"], row["task"], row["reward"]): row for row in rows
             if row["seed"] == "all" and int(row["pairs"]) == 0}  # fmt: skip
    names = {UNTRAINED: "untrained", OWN: "trained", f"{OWN} minus {UNTRAINED}": "difference"}
    heads = [f"{metric}: untrained | trained | difference" for metric in (RANKED, BEST)]
    lines = [f"| % | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for task in dict.fromkeys(task for _, task, _ in found):
        cells = []
        for metric, (reward, name) in product((RANKED, BEST), names.items()):
            value, low, high = (100 * float(found[metric, task, reward][part]) for part in ("value", "low", "high"))
            cells.append(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if name == "difference" else f"{value:.1f}")
        lines.append(f"| {' | '.join([task.replace('_', ' '), *cells])} |")
    return "\n".join(lines)


def by_pairs(rows: Sequence[dict]) -> str:
    """The second table of docs/results.md: likelihood and scalar head after as many pairs, means over seeds."""
    found = {(row["reward"], int(row["pairs"]), row["metric"]): 100 * float(row["value"]) for row in rows
             if row["seed"] == "all" and row["task"] == ALL}  # fmt: skip
    names = ("likelihood", "scalar head")
    lines = [f"| %, all questions | {' | '.join(f'{metric}: {names[0]} | {names[1]}' for metric in (RANKED, BEST))} |"]
    lines.append("|---" * (1 + 2 * len(names)) + "|")
    for pairs in sorted({pairs for name, pairs, _ in found if name in names}):
        cells = [f"{found[name, pairs, metric]:.1f}" for metric in (RANKED, BEST) for name in names]
        lines.append(f"| {' | '.join([f'{pairs:,} pairs', *cells])} |")
    return "\n".join(lines)


def measure(seed: int, args: argparse.Namespace) -> list[dict]:
    """All rows of a seed."""
    settings, run = preset(args.preset, "all", seed), shared.run_folder("", args.preset, "all", seed)
    self_motivated.before_policy(run, settings)
    tuned, tokenizer = require(run, "02_sft").path("model"), shared.load_tokenizer(settings)
    problems, pairs = own_pairs(settings, max(args.pairs), tuned) if args.pairs else ([], [])
    used = {problem.id for problem in problems}
    fresh = {problem.id: problem for problem in questions.fresh_problems(settings, args.questions)}
    answers = shared.answer_fresh(settings, tuned, args.questions, SAMPLES, progress=f"seed {seed}")
    answers = [answer for answer in answers if answer["id"] not in used]
    rewards = {(UNTRAINED, 0): lambda: _of_stage(tuned, tokenizer)}
    rewards[OWN, 0] = lambda: _of_stage(require(run, "03_reward_model").path("model"), tokenizer)
    for n in args.pairs:
        rewards["likelihood", n] = lambda n=n: likelihood(settings, tuned, problems, pairs[:n])
        rewards["scalar head", n] = lambda n=n: scalar_head(settings, tuned, problems, pairs[:n])
    judgements = {}
    for name, make in rewards.items():
        judgements[name] = judged(make(), fresh, answers)
        shown = {metric: round(100 * float(np.mean(list(v.values()))), 1) for metric, v in judgements[name].items()}
        print(f"seed {seed}, {name[0]}, {name[1]} pairs: {shown}", flush=True)
    return rows_of(seed, judgements, {answer["id"]: fresh[answer["id"]].dataset for answer in answers})


def _of_stage(folder: Path, tokenizer) -> Score:
    model = models.load_policy(folder)
    return lambda asked, ids: reward_model.score(model, tokenizer, asked, ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, nargs="*", default=[], help="numbers of pairs to train on (default: none)")
    parser.add_argument("--questions", type=int, default=200, help="questions per task (default 200)")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("reward_models.csv"))
    args = parser.parse_args()
    rows = controls.measured(args.out, KINDS)
    for seed in args.seeds:
        wanted = {0, *args.pairs}
        if wanted <= {row["pairs"] for row in rows if row["seed"] == seed}:
            continue
        rows = [row for row in rows if row["seed"] != seed or row["pairs"] not in wanted] + measure(seed, args)
        write(rows + controls.over_seeds(rows, COLUMNS), COLUMNS, args.out)
    if len({row["seed"] for row in rows}) > 1:
        pooled = controls.over_seeds(rows, COLUMNS)
        print(markdown(pooled), by_pairs(pooled), sep="\n\n")


if __name__ == "__main__":
    main()
