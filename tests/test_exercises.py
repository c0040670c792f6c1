"""Exercises: a solution passes its test, a stub does not, and a notebook goes on with a function that works."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from smlib.notebooks import exercises

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))


def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION


SOURCE = '''def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION
'''


def check_double(double):
    assert double(3) == 6, "twice three is six"


def library(x):
    return x + x


def test_what_passes_is_used(capsys):
    assert exercises.check(double, check_double, library) is double
    assert capsys.readouterr().out == "✓ double passes.\n"


def test_what_is_wrong_is_named_and_the_library_s_is_used(capsys):
    assert exercises.check(lambda x: x, check_double, library) is library
    assert "twice three is six" in capsys.readouterr().out


def test_what_raises_is_named_and_the_library_s_is_used(capsys):
    assert exercises.check(lambda x: x / 0, check_double, library) is library
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_stub_keeps_all_but_the_solution_and_is_still_to_be_written(capsys):
    assert (
        exercises.stub(SOURCE)
        == '''def double(x):
    """Twice x."""
    raise NotImplementedError  # write this
'''
    )
    names = {}
    exec(exercises.stub(SOURCE), names)
    assert exercises.check(names["double"], check_double, library) is library
    assert "still to be written" in capsys.readouterr().out


def test_an_exercise_notebook_has_the_stub_open_and_no_output():
    tags = {"tags": ["solution", exercises.FOLDED], "jupyter": {"source_hidden": True}}
    cells = [new_markdown_cell("# A\n[docs](../docs/a.md)"), new_code_cell(SOURCE, metadata=tags, execution_count=1)]
    made = exercises.stubbed(new_notebook(cells=cells), "00_a")
    title, note, code = made.cells
    assert "../../docs/a.md" in title.source and "(../00_a.ipynb)" in note.source
    assert (code.source, code.execution_count) == (exercises.stub(SOURCE), None)
    assert code.metadata == {"tags": ["solution"]}


# ---------------------------------------------------------------------------------------------- the notebooks' own


def cases():
    """(notebook, number of the exercise) of all."""
    for path in PATHS:
        cells = nbformat.read(path, 4).cells
        for number, place in enumerate(at for at, cell in enumerate(cells) if "solution" in tags(cell)):
            yield pytest.param(path, place, id=f"{path.stem}-{number + 1}")


def tags(cell):
    return cell.metadata.get("tags", [])


def outcome(path, place, change):
    """What the test cell below the solution at `place` prints, after the notebook's imports alone."""
    cells = nbformat.read(path, 4).cells
    names, shown = {"__name__": "exercise"}, io.StringIO()
    test = next(cell for cell in cells[place + 1 :] if cell.cell_type == "code")
    assert "exercises.check(" in test.source
    with redirect_stdout(shown):
        for cell in cells[:place]:
            if "imports" in tags(cell):
                exec(cell.source, names)
        exec(change(cells[place].source), names)
        exec(test.source, names)
    return shown.getvalue()


@pytest.mark.parametrize("path, place", cases())
def test_the_solution_passes(path, place):
    shown = outcome(path, place, str)
    assert "passes." in shown and "✗" not in shown and "○" not in shown


@pytest.mark.parametrize("path, place", cases())
def test_the_stub_does_not_pass(path, place):
    shown = outcome(path, place, exercises.stub)
    assert "still to be written" in shown and "✓" not in shown


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_notebook_has_three_to_five_exercises_each_with_time_and_difficulty(path):
    cells = nbformat.read(path, 4).cells
    places = [at for at, cell in enumerate(cells) if "solution" in tags(cell)]
    assert 3 <= len(places) <= 5
    for at in places:
        assert exercises.FOLDED in tags(cells[at]) and exercises.BEGIN in cells[at].source
        asked = cells[at - 1].source
        assert asked.startswith("### Exercise") and "minutes" in asked and "●" in asked


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_exercise_notebook_is_made_from_the_notebook(path):
    """Else `python -m smlib.notebooks.exercises` is due."""
    made = exercises.stubbed(nbformat.read(path, 4), path.stem)
    assert nbformat.read(FOLDER / "exercises" / path.name, 4) == made
