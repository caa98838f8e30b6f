"""The arithmetic of scripts/evidence.py, in float64 and independently of lorashare_stream: errors, bytes, rivals.

An adapter is its modules, each with A (r, d_in), B (d_out, r) and PEFT's scale s: dW = s B A.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CONFIG, BINARY = "adapter_config.json", "adapter_model.bin"
KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Module:
    """LoRA of one module."""

    a: Array
    b: Array
    scale: float


Adapter = dict[str, Module]


# Files


def load(path: Path) -> dict[str, Any]:
    """The torch tensors of a file."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def tensors_of(folder: Path) -> dict[str, Array]:
    """All tensors of a PEFT folder, as float32; of safetensors, if it has both forms."""
    return {key: t.float().numpy() for key, t in load(max(folder.glob("adapter_model.*"))).items()}


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
        matches = (value for p, value in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module))
        return next(matches, default)

    rank = chosen(config.get("rank_pattern"), config["r"])
    alpha = chosen(config.get("alpha_pattern"), config["lora_alpha"])
    return float(alpha / (np.sqrt(rank) if config.get("use_rslora") else rank))


@dataclass
class Bytes:
    """What files hold.

    Attributes:
        lora: numbers from which LoRA is rebuilt: A and B, or bases, means and loadings, or codes.
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


def bytes_of(*folders: Path) -> Bytes:
    """Of a checkpoint of SHARE or vlora, of a coded one, or of PEFT adapters."""
    total = Bytes()
    for path, peft in ((p, (f / CONFIG).exists()) for f in folders for p in f.rglob("*") if p.is_file()):
        total.other += path.stat().st_size
        for key, tensor in load(path).items() if path.suffix == ".safetensors" or path.name == BINARY else ():
            if path.name == "eigenvalues.safetensors" or key.endswith((".sv_a", ".sv_b")):
                continue
            total.other -= tensor.nbytes
            if ".lora_" in key and not peft:
                total.verbatim += tensor.nbytes
            elif ".lora_" not in key and (peft or path.name == "classifier_head.safetensors" or key == ":verbatim"):
                total.extras += tensor.nbytes  # ":verbatim" is in the packs of a coded checkpoint
            else:
                total.lora += tensor.nbytes
    return total


# Errors


def _factors(*terms: tuple[int, Module]) -> tuple[Array, Array]:
    """Thin factors of a sum of signed dW."""
    lefts = [sign * m.scale * m.b.astype(np.float64) for sign, m in terms]
    return np.hstack(lefts), np.vstack([m.a.astype(np.float64) for _, m in terms])


def _square(left: Array, right: Array) -> float:
    """||left right||^2 by Gram matrices, in which what is small is a difference."""
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _norm(left: Array, right: Array) -> float:
    """||left right|| by QR."""
    return float(np.linalg.norm(np.linalg.qr(left)[1] @ np.linalg.qr(right.T)[1].T))


def norm(adapter: Adapter) -> float:
    """||dW|| over all modules together."""
    return float(np.linalg.norm([_norm(*_factors((1, m))) for m in adapter.values() if m.a.size]))


def dw_error(original: Adapter, found: Adapter) -> float:
    """||dW - dW^||_F / ||dW||_F over all modules together; NaN where dW = 0. A module that is missing is 0."""
    whole = sum(_square(*_factors((1, m))) for m in original.values())
    if whole == 0:
        return float("nan")
    names, both = original.keys() | found.keys(), ((1, original), (-1, found))
    differences = [_factors(*((sign, x[n]) for sign, x in both if n in x)) for n in names]
    off = sum(_square(*x) for x in differences)
    if off <= 1e-6 * whole:
        off = sum(_norm(*x) ** 2 for x in differences)
    return float(np.sqrt(off / whole))


def statistics(errors: Mapping[str, float]) -> dict[str, float]:
    """Over the adapters that have any dW."""
    x = np.array([e for e in errors.values() if not np.isnan(e)])
    values = {"mean": x.mean(), "median": np.median(x), "p95": np.quantile(x, 0.95), "max": x.max()}
    return {name: float(value) for name, value in values.items()}


# Rivals that compress each adapter alone: what comes back, and its bytes


def singular(m: Module) -> tuple[Array, Array, Array]:
    """U, S, V' of dW, thin."""
    q_b, r_b = np.linalg.qr(m.scale * m.b.astype(np.float64))
    q_a, r_a = np.linalg.qr(m.a.T.astype(np.float64))
    u, s, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, s, vt @ q_a.T


def truncated(adapter: Adapter, budget: float, width: int = 4, scales: int = 0) -> tuple[Adapter, int]:
    """Triples of the SVDs within a budget of bytes, those first that keep most of ||dW||^2 for each byte.

    A number has `width` bytes, and a triple costs `scales` besides.
    """
    parts = {name: singular(m) for name, m in adapter.items()}
    costs = {name: width * (len(u) + vt.shape[1]) + scales for name, (u, _, vt) in parts.items()}
    gains = [(sigma**2 / costs[name], name) for name, (_, s, _) in parts.items() for sigma in s if sigma > 0]
    ranks, spent = dict.fromkeys(parts, 0), 0
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        if spent + costs[name] <= budget:
            ranks[name] += 1
            spent += costs[name]
    found: Adapter = {}
    for name, t in ((name, t) for name, t in ranks.items() if t):
        u, s, vt = parts[name]
        root = np.sqrt(s[:t])
        found[name] = Module((root[:, None] * vt[:t]).astype(np.float32), (u[:, :t] * root).astype(np.float32), 1.0)
    return found, spent


def rounded(adapter: Adapter, rounding: Callable[[Array], tuple[Array, int]]) -> tuple[Adapter, int]:
    """A and B, rounded; the columns that `rounding` gets are the r vectors."""
    found, size = {}, 0
    for name, m in adapter.items():
        (a, bytes_a), (b, bytes_b) = rounding(m.a.T), rounding(m.b)
        found[name] = Module(a.T, b, m.scale)
        size += bytes_a + bytes_b
    return found, size


def integers(x: Array, bits: int) -> tuple[Array, int]:
    """Symmetric integers of so many bits with a float32 scale for each column."""
    most = 2 ** (bits - 1) - 1
    scale = (np.abs(x).max(axis=0, initial=0.0) / most).astype(np.float32)
    safe = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.clip(np.rint(x / safe), -most, most).astype(np.float32)
    return codes * safe, -(-codes.size * bits // 8) + scale.nbytes


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
        kept = np.cumsum(s**2)
        high = int(np.searchsorted(kept, energy * kept[-1])) + 1
        sides = []
        for x in (u * np.sqrt(s), vt.T * np.sqrt(s)):
            for part in np.split(x, range(GROUP, len(x), GROUP)):  # views
                part[:, :high] = _affine(part[:, :high], bits)
                scales = np.abs(part[:, high:]).mean(axis=0).astype(np.float16)
                part[:, high:] = np.where(part[:, high:] < 0, -scales, scales)
                size += 2 * len(s) + -(-(high * bits * (len(part) + 1) + (len(s) - high) * len(part)) // 8)
            sides.append(x.astype(np.float32))
        found[name] = Module(sides[1].T, sides[0], 1.0)
    return found, size


def _affine(x: Array, bits: int) -> Array:
    """Rounded to 2^bits levels with a scale and a zero point for each column."""
    low, high = np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(np.float16).astype(np.float64)
    zero = np.rint(-low / step)
    back: Array = (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step
    return back
