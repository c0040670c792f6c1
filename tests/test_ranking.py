import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.learning.ranking import coverage, held_out, pairs, rank, side
from smlib.learning.rows import Pair, Rationale
from smlib.problems.datasets import generate


def row(identity="q", text="a text", answer="yes", correct=True, re_correct=True, author="base", source="open", **more):
    return Rationale(
        id=identity,
        dataset="coin_flip",
        text=text,
        token_ids=tuple(text.encode()),
        answer=answer,
        correct=correct,
        reanswer="yes",
        reanswer_correct=re_correct,
        author=author,
        source=source,
        **more,
    )


@pytest.mark.parametrize(
    ("answer", "correct", "re_correct", "expected"),
    [
        ("yes", True, True, "+"),
        ("no", False, False, "-"),
        ("yes", True, False, None),
        ("no", False, True, None),
        (None, False, False, None),
        (None, False, True, None),
    ],
)
def test_the_side_of_every_case(answer, correct, re_correct, expected):
    assert side(row(answer=answer, correct=correct, re_correct=re_correct))[0] == expected


def test_every_case_has_its_own_reason():
    cases = [(True, True), (True, False), (False, True), (False, False)]
    reasons = {side(row(correct=a, re_correct=b))[1] for a, b in cases} | {side(row(answer=None))[1]}
    assert len(reasons) == 5


def test_rank_keeps_the_first_of_each_side_and_says_what_happened_to_the_others():
    rows = [
        row(text="r1"),
        row(text="r1"),
        row(text="w1", correct=False, re_correct=False),
        row(text="r2"),
        row(text="r3"),
        row(text="mixed", re_correct=False),
        row(text="silent", answer=None, correct=False, re_correct=False),
        row(text="r1", identity="another question"),
    ]
    kept, fate = rank(rows, max_per_side=2)
    assert [(r.id, r.text, r.side) for r in kept] == [
        ("q", "r1", "+"),
        ("q", "w1", "-"),
        ("q", "r2", "+"),
        ("another question", "r1", "+"),
    ]
    assert fate == {
        "kept: r+": 3,
        "kept: r-": 1,
        "dropped: duplicate": 1,
        "dropped: over the cap": 1,
        "dropped: states the right answer, supports another": 1,
        "dropped: states no answer": 1,
    }


ROWS = st.lists(
    st.builds(
        row,
        identity=st.sampled_from("pq"),
        text=st.sampled_from("abcdef"),
        answer=st.sampled_from(["yes", None]),
        correct=st.booleans(),
        re_correct=st.booleans(),
        author=st.sampled_from(["base", "sft"]),
        source=st.sampled_from(["open", "conditioned"]),
    ),
    max_size=40,
)


@given(rows=ROWS, cap=st.integers(0, 5))
def test_rank_accounts_for_every_row_and_keeps_the_cap(rows, cap):
    kept, fate = rank(rows, cap)
    assert sum(fate.values()) == len(rows)
    assert sum(count for name, count in fate.items() if name.startswith("kept")) == len(kept)
    assert len({(r.id, r.text) for r in kept}) == len(kept)
    for question in "pq":
        for which in "+-":
            assert sum(r.id == question and r.side == which for r in kept) <= cap


def test_coverage_counts_questions():
    problems = generate("coin_flip", 8, seed=0)
    sides = ["+", "-", "+-", "+-", "++", "", "", "--"]
    rows = [row(p.id, side=which) for p, text in zip(problems, sides, strict=True) for which in text]
    assert coverage(rows, problems) == {
        "only right": 0.25,
        "only wrong": 0.25,
        "both": 0.25,
        "neither": 0.25,
    }


def ranked(right, wrong, identity="q", author="base", source="open"):
    made = [row(identity, f"r{i}", author=author, source=source, side="+") for i in range(right)]
    return made + [row(identity, f"w{i}", author=author, source=source, side="-") for i in range(wrong)]


def test_pairs_by_hand():
    made = pairs(ranked(1, 1) + ranked(2, 0, "only right") + ranked(0, 2, "only wrong"), 4, seed=0)
    assert made == [
        Pair(
            id="q",
            dataset="coin_flip",
            author="base",
            source="open",
            chosen="r0",
            rejected="w0",
            held_out=held_out("q"),
            chosen_ids=tuple(b"r0"),
            rejected_ids=tuple(b"w0"),
        )
    ]


def test_pairs_are_of_one_question_and_one_author():
    rows = [
        row(q, f"{q}{author}{which}{i}", author=author, side=which)
        for q in "abc"
        for author in ("base", "sft")
        for which in "+-"
        for i in range(2)
    ]
    made = pairs(rows, 10, seed=0)
    assert len(made) == 3 * 2 * 2
    for pair in made:
        assert pair.chosen.startswith(f"{pair.id}{pair.author}+")
        assert pair.rejected.startswith(f"{pair.id}{pair.author}-")


@given(right=st.integers(1, 6), wrong=st.integers(1, 6), most=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_wrong_rationale_is_rejected_once_and_the_right_ones_take_turns(right, wrong, most, seed):
    made = pairs(ranked(right, wrong), most, seed)
    assert len(made) == len({pair.rejected for pair in made}) == min(most, wrong)
    chosen = [pair.chosen for pair in made]
    assert len(set(chosen)) == min(right, len(made))
    assert max(chosen.count(text) for text in chosen) == -(-len(made) // right)


def test_one_right_rationale_meets_every_wrong_one():
    assert sorted(pair.rejected for pair in pairs(ranked(1, 4), 4, seed=0)) == ["w0", "w1", "w2", "w3"]


def test_a_seed_decides_the_pairs():
    rows = ranked(6, 6)
    assert pairs(rows, 4, seed=1) == pairs(rows, 4, seed=1)
    assert len({str(pairs(rows, 4, seed=seed)) for seed in range(5)}) > 1


def test_the_source_of_a_pair_is_that_of_its_rejected_side():
    rows = [
        row(text="right open", side="+"),
        row(text="right conditioned", side="+", source="conditioned"),
        row(text="wrong open", side="-"),
        row(text="wrong conditioned", side="-", source="conditioned"),
    ]
    made = pairs(rows, 10, seed=0)
    assert len(made) == 2 and all(pair.rejected == f"wrong {pair.source}" for pair in made)


def test_pairs_are_held_out_by_question():
    questions = [f"coin_flip/train/{i}" for i in range(400)]
    made = pairs([r for q in questions for r in ranked(2, 2, q)], 4, seed=0)
    assert all(pair.held_out == held_out(pair.id) for pair in made)
    assert 0.06 < sum(map(held_out, questions)) / len(questions) < 0.19  # about one in eight
