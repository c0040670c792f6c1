"""The plan against arithmetic by hand, against what runs really did, and against the machine."""

import json
import re
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smlib.cli import main
from smlib.errors import UsageError
from smlib.problems import prompts
from smlib.problems.datasets import load
from smlib.problems.downloads import DatasetError
from smlib.runs import questions, self_motivated
from smlib.runs.settings import preset
from smlib.sampling import encoding, models
from smlib.scale import memory, plan
from smlib.scale.plan import Assumed, Card, Lengths, Speeds, Work

ROOT = Path(__file__).parents[1]
LENGTHS = Lengths(question=70, longest=200, shown=700, conditioned=900, solution=100)
ALWAYS = Assumed(base=0.5, tuned=0.5, distinct=1.0, solution=50)


def gsm8k(name: str = "llama2-7b", **overrides):
    try:
        load("gsm8k", "train", limit=1)
    except DatasetError as error:
        pytest.skip(f"no published datasets here: {error}")
    return preset(name, "gsm8k", **overrides)


def machine_with(free: float, monkeypatch) -> None:
    """A machine without a GPU, of whose memory so many bytes are free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))


def card_with(free: float, monkeypatch) -> None:
    """A GPU with so many bytes for tensors: CUDA itself takes 1 GB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free + 1e9), int(80e9)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")


def stage(found: list[Work], name: str) -> Work:
    return next(one for one in found if one.stage == name)


# ---- counts --------------------------------------------------------------------------------------------------


def test_hours_are_tokens_over_speeds():
    at = Speeds(read=1, drawn=2, scored=5, trained=0.01, rolled=4)
    done = Work("01_sampling", 1, read=3_600, drawn=7_200, scored=0, trained=36)
    assert plan.hours(done, at) == pytest.approx(1 + 1 + 0 + 1)
    assert plan.hours(replace(done, stage="04_ppo"), at) == pytest.approx(1 + 0.5 + 0 + 1)  # drawn by its own engine


def test_expected_counts_of_two_samples_by_hand():
    """With a + b = 1 and mean 1/2 the beta distribution is the arcsine: both right 3/8, one of each 1/4."""
    assert plan.expected(2, 0.5, 1.0, lambda right, _: right == 2) == pytest.approx(3 / 8)
    assert plan.expected(2, 0.5, 1.0, lambda right, wrong: right == wrong == 1) == pytest.approx(1 / 4)


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.floats(0.1, 1.0))
def test_expected_right_and_wrong_samples_make_all_that_are_distinct(samples, right, distinct):
    total = plan.expected(samples, right, distinct, lambda good, bad: good + bad)
    assert total == pytest.approx(max(round(samples * distinct), 1))
    assert plan.expected(samples, right, distinct, lambda good, _: good) == pytest.approx(total * right, abs=1e-6)


def test_the_counts_of_a_small_run_by_hand():
    settings = preset("smoke", "coin_flip")
    found = plan.work(settings, ALWAYS)
    asked = len(self_motivated.training_problems(settings))
    drawn = stage(found, "01_sampling")
    assert asked == 16 and drawn.samples == 16 * 4 + 2 * (8 * 2 * 1)  # open; given right and wrong, and read again
    assert drawn.drawn == (64 + 16) * 50 + 16 * 16
    updates = stage(found, "04_ppo")
    assert updates.samples == 2 * 16 and updates.drawn == 32 * 50
    assert stage(found, "03_second_sampling").samples == 8 * 4
    published = sum(map(len, questions.published_problems(settings)[0].values()))  # 8, or 0 where there are none
    assert stage(found, "05_evaluation").samples == 3 * (8 + published + 8 * 2)
    assert [one.stage for one in found] == sorted((one.stage for one in found), key=lambda name: name[:2])


def test_counts_are_those_of_a_run(tmp_path):
    """Completions exactly; tokens of a real stage 01 within a tenth, once its own lengths are given."""
    settings = preset("smoke", "coin_flip")
    made = self_motivated.sample_rationales(tmp_path, settings, progress=False)
    rows = [row for row in made.read_rows("rationales") if row["source"] == "open"]
    tokenizer = models.load_tokenizer("tiny")
    drawn = [len(encoding.encode_completion(tokenizer, row["text"])) for row in rows]
    found = stage(plan.work(settings, Assumed(solution=sum(drawn) / len(drawn))), "01_sampling")
    assert found.samples == 64 + 16 + 16 and len(rows) == 64
    assert found.drawn == pytest.approx(sum(drawn) * 80 / 64 + 256, rel=0.1)


