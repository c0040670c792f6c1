"""Tables of results, from rows made by hand: values per question, intervals, pooling over seeds."""

import csv
import re
import shutil
from dataclasses import replace

import pytest

from smlib.cli import main
from smlib.errors import UsageError
from smlib.files.artifacts import Stage, StageError, StageMismatch, require
from smlib.problems.datasets import Problem
from smlib.problems.prompts import answer_sentence
from smlib.problems.steps import worked_solution
from smlib.reports import plots, results
from smlib.reports.evaluation import accuracy_interval, mean_interval, paired_test
from smlib.runs.questions import test_problems as questions_of
from smlib.runs.settings import preset

# ---------------------------------------------------------------------------------------------- one completion


@pytest.fixture
def problem():
    return questions_of(settings())["coin_flip"][0]


def settings(seed=0, task="coin_flip", questions=2):
    return preset("smoke", task, seed, evaluation={"questions": questions, "samples": 2, "published": 0})


def solution(problem, *, wrong_step=False, answer=None):
    lines, _ = worked_solution(problem)
    if wrong_step:
        lines[0] = "Nobody flips: heads."
    return " " + "\n".join([*lines, answer_sentence(problem, answer or problem.answer)])


def other(problem):
    return "no" if problem.answer == "yes" else "yes"


def test_outcome_judges_answer_and_steps(problem):
    assert results.outcome(problem, solution(problem)) == "right, every step"
    assert results.outcome(problem, solution(problem, wrong_step=True)) == "right, a step wrong"
    assert results.outcome(problem, solution(problem, answer=other(problem))) == "wrong"
    assert results.outcome(problem, " Nobody knows.") == "no answer"


def test_of_a_published_task_the_answer_alone_is_judged():
    eggs = Problem("gsm8k/test/0", "gsm8k", "How many eggs?", "3", "number")
    texts = [" 1 + 2 = 3.\nThe answer is 3.", " 2.\nThe answer is 3.", " 1.\nThe answer is 1.", ""]
    assert [results.outcome(eggs, text) for text in texts] == ["right", "right", "wrong", "no answer"]
    shares = results.outcome_shares([eggs], [{"sampled_texts": texts}])
    assert shares == {"right": 50, "wrong": 25, "no answer": 25}
    assert set(shares) | set(results.OUTCOMES) == set(plots.OUTCOME_COLOURS)


def test_outcome_shares_add_up(problem):
    texts = [solution(problem), solution(problem), solution(problem, wrong_step=True), ""]
    shares = results.outcome_shares([problem], [{"sampled_texts": texts}])
    assert shares == {"right, every step": 50, "right, a step wrong": 25, "wrong": 0, "no answer": 25}


# ------------------------------------------------------------------------------------------ values of a question


def row(problem, greedy, right, *, answers=None, scores=None, texts=None, method="base", test_set="coin_flip"):
    """A row of answers.jsonl; right: verdicts of the samples."""
    answers = answers or [problem.answer if good else other(problem) for good in right]
    return {
        "method": method,
        "test_set": test_set,
        "id": problem.id,
        "dataset": problem.dataset,
        "gold": problem.answer,
        "greedy_text": solution(problem),
        "greedy_answer": problem.answer,
        "greedy_correct": greedy,
        "greedy_invalid": False,
        "sampled_texts": texts or [solution(problem, answer=answer) for answer in answers],
        "sampled_ids": [[] for _ in answers],
        "sampled_answers": answers,
        "sampled_correct": right,
        "sampled_invalid": answers.count(None),
        "scores": scores or [0.0] * len(right),
    }


def test_question_values_by_hand(problem):
    texts = [solution(problem), solution(problem, wrong_step=True), " ...", solution(problem, answer=other(problem))]
    one = row(
        problem, False, [True, True, False, False], texts=texts, scores=[0.1, 0.9, 0.5, 0.2],
        answers=[problem.answer, problem.answer, None, other(problem)],
    )  # fmt: skip
    assert results.question_values(one, problem) == {
        "greedy": 0,
        "greedy_invalid": 0,
        "avg_at_4": 0.5,
        "pass_at_4": 1,
        "majority_at_4": 1,  # two votes against one; no answer, no vote
        "best_of_4": 1,  # the score 0.9
        "sampled_invalid": 0.25,
        "sound_at_4": 0.25,  # right in the answer twice, in every step once
    }


