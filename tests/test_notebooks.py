"""Every notebook follows the same template, was executed from top to bottom, and kept clean outputs.

That the cells run and give what they gave is the part of test_notebook_runs.py, and of `make test-notebooks`.
"""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from smlib.notebooks.exercises import folded
from smlib.problems.datasets import TASKS

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HEADINGS = ["What we found", "What could go wrong", "Harder exercises", "Next"]
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
    assert [path.stem for path in PATHS] == [*main_line, "06_self_explore", "07_beyond", "08_on_a_gpu"]


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


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_it_is_an_hour_s_reading(notebook):
    assert len(re.sub(r"```.*?```", "", prose(notebook), flags=re.S).split()) <= 2_200


def test_every_section_and_notebook_it_names_is_there(notebook):
    numbers = {match[1] for match in re.finditer(r"^#{2,3} (\d+(?:\.\d+)?)\.? ", prose(notebook), re.M)}
    own = re.sub(r"[Ss]ections? [\d.]+ of (?:\[?notebook)[^.;,)]*|notebook \d\d,? section \d+", "", prose(notebook))
    assert {match[1] for match in re.finditer(r"\b[Ss]ections? (\d+)", own)} <= numbers
    stems = {path.stem[:2] for path in PATHS}
    assert {match[1] for match in re.finditer(r"\b[Nn]otebooks? (\d\d)\b", prose(notebook))} <= stems


def test_what_is_asked_is_answered(notebook):
    """A question under a figure that nobody answers is no lesson."""
    assert "What to look at" not in prose(notebook)
    texts = [output.data.get("text/markdown", "") for output in outputs(notebook) if "data" in output]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs(notebook))
    seen = sum(text.startswith("**What we see.**") for text in texts)
    assert seen >= pictures - 2, "all but the diagram of the method and the result shown first"


def test_no_wall_of_the_library_s_source_is_printed(notebook):
    printed = [output.data["text/plain"] for output in outputs(notebook) if "text/latex" in output.get("data", {})]
    assert all(len(text.splitlines()) <= 40 for text in printed)


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
        assert cell.metadata == (folded(cell.metadata.get("tags", [])) if cell.cell_type == "code" else {})


def test_some_outputs_are_checked(notebook):
    """Only the cells that ask for it are compared: those whose output is exact on any machine."""
    checked = [cell for cell in code(notebook) if "# NBVAL_CHECK_OUTPUT" in cell.source]
    assert checked
    assert all(cell.outputs for cell in checked)


# ------------------------------------------------------------------------- the tables beside those in results/


def shown(number, text):
    """The tables that a cell shows, each as a list of rows of texts: the cell of a notebook whose source has `text`."""
    (path,) = [path for path in PATHS if path.stem.startswith(number)]
    (cell,) = [cell for cell in code(nbformat.read(path, 4)) if text in cell.source]
    tables = []
    for data in (output.data for output in cell.outputs if "data" in output):
        if "text/html" in data:
            lines = BeautifulSoup(data["text/html"], "html.parser").select("tbody tr")
            tables.append([[part.text for part in line.find_all(["th", "td"])] for line in lines])
        elif "text/markdown" in data:
            tables.append([line.strip("| ").split(" | ") for line in data["text/markdown"].splitlines()[2:]])
    return tables


def made(name):
    return pd.read_csv(ROOT / "results" / f"{name}.csv")


def in_percent(*values):
    """Shares that results/ has to four decimals and a notebook, which knows more of them, to one in percent."""
    return pytest.approx([100 * value for value in values], abs=0.0551)


def test_every_figure_is_drawn_by_a_notebook():
    """A draft in the run folder was published with the rest."""
    sources = (cell.source for path in PATHS for cell in nbformat.read(path, 4).cells)
    drawn = set(re.findall(r'RUN, "(\w+)"\)', "\n".join(sources)))
    assert {path.stem for path in (ROOT / "figures").glob("*.png")} <= drawn


def test_notebook_03_shows_the_table_of_held_out_pairs():
    """By author and source; the table of the results has the tasks apart."""
    [rows] = shown("03", "reward_model.csv")
    table = made("reward_model")
    assert len(rows) == table.groupby(["author", "source"]).ngroups
    for _, author, source, interval, before, pairs in rows:
        right, low, high = re.findall(r"[\d.]+", interval)
        part = table[(table["author"] == author) & (table["source"] == source)]
        assert int(pairs) == part["pairs"].sum() and float(low) < float(right) < float(high)
        for cell, column in ((right, "ranked right (%)"), (before, "before training (%)")):
            assert float(cell) == pytest.approx((part[column] * part["pairs"]).sum() / int(pairs), abs=0.11)


def test_notebook_05_shows_the_accuracies_of_the_results():
    table = made("evaluation").set_index(["metric", "method", "test_set"])
    for metric, rows in zip(("greedy", "avg_at_8"), shown("05", "evaluation.csv"), strict=True):
        assert len(rows) == 3
        for method, (_, *cells) in zip(("base", "sft", "sml"), rows, strict=True):
            for task, cell in zip([*TASKS, "mean of tasks"], cells, strict=True):
                wanted = table.loc[metric, method, task]
                found = [float(number) for number in re.findall(r"[\d.]+", cell)]
                assert found == in_percent(wanted["value"], wanted["low"], wanted["high"])


def test_notebook_06_shows_the_report_of_the_results():
    [rows], table = shown("06", "pits.csv"), made("pits")
    table = table[table["k"] == 4]
    assert len(rows) == len(table)
    for (task, *shares, rationales), (_, wanted) in zip(rows, table.iterrows(), strict=True):
        assert (task, int(rationales)) == (wanted["dataset"].replace("_", " "), wanted["rationales"])
        assert [float(share) for share in shares] == in_percent(*wanted[["exact", "early", "late", "none"]])


def test_notebook_07_shows_the_methods_of_the_results():
    """Every method of the table has its line, with the means over seeds."""
    rows = [row for source in ("table(rewards)", "table([") for part in shown("07", source) for row in part]
    table = made("neighbours")
    table = table[(table["seed"] == "all") & (table["task"] == "mean of tasks")].set_index(["method", "metric"])
    assert {row[0] for row in rows} == {method for method, _ in table.index if " minus " not in method}
    for method, *shares, tokens, minutes, _ in rows:
        for metric, share in zip(("avg@8", "greedy", "sound@8"), shares, strict=True):
            wanted = table.loc[method, metric]
            found = [float(number) for number in re.findall(r"[\d.]+", share)]
            assert found == in_percent(wanted["value"], wanted["low"], wanted["high"])
        assert float(tokens) == pytest.approx(table.loc[(method, "tokens"), "value"], abs=0.51)
        assert float(minutes) == pytest.approx(table.loc[(method, "seconds"), "value"] / 60, abs=0.51)


def test_notebook_08_shows_the_memory_of_the_results():
    [rows] = shown("08", "plan_7b.csv")
    needed = [float(number) for number in rows[-1][1:]]  # in the order of the table's presets
    assert needed == pytest.approx(list(made("plan_7b").groupby("preset", sort=False)["GB"].max()), abs=0.0501)
