"""One way to ask for samples, and who draws them.

    with make_engine("native", "tiny") as engine:
        engine.sample(prompts, 8, SamplingParams(temperature=0.7, max_new_tokens=128, seed=0), keys=keys)

- `native`: our own sampler (`smlib.sampling.sampler`) on the model in this process;
- `vllm`: vLLM (`smlib.sampling.vllm_engine`), for GPUs and large models;
- either of them on several workers, on one machine or many, by Ray (`smlib.sampling.ray_engine`).

vLLM and Ray are extras: without the library the error says how to install it.
"""

import math
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from smlib.errors import MissingLibrary, UserError
from smlib.sampling import sampler
from smlib.sampling.encoding import encode_prompt
from smlib.sampling.limits import PREFIX_TOKENS
from smlib.sampling.params import Sample, SamplingParams, check_prompts
from smlib.sampling.prefix_tree import PrefixTree
from smlib.sampling.sampler import MAX_BATCH

ENGINES = ("native", "vllm")
INSTALL = {
    "ray": "pip install 'smlib[ray]'",
    "vllm": "in an environment of its own, since it needs an older transformers, pip install vllm==0.32.0, and this "
    "package with --no-deps",
}


class EngineError(UserError, RuntimeError):
    """An engine that does not start."""


CLOSED = "this engine is closed, so it draws no more: make another one"


class Engine(AbstractContextManager):
    """Draws n completions for every prompt; arguments as in `sampler.sample`.

    With equal (seed, key, number) an engine draws the same sample, whatever else it draws. Two engines do not draw
    the same ones: their random numbers differ, and so does the rounding of their logits.

    It holds a model until it is closed, by `close` or at the end of a `with` block; then it draws no more, except that
    Ray's starts its workers again.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    shard = 256  # questions to ask for in one call, where calls are many: what a killed run loses

    def sample(
        self,
        prompts: list[str],
        n: int,
        params: SamplingParams,
        *,
        keys: list[str],
        first: int = 0,
        progress: str | tqdm | None = None,
    ) -> list[list[Sample]]:
        """n samples of every text; `result[i][j]` is number first + j of prompt i. Errors as in `sampler.sample`."""
        check_prompts(prompts)
        prompt_ids = [encode_prompt(self.tokenizer, one) for one in prompts]
        return self.sample_ids(prompt_ids, n, params, keys=keys, first=first, progress=progress)

    def sample_ids(
        self,
        prompt_ids: list[list[int]],
        n: int,
        params: SamplingParams,
        *,
        keys: list[str],
        first: int = 0,
        progress: str | tqdm | None = None,
    ) -> list[list[Sample]]:
        """`sample` for prompts that are token ids already, such as a question and the beginning of a rationale."""
        raise NotImplementedError

    def keep_prefixes(self) -> AbstractContextManager:
        """What the calls of a `with` block have read is there for the later ones of the block, where the engine doesn't
        see to it by itself. Nothing outlives the block, so that it gives the same bits whatever came before it."""
        return nullcontext()

    def close(self) -> None:
        """Give back the memory, so that the next model has room; a second time does nothing."""
        raise NotImplementedError

    def __exit__(self, *error):
        self.close()


class NativeEngine(Engine):
    """`sampler.sample` on one model. Closed, it drops the model, which whoever else holds it keeps alive."""

    name = "native"

    def __init__(
        self, model, tokenizer, max_batch: int = MAX_BATCH, cache_tokens: int = 0, prefix_tokens: int = PREFIX_TOKENS
    ):
        self.model, self.tokenizer, self.max_batch, self.cache_tokens = model, tokenizer, max_batch, cache_tokens
        self.prefix_tokens, self._tree = prefix_tokens, None

    @contextmanager
    def keep_prefixes(self):
        # Half of what may be held is left for what is read next.
        self._tree = PrefixTree(min(self.prefix_tokens, self.cache_tokens // 2 if self.cache_tokens else math.inf))
        try:
            yield
        finally:
            self._tree = None

    def sample_ids(self, prompt_ids, n, params, *, keys, first=0, progress=None) -> list[list[Sample]]:
        if self.model is None:
            raise EngineError(CLOSED)
        return sampler.sample_ids(
            self.model,
            self.tokenizer,
            prompt_ids,
            n,
            params,
            keys=keys,
            first=first,
            max_batch=self.max_batch,
            cache_tokens=self.cache_tokens,
            tree=self._tree,
            progress=progress,
        )

    def close(self) -> None:
        self.model = self._tree = None


def chosen(name: str, dtype: str | None = None) -> str:
    """The engine that a name stands for: "auto" is vLLM where it is installed and holds such weights (nf4 it does not),
    else the native one."""
    if name != "auto":
        return name
    return "vllm" if find_spec("vllm") and dtype != "nf4" else "native"


def check_installed(name: str, workers: int = 1) -> None:
    """Raise MissingLibrary where that engine, in so many processes, needs what is not installed."""
    for library in ["vllm"] * (name == "vllm") + ["ray"] * (workers > 1):
        if find_spec(library) is None:
            raise MissingLibrary(
                f"this engine needs {library}, which is not installed: {INSTALL[library]}; or choose the engine "
                "'native' with one worker"
            )
