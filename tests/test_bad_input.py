"""A value that is not allowed is refused in one sentence that names it, before anything is loaded or written."""

import math
import re
import shlex
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import TypeAdapter
from tiny_model import policy

from smlib.cli import main
from smlib.declared import checked
from smlib.errors import UsageError
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import generate, load
from smlib.runs import questions
from smlib.runs.settings import Settings, SFTSettings, preset
from smlib.sampling.factory import make_engine
from smlib.sampling.params import SamplingParams
from smlib.sampling.sampler import sample_ids
from smlib.sampling.shards import Bulk
from smlib.scale.plan import describe

COMMANDS = ("run --dry-run", "run", "stage", "train-policy", "explore")


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; -> what it said, in one line and with nothing written, or argparse's rc 2."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> str:
        try:
            code = main(list(arguments))
        except SystemExit as stopped:
            assert stopped.code == 2, arguments
            code = 2
        shown = capsys.readouterr()
        assert code in (1, 2) and not list(folder.iterdir()), (arguments, shown.out)
        if code == 1:
            assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err and not shown.out
        return shown.err

    return run


# ---- settings ------------------------------------------------------------------------------------------------


def declared_fields():
    """(group, field, its declared type, its default) of every setting; the groups are Settings' own."""
    for group in (field for field in fields(Settings) if is_dataclass(field.type)):
        hints = get_type_hints(group.type, include_extras=True)
        yield from ((group.name, field.name, hints[field.name], field.default) for field in fields(group.type))


FIELDS = list(declared_fields())
WRONG = ([1], {"a": 1}, None, (1,), {1}, b"1", 1j, math.nan, math.inf, -math.inf)  # for any field


def bad_values(kind, default) -> list:
    """Below, above, and of another type."""
    if kind is bool:
        return [*WRONG, 0, 1, "true", ""]
    if get_origin(kind) is Literal:
        return [*WRONG, "", "nope", 0, True, get_args(kind)[0].upper(), f"{get_args(kind)[0]} "]
    if isinstance(default, str):
        return [*WRONG, "", " ", "a\nb", "a\0b", 3, True]
    low, high = bounds(kind)
    close = [low - 1, high + 1] if isinstance(default, int) else [low - 1e-9, high * 1.001]
    huge = [10**12, -(10**400), 10**400, 10**5000, [10**5000]]
    return [*WRONG, *close, *huge, -1e9, True, False, str(default), "", "a lot"]


def bounds(kind) -> tuple:
    schema = TypeAdapter(kind).json_schema()
    return schema.get("minimum", schema.get("exclusiveMinimum")), schema["maximum"]


@pytest.mark.parametrize(("group", "name", "kind", "default"), FIELDS, ids=[f"{one[0]}.{one[1]}" for one in FIELDS])
def test_every_setting_refuses_what_is_not_declared(group, name, kind, default):
    values = bad_values(kind, default)
    if isinstance(default, int) and not isinstance(default, bool):
        values.append(1.5)
    for value in values:
        with pytest.raises(UsageError) as error:
            preset("tiny", **{group: {name: value}})
        said = str(error.value)
        assert f"{group}.{name}" in said and "\n" not in said and len(said) < 400, (value, said)


