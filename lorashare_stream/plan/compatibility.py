"""Which adapters belong together: those of one base model; and which of their modules."""

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


def of_base(adapters: Sequence[Adapter], base: str, settings: Settings) -> tuple[list[Adapter], list[AdapterError]]:
    """Split off adapters that name another base model, unless it is an alias or any is accepted."""
    accepted = {None, base, *settings.base_aliases}
    others = [e for e in adapters if e.base_model not in accepted and not settings.any_base]
    refused = [
        AdapterError(
            "made for another base model than the collection",
            adapter=adapter.name,
            key="base_model_name_or_path",
            found=adapter.base_model,
            expected=" or ".join([base, *settings.base_aliases]),
            remedy="If it is the same model under another name, say so by --base-alias, or accept all names "
            "by --any-base; if not, compress the adapters of each base model on their own.",
        )
        for adapter in others
    ]
    gone = {e.name for e in others}
    return [e for e in adapters if e.name not in gone], refused


class Misfit(NamedTuple):
    """The shape that a module of an adapter has, and the one that it has in most; their ranks do not count."""

    found: ModuleShape
    common: ModuleShape


def misfits(adapters: Sequence[Adapter], known: Shapes) -> dict[str, dict[str, Misfit]]:
    """The modules of adapters that mean others than modules of their name in most, by the adapter's name.

    They have another shape, or are other parameters: PEFT nests the `target_parameters` of a module in each other, so
    that a key means one parameter if that alone is adapted, and another if two are. What is `known` of the modules in
    a workspace, or of those that a checkpoint has bases for, is not outvoted.
    """
    # Equal layouts and products are kept once, so that few have to be looked at.
    kinds = [(e.layout.digest, id(e.scalings)) for e in adapters]
    uses = Counter(kinds)
    found = {
        kind: {module: shape._replace(rank=0) for module, shape in adapter.shapes.items()}
        for kind, adapter in dict(zip(kinds, adapters, strict=True)).items()
    }
    counts: dict[str, Counter[ModuleShape]] = {}
    for kind, shapes in found.items():
        for module, shape in shapes.items():
            counts.setdefault(module, Counter())[shape] += uses[kind]
    common = {module: _common(of_module, known.get(module)) for module, of_module in counts.items()}
    odd = {
        kind: {m: Misfit(shape, common[m]) for m, shape in shapes.items() if shape != common[m]}
        for kind, shapes in found.items()
    }
    return {e.name: odd[kind] for kind, e in zip(kinds, adapters, strict=True) if odd[kind]}


def _common(counts: Counter[ModuleShape], known: ModuleShape | None) -> ModuleShape:
    if known is None:
        return _commonest(counts)
    if known.experts:
        return known._replace(rank=0)
    alike = Counter({shape: n for shape, n in counts.items() if shape[1:3] == known[1:3]})  # a basis tells d alone
    return _commonest(alike) if alike else known._replace(experts=1)


def of_shape(
    adapters: Sequence[Adapter], odd: Mapping[str, Mapping[str, Misfit]]
) -> tuple[list[Adapter], list[AdapterError]]:
    """Split off adapters most of whose modules have another shape than in most: they are of another base model."""
    found = {e.name: [m for m, misfit in odd.get(e.name, {}).items() if _shape_told(misfit)] for e in adapters}
    gone = {e.name for e in adapters if 2 * len(found[e.name]) > len(e.layout.modules)}
    refused = [_other_shape(e, found[e.name], odd[e.name]) for e in adapters if e.name in gone]
    return [e for e in adapters if e.name not in gone], refused


def reason_of(misfit: Misfit) -> Reason:
    """Why a module that is another than in most adapters shares nothing with them."""
    told = _shape_told(misfit)
    if told is None:
        return Reason(
            "its target_parameters are others than those of most adapters, or of those that were summed before"
        )
    what, found, common = told
    return Reason(
        f"{what} is {common} there in most adapters, or in those that were summed before", f"{what} = {found}"
    )


def _shape_told(misfit: Misfit) -> tuple[str, int, int] | None:
    """Where two shapes differ: in what, and both numbers; None if they are of other parameters."""
    if misfit.found.parameters != misfit.common.parameters:
        return None
    both = zip(("d_in", "d_out", "stacked experts"), misfit.found[1:4], misfit.common[1:4], strict=True)
    return next((told for told in both if told[1] != told[2]), None)


def _commonest(counts: Counter[T]) -> T:
    return min(counts, key=lambda value: (-counts[value], str(value)))


def _other_shape(adapter: Adapter, modules: Sequence[str], odd: Mapping[str, Misfit]) -> AdapterError:
    told = _shape_told(odd[modules[0]])
    assert told is not None
    what, found, common = told
    return AdapterError(
        f"shapes that differ from those of most adapters in {len(modules)} of {len(adapter.layout.modules)} modules",
        adapter=adapter.name,
        key=adapter.layout.by_name[modules[0]].record("B" if what == "d_out" else "A").name,
        found=f"{what} = {found}",
        expected=f"{what} = {common}, as most adapters have, or those that were summed before",
        remedy="It belongs to another base model, or to a resized one: leave it out, or code each adapter alone, by "
        "--max-error without --directions.",
    )
