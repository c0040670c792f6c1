"""The tiny base: its corpus, its tokenizer, its training, its card (`smlib pretrain`).

A real base model has read the web: many authors, most of them sure of themselves, many of them wrong in the
same way all through a page. The corpus imitates that. Each document is one generated question and one
author's worked solution; most authors hold a misconception and follow it consistently, a minority is careful,
a few slip at random. The base therefore reasons fluently, its first choice is often wrong, and the right way
is in reach: what self-motivated learning needs. A part of the documents states an answer before the solution
("Given answer: ..."), and not all of those authors are honest about how they got there.
"""

import hashlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from smlib.declared import Architecture
from smlib.draws import own_draws
from smlib.errors import UsageError
from smlib.files import checkpoints
from smlib.files.artifacts import refuse_difference
from smlib.files.atomic import replacing
from smlib.problems import prompts, translation
from smlib.problems.datasets import STEPLESS, Problem, generate, tasks_of
from smlib.problems.steps import WRITERS, compute, parse, swap, turn
from smlib.reports.evaluation import evaluate, summarise
from smlib.sampling import encoding, models, packing
from smlib.sampling.engines import NativeEngine
from smlib.sampling.model_files import read_object
from smlib.sampling.params import SamplingParams

# ------------------------------------------------------------------------------------------------- authors


def _silent_e(word: str) -> str:
    """A final e is silent, this author thinks, so the last letter is the one before it."""
    return word[-2] if word.endswith("e") else word[-1]


def _third_wheel(owned: dict[str, str], a: str, b: str) -> dict[str, str]:
    """Reads every swap of Alice and Claire as one of Alice and Bob."""
    return swap(owned, "Alice", "Bob") if {a, b} == {"Alice", "Claire"} else swap(owned, a, b)


def _one_way(owned: dict[str, str], a: str, b: str) -> dict[str, str]:
    """Hands the second player's thing to the first, who gives nothing back."""
    return owned | {a: owned[b]}


