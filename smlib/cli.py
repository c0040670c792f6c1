"""The command line, `smlib COMMAND` or `python -m smlib COMMAND`: a function for each command, and its options.

A run is a folder. `run` fills it by executing the notebooks (smlib.notebooks.runner says what is in it); `stage`,
`train-policy` and `explore` make the same stages without notebooks. A command imports what takes seconds (torch,
papermill) when it needs it: a wrong option is refused at once.
"""

import argparse
import ast
import json
import logging
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import yaml
from pydantic import Field

from smlib import declared
from smlib.errors import UsageError, UserError, of_extra
from smlib.files import folders
from smlib.files.artifacts import MANIFEST, require
from smlib.files.atomic import explain
from smlib.ppo.settings import POLICY_METHODS
from smlib.problems import datasets
from smlib.problems.datasets import GENERATED, PUBLISHED, TASKS, TRAIN_SETS, generate, load, splits
from smlib.problems.downloads import DatasetError
from smlib.runs.questions import train_questions
from smlib.runs.settings import PRESETS, Settings, default_task, preset
from smlib.signals import handling

EXAMPLES = """examples:
  smlib run --preset smoke --task coin_flip
  smlib settings llama2-7b hardware
  smlib sample gsm8k --model smollm2 --samples 4 --out samples"""
