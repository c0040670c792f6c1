"""Bulk runs on disk: nothing lost by a kill, nothing twice, widened later, refused where it does not fit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tiny_model import policy, tokenizer

from smlib import cli as command
from smlib.files.artifacts import StageError, StageMismatch
from smlib.files.atomic import BusyError, DiskFullError
from smlib.sampling import engines
from smlib.sampling.engines import NativeEngine
from smlib.sampling.params import Sample, SamplingParams
from smlib.sampling.sampler import sample
from smlib.sampling.shards import Bulk

QUESTIONS = [(f"q{i}", f"Q: {'very ' * (i % 4)}long {i}?\nA:") for i in range(10)]
PARAMS = SamplingParams(temperature=1.0, max_new_tokens=6, seed=0)


class Counting:
    """A stand-in for an engine: its samples say what was asked for."""

    name, tokenizer = "counting", None

    def __init__(self):
        self.asked = []

    def sample(self, prompts, n, params, *, keys, first, progress=None):
        numbers = range(first, first + n)
        self.asked += [(key, number) for key in keys for number in numbers]
        return [
            [Sample(f"{prompt}|{params.seed}|{number}", (number,), (-0.25,), "stop") for number in numbers]
            for prompt in prompts
        ]


def bulk(folder, engine=None, shard=4, **source):
    return Bulk(folder, engine or Counting(), {"base": "x"} | source, shard)


def numbers(folder):
    return {key: [one.token_ids[0] for one in samples] for key, samples in bulk(folder).read()}


def test_what_is_written_is_what_the_engine_draws(tmp_path):
    model = policy()
    counts = Bulk(tmp_path, NativeEngine(model, tokenizer()), {}, shard=4).draw(QUESTIONS, 3, PARAMS)
    keys, prompts = zip(*QUESTIONS, strict=True)
    expected = sample(model, tokenizer(), list(prompts), 3, PARAMS, keys=list(keys))
    found = dict(Bulk(tmp_path, NativeEngine(model, tokenizer()), {}, shard=4).read())
    assert counts == {"drawn": 30, "found": 0, "dropped": 0} and list(found) == list(keys)
    for group, wanted in zip(found.values(), expected, strict=True):
        for one, other in zip(group, wanted, strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_second_call_draws_nothing_and_a_wider_one_the_new_samples_only(tmp_path):
    first, second, third = Counting(), Counting(), Counting()
    assert bulk(tmp_path, first).draw(QUESTIONS, 2, PARAMS)["drawn"] == 20
    assert bulk(tmp_path, second).draw(QUESTIONS, 2, PARAMS) == {"drawn": 0, "found": 20, "dropped": 0}
    assert second.asked == []
    assert bulk(tmp_path, third).draw(QUESTIONS, 5, PARAMS) == {"drawn": 30, "found": 20, "dropped": 0}
    assert sorted(third.asked) == sorted((key, number) for key, _ in QUESTIONS for number in (2, 3, 4))
    assert numbers(tmp_path) == {key: [0, 1, 2, 3, 4] for key, _ in QUESTIONS}
    assert {len(samples) for _, samples in bulk(tmp_path).read(2)} == {2}
    assert bulk(tmp_path, Counting()).draw(QUESTIONS, 3, PARAMS)["drawn"] == 0  # fewer than there are


def test_the_first_samples_are_read_whatever_came_of_the_later_ones(tmp_path):
    for n in (2, 4):
        bulk(tmp_path).draw(QUESTIONS, n, PARAMS)
    (tmp_path / "shard-000000.0-2.jsonl").unlink()
    for n in (None, 1):
        with pytest.raises(StageError, match="the file before it is missing"):
            list(bulk(tmp_path).read(n))
    bulk(tmp_path).draw(QUESTIONS, 1, PARAMS)
    assert {key: [one.token_ids[0] for one in samples] for key, samples in bulk(tmp_path).read(1)} == {
        key: [0] for key, _ in QUESTIONS
    }


def test_a_shard_that_is_missing_between_others_is_missed(tmp_path):
    bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    (tmp_path / "shard-000001.0-2.jsonl").unlink()
    with pytest.raises(StageError, match="has no file of shard 1, but of later ones: draw again"):
        list(bulk(tmp_path).read())
    bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    assert len(dict(bulk(tmp_path).read())) == len(QUESTIONS)


def test_questions_may_be_a_stream(tmp_path):
    bulk(tmp_path).draw(iter(QUESTIONS), 2, PARAMS)
    assert list(numbers(tmp_path)) == [key for key, _ in QUESTIONS]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1], lambda data: b"",
                                    lambda data: data.replace(b"long", b"lang", 1)])  # fmt: skip
@pytest.mark.parametrize("victim", ["shard-000001.0-2.jsonl", "shard-000001.2-4.jsonl"])
def test_a_damaged_file_is_named_dropped_and_drawn_again(tmp_path, capsys, damage, victim):
    for n in (2, 4):
        bulk(tmp_path).draw(QUESTIONS, n, PARAMS)
    whole = (tmp_path / victim).read_bytes()
    (tmp_path / victim).write_bytes(damage(whole))
    with pytest.raises(StageError, match="damaged"):
        list(bulk(tmp_path).read())
    engine = Counting()
    assert bulk(tmp_path, engine).draw(QUESTIONS, 4, PARAMS) == {"drawn": 8, "found": 32, "dropped": 1}
    assert {key for key, _ in engine.asked} == {"q4", "q5", "q6", "q7"}
    assert (tmp_path / victim).read_bytes() == whole
    assert f"{victim} is damaged: its samples are drawn again." in capsys.readouterr().out


def test_what_does_not_fit_is_refused_and_named(tmp_path):
    bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    for call, key in (
        (lambda: bulk(tmp_path).draw(QUESTIONS, 2, replace(PARAMS, seed=1)), "drawing.seed = 0"),
        (lambda: bulk(tmp_path, base="y").draw(QUESTIONS, 2, PARAMS), "base = 'x'"),
        (lambda: bulk(tmp_path, shard=5).draw(QUESTIONS, 2, PARAMS), "shard = 4"),
        (lambda: bulk(tmp_path).draw(QUESTIONS[::-1], 2, PARAMS), r"from question 0 \('q9'\) on"),
        (lambda: bulk(tmp_path).draw([*QUESTIONS[:9], ("q9", "other")], 2, PARAMS), "from question 8"),
    ):
        with pytest.raises(StageMismatch, match=key):
            call()
    assert numbers(tmp_path) == {key: [0, 1] for key, _ in QUESTIONS}  # nothing was touched
    with pytest.raises(StageError, match=r"2 of 3 samples of 'q0': draw 3 first"):
        list(bulk(tmp_path).read(3))
    with pytest.raises(ValueError, match="key of its own"):
        bulk(tmp_path / "new").draw([*QUESTIONS, QUESTIONS[0]], 2, PARAMS)
    with pytest.raises(ValueError, match="shard = 0 is not allowed"):
        bulk(tmp_path, shard=0)


def test_samples_of_a_lost_manifest_are_not_taken_for_those_of_other_settings(tmp_path):
    bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    manifest = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StageError, match=r"has no manifest\.json"):
        list(bulk(tmp_path).read())
    with pytest.raises(StageMismatch, match=r"shard-000000\.0-2\.jsonl was drawn with other settings"):
        bulk(tmp_path).draw(QUESTIONS, 2, replace(PARAMS, seed=1))
    assert bulk(tmp_path).draw(QUESTIONS, 3, PARAMS) == {"drawn": 10, "found": 20, "dropped": 0}
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(StageError, match=r"manifest\.json is damaged: Input should be an object"):
        bulk(tmp_path).draw(QUESTIONS, 3, PARAMS)


def test_another_file_beside_the_shards_is_left_alone(tmp_path):
    bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    for name in ("shard-000000.old.jsonl", "shard-old.0-2.jsonl", "notes.jsonl"):
        (tmp_path / name).write_text("mine")
    assert bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)["found"] == 20
    assert list(numbers(tmp_path)) == [key for key, _ in QUESTIONS]


def test_two_writers_do_not_meet(tmp_path):
    class Meeting(Counting):
        def sample(self, *args, **kwargs):
            with pytest.raises(BusyError, match=rf"another process \({os.getpid()} on .* is drawing into {tmp_path}"):
                bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
            return super().sample(*args, **kwargs)

    assert bulk(tmp_path, Meeting()).draw(QUESTIONS, 2, PARAMS)["drawn"] == 20


def test_a_full_disk_leaves_whole_shards(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:  # who draws, the manifest, a shard, and then the disk is full
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="No space left"):
        bulk(tmp_path).draw(QUESTIONS, 2, PARAMS)
    monkeypatch.undo()
    assert list(numbers(tmp_path)) == ["q0", "q1", "q2", "q3"]
    assert bulk(tmp_path).draw(QUESTIONS, 2, PARAMS) == {"drawn": 12, "found": 8, "dropped": 0}


ARGUMENTS = ["sample", "coin_flip", "--questions", "40", "--samples", "4", "--shard", "4", "--max-new-tokens", "40"]


def test_killed_by_the_system_it_goes_on_with_at_most_one_shard_lost(tmp_path):
    """kill -9 in the middle; then the same command. The end is byte by byte that of an undisturbed run."""
    run = [sys.executable, "-m", "smlib", *ARGUMENTS, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(run, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while len(before := list((tmp_path / "killed").glob("shard-*.jsonl"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(before) < 10
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*.jsonl")}
    for folder in ("killed", "calm"):
        assert command.main([*ARGUMENTS, "--out", str(tmp_path / folder)]) == 0
    for name, written in done.items():
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == written  # not drawn again
    shards = sorted(path.name for path in (tmp_path / "calm").glob("shard-*"))
    assert shards == sorted(path.name for path in (tmp_path / "killed").glob("shard-*")) and len(shards) == 10
    for name in shards:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_the_command_widens_and_says_what_it_did(tmp_path, capsys):
    arguments = [*ARGUMENTS[:3], "6", "--shard", "4", "--max-new-tokens", "4", "--out", str(tmp_path)]
    assert command.main([*arguments, "--samples", "1"]) == 0
    assert command.main([*arguments, "--samples", "3"]) == 0
    assert "6 questions, 12 samples drawn, 6 already there" in capsys.readouterr().out
    assert command.main([*arguments, "--samples", "3", "--seed", "1"]) == 1
    assert "drawing.seed = 0" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    drawing = {name: value for name, value in manifest.items() if name.startswith("drawing.")}
    assert drawing == {
        "drawing.temperature": 1.0, "drawing.max_new_tokens": 4, "drawing.seed": 0, "drawing.top_p": 1.0,
        "drawing.top_k": 0, "drawing.stop": [],
    }  # fmt: skip
    assert manifest["engine"] == "native" and manifest["base"] == "tiny" and len(manifest["base_sha256"]) == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--workers", "0"], "--workers = 0 is not allowed: give a whole number from 1"),
        (["--samples", "0"], "--samples = 0 is not allowed: give a whole number from 1"),
        (["--temperature", "-1"], "--temperature = -1.0 is not allowed: give 0 (greedy), or a number from 0.01 to 100"),
        (["--max-new-tokens", "600"], "no room for a prompt in the model's 512 positions"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, capsys, changes, words):
    assert command.main(["sample", "coin_flip", "--questions", "2", "--out", str(tmp_path), *changes]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_engine_that_nobody_knows_is_refused_with_those_that_are_known(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["sample", "coin_flip", "--questions", "2", "--out", str(tmp_path), "--engine", "abacus"])
    assert re.search("invalid choice: 'abacus' .choose from '?native'?, '?vllm'?, '?auto'?", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("library", "changes"), [("vllm", ["--engine", "vllm"]), ("ray", ["--workers", "2"])])
def test_an_engine_that_is_not_there_says_how_to_install_it(tmp_path, capsys, monkeypatch, library, changes):
    monkeypatch.setattr("smlib.sampling.engines.find_spec", lambda name: None)
    assert command.main(["sample", "coin_flip", "--questions", "2", "--out", str(tmp_path), *changes]) == 1
    assert f"needs {library}, which is not installed: {engines.INSTALL[library]}" in capsys.readouterr().err


def test_the_bar_counts_samples_as_they_end_and_not_only_whole_shards(tmp_path, monkeypatch):
    """A shard of a real model takes minutes."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    seen = []

    class Slow(Counting):
        def sample(self, prompts, n, params, *, keys, first, progress=None):
            progress.update()
            seen.append(progress.n)
            return super().sample(prompts, n, params, keys=keys, first=first)

    Bulk(tmp_path, Slow(), {}, shard=2).draw(QUESTIONS[:4], 3, PARAMS, progress="counted")
    assert seen == [1, 7]
