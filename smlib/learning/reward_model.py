"""Stage 5: a reward model learns the rank by TRL's RewardTrainer; scoring; what its scores are worth.

The loss is -log sigmoid(R(q, r+) - R(q, r-)), the standard pairwise logistic loss (our choice; the paper leaves it
open), plus one that keeps r+ likely. R itself is our choice too: the reward model is a copy of the SFT model, and

    R(q, r) = beta * sum over the rationale's tokens of log p(token | q, tokens before),

end-of-sequence included: a language model whose likelihood is bent by the rank (the reward of SimPO, 2405.14734,
not averaged over the length). The usual scalar head on the last token has to find out from pairs alone what a wrong
step is, and a tiny model's few thousand pairs do not suffice for that; the language model expects the right token
already, so that R starts as a useful score and the pairs correct where it is wrong (docs/log.md has the numbers of
both). R also says at which token a rationale loses its score. Training and scoring encode a text by the same
function, so a score means what was trained.

The pairwise loss alone is content to make r- unlikely and lets r+ sink with it, until the most likely text, to which
PPO leads the policy, is neither. Therefore nll_coef times -log p of the chosen side's tokens, from the first at which
the two differ, is added (iterative RPO, 2404.19733, eq. 1, adds the same term over the whole chosen text).
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer
from trl.models.utils import _ForwardRedirection

from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.judging.answers import Reward, before_answer, grade, majorities
from smlib.learning.reward_formula import parse_reward
from smlib.learning.rows import Pair
from smlib.learning.trainers import SharedBatches, dataset, fit, trainer_options
from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.sampling import encoding, packing
from smlib.sampling.params import Sample


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem, rationale: str | Sequence[int]) -> list[int]:
    """Token ids of a question and a rationale (a text, or the ids it was drawn as) as the reward model reads them.

    End-of-sequence is last.
    """
    return [*encoding.encode_question(tokenizer, problem), *encoding.closed(tokenizer, rationale)]


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(R+ - R-): rewards [P], [P] -> scalar."""
    return -logsigmoid(chosen - rejected).mean()


