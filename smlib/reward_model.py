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

import tempfile
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from smlib import models, prompts
from smlib.answers import Reward, grade
from smlib.problems import Problem
from smlib.sft import fit, trainer_options


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem, text: str) -> list[int]:
    """Token ids of a question and a rationale as the reward model reads them, end-of-sequence last."""
    head = models.encode_prompt(tokenizer, prompts.open_prompt(problem))
    return head + models.encode_completion(tokenizer, text)


def _token_logprobs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token but the first, given those before: ids [B, L] -> [B, L - 1].

    Pads stand on the right of a causal model: no token sees them, so no attention mask is needed.
    """
    return models.token_logprobs(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])


def pair_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(R+ - R-): rewards [P], [P] -> scalar."""
    return -logsigmoid(chosen - rejected).mean()


def chosen_nll(logprobs: torch.Tensor, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean of -log p over the chosen sides' tokens from the first at which a pair differs: scalar, in nats.

    logprobs, tokens, real (bool, False on padding) [2 P, T]: first the P chosen sides, then the rejected in the same
    order. What a pair shares, the question included, says nothing about its rank and does not train here.
    """
    chosen, rejected = tokens.view(2, -1, tokens.shape[1])
    taken = (chosen != rejected).cummax(dim=1).values & real[: len(chosen)]
    return -logprobs[: len(chosen)][taken].mean()


class _LikelihoodTrainer(RewardTrainer):
    """TRL's trainer with beta times the log-likelihood as the reward.

    It sums over the question's tokens too: in a pair they are the same and, in a causal model, have the same
    probabilities, so they cancel in the difference and never train.
    """

    beta: float
    nll_coef: float

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, real = inputs["input_ids"], inputs["attention_mask"][:, 1:].bool()
        logprobs = _token_logprobs(model, ids).where(real, 0.0)
        chosen, rejected = self.beta * logprobs.sum(dim=1).view(2, -1)
        pairwise, nll = pair_loss(chosen, rejected), chosen_nll(logprobs, ids[:, 1:], real)
        parts = {"accuracy": (chosen > rejected).float().mean(), "pair_loss": pairwise, "chosen_nll": nll}
        for name, part in parts.items():
            self._metrics["train"][name].append(part.item())
        loss = pairwise + self.nll_coef * nll
        return (loss, {"rewards": (chosen, rejected)}) if return_outputs else loss


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    pairs: list[dict],
    *,
    epochs: float,
    learning_rate: float,
    batch: int,
    beta: float,
    nll_coef: float,
    seed: int,
    progress: str | None = "reward model",
) -> list[dict]:
    """Fit `model` in place on the pairs that are not held out; returns the log (loss, its parts pair_loss and
    chosen_nll, accuracy)."""
    by_id = {problem.id: problem for problem in problems}
    examples = []
    for pair in pairs:
        if not pair["held_out"]:
            chosen = encode(tokenizer, by_id[pair["id"]], pair["chosen"])
            rejected = encode(tokenizer, by_id[pair["id"]], pair["rejected"])
            length = max(len(chosen), len(rejected))
            examples.append({"chosen_ids": chosen, "rejected_ids": rejected, "length": length})
    if not examples:
        raise ValueError("the reward model needs at least one pair that is not held out, got none: sample more")
    model.config.num_labels = 1  # what TRL knows a reward model by
    with tempfile.TemporaryDirectory() as out:
        options = trainer_options(epochs, learning_rate, batch, seed, out)
        trainer = _LikelihoodTrainer(
            model=model,
            args=RewardConfig(
                **options,
                max_length=None,
                remove_unused_columns=False,  # batches are grouped by "length", which TRL would take away first
            ),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
        )
        trainer.beta, trainer.nll_coef = beta, nll_coef
        log = fit(trainer, progress)
    model.eval()
    return log


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    texts: Sequence[str],
    tokens_per_batch: int = 16_384,
) -> list[float]:
    """R / beta of every (problem, text), in nats, batched by length; the higher, the better the rationale.

    Equal texts of one problem, which a trained policy writes often, are scored once.
    """
    asked = {(problem.id, text): problem for problem, text in zip(problems, texts, strict=True)}
    starts = [len(models.encode_prompt(tokenizer, prompts.open_prompt(problem))) for problem in asked.values()]
    rows = [encode(tokenizer, problem, text) for (_, text), problem in asked.items()]
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    scores = [0.0] * len(rows)
    while order:
        taken = order[: max(1, tokens_per_batch // len(rows[order[0]]))]
        order = order[len(taken) :]
        ids = models.pad_right([rows[index] for index in taken], tokenizer.pad_token_id).to(model.device)
        for index, values in zip(taken, _token_logprobs(model, ids), strict=True):
            scores[index] = values[starts[index] - 1 : len(rows[index]) - 1].sum().item()
    found = dict(zip(asked, scores, strict=True))
    return [found[problem.id, text] for problem, text in zip(problems, texts, strict=True)]


@torch.inference_mode()
def token_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problem: Problem, text: str
) -> tuple[list[str], list[float]]:
    """What each token of a rationale adds to its score, in nats: (tokens, values), as many; they sum to the score."""
    head = models.encode_prompt(tokenizer, prompts.open_prompt(problem))
    tail = models.encode_completion(tokenizer, text)
    values = _token_logprobs(model, torch.tensor([head + tail], device=model.device))[0, len(head) - 1 :].tolist()
    return [tokenizer.decode([token]) for token in tail], values


def learned_reward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """The reward model as a plain callable."""
    return lambda problems, texts: score(model, tokenizer, problems, texts)


def checker_reward(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """The answer checker as a reward: 1 if the stated answer is gold, else 0. It reads gold answers."""
    return [float(grade(text, problem).correct) for problem, text in zip(problems, texts, strict=True)]


def pair_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], pairs: list[dict]
) -> list[dict]:
    """The pairs with both scores and "ranked_right" added."""
    by_id = {problem.id: problem for problem in problems}
    asked = [by_id[pair["id"]] for pair in pairs]
    chosen = score(model, tokenizer, asked, [pair["chosen"] for pair in pairs])
    rejected = score(model, tokenizer, asked, [pair["rejected"] for pair in pairs])
    return [
        pair | {"chosen_score": good, "rejected_score": bad, "ranked_right": good > bad}
        for pair, good, bad in zip(pairs, chosen, rejected, strict=True)
    ]
