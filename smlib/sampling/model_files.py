"""The files of a model's folder, looked at before transformers and peft read them.

A folder comes from anywhere. It may be cut short or of another shape than its names promise, and it may hold what runs
when it is read, as pickled weights do. Each such fault is a ModelError of one sentence that names the file.
"""

import json
import re
import textwrap
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smlib.errors import ModelError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WHOLE_NUMBERS = ("BOOL", "I16", "I32", "I64", "U16", "U32", "U64")  # those of 8 bits may be rounded weights
ANOTHER = "or choose another model (--model)"


def read_object(file: Path) -> dict:
    """The JSON object in a file; ModelError where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}): copy or download it again, {ANOTHER}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no JSON object: copy or download it again, {ANOTHER}")
    return found


def check_settings(folder: Path, *names: str) -> None:
    """Raise ModelError for the first of these files that is there and holds no JSON object."""
    for file in (folder / name for name in names):
        if file.exists():
            read_object(file)


def check_weights(folder: Path, stem: str = "model") -> None:
    """Raise ModelError unless the weights are there as safetensors, every file as long as its header says and
    of numbers with a fraction.

    stem: of the files' names, "model" or "adapter_model". The numbers themselves are not looked at.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    files = [single] if single.is_file() or not index.is_file() else _shards(index)
    if not single.is_file() and not index.is_file():
        if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED):
            raise ModelError(
                f"{folder} has its weights in {pickled[0]}, a format that can run code when it is read, and only "
                f"safetensors are read: convert it with save_pretrained if you trust it, {ANOTHER}"
            )
        raise ModelError(f"{folder} has no weights ({single.name}): copy it again, {ANOTHER}")
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, though {index.name} names it: copy or download it, {ANOTHER}")
        try:
            with safe_open(file, "pt") as found:
                kinds = {name: found.get_slice(name).get_dtype() for name in found.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error}): copy or download it again, {ANOTHER}") from None
        for name, kind in kinds.items():
            if name.endswith((".weight", ".bias")) and kind in WHOLE_NUMBERS:
                raise ModelError(f"{name} in {file} holds integers ({kind}): copy or download it again, {ANOTHER}")


def _shards(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from weights to files: copy or download it again, {ANOTHER}")
    return [index.parent / name for name in sorted(set(names.values()))]


def refuse_misfits(place: str | Path, model: nn.Module, found: dict) -> None:
    """Raise ModelError where a model's weights do not fit its configuration, which transformers only warns of: what is
    missing it has drawn anew. And where a weight is not finite.

    found: what from_pretrained says of the loading. What is left over counts where the model has numbered layers of
    that name; another head, say, is left aside, as by transformers.
    """
    modules = dict(model.named_modules())
    sizes = [name for name, *_ in found["mismatched_keys"]]
    layers = [name for name in found["unexpected_keys"] if re.split(r"\.\d+\.", name)[0] in modules]
    refuse_differences(place, sorted({*found["missing_keys"], *sizes, *layers}))
    refuse_nonfinite(place, dict(model.named_parameters()))


def refuse_differences(place: str | Path, names: list[str]) -> None:
    if names:
        raise ModelError(
            f"the weights in {place} do not fit its configuration: {len(names)} differ (missing, left over or of "
            f"another size), such as {names[0]}; copy or download both again, {ANOTHER}"
        )


def refuse_nonfinite(place: str | Path, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise ModelError(
                f"{name} in {place} has numbers that are not finite: use an earlier state of that model, {ANOTHER}"
            )


def words(error: BaseException) -> str:
    """What an error says, in one line and not too long."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
