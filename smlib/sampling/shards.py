"""Bulk sampling: any number of samples for any number of questions, on disk, shard by shard.

    bulk = Bulk(folder, engine, {"base": "tiny"})
    bulk.draw(questions, 8, SamplingParams(temperature=0.7, max_new_tokens=128, seed=0))  # (key, prompt) pairs
    for key, samples in bulk.read():
        ...

The folder holds manifest.json, which says what the samples depend on, and files such as shard-000003.0-8.jsonl: the
samples number 0 to 7 of the fourth `shard` questions, under a header with a hash of that manifest. A shard is drawn,
written in one atomic step, and forgotten but for the keys, so memory hardly grows with the number of questions, and a
killed run loses at most the shard it was at. The same call goes on where it stopped; with a larger n it draws the new
samples only, into files of their own (0-8, then 8-16).
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from smlib.declared import Drawn, Rows, checked
from smlib.errors import UsageError
from smlib.files.artifacts import MANIFEST, StageError, StageMismatch, refuse_difference
from smlib.files.atomic import DamagedError, json_sha256, load_json, locked, write_text
from smlib.progress import progress_bar
from smlib.sampling.engines import Engine
from smlib.sampling.params import Sample, SamplingParams

_SHARDS = "shard-" + "[0-9]" * 6 + ".*-*.jsonl"
_NAME = re.compile(r"shard-\d{6}\.(?P<first>\d+)-\d+\.jsonl")


class Bulk:
    """Samples of one engine under one folder; of an engine it has `sample_ids`, without `first`.

    source: what besides the drawing decides the samples, such as the base and its SHA-256; kept in the manifest.
    shard: questions in one file: what a killed run loses, and what is in memory at a time.
    """

    def __init__(self, folder: str | Path, engine: Engine, source: dict, shard: int = 64):
        shard = checked("shard", shard, Rows, 64)
        self.folder, self.engine, self.shard, self.name = Path(folder), engine, shard, engine.name
        self.tokenizer = engine.tokenizer
        self.source = {"engine": engine.name, **source, "shard": shard}

    def draw(
        self,
        questions: Iterable[tuple[str, str | list[int]]],
        n: int,
        params: SamplingParams,
        *,
        progress: str | None = None,
    ) -> dict[str, int]:
        """Draw what is missing of `n` samples for every (key, prompt) of `questions`; a prompt is text or token ids.

        questions: read once, in order, a shard at a time; keys are unique. The order is part of the run: shard i holds
            the questions from i * shard on. progress: label of a bar on standard output; it knows the time left where
            `questions` has a length.

        Returns {"drawn": samples drawn now, "found": samples that were on disk, "dropped": damaged files that were
        drawn again}. Raises StageMismatch, naming what differs, where the folder was made with something else, and
        BusyError where another process is writing to it.
        """
        checked("n", n, Drawn, 8)
        with locked(self.folder / ".locks" / "draw.lock", f"drawing into {self.folder}"):
            self._check_manifest(params)
            counts = self._draw(questions, n, params, progress)
            self._write_manifest()  # all shards were there, and it was deleted
            return counts

    def sample_ids(
        self, prompt_ids: list[list[int]], n: int, params: SamplingParams, *, keys: list[str],
        progress: str | None = None,
    ) -> list[list[Sample]]:  # fmt: skip
        """`draw` and `read` in one: an engine whose samples are on disk, so that a killed run goes on."""
        self.draw(list(zip(keys, prompt_ids, strict=True)), n, params, progress=progress)
        return [samples for _, samples in self.read(n)]

    def _draw(self, questions, n, params, progress):
        counts, tokens, started = {"drawn": 0, "found": 0, "dropped": 0}, 0, time.perf_counter()
        total, seen = len(questions) * n if hasattr(questions, "__len__") else None, set()
        with progress_bar(progress, total, "sample") as bar:
            for number, block in enumerate(_blocks(questions, self.shard)):
                keys, prompts = map(list, zip(*block, strict=True))
                seen.update(keys)
                if len(seen) < number * self.shard + len(block):
                    raise UsageError(f"a key of shard {number} was given before; give every question a key of its own")
                (missing, damaged), counted = self._missing(number, block, n), bar.n
                for path in damaged:
                    bar.write(f"{path.name} is damaged: its samples are drawn again.")
                    path.unlink()
                for first, last in missing:
                    draw = self.engine.sample if isinstance(prompts[0], str) else self.engine.sample_ids
                    samples = draw(prompts, last - first, params, keys=keys, first=first, progress=bar)
                    self._write({"shard": number, "first": first, "last": last}, block, samples)
                    tokens += sum(len(one.token_ids) for group in samples for one in group)
                drawn = sum(last - first for first, last in missing) * len(block)
                counts["drawn"] += drawn
                counts["found"] += n * len(block) - drawn
                counts["dropped"] += len(damaged)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
                bar.update(n * len(block) - (bar.n - counted))
        return counts

    def _missing(self, shard: int, block: list, n: int) -> tuple[list[tuple[int, int]], list[Path]]:
        """What is not on disk of the samples 0 to n of a shard, as spans (first, last), and its damaged files."""
        spans, damaged, done = [], [], 0
        for path in self._files(shard):
            if (header := _header(path)) is None:
                damaged.append(path)
                continue
            self._refuse_other(path, header, self.manifest)
            if header["questions"] != json_sha256(block):
                raise StageMismatch(
                    f"{path} holds other questions than are asked for, or in another order, from question "
                    f"{shard * self.shard} ({block[0][0]!r}) on: give the same ones, or choose another folder"
                )
            if done < min(header["first"], n):
                spans.append((done, min(header["first"], n)))
            done = header["last"]
        return spans + [(done, n)] * (done < n), damaged

    def read(self, n: int | None = None) -> Iterator[tuple[str, list[Sample]]]:
        """Every question's key and its samples, the first n of them (default: all), in the order drawn.

        Raises StageError where a file is damaged, or has fewer than n samples: `draw` makes it good.
        """
        if (manifest := self._read_manifest()) is None:
            raise StageError(f"{self.folder} has no {MANIFEST}, the record of how it was drawn: draw again")
        for place, shard in enumerate(sorted({int(path.name[6:12]) for path in self.folder.glob(_SHARDS)})):
            if place != shard:
                raise StageError(f"{self.folder} has no file of shard {place}, but of later ones: draw again")
            found: dict[str, list[Sample]] = {}
            for path in self._files(shard):
                if found and n is not None and _first(path) >= n:
                    break
                header = _header(path)
                if header is None or header["first"] != max(map(len, found.values()), default=0):
                    raise StageError(f"{path} is damaged, or the file before it is missing: draw again")
                self._refuse_other(path, header, manifest)
                with path.open(encoding="utf-8") as file:
                    for line in islice(file, 1, 1 + header["rows"]):
                        row = json.loads(line)
                        found.setdefault(row["key"], []).extend(map(Sample.from_row, row["samples"]))
            for key, samples in found.items():
                if n is not None and len(samples) < n:
                    raise StageError(f"{self.folder} has {len(samples)} of {n} samples of {key!r}: draw {n} first")
                yield key, samples[:n]

    def _check_manifest(self, params: SamplingParams) -> None:
        """Refuse samples that were drawn otherwise."""
        drawing = {f"drawing.{name}": value for name, value in dataclasses.asdict(params).items()}
        self.manifest = json.loads(json.dumps(self.source | drawing))
        if theirs := self._read_manifest():
            refuse_difference(self.folder, self.manifest, theirs, "folder")

    def _read_manifest(self) -> dict | None:
        try:
            return load_json(self.folder / MANIFEST)
        except DamagedError as error:
            raise StageError(f"{error}: delete that file, and draw with the same settings again") from error

    def _refuse_other(self, path: Path, header: "_Header", manifest: dict) -> None:
        """Raise StageMismatch where a shard was drawn under another manifest, which somebody has deleted since."""
        if header["made"] != json_sha256(manifest):
            raise StageMismatch(
                f"{path} was drawn with other settings than are asked for, and the {MANIFEST} that recorded them is "
                f"gone: choose another folder, or delete {self.folder}"
            )

    def _files(self, shard: int) -> list[Path]:
        """The files of a shard, first samples first."""
        found = self.folder.glob(f"shard-{shard:06d}.*.jsonl")
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_first)

    def _write_manifest(self) -> None:
        if not (self.folder / MANIFEST).exists():
            write_text(self.folder / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")

    def _write(self, header: dict, block: list, samples: list[list[Sample]]) -> None:
        """A header, one row a question, and last the SHA-256 of all lines before; the manifest before the first."""
        self._write_manifest()
        path = self.folder / f"shard-{header['shard']:06d}.{header['first']}-{header['last']}.jsonl"
        header |= {"made": json_sha256(self.manifest), "questions": json_sha256(block), "rows": len(block)}
        rows = ({"key": key, "samples": list(map(_plain, n))} for (key, _), n in zip(block, samples, strict=True))
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in chain([header], rows))
        write_text(path, text + _end(hashlib.sha256(text.encode())))


def _first(path: Path) -> int:
    """The number of the first sample in a shard's file."""
    return int(_NAME.fullmatch(path.name)["first"])


def _blocks(questions: Iterable, size: int) -> Iterator[list]:
    rest = iter(questions)
    while block := list(islice(rest, size)):
        yield block


class _Header(TypedDict):
    shard: int
    first: int
    last: int
    made: str  # hash of the manifest
    questions: str  # hash of keys and prompts
    rows: int


def _header(path: Path) -> _Header | None:
    """The first line of a shard's file; None where the file is not whole, as its last line says, or of another form."""
    digest, last = hashlib.sha256(), b""
    with path.open("rb") as file:
        first = file.readline()
        file.seek(0)
        for line in file:
            digest.update(last)
            last = line
    if last != _end(digest).encode():
        return None
    with suppress(ValidationError):
        return TypeAdapter(_Header).validate_json(first)


def _end(digest) -> str:
    return json.dumps({"sha256": digest.hexdigest()}) + "\n"


def _plain(sample: Sample) -> dict:
    """As JSON; log-probabilities to a millionth of a nat."""
    return dataclasses.asdict(sample) | {"logprobs": [round(value, 6) for value in sample.logprobs]}
