"""smlib.ppo.loop beside an independent PPO: TRL 1.12's PPOTrainer, whose numbers are in trl_ppo.json.

benchmarks/peers/trl_ppo.py made the file and says what ran. All tables are [6, 8], a column for each token of a
completion; the cases:

    wide        all six completions fill the eight columns; gamma and lambda below 1, k1
    ragged      six lengths from 1 to 8, the longest cut; gamma = lambda = 1, k1
    discounted  the same completions; gamma and lambda below 1, k3
    pad_is_eos  the same completions as ragged, with the end token as pad token
    other_stop  completions that end in a stop token which is not the tokenizer's end token

Agreement is to 1e-5 in all that follows. Where TRL 1.12 differs, a test says why and holds both numbers.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from smlib.ppo import arithmetic, batches, loop, updates
from smlib.ppo.roles import SeparateModels
from smlib.ppo.settings import PPOSettings
from smlib.problems.datasets import Problem
from smlib.sampling import packing
from smlib.sampling.params import Ending, Sample

FILE = json.loads((Path(__file__).parent / "trl_ppo.json").read_text())
EOS, PAD, STOP = 1, 2, 3
SOUND = ["wide", "ragged", "discounted", "other_stop"]  # pad and end token differ


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def load(name: str) -> SimpleNamespace:
    """A case: its settings, prompts and completions; `real` [6, 8], True at the tokens of the completions; and
    TRL's numbers as tensors, those of masks as bool."""
    case = FILE["cases"][name]
    numbers = {key: torch.tensor(value) for key, value in case["trl"].items()}
    for key in ("padding", "value_padding", "contains_eos"):
        numbers[key] = numbers[key].bool()
    lengths = torch.tensor([len(row) for row in case["completions"]])
    real = torch.arange(8) < lengths[:, None]
    return SimpleNamespace(**{**case, **case["settings"], **numbers, "lengths": lengths, "real": real})


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), rtol=0, atol=1e-5)


