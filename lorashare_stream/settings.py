"""Settings: each is declared once, with its type, which pydantic checks, its default, and its option and help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen

from .errors import UsageError
from .machine import memory_limit
from .text import bytes_shown, listed, parse_bytes, printable

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Objective = Literal["delta", "factors"]
MEMORY = 4 << 30  # bytes, unless a control group has less
DIRECTIONS = 48  # of a group, at most
QUANTUM = 1024  # columns summed at once; part of a workspace's identity, since it decides rounding

LIMITS = ("max_bytes", "ratio", "max_error")
SIZES = ("num_components", *LIMITS)  # one of which decides how large a checkpoint is
SOURCES, STORED, MEANS, HUB = "Sources", "What to store", "Where and how", "Hub"  # groups of options


@dataclass(frozen=True)
class Shown:
    """Option of the command line, and words of errors, for a setting.

    Attributes:
        help: what it decides.
        group: the options that it stands with.
        expected: what a value must be; for a choice and a switch its type tells.
        metavar: the word for a value.
        flags: the options, the long one last; none is `--` and its name.
        kind: type of the argument; of text the settings make the rest.
    """

    help: str
    group: str
    expected: str = ""
    metavar: str = ""
    flags: tuple[str, ...] = ()
    kind: type = str


# Not pydantic's ByteSize: that takes 4G for 4e9 bytes, `parse_bytes` for 4 GiB, as schedulers of jobs do.
_Size = Annotated[int, Gt(0)]
_Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True)
class Settings:
    """The settings of a run, each with its meaning beside it.

    `num_components` `"auto"` is the smallest number per group that reaches `variance_threshold`. A limit (`max_bytes`,
    `ratio`, `max_error`), if one is set, decides instead; `directions` need one. `memory` is by default 4 GiB, or what
    the control group allows. `center` needs and gets moments of float64.

    Raises:
        UsageError: on a value that cannot be meant.
    """

    num_components: Annotated[
        Annotated[int, Ge(1)] | Literal["auto"],
        Shown("components per group, or auto (default: 32)", STORED, "a whole number from 1, or 'auto'", "K",
              ("-k", "--num-components")),
    ] = 32  # fmt: skip
    max_bytes: Annotated[
        _Size | None,
        Shown("the best checkpoint of at most this size on disk", STORED, "a size such as 500MiB", "SIZE"),
    ] = None
    ratio: Annotated[
        Annotated[int | float, Ge(1), Lt(1e9)] | None,
        Shown("the best one that is R times smaller than the originals", STORED, "a number from 1", "R", kind=float),
    ] = None
    max_error: Annotated[
        Annotated[int | float, Gt(0), Lt(1)] | None,
        Shown("the smallest one in which no adapter's relative dW error is above E", STORED, "a number in (0, 1)", "E",
              kind=float),
    ] = None  # fmt: skip
    directions: Annotated[
        bool,
        Shown("with a limit: code once what adapters have in common, for fewer bytes from some hundred adapters on",
              STORED),
    ] = False  # fmt: skip
    variance_threshold: Annotated[
        int | float, Gt(0), Le(1),
        Shown("share of a moment's trace that auto keeps (0.95)", STORED, "a number in (0, 1]", "T", ("--variance",),
              float),
    ] = 0.95  # fmt: skip
    objective: Annotated[
        Objective,
        Shown("delta: least error of dW = s B A (default); factors: A and B on their own, as published", STORED),
    ] = "delta"
    center: Annotated[bool, Shown("subtract the mean, as the published method does; factors only", STORED)] = False
    moment_dtype: Annotated[
        Literal["float32", "float64"], Shown("of what is summed (default: float32)", STORED)
    ] = "float32"  # fmt: skip
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Shown("of what is stored (default: auto, the precision of the sources); a limit has no use for it", STORED),
    ] = "auto"
    memory: Annotated[
        _Size,
        Shown("what all processes may use together, or each worker of a cluster (default: 4GiB, or what its control "
              "group has)", MEANS, "a size such as 4GiB", "SIZE"),
    ] = field(default_factory=lambda: min(MEMORY, memory_limit() or MEMORY))  # fmt: skip
    workers: Annotated[
        Annotated[int, Ge(1)] | None,
        Shown("tasks at a time, if memory allows (default: one per core that it may use, or thread of a worker)",
              MEANS, "a whole number from 1", "N", kind=int),
    ] = None  # fmt: skip
    on_error: Annotated[
        Literal["raise", "skip"],
        Shown("raise (default), or skip: go on without adapters that cannot be compressed, or are not there", SOURCES),
    ] = "raise"
    disk_budget: Annotated[
        _Size | None,
        Shown("fetch adapters of the Hub in batches, and again to project them (default: all, into its cache)", HUB,
              "a size such as 50GiB", "SIZE"),
    ] = None  # fmt: skip
    offline: Annotated[bool, Shown("never ask the Hub: what is in its cache must do", HUB)] = False
    device: Annotated[Literal["auto", "cpu", "cuda"], Shown("where to compute (default: auto)", MEANS)] = "auto"
    base_model: Annotated[
        _Text | None,
        Shown("what the adapters are adapters of (default: what most name)", SOURCES, "the name of a model", "ID"),
    ] = None
    base_aliases: Annotated[
        tuple[_Text, ...],
        Shown("other names of the base model (mirrors, quantised copies, local paths)", SOURCES, "names of a model",
              "ID", ("--base-alias",)),
    ] = ()  # fmt: skip
    any_base: Annotated[bool, Shown("accept adapters that name any base model", SOURCES)] = False
    share_initial: Annotated[
        bool,
        Shown("compress adapters whose factors hold a part of the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ), else "
              "kept exact", STORED),
    ] = False  # fmt: skip
    discard_moments: Annotated[
        bool,
        Shown("free moments as soon as bases are fitted: less disk, but another basis reads all sources again", MEANS),
    ] = False

    def __post_init__(self) -> None:
        for name, value in _validated({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}):
            object.__setattr__(self, name, value)
        limits = [name for name in LIMITS if getattr(self, name) is not None]
        if len(limits) > 1:
            raise UsageError(
                "more than one limit", found=listed(limits), expected=f"one of {listed(LIMITS)}",
                remedy="Give only one of them.",
            )  # fmt: skip
        if self.directions and not self.limit:
            raise UsageError(
                "directions belong to a coded checkpoint, which a limit asks for",
                remedy="Give --max-error, --ratio or --max-bytes, in place of k; or leave directions out.",
            )
        if self.limit and self.objective != "delta":
            raise UsageError(
                f"{flags_of(self.limit)[-1]} needs objective delta: the energies of raw factors cannot be compared",
                remedy="Use objective 'delta', or -k alone.",
            )
        if self.center and self.objective == "delta":
            raise UsageError(
                "center belongs to objective 'factors': under 'delta' a mean depends on the gauge of A and B",
                remedy="Use objective 'factors' for the published method, or leave center off.",
            )
        if self.directions:
            object.__setattr__(self, "num_components", DIRECTIONS)
        if self.center:
            object.__setattr__(self, "moment_dtype", "float64")  # S - s s'/n cancels in float32

    @property
    def limit(self) -> str | None:
        """Which limit is set, if one is: it asks for a coded checkpoint."""
        return next((name for name in LIMITS if getattr(self, name) is not None), None)

    @property
    def fits(self) -> bool:
        """Whether something is fitted to all adapters, from moments: bases, or directions."""
        return self.limit is None or self.directions

    def byte_limit(self, originals: int) -> int | None:
        """The bytes that a checkpoint may have, if there is a limit of bytes; `originals` are those of the sources."""
        return self.max_bytes if self.ratio is None else int(originals / self.ratio)

    @property
    def bought(self) -> tuple[Any, ...]:
        """The limit and its value, and whether there are directions; empty if k decides."""
        shared = ("directions",) if self.directions else ()
        return () if self.limit is None else (self.limit, getattr(self, self.limit), *shared)

    @property
    def asked(self) -> list[str]:
        """The limit, in words, if one is set."""
        shared = ", on directions" if self.directions else ""
        if self.max_bytes is not None:
            return [f"at most {bytes_shown(self.max_bytes)}{shared}"]
        if self.ratio is not None:
            return [f"{self.ratio:g} times smaller than the originals{shared}"]
        if self.max_error is not None:
            return [f"a relative dW error of at most {self.max_error:g} of every adapter{shared}"]
        return []

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from plain values (YAML, JSON, keyword arguments); sizes may be text. Raises UsageError."""
        values = dict(values)
        for name in ("memory", "disk_budget", "max_bytes"):
            if isinstance(values.get(name), str):
                try:
                    values[name] = parse_bytes(values[name])
                except ValueError as e:
                    raise UsageError(f"{name}: {e}") from e
        if isinstance(values.get("num_components"), str) and re.fullmatch("[0-9]{1,9}", values["num_components"]):
            values["num_components"] = int(values["num_components"])
        aliases = values.get("base_aliases", ())
        if not isinstance(aliases, str | list | tuple):
            raise _fault("base_aliases", aliases, "a name, or a list of them")
        values["base_aliases"] = (aliases,) if isinstance(aliases, str) else tuple(aliases)
        if not values.keys() <= TYPES.keys():
            _validated(values)
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)

    def chosen(self) -> dict[str, Any]:
        """The settings on which a checkpoint depends, but for base model and dtype, which it tells: it records them."""
        others = {"memory", "workers", "on_error", "device", "discard_moments", "disk_budget", "offline"}
        others |= {"base_model", "dtype"} | {name for name in LIMITS if not getattr(self, name)}
        others |= {"num_components", "variance_threshold"} if self.limit else set()
        others |= set() if self.directions else {"directions"}
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
    replaced = set(SIZES) if changes.keys() & {*SIZES} else set()
    replaced |= {"directions"} if replaced and not changes.keys() & {*LIMITS} else set()
    replaced |= {"num_components"} if "directions" in changes else set()  # which they have set
    return {**{k: v for k, v in values.items() if k not in replaced}, **changes}


