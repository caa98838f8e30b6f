"""Mixed batches: a base model that answers each row of a batch by an adapter of its own, all of one checkpoint."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.keys import SIDES, factor_key, group_id, split_group_id
from ..checkpoint.coded_reader import CodedReader
from ..checkpoint.config import read_share_config
from ..checkpoint.reader import CheckpointReader, Tensors, restored
from ..errors import AdapterError, CheckpointError, UsageError, problem_lines, unknown_adapter
from ..text import counted, parse_bytes, printable
from .banks import Bank, Cache, Parts, Update, factors_of, shared_of, twin
from .places import INSTEAD, Host, Places, Shapes

BASE = "__base__"  # PEFT's name of no adapter
MEMORY = 1 << 30  # bytes of decoded adapters
LARGE = 0.3  # mean relative dW error, from which a SHARE checkpoint answers as other adapters would
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "decoder_inputs_embeds")
_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Call:
    """One call of a model: an adapter for each row, and what modules add for them, made at the first use.

    Attributes:
        names: of the rows. parts: of the adapters that have some, by name.
        batch: rows of the model's input, and its lengths, once the model itself is called.
    """

    names: Sequence[str]
    parts: Mapping[str, Parts]
    batch: tuple[int, frozenset[int]] | None = None
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
                remedy=f"Ask for one adapter alone. {INSTEAD}",
            )  # fmt: skip


class AttachedModel(nn.Module):
    """A base model with all adapters of a checkpoint beside it; what it lacks is looked up in the base.

    Attributes:
        base_model: the base, neither copied nor changed; hooks on it do nothing unless an adapter is asked for.
        adapter_names: what may be asked for, beside `"__base__"`.
        left_out: the adapters that cannot be attached: name -> the error that asking for one raises.
    """

    def __init__(
        self,
        base_model: nn.Module,
        adapter_names: Sequence[str],
        banks: Mapping[str, Bank],
        parts: Cache,
        modules: Iterable[str],
        left_out: Mapping[str, AdapterError],
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.adapter_names, self.left_out, self.parts = list(adapter_names), dict(left_out), parts
        self._numbers = {name: i for i, name in enumerate(adapter_names, 1)}
        self._banks = nn.ModuleList(banks.values())
        self._local = threading.local()
        by_name = dict(base_model.named_modules(remove_duplicate=False))
        handles = [base_model.register_forward_pre_hook(partial(_note, self._local), with_kwargs=True)]
        for name in modules:
            update = partial(_update_of, name, banks.get(name), self._numbers)
            hook = partial(_add, name, self._local, update)
            handles.append(by_name[name].register_forward_hook(hook, with_kwargs=True))
        _attached.add(base_model)
        self._release = weakref.finalize(self, _released, handles, weakref.ref(base_model))
        self.train(base_model.training)

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
            return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]

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

    def _call(self, names: Sequence[str] | None, batch: tuple[int, frozenset[int]] | None) -> Call | None:
        if names is None:
            return None
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise UsageError(
                "adapter_names is no list of names", found=names, expected="a name for each row, such as [name]"
            )
        for name in names:
            if name != BASE and name in self.left_out:
                e = self.left_out[name]
                raise AdapterError(e.problem, **e.details())
            if name != BASE and name not in self._numbers:
                raise unknown_adapter(name, self.adapter_names)
        if batch is not None and batch[0] != len(names):
            raise UsageError("not a name for each row", found=counted(len(names), "name"), expected=f"{batch[0]} rows")
        own = dict.fromkeys(name for name in names if name != BASE)
        return Call(names, {name: self.parts[name] for name in own}) if own else None

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


def _batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, frozenset[int]] | None:
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
    name: str,
    local: threading.local,
    update: Callable[[nn.Module, Call], Update | None],
    module: nn.Module,
    args: Any,
    kwargs: Any,
    out: Any,
) -> Any:
    """After a module has run: its output with what the adapters of the rows add."""
    call: Call | None = getattr(local, "call", None)
    if call is None:
        return None
    if name not in call.updates:
        call.updates[name] = update(module, call)
    found = call.updates[name]
    if found is None:
        return None
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    call.check(name, x)
    if found.owned:
        out = _by_owners(name, found, module, x, out)
    delta = found.delta(x)
    return out if delta is None else out + delta.to(out.device, out.dtype)


def _update_of(
    name: str, bank: Bank | None, numbers: Mapping[str, int], module: nn.Module, call: Call
) -> Update | None:
    """What the adapters of a call add to a module; None if nothing."""
    shared = None if bank is None else shared_of(bank, [numbers.get(n, 0) for n in call.names])
    pairs, rows = {}, dict[str, list[int]]()
    for i, adapter in enumerate(call.names):
        parts = call.parts.get(adapter)
        if parts is not None and name in parts.factors:
            pairs[i] = parts.factors[name]
        if parts is not None and name in parts.owned:
            rows.setdefault(adapter, []).append(i)
    first = next(iter(pairs.values()), None)
    factors = None if first is None else factors_of(pairs, (_device(module), first[0].dtype))
    owned = [(a, torch.tensor(some), twin(module, call.parts[a].owned[name])) for a, some in rows.items()]
    if shared is None and factors is None and not owned:
        return None
    return Update(len(call.names), shared, factors, owned)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _by_owners(name: str, update: Update, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """The output of a module, of the rows whose adapters have parameters of their own, by these."""
    each, before = (t.reshape(update.rows, -1, *t.shape[1:]) for t in (x, out))
    left = sorted({*range(update.rows)} - {i for _, rows, _ in update.owned for i in rows.tolist()})
    outs = [(BASE, torch.tensor(left), before[left])] if left else []
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


def attach(reader: CheckpointReader, base_model: Any, memory: int | str | None = None) -> AttachedModel:
    """Attach all adapters of a checkpoint to a base model.

    Args:
        reader: the checkpoint.
        base_model: the base, a plain `torch.nn.Module`.
        memory: bytes of decoded adapters of a coded checkpoint that are kept, or a text such as `"2GiB"`; None is
            1 GiB. An adapter that is asked for and is not among them is decoded.

    Raises:
        CheckpointError: if no adapter fits the base, or the checkpoint is damaged, or is replaced meanwhile.
        UsageError: if the base has adapters already.
    """
    _check_base(base_model)
    host, limit = Host(base_model), _bytes_of(memory)
    places: dict[str, Places] = {}
    left_out: dict[str, AdapterError] = {}
    held = (
        {} if isinstance(reader, CodedReader) else {n: (reader.loadings(n), reader.verbatim(n)) for n in reader.names}
    )
    bases = {} if isinstance(reader, CodedReader) else _bases(reader)
    for name in reader.names:
        try:
            if name == BASE:
                raise AdapterError(f"{BASE} is the name of the base itself", remedy=INSTEAD)
            shapes = _coded_shapes(reader, name) if isinstance(reader, CodedReader) else _shapes(bases, *held[name])
            places[name] = host.places(reader.adapter_config(name), shapes)
        except AdapterError as e:
            e.adapter, left_out[name] = name, e
    _tell(reader, places, left_out)
    if isinstance(reader, CodedReader):
        banks, parts = dict[str, Bank](), Cache(partial(_decoded, reader, host, places), limit)
    else:
        banks, alone = _shared(reader, host, places, held)
        parts = Cache(alone.__getitem__, sys.maxsize, alone)
        if reader.config.ours and read_share_config(reader.place.root) != reader.config:
            raise CheckpointError(reader.place.mixed, found=reader.place, remedy="Open it again.")
    used = dict.fromkeys(m for p in places.values() for m, _ in (*p.factors.values(), *p.owned.values()))
    return AttachedModel(base_model, list(places), banks, parts, used, left_out)


def _check_base(base: Any) -> None:
    if not isinstance(base, nn.Module):
        raise UsageError("the base is no torch.nn.Module", found=type(base).__name__)
    if isinstance(base, AttachedModel) or base in _attached:
        raise UsageError(
            "the base has a checkpoint attached", remedy="Call detach() of what attach gave, or load the base anew."
        )
    for module in base.modules():
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


def _tell(reader: CheckpointReader, places: Mapping[str, Places], left_out: Mapping[str, AdapterError]) -> None:
    """Raise if no adapter can be attached; warn of those that cannot, and of errors that change the answers."""
    if not places:
        first = next(iter(left_out.values()))
        raise CheckpointError(
            f"none of {counted(len(left_out), 'adapter')} can be attached to this base model: {first.problem}",
            **first.details(),
        )
    if left_out:
        lines = [f"{len(left_out)} of {len(reader.names)} adapters are not attached; asking for one is an error"]
        warnings.warn("\n".join([*lines, *problem_lines(left_out.values())]), UserWarning, stacklevel=4)
    mean = reader.config.ours.get("errors", {}).get("mean", 0.0)
    if not reader.config.coded and mean > LARGE:
        warnings.warn(
            f"the mean relative dW error of this checkpoint is {mean:.2f}: its adapters answer otherwise than their "
            "originals. Compress them with a larger k (-k), or each alone (--max-error).",
            UserWarning,
            stacklevel=4,
        )


def _bases(reader: CheckpointReader) -> dict[str, tuple[str, int, int]]:
    """Group -> PEFT key of its factors, d and k."""
    found = {}
    for group, v in reader.components.items():
        try:
            found[group] = factor_key(*split_group_id(group)), *v.shape
        except ValueError as e:
            raise CheckpointError("components of no module", key=group, found=str(e)) from e
    return found


def _shapes(bases: Mapping[str, tuple[str, int, int]], loadings: Tensors, verbatim: Tensors) -> dict[str, Any]:
    """PEFT key -> shape of the tensors of an adapter in a SHARE checkpoint; `bases` has key, d and k of each group."""
    found: dict[str, Any] = {key: tuple(t.shape) for key, t in verbatim.items()}
    for group, loading in loadings.items():
        key, d, k = bases.get(group, ("", 0, 0))
        if loading.ndim != 2 or loading.shape[0] != k:
            raise CheckpointError("loadings that fit no components", key=group, found=list(loading.shape))
        r = loading.shape[1]
        found[key] = (r, d) if split_group_id(group)[1] == "A" else (d, r)
    return found


def _coded_shapes(reader: CodedReader, name: str) -> Shapes:
    """The same of an adapter in a coded checkpoint, from the index."""
    found = {key: reader.index.tensors[digest].shape for key, digest in reader.index.adapters[name].verbatim.items()}
    for m in reader.modules(name):
        found |= {factor_key(m.name, "A"): (m.rank, m.d_in), factor_key(m.name, "B"): (m.d_out, m.rank)}
    return found


def _shared(
    reader: CheckpointReader,
    host: Host,
    places: Mapping[str, Places],
    held: Mapping[str, tuple[Tensors, Tensors]],
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
        for group, loading in own.items():  # one side alone, or a second name of the module
            tensors |= restored(name, group, reader.components, loading)
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
    """What an adapter has alone, of its tensors by PEFT key, on the devices and in the dtypes of the modules."""
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