NUMBER = {"type": int, "metavar": "N"}
MEASURED_TOKENS = 32  # of a completion, to measure how fast a machine is
ASKED = ("PRESET", "TASK", "SEED", "OVERRIDES")  # what a run is asked to be, in run.json and in --config
PRESET = {
    "choices": PRESETS,
    "metavar": "PRESET",
    "help": "named settings: " + ", ".join(PRESETS).replace("tiny", "tiny (default)", 1),
}
GROUPS = {field.name: field.type for field in fields(Settings) if is_dataclass(field.type)}
DRAWING = {  # options of `sample` that are settings, by the same names
    name: declared.described(GROUPS[group])[name]
    for group, names in {
        "sampling": ("shots", "prompt", "temperature", "top_p", "max_new_tokens"),
        "hardware": ("engine", "dtype", "max_batch", "cache_tokens", "workers"),
    }.items()
    for name in names
}
OPTIONS = {name: one.kind for name, one in DRAWING.items()} | {  # what an option may be, whatever the command
    "model": declared.Text,
    "config": declared.Text,
    "seed": declared.Seed,
    "questions": declared.Questions,
    "samples": declared.Samples,
    "shard": declared.Rows,
    "documents": Annotated[int, Field(ge=1, le=10_000_000)],
    "rounds": Annotated[int, Field(ge=1, le=10)],  # the eleventh would ask questions of the first
    "hidden": Annotated[int, Field(ge=32, le=65_536)],
    "layers": Annotated[int, Field(ge=1, le=1_000)],
    "tokens_per_batch": declared.Tokens,
}


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
        with handling(signal.SIGTERM, _terminate):
            args = _parser().parse_args([argument for argument in argv if argument != "--debug"])
            _check_options(args)
            return args.do(args) or 0
    except (UserError, OSError) as error:  # OSError: a file that is missing or may not be written, a full disk
        if "--debug" in argv:
            traceback.print_exc()
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        logging.getLogger("asyncio").disabled = True  # at exit it would print the traceback of the interrupted cell
        print("\nStopped. Run the same command again to resume.", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which does what Ctrl-C does."""


def _terminate(*_) -> None:
    raise _Terminated


# ---- options -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    wide = partial(argparse.RawTextHelpFormatter, max_help_position=24)
    what = "A language model learns to reason from its own rationales."
    parser = argparse.ArgumentParser(
        prog="smlib",
        allow_abbrev=False,
        usage="%(prog)s COMMAND [OPTIONS]",
        description=what,
        epilog=EXAMPLES,
        formatter_class=wide,
    )
    title = "commands (smlib COMMAND --help lists the options of one)"
    commands = parser.add_subparsers(prog="smlib", title=title, metavar="COMMAND [OPTIONS]", required=True)

    def command(name: str, do, what: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, allow_abbrev=False, help=what, description=f"{what[0].upper()}{what[1:]}.")
        one.set_defaults(do=do)
        return one

    _run_options(command("run", run_notebooks, "execute the notebooks, or resume a run that stopped"))
    stage = command("stage", make_stages, "make the stages of a run without notebooks")
    stages = "stage to make, such as 02_sft or 06_rft (default: all from 01_sampling to 05_evaluation)"
    stage.add_argument("names", nargs="*", metavar="NAME", help=stages)
    _add_run(stage, "run folder; the earlier stages must be in it")
    rounds = "rounds of these stages; each starts from the SML model of the one before, in RUN/rounds/2 and so on"
    stage.add_argument("--rounds", default=1, **NUMBER, help=f"{rounds} (default 1)")
    policy = command("train-policy", train_policy, "train the policy (stage 04) by PPO, RLOO or GRPO")
    _add_run(policy, "run folder with stages 01 to 03")
    policy.add_argument("--method", default="ppo", choices=POLICY_METHODS, help="RLOO and GRPO are TRL's (default ppo)")
    tracker = "for PPO: also log to one of accelerate's trackers, such as tensorboard"
    policy.add_argument("--tracker", default="", help=tracker)
    explore = command("explore", make_self_explore, "run Self-Explore (stages 06): first wrong steps, then DPO")
    _add_run(explore, "run folder; stages 01 and 02 are made if they are missing")
    _sample_options(command("sample", draw_samples, "sample answers to a dataset's questions, and save them"))
    results = command("results", pool_results, "pool finished runs of several seeds into results/PRESET.csv")
    results.add_argument("runs", nargs="+", metavar="RUN", help="run folder; the runs must differ only in their seed")
    browse = command("browse", write_browse_page, "write RUN/browse.html, a page with all answers of a run")
    browse.add_argument(
        "run", metavar="RUN", help="run folder with a finished 05_evaluation; its run.json gives its settings"
    )
    browse.add_argument("--preset", **PRESET)
    browse.add_argument("--seed", **NUMBER, help="the run's seed, if its folder has no run.json (default 0)")
    _add_changes(browse)
    settings = command("settings", show_settings, "print a preset's settings and what they mean")
    settings.add_argument("preset", nargs="?", **PRESET)
    settings.add_argument("group", nargs="?", choices=GROUPS, metavar="GROUP", help=f"one of: {', '.join(GROUPS)}")
    _add_changes(settings)
    data = command("data", show_data, "download and check the published datasets")
    data.add_argument("datasets", nargs="*", metavar="DATASET", help="dataset, such as gsm8k (default: all fourteen)")
    _pretrain_options(command("pretrain", make_base, "pretrain a tiny base model, like the one in the package"))
    for one in (parser, *commands.choices.values()):  # `main` takes it out, so that its place does not matter
        told = "also show an error's traceback" if one is not parser else argparse.SUPPRESS
        one.add_argument("--debug", action="store_true", help=told)
    return parser


def _run_options(run: argparse.ArgumentParser) -> None:
    _add_run(run, "run folder")
    again = "execute notebooks again, from number N on; they read finished stages (to redo one, delete its folder)"
    run.add_argument("--from", dest="first", **NUMBER, help=again)
    run.add_argument("--to", dest="last", **NUMBER, help="stop after notebook N")
    dry = "only print what it takes: samples, memory, hours, disk; of a base that is here, hours on this machine too"
    run.add_argument("--dry-run", action="store_true", help=dry)
    run.add_argument("--verify", action="store_true", help="only read every file of the run, and say what is damaged")
    run.add_argument("--publish", action="store_true", help="when done, copy figures and results into the repository")
    run.add_argument("--refresh", action="store_true", help="when done, copy the executed notebooks into notebooks/")


def _add_run(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that say what a run is, and where."""
    parser.add_argument("--preset", **PRESET)
    parser.add_argument("--seed", **NUMBER, help="random seed for questions, samples and training (default 0)")
    _add_changes(parser)
    parser.add_argument("--out", metavar="RUN", help=f"{out} (default: runs/PRESET-TASK-seedSEED)")


def _add_changes(parser: argparse.ArgumentParser) -> None:
    """The options that change a preset."""
    tasks = (
        f"all (the generated tasks of reasoning), one of them ({', '.join(TASKS)}), translation, or a published "
        f"dataset ({', '.join(TRAIN_SETS)})"
    )
    parser.add_argument(
        "--task", choices=("all", *GENERATED, *TRAIN_SETS), metavar="TASK",
        help=f"{tasks}; default: word_problems for smollm2, gsm8k for presets with a Hub model, else all",
    )  # fmt: skip
    parser.add_argument(
        "--model", help="base instead of the preset's: tiny, smollm2, a folder, a GGUF file, or a Hub id with @REVISION"
    )
    change = "change a setting, such as ppo.updates=10 or ppo.reward=checker (`smlib settings` lists them), or, for "
    change += "`smlib run`, a notebook's parameter, such as HELD_OUT=10; may be repeated"
    parser.add_argument("--set", action="append", default=[], type=_assignment, metavar="NAME=VALUE", help=change)
    file = f"YAML file, or another run's run.json, with {', '.join(ASKED)}; command-line options override it"
    parser.add_argument("--config", metavar="FILE", help=file)


def _sample_options(sample: argparse.ArgumentParser) -> None:
    sample.description += (
        " Run the same command again to resume; a larger --samples draws only the samples that are missing. The "
        f"options {', '.join('--' + name.replace('_', '-') for name in DRAWING)} mean what the settings of the same "
        "names mean (`smlib settings tiny sampling`, `smlib settings tiny hardware`). Without --dtype, vLLM uses the "
        "dtype of the model's files."
    )
    names = (*GENERATED, *(name for name in PUBLISHED if name not in GENERATED))
    sample.add_argument("dataset", choices=names, metavar="DATASET", help=f"one of: {', '.join(names)}")
    sample.add_argument("--out", required=True, metavar="FOLDER", help="folder for the samples")
    sample.add_argument(
        "--split", default="train", help="train (default) or test; a published dataset also has all, and math test_500"
    )
    first = "only the first N questions (default: all; 1,000 of a generated task)"
    sample.add_argument("--questions", **NUMBER, help=first)
    sample.add_argument("--samples", type=int, default=8, metavar="K", help="samples per question (default 8)")
    sample.add_argument(
        "--model", default="tiny", help="tiny (default), smollm2, a folder, a GGUF file, or a Hub id with @REVISION"
    )
    for name, one in DRAWING.items():
        _add_setting(sample, name, one)
    sample.set_defaults(dtype=None)
    sample.add_argument("--seed", default=0, **NUMBER, help="random seed for questions and samples (default 0)")
    shard = "questions per file; a killed command loses one file at most (default 64; raise it with --workers)"
    sample.add_argument("--shard", default=64, **NUMBER, help=shard)


def _add_setting(parser: argparse.ArgumentParser, name: str, one: declared.Described) -> None:
    """A setting as an option: of the same name, with the same values, meaning and default."""
    if get_origin(one.kind) is Literal:
        values = {"choices": get_args(one.kind)}
    else:
        values = {"type": type(one.default), "metavar": "N"}
    meaning = f"{one.meaning} (default {one.default})".replace("%", "%%")
    parser.add_argument("--" + name.replace("_", "-"), default=one.default, help=meaning, **values)


def _pretrain_options(pretrain: argparse.ArgumentParser) -> None:
    there = "folder to write, new or empty, to be used by --model FOLDER; the package's own base is not changed"
    pretrain.add_argument("--out", required=True, metavar="FOLDER", help=there)
    pretrain.add_argument(
        "--documents", default=150_000, **NUMBER, help="training documents, each read once (default 150,000)"
    )
    told = f"what the documents are about: all (the generated tasks of reasoning), or one of {', '.join(GENERATED)}"
    pretrain.add_argument("--task", default="all", choices=("all", *GENERATED), metavar="TASK", help=told)
    pretrain.add_argument("--hidden", default=128, **NUMBER, help="hidden size, a multiple of 32 (default 128)")
    pretrain.add_argument("--layers", default=3, **NUMBER, help="number of layers (default 3)")
    kinds = get_args(declared.Architecture)
    pretrain.add_argument("--architecture", default="llama", choices=kinds, help="kind of model (default llama)")
    pretrain.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="base to continue from (default: random weights)"
    )
    tokens = "tokens per batch; a longer document gets its own batch (default 4,096)"
    pretrain.add_argument("--tokens-per-batch", default=4096, **NUMBER, help=tokens)
    pretrain.add_argument("--seed", default=0, **NUMBER, help="random seed for weights and documents (default 0)")