class _LikelihoodTrainer(SharedBatches, RewardTrainer):
    """TRL's trainer with beta times the log-likelihood as the reward.

    Both sides of a pair continue what they share, the question and often most of the steps: it is read once. Its
    tokens have the same probabilities in both, cancel in the difference, and are therefore not even summed.

    Of a step's micro batches, in all processes, each counts by its pairs, and in the second loss by its tokens, as in
    one whole batch. An idle pair has a loss of log 2 that nothing can change; it is taken off.
    """

    beta: float
    nll_coef: float
    loss_is_scaled_for_ga = True  # by compute_loss

    def get_batch_samples(self, *arguments):
        batches, _ = super().get_batch_samples(*arguments)
        counts = [sum(counts) for counts in zip(*map(self._pairs_and_tokens, batches), strict=True)]
        return batches, self.sum_over_processes(counts)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        whole = self.accelerator.unwrap_model(model)  # which is called through what wraps it, so that that sees it
        logprobs = _ForwardRedirection()(model, whole, partial(packing.packed_logprobs, whole), inputs)
        # of an idle pair not even the rounding of two gradients that cancel, which Adam would take for small ones
        logprobs = logprobs.where(inputs["targets"] != self.processing_class.pad_token_id, 0)
        chosen, rejected = self.beta * packing.sum_rows(logprobs, inputs["rows"]).view(-1, 2).T
        pairs, tokens = self._pairs_and_tokens(inputs)
        pairwise, nll = pair_loss(chosen, rejected), -logprobs[self._learned(inputs)].sum() / max(tokens, 1)
        parts = {"accuracy": (chosen > rejected).float().mean(), "pair_loss": pairwise, "chosen_nll": nll}
        for name, part in parts.items():
            self._metrics["train"][name].append(self.accelerator.gather(part.detach()).mean().item())
        all_pairs, all_tokens = num_items_in_batch or (pairs, tokens)
        rows = len(inputs["input_ids"])
        loss = rows / all_pairs * pairwise + self.nll_coef * (tokens / all_tokens) * nll
        loss = loss - math.log(2) * (rows - pairs) / all_pairs
        loss = loss * self.accelerator.num_processes  # which average their gradients
        return (loss, {"rewards": (chosen, rejected)}) if return_outputs else loss

    def _pairs_and_tokens(self, batch: dict[str, torch.Tensor]) -> tuple[int, int]:
        """How many pairs are in a batch of `packing.pack`, and how many tokens of their chosen sides; no idle ones."""
        chosen, learned = batch["rows"] % 2 == 0, self._learned(batch)
        return len(batch["input_ids"]) - int((chosen & ~learned).sum()), int(learned.sum())

    def _learned(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which of the N tokens are those of a chosen side: not the one that an idle pair has there."""
        return (batch["rows"] % 2 == 0) & (batch["targets"] != self.processing_class.pad_token_id)


def shared_prefix(chosen: list[int], rejected: list[int]) -> tuple[list[int], list[list[int]]]:
    """A pair's tokens as (what both sides begin with, [the rest of r+, the rest of r-]), for `packing.pack`.

    Each side keeps at least its last token.
    """
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = next((t for t, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)) - 1)
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    pairs: Sequence[Pair],
    *,
    epochs: float,
    learning_rate: float,
    batch: int,
    beta: float,
    nll_coef: float,
    seed: int,
    micro_batch: int = 0,
    gradient_checkpointing: bool = False,
    progress: str | None = "reward model",
) -> list[dict]:
    """Fit `model` in place on the pairs that are not held out; returns the log (loss, its parts pair_loss and
    chosen_nll, accuracy). A side is its tokens as drawn. problems: those of the pairs, by id. micro_batch,
    gradient_checkpointing: `settings.HardwareSettings`."""
    by_id = {problem.id: problem for problem in problems}
    examples = []
    for pair in pairs:
        if not pair.held_out:
            chosen, rejected = (encode(tokenizer, by_id[pair.id], ids) for ids in (pair.chosen_ids, pair.rejected_ids))
            prefix, sides = shared_prefix(chosen, rejected)
            length = len(prefix) + sum(map(len, sides))
            examples.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    if not examples:
        raise UsageError("the reward model needs at least one pair that is not held out, got none: sample more")
    model.config.num_labels = 1  # what TRL knows a reward model by
    with tempfile.TemporaryDirectory() as out, own_draws(seed):
        options = trainer_options(model, epochs, learning_rate, batch, seed, out, micro_batch, gradient_checkpointing)
        pads = [tokenizer.pad_token_id] * 2
        trainer = _LikelihoodTrainer(
            model=model,
            args=RewardConfig(
                **options,
                max_length=None,
                remove_unused_columns=False,  # batches are grouped by "length", which TRL would take away first
            ),
            train_dataset=dataset(examples, {"chosen_ids": pads, "rejected_ids": pads, "length": 3}),
            data_collator=lambda batch: packing.pack(
                [shared_prefix(pair["chosen_ids"], pair["rejected_ids"]) for pair in batch], tokenizer.pad_token_id
            ),
            processing_class=tokenizer,
        )
        trainer.beta, trainer.nll_coef = beta, nll_coef
        log = fit(trainer, progress)
    model.eval()
    return log


def by_question(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], rationales: Sequence[str | Sequence[int]]
) -> tuple[list[tuple[str, tuple[list[int], list[list[int]]]]], list[tuple[str, tuple[int, ...]]]]:
    """(every question once, as its id and the arguments of `score_ids`; a key of every rationale: question, ids).

    The questions, and the different rationales of each, are in the order of their first places.
    """
    asked: dict[str, Problem] = {}
    found: dict[str, dict[tuple[int, ...], None]] = {}
    keys = []
    for problem, rationale in zip(problems, rationales, strict=True):
        keys.append((problem.id, tuple(encoding.closed(tokenizer, rationale))))
        asked.setdefault(problem.id, problem)
        found.setdefault(problem.id, {})[keys[-1][1]] = None
    heads = {identity: encoding.encode_question(tokenizer, problem) for identity, problem in asked.items()}
    return [(identity, (heads[identity], [list(ids) for ids in found[identity]])) for identity in asked], keys


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rationales: Sequence[str | Sequence[int]],
    tokens_per_batch: int = 2_048,
) -> list[float]:
    """R / beta of every (problem, rationale), in nats, batched by length; the higher, the better the rationale.

    rationales: token ids as drawn, or texts, which are encoded. Equal ones of one question, which a trained policy
    writes often, are scored once. tokens_per_batch: more do not fit a CPU core's cache and are slower there.
    """
    questions, keys = by_question(tokenizer, problems, rationales)
    found = score_ids(model, [ids for _, ids in questions], tokenizer.pad_token_id, tokens_per_batch)
    return in_order(questions, keys, found)


def in_order(questions: list, keys: list[tuple[str, tuple[int, ...]]], found: Sequence[list[float]]) -> list[float]:
    """A score for every key: questions and keys as `by_question` gives them, found as `score_ids` does."""
    scores = {}
    for (identity, (_, tails)), values in zip(questions, found, strict=True):
        scores |= {(identity, tuple(tail)): value for tail, value in zip(tails, values, strict=True)}
    return [scores[key] for key in keys]


@torch.inference_mode()
def score_ids(
    model: PreTrainedModel,
    questions: Sequence[tuple[list[int], list[list[int]]]],
    pad_id: int,
    tokens_per_batch: int = 2_048,
) -> list[list[float]]:
    """R / beta of the rationales of every question, [question][rationale]; questions: (its ids, [rationale's ids]).

    A question is read once for every four of its rationales. tokens_per_batch: as in `score`.
    """
    groups = [
        (number, start, head, tails[start : start + packing.CONTINUATIONS_PER_ROW])
        for number, (head, tails) in enumerate(questions)
        for start in range(0, len(tails), packing.CONTINUATIONS_PER_ROW)
    ]
    lengths = [len(head) + sum(map(len, tails)) for *_, head, tails in groups]
    order = sorted(range(len(groups)), key=lambda row: -lengths[row])
    scores = [[0.0] * len(tails) for _, tails in questions]
    while order:
        count = max(1, tokens_per_batch // lengths[order[0]])
        taken, order = [groups[row] for row in order[:count]], order[count:]
        packed = packing.pack([(head, tails) for *_, head, tails in taken], pad_id, model.device)
        sums = iter(packing.sum_rows(packing.packed_logprobs(model, packed), packed["rows"]).tolist())
        for number, start, _, tails in taken:
            scores[number][start : start + len(tails)] = [next(sums) for _ in tails]
    return scores


@torch.inference_mode()
def token_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: Problem, rationale: str | Sequence[int]
) -> tuple[list[str], list[float]]:
    """What each token of a rationale adds to its score, in nats: (tokens, values), as many; they sum to the score."""
    head, tail = encoding.encode_question(tokenizer, problem), encoding.closed(tokenizer, rationale)
    values = packing.packed_logprobs(model, packing.pack([(head, [tail])], tokenizer.pad_token_id, model.device))
    return encoding.pieces(tokenizer, tail), values.tolist()


class LearnedReward:
    """The reward model as a plain callable, which PPO lets score the very tokens that a policy drew.

    using: gives the model for the time of a `with` block, as `roles.Adapters` lends its adapter.
    """

    def __init__(
        self, using: Callable[[], AbstractContextManager[PreTrainedModel]], tokenizer: PreTrainedTokenizerBase
    ):
        self.using, self.tokenizer = using, tokenizer

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        with self.using() as model:
            return score(model, self.tokenizer, problems, texts)

    def of_samples(self, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[float]:
        return self(problems, [drawn.token_ids for drawn in samples])


def score_samples(reward: Reward, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[float]:
    """What a reward says of drawn samples: of their tokens where it reads tokens, else of their texts."""
    if hasattr(reward, "of_samples"):
        return reward.of_samples(problems, samples)
    return reward(problems, [drawn.text for drawn in samples])


class GoldReward(LearnedReward):
    """log p(gold answer | question, rationale) in nats, the rationale without what it announces as its answer.

    LaTRO (2411.04282) asks the policy that trains; here a model does that stands still, the SFT model. It reads gold
    answers, but no judge compares them with anything.
    """

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str | Sequence[int]]) -> list[float]:
        questions = []
        for problem, told in zip(problems, texts, strict=True):
            ids = encoding.encode_completion(self.tokenizer, told, eos=False) if isinstance(told, str) else told
            before = len(before_answer(encoding.decode(self.tokenizer, ids)))
            stated = f" {prompts.show_answer(problem, problem.answer)}."
            answer = encoding.encode_completion(self.tokenizer, stated)
            questions.append((encoding.encode_reanswer(self.tokenizer, problem, ids, before), [answer]))
        with self.using() as model:
            return [value for [value] in score_ids(model, questions, self.tokenizer.pad_token_id)]


def checker_reward(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """The answer checker as a reward: 1 if the stated answer is gold, else 0. It reads gold answers."""
    return [float(grade(problem, text).correct) for problem, text in zip(problems, texts, strict=True)]


def majority_reward(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """The other samples in place of the gold answer: 1 for the answer that most of a question's texts state, else 0.

    LMSI (2210.11610) trains on the rationales of the majority; it reads no gold answer, and neither does this. All
    texts of a question must come in one call, as PPO's do.
    """
    answers = [grade(problem, text).extracted for problem, text in zip(problems, texts, strict=True)]
    chosen = majorities((problem.id, answer) for problem, answer in zip(problems, answers, strict=True))
    return [
        float(answer is not None and answer == chosen[problem.id])
        for problem, answer in zip(problems, answers, strict=True)
    ]


def word_count(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """The number of words: "learned - 0.1*words" is a reward that likes brevity."""
    return [float(len(text.split())) for text in texts]


def weighted_sum(formula: str, rewards: dict[str, Reward]) -> Reward:
    """One reward out of several by a formula (`reward_formula.parse_reward`). UsageError where it is none."""
    return _Sum([(weight, rewards[name]) for weight, name in parse_reward(formula, rewards)])


class _Sum:
    """A weighted sum of rewards: a reward, too."""

    def __init__(self, terms: list[tuple[float, Reward]]):
        self.terms = terms

    def __call__(self, problems, texts):
        return self._total(lambda reward: reward(problems, texts))

    def of_samples(self, problems, samples):
        return self._total(lambda reward: score_samples(reward, problems, samples))

    def _total(self, scores_of) -> list[float]:
        columns = [[weight * score for score in scores_of(reward)] for weight, reward in self.terms]
        return [sum(row) for row in zip(*columns, strict=True)]


def pair_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], pairs: Sequence[Pair]
) -> list[Pair]:
    """The pairs with both scores, in nats, and `ranked_right`; problems: those of the pairs, by id."""
    by_id = {problem.id: problem for problem in problems}
    asked = [by_id[pair.id] for pair in pairs]
    chosen = score(model, tokenizer, asked, [pair.chosen_ids for pair in pairs])
    rejected = score(model, tokenizer, asked, [pair.rejected_ids for pair in pairs])
    return [
        replace(pair, chosen_score=good, rejected_score=bad, ranked_right=good > bad)
        for pair, good, bad in zip(pairs, chosen, rejected, strict=True)
    ]
