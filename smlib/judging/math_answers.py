r"""Judge MATH answers: find the answer in a text, bring it to one form, and compare it with the gold answer.

Strings that are equal after `normalise` are right. Only formulas that are written differently go to math-verify
(see `math_worker`), and only the formulas: brackets, lists, sets, intervals, matrices and units are compared
here, because math-verify takes (1,2) for {1,2}, 5 cm for 5 m, 10% for 0.1, 11 in base 2 for 11, and 2(3) for 5.

What counts as equal, where LaTeX leaves a choice:
- A comma list and a set {...} are roots in any order; (a,b) and matrices have an order; (a,b) is not [a,b].
- A unit, "%", "°" or "\$" may be missing on one side, as in most gold answers; two different ones are unequal.
  "10\%" is never 0.1. The gold answer may leave "%" out only above 1: the gold 0.5 may be a probability.
- "x=5" says 5, and 5 is right where the gold is "x=5"; "y=5" is not. Where the gold is "y=2x+3", its right side alone
  is not right. "x \in [1,2]" says [1,2], and so does "1 \le x \le 2".
- "1,234" is a number and "1, 234" a list. "2\frac{1}{2}" and "2 1/2" are 5/2.
- Decimals are exact: 0.5 is 1/2, 0.333 is not 1/3. A number in a base (1011_2) must be written like the gold.
- Words (three letters and more) must be the same, whatever their case: math-verify would take "seat" for "east".
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from smlib.judging import wording
from smlib.judging.math_worker import Gone, Worker
from smlib.problems.prompts import before_next_question

LONGEST = 500  # characters of an answer; the longest gold answers of MATH have some 200


class Invalid(Exception):
    """The text holds no single answer; the message says why."""


def refuse(reason: str | None) -> None:
    """Raise Invalid if there is a reason to."""
    if reason:
        raise Invalid(reason)


_worker = Worker()


def equal(said: str, gold: str, *, seconds: float = 5.0) -> tuple[bool, str]:
    r"""Whether the answer said equals the gold answer, and a phrase that says what was compared.

    Both in LaTeX, as `extract` gives them. Formulas that take longer than `seconds` of processor time to compare
    count as unequal; they are compared anew when they are asked for again.

        >>> equal(r"\dfrac12", "0.5")
        (True, 'said \\frac{1}{2}, gold \\frac{1}{2}')
    """
    try:
        return _compared(said, gold, seconds)
    except Gone as gone:
        return False, f"{gone}: said {normalise(said)}, gold {normalise(gold)}"


@lru_cache(maxsize=65536)  # keeps verdicts alone: Gone passes through it
def _compared(said: str, gold: str, seconds: float) -> tuple[bool, str]:
    (left, unit), (right, gold_unit) = _read(said), _read(gold)
    what = f"said {left.text}, gold {right.text}"
    if not _units_agree(unit, gold_unit, right.text):
        return False, f"{what}: units {unit} and {gold_unit or 'none'}"
    return _same(left, _value_of(right, left), lambda a, b: _worker.equal(a, b, seconds)), what


def normalise(answer: str) -> str:
    r"""One form for answers that differ only in how they are written; units are dropped, lists sorted.

        >>> normalise(r"$\dfrac{2}{4}$"), normalise("1{,}000\\text{ cm}"), normalise(r"\pm 3")
        ('\\frac{1}{2}', '1000', '-3, 3')

    "" means that there is nothing to compare.
    """
    return _read(answer)[0].text


# --------------------------------------------------------------------------------------- where the answer stands

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_UNBRACED = re.compile(r"[^\s$]+")
_CUE = re.compile(r"\b(?<!Given )(?:[Aa]nswer|ANSWER)\*{0,2}(?: \([^()\n]{0,40}\))?(?: ?:| (?:is|IS)\b):?")
_BOX_AROUND = re.compile(r"(?:\\(?:boxed|fbox|text[a-z]*|math[a-z]*|bf|displaystyle|[lL]arge|[hH]uge)\s*\{\s*)+$")
_LAST_SENTENCE = re.compile(r"[.!?]\s|\b(?:because|since)\b")
_DISPLAY = re.compile(r"\$\$([^$]{1,1000})\$\$|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(
    r"[.!?](?=\s|\*|\$|$)|,?\s+(?:because|since|which|where)\b|,\s+(?:so|as)\b|\n", re.IGNORECASE
)
_FILLER = re.compile(r"[\s*:=]*(?:(?:the|therefore|thus|simply|just|indeed|equal to|given by)\b[\s:*]*)*")
_NOT = re.compile(r"[\W_]*not\b", re.IGNORECASE)
_OR = re.compile(r"\bor\b")
OR_BEFORE = re.compile(r"\bor\b[\s$,]*(?:maybe|perhaps|possibly|even)?[\s$]*(?:\w{1,3}\s*=\s*)?$")
_OR_AFTER = re.compile(r"[\s$,.)]*\bor\b")
# Between two boxes that are both offered: marks alone, or these words, within a sentence.
_JOINED = re.compile(
    r"(?:[^\w\n.!?\\]|\\(?:q?quad|text|mbox)(?![a-z])"
    r"|(?<![a-z])(?:and|or|maybe|perhaps|possibly|otherwise|else|vs|versus)\b)*(?:[,;]\s*)?(?:\w{1,3}\s*=\s*)?[\s$]*(?<!\n)"
)
# -\boxed{5}, 10^{\boxed{5}}, \boxed{5}\sqrt{2}, "\boxed{5} million": the answer is more than the box.
FORMULA_BEFORE = re.compile(r"(?:(?<=\S)\s*[-+/]|\d|[\^_]\{?|\\(?:cdot|times|pm|[dtc]?frac\{|sqrt\{))\s*$|^-$")
_FORMULA_AFTER = re.compile(
    r"[A-Za-z\d(]|\s*(?:[-+/_]|\^(?!\s*\{?\s*\\circ)|\\(?:cdot|times|pm|sqrt|pi|[dtc]?frac))"
    rf"|[\s$]*(?:\\[a-z]+\{{)?\s*(?:{'|'.join(wording.SCALES)})"
)
ANNOUNCEMENTS = (_CUE, _BOX)  # what announces an answer


def extract(output: str) -> str:
    r"""The answer of a solution, in LaTeX as written: the last \boxed{...} or answer sentence before a next "Q:".

    A box after the last answer sentence's lead is the answer. Raises Invalid where there is none, where the box is
    cut off or only a part of a formula, and where "or" stands between two different answers outside one box.

        >>> extract(r"So the answer is $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    text = before_next_question(output)
    cues, boxes = list(_CUE.finditer(text)), list(_BOX.finditer(text))
    if not cues and not boxes:
        raise Invalid("no box and no answer sentence")
    start = cues[-1].end() if cues else 0
    refuse(cues and wording.offered_before(text[: cues[-1].start()]))
    if boxes and boxes[-1].start() >= start:
        said = _boxed(text, boxes, start)
    else:
        said = _sentence(text[start : start + 3 * LONGEST])
    if len(said) > LONGEST:
        raise Invalid(f"an answer of more than {LONGEST} characters")
    shape, _ = _read(said)
    if not shape.text:
        raise Invalid("the answer is empty")
    if shape.kind == "unbalanced":
        raise Invalid(f"the brackets of {said[:40]!r} do not match")
    return said


def _boxed(text: str, boxes: Sequence[re.Match], start: int) -> str:
    """The content of the last box, if what stands beside it does not make it a part or one of several."""
    box = boxes[-1]
    said, end = _content(text, box.end())
    before = text[max(start, box.start() - LONGEST) : box.start()].rpartition("\n")[2]
    after = text[end : end + LONGEST]
    refuse_before_box(before, at_least=start > 0)
    if _FORMULA_AFTER.match(after):
        raise Invalid("the box holds only a part of the formula")
    refuse(wording.denied_after(after) or wording.taken_back("".join(_SENTENCE_END.split(after, maxsplit=1)[1:])))
    others = []
    if match := OR_BEFORE.search(before):
        others.append(before[: match.start()])
    if match := _OR_AFTER.match(after):
        others.append(_SENTENCE_END.split(after[match.end() :], maxsplit=1)[0])
    if len(boxes) > 1:
        other, other_end = _content(text, boxes[-2].end())
        if other_end > box.start() or _JOINED.fullmatch(text, other_end, box.start()):
            others.append(other)
    _refuse_several([said, *others])
    return said.strip()


def refuse_before_box(before: str, *, at_least: bool) -> None:
    """Raise Invalid if the words of a line before its box deny or bound the answer, or make the box a piece of it.

    at_least: "at least" bounds it as well. Without an answer sentence, "we need at least" and a box is no bound.
    """
    before = _BOX_AROUND.sub("", before)
    if FORMULA_BEFORE.search(before) or wording.piece_before(before):
        raise Invalid("the box holds only a part of the formula")
    sentence = _LAST_SENTENCE.split(before)[-1]
    refuse(wording.denied(sentence) or wording.bounded(sentence, at_least=at_least))


def _content(text: str, start: int) -> tuple[str, int]:
    """What a box holds and where it ends: balanced braces, or without braces what stands before a space."""
    if not text.startswith("{", start):
        match = _UNBRACED.match(text, start)
        return (match[0].rstrip(".,;"), match.end()) if match else ("", start)
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start : start + 4 * LONGEST], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : start + match.start()], start + match.end()
    raise Invalid("the box is not closed")


