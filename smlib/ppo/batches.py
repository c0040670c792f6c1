"""The completions of one update: as tables for the arithmetic, and packed into rows for the models.

A table is [B, T], a row for each completion and a column for each token (`smlib.ppo.arithmetic` has the shapes). A
model reads the same completions as `packing.pack` lays them out: neighbours of one question share the tokens of their
prompt. What it says of the N real tokens comes back flat, [N], and `unpack` makes a table of it.

With several processes each of them draws, scores and differentiates its share, and all of them hold the whole batch. So
an update is the same, up to rounding, for any number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from smlib.ppo.settings import PPOSettings
from smlib.sampling import devices
from smlib.sampling.packing import CONTINUATIONS_PER_ROW, group_size, pack, pad_right
from smlib.sampling.params import Sample

ALL = slice(None)


@dataclass
class Batch:
    """The completions of one update; the last three fields are filled in once they are scored."""

    prompts: list[list[int]]  # one for each completion; those of one question are one object
    completions: list[list[int]]
    ids: Tensor  # [B, L]
    mask: Tensor  # [B, T], as all below
    logp: Tensor  # under the policy that drew them
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def minibatches(self, size: int, generator: torch.Generator | None = None, part: slice = ALL) -> Iterator[Tensor]:
        """Yield the row numbers of `size` completions at a time, [size], or of those of them that `part` takes.

        Neighbours of one question stay together in groups, so that `pack` lets them share their prompt, and groups of
        similar length come together, which saves padding. With a generator, ties and the order are shuffled.
        """
        groups = torch.tensor(self._groups(size))  # [number, completions in each]
        lengths = self.mask.sum(dim=1).cpu()[groups].sum(dim=1)
        lengths += torch.tensor([len(self.prompts[row]) for row in groups[:, 0].tolist()])
        order = torch.randperm(len(groups), generator=generator) if generator else torch.arange(len(groups))
        batches = order[lengths[order].argsort(stable=True)].split(size // groups.shape[1])
        turn = torch.randperm(len(batches), generator=generator) if generator else range(len(batches))
        for number in turn:
            yield groups[batches[number]][part].flatten()

    def _groups(self, size: int) -> list[range]:
        """Neighbours with the same prompt in groups of one size, the largest that comes out even everywhere."""
        together = group_size(size, *(len(list(run)) for _, run in groupby(self.prompts, key=id)))
        return [range(start, start + together) for start in range(0, len(self.prompts), together)]

    def pack(self, rows: Tensor, pad_id: int = 0) -> dict[str, Tensor]:
        """Rows [R] of the batch for a forward pass (`packing.pack`), neighbours of one question in one packed row."""
        groups: list[tuple] = []
        for row in rows.tolist():
            prompt, completion = self.prompts[row], self.completions[row]
            if groups and groups[-1][0] is prompt and len(groups[-1][1]) < CONTINUATIONS_PER_ROW:
                groups[-1][1].append(completion)
            else:
                groups.append((prompt, [completion]))
        return pack(groups, pad_id, self.ids.device)


def unpack(flat: Tensor, mask: Tensor) -> Tensor:
    """Numbers of the N real tokens in their table, 0 elsewhere: [N], mask [B, T] -> [B, T]."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def collate(prompts: list[list[int]], samples: list[Sample], pad_id: int, device="cpu") -> Batch:
    """Join each prompt to its completion, pad on the right, and lay the drawn log-probabilities beside it.

    prompts, samples: token ids, B of each. ValueError where there is no completion, or one without a token.
    """
    if not samples or not all(drawn.token_ids for drawn in samples):
        raise ValueError(f"{len(samples)} completions, some without a token: PPO needs at least one token in each")
    completions = [list(drawn.token_ids) for drawn in samples]
    ids = pad_right([prompt + tail for prompt, tail in zip(prompts, completions, strict=True)], pad_id)
    mask = torch.zeros(len(prompts), ids.shape[1] - 1, dtype=torch.bool)
    for row, (prompt, tail) in enumerate(zip(prompts, completions, strict=True)):
        mask[row, len(prompt) - 1 : len(prompt) + len(tail) - 1] = True
    logp = unpack(torch.tensor([number for drawn in samples for number in drawn.logprobs]), mask)
    return Batch(prompts, completions, ids.to(device), mask.to(device), logp.to(device))


def rounds(settings: PPOSettings) -> bool:
    """Whether forward and backward passes are in bfloat16 on this machine."""
    return devices.chosen_dtype(settings.precision) == "bfloat16"


def autocast(settings: PPOSettings, device: torch.device) -> torch.autocast:
    """The context of `settings.precision`: where it rounds, matrix products are in bfloat16, weights are not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=rounds(settings))


def micro_batches(rows: Tensor, micro_batch: int) -> tuple[Tensor, ...]:
    """These rows of a batch, `micro_batch` at a time, 0 = all. Neighbours stay neighbours, so they share prompts."""
    return rows.split(micro_batch or len(rows))


def local_share(rows: list) -> list:
    """This process's share of a list: neighbours, in the order of the processes."""
    state = devices.process_state()
    each = len(rows) // state.num_processes
    return rows[state.process_index * each :][:each]


def local_part() -> slice:
    """This process's share of a minibatch whose groups are sorted by length: every n-th, for equal work."""
    state = devices.process_state()
    return slice(state.process_index, None, state.num_processes)
