"""The keys and values of a prompt once for all its samples: `SharedPromptCache`, where `shares_prompts` allows it.

Bifurcated attention, Athiwaratkun et al. 2024 (arXiv:2403.08845). With this module transformers has an attention
implementation called "shared_prompt", which reads the cache that it is handed as `shared`.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED_PROMPT_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # plain softmax attention, tested


class SharedPromptCache(Cache):
    """Keys and values of every prompt once, and of the drawn tokens per row.

    `slots` [row] places the rows in a grid [prompt, width], in which the rows of one prompt are neighbours: all
    of them meet the keys of their prompt in one matrix product. Places of rows that left stay empty.
    """

    def __init__(self, cache, padding, owners):
        super().__init__(layers=[_SharedPromptLayer(layer) for layer in cache.layers])
        columns = torch.arange(cache.get_seq_length(), device=padding.device)
        hidden = columns < padding[:, None]
        self.bias = torch.zeros(hidden.shape, device=padding.device).masked_fill(hidden, -torch.inf)[:, None, None]
        self._place(owners)

    def _place(self, owners):
        counts = owners.bincount()
        first = counts.cumsum(0) - counts  # rows ascend by prompt
        self.owners, self.width = owners, int(counts.max())
        self.slots = owners * self.width + torch.arange(len(owners), device=owners.device) - first[owners]

    def batch_select_indices(self, indices):
        alive, owners = self.owners[indices].unique(return_inverse=True)
        for layer in self.layers:
            layer.batch_select_indices(indices)
            layer.select_prompts(alive)
        self.bias = self.bias[alive]
        self._place(owners)

    def to_grid(self, rows):
        """[row, head, query, feature] -> [prompt, head, width * query, feature]."""
        _, heads, queries, features = rows.shape
        places = len(self.bias) * self.width
        if places > len(rows):
            rows = rows.new_zeros(places, heads, queries, features).index_copy_(0, self.slots, rows)
        grid = rows.reshape(-1, self.width, heads, queries, features).transpose(1, 2)
        return grid.reshape(-1, heads, self.width * queries, features)

    def from_grid(self, grid):
        """The inverse of `to_grid`."""
        prompts, heads, size, features = grid.shape
        rows = grid.reshape(prompts, heads, self.width, -1, features).transpose(1, 2)
        rows = rows.reshape(prompts * self.width, heads, size // self.width, features)
        return rows if len(rows) == len(self.slots) else rows[self.slots]


class _SharedPromptLayer(DynamicLayer):
    """One layer of it: `prompt_keys` and `prompt_values` [prompt, head, token, feature], and as `keys` and `values`
    [row, head, token, feature] the drawn tokens, in memory that grows by 16 tokens at a time, not at every token.
    """

    def __init__(self, layer):
        super().__init__()
        self.prompt_keys, self.prompt_values = layer.keys, layer.values
        self.length, self.store = 0, None

    def update(self, key_states, value_states, *args, **kwargs):
        new = torch.stack((key_states, value_states))  # [2, row, head, 1, feature]
        if self.length % 16 == 0:
            room = torch.empty_like(new).expand(-1, -1, -1, 16, -1)
            self.store = room.clone() if self.store is None else torch.cat((self.store, room), 3)
        self.store[:, :, :, self.length : self.length + 1] = new
        self.length += 1
        self.keys, self.values = self.store[:, :, :, : self.length]
        return self.keys, self.values

    def get_seq_length(self):
        return self.prompt_keys.shape[2] + self.length

    def batch_select_indices(self, indices):
        self.keys = self.values = None  # else their memory would wait for the next token
        self.store = self.store[:, indices]

    def select_prompts(self, indices):
        if len(indices) < len(self.prompt_keys):
            self.prompt_keys, self.prompt_values = self.prompt_keys[indices], self.prompt_values[indices]


def _shared_prompt_attention(module, query, key, value, attention_mask, scaling, shared=None, **kwargs):
    """Attention of one new token per row to its prompt and to its own drawn tokens (`key`, `value`).

    Both parts go through one softmax, so this is ordinary attention, in another order of summation. Without
    `shared`, which is when prompts are read, it is the SDPA attention of transformers.
    """
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, features = query.shape
    layer = shared.layers[module.layer_idx]
    length = layer.prompt_keys.shape[2]
    query = (query * scaling).view(rows, key.shape[1], -1, features)  # query heads in groups, one per key head
    prompt = shared.to_grid(query) @ layer.prompt_keys.transpose(2, 3) + shared.bias
    scores = torch.cat((shared.from_grid(prompt), query @ key.transpose(2, 3)), 3)
    weights = scores.softmax(3, dtype=torch.float32).to(value.dtype)
    output = shared.from_grid(shared.to_grid(weights[..., :length]) @ layer.prompt_values)
    output = output + weights[..., length:] @ value
    return output.reshape(rows, 1, heads, features), None


AttentionInterface.register("shared_prompt", _shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def shares_prompts(model) -> bool:
    """Whether the model can read a `SharedPromptCache`: a tested kind, with plain attention in every layer."""
    layers = DynamicCache(config=model.config).layers
    return model.config.model_type in SHARED_PROMPT_MODELS and all(type(x) is DynamicLayer for x in layers)
