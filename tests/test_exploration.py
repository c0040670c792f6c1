"""Steps, exploration, pits, step-level pairs: exact small cases, properties, the known faults of the reference."""

import hashlib
import random
import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import policy, tokenizer
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from smlib.learning import exploration
from smlib.problems import prompts
from smlib.problems.datasets import Problem, generate
from smlib.problems.steps import worked_solution
from smlib.reports import evaluation, pits
from smlib.sampling import encoding
from smlib.sampling.engines import NativeEngine
from smlib.sampling.params import Sample, SamplingParams

EOS = tokenizer().eos_token_id
PROBLEMS = [problem for problem in generate("chain_arithmetic", 60, seed=0) if len(worked_solution(problem)[0]) >= 3]
FIVE = Problem("q/1", "gsm8k", "What is 2 + 3?\nSay it in digits.", "5", "number")


def ids(text, eos=False):
    return encoding.encode_completion(tokenizer(), text, eos=eos)


def rationale(problem, text):
    head = encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))
    return exploration.split(tokenizer(), problem, head, ids(text, eos=True))


def wrong(problem, at):
    """A rationale of a generated problem whose step `at` (from 1) is wrong, and so is its answer."""
    lines, _ = worked_solution(problem)
    lines[at - 1] = "Ann: 1 + 1 = 3."
    return rationale(problem, " " + "\n".join(lines) + "\nThe answer is -7.")


def sample(text, logprob=-1.0):
    found = ids(text, eos=True)
    return Sample(text, tuple(found), (logprob,) * len(found), "stop")


PARAMS = SamplingParams(temperature=0.7, max_new_tokens=64, seed=0)


class Script:
    """In place of an engine: `recovers(prefix text, number)` says whether a completion is right."""

    tokenizer = tokenizer()

    def __init__(self, recovers, right="The answer is {}."):
        self.recovers, self.right, self.drawn, self.prompts = recovers, right, [], []

    def sample_ids(self, prompt_ids, n, params, *, keys, first, progress):
        assert len(set(keys)) == len(keys) and not progress and params == PARAMS
        self.prompts += prompt_ids
        results = []
        for prompt, key in zip(prompt_ids, keys, strict=True):
            problem = next(one for one in [*PROBLEMS, FIVE] if one.id == key.partition("|")[0])
            start = tokenizer().decode(prompt[1:]).removeprefix(prompts.open_prompt(problem))
            self.drawn += [(key, number) for number in range(first, first + n)]
            answers = [problem.answer if self.recovers(start, j) else "-7" for j in range(first, first + n)]
            results.append([sample(self.right.format(answer)) for answer in answers])
        return results


def chance(share):
    """Recovers with this probability, decided by prefix and number alone."""
    return lambda start, number: hashlib.sha256(f"{number}/{start}".encode()).digest()[0] < 256 * share


# ------------------------------------------------------------------------------------------------------ steps


def test_a_line_is_a_step_and_the_answer_line_is_none():
    """Fault: the answer line counted as a step, which left nothing to reject."""
    text = " 1 + 1 = 2.\n\n2 + 3 = 5.\nThe answer is 5."
    assert exploration.step_texts(text, "gsm8k") == [" 1 + 1 = 2.\n\n", "2 + 3 = 5.\n"]
    assert exploration.step_texts("\n 1 + 1 = 2.\n2 + 3", "gsm8k") == ["\n 1 + 1 = 2.\n", "2 + 3"]
    for text in ("The answer is 5.", " \nThe answer is 5.", "", "\n\n", "#### 5", "A: 5"):
        assert exploration.step_texts(text, "gsm8k") == []
    assert exploration.step_texts(" 2 + 3 = 5.\n#### 5", "gsm8k") == [" 2 + 3 = 5.\n"]


