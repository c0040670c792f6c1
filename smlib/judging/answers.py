"""Find the final answer in a model's text and judge it against the gold answer.

One rule for every dataset: what stands before a next "Q:" counts, the last answer sentence in it is the answer, and
an answer that hedges ("A or B"), denies or bounds ("not 18", "more than 18") or cannot be read is invalid, which
counts as wrong. In doubt the verdict is "invalid": a reward that accepts a wrong answer teaches it. Numbers are read in
`smlib.judging.number_answers`, formulas in `smlib.judging.math_answers`; `smlib.judging.wording` knows the words that
make an answer doubtful.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from smlib.errors import UsageError
from smlib.judging import math_answers, number_answers, wording
from smlib.judging.math_answers import Invalid as _Invalid
from smlib.judging.math_answers import refuse
from smlib.problems.datasets import Problem
from smlib.problems.generators import LETTERS
from smlib.problems.prompts import before_next_question

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


def grade(problem: Problem, text: str) -> Verdict:
    """Judge one completion (prompt not included). Any text gives a Verdict.

    The continuation of a prompt that ends in "The answer is" must be graded as "The answer is" + text.
    Raises ValueError if the problem itself cannot be judged: an unknown kind, or a gold answer that is not of
    its kind or names no option.
    """
    if problem.kind == "math":
        return _grade_math(text, problem)
    gold = _gold(problem)
    try:
        said = _read(text, problem)
    except _Invalid as invalid:
        return Verdict(False, None, f"invalid: {invalid}; gold {gold}")
    correct = said == gold or (problem.kind == "number" and number_answers.is_rounded(gold, said))
    return Verdict(correct, said, f"said {said}, gold {gold}")


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first seen among equals. Invalid answers (None) have no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.get, default=None)


def majorities(stated: Iterable[tuple[str, str | None]]) -> dict[str, str | None]:
    """Question -> the `majority_vote` of its answers; stated: (question, answer)."""
    answers: dict[str, list[str | None]] = defaultdict(list)
    for identity, answer in stated:
        answers[identity].append(answer)
    return {identity: majority_vote(votes) for identity, votes in answers.items()}


def _grade_math(output: str, problem: Problem) -> Verdict:
    """Two formulas may be equal and yet differ as strings; see `math_answers` for what counts as equal."""
    if not math_answers.normalise(problem.answer):
        raise UsageError(f"{problem.id}: the gold answer {problem.answer!r} is empty; correct the problem")
    try:
        said = math_answers.extract(output)
    except _Invalid as invalid:
        return Verdict(False, None, f"invalid: {invalid}; gold {problem.answer}")
    correct, reason = math_answers.equal(said, problem.answer)
    return Verdict(correct, math_answers.normalise(said), reason)


def grade_many(problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
    """Judge texts[i] as an answer to problems[i]: the same arguments as a Reward takes."""
    return [grade(problem, text) for problem, text in zip(problems, texts, strict=True)]


def extract(problem: Problem, text: str) -> str | None:
    """The canonical answer that the text gives, or None if it is invalid. Does not compare with the gold answer."""
    try:
        return _read(text, problem)
    except _Invalid:
        return None


def _read(output: str, problem: Problem) -> str:
    if problem.kind == "math":
        return math_answers.normalise(math_answers.extract(output))
    reader = _reader(problem)
    line, rest, is_label = _answer_line(output)
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0]
    after = line[len(sentence) :] + rest
    refuse(wording.taken_back(after))
    said = reader(sentence, line, problem)
    if is_label and problem.kind == "number":
        number_answers.refuse_rationale(said, sentence, after)
    return said


def _reader(problem: Problem) -> Callable[[str, str, Problem], str]:
    if problem.kind not in _READERS:
        raise UsageError(
            f"{problem.id}: answers of kind {problem.kind!r} cannot be judged: allowed are {', '.join(_READERS)} "
            "and math; choose a dataset of one of those kinds"
        )
    return _READERS[problem.kind]


@lru_cache(maxsize=65536)
def _gold(problem: Problem) -> str:
    try:
        return _read(f"The answer is {problem.answer}", problem)
    except _Invalid as invalid:
        raise UsageError(
            f"{problem.id}: the gold answer {problem.answer!r} cannot be read as kind {problem.kind!r}: {invalid}; "
            f"allowed is {_GOLD[problem.kind]}; correct the problem"
        ) from None


# ------------------------------------------------------------------------------------ where the answer stands

# After "A:" an answer of few words. A rationale begins there as well ("A: There are 15 trees"), so no words may stand
# before a number.
_SHORT = (
    r"(?=\s*[^\w\n]*(?:(?:yes|no)\b|\(?[A-Za-z]\)?(?!\w)|(?:[^\W\d]++[^\w\n]*+){1,4}$"
    r"|\d[^A-Za-z\n]*+(?:[A-Za-z]++[^\w\n]*+){0,3}?(?:$|(?<=[.!?]\s)|(?=because\b|since\b))))"
)
# "the answer is", "the answer (Yes or No) is:", "Answer: ", and "A:" or "####" at the start of a line. Not so
# "The answer (in words) is twelve", said again after the digits, nor "Given answer:", the hint of a prompt.
_CUE = re.compile(
    r"\b(?<!Given )(?:[Aa]nswer|ANSWER)\*{0,2}(?! \((?:in )?(?:words|english|roman))(?: \([^()\n]{0,40}\))?"
    rf"(?: ?:| (?:is|IS)\b):?|^A:{_SHORT}|^####",
    re.MULTILINE,
)
_BOX = re.compile(r"\\boxed\{")
_JOINED_BOX = re.compile(r"\\boxed\{[^{}]*\}[\s$,;&|/]*(?:and\b|or\b|vs\b)?[\s$]*$")
# <<9*2=18>> of GSM8K, and tags as </s> and <answer>
_ANNOTATION = re.compile(r"<<[^<>\n]{0,200}>>|</?[A-Za-z|][^<>\n]{0,40}>")
_LATEX_FRACTION = re.compile(r"(?:(?<=\d) ?)?\\[dtc]?frac ?(?:\{(-?\d{1,40})\}|(\d)) ?(?:\{(\d{1,40})\}|(\d))")
_LATEX_BOX = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|emph|f?boxed|fbox)\{([^{}\n]{0,100})\}"
)
_LATEX_MARKS = [
    (re.compile(pattern), mark)
    for pattern, mark in [
        (r"\\(?:f?boxed|fbox|text)\{", " "),  # not closed
        (r"\\(?:left|right|displaystyle|q?quad|approx)(?![A-Za-z])|\\[,;:!()\[\] ]", " "),
        (r"\^ ?\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\(?:cdot|times)(?![A-Za-z])", "×"),
        (r"\\([$%&#_])", r"\1"),
        (r"\\n(?![A-Za-z])", "\n"),  # a line break, written as two characters
    ]
]
_SENTENCE_END = re.compile(r"(?<!\.)(?<!\bvs)[.!?](?=\s|$)|\b(?:because|since)\b")
_ALPHANUMERIC = re.compile(r"[^\W_]")


def answer_start(text: str) -> int | None:
    """Where the words begin that announce a text's last answer ("the answer is", "####", a box); None without any."""
    starts = [cue.start() for cue in _CUE.finditer(text)] + [box.start() for box in _BOX.finditer(text)]
    return max(starts, default=None)