def test_exemplars_are_read_once():
    settings = preset("smoke", "coin_flip", sampling={"shots": "smlib"})
    few, many = (
        stage(plan.work(replace(settings, sampling=replace(settings.sampling, questions=n))), "01_sampling").read
        for n in (16, 32)
    )
    question = plan.token_lengths(settings).question
    assert many - few == pytest.approx(16 * question, rel=0.2)
    few, many = (
        stage(plan.work(replace(settings, evaluation=replace(settings.evaluation, questions=n))), "05_evaluation").read
        for n in (8, 16)
    )
    assert many - few == pytest.approx(3 * 8 * question, rel=0.2)


def test_more_of_everything_takes_longer():
    settings, at = preset("smoke", "coin_flip"), Speeds(1e3, 1e3, 1e3, 1e3, 1e3)
    plain = {one.stage: plan.hours(one, at) for one in plan.work(settings)}
    more = preset(
        "smoke", "coin_flip", sampling={"samples": 8}, ppo={"updates": 4}, sft={"epochs": 2.0}, explore={"samples": 8},
        dpo={"epochs": 2.0}, evaluation={"samples": 4}, reward={"epochs": 2.0},
    )  # fmt: skip
    for one in plan.work(more):
        assert plan.hours(one, at) > 1.2 * plain[one.stage], one.stage


def test_a_run_without_questions_left_for_a_reward_model_has_the_stages_of_self_explore():
    names = [one.stage for one in plan.work(gsm8k("mistral-7b"))]
    assert names[:3] == ["01_sampling", "02_sft", "06_solutions"] and "04_ppo" not in names


# ---- lengths -------------------------------------------------------------------------------------------------


def test_lengths_of_a_base_with_a_tokenizer_are_counted():
    settings = preset("smoke", "coin_flip")
    tokenizer = models.load_tokenizer("tiny")
    ids = [
        len(encoding.encode_prompt(tokenizer, prompts.open_prompt(one)))
        for one in questions.training_problems(settings)
    ]
    found = plan.token_lengths(settings, 500)
    assert (found.question, found.longest, found.shown) == (sum(ids) / len(ids), max(ids), 0)
    assert found.solution == settings.sampling.max_new_tokens


def test_estimated_tokens_by_hand():
    assert plan.estimated_tokens("Ann has 12 nuts.") == pytest.approx(1.1 * 6)  # Ann has 1 2 nuts .
    assert plan.estimated_tokens("mathematics") == pytest.approx(1.1 * 2)


def test_estimated_tokens_of_gsm8k_are_near_those_of_mistral_s_tokenizer():
    """Measured with it: 69.9 tokens in the mean test question."""
    texts = [prompts.open_prompt(one) for one in load("gsm8k", "test")] if gsm8k() else []
    assert sum(map(plan.estimated_tokens, texts)) / len(texts) == pytest.approx(69.9, rel=0.05)


# ---- speeds --------------------------------------------------------------------------------------------------


def test_speeds_of_llama_2_7b_by_hand():
    """A slow card without overhead: a step reads the weights and the rows' keys and values once."""
    settings = preset(
        "llama2-7b", "coin_flip", hardware={"max_batch": 1, "gradient_checkpointing": False, "engine": "native"}
    )
    weights = 6_476_005_376 + 32_000 * 4_096
    found = plan.speeds(memory.LLAMA_2_7B, settings, Card(80e9, 1e9, 1e18), LENGTHS)
    moved = 6_738_415_616 * 2 + (70 / 8 + 50) * 2 * 32 * 4_096 * 2
    assert found.drawn == pytest.approx(plan.BUSY / (moved / 1e9 / plan.DRAW_SHARE + 32 * plan.LAUNCH))
    found = plan.speeds(memory.LLAMA_2_7B, settings, Card(80e9, 1e15, 1e12), LENGTHS)
    assert found.read == pytest.approx(plan.READ_SHARE * 1e12 / (2 * weights))
    assert found.trained == pytest.approx(plan.TRAIN_SHARE * 1e12 / (4 * weights))  # frozen weights have no gradient


