"""`python -m smlib ARGUMENTS`, to be started in several processes: it fails where a thread of their group lives on.

Such a thread may abort the process while the interpreter ends: seldom, so that a test sees it by its name alone.
"""

import sys
from pathlib import Path

from smlib.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    threads = [name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")]
    assert code or not [name for name in threads if "gloo" in name], threads
    sys.exit(code)
