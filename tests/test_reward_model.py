from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_model import policy as reward
from tiny_model import tokenizer, written_pair, written_sample

from smlib.learning import reward_model
from smlib.problems import prompts
from smlib.problems.datasets import generate
from smlib.problems.steps import worked_solution
from smlib.sampling import encoding

PROBLEMS = generate("coin_flip", 24, seed=0)
QUICK = {"epochs": 1, "learning_rate": 3e-3, "batch": 8, "beta": 0.5, "nll_coef": 1.0, "seed": 0, "progress": None}


def told(problem, answer):
    """The right steps and this answer."""
    return " " + "\n".join(worked_solution(problem)[0]) + "\n" + prompts.answer_sentence(problem, answer)


# "yes" is always chosen, whatever gold is: separable by one token. The first 16 questions train, 8 are held out.
PAIRS = [written_pair(p, told(p, "yes"), told(p, "no"), held_out=index >= 16) for index, p in enumerate(PROBLEMS)]
TEXTS = [pair.chosen for pair in PAIRS]


def trained_rows(monkeypatch, pairs, model):
    """The batches that TRL's RewardTrainer feeds the model, in place of its training."""
    made = []
    monkeypatch.setattr(reward_model, "fit", lambda trainer, label: made.append(trainer) or [])
    reward_model.train_reward_model(model, tokenizer(), PROBLEMS, pairs, **QUICK)
    return made[0]


def sides(batch):
    """The token ids of each side in a packed batch, shared start included: chosen, rejected, chosen, ..."""
    found = []
    for number in range(int(batch["rows"][-1]) + 1):
        own = batch["rows"] == number
        row, place = divmod(int(batch["sources"][own][0]), batch["input_ids"].shape[1])
        found.append([*batch["input_ids"][row, : place + 1].tolist(), *batch["targets"][own].tolist()])
    return found


def test_the_trainer_sees_the_very_tokens_that_are_scored(monkeypatch):
    """The trap: other libraries score without the special tokens that training put around a text."""
    expected = {
        tuple(reward_model.encode(tokenizer(), problem, text))
        for problem, pair in zip(PROBLEMS[:16], PAIRS, strict=False)
        for text in (pair.chosen, pair.rejected)
    }
    loader = trained_rows(monkeypatch, PAIRS, reward()).get_train_dataloader()
    assert {tuple(ids) for batch in loader for ids in sides(batch)} == expected  # the held-out 8 pairs never train


def test_chosen_and_rejected_take_turns_in_a_batch(monkeypatch):
    batch = next(iter(trained_rows(monkeypatch, PAIRS, reward()).get_train_dataloader()))
    said = [tokenizer().decode(ids, skip_special_tokens=True).rsplit(" ", 1)[1] for ids in sides(batch)]
    assert said == ["yes.", "no."] * 8


def test_shared_prefix_by_hand():
    assert reward_model.shared_prefix([1, 2, 3, 9], [1, 2, 4, 5, 9]) == ([1, 2], [[3, 9], [4, 5, 9]])
    assert reward_model.shared_prefix([1, 2, 9], [1, 2, 9]) == ([1, 2], [[9], [9]])
    assert reward_model.shared_prefix([1, 9], [1, 2, 9]) == ([1], [[9], [2, 9]])


def test_the_loss_is_the_pairwise_logistic_one_of_the_scores(monkeypatch):
    """The trainer sums from the first difference only; what comes before cancels, so the loss is that of the scores."""
    monkeypatch.setitem(QUICK, "nll_coef", 0.0)
    model = reward()
    trainer = trained_rows(monkeypatch, PAIRS[:8], model)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch))
    scored = reward_model.pair_accuracy(model, tokenizer(), PROBLEMS, PAIRS[:8])
    margins = torch.tensor([pair.chosen_score - pair.rejected_score for pair in scored])
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(0.5 * margins).mean(), atol=1e-5, rtol=1e-5)


