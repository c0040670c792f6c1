"""The command line: `run` executes the notebooks, `stage` makes stages without them, `results` pools runs.

A run is a folder: `run.json` says what it was asked to do, `notebooks/` holds the executed notebooks and
their HTML, `timings.json` their time and memory, `index.html` links them, and each stage of the method has a
folder (smlib.artifacts). The same command goes on where a stopped run ended.
"""

import argparse
import ast
import hashlib
import html
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import nbformat
import papermill
import psutil
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from pydantic import ConfigDict, Field, FiniteFloat
from typing_extensions import TypedDict

from smlib import declared, pages
from smlib.artifacts import MANIFEST, StageError, code_version, require
from smlib.errors import UsageError, UserError
from smlib.files import DamagedError, explain, load_json, locked, replacing, sha256, write_text
from smlib.problems import PUBLISHED, TASKS, DatasetError, generate, load, splits
from smlib.prompts import SOURCES

ROOT = Path(__file__).parents[1]
KERNEL_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads and a fork in the same process warn and may hang
    "TQDM_DISABLE": "1",  # progress bars would make every run's notebooks differ; the runner shows its own
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # tqdm, where there are no widgets; TRL, beside a vLLM that it was not tested with and that it does not use here
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore:TRL currently supports vLLM",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

OPTIONS = {  # what they may be, whatever the command
    "dataset": Literal[*TASKS, *PUBLISHED],
    "model": declared.Text,
    "seed": declared.Seed,
    "questions": declared.Questions,
    "samples": declared.Samples,
    "shots": Literal["none", *SOURCES],
    "engine": Literal["native", "vllm", "auto"],
    "rows": declared.Rows,
    "cache_tokens": declared.Held,
    "workers": declared.Processes,
    "temperature": declared.Temperature,
    "top_p": declared.Share,
    "max_new_tokens": declared.Tokens,
    "shard": declared.Rows,
}


PATIENCE = 600  # seconds for an interrupted notebook to save what it was at


class RunError(UserError):
    """A run that cannot start or go on; the message names the fault and the way out."""


def main(argv: list[str] | None = None) -> int:
    """Run one command. Exit code 0, or 1 after an error that its user can put right, or 130 after Ctrl-C (SIGINT) and
    143 after SIGTERM, which a batch system sends: both save what can be gone on from.

    Such an error is one message, with --debug after its traceback. Any other exception is a bug and goes on.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream, instead in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows another, and the run goes on
            stream.reconfigure(errors=instead)
    try:
        with _handling(signal.SIGTERM, _terminate):
            return _run_command([argument for argument in argv if argument != "--debug"])
    except (UserError, OSError) as error:  # OSError: a file that is missing or may not be written, a full disk
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        logging.getLogger("asyncio").disabled = True  # at exit it would print the traceback of the interrupted cell
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which does what Ctrl-C does."""


def _terminate(*_) -> None:
    raise _Terminated


