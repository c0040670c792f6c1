"""Ray workers draw what one process draws, whatever happens to them; `make test-ray` runs this."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import chain

import psutil
import pytest

from smlib.files.artifacts import require
from smlib.learning import ray_scores, reward_model
from smlib.problems.datasets import generate
from smlib.problems.prompts import open_prompt
from smlib.runs import self_motivated
from smlib.runs.settings import preset
from smlib.sampling import encoding, ray_engine, ray_workers
from smlib.sampling.factory import make_engine
from smlib.sampling.params import SamplingParams
from smlib.signals import handling

ray = pytest.importorskip("ray", reason="needs Ray, which has an environment of its own: make test-ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # its workers cannot import a test

PROBLEMS = generate("chain_arithmetic", 12, seed=0) + generate("coin_flip", 12, seed=0)
PROMPTS = [open_prompt(problem) for problem in PROBLEMS]
PARAMS, KEYS = SamplingParams(temperature=0.8, max_new_tokens=96, seed=3), [problem.id for problem in PROBLEMS]


@pytest.fixture(scope="module")
def native():
    return make_engine("native", "tiny")


@pytest.fixture(scope="module")
def expected(native):
    return native.sample(PROMPTS, 4, PARAMS, keys=KEYS)


@pytest.fixture(scope="module")
def engine():
    """Two workers, and small batches: 12 for four samples of every prompt. Nearly all tests share its Ray."""
    with ray_engine.RayEngine("tiny", workers=2, max_batch=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def lone_engine(engine):
    """One worker, which starts faster, in the Ray of the other engine."""
    engine.start()
    with ray_engine.RayEngine("tiny", workers=1, max_batch=8) as lone_engine:
        yield lone_engine


class Bar:
    """In the place of the progress bar: calls `seen(prompts done)` in this process after every finished batch."""

    def __init__(self, seen):
        self.seen, self.done = seen, 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.done += count
        self.seen(self.done)


def workers():
    """The worker processes below this one, by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::_Process" in " ".join(process.cmdline()):
                found[process.pid] = process
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def pid_in(path):
    """The process that wrote its number into that file, as soon as it has."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "no worker was seen at work"
        time.sleep(0.01)
    return int(path.read_text())


def assert_ended(pids):
    """These processes are gone, or go in a moment."""
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.1)


def assert_same(results, expected):
    def tokens(all_samples):
        return [[(s.text, s.token_ids, s.finish_reason) for s in samples] for samples in all_samples]

    assert tokens(results) == tokens(expected)
    for samples, others in zip(results, expected, strict=True):
        for one, other in zip(samples, others, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_two_workers_draw_what_one_process_draws(engine, expected, monkeypatch):
    seen, at_work = [], set()

    def watch(done):
        seen.append(done)
        at_work.update(workers())

    monkeypatch.setattr(ray_workers, "progress_bar", lambda label, total, unit: Bar(watch))
    assert_same(engine.sample(PROMPTS, 4, PARAMS, keys=KEYS), expected)
    assert len(at_work) == 2
    assert seen == [8 * batches for batches in range(1, 13)]  # samples, as the batches finish


class OwnPid:
    """A worker that tells its process."""

    def __call__(self, batch):
        return [os.getpid()] * len(batch)


def test_the_same_workers_serve_every_call_until_they_are_closed(engine):
    engine.start()
    own = ray_workers.Pool(OwnPid, (), 2)
    first, second = (set(chain(*own.map([[0]] * 6, (), None, "batch"))) for _ in range(2))
    assert first == second <= set(workers()) and len(first) == 2
    own.close()
    assert_ended(first)
    assert engine.sample(PROMPTS[:1], 1, PARAMS, keys=KEYS[:1])  # its workers and its Ray go on
    own.close()  # a second time does nothing


def test_ray_leaves_the_signals_as_they_are():
    """A command that is told to end has to say so, whoever works for it."""
    code = (
        "import signal; from smlib.sampling.ray_workers import Pool; signal.signal(signal.SIGTERM, print)\n"
        "pool = Pool(list, (), 1); pool.start(); pool.close(); assert signal.getsignal(signal.SIGTERM) is print"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ray_ends_with_the_last_engine(engine, lone_engine, expected):
    lone_engine.start()
    engine.close()
    assert_same(lone_engine.sample(PROMPTS[:1], 4, PARAMS, keys=KEYS[:1]), expected[:1])
    lone_engine.close()
    assert not ray.is_initialized() and not workers()
    engine.start()
    assert ray.is_initialized()


def test_beginnings_go_to_the_workers_as_tokens(lone_engine, native):
    start = native.sample(PROMPTS[:3], 1, replace(PARAMS, max_new_tokens=7), keys=KEYS[:3])
    asked = [encoding.encode_prompt(native.tokenizer, text) for text in PROMPTS[:3]]
    asked = [[*ids, *one.token_ids] for ids, [one] in zip(asked, start, strict=True)]
    params, given = replace(PARAMS, max_new_tokens=40), {"keys": KEYS[:3], "first": 2}
    assert_same(lone_engine.sample_ids(asked, 3, params, **given), native.sample_ids(asked, 3, params, **given))


def test_two_workers_make_the_stage_that_one_process_makes(engine, tmp_path):
    """A stage begun with other workers is the same stage."""
    engine.start()
    rows = {}
    for workers in (1, 2):
        settings = preset("smoke", "coin_flip", hardware={"workers": workers})
        stage = self_motivated.sample_rationales(tmp_path / str(workers), settings, progress=False)
        rows[workers] = stage.read_rows("rationales")
    assert rows[1] == rows[2] and len(rows[1]) == 16 * 4 + 8 * 2
    assert self_motivated.sample_rationales(tmp_path / "1", settings, progress=False).read_rows("rationales") == rows[1]


def test_two_workers_score_what_one_process_scores(engine, expected, native, tmp_path):
    engine.start()
    native.model.save_pretrained(tmp_path)
    native.tokenizer.save_pretrained(tmp_path)
    texts = [(problem, one.text) for problem, found in zip(PROBLEMS, expected, strict=True) for one in found]
    texts.sort(key=lambda pair: pair[1])  # the questions in any order, some texts twice
    scores = ray_scores.score(tmp_path, native.tokenizer, *zip(*texts, strict=True), workers=2)
    assert scores == pytest.approx(
        reward_model.score(native.model, native.tokenizer, *zip(*texts, strict=True)), abs=1e-3
    )
    assert ray_scores.score(tmp_path, native.tokenizer, [], [], workers=2) == []


def test_two_workers_make_the_evaluation_that_one_process_makes(engine, tmp_path):
    engine.start()
    small = {"sampling": {"questions": 16}, "ppo": {"updates": 1}, "evaluation": {"questions": 6, "published": 0}}
    self_motivated.run(tmp_path, preset("smoke", "coin_flip", **small), progress=False)
    rows = {1: require(tmp_path, "05_evaluation").read_rows("answers")}
    shutil.rmtree(tmp_path / "05_evaluation")
    self_motivated.evaluate(tmp_path, preset("smoke", "coin_flip", hardware={"workers": 2}, **small), progress=False)
    rows[2] = require(tmp_path, "05_evaluation").read_rows("answers")
    assert any(row["scores"] for row in rows[1])
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two.pop("scores") == pytest.approx(one.pop("scores"), abs=1e-3)
        assert one == two


def test_a_killed_worker_costs_no_sample(engine, lone_engine, expected, monkeypatch):
    engine.start()
    lone_engine.close()
    before, after, killed = set(), set(), []

    def kill_after_the_first_batch(done):
        """Both workers are at work then: one is drawing its next batch, the other draws, or loads its model."""
        if killed:
            after.update(workers())
            return
        deadline = time.monotonic() + 60
        while len(before) < 2 and time.monotonic() < deadline:
            before.update(workers())
        killed.append(min(before))
        os.kill(killed[0], signal.SIGKILL)
        assert_ended(killed)

    monkeypatch.setattr(ray_workers, "progress_bar", lambda label, total, unit: Bar(kill_after_the_first_batch))
    results = engine.sample(PROMPTS, 4, PARAMS, keys=KEYS)
    assert len(before) == 2
    assert after - before  # another process took its place
    assert killed[0] not in after
    assert_same(results, expected)


class Waits:
    """A worker that is killed, fails or waits at its work, after it has noted its process in a file."""

    def __call__(self, batch, how, file):
        with file.open("a") as notes:
            notes.write(f"{os.getpid()}\n")
        if how == "fail":
            raise ValueError(f"cannot work on {batch}")
        if how == "die" or (how == "die once" and len(file.read_text().split()) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "wait":
            time.sleep(600)
        return batch


def test_a_batch_whose_worker_died_is_done_again(engine, tmp_path):
    engine.start()
    with closing(ray_workers.Pool(Waits, (), 1)) as pool:
        assert pool.map([[1, 2], [3]], ("die once", tmp_path / "notes"), None, "item") == [[1, 2], [3]]
    first, *others = (tmp_path / "notes").read_text().split()
    assert len(others) == 2 and first not in others


def test_an_error_in_a_worker_is_raised(engine, tmp_path):
    engine.start()
    with closing(ray_workers.Pool(Waits, (), 1)) as pool:
        with pytest.raises(RuntimeError, match=r"a worker failed: ValueError: cannot work on \[1\]") as failed:
            pool.map([[1]], ("fail", tmp_path / "notes"), None, "item")
        assert failed.type is RuntimeError  # not WorkerError, which the user can put right
        assert pool.map([[2]], ("work", tmp_path / "notes"), None, "item") == [[2]]  # it can still be used


def test_an_error_of_a_worker_s_model_is_raised(engine, native, tmp_path):
    engine.start()
    native.model.save_pretrained(tmp_path)
    native.tokenizer.save_pretrained(tmp_path)
    with ray_engine.RayEngine(str(tmp_path), workers=1) as own:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ray_workers.WorkerError, match="a worker failed: ModelError"):
            own.sample(PROMPTS[:1], 4, PARAMS, keys=["a"])


def test_ctrl_c_ends_the_workers_at_once(engine, tmp_path):
    engine.start()
    notes = tmp_path / "notes"

    def interrupt():
        pid_in(notes)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    interrupts = handling(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    with closing(ray_workers.Pool(Waits, (), 1)) as pool:
        with interrupts, pytest.raises(KeyboardInterrupt):
            pool.map([[1]], ("wait", notes), None, "item")
        assert_ended([pid_in(notes)])
        assert pool.map([[2]], ("work", notes), None, "item") == [[2]]


def test_workers_without_a_place_in_the_cluster_are_refused(engine, expected, monkeypatch):
    engine.start()
    with ray_engine.RayEngine("tiny", workers=2) as own:
        with monkeypatch.context() as patch:
            patch.setattr(ray_workers, "CPU", 1)  # as GPUs are counted; the other engine's have a bit of both
            patch.setattr(ray_workers, "PATIENCE", 1)
            with pytest.raises(ray_workers.WorkerError, match=r"CPUs in the cluster: 2, free: 1\.\d+\. Lower workers"):
                own.sample(PROMPTS, 4, PARAMS, keys=KEYS)
        assert_same(own.sample(PROMPTS[:2], 4, PARAMS, keys=KEYS[:2]), expected[:2])


def test_a_batch_that_kills_every_worker_ends_in_an_error(engine, monkeypatch, tmp_path):
    engine.start()
    monkeypatch.setattr(ray_workers, "RETRIES", 1)
    notes = tmp_path / "notes"
    with (
        closing(ray_workers.Pool(Waits, (), 1)) as pool,
        pytest.raises(ray_workers.WorkerError, match="a worker failed: Actor"),
    ):
        pool.map([[1]], ("die", notes), None, "item")
    assert len(notes.read_text().split()) == 2


def test_bad_arguments_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(ray_workers.Pool, "start", lambda self: pytest.fail("started"))
    engine = ray_engine.RayEngine("tiny")
    for changes, message in (
        ({"n": 0}, "n = 0 is not allowed"),
        ({"first": -1}, "first = -1 is not allowed"),
        ({"keys": ["a"]}, "1 keys were given for 24 prompts"),
        ({"params": replace(PARAMS, max_new_tokens=5000)}, "beyond the model's 512 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.sample(PROMPTS, **{"n": 4, "params": PARAMS, "keys": KEYS} | changes)
    assert engine.sample([], 4, PARAMS, keys=[]) == []
    for options, message in (
        ({"workers": 0}, "workers = 0 is not allowed"),
        ({"max_batch": 0}, "max_batch = 0 is not allowed"),
        ({"inner": "ray"}, "inner is 'ray'"),
    ):
        with pytest.raises(ValueError, match=message):
            ray_engine.RayEngine("tiny", **options)
