"""The stages on every kind of tokenizer: what is trained on is what was drawn, and the filter keeps what is right."""

import pytest
import torch
from spelled import TOKENIZERS
from sums import TRAIN, learn, publish, steps
from transformers import LlamaConfig, LlamaForCausalLM

from smlib.files.artifacts import require
from smlib.learning import reward_model, sft, trainers
from smlib.ppo import rollouts
from smlib.problems import prompts
from smlib.problems.datasets import load
from smlib.runs import self_explore, self_motivated, shared
from smlib.runs.settings import preset
from smlib.sampling import encoding, models

pytestmark = pytest.mark.slow

FEW = {
    "sampling": {"questions": 4, "samples": 8, "conditioned_questions": 4, "conditioned_samples": 2},
    "sft": {"batch": 4, "learning_rate": 1e-3},
    "reward": {"questions": 0, "batch": 4, "epochs": 1.0, "pairs": "base"},
    "ppo": {"updates": 1, "warmup_updates": 0, "episodes": 8, "samples_per_question": 4, "minibatch": 4},
    "explore": {"samples": 8, "k": 2},
}


def make_base(kind, folder, style):
    """A model that has read right and wrong solutions of the questions, asked alone and with a given answer."""
    TOKENIZERS[kind]().save_pretrained(folder)
    tokenizer = models.load_tokenizer(str(folder), style)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends, max_position_embeddings=1_024))
    documents, blank = [], "" if style == "chat" else " "
    for problem, (a, b) in zip(load("gsm8k", "train"), TRAIN, strict=True):
        for given in (None, *map(str, range(12))):
            for total in (a + b, a + b + 1) if given is None else (int(given),):
                told = [*steps("gsm8k", a, b, total), prompts.answer_sentence(problem, str(total))]
                tail = encoding.encode_completion(tokenizer, blank + "\n".join(told))
                documents.append(encoding.encode_question(tokenizer, problem, given=given) + tail)
    learn(model, documents, 100)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_stage_has_the_tokens_that_were_drawn(kind, tmp_path, monkeypatch):
    publish("gsm8k", tmp_path, monkeypatch)
    style = "chat" if kind.startswith("instruct") else "plain"
    base = make_base(kind, tmp_path / "base", style)
    few = FEW | {"sampling": FEW["sampling"] | {"prompt": style}}
    settings, run = preset("smoke", "gsm8k", base=base, **few), tmp_path / "run"
    tokenizer = shared.load_tokenizer(settings)
    seen = {"sft": [], "reward": [], "ppo": []}
    read = trainers.dataset
    monkeypatch.setattr(sft, "dataset", lambda rows, idle: (seen["sft"].extend(rows), read(rows, idle))[1])
    monkeypatch.setattr(reward_model, "dataset", lambda rows, idle: (seen["reward"].extend(rows), read(rows, idle))[1])
    score_ids = reward_model.score_ids

    def scored(model, questions, *arguments):
        seen["ppo"].append(questions)
        return score_ids(model, questions, *arguments)

    monkeypatch.setattr(reward_model, "score_ids", scored)
    batches, collate = [], rollouts.collate
    monkeypatch.setattr(rollouts, "collate", lambda *given: (batches.append(given[1]), collate(*given))[1])

    for stage in (
        self_motivated.sample_rationales,
        self_motivated.train_sft,
        self_motivated.sample_again,
        self_motivated.train_reward_model,
    ):
        if stage is self_motivated.train_sft:
            self_motivated.rank_rationales(run, settings)
        stage(run, settings, progress=False)
    rows = require(run, "01_sampling").read_rows("rationales")
    blank = "" if style == "chat" else " "
    for row in rows:
        assert encoding.decode(tokenizer, row["token_ids"]) == row["text"]
    assert sum(row["text"].startswith(f"{blank}Ann starts with") for row in rows) > 0.9 * len(rows)
    problems = {problem.id: problem for problem in load("gsm8k", "train")}
    conditioned = [row for row in rows if row["given"] == problems[row["id"]].answer and row["correct"]]
    assert len(conditioned) >= 6  # of two for the gold answer of each question
    assert all(row["reanswer_correct"] for row in conditioned), "the filter keeps them all"

    ranked = [row for row in require(run, "02_ranking").read_rows("ranked") if row["side"] == "+"]
    asked = {identity: encoding.encode_question(tokenizer, problem) for identity, problem in problems.items()}
    expected = [[*asked[row["id"]], *row["token_ids"], tokenizer.eos_token_id] for row in ranked]
    assert sorted(row["input_ids"] for row in seen["sft"]) == sorted(expected)

    pairs = require(run, "02_ranking").read_rows("pairs")
    sides = [tuple(pair[f"{side}_ids"]) for pair in pairs for side in ("chosen", "rejected")]
    assert set(sides) <= {tuple(row["token_ids"]) for row in rows}
    for pair in seen["reward"]:
        for side in ("chosen_ids", "rejected_ids"):
            head = next(head for head in asked.values() if pair[side][: len(head)] == head)
            assert tuple(pair[side][len(head) : -1]) in sides and pair[side][-1] == tokenizer.eos_token_id

    seen["ppo"].clear()
    self_motivated.train_policy(run, settings, progress=False)
    drawn = {one.token_ids for samples in batches for one in samples}
    ends = encoding.ends(tokenizer, models.load_generation(base))
    for questions in seen["ppo"]:
        for head, tails in questions:
            assert head in list(asked.values())
            for tail in map(tuple, tails):
                assert tail in drawn or (tail[:-1] in drawn and tail[-1] in ends)

    for stage in list(self_explore.STAGES.values())[:4]:
        stage(run, settings, progress=False)
    for row in require(run, "06_solutions").read_rows("solutions"):
        assert encoding.decode(tokenizer, row["token_ids"]) == row["text"]
    for pair in require(run, "06_exploration").read_rows("pairs"):
        head = asked[pair["id"]]
        assert pair["prompt_ids"][: len(head)] == head
        prefix = encoding.decode(tokenizer, pair["prompt_ids"][len(head) :])
        assert prefix == pair["prefix"] and encoding.decode(
            tokenizer, pair["prompt_ids"][len(head) :] + pair["rejected_ids"]
        ) == (prefix + pair["rejected"])
