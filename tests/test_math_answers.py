import ast
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from unittest import mock

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlib.judging import math_worker
from smlib.judging.math_answers import Invalid, equal, extract, normalise
from smlib.judging.math_worker import Gone, Worker

EQUAL = r"""
\frac{1}{2}             ;; \frac{1}{2}
\dfrac{1}{2}            ;; \frac{1}{2}
\tfrac12                ;; \frac{1}{2}
\frac12                 ;; 0.5
\frac1{72}              ;; \frac{1}{72}
\frac 3 4               ;; \frac{3}{4}
1/2                     ;; \frac{1}{2}
.5                      ;; \frac{1}{2}
0.50                    ;; 0.5
\frac{2}{4}             ;; \frac{1}{2}
\frac{-3}{4}            ;; -\frac{3}{4}
-\frac{3}{4}            ;; \frac{3}{-4}
−3                      ;; -3
+3                      ;; 3
007                     ;; 7
3.                      ;; 3
2\frac{1}{2}            ;; \frac{5}{2}
2 1/2                   ;; 2.5
1{,}000                 ;; 1000
1,000                   ;; 1000
10,\!000                ;; 10000
1,234,567               ;; 1234567
1\,000\,000             ;; 1000000
$\$1{,}000.00$          ;; 1000
\$5                     ;; 5
18.90                   ;; \$18.90
5\text{ cm}             ;; 5
5                       ;; 5\text{ cm}
5 cm                    ;; 5\text{ cm}
5\text{ centimeters}    ;; 5\mbox{ cm}
12\text{ cm}^2          ;; 12\text{ square cm}
12\text{ square units}  ;; 12
12 square inches        ;; 12\text{ sq. inches}
3\sqrt{2}\text{ ft}     ;; 3\sqrt{2}
10\text{ m}             ;; 10 meters
60\text{ miles per hour}  ;; 60
10\%                    ;; 10\%
10                      ;; 10\%
10\%                    ;; 10
12.5\%                  ;; 12.5
10 percent              ;; 10\%
90^\circ                ;; 90
90                      ;; 90^{\circ}
90°                     ;; 90^\circ
45\text{ degrees}       ;; 45^\circ
2\sqrt{3}               ;; \sqrt{12}
\sqrt 3                 ;; \sqrt{3}
\sqrt3                  ;; \sqrt{3}
\frac{\sqrt{3}}{3}      ;; \frac{1}{\sqrt{3}}
\frac{3\pi}{4}          ;; \frac{3}{4}\pi
0.75\pi                 ;; \frac{3\pi}{4}
π/2                     ;; \frac{\pi}{2}
3+2\sqrt{2}             ;; 2\sqrt{2}+3
\left( 3, \frac{\pi}{2} \right)  ;; (3,\frac{\pi}{2})
(1, 2)                  ;; (1,2)
(0.5,2)                 ;; \left(\frac12,2\right)
(\sqrt{8},1)            ;; (2\sqrt{2},1)
[1,2)                   ;; \left[1,2\right)
(-\infty, 3]            ;; (-\infty,3]
(-\infty,3)\cup(5,\infty)  ;; (5,\infty)\cup(-\infty,3)
x \in [1,2]             ;; [1,2]
m \geq \sqrt{2}         ;; [\sqrt{2},\infty)
(-\infty,3)             ;; x<3
1\le x<2                ;; [1,2)
[1,2]                   ;; x\in[1,2]
1, 2                    ;; 2,1
1 \text{ and } 2        ;; 1,2
x=1 \text{ or } x=2     ;; 1,2
x=1,2                   ;; 1,2
\{1,2\}                 ;; \{2,1\}
\{1,2\}                 ;; 1,2
\left\{ 1, \sqrt{12} \right\}  ;; \{2\sqrt{3},1\}
\pm 2                   ;; 2,-2
3 \pm \sqrt{2}          ;; 3-\sqrt{2},3+\sqrt{2}
\frac{1 \pm \sqrt{5}}{2}  ;; \frac{1+\sqrt{5}}{2}, \frac{1-\sqrt{5}}{2}
x = \pm 2               ;; \pm 2
\emptyset               ;; \{\}
\begin{pmatrix} 1 \\ 2 \end{pmatrix}  ;; \begin{pmatrix}1\\2\end{pmatrix}
\begin{bmatrix} 1/2 & 0 \\ 3 & \sqrt{4} \end{bmatrix}  ;; \begin{pmatrix} \frac12 & 0 \\ 3 & 2 \end{pmatrix}
x=5                     ;; 5
f(x)=5                  ;; 5
5                       ;; x=5
2\sqrt{3}               ;; x=\sqrt{12}
10'000                  ;; 10000
10 000             ;; 10000
1½                      ;; \frac{3}{2}
１８                      ;; 18
\sqrt{1/n}              ;; \frac{1}{\sqrt{n}}
A_1 = 5                 ;; 5
2+3=5                   ;; 5
x = \frac{10}{2} = 5    ;; 5
(x,y)=(1,2)             ;; (1,2)
y=3+2x                  ;; y=2x+3
y = 2x+3                ;; 2x-y+3=0
x^2+2x+1                ;; (x+1)^2
x^{2}-1                 ;; (x-1)(x+1)
x^2 y                   ;; yx^2
6 \cdot 7               ;; 42
2(3)                    ;; 6
2^{10}                  ;; 1024
2^10                    ;; 1024
1.2 \times 10^5         ;; 120000
5!                      ;; 120
\binom{5}{2}            ;; 10
\frac{1}{2^{60}}        ;; 2^{-60}
x > 3                   ;; 3<x
x\geq\frac{6}{2}        ;; x \ge 3
-2 \leq x \leq 5        ;; -2\le x\le 5
11_2                    ;; 11_{2}
\text{east}             ;; east
\text{Tuesday}          ;; tuesday
\textbf{(B)}            ;; \text{(B)}
B                       ;; (B)
\text{Monday morning}   ;; Monday morning
AB                      ;; \text{AB}
3:4                     ;; 3 : 4
12:30\text{ p.m.}       ;; 12:30 p.m.
e^{i\pi}                ;; e^{\pi i}
i                       ;; \mathrm{i}
|x|                     ;; \left|x\right|
\log_2 9                ;; \log_{2}{9}
"""

