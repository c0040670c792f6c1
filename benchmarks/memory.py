"""Memory of all stages: computed beside measured on small models, and computed for a 7B.

    python benchmarks/memory.py    # five minutes on one core

writes PPO's phases into results/memory.csv and the stages into memory_stages.csv, each computed beside measured, and
the stages of the 7B presets, computed, into memory_stages_7b.csv. What is measured is every byte that PyTorch's CPU
allocator hands out (torch.profiler), in the phases of an update as smlib.ppo.loop runs them, and in complete calls of
train_sft, train_reward_model and train_dpo of smlib.learning, and of smlib.sampling.sampler.sample_ids.
"""

import copy
import csv
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from smlib.learning import dpo, reward_model, sft
from smlib.learning.rows import Pair, Rationale
from smlib.ppo.batches import Batch, collate
from smlib.ppo.roles import Adapters, Roles, SeparateModels
from smlib.ppo.settings import PPOSettings
from smlib.ppo.updates import logprobs_and_values, optimize
from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.runs.settings import Settings, preset
from smlib.sampling import devices, encoding, models, packing
from smlib.sampling.params import Sample, SamplingParams
from smlib.sampling.sampler import sample_ids
from smlib.scale import memory
from smlib.scale.memory import PPO, Sampling, Training

RESULTS = Path(__file__).parents[1] / "results"
ROLES = (  # LoRA rank, value, gradient_checkpointing
    (0, "model", False),
    (0, "head", True),
    (8, "model", True),
    (8, "head", False),
)
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
    """(name of the shape, its config, PPO's plan)"""
    for name, (config, micro_batch, prompt, completion) in SHAPES.items():
        for rank, value, checkpointing in ROLES:
            precisions = [("float32", "float32")]
            if name in ("activations", "weights"):
                precisions += [("bfloat16", "float32")]
                precisions += [("bfloat16", "bfloat16")] if rank else []
            for precision, dtype in precisions:
                yield name, config, PPO(
                    value=value, dtype=dtype, rank=rank, precision=precision, gradient_checkpointing=checkpointing,
                    micro_batch=micro_batch, max_batch=16, prompt=prompt, completion=completion,
                )  # fmt: skip


class Peak:
    """`bytes`: the most that was allocated at a time within, beyond what was there before."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        found = allocations(self.profile.profiler.kineto_results.experimental_event_tree())
        now, self.bytes, live = 0, 0, set()
        for event in sorted(found, key=lambda event: event.start_time_ns):
            pointer, change = event.extra_fields.ptr, event.extra_fields.alloc_size
            # The profiler remembers addresses of earlier profiles, whatever has been there since: what was not
            # allocated within is no part of the peak, freed or not.
            if change < 0 and pointer not in live:
                continue
            (live.add if change > 0 else live.discard)(pointer)
            now += change
            self.bytes = max(self.bytes, now)


def allocations(events):
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from allocations(event.children)


def build(config: LlamaConfig, plan: PPO) -> tuple[Roles, LlamaForCausalLM | None]:
    """The roles, and the reward model where it is a model of its own and no adapter."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    base.generation_config.eos_token_id = None  # so that completions reach their limit
    if plan.lora:
        adapted = models.add_lora(base.to(getattr(torch, plan.dtype)), plan.rank, 16, "all-linear", "")
        with tempfile.TemporaryDirectory() as reward:
            adapted.save_pretrained(reward)
            roles, judge = Adapters(adapted, reward, share_trunk=plan.value == "head"), None
    else:
        value = copy.deepcopy(base).get_decoder() if plan.value == "model" else None
        judge = copy.deepcopy(base).requires_grad_(False)
        roles = SeparateModels(base, copy.deepcopy(base), value)
    if plan.gradient_checkpointing:
        roles.checkpoint_gradients()
    return roles, judge


def tensor_bytes(*owners) -> int:
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


