"""Loading and encoding: the tokenizer, the models.

Tokens of a text are bos + tokens(prompt) + tokens(completion) + eos, prompt and completion tokenised apart
and joined, here and nowhere else, so that sampling, training and scoring see the same boundary.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

logging.disable_progress_bar()  # its bars about files of a few megabytes go to standard error

TINY_BASE = Path(__file__).parent / "tiny_base"


def resolve(name: str) -> str:
    """A model's folder or hub id; "tiny" is the base that ships with the package."""
    if name != "tiny":
        return name
    if not (TINY_BASE / "model.safetensors").is_file():
        raise FileNotFoundError("the tiny base is missing from the package; make it with: python -m smlib pretrain")
    return str(TINY_BASE)


@cache
def weights_sha256(name: str) -> str | None:
    """SHA-256 over a local model's weight files, in the order of their names; None for a hub id."""
    files = sorted(Path(resolve(name)).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest() if files else None


def load_tokenizer(name: str = "tiny") -> PreTrainedTokenizerBase:
    """The tokenizer, refused if its pad token is its end token (training would mask the ends away)."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"tokenizer {name!r}: pad token {tokenizer.pad_token!r} must exist and differ from the end token "
            f"{tokenizer.eos_token!r}; add one with tokenizer.add_special_tokens({{'pad_token': '<pad>'}})"
        )
    return tokenizer


def load_policy(name: str | Path = "tiny") -> PreTrainedModel:
    """A causal language model in float32, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(resolve(str(name)), dtype=torch.float32).eval()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the tokenizer's beginning-of-sequence token if it has one."""
    return tokenizer(prompt)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, eos: bool = True) -> list[int]:
    """Token ids of a completion, closed by end-of-sequence unless eos is False."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if eos else ids


def pad_right(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Rows of ids as one (rows, longest) tensor. Causal models need no mask for pads on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token) = logits[token] - logsumexp(logits): logits [..., V], ids [...] -> [...], float32."""
    flat = F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none")
    return -flat.view(ids.shape)


def model_size(model: PreTrainedModel) -> int:
    """Parameters, counted once where weights are tied."""
    return sum(parameter.numel() for parameter in model.parameters())