def test_the_likelihood_of_the_chosen_side_is_added_from_where_the_pair_differs(monkeypatch):
    """By hand: token_scores of the chosen sides, "yes", "." and the end, which follow the same words in both."""
    monkeypatch.setitem(QUICK, "nll_coef", 0.0)
    model = reward()
    trainer = trained_rows(monkeypatch, PAIRS[:8], model)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        without = trainer.compute_loss(trainer.model.eval(), dict(batch))
        trainer.nll_coef = 2.0
        loss = trainer.compute_loss(trainer.model, dict(batch))
    tails = []
    for problem, text in zip(PROBLEMS[:8], TEXTS, strict=False):
        tokens, values = reward_model.token_scores(model, tokenizer(), problem, text)
        tails += values[len(tokens) - 1 - tokens[::-1].index(" yes") :]
    assert (loss - without).item() == pytest.approx(-2.0 * sum(tails) / len(tails), abs=1e-5)


def test_encode_puts_the_beginning_first_and_the_end_last():
    ids = reward_model.encode(tokenizer(), PROBLEMS[0], TEXTS[0])
    assert (ids[0], ids[-1]) == (tokenizer().bos_token_id, tokenizer().eos_token_id)
    assert tokenizer().decode(ids[1:-1]) == prompts.open_prompt(PROBLEMS[0]) + TEXTS[0]


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_a_score_depends_on_no_batch_no_pads_and_no_order(tokens_per_batch):
    model, problems = reward(), PROBLEMS[:6]
    texts = [text * (1 + index % 3) for index, text in enumerate(TEXTS[:6])]  # very different lengths
    alone = [reward_model.score(model, tokenizer(), [p], [t])[0] for p, t in zip(problems, texts, strict=True)]
    together = reward_model.score(model, tokenizer(), problems, texts, tokens_per_batch)
    backwards = reward_model.score(model, tokenizer(), problems[::-1], texts[::-1], tokens_per_batch)
    assert together == pytest.approx(alone, abs=1e-5)
    assert backwards[::-1] == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 5) for value in alone}) == 6


def test_scoring_nothing_and_scoring_unequal_lists():
    assert reward_model.score(reward(), tokenizer(), [], []) == []
    with pytest.raises(ValueError, match="zip"):
        reward_model.score(reward(), tokenizer(), PROBLEMS[:2], TEXTS[:1])


def test_token_scores_sum_to_the_score_and_name_every_token():
    model = reward()
    tokens, values = reward_model.token_scores(model, tokenizer(), PROBLEMS[0], TEXTS[0])
    assert len(tokens) == len(values)
    assert "".join(tokens) == TEXTS[0] + "<eos>"
    assert sum(values) == pytest.approx(reward_model.score(model, tokenizer(), PROBLEMS[:1], TEXTS[:1])[0])


def test_it_learns_a_separable_toy_and_ranks_held_out_pairs_right(capsys):
    model = reward()
    log = reward_model.train_reward_model(model, tokenizer(), PROBLEMS, PAIRS, **QUICK | {"epochs": 12})
    scored = reward_model.pair_accuracy(model, tokenizer(), PROBLEMS, PAIRS[16:])
    assert all(pair.ranked_right and pair.chosen_score > pair.rejected_score + 1 for pair in scored)
    assert log[-1]["pair_loss"] < 0.3 and log[-1]["accuracy"] == 1 and not model.training
    assert capsys.readouterr().out == ""  # progress=None is silent
    for row in log:
        assert row["loss"] == pytest.approx(row["pair_loss"] + row["chosen_nll"], abs=1e-2)  # nll_coef is 1; rounded


@pytest.mark.parametrize("hardware", [{"micro_batch": 2}, {"micro_batch": 1, "gradient_checkpointing": True}])
def test_micro_batches_and_recomputing_change_nothing(hardware):
    """Pairs count by their number in the one loss and by their tokens in the other; the last batch is not full."""
    whole, small, pairs = reward(), reward(), PAIRS[1:]
    quick = QUICK | {"epochs": 2, "batch": 4}
    log = reward_model.train_reward_model(whole, tokenizer(), PROBLEMS, pairs, **quick)
    other = reward_model.train_reward_model(small, tokenizer(), PROBLEMS, pairs, **quick, **hardware)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in log], abs=1e-5)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weight, rtol=0, atol=1e-5)