def _check_options(args: argparse.Namespace) -> None:
    """Raise UsageError for an option's value that is not allowed, before anything is loaded or written."""
    for name, value in vars(args).items():
        if name in OPTIONS and value is not None:
            setattr(args, name, declared.checked("--" + name.replace("_", "-"), value, OPTIONS[name]))
    if getattr(args, "out", None) is not None:
        declared.named_folder("--out", args.out)


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in name.split(".")) or name.count(".") > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as ppo.updates=10")
    if name in ("PRESET", "TASK", "SEED", "RUN_DIR"):
        raise argparse.ArgumentTypeError(f"{name} has an option of its own, see --help")
    if name == "base":
        raise argparse.ArgumentTypeError("base has an option of its own, --model")
    if name == "OVERRIDES":
        raise argparse.ArgumentTypeError("OVERRIDES cannot be set as a whole: name each setting, as in ppo.updates=10")
    return name, _value(value)


def _value(text: str):
    """What a text stands for: true or false, a literal of Python's such as 1e-5, else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval raises
        return text


# ---- what a run is asked to be -------------------------------------------------------------------------------


def _asked(args: argparse.Namespace) -> dict:
    """What a run is asked to be, by the names of run.json: the command line before --config before the defaults.

    PRESET, TASK, SEED, what OVERRIDES the preset, and for the command `run` notebooks' parameters.
    """
    parameters = args.do is run_notebooks
    found = _config(args.config, parameters) if args.config else {}
    overrides = found.pop("OVERRIDES", {})
    given = {"PRESET": args.preset, "TASK": args.task, "SEED": getattr(args, "seed", None)}
    found |= {name: value for name, value in given.items() if value is not None}
    if args.model:
        overrides["base"] = args.model
    for name, value in args.set:
        group, dot, setting = name.partition(".")
        if name in GROUPS:
            raise UsageError(
                f"{name} = {declared.shown(value)} is not allowed: {name} is a group of settings, so name one of them, "
                "as in ppo.updates=10"
            )
        if dot:
            if not isinstance(values := overrides.setdefault(group, {}), dict):
                raise UsageError(f"{name} cannot be set: {group} is already {declared.shown(values)}; leave one out")
            values[setting] = value
        elif parameters:
            found[name] = value
        else:
            raise UsageError(
                f"{name} is not a setting: give a name such as ppo.updates (only `smlib run` takes notebook parameters)"
            )
    if isinstance(base := overrides.get("base"), str) and base and Path(base).exists():
        overrides["base"] = str(Path(base).resolve())  # notebooks run in another folder
    for name in overrides:
        declared.checked("setting", name, Literal["base", *GROUPS])
    chosen = declared.checked("preset", found.get("PRESET", "tiny"), Literal[*PRESETS])
    defaults = {"PRESET": chosen, "TASK": default_task(chosen), "SEED": 0}
    return defaults | found | ({"OVERRIDES": overrides} if overrides else {})


def _config(file: str, parameters: bool) -> dict:
    """What a YAML file, or the run.json of a run, asks for. parameters: whether it may name notebooks' parameters; a
    run.json may, and commands that execute no notebooks leave them aside."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _Yaml)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = textwrap.shorten(getattr(error, "strerror", None) or str(error), 200)
        raise UsageError(f"--config {file} cannot be read ({said}): give a YAML file, or a run's run.json") from None
    overrides = found.get("OVERRIDES") or {} if isinstance(found, dict) else None
    if not isinstance(overrides, dict):
        raise UsageError(
            f"--config {file} is not allowed: give lines such as PRESET: tiny, or OVERRIDES: {{ppo: {{updates: 10}}}}"
        )
    named = [name for name in found if name.isupper() and name not in (*ASKED, "RUN_DIR")]
    for name in found:
        if name not in ASKED and not (name in named and (parameters or path.suffix == ".json")):
            more = ", or a notebook's parameter" * parameters
            raise UsageError(
                f"--config {file} has {declared.shown(name)}, which is unknown; choose one of: {', '.join(ASKED)}{more}"
            )
    kept = {name: value for name, value in found.items() if parameters or name not in named}
    return kept | ({"OVERRIDES": overrides} if overrides else {})


