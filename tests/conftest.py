"""What all tests share: no network, no GPU, no threads that fight over two cores, no time limit on properties."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # numbers are compared with those of a CPU
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
# Matrix products in bfloat16 round otherwise where a processor has AMX, and there by the batch's shape, too.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


@pytest.fixture
def interrupts():
    """A request to end (SIGTERM) raises KeyboardInterrupt, as Ctrl-C does; so the command line has it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)