def model_of(role: str):
    """The model whose weights TRL had."""
    kind, labels = (LlamaForTokenClassification, {"num_labels": 1}) if role == "value" else (LlamaForCausalLM, {})
    model = kind(LlamaConfig(**FILE["llama"], **labels)).eval()
    weights = {name: torch.tensor(weight) for name, weight in FILE["weights"][role].items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied to the embedding
    return model


def roles() -> SeparateModels:
    """TRL's three models as ours: its value model is a decoder with a linear head."""
    value = model_of("value")
    ours = SeparateModels(model_of("policy"), model_of("reference"), value.get_decoder())
    ours.head.load_state_dict(value.score.state_dict(), strict=False)
    return ours


def collated(case, end: int = EOS) -> tuple[batches.Batch, list[Sample]]:
    """Our batch of the case's completions, with TRL's log-probabilities as those of the rollout."""
    drawn = [row.tolist() for row in case.logp]
    samples = [Ending((end,), (), None).cut(ids, logp) for ids, logp in zip(case.completions, drawn, strict=True)]
    assert [list(sample.token_ids) for sample in samples] == case.completions
    return batches.collate(case.prompts, samples, case.pad), samples


def trained(case, out, monkeypatch, end: int = EOS) -> dict:
    """Run one update of our `train` on the case -> what its functions were given and gave, real tokens flat [N]."""
    batch, samples = collated(case, end)
    problems = [Problem(f"toy/train/{i}", "toy", "flip heads", "yes", "yes_no") for i in range(len(samples))]
    settings = PPOSettings(
        updates=1, warmup_updates=0, episodes=6, samples_per_question=1, minibatch=6, kl_coef=case.kl_coef,
        kl_kind=case.kl_estimator, gamma=case.gamma, lam=case.lam, missing_end_penalty=case.missing_eos_penalty,
        center_by_question=False, normalize_reward=False, reward_clip=0.0,
    )  # fmt: skip
    seen = {"mask": batch.mask}
    token_rewards, gae = arithmetic.token_rewards, arithmetic.gae

    def noted_rewards(scores, kl, mask, kl_coef):
        rewards = token_rewards(scores, kl, mask, kl_coef)
        seen.update(scores=scores.clone(), kl=kl[mask], rewards=rewards[mask])
        return rewards

    def noted_gae(rewards, values, mask, gamma, lam):
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        seen.update(values=values[mask], advantages=advantages[mask], returns=returns[mask])
        return advantages, returns

    monkeypatch.setattr(loop, "rollout", lambda *_: (batch, samples))
    monkeypatch.setattr(loop, "token_rewards", noted_rewards)
    monkeypatch.setattr(loop, "gae", noted_gae)
    tokenizer = SimpleNamespace(pad_token_id=PAD, pad_token="<pad>", eos_token_id=end, eos_token="<end>")
    raw = case.raw_scores.tolist()
    loop.train(roles(), lambda *_: raw, lambda _: problems, tokenizer, settings, out)
    return seen


# ---- agreement ---------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_trl_1_12():
    assert FILE["versions"]["trl"] == "1.12.0"
    for name in SOUND:
        case = load(name)
        assert torch.equal(~case.padding, case.real)  # the same tokens are real to TRL and to us
        assert 0 < case.policy_clip_fraction < 1 and 0 < case.value_clip_fraction < 1  # clipping is at work


def test_log_probabilities_of_given_logits():
    case = load("ragged")
    ids = torch.tensor([token for row in case.completions for token in row])
    close(packing.token_logprobs(case.logits, ids), case.logp[case.real])


@pytest.mark.parametrize("name", SOUND)
def test_log_probabilities_and_values_of_given_weights(name):
    """TRL pads prompts on the left and shifts positions; we pad on the right. The real tokens must not notice."""
    case = load(name)
    batch, _ = collated(case, STOP if name == "other_stop" else EOS)
    logp, values = updates.logprobs_and_values(roles(), batch, 6, reference=False)
    ref_logp, same = updates.logprobs_and_values(roles(), batch, 6, reference=True)
    assert torch.equal(values, same)
    close(logp[batch.mask], case.logp[case.real])
    close(ref_logp[batch.mask], case.ref_logp[case.real])
    close(values[batch.mask], case.values[case.real])


@pytest.mark.parametrize("name", SOUND)
def test_kl_and_entropy(name):
    case = load(name)
    kl = arithmetic.kl_estimate(case.logp, case.ref_logp, case.kl_estimator)
    close(kl[case.real], case.kl[case.real])
    close(kl.where(case.real, 0.0).sum(dim=1).mean(), case.mean_kl)
    # our log has the entropy per token, TRL's per completion
    close(-arithmetic.masked_mean(case.logp, case.real) * case.real.sum() / 6, case.mean_entropy)


def test_the_two_kl_estimates_are_of_the_same_tokens():
    assert load("ragged").kl_estimator == "k1" and load("discounted").kl_estimator == "k3"
    close(load("ragged").logp, load("discounted").logp)


def test_rewards_where_no_completion_is_shorter_than_the_batch():
    case = load("wide")
    close(arithmetic.token_rewards(case.scores, case.kl, case.real, case.kl_coef), case.rewards)


@pytest.mark.parametrize("name", ["wide", "ragged"])
def test_advantages_and_returns(name):
    """In `ragged` TRL puts the scores elsewhere (see below), but with gamma = lambda = 1 no real token feels it."""
    case = load(name)
    rewards = arithmetic.token_rewards(case.scores, case.kl, case.real, case.kl_coef)
    advantages, returns = arithmetic.gae(rewards, case.values, case.real, case.gamma, case.lam)
    close(advantages[case.real], case.advantages[case.real])
    close(returns[case.real], case.returns[case.real])


@pytest.mark.parametrize("name", list(FILE["cases"]))
def test_gae_of_given_rewards(name):
    """From TRL's own rewards, over the columns that it counts, one more than the real ones."""
    case = load(name)
    advantages, returns = arithmetic.gae(case.rewards, case.values, ~case.value_padding, case.gamma, case.lam)
    close(advantages, case.advantages)
    close(returns, case.returns)


@pytest.mark.parametrize("name", list(FILE["cases"]))
def test_whitening(name):
    """TRL divides by the deviation with n - 1, we by the one with n: a factor, and no fault of either."""
    case = load(name)
    n = int((~case.padding).sum())
    close(arithmetic.whiten(case.advantages, ~case.padding) * math.sqrt((n - 1) / n), case.white_advantages)


@pytest.mark.parametrize("name", list(FILE["cases"]))
def test_policy_loss(name):
    case = load(name)
    loss, clipped = arithmetic.policy_loss(
        case.new_logp, case.logp, case.white_advantages, ~case.padding, case.cliprange
    )
    close(loss, case.policy_loss)
    close(clipped, case.policy_clip_fraction)


@pytest.mark.parametrize("name", list(FILE["cases"]))
def test_value_loss(name):
    """Over the columns that TRL counts. These are the real tokens in `wide`, and in `pad_is_eos`, where its counting
    one column too many and taking the end token for padding make up for each other."""
    case = load(name)
    assert torch.equal(~case.value_padding, case.real) == (name in ("wide", "pad_is_eos"))
    loss, clipped = arithmetic.value_loss(
        case.new_values, case.values, case.returns, ~case.value_padding, case.cliprange_value
    )
    close(loss, case.value_loss)
    close(clipped, case.value_clip_fraction)


@pytest.mark.parametrize("name", ["wide", "ragged"])
def test_one_update_of_train(name, tmp_path, monkeypatch):
    """Our own `train`, from the weights and the unshaped scores on."""
    case = load(name)
    ours = trained(case, tmp_path, monkeypatch)
    assert ours["mask"].sum(dim=1).tolist() == case.lengths.tolist()
    close(ours["scores"], case.scores)
    for key in ("kl", "values", "advantages", "returns"):
        close(ours[key], getattr(case, key)[case.real])
    if name == "wide":
        close(ours["rewards"], case.rewards[case.real])


# ---- where TRL 1.12 is at fault ----------------------------------------------------------------------------


def test_fault_the_score_lands_behind_the_last_real_token():
    """PPOTrainer.train adds the score at sequence_lengths + 1, and sequence_lengths is the *index* of the end token:
    so at the first padding, unless the completion fills the batch."""
    case = load("discounted")
    plain = (-case.kl_coef * case.kl).where(case.real, 0.0)
    ours = arithmetic.token_rewards(case.scores, case.kl, case.real, case.kl_coef)
    last = case.lengths - 1
    rows = torch.arange(6)

    close((ours - plain)[rows, last], case.scores)
    landed = (case.rewards - plain).abs().argmax(dim=1)
    assert landed.tolist() == [7, 7, 5, 3, 1, 7]
    assert last.tolist() == [7, 7, 4, 2, 0, 6]
    close((case.rewards - plain)[rows, landed], case.scores)

    # So the last real token of a short completion learns of its score only by way of the value behind the end.
    advantages, _ = arithmetic.gae(ours, case.values, case.real, case.gamma, case.lam)
    behind = case.values[rows, landed]
    theirs = plain[rows, last] - case.values[rows, last]
    theirs += case.gamma * behind + case.gamma * case.lam * (case.scores - behind)
    short = case.lengths < 8
    close(case.advantages[rows, last][short], theirs[short])
    close(advantages[rows, last], ours[rows, last] - case.values[rows, last])
    apart = (advantages - case.advantages).where(case.real, 0.0).abs().amax(dim=1)
    assert (apart[short] > 0.01).all()
    close(apart[~short], torch.zeros(2))

    # And the value loss counts that padding too: it trains a prefix from which nothing is drawn.
    assert (case.value_padding.logical_not() & ~case.real).sum(dim=1).tolist() == [0, 0, 1, 1, 1, 1]
    over_real, _ = arithmetic.value_loss(case.new_values, case.values, case.returns, case.real, case.cliprange_value)
    assert abs(over_real - case.value_loss) > 0.01


def test_fault_the_end_token_is_masked_away_where_it_is_the_pad_token():
    """PPOTrainer.train takes the first pad token for the first padding: where that is the end token, the policy
    never learns to end, and get_reward scores the text without its end."""
    case, sound = load("pad_is_eos"), load("ragged")
    ends = sound.real & (torch.arange(8) == sound.lengths[:, None] - 1)
    ends[0] = False  # cut, without an end token
    assert case.completions == sound.completions and case.pad == EOS
    assert torch.equal(~case.padding, sound.real & ~ends)
    assert (case.logp[ends] == 1).all() and (case.kl[ends] == 0).all()  # TRL's mark of a masked token
    assert case.scored_tokens.tolist() == [7, 6, 3, 1, -1, 5]  # -1: the last token of the prompt
    assert sound.scored_tokens.tolist() == (sound.lengths - 1).tolist()
    close(case.logp[~case.padding], sound.logp[~case.padding])  # all else is as it was

    # Our batch knows completions by their lengths, so the same ids keep their ends.
    case.logp = sound.logp
    batch, _ = collated(case)
    assert batch.mask.sum(dim=1).tolist() == [8, 8, 5, 3, 1, 7]
    assert (~case.padding).sum(dim=1).tolist() == [8, 7, 4, 2, 0, 6]
    assert batch.ids[:, 1:][batch.mask].tolist() == [token for row in case.completions for token in row]
    logp, _ = updates.logprobs_and_values(roles(), batch, 6, reference=False)
    close(logp[batch.mask], sound.logp[sound.real])
    kl = arithmetic.kl_estimate(sound.logp, sound.ref_logp)
    assert (kl[ends].abs() > 1e-3).all()
    close(kl.where(sound.real, 0.0).sum(dim=1).mean(), sound.mean_kl)
    close(kl.where(~case.padding, 0.0).sum(dim=1).mean(), case.mean_kl)
    assert abs(sound.mean_kl - case.mean_kl) > 0.01


def test_fault_the_missing_end_penalty_looks_for_another_token_than_the_stop_token(tmp_path, monkeypatch):
    """PPOTrainer.train cuts at stop_token_id, and then looks for the tokenizer's end token: with another stop token
    every completion that stopped is punished, and one that ran on past an end token is not."""
    case = load("other_stop")
    stopped = [STOP in row for row in case.completions]
    assert stopped == [False, True, True, True, True, False]
    assert case.contains_eos.tolist() == [False, False, False, False, False, True]
    close(case.scores - case.raw_scores, torch.tensor([-1.5, -1.5, -1.5, -1.5, -1.5, 0.0]))

    ours = trained(case, tmp_path, monkeypatch, end=STOP)
    close(ours["scores"] - case.raw_scores, torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.0, -1.5]))


@pytest.mark.parametrize("name", ["wide", "ragged"])
def test_the_penalty_is_right_where_the_stop_token_is_the_end_token(name):
    case = load(name)
    cut = torch.tensor([EOS not in row for row in case.completions])
    assert cut.any() and not cut.all()
    assert torch.equal(case.contains_eos, ~cut)
    close(case.scores - case.raw_scores, -1.5 * cut.float())
