"""What this package does with a model of Llama-2-7B's shape on one GPU, measured; writes results/gpu_7b.csv.

    PYTHONPATH=. python benchmarks/gpu_7b.py [--out FOLDER] [--minutes 8.5] [--only SECTION ...]
    PYTHONPATH=. python benchmarks/gpu_7b.py --shape small --out FOLDER    # a minute on one CPU core, to test this file

The weights are random (speed and memory do not depend on them), so nothing is downloaded, and one card of 80 GB will
do. It needs transformers and peft; the sections sft, reward and dpo also need trl and datasets, and nf4 needs
bitsandbytes. A section whose library is missing says so in its row. For a machine that has torch but no network, bring
the others as wheels in a folder:

    python -m pip install --no-index --no-deps --target site-packages WHEELS/*.whl
    PYTHONUNBUFFERED=1 PYTHONPATH=site-packages:. python benchmarks/gpu_7b.py --out "$OUT"

The table is written again after every section, so that a killed run leaves what it measured. A section that fails
leaves a row that says why, and the next one runs; one that would not end in time is not started. Only a complete run of
shape 7b writes to results/.

The columns: section, what, value, unit, computed, ratio = value / computed, note. (section, what, unit) names a row.
For GiB, computed is what smlib.scale.memory expects. For a speed or a time, it is the bound: the time that the
arithmetic takes at the speed of a large matrix product, or that reading the necessary bytes takes at the speed of a
large copy, both measured in the same run. The ratio of a speed is then the share of the bound.

Operations are counted of the P weights in matrices, not of attention, which is below 2 % at these lengths: a forward
pass takes 2 P per token, a backward pass through frozen weights 2 P (no gradients of theirs), and 2 P more where
activations are computed again. The output head counts for all tokens, though it reads only those of completions.

loop is SFT in plain torch under autocast, which is how PPO trains; sft, reward and dpo are smlib's own by TRL's
trainers, without autocast, so that adapters compute in float32.
"""

import argparse
import copy
import csv
import gc
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from smlib.learning.rows import Pair
from smlib.problems.datasets import Problem
from smlib.sampling import models, packing
from smlib.sampling.engines import NativeEngine
from smlib.sampling.params import Sample, SamplingParams
from smlib.sampling.sampler import sample_ids
from smlib.scale import memory
from smlib.scale.memory import PPO, Sampling, Training

RESULTS = Path(__file__).parents[1] / "results"
COLUMNS = ("section", "what", "value", "unit", "computed", "ratio", "note")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GIB = 2**30
STATIC = {"cache_implementation": "static"}  # for model.generate
RANK, SAMPLES, K = 16, 8, 4  # of LoRA; completions of a question; of a prefix in the exploration


@dataclass(frozen=True)
class Job:
    """A model's shape and how much it is given to do; lengths in tokens."""

    config: LlamaConfig
    prompt: int
    new: int  # drawn of a completion
    answer: int  # of a completion to train on
    rows: tuple[int, ...]  # completions drawn together
    stepped: tuple[int, ...]  # the same, where single steps are measured
    episodes: int  # of a PPO update
    rationales: int  # to explore


SMALL = LlamaConfig(
    hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=300,
)  # fmt: skip
JOBS = {
    "7b": Job(memory.LLAMA_2_7B, 128, 128, 256, (32, 128, 512), (1, 8, 32, 128), 64, 8),
    "small": Job(SMALL, 16, 16, 16, (8, 16), (1, 8), 8, 2),
}


# ---- the table -----------------------------------------------------------------------------------------------


