"""Checkpoints as this package records them, written in no time: without adapters and without tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lorashare_stream.files import sealed
from lorashare_stream.summary import Figures, Head, share_config
from lorashare_stream.tensorfile import write_arrays

KINDS = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (4096, 1024), "mlp.down_proj": (14336, 4096)}


def synthetic(
    root: Path, names: list[str], *, k: int = 32, depths: int = 32, rank: int = 16, hub: bool = False, **settings: Any
) -> Path:
    """A checkpoint whose configuration, spectra and certificates are drawn at random."""
    rng = np.random.default_rng(0)
    spectra, bases = {}, {}
    for depth in range(depths):
        for kind, dims in KINDS.items():
            for side, d in zip("AB", dims, strict=True):
                values = 1 / (1 + np.arange(d)) ** (1.1 + 0.3 * depth / depths) * rng.uniform(0.9, 1.1)
                some = min(k, rank * len(names), d)
                group, energy = f"model.layers.{depth}.{kind}:{side}", float(values.sum())
                spectra[group] = values[:some]
                bases[group] = {"d": d, "k": some, "energy": energy, "explained": float(values[:some].sum()) / energy}
    chosen = {"objective": "delta", "center": False, "share_initial": False, "num_components": k} | settings
    head = Head("org/base", {"variance_threshold": 0.95, **chosen}, "BF16", "c" * 16, {}, "b" * 16, "s" * 64, bases)
    errors = np.clip(rng.gamma(60, 0.011, len(names)), 0.01, 0.999).tolist()
    lora, shared = 49 << 20, bool(bases)
    figures = [Figures(n, e, 50 << 20, lora, shared, rank, 32.0) for n, e in zip(names, errors, strict=True)]
    for number, figure in enumerate(figures):
        _write_meta(root / "adapters" / figure.name, figure, number, hub=hub)
    counts = dict.fromkeys(bases, rank * len(names))
    vectors = sum(2 * f["k"] * rank for f in bases.values()) * len(names)
    sizes = {"basis": sum(2 * f["k"] * f["d"] for f in bases.values()), "loadings": vectors}
    sizes |= {"verbatim": 20_000 * len(names), "metadata": 3000 * len(names) + 60_000}
    config = share_config(head, figures, counts, digest="d" * 16, sizes=sizes, skipped=0)
    with (root / "eigenvalues.safetensors").open("wb") as f:
        write_arrays(f, spectra, "F64", {"format": "pt"})
    (root / "share_config.json").write_text(json.dumps(config))
    return root


def _write_meta(folder: Path, figure: Figures, number: int, *, hub: bool) -> None:
    module = f"model.layers.{number % 32}.mlp.down_proj"
    ours: dict[str, Any] = {"relative_error": figure.relative_error, "worst_module": module if figure.shared else None}
    ours["worst_module_error"] = min(1.0, 2 * figure.relative_error)
    if hub:
        ours["hub"] = {"repo": f"org/{number}", "license": ("mit", None)[number % 2], "gated": number % 3 == 0}
    folder.mkdir(parents=True)
    meta = sealed({"adapter_name": figure.name, "lorashare_stream": ours})
    (folder / "adapter_meta.json").write_text(json.dumps(meta))
