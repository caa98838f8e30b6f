"""Restored adapters: written as PEFT adapter folders, and compared with their originals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..adapters.config import other_scaling, scalings
from ..adapters.dtypes import FLOATS, TORCH_DTYPES
from ..adapters.folder import CONFIG, PICKLE, SAFETENSORS, open_tensors, tensor_records, weight_files
from ..adapters.keys import SIDES, adapter_names, factor_key, parse_key
from ..adapters.pickles import raw_bytes
from ..adapters.safetensors import float32, header_of, write_safetensors
from ..adapters.scaling import Scaling
from ..codec.factors import errors_of_products
from ..errors import AdapterError, MissingSourceError, UndecidedError, UsageError
from ..files import atomic_file, write_json
from ..linalg.delta import DeltaError, delta_errors, relative_error
from ..text import digest_of
from .format import CONFIG as SHARE_CONFIG
from .format import MARK
from .reader import Tensors


def was_reconstructed(path: Path) -> bool:
    """Whether a weight file is a reconstruction, and no original."""
    try:
        return path.suffix == ".safetensors" and MARK in header_of(path).metadata
    except (AdapterError, OSError):
        return False


def refuse_originals(folder: Path) -> None:
    """Demand that a reconstruction overwrites nothing but a reconstruction.

    Raises:
        UsageError: if the folder is a checkpoint, or holds another adapter.
    """
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
    shapes = [(key, TORCH_DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for key, t in tensors.items()]
    metadata = {"format": "pt", MARK: "yes" if source_id is None else digest_of(source_id)}
    with atomic_file(folder / SAFETENSORS) as f:
        write_safetensors(f, shapes, (raw_bytes(t).data for t in tensors.values()), metadata)
    write_json(folder / CONFIG, config)


def load_factors(folder: Path) -> Tensors:
    """The LoRA tensors of an adapter folder, as float32, by canonical key.

    Raises:
        MissingSourceError: if there is no such folder.
    """
    if not folder.is_dir():
        raise MissingSourceError("no such adapter folder", found=folder)
    paths = weight_files(folder)
    records = tensor_records(paths)
    named = adapter_names(r.name for r in records)
    keys = {r: parse_key(r.name, named[0] if named else None).canonical for r in records if r.dtype in FLOATS}
    with open_tensors(paths) as tensors:
        return {key: torch.from_numpy(float32(tensors, r)) for r, key in keys.items() if ".lora_" in key}


def comparison(
    original: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    adapter: str,
    *,
    coded: bool,
) -> dict[str, Any]:
    """The result of `SHAREModel.reconstruction_error`.

    Factors that are coded have another gauge than the original: differences of theirs mean nothing. `per_layer`, and so
    `mean` and `max`, then are relative errors of dW, by module.

    Args:
        original: the adapter's tensors, by raw or canonical key.
        found: the reconstructed ones, by canonical key.
        config: its adapter_config.json, for PEFT's scale of each module.
        adapter: its name, for errors.
        coded: whether `found` comes of a coded checkpoint.

    Raises:
        UsageError: if a tensor has another shape than its original.
    """
    per_layer: dict[str, float] = {}
    for key, tensor in original.items():
        other = found.get(parse_key(key).canonical)
        if other is None:
            continue
        if tensor.shape != other.shape:
            raise UsageError(
                "the original has another shape than the adapter of this name",
                adapter=adapter,
                key=key,
                found=list(tensor.shape),
                expected=list(other.shape),
            )
        wide = tensor.double()
        norm = float(torch.norm(wide))
        per_layer[key] = float(torch.norm(wide - other.double())) / norm if norm > 1e-12 else 0.0
    deltas = _delta_errors(original, found, config, coded=coded)
    relative = {module: d.relative for module, d in deltas.items()}
    per_layer = relative if coded else per_layer
    errors = list(per_layer.values()) or [0.0]
    return {
        "per_layer": per_layer,
        "mean": sum(errors) / len(errors),
        "max": max(errors),
        "delta_per_module": relative,
        "delta_relative": relative_error(sum(d.error for d in deltas.values()), sum(d.norm for d in deltas.values())),
        "delta_worst_module": max(relative, key=relative.__getitem__, default=None),
    }


def _delta_errors(
    original: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    coded: bool,
) -> dict[str, DeltaError]:
    """Error of dW by module, where both sides are 2-D in both; none where dW is not s B A of the tensors."""
    if other_scaling(config) is not None:
        return {}
    parsed = {(k.module, k.side): tensor for key, tensor in original.items() if (k := parse_key(key)).module}
    factors: dict[str, list[NDArray[np.floating[Any]]]] = {}
    for module in sorted({m for m, _ in parsed if m is not None}):
        pairs = [(parsed.get((module, side)), found.get(factor_key(module, side))) for side in SIDES]
        matrices = [as_array(t) for pair in pairs for t in pair if t is not None and t.ndim == 2]
        if len(matrices) == 4:
            factors[module] = matrices
    each: Sequence[Scaling] = [Scaling(1.0)] * len(factors)  # a common factor changes no relative error
    if "r" in config and "lora_alpha" in config:
        with suppress(UndecidedError):
            each = scalings(config, {module: len(a_hat) for module, (_, a_hat, *_) in factors.items()})
    measure, errors = errors_of_products if coded else delta_errors, dict[str, DeltaError]()
    for (module, matrices), scaling in zip(factors.items(), each, strict=True):
        a, a_hat, b, b_hat = (matrix[None] for matrix in matrices)
        [errors[module]] = measure(a, b, a_hat, b_hat, [scaling])
    return errors


def as_array(tensor: torch.Tensor) -> NDArray[np.floating[Any]]:
    """The values of a float tensor, of which none is rounded."""
    array: NDArray[np.floating[Any]] = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
    return array
