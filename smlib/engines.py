"""One way to ask for samples, and who draws them.

    engine = make_engine("native", "tiny")
    engine.sample(prompts, n=8, keys=keys, temperature=0.7, max_new_tokens=128, seed=0)

- `native`: our own sampler (`smlib.sampling`) on the model in this process;
- `vllm`: vLLM (`smlib.vllm_engine`), for GPUs and large models;
- either of them on several workers, on one machine or many, by Ray (`smlib.ray_engine`).

vLLM and Ray are extras: without the library the error says how to install it.
"""

from importlib.util import find_spec
from typing import Protocol

from smlib import models, sampling
from smlib.sampling import Sample, Until

ENGINES = ("native", "vllm")
INSTALL = {
    "ray": "pip install 'smlib[ray]'",
    "vllm": "in an environment of its own, since it wants an older transformers, pip install vllm==0.32.0, and this "
    "package with --no-deps",
}


class Engine(Protocol):
    """Draws n completions for every prompt, numbers first, first + 1, ...; arguments as in `sampling.sample`.

    With equal (seed, key, number) an engine draws the same sample, whatever else it draws. Two engines do not draw
    the same ones: their random numbers differ, and so does the rounding of their logits.
    """

    name: str

    def sample(
        self,
        prompts: list[str],
        n: int,
        *,
        keys: list[str],
        temperature: float,
        max_new_tokens: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: tuple[str, ...] = (),
        first: int = 0,
        until: Until | None = None,
        progress: str | None = None,
    ) -> list[list[Sample]]: ...


class NativeEngine:
    """`sampling.sample` on one model."""

    name = "native"

    def __init__(self, model, tokenizer, max_batch: int = sampling.MAX_BATCH):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch

    def sample(self, prompts, n, **drawing) -> list[list[Sample]]:
        return sampling.sample(self.model, self.tokenizer, prompts, n, max_batch=self.max_batch, **drawing)


def make_engine(name: str, base: str, *, workers: int = 1) -> Engine:
    """The engine called `name`, "native" or "vllm", on a model: "tiny", a folder or a hub id.

    workers: more than one are processes of Ray's, each with such an engine.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is unknown; choose one of: {', '.join(ENGINES)}.")
    if workers < 1:
        raise ValueError(f"workers is {workers}, but must be at least 1.")
    if workers > 1:
        _require("ray")
        from smlib.ray_engine import RayEngine

        return RayEngine(base, workers=workers, inner=name)
    if name == "vllm":
        _require("vllm")
        from smlib.vllm_engine import VLLMEngine

        return VLLMEngine(base)
    return NativeEngine(models.load_policy(base), models.load_tokenizer(base))


def _require(library: str) -> None:
    if find_spec(library) is None:
        raise ModuleNotFoundError(
            f"this engine needs {library}, which is not installed: {INSTALL[library]}; or choose the engine 'native' "
            "with one worker."
        )
