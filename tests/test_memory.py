"""The computed memory against PyTorch's allocator, against real models' weights, and against arithmetic by hand."""

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from smlib.learning import reward_model
from smlib.runs.settings import preset
from smlib.sampling import decoders, models, tree_attention
from smlib.scale import memory
from smlib.scale.memory import LLAMA_2_7B, PPO, Sampling, Training

SPEC = importlib.util.spec_from_file_location("bench", Path(__file__).parents[1] / "benchmarks" / "memory.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

SMALL = bench.llama(hidden=64, layers=2, kv=2, intermediate=160, vocab=300)
TIED = bench.llama(hidden=64, layers=2, intermediate=160, vocab=300, tied=True)
LENGTHS = bench.LENGTHS
LORA_7B = PPO(value="model", rank=16, dtype="bfloat16", precision="bfloat16")


def replace_hardware(settings, **changes):
    return replace(settings, hardware=replace(settings.hardware, **changes))


# ---- measured ------------------------------------------------------------------------------------------------

DEEP = bench.llama(hidden=64, layers=6, kv=2, intermediate=172, vocab=200)  # activations take most
WIDE = bench.llama(hidden=256, layers=2, intermediate=688, vocab=500)  # weights do
SPEAKING = bench.llama(hidden=64, layers=2, kv=1, intermediate=172, vocab=4000)  # logits do
BASE = PPO(micro_batch=8, max_batch=16, prompt=40, completion=40)
FEW = replace(BASE, micro_batch=1, prompt=16, completion=16)
ADAPTED = {"rank": 4}
HALF = {"precision": "bfloat16", "dtype": "bfloat16"}
MEASURED = {
    "separate": (DEEP, replace(BASE, value="model")),
    "trunk, gradient_checkpointing": (DEEP, replace(BASE, gradient_checkpointing=True)),
    "adapters": (DEEP, replace(BASE, **ADAPTED)),
    "adapters, gradient_checkpointing": (DEEP, replace(BASE, **ADAPTED, value="model", gradient_checkpointing=True)),
    "adapters of a bfloat16 base": (DEEP, replace(BASE, **ADAPTED, **HALF, value="model")),
    "wide, separate": (WIDE, replace(FEW, value="model", gradient_checkpointing=True)),
    "wide, autocast": (WIDE, replace(FEW, precision="bfloat16")),
    "wide, adapters of a bfloat16 base": (WIDE, replace(FEW, **ADAPTED, **HALF, gradient_checkpointing=True)),
    "many logits": (SPEAKING, replace(BASE, **ADAPTED)),
}


def test_what_was_allocated_before_is_no_part_of_the_peak():
    mib = 2**18  # in numbers of 4 bytes
    with bench.Peak() as peak:
        left = torch.zeros(8 * mib)
        torch.zeros(2 * mib)
    assert peak.bytes == 10 * 2**20
    with bench.Peak() as peak:
        del left
        torch.zeros(3 * mib)
    assert peak.bytes == 3 * 2**20


@pytest.mark.parametrize("case", MEASURED)
def test_every_phase_is_within_15_percent_of_what_is_allocated(case):
    config, plan = MEASURED[case]
    measured = bench.measure(config, plan)
    computed = {phase: memory.total(parts) for phase, parts in memory.phases(config, plan).items()}
    assert computed == pytest.approx(measured, rel=0.15)
    assert max(computed.values()) == pytest.approx(max(measured.values()), rel=0.08)


# A tile of logits is 32,768 wide whatever the vocabulary, so it takes most of a small model's SFT and DPO.
TALL = bench.llama(hidden=128, layers=6, kv=2, intermediate=344, vocab=500)
STAGES = {
    "sampling": (DEEP, Sampling("float32", 8, 1, 60, 20)),
    "sampling, many samples of a bfloat16 model": (SPEAKING, Sampling("bfloat16", 32, 8, 30, 20)),
    "SFT": (TALL, Training("sft", micro_batch=2, completion=60)),
    "SFT, micro batches of an adapter": (WIDE, Training("sft", "bfloat16", 4, True, 2, True, completion=20)),
    "reward": (WIDE, Training("reward", micro_batch=1, accumulated=True, completion=20)),
    "reward, adapter": (TALL, Training("reward", "bfloat16", 4, micro_batch=1, completion=40)),
    "DPO": (WIDE, Training("dpo", micro_batch=1, completion=20)),
    "DPO, adapter of a bfloat16 base": (TALL, Training("dpo", "bfloat16", 4, micro_batch=1, completion=60)),
}


@pytest.mark.parametrize("case", STAGES)
def test_every_stage_is_within_15_percent_of_what_is_allocated(case):
    config, plan = STAGES[case]
    if isinstance(plan, Training):
        plan = replace(plan, prompt=len(bench.head()))
    assert memory.total(bench.computed_stage(config, plan)) == pytest.approx(
        bench.measure_stage(config, plan), rel=0.15
    )


@pytest.mark.parametrize("plan", [BASE, replace(BASE, value="model"), replace(BASE, **ADAPTED)])
def test_what_autograd_keeps_is_what_is_computed(plan):
    roles, _ = bench.build(DEEP, plan)
    batch, saved = bench.batch_of(DEEP, plan), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        roles(batch.pack(torch.arange(len(batch.ids))))
    own = {weight.untyped_storage().data_ptr() for weight in roles.parameters()}
    measured = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)
    passes = 2 if plan.value == "model" else 1
    logits = 4 * plan.logit_tokens * DEEP.vocab_size
    computed = passes * (memory.kept(DEEP, plan) + memory.states(DEEP, plan)) + logits
    assert computed == pytest.approx(measured, rel=0.01)


