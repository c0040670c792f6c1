"""Which solutions are kept: exact small cases, and the faults of the reference code that must not come back."""

import ast
import inspect
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tokenizer, written_sample

from smlib.learning import dpo, exploration, selection
from smlib.learning.rows import Rationale
from smlib.problems import equations, prompts
from smlib.problems.datasets import Problem, generate
from smlib.runs import self_explore
from smlib.sampling import encoding
from smlib.sampling.params import SamplingParams

SHOP = Problem("shop/0", "gsm8k", "How much?", "1000", "number")


def row(text, correct=True, answer="18", identity="q/1"):
    ids = tuple(encoding.encode_completion(tokenizer(), text, eos=False))
    return Rationale(id=identity, dataset="gsm8k", text=text, token_ids=ids, answer=answer, correct=correct)


class Engine:
    """Writes the same texts to every question."""

    name, tokenizer = "fake", tokenizer()

    def __init__(self, *texts):
        self.texts = texts

    def sample_ids(self, prompt_ids, n, params, *, keys, progress):
        return [[written_sample(text) for text in self.texts[:n]] for _ in prompt_ids]


def drawn(problem, *texts):
    params = SamplingParams(temperature=0.7, max_new_tokens=64, seed=0)
    return selection.draw_solutions(Engine(*texts), [problem], len(texts), params)


def test_a_solution_ends_with_its_answer_and_keeps_the_tokens_drawn():
    [found] = drawn(SHOP, " Ann: 990 + 10 = 1000.\nThe answer is 1000.\nQ: And then?\nA: The answer is 3.")
    assert found.text == " Ann: 990 + 10 = 1000.\nThe answer is 1000."
    assert encoding.decode(tokenizer(), found.token_ids) == found.text
    assert tokenizer().eos_token_id not in found.token_ids


def test_one_judge_takes_1000_with_and_without_its_comma():
    """Fault: two correctness checks, of which one did not know "1,000"."""
    found = drawn(SHOP, " So 1,000.\nThe answer is 1,000.", " So 1000.\nThe answer is 1000.", " So.\nThe answer is 1.")
    assert [one.correct for one in found] == [True, True, False]


def test_nothing_that_a_model_wrote_is_evaluated():
    """Fault: eval() on what the model wrote."""
    for module in (equations, selection, exploration, dpo, self_explore):
        called = [node.func for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Call)]
        assert not {"eval", "exec", "compile"} & {func.id for func in called if isinstance(func, ast.Name)}


def levenshtein(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return table[-1, -1]


words = st.lists(st.sampled_from("abc"), max_size=6)


@given(words, st.lists(words, min_size=1, max_size=4))
def test_edit_distances_are_those_of_the_textbook(one, others):
    assert selection.edit_distances(one, others).tolist() == [levenshtein(one, other) for other in others]


def test_solutions_with_equal_equations_are_one_and_the_shortest_stays():
    rows = [row(" He has 2 + 3 = 5 of them then."), row(" 2+3 = 5."), row(" 3 + 2 = 5.")]
    assert [one.text for one in selection.diverse(rows, 8)] == [" 2+3 = 5.", " 3 + 2 = 5."]


def test_the_farthest_solution_is_kept():
    """Equation sequences at distances 1 and 2 from the shortest: of two, the one at 2 stays."""
    near, far = row(" 1 + 1 = 2.\n2 + 2 = 4.\n4 + 4 = 8."), row(" 1 + 1 = 2.\n2 + 3 = 5.\n5 + 5 = 10.")
    shortest = row(" 1 + 1 = 2.\n2 + 2 = 4.")
    assert selection.diverse([near, far, shortest], 2) == [shortest, far]
    assert selection.diverse([near, far, shortest], 3) == [shortest, far, near]


counts = st.integers(0, 3)
sums = st.builds(lambda a, b, c: f" {a} + {b} = {c}.\nSo {c}.", counts, counts, counts)
texts = st.lists(sums | st.sampled_from([" Ann.", " Bo."]))


@given(texts, st.integers(1, 4), st.randoms())
def test_what_is_kept_does_not_depend_on_the_order_of_the_samples(texts, most, rng):
    """Fault: selection in the order of a set."""
    rows = [row(text, correct=index % 2 == 0) for index, text in enumerate(texts)]
    mixed = rng.sample(rows, len(rows))
    kept = selection.rft_set(rows, most)
    assert kept == selection.rft_set(mixed, most)
    assert len(kept) <= most and all(one.correct and one.side == "+" for one in kept)
    assert len({selection._signature(one) for one in kept}) == len(kept)
    problem = Problem("q/1", "gsm8k", "How many?", "18", "number")
    pairs = [selection.outcome_pairs(tokenizer(), [problem], kept, some, most, seed=0) for some in (rows, mixed)]
    assert pairs[0] == pairs[1]


def test_every_wrong_solution_is_used_once_and_the_right_ones_in_turn():
    problem = Problem("q/1", "gsm8k", "How many?", "18", "number")
    right = [row(" 9 + 9 = 18."), row(" 20 - 2 = 18.")]
    wrong = [row(f" It is {n}.", False, str(n)) for n in (1, 2, 2, 3, 4)]
    invalid = row(" It is not known.", False, None)
    pairs = selection.outcome_pairs(tokenizer(), [problem], right, [*right, *wrong, invalid], 8, seed=0)
    assert sorted(pair.rejected for pair in pairs) == [" It is 1.", " It is 2.", " It is 3.", " It is 4."]
    assert [pair.chosen for pair in pairs] == [" 9 + 9 = 18.", " 20 - 2 = 18."] * 2
    assert len(selection.outcome_pairs(tokenizer(), [problem], right, wrong, 3, seed=0)) == 3
    assert selection.outcome_pairs(tokenizer(), [problem], [], wrong, 8, seed=0) == []
    for pair in pairs:
        assert list(pair.prompt_ids) == encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))
        for text, ids in ((pair.chosen, pair.chosen_ids), (pair.rejected, pair.rejected_ids)):
            assert ids[-1] == tokenizer().eos_token_id
            assert encoding.decode(tokenizer(), ids) == text


def test_more_than_a_thousand_questions_are_all_read():
    """Fault: a run that stopped after 1,000 rows."""
    problems = generate("chain_arithmetic", 1_100, seed=0)
    rows = [row(" 9 + 9 = 18.", identity=problem.id) for problem in problems]
    rows += [row(" It is 3.", False, "3", identity=problem.id) for problem in problems]
    random.Random(0).shuffle(rows)
    kept = selection.rft_set(rows, 8)
    assert len(kept) == len(selection.outcome_pairs(tokenizer(), problems, kept, rows, 8, seed=0)) == 1_100


@pytest.mark.parametrize("count", [1, 2, 8])
def test_no_more_are_kept_than_asked_for(count):
    rows = [row(f" {n} + 1 = {n + 1}.") for n in range(20)]
    assert len(selection.diverse(rows, count)) == count