def test_what_makes_training_slower_and_drawing_faster(monkeypatch):
    card, config = plan.CARDS["A100 80 GB"], memory.LLAMA_2_7B
    plain = plan.speeds(config, preset("llama2-7b", "coin_flip"), card, LENGTHS)
    kept = plan.speeds(
        config, preset("llama2-7b", "coin_flip", hardware={"gradient_checkpointing": False}), card, LENGTHS
    )
    assert kept.trained == pytest.approx(1.5 * plain.trained)
    few = plan.speeds(config, preset("llama2-7b", "coin_flip", hardware={"max_batch": 8}), card, LENGTHS)
    assert few.drawn < plain.drawn / 8
    step = plan.BUSY * 256 / plain.drawn  # seconds
    with monkeypatch.context() as patch:
        patch.setattr(plan, "LAUNCH", 0.0)
        unlaunched = plan.speeds(config, preset("llama2-7b", "coin_flip"), card, LENGTHS)
    assert step == pytest.approx(plan.BUSY * 256 / unlaunched.drawn + 32 * plan.LAUNCH)
    through = plan.speeds(config, preset("llama2-7b", "coin_flip", hardware={"engine": "vllm"}), card, LENGTHS)
    assert through.drawn > plain.drawn and through.rolled == plain.rolled == plain.drawn
    beside = plan.speeds(config, preset("llama2-7b", "coin_flip", hardware={"rollout_engine": "vllm"}), card, LENGTHS)
    assert (beside.drawn, beside.rolled) == (plain.drawn, through.drawn)


@pytest.mark.parametrize("reading", [0.1, 0.7])
def test_every_speed_of_this_machine_is_measured(reading, monkeypatch):
    """On a clock of the test's own: reading and drawing take 0.5 s, reading alone less, or more on a busy machine."""
    times = iter([0.0, reading, 1.0, 1.5, 2.0, 2.1, 3.0, 3.1])
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    settings = preset("smoke", "coin_flip", sampling={"max_new_tokens": 32})
    found = plan.measure(settings, "tiny", questions=8)
    assert all(50 < speed < 1e7 for speed in astuple(found))


def test_few_micro_batches_are_trained_on_to_measure(monkeypatch):
    rows = []
    monkeypatch.setattr(plan, "TRAINED", 1)
    monkeypatch.setattr(plan, "_train", lambda model, tokenizer, learned, *_: rows.append(len(learned)))
    plan.measure(preset("smoke", "coin_flip"), "tiny", questions=8, tokens=4)
    assert rows == [8, 8]  # of 32, once to warm up and once with the clock


def test_continuations_need_room_too():
    """The tiny base has 512 positions: a rationale and a continuation of it, of 256 tokens each, leave none."""
    long = preset("tiny", "all", sampling={"max_new_tokens": 256})
    config = plan.config_of("tiny")
    plan.check_settings(long, config, ["01_sampling", "05_evaluation"])
    for names in (["06_exploration"], ["06_pit_report"]):
        with pytest.raises(UsageError, match=r"sampling\.max_new_tokens = 256 twice, .* the model's 512 positions"):
            plan.check_settings(long, config, names)
    long = preset("tiny", "all", ppo={"max_new_tokens": 300})
    plan.check_settings(long, config, ["04_ppo"])
    with pytest.raises(UsageError, match=r"ppo\.max_new_tokens = 300 twice"):
        plan.check_settings(preset("tiny", "all", ppo={"max_new_tokens": 300, "value": "rollouts", "lam": 0.0}), config)


# ---- memory, disk and the text -------------------------------------------------------------------------------


def test_disk_of_llama_2_7b():
    settings = preset("llama2-7b", "coin_flip")
    sizes = plan.disk(settings, memory.LLAMA_2_7B, plan.work(settings))
    assert sizes["the base, downloaded"] == 2 * 6_738_415_616
    assert sum(sizes.values()) == pytest.approx(70e9, rel=0.1)
    assert plan.disk(preset("smoke"), memory.LLAMA_2_7B, [])["the base, downloaded"] == 0


