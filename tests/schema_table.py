"""The tables of docs/format.md, of files of JSON: `python -m tests.schema_table` writes them from their models."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from lorashare_stream.checkpoint.config import Recorded
from lorashare_stream.checkpoint.records import AdapterMeta, AdapterRecord
from lorashare_stream.hub.ledger import AdapterLine, ConfigLine, RefusalLine, TensorsLine
from lorashare_stream.plan.file import PlanFile, PlannedAdapter, PlannedGroup, PlannedStep, Sizes
from lorashare_stream.plan.sources import HubEntry, PathEntry
from lorashare_stream.schema import Skipped
from lorashare_stream.stages.status import BasisRecord
from lorashare_stream.workspace.journal import Admission, Removal
from lorashare_stream.workspace.lock import Holder
from lorashare_stream.workspace.records import Binding, Marker, MomentRecord, ShapesFile, Slot

PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"
FILES: dict[str, type] = {
    "`compression_stats.lorashare_stream` of `share_config.json`": Recorded,
    "`adapters/NAME/adapter_meta.json`": AdapterMeta,
    "`lorashare_stream` of it": AdapterRecord,
    "`skipped.json`, a list": Skipped,
    "`journal.jsonl` of a workspace, a line: an adapter was admitted": Admission,
    "likewise, with a field `admission`: it was taken out": Removal,
    "`workspace.json`, and `workspace.copy.json`, of a workspace": Binding,
    "`shapes/DIGEST.json` of a workspace": ShapesFile,
    "`markers/MODULE.json` of a workspace": Marker,
    "`A` and `B` of it": MomentRecord,
    "`slot` of these": Slot,
    "`bases/KEY/MODULE.json` of a workspace": BasisRecord,
    "`holder.json` of a workspace": Holder,
    "`hub/facts.jsonl` of a workspace, a line: tensors that adapters share": TensorsLine,
    "likewise, with a field `config`: a configuration that they share": ConfigLine,
    "likewise, with a field `id`: an adapter of the Hub": AdapterLine,
    "likewise, with a field `refused`: its values are never added": RefusalLine,
    "`plan.json` of a workspace, and the file of `plan -o`": PlanFile,
    "`sizes` of it": Sizes,
    "`steps` of it": PlannedStep,
    "`groups` of it": PlannedGroup,
    "`adapters` of it": PlannedAdapter,
    "a manifest (`.jsonl`, `.yaml`): an entry with a path": PathEntry,
    "likewise, with a repository of the Hub": HubEntry,
}
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any"}


def kind(hint: Any) -> str:
    """The type of a field in words of JSON."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(kind, parts)))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (list, tuple):
        several = len({part for part in parts if part is not ...}) > 1
        return "list" if several else f"list of {kind(parts[0])}"
    if origin in (dict, collections.abc.Mapping):
        return "object" if parts[1] is Any else f"object of {kind(parts[1])}"
    return WORDS.get(hint, "object")


def rows(schema: type) -> list[tuple[str, str, str]]:
    """Name, type and meaning of the fields of a file; `?` follows the name of one that may be missing."""
    hints = get_type_hints(schema, include_extras=True)
    found = []
    if issubclass(schema, BaseModel):
        fields = {f.alias or name: (name, f.is_required()) for name, f in schema.model_fields.items() if not f.exclude}
    else:
        assert dataclasses.is_dataclass(schema)
        given = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(schema)}
        fields = {name: (name, needed) for name, needed in given.items()}
    for shown, (name, needed) in fields.items():
        (meaning,) = [part for part in get_args(hints[name])[1:] if isinstance(part, str)]
        found.append((f"`{shown}`{'' if needed else '?'}", kind(hints[name]), meaning))
    return found


def table() -> str:
    lines = []
    for where, schema in FILES.items():
        lines += ["", f"**{where[0].upper()}{where[1:]}.**", "", "| field | type | meaning |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(schema)]
    return "\n".join(lines[1:])


def written(page: str) -> str:
    """The page, with its tables as the models are."""
    start, end = "<!-- made by python -m tests.schema_table -->\n", "\n<!-- end -->"
    assert start in page
    assert end in page
    return re.sub(f"(?s){start}.*{end}", lambda _: f"{start}{table()}{end}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
