"""Memory of all stages: computed beside measured on small models, and computed for a 7B.

    python benchmarks/memory.py    # five minutes on one core

writes PPO's phases into results/memory.csv (measured) and memory_7b.csv, and the stages into memory_stages.csv
(measured) and memory_stages_7b.csv. What is measured is every byte that PyTorch's CPU allocator hands out
(torch.profiler), in the phases of an update as smlib.ppo runs them, and in whole calls of smlib.sft.train_sft,
smlib.reward_model.train_reward_model, smlib.dpo.train_dpo and smlib.sampling.sample_ids.
"""

import copy
import csv
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from smlib import dpo, encoding, memory, models, prompts, reward_model, sft
from smlib.memory import Choices, Sampling, Training
from smlib.ppo import Batch, PPOSettings, collate, optimize, tabulate
from smlib.problems import Problem
from smlib.roles import Adapters, Roles, SeparateModels
from smlib.sampling import Sample, sample_ids
from smlib.settings import preset

RESULTS = Path(__file__).parents[1] / "results"
HELD = (  # layout, value, recompute
    ("separate", "model", False),
    ("separate", "head", True),
    ("adapters", "model", True),
    ("adapters", "head", False),
)
MINIBATCHES, COMPLETIONS = (1, 4, 16), (128, 384, 896)  # with prompts of 128 tokens
LENGTHS = {"prompt": 256, "shown": 1_400}  # of the stages at 7B


