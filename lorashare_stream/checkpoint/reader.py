"""The SHARE checkpoint, read: configuration and components at open, an adapter when it is asked for.

It lies in a folder or on the Hub. Checkpoints that lorashare wrote are read as well. In one of ours, components and
every adapter carry the digest of the basis that they belong to, so that two bases are never mixed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..adapters.keys import factor_key, split_group_id
from ..errors import CheckpointError
from ..schema import read_checked
from ..text import has_surrogates, is_component, listed, printable
from .config import read_share_config
from .format import ADAPTERS, COMPONENTS, CONFIG, LOADINGS, MARK, META, SKIPPED, SPECTRUM, VERBATIM
from .location import Folder, Place
from .records import REPAIR, Meta

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


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
        place: where it lies.

    Raises:
        CheckpointError: if it is not a whole SHARE checkpoint.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.config = read_share_config(place.root)
        self.names = self._adapter_names()
        self.components = Components(self._file(COMPONENTS))
        self._check_digest(self.components.digest, COMPONENTS)

    def _adapter_names(self) -> dict[str, None]:
        there = self.place.adapters()
        names = self.config.adapter_names or sorted(there or ())
        unsafe = [name for name in names if not _is_folder_name(name)]
        if unsafe:
            raise CheckpointError(
                "adapter names that are no path components",
                found=listed(unsafe),
                remedy="Do not trust this checkpoint.",
            )
        missing = [name for name in names if there is not None and name not in there]
        if missing:
            raise CheckpointError("adapters are missing", found=listed(missing), remedy="Fetch the checkpoint again.")
        if not names and there is None:
            raise CheckpointError(f"{CONFIG} names no adapters", found=self.place)
        return dict.fromkeys(names)

    def _file(self, relative: str) -> Path:
        """A file that must be there."""
        path = self._optional(relative)
        if path is None:
            raise CheckpointError(f"{printable(relative)} is missing", found=self.place)
        return path

    def _optional(self, relative: str) -> Path | None:
        try:
            return self.place.file(relative)
        except CheckpointError:  # a FileNotFoundError too, where nobody knows whether there is such a file
            raise
        except FileNotFoundError:
            return None

    def _check_digest(self, found: str | None, file: str) -> None:
        expected = self.config.record.basis_digest if self.config.record else None
        if None not in (expected, found) and found != expected:  # lorashare, saving ours again, drops the digests
            raise CheckpointError(
                f"{printable(file)} belongs to another basis: {self.place.mixed}",
                found=found,
                expected=expected,
            )

    def meta(self, name: str) -> Meta:
        """adapter_meta.json of one adapter; it may be lorashare's, which does without."""
        relative = f"{ADAPTERS}/{name}/{META}"
        path = self._file(relative) if self.config.record else self._optional(relative)
        if path is None:
            return Meta()
        meta = read_checked(path, Meta, REPAIR, name)
        self._check_digest(meta.ours.basis_digest if meta.ours else None, f"adapters/{name}")
        return meta

    def tensors(self, name: str) -> Tensors:
        """PEFT key -> tensor of one adapter: V L for what is shared, in the dtype of V, and what is kept verbatim."""
        found: Tensors = {}
        for group, loading in self.loadings(name).items():
            found |= restored(name, group, self.components, loading)
        return found | self.verbatim(name)

    def loadings(self, name: str) -> Tensors:
        """Group id -> loadings (k, r) of one adapter."""
        loadings = _load(self._file(f"{ADAPTERS}/{name}/{LOADINGS}"))
        self.meta(name)  # after: what was read before it is of the basis that it names, or of one before that
        return loadings

    def verbatim(self, name: str) -> Tensors:
        """PEFT key -> tensor, of what is kept verbatim of one adapter."""
        path = self._verbatim_file(name)
        tensors = {} if path is None else _load(path)
        self.meta(name)
        return tensors

    def _verbatim_file(self, name: str) -> Path | None:
        ours, relative = self.meta(name).ours, f"{ADAPTERS}/{name}/{VERBATIM}"
        if ours is None:
            return self._optional(relative)  # lorashare does not say
        return self._file(relative) if ours.verbatim else None  # not asked for: it would be a request

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder with the whole checkpoint: its own, or one with links to the files of one on the Hub.

        The cache's folder would not do: it holds what anybody has fetched of the repository, and not surely all.
        """
        if isinstance(self.place, Folder):
            yield self.place.root
            return
        self.place.fetch()
        with tempfile.TemporaryDirectory(prefix="lorashare-stream-") as private:
            folder = os.path.join(private, "checkpoint")  # with the modes of any other folder, since it is copied
            for relative, path in self._files().items():
                os.makedirs(os.path.dirname(os.path.join(folder, relative)), exist_ok=True)
                os.symlink(path, os.path.join(folder, relative))
            yield Path(folder)

    def _files(self) -> dict[str, Path]:
        """All files of the checkpoint: relative path -> where it is."""
        found: dict[str, Path | None] = {}
        for name in self.names:
            inner = f"{ADAPTERS}/{name}"
            found[f"{inner}/{VERBATIM}"] = self._verbatim_file(name)
            found |= {
                f"{inner}/{LOADINGS}": self._file(f"{inner}/{LOADINGS}"),
                f"{inner}/{META}": self._optional(f"{inner}/{META}"),
            }
        found |= {COMPONENTS: self._file(COMPONENTS), CONFIG: self._file(CONFIG)}
        found |= {relative: self._optional(relative) for relative in (SPECTRUM, SKIPPED)}
        return {relative: path for relative, path in found.items() if path is not None}

    def damaged(self) -> list[CheckpointError]:
        """Files that many adapters share and that are not what was written, by their digests; a coded one has such."""
        return []

    def adapter_config(self, name: str) -> dict[str, Any]:
        """The adapter_config.json that one adapter came with."""
        return self.meta(name).original_config

    @cached_property
    def sources(self) -> PerAdapter[str]:
        """Where each adapter came from, as it was recorded: shown, never followed."""
        return PerAdapter(self.names, lambda name: self.meta(name).original_adapter_path)


def _is_folder_name(name: object) -> bool:
    """Whether a foreign name can be that of a folder here."""
    try:
        return is_component(name) and len(os.fsencode(str(name))) <= 255
    except UnicodeEncodeError:
        return False


def _open(path: Path) -> Any:
    try:
        with path.open("rb") as f:  # safetensors takes no name that is not UTF-8
            return safe_open(f"/dev/fd/{f.fileno()}" if has_surrogates(str(path)) else path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{printable(path.name)} is missing", found=printable(path.parent)) from None
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{printable(path.name)} cannot be read", found=str(e)) from e


def restored(name: str, group: str, components: Mapping[str, torch.Tensor], loading: torch.Tensor) -> Tensors:
    """PEFT key -> V L of one group of an adapter, oriented as PEFT has it: lora_A (r, d_in), lora_B (d_out, r)."""
    try:
        module, side = split_group_id(group)
        v = components[group]
        if v.ndim != 2 or loading.ndim != 2 or v.shape[1] != loading.shape[0]:
            raise ValueError(f"components {list(v.shape)}, loadings {list(loading.shape)}")
    except (ValueError, KeyError) as e:
        raise CheckpointError("loadings that fit no components", adapter=name, key=group, found=str(e)) from e
    vectors = (v.float() @ loading.float()).to(v.dtype)  # (d, r)
    return {factor_key(module, side): (vectors.T if side == "A" else vectors).contiguous()}


def as_array(tensor: torch.Tensor) -> NDArray[np.floating[Any]]:
    """The values of a float tensor, of which none is rounded."""
    array: NDArray[np.floating[Any]] = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
    return array


def was_reconstructed(path: Path) -> bool:
    """Whether a weight file is a reconstruction, and no original."""
    try:
        return path.suffix == ".safetensors" and MARK in (_open(path).metadata() or {})
    except CheckpointError:
        return False


def _load(path: Path) -> Tensors:
    with _open(path) as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - safe_open is no mapping
