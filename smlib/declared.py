"""What values a setting, an option or an argument may have: declared as its type, checked here, refused in a sentence.

    Epochs = Annotated[float, Field(gt=0, le=1_000)]
    checked("sft.epochs", 2, Epochs, 1.0)   # 2.0
    checked("sft.epochs", -1, Epochs, 1.0)  # UsageError: sft.epochs = -1 is not allowed: give a number above 0 and ...

pydantic checks, strictly: no text and no bool passes for a number. A value has one form however it is written, 2 where
a whole number is declared and 2.0 where a fraction is, so that a stage has one fingerprint.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from smlib.errors import UsageError

# Upper bounds are far above what anyone wants: they refuse a slip that would fill the memory, or run for years.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # numpy takes no other
Natural = Annotated[int, Field(ge=0, le=2**63 - 1)]  # a sample's number, or its seed: PPO makes one for every update
Questions = Annotated[int, Field(ge=1, le=100_000)]  # per task; the largest published train split has 97,467
QuestionsOrZero = Annotated[int, Field(ge=0, le=100_000)]
Asked = Annotated[int, Field(ge=0, le=10_000_000)]  # questions in all
Samples = Annotated[int, Field(ge=1, le=10_000)]  # of one question
Drawn = Annotated[int, Field(ge=1, le=100_000_000)]  # of one prompt in one call
SamplesOrZero = Annotated[int, Field(ge=0, le=10_000)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]  # of one completion
TopK = Annotated[int, Field(ge=0, le=10_000_000)]  # tokens kept of the vocabulary, 0 = all
CacheTokens = Annotated[int, Field(ge=0, le=1_000_000_000)]  # tokens whose keys and values are held, 0 = no bound
PrefixTokens = Annotated[int, Field(ge=0, le=1_000_000_000)]
Rows = Annotated[int, Field(ge=1, le=100_000)]  # of a batch
RowsOrZero = Annotated[int, Field(ge=0, le=100_000)]
Processes = Annotated[int, Field(ge=1, le=10_000)]
Passes = Annotated[int, Field(ge=1, le=1_000)]
Epochs = Annotated[float, Field(gt=0, le=1_000)]
Rate = Annotated[float, Field(gt=0, le=1)]  # of learning
LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, and much lower ones overflow


def _not_tiny(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError("too small")
    return value


Temperature = Annotated[
    float,
    Field(ge=0, le=100, description=f"0 (greedy), or a number from {LEAST_TEMPERATURE} to 100"),
    AfterValidator(_not_tiny),
]
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrZero = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(gt=0, le=1e9)]
SizeOrZero = Annotated[float, Field(ge=0, le=1e9)]
Weight = Annotated[float, Field(ge=-1e9, le=1e9)]
Dtype = Literal["float32", "bfloat16", "nf4", "auto"]
EngineName = Literal["native", "vllm", "auto"]
Prompt = Literal["plain", "chat"]
Completion = Literal["shortest", "random", "most_likely"]
Architecture = Literal["llama", "gpt2", "mistral", "qwen3"]  # of a base that `smlib pretrain` makes
Text = Annotated[str, Field(pattern=r"^\P{Cc}*[^\s\p{Cc}]\P{Cc}*$")]  # not blank, one line

_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "True or False",
    "string": "text",
    "array": "a list",
    "object": "a dict",
}


def setting(default=MISSING, meaning: str = ""):
    """A field of a `Declared` dataclass with what it means, which errors, --help and `smlib settings` read."""
    return field(default=default, metadata={"meaning": meaning})


class Declared:
    """A frozen dataclass whose fields are checked as they are declared, and kept in the form declared.

    A field is named in errors as `preset` takes it: `SFTSettings.epochs` is sft.epochs. Fields that are such a
    dataclass themselves were checked when they were made.
    """

    def __post_init__(self):
        group = type(self).__name__.removesuffix("Settings").lower()
        for name, one in described(type(self)).items():
            value = checked(f"setting {group}.{name}".replace(" .", " "), getattr(self, name), one.kind, one.default)
            object.__setattr__(self, name, value)

    def keys(self) -> dict:
        """What a result depends on, by name: all fields, where a group does not say otherwise."""
        return asdict(self)


@dataclass(frozen=True)
class Described:
    """A field of a `Declared` dataclass: its declared type, its default (MISSING for none), and what it means."""

    kind: object
    default: object
    meaning: str


def described(group: type) -> dict[str, Described]:
    """The settings of a group, by name, without the groups in it."""
    kinds = _hints(group)
    return {
        field.name: Described(kinds[field.name], field.default, field.metadata.get("meaning", ""))
        for field in fields(group)
        if not is_dataclass(kinds[field.name])
    }


def checked(name: str, value, kind, like=None):
    """The value in the form that `kind`, a type as above, declares. UsageError where it is not allowed.

    like: a value that is, for the error to name.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        raise UsageError(_sentence(name, value, kind, like)) from None


def allowed(kind) -> str:
    """What `kind` lets pass, in words: "a whole number from 1 to 100,000", "one of: plain, chat"."""
    schema = _adapter(kind).json_schema()
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices:
        return f"one of: {', '.join(choices)}"
    if "description" in schema:
        return schema["description"]
    wanted, high = _WORDS[schema["type"]], schema.get("maximum")
    if "minimum" in schema:
        wanted += f" from {schema['minimum']:,.15g} to {high:,.15g}"
    if "exclusiveMinimum" in schema:
        wanted += f" above {schema['exclusiveMinimum']:,.15g} and at most {high:,.15g}"
    if "pattern" in schema:
        wanted += " of one line that is not blank"
    return wanted


def named_folder(name: str, text: str) -> Path:
    """The folder that the option called `name` gives. UsageError where there can be none."""
    folder = Path(checked(name, text, Text))
    if file := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UsageError(f"{name} = {text!r} is not allowed, since {str(file)!r} is a file: give another folder")
    if link := next((path for path in (folder, *folder.parents) if path.is_symlink() and not path.exists()), None):
        raise UsageError(f"{name} = {text!r} is not allowed, since {str(link)!r} is a broken link: give another folder")
    return folder


def _sentence(name: str, value, kind, like) -> str:
    wanted = allowed(kind)
    if wanted.startswith("one of"):
        return f"{name} {shown(value)} is unknown; choose {wanted}"
    such_as = f", such as {like!r}" if isinstance(like, int | float | str) and like != "" else ""
    return f"{name} = {shown(value)} is not allowed: give {wanted}{such_as}"


def shown(value) -> str:
    """repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes 4,300 digits at most
        text = f"{type(value).__name__} of more than 4,300 digits"
    return text if len(text) <= 100 else f"{text[:90]}..."


@cache
def _adapter(kind) -> TypeAdapter:
    strictly = ConfigDict(strict=True, allow_inf_nan=False)
    return TypeAdapter(Annotated[kind, BeforeValidator(_whole)], config=strictly)


def _whole(value):
    return int(value) if isinstance(value, float) and value.is_integer() else value


@cache
def _hints(group: type) -> dict:
    return get_type_hints(group, include_extras=True)
