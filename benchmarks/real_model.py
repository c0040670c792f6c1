"""Which settings suit a real model? Every choice of preset smollm2, measured on its train split; writes
results/smollm2_tuning.csv.

    python benchmarks/real_model.py --part sampling prompt
    python benchmarks/real_model.py --part sft coverage
    python benchmarks/real_model.py --part reward
    python benchmarks/real_model.py --part stages --seeds 0 1 2

sampling: the base's rationales, eight for each question, at several temperatures: how many are right, how many
questions have a right one, how many different right ones there are (in questions, and in texts).
prompt: the same at temperature 0.5, by the way of asking: plain or chat, with and without exemplars.
sft: accuracy, without exemplars, after SFT on stage 02's r+ of the run runs/smollm2-tuning (TUNED_ON), by what is
trained (adapters or all weights) and at which rate, on questions of the train split that no stage uses, of each dataset
as many; and the base's, with exemplars.
coverage: of the questions that this run's stage 01 also asked with a given answer, how many have an open rationale, and
how many an answer-conditioned one, that states the gold answer; and that supports it when it is read again, as r+ must.
reward: held-out pairs ranked right by the likelihood under the SFT model of runs/smollm2-word_problems-seed0, and by
reward models trained at several rates; of the base's pairs, and of the SFT model's.
stages: what every stage of the runs runs/smollm2-word_problems-seedSEED has left: its seconds and its memory, shares of
right rationales, what the ranking kept, held-out pairs ranked right, and PPO's first and last updates. "equations hold"
is the share of rationales that have an equation and no false one.

Nothing here asks a test question. Shares have 95 % intervals over questions. A setting's rows are written when it is
done, and the next call keeps them; delete the table to measure again.
"""

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import controls
import numpy as np
import pandas as pd
import variants
from ablations import write

from smlib.files.artifacts import require
from smlib.learning import rationales, reward_model, sft
from smlib.learning.ranking import side
from smlib.learning.rows import Pair, Rationale
from smlib.problems import equations
from smlib.reports import evaluation
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import LoraSettings, Settings, preset

COLUMNS = ("seed", "part", "setting", "metric", "value", "low", "high", "n")
TEMPERATURES, SAMPLES = (0.2, 0.3, 0.5, 0.8), 8
PARTS = ("sampling", "prompt", "sft", "coverage", "reward", "stages")
REWARD_RATES = (1e-4, 3e-4, 1e-3)
ASKED_AT = 0.5  # temperature at which ways of asking are compared
PROMPTS = {  # name -> sampling.prompt, sampling.shots
    "plain, eight exemplars": ("plain", "smlib"),
    "plain, exemplars of Wei et al.": ("plain", "wei"),
    "plain, none": ("plain", "none"),
    "chat, eight exemplars": ("chat", "smlib"),
    "chat, none": ("chat", "none"),
}
TRAININGS = {  # name -> rank of the adapters (0: all weights), learning rate
    "adapters of rank 32, 0.0003": (32, 3e-4), "adapters of rank 32, 0.001": (32, 1e-3), "all weights, 5e-05": (0, 5e-5)
}  # fmt: skip
TUNED_ON = {"questions": 1200, "samples": 8, "temperature": 0.3}  # sampling of the run that parts sft and coverage make
TUNING = Path("runs", "smollm2-tuning")


def row(part: str, setting: str, metric: str, values: list[float]) -> dict:
    """A mean over questions with its interval; of one value without."""
    ends = evaluation.mean_interval(values) if len(values) > 1 else ()
    numbers = [round(float(x), 5) for x in (np.mean(values), *ends)]
    return dict(
        zip(COLUMNS, (0, part, setting, metric, *numbers, *[""] * (3 - len(numbers)), len(values)), strict=True)
    )


def sampled(settings: Settings, part: str, name: str, number: int) -> list[dict]:
    """Rows of the base's rationales to so many questions of stage 01."""
    asked = random.Random("real model").sample(questions.training_problems(settings), number)
    with shared.load_engine(settings, settings.base) as engine:
        written = rationales.sample_open(
            engine, asked, SAMPLES, shared.sampling_params(settings, "sampling"), author="base",
            shots=settings.sampling.shots, progress=f"{part}: {name}",
        )  # fmt: skip
    texts, right = {problem.id: set() for problem in asked}, {problem.id: [] for problem in asked}
    for one in written:
        right[one.id].append(one.correct)
        texts[one.id] |= {one.text} if one.correct else set()
    return [
        row(part, name, "right", [float(np.mean(values)) for values in right.values()]),
        row(part, name, "questions with a right one", [float(bool(found)) for found in texts.values()]),
        row(part, name, "different right ones per question", [float(len(found)) for found in texts.values()]),
    ]


