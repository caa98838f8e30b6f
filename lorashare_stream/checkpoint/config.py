"""share_config.json: the fields of lorashare's SHAREConfig, and what is ours in it, read without importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass

from ..errors import CheckpointError, MissingCheckpointError
from ..files import read_json
from ..schema import Count, Format, Measure, Schema, checked, fault_of
from ..settings import Objective, Settings
from ..text import listed, printable
from .format import ANEW, CONFIG, OURS, PARTS
from .publish import settled

_NEEDED = {"num_components", "adapter_names", "compression_stats"}
_SIZES = {"verbatim", "metadata", "originals", "lora", "lora_ratio"}  # of every checkpoint; other parts are of a form
_ELSE = "Read it by the version of lorashare-stream that wrote it, fetch it again, or compress its sources again."


def _settings(values: Any) -> Settings:
    if not isinstance(values, Settings | dict):
        raise ValueError("an object")
    return values if isinstance(values, Settings) else Settings.from_mapping(values)


def _of_parts(sizes: dict[str, float]) -> dict[str, float]:
    if not _SIZES <= sizes.keys() <= _SIZES | {*PARTS}:
        raise ValueError(f"sizes of {listed(sorted(_SIZES | {*PARTS}), 20)}")
    return sizes


class Group(Schema):
    """A group: the basis of one side of a module."""

    n: Annotated[Count, "vectors of all adapters"]
    d: Annotated[Count, "their length"]
    k: Annotated[Count, "components"]
    energy: Annotated[Measure, "trace of the moment"]
    explained: Annotated[Measure, "share of it that the components hold"]


class Worst(Schema):
    """Adapter with a large error."""

    name: str
    relative_error: Measure


class Errors(Schema):
    """Relative dW errors of the adapters that are compressed, those kept exact left aside."""

    adapters: Annotated[Count, "of how many"]
    mean: Measure
    median: Measure
    p95: Annotated[Measure, "95th percentile"]
    max: Measure
    worst: Annotated[list[Worst], "the worst ten: `name`, `relative_error`"]
    mean_square_bounds: Annotated[list[Measure] | None, "known from the bases alone; under `delta` only"] = None


class CheckpointRecord(Schema):
    """Checkpoint record: what a checkpoint is of, beside its adapters."""

    format: Annotated[Format, "1"] = 1
    settings: Annotated[
        Settings,
        PlainValidator(_settings),
        PlainSerializer(Settings.chosen),
        "on which the result depends",
    ]
    dtype: Annotated[str, Field(pattern="^(F32|F16|BF16)$"), "of components and loadings"] = "F32"
    choice: Annotated[str, "digest of settings, dtype and base model"]
    binding: Annotated[dict[str, Any], "what the numbers of its workspace depend on"]
    basis_digest: Annotated[str, "which components they are; of a coded checkpoint, which codes"]
    components: Annotated[str, "SHA-256 of their file"] = ""
    groups: Annotated[dict[str, Group], "of each `MODULE:SIDE`: n, d, k, energy, explained"] = Field(default={})
    projected: Annotated[list[str], "adapters added since the bases were fitted, and not in them"] = Field(default=[])
    removed: Annotated[list[str], "adapters taken out since, and still in them"] = Field(default=[])
    cut_from: Annotated[int | None, "the k from which a smaller one was cut; errors are then not measured"] = None
    base_model: str = Field(default="", exclude=True)  # which share_config.json has elsewhere

    def counting(self, counts: Mapping[str, int]) -> CheckpointRecord:
        """Record with other n."""
        groups = {g: basis.model_copy(update={"n": counts.get(g, 0)}) for g, basis in self.groups.items()}
        return self.model_copy(update={"groups": groups})


class Recorded(CheckpointRecord):
    """Our part of share_config.json, `compression_stats.lorashare_stream`; of a coded checkpoint without defaults."""

    version: Annotated[str, "of the package that wrote it"]
    digest: Annotated[str, "of all that decides the checkpoint"]
    objective: Annotated[Objective, "as in `settings`"] = "delta"
    center: Annotated[bool, "as in `settings`"] = False
    share_initial: Annotated[bool, "as in `settings`"] = False
    num_skipped: Annotated[Count, "adapters that were left out"] = 0
    bytes: Annotated[
        dict[str, Count | Measure], AfterValidator(_of_parts),
        "on disk by part; of the `originals`; of their LoRA tensors, `lora`, and how many times fewer these are now",
    ]  # fmt: skip
    errors: Annotated[Errors, "relative dW errors: mean, median, p95, max, the worst ten, and of how many adapters"]
    verbatim_adapters: Annotated[list[str], "adapters that are kept exact"] = Field(default=[])
    verbatim_factors: Annotated[dict[str, int], "last names of modules kept exact in others -> in how many"] = Field(
        default={}
    )


@dataclass(config=ConfigDict(strict=True, extra="ignore"))  # ignored: fields of later versions of lorashare
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
    lora_rank: int | float = 0
    lora_alpha: int | float = 0
    adapter_names: list[str] = field(default_factory=list)
    num_adapters: int = 0
    layer_keys: list[str] = field(default_factory=list)
    compression_stats: dict[str, Any] = field(default_factory=dict)
    coded: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def record(self) -> Recorded | None:
        """Our record; None in a checkpoint that lorashare wrote.

        Raises:
            CheckpointError: if it is not what this version writes.
        """
        found = self.compression_stats.get(OURS)
        if found in (None, {}):
            return None
        ours = checked(Recorded, found, f"{OURS} in {CONFIG}", _ELSE)
        return ours.model_copy(update={"base_model": self.base_model_name_or_path})

    @property
    def ours(self) -> dict[str, Any]:
        """Our record as plain values; empty in a checkpoint that lorashare wrote."""
        return {} if self.record is None else self.record.model_dump(exclude_none=True)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "coded" or value}


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Serialize a configuration: as lorashare does, or, of a coded checkpoint, without blanks and defaults."""
    if not config.get("coded"):
        return json.dumps(config, indent=2).encode()
    default = asdict(SHAREConfig())
    kept = {key: value for key, value in config.items() if key in _NEEDED or value != default.get(key, MISSING)}
    return json.dumps(kept, separators=(",", ":")).encode()


def read_share_config(root: Path) -> SHAREConfig:
    """Read the share_config.json of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is not what it should be, or of another version of this package.
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
        raise CheckpointError(f"{CONFIG} cannot be read", found=str(e), remedy=ANEW) from e
    if not isinstance(values, dict) or not values.keys() >= _NEEDED:
        raise CheckpointError(f"{CONFIG} is not that of a checkpoint", found=values, expected=listed(_NEEDED))
    try:
        config = SHAREConfig(**values)
    except ValidationError as e:
        raise CheckpointError(f"{CONFIG} has an unusable field", **fault_of(e)) from e
    config.record  # noqa: B018 - checked
    return config


def record_of(config: SHAREConfig) -> Recorded:
    """The record of a checkpoint of ours.

    Raises:
        CheckpointError: if this package did not write it.
    """
    if config.record is None:
        raise CheckpointError(
            "the checkpoint was not written by lorashare-stream, and cannot be changed",
            remedy="Compress its sources again.",
        )
    return config.record
