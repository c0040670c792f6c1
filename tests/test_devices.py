"""One place decides the device: on a Mac, whose accelerator torch and accelerate find, all stays on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smlib import models

ROOT = Path(__file__).parents[1]

MAC = """
import torch, accelerate.state, accelerate.utils, transformers.utils, transformers.training_args
yes = lambda *_, **__: True
torch.backends.mps.is_available = torch.backends.mps.is_built = yes
torch.mps.empty_cache = yes
accelerate.state.is_mps_available = accelerate.utils.is_mps_available = yes
transformers.utils.is_torch_mps_available = transformers.training_args.is_torch_mps_available = yes

from pathlib import Path
from smlib import models, pipeline, ppo, reward_model, roles, sft
from smlib.artifacts import Stage
from smlib.problems import generate
from smlib.settings import preset

out, tokenizer = Path({out!r}), models.load_tokenizer()
problems = generate("coin_flip", 4, 0, split="train")
here = models.device()
assert here.type == "cpu", here
"""

SFT = """
rows = [{"id": problem.id, "text": "So it is. The answer is yes.", "side": "+"} for problem in problems]
model = models.load_policy()
sft.train_sft(model, tokenizer, problems, rows, epochs=1, learning_rate=1e-3, batch=4, seed=0, progress=None)
assert model.device == here == models.launched().device
"""

REWARD_MODEL = """
pairs = [
    {"id": problem.id, "chosen": "So it is. The answer is yes.", "rejected": "The answer is no.", "held_out": False}
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
reward = pipeline.make_reward("learned", stage, tokenizer)
assert len(reward(problems, ["The answer is yes."] * 4)) == 4
"""

PPO = """
settings = preset("smoke", ppo={"updates": 1, "episodes": 8, "minibatch": 8, "max_new_tokens": 16}).ppo
policy = models.load_policy()
ppo.train(roles.SeparateModels(policy, models.load_policy()), reward_model.checker_reward, lambda update: problems[:2],
          tokenizer, settings, out)
assert policy.device == here == models.accelerator().device
"""


@pytest.mark.parametrize("step", [SFT, REWARD_MODEL, MAKE_REWARD, PPO], ids=["sft", "reward_model", "reward", "ppo"])
def test_on_a_mac_all_stays_where_the_models_are(step, tmp_path):
    script = MAC.replace("{out!r}", repr(str(tmp_path))) + step
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_after_launch_with_cpu_the_models_are_on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(models.torch.cuda, "is_available", lambda: True)
    assert models.on_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not models.on_gpu() and models.device().type == "cpu" and models.device_name() == "CPU"


def test_nobody_else_asks_accelerate_or_torch_for_a_device():
    """models.py alone makes accelerate's state, which is one for the process, on the device that models.py chose."""
    asking = re.compile(r"PartialState\(|Accelerator\((?!cpu=True)|cuda\.is_available\(|backends\.mps")
    found = {
        path.name: asking.findall(path.read_text())
        for folder in ("smlib", "benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.name not in ("models.py", "gpu_7b.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {}
