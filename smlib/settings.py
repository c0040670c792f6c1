"""Every number a run depends on, and the named sets of them:

- `tiny` (the tutorial), `smoke` (for tests), `tiny-lora` (LoRA adapters over one base, as a large model is trained);
- for one GPU `llama2-7b` (80 GB), `llama2-7b-40gb`, `llama2-7b-24gb` (a 4-bit base), and `small` (half a billion
  weights); `rehearsal` is `llama2-7b` in miniature, to be run on a laptop before a GPU is rented;
- for Self-Explore as its paper has it `mistral-7b`, `llemma-7b` and `deepseek-math-7b`.

settings = preset("tiny", task="coin_flip", seed=1)
settings = preset("tiny", sampling={"temperature": 0.7}, reward={"pairs": "base"})
settings = preset("llama2-7b", task="gsm8k", base="some/model@revision")
"""

import sys
from dataclasses import dataclass, fields, is_dataclass, replace

from smlib.encoding import PROMPTS
from smlib.errors import UsageError
from smlib.explore import CHOICES
from smlib.ppo import PPOSettings
from smlib.problems import TASKS, TRAIN_SETS
from smlib.prompts import SOURCES
from smlib.sampling import MAX_BATCH


def _check(what: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise UsageError(f"{what} {value!r} is unknown; choose one of: {', '.join(map(str, allowed))}.")


@dataclass(frozen=True)
class SamplingSettings:
    """Stage 1. The temperature, cut-off and length hold for every sampling of training rationales."""

    questions: int = 300  # per task; of a published dataset at most its train split
    samples: int = 8  # open rationales per question
    conditioned_questions: int = 100  # of them, the first so many per task are also asked with a given answer
    conditioned_samples: int = 2  # rationales for the gold answer, and as many for wrong ones
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    shots: str = "none"  # exemplars before the base's questions: "none", "smlib" (ours) or "wei" (Wei et al.)
    prompt: str = "plain"  # how every stage asks: "plain" ("Q: ... A:"), or "chat", an instruct model's own template

    def __post_init__(self):
        _check("sampling.shots", self.shots, ("none", *SOURCES))
        _check("sampling.prompt", self.prompt, PROMPTS)


@dataclass(frozen=True)
class RankingSettings:
    """Stage 3. How much of one question is kept."""

    max_per_side: int = 8  # distinct rationales of a question, right and wrong each
    max_pairs_per_question: int = 6


@dataclass(frozen=True)
class SFTSettings:
    """Supervised fine-tuning on r+, the rationales that reach the gold answer."""

    source: str = "both"  # whose r+: "open", "conditioned" or "both"
    epochs: float = 1.0
    learning_rate: float = 6e-4
    batch: int = 16

    def __post_init__(self):
        _check("sft.source", self.source, ("open", "conditioned", "both"))


@dataclass(frozen=True)
class RewardSettings:
    """Stage 3. Which rationales make the pairs, and how the reward model learns from them."""

    pairs: str = "both"  # "base": sampled from the base alone; "both": from the SFT model too
    wrong: str = "both"  # source of the wrong rationales: "open", "conditioned" (on a wrong answer) or "both"
    questions: int = 350  # per task, fresh ones, that the SFT model answers; trained on where pairs = "both"
    epochs: float = 1.5
    learning_rate: float = 2e-4
    batch: int = 16
    beta: float = 0.5  # of the log-likelihood that is the reward (smlib/reward_model.py)
    nll_coef: float = 3.0  # of -log p per token of the chosen side, which is added to the pairwise loss

    def __post_init__(self):
        _check("reward.pairs", self.pairs, ("base", "both"))
        _check("reward.wrong", self.wrong, ("open", "conditioned", "both"))


@dataclass(frozen=True)
class ExploreSettings:
    """Self-Explore, stage 6, up to its pairs; the length of a sample is sampling.max_new_tokens."""

    samples: int = 12  # solutions per training question (the paper: 100)
    temperature: float = 0.7  # of the solutions and of the completions
    max_per_question: int = 8  # RFT solutions, and outcome pairs
    k: int = 4  # completions of a prefix; it is a pit if none of them is right
    choice: str = "shortest"  # of the right completions before the pit: "shortest", "random" or "most_likely"

    def __post_init__(self):
        _check("explore.choice", self.choice, CHOICES)
        for name in ("samples", "max_per_question", "k"):
            if getattr(self, name) < 1:
                raise UsageError(f"explore.{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True)
class DPOSettings:
    """Self-Explore, stage 6: DPO on outcome pairs and on step-level pairs.

    The paper trains both at one rate. A step-level pair tells its sides apart by few tokens, and bears larger steps.
    """

    epochs: float = 2.0
    learning_rate: float = 3e-4  # on outcome pairs
    step_learning_rate: float = 6e-4  # on step-level pairs
    batch: int = 32  # pairs
    beta: float = 1.0


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters in place of full fine-tuning, in all stages that train: SFT, RFT and DPO (merged at their end),
    the reward model and PPO (adapters of the SFT model, which stays as it is)."""

    rank: int = 0  # 0: full fine-tuning
    alpha: int = 32  # the adapter counts alpha / rank times
    targets: str = "all-linear"

    def __post_init__(self):
        if self.rank < 0:
            raise UsageError(f"lora.rank {self.rank} is not allowed; give 0 for full fine-tuning, or a rank from 1.")


@dataclass(frozen=True)
class EvaluationSettings:
    """Stage 5. Fresh questions, one greedy answer and `samples` drawn ones to each."""

    questions: int = 200  # per task; of a published dataset at most its test split
    published: int = 750  # of each published test set at most, 0 = leave them out
    samples: int = 8
    temperature: float = 1.0


@dataclass(frozen=True)
class HardwareSettings:
    """What a large model needs to fit a GPU, and who draws; with all but `weights` and the engines the results are the
    same up to rounding."""

    weights: str = "float32"  # precision that models are loaded in; "bfloat16", in which merging an adapter rounds; or
    # "nf4": 4 bits a weight (QLoRA, 2305.14314), by the extra gpu; stages write bfloat16, rounded anew when loaded
    micro_batch: int = 0  # rows (pairs, completions) per forward and backward pass; 0 = the batch at once
    recompute: bool = False  # activations in the backward pass: less memory, more time
    rollout_rows: int = MAX_BATCH  # completions that the native sampler draws at once
    cache_tokens: int = 0  # tokens whose keys and values it holds outside PPO; 0 = no bound but the rows
    cuda_graphs: bool = False  # whether it records its steps on a GPU, to launch each at once
    engine: str = "native"  # who samples; "vllm", or "auto": vllm where it is installed, and native for nf4
    rollout_engine: str = "native"  # who draws PPO's rollouts, the same; vllm is for adapters in one process
    workers: int = 1  # processes of Ray's that sample and score, on one machine or many; 1 = without Ray

    def __post_init__(self):
        _check("hardware.weights", self.weights, ("float32", "bfloat16", "nf4"))
        for name in ("engine", "rollout_engine"):
            _check(f"hardware.{name}", getattr(self, name), ("native", "vllm", "auto"))
        for name, least in (("micro_batch", 0), ("rollout_rows", 1), ("cache_tokens", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"hardware.{name} is {getattr(self, name)}, but must be at least {least}")


@dataclass(frozen=True)
class Settings:
    """One run. `base` is "tiny" (the model in this package), a folder, or a hub id, best with "@" and a revision."""

    preset: str
    tasks: tuple[str, ...]
    seed: int
    base: str
    sampling: SamplingSettings
    ranking: RankingSettings
    sft: SFTSettings
    reward: RewardSettings
    ppo: PPOSettings
    evaluation: EvaluationSettings
    explore: ExploreSettings
    dpo: DPOSettings
    lora: LoraSettings = LoraSettings()
    hardware: HardwareSettings = HardwareSettings()

    def __post_init__(self):
        if self.hardware.weights != "float32" and not self.lora.rank:
            raise UsageError(
                f"hardware.weights = {self.hardware.weights!r} with lora.rank = 0 would train weights of three digits "
                "or fewer, in which small updates are lost: give lora.rank from 1, or hardware.weights = 'float32'"
            )
        if self.hardware.rollout_engine == "vllm" and (not self.lora.rank or self.hardware.weights == "nf4"):
            raise UsageError(
                "hardware.rollout_engine = 'vllm' takes over adapters of a base that is not rounded to 4 bits: give "
                "lora.rank from 1 and other hardware.weights, or rollout_engine = 'native'"
            )
        if self.sampling.shots != "none" and "chain_arithmetic" in self.tasks:
            raise UsageError(
                f"preset {self.preset!r} shows exemplars (sampling.shots = {self.sampling.shots!r}), and task "
                "'chain_arithmetic' has none: choose another task, such as gsm8k, or sampling.shots = 'none'"
            )


PRESETS = {
    "tiny": {
        "sampling": SamplingSettings(),
        "ranking": RankingSettings(),
        "sft": SFTSettings(),
        "reward": RewardSettings(),
        "ppo": PPOSettings(),
        "evaluation": EvaluationSettings(),
        "explore": ExploreSettings(),
        "dpo": DPOSettings(),
    },
    "smoke": {
        "sampling": SamplingSettings(questions=16, samples=4, conditioned_questions=8, conditioned_samples=1),
        "ranking": RankingSettings(),
        "sft": SFTSettings(epochs=1.0, batch=8),
        "reward": RewardSettings(questions=8, epochs=1.0, batch=8),
        "ppo": PPOSettings(updates=2, episodes=16, samples_per_question=4, minibatch=8, warmup_updates=1),
        "evaluation": EvaluationSettings(questions=8, published=8, samples=2),
        "explore": ExploreSettings(samples=4, k=2),
        "dpo": DPOSettings(epochs=1.0, batch=8),
    },
}

_LORA_RATES = {  # adapters start at zero and want larger steps than the weights themselves
    "sft": replace(PRESETS["tiny"]["sft"], learning_rate=6e-3),
    "reward": replace(PRESETS["tiny"]["reward"], learning_rate=2e-3),
    "ppo": replace(PRESETS["tiny"]["ppo"], value="model", learning_rate=2.5e-3, value_learning_rate=2.5e-3),
    "dpo": replace(PRESETS["tiny"]["dpo"], learning_rate=3e-3, step_learning_rate=6e-3),
}
PRESETS["tiny-lora"] = PRESETS["tiny"] | _LORA_RATES | {"lora": LoraSettings(rank=16)}


# Self-Explore's paper (2404.10346) trains all weights on four GPUs of 80 GB, at 1e-5 for SFT and 1e-6 for DPO (Mistral
# at a tenth of that), and lets SFT's rate fall by a line. Here adapters learn, on one GPU, at ten times these rates, in
# SFT by a cosine; nobody tuned that at this size. Mistral gets no lower ones: merged into bfloat16 weights of 0.02,
# 29 % is kept of an adapter's changes of 1e-5, and 99 % of those of 1e-4.
_DPO = DPOSettings(epochs=3.0, learning_rate=1e-5, step_learning_rate=1e-5, batch=32, beta=0.1)
_CARD = HardwareSettings(weights="bfloat16", micro_batch=4, recompute=True, rollout_rows=128, engine="auto")
_FULL_CARD = replace(
    _CARD, micro_batch=8, rollout_rows=256, cache_tokens=90_000, rollout_engine="auto"
)  # 80 GB hold the base twice


def _self_explore(base: str, rollout_rows: int) -> dict:
    """Self-Explore as its paper has it, with adapters. Stage 0 learns from the base's own right rationales alone."""
    return {
        "base": base,
        "sampling": SamplingSettings(
            questions=10_000, samples=4, conditioned_questions=0, temperature=0.7, max_new_tokens=512, shots="smlib"
        ),
        "ranking": RankingSettings(),
        "sft": SFTSettings(source="open", epochs=5.0, learning_rate=1e-4, batch=64),
        "reward": RewardSettings(learning_rate=1e-4),
        "ppo": PPOSettings(
            value="model", minibatch=16, learning_rate=1e-5, value_learning_rate=1e-4, precision="bfloat16",
            max_new_tokens=512,
        ),
        "evaluation": EvaluationSettings(questions=10_000, published=0, samples=0),
        "explore": ExploreSettings(samples=100, temperature=0.7, max_per_question=8, k=4),
        "dpo": _DPO,
        "lora": LoraSettings(rank=16),
        "hardware": replace(_CARD, rollout_rows=rollout_rows),
    }  # fmt: skip


# Self-motivated Learning on one GPU. Of the paper (2404.07017) we have the model alone: the numbers are ours and
# nobody tuned them. GSM8K's 7,473 train questions go to stage 01 (4,000), stage 03 (2,000) and PPO (the rest, twice).
_LLAMA = {
    "base": "meta-llama/Llama-2-7b-hf@01c7f73d771dfac7d292323805ebc428287df4f9",
    "sampling": SamplingSettings(
        questions=4_000, samples=8, conditioned_questions=1_000, temperature=0.8, max_new_tokens=256, shots="smlib"
    ),
    "ranking": RankingSettings(max_per_side=4),
    "sft": SFTSettings(epochs=3.0, learning_rate=1e-4, batch=64),
    "reward": RewardSettings(questions=2_000, epochs=1.0, learning_rate=5e-5, batch=32),
    "ppo": PPOSettings(
        value="model", updates=100, episodes=256, minibatch=32, learning_rate=1e-5, value_learning_rate=1e-4,
        precision="bfloat16", max_new_tokens=256,
    ),
    "evaluation": EvaluationSettings(questions=10_000, published=10_000, samples=4),
    "explore": ExploreSettings(samples=32, temperature=0.7),
    "dpo": _DPO,
    "lora": LoraSettings(rank=16),
    "hardware": _FULL_CARD,
}  # fmt: skip

# Llama's keys and values take half a MiB a token. All stages fit with a tenth to spare, by smlib.memory
# (results/memory_stages_7b.csv); nobody measured it.
# Mistral keeps a quarter of the others' keys and values.
LARGE = {
    "llama2-7b": _LLAMA,
    "llama2-7b-40gb": _LLAMA | {"hardware": replace(_CARD, rollout_rows=128, cache_tokens=32_000)},
    "llama2-7b-24gb": _LLAMA | {"hardware": replace(_CARD, weights="nf4", rollout_rows=64, cache_tokens=24_000)},
    "small": _LLAMA | {
        "base": "Qwen/Qwen2.5-0.5B@060db6499f32faf8b98477b0a26969ef7d8b9987",
        "hardware": replace(_CARD, micro_batch=2, rollout_rows=64),
    },
    "mistral-7b": _self_explore("mistralai/Mistral-7B-v0.1@27d67f1b5f57dc0953326b2601d68371d40ea8da", 128),
    "llemma-7b": _self_explore("EleutherAI/llemma_7b@e223eee41c53449e6ea6548c9b71c50865e4a85c", 32),
    "deepseek-math-7b": _self_explore("deepseek-ai/deepseek-math-7b-base@036a8c6189aac6e2fc4e07b46e1e57c6b647bca5", 32),
}  # fmt: skip
PRESETS |= LARGE

# The tiny base in place of a large one, few questions, rates for its size: every path of code that `llama2-7b` takes.
PRESETS["rehearsal"] = _LLAMA | {
    "base": "tiny",
    "sampling": SamplingSettings(questions=24, samples=4, conditioned_questions=8, conditioned_samples=1),
    "sft": SFTSettings(epochs=3.0, learning_rate=6e-3, batch=16),
    "reward": RewardSettings(questions=12, epochs=1.0, learning_rate=2e-3, batch=16),
    "ppo": replace(
        _LLAMA["ppo"], updates=2, episodes=32, minibatch=16, warmup_updates=1, learning_rate=2.5e-3,
        value_learning_rate=2.5e-3, max_new_tokens=128,
    ),
    "evaluation": EvaluationSettings(questions=12, published=12, samples=2),
    "explore": ExploreSettings(samples=6, k=2),
    "dpo": DPOSettings(epochs=1.0, learning_rate=3e-3, step_learning_rate=6e-3, batch=16),
    "hardware": replace(_CARD, micro_batch=4, rollout_rows=64, engine="native"),
}  # fmt: skip


def default_task(name: str) -> str:
    """What a preset is for where nothing is said: GSM8K for large models, else all generated tasks."""
    return "gsm8k" if name in LARGE else "all"


def preset(name: str, task: str = "all", seed: int = 0, **overrides) -> Settings:
    """Settings of a named preset for one task, or for "all" of the generated ones.

    task: a generated one (TASKS) or a published dataset with a train split (TRAIN_SETS). overrides: a field of
    Settings, or for a group a dict of its fields: `ppo={"updates": 10}`, `base="..."`.
    """
    _check("preset", name, tuple(PRESETS))
    _check("task", task, ("all", *TASKS, *TRAIN_SETS))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed {seed!r} is not allowed; give a whole number from 0.")
    tasks = TASKS if task == "all" else (task,)
    settings = Settings(**{"preset": name, "tasks": tasks, "seed": seed, "base": "tiny"} | PRESETS[name])
    if name in LARGE and task == "math":
        longer, hardware = 1_024, settings.hardware  # its solutions are long, and take the room of as many more rows
        rows = hardware.rollout_rows * settings.sampling.max_new_tokens // longer
        fewer = {"rollout_rows": rows, "micro_batch": hardware.micro_batch // 2}
        lengths = {group: {"max_new_tokens": longer} for group in ("sampling", "ppo")}
        settings = _override(settings, lengths | {"hardware": fewer}, "")
    return _override(settings, overrides, "")


def _override(settings, values: dict, prefix: str):
    arguments = ("preset", "tasks", "seed")  # of preset(), which checks them
    known = tuple(field.name for field in fields(settings) if field.name not in arguments)
    changes = {}
    for name, value in values.items():
        _check("setting", prefix + name, tuple(prefix + field for field in known))
        old = getattr(settings, name)
        if is_dataclass(old) and isinstance(value, dict | type(old)):
            changes[name] = _override(old, value if isinstance(value, dict) else vars(value), f"{name}.")
        else:
            changes[name] = as_declared(f"setting {prefix}{name}", value, old)
    return replace(settings, **changes)


def as_declared(name: str, value, like):
    """The value in the type of `like`, in whose place it comes: 2 where a whole number is declared and 2.0 where a
    fraction is, however it is written, so that a setting has one form and its stage one fingerprint.

    Raises UsageError where it is of another type, a bool for a number included, and where it is no finite number.
    """
    kind = type(like)
    if kind in (int, float) and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:  # nor is NaN
            raise UsageError(f"{name} = {value!r} is no finite number; give one, such as {like!r}.")
        if kind is float or value == int(value):
            return kind(value)
    elif isinstance(value, kind) and (kind is bool) == (type(value) is bool):
        return value
    raise UsageError(
        f"{name} = {value!r} is of type {type(value).__name__}; give one of type {kind.__name__}, such as {like!r}."
    )
