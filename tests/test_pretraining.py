import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from tiny_model import tokenizer

from smlib import pretraining
from smlib.cli import main
from smlib.judging.answers import grade
from smlib.pretraining import authors, corpus, document, write
from smlib.problems import datasets, prompts
from smlib.problems.datasets import PUBLISHED, TASKS, generate, load
from smlib.problems.steps import is_sound
from smlib.sampling import models

LINES = {
    "coin_flip": r"\S+ (flips|does not flip): (heads|tails)\.",
    "last_letters": r'"\S+" ends in "\S"\.',
    "shuffled_objects": r"(Start|\w+ and \w+): Alice [A-C], Bob [A-C], Claire [A-C]\.|\w+ ends with [A-C]\.",
    "chain_arithmetic": r"\w+: -?\d+ [+-] -?\d+ = -?\d+\.",  # an author who errs may get below zero
}
EVERYONE = [(task, author) for task in TASKS for author in authors(task)]


def question(prompt):
    """The question of a document's prompt, options and given answer taken off."""
    return re.split(r"\nAnswer Choices:|\nGiven answer:|\nA:", prompt.removeprefix("Q: "))[0]


@pytest.mark.parametrize("task", TASKS)
def test_shares_sum_to_one_and_most_documents_are_by_authors_who_err(task):
    shares = authors(task)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0.01
    assert 0.1 < shares["careful"] < 0.5


@pytest.mark.parametrize(("task", "author"), EVERYONE)
def test_every_author_writes_well_formed_solutions(task, author):
    rng = random.Random(0)
    for problem in generate(task, 60, seed=0):
        lines, answer = write(problem, author, rng)
        assert lines and all(re.fullmatch(LINES[task], line) for line in lines), lines
        said = grade(problem, prompts.answer_sentence(problem, answer))
        assert said.extracted is not None
        assert said.correct == (answer == problem.answer)


@pytest.mark.parametrize(("task", "author"), EVERYONE)
def test_the_careful_are_right_and_the_others_err_some_of_the_time(task, author):
    rng, right = random.Random(0), 0
    for problem in generate(task, 100, seed=0):
        lines, answer = write(problem, author, rng)
        right += answer == problem.answer
        if author == "careful":
            assert is_sound(problem, "\n".join(lines))
        elif author != "sloppy":
            assert write(problem, author, random.Random(1)) == (lines, answer)  # a conviction, not a slip
    assert right == 100 if author == "careful" else right < 95


@pytest.mark.parametrize("task", TASKS)
def test_a_conditioned_document_states_the_given_answer(task):
    rng, problems, givens = random.Random(0), generate(task, 200, seed=0), []
    for problem in problems:
        prompt, completion = document(problem, problems[:12], conditioned=True, rng=rng)
        given = re.search(r"\nGiven answer: \(?(\w+)\)?\nA:$", prompt)[1]
        assert prompt == prompts.conditioned_prompt(problem, given)
        rationale, sentence = prompts.split_answer(completion)
        assert sentence == prompts.answer_sentence(problem, given)
        assert all(re.fullmatch(LINES[task], line) for line in rationale.strip().split("\n"))
        givens.append(given == problem.answer)
    assert 0.35 < sum(givens) / len(givens) < 0.65  # gold and wrong answers are given about equally often


def test_a_conditioned_document_without_a_wrong_answer_to_give_gives_gold():
    problem = generate("last_letters", 1, seed=0)[0]
    for seed in range(8):
        prompt, _ = document(problem, [problem], conditioned=True, rng=random.Random(seed))
        assert prompt == prompts.conditioned_prompt(problem, problem.answer)


@pytest.mark.parametrize("task", TASKS)
def test_an_open_document_gives_no_answer_away(task):
    for problem in generate(task, 20, seed=0):
        prompt, completion = document(problem, [], conditioned=False, rng=random.Random(0))
        assert prompt == prompts.open_prompt(problem)
        assert completion.startswith(" ") and prompts.cut(completion) == completion
        assert completion.endswith(".") and prompts.split_answer(completion)[1]


