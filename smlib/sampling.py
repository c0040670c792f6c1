"""Draw many completions per prompt from any transformers causal LM: exact, reproducible, and fast on a CPU.

    samples = sample(model, tokenizer, ["Q: 2 + 2?\\nA:"], n=8, temperature=0.7, max_new_tokens=64, seed=0)
    samples[0][3].text         # fourth completion of the first prompt

Three ideas make it several times faster than `model.generate` on a small model:

1. The n samples of a prompt share its keys and values: they are computed, stored and read once per step
   (bifurcated attention, Athiwaratkun et al. 2024, arXiv:2403.08845). This is for the models in
   `SHARED_PROMPT_MODELS`; every other model runs through the same code on a plain `DynamicCache`.
2. Rows that finished leave the batch.
3. A step does nothing but the forward pass and one vectorised draw.
"""

import hashlib
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from smlib.declared import (
    Drawn,
    Held,
    Natural,
    Rows,
    Share,
    Temperature,
    Tokens,
    TopK,
    checked,
)
from smlib.encoding import decode, encode_prompt, ends
from smlib.errors import ModelError, UsageError
from smlib.progress import progress_bar

MAX_BATCH = 512  # rows that step together
MAX_PROMPTS = 256  # of different prompts; the keys and values of more do not fit a CPU's cache
CHECK_EVERY = 4  # steps between two looks for finished rows
FIXED_STEPS = 64  # of these; a multiple of the above
SHARED_PROMPT_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # plain softmax attention, tested