@contextmanager
def _handling(number: int, handler) -> Iterator[None]:
    """Within, that handler for a signal; where Python lets no handler be set, outside the main thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _run_command(argv: list[str]) -> int:
    if argv[:1] == ["pretrain"]:  # it reads its own options
        from smlib import pretraining

        return pretraining.main(argv[1:]) or 0
    args = _parser().parse_args(argv)
    _check_options(args)
    if getattr(args, "task", "") is None:
        from smlib.settings import default_task

        args.task = default_task(args.preset)
    if args.command == "results":
        from smlib import results

        results.main(args.runs, ROOT / "results")
        return 0
    if args.command == "data":
        return show_data(args.datasets)
    if args.command == "sample":
        return sample(args)
    if args.command == "stage":
        return stage(args)
    if args.command == "policy":
        return policy(args)
    if args.command == "explore":
        return explore(args)
    from smlib.pipeline import run_folder  # here, because they import torch
    from smlib.settings import preset

    settings = settings_of(args)  # refuses an unknown name before anything is written
    from smlib import pipeline, plan

    if args.verify:
        return verify(run_folder(args.out or "", args.preset, args.task, args.seed).resolve())
    named, values = {"PRESET": args.preset, "TASK": args.task, "SEED": args.seed}, dict(args.set)
    named |= {name: value for name, value in values.items() if "." not in name}
    if changed := overrides(args):
        named["OVERRIDES"] = changed
    _, given = requested(ROOT / "notebooks", named, args.first, args.last)
    pipeline.check_policy(settings, "ppo", given.get("REWARD", "learned"), given.get("TRACKER", ""))
    preset(given.get("LARGE", "llama2-7b"), given.get("LARGE_TASK", "gsm8k"), args.seed)
    if args.dry_run:
        print(dry_run(settings))
        return 0
    pipeline.refuse_processes(["a run of the notebooks"])
    plan.check(settings)
    out = run_folder(args.out or "", args.preset, args.task, args.seed).resolve()
    run(ROOT / "notebooks", out, named, first=args.first, last=args.last)
    if args.publish:
        publish(out, ROOT)
    if args.refresh:
        refresh(out, ROOT / "notebooks")
    print(f"Open {out / 'index.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smlib", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the notebooks in order, or go on where a run stopped")
    _add_settings(run, "run folder (default: runs/PRESET-TASK-seedSEED)")
    again = "execute again from notebook N on (a finished stage is read; delete its folder to redo it)"
    run.add_argument("--from", dest="first", type=int, metavar="N", help=again)
    run.add_argument("--to", dest="last", type=int, metavar="N", help="stop after notebook N")
    run.add_argument("--dry-run", action="store_true", help="print what it takes: samples, memory, hours, disk")
    run.add_argument("--verify", action="store_true", help="read every file of the run and say what is damaged")
    run.add_argument("--publish", action="store_true", help="copy figures and results to the repository's")
    run.add_argument("--refresh", action="store_true", help="put the executed notebooks into notebooks/")
    results = commands.add_parser("results", help="pool finished runs of several seeds: a table, results/PRESET.csv")
    results.add_argument("runs", nargs="+", metavar="RUN", help="run folder; the runs differ in their seed alone")
    data = commands.add_parser("data", help="fetch and check the published datasets, and count their rows")
    data.add_argument("datasets", nargs="*", metavar="DATASET", help="such as gsm8k (default: all thirteen)")
    sample = commands.add_parser("sample", help="draw samples in bulk, to disk; the same command goes on or widens")
    sample.add_argument("dataset", help="a generated task such as coin_flip, or a published one such as gsm8k")
    sample.add_argument("--out", required=True, metavar="FOLDER", help="folder of the shards")
    sample.add_argument("--split", default="train", help="train (default) or test")
    sample.add_argument("--questions", type=int, metavar="N", help="the first N (default: all; generated: 1,000)")
    sample.add_argument("--samples", type=int, default=8, metavar="K", help="per question (default 8)")
    sample.add_argument(
        "--model", default="tiny", help="tiny (default), smollm2, a folder, a GGUF file or a hub id, with @REVISION"
    )
    sample.add_argument("--shots", default="none", help="exemplars before the question: none (default), smlib or wei")
    asks = "plain (default), or chat: the model's own chat template"
    sample.add_argument("--prompt", default="plain", choices=("plain", "chat"), help=asks)
    sample.add_argument("--engine", default="native", help="native (default) or vllm")
    precision = "of the model (default: float32; of vllm what the files have)"
    sample.add_argument("--weights", choices=("float32", "bfloat16", "nf4"), help=precision)
    sample.add_argument("--rows", type=int, help="samples that the native engine draws at once (default 512)")
    bound = "tokens whose keys and values the native engine holds (default 0: no bound but the rows)"
    sample.add_argument("--cache-tokens", type=int, default=0, help=bound)
    sample.add_argument("--workers", type=int, default=1, help="processes of Ray's that draw (default 1: without Ray)")
    sample.add_argument("--temperature", type=float, default=1.0)
    sample.add_argument("--top-p", type=float, default=1.0)
    sample.add_argument("--max-new-tokens", type=int, default=128)
    sample.add_argument("--seed", type=int, default=0)
    shard = "questions in one file: what a kill loses (default 64; with workers more, as they start anew for each)"
    sample.add_argument("--shard", type=int, default=64, help=shard)
    stage = commands.add_parser("stage", help="make stages of a run, without notebooks, in one process or many")
    stages = "a stage's folder, such as 02_sft or 06_rft (default: 01_sampling to 05_evaluation, in order)"
    stage.add_argument("names", nargs="*", metavar="NAME", help=stages)
    _add_settings(stage, "run folder with the stages that come before (default: runs/PRESET-TASK-seedSEED)")
    policy = commands.add_parser("policy", help="stage 04 alone, by a method of choice, in one process or many")
    _add_settings(policy, "run folder with stages 01 to 03 (default: runs/PRESET-TASK-seedSEED)")
    policy.add_argument("--method", default="ppo", help="ppo (default), or rloo or grpo by TRL")
    formula = "learned (default), checker, or a sum such as 'learned - 0.1*words'"
    policy.add_argument("--reward", default="learned", help=formula)
    policy.add_argument(
        "--tracker", default="", help="of ppo: log to one of accelerate's trackers too, such as tensorboard"
    )
    explore = commands.add_parser(
        "explore", help="stages 06, Self-Explore: where wrong rationales go wrong, and DPO there"
    )
    there = "run folder; stages 01 and 02 are made where missing (default: runs/PRESET-TASK-seedSEED)"
    _add_settings(explore, there)
    commands.add_parser("pretrain", help="make the tiny base model again; see pretrain --help")
    for one in (parser, *commands.choices.values()):  # `main` takes it out, so that its place does not matter
        one.add_argument("--debug", action="store_true", help="with any command: show the traceback of an error too")
    return parser


def _add_settings(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that say what a run is."""
    parser.add_argument("--preset", default="tiny", help="tiny (default), smoke, rehearsal, llama2-7b, ...")
    tasks = "a generated task such as coin_flip, a published dataset such as gsm8k (default of the large presets), or "
    parser.add_argument("--task", help=tasks + "all generated ones (default of the others)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", help="in place of the preset's: smollm2, a folder, a GGUF file, or a hub id, best with @REVISION"
    )
    change = "change a setting (ppo.updates=10) or a notebook's parameter (REWARD=checker); repeatable"
    parser.add_argument("--set", action="append", default=[], type=_assignment, metavar="NAME=VALUE", help=change)
    parser.add_argument("--out", metavar="RUN", help=out)


