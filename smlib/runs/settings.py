"""Every number a run depends on, and the named sets of them, which are in presets.yaml:

- `tiny` (the tutorial), `smoke` (for tests), `tiny-lora` (LoRA adapters over one base, as a large model is trained);
- `smollm2` (a real model of 135 million weights on published word problems, on a laptop);
- for one GPU `llama2-7b` (80 GB), `llama2-7b-40gb`, `llama2-7b-24gb` (a 4-bit base), and `small` (half a billion
  weights); `rehearsal` is `llama2-7b` in miniature, to be run on a laptop before a GPU is rented;
- for Self-Explore as its paper has it `mistral-7b`, `llemma-7b` and `deepseek-math-7b`.

settings = preset("tiny", task="coin_flip", seed=1)
settings = preset("tiny", sampling={"temperature": 0.7}, reward={"pairs": "base"})
settings = preset("llama2-7b", task="gsm8k", base="some/model@revision")
"""

import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from smlib.declared import (
    CacheTokens,
    Completion,
    Declared,
    Dtype,
    EngineName,
    Epochs,
    PrefixTokens,
    Processes,
    Prompt,
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
    setting,
    shown,
)
from smlib.errors import UsageError
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import GENERATED, GROUPS, STEPLESS, TRAIN_SETS, tasks_of
from smlib.problems.prompts import SOURCES
from smlib.sampling.limits import MAX_BATCH, PREFIX_TOKENS

Tasks = Literal["all", *GENERATED, *TRAIN_SETS]


@dataclass(frozen=True)
class SamplingSettings(Declared):
    """Stage 01. top_p and length apply wherever training rationales are sampled."""

    questions: Questions = setting(300, "questions per task; for a published dataset at most its train split")
    samples: Samples = setting(8, "rationales per question, asked without a given answer (open)")
    conditioned_questions: QuestionsOrZero = setting(
        100, "how many of each task's questions are also asked with a given answer"
    )
    conditioned_samples: Samples = setting(
        2, "rationales per question with the gold answer given, and as many with wrong ones"
    )
    temperature: Temperature = setting(1.0, "divides the logits before sampling; 0 is greedy")
    top_p: Share = setting(
        1.0, "nucleus sampling: only the likeliest tokens, up to this share of the probability; 1 = all"
    )
    max_new_tokens: Tokens = setting(128, "longest completion, in tokens")
    shots: Literal["none", *SOURCES] = setting(
        "none", "exemplars in the base's prompts: 'smlib' are ours, 'wei' are those of Wei et al."
    )
    prompt: Prompt = setting(
        "plain", "prompt of every stage: 'plain' is \"Q: ... A:\", 'chat' is an instruct model's chat template"
    )


@dataclass(frozen=True)
class RankingSettings(Declared):
    """Stages 02 and 03. How many rationales and pairs of a question are kept, at most."""

    max_per_side: Samples = setting(8, "distinct right rationales per question, and as many wrong ones")
    max_pairs_per_question: Samples = setting(6, "pairs of a right and a wrong rationale per question")


@dataclass(frozen=True)
class SFTSettings(Declared):
    """Stage 02. Supervised fine-tuning on r+, the rationales that reach the gold answer."""

    source: Literal["open", "conditioned", "both"] = setting(
        "both", "which rationales to train on: asked without a given answer (open), with one (conditioned), or both"
    )
    epochs: Epochs = setting(1.0, "passes over the rationales")
    learning_rate: Rate = setting(6e-4, "peak learning rate")
    batch: Rows = setting(16, "rationales per optimizer step")


@dataclass(frozen=True)
class RewardSettings(Declared):
    """Stage 03. Which rationales make the pairs, and how the reward model learns from them."""

    pairs: Literal["base", "both"] = setting(
        "both", "whose rationales make the pairs: 'base' is only the base's, 'both' adds the SFT model's"
    )
    wrong: Literal["open", "conditioned", "both"] = setting("both", "source of the wrong rationales, as in sft.source")
    questions: QuestionsOrZero = setting(350, "fresh questions per task for the SFT model, if pairs = 'both'")
    temperature: Temperature = setting(1.0, "temperature at which it samples its rationales; PPO samples at 1")
    epochs: Epochs = setting(1.5, "passes over the pairs")
    learning_rate: Rate = setting(2e-4, "peak learning rate")
    batch: Rows = setting(16, "pairs per optimizer step")
    beta: Size = setting(0.5, "the reward is beta times the log-likelihood (smlib/learning/reward_model.py)")
    nll_coef: SizeOrZero = setting(
        3.0, "weight of the NLL (-log p per token) of the chosen side, which is added to the pairwise loss"
    )

    def keys(self) -> dict:
        """All, but the temperature: the pairs are what depends on it."""
        return {name: value for name, value in super().keys().items() if name != "temperature"}