def test_the_corpus_is_decided_by_its_seed_and_mixes_the_tasks_by_their_shares():
    first = list(corpus(403, seed=0))
    assert len(first) == 403
    assert list(corpus(403, seed=0)) == first
    assert list(corpus(403, seed=1)) != first
    told = {"coin_flip": "Q: A coin is", "last_letters": "Take the last letters", "shuffled_objects": "Alice, Bob, and"}
    told |= {"chain_arithmetic": r"Q: A \w+ holds \d+"}
    turn = ["coin_flip"] * 4 + ["last_letters"] * 5 + ["shuffled_objects"] * 5 + ["chain_arithmetic"] * 6
    for index, (prompt, _) in enumerate(first):
        assert [task for task in TASKS if re.search(told[task], prompt)] == [turn[index % 20]]
    assert 0.15 < sum("\nGiven answer:" in prompt for prompt, _ in first) / 403 < 0.35


def test_the_corpus_holds_no_question_of_a_test_split_and_no_published_one():
    published = set((Path(datasets.__file__).parent / "published_digests.txt").read_text().split())
    for prompt, _ in corpus(1200, seed=0):
        digest = hashlib.sha256(" ".join(question(prompt).split()).encode()).hexdigest()
        assert int(digest[:2], 16) >= 32 and digest[:12] not in published
    for task in TASKS:  # and the check above would see one
        held_out = generate(task, 1, seed=0, split="test")[0]
        assert question(prompts.conditioned_prompt(held_out, "B")) == held_out.question


def test_the_corpus_holds_no_published_question_word_for_word():
    if not os.environ.get("SML_DATA_DIR"):
        pytest.skip("needs the published questions: set SML_DATA_DIR to a local copy of the datasets")
    known = {problem.question for dataset in set(TASKS) & set(PUBLISHED) for problem in load(dataset, "all")}
    assert not known & {question(prompt) for prompt, _ in corpus(1200, seed=0)}


def test_a_completions_tokens_weigh_one_a_questions_a_tenth_and_pads_nothing():
    batches = pretraining._batches(tokenizer(), 40, tokens_per_batch=1024, seed=0, task="all")
    documents = {prompt + completion for prompt, completion in corpus(40, seed=0)}
    read = set()
    for ids, weights in batches:
        assert ids.shape == weights.shape and ids.numel() <= 1024
        for row, weight in zip(ids, weights, strict=True):
            prompt, completion, rest = (row[(weight - w).abs() < 1e-6] for w in (0.1, 1.0, 0.0))
            assert torch.equal(torch.cat([prompt, completion, rest]), row)  # in this order
            assert set(rest.tolist()) <= {tokenizer().pad_token_id}
            assert prompt[0] == tokenizer().bos_token_id and completion[-1] == tokenizer().eos_token_id
            assert tokenizer().decode(prompt, skip_special_tokens=True).endswith("\nA:")
            read.add(tokenizer().decode(row, skip_special_tokens=True))
    assert read == documents


@pytest.fixture
def short_corpus(monkeypatch):
    """`main` learns its tokenizer from 8,000 documents, here from 200, and asks 200 questions per task, here 4."""
    monkeypatch.setattr(pretraining, "ASKED", 4)
    whole = pretraining.corpus
    monkeypatch.setattr(pretraining, "corpus", lambda documents, *rest: whole(min(documents, 200), *rest))


def test_main_writes_a_model_that_loads_with_its_card_and_twice_the_same(short_corpus, tmp_path, capsys):
    cards = []
    for name in ("a", "b"):
        options = f"--out {tmp_path / name} --documents 200 --hidden 32 --layers 1 --tokens-per-batch 2048"
        assert main(["pretrain", *options.split()]) == 0
        cards.append(json.loads((tmp_path / name / "training.json").read_text()))
    for card in cards:
        (phase,) = card["phases"]
        phase.pop("seconds")
    assert cards[0] == cards[1]
    assert cards[0]["sha256"] == hashlib.sha256((tmp_path / "a/model.safetensors").read_bytes()).hexdigest()
    assert phase["documents"] == 200 and cards[0]["authors"]["coin_flip"] == authors("coin_flip")
    model, spelled = models.load_policy(tmp_path / "a"), models.load_tokenizer(str(tmp_path / "a"))
    assert models.model_size(model) == cards[0]["parameters"]
    assert model.config.pad_token_id == spelled.pad_token_id != spelled.eos_token_id
    assert phase["final_loss"] < 0.98 * torch.log(torch.tensor(float(len(spelled))))  # it learned a little


