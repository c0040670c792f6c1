"""Sentences that a notebook makes from its numbers, so that no text claims what the run does not show."""

from collections.abc import Sequence

from smlib.errors import of_extra

with of_extra("notebooks"):
    from IPython.display import Markdown, display


def see(text: str) -> None:
    """What a figure or table shows, in a paragraph below it."""
    display(Markdown(f"**What we see.** {text}"))


def found(*findings: str) -> None:
    """What a notebook found, one line each."""
    display(Markdown("\n".join(f"- {one}" for one in findings)))


def with_interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """A number with its interval: "86.6 [85.2, 87.9]", or signed "+7.7 [+4.1, +11.2]".

    An end of "-0.0" is below zero: it tells on which side of zero the interval ends.
    """
    sign = "+" if signed else ""
    return f"{value:{sign}z.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def clear(low: float, high: float) -> bool:
    """Whether an interval of a difference leaves out zero."""
    return low > 0 or high < 0


def judged(value: float, low: float, high: float) -> str:
    """A change in points with its interval, and whether it is not significant."""
    points = f"{with_interval(value, low, high, signed=True)} points"
    return points if clear(low, high) else f"{points} (not significant)"


def named(names: Sequence[str]) -> str:
    """Names of tasks in a sentence: "coin flip, last letters and svamp"; "none" where there is none."""
    shown = [name.replace("_", " ") for name in names]
    return " and ".join([", ".join(shown[:-1])] * (len(shown) > 1) + shown[-1:]) or "none"
