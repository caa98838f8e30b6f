"""Adapter records of a checkpoint: schemas, reading and verification, without torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ..adapters.folder import digest_config, digest_files
from ..errors import CheckpointError
from ..files import read_json, unsealed
from ..schema import Count, Format, Measure, Schema, checked
from ..workspace.journal import Admission
from .format import ADAPTERS, ANEW, COMPONENTS, LOADINGS, META, SPECTRUM, VERBATIM

REPAIR = "Take the adapter out (lorashare-stream remove) and add it again; or delete the checkpoint and compress again."


class HubOrigin(Schema):
    """Origin of an adapter on the Hub, pinned, with what the Hub said of it then."""

    repo: str
    revision: str
    subfolder: str
    gated: bool | None
    private: bool | None
    license: str | None


class AdapterRecord(Schema):
    """Our part of an adapter_meta.json, `lorashare_stream`; in an index, less what that has elsewhere."""

    format: Annotated[Format, "1"] = 1
    basis_digest: Annotated[str, "that of share_config.json"]
    source_id: Annotated[str, "the adapter: its folder, or its id on the Hub, pinned"]
    sha256: Annotated[str, "of its weight files"]
    source_bytes: Annotated[Count, "of these"]
    lora_bytes: Annotated[Count, "of its LoRA tensors"]
    relative_error: Annotated[Measure, "of dW, certified"]
    worst_module: Annotated[str | None, "where it is largest; null of an adapter that is kept exact"]
    worst_module_error: Annotated[Measure, "there"]
    delta_norm: Annotated[Measure, "the norm of dW"] = 0.0
    verbatim: Annotated[list[str], "keys of tensors that are kept as they came"] = Field(default=[])
    notes: Annotated[list[str], "what the user should know of it"] = Field(default=[])
    files: Annotated[dict[str, str], "the files beside this one -> their SHA-256"] = Field(default={})
    hub: Annotated[HubOrigin | None, "repo, revision, subfolder, gated, private, license; only of the Hub"] = None
    layout: Annotated[list[Any] | None, "of its modules, as above; only while a coded checkpoint is made"] = None
    estimated: Annotated[str | None, "why the error is not measured, if it is not"] = None


class Meta(Schema):
    """adapter_meta.json, which lorashare may have written."""

    model_config = ConfigDict(extra="ignore")

    adapter_name: str = ""
    original_config: dict[str, Any] = Field(default={})
    original_adapter_path: str = ""
    ours: AdapterRecord | None = Field(default=None, alias="lorashare_stream")

    def plain(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class AdapterMeta(Meta):
    """adapter_meta.json of ours, sealed by a `checksum`."""

    model_config = ConfigDict(extra="forbid")

    adapter_name: Annotated[str, "the adapter"]
    original_config: Annotated[dict[str, Any], "its adapter_config.json"]
    original_adapter_path: Annotated[str, "the folder or the id that it came from"]
    ours: Annotated[AdapterRecord, "what is recorded of it"] = Field(alias="lorashare_stream")


def is_whole(root: Path, admission: Admission, basis_key: str) -> bool:
    """Whether an adapter of a checkpoint is whole, by its digests, and of this admission.

    A power cut may leave names without content.

    Args:
        root: of the checkpoint.
        admission: its admission.
        basis_key: of the components to which it must belong.
    """
    try:
        meta, folder = next(metas_of(root, [admission.name])), root / ADAPTERS / admission.name
        found = meta.ours.sha256, digest_config(meta.original_config), meta.ours.basis_digest
        files = all(digest_files([folder / file]) == digest for file, digest in meta.ours.files.items())
    except (CheckpointError, FileNotFoundError):
        return False
    return files and found == (admission.digest, admission.config_digest, basis_key)


def check_components(root: Path, sha256: str) -> None:
    """Check the digest of the components of a checkpoint.

    Raises:
        CheckpointError: if they are not.
    """
    if digest_files([root / COMPONENTS]) != sha256:
        raise CheckpointError(
            f"{COMPONENTS} is damaged",
            found=root,
            remedy=ANEW,
        )


def has_files(root: Path, names: Iterable[str]) -> bool:
    """Whether the files of a checkpoint with these adapters exist; they are not read."""
    files = (f"{root}/{ADAPTERS}/{name}/{file}" for name in names for file in (LOADINGS, META))
    return (root / COMPONENTS).is_file() and all(map(os.path.isfile, files))


def admission_in(meta: AdapterMeta) -> Admission:
    """Admission as far as a checkpoint records it: enough to recognise the adapter."""
    ours, config = meta.ours, digest_config(meta.original_config)
    sizes = (ours.source_bytes,)  # of all files together
    return Admission(meta.adapter_name, ours.source_id, ours.sha256, config, 0.0, sizes, (), "")


def metas_of(root: Path, names: Iterable[str]) -> Iterator[AdapterMeta]:
    """Read the records of adapters of a checkpoint, staged or published.

    Raises:
        CheckpointError: if it is not what was written.
    """
    for name in names:
        why = "it is not what was written"
        try:
            values = unsealed(read_json(root / ADAPTERS / name / META))
        except (FileNotFoundError, NotADirectoryError, ValueError) as e:
            values, why = None, str(e)
        if values is None:
            raise CheckpointError(f"{META} is damaged", adapter=name, found=why, remedy=REPAIR)
        yield checked(AdapterMeta, values, META, REPAIR, name)


def sizes_of(root: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes on disk of a checkpoint by part, with the given adapters."""
    sizes = {"basis": _size(root / COMPONENTS), "loadings": 0, "verbatim": 0, "metadata": _size(root / SPECTRUM)}
    for name in names:
        for part, file in (("loadings", LOADINGS), ("verbatim", VERBATIM), ("metadata", META)):
            sizes[part] += _size(f"{root}/{ADAPTERS}/{name}/{file}")
    return sizes


def _size(path: str | Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
