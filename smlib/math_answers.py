r"""Judge MATH answers: find the answer in a text, bring it to one form, and compare it with the gold answer.

Strings that are equal after `normalise` are right. Only formulas that are written differently go to math-verify
(see `smlib.math_worker`), and only the formulas: brackets, lists, sets, intervals, matrices and units are compared
here, because math-verify takes (1,2) for {1,2}, 5 cm for 5 m, 10% for 0.1, 11 in base 2 for 11, and 2(3) for 5.

What counts as equal, where LaTeX leaves a choice:
- A comma list and a set {...} are roots in any order; (a,b) and matrices have an order; (a,b) is not [a,b].
- A unit, "%", "°" or "\$" may be missing on one side, as in most gold answers; two different ones are unequal.
- "x=5" says 5 where the gold has no "="; 5 does not say "x=5". "x \in [1,2]" says [1,2].
- "1,234" is a number and "1, 234" a list. "2\frac{1}{2}" and "2 1/2" are 5/2.
- Decimals are exact: 0.5 is 1/2, 0.333 is not 1/3. A number in a base (1011_2) must be written like the gold.
- Words (three letters and more) must be the same, whatever their case: math-verify would take "seat" for "east".
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from smlib.math_worker import Gone, Worker
from smlib.prompts import before_next_question

LONGEST = 1000  # characters of an answer; the longest gold answers of MATH have some 200


class Invalid(Exception):
    """The text holds no single answer; the message says why."""


_worker = Worker()


def equal(said: str, gold: str, *, seconds: float = 5.0) -> tuple[bool, str]:
    r"""Whether the answer said equals the gold answer, and a phrase that says what was compared.

    Both in LaTeX, as `extract` gives them. A comparison that takes longer than `seconds` counts as unequal.

        >>> equal(r"\dfrac12", "0.5")
        (True, 'said \\frac{1}{2}, gold \\frac{1}{2}')
    """
    return _compared(said, gold, seconds)


@lru_cache(maxsize=65536)
def _compared(said: str, gold: str, seconds: float) -> tuple[bool, str]:
    (left, unit), (right, gold_unit) = _read(said), _read(gold)
    what = f"said {left.text}, gold {right.text}"
    if unit and gold_unit and unit != gold_unit:
        return False, f"{what}: units {unit} and {gold_unit}"
    try:
        return _same(left, right, _Asking(seconds)), what
    except Gone as gone:
        return False, f"{gone}: {what}"


class _Asking:
    """Asks the worker about one pair after the other; all of them share one time limit."""

    def __init__(self, seconds: float):
        self.seconds, self.left = seconds, seconds

    def __call__(self, said: str, gold: str) -> bool:
        if self.left <= 0:
            raise Gone(f"comparison took longer than {self.seconds:g} s")
        start = time.monotonic()
        answer = _worker.equal(said, gold, self.left)
        self.left -= time.monotonic() - start
        return answer


def normalise(answer: str) -> str:
    r"""One form for answers that differ only in how they are written; units are dropped, lists sorted.

        >>> normalise(r"$\dfrac{2}{4}$"), normalise("1{,}000\\text{ cm}"), normalise(r"\pm 3")
        ('\\frac{1}{2}', '1000', '-3,3')

    "" means that there is nothing to compare. normalise(normalise(x)) == normalise(x).
    """
    return _read(answer)[0].text


# --------------------------------------------------------------------------------------- where the answer stands

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_CUE = re.compile(r"\b(?<!Given )(?:[Aa]nswer|ANSWER)\*{0,2}(?: \([^()\n]{0,40}\))?(?: ?:| (?:is|IS)\b):?")
_DISPLAY = re.compile(r"\$\$(.{0,1000}?)\$\$|\\\[(.{0,1000}?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\b(?:because|since|where|which)\b")
_FILLER = re.compile(r"[\s*:=]*(?:\b(?:the|therefore|thus|simply|just|indeed|equal to|given by)\b[\s:*]*)*")
_OR = re.compile(r"\bor\b")
_PART_BEFORE = re.compile(r"(?:[-+*/^_\d]|\\cdot|\\times|\\pm)\s*$")
_PART_AFTER = re.compile(r"\s*(?:[-+*/^_\w(]|\\cdot|\\times|\\pm|\\sqrt|\\[dt]?frac|\\pi)")
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ")


def extract(output: str) -> str:
    r"""The answer of a solution, in LaTeX as written: the last \boxed{...} or answer sentence before a next "Q:".

    A box inside the answer sentence is the answer. Raises Invalid where there is none, where the box is cut off or
    only a part of a formula, and where "or" stands between two different answers outside one box.

        >>> extract(r"So the answer is $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    text = before_next_question(output)
    cue, box = _last(_CUE, text), _last(_BOX, text)
    if cue is None and box is None:
        raise Invalid("no box and no answer sentence")
    start = cue.end() if cue else -1
    said = _boxed(text, box, start) if box and box.start() > start else _sentence(text[start : start + 3 * LONGEST])
    if len(said) > LONGEST:
        raise Invalid(f"an answer of more than {LONGEST} characters")
    if not normalise(said):
        raise Invalid("the answer is empty")
    return said.strip()


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007
        pass
    return found


def _boxed(text: str, box: re.Match, cue: int) -> str:
    said, end = _content(text, box.end())
    before, after = text[max(cue, box.start() - 300, 0) : box.start()], text[end : end + 300]
    if _PART_BEFORE.search(before) or (_PART_AFTER.match(after.partition("\n")[0]) and not _DEGREES.match(after)):
        if not re.match(r"\s+[A-Za-z]", after):
            raise Invalid("the box holds only a part of the formula")
    before = before.rpartition("\n")[2]
    after = _SENTENCE_END.split(after.partition("\n")[0], maxsplit=1)[0]
    near = before if cue >= 0 and cue > box.start() - 300 else before[-40:]
    others = [near.rpartition(" or ")[0]] if " or " in near else []
    others += [after.partition(" or ")[2]] if " or " in after else []
    boxes = [_content(before, other.end())[0] for other in _BOX.finditer(before)]
    for other in others + boxes:
        if normalise(_content_or(other)) != normalise(said):
            raise Invalid(f"several answers, {_content_or(other)[:40]} and {said[:40]}")
    return said
