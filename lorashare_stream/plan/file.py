"""plan.json: the plan as it is written, shown and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..adapters.adapter import Adapter
from ..adapters.hubid import parse_hub_id
from ..adapters.keys import group_id
from ..adapters.source import Source
from ..errors import UsageError, skipped_as_json
from ..files import read_json
from ..schema import FORMAT, Count, Format, Measure, Schema, Skipped, checked
from ..text import name_fault, printable
from .plan import Plan

AGAIN = "Make it again by lorashare-stream plan."


class PlannedAdapter(Schema):
    """Adapter of a plan: a folder, or a pinned adapter of the Hub."""

    name: Annotated[str, "its name"]
    path: Annotated[str | None, "its folder"] = None
    asked: Annotated[str | None, "of the Hub: the id as it was given"] = None
    source_id: Annotated[str, "its real path; of the Hub, the pinned id"]
    bytes: Annotated[Count | None, "of the Hub: bytes of its files"] = None
    fetches: Annotated[Count | None, "of the Hub: how often they are fetched at most"] = None
    beside: Annotated[list[str], "files of weights in its folder that are not taken"] = Field(default=[])

    @model_validator(mode="after")
    def _is_a_source(self) -> Self:
        if name_fault(self.name) is not None or "\0" in (self.path or ""):
            raise ValueError("a name of one path component, and a path without NUL")
        hub = parse_hub_id(self.source_id) if self.path is None else None
        if (self.path is None) == (self.asked is None) or (self.path is None and not (hub and hub.pinned)):
            raise ValueError("a path, or an id of the Hub that is pinned")
        return self

    def source(self) -> Source:
        """The source to read it from."""
        if self.asked is None:
            return Source(self.source_id, Path(self.path or ""), self.name)
        return Source(self.source_id, Path(self.asked), self.name, hub=parse_hub_id(self.source_id), asked=self.asked)


class PlannedStep(Schema):
    """Pass over the adapters or the modules."""

    name: Annotated[str, "ingest, accumulate, fit, project; of a coded checkpoint rate, encode"]
    tasks: Annotated[Count, "number of tasks"]
    read_bytes: Annotated[Count, "bytes of sources that they read"]
    peak_bytes: Annotated[Count, "memory of all processes at its peak"]
    concurrency: Annotated[Count, "tasks at a time"]


class PlannedGroup(Schema):
    """Group: the tensors that share a basis."""

    group: Annotated[str, "`module:side`"]
    d: Annotated[Count, "length of a vector"]
    n: Annotated[Count, "vectors: the sum of ranks"]
    adapters: Annotated[Count, "adapters that have the module"]
    statistic: Annotated[Literal["columns", "second moment"], "what is kept of the vectors"]
    break_even_k: Annotated[Measure, "k above which sharing saves nothing"]


class Sizes(Schema):
    """Bytes on disk, nearly; of moments the most at a time."""

    originals: Annotated[Count, "weight files of the adapters"]
    lora: Annotated[Count, "LoRA tensors in these"]
    verbatim: Annotated[Count, "other tensors in these"]
    moments: Annotated[Count, "moments"]
    converted: Annotated[Count, "safetensors that pickles are converted to"]
    workspace: Annotated[Count, "workspace"]
    workspace_files: Annotated[Count, "files of the workspace, not bytes"]
    basis: Annotated[Count, "components or directions; of k `auto` the break-even"]
    loadings: Annotated[Count, "loadings"]
    codes: Annotated[Count, "codes, at most"]
    metadata: Annotated[Count, "headers, configurations and records; 0 of a coded checkpoint"]
    checkpoint: Annotated[Count, "checkpoint"]


class PlanFile(Schema):
    """plan.json of a workspace, and the file of `plan -o`."""

    format: Annotated[Format, "1"] = 1
    fingerprint: Annotated[
        str, "digest of adapters and settings, by which `compress --plan` knows that nothing changed"
    ]
    presumed: Annotated[bool, "whether configurations on the Hub were not read"]
    settings: Annotated[dict[str, Any], "all settings"]
    base_model: Annotated[str, "common base model; empty if nothing names one"]
    base_models: Annotated[dict[str, Count], "base model that adapters name -> how many"]
    storage_dtype: Annotated[str, "dtype of components and loadings: F32, BF16 or F16"]
    sizes: Annotated[Sizes, "bytes on disk"]
    steps: Annotated[list[PlannedStep], "passes, in order"]
    groups: Annotated[list[PlannedGroup], "groups, by module; none where each adapter is coded alone"]
    batches: Annotated[Count, "batches of adapters under the disk budget"]
    adapters: Annotated[list[PlannedAdapter], "adapters, in the order of admission"]
    refused: Annotated[list[Skipped], "adapters that are left out, as in skipped.json"]
    absent: Annotated[list[Skipped], "adapters of the workspace whose sources cannot be read now"]
    notes: Annotated[list[str], "warnings; only of `plan`"] = Field(default=[])
    forecast: Annotated[dict[str, Any] | None, "sizes and errors foretold from a sample; only of `plan`"] = None
    analysis: Annotated[dict[str, Any] | None, "of `plan --analyze`"] = None
    error: Annotated[str | None, "what makes the plan impossible; only of `plan --json`"] = None
    checksum: Annotated[str | None, "seal; only in a workspace"] = None


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    values = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "presumed": plan.presumed,
        "settings": plan.settings.as_dict(),
        "base_model": plan.base_model,
        "base_models": plan.base_models,
        "storage_dtype": plan.storage,
        "sizes": plan.sizes,
        "steps": [{name: getattr(step, name) for name in PlannedStep.model_fields} for step in plan.steps],
        "groups": [
            {
                "group": group_id(g.module, g.side), "d": g.dim, "n": g.count, "adapters": g.adapters,
                "statistic": "columns" if g.stacked else "second moment", "break_even_k": g.break_even,
            }
            for g in plan.groups
        ],
        "batches": len(plan.batches),
        "adapters": [_planned(plan, adapter) for adapter in plan.adapters],
        "refused": skipped_as_json(plan.refused),
        "absent": skipped_as_json(plan.absent),
    }  # fmt: skip
    return PlanFile.model_validate(values).model_dump(exclude_unset=True)


def _planned(plan: Plan, adapter: Adapter) -> dict[str, Any]:
    values: dict[str, Any] = {"name": adapter.name, "source_id": adapter.source_id}
    if adapter.origin is None:
        values["path"] = str(adapter.folder.absolute())
    else:
        values |= {"asked": adapter.origin.asked, "bytes": adapter.hub_bytes, "fetches": plan.fetches(adapter)}
    return values | ({"beside": list(adapter.beside)} if adapter.beside else {})


def read_plan(path: Path) -> PlanFile:
    """A plan that `plan -o` wrote.

    Raises:
        UsageError: naming the field that is wrong.
    """
    try:
        values = read_json(path)
    except ValueError as e:
        raise UsageError(f"{printable(path)} is not what lorashare-stream writes", found=str(e), remedy=AGAIN) from e
    return checked(PlanFile, values, printable(path), AGAIN, error=UsageError)
