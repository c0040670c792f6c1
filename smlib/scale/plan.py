"""What a run will take, before anything is loaded: samples, tokens, memory, hours and disk, stage by stage.

    settings = preset("llama2-7b", "gsm8k")
    print(describe(settings))                  # smlib run --preset llama2-7b --task gsm8k --dry-run
    check(settings)                            # raises DoesNotFit, with the settings to change
    at = measure(settings, folder)             # speeds of the model in a folder, on this machine
    {one.stage: hours(one, at) for one in work(settings)}
    print(describe(settings, at))              # the same, with the hours on this machine

Tokens come from the questions themselves; how many rationales will be right, how long they get and how fast a card is
has to be assumed: the assumptions are the constants below, and `describe` prints them. Once a model is there, `measure`
takes the speeds' place. notebooks/08_on_a_gpu.ipynb holds both to what was measured on a CPU.
"""

import os
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from statistics import mean

import psutil
import torch
from scipy.stats import betabinom
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from smlib.errors import UsageError
from smlib.learning import reward_model
from smlib.learning.trainers import micro_batch_rows
from smlib.ppo import batches, checks
from smlib.problems import prompts
from smlib.problems.datasets import GENERATED, GROUPS, STEPLESS, TASKS
from smlib.runs import questions, shared
from smlib.runs.questions import training_problems
from smlib.runs.settings import Settings
from smlib.sampling import devices, encoding, models, packing
from smlib.sampling.engines import NativeEngine, check_installed
from smlib.sampling.params import SamplingParams, check_room
from smlib.scale import memory

# ---- what is assumed -----------------------------------------------------------------------------------------

SPREAD = 1.0  # a + b of the beta distribution of a question's share of right samples: at 1 most are near 0 or 1
STEPS = 3.5  # prefixes explored of a wrong rationale; at k = 4 half of the completions are drawn, of half a rationale
DRAW_SHARE, READ_SHARE, TRAIN_SHARE = 0.6, 0.5, 0.4  # reached of bandwidth (drawing) and of operations (the others)
LAUNCH = 0.7e-3  # seconds per layer and step that transformers takes at least; 32 layers: 22 ms
BUSY = 0.9  # rows of the sampler that still draw, on average (measured on a CPU: 227 of 256)
ASKED = 10_000  # questions of a task that are looked at for their lengths
WIDTH = 108  # characters of the plan's lines, but for the table's with this machine's hours
TRAINED = 8  # micro batches that `measure` trains on
VLLM_ROWS = 256  # that vLLM draws at once; it starts its kernels as a graph, and LAUNCH does not hold


@dataclass(frozen=True)
class Assumed:
    """What the model will write. By default Llama-2-7B on GSM8K, of which 14.6 % are published for eight exemplars,
    greedy, and 41.6 % for SFT on gold solutions; gold solutions have 98 tokens (of Mistral's 32,000),
    text-davinci-002's rationales of eleven datasets 90 to 153."""

    base: float = 0.15  # share of right samples
    tuned: float = 0.4  # the same, of the tuned model
    distinct: float = 0.95  # share of a question's samples that repeats no other
    solution: float = 120.0  # tokens of a rationale


