"""Ledger of Hub adapters: headers and configurations read before they are fetched, kept in a workspace.

An append-only file of sealed lines; what many adapters have in common is there once. It holds pinned commits only,
which do not change: it needs no lock, and a line that is torn is asked for again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from ..adapters.safetensors import TensorRecord
from ..adapters.source import Listing
from ..errors import ValuesError
from ..files import sealed, unsealed
from ..text import digest_of

Records = tuple[TensorRecord, ...]


@dataclass(frozen=True)
class Known:
    """What is known of a pinned adapter."""

    files: Annotated[tuple[tuple[str, int], ...], "name and size in bytes of its weight files"]
    records: Annotated[Records, "their tensors"]
    digest: Annotated[str, "of the records"]
    config: Annotated[str | None, "its adapter_config.json, as JSON has it, if it was read"] = None
    listing: Annotated[Listing, "what the Hub says of it"] = field(default_factory=Listing)
    sha256: Annotated[str | None, "of its one weight file, if the Hub lists it"] = None
    refused: Annotated[ValuesError | None, "why its values must not touch a moment, if they must not"] = None


def digest_of_records(records: Records) -> str:
    """A digest by which a file is known to be the one whose header was read."""
    return digest_of([_plain(r) for r in records])


class Ledger:
    """The ledger of a workspace; without one, it is kept in memory.

    Args:
        path: of the file, which is made with its folder when there is something to write.
        writes: whether anything is written.
    """

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path = path if writes else None
        self._lock = threading.Lock()
        self._adapters: dict[str, Known] = {}  # which share what they have in common, kept by its digest:
        self._records: dict[str, Records] = {}
        self._configs: dict[str, str] = {}
        self._refused: dict[str, ValuesError] = {}  # by source id: what was fetched, and is not fetched again
        if path is not None and path.exists():
            for raw in path.read_bytes().splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    line = unsealed(json.loads(raw))
                    if line is not None:
                        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "records" in line:
            records = tuple(TensorRecord(n, d, tuple(s), *o) for n, d, s, *o in line["records"])
            if all(r.offset for r in records):  # of a pickle, a release before this one gave none
                self._records[line["digest"]] = records
        elif "refused" in line:
            self._refused[line["id"]] = ValuesError(line["refused"], **line["details"])
        elif "config" in line:
            self._configs[line["digest"]] = line["config"]
        else:
            listing = Listing(**{**line["listing"], "files": tuple(line["listing"]["files"])})
            files = tuple((str(name), int(size)) for name, size in line["files"])
            key, config = line["tensors"], self._configs.get(line["configuration"] or "")
            known = Known(files, self._records[key], key, config, listing, line.get("sha256"))
            self._adapters[str(line["id"])] = known

    def refuses(self, source_id: str) -> bool:
        """Whether the values of an adapter are known to be such that they must not touch a moment."""
        return source_id in self._refused

    def get(self, source_id: str) -> Known | None:
        """What is known of an adapter, if its tensors are."""
        known = self._adapters.get(source_id)
        return None if known is None else replace(known, refused=self._refused.get(source_id))

    def put(self, source_id: str, known: Known) -> Known:
        """Keep what is known of an adapter; what others have in common with it is shared with them."""
        lines: list[dict[str, Any]] = []
        key = None if known.config is None else digest_of(known.config)
        with self._lock:
            if known.digest not in self._records:
                lines.append({"digest": known.digest, "records": [_plain(r) for r in known.records]})
            if key is not None and key not in self._configs:
                lines.append({"digest": key, "config": known.config})
            records = self._records.setdefault(known.digest, known.records)
            config = None if key is None else self._configs.setdefault(key, str(known.config))
            kept = replace(known, records=records, config=config, refused=None)
            if self._adapters.get(source_id) != kept:
                self._adapters[source_id] = kept
                lines.append({
                    "id": source_id, "files": kept.files, "tensors": kept.digest, "configuration": key,
                    "listing": asdict(kept.listing), "sha256": kept.sha256,
                })  # fmt: skip
            if self._path is not None and lines:
                _append(self._path, lines)
        return replace(kept, refused=known.refused)


def note_refusal(path: Path, source_id: str, error: ValuesError) -> None:
    """Keep in a ledger that the values of an adapter must not touch a moment."""
    details = {k: v for k, v in error.details().items() if k != "adapter"}
    _append(path, [{"id": source_id, "refused": error.problem, "details": details}])


def _append(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    lines = b"".join(json.dumps(sealed(line)).encode() + b"\n" for line in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:  # not synced: what a power cut takes is asked for again
        os.write(fd, b"\n" + lines if _is_torn(path) else lines)
    finally:
        os.close(fd)


def _is_torn(path: Path) -> bool:
    """Whether a run was killed in the middle of a line."""
    with path.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - 1))
        return size > 0 and f.read(1) != b"\n"


def _plain(r: TensorRecord) -> list[Any]:
    return [r.name, r.dtype, list(r.shape), r.offset, r.nbytes, r.file]