def test_sentences_are_steps_of_prose_and_short_ones_join_the_next():
    text = " Whales are mammals, as all know. No. So they cannot breathe in water. So the answer is no."
    assert exploration.step_texts(text, "strategy_qa") == [
        " Whales are mammals, as all know.",
        " No. So they cannot breathe in water.",
    ]
    text = (
        r"We have $x = 3.5$ by the first line."
        + "\n"
        + r"Then (as is known.) $x^2 = 12.25$ holds. It is $\boxed{12.25}$."
    )
    assert exploration.step_texts(text, "math") == [
        "We have $x = 3.5$ by the first line.\n",
        "Then (as is known.) $x^2 = 12.25$ holds.",
    ]


def test_a_word_problem_solved_in_one_line_has_sentences_for_steps():
    text = " There are 15 trees originally. Then there were 21 trees after some more were planted.\nThe answer is 6."
    first, second = " There are 15 trees originally.", " Then there were 21 trees after some more were planted.\n"
    assert exploration.step_texts(text, "gsm8k") == [first, second]
    assert exploration.step_texts(first + "\n" + second + "6 = 6.", "svamp") == [first + "\n", second, "6 = 6."]


def test_the_shortest_neighbours_become_one_step_until_ten_are_left():
    sentences = [f"The {n}th sentence is {'very ' * n}long." for n in range(12)]
    steps = exploration.step_texts(" ".join(sentences), "math")
    assert len(steps) == 10 and "".join(steps) == " ".join(sentences)
    assert steps[0] == "The 0th sentence is long. The 1th sentence is very long."
    assert (
        exploration.step_texts("\n".join(sentences), "gsm8k")[1:]
        == [f"{s}\n" for s in sentences[1:-1]] + sentences[-1:]
    )


lines = st.lists(st.text("ab .?!\n$9", max_size=30)).map("\n".join)


@given(
    lines,
    st.sampled_from(["", "\nThe answer is 9.", "\nThe answer is 9.\nQ: next"]),
    st.sampled_from(["gsm8k", "math"]),
)
def test_steps_are_the_beginning_of_a_rationale_without_its_answer(text, end, dataset):
    steps = exploration.step_texts(text + end, dataset)
    assert (text + end).startswith("".join(steps)) and all(step.strip() for step in steps)
    assert "answer is" not in "".join(steps)
    if dataset == "math":
        assert len(steps) <= exploration.MOST
    elif (count := sum(bool(line.strip()) for line in text.split("\n"))) > 1:
        assert len(steps) == count


def made_of(*pieces):
    """A tokenizer whose tokens are given strings, each behind a mark of its own, which its decoder takes away."""
    words = {f"{chr(0xE000 + number)}{piece}": number for number, piece in enumerate(pieces)}
    backend = Tokenizer(WordLevel(words | {"<eos>": len(words)}, unk_token="<eos>"))
    backend.decoder = decoders.Sequence([decoders.Replace(Regex("[\ue000-\uf8ff]"), ""), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@given(st.lists(st.text("a\n.", max_size=4)), st.integers(0, 20))
@settings(max_examples=40)
def test_tokens_are_counted_up_to_a_character(pieces, characters):
    expected = next(
        t for t in range(len(pieces) + 1) if len("".join(pieces[:t])) >= min(characters, len("".join(pieces)))
    )
    assert encoding.count_tokens(made_of(*pieces), range(len(pieces)), characters) == expected


def test_a_token_of_two_steps_belongs_to_the_first():
    pieces = made_of(" 1 + 1", " = 2", ".\nB", "o: 5", ".\n", "The answer is", " 5.")
    found = exploration.split(pieces, FIVE, [9], range(8))
    assert found.ends == (3, 5) and found.prefix(0) == () and found.prefix(2) == (0, 1, 2, 3, 4)


@given(st.integers(0, 59), st.integers(1, 2))
def test_the_prompt_is_the_same_in_evaluation_exploration_and_training(index, at):
    """Fault: the prompt lost its newline at test time."""
    problem = PROBLEMS[index % len(PROBLEMS)]
    one, script = wrong(problem, at), Script(chance(0.5))
    found = exploration.explore(script, [one], 2, PARAMS)
    asked = encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))  # as `evaluation.evaluate` asks
    for prompt in script.prompts:
        assert prompt[: len(asked)] == asked
        rest = encoding.decode(tokenizer(), prompt[len(asked) :])
        assert rest.endswith(".\n") and tuple(prompt[len(asked) :]) in [
            one.prefix(i) for i in range(1, len(one.ends) + 1)
        ]
    pair = exploration.granular_pair(tokenizer(), one, found, ids(" solution", eos=True), "shortest")
    if pair and pair.step == 1:
        assert list(pair.prompt_ids) == asked
    elif pair:
        assert list(pair.prompt_ids) in script.prompts


