"""The sampler draws from the model's own distribution, reports its log-probabilities, and can be repeated exactly."""

from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import smlib
from smlib.sampling import models, sampler
from smlib.sampling.drawing import draw_tokens, truncate, uniforms
from smlib.sampling.params import SamplingParams
from smlib.sampling.sampler import sample, sample_ids
from smlib.sampling.tree_attention import reads_trees

PROMPTS = ["the cat", "a", "on the mat it sat", "that", "hat"]


@pytest.fixture(scope="module")
def tokenizer():
    """One token per letter, and the merged tokens "th" and "at"; <bos> is added to every text."""
    tokens = ["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz \n.", "th", "at"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, [("t", "h"), ("a", "t")]))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def tiny_model(kind="llama", **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    tokens = {"vocab_size": 34, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes | tokens | {"initializer_range": 0.3} | changes)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# What `sample_ids` must do alike: with grouped heads, with the prompts shared or (the last two) not.
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a sliding window": ("mistral", {"sliding_window": 8}),
    "gpt2": ("gpt2", {}),
}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def any_model(request):
    kind, changes = ARCHITECTURES[request.param]
    model = tiny_model(kind, **changes)
    assert reads_trees(model) == (request.param not in ("mistral with a sliding window", "gpt2"))
    return model


PARAMS = SamplingParams(temperature=1.0, max_new_tokens=24, seed=0)
NAMES = {field.name for field in fields(SamplingParams)}


def draw(model, tokenizer, prompts=PROMPTS, n=6, **changes):
    """`sample` with the changes to PARAMS, and the other arguments."""
    params = replace(PARAMS, **{name: value for name, value in changes.items() if name in NAMES})
    others = {name: value for name, value in changes.items() if name not in NAMES}
    return sample(model, tokenizer, prompts, n, params, **others)


@contextmanager
def watched(model):
    """A list that grows by (prompts read, rows that then step) whenever rows begin."""
    seen = []

    def look(decoder, arguments, options):
        count, length = options["input_ids"].shape
        if length > 1:
            seen.append([count, 0])
        elif not seen[-1][1]:
            seen[-1][1] = count

    hook = model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def flat(results):
    return [s for samples in results for s in samples]


def without_logprobs(results):
    return [[(s.text, s.token_ids, s.finish_reason) for s in samples] for samples in results]


@torch.no_grad()
def next_probabilities(model, ids, temperature=1.0):
    return (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(0)


def p_value(tokens, probabilities):
    """Chi-square test of drawn tokens, with the tokens expected less than five times pooled."""
    expected = probabilities / probabilities.sum() * len(tokens)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = [*counts[~rare].tolist(), counts[rare].sum().item()]
    wanted = [*expected[~rare].tolist(), expected[rare].sum().item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2  # otherwise the test shows nothing
    return chisquare(observed, wanted).pvalue


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 0, 0.9), (1.5, 8, 1.0), (1.5, 8, 0.9)]
)
def test_first_token_follows_the_softmax(model, tokenizer, temperature, top_k, top_p):
    probabilities = next_probabilities(model, tokenizer("the")["input_ids"], temperature)
    kept, mass = torch.zeros_like(probabilities), 0.0
    ranked = probabilities.argsort(descending=True)[: top_k or None].tolist()
    total = probabilities[ranked].sum()
    for token in ranked:
        if mass < top_p * total:
            kept[token] = probabilities[token]
            mass += probabilities[token]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": 1}
    (samples,) = draw(model, tokenizer, ["the"], 20_000, max_batch=2000, **settings)
    assert p_value([s.token_ids[0] for s in samples], kept) > 1e-4


