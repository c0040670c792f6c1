import copy
from dataclasses import replace

import pytest
import torch
from tiny_model import policy, tokenizer, written

from smlib.learning import sft
from smlib.problems import prompts
from smlib.problems.datasets import generate
from smlib.problems.steps import worked_solution
from smlib.sampling import encoding, models

PROBLEMS = generate("coin_flip", 6, seed=0) + generate("chain_arithmetic", 6, seed=0)
QUICK = {"epochs": 1, "learning_rate": 3e-3, "batch": 4, "seed": 0, "progress": None}


def right(problem):
    lines, answer = worked_solution(problem)
    return " " + "\n".join(lines) + "\n" + prompts.answer_sentence(problem, answer)


ROWS = [written(problem, right(problem)) for problem in PROBLEMS]


@pytest.fixture
def trainer(monkeypatch):
    """The trainer that `train_sft` makes for ROWS (and a wrong one), in place of its training."""
    made = []
    monkeypatch.setattr(sft, "fit", lambda trainer, label: made.append(trainer) or [])
    wrong = written(PROBLEMS[0], " nonsense", side="-")
    sft.train_sft(policy(), tokenizer(), PROBLEMS, [wrong, *ROWS], **QUICK)
    return made[0]


def test_the_loss_is_on_the_completion_and_its_end_only(trainer):
    expected = {
        tuple(encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))): (
            encoding.encode_completion(tokenizer(), row.text)
        )
        for problem, row in zip(PROBLEMS, ROWS, strict=True)
    }
    seen = 0
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            learned = [place for place, label in enumerate(labels) if label != -100]
            head, tail = ids[: learned[0]], ids[learned[0] : learned[-1] + 1]
            assert tail == expected.pop(tuple(head))
            assert [labels[place] for place in learned] == tail and tail[-1] == tokenizer().eos_token_id
            assert set(ids[learned[-1] + 1 :]) <= {tokenizer().pad_token_id}
            seen += 1
    assert seen == len(ROWS) and not expected  # every r+ once, and no r-


def test_what_is_given_is_read_without_a_loss(monkeypatch):
    made = []
    monkeypatch.setattr(sft, "fit", lambda trainer, label: made.append(trainer) or [])
    sft.train_sft(policy(), tokenizer(), PROBLEMS, ROWS[:1], **QUICK, given=lambda one: 3)
    ((ids, labels),) = [(batch["input_ids"][0], batch["labels"][0]) for batch in made[0].get_train_dataloader()]
    tail = encoding.encode_completion(tokenizer(), ROWS[0].text)
    assert labels[labels != -100].tolist() == tail[3:] and ids[labels != -100].tolist() == tail[3:]


def test_the_loss_of_a_batch_is_the_mean_over_its_completion_tokens(trainer):
    model = policy()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    torch.testing.assert_close(loss, expected)


def completion_loss(model):
    losses = []
    for problem, row in zip(PROBLEMS, ROWS, strict=True):
        head = encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))
        ids = torch.tensor([head + encoding.encode_completion(tokenizer(), row.text)])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(head) :]))
    return torch.stack(losses).mean().item()


def test_a_few_steps_reduce_the_loss_and_a_seed_decides_them(capsys):
    model, again = policy(), policy()
    before = completion_loss(model)
    log = sft.train_sft(model, tokenizer(), PROBLEMS, ROWS, **QUICK | {"epochs": 10})
    assert completion_loss(model) < 0.8 * before
    assert log[0]["loss"] > log[-1]["loss"] and not model.training
    sft.train_sft(again, tokenizer(), PROBLEMS, ROWS, **QUICK | {"epochs": 10})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert capsys.readouterr().out == ""  # progress=None is silent


@pytest.mark.parametrize("hardware", [{"micro_batch": 2}, {"micro_batch": 1, "gradient_checkpointing": True}])
def test_micro_batches_and_recomputing_change_nothing(hardware):
    """The mean is over the tokens of the whole batch. Eleven rows: the last of three batches is not full."""
    whole, small, quick = policy(), policy(), QUICK | {"epochs": 2}
    log = sft.train_sft(whole, tokenizer(), PROBLEMS, ROWS[1:], **quick)
    other = sft.train_sft(small, tokenizer(), PROBLEMS, ROWS[1:], **quick, **hardware)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in log], abs=1e-5)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_recomputing_trains_an_adapter_on_bfloat16_weights():
    base = policy().bfloat16()
    model = models.add_lora(base, rank=2, alpha=4, targets="all-linear", base="")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    sft.train_sft(model, tokenizer(), PROBLEMS, ROWS, **QUICK, micro_batch=2, gradient_checkpointing=True)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora" not in name)
        assert weight.dtype == (torch.float32 if "lora" in name else torch.bfloat16)


@pytest.mark.parametrize("rows", [3, 8, -1])
def test_a_batch_that_micro_batches_do_not_fill_is_refused(rows):
    with pytest.raises(ValueError, match=f"a batch of 4 cannot be split into micro batches of {rows}: give a"):
        sft.train_sft(policy(), tokenizer(), PROBLEMS, ROWS, **QUICK, micro_batch=rows)


def test_without_a_right_rationale_there_is_nothing_to_learn():
    model = policy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"SFT needs at least one r\+ rationale, got none"):
        sft.train_sft(model, tokenizer(), PROBLEMS, [replace(ROWS[0], side="-")], **QUICK)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
