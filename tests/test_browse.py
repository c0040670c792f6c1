"""The page of a run's answers: whole, and safe whatever a model wrote."""

import json
import re

import pytest

from smlib.errors import UsageError
from smlib.notebooks import browse
from smlib.problems.datasets import Problem
from smlib.runs.settings import preset

COIN = "A coin is heads up. Ann flips the coin. Is the coin still heads up?"
FLIP = Problem("coin_flip/test/1", "coin_flip", COIN, "no", "yes_no")


def answers(method, greedy, samples=(), scores=None):
    row = {"method": method, "test_set": "coin_flip", "id": FLIP.id, "greedy_text": greedy}
    return row | {"sampled_texts": list(samples)} | ({"scores": scores} if scores else {})


def held(page):
    """The data that a page holds."""
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_question_has_the_answers_of_every_method_with_their_steps_and_verdicts():
    rows = [
        answers("base", " Ann flips: heads.\nThe answer is no.", [" Ann flips: tails.\nThe answer is yes."], [-1.5]),
        answers("sml", " Ann flips: tails.\nThe answer is no."),
    ]
    tokens = {("base", "coin_flip", FLIP.id): [(" Ann", -0.1)]}
    [question] = browse._questions(rows, {FLIP.id: FLIP}, tokens)
    base, sml = question["answers"]["base"], question["answers"]["sml"]
    assert browse.VERDICTS[base["greedy"]["verdict"]] == "right, a step wrong"
    assert base["greedy"]["lines"] == [("Ann flips: heads.", False, "should be: Ann flips: tails.")]
    assert base["greedy"]["tokens"] == [(" Ann", -0.1)]
    assert [(browse.VERDICTS[one["verdict"]], one["score"]) for one in base["samples"]] == [("wrong", -1.5)]
    assert browse.VERDICTS[sml["greedy"]["verdict"]] == "right, every step"
    assert sml["samples"] == [] and sml["greedy"]["tokens"] is None


def test_nothing_that_a_model_wrote_is_markup():
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\u2028'
    data = {"methods": [{"name": "base", "label": "base"}], "questions": [{"text": evil}]}
    page = browse._document("<b>title</b>", data)
    assert held(page)["questions"][0]["text"] == evil
    assert evil not in page and "<img" not in page and "<b>title" not in page
    assert page.count("<script") == 2


def test_the_browser_is_told_which_script_may_run():
    page = browse._document("a run", {"methods": []})
    [policy] = re.findall('Content-Security-Policy" content="(.*?)">', page)
    assert re.search(r"script-src 'sha256-[\w+/]+=*'$", policy) and policy.startswith("default-src 'none'")
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)


def test_a_run_without_an_evaluation_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="no finished 05_evaluation to look at: run notebooks 00 to 05 first"):
        browse.write(tmp_path, preset("smoke"))
