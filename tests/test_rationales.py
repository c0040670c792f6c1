from dataclasses import replace

import pytest
from tiny_model import tokenizer, written_sample

from smlib.learning import rationales
from smlib.learning.rows import Rationale
from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.sampling import encoding
from smlib.sampling.params import SamplingParams

COIN = Problem("coin_flip/train/a", "coin_flip", "Heads up?", "yes", "yes_no")
SUM = Problem("chain_arithmetic/train/b", "chain_arithmetic", "How many?", "7", "number")
PARAMS = SamplingParams(temperature=0.8, max_new_tokens=50, seed=3)


@pytest.fixture
def model():
    """A stub in place of an engine: what it is asked goes to `calls`, what it says comes from `say`."""

    class Stub:
        calls: list = []  # noqa: RUF012
        tokenizer = tokenizer()
        say = staticmethod(lambda prompt, index: f" step {index}.\nThe answer is yes.")

        def sample_ids(self, prompt_ids, n, params, *, keys, progress):
            asked = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
            self.calls.append({"prompts": asked, "n": n, "keys": list(keys), "params": params, "progress": progress})
            return [[written_sample(self.say(p, i)) for i in range(n)] for p in asked]

    stub = Stub()
    stub.calls = []
    return stub


def test_open_rows_word_for_word(model):
    model.say = lambda prompt, index: " a step.\nThe answer is no.\n\nQ: More?" if index else " a step."
    rows = rationales.sample_open(model, [COIN], 2, PARAMS, author="base")
    common = {"id": COIN.id, "dataset": "coin_flip", "author": "base", "source": "open", "given": None}
    common |= {"reason": "", "token_ids": ()}
    for row in rows:
        assert row.reason
        assert encoding.decode(tokenizer(), row.token_ids) == row.text
    assert [replace(row, reason="", token_ids=()) for row in rows] == [
        Rationale(**common, index=0, text=" a step.", answer=None, correct=False),
        Rationale(**common, index=1, text=" a step.\nThe answer is no.", answer="no", correct=False),
    ]
    (call,) = model.calls
    assert call == {
        "prompts": [prompts.open_prompt(COIN)],
        "n": 2,
        "keys": [COIN.id],
        "params": PARAMS,
        "progress": None,
    }


def test_open_rows_come_in_the_order_of_the_problems(model):
    rows = rationales.sample_open(model, [SUM, COIN], 3, PARAMS, author="base")
    assert [(row.id, row.index) for row in rows] == [(p.id, i) for p in (SUM, COIN) for i in range(3)]
    assert [row.correct for row in rows] == [False] * 3 + [True] * 3


def test_conditioned_rows_give_gold_and_wrong_answers_equally_often(model):
    model.say = lambda prompt, index: f" because.\nThe answer is {prompt.split('Given answer: ')[1][:-3]}."
    rows = rationales.sample_conditioned(model, [COIN, SUM], 3, PARAMS, author="base")
    assert [row.given for row in rows[:6]] == ["yes"] * 3 + ["no"] * 3  # the one wrong answer, three times
    gold, wrong = [row.given for row in rows[6:9]], [row.given for row in rows[9:]]
    assert gold == ["7"] * 3
    assert len(set(wrong)) == 3 and "7" not in wrong
    assert [row.index for row in rows] == [0, 1, 2] * 4
    assert all(row.source == "conditioned" and row.answer == row.given for row in rows)
    assert [row.correct for row in rows] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


def test_conditioned_prompts_and_their_random_streams(model):
    rows = rationales.sample_conditioned(model, [COIN, SUM], 2, PARAMS, author="base")
    (call,) = model.calls
    problems = [COIN] * 4 + [SUM] * 4
    assert call["n"] == 1
    assert call["prompts"] == [
        prompts.conditioned_prompt(problem, row.given) for problem, row in zip(problems, rows, strict=True)
    ]
    assert len(set(call["keys"])) == len(rows)  # equal prompts still draw different rationales