TYPES: dict[str, Any] = get_type_hints(Settings, include_extras=True)


def shown(name: str) -> Shown:
    """What the command line shows of a setting."""
    return next(part for part in get_args(TYPES[name]) if isinstance(part, Shown))


def flags_of(name: str) -> tuple[str, ...]:
    """The options of the command line that set a setting."""
    return shown(name).flags or (f"--{name.replace('_', '-')}",)


def choices_of(name: str) -> tuple[str, ...]:
    """The values that a setting may have, if they are words of a list."""
    kind = get_args(TYPES[name])[0]
    return get_args(kind) if get_origin(kind) is Literal else ()


@cache
def _schema() -> type[BaseModel]:
    """Pydantic model of all settings; imported when there is something to check."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {name: (kind, None) for name, kind in TYPES.items()}
    return create_model("Settings", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _validated(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Names and values of settings, checked by their types; numbers of NumPy become Python's. Raises UsageError."""
    from pydantic import ValidationError

    try:
        return _schema().model_validate(values)
    except ValidationError as e:
        raise _usage_error(e, values) from e


def _usage_error(error: ValidationError, values: Mapping[str, Any]) -> UsageError:
    """The error for what pydantic found: names that are unknown, or else the first value that cannot be meant."""
    unknown = sorted(str(name) for name in values if name not in TYPES)
    if unknown:
        return UsageError("unknown setting", found=listed(unknown), expected=listed(sorted(TYPES), 20))
    name = str(error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"][0])
    choices = choices_of(name)
    expected = f"one of {', '.join(choices)}" if choices else shown(name).expected or "true or false"
    return _fault(name, values[name], expected)


def _fault(name: str, found: object, expected: str) -> UsageError:
    return UsageError(f"{name} ({flags_of(name)[0]}) cannot be {printable(repr(found))}", expected=expected)