@dataclass(frozen=True)
class Sample:
    """One completion.

    text:          decoded completion before its first special token, cut before the first stop string.
    token_ids:     the drawn tokens, with the special token that ended the sample if one was drawn, and with the tokens
                   of the stop string that did.
    logprobs:      log p of each drawn token, in nats, under the model itself: no temperature, no truncation. It
                   is what a training forward pass gives.
    finish_reason: "stop" (special token or stop string) or "length" (`max_new_tokens` drawn).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


Until = Callable[[int, Sample], bool]  # (index of the prompt, its newest sample) -> whether it needs no more


def sample(
    model,
    tokenizer,
    prompts: list[str],
    n: int,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    keys: list[str] | None = None,
    first: int = 0,
    until: Until | None = None,
    max_batch: int = MAX_BATCH,
    cache_tokens: int = 0,
    cuda_graphs: bool = False,
    progress: str | None = None,
) -> list[list[Sample]]:
    """Draw `n` completions for every prompt; `result[i][j]` is sample number first + j of prompt i.

    temperature: 0 is greedy decoding; otherwise logits are divided by it.
    top_k, top_p: keep the k most probable tokens (0: all), then the smallest set of tokens that holds at least
        the share `top_p` of what is left (1.0: all).
    seed, keys: the random numbers of a sample depend on (seed, key of its prompt, sample number) only. So the
        same sample comes out whatever the other prompts, their order, `n` and `max_batch` are, up to float
        rounding: a batch of another shape may round a logit otherwise, and a draw within that rounding of a
        boundary flips (about one token in a million in float32, far more in bfloat16). Keys are stable ids such
        as `Problem.id`; by default the prompts themselves.
    first: number of the first sample. n = 8 and later first = 8, n = 8 give what n = 16 gives at once.
    until: stop drawing for a prompt once it holds, as in `draw_until`; by default all n are drawn.
    max_batch: rows in flight; lower it if the keys and values of a large model do not fit in memory.
    cache_tokens: tokens whose keys and values are held at once, every prompt's once and `max_new_tokens` of every row;
        so short prompts are drawn with more rows than long ones. 0: no bound but max_batch.
    cuda_graphs: steps of fixed shapes, which a GPU records once and replays, see `_FixedSteps`. For a model that is
        whole on one GPU, and one that `_records` says yes to; others are drawn from as ever.
    progress: label of a progress bar on standard output; None prints nothing.

    Raises ValueError for arguments out of range, equal keys, empty prompts, and prompts that with `max_new_tokens`
    are longer than the model's `max_position_embeddings`.
    """
    check_prompts(prompts)
    return sample_ids(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        keys=list(prompts) if keys is None else keys,
        first=first,
        until=until,
        tokenizer=tokenizer,
        max_batch=max_batch,
        cache_tokens=cache_tokens,
        cuda_graphs=cuda_graphs,
        progress=progress,
    )


def sample_ids(
    model,
    prompt_ids: list[list[int]],
    n: int,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[str] = (),
    keys: list[str] | None = None,
    first: int = 0,
    until: Until | None = None,
    tokenizer=None,
    max_batch: int = MAX_BATCH,
    cache_tokens: int = 0,
    cuda_graphs: bool = False,
    progress: str | None = None,
) -> list[list[Sample]]:
    """`sample` for prompts that are token ids already (with <bos>, if the model wants one).

    So a partial rationale is continued: its ids are those of the prompt plus those of the part. A sample ends with any
    end token of `model.generation_config` and of the tokenizer (`encoding.ends`). Without a tokenizer, `text` is "".
    Default keys are the token
    ids, joined by blanks.
    """
    if keys is None:
        keys = [" ".join(map(str, ids)) for ids in prompt_ids]
    check_drawing(n, temperature, max_new_tokens, top_p, top_k, stop, keys, first, seed, len(prompt_ids))
    checked("max_batch", max_batch, Rows, MAX_BATCH)
    checked("cache_tokens", cache_tokens, Held, 0)
    if stop and tokenizer is None:
        raise UsageError(f"stop is {stop!r}, but stop strings need a tokenizer; pass tokenizer=.")
    check_lengths(prompt_ids, keys, max_new_tokens, getattr(model.config, "max_position_embeddings", None))
    if until is not None:
        options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "top_p": top_p}
        options |= {"top_k": top_k, "stop": stop, "tokenizer": tokenizer, "max_batch": max_batch}
        options |= {"cache_tokens": cache_tokens, "cuda_graphs": cuda_graphs}

        def draw(numbers, number):
            ids, names = [prompt_ids[i] for i in numbers], [keys[i] for i in numbers]
            return [found for [found] in sample_ids(model, ids, 1, keys=names, first=number, **options)]

        return draw_until(draw, len(prompt_ids), range(first, first + n), until, progress)
    known = model.get_input_embeddings().num_embeddings
    if (greatest := max(map(max, prompt_ids), default=0)) >= known:
        raise ModelError(
            f"the tokenizer does not fit the model: a prompt has token {greatest}, of {known} that it knows"
        )
    draw = partial(_draw, temperature=temperature, top_k=top_k, top_p=top_p)
    ending = Ending(ends(tokenizer, model.generation_config), tuple(stop), tokenizer)

    # Prompts of similar length share a block, so that little is padded; the longest come first, so that a lack of
    # memory shows at once.
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    rows = [(i, j) for i in order for j in range(n)]
    results: list[list[Sample]] = [[None] * n for _ in prompt_ids]
    tokens, started = 0, time.perf_counter()
    # Bars go to standard output, since notebooks here keep standard error empty.
    bar = progress_bar(progress, len(rows), "sample")
    with bar, _sampling_mode(model), torch.inference_mode():
        lengths = [len(prompt_ids[i]) for i in order]
        for first_row, last_row in _blocks(lengths, n, min(max_batch, MAX_PROMPTS * n), max_new_tokens, cache_tokens):
            block = rows[first_row:last_row]
            numbers = list(dict.fromkeys(i for i, _ in block))
            prompts = [prompt_ids[i] for i in numbers]
            owners = [numbers.index(i) for i, _ in block]
            uniforms = np.stack([_uniforms(seed, keys[i], first + j, max_new_tokens) for i, j in block])
            for row, completed in _complete_block(model, prompts, owners, uniforms, draw, ending, cuda_graphs):
                i, j = block[row]
                results[i][j] = completed
                tokens += len(completed.token_ids)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
                bar.update()
    return results


def rows_at_once(rows: int, samples: int, prompt: int, completion: int, cache_tokens: int) -> int:
    """The most of `rows` rows, `samples` of each prompt, that hold keys and values of at most so many tokens (0: any
    number): `prompt` of every prompt and `completion` of every row. At least one, whatever it holds."""
    if not cache_tokens:
        return rows
    whole, left = divmod(cache_tokens, prompt + samples * completion)
    return max(min(rows, whole * samples + max((left - prompt) // completion, 0)), 1)


def _blocks(lengths: list[int], n: int, rows: int, completion: int, cache_tokens: int) -> Iterator[tuple[int, int]]:
    """Spans of rows, n for each prompt of these lengths (the longest first), that are drawn together."""
    start, total = 0, n * len(lengths)
    while start < total:
        size = rows_at_once(rows, n, lengths[start // n], completion, cache_tokens)
        if cache_tokens:  # a prompt in two blocks would be held twice
            size = size - size % n if size >= n and start % n == 0 else min(size, n - start % n)
        yield start, start + size
        start += size


def draw_until(
    draw: Callable[[list[int], int], list[Sample]],
    prompts: int,
    numbers: range,
    until: Until,
    progress: str | None = None,
) -> list[list[Sample]]:
    """Draw sample after sample for every prompt until its condition holds; samples [prompt][number].

    draw(indices, number): sample `number` of the prompts with these indices. All prompts that are still open are
    drawn together, one sample each a round. So no sample is drawn in vain, and a prompt's last sample is the first
    for which `until(index of the prompt, sample)` is true, or the last of `numbers`. The prompts are read anew in every
    round: where nearly all samples are needed anyway, drawing them at once is faster.
    """
    results: list[list[Sample]] = [[] for _ in range(prompts)]
    left = list(range(prompts))
    with progress_bar(progress, prompts, "prompt") as bar:
        for number in numbers:
            found = draw(left, number) if left else []
            still = []
            for i, one in zip(left, found, strict=True):
                results[i].append(one)
                if not until(i, one) and number != numbers[-1]:
                    still.append(i)
            bar.update(len(left) - len(still))
            bar.set_postfix_str(f"{sum(map(len, results)):,} samples", refresh=False)
            left = still
    return results


def _complete_block(model, prompts, owners, uniforms, draw, ending, cuda_graphs) -> Iterator[tuple[int, Sample]]:
    """Complete rows in step, with the random numbers `uniforms` [row, step]; yield (row, Sample) as rows finish.

    Row r continues prompts[owners[r]]; owners ascend, so the rows of one prompt are neighbours.
    """
    device, steps = model.device, uniforms.shape[1]
    uniforms = torch.from_numpy(uniforms).to(device)
    logits, cache, padding = _prefill(model, prompts, torch.tensor(owners, device=device))
    if logits.isnan().any():
        raise ModelError("the model's logits are not numbers: its weights or its config.json are damaged")
    start = max(map(len, prompts))
    records, fixed = cuda_graphs and _records(model), None

    rows = torch.arange(len(owners), device=device)  # rows still in the batch
    tokens = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), steps, device=device)
    for step in range(steps):
        token = draw(logits, uniforms[:, step])[:, None]
        tokens[:, step] = token[:, 0]
        logprobs[:, step] = (logits.gather(1, token) - logits.logsumexp(1, keepdim=True))[:, 0]

        last, renew = step + 1 == steps, (step + 1) % FIXED_STEPS == 0
        if renew:
            logits = fixed = None  # their memory, before the next ones'
        if last or step % CHECK_EVERY == CHECK_EVERY - 1:
            finished = ending.reached(tokens[:, : step + 1]) | last
            done = int(finished.sum())
            # Dropping rows copies the cache, so a few of them wait; and it changes shapes.
            if done == len(rows) or (done * 8 >= len(rows) and (renew or not records)):
                drawn = (x[finished, : step + 1].tolist() for x in (tokens, logprobs))
                for row, ids, values in zip(rows[finished].tolist(), *drawn, strict=True):
                    yield row, ending.cut(ids, values)
                keep = (~finished).nonzero()[:, 0]
                if len(keep) == 0:
                    return
                rows, tokens, logprobs, uniforms = rows[keep], tokens[keep], logprobs[keep], uniforms[keep]
                token, padding = token[keep], padding[keep]
                cache.batch_select_indices(keep)
        if records:
            fixed = fixed or _FixedSteps(model, cache, padding, start, steps)
            logits = fixed(token, step)
        else:
            logits = _forward(model, token, cache, padding, start + step)


def _prefill(model, prompts, owners):
    """Read each prompt once; return logits [row, vocabulary], the cache of the rows, and left padding [row]."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    padding = torch.tensor([length - len(prompt) for prompt in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, cache, padding, 0)
    if _shares_prompts(model):
        cache = _SharedPromptCache(cache, padding, owners)
    else:
        cache.batch_select_indices(owners)
    return logits[owners], cache, padding[owners]


