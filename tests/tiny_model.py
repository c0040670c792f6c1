"""A random model of the tiny base's architecture, small enough to build in every test run."""

from functools import cache

import torch
from transformers import LlamaForCausalLM

from smlib import encoding
from smlib.pretraining import corpus, make_tokenizer, tiny_config
from smlib.sampling import Sample


@cache
def tokenizer():
    return make_tokenizer([prompt + completion for prompt, completion in corpus(400, seed=0)], share=0.02)


def written_sample(text):
    """A text as if the policy had drawn it."""
    ids = tuple(encoding.encode_completion(tokenizer(), text))
    return Sample(text, ids, (0.0,) * len(ids), "stop")


def config(layers=1):
    return tiny_config(len(tokenizer()), tokenizer(), hidden=32, layers=layers)


def policy(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()