def _sentence(rest: str) -> str:
    rest = _DISPLAY.sub(lambda match: f"${' '.join((match[1] or match[2]).split())}$", rest, count=1)
    rest = rest[_FILLER.match(rest).end() :]
    sentence, *more = _SENTENCE_END.split(rest, maxsplit=1)
    refuse(wording.taken_back("".join(more)))
    sentence = sentence.strip(" *")
    while sentence.endswith("}") and sentence.count("}") > sentence.count("{"):
        sentence = sentence[:-1].strip()  # the box around "The answer is 5"
    if _NOT.match(sentence):
        raise Invalid("the answer sentence only says what the answer is not")
    alternatives = _OR.split(sentence)
    _refuse_several(alternatives)
    return alternatives[0].strip()


def _refuse_several(answers: Sequence[str]) -> None:
    for answer in answers[1:]:
        if normalise(_BOX.sub("", answer)[: 2 * LONGEST]) != normalise(answers[0][: 2 * LONGEST]):
            raise Invalid(f"several answers, {answers[0].strip()[:40]} and {answer.strip()[:40]}")


# ------------------------------------------------------------------------------------- one form for each answer

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "×": r"\cdot ", "·": r"\cdot ", "∪": r"\cup ", "±": r"\pm "}
    | {"≤": r"\le ", "≥": r"\ge ", "∈": r"\in ", "²": "^{2}", "³": "^{3}", "°": r"^\circ ", "\n": " ", "\t": " "}
)
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname|emph)"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"(?<=\d)(?:\{,\}|,\\!|\\[,!; ])(?=\d{3}(?!\d))", ""),  # 1{,}000 and 1,\!000
        (r"(?<!\\)\\[!,;: ]|~|\\(?:q?quad|displaystyle|textstyle|limits|rm|bf)(?![A-Za-z])", " "),
        (r"(?<!\\)\$|(?<!\\)\\[()\[\]]", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\leq(?:slant)?(?![A-Za-z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(lt|gt)(?![A-Za-z])", lambda match: "<" if match[1] == "lt" else ">"),
        (r"\\times(?![A-Za-z])|\*", r"\\cdot "),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:emptyset|varnothing)(?![A-Za-z])", r"\\{\\}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\%", "%"),
        (_TEXT + r"\s*\{\s*(m|s|g|h|L)\s*\}", lambda match: f" {_LETTER_UNITS[match[1]]} "),
        (_TEXT + r"\s*\{([^{}]*)\}", r" \1 "),
        (_TEXT + r"\s*\{([^{}]*)\}", r" \1 "),
        (r"([\^_])\s*(-?\d+|[A-Za-z])", r"\1{\2}"),
        (r"(\\(?:frac|binom|sqrt(?:\[\d+\])?)(?![A-Za-z]))\s*(\d|[A-Za-z])", r"\1{\2}"),
        (r"(\\(?:frac|binom)\s*\{[^{}]*\})\s*(\d|[A-Za-z])", r"\1{\2}"),
        (r"\s+", " "),
        (r" ?,? ?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]) ?", ", "),
    ]
]
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")


