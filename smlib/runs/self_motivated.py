"""The stages of Self-motivated Learning, each a function that leaves a folder on disk and returns it.

problems -> 01_sampling -> 02_ranking -> 02_sft -> 03_second_sampling -> 03_reward_model -> 04_ppo -> 05_evaluation

A stage that is already on disk with the same settings is loaded, one with other settings is refused (see
`smlib.files.artifacts`). Notebooks call these functions and explain what they do; nothing else writes to a run folder.
"""

import copy
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from smlib.declared import checked
from smlib.draws import seed_of
from smlib.errors import UsageError
from smlib.files.artifacts import Stage, require
from smlib.judging.answers import Reward
from smlib.learning import ranking, rationales, reward_model, sft
from smlib.learning.rows import Pair, Rationale
from smlib.ppo import loop, rloo_grpo, state
from smlib.ppo.roles import Adapters, Roles, SeparateModels
from smlib.ppo.settings import POLICY_METHODS
from smlib.problems.datasets import Problem
from smlib.reports.evaluation import Answers
from smlib.runs import shared
from smlib.runs.questions import ppo_problems, published_problems, second_problems, test_problems, training_problems
from smlib.runs.settings import Settings
from smlib.runs.shared import SHARDS, engine_key, load_engine, sampling_params, stage_keys, to_disk
from smlib.sampling import devices, models
from smlib.sampling.engines import Engine
from smlib.sampling.factory import make_engine

ROLLOUT_SHARE = 0.35  # of a card, for vLLM beside the models that train
ROUND_SEEDS = 1_000  # between the seeds of two rounds, so that each asks questions of its own