def _forward(model, ids, cache, padding, start):
    """Feed ids [row, token] as columns from `start` on; return the float32 logits [row, vocabulary] at the end."""
    columns = torch.arange(start + ids.shape[1], device=ids.device)
    positions = (columns[start:] - padding[:, None]).clamp(min=0)
    if isinstance(cache, _SharedPromptCache):
        arguments = {"position_ids": positions, "shared": cache}  # transformers hands `shared` to the attention
    elif padding.any():
        arguments = {"position_ids": positions, "attention_mask": (columns >= padding[:, None]).long()}
    else:
        arguments = {}
    return _last_logits(model, ids, cache, **arguments)


def _last_logits(model, ids, cache, **arguments):
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    return output.logits[:, -1].float()


class _FixedSteps:
    """`_forward` for at most FIXED_STEPS steps in a row, one token a row, without a change of any shape or address.

    So a GPU can record a step as a CUDA graph, and every later one is a single launch: of a large model's step
    with few rows most of the time goes into launching a thousand kernels. Keys and values of drawn tokens have room
    beforehand, of which what is not written yet is hidden. On a CPU the same steps run unrecorded.
    """

    def __init__(self, model, cache, padding, start, steps):
        self.model, self.cache, self.start, self.padding = model, cache, start, padding[:, None]
        self.token, self.position = torch.zeros_like(self.padding), torch.zeros_like(self.padding)
        self.graph, self.logits, self.records = None, None, padding.device.type == "cuda"
        cache.make_room(min(FIXED_STEPS, steps - cache.room))

    def __call__(self, token, step):
        """Float32 logits [row, vocabulary] after the tokens [row, 1] drawn in `step`; the next call overwrites them."""
        self.token.copy_(token)
        self.position.copy_(self.start + step - self.padding)
        self.cache.next_slot(step)
        if not self.records:
            return self._step()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.logits

    def _record(self):
        """Writing the step's keys and values twice changes nothing: the slot is the same."""
        with torch.cuda.device(self.token.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries set up what they may not while a graph is recorded
                self._step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside):
                self.logits = self._step()
        self.graph = graph

    def _step(self):
        return _last_logits(self.model, self.token, self.cache, position_ids=self.position, shared=self.cache)


