"""The names in a checkpoint, SHARE or coded, and what is ours in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from ..schema import read_skipped

CONFIG, COMPONENTS, ADAPTERS = "share_config.json", "shared_components.safetensors", "adapters"
LOADINGS, VERBATIM, META = "loadings.safetensors", "classifier_head.safetensors", "adapter_meta.json"
SKIPPED = "skipped.json"
PACKS, INDEX = "packs", "index.json.zz"  # of a coded checkpoint: a folder of codes, and what is known of them
DIRECTIONS = ":directions"  # of a coded adapter, in the index: the key of what it shares with others, if it does
CODE, SHARED = "code.bin", "directions.bin"  # while it is staged: of one adapter of a coded checkpoint, and of all
SPECTRUM = "eigenvalues.safetensors"  # module:side -> (k,) float64, of the moments, descending
STAGING = "staging.json"  # in a checkpoint that is not whole yet: the digest of what it will be
MARK = "reconstructed"  # in the metadata of an adapter that was reconstructed: the digest of its source id, if known
OURS = "lorashare_stream"  # the key of what is ours, in compression_stats and in adapter_meta.json
FILES = (COMPONENTS, SPECTRUM, ADAPTERS, PACKS, INDEX, SKIPPED, CONFIG)  # of a checkpoint, the configuration last
ANEW = "Delete the checkpoint, not its workspace, and compress again; or fetch it again."  # remedy of a damaged one
PARTS = ("basis", "loadings", "codes", "verbatim", "metadata")  # of the bytes of a checkpoint on disk


def ours_of(out: Path) -> dict[str, Any] | None:
    """What this package recorded in a checkpoint: {} if lorashare wrote it, None if it is no checkpoint."""
    try:
        stats = read_json(out / CONFIG)["compression_stats"]
        return dict(stats.get(OURS, {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def skipped_of(out: Path) -> list[dict[str, Any]]:
    """The adapters that were left out of a checkpoint, with reasons."""
    return [item.model_dump(exclude_none=True) for item in read_skipped(out / SKIPPED)]


def total_bytes(size: Mapping[str, float]) -> int:
    """Bytes on disk of a checkpoint, by what it says of its parts."""
    return int(sum(size.get(part, 0) for part in PARTS))


def next_bytes(size: Mapping[str, float], adapters: int) -> int:
    """Bytes that one more adapter costs, on the bases that are there: what one costs on average."""
    return round((total_bytes(size) - size.get("basis", 0)) / max(1, adapters))
