"""benchmarks/gpu_7b.py on a CPU, with a small model: a machine with a GPU is seldom at hand."""

import csv
import importlib.util
import math
import time
from pathlib import Path

import pytest

from smlib.problems.prompts import open_prompt

SPEC = importlib.util.spec_from_file_location("gpu_7b", Path(__file__).parents[1] / "benchmarks" / "gpu_7b.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

SMALL = bench.JOBS["small"]
QUICK = ("weights", "sampling", "loop", "ppo_head", "exploration")


def run(folder, *arguments) -> dict:
    """The rows of a table by section, what and unit."""
    rows = bench.main(["--shape", "small", "--out", str(folder), *arguments])
    with (folder / "gpu_small.csv").open() as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == bench.COLUMNS and len(written) == len(rows)
    found = {(row["section"], row["what"], row["unit"]): row for row in rows}
    assert len(found) == len(rows), "a row's name is given twice"
    assert not [row for row in rows if row["what"] == "failed"]
    return found


def test_the_quick_sections_measure_what_they_name(tmp_path):
    found = run(tmp_path, "--only", *QUICK)
    assert {section for section, _, _ in found} == {"facts", *QUICK}
    assert found["weights", "held", "GiB"]["ratio"] == 1
    for rows in SMALL.rows:
        row = found["sampling", f"native, {rows} rows", "tokens/s"]
        assert row["ratio"] == pytest.approx(row["value"] / row["computed"])
    assert 0 < found["sampling", "log p, sampler and training pass, largest difference", "nats"]["value"] < 0.1
    assert found["loop", "micro batch 4, gradient_checkpointing", "GiB"]["computed"] > 0
    assert found["ppo_head", "rollout", "s"]["note"].endswith(" tokens")
    prefixes = 3 * SMALL.rationales
    assert found["exploration", f"{prefixes} prefixes together", "completions/s"]["value"] > 0


@pytest.mark.slow
def test_a_whole_run(tmp_path):
    found = run(tmp_path)
    assert {section for section, _, _ in found} == set(bench.SECTIONS)
    assert found["static", "skipped", ""]["note"] == "needs a GPU"
    for section in ("sft", "reward", "dpo", "ppo_model", "ppo_head_kept"):
        assert any(row["value"] for (name, what, _), row in found.items() if name == section != what)


def test_a_section_that_fails_or_has_no_time_leaves_a_row(tmp_path):
    def break_down(_):
        raise RuntimeError("no memory\nleft")

    def want(_):
        raise ModuleNotFoundError("No module named 'trl'", name="trl")

    def sleep(_):
        time.sleep(60)

    table = bench.Bench(SMALL, [tmp_path / "table.csv"], minutes=0.1)
    for name, work, estimate in (("a", break_down, 0), ("b", want, 0), ("c", want, 60), ("d", sleep, 0)):
        table.run(name, work, estimate)
    notes = {row["section"]: row["note"] for row in table.rows if row["what"] in ("failed", "skipped")}
    assert notes["a"] == "RuntimeError: no memory left" and notes["b"] == "no module trl"
    assert notes["c"].endswith("s left, it takes about 60") and notes["d"].startswith("TimeoutError")
    with (tmp_path / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table.rows)


def test_the_shape_is_the_true_one_and_texts_have_the_tokens_that_were_asked_for():
    assert bench.matrices(bench.JOBS["7b"].config) == 6_738_415_616 - 32 * 2 * 4096 - 4096 - 32_000 * 4096
    tokenizer, [problem] = bench.word_tokenizer(SMALL.config), bench.problems_of(SMALL, 1)
    assert len(tokenizer(open_prompt(problem))["input_ids"]) == SMALL.prompt
    model = bench.build(SMALL.config)
    for group in bench.native(model, SMALL, 16, 5):
        assert [len(one.token_ids) for one in group] == [5] * bench.SAMPLES


def test_the_bound_of_a_step_is_the_reading_of_weights_and_cache_or_the_arithmetic():
    table = bench.Bench(bench.JOBS["7b"], [], minutes=1)
    table.bandwidth, table.peak = 3e12, 8e14
    weights, cached = 2 * 6_607_077_376, 4 * 32 * 4096
    assert table.job.prompt == 128 and bench.matrices(table.job.config) == 6_607_077_376
    assert math.isclose(bench.step_bound(table, 8, 128), (weights + cached * (128 + 8 * 64)) / 3e12)
    table.peak = 1e12
    assert math.isclose(bench.step_bound(table, 8, 128), 8 * weights / 1e12)
