"""Prompts in a prefix tree are what they were, share what they can, and are attended to as in a plain forward pass."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from smlib.sampling import decoders, prefix_tree, tree_attention
from smlib.sampling.params import SamplingParams
from smlib.sampling.prefix_tree import LEAST_SHARED, PrefixTree
from smlib.sampling.sampler import sample_ids


def agreement(one, other):
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@st.composite
def prompts(draw, least=1, most=7):
    """Token ids, the later prompts mostly with the beginning of an earlier one."""
    found = []
    for _ in range(draw(st.integers(least, most))):
        start = draw(st.sampled_from(found))[: draw(st.integers(0, 60))] if found else []
        found.append(start + draw(st.lists(st.integers(3, 5), min_size=1, max_size=40)))
    return found


def states_of(node):
    """Stands for keys and values: each token's place and id, so that they are told apart wherever they get to."""
    tokens = [[position, token] for position, token in enumerate(node.tokens, node.start)]
    return torch.tensor(tokens, dtype=torch.float32)[None, None, None]


@given(prompts())
@example([[3] * 40, [3] * 40, [3] * 39 + [4], [3] * 20 + [4] * 20, [3] * 41, [3]])
def test_the_nodes_of_a_prompt_are_its_tokens_and_the_last_one_is_its_own(asked):
    tree = PrefixTree(0)
    paths = [leaf.path() for leaf in [tree.insert(ids) for ids in asked]]
    for ids, path in zip(asked, paths, strict=True):
        assert [token for node in path for token in node.tokens] == ids
        assert [node.start for node in path] == [0, *itertools.accumulate(len(node.tokens) for node in path[:-1])]
    assert len({path[-1] for path in paths}) == len(asked)


@given(prompts(least=2))
@example([[3] * 30, [3] * 30 + [5, 6, 7], [3] * 16 + [4], [3] * 30 + [5, 6, 7, 8]])  # the third cuts off 14 tokens
def test_two_prompts_share_what_they_agree_on_but_for_a_few_tokens(asked):
    """Fewer than LEAST_SHARED at the end of what is common, and the last token of each, are read for each; so are as
    many again where a prompt has cut off a node's end that is too short to be found."""
    tree = PrefixTree(0)
    paths = [leaf.path() for leaf in [tree.insert(ids) for ids in asked]]
    for (one, path), (other, others) in itertools.combinations(zip(asked, paths, strict=True), 2):
        shared = sum(len(node.tokens) for node in set(path) & set(others))
        common = agreement(one, other)
        assert min(common, len(one) - 1, len(other) - 1) - 2 * LEAST_SHARED < shared <= common


@given(st.lists(prompts(), min_size=1, max_size=4), st.integers(0, 200))
def test_what_is_held_stays_within_the_budget_and_with_its_tokens(calls, budget):
    tree = PrefixTree(budget)
    for asked in calls:
        paths = [leaf.path() for leaf in [tree.insert(ids) for ids in asked]]
        for node in {node for path in paths for node in path}:
            if node.states is None:
                node.states = states_of(node)
            assert torch.equal(node.states, states_of(node))  # those held from before, divided or not
        tree.hold(node for path in paths for node in reversed(path))
        held = [node for node in all_nodes(tree.root) if node.states is not None]
        assert sum(len(node.tokens) for node in held) == tree.tokens <= budget
        assert all(node.states.untyped_storage().nbytes() == node.states.nbytes for node in held)  # nothing else


def all_nodes(node):
    return [found for child in node.children.values() for found in (child, *all_nodes(child))]


def test_what_is_in_use_stays_and_what_a_prompt_waits_for_goes_after_what_none_does():
    tree = PrefixTree(60)
    nodes = [tree.insert([token] * 30) for token in (3, 4, 5, 6)]
    nodes[1].waiting = 1
    for node in nodes:
        node.states = states_of(node)
        tree.hold([node], in_use=[nodes[0]])
    assert [node.states is None for node in nodes] == [False, False, True, True]
    assert nodes[1].found and not nodes[2].found  # what nothing is held of is forgotten, so that the tree doesn't grow
    nodes[1].waiting = 0
    tree.hold([nodes[0]])
    tree.budget = 30
    tree.hold([])
    assert [node.states is None for node in nodes] == [False, True, True, True]  # the one longest unused has gone


KINDS = {"llama": {}, "qwen2": {}, "qwen3": {}, "mistral": {"sliding_window": None}}