def test_the_cache_is_that_of_the_sampler(monkeypatch):
    made = []

    class Watched(tree_attention.Cohort):
        def __init__(self, *parts):
            super().__init__(*parts)
            made.append(self)

    monkeypatch.setattr(decoders, "Cohort", Watched)
    roles, _ = bench.build(SMALL, BASE)
    bench.draw(roles, SMALL, BASE)
    tensors = [*made[0].context.grid.states, *made[0].own]
    assert memory.cache(SMALL, BASE) == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# ---- exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, TIED])
def test_weights_are_those_of_a_model(config):
    model = LlamaForCausalLM(config)
    assert sum(memory.parameters(config).values()) == models.model_size(model)
    assert memory.model_bytes(config, "float32") == bench.tensor_bytes(model)
    assert memory.model_bytes(config, "bfloat16") == bench.tensor_bytes(model.bfloat16())
    assert memory.model_bytes(config, "float32", head=False) == 2 * bench.tensor_bytes(model.get_decoder())


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
    for plan in (replace(BASE, value="model"), BASE, replace(BASE, **ADAPTED), replace(BASE, **ADAPTED, **HALF)):
        roles, judge = bench.build(SMALL, plan)
        assert memory.resident(SMALL, plan)["weights"] == bench.tensor_bytes(roles, judge)
        counted = {role: sum(map(torch.numel, weights.values())) for role, weights in roles.weights().items()}
        assert memory.trained(SMALL, plan) == counted
        optimizer = bench.optimizer_of(roles)
        bench.steps(roles, optimizer, bench.batch_of(SMALL, plan), plan)
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert memory.resident(SMALL, plan)["moments"] == sum(tensor.nbytes for tensor in moments)
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
    one = replace(LORA_7B, max_batch=1, samples=1, prompt=512, completion=512)
    assert memory.cache(LLAMA_2_7B, one) == 2 * 32 * 4096 * 1024 * 2  # half a MiB a token
    # float32, one token: two norms' input, output and root, q, k, v and what attention gives, the inputs of q and gate
    assert memory.layer_activations(LLAMA_2_7B, PPO()) == 4 * (4 * 4096 + 2 + 4 * 4096 + 32 + 2 * 4096 + 4 * 11008)