def tuning() -> Settings:
    """The settings of the run that parts sft and coverage look at."""
    settings = preset("smollm2", "word_problems", 0)
    return replace(settings, sampling=replace(settings.sampling, **TUNED_ON))


def tuned(name: str, number: int) -> list[dict]:
    """Rows of a model after SFT on stage 02's r+."""
    rank, rate = TRAININGS[name]
    settings = tuning()
    for stage in ("01_sampling", "02_ranking"):
        self_motivated.STAGES[stage](TUNING, settings, progress=True)
    dtype = {} if rank else {"hardware": replace(settings.hardware, dtype="float32")}
    trained = replace(settings, lora=LoraSettings(rank=rank), sft=replace(settings.sft, learning_rate=rate), **dtype)
    tokenizer, model = shared.load_tokenizer(trained), shared.load_trainable(trained, trained.base, "02_sft")
    kept = require(TUNING, "02_ranking").read_rows("ranked", Rationale)
    problems, options = shared.problems_of(require(TUNING, "01_sampling")), shared.trainer_kwargs(trained, "sft")
    sft.train_sft(model, tokenizer, problems, kept, **options, progress=name)
    folder = TUNING / "tuning" / name.replace(" ", "-").replace(",", "")
    merged = shared.merged(model, trained.base)
    for part in (merged, tokenizer):
        part.save_pretrained(folder)
    return answered(settings, "sft", name, folder, number)


