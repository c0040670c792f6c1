"""The numbers that PPO, RLOO and GRPO depend on."""

from dataclasses import dataclass
from typing import Literal

from smlib.declared import (
    Declared,
    Passes,
    Rate,
    Rows,
    RowsOrZero,
    Samples,
    ShareOrZero,
    Size,
    SizeOrZero,
    Text,
    Tokens,
    setting,
)
from smlib.errors import UsageError
from smlib.learning.reward_formula import REWARDS, parse_reward

POLICY_METHODS = ("ppo", "rloo", "grpo")
MAX_QUESTIONS = 1_000_000  # of a whole training: a slip that asks more would fill the memory with them


@dataclass(frozen=True)
class PPOSettings(Declared):
    """Stage 04. What a training of the policy depends on. RLOO and GRPO have no value, and no use for its settings.

    There is no temperature: rollouts are drawn at 1, since PPO's ratio is about the distribution that was sampled.
    """

    reward: Text = setting(
        "learned",
        "what a completion is paid: 'learned' (the reward model, in nats), 'untrained' (the same before it learned the "
        "rank: the log-likelihood under the SFT model), 'checker' (1 for the gold answer, else 0), 'words' (their "
        "number), or a sum such as 'learned - 0.1*words'",
    )
    value: Literal["head", "model", "rollouts"] = setting(
        "head",
        "head: a value head on the policy's trunk; model: a separate value model, with LoRA an adapter; rollouts: the "
        "mean of what value_samples completions from the end of each step earn; with lam = 0 a step's advantage is "
        "what it did to that mean (VinePPO)",
    )
    value_samples: Samples = setting(4, "completions from the end of each step, with value = 'rollouts'")
    updates: Rows = setting(60, "rounds of drawing and learning")
    episodes: Rows = setting(128, "completions per update")
    samples_per_question: Samples = setting(8, "completions of one question: the more, the better centred")
    epochs: Passes = setting(1, "passes over the completions of one update")
    minibatch: Rows = setting(16, "completions per optimizer step")
    learning_rate: Rate = setting(2.5e-4, "of the policy, at its highest")
    value_learning_rate: Rate = setting(5e-4, "of the value head, and of its own trunk")
    warmup_updates: RowsOrZero = setting(3, "updates of linear warm-up; a linear decay to zero follows")
    kl_coef: SizeOrZero = setting(0.08, "reward lost per nat of KL to the reference")
    kl_target: SizeOrZero = setting(0.0, "nats per completion that kl_coef is steered to; 0 = kl_coef stays fixed")
    kl_kind: Literal["k1", "k3"] = setting("k1", "estimator of the KL (Schulman, 2020)")
    gamma: ShareOrZero = setting(1.0, "discount per token")
    lam: ShareOrZero = setting(
        1.0, "GAE's lambda; below 1 a reward at the end hardly reaches the early steps, unless the value sees them"
    )
    clip: Size = setting(0.2, "bound on the change of a token's ratio")
    value_clip: Size = setting(0.2, "bound on the change of a value")
    value_coef: SizeOrZero = setting(0.1, "factor of the value's loss")
    max_grad_norm: Size = setting(1.0, "bound on the gradient of the policy and of the value, each by itself")
    max_new_tokens: Tokens = setting(128, "length of a completion at most")
    missing_end_penalty: SizeOrZero = setting(1.0, "taken from the reward of a completion that was cut by its length")
    center_by_question: bool = setting(
        True, "a score counts minus the mean score of the question's other samples (as in RLOO)"
    )
    normalize_reward: bool = setting(True, "scores are normalised by the running mean and deviation of all so far")
    reward_clip: SizeOrZero = setting(
        1.0, "bound on the size of a shaped score, so that outliers do not rule; 0 = none"
    )
    max_update_kl: Size = setting(
        0.05, "nats per token between the sampling policy and the new one, above which an update stops early"
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32", "of the forward and backward passes; 'bfloat16' where the hardware gains from it"
    )

    def __post_init__(self):
        super().__post_init__()
        parse_reward(self.reward, REWARDS)
        if self.episodes % self.samples_per_question:
            raise UsageError(
                f"ppo.episodes = {self.episodes} is no multiple of ppo.samples_per_question = "
                f"{self.samples_per_question}; make it one, so that every question gets all its samples."
            )
        if self.center_by_question and self.samples_per_question < 2:
            raise UsageError(
                "ppo.center_by_question = True needs ppo.samples_per_question of at least 2; raise it, or give False."
            )
        if self.value == "rollouts" and self.gamma != 1:
            raise UsageError(
                f"ppo.gamma = {self.gamma} counts tokens, and ppo.value = 'rollouts' counts steps: give "
                "ppo.gamma = 1.0, or another ppo.value"
            )
        if self.value == "rollouts" and self.samples_per_question < 2:
            raise UsageError(
                f"ppo.samples_per_question = {self.samples_per_question}, but ppo.value = 'rollouts' takes the value "
                "of a question from its other samples: give at least 2, or another ppo.value"
            )
        if (asked := self.updates * self.questions) > MAX_QUESTIONS:
            raise UsageError(
                f"ppo.updates = {self.updates} with {self.questions} questions each asks {asked:,}, and at most "
                f"{MAX_QUESTIONS:,} are allowed: lower ppo.updates or ppo.episodes, or raise ppo.samples_per_question"
            )

    @property
    def value_learns(self) -> bool:
        return self.value != "rollouts"

    def keys(self) -> dict:
        """All, but value_samples where nothing asks for them."""
        unused = () if self.value == "rollouts" else ("value_samples",)
        return {name: value for name, value in super().keys().items() if name not in unused}

    @property
    def questions(self) -> int:
        """Different questions in one update."""
        return self.episodes // self.samples_per_question