@pytest.mark.parametrize(("group", "name", "kind", "default"), FIELDS, ids=[f"{one[0]}.{one[1]}" for one in FIELDS])
def test_what_the_error_names_is_allowed(group, name, kind, default):
    assert checked(name, default, kind) == default
    with pytest.raises(UsageError) as error:
        checked(name, None, kind, default)
    if get_origin(kind) is Literal:
        assert str(error.value).endswith(", ".join(get_args(kind)))
    elif isinstance(default, bool):
        assert "give True or False" in str(error.value)
    elif isinstance(default, int | float):
        low, high = bounds(kind)
        above = "exclusiveMinimum" in TypeAdapter(kind).json_schema()
        assert f"above {low:,} and at most {high:,.15g}" in str(error.value) or not above
        for value in [high] if above else [low, high]:
            found = checked(name, value, kind)
            assert found == value and type(found) is type(default)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ppo": 1}, "setting ppo = 1 is not allowed: ppo is a group of settings"),
        ({"ppo": None}, "setting ppo = None"),
        ({"ppo": [("updates", 1)]}, "setting ppo = "),
        ({"ppo": SFTSettings()}, "setting ppo = SFTSettings"),
        ({"ppo": {"updates": 100_000, "episodes": 1024}}, "is 12,800,000 questions, and at most 1,000,000 are"),
        (
            {"ppo": {"episodes": 8, "samples_per_question": 16}},
            "episodes = 8 is not a multiple of ppo.samples_per_question",
        ),
        ({"ppo": {1: 2}}, "setting 'ppo.1' is unknown"),
        ({"base": ""}, "setting base = '' is not allowed: give text of one line that is not blank"),
        ({"base": 3}, "setting base = 3"),
        ({"base": None}, "setting base = None"),
        ({"lora": {"targets": "(("}}, r"lora.targets = '\(\(' is not a regular expression"),
        ({"seed": -1}, "seed = -1 is not allowed: give a whole number from 0 to 4,294,967,295"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"seed": math.nan}, "seed = nan"),
        ({"seed": True}, "seed = True"),
        ({"seed": None}, "seed = None"),
        ({"task": ["coin_flip"]}, r"task \['coin_flip'\] is unknown"),
        ({"task": None}, "task None is unknown"),
        ({"name": 3}, "preset 3 is unknown"),
    ],
)
def test_what_no_preset_takes(overrides, message):
    with pytest.raises(UsageError, match=message):
        preset(**{"name": "tiny"} | overrides)


def test_a_group_by_itself_is_checked_too():
    with pytest.raises(UsageError, match=r"setting sft\.epochs = -1 is not allowed: give a number above 0 "):
        replace(SFTSettings(), epochs=-1)
    with pytest.raises(UsageError, match=r"setting ppo\.clip = inf"):
        PPOSettings(clip=math.inf)


# ---- commands ------------------------------------------------------------------------------------------------

BAD_SETTINGS = """
sft.epochs=-1 ppo.updates=-5 ppo.learning_rate=-1 ranking.max_per_side=-1 reward.nll_coef=-100 lora.alpha=-1
sft.batch=True evaluation.questions=0 ppo.epochs=0 sampling.samples=0 sampling.top_p=7 sampling.temperature=inf
sft.epochs=1e999 sft.epochs=nan sft.epochs=[1] sft.epochs={'a':1} sft.epochs=None sft.epochs= sft.epochs=yes
sft.epochs='1' sampling.questions=1000000000000 evaluation.questions=1000000000000 reward.questions=10**9
ppo.updates=1000000000000 hardware.max_batch=0 hardware.gradient_checkpointing=1 explore.k=0 dpo.beta=0 lora.rank=-1
lora.rank=1.5 lora.targets=(( sampling.shots=nope hardware.dtype=int8 hardware.engine=abacus ppo=1 ppo=None
ppo.nope=1 nope.ppo=1 ppo.Updates=1 base=x ppo.episodes=36 ppo.max_new_tokens=600 hardware.dtype=nf4
"""


@pytest.mark.parametrize("setting", BAD_SETTINGS.split())
def test_every_command_refuses_a_bad_setting(refused, setting):
    for command in COMMANDS:
        said = refused(*command.split(), "--task", "coin_flip", "--out", "out", "--set", setting)
        assert re.split(r"[.=]", setting)[0] in said and (setting != "ppo=1" or "ppo = 1 is not allowed" in said)


def test_what_a_stage_would_find_out_is_refused_before_the_first(refused):
    for command in ("run --dry-run", "run", "stage 02_sft", "stage", "explore"):
        start = [*command.split(), "--task", "coin_flip", "--out", "out", "--set"]
        assert "a batch of 16 cannot be split into micro batches of 5" in refused(*start, "hardware.micro_batch=5")
        said = refused(*start, "lora.rank=4", "--set", "lora.targets=nope")
        assert "lora.targets = 'nope' matches no layer" in said


