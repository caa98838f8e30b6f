"""Which adapters belong together: those of one base model, with the same d in every group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from .deltas import Product
from .errors import AdapterError
from .layout import Layout
from .settings import Settings

T = TypeVar("T")
Shape = tuple[int, int, int]  # d_in, d_out, and how many experts are stacked, of one module


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

    @property
    def products(self) -> tuple[Product, ...]:
        """How dW comes of the factors of each module."""
        ...


E = TypeVar("E", bound=Described)


def common_base(named: Iterable[str | None], settings: Settings, bound: str | None = None) -> str:
    """The name of the base model that all are taken to be of; empty if nothing names one.

    Args:
        named: what each adapter's configuration names.
        settings: `base_model` decides; else the commonest name that is not said to be an alias.
        bound: the base model that a workspace already has.
    """
    if settings.base_model is not None:
        return settings.base_model
    if bound:
        return bound
    counts = Counter(name for name in named if name is not None)
    proper = Counter({name: n for name, n in counts.items() if name not in settings.base_aliases})
    return _commonest(proper or counts) if counts else ""


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
    """Split off adapters in which some module has another shape than most have: they mean another layer by its name."""
    kinds = [(e.layout.digest, tuple(p.experts for p in e.products)) for e in entries]
    uses = Counter(kinds)
    layouts = {kind: e.layout for kind, e in zip(kinds, entries, strict=True)}
    shapes = {kind: _shapes(layout, kind[1]) for kind, layout in layouts.items()}
    found: dict[str, Counter[Shape]] = {}
    for kind, of_kind in shapes.items():
        for module, shape in of_kind.items():
            found.setdefault(module, Counter())[shape] += uses[kind]
    common = {module: _commonest(counts) for module, counts in found.items()}
    odd = {kind: [m for m, shape in of_kind.items() if shape != common[m]] for kind, of_kind in shapes.items()}
    refused = [
        _other_shape(entry, odd[kind][0], shapes[kind][odd[kind][0]], common[odd[kind][0]])
        for kind, entry in zip(kinds, entries, strict=True)
        if odd[kind]
    ]
    return [e for kind, e in zip(kinds, entries, strict=True) if not odd[kind]], refused


def _shapes(layout: Layout, experts: tuple[int, ...]) -> dict[str, Shape]:
    return {m.name: (m.dim("A"), m.dim("B"), e) for m, e in zip(layout.modules, experts, strict=True)}


def _commonest(counts: Counter[T]) -> T:
    return min(counts, key=lambda value: (-counts[value], str(value)))


def _other_shape(entry: Described, module: str, shape: Shape, common: Shape) -> AdapterError:
    number = next(i for i in range(3) if shape[i] != common[i])
    what = "stacked experts" if number == 2 else "d"
    return AdapterError(
        "a shape that differs from the rest of its group",
        adapter=entry.name,
        key=entry.layout.by_name[module].record("B" if number == 1 else "A").name,
        found=f"{what} = {shape[number]}",
        expected=f"{what} = {common[number]}, as most adapters have",
        remedy="It belongs to another base model, or to a resized one: leave it out.",
    )
