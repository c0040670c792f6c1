"""Tokens per second of smlib's sampler beside its peers, on the tiny base; writes results/sampling_speed.csv.

    python benchmarks/sampling.py [--vllm .venv-vllm/bin/python] [--quick]

500 questions of the tiny run's test split, 8 rationales each at temperature 1, at most 128 new tokens, all cores:
- smlib's native engine;
- `model.generate` at the best of several batch sizes (found on 64 of the questions, then run on all);
- transformers' continuous batching, `model.generate_batch` (on 16 of the questions: it is slow on a CPU);
- vLLM's CPU build, where --vllm names the Python of an environment that has it (`make .venv-vllm/.ready`).
All draw from the same model at the same temperature, so the lengths are of one distribution; the table says the mean.
Tokens up to and with the end of a rationale count, padding after it does not. Every contestant runs in a process of its
own, alone, after a warm-up; the rounds alternate and the best of two is shown.

Then for the native engine: samples per question (1, 4, 16, 64), number of questions (100 to 10,000, through
smlib.sampling.shards, with the peak memory of the process), and how much of the time the matrix products alone would
take.
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
COLUMNS = ("what", "engine", "questions", "samples", "setting", "tokens", "mean_length", "seconds", "tokens_per_second")
NEW_TOKENS, BATCHES = 128, (64, 128, 256, 512)
VLLM = {  # its engine in this process, compiled, on all cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def questions(count: int) -> list[tuple[str, str]]:
    """(key, prompt) of test questions, the tasks mixed."""
    from smlib.problems import prompts
    from smlib.problems.datasets import TASKS, generate

    pools = [generate(task, -(-count // len(TASKS)), 60_000, split="test") for task in TASKS]
    mixed = [problem for group in zip(*pools, strict=True) for problem in group]
    return [(problem.id, prompts.open_prompt(problem)) for problem in mixed[:count]]


def sampling_params():
    from smlib.sampling.params import SamplingParams

    return SamplingParams(temperature=1.0, max_new_tokens=NEW_TOKENS, seed=0)


def by_engine(engine, asked, samples: int) -> list[int]:
    """Lengths of the samples that an engine draws."""
    keys, prompts = zip(*asked, strict=True)
    drawn = engine.sample(list(prompts), samples, sampling_params(), keys=list(keys))
    return [len(one.token_ids) for group in drawn for one in group]


def by_generate(asked, samples: int, batch: int) -> list[int]:
    import torch

    from smlib.sampling import encoding, models

    model, tokenizer = models.load_policy("tiny"), models.load_tokenizer("tiny")
    rows = sorted((encoding.encode_prompt(tokenizer, prompt) for _, prompt in asked), key=len)
    rows = [row for row in rows for _ in range(samples)]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    lengths = []
    for start in range(0, len(rows), batch):
        block = rows[start : start + batch]
        width = max(map(len, block))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in block])
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=(ids != tokenizer.pad_token_id).long(), **options)
        ended = (output[:, width:] == tokenizer.eos_token_id).int()
        lengths += (ended.cumsum(1) - ended == 0).sum(1).tolist()
    return lengths


def by_generate_batch(asked, samples: int) -> list[int]:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from smlib.sampling import encoding, models

    model, tokenizer = models.load_policy("tiny"), models.load_tokenizer("tiny")
    rows = [encoding.encode_prompt(tokenizer, prompt) for _, prompt in asked for _ in range(samples)]
    drawing = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    memory = ContinuousBatchingConfig(page_size=32, num_blocks=2048, max_batch_tokens=512)
    output = model.generate_batch(rows, drawing, memory, warmup=False)
    return [len(one.generated_tokens) for one in output.values()]


def in_bulk(count: int, samples: int, folder: str) -> list[int]:
    from smlib.sampling.factory import make_engine
    from smlib.sampling.shards import Bulk

    bulk = Bulk(folder, make_engine("native", "tiny"), {"base": "tiny"})
    bulk.draw(questions(count), samples, sampling_params())
    return [len(one.token_ids) for _, group in bulk.read() for one in group]


def bound(rows: int = 256) -> float:
    """Tokens per second if a step were nothing but the model's matrix products, `rows` rows at a time."""
    import torch

    from smlib.sampling import models

    model = models.load_policy("tiny")
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}
    with torch.inference_mode():
        best = float("inf")
        for _ in range(50):
            started = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            best = min(best, time.perf_counter() - started)
    return rows / best


