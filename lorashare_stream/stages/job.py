"""Job: what the tasks of one run share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.shapes import Shapes
from ..checkpoint.config import CheckpointRecord
from ..checkpoint.format import COMPONENTS
from ..checkpoint.publish import staging_folder
from ..errors import GoneError
from ..linalg.device import resolve_device
from ..plan.plan import Plan
from ..settings import Settings
from ..text import digest_of, slug
from ..workspace.journal import Admission, Journal
from ..workspace.records import Marker, Slot
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
        markers: module -> its moments as they were when this step began.
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
    markers: Mapping[str, Marker] = field(default_factory=dict)
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

    def with_files(self, here: Mapping[str, Adapter]) -> Job:
        """The job with adapters that were fetched, which must be those of the same names."""
        assert all(self.adapters[name].source_id == adapter.source_id for name, adapter in here.items())
        return replace(self, adapters={**self.adapters, **here}) if here else self

    def hub_bytes(self, name: str) -> int:
        """Bytes that are fetched for an adapter."""
        return self.adapters[name].hub_bytes if name in self.adapters else 0

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


def make_job(plan: Plan, work: Workspace, out: Path, *, begins: bool = False) -> Job:
    """What the tasks need to know, after ingest; `begins` is before all are ingested, when no basis can be fitted."""
    journal, adapters = work.journal(), {e.name: e for e in plan.adapters}
    kinds = {r.shapes: r.name for r in journal.admissions if r.name in adapters}
    digest = checkpoint_key_of(plan.settings_key, journal.admissions)
    return Job(
        settings=plan.settings,
        storage=plan.storage,
        adapters=adapters,
        journal=journal,
        shapes=work.shapes_of(journal, {name: adapters[name].shapes for name in kinds.values()}),
        workspace=work.root.absolute(),
        bases=work.bases.absolute() if begins else work.bases_for(digest).absolute(),
        out=out.absolute(),
        device=resolve_device(plan.settings.device),
        settings_key=plan.settings_key,
        checkpoint_key=digest,
    )


def checkpoint_key_of(settings_key: str, admissions: Sequence[Admission]) -> str:
    """Digest of all that decides a checkpoint: settings and adapters."""
    return digest_of([settings_key, [[r.name, r.digest, r.config_digest] for r in admissions]])


def record_of_plan(plan: Plan, **more: Any) -> CheckpointRecord:
    """What the checkpoint of a plan is of, and more that is known of it."""
    facts: dict[str, Any] = {"settings": plan.settings, "dtype": plan.storage, "choice": plan.settings_key}
    return CheckpointRecord(**facts, binding=plan.binding, base_model=plan.base_model, **more)
