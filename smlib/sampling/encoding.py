"""Text and tokens: one exact way from each to the other, for every kind of tokenizer.

What a model reads is the tokens of a prompt and, after them, the tokens that it draws. Prompt and completion are
tokenised apart and joined, here and nowhere else, so that sampling, training and scoring see the same boundary. A
completion that a model has drawn is never tokenised again: its token ids go from stage to stage, and its text is for
people and for the judge.

A completion is the inside of a document, and tokenizers treat the beginning of a document in their own ways: those of
the SentencePiece family put a blank before a text and take it away when they decode, so that a drawn " 18." reads
"18.". Here completions are encoded and decoded by a copy of the tokenizer that adds and takes nothing (`_inside`).

Special tokens (ends of sequence, padding, marks of a chat's turns) are no text. A text in which one is spelled out,
such as "</s>", has the tokens of these letters; where a model draws one, the text of its completion ends.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import get_args
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerBase

from smlib.declared import Prompt
from smlib.errors import ModelError, UsageError
from smlib.problems import prompts
from smlib.problems.datasets import Problem

PROMPTS = get_args(Prompt)  # how a question is asked: as a document "Q: ... A:", or in the model's chat template


@dataclass(frozen=True)
class _Exact:
    """What this module knows of a tokenizer.

    size: its vocabulary's. lead: the ids that it puts before a text, such as bos. inside: a copy of it for a text in
    the middle of a document, which takes special tokens that are spelled out for text. special: the ids that are no
    text; a token for unknown letters stands for some.
    """

    size: int
    lead: tuple[int, ...]
    inside: Tokenizer
    special: frozenset[int]


_known: WeakKeyDictionary[PreTrainedTokenizerBase, _Exact] = WeakKeyDictionary()


def _exact(tokenizer: PreTrainedTokenizerBase) -> _Exact:
    known = _known.get(tokenizer)
    if known is None or known.size != len(tokenizer):  # tokens were added since
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        inside = Tokenizer.from_str(json.dumps(spec | _inside(spec)))
        inside.encode_special_tokens = True
        lead = _lead(tokenizer)
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= set(tokenizer.all_special_ids)
        special.discard(inside.token_to_id(_unknown(spec["model"]) or ""))
        known = _Exact(len(tokenizer), lead, inside, frozenset(special))
        _known[tokenizer] = known
    return known


def _unknown(model: dict) -> str | None:
    """The token that a tokenizer's model has for letters that it does not know."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _lead(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What comes before the tokens of a text, by the first text that has any."""
    for text in chain(("1", "a"), tokenizer.get_vocab()):
        if plain := tokenizer(text, add_special_tokens=False)["input_ids"]:
            framed = tokenizer(text)["input_ids"]
            places = [place for place in range(len(framed)) if framed[place : place + len(plain)] == plain]
            return tuple(framed[: places[0]] if places else ())
    return ()


def _inside(spec: dict) -> dict:
    """What differs in a tokenizer (the parts of its tokenizer.json) for a text that begins no document.

    Blanks before a text come from the normalizer Prepend, the pre-tokenizers Metaspace ("first" and "always") and
    ByteLevel; the decoders Metaspace and Strip take them away again.
    """
    parts = {name: _without_blank(copy.deepcopy(spec[name])) for name in ("normalizer", "pre_tokenizer", "decoder")}
    return parts | {"post_processor": None, "truncation": None, "padding": None}


