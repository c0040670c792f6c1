"""Who draws for the stages: what the settings ask for, one at a time, and named in the manifest."""

import weakref
from functools import partial
from types import SimpleNamespace

import pytest

from smlib.files.artifacts import StageMismatch, require
from smlib.problems.datasets import generate
from smlib.problems.prompts import open_prompt
from smlib.runs import self_explore, self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, engines, models, vllm_engine
from smlib.sampling.engines import EngineError, NativeEngine
from smlib.sampling.factory import make_engine
from smlib.sampling.params import SamplingParams

SMALL = {
    "sampling": {"questions": 12, "samples": 4, "conditioned_questions": 1, "conditioned_samples": 1},
    "evaluation": {"questions": 4, "published": 0, "samples": 2},
    "explore": {"samples": 8},
}
SAMPLING = (
    "01_sampling", "03_second_sampling", "05_evaluation", "06_solutions", "06_exploration", "06_pit_report",
    "06_evaluation",
)  # fmt: skip


def small(**hardware):
    return preset("smoke", "chain_arithmetic", **SMALL, hardware=hardware)


@pytest.fixture
def installed(monkeypatch):
    """The extras that seem to be installed: all, until some are taken out of the set."""
    found = {"vllm", "ray"}
    monkeypatch.setattr(engines, "find_spec", lambda name: name in found or None)
    return found


def test_auto_is_vllm_where_it_is_installed(installed):
    assert [engines.chosen(name) for name in ("auto", "native", "vllm")] == ["vllm", "native", "vllm"]
    assert shared.engine_key(small(engine="auto", workers=3)) == {"engine": "vllm"}
    installed.remove("vllm")
    assert [engines.chosen(name) for name in ("auto", "native", "vllm")] == ["native", "native", "vllm"]
    assert shared.engine_key(small(engine="auto", workers=3)) == {}
    assert isinstance(make_engine("auto", "tiny"), NativeEngine)


def test_auto_is_native_where_vllm_cannot_draw(installed, monkeypatch):
    """It has no 4 bits, and takes over adapters for PPO in one process."""
    beside = partial(shared.engine_name, who="rollout_engine")
    assert engines.chosen("auto", "nf4") == "native" and engines.chosen("vllm", "nf4") == "vllm"
    rounded, adapters = preset("llama2-7b-24gb", "coin_flip"), preset("llama2-7b", "coin_flip")
    assert shared.engine_name(rounded) == beside(rounded) == "native"
    assert shared.engine_name(adapters) == beside(adapters) == "vllm"
    assert beside(small(rollout_engine="auto")) == "native"  # all weights train
    monkeypatch.setattr(shared, "process_state", lambda: SimpleNamespace(num_processes=2))
    assert beside(adapters) == "native" and shared.engine_name(adapters) == "vllm"


def test_what_is_not_installed_is_named(installed, tmp_path):
    installed.clear()
    with pytest.raises(ModuleNotFoundError, match="this engine needs vllm, which is not installed: in an environment"):
        self_motivated.sample_rationales(tmp_path, small(engine="vllm"), progress=False)
    with pytest.raises(ModuleNotFoundError, match="this engine needs ray, which is not installed"):
        shared.load_engine(small(workers=2), "tiny")


def test_the_engine_is_made_as_the_settings_say(monkeypatch):
    asked, made = [], NativeEngine(None, models.load_tokenizer())

    def make(*names, **options):
        asked.append((names, options))
        return made

    monkeypatch.setattr(shared, "make_engine", make)
    assert shared.load_engine(small(engine="auto", max_batch=7, prefix_tokens=5, workers=2), "some/model") is made
    options = {"dtype": "float32", "max_batch": 7, "cache_tokens": 0, "prefix_tokens": 5, "workers": 2}
    options |= {"prompt": "plain"}
    assert asked == [(("auto", "some/model"), options)]
    with make_engine("native", "tiny", dtype="bfloat16", max_batch=7, cache_tokens=99) as engine:
        assert str(engine.model.dtype) == "torch.bfloat16"
        assert (engine.max_batch, engine.cache_tokens) == (7, 99)


def test_texts_and_their_tokens_give_the_same_samples():
    texts = [open_prompt(problem) for problem in generate("coin_flip", 3, seed=0)]
    params, given = SamplingParams(temperature=1.0, max_new_tokens=12, seed=0), {"keys": ["a", "b", "c"], "first": 2}
    with make_engine("native", "tiny") as engine:
        ids = [encoding.encode_prompt(engine.tokenizer, text) for text in texts]
        assert engine.sample(texts, 2, params, **given) == engine.sample_ids(ids, 2, params, **given)


