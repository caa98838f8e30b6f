"""The SHARE checkpoint, read: configuration and components at open, an adapter when it is asked for.

Checkpoints that lorashare wrote are read as well. In one of ours, components and every adapter carry the
digest of the basis that they belong to, so that two bases are never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .files import read_json
from .names import is_component, listed, shown
from .shareconfig import read_share_config
from .shareformat import ADAPTERS, COMPONENTS, LOADINGS, META, OURS, VERBATIM

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
MARK = "reconstructed"  # in the metadata of an adapter that was reconstructed, which may be overwritten


class PerAdapter(Mapping[str, T]):
    """A mapping from adapter names to what is read of an adapter when it is asked for; nothing is kept."""

    def __init__(self, names: Mapping[str, None], load: Callable[[str], T]) -> None:
        self._names, self._load = names, load

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Components(Mapping[str, torch.Tensor]):
    """Group id -> V (d, k), memory-mapped from one open file: a replaced checkpoint does not change it."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._keys = dict.fromkeys(self._file.keys())
        self.digest: str | None = (self._file.metadata() or {}).get("basis_digest")

    def __getitem__(self, group: str) -> torch.Tensor:
        if group not in self._keys:
            raise KeyError(group)
        tensor: torch.Tensor = self._file.get_tensor(group)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class CheckpointReader:
    """An open checkpoint.

    Args:
        root: its folder.

    Raises:
        CheckpointError: if it is not a whole SHARE checkpoint.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = read_share_config(root)
        self.names = self._adapter_names()
        self.components = Components(root / COMPONENTS)
        self._check_digest(self.components.digest, COMPONENTS)

    def _adapter_names(self) -> dict[str, None]:
        try:
            with os.scandir(self.root / ADAPTERS) as entries:
                folders = {e.name for e in entries if e.is_dir() and not e.name.startswith(".")}
        except FileNotFoundError:
            folders = set()
        names = self.config.adapter_names or sorted(folders)
        unsafe = [name for name in names if not is_component(name)]
        if unsafe:
            raise CheckpointError(
                "adapter names that are no path components",
                found=listed(unsafe),
                remedy="Do not trust this checkpoint.",
            )
        missing = [name for name in names if name not in folders]
        if missing:
            raise CheckpointError("adapters are missing", found=listed(missing), remedy="Fetch the checkpoint again.")
        return dict.fromkeys(names)

    def _check_digest(self, found: str | None, file: str) -> None:
        expected = self.config.ours.get("basis_digest")
        if None not in (expected, found) and found != expected:  # lorashare, saving ours again, drops the digests
            raise CheckpointError(
                f"{shown(file)} belongs to another basis: the checkpoint was replaced, open it again",
                found=found,
                expected=expected,
            )

    def meta(self, name: str) -> dict[str, Any]:
        """adapter_meta.json of one adapter."""
        path = self.root / ADAPTERS / name / META
        try:
            meta = read_json(path)
        except FileNotFoundError:
            return {}
        except ValueError as e:
            raise CheckpointError(f"{META} cannot be read", adapter=name, found=str(e)) from e
        if not isinstance(meta, dict) or not isinstance(meta.get(OURS, {}), dict):
            raise CheckpointError(f"{META} is not what it should be", adapter=name, found=meta, expected="an object")
        self._check_digest(meta.get(OURS, {}).get("basis_digest"), f"adapters/{name}")
        return meta

    def loadings(self, name: str) -> Tensors:
        """Group id -> loadings (k, r) of one adapter."""
        loadings = _load(self.root / ADAPTERS / name / LOADINGS)
        self.meta(name)  # after: what was read before it is of the basis that it names, or of one before that
        return loadings

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        path = self.root / ADAPTERS / name / VERBATIM
        tensors = _load(path) if path.exists() else {}
        self.meta(name)
        return tensors

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter_config.json that one adapter came with."""
        config = self.meta(name).get("original_config", {})
        if not isinstance(config, dict):
            raise CheckpointError(f"{META} has no usable original_config", adapter=name, found=type(config).__name__)
        return config

    @cached_property
    def sources(self) -> PerAdapter[str]:
        """Where each adapter came from, as it was recorded: shown, never followed."""
        return PerAdapter(self.names, lambda name: str(self.meta(name).get("original_adapter_path", "")))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{shown(path.name)} is missing", found=shown(path.parent)) from None
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{shown(path.name)} cannot be read", found=str(e)) from e


def was_reconstructed(path: Path) -> bool:
    """Whether a weight file is a reconstruction, and no original."""
    try:
        return path.suffix == ".safetensors" and MARK in (_open(path).metadata() or {})
    except CheckpointError:
        return False


def _load(path: Path) -> Tensors:
    with _open(path) as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - safe_open is no mapping
