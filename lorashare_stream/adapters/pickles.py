"""`.bin` files: pickles of tensors, which torch reads once, and which are safetensors from then on.

Pickles are programs. `torch.load(weights_only=True)` runs nothing of a stranger's, but a file may still ask it for
memory by a number (`bytearray(1 << 40)`), or for tensors of whatever memory holds (`torch.Tensor(2000)`). So its
opcodes are followed first, by a machine that knows what `torch.save` writes of a dictionary of dense tensors, and
nothing else; it tells their shapes, too, so that a plan needs neither torch nor the values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import pickletools
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_file, own_folder
from .dtypes import ITEMSIZE, TORCH_DTYPES
from .safetensors import MAX_DIMS, TensorReader, TensorRecord, bad_file, laid_out, write_safetensors

if TYPE_CHECKING:
    import torch

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before archives: five pickles, then the storages
_UNSAFE = "not a pickle of plain tensors that torch can load safely"
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_CONSTANTS = {"EMPTY_TUPLE": (), "NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1, "BUILD": 1, "REDUCE": 2, "BINPERSID": 1}


@dataclass(frozen=True)
class _Global:
    """A name that a pickle asks for: (module, name)."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file."""

    dtype: str
    nbytes: int


@dataclass(frozen=True)
class _Tensor:
    """A tensor that lies in its storage."""

    dtype: str
    shape: tuple[int, ...]


