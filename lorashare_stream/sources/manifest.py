"""Manifest files: lists of adapters in `.txt`, `.jsonl` or `.yaml`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..names import listed, shown

SUFFIXES = (".txt", ".jsonl", ".yaml", ".yml")


def read_manifest(path: Path) -> list[tuple[str | None, str]]:
    """The (name or None, source) entries of a manifest; relative paths are relative to its folder.

    `.txt` has a source a line, `#` starts a comment line; `.jsonl` an object a line with `path` and
    perhaps `name`; `.yaml` a list of such objects or of plain sources.

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
                f"manifest {shown(path)} is not a list",
                found=type(entries).__name__,
                expected="a list of name and path",
            )
    return [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]


def _json_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"manifest {shown(path)}, line {number}: not JSON", found=str(e)) from e


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{shown(path)} is not UTF-8 text", found=str(e)) from e


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
        raise UsageError(f"{shown(path)} is not YAML of plain values", found=" ".join(str(e).split())) from e


def _entry(path: Path, number: int, entry: Any) -> tuple[str | None, str]:
    where = f"manifest {shown(path)}, entry {number}"
    if isinstance(entry, str):
        return None, entry
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UsageError(f"{where}: not a source", found=entry, expected="an object with path and perhaps name")
    unknown = sorted(shown(k) for k in entry if k not in ("name", "path"))
    if unknown:
        raise UsageError(f"{where}: unknown field", found=listed(unknown), expected="name, path")
    name = entry.get("name")
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{where}: name is not text", found=name)
    return name, entry["path"]
