"""The arithmetic of scripts/evidence.py, in float64 and independently of lorashare_stream: errors, bytes, rivals.

An adapter is its modules, each with A (r, d_in), B (d_out, r) and PEFT's scale s: dW = s B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
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
    return module_pairs(tensors_of(folder), json.loads((folder / CONFIG).read_text()))


def module_pairs(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Adapter:
    """The modules of PEFT's tensors, NumPy's or torch's."""
    sides: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        if found := KEY.match(key):
            array = tensor if isinstance(tensor, np.ndarray) else tensor.float().numpy()
            sides.setdefault(found["module"], {})[found["side"]] = array
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


def inner(x: Module, y: Module) -> float:
    """<dW_x, dW_y>, from products of thin factors."""
    left, right = x.b.astype(np.float64).T @ y.b, x.a.astype(np.float64) @ y.a.T
    return float(x.scale * y.scale * np.sum(left * right))


def dw_error(original: Adapter, found: Adapter) -> float:
    """||dW - dW^||_F / ||dW||_F over all modules together; NaN where dW = 0. A module that is missing is 0.

    From inner products; where these would cancel, below an error of 1e-3, by QR of the factors of the difference.
    """
    both = original.keys() & found.keys()
    whole = sum(inner(m, m) for m in original.values())
    off = whole + sum(inner(m, m) for m in found.values()) - 2 * sum(inner(original[n], found[n]) for n in both)
    if whole == 0:
        return float("nan")
    if off > 1e-6 * whole:
        return float(np.sqrt(off / whole))
    parts = []
    for name in original.keys() | found.keys():
        signed = [(sign, x[name]) for sign, x in ((1, original), (-1, found)) if name in x]
        lefts = [sign * m.scale * m.b.astype(np.float64) for sign, m in signed]
        parts.append(product_norm(np.hstack(lefts), np.vstack([m.a.astype(np.float64) for _, m in signed])))
    return float(np.linalg.norm(parts) / np.sqrt(whole))


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


def rounded_one(adapter: Adapter, rounding: Any) -> tuple[Adapter, int]:
    """The vectors of A and of B, rounded; columns are the r vectors."""
    found, size = {}, 0
    for name, m in adapter.items():
        (a, bytes_a), (b, bytes_b) = rounding(m.a.T), rounding(m.b)
        found[name] = Module(a.T, b, m.scale)
        size += bytes_a + bytes_b
    return found, size


def ternary(x: Array, density: float) -> tuple[Array, int]:
    """ComPEFT's rule: the largest so many keep a sign and one magnitude; their entropy and a float16 are the bytes.

    The magnitude, alpha times the standard deviation there, is the one with least squared error: no validation set.
    """
    kept = max(1, round(density * x.size))
    flat = np.abs(x).ravel()
    chosen = np.zeros(x.size, bool)
    chosen[np.argpartition(flat, -kept)[-kept:]] = True
    magnitude = np.float16(flat[chosen].mean())
    share = kept / x.size
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share) if share < 1 else 0.0
    back = np.where(chosen.reshape(x.shape), np.sign(x) * magnitude, 0).astype(np.float32)
    return back, int(np.ceil(x.size * (entropy + share) / 8)) + 2


GROUP = 128  # numbers of a column that have a scale