@pytest.mark.parametrize("architecture", ["gpt2", "mistral", "qwen3"])
def test_other_architectures_learn_are_sampled_and_load(architecture, short_corpus, tmp_path, capsys):
    options = f"--out {tmp_path / 'base'} --documents 60 --hidden 96 --layers 1 --architecture {architecture}"
    assert main(["pretrain", *options.split()]) == 0
    model = models.load_policy(tmp_path / "base")
    assert model.config.model_type == architecture
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_base_of_one_task_reads_that_task_alone(short_corpus, tmp_path, capsys, monkeypatch):
    asked, batched = [], pretraining._batches
    monkeypatch.setattr(pretraining, "_batches", lambda *given: asked.append(given[-1]) or batched(*given))
    options = f"--task translation --out {tmp_path / 'base'} --documents 200 --hidden 32 --layers 1"
    assert main(["pretrain", *options.split()]) == 0
    card = json.loads((tmp_path / "base" / "training.json").read_text())
    assert card["authors"] == {"translation": authors("translation")} and set(card["accuracy"]) == {"translation"}
    assert [phase["task"] for phase in card["phases"]] == ["translation"]
    spelled, read = models.load_tokenizer(str(tmp_path / "base")), list(corpus(200, 0, "translation"))
    assert asked == ["translation"]
    batches = batched(spelled, 200, 1024, 0, "translation")
    seen = {spelled.decode(row, skip_special_tokens=True) for ids, _ in batches for row in ids}
    assert seen == {prompt + completion for prompt, completion in read}
    assert all(re.fullmatch(r"Q: Translate into Velu: The .+\.\nA:", prompt) for prompt, _ in read)
    assert all(re.fullmatch(r" The answer is [a-z]+\.", completion) for _, completion in read)


def test_the_card_of_a_base_that_went_on_has_both_tasks(short_corpus, tmp_path, capsys):
    first, then = tmp_path / "first", tmp_path / "then"
    options = "--documents 60 --hidden 32 --layers 1"
    assert main(f"pretrain --out {first} --task translation {options}".split()) == 0
    assert main(f"pretrain --out {then} --task coin_flip --start-from {first} {options}".split()) == 0
    card = json.loads((then / "training.json").read_text())
    assert [phase["task"] for phase in card["phases"]] == ["translation", "coin_flip"]
    assert set(card["authors"]) == {"translation", "coin_flip"} and set(card["accuracy"]) == {"coin_flip"}


class Killed(Exception):
    pass


def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(short_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "EVERY", 2)
    options = "--documents 200 --hidden 32 --layers 1 --tokens-per-batch 1024"
    assert main(f"pretrain --out {tmp_path / 'whole'} {options}".split()) == 0
    saved, save = [], pretraining._save_checkpoint

    def killed_after_the_second(*given):
        save(*given)
        saved.append(len(given[-1]))
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(pretraining, "_save_checkpoint", killed_after_the_second)
    with pytest.raises(Killed):
        main(f"pretrain --out {tmp_path / 'other'} {options}".split())
    left = tmp_path / "other.training"
    assert [path.name for path in left.iterdir()] == ["checkpoint-000004"] and not (tmp_path / "other").exists()
    capsys.readouterr()
    assert main(f"pretrain --out {tmp_path / 'other'} {options} --seed 1".split()) == 1
    assert "was made with seed = 0, and now seed = 1 is asked for" in capsys.readouterr().err
    assert main(f"pretrain --out {tmp_path / 'other'} {options}".split()) == 0
    assert "going on after 4 batches" in capsys.readouterr().out and saved[2] == 6
    whole, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "other"))
    assert whole == other and not left.exists()
    cards = [json.loads((tmp_path / name / "training.json").read_text())["phases"][0] for name in ("whole", "other")]
    assert cards[0]["final_loss"] == cards[1]["final_loss"]


