"""Attention of rows to what they share with other rows, and to tokens of their own.

Rows meet what they share in one matrix product: long beginnings, such as exemplars, the rows of many prompts
(`SharedNodes`), the rest of a prompt its own samples (`PromptGrid`). All parts go through one softmax, so this is
ordinary attention, in another order of summation. Hydragen, Juravsky et al. 2024 (arXiv:2402.05099); bifurcated
attention, Athiwaratkun et al. 2024 (arXiv:2403.08845).

With this module transformers has an attention implementation "prefix_tree", which asks what it is handed as `shared`: a
`Reading` while prompts are read, a `Step` while rows grow.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate, groupby, zip_longest

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from smlib.sampling.prefix_tree import Node

TREE_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # plain softmax attention, tested
WORTH = 1024  # tokens that a node must spare the grid, to be worth an attention of its own in every layer at every step
FUSED = ("cpu",)  # where one kernel gives attention with its denominator
GROWTH = 16  # tokens by which the memory for drawn ones grows

Part = tuple[Tensor, Tensor]  # attention to some keys, and the logarithm of its softmax's denominator


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Part:
    """Attention [n, head, query, feature] to keys and values [n, head, key, feature], and the logarithm of its
    softmax's denominator [n, head, query] in float32. The query is scaled already."""
    if query.device.type in FUSED:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, is_causal=causal, scale=1.0)
    scores = query @ key.transpose(2, 3)
    if causal:
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    weights, log = softmax(scores)
    return weights.to(value.dtype) @ value, log


def softmax(scores: Tensor) -> Part:
    """Its weights, rounded to the dtype of the scores, and the logarithm of its denominator; computed in float32."""
    exact = scores.float()
    weights = exact.softmax(3)
    return weights.to(scores.dtype), exact.amax(3) - weights.amax(3).log()


