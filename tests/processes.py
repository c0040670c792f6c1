"""The processes below a test's own: what it sees of them, and two that share a training."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

COMMAND = Path(__file__).parent / "command_in_processes.py"  # in place of -m smlib, to look at the threads that stay


def children() -> set[psutil.Process]:
    """Those that live, without Python's own tracker of what they share, which stays to the end."""
    found = set()
    for one in psutil.Process().children(recursive=True):
        try:
            if one.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(one.cmdline()):
                found.add(one)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def in_two_processes(*arguments, timeout: int = 600, **environment: str) -> subprocess.CompletedProcess:
    """A script, or -m and a module, with its arguments, started by torchrun twice; timeout: seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
