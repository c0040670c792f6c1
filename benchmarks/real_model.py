"""Which settings suit a real model? Every choice of preset smollm2, measured on its train split; writes
results/smollm2_tuning.csv.

    python benchmarks/real_model.py --part sampling prompt
    python benchmarks/real_model.py --part sft coverage

sampling: the base's rationales, eight for each question, at several temperatures: how many are right, how many
questions have a right one, how many different right ones there are (in questions, and in texts).
prompt: the same at temperature 0.5, by the way of asking: plain or chat, with and without exemplars.
sft: greedy accuracy, without exemplars, after SFT on stage 02's r+ of the run runs/smollm2-word_problems-seed0, by what
is trained (adapters or all weights) and at which rate, on questions of the train split that no stage uses.
coverage: of the questions that this run's stage 01 also asked with a given answer, how many have an open rationale, and
how many an answer-conditioned one, that states the gold answer; and that supports it when it is read again, as r+ must.

Nothing here asks a test question. Shares have 95 % intervals over questions. A setting's rows are written when it is
done, and the next call keeps them; delete the table to measure again.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import controls
import numpy as np
import variants
from ablations import write

from smlib.files.artifacts import require
from smlib.learning import rationales, sft
from smlib.learning.ranking import side
from smlib.learning.rows import Rationale
from smlib.reports import evaluation
from smlib.runs import questions, self_motivated, shared
from smlib.runs.settings import LoraSettings, Settings, preset

COLUMNS = ("seed", "part", "setting", "metric", "value", "low", "high", "n")
TEMPERATURES, SAMPLES = (0.2, 0.3, 0.5, 0.8), 8
ASKED_AT = 0.5  # temperature at which ways of asking are compared
PROMPTS = {  # name -> sampling.prompt, sampling.shots
    "plain, eight exemplars": ("plain", "smlib"),
    "plain, exemplars of Wei et al.": ("plain", "wei"),
    "plain, none": ("plain", "none"),
    "chat, eight exemplars": ("chat", "smlib"),
    "chat, none": ("chat", "none"),
}
TRAININGS = {  # name -> rank of the adapters (0: all weights), learning rate
    **{f"adapters of rank 32, {rate:g}": (32, rate) for rate in (1e-4, 3e-4, 1e-3)},
    **{f"all weights, {rate:g}": (0, rate) for rate in (2e-5, 5e-5)},
}


def row(part: str, setting: str, metric: str, values: list[float]) -> dict:
    """A mean over questions with its interval."""
    numbers = [round(float(x), 5) for x in (np.mean(values), *evaluation.mean_interval(values))]
    return dict(zip(COLUMNS, (0, part, setting, metric, *numbers, len(values)), strict=True))


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


def tuned(name: str, number: int) -> list[dict]:
    """Rows of a model after SFT on stage 02's r+."""
    rank, rate = TRAININGS[name]
    settings = preset("smollm2", "word_problems", 0)
    run = shared.run_folder("", "smollm2", "word_problems", 0)
    for stage in ("01_sampling", "02_ranking"):
        self_motivated.STAGES[stage](run, settings, progress=True)
    dtype = {} if rank else {"hardware": replace(settings.hardware, dtype="float32")}
    trained = replace(settings, lora=LoraSettings(rank=rank), sft=replace(settings.sft, learning_rate=rate), **dtype)
    tokenizer, model = shared.load_tokenizer(trained), shared.load_trainable(trained, trained.base, "02_sft")
    kept = require(run, "02_ranking").read_rows("ranked", Rationale)
    problems, options = shared.problems_of(require(run, "01_sampling")), shared.trainer_kwargs(trained, "sft")
    sft.train_sft(model, tokenizer, problems, kept, **options, progress=name)
    folder = run / "tuning" / name.replace(" ", "-").replace(",", "")
    merged = shared.merged(model, trained.base)
    for part in (merged, tokenizer):
        part.save_pretrained(folder)
    asked = random.Random("real model").sample(questions.fresh_problems(settings, number), number)
    with shared.load_engine(settings, folder) as engine:
        how = shared.sampling_params(settings, "evaluation")
        answers = evaluation.evaluate(engine, asked, 4, how, progress=name)
    return [
        row("sft", name, "greedy", [float(one["greedy_correct"]) for one in answers]),
        row("sft", name, "avg@4", [float(np.mean(one["sampled_correct"])) for one in answers]),
    ]


def covered(settings: Settings) -> list[dict]:
    """Rows of what answer-conditioned rationales add to open ones, question by question."""
    run = shared.run_folder("", settings.preset, "word_problems", settings.seed)
    written = require(run, "01_sampling").read_rows("rationales", Rationale)
    asked = list(dict.fromkeys(one.id for one in written if one.source == "conditioned"))
    sources = {"open": ("open",), "conditioned": ("conditioned",), "open or conditioned": ("open", "conditioned")}
    rows = []
    for name, among in sources.items():
        mine = [one for one in written if one.source in among]
        stated, supported = {one.id for one in mine if one.correct}, {one.id for one in mine if side(one)[0] == "+"}
        rows.append(row("coverage", name, "states the gold answer", [float(one in stated) for one in asked]))
        rows.append(row("coverage", name, "and supports it", [float(one in supported) for one in asked]))
    return rows


def of_part(part: str, number: int) -> Iterator[tuple[str, object]]:
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
        yield "all", lambda: covered(base)
    if part == "sft":
        for name in TRAININGS:
            yield name, lambda n=name: tuned(n, number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=("sampling", "prompt", "sft", "coverage"), default=["sampling"])
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--out", type=Path, default=variants.TABLE.with_name("smollm2_tuning.csv"))
    args = parser.parse_args()
    rows = controls.measured(args.out, {"value": float, "n": int})
    for part in args.part:
        for setting, measure in of_part(part, args.questions):
            if any((row["part"], row["setting"]) == (part, setting) for row in rows):
                continue
            rows += measure()
            write(rows, COLUMNS, args.out)
            print(*(f"{one['metric']} {one['value']:.3f}" for one in rows[-3:]), sep=", ", flush=True)


if __name__ == "__main__":
    main()
