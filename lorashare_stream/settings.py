"""What a user may choose, checked once; everything else the program knows by itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UsageError
from .machine import memory_limit
from .text import bytes_shown, listed, parse_bytes, printable

Objective = Literal["delta", "factors"]
MEMORY = 4 << 30  # bytes, unless a control group has less
QUANTUM = 1024  # columns summed at once; part of a workspace's identity, since it decides rounding

LIMITS = ("max_bytes", "ratio", "max_error")
TRIM_RANK = "trim_rank"  # a setting of older versions, which plans that they wrote may have
_INSTEAD = "Use --max-error, --ratio or --max-bytes, which write a coded checkpoint that is smaller at the same error."
_FLAGS = {"num_components": "-k", "variance_threshold": "--variance", "base_aliases": "--base-alias"}
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("delta", "factors"),
    "moment_dtype": ("float32", "float64"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "on_error": ("raise", "skip"),
    "device": ("auto", "cpu", "cuda"),
}


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
        num_components: components kept per group, or `"auto"`: the smallest number per group that
            reaches `variance_threshold`. A limit, if one is set, decides instead.
        max_bytes: limit: bytes on disk of the whole checkpoint.
        ratio: limit: how many times smaller than the originals the checkpoint is on disk.
        max_error: limit: the relative dW error that no adapter exceeds; the checkpoint is as small as it allows.
        variance_threshold: share of the moment's trace that `"auto"` must keep, in (0, 1].
        objective: `"delta"` weights each side by the other, so that the error of dW = s B A is least;
            `"factors"` treats A and B on their own, as the published method does.
        center: subtract the mean column before fitting (the published method); `"factors"` only.
        moment_dtype: of the accumulated moments; centring needs and gets float64.
        dtype: of stored components and loadings; `"auto"` keeps the precision of the sources.
        memory: bytes that the run's processes may use together, or each worker process of a cluster; by default 4 GiB,
            or what the control group allows.
        workers: processes of this machine, or tasks at a time in one of a cluster; None is one per core that this
            process may use. Fewer run if memory demands it.
        on_error: `"raise"` stops at bad adapters, `"skip"` goes on without them and lists them.
        disk_budget: bytes on this disk for adapters of the Hub, which are fetched in batches, and again when they are
            projected; None keeps them in the Hub's cache.
        offline: never ask the Hub: what is in its cache must do.
        device: where moments and bases are computed.
        base_model: what the adapters are adapters of; None is the name that most of them give.
        base_aliases: other names of it (mirrors, quantised copies, local paths).
        any_base: accept adapters that name any base model.
        discard_moments: free the moments of a group when its basis is fitted: less disk, but growing with a new basis
            or taking out an adapter then reads all sources again.
        share_initial: compress adapters whose factors hold a part of the base model (PiSSA, OLoRA, CorDA, LoRA-GA,
            LoftQ) like others; else they are kept exact.
    """

    num_components: int | Literal["auto"] = 32
    max_bytes: int | None = None
    ratio: float | None = None
    max_error: float | None = None
    variance_threshold: float = 0.95
    objective: Objective = "delta"
    center: bool = False
    moment_dtype: Literal["float32", "float64"] = "float32"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory: int = field(default_factory=lambda: min(MEMORY, memory_limit() or MEMORY))
    workers: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    disk_budget: int | None = None
    offline: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    base_model: str | None = None
    base_aliases: tuple[str, ...] = ()
    any_base: bool = False
    share_initial: bool = False
    discard_moments: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if (name, value) == ("dtype", "int8"):
                raise UsageError("int8 storage (--dtype int8) is gone", remedy=_INSTEAD)
            _expect(value in allowed, name, value, f"one of {', '.join(allowed)}")
        k, workers = self.num_components, self.workers
        _expect(k == "auto" or (_is_int(k) and int(k) >= 1), "num_components", k, "a whole number from 1, or 'auto'")
        _expect(_is_number(self.variance_threshold), "variance_threshold", self.variance_threshold, "a number")
        _expect(0 < self.variance_threshold <= 1, "variance_threshold", self.variance_threshold, "in (0, 1]")
        _expect(_is_int(self.memory) and self.memory > 0, "memory", self.memory, "a size such as 4GiB")
        _expect(workers is None or (_is_int(workers) and workers >= 1), "workers", workers, "a whole number from 1")
        self._check_limits()
        disk = self.disk_budget
        _expect(disk is None or (_is_int(disk) and disk > 0), "disk_budget", disk, "a size such as 50GiB")
        base, aliases = self.base_model, self.base_aliases
        _expect(base is None or (isinstance(base, str) and bool(base)), "base_model", base, "the name of a model")
        _expect(all(isinstance(a, str) and a for a in aliases), "base_aliases", aliases, "names of a model")
        for name in ("center", "any_base", "share_initial", "discard_moments", "offline"):
            _expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if self.center and self.objective == "delta":
            raise UsageError(
                "center belongs to objective 'factors': under 'delta' a mean depends on the gauge of A and B",
                remedy="Use objective 'factors' for the published method, or leave center off.",
            )
        if self.center:
            object.__setattr__(self, "moment_dtype", "float64")  # S - s s'/n cancels in float32

    def _check_limits(self) -> None:
        size, ratio, error = self.max_bytes, self.ratio, self.max_error
        _expect(size is None or (_is_int(size) and size > 0), "max_bytes", size, "a size such as 500MiB")
        _expect(ratio is None or (_is_number(ratio) and 1 <= ratio < 1e9), "ratio", ratio, "a number from 1")
        _expect(error is None or (_is_number(error) and 0 < error < 1), "max_error", error, "a number in (0, 1)")
        if sum(getattr(self, name) is not None for name in LIMITS) > 1:
            raise UsageError(
                "more than one limit", found=listed(n for n in LIMITS if getattr(self, n) is not None),
                expected=f"one of {listed(LIMITS)}", remedy="Give only one of them.",
            )  # fmt: skip
        if self.limit and self.objective != "delta":
            raise UsageError(
                f"{_flag(self.limit)} needs objective delta: the energies of raw factors cannot be compared",
                remedy="Use objective 'delta', or -k alone.",
            )

    @property
    def limit(self) -> str | None:
        """Which limit is set, if one is: it asks for a coded checkpoint."""
        return next((name for name in LIMITS if getattr(self, name) is not None), None)

    def byte_limit(self, originals: int) -> int | None:
        """The bytes that a checkpoint may have, if there is a limit of bytes; `originals` are those of the sources."""
        return self.max_bytes if self.ratio is None else int(originals / self.ratio)

    @property
    def bought(self) -> tuple[Any, ...]:
        """The limit and its value; empty if k decides."""
        return () if self.limit is None else (self.limit, getattr(self, self.limit))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from plain values (YAML, JSON, keyword arguments); sizes may be text.

        Raises:
            UsageError: on a name or value that cannot be meant.
        """
        values = dict(values)
        if values.pop(TRIM_RANK, False):
            raise trimming_gone()
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise UsageError("unknown setting", found=listed(unknown), expected=listed(sorted(known), 20))
        for name in ("memory", "disk_budget", "max_bytes"):
            if isinstance(values.get(name), str):
                try:
                    values[name] = parse_bytes(values[name])
                except ValueError as e:
                    raise UsageError(f"{name}: {e}") from e
        if isinstance(values.get("num_components"), str) and re.fullmatch("[0-9]{1,9}", values["num_components"]):
            values["num_components"] = int(values["num_components"])
        aliases = values.get("base_aliases", ())
        _expect(isinstance(aliases, str | list | tuple), "base_aliases", aliases, "a name, or a list of them")
        values["base_aliases"] = (aliases,) if isinstance(aliases, str) else tuple(aliases)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)

    def chosen(self) -> dict[str, Any]:
        """The settings on which a checkpoint depends, but for base model and dtype, which it tells: it records them."""
        others = {"memory", "workers", "on_error", "device", "discard_moments", "base_model", "dtype"}
        others |= {"disk_budget", "offline"}
        others |= {name for name in LIMITS if not getattr(self, name)}
        others |= {"num_components", "variance_threshold"} if self.limit else set()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.as_dict().items() if k not in others}

    def binding(self) -> dict[str, Any]:
        """The settings on which the numbers in a workspace depend; the others may change between runs."""
        names = ("objective", "center", "moment_dtype", "share_initial")
        return {name: getattr(self, name) for name in names} | {"quantum": QUANTUM, "blas_threads": 1}


def overridden(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes; k or a limit among these takes the place of whichever there was.

    >>> overridden({"max_error": 0.1, "memory": 1}, {"ratio": 20})
    {'memory': 1, 'ratio': 20}
    """
    ways = ("num_components", *LIMITS)
    replaced = set(ways) if changes.keys() & set(ways) else set()
    return {**{k: v for k, v in values.items() if k not in replaced}, **changes}


def trimming_gone() -> UsageError:
    """The error for a setting of older versions, which trimmed the ranks of adapters."""
    return UsageError("trimming of ranks (--trim-rank) is gone", remedy=_INSTEAD)


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} ({_flag(name)}) cannot be {printable(repr(found))}", expected=expected)


def asked(settings: Mapping[str, Any]) -> list[str]:
    """The limit that was asked for, if there was one."""
    if settings.get("max_bytes") is not None:
        return [f"at most {bytes_shown(settings['max_bytes'])}"]
    if settings.get("ratio") is not None:
        return [f"{settings['ratio']:g} times smaller than the originals"]
    if settings.get("max_error") is not None:
        return [f"a relative dW error of at most {settings['max_error']:g} of every adapter"]
    return []
