"""What of a checkpoint is pushed: its files, whole, and its JSON without local paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.folder import digest_files
from ..adapters.hubid import parse_hub_id
from ..adapters.safetensors import read_header
from ..checkpoint.coded import meta_of, record_in
from ..checkpoint.config import SHAREConfig, config_bytes, read_share_config
from ..checkpoint.format import ADAPTERS, COMPONENTS, CONFIG, INDEX, LOADINGS, META, OURS, SKIPPED, SPECTRUM, VERBATIM
from ..checkpoint.index import index_bytes, index_of
from ..checkpoint.packs import check_pack
from ..checkpoint.records import REPAIR, AdapterMeta, Meta, check_components, has_files
from ..errors import CheckpointError
from ..files import read_json, sealed, unsealed
from ..runtime.progress import Progress
from ..schema import SkippedFile, checked, read_checked
from ..text import is_component, listed
from .card import MARK, Provenance, card
from .scrub import Scrubber

CARD = "README.md"


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


class Payload:
    """What of a checkpoint is pushed.

    Args:
        root: the checkpoint.

    Raises:
        CheckpointError: if it is not whole.

    Attributes:
        names: of its adapters.
        sources: where they came from, known once `items` has run.
        coded: whether it is a coded checkpoint.
    """

    def __init__(self, root: Path) -> None:
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
        self.sources: list[Provenance] = []

    def config(self) -> Item:
        """The configuration, once `items` has run."""
        return Item.of(config_bytes(self._config))

    def readme(self, repo: str) -> Item:
        """The user's own, or the model card."""
        path = self._root / CARD
        if path.is_file() and not path.is_symlink():  # a link may lead to any file
            own = path.read_bytes()
            if MARK.encode() not in own:
                return Item.of(own)
        return Item.of(card(self._typed, self.sources, repo).encode())

    def items(self, progress: Progress) -> dict[str, Item]:
        """All files but the configuration and the card: path in the repository -> what is uploaded."""
        if self.coded:
            found = self._coded(progress)
        else:
            digest = self._record.components if self._record else None
            if digest is not None:
                check_components(self._root, digest)
            found = {COMPONENTS: self._tensors(COMPONENTS, digest)}
            if (self._root / SPECTRUM).is_file():
                found[SPECTRUM] = self._tensors(SPECTRUM)
            for adapter in progress("look", len(self.names), map(self._adapter, self.names)):
                found |= adapter
        return found | ({SKIPPED: Item.of(self._skipped())} if (self._root / SKIPPED).is_file() else {})

    def _coded(self, progress: Progress) -> dict[str, Item]:
        """The index, without paths, and the packs, which have none."""
        index = index_of(self._root, self._typed.coded)
        if index.adapters.keys() != {*self.names}:
            raise CheckpointError(f"{CONFIG} and {INDEX} name other adapters", found=self._root)
        metas = {name: meta_of(adapter, "").plain() for name, adapter in index.adapters.items()}
        told = {name: AdapterMeta(**self._scrub(meta)) for name, meta in metas.items()}
        self.sources = [_provenance(told[name], name) for name in self.names]
        adapters = {
            name: replace(adapter, config=told[name].original_config, record=record_in(told[name]))
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
        self.sources.append(_provenance(meta, name))
        digests = meta.ours.files if meta.ours else {}
        files = [file for file in (LOADINGS, VERBATIM) if file in digests or (self._root / folder / file).is_file()]
        found = {f"{folder}/{file}": self._tensors(f"{folder}/{file}", digests.get(file), name) for file in files}
        again = lambda: self._meta(name)[1]  # noqa: E731 - when it is uploaded: all may not fit into memory
        return found | {f"{folder}/{META}": Item.of(content, again)}

    def _meta(self, name: str) -> tuple[Meta, bytes]:
        """What is recorded of an adapter, without paths, and its file; sealed again if it was."""
        try:
            found = read_json(self._root / ADAPTERS / name / META)
        except (FileNotFoundError, ValueError) as e:
            raise CheckpointError(f"{META} cannot be read", adapter=name, found=str(e), remedy=REPAIR) from e
        if not isinstance(found, dict) or "adapter_name" not in found:  # a link may lead to any JSON
            raise CheckpointError(f"{META} is not that of an adapter", adapter=name, found=found, remedy=REPAIR)
        if OURS not in found:  # lorashare wrote it
            return checked(Meta, values := self._scrub(found), META, REPAIR, name), _text(values)
        if (values := self._scrub(unsealed(found))) is None:
            raise CheckpointError(f"{META} is damaged", adapter=name, remedy=REPAIR)
        meta = checked(AdapterMeta, values, META, REPAIR, name)
        basis, expected = meta.ours.basis_digest, self._record.basis_digest if self._record else None
        if expected not in (None, basis):
            raise CheckpointError("an adapter belongs to another basis", adapter=name, found=basis, expected=expected)
        return meta, _text(sealed(values))

    def _skipped(self) -> bytes:
        skipped = read_checked(self._root / SKIPPED, SkippedFile, "Remove it.")
        return _text(self._scrub(skipped.model_dump(exclude_none=True)))

    def _tensors(self, where: str, digest: str | None = None, adapter: str | None = None) -> Item:
        """A safetensors file, and no other that a link may lead to; whole, if its digest is known."""
        path = self._root / where
        try:
            read_header(path)
            found = digest_files([path])
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{path.name} cannot be read", adapter=adapter, found=str(e), remedy=REPAIR) from e
        if digest not in (None, found):
            raise CheckpointError(f"{path.name} is damaged", adapter=adapter, remedy=REPAIR)
        return Item(found, path.stat().st_size, path)


def _text(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(value, indent=2).encode()


def _provenance(meta: Meta, name: str) -> Provenance:
    """Where an adapter came from, as its meta tells it; of a folder nothing."""
    if meta.ours is None or meta.ours.hub is None:
        return Provenance(name, parse_hub_id(meta.ours.source_id) if meta.ours else None)
    hub = meta.ours.hub
    return Provenance(name, parse_hub_id(meta.ours.source_id), hub.license or None, hub.gated, hub.private)