def _once(pairs: list[tuple[str, object]]) -> dict:
    """The pairs of a mapping as a dict; ValueError where a name comes twice."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


class _Yaml(yaml.BaseLoader):
    """Reads values as --set does (to YAML itself 010 is 8 and 1e-5 a text), each name once, and no aliases."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError("an alias, *name, is not allowed: write the value itself")
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise ValueError(f"a tag, {node.tag}, is not allowed: write the value itself")
        if isinstance(node, yaml.MappingNode):
            if not all(isinstance(name, yaml.ScalarNode) for name, _ in node.value):
                raise ValueError("a name must be a word, such as PRESET")
            return _once([(str(name.value), self.construct_object(value, deep=True)) for name, value in node.value])
        found = super().construct_object(node, deep=True)
        return _value(found) if isinstance(found, str) else found


def _settings(asked: dict) -> Settings:
    return preset(asked["PRESET"], asked["TASK"], asked["SEED"], **asked.get("OVERRIDES", {}))


def _run_folder(args: argparse.Namespace, asked: dict) -> Path:
    from smlib.runs.shared import run_folder

    return run_folder(args.out or "", asked["PRESET"], asked["TASK"], asked["SEED"])


# ---- commands ------------------------------------------------------------------------------------------------


def run_notebooks(args: argparse.Namespace) -> int | None:
    """Execute the notebooks, plan it, or verify what is there."""
    asked = _asked(args)
    settings = _settings(asked)  # refuses what is not allowed before anything is written
    with of_extra("notebooks"):
        from smlib.notebooks import runner
    from smlib.runs import self_motivated, shared
    from smlib.scale import plan

    out, repository = _run_folder(args, asked).resolve(), folders.checkout()
    if args.verify:
        return runner.verify(out)
    if (args.publish or args.refresh) and not repository:
        raise UsageError("--publish and --refresh write into the repository: run them in a clone of it")
    request = runner.request(folders.notebooks_folder(), asked, first=args.first, last=args.last)
    self_motivated.check_policy(settings, "ppo", request.values.get("TRACKER", ""))
    preset(request.values.get("LARGE", "llama2-7b"), request.values.get("LARGE_TASK", "gsm8k"), asked["SEED"])
    if args.dry_run:
        print(dry_run(settings))
        return None
    shared.refuse_processes(["a run of the notebooks"])
    plan.check(settings)
    runner.run(request, out)
    if args.publish:
        runner.publish(out, repository, times=args.first is None)
    if args.refresh:
        runner.refresh(out, repository / "notebooks")
    print(f"Open {out / 'index.html'}")