def test_without_any_valid_answer_the_majority_is_wrong(problem):
    values = results.question_values(row(problem, False, [False] * 2, answers=[None] * 2, texts=["", ""]))
    assert values["majority_at_2"] == 0 and values["sampled_invalid"] == 1
    assert "sound_at_2" not in values  # no problem given: its steps cannot be judged


def test_without_samples_only_the_greedy_metrics_are_there(problem):
    assert set(results.question_values(row(problem, True, []))) == {"greedy", "greedy_invalid"}


# ------------------------------------------------------------------------------------------------- one run

RIGHT = {  # method -> (greedy verdict, verdicts of the samples) per question
    "base": [(False, [False, False]), (True, [True, True])],
    "sft": [(True, [True, False]), (True, [True, True])],
    "sml": [(True, [True, True]), (True, [True, True])],
}


def answers(run, right=RIGHT, published=False):
    names = {task: group[:2] for task, group in questions_of(run).items()}
    rows = [
        row(problem, greedy, sampled, method=method, test_set=name, answers=[problem.answer] * 2)
        for method, verdicts in right.items()
        for name, group in names.items()
        for problem, (greedy, sampled) in zip(group, verdicts, strict=True)
    ]
    if published:
        rows += [r | {"test_set": "coin_flip (published)", "sampled_correct": [], "sampled_answers": []} for r in rows]
    return rows


def asked(run):
    return [problem for group in questions_of(run).values() for problem in group]


def answered(run, **given):
    return results.Answered(run.preset, run.seed, asked(run), answers(run, **given))


def cell(rows, method, metric, test_set="coin_flip"):
    (found,) = [r for r in rows if (r["method"], r["metric"], r["test_set"]) == (method, metric, test_set)]
    return found


def test_rows_from_answers_by_hand():
    rows = results.rows_from_answers(answered(settings()))
    assert {tuple(r) for r in rows} == {results.COLUMNS}
    base = cell(rows, "base", "greedy")
    assert (base["preset"], base["seed"], base["n"], base["value"]) == ("smoke", 0, 2, 0.5)
    assert (base["low"], base["high"]) == accuracy_interval(1, 2)
    avg = cell(rows, "base", "avg_at_2")
    assert (avg["value"], avg["low"], avg["high"]) == (0.5, 0, 1)  # t would reach from -5.9 to 6.9
    gain = cell(rows, "sft - base", "avg_at_2")
    test = paired_test([0.5, 1], [0, 1])
    assert (gain["value"], gain["low"], gain["high"]) == (0.25, test["low"], test["high"])
    assert cell(rows, "sml - sft", "avg_at_2")["value"] == 0.25
    assert cell(rows, "sml - sft", "greedy")["value"] == 0


def test_a_published_set_has_greedy_rows_only_and_stays_out_of_the_mean():
    run = settings(task="all")
    rows = results.rows_from_answers(answered(run, published=True))
    assert {r["metric"] for r in rows if r["test_set"] == "coin_flip (published)"} == {"greedy", "greedy_invalid"}
    mean = cell(rows, "sml - sft", "avg_at_2", results.MEAN)
    assert (mean["n"], mean["value"]) == (8, 0.25)


def test_sets_of_different_sizes_are_no_mean_of_tasks():
    run = answered(settings(task="all"))
    fewer = replace(run, answers=[row for row in run.answers if row["id"] != run.answers[0]["id"]])
    found = {test_set for _, test_set, _ in results.table_of(fewer)}
    assert results.ALL in found and results.MEAN not in found


def test_one_task_has_no_mean_of_tasks():
    rows = results.rows_from_answers(answered(settings()))
    assert {r["test_set"] for r in rows} == {"coin_flip"}


# ------------------------------------------------------------------------------------------------ several seeds


def write_run(folder, run, rows):
    stage = Stage(
        folder, "05_evaluation",
        {"preset": run.preset, "tasks": run.tasks, "seed": run.seed, "base": run.base, "evaluation": run.evaluation},
    )  # fmt: skip
    with stage.recording():
        stage.write_rows("problems", asked(run))
        stage.write_rows("answers", rows)
    return folder


@pytest.fixture
def two_runs(tmp_path):
    worse = RIGHT | {"sml": [(False, [False, False]), (True, [True, True])]}
    return [
        write_run(tmp_path / "a", settings(0), answers(settings(0))),
        write_run(tmp_path / "b", settings(1), answers(settings(1), worse)),
    ]


