"""Model folders from anywhere: what is damaged is refused in one sentence, and no code of theirs is ever run."""

import io
import json
import pickle
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_model import policy, tokenizer

from smlib.cli import main
from smlib.errors import ModelError, UserError
from smlib.problems.datasets import generate
from smlib.sampling import encoding, models

LOADERS = (models.load_config, models.load_generation, models.load_tokenizer, models.load_policy)


@pytest.fixture
def folder(tmp_path):
    """A model of one layer with its tokenizer, which all loaders take."""
    for part in (policy(), tokenizer()):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def adapter(folder):
    """An adapter beside it."""
    made = models.add_lora(policy(), 2, 4, "all-linear", base="../model")
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.add_(0.1 * ("lora_B" in name))
    made.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


def change(file, **values):
    return lambda folder: write(file, json.dumps(json.loads((folder / file).read_text()) | values))(folder)


def write(file, text):
    return lambda folder: (folder / file).write_text(text)


def cut(file, share=0.5):
    def harm(folder):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: int(share * len(whole))])

    return harm


def remove(file):
    return lambda folder: (folder / file).unlink()


def flip(byte):
    def harm(folder):
        found = bytearray((folder / "model.safetensors").read_bytes())
        found[byte] ^= 0xFF
        (folder / "model.safetensors").write_bytes(found)

    return harm


def weights(edit):
    """Other weights in the same file."""

    def harm(folder):
        [file] = folder.glob("*model.safetensors")
        found = load_file(file)
        edit(found)
        save_file(found, file, metadata={"format": "pt"})

    return harm


