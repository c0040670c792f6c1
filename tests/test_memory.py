"""The computed memory against PyTorch's allocator, against real models' weights, and against arithmetic by hand."""

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config

from smlib import memory, models, reward_model, sampling
from smlib.memory import LLAMA_2_7B, Choices, Sampling, Training
from smlib.settings import preset

SPEC = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "benchmarks" / "memory.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

SMALL = bench.llama(hidden=64, layers=2, kv=2, intermediate=160, vocab=300)
TIED = bench.llama(hidden=64, layers=2, intermediate=160, vocab=300, tied=True)
LORA_7B = Choices(layout="adapters", value="model", reward="adapter", frozen="bfloat16", precision="bfloat16")

# ---- measured ------------------------------------------------------------------------------------------------

DEEP = bench.llama(hidden=64, layers=6, kv=2, intermediate=172, vocab=200)  # activations take most
WIDE = bench.llama(hidden=256, layers=2, intermediate=688, vocab=500)  # weights do
SPEAKING = bench.llama(hidden=64, layers=2, kv=1, intermediate=172, vocab=4000)  # logits do
BASE = Choices(rank=4, minibatch=8, rollout_rows=16, prompt=40, completion=40, reward="model")
FEW = replace(BASE, minibatch=1, prompt=16, completion=16)
ADAPTED = {"layout": "adapters", "reward": "adapter"}
HALF = {"precision": "bfloat16", "frozen": "bfloat16"}
MEASURED = {
    "separate": (DEEP, replace(BASE, value="model")),
    "trunk, recompute": (DEEP, replace(BASE, recompute=True)),
    "adapters": (DEEP, replace(BASE, **ADAPTED)),
    "adapters, recompute": (DEEP, replace(BASE, **ADAPTED, value="model", recompute=True)),
    "adapters of a bfloat16 base": (DEEP, replace(BASE, **ADAPTED, **HALF, value="model")),
    "wide, separate": (WIDE, replace(FEW, value="model", recompute=True)),
    "wide, autocast": (WIDE, replace(FEW, precision="bfloat16")),
    "wide, adapters of a bfloat16 base": (WIDE, replace(FEW, **ADAPTED, **HALF, recompute=True)),
    "many logits": (SPEAKING, replace(BASE, **ADAPTED)),
}


@pytest.mark.parametrize("case", MEASURED)
def test_every_phase_is_within_15_percent_of_what_is_allocated(case):
    config, choices = MEASURED[case]
    measured = bench.measure(config, choices)
    computed = {phase: memory.total(parts) for phase, parts in memory.phases(config, choices).items()}
    assert computed == pytest.approx(measured, rel=0.15)
    assert max(computed.values()) == pytest.approx(max(measured.values()), rel=0.08)


# A tile of logits is 32,768 wide whatever the vocabulary, so it takes most of a small model's SFT and DPO.
TALL = bench.llama(hidden=128, layers=12, kv=2, intermediate=344, vocab=500)
STAGES = {
    "sampling": (DEEP, Sampling("float32", 8, 1, 60, 20)),
    "sampling, many samples of a bfloat16 model": (SPEAKING, Sampling("bfloat16", 32, 8, 30, 20)),
    "SFT": (TALL, Training("sft", rows=2, completion=60)),
    "SFT, micro batches of an adapter": (WIDE, Training("sft", "bfloat16", 4, True, 2, True, completion=20)),
    "reward": (WIDE, Training("reward", rows=1, accumulated=True, completion=20)),
    "reward, adapter": (DEEP, Training("reward", "bfloat16", 4, rows=4, completion=40)),
    "reward, recompute": (SPEAKING, Training("reward", "float32", 4, True, 4, completion=40)),
    "DPO": (WIDE, Training("dpo", rows=1, completion=20)),
    "DPO, adapter of a bfloat16 base": (TALL, Training("dpo", "bfloat16", 4, rows=1, completion=60)),
}


@pytest.mark.parametrize("case", STAGES)
def test_every_stage_is_within_15_percent_of_what_is_allocated(case):
    config, plan = STAGES[case]
    if isinstance(plan, Training):
        plan = replace(plan, prompt=len(bench.head()))
    assert memory.total(bench.computed_stage(config, plan)) == pytest.approx(
        bench.measure_stage(config, plan), rel=0.15
    )


@pytest.mark.parametrize("choices", [BASE, replace(BASE, value="model"), replace(BASE, **ADAPTED)])
def test_what_autograd_keeps_is_what_is_computed(choices):
    roles, _ = bench.build(DEEP, choices)
    batch, saved = bench.batch_of(DEEP, choices), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        roles(batch.pack(torch.arange(len(batch.ids))))
    own = {weight.untyped_storage().data_ptr() for weight in roles.parameters()}
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)
    passes = 2 if choices.value == "model" else 1
    logits = 4 * choices.drawn * DEEP.vocab_size
    computed = passes * (memory.kept(DEEP, choices) + memory.states(DEEP, choices)) + logits
    assert computed == pytest.approx(measured, rel=0.01)


