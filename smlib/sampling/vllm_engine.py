"""Draw samples with vLLM: for GPUs and for models too large for our own sampler.

    engine = VLLMEngine("meta-llama/Llama-3.1-8B", dtype="bfloat16")
    engine.sample(prompts, 8, SamplingParams(temperature=0.7, max_new_tokens=256, seed=0), keys=keys)

Sample j of a prompt is drawn with the vLLM seed `base_seed(seed, key) + j`: vLLM gives the n samples of one request
consecutive seeds (`vllm.v1.engine.parallel_sampling`; a test holds it to that), so numbers can be addressed. A sample
depends on (seed, key, number) only, up to float rounding, which depends on what else is in vLLM's batch and is coarse
in bfloat16.

vLLM runs its engine in a process of its own unless VLLM_ENABLE_V1_MULTIPROCESSING=0, which starts sooner on a CPU; but
then it also seeds this process's global random numbers and fixes its number of threads, and of two open ones in it the
end of the first is the end of both. The process of its own reads a script that makes an engine again: what the script
does must be below `if __name__ == "__main__":`.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from smlib.errors import UsageError
from smlib.progress import progress_bar
from smlib.sampling import devices, encoding, models
from smlib.sampling.engines import CLOSED, Engine, EngineError
from smlib.sampling.params import Ending, Sample, check_request


class VLLMEngine(Engine):
    """vLLM on one model.

    base: "tiny", a folder, or a Hub id, best with "@" and a revision. lora_rank: the greatest rank of an adapter that
    `load_adapter` may be given, 0 for none. prompt: as in `factory.make_engine`. options: arguments of `vllm.LLM`, such
    as dtype (by default the checkpoint's own), max_model_len, tensor_parallel_size or gpu_memory_utilization (the share
    of a GPU to take, by default nine tenths of what is free; without one of the machine's memory, by default half of
    what is free).
    """

    name = "vllm"

    def __init__(self, base: str, lora_rank: int = 0, prompt: str = "plain", **options):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report its use to its makers
        # Here, so that the module can be imported without vLLM, and since it takes seconds.
        from vllm import LLM
        from vllm.platforms import current_platform

        self.tokenizer, self.generation = models.load_tokenizer(base, prompt), models.load_generation(base)
        self.lora, self.loaded = None, 0
        if lora_rank:
            options = {"enable_lora": True, "max_lora_rank": _lora_rank(lora_rank)} | options
        if memory := _memory(current_platform):
            options = {"gpu_memory_utilization": memory.share * memory.free / memory.total} | options
            memory.refuse(options["gpu_memory_utilization"])
        # The samples of a prompt share its keys and values only by the prefix cache. "raw" log-probabilities are those
        # before temperature and truncation.
        options = {"enable_prefix_caching": True} | options
        # vLLM's own default draws from a float32 checkpoint in bfloat16.
        options = {"dtype": models.load_config(base).dtype or "auto"} | options
        if current_platform.is_cpu():
            # Where a batch is full, vLLM reads a prompt in parts, draws after each and rewinds the generator, which
            # fails on a CPU: "CPU Generator does not use offset".
            options = {"enable_chunked_prefill": False} | options
        place, revision = models.locate(base)
        if models.check_weights(base):
            options = {"load_format": "safetensors"} | options
        options = {"trust_remote_code": False} | options
        options = {"revision": revision, "tokenizer_revision": revision} | options
        try:
            self.llm = LLM(place, logprobs_mode="raw_logprobs", **options)
        except (RuntimeError, ValueError) as error:
            asked = memory.asked(options["gpu_memory_utilization"]) if memory else "the cause is above"
            raise EngineError(f"vLLM does not start with {base}: {error} ({asked}). {_WAY_OUT}") from error

    def load_adapter(self, folder: str | Path) -> None:
        """Sample from the base with this peft LoRA adapter from now on; the folder is read at once.

        Raises ValueError where the engine was made without `lora_rank`; vLLM raises one for a greater rank.
        """
        from vllm.lora.request import LoRARequest

        if not self.llm.llm_engine.vllm_config.lora_config:
            raise UsageError("this engine takes no adapter: make it with lora_rank=, the rank of the adapters to come")
        self.loaded += 1  # vLLM keeps adapters, and the keys and values drawn with them, by number and by name
        lora = LoRARequest(f"adapter-{self.loaded}", self.loaded, str(folder))
        self.llm.llm_engine.add_lora(lora)  # in place of the one before: it holds one
        self.lora = lora

    def close(self) -> None:
        """End vLLM's process and wait until it is gone, and with it what it holds of the GPU."""
        if self.llm is not None:
            # Its processes get a minute to end by themselves; vLLM would kill them after five seconds.
            self.llm.llm_engine.engine_core.shutdown(timeout=60.0)
            self.llm = None

    def sample_ids(self, prompt_ids, n, params, *, keys, first=0, progress=None) -> list[list[Sample]]:
        """As `sampler.sample_ids`. The longest a prompt may become is vLLM's max_model_len, by default the model's
        number of positions."""
        if self.llm is None:
            raise EngineError(CLOSED)
        check_request(prompt_ids, n, params, keys, first, self.llm.model_config.max_model_len)

        import vllm

        ends = encoding.ends(self.tokenizer, self.generation)  # as in our own sampler, whatever vLLM makes of them
        drawing = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        drawing |= {"max_tokens": params.max_new_tokens, "stop": list(params.stop), "detokenize": bool(params.stop)}
        drawing |= {"ignore_eos": True, "stop_token_ids": list(ends), "logprobs": 0}
        parameters = [vllm.SamplingParams(n=n, seed=base_seed(params.seed, key) + first, **drawing) for key in keys]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        label = progress if isinstance(progress, str) else None  # vLLM would close the bar of a larger whole
        bar = progress_bar(label, n * len(prompts), "sample")
        try:
            self.llm.enqueue(prompts, parameters, lora_request=self.lora, use_tqdm=False)
            outputs = self.llm.wait_for_completion(use_tqdm=False if bar.disable else lambda **_: bar)
        except BaseException:  # an interrupted cell: without this, the next call would get these samples
            queued = self.llm.llm_engine.output_processor
            alone = [name for name, state in queued.request_states.items() if state.parent_req is None]
            # a prompt with several samples is a parent, which takes its children with it
            self.llm.llm_engine.abort_request([*queued.parent_requests, *alone], internal=True)
            raise
        finally:
            bar.close()
        ending = Ending(ends, params.stop, self.tokenizer)
        return [[_to_sample(one, ending) for one in output.outputs] for output in outputs]


