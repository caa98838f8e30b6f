"""Adapters, restored from a checkpoint, and written as PEFT adapter folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..adapters.dtypes import TORCH_DTYPES
from ..adapters.folder import CONFIG, PICKLE, SAFETENSORS
from ..adapters.keys import factor_key, split_group_id
from ..adapters.pickles import raw_bytes
from ..adapters.safetensors import write_safetensors
from ..errors import CheckpointError, UsageError
from ..files import atomic_file, write_json
from .format import CONFIG as SHARE_CONFIG
from .reader import MARK, Tensors, was_reconstructed


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


def refuse_originals(folder: Path) -> None:
    """Demand that a reconstruction overwrites nothing but a reconstruction."""
    if (folder / SHARE_CONFIG).exists():
        raise UsageError("the folder is a SHARE checkpoint", found=folder, remedy="Choose another one.")
    for path in (folder / SAFETENSORS, folder / PICKLE):
        if os.path.lexists(path) and not was_reconstructed(path):
            raise UsageError(
                "the folder holds an adapter that was not reconstructed, an original perhaps",
                found=path,
                remedy="Choose another folder, or remove it.",
            )


def save_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> None:
    """Write a PEFT adapter folder, marked as a reconstruction."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [
        (key, TORCH_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]
    with atomic_file(folder / SAFETENSORS) as f:
        write_safetensors(f, shapes, (raw_bytes(t).data for t in tensors.values()), {"format": "pt", MARK: "yes"})
    write_json(folder / CONFIG, config)
