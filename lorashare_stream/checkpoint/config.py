"""share_config.json: the fields of lorashare's SHAREConfig, read without importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingCheckpointError
from ..files import read_json
from ..text import listed, printable
from .format import CONFIG, OURS
from .publish import settled

_NEEDED = {"num_components", "adapter_names", "compression_stats"}
# What `ours` says in a coded checkpoint, unless it is written there.
_CODED: dict[str, Any] = {
    "objective": "delta", "center": False, "share_initial": False, "dtype": "F32", "cut_from": None, "components": "",
    "groups": {}, "verbatim_adapters": [], "projected": [], "removed": [], "num_skipped": 0,
}  # fmt: skip


@dataclass
class SHAREConfig:
    """The fields of share_config.json, as lorashare names them; ours are in `compression_stats`.

    `coded` is in coded checkpoints only: lorashare, which cannot read these, raises at a field that it does not know.
    """

    share_version: str = "0.1.0"
    num_components: int = 32
    component_selection: str = "fixed"
    variance_threshold: float = 0.95
    base_model_name_or_path: str = ""
    target_modules: list[str] = field(default_factory=list)
    lora_rank: int = 0
    lora_alpha: int = 0
    adapter_names: list[str] = field(default_factory=list)
    num_adapters: int = 0
    layer_keys: list[str] = field(default_factory=list)
    compression_stats: dict[str, Any] = field(default_factory=dict)
    coded: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> dict[str, Any]:
        """What this package recorded; empty in a checkpoint that lorashare wrote."""
        found = self.compression_stats.get(OURS, {})
        return (_CODED if self.coded else {}) | (found if isinstance(found, dict) else {})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "coded" or value}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The file of a configuration: as lorashare writes it, or, of a coded checkpoint, without blanks and defaults."""
    if not config.get("coded"):
        return json.dumps(config, indent=2).encode()
    ours = config["compression_stats"][OURS]
    stats = {OURS: {key: value for key, value in ours.items() if key not in _CODED or value != _CODED[key]}}
    default = asdict(SHAREConfig())
    kept = {key: value for key, value in config.items() if key in _NEEDED or value != default.get(key, MISSING)}
    return json.dumps(kept | {"compression_stats": stats}, separators=(",", ":")).encode()


def read_share_config(root: Path) -> SHAREConfig:
    """The share_config.json of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is not what it should be, or of an older version in a form that is
            gone.
    """
    settled(root)
    try:
        values = read_json(root / CONFIG)
    except FileNotFoundError:
        entries = sorted(os.listdir(root)) if root.is_dir() else []
        raise MissingCheckpointError(
            f"no checkpoint at {printable(root)}", found=listed(entries) or "nothing", expected=CONFIG
        ) from None
    except (ValueError, NotADirectoryError) as e:
        raise CheckpointError(f"{CONFIG} cannot be read", found=str(e)) from e
    known = SHAREConfig()
    if not isinstance(values, dict) or not values.keys() >= _NEEDED:
        raise CheckpointError(f"{CONFIG} is not that of a checkpoint", found=values, expected=listed(_NEEDED))
    for name, value in values.items():
        default = getattr(known, name, None) if name in SHAREConfig.__dataclass_fields__ else None
        if default is None:
            continue  # of a later version
        if not isinstance(value, float | int if isinstance(default, float | int) else type(default)):
            raise CheckpointError(
                f"{CONFIG} has an unusable field", key=name, found=value, expected=type(default).__name__
            )
        setattr(known, name, value)
    _refuse_older(root, known)
    return known


def _refuse_older(root: Path, config: SHAREConfig) -> None:
    """Refuse the forms that are gone: int8 with scales, and modules whose form a rule chose."""
    gone = [f"dtype {config.ours['dtype']}"] if config.ours.get("dtype") == "I8" else []
    gone += ["a rule by which modules have forms of their own"] if config.ours.get("rule") is not None else []
    if gone:
        raise CheckpointError(
            f"the checkpoint at {printable(root)} is of an older version of lorashare-stream, in a form that is gone",
            found=listed(gone),
            remedy="Compress its sources again with this version.",
        )
