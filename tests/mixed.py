"""A small collection with all that a coded checkpoint may hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from .conftest import factor_keys, make_tensors, write_adapter

MODULES = {"layers.0.q": (40, 24), "layers.0.v": (40, 12), "layers.1.q": (40, 24), "layers.1.narrow": (40, 3)}
EXPERTS = "layers.0.experts"


def mixed_collection(root: Path) -> list[str]:
    """Adapters in float32, bfloat16, float16 and float64, with stacked experts, of rank 1 and above d, one with scale 0
    in a module, one that is zero, one with the head of another, tiny and huge ones."""
    rng = np.random.default_rng(5)
    head = {"base_model.model.head.weight": rng.standard_normal((40, 200)).astype(np.float32)}
    folders = [write_adapter(root / "plain", make_tensors(rng, MODULES) | head)]
    folders.append(write_adapter(root / "same-head", make_tensors(rng, MODULES, r=1) | head, r=1))
    folders.append(write_adapter(root / "off", make_tensors(rng, MODULES), alpha_pattern={"layers.0.v": 0}))
    zero = {key: 0 * t if "lora_B" in key else t for key, t in make_tensors(rng, MODULES).items()}
    folders.append(write_adapter(root / "zero", zero))
    wide = {f"layers.{i}.q": (40, 24) for i in range(2)}
    folders.append(write_adapter(root / "wide", make_tensors(rng, wide, r=30), r=30, lora_alpha=60))
    a, b = factor_keys(EXPERTS)
    some = {a: rng.standard_normal((3 * 2, 40)), b: rng.standard_normal((16, 2 * 3)) * np.repeat([3.0, 0.3], 3)}
    stacked = {key: t.astype(np.float32) for key, t in some.items()} | make_tensors(rng, {"layers.0.q": (40, 24)}, r=2)
    folders.append(write_adapter(root / "experts", stacked, r=2, lora_alpha=4, target_parameters=["experts.up"]))
    for name, factor in (("tiny", 1e-12), ("huge", 1e6)):
        scaled = {k: (t * factor).astype(np.float32) for k, t in make_tensors(rng, MODULES).items()}
        folders.append(write_adapter(root / name, scaled))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        folder = write_adapter(root / str(dtype).rpartition(".")[2], made := make_tensors(rng, MODULES))
        tensors = {key: torch.from_numpy(t).to(dtype) for key, t in made.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        folders.append(folder)
    return [str(folder) for folder in folders]
