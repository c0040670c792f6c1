"""The stages of Self-motivated Learning, each a function that leaves a folder on disk and returns it.

problems -> 01_sampling -> 02_ranking -> 02_sft -> 03_second_sampling -> 03_reward_model -> 04_ppo -> 05_evaluation

A stage that is already on disk with the same settings is loaded, one with other settings is refused (see
`smlib.artifacts`). Notebooks call these functions and explain what they do; nothing else writes to a run folder.
"""

import copy
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from smlib import evaluation, models, ppo, ranking, rationales, reward_model, sft, trl_policy
from smlib.answers import Reward
from smlib.artifacts import Stage, require
from smlib.bulk import Bulk
from smlib.declared import checked
from smlib.draws import seed_of
from smlib.engines import Engine, chosen, make_engine
from smlib.errors import UsageError
from smlib.models import launched
from smlib.problems import (
    PUBLISHED,
    TASKS,
    TRAIN_SETS,
    DatasetError,
    Problem,
    generate,
    load,
    pinned_files,
    question_key,
)
from smlib.roles import Adapters, Roles, SeparateModels
from smlib.settings import Settings

# Generated questions of the train split are drawn from these seeds, far apart, plus the run's own seed; the tiny
# base read seeds from 1,000,003. Test questions are of another split and the same for every run.
_FIRST, _SECOND, _PPO, _TEST, _FRESH = 10_000, 20_000, 30_000, 60_000, 50_000

ROLLOUT_SHARE = 0.35  # of a card, for vLLM beside the models that train
SHARDS = "shards"  # folder of the samples of a stage that is not finished

POLICY_METHODS = ("ppo", "rloo", "grpo")
REWARDS = ("learned", "checker", "words")
METHODS = {"base": "base", "sft": "SFT on r+", "sml": "SML (PPO)"}


def run_folder(run_dir: str, preset: str, task: str, seed: int) -> Path:
    """The run folder of a notebook: RUN_DIR, or where that is empty, runs/PRESET-TASK-seedSEED of the repository."""
    return Path(run_dir) if run_dir else Path(__file__).parents[1] / "runs" / f"{preset}-{task}-seed{seed}"


def training_problems(settings: Settings) -> list[Problem]:
    """The questions that the base writes rationales for (stage 01), task after task; of a published dataset the first
    of its train split, in an order that the seed decides, or all where it has fewer."""
    n, seed = settings.sampling.questions, settings.seed
    return [
        problem
        for task in settings.tasks
        for problem in (_train_split(task, seed)[:n] if task in TRAIN_SETS else generate(task, n, _FIRST + seed))
    ]


def second_problems(settings: Settings) -> list[Problem]:
    """Fresh questions that the SFT model writes rationales for (stage 03).

    Raises ValueError where none of a published train split is left for them.
    """
    n, used, seed = settings.reward.questions, settings.sampling.questions, settings.seed
    if settings.tasks[0] in TRAIN_SETS:
        questions = _train_split(settings.tasks[0], seed)
        if n and not questions[used:]:
            raise UsageError(
                f"{settings.tasks[0]} has {len(questions):,} train questions, and stage 01 takes all of them: lower "
                f"sampling.questions = {used:,}, so that stage 03 has fresh ones"
            )
        return questions[used : used + n]
    return [problem for task in settings.tasks for problem in generate(task, n, _SECOND + seed)]


def ppo_problems(settings: Settings):
    """Update number -> that update's questions: fresh ones every time, the tasks in equal shares.

    Of a published train split the questions after those of stages 01 and 03, round after round in another order; all
    of them where less than one update's are left.
    """
    each = ppo_questions_per_task(settings)
    if settings.tasks[0] in TRAIN_SETS:
        questions = _train_split(settings.tasks[0], settings.seed)
        left = questions[settings.sampling.questions + settings.reward.questions :]
        return _in_rounds(left if len(left) >= each else questions, each, f"ppo/{settings.seed}")
    pools = [generate(task, each * settings.ppo.updates, _PPO + settings.seed) for task in settings.tasks]
    return lambda update: [problem for pool in pools for problem in pool[update * each : (update + 1) * each]]


