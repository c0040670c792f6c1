"""Text and tokens agree exactly, on every kind of tokenizer that users' models have."""

import copy
from itertools import chain

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from spelled import SPECIAL, TOKENIZERS
from tiny_model import tokenizer as tiny
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.runs import shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models

PROBLEM = Problem("gsm8k/train/0", "gsm8k", "Ann has 3 nuts and gets 4. How many are it?", "7", "number")
WORDS = [
    " Ann",
    "Ann",
    " 3 + 4 = 7",
    ".",
    "\n",
    "\n\n",
    "  ",
    " ",
    " The answer is 18.",
    "é",
    " 中",
    "😀",
    "�",
    "\t",
    "</s>",
]
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
MADE = {name: make() for name, make in TOKENIZERS.items()}
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def drawn(tokenizer, data, most=12):
    """Token ids such as a model may draw: any but special ones, whole characters and parts of them."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    any_token = st.sampled_from([token for token in range(len(tokenizer)) if token not in special])
    whole = st.sampled_from(WORDS).map(lambda text: encoding.encode_completion(tokenizer, text, eos=False))
    parts = data.draw(st.lists(st.lists(any_token, min_size=1, max_size=1) | whole, max_size=most))
    return list(chain.from_iterable(parts))


@every_kind
@given(text=TEXT)
@example(" 18.")  # a decoder that takes a blank away gives "18."
@example("18.")
@example("\nThe answer is")
@example("  two blanks")
@example("")
def test_a_completion_survives_its_tokens(kind, text):
    tokenizer = MADE[kind]
    ids = encoding.encode_completion(tokenizer, text, eos=False)
    assert encoding.decode(tokenizer, ids) == text
    assert encoding.encode_completion(tokenizer, text) == [*ids, tokenizer.eos_token_id]


@every_kind
@given(data=st.data())
def test_prompt_and_completion_are_what_the_model_saw(kind, data):
    """By transformers' own decoder of both at once, for any tokens that a model draws."""
    tokenizer, prompt = MADE[kind], "Q: How many?\nA:"
    head, ids = encoding.encode_prompt(tokenizer, prompt), drawn(MADE[kind], data)
    whole = tokenizer.decode([*head, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.removeprefix(" ") == prompt + encoding.decode(tokenizer, ids)


@every_kind
@given(data=st.data(), characters=st.integers(0, 40))
def test_the_first_characters_keep_the_drawn_tokens(kind, data, characters):
    tokenizer, ids = MADE[kind], drawn(MADE[kind], data)
    text = encoding.decode(tokenizer, ids)
    assume("\ufffd" not in text)  # half a character: a byte more or less changes the text of the whole run of bytes
    kept = encoding.first_characters(tokenizer, [*ids, tokenizer.eos_token_id], characters)
    assert encoding.decode(tokenizer, kept) == text[:characters]
    if characters >= len(text):
        assert kept == ids
    # all but the token at the cut are as drawn
    whole = max(n for n in range(len(ids) + 1) if text[:characters].startswith(encoding.decode(tokenizer, ids[:n])))
    assert kept[:whole] == ids[:whole]


def test_a_token_that_holds_more_than_the_first_characters_is_the_only_new_one():
    tokenizer = MADE["byte-level, marks with line breaks (Qwen)"]
    ids = encoding.encode_completion(tokenizer, " The answer is 7.\n\nQ", eos=False)
    assert ".\n\n" in [tokenizer.decode(token) for token in ids]
    kept = encoding.first_characters(tokenizer, ids, len(" The answer is 7."))
    assert kept[:-1] == ids[: len(kept) - 1] and [tokenizer.decode(token) for token in kept[-1:]] == ["."]
    goes_on = encoding.first_characters(tokenizer, ids, len(" The answer is 7."), then="\n\nQ")
    assert goes_on == ids, "as the model would have written it"


@every_kind
def test_bos_comes_once_and_no_end_follows_a_prompt(kind):
    tokenizer = TOKENIZERS[kind]()
    plain = encoding.encode_prompt(tokenizer, "Q: How?\nA:")
    assert plain.count(tokenizer.bos_token_id) == (tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id)
    tokenizer.add_eos_token = tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    framed = encoding.encode_prompt(copy.deepcopy(tokenizer), "Q: How?\nA:")
    assert tokenizer.eos_token_id not in framed
    assert framed == [tokenizer.bos_token_id, *(token for token in plain if token != tokenizer.bos_token_id)]


@every_kind
def test_a_special_token_that_is_spelled_out_is_text(kind):
    tokenizer = MADE[kind]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for spelled in (SPECIAL[2], SPECIAL[1], *(["<|end|>"] if kind.startswith("instruct") else [])):
        ids = encoding.encode_completion(tokenizer, f" 7{spelled} 8", eos=False)
        assert not special.intersection(ids) and encoding.decode(tokenizer, ids) == f" 7{spelled} 8"
        asked = encoding.encode_prompt(tokenizer, f"Q: {spelled}?\nA:")
        assert not special.intersection(asked[1:])


@every_kind
def test_the_text_ends_at_the_first_special_token(kind):
    """What follows an end or another turn is another text: not " 7. The answer is 8."."""
    tokenizer = MADE[kind]
    ids = encoding.encode_completion(tokenizer, " 7.", eos=False)
    more = encoding.encode_completion(tokenizer, " The answer is 8.", eos=False)
    for end in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        assert encoding.decode(tokenizer, [*ids, end, *more]) == " 7."
        assert encoding.first_characters(tokenizer, [*ids, end, *more], 99) == ids


def test_every_end_of_the_generation_config_ends_a_completion():
    tokenizer = MADE["byte-level with bos (Llama-3)"]
    assert encoding.ends(tokenizer, GenerationConfig(eos_token_id=[7, 5])) == (2, 5, 7)
    assert encoding.ends(tokenizer, GenerationConfig(eos_token_id=5)) == (2, 5)
    assert encoding.ends(tokenizer, GenerationConfig()) == (2,)
    assert encoding.ends(None, GenerationConfig(eos_token_id=[7, 5])) == (5, 7)


def test_a_completion_is_closed_once():
    tokenizer = MADE["LlamaTokenizer"]
    ids = encoding.encode_completion(tokenizer, " 7.", eos=False)
    assert encoding.closed(tokenizer, " 7.") == encoding.closed(tokenizer, ids) == [*ids, 2]
    assert encoding.closed(tokenizer, (*ids, 2)) == [*ids, 2]
    assert encoding.closed(tokenizer, (*ids, 1)) == [*ids, 2]  # another end: what training never shows
    assert encoding.closed(tokenizer, ()) == [2]


@every_kind
def test_pieces_show_every_blank(kind):
    tokenizer = MADE[kind]
    ids = encoding.encode_completion(tokenizer, " Ann has 18.\nThe end")
    shown = encoding.pieces(tokenizer, ids)
    assert "".join(shown[:-1]) == " Ann has 18.\nThe end" and shown[-1] == tokenizer.eos_token


def test_an_unknown_letter_ends_no_text():
    backend = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, " 18": 2, ".": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex(r" \w+|."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    assert encoding.decode(tokenizer, encoding.encode_completion(tokenizer, " 18€.")) == " 18."


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = TOKENIZERS["byte-level (GPT-2)"]()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-sequence token: choose another model"):
        models.load_tokenizer(str(tmp_path))


def test_tokens_that_were_added_later_are_known():
    tokenizer = TOKENIZERS["LlamaTokenizer"]()
    ids = encoding.encode_completion(tokenizer, " 7.", eos=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert encoding.decode(tokenizer, [*ids, tokenizer.pad_token_id, *ids]) == " 7."


def test_a_tokenizer_that_changes_texts_is_refused():
    tokenizer = TOKENIZERS["byte-level (GPT-2)"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match=r"the tokenizer of some/model changes texts: ' 18\.' comes back as '18\.'"):
        encoding.check_tokenizer(tokenizer, "some/model")


# ----------------------------------------------------------------------------------------------------- chat


def instruct(chat=True):
    tokenizer = TOKENIZERS["instruct (chat template)"]()
    encoding.use_prompt(tokenizer, "chat" if chat else "plain")
    return tokenizer


def test_a_chat_asks_by_the_template_and_ends_with_its_turn():
    tokenizer = instruct()
    asked = tokenizer.decode(encoding.encode_question(tokenizer, PROBLEM))
    assert asked == f"<|turn|>user\n{PROBLEM.question}<|end|>\n<|turn|>assistant\n"
    assert tokenizer.eos_token == "<|end|>"
    assert encoding.encode_completion(tokenizer, "7")[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    plain = instruct(chat=False)
    assert plain.decode(encoding.encode_question(plain, PROBLEM)) == prompts.open_prompt(PROBLEM)
    assert plain.eos_token == "</s>"


def test_exemplars_are_turns_that_went_before():
    tokenizer = instruct()
    turns = tokenizer.decode(encoding.encode_question(tokenizer, PROBLEM, given="9", shots="smlib")).split("<|turn|>")
    shown = prompts.exemplars("gsm8k", wrong=True) + prompts.exemplars("gsm8k")
    assert len(turns) == 1 + 2 * len(shown) + 2
    assert turns[1] == f"user\n{shown[0].problem.question}\nGiven answer: {shown[0].given}<|end|>\n"
    assert turns[2] == f"assistant\n{shown[0].rationale}\nThe answer is {shown[0].given}.<|end|>\n"
    assert turns[-2:] == [f"user\n{PROBLEM.question}\nGiven answer: 9<|end|>\n", "assistant\n"]


def test_a_reanswer_goes_on_within_the_assistant_s_turn():
    tokenizer = instruct()
    ids = encoding.encode_completion(tokenizer, "3 + 4 = 7.\nThe answer is 8.", eos=False)
    asked = tokenizer.decode(encoding.encode_reanswer(tokenizer, PROBLEM, ids, len("3 + 4 = 7.")))
    assert asked.endswith("<|turn|>assistant\n3 + 4 = 7.\nThe answer is")


def test_marks_that_a_question_spells_out_are_text_in_a_chat():
    tokenizer = instruct()
    asked = Problem("q/0", "gsm8k", "Is <|end|> 3?<|turn|>assistant", "7", "number")
    ids = encoding.encode_question(tokenizer, asked)
    turn, end = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    assert (ids.count(turn), ids.count(end)) == (2, 1)


def test_bos_comes_once_in_a_chat():
    tokenizer = TOKENIZERS["LlamaTokenizer"]()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    )
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    encoding.use_prompt(tokenizer, "chat")
    ids = encoding.encode_question(tokenizer, PROBLEM, shots="smlib")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token == "</s>"
    assert ids.count(tokenizer.eos_token_id) == len(prompts.exemplars("gsm8k"))


def test_a_chat_names_no_day_and_a_template_that_refuses_is_one_sentence():
    tokenizer = instruct()
    day = "{% if not date_string is defined %}{{ strftime_now('%d') }}{% endif %}{{ date_string }}"
    tokenizer.chat_template = day + tokenizer.chat_template
    assert tokenizer.decode(encoding.encode_question(tokenizer, PROBLEM)).startswith("26 Jul 2024<|turn|>user")
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(ValueError, match="refuses a question with 8 exemplars before it: only one turn; choose"):
        encoding.encode_question(tokenizer, PROBLEM, shots="smlib")


def test_stages_of_plain_and_chat_runs_do_not_mix():
    plain, chat = (preset("smoke", "coin_flip", sampling={"prompt": prompt}) for prompt in encoding.PROMPTS)
    for group in ("sft", "reward", "ppo", "evaluation", "dpo"):
        asked = shared.stage_keys(chat, group)
        assert asked.pop("prompt") == "chat" and asked == shared.stage_keys(plain, group)


def test_an_engine_s_tokenizer_is_the_stages_own(tmp_path):
    """Its ends, too: samples end with the assistant's turn."""
    TOKENIZERS["instruct (chat template)"]().save_pretrained(tmp_path)
    tokenizer = models.load_tokenizer(str(tmp_path), "chat")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    settings = preset("smoke", "coin_flip", base=str(tmp_path), sampling={"prompt": "chat"})
    with shared.load_engine(settings, settings.base) as engine:
        assert (engine.tokenizer.eos_token, engine.tokenizer.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        ends = encoding.ends(engine.tokenizer, engine.model.generation_config)
        assert tokenizer.convert_tokens_to_ids("<|end|>") in ends


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match=r"has no chat template: choose an instruct model, or sampling\.prompt"):
        encoding.use_prompt(TOKENIZERS["LlamaTokenizer"](), "chat")
    with pytest.raises(ValueError, match=r"sampling\.prompt 'Chat' is unknown; choose one of: plain, chat"):
        encoding.use_prompt(tiny(), "Chat")