class _Machine:
    """Follows the opcodes of pickles, and makes nothing of what they ask for; `storages` are their bytes, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, int] = {}

    def run(self, file: IO[bytes]) -> Any:
        """The result of the pickle that begins here: dictionaries and lists, and in them what stands for tensors."""
        outer: list[list[Any]] = []
        stack: list[Any] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "MARK":
                outer.append(stack)
                stack = []
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("TUPLE", "SETITEMS", "APPENDS") or name in _TAKES:
                taken = stack
                if name in _TAKES:
                    count = _TAKES[name]
                    taken = stack[len(stack) - count :] if len(stack) >= count else []
                    del stack[len(stack) - len(taken) :]
                else:
                    stack = outer.pop()
                stack += self._step(name, taken, stack)
            elif name not in ("PROTO", "STOP"):
                stack.append(memo[argument] if name in ("BINGET", "LONG_BINGET") else _pushed(name, argument))
        return stack.pop()

    def _step(self, name: str, taken: list[Any], stack: list[Any]) -> list[Any]:
        """What an opcode pushes for what it has taken off the stack."""
        if name.startswith("TUPLE"):
            if len(taken) > MAX_DIMS or any(type(t) is tuple and not _are_ints(t) for t in taken):
                raise UnpicklingError("tuples in tuples, too deep")  # to hash them takes forever, or all of the stack
            return [tuple(taken)]
        if name == "BINPERSID":
            return [self._storage(*taken[0][:5])]
        if name == "REDUCE":
            return [_called(*taken)]
        into = stack[-1]
        if name in ("APPEND", "APPENDS") and type(into) is list:
            into += taken
        elif name in ("SETITEM", "SETITEMS") and type(into) is dict and all(type(key) is str for key in taken[::2]):
            into.update(zip(taken[::2], taken[1::2], strict=True))
        elif name != "BUILD" or type(into) is not dict or type(taken[0]) is not dict:
            raise UnpicklingError("a key that is no text, or a change of what is no dictionary")
        return []

    def _storage(self, kind: object, of: _Global, key: str, _: object, count: int) -> _Storage:
        if kind != "storage" or of.name not in _STORAGES or type(key) is not str or not _are_ints((count,)):
            raise UnpicklingError("it names something else than a storage")
        found = _Storage(_STORAGES[of.name], count * ITEMSIZE[_STORAGES[of.name]])
        if self.storages.setdefault(key, found.nbytes) != found.nbytes:
            raise UnpicklingError(f"two sizes of storage {key}")
        return found


def _are_ints(values: tuple[Any, ...]) -> bool:
    return all(type(n) is int and n >= 0 for n in values)


def _pushed(name: str, argument: Any) -> Any:
    if name == "GLOBAL":
        module, _, wanted = argument.partition(" ")
        dtype = module == "torch" and wanted in TORCH_DTYPES
        storage = module in ("torch", "torch.storage") and wanted in _STORAGES
        function = module == "torch._utils" and wanted in (*_TENSORS, *_PARAMETERS)
        if not (dtype or storage or function or (module, wanted) == ("collections", "OrderedDict")):
            raise UnpicklingError(f"it asks for {module}.{wanted}, which no file of plain tensors needs")
        return _Global(module, wanted)
    if name in ("EMPTY_DICT", "EMPTY_LIST"):
        return {} if name == "EMPTY_DICT" else []
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name not in _ARGUMENTS:
        raise UnpicklingError(f"the opcode {name}, which torch.save does not write")
    return argument


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What stands for the result of a call."""
    if type(function) is _Global and function.name == "OrderedDict" and arguments == ():
        return {}
    if type(function) is _Global and function.name in _PARAMETERS and type(arguments[0]) is _Tensor:
        return arguments[0]
    if type(function) is not _Global or function.name not in _TENSORS:
        raise UnpicklingError("a call that no file of plain tensors needs")
    storage, offset, size, stride = arguments[:4]
    if type(storage) is not _Storage:
        raise UnpicklingError("a tensor that does not lie in the file")
    dtype = TORCH_DTYPES[arguments[6].name] if function.name == "_rebuild_tensor_v3" else storage.dtype
    if len(size) != len(stride) or not _are_ints((offset, *size, *stride)):
        raise UnpicklingError("a tensor of impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if max(last + 1, math.prod(size)) * ITEMSIZE[dtype] > storage.nbytes:
        raise UnpicklingError(f"a tensor of shape {list(size)} that is larger than its storage")
    return _Tensor(dtype, size)


def pickle_records(path: Path) -> tuple[TensorRecord, ...]:
    """The tensors of a `.bin`, with the offsets that they have in what it is converted to.

    Raises:
        AdapterError: if it is no dictionary of dense tensors, all of which lie in it.
    """
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"  # as torch tells it
            file.seek(0)
            size = path.stat().st_size
            result = _archived(file, size) if archive else _streamed(file, size)
    except Exception as e:  # whatever a damaged pickle leads to
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # an invalid one is a number in the file
            raise
        fault = str(e) if isinstance(e, UnpicklingError) and str(e) else f"{type(e).__name__} {e}".strip()
        raise bad_file(path, _UNSAFE, fault) from e
    if not isinstance(result, dict):
        raise bad_file(path, "not a dictionary of tensors", type(result).__name__, "a dictionary of tensors")
    for name, value in result.items():
        if type(value) is not _Tensor or not name.isprintable():
            kind = type(value).__name__.strip("_")
            raise bad_file(path, "an entry is not a dense tensor under a printable key", kind, key=name)
    return laid_out(tuple((name, t.dtype, t.shape) for name, t in result.items()))


def _archived(file: IO[bytes], size: int) -> Any:
    """The dictionary in an archive; that its parts are as large as the storages, torch demands."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if any(p.compress_type != zipfile.ZIP_STORED for p in parts) or sum(p.file_size for p in parts) > size:
            raise UnpicklingError("compressed parts, which torch does not write")
        if len({p.filename.casefold() for p in parts}) < len(parts):
            raise UnpicklingError("an archive with two parts of one name")
        main = [p for p in parts if p.filename.partition("/")[2] == "data.pkl"]
        if len(main) != 1:
            raise UnpicklingError(f"an archive with {len(main)} parts named data.pkl, where torch writes one")
        sizes = {p.filename.partition("/")[2]: p.file_size for p in parts}
        machine = _Machine()
        result = machine.run(io.BytesIO(archive.read(main[0])))
    for key, nbytes in machine.storages.items():
        found = sizes.get(f"data/{key}")
        if found != nbytes:
            what = "missing" if found is None else f"of {found} bytes"
            raise UnpicklingError(f"the part data/{key}, of {nbytes} bytes, is {what}")
    return result


def _streamed(file: IO[bytes], size: int) -> Any:
    """The dictionary in a file of the format before archives."""
    machine = _Machine()
    if machine.run(file) != MAGIC:
        raise UnpicklingError("it is not of torch's format")
    _, _, result, keys = (machine.run(file) for _ in range(4))  # version, machine, tensors, the keys of what follows
    if not isinstance(keys, list) or sorted(keys) != sorted(machine.storages):
        raise UnpicklingError("the storages that follow are not those of the tensors")
    needed, left = sum(machine.storages.values()), size - file.tell()
    if needed > left:
        raise UnpicklingError(f"{needed} bytes of tensors, of which {left} are there")
    return result


def open_pickle(path: Path, folder: Path | None) -> TensorReader:
    """A `.bin` as safetensors: those that a folder keeps of it, or, where nothing is kept, of a nameless file.

    Raises:
        AdapterError: if torch cannot read it.
    """
    if folder is None:
        with tempfile.NamedTemporaryFile(prefix="lorashare-stream-") as file:
            records = _convert(path, file)
            file.flush()
            reader = TensorReader([Path(file.name)])
            for record in records[:1]:
                reader.through(record)  # what is mapped needs no name
            return reader
    stat = path.stat()
    key = hashlib.sha256(f"{path.absolute()} {stat.st_size} {stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    kept = own_folder(folder) / f"{key.hexdigest()}.safetensors"
    if not kept.is_file():
        with atomic_file(kept) as file:
            _convert(path, file)
    return TensorReader([kept])


def _convert(path: Path, out: IO[bytes]) -> tuple[TensorRecord, ...]:
    """Write the tensors of a `.bin` as safetensors; whole in memory, since the format before archives has no map."""
    import torch

    records = pickle_records(path)
    try:
        loaded: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        found = [
            (name, TORCH_DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in loaded.items()
        ]
    except OSError:
        raise
    except Exception as e:  # torch raises whatever a damaged archive leads to
        raise bad_file(path, _UNSAFE, str(e).split("\n")[0] or type(e).__name__) from e
    if found != [(r.name, r.dtype, r.shape) for r in records]:
        raise bad_file(path, _UNSAFE, "torch reads other tensors in it than it names")
    write_safetensors(out, found, (raw_bytes(t).data for t in loaded.values()))
    return records


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, little-endian, row by row."""
    import torch

    flat: NDArray[np.uint8] = (
        tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    )
    return flat