class _SharedPromptCache(Cache):
    """Keys and values of every prompt once, and of the drawn tokens per row.

    `slots` [row] places the rows in a grid [prompt, width], in which the rows of one prompt are neighbours: all
    of them meet the keys of their prompt in one matrix product. Places of rows that left stay empty.
    """

    def __init__(self, cache, padding, owners):
        super().__init__(layers=[_SharedPromptLayer(layer) for layer in cache.layers])
        columns = torch.arange(cache.get_seq_length(), device=padding.device)
        hidden = columns < padding[:, None]
        self.bias = torch.zeros(hidden.shape, device=padding.device).masked_fill(hidden, -torch.inf)[:, None, None]
        self.drawn_bias, self.slot = None, None  # of `_FixedSteps`: [slot], with room for what is not drawn yet
        self._place(owners)

    @property
    def room(self):
        """Drawn tokens of a row that have room beforehand."""
        return 0 if self.drawn_bias is None else len(self.drawn_bias)

    def make_room(self, slots):
        """For so many more drawn tokens."""
        if self.drawn_bias is None:
            self.drawn_bias = self.bias.new_empty(0)
            self.slot = torch.zeros(1, dtype=torch.long, device=self.bias.device)
        self.drawn_bias = torch.cat((self.drawn_bias, self.bias.new_full((slots,), -torch.inf)))
        for layer in self.layers:
            layer.make_room(slots, len(self.owners), self.slot)

    def next_slot(self, number):
        """Where the next keys and values belong; they are no longer hidden."""
        self.slot.fill_(number)
        self.drawn_bias[number] = 0

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
        self.length, self.store, self.slot = 0, None, None

    def make_room(self, slots, rows, slot):
        """So many more tokens fit; where the next one belongs, says the tensor `slot`."""
        _, heads, _, features = self.prompt_keys.shape
        room = self.prompt_keys.new_zeros(2, rows, heads, slots, features)
        self.store = room if self.store is None else torch.cat((self.store, room), 3)
        self.slot, (self.keys, self.values) = slot, self.store

    def update(self, key_states, value_states, *args, **kwargs):
        new = torch.stack((key_states, value_states))  # [2, row, head, 1, feature]
        if self.slot is not None:
            self.store.index_copy_(3, self.slot, new)
            return self.keys, self.values
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
    drawn = query @ key.transpose(2, 3)
    if shared.drawn_bias is not None:
        drawn = drawn + shared.drawn_bias
    scores = torch.cat((shared.from_grid(prompt), drawn), 3)
    weights = scores.softmax(3, dtype=torch.float32).to(value.dtype)
    output = shared.from_grid(shared.to_grid(weights[..., :length]) @ layer.prompt_values)
    output = output + weights[..., length:] @ value
    return output.reshape(rows, 1, heads, features), None


