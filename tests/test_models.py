import hashlib
import json
from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_model import policy, tokenizer, written
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import hub

from smlib.errors import ModelError
from smlib.learning import sft
from smlib.problems import prompts
from smlib.problems.datasets import TASKS, generate
from smlib.problems.steps import worked_solution
from smlib.sampling import encoding, models, packing

SPECIALS = ("<pad>", "<bos>", "<eos>")


@given(st.text() | st.text(alphabet=" \n\r\tAa1.\"'é–\u00a0\u2028😀"))
def test_any_text_comes_back_from_its_tokens(text):
    if not any(special in text for special in SPECIALS):
        ids = encoding.encode_completion(tokenizer(), text)
        assert tokenizer().decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["Whitney", "Felipe", "Xo", "Zzyzx"])
def test_names_are_spelled_letter_by_letter(name):
    pieces = [tokenizer().decode([i]) for i in encoding.encode_completion(tokenizer(), f" {name}", eos=False)]
    assert pieces == [" ", *name]


def test_common_words_are_one_token_and_digits_are_apart():
    pieces = [tokenizer().decode([i]) for i in encoding.encode_completion(tokenizer(), " flips the 42", eos=False)]
    assert pieces[:2] == [" flips", " the"]
    assert "".join(pieces[2:]) == " 42" and pieces[-1] == "2"


def test_special_tokens_differ_and_no_text_of_the_corpus_holds_them():
    ids = [tokenizer().pad_token_id, tokenizer().bos_token_id, tokenizer().eos_token_id]
    assert len(set(ids)) == 3 and None not in ids
    assert tokenizer().convert_ids_to_tokens(ids) == list(SPECIALS)


def test_bos_comes_once_and_eos_only_when_asked():
    bos, eos = tokenizer().bos_token_id, tokenizer().eos_token_id
    prompt = encoding.encode_prompt(tokenizer(), "Q: How many?\nA:")
    closed = encoding.encode_completion(tokenizer(), " 3 nuts.\nThe answer is 3.")
    assert prompt[0] == bos and prompt.count(bos) == 1 and eos not in prompt
    assert closed[-1] == eos and closed.count(eos) == 1 and bos not in closed
    assert encoding.encode_completion(tokenizer(), " 3 nuts.\nThe answer is 3.", eos=False) == closed[:-1]


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_completion_join_without_a_seam(task):
    for problem in generate(task, 20, seed=0):
        lines, answer = worked_solution(problem)
        completion = " " + "\n".join(lines) + "\n" + prompts.answer_sentence(problem, answer)
        rationale = prompts.split_answer(completion)[0]
        said = completion[len(rationale) + len("\nThe answer is") :]
        for head, tail in (
            (prompts.open_prompt(problem), completion),
            (prompts.conditioned_prompt(problem, problem.answer), completion),
            (prompts.reanswer_prompt(problem, rationale), said),
        ):
            apart = encoding.encode_prompt(tokenizer(), head) + encoding.encode_completion(tokenizer(), tail, eos=False)
            assert apart == encoding.encode_prompt(tokenizer(), head + tail)


def test_pad_right():
    assert packing.pad_right([[5, 6, 7], [8], []], 0).tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]


@torch.inference_mode()
def test_pads_on_the_right_do_not_change_the_logits_of_real_tokens():
    model, row = policy(), encoding.encode_prompt(tokenizer(), "Q: How many nuts?\nA: three")
    alone = model(input_ids=torch.tensor([row])).logits[0]
    padded = model(input_ids=packing.pad_right([row, row * 3], tokenizer().pad_token_id)).logits[0, : len(row)]
    torch.testing.assert_close(padded, alone)


