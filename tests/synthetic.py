"""Checkpoints as this package records them, written in no time: without adapters and without tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lorashare_stream.adapters.safetensors import write_arrays
from lorashare_stream.files import sealed

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
    chosen = {"objective": "delta", "center": False, "num_components": k, "variance_threshold": 0.95} | settings
    errors = np.clip(rng.gamma(60, 0.011, len(names)), 0.01, 0.999).tolist()
    for number, (name, error) in enumerate(zip(names, errors, strict=True)):
        _write_meta(root / "adapters" / name, error, number, hub=hub, shared=bool(bases))
    vectors = sum(2 * f["k"] * rank for f in bases.values()) * len(names)
    sizes = {"basis": sum(2 * f["k"] * f["d"] for f in bases.values()), "loadings": vectors}
    sizes |= {"verbatim": 20_000 * len(names), "metadata": 3000 * len(names) + 60_000}
    sizes |= {"originals": len(names) * 50 << 20, "lora": len(names) * 49 << 20, "lora_ratio": 1.0}
    told = {"mean": 0.5, "median": 0.5, "p95": 0.9, "max": 0.9, "adapters": len(names), "worst": []}
    ours = {
        "version": "0.1.0", "objective": chosen["objective"], "center": chosen["center"], "dtype": "BF16",
        "settings": chosen, "choice": "e" * 16, "binding": {}, "errors": told,
        "basis_digest": "b" * 16, "components": "c" * 64, "digest": "d" * 16,
        "bytes": sizes, "verbatim_adapters": [], "projected": [], "removed": [], "num_skipped": 0,
        "groups": {group: facts | {"n": rank * len(names)} for group, facts in bases.items()},
    }  # fmt: skip
    config = {"num_components": k, "adapter_names": names, "base_model_name_or_path": "org/base"}
    config |= {"compression_stats": {"lorashare_stream": ours}}
    with (root / "eigenvalues.safetensors").open("wb") as f:
        write_arrays(f, spectra, "F64", {"format": "pt"})
    (root / "share_config.json").write_text(json.dumps(config))
    return root


def _write_meta(folder: Path, error: float, number: int, *, hub: bool, shared: bool) -> None:
    module = f"model.layers.{number % 32}.mlp.down_proj" if shared else None
    ours: dict[str, Any] = {"relative_error": error, "worst_module": module, "worst_module_error": min(1.0, 2 * error)}
    ours |= {"source_id": folder.name, "sha256": "f" * 64, "source_bytes": 50 << 20, "lora_bytes": 49 << 20}
    ours |= {"basis_digest": "b" * 16, "verbatim": [], "files": {}, "notes": []}
    if hub:
        ours["hub"] = {"repo": f"org/{number}", "license": ("mit", None)[number % 2], "gated": number % 3 == 0}
        ours["hub"] |= {"revision": "0" * 40, "subfolder": "", "private": None}
    folder.mkdir(parents=True)
    told = {"adapter_name": folder.name, "original_config": {}, "original_adapter_path": folder.name}
    meta = sealed(told | {"lorashare_stream": ours})
    (folder / "adapter_meta.json").write_text(json.dumps(meta))
