"""One long-lived process that compares two formulas with math-verify.

This file is both ends of the pipe: `Worker` for the caller, `serve` for the process itself, started as
`python -m smlib.judging.math_worker`. They speak JSON lines, so nothing that a model wrote is unpickled or run. The
process is disposable, because a model may write 9^{9^{9^9}}: its memory is limited, and before each comparison it sets
two alarms of the operating system, which end it even inside C code, and even if the caller is gone. The first counts
the processor time of this process alone, so a verdict does not depend on what else the machine does. The second counts
the clock, for a process that hangs without computing. math-verify's own limit uses signals as well and therefore
works only in a main thread, which is why callers with threads need a process.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache

from smlib.errors import MissingLibrary

MISSING = "math-verify is missing, which judges MATH answers; install it: pip install {}"
PACKAGES = "math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2"
MEMORY = 2 * 1024**3  # bytes of address space; an ordinary comparison needs 0.1 GiB
STARTUP = 120  # seconds of processor time for importing SymPy, which needs one or two
PATIENCE = 60  # seconds on the clock for each second of processor time: the share of a very busy machine


class Gone(Exception):
    """The process ended and gave no answer; the message says why."""


class Worker:
    """Starts the process for the first pair, and again after it has ended. Safe in threads and after a fork."""

    def __init__(self):
        self._forget()
        atexit.register(self.stop)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self):
        """Have no process: at first, and in a forked child, because process and lock belong to its parent."""
        process, self._process, self._lock = getattr(self, "_process", None), None, threading.Lock()
        if process is not None:
            process.stdin.close()  # the process ends when the last copy of its input is closed
            process.stdout.close()
            process.returncode = 0  # only its parent can wait for it

    def equal(self, said: str, gold: str, seconds: float) -> bool:
        """Whether math-verify takes one formula for the other. Raises Gone after `seconds` of processor time."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                return self._ask(said, gold, seconds)
            except BaseException:  # also an interrupt: the answer to this question must not meet the next one
                self._stop()
                raise

    def stop(self) -> None:
        """End the process; a later comparison starts another."""
        with self._lock:
            self._stop()

    def _ask(self, said: str, gold: str, seconds: float) -> bool:
        try:
            self._process.stdin.write(json.dumps({"said": said, "gold": gold, "seconds": seconds}).encode() + b"\n")
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if not reply:
            raise Gone(_cause(self._process.wait(), seconds))
        return json.loads(reply)

    def _start(self) -> None:
        self._stop()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "smlib.judging.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a forked child that closes its copy must have nothing left to write
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            start_new_session=True,  # Ctrl-C is for the caller
        )
        hello = self._process.stdout.readline()
        if hello != b"ready\n":
            raise MissingLibrary(
                hello.decode().strip() or "math-verify did not start; to see why: python -m smlib.judging.math_worker"
            )

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _cause(status: int, seconds: float) -> str:
    if status == -getattr(signal, "SIGPROF", 0):
        return f"comparison took longer than {seconds:g} s"
    if status == -getattr(signal, "SIGALRM", 0):
        return f"comparison did not end within {PATIENCE * seconds:g} s on the clock"
    return f"comparison ended its process (status {status})"


# ------------------------------------------------------------------------------------------- inside the process


def serve() -> None:
    """Answer questions from standard input until it is closed."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    alarm = _limits()
    alarm(STARTUP)
    try:
        import math_verify  # noqa: F401
        import sympy  # noqa: F401
    except ImportError:
        print(MISSING.format(PACKAGES), file=replies, flush=True)
        return
    alarm(0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        alarm(question["seconds"])
        reply = compare(question["said"], question["gold"])
        alarm(0)
        print(json.dumps(reply), file=replies, flush=True)


def _limits():
    """Limit the memory; return a function that sets both alarms (none where the platform has none: Windows)."""
    try:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    if not hasattr(signal, "setitimer"):
        return lambda seconds: None
    alarms = {signal.SIGPROF: (signal.ITIMER_PROF, 1), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE)}
    for number in alarms:
        signal.signal(number, signal.SIG_DFL)  # the caller may have had it ignored or blocked
    signal.pthread_sigmask(signal.SIG_UNBLOCK, alarms)

    def set_alarms(seconds: float) -> None:
        for timer, factor in alarms.values():
            signal.setitimer(timer, factor * seconds)

    return set_alarms


def compare(said: str, gold: str) -> bool:
    """Whether two formulas are equal: math-verify says so, and so do their values to 40 digits.

    math-verify alone takes 1/2^60 for 1/2^61: it drops what is smaller than 10^-15. Its own extraction from text is
    not used, because it falls back to Python's eval, and to any fraction in a text that it cannot read. A text that
    cannot be read, or that recurses too deep, is not equal.
    """
    from math_verify import verify

    try:
        left, right = _where_gold_is_real(_parsed(gold), _parsed(said))
        return _values_agree(left, right) and verify(left, right, timeout_seconds=None)
    except MemoryError:
        os._exit(1)  # what SymPy has cached fills the memory: a new process starts empty
    except Exception:
        return False


@lru_cache(maxsize=1024)
def _parsed(text: str):
    from latex2sympy2_extended import latex2sympy

    return latex2sympy(text, is_real=True, normalization_config=None)


def _where_gold_is_real(gold, said):
    """Both formulas, with the letters that must be positive for the gold to be real: n > 0 in 1/\\sqrt{n}."""
    from sympy import Expr, Rational, Symbol

    if not isinstance(gold, Expr):
        return gold, said
    symbols = sorted(gold.free_symbols, key=str)
    point = {symbol: Rational(17, 13) + Rational(index, 3) for index, symbol in enumerate(symbols)}
    positive = {
        symbol: Symbol(symbol.name, positive=True)
        for symbol, value in point.items()
        if gold.subs(point).evalf().is_real and gold.subs(point | {symbol: -value}).evalf().is_real is False
    }
    return gold.subs(positive), said.subs(positive)


def _values_agree(left, right) -> bool:
    """At three points: equal values, or for equations left and right sides whose differences are proportional."""
    from sympy import Eq, Expr

    if isinstance(left, Eq) and isinstance(right, Eq):
        quotients = list(_quotients(left.lhs - left.rhs, right.lhs - right.rhs))
        return quotients[0] != 0 and all(_close(quotient, quotients[0]) for quotient in quotients)
    if not (isinstance(left, Expr) and isinstance(right, Expr)):
        return False
    return left == right or all(_close(quotient, 1) for quotient in _quotients(left, right))


def _quotients(left, right):
    from sympy import Rational

    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for point in (Rational(17, 13), Rational(-23, 7), Rational(101, 19)):
        values = {
            symbol: abs(point + Rational(index, 3)) if symbol.is_positive else point + Rational(index, 3)
            for index, symbol in enumerate(symbols)
        }
        yield left.subs(values).evalf(60) / right.subs(values).evalf(60)


def _close(a, b) -> bool:
    return bool(abs(a - b) < 1e-40)


if __name__ == "__main__":
    serve()