def sample_rationales(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """01_sampling: the base writes open and answer-conditioned rationales and answers again from each.

    Writes problems.jsonl (`Problem`) and rationales.jsonl (`Rationale`).
    """
    stage = Stage(run_dir, "01_sampling", stage_keys(settings, "sampling") | engine_key(settings))
    if stage.done:
        return stage
    with stage.recording(), load_engine(settings, settings.base) as engine:
        problems = training_problems(settings)
        written = rationales.sample_open(
            to_disk(stage, "open", engine), problems, settings.sampling.samples, sampling_params(settings, "sampling"),
            author="base", shots=settings.sampling.shots, progress="open rationales" if progress else None,
        )  # fmt: skip
        asked = [
            problem
            for start in range(0, len(problems), settings.sampling.questions)
            for problem in problems[start : start + settings.sampling.conditioned_questions]
        ]
        written += rationales.sample_conditioned(
            to_disk(stage, "conditioned", engine), asked, settings.sampling.conditioned_samples,
            sampling_params(settings, "sampling"), author="base", shots=settings.sampling.shots,
            progress="answer-conditioned rationales" if progress else None,
        )  # fmt: skip
        written = rationales.reanswer(
            to_disk(stage, "reanswers", engine),
            problems,
            written,
            seed=settings.seed,
            shots=settings.sampling.shots,
            progress="re-answering" if progress else None,
        )
        stage.write_rows("problems", problems)
        stage.write_rows("rationales", written)
        shutil.rmtree(stage.folder / SHARDS)
    return stage


def rank_rationales(run_dir: Path, settings: Settings) -> Stage:
    """02_ranking: keep what is consistent, rank it by correctness, pair it up.

    Writes ranked.jsonl (`Rationale`: those kept, with their side), pairs.jsonl (`Pair`: of the base's rationales) and
    fate.json.
    """
    sampled = require(run_dir, "01_sampling")
    stage = Stage(run_dir, "02_ranking", stage_keys(settings, "ranking"), {sampled: ["rationales.jsonl"]})
    if stage.done:
        return stage
    with stage.recording():
        ranked, fate = ranking.rank(sampled.read_rows("rationales", Rationale), settings.ranking.max_per_side)
        stage.write_rows("ranked", ranked)
        stage.write_rows("pairs", _pairs(ranked, settings))
        stage.write_json("fate.json", fate)
    return stage


def train_sft(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """02_sft: the base, fine-tuned on r+: under the adapters of reward model and PPO. Writes model/ and log.jsonl."""
    sampled, ranked = require(run_dir, "01_sampling"), require(run_dir, "02_ranking")
    read = {sampled: ["problems.jsonl"], ranked: ["ranked.jsonl"]}
    stage = Stage(run_dir, "02_sft", stage_keys(settings, "sft"), read)
    if stage.done:
        return stage

    def train(model, tokenizer):
        kept, options = ranked.read_rows("ranked", Rationale), shared.trainer_kwargs(settings, "sft")
        learned = [one for one in kept if settings.sft.source in ("both", one.source)]
        problems, label = shared.problems_of(sampled), "SFT on r+" if progress else None
        return sft.train_sft(model, tokenizer, problems, learned, **options, progress=label)

    return shared.record_training(stage, settings, settings.base, train)


def sample_again(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """03_second_sampling: the SFT model writes rationales for fresh questions; they are ranked and paired.

    Writes problems.jsonl, ranked.jsonl, pairs.jsonl and fate.json, as 01_sampling and 02_ranking do. A reward
    model that saw the base's errors alone cannot rank those of the SFT model, which are the ones that PPO will meet.
    """
    tuned = require(run_dir, "02_sft")
    keys = stage_keys(settings, "sampling", "ranking") | {"questions": settings.reward.questions}
    if settings.reward.temperature != settings.sampling.temperature:
        keys["temperature"] = settings.reward.temperature
    stage = Stage(run_dir, "03_second_sampling", keys | engine_key(settings), {tuned: ["model"]})
    if stage.done:
        return stage
    with stage.recording(), load_engine(settings, tuned.path("model")) as engine:
        problems = second_problems(settings)
        shared.refuse_repeated(problems, require(run_dir, "01_sampling"))
        written = rationales.sample_open(
            to_disk(stage, "open", engine), problems, settings.sampling.samples, sampling_params(settings, "reward"),
            author="sft", progress="rationales of the SFT model" if progress else None,
        )  # fmt: skip
        written = rationales.reanswer(
            engine, problems, written, seed=settings.seed, progress="re-answering" if progress else None
        )
        ranked, fate = ranking.rank(written, settings.ranking.max_per_side)
        stage.write_rows("problems", problems)
        stage.write_rows("ranked", ranked)
        stage.write_rows("pairs", _pairs(ranked, settings))
        stage.write_json("fate.json", fate)
        shutil.rmtree(stage.folder / SHARDS)
    return stage


def train_reward_model(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """03_reward_model: from the SFT model, on ranked pairs.

    Writes model/, log.jsonl and held_out.jsonl (`Pair`: with their scores).
    """
    sampled, ranked = require(run_dir, "01_sampling"), require(run_dir, "02_ranking")
    tuned, second = require(run_dir, "02_sft"), require(run_dir, "03_second_sampling")
    read = {sampled: ["problems.jsonl"], ranked: ["pairs.jsonl"], tuned: ["model"]}
    read |= {second: ["problems.jsonl", "pairs.jsonl"]}
    stage = Stage(run_dir, "03_reward_model", stage_keys(settings, "reward"), read)
    if stage.done:
        return stage
    with shared.recording_together(stage) as writes:
        tokenizer = shared.load_tokenizer(settings)
        model = shared.load_trainable(settings, tuned.path("model"), stage.name)
        problems = shared.problems_of(sampled) + shared.problems_of(second)
        everything = ranked.read_rows("pairs", Pair) + second.read_rows("pairs", Pair)
        used = [
            pair
            for pair in everything
            if (settings.reward.pairs == "both" or pair.author == "base")
            and (pair.author == "sft" or settings.reward.wrong in ("both", pair.source))
        ]
        options = shared.trainer_kwargs(settings, "reward")
        log = reward_model.train_reward_model(
            model, tokenizer, problems, used, **options, progress="reward model" if progress else None
        )
        model = shared.gather_weights(model, settings, tuned.path("model"))
        held_out = [pair for pair in everything if pair.held_out]
        held_out = reward_model.pair_accuracy(model, tokenizer, problems, held_out)  # by all: none waits long
        if writes:
            stage.write_rows("log", log)
            stage.write_rows("held_out", held_out)
            stage.write_model("model", model, tokenizer)
    return stage


def train_policy(
    run_dir: Path, settings: Settings, method: str = "ppo", progress: bool = True, tracker: str = ""
) -> Stage:
    """04_METHOD: the SFT model, improved against ppo.reward by "ppo", "rloo" or "grpo" (the latter two by TRL).

    tracker: one of accelerate's, such as "tensorboard", that PPO logs to besides its log.csv.
    Writes model/, for PPO with the value in model/value/, and log.csv and examples.jsonl in training/; a killed run
    goes on from its last checkpoint. Under `accelerate launch` or `torchrun` PPO's processes share the work.
    """
    check_policy(settings, method, tracker)
    tuned, rewarder = require(run_dir, "02_sft"), require(run_dir, "03_reward_model")
    keys = stage_keys(settings, "ppo")
    keys["ppo"]["precision"] = devices.chosen_dtype(settings.ppo.precision)  # "auto" says nothing of the result
    if method == "ppo":
        keys |= engine_key(settings, "rollout_engine")
    stage = Stage(run_dir, f"04_{method}", keys, {tuned: ["model"], rewarder: ["model"]})
    if stage.done:
        return stage
    accelerator = devices.accelerator(log_with=tracker or None, project_dir=stage.folder / "training")
    if accelerator.num_processes > 1 and method != "ppo":
        raise UsageError(
            f"method {method!r} trains in one process here: start it without accelerate launch or torchrun"
        )
    with shared.recording_together(stage) as writes:
        tokenizer = shared.load_tokenizer(settings)
        arguments = {
            "problems": ppo_problems(settings), "tokenizer": tokenizer, "settings": settings.ppo,
            "out": stage.folder / "training", "progress": method.upper() if progress else None,
            "max_batch": settings.hardware.max_batch, **shared.trainer_kwargs(settings),
        }  # fmt: skip
        if method == "ppo":
            trained = make_roles(settings, tuned, rewarder)
            reward = make_reward(settings.ppo.reward, tuned, rewarder, tokenizer, trained)
            with rollout_engine(settings, tuned) or nullcontext() as engine:
                loop.train(trained, reward, **arguments, accelerator=accelerator, engine=engine)
            if accelerator.num_processes > 1:  # each may hold a part only
                trained = state.trained_roles(make_roles(settings, tuned, rewarder), stage.folder / "training")
        else:
            trained = shared.load_trainable(settings, tuned.path("model"), stage.name)
            reward = make_reward(settings.ppo.reward, tuned, rewarder, tokenizer)
            rloo_grpo.train(trained, reward, **arguments, method=method)
        if writes:
            stage.write_model("model", trained, tokenizer)
    return stage


def check_policy(settings: Settings, method: str, tracker: str) -> None:
    """Raise UsageError for what `train_policy` would not take, before anything is loaded."""
    checked("method", method, Literal[*POLICY_METHODS])
    trackers = [str(one) for one in (*get_available_trackers(), LoggerType.ALL)]
    if tracker and tracker not in trackers:
        here = ", ".join(map(repr, trackers))
        raise UsageError(f"tracker {tracker!r} is unknown or not installed here; install it, or choose one of: {here}")
    if method != "ppo" and tracker:
        raise UsageError(
            f"tracker {tracker!r} is for method 'ppo': {method!r} only writes log.csv; leave the tracker out"
        )
    if method != "ppo" and settings.hardware.rollout_engine == "vllm":
        raise UsageError(
            f"hardware.rollout_engine = 'vllm' is for method 'ppo': {method!r} samples with the native engine; give "
            "hardware.rollout_engine = 'native' or 'auto'"
        )


def make_roles(settings: Settings, tuned: Stage, rewarder: Stage) -> Roles:
    """PPO's roles as the settings hold them: models of their own, or adapters of the SFT model."""
    policy, head = shared.load_trainable(settings, tuned.path("model"), "04_ppo"), settings.ppo.value != "model"
    if settings.lora.rank:
        value_seed = seed_of(settings.seed, "04_ppo", "value")
        return Adapters(policy, rewarder.path("model"), share_trunk=head, seed=value_seed)
    value = None if head else copy.deepcopy(policy).get_decoder()
    return SeparateModels(policy, shared.load_model(settings, tuned.path("model")), value)


def rollout_engine(settings: Settings, tuned: Stage) -> Engine | None:
    """vLLM for PPO's rollouts, where the settings want it; None: our own sampler."""
    if shared.engine_name(settings, "rollout_engine") == "native":
        return None
    options = {"lora_rank": settings.lora.rank, "share": ROLLOUT_SHARE}
    return make_engine("vllm", str(tuned.path("model")), dtype=shared.held_dtype(settings), **options)


def make_reward(formula: str, tuned: Stage, rewarder: Stage, tokenizer, roles: Roles | None = None) -> Reward:
    """The reward of a formula (settings.ppo.reward); roles: where both models are adapters of theirs.

    "untrained" is the reward model before its training, which is the SFT model: the control of what the rank adds. The
    SFT model also judges "gold".
    """
    rewards = {
        "checker": reward_model.checker_reward,
        "majority": reward_model.majority_reward,
        "words": reward_model.word_count,
    }
    likelihood, gold = reward_model.LearnedReward, reward_model.GoldReward
    judges = {"learned": (likelihood, rewarder, "reward"), "untrained": (likelihood, tuned, None)}
    judges["gold"] = gold, tuned, None
    for name, (kind, stage, adapter) in judges.items():
        if isinstance(roles, Adapters):
            rewards[name] = kind(partial(roles.using, adapter), tokenizer)
        elif name in formula:
            model = models.load_policy(stage.path("model"), stage.settings.get("dtype", "float32"))
            rewards[name] = kind(partial(nullcontext, model), tokenizer)
    return reward_model.weighted_sum(formula, rewards)


def evaluate(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """05_evaluation: base, SFT and SML on fresh generated questions and on the published test sets.

    Writes problems.jsonl, answers.jsonl (`Answers`: one per method, test set and question, with the reward model's
    scores), published.json (the sentence about missing sets). On the published sets only greedy answers.
    """
    tuned, rewarder = require(run_dir, "02_sft"), require(run_dir, "03_reward_model")
    trained = require(run_dir, "04_ppo")
    published, missing = published_problems(settings)
    inputs = {model: ["model"] for model in (tuned, rewarder, trained)}
    stage = Stage(run_dir, "05_evaluation", shared.evaluation_keys(settings, published), inputs)
    if stage.done:
        return stage
    with stage.recording():
        paths = {"base": settings.base, "sft": tuned.path("model"), "sml": trained.path("model")}
        sets = test_problems(settings) | published
        asked = [problem for problems in sets.values() for problem in problems]
        answers = shared.evaluate(settings, paths, sets, progress)
        # Now, when the engines are closed: the judge is as large as they were.
        answered = list(zip(asked * len(paths), answers, strict=True))
        _add_scores(settings, rewarder.path("model"), answered, "scores" if progress else None)
        stage.write_rows("problems", asked)
        stage.write_rows("answers", answers)
        stage.write_json("published.json", missing)
    return stage


def _add_scores(settings: Settings, judge: Path, answered: list[tuple[Problem, Answers]], progress: str | None) -> None:
    """Add the scores of each row's samples, by the reward model in a folder."""
    tokenizer, hardware = shared.load_tokenizer(settings), settings.hardware
    asked = [problem for problem, row in answered for _ in row["sampled_ids"]]
    drawn = [ids for _, row in answered for ids in row["sampled_ids"]]
    if hardware.workers > 1:
        from smlib.learning import ray_scores

        options = {"workers": hardware.workers, "dtype": shared.held_dtype(settings), "progress": progress}
        scores = ray_scores.score(judge, tokenizer, asked, drawn, **options)
    else:
        scores = reward_model.score(shared.load_model(settings, judge), tokenizer, asked, drawn)
    found = iter(scores)
    for _, row in answered:
        row["scores"] = [next(found) for _ in row["sampled_texts"]]


def run(run_dir: Path, settings: Settings, progress: bool = True) -> dict[str, float]:
    """All stages in order, without notebooks; returns the seconds of each."""
    seconds = {}
    for name, stage in STAGES.items():
        started = time.perf_counter()
        stage(run_dir, settings, progress=progress)
        seconds[name] = time.perf_counter() - started
    return seconds


def rounds(run_dir: Path, settings: Settings, number: int) -> list[tuple[Path, Settings]]:
    """(folder, settings) of that many rounds: the first is the run itself, the others are in its folder rounds, and
    each starts from the SML model of the one before. UsageError where no round could start from it."""
    if number > 1 and settings.hardware.dtype == "nf4":
        raise UsageError(
            "a second round starts from the policy, and a base in 4 bits cannot take its adapter in: give "
            "hardware.dtype = 'bfloat16', or one round"
        )
    found = [(run_dir, settings)]
    for later in range(2, number + 1):
        folder, before = found[-1]
        found.append((run_dir / "rounds" / str(later), next_round(before, folder / "04_ppo" / "model")))
    return found


def next_round(settings: Settings, model: Path) -> Settings:
    """The settings of the round after: its base is a model that this round has trained, which needs no exemplars.

    Generated questions are others than before; those of a published train split come in another order.
    """
    sampling = replace(settings.sampling, shots="none")
    return replace(settings, base=str(model), seed=settings.seed + ROUND_SEEDS, sampling=sampling)


def before_policy(run_dir: Path, settings: Settings, progress: bool = True) -> None:
    """Stages 01 to 03: all that `train_policy` needs."""
    for name, stage in STAGES.items():
        if name < "04":
            stage(run_dir, settings, progress=progress)


STAGES = {
    "01_sampling": sample_rationales,
    "02_ranking": lambda run_dir, settings, progress: rank_rationales(run_dir, settings),
    "02_sft": train_sft,
    "03_second_sampling": sample_again,
    "03_reward_model": train_reward_model,
    "04_ppo": train_policy,
    "05_evaluation": evaluate,
}


def _pairs(ranked: list[Rationale], settings: Settings) -> list[Pair]:
    return ranking.pairs(ranked, settings.ranking.max_pairs_per_question, settings.seed)
