"""One place decides the device: on a Mac, whose accelerator torch and accelerate find, all stays on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smlib.sampling import devices, models
from smlib.sampling.factory import make_engine

ROOT = Path(__file__).parents[1]

MAC = """
import torch, accelerate.state, accelerate.utils, transformers.utils, transformers.training_args
yes = lambda *_, **__: True
torch.backends.mps.is_available = torch.backends.mps.is_built = yes
torch.mps.empty_cache = yes
accelerate.state.is_mps_available = accelerate.utils.is_mps_available = yes
transformers.utils.is_torch_mps_available = transformers.training_args.is_torch_mps_available = yes

from pathlib import Path
from smlib.learning import reward_model, sft
from smlib.learning.rows import Pair, Rationale
from smlib.ppo import loop, roles
from smlib.runs import self_motivated
from smlib.sampling import devices, encoding, models
from smlib.files.artifacts import Stage
from smlib.problems.datasets import generate
from smlib.runs.settings import preset

out, tokenizer = Path({out!r}), models.load_tokenizer()
problems = generate("coin_flip", 4, 0, split="train")
yes, no = "So it is. The answer is yes.", "The answer is no."
yes_ids, no_ids = (tuple(encoding.encode_completion(tokenizer, text, eos=False)) for text in (yes, no))
here = devices.device()
assert here.type == "cpu", here
"""

SFT = """
right = [
    Rationale(id=problem.id, dataset="coin_flip", text=yes, token_ids=yes_ids, answer="yes", correct=True, side="+")
    for problem in problems
]
model = models.load_policy()
sft.train_sft(model, tokenizer, problems, right, epochs=1, learning_rate=1e-3, batch=4, seed=0, progress=None)
assert model.device == here == devices.process_state().device
"""

REWARD_MODEL = """
pairs = [
    Pair(id=problem.id, dataset="coin_flip", chosen=yes, rejected=no, chosen_ids=yes_ids, rejected_ids=no_ids)
    for problem in problems
]
model = models.load_policy()
reward_model.train_reward_model(
    model, tokenizer, problems, pairs, epochs=1, learning_rate=1e-3, batch=4, seed=0, beta=0.5, nll_coef=0.0,
    progress=None,
)
assert model.device == here
"""

MAKE_REWARD = """
stage = Stage(out, "03_reward_model", {})
with stage.recording():
    stage.write_model("model", models.load_policy(), tokenizer)
reward = self_motivated.make_reward("learned", stage, stage, tokenizer)
assert len(reward(problems, ["The answer is yes."] * 4)) == 4
"""

PPO = """
settings = preset("smoke", ppo={"updates": 1, "episodes": 8, "minibatch": 8, "max_new_tokens": 16}).ppo
policy = models.load_policy()
loop.train(roles.SeparateModels(policy, models.load_policy()), reward_model.checker_reward, lambda update: problems[:2],
          tokenizer, settings, out)
assert policy.device == here == devices.accelerator().device
"""


STEPS = {"sft": SFT, "reward_model": REWARD_MODEL, "reward": MAKE_REWARD, "ppo": PPO}

EACH = """
import os
for name, step in {steps!r}.items():
    if not (child := os.fork()):  # accelerate's state is one for a process, and made by whoever asks first
        exec(step)
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def on_a_mac(tmp_path_factory):
    """name of a step -> its exit code as a text; and what all of them wrote of errors."""
    script = MAC.format(out=str(tmp_path_factory.mktemp("mac"))) + EACH.format(steps=STEPS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr[-3000:]


@pytest.mark.parametrize("step", STEPS)
def test_on_a_mac_all_stays_where_the_models_are(on_a_mac, step):
    codes, errors = on_a_mac
    assert codes.get(step) == "0", errors


def test_after_launch_with_cpu_the_models_are_on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: True)
    assert devices.on_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not devices.on_gpu() and devices.device().type == "cpu" and devices.device_name() == "CPU"


def test_nobody_else_asks_accelerate_or_torch_for_a_device():
    """devices.py alone makes accelerate's state, which is one for the process, on the device that devices.py chose."""
    asking = re.compile(r"PartialState\(|Accelerator\((?!cpu=True)|cuda\.is_available\(|backends\.mps")
    found = {
        path.name: asking.findall(path.read_text())
        for folder in ("smlib", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name not in ("devices.py", "gpu_7b.py", "trl_ppo.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("seconds", "chosen"), [((1.0, 0.5), "bfloat16"), ((1.0, 0.9), "float32"), ((1, 3), "float32")]
)
def test_auto_is_bfloat16_where_it_is_clearly_faster(monkeypatch, capsys, seconds, chosen):
    timed = dict(zip((torch.float32, torch.bfloat16), seconds, strict=True))
    monkeypatch.setattr(devices, "_product_seconds", timed.__getitem__)
    devices._faster_dtype.cache_clear()
    assert [devices.chosen_dtype("auto") for _ in range(2)] == [chosen] * 2
    said = capsys.readouterr().out
    assert said.startswith(f"dtype 'auto' is {chosen}: bfloat16 multiplies") and said.count("\n") == 1
    assert [devices.chosen_dtype(name) for name in ("float32", "bfloat16", "nf4")] == ["float32", "bfloat16", "nf4"]
    devices._faster_dtype.cache_clear()


def test_auto_is_measured(capsys):
    devices._faster_dtype.cache_clear()
    with make_engine("native", "tiny", dtype="auto") as engine:
        assert str(engine.model.dtype) == f"torch.{devices.chosen_dtype('auto')}"
    assert capsys.readouterr().out.count("dtype 'auto'") == 1