def _check_options(args) -> None:
    """Raise UsageError for an option's value that is not allowed, before anything is loaded or written."""
    for name, value in vars(args).items():
        if name in OPTIONS and value is not None:
            option = name if name == "dataset" else "--" + name.replace("_", "-")
            setattr(args, name, declared.checked(option, value, OPTIONS[name]))
    if getattr(args, "out", None) is not None:
        declared.named_folder("--out", args.out)


def overrides(args) -> dict:
    """What --model and --set change of the preset, as `settings.preset` takes it."""
    changed: dict = {}
    if args.model:  # notebooks run in another folder
        changed["base"] = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    for name, value in args.set:
        group, dot, setting = name.partition(".")
        if dot:
            changed.setdefault(group, {})[setting] = value
    return changed


def settings_of(args):
    from smlib.settings import Settings, preset

    groups = [field.name for field in fields(Settings) if is_dataclass(field.type)]
    for name, value in args.set:
        if name in groups:
            raise UsageError(
                f"{name} = {declared.shown(value)} is not allowed: {name} is a group of settings, so name one of them, "
                "as in ppo.updates=10"
            )
        if args.command != "run" and "." not in name:
            raise UsageError(
                f"{name} is no setting, such as ppo.updates; notebooks' parameters are for the command run"
            )
    return preset(args.preset, args.task, args.seed, **overrides(args))


def dry_run(settings) -> str:
    """The plan; where the dataset's questions are not to be had, of the generated coin flips in their place."""
    from smlib import plan

    try:
        plan.check_settings(settings, plan.config_of(settings.base))
        return plan.describe(settings)
    except DatasetError as error:
        found = plan.describe(replace(settings, tasks=("coin_flip",)))
        return f"{error}\nPlanned for the generated coin flips instead, whose questions are short:\n\n{found}"


def show_data(datasets: list[str]) -> int:
    """Load every split of the datasets, fetching what is not there; 1 if one cannot be used."""
    failed, named = 0, {dataset: splits(dataset) for dataset in datasets or PUBLISHED}  # refuses an unknown one
    for dataset, parts in named.items():
        counts, problems = [], []
        for split in parts:
            try:
                counts.append(f"{split} {len(load(dataset, split)):,}")
            except DatasetError as error:
                problems.append(str(error))
        failed += len(problems)
        reasons = [f"cannot be used: {reason}" for reason in dict.fromkeys(problems)]
        print(f"{dataset:19}" + "   ".join(counts + reasons))
    return min(failed, 1)


