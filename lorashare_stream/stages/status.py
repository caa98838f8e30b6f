"""Status of modules: what their moments hold and lack, by markers and journal, and whether bases are fitted to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from ..adapters.adapter import Adapter
from ..adapters.folder import digest_files
from ..adapters.keys import SIDES, Side, group_id
from ..checkpoint.config import Group
from ..schema import Measure, Schema
from ..workspace.journal import Admission
from ..workspace.records import Marker, MomentRecord, read_record
from ..workspace.workspace import Workspace
from .job import Job


class BasisOfSide(Group):
    """The basis of one side of a module, and its eigenvalues."""

    eigenvalues: Annotated[list[Measure], "of the moment, descending (k,)"]


class BasisRecord(Schema):
    """bases/KEY/MODULE.json: the bases of a module, written after their components. A side without vectors has none."""

    module: Annotated[str, "its name"]
    lease: Annotated[str, "of the moments that they are fitted to"]
    removed: Annotated[list[str], "adapters that were taken out, and whose vectors are in these"]
    digest: Annotated[str, "SHA-256 of the file of components"]
    A: Annotated[BasisOfSide | None, "side A: n, d, k, energy, explained, eigenvalues"] = None
    B: Annotated[BasisOfSide | None, "side B"] = None

    @property
    def groups(self) -> dict[str, BasisOfSide]:
        """The bases by group, A before B."""
        sides = {"A": self.A, "B": self.B}
        return {group_id(self.module, side): basis for side in SIDES if (basis := sides[side]) is not None}


@dataclass(frozen=True)
class ModuleStatus:
    """Status of one module: what its marker says its moments have seen, compared with the journal.

    Say the journal admits 0, 1 and 2, and removes 1. Moments whose marker has seen two entries hold 0 and 1, lack 2,
    and 1 is gone; where nothing was summed before, 1 is not lacking, and among `never`. If a marker has seen other
    entries than there are, the module is summed again; one that has seen more is ahead only of a part of the journal.

    Attributes:
        job: whose journal its moments are compared with.
        module: its name.
        marker: of its moments; None if there are none.
    """

    job: Job
    module: str
    marker: Marker | None

    @property
    def continues(self) -> bool:
        """Whether the journal begins with the entries that the moments have seen."""
        marker, journal = self.marker, self.job.journal
        if marker is None or marker.entries > len(journal.entries):
            return False
        return marker.admitted == journal.digest(marker.entries)

    @property
    def is_whole(self) -> bool:
        """Whether the moments have seen every entry of the journal and nothing else."""
        return self.marker is not None and self.marker.entries == len(self.job.journal.entries) and self.continues

    def has_seen(self, count: int) -> bool:
        """Whether the moments have seen the first `count` entries of the journal, perhaps more, and nothing else."""
        return self.marker is not None and self.marker.entries >= count and self.continues

    @property
    def is_behind(self) -> bool:
        """Whether the moments are to be brought up to the journal."""
        end = len(self.job.journal.entries)
        if self.marker is None:
            return bool(self._now.keys() - self.job.later)
        return self.marker.entries < end or (self.marker.entries == end and not self.continues)

    @cached_property
    def _now(self) -> Mapping[int, Admission]:
        return self.job.holders(self.module, len(self.job.journal.entries))

    @cached_property
    def held(self) -> dict[int, Admission]:
        """Admissions in the moments, removed ones included."""
        if self.marker is None:
            return {}
        never = set(self.marker.never)
        return {i: r for i, r in self.job.holders(self.module, self.marker.entries).items() if i not in never}

    @cached_property
    def never(self) -> list[int]:
        """Admissions that were removed before they were summed."""
        seen = 0 if self.marker is None else self.marker.entries
        return [i for i in self._now if i not in self.held and (i in self.job.later or i < seen)]

    @cached_property
    def lacking(self) -> dict[int, Admission]:
        """Admissions that the moments lack."""
        never = set(self.never)
        return {i: r for i, r in self._now.items() if i not in self.held and i not in never}

    @cached_property
    def gone(self) -> list[int]:
        """Removed admissions that the moments hold."""
        return [i for i in self.held if i not in self._now]

    @property
    def writes(self) -> bool:
        """Whether arrays change when the moments are brought up to the journal; else only the marker does."""
        stacked = self.marker is not None and any(moment.stacked for moment in self.marker.sides.values())
        return self.marker is None or bool(self.lacking) or (bool(self.gone) and stacked)

    def removed(self, side: Side) -> list[int]:
        """Removed admissions that stay in the sum of a side; columns are removed themselves."""
        if self.marker is None or self.marker.sides[side].stacked:
            return []
        return [*self.marker.sides[side].removed, *self.gone]

    def marked(self, records: Mapping[Side, MomentRecord]) -> Marker:
        """Marker of moments that have seen the whole journal."""
        sides = {side: record.model_copy(update={"removed": self.removed(side)}) for side, record in records.items()}
        count = len(self.job.journal.entries)
        admitted = self.job.journal.digest(count)
        return Marker(module=self.module, entries=count, admitted=admitted, never=self.never, **sides)

    def basis(self) -> BasisRecord | None:
        """Bases of the module, if they are whole and fitted to its moments, or these were discarded; else None."""
        record = read_record(BasisRecord, self.job.facts_file(self.module))
        if record is None or record.module != self.module:
            return None
        if self.marker is not None and not (self.is_whole and record.lease == self.marker.lease):
            return None
        try:
            return record if digest_files([self.job.basis_file(self.module)]) == record.digest else None
        except FileNotFoundError:
            return None


def removed_in(job: Job, marker: Marker) -> list[str]:
    """Names of removed adapters whose vectors are still in a module's moments."""
    numbers = {i for moment in marker.sides.values() for i in moment.removed}
    return sorted({job.journal.entries[i].name for i in numbers})


def status_of(job: Job, work: Workspace, modules: Iterable[str]) -> list[ModuleStatus]:
    """Status of modules, by the markers of a workspace."""
    return [ModuleStatus(job, module, work.markers.get(module)) for module in modules]


def unfetched(job: Job, work: Workspace, modules: Collection[str]) -> list[Adapter]:
    """Adapters of the Hub that modules lack, and that are not fetched."""
    if all(adapter.fetched for adapter in job.adapters.values()):
        return []
    after: dict[int, list[str]] = {}  # entries that modules have seen -> these
    for status in status_of(job, work, modules):
        if status.is_behind:
            seen = status.marker.entries if status.marker is not None and status.continues else 0
            after.setdefault(seen, []).append(status.module)
    wanted: set[str] = set()
    for seen, some in after.items():
        kinds = {kind for kind, shapes in job.shapes.items() if any(m in shapes for m in some)}
        admissions = [r for i, r in job.journal.active.items() if i >= seen and i not in job.later]
        wanted |= {r.name for r in admissions if r.shapes in kinds and job.shares(r)}
    return [adapter for name, adapter in job.adapters.items() if name in wanted and not adapter.fetched]
