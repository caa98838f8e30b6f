"""Schemas of the files of a workspace that have no module of their own.

Others are with what writes them: holder.json in `lock`, lines of the journal in `journal`, records of bases in
`stages.status`, plan.json in `plan.file`, hub/facts.jsonl in `hub.ledger`.

They are sealed. One that is missing, or is not what was written, counts as not there: what it says is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from ..adapters.keys import Side
from ..adapters.scaling import ModuleShape
from ..files import read_sealed
from ..schema import Count, Measure, Schema
from ..settings import Objective

M = TypeVar("M", bound=BaseModel)
FORMAT: Literal[3] = 3  # of all files of a workspace
SUM = "sum_of_"  # before the name of the array that has the sums of another


class Slot(Schema):
    """Place of a moment: chunks of an array of zarr."""

    lease: Annotated[str, "its group"]
    array: Annotated[str, "the array in it"]
    index: Annotated[int, "where it is on the module axis"]
    form: Annotated[str, "`second` or `columns`"]
    shape: Annotated[tuple[int, int, int], Field(strict=False), "(m, d, d) or (m, n, d) of the array"]
    height: Annotated[int, "rows of a chunk"]
    dtype: Annotated[str, "of the numbers, float32 or float64"]
    metadata: Annotated[str, "digest of the zarr.json of the array and of that of its sums"] = ""

    @property
    def dim(self) -> int:
        """d, the length of a vector."""
        return self.shape[2]

    @property
    def bytes(self) -> int:
        """Size of the moment, without the sum."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def chunk(self, number: int) -> str:
        """File of a chunk, by its number along the rows."""
        return f"c.{self.index}.{number}.0"

    def tops(self, count: int) -> range:
        """First row of each chunk that holds some of `count` rows: one chunk at least."""
        return range(0, max(1, count), self.height)


class MomentRecord(Schema):
    """Moment on disk: its slot and checksums."""

    slot: Annotated[Slot, "where it lies"]
    count: Annotated[Count, "n, its vectors"]
    energy: Annotated[Measure, "its trace"]
    checksum: Annotated[Count, "crc32c of its matrix"]
    sum_checksum: Annotated[Count, "crc32c of its sum"]
    removed: Annotated[list[Count], "admissions that were taken out since, and are still in it"] = Field(default=[])

    @property
    def stacked(self) -> bool:
        """Whether columns are kept."""
        return self.slot.form == "columns"

    @property
    def rows(self) -> int:
        """Number of rows on disk, without padding."""
        return self.count if self.stacked else self.slot.dim

    def files(self, root: Path) -> list[Path]:
        """Chunk files of the moment and of its sum, under the folder of all leases."""
        slot, folder = self.slot, root / self.slot.lease
        chunks = [folder / slot.array / slot.chunk(i) for i in range(len(slot.tops(self.rows)))]
        return [*chunks, folder / f"{SUM}{slot.array}" / f"c.{slot.index}.0"]


class Marker(Schema):
    """markers/MODULE.json: the moments of a module, and which entries of the journal they have seen."""

    module: Annotated[str, "its name"]
    entries: Annotated[Count, "how many entries of the journal"]
    admitted: Annotated[str, "digest of these entries"]
    never: Annotated[list[Count], "admissions among them that were taken out before they were summed"] = Field(
        default=[]
    )
    A: Annotated[MomentRecord, "the moment of side A"]
    B: Annotated[MomentRecord, "the moment of side B"]

    @property
    def sides(self) -> dict[Side, MomentRecord]:
        """The moments of both sides."""
        return {"A": self.A, "B": self.B}

    @property
    def lease(self) -> str:
        """The lease in which both lie."""
        return self.A.slot.lease


class Binding(Schema):
    """workspace.json, and a copy of it: what all numbers of a workspace depend on."""

    format: Annotated[Literal[3], "of all files of the workspace"] = FORMAT
    objective: Annotated[Objective, "what is summed"]
    center: Annotated[bool, "whether bases are of centred vectors"]
    share_initial: Annotated[bool, "as in the settings"]
    moment_dtype: Annotated[str, "of moments"]
    quantum: Annotated[Count, "vectors that are summed at once"]
    blas_threads: Annotated[Count, "that sum them"]
    base_model: Annotated[str, "of all adapters; empty if it is not known"]


class ShapesFile(Schema):
    """shapes/DIGEST.json: the shared modules of one kind of adapters."""

    model_config = ConfigDict(strict=False)  # a tuple of JSON is a list

    modules: Annotated[
        Mapping[str, ModuleShape], "each: rank, d_in, d_out, stacked experts, parameters that its name means"
    ]


class Published(RootModel[dict[str, list[str]]]):
    """published.json: outputs, and the digests of the bases, or codes, that were published there."""


def read_record(model: type[M], path: Path) -> M | None:
    """Read a sealed file; None if it is missing or damaged."""
    values = read_sealed(path)
    try:
        return model.model_validate(values) if values else None
    except ValidationError:
        return None
