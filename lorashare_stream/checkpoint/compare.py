"""How far reconstructed tensors are from their originals, as lorashare measures it and in dW."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..adapters.config import other_scaling, scalings
from ..adapters.dtypes import FLOATS
from ..adapters.folder import open_tensors, tensor_records, weight_files
from ..adapters.keys import SIDES, adapter_names, factor_key, parse_key
from ..adapters.layout import STACK_BYTES
from ..adapters.safetensors import float32
from ..adapters.scaling import Scaling
from ..codec.factors import errors_of_products
from ..errors import MissingSourceError, UndecidedError, UsageError
from ..linalg.delta import DeltaError, delta_errors, relative_error
from .reader import Tensors, as_array


def comparison(
    original: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    adapter: str,
    *,
    coded: bool = False,
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
        if coded:
            continue
        wide = tensor.double()
        norm = float(torch.norm(wide))
        per_layer[key] = float(torch.norm(wide - other.double())) / norm if norm > 1e-12 else 0.0
    deltas = module_errors(original, found, config, coded=coded)
    if coded:
        per_layer = {module: d.relative for module, d in deltas.items()}
    errors = list(per_layer.values()) or [0.0]
    return {
        "per_layer": per_layer,
        "mean": sum(errors) / len(errors),
        "max": max(errors),
        "delta_per_module": {module: d.relative for module, d in deltas.items()},
        "delta_relative": relative_error(sum(d.error for d in deltas.values()), sum(d.norm for d in deltas.values())),
        "delta_worst_module": max(deltas, key=lambda m: deltas[m].relative, default=None),
    }


def module_errors(
    original: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    coded: bool = False,
) -> dict[str, DeltaError]:
    """Error of dW by module, for all modules of which both sides are 2-D in both; keys may be raw.

    Empty where dW is not s B A of the tensors, which are then kept as they are.
    """
    if other_scaling(config) is not None:
        return {}
    parsed = {(k.module, k.side): tensor for key, tensor in original.items() if (k := parse_key(key)).module}
    arrays: dict[str, list[NDArray[np.floating[Any]]]] = {}
    for module in sorted({m for m, _ in parsed if m is not None}):
        pairs = [(parsed.get((module, side)), found.get(factor_key(module, side))) for side in SIDES]
        matrices = [as_array(t) for pair in pairs for t in pair if t is not None and t.ndim == 2]
        if len(matrices) == 4:
            arrays[module] = matrices
    ranks = {module: len(a_hat) for module, (_, a_hat, *_) in arrays.items()}
    each: Sequence[Scaling] = [Scaling(1.0)] * len(arrays)  # a common factor changes no relative error
    if "r" in config and "lora_alpha" in config:
        with suppress(UndecidedError):
            each = scalings(config, ranks)
    scaling_of, alike = dict(zip(arrays, each, strict=True)), dict[object, list[str]]()
    for module, matrices in arrays.items():
        alike.setdefault((*(m.shape for m in matrices), scaling_of[module].experts), []).append(module)
    measure, measured = errors_of_products if coded else delta_errors, dict[str, DeltaError]()
    for names in (part for some in alike.values() for part in _parts(some, sum(m.nbytes for m in arrays[some[0]]))):
        a, a_hat, b, b_hat = (np.stack(matrices) for matrices in zip(*(arrays[m] for m in names), strict=True))
        measured |= zip(names, measure(a, b, a_hat, b_hat, [scaling_of[m] for m in names]), strict=True)
    return {module: measured[module] for module in arrays}


def _parts(names: Sequence[str], nbytes: int) -> Iterator[Sequence[str]]:
    """Modules of `nbytes` bytes each, as many at a time as are measured together."""
    count = max(1, 2 * STACK_BYTES // max(1, nbytes))
    return (names[i : i + count] for i in range(0, len(names), count))


def load_adapter(folder: Path) -> Tensors:
    """The float tensors of an adapter folder, as float32, by canonical key.

    Raises:
        MissingSourceError: if there is no such folder.
    """
    if not folder.is_dir():
        raise MissingSourceError("no such adapter folder", found=folder)
    paths = weight_files(folder)
    records = tensor_records(paths)
    named = adapter_names(r.name for r in records)
    with open_tensors(paths) as tensors:
        return {
            parse_key(r.name, named[0] if named else None).canonical: torch.from_numpy(float32(tensors, r))
            for r in records
            if r.dtype in FLOATS
        }
