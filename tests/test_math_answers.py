import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlib import math_answers, math_worker
from smlib.math_answers import Invalid, equal, extract, normalise
from smlib.math_worker import Gone, Worker

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
5                       ;; x=5
2x+3                    ;; y=2x+3
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