UNEQUAL = r"""
0.1                     ;; 10\%
10\%                    ;; 0.1
0.5\%                   ;; 0.5
1\%                     ;; 1
50\%                    ;; \frac{1}{2}
10\text{ cm}            ;; 10\%
(1,2)                   ;; [1,2]
[1,2)                   ;; (1,2)
(1,2)                   ;; (2,1)
(1,2)                   ;; 1,2
1,2                     ;; (1,2)
(1,2)                   ;; \{1,2\}
\{1,2\}                 ;; [1,2]
(1,2)                   ;; 1
1,234                   ;; (1,234)
(1,234)                 ;; (1234)
1, 234                  ;; 1234
1 2                     ;; 12
1 2                     ;; 3
1/2                     ;; 1.2
1/2                     ;; 12
\frac{1}{2}             ;; \frac{1}{3}
\frac{1}{2}             ;; 2
0.333                   ;; 1/3
0.333333333             ;; \frac{1}{3}
3.14                    ;; \pi
\frac{22}{7}            ;; \pi
1.41421356237           ;; \sqrt{2}
1.000.000               ;; 1
x=1 or x=2              ;; 1
x=1 or x=2              ;; 2
1,2                     ;; 1
1                       ;; 1,2
1,1,2                   ;; 1,2
\{1,1,2\}               ;; 1,2
1,2,2                   ;; 1,1,2
1,2,3                   ;; 1,2
\pm 2                   ;; 2
2                       ;; \pm 2
2x+3                    ;; y=2x+3
6                       ;; x=5
6,5                     ;; x=5,y=6
m > \sqrt{2}            ;; [\sqrt{2},\infty)
\sqrt{x}|y|             ;; \sqrt{x}y
x=5                     ;; y=5
x^2=4                   ;; 4
2x=10                   ;; 10
x=y                     ;; x
x^2=4                   ;; x=2
1=1                     ;; 0=0
5\text{ cm}             ;; 5\text{ m}
5\text{ cm}             ;; 5\text{ cm}^2
5\text{ million}        ;; 5
5 million               ;; 5
2 dozen                 ;; 2
5 apples                ;; 6
50\text{ cents}         ;; \$50
12:30\text{ p.m.}       ;; 12:30\text{ a.m.}
12:30                   ;; \frac{2}{5}
2:1                     ;; 2
3:4                     ;; \frac{3}{4}
11_2                    ;; 11
11                      ;; 11_2
1011_2                  ;; 11
1011_2                  ;; 1011_3
\text{east}             ;; \text{west}
east                    ;; seat
\text{cat}              ;; act
no                      ;; on
\text{(B)}              ;; \text{(C)}
A                       ;; a
E                       ;; e
A+1                     ;; a+1
x+1                     ;; y+1
x'                      ;; x
x_1                     ;; x_2
\overline{AB}           ;; AB
0.\overline{3}          ;; 0.3
2(3)                    ;; 5
(2)(3)                  ;; 5
5\frac{3}{2}            ;; \frac{13}{2}
1/2x                    ;; \frac{1}{2x}
1/2x                    ;; \frac{x}{2}
2^{3^2}                 ;; 64
2^3^2                   ;; 64
\frac{1}{2^{61}}        ;; \frac{1}{2^{60}}
2\cdot10^{-20}          ;; 10^{-20}
10^{40}+1               ;; 10^{40}
-\frac{3}{4}            ;; \frac{3}{4}
2\sqrt{3}               ;; 3\sqrt{2}
\sqrt{-4}               ;; 2
\sqrt{x^2}              ;; x
|x|                     ;; x
5!                      ;; 5
\infty                  ;; -\infty
x<3                     ;; x>3
x<3                     ;; x\le 3
1<x<2                   ;; 1<x\le 2
(-\infty,3)\cup(5,\infty)  ;; (-\infty,5)
\begin{pmatrix}1\\2\end{pmatrix}  ;; \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix}  ;; \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix}  ;; (1,2)
\begin{vmatrix}1&2\\3&4\end{vmatrix}  ;; \begin{pmatrix}1&2\\3&4\end{pmatrix}
\sin^2 x                ;; \sin x^2
\ln 10                  ;; \log 10
\tan^{-1} 2             ;; \frac{1}{\tan 2}
\sin 30                 ;; \sin 30^\circ
\frac{1}{0}             ;; \infty
\frac{0}{0}             ;; 1
5,000                   ;; 5
\{\}                    ;; 0
"""