WORD_PROBLEMS = ("word_problems", *GROUPS["word_problems"])
# Bases whose runs are known, on these tasks: tiny's of seed 0; SmolLM2's in docs/log.md and results/smollm2_tuning.csv
MEASURED = (
    ("tiny", TASKS, Assumed(base=0.52, tuned=0.69, distinct=0.48, solution=55.0)),
    ("smollm2", WORD_PROBLEMS, Assumed(base=0.03, tuned=0.04, distinct=0.85, solution=32.0)),
)


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet: bytes, bytes a second, dense bfloat16 operations a second."""

    memory: float
    bandwidth: float
    operations: float


CARDS = {
    "RTX 4090": Card(24e9, 1.008e12, 165e12),
    "A100 40 GB": Card(40e9, 1.555e12, 312e12),
    "A100 80 GB": Card(80e9, 2.039e12, 312e12),
    "H100 80 GB": Card(80e9, 3.35e12, 989e12),
}


def _shape(kind=LlamaConfig, **shape):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = dict(zip((*names, "vocab_size"), shape.pop("numbers"), strict=True))
    return kind(**numbers, **shape)


CONFIGS = {  # of the presets' models, whose config.json may be behind a licence or a missing network
    "meta-llama/Llama-2-7b-hf": memory.LLAMA_2_7B,
    "mistralai/Mistral-7B-v0.1": _shape(MistralConfig, numbers=(4096, 14336, 32, 32, 8, 32000)),
    "EleutherAI/llemma_7b": _shape(numbers=(4096, 11008, 32, 32, 32, 32016)),
    "deepseek-ai/deepseek-math-7b-base": _shape(numbers=(4096, 11008, 30, 32, 32, 102400)),
    "Qwen/Qwen2.5-0.5B": _shape(Qwen2Config, numbers=(896, 4864, 24, 14, 2, 151936), tie_word_embeddings=True),
}


def assumed_of(settings: Settings) -> Assumed:
    """What is known of the base on these tasks (MEASURED), else the defaults."""
    for base, tasks, found in MEASURED:
        if base == settings.base and {*settings.tasks} <= {*tasks}:
            return found
    return Assumed()


def config_of(base: str):
    """The shape of a model, of an adapter that of its base: of the presets' known here, of others read from a folder or
    the hub."""
    name = models.whole_model(base)
    return CONFIGS.get(name.partition("@")[0]) or models.load_config(name)


# ---- lengths -------------------------------------------------------------------------------------------------


def estimated_tokens(text: str) -> float:
    """Tokens of a text in a vocabulary of 32,000 that spells numbers by digits, as Llama's and Mistral's do.

    Pieces of at most seven letters, digits, signs and line ends, and a tenth more: within 10 % of Mistral's tokenizer
    on the questions, exemplars and published rationales of twelve datasets.
    """
    return 1.1 * len(re.findall(r"[A-Za-z]{1,7}|\d|[^\sA-Za-z\d]|\n", text))


@dataclass(frozen=True)
class Lengths:
    """Tokens; of questions the mean over the training set, and the longest."""

    question: float
    longest: float
    shown: float  # of the exemplars before an open question
    conditioned: float  # before one with a given answer
    solution: float

    @property
    def prompts(self) -> dict[str, int]:
        """Of the longest prompts, without and with exemplars, as `memory.stages` takes them."""
        shown = self.longest + max(self.shown, self.conditioned)
        return {"prompt": round(self.longest), "shown": round(shown)}


def token_lengths(settings: Settings, solution: float = Assumed.solution) -> Lengths:
    """Lengths of the run's training questions, of each task the first ASKED: exact for a base whose tokenizer is in a
    folder, else estimated."""
    few = replace(settings.sampling, questions=min(settings.sampling.questions, ASKED))
    problems = questions.training_problems(replace(settings, sampling=few))
    count: Callable[[str], float] = estimated_tokens
    if models.weights_sha256(settings.base):
        tokenizer = shared.load_tokenizer(settings)
        asked = [len(encoding.encode_question(tokenizer, problem)) for problem in problems]
        count = lambda text: len(encoding.encode_prompt(tokenizer, text))  # noqa: E731
    else:
        asked = [count(prompts.open_prompt(problem)) for problem in problems]
    shots, datasets = settings.sampling.shots, list(dict.fromkeys(problem.dataset for problem in problems))
    return Lengths(
        mean(asked),
        max(asked),
        mean(count(prompts.shots(dataset, shots)) for dataset in datasets) if shots != "none" else 0.0,
        mean(count(prompts.shots(dataset, shots, conditioned=True)) for dataset in datasets)
        if shots != "none"
        else 0.0,
        min(solution, settings.sampling.max_new_tokens),
    )


# ---- work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a stage has a model do: completions, and tokens by what is done with them."""

    stage: str
    samples: float = 0.0
    read: float = 0.0  # of prompts, before anything is drawn
    drawn: float = 0.0
    scored: float = 0.0  # without gradients
    trained: float = 0.0  # forward and backward


def expected(samples: int, right: float, distinct: float, value: Callable[[int, int], float]) -> float:
    """The mean, over questions, of value(right ones, wrong ones) among the distinct samples of a question, whose share
    of right ones is beta distributed with mean `right` (SPREAD)."""
    different = max(round(samples * distinct), 1)
    right_ones = betabinom(different, right * SPREAD, (1 - right) * SPREAD)
    shares = right_ones.pmf(range(different + 1))
    return float(sum(share * value(n, different - n) for n, share in enumerate(shares)))