def llama(hidden=256, layers=3, heads=4, kv=4, intermediate=704, vocab=2000, tied=False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=intermediate, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


SHAPES = {  # what takes most of the memory: (model, minibatch, prompt, completion)
    "activations": (llama(hidden=128, layers=8, kv=2, intermediate=344, vocab=500), 8, 60, 68),
    "weights": (llama(hidden=512, layers=2, heads=8, kv=8, intermediate=1376), 1, 16, 32),
    "logits": (llama(hidden=128, layers=2, kv=1, intermediate=344, vocab=8000), 8, 16, 56),
    "tied": (llama(layers=2, vocab=8000, tied=True), 2, 16, 48),
}


def cases():
    """(name of the shape, its config, choices)"""
    for name, (config, minibatch, prompt, completion) in SHAPES.items():
        for layout, value, recompute in HELD:
            reward = "model" if layout == "separate" else "adapter"
            precisions = [("float32", "float32")]
            if name in ("activations", "weights"):
                precisions += [("bfloat16", "float32")]
                precisions += [("bfloat16", "bfloat16")] if layout == "adapters" else []
            for precision, frozen in precisions:
                yield name, config, Choices(
                    layout=layout, value=value, reward=reward, rank=8, frozen=frozen, precision=precision,
                    recompute=recompute, minibatch=minibatch, rollout_rows=16, prompt=prompt, completion=completion,
                )  # fmt: skip


class Peak:
    """`bytes`: the most that was allocated at a time within, beyond what was there before."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        found = allocations(self.profile.profiler.kineto_results.experimental_event_tree())
        now, self.bytes, held = 0, 0, set()
        for event in sorted(found, key=lambda event: event.start_time_ns):
            pointer, change = event.extra_fields.ptr, event.extra_fields.alloc_size
            # The profiler remembers addresses of earlier profiles, whatever has been there since: what was not
            # allocated within is no part of the peak, freed or not.
            if change < 0 and pointer not in held:
                continue
            (held.add if change > 0 else held.discard)(pointer)
            now += change
            self.bytes = max(self.bytes, now)


def allocations(events):
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from allocations(event.children)


def build(config: LlamaConfig, choices: Choices) -> tuple[Roles, LlamaForCausalLM | None]:
    """The roles, and the reward model where it is one of its own."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.generation_config.eos_token_id = None  # so that completions reach their limit
    if choices.lora:
        if choices.frozen == "bfloat16":
            base.bfloat16()
        adapted = models.add_lora(base, choices.rank, 16, "all-linear", "")
        with tempfile.TemporaryDirectory() as folder:
            if choices.reward == "adapter":
                adapted.save_pretrained(folder)
            reward = folder if choices.reward == "adapter" else None
            roles, judge = Adapters(adapted, reward, share_trunk=choices.value == "head"), None
    else:
        value = copy.deepcopy(base).get_decoder() if choices.value == "model" else None
        judge = copy.deepcopy(base).requires_grad_(False) if choices.reward == "model" else None
        roles = SeparateModels(base, copy.deepcopy(base), value)
    if choices.recompute:
        roles.recompute_activations()
    return roles, judge


def held(*owners) -> int:
    """Bytes of the storages of modules' weights and gradients and of an optimizer's states, each counted once."""
    found = {}
    for owner in filter(None, owners):
        if isinstance(owner, torch.optim.Optimizer):
            tensors = [tensor for state in owner.state.values() for tensor in state.values()]
        else:
            tensors = [*owner.parameters(), *(weight.grad for weight in owner.parameters() if weight.grad is not None)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        found |= {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(found.values())


def optimizer_of(roles: Roles) -> torch.optim.AdamW:
    groups = [{"params": list(weights.values())} for weights in roles.weights().values()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def batch_of(config: LlamaConfig, choices: Choices) -> Batch:
    """One minibatch, all of its completions as long as can be."""
    draw = torch.randint(config.vocab_size, (choices.minibatch, choices.prompt + choices.completion)).tolist()
    samples = [Sample("", tuple(row[choices.prompt :]), (-1.0,) * choices.completion, "length") for row in draw]
    prompts = [row[: choices.prompt] for row in draw[:: choices.samples]]
    batch = collate([prompts[number // choices.samples] for number in range(len(draw))], samples, 0)
    batch.values, batch.returns = torch.zeros_like(batch.logp), torch.ones_like(batch.logp)
    batch.advantages = batch.returns
    return batch


def steps(roles: Roles, optimizer, batch: Batch, choices: Choices) -> None:
    """Two optimizer steps: the first finds no moments yet."""
    plan = PPOSettings(minibatch=choices.minibatch, epochs=2, max_update_kl=1e9, precision=choices.precision)
    optimize(models.accelerator(), roles, optimizer, batch, plan, torch.Generator())


def draw(roles: Roles, config: LlamaConfig, choices: Choices) -> None:
    prompts = torch.randint(config.vocab_size, (choices.rollout_rows // choices.samples, choices.prompt)).tolist()
    sample_ids(roles.policy, prompts, choices.samples, temperature=1.0, max_new_tokens=choices.completion, seed=0)


def judge_some(judge, config: LlamaConfig, choices: Choices) -> None:
    """As many texts at a time as smlib.reward_model.score takes."""
    each, texts = choices.completion, models.CONTINUATIONS_PER_ROW
    rows = max(memory.SCORED_TOKENS // (choices.prompt + texts * each), 1)
    packed = models.pack([([1] * choices.prompt, [[1] * each] * texts)] * rows, 0)
    with torch.inference_mode():
        models.packed_logprobs(judge, packed)


def measure(config: LlamaConfig, choices: Choices) -> dict[str, int]:
    """Peak bytes of each phase of an update that is not the first."""

    def context():
        return torch.autocast("cpu", torch.bfloat16, enabled=choices.precision == "bfloat16")

    roles, judge = build(config, choices)
    optimizer, batch = optimizer_of(roles), batch_of(config, choices)
    found, before = {}, held(roles, judge)
    with Peak() as peak:
        steps(roles, optimizer, batch, choices)
    found["update"] = before + peak.bytes
    before = held(roles, judge, optimizer)
    with Peak() as peak, context():
        roles.eval()
        draw(roles, config, choices)
    found["rollout"] = before + peak.bytes
    with Peak() as peak:
        if judge is not None:
            judge_some(judge, config, choices)
        elif choices.reward == "adapter":
            with roles.using("reward") as model:
                judge_some(model, config, choices)
    found["scoring"] = before + peak.bytes
    with Peak() as peak, context():
        tabulate(roles, batch, choices.minibatch, reference=True)
        if choices.precision == "bfloat16":
            tabulate(roles, batch, choices.minibatch, reference=False)
    found["reference"] = before + peak.bytes
    return found


# ---- stages --------------------------------------------------------------------------------------------------

QUESTION = Problem("0", "gsm8k", "How many?", "7", "number")
TRAINED = {  # what takes most of the memory, besides the tile of logits: (model, rows, completion)
    "activations": (llama(hidden=128, layers=12, kv=2, intermediate=344, vocab=500), 4, 200),
    "weights": (llama(hidden=768, layers=4, heads=8, kv=8, intermediate=2048), 1, 40),
    "logits": (llama(hidden=128, layers=2, kv=1, intermediate=344, vocab=8000), 2, 120),
    "tied": (llama(layers=2, vocab=8000, tied=True), 2, 60),
}
DRAWN = {  # rows, samples, prompt, completion
    "activations": (16, 1, 200, 8),
    "weights": (2, 1, 20, 16),
    "logits": (64, 8, 20, 16),
    "tied": (32, 32, 60, 60),
}


def stage_cases():
    """(name of the shape, its config, what is measured on it)"""
    for name, (config, rows, completion) in TRAINED.items():
        for kind, rank, recompute in product(memory.TRAINED, (0, 8), (False, True)):
            for frozen in ("float32", "bfloat16") if rank else ("float32",):
                plan = Training(kind, frozen, rank, recompute, rows, recompute, completion=completion)
                yield name, config, replace(plan, prompt=len(head()))
    for name, sizes in DRAWN.items():
        for frozen in ("float32", "bfloat16"):
            yield name, TRAINED[name][0], Sampling(frozen, *sizes)


def head() -> list[int]:
    """The question's tokens; the vocabularies here are larger than the tiny base's."""
    return encoding.encode_prompt(models.load_tokenizer(), prompts.open_prompt(QUESTION))


def text(word: str, tokens: int) -> str:
    """Of so many tokens, with the end."""
    found = word + " 7" * (tokens - 2)
    assert len(encoding.encode_completion(models.load_tokenizer(), found)) == tokens
    return found


def train(model, plan: Training) -> None:
    """Two optimizer steps, the second of which finds moments; one text of each is shorter, so that there is a mask."""
    tokenizer, steps = models.load_tokenizer(), 2 * (1 + plan.accumulated) * plan.rows
    lengths = [plan.completion - (number % plan.rows == 1) for number in range(steps)]
    options = {"epochs": 1, "learning_rate": 1e-5, "batch": steps // 2, "micro_batch": plan.rows, "seed": 0}
    options |= {"recompute": plan.recompute, "progress": None}
    if plan.kind == "sft":
        rows = [{"id": "0", "side": "+", "text": text(" 1", length)} for length in lengths]
        sft.train_sft(model, tokenizer, [QUESTION], rows, **options)
    elif plan.kind == "reward":
        pairs = [{"id": "0", "held_out": False, "chosen": text(" 1", plan.completion)} for _ in lengths]
        pairs = [pair | {"rejected": text(" 2", plan.completion)} for pair in pairs]
        reward_model.train_reward_model(model, tokenizer, [QUESTION], pairs, beta=1.0, nll_coef=1.0, **options)
    else:
        ends = [tokenizer.eos_token_id]
        pairs = [{"id": "0", "prompt_ids": head(), "chosen_ids": [7] * (length - 1) + ends} for length in lengths]
        pairs = [pair | {"rejected_ids": [8] * plan.completion} for pair in pairs]
        dpo.train_dpo(model, tokenizer, pairs, beta=0.1, **options)


def measure_stage(config: LlamaConfig, plan: Training | Sampling) -> int:
    """Peak bytes of a whole call."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None  # so that completions reach their limit
    model.to(getattr(torch, plan.frozen))
    if isinstance(plan, Training) and plan.lora:
        model = models.add_lora(model, plan.rank, 16, "all-linear", "")
    before = held(model)
    with Peak() as peak:
        if isinstance(plan, Training):
            train(model, plan)
        else:
            asked = torch.randint(config.vocab_size, (plan.rollout_rows // plan.samples, plan.prompt)).tolist()
            asked[-1] = asked[-1][: -1 if len(asked) > 1 else None]
            sample_ids(model, asked, plan.samples, temperature=1.0, max_new_tokens=plan.completion, seed=0)
    return before + peak.bytes


def computed_stage(config: LlamaConfig, plan: Training | Sampling) -> dict[str, float]:
    return (memory.training if isinstance(plan, Training) else memory.sampling)(config, plan)


def compare_stages() -> list[dict]:
    rows = []
    for name, config, plan in stage_cases():
        training = isinstance(plan, Training)
        row = {"shape": name, "stage": plan.kind if training else "sampling", "frozen": plan.frozen}
        row |= {"rank": plan.rank, "recompute": plan.recompute} if training else {"rank": 0, "recompute": ""}
        parts, measured = computed_stage(config, plan), measure_stage(config, plan)
        row |= {"measured MiB": round(measured / 2**20, 2), "computed MiB": round(memory.total(parts) / 2**20, 2)}
        rows.append(row | {"error (%)": round(100 * (memory.total(parts) / measured - 1), 1)})
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def compare() -> list[dict]:
    rows = []
    for name, config, choices in cases():
        measured = measure(config, choices)
        computed = {phase: memory.total(parts) for phase, parts in memory.phases(config, choices).items()}
        row = {"shape": name} | {
            key: getattr(choices, key) for key in ("layout", "value", "precision", "frozen", "recompute")
        }
        for phase in computed:
            row[f"{phase} MiB"] = round(measured[phase] / 2**20, 2)
            row[f"{phase} computed"] = round(computed[phase] / 2**20, 2)
            row[f"{phase} error (%)"] = round(100 * (computed[phase] / measured[phase] - 1), 1)
        most, predicted = max(measured.values()), max(computed.values())
        row |= {"peak MiB": round(most / 2**20, 2), "peak computed": round(predicted / 2**20, 2)}
        rows.append(row | {"peak error (%)": round(100 * (predicted / most - 1), 1)})
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def variants():
    """Of a 7B: everything in float32 and, where it helps, in bfloat16 or 4 bits, with and without recomputation."""
    kinds = [("separate", "float32", "float32"), ("separate", "bfloat16", "bfloat16")]
    kinds += [("adapters", frozen, "bfloat16") for frozen in ("bfloat16", "nf4")]
    for (layout, frozen, precision), value, recompute in product(kinds, ("model", "head"), (False, True)):
        reward = "model" if layout == "separate" else "adapter"
        for minibatch, completion in product(MINIBATCHES, COMPLETIONS):
            yield Choices(
                layout=layout, value=value, reward=reward, rank=16, frozen=frozen, precision=precision,
                recompute=recompute, minibatch=minibatch, rollout_rows=32, prompt=128, completion=completion,
            )  # fmt: skip


def write(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def main() -> None:
    rows = compare()
    for column in [name for name in rows[0] if name.endswith("(%)")]:
        errors = [row[column] for row in rows]
        print(f"{column:22} from {min(errors):+.1f} to {max(errors):+.1f} over {len(errors)} cases")
    write(rows, RESULTS / "memory.csv")
    large = memory.table(memory.LLAMA_2_7B, variants())
    for row in large:
        print("  ".join(str(value) for value in row.values()))
    write(large, RESULTS / "memory_7b.csv")
    measured = compare_stages()
    for stage in ("sampling", *memory.TRAINED):
        errors = [row["error (%)"] for row in measured if row["stage"] == stage]
        print(f"{stage:22} from {min(errors):+.1f} to {max(errors):+.1f} over {len(errors)} cases")
    write(measured, RESULTS / "memory_stages.csv")
    runs = [preset(name, "gsm8k") for name in ("llama2-7b", "llama2-7b-40gb", "llama2-7b-24gb")]
    write(memory.stage_table(memory.LLAMA_2_7B, runs, **LENGTHS), RESULTS / "memory_stages_7b.csv")


if __name__ == "__main__":
    main()