def test_completions_of_a_question_share_their_prompt_as_in_training():
    for minibatch, samples, together in ((8, 8, 4), (8, 2, 2), (4, 1, 1)):
        plan = replace(BASE, micro_batch=minibatch, samples=samples)
        packed = bench.batch_of(SMALL, plan).pack(torch.arange(minibatch))
        assert plan.completions_per_row == together
        assert packed["input_ids"].shape == (minibatch // together, plan.length)
        assert packed["targets"].numel() == plan.logit_tokens


def test_the_reward_model_s_batches_are_those_of_its_scoring():
    assert inspect.signature(reward_model.score).parameters["tokens_per_batch"].default == memory.SCORED_TOKENS


def test_a_tile_of_logits_is_that_of_trl():
    assert (memory.HEAD_TOKENS, memory.HEAD_WIDTH) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


@pytest.mark.parametrize("kind", memory.TRAINED)
def test_what_a_training_holds(kind):
    model, adapter = memory.model_bytes(SMALL, "float32"), 4 * memory.lora_parameters(SMALL, 4)
    whole, lora = (memory.training(SMALL, Training(kind, rank=rank)) for rank in (0, 4))
    reference = kind == "dpo"  # the model, or the adapter, as it was
    assert whole["weights"] == model * (1 + reference) and whole["moments"] == 2 * model
    assert lora["weights"] == model + adapter * (1 + reference) and lora["moments"] == 2 * adapter


def test_a_sliding_window_has_the_keys_of_the_prompt_for_every_row():
    plan = Sampling("bfloat16", max_batch=8, samples=8, prompt=100, completion=16, joins=False)
    plain, sliding = (MistralConfig(sliding_window=window) for window in (None, 4_096))
    token = 2 * 2 * plain.num_hidden_layers * plain.num_key_value_heads * plain.head_dim
    assert memory.cache(plain, plan) == token * (100 + 8 * 16)
    assert memory.cache(sliding, plan) == token * 8 * 116


def test_the_stages_of_llama_2_7b_by_hand():
    settings = preset("llama2-7b-40gb", "gsm8k")
    found = memory.stages(LLAMA_2_7B, settings, **LENGTHS)
    assert (settings.hardware.max_batch, settings.hardware.cache_tokens) == (128, 32_000)
    assert settings.sampling.max_new_tokens == 256 and settings.sampling.samples == 8
    token = 2 * 32 * 4096 * 2  # half a MiB: keys and values of all layers in bfloat16
    assert found["01_sampling"]["cache"] == 32_000 * token  # all that is allowed
    assert found["06_exploration"]["cache"] == 32_000 * token
    free = memory.stages(LLAMA_2_7B, replace_hardware(settings, cache_tokens=0), **LENGTHS)
    # 128 rows of 16 questions, and of half as many that joined as others left
    assert free["03_second_sampling"]["cache"] == ((16 + 8) * 256 + 128 * 256) * token
    # prefixes that may be whole rationales, read and laid out; and those of the step before
    rows = free["06_exploration"]
    assert (rows["cache"], rows["scratch"]) == ((4_096 + 128 * 512) * token, 128 * 512 * token)
    assert {parts["weights"] for name, parts in found.items() if "sampling" in name} == {2 * 6_738_415_616}
    adapter = 4 * 39_976_960
    assert found["06_step_dpo"]["weights"] == 2 * 6_738_415_616 + 2 * adapter
    assert found["02_sft"]["gradients"] == adapter and found["02_sft"]["moments"] == 2 * adapter
    assert found["02_sft"] == found["06_rft"]
    assert all(set(parts) <= set(memory.PARTS) for parts in found.values())


def test_ppo_s_plan_is_that_of_the_settings():
    assert memory.ppo_plan(preset("tiny"), prompt=64) == PPO(prompt=64)
    lora = memory.ppo_plan(preset("tiny-lora"), prompt=64)
    assert (lora.lora, lora.value, lora.rank) == (True, "model", 16)
    card = memory.ppo_plan(preset("llama2-7b-24gb", "gsm8k"), prompt=64)
    assert (card.dtype, card.precision, card.gradient_checkpointing) == ("nf4", "bfloat16", True)
    assert (card.micro_batch, card.accumulated, card.max_batch) == (4, True, 64)


def test_gradients_stay_while_they_accumulate():
    for plan in (BASE, replace(BASE, value="model"), replace(BASE, **ADAPTED)):
        parts = memory.update(SMALL, replace(plan, accumulated=True))
        assert parts["gradients"] == 4 * sum(memory.trained(SMALL, plan).values())
        assert memory.total(parts) > memory.total(memory.update(SMALL, plan))


# ---- properties ----------------------------------------------------------------------------------------------

PLANS = st.builds(
    lambda half, **other: PPO(
        **other,
        precision="bfloat16" if half else "float32",
        dtype="bfloat16" if half and other["rank"] else "float32",
    ),
    half=st.booleans(),
    value=st.sampled_from(("model", "head")),
    gradient_checkpointing=st.booleans(),
    rank=st.just(0) | st.integers(1, 64),
    micro_batch=st.integers(1, 32),
    max_batch=st.integers(1, 256),
    samples=st.integers(1, 16),
    prompt=st.integers(1, 1000),
    completion=st.integers(1, 1000),
)


@given(PLANS, st.sampled_from(("rank", "micro_batch", "max_batch", "prompt", "completion")))
@settings(max_examples=200)
def test_more_never_takes_less(plan, name):
    assume(plan.rank or name != "rank")  # from 0 to 1 all weights stop to train
    # one completion more may be one that shares a prompt with others
    more = replace(plan, **{name: getattr(plan, name) * 2 if name == "micro_batch" else getattr(plan, name) + 1})
    for phase in ("rollout", "reference", "update"):  # the reward model reads complete rows, fewer of them if longer
        few, many = (memory.total(memory.phases(LLAMA_2_7B, each)[phase]) for each in (plan, more))
        assert many >= few - 1


@given(PLANS)
@settings(max_examples=200)
def test_parts_are_not_negative(plan):
    phases = memory.phases(LLAMA_2_7B, plan)
    assert all(size >= 0 for parts in phases.values() for size in parts.values())
    assert all(set(parts) <= set(memory.PARTS) for parts in phases.values())


RUNS = st.builds(
    lambda name, half, **hardware: preset(
        name, "coin_flip", hardware=hardware | {"dtype": "bfloat16" if half and "7b" in name else "float32"}
    ),
    name=st.sampled_from(("tiny", "tiny-lora", "llama2-7b-24gb")),
    half=st.booleans(),
    gradient_checkpointing=st.booleans(),
    micro_batch=st.sampled_from((0, 2, 16)),
    max_batch=st.integers(1, 256),
    cache_tokens=st.sampled_from((0, 10_000)),
)


@given(RUNS, st.floats(1e9, 3e11))
@settings(max_examples=50, deadline=None)
def test_the_changes_of_a_fit_make_it_fit(run, capacity):
    fit = memory.fit(LLAMA_2_7B, run, capacity, **LENGTHS)
    sizes = [memory.total(parts) for parts in memory.stages(LLAMA_2_7B, run, **LENGTHS).values()]
    assert fit.needed == max(sizes) and fit.fits == (max(sizes) <= capacity)
    peaks = [fit.needed, *(after for *_, after in fit.changes)]
    assert peaks == sorted(peaks, reverse=True)
    if fit.settings is not None:
        assert memory.fit(LLAMA_2_7B, fit.settings, capacity, **LENGTHS).needed <= capacity
        assert fit.fits == (fit.changes == [])


# ---- what fits, and what is refused --------------------------------------------------------------------------


def test_a_misfit_names_the_settings():
    run = replace_hardware(preset("llama2-7b", "gsm8k"), gradient_checkpointing=False, micro_batch=0)
    text = str(memory.fit(LLAMA_2_7B, run, 80e9, ["02_sft", "01_sampling"], **LENGTHS))
    assert "in 02_sft" in text and "To make it fit: set hardware.gradient_checkpointing = True" in text
    assert str(memory.fit(LLAMA_2_7B, run, 1e9, **LENGTHS)).endswith("take a smaller model or a larger card.")
    assert str(memory.fit(SMALL, run, 40e9, **LENGTHS)).endswith("fits")


def test_one_card_suffices():
    plan = replace(LORA_7B, gradient_checkpointing=True, micro_batch=4, max_batch=32, completion=384)
    for dtype, card in (("bfloat16", 40e9), ("nf4", 24e9)):
        phases = memory.phases(LLAMA_2_7B, replace(plan, dtype=dtype))
        assert max(map(memory.total, phases.values())) <= card


RECIPES = [("llama2-7b", 80e9), ("llama2-7b-40gb", 40e9), ("llama2-7b-24gb", 24e9)]


@pytest.mark.parametrize(("name", "card"), RECIPES)
def test_the_presets_of_llama_2_7b_fit_their_cards_in_all_stages(name, card):
    settings = preset(name, "gsm8k")
    assert memory.fit(LLAMA_2_7B, settings, 0.9 * card, **LENGTHS).fits
    twice = replace_hardware(settings, cache_tokens=2 * settings.hardware.cache_tokens)
    assert not memory.fit(LLAMA_2_7B, twice, card, **LENGTHS).fits  # the card is used


@pytest.mark.parametrize(("name", "card"), RECIPES)
def test_they_fit_with_math_s_long_solutions_too(name, card):
    settings = preset(name, "math")
    assert settings.sampling.max_new_tokens == settings.ppo.max_new_tokens == 1024
    assert memory.fit(LLAMA_2_7B, settings, 0.9 * card, prompt=700, shown=2200).fits


def test_stages_are_judged_by_themselves():
    settings = preset("llama2-7b", "gsm8k")
    assert memory.fit(LLAMA_2_7B, settings, 24e9, ["02_sft"], **LENGTHS).fits
    both = memory.fit(LLAMA_2_7B, settings, 24e9, ["02_sft", "01_sampling"], **LENGTHS)
    assert not both.fits and both.stage == "01_sampling"
    assert memory.fit(LLAMA_2_7B, settings, 1e9, ["02_ranking"], **LENGTHS).fits  # it loads no model


def test_a_stage_that_does_not_fit_names_the_settings_that_make_it():
    settings = replace_hardware(preset("llama2-7b", "gsm8k"), gradient_checkpointing=False, micro_batch=0)
    names = memory.stages(LLAMA_2_7B, settings, **LENGTHS)
    found = {name: memory.fit(LLAMA_2_7B, settings, 80e9, [name], **LENGTHS) for name in names}
    assert list(found) == list(memory.stages(LLAMA_2_7B, settings, **LENGTHS))
    assert {name for name, one in found.items() if not one.fits} == {
        "02_sft", "03_reward_model", "04_ppo", "06_rft", "06_step_dpo", "06_outcome_dpo"
    }  # fmt: skip
    assert found["02_sft"].changes[0][:2] == ("hardware.gradient_checkpointing", True)
    assert "needed (in 02_sft) of 80.0 GB: does not fit." in str(found["02_sft"])
    half = memory.savings(settings)["hardware.micro_batch"].hardware.micro_batch
    assert half == 32 and settings.sft.batch == 64  # divides the batches of all stages


FULL = {"dtype": "float32", "rollout_engine": "native"}


def test_a_run_is_made_to_fit_by_settings_that_are_allowed():
    settings = preset("llama2-7b", "gsm8k", lora={"rank": 0}, hardware=FULL)
    found = memory.fit(LLAMA_2_7B, settings, 40e9, **LENGTHS)
    assert not found.fits and ("lora.rank", 16) in [step[:2] for step in found.changes]
    assert memory.fit(LLAMA_2_7B, found.settings, 40e9, **LENGTHS).fits
    assert memory.fit(LLAMA_2_7B, settings, 1e9, **LENGTHS).settings is None


def test_the_table_of_stages_says_which_cards_suffice():
    settings = preset("llama2-7b-24gb", "gsm8k")
    rows = bench.stage_table(LLAMA_2_7B, [settings], **LENGTHS)
    assert [row["stage"] for row in rows] == list(memory.stages(LLAMA_2_7B, settings, **LENGTHS))
    assert all(row["fits 24 GB"] for row in rows)
    for row in rows:
        assert sum(row[f"{part} GiB"] for part in memory.PARTS) == pytest.approx(row["peak GiB"], abs=0.05)


def test_other_architectures_are_refused():
    for config in (Qwen3Config(), LlamaConfig(attention_bias=True), LlamaConfig(mlp_bias=True)):
        with pytest.raises(ValueError, match="cannot be computed"):
            memory.phases(config, PPO())
