"""Every number a run depends on, and the named sets of them:

- `tiny` (the tutorial), `smoke` (for tests), `tiny-lora` (LoRA adapters over one base, as a large model is trained);
- for one GPU `llama2-7b` (80 GB), `llama2-7b-40gb`, `llama2-7b-24gb` (a 4-bit base), and `small` (half a billion
  weights); `rehearsal` is `llama2-7b` in miniature, to be run on a laptop before a GPU is rented;
- for Self-Explore as its paper has it `mistral-7b`, `llemma-7b` and `deepseek-math-7b`.

settings = preset("tiny", task="coin_flip", seed=1)
settings = preset("tiny", sampling={"temperature": 0.7}, reward={"pairs": "base"})
settings = preset("llama2-7b", task="gsm8k", base="some/model@revision")
"""

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Literal

from smlib.declared import (
    Declared,
    Epochs,
    Held,
    Processes,
    Questions,
    QuestionsOrZero,
    Rate,
    Rows,
    RowsOrZero,
    Samples,
    SamplesOrZero,
    Seed,
    Share,
    Size,
    SizeOrZero,
    Temperature,
    Text,
    Tokens,
    checked,
    shown,
)
from smlib.encoding import PROMPTS
from smlib.errors import UsageError
from smlib.explore import CHOICES
from smlib.ppo import PPOSettings
from smlib.problems import TASKS, TRAIN_SETS
from smlib.prompts import SOURCES
from smlib.sampling import MAX_BATCH

Tasks = Literal["all", *TASKS, *TRAIN_SETS]
Engines = Literal["native", "vllm", "auto"]


@dataclass(frozen=True)
class SamplingSettings(Declared):
    """Stage 1. The temperature, cut-off and length hold for every sampling of training rationales."""

    questions: Questions = 300  # per task; of a published dataset at most its train split
    samples: Samples = 8  # open rationales per question
    conditioned_questions: QuestionsOrZero = 100  # of them, the first so many per task: asked with a given answer too
    conditioned_samples: Samples = 2  # rationales for the gold answer, and as many for wrong ones
    temperature: Temperature = 1.0
    top_p: Share = 1.0
    max_new_tokens: Tokens = 128
    shots: Literal["none", *SOURCES] = "none"  # exemplars before the base's questions: "smlib", ours, or Wei et al.'s
    prompt: Literal[*PROMPTS] = "plain"  # how every stage asks: "Q: ... A:"; or "chat", an instruct model's template


@dataclass(frozen=True)
class RankingSettings(Declared):
    """Stage 3. How much of one question is kept."""

    max_per_side: Samples = 8  # distinct rationales of a question, right and wrong each
    max_pairs_per_question: Samples = 6


@dataclass(frozen=True)
class SFTSettings(Declared):
    """Supervised fine-tuning on r+, the rationales that reach the gold answer."""

    source: Literal["open", "conditioned", "both"] = "both"  # whose r+
    epochs: Epochs = 1.0
    learning_rate: Rate = 6e-4
    batch: Rows = 16


@dataclass(frozen=True)
class RewardSettings(Declared):
    """Stage 3. Which rationales make the pairs, and how the reward model learns from them."""

    pairs: Literal["base", "both"] = "both"  # "base": sampled from the base alone; "both": from the SFT model too
    wrong: Literal["open", "conditioned", "both"] = "both"  # source of the wrong rationales
    questions: QuestionsOrZero = 350  # per task, fresh ones, that the SFT model answers; for pairs = "both"
    epochs: Epochs = 1.5
    learning_rate: Rate = 2e-4
    batch: Rows = 16
    beta: Size = 0.5  # of the log-likelihood that is the reward (smlib/reward_model.py)
    nll_coef: SizeOrZero = 3.0  # of -log p per token of the chosen side, which is added to the pairwise loss


