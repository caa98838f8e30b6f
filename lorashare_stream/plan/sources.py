"""Folders, folders of folders, globs, manifests, and ids of the Hub, of which nothing is asked here."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ..adapters.folder import CONFIG, foreign_lora, inner_adapters, looks_like_adapter, remedy_for
from ..adapters.foreign import tool_of_files
from ..adapters.hubid import meant_by, parse_hub_id
from ..adapters.source import Listing, Source, unique
from ..checkpoint import format as share
from ..errors import MissingSourceError, UsageError
from ..text import listed, name_fault, printable
from ..workspace.workspace import COPY
from .manifests import SUFFIXES, read_manifest

log = logging.getLogger(__name__)
Ours = dict[str, str]  # folder of ours that was come across -> what it is


def resolve(
    sources: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]], *, missing_ok: bool = False
) -> list[Source]:
    """All adapters that `sources` mean, in a fixed order, no folder twice.

    Checkpoints and workspaces of ours among them are left out, and told.

    Args:
        sources: adapter folders, folders that contain some at any depth, globs, manifests, ids of the Hub; or
            a mapping from names to adapter folders and ids. A path that is there is never taken for an id.
        missing_ok: whether a folder that is not there is given all the same, for the catalog to refuse.

    Raises:
        MissingSourceError: naming all that are not there.
        UsageError: for a source that holds no adapter, or a name that cannot be one.
    """
    if isinstance(sources, str | os.PathLike):
        raise UsageError("sources must be a list or a mapping of names to paths", found=sources)
    named = sources.items() if isinstance(sources, Mapping) else ((None, source) for source in sources)
    ours: Ours = {}
    found = unique(one for name, source in named for one in _expand(name, os.fspath(source), ours))
    told = listed(f"{printable(folder, 60)} ({what})" for folder, what in ours.items())
    if ours and not found:
        remedy = "Name the adapters that it was made of, or have them back by lorashare-stream reconstruct."
        raise UsageError("no adapter among the sources, but output of this program", found=told, remedy=remedy)
    if ours:
        log.warning("left out of the sources, being output of this program: %s", told)
    missing = [os.fspath(source.path) for source in found if source.hub is None and not source.path.is_dir()]
    if missing and not missing_ok:
        raise _no_such_source(missing)
    return found


def _expand(name: str | None, text: str, ours: Ours) -> Iterator[Source]:
    path = Path(text)
    if not text or "\0" in text:
        raise UsageError("an empty source" if not text else "a source with a NUL character", found=text)
    if name is not None:
        if not isinstance(name, str) or (fault := name_fault(name)) is not None:
            why = "it is not text" if not isinstance(name, str) else fault
            raise UsageError(
                f"an adapter cannot be named {printable(name)!r}: {why}",
                expected="one path component",
                remedy="Choose another name.",
            )
        yield _one(text, name)
    elif path.is_dir():
        yield from _walk(path, ours)
    elif path.is_file():
        yield from _from_manifest(path, ours)
    elif glob.has_magic(text):
        yield from _from_glob(text, ours)
    else:
        yield _one(text, None)


def _one(text: str, name: str | None, listing: Listing | None = None) -> Source:
    """A folder, or an id of the Hub; if it is neither, `resolve` or the catalog says so."""
    path = Path(text)
    hub = None if path.exists() else parse_hub_id(text)
    if hub is None:
        return Source(os.path.realpath(text), path, name)
    return Source(str(hub), path, name, hub=hub, asked=str(hub), listing=listing or Listing())


def _no_such_source(missing: list[str]) -> MissingSourceError:
    meant = [text for text in map(meant_by, missing) if text is not None]
    return MissingSourceError(
        f"no such source: {', '.join(map(repr, map(printable, missing[:8])))}",
        found=f"{len(missing)} that are not there" if len(missing) > 1 else None,
        expected="an adapter folder, a folder of adapter folders, a glob, a manifest, or a Hub id org/name",
        remedy=f"If it is on the Hub: {', '.join(printable(text) for text in meant[:3])}." if meant else None,
    )


def _from_glob(pattern: str, ours: Ours) -> Iterator[Source]:
    """Every adapter under the matching folders, and in the matching manifests; other matches mean nothing."""
    found = 0
    for match in sorted(glob.glob(pattern, recursive=True)):
        inner = _adapters_under(Path(match), ours) if os.path.isdir(match) else ()
        for source in _from_manifest(Path(match), ours) if match.endswith(SUFFIXES) else inner:
            found += 1
            yield source
    if not found and not ours:
        raise UsageError(f"no adapter matches {printable(pattern)!r}", expected="folders or manifests")


def _from_manifest(path: Path, ours: Ours) -> Iterator[Source]:
    if path.suffix not in SUFFIXES:
        raise _no_manifest(path)
    entries = read_manifest(path)
    if not entries:
        raise UsageError(f"manifest {printable(path)} names no adapter")
    for name, source, listing in entries:
        beside = os.path.join(path.parent, source) if source else ""
        if listing is not None or (parse_hub_id(source) is not None and not os.path.exists(beside)):
            yield _one(source, name, listing)
        elif os.path.splitext(source)[1] in SUFFIXES:
            raise UsageError(f"manifest {printable(path)} names another manifest", found=source)
        else:
            yield from _expand(name, beside, ours)


def _no_manifest(path: Path) -> UsageError:
    foreign = foreign_lora(path.parent, [path.name])
    if foreign is not None:
        return UsageError(
            f"a {foreign[1]}, not a PEFT adapter: {printable(path)}",
            expected=f"a folder with {CONFIG}",
            remedy=f"Name its folder: it has the {CONFIG}."
            if (path.parent / CONFIG).is_file()
            else remedy_for(foreign[1]),
        )
    return UsageError(
        f"not a manifest: {printable(path)}",
        expected=f"a folder, or a file ending in {', '.join(SUFFIXES)}",
        remedy=f"Name the folder that holds {CONFIG}." if path.suffix in (".safetensors", ".bin", ".json") else None,
    )


def _walk(root: Path, ours: Ours) -> Iterator[Source]:
    sources = list(_adapters_under(root, ours))
    yield from sources
    if not sources and not ours:
        there = sorted(os.listdir(root))
        tool = tool_of_files(there)
        raise UsageError(
            f"no adapter in {printable(root)}" + (f", but one of {tool[0].name}" if tool else ""),
            found=listed(there) or "nothing",
            expected=f"a folder with {CONFIG}, here or below",
            remedy=tool[0].remedy if tool else None,
        )


def _unreadable(error: OSError) -> None:
    raise error  # a folder that cannot be read may hold adapters: it is not passed over


def _adapters_under(root: Path, ours: Ours) -> Iterator[Source]:
    """Adapters at or under `root`, and LoRA of other kinds, for the catalog to refuse; what is ours is noted in `ours`.

    An adapter's own subfolders are not entered: they are its training checkpoints, or adapters saved with it.
    """
    visited: set[str] = set()
    for folder, below, files in os.walk(root, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(d for d in below if not d.startswith(".") and d != "__MACOSX")
        path = Path(folder)
        what = _output(path, files)
        if what is not None:
            ours[folder] = what
            below.clear()
        elif looks_like_adapter(files) or foreign_lora(path, files):
            yield Source(real, path, inner=inner_adapters(path, below))
            below.clear()


def _output(folder: Path, files: Collection[str]) -> str | None:
    """What of this program's output a folder is, by the names of its files; None if it is none."""
    if not {share.CONFIG, share.COMPONENTS, share.INDEX}.isdisjoint(files):
        return "a checkpoint"
    if share.STAGING in files and folder.name.endswith(".staging"):
        return "a checkpoint that is not whole yet"
    if share.META in files and (share.LOADINGS in files or share.VERBATIM in files):
        return "an adapter of a checkpoint"
    return "a workspace" if COPY in files else None
