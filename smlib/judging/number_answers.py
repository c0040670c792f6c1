r"""Read the one number that an answer sentence says.

`read` gives it in canonical form, or raises Invalid: where the number is a piece of a formula, where the sentence
bounds or denies it, and where it offers another number besides.
"""

import re
from decimal import Decimal
from fractions import Fraction

from smlib.judging import wording
from smlib.judging.math_answers import Invalid, refuse
from smlib.problems.datasets import Problem

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])[-−–]|\b(?:minus|negative) )?(?P<currency>[$£€])?(?P<minus_after_currency>[-−])?(?<!\w)"
    rf"(?:(?P<whole>\d+) +(?P<part>\d+/\d+)|(?P<value>{_DIGITS})(?: ?/ ?(?P<over>{_DIGITS}))?)",
    re.ASCII,
)
# 18 (9 * 2): the number with its calculation
_CALCULATED = re.compile(r"[\s*$]*\([^()]*\d *(?:[*×·/+÷]| [-−–] ) *[$\d][^()]*\)")
# The number found is only a piece of something else: 3-0, 3:46, 2, 80, 18 | 20, 1e5, 70 + 16, 2*age, 2 + age, 18^2,
# 2(x), 18x, 18π, 18√2, $18!$, 18+, and 18 with a stroke through it.
_GOES_ON = re.compile(
    r"[\W_]*\d|[\s)%]*(?:x|\\times) *[($]*\d|[eE][-+]?\d|(?: [+*×÷] |\*)[A-Za-z(]| ?[-−–+*×÷/^] ?[b-hj-z](?![a-z])"
    r"|[\s)}$]*(?:\^|_\{|√|π|\\[A-Za-z]|pi\b)|\((?:[a-z](?![a-z])|\d)|[xyzni](?![A-Za-z])| x\b(?!-)"
    r"|[)\]]*!+ ?[$})]|[\u0300-\u036f\u20d0-\u20ff\ufe0f]|‰|[*\s)]*\+(?! *[A-Za-z(])",
    re.ASCII,
)
# Left of "=": x - 10, 3(x), 2x, \frac{2}{x}, but neither "x" alone nor "3 x 6".
_UNKNOWN = re.compile(r"\d[xyz]\b|[-+*/({] *[xyz]\b|\b[xyz] *[-+*/)}]")
# x = 17 or x = 18; x = 17, y = 18
_TWO_EQUATIONS = re.compile(
    rf"= *[-$]?(?P<value>{_DIGITS})(?: \w+)? *(?:[,;&|]|\b(?:and|or)\b) *"
    r"(?:(?:and|or|maybe|perhaps|else) +)*[$A-Za-z]\w* *= *$"
)
_COMMAND = re.compile(r"\\[A-Za-z]")  # \sqrt{16}
_PERCENT = re.compile(r"[ *)}$]*(?:%|(?:per ?cent|pct\b))", re.IGNORECASE)
_SCALE = re.compile(rf"[\s*_$)}}-]*({'|'.join(wording.SCALES)})s?\b", re.IGNORECASE)
# A multiplier that is not read, or that may be a unit (18K); "18m" is 18 meters, "$18m" is 18 million.
_OTHER_SCALE = re.compile(
    r"[\s*_$)}-]*(?i:lakhs?|crores?|score|gross|grand|myriads?|quadrillions?|thou|mio|mln|mn|bn|tn)\b"
    r"|[*)}$]* ?[kKMBT]\b"
)
_SMALL_SCALE = re.compile(r" ?[mbt]\b")
# 18 or more, 18 apples at least
_AT_LEAST = (
    r"(?:\w+ ){0,2}?(?:or (?:more|less|fewer|so|higher|lower|greater|above|below|over|under|beyond|none|neither)"
    r"|and (?:more|up|above|over|counting)|at (?:the )?(?:least|most|minimum|maximum)|(?:min|max)imum)\b"
)
# 18 and a half, 18 thirds, 18 point five, 18 squared, 18 times 2, 18 more than 3; a quarter is a coin as well
_PARTS = (
    r"(?:and (?:an?|one|two|three|four|five) (?:quarters?\b|{0})|{0}|point \w|squared\b|cubed\b|factorial\b|doubled\b"
    r"|halved\b|(?:degrees )?below zero|to the (?:power|\w+th)\b"
    r"|(?:times|plus|minus|over|mod|modulo|choose|divided by|multiplied by) *[$(]?\d"
    r"|(?:\w+ )?(?:more|less|fewer|greater|higher|lower|older|younger) than +\$?\d)"
).replace("{0}", rf"(?:{wording.PART}|\w+dths?)\b(?!-)")
# 4 hours 30 minutes
_SMALLER_UNIT = (
    r"(?:hours?|hrs?|h|minutes?|mins?|days?|weeks?|months?|years?|yrs?|feet|foot|ft|yards?|dollars?|pounds?|lbs?|kg|km"
    r"|meters?|m|gallons?)[ ,]+\d"
)
_MORE_TO_IT = re.compile(rf"[\s*$)}}-]*(?:{_AT_LEAST}|{_PARTS}|{_SMALLER_UNIT})", re.IGNORECASE)
_UP_TO_19 = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_UNITS = {word: value for value, word in enumerate(f"{_UP_TO_19} seventeen eighteen nineteen".split())}
_TWENTY_ON = "twenty thirty forty fifty sixty seventy eighty ninety"
_TENS = {word: 10 * value for value, word in enumerate(_TWENTY_ON.split(), 2)}
_IN_WORDS = re.compile(
    rf"(?:({'|'.join(_TENS)})\b[- ]?)?(?:({'|'.join(_UNITS)})\b)?(?!-?\w| (?:{'|'.join(wording.SCALES)}|and|point)\b)"
)
# What offers a second answer, however far from the first, and what may stand between it and that answer.
_OFFER = re.compile(
    r"\b(?:or|otherwise|alternatively|else|maybe|perhaps|possibly|but|versus|vs|to|through|and)\b[\W_]*?"
    r"(?:\b(?:maybe|perhaps|possibly|even|about|around|approximately|also|else|otherwise|rather|then|it|that|is|was|would"
    rf"|could|might|may|be|just|only|the|answer)\b[\W_]*?)*(?=[-−–$£€.]?\d|\b(?:{'|'.join((*_UNITS, *_TENS))})\b)",
    re.IGNORECASE,
)
_FAR = ("or", "otherwise", "alternatively", "else", "maybe", "perhaps", "possibly", "but", "versus", "vs")
_JOINS = {"or", "and", "to", "through", "thru", "till", "until", "maybe", "perhaps", "possibly", "versus", "vs", "wait"}
_JOINS |= {"but", "otherwise", "else", "alternatively", "no", "sorry", "actually", "mean"}
_TOGETHER = re.compile(r"\b(?:sum|product|difference|quotient|ratio|mean)\b", re.IGNORECASE)  # of 18 and 18
# 18 if it rains, 20 if not
_CASES = re.compile(
    r"\b(?:if|when|assuming|provided)\b.*\d.*\b(?:if|when|otherwise|else|unless)\b"
    r"|\bunless\b.*\d|, *(?:or +)?[$£€]?\d[\d.,]* +(?:\w+ +)?(?:if|when|otherwise|unless)\b|\bdepend(?:s|ing|ent)\b",
    re.IGNORECASE,
)


