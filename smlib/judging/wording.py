r"""What the words and marks around a candidate say about it, for every kind of answer.

`plain` brings digits, blanks and thousands marks to one form. The other functions say, in a phrase for a reader, why a
candidate is no answer: it is denied ("not 18"), bounded ("more than 18"), a piece of a formula ("half of 18") or taken
back ("18. Or 20."). They look at no gold answer.
"""

import re
import unicodedata

# ----------------------------------------------------------------------------------- one form for what is written

# 9{,}500, 10\,000, 10,\!000, 1'000, 1_000, and the blanks that do not break a line (\xa0 stands for them all).
_THOUSANDS_MARK = re.compile(r"(?<=\d)(?:,?\\[,;:! ]|\{\\,\}|,?\{[,!]\}|,?\\thinspace ?|\\?_|['\xa0])(?=\d{3}(?!\d))")
_MARKS_TO_FIND = re.compile(r"[\\_'{\xa0]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_THIN_BLANKS = "\u00a0\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f"
_TURNED_AROUND = "\u202d\u202e"  # what follows is shown in another order than it is read
_SAME = (
    dict.fromkeys("’‘ʼ′´`＇", "'")
    | dict.fromkeys(_THIN_BLANKS, "\xa0")
    | dict.fromkeys(_TURNED_AROUND, "\u202e")
    | {"٬": ",", "٫": ".", "∕": "/", "⁄": "/", "‐": "-", "‑": "-", "∣": "|", "⇒": "=>"}
)


def plain(text: str) -> str:
    """The text with one form for digits, blanks and thousands marks, and without what is not seen.

    Digits of every script and of full width are 0-9, ² is ^2, ½ is 1/2, thin and no-break blanks are blanks. Between
    a digit and three more a thousands mark is a comma.
    """
    if not text.isascii():
        text = _BEYOND_ASCII.sub(lambda match: "".join(map(_plain, match[0])), text)
    if _MARKS_TO_FIND.search(text):
        text = _THOUSANDS_MARK.sub(",", text).replace("\xa0", " ")
    return text


def _plain(character: str) -> str:
    if character in _SAME:
        return _SAME[character]
    category, form = unicodedata.category(character), unicodedata.decomposition(character).partition(" ")[0]
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category == "Cf":
        return ""
    if form == "<fraction>":
        return " " + unicodedata.normalize("NFKD", character).replace("\u2044", "/")
    if form in ("<super>", "<sub>") or category in ("No", "Nl"):
        return ("_" if form == "<sub>" else "^") + unicodedata.normalize("NFKC", character)
    return unicodedata.normalize("NFKC", character) if form == "<wide>" or category == "Zs" else character


# ----------------------------------------------------------------------------------------- words before a candidate

_LINK = r"(?:be|been|equals?|to|the|an?|of|any(?:thing)?|answer|number|value|option|choice|letter|word|in|fact|going"
_LINK += r"|at|all|just|quite|correct|right|about|even|[a-z]+ly)"
# "not" and at most one other word, or words that leave something out, and then words that lead to the candidate. A
# comma begins something new ("not red, so (B)"), but not a pair of them ("not, I think, 18").
_DENIED = re.compile(
    r"(?:(?P<no>(?:\b(?:not|cannot|never)|n't)(?![\w']))(?:,[^,]{0,40},)?(?:[^\w,;:]*\w+)?"
    r"|(?P<but>(?:\b(?:neither|nor|without|except(?: for)?|excluding|besides|unlike(?:ly)?|hardly|avoid"
    r"|(?:any|every|all)\w*(?: \w+)? (?:but|save)|(?:other|rather) than|instead of|opposite of|far from"
    r"|different from|differs from|unequal to|rul(?:e|es|ed|ing) out|wrong|incorrect|false"
    r"|(?:eliminat|exclud|reject|discard|dismiss)\w+|cross(?:es|ed|ing)? out)\b:?|\\neq?(?![a-z])|≠|!=)))"
    rf"(?:[^\w,;:]*{_LINK}(?!\w))*[^\w,;:.]*$",
    re.IGNORECASE,
)
# A new subject or verb after the "not": "she does not sell it so 18", "those who do not pass are 18".
_NEW_CLAUSE = re.compile(
    r"\b(?:so|but|then|therefore|hence|thus|we|he|she|it|they|you|I|there|gets?|leav\w+|is|are|was|were)\b"
)
_UNKNOWN = re.compile(
    r"\b(?:unknown|undetermined|undefined|indeterminate|unsolvable|impossible)\b"
    r"(?=\W*[,;:(–—-]|\W*$|,? (?:but|and|or|maybe)\b)",
    re.IGNORECASE,
)
_NOT_FIRST = re.compile(r"[\W_]*not\b", re.IGNORECASE)


def denied(before: str) -> str | None:
    """Why what follows these words of a sentence is said not to be the answer; None if it is not said."""
    if not before or before.isspace():
        return None
    if _NOT_FIRST.match(before):
        return "the answer sentence only says what the answer is not"
    if _UNKNOWN.search(before):
        return "the answer sentence says that the answer is unknown"
    match = _DENIED.search(before)
    if match and not _NEW_CLAUSE.search(before, max(match.end("no"), match.end("but"))):
        return "the answer sentence only says what the answer is not"
    return None


_ABOUT = r"[\W_]*(?:(?:about|around|roughly|approximately|an?|the|another|that|say)[\W_]+)*$"
_COMPARED = (
    "more less fewer greater higher lower larger smaller bigger longer shorter older younger earlier later heavier "
    "lighter taller faster slower cheaper closer"
).replace(" ", "|")
# "cost more than $99" is left out: a published output says so, and its verdict is not to change. Nor do "left over" and
# "add up to" bound anything.
_BOUNDED = re.compile(
    rf"(?:\b(?:(?<!\bcost )(?:{_COMPARED}) than(?: or equal to)?"
    r"|(?<!add )(?<!adds )(?<!sum )(?<!sums )(?<!come )(?<!comes )up to|upwards? of|excess of"
    r"|as (?:many|much|few|little|high|low) as|(?<!left )over|under|above|below|beyond|beneath|exceed(?:s|ed|ing)?"
    r"|nearly|almost|close to|near|(?:short|shy) of)|\\(?:[lg](?:t|eq?)|[lg]eqslant)|[<>≤≥])" + _ABOUT,
    re.IGNORECASE,
)
_AT_LEAST = re.compile(r"\bat (?:least|most|the (?:very )?(?:least|most)|minimum|maximum)" + _ABOUT, re.IGNORECASE)


def bounded(before: str, *, at_least: bool = True) -> str | None:
    """Why what follows these words only bounds the answer; None if it does not. at_least: "at least" counts as well."""
    if not before or before.isspace():
        return None
    match = _BOUNDED.search(before) or (at_least and _AT_LEAST.search(before))
    return f"{match[0].strip()[:40]!r} only bounds the answer" if match else None


PART = r"hal(?:f|ves)|thirds?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?"
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES = "|".join(SCALES)
# half of 18, the square root of 16, twice 9, two times 9, log 100, a hundred and 18
_PIECE_WORDS = re.compile(
    rf"\b(?:(?:{PART}|quarters?|per ?cent|square|cube|root|multiple|power|reciprocal|inverse|negative|opposite|double"
    r"|triple|logarithm|remainder|most|some|rest) of|half|twice|thrice|double|triple|quadruple|sqrt|root|log|ln|lg|sin"
    rf"|cos|tan|plus|times|multiplied by|divided by|to the power(?: of)?|(?:{_SCALES})s?(?: and)?)"
    r"(?: the(?: number| value)?| number)?[\s({$*]*$|%\s*of[\s($]*$",
    re.IGNORECASE,
)
# x + 18, 2x/18, x^{18}, f(18), √16, -(18), |18|
_PIECE_MARKS = re.compile(
    r"(?:[\w)}\]](?: [-+*/×÷·^−–] |[-+*/×÷·^_−–])|[\^_√∛∜⌊⌈\u202e]|\||[-−–] ?(?=[({|\[$])"
    r"|\w(?=[({\[]))[\s({\[$]*$"
)


def piece_before(before: str) -> str | None:
    """Why the number after these words is a piece of a formula; None if it is not."""
    if not before or before.isspace():
        return None
    match = _PIECE_WORDS.search(before) or _PIECE_MARKS.search(before)
    return f"{match[0].strip()[:40]!r} stands before the number" if match else None


# ------------------------------------------------------------------------------------------ words after a candidate

# 18 is wrong, (A) cannot be it
_DENIED_AFTER = re.compile(
    r"[\s*$)}\]\"']*,? (?:(?:is|was|are|would be|must be|seems)(?:n't| not\b| (?:clearly |definitely )?"
    r"(?:wrong|incorrect|false|too|impossible|ruled|excluded|out)\b)|cannot\b|can't\b|can be (?:ruled|excluded))",
    re.IGNORECASE,
)
# What begins a sentence that takes the one before it back.
_SECOND_THOUGHT = re.compile(
    r"[\W_]*(?:or\b(?!,? in (?:other )?words)|otherwise\b|alternatively\b|else\b|wait\b|actually\b|sorry\b|oops\b"
    r"|hmm|correction\b|scratch that|on second thought|I mean\b|maybe\b|perhaps\b|possibly\b"
    r"|no[,:;—–-]+ *(?:wait|it|that|actually|sorry|the|\d)|but (?:it|that|the answer) (?:could|might|may)\b)",
    re.IGNORECASE,
)


def denied_after(after: str) -> str | None:
    """Why the words after a candidate say that it is not the answer; None if they do not."""
    return "the answer sentence says that this is wrong" if after and _DENIED_AFTER.match(after) else None


_OR = re.compile(
    r"\bor\b,?(?: (?:maybe|perhaps|possibly|else|even|that|so|the|my|final|correct)\b,?)*[\s*]*$", re.IGNORECASE
)


def offered_before(before: str) -> str | None:
    """Why an answer sentence is one of several: "17 or the answer is 18"; None if it is not."""
    return "several answers, joined by or" if _OR.search(before[-40:]) else None


def taken_back(rest: str) -> str | None:
    """Why the text after the answer sentence takes it back; None if it does not."""
    match = _SECOND_THOUGHT.match(rest) if rest else None
    return f"the answer sentence is followed by {match[0].strip()!r}" if match else None
