"""Draw many completions per prompt from any transformers causal LM: exact, reproducible, and fast on a CPU.

    samples = sample(model, tokenizer, ["Q: 2 + 2?\\nA:"], n=8, temperature=0.7, max_new_tokens=64, seed=0)
    samples[0][3].text         # fourth completion of the first prompt

Three ideas make it several times faster than `model.generate` on a small model:

1. a prompt is read once and its keys and values are shared out to its n samples;
2. keys and values live in memory reserved for the whole completion, where `DynamicCache` copies
   everything it holds at every token;
3. finished rows leave the batch, and a step does nothing but the forward pass and the draw.
"""

import hashlib
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MAX_BATCH = 256  # rows that step together; more hardly helps a tiny model on a CPU (benchmarks/sampling.py)
CHECK_EVERY = 4  # steps between two looks for finished rows


@dataclass(frozen=True)
class Sample:
    """One completion.

    text:          decoded completion without special tokens, cut before the first stop string.
    token_ids:     the drawn tokens, with the end-of-sequence token if it was drawn, and with the tokens of the
                   stop string that ended the sample.
    logprobs:      log p of each drawn token, in nats, under the model itself: no temperature, no truncation. It
                   is what a training forward pass gives.
    finish_reason: "stop" (end-of-sequence token or stop string) or "length" (`max_new_tokens` drawn).
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


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
    max_batch: int = MAX_BATCH,
    progress: str | None = None,
) -> list[list[Sample]]:
    """Draw `n` completions for every prompt; `result[i][j]` is sample j of prompt i.

    temperature: 0 is greedy decoding; otherwise logits are divided by it.
    top_k, top_p: keep the k most probable tokens (0: all), then the smallest set of tokens that holds at least
        the share `top_p` of what is left (1.0: all).
    seed, keys: the random numbers of a sample depend on (seed, key of its prompt, sample number) only. So the
        same sample comes out whatever the other prompts, their order, `n` and `max_batch` are, up to float
        rounding: a batch of another shape may round a logit otherwise, and a draw within that rounding of a
        boundary flips (about one token in a million in float32, far more in bfloat16). Keys are stable ids such
        as `Problem.id`; by default the prompts themselves.
    max_batch: rows in flight; lower it if the keys and values of a large model do not fit in memory.
    progress: label of a progress bar on standard output; None prints nothing.

    Raises ValueError for arguments out of range, equal keys, and prompts that with `max_new_tokens` are longer
    than the model's `max_position_embeddings`.
    """
    return sample_ids(
        model,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        n,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        top_p=top_p,
        top_k=top_k,
        stop=stop,
        keys=list(prompts) if keys is None else keys,
        tokenizer=tokenizer,
        max_batch=max_batch,
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
    tokenizer=None,
    max_batch: int = MAX_BATCH,
    progress: str | None = None,
) -> list[list[Sample]]:
    """`sample` for prompts that are token ids already (with <bos>, if the model wants one).

    Without a tokenizer, `text` is "" and the end-of-sequence token is the one of `model.generation_config`.
    Default keys are the token ids, joined by blanks.
    """
    if keys is None:
        keys = [" ".join(map(str, ids)) for ids in prompt_ids]
    _check(model, prompt_ids, n, temperature, max_new_tokens, top_p, top_k, stop, keys, tokenizer, max_batch)
    eos = model.generation_config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    # Prompts of similar length share a block, so that little is padded; the longest come first, so that a lack of
    # memory shows at once.
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]))
    rows = [(i, j) for i in order for j in range(n)]
    results: list[list[Sample]] = [[None] * n for _ in prompt_ids]
    with _Bar(len(rows), progress) as bar, _evaluating(model), torch.inference_mode():
        for start in range(0, len(rows), max_batch):
            block = rows[start : start + max_batch]
            numbers = list(dict.fromkeys(i for i, _ in block))
            owners = [numbers.index(i) for i, _ in block]
            uniforms = np.stack([_uniforms(seed, keys[i], j, max_new_tokens) for i, j in block])
            finished = _complete_block(
                model,
                [prompt_ids[i] for i in numbers],
                owners,
                uniforms,
                temperature,
                top_k,
                top_p,
                eos,
                stop,
                tokenizer,
            )
            for row, result in finished:
                i, j = block[row]
                results[i][j] = result
                bar.add(result)
    return results


def _complete_block(model, prompts, owners, uniforms, temperature, top_k, top_p, eos, stop, tokenizer):
    """Complete a block of rows with `uniforms` [row, step]; yield (row, Sample) as rows finish.

    Row r continues prompts[owners[r]]; owners are sorted, so the rows of a prompt are neighbours.
    """
    device, steps = model.device, uniforms.shape[1]
    uniforms = torch.from_numpy(uniforms).to(device)
    eos = torch.tensor(eos, dtype=torch.long, device=device)
    owners = torch.tensor(owners, device=device)
    logits, cache, padding = _prefill(model, prompts, owners)
    length = cache.get_seq_length()

    rows = torch.arange(len(owners), device=device)  # rows still in the batch
    tokens = torch.zeros(len(rows), steps, dtype=torch.long, device=device)
    logprobs = torch.zeros(len(rows), steps, device=device)
    for step in range(steps):
        token = _draw(logits, uniforms[:, step], temperature, top_k, top_p)[:, None]
        tokens[:, step] = token[:, 0]
        logprobs[:, step] = (logits.gather(1, token) - logits.logsumexp(1, keepdim=True))[:, 0]

        done = step + 1
        if done == steps or done % CHECK_EVERY == 0:
            finished = torch.isin(tokens[:, :done], eos).any(1)
            if stop:
                texts = tokenizer.batch_decode(tokens[:, :done], skip_special_tokens=True)
                finished |= torch.tensor([any(s in text for s in stop) for text in texts], device=device)
            if done == steps:
                finished[:] = True
            if 8 * finished.sum() >= len(finished):
                drawn = zip(
                    rows[finished].tolist(),
                    tokens[finished, :done].tolist(),
                    logprobs[finished, :done].tolist(),
                    strict=True,
                )
                for row, ids, values in drawn:
                    yield row, _finish(ids, values, eos.tolist(), stop, tokenizer)
                keep = (~finished).nonzero()[:, 0]
                if len(keep) == 0:
                    return
                rows, tokens, logprobs, uniforms = rows[keep], tokens[keep], logprobs[keep], uniforms[keep]
                token, padding = token[keep], padding[keep]
                cache.batch_select_indices(keep)
        logits = _forward(model, token, cache, padding, length + step)


def _prefill(model, prompts, owners):
    """Read each prompt once; return logits [row, vocabulary], the cache of the rows, and the padding [row]."""
    length = max(map(len, prompts))
    padding = torch.tensor([length - len(prompt) for prompt in prompts], device=model.device)
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    cache = DynamicCache(config=model.config)
    logits = _forward(model, ids, cache, padding, 0)[owners]
    if model.config._attn_implementation == "shared_prompt":
        cache = _SharedPromptCache(cache, padding, owners)
    else:
        cache.batch_select_indices(owners)
    return logits, cache, padding[owners]


def _forward(model, ids, cache, padding, start):
    """Feed ids [row, new tokens] at columns from `start`; return float32 logits [row, vocabulary] after the last."""
    arguments = {}
    columns = torch.arange(start + ids.shape[1], device=ids.device)
    if isinstance(cache, _SharedPromptCache):
        arguments["shared"] = cache  # reaches `_shared_prompt_attention`
        arguments["position_ids"] = columns[start:] - padding[:, None]
    elif padding.any():
        arguments["attention_mask"] = (columns >= padding[:, None]).long()
        arguments["position_ids"] = (columns[start:] - padding[:, None]).clamp(min=0)
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    return output.logits[:, -1].float()


class _SharedPromptCache(Cache):
    """Keys and values of each prompt once, beside those of the tokens that each row has drawn.

    `slots` [row] places the rows in a grid [prompt, width], with the rows of one prompt side by side.
    """

    def __init__(self, cache, padding, owners):
        super().__init__(layers=[_SharedPromptLayer(layer) for layer in cache.layers])
        length = cache.get_seq_length()
        visible = torch.arange(length, device=padding.device) >= padding[:, None]
        bias = torch.zeros(visible.shape, dtype=cache.layers[0].keys.dtype, device=padding.device)
        self.bias = bias.masked_fill(~visible, -torch.inf)[:, None, None] if padding.any() else None
        self._place(owners)

    def _place(self, owners):
        self.owners = owners
        counts = torch.bincount(owners, minlength=0)
        self.width = int(counts.max())
        first = counts.cumsum(0) - counts
        self.slots = owners * self.width + torch.arange(len(owners), device=owners.device) - first[owners]

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        alive, owners = self.owners[indices].unique(return_inverse=True)
        if self.bias is not None:
            self.bias = self.bias[alive]
        if len(alive) < len(self.layers[0].prompt_keys):
            for layer in self.layers:
                layer.prompt_keys, layer.prompt_values = layer.prompt_keys[alive], layer.prompt_values[alive]
        self._place(owners)

    def to_grid(self, x):
        """[row, head, group, f] -> [prompt, head, width * group, f]"""
        _, heads, group, features = x.shape
        prompts = len(self.layers[0].prompt_keys)
        grid = x
        if prompts * self.width != len(x):
            grid = x.new_zeros(prompts * self.width, heads, group, features)
            grid[self.slots] = x
        grid = grid.view(prompts, self.width, heads, group, features).transpose(1, 2)
        return grid.reshape(prompts, heads, self.width * group, features)

    def from_grid(self, grid):
        prompts, heads, size, features = grid.shape
        grid = grid.view(prompts, heads, self.width, size // self.width, features).transpose(1, 2)
        grid = grid.reshape(prompts * self.width, heads, size // self.width, features)
        return grid if len(grid) == len(self.slots) else grid[self.slots]


class _SharedPromptLayer(DynamicLayer):
    def __init__(self, layer):
        super().__init__()
        self.prompt_keys, self.prompt_values = layer.keys, layer.values
        self.length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if self.length == 0:
            self.store = [x.new_empty(*x.shape[:2], CHUNK, x.shape[3]) for x in (key_states, value_states)]
        elif self.length == self.store[0].shape[2]:
            self.store = [torch.cat([x, torch.empty_like(x[:, :, :CHUNK])], 2) for x in self.store]
        self.store[0][:, :, self.length] = key_states[:, :, 0]
        self.store[1][:, :, self.length] = value_states[:, :, 0]
        self.length += 1
        self.keys, self.values = (store[:, :, : self.length] for store in self.store)
        return self.keys, self.values

    def get_seq_length(self):
        return self.prompt_keys.shape[2] + self.length

    def batch_select_indices(self, indices):
        if self.length:
            self.store = [x[indices] for x in self.store]


def _shared_prompt_attention(module, query, key, value, attention_mask, scaling=None, shared=None, **kwargs):
    if shared is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, heads, _, features = query.shape
    layer = shared.layers[module.layer_idx]
    query = (query * scaling).view(rows, key.shape[1], -1, features)
    prompt = shared.to_grid(query) @ layer.prompt_keys.transpose(2, 3)
    if shared.bias is not None:
        prompt += shared.bias
    prompt = shared.from_grid(prompt)
    own = query @ key.transpose(2, 3)
    weights = torch.cat([prompt, own], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    length = prompt.shape[-1]
    output = weights[..., length:] @ value
    output += shared.from_grid(shared.to_grid(weights[..., :length]) @ layer.prompt_values)
    return output.view(rows, 1, heads, features), None


AttentionInterface.register("shared_prompt", _shared_prompt_attention)
AttentionMaskInterface.register("shared_prompt", sdpa_mask)
CHUNK = 16
SHARED = ("llama", "mistral", "qwen2", "qwen3")


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
    ranked, tokens = probs.sort(1, descending=True, stable=True)
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


def _finish(ids, logprobs, eos, stop, tokenizer) -> Sample:
    """Cut the drawn tokens after the first end-of-sequence token or stop string, whichever comes first."""

    def text_of(count):
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    end = next((t + 1 for t, token in enumerate(ids) if token in eos), None)
    reason, count = ("length", len(ids)) if end is None else ("stop", end)
    text = "" if tokenizer is None else text_of(count)
    if any(s in text for s in stop):
        # The first token with which a stop string is there; it is there with every later one, so halve.
        reason = "stop"
        count = 1 + bisect_left(range(1, count), True, key=lambda c: any(s in text_of(c) for s in stop))
        text = text[: min(text.find(s) for s in stop if s in text)]
    return Sample(text, tuple(ids[:count]), tuple(logprobs[:count]), reason)


def _check(model, prompt_ids, n, temperature, max_new_tokens, top_p, top_k, stop, keys, tokenizer, max_batch):
    """Raise ValueError for the first bad argument."""
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens), ("max_batch", max_batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1 (1 keeps every token).")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, but must be 0 (keeps every token) or more.")
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop is {stop!r}, but must be a sequence of non-empty strings, such as ('Q:',).")
    if stop and tokenizer is None:
        raise ValueError(f"stop is {stop!r}, but stop strings need a tokenizer; pass tokenizer=.")
    if len(keys) != len(prompt_ids):
        raise ValueError(f"{len(keys)} keys were given for {len(prompt_ids)} prompts; give one per prompt.")
    for key, count in Counter(keys).items():
        if count > 1:
            raise ValueError(
                f"key {key!r} is given {count} times, so these prompts would share their random numbers; "
                "raise n for more samples of one prompt, or pass distinct keys."
            )
    limit = getattr(model.config, "max_position_embeddings", None)
    for key, ids in zip(keys, prompt_ids, strict=True):
        if len(ids) == 0:
            raise ValueError(f"prompt {key!r} has no tokens; give at least one, such as <bos>.")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {key!r} has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} is beyond the "
                f"model's {limit} positions; shorten the prompt or lower max_new_tokens."
            )


@contextmanager
def _evaluating(model) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, and every module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    implementation = model.config._attn_implementation
    model.eval()
    if model.config.model_type in SHARED:
        model.set_attn_implementation("shared_prompt")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, training in modes:
            module.training = training


class _Bar:
    """Progress bar with samples, time left and tokens per second; on stdout, since notebooks forbid stderr."""

    def __init__(self, total, label):
        self.tokens = 0
        self.bar = tqdm(
            total=total, desc=label, unit="sample", file=sys.stdout, mininterval=1, leave=False, disable=label is None
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, finished):
        self.tokens += len(finished.token_ids)
        elapsed = self.bar.format_dict["elapsed"] if not self.bar.disable else 0
        if elapsed:
            self.bar.set_postfix_str(f"{self.tokens / elapsed:,.0f} tokens/s", refresh=False)
        self.bar.update()
