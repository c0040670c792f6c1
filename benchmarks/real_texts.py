"""What does a real model write, stage by stage? Writes results/smollm2_texts.jsonl and results/smollm2_sheet.csv.

    python benchmarks/real_texts.py

The models of the run runs/smollm2-word_problems-seed0, which benchmarks/controls.py trains, answer thirty word problems
of our own (benchmarks/real_questions.jsonl): one greedy answer and eight samples each, the base with its exemplars. No
published word problem is one of these questions, or near one; that is checked first.

smollm2_texts.jsonl has a row per model and question: the greedy text, whether it is right, its score by the reward
model, and how many samples are right. The sheet has sixty samples that state the right answer, of each model as many as
there are, up to a quarter, for a reader to judge: "sound" is y where every step is right and leads to the answer, and n
where the answer is luck. A sheet in which somebody has judged is not written again.
"""

import argparse
import json
import random
from pathlib import Path

import controls
import variants
from ablations import write

from smlib.errors import UsageError
from smlib.files.artifacts import require
from smlib.files.atomic import write_text
from smlib.learning import reward_model
from smlib.problems.datasets import GROUPS, Problem, load
from smlib.problems.duplicates import shared_questions
from smlib.reports import evaluation
from smlib.runs import shared
from smlib.runs.settings import Settings, preset

QUESTIONS = Path(__file__).with_name("real_questions.jsonl")
SAMPLES, SHEET = 8, 60
COLUMNS = ("number", "model", "question", "gold", "rationale", "score", "sound", "why", "by")


def own_questions() -> list[Problem]:
    """Ours; UsageError where a published word problem is one of them, or nearly."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    asked = [
        Problem(f"own/{number}", "own", row["question"], row["answer"], "number")
        for number, row in enumerate(rows, start=1)
    ]
    published = [one for name in (*GROUPS["word_problems"], "gsm8k") for one in load(name, "all")]
    if known := shared_questions(asked, published):
        raise UsageError(f"published word problems are, or nearly are, some of {QUESTIONS.name}: {known}")
    return asked


def answered(settings: Settings, run: Path, asked: list[Problem]) -> dict[str, list[dict]]:
    """Model -> its answers to every question, with the scores of its samples, and "greedy_score"."""
    how, found = shared.sampling_params(settings, "evaluation"), {}
    for name in controls.METHODS:
        with shared.load_engine(settings, controls.model_of(name, run, settings)) as engine:
            shots = settings.sampling.shots if name == "base" else "none"
            found[name] = evaluation.evaluate(engine, asked, SAMPLES, how, shots=shots, progress=name)
    tokenizer = shared.load_tokenizer(settings)
    judge = shared.load_model(settings, require(run, "03_reward_model").path("model"))
    for rows in found.values():
        for problem, row in zip(asked, rows, strict=True):
            texts = [tokenizer.encode(row["greedy_text"], add_special_tokens=False), *row["sampled_ids"]]
            row["greedy_score"], *row["scores"] = reward_model.score(judge, tokenizer, [problem] * len(texts), texts)
    return found


def text_rows(asked: list[Problem], found: dict[str, list[dict]]) -> list[dict]:
    return [
        {
            "model": name, "question": problem.question, "gold": problem.answer, "greedy": row["greedy_text"].strip(),
            "greedy_right": row["greedy_correct"], "greedy_score": round(row["greedy_score"], 2),
            "samples_right": sum(row["sampled_correct"]), "samples": SAMPLES,
        }
        for name, rows in found.items()
        for problem, row in zip(asked, rows, strict=True)
    ]  # fmt: skip


def sheet_rows(asked: list[Problem], found: dict[str, list[dict]]) -> list[dict]:
    """Different right samples, of every model as many, in a random order."""
    rng, drawn = random.Random("sheet of real rationales"), []
    for name, rows in found.items():
        right = [
            {"model": name, "question": problem.question, "gold": problem.answer, "rationale": text.strip()}
            | {"score": round(score, 2)}
            for problem, row in zip(asked, rows, strict=True)
            for text, correct, score in zip(row["sampled_texts"], row["sampled_correct"], row["scores"], strict=True)
            if correct
        ]
        once = list({(one["question"], one["rationale"]): one for one in right}.values())
        drawn += rng.sample(once, min(SHEET // len(found), len(once)))
    rng.shuffle(drawn)
    return [{"number": number} | row for number, row in enumerate(drawn, start=1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=variants.TABLE.parent, help="folder of the two files")
    args = parser.parse_args()
    asked, settings = own_questions(), preset("smollm2", "word_problems", 0)
    run = shared.run_folder("", "smollm2", "word_problems", 0)
    found = answered(settings, run, asked)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in text_rows(asked, found))
    write_text(args.out / "smollm2_texts.jsonl", "".join(lines))
    sheet = args.out / "smollm2_sheet.csv"
    if any(row["sound"] for row in controls.measured(sheet, {})):
        print(f"{sheet} is judged already, so it stays; delete it for a new one")
    else:
        write(sheet_rows(asked, found), COLUMNS, sheet)


if __name__ == "__main__":
    main()
