"""Which questions a run asks in which stage: none twice, and none of the test split before the evaluation."""

import random
from functools import lru_cache
from itertools import chain

from smlib.errors import UsageError
from smlib.problems.datasets import GROUPS, PUBLISHED, TASKS, TRAIN_SETS, Problem, generate, load, question_key
from smlib.problems.downloads import DatasetError
from smlib.problems.duplicates import shared_questions
from smlib.runs.settings import Settings

# Generated questions of the train split are drawn from these seeds, far apart, plus the run's own seed; the tiny
# base read seeds from 1,000,003. Test questions are of another split and the same for every run.
_FIRST, _SECOND, _PPO, _TEST, _FRESH = 10_000, 20_000, 30_000, 60_000, 50_000

_Datasets = tuple[tuple[str, tuple[Problem, ...]], ...]  # names and questions


def training_problems(settings: Settings) -> list[Problem]:
    """The questions that the base writes rationales for (stage 01), task after task; of a published dataset the first
    of its train split, in an order that the seed decides, or all where it has fewer."""
    n, seed = settings.sampling.questions, _FIRST + settings.seed
    return [
        problem
        for task in settings.tasks
        for problem in (_train_split(task, settings)[:n] if task in TRAIN_SETS else generate(task, n, seed))
    ]


def second_problems(settings: Settings) -> list[Problem]:
    """Fresh questions that the SFT model writes rationales for (stage 03).

    Raises ValueError where none of a published train split is left for them.
    """
    n, used, seed = settings.reward.questions, settings.sampling.questions, _SECOND + settings.seed
    if settings.tasks[0] in TRAIN_SETS:
        questions = _train_split(settings.tasks[0], settings)
        if n and not questions[used:]:
            raise UsageError(
                f"{settings.tasks[0]} has {len(questions):,} train questions, and stage 01 takes all of them: lower "
                f"sampling.questions = {used:,}, so that stage 03 has fresh ones"
            )
        return questions[used : used + n]
    seen = {problem.id for problem in training_problems(settings)}
    return [problem for task in settings.tasks for problem in _unseen(task, n, seed, seen)]


def _unseen(task: str, n: int, seed: int, seen: set[str]) -> list[Problem]:
    """The first n generated questions without those seen: a task of few names writes some question under two seeds."""
    count, new = n, []
    while len(new) < n:
        new = [problem for problem in generate(task, count, seed) if problem.id not in seen][:n]
        count += n - len(new)
    return new


def ppo_problems(settings: Settings):
    """Update number -> that update's questions: fresh ones every time, the tasks in equal shares.

    Of a published train split the questions after those of stages 01 and 03, round after round in another order; all
    of them where less than one update's are left.
    """
    each = ppo_questions_per_task(settings)
    if settings.tasks[0] in TRAIN_SETS:
        questions = _train_split(settings.tasks[0], settings)
        left = questions[settings.sampling.questions + settings.reward.questions :]
        return _in_rounds(left if len(left) >= each else questions, each, f"ppo/{settings.seed}")
    seen = {problem.id for problem in training_problems(settings) + second_problems(settings)}
    count, seed = each * settings.ppo.updates, _PPO + settings.seed
    pools = [_unseen(task, count, seed, seen) for task in settings.tasks]
    return lambda update: [problem for pool in pools for problem in pool[update * each : (update + 1) * each]]


def ppo_questions_per_task(settings: Settings) -> int:
    """How many questions of each task an update asks; raises ValueError where they do not come out even."""
    each, odd = divmod(settings.ppo.questions, len(settings.tasks))
    if odd:
        raise UsageError(
            f"PPO asks {settings.ppo.questions} questions per update, not a multiple of the {len(settings.tasks)} "
            "tasks: change ppo.episodes or ppo.samples_per_question"
        )
    return each


