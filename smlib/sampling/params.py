"""How to draw, `SamplingParams`, and one completion, `Sample`: the same for every engine.

Besides, what the engines share: what ends a sample (`Ending`), and the checks of what is asked for.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from typing import get_type_hints

from smlib.declared import Drawn, Natural, Share, Temperature, Tokens, TopK, checked, shown
from smlib.errors import UsageError
from smlib.sampling.encoding import decode


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a sample, the same for every engine.

    temperature: logits are divided by it; 0 is greedy decoding.
    max_new_tokens: tokens that a sample may have, its end token included.
    seed: of the random numbers, which depend on (seed, key of the prompt, number of the sample) alone.
    top_k, top_p: keep the k most probable tokens (0: all), then the smallest set of tokens that holds at least
        the share `top_p` of what is left (1.0: all).
    stop: strings, the first of which ends a sample; they need a tokenizer.

    Raises UsageError, a ValueError, for a value that no engine takes; it names the value and what is allowed.
    """

    temperature: Temperature
    max_new_tokens: Tokens
    seed: Natural
    top_p: Share = 1.0
    top_k: TopK = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        kinds = get_type_hints(SamplingParams, include_extras=True)
        for name, like in _EXAMPLES.items():
            object.__setattr__(self, name, checked(name, getattr(self, name), kinds[name], like))
        if isinstance(self.stop, str) or "" in self.stop:
            raise UsageError(f"stop is {self.stop!r}, but must be a sequence of non-empty strings, such as ('Q:',)")
        object.__setattr__(self, "stop", tuple(self.stop))

    def stopping_at(self, strings: tuple[str, ...]) -> "SamplingParams":
        """The same, and these strings end a sample too."""
        return replace(self, stop=(*self.stop, *strings))


_EXAMPLES = {"temperature": 1.0, "max_new_tokens": 128, "seed": 0, "top_p": 1.0, "top_k": 0}  # for errors to name


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

    @classmethod
    def from_row(cls, row: dict) -> "Sample":
        """The sample whose fields a row (dict) of JSON or Arrow holds, with lists for tuples."""
        return cls(row["text"], tuple(row["token_ids"]), tuple(row["logprobs"]), row["finish_reason"])


@dataclass(frozen=True)
class Ending:
    """What ends a sample: a token of `eos`, or a string of `stop` in its text."""

    eos: tuple[int, ...]
    stop: tuple[str, ...]
    tokenizer: object

    def stopped(self, ids: list[int]) -> bool:
        """Whether the text of these tokens holds a stop string."""
        return self._stopped(self._text(ids))

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


def check_request(
    prompt_ids: list[list[int]], n: int, params: SamplingParams, keys: list[str], first: int, limit: int | None
) -> None:
    """Raise ValueError for what no engine draws: numbers out of range, keys that are not one of its own per prompt,
    and prompts without tokens, or that would grow beyond `limit` positions (None: any number)."""
    checked("n", n, Drawn, 8)
    checked("first", first, Natural, 0)
    if len(keys) != len(prompt_ids):
        raise UsageError(f"{len(keys)} keys were given for {len(prompt_ids)} prompts; give one per prompt")
    for key, count in Counter(keys).items():
        if count > 1:
            raise UsageError(
                f"key {shown(key)} is given {count} times, so these prompts would share their random numbers; "
                "raise n for more samples of one prompt, or pass distinct keys"
            )
    for key, ids in zip(keys, prompt_ids, strict=True):
        if len(ids) == 0:
            raise UsageError(f"prompt {shown(key)} has no tokens; give at least one, such as <bos>")
        if limit is not None and len(ids) + params.max_new_tokens > limit:
            raise UsageError(
                f"prompt {shown(key)} has {len(ids)} tokens, which with max_new_tokens={params.max_new_tokens} is "
                f"beyond the model's {limit} positions; shorten the prompt or lower max_new_tokens"
            )


def check_prompts(prompts: list[str]) -> None:
    """Raise ValueError for a prompt without text: with <bos> before it, it would pass as one of a token."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index} is empty; give every prompt some text")


def check_room(name: str, max_new_tokens: int, config, continued: bool = False) -> None:
    """Raise ValueError for a max_new_tokens, called `name`, that no prompt of a model of this shape leaves room for.

    continued: whether completions are continued, by as many tokens again.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_new_tokens * (1 + continued) >= limit:
        twice = " twice, for a rationale and what continues its beginnings," if continued else ""
        raise UsageError(
            f"{name} = {max_new_tokens}{twice} leaves no room for a prompt in the model's {limit} positions: lower it"
        )
