"""The task without reasoning: a language whose grammar is known, and authors who break one rule each."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib.judging.answers import grade
from smlib.pretraining import authors, write
from smlib.problems import prompts, translation
from smlib.problems.datasets import Problem, generate
from smlib.problems.steps import knows

BY_HAND = {
    "The dog helps the cat.": "keljinpal",
    "The dogs help the cat.": "kelijinpal",
    "The old dogs help the cats.": "kelimoijinipal",
    "The old dog helped the tall cat.": "kelmojinzupalta",
    "The kings do not visit the loud girl.": "ramisifbonesok",
    "The king does not visit the loud girls.": "ramsifiboinesok",
    "The small queens did not answer the red birds.": "noripiitusiwainelanta",
}


def asked(sentence):
    question = f"Translate into Velu: {sentence}"
    return Problem("translation/train/0", "translation", question, BY_HAND[sentence], "letters")


@pytest.mark.parametrize("sentence", BY_HAND)
def test_sentences_translated_by_hand(sentence):
    assert translation.translate(translation.parse(asked(sentence).question)) == BY_HAND[sentence]


@pytest.mark.parametrize(
    ("author", "said"),
    [
        ("careful", "noripiitusiwainelanta"),
        ("adjectives do not agree", "noripitusiwanelanta"),
        ("verb in the middle", "noripiinelantatusiwai"),
        ("no past", "noripiitusiwainelan"),
    ],
)
def test_each_author_breaks_one_rule(author, said):
    assert write(asked("The small queens did not answer the red birds."), author, random.Random(0)) == ([], said)


def test_shares_sum_to_one_and_only_the_careful_are_always_right():
    assert sum(authors("translation").values()) == pytest.approx(1)
    problems, rng = generate("translation", 200, seed=0), random.Random(0)
    right = {
        author: sum(write(one, author, rng)[1] == one.answer for one in problems) for author in authors("translation")
    }
    assert right.pop("careful") == 200 and max(right.values()) < 150


@given(seed=st.integers(0, 10_000), split=st.sampled_from(["train", "test"]))
def test_a_drawn_sentence_is_read_back_and_its_translation_is_judged_right(seed, split):
    (problem,) = generate("translation", 1, seed=seed, split=split)
    facts = translation.parse(problem.question)
    (subject, _, many), (thing, _, _) = facts["things"]
    assert subject != thing and set(facts) == {"things", "verb", "denied", "past"}
    assert translation.translate(facts) == problem.answer
    assert grade(problem, prompts.answer_sentence(problem, problem.answer)).correct
    assert not grade(problem, prompts.answer_sentence(problem, problem.answer + "i")).correct
    verb = r"(?:do|does|did) not \w+" if facts["denied"] else r"\w+ed" if facts["past"] else r"\w+"
    assert re.fullmatch(rf"Translate into Velu: The (?:\w+ )?{subject}{'s' * many} {verb} the .+\.", problem.question)


def test_roots_are_told_apart_and_none_is_an_ending():
    assert len(set(translation.WORDS.values())) == len(translation.WORDS)
    assert not {"i", "ne", "ta"} & set(translation.WORDS.values())


@pytest.mark.parametrize("text", ["The dog sleeps.", "Translate into Velu: a dog helps the cat.", ""])
def test_another_wording_is_refused(text):
    with pytest.raises(ValueError, match="not worded like a sentence to translate"):
        translation.parse(text)


def test_it_has_no_steps_to_check():
    assert not knows("translation")
