"""Adapter of the catalog: where it comes from, its tensors, how dW comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import AdapterError, ValuesError
from ..text import digest_of
from .folder import FileFact, check_still, open_tensors
from .hubid import HubId
from .layout import Chunk, Layout, ModuleBatch, chunks, module_batches
from .safetensors import TensorReader
from .scaling import ModuleShape, Scaling, Shapes
from .source import Listing


@dataclass(frozen=True)
class Origin:
    """Where on the Hub an adapter comes from, and what it must be when it is fetched.

    Attributes:
        hub, asked: its pinned id, and the id as it was given.
        listing: what the Hub says of it.
        records: digest of its tensor records.
        sha256: of its one weight file, if the Hub lists it.
        refused: why its values must not touch a moment, if that is known from before.
    """

    hub: HubId
    asked: str
    listing: Listing
    records: str
    sha256: str | None = None
    refused: ValuesError | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter of the catalog.

    Attributes:
        name: unique among all, one path component.
        source_id, folder: where it comes from; the folder of what is not fetched is no folder yet.
        files: its weight files as they were; of what is not fetched, names and sizes.
        layout: its tensors.
        scalings: of each module, in the order of `layout.modules`.
        base_model: as its configuration names it, if it does.
        config_digest: SHA-256 of its configuration's values.
        config: its adapter_config.json, as JSON has it; None if it was not read.
        origin: where on the Hub it comes from.
        fetched: whether its files are on this machine.
        converted: the folder that keeps what its `.bin` was converted to, if one does.
        beside: files of weights in its folder that are not its own, relative to it; of the Hub, if they are listed.
        reconstructs: digest of the source id of the adapter that it is a reconstruction of, if it is one.
    """

    name: str
    source_id: str
    folder: Path
    files: tuple[FileFact, ...]
    layout: Layout
    scalings: tuple[Scaling, ...]
    base_model: str | None
    config_digest: str
    config: str | None = None
    origin: Origin | None = None
    fetched: bool = True
    converted: Path | None = None
    beside: tuple[str, ...] = ()
    reconstructs: str | None = None

    @property
    def where(self) -> str:
        """What is shown of where it comes from."""
        return self.source_id if self.origin is not None else str(self.folder)

    @property
    def hub_bytes(self) -> int:
        """Bytes that are fetched from the Hub for it."""
        return 0 if self.origin is None else sum(f.size for f in self.files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its weight files."""
        return tuple(f.path for f in self.files)

    @property
    def pickled(self) -> bool:
        """Whether its tensors are in a `.bin`; offsets are then those of what it is converted to."""
        return self.files[0].path.suffix == ".bin"

    @property
    def mapped_bytes(self) -> int:
        """Bytes that are mapped at a time: of its largest file, or of what its `.bin` becomes, without shared bytes."""
        tensors = self.layout.lora_bytes + self.layout.extra_bytes if self.pickled else 0
        return max(tensors, *(f.size for f in self.files))

    @contextmanager
    def open(self) -> Iterator[TensorReader]:
        """Its tensors, mapped; an AdapterError names it, if its files are not the plan's before or after the block."""
        try:
            check_still(self.files)
            with open_tensors(self.paths, self.converted) as tensors:
                yield tensors
            check_still(self.files)
        except AdapterError as e:
            e.adapter = self.name
            raise

    def scalings_of(self, modules: Iterable[str]) -> list[Scaling]:
        """The scalings of several modules."""
        return [self.scalings[self.layout.position[m]] for m in modules]

    def scaling(self, module: str) -> Scaling:
        """The scaling of a module."""
        return self.scalings[self.layout.position[module]]

    @property
    def plain(self) -> bool:
        """Whether no module has stacked experts."""
        return all(p.experts == 1 for p in self.scalings)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """All tensors, in file order; stacked experts, whose number no shape tells, are not stacked once more."""
        return self.layout.chunks if self.plain else chunks(self.layout.in_file_order, alone=True)

    @property
    def module_batches(self) -> tuple[ModuleBatch, ...]:
        """The shared modules, with the same E in each batch."""
        return self.layout.module_batches if self.plain else module_batches(self.layout.modules, alone=True)

    def batches_of(self, modules: Iterable[str]) -> tuple[ModuleBatch, ...]:
        """Some of the shared modules."""
        return module_batches((self.layout.by_name[m] for m in modules), alone=not self.plain)

    @property
    def shapes(self) -> Shapes:
        """The shapes of its shared modules."""
        return _shapes(self.layout, self.scalings)[0]

    @property
    def shapes_key(self) -> str:
        """By which the workspace knows these."""
        return _shapes(self.layout, self.scalings)[1]


@lru_cache(maxsize=256)  # adapters of one script have equal ones
def _shapes(layout: Layout, scalings: tuple[Scaling, ...]) -> tuple[Shapes, str]:
    found = {
        m.name: ModuleShape(m.rank, m.dim("A"), m.dim("B"), p.experts, p.parameters)
        for m, p in zip(layout.modules, scalings, strict=True)
    }
    return found, digest_of(found)