def pairs(table):
    return [tuple(side.strip() for side in line.split(";;")) for line in table.strip().splitlines()]


@pytest.mark.parametrize(("said", "gold"), pairs(EQUAL))
def test_equal(said, gold):
    assert equal(said, gold)[0], (normalise(said), normalise(gold))


@pytest.mark.parametrize(("said", "gold"), pairs(UNEQUAL))
def test_unequal(said, gold):
    assert not equal(said, gold)[0], (normalise(said), normalise(gold))


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        (r"So we get $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"First \boxed{3}. But no: \boxed{5}", "5"),
        (r"$\boxed{\left\{ \sqrt{2}, \frac{1}{\sqrt{3}} \right\}}$", r"\left\{ \sqrt{2}, \frac{1}{\sqrt{3}} \right\}"),
        (r"$\boxed{\{1,2\}}$ and nothing else", r"\{1,2\}"),
        (r"\fbox{$7$}", "$7$"),
        (r"Hence $\boxed 5$.", "5"),
        (r"Hence \boxed 12.", "12"),
        (r"\[ \boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}} \]", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"$x=\boxed{3}$", "3"),
        (r"The angle is $\boxed{30}^\circ$.", "30"),
        (r"The answer is $\boxed{8}$ square inches.", "8"),
        (r"**\boxed{5}**", "5"),
        ("- \\boxed{5}\n", "5"),
        (r"Since n = 3 or n = 5, and 3 is too small, n is \boxed{5}.", "5"),
        (r"$\boxed{x=1 \text{ or } x=2}$", r"x=1 \text{ or } x=2"),
        (r"\boxed{\frac{1}{2}} or $0.5$.", r"\frac{1}{2}"),
        (r"The answer is 3. Wait. The answer is $\boxed{5}$.", "5"),
        (r"\boxed{3} The answer is $5$.", "$5$"),
        ("The answer is 5.", "5"),
        ("The answer is: $5$", "$5$"),
        ("Answer: 5", "5"),
        ("**Answer:** 5", "5"),
        ("the final answer is $x=5.$ I hope it is correct.", "$x=5"),
        ("Final Answer: The final answer is $0.5$. I hope it is correct.", "$0.5$"),
        ("The answer is\n\n$$\n\\frac{1}{2}\n$$\nas claimed.", r"$\frac{1}{2}$"),
        ("Therefore the answer is \\[ 5 \\].", "$5$"),
        ("The answer is given by $5$ because 3 is too small.", "$5$"),
        ("The answer is $5$, so we are done.", "$5$"),
        ("The answer is (B).", "(B)"),
        ("The answer is Tuesday", "Tuesday"),
        ("The answer is 3.14.", "3.14"),
        ("The answer is $1$ and $2$.", "$1$ and $2$"),
        ("The answer is 5.\n\nQ: What else?\nA: The answer is \\boxed{6}.", "5"),
        ("As the FAQ: says, the answer is 5.", "5"),
        ("The answer is 1/2 or $0.5$.", "1/2"),
    ],
)
def test_the_last_box_or_answer_sentence_is_the_answer(output, answer):
    assert extract(output) == answer


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", "no box and no answer sentence"),
        ("So it is 5.", "no box and no answer sentence"),
        ("Given answer: 5\nSo", "no box and no answer sentence"),
        ("Q: Is the answer: 5?", "no box and no answer sentence"),
        (r"\boxed{\frac{1}{2}", "not closed"),
        (r"\boxed{5} and then \boxed{", "not closed"),
        ("The answer is $(1,2$.", "do not match"),
        (r"The answer is $\frac{1}{2$.", "do not match"),
        (r"\boxed{}", "empty"),
        (r"\boxed", "empty"),
        ("The answer is", "empty"),
        ("The answer is $ $.", "empty"),
        ("The answer is not 5.", "what the answer is not"),
        ("The answer is 5 or 6.", "several answers, 5 and 6"),
        ("The answer is $x=1$ or $x=2$.", "several answers"),
        (r"The answer is $1 \text{ or } 2$.", "several answers"),
        (r"The answer is 5 or \boxed{6}.", "several answers"),
        (r"The answer is 5 or maybe $x = \boxed{6}$.", "several answers"),
        (r"The answer is $\boxed{5}$ or 6.", "several answers"),
        (r"$\boxed{5}$ or $\boxed{6}$", "several answers"),
        (r"$\boxed{5}$ and $\boxed{6}$", "several answers"),
        (r"$x = \boxed{5}$, $y = \boxed{6}$", "several answers"),
        (r"\boxed{2 + \boxed{3}}", "part of the formula"),
        (r"\boxed{x, \boxed{3}}", "several answers"),
        (r"$-\boxed{5}$", "part of the formula"),
        (r"$2\boxed{5}$", "part of the formula"),
        (r"$10^{\boxed{5}}$", "part of the formula"),
        (r"$\frac{\boxed{5}}{2}$", "part of the formula"),
        (r"$\boxed{5}\sqrt{2}$", "part of the formula"),
        (r"$\boxed{5}x$", "part of the formula"),
        (r"$\boxed{5}_2$", "part of the formula"),
        (r"$\boxed{5}$ million", "part of the formula"),
        (r"\boxed{" + "1" * 501 + "}", "more than 500 characters"),
    ],
)
def test_no_single_answer_is_invalid(output, message):
    with pytest.raises(Invalid, match=message):
        extract(output)


