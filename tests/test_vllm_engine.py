"""vLLM draws what our own sampler would: the same boundary, endings, log-probabilities, distribution, addressing.

It needs an environment of its own, with vLLM's build for CPUs: `make test-vllm`.
"""

import os
from dataclasses import fields, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import children
from scipy.stats import chisquare

from smlib.sampling import drawing, encoding, models, packing, params
from smlib.sampling.engines import EngineError, NativeEngine
from smlib.sampling.factory import make_engine
from smlib.sampling.vllm_engine import VLLMEngine, base_seed

# Little memory and any processor; set before vLLM is imported.
for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():
    os.environ.setdefault(name, value)
pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` runs these tests in its environment")

PROMPTS = ["Q: 2 + 2?\nA:", "Q: Alice has 3 apples and gets 4 more. How many?\nA:", "the", "Q: What is 12 + 7?\nA:"]


@pytest.fixture(scope="module")
def engine():
    with VLLMEngine("tiny", enforce_eager=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def native():
    return make_engine("native", "tiny")


def random_adapter(seed):
    """The base with a random adapter on all its linear layers."""
    torch.manual_seed(seed)
    lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(models.load_policy("tiny"), lora).eval()


PARAMS = params.SamplingParams(temperature=1.0, max_new_tokens=32, seed=0)
NAMES = {field.name for field in fields(params.SamplingParams)}


def draw(engine, prompts=PROMPTS, n=6, **changes):
    """The engine's samples with the changes to PARAMS, and the other arguments."""
    own = replace(PARAMS, **{name: value for name, value in changes.items() if name in NAMES})
    others = {"keys": list(prompts)} | {name: value for name, value in changes.items() if name not in NAMES}
    return engine.sample(prompts, n, own, **others)


def without_logprobs(results):
    return [[(s.text, s.token_ids, s.finish_reason) for s in samples] for samples in results]


def flat(results):
    return [s for samples in results for s in samples]


@torch.no_grad()
def next_logits(model, tokenizer, prompt, token_ids=()):
    """Logits [token, vocabulary] from which the tokens after the prompt are drawn."""
    ids = encoding.encode_prompt(tokenizer, prompt)
    return model(torch.tensor([[*ids, *token_ids]])).logits[0, len(ids) - 1 :]


def largest_difference(model, tokenizer, prompts, results):
    """Between the samples' log-probabilities and those of a training forward pass, in nats."""
    worst = 0.0
    for prompt, samples in zip(prompts, results, strict=True):
        for s in samples:
            logits = next_logits(model, tokenizer, prompt, s.token_ids)[:-1]
            expected = packing.token_logprobs(logits, torch.tensor(s.token_ids))
            worst = max(worst, (torch.tensor(s.logprobs) - expected).abs().max().item())
    return worst


def test_greedy_equals_the_native_engine(engine, native):
    ours, theirs = (draw(one, n=1, temperature=0, max_new_tokens=64) for one in (native, engine))
    assert without_logprobs(theirs) == without_logprobs(ours)


def test_logprobs_equal_a_training_forward(engine, native):
    """Whatever the temperature and the truncation, and in the float32 of the checkpoint."""
    results = draw(engine, temperature=1.4, top_p=0.95, top_k=50, max_new_tokens=64)
    assert {s.finish_reason for s in flat(results)} == {"stop", "length"}
    assert all(len(s.logprobs) == len(s.token_ids) for s in flat(results))
    assert largest_difference(native.model, native.tokenizer, PROMPTS, results) < 1e-4


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 12, 0.9)])
def test_first_token_follows_the_softmax(engine, native, temperature, top_k, top_p):
    logits = next_logits(native.model, native.tokenizer, "the")[-1:]
    probabilities = drawing.truncate((logits.double() / temperature).softmax(1), top_k, top_p)[0]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
    (samples,) = draw(engine, ["the"], 4000, **settings)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=len(probabilities))
    expected = probabilities / probabilities.sum() * len(samples)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5  # pooled
    groups = [(counts[i].item(), expected[i].item()) for i in (~rare).nonzero()[:, 0]]
    if expected[rare].sum() > 0:
        groups.append((counts[rare].sum().item(), expected[rare].sum().item()))
    assert len(groups) > 2  # otherwise the test shows nothing
    assert chisquare(*zip(*groups, strict=True)).pvalue > 1e-4


def test_samples_do_not_depend_on_batch_order_or_n(engine):
    expected = without_logprobs(draw(engine, n=8))
    assert len(set(flat(expected))) > 8
    many = without_logprobs(draw(engine, n=16))
    assert [samples[:8] for samples in many] == expected
    later = without_logprobs(draw(engine, n=8, first=8))
    assert later == [samples[8:] for samples in many]
    (alone,) = without_logprobs(draw(engine, PROMPTS[2:3], n=1, first=5))
    assert alone == expected[2][5:6]
    crowd = without_logprobs(draw(engine, n=200))  # more tokens to read than vLLM reads in one step
    assert [samples[:16] for samples in crowd] == many
    shuffled = without_logprobs(draw(engine, PROMPTS[::-1], n=8))
    assert shuffled == expected[::-1]


def test_seed_and_key_change_the_samples(engine):
    first, second = without_logprobs(draw(engine, ["the", "the"], keys=["x", "y"]))
    assert first != second
    assert without_logprobs(draw(engine, ["the"], keys=["y"])) == [second]
    assert without_logprobs(draw(engine, ["the"], keys=["y"], seed=1)) != [second]


def test_seeds_are_the_published_ones():
    """SHA-256 of "0 a", first eight bytes, little end first, 62 bits: the same on every machine."""
    assert base_seed(0, "a") == 3653435744101636979
    assert len({base_seed(seed, key) for seed in range(3) for key in "abc"}) == 9


def test_a_stop_string_cuts_the_unstopped_sample_as_in_the_native_engine(engine, native):
    free = draw(engine, max_new_tokens=48)
    stop = ("answer", ".\n", free[0][0].text[3:6])
    stopped = draw(engine, max_new_tokens=48, stop=stop)
    ending = params.Ending((native.tokenizer.eos_token_id,), stop, native.tokenizer)
    expected = [[ending.cut(list(s.token_ids), list(s.logprobs)) for s in samples] for samples in free]
    assert without_logprobs(stopped) == without_logprobs(expected)
    assert sum(a != b for a, b in zip(flat(without_logprobs(free)), flat(without_logprobs(stopped)), strict=True)) > 12
    assert all(len(s.logprobs) == len(s.token_ids) for s in flat(stopped))


def test_text_ends_before_the_end_of_sequence_token_and_token_ids_with_it(engine, native):
    results = flat(draw(engine))
    assert {s.finish_reason for s in results} == {"stop", "length"}
    eos = native.tokenizer.eos_token_id
    for s in results:
        assert (s.token_ids[-1] == eos) == (s.finish_reason == "stop")
        assert eos not in s.token_ids[:-1]
        assert s.finish_reason == "stop" or len(s.token_ids) == 32
        assert s.text == native.tokenizer.decode(s.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["add_request", "step"])  # while prompts are queued, and while they are drawn from
def test_an_interrupted_call_leaves_nothing_behind(method, engine, monkeypatch):
    expected = without_logprobs(draw(engine))
    original, calls = getattr(engine.llm.llm_engine, method), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.llm.llm_engine, method, interrupted)
        draw(engine, seed=1)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert without_logprobs(draw(engine)) == expected


def test_every_adapter_handed_over_is_sampled_as_peft_applies_it(native, tmp_path):
    """As PPO does: into the same folder again and again. The base is sampled before the first."""
    greedy, seen = {"n": 1, "temperature": 0}, []
    with VLLMEngine("tiny", lora_rank=4, enforce_eager=True) as engine:
        assert without_logprobs(draw(engine, **greedy)) == without_logprobs(draw(native, **greedy))
        for seed in range(3):
            policy = random_adapter(seed)
            policy.save_pretrained(tmp_path)
            engine.load_adapter(tmp_path)
            seen.append(without_logprobs(draw(engine, **greedy)))
            assert seen[-1] == without_logprobs(draw(NativeEngine(policy, native.tokenizer), **greedy))
            assert largest_difference(policy, native.tokenizer, PROMPTS, draw(engine)) < 1e-4
        assert all(one != other for place, one in enumerate(seen) for other in seen[:place])
        policy = random_adapter(3)
        policy.peft_config["default"].r = 32
        policy.save_pretrained(tmp_path)
        with pytest.raises(Exception, match="greater than max_lora_rank"):
            engine.load_adapter(tmp_path)


def test_the_folder_of_an_adapter_is_a_model(native, tmp_path):
    """04_ppo/model is one: vLLM applies it to the base that it names."""
    policy = random_adapter(0)
    policy.peft_config["default"].base_model_name_or_path = models.locate("tiny")[0]
    policy.save_pretrained(tmp_path)
    native.tokenizer.save_pretrained(tmp_path)
    with make_engine("auto", str(tmp_path), dtype="float32") as engine:
        assert isinstance(engine, VLLMEngine)
        assert largest_difference(policy, native.tokenizer, PROMPTS, draw(engine)) < 1e-4


def test_an_adapter_needs_an_engine_that_takes_one(engine, tmp_path):
    with pytest.raises(ValueError, match="this engine takes no adapter: make it with lora_rank="):
        engine.load_adapter(tmp_path)


def test_by_default_it_takes_a_share_of_what_is_free(engine):
    """Of this machine, where vLLM's own default is 0.92 of all, and fails where 18 % are in use."""
    taken = engine.llm.llm_engine.vllm_config.cache_config.gpu_memory_utilization
    assert 0 < taken < 0.5


def test_more_memory_than_is_free_is_refused_in_a_sentence(monkeypatch, capfd):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    with pytest.raises(EngineError, match=r"vLLM was to take [\d.]+ GB, and [\d.]+ of [\d.]+ GB of memory are free"):
        make_engine("vllm", "tiny", share=0.999)
    assert "Traceback" not in capfd.readouterr().err


def test_where_vllm_does_not_start_a_sentence_says_so(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")  # GiB
    with pytest.raises(EngineError, match=r"vLLM does not start with tiny: .*of memory are free\)\. End other"):
        VLLMEngine("tiny", enforce_eager=True)


def test_a_closed_engine_leaves_no_process():
    before = children()
    with VLLMEngine("tiny", enforce_eager=True) as engine:
        own = children() - before
        assert own and draw(engine, n=1, temperature=0)
    assert not own & children()
    engine.close()


def test_a_beginning_is_continued_by_its_tokens(engine, native):
    """Exploration: from a prefix of a sample, by token ids; a longer start of the greedy text gives the same end."""
    ((whole,),) = draw(native, PROMPTS[:1], 1, temperature=0)
    prompt = encoding.encode_prompt(native.tokenizer, PROMPTS[0])
    for cut in (1, 5, 9):
        shorter = replace(PARAMS, temperature=0.0, max_new_tokens=32 - cut)
        ((rest,),) = engine.sample_ids([[*prompt, *whole.token_ids[:cut]]], 1, shorter, keys=["x"])
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-4)


def test_a_bar_is_drawn_on_standard_output_only_when_asked_for(engine, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    draw(engine, max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    draw(engine, max_new_tokens=2, progress="sampling")
    out, err = capfd.readouterr()
    assert "sampling" in out
    assert err == ""


def test_no_prompts_give_no_samples(engine):
    assert draw(engine, []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n = 0 is not allowed: give a whole number from 1"),
        ({"temperature": -0.5}, r"temperature = -0\.5 is not allowed: give 0 \(greedy\), or a number from 0\.01"),
        ({"temperature": 0.005}, r"temperature = 0\.005 is not allowed: give 0 \(greedy\), or a number from 0\.01"),
        ({"top_p": 0.0}, "top_p = 0.0 is not allowed"),
        ({"stop": "Q:"}, "stop is 'Q:', but must be a sequence"),
        ({"keys": ["x"]}, "1 keys were given for 4 prompts"),
        ({"max_new_tokens": 510}, "max_new_tokens=510 is beyond the model's 512 positions"),
    ],
)
def test_bad_arguments_are_named(engine, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(engine, **changes)
