"""Teaching a language model to reason from its own rationales.

The names below are there on demand, so that `import smlib` takes no time; everything else is in the rooms:

    files < problems < judging, sampling < learning < ppo < reports < runs < scale < notebooks < cli
"""

from importlib import import_module
from importlib.metadata import version

from smlib.files.folders import settle_libraries

settle_libraries()

_PLACES = {
    "preset": "runs.settings",
    "load": "problems.datasets",
    "generate": "problems.datasets",
    "grade": "judging.answers",
    "sample": "sampling.sampler",
    "SamplingParams": "sampling.params",
    "Rationale": "learning.rows",
    "Pair": "learning.rows",
    "train_sft": "learning.sft",
    "train_reward_model": "learning.reward_model",
    "evaluate": "reports.evaluation",
}
__all__ = [*_PLACES, "ppo", "__version__"]


def __getattr__(name: str):
    if name == "ppo":  # a room of its own, with `ppo.train`
        return import_module(f"{__name__}.ppo")
    if name == "__version__":
        return version("smlib")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