AttentionInterface.register("shared_prompt", _shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)


def _shares_prompts(model) -> bool:
    layers = DynamicCache(config=model.config).layers
    return model.config.model_type in SHARED_PROMPT_MODELS and all(type(x) is DynamicLayer for x in layers)


def _records(model) -> bool:
    """Whether `_FixedSteps` can record the model: plain attention, and neither dynamic positions, which look at the
    longest row, nor FSDP, which waits for other streams."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return _shares_prompts(model) and rope.get("rope_type") != "dynamic" and not sharded


@contextmanager
def _sampling_mode(model) -> Iterator[None]:
    """No dropout, and attention with shared prompts if possible; everything as it was again afterwards."""
    training = [(module, module.training) for module in model.modules()]
    attention, shares = model.config._attn_implementation, _shares_prompts(model)
    model.eval()
    if shares:
        model.set_attn_implementation("shared_prompt")
    try:
        yield
    finally:
        if shares:
            model.set_attn_implementation(attention)
        for module, flag in training:
            module.training = flag


def _draw(logits, uniforms, temperature, top_k, top_p):
    """Tokens [row] for logits [row, vocabulary] by inverse CDF at uniforms [row]; greedy at temperature 0."""
    if temperature == 0:
        return logits.argmax(1)
    probs = _truncate((logits / temperature).softmax(1), top_k, top_p)
    cdf = probs.cumsum(1, dtype=torch.float64)
    # u < 1, so the first entry of the CDF above u * total exists, and its token has a probability above zero.
    return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]


def _truncate(probs, top_k, top_p):
    """Zero out the tokens that top-k and then top-p (on what top-k left) drop. Not renormalised."""
    if top_k == 0 and top_p == 1:
        return probs
    ranked, tokens = probs.sort(dim=1, descending=True, stable=True)
    if top_k:
        ranked[:, top_k:] = 0
    before = ranked.cumsum(1) - ranked  # mass of the tokens that rank higher
    ranked[before >= top_p * ranked.sum(1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter(1, tokens, ranked)


def _uniforms(seed: int, key: str, number: int, length: int) -> np.ndarray:
    """The first `length` random numbers in [0, 1) of sample `number` of the prompt called `key`.

    SHAKE-256 turns the name of a stream into as many bytes as one asks for, and a longer stream starts with the
    shorter one: results do not depend on `max_new_tokens`, on the machine, or on a library's version.
    """
    data = hashlib.shake_256(f"{seed} {number} {key}".encode()).digest(8 * length)
    return (np.frombuffer(data, dtype="<u8") >> 12) / 2.0**52


@dataclass(frozen=True)
class Ending:
    """What ends a sample: a token of `eos`, or a string of `stop` in its text."""

    eos: tuple[int, ...]
    stop: tuple[str, ...]
    tokenizer: object

    def reached(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether the tokens [row, step] drawn so far hold an ending; [row]."""
        ended = torch.isin(tokens, torch.tensor(self.eos, dtype=torch.long, device=tokens.device)).any(1)
        if self.stop:
            stopped = [self._stopped(self._text(ids)) for ids in tokens.tolist()]
            ended |= torch.tensor(stopped, device=tokens.device)
        return ended

    def cut(self, ids: list[int], logprobs: list[float]) -> Sample:
        """The sample up to its first ending; tokens behind it are dropped."""
        count = next((t + 1 for t, token in enumerate(ids) if token in self.eos), None)
        reason, count = ("length", len(ids)) if count is None else ("stop", count)
        text = self._text(ids[:count])
        if self._stopped(text):
            # A stop string that is there after c tokens is there after c + 1, so halving finds the first such c.
            count = 1 + bisect_left(range(1, count), True, key=lambda c: self._stopped(self._text(ids[:c])))
            text = self._text(ids[:count])
            reason, text = "stop", text[: min(text.find(s) for s in self.stop if s in text)]
        return Sample(text, tuple(ids[:count]), tuple(logprobs[:count]), reason)

    def _text(self, ids):
        if self.tokenizer is None:
            return ""
        return decode(self.tokenizer, ids)

    def _stopped(self, text):
        return any(s in text for s in self.stop)