def ppo_questions_per_task(settings: Settings) -> int:
    """How many questions of each task an update asks; raises ValueError where they do not come out even."""
    each, odd = divmod(settings.ppo.questions, len(settings.tasks))
    if odd:
        raise UsageError(
            f"PPO asks {settings.ppo.questions} questions per update, no multiple of the {len(settings.tasks)} tasks; "
            "change ppo.episodes or ppo.samples_per_question"
        )
    return each


def _in_rounds(pool: list[Problem], each: int, name: str):
    """Update number -> `each` different questions: the pool in a random order, then in another one, and so on."""
    if len(pool) < each:
        raise UsageError(f"PPO asks {each} questions per update, and there are {len(pool)}: lower ppo.episodes")

    def asked(update: int) -> list[Problem]:
        number, place = divmod(update, len(pool) // each)
        order = random.Random(f"{name}/{number}").sample(pool, len(pool))
        return order[place * each : (place + 1) * each]

    return asked


def fresh_problems(settings: Settings, n: int) -> list[Problem]:
    """n questions per task, of the train split and in none of the run's stages: to look at a model on the way.

    Of a published train split as many of the n as are left; raises ValueError where none is.
    """
    asked = ppo_problems(settings)
    seen = {problem.id for update in range(settings.ppo.updates) for problem in asked(update)}
    seen |= {problem.id for problem in training_problems(settings) + second_problems(settings)}
    if settings.tasks[0] in TRAIN_SETS:
        pools = [_train_split(settings.tasks[0], settings.seed)]
        if all(problem.id in seen for problem in pools[0]):
            raise UsageError(
                f"the run's stages use all {len(pools[0]):,} train questions of {settings.tasks[0]}: lower "
                "sampling.questions, reward.questions or ppo.updates"
            )
    else:
        pools = [generate(task, 2 * n, _FRESH + settings.seed) for task in settings.tasks]
    return [problem for pool in pools for problem in [p for p in pool if p.id not in seen][:n]]


def test_problems(settings: Settings) -> dict[str, list[Problem]]:
    """Test set -> its questions, equal for all seeds of training: one set per task, generated or of the test split."""
    n = settings.evaluation.questions
    return {
        task: _shuffled(load(task, "test"), task)[:n] if task in TRAIN_SETS else generate(task, n, _TEST, split="test")
        for task in settings.tasks
    }


def _train_split(dataset: str, seed: int) -> list[Problem]:
    """The train split of a published dataset, each question once and none of its test split (multiarith repeats some),
    in an order that the seed decides. Questions are equal by `problems.question_key`."""
    found: dict[str, Problem] = {}
    for problem in load(dataset, "train"):
        found.setdefault(question_key(problem.question), problem)
    for problem in load(dataset, "test"):
        found.pop(question_key(problem.question), None)
    return _shuffled(list(found.values()), f"{dataset}/{seed}")


def _shuffled(problems: list[Problem], seed: str) -> list[Problem]:
    return random.Random(seed).sample(problems, len(problems))


def published_problems(settings: Settings) -> tuple[dict[str, list[Problem]], str]:
    """The published sets of the run's generated tasks, and a sentence that says which are missing and why."""
    found, missing = {}, ""
    for task in settings.tasks:
        if task in TASKS and task in PUBLISHED and settings.evaluation.published:
            try:
                found[f"{task} (published)"] = load(task, "all", limit=settings.evaluation.published)
            except DatasetError as error:
                missing = f"published test sets left out: {error}"
    return found, missing


def sample_rationales(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """01_sampling: the base writes open and answer-conditioned rationales and answers again from each.

    Writes problems.jsonl and rationales.jsonl.
    """
    stage = Stage(run_dir, "01_sampling", stage_keys(settings, "sampling") | engine_key(settings))
    if stage.done:
        return stage
    with stage.recording(), load_engine(settings, settings.base) as engine:
        problems = training_problems(settings)
        rows = rationales.sample_open(
            to_disk(stage, "open", engine), problems, settings.sampling.samples, author="base",
            shots=settings.sampling.shots, progress="open rationales" if progress else None, **_drawing(settings),
        )  # fmt: skip
        asked = [
            problem
            for start in range(0, len(problems), settings.sampling.questions)
            for problem in problems[start : start + settings.sampling.conditioned_questions]
        ]
        rows += rationales.sample_conditioned(
            to_disk(stage, "conditioned", engine), asked, settings.sampling.conditioned_samples, author="base",
            shots=settings.sampling.shots, progress="answer-conditioned rationales" if progress else None,
            **_drawing(settings),
        )  # fmt: skip
        rows = rationales.reanswer(
            to_disk(stage, "reanswers", engine),
            problems,
            rows,
            seed=settings.seed,
            shots=settings.sampling.shots,
            progress="re-answering" if progress else None,
        )
        stage.write_rows("problems", problems)
        stage.write_rows("rationales", rows)
        shutil.rmtree(stage.folder / SHARDS)
    return stage


def rank_rationales(run_dir: Path, settings: Settings) -> Stage:
    """02_ranking: keep what is consistent, rank it by correctness, pair it up.

    Writes ranked.jsonl (kept rationales with their side), pairs.jsonl (of the base's rationales) and fate.json.
    """
    sampled = require(run_dir, "01_sampling")
    stage = Stage(run_dir, "02_ranking", stage_keys(settings, "ranking"), {sampled: ["rationales.jsonl"]})
    if stage.done:
        return stage
    with stage.recording():
        rows, fate = ranking.rank(sampled.read_rows("rationales"), settings.ranking.max_per_side)
        stage.write_rows("ranked", rows)
        stage.write_rows("pairs", _pairs(rows, settings))
        stage.write_json("fate.json", fate)
    return stage


def train_sft(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """02_sft: the base, fine-tuned on r+. Writes model/ and log.jsonl."""
    ranked = require(run_dir, "02_ranking")
    stage = Stage(run_dir, "02_sft", stage_keys(settings, "sft"), {ranked: ["ranked.jsonl"]})
    if stage.done:
        return stage
    with recording_together(stage) as writes:
        tokenizer, model = load_tokenizer(settings), load_trainable(settings, settings.base, stage.name)
        rows = [row for row in ranked.read_rows("ranked") if settings.sft.source in ("both", row["source"])]
        log = sft.train_sft(
            model, tokenizer, training_problems(settings), rows,
            epochs=settings.sft.epochs, learning_rate=settings.sft.learning_rate, batch=settings.sft.batch,
            **fitting(settings), progress="SFT on r+" if progress else None,
        )  # fmt: skip
        model = whole(model, settings, settings.base)
        if writes:
            stage.write_rows("log", log)
            # the base of the reward model's and of PPO's adapters
            stage.write_model("model", merged(model, settings.base), tokenizer)
    return stage


def sample_again(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """03_second_sampling: the SFT model writes rationales for fresh questions; they are ranked and paired.

    Writes ranked.jsonl and pairs.jsonl. A reward model that saw the base's errors alone cannot rank those of the
    SFT model, which are the ones that PPO will meet.
    """
    tuned = require(run_dir, "02_sft")
    keys = stage_keys(settings, "sampling", "ranking") | {"questions": settings.reward.questions}
    stage = Stage(run_dir, "03_second_sampling", keys | engine_key(settings), {tuned: ["model"]})
    if stage.done:
        return stage
    with stage.recording(), load_engine(settings, tuned.path("model")) as engine:
        problems = second_problems(settings)
        rows = rationales.sample_open(
            to_disk(stage, "open", engine), problems, settings.sampling.samples, author="sft",
            progress="rationales of the SFT model" if progress else None, **_drawing(settings),
        )  # fmt: skip
        rows = rationales.reanswer(
            engine, problems, rows, seed=settings.seed, progress="re-answering" if progress else None
        )
        rows, fate = ranking.rank(rows, settings.ranking.max_per_side)
        stage.write_rows("ranked", rows)
        stage.write_rows("pairs", _pairs(rows, settings))
        stage.write_json("fate.json", fate)
        shutil.rmtree(stage.folder / SHARDS)
    return stage


def train_reward_model(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """03_reward_model: from the SFT model, on ranked pairs. Writes model/, log.jsonl and held_out.jsonl (scored)."""
    ranked, tuned = require(run_dir, "02_ranking"), require(run_dir, "02_sft")
    second = require(run_dir, "03_second_sampling")
    read = {ranked: ["pairs.jsonl"], tuned: ["model"], second: ["pairs.jsonl"]}
    stage = Stage(run_dir, "03_reward_model", stage_keys(settings, "reward"), read)
    if stage.done:
        return stage
    with recording_together(stage) as writes:
        tokenizer, model = load_tokenizer(settings), load_trainable(settings, tuned.path("model"), stage.name)
        problems = training_problems(settings) + second_problems(settings)
        everything = ranked.read_rows("pairs") + second.read_rows("pairs")
        used = [
            pair
            for pair in everything
            if (settings.reward.pairs == "both" or pair["author"] == "base")
            and (pair["author"] == "sft" or settings.reward.wrong in ("both", pair["source"]))
        ]
        log = reward_model.train_reward_model(
            model, tokenizer, problems, used,
            epochs=settings.reward.epochs, learning_rate=settings.reward.learning_rate, batch=settings.reward.batch,
            beta=settings.reward.beta, nll_coef=settings.reward.nll_coef, **fitting(settings),
            progress="reward model" if progress else None,
        )  # fmt: skip
        model = whole(model, settings, tuned.path("model"))
        held_out = [pair for pair in everything if pair["held_out"]]
        held_out = reward_model.pair_accuracy(model, tokenizer, problems, held_out)  # by all: none waits long
        if writes:
            stage.write_rows("log", log)
            stage.write_rows("held_out", held_out)
            stage.write_model("model", model, tokenizer)
    return stage


def train_policy(
    run_dir: Path,
    settings: Settings,
    method: str = "ppo",
    reward: str = "learned",
    progress: bool = True,
    tracker: str = "",
) -> Stage:
    """04_METHOD: the SFT model, improved against a reward by "ppo", "rloo" or "grpo" (the latter two by TRL).

    reward: "learned" (the reward model, in nats), "checker" (1 for the gold answer), or a sum such as
    "learned - 0.1*words". tracker: one of accelerate's, such as "tensorboard", that PPO logs to besides its log.csv.
    Writes model/, for PPO with the value in model/value/, and log.csv and examples.jsonl in training/; a killed run
    goes on from its last checkpoint. Under `accelerate launch` or `torchrun` PPO's processes share the work.
    """
    check_policy(settings, method, reward, tracker)
    tuned, rewarder = require(run_dir, "02_sft"), require(run_dir, "03_reward_model")
    keys = stage_keys(settings, "ppo") | {"reward": reward}
    if method == "ppo":
        keys |= engine_key(settings, "rollout_engine")
    stage = Stage(run_dir, f"04_{method}", keys, {tuned: ["model"], rewarder: ["model"]})
    if stage.done:
        return stage
    accelerator = models.accelerator(log_with=tracker or None, project_dir=stage.folder / "training")
    if accelerator.num_processes > 1 and method != "ppo":
        raise UsageError(
            f"method {method!r} trains in one process here: start it without accelerate launch or torchrun."
        )
    with recording_together(stage) as writes:
        tokenizer = load_tokenizer(settings)
        arguments = {
            "problems": ppo_problems(settings), "tokenizer": tokenizer, "settings": settings.ppo,
            "out": stage.folder / "training", "progress": method.upper() if progress else None,
            "rollout_rows": settings.hardware.rollout_rows, "cuda_graphs": settings.hardware.cuda_graphs,
            **fitting(settings),
        }  # fmt: skip
        if method == "ppo":
            trained = make_roles(settings, tuned, rewarder)
            learned = make_reward(reward, rewarder, tokenizer, trained)
            with rollout_engine(settings, tuned) or nullcontext() as engine:
                ppo.train(trained, learned, **arguments, accelerator=accelerator, engine=engine)
            if accelerator.num_processes > 1:  # each may hold a part only
                trained = ppo.trained_roles(make_roles(settings, tuned, rewarder), stage.folder / "training")
        else:
            trained = load_trainable(settings, tuned.path("model"), stage.name)
            trl_policy.train(method, trained, reward=make_reward(reward, rewarder, tokenizer), **arguments)
        if writes:
            stage.write_model("model", trained, tokenizer)
    return stage


def check_policy(settings: Settings, method: str, reward: str, tracker: str) -> None:
    """Raise ValueError for what `train_policy` would not take, before anything is loaded."""
    checked("method", method, Literal[*POLICY_METHODS])
    reward_model.weighted_sum(reward, dict.fromkeys(REWARDS))
    trackers = [str(one) for one in (*get_available_trackers(), LoggerType.ALL)]
    if tracker and tracker not in trackers:
        here = ", ".join(map(repr, trackers))
        raise UsageError(f"tracker {tracker!r} is unknown or not installed here; install it, or choose one of: {here}")
    if method != "ppo" and tracker:
        raise UsageError(
            f"tracker {tracker!r} is for method 'ppo': {method!r} writes its log.csv alone; leave the tracker out"
        )
    if method != "ppo" and settings.hardware.rollout_engine == "vllm":
        raise UsageError(
            f"hardware.rollout_engine = 'vllm' is for method 'ppo': {method!r} draws by the native engine; give "
            "hardware.rollout_engine = 'native' or 'auto'"
        )


def make_roles(settings: Settings, tuned: Stage, rewarder: Stage) -> Roles:
    """PPO's roles as the settings hold them: models of their own, or adapters of the SFT model."""
    policy, head = load_trainable(settings, tuned.path("model"), "04_ppo"), settings.ppo.value == "head"
    if settings.lora.rank:
        value_seed = seed_of(settings.seed, "04_ppo", "value")
        return Adapters(policy, rewarder.path("model"), share_trunk=head, seed=value_seed)
    value = None if head else copy.deepcopy(policy).get_decoder()
    return SeparateModels(policy, load_model(settings, tuned.path("model")), value)


def rollout_engine(settings: Settings, tuned: Stage) -> Engine | None:
    """vLLM for PPO's rollouts, where the settings want it; None: our own sampler."""
    if engine_name(settings, "rollout_engine") == "native":
        return None
    options = {"lora_rank": settings.lora.rank, "share": ROLLOUT_SHARE}
    return make_engine("vllm", str(tuned.path("model")), weights=settings.hardware.weights, **options)


def make_reward(formula: str, rewarder: Stage, tokenizer, roles: Roles | None = None) -> Reward:
    """The reward of a formula (see `train_policy`); roles: where the reward model is one of their adapters."""
    rewards = {"checker": reward_model.checker_reward, "words": reward_model.word_count}
    if isinstance(roles, Adapters):
        rewards["learned"] = reward_model.LearnedReward(partial(roles.using, "reward"), tokenizer)
    elif "learned" in formula:
        weights = rewarder.settings.get("weights", "float32")
        judge = models.load_policy(rewarder.path("model"), weights)
        rewards["learned"] = reward_model.learned_reward(judge, tokenizer)
    return reward_model.weighted_sum(formula, rewards)


def evaluate(run_dir: Path, settings: Settings, progress: bool = True) -> Stage:
    """05_evaluation: base, SFT and SML on fresh generated questions and on the published test sets.

    Writes answers.jsonl (one row per method, test set and question, with the reward model's scores of the sampled
    answers), published.json (the sentence about missing sets). On the published sets only greedy answers.
    """
    tuned, rewarder = require(run_dir, "02_sft"), require(run_dir, "03_reward_model")
    trained = require(run_dir, "04_ppo")
    published, missing = published_problems(settings)
    files = {name: {"rows": len(found), **pinned_files(found[0].dataset)} for name, found in published.items()}
    keys = stage_keys(settings, "evaluation") | {"published_sets": files} | engine_key(settings)
    stage = Stage(run_dir, "05_evaluation", keys, {model: ["model"] for model in (tuned, rewarder, trained)})
    if stage.done:
        return stage
    with stage.recording():
        paths = {"base": settings.base, "sft": tuned.path("model"), "sml": trained.path("model")}
        sets, answered = test_problems(settings) | published, {}
        for method, path in paths.items():
            with load_engine(settings, path) as engine:
                for name, problems in sets.items():
                    answered[method, name] = evaluation.evaluate(
                        engine, problems, k=settings.evaluation.samples if name in settings.tasks else 0,
                        shots=settings.sampling.shots if method == "base" else "none",
                        temperature=settings.evaluation.temperature, max_new_tokens=settings.sampling.max_new_tokens,
                        seed=settings.seed, progress=f"{METHODS[method]}, {name}" if progress else None,
                    )  # fmt: skip
        # Now, when the engines are closed: the judge is as large as they were.
        sampled = [
            (problem, row)
            for (_, name), rows in answered.items()
            for problem, row in zip(sets[name], rows, strict=True)
        ]
        _add_scores(settings, rewarder.path("model"), sampled, "scores" if progress else None)
        labelled = (
            {"method": method, "test_set": name} | row for (method, name), rows in answered.items() for row in rows
        )
        stage.write_rows("answers", labelled)
        stage.write_json("published.json", missing)
    return stage


def _add_scores(settings: Settings, judge: Path, answered: list[tuple[Problem, dict]], progress: str | None) -> None:
    """Add "scores", the reward of each sample by the model in a folder, to rows of `evaluation.evaluate`."""
    tokenizer, hardware = load_tokenizer(settings), settings.hardware
    asked = [problem for problem, row in answered for _ in row["sampled_ids"]]
    drawn = [ids for _, row in answered for ids in row["sampled_ids"]]
    if hardware.workers > 1:
        from smlib import ray_engine

        ways = {"workers": hardware.workers, "weights": hardware.weights, "progress": progress}
        scores = ray_engine.score(judge, tokenizer, asked, drawn, **ways)
    else:
        scores = reward_model.score(load_model(settings, judge), tokenizer, asked, drawn)
    found = iter(scores)
    for _, row in answered:
        row["scores"] = [next(found) for _ in row["sampled_texts"]]


def run(run_dir: Path, settings: Settings, reward: str = "learned", progress: bool = True) -> dict[str, float]:
    """All stages in order, without notebooks; returns the seconds of each."""
    stages, seconds = STAGES | {"04_ppo": partial(train_policy, reward=reward)}, {}
    for name, stage in stages.items():
        started = time.perf_counter()
        stage(run_dir, settings, progress=progress)
        seconds[name] = time.perf_counter() - started
    return seconds


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
TRAINING = ("02_sft", "03_reward_model", "04_ppo", "06_rft", "06_step_dpo", "06_outcome_dpo")  # processes share these


# ---- what the stages here and in smlib.explore_pipeline share ------------------------------------------------


def leave() -> None:
    """End the group of the processes, after the last that they do together.

    Gloo's threads may still hold tensors of Python's: one that lets go of them while the interpreter ends aborts the
    process (torch's issue 190489). With the group they end, too, if no model that was trained in it is left.
    """
    if launched().num_processes > 1:
        models.free_memory()
        launched().destroy_process_group()


def refuse_processes(names: Iterable[str]) -> None:
    """Raise ValueError in several processes for the first of these stages that they cannot share."""
    processes = launched().num_processes
    alone = [name for name in names if name not in TRAINING]
    if processes > 1 and alone:
        raise UsageError(
            f"{alone[0]} is made by one process, and here are {processes}: start it without accelerate launch or "
            "torchrun, and where it samples, with --set hardware.workers=N for Ray's processes"
        )


@contextmanager
def recording_together(stage: Stage) -> Iterator[bool]:
    """`stage.recording()` in the main process, whose part is the writing (True); none goes on before it is done."""
    processes = launched()
    processes.wait_for_everyone()  # all have seen that the stage is not done
    with stage.recording() if processes.is_main_process else nullcontext():
        yield processes.is_main_process
    processes.wait_for_everyone()


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which asks questions as the settings want them asked."""
    return models.load_tokenizer(settings.base, settings.sampling.prompt)


def load_model(settings: Settings, path: str | Path):
    """The model in a folder, or of the hub, as the settings want it held."""
    models.free_memory()
    return models.load_policy(path, settings.hardware.weights)


def load_engine(settings: Settings, path: str | Path) -> Engine:
    """The engine that the settings ask for, on that model. Close it before the next model is loaded: vLLM takes most of
    a GPU."""
    models.free_memory()
    hardware = settings.hardware
    return make_engine(
        hardware.engine,
        str(path),
        weights=hardware.weights,
        rows=hardware.rollout_rows,
        cache_tokens=hardware.cache_tokens,
        cuda_graphs=hardware.cuda_graphs,
        workers=hardware.workers,
        prompt=settings.sampling.prompt,
    )


def load_trainable(settings: Settings, path: str | Path, stage: str):
    """That model to be trained: whole, or with an adapter on it, which is new and depends on seed and stage alone."""
    model, lora = load_model(settings, path), settings.lora
    if not lora.rank:
        return model
    seed = seed_of(settings.seed, stage, "adapter")
    return models.add_lora(model, lora.rank, lora.alpha, lora.targets, base="../../02_sft/model", seed=seed)


def whole(model, settings: Settings, path: str | Path):
    """A trained model of `load_trainable` with all its weights in each process, whatever sharded them."""
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
    fresh = load_trainable(settings, path, "")  # what is new in it is overwritten
    fresh.load_state_dict(weights, strict=False)
    return fresh


def merged(model, base: str | Path):
    """A trained model without its adapter, which is added to its weights; base: where `load_trainable` took it from."""
    return models.merged(model, base) if isinstance(model, PeftModel) else model


def fitting(settings: Settings) -> dict:
    """The arguments that all of SFT, reward model and DPO take of the settings."""
    hardware = settings.hardware
    return {"seed": settings.seed, "micro_batch": hardware.micro_batch, "recompute": hardware.recompute}


def to_disk(stage: Stage, name: str, engine: Engine) -> Bulk:
    """The engine with its samples in shards inside the unfinished stage, so that a killed stage goes on from them.

    They are deleted at the stage's end, whose rows say the same; the stage itself checks the settings.
    """
    return Bulk(stage.folder / SHARDS / name, engine, {"stage": stage.fingerprint}, engine.shard)


def _pairs(rows: list[dict], settings: Settings) -> list[dict]:
    return ranking.pairs(rows, settings.ranking.max_pairs_per_question, settings.seed)


def stage_keys(settings: Settings, *groups: str) -> dict:
    """What a stage's result depends on, besides its inputs."""
    common = {"preset": settings.preset, "tasks": settings.tasks, "seed": settings.seed, "base": settings.base}
    if digest := models.weights_sha256(settings.base):  # other weights under the same name make another run
        common["base_sha256"] = digest
    if settings.lora.rank:
        common["lora"] = asdict(settings.lora)
    if settings.sampling.prompt != "plain":  # every stage asks so
        common["prompt"] = settings.sampling.prompt
    if settings.hardware.weights != "float32":  # the rest of the group changes no result
        common["weights"] = settings.hardware.weights
    return common | {group: asdict(getattr(settings, group)) for group in groups}


def engine_key(settings: Settings, who: str = "engine") -> dict:
    """What a stage that samples depends on too: who draws, unless it is the native engine. The number of workers
    is no key: the samples are the same."""
    name = engine_name(settings, who)
    return {} if name == "native" else {"engine": name}


def engine_name(settings: Settings, who: str = "engine") -> str:
    """Who draws in the stages that only do that, or with "rollout_engine" in PPO: there "auto" is vLLM for what it can
    take over, adapters in one process."""
    name = getattr(settings.hardware, who)
    if name == "auto" and who == "rollout_engine" and (not settings.lora.rank or launched().num_processes > 1):
        return "native"
    return chosen(name, settings.hardware.weights)


def _drawing(settings: Settings) -> dict:
    sampling = settings.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": settings.seed,
    }
