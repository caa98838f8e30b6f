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

from .tensorfile import bad_file

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before archives: five pickles, then the storages
_ITEMSIZE = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PARAMETERS = ("_rebuild_parameter", "_rebuild_parameter_with_state")


@dataclass(frozen=True)
class _Storage:
    """Stands for the bytes of a part of the file."""

    key: str
    nbytes: int


class _Tensor:
    """Stands for a tensor on a storage; what else it is made of, torch checks."""

    def __init__(self, storage: object, *rest: object) -> None:
        if not isinstance(storage, _Storage | _Tensor):
            raise pickle.UnpicklingError("a tensor that does not lie in the file")


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
            return _Tensor
        if module in ("torch", "torch.storage") and name in _ITEMSIZE:
            return name
        if module == "torch" and name.islower():  # a dtype, as _rebuild_tensor_v3 takes it
            return f"torch.{name}"
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of tensors needs")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor names: ("storage", kind, key, where it was, how many elements, ...)."""
        kind, storage, key, _, count = pid[:5]
        if kind != "storage" or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it names something else than a storage")
        found = _Storage(str(key), count * _ITEMSIZE[storage])
        self.storages[found.key] = max(found.nbytes, self.storages.get(found.key, 0))
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
        if zipfile.is_zipfile(path):
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
        if file.peek(2)[:2] == b"PK":
            raise pickle.UnpicklingError("an archive that is cut short")
        if _dry_run(file).result != MAGIC:
            raise pickle.UnpicklingError("it is not of torch's format")
        runs = [_dry_run(file) for _ in range(4)]  # version, machine, tensors, the keys of what follows
        needed, left = sum(runs[2].storages.values()), path.stat().st_size - file.tell()
    if needed > left:
        raise pickle.UnpicklingError(f"{needed} bytes of tensors, of which {left} are there")


def _dry_run(file: io.BytesIO | io.BufferedReader) -> _DryRun:
    """Run the pickle that begins here, and stand behind it."""
    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > (position or 0):  # it makes room by this number
            raise pickle.UnpicklingError("a memo with a number beyond all that came before")
    file.seek(start)
    run = _DryRun(file)
    run.result = run.load()
    return run
