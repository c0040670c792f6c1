"""One page to look at a run's answers: `smlib browse RUN` writes RUN/browse.html, which opens from disk.

It holds every question of the evaluation with its answers by every model: steps judged where the step checker knows
them, the verdict and its reason, the reward model's score of every sample and of every token of the greedy answers; and
what Self-Explore made of wrong rationales. The page loads nothing, and all that a model wrote is shown as text.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from smlib.errors import UsageError
from smlib.files.artifacts import MANIFEST, require
from smlib.files.atomic import write_text
from smlib.judging.answers import grade
from smlib.learning import reward_model
from smlib.learning.rows import Pair
from smlib.notebooks import pages
from smlib.problems.datasets import Problem
from smlib.problems.prompts import split_answer
from smlib.problems.steps import check_steps, knows
from smlib.progress import progress_bar
from smlib.reports import results
from smlib.runs import shared
from smlib.runs.settings import Settings

VERDICTS = (*results.OUTCOMES, "right")  # the last of a dataset whose steps nobody knows
LABELS = results.METHODS | results.EXPLORE_METHODS

BODY = """<h1>{title}</h1>
<div class="bar">
<label>task <select id="task"><option value="">all</option></select></label>
<label>greedy answer of <select id="method"></select> is
<select id="verdict"><option value="">anything</option></select></label>
<label>from SFT to SML <select id="change"><option value="">any change</option><option value="gained">gained</option>
<option value="lost">lost</option><option value="same">no change</option></select></label>
<label>question contains <input id="words" type="search"></label>
<span class="faint" id="count"></span>
</div>
<div class="two"><div><div id="items"></div>
<div class="bar"><button id="back">back</button><button id="forth">next</button>
<span class="faint" id="place"></span></div>
<p class="faint">Dots: the greedy answers of {methods}. Green: right in every step; yellow: right, with a wrong step;
orange: wrong; grey: no answer. Arrow keys move through the list.</p></div>
<div id="detail"></div></div>
<details id="pitted"><summary>First pits of Self-Explore</summary>
<p class="faint">For each wrong rationale: the steps before the first pit, the pit, and a right continuation from before
it. The first 200 of the chosen task.</p><div id="pits"></div></details>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>"""


def write(run_dir: Path, settings: Settings) -> Path:
    """Write RUN/browse.html, and give its path; UsageError where the run has no evaluation yet."""
    if not (run_dir / "05_evaluation" / MANIFEST).exists():
        raise UsageError(f"{run_dir} has no finished 05_evaluation to look at: run notebooks 00 to 05 first")
    names = ("05_evaluation", "06_evaluation")
    stages = [require(run_dir, name) for name in names if (run_dir / name / MANIFEST).exists()]
    run = results.answered(*stages)
    problems = {problem.id: problem for problem in run.problems}
    methods = list(dict.fromkeys(row["method"] for row in run.answers))
    data = {
        "verdicts": VERDICTS,
        "tasks": list(dict.fromkeys(row["test_set"] for row in run.answers)),
        "methods": [{"name": name, "label": LABELS[name]} for name in methods],
        "questions": _questions(run.answers, problems, _tokens(run_dir, settings, run.answers, problems)),
        "pits": _pits(run_dir),
    }
    path = run_dir / "browse.html"
    write_text(path, _document(f"Answers of {run_dir.name}", data))
    return path


def _document(title: str, data: dict) -> str:
    here = Path(__file__).parent
    script, style = ((here / f"browse.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    held = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":  # so that no text ends the element or begins another
        held = held.replace(sign, f"\\u{ord(sign):04x}")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    methods = ", ".join(method["label"] for method in data["methods"])
    body = BODY.format(title=escape(title), methods=escape(methods), data=held, script=script)
    return pages.document(title, body, style, f"; script-src 'sha256-{digest}'")


def _questions(answers: Sequence[dict], problems: dict[str, Problem], tokens: dict) -> list[dict]:
    found: dict[tuple[str, str], dict] = {}
    for row in answers:
        problem, place = problems[row["id"]], (row["test_set"], row["id"])
        about = {"id": problem.id, "task": row["test_set"], "text": problem.question, "gold": problem.answer}
        question = found.setdefault(place, about | {"answers": {}})
        scores = row.get("scores") or [None] * len(row["sampled_texts"])
        question["answers"][row["method"]] = {
            "greedy": _answer(problem, row["greedy_text"]) | {"tokens": tokens.get((row["method"], *place))},
            "samples": [
                _answer(problem, text) | {"score": score}
                for text, score in zip(row["sampled_texts"], scores, strict=True)
            ],
        }
    return list(found.values())


def _answer(problem: Problem, text: str) -> dict:
    """A completion: its lines, each with the step checker's finding where it knows, its answer, and the verdict."""
    rationale, sentence = split_answer(text)
    if knows(problem.dataset):
        lines = [(one.line, one.correct, "" if one.correct else one.reason) for one in check_steps(problem, rationale)]
    else:
        lines = [(line.strip(), None, "") for line in rationale.strip().split("\n")]
    verdict = VERDICTS.index(results.outcome(problem, text))
    return {"lines": lines, "sentence": sentence, "verdict": verdict, "reason": grade(problem, text).reason}


def _tokens(run_dir: Path, settings: Settings, answers: Sequence[dict], problems: dict[str, Problem]) -> dict:
    """(method, test set, question) -> the tokens of the greedy answer with the reward model's score of each, in nats;
    of the answers whose samples have scores, too."""
    scored = [row for row in answers if row.get("scores")]
    if not scored:
        return {}
    judge = shared.load_model(settings, require(run_dir, "03_reward_model").path("model"))
    tokenizer, found = shared.load_tokenizer(settings), {}
    with progress_bar("token scores", len(scored), "answer") as bar:
        for row in scored:
            tokens, values = reward_model.token_scores(judge, tokenizer, problems[row["id"]], row["greedy_text"])
            place = (row["method"], row["test_set"], row["id"])
            found[place] = [(token, round(value, 2)) for token, value in zip(tokens, values, strict=True)]
            bar.update()
    return found


def _pits(run_dir: Path) -> list[dict]:
    if not (run_dir / "06_exploration" / MANIFEST).exists():
        return []
    asked = shared.problems_of(require(run_dir, "01_sampling"))
    texts = {problem.id: problem.question for problem in asked}
    return [
        {"task": pair.dataset, "text": texts[pair.id], "step": pair.step, "steps": pair.steps}
        | {"prefix": pair.prefix, "chosen": pair.chosen, "rejected": pair.rejected}
        for pair in require(run_dir, "06_exploration").read_rows("pairs", Pair)
    ]
