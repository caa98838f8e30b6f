"""Which adapters belong together: those of one base model, with the same d in every group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ..adapters.adapter import Adapter
from ..adapters.shapes import ModuleShape, Shapes
from ..errors import AdapterError
from ..settings import Settings

T = TypeVar("T")
Shape = tuple[int, int, int]  # d_in, d_out, and how many experts are stacked, of one module


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


def other_parameters(adapters: Sequence[Adapter], known: Shapes) -> set[str]:
    """The names of adapters in which some module's name means other parameters than in most.

    PEFT nests the `target_parameters` of a module in each other, so that a key means one parameter if that alone is
    adapted, and another if two are. Here and in `of_shape`, what is `known` of a workspace's modules is not outvoted.
    """
    odd, _ = _odd(adapters, _parameters, known)
    return set(odd)


def of_shape(adapters: Sequence[Adapter], known: Shapes) -> tuple[list[Adapter], list[AdapterError]]:
    """Split off adapters in which some module has another shape than most have: they mean another layer by its name."""
    odd, common = _odd(adapters, _shape, known)
    refused = [_other_shape(e, odd[e.name], common[odd[e.name]]) for e in adapters if e.name in odd]
    return [e for e in adapters if e.name not in odd], refused


def _shape(shape: ModuleShape) -> Shape:
    return shape.d_in, shape.d_out, shape.experts


def _parameters(shape: ModuleShape) -> tuple[str, ...]:
    return shape.parameters


def _odd(
    adapters: Sequence[Adapter], trait: Callable[[ModuleShape], T], known: Shapes
) -> tuple[dict[str, str], dict[str, T]]:
    """Adapters in which a trait of some module is not the known one, or that of most.

    Returns:
        The first such module by the adapter's name, and what an adapter must have by module.
    """
    # Equal layouts and products are kept once, so that few have to be looked at.
    kinds = [(e.layout.digest, id(e.scalings)) for e in adapters]
    uses = Counter(kinds)
    found = {
        kind: {module: trait(shape) for module, shape in adapter.shapes.items()}
        for kind, adapter in dict(zip(kinds, adapters, strict=True)).items()
    }
    counts: dict[str, Counter[T]] = {}
    for kind, of_modules in found.items():
        for module, value in of_modules.items():
            counts.setdefault(module, Counter())[value] += uses[kind]
    common = {m: trait(known[m]) if m in known else _commonest(of_module) for m, of_module in counts.items()}
    first = {
        kind: next((m for m, value in of_modules.items() if value != common[m]), None)
        for kind, of_modules in found.items()
    }
    odd = {e.name: first[kind] for kind, e in zip(kinds, adapters, strict=True)}
    return {name: module for name, module in odd.items() if module is not None}, common


def _commonest(counts: Counter[T]) -> T:
    return min(counts, key=lambda value: (-counts[value], str(value)))


def _other_shape(adapter: Adapter, module: str, common: Shape) -> AdapterError:
    shape = _shape(adapter.shapes[module])
    number = next(i for i in range(3) if shape[i] != common[i])
    what = "stacked experts" if number == 2 else "d"
    return AdapterError(
        "a shape that differs from the rest of its group",
        adapter=adapter.name,
        key=adapter.layout.by_name[module].record("B" if number == 1 else "A").name,
        found=f"{what} = {shape[number]}",
        expected=f"{what} = {common[number]}, as most adapters have, or those in the workspace",
        remedy="It belongs to another base model, or to a resized one: leave it out.",
    )