def _in_rounds(pool: list[Problem], each: int, name: str):
    """Update number -> `each` different questions: the pool in a random order, then in another one, and so on."""
    if len(pool) < each:
        raise UsageError(f"PPO asks {each} questions per update, but there are only {len(pool)}: lower ppo.episodes")

    def asked(update: int) -> list[Problem]:
        number, place = divmod(update, len(pool) // each)
        order = random.Random(f"{name}/{number}").sample(pool, len(pool))
        return order[place * each : (place + 1) * each]

    return asked


def fresh_problems(settings: Settings, n: int) -> list[Problem]:
    """n questions per dataset, of the train split and in none of the run's stages: to look at a model on the way.

    Of a published train split as many of the n as are left; raises ValueError where none is.
    """
    asked = ppo_problems(settings)
    seen = {problem.id for update in range(settings.ppo.updates) for problem in asked(update)}
    seen |= {problem.id for problem in training_problems(settings) + second_problems(settings)}
    if settings.tasks[0] in TRAIN_SETS:
        everything = _train_split(settings.tasks[0], settings)
        left = [one for one in everything if one.id not in seen]
        if not left:
            raise UsageError(
                f"the run's stages use all {len(everything):,} train questions of {settings.tasks[0]}: lower "
                "sampling.questions, reward.questions or ppo.updates"
            )
        pools = [[one for one in left if one.dataset == dataset] for dataset in settings.datasets]
    else:
        pools = [_unseen(task, n, _FRESH + settings.seed, seen) for task in settings.tasks]
    return [problem for pool in pools for problem in pool[:n]]


def followed(settings: Settings) -> dict[str, Problem]:
    """Dataset -> the question of it that all notebooks follow: of eight fresh ones the longest, which takes most steps.

    A dataset of a group without fresh questions has none.
    """
    longest: dict[str, Problem] = {}
    for problem in fresh_problems(settings, 8):
        best = longest.setdefault(problem.dataset, problem)
        if len(problem.question) > len(best.question):
            longest[problem.dataset] = problem
    return longest


def test_problems(settings: Settings) -> dict[str, list[Problem]]:
    """Test set -> its questions, equal for all seeds of training: one set per task, generated or of the test split; of
    a group of datasets one set per dataset, and what two of them share is asked in the first."""
    n = settings.evaluation.questions
    sets: dict[str, list[Problem]] = {}
    for task in settings.tasks:
        if task not in TRAIN_SETS:
            sets[task] = generate(task, n, _TEST, split="test")
            continue
        for dataset, questions in _each_once(_loaded(task, "test")).items():
            sets[dataset] = _shuffled(questions, dataset)[:n]
    return sets


def _train_split(task: str, settings: Settings) -> list[Problem]:
    """The train split of a published dataset, or of a group of them, in an order that the seed decides."""
    return _shuffled(train_questions(task)[0], f"{task}/{settings.seed}")


def train_questions(task: str) -> tuple[list[Problem], dict[str, int]]:
    """The questions of the train split of a published dataset, or of a group of them; and how many were left out.

    Left out is what the test split of any of them asks too (`duplicates.shared_questions`), and what was asked before.
    """
    everything, tests = _loaded(task, "train"), _loaded(task, "test")
    once, tested = _once_and_tested(tuple(everything.items()), tuple(tests.items()))
    left = [problem for problem in once if problem.id not in tested]
    repeated = sum(map(len, everything.values())) - len(once)
    return left, {"asked in a test split": len(tested), "asked before": repeated}


@lru_cache(maxsize=2)  # every stage asks, and to compare GSM8K's questions takes a quarter of a second
def _once_and_tested(train: _Datasets, test: _Datasets) -> tuple[list[Problem], frozenset[str]]:
    """The questions of the train splits, each once, and the ids of those that a test split asks."""
    once = list(chain(*_each_once(dict(train)).values()))
    return once, frozenset(shared_questions(once, chain(*dict(test).values())))


def _loaded(task: str, split: str) -> dict[str, tuple[Problem, ...]]:
    """dataset -> its questions, of a published dataset or of a group of them."""
    return {dataset: tuple(load(dataset, split)) for dataset in GROUPS.get(task, (task,))}


def _each_once(datasets: dict[str, tuple[Problem, ...]]) -> dict[str, list[Problem]]:
    """The same, with each question once, in the first dataset that asks it."""
    found: dict[str, list[Problem]] = {}
    for dataset, problems in datasets.items():
        questions: dict[str, Problem] = {}
        for problem in problems:
            questions.setdefault(question_key(problem.question), problem)
        known = shared_questions(questions.values(), chain(*found.values()))
        found[dataset] = [problem for problem in questions.values() if problem.id not in known]
    return found


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