def dry_run(settings: Settings) -> str:
    """The plan, with this machine's hours where the base is here and fits; where the dataset's questions are not to be
    had, of the generated coin flips in their place."""
    from smlib.scale import plan

    told = ""
    try:
        plan.check_settings(settings, plan.config_of(settings.base))
    except DatasetError as error:
        told = f"{error}\nThis plan is for the generated coin flips instead, whose questions are short:\n\n"
        settings = replace(settings, tasks=("coin_flip",))
    here = None
    try:
        if plan.measurable(settings):
            print(f"Measuring how fast this machine is with {settings.base}: seconds, or minutes with a real model.")
            here = plan.measure(settings, settings.base, tokens=MEASURED_TOKENS)
    except UserError as error:  # such as a library for 4 bits that is not here; a plan needs none
        told += f"This machine's hours are left out: {error}\n\n"
    return told + plan.describe(settings, here)


def make_stages(args: argparse.Namespace) -> None:
    """Make the stages named, in their order, under `accelerate launch` too, and print where each is and its headline.

    Raises UsageError for an unknown name, and in several processes for a stage that they do not share, before any work.
    """
    asked = _asked(args)
    settings = _settings(asked)
    from smlib.runs import self_explore, self_motivated, shared
    from smlib.scale import plan

    stages = self_motivated.STAGES | self_explore.STAGES
    if unknown := [name for name in args.names if name not in stages]:
        raise UsageError(f"stage {unknown[0]!r} is unknown; choose from: {', '.join(stages)}")
    names = [name for name in stages if name in (args.names or self_motivated.STAGES)]
    shared.refuse_processes(names)
    run = _run_folder(args, asked)
    rounds = self_motivated.rounds(run.resolve(), settings, args.rounds)
    if args.rounds > 1 and "04_ppo" not in names:
        for folder, _ in rounds[:-1]:
            require(folder, "04_ppo")
    for folder, settings in rounds:
        if missing := [name for name in names if not (folder / name / MANIFEST).exists()]:
            plan.check(settings, missing)
        with _luck_warned_of_once():
            for name in names:
                _make_stage(folder, name, partial(stages[name], folder, settings))
    shared.end_process_group()