@dataclass(frozen=True)
class ExploreSettings(Declared):
    """Self-Explore, stage 6, up to its pairs; the length of a sample is sampling.max_new_tokens."""

    samples: Samples = 12  # solutions per training question (the paper: 100)
    temperature: Temperature = 0.7  # of the solutions and of the completions
    max_per_question: Samples = 8  # RFT solutions, and outcome pairs
    k: Samples = 4  # completions of a prefix; it is a pit if none of them is right
    choice: Literal[*CHOICES] = "shortest"  # of the right completions before the pit: that, "random" or "most_likely"


@dataclass(frozen=True)
class DPOSettings(Declared):
    """Self-Explore, stage 6: DPO on outcome pairs and on step-level pairs.

    The paper trains both at one rate. A step-level pair tells its sides apart by few tokens, and bears larger steps.
    """

    epochs: Epochs = 2.0
    learning_rate: Rate = 3e-4  # on outcome pairs
    step_learning_rate: Rate = 6e-4  # on step-level pairs
    batch: Rows = 32  # pairs
    beta: Size = 1.0


@dataclass(frozen=True)
class LoraSettings(Declared):
    """Low-rank adapters in place of full fine-tuning, in all stages that train: SFT, RFT and DPO (merged at their end),
    the reward model and PPO (adapters of the SFT model, which stays as it is)."""

    rank: RowsOrZero = 0  # 0: full fine-tuning
    alpha: Rows = 32  # the adapter counts alpha / rank times
    targets: Text = "all-linear"  # that, or a regular expression of whole names

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UsageError(f"lora.targets = {self.targets!r} is no regular expression ({error}): write one") from None


@dataclass(frozen=True)
class EvaluationSettings(Declared):
    """Stage 5. Fresh questions, one greedy answer and `samples` drawn ones to each."""

    questions: Questions = 200  # per task; of a published dataset at most its test split
    published: QuestionsOrZero = 750  # of each published test set at most, 0 = leave them out
    samples: SamplesOrZero = 8
    temperature: Temperature = 1.0


@dataclass(frozen=True)
class HardwareSettings(Declared):
    """What a large model needs to fit a GPU, and who draws; with all but `weights` and the engines the results are the
    same up to rounding."""

    weights: Literal["float32", "bfloat16", "nf4"] = "float32"  # precision that models are loaded in; "bfloat16", in
    # which merging an adapter rounds; or "nf4": 4 bits a weight (QLoRA, 2305.14314), by the extra gpu; stages write
    # bfloat16, rounded anew when loaded
    micro_batch: RowsOrZero = 0  # rows (pairs, completions) per forward and backward pass; 0 = the batch at once
    recompute: bool = False  # activations in the backward pass: less memory, more time
    rollout_rows: Rows = MAX_BATCH  # completions that the native sampler draws at once
    cache_tokens: Held = 0  # tokens whose keys and values it holds outside PPO; 0 = no bound but the rows
    cuda_graphs: bool = False  # whether it records its steps on a GPU, to launch each at once
    engine: Engines = "native"  # who samples; "vllm", or "auto": vllm where it is installed, and native for nf4
    rollout_engine: Engines = "native"  # who draws PPO's rollouts, the same; vllm is for adapters in one process
    workers: Processes = 1  # of Ray's that sample and score, on one machine or many; 1 = without Ray


@dataclass(frozen=True)
class Settings(Declared):
    """One run. `base` is "tiny" (the model in this package), a folder, or a hub id, best with "@" and a revision."""

    preset: str
    tasks: tuple[str, ...]
    seed: Seed
    base: Text
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
        super().__post_init__()
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
    checked("preset", name, Literal[*PRESETS])
    checked("task", task, Tasks)
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
        checked("setting", f"{prefix}{name}", Literal[*(prefix + field for field in known)])
        old = getattr(settings, name)
        if is_dataclass(old):
            given = vars(value) if type(value) is type(old) else value
            if not isinstance(given, dict):
                first = fields(old)[0].name
                raise UsageError(
                    f"setting {name} = {shown(value)} is not allowed: {name} is a group of settings, so give a dict, "
                    f"such as {{{first!r}: {getattr(old, first)!r}}}"
                )
            value = _override(old, given, f"{name}.")
        changes[name] = value
    return replace(settings, **changes)
