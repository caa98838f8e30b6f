"""What the tasks of one run share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.scaling import Shapes
from ..checkpoint.format import COMPONENTS
from ..checkpoint.publish import staging_folder
from ..errors import GoneError
from ..files import read_sealed
from ..settings import Settings
from ..text import slug
from ..workspace.journal import Admission, Journal
from ..workspace.leases import Slot
from ..workspace.workspace import Workspace


@dataclass(frozen=True)
class Admitted:
    """An adapter and its admission: the task of a step that writes one adapter."""

    adapter: Adapter
    admission: Admission

    @property
    def name(self) -> str:
        """Of the adapter."""
        return self.adapter.name


@dataclass(frozen=True)
class Job:
    """What the tasks of one run share; picklable, so that a cluster can have it.

    Attributes:
        settings: of the run.
        storage: dtype of components and loadings as safetensors names it.
        adapters: adapters by name; those of the journal whose source is gone are not among them.
        journal: admissions and removals.
        shapes: shared modules of adapters, by the digest that their admissions have.
        workspace, bases, out: folders, absolute.
        device: where sums and fits are computed.
        settings_key: digest of all but the adapters that decides the result.
        checkpoint_key: digest of all that decides the result.
        basis_key: of the components, once they are written; of a coded checkpoint, of what decides the codes.
        step: of the quantiser, if a limit on bytes has decided it.
        directions: the file of those on which adapters are coded, if they are.
        grows: whether adapters are projected on the components that `out` has already.
        slots: module -> side -> where its moment is written to, in the lease of this step.
        later: admissions in this part of a journal that are taken out in the rest of it: they are not summed any more.
    """

    settings: Settings
    storage: str
    adapters: Mapping[str, Adapter]
    journal: Journal
    shapes: Mapping[str, Shapes]
    workspace: Path
    bases: Path
    out: Path
    device: str
    settings_key: str
    checkpoint_key: str
    basis_key: str = ""
    step: float = 0.0
    directions: Path | None = None
    grows: bool = False
    slots: Mapping[str, Mapping[Side, Slot]] = field(default_factory=dict)
    later: frozenset[int] = frozenset()

    def up_to(self, count: int) -> Job:
        """The job of the first `count` entries of the journal."""
        if count == len(self.journal.entries):
            return self
        part = Journal(self.journal.entries[:count])
        return replace(self, journal=part, later=frozenset(part.active.keys() - self.journal.active.keys()))

    @cached_property
    def admission_of(self) -> Mapping[str, Admission]:
        """Admissions by name."""
        return {r.name: r for r in self.journal.admissions}

    def adapter(self, name: str) -> Adapter:
        """An adapter whose values are needed.

        Raises:
            GoneError: if its source is gone.
        """
        if name not in self.adapters:
            raise GoneError(
                "its source is gone, and its values are needed again",
                adapter=name,
                found=self.admission_of[name].source_id,
                remedy="Restore it; or take the adapter out by lorashare-stream remove.",
            )
        return self.adapters[name]

    def shares(self, admission: Admission) -> bool:
        """Whether an adapter takes part in bases; under `delta`, one whose dW vanishes is kept verbatim."""
        return self.settings.objective == "factors" or admission.energy > 0

    def rank(self, admission: Admission, module: str) -> int:
        """How many vectors an adapter has in a module; 0 if it has none there that are shared."""
        shape = self.shapes.get(admission.shapes, {}).get(module) if self.shares(admission) else None
        return 0 if shape is None else shape.rank

    def vectors(self, module: str, admissions: Iterable[Admission]) -> int:
        """How many vectors adapters have in a module, all of which take part there."""
        kinds = Counter(r.shapes for r in admissions)
        return sum(self.shapes[kind][module].rank * n for kind, n in kinds.items())

    def holders(self, module: str, count: int) -> Mapping[int, Admission]:
        """The admissions whose vectors a moment of `module` has once it has seen `count` entries, by number."""
        kinds = frozenset(kind for kind, shapes in self.shapes.items() if module in shapes)
        if (count, kinds) not in self._holders:  # the same for most modules: looked up once
            active = self.journal.active_after(count)
            self._holders[count, kinds] = {i: r for i, r in active.items() if r.shapes in kinds and self.shares(r)}
        return self._holders[count, kinds]

    @cached_property
    def _holders(self) -> dict[tuple[int, frozenset[str]], dict[int, Admission]]:
        return {}

    def lacks(self, module: str, marker: Mapping[str, Any] | None) -> bool:
        """Whether a module's moments, by their marker, are to be brought up to these entries."""
        end = len(self.journal.entries)
        if marker is None:
            return bool(self.holders(module, end).keys() - self.later)
        count: int = marker["entries"]
        return count < end or (count == end and not self.continues(marker))

    def unfetched(self, modules: Sequence[str]) -> list[Adapter]:
        """The adapters of the Hub whose values modules lack, and which may not be on this machine."""
        if all(e.fetched for e in self.adapters.values()):
            return []
        work = Workspace(self.workspace)
        after: dict[int, list[str]] = {}  # how much modules have seen -> these
        for module in modules:
            marker = work.marker(module)
            if not self.lacks(module, marker):
                continue
            seen = 0 if marker is None or not self.continues(marker) else marker["entries"]
            after.setdefault(seen, []).append(module)
        lacking: set[str] = set()
        for seen, some in after.items():
            kinds = {kind for kind, shapes in self.shapes.items() if any(m in shapes for m in some)}
            admissions = [r for i, r in self.journal.active.items() if i >= seen and i not in self.later]
            lacking |= {r.name for r in admissions if r.shapes in kinds and self.shares(r)}
        return [e for name, e in self.adapters.items() if name in lacking and not e.fetched]

    def with_files(self, here: Mapping[str, Adapter]) -> Job:
        """The job with adapters that were fetched, which must be those of the same names."""
        assert all(self.adapters[name].source_id == adapter.source_id for name, adapter in here.items())
        return replace(self, adapters={**self.adapters, **here}) if here else self

    def hub_bytes(self, name: str) -> int:
        """Bytes that are fetched for an adapter."""
        return self.adapters[name].hub_bytes if name in self.adapters else 0

    def held(self, module: str, marker: Mapping[str, Any] | None) -> dict[int, Admission]:
        """The admissions whose vectors a module's moments hold, by number, those taken out since included."""
        if marker is None:
            return {}
        never = set(marker.get("never", ()))  # taken out before they were summed
        return {i: r for i, r in self.holders(module, marker["entries"]).items() if i not in never}

    @cached_property
    def modules(self) -> list[str]:
        """Modules of the admitted adapters, sorted."""
        return sorted({m for digest in {r.shapes for r in self.journal.admissions} for m in self.shapes[digest]})

    @cached_property
    def counts(self) -> dict[str, int]:
        """Group -> n, the vectors of the admitted adapters that take part in bases."""
        uses = Counter(r.shapes for r in self.journal.admissions if self.shares(r))
        counts: Counter[str] = Counter()
        for digest, times in uses.items():
            for module, shape in self.shapes[digest].items():
                counts.update({group_id(module, side): shape.rank * times for side in SIDES})
        return dict(counts)

    def knows(self, count: int) -> bool:
        """Whether it is known what the first `count` entries have brought into moments."""
        return all(r.shapes in self.shapes for r in self.journal.active_after(count).values())

    def holds_all(self, marker: Mapping[str, Any] | None) -> bool:
        """Whether a module's moments, by their marker, have seen every entry and nothing else."""
        return marker is not None and marker["entries"] == len(self.journal.entries) and self.continues(marker)

    def continues(self, marker: Mapping[str, Any]) -> bool:
        """Whether the journal goes on from the entries that a module's moments have seen."""
        count: int = marker["entries"]
        return count <= len(self.journal.entries) and marker["admitted"] == self.journal.digest(count)

    def removed_in(self, marker: Mapping[str, Any]) -> list[str]:
        """The names of adapters that were taken out, and whose vectors a module's moments still hold."""
        numbers = {i for side in SIDES for i in marker[side]["removed"]}
        return sorted({self.journal.entries[i].name for i in numbers})

    @cached_property
    def staging(self) -> Path:
        """The folder of the staged checkpoint."""
        return staging_folder(self.out)

    @property
    def components(self) -> Path:
        """The file of the components that adapters are projected on."""
        return (self.out if self.grows else self.staging) / COMPONENTS

    def basis_file(self, module: str) -> Path:
        """Where a module's components are kept."""
        return self.bases / f"{slug(module)}.safetensors"

    def facts_file(self, module: str) -> Path:
        """Where the facts of a module's bases are kept: written after the components, with their digest."""
        return self.bases / f"{slug(module)}.json"

    def has_basis(self, module: str, marker: Mapping[str, Any] | None) -> bool:
        """Whether a module's basis is there, whole, and that of its moments, unless these were discarded."""
        facts = read_sealed(self.facts_file(module))
        try:
            return (
                bool(facts)
                and facts["module"] == module
                and (marker is None or (self.holds_all(marker) and facts.get("lease") == marker["lease"]))
                and digest_files([self.basis_file(module)]) == facts["digest"]
            )
        except FileNotFoundError:
            return False
