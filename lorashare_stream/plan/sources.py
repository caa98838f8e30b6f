"""Sources: folders, folders of folders, globs, manifests, and Hub ids; nothing is asked of the network."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ValidationError, model_validator

from ..adapters.folder import CONFIG, foreign_lora, inner_adapters, looks_like_adapter, remedy_for
from ..adapters.foreign import tool_of_files
from ..adapters.hubid import HubId, meant_by, parse_hub_id
from ..adapters.source import Listing, Source, unique
from ..checkpoint import format as share
from ..errors import MissingSourceError, UsageError
from ..schema import Schema, fault_of
from ..text import folded, listed, name_fault, printable
from ..workspace.workspace import COPY

log = logging.getLogger(__name__)
SUFFIXES = (".txt", ".jsonl", ".yaml", ".yml")  # of manifests
Output = dict[str, str]  # folder of this program's output that was found -> what it is


class PathEntry(Schema):
    """Entry of a manifest: adapters by a path. In YAML and `.txt` an entry may be the path alone."""

    name: Annotated[str | None, "name of the adapter; only of a folder of one adapter, or of a Hub id"] = None
    path: Annotated[str, "adapter folder, folder of these, or glob, relative to the manifest; or a Hub id"]


class HubEntry(Schema):
    """Entry of a manifest: an adapter of the Hub, as `discover` writes it."""

    name: Annotated[str | None, "name of the adapter"] = None
    repo: Annotated[str, "repository, `org/name`"]
    revision: Annotated[str | None, "branch, tag or commit"] = None
    subfolder: Annotated[str | None, "folder of the adapter in the repository"] = None
    files: Annotated[list[str] | None, "files of weights and configuration in that folder"] = None
    base_model: Annotated[str | None, "base model that the repository names"] = None
    gated: Annotated[bool | str | None, "whether access must be asked for"] = None
    private: Annotated[bool | None, "whether access is limited to its owners"] = None
    license: Annotated[str | None, "license that its card gives"] = None
    size: Annotated[Any, "bytes of the repository; not used"] = None
    downloads: Annotated[Any, "downloads; not used"] = None
    likes: Annotated[Any, "likes; not used"] = None
    last_modified: Annotated[Any, "time of its last commit; not used"] = None

    @property
    def id(self) -> HubId:
        """Hub id."""
        return HubId(self.repo, self.revision or "", self.subfolder or "")

    @property
    def listing(self) -> Listing:
        """Facts that the Hub listed; without files whose names are no relative paths."""
        files = tuple(f for f in self.files or () if not any(map(name_fault, f.split("/"))))
        gated = None if self.gated is None else bool(self.gated)
        return Listing(files, self.base_model or None, gated, self.private, self.license or None)

    @model_validator(mode="after")
    def _has_an_id(self) -> Self:
        if parse_hub_id(str(self.id)) != self.id:
            raise ValueError("repo org/name, and perhaps a revision and a subfolder")
        return self


def resolve(
    sources: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]], *, missing_ok: bool = False
) -> list[Source]:
    """All adapters of `sources`, in a fixed order, no folder twice.

    Checkpoints and workspaces of this program among them are left out, with a warning.

    Args:
        sources: adapter folders, folders that contain some at any depth, globs, manifests, Hub ids; or a mapping from
            names to adapter folders and Hub ids. An existing path is never taken for an id.
        missing_ok: keep folders that do not exist, for the catalog to refuse.

    Raises:
        MissingSourceError: naming all folders that do not exist.
        UsageError: for a source that holds no adapter, or an invalid name.
    """
    if isinstance(sources, str | os.PathLike):
        raise UsageError("sources must be a list or a mapping of names to paths", found=sources)
    named = sources.items() if isinstance(sources, Mapping) else ((None, source) for source in sources)
    output: Output = {}
    found = unique(one for name, source in named for one in _expand(name, os.fspath(source), output))
    told = listed(f"{printable(folder, 60)} ({what})" for folder, what in output.items())
    if output and not found:
        remedy = "Name the adapters that it was made of, or have them back by lorashare-stream reconstruct."
        raise UsageError("no adapter among the sources, but output of this program", found=told, remedy=remedy)
    if output:
        log.warning("left out of the sources, being output of this program: %s", told)
    missing = [os.fspath(source.path) for source in found if source.hub is None and not source.path.is_dir()]
    if missing and not missing_ok:
        raise _no_such_source(missing)
    return found


def _expand(name: str | None, text: str, output: Output) -> Iterable[Source]:
    path = Path(text)
    if not text or "\0" in text:
        raise UsageError("an empty source" if not text else "a source with a NUL character", found=text)
    if name is not None:
        _check_name(name)
    elif path.is_dir():
        return _from_folder(path, output)
    elif path.is_file():
        return _from_manifest(path, output)
    elif glob.has_magic(text):
        return _from_glob(text, output)
    hub = None if path.exists() else parse_hub_id(text)
    if hub is not None and path.parent != Path() and path.parent.is_dir() and not text.startswith("hf://"):
        log.warning(
            "%s is not there, though %s is: taken for an id of the Hub", printable(text), printable(path.parent)
        )
    return [Source(os.path.realpath(text), path, name) if hub is None else _on_hub(hub, name)]


def _check_name(name: object) -> None:
    fault = name_fault(name) if isinstance(name, str) else "it is not text"
    if fault is not None:
        raise UsageError(
            f"an adapter cannot be named {printable(name)!r}: {fault}",
            expected="one path component",
            remedy="Choose another name.",
        )


def _on_hub(hub: HubId, name: str | None, listing: Listing | None = None) -> Source:
    return Source(str(hub), Path(str(hub)), name, hub=hub, asked=str(hub), listing=listing or Listing())


def _no_such_source(missing: list[str]) -> MissingSourceError:
    meant = [text for text in map(meant_by, missing) if text is not None]
    return MissingSourceError(
        f"no such source: {', '.join(map(repr, map(printable, missing[:8])))}",
        found=f"{len(missing)} that are not there" if len(missing) > 1 else None,
        expected="an adapter folder, a folder of adapter folders, a glob, a manifest, or a Hub id org/name",
        remedy=f"If it is on the Hub: {', '.join(printable(text) for text in meant[:3])}." if meant else None,
    )


def _from_folder(root: Path, output: Output) -> list[Source]:
    found = list(_adapters_under(root, output))
    if found or output:
        return found
    there = sorted(os.listdir(root))
    tool = tool_of_files(there)
    raise UsageError(
        f"no adapter in {printable(root)}" + (f", but one of {tool[0].name}" if tool else ""),
        found=listed(there) or "nothing",
        expected=f"a folder with {CONFIG}, here or below",
        remedy=tool[0].remedy if tool else None,
    )


def _from_glob(pattern: str, output: Output) -> list[Source]:
    """Adapters under the folders, and in the manifests, that match; other files are passed over."""
    found: list[Source] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            found += _adapters_under(Path(match), output)
        elif match.endswith(SUFFIXES):
            found += _from_manifest(Path(match), output)
    if not found and not output:
        raise UsageError(f"no adapter matches {printable(pattern)!r}", expected="folders or manifests")
    return found


def _adapters_under(root: Path, output: Output) -> Iterator[Source]:
    """Adapters at or under `root`, and LoRA of other kinds, for the catalog to refuse; output is noted in `output`.

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
            output[folder] = what
            below.clear()
        elif looks_like_adapter(files) or foreign_lora(path, files):
            yield Source(real, path, inner=inner_adapters(path, below))
            below.clear()


