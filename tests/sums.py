"""Sums as a published dataset: a few questions of GSM8K's or MATH's form, and a worked example of the same."""

import hashlib
import json

import torch

from smlib.problems import downloads, prompts
from smlib.sampling import packing

SUMS = [(3, 4), (2, 6), (1, 8), (5, 2), (4, 4), (6, 1), (2, 7)]
TRAIN, TEST, SHOWN = SUMS[:4], SUMS[4:6], SUMS[6]


def asked(task: str, a: int, b: int) -> str:
    return f"Ann has {a} nuts and gets {b}. How many are it?" if task == "gsm8k" else f"What is ${a} + {b}$?"


def steps(task: str, a: int, b: int, total: int) -> list[str]:
    """Two lines, or two sentences on one, as `smlib.learning.exploration` expects them of the dataset."""
    if task == "gsm8k":
        return [f"Ann starts with {a}.", f"{a} + {b} = {total} nuts."]
    return [f"We have to add ${b}$ to ${a}$. So the sum of both is ${total}$."]


def row(task: str, split: str, number: int, a: int, b: int) -> dict:
    if task == "gsm8k":
        return {"question": asked(task, a, b), "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    return {"problem": asked(task, a, b), "answer": str(a + b), "unique_id": f"{split}/prealgebra/{number}.json"}


def publish(task: str, folder, patch) -> None:
    """Put files of the dataset's form into a folder, and pin them."""
    for split, sums in (("train", TRAIN), ("test", TEST)):
        path = f"{task}/{split}.jsonl"
        rows = "".join(json.dumps(row(task, split, number, *pair)) + "\n" for number, pair in enumerate(sums))
        (folder / task).mkdir(exist_ok=True)
        (folder / path).write_text(rows)
        pinned = downloads.Pinned(hashlib.sha256(rows.encode()).hexdigest(), "nowhere")
        patch.setitem(downloads.FILES, path, pinned)
    patch.setenv("SML_DATA_DIR", str(folder))
    shown = {"question": asked(task, *SHOWN), "choices": [], "answer": str(sum(SHOWN))}
    shown["rationale"] = steps(task, *SHOWN, sum(SHOWN))
    exemplars = {"right": [shown], "wrong": [shown | {"given": "5"}]}
    patch.setattr(prompts, "_own_exemplars", lambda: {"word_problems": exemplars, "math": exemplars})
    prompts.shots.cache_clear()


def learn(model, documents: list[list[int]], times: int) -> None:
    """Let a model read all documents, as token ids, so many times."""
    ids = packing.pad_right(documents, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(times):
        model(input_ids=ids.clamp(min=0), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
