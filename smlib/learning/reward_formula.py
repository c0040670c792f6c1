"""What a reward may be: one of six, or a weighted sum of them.

The rewards themselves are in smlib.learning.reward_model. The grammar is apart from it, since settings are read before
torch is.
"""

import re
from collections.abc import Collection

from smlib.declared import Weight, checked, shown
from smlib.errors import UsageError

REWARDS = ("learned", "untrained", "checker", "majority", "gold", "words")
_TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+(?:\.\d+)?|\.\d+)\s*\*\s*)?([a-z]+)\s*", re.ASCII)


def parse_reward(formula: str, names: Collection[str]) -> list[tuple[float, str]]:
    """(weight, name) of every term of a formula such as "learned", "learned + 5*checker" or "learned - 0.1*words".

    Raises UsageError for what is no sum of `names`, each with a number before it or none, and for a sum of nothing.
    """
    terms = list(_TERM.finditer(formula))
    whole = "".join(term[0] for term in terms) == formula and all(term[1] for term in terms[1:])
    if not whole or not terms or any(term[3] not in names for term in terms):
        raise _refused(formula, names)
    weights = [float(term[1] + (term[2] or "1")) for term in terms]
    for weight in weights:
        checked("weight in ppo.reward", weight, Weight)
    if not any(weights):
        raise _refused(formula, names)
    return [(weight, term[3]) for weight, term in zip(weights, terms, strict=True)]


def _refused(formula: str, names: Collection[str]) -> UsageError:
    return UsageError(
        f"ppo.reward = {shown(formula)} is not allowed: give a sum of {', '.join(names)}, each with or without a "
        "number before it, such as 'learned + 5*checker'"
    )
