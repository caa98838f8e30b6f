"""What of a checkpoint is uploaded, and how it differs from what is on the Hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, INDEX, LOADINGS, META, PACKS, SKIPPED, SPECTRUM, VERBATIM
from ..checkpoint.index import read_index
from ..errors import CheckpointError
from ..text import printable

_OURS = {SKIPPED, SPECTRUM, COMPONENTS, INDEX}
_COMMON = {*_OURS, "README.md", ".gitattributes", ".gitignore", "LICENSE", "LICENSE.md"}
_PACK = re.compile(f"{PACKS}/[0-9a-f]{{16}}\\.safetensors")


@dataclass(frozen=True, slots=True)
class Item:
    """A file to be uploaded.

    Attributes:
        sha256: of its content.
        size: of its content in bytes.
        source: the content, its file, or what gives it anew.
    """

    sha256: str
    size: int
    source: bytes | Path | Callable[[], bytes]

    @classmethod
    def of(cls, content: bytes, source: Callable[[], bytes] | None = None) -> Item:
        """A file with this content, which `source`, if given, gives again when it is needed."""
        return cls(hashlib.sha256(content).hexdigest(), len(content), source or content)

    def content(self) -> bytes | Path:
        """What the client uploads."""
        return self.source() if callable(self.source) else self.source

    def is_at(self, there: Any) -> bool:
        """Whether a file on the Hub (`RepoFile`, or None) is this one: by SHA-256, or as git names a blob."""
        if there is None or there.size != self.size:
            return False
        if there.lfs is not None:
            return bool(there.lfs.sha256 == self.sha256)
        content = self.content()
        data = content.read_bytes() if isinstance(content, Path) else content
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return bool(there.blob_id == blob.hexdigest())


Changes = dict[str, Item | None]  # path in the repository -> what it becomes; None: it is deleted


def changes_for(items: Mapping[str, Item], there: Mapping[str, Any]) -> Changes:
    """What makes of the files that are there those that are to be; files of others are left alone."""
    gone = [p for p in there if p not in items and (_holds_adapters(p) or p in _OURS)]
    new = {path: item for path, item in items.items() if not item.is_at(there.get(path))}
    return {**dict.fromkeys(gone), **new}


def foreign(items: Mapping[str, Item], there: Mapping[str, Any]) -> list[str]:
    """What of a repository no push wrote, and is not of every repository."""
    return [p for p in there if p not in items and p not in _COMMON and p != CONFIG and not _holds_adapters(p)]


def others(names: Collection[str], there: Iterable[str], index: bytes | None) -> list[str]:
    """The adapters on the Hub, if it has some and none of these names is among them.

    Args:
        names: of the adapters that are pushed.
        there: paths on the Hub.
        index: the content of `INDEX` there, if there is one.
    """
    theirs = {p.split("/")[1] for p in there if _is_of_an_adapter(p)}
    if index is not None:
        try:
            theirs |= {*read_index(index).adapters}
        except CheckpointError:
            theirs.add(INDEX)  # of whatever it is, it is not of these
    return sorted(theirs) if theirs and not theirs & {*names} else []


def _holds_adapters(path: str) -> bool:
    return _is_of_an_adapter(path) or _PACK.fullmatch(path) is not None


def _is_of_an_adapter(path: str) -> bool:
    parts = path.split("/")
    return len(parts) == 3 and parts[0] == ADAPTERS and parts[2] in (LOADINGS, META, VERBATIM)


def undone(changes: Changes, there: Mapping[str, Any]) -> list[str]:
    """Which changes are not made yet."""
    return [p for p, item in changes.items() if (p in there if item is None else not item.is_at(there.get(p)))]


def operation_for(path: str, item: Item | None) -> Any:
    """A change as the client takes it.

    Raises:
        CheckpointError: if the file is not what it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if item is None:
        return CommitOperationDelete(path, is_folder=False)
    try:
        operation = CommitOperationAdd(path, item.content())
    except (OSError, ValueError):  # it is gone
        operation = None
    if operation is None or operation.upload_info.sha256.hex() != item.sha256:
        raise CheckpointError(
            "the checkpoint was changed during the push", found=printable(path), remedy="Run the same command again."
        )
    return operation
