"""What a checkpoint says of itself: the fields of lorashare's SHAREConfig, and our certified figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .keys import SIDES, group_id
from .planning import Plan
from .shareformat import OURS
from .tasks import Job
from .version import __version__

Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """What the summary needs of one adapter; `shared` is whether it has loadings."""

    name: str
    relative_error: float
    source_bytes: int
    lora_bytes: int
    shared: bool
    rank: int
    alpha: float


def figures_of(meta: Facts) -> Figures:
    """The figures in an adapter_meta.json."""
    ours, config = meta[OURS], meta["original_config"]
    return Figures(
        meta["adapter_name"],
        ours["relative_error"],
        ours["source_bytes"],
        ours["lora_bytes"],
        ours["worst_module"] is not None,
        config["r"],
        config["lora_alpha"],
    )


def share_config(
    plan: Plan,
    adapters: Sequence[Figures],
    bases: Mapping[str, Facts],
    *,
    job: Job,
    sizes: Mapping[str, int],
    skipped: int,
) -> dict[str, Any]:
    """The content of share_config.json.

    Args:
        plan: of the run.
        adapters: figures of every adapter, in order.
        bases: module -> facts of its two bases.
        job: its digests.
        sizes: bytes on disk of `basis`, `loadings`, `verbatim` and `metadata`.
        skipped: how many adapters were left out.
    """
    groups = {group_id(m, side): bases[m][side] for m in sorted(bases) for side in SIDES if side in bases[m]}
    explained = {group: facts["explained"] for group, facts in groups.items()}
    shared = sum(f["k"] * f["d"] for f in groups.values())
    loadings = sum(f["k"] * f["n"] for f in groups.values())
    original = sum(f["d"] * f["n"] for f in groups.values())
    values = list(explained.values()) or [1.0]
    stats = {
        "original_total_params": original,
        "compressed_total_params": shared + loadings,
        "compression_ratio": original / (shared + loadings) if groups else 1.0,
        "shared_component_params": shared,
        "per_adapter_loading_params": loadings,
        "mean_explained_variance": float(np.mean(values)),
        "min_explained_variance": min(values),
        "per_layer_explained_variance": explained,
        OURS: _ours(plan, adapters, groups, sizes)
        | {"digest": job.digest, "basis_digest": job.basis_digest, "num_skipped": skipped},
    }
    return {
        "share_version": "0.1.0",
        "num_components": max((f["k"] for f in groups.values()), default=0),
        "component_selection": "auto" if plan.settings.num_components == "auto" else "fixed",
        "variance_threshold": plan.settings.variance_threshold,
        "base_model_name_or_path": plan.base_model,
        "target_modules": sorted({m.rpartition(".")[2] for m in bases}),
        "lora_rank": _commonest([a.rank for a in adapters]),
        "lora_alpha": _commonest([a.alpha for a in adapters]),
        "adapter_names": [a.name for a in adapters],
        "num_adapters": len(adapters),
        "layer_keys": sorted(bases),
        "compression_stats": stats,
    }


def _ours(
    plan: Plan, adapters: Sequence[Figures], groups: Mapping[str, Facts], sizes: Mapping[str, int]
) -> dict[str, Any]:
    s = plan.settings
    lora = sum(a.lora_bytes for a in adapters if a.shared)
    shared = sizes["basis"] + sizes["loadings"]
    return {
        "version": __version__,
        "objective": s.objective,
        "center": s.center,
        "share_initial": s.share_initial,
        "dtype": plan.storage,
        "bytes": {
            **sizes,
            "originals": sum(a.source_bytes for a in adapters),
            "lora": lora,
            "lora_ratio": lora / shared if lora else 1.0,
        },
        "errors": _errors(adapters) | _bound(groups, s.objective),
        "verbatim_adapters": [a.name for a in adapters if not a.shared],
        "groups": {g: {k: f[k] for k in ("d", "n", "k", "energy", "explained")} for g, f in groups.items()},
    }


def _errors(adapters: Sequence[Figures]) -> dict[str, Any]:
    """Relative dW error over the adapters that are compressed, those kept exact left aside.

    Returns:
        mean, median, 95th percentile, maximum, the worst ten, and of how many.
    """
    errors = {a.name: a.relative_error for a in adapters if a.shared}
    values = np.array(list(errors.values()) or [0.0])
    worst = sorted(errors, key=lambda name: (-errors[name], name))[:10]
    return {
        "adapters": len(errors),
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": float(values.max()),
        "worst": [{"name": name, "relative_error": errors[name]} for name in worst],
    }


def _bound(groups: Mapping[str, Facts], objective: str) -> dict[str, Any]:
    """Bounds of the mean squared relative dW error, known from the bases alone: max(tA, tB) and tA + tB.

    t is the share of a side's summed trace that its bases leave out; it holds under `delta` only.
    """
    if objective != "delta" or not groups:
        return {}
    left: dict[str, float] = {}
    for side in SIDES:
        facts = [f for group, f in groups.items() if group.endswith(f":{side}")]
        total = sum(f["energy"] for f in facts)
        left[side] = sum(f["energy"] * (1 - f["explained"]) for f in facts) / total if total > 0 else 0.0
    return {"mean_square_bounds": [max(0.0, *left.values()), max(0.0, sum(left.values()))]}


def _commonest(values: Sequence[Any]) -> Any:
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]), default=(0, 0))[0]