# What leads to an announcement and says nothing without it: "So the", "Therefore, among A through E, the final", "**".
_LEAD_IN = re.compile(
    r"(?:(?<!\w)(?:so|thus|therefore|hence|then|and|finally|consequently|ultimately|accordingly|overall|the|an?|my|our"
    r"|your|this|that|which|final|correct|right|best|short|is|are|answer|result|we (?:get|have|find|conclude)"
    r"|I (?:think|believe|conclude|get)|(?:in|to) conclu(?:sion|de)|(?:this|which|that) (?:means|gives)|gives us"
    r"|among \(?A\)? through \(?[A-Z]\)?)(?!\w)[^\w\s]*|(?<!\S)[^\w\s]+|\s)+$",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\n|[.!?]+[\"'”’)\]]*(?=\s)")
_OPENING = "-*_#>$({[\\=~:,;—–"  # marks that open what the announcement closes


def before_answer(text: str) -> str:
    """The beginning of a rationale that announces no answer: the text up to the first words that do.

    Those words are what the judge looks for in any kind of problem, without what leads to them ("So the", "**"):

        >>> before_answer(" Bob: tails.\\nSo the answer is yes.")
        ' Bob: tails.'

    The result is a beginning of the text, without white space at its end, and never goes into a next question.
    """
    kept = before_next_question(text).rstrip()
    while (start := _first_announcement(kept)) is not None:
        kept, clause = _without_lead_in(kept[:start])
        while kept and not clause:  # all of it led to the announcement, as a heading of its own does
            shorter, clause = _without_lead_in(kept)
            kept = kept if clause else shorter
        kept = before_next_question(kept).rstrip()  # "Q:Q: The answer ..." is a ratio, and "Q:Q" a question
    return kept


def _without_lead_in(text: str) -> tuple[str, str]:
    """(the text without what leads to an announcement at its end, what is left of its last sentence or line).

    It stays in that sentence: the last step may end in a word that is in _LEAD_IN, as 'ends in "a".' does.
    """
    begin = max([len(text) - 200, 0, *(match.end() for match in _CLAUSE_END.finditer(text.rstrip()))])
    clause = text[begin:].rstrip().rstrip(_OPENING)
    if lead := _LEAD_IN.search(clause):
        clause = clause[: lead.start()].rstrip(",;:—–")
    clause = clause.rstrip()
    return (text[:begin] + clause).rstrip(), clause.strip()


def _first_announcement(text: str) -> int | None:
    matches = [pattern.search(text) for pattern in (_CUE, *math_answers.ANNOUNCEMENTS)]
    return min((match.start() for match in matches if match), default=None)


def _answer_line(output: str) -> tuple[str, str, bool]:
    """The first line with a letter or digit after the last cue, at most 300 characters, what follows it, and whether
    the cue is a label ("Answer:") and no sentence. Without LaTeX, with one form for digits and blanks."""
    text = before_next_question(output)
    cue = None
    for cue in _CUE.finditer(text):  # noqa: B007 (the last one)
        pass
    start, box = cue.end() if cue else -1, text.rfind(r"\boxed{")
    if box > start and (start < 0 or "\n" in text[start:box]):
        start = box  # a box inside the answer sentence is part of it ("is \boxed{5} or \boxed{6}")
        before = text[max(0, box - 200) : box].rpartition("\n")[2]
        if math_answers.OR_BEFORE.search(before) or _JOINED_BOX.search(before):
            raise _Invalid("several answers, of them a box")
        math_answers.refuse_before_box(before, at_least=False)
    elif start < 0:
        raise _Invalid("no answer sentence")
    else:
        refuse(wording.offered_before(text[: cue.start()]))
    rest = _without_latex(wording.plain(text[start : start + 600]))
    first = _ALPHANUMERIC.search(rest)
    if first is None:
        raise _Invalid("the answer sentence is empty")
    line, _, after = rest[rest.rfind("\n", 0, first.start()) + 1 :].partition("\n")
    return line[:300].strip(), "\n" + after, start != box and not cue[0].lower().rstrip(":").endswith("is")


def _without_latex(text: str) -> str:
    if "<" in text:
        text = _ANNOTATION.sub("", text)
    if "\\" in text:
        text = _LATEX_FRACTION.sub(lambda match: f"{_apart(match)}{match[1] or match[2]}/{match[3] or match[4]}", text)
        text = _LATEX_BOX.sub(r"\1", _LATEX_BOX.sub(r"\1", text))
        for pattern, mark in _LATEX_MARKS:
            text = pattern.sub(mark, text)
    return text


def _apart(fraction: re.Match) -> str:
    """A space between 2 and 1/2 in 2\\frac{1}{2}."""
    return " " if fraction.string[: fraction.start()][-1:].isdigit() else ""


# ------------------------------------------------------------------- three of the kinds; see also number_answers

_FILLER = (
    r"[\W_]*(?:(?:the|correct|option|choice|letter|most|either|to|be"
    r"|(?!(?:unlike|hard|scarce|bare|rare)ly)[a-z]+ly)\W+){0,5}"
)
# A bare "A" or "I" before a small letter is a word ("A movie", "I think"), unless it is joined or explained ("A or B").
_BARE = r"(?![AI] (?!or\b|and\b|is\b|to\b|through\b|vs\b|but\b|maybe\b)[a-z])[A-Z](?!\w|['’]\w)"
_LABEL = re.compile(rf"(?i:{_FILLER})(?:\(([A-Za-z])\)|({_BARE}))")
_PARENTHESISED = re.compile(r"\(([A-Z])\)")
# What may stand between two labels that are both offered; "could be" offers one unless the first is "most likely".
_ANOTHER_LABEL = re.compile(
    r"(?:\b(?:or|and|nor|to|through|thru|versus|vs\.?|plus|otherwise|else|alternatively|maybe|perhaps|possibly"
    r"|(?:together|along) with|as well as)\b(?:,? [a-z]+)?(?:,? (?:it|also|is|could|might|may|be|even|perhaps|maybe))*"
    r"|(?P<weak>\b(?:could|might|may)(?: also| well| even)* be)|[^\w\s()]|(?<=[A-Z)]) ?(?=\(?[A-Z]\b))[\s*$\"']*"
    rf"(?:\(([A-Za-z])\)|({_BARE}))"
)
_ONLY_LABELS = re.compile(r"\W*+(?:[A-Z]\b\W*+)++")


def _choice(sentence: str, line: str, problem: Problem) -> str:
    """The letter of the option named by its label, or by its exact text."""
    choices = problem.choices
    allowed = LETTERS[: len(choices) or 5]
    for text in (line, sentence):
        key = _option_key(text)
        named = [allowed[i] for i, option in enumerate(choices) if _option_key(option) == key]
        if len(named) == 1 and not (len(key) == 1 and key.isalpha()):
            return named[0]
    match = _LABEL.match(sentence) or _PARENTHESISED.search(sentence)
    if match is None:
        raise _Invalid("no option in the answer sentence")
    before, after = sentence[: match.start(match.lastindex)], sentence[match.end() :]
    refuse(wording.denied(before) or wording.bounded(before) or wording.denied_after(after))
    letter = match[match.lastindex].upper()
    if letter not in allowed:
        raise _Invalid(f"{letter} is not one of the options A to {allowed[-1]}")
    text = choices[allowed.index(letter)] if choices else ""
    if after and _option_key(after.strip("),:;- ")) != _option_key(text):
        _refuse_other_label(letter, allowed, sentence, match.end())
    if _ONLY_LABELS.fullmatch(line) and len(set(re.findall(r"[A-Z]", line))) > 1:
        raise _Invalid(f"several answers, {line[:40]}")
    return letter


def _refuse_other_label(letter: str, allowed: str, sentence: str, start: int) -> None:
    """Raise Invalid if the sentence offers another option from there on."""
    decided = re.search(r"\b(?:most likely|probably)\b", sentence[:start])
    for other in _ANOTHER_LABEL.finditer(sentence, start):
        name = other[other.lastindex].upper()
        if name != letter and name in allowed and not (other["weak"] and decided):
            raise _Invalid(f"several answers, {letter} and {name}")


def _option_key(text: str) -> str:
    return wording.plain(text).strip(" \t.:*\"'“”").casefold()


# "No" before another word denies that word ("no one knows", "no doubt it is heads"), except before one that goes on.
_GOES_ON = r"because|since|as|but|it|he|she|they|we|you|the|this|that|there|if|when|or|and|in"
_NO = rf"no\b(?!-|[.]? *\d| (?!(?:{_GOES_ON})\b)[a-z])"
_YES_NO = re.compile(rf"{_FILLER}(yes\b(?!-)|{_NO})", re.IGNORECASE)
_ANOTHER_YES_NO = re.compile(
    r"\b(yes|no\b(?![- ][a-z]|[.]? *\d)|no (?=if|when|otherwise|in part|or|and|wait|maybe|sorry|actually))\b",
    re.IGNORECASE,
)


def _yes_no(sentence: str, line: str, problem: Problem) -> str:
    match = _YES_NO.match(line)
    if match is None:
        raise _Invalid("the answer sentence begins with neither yes nor no")
    said = match[1].lower()
    refuse(wording.denied_after(line[match.end() :]))
    for other in _ANOTHER_YES_NO.finditer(line, match.end()):
        if other[1].lower().strip() != said:
            raise _Invalid("several answers, yes and no")
    return said


_QUOTED = re.compile(r"[\"“]([^\"“”]{1,100})[\"”]")
_BETWEEN_LETTERS = re.compile(r"[\s,\-–.:*`\"'“”‘’]+")
# Words beside a quoted word that make another answer of it: 'the reverse of "yajo"', '"yajo" or jayo'.
_CHANGED = re.compile(
    r"\b(?:or|and|not|nor|revers\w+|backwards?|without|plus|minus|followed|preceded|anagram|before|after|instead|maybe"
    r"|perhaps|possibly|otherwise|but|twice|rather|spelled|replac\w+|remov\w+)\b|n't\b|[+|/&]",
    re.IGNORECASE,
)


def _letters(sentence: str, line: str, problem: Problem) -> str:
    """One word, or letters spelled one by one ("n-a-e-y"); quotes mark the word inside a longer sentence."""
    quoted = set(_QUOTED.findall(sentence))
    if len(quoted) > 1 or (quoted and _CHANGED.search(_QUOTED.sub(" ", sentence))):
        raise _Invalid("several quoted answers, or one that is changed")
    if quoted:
        before, _, after = re.split(r"[\"“”]", sentence, maxsplit=2)
        refuse(wording.denied(before) or wording.denied_after(after))
    parts = [part for part in _BETWEEN_LETTERS.split(quoted.pop() if quoted else sentence) if part]
    word = unicodedata.normalize("NFC", "".join(parts)).lower()
    if not word.isalpha() or (len(parts) > 1 and max(map(len, parts)) > 1):
        raise _Invalid(f"{sentence.strip()[:40]!r} is not one word")
    return word


_READERS = {"number": number_answers.read, "choice": _choice, "yes_no": _yes_no, "letters": _letters}
# What a gold answer may be, in words for the one who has to correct it.
_GOLD = {
    "number": "one number, as 18, -3, 3/4 or 10%",
    "choice": "the letter of one of the options",
    "yes_no": "yes or no",
    "letters": "one word of letters, as yajo",
}
