"""The stages of Self-Explore (2404.10346), as `smlib.runs.self_motivated` has those of Self-motivated Learning.

02_sft -> 06_solutions -> 06_selection -> 06_rft -> 06_exploration -> 06_step_dpo -> 06_evaluation
                                      \\-> 06_outcome_dpo -/
06_selection, 06_rft -> 06_pit_report, from which nothing is learned

The paper begins with fine-tuning on gold solutions. Here nobody wrote any: stage 0 is 02_sft, the base fine-tuned on
its own right rationales, and the training questions are those of 01_sampling.

    run(run_dir, settings)             # also makes stages 01 and 02 where they are missing
    print(pits.summary(run_dir))       # smlib explore does both
"""

import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from smlib.errors import UsageError
from smlib.files.artifacts import Stage, require
from smlib.learning import dpo, exploration, selection, sft
from smlib.learning.exploration import SteppedRationale
from smlib.learning.rows import Pair, Rationale
from smlib.problems.datasets import TASKS, Problem, question_key
from smlib.reports import pits
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import Settings
from smlib.sampling.engines import Engine

_FOLDERS = {"rft": "06_rft", "outcome_dpo": "06_outcome_dpo", "self_explore": "06_step_dpo"}
KS = (1, 2, 4, 8, 16)  # of the pit report
SHARD = 512  # outcome pairs explored together: what a killed run loses


