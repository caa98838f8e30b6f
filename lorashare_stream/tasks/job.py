"""What the tasks of one run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..adapterfiles import digest_files
from ..catalog import Entry
from ..checkpoint import staging_folder
from ..files import read_json
from ..names import slug
from ..settings import Settings
from ..workspace import Receipt


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
