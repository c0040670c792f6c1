import hashlib
import io
import json
import os
import re
import urllib.error
from http.client import IncompleteRead
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlib import problems
from smlib.problems import KINDS, PUBLISHED, TASKS, DatasetError, Problem, generate, load, with_options
from smlib.steps import worked_solution

PLAYERS = "(?:Alice|Bob|Claire)"
SIZES = {"coin_flip": 500, "last_letters": 500, "shuffled_objects": 750}


@pytest.fixture
def published():
    """Dataset -> its published questions, or a skip where there is no local copy."""
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")
    return {dataset: load(dataset, "test") for dataset in PUBLISHED}


# ---------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_the_problems_and_a_smaller_n_gives_the_beginning(task):
    twenty = generate(task, 20, seed=3)
    assert generate(task, 20, seed=3) == twenty
    assert generate(task, 7, seed=3) == twenty[:7]
    assert generate(task, 20, seed=4) != twenty
    assert generate(task, 0, seed=3) == []


@pytest.mark.parametrize("task", TASKS)
@given(train_seed=st.integers(0, 2**40), test_seed=st.integers(0, 2**40))
@settings(max_examples=15)
def test_train_and_test_are_disjoint_for_any_seeds(task, train_seed, test_seed):
    train, test = generate(task, 25, train_seed), generate(task, 8, test_seed, split="test")
    assert not {p.question for p in train} & {p.question for p in test}
    assert not {p.id for p in train} & {p.id for p in test}


@pytest.mark.parametrize("task", TASKS)
def test_the_split_is_a_property_of_the_question_and_not_of_the_seed(task):
    for split, holds in (("train", lambda byte: byte >= 32), ("test", lambda byte: byte < 32)):
        for problem in generate(task, 40, seed=1, split=split):
            assert holds(hashlib.sha256(" ".join(problem.question.split()).encode()).digest()[0])
            assert problem.id.startswith(f"{task}/{split}/")


@pytest.mark.parametrize("task", TASKS)
def test_questions_and_ids_are_distinct(task):
    made = generate(task, 500, seed=0)
    assert len({problem.question for problem in made}) == len({problem.id for problem in made}) == 500
    assert {(problem.dataset, problem.kind) for problem in made} == {(task, KINDS[task])}


def test_a_drawn_question_that_is_published_is_thrown_away(monkeypatch):
    drawn = ["What is published?", "What is new?"]
    fixed = next(split for split in ("train", "test") if _split(drawn[1]) == split)
    assert _split(drawn[0]) == fixed  # else the split alone would throw it away
    monkeypatch.setitem(problems._GENERATORS, "coin_flip", lambda rng: (rng.choice(drawn), "yes", ()))
    monkeypatch.setattr(problems, "_published_digests", lambda: {problems._digest(drawn[0])[:12]})
    for seed in range(8):
        assert [p.question for p in generate("coin_flip", 1, seed, split=fixed)] == ["What is new?"]


def _split(question):
    return "test" if hashlib.sha256(question.encode()).digest()[0] < 32 else "train"


