"""`.bin` files: pickles of tensors, which torch reads once, and which are safetensors from then on.

Pickles are programs. `torch.load(weights_only=True)` runs nothing of a stranger's, but a file may still ask it for
memory by a number (`bytearray(1 << 40)`), or for tensors of whatever memory holds (`torch.Tensor(2000)`). So Python's
own unpickler reads them first, with the opcodes and names alone that `torch.save` writes of a dictionary of dense
tensors, and stand-ins for what they name. These tell the shapes, too, so that a plan needs neither torch nor values.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import pickle
import pickletools
import tempfile
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import atomic_file, own_folder
from .dtypes import ITEMSIZE, TORCH_DTYPES
from .foreign import disguised_file
from .safetensors import MAX_DIMS, TensorReader, TensorRecord, bad_file, tensor_records_of, write_safetensors

if TYPE_CHECKING:
    import torch

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before archives: five pickles, then the storages
_UNSAFE = "not a pickle of plain tensors that torch can load safely"
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
_OPCODES = (
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
)  # fmt: skip


class _Dtype(str):
    """A dtype, or a kind of storage, that a pickle names."""

    def __call__(self, *_: Any) -> None:
        raise UnpicklingError("a call that no file of plain tensors needs")


class _Storage(NamedTuple):
    dtype: str
    nbytes: int


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class _Dict(dict[str, Any]):
    """A dictionary whose keys are texts: to hash tuples of tuples takes forever, or all of the stack."""

    def __setitem__(self, key: str, value: Any) -> None:
        if type(key) is not str:
            raise UnpicklingError("a key that is no text")
        super().__setitem__(key, value)


def _rebuilt(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: Any) -> _Tensor:
    if type(storage) is not _Storage:
        raise UnpicklingError("a tensor that does not lie in the file")
    dtype = more[2] if more[2:] and type(more[2]) is _Dtype else storage.dtype  # of _rebuild_tensor_v3
    if type(size) is not tuple or not len(size) == len(stride) <= MAX_DIMS or not _are_ints(offset, *size, *stride):
        raise UnpicklingError("a tensor of impossible shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else -1
    if max(last + 1, math.prod(size)) * ITEMSIZE[dtype] > storage.nbytes:
        raise UnpicklingError(f"a tensor of shape {list(size)} that is larger than its storage")
    return _Tensor(str(dtype), size)


def _are_ints(*values: Any) -> bool:
    return all(type(n) is int and n >= 0 for n in values)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: _Dict(),
    **{("torch._utils", f"_rebuild_{n}"): _rebuilt for n in ("tensor", "tensor_v2", "tensor_v3")},
    **{("torch._utils", f"_rebuild_{n}"): lambda data, *_: data for n in ("parameter", "parameter_with_state")},
    **{("torch", name): _Dtype(dtype) for name, dtype in TORCH_DTYPES.items()},
    **{(module, n): _Dtype(dtype) for module in ("torch", "torch.storage") for n, dtype in _STORAGES.items()},
}


class _Steps(dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        name = next((o.name for o in pickletools.opcodes if o.code == chr(code)), code)
        raise UnpicklingError(f"the opcode {name}, which torch.save does not write")


class _Unpickler(pickle._Unpickler):
    """Reads one pickle; `storages` are the bytes of what it names, by key."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = _Steps(
        {ord(o.code): pickle._Unpickler.dispatch[ord(o.code)] for o in pickletools.opcodes if o.name in _OPCODES}
    )

    def __init__(self, file: IO[bytes], storages: dict[str, int]) -> None:
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise UnpicklingError(f"it asks for {module}.{name}, which no file of plain tensors needs")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or type(dtype) is not _Dtype or type(key) is not str or not _are_ints(count):
            raise UnpicklingError("it names something else than a storage")
        found = _Storage(str(dtype), count * ITEMSIZE[dtype])
        if self.storages.setdefault(key, found.nbytes) != found.nbytes:
            raise UnpicklingError(f"two sizes of storage {key}")
        return found

    def _build(self) -> None:  # the state of a dictionary says nothing of its tensors
        if type(self.stack.pop()) is not _Dict or type(self.stack[-1]) is not _Dict:
            raise UnpicklingError("a change of what is no dictionary")

    dispatch |= {pickle.BUILD[0]: _build, pickle.EMPTY_DICT[0]: lambda self: self.stack.append(_Dict())}


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
        what = disguised_file(path)
        if what is not None:
            raise what from e
        fault = str(e) if isinstance(e, UnpicklingError) and str(e) else f"{type(e).__name__} {e}".strip()
        raise bad_file(path, _UNSAFE, fault) from e
    if not isinstance(result, dict):
        raise bad_file(path, "not a dictionary of tensors", type(result).__name__, "a dictionary of tensors")
    for name, value in result.items():
        if type(value) is not _Tensor or not name.isprintable():
            kind = type(value).__name__.strip("_").lower()
            raise bad_file(path, "an entry is not a dense tensor under a printable key", kind, key=name)
    return tensor_records_of(tuple((name, t.dtype, t.shape) for name, t in result.items()))


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
        storages: dict[str, int] = {}
        result = _Unpickler(io.BytesIO(archive.read(main[0])), storages).load()
    for key, nbytes in storages.items():
        found = sizes.get(f"data/{key}")
        if found != nbytes:
            what = "missing" if found is None else f"of {found} bytes"
            raise UnpicklingError(f"the part data/{key}, of {nbytes} bytes, is {what}")
    return result


def _streamed(file: IO[bytes], size: int) -> Any:
    """The dictionary in a file of the format before archives."""
    storages: dict[str, int] = {}
    if _Unpickler(file, storages).load() != MAGIC:
        raise UnpicklingError("it is not of torch's format")
    _, _, result, keys = (_Unpickler(file, storages).load() for _ in range(4))  # version, machine, tensors, keys
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise UnpicklingError("the storages that follow are not those of the tensors")
    needed, left = sum(storages.values()), size - file.tell()
    if needed > left:
        raise UnpicklingError(f"{needed} bytes of tensors, of which {left} are there")
    return result


def open_pickle(path: Path, folder: Path | None) -> TensorReader:
    """A `.bin` as safetensors, which a folder keeps, or a nameless file; an AdapterError if torch cannot read it."""
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
        found = [(n, TORCH_DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for n, t in loaded.items()]
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

    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return np.asarray(flat.view(torch.uint8).numpy())