def _without_blank(part: dict | None) -> dict | None:
    match part:
        case {"type": "Prepend"} | {"type": "Strip", "content": " "}:
            return None
        case {"type": "Metaspace"}:
            return part | {"prepend_scheme": "never"}
        case {"type": "ByteLevel"}:
            return part | {"add_prefix_space": False}
        case {"type": "Sequence"}:
            name = next(key for key in part if key != "type")  # normalizers, pretokenizers or decoders
            return part | {name: [found for one in part[name] if (found := _without_blank(one))]}
    return part


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a text that begins a document, after the tokenizer's own beginning (bos) if it has one.

    No end-of-sequence follows, whatever `add_eos_token` says: the text goes on.
    """
    exact = _exact(tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*exact.lead, *_spelled(exact, prompt, ids)]


def encode_completion(tokenizer: PreTrainedTokenizerBase, completion: str, eos: bool = True) -> list[int]:
    """Token ids of a text that somebody wrote to follow a prompt, closed by end-of-sequence unless eos is False."""
    exact = _exact(tokenizer)
    ids = _spelled(exact, completion, exact.inside.encode(completion, add_special_tokens=False).ids)
    return [*ids, tokenizer.eos_token_id] if eos else ids


def _spelled(exact: _Exact, text: str, ids: list[int]) -> list[int]:
    """Without special tokens for what the text spells out: a Unigram model may take "</s>" for a piece of its own."""
    if exact.special.isdisjoint(ids):
        return ids
    names = {token: exact.inside.id_to_token(token) for token in exact.special}
    letters = {
        token: [found for letter in name for found in exact.inside.encode(letter, add_special_tokens=False).ids]
        for token, name in names.items()
        if name in text
    }
    return [found for token in ids for found in letters.get(token, [token])]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a completion's tokens as it follows its prompt, every blank in it, up to its first special token."""
    return _exact(tokenizer).inside.decode(_text_ids(tokenizer, ids))


def _text_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The tokens before the first special one: what follows an end, or the mark of another turn, is another text."""
    special = _exact(tokenizer).special
    return list(takewhile(lambda token: token not in special, ids))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, to show it: blanks are kept, and special tokens have their names."""
    return [_exact(tokenizer).inside.decode([token], skip_special_tokens=False) for token in ids]


def closed(tokenizer: PreTrainedTokenizerBase, completion: str | Sequence[int]) -> list[int]:
    """A completion's token ids, followed by end-of-sequence: as drawn where it is token ids, encoded where it is text.

    A completion that ended with another end token than the tokenizer's gets this one, which is what training shows.
    """
    if isinstance(completion, str):
        return encode_completion(tokenizer, completion)
    ids = list(completion)
    return [*(ids[:-1] if ids and ids[-1] in _exact(tokenizer).special else ids), tokenizer.eos_token_id]


def ends(tokenizer: PreTrainedTokenizerBase | None, generation: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a completion: all that the generation config names, and the tokenizer's end-of-sequence."""
    named = generation.eos_token_id
    named = [] if named is None else list(named) if isinstance(named, list | tuple) else [named]
    if not all(type(token) is int and token >= 0 for token in named):
        raise ModelError(
            f"eos_token_id = {generation.eos_token_id!r} of the model is not a token id: give a number from 0, or a "
            "list of them, in its generation_config.json, or choose another model (--model)"
        )
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        named.append(tokenizer.eos_token_id)
    return tuple(sorted(set(named)))


def count_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], characters: int) -> int:
    """How many of the tokens it takes to hold the first so many characters of their text.

    A token that holds characters of both sides of the cut belongs to what is before it.
    """
    text = decode(tokenizer, ids)[:characters]
    return bisect_left(range(len(ids)), True, key=lambda count: decode(tokenizer, ids[:count]).startswith(text))


def first_characters(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], characters: int, then: str = ""
) -> list[int]:
    """Token ids of exactly the first so many characters of a completion, and of a text after them.

    The completion's own tokens stand as far as they go. One that also holds what comes after the cut, such as
    ".\\n\\n", is encoded anew, and together with the text after it, as the model would have written them. (Amid bytes
    that are no character there is no exact cut: some tokenizers decode a run of them as a whole.)
    """
    ids = _text_ids(tokenizer, ids)
    text = decode(tokenizer, ids)
    count = len(ids) if characters >= len(text) else count_tokens(tokenizer, ids, characters)
    text = text[:characters]
    while count and not text.startswith(decode(tokenizer, ids[:count])):
        count -= 1
    rest = text[len(decode(tokenizer, ids[:count])) :] + then
    return ids[:count] + (encode_completion(tokenizer, rest, eos=False) if rest else [])