def test_pack_by_hand():
    packed = packing.pack([([1, 5], [[6, 2], [7, 8, 2]]), ([1], [[9]])], pad_id=0)
    assert packed["input_ids"].tolist() == [[1, 5, 6, 2, 7, 8, 2], [1, 9, 0, 0, 0, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0]]
    assert packed["sources"].tolist() == [1, 2, 1, 4, 5, 7]  # the second way on starts from the prefix as well
    assert packed["targets"].tolist() == [6, 2, 7, 8, 2, 9]
    assert packed["rows"].tolist() == [0, 0, 1, 1, 1, 2]
    seen = packed["attention_mask"][0, 0].int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0, 0, 0]  # the end of the first way on
    assert seen[6] == [1, 1, 0, 0, 1, 1, 1]  # the end of the second, which does not see the first
    assert packing.sum_rows(torch.arange(6.0), packed["rows"]).tolist() == [1, 9, 5]


def test_the_gradient_of_packed_rows_is_the_same_to_the_bit_however_threads_meet():
    """A prefix's last state predicts the first token of every continuation. The gradient of an index adds these up in
    the order in which threads come, so of some runs of PPO, alike in all else, one ended with other weights."""
    packed = packing.pack([([1, 2, 3], [[4] * 20] * 64)], pad_id=0)
    states = torch.randn(1, packed["input_ids"].shape[1], 64)
    weights = torch.randn(len(packed["sources"]), 64)

    def gradient() -> torch.Tensor:
        leaf = states.clone().requires_grad_()
        output = SimpleNamespace(last_hidden_state=leaf)
        model = SimpleNamespace(dtype=torch.float32, get_decoder=lambda: lambda **inputs: output)
        (packing.packed_states(model, packed) * weights).sum().backward()
        return leaf.grad

    with threads(1):
        expected = gradient()
    with threads(4):
        assert all(torch.equal(gradient(), expected) for _ in range(30))


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


tokens = st.lists(st.integers(3, 40), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_log_probabilities_and_gradients_of_each_alone(attention, groups):
    model = policy()
    model.set_attn_implementation(attention)
    packed = packing.packed_logprobs(model, packing.pack(groups, pad_id=0))
    (packed.sum() * 3).backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    alone = []
    for prefix, continuations in groups:
        for continuation in continuations:
            ids = torch.tensor([[*prefix, *continuation]])
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            alone.append(logp[len(prefix) - 1 :])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    (torch.cat(alone).sum() * 3).backward()
    torch.testing.assert_close(gradient, model.model.embed_tokens.weight.grad, atol=1e-4, rtol=1e-4)


END = "<|endoftext|>"
QWEN = {"eos_token": END, "pad_token": END, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
SMOLLM = {"bos_token": END, "eos_token": END, "unk_token": END, "additional_special_tokens": ["<|im_start|>"]}
GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}


def byte_tokenizer(special: dict) -> PreTrainedTokenizerFast:
    """The tiny base's tokens without their special ones, and these."""
    made = json.loads(tokenizer().backend_tokenizer.to_str())
    made |= {"added_tokens": [], "post_processor": None}
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer().backend_tokenizer).from_str(json.dumps(made)), **special
    )


@pytest.mark.parametrize("special", [QWEN, SMOLLM], ids=["Qwen2.5", "SmolLM2"])
def test_where_unknown_and_beginning_are_the_end_too_the_first_other_special_token_pads(tmp_path, special):
    spelled = byte_tokenizer(special)
    spelled.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(str(tmp_path))
    assert (loaded.pad_token, loaded.eos_token) == ("<|im_start|>", END) and len(loaded) == len(spelled)


def test_a_tokenizer_whose_pad_is_its_end_is_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path / "good")
    assert models.load_tokenizer(str(tmp_path / "good")).get_vocab() == tokenizer().get_vocab()
    byte_tokenizer(GPT2).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"must exist and differ from the end token '<\|endoftext\|>'; add one with"):
        models.load_tokenizer(str(tmp_path / "bad"))


@pytest.mark.parametrize(("unknown", "pad"), [("<pad>", "<pad>"), (None, "<bos>")])
def test_where_the_pad_is_the_end_or_missing_another_special_token_pads(tmp_path, unknown, pad):
    """As in Llama's, Mistral's (no pad, an unknown token) and DeepSeek's tokenizers (the end pads, none unknown)."""
    spoilt = models.load_tokenizer("tiny")
    spoilt.pad_token, spoilt.unk_token = (None if unknown else "<eos>"), unknown
    spoilt.save_pretrained(tmp_path)
    loaded = models.load_tokenizer(str(tmp_path))
    assert loaded.pad_token == pad and len(loaded) == len(spoilt)


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    text = 'Q: Take the last letters of each words in "Whitney Tj" and concatenate them.\nA:'
    assert encoding.encode_prompt(models.load_tokenizer(str(tmp_path)), text) == encoding.encode_prompt(
        tokenizer(), text
    )