def sample(args) -> int:
    """Draw samples of a dataset's questions into a folder of shards (smlib.bulk)."""
    from smlib import models, pipeline, prompts
    from smlib.bulk import Bulk
    from smlib.engines import make_engine
    from smlib.sampling import check_room

    pipeline.refuse_processes(["a folder of samples"])
    prompts.shots(args.dataset, args.shots)  # refuses a dataset without them before the model is loaded
    if args.dataset in TASKS:
        problems = generate(args.dataset, args.questions or 1000, args.seed, split=args.split)
    else:
        problems = load(args.dataset, args.split, limit=args.questions)
    # "asked" tells folders of prompts that are token ids from older ones
    source = {"asked": "token ids", "dataset": args.dataset}
    source |= {"base": args.model, "base_sha256": models.weights_sha256(args.model)}
    if args.weights not in (None, "float32"):
        source["weights"] = args.weights
    if args.prompt != "plain":
        source["prompt"] = args.prompt
    held = {"weights": args.weights, "cache_tokens": args.cache_tokens, "workers": args.workers, "prompt": args.prompt}
    if args.rows is not None:
        held["rows"] = args.rows
    adapter = models.adapter_config(args.model)
    config = models.load_config(adapter.base_model_name_or_path if adapter else args.model)
    check_room("--max-new-tokens", args.max_new_tokens, config)
    engine = make_engine(args.engine, args.model, **held)
    bulk = Bulk(Path(args.out), engine, source, args.shard)
    counts = bulk.draw(
        _Asked(engine.tokenizer, problems, args.shots), args.samples, temperature=args.temperature, top_p=args.top_p,
        max_new_tokens=args.max_new_tokens, seed=args.seed, stop=prompts.stop(args.shots), progress=args.dataset,
    )  # fmt: skip
    print(
        f"{args.out}: {len(problems):,} questions, {counts['drawn']:,} samples drawn, {counts['found']:,} were there"
        + f", {counts['dropped']} damaged files drawn again" * bool(counts["dropped"])
    )
    return 0


class _Asked:
    """(key, prompt) of every question; its tokens are made when it is its turn, so that they are not all in memory."""

    def __init__(self, tokenizer, problems: list, shots: str):
        self.tokenizer, self.problems, self.shots = tokenizer, problems, shots

    def __len__(self):
        return len(self.problems)

    def __iter__(self):
        from smlib.encoding import encode_question

        return ((one.id, encode_question(self.tokenizer, one, shots=self.shots)) for one in self.problems)


def stage(args) -> int:
    """Make the stages named, in their order, under `accelerate launch` too, and print where each is and its headline.

    Raises ValueError for an unknown name, and in several processes for a stage that they do not share, before any work.
    """
    from smlib import explore_pipeline, pipeline, plan

    settings, stages = settings_of(args), pipeline.STAGES | explore_pipeline.STAGES
    if unknown := [name for name in args.names if name not in stages]:
        raise UsageError(f"stage {unknown[0]!r} is unknown; choose from: {', '.join(stages)}")
    names = [name for name in stages if name in (args.names or pipeline.STAGES)]
    pipeline.refuse_processes(names)
    run = pipeline.run_folder(args.out or "", args.preset, args.task, args.seed)
    if missing := [name for name in names if not (run / name / MANIFEST).exists()]:
        plan.check(settings, missing)
    main = pipeline.launched().is_main_process
    with _luck_warned_of_once():
        for name in names:
            state = " (done before)" if (run / name / MANIFEST).exists() else ""
            manifest = stages[name](run, settings, progress=main).manifest
            if main:
                rows = ", ".join(f"{count:,} {file}" for file, count in manifest["counts"].items())
                print(f"{run / name}: {rows}, {manifest['wall_seconds']:.1f} s{state}", flush=True)
    pipeline.leave()
    return 0