def test_a_seed_decides_the_wrong_answers(model):
    def given(seed):
        rows = rationales.sample_conditioned(model, [SUM], 4, replace(PARAMS, seed=seed), author="base")
        return [row.given for row in rows]

    assert given(1) == given(1)
    assert len({tuple(given(seed)) for seed in range(5)}) > 1


def test_a_question_without_another_answer_of_its_kind_gets_gold_only(model):
    alone = Problem("last_letters/train/c", "last_letters", "Which letters?", "yajo", "letters")
    rows = rationales.sample_conditioned(model, [alone], 2, PARAMS, author="base")
    assert [row.given for row in rows] == ["yajo", "yajo"]


def rows_of(*texts, problem=COIN):
    return [
        Rationale(
            id=problem.id,
            dataset=problem.dataset,
            given="some answer",
            text=text,
            token_ids=tuple(encoding.encode_completion(tokenizer(), text, eos=False)),
            answer="kept as it was",
            correct=True,
        )
        for text in texts
    ]


def test_open_rationales_are_not_answered_again(model):
    rows = [replace(row, given=None, answer="no", correct=False) for row in rows_of(" a.\nThe answer is no.")]
    answered = rationales.reanswer(model, [COIN], rows, seed=0)
    assert answered == [replace(rows[0], reanswer="no", reanswer_correct=False)]


def test_reanswer_takes_the_answer_sentence_away_and_asks_for_it_again(model):
    model.say = lambda prompt, index: " no."
    rows = rows_of(" a step.\nThe answer is yes.")
    (answered,) = rationales.reanswer(model, [COIN, SUM], rows, seed=3)
    (call,) = model.calls
    assert call["prompts"] == ["Q: Heads up?\nA: a step.\nThe answer is"]
    assert (call["n"], call["params"]) == (1, SamplingParams(temperature=0.0, max_new_tokens=16, seed=3))
    assert answered == replace(rows[0], reanswer="no", reanswer_correct=False)
    assert rows[0].reanswer is None  # the rationales that came in stay as they were


def test_equal_rationales_of_one_question_are_answered_once(model):
    model.say = lambda prompt, index: " 7." if "How many" in prompt else " yes."
    rows = rows_of(" a.\nThe answer is yes.", " a.\nThe answer is no.", " b.\nThe answer is no.")
    rows += rows_of(" a.\nThe answer is 7.", problem=SUM)
    answered = rationales.reanswer(model, [COIN, SUM], rows, seed=0)
    (call,) = model.calls
    assert len(call["prompts"]) == len(set(call["prompts"])) == len(set(call["keys"])) == 3
    assert [row.reanswer for row in answered] == ["yes", "yes", "yes", "7"]
    assert all(row.reanswer_correct for row in answered)


def test_an_answer_read_off_is_cut_and_may_be_missing(model):
    model.say = lambda prompt, index: "\nmumble" if " a." in prompt else " yes.\nThe answer is no."
    first, second = rationales.reanswer(model, [COIN], rows_of(" a.", " b."), seed=0)
    assert (first.reanswer, first.reanswer_correct) == (None, False)
    assert (second.reanswer, second.reanswer_correct) == ("yes", True)


def test_exemplars_come_before_every_prompt_and_a_next_question_stops(model):
    coin = Problem("coin_flip/train/c", "coin_flip", "Heads up?", "yes", "yes_no")
    rows = rationales.sample_open(model, [coin], 1, PARAMS, author="base", shots="smlib")
    rows += rationales.sample_conditioned(model, [coin], 1, PARAMS, author="base", shots="smlib")
    rationales.reanswer(model, [coin], rows, seed=3, shots="smlib")
    asked = [prompt for call in model.calls for prompt in call["prompts"]]
    shown = prompts.few_shot("coin_flip")
    given = prompts.few_shot("coin_flip", form="wrong") + prompts.few_shot("coin_flip", form="conditioned")
    assert asked == [
        prompts.open_prompt(coin, shown),
        prompts.conditioned_prompt(coin, "yes", given),
        prompts.conditioned_prompt(coin, "no", given),
        prompts.reanswer_prompt(coin, " step 0.", shown),
    ]
    assert all(call["params"].stop == ("\nQ: ",) for call in model.calls)