def _unreadable(error: OSError) -> None:
    raise error  # a folder that cannot be read may hold adapters: it is not passed over


def _output(folder: Path, files: Collection[str]) -> str | None:
    """The kind of this program's output that a folder is, by the names of its files; None of others."""
    if not {share.CONFIG, share.COMPONENTS, share.INDEX}.isdisjoint(files):
        return "a checkpoint"
    if share.STAGING in files and folder.name.endswith(".staging"):
        return "a checkpoint that is not whole yet"
    if share.META in files and (share.LOADINGS in files or share.VERBATIM in files):
        return "an adapter of a checkpoint"
    return "a workspace" if COPY in files else None


# -- manifests ------------------------------------------------------------------------------------------------


def _from_manifest(path: Path, output: Output) -> Iterator[Source]:
    if path.suffix not in SUFFIXES:
        raise _no_manifest(path)
    entries = read_manifest(path)
    if not entries:
        raise UsageError(f"manifest {printable(path)} names no adapter")
    _demand_own_names(path, entries)
    for entry in entries:
        if isinstance(entry, HubEntry):
            yield _on_hub(entry.id, entry.name, entry.listing)
            continue
        beside = os.path.join(path.parent, entry.path) if entry.path else ""
        hub = None if os.path.exists(beside) else parse_hub_id(entry.path)
        if hub is not None:
            yield _on_hub(hub, entry.name)
        elif os.path.splitext(entry.path)[1] in SUFFIXES:
            raise UsageError(f"manifest {printable(path)} names another manifest", found=entry.path)
        else:
            yield from _expand(entry.name, beside, output)


