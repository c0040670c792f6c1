"""Find the final answer in a model's text and judge it against the gold answer.

One rule for every dataset: what stands before a next "Q:" counts, the last answer sentence in it is the
answer, and an answer that hedges ("A or B") or cannot be read is invalid, which counts as wrong. In doubt the
verdict is "invalid": a reward that accepts a wrong answer teaches it.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from smlib import math_answers
from smlib.errors import UsageError
from smlib.math_answers import Invalid as _Invalid
from smlib.problems import LETTERS, Problem
from smlib.prompts import before_next_question

# A reward is any callable: problems and completion texts -> one score each. The checker, the learned model and every
# reward of the related work fit it.
Reward = Callable[[Sequence[Problem], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Verdict:
    """What the judge found. extracted is canonical ("$1,000.00" gives "1000"), so that answers can be counted
    and compared as strings; None means invalid. reason is one short phrase for a reader."""

    correct: bool
    extracted: str | None
    reason: str


def grade(output: str, problem: Problem) -> Verdict:
    """Judge one output (prompt not included). Any text gives a Verdict.

    The continuation of a prompt that ends in "The answer is" must be graded as "The answer is" + output.
    Raises ValueError if the problem itself cannot be judged: an unknown kind, or a gold answer that is not of
    its kind or names no option.
    """
    if problem.kind == "math":
        return _grade_math(output, problem)
    gold = _gold(problem)
    try:
        said = _read(output, problem)
    except _Invalid as invalid:
        return Verdict(False, None, f"invalid: {invalid}; gold {gold}")
    correct = said == gold or (problem.kind == "number" and _is_rounded(gold, said))
    return Verdict(correct, said, f"said {said}, gold {gold}")


def _grade_math(output: str, problem: Problem) -> Verdict:
    """Two formulas may be equal and yet differ as strings; see `smlib.math_answers` for what counts as equal."""
    if not math_answers.normalise(problem.answer):
        raise UsageError(f"{problem.id}: the gold answer {problem.answer!r} is empty; correct the problem")
    try:
        said = math_answers.extract(output)
    except _Invalid as invalid:
        return Verdict(False, None, f"invalid: {invalid}; gold {problem.answer}")
    correct, reason = math_answers.equal(said, problem.answer)
    return Verdict(correct, math_answers.normalise(said), reason)


def grade_many(outputs: Sequence[str], problems: Sequence[Problem]) -> list[Verdict]:
    """Judge outputs[i] against problems[i]."""
    return [grade(output, problem) for output, problem in zip(outputs, problems, strict=True)]


def extract(output: str, problem: Problem) -> str | None:
    """The canonical answer the output gives, or None if it is invalid. Does not compare with the gold answer."""
    try:
        return _read(output, problem)
    except _Invalid:
        return None


def _read(output: str, problem: Problem) -> str:
    if problem.kind == "math":
        return math_answers.normalise(math_answers.extract(output))
    return _reader(problem)(_answer_line(output), problem)


def _reader(problem: Problem) -> Callable[[str, Problem], str]:
    if problem.kind not in _READERS:
        raise UsageError(
            f"{problem.id}: answers of kind {problem.kind!r} cannot be judged: allowed are {', '.join(_READERS)} "
            "and math; choose a dataset of one of those kinds"
        )
    return _READERS[problem.kind]


@lru_cache(maxsize=65536)
def _gold(problem: Problem) -> str:
    try:
        return _reader(problem)(_answer_line(f"The answer is {problem.answer}"), problem)
    except _Invalid as invalid:
        raise UsageError(
            f"{problem.id}: the gold answer {problem.answer!r} cannot be read as kind {problem.kind!r}: {invalid}; "
            f"allowed is {_GOLD[problem.kind]}; correct the problem"
        ) from None


# ------------------------------------------------------------------------------------ where the answer stands

# "the answer is", "the answer (Yes or No) is:", "Answer: ", and "A:" or "####" at the start of a line. Not so
# "The answer (in words) is twelve", said again after the digits, nor "Given answer:", the hint of a prompt.
_CUE = re.compile(
    r"\b(?<!Given )(?:[Aa]nswer|ANSWER)\*{0,2}(?! \((?:in )?(?:words|english|roman))(?: \([^()\n]{0,40}\))?"
    r"(?: ?:| (?:is|IS)\b):?|^A:|^####",
    re.MULTILINE,
)
_BOX = re.compile(r"\\boxed\{")
_LATEX = re.compile(r"\\(?:text|boxed)\{([^{}\n]{0,100})\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,40})\}\{(\d{1,40})\}")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\b(?:because|since)\b")
_ALPHANUMERIC = re.compile(r"[^\W_]")


def answer_start(text: str) -> int | None:
    """Where the words begin that announce a text's last answer ("the answer is", "####", a box); None without any."""
    starts = [cue.start() for cue in _CUE.finditer(text)] + [box.start() for box in _BOX.finditer(text)]
    return max(starts, default=None)