@dataclass(frozen=True)
class ExploreSettings(Declared):
    """Stages 06, Self-Explore, up to its pairs. sampling.max_new_tokens limits its samples too."""

    samples: Samples = setting(12, "solutions per training question (the paper: 100)")
    temperature: Temperature = setting(0.7, "sampling temperature for solutions and completions")
    max_per_question: Samples = setting(8, "RFT solutions per question, at most, and as many outcome pairs")
    k: Samples = setting(4, "completions after each step of a wrong solution; a step is a pit if none of them is right")
    choice: Completion = setting("shortest", "which right completion from before the pit becomes the chosen side")
    reported: Samples = setting(40, "wrong rationales per task in the pit report, at most")


@dataclass(frozen=True)
class DPOSettings(Declared):
    """Stages 06, Self-Explore: DPO on outcome pairs and on step-level pairs.

    The paper uses one learning rate for both. The sides of a step-level pair differ in few tokens, so it allows larger
    steps.
    """

    epochs: Epochs = setting(2.0, "passes over the pairs")
    learning_rate: Rate = setting(3e-4, "peak learning rate on outcome pairs")
    step_learning_rate: Rate = setting(6e-4, "peak learning rate on step-level pairs")
    batch: Rows = setting(32, "pairs per optimizer step")
    beta: Size = setting(1.0, "DPO's beta: the larger, the closer the policy stays to its reference")