def shards(index):
    def harm(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


def pickled(name):
    def harm(folder):
        [file] = folder.glob("*model.safetensors")
        torch.save(load_file(file), folder / name)
        file.unlink()

    return harm


NORM, OUTSIDE = "model.norm.weight", "score.weight"
DAMAGE = {
    "weights cut short": (cut("model.safetensors"), r"model\.safetensors is damaged \(.*not fully covered\)"),
    "weights of no length": (cut("model.safetensors", 0), r"model\.safetensors is damaged \(.*header too small\)"),
    "a length flipped": (flip(0), r"model\.safetensors is damaged"),
    "a header flipped": (flip(20), r"model\.safetensors is damaged"),
    "no weights": (remove("model.safetensors"), r"model has no weights \(model\.safetensors\)"),
    "pickled": (pickled("pytorch_model.bin"), r"has its weights in pytorch_model\.bin, a format that can run code"),
    "pickled by another name": (pickled("consolidated.00.pth"), r"has its weights in consolidated\.00\.pth"),
    "pickled by config": (
        change("config.json", transformers_weights="adapter_model.bin"),
        r"names its weights file in its config\.json \(transformers_weights\), which is not supported",
    ),
    "a shard missing": (
        shards({"weight_map": {NORM: "model-00002-of-00002.safetensors"}}),
        r"model-00002-of-00002\.safetensors is missing, though model\.safetensors\.index\.json names it",
    ),
    "an index of another shape": (shards([]), r"index\.json holds no JSON object"),
    "an index without files": (shards({"weight_map": [NORM]}), r"index\.json has no weight_map from weights to files"),
    "a weight missing": (weights(lambda found: found.pop(NORM)), rf"1 differ \(missing, .*such as {NORM}"),
    "a weight of another size": (
        weights(lambda found: found.update({NORM: torch.ones(3)})),
        rf"1 differ \(missing, left over or of another size\), such as {NORM}",
    ),
    "a weight that is not finite": (weights(lambda found: found[NORM].fill_(torch.nan)), rf"{NORM} in .* not finite"),
    "whole numbers": (
        weights(lambda found: found.update({NORM: found[NORM].int()})),
        rf"{NORM} in .*model\.safetensors holds integers \(I32\)",
    ),
    "another width": (change("config.json", hidden_size=64), r"do not fit its configuration: 11 differ"),
    "more layers": (change("config.json", num_hidden_layers=2), r"9 differ .*such as model\.layers\.1\."),
    "fewer layers": (change("config.json", num_hidden_layers=0), r"9 differ .*such as model\.layers\.0\."),
    "another kind": (change("config.json", model_type="gpt2"), r"do not fit its configuration: \d+ differ"),
    "a width below zero": (change("config.json", hidden_size=-1), r"damaged, or do not fit each other \(RuntimeError"),
    "no heads": (change("config.json", num_attention_heads=0), r"do not fit each other \(ZeroDivisionError"),
    "a width in words": (change("config.json", hidden_size="wide"), r"Field 'hidden_size' expected int, got str"),
    "an unknown activation": (change("config.json", hidden_act="none"), r"do not fit each other \(KeyError: 'none'"),
    "an unknown precision": (change("config.json", dtype="none"), r"do not fit each other \(AttributeError"),
    "no kind": (write("config.json", '{"model_type": 3}'), r"not a causal language model that transformers knows"),
    "a list of kinds": (change("config.json", model_type=[]), r"do not fit each other \(TypeError"),
    "a config of another shape": (write("config.json", "[]"), r"config\.json holds no JSON object"),
    "a config of nothing": (write("config.json", "null"), r"config\.json holds no JSON object"),
    "a config cut short": (cut("config.json"), r"config\.json cannot be read as JSON \("),
    "a config that nests for ever": (write("config.json", "[" * 100_000), r"config\.json cannot be read as JSON \("),
    "a generation config cut short": (cut("generation_config.json"), r"generation_config\.json cannot be read as JSON"),
    "a library that is not here": (
        change("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"needs a library that is not installed here \(ImportError: Loading a GPTQ quantized model",
    ),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer that can be read: save one there"),
    "a tokenizer cut short": (cut("tokenizer.json"), r"tokenizer\.json cannot be read as JSON"),
    "a tokenizer of another shape": (write("tokenizer.json", "{}"), r"do not fit each other \(KeyError"),
    "a tokenizer without a model": (change("tokenizer.json", model=3), r"do not fit each other \(Exception: data did"),
    "a tokenizer config cut short": (cut("tokenizer_config.json"), r"tokenizer_config\.json cannot be read as JSON"),
    "a tokenizer class that is a number": (change("tokenizer_config.json", tokenizer_class=3), r"\(AttributeErr"),
    "an end that is a number": (change("tokenizer_config.json", eos_token=3), r"Special token eos_token has to be"),
}  # fmt: skip


def refusals(folder):
    """What each loader says, where it refuses; anything but a ModelError of one line fails the test."""
    found = []
    for load in LOADERS:
        try:
            load(str(folder))
        except ModelError as error:
            assert "\n" not in str(error) and str(folder) in str(error) and str(error).endswith("(--model)")
            assert len(str(error)) < len(str(folder)) * 2 + 500
            found.append(str(error))
    return found


def test_a_whole_folder_is_refused_by_none(folder):
    assert refusals(folder) == []


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_sentence(folder, case, recwarn, capfd):
    harm, message = DAMAGE[case]
    harm(folder)
    with pytest.raises(ModelError, match=message):
        for said in refusals(folder):
            raise ModelError(said)
    assert capfd.readouterr() == ("", "")  # no table of weights beside it


def test_another_head_beside_the_weights_is_left_aside(folder):
    weights(lambda found: found.update({OUTSIDE: torch.ones(2)}))(folder)
    assert refusals(folder) == []


def test_a_file_in_place_of_a_folder_is_said(folder):
    file = folder / "model.safetensors"
    for load in LOADERS:
        with pytest.raises(ModelError, match=r"model\.safetensors is a file, but not a GGUF file: give the folder"):
            load(str(file))


def test_memory_that_runs_out_is_no_fault_of_the_files(folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        models.load_policy(folder)


@pytest.mark.parametrize(
    ("name", "only"), [("some/model", True), ("some/model@main", True), (f"some/model@{'a' * 40}", None)]
)
def test_of_the_hub_only_a_commit_may_have_its_weights_in_an_older_format(monkeypatch, name, only):
    monkeypatch.setattr(models, "load_config", lambda name: policy().config)
    asked = []

    def refuse(place, **options):
        asked.append(options["use_safetensors"])
        raise OSError("some/model does not appear to have a file named model.safetensors")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=r"some/model has no weights as safetensors: name a revision that has them"):
        models.load_policy(name)
    assert asked == [only]


def test_damage_in_the_cache_of_the_hub_is_said(monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("header too large")

    monkeypatch.setattr(models, "load_config", lambda name: policy().config)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(
        ModelError, match=r"weights of some/model in the hub's cache are damaged \(header too large\): del"
    ):
        models.load_policy("some/model")


# ------------------------------------------------------------------------------------------------------ adapters

ADAPTERS = {
    "cut short": (cut("adapter_model.safetensors"), r"adapter_model\.safetensors is damaged"),
    "pickled": (pickled("adapter_model.bin"), r"has its weights in adapter_model\.bin, a format that can run code"),
    "no weights": (remove("adapter_model.safetensors"), r"has no weights \(adapter_model\.safetensors\)"),
    "a weight missing": (weights(lambda found: found.popitem()), r"1 differ \(missing"),
    "a weight too many": (weights(lambda found: found.update({"x.lora_A.weight": torch.ones(1)})), r"1 differ \(miss"),
    "weights of another rank": (change("adapter_config.json", r=3), r"do not fit each other \(RuntimeError"),
    "a weight that is not finite": (weights(lambda found: next(iter(found.values())).fill_(torch.inf)), "not finite"),
    "no layer of that name": (change("adapter_config.json", target_modules=["nothing"]), r"do not fit each other"),
    "a config of another shape": (write("adapter_config.json", "[]"), r"adapter_config\.json holds no JSON object"),
    "a config cut short": (cut("adapter_config.json"), r"adapter_config\.json cannot be read as JSON"),
    "another kind": (change("adapter_config.json", peft_type="LOHA"), r"is not the config of a LoRA adapter"),
    "one that begins within a text": (
        change("adapter_config.json", alora_invocation_tokens=[1]), r"is not the config of a LoRA adapter",
    ),
    "whole numbers": (
        weights(lambda found: found.update({name: one.int() for name, one in found.items()})), r"integers \(I32\)",
    ),
    "an unknown kind": (change("adapter_config.json", peft_type="NONE"), r"do not fit each other \("),
    "no base": (change("adapter_config.json", base_model_name_or_path=None), r"LoRA adapter that names its base"),
    "a base that is gone": (
        change("adapter_config.json", base_model_name_or_path="../gone"),
        r"the base of the adapter .*: \.\./gone is neither a folder here nor a Hub id",
    ),
    "itself as its base": (change("adapter_config.json", base_model_name_or_path="."), r"is an adapter too: merge"),
}  # fmt: skip


def test_an_adapter_is_loaded_with_its_weights(adapter):
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert not torch.equal(models.load_policy(adapter)(ids).logits, policy()(ids).logits)


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_damaged_adapter_is_refused_in_one_sentence(adapter, case, recwarn):
    harm, message = ADAPTERS[case]
    harm(adapter)
    with pytest.raises(ModelError, match=message) as raised:
        models.load_policy(adapter)
    assert "\n" not in str(raised.value) and str(raised.value).endswith("(--model)") and len(str(raised.value)) < 800


def test_an_adapter_without_a_tokenizer_is_refused_in_one_sentence(adapter):
    with pytest.raises(ModelError, match="adapter has no tokenizer that can be read: save one there"):
        models.load_tokenizer(str(adapter))


# -------------------------------------------------------------------------------------------------- code of theirs

CODE = """
import pathlib
pathlib.Path(r"{canary}").write_text("run")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Words
def generate(*arguments, **options): pass
"""
AUTO = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Words", "own.Words"]}


class Runs:
    """Pickled, it writes the canary where it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.fixture
def canary(folder, monkeypatch):
    """A file that the folder's code would write; on standard input somebody says yes."""
    file = folder.parent / "canary"
    (folder / "custom_generate").mkdir()
    for name in ("own.py", "custom_generate/generate.py"):
        (folder / name).write_text(CODE.format(canary=file))
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Runs(file)))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    yield file
    assert not file.exists()


@pytest.mark.parametrize("kind", ["llama", "own"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_run(folder, canary, kind, file):
    """A kind that transformers knows is loaded by its own class; another is refused."""
    change(file, auto_map=AUTO)(folder)
    change("config.json", model_type=kind)(folder)
    found = refusals(folder)
    assert bool(found) == (kind == "own")
    if (kind, file) == ("own", "config.json"):
        said = f"{folder} wants to run code of its own (auto_map in its config.json), which is not allowed: "
        assert all(one.startswith(said) for one in found)


def test_a_tokenizer_that_needs_its_own_code_is_refused(folder, canary):
    change("tokenizer_config.json", auto_map=AUTO, tokenizer_class="Own")(folder)
    change("config.json", model_type="own")(folder)
    said = r"wants to run code of its own \(auto_map in its tokenizer_config\.json\), which is not allowed"
    with pytest.raises(ModelError, match=said):
        models.load_tokenizer(str(folder))


def test_code_of_an_adapter_and_of_its_base_is_never_run(folder, adapter, canary):
    own = {"base_model_class": "Model", "parent_library": "own"}
    change("adapter_config.json", auto_mapping=own, task_type=None, megatron_core="own", megatron_config={"a": 1})(
        adapter
    )
    (adapter / "own.py").write_text(CODE.format(canary=canary))
    change("config.json", auto_map=AUTO)(folder)
    try:
        models.load_policy(adapter)
    except ModelError as error:
        assert "\n" not in str(error)
    change("config.json", model_type="own")(folder)
    with pytest.raises(ModelError, match=r"the base of the adapter .* wants to run code of its own"):
        models.load_policy(adapter)


def test_the_command_line_says_so_in_one_line(folder, canary, capsys):
    change("config.json", auto_map=AUTO, model_type="own")(folder)
    assert main(["sample", "coin_flip", "--model", str(folder), "--out", str(folder.parent / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder} wants to run code of its own") and error.count("\n") == 1


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ open('CANARY', 'w') }}",
        "{% include '/etc/hostname' %}",
        "{% import 'own.py' as own %}",
        "{{ lipsum.__globals__['os'] }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_a_chat_template_reaches_no_files(folder, canary, template):
    change("tokenizer_config.json", chat_template=template.replace("CANARY", str(canary)))(folder)
    [problem] = generate("coin_flip", 1, seed=0)
    with pytest.raises(UserError, match=r"the chat template of .* refuses a question") as raised:
        encoding.encode_question(models.load_tokenizer(str(folder), "chat"), problem)
    assert "\n" not in str(raised.value)