# ----------------------------------------------------------------------------------------------- questions


def use_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Ask questions "plain", or in the model's own "chat" template, wherever this tokenizer goes from now on.

    The same choice holds for sampling, SFT, reward model, PPO and evaluation, since all of them ask by
    `encode_question`. In a chat the token that ends the assistant's turn becomes the tokenizer's end-of-sequence, for
    good: `models.load_tokenizer` calls this once. Raises ValueError for another name, and for "chat" where the
    tokenizer has no chat template.
    """
    if prompt not in PROMPTS:
        raise UsageError(f"sampling.prompt {prompt!r} is unknown; choose one of: {', '.join(PROMPTS)}")
    if prompt == "chat":
        if not tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template: choose an instruct "
                "model, or sampling.prompt = 'plain'"
            )
        if (end := _end_of_turn(tokenizer)) is not None:
            tokenizer.eos_token = end
    tokenizer.smlib_prompt = prompt


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that follows what an assistant has said; None where the template puts none there."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R51"}]
    after = _rendered(tokenizer, turns, tokenize=False).rpartition("R51")[2].lstrip()
    specials = (tokenizer.convert_ids_to_tokens(token) for token in _exact(tokenizer).special)
    return max((token for token in specials if after.startswith(token)), key=len, default=None)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], **options) -> str | list[int]:
    """The turns in the model's chat template, which writes bos where the model wants one. Raises UsageError where the
    template does not take them."""
    try:  # Llama-3's would name the day, and a run that goes on tomorrow would ask other prompts
        return tokenizer.apply_chat_template(turns, date_string="26 Jul 2024", **options)
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # of its program
        raise UsageError(
            f"the chat template of {tokenizer.name_or_path or 'this model'} refuses a question with "
            f"{len(turns) // 2} exemplars before it: {error}; choose sampling.prompt = 'plain', or other "
            "sampling.shots"
        ) from error


def encode_question(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, *, given: str | None = None, shots: str = "none"
) -> list[int]:
    """Token ids of a question as every stage asks it, up to where the model goes on; see `use_prompt`.

    given: an answer to write a rationale for (`prompts.conditioned_prompt`), None for the question alone. shots: whose
    exemplars come first, "none", "smlib" or "wei"; with a given answer those with given answers.
    """
    if getattr(tokenizer, "smlib_prompt", "plain") == "chat":
        turns = prompts.chat(problem, given, shots)
        return _rendered(tokenizer, turns, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False)
    shown = prompts.shots(problem.dataset, shots, conditioned=given is not None)
    text = prompts.open_prompt(problem, shown) if given is None else prompts.conditioned_prompt(problem, given, shown)
    return encode_prompt(tokenizer, text)


def encode_reanswer(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, rationale: Sequence[int], characters: int, shots: str = "none"
) -> list[int]:
    """Token ids of a question and of a rationale before its answer, followed by "The answer is" (stage 2).

    rationale: the ids that were drawn; characters: how many of its text come before the answer.
    """
    lead = f"\n{prompts.ANSWER_LEAD}"
    asked = encode_question(tokenizer, problem, shots=shots)
    return asked + first_characters(tokenizer, rationale, characters, then=lead)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ValueError for a tokenizer that the pipeline cannot use: it changes texts, or no token ends one."""
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"{name} has a tokenizer without a fast version (tokenizer.json): choose another model")
    for text in (" 18.", "18.", " Ann: 2 + 2 = 4.\nBob has 5.", "\nThe answer is"):
        found = decode(tokenizer, encode_completion(tokenizer, text, eos=False))
        if found != text:
            raise UsageError(
                f"the tokenizer of {name} changes texts: {text!r} comes back as {found!r}, so prompts and answers "
                "would not be what they seem: choose another model"
            )
    if tokenizer.eos_token_id is None:
        raise UsageError(f"the tokenizer of {name} has no end-of-sequence token: choose another model")
