import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import policy, tokenizer

from smlib import models, prompts
from smlib.problems import TASKS, generate
from smlib.steps import worked_solution

SPECIALS = ("<pad>", "<bos>", "<eos>")


@given(st.text() | st.text(alphabet=" \n\r\tAa1.\"'é–\u00a0\u2028😀"))
def test_any_text_comes_back_from_its_tokens(text):
    if not any(special in text for special in SPECIALS):
        ids = models.encode_completion(tokenizer(), text)
        assert tokenizer().decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["Whitney", "Felipe", "Xo", "Zzyzx"])
def test_names_are_spelled_letter_by_letter(name):
    pieces = [tokenizer().decode([i]) for i in models.encode_completion(tokenizer(), f" {name}", eos=False)]
    assert pieces == [" ", *name]


def test_common_words_are_one_token_and_digits_are_apart():
    pieces = [tokenizer().decode([i]) for i in models.encode_completion(tokenizer(), " flips the 42", eos=False)]
    assert pieces[:2] == [" flips", " the"]
    assert "".join(pieces[2:]) == " 42" and pieces[-1] == "2"


def test_special_tokens_differ_and_no_text_of_the_corpus_holds_them():
    ids = [tokenizer().pad_token_id, tokenizer().bos_token_id, tokenizer().eos_token_id]
    assert len(set(ids)) == 3 and None not in ids
    assert tokenizer().convert_ids_to_tokens(ids) == list(SPECIALS)


def test_bos_comes_once_and_eos_only_when_asked():
    bos, eos = tokenizer().bos_token_id, tokenizer().eos_token_id
    prompt = models.encode_prompt(tokenizer(), "Q: How many?\nA:")
    closed = models.encode_completion(tokenizer(), " 3 nuts.\nThe answer is 3.")
    assert prompt[0] == bos and prompt.count(bos) == 1 and eos not in prompt
    assert closed[-1] == eos and closed.count(eos) == 1 and bos not in closed
    assert models.encode_completion(tokenizer(), " 3 nuts.\nThe answer is 3.", eos=False) == closed[:-1]


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
            apart = models.encode_prompt(tokenizer(), head) + models.encode_completion(tokenizer(), tail, eos=False)
            assert apart == models.encode_prompt(tokenizer(), head + tail)


def test_pad_right():
    assert models.pad_right([[5, 6, 7], [8], []], 0).tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]


@torch.inference_mode()
def test_pads_on_the_right_do_not_change_the_logits_of_real_tokens():
    model, row = policy(), models.encode_prompt(tokenizer(), "Q: How many nuts?\nA: three")
    alone = model(input_ids=torch.tensor([row])).logits[0]
    padded = model(input_ids=models.pad_right([row, row * 3], tokenizer().pad_token_id)).logits[0, : len(row)]
    torch.testing.assert_close(padded, alone)


def test_pack_by_hand():
    packed = models.pack([([1, 5], [[6, 2], [7, 8, 2]]), ([1], [[9]])], pad_id=0)
    assert packed["input_ids"].tolist() == [[1, 5, 6, 2, 7, 8, 2], [1, 9, 0, 0, 0, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 0, 0, 0, 0, 0]]
    assert packed["sources"].tolist() == [1, 2, 1, 4, 5, 7]  # the second way on starts from the prefix as well
    assert packed["targets"].tolist() == [6, 2, 7, 8, 2, 9]
    assert packed["rows"].tolist() == [0, 0, 1, 1, 1, 2]
    seen = packed["attention_mask"][0, 0].int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0, 0, 0]  # the end of the first way on
    assert seen[6] == [1, 1, 0, 0, 1, 1, 1]  # the end of the second, which does not see the first
    assert models.sum_rows(torch.arange(6.0), packed["rows"]).tolist() == [1, 9, 5]


tokens = st.lists(st.integers(3, 40), min_size=1, max_size=6)


@given(st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_log_probabilities_and_gradients_of_each_alone(attention, groups):
    model = policy()
    model.set_attn_implementation(attention)
    packed = models.packed_logprobs(model, models.pack(groups, pad_id=0))
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


def test_a_tokenizer_whose_pad_is_its_end_is_refused(tmp_path):
    tokenizer().save_pretrained(tmp_path / "good")
    assert models.load_tokenizer(str(tmp_path / "good")).get_vocab() == tokenizer().get_vocab()
    bad = models.load_tokenizer(str(tmp_path / "good"))
    bad.pad_token = bad.eos_token
    bad.bos_token = bad.unk_token = None
    bad.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="must exist and differ from the end token '<eos>'; add one with"):
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
    assert models.encode_prompt(models.load_tokenizer(str(tmp_path)), text) == models.encode_prompt(tokenizer(), text)


def test_without_the_tiny_base_the_error_says_how_to_make_it(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "TINY_BASE", tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m smlib pretrain"):
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
