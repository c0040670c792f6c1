"""A random model of the tiny base's architecture, small enough to build in every test run."""

from functools import cache

import torch
from transformers import LlamaForCausalLM

from smlib.learning.rows import Pair, Rationale
from smlib.pretraining import corpus, make_tokenizer, tiny_config
from smlib.sampling import encoding
from smlib.sampling.params import Sample


@cache
def tokenizer():
    return make_tokenizer([prompt + completion for prompt, completion in corpus(400, seed=0)], share=0.02)


def written_sample(text):
    """A text as if the policy had drawn it."""
    ids = tuple(encoding.encode_completion(tokenizer(), text))
    return Sample(text, ids, (0.0,) * len(ids), "stop")


def written(problem, text, side="+"):
    """A text as if it had been drawn to a question and ranked."""
    ids = tuple(encoding.encode_completion(tokenizer(), text, eos=False))
    verdict = {"answer": problem.answer, "correct": side == "+", "side": side}
    return Rationale(id=problem.id, dataset=problem.dataset, text=text, token_ids=ids, **verdict)


def written_pair(problem, chosen, rejected, held_out=False):
    """A pair of texts as if they had been drawn."""
    good, bad = (tuple(encoding.encode_completion(tokenizer(), text, eos=False)) for text in (chosen, rejected))
    sides = {"chosen": chosen, "rejected": rejected, "chosen_ids": good, "rejected_ids": bad}
    return Pair(id=problem.id, dataset=problem.dataset, held_out=held_out, **sides)


def config(layers=1):
    return tiny_config(len(tokenizer()), tokenizer(), hidden=32, layers=layers)


def policy(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()
