"""Seconds per PPO update of smlib beside TRL 1.12's PPOTrainer, and by phase; writes results/ppo_speed.csv.

    python benchmarks/ppo.py [--trl .venv-trl/bin/python] [--model FOLDER] [--updates 5] [--quick]

One job for all, on a CPU: 16 questions of the generated tasks with 8 samples each (128 episodes), at most 128 new
tokens at temperature 1, 2 epochs in minibatches of 16. Policy, reference, value and reward are models of one size,
the tiny base's or FOLDER's (such as a run's SFT model); value and reward have a scalar head, and the reward is read at
the last token. TRL's environment is that of benchmarks/peers/trl_ppo.py; it runs with several
local_rollout_forward_batch_size, and the fastest is compared.

Every contestant runs alone in its own process: 2 updates to warm up, then those that are measured, and one more, which
is not counted because it includes the end of training. The table shows medians and the range. The learning rate is so
small that the policy does not change, nor does the length of its completions. All sample from the same model, so their
lengths have one distribution but are not equal: the fair ratio is the time per sampled token, with end tokens and
without padding.

The bound is the arithmetic that an update cannot avoid, without padding, over the speed of one large matrix product
in the same run. It counts multiplications and additions of the linear layers, of causal attention and of the
vocabulary's logits at the sampled tokens; a backward pass is two forward passes. A pass reads a prompt once for its 8
samples; the last line says how much more it would be to read it for each of them, sampling apart.
"""

import argparse
import copy
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

TABLE = Path(__file__).parents[1] / "results" / "ppo_speed.csv"
TRL = Path(__file__).parent / "peers" / "trl_ppo_speed.py"
COLUMNS = (
    "what", "engine", "setting", "epochs", "updates", "tokens", "mean_length", "seconds", "least", "most",
    "rollout_seconds", "score_seconds", "update_seconds", "microseconds_per_token", "gigaflops", "bound_seconds",
    "share_of_bound", "rollout_share", "score_share", "update_share", "gigaflops_per_second",
)  # fmt: skip
PHASES = ("rollout", "score", "update")
QUESTIONS, SAMPLES, MINIBATCH, NEW_TOKENS, EPOCHS = 16, 8, 16, 128, 2
WARM, LEARNING_RATE = 2, 1e-5
ROLLOUT_BATCHES = (16, 64, 128)  # TRL's local_rollout_forward_batch_size
LIKE, SHARED = "like for like", "shared trunk"
OURS = (  # what -> how it differs from the like-for-like job
    (LIKE, {}),
    (SHARED, {"value": "head"}),
    ("bfloat16", {"precision": "bfloat16"}),
    ("shared trunk, bfloat16", {"value": "head", "precision": "bfloat16"}),
    ("one epoch", {"epochs": 1}),
    ("shared trunk, one epoch", {"value": "head", "epochs": 1}),
)
RECOMMENDED = (SHARED, "bfloat16", "shared trunk, bfloat16")


# ---- the job -----------------------------------------------------------------------------------------------


