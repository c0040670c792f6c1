"""`local_engine`: a native or vLLM engine in this process.

`factory.make_engine` gives it for one worker, and each of Ray's workers makes one for itself. So it stands below both.
"""

from smlib.sampling import models
from smlib.sampling.engines import Engine, NativeEngine, check_installed
from smlib.sampling.limits import PREFIX_TOKENS


def local_engine(
    name: str,
    base: str,
    *,
    dtype: str | None,
    max_batch: int,
    cache_tokens: int,
    prompt: str,
    prefix_tokens: int = PREFIX_TOKENS,
    lora_rank: int = 0,
    share: float = 0.0,
) -> Engine:
    """The engine called `name`, "native" or "vllm"; other arguments and errors as in `factory.make_engine`."""
    check_installed(name)  # again in a worker of Ray, which may run on a machine without vLLM
    if name == "native":
        model, tokenizer = models.load_policy(base, dtype or "float32"), models.load_tokenizer(base, prompt)
        return NativeEngine(model, tokenizer, max_batch, cache_tokens, prefix_tokens)
    from smlib.sampling.vllm_engine import VLLMEngine  # vLLM takes seconds to import

    options = {"dtype": "bfloat16" if dtype == "nf4" else dtype} if dtype else {}
    options |= {"gpu_memory_utilization": share} if share else {}
    adapter = models.adapter_config(base)
    if adapter is None:
        return VLLMEngine(base, lora_rank, prompt=prompt, **options)
    engine = VLLMEngine(adapter.base_model_name_or_path, lora_rank=adapter.r, prompt=prompt, **options)
    engine.load_adapter(base)
    return engine