def work(settings: Settings, assumed: Assumed | None = None) -> list[Work]:
    """Every stage that runs a model, in order; without stages 03 to 05 where no question is left for them.

    assumed: by default `assumed_of` the settings, as in all that follows.
    """
    assumed = assumed or assumed_of(settings)
    lengths = token_lengths(settings, assumed.solution)
    try:
        fresh = _number(settings, settings.reward.questions, questions.second_problems)
    except UsageError:
        fresh = 0
    motivated = _motivated(settings, lengths, assumed, fresh)
    return [*(motivated if fresh else motivated[:2]), *_explored(settings, lengths, assumed)]


def _number(settings: Settings, each: int, problems: Callable[[Settings], list]) -> int:
    """How many questions `problems` gives, `each` for every task; generated ones need not be made to be counted."""
    return each * len(settings.tasks) if settings.tasks[0] in GENERATED else len(problems(settings))


def _trained_on(settings: Settings) -> int:
    return _number(settings, settings.sampling.questions, questions.training_problems)


def _motivated(settings: Settings, lengths: Lengths, assumed: Assumed, fresh: int) -> list[Work]:
    """Stages 01 to 05; fresh: questions of stage 03."""
    drawing, ranked, ppo = settings.sampling, settings.ranking, settings.ppo
    questions, text = _trained_on(settings), lengths.question + lengths.solution
    hinted = len(settings.tasks) * min(drawing.conditioned_questions, questions) * 2 * drawing.conditioned_samples
    opened = questions * drawing.samples
    again = 16  # tokens of an answer that is read off a rationale
    exemplars = len(settings.datasets) * (2 * lengths.shown + lengths.conditioned)  # all prompts share them
    held_out = 1 / 8  # of the pairs (ranking.held_out)
    limit = ranked.max_per_side

    def paired(right: int, wrong: int) -> int:
        return min(wrong, limit, ranked.max_pairs_per_question) if right else 0

    learned = questions * expected(drawing.samples, assumed.base, assumed.distinct, lambda right, _: min(right, limit))
    pairs = questions * expected(drawing.samples, assumed.base, assumed.distinct, paired)
    if settings.reward.pairs == "both":
        pairs += fresh * expected(drawing.samples, assumed.tuned, assumed.distinct, paired)
    learned, pairs = learned + hinted / 2, pairs + hinted / 2  # at most: given a right answer, given a wrong one
    episodes = ppo.updates * ppo.episodes
    trunks = 2 if ppo.value == "model" else 1  # a pass of the policy, and one of the value
    shared = lengths.question / 4 + lengths.solution  # four completions of a question share its tokens in a row
    prefixes = episodes * STEPS if ppo.value == "rollouts" else 0
    tries = prefixes * ppo.value_samples  # completions of half a rationale, on average
    begun = lengths.question + lengths.solution / 2
    passes = trunks + 1 + batches.rounds(ppo) * trunks  # reference and value, old log-probabilities, reward
    return [
        Work(
            "01_sampling", opened + 2 * hinted,
            exemplars + (questions + 2 * hinted) * lengths.question + hinted * lengths.solution,
            (opened + hinted) * lengths.solution + hinted * again,
        ),
        Work("02_sft", trained=learned * text * settings.sft.epochs),
        Work(
            "03_second_sampling", fresh * drawing.samples, fresh * lengths.question,
            fresh * drawing.samples * lengths.solution,
        ),
        Work(
            "03_reward_model", scored=held_out * pairs * 2 * text,
            trained=(1 - held_out) * pairs * (lengths.question + 2 * lengths.solution) * settings.reward.epochs,
        ),
        Work(
            "04_ppo", episodes + tries,
            episodes / ppo.samples_per_question * lengths.question + prefixes * begun,
            (episodes + tries / 2) * lengths.solution,
            episodes * shared * passes + tries * shared, episodes * shared * trunks * ppo.epochs,
        ),
        _evaluation("05_evaluation", settings, lengths, first=True),
    ]  # fmt: skip


