"""What a checkpoint keeps, in float64 and independently of lorashare_stream: for scripts/bench.py.

It knows the collections of scripts/synthetic.py: one rank, dtype and set of keys, one scale alpha / r. The groups are
taken one after the other, all columns of a group in float64.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg

Header = dict[str, tuple[str, list[int], int]]  # key -> dtype, shape, offset in the file
Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> A (r, d_in), B (d_out, r)
OBJECTIVES = ("factors", "delta")
SPECTRUM = 256  # leading eigenvalues of a group that are kept: the largest k
SAMPLE = 20  # adapters whose errors are measured
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def header_of(path: Path) -> Header:
    with path.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        entries = json.loads(f.read(size))
    entries.pop("__metadata__", None)
    return {key: (e["dtype"], e["shape"], 8 + size + e["data_offsets"][0]) for key, e in entries.items()}


def read(path: Path, entry: tuple[str, list[int], int]) -> np.ndarray:
    """A tensor in float32, or float64 where it is."""
    dtype, shape, offset = entry
    stored = np.dtype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
    with path.open("rb") as f:
        raw = os.pread(f.fileno(), stored.itemsize * int(np.prod(shape)), offset)
    values = np.frombuffer(raw, stored).reshape(shape)
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if dtype == "F64" else values.astype(np.float32)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {key: read(path, entry) for key, entry in header_of(path).items()}


@dataclass
class Data:
    """The first `count` adapters of a collection."""

    name: str
    folder: Path
    count: int

    @cached_property
    def folders(self) -> list[Path]:
        return sorted(p.parent for p in self.folder.glob("*/adapter_config.json"))[: self.count]

    @cached_property
    def header(self) -> Header:
        return header_of(self.folders[0] / WEIGHTS)

    @cached_property
    def modules(self) -> list[str]:
        return sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in self.header})

    @cached_property
    def scale(self) -> float:
        config = json.loads((self.folders[0] / "adapter_config.json").read_text())
        return float(config["lora_alpha"] / config["r"])

    @property
    def bytes(self) -> int:
        return sum((f / WEIGHTS).stat().st_size for f in self.folders)

    def dims(self) -> Iterator[tuple[str, str, int, int]]:
        """Module, side, d and rank of every group."""
        for module in self.modules:
            for side in "AB":
                shape = self.header[self._key(module, side)][1]
                yield module, side, max(shape), min(shape)

    def rows(self, module: str, side: str) -> np.ndarray:
        """The oriented vectors of a group by adapter: (N, r, d) float64."""
        key = self._key(module, side)
        stacked = np.stack([read(f / WEIGHTS, self.header[key]) for f in self.folders])
        return (stacked if side == "A" else stacked.swapaxes(1, 2)).astype(np.float64)

    def _key(self, module: str, side: str) -> str:
        return f"{PREFIX}{module}.lora_{side}.weight"

    @cached_property
    def grams(self) -> dict[tuple[str, str], np.ndarray]:
        """A A' and B'B of every adapter: (N, r, r)."""
        found = {}
        for module in self.modules:
            for side in "AB":
                x = self.rows(module, side)
                found[module, side] = x @ x.swapaxes(1, 2)
        return found

    @cached_property
    def energies(self) -> np.ndarray:
        """||dW||^2 of every adapter over all modules."""
        scalings = (np.sum(self.grams[m, "A"] * self.grams[m, "B"], axis=(1, 2)) for m in self.modules)
        return self.scale**2 * np.asarray(sum(scalings))

    def columns(self, module: str, side: str, objective: str) -> np.ndarray:
        """X' (n, d): what the basis of a group is fitted to, by the definition of the objective."""
        rows = self.rows(module, side)
        if objective == "delta":
            values, q = np.linalg.eigh(self.grams[module, "B" if side == "A" else "A"])
            root = (q * np.sqrt(values.clip(0.0))[:, None, :]) @ q.swapaxes(1, 2)
            rows = (self.scale / np.sqrt(self.energies))[:, None, None] * (root @ rows)
        return rows.reshape(-1, rows.shape[2])


def optimum(data: Data, objective: str, k: int, cache: Path) -> float:
    """The largest energy that k components a group can capture; the spectra are kept in `cache`."""
    maker = hashlib.sha256((Path(__file__).parent / "synthetic.py").read_bytes()).hexdigest()[:8]
    kept = cache / f"{data.name}-{data.count}-{objective}-{maker}.npz"
    if not kept.exists():
        spectra = np.zeros((2 * len(data.modules), SPECTRUM))
        for row, (module, side, d, _) in zip(spectra, data.dims(), strict=True):
            x = data.columns(module, side, objective)
            gram = x.T @ x if len(x) > d else x @ x.T
            most = min(len(gram), SPECTRUM)
            row[:most] = scipy.linalg.eigvalsh(
                gram, overwrite_a=True, subset_by_index=[len(gram) - most, len(gram) - 1]
            )[::-1]
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial.npz")
        np.savez(partial, spectra=spectra)
        partial.rename(kept)
    return float(np.load(kept)["spectra"].clip(0.0)[:, :k].sum())