def test_later_token_follows_the_softmax_after_the_drawn_ones(model, tokenizer):
    (samples,) = draw(model, tokenizer, ["the"], 6000, max_new_tokens=2, max_batch=1500)
    pairs = [s.token_ids for s in samples if len(s.token_ids) == 2]
    firsts = [first for first, _ in pairs]
    first = max(set(firsts), key=firsts.count)
    seconds = [pair[1] for pair in pairs if pair[0] == first]
    assert len(seconds) > 300
    assert p_value(seconds, next_probabilities(model, [*tokenizer("the")["input_ids"], first])) > 1e-4


def test_truncation_of_a_distribution_worked_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert truncate(probs, 3, 1.0).tolist() == torch.tensor([[0.0, 0.4, 0.2, 0.3]]).tolist()
    assert truncate(probs, 0, 0.65).tolist() == torch.tensor([[0.0, 0.4, 0.0, 0.3]]).tolist()
    assert truncate(probs, 3, 0.4).tolist() == torch.tensor([[0.0, 0.4, 0.0, 0.0]]).tolist()  # 0.4 / 0.9 > 0.4
    assert truncate(probs, 0, 1e-9).tolist() == torch.tensor([[0.0, 0.4, 0.0, 0.0]]).tolist()  # never nothing


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [3, 256, 1000])
def test_a_token_is_where_the_cumulative_probability_passes_the_random_number(temperature, vocabulary):
    """In one sum over the vocabulary, in float64; drawing sums blocks first, and may differ by float32's rounding."""
    torch.manual_seed(vocabulary)
    logits, numbers = 3 * torch.randn(2000, vocabulary), torch.rand(2000, dtype=torch.float64)
    cdf = (logits.double() / temperature).softmax(1).cumsum(1)
    tokens = draw_tokens(logits, numbers, temperature)
    rows = torch.arange(2000)
    before = torch.where(tokens > 0, cdf[rows, tokens - 1], 0.0)
    assert ((before <= numbers + 1e-5) & (numbers < cdf[rows, tokens] + 1e-5)).all()
    assert (tokens == torch.searchsorted(cdf, numbers[:, None], right=True)[:, 0]).float().mean() > 0.998


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.8}])
def test_as_many_logits_at_once_as_one_likes_give_the_same_samples(any_model, tokenizer, settings, monkeypatch):
    expected = draw(any_model, tokenizer, n=8, **settings)
    size = any_model.config.vocab_size
    for logits, floats in ((1, 1), (7 * size, 2 * size), (9 * size, 100 * size)):
        monkeypatch.setattr(sampler, "LOGITS", {"cpu": logits})
        monkeypatch.setattr(sampler, "FLOATS", {"cpu": floats})
        found = draw(any_model, tokenizer, n=8, **settings)
        assert without_logprobs(found) == without_logprobs(expected)
        for one, other in zip(flat(found), flat(expected), strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_greedy_equals_generate(any_model, tokenizer):
    results = draw(any_model, tokenizer, n=1, temperature=0)
    for prompt, (one,) in zip(PROMPTS, results, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = any_model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert list(one.token_ids) == expected[0, ids.shape[1] :].tolist()


def training_logprobs(model, tokenizer, results):
    """Those of all drawn tokens, one after the other, by forward passes without a cache."""
    found = []
    for prompt, samples in zip(PROMPTS, results, strict=True):
        start = tokenizer(prompt)["input_ids"]
        for one in samples:
            ids = torch.tensor([[*start, *one.token_ids]])
            with torch.no_grad():
                logprobs = model(ids).logits[0, len(start) - 1 : -1].float().log_softmax(1)
            found.append(logprobs.gather(1, ids[0, len(start) :, None])[:, 0])
    return torch.cat(found)


def assert_logprobs_are_those_of_training(model, tokenizer, results):
    drawn = torch.tensor([logprob for samples in results for one in samples for logprob in one.logprobs])
    torch.testing.assert_close(drawn, training_logprobs(model, tokenizer, results), atol=1e-4, rtol=0)


def test_logprobs_equal_a_training_forward(any_model, tokenizer):
    """Whatever the temperature and the truncation, and with rows that leave the batch at different times."""
    results = draw(any_model, tokenizer, temperature=1.4, top_p=0.95, max_new_tokens=40)
    assert {s.finish_reason for samples in results for s in samples} == {"stop", "length"}
    assert_logprobs_are_those_of_training(any_model, tokenizer, results)


def test_lora_policy_is_sampled_with_its_adapter(tokenizer):
    policy = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    ).eval()
    results = draw(policy, tokenizer)
    assert_logprobs_are_those_of_training(policy, tokenizer, results)
    with policy.disable_adapter():
        assert draw(policy, tokenizer) != results


def test_bfloat16_is_as_far_from_float32_as_in_a_plain_forward_pass(tokenizer):
    """So little is lost to the parts that attention is made of, and to the order in which they are summed."""
    model = tiny_model()
    results = draw(model.bfloat16(), tokenizer, n=4, max_new_tokens=16)
    drawn = torch.tensor([logprob for samples in results for one in samples for logprob in one.logprobs])
    plain = training_logprobs(model, tokenizer, results)
    exact = training_logprobs(model.float(), tokenizer, results)  # of the same rounded weights
    assert (drawn - exact).abs().mean() < 1.5 * (plain - exact).abs().mean() < 0.05


def test_samples_do_not_depend_on_batch_order_or_n(any_model, tokenizer):
    expected = without_logprobs(draw(any_model, tokenizer, n=4))
    for max_batch in (3, 7, 11):
        assert without_logprobs(draw(any_model, tokenizer, n=4, max_batch=max_batch)) == expected
    order = [3, 0, 4, 2, 1]
    shuffled = without_logprobs(draw(any_model, tokenizer, [PROMPTS[i] for i in order], n=4, max_batch=9))
    assert shuffled == [expected[i] for i in order]
    many = without_logprobs(draw(any_model, tokenizer, n=20))
    assert [samples[:4] for samples in many] == expected
    (alone,) = draw(any_model, tokenizer, PROMPTS[:1], n=1)
    assert without_logprobs([alone])[0][0] == expected[0][0]


def test_samples_are_addressed_by_number(any_model, tokenizer):
    """n = 5 is n = 2, and later n = 3 from number 2 on."""
    whole = without_logprobs(draw(any_model, tokenizer, n=5))
    start, rest = (without_logprobs(draw(any_model, tokenizer, **part)) for part in ({"n": 2}, {"n": 3, "first": 2}))
    assert [a + b for a, b in zip(start, rest, strict=True)] == whole


def test_a_partial_completion_is_continued_as_its_ids(model, tokenizer):
    """Self-Explore draws from the middle: greedy from a prefix of the greedy answer gives the rest of it."""
    prompt = tokenizer("on the mat")["input_ids"]
    params = SamplingParams(temperature=0.0, max_new_tokens=12, seed=0)
    [[whole]] = sample_ids(model, tokenizer, [prompt], 1, params)
    part = list(whole.token_ids[:5])
    [[rest]] = sample_ids(model, tokenizer, [prompt + part], 1, replace(params, max_new_tokens=7))
    assert rest.token_ids == whole.token_ids[5:]


def test_a_lower_token_limit_gives_the_start_of_the_same_sample(model, tokenizer):
    long, short = draw(model, tokenizer), draw(model, tokenizer, max_new_tokens=5)
    for a, b in zip(flat(long), flat(short), strict=True):
        assert b.token_ids == a.token_ids[:5]


def test_seed_key_and_sample_number_each_change_the_random_numbers():
    stream = uniforms(0, "a", 0, 4)
    for other in [uniforms(1, "a", 0, 4), uniforms(0, "b", 0, 4), uniforms(0, "a", 1, 4)]:
        assert not set(stream) & set(other)
    assert uniforms(0, "a", 0, 9)[:4].tolist() == stream.tolist()


def test_random_numbers_are_the_published_ones():
    """SHAKE-256 of "0 0 a", first eight bytes, little end first, 52 bits: results stay repeatable over versions."""
    assert uniforms(0, "a", 0, 1).tolist() == [0.22299539836315674]


def test_equal_prompts_with_different_keys_differ(model, tokenizer):
    first, second = draw(model, tokenizer, ["the", "the"], keys=["x", "y"])
    assert first != second
    assert without_logprobs([second]) == without_logprobs(draw(model, tokenizer, ["the"], keys=["y"]))


def test_sample_ids_is_the_same_code_with_ids(model, tokenizer):
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert ids[0][0] == tokenizer.bos_token_id
    assert sample_ids(model, tokenizer, ids, 6, PARAMS, keys=PROMPTS) == draw(model, tokenizer)
    bare = sample_ids(model, None, ids, 6, PARAMS, keys=PROMPTS)
    assert [[s.token_ids for s in samples] for samples in bare] == [
        [s.token_ids for s in samples] for samples in draw(model, tokenizer)
    ]
    assert {s.text for samples in bare for s in samples} == {""}


def test_text_ends_before_the_end_of_sequence_token_and_token_ids_with_it(model, tokenizer):
    results = flat(draw(model, tokenizer, max_new_tokens=40))
    assert {s.finish_reason for s in results} == {"stop", "length"}
    for s in results:
        assert (s.token_ids[-1] == tokenizer.eos_token_id) == (s.finish_reason == "stop")
        assert tokenizer.eos_token_id not in s.token_ids[:-1]
        assert len(s.token_ids) == len(s.logprobs) == (40 if s.finish_reason == "length" else len(s.token_ids))
        assert s.text == shown(tokenizer, s.token_ids)


def shown(tokenizer, ids):
    """The text of tokens up to the first special one, by transformers' own decoder."""
    special = [place for place, token in enumerate(ids) if token in tokenizer.all_special_ids]
    return tokenizer.decode(ids[: special[0]] if special else ids)


def test_every_end_token_of_the_generation_config_ends_a_sample(tokenizer):
    """Instruct models name several, such as the end of a turn beside the end of a text."""
    model, letter = tiny_model(), tokenizer.convert_tokens_to_ids("e")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, letter]
    free = flat(draw(tiny_model(), tokenizer))
    ended = flat(draw(model, tokenizer))
    assert {one.token_ids[-1] for one in ended if one.finish_reason == "stop"} == {tokenizer.eos_token_id, letter}
    for one, other in zip(ended, free, strict=True):
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert not {tokenizer.eos_token_id, letter}.intersection(one.token_ids[:-1])


