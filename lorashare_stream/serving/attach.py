"""Mixed batches: a base model that answers each row of a batch by an adapter of its own, all of one checkpoint."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..checkpoint.reader import CheckpointReader
from ..errors import AdapterError, UsageError, problem_lines, unknown_adapter
from ..text import counted, parse_bytes, printable
from .content import BASE, Bank, Content, Parts, content_of
from .places import INSTEAD, Host

MEMORY = 1 << 30  # bytes of decoded adapters
LARGE = 0.3  # mean relative dW error, from which a SHARE checkpoint answers as other adapters would
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "decoder_inputs_embeds")
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
Batch = tuple[int, frozenset[int]]  # rows of a model's input, and its lengths


# -- one call of a model -----------------------------------------------------------------------------------


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


@dataclass
class Call:
    """One call of a model: an adapter for each row, and what modules add for them, made at the first use.

    Attributes:
        names: of the rows.
        numbers: the same in banks; 0 is the base.
        parts: of the adapters that have some, by name.
        batch: of the model's input, once the model itself is called.
    """

    names: Sequence[str]
    numbers: Sequence[int]
    parts: Mapping[str, Parts]
    batch: Batch | None = None
    updates: dict[str, Update | None] = field(default_factory=dict)

    def check(self, module: str, x: Tensor) -> None:
        """Demand that a module sees the rows of the batch, in their order."""
        rows, found, fits = len(self.names), x.shape[0] if x.ndim else 0, False
        if self.batch is None:  # an encoder, which `generate` calls by itself
            fits = found > 0 and found % rows == 0
        else:
            whole, lengths = self.batch
            fits = found == whole or (x.ndim == 2 and found in {whole * length for length in lengths})
        if not fits:
            raise UsageError(
                f"the module {printable(module)} does not see the rows of the batch, each of which has an adapter",
                found=f"an input {list(x.shape)}", expected=f"{self.batch[0] if self.batch else rows} rows",
                remedy=INSTEAD,
            )  # fmt: skip

    def update(self, name: str, module: nn.Module, bank: Bank | None) -> Update | None:
        """What the adapters of the rows add to a module; None if nothing."""
        shared, pairs, rows = None, dict[int, tuple[Tensor, Tensor]](), dict[str, list[int]]()
        if bank is not None and not bank.held.isdisjoint(self.numbers):
            chosen = torch.tensor(self.numbers, device=bank.l_a.device)
            shared = bank.v_a, bank.l_a[chosen], bank.l_b[chosen].mT.contiguous(), bank.v_b.mT
        for i, adapter in enumerate(self.names):
            parts = self.parts.get(adapter)
            if parts is not None and name in parts.factors:
                pairs[i] = parts.factors[name]
            if parts is not None and name in parts.owned:
                rows.setdefault(adapter, []).append(i)
        factors = _stacked(pairs, next(module.parameters()).device) if pairs else None
        owned = [(a, torch.tensor(some), _twin(module, self.parts[a].owned[name])) for a, some in rows.items()]
        if shared is None and factors is None and not owned:
            return None
        return Update(len(self.names), shared, factors, owned)


def _stacked(pairs: Mapping[int, tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`Update.factors` of the factors by row."""
    rank = max(a.shape[0] for a, _ in pairs.values())
    a = torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs.values()])
    b = torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in pairs.values()])
    like = device, next(iter(pairs.values()))[0].dtype
    return torch.tensor(list(pairs), device=device), a.to(*like).mT, b.to(*like).mT


def _twin(module: nn.Module, own: Mapping[str, Tensor]) -> nn.Module:
    """The module, some of whose parameters are others; nothing of it changes, as other threads run it."""
    found = copy.copy(module)
    parameters: dict[str, Any] = dict(module._parameters)
    for name, tensor in own.items():
        parameters[name] = tensor.to(parameters[name].device, parameters[name].dtype)
    found._parameters = parameters
    return found


# -- hooks on the base -------------------------------------------------------------------------------------


def _batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Batch | None:
    """Rows of a model's input, and its lengths; None if no tensor is among the arguments."""
    named = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    given = [t for t in args if isinstance(t, Tensor)] or named or [t for t in kwargs.values() if isinstance(t, Tensor)]
    if not given or not given[0].ndim:
        return None
    rows = given[0].shape[0]
    return rows, frozenset(t.shape[1] for t in (given[0], *named) if t.ndim > 1 and t.shape[0] == rows)


