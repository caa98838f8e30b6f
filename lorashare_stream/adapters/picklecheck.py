"""What a `.bin` would have torch do, found out without doing it: pickles are programs.

`torch.load(weights_only=True)` runs nothing of a stranger's, but a file may still ask it for memory by a number
(`bytearray(1 << 40)`), or for tensors of whatever memory holds (`torch.Tensor(2000)`); mapped, it reads past
the end of a part that is shorter than its tensor says. So the pickle is first run here with stand-ins, which
know only what `torch.save` writes for a dictionary of dense tensors.
"""

from __future__ import annotations

import errno
import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from .safetensors import bad_file

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before archives: five pickles, then the storages
_ITEMSIZE = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")
_PUSHES = {
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "BINUNICODE", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "NEWTRUE", "NEWFALSE", "NONE",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DEEPEST = 4  # of tuples in tuples: hashing and printing deeper ones may take forever, or more stack than there is
_GLOBAL = -1
_MADE = object()  # stands for a tensor, and cannot be changed


@dataclass(frozen=True)
class _Storage:
    """Stands for the bytes of a part of the file."""

    key: str
    count: int
    nbytes: int


def _tensor(storage: object, *rest: Any) -> object:
    """Stands for a tensor, which must lie in its storage: torch would make room for it."""
    if storage is _MADE:  # a parameter is made of a tensor
        return _MADE
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor that does not lie in the file")
    offset, size, stride = rest[:3]
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= storage.count:
        raise pickle.UnpicklingError(f"a tensor of shape {list(size)} that is larger than its storage")
    return _MADE


class _DryRun(pickle.Unpickler):
    """Runs a pickle with stand-ins, and notes the storages that it names."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}
        self.result: object = None

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what a file of tensors needs; nothing else."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in (*_TENSORS, *_PARAMETERS):
            return _tensor
        if module in ("torch", "torch.storage") and name in _ITEMSIZE:
            return name
        if module == "torch" and name.islower():  # a dtype, as _rebuild_tensor_v3 takes it
            return f"torch.{name}"
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of tensors needs")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor names: ("storage", kind, key, where it was, how many elements, ...)."""
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it names something else than a storage")
        found = _Storage(key, count, count * _ITEMSIZE[storage])
        if self.storages.setdefault(key, found.nbytes) != found.nbytes:
            raise pickle.UnpicklingError(f"two sizes of storage {key}")
        return found


def check_pickle(path: Path) -> None:
    """Demand that a `.bin` holds a pickle of dense tensors, all of which lie in it; once as long as it does not change.

    Raises:
        AdapterError: saying what else it would have torch do.
    """
    stat = path.stat()
    _check(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1 << 14)
def _check(path: Path, size: int, mtime_ns: int) -> None:
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"  # as torch tells it
        if archive:
            _check_archive(path)
        else:
            _check_stream(path)
    except Exception as e:  # whatever a damaged pickle leads the interpreter to
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # an invalid one is a number in the file
            raise
        fault = str(e) if isinstance(e, pickle.UnpicklingError) and str(e) else f"{type(e).__name__} {e}".strip()
        raise bad_file(path, "not a pickle of plain tensors that torch can load safely", fault) from e


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(p.compress_type != zipfile.ZIP_STORED for p in parts):
            raise pickle.UnpicklingError("compressed parts, which torch does not write")
        if len({p.filename.casefold() for p in parts}) < len(parts):
            raise pickle.UnpicklingError("an archive with two parts of one name")
        sizes = {p.filename.partition("/")[2]: p.file_size for p in parts}
        main = [p for p in parts if p.filename.partition("/")[2] == "data.pkl"]
        if len(main) != 1:
            raise pickle.UnpicklingError(f"an archive with {len(main)} parts named data.pkl, where torch writes one")
        storages = _dry_run(io.BytesIO(archive.read(main[0]))).storages
    for key, nbytes in storages.items():
        found = sizes.get(f"data/{key}")
        if found != nbytes:
            what = "missing" if found is None else f"of {found} bytes"
            raise pickle.UnpicklingError(f"the part data/{key}, of {nbytes} bytes, is {what}")


def _check_stream(path: Path) -> None:
    with path.open("rb") as file:
        if _dry_run(file).result != MAGIC:
            raise pickle.UnpicklingError("it is not of torch's format")
        runs = [_dry_run(file) for _ in range(4)]  # version, machine, tensors, the keys of what follows
        keys = runs[3].result
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(runs[2].storages):
            raise pickle.UnpicklingError("the storages that follow are not those of the tensors")
        needed, left = sum(runs[2].storages.values()), path.stat().st_size - file.tell()
    if needed > left:
        raise pickle.UnpicklingError(f"{needed} bytes of tensors, of which {left} are there")


def _dry_run(file: io.BytesIO | io.BufferedReader) -> _DryRun:
    """Run the pickle that begins here, and stand behind it."""
    start = file.tell()
    _check_opcodes(file)
    file.seek(start)
    run = _DryRun(file)
    run.result = run.load()
    return run


def _check_opcodes(file: IO[bytes]) -> None:
    """Demand the few opcodes that torch.save writes, shallow tuples, and plain keys; on a stack of depths alone."""
    stack: list[int | None] = []  # None is a mark
    memo: dict[object, int | None] = {}
    for opcode, argument, position in pickletools.genops(file):
        name = opcode.name
        if name in _PUSHES:
            stack.append(0)
        elif name in ("MARK", "GLOBAL"):
            stack.append(None if name == "MARK" else _GLOBAL)
        elif name in ("BINPUT", "LONG_BINPUT"):
            if int(str(argument)) > (position or 0):  # the interpreter makes room by this number
                raise pickle.UnpicklingError("a memo with a number beyond all that came before")
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "STOP"):
            _step(name, stack)


def _step(name: str, stack: list[int | None]) -> None:
    """One opcode that takes something off the stack."""
    if name in ("TUPLE", "SETITEMS", "APPENDS"):
        mark = len(stack) - 1 - stack[::-1].index(None)
        taken = [depth or 0 for depth in stack[mark + 1 :]]
        del stack[mark:]
    elif name in _TUPLES or name in ("SETITEM", "APPEND", "BUILD", "REDUCE", "BINPERSID"):
        count = _TUPLES.get(name) or {"SETITEM": 2, "REDUCE": 2}.get(name, 1)
        taken = [depth or 0 for depth in stack[-count:]]
        del stack[-count:]
    else:
        raise pickle.UnpicklingError(f"the opcode {name}, which torch.save does not write")
    if name in ("SETITEM", "SETITEMS") and any(taken[::2]):
        raise pickle.UnpicklingError("a key that is no plain value")
    if name == "BUILD" and stack[-1] == _GLOBAL:
        raise pickle.UnpicklingError("a change of what it asks for")
    if name == "TUPLE" or name in _TUPLES:
        stack.append(1 + max([0, *taken]))
        if (stack[-1] or 0) > _DEEPEST:
            raise pickle.UnpicklingError("tuples in tuples, too deep")
    elif name in ("REDUCE", "BINPERSID"):
        stack.append(0)