BAD_LINES = """
run --out out --seed -1 :: --seed = -1
run --out out --seed 4294967296 :: --seed = 4294967296
run --out out --seed 1.5 :: 1.5
run --out out --seed nan :: nan
run --out out --seed "" :: --seed
run --out out --preset huge :: 'huge'
run --out out --preset "" :: invalid choice: ''
run --out out --task chess :: 'chess'
run --out out --task "" :: invalid choice: ''
run --out out --model "" :: --model = ''
run --out "" :: --out = ''
run --out " " :: --out = ' '
run --dry-run --out "" :: --out = ''
run --out FILE :: is a file
run --dry-run --out FILE/run :: is a file
run --out out --from 5 --to 2 :: --from 5 --to 2
run --out out --from 99 :: --from 99
run --out out --from -1 :: --from -1
run --out out --to 77 :: --to 77
run --out out --to -2 :: --to -2
run --out out --to x :: 'x'
run --out out --set ppo.episodes=40 :: 5 questions per update, not a multiple of the 4 tasks
run --dry-run --set ppo.episodes=40 :: 5 questions per update, not a multiple of the 4 tasks
stage --out out --set ppo.episodes=40 :: 5 questions per update, not a multiple of the 4 tasks
train-policy --out out --set ppo.episodes=40 :: 5 questions per update, not a multiple of the 4 tasks
run --dry-run --from 5 --to 2 :: --from 5 --to 2
run --dry-run --from 99 :: --from 99
run --dry-run --to -1 :: --to -1
run --out out --set UPDATES=4 :: UPDATES
run --dry-run --set UPDATES=4 :: UPDATES
run --out out --set ppo.reward=human :: 'human'
run --out out --set ppo.reward=3 :: ppo.reward = 3
run --out out --set ppo.reward= :: ppo.reward = ''
run --out out --set "ppo.reward=learned learned" :: learned learned
run --out out --set ppo.reward=99999999999*words :: weight in ppo.reward = 99999999999.0
run --dry-run --set ppo.reward=human :: 'human'
run --out out --set TRACKER=abacus :: 'abacus'
run --out out --set TRACKER=1 :: TRACKER = 1
run --out out --set SAMPLES=0 :: SAMPLES = 0
run --out out --set SAMPLES=8.5 :: SAMPLES = 8.5
run --out out --set SAMPLES=True :: SAMPLES = True
run --out out --set FRESH_QUESTIONS=-3 :: FRESH_QUESTIONS = -3
run --out out --set HELD_OUT=1e9 :: HELD_OUT = 1000000000.0
run --out out --set DRAWS=many :: DRAWS = 'many'
run --out out --set START=yes :: START = 'yes'
run --out out --set LARGE=huge :: 'huge'
run --out out --set LARGE_TASK=chess :: 'chess'
run --out out --set LARGE_TASK=all :: exemplars
run --out out --set OVERRIDES={} :: OVERRIDES
run --out out --set SEED=1 :: SEED
run --out out --set ppo.updates :: ppo.updates
run --out out --set =1 :: =1
run --out out --set a.b.c=1 :: a.b.c=1
run --out out -k nope :: -k
run --out out --nope :: --nope
run --out out nope :: nope
run --out out --set REWARD=checker :: REWARD
run --out out --config "" :: --config = ''
run --out out --config nowhere.yaml :: --config nowhere.yaml cannot be read (No such file or directory): give
stage --out out --config nowhere.yaml :: --config nowhere.yaml cannot be read
train-policy --out out --config FILE :: is not allowed: give lines such as PRESET: tiny
stage --out out --model tiny --set base.x=1 :: base.x cannot be set: base is already 'tiny'
settings huge :: invalid choice: 'huge'
settings tiny nope :: invalid choice: 'nope'
settings tiny --set ppo.nope=1 :: ppo.nope
settings tiny --set TRACKER=tensorboard :: TRACKER is not a setting
settings --task mistral :: 'mistral'
settings --out out :: 'out'
stage nope --out out :: 'nope'
stage "" --out out :: stage ''
stage --out "" :: --out = ''
stage --out FILE :: is a file
stage --out out --seed -1 :: --seed = -1
stage --out out --model "" :: --model = ''
stage --out out --set TRACKER=tensorboard :: TRACKER
stage --out out -k nope :: -k
train-policy --out out --method a2c :: 'a2c'
train-policy --out out --method "" :: invalid choice: ''
train-policy --out out --set ppo.reward=human :: 'human'
train-policy --out out --set ppo.reward= :: ppo.reward = ''
train-policy --out out --set "ppo.reward=2*" :: '2*'
train-policy --out out --reward learned :: --reward
train-policy --out out --tracker abacus :: 'abacus'
train-policy --out out --method grpo --tracker tensorboard :: tracker 'tensorboard'
train-policy --out "" :: --out = ''
train-policy --out out :: 02_sft
explore --out "" :: --out = ''
explore --out FILE :: is a file
explore --out out --seed 9e9 :: 9e9
explore --out out --preset mistral-7b --task all :: exemplars
results :: RUN
results nowhere :: nowhere
results "" :: 05_evaluation
results FILE :: is a file, where a folder belongs: move it elsewhere, or name another folder
data nope :: 'nope'
data coin_flip nope :: 'nope'
data "" :: ''
sample coin_flip :: --out
sample coin_flip --out "" :: --out = ''
sample coin_flip --out FILE :: is a file
sample coin_flip --out FILE/x/y :: is a file
sample nope --out out :: 'nope'
sample "" --out out :: ''
sample --out out :: DATASET
sample coin_flip --out out --split nope :: 'nope'
sample coin_flip --out out --split all :: 'all'
sample coin_flip --out out --split "" :: ''
sample gsm8k --out out --split nope :: 'nope'
sample coin_flip --out out --shots nope :: 'nope'
sample coin_flip --out out --shots "" :: invalid choice: ''
sample chain_arithmetic --out out --shots wei :: 'chain_arithmetic'
sample coin_flip --out out --engine nope :: 'nope'
sample coin_flip --out out --prompt nope :: 'nope'
sample coin_flip --out out --prompt chat :: chat
sample coin_flip --out out --dtype int8 :: 'int8'
sample coin_flip --out out --model "" :: --model = ''
sample coin_flip --out out --questions -5 :: --questions = -5
sample coin_flip --out out --questions 0 :: --questions = 0
sample coin_flip --out out --questions 1000000000000 :: --questions = 1000000000000
sample coin_flip --out out --questions 2.5 :: '2.5'
sample coin_flip --out out --samples 0 :: --samples = 0
sample coin_flip --out out --samples 100000000 :: --samples = 100000000
sample coin_flip --out out --samples True :: 'True'
sample coin_flip --out out --temperature inf :: --temperature = inf
sample coin_flip --out out --temperature nan :: --temperature = nan
sample coin_flip --out out --temperature -0.1 :: --temperature = -0.1
sample coin_flip --out out --temperature 1e999 :: --temperature = inf
sample coin_flip --out out --temperature 0.001 :: give 0 (greedy), or a number from 0.01 to 100
sample coin_flip --out out --temperature warm :: 'warm'
sample coin_flip --out out --top-p 7 :: --top-p = 7.0
sample coin_flip --out out --top-p 0 :: --top-p = 0.0
sample coin_flip --out out --top-p nan :: --top-p = nan
sample coin_flip --out out --top-p -1 :: --top-p = -1.0
sample coin_flip --out out --max-new-tokens 0 :: --max-new-tokens = 0
sample coin_flip --out out --max-new-tokens -1 :: --max-new-tokens = -1
sample coin_flip --out out --max-new-tokens 512 :: --max-new-tokens = 512
sample coin_flip --out out --max-new-tokens 1000000000000 :: --max-new-tokens = 1000000000000
sample coin_flip --out out --seed -1 :: --seed = -1
sample coin_flip --out out --seed 99999999999999999999 :: --seed = 99999999999999999999
sample coin_flip --out out --max-batch 0 :: --max-batch = 0
sample coin_flip --out out --max-batch -1 :: --max-batch = -1
sample coin_flip --out out --max-batch 1000000000 :: --max-batch = 1000000000
sample coin_flip --out out --cache-tokens -1 :: --cache-tokens = -1
sample coin_flip --out out --cache-tokens 1e6 :: '1e6'
sample coin_flip --out out --workers 0 :: --workers = 0
sample coin_flip --out out --workers -2 :: --workers = -2
sample coin_flip --out out --workers 1000000 :: --workers = 1000000
sample coin_flip --out out --shard 0 :: --shard = 0
sample coin_flip --out out --shard -64 :: --shard = -64
sample coin_flip --out out -k nope :: -k
pretrain --out o --documents 0 :: --documents = 0
pretrain --out o --documents -1 :: --documents = -1
pretrain --out o --documents 1000000000000 :: --documents = 1000000000000
pretrain --out o --documents few :: 'few'
pretrain --out o --hidden 0 :: --hidden = 0
pretrain --out o --hidden -32 :: --hidden = -32
pretrain --out o --hidden 40 :: --hidden = 40
pretrain --out o --layers 0 :: --layers = 0
pretrain --out o --tokens-per-batch 0 :: --tokens-per-batch = 0
pretrain --out o --seed -1 :: --seed = -1
pretrain --out "" :: --out = ''
pretrain --out FILE :: is a file
pretrain --out o --start-from nowhere :: --start-from nowhere has no training.json
pretrain --out o -k nope :: -k
nope :: 'nope'
-k nope :: nope
--seed 1 :: 1
"""