GOLDS = r"""
2
-3
\frac{3}{4}
-\frac{5}{12}
3\sqrt{13}
\frac{3\sqrt{2}}{2}
\frac{\pi}{6}
36\pi
2+\sqrt{3}
\frac{1+\sqrt{5}}{2}
(3,\frac{\pi}{2})
\left( 3, -7 \right)
(-\infty,2)\cup(3,\infty)
[-2,7]
(0,1]
x \in [-2,7]
1,-2
-1, 2, 5
\{1,2,4\}
3 \pm 2\sqrt{2}
\text{Evelyn}
\text{(C)}
\text{even}
11\sqrt{2}\text{ cm}
10\text{ square inches}
28\%
90^\circ
\$18.90
10,\!080
1{,}000{,}000
2516_8
4210_{5}
y = 2x + 3
x^3+3x-6
6r^2-4r-24
(x-3)(x+5)
-x^4 + 2x
5 + 3i
\begin{pmatrix} -1 \\ 7 \end{pmatrix}
\begin{pmatrix} 1/5 & 0 \\ 0 & 2 \end{pmatrix}
p - q
\frac{243}{625}
\frac{(x+2)(x-1)}{x}
12:30\text{ p.m.}
\log_2 5
x \ge 3
0.\overline{27}
\tan x
\frac{\sqrt{3}}{3}
2.5
""".strip().splitlines()


