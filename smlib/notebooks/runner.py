"""A run of the notebooks, and its folder.

`run.json` says what it was asked to do, `notebooks/` holds the executed notebooks and their HTML, `timings.json` their
time and memory, `index.html` links them, and each stage of the method has a folder (smlib.files.artifacts). The same
command goes on where a stopped run ended.
"""

import ast
import hashlib
import html
import json
import re
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import nbformat
from pydantic import ConfigDict, Field, FiniteFloat
from typing_extensions import TypedDict

from smlib import declared
from smlib.errors import UsageError, UserError
from smlib.files.artifacts import MANIFEST, StageError, code_version, require
from smlib.files.atomic import DamagedError, explain, load_json, locked, replacing, sha256, write_text
from smlib.notebooks import exercises, pages
from smlib.notebooks.execution import RunError, Watch, clock, execute
from smlib.runs.settings import PRESETS, Tasks

ON_REQUEST = (7,)  # numbers of notebooks that show what took hours: only executed where `first` or `last` names them


@dataclass(frozen=True)
class Request:
    """What is to be executed.

    notebooks: path -> notebook, those of the folder in their order. values: parameters by name; each notebook gets
    those that its parameters cell has. first, last: numbers of notebooks; from `first` on they are executed again.
    """

    notebooks: dict[Path, nbformat.NotebookNode]
    values: dict
    first: int | None = None
    last: int | None = None


