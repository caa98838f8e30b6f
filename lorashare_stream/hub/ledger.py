"""Ledger of Hub adapters: headers and configurations read before they are fetched, kept in a workspace.

An append-only file of sealed lines; what many adapters have in common is there once. It holds pinned commits only,
which do not change: it needs no lock, and a line that is torn is asked for again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, ValidationError

from ..adapters.safetensors import TensorRecord
from ..adapters.source import Listing
from ..errors import ValuesError, WorkspaceError
from ..files import sealed, unsealed
from ..schema import Count, Schema, fault_of
from ..text import digest_of

Records = tuple[TensorRecord, ...]
Row = tuple[str, str, tuple[Count, ...], Count, Count, Count]


class _Line(Schema):
    model_config = ConfigDict(strict=False)  # JSON has lists for tuples


class TensorsLine(_Line):
    """The tensors of adapters, which share them."""

    digest: Annotated[str, "of the next field"]
    records: Annotated[list[Row], "name, dtype, shape, offset, bytes, number of the file"]


class ConfigLine(_Line):
    """A configuration of adapters, which share it."""

    digest: Annotated[str, "of the next field"]
    config: Annotated[str, "an adapter_config.json, as text"]


class AdapterLine(_Line):
    """An adapter whose tensors, and perhaps configuration, are in lines before."""

    id: Annotated[str, "its id on the Hub, pinned"]
    files: Annotated[tuple[tuple[str, Count], ...], "name and bytes of its weight files"]
    tensors: Annotated[str, "digest of their records"]
    configuration: Annotated[str | None, "digest of its configuration, if it was read"]
    listing: Annotated[Listing, "what the Hub says of it: files, base_model, gated, private, license"]
    sha256: Annotated[str | None, "of its one weight file, if the Hub lists it"]


class RefusalLine(_Line):
    """An adapter whose values must not touch a moment."""

    id: Annotated[str, "its id on the Hub, pinned"]
    refused: Annotated[str, "why"]
    details: Annotated[dict[str, str], "key, found, expected, remedy of the error"]


@dataclass(frozen=True)
class Known:
    """What is known of a pinned adapter.

    Attributes:
        files: name and size in bytes of its weight files.
        records: their tensors.
        digest: of the records.
        config: its adapter_config.json, as JSON has it, if it was read.
        listing: what the Hub says of it.
        sha256: of its one weight file, if the Hub lists it.
        refused: why its values must not touch a moment, if they must not.
    """

    files: tuple[tuple[str, int], ...]
    records: Records
    digest: str
    config: str | None = None
    listing: Listing = field(default_factory=Listing)
    sha256: str | None = None
    refused: ValuesError | None = None


def digest_of_records(records: Records) -> str:
    """A digest by which a file is known to be the one whose header was read."""
    return digest_of(_rows(records))


def _rows(records: Records) -> list[Row]:
    return [(r.name, r.dtype, r.shape, r.offset, r.nbytes, r.file) for r in records]


class Ledger:
    """The ledger of a workspace; without one, it is kept in memory.

    Args:
        path: of the file, which is made with its folder when there is something to write.
        writes: whether anything is written.

    Raises:
        WorkspaceError: if a line is whole, and not of this version.
    """

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path = path if writes else None
        self._lock = threading.Lock()
        self._adapters: dict[str, Known] = {}  # which share what they have in common, kept by its digest:
        self._records: dict[str, Records] = {}
        self._configs: dict[str, str] = {}
        self._refused: dict[str, ValuesError] = {}  # by source id
        for raw in path.read_bytes().splitlines() if path is not None and path.exists() else ():
            line = _line(raw)
            if isinstance(line, TensorsLine):
                self._records[line.digest] = tuple(TensorRecord(*row) for row in line.records)
            elif isinstance(line, ConfigLine):
                self._configs[line.digest] = line.config
            elif isinstance(line, RefusalLine):
                self._refused[line.id] = ValuesError(line.refused, **line.details)
            elif isinstance(line, AdapterLine) and line.tensors in self._records:
                config = self._configs.get(line.configuration or "")
                records = self._records[line.tensors]
                self._adapters[line.id] = Known(line.files, records, line.tensors, config, line.listing, line.sha256)

    def refuses(self, source_id: str) -> bool:
        """Whether the values of an adapter are known to be such that they must not touch a moment."""
        return source_id in self._refused

    def get(self, source_id: str) -> Known | None:
        """What is known of an adapter, if its tensors are."""
        known = self._adapters.get(source_id)
        return None if known is None else replace(known, refused=self._refused.get(source_id))

    def put(self, source_id: str, known: Known) -> Known:
        """Keep what is known of an adapter; what others have in common with it is shared with them."""
        lines: list[_Line] = []
        key = None if known.config is None else digest_of(known.config)
        with self._lock:
            if known.digest not in self._records:
                lines.append(TensorsLine(digest=known.digest, records=_rows(known.records)))
            if key is not None and key not in self._configs:
                lines.append(ConfigLine(digest=key, config=str(known.config)))
            records = self._records.setdefault(known.digest, known.records)
            config = None if key is None else self._configs.setdefault(key, str(known.config))
            kept = replace(known, records=records, config=config, refused=None)
            if self._adapters.get(source_id) != kept:
                self._adapters[source_id] = kept
                lines.append(
                    AdapterLine(
                        id=source_id, files=kept.files, tensors=kept.digest, configuration=key, listing=kept.listing,
                        sha256=kept.sha256,
                    )
                )  # fmt: skip
            if self._path is not None and lines:
                _append(self._path, lines)
        return replace(kept, refused=known.refused)


def note_refusal(path: Path, source_id: str, error: ValuesError) -> None:
    """Keep in a ledger that the values of an adapter must not touch a moment."""
    details = {k: v for k, v in error.details().items() if k != "adapter"}
    _append(path, [RefusalLine(id=source_id, refused=error.problem, details=details)])


def _line(raw: bytes) -> _Line | None:
    """What a line says; None if a bit of it is not what was written."""
    try:
        values = unsealed(json.loads(raw))
    except (ValueError, RecursionError):
        return None
    if values is None:
        return None
    kinds: dict[str, type[_Line]] = {"records": TensorsLine, "config": ConfigLine, "refused": RefusalLine}
    kind = next((kind for name, kind in kinds.items() if name in values), AdapterLine)
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        remedy = "Use that version; or delete this file: what it holds is asked of the Hub again."
        raise WorkspaceError("hub/facts.jsonl is of another version", remedy=remedy, **fault_of(e)) from e


def _append(path: Path, lines: Iterable[_Line]) -> None:
    data = b"".join(json.dumps(sealed(line.model_dump())).encode() + b"\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as f:  # not synced: what a power cut takes is asked for again
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        torn = size > 0 and f.read(1) != b"\n"  # a run was killed in the middle of a line
        f.write(b"\n" + data if torn else data)