def merge(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """Attention to the keys of all parts."""
    (output, log), *others = parts
    for other, its_log in others:
        share = (log - its_log).sigmoid()[..., None]
        output, log = torch.lerp(other.float(), output.float(), share), torch.logaddexp(log, its_log)
    return output.to(dtype)


class SharedNodes:
    """Nodes above the rows of several prompts, at one depth of the tree: spans of rows, each with its node."""

    def __init__(self, spans: list[tuple[int, int, Node]], rows: int):
        self.spans, self.rows = [(first, last, node, node.states[:, :, None]) for first, last, node in spans], rows

    def attend(self, layer: int, query: Tensor) -> Part:
        """`attend` of rows [row, head, query, feature]; 0 and -inf for those below none of the nodes."""
        if [span[:2] for span in self.spans] == [(0, self.rows)]:
            return self._together(query, *self.spans[0][3][layer])
        output, log = torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        for first, last, _, states in self.spans:
            output[first:last], log[first:last] = self._together(query[first:last], *states[layer])
        return output, log

    def _together(self, query: Tensor, key: Tensor, value: Tensor) -> Part:
        """All rows with the same keys, as one row with all queries."""
        rows, heads, queries, features = query.shape
        query = query.transpose(0, 1).reshape(1, heads, rows * queries, features)
        output, log = attend(query, key, value)
        output = output.reshape(heads, rows, queries, features).transpose(0, 1)
        return output, log.reshape(heads, rows, queries).transpose(0, 1)

    def keep(self, rows: list[int]) -> None:
        places = [(bisect_left(rows, first), bisect_left(rows, last), *rest) for first, last, *rest in self.spans]
        self.spans, self.rows = [place for place in places if place[0] < place[1]], len(rows)


class PromptGrid:
    """The rest of every prompt, each in a row of its own, and the rows of its samples.

    states [layer]: keys and values [2, prompt, head, token, feature], padded at the end; bias hides the padding.

    The rows of a prompt are neighbours in a grid [prompt, width], so that all of them meet its keys in one product.
    Places of prompts with fewer rows stay empty.
    """

    def __init__(self, paths: Sequence[Sequence[Node]], counts: Sequence[int], like: Tensor):
        lengths = [sum(len(node.tokens) for node in path) for path in paths]
        layers, two, heads, _, features = like.shape
        self.states = [like.new_zeros(two, len(paths), heads, max(lengths), features) for _ in range(layers)]
        for place, path in enumerate(paths):
            end = 0
            for node in path:
                for states, new in zip(self.states, node.states, strict=True):
                    states[:, place, :, end : end + len(node.tokens)] = new
                end += len(node.tokens)
        self.bias = None
        if min(lengths) < max(lengths):
            hidden = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            # Of a prompt with nothing here one key stays, with less than any score: a softmax needs one.
            bias[hidden.all(1), 0] = torch.finfo(like.dtype).min / 2
            self.bias = bias.to(like.device, like.dtype)[:, None, None]
        self._place([place for place, count in enumerate(counts) for _ in range(count)])

    def _place(self, owners: list[int]) -> None:
        """owners: the prompt of every row, in ascending order."""
        counts = Counter(owners)
        places = [within for count in counts.values() for within in range(count)]
        self.owners, self.width = owners, max(counts.values())
        slots = [owner * self.width + within for owner, within in zip(owners, places, strict=True)]
        self.slots = torch.tensor(slots, device=self.states[0].device)

    def keep(self, rows: list[int]) -> None:
        owners = [self.owners[row] for row in rows]
        alive = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        if len(alive) < self.states[0].shape[1]:
            index = torch.tensor(list(alive), device=self.slots.device)
            for layer, states in enumerate(self.states):
                self.states[layer] = states[:, index]
            self.bias = self.bias if self.bias is None else self.bias[index]
        self._place([alive[owner] for owner in owners])

    def scores(self, layer: int, query: Tensor) -> Tensor:
        """[row, head, query, feature] -> [row, head, query, token]."""
        scores = self._to_grid(query) @ self.states[layer][0].transpose(2, 3)
        return self._from_grid(scores if self.bias is None else scores + self.bias)

    def outputs(self, layer: int, weights: Tensor) -> Tensor:
        """[row, head, query, token] -> [row, head, query, feature]."""
        return self._from_grid(self._to_grid(weights) @ self.states[layer][1])

    def attend(self, layer: int, query: Tensor) -> Part:
        """`attend` of rows [row, head, query, feature]."""
        weights, log = softmax(self.scores(layer, query))
        return self.outputs(layer, weights), log

    def _to_grid(self, rows: Tensor) -> Tensor:
        """[row, head, query, any] -> [prompt, head, width * query, any]."""
        if self.width == 1:
            return rows
        _, heads, queries, size = rows.shape
        places = self.states[0].shape[1] * self.width
        if places > len(rows):
            rows = rows.new_zeros(places, heads, queries, size).index_copy_(0, self.slots, rows)
        grid = rows.reshape(-1, self.width, heads, queries, size).transpose(1, 2)
        return grid.reshape(-1, heads, self.width * queries, size)

    def _from_grid(self, grid: Tensor) -> Tensor:
        """The inverse of `_to_grid`."""
        if self.width == 1:
            return grid
        prompts, heads, places, size = grid.shape
        rows = grid.view(prompts, heads, self.width, -1, size).transpose(1, 2)
        rows = rows.reshape(prompts * self.width, heads, places // self.width, size)
        return rows if len(rows) == len(self.slots) else rows[self.slots]


def grid_starts(paths: Sequence[Sequence[Node]], in_use: Collection[Node] = ()) -> list[int]:
    """At which of its nodes the grid's part of each path begins: behind the last one that is worth an attention of its
    own, as several of the paths, neighbours, go through it, or rows that are at work do (in_use)."""
    starts = [0] * len(paths)
    for depth, nodes in enumerate(zip_longest(*paths)):
        for node, group in groupby(range(len(nodes)), key=nodes.__getitem__):
            prompts = list(group)
            if node and (len(prompts) - 1 + (node in in_use)) * len(node.tokens) >= WORTH:
                for prompt in prompts:
                    starts[prompt] = depth + 1
    return starts


class Context:
    """All that rows attend to besides their own tokens.

    paths: of every prompt, its nodes, which have been read; counts: how many rows it has. in_use: as of `grid_starts`.
    """

    def __init__(self, paths: Sequence[Sequence[Node]], counts: Sequence[int], in_use: Collection[Node] = ()):
        ends, starts = list(accumulate(counts, initial=0)), grid_starts(paths, in_use)
        self.shared = []
        for depth in range(max(starts)):
            nodes = [path[depth] if start > depth else None for path, start in zip(paths, starts, strict=True)]
            groups = [(node, list(group)) for node, group in groupby(range(len(nodes)), key=nodes.__getitem__) if node]
            spans = [(ends[prompts[0]], ends[prompts[-1] + 1], node) for node, prompts in groups]
            self.shared.append(SharedNodes(spans, ends[-1]))
        rest = [path[start:] for path, start in zip(paths, starts, strict=True)]
        like = next((node.states for path in rest for node in path), None)
        self.grid = None if like is None else PromptGrid(rest, counts, like)

    @property
    def parts(self) -> list[SharedNodes | PromptGrid]:
        return [*self.shared, *([self.grid] if self.grid else [])]

    def keep(self, rows: list[int]) -> None:
        """Only these rows are left."""
        for part in self.parts:
            part.keep(rows)

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are held beside those of the tree, padding included."""
        return self.grid.states[0].shape[1] * self.grid.states[0].shape[3] if self.grid else 0


class Reading:
    """Nodes that are read together: each of their tokens attends to what is above the node, and to those before it."""

    def __init__(self, nodes: Sequence[Node]):
        self.context = Context([node.path()[:-1] for node in nodes], [1] * len(nodes))
        self.states: list[Tensor] = []  # layer -> [2, node, head, token, feature]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[node, query head, token, feature] -> the same of the output; keys and values are kept."""
        new = torch.stack((key, value))
        self.states.append(new)
        nodes, heads, tokens, features = query.shape
        groups = heads // key.shape[1]
        output, log = attend(query, *new.repeat_interleave(groups, 2), causal=True)
        grouped = (nodes, key.shape[1], groups * tokens)  # the query heads of a key head in a row
        parts = [(output.reshape(*grouped, features), log.reshape(grouped))]
        parts += [part.attend(layer, query.reshape(*grouped, features)) for part in self.context.parts]
        return merge(parts, value.dtype).reshape(nodes, heads, tokens, features)


class Cohort:
    """Rows that began together, each with one token more at every step: what is above them, and their own tokens.

    own [layer]: keys and values [2, row, head, token, feature] of drawn tokens, in memory that grows by GROWTH tokens.
    """

    def __init__(self, context: Context, rows: int):
        self.context, self.rows, self.length = context, rows, 0
        self.own: list[Tensor] = []

    def attend(self, layer: int, query: Tensor, new: Tensor, alone: bool) -> tuple[Tensor, Tensor | None]:
        """`attend` of rows [row, head, query, feature] to the grid and to their own tokens, of which new [2, row, head,
        1, feature] is the last: so few keys that one softmax over both is faster. alone: without the logarithm."""
        (key, value), grid = self._append(layer, new), self.context.grid
        scores = query @ key.transpose(2, 3)
        scores[..., self.length + 1 :] = -torch.inf  # a product with part of the memory would copy that part
        if grid:
            scores = torch.cat((grid.scores(layer, query), scores), 3)
        weights, log = (scores.softmax(3), None) if alone else softmax(scores)
        own = weights.shape[3] - key.shape[2]
        output = weights[..., own:] @ value
        return (output + grid.outputs(layer, weights[..., :own]) if grid else output), log

    def _append(self, layer: int, new: Tensor) -> Tensor:
        """The memory [2, row, head, token, feature] of a layer's keys and values, with these as the last ones."""
        if self.length % GROWTH == 0:
            room = torch.zeros_like(new).expand(-1, -1, -1, GROWTH, -1)
            if self.length == 0:
                self.own.append(room.contiguous())
            else:
                self.own[layer] = torch.cat((self.own[layer], room), 3)
        self.own[layer][:, :, :, self.length] = new[:, :, :, 0]
        return self.own[layer]

    def keep(self, rows: list[int]) -> None:
        """Only these rows are left."""
        self.rows, index = len(rows), torch.tensor(rows, device=self.own[0].device if self.own else None)
        self.context.keep(rows)
        for layer, states in enumerate(self.own):
            self.own[layer] = states[:, index]

    def tokens(self, completion: int) -> int:
        """Tokens whose keys and values it holds when every row has `completion`."""
        return self.context.tokens + self.rows * grown(completion)


def grown(tokens: int) -> int:
    """For how many tokens there is room in memory that grows by GROWTH."""
    return -(-tokens // GROWTH) * GROWTH


class Step:
    """One new token of every row of all cohorts, whose rows follow each other."""

    def __init__(self, cohorts: Sequence[Cohort]):
        self.cohorts, self.sizes = cohorts, [cohort.rows for cohort in cohorts]
        levels: list[list[tuple[int, int, Node]]] = []
        for first, cohort in zip(accumulate(self.sizes, initial=0), cohorts, strict=False):
            for depth, nodes in enumerate(cohort.context.shared):
                levels += [[]] if depth == len(levels) else []
                levels[depth] += [(first + start, first + end, node) for start, end, node, _ in nodes.spans]
        self.shared = [SharedNodes(_joined(spans), sum(self.sizes)) for spans in levels]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[row, query head, 1, feature] -> the same of the output."""
        rows, heads, _, features = query.shape
        query = query.reshape(rows, key.shape[1], -1, features)  # the query heads of a key head in a row
        tokens = zip(query.split(self.sizes), torch.stack((key, value)).split(self.sizes, 1), strict=True)
        alone = not self.shared
        near = [cohort.attend(layer, *token, alone) for cohort, token in zip(self.cohorts, tokens, strict=True)]
        output, log = (_cat(part) for part in zip(*near, strict=True))
        if not alone:
            output = merge([(output, log), *(nodes.attend(layer, query) for nodes in self.shared)], value.dtype)
        return output.reshape(rows, heads, 1, features)


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _joined(spans: list[tuple[int, int, Node]]) -> list[tuple[int, int, Node]]:
    """Neighbours below one node as one span."""
    joined: list[tuple[int, int, Node]] = []
    for first, last, node in spans:
        if joined and joined[-1][1:] == (first, node):
            first = joined.pop()[0]
        joined.append((first, last, node))
    return joined


def _attention(module, query, key, value, attention_mask, scaling, shared, **kwargs):
    output = shared.attend(module.layer_idx, query * scaling, key, value)
    return output.transpose(1, 2), None


AttentionInterface.register("prefix_tree", _attention)


def reads_trees(model) -> bool:
    """Whether the model can attend to a prefix tree: a tested kind, with plain attention in every layer."""
    layers = DynamicCache(config=model.config).layers
    return model.config.model_type in TREE_MODELS and all(type(layer) is DynamicLayer for layer in layers)