class Bench:
    """The rows so far, what the machine can do, and the time that is left."""

    def __init__(self, job: Job, files: list[Path], minutes: float):
        self.job, self.files, self.deadline = job, files, time.monotonic() + 60 * minutes
        self.rows: list[dict] = []
        self.section = ""
        self.bandwidth = self.peak = math.nan  # bytes and operations per second

    def add(self, what: str, value=None, unit: str = "", computed: float | None = None, note: str = "") -> None:
        ratio = value / computed if computed and value is not None else None
        self.rows.append(dict(zip(COLUMNS, (self.section, what, value, unit, computed, ratio, note), strict=True)))

    def run(self, name: str, work: Callable[["Bench"], None], estimate: float) -> None:
        """A section of about `estimate` seconds, within the time that is left."""
        self.section, left, started = name, self.deadline - time.monotonic(), time.monotonic()
        if left < estimate:
            self.add("skipped", note=f"{left:.0f} s left, it takes about {estimate:.0f}")
        else:
            try:
                with limit(left):
                    work(self)
            except ModuleNotFoundError as error:
                self.add("skipped", note=f"no module {error.name}")
            except Exception as error:  # of whatever kind: the sections after it are worth having
                self.add("failed", note=f"{type(error).__name__}: {error}".replace("\n", " ")[:200])
            self.add("whole section", time.monotonic() - started, "s")
        free()
        self.write()
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)

    def write(self) -> None:
        for path in self.files:
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows({name: short(value) for name, value in row.items()} for row in self.rows)

    def show(self) -> None:
        for row in self.rows:
            value, computed, ratio = (short(row[name]) for name in ("value", "computed", "ratio"))
            beside = f" | {computed} | x {ratio}" if computed else ""
            print(f"{row['section']} | {row['what']} | {value} {row['unit']}{beside} | {row['note'][:80]}")

    def weigh(self, what: str, computed: float) -> None:
        """The row of the most memory since `reset_peak`, beside what was computed; bytes."""
        found = torch.cuda.max_memory_allocated() / GIB if GPU else None
        self.add(what, found, "GiB", computed / GIB, "" if GPU else "measured on a GPU only")
        reset_peak()

    def train(self, what: str, seconds: float, rows: int, computed: float, gradient_checkpointing: bool) -> None:
        """The rows of a training step on `rows` whole sequences under LoRA."""
        tokens = rows * (self.job.prompt + self.job.answer)
        work = (6 if gradient_checkpointing else 4) * matrices(self.job.config) * tokens
        self.add(what, seconds, "s", work / self.peak)
        self.add(what, tokens / seconds, "tokens/s")
        self.add(what, work / seconds / 1e12, "TFLOP/s", self.peak / 1e12)
        self.weigh(what, computed)


