"""A sample's random numbers, and the tokens that they pick: pure functions, without a model and without state."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # tokens whose probability is summed first, so that a cumulative sum is over blocks and then over one


def uniforms(seed: int, key: str, number: int, length: int) -> np.ndarray:
    """The first `length` random numbers in [0, 1), float64 [length], of sample `number` of the prompt called `key`.

    SHAKE-256 turns the name of a stream into as many bytes as one asks for, and a longer stream starts with the
    shorter one: results do not depend on `max_new_tokens`, on the machine, or on a library's version.
    """
    data = hashlib.shake_256(f"{seed} {number} {key}".encode()).digest(8 * length)
    return (np.frombuffer(data, dtype="<u8") >> 12) / 2.0**52


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Tokens [row] for logits [row, vocabulary] by inverse CDF at uniforms [row]; greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(1)
    return pick(truncate((logits / temperature).softmax(1), top_k, top_p), uniforms)


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """`draw_tokens`, and the logarithm of each token's probability at temperature 1."""
    if (temperature, top_k, top_p) == (1, 0, 1):  # one look at the vocabulary less
        probs = logits.softmax(1)
        tokens = pick(probs, uniforms)
        return tokens, probs.gather(1, tokens[:, None])[:, 0].log()
    tokens = draw_tokens(logits, uniforms, temperature, top_k, top_p)
    return tokens, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def pick(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [row]: on whose piece the share `uniforms` [row] falls, if probs [row, vocabulary] are laid end to end."""
    blocks = F.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    block, left = _column(blocks.sum(2), uniforms)
    token, _ = _column(blocks[torch.arange(len(block), device=block.device), block], left)
    return block * BLOCK + token


def _column(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The column [row] in whose part of the total [0, total) the share `uniforms` falls, and the share within it."""
    masses = masses.double()
    cdf = masses.cumsum(1)
    target = uniforms * cdf[:, -1]
    # A share below 1 falls below the total, so that a column whose mass is above zero has it.
    column = torch.searchsorted(cdf, target[:, None], right=True)
    mass = masses.gather(1, column)
    share = 1 - (cdf.gather(1, column) - target[:, None]) / mass
    return column[:, 0], share[:, 0].clamp(0, 1 - 2**-53)


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [row, vocabulary] with 0 for the tokens that top-k and then top-p (on what top-k left) drop.

    They are not renormalised. 0 and 1.0 drop nothing; the most probable token always stays.
    """
    if top_k == 0 and top_p == 1:
        return probs
    ranked, tokens = probs.sort(dim=1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    before = ranked.cumsum(1) - ranked  # mass of the tokens that rank higher
    ranked[before >= top_p * ranked.sum(1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter(1, tokens, ranked)
