"""What Self-Explore found: how often the first pit is the first wrong step, and the tables of a finished run."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smlib.errors import UsageError
from smlib.files.artifacts import MANIFEST, require
from smlib.learning.exploration import Found, SteppedRationale, first_pit
from smlib.problems.steps import first_wrong_step, knows
from smlib.reports import results
from smlib.reports.evaluation import pass_at_k
from smlib.sampling import encoding

# ---------------------------------------------------------------------------------------------- what a pit is


def pit_report(
    tokenizer: PreTrainedTokenizerBase, rationales: Sequence[SteppedRationale], found: Found, ks: Sequence[int]
) -> list[dict]:
    """How often the first pit of k completions is the first wrong step, by the exact checker of the generated tasks.

    found: `explore_all` with n >= 2 max(ks). The first max(ks) completions give what is observed, the others what
    theory expects: (1 - p)^k for every prefix with recovery rate p, estimated without bias from c recoveries in n as
    C(n - c, k) / C(n, k). Rationales whose steps are all right (the answer sentence is wrong, or a step was left out)
    have no step to find and do not count.

    One row per k. Shares of the `rationales`: exact, early (a false pit: that step and all before it are right), late
    (a completion recovered from the wrong step) and none; early_expected: the mean of 1 minus the product of
    1 - (1 - p)^k over the right steps; repeated: k other completions show the same pit. Shares of the `right_prefixes`,
    different ones without a wrong step: false_pits; expected: the mean of (1 - p)^k.
    """
    cases = []
    for one in rationales:
        if wrong := wrong_step(tokenizer, one):
            cases.append((wrong, [one.key(step) for step in range(1, len(one.ends) + 1)]))
    if not cases:
        raise UsageError("none of the rationales has a wrong step: give some that do")
    recovers = {key: [attempt.correct for attempt in found[key]] for _, keys in cases for key in keys}
    most, n = max(ks), min(map(len, recovers.values()))
    if n < 2 * most:
        raise UsageError(f"{n} completions of a prefix are too few for k = {most}: draw at least {2 * most}")
    return [_pit_row(cases, recovers, k, most) for k in ks]


def wrong_step(tokenizer: PreTrainedTokenizerBase, rationale: SteppedRationale) -> int | None:
    """The first wrong step, from 1; None if all are right, or where the step checker does not know the dataset."""
    if not knows(rationale.problem.dataset):
        return None
    wrong = first_wrong_step(rationale.problem, encoding.decode(tokenizer, rationale.prefix(len(rationale.ends))))
    return wrong + 1 if wrong is not None and wrong < len(rationale.ends) else None


def _pit_row(cases: list[tuple[int, list[str]]], recovers: dict[str, list[bool]], k: int, most: int) -> dict:
    """cases: the first wrong step of every rationale, and the keys of its prefixes."""
    right = dict.fromkeys(key for wrong, keys in cases for key in keys[: wrong - 1])
    missed = {key: not any(recovers[key][:k]) for key in right}
    expected = {key: 1 - pass_at_k(len(recovers[key]) - most, sum(recovers[key][most:]), k) for key in right}
    kinds, early, repeated = Counter(), [], []
    for wrong, keys in cases:
        pit = first_pit([recovers[key][:k] for key in keys])
        repeated.append(pit == first_pit([recovers[key][most : most + k] for key in keys]))
        kinds["none" if pit is None else "exact" if pit == wrong else "early" if pit < wrong else "late"] += 1
        early.append(1 - math.prod(1 - expected[key] for key in keys[: wrong - 1]))
    shares = {kind: kinds[kind] / len(cases) for kind in ("exact", "early", "late", "none")}
    values = {"early_expected": early, "repeated": repeated}
    values |= {"false_pits": list(missed.values()), "expected": list(expected.values())}
    means = {name: float(np.mean(found)) if found else 0.0 for name, found in values.items()}
    return {"k": k, **shares, **means, "rationales": len(cases), "right_prefixes": len(right)}


def summary(run_dir: Path) -> str:
    """What a finished run found, as Markdown: the fate of the rationales, the pit report and the accuracies."""
    return "\n\n".join(
        [
            fate(require(run_dir, "06_exploration").read_json("fate.json")),
            pit_table(require(run_dir, "06_pit_report").read_rows("report")),
            accuracies(run_dir),
        ]
    )


def fate(counts: dict[str, int]) -> str:
    """What became of the wrong rationales, from fate.json."""
    kept = sorted((int(why.rsplit(" ", 1)[1]), n) for why, n in counts.items() if why.startswith("kept"))
    rows = {"all, one of every outcome pair": sum(counts.values())}
    rows |= {"step-level pairs": sum(n for _, n in kept)} | {f"- pit at step {step}": n for step, n in kept}
    dropped = {"no pit": "no pit", "duplicate": "duplicates of a pair", "no steps": "no steps"}
    rows |= {label: counts.get(f"dropped: {why}", 0) for why, label in dropped.items()}
    return "\n".join(["| wrong rationales | |", "|---|---|", *(f"| {label} | {n:,} |" for label, n in rows.items())])


def pit_table(rows: list[dict]) -> str:
    """report.jsonl in percent: how often the first pit is the first wrong step, and what chance gives."""
    if not rows:
        return (
            "No pit report: the step checker finds no wrong step, and it knows only the generated tasks of reasoning."
        )
    shares = {
        "exact": "exact", "early": "early", "early_expected": "early, expected", "late": "late", "none": "no pit",
        "repeated": "repeated", "false_pits": "false pits", "expected": "false pits, expected",
    }  # fmt: skip
    lines = [f"| first pit and first wrong step, % | k | {' | '.join(shares.values())} | rationales |"]
    lines.append("|---" * (len(shares) + 3) + "|")
    for row in rows:
        cells = " | ".join(f"{100 * row[name]:.1f}" for name in shares)
        lines.append(f"| {row['dataset'].replace('_', ' ')} | {row['k']} | {cells} | {row['rationales']} |")
    return "\n".join(lines)


def accuracies(run_dir: Path) -> str:
    """The accuracies in 06_evaluation, and of 05_evaluation where it asked the same, with 95 % intervals."""
    stages, labels, note = results.evaluations(run_dir, "06_evaluation"), results.EXPLORE_METHODS, ""
    if len(stages) > 1:
        labels = results.METHODS | labels
    elif (Path(run_dir) / "05_evaluation" / MANIFEST).exists():
        note = "\n\n05_evaluation was made with other settings, and is left out."
    pairs = [pair for pair in results.EXPLORE_CONTRASTS if set(pair) <= set(labels)]
    return results.markdown(results.rows_from_answers(results.answered(*stages), pairs), labels, pairs) + note