def _explored(settings: Settings, lengths: Lengths, assumed: Assumed) -> list[Work]:
    """Stages 06, of Self-Explore."""
    explored, dpo = settings.explore, settings.dpo
    questions, text = _trained_on(settings), lengths.question + lengths.solution
    drawn = questions * explored.samples
    limit = explored.max_per_question
    share = (explored.samples, assumed.tuned, assumed.distinct)
    solved = questions * expected(*share, lambda right, _: min(right, limit))
    pairs = questions * expected(*share, lambda right, wrong: min(wrong, limit) if right else 0)
    tries = pairs * STEPS * explored.k / 2
    step = lengths.solution / STEPS
    return [
        Work("06_solutions", drawn, questions * lengths.question, drawn * lengths.solution),
        Work("06_rft", trained=solved * text * settings.sft.epochs),
        Work(
            "06_exploration", tries, pairs * STEPS * (lengths.question + lengths.solution / 2),
            tries * lengths.solution / 2,
        ),
        Work(
            "06_step_dpo", scored=pairs * (2 * text - lengths.solution + step) * dpo.epochs,
            trained=pairs * (2 * text - lengths.solution + step) * dpo.epochs,
        ),
        Work("06_outcome_dpo", scored=pairs * 2 * text * dpo.epochs, trained=pairs * 2 * text * dpo.epochs),
        _evaluation("06_evaluation", settings, lengths, first=False),
    ]  # fmt: skip


def _evaluation(stage: str, settings: Settings, lengths: Lengths, first: bool) -> Work:
    """In the first of the two the base reads exemplars, once, and the reward model scores what was sampled."""
    published, _ = questions.published_problems(settings)
    methods = 3  # in each of the two stages
    sampled = _number(settings, settings.evaluation.questions, _tested)
    asked = sampled + sum(map(len, published.values()))
    samples = methods * (asked + sampled * settings.evaluation.samples)
    read = methods * asked * lengths.question + first * len(settings.datasets) * lengths.shown
    scored = first * methods * sampled * settings.evaluation.samples * (lengths.question / 4 + lengths.solution)
    return Work(stage, samples, read, samples * lengths.solution, scored)


def _tested(settings: Settings) -> list:
    return [problem for problems in questions.test_problems(settings).values() for problem in problems]


# ---- speed and time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """Tokens a second, by what is done with them as in `Work`, and of those drawn in PPO, maybe by another engine."""

    read: float
    drawn: float
    scored: float
    trained: float
    rolled: float


def speeds(config, settings: Settings, card: Card, lengths: Lengths) -> Speeds:
    """Computed from a card's data sheet: nothing of it was measured.

    With P weights a token takes 2 P operations forward; backward 2 P with frozen weights (LoRA) and 4 P without, and
    2 P more where activations are computed again. A step of drawing reads all weights and the rows' keys and values; of
    a 4-bit base it also writes and reads them in bfloat16.
    """
    counts = memory.parameters(config)
    weights = counts["linear"] + (counts["head"] or counts["embedding"])
    forward, hardware = 2 * weights, settings.hardware
    backward = forward * (1 if settings.lora.rank else 2) + (forward if hardware.gradient_checkpointing else 0)
    dtype = "bfloat16" if hardware.dtype == "auto" else hardware.dtype  # what any card is faster with
    read_bytes = memory.model_bytes(config, dtype) + (4 * counts["linear"] if dtype == "nf4" else 0)
    cache = 2 * config.num_hidden_layers * memory.widths(config)[3] * (4 if dtype == "float32" else 2)

    def drawn(engine: str) -> float:
        rows = VLLM_ROWS if engine == "vllm" else hardware.max_batch
        launch = 0.0 if engine == "vllm" else LAUNCH * config.num_hidden_layers
        moved = read_bytes + rows * cache * (lengths.question / settings.sampling.samples + lengths.solution / 2)
        step = max(moved / card.bandwidth, forward * rows / card.operations) / DRAW_SHARE + launch
        return BUSY * rows / step

    alone, beside = (drawn(shared.engine_name(settings, who)) for who in ("engine", "rollout_engine"))
    read = READ_SHARE * card.operations / forward
    return Speeds(read, alone, read, TRAIN_SHARE * card.operations / (forward + backward), beside)


def hours(done: Work, at: Speeds) -> float:
    drawing = at.rolled if done.stage == "04_ppo" else at.drawn
    by_kind = (at.read, drawing, at.scored, at.trained)
    return sum(tokens / speed for tokens, speed in zip(astuple(done)[2:], by_kind, strict=True)) / 3600


