"""What an adapter is known by before anything of it is read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AdapterError
from .hubid import HubId, cached_id


@dataclass(frozen=True, slots=True)
class Listing:
    """What the Hub says of a repository without its files being read.

    Attributes:
        files: names in the adapter's folder, and paths of weights below it; empty if they were not asked for.
        base_model, license: as its card gives them.
        gated, private: whether not everybody may read it; None if that is not known.
    """

    files: tuple[str, ...] = ()
    base_model: str | None = None
    gated: bool | None = None
    private: bool | None = None
    license: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter comes from.

    Attributes:
        id: the same in every run: of a local folder its real path, else its Hub id, pinned.
        path: the folder; means nothing for an adapter of the Hub.
        name: as the user gave it, if so.
        inner: its subfolders that hold adapters too, which are not taken.
        hub, asked: its id on the Hub, and that by which it was given, before it was pinned.
        listing: what the Hub says of it, once it is pinned or listed.
        fault: why the Hub does not have it.
    """

    id: str
    path: Path
    name: str | None = None
    inner: tuple[str, ...] = ()
    hub: HubId | None = None
    asked: str = ""
    listing: Listing = field(default_factory=Listing)
    fault: AdapterError | None = None

    @property
    def wanted_name(self) -> str:
        """The given name; or the folder's, or `org--name`, also of what lies in the Hub's cache."""
        if self.name is not None:
            return self.name
        folder = os.path.abspath(self.path)
        hub = self.hub or cached_id(folder)
        return hub.name if hub is not None else os.path.basename(folder)

    @property
    def where(self) -> str:
        """What is shown of where it is."""
        return self.id if self.hub is not None else str(self.path)


def unique(sources: Iterable[Source]) -> list[Source]:
    """No adapter twice; one that was given a name is not taken a second time under its own."""
    found: dict[tuple[str, str | None], Source] = {}
    for source in sources:
        found.setdefault((source.id, source.name), source)
    given = {source.id for source in found.values() if source.name is not None}
    return [source for source in found.values() if source.name is not None or source.id not in given]
