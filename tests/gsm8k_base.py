"""A small base that answers the GSM8K questions of a run rightly or wrongly, so that every stage has something to do.

It is the tiny base after reading the equations of the file's own solutions, as they are and with a slip: a test's
stand-in for a language model that is too large for a test.
"""

import json
import random
import re
from pathlib import Path

import torch

from smlib.problems import prompts
from smlib.problems.datasets import Problem
from smlib.problems.downloads import read_pinned
from smlib.runs import questions
from smlib.runs.settings import Settings
from smlib.sampling import encoding, models, packing

LAST_NUMBER = re.compile(r"\d+(?:\.\d+)?(?!.*\d)", re.DOTALL)


def worked(problem: Problem) -> list[str]:
    """The equations of the file's own solution, the last three."""
    path, number = problem.id.rsplit("/", 1)
    row = json.loads(read_pinned(f"{path}.jsonl").splitlines()[int(number)])
    found = re.findall("<<(.*?)=(.*?)>>", row["answer"])
    return [f"{left} = {right}." for left, right in found][-3:] or [f"It is {problem.answer}."]


def slip(text: str) -> str:
    """The text with one added to its last number."""
    return LAST_NUMBER.sub(lambda found: f"{float(found[0]) + 1:g}", text)


def solutions(problem: Problem) -> list[str]:
    """Right; right and brief; wrong from the first step on; wrong in the last step."""
    steps, wrong = worked(problem), slip(problem.answer)
    told = [(steps, problem.answer), (steps[-1:], problem.answer)]
    told += [([slip(steps[0]), *steps[1:]], wrong), ([*steps[:-1], slip(steps[-1])], wrong)]
    return [" " + "\n".join([*lines, prompts.answer_sentence(problem, answer)]) for lines, answer in told]


def make_base(settings: Settings, folder: Path, epochs: int = 18) -> str:
    """Write the base into a folder, whose name is returned; it knows the questions of all stages, the test's too."""
    torch.manual_seed(0)
    asked, tokenizer, model = questions.ppo_problems(settings), models.load_tokenizer(), models.load_policy()
    problems = questions.training_problems(settings) + questions.second_problems(settings)
    problems += [problem for update in range(settings.ppo.updates) for problem in asked(update)]
    problems += [problem for group in questions.test_problems(settings).values() for problem in group]
    rows = [
        (
            encoding.encode_prompt(tokenizer, prompts.open_prompt(problem)),
            [encoding.encode_completion(tokenizer, text) for text in solutions(problem)],
        )
        for problem in problems
    ]
    steps = -(-len(rows) // 4) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    draw = random.Random(0)
    for _ in range(steps):
        packed = packing.pack(draw.sample(rows, 4), tokenizer.pad_token_id)
        (-packing.packed_logprobs(model, packed).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.config.max_position_embeddings = tokenizer.model_max_length = 8_192  # exemplars are long
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)