def _clean(answer: str) -> str:
    text = wording.plain(answer.translate(_UNICODE))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;:=").rstrip(" .,;:=")
    return _THOUSANDS.sub(lambda match: _without_commas(text[: match.start()], match[0]), text)


def _without_commas(before: str, number: str) -> str:
    """1,234 is a number, but (1,234) is a pair."""
    depth = sum(map(before.count, "([")) - sum(map(before.count, ")]")) + before.count(r"\{") - before.count(r"\}")
    return number if depth > 0 else number.replace(",", "")


_LETTER_UNITS = {"m": "meter", "s": "second", "g": "gram", "h": "hour", "L": "liter"}
# The first name of each line stands for the others. What is not here stays part of the answer: 5 million is not 5.
_UNIT_NAMES = """
% percent|$ dollar dollars|cent cents|° degree degrees|celsius|fahrenheit|radian radians
mm millimeter millimeters|cm centimeter centimeters centimetres|meter meters metre metres|km kilometer kilometers
inch inches in|foot feet ft|yard yards yd|mile miles mi|mph|kph|acre acres|unit units
mg|gram grams|kg kilogram kilograms|ounce ounces oz|pound pounds lb lbs|ton tons
ml milliliter milliliters|liter liters litre litres|cup cups|quart quarts|gallon gallons
second seconds sec|minute minutes min|hour hours hr hrs|day days|week weeks|month months|year years
person people|student students|child children|boy boys|girl girls|man men|woman women|way ways|point points
"""
_UNITS = {name: line.split()[0] for line in re.split(r"[|\n]", _UNIT_NAMES) if line for name in line.split()}
_UNIT = re.compile(
    r"(?:\s*(?:[%°/]|(?<![A-Za-z\\])(?:per|square|sq\.?|cubic|cu\.?|"
    + "|".join(sorted((name for name in _UNITS if name.isalpha()), key=len, reverse=True))
    + r")(?![A-Za-z])(?:\s*\^\{[23]\})?))+\.?$"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")


def _split_unit(text: str) -> tuple[str, str]:
    """(value, canonical unit); "" for no unit, and for "units", which name none."""
    if text.startswith(r"\$"):
        return text[2:].lstrip(" ,;:="), "$"
    match = _UNIT.search(text)
    value = text[: match.start()].strip() if match else ""
    if not re.search(r"[\w)}\]!|]$", value) or ("°" in match[0] and _TRIGONOMETRIC.search(value)):
        return text, ""
    power, names = "", []
    for word in re.findall(r"[a-z]+|[%°/]|\^\{\d\}", match[0].lower()):
        if word in ("square", "sq", "cubic", "cu"):
            power = "^{2}" if word.startswith("s") else "^{3}"
        else:
            names.append(_UNITS.get(word, "/" if word == "per" else word) + power)
            power = ""
    if not names or names[0] == "/":
        return text, ""
    return value, "" if names[0].startswith("unit") else "".join(names)


def _units_agree(said: str, gold: str, value: str) -> bool:
    if said == "%" and not gold:
        number = _NUMBER.fullmatch(value)
        return number is not None and (_exact(number) or 0) > 1
    return not said or not gold or said == gold


@dataclass(frozen=True)
class _Shape:
    """An answer taken apart. kind: "value" (a formula, number or word), "list", "set", "union", a pair of brackets,
    a chain of relations, or a matrix with its width; text: the canonical form."""

    kind: str
    text: str
    parts: tuple["_Shape", ...] = ()


@lru_cache(maxsize=65536)
def _read(answer: str) -> tuple[_Shape, str]:
    """(shape, unit)"""
    value, unit = _split_unit(_clean(answer))
    tokens = _TOKEN.findall(value)
    return _shape(tokens) if _is_balanced(tokens) else _Shape("unbalanced", _join(tokens)), unit


_TOKEN = re.compile(r"\\[A-Za-z]+|\\[^A-Za-z\s]|\d+(?:\.\d+)?|\.\d+|[^\s\\]")
_OPEN = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}
_DEPTH = dict.fromkeys((*_OPEN, r"\begin"), 1) | dict.fromkeys((*_OPEN.values(), r"\end"), -1)
_ASCENDING, _DESCENDING = {"<": "<", r"\le": r"\le"}, {">": "<", r"\ge": r"\le"}
_UNORDERED = ("list", "set", "union")
_NESTED = 4  # deeper brackets are read as a formula