def tiny_model(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": 6}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes | tokens | {"initializer_range": 0.5} | KINDS[kind])
    return AutoModelForCausalLM.from_config(config).eval()


MODELS = {kind: tiny_model(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@given(asked=prompts(), n=st.integers(1, 3), rows=st.integers(1, 9), worth=st.sampled_from([1, 30, 1024]))
@settings(max_examples=25)
def test_samples_have_the_log_probabilities_of_a_plain_forward_pass(kind, asked, n, rows, worth):
    """Whatever they share, at every depth, in one call or from the one before, and as rows leave and others join."""
    model, tree = MODELS[kind], PrefixTree(100)
    params = SamplingParams(temperature=1.0, max_new_tokens=20, seed=len(asked))
    keys = list(map(str, range(len(asked))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "WORTH", worth)
        patch.setattr(prefix_tree, "LEAST_SHARED", 4)
        patch.setattr(decoders, "READ", 64)
        for _ in range(2):
            drawn = sample_ids(model, None, asked, n, params, keys=keys, max_batch=rows, tree=tree)
            for ids, samples in zip(asked, drawn, strict=True):
                for one in samples:
                    whole = torch.tensor([[*ids, *one.token_ids]])
                    with torch.no_grad():
                        expected = model(whole).logits[0, len(ids) - 1 : -1].log_softmax(1)
                    expected = expected.gather(1, whole[0, len(ids) :, None])[:, 0]
                    torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=2e-5, rtol=1e-4)


def test_two_sets_of_exemplars_behind_one_head_are_each_shared_and_no_more():
    """A few tokens that all prompts begin with, then one of two long texts, then a question of its own."""
    model, head, texts = MODELS["llama"], [3] * 20, ([4, 5] * 60, [5, 3] * 60)
    asked = [[*head, *text, *[3 + (number >> bit) % 2 for bit in range(20)]] for text in texts for number in range(8)]
    keys, params = list(map(str, range(len(asked)))), SamplingParams(temperature=1.0, max_new_tokens=4, seed=0)
    read, made = [], []

    class Watched(tree_attention.Cohort):
        def __init__(self, context, rows):
            super().__init__(context, rows)
            made.append(([len(nodes.spans) for nodes in context.shared], context.tokens))

    hook = model.get_decoder().register_forward_pre_hook(
        lambda decoder, arguments, options: read.append(options["input_ids"].shape), with_kwargs=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "WORTH", 512)
        patch.setattr(decoders, "Cohort", Watched)
        sample_ids(model, None, asked, 2, params, keys=keys)
    hook.remove()
    assert made == [([1, 2], 16 * 20)]  # the head above all rows, each text above its own, questions in the grid
    assert sum(shape.numel() for shape in read if shape[1] > 1) == 20 + 2 * 120 + 16 * 20


def test_rows_that_join_share_what_rows_at_work_share():
    model, text = MODELS["llama"], [4, 5] * 60
    asked = [[*text, *[3 + (number >> bit) % 2 for bit in range(20)]] for number in range(12)]
    made, met, params = [], [], SamplingParams(temperature=9.0, max_new_tokens=40, seed=1)

    class Watched(tree_attention.Cohort):
        def __init__(self, context, rows):
            super().__init__(context, rows)
            made.append((rows, context.tokens))

    class WatchedStep(tree_attention.Step):
        def __init__(self, cohorts):
            super().__init__(cohorts)
            met.append((len(cohorts), [len(nodes.spans) for nodes in self.shared]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_attention, "WORTH", 120)
        patch.setattr(decoders, "Cohort", Watched)
        patch.setattr(decoders, "Step", WatchedStep)
        sample_ids(model, None, asked, 1, params, keys=list(map(str, range(12))), max_batch=4)
    assert max(cohorts for cohorts, _ in met) > 1
    assert all(spans == [1] for cohorts, spans in met if cohorts)  # the text is met by the rows of all in one product
    assert min(rows for rows, _ in made) == 1 and all(tokens == rows * 20 for rows, tokens in made)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_right_by_the_fused_kernel_and_by_operations(dtype, causal, fused, monkeypatch):
    """And the logarithm of its denominator. The kernel is for CPUs, operations for all else."""
    torch.manual_seed(0)
    monkeypatch.setattr(tree_attention, "FUSED", ("cpu",) if fused else ())
    query, key, value = torch.randn(3, 2, 3, 50, 16).to(dtype)

    parts = tree_attention.attend(query, key, value, causal)
    scores = query.double() @ key.double().transpose(2, 3)
    if causal:
        scores = scores + torch.full((50, 50), -torch.inf).triu(1)
    expected = scores.softmax(3) @ value.double(), scores.logsumexp(3)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 8e-2, "rtol": 3e-2}
    for found, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, **tolerance)


def test_what_is_held_is_no_more_than_was_allowed():
    """The bytes of the tree, the grids and the drawn tokens, whenever rows begin or step."""
    model, allowed, steps = MODELS["llama"], 700, 18
    asked = [[3 + (number >> bit) % 2 for bit in range(7)] * (1 + number % 9) for number in range(60)]
    token, most = 2 * 2 * 2 * 8 * 4, []

    def held(decoder):
        cohorts = decoder.cohorts
        grids = [states for cohort in cohorts if cohort.context.grid for states in cohort.context.grid.states]
        own = [states for cohort in cohorts for states in cohort.own]
        tree = [node.states for path in decoder.paths for node in path if node.states is not None]
        return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in (*grids, *own, *tree)}.values())

    class Watched(decoders.TreeDecoder):
        def begin(self, owners):
            states = super().begin(owners)
            most.append(held(self))
            return states

        def step(self, tokens):
            states = super().step(tokens)
            most.append(held(self))
            return states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smlib.sampling.sampler.TreeDecoder", Watched)
        params = SamplingParams(temperature=1.0, max_new_tokens=steps, seed=0)
        sample_ids(model, None, asked, 3, params, keys=list(map(str, range(60))), cache_tokens=allowed)
    assert 0.6 * allowed * token < max(most) <= allowed * token
