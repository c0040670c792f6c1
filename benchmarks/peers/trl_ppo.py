"""Numbers of TRL 1.12's PPOTrainer for tests/test_ppo_oracle.py; writes tests/trl_ppo.json.

    python -m venv .venv-trl && .venv-trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    .venv-trl/bin/python benchmarks/peers/trl_ppo.py

It needs an environment of its own, because the TRL in ours no longer has PPOTrainer.

What runs. `trl.experimental.ppo.PPOTrainer.train` itself, for one update of six completions on a CPU, once per case
below, with a policy, a reference, a value and a reward model that are Llamas of 1 layer and width 8. Nothing of its
arithmetic is repeated here. Three things are put in its place or around it:
- `batch_generation` gives fixed completions in place of drawn ones, with the logits of TRL's own `forward`;
- `get_reward` and `masked_whiten` are wrapped, to note what goes in and comes out;
- `Accelerator.backward` and `PPOTrainer.log` are wrapped, to read the local variables of the running `train`.
The losses are those of the last of several epochs, when the policy has moved and the clipping is at work.

What is in the file. The weights of policy, reference and value; per case the settings, prompts and completions, and
TRL's numbers. All [6, 8] tables have a column for each token of a completion; past its end they hold what TRL left
there. Floats are float32 in the shortest decimals that give the same float32 back.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification, PreTrainedTokenizerFast, set_seed
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

OUT = Path(__file__).parents[2] / "tests" / "trl_ppo.json"
VOCABULARY, WIDTH, BOS, EOS, PAD, STOP = 40, 8, 0, 1, 2, 3
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
PROMPTS = [[0, 20], [0, 21, 5, 6], [0, 22, 7], [0, 23, 8, 9, 10], [0, 24, 11], [0, 25, 12, 13]]
# Completions by how they end: all as wide as the batch; of six lengths; ended by a token that is not the tokenizer's.
WIDE = [
    [5, 9, 14, 30, 31, 7, 8, EOS],
    [6, 6, 15, 29, 32, 38, 9, 10],
    [7, 10, 16, 28, 33, 37, 4, EOS],
    [8, 11, 17, 27, 34, 36, 5, 12],
    [9, 12, 18, 26, 35, 35, 6, EOS],
    [10, 13, 19, 39, 36, 34, 7, 14],
]
RAGGED = [
    WIDE[1],
    WIDE[0],
    [7, 10, 16, 28, EOS],
    [8, 11, EOS],
    [EOS],
    [10, 13, 19, 39, 36, 34, EOS],
]
STOPPED = [
    WIDE[1],
    [5, 9, 14, 30, 31, 7, 8, STOP],
    [7, 10, 16, 28, STOP],
    [8, 11, STOP],
    [STOP],
    [10, 13, EOS, 39, 36, 34, 7, 14],  # the tokenizer's end token, and then no stop token
]
CASES = {
    "wide": (WIDE, {"stop_token": "eos", "gamma": 0.97, "lam": 0.9, "kl_estimator": "k1"}),
    "ragged": (RAGGED, {"stop_token": "eos", "gamma": 1.0, "lam": 1.0, "kl_estimator": "k1"}),
    "discounted": (RAGGED, {"stop_token": "eos", "gamma": 0.97, "lam": 0.9, "kl_estimator": "k3"}),
    "pad_is_eos": (RAGGED, {"stop_token": "eos", "gamma": 1.0, "lam": 1.0, "kl_estimator": "k1"}),
    "other_stop": (STOPPED, {"stop_token_id": STOP, "gamma": 1.0, "lam": 1.0, "kl_estimator": "k1"}),
}
SHARED = {"kl_coef": 0.3, "cliprange": 0.2, "cliprange_value": 0.2, "missing_eos_penalty": 1.5}
SEEDS = {"policy": 1, "reference": 1, "value": 3, "reward": 4}
REFERENCE_SEED = 2  # of the noise that the reference has on top of the policy's weights
# Locals of PPOTrainer.train at its log line, and at the last backward pass -> their names in the file.
AT_LOG = {
    "logprobs": "logp",
    "ref_logprobs": "ref_logp",
    "values": "values",
    "scores": "scores",
    "contain_eos_token": "contains_eos",
    "sequence_lengths": "sequence_lengths",
    "padding_mask": "padding",
    "padding_mask_p1": "value_padding",
    "kl": "kl",
    "rewards": "rewards",
    "returns": "returns",
    "advantages": "white_advantages",
    "mean_kl": "mean_kl",
    "mean_entropy": "mean_entropy",
}
AT_BACKWARD = {
    "micro_batch_inds": "order",
    "new_logprobs": "new_logp",
    "vpred": "new_values",
    "pg_loss": "policy_loss",
    "vf_loss": "value_loss",
    "vf_clipfrac": "value_clip_fraction",
}


def make_model(kind: type, role: str):
    """A tiny Llama with weights of two decimals, so that they are short to write down and exact to read."""
    labels = {} if kind is LlamaForCausalLM else {"num_labels": 1}
    model = kind(LlamaConfig(**LLAMA, **labels))
    generator = torch.Generator().manual_seed(SEEDS[role])
    nearby = torch.Generator().manual_seed(REFERENCE_SEED)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator) * 0.3 + ("norm" in name)
        if role == "reference":
            drawn += torch.randn(weight.shape, generator=nearby) * 0.05
        weight.data = (drawn * 100).round() / 100
    return model


def make_tokenizer(pad: int) -> PreTrainedTokenizerFast:
    words = {f"<{number}>": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<4>")),
        bos_token=f"<{BOS}>",
        eos_token=f"<{EOS}>",
        pad_token=f"<{pad}>",
        padding_side="left",
    )


def run(completions: list[list[int]], pad: int, options: dict) -> tuple[dict, dict]:
    """One update by PPOTrainer.train -> (its numbers, rows in the order of PROMPTS; the weights by role)."""
    policy, reference = (make_model(LlamaForCausalLM, role) for role in ("policy", "reference"))
    value, reward = (make_model(LlamaForTokenClassification, role) for role in ("value", "reward"))
    weights = {
        role: {name: plain(weight) for name, weight in model.named_parameters()}
        for role, model in (("policy", policy), ("reference", reference), ("value", value))
    }
    seen = {}

    def fixed_generation(model, queries, size, pad_id, config):
        """batch_generation's place: each prompt gets its completion; the logits are those TRL's forward gives."""
        order = [PROMPTS.index([token for token in row if token != pad_id]) for row in queries.tolist()]
        padded = [completions[number] + [pad_id] * (WIDTH - len(completions[number])) for number in order]
        both = torch.cat([queries, torch.tensor(padded)], dim=1)
        with torch.no_grad():
            logits = ppo_trainer.forward(model, both, pad_id).logits[:, queries.shape[1] - 1 : -1]
        seen.update(rows=torch.tensor(order), logits=logits.clone())
        return both, logits

    def noted_reward(model, ids, pad_id, context):
        result = get_reward(model, ids, pad_id, context)
        if model is reward:  # the score before the penalty; and the token of the completion at which it is read
            seen.update(raw_scores=result[1].clone(), scored_tokens=result[2] - context)
        return result

    def noted_whiten(values, *rest, **named):
        seen["advantages"] = values.clone()
        return masked_whiten(values, *rest, **named)

    def noted_backward(loss, **named):
        train = sys._getframe(1).f_locals
        seen.update({ours: torch.as_tensor(train[theirs]).detach().clone() for theirs, ours in AT_BACKWARD.items()})
        backward(loss, **named)

    def noted_log(logs, *rest):
        train = sys._getframe(1).f_locals
        seen.update({ours: train[theirs].detach().clone() for theirs, ours in AT_LOG.items()})
        seen["policy_clip_fraction"] = train["pg_clipfrac_stats"][-1, 0, 0]  # the last epoch's only minibatch

    get_reward, masked_whiten = ppo_trainer.get_reward, ppo_trainer.masked_whiten
    before = ppo_trainer.batch_generation
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, num_sample_generations=0, response_length=WIDTH, temperature=1.0,
            per_device_train_batch_size=len(PROMPTS), total_episodes=len(PROMPTS), num_ppo_epochs=3,
            learning_rate=0.004, seed=0, **SHARED, **options,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, make_tokenizer(pad), policy, reference, reward, Dataset.from_dict({"input_ids": PROMPTS}), value
        )
        set_seed(config.seed)  # TRL shuffles by numpy's generator, which it does not seed
        backward = trainer.accelerator.backward
        trainer.accelerator.backward, trainer.log = noted_backward, noted_log
        ppo_trainer.get_reward, ppo_trainer.masked_whiten = noted_reward, noted_whiten
        ppo_trainer.batch_generation = fixed_generation
        try:
            trainer.train()
        finally:
            ppo_trainer.get_reward, ppo_trainer.masked_whiten = get_reward, masked_whiten
            ppo_trainer.batch_generation = before

    # Rows came shuffled, and those of the last epoch shuffled again: put both back.
    rows, order = seen.pop("rows"), seen.pop("order")
    last = {"new_logp", "new_values"}
    numbers = {}
    for name, tensor in seen.items():
        if tensor.ndim:
            tensor = tensor[(rows[order] if name in last else rows).argsort()]
        numbers[name] = tensor
    return numbers, weights


def plain(tensor: torch.Tensor):
    """Nested lists; a float32 as the shortest decimals that give it back."""
    if tensor.is_floating_point():
        return tensor.detach().numpy().astype(str).astype(float).tolist()  # numpy prints the shortest decimals
    return tensor.int().tolist()


def lines(value, depth: int = 0) -> str:
    """JSON with a line for each entry of a dict, lists on one line."""
    if not isinstance(value, dict):
        return json.dumps(value)
    entries = [" " * (depth + 1) + f"{json.dumps(name)}: {lines(entry, depth + 1)}" for name, entry in value.items()]
    return "{\n" + ",\n".join(entries) + "\n" + " " * depth + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if trl.__version__ != "1.12.0":
        raise SystemExit(f"this is trl {trl.__version__}; the numbers are of 1.12.0: pip install trl==1.12.0")
    torch.set_num_threads(1)
    cases = {}
    for name, (completions, options) in CASES.items():
        pad = EOS if name == "pad_is_eos" else PAD
        numbers, weights = run(completions, pad, options)
        logits = numbers.pop("logits")
        cases[name] = {
            "settings": SHARED | options,
            "pad": pad,
            "prompts": PROMPTS,
            "completions": completions,
            "trl": {key: plain(tensor) for key, tensor in numbers.items()},
        }
        if name == "ragged":  # of the real tokens, row after row
            real = torch.tensor([[column < len(row) for column in range(WIDTH)] for row in completions])
            cases[name]["trl"]["logits"] = plain(logits[real])
    versions = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]}
    args.out.write_text(lines({"versions": versions, "llama": LLAMA, "weights": weights, "cases": cases}) + "\n")
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