@contextmanager
def _luck_warned_of_once() -> Iterator[None]:
    """The warning that completions were right by luck: once a dataset, without a line of code."""
    from smlib.explore import LuckWarning

    with warnings.catch_warnings():
        warnings.simplefilter("once", LuckWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def policy(args) -> int:
    """Train the policy of a run whose stages 01 to 03 are done, under `accelerate launch` too."""
    from smlib import pipeline, plan

    settings = settings_of(args)
    pipeline.check_policy(settings, args.method, args.reward, args.tracker)
    plan.check(settings, ["04_ppo"])
    run = pipeline.run_folder(args.out or "", args.preset, args.task, args.seed)
    stage = pipeline.train_policy(run, settings, args.method, args.reward, tracker=args.tracker)
    if pipeline.launched().is_main_process:
        print(f"{stage.folder}: model/ is the policy, training/log.csv its way there")
    pipeline.leave()
    return 0


def explore(args) -> int:
    """Run the stages of Self-Explore on a run folder, and print what they found."""
    from smlib import explore_pipeline, pipeline, plan

    settings = settings_of(args)
    pipeline.refuse_processes(explore_pipeline.BEFORE | explore_pipeline.STAGES)
    plan.check(settings, explore_pipeline.BEFORE | explore_pipeline.STAGES)
    run = pipeline.run_folder(args.out or "", args.preset, args.task, args.seed)
    with _luck_warned_of_once():
        explore_pipeline.run(run, settings)
    print(f"\n{explore_pipeline.summary(run, settings)}\n\n[ ]: 95 % intervals over questions. Stages: {run}/06_*")
    return 0


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".")) or name.count(".") > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as ppo.updates=10 or REWARD=checker")
    if name in ("PRESET", "TASK", "SEED", "RUN_DIR"):
        raise argparse.ArgumentTypeError(f"{name} has an option of its own, see --help")
    if name == "OVERRIDES":
        raise argparse.ArgumentTypeError("OVERRIDES is what --set makes of settings: name each, as in ppo.updates=10")
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    try:
        return name, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval raises
        return name, value


def run(notebooks_dir: Path, out: Path, values: dict, *, first: int | None = None, last: int | None = None):
    """Execute the numbered notebooks of a folder, in order, into `out`; those that are done are skipped.

    values: parameters by name. Each notebook gets those its parameters cell has, and RUN_DIR.
    A notebook is done when it was executed with the same source and parameters, and no notebook before it has
    been executed since. `first` executes again from that number on. Raises RunError at the first failure.
    """
    sources, values = requested(notebooks_dir, values, first, last)
    with locked(out / ".locks" / "run.lock", f"running the notebooks of {out}"):
        _claim(out, values)
        _run(sources, out, values, first, last)


def _run(sources: dict, out: Path, values: dict, first: int | None, last: int | None) -> None:
    timings, expected = _timings(out), _earlier_seconds(out, values)
    _write_index(out, values, timings)
    for position, (path, notebook) in enumerate(sources.items(), start=1):
        number, name = int(path.name[:2]), path.stem
        if (first is not None and number < first) or (last is not None and number > last):
            continue
        label = f"[{position}/{len(sources)}] {name}"
        mine = {key: value for key, value in values.items() if key in parameters(notebook)}
        entry = {"source": _source_hash(notebook), "parameters": mine}
        before = timings.get(name)
        same = before and all(before[key] == entry[key] for key in entry)
        if same and first is None and not _lost(out, before, number):
            print(f"{label} · done before")
            continue
        timings = {stem: entry for stem, entry in timings.items() if stem < name}  # the rest gets new inputs
        _write(out / "timings.json", timings)
        left = [expected.get(later.stem) for later in list(sources)[position - 1 :] if _within(later, last)]
        given = {"RUN_DIR": str(out)} if "RUN_DIR" in parameters(notebook) else {}
        there = _shown(out)
        try:
            with _Watch(label, left) as watch:
                _execute(path, out / "notebooks" / path.name, mine | given, watch)
            made = [file for file, state in _shown(out).items() if there.get(file) != state]
            files = {file.relative_to(out).as_posix(): sha256(file) for file in made}
            timings[name] = entry | watch.measured() | {"stages": _stages(out, number), "files": files}
        finally:
            _write(out / "timings.json", timings)
            _write_index(out, values, timings)


def requested(notebooks_dir: Path, values: dict, first: int | None, last: int | None) -> tuple[dict, dict]:
    """The numbered notebooks of a folder, path -> notebook, and the values as `run` gives them to the notebooks.

    Raises RunError for a value, or a number of a notebook, that is not allowed.
    """
    sources = {path: _notebook(path) for path in sorted(notebooks_dir.glob("[0-9][0-9]_*.ipynb"))}
    if not sources:
        raise RunError(f"{notebooks_dir} holds no numbered notebooks: run inside a clone of the repository.")
    numbers = [int(path.name[:2]) for path in sources]
    for option, number in (("--from", first), ("--to", last)):
        if number is not None and number not in numbers:
            raise RunError(f"{option} {number}: there is no such notebook; choose one of {numbers}.")
    if first is not None and last is not None and first > last:
        raise RunError(f"--from {first} --to {last}: no notebook is left between them; give --to from {first} on.")
    return sources, _checked(sources, values)


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


