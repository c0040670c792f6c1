"""What related work trains on, made from the same samples: one function each (benchmarks/neighbours.py trains on it).

The rewards of related work are in smlib.learning.reward_model; here are the rationales and pairs.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from smlib.judging.answers import before_answer, majorities
from smlib.learning.rows import Pair, Rationale
from smlib.problems.prompts import split_answer
from smlib.sampling import encoding

AGAIN = "\nThat is wrong. Again:"


def of_the_majority(rationales: Sequence[Rationale]) -> list[Rationale]:
    """Open rationales that state what most of their question's open ones do, as r+: no gold answer is read.

    LMSI (2210.11610) does so with 32 samples of a model of 540 billion weights, from few-shot prompts, and also trains
    on other forms of prompt; here every question has `sampling.samples`. Exact duplicates go.
    """
    written = [one for one in rationales if one.source == "open"]
    chosen = majorities((one.id, one.answer) for one in written)
    kept = {
        (one.id, one.text): replace(one, side="+")
        for one in written
        if one.answer is not None and one.answer == chosen[one.id]
    }
    return list(kept.values())


def corrections(tokenizer: PreTrainedTokenizerBase, ranked: Sequence[Rationale], seed: int) -> list[Rationale]:
    """A wrong rationale without its answer, AGAIN, and a right one of its question, as r+: one for each r+ that has an
    r-, by the same author.

    S²R (2502.12853) trains on such traces, verifications in words included, and then by reinforcement learning; here
    there is only the trace, and nothing is learned of its wrong part (`wrong_tokens`).
    """
    rng, sides = random.Random(f"corrections/{seed}"), defaultdict(list)
    for one in ranked:
        sides[one.id, one.author, one.side].append(one)
    made = []
    for one in ranked:
        wrong = sides[one.id, one.author, "-"]
        if one.side == "+" and wrong:
            first = rng.choice(wrong)
            characters = len(before_answer(first.text))
            ids = encoding.first_characters(tokenizer, first.token_ids, characters, then=AGAIN) + list(one.token_ids)
            text = first.text[:characters] + AGAIN + one.text
            made.append(replace(one, text=text, token_ids=tuple(ids)))
    return made


def wrong_tokens(tokenizer: PreTrainedTokenizerBase, one: Rationale) -> int:
    """How many tokens a correction has before AGAIN: its wrong part; 0 of any other rationale."""
    start = one.text.find(AGAIN)
    return len(encoding.first_characters(tokenizer, one.token_ids, start)) if start > 0 else 0


def edits(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose rejected side is the chosen one with one line changed: the first line in which the two sides differ
    is taken from the wrong side. The answer stays right, so only the line can tell.

    Hard negatives by counterfactual edits are CLOMO's (2311.17438); here the model's own wrong rationale gives the
    edit. Where the chosen side is lucky, the line may be a right one in place of a wrong one. Pairs whose steps differ
    in no line give none.
    """
    made = []
    for pair in pairs:
        (right, answer), wrong = split_answer(pair.chosen), split_answer(pair.rejected)[0]
        lines, others = right.split("\n"), wrong.split("\n")
        at = next((i for i, (a, b) in enumerate(zip(lines, others, strict=False)) if a.strip() != b.strip()), None)
        if at is None or not others[at].strip():
            continue
        text = "\n".join([*lines[:at], others[at], *lines[at + 1 :], answer])
        ids = tuple(encoding.encode_completion(tokenizer, text, eos=False))
        made.append(replace(pair, rejected=text, rejected_ids=ids))
    return made
