"""What the tasks of one run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapterfiles import digest_files
from ..entry import Entry
from ..files import read_json
from ..names import slug
from ..publishing import staging_folder
from ..settings import Settings
from ..workspace import Receipt, digest_of


@dataclass(frozen=True)
class Job:
    """What the tasks of one run share; picklable, so that a cluster can have it.

    Attributes:
        settings: of the run.
        storage: dtype of components and loadings as safetensors names it.
        entries: adapters by name.
        receipts: admissions, in order.
        workspace, bases, out: folders, absolute.
        device: where sums and fits are computed.
        digest: of all that decides the result.
        basis_digest: of the components, once they are written.
    """

    settings: Settings
    storage: str
    entries: Mapping[str, Entry]
    receipts: tuple[Receipt, ...]
    workspace: Path
    bases: Path
    out: Path
    device: str
    digest: str
    basis_digest: str = ""

    @cached_property
    def receipt_of(self) -> Mapping[str, Receipt]:
        """Admissions by name."""
        return {r.name: r for r in self.receipts}

    def shares(self, name: str) -> bool:
        """Whether an adapter takes part in bases; under `delta`, one whose dW vanishes is kept verbatim."""
        return self.settings.objective == "factors" or self.receipt_of[name].energy > 0

    def admitted(self, count: int) -> str:
        """Digest of the first `count` admissions: what a moment that holds them is a moment of."""
        if count not in self._prefixes:
            self._prefixes[count] = digest_of([[r.name, r.digest] for r in self.receipts[:count]])
        return self._prefixes[count]

    @cached_property
    def _prefixes(self) -> dict[int, str]:
        return {}

    def holds_all(self, marker: Mapping[str, Any] | None) -> bool:
        """Whether a module's moments, by their marker, hold every admission and nothing else."""
        return marker is not None and marker["entries"] == len(self.receipts) and self.continues(marker)

    def continues(self, marker: Mapping[str, Any]) -> bool:
        """Whether the admissions go on from those that a module's moments hold."""
        count: int = marker["entries"]
        return count <= len(self.receipts) and marker["admitted"] == self.admitted(count)

    @cached_property
    def staging(self) -> Path:
        """The folder of the staged checkpoint."""
        return staging_folder(self.out)

    def basis_file(self, module: str) -> Path:
        """Where a module's components are kept."""
        return self.bases / f"{slug(module)}.safetensors"

    def facts_file(self, module: str) -> Path:
        """Where the facts of a module's bases are kept: written after the components, with their digest."""
        return self.bases / f"{slug(module)}.json"

    def has_basis(self, module: str) -> bool:
        """Whether a module's basis is there, whole."""
        try:
            digest: str = read_json(self.facts_file(module))["digest"]
            return digest_files([self.basis_file(module)]) == digest
        except (OSError, ValueError, KeyError, TypeError):
            return False