def test_combine_pools_questions_and_seeds(two_runs):
    rows = results.combine(two_runs)
    gain = cell(rows, "sml - sft", "avg_at_2")
    # seed 0: differences 0.5 and 0; seed 1: -0.5 and 0. So per question 0 and 0, per seed 0.25 and -0.25
    assert (gain["seeds"], gain["n"], gain["value"], gain["low"], gain["high"]) == ("0 1", 2, 0, 0, 0)
    assert (gain["seeds_low"], gain["seeds_high"]) == mean_interval([0.25, -0.25])


def test_the_same_answers_in_every_seed_do_not_narrow_the_interval(two_runs):
    """The base is one model: asked the same questions again, it tells nothing new."""
    base = cell(results.combine(two_runs), "base", "avg_at_2")
    alone = cell(results.combine(two_runs[:1]), "base", "avg_at_2")
    assert (base["low"], base["high"]) == (alone["low"], alone["high"])
    assert base["seeds_low"] is None


def test_runs_that_do_not_belong_together_are_refused(two_runs, tmp_path):
    with pytest.raises(ValueError, match="has seed 0, like another"):
        results.combine([two_runs[0], two_runs[0]])
    more = settings(2, questions=3)
    write_run(tmp_path / "c", more, answers(more))
    with pytest.raises(ValueError, match=r"c was made with 05_evaluation: evaluation\.questions = 3, and .*a with 2"):
        results.combine([*two_runs, tmp_path / "c"])
    write_run(tmp_path / "d", settings(3), answers(settings(3), published=True))
    with pytest.raises(ValueError, match="different test sets or methods"):
        results.combine([*two_runs, tmp_path / "d"])


def write_upstream(folder, seed, **sft):
    """A run of two stages before the evaluation, which reads them."""
    with Stage(folder, "02_sft", {"seed": seed, "base_sha256": "ab"} | sft).recording() as tuned:
        tuned.write_rows("log", [{"seed": seed}])
    with Stage(folder, "03_reward_model", {"seed": seed}, {tuned: ["log.jsonl"]}).recording() as judge:
        judge.write_rows("log", [{"seed": seed}])
    run = settings(seed)
    keys = {"preset": run.preset, "tasks": run.tasks, "seed": seed, "base": run.base, "evaluation": run.evaluation}
    with Stage(folder, "05_evaluation", keys, {judge: ["log.jsonl"]}).recording() as stage:
        stage.write_rows("problems", asked(run))
        stage.write_rows("answers", answers(run))
    return folder


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sft": {"learning_rate": 1e-3}}, r"02_sft: sft\.learning_rate = 0\.001, and .*0 with 0\.0006"),
        ({"sft": {"learning_rate": 6e-4}, "lora": {"rank": 4}}, r"02_sft: lora\.rank = 4, and .*0 with '\(not set\)'"),
        ({"sft": {"learning_rate": 6e-4}, "base_sha256": "cd"}, r"02_sft: base_sha256 = 'cd', and .*0 with 'ab'"),
    ],
)
def test_runs_that_differ_anywhere_upstream_are_not_pooled(tmp_path, changed, words):
    rate = {"sft": {"learning_rate": 6e-4}}
    runs = [write_upstream(tmp_path / str(seed), seed, **rate) for seed in (0, 1)]
    assert results.combine(runs)
    with pytest.raises(UsageError, match=words):
        results.combine([*runs, write_upstream(tmp_path / "2", 2, **changed)])
    shutil.rmtree(tmp_path / "1" / "02_sft")
    with pytest.raises(StageError, match="02_sft does not exist"):
        results.combine(runs)  # nobody knows how it was made


def test_a_stage_of_another_seed_is_not_made_in_the_same_run(tmp_path):
    """Else one training, evaluated twice, would pass for two seeds."""
    for key, value in (("seed", 1), ("base", "other"), ("tasks", ["coin_flip"])):
        given = {"seed": 0, "base": "tiny", "tasks": ["all"]}
        with Stage(tmp_path / key, "02_sft", given).recording() as tuned:
            tuned.write_rows("log", [{"n": 1}])
        with pytest.raises(StageMismatch, match=f"would be made with {key} = .*, or the same {key}"):
            Stage(tmp_path / key, "05_evaluation", given | {key: value}, {tuned: ["log.jsonl"]})


