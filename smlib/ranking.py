"""Stage 3: correctness ranks rationales, and the rank makes training data.

A rationale that leads to the right answer ranks above one of the same question that leads to a wrong one. No
human, no larger teacher and no preference label is asked.
"""

import hashlib
import random
from collections import Counter, defaultdict
from itertools import cycle


def side(row: dict) -> tuple[str | None, str]:
    """("+", "-" or None, why) of one rationale (method, stage 3).

    "+": the stated and the re-read answer are both right; "-": both wrong. Mixed rationales are dropped, and
    so are those that state no answer.
    """
    if row["answer"] is None:
        return None, "states no answer"
    if row["correct"] and row["reanswer_correct"]:
        return "+", "states and supports the right answer"
    if not row["correct"] and not row["reanswer_correct"]:
        return "-", "states and supports a wrong answer"
    if row["correct"]:
        return None, "states the right answer, supports another"
    return None, "states a wrong answer, supports the right one"


def rank(rows: list[dict], max_per_side: int) -> tuple[list[dict], Counter]:
    """The kept rows with "side" added, and a count of what happened to all of them.

    Exact duplicates within a question go; of each question and side the first `max_per_side` stay.
    """
    seen: set[tuple[str, str]] = set()
    filled: Counter[tuple[str, str]] = Counter()
    kept, fate = [], Counter()
    for row in rows:
        which, why = side(row)
        key = (row["id"], row["text"])
        if which is None:
            fate[f"dropped: {why}"] += 1
        elif key in seen:
            fate["dropped: duplicate"] += 1
        elif filled[row["id"], which] >= max_per_side:
            fate["dropped: over the cap"] += 1
        else:
            seen.add(key)
            filled[row["id"], which] += 1
            kept.append(row | {"side": which})
            fate[f"kept: r{which}"] += 1
    return kept, fate


def coverage(rows: list[dict], problems: list) -> dict[str, float]:
    """Shares of the problems that have r+ only, r- only, both (these give pairs), or neither."""
    sides = defaultdict(set)
    for row in rows:
        sides[row["id"]].add(row["side"])
    shares = Counter("".join(sorted(sides[problem.id])) for problem in problems)
    names = {"+": "only right", "-": "only wrong", "+-": "both", "": "neither"}
    return {name: shares[key] / len(problems) for key, name in names.items()}


def held_out(identity: str) -> bool:
    """True for one question in eight: its pairs test the reward model and never train it."""
    return hashlib.sha256(f"held out/{identity}".encode()).digest()[0] < 32


def pairs(rows: list[dict], max_per_question: int, seed: int) -> list[dict]:
    """Pairs (chosen r+, rejected r-), always of the same question and the same author model.

    Each r- is rejected once, for the next r+ in turn; of a question at most `max_per_question` are drawn. So a
    question that the author mostly gets right gives few pairs, and that is wanted: what it mostly gets right is often
    a habit that is right by luck (notebook 02 counts it). "source" of a pair is that of its rejected side;
    chosen_ids and rejected_ids are the sides' tokens as drawn, without end-of-sequence.
    """
    rng = random.Random(f"pairs/{seed}")
    groups: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: {"+": [], "-": []})
    for row in rows:
        groups[row["id"], row["author"]][row["side"]].append(row)
    made = []
    for group in groups.values():
        right, false = (rng.sample(group[which], len(group[which])) for which in "+-")
        if not right:
            continue
        for chosen, rejected in zip(cycle(right), false[:max_per_question]):
            sides = {"chosen": chosen, "rejected": rejected}
            made.append(
                {
                    "id": chosen["id"],
                    "dataset": chosen["dataset"],
                    "author": chosen["author"],
                    "source": rejected["source"],
                    "chosen": chosen["text"],
                    "rejected": rejected["text"],
                    "held_out": held_out(chosen["id"]),
                }
                | {f"{name}_ids": row["token_ids"] for name, row in sides.items() if "token_ids" in row}
            )
    return made