@pytest.mark.parametrize("line", BAD_LINES.strip().splitlines())
def test_a_bad_line_is_refused(refused, tmp_path, line):
    (tmp_path / "file").write_text("")
    command, _, message = line.partition(" :: ")
    assert message in refused(*shlex.split(command.replace("FILE", str(tmp_path / "file"))))


@pytest.mark.parametrize("value", ["9" * 5_000, "(" * 500 + "1", "{[]: 1}", "1" + "+1" * 5_000, "[" * 5_000])
def test_a_value_that_python_cannot_read_is_a_text(refused, value):
    said = refused("stage", "--out", "out", "--set", f"ppo.updates={value}")
    assert "ppo.updates = " in said and len(said) < 300


# ---- functions -----------------------------------------------------------------------------------------------

PARAMS = {"temperature": 1.0, "max_new_tokens": 8, "seed": 0}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [math.inf, math.nan, -1, 101, 1e-40, 0.009, "1", None, True]),
        ("max_new_tokens", [0, -1, 1.5, math.nan, "8", None, 10**9]),
        ("top_p", [0, 7, -1, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, "1", None, True]),
        ("seed", [-1, 1.5, math.nan, "1", None, True, 2**64]),
    ],
)
def test_what_no_engine_draws(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"{name} = .* is not allowed"):
            SamplingParams(**PARAMS | {name: value})


