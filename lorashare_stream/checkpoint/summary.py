"""What a checkpoint says of itself: the fields of lorashare's SHAREConfig, and our certified figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..adapters.config import rank_and_alpha
from ..adapters.keys import SIDES, parse_key, split_group_id
from ..errors import CheckpointError
from ..files import json_bytes
from ..version import __version__
from .config import SHAREConfig, config_bytes
from .format import OURS

Json = Mapping[str, Any]
_BASIS = ("d", "k", "energy", "explained")


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the summary needs of one adapter.

    `shared` is whether it is coded, or on the bases and has part in them; `kept` are the last parts of the names of the
    modules whose factors are verbatim though others are not.
    """

    name: str
    relative_error: float
    source_bytes: int
    lora_bytes: int
    shared: bool
    rank: int
    alpha: float
    kept: frozenset[str] = frozenset()


def statistics_of(meta: Json) -> Statistics:
    """The figures in an adapter_meta.json."""
    ours, config = meta[OURS], meta["original_config"]
    shared = ours["worst_module"] is not None
    return Statistics(
        meta["adapter_name"],
        ours["relative_error"],
        ours["source_bytes"],
        ours["lora_bytes"],
        shared,
        *rank_and_alpha(config),
        frozenset(m.rpartition(".")[2] for key in ours["verbatim"] if shared and (m := parse_key(key, "").module)),
    )


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint is of, beside its adapters.

    Attributes:
        base_model: as the configuration names it.
        settings: those on which the result depends, as they were asked for.
        dtype: of components and loadings as safetensors names it.
        settings_key: digest of settings, dtype and base model.
        binding: what the numbers of its workspace depend on.
        basis_key: of the components; which basis they are.
        components: SHA-256 of their file; whether they are whole.
        bases: group -> d, k, energy of its moment, share of it that is explained.
        projected: adapters that were added since the bases were fitted, and are not in them.
        removed: adapters that were taken out since, and are still in them.
        cut_from: the k from which a smaller one was cut; errors then are not measured.
    """

    base_model: str
    settings: Json
    dtype: str
    settings_key: str
    binding: Json
    basis_key: str
    components: str
    bases: Mapping[str, Json]
    projected: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    cut_from: int | None = None


def record_of(config: SHAREConfig) -> CheckpointRecord:
    """The record of a checkpoint of ours.

    Raises:
        CheckpointError: if this package did not write it.
    """
    ours = config.ours
    try:
        return CheckpointRecord(
            config.base_model_name_or_path,
            dict(ours["settings"]),
            str(ours["dtype"]),
            str(ours["choice"]),
            dict(ours["binding"]),
            str(ours["basis_digest"]),
            str(ours["components"]),
            {group: {k: facts[k] for k in _BASIS} for group, facts in ours["groups"].items()},
            tuple(ours["projected"]),
            tuple(ours["removed"]),
            ours["cut_from"],
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            "the checkpoint was not written by this version of lorashare-stream, and cannot be changed",
            found=f"no {e}",
            remedy="Compress its sources again.",
        ) from e


def counts_of(config: SHAREConfig) -> dict[str, int]:
    """Group -> n, the vectors of all adapters of a checkpoint of ours."""
    return {group: int(facts["n"]) for group, facts in config.ours["groups"].items()}


def share_config(
    record: CheckpointRecord,
    adapters: Sequence[Statistics],
    counts: Mapping[str, int],
    *,
    digest: str,
    sizes: Mapping[str, int],
    skipped: Sequence[Any],
    coded: Json | None = None,
    modules: Collection[str] = (),
) -> dict[str, Any]:
    """The content of share_config.json.

    Args:
        record: what it is of.
        adapters: figures of every adapter, in order.
        counts: group -> n, the vectors of these adapters.
        digest: of all that decides the result.
        sizes: bytes on disk by part.
        skipped: the adapters that were left out.
        coded: the field of a coded checkpoint, if it is one. modules: that such a one has coded, of any adapter.
    """
    groups = {group: {**facts, "n": counts.get(group, 0)} for group, facts in sorted(record.bases.items())}
    explained = {group: facts["explained"] for group, facts in groups.items()}
    shared = sum(f["k"] * f["d"] for f in groups.values())
    loadings = sum(f["k"] * f["n"] for f in groups.values())
    original = sum(f["d"] * f["n"] for f in groups.values())
    values = list(explained.values()) or [1.0]
    layers = sorted({split_group_id(group)[0] for group in groups})
    stats = {
        "original_total_params": original,
        "compressed_total_params": shared + loadings,
        "compression_ratio": original / (shared + loadings) if groups else 1.0,
        "shared_component_params": shared,
        "per_adapter_loading_params": loadings,
        "mean_explained_variance": float(np.mean(values)),
        "min_explained_variance": min(values),
        "per_layer_explained_variance": explained,
        OURS: _ours(record, adapters, groups, sizes) | {"digest": digest, "num_skipped": len(skipped)},
    }
    config = {
        "share_version": "0.1.0",
        "num_components": max((f["k"] for f in groups.values()), default=0),
        "component_selection": "auto" if record.settings.get("num_components") == "auto" else "fixed",
        "variance_threshold": record.settings.get("variance_threshold", 0.95),
        "base_model_name_or_path": record.base_model,
        "target_modules": sorted({m.rpartition(".")[2] for m in (*layers, *modules)}),
        "lora_rank": _commonest([a.rank for a in adapters]),
        "lora_alpha": _commonest([a.alpha for a in adapters]),
        "adapter_names": [a.name for a in adapters],
        "num_adapters": len(adapters),
        "layer_keys": layers,
        "compression_stats": stats,
    }
    if coded is not None:
        config["coded"] = {**coded, "modules": len(modules)}
    stats[OURS]["bytes"]["metadata"] = _with_itself(config, sizes["metadata"] + (json_bytes(skipped) if skipped else 0))
    return config


def _with_itself(config: dict[str, Any], others: int) -> int:
    """Bytes of metadata, share_config.json among them, which says how many they are."""
    size = config["compression_stats"][OURS]["bytes"]
    for _ in range(3):  # the number of digits settles
        size["metadata"] = others + len(config_bytes(config))
    found: int = size["metadata"]
    return found


def _ours(
    record: CheckpointRecord, adapters: Sequence[Statistics], groups: Mapping[str, Json], sizes: Mapping[str, int]
) -> dict[str, Any]:
    s = record.settings
    lora = sum(a.lora_bytes for a in adapters if a.shared)
    stored = sum(sizes.get(part, 0) for part in ("basis", "loadings", "codes"))
    stored += sizes["metadata"] if "codes" in sizes else 0  # an index of records, without which no code is read
    return {
        "version": __version__,
        "objective": s["objective"],
        "center": s["center"],
        "share_initial": s["share_initial"],
        "dtype": record.dtype,
        "settings": dict(s),
        "choice": record.settings_key,
        "binding": dict(record.binding),
        "cut_from": record.cut_from,
        "basis_digest": record.basis_key,
        "components": record.components,
        "bytes": {
            **sizes,
            "originals": sum(a.source_bytes for a in adapters),
            "lora": lora,
            "lora_ratio": lora / max(1, stored) if lora else 1.0,
        },
        "errors": _errors(adapters) | ({} if record.projected else _bound(groups, s["objective"])),
        "verbatim_adapters": [a.name for a in adapters if not a.shared],
        "verbatim_factors": dict(sorted(Counter(name for a in adapters for name in a.kept).items())),
        "projected": list(record.projected),
        "removed": list(record.removed),
        "groups": {g: {k: f[k] for k in ("n", *_BASIS)} for g, f in groups.items()},
    }


def _errors(adapters: Sequence[Statistics]) -> dict[str, Any]:
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


def _bound(groups: Mapping[str, Json], objective: str) -> dict[str, Any]:
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