def _demand_own_names(path: Path, entries: Sequence[PathEntry | HubEntry]) -> None:
    """Refuse a manifest that gives one name to two adapters; of others that want one, each gets a suffix."""
    given: dict[str, str] = {}
    for entry in entries:
        source = entry.path if isinstance(entry, PathEntry) else str(entry.id)
        if entry.name is not None and (first := given.setdefault(folded(entry.name), source)) != source:
            raise UsageError(
                f"manifest {printable(path)} gives two adapters the name {printable(entry.name)!r}",
                found=listed([first, source]), remedy="Give each a name of its own.",
            )  # fmt: skip


def _no_manifest(path: Path) -> UsageError:
    foreign = foreign_lora(path.parent, [path.name])
    if foreign is not None:
        configured = (path.parent / CONFIG).is_file()
        return UsageError(
            f"a {foreign[1]}, not a PEFT adapter: {printable(path)}",
            expected=f"a folder with {CONFIG}",
            remedy=f"Name its folder: it has the {CONFIG}." if configured else remedy_for(foreign[1]),
        )
    return UsageError(
        f"not a manifest: {printable(path)}",
        expected=f"a folder, or a file ending in {', '.join(SUFFIXES)}",
        remedy=f"Name the folder that holds {CONFIG}." if path.suffix in (".safetensors", ".bin", ".json") else None,
    )


def read_manifest(path: Path) -> list[PathEntry | HubEntry]:
    """Entries of a manifest: `.txt` has a path a line, `#` starts a comment line; `.jsonl` has an object a line;
    `.yaml` has a list of objects or paths.

    Raises:
        UsageError: naming the entry, its field, and what was found there.
    """
    if path.suffix == ".txt":
        lines = [line.strip() for line in _text(path).splitlines()]
        entries: Any = [line for line in lines if line and not line.startswith("#")]
    elif path.suffix == ".jsonl":
        lines = _text(path).splitlines()
        entries = [_json_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        entries = read_yaml(path)
    if not isinstance(entries, list):
        raise UsageError(
            f"manifest {printable(path)} is not a list",
            found=type(entries).__name__,
            expected="a list of name and path",
        )
    return [_entry(f"manifest {printable(path)}, entry {n}", entry) for n, entry in enumerate(entries, 1)]


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"manifest {printable(path)}, line {number}: not JSON", found=str(e)) from e


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{printable(path)} is not UTF-8 text", found=str(e)) from e


def read_yaml(path: Path) -> Any:
    """Plain values from YAML; a document that asks for objects is refused.

    Raises:
        UsageError: if it is no YAML of plain values.
    """
    import yaml

    text = _text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise UsageError(f"{printable(path)} is not YAML of plain values", found=" ".join(str(e).split())) from e


def _entry(where: str, entry: Any) -> PathEntry | HubEntry:
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or not ("repo" in entry or "path" in entry):
        expected = "an object with path, or with repo, and perhaps name"
        raise UsageError(f"{where}: not a source", found=entry, expected=expected)
    model: type[PathEntry | HubEntry] = HubEntry if "repo" in entry else PathEntry
    try:
        return model.model_validate(entry)
    except ValidationError as e:
        unknown = [str(key) for key in entry if key not in model.model_fields]
        if unknown:
            known = listed(sorted(model.model_fields), 20)
            raise UsageError(f"{where}: unknown field", found=listed(sorted(unknown)), expected=known) from e
        what = "not an adapter of the Hub" if model is HubEntry else "not a source"
        raise UsageError(f"{where}: {what}", **fault_of(e)) from e