def test_without_the_tiny_base_the_error_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "TINY_BASE", tmp_path)
    with pytest.raises(ModelError, match="smlib pretrain --out"):
        models.load_policy()


def test_a_policy_comes_back_as_it_was_saved(tmp_path):
    policy().save_pretrained(tmp_path)
    loaded = models.load_policy(tmp_path)
    assert not loaded.training and loaded.dtype == torch.float32
    for name, weight in policy().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_a_policy_and_its_adapter_are_held_in_the_precision_asked_for(tmp_path):
    policy().save_pretrained(tmp_path / "base")
    adapted = models.add_lora(policy(), rank=2, alpha=4, targets="all-linear", base="../base")
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("base", "adapter"):
        loaded = models.load_policy(tmp_path / name, "bfloat16")
        assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


def test_tied_weights_count_once():
    model = policy()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding, layer, last_norm = len(tokenizer()) * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32, 32
    assert models.model_size(model) == embedding + layer + last_norm


def test_weights_have_a_hash_where_they_are_local(tmp_path):
    card = json.loads((models.TINY_BASE / "training.json").read_text())
    assert models.weights_sha256("tiny") == card["sha256"]
    assert models.weights_sha256("somebody/model-of-the-hub") is None
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert models.weights_sha256(str(tmp_path)) == hashlib.sha256(b"one").hexdigest()


def test_a_revision_is_what_comes_after_the_at_sign(tmp_path):
    assert models.locate("owner/name") == ("owner/name", None)
    assert models.locate("owner/name@01c7f73d") == ("owner/name", "01c7f73d")
    folder = tmp_path / "run@home"
    folder.mkdir()
    assert models.locate(folder) == (str(folder), None)
    assert models.weights_sha256("owner/name@01c7f73d") is None


def test_a_folder_with_an_at_sign_loads(tmp_path):
    folder = tmp_path / "run@home"
    for part in (policy(), tokenizer()):
        part.save_pretrained(folder)
    assert models.load_policy(folder).config.hidden_size == models.load_config(str(folder)).hidden_size == 32
    assert len(models.load_tokenizer(str(folder))) == len(tokenizer())


LOADERS = [models.load_config, models.load_tokenizer, models.load_policy]


def answer(kind, status: int, text: str = "Cannot access url") -> Exception:
    asked = httpx2.Request("GET", "https://huggingface.co/some/model/resolve/abc/config.json")
    return kind(text, response=httpx2.Response(status, request=asked))


UNREACHED = (
    "some/model is neither a folder here nor in the cache, and https://huggingface.co cannot be reached (no network, "
    "or HF_HUB_OFFLINE is set): connect; or choose another model (--model)"
)
HUB = {
    "gated, no token": (
        answer(errors.GatedRepoError, 401),
        "some/model is gated: accept its licence at https://huggingface.co/some/model, then `hf auth login` or set "
        "HF_TOKEN; or choose another model (--model)",
    ),
    "gated, a token": (
        answer(errors.GatedRepoError, 403),
        "some/model is gated, and your token may not read it: accept its licence at https://huggingface.co/some/model "
        "with the token's account, wait until access is granted, and let a fine-grained token read gated repositories; "
        "or choose another model (--model)",
    ),
    "no model": (
        answer(errors.RepositoryNotFoundError, 401),
        "some/model is neither a folder here nor a model at https://huggingface.co: check its spelling; a private one "
        "needs `hf auth login` or HF_TOKEN; or choose another model (--model)",
    ),
    "no revision": (
        answer(errors.RevisionNotFoundError, 404),
        "some/model has no revision 'abc': give a branch, tag or commit of https://huggingface.co/some/model/commits; "
        "or choose another model (--model)",
    ),
    "not in the cache": (errors.LocalEntryNotFoundError("not on this disk"), UNREACHED),
    "offline": (errors.OfflineModeIsEnabled("offline"), UNREACHED),
    "no connection": (httpx2.ConnectError("refused"), UNREACHED),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("case", HUB)
def test_what_the_hub_refuses_is_said_with_the_way_out(monkeypatch, case, load):
    error, message = HUB[case]
    asked = []

    def refuse(place, *_, revision, **__):
        asked.append((place, revision))
        raise type(error)(*error.args, **({"response": error.response} if hasattr(error, "response") else {}))

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ModelError) as raised:
        load("some/model@abc")
    assert str(raised.value) == message
    assert set(asked) == {("some/model", "abc")}  # tokenizer, config and model are all of that revision
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("load", LOADERS)
def test_what_is_no_model_is_said(tmp_path, load):
    with pytest.raises(ModelError, match=r"holds no model: it has no config\.json\. Give a folder that save"):
        load(str(tmp_path))
    with pytest.raises(ModelError, match="missing is neither a folder here nor a Hub id such as owner/name: "):
        load(str(tmp_path / "missing"))


