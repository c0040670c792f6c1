"""Log-probabilities of continuations, those of one prefix in one row, so that a model reads the prefix once.

`pack` lays the rows out, `packed_logprobs` has the model read them: it is how everything that trains or scores reads.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def pad_right(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Rows of ids as one (rows, longest) tensor. Causal models need no mask for pads on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows])


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p(token) = logits[token] - logsumexp(logits): logits [..., V], ids [...] -> [...], float32."""
    flat = F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none")
    return -flat.view(ids.shape)


CONTINUATIONS_PER_ROW = 4  # that share a prefix; attention's work grows with the square of a row's length


def group_size(*counts: int) -> int:
    """How many continuations go into a row of `pack`: the most, up to CONTINUATIONS_PER_ROW, that divide all counts."""
    return max(n for n in range(1, CONTINUATIONS_PER_ROW + 1) if math.gcd(*counts) % n == 0)


def pack(groups: Sequence[tuple[list[int], list[list[int]]]], pad_id: int, device="cpu") -> dict[str, Tensor]:
    """Lay out every (prefix, its continuations) as one row, so that a model reads a prefix once: for `packed_states`.

    A row is prefix + continuation + continuation + ...; every continuation has the positions that follow the prefix,
    and its tokens see the prefix and themselves only. So the log-probabilities are those of prefix + continuation
    alone. With G rows of at most L tokens and N tokens in all continuations:

    input_ids, position_ids [G, L]; attention_mask [G, 1, L, L], True where a token (third axis) sees another;
    sources [N]: index into [G * L] of the token from which each continuation's token is predicted; targets [N]: these
    tokens; rows [N]: the number of the continuation, counted over all groups.
    """
    ids, positions, parts, sources, targets, rows = [], [], [], [], [], []
    length = max(len(prefix) + sum(map(len, continuations)) for prefix, continuations in groups)
    for number, (prefix, continuations) in enumerate(groups):
        line, places, part = list(prefix), list(range(len(prefix))), [0] * len(prefix)
        for index, continuation in enumerate(continuations, 1):
            first = number * length + len(line)
            sources += [number * length + len(prefix) - 1, *range(first, first + len(continuation) - 1)]
            rows += [rows[-1] + 1 if rows else 0] * len(continuation)
            line += continuation
            places += range(len(prefix), len(prefix) + len(continuation))
            part += [index] * len(continuation)
        ids.append(line)
        positions.append(places)
        parts.append(part)
        targets += line[len(prefix) :]
    part, column = pad_right(parts, -1), torch.arange(length)
    seen, sees = part[:, None, :], part[:, :, None]
    mask = (column <= column[:, None]) & ((seen == 0) | (seen == sees))
    packed = {
        "input_ids": pad_right(ids, pad_id),
        "position_ids": pad_right(positions, 0),
        "attention_mask": mask[:, None],
        "sources": torch.tensor(sources),
        "targets": torch.tensor(targets),
        "rows": torch.tensor(rows),
    }
    return {name: tensor.to(device) for name, tensor in packed.items()}


def packed_states(model: PreTrainedModel, packed: dict[str, Tensor]) -> Tensor:
    """The last hidden states from which the N tokens of the continuations in `packed` are predicted: [N, H]."""
    hidden = ~packed["attention_mask"]
    bias = torch.zeros(hidden.shape, dtype=model.dtype, device=hidden.device)  # eager attention adds its mask
    states = model.get_decoder()(
        input_ids=packed["input_ids"],
        position_ids=packed["position_ids"],
        attention_mask=bias.masked_fill_(hidden, torch.finfo(bias.dtype).min),
        use_cache=False,
    ).last_hidden_state
    # An index would do, but the gradient of what it takes more than once, a prefix's last state, is then added up in
    # whatever order the threads come (index_put with atomic adds); that of an embedding has one order.
    return F.embedding(packed["sources"], states.flatten(0, 1))


def packed_logprobs(model: PreTrainedModel, packed: dict[str, Tensor], states: Tensor | None = None) -> Tensor:
    """log p of every token of every continuation in `packed`, given its prefix and the tokens before it: [N].

    Only their states go on to the vocabulary, whose logits are what takes the memory. states: `packed_states` of this
    model, where they are at hand.
    """
    states = packed_states(model, packed) if states is None else states
    return token_logprobs(model.get_output_embeddings()(states), packed["targets"])


def sum_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Sums of `packed_logprobs` [N] by continuation: [rows]."""
    return values.new_zeros(int(rows[-1]) + 1).index_add(0, rows, values)