def check_drawing(n, temperature, max_new_tokens, top_p, top_k, stop, keys, first, seed, prompts: int) -> None:
    """Raise ValueError for the first argument that no engine takes."""
    checked("n", n, Drawn, 8)
    checked("temperature", temperature, Temperature, 1.0)
    checked("max_new_tokens", max_new_tokens, Tokens, 128)
    checked("top_p", top_p, Share, 1.0)
    checked("top_k", top_k, TopK, 0)
    checked("first", first, Natural, 0)
    checked("seed", seed, Natural, 0)
    if isinstance(stop, str) or "" in stop:
        raise UsageError(f"stop is {stop!r}, but must be a sequence of non-empty strings, such as ('Q:',).")
    if len(keys) != prompts:
        raise UsageError(f"{len(keys)} keys were given for {prompts} prompts; give one per prompt.")
    for key, count in Counter(keys).items():
        if count > 1:
            raise UsageError(
                f"key {key!r} is given {count} times, so these prompts would share their random numbers; "
                "raise n for more samples of one prompt, or pass distinct keys."
            )


def check_prompts(prompts: list[str]) -> None:
    """Raise ValueError for a prompt without text: with <bos> before it, it would pass as one of a token."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index} is empty; give every prompt some text.")


def check_room(name: str, max_new_tokens: int, config) -> None:
    """Raise ValueError for a max_new_tokens, called `name`, that no prompt of a model of this shape leaves room for."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_new_tokens >= limit:
        raise UsageError(
            f"{name} = {max_new_tokens} is beyond the model's {limit} positions, some of which a prompt takes: lower it"
        )


def check_lengths(prompt_ids, keys, max_new_tokens: int, limit: int | None) -> None:
    """Raise ValueError for a prompt without tokens, or one that would grow beyond `limit` positions."""
    for key, ids in zip(keys, prompt_ids, strict=True):
        if len(ids) == 0:
            raise UsageError(f"prompt {key!r} has no tokens; give at least one, such as <bos>.")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise UsageError(
                f"prompt {key!r} has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} is beyond the "
                f"model's {limit} positions; shorten the prompt or lower max_new_tokens."
            )
