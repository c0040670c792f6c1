"""What the search for first pits costs, ours beside a plain nested loop; writes results/exploration.csv.

    python benchmarks/exploration.py [--run runs/tiny-all-seed0] [--rationales 60]

The RFT model of a run with stages 06 explores wrong rationales of that run (an even choice of them), k completions of a
prefix, at the temperature of the run's settings:
- the loop over rationales, prefixes and completions, each of them one call of `model.generate`;
- the loop over rationales and prefixes, with k completions in one call;
- the first loop with an early exit: it leaves a prefix that recovers, and a rationale at its pit;
- all prefixes batched through our sampler, k completions each (`exploration.explore_all`);
- the same with an early exit (`exploration.explore`), and both again on all rationales of the run.
All judge by the same judge. The seconds of the processor stand beside those of the clock, for a machine that has other
work to do. A loop draws for every rationale; the batched ones draw once for prefixes that are equal.
"""

import argparse
import csv
import io
import time
from functools import partial
from pathlib import Path

import torch

from smlib.files.artifacts import require
from smlib.files.atomic import replacing
from smlib.judging.answers import grade
from smlib.learning import exploration
from smlib.learning.rows import Pair
from smlib.problems import prompts
from smlib.runs import questions, self_explore, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models
from smlib.sampling.engines import NativeEngine

TABLE = Path(__file__).parents[1] / "results" / "exploration.csv"
COLUMNS = ("what", "rationales", "k", "pits", "completions", "tokens", "seconds", "cpu_seconds", "ms_per_rationale")


def loop(model, tokenizer, rationales, settings, at_once: int, early_exit: bool = False) -> tuple[list, list[int]]:
    """The plain nested loop: first pits, and the length of every completion; at_once: completions in one call."""
    k, new = settings.explore.k, settings.sampling.max_new_tokens
    drawing = {"do_sample": True, "temperature": settings.explore.temperature, "top_k": 0, "max_new_tokens": new}
    pits, lengths = [], []
    for one in rationales:
        recovers = []
        for step in range(1, len(one.ends) + 1):
            start = [*one.prompt_ids, *one.prefix(step)]
            found = []
            while len(found) < k and not (early_exit and any(found)):
                with torch.inference_mode():
                    output = model.generate(torch.tensor([start]), num_return_sequences=at_once, **drawing)
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


def batched(function, model, tokenizer, rationales, settings) -> tuple[list, list[int]]:
    """`exploration.explore` or `exploration.explore_all`: first pits, and the length of every completion."""
    engine = NativeEngine(model, tokenizer, settings.hardware.max_batch)
    found = function(engine, rationales, settings.explore.k, shared.sampling_params(settings, "explore"))
    pits = [exploration.first_pit(exploration.outcomes(one, found)) for one in rationales]
    return pits, [len(one.sample.token_ids) for attempts in found.values() for one in attempts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--task", default="all")
    parser.add_argument("--run", default="", help="a run folder, in place of runs/PRESET-TASK-seed0")
    parser.add_argument("--rationales", type=int, default=60, help="that the loops explore (default 60)")
    parser.add_argument("--out", type=Path, default=TABLE)
    args = parser.parse_args()
    settings, run = preset(args.preset, args.task), shared.run_folder(args.run, args.preset, args.task, 0)
    tokenizer, model = shared.load_tokenizer(settings), models.load_policy(require(run, "06_rft").path("model"))
    problems = {problem.id: problem for problem in questions.training_problems(settings)}
    everything = self_explore.wrong_rationales(
        tokenizer, problems, require(run, "06_selection").read_rows("pairs", Pair)
    )
    few = everything[:: max(1, len(everything) // args.rationales)][: args.rationales]

    k, given = settings.explore.k, (model, tokenizer, few, settings)
    ways = {
        "loop, one completion a call": (partial(loop, *given, 1), few),
        "loop, k completions a call": (partial(loop, *given, k), few),
        "loop, early exit": (partial(loop, *given, 1, early_exit=True), few),
        "batched": (partial(batched, exploration.explore_all, *given), few),
        "batched, early exit": (partial(batched, exploration.explore, *given), few),
        "batched, all rationales": (
            partial(batched, exploration.explore_all, model, tokenizer, everything, settings), everything),
        "batched, early exit, all rationales": (
            partial(batched, exploration.explore, model, tokenizer, everything, settings), everything),
    }  # fmt: skip
    loop(model, tokenizer, few[:1], settings, 1)  # warm-up
    batched(exploration.explore, model, tokenizer, few[:8], settings)
    rows = []
    for what, (way, explored) in ways.items():
        clock, processor = time.perf_counter(), time.process_time()
        pits, lengths = way()
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        counts = (len(explored), k, sum(pit is not None for pit in pits), len(lengths), sum(lengths))
        times = (round(clock, 2), round(processor, 2), round(1000 * processor / len(explored), 1))
        rows.append(dict(zip(COLUMNS, (what, *counts, *times), strict=True)))
        print(rows[-1], flush=True)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with replacing(args.out) as tmp:
        tmp.write_text(text.getvalue(), encoding="utf-8")


if __name__ == "__main__":
    main()
