"""The judge on real outputs with published verdicts, on every gold answer, and on wrong ones."""

import importlib.util
import json
import os
import random
from pathlib import Path

import pytest

from smlib.judging.answers import grade, grade_many
from smlib.problems.datasets import KINDS, Problem, load
from smlib.problems.generators import LETTERS

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("judging", ROOT / "benchmarks" / "judging.py")
judging = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(judging)


@pytest.mark.parametrize("row", judging.decisions().values(), ids=lambda row: f"{row['dataset']}-{row['index']}")
def test_a_decision_stands(row):
    dataset = row["dataset"]
    problem = Problem("x/0", dataset, "?", row["gold"], KINDS[dataset], tuple(row.get("choices", ())))
    verdict = grade(problem, row["output"])
    assert (verdict.correct, verdict.extracted) == (not row["published"], row["ours"])


def test_every_verdict_of_the_random_sample_is_the_reader_s():
    rows = [json.loads(line) for line in (ROOT / "results" / "judging_sample.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 5 * len(judging.TEXT_DAVINCI_002)
    for row in rows:
        choices = tuple(f"option {number}" for number in range(row.get("options", 0)))
        verdict = grade(Problem("x/0", row["dataset"], "?", row["gold"], KINDS[row["dataset"]], choices), row["output"])
        assert (verdict.extracted, verdict.correct) == (row["ours"], row["reader"] == "right"), row


# ------------------------------------------------------------------------------------------- all real outputs


@pytest.fixture(scope="module")
def judged():
    folder = Path(os.environ.get("SML_MODEL_OUTPUTS") or ROOT.parent / "shared" / "model_outputs")
    if not folder.is_dir():
        pytest.skip("needs the model outputs with published verdicts: set SML_MODEL_OUTPUTS to their folder")
    return judging.judge(folder)


def test_the_verdicts_differ_on_the_rows_that_were_read_and_on_no_other(judged):
    found = {one.key: (one.published, one.ours.extracted) for one in judging.differing(judged)}
    assert found == {key: (row["published"], row["ours"]) for key, row in judging.decisions().items()}


def test_agreement_is_what_the_tables_say(judged):
    page = judging.PAGE.read_text(encoding="utf-8")
    assert judging.pages(judged) == (judging.TABLE.read_text(encoding="utf-8"), page)


# ------------------------------------------------------------------------------------- gold, and wrong answers


@pytest.fixture(scope="module")
def data_dir():
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")
    return Path(os.environ["SML_DATA_DIR"])


@pytest.fixture(scope="module")
def published(data_dir):
    # of aqua the test set alone: the published accuracy is of it, and a local copy may lack the other
    return {name: load(name, "test" if name == "aqua" else "all") for name in judging.TEXT_DAVINCI_002}


@pytest.mark.parametrize(("split", "rows"), [("train", 7_473), ("test", 1_319)])
def test_every_gold_solution_of_gsm8k_is_right(data_dir, split, rows):
    with open(data_dir / "gsm8k" / f"{split}.jsonl", encoding="utf-8") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    verdicts = grade_many(load("gsm8k", split), solutions)
    assert sum(verdict.correct for verdict in verdicts) == rows


def own_text(problem):
    """The text of the gold option, unless another option has the same."""
    text = problem.choices[LETTERS.index(problem.answer)]
    return text if [option.casefold() for option in problem.choices].count(text.casefold()) == 1 else None


def said(problem, answer):
    """An answer as an output of its dataset writes it: every form that should be read."""
    forms = {
        "number": ["The answer is {}.", "Therefore, the answer (arabic numerals) is {}", "#### {}", "A: {}"],
        "choice": ["The answer is ({}).", "Therefore, among A through E, the answer is {}.", "The answer is {})"],
        "yes_no": ["Therefore, the answer (Yes or No) is {}.", "So the answer is {}."],
        "letters": ['Therefore, the answer is "{}".', "The answer is {}."],
    }[problem.kind]
    return [f"Let's think step by step.\n{form.format(answer)}" for form in forms]


@pytest.mark.parametrize("dataset", judging.TEXT_DAVINCI_002)
def test_gold_in_the_output_form_of_its_dataset_is_right(published, dataset):
    outputs = [(problem, text) for problem in published[dataset] for text in said(problem, problem.answer)]
    if KINDS[dataset] == "choice":
        texts = [(problem, own_text(problem)) for problem in published[dataset]]
        outputs += [(problem, f"The answer is {text}.") for problem, text in texts if text]
        assert sum(text is None for _, text in texts) / len(texts) < 0.02
    assert [text for problem, text in outputs if not grade(problem, text).correct] == []


def wrong(problem, rng):
    """The gold answer, made wrong at random; None where that way changes nothing."""
    gold = problem.answer
    if problem.kind == "yes_no":
        return "no" if gold == "yes" else "yes"
    if problem.kind == "choice":
        return rng.choice([letter for letter in LETTERS[: len(problem.choices)] if letter != gold])
    if problem.kind == "letters":
        place = rng.randrange(len(gold) - 1)
        swapped = gold[:place] + gold[place + 1] + gold[place] + gold[place + 2 :]
        other = gold[:place] + rng.choice("bdfgjpqu") + gold[place + 1 :]
        changed = rng.choice([swapped, other, gold[:-1], gold + "s"])
        return changed if changed.lower() != gold.lower() else None
    digits = [place for place, character in enumerate(gold[:6]) if character.isdigit()]
    place = rng.choice(digits)
    changed = rng.choice(
        [
            f"{float(gold) + 1:.12f}",
            f"{float(gold) * 10:.12f}",
            gold.removeprefix("-") if gold.startswith("-") else f"-{gold}",
            gold[:place] + str((int(gold[place]) + rng.randint(1, 9)) % 10) + gold[place + 1 :],
        ]
    )
    return changed if abs(float(changed) - float(gold)) > 1e-6 else None


def test_ten_thousand_wrong_answers_are_wrong(published):
    rng = random.Random(0)
    problems = [problem for dataset in published.values() for problem in dataset]
    judged, taken = 0, []
    while judged < 10_000:
        problem = rng.choice(problems)
        answer = wrong(problem, rng)
        if answer is None:
            continue
        judged += 1
        output = rng.choice(said(problem, answer))
        verdict = grade(problem, output)
        if verdict.correct or verdict.extracted is None:
            taken.append((problem.id, output, verdict.reason))
    assert taken == []