def test_the_list_of_published_questions_is_complete(published):
    questions = [problem.question for group in published.values() for problem in group]
    digests = {hashlib.sha256(" ".join(q.split()).encode()).hexdigest()[:12] for q in questions}
    assert digests == problems._published_digests()
    assert len(digests) == 1750


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_generated_question_is_a_published_one(published, split):
    for task in PUBLISHED:
        known = {problem.question for problem in published[task]}
        assert not known & {problem.question for problem in generate(task, 1000, seed=7, split=split)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gsm8k", 1, 0), "no generator for dataset 'gsm8k'; there are: coin_flip, last_letters"),
        (("coin_flip", 1, 0, "dev"), "unknown split 'dev'; allowed: 'train', 'test'"),
    ],
)
def test_generate_names_what_there_is(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(*arguments)


# -------------------------------------------------------------------- the gold answers, from another solver


def solve(problem):
    """The answer, from the words of the question alone, by other means than the generators and the writers."""
    text = problem.question
    if problem.dataset == "coin_flip":
        return "no" if text.count(" flips the coin.") % 2 else "yes"
    if problem.dataset == "last_letters":
        return "".join(re.findall(r"(\S)(?= )", text.split('"')[1] + " "))
    if problem.dataset == "shuffled_objects":
        story = text.split("\n\n")[1]
        *swaps, asked = re.findall(rf"{PLAYERS} and {PLAYERS}|{PLAYERS}", story)
        for pair in reversed(swaps):  # follow the thing back in time to whoever had it at the start
            first, second = pair.split(" and ")
            asked = {first: second, second: first}.get(asked, asked)
        return "ABC"[("Alice", "Bob", "Claire").index(asked)]
    total, *numbers = map(int, re.findall(r"\d+", text))
    for sentence in text.split(". ")[1:-1]:
        total += total if "doubles" in sentence else numbers.pop(0) * (1 if "adds" in sentence else -1)
        assert 1 <= total <= 99
    assert not numbers
    return str(total)


def test_the_other_solver_on_examples_solved_by_hand():
    def ask(dataset, question):
        return solve(Problem("x", dataset, question, "", KINDS[dataset], ("a", "b", "c")))

    assert ask("coin_flip", "Whitney flips the coin. Tj does not flip the coin. Still heads up?") == "no"
    assert ask("last_letters", 'Take the last letters of each words in "Whitney Tj" and') == "yj"
    swaps = "First, Alice and Bob swap. Then, Bob and Claire swap. Finally, Alice and Bob swap. At the end, "
    assert ask("shuffled_objects", f"\n\n{swaps}Alice has the") == "C"
    assert ask("chain_arithmetic", "A box holds 5 nuts. Ann adds 7. Bo doubles the nuts. How many?") == "24"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_gold_answers_are_right(task, split):
    for problem in generate(task, 300, seed=11, split=split):
        assert problem.answer == solve(problem), problem


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_much_more_frequent_than_chance(task):
    answers = [problem.answer for problem in generate(task, 600, seed=5)]
    most = max(answers.count(answer) for answer in set(answers)) / len(answers)
    assert most < {"coin_flip": 0.58, "shuffled_objects": 0.41}.get(task, 0.1)


def test_chain_arithmetic_has_two_to_six_steps():
    steps = [len(worked_solution(problem)[0]) for problem in generate("chain_arithmetic", 200, seed=0)]
    assert set(steps) == {2, 3, 4, 5, 6}


# ------------------------------------------------------------------------- the wording, against the benchmark


def template(problem):
    """The question with its names and things taken out: what is left is the benchmark's wording."""
    text = problem.question
    if problem.dataset == "coin_flip":
        return re.sub(r"(?:[^.]+ (?:flips|does not flip) the coin\. )+", "<acts> ", text)
    if problem.dataset == "last_letters":
        return re.sub(r'"[^"]+"', '"<words>"', text)
    start, story = text.split("\n\n")
    for choice in problem.choices:
        start = start.replace(choice, "<thing>")
    return start + "\n\n" + re.sub(rf"\b{PLAYERS}\b", "<who>", story)


@pytest.mark.parametrize("task", PUBLISHED)
def test_generated_questions_use_the_wording_of_the_benchmark(published, task):
    generated = generate(task, 200, seed=2)
    assert {template(problem) for problem in generated} == {template(problem) for problem in published[task]}


def test_generated_things_are_those_of_the_benchmark_in_the_same_story(published):
    def things(group):
        return {(template(problem), choice) for problem in group for choice in problem.choices}

    assert things(generate("shuffled_objects", 600, seed=2)) == things(published["shuffled_objects"])


@pytest.mark.parametrize("task", ["coin_flip", "last_letters"])
def test_the_length_of_the_benchmark_is_among_the_generated_ones(published, task):
    def lengths(group):
        return {len(worked_solution(problem)[0]) for problem in group}

    # Double names make some of the published last_letters five words long.
    assert lengths(published[task]) == ({4, 5} if task == "last_letters" else {4})
    assert 4 in lengths(generate(task, 100, seed=2)) and len(lengths(generate(task, 100, seed=2))) == 3


# ------------------------------------------------------------------------------------------ published sets


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_rows(published, dataset):
    rows = published[dataset]
    assert len(rows) == SIZES[dataset] == len({row.question for row in rows})
    assert [row.id for row in rows] == [f"{dataset}/published/{i}" for i in range(len(rows))]
    assert load(dataset, "test", limit=3) == rows[:3]


def test_published_first_rows_are_read_right(published):
    coin, letters, objects = (published[dataset][0] for dataset in PUBLISHED)
    assert coin.question.startswith("A coin is heads up. Whitney flips the coin. Erika does not flip")
    assert (coin.answer, coin.kind, coin.choices) == ("yes", "yes_no", ())
    assert letters.question.startswith('Take the last letters of each words in "Whitney Erika Tj Benito"')
    assert (letters.answer, letters.kind) == ("yajo", "letters")
    assert objects.question.endswith("At the end of the game, Alice has the")
    assert (objects.answer, objects.choices) == ("C", ("orange ball", "white ball", "blue ball"))


def test_published_choices_hold_gold_equally_often_at_every_place(published):
    answers = [problem.answer for problem in published["shuffled_objects"]]
    assert [answers.count(letter) for letter in "ABC"] == [250, 250, 250]


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_gold_agrees_with_both_solvers_but_for_double_names(published, dataset):
    """15 questions of last_letters hold a double name ("Jose Antonio"), of which gold takes one letter."""
    odd = [p for p in published[dataset] if worked_solution(p)[1] != p.answer]
    assert all(solve(problem) == worked_solution(problem)[1] for problem in published[dataset])
    assert len(odd) == (15 if dataset == "last_letters" else 0)
    assert all(len(p.answer) == 4 and len(worked_solution(p)[0]) == 5 for p in odd)


# --------------------------------------------------------------------------- reading, downloading, refusing

CONTENT = json.dumps({"examples": [{"question": f"Question {i}? ", "answer": "yes"} for i in range(3)]}).encode()


@pytest.fixture
def source(monkeypatch, tmp_path):
    """A coin_flip file of three questions in place of the published one; nothing else on disk, no network."""

    def no_network(url, timeout):
        raise urllib.error.URLError("no network in tests")

    small = problems._Source("coin_flip/coin_flip.json", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(problems._SOURCES, "coin_flip", small)
    monkeypatch.delenv("SML_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return small


def put(folder, content):
    path = folder / "coin_flip" / "coin_flip.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def test_a_folder_is_read_from_the_argument_and_from_the_environment(source, tmp_path, monkeypatch):
    put(tmp_path / "here", CONTENT)
    rows = load("coin_flip", "test", data_dir=tmp_path / "here")
    assert [row.question for row in rows] == ["Question 0?", "Question 1?", "Question 2?"]
    assert load("coin_flip", "test", data_dir=tmp_path / "here", limit=1) == rows[:1]
    monkeypatch.setenv("SML_DATA_DIR", str(tmp_path / "here"))
    assert load("coin_flip", "test") == rows


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT.replace(b"yes", b"no ", 1), b""])
def test_a_truncated_or_altered_file_is_refused_with_both_hashes(source, tmp_path, content):
    path = put(tmp_path, content)
    with pytest.raises(DatasetError, match=re.escape(str(path))) as refused:
        load("coin_flip", "test", data_dir=tmp_path)
    assert source.sha256 in str(refused.value)
    assert hashlib.sha256(content).hexdigest() in str(refused.value)


def test_a_missing_file_is_named_with_the_way_out(source, tmp_path):
    with pytest.raises(DatasetError, match=r"coin_flip\.json is not there; SML_DATA_DIR must hold"):
        load("coin_flip", "test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        (
            "gsm",
            "test",
            "unknown dataset 'gsm'; published sets here: coin_flip, last_letters, shuffled_objects",
        ),
        ("coin_flip", "train", "coin_flip has no split 'train'; it has: 'test'"),
    ],
)
def test_load_names_what_there_is(dataset, split, message):
    with pytest.raises(ValueError, match=message):
        load(dataset, split)