@pytest.mark.parametrize("name", ["llama2-7b", "llama2-7b-24gb", "small", "mistral-7b"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(name, tmp_path, capsys):
    gsm8k()
    out = tmp_path / "run"
    assert main(["run", "--preset", name, "--dry-run", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name} on gsm8k: ") and max(map(len, shown.splitlines())) <= 110
    for wanted in ("01_sampling", "06_exploration", "RTX 4090", "H100 80 GB", "Disk: ", "Assumed: ", "not measured"):
        assert wanted in shown
    assert not out.exists()


def test_a_dry_run_of_a_base_that_is_here_has_this_machine_s_hours(monkeypatch, capsys):
    """Speeds of one token a second make the hours countable: 3,600 tokens an hour."""
    asked = []
    monkeypatch.setattr(plan, "measure", lambda _, path, *, tokens: asked.append(path) or Speeds(1, 1, 1, 1, 1))
    assert main(["run", "--preset", "smoke", "--task", "coin_flip", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert asked == ["tiny"] and max(map(len, shown.splitlines())) <= 120
    ppo = stage(plan.work(preset("smoke", "coin_flip")), "04_ppo")
    minutes = round(sum(astuple(ppo)[2:]) / 60)
    assert re.search(rf"^04_ppo .* {minutes // 60}:{minutes % 60:02}( +0:00){{4}}$", shown, re.MULTILINE)
    assert re.search(r"GB +here +RTX 4090", shown)


def test_a_base_that_is_elsewhere_or_too_large_is_not_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "measure", lambda *_, **__: pytest.fail("it was measured"))
    model = models.add_lora(models.load_policy("tiny"), 4, 4, "all-linear", base="meta-llama/Llama-2-7b-hf")
    model.save_pretrained(tmp_path)
    elsewhere = preset("smoke", "coin_flip", base=str(tmp_path))
    assert plan.config_of(elsewhere.base) is memory.LLAMA_2_7B and not plan.measurable(elsewhere)
    assert plan.measurable(preset("smoke", "coin_flip"))
    machine_with(1e6, monkeypatch)
    assert main(["run", "--preset", "smoke", "--task", "coin_flip", "--dry-run"]) == 0
    assert not re.search(r"GB +here +RTX 4090", capsys.readouterr().out)


def test_a_plan_is_printed_where_measuring_needs_what_is_not_installed(monkeypatch, capsys):
    def missing(*_, **__):
        raise UsageError("bitsandbytes is not installed")

    monkeypatch.setattr(plan, "measure", missing)
    assert main(["run", "--preset", "smoke", "--task", "coin_flip", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "hours are left out: bitsandbytes is not installed" in shown and "RTX 4090" in shown


def test_the_recipes_fit_their_cards():
    """24 GB suffice for the 4-bit recipe, 40 for bfloat16, by the computed table."""
    for name, capacity in (("llama2-7b-24gb", 24e9), ("llama2-7b-40gb", 40e9), ("llama2-7b", 80e9)):
        settings = gsm8k(name)
        needed = plan.peaks(settings, memory.LLAMA_2_7B, plan.token_lengths(settings))
        assert max(needed.values()) < capacity, (name, needed)


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    gsm8k()
    machine_with(8e9, monkeypatch)
    for command in ("run", "stage", "train-policy", "explore"):
        out = tmp_path / command
        assert main([command, "--preset", "llama2-7b", "--task", "gsm8k", "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert "there is no GPU here and 8.0 GB of memory free" in error and "--preset small" in error
        assert not out.exists()


def test_too_small_a_card_is_told_which_settings_to_change(monkeypatch):
    settings = gsm8k()
    card_with(39e9, monkeypatch)
    message = r"on a card: \d+\.\d GB needed \(in \d\d_\w+\) of 39.0 GB: does not fit\. .*set hardware\.\w+ = "
    with pytest.raises(plan.DoesNotFit, match=message):
        plan.check(settings)
    card_with(79e9, monkeypatch)
    plan.check(settings)


def test_the_tiny_base_fits_anywhere():
    plan.check(preset("tiny"))


QWEN3 = {"model_type": "qwen3", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
BIASES = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "attention_bias": True}
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}


@pytest.mark.parametrize("config", [GPT2, QWEN3, BIASES], ids=["gpt2", "qwen3", "biases"])
def test_models_without_formulas_are_planned_without_bytes_and_not_refused(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan.check(preset("tiny", base=str(tmp_path)))
    command = ["run", "--preset", "smoke", "--task", "coin_flip", "--model", str(tmp_path), "--dry-run"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    reason = f"not for a '{config['model_type']}' with these options"
    assert reason in " ".join(shown.split()) and "RTX 4090" not in shown
    assert re.search(r"^04_ppo +32 ", shown, re.MULTILINE) and max(map(len, shown.splitlines())) <= 110


def test_stages_that_are_not_made_are_not_judged(monkeypatch, tmp_path, capsys):
    machine_with(24e9, monkeypatch)
    settings = preset("llama2-7b", "coin_flip")
    plan.check(settings, ["02_sft", "02_ranking"])
    with pytest.raises(plan.DoesNotFit, match="01_sampling"):
        plan.check(settings, ["01_sampling", "02_sft"])
    command = ["stage", "02_sft", "--preset", "llama2-7b", "--task", "coin_flip", "--out", str(tmp_path / "run")]
    assert main(command) == 1 and "first run notebook 0" in capsys.readouterr().err


def test_weights_that_are_sharded_are_not_judged(monkeypatch):
    whole = preset("llama2-7b", "coin_flip", lora={"rank": 0}, hardware={"dtype": "float32"})
    machine_with(80e9, monkeypatch)
    with pytest.raises(plan.DoesNotFit):
        plan.check(whole)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plan.check(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": {"targets": "c_attn"}}, "lora.targets = 'c_attn' matches no layer of LlamaForCausalLM"),
        ({"hardware": {"micro_batch": 5}}, "a batch of 64 cannot be split into micro batches of 5"),
        ({"hardware": {"micro_batch": 16}, "ppo": {"minibatch": 24}}, "minibatch = 24 in 1 processes cannot be split"),
    ],
)
def test_settings_that_a_late_stage_would_refuse_are_refused_at_once(changed, message, monkeypatch, tmp_path):
    machine_with(1e12, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.check(preset("llama2-7b", "coin_flip", **changed))


def test_a_dry_run_without_the_questions_plans_generated_ones(monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise DatasetError("gsm8k is not here")

    monkeypatch.setattr(questions, "load", unreachable)
    monkeypatch.setattr(questions, "published_problems", lambda settings: ({}, {}))
    assert main(["run", "--preset", "llama2-7b", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("gsm8k is not here\nThis plan is for the generated coin flips instead")
    assert "llama2-7b on coin_flip: meta-llama" in shown


def test_every_stage_that_is_planned_has_a_memory():
    settings = preset("llama2-7b", "coin_flip")
    needed = memory.stages(memory.LLAMA_2_7B, settings, prompt=100, shown=200)
    assert {one.stage for one in plan.work(settings)} <= set(needed)


def test_the_tables_of_the_docs_are_those_of_the_results():
    """results/plan_7b.csv, which notebook 08 writes."""
    found = pd.read_csv(ROOT / "results" / "plan_7b.csv")
    names = ("docs/benchmarks.md", "docs/scaling.md")
    benchmarks, scaling = ((ROOT / name).read_text(encoding="utf-8") for name in names)
    for preset_, card in (
        ("llama2-7b-24gb", "RTX 4090"), ("llama2-7b-40gb", "A100 40 GB"), ("llama2-7b", "A100 80 GB"),
        ("llama2-7b", "H100 80 GB"), ("small", "RTX 4090"),
    ):  # fmt: skip
        rows = found[(found["preset"] == preset_) & (found["card"] == card)]
        fullest = rows.loc[rows["GB"].idxmax()]
        trains = rows["stage"].str.contains("sft|reward|rft|dpo")
        first = rows["stage"] < "06"
        sums = [f"{rows['hours'][part].sum():.1f}" for part in (first, ~first)]
        trained = f"{rows['GB'][trains].max():.1f}"
        row = rf"\| `{preset_}`[^|]* \| {card} \| [^|]* \| {fullest['GB']:.1f} "
        assert re.search(rf"{row}\| {trained} \| {sums[0]} \| {sums[1]} \|", benchmarks), (preset_, card)
        assert re.search(rf"{row}\({fullest['stage']}\) \| {sums[0]} \| {sums[1]} \|", scaling), (preset_, card)


def test_values_by_rollouts_are_planned_for():
    """Four completions from each of 3.5 steps, half as long: eight times the tokens drawn."""
    head, rollouts = (
        next(one for one in plan.work(preset("tiny", "coin_flip", ppo={"value": value})) if one.stage == "04_ppo")
        for value in ("head", "rollouts")
    )
    tries = plan.STEPS * preset("tiny").ppo.value_samples
    assert rollouts.samples == head.samples * (1 + tries)
    assert rollouts.drawn == pytest.approx(head.drawn * (1 + tries / 2))
    assert rollouts.trained == head.trained and rollouts.read > head.read and rollouts.scored > head.scored
