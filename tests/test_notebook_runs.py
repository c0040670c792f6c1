"""All notebooks, executed twice: at the smallest preset, and with a large model's settings on a published task.

The outputs in the repository are of the preset `tiny`, which takes long to execute (`make test-notebooks`). What does
not depend on the preset is compared here: the cells that ask for it by `# NBVAL_CHECK_OUTPUT`, as their numbers are
exact and their work is small; those tagged "committed", whose words come from tables of results/ alone; and the
library's code, where it is shown.
"""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from gsm8k_base import make_base
from test_browse import held

from smlib.files.artifacts import require
from smlib.notebooks.execution import Watch, execute
from smlib.notebooks.runner import parameters, read_notebook, verify
from smlib.problems.steps import ONLY_GENERATED
from smlib.runs.settings import preset

pytestmark = pytest.mark.slow
with_published = pytest.mark.skipif(
    not os.environ.get("SML_DATA_DIR"), reason="needs the published questions: set SML_DATA_DIR"
)
COMMITTED = {path.stem: path for path in sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))}


def executed(out, *options, **environment):
    """stem -> code cells of the notebooks that the command has executed; what it executed them with is left out."""
    command = [sys.executable, "-m", "smlib", "run", "--out", str(out), *options]
    # No number in bfloat16 is compared here, and a processor that has instructions for it is twice as fast with them.
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "ALL"} | environment
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return {path.stem: code(path) for path in sorted((out / "notebooks").glob("*.ipynb"))}