def batch_of(config: LlamaConfig, plan: PPO) -> Batch:
    """One micro batch, all of its completions as long as can be."""
    draw = torch.randint(config.vocab_size, (plan.micro_batch, plan.prompt + plan.completion)).tolist()
    samples = [Sample("", tuple(row[plan.prompt :]), (-1.0,) * plan.completion, "length") for row in draw]
    prompts = [row[: plan.prompt] for row in draw[:: plan.samples]]
    batch = collate([prompts[number // plan.samples] for number in range(len(draw))], samples, 0)
    batch.values, batch.returns = torch.zeros_like(batch.logp), torch.ones_like(batch.logp)
    batch.advantages = batch.returns
    return batch


def steps(roles: Roles, optimizer, batch: Batch, plan: PPO) -> None:
    """Two optimizer steps: the first finds no moments yet."""
    settings = PPOSettings(minibatch=plan.micro_batch, epochs=2, max_update_kl=1e9, precision=plan.precision)
    optimize(devices.accelerator(), roles, optimizer, batch, settings, torch.Generator())


def draw(roles: Roles, config: LlamaConfig, plan: PPO) -> None:
    prompts = torch.randint(config.vocab_size, (plan.max_batch // plan.samples, plan.prompt)).tolist()
    params = SamplingParams(temperature=1.0, max_new_tokens=plan.completion, seed=0)
    sample_ids(roles.policy, None, prompts, plan.samples, params)


def judge_some(judge, config: LlamaConfig, plan: PPO) -> None:
    """As many texts at a time as smlib.learning.reward_model.score takes."""
    each, texts = plan.completion, packing.CONTINUATIONS_PER_ROW
    rows = max(memory.SCORED_TOKENS // (plan.prompt + texts * each), 1)
    packed = packing.pack([([1] * plan.prompt, [[1] * each] * texts)] * rows, 0)
    with torch.inference_mode():
        packing.packed_logprobs(judge, packed)


def measure(config: LlamaConfig, plan: PPO) -> dict[str, int]:
    """Peak bytes of each phase of an update that is not the first."""

    def context():
        return torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16")

    roles, judge = build(config, plan)
    optimizer, batch = optimizer_of(roles), batch_of(config, plan)
    found, before = {}, tensor_bytes(roles, judge)
    with Peak() as peak:
        steps(roles, optimizer, batch, plan)
    found["update"] = before + peak.bytes
    before = tensor_bytes(roles, judge, optimizer)
    with Peak() as peak, context():
        roles.eval()
        draw(roles, config, plan)
    found["rollout"] = before + peak.bytes
    with Peak() as peak:
        if judge is not None:
            judge_some(judge, config, plan)
        else:
            with roles.using("reward") as model:
                judge_some(model, config, plan)
    found["scoring"] = before + peak.bytes
    with Peak() as peak, context():
        logprobs_and_values(roles, batch, plan.micro_batch, reference=True)
        if plan.precision == "bfloat16":
            logprobs_and_values(roles, batch, plan.micro_batch, reference=False)
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
        for kind, rank, checkpointing in product(memory.TRAINED, (0, 8), (False, True)):
            for dtype in ("float32", "bfloat16") if rank else ("float32",):
                plan = Training(kind, dtype, rank, checkpointing, rows, checkpointing, completion=completion)
                yield name, config, replace(plan, prompt=len(head()))
    for name, sizes in DRAWN.items():
        for dtype in ("float32", "bfloat16"):
            yield name, TRAINED[name][0], Sampling(dtype, *sizes)


def head() -> list[int]:
    """The question's tokens; the vocabularies here are larger than the tiny base's."""
    return encoding.encode_prompt(models.load_tokenizer(), prompts.open_prompt(QUESTION))


def written(word: str, tokens: int) -> tuple[str, tuple[int, ...]]:
    """A text of so many tokens, with the end that training adds, and its tokens."""
    found = word + " 7" * (tokens - 2)
    ids = encoding.encode_completion(models.load_tokenizer(), found, eos=False)
    assert len(ids) == tokens - 1
    return found, tuple(ids)


def right(length: int) -> Rationale:
    """One of so many tokens to fine-tune on."""
    text, ids = written(" 1", length)
    return Rationale(id="0", dataset=QUESTION.dataset, text=text, token_ids=ids, answer=None, correct=True, side="+")


def train(model, plan: Training) -> None:
    """Two optimizer steps, the second of which finds moments; one text of each is shorter, so that there is a mask."""
    tokenizer, steps = models.load_tokenizer(), 2 * (1 + plan.accumulated) * plan.micro_batch
    lengths = [plan.completion - (number % plan.micro_batch == 1) for number in range(steps)]
    options = {"epochs": 1, "learning_rate": 1e-5, "batch": steps // 2, "micro_batch": plan.micro_batch, "seed": 0}
    options |= {"gradient_checkpointing": plan.gradient_checkpointing, "progress": None}
    if plan.kind == "sft":
        sft.train_sft(model, tokenizer, [QUESTION], [right(length) for length in lengths], **options)
    elif plan.kind == "reward":
        (good, good_ids), (bad, bad_ids) = (written(word, plan.completion) for word in (" 1", " 2"))
        sides = {"chosen": good, "rejected": bad, "chosen_ids": good_ids, "rejected_ids": bad_ids}
        pairs = [Pair(id="0", dataset=QUESTION.dataset, held_out=False, **sides)] * len(lengths)
        reward_model.train_reward_model(model, tokenizer, [QUESTION], pairs, beta=1.0, nll_coef=1.0, **options)
    else:
        ends, texts = (tokenizer.eos_token_id,), {"dataset": QUESTION.dataset, "chosen": "", "rejected": ""}
        common = texts | {"prompt_ids": tuple(head()), "rejected_ids": (8,) * plan.completion}
        pairs = [Pair(id="0", chosen_ids=(7,) * (length - 1) + ends, **common) for length in lengths]
        dpo.train_dpo(model, tokenizer, pairs, beta=0.1, **options)


def measure_stage(config: LlamaConfig, plan: Training | Sampling) -> int:
    """Peak bytes of a whole call."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None  # so that completions reach their limit
    model.to(getattr(torch, plan.dtype))
    if isinstance(plan, Training) and plan.lora:
        model = models.add_lora(model, plan.rank, 16, "all-linear", "")
    before = tensor_bytes(model)
    with Peak() as peak:
        if isinstance(plan, Training):
            train(model, plan)
        else:
            asked = torch.randint(config.vocab_size, (plan.max_batch // plan.samples, plan.prompt)).tolist()
            asked[-1] = asked[-1][: -1 if len(asked) > 1 else None]
            params = SamplingParams(temperature=1.0, max_new_tokens=plan.completion, seed=0)
            sample_ids(model, None, asked, plan.samples, params)
    return before + peak.bytes


def computed_stage(config: LlamaConfig, plan: Training | Sampling) -> dict[str, float]:
    return (memory.training if isinstance(plan, Training) else memory.sampling)(config, plan)


def compare_stages() -> list[dict]:
    rows = []
    for name, config, plan in stage_cases():
        training = isinstance(plan, Training)
        row = {"shape": name, "stage": plan.kind if training else "sampling", "dtype": plan.dtype}
        row |= (
            {"rank": plan.rank, "gradient_checkpointing": plan.gradient_checkpointing}
            if training
            else {"rank": 0, "gradient_checkpointing": ""}
        )
        parts, measured = computed_stage(config, plan), measure_stage(config, plan)
        row |= {"measured MiB": round(measured / 2**20, 2), "computed MiB": round(memory.total(parts) / 2**20, 2)}
        rows.append(row | {"error (%)": round(100 * (memory.total(parts) / measured - 1), 1)})
        print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def compare() -> list[dict]:
    rows = []
    for name, config, plan in cases():
        measured = measure(config, plan)
        computed = {phase: memory.total(parts) for phase, parts in memory.phases(config, plan).items()}
        row = {"shape": name, "layout": "adapters" if plan.lora else "separate"}
        row |= {key: getattr(plan, key) for key in ("value", "precision", "dtype", "gradient_checkpointing")}
        for phase in computed:
            row[f"{phase} MiB"] = round(measured[phase] / 2**20, 2)
            row[f"{phase} computed"] = round(computed[phase] / 2**20, 2)
            row[f"{phase} error (%)"] = round(100 * (computed[phase] / measured[phase] - 1), 1)
        peak, predicted = max(measured.values()), max(computed.values())
        row |= {"peak MiB": round(peak / 2**20, 2), "peak computed": round(predicted / 2**20, 2)}
        rows.append(row | {"peak error (%)": round(100 * (predicted / peak - 1), 1)})
        print("  ".join(str(value) for value in row.values()), flush=True)
    return rows


def stage_table(config: LlamaConfig, runs: Iterable[Settings], *, prompt: int, shown: int) -> list[dict]:
    """A row for every stage of each run: GiB by part and in all, and the cards it fits; lengths as `memory.stages`."""
    rows = []
    for settings in runs:
        for stage, parts in memory.stages(config, settings, prompt=prompt, shown=shown).items():
            peak = memory.total(parts)
            sizes = {part: parts.get(part, 0.0) for part in memory.PARTS} | {"peak": peak}
            row = {"preset": settings.preset, "stage": stage}
            row |= {f"{name} GiB": round(size / 2**30, 2) for name, size in sizes.items()}
            rows.append(row | {f"fits {card}": peak <= size for card, size in memory.CARDS.items()})
    return rows


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
    measured = compare_stages()
    for stage in ("sampling", *memory.TRAINED):
        errors = [row["error (%)"] for row in measured if row["stage"] == stage]
        print(f"{stage:22} from {min(errors):+.1f} to {max(errors):+.1f} over {len(errors)} cases")
    write(measured, RESULTS / "memory_stages.csv")
    runs = [preset(name, "gsm8k") for name in ("llama2-7b", "llama2-7b-40gb", "llama2-7b-24gb")]
    write(stage_table(memory.LLAMA_2_7B, runs, **LENGTHS), RESULTS / "memory_stages_7b.csv")


if __name__ == "__main__":
    main()