@pytest.mark.parametrize(
    ("name", "values"), [("n", [0, -1, 1.5, math.inf, "1", None, True, 10**9]), ("first", [-1, 0.5, "0", None])]
)
def test_which_samples_no_engine_draws(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"{name} = .* is not allowed"):
            sample_ids(policy(), None, [[1]], **{"n": 1, "params": SamplingParams(**PARAMS), name: value})


def test_functions_that_make_engines_folders_and_questions(tmp_path):
    for call, message in (
        (lambda: Bulk(tmp_path, make_engine("native", "tiny"), {}, 0), "shard = 0"),
        (lambda: Bulk(tmp_path, make_engine("native", "tiny"), {}, math.inf), "shard = inf"),
        (lambda: make_engine("native", "tiny", workers=0), "workers = 0"),
        (lambda: make_engine("native", "tiny", max_batch=-1), "max_batch = -1"),
        (lambda: make_engine("native", "tiny", cache_tokens=-1), "cache_tokens = -1"),
        (lambda: generate("coin_flip", -5, 0), "n = -5"),
        (lambda: generate("coin_flip", 10**12, 0), "n = 1000000000000"),
        (lambda: load("coin_flip", "test", limit=-5), "limit = -5"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_the_plan_of_many_questions_makes_few(monkeypatch):
    asked = []

    def counted(task, n, *arguments, **options):
        asked.append(n)
        return generate(task, min(n, 50), *arguments, **options)

    monkeypatch.setattr(questions, "generate", counted)
    many = {group: {"questions": 100_000} for group in ("sampling", "reward", "evaluation")}
    plan = describe(preset("smoke", "coin_flip", **many))
    assert "03_second_sampling  400,000" in plan and max(asked) == 10_000


@pytest.mark.parametrize(
    ("setting", "library"),
    [("hardware.engine=vllm", "vllm"), ("hardware.workers=2", "ray"), ("hardware.rollout_engine=vllm", "vllm")],
)
def test_an_engine_that_is_not_installed_is_refused_before_anything_is_written(refused, monkeypatch, setting, library):
    monkeypatch.setattr("smlib.sampling.engines.find_spec", lambda name: None)
    for command in ("run", "stage", "explore", "train-policy"):
        if command == "train-policy" and "rollout" not in setting:  # it draws by itself alone
            continue
        if command == "explore" and "rollout" in setting:
            continue
        arguments = [command, "--preset", "rehearsal", "--task", "coin_flip", "--set", setting, "--out", "run"]
        assert f"needs {library}, which is not installed" in refused(*arguments, "--set", "hardware.dtype=float32")


@pytest.mark.parametrize("command", ["run", "stage", "sample coin_flip", "pretrain", "explore", "run --verify"])
@pytest.mark.parametrize("target", ["nowhere", "link"])  # to itself, too
def test_a_folder_that_links_to_nothing_is_refused(tmp_path, monkeypatch, capsys, command, target):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(target)
    assert main([*command.split(), "--out", "link"]) == 1
    assert "--out = 'link' is not allowed, since 'link' is a broken link" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("stage 01_sampling", ".locks"),
        ("stage 01_sampling", "01_sampling"),
        ("run --to 0", ".locks"),
        ("sample coin_flip --questions 2 --samples 1", ".locks"),
    ],
)
def test_a_file_where_a_folder_belongs_is_named_with_the_way_out(tmp_path, capsys, command, place):
    (tmp_path / place).touch()
    smoke = [] if "sample" in command.split() else ["--preset", "smoke", "--task", "coin_flip"]
    assert main([*command.split(), *smoke, "--out", str(tmp_path)]) == 1
    said = f"error: {tmp_path / place} is a file, where a folder belongs: move it elsewhere, or name another folder"
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_where_a_shard_belongs_is_named_with_the_way_out(tmp_path, capsys):
    command = ["sample", "coin_flip", "--questions", "2", "--samples", "1", "--max-new-tokens", "8"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (shard,) = tmp_path.glob("shard-*")
    shard.unlink()
    shard.mkdir()
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert f"error: {shard} is a folder, where a file belongs: move it elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "targets", [".*", ".*norm.*", "model", ".*act_fn", "lm_head", ".*embed_tokens", ".*q_proj|.*norm"]
)
def test_adapters_go_on_linear_layers_alone(refused, targets):
    said = refused("stage", "--preset", "smoke", "--set", "lora.rank=4", "--set", f"lora.targets={targets}")
    assert f"lora.targets = {targets!r} matches no layer of LlamaForCausalLM, or layers that are not linear" in said