def test_the_cache_is_that_of_the_sampler(monkeypatch):
    made = []

    class Watched(sampling._SharedPromptCache):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(sampling, "_SharedPromptCache", Watched)
    roles, _ = bench.build(SMALL, BASE)
    bench.draw(roles, SMALL, BASE)
    tensors = [x for layer in made[0].layers for x in (layer.prompt_keys, layer.prompt_values, layer.store)]
    assert memory.cache(SMALL, BASE) == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# ---- exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, TIED])
def test_weights_are_those_of_a_model(config):
    model = LlamaForCausalLM(config)
    assert sum(memory.parameters(config).values()) == models.model_size(model)
    assert memory.model_bytes(config, "float32") == bench.held(model)
    assert memory.model_bytes(config, "bfloat16") == bench.held(model.bfloat16())
    assert memory.model_bytes(config, "float32", head=False) == 2 * bench.held(model.get_decoder())


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_has_biases(tied):
    config = Qwen2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160,
        vocab_size=300, tie_word_embeddings=tied,
    )  # fmt: skip
    assert memory.parameters(config)["biases"] == 2 * (64 + 2 * 32)
    model = Qwen2ForCausalLM(config)
    assert sum(memory.parameters(config).values()) == models.model_size(model)
    adapted = models.add_lora(model, 4, 8, "all-linear", "")
    found = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert memory.lora_parameters(config, 4) == found


def test_weights_and_moments_are_those_of_the_roles_and_no_gradient_outlives_its_step():
    for choices in (replace(BASE, value="model"), BASE, replace(BASE, **ADAPTED), replace(BASE, **ADAPTED, **HALF)):
        roles, judge = bench.build(SMALL, choices)
        assert memory.resident(SMALL, choices)["weights"] == bench.held(roles, judge)
        counted = {role: sum(map(torch.numel, weights.values())) for role, weights in roles.weights().items()}
        assert memory.trained(SMALL, choices) == counted
        optimizer = bench.optimizer_of(roles)
        bench.steps(roles, optimizer, bench.batch_of(SMALL, choices), choices)
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert memory.resident(SMALL, choices)["moments"] == sum(tensor.nbytes for tensor in moments)
        assert all(weight.grad is None for weight in roles.parameters())


def test_an_adapter_has_the_parameters_of_peft_s():
    model = models.add_lora(LlamaForCausalLM(SMALL), 4, 8, "all-linear", "")
    found = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert memory.lora_parameters(SMALL, 4) == found


def test_llama_2_7b_by_hand():
    assert sum(memory.parameters(LLAMA_2_7B).values()) == 6_738_415_616  # as its model card's index file says
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert memory.parameters(LLAMA_2_7B)["linear"] == linear == 6_476_005_376
    assert memory.model_bytes(LLAMA_2_7B, "nf4") == linear * (0.5 + 0.127 / 8) + 2 * (2 * 32000 + 65) * 4096 + (
        linear * (1 / 64 + 1 / 4096 - 0.127 / 8)
    )
    assert memory.lora_parameters(LLAMA_2_7B, 16) == 32 * 16 * (4 * 8192 + 3 * 15104) == 39_976_960
    one = replace(LORA_7B, rollout_rows=1, samples=1, prompt=512, completion=512)
    assert memory.cache(LLAMA_2_7B, one) == 2 * 32 * 4096 * 1024 * 2  # half a MiB a token
    # float32, one token: two norms' input, output and root, q, k, v and what attention gives, the inputs of q and gate
    assert memory.layer_activations(LLAMA_2_7B, Choices()) == 4 * (4 * 4096 + 2 + 4 * 4096 + 32 + 2 * 4096 + 4 * 11008)


