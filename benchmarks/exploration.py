"""What the search for first pits costs, by our code and by a plain nested loop; writes results/exploration.csv.

    python benchmarks/exploration.py [--run runs/tiny-all-seed0] [--rationales 60]
    python benchmarks/exploration.py --model runs/smollm2-word_problems-seed0/02_sft/model --dataset gsm8k \\
        --preset smollm2 --rationales 100 --looped 5

The RFT model of a run with stages 06 explores wrong rationales of that run, evenly spaced. With --model, the model in a
folder explores wrong rationales that it writes for a dataset's train questions. Each prefix gets k completions, at the
temperature of the preset. Compared are:
- the loop over rationales, prefixes and completions, one call of `model.generate` for each completion;
- the loop over rationales and prefixes, with k completions in one call;
- the first loop with an early exit: it leaves a prefix that recovers, and a rationale at its pit;
- all prefixes batched through our sampler, k completions each (`exploration.explore_all`);
- the same with an early exit (`exploration.explore`), and both again on all rationales of the run.
All use the same judge. The table has processor seconds beside wall-clock seconds, for a machine that has other work to
do. A loop samples for every rationale; the batched ways sample once for prefixes that are equal.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import torch
from ablations import write

from smlib.files.artifacts import require
from smlib.judging.answers import grade
from smlib.learning import exploration, rationales
from smlib.learning.rows import Pair
from smlib.problems import prompts
from smlib.problems.datasets import load
from smlib.runs import questions, self_explore, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models
from smlib.sampling.engines import NativeEngine

TABLE = Path(__file__).parents[1] / "results" / "exploration.csv"
COLUMNS = (
    "model",
    "what",
    "rationales",
    "k",
    "pits",
    "completions",
    "tokens",
    "seconds",
    "cpu_seconds",
    "ms_per_rationale",
)


def loop(model, tokenizer, explored, settings, at_once: int, early_exit: bool = False) -> tuple[list, list[int]]:
    """The plain nested loop: first pits, and the length of every completion; at_once: completions in one call."""
    k, new = settings.explore.k, settings.sampling.max_new_tokens
    drawing = {"do_sample": True, "temperature": settings.explore.temperature, "top_k": 0, "max_new_tokens": new}
    pits, lengths = [], []
    for one in explored:
        recovers = []
        for step in range(1, len(one.ends) + 1):
            start = [*one.prompt_ids, *one.prefix(step)]
            found = []
            while len(found) < k and not (early_exit and any(found)):
                with torch.inference_mode():
                    output = model.generate(
                        torch.tensor([start], device=model.device), num_return_sequences=at_once, **drawing
                    )
                for ids in output[:, len(start) :].tolist():
                    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids
                    text = prompts.cut(encoding.decode(tokenizer, [*one.prefix(step), *ids]))
                    found.append(grade(one.problem, text).correct)
                    lengths.append(len(ids))
            recovers.append(found)
            if early_exit and not any(found):
                break
        pits.append(exploration.first_pit(recovers))
    return pits, lengths


def batched(function, model, tokenizer, explored, settings) -> tuple[list, list[int]]:
    """`exploration.explore` or `exploration.explore_all`: first pits, and the length of every completion."""
    engine = NativeEngine(model, tokenizer, settings.hardware.max_batch)
    found = function(engine, explored, settings.explore.k, shared.sampling_params(settings, "explore"))
    pits = [exploration.first_pit(exploration.outcomes(one, found)) for one in explored]
    return pits, [len(one.sample.token_ids) for attempts in found.values() for one in attempts]


def of_run(args, settings) -> tuple:
    """Model, tokenizer, and all wrong rationales of a run."""
    run = shared.run_folder(args.run, args.preset, args.task, 0)
    tokenizer, model = shared.load_tokenizer(settings), models.load_policy(require(run, "06_rft").path("model"))
    problems = {problem.id: problem for problem in questions.training_problems(settings)}
    pairs = require(run, "06_selection").read_rows("pairs", Pair)
    return model, tokenizer, self_explore.wrong_rationales(tokenizer, problems, pairs)


def of_dataset(args, settings) -> tuple:
    """A model, its tokenizer, and wrong rationales that it writes to the first questions of a dataset, one of each."""
    tokenizer = shared.load_tokenizer(settings)
    model = models.load_policy(args.model, shared.held_dtype(settings, samples=True))
    problems = load(args.dataset, "train")[: 2 * args.rationales]
    engine, params = NativeEngine(model, tokenizer), shared.sampling_params(settings, "explore")
    written = rationales.sample_open(engine, problems, 1, params, author="sft")
    wrong = [
        exploration.split(tokenizer, problem, encoding.encode_question(tokenizer, problem), one.token_ids)
        for problem, one in zip(problems, written, strict=True)
        if one.answer is not None and not one.correct
    ]
    return model, tokenizer, [one for one in wrong if one.ends][: args.rationales]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--run", default="", help="run folder, instead of runs/PRESET-TASK-seed0")
    parser.add_argument("--model", default="", help="folder with a model, instead of a run")
    parser.add_argument("--dataset", default="gsm8k", help="dataset for --model (default gsm8k)")
    parser.add_argument("--rationales", type=int, default=60, help="rationales to explore (default 60)")
    parser.add_argument("--looped", type=int, default=0, help="how many of them for the loops (default: all)")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    settings = preset(args.preset, args.task if not args.model else args.dataset)
    model, tokenizer, everything = (of_dataset if args.model else of_run)(args, settings)
    few = everything[:: max(1, len(everything) // args.rationales)][: args.rationales]
    looped = few[:: max(1, len(few) // args.looped)][: args.looped] if args.looped else few

    given, k, name = (model, tokenizer), settings.explore.k, args.model or settings.base
    ways = {
        "loop, one completion a call": (partial(loop, at_once=1), looped),
        "loop, k completions a call": (partial(loop, at_once=k), looped),
        "loop, early exit": (partial(loop, at_once=1, early_exit=True), looped),
        "batched": (partial(batched, exploration.explore_all), few),
        "batched, early exit": (partial(batched, exploration.explore), few),
    }
    if len(few) < len(everything):
        ways |= {f"{what}, all rationales": (ways[what][0], everything) for what in ("batched", "batched, early exit")}
    loop(*given, few[:1], settings, 1)  # warm-up
    batched(exploration.explore, *given, few[:8], settings)
    rows = []
    for what, (way, explored) in ways.items():
        clock, processor = time.perf_counter(), time.process_time()
        pits, lengths = way(*given, explored, settings)
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        counts = (len(explored), k, sum(pit is not None for pit in pits), len(lengths), sum(lengths))
        times = (round(clock, 2), round(processor, 2), round(1000 * processor / len(explored), 1))
        rows.append(dict(zip(COLUMNS, (name, what, *counts, *times), strict=True)))
        print(rows[-1], flush=True)
    if args.out.exists():
        with args.out.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["model"] != name] + rows
    write(rows, COLUMNS, args.out)


if __name__ == "__main__":
    main()