def test_evaluation_reads_these_very_tokens(monkeypatch):
    engine, asked = NativeEngine(policy(), tokenizer()), []

    def draw(prompt_ids, n, params, **_):
        asked.extend(prompt_ids)
        return [[sample("The answer is 5.")] * n for _ in prompt_ids]

    monkeypatch.setattr(engine, "sample_ids", draw)
    evaluation.evaluate(engine, [FIVE], 0, PARAMS)
    assert asked == [list(rationale(FIVE, " 2 + 3 = 6.\nThe answer is 6.").prompt_ids)]
    assert tokenizer().decode(asked[0], skip_special_tokens=True) == "Q: What is 2 + 3?\nSay it in digits.\nA:"


# ------------------------------------------------------------------------------------------------ exploration


def right_so_far(problem):
    """Recovers if and only if every step so far is right."""
    whole = " " + "\n".join(worked_solution(problem)[0]) + "\n"
    return lambda start, number: whole.startswith(start)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_author_that_recovers_from_right_steps_only_falls_at_the_wrong_one(at):
    one, script = wrong(PROBLEMS[0], at), Script(right_so_far(PROBLEMS[0]))
    found = exploration.explore(script, [one], 4, PARAMS)
    recovers = exploration.outcomes(one, found)
    assert exploration.first_pit(recovers) == at
    assert [len(drawn) for drawn in recovers] == [1] * (at - 2) + [4] * (at > 1) + [4]  # before the pit, and at it


def test_who_always_recovers_has_no_pit_and_is_asked_once_a_step():
    one, script = wrong(PROBLEMS[0], 2), Script(lambda start, number: True)
    found = exploration.explore(script, [one], 4, PARAMS)
    assert exploration.outcomes(one, found) == [[True]] * len(one.ends)
    assert exploration.first_pit(exploration.outcomes(one, found)) is None
    pairs, fate = exploration.granular_pairs(tokenizer(), [one], found, [ids(" x", eos=True)], "shortest")
    assert (pairs, fate) == ([], {"dropped: no pit": 1})


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7])
def test_a_pit_is_k_failures(k):
    """Fault: k was 4 whatever one asked for."""
    one, script = wrong(PROBLEMS[0], 1), Script(lambda start, number: False)
    found = exploration.explore(script, [one], k, PARAMS)
    assert exploration.outcomes(one, found) == [[False] * k]
    late = Script(lambda start, number: number == k - 1)
    found = exploration.explore(late, [one], k, PARAMS)
    assert exploration.outcomes(one, found) == [[False] * (k - 1) + [True]] * len(one.ends)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.3])
def test_the_temperature_does_not_decide_how_many_are_drawn(temperature):
    """Fault: the number of samples was tied to T = 0.7. The real sampler, on a random model that is never right."""
    some = [wrong(problem, 2) for problem in PROBLEMS[:3]]
    params = SamplingParams(temperature=temperature, max_new_tokens=6, seed=0)
    found = exploration.explore(NativeEngine(policy(), tokenizer()), some, 5, params)
    assert [exploration.outcomes(one, found) for one in some] == [[[False] * 5]] * 3


