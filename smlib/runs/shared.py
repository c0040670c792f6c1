"""What the stages of both systems share: their keys, how they load models, and how several processes record one."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal

from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from smlib.draws import seed_of
from smlib.errors import UsageError
from smlib.files import folders
from smlib.files.artifacts import Stage, StageError
from smlib.problems.datasets import Problem, pinned_files
from smlib.reports import evaluation, results
from smlib.reports.evaluation import Answers
from smlib.runs.questions import fresh_problems
from smlib.runs.settings import Settings
from smlib.sampling import devices, models
from smlib.sampling.devices import process_state
from smlib.sampling.engines import Engine, chosen
from smlib.sampling.factory import make_engine
from smlib.sampling.params import SamplingParams
from smlib.sampling.shards import Bulk

SHARDS = "shards"  # folder of the samples of a stage that is not finished
TRAINING = ("02_sft", "03_reward_model", "04_ppo", "06_rft", "06_step_dpo", "06_outcome_dpo")  # processes share these


def run_folder(run_dir: str, preset: str, task: str, seed: int) -> Path:
    """The run folder of a notebook: RUN_DIR, or where that is empty, runs/PRESET-TASK-seedSEED of `folders.home`."""
    return Path(run_dir) if run_dir else folders.home() / "runs" / f"{preset}-{task}-seed{seed}"


def end_process_group() -> None:
    """End the group of the processes, after the last that they do together.

    Gloo's threads may still hold tensors of Python's: one that lets go of them while the interpreter ends aborts the
    process (torch's issue 190489). With the group they end, too, if no model that was trained in it is left.
    """
    if process_state().num_processes > 1:
        devices.free_memory()
        process_state().destroy_process_group()


def refuse_processes(names: Iterable[str]) -> None:
    """Raise ValueError in several processes for the first of these stages that they cannot share."""
    processes = process_state().num_processes
    alone = [name for name in names if name not in TRAINING]
    if processes > 1 and alone:
        raise UsageError(
            f"{alone[0]} is made by one process, but {processes} were started: start it without accelerate launch or "
            "torchrun; to sample with N Ray processes, add --set hardware.workers=N"
        )


@contextmanager
def recording_together(stage: Stage) -> Iterator[bool]:
    """`stage.recording()` in the main process, whose part is the writing (True); none goes on before it is done."""
    processes = process_state()
    processes.wait_for_everyone()  # all have seen that the stage is not done
    with stage.recording() if processes.is_main_process else nullcontext():
        yield processes.is_main_process
    processes.wait_for_everyone()


def problems_of(stage: Stage) -> list[Problem]:
    """The questions of a stage that has written them, in their order."""
    return stage.read_rows("problems", Problem)


def refuse_repeated(problems: list[Problem], before: Stage) -> None:
    """Raise StageError where a question is asked that an earlier stage has asked: that was made by other rules."""
    asked = {problem.id for problem in problems_of(before)}
    if again := next((problem.id for problem in problems if problem.id in asked), None):
        raise StageError(
            f"{before.folder} has asked {again}, which should be a fresh question: it was made by a version that chose "
            "other questions. Start a run in another folder, or delete this one's stages."
        )


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The base's tokenizer, which asks questions as the settings want them asked."""
    return models.load_tokenizer(settings.base, settings.sampling.prompt)


def held_dtype(settings: Settings, samples: bool = False) -> str:
    """The precision of a model that only samples, or of all others: of those that train whole it is float32."""
    return devices.chosen_dtype(settings.hardware.dtype if samples or settings.lora.rank else "float32")


def load_model(settings: Settings, path: str | Path):
    """The model in a folder, or of the hub, as the settings want it held for training."""
    devices.free_memory()
    return models.load_policy(path, held_dtype(settings))


def load_engine(settings: Settings, path: str | Path) -> Engine:
    """The engine that the settings ask for, on that model. Close it before the next model is loaded: vLLM takes most of
    a GPU."""
    devices.free_memory()
    hardware = settings.hardware
    return make_engine(
        hardware.engine,
        str(path),
        dtype=held_dtype(settings, samples=True),
        max_batch=hardware.max_batch,
        cache_tokens=hardware.cache_tokens,
        prefix_tokens=hardware.prefix_tokens,
        workers=hardware.workers,
        prompt=settings.sampling.prompt,
    )


def sampling_params(
    settings: Settings, group: Literal["sampling", "reward", "evaluation", "explore"]
) -> SamplingParams:
    """How the stages of a group of settings draw: at its temperature; the length and the seed are the run's."""
    return SamplingParams(
        temperature=getattr(settings, group).temperature,
        max_new_tokens=settings.sampling.max_new_tokens,
        seed=settings.seed,
        top_p=settings.sampling.top_p if group in ("sampling", "reward") else 1.0,
    )


def load_trainable(settings: Settings, path: str | Path, stage: str):
    """That model to be trained: whole, or with an adapter on it, which is new and depends on seed and stage alone."""
    model, lora = load_model(settings, path), settings.lora
    if not lora.rank:
        return model
    seed = seed_of(settings.seed, stage, "adapter")
    return models.add_lora(model, lora.rank, lora.alpha, lora.targets, base="../../02_sft/model", seed=seed)


def gather_weights(model, settings: Settings, path: str | Path):
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


def record_training(stage: Stage, settings: Settings, path: str | Path, train: Callable) -> Stage:
    """Make a stage, in all processes together, that trains the model in `path`: model/, without an adapter, log.jsonl.

    train: model, tokenizer -> the log.
    """
    with recording_together(stage) as writes:
        tokenizer, model = load_tokenizer(settings), load_trainable(settings, path, stage.name)
        log = train(model, tokenizer)
        model = gather_weights(model, settings, path)
        if writes:
            stage.write_rows("log", log)
            stage.write_model("model", merged(model, path), tokenizer)
    return stage


def trainer_kwargs(settings: Settings, group: str = "") -> dict:
    """The arguments that SFT, reward model and DPO all take of the settings; of a group of them, its own too."""
    hardware, ours = settings.hardware, asdict(getattr(settings, group)) if group else {}
    return {
        "seed": settings.seed,
        "micro_batch": hardware.micro_batch,
        "gradient_checkpointing": hardware.gradient_checkpointing,
        **{name: ours[name] for name in ("epochs", "learning_rate", "batch", "beta", "nll_coef") if name in ours},
    }


def to_disk(stage: Stage, name: str, engine: Engine) -> Bulk:
    """The engine with its samples in shards inside the unfinished stage, so that a killed stage goes on from them.

    They are deleted at the stage's end, whose rows say the same; the stage itself checks the settings.
    """
    return Bulk(stage.folder / SHARDS / name, engine, {"stage": stage.fingerprint}, engine.shard)


def stage_keys(settings: Settings, *groups: str) -> dict:
    """What a stage's result depends on, besides its inputs."""
    common = {"preset": settings.preset, "tasks": settings.tasks, "seed": settings.seed, "base": settings.base}
    if digest := models.weights_sha256(settings.base):  # other weights under the same name make another run
        common["base_sha256"] = digest
    if settings.lora.rank:
        common["lora"] = asdict(settings.lora)
    if settings.sampling.prompt != "plain":  # every stage asks so
        common["prompt"] = settings.sampling.prompt
    if (dtype := held_dtype(settings)) != "float32":  # the rest of the group changes no result
        common["dtype"] = dtype
    return common | {group: getattr(settings, group).keys() for group in groups}


def engine_key(settings: Settings, who: str = "engine") -> dict:
    """What a stage that samples depends on too: who draws, unless it is the native engine, and in which precision,
    where that of training is another. The number of workers is no key: the samples are the same."""
    name = engine_name(settings, who)
    keys = {} if name == "native" else {"engine": name}
    if who == "engine" and (dtype := held_dtype(settings, samples=True)) != held_dtype(settings):
        keys["sampling_dtype"] = dtype
    return keys


def engine_name(settings: Settings, who: str = "engine") -> str:
    """Who draws in the stages that only do that, or with "rollout_engine" in PPO: there "auto" is vLLM for what it can
    take over, adapters in one process."""
    name = getattr(settings.hardware, who)
    if name == "auto" and who == "rollout_engine" and (not settings.lora.rank or process_state().num_processes > 1):
        return "native"
    return chosen(name, settings.hardware.dtype)


def evaluation_keys(settings: Settings, published: dict[str, list[Problem]]) -> dict:
    """What an evaluation depends on, besides its models."""
    files = {name: {"rows": len(found), **pinned_files(found[0].dataset)} for name, found in published.items()}
    return stage_keys(settings, "evaluation") | {"published_sets": files} | engine_key(settings)


def evaluate(
    settings: Settings, paths: dict[str, str | Path], sets: dict[str, list[Problem]], progress: bool
) -> list[Answers]:
    """The answers of every method's model to every test set, in this order; on published sets only greedy ones.

    Sets are asked together: a batch that is full is faster than one that waits for its last row, set after set.
    """
    rows, labels = [], results.METHODS | results.EXPLORE_METHODS
    groups = defaultdict(list)  # samples of a question -> test sets
    for name in sets:
        groups[0 if results.is_published(name) else settings.evaluation.samples].append(name)
    for method, path in paths.items():
        found = {}
        with load_engine(settings, path) as engine:
            for samples, names in groups.items():
                label = f"{labels[method]}, {', '.join(names[:2]) + ', ...' * (len(names) > 2)}"
                answered = iter(evaluation.evaluate(
                    engine, [problem for name in names for problem in sets[name]], samples,
                    sampling_params(settings, "evaluation"),
                    shots=settings.sampling.shots if method == "base" else "none",
                    progress=label if progress else None,
                ))  # fmt: skip
                found |= {name: list(islice(answered, len(sets[name]))) for name in names}
        rows += [{"method": method, "test_set": name} | row for name in sets for row in found[name]]
    return rows


def answer_fresh(
    settings: Settings, path: str | Path, n: int, k: int = 8, shots: str = "none", progress: str | None = None
) -> list[Answers]:
    """Greedy and k sampled answers (`evaluation.evaluate`) of the model in a folder to n fresh questions per task,
    which no stage uses: with equal settings to the same ones."""
    with load_engine(settings, path) as engine:
        return evaluation.evaluate(
            engine, fresh_problems(settings, n), k, sampling_params(settings, "evaluation"), shots=shots,
            progress=progress,
        )  # fmt: skip