def read(sentence: str, line: str, problem: Problem) -> str:
    """The first number of the sentence, or of what stands right of its last "=" ("9 + 8 = 17" says 17).

    "10%" says 10 where the gold is written with "%" or the question speaks of percent (GSM8K asks "what
    percentage" and writes 10); elsewhere it may mean 0.1 and is invalid. "5 million" says 5000000, or 5 where the
    question asks how many million.
    """
    sentence = sentence.replace("=>", "=").replace("->", "→")
    left, equals, right = sentence.rpartition("=")
    if _UNKNOWN.search(left.rpartition("=")[2]):
        raise Invalid("an equation that is not solved")
    match = _NUMBER.search(right)
    if match is None:
        raise Invalid("no number in the answer sentence")
    before, after = right[: match.start()], right[match.end() :]
    words = left + equals + before
    refuse(wording.denied(words) or wording.bounded(words))
    if calculated := _CALCULATED.match(after):
        after = after[calculated.end() :]
    said, after = _scaled(match, after, problem)
    if _GOES_ON.match(after) or _MORE_TO_IT.match(after):
        raise Invalid(f"{right.strip()[:40]!r} is not one number")
    refuse(wording.piece_before(before) or (_COMMAND.search(before) and "a number in a formula"))
    if _PERCENT.match(after) and not any(map(_PERCENT.search, (problem.answer, problem.question))):
        raise Invalid("a percentage where none is asked for")
    refuse(wording.denied_after(after))
    _refuse_second(said, words, after, problem)
    return said