def _shape(tokens: Sequence[str], depth: int = 0) -> _Shape:
    tokens = _without_parentheses(tokens)
    if depth < _NESTED:
        for reader in (_as_list, _as_union, _as_chain, _as_bracket, _as_matrix):
            if shape := reader(tokens, depth + 1):
                return shape
    return _Shape("value", _value(_join(tokens)))


def _split(tokens: Sequence[str], *separators: str) -> tuple[list[Sequence[str]], list[str]]:
    """The parts between separators outside of brackets, and the separators."""
    parts, marks, start, depth = [], [], 0, 0
    for index, token in enumerate(tokens):
        depth += _DEPTH.get(token, 0)
        if depth == 0 and token in separators:
            parts.append(tokens[start:index])
            marks.append(token)
            start = index + 1
    return [*parts, tokens[start:]], marks


def _is_balanced(tokens: Sequence[str]) -> bool:
    depths = list(accumulate(_DEPTH.get(token, 0) for token in tokens))
    return not depths or (min(depths) >= 0 and depths[-1] == 0)


def _is_enclosed(tokens: Sequence[str]) -> bool:
    """Whether the first bracket is closed by the last token; (1,2] is a pair as well."""
    if len(tokens) < 2 or tokens[0] not in _OPEN or tokens[-1] not in _OPEN.values():
        return False
    depth = 0
    for index, token in enumerate(tokens):
        depth += _DEPTH.get(token, 0)
        if depth <= 0:
            return index == len(tokens) - 1
    return False


