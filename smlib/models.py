"""Loading and encoding: the tokenizer, the models.

Tokens of a text are bos + tokens(prompt) + tokens(completion) + eos, prompt and completion tokenised apart
and joined, here and nowhere else, so that sampling, training and scoring see the same boundary.
"""

import hashlib
import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
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
    """The tokenizer, with a pad token that is not its end token (training would mask the ends away).

    Llama's, Mistral's and DeepSeek's have no such one: there the unknown token pads, and where there is none the one
    that begins a text. No completion holds either, and the vocabulary stays as the model knows it. Raises ValueError
    where both are missing, or are the end token too.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ValueError(
            f"tokenizer {name!r}: pad token {tokenizer.pad_token!r} must exist and differ from the end token "
            f"{tokenizer.eos_token!r}; add one with tokenizer.add_special_tokens({{'pad_token': '<pad>'}})"
        )
    return tokenizer


def load_policy(name: str | Path = "tiny", weights: str = "float32") -> PreTrainedModel:
    """A causal language model in eval mode, on the GPU where torch finds one; an adapter is merged into its base.

    weights: the precision to hold it in, "float32" or "bfloat16". The base of a LoRA adapter's folder is sought beside
    it first, as stages name theirs by a relative path.
    """
    folder = Path(resolve(str(name)))
    if (folder / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        base = folder / base if (folder / base).exists() else base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about how peft asks it
            return PeftModel.from_pretrained(load_policy(base, weights), folder).merge_and_unload().eval()
    model = AutoModelForCausalLM.from_pretrained(resolve(str(name)), dtype=getattr(torch, weights)).eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def device_name() -> str:
    """Where `load_policy` puts a model: the GPU's name, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def add_lora(model: PreTrainedModel, rank: int, alpha: int, targets: str, base: str) -> PeftModel:
    """Put a trainable LoRA adapter (2106.09685) of scale alpha / rank, without dropout, on a model that stays as it is.

    targets: a regular expression of module names, or "all-linear" for all but the output head. base: what the saved
    adapter names as its base.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about how peft asks it
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = base
    # peft would look into the base, where saving is, for a vocabulary that training does not change
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with the tokenizer's beginning-of-sequence token if it has one."""
    return tokenizer(prompt)["input_ids"]


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, eos: bool = True) -> list[int]:
    """Token ids of a completion, closed by end-of-sequence unless eos is False."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if eos else ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion's tokens as the sampler gives it, without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def count_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], characters: int) -> int:
    """How many of the tokens it takes to hold the first so many characters of their text.

    So a text that a model drew is cut without being tokenised again, which might give other tokens. A token that holds
    characters of both sides of the cut belongs to what is before it.
    """
    text = decode(tokenizer, ids)[:characters]
    return bisect_left(range(len(ids)), True, key=lambda count: decode(tokenizer, ids[:count]).startswith(text))


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
    return states.flatten(0, 1)[packed["sources"]]


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


def model_size(model: PreTrainedModel) -> int:
    """Parameters, counted once where weights are tied."""
    return sum(parameter.numel() for parameter in model.parameters())
