"""An adapter of the catalog: where it comes from, its tensors, how its dW comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .adapterfiles import FileFact
from .deltas import Product
from .journal import ModuleShape
from .layout import Layout


@dataclass(frozen=True)
class Entry:
    """An adapter that was admitted to the catalog.

    Attributes:
        name: unique among all, one path component.
        source_id, folder: where it comes from.
        files: its weight files as they were.
        layout: its tensors.
        products: how dW comes of the factors of each module, in the order of `layout.modules`.
        base_model: the base model that its configuration names, if it names one.
        config_digest: SHA-256 of its configuration's values.
    """

    name: str
    source_id: str
    folder: Path
    files: tuple[FileFact, ...]
    layout: Layout
    products: tuple[Product, ...]
    base_model: str | None
    config_digest: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its weight files."""
        return tuple(f.path for f in self.files)

    def product(self, module: str) -> Product:
        """How dW of a module comes of its factors."""
        return self.products[self.layout.position[module]]

    @property
    def shapes(self) -> dict[str, ModuleShape]:
        """The shapes of its shared modules."""
        return {
            m.name: ModuleShape(m.rank, m.dim("A"), m.dim("B"), p.experts, p.parameters)
            for m, p in zip(self.layout.modules, self.products, strict=True)
        }
