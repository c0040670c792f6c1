"""The notebooks in JupyterLab, in a real browser: all cells run, an exercise is solved by typing, nothing complains.

It needs `make browser`, and Chromium with its driver (Debian: apt-get install chromium chromium-driver). Pictures of
what the browser showed are left in build/screenshots/.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from smlib.notebooks import exercises

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no chromium and chromedriver: apt-get install chromium chromium-driver",
    ),
]

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
PATIENCE = 300  # seconds for a notebook at smoke
QUIET = (  # nothing of the browser's own asks the network
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks that are opened here, at the smallest preset, with a run folder of their own."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "exercises").mkdir()
    for name in ("00_start_here", "02_ranking", "exercises/00_start_here"):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace('PRESET = "tiny"', 'PRESET = "smoke"')
                cell.source = cell.source.replace('RUN_DIR = ""', f"RUN_DIR = {str(folder / 'run')!r}")
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """The address of JupyterLab in that folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    command += [f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly", "--ServerApp.log_level=ERROR"]
    places = {name: str(folder / "jupyter" / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    environment = os.environ | places | {"JUPYTERLAB_SETTINGS_DIR": str(folder / "jupyter" / "settings")}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/api").status == 200, 60)
            yield f"http://127.0.0.1:{port}/lab"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in QUIET:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(PATIENCE)
    yield driver
    driver.quit()


def _wait(condition, seconds: float):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except Exception:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


def opened(browser, lab: str, name: str):
    """Open a notebook and wait until its kernel is there."""
    browser.get(f"{lab}/tree/{name}?reset")
    ready = """const panel = window.jupyterapp?.shell.currentWidget;
        return panel?.context?.isReady && panel.sessionContext?.session?.kernel?.status === 'idle';"""
    _wait(lambda: browser.execute_script(ready), 60)


def command(browser, name: str) -> None:
    """Carry out a command of JupyterLab to its end."""
    script = "const done = arguments[arguments.length - 1]; window.jupyterapp.commands.execute(arguments[0])"
    browser.execute_async_script(f"{script}.then(() => done(), () => done());", name)


def cells(browser) -> list[dict]:
    panel = "window.jupyterapp.shell.currentWidget.content.model.sharedModel"
    return json.loads(browser.execute_script(f"return JSON.stringify({panel}.toJSON().cells)"))


def printed(cell: dict) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def shot(browser, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))


def complaints(browser) -> list[str]:
    """What the browser's console calls an error."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("name", ["00_start_here", "02_ranking"])
def test_all_cells_run(browser, lab, folder, name):
    if name.startswith("02"):  # the stage before it
        stage = [sys.executable, "-m", "smlib", "stage", "01_sampling"]
        subprocess.run([*stage, "--preset", "smoke", "--out", folder / "run"], check=True, capture_output=True)
    opened(browser, lab, f"{name}.ipynb")
    command(browser, "notebook:run-all-cells")
    code = [cell for cell in cells(browser) if cell["cell_type"] == "code"]
    shot(browser, name)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert complaints(browser) == []


def test_an_exercise_is_solved_by_typing(browser, lab):
    """The first exercise of notebook 00 whose solution is one line: typed, run by Shift+Enter, and found right."""
    solved = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", 4).cells
    lines = [exercises.SOLUTION.search(cell.source) for cell in solved if "solution" in cell.metadata.get("tags", [])]
    number = next(number for number, found in enumerate(lines) if len(found[0].splitlines()) == 3)
    line = lines[number][0].splitlines()[1].strip()
    opened(browser, lab, "exercises/00_start_here.ipynb")
    here = cells(browser)
    place = [at for at, cell in enumerate(here) if "solution" in cell["metadata"].get("tags", [])][number]
    test = next(at for at in range(place + 1, len(here)) if here[at]["cell_type"] == "code")
    first = next(at for at, cell in enumerate(here) if "imports" in cell["metadata"].get("tags", []))
    rows = "".join(here[place]["source"]).splitlines()
    row = next(at for at, text in enumerate(rows) if "raise NotImplementedError" in text)
    run(browser, first)
    notebook = "const notebook = window.jupyterapp.shell.currentWidget.content;"
    browser.execute_script(
        f"{notebook} notebook.activeCellIndex = arguments[0]; notebook.scrollToItem(arguments[0]);", place
    )
    _wait(lambda: browser.execute_script(f"{notebook} return Boolean(notebook.activeCell.editor);"), 30)
    go = """notebook.mode = 'edit'; notebook.activeCell.editor.focus();
        const [line, start, end] = arguments;
        notebook.activeCell.editor.setSelection({start: {line, column: start}, end: {line, column: end}});"""
    browser.execute_script(notebook + go, row, len(rows[row]) - len(rows[row].lstrip()), len(rows[row]))
    keys = webdriver.Keys
    webdriver.ActionChains(browser).send_keys(line).perform()
    shot(browser, "exercise_typed")
    webdriver.ActionChains(browser).key_down(keys.SHIFT).send_keys(keys.ENTER).key_up(keys.SHIFT).perform()
    run(browser, test)
    shown = printed(cells(browser)[test])
    shot(browser, "exercise_solved")
    assert re.search(r"✓ \w+ passes\.", shown), "".join(cells(browser)[place]["source"]) + shown
    assert complaints(browser) == []


def run(browser, place: int) -> None:
    browser.execute_script("window.jupyterapp.shell.currentWidget.content.activeCellIndex = arguments[0]", place)
    command(browser, "notebook:run-cell")
