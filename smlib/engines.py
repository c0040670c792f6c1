"""One way to ask for samples, and who draws them.

    with make_engine("native", "tiny") as engine:
        engine.sample(prompts, n=8, keys=keys, temperature=0.7, max_new_tokens=128, seed=0)

- `native`: our own sampler (`smlib.sampling`) on the model in this process;
- `vllm`: vLLM (`smlib.vllm_engine`), for GPUs and large models;
- either of them on several workers, on one machine or many, by Ray (`smlib.ray_engine`).

vLLM and Ray are extras: without the library the error says how to install it.
"""

from importlib.util import find_spec

from transformers import PreTrainedTokenizerBase

from smlib import models, sampling
from smlib.declared import Held, Processes, Rows, checked
from smlib.encoding import encode_prompt
from smlib.errors import MissingLibrary, UsageError, UserError
from smlib.sampling import MAX_BATCH, Sample, Until, check_prompts

ENGINES = ("native", "vllm")
INSTALL = {
    "ray": "pip install 'smlib[ray]'",
    "vllm": "in an environment of its own, since it wants an older transformers, pip install vllm==0.32.0, and this "
    "package with --no-deps",
}


class EngineError(UserError, RuntimeError):
    """An engine that does not start."""


class Engine:
    """Draws n completions for every prompt, numbers first, first + 1, ...; arguments as in `sampling.sample`.

    With equal (seed, key, number) an engine draws the same sample, whatever else it draws. Two engines do not draw
    the same ones: their random numbers differ, and so does the rounding of their logits.

    It holds a model until it is closed, by `close` or at the end of a `with` block; then it draws no more.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    shard = 256  # questions to ask for in one call, where calls are many: what a killed run loses

    def sample(self, prompts: list[str], n: int, *, keys: list[str], **drawing) -> list[list[Sample]]:
        check_prompts(prompts)
        return self.sample_ids([encode_prompt(self.tokenizer, one) for one in prompts], n, keys=keys, **drawing)

    def sample_ids(
        self,
        prompt_ids: list[list[int]],
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
    ) -> list[list[Sample]]:
        """`sample` for prompts that are token ids already, such as a question and the beginning of a rationale."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back the memory, so that the next model has room; a second time does nothing."""
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class NativeEngine(Engine):
    """`sampling.sample` on one model. Closed, it drops the model, which whoever else holds it keeps alive."""

    name = "native"

    def __init__(self, model, tokenizer, max_batch: int = MAX_BATCH, cache_tokens: int = 0, cuda_graphs: bool = False):
        self.model, self.tokenizer = model, tokenizer
        self.ways = {"max_batch": max_batch, "cache_tokens": cache_tokens, "cuda_graphs": cuda_graphs}

    def sample_ids(self, prompt_ids, n, **drawing) -> list[list[Sample]]:
        return sampling.sample_ids(self.model, prompt_ids, n, tokenizer=self.tokenizer, **self.ways, **drawing)

    def close(self) -> None:
        self.model = None


def chosen(name: str, weights: str | None = None) -> str:
    """The engine that a name stands for: "auto" is vLLM where it is installed and holds such weights (nf4 it does not),
    else the native one."""
    if name != "auto":
        return name
    return "vllm" if find_spec("vllm") and weights != "nf4" else "native"


def make_engine(
    name: str, base: str, *, weights: str | None = None, rows: int = MAX_BATCH, cache_tokens: int = 0,
    cuda_graphs: bool = False, workers: int = 1, lora_rank: int = 0, share: float = 0.0, prompt: str = "plain",
) -> Engine:  # fmt: skip
    """The engine called `name`, "native", "vllm" or "auto", on a model: "tiny", a folder or a hub id.

    base: may be the folder of a LoRA adapter, which the native engine merges into its base and vLLM applies to it.
    weights: as in `settings.HardwareSettings`; by default float32, and for vLLM what the checkpoint has. vLLM 0.32
        holds no nf4: it samples from the same checkpoint in bfloat16, which is 13 GB for 7 billion weights.
    rows, cache_tokens, cuda_graphs: completions that the native engine draws at once (max_batch of `sampling.sample`),
        the tokens whose keys and values it holds, and whether it records its steps. workers: more than one are
        processes of Ray's, each with such an engine.
    lora_rank: of vLLM, the greatest rank of adapters to come (`VLLMEngine.load_adapter`). share: of a GPU's memory that
        vLLM takes, 0 for nine tenths of what is free; without a GPU of the machine's, 0 for half of what is free.
    prompt: how its tokenizer asks questions, "plain" or "chat" (`encoding.use_prompt`).
    """
    name = chosen(name, weights)
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is unknown; choose one of: {', '.join(ENGINES)}.")
    checked("workers", workers, Processes, 1)
    checked("rows", rows, Rows, MAX_BATCH)
    checked("cache_tokens", cache_tokens, Held, 0)
    check_installed(name, workers)
    if workers > 1:
        from smlib.ray_engine import RayEngine

        held = {"weights": weights, "rows": rows, "cache_tokens": cache_tokens, "cuda_graphs": cuda_graphs}
        held["prompt"] = prompt
        return RayEngine(base, workers=workers, inner=name, **held)
    if name == "native":
        tokenizer = models.load_tokenizer(base, prompt)
        return NativeEngine(models.load_policy(base, weights or "float32"), tokenizer, rows, cache_tokens, cuda_graphs)
    from smlib.vllm_engine import VLLMEngine

    options = {"dtype": "bfloat16" if weights == "nf4" else weights} if weights else {}
    options |= {"gpu_memory_utilization": share} if share else {}
    adapter = models.adapter_config(base)
    if adapter is None:
        return VLLMEngine(base, lora_rank, prompt=prompt, **options)
    engine = VLLMEngine(adapter.base_model_name_or_path, lora_rank=adapter.r, prompt=prompt, **options)
    engine.load_adapter(base)
    return engine


def check_installed(name: str, workers: int = 1) -> None:
    """Raise MissingLibrary where that engine, in so many processes, needs what is not installed."""
    for library in ["vllm"] * (name == "vllm") + ["ray"] * (workers > 1):
        if find_spec(library) is None:
            raise MissingLibrary(
                f"this engine needs {library}, which is not installed: {INSTALL[library]}; or choose the engine "
                "'native' with one worker."
            )
