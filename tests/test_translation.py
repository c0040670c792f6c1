"""The task without reasoning: a language whose grammar is known, and authors who break one rule each."""

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smlib import pretraining
from smlib.cli import main
from smlib.judging.answers import grade
from smlib.pretraining import authors, write
from smlib.problems import prompts, translation
from smlib.problems.datasets import Problem, generate
from smlib.problems.steps import knows
from smlib.runs.settings import preset

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


def test_the_language_is_large_enough_that_seeds_hardly_share_a_question():
    """Fault: a base that has read 40,000 sentences had read a quarter of the questions of a run."""
    read = {problem.id for problem in generate("translation", 5_000, seed=1_000_003)}
    asked = generate("translation", 1_000, seed=10_000)
    assert sum(problem.id in read for problem in asked) < 20


def test_a_word_that_velu_lacks_is_named():
    with pytest.raises(ValueError, match="Velu has no word for 'wolf'"):
        translation.parse("Translate into Velu: The wolf helps the cat.")
    with pytest.raises(ValueError, match="Velu has no word for 'sees'"):
        translation.parse("Translate into Velu: The dog sees the cat.")


def test_more_sentences_than_there_are_end_in_a_message(monkeypatch):
    """Fault: it drew for ever."""
    monkeypatch.setattr(translation, "_NOUNS", {"dog": "kel", "cat": "jin"})
    monkeypatch.setattr(translation, "_ADJECTIVES", {"old": "mo"})
    monkeypatch.setattr(translation, "_VERBS", {"help": "pal"})
    with pytest.raises(
        ValueError, match=r"translation has hardly more than \d+ train questions: ask for fewer than 9,000"
    ):
        generate("translation", 9_000, seed=0)


def test_a_run_has_no_conditioned_questions_and_no_exemplars():
    assert preset("tiny", "translation").sampling.conditioned_questions == 0
    with pytest.raises(ValueError, match="conditioned_questions = 5 is not allowed for task 'translation'"):
        preset("tiny", "translation", sampling={"conditioned_questions": 5})
    with pytest.raises(ValueError, match="task 'translation' has none: choose another task"):
        preset("llama2-7b", "translation")


def test_a_base_that_has_not_read_it_and_self_explore_are_refused_before_any_work(tmp_path, capsys):
    assert main(f"stage 01_sampling --task translation --out {tmp_path / 'run'}".split()) == 1
    assert "the base tiny has not read translations: make one" in capsys.readouterr().err
    base = Path(pretraining.__file__).parent / "tiny_base"
    assert main(["explore", "--task", "translation", "--model", str(base), "--out", str(tmp_path / "run")]) == 1
    assert "Self-Explore is for tasks with steps, and translation has none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["The dog sleeps.", "Translate into Velu: a dog helps the cat.", ""])
def test_another_wording_is_refused(text):
    with pytest.raises(ValueError, match="not worded like a sentence to translate"):
        translation.parse(text)


def test_it_has_no_steps_to_check():
    assert not knows("translation")