def test_pair_accuracy_adds_both_scores_and_leaves_the_pairs_alone():
    model = reward()
    flipped = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in PAIRS[:8]]
    straight = reward_model.pair_accuracy(model, tokenizer(), PROBLEMS, PAIRS[:8])
    other = reward_model.pair_accuracy(model, tokenizer(), PROBLEMS, flipped)
    assert [p.ranked_right for p in straight] == [not p.ranked_right for p in other]
    for pair, scored in zip(PAIRS, straight, strict=False):
        added = {name: getattr(scored, name) for name in ("chosen_score", "rejected_score", "ranked_right")}
        assert None not in added.values() and scored == replace(pair, **added)
    alike = replace(PAIRS[0], rejected_ids=PAIRS[0].chosen_ids)
    assert not reward_model.pair_accuracy(model, tokenizer(), PROBLEMS, [alike])[0].ranked_right


def test_without_pairs_to_train_on_the_error_says_so():
    with pytest.raises(ValueError, match="at least one pair that is not held out, got none"):
        reward_model.train_reward_model(reward(), tokenizer(), PROBLEMS, PAIRS[16:], **QUICK)


def test_rewards_are_plain_callables():
    model = reward()
    learned = reward_model.LearnedReward(partial(nullcontext, model), tokenizer())
    assert learned(PROBLEMS[:3], TEXTS[:3]) == reward_model.score(model, tokenizer(), PROBLEMS[:3], TEXTS[:3])
    gold = [told(p, p.answer) for p in PROBLEMS[:2]] + [" no answer"]
    assert reward_model.checker_reward(PROBLEMS[:3], gold) == [1.0, 1.0, 0.0]


def test_the_majority_of_a_question_s_answers_takes_the_place_of_gold():
    first, second = PROBLEMS[:2]
    given = [(first, "yes"), (first, "no"), (first, "no"), (second, "yes"), (second, None), (first, None)]
    asked, texts = zip(*((p, " no answer" if a is None else told(p, a)) for p, a in given), strict=True)
    assert reward_model.majority_reward(asked, texts) == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    assert reward_model.majority_reward([first], [" no answer"]) == [0.0]  # nobody voted


@torch.inference_mode()
def test_gold_is_the_likelihood_of_the_gold_answer_after_the_steps():
    model, problem = reward(), PROBLEMS[0]
    likely = reward_model.GoldReward(partial(nullcontext, model), tokenizer())
    steps, other = worked_solution(problem)[0], {"yes": "no", "no": "yes"}[problem.answer]
    texts = [" " + "\n".join([*steps, prompts.answer_sentence(problem, stated)]) for stated in (problem.answer, other)]
    head = encoding.encode_prompt(tokenizer(), prompts.reanswer_prompt(problem, " " + "\n".join(steps)))
    tail = encoding.encode_completion(tokenizer(), f" {problem.answer}.")
    logp = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    by_hand = sum(logp[len(head) - 1 + place, token].item() for place, token in enumerate(tail))
    assert likely([problem] * 2, texts) == pytest.approx([by_hand] * 2, abs=1e-4)  # whatever answer was stated
    drawn = [written_sample(text) for text in texts]
    assert reward_model.score_samples(likely, [problem] * 2, drawn) == pytest.approx([by_hand] * 2, abs=1e-4)


def fixed(*scores):
    return lambda problems, texts: list(scores)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("a", [1, 2]),
        ("-a", [-1, -2]),
        ("a + 2*b", [21, 42]),
        ("a-.5*b", [-4, -8]),
        ("0.5*a + b - a", [9.5, 19]),
    ],
)
def test_a_formula_is_a_weighted_sum_of_rewards(formula, expected):
    reward = reward_model.weighted_sum(formula, {"a": fixed(1, 2), "b": fixed(10, 20)})
    assert reward([], ["x", "y"]) == expected


@pytest.mark.parametrize("formula", ["", "a b", "a ** b", "a + 2", "2a", "a + __import__('os')", "a,b"])
def test_what_is_no_sum_is_refused(formula):
    with pytest.raises(ValueError, match="is not allowed: give a sum of"):
        reward_model.weighted_sum(formula, {"a": fixed(1), "b": fixed(2)})


def test_an_unknown_name_in_a_formula_is_refused():
    with pytest.raises(ValueError, match=r"ppo\.reward = 'a \+ c' is not allowed: give a sum of a, b, each"):
        reward_model.weighted_sum("a + c", {"a": fixed(1), "b": fixed(2)})


def test_words_are_counted():
    assert reward_model.word_count([], ["one two", ""]) == [2.0, 0.0]
