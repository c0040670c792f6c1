"""Drawing that more than one notebook needs: the pipeline figure, a style that survives print, a library's source."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from smlib.errors import of_extra
from smlib.files.atomic import replacing
from smlib.judging.answers import grade
from smlib.problems.datasets import Problem
from smlib.problems.prompts import split_answer
from smlib.problems.steps import check_steps, knows

with of_extra("notebooks"):
    import matplotlib.pyplot as plt
    import pandas as pd
    from IPython.display import Code, display
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's colours can be told apart by colour-blind readers.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#8A8A8A",
}
METHOD_COLOURS = {
    "base": COLOURS["grey"],
    "sft": COLOURS["sky"],
    "sml": COLOURS["blue"],
    "reward": "#882255",
    "rft": COLOURS["purple"],
    "outcome_dpo": COLOURS["orange"],
    "self_explore": "#332288",
}
OUTCOME_COLOURS = {
    "right, every step": COLOURS["green"],
    "right, a step wrong": "#F0E442",
    "right": "#8CCFB0",  # by the answer alone
    "wrong": COLOURS["red"],
    "no answer": "#D0D0D0",
}  # of `results.outcome`; none is a method's
# Of each stage: its name, its model, whether that trains, its data, and what the arrows from data to model and from
# model to data stand for ("" where there is none).
STAGES = (
    ("01 sampling", "base", False, "rationales, open and\ngiven right or wrong\nanswers", "", "writes"),
    ("02 ranking, SFT", "SFT model", True, "the rank: right (r+)\nabove wrong (r−)", "learns r+", ""),
    (
        "03 reward model",
        "reward model",
        True,
        "pairs: of the base, and\nof the SFT model, which\nwrites again",
        "learns",
        "",
    ),
    (
        "04 PPO",
        "policy",
        True,
        "rollouts, scored by the\nreward model, held near\nthe SFT model (reference)",
        "learns",
        "writes",
    ),
    ("05 evaluation", "base, SFT, SML", False, "answers to fresh\nquestions and\npublished test sets", "", "write"),
)
SELF_EXPLORE = (
    ("sample", "SFT model", False, "many solutions of every\ntraining question", "", "writes"),
    ("select", "RFT model", True, "different right\nsolutions; wrong ones\nbeside them", "learns", ""),
    ("explore", "RFT model", False, "completions from every\nstep of a wrong one:\nthe first pit", "", "writes"),
    ("step DPO", "policy", True, "step-level pairs: the\npit against a right\nway on before it", "learns", ""),
    ("evaluate", "all models", False, "answers, beside SFT,\nRFT, outcome DPO\nand SML", "", "write"),
)


def style() -> None:
    """How figures and tables of all notebooks look.

    A table may hold what a model wrote, so no $...$ in it is a formula: not in JupyterLab, nor in what reads the page.
    """
    pd.set_option("display.html.use_mathjax", False)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=list(COLOURS.values())),
        }
    )


def pipeline(lit: str | None = None) -> Figure:
    """Self-motivated Learning in one figure; `lit` ("01" ... "05") is the notebook's stage, None lights them all."""
    if lit is not None and lit not in [name[:2] for name, *_ in STAGES]:
        raise ValueError(f"no stage {lit!r}; allowed: {', '.join(name[:2] for name, *_ in STAGES)}, or None")
    return _diagram(
        STAGES, [lit in (None, name[:2]) for name, *_ in STAGES], copies=((0, 1), (1, 2), (1, 3)), scores=(2, 3)
    )


def self_explore() -> Figure:
    """Self-Explore in one figure; all of it is notebook 06."""
    return _diagram(SELF_EXPLORE, [True] * len(SELF_EXPLORE), copies=((1, 2), (1, 3)))


def _diagram(
    stages: Sequence[tuple],
    lit: Sequence[bool],
    copies: Sequence[tuple[int, int]],
    scores: tuple[int, int] | None = None,
) -> Figure:
    """Models above, data below, stages in columns.

    copies: (from, to), where a model starts as a copy of another; scores: whose model scores whose data.
    """
    figure, axes = plt.subplots(figsize=(11, 3.1))
    axes.set(xlim=(0, 11), ylim=(0, 3.1))
    axes.axis("off")
    for index, ((name, model, trains, data, learns, writes), on) in enumerate(zip(stages, lit, strict=True)):
        middle, ink = 1.1 + 2.2 * index, "black" if on else "#8A8A8A"
        axes.add_patch(plt.Rectangle((middle - 1.06, 0.02), 2.12, 3.0, color="#EAF3FA" if on else "#F7F7F7"))
        axes.text(middle, 2.86, name, ha="center", va="center", weight="bold", color=ink)
        edge = (COLOURS["blue"] if trains else COLOURS["grey"]) if on else "#BBBBBB"
        box = {"facecolor": "white", "edgecolor": edge, "linewidth": 2 if trains else 1.2}
        axes.add_patch(FancyBboxPatch((middle - 0.78, 1.62), 1.56, 0.5, boxstyle="round,pad=0.05", **box))
        state = "trains" if trains else "frozen"
        axes.text(middle, 1.87, f"{model}\n({state})", ha="center", va="center", fontsize=9, color=ink)
        axes.text(middle, 0.5, data, ha="center", va="center", fontsize=8, color=ink)
        for shift, word, (start, end) in ((-0.3, learns, (0.9, 1.53)), (0.3, writes, (1.53, 0.9))):
            if word:
                _arrow(axes, (middle + shift, start), (middle + shift, end), edge)
                side = "right" if shift < 0 else "left"
                axes.text(middle + 1.25 * shift, 1.2, word, ha=side, va="center", fontsize=8, color=ink)
    for start, end in copies:
        left, right = (1.1 + 2.2 * index for index in (start, end))
        bend = f"arc3,rad={-0.16 if end - start > 1 else 0}"
        height, gap = (2.19, 0.3) if end - start > 1 else (1.87, 0.85)
        _arrow(axes, (left + gap, height), (right - gap, height), COLOURS["grey"], linestyle="--", connectionstyle=bend)
    for index in range(2 if scores else 3):  # data that the next stage takes over
        _arrow(axes, (2.03 + 2.2 * index, 0.5), (2.4 + 2.2 * index, 0.5), COLOURS["grey"])
    if scores:
        left, right = (1.1 + 2.2 * index for index in scores)
        _arrow(axes, (left + 0.7, 1.53), (right - 0.85, 0.85), COLOURS["grey"])
        axes.text(left + 0.95, 1.42, "scores", fontsize=8, color="#555555")
    axes.text(0.12, 2.45, "dashed: starts as a copy", fontsize=7.5, color="#777777")
    return figure