def test_completions_of_a_question_share_their_prompt_as_in_training():
    for minibatch, samples, together in ((8, 8, 4), (8, 2, 2), (4, 1, 1)):
        choices = replace(BASE, minibatch=minibatch, samples=samples)
        packed = bench.batch_of(SMALL, choices).pack(torch.arange(minibatch))
        assert choices.together == together
        assert packed["input_ids"].shape == (minibatch // together, choices.length)
        assert packed["targets"].numel() == choices.drawn


def test_the_reward_model_s_batches_are_those_of_its_scoring():
    assert inspect.signature(reward_model.score).parameters["tokens_per_batch"].default == memory.SCORED_TOKENS


def test_choices_of_settings():
    tiny = memory.choices_of(preset("tiny"), prompt=64)
    assert tiny == Choices(reward="model", rank=1, prompt=64)
    lora = memory.choices_of(preset("tiny-lora"), prompt=64)
    assert (lora.layout, lora.reward, lora.value, lora.rank) == ("adapters", "adapter", "model", 16)


# ---- properties ----------------------------------------------------------------------------------------------

CHOICES = st.builds(
    lambda half, lora, **other: Choices(
        **other,
        layout="adapters" if lora else "separate",
        precision="bfloat16" if half else "float32",
        frozen="bfloat16" if half else "float32",
    ),
    half=st.booleans(),
    lora=st.booleans(),
    value=st.sampled_from(("model", "head")),
    reward=st.sampled_from(("none", "model")),
    recompute=st.booleans(),
    rank=st.integers(1, 64),
    minibatch=st.integers(1, 32),
    rollout_rows=st.integers(1, 256),
    samples=st.integers(1, 16),
    prompt=st.integers(1, 1000),
    completion=st.integers(1, 1000),
)


@given(CHOICES, st.sampled_from(("rank", "minibatch", "rollout_rows", "prompt", "completion")))
@settings(max_examples=200)
def test_more_never_takes_less(choices, name):
    # one completion more may be one that shares a prompt with others
    more = replace(choices, **{name: getattr(choices, name) * 2 if name == "minibatch" else getattr(choices, name) + 1})
    for phase in ("rollout", "reference", "update"):  # the reward model reads whole rows, fewer of them if longer
        few, many = (memory.total(memory.phases(LLAMA_2_7B, each)[phase]) for each in (choices, more))
        assert many >= few - 1


@given(CHOICES)
@settings(max_examples=200)
def test_parts_are_not_negative_and_sum_to_the_peak(choices):
    phases = memory.phases(LLAMA_2_7B, choices)
    assert all(size >= 0 for parts in phases.values() for size in parts.values())
    assert all(set(parts) <= set(memory.PARTS) for parts in phases.values())
    assert memory.peak(LLAMA_2_7B, choices)[1] == max(sum(parts.values()) for parts in phases.values())


@given(CHOICES, st.floats(1e9, 3e11))
@settings(max_examples=100)
def test_the_way_to_fit_leads_there(choices, capacity):
    found = memory.fit(LLAMA_2_7B, choices, capacity)
    assert found.fits == (memory.peak(LLAMA_2_7B, choices)[1] <= capacity)
    peaks = [found.needed, *(after for *_, after in found.way)]
    assert peaks == sorted(peaks, reverse=True)
    if found.found is not None:
        assert memory.peak(LLAMA_2_7B, found.found)[1] <= capacity
        assert found.fits == (found.way == [])


# ---- what fits, and what is refused --------------------------------------------------------------------------


def test_a_misfit_names_the_knobs():
    text = str(memory.fit(LLAMA_2_7B, replace(LORA_7B, completion=384, minibatch=8), 40e9))
    assert "in update" in text and "To make it fit: turn recompute = True" in text
    assert str(memory.fit(LLAMA_2_7B, Choices(), 1e9)).endswith("take a smaller model or a larger card.")
    assert str(memory.fit(SMALL, Choices(), 40e9)).endswith("fits")


def test_one_card_suffices():
    recipe = replace(LORA_7B, recompute=True, minibatch=4, rollout_rows=32, completion=384)
    assert memory.fit(LLAMA_2_7B, recipe, 40e9).fits
    assert memory.fit(LLAMA_2_7B, replace(recipe, frozen="nf4"), 24e9).fits


def test_the_table_has_a_row_for_each_of_the_choices():
    [row] = memory.table(LLAMA_2_7B, [LORA_7B])
    parts = sum(row[f"{part} GiB"] for part in memory.PARTS)
    assert parts == pytest.approx(row["peak GiB"], abs=0.05)
    assert row["fits 80 GB"] == (row["peak GiB"] * 2**30 <= 80e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "lora"}, "layout 'lora' is unknown; choose one of: separate, adapters"),
        ({"frozen": "int8"}, "frozen 'int8' is unknown"),
        ({"layout": "adapters", "rank": 0}, "rank = 0 is not allowed"),
        ({"minibatch": 0}, "minibatch = 0 is not allowed"),
        ({"rollout_rows": 513}, "the sampler draws 512 at most"),
        ({"reward": "adapter"}, "needs layout 'adapters'"),
        ({"frozen": "nf4"}, "needs precision 'bfloat16'"),
    ],
)
def test_bad_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Choices(**change)


def test_other_architectures_are_refused():
    for config in (Qwen3Config(), LlamaConfig(attention_bias=True), LlamaConfig(mlp_bias=True)):
        with pytest.raises(ValueError, match="is not counted here"):
            memory.peak(config, Choices())
