"""Content of a checkpoint as a base model can have it: banks of what adapters share, and parts of each alone."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..adapters.keys import SIDES, factor_key, group_id, split_group_id
from ..checkpoint.config import read_share_config
from ..checkpoint.format import DIRECTIONS
from ..checkpoint.reader import CheckpointReader, CodedReader, Tensors, modules_of, restored
from ..errors import AdapterError, CheckpointError
from ..text import counted
from .places import INSTEAD, Host, Places, Shapes

BASE = "__base__"  # PEFT's name of no adapter
Like = tuple[torch.device, torch.dtype]


class Bank(nn.Module):
    """Loadings of all N adapters on the two bases of one module, in the module's dtype.

    Args:
        v_a, v_b: (d_in, k_A) and (d_out, k_B).
        loadings: number of an adapter, from 1 -> L_A (k_A, r) and s L_B (k_B, r).

    Attributes:
        l_a, l_b: (N + 1, k, R), with zeros up to the largest rank R. Row 0, the base, and those of adapters without the
            module are zero.
        held: numbers of the adapters that have it.
    """

    v_a: Tensor
    v_b: Tensor
    l_a: Tensor
    l_b: Tensor

    def __init__(
        self, v_a: Tensor, v_b: Tensor, loadings: Mapping[int, tuple[Tensor, Tensor]], count: int, like: Like
    ) -> None:
        super().__init__()
        self.held = frozenset(loadings)
        rank = max(a.shape[1] for a, _ in loadings.values())
        sides = [torch.zeros(count + 1, v.shape[1], rank) for v in (v_a, v_b)]
        for number, pair in loadings.items():
            for side, loading in zip(sides, pair, strict=True):
                side[number, :, : loading.shape[1]] = loading
        for name, tensor in zip(("v_a", "v_b", "l_a", "l_b"), (v_a, v_b, *sides), strict=True):
            self.register_buffer(name, tensor.to(*like), persistent=False)


@dataclass(frozen=True)
class Parts:
    """Tensors of one adapter that are not on shared bases.

    Attributes:
        factors: module -> A (r, d_in) and s B (d_out, r).
        owned: module -> name of a parameter -> the tensor that replaces it.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    owned: Mapping[str, Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pairs, owned = sum(self.factors.values(), ()), (t for own in self.owned.values() for t in own.values())
        return sum(t.nbytes for t in (*pairs, *owned))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """The same with every tensor changed."""
        factors = {m: (change(a), change(b)) for m, (a, b) in self.factors.items()}
        return Parts(factors, {m: {n: change(t) for n, t in own.items()} for m, own in self.owned.items()})


class Cache:
    """Cache of the parts of adapters, up to `limit` bytes: the least recently used are evicted. Threads share it."""

    def __init__(self, load: Callable[[str], Parts], limit: int, held: Mapping[str, Parts]) -> None:
        self._load, self._limit = load, limit
        self._held = OrderedDict(held)
        self._lock = threading.Lock()
        self.nbytes = sum(parts.nbytes for parts in self._held.values())

    def __getitem__(self, name: str) -> Parts:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        with torch.inference_mode(False), torch.no_grad():  # it may serve a call with gradients next
            found = self._load(name)  # outside of the lock: others are served meanwhile
        with self._lock:
            if name not in self._held:
                self._held[name] = found
                self.nbytes += found.nbytes
            while self.nbytes > self._limit:
                self.nbytes -= self._held.popitem(last=False)[1].nbytes
        return found

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor that is held: to another device, or another dtype."""
        with self._lock:
            self._held = OrderedDict((name, parts.mapped(change)) for name, parts in self._held.items())
            self.nbytes = sum(parts.nbytes for parts in self._held.values())


@dataclass(frozen=True)
class Content:
    """Content of a checkpoint, for one base model.

    Attributes:
        places: of each adapter that can be attached, where its tensors go.
        left_out: why others cannot.
        banks: module of the base -> what adapters have on its shared bases.
        parts: what they have alone.
    """

    places: Mapping[str, Places]
    left_out: Mapping[str, AdapterError]
    banks: Mapping[str, Bank]
    parts: Cache


def content_of(reader: CheckpointReader, host: Host, limit: int) -> Content:
    """Content of a checkpoint, for one base model.

    A SHARE checkpoint is read as a whole; of the decoded adapters of a coded one, `limit` bytes are kept.

    Raises:
        CheckpointError: if no adapter can be attached, or the checkpoint is damaged, or is replaced meanwhile.
    """
    if isinstance(reader, CodedReader):
        places, left_out = _sorted(reader, host, partial(_coded_shapes, reader))
        return Content(places, left_out, {}, Cache(partial(_decoded, reader, host, places), limit, {}))
    reader.place.fetch()
    held = {name: (reader.loadings(name), reader.verbatim(name)) for name in reader.names}
    bases = _bases(reader)
    places, left_out = _sorted(reader, host, lambda name: _shapes(name, bases, *held[name]))
    banks, alone = _shared(reader, host, places, held)
    if read_share_config(reader.place.root) != reader.config:
        raise CheckpointError(reader.place.mixed, found=reader.place, remedy="Open it again.")
    return Content(places, left_out, banks, Cache(alone.__getitem__, sys.maxsize, alone))


def _sorted(
    reader: CheckpointReader, host: Host, shapes_of: Callable[[str], Shapes]
) -> tuple[dict[str, Places], dict[str, AdapterError]]:
    """The places of the adapters that can be attached, and why others cannot."""
    places: dict[str, Places] = {}
    left_out: dict[str, AdapterError] = {}
    for name in reader.names:
        try:
            if name == BASE:
                raise AdapterError("it has the name of the base itself", remedy=INSTEAD)
            places[name] = host.places(reader.adapter_config(name), shapes_of(name))
        except AdapterError as e:
            e.adapter, left_out[name] = name, e
    if not places:
        each = list(left_out.values())
        first = next((e for e in each if e.remedy != INSTEAD), each[0])  # what the base lacks, before what they have
        raise CheckpointError(
            f"none of {counted(len(left_out), 'adapter')} can be attached to this base model: {first.problem}",
            **first.details(),
        )
    return places, left_out


def _bases(reader: CheckpointReader) -> dict[str, tuple[str, int, int]]:
    """Group -> PEFT key of its factors, d and k."""
    found = {}
    for group, v in reader.components.items():
        try:
            found[group] = factor_key(*split_group_id(group)), *v.shape
        except ValueError as e:
            raise CheckpointError("components of no module", key=group, found=str(e)) from e
    return found


def _shapes(name: str, bases: Mapping[str, tuple[str, int, int]], loadings: Tensors, verbatim: Tensors) -> Shapes:
    """PEFT key -> shape of the tensors of an adapter in a SHARE checkpoint; `bases` has key, d and k of each group."""
    found: dict[str, tuple[int, ...]] = {key: tuple(t.shape) for key, t in verbatim.items()}
    for group, loading in loadings.items():
        key, d, k = bases.get(group, ("", 0, 0))
        if loading.ndim != 2 or loading.shape[0] != k:
            raise CheckpointError("loadings that fit no components", adapter=name, key=group, found=list(loading.shape))
        r = loading.shape[1]
        found[key] = (r, d) if split_group_id(group)[1] == "A" else (d, r)
    return found


def _coded_shapes(reader: CodedReader, name: str) -> Shapes:
    """The same of an adapter in a coded checkpoint, from the index."""
    kept = reader.index.adapters[name].verbatim
    found = {key: reader.index.tensors[digest].shape for key, digest in kept.items() if key != DIRECTIONS}
    for m in modules_of(reader.index.adapters[name]):
        found |= {factor_key(m.name, "A"): (m.rank, m.d_in), factor_key(m.name, "B"): (m.d_out, m.rank)}
    return found


def _shared(
    reader: CheckpointReader, host: Host, places: Mapping[str, Places], held: Mapping[str, tuple[Tensors, Tensors]]
) -> tuple[dict[str, Bank], dict[str, Parts]]:
    """The banks of all modules of a SHARE checkpoint, and what adapters have beside them."""
    named: dict[str, str] = {}  # module of the base -> as the bases name it
    loadings: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    alone: dict[str, Parts] = {}
    for number, (name, found) in enumerate(places.items(), 1):
        own, tensors = dict(held[name][0]), dict(held[name][1])
        for module, (place, scale) in found.factors.items():
            groups = [group_id(module, side) for side in SIDES]
            if all(g in own for g in groups) and named.setdefault(place, module) == module:
                a, b = (own.pop(g).float() for g in groups)
                loadings.setdefault(place, {})[number] = a, b * scale
        tensors |= restored(name, reader.components, own)  # one side alone, or a second name of the module
        alone[name] = _parts(host, found, tensors)
    banks = {}
    for place, some in loadings.items():
        v_a, v_b = (reader.components[group_id(named[place], side)] for side in SIDES)
        banks[place] = Bank(v_a, v_b, some, len(places), host.like(place))
    return banks, alone


def _decoded(reader: CodedReader, host: Host, places: Mapping[str, Places], name: str) -> Parts:
    try:
        return _parts(host, places[name], reader.tensors(name))
    except CheckpointError as e:
        e.adapter = name
        e.remedy = e.remedy or "If the checkpoint was replaced, open and attach it again."
        raise


def _parts(host: Host, places: Places, tensors: Tensors) -> Parts:
    """Parts of an adapter, of its tensors by PEFT key, on the devices and in the dtypes of the modules."""
    factors = {}
    for module, (place, scale) in places.factors.items():
        a, b = (tensors.get(factor_key(module, side)) for side in SIDES)
        if a is not None and b is not None:
            factors[place] = a.to(*host.like(place)), (b.float() * scale).to(*host.like(place))
    owned: dict[str, dict[str, Tensor]] = {}
    for key, (place, name) in places.owned.items():
        like = host.modules[place]._parameters[name]
        assert like is not None
        owned.setdefault(place, {})[name] = tensors[key].to(like.device, like.dtype)
    return Parts(factors, owned)