def _to_sample(completion, ending: Ending) -> Sample:
    """vLLM's completion, with the text of our own tokenizer: vLLM's is cut and spaced by rules of its own."""
    ids = list(completion.token_ids)
    logprobs = [found[token].logprob for token, found in zip(ids, completion.logprobs, strict=True)]
    return ending.cut(ids, logprobs)


def base_seed(seed: int, key: str) -> int:
    """The vLLM seed of sample 0, below 2^62, so that numbers can be added.

    A random generator of torch on a CPU uses the lowest 32 bits only: there, two of P prompts with n samples each share
    some random numbers with a probability of about n P^2 / 2^32 (0.002 % for 100 prompts with 8).
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "little") >> 2


_WAY_OUT = (
    "End other programs, choose a smaller model or other weights, or sample with the native engine "
    "(hardware.engine = 'native')."
)


@dataclass(frozen=True)
class Memory:
    """Of a GPU, or of the machine where vLLM computes on the CPU, in bytes."""

    free: float
    total: float
    share: float  # of what is free, to take

    def asked(self, share: float) -> str:
        return (
            f"vLLM was to take {share * self.total / 1e9:.1f} GB, and {self.free / 1e9:.1f} of {self.total / 1e9:.1f} "
            "GB of memory are free"
        )

    def refuse(self, share: float) -> None:
        """Raise EngineError where vLLM would, with pages of traceback from another process."""
        if share * self.total > self.free and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            raise EngineError(f"{self.asked(share)}. {_WAY_OUT}")


def _memory(platform) -> Memory | None:
    """What vLLM counts, once this process has given back what it no longer uses; None of other machines."""
    devices.free_memory()
    if platform.is_cpu():
        from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

        found = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
        # vLLM's own processes take two GB before it looks what is free, and other programs want some, too
        return Memory(found.available_memory, found.total_memory, share=0.5)
    return Memory(*torch.cuda.mem_get_info(), share=0.9) if platform.is_cuda_alike() else None


def _lora_rank(rank: int) -> int:
    """The size that vLLM reserves for an adapter of this rank: 8, 16, 32, ..., 512."""
    return max(8, 2 ** (rank - 1).bit_length())