def _without_parentheses(tokens: Sequence[str]) -> Sequence[str]:
    while (
        tokens
        and tokens[0] in "({"
        and tokens[-1] == _OPEN[tokens[0]]
        and _is_enclosed(tokens)
        and len(_split(tokens[1:-1], ",", ";")[0]) == 1
    ):
        tokens = tokens[1:-1]
    if len(tokens) > 2 and tokens[0].isalpha() and tokens[1] == r"\in":
        tokens = tokens[2:]
    return tokens


def _as_list(tokens: Sequence[str], depth: int) -> _Shape | None:
    items, _ = _split(tokens, ",", ";")
    if list(tokens[:-1]).count(r"\pm") == 1 and len(items) == 1:
        at = list(tokens).index(r"\pm")
        first = [] if at == 0 or tokens[at - 1] in ("=", "(", "{") else ["+"]
        items = [[*tokens[:at], *sign, *tokens[at + 1 :]] for sign in (first, ["-"])]
    if len(items) < 2 or not all(items):
        return None
    shapes = [_shape(item, depth) for item in items]
    parts = [part for shape in shapes for part in (shape.parts if shape.kind == "list" else [shape])]
    return _unordered("list", parts, ", ")


def _as_union(tokens: Sequence[str], depth: int) -> _Shape | None:
    parts, _ = _split(tokens, r"\cup")
    return _unordered("union", [_shape(part, depth) for part in parts], r"\cup ") if len(parts) > 1 else None


