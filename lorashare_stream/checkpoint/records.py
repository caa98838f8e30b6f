"""What a checkpoint of ours records of its adapters, read without torch, and whether it is true."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..adapters.folder import digest_config, digest_files
from ..errors import CheckpointError
from ..files import read_json, unsealed
from ..workspace.journal import Admission
from .format import ADAPTERS, COMPONENTS, LOADINGS, META, OURS, SPECTRUM, VERBATIM

REPAIR = "Take the adapter out (lorashare-stream remove) and add it again; or delete the checkpoint and compress again."


def is_whole(folder: Path, admission: Admission, basis_key: str) -> bool:
    """Whether the folder of an adapter in a checkpoint is whole, by its digests, and that of an admission.

    A power cut may leave names without content.

    Args:
        folder: of the adapter.
        admission: its admission.
        basis_key: of the components to which it must belong.
    """
    try:
        meta = read_json(folder / META)
        ours = meta[OURS]
        return (
            unsealed(meta) is not None
            and ours["sha256"] == admission.digest
            and digest_config(meta["original_config"]) == admission.config_digest
            and ours["basis_digest"] == basis_key
            and all(digest_files([folder / file]) == digest for file, digest in ours["files"].items())
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def check_components(root: Path, sha256: str) -> None:
    """Demand that the components of a checkpoint are what was written.

    Raises:
        CheckpointError: if they are not.
    """
    if digest_files([root / COMPONENTS]) != sha256:
        raise CheckpointError(
            f"{COMPONENTS} is damaged",
            found=root,
            remedy="Delete the checkpoint, not its workspace, and compress again; or fetch it again.",
        )


def has_files(root: Path, names: Iterable[str]) -> bool:
    """Whether the files of a checkpoint with these adapters are there; it is not looked into them."""
    files = (f"{root}/{ADAPTERS}/{name}/{file}" for name in names for file in (LOADINGS, META))
    return (root / COMPONENTS).is_file() and all(map(os.path.isfile, files))


def admission_in(meta: Mapping[str, Any]) -> Admission:
    """What of an admission a checkpoint of ours records: enough to know the adapter again."""
    ours, config = meta[OURS], digest_config(meta["original_config"])
    sizes = (ours["source_bytes"],)  # of all files together
    return Admission(meta["adapter_name"], ours["source_id"], ours["sha256"], config, 0.0, sizes, (), "")


def metas_of(root: Path, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What a checkpoint of ours, staged or published, records of each adapter.

    Raises:
        CheckpointError: if it is not what was written.
    """
    for name in names:
        try:
            meta = read_json(root / ADAPTERS / name / META)
        except (FileNotFoundError, ValueError) as e:
            meta, why = None, str(e)
        else:
            why = "it is not what was written"
        if unsealed(meta) is None:
            raise CheckpointError(f"{META} is damaged", adapter=name, found=why, remedy=REPAIR)
        yield meta


def sizes_of(root: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes on disk of a checkpoint, by part, of its adapters those that are named."""
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
