"""Journal of a workspace: which adapters were admitted, and which were taken out again, in order.

An append-only file, an entry a line, each with a checksum of its own. What a module's moments hold is told by how many
entries they have seen; an adapter is removed by an entry of its own, a tombstone. The shapes of the shared modules of
adapters are kept beside it, once for each kind of them, so that they stay known when sources are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter

from ..adapters.scaling import Shapes
from ..errors import WorkspaceError
from ..files import naming, sealed, sync, unsealed, write_sealed
from .records import ShapesFile, read_record


@dataclass(frozen=True, slots=True)
class Admission:
    """Admission: what ingest found of one adapter."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, "of the adapter"]
    source_id: Annotated[str, "its folder, or its id on the Hub, pinned"]
    digest: Annotated[str, "SHA-256 of its weight files"]
    config_digest: Annotated[str, "of its configuration's values"]
    energy: Annotated[float, "sum over its shared modules of squared norms of dW, by which `delta` weights; else 0"]
    sizes: Annotated[tuple[int, ...], "of its weight files; while they and their times stay, so did the digest"]
    mtimes_ns: Annotated[tuple[int, ...], "when they were changed"]
    shapes: Annotated[str, "digest by which the workspace knows the shapes of its shared modules"]
    notes: Annotated[tuple[str, ...], "what the user should know of it"] = ()
    exact: Annotated[bool, "whether nothing of it is shared"] = False


@dataclass(frozen=True, slots=True)
class Removal:
    """Removal of an admitted adapter."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Annotated[str, "of the adapter"]
    admission: Annotated[int, "number of its admission among the lines, from 0"]


_ADMISSION, _REMOVAL = TypeAdapter(Admission), TypeAdapter(Removal)  # a union of both takes twice as long


@dataclass(frozen=True)
class Journal:
    """Entries of the journal.

    Attributes:
        entries: in order; an admission is known by its number in here.
    """

    entries: tuple[Admission | Removal, ...] = ()

    @property
    def active(self) -> dict[int, Admission]:
        """Admissions that were not taken out, by number."""
        return self.active_after(len(self.entries))

    @cached_property
    def admissions(self) -> tuple[Admission, ...]:
        """Admissions that were not taken out, in order."""
        return tuple(self.active.values())

    def active_after(self, count: int) -> dict[int, Admission]:
        """Admissions that are active after the first `count` entries, by number; cached."""
        if count not in self._active:
            entries = self.entries[:count]
            gone = {e.admission for e in entries if isinstance(e, Removal)}
            self._active[count] = {i: e for i, e in enumerate(entries) if isinstance(e, Admission) and i not in gone}
        return self._active[count]

    @cached_property
    def _active(self) -> dict[int, dict[int, Admission]]:
        return {}

    def digest(self, count: int) -> str:
        """Digest of the first `count` entries."""
        return self._digests[count]

    @cached_property
    def _digests(self) -> list[str]:
        running = hashlib.sha256()
        digests = [running.hexdigest()[:16]]
        for entry in self.entries:
            what = [entry.admission] if isinstance(entry, Removal) else [entry.name, entry.digest, entry.shapes]
            running.update(json.dumps(what).encode() + b"\n")
            digests.append(running.hexdigest()[:16])
        return digests


def read_journal(path: Path) -> tuple[Journal, int]:
    """Read a journal up to its first damaged line; returns it and the length in bytes of its whole lines."""
    entries: list[Admission | Removal] = []
    whole = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        entry = _entry(line)
        if entry is None:
            break
        entries.append(entry)
        whole += len(line)
    return Journal(tuple(entries)), whole


def append(path: Path, entries: Iterable[Admission | Removal], *, durable: bool) -> None:
    """Append entries; `durable` ones survive a power cut, with all before them."""
    with path.open("ab", buffering=0) as f, naming(path):
        lines = b"".join(json.dumps(sealed(_values(entry))).encode() + b"\n" for entry in entries)
        while lines:  # a full disk may take a part of them
            lines = lines[f.write(lines) :]
        if durable:
            os.fsync(f.fileno())
    if durable:
        sync(path.parent)


def _values(entry: Admission | Removal) -> dict[str, Any]:
    return {f.name: getattr(entry, f.name) for f in fields(entry)}  # `asdict` copies deeply


def _entry(line: bytes) -> Admission | Removal | None:
    try:
        values = unsealed(json.loads(line)) if line.endswith(b"\n") else {}
        return (_REMOVAL if "admission" in (values or ()) else _ADMISSION).validate_python(values)
    except ValueError:
        return None


def keep_shapes(folder: Path, admission: Admission, shapes: Shapes) -> None:
    """Write the shapes of an adapter's shared modules, if they are not kept yet."""
    path = folder / f"{admission.shapes}.json"
    if read_record(ShapesFile, path) is None:
        write_sealed(path, {"modules": shapes})


def shapes_of(folder: Path, journal: Journal, known: Mapping[str, Shapes]) -> dict[str, Shapes]:
    """Shapes of the shared modules of all admissions, by the digest in these.

    Those of adapters that were taken out may be missing: their moments are summed again.

    Args:
        folder: of what is noted.
        journal: the admissions.
        known: adapters that can be read -> shapes of their modules.

    Raises:
        WorkspaceError: if those of another adapter are not there, whole.
    """
    found: dict[str, Shapes] = {}
    for admission in journal.admissions:
        if admission.shapes not in found and admission.name in known:
            keep_shapes(folder, admission, known[admission.name])
            found[admission.shapes] = known[admission.name]
    for entry in journal.entries:
        if isinstance(entry, Admission) and entry.shapes not in found:
            kept = read_record(ShapesFile, folder / f"{entry.shapes}.json")
            if kept is not None:
                found[entry.shapes] = kept.modules
            elif entry in journal.admissions:
                raise WorkspaceError(
                    "the workspace is damaged",
                    adapter=entry.name,
                    found=f"shapes/{entry.shapes}.json is missing, or is not what was written",
                    remedy="Restore its source, from which it is mended; or take it out (lorashare-stream remove).",
                )
    return found