@dataclass(frozen=True)
class LoraSettings(Declared):
    """Low-rank adapters in place of full fine-tuning, in all stages that train: SFT, RFT and DPO (merged when training
    ends), the reward model and PPO (adapters on the frozen SFT model)."""

    rank: RowsOrZero = setting(0, "rank of the adapters; 0 = full fine-tuning")
    alpha: Rows = setting(32, "the output of an adapter is scaled by alpha / rank")
    targets: Text = setting(
        "all-linear", "layers that get an adapter: 'all-linear', or a regular expression that matches their full names"
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UsageError(f"lora.targets = {self.targets!r} is not a regular expression ({error}): fix it") from None


@dataclass(frozen=True)
class EvaluationSettings(Declared):
    """Stage 05. Fresh questions, each with one greedy answer and `samples` sampled ones."""

    questions: Questions = setting(200, "questions per task; for a published dataset at most its test split")
    published: QuestionsOrZero = setting(750, "questions per published test set, at most; 0 leaves the sets out")
    samples: SamplesOrZero = setting(8, "sampled answers per question")
    temperature: Temperature = setting(1.0, "sampling temperature for these answers")


@dataclass(frozen=True)
class HardwareSettings(Declared):
    """What a large model needs to fit a GPU, and which engine samples. Except for `dtype` and the engines, these
    settings change results only by rounding."""

    dtype: Dtype = setting(
        "float32",
        "precision that models are loaded in. Without LoRA, models train in 'float32', and this applies only to the "
        "stages that sample. 'auto' is 'bfloat16' where the machine is faster with it, else 'float32'. Merging an "
        "adapter in 'bfloat16' rounds. 'nf4' is 4 bits per weight (QLoRA, 2305.14314) and needs the extra gpu; its "
        "stages save bfloat16, and loading rounds to 4 bits again",
    )
    micro_batch: RowsOrZero = setting(
        0, "rows (pairs, completions) per forward and backward pass; 0 = the whole batch at once"
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    max_batch: Rows = setting(MAX_BATCH, "completions that the native engine samples at once")
    cache_tokens: CacheTokens = setting(
        0, "size of the native engine's KV cache in tokens, except in PPO; 0 = limited only by max_batch"
    )
    prefix_tokens: PrefixTokens = setting(
        PREFIX_TOKENS,
        "tokens in that cache that Self-Explore keeps from one step to the next (without Ray)",
    )
    engine: EngineName = setting(
        "native", "which engine samples; 'auto' is vllm where it is installed, but native for nf4"
    )
    rollout_engine: EngineName = setting("native", "engine of PPO's rollouts; vllm needs LoRA and one process")
    workers: Processes = setting(1, "Ray processes that sample and score, on one machine or many; 1 = without Ray")


@dataclass(frozen=True)
class Settings(Declared):
    """One run."""

    preset: str
    tasks: tuple[str, ...]
    seed: Seed
    base: Text = setting(
        meaning="the model to train: tiny (in this package), smollm2, a folder, a GGUF file, or a Hub id, best with "
        "@REVISION"
    )
    sampling: SamplingSettings = SamplingSettings()
    ranking: RankingSettings = RankingSettings()
    sft: SFTSettings = SFTSettings()
    reward: RewardSettings = RewardSettings()
    ppo: PPOSettings = PPOSettings()  # noqa: RUF009 (it is frozen)
    evaluation: EvaluationSettings = EvaluationSettings()
    explore: ExploreSettings = ExploreSettings()
    dpo: DPOSettings = DPOSettings()
    lora: LoraSettings = LoraSettings()
    hardware: HardwareSettings = HardwareSettings()

    @property
    def datasets(self) -> tuple[str, ...]:
        """Where its questions are from: its tasks, or the datasets of a group."""
        return tuple(name for task in self.tasks for name in GROUPS.get(task, (task,)))

    def __post_init__(self):
        super().__post_init__()
        if self.hardware.dtype == "nf4" and not self.lora.rank:
            raise UsageError(
                "hardware.dtype = 'nf4' with lora.rank = 0 is not allowed, since 4-bit weights cannot train: give "
                "lora.rank of at least 1, or another hardware.dtype"
            )
        if self.hardware.rollout_engine == "vllm" and (not self.lora.rank or self.hardware.dtype == "nf4"):
            raise UsageError(
                "hardware.rollout_engine = 'vllm' needs LoRA and a base that is not in 4 bits: give lora.rank of at "
                "least 1 and a hardware.dtype other than 'nf4', or hardware.rollout_engine = 'native'"
            )
        bare = [task for task in self.tasks if task in ("chain_arithmetic", *STEPLESS)]
        if self.sampling.shots != "none" and bare:
            raise UsageError(
                f"preset {self.preset!r} shows exemplars (sampling.shots = {self.sampling.shots!r}), and task "
                f"{bare[0]!r} has none: choose another task, such as gsm8k, or sampling.shots = 'none'"
            )
        stepless = [task for task in self.tasks if task in STEPLESS]
        if self.sampling.conditioned_questions and stepless:
            raise UsageError(
                f"sampling.conditioned_questions = {self.sampling.conditioned_questions} is not allowed for task "
                f"{stepless[0]!r}, which has no rationale to write for a given answer: give 0"
            )


_FILE = Path(__file__).with_name("presets.yaml")
PRESETS: dict[str, dict] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))["presets"]
LARGE = tuple(name for name, values in PRESETS.items() if "/" in values.get("base", ""))  # a Hub id


def default_task(name: str) -> str:
    """What a preset is for where nothing is said: published questions for models that can read, else "all"."""
    return "word_problems" if name == "smollm2" else "gsm8k" if name in LARGE else "all"


def preset(name: str, task: str = "all", seed: int = 0, **overrides) -> Settings:
    """Settings of a named preset for one task, or for "all" of the generated ones of reasoning.

    task: a generated one (GENERATED) or a published dataset with a train split (TRAIN_SETS). overrides: a field of
    Settings, or for a group a dict of its fields: `ppo={"updates": 10}`, `base="..."`.
    """
    checked("preset", name, Literal[*PRESETS])
    checked("task", task, Tasks)
    values, sampling = PRESETS[name], SamplingSettings()
    if task in STEPLESS:  # nobody writes a rationale for a given answer
        sampling = replace(sampling, conditioned_questions=0)
        values = values | {"sampling": values.get("sampling", {}) | {"conditioned_questions": 0}}
    plain = Settings(preset=name, tasks=tasks_of(task), seed=seed, base="tiny", sampling=sampling)
    settings = _override(plain, values, "")
    if name in LARGE and task == "math":
        longer, hardware = 1_024, settings.hardware  # its solutions are long, and take the room of as many more rows
        rows = hardware.max_batch * settings.sampling.max_new_tokens // longer
        fewer = {"max_batch": rows, "micro_batch": hardware.micro_batch // 2}
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