def before_answer(text: str, problem: Problem) -> str:
    from smlib.prompts import split_answer

    return split_answer(text)[0].rstrip()


def _answer_line(output: str) -> str:
    """The first line with a letter or digit after the last cue, at most 300 characters, without LaTeX."""
    text = before_next_question(output)
    start = -1
    for cue in _CUE.finditer(text):
        start = cue.end()
    box = text.rfind(r"\boxed{")
    if box > start and (start < 0 or "\n" in text[start:box]):
        start = box  # a box inside the answer sentence is part of it ("is \boxed{5} or \boxed{6}")
    if start < 0:
        raise _Invalid("no answer sentence")
    rest = text[start : start + 600]
    if "\\" in rest:
        rest = _LATEX_FRACTION.sub(r"\1/\2", rest).replace("\\$", "$").replace("\\%", "%")
        rest = _LATEX.sub(r"\1", _LATEX.sub(r"\1", rest))
    first = _ALPHANUMERIC.search(rest)
    if first is None:
        raise _Invalid("the answer sentence is empty")
    return rest[rest.rfind("\n", 0, first.start()) + 1 :].partition("\n")[0][:300].strip()


def _sentence(line: str) -> str:
    return _SENTENCE_END.split(line, maxsplit=1)[0]


# --------------------------------------------------------------------------------------------- the four kinds

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])[-−–]|\b(?:minus|negative) )?[$£€]?(?P<minus_after_currency>[-−])?(?<!\w)"
    rf"(?:(?P<whole>\d+) (?P<part>\d+/\d+)|(?P<value>{_DIGITS})(?: ?/ ?(?P<over>{_DIGITS}))?)",
    re.ASCII,
)
# 3-0, 3:46, 2, 80, 1 3 6, 1e5, 70 + 16, 2*age, 2 + age: the number found is only a piece of something else.
_GOES_ON = re.compile(
    r"[ )%]*(?:(?:[-−–+*/×÷:^,.x]|\\times)+ *[($£€]*|[$£€])?\d|[eE][-+]?\d|(?: [+*×÷] |\*)[A-Za-z(]", re.ASCII
)
# Left of "=": x - 10, 3(x), 2x, \frac{2}{x}, but neither "x" alone nor "3 x 6".
_UNKNOWN = re.compile(r"\d[xyz]\b|[-+*/({] *[xyz]\b|\b[xyz] *[-+*/)}]")
_PERCENT = re.compile(r" ?%| ?per ?cent", re.IGNORECASE)
_JOINS = {"or", "and", "to"}


def _number(line: str, problem: Problem) -> str:
    """The first number of the sentence, or of what stands right of its last "=" ("9 + 8 = 17" says 17).

    "10%" says 10 where the gold is written with "%" or the question speaks of percent (GSM8K asks "what
    percentage" and writes 10); elsewhere it may mean 0.1 and is invalid.
    """
    math_answers.refuse_not(line)
    left, _, sentence = _sentence(line).rpartition("=")
    if _UNKNOWN.search(left.rpartition("=")[2]):
        raise _Invalid("an equation that is not solved")
    found = _NUMBER.search(sentence)
    if found is None:
        raise _Invalid("no number in the answer sentence")
    if _GOES_ON.match(sentence, found.end()):
        raise _Invalid(f"{sentence.strip()[:40]!r} is not one number")
    if _PERCENT.match(sentence, found.end()) and not any(map(_PERCENT.search, (problem.answer, problem.question))):
        raise _Invalid("a percentage where none is asked for")
    said = _value(found)
    second = _NUMBER.search(sentence, found.end())
    if second:
        between = sentence[found.end() : second.start()].lower().replace(",", " ").split()
        if len(between) <= 4 and _JOINS.intersection(between) and _value(second) != said:
            raise _Invalid(f"several answers, {said} and {_value(second)}")
    return said