def mixed(adapter: Adapter, bits: int, energy: float) -> tuple[Adapter, int]:
    """LoRAQuant's rule: triples of the SVD up to a share of the energy in so many bits, the others by their signs.

    Each GROUP of a column has a float16 scale, and in more than one bit a zero point; without its fine-tuning.
    """
    found, size = {}, 0
    for name, m in adapter.items():
        u, s, vt = singular(m)
        high = int(np.searchsorted(np.cumsum(s**2), energy * np.sum(s**2))) + 1
        sides = []
        for x in (u * np.sqrt(s), vt.T * np.sqrt(s)):
            back = np.empty_like(x)
            for begin in range(0, len(x), GROUP):
                part = x[begin : begin + GROUP]
                back[begin : begin + GROUP, :high] = _affine(part[:, :high], bits)
                scales = np.abs(part[:, high:]).mean(axis=0).astype(np.float16)
                back[begin : begin + GROUP, high:] = np.where(part[:, high:] < 0, -scales, scales)
                size += 2 * len(s) + -(-(high * bits * (len(part) + 1) + (len(s) - high) * len(part)) // 8)
            sides.append(back.astype(np.float32))
        found[name] = Module(sides[1].T, sides[0], 1.0)
    return found, size


def _affine(x: Array, bits: int) -> Array:
    """Rounded to 2^bits levels with a scale and a zero point for each column."""
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(np.float16).astype(np.float64)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step


# What a shared part would save


def sharing(adapters: Mapping[str, Adapter], limit: float) -> dict[str, Any]:
    """Bytes at the Gaussian bound at an error: each adapter alone, and with the best number of common directions.

    The vectors X of a module's side, U S and V S of dW / ||dW||, cost d/2 log2(var/D) bits a column, D the adapter's
    by reverse water-filling. With k eigenvectors of their moment, 8 bits a number, coefficients of a variance each,
    known for nothing, and the residual cost so: sharing is not underrated. `later` is the share that the last quarter
    saves with eigenvectors and variances of the others, for nothing: what an adapter more would save.
    """
    vectors: dict[tuple[str, int], list[Array]] = {}
    for adapter in adapters.values():
        parts = {name: singular(m) for name, m in adapter.items()}
        norm = np.sqrt(sum(np.sum(s**2) for _, s, _ in parts.values()))
        sides = {(n, i): x * s / norm for n, (u, s, vt) in parts.items() for i, x in enumerate((u, vt.T))}
        step = np.sqrt(_water(list(sides.values()), limit**2))
        for key, x in sides.items():
            vectors.setdefault(key, []).append((x / step).astype(np.float32))
    stacks = [np.stack(x) for x in vectors.values()]
    found = [_best_k(x, x, 8) for x in stacks]
    early = 3 * len(adapters) // 4
    late = [_best_k(x[early:], x[:early], 0) for x in stacks]
    return {"alone": sum(x[0] for x in found) / 8, "with": sum(x[1] for x in found) / 8, "ks": [x[2] for x in found],
            "later": 1 - sum(x[1] for x in late) / sum(x[0] for x in late)}  # fmt: skip


def _water(sides: list[Array], distortion: float) -> float:
    """D with sum of d min(var, D) = distortion over all columns."""
    energies, sizes = (
        np.hstack([np.sum(x**2, axis=0) for x in sides]),
        np.hstack([[len(x)] * x.shape[1] for x in sides]),
    )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(energies, sizes * middle).sum() < distortion else (low, middle)
    return high


def _best_k(x: Array, fitted: Array, bits: int) -> tuple[float, float, int]:
    """Bits of x alone and with the best k, and k; by the eigenvectors of another, of so many bits a number.

    x, fitted: (n, d, r) at D = 1.
    """
    n, d = x.shape[:2]
    moved = np.moveaxis(fitted, 1, 0).reshape(d, -1)
    basis = np.linalg.eigh((moved @ moved.T).astype(np.float64))[1][:, ::-1].astype(np.float32)
    squares, whole = np.square(basis.T @ x), np.square(x).sum(axis=1)
    variances = np.maximum(np.square(basis.T @ fitted).mean(axis=0), 1)
    loadings = np.log2(variances) + np.log2(np.e) * (np.maximum(squares.mean(axis=0), 1) / variances - 1)  # (d, r)
    costs = {}
    for k in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128):
        rest = np.maximum(whole - squares[:, :k].sum(axis=1), 1e-30) / d
        residual = d / 2 * np.log2(np.maximum(rest, 1)).sum()
        costs[k] = residual + n / 2 * np.maximum(loadings[:k], 0).sum() + bits * k * d
    best = min(costs, key=lambda k: costs[k])
    return float(costs[0]), float(costs[best]), best


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

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(*(x + y for x, y in zip(astuple(self), astuple(other), strict=True)))


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
