import copy
from dataclasses import replace

import pytest
import torch
from tiny_model import policy, tokenizer

from smlib.learning import dpo
from smlib.learning.rows import Pair
from smlib.problems import prompts
from smlib.problems.datasets import generate
from smlib.problems.steps import worked_solution
from smlib.sampling import encoding, models, packing

EOS = tokenizer().eos_token_id
QUICK = {"beta": 0.1, "epochs": 1, "learning_rate": 3e-3, "batch": 4, "seed": 0, "progress": None}


def pair(problem):
    """As Self-Explore makes them: after a right step, the rest is chosen, and one wrong step rejected."""
    lines, answer = worked_solution(problem)
    head = encoding.encode_prompt(tokenizer(), prompts.open_prompt(problem))
    head += encoding.encode_completion(tokenizer(), f" {lines[0]}\n", eos=False)
    chosen = "\n".join([*lines[1:], prompts.answer_sentence(problem, answer)])
    return Pair(
        id=problem.id,
        dataset=problem.dataset,
        chosen=chosen,
        rejected="Ann: 0.\n",
        prompt_ids=tuple(head),
        chosen_ids=tuple(encoding.encode_completion(tokenizer(), chosen)),
        rejected_ids=tuple(encoding.encode_completion(tokenizer(), "Ann: 0.\n", eos=False)),
    )


PAIRS = [pair(problem) for problem in generate("chain_arithmetic", 6, seed=0) + generate("coin_flip", 6, seed=0)]


@pytest.fixture
def trainer(monkeypatch):
    """The trainer that `train_dpo` makes for PAIRS, in place of its training."""
    made = []
    monkeypatch.setattr(dpo, "fit", lambda trainer, label: made.append(trainer) or [])
    dpo.train_dpo(policy(), tokenizer(), PAIRS, **QUICK)
    return made[0]


def sides(batch):
    """(prompt + side, side) of each row of a batch, chosen ones first."""
    for ids, seen, mask in zip(
        *(batch[k].tolist() for k in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        whole = ids[: sum(seen)]
        yield tuple(whole), tuple(token for token, learned in zip(ids, mask, strict=True) if learned)


def test_the_trainer_sees_the_tokens_of_the_pairs_and_an_end_on_the_chosen_side_only(trainer):
    chosen = {one.prompt_ids + one.chosen_ids: one.chosen_ids for one in PAIRS}
    rejected = {one.prompt_ids + one.rejected_ids: one.rejected_ids for one in PAIRS}
    seen = []
    for batch in trainer.get_train_dataloader():
        rows = list(sides(batch))
        for (good, chosen_side), (bad, rejected_side) in zip(
            rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True
        ):
            assert chosen[good] == chosen_side and rejected[bad] == rejected_side
            assert chosen_side[-1] == EOS and EOS not in rejected_side
            assert good[: -len(chosen_side)] == bad[: -len(rejected_side)]  # one prompt
            seen.append(good)
    assert sorted(seen) == sorted(chosen)


def side_logprob(model, prompt, side):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *side]])).logits[0, len(prompt) - 1 : -1]
    return packing.token_logprobs(logits, torch.tensor(side)).sum()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_loss_is_that_of_the_formula_against_the_policy_before_training(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), torch.tensor(2.0).log())
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    rows = [(whole[: -len(side)], side) for whole, side in sides(batch)]
    ratios = torch.stack(
        [side_logprob(trainer.model, *row) - side_logprob(policy(), list(row[0]), list(row[1])) for row in rows]
    )
    chosen, rejected = ratios.chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert abs(expected - torch.tensor(2.0).log()) > 1e-3
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)).detach(), expected)


def margin(model):
    gaps = [
        side_logprob(model, one.prompt_ids, one.chosen_ids) - side_logprob(model, one.prompt_ids, one.rejected_ids)
        for one in PAIRS
    ]
    return torch.stack(gaps).mean().item()


def test_a_few_steps_widen_the_margin_and_a_seed_decides_them(capfd, recwarn):
    model, again = policy(), policy()
    before = margin(model)
    log = dpo.train_dpo(model, tokenizer(), PAIRS, **QUICK | {"epochs": 5})
    assert margin(model) > before + 1
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and log[-1]["rewards/margins"] > 0
    assert not model.training
    dpo.train_dpo(again, tokenizer(), PAIRS, **QUICK | {"epochs": 5})
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert capfd.readouterr().out == ""  # progress=None is silent
    assert [str(found.message) for found in recwarn if "checkpointing" in str(found.message)] == []


@pytest.mark.parametrize("hardware", [{"micro_batch": 2}, {"micro_batch": 1, "gradient_checkpointing": True}])
def test_micro_batches_and_recomputing_change_nothing(hardware):
    """Eleven pairs: the last batch has a micro batch of two pairs and one of one, which TRL would count alike."""
    whole, small, quick = policy(), policy(), QUICK | {"epochs": 2}
    log = dpo.train_dpo(whole, tokenizer(), PAIRS[1:], **quick)
    other = dpo.train_dpo(small, tokenizer(), PAIRS[1:], **quick, **hardware)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in log], abs=1e-5)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_an_adapter_learns_against_its_base_which_stays():
    base = policy()
    model = models.add_lora(base, rank=4, alpha=8, targets="all-linear", base="")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    log = dpo.train_dpo(model, tokenizer(), PAIRS, **QUICK | {"epochs": 5, "learning_rate": 1e-2})
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and log[-1]["rewards/margins"] > 0
    assert list(model.peft_config) == ["default"]
    assert [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])] == [
        name for name in before if "lora" in name
    ]
    with model.disable_adapter():
        reference = margin(model)
    assert reference == pytest.approx(margin(policy()), abs=1e-4) and margin(model) > reference + 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "DPO needs at least one pair, got none"),
        ([replace(PAIRS[0], prompt_ids=None)], "has an empty side: prompt_ids"),
        ([replace(PAIRS[0], rejected_ids=())], "has an empty side: rejected_ids"),
        ([replace(PAIRS[0], chosen_ids=())], "has an empty side: chosen_ids"),
        ([replace(PAIRS[0], chosen_ids=PAIRS[0].chosen_ids[:-1])], "does not end with end-of-sequence"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(pairs, message):
    model = policy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        dpo.train_dpo(model, tokenizer(), pairs, **QUICK)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
