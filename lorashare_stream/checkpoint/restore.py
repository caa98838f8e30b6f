"""Adapters, restored from a checkpoint, and written as PEFT adapter folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.dtypes import TORCH_DTYPES
from ..adapters.folder import CONFIG, PICKLE, SAFETENSORS
from ..adapters.pickles import raw_bytes
from ..adapters.safetensors import write_safetensors
from ..errors import UsageError
from ..files import atomic_file, write_json
from ..text import digest_of
from .format import CONFIG as SHARE_CONFIG
from .format import MARK
from .reader import Tensors, was_reconstructed


def refuse_originals(folder: Path) -> None:
    """Demand that a reconstruction overwrites nothing but a reconstruction."""
    if (folder / SHARE_CONFIG).exists():
        raise UsageError("the folder is a checkpoint", found=folder, remedy="Choose another one.")
    for path in (folder / SAFETENSORS, folder / PICKLE):
        if os.path.lexists(path) and not was_reconstructed(path):
            raise UsageError(
                "the folder holds an adapter that was not reconstructed, an original perhaps",
                found=path,
                remedy="Choose another folder, or remove it.",
            )


def save_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any], source_id: str | None) -> None:
    """Write a PEFT adapter folder, marked as the reconstruction of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [
        (key, TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]
    metadata = {"format": "pt", MARK: "yes" if source_id is None else digest_of(source_id)}
    with atomic_file(folder / SAFETENSORS) as f:
        write_safetensors(f, shapes, (raw_bytes(t).data for t in tensors.values()), metadata)
    write_json(folder / CONFIG, config)