def _note(local: threading.local, module: nn.Module, args: Any, kwargs: Any) -> None:
    """Before the base runs: remember how many rows it is given. Beams and returned sequences multiply them."""
    call: Call | None = getattr(local, "call", None)
    if call is None:
        return
    call.batch = _batch_of(args, kwargs)
    if call.batch is not None and call.batch[0] % len(call.names):
        raise UsageError("not a name for each row", found=len(call.names), expected=f"{call.batch[0]} rows")


def _add(
    name: str, bank: Bank | None, local: threading.local, module: nn.Module, args: Any, kwargs: Any, out: Any
) -> Any:
    """After a module has run: its output with what the adapters of the rows add."""
    call: Call | None = getattr(local, "call", None)
    if call is None:
        return None
    if name not in call.updates:
        call.updates[name] = call.update(name, module, bank)
    found = call.updates[name]
    if found is None:
        return None
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    call.check(name, x)
    if found.owned:
        if len(args) + len(kwargs) > 1:
            raise UsageError(f"the module {printable(name)} has inputs of which rows cannot be told", remedy=INSTEAD)
        out = _by_owners(name, found, call.names, x, out)
    delta = found.delta(x)
    return out if delta is None else out + delta.to(out.device, out.dtype)


def _by_owners(name: str, update: Update, names: Sequence[str], x: Tensor, out: Tensor) -> Tensor:
    """The output of a module, of the rows whose adapters have parameters of their own, by these."""
    each, before = (t.reshape(update.rows, -1, *t.shape[1:]) for t in (x, out))
    left = sorted({*range(update.rows)} - {i for _, rows, _ in update.owned for i in rows.tolist()})
    outs = [(names[left[0]], torch.tensor(left), before[left])] if left else []
    for adapter, rows, own in update.owned:
        found = type(own).forward(own, each[rows].flatten(0, 1))  # its hooks are those of the module
        outs.append((adapter, rows, found.reshape(len(rows), -1, *found.shape[1:])))
    (first, _, one), *others = outs
    for adapter, _, other in others:
        if other.shape[-1] != one.shape[-1]:
            raise UsageError(
                f"adapters of one batch give the module {printable(name)} outputs of different widths",
                found=f"{printable(first)!r}: {one.shape[-1]}, {printable(adapter)!r}: {other.shape[-1]}",
                remedy="Ask for them in batches of their own.",
            )
    order = torch.cat([rows for _, rows, _ in outs]).argsort()
    return torch.cat([found for _, _, found in outs])[order].flatten(0, 1)


def _released(handles: Sequence[Any], base: weakref.ref[nn.Module]) -> None:
    for handle in handles:
        handle.remove()
    if (model := base()) is not None:
        _attached.discard(model)


# -- the model ---------------------------------------------------------------------------------------------


