"""The tensors of one adapter, from its header: modules that are shared, extras that are kept verbatim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from ..errors import AdapterError
from .dtypes import FLOATS, Float32, stacked
from .foreign import CONVERT, foreign_kind, named_by_tinker, remedy_of
from .keys import PEFT_PREFIX, SIDES, Key, Side, adapter_names, factor_key, parse_key
from .safetensors import TensorReader, TensorRecord

STACK_BYTES = 2 << 20  # of what is handled at once, in float32; threads wait for each other at every call
FileItem = tuple[TensorRecord, str | None, Side | None]  # a tensor; module and side if it is shared


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

    @property
    def bytes(self) -> int:
        """Bytes of both sides in float32."""
        return 4 * self.rank * (self.dim("A") + self.dim("B"))


@dataclass(frozen=True)
class Stack:
    """Tensors of one side, shape and dtype in one file: a call for each would cost more than its arithmetic."""

    side: Side
    modules: tuple[str, ...]
    records: tuple[TensorRecord, ...]

    @cached_property
    def _place(self) -> tuple[TensorRecord, list[int]]:
        """The last tensor in the file, and the offsets of all."""
        return max(self.records, key=lambda r: r.offset), [r.offset for r in self.records]

    def read(self, tensors: TensorReader) -> Float32:
        """The tensors (m, *shape), as they are stored; a view where there can be one."""
        last, offsets = self._place
        return stacked(tensors.through(last), offsets, last.dtype, last.shape)


@dataclass(frozen=True)
class ModuleBatch:
    """Modules of one shape and dtype on each side."""

    modules: tuple[Module, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(m.name for m in self.modules)

    @cached_property
    def _stacks(self) -> tuple[Stack, ...]:
        return tuple(Stack(side, self.names, tuple(m.record(side) for m in self.modules)) for side in SIDES)

    def read(self, tensors: TensorReader) -> dict[Side, Float32]:
        """The tensors: A (m, r, d_in), B (m, d_out, r)."""
        return {stack.side: stack.read(tensors) for stack in self._stacks}


def module_batches(modules: Iterable[Module], *, alone: bool = False) -> tuple[ModuleBatch, ...]:
    """Modules in batches of bounded size, in file order; each in one of its own if `alone`."""
    alike: dict[object, list[Module]] = {}
    for i, m in enumerate(sorted(modules, key=lambda m: (m.a.file, m.a.offset))):
        kind = m.a.file, m.b.file, m.a.shape, m.b.shape, m.a.dtype, m.b.dtype
        alike.setdefault((kind, alone and i), []).append(m)
    found = []
    for some in alike.values():
        size = max(1, STACK_BYTES // max(1, some[0].bytes))
        found += [ModuleBatch(tuple(some[i : i + size])) for i in range(0, len(some), size)]
    return tuple(found)


@dataclass(frozen=True)
class Chunk:
    """Neighbours in a file, and those of them that are shared, in stacks."""

    records: tuple[TensorRecord, ...]
    stacks: tuple[Stack, ...]


def chunks(items: Iterable[FileItem], *, alone: bool = False) -> tuple[Chunk, ...]:
    """All tensors of an adapter, in file order, in chunks of bounded size; what is not shared in chunks of its own."""
    parts: list[list[FileItem]] = []
    held = 0
    for item in items:
        record, module, _ = item
        size = 4 * math.prod(record.shape)
        last = parts[-1][-1] if parts else None
        fits = last is not None and last[0].file == record.file and None not in (last[1], module)
        if not fits or held + size > STACK_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += size
    return tuple(_chunk(part, alone=alone) for part in parts)


def _chunk(items: Sequence[FileItem], *, alone: bool) -> Chunk:
    alike: dict[tuple[Side, object], list[tuple[str, TensorRecord]]] = {}
    for i, (record, module, side) in enumerate(items):
        if module is not None and side is not None:
            alike.setdefault((side, (record.shape, record.dtype, alone and i)), []).append((module, record))
    stacks = [Stack(side, tuple(m for m, _ in some), tuple(r for _, r in some)) for (side, _), some in alike.items()]
    return Chunk(tuple(record for record, _, _ in items), tuple(stacks))


@dataclass(frozen=True)
class Layout:
    """The tensors of an adapter. Adapters saved by one script have equal headers and share one layout.

    Attributes:
        modules: what is compressed.
        extras: (key as PEFT saves it, record) of what is kept verbatim.
        notes: what the user should know: LoRA tensors among the extras, with the reason why they are not shared.
        digest: of all records and of what else decides a layout; equal digests mean equal layouts.
    """

    modules: tuple[Module, ...] = field(compare=False)
    extras: tuple[tuple[str, TensorRecord], ...] = field(compare=False)
    notes: tuple[str, ...] = field(compare=False)
    digest: str

    @cached_property
    def by_name(self) -> dict[str, Module]:
        """Modules by name."""
        return {m.name: m for m in self.modules}

    @cached_property
    def position(self) -> dict[str, int]:
        """Where each module is in `modules`."""
        return {m.name: i for i, m in enumerate(self.modules)}

    @cached_property
    def in_file_order(self) -> tuple[FileItem, ...]:
        """All tensors as they lie in the files, with module and side of those that are shared."""
        shared: list[FileItem] = [(m.record(side), m.name, side) for m in self.modules for side in SIDES]
        everything = [*shared, *((record, None, None) for _, record in self.extras)]
        return tuple(sorted(everything, key=lambda item: (item[0].file, item[0].offset)))

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All tensors, in file order."""
        return chunks(self.in_file_order)

    @cached_property
    def module_batches(self) -> tuple[ModuleBatch, ...]:
        """The shared modules."""
        return module_batches(self.modules)

    @cached_property
    def lora_bytes(self) -> int:
        """Bytes of the tensors that are compressed."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules)

    @cached_property
    def extra_bytes(self) -> int:
        """Bytes of the tensors that are kept verbatim."""
        return sum(record.nbytes for _, record in self.extras)


NOTHING = Layout((), (), (), "")
_Keyed = Mapping[str, tuple[Key, TensorRecord]]  # by the key as PEFT saves it
_ShapesAB = tuple[tuple[int, ...], tuple[int, ...]]


def read_layout(records: Sequence[TensorRecord], *, exact: str | None = None, tied: bool = False) -> Layout:
    """Sort an adapter's tensors into shared modules and extras.

    Args:
        records: of its files.
        exact: why nothing of it is shared; None if there is no such reason.
        tied: whether PEFT ties LoRA of the output layer to that of the embedding, which is kept verbatim.

    Raises:
        AdapterError: for another kind of file, empty tensors, clashing keys, or several adapters in one file.
    """
    named = adapter_names(r.name for r in records)
    if len(named) > 1:
        raise AdapterError("several adapters in one file", found=named, remedy="Save each into a folder of its own.")
    keyed = _keyed(records, named[0] if named else "")
    _refuse_foreign(records, keyed)
    if not any(".lora_" in canonical for canonical in keyed):
        raise AdapterError(
            "holds no LoRA tensors", found=sorted(keyed)[:3] or "no tensors", expected="lora_A and lora_B",
            remedy="Leave it out; if it was trained under ZeRO-3 or FSDP, gather the weights and save it again.",
        )  # fmt: skip
    digest = _digest(records, exact, tied)
    if exact is not None:
        extras = tuple((canonical, record) for canonical, (_, record) in sorted(keyed.items()))
        return Layout((), extras, (_exact_note(exact), *_key_notes(keyed)), digest)
    return _paired(keyed, digest, _embeddings(keyed) if tied else frozenset())


class Reason(NamedTuple):
    """Why the factors of a module are kept verbatim: the same for many adapters; and what was found, of this one."""

    why: str
    found: str = ""


def kept_verbatim(layout: Layout, reasons: Mapping[str, Reason]) -> Layout:
    """The layout of the same tensors, of which those of some modules, named with the reasons, are not shared."""
    shared = tuple(m for m in layout.modules if m.name not in reasons)
    kept = [(factor_key(name, side), layout.by_name[name].record(side)) for name in reasons for side in SIDES]
    notes = [_verbatim_note(name, reason) for name, reason in reasons.items()]
    if not shared:
        notes = list(dict.fromkeys(_exact_note(reason.why) for reason in reasons.values()))
    return Layout(
        shared, tuple(sorted([*layout.extras, *kept])), (*notes, *layout.notes), _digest(layout.digest, notes)
    )


def with_note(layout: Layout, note: str) -> Layout:
    """The same layout with something more that the user should know."""
    return replace(layout, notes=(*layout.notes, note), digest=_digest(layout.digest, note))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _verbatim_note(module: str, reason: Reason) -> str:
    found = f", {reason.found}" if reason.found else ""
    return f"{module}{found}: LoRA tensors of {module.rpartition('.')[2]} kept verbatim, since {reason.why}"


def _exact_note(reason: str) -> str:
    return f"kept exact, since {reason}"


def _key_notes(keyed: _Keyed) -> list[str]:
    """What the user should know of the form of the keys."""
    notes = []
    if any(canonical != record.name for canonical, (_, record) in keyed.items()):
        notes.append(
            "keys were not as PEFT saves them (names of adapter or wrappers, no prefix), and are written as it does"
        )
    if any(map(named_by_tinker, keyed)):
        notes.append(f"modules have Tinker's names, under which PEFT does not find them; {CONVERT}, before or after")
    if any(canonical.startswith(2 * PEFT_PREFIX) for canonical in keyed):
        notes.append(
            "keys begin with base_model.model. twice, and stay so, since PEFT loads them on a base model that has them"
        )
    return notes


def _refuse_foreign(records: Sequence[TensorRecord], keyed: _Keyed) -> None:
    """Refuse the keys of another kind of file, unless there are proper factors beside: modules have any name."""
    modules = {key.module for key, _ in keyed.values() if key.module is not None}
    if any(factor_key(m, "A") in keyed and factor_key(m, "B") in keyed for m in modules):
        return
    foreign = foreign_kind(r.name for r in records)
    if foreign is not None:
        kind, key = foreign
        otherwise = "Load it where it is used and save it by PEFT's save_pretrained as LoRA, or leave it out."
        raise AdapterError(
            f"not a PEFT LoRA: the keys are those of {kind}", key=key, expected="LORA keys",
            found=f"{len(records)} tensors, no module with lora_A and lora_B", remedy=remedy_of(kind, otherwise),
        )  # fmt: skip


def _empty_or_flat(record: TensorRecord) -> AdapterError:
    what = "an empty tensor" if 0 in record.shape else "a flattened LoRA tensor"
    why, remedy = "ZeRO-3 or FSDP shards that were not gathered before saving", "Gather the weights and save it again."
    if named_by_tinker(record.name):
        why, remedy = "Tinker's placeholder for what the model has not", f"Convert it: {CONVERT}."
    return AdapterError(f"{what}: {why}", key=record.name, found=list(record.shape), remedy=remedy)


def _keyed(records: Sequence[TensorRecord], adapter: str) -> dict[str, tuple[Key, TensorRecord]]:
    keyed: dict[str, tuple[Key, TensorRecord]] = {}
    for record in records:
        key = parse_key(record.name, adapter)
        if 0 in record.shape or (key.module is not None and len(record.shape) < 2):
            raise _empty_or_flat(record)
        if key.canonical in keyed:
            raise AdapterError(
                "two keys mean the same tensor", key=record.name, found=keyed[key.canonical][1].name,
                expected="one key", remedy="Save the adapter again, by PEFT's save_pretrained.",
            )  # fmt: skip
        keyed[key.canonical] = key, record
    return keyed


def _embeddings(keyed: _Keyed) -> frozenset[_ShapesAB]:
    """Shapes (A, B) that LoRA of an output layer has if it is that of an embedding, transposed."""
    end = ".lora_embedding_A"
    pairs = [(record, keyed.get(name[:-1] + "B")) for name, (_, record) in keyed.items() if name.endswith(end)]
    return frozenset((b[1].shape[::-1], a.shape[::-1]) for a, b in pairs if b is not None)


def _paired(keyed: _Keyed, digest: str, embeddings: frozenset[_ShapesAB]) -> Layout:
    modules: list[Module] = []
    notes = _key_notes(keyed)
    names = dict.fromkeys(key.module for key, _ in keyed.values() if key.module is not None)
    for name in sorted(names):
        pair = {side: keyed[factor_key(name, side)][1] for side in SIDES if factor_key(name, side) in keyed}
        reason = _unshared(pair, embeddings)
        if reason is None:
            modules.append(Module(name, pair["A"], pair["B"]))
        else:
            notes += [f"{factor_key(name, side)}: LoRA tensors kept verbatim, {reason}" for side in pair]
    shared = {factor_key(m.name, side) for m in modules for side in SIDES}
    extras = tuple((canonical, record) for canonical, (_, record) in sorted(keyed.items()) if canonical not in shared)
    return Layout(tuple(modules), extras, tuple(notes), digest)


def _unshared(pair: Mapping[Side, TensorRecord], embeddings: frozenset[_ShapesAB]) -> str | None:
    """Why a module's factors are kept verbatim, or None if they are shared."""
    if len(pair) < 2:
        return f"lora_{'B' if 'A' in pair else 'A'} is missing"
    a, b = pair["A"], pair["B"]
    if len(a.shape) != len(b.shape):
        raise AdapterError(
            "lora_A and lora_B have different numbers of dimensions, as legacy MergedLinear adapters have",
            key=b.name, found=f"lora_B {list(b.shape)}, lora_A {list(a.shape)}",
            expected="two matrices, or two kernels of a convolution",
            remedy="Convert it with the PEFT release that made it, or leave it out.",
        )  # fmt: skip
    if len(a.shape) != 2:
        return f"{len(a.shape)}-D lora_A and {len(b.shape)}-D lora_B (a convolution, or experts in one tensor)"
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        return f"dtype {a.dtype if a.dtype not in FLOATS else b.dtype}"
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            "lora_A and lora_B of a module differ in rank", key=b.name, found=f"lora_B {list(b.shape)}",
            expected=f"lora_A {list(a.shape)}: rank {a.shape[0]}", remedy="Save the adapter again, or leave it out.",
        )  # fmt: skip
    if (a.shape, b.shape) in embeddings:
        return "tied to the LoRA of the embedding"
    return None