def questions() -> list:
    """The 16 problems, the tasks mixed."""
    from smlib.problems.datasets import TASKS, generate

    pools = [generate(task, -(-QUESTIONS // len(TASKS)), 30_000) for task in TASKS]
    return [problem for group in zip(*pools, strict=True) for problem in group][:QUESTIONS]


def prompt_ids(name: str) -> list[list[int]]:
    """Token ids of the 16 prompts."""
    from smlib.problems import prompts
    from smlib.sampling import encoding, models

    tokenizer = models.load_tokenizer(name)
    return [encoding.encode_prompt(tokenizer, prompts.open_prompt(problem)) for problem in questions()]


def make_reward(name: str, tokenizer, lengths: list):
    """A model with a random scalar head as a callable on texts; to `lengths` goes a list of theirs, in tokens."""
    import torch

    from smlib.problems import prompts
    from smlib.sampling import encoding, models, packing

    trunk = models.load_policy(name).get_decoder()
    head = torch.nn.Linear(trunk.config.hidden_size, 1, bias=False)

    @torch.inference_mode()
    def reward(problems, texts):
        heads = [encoding.encode_prompt(tokenizer, prompts.open_prompt(problem)) for problem in problems]
        tails = [encoding.encode_completion(tokenizer, text) for text in texts]
        lengths.append([len(tail) for tail in tails])
        rows = [prompt + tail for prompt, tail in zip(heads, tails, strict=True)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = {}
        for start in range(0, len(rows), MINIBATCH):
            taken = order[start : start + MINIBATCH]
            ids = packing.pad_right([rows[row] for row in taken], tokenizer.pad_token_id)
            states = trunk(input_ids=ids, use_cache=False).last_hidden_state
            last = states[torch.arange(len(taken)), torch.tensor([len(rows[row]) - 1 for row in taken])]
            scores |= zip(taken, head(last)[:, 0].tolist(), strict=True)
        return [scores[row] for row in range(len(rows))]

    return reward


def train(job: dict) -> dict:
    """Our updates in this process: lists with an entry per update, the last one left out."""
    import torch
    from accelerate import Accelerator

    from smlib.ppo import loop
    from smlib.ppo.roles import SeparateModels
    from smlib.ppo.settings import PPOSettings
    from smlib.sampling import models

    torch.manual_seed(0)
    name, asked, lengths, starts = job["model"], questions(), [], []
    policy, tokenizer = models.load_policy(name), models.load_tokenizer(name)
    value = copy.deepcopy(policy).get_decoder() if job["value"] == "model" else None
    settings = PPOSettings(
        value=job["value"], updates=job["updates"] + 1, episodes=QUESTIONS * SAMPLES, samples_per_question=SAMPLES,
        epochs=job["epochs"], minibatch=MINIBATCH, learning_rate=LEARNING_RATE, value_learning_rate=LEARNING_RATE,
        max_new_tokens=NEW_TOKENS, precision=job["precision"], max_update_kl=1e9,
    )  # fmt: skip

    def problems(update):
        starts.append(time.perf_counter())
        return asked

    with tempfile.TemporaryDirectory() as out:
        rows = loop.train(
            SeparateModels(policy, models.load_policy(name), value), make_reward(name, tokenizer, lengths), problems,
            tokenizer, settings, out, accelerator=Accelerator(cpu=True), checkpoint_every=settings.updates,
        )  # fmt: skip
    steps = QUESTIONS * SAMPLES // MINIBATCH * job["epochs"]
    if any(row["steps"] != steps for row in rows):
        raise RuntimeError(f"an update took {[row['steps'] for row in rows]} optimizer steps, not {steps}")
    return {
        "seconds": [end - start for start, end in pairwise(starts)],
        **{phase: [row[f"{phase}_seconds"] for row in rows[:-1]] for phase in PHASES},
        "tokens": [row["tokens"] for row in rows[:-1]],
        "lengths": lengths[:-1],
        "threads": torch.get_num_threads(),
    }


# ---- the bound ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """What a forward pass costs, by the sizes of the model."""

    linear: int  # weights of the layers' matrices, without embeddings
    attention: int  # layers * heads * width of a head
    hidden: int
    vocabulary: int

    def forward(self, before: int, new: int, read: int, width: int) -> int:
        """Operations to read `new` tokens that see `before` earlier ones and those of themselves up to each, and to
        turn `read` of their states into `width` numbers each."""
        seen = before * new + new * (new + 1) // 2
        return 2 * self.linear * new + 4 * self.attention * seen + 2 * self.hidden * width * read


def shapes(name: str) -> Shapes:
    import torch

    from smlib.sampling import models

    model = models.load_policy(name)
    decoder, config = model.get_decoder(), model.config
    linear = sum(layer.weight.numel() for layer in decoder.modules() if isinstance(layer, torch.nn.Linear))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * width
    return Shapes(linear, attention, config.hidden_size, model.get_output_embeddings().weight.shape[0])


def operations(
    sizes: Shapes, prompts: list[int], drawn: list[list[int]], job: dict, once: bool = True
) -> dict[str, float]:
    """Floating-point operations of an update by phase: prompts [question], drawn [question][sample] in tokens.

    Of a sequence all but the last token is read, for the reward all. The values of a shared trunk are a pass of the
    policy in the scoring, and free in the training. once: a pass reads a prompt once per question, not per sample.
    """

    def passes(width: int, last: int = 0) -> int:
        """One forward pass over all sequences, with `width` numbers at each drawn token, or at the last alone."""
        total = 0
        for prompt, lengths in zip(prompts, drawn, strict=True):
            for number, length in enumerate(lengths):
                read = 1 if last else length
                tail = length - 1 + last
                if once:
                    total += sizes.forward(prompt, tail, read, width)
                    total += sizes.forward(0, prompt, 0, width) if number == 0 else 0
                else:
                    total += sizes.forward(0, prompt + tail, read, width)
        return total

    rollout = sum(
        sizes.forward(0, prompt, 1, sizes.vocabulary)
        + sum(sizes.forward(prompt, length - 1, length - 1, sizes.vocabulary) for length in lengths)
        for prompt, lengths in zip(prompts, drawn, strict=True)
    )
    policy, value, reward = passes(sizes.vocabulary), passes(1), passes(1, last=1)
    trained = policy + (value if job["value"] == "model" else 0)
    return {"rollout": rollout, "score": policy + value + reward, "update": 3 * trained * job["epochs"]}


def product_speed(precision: str, size: int = 2_048) -> float:
    """Operations per second of a large matrix product: the best of 20."""
    import torch

    left, right = (torch.randn(size, size).to(getattr(torch, precision)) for _ in range(2))
    return best_speed(lambda: left @ right, 2 * size**3)


def layer_speed(name: str, rows: int) -> float:
    """Operations per second of the model's own float32 matrix products, `rows` tokens at a time, and nothing else."""
    import torch

    from smlib.sampling import models

    model = models.load_policy(name)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

    def products():
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    return best_speed(products, 2 * rows * sum(weight.numel() for weight in weights))


def best_speed(work, operations: int, times: int = 20) -> float:
    import torch

    best = float("inf")
    with torch.inference_mode():
        for _ in range(times):
            started = time.perf_counter()
            work()
            best = min(best, time.perf_counter() - started)
    return operations / best


def speeds(name: str) -> dict[str, float]:
    """Operations per second: of large products by precision, and of the model's own at a sampling step's size and at
    about a minibatch's."""
    rows = {f"the layers', {rows} tokens": layer_speed(name, rows) for rows in (QUESTIONS * SAMPLES, 2_048)}
    return {kind: product_speed(kind) for kind in ("float32", "bfloat16")} | rows


# ---- contestants, each in its own process ------------------------------------------------------------------


def alone(job: dict) -> dict:
    return answer([sys.executable, __file__, "--job", json.dumps(job)])


def trl(python: str, job: dict, prompts: list[list[int]], batch: int) -> dict:
    from smlib.sampling import models

    asked = {
        "model": models.locate(job["model"])[0], "prompts": prompts, "samples": SAMPLES, "epochs": job["epochs"],
        "minibatch": MINIBATCH, "new_tokens": NEW_TOKENS, "learning_rate": LEARNING_RATE, "updates": job["updates"],
        "rollout_batch": batch,
    }  # fmt: skip
    return answer([python, str(TRL)], json.dumps(asked))


def answer(command: list[str], given: str | None = None) -> dict:
    """The last line of a command's output, which is JSON."""
    done = subprocess.run(command, capture_output=True, text=True, input=given)
    if done.returncode:
        raise SystemExit(f"{command[:2]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(found: dict, job: dict, sizes: Shapes, prompts: list[list[int]], speed: dict[str, float]) -> dict:
    """A row of the table: medians over the updates after the warm-up."""
    counted = {name: rows[WARM:] for name, rows in found.items() if isinstance(rows, list)}
    needed = [operations(sizes, *grouped(prompts, lengths), job) for lengths in counted["lengths"]]
    row = {
        "epochs": job["epochs"],
        "updates": len(counted["seconds"]),
        "tokens": statistics.median(counted["tokens"]),
        "seconds": statistics.median(counted["seconds"]),
        "least": min(counted["seconds"]),
        "most": max(counted["seconds"]),
        "microseconds_per_token": 1e6 * statistics.median(quotients(counted["seconds"], counted["tokens"])),
        "gigaflops": statistics.median(sum(one.values()) for one in needed) / 1e9,
    }
    row["mean_length"] = row["tokens"] / (QUESTIONS * SAMPLES)
    row["bound_seconds"] = row["gigaflops"] * 1e9 / speed[job["precision"]]
    row["share_of_bound"] = row["bound_seconds"] / row["seconds"]
    for phase in PHASES:
        row[f"{phase}_seconds"] = statistics.median(counted[phase])
        bounds = [one[phase] / speed[job["precision"]] for one in needed]
        row[f"{phase}_share"] = statistics.median(quotients(bounds, counted[phase]))
    return row


def grouped(prompts: list[list[int]], lengths: list[int]) -> tuple[list[int], list[list[int]]]:
    """Lengths of the prompts, and of the completions question by question."""
    return [len(prompt) for prompt in prompts], [
        lengths[start : start + SAMPLES] for start in range(0, len(lengths), SAMPLES)
    ]


def quotients(above: list[float], below: list[float]) -> list[float]:
    return [one / other for one, other in zip(above, below, strict=True)]


def compare(name: str, updates: int, python: str | None) -> list[dict]:
    base = {"model": name, "value": "model", "precision": "float32", "epochs": EPOCHS, "updates": WARM + updates}
    prompts, sizes, speed = prompt_ids(name), shapes(name), alone({"speeds": name})
    rows, threads = [], set()
    for what, changes in OURS:
        job = base | changes
        found = alone(job)
        threads.add(found["threads"])
        setting = f"value {job['value']}, {job['precision']}"
        rows.append({"what": what, "engine": "smlib", "setting": setting} | summary(found, job, sizes, prompts, speed))
        if what == LIKE:
            again = reading_again(found["lengths"][WARM:], prompts, sizes, job)
            for batch in ROLLOUT_BATCHES if python else ():
                peer = trl(python, job, prompts, batch)
                threads.add(peer["threads"])
                row = {"what": "peer", "engine": peer["engine"], "setting": f"{setting}, rollout batch {batch}"}
                rows.append(row | summary(peer, job, sizes, prompts, speed))
    if len(threads) > 1:
        raise SystemExit(f"the contestants ran on {sorted(threads)} threads; give both the same OMP_NUM_THREADS.")
    rows += [
        {"what": "speed", "engine": "matrix products", "setting": kind, "gigaflops_per_second": per_second / 1e9}
        for kind, per_second in speed.items()
    ]
    rows.append({"what": "bound", "engine": "a prompt read per sample", "share_of_bound": again})
    print(f"{QUESTIONS} questions x {SAMPLES} samples, {updates} updates counted, {threads.pop()} threads")
    return rows


def reading_again(lengths: list[list[int]], prompts: list[list[int]], sizes: Shapes, job: dict) -> float:
    """Operations with every prompt read once per sample, in units of those with it read once per question."""
    shares = []
    for drawn in lengths:
        once, each = (sum(operations(sizes, *grouped(prompts, drawn), job, flag).values()) for flag in (True, False))
        shares.append(each / once)
    return statistics.median(shares)


# ---- the table ---------------------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    print(
        f"{'':67} {'s/update':>8} {'range':>11}  {'rollout':>7} {'score':>7} {'update':>7}  {'tokens':>6}"
        f" {'us/token':>8}  {'bound s':>7} {'share':>5}  (by phase)"
    )
    for row in (row for row in rows if "seconds" in row):
        phases = " ".join(f"{row[f'{phase}_seconds']:7.3f}" for phase in PHASES)
        shares = " ".join(f"{row[f'{phase}_share']:4.0%}" for phase in PHASES)
        label = f"{row['engine']:10} {row['what']:24} {row['setting']}"
        print(
            f"{label:67} {row['seconds']:8.3f} {row['least']:5.2f}-{row['most']:5.2f}  {phases}  {row['tokens']:6,.0f}"
            f" {row['microseconds_per_token']:8.1f}  {row['bound_seconds']:7.3f} {row['share_of_bound']:5.0%}  {shares}"
        )
    for row in rows:
        if "gigaflops_per_second" in row:
            print(f"{row['engine']}, {row['setting']:28} {row['gigaflops_per_second']:7,.0f} Gflop/s")
    print(f"to read a prompt for every sample is {rows[-1]['share_of_bound']:.2f} times the arithmetic of the bound")


def ratios(rows: list[dict]) -> None:
    """TRL's time over ours: per update, and per token drawn."""
    peers = [row for row in rows if row["what"] == "peer"]
    if not peers:
        print(
            f"without TRL: make its environment as {TRL.parent.name}/trl_ppo.py says, then --trl .venv-trl/bin/python"
        )
        return
    best = min(peers, key=lambda row: row["microseconds_per_token"])
    print(f"times faster than {best['engine']}, {best['setting']}:")
    for row in rows:
        if row["what"] in (LIKE, *RECOMMENDED):
            update, token = (best[name] / row[name] for name in ("seconds", "microseconds_per_token"))
            wanted = 2 if row["what"] == LIKE else 3
            print(f"  {row['what']:24} {update:5.2f} per update, {token:5.2f} per token (aim: {wanted})")


def write(rows: list[dict]) -> None:
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", metavar="PYTHON", help="Python interpreter that has trl 1.12")
    parser.add_argument("--model", metavar="FOLDER", default="tiny", help="model for all roles (default: tiny)")
    parser.add_argument("--updates", type=int, default=5, help="updates to measure (default: 5)")
    parser.add_argument("--quick", action="store_true", help="measure one update; writes no table")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print("\n" + json.dumps(speeds(job["speeds"]) if "speeds" in job else train(job)))
        return
    rows = compare(args.model, 1 if args.quick else args.updates, args.trl)
    show(rows)
    ratios(rows)
    if not args.quick and args.model == "tiny":
        write(rows)


if __name__ == "__main__":
    main()