class AttachedModel(nn.Module):
    """A base model with all adapters of a checkpoint; attributes that it lacks are those of the base.

    Attributes:
        base_model: the base, neither copied nor changed; hooks on it do nothing unless an adapter is asked for.
        adapter_names: what may be asked for, beside `"__base__"`.
        left_out: the adapters that cannot be attached: name -> the error that asking for one raises.
    """

    def __init__(self, base_model: nn.Module, content: Content) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_names, self.left_out, self.parts = list(content.places), dict(content.left_out), content.parts
        self._numbers = {name: i for i, name in enumerate((BASE, *content.places))}
        self._banks = nn.ModuleList(content.banks.values())
        self._local = threading.local()
        by_name = dict(base_model.named_modules(remove_duplicate=False))
        handles = [base_model.register_forward_pre_hook(partial(_note, self._local), with_kwargs=True)]
        changed = (name for p in content.places.values() for name, _ in (*p.factors.values(), *p.owned.values()))
        for name in dict.fromkeys(changed):
            hook = partial(_add, name, content.banks.get(name), self._local)
            handles.append(by_name[name].register_forward_hook(hook, with_kwargs=True))
        _attached.add(base_model)
        self._release = weakref.finalize(self, _released, handles, weakref.ref(base_model))
        self._release.atexit = False
        self.training = base_model.training

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the base gives, each row with its adapter.

        Args:
            adapter_names: a name for each row of the batch, `"__base__"` for none; None is none for all.
            *args, **kwargs: of the base.

        Raises:
            UnknownAdapterError: a KeyError, if there is no such adapter.
            AdapterError: if one cannot be attached.
            UsageError: if there are not as many names as rows, or a module does not see the rows.
            CheckpointError: if an adapter must be read, and the checkpoint is gone or damaged.
        """
        with self._asked(adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the base generates, each row with its adapter; arguments and errors as those of `forward`."""
        with self._asked(adapter_names, args, kwargs):
            generate: Any = self.base_model.generate
            return generate(*args, **kwargs)

    def detach(self) -> nn.Module:
        """Take the hooks off the base, and give it back."""
        self._release()
        return self.base_model

    def resident_bytes(self) -> int:
        """Bytes of what is held beside the base: bases and loadings, and what adapters have alone."""
        return sum(b.nbytes for bank in self._banks for b in bank.buffers()) + self.parts.nbytes

    @contextmanager
    def _asked(self, names: Sequence[str] | None, args: Any, kwargs: Any) -> Iterator[None]:
        if not self._release.alive:
            raise UsageError("this model is detached from its base", remedy="Attach the checkpoint again.")
        before = getattr(self._local, "call", None)
        self._local.call = self._call(names, _batch_of(args, kwargs))
        try:
            yield
        finally:
            self._local.call = before

    def _call(self, names: Sequence[str] | None, batch: Batch | None) -> Call | None:
        if names is None:
            return None
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise UsageError(
                "adapter_names is no list of names", found=names, expected="a name for each row, such as [name]"
            )
        for name in names:
            if name not in self._numbers and (e := self.left_out.get(name)) is not None:
                raise AdapterError(e.problem, **e.details())
            if name not in self._numbers:
                raise unknown_adapter(name, self.adapter_names)
        if batch is not None and batch[0] != len(names):
            raise UsageError("not a name for each row", found=counted(len(names), "name"), expected=f"{batch[0]} rows")
        own = dict.fromkeys(name for name in names if name != BASE)
        return Call(names, [self._numbers[n] for n in names], {n: self.parts[n] for n in own}) if own else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AttachedModel:
        self.parts.change(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def attach(reader: CheckpointReader, base_model: Any, memory: int | str | None = None) -> AttachedModel:
    """Attach all adapters of a checkpoint to a base model; see `SHAREModel.attach`."""
    limit = _bytes_of(memory)
    check_base(base_model)
    content = content_of(reader, Host(base_model), limit)
    _warn(reader, content.left_out)
    return AttachedModel(base_model, content)


def check_base(base: Any, *, peft: bool = False) -> None:
    """Demand a base model without adapters; with `peft`, layers of PEFT that an earlier `apply` left may be in it."""
    if not isinstance(base, nn.Module):
        raise UsageError("the base is no torch.nn.Module", found=type(base).__name__)
    if isinstance(base, AttachedModel) or base in _attached:
        raise UsageError(
            "the base has a checkpoint attached", remedy="Call detach() of what attach gave, or load the base anew."
        )
    for module in [base] if peft else base.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UsageError(
                "the base has adapters of PEFT", found=type(module).__name__, remedy="Give what its unload() gives."
            )


def _bytes_of(memory: int | str | None) -> int:
    try:
        found = MEMORY if memory is None else parse_bytes(memory) if isinstance(memory, str) else int(memory)
    except (TypeError, ValueError) as e:
        raise UsageError(f"memory: {e}") from e
    if found < 0:
        raise UsageError("memory below zero", found=memory)
    return found


def _warn(reader: CheckpointReader, left_out: Mapping[str, AdapterError]) -> None:
    """Tell of adapters that are not attached, and of errors that change the answers."""
    if left_out:
        first = f"not attached: {len(left_out)} of {counted(len(reader.names), 'adapter')}; to ask for one is an error:"
        warnings.warn("\n".join([first, *problem_lines(left_out.values())]), UserWarning, stacklevel=4)
    mean = reader.config.ours.get("errors", {}).get("mean", 0.0)
    if not reader.config.coded and mean > LARGE:
        warnings.warn(
            f"the mean relative dW error of this checkpoint is {mean:.2f}: its adapters answer otherwise than their "
            "originals. Compress them with a larger k (-k), or each alone (--max-error).",
            UserWarning,
            stacklevel=4,
        )