def test_what_one_call_has_read_the_next_one_finds_within_a_block_and_only_there():
    """A prompt goes on where the one of the call before ended, as in exploration."""
    params, read = SamplingParams(temperature=1.0, max_new_tokens=4, seed=0), []
    with make_engine("native", "tiny") as engine:
        engine.model.get_decoder().register_forward_pre_hook(
            lambda decoder, arguments, options: read.append(options["input_ids"].shape), with_kwargs=True
        )
        ids = encoding.encode_prompt(engine.tokenizer, open_prompt(generate("coin_flip", 1, seed=0)[0]))

        def drawn(prompt):
            read.clear()
            [[one]] = engine.sample_ids([prompt], 1, params, keys=["a"])
            return one.token_ids, sum(shape.numel() for shape in read if shape[1] > 1)

        alone = [drawn(ids), drawn([*ids, *ids[1:]])]
        with engine.keep_prefixes():
            together = [drawn(ids), drawn([*ids, *ids[1:]])]
        assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in together]
        assert [count for _, count in alone] == [len(ids), 2 * len(ids) - 1]
        assert [count for _, count in together] == [len(ids), len(ids) - 1]
        assert drawn(ids)[1] == len(ids)  # outside of the block nothing is held


def test_a_closed_engine_holds_no_model():
    with make_engine("native", "tiny") as engine:
        engine.sample(["Q: 2 + 2?\nA:"], 1, SamplingParams(temperature=0.0, max_new_tokens=4, seed=0), keys=["a"])
        model = weakref.ref(engine.model)
    assert model() is None
    engine.close()


def test_stages_close_their_engine_before_the_next_model_is_loaded_and_record_who_drew(
    monkeypatch, tmp_path, installed
):
    """On a GPU vLLM takes most of the card. Here the native engine stands for it."""
    opened, load = [], models.load_policy

    def make(name, base, **options):
        engine = make_engine("native", base)
        engine.name = name
        opened.append(engine)
        return engine

    def checked_load(*args, **options):
        assert all(engine.model is None for engine in opened)
        return load(*args, **options)

    monkeypatch.setattr(shared, "make_engine", make)
    monkeypatch.setattr(models, "load_policy", checked_load)
    self_motivated.run(tmp_path, small(engine="vllm"), progress=False)
    self_explore.run(tmp_path, small(engine="vllm"), progress=False)
    assert len(opened) == 1 + 1 + 3 + 1 + 1 + 1 + 3  # evaluations have one for every model
    assert all(engine.model is None for engine in opened)
    for folder in tmp_path.iterdir():
        recorded = require(tmp_path, folder.name).settings.get("engine")
        assert recorded == ("vllm" if folder.name in SAMPLING else None), folder.name
    with pytest.raises(StageMismatch, match=r"engine = 'vllm', and now engine = '\(not set\)' is asked for"):
        self_motivated.sample_rationales(tmp_path, small(), progress=False)

    base = models.load_tokenizer("tiny")
    text = open_prompt(generate("coin_flip", 1, seed=0)[0])
    for name in ("02_sft", "04_ppo", "06_rft", "06_step_dpo"):  # engines take the tokenizer from the model's folder
        saved = models.load_tokenizer(str(tmp_path / name / "model"))
        assert saved(text) == base(text)
        assert (saved.eos_token_id, saved.pad_token_id) == (base.eos_token_id, base.pad_token_id)


def test_vllm_is_not_started_where_less_is_free_than_it_is_to_take(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    memory = vllm_engine.Memory(free=8e9, total=10e9, share=0.5)
    memory.refuse(0.8)
    with pytest.raises(EngineError, match=r"vLLM was to take 9\.2 GB, and 8\.0 of 10\.0 GB of memory are free"):
        memory.refuse(0.92)


def test_a_closed_engine_draws_no_more():
    engine = make_engine("native", "tiny")
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.sample(["Q: 2 + 2?\nA:"], 1, SamplingParams(1.0, 4, 0), keys=["a"])


def test_what_is_kept_of_prefixes_leaves_room_for_what_is_read():
    engine = make_engine("native", "tiny", cache_tokens=200, prefix_tokens=1_000)
    questions = [encoding.encode_question(engine.tokenizer, one) for one in generate("coin_flip", 20, seed=0)]
    with engine.keep_prefixes():
        drawn = engine.sample_ids(questions, 1, SamplingParams(1.0, 4, 0), keys=list(map(str, range(20))))
        assert len(drawn) == 20 and 0 < engine._tree.tokens <= 100
