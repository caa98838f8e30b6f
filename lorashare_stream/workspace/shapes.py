"""The shared modules of adapters, noted once for each kind of them: they stay known when sources are gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter

from ..adapters.scaling import ModuleShape, Shapes
from ..errors import WorkspaceError
from ..files import read_sealed, write_sealed
from .journal import Admission, Journal

_SHAPES: TypeAdapter[Shapes] = TypeAdapter(dict[str, ModuleShape])


def keep_shapes(folder: Path, admission: Admission, shapes: Shapes) -> None:
    """Note the shared modules of an adapter, unless they are."""
    path = folder / f"{admission.shapes}.json"
    if not read_sealed(path):
        write_sealed(path, {"modules": shapes})


def shapes_of(folder: Path, journal: Journal, known: Mapping[str, Shapes]) -> dict[str, Shapes]:
    """The shared modules of all admissions, by the digest that these have of them.

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
            shapes = _shapes(folder, entry.shapes)
            if shapes is not None:
                found[entry.shapes] = shapes
            elif entry in journal.admissions:
                raise WorkspaceError(
                    "the workspace is damaged",
                    adapter=entry.name,
                    found=f"shapes/{entry.shapes}.json is missing, or is not what was written",
                    remedy="Restore its source, from which it is mended; or take it out (lorashare-stream remove).",
                )
    return found


def _shapes(folder: Path, digest: str) -> Shapes | None:
    found = read_sealed(folder / f"{digest}.json")
    return _SHAPES.validate_python(found["modules"]) if found else None