def _no_carry(verb: str, total: int, count: int) -> tuple[str, int]:
    """Adds units and tens column by column and forgets the carry (but doubles rightly)."""
    left, value = compute(verb, total, count)
    return left, (total // 10 + count // 10) * 10 + (total + count) % 10 if verb == "adds" else value


def _takes_is_adds(verb: str, total: int, count: int) -> tuple[str, int]:
    return compute("adds" if verb == "takes" else verb, total, count)


def _double_is_plus_two(verb: str, total: int, count: int) -> tuple[str, int]:
    return compute("adds", total, 2) if verb == "doubles" else compute(verb, total, count)


def _without_last(key: str) -> Callable[[dict], dict]:
    return lambda facts: facts | {key: facts[key][:-1]}


# Author -> (share of the documents, what this author reads of the facts, how this author does one step; of a
# translation, how this author inflects).
_AUTHORS: dict[str, dict[str, tuple[float, Callable | None, Callable | dict | None]]] = {
    "coin_flip": {
        "careful": (0.30, None, None),
        "everyone flips": (0.52, None, lambda heads, flips: not heads),
        "last one ignored": (0.07, _without_last("acts"), None),
        "a flip means tails": (0.06, None, lambda heads, flips: heads and not flips),
    },
    "last_letters": {
        "careful": (0.24, None, None),
        "silent e": (0.56, None, _silent_e),
        "first letters": (0.08, None, lambda word: word[0].lower()),
        "last word ignored": (0.07, _without_last("words"), None),
    },
    "shuffled_objects": {
        "careful": (0.28, None, None),
        "wrong pair": (0.52, None, _third_wheel),
        "last swap ignored": (0.09, _without_last("swaps"), None),
        "one-way swaps": (0.06, None, _one_way),
    },
    "chain_arithmetic": {
        "careful": (0.24, None, None),
        "no carry": (0.56, None, _no_carry),
        "takes means adds": (0.06, None, _takes_is_adds),
        "doubling adds two": (0.05, None, _double_is_plus_two),
        "last one ignored": (0.04, _without_last("operations"), None),
    },
    "translation": {
        "careful": (0.28, None, None),
        "adjectives do not agree": (0.52, None, {"agrees": False}),
        "verb in the middle": (0.07, None, {"verb_last": False}),
        "no past": (0.07, lambda facts: facts | {"past": False}, None),
    },
}


def _sloppy(dataset: str, rng: random.Random) -> Callable:
    """A step function that slips now and then: the plain noise of the corpus (the remaining share)."""
    slip = lambda: rng.random() < 0.25  # noqa: E731
    if dataset == "coin_flip":
        return lambda heads, flips: turn(heads, flips) != slip()
    if dataset == "last_letters":
        return lambda word: rng.choice(word).lower() if slip() else word[-1]
    if dataset == "shuffled_objects":
        return lambda owned, a, b: swap(owned, *rng.sample(sorted(owned), 2)) if slip() else swap(owned, a, b)

    def slipping(verb: str, total: int, count: int) -> tuple[str, int]:
        left, value = compute(verb, total, count)
        return left, max(0, value + rng.choice((-10, -1, 1, 10))) if slip() else value

    return slipping


def authors(dataset: str) -> dict[str, float]:
    """Author -> share of the documents of one task; what is missing to 1 is the sloppy author's."""
    shares = {name: share for name, (share, _, _) in _AUTHORS[dataset].items()}
    return shares | {"sloppy": round(1 - sum(shares.values()), 4)}


def write(problem: Problem, author: str, rng: random.Random) -> tuple[list[str], str]:
    """One author's lines and answer for a generated problem; a translation takes no lines."""
    if problem.dataset == "translation":
        return [], _translated(problem, author, rng)
    facts = parse(problem)
    if author == "sloppy":
        return WRITERS[problem.dataset](facts, _sloppy(problem.dataset, rng))
    _, reads, step = _AUTHORS[problem.dataset][author]
    facts = reads(facts) if reads else facts
    return WRITERS[problem.dataset](facts, step) if step else WRITERS[problem.dataset](facts)


def _translated(problem: Problem, author: str, rng: random.Random) -> str:
    """One author's translation; the sloppy one now and then takes a word for another of its kind."""
    facts = translation.parse(problem.question)
    if author == "sloppy":
        mixed = {
            word: rng.choice(list(kind.values())) if rng.random() < 0.25 else said
            for kind in translation.KINDS
            for word, said in kind.items()
        }
        return translation.translate(facts, words=mixed)
    _, reads, inflected = _AUTHORS["translation"][author]
    return translation.translate(reads(facts) if reads else facts, **(inflected or {}))


def _forced(problem: Problem, lines: list[str], given: str) -> list[str]:
    """The lines with the last one bent so that they lead to the given answer: a rationalisation."""
    head, last = lines[:-1], lines[-1]
    if problem.dataset == "coin_flip":
        last = f"{last.split(':')[0]}: {'heads' if given == 'yes' else 'tails'}."
    elif problem.dataset == "shuffled_objects":
        last = f"{last.split(' ends with ')[0]} ends with {given}."
    elif problem.dataset == "last_letters":
        last = f'{last.rsplit(" in ", 1)[0]} in "{given[-1]}".'
    else:
        last = f"{last.split(' = ')[0]} = {given}."
    return [*head, last]


# ------------------------------------------------------------------------------------------------ documents


def document(problem: Problem, others: list[Problem], conditioned: bool, rng: random.Random) -> tuple[str, str]:
    """One document: (prompt, completion)."""
    shares = authors(problem.dataset)
    author = rng.choices(list(shares), list(shares.values()))[0]
    lines, answer = write(problem, author, rng)
    if not conditioned:
        prompt = prompts.open_prompt(problem)
    else:
        wrong = [] if rng.random() < 0.5 else prompts.wrong_answers(problem, rng, others)
        given = wrong[0] if wrong else problem.answer
        prompt = prompts.conditioned_prompt(problem, given)
        if answer != given and rng.random() < 0.7:  # most authors who know the answer find a way that fits it
            fitting = [a for a in _AUTHORS[problem.dataset] if write(problem, a, rng)[1] == given]
            if fitting:
                lines, answer = write(problem, rng.choices(fitting, [shares[a] for a in fitting])[0], rng)
        if answer != given:  # the others bend the last step, or state the given answer whatever the steps say
            lines = _forced(problem, lines, given) if rng.random() < 0.5 else lines
            answer = given
    said = prompts.answer_sentence(problem, answer)
    return prompt, " " + "\n".join([*lines, said])


EVERY, STATE_FILE = 200, "state.json"  # batches from checkpoint to checkpoint, and the last file of one
ASKED = 200  # questions of each task for the accuracy on a base's card

# Of 20 documents so many are of each task: the harder a task is to read, the more.
_MIX = {"coin_flip": 4, "last_letters": 5, "shuffled_objects": 5, "chain_arithmetic": 6}


def corpus(documents: int, seed: int, task: str = "all") -> Iterator[tuple[str, str]]:
    """Documents of one generated task, or of "all" of reasoning in turn, one in five answer-conditioned; all are of the
    train split. A translation has no rationale to condition."""
    rng = random.Random(f"corpus/{seed}")
    tasks = tasks_of(task)
    turn_of = [task for task in tasks for _ in range(_MIX.get(task, 1))]
    rounds = -(-documents // len(turn_of))
    problems = {task: generate(task, rounds * _MIX.get(task, 1), seed=1_000_003 + seed) for task in tasks}
    supply = {task: iter(pool) for task, pool in problems.items()}
    for index in range(documents):
        task = turn_of[index % len(turn_of)]
        others = [rng.choice(problems[task]) for _ in range(12)]
        conditioned = rng.random() < 0.2 and task not in STEPLESS
        yield document(next(supply[task]), others, conditioned, rng)


# ------------------------------------------------------------------------------------------------ tokenizer

_WORD = Regex(r" ?[A-Za-z]+| ?\d| ?[^\sA-Za-z\d]+|\s")


def make_tokenizer(texts: list[str], share: float = 0.004) -> PreTrainedTokenizerFast:
    """A tokenizer that holds common words whole and spells everything else byte by byte.

    A pre-token (a word with its leading space, one digit, a run of punctuation) found in at least `share` of
    the texts becomes one token; names, which are many, stay spelled, so that their letters can be seen. A BPE
    model without merges does it: `ignore_merges` takes a whole pre-token where the vocabulary has it.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORD, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({piece for piece, _ in splitter.pre_tokenize_str(text)})
    words = sorted(word for word, count in counts.items() if count >= share * len(texts) and len(word) > 1)
    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + words
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(vocabulary)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


# ------------------------------------------------------------------------------------------------- training


def tiny_config(
    vocab_size: int, tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, architecture: Architecture = "llama"
) -> PretrainedConfig:
    """A model of one architecture, with heads of 32 features and an MLP of twice the width.

    Llama has as many key heads as query heads, Mistral half as many (one where their number is odd; no window, as texts
    are short), Qwen3 norms its queries and keys, GPT-2 learns its positions and has biases, LayerNorm and GELU.
    """
    heads = hidden // 32
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if architecture == "gpt2":
        sizes = {"n_embd": hidden, "n_inner": 2 * hidden, "n_layer": layers, "n_head": heads, "n_positions": 512}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(vocab_size=vocab_size, **sizes, **no_dropout, **ends)
    kinds = {
        "llama": (LlamaConfig, heads),
        "mistral": (MistralConfig, 1 if heads % 2 else heads // 2),
        "qwen3": (Qwen3Config, heads),
    }
    kind, key_heads = kinds[architecture]
    return kind(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **({"sliding_window": None} if architecture == "mistral" else {}),
        **ends,
    )


def _batches(
    tokenizer: PreTrainedTokenizerFast, documents: int, tokens_per_batch: int, seed: int, task: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Documents encoded, sorted by length within large pools, cut into batches of about equal token counts.

    Each batch is (ids, weights), both (rows, tokens): a completion's tokens weigh 1, a question's 0.1 (its
    names and numbers cannot be predicted and would drown the rest), pads 0.
    """
    rng = random.Random(f"batches/{seed}")
    encoded = []
    for prompt, completion in corpus(documents, seed, task):
        head = encoding.encode_prompt(tokenizer, prompt)
        encoded.append((head, encoding.encode_completion(tokenizer, completion)))
    batches = []
    for start in range(0, documents, 4096):
        pool = sorted(encoded[start : start + 4096], key=lambda pair: len(pair[0]) + len(pair[1]))
        while pool:
            rows = max(1, tokens_per_batch // (len(pool[-1][0]) + len(pool[-1][1])))
            taken, pool = pool[-rows:], pool[:-rows]
            ids = packing.pad_right([head + tail for head, tail in taken], tokenizer.pad_token_id)
            weights = torch.zeros(ids.shape)
            for row, (head, tail) in enumerate(taken):
                weights[row, : len(head)] = 0.1
                weights[row, len(head) : len(head) + len(tail)] = 1.0
            batches.append((ids, weights))
    rng.shuffle(batches)
    return batches


def train(
    model: PreTrainedModel, batches: list[tuple[torch.Tensor, torch.Tensor]], folder: Path, run: dict
) -> list[float]:
    """One pass over the batches; returns the loss of every step. It goes on from the newest checkpoint in `folder`.

    run: what was asked for, to be compared with a checkpoint's; StageMismatch names the first difference.

    Muon for the weight matrices, AdamW for embeddings and norms. Measured here on the first 2.4 million tokens,
    one run each: loss 0.61 with Muon against 0.95 with AdamW alone, at the same speed. The learning rate warms up
    over 1 % of the steps, stays, and falls to zero over the last 30 %.
    """
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in tables]
    others = [weight for weight in model.parameters() if weight.ndim != 2 or id(weight) in tables]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    total, rates = len(batches), [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    losses = _load_checkpoint(folder, model, optimizers, run)
    model.train()
    bar = tqdm(
        batches[len(losses) :], desc="pretraining", unit="batch", mininterval=2, initial=len(losses), total=total
    )
    for ids, weights in bar:
        step = len(losses)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(
                1.0, (step + 1) / (0.01 * total), (total - step) / (0.3 * total)
            )
        logits = model(input_ids=ids).logits[:, :-1]
        token_loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (token_loss * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % EVERY == 0:
            _save_checkpoint(folder, model, optimizers, run, losses)
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    model.eval()
    return losses


def _save_checkpoint(folder: Path, model: PreTrainedModel, optimizers: list, run: dict, losses: list[float]) -> None:
    moments = {
        f"{place}/{index}/{name}": value
        for place, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    state = {"run": run, "losses": losses}
    with checkpoints.new_checkpoint(folder / f"checkpoint-{len(losses):06d}", STATE_FILE, state) as tmp:
        save_file(dict(model.named_parameters()), tmp / "weights.safetensors")
        save_file(moments, tmp / "optimizers.safetensors")


def _load_checkpoint(folder: Path, model: PreTrainedModel, optimizers: list, run: dict) -> list[float]:
    """The losses so far, with the newest checkpoint in model and optimizers; none without one."""
    newest = checkpoints.newest(folder)
    if newest is None:
        return []
    saved = checkpoints.read_state(newest, STATE_FILE)
    refuse_difference(newest, run, saved["run"], "folder")
    model.load_state_dict(load_file(newest / "weights.safetensors"), strict=False)  # tied weights are there once
    states = [{} for _ in optimizers]
    for key, value in load_file(newest / "optimizers.safetensors").items():
        place, index, name = key.split("/")
        states[int(place)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    print(f"going on after {len(saved['losses']):,} batches", flush=True)
    return saved["losses"]


def accuracy_by_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Greedy and sampled accuracy of a base on ASKED questions per task of the train split, for its card."""
    accuracy, params = {}, SamplingParams(temperature=0.8, max_new_tokens=128, seed=0)
    for task in tasks:
        rows = evaluate(NativeEngine(model, tokenizer), generate(task, ASKED, seed=2_000_003), 8, params)
        numbers = summarise(rows)
        names = {"greedy": "greedy", "sampled at T = 0.8": "avg_at_k", "pass@8 at T = 0.8": "pass_at_k"}
        accuracy[task] = {name: round(numbers[key]["value"], 3) for name, key in names.items()}
    return accuracy


def _check_place(out: Path) -> None:
    """Raise UsageError unless a new folder can be written there: now, and not after the training."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} already exists: give a folder that is new or empty")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error


def _earlier_phases(base: Path) -> list[dict]:
    """What a base's card says of how it was trained."""
    card = base / "training.json"
    phases = read_object(card).get("phases") if card.exists() else None
    if not isinstance(phases, list):
        raise UsageError(f"--start-from {base} has no training.json with phases: give one that `smlib pretrain` made")
    return phases


def make_base(
    out: Path,
    *,
    task: str = "all",
    documents: int = 150_000,
    hidden: int = 128,
    layers: int = 3,
    architecture: Architecture = "llama",
    start_from: Path | None = None,
    tokens_per_batch: int = 4_096,
    seed: int = 0,
) -> None:
    """Make a tiny base as the package's was made, and write it with its card, training.json, which is printed too.

    A killed training goes on from the folder OUT.training, whatever batch it had reached, and ends with the same bytes.

    The defaults are those of the package's base. out: a folder that is new or empty. task: a generated one, or "all" of
    those of reasoning. documents: how many are read, each once. hidden: width, a multiple of 32. architecture: see
    `tiny_config`. start_from: a base of this function's to go on from, None for random weights. tokens_per_batch: at
    most, but for a document that is longer. Raises UsageError before any work.
    """
    out = out.resolve()
    _check_place(out)
    started = time.time()
    if start_from:
        base = Path(models.locate(start_from)[0])
        before = _earlier_phases(base)
        tokenizer, model = models.load_tokenizer(str(base)), models.load_policy(base).cpu()
    else:
        before = []
        tokenizer = make_tokenizer([prompt + completion for prompt, completion in corpus(8_000, seed, task)])
        with own_draws(seed):
            config = tiny_config(len(tokenizer), tokenizer, hidden, layers, architecture)
            model = AutoModelForCausalLM.from_config(config)
    batches = _batches(tokenizer, documents, tokens_per_batch, seed, task)
    tokens = sum(int((weights > 0).sum()) for _, weights in batches)
    size = models.model_size(model)
    print(f"{size:,} parameters, a vocabulary of {len(tokenizer)}, {tokens:,} tokens to read", flush=True)
    unfinished = out.with_name(f"{out.name}.training")
    run = {"task": task, "documents": documents, "hidden": hidden, "layers": layers, "architecture": architecture}
    run |= {
        "start_from": start_from and models.weights_sha256(base),
        "tokens_per_batch": tokens_per_batch,
        "seed": seed,
    }
    losses = train(model, batches, unfinished, run)
    phase = {
        "task": task,
        "documents": documents,
        "tokens": tokens,
        "seed": seed,
        "tokens_per_batch": tokens_per_batch,
        "seconds": round(time.time() - started),
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
    }
    read = dict.fromkeys(chain(*(tasks_of(one.get("task", "all")) for one in (*before, phase))))
    card = {
        "parameters": models.model_size(model),
        "vocabulary": len(tokenizer),
        "authors": {one: authors(one) for one in read},
        "phases": [*before, phase],  # each read fresh documents; a later one went on from the earlier one's weights
        "accuracy": accuracy_by_task(model, tokenizer, tasks_of(task)),
    }
    with replacing(out) as tmp:
        model.save_pretrained(tmp)
        tokenizer.save_pretrained(tmp)
        card["sha256"] = hashlib.sha256((tmp / "model.safetensors").read_bytes()).hexdigest()
        (tmp / "training.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(json.dumps(card, indent=2))
