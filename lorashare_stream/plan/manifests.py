"""Manifest files: lists of adapters in `.txt`, `.jsonl` or `.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..adapters.hubid import HubId, parse_hub_id
from ..adapters.source import Listing
from ..errors import UsageError
from ..text import listed, name_fault, printable

SUFFIXES = (".txt", ".jsonl", ".yaml", ".yml")
_OF_THE_HUB = {"revision", "subfolder", "files", "base_model", "gated", "private", "license"}
_TOLD = {"size", "downloads", "likes", "last_modified"}  # for people: nothing depends on it
Item = tuple[str | None, str, Listing | None]  # name, source, and what the Hub's listing said of it


def read_manifest(path: Path) -> list[Item]:
    """The entries of a manifest; relative paths are relative to its folder.

    `.txt` has a source a line, `#` starts a comment line; `.jsonl` an object a line with `path` and
    perhaps `name`, or with `repo`, `revision` and what else `discover` writes; `.yaml` a list of such objects or of
    plain sources.

    Raises:
        UsageError: naming the entry that is wrong.
    """
    text = _text(path)
    if path.suffix == ".txt":
        lines = [line.strip() for line in text.splitlines()]
        entries: list[Any] = [line for line in lines if line and not line.startswith("#")]
    elif path.suffix == ".jsonl":
        entries = [_json_line(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        entries = read_yaml(path)
        if not isinstance(entries, list):
            raise UsageError(
                f"manifest {printable(path)} is not a list",
                found=type(entries).__name__,
                expected="a list of name and path",
            )
    return [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]


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


def _entry(path: Path, number: int, entry: Any) -> Item:
    where = f"manifest {printable(path)}, entry {number}"
    if isinstance(entry, str):
        return None, entry, None
    of_the_hub = isinstance(entry, dict) and "repo" in entry
    if not of_the_hub and (not isinstance(entry, dict) or not isinstance(entry.get("path"), str)):
        raise UsageError(
            f"{where}: not a source", found=entry, expected="an object with path, or with repo, and perhaps name"
        )
    known = {"repo", *_OF_THE_HUB, *_TOLD} if of_the_hub else {"path"}
    unknown = sorted(printable(k) for k in entry if k not in known | {"name"})
    if unknown:
        raise UsageError(
            f"{where}: unknown field", found=listed(unknown), expected=listed(["name", *sorted(known)], 20)
        )
    name = entry.get("name")
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{where}: name is not text", found=name)
    return _of_hub(where, name, entry) if of_the_hub else (name, entry["path"], None)


def _of_hub(where: str, name: str | None, entry: dict[str, Any]) -> Item:
    text = {k: entry.get(k) or "" for k in ("repo", "revision", "subfolder", "base_model", "license")}
    files = entry.get("files") or []
    usable = all(isinstance(v, str) for v in text.values()) and isinstance(files, list)
    hub = HubId(text["repo"], text["revision"], text["subfolder"]) if usable else None
    if hub is None or parse_hub_id(str(hub)) != hub:
        raise UsageError(f"{where}: not an adapter of the Hub", found=entry, expected="repo, revision, files as text")
    gated, private = (None if entry.get(k) is None else bool(entry[k]) for k in ("gated", "private"))
    files = [f for f in files if isinstance(f, str) and not any(map(name_fault, f.split("/")))]  # others are not read
    return name, str(hub), Listing(tuple(files), text["base_model"] or None, gated, private, text["license"] or None)