def draw_solutions(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_solutions: the SFT model writes many solutions to every training question.

    Writes solutions.jsonl (`Rationale`).
    """
    asked, tuned = require(run_dir, "01_sampling"), require(run_dir, "02_sft")
    keys = _keys(settings, temperature=settings.explore.temperature, samples=settings.explore.samples)
    read = {asked: ["problems.jsonl"], tuned: ["model"]}
    stage = Stage(run_dir, "06_solutions", keys | shared.engine_key(settings), read)
    if stage.done:
        return stage
    with stage.recording(), shared.load_engine(settings, tuned.path("model")) as engine:
        solutions = selection.draw_solutions(
            shared.to_disk(stage, "solutions", engine), shared.problems_of(asked), settings.explore.samples,
            shared.sampling_params(settings, "explore"),
            progress="solutions of the SFT model" if progress else None,
        )  # fmt: skip
        stage.write_rows("solutions", solutions)
        shutil.rmtree(stage.folder / shared.SHARDS)
    return stage


def select(run_dir: Path, settings: Settings) -> Stage:
    """06_selection: what RFT learns from, and outcome pairs. Writes rft.jsonl (`Rationale`), pairs.jsonl (`Pair`)."""
    asked, drawn = require(run_dir, "01_sampling"), require(run_dir, "06_solutions")
    most, read = settings.explore.max_per_question, {asked: ["problems.jsonl"], drawn: ["solutions.jsonl"]}
    stage = Stage(run_dir, "06_selection", _keys(settings, max_per_question=most), read)
    if stage.done:
        return stage
    with stage.recording():
        solutions, tokenizer = drawn.read_rows("solutions", Rationale), shared.load_tokenizer(settings)
        rft, problems = selection.rft_set(solutions, most), shared.problems_of(asked)
        pairs = selection.outcome_pairs(tokenizer, problems, rft, solutions, most, settings.seed)
        if not pairs:
            raise UsageError(
                "no question has a right and a wrong solution, so no pair can be made: raise explore.samples or "
                "explore.temperature, or choose another base (--model)"
            )
        stage.write_rows("rft", rft)
        stage.write_rows("pairs", pairs)
    return stage


def train_rft(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_rft: the base again, not the SFT model, fine-tuned on the RFT set. Writes model/ and log.jsonl."""
    asked, selected = require(run_dir, "01_sampling"), require(run_dir, "06_selection")
    read = {asked: ["problems.jsonl"], selected: ["rft.jsonl"]}
    stage = Stage(run_dir, "06_rft", shared.stage_keys(settings, "sft"), read)
    if stage.done:
        return stage

    def train(model, tokenizer):
        problems, options = shared.problems_of(asked), shared.trainer_kwargs(settings, "sft")
        rft, label = selected.read_rows("rft", Rationale), "RFT" if progress else None
        return sft.train_sft(model, tokenizer, problems, rft, **options, progress=label)

    return shared.record_training(stage, settings, settings.base, train)


def find_pits(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_exploration: the RFT model looks for the first pit of the rejected side of every outcome pair.

    Writes explored.jsonl (per outcome pair its steps, its pit or null, and for every explored prefix the completions
    that recovered and that were drawn), pairs.jsonl (`Pair`, step-level), fate.json and cost.json (what was drawn; a
    prefix that rationales share counts once). A killed run goes on from its shards.
    """
    asked, selected = require(run_dir, "01_sampling"), require(run_dir, "06_selection")
    tuned = require(run_dir, "06_rft")
    names = ("temperature", "k", "choice")
    keys = _keys(settings, **{name: getattr(settings.explore, name) for name in names})
    read = {asked: ["problems.jsonl"], selected: ["pairs.jsonl"], tuned: ["model"]}
    stage = Stage(run_dir, "06_exploration", keys | shared.engine_key(settings), read)
    if stage.done:
        return stage
    with stage.recording(), shared.load_engine(settings, tuned.path("model")) as engine:
        problems = {problem.id: problem for problem in shared.problems_of(asked)}
        outcome, parts = selected.read_rows("pairs", Pair), []
        for start in range(0, len(outcome), SHARD):
            some = outcome[start : start + SHARD]
            explored = partial(_explore_shard, engine, problems, some, settings, progress)
            parts.append(stage.kept(f"{shared.SHARDS}/{start:07d}.json", explored))
        if outcome and not any(row["steps"] for part in parts for row in part["explored"]):
            raise UsageError(
                f"the {len(outcome):,} wrong rationales of {', '.join(settings.tasks)} have no steps, so there is no "
                "first pit to find: Self-Explore is for tasks with steps; for others, end with notebook 05 "
                "(smlib run --to 5)"
            )
        stage.write_rows("explored", [row for part in parts for row in part["explored"]])
        stage.write_rows("pairs", [row for part in parts for row in part["pairs"]])
        for name in ("fate", "cost"):
            stage.write_json(f"{name}.json", sum((Counter(part[name]) for part in parts), Counter()))
        shutil.rmtree(stage.folder / shared.SHARDS)
    return stage


def _explore_shard(
    engine: Engine, problems: dict[str, Problem], outcome: list[Pair], settings: Settings, progress: bool
) -> dict:
    """The rows of explored.jsonl, step-level pairs, their fate and what they cost, of some outcome pairs."""
    tokenizer, params = engine.tokenizer, shared.sampling_params(settings, "explore")
    rationales, label = wrong_rationales(tokenizer, problems, outcome), "exploration" if progress else None
    with engine.keep_prefixes():  # those of the next step go on from those of this one
        found = exploration.explore(engine, rationales, settings.explore.k, params, progress=label)
    solutions = [pair.chosen_ids for pair in outcome]
    pairs, fate = exploration.granular_pairs(tokenizer, rationales, found, solutions, settings.explore.choice)
    explored = []
    for one in rationales:
        recovers = exploration.outcomes(one, found)
        row = {"id": one.problem.id, "dataset": one.problem.dataset, "steps": len(one.ends)}
        counts = {"right": [sum(drawn) for drawn in recovers], "drawn": [len(drawn) for drawn in recovers]}
        explored.append(row | {"pit": exploration.first_pit(recovers)} | counts)
    samples = [attempt.sample for attempts in found.values() for attempt in attempts]
    prefixes = {one.key(step) for one in rationales for step in range(1, len(one.ends) + 1)}
    cost = {"completions": len(samples), "tokens": sum(len(sample.token_ids) for sample in samples)}
    cost |= {"completions without early exit": len(prefixes) * settings.explore.k}
    return {"explored": explored, "pairs": pairs, "fate": fate, "cost": cost}


def report_pits(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_pit_report: how often the first pit of k completions is the first wrong step (`pits.pit_report`).

    Writes report.jsonl: per dataset a row for every k of KS; an even choice of at most explore.reported of the outcome
    pairs' wrong rationales, each prefix completed twice as often as the greatest k. A dataset without any wrong step
    has none, nor has a published one, whose steps nothing can check.
    """
    asked, selected = require(run_dir, "01_sampling"), require(run_dir, "06_selection")
    tuned = require(run_dir, "06_rft")
    most = settings.explore.reported
    keys = _keys(settings, temperature=settings.explore.temperature) | {"ks": KS, "reported": most}
    read = {asked: ["problems.jsonl"], selected: ["pairs.jsonl"], tuned: ["model"]}
    stage = Stage(run_dir, "06_pit_report", keys | shared.engine_key(settings), read)
    if stage.done:
        return stage
    with stage.recording(), warnings.catch_warnings():
        warnings.simplefilter("ignore", exploration.LuckWarning)  # of more completions than the report's k
        tokenizer, shown, rows = shared.load_tokenizer(settings), {}, []
        problems = {problem.id: problem for problem in shared.problems_of(asked)}
        everything = wrong_rationales(tokenizer, problems, selected.read_rows("pairs", Pair))
        for task in (task for task in settings.tasks if task in TASKS):
            mine = [one for one in everything if one.problem.dataset == task and pits.wrong_step(tokenizer, one)]
            mine = [mine[place * len(mine) // most] for place in range(most)] if len(mine) > most else mine
            shown |= {task: mine} if mine else {}
        if shown:
            params = shared.sampling_params(settings, "explore")
            with shared.load_engine(settings, tuned.path("model")) as engine:
                for task, mine in shown.items():
                    label = f"pit report, {task}" if progress else None
                    found = exploration.explore_all(engine, mine, 2 * max(KS), params, progress=label)
                    rows += [{"dataset": task} | row for row in pits.pit_report(tokenizer, mine, found, KS)]
        stage.write_rows("report", rows)
    return stage


def wrong_rationales(tokenizer, problems: dict[str, Problem], outcome: Sequence[Pair]) -> list[SteppedRationale]:
    """The rejected sides of outcome pairs, cut into steps; problems: by id."""
    return [exploration.split(tokenizer, problems[pair.id], pair.prompt_ids, pair.rejected_ids) for pair in outcome]


def train_step_dpo(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_step_dpo: the RFT model after DPO on the step-level pairs, which is Self-Explore. Writes model/, log.jsonl."""
    paired, rate = require(run_dir, "06_exploration"), settings.dpo.step_learning_rate
    return _train_dpo(run_dir, settings, "06_step_dpo", paired, rate, "step DPO" * progress)


def train_outcome_dpo(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_outcome_dpo: the RFT model after DPO on the outcome pairs, the baseline. Writes model/ and log.jsonl."""
    paired, rate = require(run_dir, "06_selection"), settings.dpo.learning_rate
    return _train_dpo(run_dir, settings, "06_outcome_dpo", paired, rate, "outcome DPO" * progress)


def _train_dpo(run_dir: Path, settings: Settings, name: str, paired: Stage, rate: float, label: str) -> Stage:
    tuned = require(run_dir, "06_rft")
    stage = Stage(run_dir, name, shared.stage_keys(settings, "dpo"), {tuned: ["model"], paired: ["pairs.jsonl"]})
    if stage.done:
        return stage

    def train(model, tokenizer):
        options = shared.trainer_kwargs(settings, "dpo") | {"learning_rate": rate}
        return dpo.train_dpo(model, tokenizer, paired.read_rows("pairs", Pair), **options, progress=label or None)

    return shared.record_training(stage, settings, tuned.path("model"), train)


def evaluate(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """06_evaluation: the three trained models on the questions of 05_evaluation, asked and judged as there.

    Writes problems.jsonl and answers.jsonl (`Answers`), whose rows stand beside those of base, SFT and SML in
    05_evaluation/answers.jsonl. Raises ValueError if a test question was trained on.
    """
    trained = {method: require(run_dir, folder) for method, folder in _FOLDERS.items()}
    published, _ = questions.published_problems(settings)
    sets = questions.test_problems(settings) | published
    refuse_training_questions(sets, shared.problems_of(require(run_dir, "01_sampling")))
    inputs = {source: ["model"] for source in trained.values()}
    stage = Stage(run_dir, "06_evaluation", shared.evaluation_keys(settings, published), inputs)
    if stage.done:
        return stage
    with stage.recording():
        paths = {method: source.path("model") for method, source in trained.items()}
        answers = shared.evaluate(settings, paths, sets, progress)
        stage.write_rows("problems", (problem for problems in sets.values() for problem in problems))
        stage.write_rows("answers", answers)
    return stage


def refuse_training_questions(sets: dict[str, list[Problem]], trained: list[Problem]) -> None:
    """Raise ValueError for the first test set with a question of `trained` (`question_key`), whatever their ids."""
    asked = {question_key(problem.question) for problem in trained}
    for name, problems in sets.items():
        if both := [problem.id for problem in problems if question_key(problem.question) in asked]:
            raise UsageError(
                f"{len(both)} questions of test set {name} were trained on, such as {both[0]}: evaluate on another "
                "test set, or train on other questions in another run folder"
            )


def run(run_dir: Path, settings: Settings, progress: bool = True) -> None:
    """All stages in order, from 01_sampling on; those that are there are read."""
    for stage in (BEFORE | STAGES).values():
        stage(run_dir, settings, progress=progress)


BEFORE = {name: self_motivated.STAGES[name] for name in ("01_sampling", "02_ranking", "02_sft")}
STAGES = {
    "06_solutions": draw_solutions,
    "06_selection": lambda run_dir, settings, progress: select(run_dir, settings),
    "06_rft": train_rft,
    "06_exploration": find_pits,
    "06_pit_report": report_pits,
    "06_step_dpo": train_step_dpo,
    "06_outcome_dpo": train_outcome_dpo,
    "06_evaluation": evaluate,
}


def _keys(settings: Settings, **explored) -> dict:
    """What the drawing and pairing stages depend on: of the settings those that they use."""
    lengths = {"max_new_tokens": settings.sampling.max_new_tokens}
    return shared.stage_keys(settings) | {"sampling": lengths, "explore": explored}
