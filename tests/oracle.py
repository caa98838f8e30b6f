"""Transcriptions in float64, written for clarity, against which the streaming code is held."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def groups(adapters: Iterable[Tensors]) -> list[tuple[str, str]]:
    keys = {k for tensors in adapters for k in tensors if ".lora_" in k}
    return sorted(
        {(k.removeprefix("base_model.model.").rsplit(".lora_", 1)[0], k.rsplit(".lora_", 1)[1][0]) for k in keys}
    )


def vectors(tensors: Tensors, module: str, side: str) -> np.ndarray:
    """The tensor oriented by side: (d, r), float64."""
    w = tensors[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64)
    return w.T if side == "A" else w


def delta(tensors: Tensors, module: str, scale: float) -> np.ndarray:
    return scale * vectors(tensors, module, "B") @ vectors(tensors, module, "A").T


Scale = float | Callable[[str], float]  # of all modules of an adapter, or by module


def stacked(adapters: list[Tensors], scales: Sequence[Scale], module: str, side: str, objective: str) -> np.ndarray:
    """The columns X (d, n) whose second moment a group's basis is fitted to, by the definition of the objective."""
    columns = []
    for tensors, given in zip(adapters, scales, strict=True):
        scale: Callable[[str], float] = given if callable(given) else lambda _, s=given: s
        if f"base_model.model.{module}.lora_A.weight" not in tensors:
            continue
        w = vectors(tensors, module, side)
        if objective == "delta":
            modules = {m for m, _ in groups([tensors])}
            energy = sum(np.sum(delta(tensors, m, scale(m)) ** 2) for m in modules)
            partner = vectors(tensors, module, "B" if side == "A" else "A")
            values, q = np.linalg.eigh(partner.T @ partner)
            w = w @ (q * np.sqrt(values.clip(0))) @ q.T * scale(module) / np.sqrt(energy)
        columns.append(w)
    return np.concatenate(columns, axis=1)


def published(
    adapters: dict[str, Tensors], k: int
) -> tuple[dict[str, np.ndarray], dict[str, Tensors], dict[str, Tensors]]:
    """The published method: centred covariance, top-k eigenvectors, loadings V'W of the uncentred W.

    Returns:
        components by group id; loadings and reconstructed tensors by adapter.
    """
    components: dict[str, np.ndarray] = {}
    loadings: dict[str, Tensors] = {name: {} for name in adapters}
    restored: dict[str, Tensors] = {name: {} for name in adapters}
    for module, side in groups(adapters.values()):
        x = np.concatenate([vectors(t, module, side) for t in adapters.values()], axis=1)
        about = x - x.mean(axis=1, keepdims=True)
        _, q = np.linalg.eigh(about @ about.T)
        v = q[:, ::-1][:, :k]
        components[f"{module}:{side}"] = v
        for name, tensors in adapters.items():
            w = vectors(tensors, module, side)
            loadings[name][f"{module}:{side}"] = v.T @ w
            hat = v @ v.T @ w
            restored[name][f"base_model.model.{module}.lora_{side}.weight"] = hat.T if side == "A" else hat
    return components, loadings, restored


def largest_angle(a: np.ndarray, b: np.ndarray) -> float:
    """Sine of the largest principal angle between the spans of two orthonormal bases."""
    return float(np.linalg.norm(a - b @ (b.T @ a), 2))


def share_config(checkpoint: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((checkpoint / "share_config.json").read_text())
    return result
