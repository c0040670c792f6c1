"""The presets of 7B models, by their own code path: a tiny model of the same kind, a dozen questions of the same form.

The model is random at first, and then reads for every question a right and a wrong solution, so that stage 0, RFT,
exploration and DPO have something to do. Weights in bfloat16, adapters, micro batches and recomputing are the presets'.
"""

import json

import pytest
import torch
from sums import TRAIN, learn, publish, steps
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from smlib.cli import main
from smlib.files.artifacts import require
from smlib.problems import prompts
from smlib.problems.datasets import load
from smlib.reports import results
from smlib.runs import self_explore, self_motivated
from smlib.runs.settings import preset
from smlib.sampling import encoding, models

KINDS = {
    "mistral": (MistralForCausalLM, MistralConfig),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "grouped llama": (LlamaForCausalLM, LlamaConfig),
}


def tokenizer(kind: str):
    """Without a pad token, as Mistral's, or with the end as the pad, as DeepSeek's."""
    made = models.load_tokenizer("tiny")
    made.pad_token, made.unk_token = (None, "<pad>") if kind == "mistral" else ("<eos>", None)
    return made


def make_base(task: str, kind: str, folder) -> str:
    """A model that answers the training questions rightly or wrongly by a coin's throw, as its exemplar is worded."""
    spelled, (make, configure) = tokenizer(kind), KINDS[kind]
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4 if kind == "llama" else 2, "max_position_embeddings": 8_192}
    torch.manual_seed(0)
    tokens = {"bos_token_id": spelled.bos_token_id, "eos_token_id": spelled.eos_token_id}
    model = make(configure(vocab_size=len(spelled), **shape, **tokens))
    documents = []
    for problem, (a, b) in zip(load(task, "train"), TRAIN, strict=True):
        for shots in ("none", "smlib"):
            for total in (a + b, a + b + 1):
                answer = prompts.answer_sentence(problem, str(total))
                head = encoding.encode_prompt(spelled, prompts.open_prompt(problem, prompts.shots(task, shots)))
                told = " " + "\n".join([*steps(task, a, b, total), answer])
                documents.append(head + encoding.encode_completion(spelled, told))
    learn(model, documents, 60)
    for part in (model, spelled):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Publishes a dataset's small files and makes a base: (task, kind of model) -> its folder."""
    yield lambda task, kind: (publish(task, tmp_path, monkeypatch), make_base(task, kind, tmp_path / "base"))[1]
    prompts.shots.cache_clear()


def check(run, settings):
    """What holds of any finished run: its questions, its exemplars, its models and its answers."""
    [task] = settings.tasks
    train, test = ({problem.id for problem in load(task, split)} for split in ("train", "test"))
    drawn, explored = require(run, "06_solutions"), require(run, "06_exploration")
    assert {found["id"] for found in drawn.read_rows("solutions")} == train
    assert drawn.settings["dtype"] == "bfloat16" and drawn.settings["lora"]["rank"] == 16
    pairs = explored.read_rows("pairs")
    assert {pair["step"] for pair in pairs} == {1, 2} and {pair["dataset"] for pair in pairs} == {task}
    assert all(right <= 4 for found in explored.read_rows("explored") for right in found["right"])
    for name in ("02_sft", "06_rft", "06_outcome_dpo", "06_step_dpo"):
        folder = require(run, name).path("model")
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert not (folder / "adapter_config.json").exists()
    answers = require(run, "06_evaluation").read_rows("answers")
    assert {(found["method"], found["id"]) for found in answers} == {
        (method, name) for method in results.EXPLORE_METHODS for name in test
    }
    assert require(run, "06_pit_report").read_rows("report") == []


def test_gsm8k_by_the_command_with_the_preset_as_it_is(published, tmp_path, capsys):
    base, run = published("gsm8k", "mistral"), tmp_path / "run"
    command = ["explore", "--preset", "mistral-7b", "--task", "gsm8k", "--model", base, "--out", str(run)]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "| step-level pairs |" in shown.out and "| Self-Explore | " in shown.out
    assert "No pit report: the step checker" in shown.out and ".py" not in shown.err
    settings = preset("mistral-7b", "gsm8k", base=base)
    check(run, settings)
    assert len(require(run, "06_solutions").read_rows("solutions")) == 100 * len(TRAIN)


def test_math_is_cut_at_sentences_and_judged_as_math(published, tmp_path):
    """With rates that the few steps need: RFT and DPO learn, and their changes are in the merged weights."""
    base, run = published("math", "llama"), tmp_path / "run"
    rates = {"sft": {"learning_rate": 5e-4}, "dpo": {"learning_rate": 1e-2}}
    settings = preset("deepseek-math-7b", "math", base=base, explore={"samples": 24}, **rates)
    self_explore.run(run, settings, progress=False)
    check(run, settings)
    rejected = [pair["rejected"] for pair in require(run, "06_exploration").read_rows("pairs")]
    assert any(text.startswith(" So the sum") for text in rejected)  # one line, two sentences
    weights = {
        name: models.load_policy(require(run, name).path("model")).state_dict() for name in ("06_rft", "06_step_dpo")
    }
    weights["base"] = models.load_policy(base, "bfloat16").float().state_dict()
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(weights["base"][layer], weights["06_rft"][layer])
    assert not torch.equal(weights["06_rft"][layer], weights["06_step_dpo"][layer])
    for name in ("06_outcome_dpo", "06_step_dpo"):  # the reference is the policy at its start
        assert require(run, name).read_rows("log")[0]["loss"] == pytest.approx(0.693, abs=0.001)


@pytest.mark.parametrize("kind", ["llama", "grouped llama"])
def test_llama2_7b_itself_goes_through_self_motivated_learning(published, tmp_path, kind):
    """The preset, but for its numbers of questions and updates: two for stage 01, one for 03, all four for PPO."""
    few = {"sampling": {"questions": 2}, "reward": {"questions": 1}, "ppo": {"updates": 1, "episodes": 32}}
    settings = preset("llama2-7b", "gsm8k", base=published("gsm8k", kind), **few)
    self_motivated.run(tmp_path / "run", settings, progress=False)
    rows = require(tmp_path / "run", "01_sampling").read_rows("rationales")
    assert {(row["source"], row["correct"]) for row in rows} >= {("open", True), ("open", False)}
    tuned, rewarder, policy = (require(tmp_path / "run", name) for name in ("02_sft", "03_reward_model", "04_ppo"))
    assert json.loads((tuned.path("model") / "config.json").read_text())["dtype"] == "bfloat16"
    for stage in (rewarder, policy):  # adapters of the one base
        adapter = json.loads((stage.path("model") / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == "../../02_sft/model" and adapter["r"] == 16
    answers = require(tmp_path / "run", "05_evaluation").read_rows("answers")
    assert {row["method"] for row in answers} == set(results.METHODS)


def test_the_command_names_the_tasks_of_a_large_preset(capsys, tmp_path):
    assert main(["explore", "--preset", "mistral-7b", "--task", "all", "--out", str(tmp_path / "run")]) == 1
    assert (
        "error: preset 'mistral-7b' shows exemplars (sampling.shots = 'smlib'), and task 'chain"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()