def _timings(out: Path) -> dict[str, _Timing]:
    """What was executed in this run; nothing where the file is damaged, since to execute again costs little."""
    try:
        return load_json(out / "timings.json", _Timings) or {}
    except DamagedError as error:
        print(f"{error}: all notebooks are executed again, and the stages are read", file=sys.stderr)
        return {}


def _shown(out: Path) -> dict[Path, tuple]:
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
    stages = sorted(path for path in out.glob("[0-9][0-9]_*") if not path.name.endswith(".ipynb"))
    for folder in stages:
        try:
            _verify_stage(folder)
        except (UserError, OSError) as error:
            faults.append(explain(error, folder))
    for state, shape in states.items():
        try:
            states[state] = load_json(out / state, shape) or {}
        except (DamagedError, OSError) as error:
            faults.append(f"{error}: the next run writes it anew")
            states[state] = {}
    timings = states["timings.json"]
    for notebook, entry in timings.items():
        lost = _lost(out, entry, int(notebook[:2]))
        faults += [f"{out / name} is missing or damaged: the next run makes it again" for name in lost]
    if timings and not (out / "index.html").is_file():
        faults.append(f"{out / 'index.html'} is missing: the next run makes it again")
    if not stages and not any((out / state).exists() for state in states):
        raise RunError(f"{out} holds no run: give --out, or --preset, --task and --seed, of one that was begun.")
    whole = f"{out}: {len(stages)} stages and {len(timings)} notebooks are as they were written"
    print("\n".join(dict.fromkeys(faults)) or whole)
    return min(len(faults), 1)


def _verify_stage(folder: Path) -> None:
    """Raise UserError where a stage is not as it was written, or not finished, where its checkpoint counts too."""
    from smlib import checkpoints, ppo, trl_policy

    if (folder / MANIFEST).exists():
        require(folder.parent, folder.name).verify()
        return
    if newest := checkpoints.newest(folder / "training"):
        book = next((book for book in (ppo.BOOK, trl_policy.BOOK) if (newest / book).exists()), ppo.BOOK)
        checkpoints.opened(newest, book)
    raise StageError(f"{folder} is not finished: the next run goes on with it")


def _stages(out: Path, number: int) -> list[str]:
    """The finished stages that a notebook has made: 02 makes 02_ranking and 02_sft."""
    return sorted(path.parent.name for path in out.glob(f"{number:02d}_*/manifest.json"))


def _within(path: Path, last: int | None) -> bool:
    return last is None or int(path.name[:2]) <= last


def _notebook(path: Path):
    try:
        return nbformat.read(path, 4)
    except ValueError as error:  # nbformat's own, too
        raise RunError(f"{path} is no notebook that can be read ({error}): get it anew.") from error


def parameters(notebook) -> dict:
    """Name and default of every literal assigned in the cell tagged "parameters"; {} without such a cell."""
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            nodes = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
            try:
                return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
            except ValueError as error:
                raise RunError(f"a cell tagged 'parameters' assigns what is no literal, such as 3: {error}") from error
    return {}


def _checked(sources: dict, values: dict) -> dict:
    """The values, each of a parameter that a notebook has, as declared here or else in the type of its default."""
    from smlib.settings import PRESETS, Tasks

    kinds = {"LARGE": Literal[*PRESETS], "LARGE_TASK": Tasks}
    kinds |= dict.fromkeys(("FRESH_QUESTIONS", "HELD_OUT"), declared.Questions)
    kinds |= dict.fromkeys(("SAMPLES", "DRAWS"), declared.Samples)
    defaults, found = {}, {}
    for notebook in sources.values():
        defaults |= parameters(notebook)
    for name, value in values.items():
        if name not in defaults:
            known = ", ".join(sorted(set(defaults) - {"PRESET", "TASK", "SEED", "RUN_DIR"})) or "none"
            raise RunError(f"no notebook has a parameter {name}; those that --set can change: {known}.")
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
        print(f"{error}: it is written anew; each stage knows by itself how it was made", file=sys.stderr)
        found = values
    asked, found = _deciding(values), _deciding(found)
    for name in found | asked:
        mine, other = asked.get(name, "(not set)"), found.get(name, "(not set)")
        if mine != other:
            raise RunError(
                f"{out} holds a run with {name} = {other!r}, and now {name} = {mine!r} is asked for: "
                "choose another --out, or delete that folder."
            )
    (out / "notebooks").mkdir(parents=True, exist_ok=True)
    _write(out / "run.json", values)