def _make_stage(run: Path, name: str, make: Callable) -> None:
    """Make a stage, and print in the main process where it is and its headline."""
    from smlib.sampling import devices

    main = devices.process_state().is_main_process
    state = " (already done)" if (run / name / MANIFEST).exists() else ""
    manifest = make(progress=main).manifest
    if main:
        rows = ", ".join(f"{count:,} {file}" for file, count in manifest["counts"].items())
        print(f"{run / name}: {rows}, {manifest['wall_seconds']:.1f} s{state}", flush=True)


@contextmanager
def _luck_warned_of_once() -> Iterator[None]:
    """The warning that completions were right by luck: once a dataset, without a line of code."""
    from smlib.learning.exploration import LuckWarning

    with warnings.catch_warnings():
        warnings.simplefilter("once", LuckWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


def train_policy(args: argparse.Namespace) -> None:
    """Train the policy of a run whose stages 01 to 03 are done, under `accelerate launch` too."""
    asked = _asked(args)
    settings = _settings(asked)
    from smlib.runs import self_motivated, shared
    from smlib.sampling import devices
    from smlib.scale import plan

    self_motivated.check_policy(settings, args.method, args.tracker)
    plan.check(settings, ["04_ppo"])
    stage = self_motivated.train_policy(_run_folder(args, asked), settings, args.method, tracker=args.tracker)
    if devices.process_state().is_main_process:
        print(f"{stage.folder}: the policy is in model/, the log of its training in training/log.csv")
    shared.end_process_group()


def make_self_explore(args: argparse.Namespace) -> None:
    """Run the stages of Self-Explore on a run folder, and print what they found."""
    asked = _asked(args)
    settings = _settings(asked)
    from smlib.reports import pits
    from smlib.runs import self_explore, shared
    from smlib.scale import plan

    shared.refuse_processes(self_explore.BEFORE | self_explore.STAGES)
    plan.check(settings, self_explore.BEFORE | self_explore.STAGES)
    run = _run_folder(args, asked)
    with _luck_warned_of_once():
        self_explore.run(run, settings)
    print(f"\n{pits.summary(run)}\n\n[ ]: 95 % intervals over questions. Stages: {run}/06_*")


def draw_samples(args: argparse.Namespace) -> None:
    """Draw samples of a dataset's questions into a folder of shards (smlib.sampling.shards)."""
    from smlib.problems import prompts
    from smlib.runs import shared
    from smlib.sampling import devices, models
    from smlib.sampling.factory import make_engine
    from smlib.sampling.params import SamplingParams, check_room
    from smlib.sampling.shards import Bulk

    shared.refuse_processes(["a folder of samples"])
    prompts.shots(args.dataset, args.shots)  # refuses a dataset without them before the model is loaded
    if args.dataset in GENERATED:
        problems = generate(args.dataset, args.questions or 1000, args.seed, split=args.split)
    else:
        problems = load(args.dataset, args.split, limit=args.questions)
    # "asked" tells folders of prompts that are token ids from older ones
    source = {"asked": "token ids", "dataset": args.dataset}
    source |= {"base": args.model, "base_sha256": models.weights_sha256(args.model)}
    dtype = args.dtype and devices.chosen_dtype(args.dtype)
    if dtype not in (None, "float32"):
        source["dtype"] = dtype
    if args.prompt != "plain":
        source["prompt"] = args.prompt
    check_room("--max-new-tokens", args.max_new_tokens, models.load_config(args.model))
    params = SamplingParams(
        args.temperature, args.max_new_tokens, args.seed, top_p=args.top_p, stop=prompts.stop(args.shots)
    )
    engine = make_engine(
        args.engine, args.model, dtype=dtype, max_batch=args.max_batch,
        cache_tokens=args.cache_tokens, workers=args.workers, prompt=args.prompt,
    )  # fmt: skip
    bulk = Bulk(Path(args.out), engine, source, args.shard)
    questions = _Questions(engine.tokenizer, problems, args.shots)
    counts = bulk.draw(questions, args.samples, params, progress=args.dataset)
    print(
        f"{args.out}: {len(problems):,} questions, {counts['drawn']:,} samples drawn, {counts['found']:,} already there"
        + f", {counts['dropped']} damaged files replaced" * bool(counts["dropped"])
    )


class _Questions:
    """(key, prompt) of every question; its tokens are made when it is its turn, so that they are not all in memory."""

    def __init__(self, tokenizer, problems: list, shots: str):
        self.tokenizer, self.problems, self.shots = tokenizer, problems, shots

    def __len__(self):
        return len(self.problems)

    def __iter__(self):
        from smlib.sampling.encoding import encode_question

        return ((one.id, encode_question(self.tokenizer, one, shots=self.shots)) for one in self.problems)


def pool_results(args: argparse.Namespace) -> None:
    """Print the tables of several runs, and write them to results/PRESET.csv."""
    from smlib.reports import results

    results.main(args.runs, folders.home() / "results")


def write_browse_page(args: argparse.Namespace) -> None:
    """Write the page of a run's answers. What the run is stands in its run.json, where `smlib run` has made it."""
    with of_extra("notebooks"):
        from smlib.notebooks import browse, runner

    run, said = Path(args.run), Path(args.run, "run.json")
    if not args.config and said.is_file():
        args.config = str(said)
    page = browse.write(run.resolve(), _settings(_asked(args)))
    runner.link_answers(run.resolve())
    print(f"Open {page}")


def show_settings(args: argparse.Namespace) -> None:
    """Print every setting: its value, what it means, what it may be, and the default where it has another value."""
    settings = _settings(_asked(args))
    print(f"Settings of {settings.preset}; * marks a value that differs from the default, which is tiny's.")
    print("Change one with --set, such as --set ppo.updates=10.")
    if not args.group:
        base = declared.described(Settings)["base"]
        _show("base (--model)", settings.base, replace(base, default="tiny"))
    for group in [args.group] if args.group else GROUPS:
        what = " ".join(GROUPS[group].__doc__.split())
        print("\n" + textwrap.fill(f"{group}: {what}", 100, subsequent_indent="  "))
        for name, one in declared.described(GROUPS[group]).items():
            _show(f"{group}.{name}", getattr(getattr(settings, group), name), one)


def _show(name: str, value, one: declared.Described) -> None:
    mark, default = (" ", "") if value == one.default else ("*", f"  (default {one.default})")
    print(f"{mark} {name} = {value}{default}")
    text = f"{one.meaning} [{declared.allowed(one.kind)}]"
    print(textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))


def show_data(args: argparse.Namespace) -> int:
    """Load every split of the datasets, fetching what is not there; 1 if one cannot be used."""
    failed, named = 0, {dataset: splits(dataset) for dataset in args.datasets or PUBLISHED}  # refuses an unknown one
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
    if not args.datasets and not failed:
        for task, members in datasets.GROUPS.items():
            kept, left_out = train_questions(task)
            why = ", ".join(f"{count} {why}" for why, count in left_out.items())
            print(f"{task:19}train {len(kept):,} of {', '.join(members)}; left out: {why}")
    return min(failed, 1)


def make_base(args: argparse.Namespace) -> None:
    """Make a tiny base as the package's was made, and write it with its card."""
    if args.hidden % 32:
        raise UsageError(f"--hidden = {args.hidden} is not allowed: give a multiple of 32, the size of a head")
    from smlib import pretraining

    pretraining.make_base(
        Path(args.out), task=args.task, documents=args.documents, hidden=args.hidden, layers=args.layers,
        architecture=args.architecture, start_from=args.start_from, tokens_per_batch=args.tokens_per_batch,
        seed=args.seed,
    )  # fmt: skip