@pytest.mark.parametrize("gold", GOLDS)
def test_every_gold_is_right_against_itself_and_against_no_other(gold):
    for solution in (f"Adding up, so the answer is $\\boxed{{{gold}}}$.", f"Adding up.\nThe answer is ${gold}$."):
        said = extract(solution)
        assert equal(said, gold)[0]
        assert normalise(said) == normalise(gold)
    assert normalise(normalise(gold)) == normalise(gold)
    assert [other for other in GOLDS if equal(gold, other)[0]] == (
        [gold] if gold not in ("[-2,7]", r"x \in [-2,7]") else ["[-2,7]", r"x \in [-2,7]"]
    )


@pytest.mark.parametrize("gold", [gold for gold in GOLDS if any(map(str.isdigit, gold))])
def test_a_gold_with_one_digit_changed_is_wrong(gold):
    places = [index for index, char in enumerate(gold) if char.isdigit()]
    for index in places:
        changed = gold[:index] + str((int(gold[index]) + 1) % 10) + gold[index + 1 :]
        assert not equal(changed, gold)[0], changed


# ------------------------------------------------------------------------------------------------- the process


def test_the_process_loads_neither_torch_nor_another_module_of_ours():
    code = """
import sys, smlib.judging.math_worker as worker
assert worker.compare("1/2", "2/4")
print([name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "numpy", "smlib")])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = ast.literal_eval(said)
    assert set(loaded) == {
        "smlib",
        "smlib.errors",
        "smlib.files",
        "smlib.files.folders",
        "smlib.judging",
        "smlib.judging.math_worker",
    }  # a few milliseconds


def processes():
    """The children of this process that compare formulas."""
    children = psutil.Process().children()
    return [child for child in children if "smlib.judging.math_worker" in child.cmdline()]


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.stop()


@pytest.fixture
def process_of(worker):
    """() -> the process of `worker`, which is not that of the judge."""
    others = processes()

    def find():
        [process] = [process for process in processes() if process not in others]
        return process

    return find


def test_one_process_answers_all_questions(worker, process_of):
    assert worker.equal(r"\sqrt{12}", r"2\sqrt{3}", 60)
    process = process_of()
    assert not worker.equal(r"\sqrt{12}", r"3\sqrt{2}", 60)
    assert worker.equal("x+y", "y+x", 60)
    assert process_of() == process


@pytest.mark.parametrize(
    "bomb", ["9^{9^{9^{9}}}", r"\frac{1}{1+" * 300 + "x" + "}" * 300, "{" * 10_000, "((((9!)!)!)!)!"]
)
def test_a_bomb_ends_in_time_and_the_next_comparison_works(worker, bomb):
    assert worker.equal("1+1", "2", 60)
    start = time.monotonic()
    try:
        assert not worker.equal(bomb, "3", 0.5)
    except Gone as gone:
        assert str(gone) == "comparison took longer than 0.5 s"
    assert time.monotonic() - start < 5
    assert worker.equal("1+1", "2", 60)


def test_a_bomb_is_unequal_and_says_why():
    assert equal("9^{9^{9^{9}}}", "3", seconds=0.5) == (
        False,
        "comparison took longer than 0.5 s: said 9^{9^{9^{9}}}, gold 3",
    )
    assert equal(r"\sqrt{12}", r"2\sqrt{3}")[0]


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="limits of another process: Linux only")
def test_memory_is_limited(worker, process_of):
    assert worker.equal("1+1", "2", 60)
    limit, _ = process_of().rlimit(psutil.RLIMIT_AS)
    assert limit == math_worker.MEMORY


def test_a_killed_process_is_replaced_and_none_is_left(worker, process_of):
    assert worker.equal("1+1", "2", 60)
    first = process_of()
    first.kill()
    while runs(first.pid):  # until it is a zombie
        time.sleep(0.01)
    assert worker.equal("1+1", "2", 60)
    second = process_of()
    worker.stop()
    for process in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)  # a zombie would still be there


def test_a_process_that_dies_while_it_compares_is_reported(worker, process_of):
    assert worker.equal("1+1", "2", 60)
    threading.Timer(0.3, process_of().kill).start()
    with pytest.raises(Gone, match="ended its process"):
        worker.equal("9^{9^{9^{9}}}", "3", 20)


def test_threads_share_the_process(worker):
    results = {}

    def compare(number):
        results[number] = worker.equal(f"{number}+x", f"x+{number % 3}", 60)

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: number < 3 for number in range(6)}


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_starts_its_own_process_and_leaves_the_parents(worker, process_of):
    assert worker.equal("1+1", "2", 60)
    process = process_of()
    child = os.fork()
    if child == 0:
        try:
            alone = processes() == [] and worker.equal("1+2", "3", 60) and len(processes()) == 1
            worker.stop()
            os._exit(0 if alone and process.is_running() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert worker.equal("1+1", "2", 60)
    assert process_of() == process


def runs(pid):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_process_ends_with_the_caller_even_while_it_compares():
    code = """
