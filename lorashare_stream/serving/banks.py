"""What the rows of a batch add to one module: from loadings on shared bases, or from the factors of each adapter."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Bank(nn.Module):
    """Loadings of all adapters on the two bases of one module, in the module's dtype.

    Args:
        v_a: (d_in, k_A). v_b: (d_out, k_B).
        loadings: number of an adapter, from 1 -> L_A (k_A, r) and s L_B (k_B, r).
        count: N, of all adapters.
        like: device and dtype of the tensors.

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
        self,
        v_a: Tensor,
        v_b: Tensor,
        loadings: Mapping[int, tuple[Tensor, Tensor]],
        count: int,
        like: tuple[torch.device, torch.dtype],
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
    """What is not on shared bases of one adapter.

    Attributes:
        factors: module -> A (r, d_in) and s B (d_out, r).
        owned: module -> its parameters that the adapter has for its own, by name.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    owned: Mapping[str, Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for pair in self.factors.values() for t in pair]
        return sum(t.nbytes for t in [*tensors, *(t for own in self.owned.values() for t in own.values())])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """The same with every tensor changed."""
        factors = {m: (change(a), change(b)) for m, (a, b) in self.factors.items()}
        return Parts(factors, {m: {n: change(t) for n, t in own.items()} for m, own in self.owned.items()})


class Cache:
    """Parts of adapters, made when they are asked for; those that were used longest ago go first. Threads share it.

    Args:
        load: makes those of a name.
        limit: bytes that are kept.
        held: what there is from the start.
    """

    def __init__(self, load: Callable[[str], Parts], limit: int, held: Mapping[str, Parts] | None = None) -> None:
        self._load, self._limit = load, limit
        self._held: OrderedDict[str, Parts] = OrderedDict(held or {})
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
class Update:
    """What a call adds to one module. Rows are those of the names; each stands for as many of the batch, one by one.

    Attributes:
        rows: how many names there are.
        shared: V_A, L_A (rows, k_A, R), L_B' (rows, R, k_B), V_B'; None if no row has any.
        factors: the rows that have some, A' (some, d_in, R), B' (some, R, d_out); None if none has.
        owned: (name of an adapter, its rows, the module with its parameters); empty if none has any.
    """

    rows: int
    shared: tuple[Tensor, Tensor, Tensor, Tensor] | None
    factors: tuple[Tensor, Tensor, Tensor] | None
    owned: Sequence[tuple[str, Tensor, nn.Module]]

    def delta(self, x: Tensor) -> Tensor | None:
        """Sum over ranks, s B A x of each row: (..., d_out) of (..., d_in); None if no row has factors."""
        like = self.factors[1] if self.factors is not None else self.shared[0] if self.shared is not None else None
        if like is None:
            return None
        rows = x.to(like.device, like.dtype).reshape(self.rows, -1, x.shape[-1])
        total: Tensor | None = None
        if self.shared is not None:
            v_a, l_a, l_b, v_b = self.shared
            total = torch.bmm(torch.bmm(rows @ v_a, l_a), l_b) @ v_b
        if self.factors is not None:
            chosen, a, b = self.factors
            own = torch.bmm(torch.bmm(rows[chosen], a), b)
            if total is None:
                total = own.new_zeros(*rows.shape[:2], own.shape[-1])
            total = total.index_add(0, chosen, own.to(total.dtype))
        assert total is not None
        return total.reshape(*x.shape[:-1], -1)


def shared_of(bank: Bank, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`Update.shared` of a bank, for the numbers of the rows' adapters."""
    if bank.held.isdisjoint(numbers):
        return None
    rows = torch.tensor(numbers, device=bank.l_a.device)
    return bank.v_a, bank.l_a[rows], bank.l_b[rows].mT.contiguous(), bank.v_b.mT


def factors_of(
    pairs: Mapping[int, tuple[Tensor, Tensor]], like: tuple[torch.device, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`Update.factors` of the factors by row."""
    if not pairs:
        return None
    rank = max(a.shape[0] for a, _ in pairs.values())
    a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs.values()])
    b = torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in pairs.values()])
    return torch.tensor(list(pairs), device=like[0]), a.to(*like).mT, b.to(*like).mT


def twin(module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """The module, some of whose parameters are others; nothing of it changes, as other threads run it."""
    found = copy.copy(module)
    parameters: dict[str, Any] = dict(module._parameters)
    for name, tensor in own.items():
        parameters[name] = tensor.to(parameters[name].device, parameters[name].dtype)
    found._parameters = parameters
    return found