def captured(data: Data, checkpoint: Path, objective: str) -> float:
    """Energy of X less that of X - V V'X over all groups: 2 tr C - tr(V'V C), C = V'X X'V, for stored components V.

    For orthonormal V it is ||V'X||^2; components in bfloat16 are not quite orthonormal.
    """
    path, total = checkpoint / "shared_components.safetensors", 0.0
    header = header_of(path)
    for module, side, _, _ in data.dims():
        v = read(path, header[f"{module}:{side}"]).astype(np.float64)
        y = data.columns(module, side, objective) @ v
        total += 2 * float(np.sum(y * y)) - float(np.sum((y @ (v.T @ v)) * y))
    return total


def restored(checkpoint: Path, adapter: str) -> Factors:
    """What a checkpoint gives back for an adapter: SHARE's or vlora's from its files, a coded one's as decoded."""
    if (checkpoint / "subspace_meta.json").exists():
        return _restored_vlora(checkpoint, adapter)
    if (checkpoint / "index.json.zz").exists():
        return _decoded(checkpoint, adapter)
    path = checkpoint / "shared_components.safetensors"
    header, found = header_of(path), {}
    loadings = tensors(checkpoint / "adapters" / adapter / "loadings.safetensors")
    for module in {group.rsplit(":", 1)[0] for group in loadings}:
        a, b = (
            read(path, header[f"{module}:{side}"]).astype(np.float64) @ loadings[f"{module}:{side}"] for side in "AB"
        )
        found[module] = (a.T, b)
    return found


def _decoded(checkpoint: Path, adapter: str) -> Factors:
    """By the library: tests/test_coded_format.py has a decoder that shares no code with it."""
    from lorashare_stream import SHAREModel

    back = SHAREModel.from_pretrained(checkpoint).reconstruct(adapter)
    sides: dict[str, list[np.ndarray]] = {}
    for key in sorted(key for key in back if ".lora_" in key):  # A before B
        module = key.removeprefix("base_model.model.").split(".lora_")[0]
        sides.setdefault(module, []).append(back[key].double().numpy())
    return {module: (a, b) for module, (a, b) in sides.items()}


def _restored_vlora(checkpoint: Path, adapter: str) -> Factors:
    meta = json.loads((checkpoint / "subspace_meta.json").read_text())
    path = checkpoint / "subspace.safetensors"
    header, found = header_of(path), {}
    loadings = tensors(checkpoint / f"task_{meta['task_filenames'][adapter]}.safetensors")
    for module in meta["layer_names"]:
        sides = []
        for side in "ab":
            flat = loadings[f"{module}.loadings_{side}"].astype(np.float64) @ read(
                path, header[f"{module}.components_{side}"]
            )
            flat += read(path, header[f"{module}.mean_{side}"])
            sides.append(flat.reshape(meta[f"shapes_{side}"][module]))
        found[module] = (sides[0], sides[1])
    return found


def errors(data: Data, checkpoint: Path) -> dict[str, Any]:
    """Over a sample: mean of ||dW - dW^|| / ||dW||, and the share of the energy of A and B that is kept."""
    relative, lost, whole = [], 0.0, 0.0
    for i in np.unique(np.linspace(0, data.count - 1, SAMPLE).round().astype(int)):
        folder = data.folders[i]
        original, back = tensors(folder / WEIGHTS), restored(checkpoint, folder.name)
        off, norm = 0.0, 0.0
        for module in data.modules:
            a, b = (original[data._key(module, side)].astype(np.float64) for side in "AB")
            a_hat, b_hat = back[module]
            r_a, r_b = a - a_hat, b - b_hat
            # dW - dW^ = s [R_B B^] [A; R_A]: two thin factors, of which Gram matrices are enough
            left, right = np.concatenate([r_b, b_hat], axis=1), np.concatenate([a, r_a])
            off += float(np.sum((left.T @ left) * (right @ right.T)))
            norm += float(np.sum((b.T @ b) * (a @ a.T)))
            lost += float(np.sum(r_a**2) + np.sum(r_b**2))
            whole += float(np.sum(a**2) + np.sum(b**2))
        relative.append(np.sqrt(max(off, 0.0) / norm))
    return {"dw_error": float(np.mean(relative)), "kept": 1 - lost / whole}
