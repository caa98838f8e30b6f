"""The SHARE checkpoint, written: staged beside the output, then published by one rename.

    share_config.json                     what lorashare's SHAREConfig knows, and `compression_stats`
    shared_components.safetensors         module:side -> V (d, k)
    adapters/<name>/loadings.safetensors  module:side -> V'W (k, r)
    adapters/<name>/classifier_head.safetensors   tensors kept verbatim, under their PEFT keys
    adapters/<name>/adapter_meta.json     original_config, source, certified error, digest of the basis
    skipped.json                          adapters that were left out, with reasons; only if there are some

lorashare 0.1.3 refuses unknown fields of share_config.json, so everything of ours is in
`compression_stats["lorashare_stream"]`, in adapter_meta.json, or in files of its own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .adapterfiles import digest_files, tensor_records
from .errors import UsageError
from .files import atomic_file, own_folder, read_json, remove_tree, sync_folder, sync_tree, write_json
from .tensorfile import SafetensorsReader, write_safetensors

CONFIG, COMPONENTS, ADAPTERS = "share_config.json", "shared_components.safetensors", "adapters"
LOADINGS, VERBATIM, META = "loadings.safetensors", "classifier_head.safetensors", "adapter_meta.json"
SKIPPED = "skipped.json"
OURS = "lorashare_stream"  # the key of what is ours, in compression_stats and in adapter_meta.json


class Staging:
    """A checkpoint in the making."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, out: Path, digest: str) -> Staging:
        """Go on with the staged checkpoint of this digest, or begin it; staged ones of others are dropped."""
        root = staging_folder(out)
        if root.is_symlink():
            root.unlink()
        marker = root / "staging.json"
        if root.exists() and (not marker.exists() or read_json(marker) != digest):
            remove_tree(root)
        own_folder(root)
        own_folder(root / ADAPTERS)
        if not marker.exists():
            write_json(marker, digest)
        for path in (root / ADAPTERS).glob(".*"):
            remove_tree(path)
        return cls(root)

    def write_components(
        self, bases: Sequence[Path], shapes: Mapping[str, tuple[int, int]], dtype: str, digest: str
    ) -> None:
        """Stream all bases into shared_components.safetensors.

        Args:
            bases: files with the components `A` and `B` of one module each.
            shapes: group id -> (d, k), in the order of the files, A before B.
            dtype: as safetensors names it.
            digest: of the basis, stored in the header.
        """
        metadata = {"format": "pt", "basis_digest": digest}
        with atomic_file(self.root / COMPONENTS) as f:
            write_safetensors(f, ((g, dtype, shape) for g, shape in shapes.items()), _raw_tensors(bases), metadata)

    def done(self, name: str) -> bool:
        """Whether an adapter is written, whole; what is not is removed. A power cut may leave names without content."""
        folder = self.root / ADAPTERS / name
        try:
            digests = read_json(folder / META)[OURS]["files"]
            whole = all(digest_files([folder / file]) == digest for file, digest in digests.items())
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            remove_tree(folder)
        return whole

    @contextmanager
    def adapter(self, name: str) -> Iterator[Path]:
        """A folder to write one adapter into, which takes its place at the end of the block."""
        folder = self.root / ADAPTERS / f".{name}"
        remove_tree(folder)
        folder.mkdir()
        yield folder
        os.rename(folder, self.root / ADAPTERS / name)

    def metas(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """What is recorded of each adapter."""
        for name in names:
            yield read_json(self.root / ADAPTERS / name / META)

    def commit(self, out: Path, config: Mapping[str, Any], skipped: list[dict[str, Any]]) -> None:
        """Write what is left, share_config.json last, and rename the folder into place."""
        if skipped:
            write_json(self.root / SKIPPED, skipped)
        sync_tree(self.root / ADAPTERS)  # once for all, since every adapter can be checked by its digests
        write_json(self.root / CONFIG, config)
        (self.root / "staging.json").unlink()
        publish(self.root, out)


def _raw_tensors(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        with SafetensorsReader((path,)) as reader:
            for record in tensor_records((path,))[0]:
                yield from reader.chunks(record)


def staging_folder(out: Path) -> Path:
    """Where the checkpoint `out` is staged: beside it, so that publishing is one rename."""
    return out.parent / f".{out.name}.staging"


def publish(staged: Path, out: Path) -> None:
    """Rename a whole checkpoint into place; the one that it replaces is moved aside first, then removed."""
    aside = replaced_folder(out)
    remove_tree(aside)
    if out.exists():
        os.rename(out, aside)
    os.rename(staged, out)
    sync_folder(out.parent)
    remove_tree(aside)


def replaced_folder(out: Path) -> Path:
    """Where the checkpoint `out` lies while another takes its place."""
    return out.parent / f".{out.name}.replaced"


def output_folder(out: Path) -> Path:
    """`out`, absolute.

    Raises:
        UsageError: if it is the root of a file system, which nothing can be staged beside.
    """
    absolute = Path(os.path.abspath(out))
    if not absolute.name:
        raise UsageError("the output cannot be the root folder", found=out, remedy="Name a new folder.")
    return absolute


def claim_output(out: Path, *, own: Collection[str], overwrite: bool) -> None:
    """Refuse an output that is not ours to replace; mend one that a crash left between two renames.

    Args:
        out: the output folder.
        own: digests of the bases that this workspace published there.
        overwrite: whether another checkpoint may be replaced.

    Raises:
        UsageError: if `out` holds something else than a checkpoint that may be replaced.
    """
    aside = replaced_folder(out)
    if aside.exists() and not out.exists():
        os.rename(aside, out)
    if out.is_symlink():
        raise UsageError("the output is a link", found=out, remedy="Name the folder itself, or a new one.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    ours = ours_of(out)
    if ours is None:
        raise UsageError(
            "the output exists and is no SHARE checkpoint", found=out, remedy="Choose another output folder."
        )
    if not overwrite and ours.get("basis_digest") not in own:
        raise UsageError(
            "the output holds a checkpoint of another run",
            found=out,
            remedy="Choose another output folder, or replace it by --overwrite.",
        )


def ours_of(out: Path) -> dict[str, Any] | None:
    """What this package recorded in a checkpoint: {} if lorashare wrote it, None if it is no checkpoint."""
    try:
        stats = read_json(out / CONFIG)["compression_stats"]
        return dict(stats.get(OURS, {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def skipped_of(out: Path) -> list[dict[str, Any]]:
    """The adapters that were left out of a checkpoint, with reasons."""
    path = out / SKIPPED
    skipped: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return skipped


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy a whole checkpoint; one that is already at `out` is replaced.

    Raises:
        UsageError: if `out` holds something else.
    """
    if out.exists() and os.path.samefile(source, out):
        return
    claim_output(out, own=(), overwrite=True)
    staged = staging_folder(out)
    remove_tree(staged)
    shutil.copytree(source, staged)
    publish(staged, out)
