"""Notebooks of a few cells that stand for the real ones, and an engine that executes them in this process."""

import contextlib
import io

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.engines import Engine, papermill_engines

from smlib.notebooks import execution, runner

VALUES = {"PRESET": "tiny", "TASK": "all", "SEED": 0}
PARAMETERS = 'PRESET = "tiny"\nTASK = "all"\nSEED = 0\nRUN_DIR = "../runs/x"'


def write_notebook(folder, name, *cells, parameters=PARAMETERS):
    notebook = new_notebook(cells=[new_markdown_cell(f"# {name}")])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(source) for source in cells]
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def run(folder, out, values, **numbers):
    """Execute the notebooks of a folder into a run folder."""
    runner.run(runner.request(folder, values, **numbers), out)


class InProcess(Engine):
    """Runs cells in this process: a kernel takes seconds to start, and most tests are not about one."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, watch, **_):
        watch.cells = nb_man.nb.cells
        names, count = {}, 0
        for cell in nb_man.nb.cells:
            nb_man.cell_start(cell)
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                printed = io.StringIO()
                try:
                    with contextlib.redirect_stdout(printed):
                        exec(cell.source, names)
                except Exception as error:
                    cell.outputs = [new_output("error", ename=type(error).__name__, evalue=str(error))]
                    nb_man.cell_exception(cell)
                    break
                if printed.getvalue():
                    cell.outputs = [new_output("stream", name="stdout", text=printed.getvalue())]
            nb_man.cell_complete(cell)


@contextlib.contextmanager
def engine(kind):
    """Within, notebooks are executed by that engine of papermill's in place of our own."""
    papermill_engines.register(execution.ENGINE, kind)
    try:
        yield
    finally:
        papermill_engines.register(execution.ENGINE, execution.WatchedEngine)
