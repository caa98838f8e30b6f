"""The arithmetic of scripts/evidence.py, in float64 and independently of lorashare_stream: errors, bytes, rivals.

An adapter is its modules, each with A (r, d_in), B (d_out, r) and PEFT's scale s: dW = s B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_oracle import header_of
from numpy.typing import NDArray

Array = NDArray[Any]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Module:
    """LoRA of one module."""

    a: Array
    b: Array
    scale: float

    @property
    def norm(self) -> float:
        """||dW||."""
        return product_norm(self.scale * self.b.astype(np.float64), self.a.astype(np.float64))


Adapter = dict[str, Module]


def tensors_of(folder: Path) -> dict[str, Array]:
    """All tensors of a PEFT folder, as float32."""
    import torch
    from safetensors.torch import load_file

    if (folder / WEIGHTS).exists():
        found = load_file(folder / WEIGHTS)
    else:
        found = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    return {key: t.float().numpy() for key, t in found.items()}


def read_adapter(folder: Path) -> Adapter:
    """A PEFT folder, as PEFT understands it."""
    config = json.loads((folder / CONFIG).read_text())
    sides: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors_of(folder).items():
        if found := KEY.match(key):
            sides.setdefault(found["module"], {})[found["side"]] = tensor
    return {m: Module(pair["A"], pair["B"], scale_of(config, m)) for m, pair in sorted(sides.items())}


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """PEFT's scale: of the patterns of rank and alpha, the first whose end matches the module's name counts."""

    def chosen(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    rank = chosen(config.get("rank_pattern"), config["r"])
    alpha = chosen(config.get("alpha_pattern"), config["lora_alpha"])
    return float(alpha / (np.sqrt(rank) if config.get("use_rslora") else rank))


def product_norm(left: Array, right: Array) -> float:
    """||left right||_F of thin factors, by QR: no square of it is ever a difference."""
    if left.shape[1] == 0:
        return 0.0
    return float(np.linalg.norm(np.linalg.qr(left, mode="r") @ np.linalg.qr(right.T, mode="r").T))


def dw_error(original: Adapter, found: Adapter) -> float:
    """||dW - dW^||_F / ||dW||_F over all modules together; NaN where dW = 0. A module that is missing is 0."""
    off, norm = [], []
    for name, m in original.items():
        lefts, rights = [m.scale * m.b.astype(np.float64)], [m.a.astype(np.float64)]
        if name in found:
            other = found[name]
            lefts.append(-other.scale * other.b.astype(np.float64))
            rights.append(other.a.astype(np.float64))
        off.append(product_norm(np.hstack(lefts), np.vstack(rights)))
        norm.append(m.norm)
    off += [m.norm for name, m in found.items() if name not in original]
    whole = float(np.linalg.norm(norm))
    return float(np.linalg.norm(off)) / whole if whole > 0 else float("nan")


def statistics(errors: Mapping[str, float]) -> dict[str, float]:
    """Over the adapters that have any dW."""
    values = np.array([e for e in errors.values() if not np.isnan(e)])
    return {
        "mean": float(values.mean()), "median": float(np.median(values)), "p95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
    }  # fmt: skip


# Per-adapter truncated SVD


def singular(m: Module) -> tuple[Array, Array, Array]:
    """U, S, V' of dW, thin."""
    q_b, r_b = np.linalg.qr(m.scale * m.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(m.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, s, vt @ q_a.T


def truncated(
    adapters: Mapping[str, Adapter], budget: int, width: int = 4, scales: int = 0
) -> tuple[dict[str, Adapter], int]:
    """Every adapter on its own as triples of its SVDs, all adapters within a budget of bytes.

    Triples are taken in order of what they add to the kept share of ||dW_i||^2 for each byte that they cost, from
    wherever they are: no other choice of ranks has a smaller mean squared error at these bytes (but for the last).

    Args:
        adapters: the originals.
        budget: bytes.
        width: bytes of a number.
        scales: bytes that a triple costs besides.
    """
    parts = {(i, m): singular(module) for i, adapter in adapters.items() for m, module in adapter.items()}
    norms = {i: sum(float(np.sum(parts[i, m][1] ** 2)) for m in adapter) for i, adapter in adapters.items()}
    costs = {part: width * (len(u) + vt.shape[1]) + scales for part, (u, _, vt) in parts.items()}
    items = [
        (sigma**2 / norms[i] / costs[i, m], costs[i, m], i, m)
        for (i, m), (_, s, _) in parts.items()
        if norms[i] > 0
        for sigma in s
        if sigma > 0
    ]
    ranks = dict.fromkeys(parts, 0)
    spent = 0
    for _, cost, i, m in sorted(items, key=lambda item: -item[0]):
        if spent + cost <= budget:
            ranks[i, m] += 1
            spent += cost
    found: dict[str, Adapter] = {i: {} for i in adapters}
    for (i, m), (u, s, vt) in parts.items():
        t = ranks[i, m]
        if t:
            root = np.sqrt(s[:t])
            found[i][m] = Module((root[:, None] * vt[:t]).astype(np.float32), (u[:, :t] * root).astype(np.float32), 1.0)
    return found, spent


# Rounding


def integers(x: Array, bits: int) -> tuple[Array, int]:
    """Symmetric integers of so many bits with a float32 scale for each column, and their bytes; what they stand for."""
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(x).max(axis=0, initial=0.0) / most).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.clip(np.rint(x / safe), -most, most).astype(np.int8)
    return codes.astype(np.float32) * safe, -(-codes.size * bits // 8) + scale.nbytes


def int8(x: Array) -> tuple[Array, int]:
    """Of 8 bits."""
    return integers(x, 8)


def bfloat16(x: Array) -> tuple[Array, int]:
    """Rounded to bfloat16, and its bytes."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32), 2 * x.size


def rounded(adapters: Mapping[str, Adapter], rounding: Any) -> tuple[dict[str, Adapter], int]:
    """The vectors of A and of B, rounded; columns are the r vectors."""
    found: dict[str, Adapter] = {}
    size = 0
    for i, adapter in adapters.items():
        found[i] = {}
        for name, m in adapter.items():
            (a, bytes_a), (b, bytes_b) = rounding(m.a.T), rounding(m.b)
            found[i][name] = Module(a.T, b, m.scale)
            size += bytes_a + bytes_b
    return found, size


# Bytes


@dataclass
class Bytes:
    """What files hold.

    Attributes:
        lora: numbers from which LoRA is rebuilt: A and B, or bases, means and loadings.
        verbatim: LoRA that a checkpoint keeps exact.
        extras: heads and other tensors.
        other: headers, configurations, statistics.
    """

    lora: int = 0
    verbatim: int = 0
    extras: int = 0
    other: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def bytes_of(folder: Path) -> Bytes:
    """Of a checkpoint of SHARE or vlora, of a coded one, or of one PEFT adapter."""
    total = Bytes()
    peft = (folder / CONFIG).exists()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        for key, nbytes in _sizes(path).items():
            size -= nbytes
            if ".lora_" in key:
                total.lora += nbytes if peft else 0
                total.verbatim += 0 if peft else nbytes
            elif path.name == "eigenvalues.safetensors" or key.endswith((".sv_a", ".sv_b")):
                total.other += nbytes
            elif peft or path.name == "classifier_head.safetensors" or key == ":verbatim":  # the last in packs
                total.extras += nbytes
            else:
                total.lora += nbytes
        total.other += size
    return total


def _sizes(path: Path) -> dict[str, int]:
    if path.suffix == ".safetensors":
        width = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I64": 8}
        return {k: width[dtype] * int(np.prod(shape)) for k, (dtype, shape, _) in header_of(path).items()}
    if path.name == "adapter_model.bin":
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        return {key: t.numel() * t.element_size() for key, t in found.items()}
    return {}