def answered(settings: Settings, part: str, name: str, model: Path | str, number: int) -> list[dict]:
    """Rows of what a model answers to questions of the train split that no stage uses, of each dataset as many."""
    shots = settings.sampling.shots if model == settings.base else "none"
    answers = shared.answer_fresh(settings, model, number // len(settings.datasets), 4, shots, progress=name)
    return [
        row(part, name, "greedy", [float(one["greedy_correct"]) for one in answers]),
        row(part, name, "avg@4", [float(np.mean(one["sampled_correct"])) for one in answers]),
    ]


def covered() -> list[dict]:
    """Rows of what answer-conditioned rationales add to open ones, question by question."""
    written = require(TUNING, "01_sampling").read_rows("rationales", Rationale)
    asked = list(dict.fromkeys(one.id for one in written if one.source == "conditioned"))
    sources = {"open": ("open",), "conditioned": ("conditioned",), "open or conditioned": ("open", "conditioned")}
    rows = []
    for name, among in sources.items():
        mine = [one for one in written if one.source in among]
        stated, supported = {one.id for one in mine if one.correct}, {one.id for one in mine if side(one)[0] == "+"}
        rows.append(row("coverage", name, "states the gold answer", [float(one in stated) for one in asked]))
        rows.append(row("coverage", name, "and supports it", [float(one in supported) for one in asked]))
    return rows


def ranked_right(setting: str, pairs: Sequence[Pair]) -> list[dict]:
    """Rows of scored held-out pairs, of each author's."""
    return [
        row("reward", setting, f"pairs of {author} ranked right", [float(one.ranked_right) for one in mine])
        for author in ("base", "sft")
        if (mine := [one for one in pairs if one.author == author])
    ]


def before_training(settings: Settings, run: Path) -> list[dict]:
    """Rows of the reward before it has learned the rank."""
    self_motivated.before_policy(run, settings)
    model = shared.load_model(settings, require(run, "02_sft").path("model"))
    problems = [
        one for stage in ("01_sampling", "03_second_sampling") for one in shared.problems_of(require(run, stage))
    ]
    pairs = require(run, "03_reward_model").read_rows("held_out", Pair)
    return ranked_right(
        "untrained", reward_model.pair_accuracy(model, shared.load_tokenizer(settings), problems, pairs)
    )


def after_training(settings: Settings, run: Path, rate: float) -> list[dict]:
    """Rows of a reward model trained at this rate."""
    self_motivated.before_policy(run, settings)
    other = replace(settings, reward=replace(settings.reward, learning_rate=rate))
    folder = variants.branch(run, f"reward-{rate:g}", variants.SAMPLED) if other != settings else run
    stage = self_motivated.train_reward_model(folder, other)
    return ranked_right(f"trained, {rate:g}", stage.read_rows("held_out", Pair))


def holding(texts: list[str]) -> list[float]:
    """1.0 for a text with equations that are all true, 0.0 for one with a false one; texts without any are left out."""
    return [float(not equations.false_equations(text)) for text in texts if equations.equations(text)]


def left(run: Path, seed: int) -> list[dict]:
    """Rows of what the stages of a finished run have left."""
    rows = []

    def add(stage: str, metric: str, values: Sequence[float], **other: int) -> None:
        if len(values):
            rows.append(row("stages", stage, metric, [float(value) for value in values]) | {"seed": seed} | other)

    for name in self_motivated.STAGES:
        manifest = require(run, name).manifest
        add(name, "seconds", [manifest["wall_seconds"]])
        add(name, "MiB", [manifest["peak_mib"]])
    written = require(run, "01_sampling").read_rows("rationales", Rationale)
    gold = {problem.id: problem.answer for problem in shared.problems_of(require(run, "01_sampling"))}
    groups = {"open": [one for one in written if one.source == "open"]}
    groups["given the gold answer"] = [one for one in written if one.given == gold[one.id]]
    for name, mine in groups.items():
        add("01_sampling", f"{name}: states the gold answer", [one.correct for one in mine])
        add("01_sampling", f"{name}: and supports it", [side(one)[0] == "+" for one in mine])
        add("01_sampling", f"{name}: tokens", [len(one.token_ids) for one in mine])
        for verdict, correct in (("right", True), ("wrong", False)):
            holds = holding([one.text for one in mine if one.correct == correct])
            add("01_sampling", f"{name}: equations hold, of {verdict} ones", holds)
    for name in ("02_ranking", "03_second_sampling"):
        stage = require(run, name)
        fate = stage.read_json("fate.json")
        for what, count in fate.items():
            add(name, what, [count / sum(fate.values())], n=sum(fate.values()))
        kept = [one for one in stage.read_rows("ranked", Rationale) if one.side == "+"]
        add(name, "r+: equations hold", holding([one.text for one in kept]))
        add(name, "pairs", [stage.manifest["counts"]["pairs"]])
    pairs = require(run, "03_reward_model").read_rows("held_out", Pair)
    for author in ("base", "sft"):
        ranked = [pair.ranked_right for pair in pairs if pair.author == author]
        add("03_reward_model", f"held-out pairs of {author} ranked right", ranked)
    log = pd.read_csv(require(run, "04_ppo").path("training") / "log.csv")
    for when, some in (("first", log.head(5)), ("last", log.tail(5))):
        for column in ("accuracy", "reward", "kl", "length"):
            add("04_ppo", f"{column}, {when} five updates", some[column])
    return rows


def of_part(part: str, number: int, seeds: Sequence[int]) -> Iterator[tuple[str, object]]:
    """(setting, function that measures it) of a part."""
    base = preset("smollm2", "word_problems", 0)
    if part == "sampling":
        for temperature in TEMPERATURES:
            settings = replace(base, sampling=replace(base.sampling, temperature=temperature))
            yield (
                f"temperature {temperature}",
                lambda s=settings, t=temperature: sampled(s, part, f"temperature {t}", number),
            )
    if part == "prompt":
        for name, (prompt, shots) in PROMPTS.items():
            sampling = replace(base.sampling, prompt=prompt, shots=shots, temperature=ASKED_AT)
            settings = replace(base, sampling=sampling)
            yield name, lambda s=settings, n=name: sampled(s, part, n, number)
    if part == "coverage":
        yield "all", covered
    if part == "reward":
        run = shared.run_folder("", base.preset, "word_problems", 0)
        yield "untrained", lambda: before_training(base, run)
        for rate in REWARD_RATES:
            yield f"trained, {rate:g}", lambda r=rate: after_training(base, run, r)
    if part == "stages":
        for seed in seeds:
            run = shared.run_folder("", base.preset, "word_problems", seed)
            yield f"seed {seed}", lambda r=run, s=seed: left(r, s)
    if part == "sft":
        yield "base", lambda: answered(tuning(), part, "base", base.base, number)
        for name in TRAININGS:
            yield name, lambda n=name: tuned(n, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=["sampling"])
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs that part stages looks at")
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("smollm2_tuning.csv"))
    args = parser.parse_args()
    rows = controls.measured(args.out, {"value": float, "n": int})
    known = defaultdict(set)  # part -> the settings that are measured
    for one in rows:
        known[one["part"]].add(f"seed {one['seed']}" if one["part"] == "stages" else one["setting"])
    if known["coverage"]:
        known["coverage"].add("all")
    for part in args.part:
        for setting, measure in of_part(part, args.questions, args.seeds):
            if setting in known[part]:
                continue
            rows += measure()
            write(rows, COLUMNS, args.out)
            print(*(f"{one['metric']} {one['value']:.3f}" for one in rows[-3:]), sep=", ", flush=True)


if __name__ == "__main__":
    main()