def test_without_network_and_data_the_error_says_what_to_set(source):
    with pytest.raises(DatasetError, match=r"coin_flip: download of https://.* failed .*Set SML_DATA_DIR"):
        load("coin_flip", "test")


class Reply(io.BytesIO):
    """What urlopen returns."""


def serve(monkeypatch, content):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Reply(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_a_download_that_breaks_off_is_a_dataset_error(source, monkeypatch):
    def broken(self, *args):
        raise IncompleteRead(CONTENT[:5], len(CONTENT) - 5)

    serve(monkeypatch, CONTENT)
    monkeypatch.setattr(Reply, "read", broken)
    with pytest.raises(DatasetError, match="IncompleteRead"):
        load("coin_flip", "test")


def test_a_download_is_kept_and_not_fetched_twice(source, monkeypatch, tmp_path):
    asked = serve(monkeypatch, CONTENT)
    first = load("coin_flip", "test")
    assert load("coin_flip", "test") == first
    assert len(asked) == 1 and asked[0].endswith("/dataset/coin_flip/coin_flip.json")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept == [tmp_path / "cache/smlib/coin_flip/coin_flip.json"]


def test_a_wrong_download_is_refused_and_not_kept(source, monkeypatch, tmp_path):
    serve(monkeypatch, b"<html>sign in</html>")
    with pytest.raises(DatasetError, match=source.sha256):
        load("coin_flip", "test")
    assert not (tmp_path / "cache").exists()


def test_a_kill_while_writing_the_cache_leaves_no_half_file(source, monkeypatch, tmp_path):
    serve(monkeypatch, CONTENT)

    def killed(self, content):
        with open(self, "wb") as file:
            file.write(content[:5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        load("coin_flip", "test")
    assert not (tmp_path / "cache/smlib/coin_flip/coin_flip.json").exists()
    assert len(load("coin_flip", "test")) == 3


# --------------------------------------------------------------------------------------------------- options


def test_options_follow_a_choice_question_only():
    choice = Problem("x/0", "x", "Which one?", "B", "choice", ("red ball", "Moby Dick"))
    assert with_options(choice) == "Which one?\nAnswer Choices: (A) red ball (B) Moby Dick"
    assert with_options(Problem("x/1", "x", "How many?", "3", "number")) == "How many?"