def _hours_minutes(time: float) -> str:
    """Hours as a text, 1.5 as "1:30"."""
    return "{}:{:02}".format(*divmod(round(60 * time), 60))


def measurable(settings: Settings) -> bool:
    """Whether the base lies in a folder of this machine, and fits it, so that `measure` may load and train it."""
    if not models.weights_sha256(models.whole_model(settings.base)):
        return False
    config = config_of(settings.base)
    if not memory.supports(config):
        return False
    return fit(settings, config, token_lengths(settings), _free_memory()[0]).fits


def measure(settings: Settings, path: str, questions: int = 32, tokens: int = 0) -> Speeds:
    """Speeds of the native sampler, of scoring and of training on this machine, of the model in a folder or of the hub.

    A minute on a GPU, seconds with the tiny base: each of the four runs with the clock after a small one to warm up.
    tokens: of a completion, at most (0: as many as the settings allow).
    """
    tokenizer, model = shared.load_tokenizer(settings), shared.load_trainable(settings, path, "measure")
    problems = training_problems(settings)[:questions]
    hardware = settings.hardware
    drawing, dtype = model, shared.held_dtype(settings, samples=True)
    if dtype != shared.held_dtype(settings):
        drawing = models.load_policy(path, dtype)
    engine = NativeEngine(drawing, tokenizer, hardware.max_batch, hardware.cache_tokens)
    heads = [encoding.encode_question(tokenizer, problem) for problem in problems]

    def draw(samples: int, tokens: int) -> list:
        params = SamplingParams(temperature=1.0, max_new_tokens=tokens, seed=0)
        return engine.sample_ids(heads, samples, params, keys=[one.id for one in problems])

    samples, longest = settings.sampling.samples, settings.sampling.max_new_tokens
    tokens = min(tokens or longest, longest)
    reading, _ = _timed(lambda: draw(1, 1), lambda: draw(2, 2))
    both, drawn = _timed(lambda: draw(samples, tokens))  # reading and drawing
    texts = [(problem, one.text) for problem, group in zip(problems, drawn, strict=True) for one in group]

    def score(some: list) -> None:
        reward_model.score(model, tokenizer, *zip(*some, strict=True))

    scoring, _ = _timed(lambda: score(texts), lambda: score(texts[:samples]))
    rows = [
        (head, [encoding.closed(tokenizer, one.token_ids)])
        for head, group in zip(heads, drawn, strict=True)
        for one in group
    ]
    at_once = hardware.micro_batch or settings.sft.batch
    learned = sorted(rows, key=lambda row: len(row[0]) + len(row[1][0]))[:: -(-len(rows) // (TRAINED * at_once))]

    def train(some: list) -> None:
        _train(model, tokenizer, some, at_once, hardware.gradient_checkpointing)

    training, _ = _timed(lambda: train(learned), lambda: train(learned[:at_once]))
    read, made = sum(map(len, heads)), sum(len(one.token_ids) for group in drawn for one in group)
    # A token that is read takes no longer than one that is drawn, whatever a busy machine says.
    reading = min(reading, both * read / (read + made))
    drawing_speed = made / (both - reading)
    return Speeds(
        read=read / reading,
        drawn=drawing_speed,
        scored=sum(len(head) / samples + len(tail) for head, [tail] in rows) / scoring,
        trained=sum(len(head) + len(tail) for head, [tail] in learned) / training,
        rolled=drawing_speed,
    )


def _train(model, tokenizer, rows: list, at_once: int, gradient_checkpointing: bool) -> None:
    """Forward and backward over all rows, `at_once` at a time; no optimizer step."""
    if gradient_checkpointing:
        getattr(model, f"{models.CHECKPOINTING}_enable")({"use_reentrant": False})
    model.train()
    for start in range(0, len(rows), at_once):
        packed = packing.pack(rows[start : start + at_once], tokenizer.pad_token_id, model.device)
        packing.packed_logprobs(model, packed).mean().backward()
        model.zero_grad(set_to_none=True)
    model.eval()


def _timed(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> tuple[float, object]:
    """(seconds, what it gave); `before` warms up."""
    before()
    started = _clock()
    result = action()
    return _clock() - started, result


def _clock() -> float:
    """Now, when the GPU has done what it was given."""
    if devices.on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- memory and disk -----------------------------------------------------------------------------------------


class DoesNotFit(UsageError):
    """A run would not fit into memory; the message names the stage that needs most, and what to change."""


def peaks(settings: Settings, config, lengths: Lengths) -> dict[str, float]:
    """Stage -> bytes at its fullest moment, every rationale taken to reach its limit."""
    parts = memory.stages(config, settings, **lengths.prompts)
    return {stage: memory.total(sizes) for stage, sizes in parts.items()}


def check(settings: Settings, names: Iterable[str] = ()) -> None:
    """Raise DoesNotFit if one of the stages named, or any, needs more than the free memory of this machine's GPU, or of
    the machine without one; and ValueError if a later stage would refuse a setting for this model.

    A model whose memory cannot be computed (`memory.supports`) is not refused, and neither are weights that accelerate
    shards (FSDP, DeepSpeed): the computed sizes are those of unsharded ones.
    """
    names, config, hardware = list(names), config_of(settings.base), settings.hardware
    check_settings(settings, config, names)
    if not names or set(names) - set(shared.TRAINING):
        check_installed(hardware.engine, hardware.workers)
    if not names or "04_ppo" in names:
        check_installed(hardware.rollout_engine)
    if not memory.supports(config) or _sharded():
        return
    free, where = _free_memory()
    result = fit(settings, config, token_lengths(settings), free, names)
    if result.fits:
        return
    if devices.on_gpu():
        raise DoesNotFit(f"preset {settings.preset!r} on {where}: {result}")
    raise DoesNotFit(
        f"preset {settings.preset!r} needs {result.needed / 1e9:.1f} GB in {result.stage} (computed), and there is no "
        f"GPU here and {free / 1e9:.1f} GB of memory free: use a machine with a GPU, or a smaller model "
        "(--preset small, --model NAME). `smlib run --dry-run` shows what the run takes on which card."
    )


def check_settings(settings: Settings, config, names: Sequence[str] = ()) -> None:
    """Raise ValueError if one of the stages named, or any, would refuse a setting for this model, its questions or
    the number of processes."""
    if "translation" in settings.tasks and settings.base == "tiny":
        raise UsageError(
            "the base tiny has not read translations: make one that has, by `smlib pretrain --task translation "
            "--documents 40000 --out FOLDER`, and give --model FOLDER"
        )
    stepless = [task for task in settings.tasks if task in STEPLESS]
    if stepless and any(name.startswith("06") for name in names):
        raise UsageError(f"Self-Explore is for tasks with steps, and {stepless[0]} has none: choose another --task")
    _check_batches(settings, names, devices.process_state().num_processes)  # from here on each process sees its own GPU
    models.check_targets(config, settings.lora.rank, settings.lora.targets)
    check_room("sampling.max_new_tokens", settings.sampling.max_new_tokens, config)
    check_room("ppo.max_new_tokens", settings.ppo.max_new_tokens, config)
    if not names or {"06_exploration", "06_pit_report"} & set(names):
        check_room("sampling.max_new_tokens", settings.sampling.max_new_tokens, config, continued=True)
    if settings.ppo.value == "rollouts" and (not names or "04_ppo" in names):
        check_room("ppo.max_new_tokens", settings.ppo.max_new_tokens, config, continued=True)
    if not names or "04_ppo" in names:
        questions.ppo_questions_per_task(settings)
        if settings.tasks[0] not in GENERATED:
            questions.ppo_problems(settings)  # of a published dataset there may be too few


def _check_batches(settings: Settings, names: Sequence[str], processes: int) -> None:
    """Raise ValueError if a batch of the stages named, or of any, cannot be split into micro batches of one size."""
    rows = settings.hardware.micro_batch
    trainers = {"sft": ("02_sft", "06_rft"), "reward": ("03_reward_model",), "dpo": ("06_step_dpo", "06_outcome_dpo")}
    for group, stages in trainers.items():
        if not names or set(stages) & set(names):
            micro_batch_rows(getattr(settings, group).batch, rows, processes)
    if not names or "04_ppo" in names:
        checks.check_micro_batch(settings.ppo, processes, rows)


def _sharded() -> bool:
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def fit(settings: Settings, config, lengths: Lengths, capacity: float, names: Iterable[str] = ()) -> memory.Fit:
    """Whether the stages named, or all, fit into so many bytes, and if not, which settings to change."""
    return memory.fit(config, settings, capacity, names, **lengths.prompts)


def _free_memory() -> tuple[float, str]:
    """Bytes, less what CUDA itself and its workspaces take; and whose they are."""
    if devices.on_gpu():
        return torch.cuda.mem_get_info()[0] - 1e9, torch.cuda.get_device_name()
    return psutil.virtual_memory().available, "this machine"


def disk(settings: Settings, config, done: list[Work]) -> dict[str, float]:
    """Bytes on disk at the end of a run, by what they are."""
    weights = sum(memory.parameters(config).values())
    each = 4 if shared.held_dtype(settings) == "float32" else 2  # a 4-bit base is merged in bfloat16
    trained = memory.lora_parameters(config, settings.lora.rank) * 4 if settings.lora.rank else weights * each
    values = 2 if settings.ppo.value == "model" else 1
    return {
        "the base, downloaded": 0.0 if models.weights_sha256(settings.base) else 2 * weights,
        "four models: 02_sft, 06_rft, 06_outcome_dpo, 06_step_dpo": 4 * each * weights,
        "reward model, policy, value, and PPO's checkpoint with its moments": trained * (1 + 4 * values),
        "rationales and answers": sum(1e3 * one.samples + 6 * one.drawn for one in done),
    }


def rows(settings: Settings, assumed: Assumed | None = None) -> list[dict]:
    """The plan as rows, one for every stage and card: samples, tokens, GB at the fullest moment, and hours (None where
    the stage does not fit the card)."""
    assumed = assumed or assumed_of(settings)
    config, lengths = config_of(settings.base), token_lengths(settings, assumed.solution)
    needed, plan = peaks(settings, config, lengths), []
    at = {name: speeds(config, settings, card, lengths) for name, card in CARDS.items()}
    for one in work(settings, assumed):
        counts = {name: round(value) for name, value in asdict(one).items() if name != "stage"}
        row = {"preset": settings.preset, "task": " ".join(settings.tasks), "stage": one.stage} | counts
        row |= {"GB": round(needed[one.stage] / 1e9, 3)}
        for name, card in CARDS.items():
            fits = needed[one.stage] <= card.memory
            plan.append(row | {"card": name, "hours": round(hours(one, at[name]), 4) if fits else None})
    return plan


# ---- the plan as a text --------------------------------------------------------------------------------------

TOKENS = f"{'tokens, millions':>57}"  # above COUNTS, the columns that `_counts` fills
HERE, COLUMN = "here", 11  # of the hours' columns: the name of this machine's, and how wide they are
COUNTS = f"{'stage':19}{'samples':>8}{'read':>7}{'drawn':>7}{'scored':>8}{'trained':>8}"


def describe(settings: Settings, here: Speeds | None = None, assumed: Assumed | None = None) -> str:
    """The plan of a run on every card of CARDS: stages, samples, tokens, memory, hours, disk, and what was assumed.

    here: what this machine was measured to do; without it its hours are left out. Only samples and tokens for a model
    whose memory cannot be computed (`memory.supports`).
    """
    assumed = assumed or assumed_of(settings)
    config, lengths = config_of(settings.base), token_lengths(settings, assumed.solution)
    done = work(settings, assumed)
    if not memory.supports(config):
        return _describe_unsupported(settings, config, lengths, done, assumed)
    needed = peaks(settings, config, lengths)
    at = {name: speeds(config, settings, card, lengths) for name, card in CARDS.items()}
    room = {name: card.memory for name, card in CARDS.items()}
    if here:
        devices.free_memory()  # of the model that was measured
        at, room = {HERE: here} | at, {HERE: _free_memory()[0]} | room
    lines = [*textwrap.wrap(_headline(settings, config), WIDTH), "", *_header(at)]
    for stages, title in (("0[1-5]", "Self-motivated Learning"), ("06", "Self-Explore, after 01 and 02")):
        group = [one for one in done if re.match(stages, one.stage)]
        lines += [_line(one, needed[one.stage], at, room) for one in group]
        fitting = {name: max(needed[one.stage] for one in group) <= size for name, size in room.items()}
        sums = {name: sum(hours(one, at[name]) for one in group) for name in at}
        cells = "".join(f"{_hours_minutes(sums[name]) if fitting[name] else '-':>{COLUMN}}" for name in at)
        lines += [f"{title:57}{max(needed[one.stage] for one in group) / 1e9:7.1f}{cells}", ""]
    told = "Hours are computed from data sheets, not measured"
    if here:
        told = (
            f'Hours "{HERE}" are for this machine. Its native engine and one training process were measured just now, '
        )
        told += "without exemplars and with short completions. The other hours are from data sheets"
    lines += [*textwrap.wrap(f"{told}; - means that it does not fit.", WIDTH), ""]
    for name, size in room.items():
        result = f"{name}: {fit(settings, config, lengths, size)}"
        lines += textwrap.wrap(result, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    sizes = disk(settings, config, done)
    lines += ["", f"Disk: {sum(sizes.values()) / 1e9:.0f} GB"]
    lines += [f"  {size / 1e9:6.1f} GB  {what}" for what, size in sizes.items()]
    return "\n".join([*lines, "", *textwrap.wrap(_assumptions(settings, lengths, assumed), WIDTH)])


def _describe_unsupported(settings: Settings, config, lengths: Lengths, done: list[Work], assumed: Assumed) -> str:
    reason = (
        "Memory, hours and disk are computed for Llama (without biases), Mistral and Qwen2, not for a "
        f"{config.model_type!r} with these options. So smlib cannot check that it fits: watch the first minutes of "
        "every stage. If memory runs out, lower hardware.micro_batch or hardware.max_batch; the stage then resumes."
    )
    texts = (_headline(settings, config), reason, _assumptions(settings, lengths, assumed))
    head, reason, told = ("\n".join(textwrap.wrap(text, WIDTH)) for text in texts)
    return "\n".join([head, "", TOKENS, COUNTS, *map(_counts, done), "", reason, "", told])


def _headline(settings: Settings, config) -> str:
    start = f"{settings.preset} on {', '.join(settings.tasks)}: {settings.base}"
    if not memory.supports(config):
        return f"{start}, whose memory and hours cannot be computed"
    weights = sum(memory.parameters(config).values())
    size = f"{weights / 1e9:.2f} billion" if weights > 1e9 else f"{weights / 1e6:.1f} million"
    lora = f"LoRA of rank {settings.lora.rank}" if settings.lora.rank else "all weights trained"
    return f"{start}, {size} weights in {shared.held_dtype(settings, samples=True)}, {lora}"


def _header(names: Iterable[str]) -> list[str]:
    columns = "".join(f"{name:>{COLUMN}}" for name in names)
    return [f"{TOKENS}{'':7}{'hours:minutes':>{len(columns)}}", f"{COUNTS}{'GB':>7}{columns}"]


def _counts(one: Work) -> str:
    tokens = "".join(f"{amount / 1e6:{width}.2f}" for amount, width in zip(astuple(one)[2:], (7, 7, 8, 8), strict=True))
    return f"{one.stage:19}{one.samples:8,.0f}{tokens}"


def _line(one: Work, needed: float, at: dict[str, Speeds], room: dict[str, float]) -> str:
    told = (_hours_minutes(hours(one, at[name])) if needed <= room[name] else "-" for name in at)
    return f"{_counts(one)}{needed / 1e9:7.1f}" + "".join(f"{cell:>{COLUMN}}" for cell in told)


def _assumptions(settings: Settings, lengths: Lengths, assumed: Assumed) -> str:
    counted = "counted" if models.weights_sha256(settings.base) else "estimated"
    return (
        f"Tokens, {counted}: {lengths.question:.0f} in a question on average, {lengths.longest:.0f} in the longest, "
        f"{lengths.shown:.0f} in the exemplars, {lengths.conditioned:.0f} in those with given answers. "
        f"Assumed: {100 * assumed.base:.0f} % of the base's samples are right, {100 * assumed.tuned:.0f} % of the "
        f"tuned model's; {assumed.solution:.0f} tokens per rationale. Drawing reaches {100 * DRAW_SHARE:.0f} % of a "
        f"card's bandwidth, plus {1000 * LAUNCH:.1f} ms per layer and step; reading reaches {100 * READ_SHARE:.0f} % "
        f"of its operations, training {100 * TRAIN_SHARE:.0f} %."
    )
