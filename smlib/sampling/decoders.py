"""The model's part of sampling: prompts are read, and rows, one for each sample at work, take steps.

`TreeDecoder` is for models with plain attention, `PaddedDecoder` for all others. Both have

- `joins`: whether rows may begin while others are at work;
- `order`: the prompts, by their indices, in the order in which they are to begin;
- `held`: the tokens whose keys and values will be held when these prompts begin, besides `row_tokens` of each new row;
- `begin` and `step`: states [row, ...], of the rows that begin, or of all; `logits` makes the next token's of them;
- `keep`: rows have left.
"""

from collections.abc import Sequence
from itertools import groupby, zip_longest

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from smlib.sampling.packing import pad_right
from smlib.sampling.prefix_tree import Node, PrefixTree
from smlib.sampling.tree_attention import Cohort, Context, Reading, Step, grid_starts, grown

READ = 2048  # tokens that are read together, padding included


class TreeDecoder:
    """Rows below the nodes of a prefix tree, in cohorts that began together."""

    joins = True

    def __init__(self, model: PreTrainedModel, tree: PrefixTree, prompt_ids: Sequence[Sequence[int]], completion: int):
        self.model, self.decoder, self.logits = model, model.get_decoder(), model.get_output_embeddings()
        self.completion, self.row_tokens = completion, grown(completion)
        self.tree, leaves = tree, [tree.insert(ids) for ids in prompt_ids]
        self.paths = [leaf.path() for leaf in leaves]
        for path in self.paths:
            for node in path:
                node.waiting += 1
        self.cohorts: list[Cohort] = []
        self._rows = Step(self.cohorts)  # until they change
        self.positions = torch.zeros(0, dtype=torch.long, device=model.device)  # of the rows' next tokens

    def order(self) -> list[int]:
        """Those below one node side by side, and the longest first."""
        longest: dict[Node, int] = {}
        for path in self.paths:
            longest |= {node: max(longest.get(node, 0), path[-1].end) for node in path}
        numbers = {node: number for number, node in enumerate(longest)}
        keys = [[(-longest[node], numbers[node]) for node in path] for path in self.paths]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def held(self, prompts: Sequence[int]) -> int:
        paths = [self.paths[i] for i in prompts]
        unread = sum(len(node.tokens) for node in {node for path in paths for node in path} if node.states is None)
        rests = [path[start:] for path, start in zip(paths, grid_starts(paths, self._in_use), strict=True)]
        grid = max((sum(len(node.tokens) for node in rest) for rest in rests), default=0)
        at_work = sum(cohort.tokens(self.completion) for cohort in self.cohorts)
        return self.tree.tokens + unread + at_work + len(paths) * grid

    @property
    def _in_use(self) -> set[Node]:
        spans = [span for cohort in self.cohorts for shared in cohort.context.shared for span in shared.spans]
        return {node for _, _, node, _ in spans}

    def begin(self, owners: Sequence[int]) -> Tensor:
        """owners: the prompt of every row, equal ones side by side."""
        counts = {i: len(list(rows)) for i, rows in groupby(owners)}
        paths = [self.paths[i] for i in counts]
        states = self._read(paths)
        self.cohorts.append(Cohort(Context(paths, list(counts.values()), self._in_use), len(owners)))
        self._rows = Step(self.cohorts)
        for path in paths:
            for node in path:
                node.waiting -= 1
        self.tree.hold((node for nodes in reversed(list(zip_longest(*paths))) for node in nodes if node), self._in_use)
        ends = torch.tensor([self.paths[i][-1].end for i in owners], device=self.positions.device)
        self.positions = torch.cat((self.positions, ends))
        return torch.stack([states[self.paths[i][-1]] for i in owners])

    def _read(self, paths: Sequence[Sequence[Node]]) -> dict[Node, Tensor]:
        """Read what the tree does not hold of these, from the top down; the states [H] of their last nodes."""
        found, last = {}, {path[-1] for path in paths}
        for nodes in zip_longest(*paths):
            unread = dict.fromkeys(node for node in nodes if node and (node.states is None or node in last))
            for group in _groups(list(unread)):
                found |= zip(group, self._read_together(group), strict=True)
        return {node: found[node] for node in last}

    def _read_together(self, nodes: Sequence[Node]) -> Tensor:
        """Read these, and note their keys and values; the states [node, H] of their last tokens."""
        reading, device = Reading(nodes), self.model.device
        ids = pad_right([list(node.tokens) for node in nodes], 0).to(device)
        starts = torch.tensor([node.start for node in nodes], device=device)
        states = self._forward(ids, starts[:, None] + torch.arange(ids.shape[1], device=device), reading)
        for place, node in enumerate(nodes):
            node.states = torch.stack([layer[:, place, :, : len(node.tokens)] for layer in reading.states])
        ends = torch.tensor([len(node.tokens) - 1 for node in nodes], device=device)
        return states[torch.arange(len(nodes), device=device), ends]

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [row]: the last one of every row."""
        states = self._forward(tokens[:, None], self.positions[:, None], self._rows)
        self.positions = self.positions + 1
        for cohort in self.cohorts:
            cohort.length += 1
        return states[:, 0]

    def _forward(self, ids: Tensor, positions: Tensor, shared: Reading | Step) -> Tensor:
        # transformers hands `shared` to the attention
        output = self.decoder(input_ids=ids, position_ids=positions, use_cache=False, shared=shared)
        return output.last_hidden_state

    def keep(self, kept: list[bool]) -> None:
        """kept [row]: whether it stays."""
        first, left = 0, []
        for cohort in self.cohorts:
            rows = [row for row, stays in enumerate(kept[first : first + cohort.rows]) if stays]
            first += cohort.rows
            if len(rows) < cohort.rows and rows:
                cohort.keep(rows)
            left += [cohort] if rows else []
        self.cohorts = left
        self._rows = Step(left)
        self.positions = self.positions[torch.tensor(kept, device=self.positions.device)]


def _groups(nodes: Sequence[Node]) -> list[list[Node]]:
    """Nodes of similar length, so many together that READ tokens hold them; in each group in the order that they have
    here, where those below one node are neighbours."""
    groups: list[list[Node]] = []
    for node in sorted(nodes, key=lambda node: -len(node.tokens)):
        if not groups or len(groups[-1][0].tokens) * (len(groups[-1]) + 1) > READ:
            groups.append([])
        groups[-1].append(node)
    places = {node: place for place, node in enumerate(nodes)}
    return [sorted(group, key=places.__getitem__) for group in groups]


class PaddedDecoder:
    """Rows that begin together, their prompts padded on the left, on transformers' own cache."""

    joins = False

    def __init__(self, model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], completion: int):
        self.model, self.prompt_ids = model, prompt_ids
        self.row_tokens = max(map(len, prompt_ids), default=0) + completion

    def order(self) -> list[int]:
        """The longest first."""
        return sorted(range(len(self.prompt_ids)), key=lambda i: -len(self.prompt_ids[i]))

    def held(self, prompts: Sequence[int]) -> int:
        return sum(len(self.prompt_ids[i]) for i in prompts)

    def begin(self, owners: Sequence[int]) -> Tensor:
        """owners: the prompt of every row, equal ones side by side."""
        prompts = list(dict.fromkeys(owners))
        ids, device = [self.prompt_ids[i] for i in prompts], self.model.device
        self.length = max(map(len, ids))
        self.padding = torch.tensor([self.length - len(one) for one in ids], device=device)
        self.cache = DynamicCache(config=self.model.config)
        padded = torch.tensor([[0] * (self.length - len(one)) + list(one) for one in ids], device=device)
        logits = self._forward(padded, 0)
        rows = torch.tensor([prompts.index(i) for i in owners], device=device)
        self.cache.batch_select_indices(rows)
        self.padding = self.padding[rows]
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """tokens [row]: the last one of every row."""
        self.length += 1
        return self._forward(tokens[:, None], self.length - 1)

    def _forward(self, ids: Tensor, start: int) -> Tensor:
        """Feed ids [row, token] as columns from `start` on; the logits [row, vocabulary] at the end."""
        columns, arguments = torch.arange(start + ids.shape[1], device=ids.device), {}
        if self.padding.any():
            arguments["position_ids"] = (columns[start:] - self.padding[:, None]).clamp(min=0)
            arguments["attention_mask"] = (columns >= self.padding[:, None]).long()
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **arguments)
        return output.logits[:, -1]

    @staticmethod
    def logits(states: Tensor) -> Tensor:
        """The states of such a model are logits: a model of any kind may do more than multiply by its output head."""
        return states

    def keep(self, kept: list[bool]) -> None:
        """kept [row]: whether it stays."""
        if any(kept) and not all(kept):
            rows = torch.tensor([row for row, stays in enumerate(kept) if stays], device=self.padding.device)
            self.padding = self.padding[rows]
            self.cache.batch_select_indices(rows)