def measure(job: dict) -> dict:
    """One job in this process: lengths, seconds, peak memory."""
    from smlib.files.artifacts import peak_mib
    from smlib.sampling.factory import make_engine

    kind, samples = job["engine"], job["samples"]
    if kind == "bound":
        return {"tokens_per_second": bound()}
    if kind == "bulk":
        started = time.perf_counter()
        lengths = in_bulk(job["questions"], samples, job["folder"])
        return summary(lengths, time.perf_counter() - started) | {"setting": f"peak {peak_mib():.0f} MiB"}
    asked = questions(job["questions"])
    if kind in ("native", "vllm"):
        engine = make_engine(kind, "tiny")
        draw = lambda some, n: by_engine(engine, some, n)  # noqa: E731
    elif kind == "generate":
        draw = lambda some, n: by_generate(some, n, job["batch"])  # noqa: E731
    else:
        draw = by_generate_batch
    if kind != "generate_batch":
        draw(asked[:16], 4)  # warm-up
    started = time.perf_counter()
    lengths = draw(asked, samples)
    return summary(lengths, time.perf_counter() - started)


def summary(lengths: list[int], seconds: float) -> dict:
    tokens = sum(lengths)
    return {
        "tokens": tokens,
        "mean_length": round(tokens / len(lengths), 1),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def alone(job: dict, python: str = sys.executable) -> dict:
    """`measure` in a process of its own, whose last line of output is the result."""
    command = [python, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | VLLM)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr[-3000:]}")
    return job | json.loads(done.stdout.splitlines()[-1])


def compare(count: int, samples: int, vllm: str | None) -> list[dict]:
    few = [alone({"engine": "generate", "questions": 64, "samples": samples, "batch": b}) for b in BATCHES]
    best = max(few, key=lambda row: row["tokens_per_second"])["batch"]
    jobs = [({"engine": "native", "questions": count, "samples": samples}, sys.executable)]
    jobs += [({"engine": "generate", "questions": count, "samples": samples, "batch": best}, sys.executable)]
    if vllm:
        jobs.append(({"engine": "vllm", "questions": count, "samples": samples}, vllm))
    rounds = [[alone(job, python) for job, python in jobs] for _ in range(2)]
    rows = [max(pair, key=lambda row: row["tokens_per_second"]) for pair in zip(*rounds, strict=True)]
    rows.append(alone({"engine": "generate_batch", "questions": 16, "samples": samples}))
    for row in rows:
        row["what"] = "engines"
        if "batch" in row:
            row["setting"] = f"batch {row['batch']}"
    return rows


def grow(largest: int) -> list[dict]:
    import tempfile

    rows = [{"what": "samples"} | alone({"engine": "native", "questions": 100, "samples": n}) for n in (1, 4, 16, 64)]
    for count in (100, 1_000, largest):
        with tempfile.TemporaryDirectory() as folder:
            row = alone({"engine": "bulk", "questions": count, "samples": 4, "folder": folder})
        rows.append({"what": "questions"} | row | {"engine": "native, to disk"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything; writes no table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print("\n" + json.dumps(measure(json.loads(args.job))))
        return
    rows = compare(50 if args.quick else 500, 8, args.vllm) + grow(1_000 if args.quick else 10_000)
    limit = alone({"engine": "bound", "samples": 0})["tokens_per_second"]
    rows.append({"what": "bound", "engine": "matrix products alone", "tokens_per_second": round(limit)})
    ours = rows[0]["tokens_per_second"]
    for row in rows:
        name = f"{row['engine']}, {row.get('questions', '-')} questions x {row.get('samples', '-')}"
        extra = f"{row.get('setting', '')}  {ours / row['tokens_per_second']:.2f} of it is native's"
        print(f"{row['what']:9} {name:45} {row['tokens_per_second']:9,.0f} tokens/s  {extra}")
    if not args.quick:
        with TABLE.open("w", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)


if __name__ == "__main__":
    main()
