"""Compatibility of adapters: one base model, and modules of one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ..adapters.adapter import Adapter
from ..adapters.layout import Reason
from ..adapters.scaling import ModuleShape, Shapes
from ..errors import AdapterError
from ..settings import Settings

T = TypeVar("T")


def common_base(named: Iterable[str | None], settings: Settings, bound: str | None = None) -> str:
    """The common base model: that of the settings, of the workspace (`bound`), or the one that most adapters name.

    An alias is taken only if no other name is there; empty if there is none at all.
    """
    if settings.base_model is not None:
        return settings.base_model
    if bound:
        return bound
    counts = Counter(name for name in named if name is not None)
    proper = Counter({name: n for name, n in counts.items() if name not in settings.base_aliases})
    return _commonest(proper or counts) if counts else ""


def of_other_base(adapters: Iterable[Adapter], base: str, settings: Settings) -> dict[str, AdapterError]:
    """Errors, by name, of adapters that name another base model, unless it is an alias or any is accepted."""
    accepted = {None, base, *settings.base_aliases}
    return {
        adapter.name: AdapterError(
            "made for another base model than the collection",
            key="base_model_name_or_path",
            found=adapter.base_model,
            expected=" or ".join([base, *settings.base_aliases]),
            remedy="If it is the same model under another name, say so by --base-alias, or accept all names "
            "by --any-base; if not, compress the adapters of each base model on their own.",
        )
        for adapter in adapters
        if adapter.base_model not in accepted and not settings.any_base
    }


class Misfit(NamedTuple):
    """The first difference of a module from the same module of most adapters.

    Attributes:
        what: `d_in`, `d_out` or `stacked experts`; empty if they are other parameters.
        found, common: the number of this module, and of most.
    """

    what: str = ""
    found: int = 0
    common: int = 0

    @property
    def reason(self) -> Reason:
        """The reason to keep the module verbatim."""
        if not self.what:
            return Reason(
                "its target_parameters are others than those of most adapters, or of those that were summed before"
            )
        return Reason(
            f"{self.what} is {self.common} there in most adapters, or in those that were summed before",
            f"{self.what} = {self.found}",
        )


def misfits(adapters: Sequence[Adapter], known: Shapes) -> dict[str, dict[str, Misfit]]:
    """Adapter's name -> its modules that differ from those of their name in most adapters; ranks do not count.

    They have another shape, or are other parameters: PEFT nests the `target_parameters` of a module in each other, so
    that a key means one parameter if that alone is adapted, and another if two are. The `known` modules, of a
    workspace or of the bases of a checkpoint, are not outvoted.
    """
    # Equal layouts and scalings are kept once, so that few have to be compared.
    kinds = [(e.layout.digest, id(e.scalings)) for e in adapters]
    shapes_of = {kind: adapter.shapes for kind, adapter in zip(kinds, adapters, strict=True)}
    counts: dict[str, Counter[ModuleShape]] = {}
    for kind, n in Counter(kinds).items():
        for module, shape in shapes_of[kind].items():
            counts.setdefault(module, Counter())[shape._replace(rank=0)] += n
    common = {module: _common(of_module, known.get(module)) for module, of_module in counts.items()}
    odd = {
        kind: {m: misfit for m, shape in shapes.items() if (misfit := _difference(shape, common[m])) is not None}
        for kind, shapes in shapes_of.items()
    }
    return {e.name: odd[kind] for kind, e in zip(kinds, adapters, strict=True) if odd[kind]}


def _common(counts: Counter[ModuleShape], known: ModuleShape | None) -> ModuleShape:
    if known is None:
        return _commonest(counts)
    if known.experts:
        return known
    alike = Counter({shape: n for shape, n in counts.items() if shape[1:3] == known[1:3]})  # a basis tells d alone
    return _commonest(alike) if alike else known._replace(experts=1)


def _difference(found: ModuleShape, common: ModuleShape) -> Misfit | None:
    if found.parameters != common.parameters:
        return Misfit()
    both = zip(("d_in", "d_out", "stacked experts"), found[1:4], common[1:4], strict=True)
    return next((Misfit(*told) for told in both if told[1] != told[2]), None)


def _commonest(counts: Counter[T]) -> T:
    return min(counts, key=lambda value: (-counts[value], str(value)))


def of_other_shape(adapters: Iterable[Adapter], odd: Mapping[str, Mapping[str, Misfit]]) -> dict[str, AdapterError]:
    """Errors, by name, of adapters most of whose modules have another shape: they are of another base model."""
    refused = {}
    for adapter in adapters:
        modules = [m for m, misfit in odd.get(adapter.name, {}).items() if misfit.what]
        if 2 * len(modules) <= len(adapter.layout.modules):
            continue
        what, found, common = odd[adapter.name][modules[0]]
        count = f"{len(modules)} of {len(adapter.layout.modules)} modules"
        refused[adapter.name] = AdapterError(
            f"shapes that differ from those of most adapters in {count}",
            key=adapter.layout.by_name[modules[0]].record("B" if what == "d_out" else "A").name,
            found=f"{what} = {found}",
            expected=f"{what} = {common}, as most adapters have, or those that were summed before",
            remedy="It belongs to another base model, or to a resized one: leave it out, or code each adapter alone, "
            "by --max-error without --directions.",
        )
    return refused
