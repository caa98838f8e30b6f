"""Which adapters belong together: those of one base model, with the same d in every group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from .errors import AdapterError
from .keys import SIDES, Side
from .layout import Layout
from .settings import Settings

T = TypeVar("T")


class Described(Protocol):
    """What of an adapter decides whether it agrees with others: its name, its base model's name, its tensors."""

    @property
    def name(self) -> str:
        """The adapter's name."""
        ...

    @property
    def base_model(self) -> str | None:
        """The base model that its configuration names."""
        ...

    @property
    def layout(self) -> Layout:
        """Its tensors."""
        ...


E = TypeVar("E", bound=Described)


def common_base(named: Iterable[str | None], settings: Settings, bound: str | None = None) -> str:
    """The name of the base model that all are taken to be of; empty if nothing names one.

    Args:
        named: what each adapter's configuration names.
        settings: `base_model` decides; else an alias counts as the commonest name among its like.
        bound: the base model that a workspace already has.
    """
    if settings.base_model is not None:
        return settings.base_model
    if bound:
        return bound
    counts = Counter(name for name in named if name is not None)
    alike = [name for name in counts if name in settings.base_aliases]
    if alike:
        most = _commonest(Counter({name: counts[name] for name in alike}))
        together = sum(counts[name] for name in alike)
        counts = Counter({name: n for name, n in counts.items() if name not in alike} | {str(most): together})
    return _commonest(counts) or ""


def of_base(entries: Sequence[E], base: str, settings: Settings) -> tuple[list[E], list[AdapterError]]:
    """Split off adapters that name another base model, unless it is an alias or any is accepted."""
    accepted = {None, base, *settings.base_aliases}
    others = [e for e in entries if e.base_model not in accepted and not settings.any_base]
    refused = [
        AdapterError(
            "made for another base model than the collection",
            adapter=entry.name,
            key="base_model_name_or_path",
            found=entry.base_model,
            expected=" or ".join([base, *settings.base_aliases]),
            remedy="If it is the same model under another name, say so by --base-alias, or accept all names "
            "by --any-base; if not, compress the adapters of each base model on their own.",
        )
        for entry in others
    ]
    gone = {e.name for e in others}
    return [e for e in entries if e.name not in gone], refused


def of_shape(entries: Sequence[E]) -> tuple[list[E], list[AdapterError]]:
    """Split off adapters with another d in some group than most have."""
    uses = Counter(e.layout.digest for e in entries)
    layouts = {e.layout.digest: e.layout for e in entries}
    dims: dict[tuple[str, Side], Counter[int]] = {}
    for digest, layout in layouts.items():
        for module in layout.modules:
            for side in SIDES:
                dims.setdefault((module.name, side), Counter())[module.dim(side)] += uses[digest]
    common = {group: _commonest(counts) for group, counts in dims.items()}
    odd = {digest: _odd_shape(layout, common) for digest, layout in layouts.items()}
    refused = [_other_shape(e.name, *found) for e in entries if (found := odd[e.layout.digest]) is not None]
    return [e for e in entries if odd[e.layout.digest] is None], refused


def _commonest(counts: Counter[T]) -> T | None:
    return min(counts, key=lambda value: (-counts[value], str(value)), default=None)


def _odd_shape(layout: Layout, common: Mapping[tuple[str, Side], int | None]) -> tuple[str, int, int | None] | None:
    for module in layout.modules:
        for side in SIDES:
            if module.dim(side) != common[module.name, side]:
                return module.record(side).name, module.dim(side), common[module.name, side]
    return None


def _other_shape(name: str, key: str, dim: int, common: int | None) -> AdapterError:
    return AdapterError(
        "a shape that differs from the rest of its group",
        adapter=name,
        key=key,
        found=f"d = {dim}",
        expected=f"d = {common}, as most adapters have",
        remedy="It belongs to another base model, or to a resized one: leave it out.",
    )