@settings(max_examples=25)
@given(st.floats(0.05, 0.95), st.integers(1, 9), st.sampled_from(exploration.CHOICES))
def test_an_early_exit_finds_the_same_pits_and_pairs_with_fewer_completions(share, k, choice):
    some = [wrong(problem, at) for problem in PROBLEMS[:3] for at in (1, 2, 3)]
    few, all_ = Script(chance(share)), Script(chance(share))
    found, whole = exploration.explore(few, some, k, PARAMS), exploration.explore_all(all_, some, k, PARAMS)
    for one in some:
        assert exploration.first_pit(exploration.outcomes(one, found)) == exploration.first_pit(
            exploration.outcomes(one, whole)
        )
    solutions = [ids(" solution", eos=True)] * len(some)
    made = [exploration.granular_pairs(tokenizer(), some, drawn, solutions, choice) for drawn in (found, whole)]
    assert made[0] == made[1]
    assert len(set(few.drawn)) == len(few.drawn) and set(few.drawn) <= set(all_.drawn)


def test_rationales_that_begin_alike_share_what_is_drawn():
    one, two = wrong(PROBLEMS[0], 2), wrong(PROBLEMS[0], 3)
    script = Script(lambda start, number: True)
    exploration.explore(script, [one, two, one], 4, PARAMS)
    assert len(script.drawn) == len({r.key(i) for r in (one, two) for i in range(1, len(r.ends) + 1)})
    assert one.key(1) == two.key(1) and one.key(2) != two.key(2)


def test_a_completion_is_right_by_the_judge_of_all_stages():
    """Fault: a second check that took "1,000" for another number than "1000"."""
    problem = Problem(FIVE.id, "gsm8k", "How many?", "1000", "number")
    one = rationale(problem, " 1 + 1 = 3.\nThe answer is 3.")
    found = {}
    for said in ("1,000", "1000", "1000.0", "100"):
        script = Script(lambda start, number: True, f"The answer is {said}.")
        found[said] = exploration.explore(script, [one], 1, PARAMS)
    recovered = {said: exploration.outcomes(one, drawn) for said, drawn in found.items()}
    assert recovered == {"1,000": [[True]], "1000": [[True]], "1000.0": [[True]], "100": [[False]]}


def test_only_the_first_answer_of_a_completion_counts():
    script = Script(lambda start, number: True, "The answer is 4.\nThe answer is 5.")
    one = rationale(FIVE, " 2 + 3 = 6.\nThe answer is 6.")
    assert exploration.outcomes(one, exploration.explore(script, [one], 1, PARAMS)) == [[False]]


def test_less_than_one_completion_is_refused():
    for function in (exploration.explore, exploration.explore_all):
        with pytest.raises(ValueError, match="k is 0, but a prefix needs at least 1"):
            function(Script(chance(1)), [wrong(PROBLEMS[0], 1)], 0, PARAMS)


def test_rationales_without_a_step_are_counted_and_not_explored():
    one, script = rationale(FIVE, " The answer is 4."), Script(chance(0))
    found = exploration.explore(script, [one], 4, PARAMS)
    assert one.ends == () and script.drawn == []
    assert exploration.granular_pairs(tokenizer(), [one], found, [[EOS]], "shortest") == ([], {"dropped: no steps": 1})
    assert exploration.explore(script, [], 4, PARAMS) == {}


