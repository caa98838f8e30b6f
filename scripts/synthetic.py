"""Synthetic collections of PEFT adapters: a planted shared subspace, a power-law spectrum, a full-rank tail.

    python scripts/synthetic.py NAME FOLDER [--adapters N]

A vector of a group is P z + t: P (d, p) orthonormal and the same for all adapters, z with standard deviation j^-1 in
direction j, and t a full-rank tail with a tenth of z's energy. B' is as A. Values depend on name and number of the
adapter alone, so that a smaller collection is the beginning of a larger one.
"""

from __future__ import annotations

import argparse
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

PLANTED = 96
TAIL = 0.1  # of the planted energy


@dataclass(frozen=True)
class Collection:
    """What a collection is of: (name in a layer, d_in, d_out) of every module, layers, rank, adapters, dtype."""

    modules: tuple[tuple[str, int, int], ...]
    layers: int
    rank: int
    adapters: int
    dtype: str


_ROBERTA = Collection((("query", 768, 768), ("value", 768, 768)), 12, 8, 1000, "F32")
COLLECTIONS = {
    "roberta-1000": _ROBERTA,
    "roberta-10000": replace(_ROBERTA, adapters=10_000),
    "mistral-300": Collection((("q_proj", 4096, 4096), ("v_proj", 4096, 1024)), 4, 16, 300, "BF16"),
    "wide": Collection((("down_proj", 14336, 14336),), 1, 16, 200, "BF16"),
    "many-keys": Collection(tuple((f"m{i}", 64, 64) for i in range(7)), 32, 8, 200, "F32"),
    "tiny": Collection((("q_proj", 64, 64), ("v_proj", 64, 32)), 2, 4, 20, "BF16"),  # of tests
}


def shapes_of(c: Collection) -> dict[str, tuple[int, int]]:
    """Key as PEFT saves it -> shape, in the order of names, in which safetensors writes them."""
    shapes = {}
    for layer in range(c.layers):
        for name, d_in, d_out in c.modules:
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes[f"{module}.lora_A.weight"] = (c.rank, d_in)
            shapes[f"{module}.lora_B.weight"] = (d_out, c.rank)
    return dict(sorted(shapes.items()))


def write(c: Collection, folder: Path, adapters: int) -> None:
    """Write adapters that are not there yet; a configuration, which is written last, says that one is."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "synthetic/base", "r": c.rank,
        "lora_alpha": 2 * c.rank, "target_modules": [name for name, _, _ in c.modules], "bias": "none",
        "init_lora_weights": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "lora_dropout": 0.0, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    shapes = shapes_of(c)
    strength = (1.0 / np.arange(1, PLANTED + 1)).astype(np.float32)
    tail = float(np.sqrt(TAIL * np.sum(strength**2)))
    bases = {}
    for number, (key, shape) in enumerate(shapes.items()):
        d, p = max(shape), min(PLANTED, max(shape) // 2)
        planted = np.random.default_rng([0, number]).standard_normal((d, p), np.float32)
        bases[key] = np.ascontiguousarray(np.linalg.qr(planted)[0].T * strength[:p, None])  # (p, d)
    header = _header(shapes, c.dtype)
    for i in range(adapters):
        place = folder / f"adapter-{i:05}"
        if (place / "adapter_config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([1, i])
        with (place / "adapter_model.safetensors").open("wb") as f:
            f.write(header)
            for key, shape in shapes.items():
                basis = bases[key]
                d = basis.shape[1]
                rows = rng.standard_normal((c.rank, len(basis)), np.float32) @ basis
                rows += (tail / np.sqrt(d)) * rng.standard_normal((c.rank, d), np.float32)
                f.write(_raw(rows if shape[0] == c.rank else rows.T, c.dtype))
        (place / "adapter_config.json").write_text(json.dumps(config))


def _header(shapes: dict[str, tuple[int, int]], dtype: str) -> bytes:
    entries, end = {}, 0
    for key, shape in shapes.items():
        size = shape[0] * shape[1] * {"F32": 4, "BF16": 2}[dtype]
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _raw(values: np.ndarray, dtype: str) -> bytes:
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "F32":
        return single.tobytes()
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COLLECTIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int)
    args = parser.parse_args()
    collection = COLLECTIONS[args.name]
    write(collection, args.folder, args.adapters or collection.adapters)


if __name__ == "__main__":
    main()