def _unordered(kind: str, parts: Sequence[_Shape], separator: str) -> _Shape:
    parts = sorted(parts, key=lambda part: part.text)
    return _Shape(kind, separator.join(part.text for part in parts), tuple(parts))


def _as_chain(tokens: Sequence[str], depth: int) -> _Shape | None:
    """1<x\\le 2; with > and \\ge it is turned around."""
    parts, relations = _split(tokens, *_ASCENDING, *_DESCENDING)
    if not relations or not all(parts):
        return None
    if all(relation in _DESCENDING for relation in relations):
        parts, relations = parts[::-1], [_DESCENDING[relation] for relation in relations[::-1]]
    if not all(relation in _ASCENDING for relation in relations):
        return None
    shapes = tuple(_shape(part, depth) for part in parts)
    text = _join([piece for pair in zip(shapes, [*relations, ""], strict=True) for piece in (pair[0].text, pair[1])])
    return _Shape("".join(relations), text, shapes)


def _as_bracket(tokens: Sequence[str], depth: int) -> _Shape | None:
    if not _is_enclosed(tokens):
        return None
    items, _ = _split(tokens[1:-1], ",")
    if tokens[0] in (r"\{", "{"):
        shape = _unordered("set", [_shape(item, depth) for item in items if item], ", ")
        return _Shape("set", rf"\{{{shape.text}\}}", shape.parts) if tokens[-1] == _OPEN[tokens[0]] else None
    if len(items) < 2 or not all(items):
        return None
    parts = tuple(_shape(item, depth) for item in items)
    return _Shape(tokens[0] + tokens[-1], f"{tokens[0]}{', '.join(part.text for part in parts)}{tokens[-1]}", parts)


_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.+)\\end\{[pb]matrix\}")


def _as_matrix(tokens: Sequence[str], depth: int) -> _Shape | None:
    """Round and square brackets alike; a determinant (vmatrix) is a formula."""
    match = _MATRIX.fullmatch("".join(tokens)) if tokens and tokens[0] == r"\begin" else None
    if not match:
        return None
    inner = [*tokens[tokens.index("}") + 1 : len(tokens) - 1 - tokens[::-1].index(r"\end")]]
    rows = [_split(row, "&")[0] for row in _split(inner, r"\\")[0] if row]
    if len({len(row) for row in rows}) != 1 or r"\begin" in inner:
        return None
    parts = tuple(_shape(cell, depth) for row in rows for cell in row)
    width = len(rows[0])
    lines = ["&".join(part.text for part in parts[at : at + width]) for at in range(0, len(parts), width)]
    return _Shape(f"matrix {width}", r"\begin{pmatrix}" + r"\\".join(lines) + r"\end{pmatrix}", parts)


_COMMAND_AT_END = re.compile(r"(?:.*[^A-Za-z\\])?\\[A-Za-z]+", re.DOTALL)


def _join(tokens: Sequence[str]) -> str:
    """Tokens with a space only where they would run together: after a command, and between two numbers."""
    return "".join(
        f" {token}" if _runs_on(before, token) else token for before, token in zip(["", *tokens], tokens, strict=False)
    )


def _runs_on(before: str, token: str) -> bool:
    if token[:1].isalpha():
        return bool(_COMMAND_AT_END.fullmatch(before))
    return before[-1:].isdigit() and token[:1].isdigit()