def request(folder: Path, values: dict, *, first: int | None = None, last: int | None = None) -> Request:
    """Read the numbered notebooks of a folder, and check what is asked of them.

    Raises RunError for a value, or a number of a notebook, that is not allowed.
    """
    notebooks = {path: read_notebook(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not notebooks:
        raise RunError(f"{folder} has no numbered notebooks: install the package, or clone the repository, again")
    numbers = [_number(path) for path in notebooks]
    for option, number in (("--from", first), ("--to", last)):
        if number is not None and number not in numbers:
            raise RunError(f"{option} {number}: there is no such notebook; choose one of {numbers}")
    if first is not None and last is not None and first > last:
        raise RunError(f"--from {first} --to {last} leaves no notebook: give a --to of at least {first}")
    values, left = _checked(notebooks.values(), values), set(ON_REQUEST) - {first, last}
    return Request({path: one for path, one in notebooks.items() if _number(path) not in left}, values, first, last)


def run(asked: Request, out: Path) -> None:
    """Execute notebooks in their order into `out`; those that are done are skipped.

    A notebook gets RUN_DIR, too. It is done when it was executed with the same source and parameters, and no notebook
    before it has been executed since. Raises RunError at the first failure.
    """
    with locked(out / ".locks" / "run.lock", f"running the notebooks of {out}"):
        _claim(out, asked.values)
        _execute_all(asked, out)


def _execute_all(asked: Request, out: Path) -> None:
    timings, expected = _read_timings(out), _earlier_seconds(out, asked.values)
    _write_index(out, asked.values, timings)
    wanted = [path for path in asked.notebooks if asked.last is None or _number(path) <= asked.last]
    for position, path in enumerate(wanted):
        if asked.first is not None and _number(path) < asked.first:
            continue
        notebook, name = asked.notebooks[path], path.stem
        label = f"[{position + 1}/{len(asked.notebooks)}] {name}"
        known = parameters(notebook)
        given = {key: value for key, value in asked.values.items() if key in known}
        entry = {"source": _source_hash(notebook), "parameters": given}
        before = timings.get(name)
        same = before and all(before[key] == entry[key] for key in entry)
        if same and asked.first is None and not _lost(out, before, _number(path)):
            print(f"{label} · already done")
            continue
        if _number(path) not in ON_REQUEST:  # the rest gets new inputs
            timings = {stem: one for stem, one in timings.items() if stem < name}
        _write_json(out / "timings.json", timings)
        there = _written(out)
        try:
            with Watch(label, [expected.get(later.stem) for later in wanted[position:]]) as watch:
                place = {"RUN_DIR": str(out)} if "RUN_DIR" in known else {}
                execute(path, out / "notebooks" / path.name, given | place, watch)
            made = [file for file, state in _written(out).items() if there.get(file) != state]
            files = {file.relative_to(out).as_posix(): sha256(file) for file in made}
            timings[name] = entry | watch.measured() | {"stages": _stages(out, _number(path)), "files": files}
        finally:
            _write_json(out / "timings.json", timings)
            _write_index(out, asked.values, timings)


def _number(path: Path) -> int:
    """The number that the name of a notebook begins with."""
    return int(path.name[:2])


class _Timing(TypedDict):
    """What timings.json has of an executed notebook."""

    source: str  # hash of the notebook
    parameters: dict
    seconds: FiniteFloat
    peak_mib: int
    cells: int
    stages: list[str]
    files: dict[str, str]  # figures, tables and pages -> SHA-256


_Timings = dict[Annotated[str, Field(pattern=r"^[0-9]{2}_[^/\n]+$")], _Timing]


def _read_timings(out: Path) -> dict[str, _Timing]:
    """What was executed in this run; nothing where the file is damaged, since to execute again costs little."""
    try:
        return load_json(out / "timings.json", _Timings) or {}
    except DamagedError as error:
        print(f"{error}: all notebooks are executed again, and read the finished stages", file=sys.stderr)
        return {}


def _written(out: Path) -> dict[Path, tuple]:
    """The figures, tables and pages of a run, each with what changes when it is written."""
    found = {}
    for path in (path for folder in ("figures", "results", "notebooks") for path in (out / folder).glob("[!.]*.*")):
        state = path.stat()
        found[path] = (state.st_mtime_ns, state.st_ino, state.st_size)
    return found


def _lost(out: Path, entry: _Timing, number: int) -> list[str]:
    """The stages, figures, tables and pages of an executed notebook that were deleted or damaged since."""
    damaged = [name for name, digest in entry["files"].items() if not _is(out / name, digest)]
    return damaged + sorted(set(entry["stages"]) - set(_stages(out, number)))


def _is(file: Path, digest: str) -> bool:
    """Whether the file has that SHA-256; one that cannot be read has not."""
    try:
        return sha256(file) == digest
    except OSError:
        return False


def verify(out: Path) -> int:
    """Read every file of a run and print what is damaged, missing or out of date; 1 if anything is."""
    faults, states = [], {"run.json": _RunFile, "timings.json": _Timings}
    places = (out, *sorted(out.glob("rounds/*")))
    stages = [path for place in places for path in sorted(place.glob("[0-9][0-9]_*")) if path.suffix != ".ipynb"]
    for folder in stages:
        try:
            _verify_stage(folder)
        except (UserError, OSError) as error:
            faults.append(explain(error, folder))
    for state, shape in states.items():
        try:
            states[state] = load_json(out / state, shape) or {}
        except (DamagedError, OSError) as error:
            faults.append(f"{error}: the next run writes it again")
            states[state] = {}
    timings = states["timings.json"]
    for notebook, entry in timings.items():
        lost = _lost(out, entry, int(notebook[:2]))
        faults += [f"{out / name} is missing or damaged: the next run makes it again" for name in lost]
    if timings and not (out / "index.html").is_file():
        faults.append(f"{out / 'index.html'} is missing: the next run makes it again")
    if not stages and not any((out / state).exists() for state in states):
        raise RunError(f"{out} holds no run: give the --out, or the --preset, --task and --seed, of a started one")
    whole = f"{out}: {len(stages)} stages and {len(timings)} notebooks are intact"
    print("\n".join(dict.fromkeys(faults)) or whole)
    return min(len(faults), 1)


def _verify_stage(folder: Path) -> None:
    """Raise UserError where a stage is not as it was written, or not finished, where its checkpoint counts too."""
    from smlib.files import checkpoints
    from smlib.ppo import rloo_grpo, state

    if (folder / MANIFEST).exists():
        require(folder.parent, folder.name).verify()
        return
    if newest := checkpoints.newest(folder / "training"):
        names = (state.STATE_FILE, rloo_grpo.STATE_FILE)
        checkpoints.read_state(newest, next((name for name in names if (newest / name).exists()), state.STATE_FILE))
    raise StageError(f"{folder} is not finished: the next run continues it")


def _stages(out: Path, number: int) -> list[str]:
    """The finished stages that a notebook has made: 02 makes 02_ranking and 02_sft."""
    return sorted(path.parent.name for path in out.glob(f"{number:02d}_*/manifest.json"))


def read_notebook(path: Path):
    try:
        return nbformat.read(path, 4)
    except ValueError as error:  # nbformat's own, too
        raise RunError(f"{path} cannot be read as a notebook ({error}): install or clone it again") from error


def parameters(notebook) -> dict:
    """Name and default of every literal assigned in the cell tagged "parameters"; {} without such a cell."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
            try:
                return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
            except ValueError as error:
                raise RunError(f"a cell tagged 'parameters' may assign only literals, such as 3: {error}") from error
    return {}


def _checked(notebooks: Iterable[nbformat.NotebookNode], values: dict) -> dict:
    """The values, each of a parameter that a notebook has, as declared here or else in the type of its default."""
    kinds = {"LARGE": Literal[*PRESETS], "LARGE_TASK": Tasks}
    kinds |= dict.fromkeys(("FRESH_QUESTIONS", "HELD_OUT"), declared.Questions)
    kinds |= dict.fromkeys(("SAMPLES", "DRAWS"), declared.Samples)
    defaults, found = {}, {}
    for notebook in notebooks:
        defaults |= parameters(notebook)
    for name, value in values.items():
        if name not in defaults:
            known = ", ".join(sorted(set(defaults) - {"PRESET", "TASK", "SEED", "RUN_DIR", "OVERRIDES"})) or "none"
            raise RunError(
                f"no notebook has a parameter {name}; --set can change {known}, and settings by their group and "
                "name, as in ppo.reward=checker (`smlib settings` lists them)"
            )
        like = defaults[name]
        try:
            found[name] = value if like is None else declared.checked(name, value, kinds.get(name, type(like)), like)
        except UsageError as error:
            raise RunError(str(error)) from None
    return found


class _Overrides(TypedDict, total=False, extra_items=dict):
    """What --model and --set have changed: the base, and settings by their group."""

    base: str


class _RunFile(TypedDict, total=False):
    """run.json: the parameters, by name."""

    __pydantic_config__ = ConfigDict(extra="allow")
    PRESET: str
    TASK: str
    SEED: int
    OVERRIDES: _Overrides


def _claim(out: Path, values: dict) -> None:
    """Make the run folder ours; refuse one that holds another run."""
    try:
        found = load_json(out / "run.json", _RunFile) or values
    except DamagedError as error:
        print(f"{error}: it is written again; each stage has its own record of how it was made", file=sys.stderr)
        found = values
    asked, found = _deciding(values), _deciding(found)
    for name in found | asked:
        mine, other = asked.get(name, "(not set)"), found.get(name, "(not set)")
        if mine != other:
            raise RunError(
                f"{out} holds a run with {name} = {other!r}, and now {name} = {mine!r} is asked for: "
                "choose another --out, or delete that folder"
            )
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    _write_json(out / "run.json", values)


def _deciding(values: dict) -> dict:
    """Without the hardware's settings that change no result: a run may go on with others."""
    changed = dict(values.get("OVERRIDES", {}))
    hardware = changed.pop("hardware", {})
    changed["hardware"] = {name: hardware[name] for name in ("dtype", "engine", "rollout_engine") if name in hardware}
    return values | {"OVERRIDES": {group: value for group, value in changed.items() if value != {}}}


def _earlier_seconds(out: Path, values: dict) -> dict:
    """Seconds by notebook, from the newest run of this preset and task in this folder or beside it."""
    seconds = {}
    for path in sorted(out.parent.glob("*/timings.json"), key=lambda path: path.stat().st_mtime):
        with suppress(DamagedError, OSError):  # of a neighbour: it stops its own run alone
            run, timings = load_json(path.with_name("run.json")), load_json(path, _Timings)
            if run and all(run.get(key) == values.get(key) for key in ("PRESET", "TASK")):
                seconds |= {name: entry["seconds"] for name, entry in timings.items()}
    return seconds


def _source_hash(notebook) -> str:
    text = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _write_index(out: Path, values: dict, timings: dict) -> None:
    """index.html: one row for every notebook of the run, finished or not."""
    rows = []
    for page in sorted((out / "notebooks").glob("*.html")):
        entry = timings.get(page.stem)
        time_used = clock(entry["seconds"]) if entry else "not finished"
        memory = f"{entry['peak_mib']} MiB" if entry else ""
        link = f'<a href="notebooks/{quote(page.name)}">{html.escape(page.stem)}</a>'
        rows.append(f"<tr><td>{link}</td><td>{time_used}</td><td>{memory}</td></tr>")
    asked = html.escape(", ".join(f"{name} = {value!r}" for name, value in values.items()))
    total = clock(sum(entry["seconds"] for entry in timings.values()))
    body = f"""<h1>{html.escape(out.name)}</h1>
<p>{asked}<br>smlib {html.escape(code_version())}</p>
<table><tr><th>notebook</th><th>time</th><th>peak memory</th></tr>
{chr(10).join(rows)}
<tr><th>together</th><th>{total}</th><th></th></tr></table>
<p>{_answers(out)}</p>"""
    write_text(out / "index.html", pages.document(out.name, body))


def _answers(out: Path) -> str:
    """Where to look at the run's answers."""
    if (out / "browse.html").exists():
        return '<a href="browse.html">All answers, question by question</a>'
    return f"<code>smlib browse {html.escape(str(out))}</code> writes a page of all answers, question by question."


def link_answers(out: Path) -> None:
    """Write index.html anew, with what has come since; in a run without notebooks there is none."""
    if (out / "index.html").exists():
        _write_index(out, load_json(out / "run.json", _RunFile) or {}, _read_timings(out))


def publish(out: Path, root: Path, times: bool) -> None:
    """Copy a run's figures/*.png and results/*.csv to the folders of the same name in the repository. times: write what
    each notebook took to results/run_times.csv, too, which says nothing where they only read finished stages."""
    for folder, pattern in (("figures", "*.png"), ("results", "*.csv")):
        (root / folder).mkdir(exist_ok=True)
        for path in sorted((out / folder).glob(pattern)):
            with replacing(root / folder / path.name) as tmp:
                shutil.copyfile(path, tmp)
    if times:
        lines = [f"{name},{entry['seconds']},{entry['peak_mib']}" for name, entry in _read_timings(out).items()]
        write_text(root / "results" / "run_times.csv", "\n".join(["notebook,seconds,peak_mib", *lines]) + "\n")


def refresh(out: Path, notebooks_dir: Path) -> None:
    """Put a run's executed notebooks into the repository, as if a reader had executed them in place.

    Only a run with the notebooks' own parameters can be: else their outputs would contradict their source. Those on
    request that it has not executed stay as they are.
    """
    timings = _read_timings(out)
    for path in sorted(notebooks_dir.glob("[0-9][0-9]_*.ipynb")):
        defaults = parameters(read_notebook(path))
        if path.stem not in timings and _number(path) in ON_REQUEST:
            continue
        if path.stem not in timings:
            raise RunError(f"{out} has not finished {path.stem}: run it before --refresh")
        for name, value in timings[path.stem]["parameters"].items():
            if value != defaults[name]:
                raise RunError(f"--refresh needs {name} = {defaults[name]!r}, as in {path.name}, not {value!r}")
        notebook = read_notebook(out / "notebooks" / path.name)
        local = {str(out): defaults.get("RUN_DIR", ""), str(notebooks_dir.parent): ".."}
        with replacing(path) as tmp:
            nbformat.write(_cleaned(notebook, local), tmp)
    exercises.write_all(notebooks_dir)


def _cleaned(notebook, local: dict):
    """Without papermill's traces, execution times and the paths of this machine (keys of `local`)."""
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict(exercises.folded(tags))
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            text = json.dumps(cell.outputs)
            for path, name in local.items():
                text = text.replace(json.dumps(path)[1:-1], name)
            outputs = [nbformat.from_dict(output) for output in json.loads(text)]
            for output in outputs:
                if "execution_count" in output:
                    output.execution_count = count
                if output.output_type == "stream":
                    output.text = _as_a_terminal_shows(output.text)
            cell.outputs = [output for output in outputs if output.get("text") != ""]
    notebook.cells = cells
    notebook.metadata.pop("papermill", None)
    return notebook


def _as_a_terminal_shows(text: str) -> str:
    """What a terminal shows of a text at the end: of a line written over by carriage returns, the last."""
    return re.sub(r"[^\n]*\r(?=[^\n\r]*[^\s])|[^\n]*\r[^\S\n]*", "", text)
