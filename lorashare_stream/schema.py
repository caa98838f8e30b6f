"""Files of JSON that this package writes: each has a pydantic model, which refuses what it does not know by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from .errors import AdapterError, CheckpointError, StreamError
from .files import read_json
from .text import printable

M = TypeVar("M", bound=BaseModel)
NEWER = "Install that: pip install --upgrade lorashare-stream."
FORMAT = 1  # of every file that has a field `format`
Format = Literal[1]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Measure = Annotated[float, Field(allow_inf_nan=False)]


class Schema(BaseModel):
    """Model of a part of a file: fields that it does not know, and values of another type, are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class Skipped(Schema):
    """An adapter that was left out, in skipped.json and plan.json."""

    reason: Annotated[str, "why, in a sentence"]
    problem: Annotated[str, "what is wrong, in a clause"]
    adapter: Annotated[str | None, "its name"] = None
    key: Annotated[str | None, "the tensor or the field"] = None
    found: Annotated[str | None, "what is there"] = None
    expected: Annotated[str | None, "what should be"] = None
    remedy: Annotated[str | None, "what to do"] = None
    source: Annotated[str | None, "where it comes from"] = None

    def error(self) -> AdapterError:
        """The error that it was left out for."""
        return AdapterError(**self.model_dump(exclude={"reason", "source"}))


class SkippedFile(RootModel[list[Skipped]]):
    """skipped.json."""


def read_skipped(path: Path) -> list[Skipped]:
    """The adapters that were left out; none if there is no such file, or it is damaged."""
    try:
        return SkippedFile.model_validate(read_json(path)).root
    except (OSError, ValueError):
        return []


def checked(
    model: type[M],
    values: object,
    file: str,
    remedy: str,
    adapter: str | None = None,
    error: type[StreamError] = CheckpointError,
) -> M:
    """The content of a file, which may be a stranger's.

    Args:
        model: of the file.
        values: what JSON has.
        file, adapter: its name, and the adapter that it is of.
        remedy: what to do if it is damaged.
        error: type of the error, which names the field that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as e:
        age = _age_in(e)
        what = "is not what lorashare-stream writes"
        what = what if age is None else f"was written by {age} version of lorashare-stream"
        remedy = NEWER if age == "a newer" else remedy
        raise error(f"{file} {what}", adapter=adapter, remedy=remedy, **fault_of(e)) from e


def _age_in(error: ValidationError) -> str | None:
    """Age of a version that wrote another `format` than the one that is expected; None if the format is not it."""
    for fault in error.errors(include_url=False):
        if fault["loc"][-1:] == ("format",) and fault["type"] == "literal_error" and isinstance(fault["input"], int):
            return "a newer" if fault["input"] > int(fault["ctx"]["expected"]) else "an older"
    return None


def read_checked(path: Path, model: type[M], remedy: str, adapter: str | None = None) -> M:
    """The same of a JSON file; raises CheckpointError also if it cannot be read."""
    try:
        values = read_json(path)
    except (ValueError, FileNotFoundError) as e:
        raise CheckpointError(f"{path.name} cannot be read", adapter=adapter, found=str(e), remedy=remedy) from e
    return checked(model, values, path.name, remedy, adapter)


def fault_of(error: ValidationError) -> dict[str, Any]:
    """The first thing that is wrong: `key`, `found` and `expected` of an error."""
    first = error.errors(include_url=False)[0]
    found = "nothing" if first["type"] == "missing" else printable(first["input"])
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    expected = {"missing": "a value", "extra_forbidden": "no field of this name"}.get(first["type"], expected)
    return {"key": ".".join(map(str, first["loc"])), "found": found, "expected": expected}