def test_a_run_whose_stage_was_made_again_is_not_pooled(tmp_path):
    write_upstream(tmp_path / "0", 0)
    shutil.rmtree(tmp_path / "0" / "02_sft")
    with Stage(tmp_path / "0", "02_sft", {"seed": 0}).recording() as again:
        again.write_rows("log", [{"seed": 3}])
    with pytest.raises(StageMismatch, match="03_reward_model was made from another 02_sft"):
        results.combine([tmp_path / "0"])


def test_main_prints_a_table_and_writes_the_csv(two_runs, tmp_path, capsys):
    results.main(two_runs, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| avg@2, % | coin flip |" and "| greedy, % | coin flip |" in lines
    assert "| SML (PPO) | 75.0 [0.0, 100.0] |" in lines
    with (tmp_path / "out" / "smoke.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == results.POOLED_COLUMNS
    assert cell(rows, "sml", "greedy")["value"] == "0.7500"


def test_outside_a_repository_the_command_writes_into_the_folder_that_one_is_in(two_runs, tmp_path, monkeypatch):
    monkeypatch.setattr("smlib.files.folders.checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert main(["results", *map(str, two_runs)]) == 0
    assert (tmp_path / "results" / "smoke.csv").is_file()


def test_the_reference_line_stands_under_the_published_sets_alone(tmp_path):
    write_run(tmp_path / "a", settings(), answers(settings(), published=True))
    *generated, published = results.markdown(results.combine([tmp_path / "a"])).split("\n\n")
    assert published.startswith("| greedy, published questions, % | coin flip |")
    assert "| text-davinci-002, zero-shot CoT | 91.4 |" in published
    assert len(generated) == 2 and "davinci" not in "".join(generated)


def test_self_explore_stands_beside_the_others_where_all_runs_have_it(two_runs, tmp_path):
    """The rows of stages 06 have no scores of a reward model; their evaluation may have other settings."""
    rows = [row for row in answers(settings()) if row["method"] == "sft"]
    rows = [row | {"method": method} for method in results.EXPLORE_METHODS for row in rows]
    scored = [row | {"scores": [0.0, 1.0]} for row in answers(settings())]
    runs = [write_run(tmp_path / "scored", settings(), scored), two_runs[1]]
    plain = results.combine(runs[:1])
    assert cell(plain, "sml", "best_of_2")
    stage = Stage(runs[0], "06_evaluation", require(runs[0], "05_evaluation").settings)
    with stage.recording():
        stage.write_rows("problems", asked(settings()))
        stage.write_rows("answers", rows)
    found = results.combine(runs[:1])
    assert {row["method"] for row in found} - {row["method"] for row in plain} == {
        *results.EXPLORE_METHODS, *(" - ".join(pair) for pair in results.EXPLORE_CONTRASTS)
    }  # fmt: skip
    assert results.markdown(found) == results.markdown(plain)
    table = results.explore_markdown(found).splitlines()
    assert table[0] == "| coin flip, % | avg@2 | sound@2 | greedy |"
    value = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", "\n".join(table), re.MULTILINE))
    assert value["SFT on r+"] == value["RFT"] == value["Self-Explore"] != value["SML (PPO)"]
    assert value["Self-Explore minus RFT"].startswith("+0.0 [+0.0, +0.0]")
    with pytest.raises(ValueError, match="Self-Explore in all of them"):
        results.combine(runs)


def test_several_seeds_add_a_line_with_seeds_as_the_draws(two_runs):
    one, two = (results.markdown(results.combine(runs)).splitlines() for runs in (two_runs[:1], two_runs))
    low, high = mean_interval([0.25, -0.25])
    assert f"| the same, interval over seeds | +0.0 [{100 * low:+.1f}, {100 * high:+.1f}] |" in two
    assert not [line for line in one if "over seeds" in line]


def test_a_table_read_back_prints_the_same(two_runs, tmp_path):
    rows = results.combine(two_runs)
    results.write_csv(tmp_path / "tiny.csv", rows)
    back = results.read_csv(tmp_path / "tiny.csv")
    assert [list(row) for row in back] == [list(row) for row in rows]
    assert all(a["value"] == pytest.approx(b["value"], abs=5e-5) for a, b in zip(back, rows, strict=True))
    assert back[0]["seeds_low"] is None  # of the base


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["results", str(tmp_path / "nowhere")]) == 1
    assert "first run notebook 05" in capsys.readouterr().err