def test_one_document_is_enough(short_corpus, tmp_path, capsys):
    assert main(f"pretrain --out {tmp_path / 'one'} --documents 1 --hidden 32 --layers 1".split()) == 0
    assert (tmp_path / "one" / "model.safetensors").is_file()


REFUSED = {
    "--documents 0": "--documents = 0 is not allowed: give a whole number from 1 to 10,000,000",
    "--hidden 40": "--hidden = 40 is not allowed: give a multiple of 32, the size of a head",
    "--hidden 0": "--hidden = 0 is not allowed: give a whole number from 32 to 65,536",
    "--layers 0": "--layers = 0 is not allowed: give a whole number from 1 to 1,000",
    "--tokens-per-batch -1": "--tokens-per-batch = -1 is not allowed: give a whole number from 1 to 1,000,000",
    "--seed -1": "--seed = -1 is not allowed: give a whole number from 0 to 4,294,967,295",
    "--start-from {}": "--start-from {} has no training.json with phases: give one that `smlib pretrain` made",
    "--start-from nobody": "--start-from nobody has no training.json with phases: give one that `smlib pretrain` made",
}


MISREAD = {
    "--seed one": "argument --seed: invalid int value: 'one'",
    "--depth 3": "unrecognized arguments: --depth 3",
}


@pytest.fixture
def untrained(monkeypatch):
    """Fails where a training, or the reading of its corpus, begins."""
    for name in ("train", "corpus"):
        monkeypatch.setattr(pretraining, name, lambda *_: pytest.fail("it began to train"))


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_made_is_refused_in_one_sentence_before_any_work(option, untrained, tmp_path, capsys):
    given = option.format(tmp_path).split()
    assert main(["pretrain", "--out", str(tmp_path / "base"), *given]) == 1
    assert capsys.readouterr() == ("", f"error: {REFUSED[option].format(tmp_path)}\n")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("option", MISREAD)
def test_what_is_no_option_is_refused_with_the_usage(option, untrained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain", "--out", str(tmp_path / "base"), *option.split()])
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.err.endswith(f"error: {MISREAD[option]}\n") and not shown.out
    assert not (tmp_path / "base").exists()


def test_the_folder_is_named_and_the_package_s_own_base_is_never_the_default(untrained, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["pretrain"])
    assert stopped.value.code == 2 and "the following arguments are required: --out" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(models.TINY_BASE)]) == 1
    assert f"--out {models.TINY_BASE} already exists: give a folder that is new or empty" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_the_training(untrained, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in ("file", "file/base"):
        assert main(["pretrain", "--out", str(tmp_path / out)]) == 1
        error = capsys.readouterr().err
        assert f"error: --out = {str(tmp_path / out)!r} is not allowed, since" in error and error.count("\n") == 1


SMALLEST = ["--documents", "20", "--hidden", "32", "--layers", "1"]


def test_a_full_disk_leaves_no_half_of_a_base(short_corpus, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretraining.PreTrainedTokenizerFast, "save_pretrained", full)
    monkeypatch.setattr(pretraining, "accuracy_by_task", lambda *_: {})
    out = tmp_path / "base"
    assert main(["pretrain", "--out", str(out), *SMALLEST]) == 1
    assert f"error: No space left on the disk to write {out}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_base_goes_on_from_another_and_its_card_says_so(short_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretraining, "accuracy_by_task", lambda *_: {})
    main(["pretrain", "--out", str(tmp_path / "first"), *SMALLEST])
    (tmp_path / "second").mkdir()  # empty will do
    again = ["--start-from", str(tmp_path / "first"), "--seed", "1", *SMALLEST]
    main(["pretrain", "--out", str(tmp_path / "second"), *again])
    card = json.loads((tmp_path / "second" / "training.json").read_text())
    assert [phase["seed"] for phase in card["phases"]] == [0, 1]
