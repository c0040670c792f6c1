"""Where models are and train: on this process's GPU or the CPU, decided here alone, in one process or in several."""

import gc
import time
from functools import cache

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

FASTER = 1.25  # how many times as fast bfloat16 must be to be chosen, as it rounds


def on_gpu() -> bool:
    """Whether models are loaded to a GPU and train there, decided here alone: where torch finds one by CUDA or ROCm,
    but after `accelerate launch --cpu`. Other accelerators, such as Apple's, are left alone: nobody has tried them."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def process_state() -> PartialState:
    """The processes that accelerate or torchrun started, on `device`.

    Accelerate keeps one such state for the whole process, on the device that the first call names, by itself on any
    accelerator that it finds. So nothing here makes one by itself.
    """
    return PartialState(cpu=not on_gpu())


def accelerator(**options) -> Accelerator:
    """accelerate as it was launched, on `device`."""
    return Accelerator(cpu=not on_gpu(), **options)


def free_memory() -> None:
    """Give back what nobody uses. A trainer and its model refer to each other, so that the model lives on after a
    training until Python looks for such circles: on a GPU there may be no room for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name() -> str:
    """Where `load_policy` puts a model: the GPU's name, or "CPU"."""
    return torch.cuda.get_device_name() if on_gpu() else "CPU"


def chosen_dtype(name: str) -> str:
    """The precision that a name stands for: of "auto", "bfloat16" where this machine is faster with it, as GPUs and
    processors with AMX are, else "float32". It is measured once a process, in some hundredths of a second, and said."""
    return _faster_dtype() if name == "auto" else name


@cache
def _faster_dtype() -> str:
    seconds = {dtype: _product_seconds(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    ratio = seconds["float32"] / seconds["bfloat16"]
    chosen = "bfloat16" if ratio >= FASTER else "float32"
    print(f"dtype 'auto' is {chosen}: bfloat16 multiplies {ratio:.2f} times as fast as float32 on {device_name()}")
    return chosen


def _product_seconds(dtype: torch.dtype, rows: int = 256, width: int = 1024) -> float:
    """Of a product as a layer of a small model has it; the best of several."""
    inputs, weight = (torch.ones(size, width, dtype=dtype, device=device()) for size in (rows, width))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return best
