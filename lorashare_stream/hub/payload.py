"""Payload of a push: the files of a checkpoint, whole, and its JSON without local paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.folder import digest_files
from ..adapters.safetensors import read_header
from ..checkpoint.coded import meta_of, record_in
from ..checkpoint.config import SHAREConfig, config_bytes, read_share_config
from ..checkpoint.format import (
    ADAPTERS,
    ANEW,
    COMPONENTS,
    CONFIG,
    INDEX,
    LOADINGS,
    META,
    OURS,
    SKIPPED,
    SPECTRUM,
    VERBATIM,
)
from ..checkpoint.index import index_bytes, index_of
from ..checkpoint.packs import check_pack
from ..checkpoint.records import REPAIR, AdapterMeta, HubOrigin, Meta, has_files
from ..errors import CheckpointError
from ..files import read_json, sealed, unsealed
from ..runtime.progress import Progress
from ..schema import SkippedFile, checked, read_checked
from ..text import is_component, listed
from .card import MARK, Sources, card
from .scrub import Scrubber

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Item:
    """A file to be uploaded.

    Attributes:
        sha256: of its content.
        size: of its content in bytes.
        source: the content, or its file.
    """

    sha256: str
    size: int
    source: bytes | Path

    @classmethod
    def of(cls, content: bytes) -> Item:
        """A file with this content."""
        return cls(hashlib.sha256(content).hexdigest(), len(content), content)

    def is_at(self, there: Any) -> bool:
        """Whether a file on the Hub (`RepoFile`, or None) is this one: by SHA-256, or as git names a blob."""
        if there is None or there.size != self.size:
            return False
        if there.lfs is not None:
            return bool(there.lfs.sha256 == self.sha256)
        from huggingface_hub.utils.sha import git_hash

        data = self.source.read_bytes() if isinstance(self.source, Path) else self.source
        return bool(there.blob_id == git_hash(data))


class Payload:
    """The files of a checkpoint that are pushed.

    Args:
        root: the checkpoint.
        progress: passes its files on as they are read.

    Raises:
        CheckpointError: if it is not whole.

    Attributes:
        names: of its adapters.
        sources: their origins.
        coded: whether it is a coded checkpoint.
        files: all but the configuration and the card, by path in the repository.
        config: the configuration.
    """

    def __init__(self, root: Path, progress: Progress) -> None:
        self._root, read = root, read_share_config(root)
        unsafe = [name for name in read.adapter_names if not is_component(name)]
        self.names = [] if unsafe else list(dict.fromkeys(read.adapter_names))
        if unsafe or not self.names:
            found = listed(unsafe) or "none"
            raise CheckpointError("adapter names that are no path components", found=found, expected="names of folders")
        if not read.coded and not has_files(root, self.names):
            raise CheckpointError("files of the checkpoint are missing", found=root, remedy="Fetch it again.")
        aliases = read.record.settings.base_aliases if read.record else []
        paths = [str(root.absolute()), str(root.resolve()), read.base_model_name_or_path, *aliases]
        self._scrub = Scrubber(read.base_model_name_or_path, paths)
        self._config: dict[str, Any] = self._scrub(read_json(root / CONFIG))
        known = {k: v for k, v in self._config.items() if k in SHAREConfig.__dataclass_fields__}
        self._typed, self._record, self.coded = replace(read, **known), read.record, bool(read.coded)
        self.sources: dict[str, HubOrigin | None] = {}
        self.files = self._coded(progress) if self.coded else self._shared(progress)
        if (root / SKIPPED).is_file():
            skipped = read_checked(root / SKIPPED, SkippedFile, "Remove it.")
            self.files[SKIPPED] = Item.of(_text(self._scrub(skipped.model_dump(exclude_none=True))))
        self.config = Item.of(config_bytes(self._config))

    def readme(self, repo: str, sources: Sources) -> Item:
        """The user's own, or the model card."""
        path = self._root / CARD
        if path.is_file() and not path.is_symlink():  # a link may lead to any file
            own = path.read_bytes()
            if MARK.encode() not in own:
                return Item.of(own)
        return Item.of(card(self._typed, sources, repo).encode())

    def _shared(self, progress: Progress) -> dict[str, Item]:
        """Components, their spectrum, and the folders of adapters."""
        found = {COMPONENTS: self._tensors(COMPONENTS, self._record.components if self._record else None)}
        if (self._root / SPECTRUM).is_file():
            found[SPECTRUM] = self._tensors(SPECTRUM)
        for adapter in progress("look", len(self.names), map(self._adapter, self.names)):
            found |= adapter
        return found

    def _coded(self, progress: Progress) -> dict[str, Item]:
        """The index, without paths, and the packs, which have none."""
        index = index_of(self._root, self._typed.coded)
        if index.adapters.keys() != {*self.names}:
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", found=self._root)
        metas = {name: AdapterMeta(**self._scrub(meta_of(a, "").plain())) for name, a in index.adapters.items()}
        self.sources |= {name: metas[name].ours.hub for name in self.names}
        adapters = {
            name: replace(adapter, config=metas[name].original_config, record=record_in(metas[name]))
            for name, adapter in index.adapters.items()
        }
        item = Item.of(index_bytes(replace(index, adapters=adapters)))
        self._config["coded"]["index"] = item.sha256

        def packs() -> Iterator[tuple[str, Item]]:
            for pack in index.packs:
                check_pack(self._root / pack.file, pack)
                yield pack.file, Item(pack.sha256, pack.nbytes, self._root / pack.file)

        return {INDEX: item, **dict(progress("look", len(index.packs), packs()))}

    def _adapter(self, name: str) -> dict[str, Item]:
        folder, (meta, content) = f"{ADAPTERS}/{name}", self._meta(name)
        self.sources[name] = meta.ours.hub if meta.ours else None
        digests = meta.ours.files if meta.ours else {}
        files = [file for file in (LOADINGS, VERBATIM) if file in digests or (self._root / folder / file).is_file()]
        found = {f"{folder}/{file}": self._tensors(f"{folder}/{file}", digests.get(file), name) for file in files}
        return found | {f"{folder}/{META}": Item.of(content)}

    def _meta(self, name: str) -> tuple[Meta, bytes]:
        """The record of an adapter, without paths, and its file; sealed again if it was."""
        try:
            found = read_json(self._root / ADAPTERS / name / META)
        except (FileNotFoundError, ValueError) as e:
            raise CheckpointError(f"{META} cannot be read", adapter=name, found=str(e), remedy=REPAIR) from e
        if not isinstance(found, dict) or "adapter_name" not in found:  # a link may lead to any JSON
            raise CheckpointError(f"{META} is not that of an adapter", adapter=name, found=found, remedy=REPAIR)
        if OURS not in found:  # lorashare wrote it
            values = self._scrub(found)
            return checked(Meta, values, META, REPAIR, name), _text(values)
        values = self._scrub(unsealed(found))
        if values is None:
            raise CheckpointError(f"{META} is damaged", adapter=name, remedy=REPAIR)
        meta = checked(AdapterMeta, values, META, REPAIR, name)
        basis, expected = meta.ours.basis_digest, self._record.basis_digest if self._record else None
        if expected not in (None, basis):
            raise CheckpointError("an adapter belongs to another basis", adapter=name, found=basis, expected=expected)
        return meta, _text(sealed(values))

    def _tensors(self, where: str, digest: str | None = None, adapter: str | None = None) -> Item:
        """A safetensors file, and no other that a link may lead to; whole, if its digest is known."""
        path, remedy = self._root / where, REPAIR if adapter else ANEW
        try:
            read_header(path)
            found = digest_files([path])
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path.name} cannot be read", adapter=adapter, found=str(e), remedy=remedy) from e
        if digest not in (None, found):
            raise CheckpointError(f"{path.name} is damaged", adapter=adapter, found=self._root, remedy=remedy)
        return Item(found, path.stat().st_size, path)


def _text(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
