"""Exercises of the notebooks: the test of what a reader wrote, and the notebooks that hold stubs for solutions.

In a notebook an exercise is three cells: Markdown that asks for it; code tagged "solution" with a function, of which
the lines between BEGIN and END are what the reader writes; code that calls `check`. `notebooks/exercises/` has the same
notebooks with stubs, made by

    python -m smlib.notebooks.exercises    # in the repository

The marks are those of nbgrader.
"""

import re
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbformat.v4 import new_markdown_cell

from smlib.files import folders
from smlib.files.atomic import write_text

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
SOLUTION = re.compile(rf"^([ \t]*){BEGIN}\n.*?{END}$", re.MULTILINE | re.DOTALL)
STUB = r"\1raise NotImplementedError  # write this"
FOLDED = "hide-input"  # the tag of cells whose source is folded away


def check(attempt: Callable, test: Callable[[Callable], None], library: Callable) -> Callable:
    """The function that the cells below use: `attempt` if it passes `test(attempt)`, else `library`.

    It says which. So a notebook runs to its end whether the reader has solved the exercise or not.
    """
    name, until = attempt.__name__, "Until it does, the cells below use the library's function."
    try:
        test(attempt)
    except NotImplementedError:
        print(f"○ {name}: still to be written. The cells below use the library's function.")
    except AssertionError as error:
        print(f"✗ {name} does not pass yet: {error or 'an assertion of the test does not hold'}. {until}")
    except Exception as error:  # whatever a reader's code may raise
        print(f"✗ {name} stopped with {type(error).__name__}: {error}. {until}")
    else:
        print(f"✓ {name} passes.")
        return attempt
    return library


def stub(source: str) -> str:
    """The source of a solution with its solved lines taken out."""
    return SOLUTION.sub(STUB, source)


def folded(tags: list[str]) -> dict:
    """The metadata of a code cell with these tags, so that JupyterLab folds what is to be folded."""
    return ({"tags": tags} if tags else {}) | ({"jupyter": {"source_hidden": True}} if FOLDED in tags else {})


def stubbed(notebook, name: str):
    """The exercise notebook of the notebook called `name`: stubs for solutions, and nothing executed."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        else:
            cell.source = cell.source.replace("](../", "](../../")
        if "solution" in tags:
            cell.source = stub(cell.source)
            cell.metadata = nbformat.from_dict(folded([tag for tag in tags if tag != FOLDED]))
    note = new_markdown_cell(
        "*This is the notebook to work in. Write the functions marked `raise NotImplementedError`; the cell under each "
        "one tests it. Cells without an exercise run as they are. The solutions are folded in "
        f"[the notebook itself](../{name}.ipynb).*",
        id="exercises",
    )
    notebook.cells.insert(1, note)
    return notebook


def write_all(folder: Path) -> None:
    """Write exercises/ of a folder of notebooks."""
    (folder / "exercises").mkdir(exist_ok=True)
    for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")):
        text = nbformat.writes(stubbed(nbformat.read(path, 4), path.stem))
        write_text(folder / "exercises" / path.name, text + "\n" * (not text.endswith("\n")))


if __name__ == "__main__":
    write_all(folders.notebooks_folder())