def _value(found: re.Match) -> str:
    """Canonical form of a matched number: "1,000.0" gives "1000", "3/4" gives "0.75", "2/6" gives "1/3"."""
    if len(found[0]) > 60:
        raise _Invalid("a number of more than 60 characters")
    try:
        if found["whole"]:
            exact = int(found["whole"]) + Fraction(found["part"])
        else:
            over = Fraction((found["over"] or "1").replace(",", ""))
            exact = Fraction(found["value"].replace(",", "")) / over
    except ZeroDivisionError:
        raise _Invalid("a division by zero") from None
    if found["minus"] or found["minus_after_currency"]:
        exact = -exact
    decimal = f"{(Decimal(exact.numerator) / exact.denominator).normalize():f}"
    return decimal if Fraction(decimal) == exact else str(exact)


def _is_rounded(gold: str, said: str) -> bool:
    """AddSub and SingleEq print floats as gold (0.6666666666666666): 2/3 is that number."""
    return len(gold.partition(".")[2]) >= 10 and abs(Fraction(gold) - Fraction(said)) < Fraction(1, 10**9)


_FILLER = r"[\W_]*(?:(?:the|correct|option|choice|letter|most|either|to|be|[a-z]+ly)\W+){0,5}"
# A bare "A" before a small letter is an article ("A movie"), unless it is joined or explained ("A or B").
_BARE = r"(?!A (?!or\b|and\b|is\b)[a-z])[A-Z](?![\w'’])"
_LABEL = re.compile(rf"(?i:{_FILLER})(?:\(([A-Za-z])\)|({_BARE}))")
_PARENTHESISED = re.compile(r"\(([A-Z])\)")
_ANOTHER_LABEL = re.compile(rf"(?:\b(?:or|and|nor)\b(?: [a-z]+)?|[,;/&]) *\(?({_BARE})")


def _choice(line: str, problem: Problem) -> str:
    """The letter of the option named by its label, or by its exact text."""
    choices = problem.choices
    allowed = LETTERS[: len(choices) or 5]
    sentence = _sentence(line)
    for text in (line, sentence):
        key = _option_key(text)
        named = [allowed[i] for i, option in enumerate(choices) if _option_key(option) == key]
        if len(named) == 1 and not (len(key) == 1 and key.isalpha()):
            return named[0]
    math_answers.refuse_not(line)
    found = _LABEL.match(sentence) or _PARENTHESISED.search(sentence)
    if found is None:
        raise _Invalid("no option in the answer sentence")
    letter = found[found.lastindex].upper()
    if letter not in allowed:
        raise _Invalid(f"{letter} is not one of the options A to {allowed[-1]}")
    for other in _ANOTHER_LABEL.findall(sentence, found.end()):
        if other != letter and other in allowed:
            raise _Invalid(f"several answers, {letter} and {other}")
    return letter


def _option_key(text: str) -> str:
    return text.strip(" \t.:*\"'“”").casefold()


_YES_NO = re.compile(rf"{_FILLER}(yes|no)\b", re.IGNORECASE)
_ANOTHER_YES_NO = re.compile(r"\W*(?:\b(?:or|and)\b|/)\W*(yes|no)\b", re.IGNORECASE)


def _yes_no(line: str, problem: Problem) -> str:
    found = _YES_NO.match(line)
    if found is None:
        raise _Invalid("the answer sentence begins with neither yes nor no")
    said = found[1].lower()
    other = _ANOTHER_YES_NO.match(line, found.end())
    if other and other[1].lower() != said:
        raise _Invalid("several answers, yes and no")
    return said


_QUOTED = re.compile(r"[\"“]([^\"“”]{1,100})[\"”]")
_BETWEEN_LETTERS = re.compile(r"[\s,\-–.:*\"'“”‘’]+")


def _letters(line: str, problem: Problem) -> str:
    """One word, or letters spelled one by one ("n-a-e-y"); quotes mark the word inside a longer sentence."""
    sentence = _sentence(line)
    quoted = set(_QUOTED.findall(sentence))
    if len(quoted) > 1:
        raise _Invalid("several quoted answers")
    parts = [part for part in _BETWEEN_LETTERS.split(quoted.pop() if quoted else sentence) if part]
    word = unicodedata.normalize("NFC", "".join(parts)).lower()
    if not word.isalpha() or (len(parts) > 1 and max(map(len, parts)) > 1):
        raise _Invalid(f"{sentence.strip()[:40]!r} is not one word")
    return word


_READERS = {"number": _number, "choice": _choice, "yes_no": _yes_no, "letters": _letters}
# What a gold answer may be, in words for the one who has to correct it.
_GOLD = {
    "number": "one number, as 18, -3, 3/4 or 10%",
    "choice": "the letter of one of the options",
    "yes_no": "yes or no",
    "letters": "one word of letters, as yajo",
}