def code(path):
    cells = [cell for cell in read_notebook(path).cells if cell.cell_type == "code"]
    return [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def is_exact(cell):
    return "# NBVAL_CHECK_OUTPUT" in cell.source or "committed" in cell.metadata.get("tags", [])


def outputs(cell):
    """Stream or MIME type -> what the cell has shown of it, as nbval compares it; of pictures, how many there are."""
    found = defaultdict(str)
    for output in cell.outputs:
        for kind, shown in {output.name: output.text}.items() if "text" in output else output.data.items():
            found[kind] += "*" if kind == "image/png" else shown
    return dict(found)


# ------------------------------------------------------------------------------------------- the smallest preset


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A run of all notebooks: its folder, and the pairs of cells, committed and executed, by notebook.

    Notebook 07 runs where it is asked for, and from what the others have left.
    """
    out = tmp_path_factory.mktemp("smoke") / "run"
    assert "07_beyond" not in executed(out, "--preset", "smoke")
    done = executed(out, "--preset", "smoke", "--from", "7", "--to", "7")
    return out, {name: list(zip(code(path), done[name], strict=True)) for name, path in COMMITTED.items()}


def test_the_smoke_pipeline_runs_from_end_to_end(smoke):
    out, cells = smoke
    assert {path.stem for path in (out / "notebooks").glob("*.ipynb")} == set(cells) == set(COMMITTED)
    assert list((out / "results").glob("*.csv")) and list((out / "figures").glob("*.png"))
    assert verify(out) == 0  # every notebook in timings.json, every file as it was written


def test_its_answers_become_a_page_that_the_index_links(smoke):
    out, _ = smoke
    command = [sys.executable, "-m", "smlib", "browse", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = held((out / "browse.html").read_text(encoding="utf-8"))
    asked = {(row["test_set"], row["id"]) for row in require(out, "05_evaluation").read_rows("answers")}
    assert {(one["task"], one["id"]) for one in found["questions"]} == asked
    assert {len(one["answers"]) for one in found["questions"] if one["task"] == "coin_flip"} == {6}
    assert len(found["pits"]) == len(require(out, "06_exploration").read_rows("pairs"))
    assert 'href="browse.html"' in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMITTED)
def test_what_no_preset_changes_is_as_committed(smoke, name):
    exact = [pair for pair in smoke[1][name] if is_exact(pair[0])]
    assert exact
    for committed, done in exact:
        shown = [outputs(cell) | {"image/png": None} for cell in (committed, done)]
        assert shown[0] == shown[1], committed.source


@pytest.mark.parametrize("name", COMMITTED)
def test_the_exercise_notebook_runs_to_its_end_unsolved(smoke, name, tmp_path):
    values = {"PRESET": "smoke", "TASK": "all", "SEED": 0, "RUN_DIR": str(smoke[0])}
    exercise = COMMITTED[name].parent / "exercises" / f"{name}.ipynb"
    known = parameters(read_notebook(exercise))
    done = tmp_path / exercise.name
    execute(exercise, done, {key: value for key, value in values.items() if key in known}, Watch(name, [None]))
    shown = [outputs(cell).get("stdout", "") for cell in code(done)]
    assert sum("still to be written" in text for text in shown) >= 3


@pytest.mark.parametrize("name", COMMITTED)
def test_the_code_that_a_notebook_shows_is_the_library_s(smoke, name):
    """Else `make notebooks` is due: the function was changed since."""
    for committed, done in (pair for pair in smoke[1][name] if "plots.source(" in pair[0].source):
        assert outputs(committed)["text/latex"] == outputs(done)["text/latex"], committed.source


@with_published
@pytest.mark.parametrize("name", COMMITTED)
def test_every_cell_shows_what_it_showed_in_kind(smoke, name):
    for committed, done in smoke[1][name]:
        kinds = [{kind: shown if kind == "image/png" else "" for kind, shown in outputs(cell).items()}
                 for cell in (committed, done)]  # fmt: skip
        assert kinds[0] == kinds[1], committed.source


# --------------------------------------------------------------------- a base that cannot answer, published questions


@with_published
def test_notebook_01_runs_where_no_sample_states_an_answer(tmp_path):
    few = {"questions": 4, "samples": 2, "conditioned_questions": 2, "max_new_tokens": 12}
    options = ["--preset", "smoke", "--task", "single_eq", "--from", "1", "--to", "1"]
    for name, value in few.items():
        options += ["--set", f"sampling.{name}={value}"]
    shown = "".join("".join(outputs(cell).values()) for cell in executed(tmp_path, *options)["01_sampling"])
    assert not any(row["correct"] for row in require(tmp_path, "01_sampling").read_rows("rationales"))
    assert "The 16 samples: 16 no answer." in shown and "of the 0 right samples" not in shown


# --------------------------------------------------------------------------------- a large model's settings, GSM8K

SEED = 7  # of which some questions of both authors are held out, few as they are
SMALL = {
    "sampling": {"questions": 8, "samples": 4, "conditioned_questions": 4},
    "reward": {"questions": 6},
    "ppo": {"episodes": 8, "samples_per_question": 4, "minibatch": 8},
    "evaluation": {"questions": 4},
    "explore": {"samples": 4},
}
COUNTING = """
def _count():
    import os, weakref
    from transformers import PreTrainedModel
    loaded, load = [], PreTrainedModel.from_pretrained.__func__

    def counting(*arguments, **options):
        found = load(*arguments, **options)
        loaded.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
        with open(os.environ["LOADED"], "a") as file:
            print(sum(one() is not None for one in loaded), file=file)
        return found

    PreTrainedModel.from_pretrained = classmethod(counting)

_count()
"""  # what a kernel does first: writes how many models it holds whenever one was loaded


@with_published
def test_they_run_on_gsm8k_with_weights_in_bfloat16_and_adapters(tmp_path):
    base = make_base(preset("rehearsal", "gsm8k", SEED, **SMALL), tmp_path / "base")
    options = ["--preset", "rehearsal", "--task", "gsm8k", "--model", base, "--seed", str(SEED), "--to", "6"]
    for group, values in SMALL.items():
        options += [part for name, value in values.items() for part in ("--set", f"{group}.{name}={value}")]
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "count.py").write_text(COUNTING)
    counted = {"IPYTHONDIR": str(tmp_path / "ipython"), "LOADED": str(tmp_path / "loaded")}
    done = executed(tmp_path / "run", *options, **counted)
    held = [int(line) for line in (tmp_path / "loaded").read_text().split()]
    # Notebook 03 compares the reward model with what it was before its training; all else wants a card for itself.
    assert max(held) == 2 and held.count(2) <= 3, held
    assert [name[:2] for name in done] == [f"{number:02d}" for number in range(7)]
    for name, cells in done.items():
        shown = [outputs(cell) for cell in cells]
        assert [each["stderr"] for each in shown if "stderr" in each] == []
        assert name.startswith("00") or any(ONLY_GENERATED in each.get("stdout", "") for each in shown)
