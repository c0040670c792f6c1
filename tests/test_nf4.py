"""4-bit bases (QLoRA), by bitsandbytes' kernels for CPUs: a small random Llama is loaded, trained on and merged."""

import json

import pytest
import torch
from tiny_model import tokenizer, written
from transformers import LlamaConfig, LlamaForCausalLM

from smlib.files.artifacts import require
from smlib.learning import dpo, sft
from smlib.learning.rows import Pair
from smlib.ppo.roles import Adapters
from smlib.problems.datasets import generate
from smlib.problems.prompts import open_prompt
from smlib.runs import self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models, packing
from smlib.sampling.params import SamplingParams
from smlib.sampling.sampler import sample

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install 'smlib[gpu]'")

PROBLEMS = generate("coin_flip", 8, seed=0)
ROWS = [written(one, f" It is easy.\nThe answer is {one.answer}.") for one in PROBLEMS]
TRAINING = {"epochs": 20, "learning_rate": 5e-3, "batch": 4, "seed": 0, "progress": None}
GROUPS = [
    (encoding.encode_prompt(tokenizer(), open_prompt(one)), [encoding.encode_completion(tokenizer(), row.text)])
    for one, row in zip(PROBLEMS, ROWS, strict=True)
]


@pytest.fixture
def base(tmp_path):
    """Its widths are multiples of a block of 64 weights, which has a scale of its own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer()), num_key_value_heads=2, **shape)
    for part in (LlamaForCausalLM(config), tokenizer()):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def linear(model) -> dict:
    return {name: one for name, one in model.named_modules() if isinstance(one, bitsandbytes.nn.Linear4bit)}


def dequantised(model, base):
    """The model in bfloat16 whose linear layers hold what those of `model` stand for."""
    plain = models.load_policy(base, "bfloat16")
    for name, layer in linear(model).items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name).weight.data = weight
    return plain


def with_adapter(base):
    return models.add_lora(models.load_policy(base, "nf4"), rank=4, alpha=8, targets="all-linear", base="../base")


def frozen(model) -> dict:
    return {name: weight.data.clone() for name, weight in model.named_parameters() if "lora_" not in name}


@torch.no_grad()
def logprobs(model):
    return packing.packed_logprobs(model, packing.pack(GROUPS, pad_id=0))


def test_four_bits_a_weight_and_the_rest_in_bfloat16(base):
    model, whole = models.load_policy(base, "nf4"), models.load_policy(base)
    assert not model.training and model.dtype == torch.bfloat16 and len(linear(model)) == 2 * 7
    assert {weight.dtype for weight in model.parameters()} == {torch.uint8, torch.bfloat16}
    for name, layer in linear(model).items():
        assert layer.weight.quant_state.nested and layer.weight.quant_type == "nf4"
        assert layer.weight.numel() == whole.get_submodule(name).weight.numel() // 2
        error = dequantised(model, base).get_submodule(name).weight - whole.get_submodule(name).weight
        assert error.norm() / whole.get_submodule(name).weight.norm() < 0.1  # 0.09 of normal weights


def test_it_computes_what_its_weights_stand_for_again_and_again(base):
    model = models.load_policy(base, "nf4")
    plain = logprobs(dequantised(model, base))
    for _ in range(2):
        torch.testing.assert_close(logprobs(model), plain, rtol=0, atol=0.02)
    assert (logprobs(models.load_policy(base)) - plain).abs().max() > 1e-3  # the rounding to 4 bits is seen


def test_gradients_flow_after_sampling(base):
    """bitsandbytes would repack the weights at the first sample, where the processor has AVX512-BF16."""
    model = with_adapter(base)
    params = SamplingParams(temperature=1.0, max_new_tokens=4, seed=0)
    sample(model, tokenizer(), ["Q: How many nuts?\nA:"], 2, params, keys=["a"])
    packing.packed_logprobs(model, packing.pack(GROUPS, pad_id=0)).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == 2 * 7 and all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("hardware", [{}, {"micro_batch": 2}, {"micro_batch": 1, "gradient_checkpointing": True}])
def test_an_adapter_learns_on_it_in_float32_and_it_stays_as_it_is(base, hardware):
    model = with_adapter(base)
    before = frozen(model)
    log = sft.train_sft(model, tokenizer(), PROBLEMS, ROWS, **TRAINING, **hardware)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    after = frozen(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_after_merging_it_is_an_ordinary_model_in_bfloat16(base, tmp_path):
    model = with_adapter(base)
    sft.train_sft(model, tokenizer(), PROBLEMS, ROWS, **TRAINING)
    trained, untrained = logprobs(model), logprobs(models.load_policy(base, "nf4"))
    shared.merged(model, base).save_pretrained(tmp_path / "merged")
    merged = models.load_policy(tmp_path / "merged", "bfloat16")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16} and not linear(merged)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    moved = (trained - untrained).abs().mean()
    assert (logprobs(merged) - trained).abs().mean() < 0.02 * moved
    anew = models.load_policy(tmp_path / "merged", "nf4")
    assert len(linear(anew)) == 2 * 7 and (logprobs(anew) - trained).abs().mean() < 0.04 * moved


def test_an_adapter_is_loaded_beside_its_base_as_it_was_trained(base, tmp_path):
    model = with_adapter(base)
    sft.train_sft(model, tokenizer(), PROBLEMS, ROWS, **TRAINING)
    model.save_pretrained(tmp_path / "adapter")
    loaded = models.load_policy(tmp_path / "adapter", "nf4")
    assert isinstance(loaded, LlamaForCausalLM) and not loaded.training
    assert torch.equal(logprobs(loaded), logprobs(model))
    with pytest.raises(ValueError, match="the model already has an adapter, on a base in 4 bits: load it with"):
        models.add_lora(loaded, 4, 8, "all-linear", base="")


def test_roles_are_adapters_of_it(base, tmp_path):
    rewarder = with_adapter(base)
    sft.train_sft(rewarder, tokenizer(), PROBLEMS, ROWS, **TRAINING)
    rewarder.save_pretrained(tmp_path / "reward")
    roles = Adapters(with_adapter(base), tmp_path / "reward")
    roles.checkpoint_gradients()
    packed, before = packing.pack(GROUPS, pad_id=0), frozen(roles.model)
    with torch.no_grad():
        reference = roles(packed, reference=True)[0]
    optimizer = torch.optim.AdamW([weight for weight in roles.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(10):
        logp, values = roles(packed)
        ((values - 1).square().mean() - logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logp, values = roles(packed)
        assert logp.mean() > reference.mean() + 0.1 and (values - 1).abs().mean() < 0.9
        assert torch.equal(roles(packed, reference=True)[0], reference)
    assert all(torch.equal(weight, before[name]) for name, weight in frozen(roles.model).items())
    with roles.using("reward") as model:
        assert torch.equal(logprobs(model), logprobs(rewarder))


def test_dpo_learns_on_it_and_its_base_is_the_reference(base):
    model, texts = with_adapter(base), {"chosen": " The answer is yes.", "rejected": " The answer is no."}
    ids = {f"{side}_ids": tuple(encoding.encode_completion(tokenizer(), text)) for side, text in texts.items()}
    ids["prompt_ids"] = tuple(encoding.encode_prompt(tokenizer(), "Q: Is it?\nA:"))
    pair = Pair(id="a", dataset="coin_flip", **texts, **ids)
    log = dpo.train_dpo(model, tokenizer(), [pair] * 4, beta=0.5, **TRAINING, micro_batch=2)
    assert log[0]["loss"] == pytest.approx(0.693, abs=0.001) and log[-1]["loss"] < 0.3


def test_every_stage_runs_on_it(tmp_path):
    """SFT leaves an ordinary model; reward model and policy are adapters of it, held in 4 bits again."""
    few = {"sampling": {"questions": 8, "conditioned_questions": 4, "max_new_tokens": 64}, "reward": {"questions": 6}}
    few |= {"ppo": {"max_new_tokens": 64, "episodes": 16}, "evaluation": {"questions": 4, "samples": 1, "published": 0}}
    settings = preset("rehearsal", "coin_flip", hardware={"dtype": "nf4"}, **few)
    self_motivated.run(tmp_path, settings, progress=False)
    assert require(tmp_path, "02_sft").settings["dtype"] == "nf4"
    tuned = json.loads((require(tmp_path, "02_sft").path("model") / "config.json").read_text())
    assert tuned["dtype"] == "bfloat16" and "quantization_config" not in tuned
    for name in ("03_reward_model", "04_ppo"):
        folder = require(tmp_path, name).path("model")
        assert (folder / "adapter_config.json").exists() and linear(models.load_policy(folder, "nf4"))
    rows = require(tmp_path, "05_evaluation").read_rows("answers")
    assert {row["method"] for row in rows} == {"base", "sft", "sml"}
