"""Tokenizers of every kind that users' models have, each of a few hundred tokens, learned from the same short texts.

Named after the models that have such a one; `TOKENIZERS[name]()` makes it anew.
"""

from functools import cache, partial

from sums import TRAIN, asked, steps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
# Llama-3's and Qwen's: a mark takes the line breaks after it along, so that ".\n" is one token.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@cache
def texts() -> list[str]:
    told = [
        f"Q: {asked('gsm8k', a, b)}\nA: " + "\n".join(steps("gsm8k", a, b, a + b)) + f"\nThe answer is {a + b}.\n\n"
        for a, b in TRAIN
    ]
    return [*told, "Given answer: 18\nÀ café, 中 and 😀 \n", "0 1 2 3 4 5 6 7 8 9\n"] * 4


def byte_level(split: bool = False, bos: bool = False, blank_first: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=blank_first, use_regex=not split)
    if split:
        spelled = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), spelled])
    backend.pre_tokenizer, backend.decoder = spelled, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(texts(), trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of words with "▁" for the blank before them, and all bytes."""
    learner = Tokenizer(BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(texts(), BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False))
    learned = learner.get_vocab()
    kept = sorted(
        (token for token in learned if token not in SPECIAL and token.isascii() | ("▁" in token)), key=learned.get
    )
    tokens = [*SPECIAL, *BYTES, *kept]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token in kept:  # every token is made of two that were there before it
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [half for half in halves if all(part in vocabulary for part in half)][:1]
    return vocabulary, merges


SPACES = decoders.Replace("▁", " ")


def with_bytes(prepend: str, strip: bool) -> PreTrainedTokenizerFast:
    """prepend: who puts a blank before a text, "never", "first" or "always" (Metaspace), or "normalizer"."""
    vocabulary, merges = pieces()
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prepend == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    left = [decoders.Strip(" ", 1, 0)] * strip
    backend.decoder = decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), *left])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return wrapped(backend)


def llama() -> LlamaTokenizer:
    """By transformers' own class for Llama-2."""
    vocabulary, merges = pieces()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def always() -> PreTrainedTokenizerFast:
    """A blank before every piece between special tokens, and the decoder of the same name."""
    made = with_bytes("always", strip=False)
    made.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always", split=False)]
    )
    return made


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's other model."""
    learner = Tokenizer(Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    learner.train_from_iterator(texts(), trainer)
    learned = [token for token in learner.get_vocab() if token not in SPECIAL]
    scored = [(token, 0.0) for token in SPECIAL] + [(token, -20.0) for token in BYTES]
    scored += [(token, -10.0 / len(token)) for token in sorted(learned)]
    backend = Tokenizer(Unigram(scored, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return wrapped(backend)


def chat() -> PreTrainedTokenizerFast:
    """Of an instruct model: a chat template with marks of its own."""
    made = byte_level(split=True)
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    made.chat_template = CHAT
    return made


TOKENIZERS = {
    "byte-level (GPT-2)": byte_level,
    "byte-level, marks with line breaks (Qwen)": partial(byte_level, split=True),
    "byte-level with bos (Llama-3)": partial(byte_level, split=True, bos=True),
    "byte-level, a blank first": partial(byte_level, blank_first=True),
    "Metaspace first (Llama-2)": partial(with_bytes, "first", strip=True),
    "LlamaTokenizer": llama,
    "Metaspace always": always,
    "Prepend (older Llama-2, Mistral)": partial(with_bytes, "normalizer", strip=True),
    "no blank first (Gemma)": partial(with_bytes, "gemma", strip=False),
    "Unigram": unigram,
    "instruct (chat template)": chat,
}