_DECIMAL = r"(?:\d{1,60}(?:\.\d{1,60})?|\.\d{1,60})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<whole>\d{{1,60}}) ?(?:\\frac\{{(?P<a>\d{{1,60}})\}}\{{(?P<b>\d{{1,60}})\}}"
    rf"|(?<= )(?P<c>\d{{1,60}})/(?P<d>\d{{1,60}}))"
    rf"|\\frac\{{(?P<top>[+-]?{_DECIMAL})\}}\{{(?P<bottom>[+-]?{_DECIMAL})\}}"
    rf"|(?P<over>{_DECIMAL})/(?P<under>{_DECIMAL})|(?P<plain>{_DECIMAL}))",
    re.ASCII,
)


def _value(text: str) -> str:
    """Numbers as a reduced fraction, words in small letters, anything else as it is."""
    number = _NUMBER.fullmatch(text)
    exact = _exact(number) if number else None
    if exact is not None:
        sign, size = "-" if exact < 0 else "", abs(exact)
        return f"{sign}{size}" if size.denominator == 1 else rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"
    return text.lower() if re.fullmatch(r"[A-Za-z]{3,}", text) else text


def _exact(number: re.Match) -> Fraction | None:
    part = {name: Fraction(digits) for name, digits in number.groupdict().items() if digits and name != "sign"}
    above = next(part[name] for name in ("a", "c", "top", "over", "plain") if name in part)
    below = next((part[name] for name in ("b", "d", "bottom", "under") if name in part), Fraction(1))
    if below == 0 or ("whole" in part and above >= below):  # 5\frac{3}{2} may be a product
        return None
    return (part.get("whole", 0) + above / below) * (-1 if number["sign"] == "-" else 1)


# ---------------------------------------------------------------------------------------------- the comparison


def _same(said: _Shape, gold: _Shape, ask: Callable[[str, str], bool]) -> bool:
    if said.text == gold.text:
        return True
    if "=" in said.text and "=" not in gold.text and said.kind == "value":
        return _same(_right_side(said), gold, ask)
    if said.kind == gold.kind == "value":
        return _may_be_equal(said.text, gold.text) and ask(_explicit(said.text), _explicit(gold.text))
    said, gold = _as_interval(said, gold.kind), _as_interval(gold, said.kind)
    roots = {said.kind, gold.kind} <= {"list", "set"}
    if (said.kind != gold.kind and not roots) or len(said.parts) != len(gold.parts):
        return False
    if said.kind in _UNORDERED:
        return _same_members(said.parts, gold.parts, ask)
    return all(_same(a, b, ask) for a, b in zip(said.parts, gold.parts, strict=True))


def _same_members(said: Sequence[_Shape], gold: Sequence[_Shape], ask: Callable[[str, str], bool]) -> bool:
    """Each member of one is a different member of the other."""
    common = Counter(part.text for part in said) & Counter(part.text for part in gold)
    left = _without(gold, common)
    for part in _without(said, common):
        partner = next((other for other in left if _same(part, other, ask)), None)
        if partner is None:
            return False
        left.remove(partner)
    return True


def _without(parts: Sequence[_Shape], texts: Counter) -> list[_Shape]:
    rest, left = [], texts.copy()
    for part in parts:
        if left[part.text] > 0:
            left[part.text] -= 1
        else:
            rest.append(part)
    return rest


_NAME = re.compile(r"(?:[A-Za-z]+|\\[a-z]+)'*(?:_\{\w+\})?(?:\([\w,]+\))?|\([A-Za-z](?:,[A-Za-z])+\)")


def _right_side(said: _Shape) -> _Shape:
    """The right side of "x=5" and "2+3=5"; an equation that is not solved (2x=10, x=y) stays as it is."""
    *left, right = (side for side in said.text.split("="))
    name = _NAME.fullmatch(left[0])
    if not name and any(re.search(r"[A-Za-z]", re.sub(r"\\[a-z]+", "", side)) for side in left):
        return _Shape("equation", said.text.replace("=", " = "))
    return _shape(_TOKEN.findall(right))


