"""What all tests share: no network, no GPU, no threads that fight over two cores, no time limit on properties."""

import gc
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


def pytest_collection_modifyitems(items):
    """The runs of all notebooks, then other files with slow tests: what workers begin last is to be short."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.stem != "test_notebook_runs"))


def pytest_collection_finish():
    """What the tests import lives as long as they do. Python looks through all of it for garbage whenever a stage frees
    its model, for half a second each time, unless it is told not to."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def interrupts():
    """A request to end (SIGTERM) raises KeyboardInterrupt, as Ctrl-C does, also where a shell has started the tests in
    the background, which ignore Ctrl-C; so the command line has it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in numbers)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def in_process():
    """Notebooks run in this process: a kernel takes seconds to start, and most tests are not about one."""
    import small_notebooks

    with small_notebooks.engine(small_notebooks.InProcess):
        yield
