"""Publish: check an output, rename a staged checkpoint into its place, recover from a crash between."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from ..adapters.hubid import parse_hub_id
from ..errors import UsageError
from ..files import atomic_path, remove_tree, sync, sync_tree, write_json
from ..text import printable
from .format import ADAPTERS, FILES, PACKS, STAGING, ours_of


def staging_folder(out: Path) -> Path:
    """Staging folder of an output: beside it, so that publishing is a rename."""
    return out.parent / f".{out.name}.staging"


def drop(folder: Path, keep: bool = False) -> None:
    """Remove a folder of ours beside an output, or, with `keep`, its content but for the marker.

    It is marked first, and the marker goes last, so that what a kill leaves of it is still known as ours.
    """
    if folder.is_symlink() or not folder.exists():
        return
    write_json(folder / STAGING, None)
    for path in folder.iterdir():
        if path.name != STAGING:
            remove_tree(path)
    if not keep:
        remove_tree(folder)


def _is_ours(path: Path) -> bool:
    """Whether a folder beside an output is a checkpoint, is marked, or holds what staging begins with."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {p.name for p in path.iterdir() if not p.name.endswith(".tmp")}
    return STAGING in names or names <= {ADAPTERS} or ours_of(path) is not None


def publish(staged: Path, out: Path) -> None:
    """Rename a whole checkpoint into place; the one that it replaces is moved aside first, then removed.

    What a user has put beside the files of the old checkpoint, a README say, is carried over.
    """
    aside = replaced_folder(out)
    drop(aside)
    if out.exists():
        for stranger in (p for p in out.iterdir() if p.name not in FILES):
            copy = staged / stranger.name
            if stranger.is_dir() and not stranger.is_symlink():
                shutil.copytree(stranger, copy, symlinks=True, dirs_exist_ok=True)
                sync_tree(copy)
            else:
                shutil.copy2(stranger, copy, follow_symlinks=False)
                if not copy.is_symlink():
                    sync(copy)
        sync(staged)
        os.rename(out, aside)
    os.rename(staged, out)
    sync(out.parent)
    drop(aside)


def replaced_folder(out: Path) -> Path:
    """Folder of the old checkpoint while another takes its place."""
    return out.parent / f".{out.name}.replaced"


def settled(out: Path, seconds: float = 2.0) -> None:
    """Wait, for a moment, while `out` is missing between the two renames of publishing."""
    end = time.monotonic() + seconds
    while not out.exists() and replaced_folder(out).exists() and time.monotonic() < end:
        time.sleep(0.01)


def output_folder(out: Path) -> Path:
    """`out`, absolute.

    Raises:
        UsageError: if it is the current folder or holds it, which cannot be replaced by one rename.
    """
    absolute = Path(os.path.abspath(out))
    if Path.cwd().is_relative_to(absolute):
        raise UsageError(
            "the output cannot be the current folder, nor one that holds it", found=out, remedy="Name a new folder."
        )
    return absolute


def demand_folder(folder: Path) -> None:
    """Check that a checkpoint to be edited is a folder, and no id of the Hub.

    Raises:
        UsageError: if it is one.
    """
    if not folder.exists() and parse_hub_id(str(folder)) is not None:
        raise UsageError(
            "no such folder; a checkpoint on the Hub cannot be worked on where it is", found=folder,
            remedy=f"Fetch it first: hf download {printable(folder)} --local-dir FOLDER.",
        )  # fmt: skip


def check_output(out: Path, *, own: Collection[str], overwrite: bool) -> None:
    """Check that an output may be replaced.

    Args:
        out: the output folder.
        own: digests of the bases that this workspace has published.
        overwrite: whether another checkpoint may be replaced.

    Raises:
        UsageError: if `out` holds something else than a checkpoint that may be replaced.
    """
    for path in (replaced_folder(out), staging_folder(out)):
        if os.path.lexists(path) and not _is_ours(path):
            raise UsageError("a name that is needed beside the output is taken", found=path, remedy="Move it away.")
    if out.is_symlink():
        raise UsageError("the output is a link", found=out, remedy="Name the folder itself, or a new one.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = ours_of(out)
    if ours is None:
        raise UsageError("the output exists and is no checkpoint", found=out, remedy="Choose another output folder.")
    if not overwrite and ours.get("basis_digest") not in own:
        raise UsageError(
            "the output holds a checkpoint of another run",
            found=out,
            remedy="Name the workspace that it was made with by --workspace, choose another output folder, or replace "
            "it by --overwrite.",
        )


def recover_output(out: Path) -> None:
    """Recover from a kill between the two renames: the old checkpoint takes its place again, or is removed."""
    aside = replaced_folder(out)
    if out.exists():
        drop(aside)
    elif ours_of(aside) is not None:
        os.rename(aside, out)
    out.parent.mkdir(parents=True, exist_ok=True)


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy a checkpoint to a folder: replaces a checkpoint, leaves other files alone.

    Raises:
        UsageError: if `out` is a link, or holds adapters of something else.
    """
    if out.exists() and os.path.samefile(source, out):
        return
    if out.is_dir() and any(out.iterdir()) and ours_of(out) is None:
        _copy_into(source, out)
        return
    out = output_folder(out)
    check_output(out, own=(), overwrite=True)
    recover_output(out)
    staged = staging_folder(out)
    drop(staged)
    staged.mkdir()
    write_json(staged / STAGING, None)
    shutil.copytree(source, staged, dirs_exist_ok=True)
    (staged / STAGING).unlink()
    publish(staged, out)


def _copy_into(source: Path, out: Path) -> None:
    """Copy a checkpoint beside other files; share_config.json last."""
    folders = [name for name in (ADAPTERS, PACKS) if (source / name).is_dir()]
    for name in folders:
        if os.path.lexists(out / name):
            raise UsageError(f"the folder holds {name}/ of something else", found=out, remedy="Choose another one.")
    for name in folders:
        shutil.copytree(source / name, out / name)
    for name in (n for n in FILES if (source / n).is_file()):
        with atomic_path(out / name) as path:
            shutil.copyfile(source / name, path)
