"""A task without reasoning: English sentences in Velu, a made-up language that says a sentence in one word.

A Velu word joins the subject, the object and the verb, in this order. A noun takes -i where it is plural, and so does
the adjective after it; "the" has no word. A verb takes ne- for "not" and -ta for the past.

    >>> facts = parse("Translate into Velu: The old dogs did not help the queen.")
    >>> translate(facts)
    'kelimoinornepalta'
"""

import random
import re

_NOUNS = {
    "dog": "kel", "bird": "tus", "king": "ram", "queen": "nor", "girl": "sif", "boy": "dap", "cook": "gol",
    "guard": "hek", "goat": "mub", "cat": "jin", "farmer": "vos", "doctor": "bim", "sailor": "tef", "singer": "lup",
    "horse": "zan", "lion": "wor",
}  # fmt: skip
_ADJECTIVES = {
    "old": "mo", "small": "pi", "red": "wa", "tall": "zu", "kind": "le", "loud": "bo", "young": "fa", "tired": "ku",
    "happy": "so", "rich": "du",
}  # fmt: skip
_VERBS = {
    "help": "pal", "follow": "dur", "call": "vem", "visit": "sok", "paint": "fik", "answer": "lan", "watch": "bor",
    "greet": "mig", "thank": "hul", "pull": "rej",
}  # fmt: skip
KINDS = (_NOUNS, _ADJECTIVES, _VERBS)
WORDS = _NOUNS | _ADJECTIVES | _VERBS

_THING = r"[Tt]he (?:(\w+) )?(\w+?)(s?)"
_SENTENCE = re.compile(rf"{_THING} (?:(do|does|did) not )?(\w+) {_THING}\.$")


def _third(verb: str) -> str:
    """The ending of "she watches", "she helps"."""
    return "es" if verb.endswith("ch") else "s"


def draw(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A sentence of two different nouns, half of them plural, three in four with an adjective."""
    verb, past, denied = rng.choice(list(_VERBS)), rng.random() < 0.5, rng.random() < 0.3
    things = [
        (noun, rng.choice(list(_ADJECTIVES)) if rng.random() < 0.75 else "", rng.random() < 0.5)
        for noun in rng.sample(list(_NOUNS), 2)
    ]
    (_, _, many), _ = things
    if denied:
        said = f"{'did' if past else 'do' if many else 'does'} not {verb}"
    else:
        said = f"{verb}ed" if past else verb if many else f"{verb}{_third(verb)}"
    subject, thing = (f"the {adjective} {noun}".replace("  ", " ") + "s" * plural for noun, adjective, plural in things)
    question = f"Translate into Velu: {subject.capitalize()} {said} {thing}."
    return question, translate(parse(question)), ()


def parse(question: str) -> dict:
    """What the sentence says: {"things": [(noun, adjective or "", plural)] * 2, "verb", "denied", "past"}.

    Raises ValueError for a sentence in another wording, or with another word.
    """
    found = _SENTENCE.search(question)
    if found is None:
        raise ValueError(f"not worded like a sentence to translate: {question[:60]!r}")
    adjective, noun, many, helper, verb, other_adjective, other, others = found.groups()
    stem = next((one for one in _VERBS if verb in (one, f"{one}ed", f"{one}{_third(one)}")), None)
    unknown = {noun, other} - _NOUNS.keys() | {adjective, other_adjective} - _ADJECTIVES.keys() - {None}
    if stem is None or unknown:
        raise ValueError(f"Velu has no word for {min(unknown, default=verb)!r}: {question[:60]!r}")
    things = [(noun, adjective or "", bool(many)), (other, other_adjective or "", bool(others))]
    past = helper == "did" or verb == f"{stem}ed"
    return {"things": things, "verb": stem, "denied": helper is not None, "past": past}


def translate(facts: dict, *, words: dict[str, str] = WORDS, agrees: bool = True, verb_last: bool = True) -> str:
    """The sentence in Velu. words: English -> Velu; agrees: whether adjectives take the plural; verb_last: as opposed
    to a verb between subject and object, as in English."""
    subject, thing = (
        words[noun] + "i" * many + (words[adjective] + "i" * (many and agrees) if adjective else "")
        for noun, adjective, many in facts["things"]
    )
    verb = "ne" * facts["denied"] + words[facts["verb"]] + "ta" * facts["past"]
    return subject + thing + verb if verb_last else subject + verb + thing
