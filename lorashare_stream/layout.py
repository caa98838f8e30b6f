"""The tensors of one adapter, from its header: modules that are shared, extras that are kept verbatim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .dtypes import FLOATS
from .errors import AdapterError
from .keys import SIDES, Key, Side, factor_key, foreign_kind, parse_key
from .tensorfile import TensorRecord


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer that is shared: lora_A (r, d_in) and lora_B (d_out, r), both 2-D and of float type."""

    name: str
    a: TensorRecord
    b: TensorRecord

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[0]

    def record(self, side: Side) -> TensorRecord:
        """The tensor of one side."""
        return self.a if side == "A" else self.b

    def dim(self, side: Side) -> int:
        """The length d of the vectors of one side: d_in for A, d_out for B."""
        return self.a.shape[1] if side == "A" else self.b.shape[0]


@dataclass(frozen=True)
class Layout:
    """The tensors of an adapter. Adapters saved by one script have equal headers and share one layout.

    Attributes:
        modules: what is compressed.
        extras: (key as PEFT saves it, record) of what is kept verbatim.
        notes: LoRA tensors among the extras, with the reason why they are not shared.
        digest: of all records; equal digests mean equal layouts.
    """

    modules: tuple[Module, ...]
    extras: tuple[tuple[str, TensorRecord], ...]
    notes: tuple[tuple[str, str], ...]
    digest: str

    @cached_property
    def by_name(self) -> dict[str, Module]:
        """Modules by name."""
        return {m.name: m for m in self.modules}

    @cached_property
    def in_file_order(self) -> tuple[tuple[TensorRecord, str | None, Side | None], ...]:
        """All tensors as they lie in the files, with module and side of those that are shared."""
        shared = [(m.record(side), m.name, side) for m in self.modules for side in SIDES]
        everything = [*shared, *((record, None, None) for _, record in self.extras)]
        return tuple(sorted(everything, key=lambda item: (item[0].file, item[0].offset)))

    @cached_property
    def lora_bytes(self) -> int:
        """Bytes of the tensors that are compressed."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules)

    @cached_property
    def extra_bytes(self) -> int:
        """Bytes of the tensors that are kept verbatim."""
        return sum(record.nbytes for _, record in self.extras)


def read_layout(records: Sequence[TensorRecord], digest: str) -> Layout:
    """Sort an adapter's tensors into shared modules and extras.

    Raises:
        AdapterError: for another kind of file, empty tensors, clashing keys, or several adapters in one file.
    """
    kind = foreign_kind(r.name for r in records)
    if kind is not None:
        raise AdapterError(f"not a PEFT LoRA: the keys are those of {kind}", key=records[0].name, expected="LORA keys")
    keyed: dict[str, tuple[Key, TensorRecord]] = {}
    for record in records:
        key = parse_key(record.name)
        if 0 in record.shape:
            raise AdapterError(
                "an empty tensor: ZeRO-3 or FSDP shards that were not gathered before saving",
                key=record.name,
                found=list(record.shape),
                remedy="Gather the weights and save the adapter again.",
            )
        if key.canonical in keyed:
            raise AdapterError(
                "two keys mean the same tensor", key=record.name, found=keyed[key.canonical][1].name, expected="one key"
            )
        keyed[key.canonical] = key, record
    named = sorted({key.adapter for key, _ in keyed.values() if key.adapter is not None})
    if len(named) > 1:
        raise AdapterError("several adapters in one file", found=named, remedy="Save each into a folder of its own.")
    if not any(".lora_" in canonical for canonical in keyed):
        raise AdapterError(
            "holds no LoRA tensors", found=sorted(keyed)[:3] or "no tensors", expected="lora_A and lora_B"
        )
    return _paired(keyed, digest)


def _paired(keyed: Mapping[str, tuple[Key, TensorRecord]], digest: str) -> Layout:
    modules: list[Module] = []
    notes: list[tuple[str, str]] = []
    names = dict.fromkeys(key.module for key, _ in keyed.values() if key.module is not None)
    for name in sorted(names):
        pair = {side: keyed[factor_key(name, side)][1] for side in SIDES if factor_key(name, side) in keyed}
        reason = _unshared(pair)
        if reason is None:
            modules.append(Module(name, pair["A"], pair["B"]))
        else:
            notes += [(factor_key(name, side), reason) for side in pair]
    shared = {factor_key(m.name, side) for m in modules for side in SIDES}
    extras = tuple((canonical, record) for canonical, (_, record) in sorted(keyed.items()) if canonical not in shared)
    return Layout(tuple(modules), extras, tuple(notes), digest)


def _unshared(pair: Mapping[Side, TensorRecord]) -> str | None:
    """Why a module's factors are kept verbatim, or None if they are shared."""
    if len(pair) < 2:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"{len(a.shape)}-D lora_A and {len(b.shape)}-D lora_B (a convolution)"
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return f"dtype {a.dtype}"
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            "lora_A and lora_B of a module differ in rank",
            key=b.name,
            found=f"lora_B {list(b.shape)}",
            expected=f"lora_A {list(a.shape)}: rank {a.shape[0]}",
            remedy="Save the adapter again, or leave it out.",
        )
    return None