def _deciding(values: dict) -> dict:
    """Without the hardware's settings that change no result: a run may go on with others."""
    changed = dict(values.get("OVERRIDES", {}))
    hardware = changed.pop("hardware", {})
    changed["hardware"] = {name: hardware[name] for name in ("weights", "engine", "rollout_engine") if name in hardware}
    return values | {"OVERRIDES": {group: value for group, value in changed.items() if value != {}}}


class _Engine(NBClientEngine):
    """papermill's own engine, which lets the watch see the cells that it executes."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, watch, **kwargs):
        watch.cells = nb_man.nb.cells
        return super().execute_managed_notebook(nb_man, kernel_name, kernel_manager_class=_Kernel, **kwargs)


class _Kernel(AsyncKernelManager):
    """jupyter's own, which is to be found, so that one that is interrupted gets more time than one that has failed."""

    latest: "_Kernel | None" = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _Kernel.latest = self


def _execute(source: Path, target: Path, values: dict, watch: "_Watch") -> None:
    """Execute one notebook in its own folder, with the interpreter and the packages that run this command."""
    os.environ.update(KERNEL_ENVIRONMENT)
    here = str(Path(sys.prefix, "share", "jupyter"))  # before any kernel that a user has registered elsewhere
    if here not in os.environ.get("JUPYTER_PATH", "").split(os.pathsep):
        os.environ["JUPYTER_PATH"] = here + os.pathsep + os.environ.get("JUPYTER_PATH", "")
    papermill_engines.register("smlib", _Engine)
    try:
        with _announced(signal.SIGINT), _announced(signal.SIGTERM):
            papermill.execute_notebook(
                source,
                target,
                values,
                engine_name="smlib",
                kernel_name="python3",
                cwd=source.parent,
                progress_bar=False,
                watch=watch,
                extra_arguments=["--log-level=50"],  # the kernel's own log is not for the reader
            )
    except papermill.PapermillExecutionError as error:
        cell = error.cell_index + (0 if values else 1)  # counted from 1, without the cell papermill put in
        raise RunError(
            f"notebook {source.stem} stopped at cell {cell} (In [{error.exec_count}]) with "
            f"{error.ename}: {error.evalue}\n"
            f"It is kept, up to that cell, in {target}. The same command goes on here once the cause is gone."
        ) from None
    except DeadKernelError:
        raise RunError(
            f"notebook {source.stem}: its Python process died at cell {watch.cell}, having used up to "
            f"{watch.peak:.0f} MiB. If memory ran out, close other programs or choose a smaller preset."
        ) from None
    except (RuntimeError, NoSuchKernel) as error:
        if not str(error).startswith(("Kernel d", "No such kernel")):  # jupyter_client has no class of its own for it
            raise
        raise RunError(
            f"notebook {source.stem}: its Python process did not start ({error}). If the machine is busy, give the "
            f"same command again; else look for the cause with: {sys.executable} -m ipykernel_launcher"
        ) from error
    finally:
        if target.exists():
            pages.write_page(target)


@contextmanager
def _announced(number: int) -> Iterator[None]:
    """Within, the signal says before it is handled that its end may take some time."""

    def handler(*arguments):
        print("\nStopping: what is running may end its step and save it first; once more to stop at once.", flush=True)
        if _Kernel.latest:
            _Kernel.latest.shutdown_wait_time = 2 * PATIENCE  # it takes half of it before SIGTERM
        before(*arguments)

    before = signal.getsignal(number)
    with _handling(number, handler) if callable(before) else nullcontext():
        yield


class _Watch:
    """Beside a running notebook: measures time and memory, shows the running cell on a terminal.

    left: seconds that this notebook and those after it took in an earlier run, None where unknown.
    """

    def __init__(self, label: str, left: list[float | None]):
        self.label, self.left = label, left
        self.cells, self.peak, self.started = [], 0.0, time.perf_counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self):
        if not sys.stdout.isatty():
            print(f"{self.label}{self._time_left()}", flush=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{start}{self.label} · {_clock(self.seconds)} · {self.peak:.0f} MiB", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def cell(self) -> int:
        """Number of the running cell, from 1; 0 before the first."""
        states = [cell.metadata.get("papermill", {}).get("status") for cell in list(self.cells)]
        return sum(state in ("running", "completed", "failed") for state in states)

    def measured(self) -> dict:
        return {"seconds": round(self.seconds, 1), "peak_mib": round(self.peak), "cells": len(self.cells)}

    def _poll(self) -> None:
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, _children_mib())
            if sys.stdout.isatty():
                state = f"cell {self.cell}/{len(self.cells)} · {_clock(self.seconds)} · {self.peak:.0f} MiB"
                line = f"{self.label} · {state}{self._time_left()}"
                print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _time_left(self) -> str:
        if None in self.left:
            return ""
        seconds = max(0, self.left[0] - self.seconds) + sum(self.left[1:])
        return f" · about {_clock(seconds)} left"