def _scaled(match: re.Match, after: str, problem: Problem) -> tuple[str, str]:
    """The value of a number with its multiplier word, and what stands after both."""
    if _OTHER_SCALE.match(after) or (match["currency"] and _SMALL_SCALE.match(after)):
        raise Invalid("a number with a multiplier that is not read")
    scale = _SCALE.match(after)
    if scale is None:
        return _value(match), after
    after = after[scale.end() :]
    if _SCALE.match(after) or _OTHER_SCALE.match(after):
        raise Invalid("a number with several multipliers")
    word = scale[1].lower()
    if re.search(rf"\bhow many (?:\w+ )?{word}|\bin {word}s", problem.question, re.IGNORECASE):
        return _value(match), after
    return _canonical(Fraction(_value(match)) * wording.SCALES[word]), after


def _refuse_second(said: str, before: str, after: str, problem: Problem) -> None:
    """Raise Invalid if the words around the number that is said offer another one."""
    equation = _TWO_EQUATIONS.search(before)
    if equation and _canonical(Fraction(equation["value"].replace(",", ""))) != said:
        raise Invalid(f"several answers, {equation['value']} and {said}")
    if not after or after.isspace():
        return
    if _CASES.search(after):
        raise Invalid("several answers, one for each case")
    second = _NUMBER.search(after)
    between = after[: second.start()].lower().replace(",", " ").split() if second else ()
    others = [second.start()] if len(between) <= 4 and _JOINS.intersection(between) else []
    for offer in _OFFER.finditer(after):
        if offer[0].lower().startswith(_FAR) or not after[: offer.start()].strip(" (,;"):
            others.append(offer.end())
    for start in others:
        other = _number_at(after, start, problem)
        if other != said or _TOGETHER.search(before):
            raise Invalid(f"several answers, {said} and {other or 'another'}")


def _number_at(text: str, start: int, problem: Problem) -> str | None:
    """The number that begins there, in digits or in words up to 99; None if it cannot be read."""
    if match := _NUMBER.match(text, start):
        return _scaled(match, text[match.end() :], problem)[0]
    match = _IN_WORDS.match(text.lower(), start)
    if not match or not match[0]:
        return None
    return str(_TENS.get(match[1], 0) + _UNITS.get(match[2], 0))


def _value(match: re.Match) -> str:
    """Canonical form of a matched number: "1,000.0" gives "1000", "3/4" gives "0.75", "2/6" gives "1/3"."""
    if len(match[0]) > 60:
        raise Invalid("a number of more than 60 characters")
    try:
        if match["whole"]:
            exact = int(match["whole"]) + Fraction(match["part"])
        else:
            over = Fraction((match["over"] or "1").replace(",", ""))
            exact = Fraction(match["value"].replace(",", "")) / over
    except ZeroDivisionError:
        raise Invalid("a division by zero") from None
    if match["minus"] or match["minus_after_currency"]:
        exact = -exact
    return _canonical(exact)


def _canonical(exact: Fraction) -> str:
    decimal = f"{(Decimal(exact.numerator) / exact.denominator).normalize():f}"
    return decimal if Fraction(decimal) == exact else str(exact)


def is_rounded(gold: str, said: str) -> bool:
    """AddSub and SingleEq print floats as gold (0.6666666666666666): 2/3 is that number."""
    return len(gold.partition(".")[2]) >= 10 and abs(Fraction(gold) - Fraction(said)) < Fraction(1, 10**9)


# "Answer: There are 15 trees. Then there are 21." may be the first step of a rationale.
_BEGINS_IN_WORDS = re.compile(r"\W*(?:[^\W\d]+\W+){2}")


def refuse_rationale(said: str, sentence: str, after: str) -> None:
    """Raise Invalid if the text after a sentence that begins in words ends with another number than it says."""
    numbers = list(_NUMBER.finditer(after)) if _BEGINS_IN_WORDS.match(sentence) else []
    if numbers and _value(numbers[-1]) != said:
        raise Invalid(f"a rationale that goes on after {said}")