def _arrow(axes, start: tuple[float, float], end: tuple[float, float], colour: str, **look) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.3, **look})


def source(*functions: Callable) -> None:
    """Show the library's own source of functions in a notebook."""
    for function in functions:
        display(Code(inspect.getsource(function), language="python"))


def print_steps(problem: Problem, text: str) -> None:
    """Print a completion line by line with the step checker's finding, then its answer with the verdict.

    Lines of a published dataset, which the checker does not know, stand there without one.
    """
    rationale, sentence = split_answer(text)
    if knows(problem.dataset):
        for check in check_steps(problem, rationale):
            print(f"  {'right' if check.correct else 'WRONG'}  {check.line}")
            if not check.correct:
                print(f"         {check.reason}")
    else:
        for line in rationale.strip().split("\n"):
            print(f"         {line.strip()}")
    verdict = grade(problem, text)
    print(f"  {'right' if verdict.correct else 'WRONG'}  {sentence or '(no answer sentence)'} [{verdict.reason}]")


def save(figure: Figure, run_dir: str | Path, name: str) -> None:
    """Write a figure to the run's figures/ as PNG."""
    with replacing(Path(run_dir) / "figures" / f"{name}.png") as tmp:
        figure.savefig(tmp, format="png")


def grouped_bars(
    axes,
    groups: Sequence[str],
    series: dict[str, Sequence[tuple[float, float, float]]],
    colours: dict[str, str] | None = None,
) -> None:
    """Bars side by side per group with intervals: series name -> (value, low, high) per group, in percent."""
    width = 0.8 / len(series)
    places = np.arange(len(groups))
    for index, (name, triples) in enumerate(series.items()):
        value, low, high = (np.array(column) for column in zip(*triples, strict=True))
        axes.bar(
            places + (index - (len(series) - 1) / 2) * width,
            value,
            width * 0.94,
            yerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)],
            error_kw={"elinewidth": 1, "capsize": 2},
            label=name,
            color=(colours or {}).get(name),
        )
    axes.set_xticks(places, groups)


def stacked_bars(axes, labels: Sequence[str], parts: dict[str, Sequence[float]], group: int) -> None:
    """Lying bars that add up to 100 percent: part name (of OUTCOME_COLOURS) -> its percent per label; a gap after
    every `group` labels."""
    left = np.zeros(len(labels))
    places = [index + 0.35 * (index // group) for index in range(len(labels))]
    for name, widths in parts.items():
        axes.barh(places, widths, left=left, label=name, color=OUTCOME_COLOURS[name])
        left += np.asarray(widths)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.legend(ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, borderaxespad=0.2)


def moving_average(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the last `window` values (fewer at the start), as long as the input."""
    total = np.cumsum(np.insert(np.asarray(values, dtype=float), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def token_strip(axes, tokens: Sequence[str], values: Sequence[float], limit: float, marked: int | None = None):
    """A text whose tokens are coloured by a value, purple above zero and orange below; `marked` is a line's index.

    limit: the absolute value at which the colour is strongest. Returns the colour scale, for a colour bar.
    """
    shades = plt.cm.ScalarMappable(plt.Normalize(-1.6 * limit, 1.6 * limit), "PuOr")  # ink stays legible on these
    row = column = widest = 0
    for token, value in zip(tokens, values, strict=True):
        for letter in token.replace("\n", "↵"):
            axes.add_patch(plt.Rectangle((column, row), 1, 1, color=shades.to_rgba(np.clip(value, -limit, limit))))
            axes.text(column + 0.5, row + 0.52, letter, ha="center", va="center", family="monospace", fontsize=9)
            column += 1
            widest = max(widest, column)
        if "\n" in token:
            row, column = row + 1, 0
    if marked is not None:
        axes.add_patch(plt.Rectangle((-0.4, marked), widest + 0.8, 1, fill=False, color=COLOURS["red"], linewidth=2))
    axes.set(xlim=(-0.6, max(widest, 40) + 0.6), ylim=(row + 1.15, -0.15), aspect=1.7)
    axes.axis("off")
    return shades
