"""Every notebook follows the same template, was executed from top to bottom, and kept clean outputs.

That the cells run and give what they gave is nbval's part (`make test`).
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = [
    "In this notebook you will",
    "What could go wrong",
    "In this notebook you have",
    "Exercises",
    "Next",
]
LOCAL_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|tmp|private|opt|mnt|var|usr)/\w+|[A-Z]:\\\\Users")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def test_the_notebooks_exist():
    main_line = ["00_start_here", "01_sampling", "02_ranking", "03_reward_model", "04_ppo", "05_evaluation"]
    assert [path.stem for path in PATHS] == [*main_line, "06_self_explore", "08_on_a_gpu"]


def test_it_is_a_valid_notebook_of_readable_length(notebook):
    nbformat.validate(notebook)
    assert 35 <= len(notebook.cells) <= 60


def test_it_opens_with_a_title_and_a_promise(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    title, *rest = first.source.splitlines()
    assert re.match(r"# \S", title)
    promise = " ".join(rest).strip()
    assert promise.endswith(".") and len(promise) < 400, "one sentence under the title says what the reader gets"


def test_the_headings_of_the_template_come_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.findall(r"^#{2,4} +(.+?) *$", text, re.MULTILINE)
    places = [[heading.startswith(wanted) for heading in found].index(True) for wanted in HEADINGS]
    assert places == sorted(places)


def test_its_parameters_are_literals_and_none_is_injected(notebook):
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert not any("injected-parameters" in each for each in tags)
    (cell,) = [cell for cell, each in zip(notebook.cells, tags, strict=True) if "parameters" in each]
    nodes = ast.parse(cell.source).body
    assert nodes
    for node in nodes:
        assert isinstance(node, ast.Assign), "a value derived in the parameters cell would ignore an injected one"
        ast.literal_eval(node.value)
        assert re.fullmatch("[A-Z][A-Z0-9_]*", node.targets[0].id)
    names = {node.targets[0].id for node in nodes}
    assert {"PRESET", "TASK", "SEED", "RUN_DIR"} <= names


def test_it_was_executed_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code(notebook) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


def test_nothing_failed_or_warned(notebook):
    assert [output.evalue for output in outputs(notebook) if output.output_type == "error"] == []
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


def test_code_cells_are_short(notebook):
    assert [cell.source for cell in code(notebook) if len(cell.source.splitlines()) > 40] == []


def test_pictures_are_png(notebook):
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "text/markdown", "text/latex", "image/png"}
    html = [output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {})]
    assert not any(re.search("<(script|svg|iframe)", text) for text in html)


def test_outputs_name_no_path_of_one_machine(notebook):
    texts = [output.get("text", "") for output in outputs(notebook)]
    texts += [
        str(value)
        for output in outputs(notebook)
        for kind, value in output.get("data", {}).items()
        if kind != "image/png"
    ]
    assert [match for text in texts for match in LOCAL_PATH.findall(text)] == []


def test_its_metadata_is_the_same_on_every_machine(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}


def test_some_outputs_are_checked(notebook):
    """nbval compares only the cells that ask for it: those whose output is exact on any machine."""
    checked = [cell for cell in code(notebook) if "# NBVAL_CHECK_OUTPUT" in cell.source]
    assert checked
    assert all(cell.outputs for cell in checked)