@pytest.mark.parametrize("max_batch", [2, 256])
def test_a_stop_string_cuts_the_unstopped_sample(model, tokenizer, max_batch):
    free = flat(draw(model, tokenizer))
    stop = (free[0].text[5:8], free[1].text[9:11], "t")
    stopped = flat(draw(model, tokenizer, stop=stop, max_batch=max_batch))
    assert sum(a != b for a, b in zip(free, stopped, strict=True)) > 3
    for a, b in zip(free, stopped, strict=True):
        count = len(b.token_ids)
        assert b.token_ids == a.token_ids[:count]
        assert not any(s in b.text for s in stop)
        if any(s in a.text for s in stop):
            assert b.finish_reason == "stop"
            whole = shown(tokenizer, b.token_ids)
            assert whole.startswith(b.text)
            assert any(whole[len(b.text) :].startswith(s) for s in stop)
            shorter = shown(tokenizer, b.token_ids[:-1])
            assert not any(s in shorter for s in stop)
        else:
            assert (b.text, b.finish_reason) == (a.text, a.finish_reason)


def test_a_model_is_left_as_it_was(tokenizer):
    model = tiny_model().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    draw(model, tokenizer, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    model.lm_head.forward = None  # makes the forward pass fail
    with pytest.raises(TypeError):
        draw(model, tokenizer, max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation


def test_dropout_is_off_while_sampling(tokenizer):
    model = tiny_model(attention_dropout=0.5)
    assert draw(model.train(), tokenizer) == draw(model.eval(), tokenizer)


def test_a_bar_is_drawn_on_standard_output_only_when_asked_for(model, tokenizer, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    draw(model, tokenizer, max_new_tokens=2)
    assert capsys.readouterr() == ("", "")
    draw(model, tokenizer, max_new_tokens=2, progress="sampling")
    out, err = capsys.readouterr()
    assert "sampling" in out
    assert err == ""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the runner does
    draw(model, tokenizer, max_new_tokens=2, progress="sampling")
    assert capsys.readouterr() == ("", "")


def test_no_prompts_give_no_samples(model, tokenizer):
    assert draw(model, tokenizer, []) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n = 0 is not allowed: give a whole number from 1"),
        ({"first": -1}, "first = -1 is not allowed: give a whole number from 0"),
        ({"prompts": ["the", ""]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"max_batch": 0}, "max_batch = 0"),
        ({"temperature": -0.5}, r"temperature = -0\.5 is not allowed: give 0 \(greedy\), or a number from 0\.01"),
        ({"top_p": 0.0}, "top_p = 0.0 is not allowed: give a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": -1}, "top_k = -1"),
        ({"stop": "Q:"}, "stop is 'Q:', but must be a sequence"),
        ({"stop": ("",)}, "non-empty"),
        ({"keys": ["x"]}, "1 keys were given for 5 prompts"),
        ({"keys": ["x", "y", "z", "x", "u"]}, "key 'x' is given 2 times"),
        ({"prompts": ["the", "the"]}, "key 'the' is given 2 times"),
        ({"max_new_tokens": 120}, r"15 tokens.*max_new_tokens=120.*128 positions.*lower max_new_tokens"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        draw(model, tokenizer, **changes)


def test_prompts_of_ids_that_cannot_be_sampled_are_named(model):
    with pytest.raises(ValueError, match="no tokens"):
        sample_ids(model, None, [[]], 1, PARAMS)
    with pytest.raises(ValueError, match="need a tokenizer"):
        sample_ids(model, None, [[1]], 1, replace(PARAMS, stop=("x",)))


def test_a_bound_on_the_tokens_held_changes_no_sample_but_the_rows_that_step_together(model):
    prompts, params = [[1, 2, 3], [4, 5], [6] * 40], replace(PARAMS, max_new_tokens=10)

    def drawn(cache_tokens):
        with watched(model) as seen:
            return sample_ids(model, None, prompts, 4, params, cache_tokens=cache_tokens), seen

    free, together = drawn(0)
    assert together == [[3, 12]]
    bound, together = drawn(160)  # the long prompt is held twice as it begins, and a row has room for 16 tokens
    assert together == [[1, 4], [2, 8]]
    assert [[one.token_ids for one in group] for group in bound] == [[one.token_ids for one in group] for group in free]
    assert drawn(120)[1][0] == [1, 2]


def test_params_have_one_form_and_do_not_change():
    params = SamplingParams(temperature=1, max_new_tokens=8.0, seed=0, stop=["Q:"])
    assert params == SamplingParams(1.0, 8, 0, top_p=1.0, top_k=0, stop=("Q:",))
    assert repr(params.temperature) == "1.0" and repr(params.max_new_tokens) == "8" and hash(params)
    with pytest.raises(FrozenInstanceError):
        params.seed = 1


def test_the_example_of_the_package():
    params = smlib.SamplingParams(temperature=0.7, max_new_tokens=16, seed=0)
    base, tokenizer = models.load_policy("tiny"), models.load_tokenizer("tiny")
    samples = smlib.sample(base, tokenizer, ["Q: 2 + 2?\nA:"], 4, params)
    assert len(samples) == 1 and samples[0][3].text == tokenizer.decode(
        samples[0][3].token_ids, skip_special_tokens=True
    )
