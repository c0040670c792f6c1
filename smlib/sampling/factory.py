"""`make_engine`: an engine by its name, in this process or several of them on Ray's workers."""

from smlib.declared import CacheTokens, PrefixTokens, Processes, Rows, checked
from smlib.errors import UsageError
from smlib.sampling.devices import chosen_dtype
from smlib.sampling.engines import ENGINES, Engine, check_installed, chosen
from smlib.sampling.limits import MAX_BATCH, PREFIX_TOKENS
from smlib.sampling.local_engines import local_engine


def make_engine(
    name: str,
    base: str,
    *,
    dtype: str | None = None,
    max_batch: int = MAX_BATCH,
    cache_tokens: int = 0,
    prefix_tokens: int = PREFIX_TOKENS,
    workers: int = 1,
    lora_rank: int = 0,
    share: float = 0.0,
    prompt: str = "plain",
) -> Engine:
    """The engine called `name`, "native", "vllm" or "auto", on a model: "tiny", a folder or a Hub id.

    base: may be the folder of a LoRA adapter, which the native engine merges into its base and vLLM applies to it.
    dtype, max_batch, cache_tokens, prefix_tokens, workers: as in `settings.HardwareSettings`. dtype is by default
        float32, and for vLLM what the checkpoint has. vLLM 0.32 holds no nf4: it samples from the same checkpoint in
        bfloat16, which is 13 GB for 7 billion weights.
    lora_rank: of vLLM, the greatest rank of adapters to come (`VLLMEngine.load_adapter`). share: of a GPU's memory that
        vLLM takes, 0 for nine tenths of what is free; without a GPU of the machine's, 0 for half of what is free.
        Both are for one worker.
    prompt: how its tokenizer asks questions, "plain" or "chat" (`encoding.use_prompt`).

    Raises UsageError for values that are not allowed, MissingLibrary where vLLM or Ray is not installed, EngineError
    where vLLM does not start, and ModelError for a model that cannot be loaded.
    """
    name = chosen(name, dtype)
    if name not in ENGINES:
        raise UsageError(f"engine {name!r} is unknown; choose one of: {', '.join(ENGINES)}")
    checked("workers", workers, Processes, 1)
    checked("max_batch", max_batch, Rows, MAX_BATCH)
    checked("cache_tokens", cache_tokens, CacheTokens, 0)
    checked("prefix_tokens", prefix_tokens, PrefixTokens, PREFIX_TOKENS)
    check_installed(name, workers)
    dtype = dtype and chosen_dtype(dtype)
    engine_kwargs = {"dtype": dtype, "max_batch": max_batch, "cache_tokens": cache_tokens, "prompt": prompt}
    if workers > 1:
        from smlib.sampling.ray_engine import RayEngine  # Ray is an extra

        return RayEngine(base, workers=workers, inner=name, **engine_kwargs)
    return local_engine(name, base, lora_rank=lora_rank, share=share, prefix_tokens=prefix_tokens, **engine_kwargs)
