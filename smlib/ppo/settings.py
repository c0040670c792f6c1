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
    """Stage 04. How the policy is trained. RLOO and GRPO have no value function, and ignore its settings.

    There is no temperature: rollouts are sampled at 1, since PPO's ratio is about the distribution that was sampled.
    """

    reward: Text = setting(
        "learned",
        "reward of a completion: 'learned' (the reward model, in nats), 'untrained' (the same before it learned the "
        "rank: the log-likelihood under the SFT model), 'checker' (1 for the gold answer, else 0), 'majority' (1 for "
        "the most frequent answer to the question, else 0), 'gold' (the log-likelihood of the gold answer after the "
        "rationale, under the SFT model), 'words' (the number of words), or a sum such as 'learned - 0.1*words'",
    )
    value: Literal["head", "model", "rollouts"] = setting(
        "head",
        "where values come from. head: a value head on the policy's trunk; model: a separate value model (with LoRA, "
        "an adapter); rollouts: the mean reward of value_samples completions from the end of each step (with lam = 0, "
        "a step's advantage is how much it changes that mean, as in VinePPO)",
    )
    value_samples: Samples = setting(4, "completions from the end of each step, if value = 'rollouts'")
    updates: Rows = setting(60, "rounds of sampling and training")
    episodes: Rows = setting(128, "completions per update")
    samples_per_question: Samples = setting(8, "completions per question; more of them make a better baseline")
    epochs: Passes = setting(1, "passes over the completions of one update")
    minibatch: Rows = setting(16, "completions per optimizer step")
    learning_rate: Rate = setting(2.5e-4, "peak learning rate of the policy")
    value_learning_rate: Rate = setting(5e-4, "peak learning rate of the value head or value model")
    warmup_updates: RowsOrZero = setting(3, "updates of linear warm-up; a linear decay to zero follows")
    kl_coef: SizeOrZero = setting(0.08, "KL penalty: reward subtracted per nat of KL to the reference")
    kl_target: SizeOrZero = setting(
        0.0, "KL in nats per completion that kl_coef is adjusted to reach; 0 = kl_coef stays fixed"
    )
    kl_kind: Literal["k1", "k3"] = setting("k1", "estimator of the KL (Schulman, 2020)")
    gamma: ShareOrZero = setting(1.0, "discount per token")
    lam: ShareOrZero = setting(
        1.0, "GAE's lambda; below 1, early steps hardly get a reward from the end unless the value function predicts it"
    )
    clip: Size = setting(0.2, "clip range of a token's probability ratio")
    value_clip: Size = setting(0.2, "clip range of a value, around the value before the update")
    value_coef: SizeOrZero = setting(0.1, "weight of the value loss")
    max_grad_norm: Size = setting(1.0, "largest gradient norm; policy and value are clipped separately")
    max_new_tokens: Tokens = setting(128, "longest completion, in tokens")
    missing_end_penalty: SizeOrZero = setting(
        1.0, "subtracted from the reward of a completion that was cut off at max_new_tokens"
    )
    center_by_question: bool = setting(
        True, "subtract the mean score of the question's other samples from each score (as in RLOO)"
    )
    normalize_reward: bool = setting(
        True, "normalise scores by the running mean and standard deviation of all scores so far"
    )
    reward_clip: SizeOrZero = setting(
        1.0, "clip centred and normalised scores to plus or minus this, against outliers; 0 = no clipping"
    )
    max_update_kl: Size = setting(
        0.05, "KL in nats per token between the sampling policy and the new one, above which an update stops early"
    )
    precision: Literal["float32", "bfloat16", "auto"] = setting(
        "float32",
        "precision of the forward and backward passes; 'auto' is 'bfloat16' where the machine is faster with it",
    )

    def __post_init__(self):
        super().__post_init__()
        parse_reward(self.reward, REWARDS)
        if self.episodes % self.samples_per_question:
            raise UsageError(
                f"ppo.episodes = {self.episodes} is not a multiple of ppo.samples_per_question = "
                f"{self.samples_per_question}: make it one, so that every question gets all its samples"
            )
        if self.center_by_question and self.samples_per_question < 2:
            raise UsageError(
                "ppo.samples_per_question = 1, but ppo.center_by_question = True needs at least 2: raise it, or give "
                "ppo.center_by_question = False"
            )
        if self.value == "rollouts" and self.gamma != 1:
            raise UsageError(
                f"ppo.gamma = {self.gamma} discounts per token, but ppo.value = 'rollouts' values whole steps: give "
                "ppo.gamma = 1.0, or another ppo.value"
            )
        if self.value == "rollouts" and self.samples_per_question < 2:
            raise UsageError(
                f"ppo.samples_per_question = {self.samples_per_question}, but ppo.value = 'rollouts' takes the value "
                "of a question from its other samples: give at least 2, or another ppo.value"
            )
        if (asked := self.updates * self.questions) > MAX_QUESTIONS:
            raise UsageError(
                f"ppo.updates = {self.updates} with {self.questions} questions each is {asked:,} questions, and at "
                f"most {MAX_QUESTIONS:,} are allowed: lower ppo.updates or ppo.episodes, or raise "
                "ppo.samples_per_question"
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
