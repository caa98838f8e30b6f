"""Job: the data that all tasks of a run share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.keys import SIDES, Side, group_id
from ..adapters.scaling import Shapes
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
    """Data that all tasks of a run share; picklable.

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
        """Job restricted to the first `count` entries of the journal."""
        if count == len(self.journal.entries):
            return self
        part = Journal(self.journal.entries[:count])
        return replace(self, journal=part, later=frozenset(part.active.keys() - self.journal.active.keys()))

    @property
    def alone(self) -> bool:
        """Whether there is no workspace: the checkpoint stands in its place."""
        return self.workspace == self.out

    def fit_to_all(self, what: str) -> str:
        """How bases, or directions, are fitted to all adapters, in words."""
        if self.alone:
            return f"there is no workspace from which the {what} could be fitted to all: compress all sources for that"
        return f"fit the {what} to all by lorashare-stream refit CHECKPOINT -o CHECKPOINT"

    @cached_property
    def admission_of(self) -> Mapping[str, Admission]:
        """Admissions by name."""
        return {r.name: r for r in self.journal.admissions}

    def adapter(self, name: str) -> Adapter:
        """Adapter by name, to read its values.

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
        """Number of vectors of an adapter in a module; 0 if it shares none there."""
        shape = self.shapes.get(admission.shapes, {}).get(module) if self.shares(admission) else None
        return 0 if shape is None else shape.rank

    def vectors(self, module: str, admissions: Iterable[Admission]) -> int:
        """Number of vectors of adapters in a module that all of them share."""
        kinds = Counter(r.shapes for r in admissions)
        return sum(self.shapes[kind][module].rank * n for kind, n in kinds.items())

    def holders(self, module: str, count: int) -> Mapping[int, Admission]:
        """Admissions whose vectors are in a moment that has seen `count` entries, by number."""
        kinds = frozenset(kind for kind, shapes in self.shapes.items() if module in shapes)
        if (count, kinds) not in self._holders:  # the same for most modules: looked up once
            active = self.journal.active_after(count)
            self._holders[count, kinds] = {i: r for i, r in active.items() if r.shapes in kinds and self.shares(r)}
        return self._holders[count, kinds]

    @cached_property
    def _holders(self) -> dict[tuple[int, frozenset[str]], dict[int, Admission]]:
        return {}

    def with_files(self, here: Mapping[str, Adapter]) -> Job:
        """Job with fetched adapters in place of those of the same names."""
        assert all(self.adapters[name].source_id == adapter.source_id for name, adapter in here.items())
        return replace(self, adapters={**self.adapters, **here}) if here else self

    def hub_bytes(self, name: str) -> int:
        """Bytes to fetch for an adapter."""
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
        """Whether the shapes of all adapters among the first `count` entries are known."""
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
        """File of a module's components in the workspace."""
        return self.bases / f"{slug(module)}.safetensors"

    def facts_file(self, module: str) -> Path:
        """File of a module's `BasisRecord`, written after the components."""
        return self.bases / f"{slug(module)}.json"


def make_job(plan: Plan, work: Workspace, out: Path, *, begins: bool = False) -> Job:
    """Job of a plan and the journal; `begins` is before all adapters are admitted, when no basis can be fitted."""
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
    """Digest of settings and adapters, which decide a checkpoint."""
    return digest_of([settings_key, [[r.name, r.digest, r.config_digest] for r in admissions]])


def record_of_plan(plan: Plan, **more: Any) -> CheckpointRecord:
    """Checkpoint record of a plan, with further fields."""
    facts: dict[str, Any] = {"settings": plan.settings, "dtype": plan.storage, "choice": plan.settings_key}
    return CheckpointRecord(**facts, binding=plan.binding, base_model=plan.base_model, **more)
