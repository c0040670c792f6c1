"""What the stages hand on, a line of a file each: rationales, and pairs of which one side is better.

A field that is None by default is left out of the file where a row does not have it. Where None itself says something,
the field stands there as null, beside the one that its metadata name: an open rationale was `given` no answer.

    stage.write_rows("pairs", pairs)
    pairs = stage.read_rows("pairs", Pair)  # DamagedError names the key of a row that is no pair
"""

from dataclasses import MISSING, dataclass, field, fields


class _Row:
    def as_row(self) -> dict:
        """Its fields by name, in order, as they are written to a file."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            one.name: values[one.name]
            for one in fields(self)
            if one.default is MISSING or (values[one.name], values.get(one.metadata.get("beside"))) != (None, None)
        }


@dataclass(frozen=True, kw_only=True)
class Rationale(_Row):
    """One text that a model wrote to a question, with the verdict on it.

    id, dataset: of the question. text: up to its answer sentence. token_ids: of that text, as drawn, without
    end-of-sequence. answer: what it states, None if nothing that counts. correct: whether that is the gold answer.

    Of stages 01 to 03 too: author, "base" or "sft". source: "open" or "conditioned", on the answer given, which is None
    for an open one. index: its number among the samples of its prompt. reason: of the verdict. reanswer: the answer
    that its author reads off the text without its own, None if none; reanswer_correct: the verdict on that. side: "+"
    or "-", once it is ranked.
    """

    id: str
    dataset: str
    author: str | None = None
    source: str | None = None
    given: str | None = field(default=None, metadata={"beside": "author"})
    index: int | None = None
    text: str
    token_ids: tuple[int, ...]
    answer: str | None
    correct: bool
    reason: str | None = None
    reanswer: str | None = field(default=None, metadata={"beside": "reanswer_correct"})
    reanswer_correct: bool | None = None
    side: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pair(_Row):
    """Two continuations of one prompt, of which the chosen one is better.

    id, dataset: of the question. chosen, rejected: texts. chosen_ids, rejected_ids: their tokens, as drawn.

    Of the reward model: author of both sides, source of the rejected one (`Rationale`), held_out: it never trains. Once
    they are scored: chosen_score, rejected_score (nats), ranked_right.

    Of DPO: prompt_ids, the tokens that both sides follow; the chosen side ends with end-of-sequence. Of Self-Explore's
    step-level pairs also step, the first pit, from 1, of the wrong rationale's steps; prefix, the text before it; and
    lengths: tokens of the chosen side by choice (`exploration.CHOICES`), None if there was none to make.
    """

    id: str
    dataset: str
    author: str | None = None
    source: str | None = None
    step: int | None = None
    steps: int | None = None
    prefix: str | None = None
    chosen: str
    rejected: str
    held_out: bool | None = None
    prompt_ids: tuple[int, ...] | None = None
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    lengths: dict[str, int] | None = field(default=None, metadata={"beside": "step"})
    chosen_score: float | None = None
    rejected_score: float | None = None
    ranked_right: bool | None = None