def _children_mib() -> float:
    """Resident memory of the processes below this one, in MiB; pages they share count in each."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total / 2**20


def _earlier_seconds(out: Path, values: dict) -> dict:
    """Seconds by notebook, from the newest run of this preset and task in this folder or beside it."""
    seconds = {}
    for path in sorted(out.parent.glob("*/timings.json"), key=lambda path: path.stat().st_mtime):
        with suppress(DamagedError, OSError):  # of a neighbour: it stops its own run alone
            run, timings = load_json(path.with_name("run.json")), load_json(path, _Timings)
            if run and all(run.get(key) == values.get(key) for key in ("PRESET", "TASK")):
                seconds |= {name: entry["seconds"] for name, entry in timings.items()}
    return seconds


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _source_hash(notebook) -> str:
    text = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _write_index(out: Path, values: dict, timings: dict) -> None:
    """index.html: one row for every notebook of the run, finished or not."""
    rows = []
    for page in sorted((out / "notebooks").glob("*.html")):
        entry = timings.get(page.stem)
        time_used = _clock(entry["seconds"]) if entry else "not finished"
        memory = f"{entry['peak_mib']} MiB" if entry else ""
        link = f'<a href="notebooks/{quote(page.name)}">{html.escape(page.stem)}</a>'
        rows.append(f"<tr><td>{link}</td><td>{time_used}</td><td>{memory}</td></tr>")
    asked = html.escape(", ".join(f"{name} = {value!r}" for name, value in values.items()))
    total = _clock(sum(entry["seconds"] for entry in timings.values()))
    body = f"""<h1>{html.escape(out.name)}</h1>
<p>{asked}<br>smlib {html.escape(code_version())}</p>
<table><tr><th>notebook</th><th>time</th><th>peak memory</th></tr>
{chr(10).join(rows)}
<tr><th>together</th><th>{total}</th><th></th></tr></table>"""
    write_text(out / "index.html", pages.document(out.name, body))


def publish(out: Path, root: Path) -> None:
    """Copy a run's figures/*.png and results/*.csv to the folders of the same name in the repository."""
    for folder, pattern in (("figures", "*.png"), ("results", "*.csv")):
        (root / folder).mkdir(exist_ok=True)
        for path in sorted((out / folder).glob(pattern)):
            with replacing(root / folder / path.name) as tmp:
                shutil.copyfile(path, tmp)


def refresh(out: Path, notebooks_dir: Path) -> None:
    """Put a run's executed notebooks into the repository, as if a reader had executed them in place.

    Only a run with the notebooks' own parameters can be: else their outputs would contradict their source.
    """
    timings = _timings(out)
    for path in sorted(notebooks_dir.glob("[0-9][0-9]_*.ipynb")):
        defaults = parameters(_notebook(path))
        if path.stem not in timings:
            raise RunError(f"{out} has not finished {path.stem}: run it before --refresh.")
        for name, value in timings[path.stem]["parameters"].items():
            if value != defaults[name]:
                raise RunError(f"--refresh needs {name} = {defaults[name]!r}, as in {path.name}, not {value!r}.")
        notebook = _notebook(out / "notebooks" / path.name)
        local = {str(out): defaults.get("RUN_DIR", ""), str(notebooks_dir.parent): ".."}
        with replacing(path) as tmp:
            nbformat.write(_cleaned(notebook, local), tmp)


def _cleaned(notebook, local: dict):
    """Without papermill's traces, execution times and the paths of this machine (keys of `local`)."""
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
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
                    output.text = _as_shown(output.text)
            cell.outputs = [output for output in outputs if output.get("text") != ""]
    notebook.cells = cells
    notebook.metadata.pop("papermill", None)
    return notebook


def _as_shown(text: str) -> str:
    """What a terminal shows of a text at the end: of a line written over by carriage returns, the last."""
    return re.sub(r"[^\n]*\r(?=[^\n\r]*[^\s])|[^\n]*\r[^\S\n]*", "", text)


if __name__ == "__main__":
    sys.exit(main())