def short(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within, once the seconds have passed."""

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    reset_peak()


def reset_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


# ---- the model and what it is given --------------------------------------------------------------------------


def build(config: LlamaConfig) -> torch.nn.Module:
    """A frozen model with random weights in bfloat16, made where it computes. Nothing ends what it writes."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def adapted(config: LlamaConfig):
    return models.add_lora(build(config), RANK, RANK, "all-linear", "")


def matrices(config: LlamaConfig) -> int:
    """Weights that every token is multiplied with: the layers' and the output head's."""
    return memory.parameters(config)["linear"] + config.vocab_size * config.hidden_size


def token_ids(count: int, length: int, config: LlamaConfig) -> list[list[int]]:
    """Random tokens, the special ones of `word_tokenizer` left out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, config.vocab_size, (count, length), generator=generator).tolist()


def word_tokenizer(config: LlamaConfig) -> PreTrainedTokenizerFast:
    """A token for each word "w5", "w6", ..., so that the tokens of a text can be counted beforehand."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<pad>", "</s>", "<unk>", "Q:", "A:", *(f"w{number}" for number in range(5, config.vocab_size))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip


def text(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def problems_of(job: Job, count: int) -> list[Problem]:
    """Problems whose prompt has job.prompt tokens: "Q:", the question's and "A:"."""
    questions = token_ids(count, job.prompt - 2, job.config)
    return [Problem(f"gpu/{n}", "multiarith", text(ids), "7", "number") for n, ids in enumerate(questions)]


def ppo_plan(job: Job, **changed) -> PPO:
    """What is measured here of PPO, for smlib.scale.memory."""
    usual = {"rank": RANK, "dtype": "bfloat16", "precision": "bfloat16", "prompt": job.prompt, "samples": SAMPLES}
    return PPO(**usual | {"completion": job.new} | changed)


def computed_phases(job: Job, plan: PPO) -> dict[str, float]:
    """Bytes of each phase, less the reward model's adapter, which is not loaded here."""
    reward = 4 * memory.lora_parameters(job.config, RANK)
    return {name: memory.total(parts) - reward for name, parts in memory.phases(job.config, plan).items()}


# ---- facts, weights ------------------------------------------------------------------------------------------


def facts(bench: Bench) -> None:
    name = torch.cuda.get_device_name() if GPU else "CPU"
    total = torch.cuda.get_device_properties(0).total_memory / GIB if GPU else None
    bench.add("device", total, "GiB", note=name)
    for package in PACKAGES:
        try:
            bench.add(package, note=version(package))
        except PackageNotFoundError:
            bench.add(package, note="is not there")
    source = torch.empty(2**32 if GPU else 2**26, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    bench.bandwidth = 2 * len(source) / best(lambda: target.copy_(source))
    bench.add("copy", bench.bandwidth / 1e9, "GB/s", note="bytes read and written")
    size = 8192 if GPU else 512
    left, right = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bench.peak = 2 * size**3 / best(lambda: left @ right)
    bench.add("matrix product", bench.peak / 1e12, "TFLOP/s", note=f"bfloat16, {size} x {size} x {size}")


def best(work: Callable[[], object], times: int = 10) -> float:
    work()
    return min(seconds(work) for _ in range(times))


def weights(bench: Bench) -> None:
    model = build(bench.job.config)
    held = sum(weight.nbytes for weight in model.parameters())
    bench.add("held", held / GIB, "GiB", memory.model_bytes(bench.job.config, "bfloat16") / GIB)
    bench.add("parameters", models.model_size(model), "", sum(memory.parameters(bench.job.config).values()))
    bench.weigh("while they are made", held)


# ---- sampling ------------------------------------------------------------------------------------------------


def native(model, job: Job, rows: int, new: int) -> list[list[Sample]]:
    prompts = token_ids(-(-rows // SAMPLES), job.prompt, job.config)
    params = SamplingParams(temperature=1.0, max_new_tokens=new, seed=0)
    return sample_ids(model, None, prompts, min(rows, SAMPLES), params)


@torch.inference_mode()
def by_generate(model, prompts: list[list[int]], new: int, samples: int, **options) -> torch.Tensor:
    ids = torch.tensor(prompts, device=DEVICE)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), num_return_sequences=samples, do_sample=True, top_k=0,
        temperature=1.0, max_new_tokens=new, pad_token_id=0, **options,
    )  # fmt: skip


def step_bound(bench: Bench, rows: int, new: int) -> float:
    """Seconds of a decode step, in the middle of `new`: the weights, each prompt's keys and values once and those of
    the drawn tokens are read, or the weights multiplied with all rows, whichever takes longer."""
    config = bench.job.config
    cached = -(-rows // SAMPLES) * bench.job.prompt + rows * new / 2
    read = 2 * matrices(config) + 4 * config.num_hidden_layers * memory.widths(config)[3] * cached
    return max(read / bench.bandwidth, 2 * matrices(config) * rows / bench.peak)


def draw_bound(bench: Bench, rows: int) -> float:
    """Seconds to read the prompts and draw all tokens."""
    job = bench.job
    return job.new * step_bound(bench, rows, job.new) + memory.parameters(job.config)["linear"] * 2 * job.prompt * (
        -(-rows // SAMPLES) / bench.peak
    )


def sampling(bench: Bench) -> None:
    """smlib's sampler and model.generate, the same prompts, eight completions each, all of them of the same length."""
    job, model = bench.job, build(bench.job.config)
    compare_logprobs(bench, model)
    ours = {rows: native_speed(bench, model, rows) for rows in job.rows[:2]}
    theirs = {rows: generate_speed(bench, model, rows) for rows in job.rows[:2]}
    for rows, speed in theirs.items():
        bench.add(f"native over generate, {rows} rows", ours[rows] / speed, "times")
    bench.add("native over generate, best of each", max(ours.values()) / max(theirs.values()), "times")
    for rows in job.rows[2:]:
        native_speed(bench, model, rows)


def native_speed(bench: Bench, model, rows: int) -> float:
    """Tokens per second."""
    job, what = bench.job, f"native, {rows} rows"
    plan = Sampling("bfloat16", max_batch=rows, samples=SAMPLES, prompt=job.prompt, completion=job.new)
    native(model, job, rows, 4)
    reset_peak()
    speed = rows * job.new / seconds(lambda: native(model, job, rows, job.new))
    bench.add(what, speed, "tokens/s", rows * job.new / draw_bound(bench, rows))
    bench.weigh(what, memory.total(memory.sampling(job.config, plan)))
    return speed


def generate_speed(bench: Bench, model, rows: int, what: str = "generate", **options) -> float:
    """Tokens per second, after a first time."""
    job, what = bench.job, f"{what}, {rows} rows"
    prompts = token_ids(rows // SAMPLES, job.prompt, job.config)
    draw = partial(by_generate, model, prompts, job.new, SAMPLES, **options)
    if drawn := draw().shape[1] - job.prompt - job.new:
        raise RuntimeError(f"generate drew {drawn} tokens more than {job.new}")
    reset_peak()
    speed = rows * job.new / seconds(draw)
    bench.add(what, speed, "tokens/s", rows * job.new / draw_bound(bench, rows))
    if GPU:
        bench.add(what, torch.cuda.max_memory_allocated() / GIB, "GiB")
    return speed


@torch.inference_mode()
def compare_logprobs(bench: Bench, model) -> None:
    """Log-probabilities as the sampler gives them beside those of a training pass over the same tokens."""
    job = bench.job
    prompts = token_ids(1, job.prompt, job.config)
    [drawn] = native(model, job, packing.CONTINUATIONS_PER_ROW, job.new)
    packed = packing.pack([(prompts[0], [list(one.token_ids) for one in drawn])], 0, DEVICE)
    trained = packing.packed_logprobs(model, packed).cpu()
    apart = (trained - torch.tensor([number for one in drawn for number in one.logprobs])).abs()
    bench.add("log p, sampler and training pass, largest difference", apart.max().item(), "nats")
    bench.add("log p, sampler and training pass, mean difference", apart.mean().item(), "nats", note="bfloat16")


def steps(bench: Bench) -> None:
    """A decode step of the sampler, and how long of it the GPU has work: the rest is Python and launches."""
    job, model = bench.job, build(bench.job.config)
    few, many = job.new // 8, job.new // 2
    for rows in job.stepped:
        taken = [seconds(lambda n=n, rows=rows: native(model, job, rows, n)) for n in (few, few, many)]
        bound = 1e3 * step_bound(bench, rows, few + many)
        bench.add(f"native, {rows} rows", 1e3 * (taken[2] - taken[1]) / (many - few), "ms/step", bound)
        if GPU:  # few steps, as the profile has an entry for every kernel
            busy = [busy_seconds(lambda n=n, rows=rows: native(model, job, rows, n)) for n in (few, 2 * few)]
            bench.add(f"kernels of native, {rows} rows", 1e3 * (busy[1] - busy[0]) / few, "ms/step", bound)


def busy_seconds(work: Callable[[], object]) -> float:
    """What all kernels take together."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in kernels) / 1e6


def static(bench: Bench) -> None:
    """model.generate with a static cache, which transformers compiles on a GPU. The last section: compiling may take
    all the time that is left."""
    if not GPU:
        return bench.add("skipped", note="needs a GPU")
    model = build(bench.job.config)
    taken = seconds(lambda: generate_speed(bench, model, bench.job.rows[1], "generate, compiled", **STATIC))
    bench.add("compiled and drawn twice", taken, "s")


# ---- training ------------------------------------------------------------------------------------------------


def variants() -> Iterator[tuple[str, int, bool]]:
    """(its name, micro batch, whether activations are computed again), as a model that does so goes on doing it."""
    for gradient_checkpointing in (False, True):
        for micro in (4, 1):
            yield (
                f"micro batch {micro}{', gradient_checkpointing' if gradient_checkpointing else ''}",
                micro,
                gradient_checkpointing,
            )


def update_bytes(job: Job, micro: int, gradient_checkpointing: bool, dtype: str = "bfloat16") -> float:
    """Bytes of a step on whole completions, as smlib.scale.memory counts PPO's with a value head, under autocast."""
    plan = ppo_plan(
        job, micro_batch=micro, samples=1, completion=job.answer, gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
    )  # fmt: skip
    return computed_phases(job, plan)["update"]


def loop_step(bench: Bench, lora, micro: int) -> float:
    """Seconds of a step of SFT as plain torch under autocast, as PPO's steps are: median of four after a first one."""
    job, trained = bench.job, [weight for weight in lora.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    rows = token_ids(micro, job.prompt + job.answer, job.config)
    packed = packing.pack([(row[: job.prompt], [row[job.prompt :]]) for row in rows], 0, DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = -packing.packed_logprobs(lora, packed).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    reset_peak()
    return statistics.median([seconds(step) for _ in range(5)][1:])


def loop(bench: Bench) -> None:
    """SFT without a trainer, under autocast."""
    lora = adapted(bench.job.config)
    for what, micro, gradient_checkpointing in variants():
        if gradient_checkpointing:
            checkpoint_gradients(lora)
        taken = loop_step(bench, lora, micro)
        bench.train(what, taken, micro, update_bytes(bench.job, micro, gradient_checkpointing), gradient_checkpointing)


def checkpoint_gradients(lora) -> None:
    lora.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    lora.train()


class Ticks(list):
    """In place of a progress bar: when each step ended, in seconds."""

    def update(self, _) -> None:
        self.append(clock())

    def set_postfix(self, **_) -> None: ...

    def close(self) -> None: ...


def trainer_step(train: Callable[[], object]) -> float:
    """Seconds of a step of one of smlib's trainers: the median of those after the first."""
    from smlib.learning import trainers

    ticks = Ticks()
    reset_peak()
    with mock.patch.object(trainers, "progress_bar", lambda *_: ticks):
        train()
    return statistics.median(end - start for start, end in pairwise(ticks))


def training_bytes(job: Job, kind: str, micro: int, gradient_checkpointing: bool) -> float:
    """Bytes of a step of one of smlib's trainers."""
    shared = job.answer // 2 if kind == "reward" else 0  # it reads what both sides begin with once, as a prompt
    prompt, completion = job.prompt + shared, job.answer - shared
    plan = Training(kind, "bfloat16", RANK, gradient_checkpointing, micro, prompt=prompt, completion=completion)
    return memory.total(memory.training(job.config, plan))


def trainer_options(micro: int, gradient_checkpointing: bool) -> dict:
    return {
        "epochs": 1, "learning_rate": 1e-5, "batch": micro, "seed": 0, "micro_batch": micro,
        "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip


def sft(bench: Bench) -> None:
    """smlib.learning.sft: by TRL's trainer, without autocast."""
    from smlib.learning.rows import Rationale
    from smlib.learning.sft import train_sft

    job, lora, tokenizer = bench.job, adapted(bench.job.config), word_tokenizer(bench.job.config)
    for what, micro, gradient_checkpointing in variants():
        asked = problems_of(job, 5 * micro)
        answers = token_ids(len(asked), job.answer - 1, job.config)  # and the end
        right = [
            Rationale(
                id=one.id,
                dataset=one.dataset,
                text=text(ids),
                token_ids=tuple(ids),
                answer=None,
                correct=True,
                side="+",
            )
            for one, ids in zip(asked, answers, strict=True)
        ]
        options = trainer_options(micro, gradient_checkpointing)
        taken = trainer_step(partial(train_sft, lora, tokenizer, asked, right, **options))
        computed = training_bytes(job, "sft", micro, gradient_checkpointing)
        bench.train(what, taken, micro, computed, gradient_checkpointing)


def pairs_of(asked: list[Problem], job: Job) -> list[Pair]:
    """A pair of every problem, whose sides are alike in their first half."""
    drawn = token_ids(2 * len(asked), job.answer - 1, job.config)
    half, pairs = job.answer // 2, []
    for one, good, other in zip(asked, drawn[::2], drawn[1::2], strict=True):
        bad = good[:half] + other[half:]
        sides = {"chosen": text(good), "rejected": text(bad), "chosen_ids": tuple(good), "rejected_ids": tuple(bad)}
        pairs.append(Pair(id=one.id, dataset=one.dataset, held_out=False, **sides))
    return pairs


def pair_row(bench: Bench, what: str, taken: float, micro: int) -> None:
    bench.add(
        what, taken, "s", note=f"gradient_checkpointing; sides of {bench.job.answer} tokens after {bench.job.prompt}"
    )
    bench.add(what, micro / taken, "pairs/s")
    bench.weigh(what, training_bytes(bench.job, bench.section, micro, gradient_checkpointing=True))


def reward(bench: Bench, micro: int = 4) -> None:
    from smlib.learning import reward_model

    job, lora, tokenizer = bench.job, adapted(bench.job.config), word_tokenizer(bench.job.config)
    asked = problems_of(job, 5 * micro)
    pairs = pairs_of(asked, job)
    options = trainer_options(micro, True) | {"beta": 0.1, "nll_coef": 1.0}
    taken = trainer_step(partial(reward_model.train_reward_model, lora, tokenizer, asked, pairs, **options))
    pair_row(bench, f"step, micro batch {micro}", taken, micro)
    texts = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    problems = [one for one in asked for _ in range(2)]
    score = partial(reward_model.score, lora, tokenizer, problems, texts)
    score()
    bench.add("texts scored", len(texts) / seconds(score), "texts/s")


def dpo(bench: Bench, micro: int = 4) -> None:
    from smlib.learning.dpo import train_dpo

    job, lora, tokenizer = bench.job, adapted(bench.job.config), word_tokenizer(bench.job.config)
    prompts, end = token_ids(5 * micro, job.prompt, job.config), (tokenizer.eos_token_id,)
    pairs = [
        replace(pair, prompt_ids=tuple(prompt), chosen_ids=pair.chosen_ids + end, rejected_ids=pair.rejected_ids + end)
        for prompt, pair in zip(prompts, pairs_of(problems_of(job, len(prompts)), job), strict=True)
    ]
    options = trainer_options(micro, True) | {"beta": 0.1}
    taken = trainer_step(partial(train_dpo, lora, tokenizer, pairs, **options))
    pair_row(bench, f"step, micro batch {micro}", taken, micro)


def ppo_update(bench: Bench, value: str, gradient_checkpointing: bool) -> None:
    """The second of two updates; the peaks are those of the rollout, and of all that comes after it."""
    from smlib.ppo import training_log
    from smlib.ppo.loop import train
    from smlib.ppo.roles import Adapters
    from smlib.ppo.settings import PPOSettings

    job, tokenizer = bench.job, word_tokenizer(bench.job.config)
    plan = ppo_plan(
        job, value=value, gradient_checkpointing=gradient_checkpointing, micro_batch=min(16, job.episodes // 2),
        max_batch=job.episodes,
    )  # fmt: skip
    phases = computed_phases(job, plan)
    settings = PPOSettings(
        value=value, updates=2, episodes=job.episodes, samples_per_question=SAMPLES, minibatch=plan.micro_batch,
        epochs=1, max_new_tokens=job.new, precision="bfloat16", max_update_kl=1e9, learning_rate=1e-5,
    )  # fmt: skip
    roles = Adapters(adapted(job.config), share_trunk=value == "head")
    if gradient_checkpointing:
        roles.checkpoint_gradients()
    asked, updates = problems_of(job, settings.questions), []

    def problems(update: int) -> list[Problem]:
        updates.append(update)
        reset_peak()
        return asked

    def score(_, texts: list[str]) -> list[float]:
        if len(updates) == settings.updates:
            bench.weigh("rollout", phases["rollout"])
        return [float(len(one) % 7) for one in texts]

    with tempfile.TemporaryDirectory() as out:
        row = train(roles, score, problems, tokenizer, settings, out)[-1]
    bench.weigh("scoring and update", max(phases["reference"], phases["update"]))
    tokens, passes = row["tokens"], 1 if value == "head" else 2
    forward = 2 * matrices(job.config) * plan.tokens * job.episodes // plan.micro_batch  # of one pass, prompts included
    work = passes * (3 if gradient_checkpointing else 2) * forward
    bench.add("rollout", row["rollout_seconds"], "s", draw_bound(bench, job.episodes), f"{tokens} tokens")
    bench.add("rollout", tokens / row["rollout_seconds"], "tokens/s")
    # the reference's pass and, for values, one with an adapter on; those of the policy again, for log p in one pass
    bench.add("scoring", row["score_seconds"], "s", (2 + passes) * forward / bench.peak, "log p, values")
    bench.add("update", row["update_seconds"], "s", work / bench.peak, f"{row['steps']} steps of {plan.micro_batch}")
    bench.add("update", work / row["update_seconds"] / 1e12, "TFLOP/s", bench.peak / 1e12)
    whole = sum(row[name] for name in training_log.SECONDS)
    bench.add("all", whole, "s", note=f"{job.episodes} completions")
    bench.add("all", 1e6 * whole / tokens, "us/token")


# ---- exploration, four bits ----------------------------------------------------------------------------------


def exploration(bench: Bench) -> None:
    """k completions of every prefix of wrong rationales: all together, and the nested loop on a few of them."""
    from smlib.learning.exploration import SteppedRationale, explore_all

    job, model, tokenizer = bench.job, build(bench.job.config), word_tokenizer(bench.job.config)
    asked = problems_of(job, job.rationales)
    prompts, written = (token_ids(len(asked), length, job.config) for length in (job.prompt, job.new))
    ends = tuple(job.new * part // 4 for part in (1, 2, 3))
    rationales = [
        SteppedRationale(problem, tuple(prompt), tuple(ids), ends)
        for problem, prompt, ids in zip(asked, prompts, written, strict=True)
    ]
    engine, params = NativeEngine(model, tokenizer), SamplingParams(temperature=1.0, max_new_tokens=job.new, seed=0)
    explore_all(engine, rationales[:1], K, params)
    started = clock()
    found = explore_all(engine, rationales, K, params)
    speed = sum(map(len, found.values())) / (clock() - started)
    bench.add(f"{len(found)} prefixes together", speed, "completions/s", note=f"k = {K}, {job.new} tokens")
    for at_once in (K, 1):
        taken = 0.0
        for steps_kept in (1, 2, 3):
            start = [*rationales[0].prompt_ids, *rationales[0].prefix(steps_kept)]
            taken += seconds(lambda start=start, n=at_once: by_generate(model, [start], job.new, n))
        what = f"loop over prefixes, {at_once} completions a call"
        bench.add(what, 3 * at_once / taken, "completions/s")
        bench.add(f"together over {what}", speed * taken / (3 * at_once), "times")


def nf4(bench: Bench) -> None:
    """The linear layers in four bits: weights, a training step, sampling."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    job, model = bench.job, build(bench.job.config)
    for layer in model.get_decoder().layers:
        for name, old in [found for found in layer.named_modules() if isinstance(found[1], torch.nn.Linear)]:
            new = Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta")
            new.weight = Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            layer.set_submodule(name, new.to(DEVICE))
    del old
    model.is_loaded_in_4bit = True  # so peft puts its layers for four bits on them
    free()
    if GPU:
        held = torch.cuda.memory_allocated()
        bench.add("held", held / GIB, "GiB", memory.model_bytes(job.config, "nf4") / GIB)
    for rows in job.rows[:2]:
        native(model, job, rows, 4)
        taken = seconds(lambda rows=rows: native(model, job, rows, job.new))
        bench.add(f"native, {rows} rows", rows * job.new / taken, "tokens/s")
    lora = models.add_lora(model, RANK, RANK, "all-linear", "")
    checkpoint_gradients(lora)
    taken = loop_step(bench, lora, 4)
    bench.train(
        "micro batch 4, gradient_checkpointing",
        taken,
        4,
        update_bytes(job, 4, True, "nf4"),
        gradient_checkpointing=True,
    )


# ---- all of it -----------------------------------------------------------------------------------------------

SECTIONS = {  # in the order of their worth; with seconds on a card of 80 GB
    "facts": (facts, 5),
    "weights": (weights, 5),
    "sampling": (sampling, 40),
    "loop": (loop, 25),
    "ppo_head": (partial(ppo_update, value="head", gradient_checkpointing=True), 40),
    "steps": (steps, 25),
    "sft": (sft, 35),
    "ppo_model": (partial(ppo_update, value="model", gradient_checkpointing=True), 50),
    "reward": (reward, 25),
    "dpo": (dpo, 30),
    "exploration": (exploration, 30),
    "nf4": (nf4, 35),
    "ppo_head_kept": (partial(ppo_update, value="head", gradient_checkpointing=False), 40),
    "static": (static, 60),
}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=JOBS, default="7b")
    parser.add_argument("--out", type=Path, help="folder for the table, besides results/")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit in minutes (default 8.5)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="only these sections, after the facts")
    args = parser.parse_args(arguments)
    whole = args.shape == "7b" and not args.only
    folders = [folder for folder in (RESULTS if whole else None, args.out) if folder]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(JOBS[args.shape], [folder / f"gpu_{args.shape}.csv" for folder in folders], args.minutes)
    for name, (work, estimate) in SECTIONS.items():
        if name in ("facts", *(args.only or SECTIONS)):
            bench.run(name, work, estimate if GPU else 0)
    bench.show()
    return bench.rows


if __name__ == "__main__":
    main(sys.argv[1:])
