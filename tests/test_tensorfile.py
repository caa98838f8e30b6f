from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from lorashare_stream.adapters.dtypes import ITEMSIZE, as_stored, narrowed, widened
from lorashare_stream.adapters.folder import open_tensors, tensor_records
from lorashare_stream.adapters.safetensors import float32, read_header, write_safetensors
from lorashare_stream.errors import AdapterError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_are_read_as_torch_reads_them(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(7).to(dtype), "i": torch.arange(4)}
    path = tmp_path / f"adapter_model.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    records = tensor_records((path,))
    with open_tensors((path,)) as opened:
        for record in records:
            expected = tensors[record.name]
            assert record.shape == tuple(expected.shape)
            raw = expected.contiguous().reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(opened.raw(record), raw)
            assert b"".join(opened.chunks(record)) == raw.tobytes()
            if record.name != "i":
                assert np.array_equal(float32(opened, record), expected.float().numpy())


@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_rounding_to_bfloat16_and_float16_is_that_of_torch(values: np.ndarray) -> None:
    values = values[~np.isnan(values)]
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = torch.from_numpy(values).to(dtype)
        assert np.array_equal(
            narrowed(values, name).view(np.uint16), expected.view(torch.int16).numpy().view(np.uint16)
        )
        assert np.array_equal(as_stored(values, name), expected.float().numpy())


def test_every_bfloat16_widens_as_in_torch() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widened(bits.view(np.uint8), "BF16", (1 << 16,)), expected, equal_nan=True)


def test_a_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32), np.arange(4, dtype=np.int64)
    with (tmp_path / "x.safetensors").open("wb") as f:
        write_safetensors(f, [("a", "F32", (2, 3)), ("b", "I64", (4,))], [a.tobytes(), b.data.cast("B")], {"k": "v"})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.from_numpy(a).reshape(2, 3))
    assert torch.equal(found["b"], torch.from_numpy(b))


def test_a_stream_that_is_too_short_is_not_passed_off_as_whole() -> None:
    with pytest.raises(RuntimeError, match="4 bytes streamed, 8 announced"):
        write_safetensors(io.BytesIO(), [("a", "F32", (2,))], [b"1234"])


GOOD = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
LIES: dict[str, tuple[Any, bytes, str]] = {
    "truncated data": (GOOD, b"1234", "cut short"),
    "trailing data": (GOOD, b"123456789", "cut short or padded"),
    "not json": (b"{", b"", "not valid JSON"),
    "not an object": ([1], b"", "not an object"),
    "nested beyond reason": (b"[" * 100_000, b"", "not valid JSON"),
    "duplicate keys": (b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{}}', b"1234", "duplicate key 'x'"),
    "shape lies": ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "disagree"),
    "huge shape": ({"x": {"dtype": "F32", "shape": [1 << 61], "data_offsets": [0, 8]}}, b"12345678", "disagree"),
    "negative": ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}, b"", "disagree"),
    "float shape": ({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"12345678", "disagree"),
    "boolean shape": ({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234", "disagree"),
    "many dimensions": ({"x": {"dtype": "U8", "shape": [1] * 99, "data_offsets": [0, 1]}}, b"1", "disagree"),
    "hole": ({"x": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12", "invalid offset"),
    "unknown dtype": (
        {"x": {"dtype": "F128", "shape": [1], "data_offsets": [0, 16]}},
        b"1" * 16,
        "dtype that is not known",
    ),
    "dtype is a list": (
        {"x": {"dtype": [], "shape": [1], "data_offsets": [0, 16]}},
        b"1" * 16,
        "dtype that is not known",
    ),
    "no offsets": ({"x": {"dtype": "F32", "shape": [1]}}, b"1234", "not described"),
    "entry is a number": ({"x": 3}, b"", "not described"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    header, data, message = LIES[name]
    with pytest.raises(AdapterError, match=message):
        read_header(raw_file(tmp_path / "adapter_model.safetensors", header, data))


@pytest.mark.parametrize(
    "content", [b"", b"1234", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", (1 << 64) - 1)]
)
def test_a_length_that_lies_is_refused_before_it_is_allocated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match="cut short"):
        read_header(path)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_records_or_in_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    with contextlib.suppress(AdapterError):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.zeros(100_000)}, path)
    (record,) = read_header(path)
    with open_tensors((path,)) as opened:
        os.truncate(path, 1000)
        with pytest.raises(AdapterError, match="became shorter"):
            opened.raw(record)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/lorashare-stream-was-here",)


@pytest.mark.parametrize("content", [Evil(), [1, 2], {"x": 3}, {1: torch.zeros(2)}, {"x": torch.zeros(2).to_sparse()}])
@pytest.mark.filterwarnings("ignore")
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(content, path)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin"):
        tensor_records((path,))
    assert not Path("/tmp/lorashare-stream-was-here").exists()


def test_the_format_before_torch_1_6_is_read(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save({"x": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)
    (record,) = tensor_records((path,))
    with open_tensors((path,)) as opened:
        assert float32(opened, record).tolist() == [0, 1, 2]


def test_itemsizes_cover_what_safetensors_can_hold() -> None:
    assert set(ITEMSIZE) >= {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"}