import os, psutil, threading, smlib.judging.math_worker as module
worker = module.Worker()
worker.equal("1+1", "2", 60)
print(psutil.Process().children()[0].pid, flush=True)
threading.Timer(0.3, lambda: os._exit(0)).start()
worker.equal("9^{9^{9^{9}}}", "3", 1.5)
"""
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    deadline = time.monotonic() + 10
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(pid)


def test_without_math_verify_the_command_to_install_it_is_told(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no')")
    code = """
import smlib.judging.math_answers as m
assert m.equal("1/2", "0.5")[0]
try:
    m.equal("1+x", "x+1")
except ImportError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    ).stdout
    assert said.startswith("math-verify is missing") and "pip install math-verify==0.9.0" in said


def test_equal_pairs_are_compared_once(monkeypatch):
    asked = []
    monkeypatch.setattr(Worker, "equal", lambda self, *question: asked.append(question) or True)
    assert all(equal("1+w", "w+1")[0] for _ in range(10))
    assert asked == [("1+w", "w+1", 5.0)]


def test_a_timeout_is_asked_again(monkeypatch):
    answers = iter([Gone("comparison took longer than 5 s"), True])

    def answer(self, *question):
        one = next(answers)
        if isinstance(one, Gone):
            raise one
        return one

    monkeypatch.setattr(Worker, "equal", answer)
    assert equal("2+w", "w+2") == (False, "comparison took longer than 5 s: said 2+w, gold w+2")
    assert equal("2+w", "w+2")[0]
    assert equal("2+w", "w+2")[0]  # the verdict, once there is one, is kept


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="limits by the operating system: not on Windows")
def test_the_limit_counts_processor_time_and_not_the_clock(worker, process_of):
    """The process is stopped for twice its limit, as on a machine that is busy with others."""
    assert worker.equal("1+1", "2", 60)
    process = process_of()
    process.suspend()
    threading.Timer(1.0, process.resume).start()
    started = time.monotonic()
    assert worker.equal(r"\sqrt{12}", r"2\sqrt{3}", 0.5)
    assert time.monotonic() - started > 0.9


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="limits by the operating system: not on Windows")
def test_a_busy_machine_changes_no_verdict(worker, process_of):
    assert worker.equal("1+1", "2", 60)
    process_of().nice(19)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        assert worker.equal(r"\frac{1}{\sqrt{7}+1}", r"\frac{\sqrt{7}-1}{6}", 2)
        with pytest.raises(Gone, match="took longer than"):
            worker.equal("9^{9^{9^{9}}}", "3", 0.2)
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="limits by the operating system: not on Windows")
def test_a_process_that_hangs_without_computing_ends_as_well(worker, monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text(
        "import time\ncalls = []\n"
        "def verify(*_, **__):\n    calls.append(1)\n    time.sleep(60 * (len(calls) - 1))\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert worker.equal("1+1", "2", 60)
    started = time.monotonic()
    with pytest.raises(Gone, match="comparison did not end within 6 s on the clock"):
        worker.equal("1+1", "2", 0.1)
    assert time.monotonic() - started < 30


def test_a_platform_without_timers_compares_without_limits(worker, process_of, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\nvars(signal).pop('setitimer', None)\nsys.modules['resource'] = None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert worker.equal("1+1", "2", 0.001) and not worker.equal("1+x", "2", 0.001)
    if hasattr(psutil.Process, "rlimit"):
        assert process_of().rlimit(psutil.RLIMIT_AS)[0] != math_worker.MEMORY


def test_odd_characters_pass_through_the_pipe(worker):
    assert not worker.equal('a"\n\\u0000\x00é\ud800', "1", 60)
    assert worker.equal("1+1", "2", 60)


PIECES = [
    "The answer is ",
    r"\boxed{",
    "}",
    "{",
    r"\frac{1}{2}",
    r"\frac",
    r"\sqrt",
    r"\text{ cm}",
    r"\text{",
    r"\\",
    "&",
]
PIECES += [r"\begin{pmatrix}", r"\end{pmatrix}", r"\cup", r"\pm", "$", r"\{", r"\}", "(", ")", "[", "]", ",", ";", "<"]
PIECES += [r"\le", "=", "+", "-", "/", "^", "_", "!", "|", "1", "0", "12", ",000", ".5", "x", "ab", "E", "i", r"\pi"]
PIECES += [r"\infty", r"\circ", "%", r"\$", " or ", " and ", "Q:", "\n", " ", "²", "٣", "\ud800"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)), st.sampled_from(GOLDS))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_an_answer_or_invalid(text, gold):
    for output in (text, f"The answer is {text}", rf"\boxed{{{text}}}"):
        try:
            said = extract(output)
        except Invalid:
            continue
        assert equal(said, said)[0]
        correct, reason = equal(said, gold, seconds=1.0)
        assert isinstance(correct, bool)
        assert reason


@given(st.lists(st.sampled_from([*PIECES, "__import__('os')", "lambda", ":", "'", '"', "@"]), max_size=8).map("".join))
@settings(deadline=None, max_examples=300)
def test_only_formulas_reach_the_process(text):
    asked = []

    def refuse(self, *question):
        asked.append(question)
        raise Gone("nothing is compared here, so no verdict is kept")

    with mock.patch.object(Worker, "equal", refuse):
        for gold in (text, "x", "1+x", r"\sqrt{2}", "xE"):
            equal(text, gold)
    for said, _, _ in asked:
        assert re.fullmatch(r"(?:\\[a-z]+|[A-Za-z\d.+\-/^_(){}\[\]|!= ])*", said)
        assert not re.search(r"(?<![\\a-z])[A-Za-z]{3}", re.sub(r"\\[a-z]+", " ", said))


@given(st.sampled_from(PIECES), st.sampled_from(PIECES))
@settings(deadline=None, max_examples=60)
def test_reading_takes_linear_time(first, second):
    text = (first + second) * 5_000
    start = time.process_time()
    for output in (text, f"The answer is {text}", rf"\boxed{{{text}}}"):
        with suppress(Invalid):
            extract(output)
    assert time.process_time() - start < 3
