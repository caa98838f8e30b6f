"""Summary of a checkpoint: the content of share_config.json, with statistics of certified errors and of sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapters.config import rank_and_alpha
from ..adapters.keys import SIDES, parse_key, split_group_id
from ..files import json_bytes
from ..version import __version__
from .config import CheckpointRecord, Errors, Group, Recorded, Worst, config_bytes
from .format import OURS
from .records import AdapterMeta

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one adapter.

    Attributes:
        shared: whether it is coded, or on the bases and has part in them.
        kept: last names of the modules whose factors are verbatim though others are not.
    """

    name: str
    relative_error: float
    source_bytes: int
    lora_bytes: int
    shared: bool
    rank: int
    alpha: float
    kept: frozenset[str] = frozenset()


def statistics_of(meta: AdapterMeta) -> Statistics:
    """Statistics of an adapter, from its adapter_meta.json."""
    ours, shared = meta.ours, meta.ours.worst_module is not None
    return Statistics(
        meta.adapter_name,
        ours.relative_error,
        ours.source_bytes,
        ours.lora_bytes,
        shared,
        *rank_and_alpha(meta.original_config),
        frozenset(m.rpartition(".")[2] for key in ours.verbatim if shared and (m := parse_key(key, "").module)),
    )


def share_config(
    record: CheckpointRecord,
    adapters: Sequence[Statistics],
    *,
    digest: str,
    sizes: Mapping[str, int],
    skipped: Sequence[Any],
    coded: Json | None = None,
    modules: Collection[str] = (),
) -> dict[str, Any]:
    """The content of share_config.json.

    Args:
        record: the checkpoint record.
        adapters: statistics of every adapter, in order.
        digest: of all that decides the checkpoint.
        sizes: bytes on disk by part.
        skipped: the adapters that were left out.
        coded: the field of a coded checkpoint. modules: of such a one, that are coded, of any adapter.
    """
    layers = sorted({split_group_id(group)[0] for group in record.groups})
    ours = _recorded(record, adapters, sizes, digest, len(skipped))
    config: dict[str, Any] = {
        "share_version": "0.1.0",
        "num_components": max((f.k for f in record.groups.values()), default=0),
        "component_selection": "auto" if record.settings.num_components == "auto" else "fixed",
        "variance_threshold": record.settings.variance_threshold,
        "base_model_name_or_path": record.base_model,
        "target_modules": sorted({m.rpartition(".")[2] for m in (*layers, *modules)}),
        "lora_rank": _commonest([a.rank for a in adapters]),
        "lora_alpha": _commonest([a.alpha for a in adapters]),
        "adapter_names": [a.name for a in adapters],
        "num_adapters": len(adapters),
        "layer_keys": layers,
    }
    if coded is None:
        config["compression_stats"] = {**_shared(record.groups), OURS: ours.model_dump(exclude_none=True)}
    else:
        config["compression_stats"] = {OURS: ours.model_dump(exclude_defaults=True)}
        config["coded"] = {**coded, "modules": len(modules)}
    size = config["compression_stats"][OURS]["bytes"]
    others = sizes["metadata"] + (json_bytes(skipped) if skipped else 0)
    for _ in range(3):  # this file is a part of what it says; the number of digits settles
        size["metadata"] = others + len(config_bytes(config))
    return config


def _shared(groups: Mapping[str, Group]) -> dict[str, Any]:
    """Statistics of bases and loadings, as lorashare names them."""
    explained = {group: f.explained for group, f in sorted(groups.items())}
    values = list(explained.values()) or [1.0]
    shared = sum(f.k * f.d for f in groups.values())
    loadings = sum(f.k * f.n for f in groups.values())
    original = sum(f.d * f.n for f in groups.values())
    return {
        "original_total_params": original,
        "compressed_total_params": shared + loadings,
        "compression_ratio": original / (shared + loadings) if groups else 1.0,
        "shared_component_params": shared,
        "per_adapter_loading_params": loadings,
        "mean_explained_variance": float(np.mean(values)),
        "min_explained_variance": min(values),
        "per_layer_explained_variance": explained,
    }


def _recorded(
    record: CheckpointRecord, adapters: Sequence[Statistics], sizes: Mapping[str, int], digest: str, skipped: int
) -> Recorded:
    s = record.settings
    lora = sum(a.lora_bytes for a in adapters if a.shared)
    stored = sum(sizes.get(part, 0) for part in ("basis", "loadings", "codes"))
    stored += sizes["metadata"] if "codes" in sizes else 0  # an index of records, without which no code is read
    ratio = lora / max(1, stored) if lora else 1.0
    figures = {
        "version": __version__,
        "digest": digest,
        "objective": s.objective,
        "center": s.center,
        "share_initial": s.share_initial,
        "num_skipped": skipped,
        "groups": dict(sorted(record.groups.items())),
        "bytes": {**sizes, "originals": sum(a.source_bytes for a in adapters), "lora": lora, "lora_ratio": ratio},
        "errors": _errors(adapters, None if record.projected else _bounds(record.groups, s.objective)),
        "verbatim_adapters": [a.name for a in adapters if not a.shared],
        "verbatim_factors": dict(sorted(Counter(name for a in adapters for name in a.kept).items())),
    }
    return Recorded(**dict(record) | figures)


def _errors(adapters: Sequence[Statistics], bounds: list[float] | None) -> Errors:
    errors = {a.name: a.relative_error for a in adapters if a.shared}
    values = np.array(list(errors.values()) or [0.0])
    worst = sorted(errors, key=lambda name: (-errors[name], name))[:10]
    return Errors(
        adapters=len(errors),
        mean=float(values.mean()),
        median=float(np.median(values)),
        p95=float(np.quantile(values, 0.95)),
        max=float(values.max()),
        worst=[Worst(name=name, relative_error=errors[name]) for name in worst],
        mean_square_bounds=bounds,
    )


def _bounds(groups: Mapping[str, Group], objective: str) -> list[float] | None:
    """Bounds of the mean squared relative dW error, known from the bases alone: max(tA, tB) and tA + tB.

    t is the share of a side's summed trace that its bases leave out; it holds under `delta` only.
    """
    if objective != "delta" or not groups:
        return None
    left: dict[str, float] = {}
    for side in SIDES:
        bases = [f for group, f in groups.items() if group.endswith(f":{side}")]
        total = sum(f.energy for f in bases)
        left[side] = sum(f.energy * (1 - f.explained) for f in bases) / total if total > 0 else 0.0
    return [max(0.0, *left.values()), max(0.0, sum(left.values()))]


def _commonest(values: Sequence[Any]) -> Any:
    """The commonest of some numbers, of several the least; 0 if there is none."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]), default=(0, 0))[0]