@pytest.mark.parametrize("config", [{"model_type": "abacus"}, {}, {"model_type": "clip"}])
def test_a_model_of_another_kind_is_said(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"is not a causal language model that transformers knows: see model_type"):
        models.load_policy(tmp_path)


def test_an_error_of_another_kind_keeps_its_words(monkeypatch):
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.load_config("some/model")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), n_embd=32, n_layer=1, n_head=2, **ends)).eval()


@pytest.mark.parametrize("targets", ["q_proj|v_proj", "*_proj"])
def test_targets_that_match_nothing_are_named_beside_what_there_is(targets):
    with pytest.raises(ValueError) as raised:
        models.add_lora(gpt2(), 2, 4, targets, base="")
    assert str(raised.value) == (
        f"lora.targets = {targets!r} matches no layer of GPT2LMHeadModel, or layers that are not linear. The linear "
        "ones are c_attn, c_fc, c_proj, in full such as transformer.h.0.attn.c_attn. Give a regular expression that "
        "matches full names, such as "
        r"'.*\.(c_attn|c_fc)', or 'all-linear'"
    )
    assert models.add_lora(gpt2(), 2, 4, r".*\.(c_attn|c_fc)", base="").peft_config["default"].r == 2


def test_what_is_saved_of_a_model_names_no_folder_and_follows_no_order_of_a_set(tmp_path):
    """A stage that is made again in another process or folder is to leave the same bytes."""
    adapted = models.add_lora(policy(), rank=2, alpha=4, targets="all-linear", base="../base")
    for part in (adapted, models.load_tokenizer("tiny")):
        part.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets) and len(targets) > 6
    assert not {"is_local", "local_files_only"} & json.loads((tmp_path / "tokenizer_config.json").read_text()).keys()


def test_gpt2_whose_layers_are_no_linear_ones_trains_an_adapter(recwarn):
    adapted, before = models.add_lora(gpt2(), 2, 4, "all-linear", base=""), gpt2().state_dict()
    problems = generate("coin_flip", 4, seed=0)
    right = [written(one, f" Yes.\nThe answer is {one.answer}.") for one in problems]
    training = {"epochs": 1.0, "learning_rate": 1e-2, "batch": 2, "seed": 0, "progress": None}
    sft.train_sft(adapted, tokenizer(), problems, right, **training)
    ids = torch.tensor([encoding.encode_prompt(tokenizer(), "Q: How many nuts?\nA: three")])
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        merged = models.merged(adapted, "nowhere")  # the base of an ordinary model is at hand
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.0.{layer}.weight" for layer in layers}
    assert not [one for one in recwarn if "fan_in_fan_out" in str(one.message)]


def test_without_bitsandbytes_four_bits_are_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        models.load_policy("tiny", "nf4")
    assert str(raised.value) == (
        "weights in 'nf4' need bitsandbytes, which is not installed: pip install 'smlib[gpu]', or choose "
        "hardware.dtype = 'bfloat16'"
    )