def _value_of(gold: _Shape, said: _Shape) -> _Shape:
    """The 5 of the gold "x=5", for an answer that leaves the name out; y=2x+3 stays as it is."""
    name, _, value = gold.text.partition("=")
    if gold.kind != "value" or not value or "=" in said.text + value or not _NAME.fullmatch(name) or _letters(value):
        return gold
    return _shape(_TOKEN.findall(value))


_INTERVAL_KINDS = ("()", "[]", "(]", "[)")


def _as_interval(chain: _Shape, other: str) -> _Shape:
    r"""The interval that a chain describes, [1,2) for "1 \le x<2", if the other side is an interval; else the chain."""
    relations = re.findall(r"<|\\le", chain.kind)
    if other not in _INTERVAL_KINDS or not relations or len(chain.parts) != len(relations) + 1:
        return chain
    ends, name = list(chain.parts), re.compile(r"[A-Za-z]")
    if len(relations) == 1 and name.fullmatch(ends[1].text):
        ends.append(_Shape("value", r"\infty"))
        relations.append("<")
    elif len(relations) == 1 and name.fullmatch(ends[0].text):
        ends.insert(0, _Shape("value", r"-\infty"))
        relations.insert(0, "<")
    if len(ends) != 3 or not name.fullmatch(ends[1].text):
        return chain
    kind = ("(" if relations[0] == "<" else "[") + (")" if relations[1] == "<" else "]")
    return _Shape(kind, f"{kind[0]}{ends[0].text}, {ends[2].text}{kind[1]}", (ends[0], ends[2]))


_COMMANDS = {
    "\\" + name
    for names in (
        "frac sqrt binom cdot pi infty log ln exp lfloor rfloor lceil rceil",
        "sin cos tan cot sec csc arcsin arccos arctan",
        "alpha beta gamma delta theta lambda mu phi omega sigma rho",
    )
    for name in names.split(" ")
}
_MARKS = frozenset("+-/^_(){}[]|!=")
# What math-verify reads in its own way, or a reader in two: 1 2 (for it 3), 5\frac{3}{2}, 2{3} (for it 5), 1011_2,
# x^2^3, 1/2x, and \log without a base (for it 10).
_AMBIGUOUS = re.compile(
    r"\d \d|\\log(?!_)|\d\\frac\{\d+\}\{\d+\}|[\d)!|]\{|[\d)]_|\^\{[^{}]*\}\^"
    r"|/(?:\d++|[A-Za-z]|\\[a-z]++|\([^()]*\)) ?[A-Za-z\\(]"
)
_WORD = re.compile(r"[A-Za-z]{3,}")


def _may_be_equal(said: str, gold: str) -> bool:
    """Whether math-verify may be asked: two formulas, of one meaning each, in the same letters."""
    if gold.isalpha() or said.count("=") != gold.count("=") or gold.count("=") > 1:
        return False
    if _NUMBER.fullmatch(said) and _NUMBER.fullmatch(gold):
        return False  # both in the one form of their value
    return _letters(said) == _letters(gold) and all(map(_is_formula, (said, gold)))


def _letters(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text)))


def _is_formula(text: str) -> bool:
    known = all(
        token in _COMMANDS
        or token in _MARKS
        or (token.isascii() and (token[0].isdigit() or token.isalpha() or token[0] == "."))
        for token in _TOKEN.findall(text)
    )
    return known and not _AMBIGUOUS.search(text) and not _WORD.search(re.sub(r"\\[A-Za-z]+", " ", text))


def _explicit(text: str) -> str:
    """The same formula with every decimal as a fraction, so that nothing is rounded, and with every product of
    numbers in brackets written out: math-verify reads 2(3) as the mixed number 2 + 3."""
    text = re.sub(r"(\d*)\.(\d+)", lambda match: rf"\frac{{{match[1]}{match[2]}}}{{1{'0' * len(match[2])}}}", text)
    return re.sub(r"(?<=\d)\(|(?<=\\pi)\(|(?<=\))(?=[\d(])", lambda match: rf"\cdot {match[0]}", text)
