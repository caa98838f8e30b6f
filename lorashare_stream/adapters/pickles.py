"""`.bin` files: pickles of tensors, read by torch's restricted unpickler and never by plain pickle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from .dtypes import ITEMSIZE
from .picklecheck import check_pickle
from .safetensors import CHUNK, TensorRecord, bad_file

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.complex64: "C64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle file, on the CPU, memory-mapped where the format allows it.

    Raises:
        AdapterError: if it is no plain dictionary of dense tensors.
    """
    check_pickle(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 is no archive and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # torch raises whatever a damaged archive leads to
        fault = str(e).split("\n")[0] or type(e).__name__
        raise bad_file(path, "not a pickle of plain tensors that torch can load safely", fault) from e
    if not isinstance(loaded, dict):
        raise bad_file(path, "not a dictionary of tensors", type(loaded).__name__, "a dictionary of tensors")
    for name, tensor in loaded.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(name, str) or not name.isprintable() or not dense or tensor.is_meta:
            raise bad_file(
                path, "an entry is not a dense tensor under a printable key", type(tensor).__name__, key=str(name)
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise bad_file(
                path, "a tensor is larger than its data (a view that repeats it)", list(tensor.shape), key=name
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise bad_file(path, "a dtype that is not known", tensor.dtype, ", ".join(DTYPE_NAMES.values()), key=name)
    return loaded


def pickle_records(path: Path) -> tuple[TensorRecord, ...]:
    """The tensors of a pickle file; they have no place in it, so every offset is 0."""
    return tuple(
        TensorRecord(name, dtype := DTYPE_NAMES[t.dtype], tuple(t.shape), 0, math.prod(t.shape) * ITEMSIZE[dtype])
        for name, t in load_pickle(path).items()
    )


def raw_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, little-endian, row by row."""
    flat: NDArray[np.uint8] = (
        tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy()
    )
    return flat


class PickleReader:
    """A `.bin` file behind the interface of `tensorfile.TensorReader`; read whole."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_pickle(path)

    def raw(self, record: TensorRecord) -> NDArray[np.uint8]:
        """The tensor's bytes, little-endian, as stored."""
        return raw_bytes(self._tensors[record.name])

    def block(self, records: Sequence[TensorRecord]) -> NDArray[np.uint8]:
        """The bytes of several tensors, little-endian, as stored, one after the other."""
        return np.concatenate([self.raw(record) for record in records])

    def chunks(self, record: TensorRecord) -> Iterator[bytes]:
        """The tensor's bytes, a bounded number at a time."""
        flat = self.raw(record)
        for start in range(0, len(flat), CHUNK):
            yield flat[start : start + CHUNK].tobytes()

    def __enter__(self) -> PickleReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors = {}