def test_two_possible_answers_are_a_warning_that_says_how_likely_luck_is():
    coin, *_ = generate("coin_flip", 1, seed=0)
    one = exploration.split(tokenizer(), coin, [0], ids(" heads.\nThe answer is no.", eos=True))
    engine = Script(None)
    engine.sample_ids = lambda prompts, n, params, **_: [[sample("The answer is no.")] * n for _ in prompts]
    with pytest.warns(UserWarning, match="coin_flip has 2 possible answers: of k = 4 blind guesses .* 94%"):
        exploration.explore(engine, [one], 4, PARAMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exploration.explore(Script(chance(0)), [wrong(PROBLEMS[0], 1)], 4, PARAMS)
    assert exploration.luck(coin, 1) == 0.5 and exploration.luck(PROBLEMS[0], 100) == 0.0
    assert exploration.luck(generate("shuffled_objects", 1, seed=0)[0], 2) == pytest.approx(5 / 9)


# ------------------------------------------------------------------------------------------------------ pairs


def attempt(text, logprob=-1.0, correct=True):
    return exploration.Attempt(sample(text, logprob), correct)


def test_a_pit_at_the_first_step_rejects_it_beside_the_right_solution():
    one, solution = (
        rationale(FIVE, " 2 + 3 = 6.\n6 = 6.\nThe answer is 6."),
        ids(" 2 + 3 = 5.\nThe answer is 5.", eos=True),
    )
    found = {one.key(1): [attempt("The answer is 6.", correct=False)]}
    pair = exploration.granular_pair(tokenizer(), one, found, solution, "shortest")
    assert (pair.step, pair.steps, pair.prefix, pair.rejected) == (1, 2, "", " 2 + 3 = 6.\n")
    assert list(pair.prompt_ids) == encoding.encode_prompt(tokenizer(), prompts.open_prompt(FIVE))
    assert list(pair.chosen_ids) == solution and pair.lengths is None


def test_a_later_pit_rejects_that_step_alone_beside_a_completion_from_before_it():
    one = rationale(FIVE, " Two.\nThree.\nSix.\nThe answer is 6.")
    long, short, likely = "Now: 2 + 3 = 5.\nThe answer is 5.", "The answer is 5.\nQ: More?", "So 5.\nThe answer is 5."
    before = [attempt("Oh.", correct=False), attempt(long, -3.0), attempt(short, -2.0), attempt(likely, -0.1)]
    found = {one.key(1): before, one.key(2): [attempt("The answer is 6.", correct=False)]}
    chosen = {}
    for choice in exploration.CHOICES:
        pair = exploration.granular_pair(tokenizer(), one, found, [EOS], choice)
        assert (pair.step, pair.prefix, pair.rejected) == (2, " Two.\n", "Three.\n")
        assert list(pair.rejected_ids) == ids("Three.\n") and EOS not in pair.rejected_ids
        assert pair.chosen_ids[-1] == EOS and pair.chosen_ids.count(EOS) == 1
        chosen[choice] = pair.chosen
    assert chosen == {"shortest": "The answer is 5.", "random": long, "most_likely": likely}
    lengths = {"shortest": ids("The answer is 5.", True), "random": ids(long, True), "most_likely": ids(likely, True)}
    assert pair.lengths == {name: len(found) for name, found in lengths.items()}
    means = exploration.mean_lengths([pair, replace(pair, lengths=None)])
    assert means == pair.lengths | {"rejected": len(ids("Three.\n"))}
    with pytest.raises(ValueError, match="choice 'longest' is unknown; choose one of: shortest, random, most_likely"):
        exploration.granular_pair(tokenizer(), one, found, [EOS], "longest")


@given(st.floats(0, 1), st.integers(1, 4), st.lists(st.text("a .\n", max_size=8), max_size=4))
def test_no_side_of_a_pair_is_empty_and_only_the_chosen_one_ends(share, k, lines):
    """Fault: empty rejected texts."""
    one = rationale(FIVE, " " + "\n".join(lines) + "\nThe answer is 6.")
    found = exploration.explore(Script(chance(share)), [one], k, PARAMS)
    pairs, fate = exploration.granular_pairs(tokenizer(), [one], found, [ids(" 5", eos=True)], "shortest")
    assert sum(fate.values()) == 1 and len(pairs) <= 1
    for pair in pairs:
        assert pair.rejected.strip() and "The answer is" not in pair.rejected
        assert pair.chosen_ids[-1] == EOS and len(pair.chosen_ids) > 1 and EOS not in pair.rejected_ids
        assert pair.prompt_ids + pair.rejected_ids == one.prompt_ids + one.prefix(pair.step)


def test_more_than_a_thousand_rationales_are_all_explored_and_equal_pairs_are_one():
    """Fault: a run that stopped after 1,000 rows."""
    some = [rationale(FIVE, f" 2 + {n} = 6.\nThe answer is 6.") for n in range(1_100)]
    found = exploration.explore(Script(chance(0)), some + some, 1, PARAMS)
    pairs, fate = exploration.granular_pairs(tokenizer(), some + some, found, [[7, EOS]] * 2_200, "shortest")
    assert len(pairs) == 1_100 and fate == {"kept: pit at step 1": 1_100, "dropped: duplicate": 1_100}


# ---------------------------------------------------------------------------------------------- what a pit is


def drawn(one, *recovers):
    """`found` of one rationale whose prefixes recover as written: "++-" is right, right, wrong."""
    return {
        one.key(step): [attempt("", correct=sign == "+") for sign in signs] for step, signs in enumerate(recovers, 1)
    }


def test_the_report_on_two_rationales_counted_by_hand():
    """The first is wrong at step 3, the second at step 2; the first two of four draws are observed."""
    problem = next(one for one in PROBLEMS if len(worked_solution(one)[0]) == 3)
    other = next(one for one in PROBLEMS if len(worked_solution(one)[0]) == 3 and one != problem)
    a, b = wrong(problem, 3), wrong(other, 2)
    found = drawn(a, "-++-", "++++", "----") | drawn(b, "++--", "-+--", "----")
    one, two = pits.pit_report(tokenizer(), [a, b], found, (1, 2))
    # k = 1: a falls at step 1 (early), b at 2 (exact); of the right prefixes a1, a2, b1 only a1 fails.
    # p is 1/2, 1 and 0 by the last two draws, so (1 - p) is 1/2, 0 and 1.
    assert (one["exact"], one["early"], one["late"], one["none"]) == (0.5, 0.5, 0, 0)
    assert one["false_pits"] == pytest.approx(1 / 3) and one["expected"] == pytest.approx(1 / 2)
    assert one["early_expected"] == pytest.approx((1 / 2 + 1) / 2)
    assert (one["repeated"], two["repeated"]) == (0, 0.5)  # by the last two draws a falls at 3, and b at 1
    # k = 2: a falls at 3 (exact), b recovers at 2 and falls at 3 (late); C(1, 2) / C(2, 2) = 0.
    assert (two["exact"], two["early"], two["late"], two["none"]) == (0.5, 0, 0.5, 0)
    assert two["false_pits"] == 0 and two["expected"] == pytest.approx(1 / 3)
    assert (two["rationales"], two["right_prefixes"]) == (2, 3)


def test_false_pits_come_with_the_chance_of_k_failures():
    """p = 0.3 at every right prefix: (1 - p)^k, 24 % at k = 4."""
    rng, some, found = random.Random(0), [], {}
    for problem in generate("chain_arithmetic", 300, seed=1):
        if len(worked_solution(problem)[0]) >= 3:
            some.append(wrong(problem, 3))
            signs = ["".join(rng.choices("+-", (0.3, 0.7), k=16)) for _ in range(2)]
            found |= drawn(some[-1], *signs, *["-" * 16] * (len(some[-1].ends) - 2))
    for row in pits.pit_report(tokenizer(), some, found, (1, 2, 4, 8)):
        missed, prefixes = 0.7 ** row["k"], row["right_prefixes"]
        spread = (missed * (1 - missed) / prefixes) ** 0.5
        assert abs(row["false_pits"] - missed) < 4 * spread and abs(row["expected"] - missed) < 4 * spread
        assert abs(row["early"] - row["early_expected"]) < 0.08
        assert row["exact"] + row["early"] == pytest.approx(1)


def test_the_report_refuses_what_it_cannot_tell():
    one = wrong(PROBLEMS[0], 1)
    with pytest.raises(ValueError, match="3 completions of a prefix are too few for k = 2: draw at least 4"):
        pits.pit_report(tokenizer(), [one], drawn(one, *["---"] * len(one.ends)), (1, 2))
    lines, _ = worked_solution(PROBLEMS[0])
    sound = rationale(PROBLEMS[0], " " + "\n".join(lines) + "\nThe answer is -7.")
    with pytest.raises(ValueError, match="none of the rationales has a wrong step"):
        pits.pit_report(tokenizer(), [sound], {}, (1,))
