"""Workspace: the folder of resumable state.

    workspace.json            what its numbers depend on (objective, centring, quantum, base model, ...); kept twice
    lock, holder.json         who holds it: one process at a time
    plan.json                 the last plan
    journal.jsonl             which adapters were admitted and taken out, in order, append-only
    shapes/<digest>.json      the shared modules of adapters: rank, d, stacked experts
    in_work.json              at what processes of this machine died, since a run last came to its end
    skipped.json              adapters that the last run left out, with the reason
    markers/<module>.json     which lease holds how many entries of the journal of a module, and where
    moments/<lease>/          arrays of zarr; see `leases`
    bases/<digest>/<module>   components and facts of a basis, for one choice of k and dtype
    converted/<key>           what a `.bin` is as safetensors, until the run has ended well
    hub/facts.jsonl           headers and configurations of adapters of the Hub
    hub/files/<adapter>       their files, under a disk budget, while they are needed

A marker is written after the data it vouches for is on disk, and only by a rename, by the process that holds the lock:
a task of a run that is dead cannot. So whatever is killed, a group is either done or it is done again. All but the
arrays, whose checksums are in markers, is sealed by one. The workspace is a group of zarr, and so are all leases.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.keys import Side
from ..adapters.scaling import Shapes
from ..errors import WorkspaceError
from ..files import own_folder, read_sealed, refuse_links, remove_tree, sync, write_json, write_sealed
from ..schema import checked, read_skipped
from ..text import printable, slug
from . import leases
from .journal import Admission, Journal, Removal, append, keep_shapes, read_journal, shapes_of
from .leases import Need
from .lock import HOLDER, LOCK, held
from .records import FORMAT, Binding, Marker, Published, Slot, read_record

IN_WORK = "in_work.json"
COPY = "workspace.copy.json"  # no other program has a file of that name
_COPIES = ("workspace.json", COPY)
_FOLDERS = ("moments", "markers", "bases", "shapes")
_GROUPS = {
    ".": "workspace of lorashare-stream: moments are arrays of zarr",
    "moments": "moments of what adapters have in common: a group for each step that has written some",
}
HUB = "hub"  # what is known of adapters of the Hub, and under a disk budget their files
FACTS, FILES = f"{HUB}/facts.jsonl", f"{HUB}/files"
log = logging.getLogger(__name__)


class Workspace:
    """An open workspace; hold it through `Workspace.open`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments, self.markers_folder, self.bases, self.shapes = (root / name for name in _FOLDERS)
        self.check_held: Callable[[], None] = lambda: None
        self._noted: set[str] = set()  # shapes that are known to be kept

    @classmethod
    @contextmanager
    def open(cls, root: Path, binding: Mapping[str, Any] | None, *, take_lock: bool = False) -> Iterator[Workspace]:
        """Open or make a workspace, locked until the end of the block.

        Args:
            root: its folder.
            binding: what its numbers depend on; it must be what the workspace was made with. None asks for nothing.
            take_lock: take over the lock of another host that still seems to be alive.

        Raises:
            LockedError: if another process holds it.
            WorkspaceError: if it was made with other settings.
        """
        inside = {p.name for p in root.iterdir() if p.suffix != ".tmp"} if root.exists() else set()
        if inside - {LOCK, HOLDER, HUB, *_FOLDERS} and not inside & {*_COPIES}:
            raise WorkspaceError(
                "the folder is no workspace, and not empty", found=root, remedy="Choose another --workspace."
            )
        root.mkdir(parents=True, exist_ok=True)
        refuse_links(root, depth=3)
        work = cls(root)
        with held(root, take=take_lock) as work.check_held:
            for name in _FOLDERS:
                own_folder(root / name)
            work._bind(binding or {})
            work._clean()
            leases.make_groups(root, _GROUPS)
            sync(root.parent)
            yield work

    def exists(self) -> bool:
        """Whether there is a workspace."""
        return any((self.root / name).exists() for name in _COPIES)

    def _bind(self, binding: Mapping[str, Any]) -> None:
        """Bind the workspace, or demand that it is bound to the same; an empty binding asks for nothing."""
        found = self._binding()
        if found is None and self.exists():
            raise WorkspaceError(
                f"the workspace {printable(self.root)} is damaged",
                found=" and ".join(_COPIES),
                remedy="Delete it, or choose another.",
            )
        there = {} if found is None else found.model_dump()
        differing = sorted(k for k in binding if there and there[k] != binding[k])
        if differing:
            raise WorkspaceError(
                f"the workspace {printable(self.root)} was made with other settings",
                found=", ".join(f"{k}={printable(there[k])}" for k in differing),
                expected=", ".join(f"{k}={printable(binding[k])}" for k in differing),
                remedy="Choose another workspace, and another output, or delete this one.",
            )
        values = there or ({**binding, "format": FORMAT} if binding else {})
        for name in _COPIES:
            if read_sealed(self.root / name) != values:
                write_sealed(self.root / name, values)

    def _binding(self) -> Binding | None:
        """Binding on disk; None if it is new, or both copies are damaged."""
        found = next((values for name in _COPIES if (values := read_sealed(self.root / name))), None)
        if found is None:
            return None
        remedy = "Choose another workspace, and another output, or delete this one."
        return checked(Binding, found, f"the workspace {printable(self.root)}", remedy, error=WorkspaceError)

    @property
    def binding(self) -> Binding:
        """Binding of an open workspace."""
        found = self._binding()
        assert found is not None
        return found

    def _clean(self) -> None:
        """Remove temporary files, and moments that no marker names, of dead runs."""
        for folder in (self.root, self.markers_folder, self.shapes, *self.bases.iterdir()):
            for path in (*folder.glob(".*.tmp"), *folder.glob("*.partial")):
                path.unlink()
        self.sweep()

    # -- journal -------------------------------------------------------------------------------------

    @property
    def _journal(self) -> Path:
        return self.root / "journal.jsonl"

    def journal(self) -> Journal:
        """Read the journal; needs no lock."""
        return read_journal(self._journal)[0]

    def recover_journal(self) -> Journal:
        """Read the journal, and truncate it at its first damaged line: what a crash tore was never acknowledged."""
        journal, whole = read_journal(self._journal)
        size = self._journal.stat().st_size if self._journal.exists() else 0
        if size != whole:
            lost = self._journal.read_bytes()[whole:].count(b"\n")
            if lost:  # a whole line is not torn by a crash
                log.warning(
                    "the journal is damaged, and cut: its last %d entries are lost, and made again from the sources "
                    "that are named: %s", lost, printable(self._journal),
                )  # fmt: skip
            os.truncate(self._journal, whole)
        return journal

    def base_model(self) -> str | None:
        """Base model that the workspace is bound to, if any."""
        found = self._binding()
        return (found.base_model or None) if found is not None else None

    def admit(self, admission: Admission, shapes: Shapes, *, durable: bool) -> None:
        """Append an admission; `durable` ones survive a power cut, with all before them."""
        if durable:  # whether it is held is a file to be read: not for every one of thousands a second
            self.check_held()
        if admission.shapes not in self._noted:
            keep_shapes(self.shapes, admission, shapes)
            self._noted.add(admission.shapes)
        append(self._journal, [admission], durable=durable)

    def shapes_of(self, journal: Journal, known: Mapping[str, Shapes]) -> dict[str, Shapes]:
        """Shapes of the shared modules of all admissions: `journal.shapes_of`."""
        return shapes_of(self.shapes, journal, known)

    def sync_journal(self) -> None:
        """Make all admissions durable."""
        append(self._journal, (), durable=True)

    def take_out(self, removals: Iterable[Removal]) -> None:
        """Append removals, durable."""
        self.check_held()
        append(self._journal, removals, durable=True)

    def skip(self, left_out: list[dict[str, Any]]) -> None:
        """Write skipped.json."""
        write_json(self.root / "skipped.json", left_out)

    def skipped(self) -> set[str]:
        """The names of adapters that the last run left out."""
        return {str(item.adapter) for item in read_skipped(self.root / "skipped.json")}

    # -- moments -------------------------------------------------------------------------------------

    @cached_property
    def markers(self) -> dict[str, Marker]:
        """Markers by module, read once, and updated as they are written."""
        found = (read_record(Marker, path) for path in self.markers_folder.glob("*.json"))
        return {marker.module: marker for marker in found if marker is not None}

    def mark(self, marker: Marker) -> None:
        """Replace the marker of a module, whose moments are on disk, and remove the moments that it named before."""
        self.check_held()
        old = self.markers.get(marker.module)
        write_sealed(self._marker(marker.module), marker.model_dump())
        self.markers[marker.module] = marker
        if old is not None and old.lease != marker.lease:
            leases.remove(self.moments, old)

    def lease(self, needs: Mapping[tuple[str, Side], Need]) -> dict[str, dict[Side, Slot]]:
        """Allocate slots for moments in a new lease.

        Its name is used once, so that neither a task that outlived its run nor a basis of other moments can be
        mistaken for one of it.
        """
        self.check_held()
        if not needs:
            return {}
        slots = leases.arrange(uuid.uuid4().hex, needs, self.binding.moment_dtype)
        return leases.make_arrays(self.moments, slots, self._words())

    def sweep(self) -> None:
        """Remove moments that no marker names."""
        leases.sweep(self.moments, self.markers, self._words())

    def _words(self) -> str:
        """Description of the vectors in a lease."""
        objective = self.binding.objective
        x = f"objective {objective}: x are columns of the adapters' LoRA matrices, of A' for side A, of B for side B"
        return x if objective == "factors" else f"{x}, times the other one and its scaling, as a share of ||dW||"

    def _marker(self, module: str) -> Path:
        return self.markers_folder / f"{slug(module)}.json"

    def discard(self, module: str) -> None:
        """Remove a module's moments; its bases stay."""
        old = self.markers.pop(module, None)
        self._marker(module).unlink(missing_ok=True)
        if old is not None:
            leases.remove(self.moments, old)

    def forget(self, module: str) -> None:
        """Remove a module's moments and bases, so that they are computed again."""
        for path in self.bases.glob(f"*/{slug(module)}.json"):
            path.unlink()
        self.discard(module)

    def discarded(self, modules: Iterable[str]) -> set[str]:
        """Modules without moments that have bases."""
        fitted = {path.stem for path in self.bases.glob("*/*.json")}
        return {module for module in modules if module not in self.markers and slug(module) in fitted}

    # -- bases and outputs ---------------------------------------------------------------------------

    def bases_for(self, digest: str) -> Path:
        """Folder of the bases of a checkpoint key; those of other keys are removed."""
        for path in self.bases.iterdir():
            if path.name != digest:
                remove_tree(path)
        return own_folder(self.bases / digest)

    def _published(self) -> dict[str, list[str]]:
        found = read_record(Published, self.root / "published.json")
        return {} if found is None else found.root

    def published(self) -> set[str]:
        """Basis keys of all checkpoints that this workspace has published."""
        return {digest for digests in self._published().values() for digest in digests}

    def publishing(self, out: Path, basis_key: str, there: object = None) -> None:
        """Register a checkpoint that is about to be published; the key of ours that is `there` is kept until then."""
        self.check_held()
        outputs = self._published()
        kept = [there] if isinstance(there, str) and there in self.published() else []
        outputs[str(out.absolute())] = [*kept, basis_key]
        write_sealed(self.root / "published.json", outputs)
