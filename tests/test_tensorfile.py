from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file

from lorashare_stream import SHAREModel
from lorashare_stream.adapters import safetensors as tensorfile
from lorashare_stream.adapters.dtypes import ITEMSIZE, TORCH_DTYPES, as_stored, narrowed, widened
from lorashare_stream.adapters.folder import open_tensors, tensor_records
from lorashare_stream.adapters.pickles import raw_bytes
from lorashare_stream.adapters.safetensors import float32, parse_header, read_header, write_safetensors
from lorashare_stream.errors import AdapterError
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import tree_digest

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


def maps_of(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_file_is_mapped_once_and_unmapped_when_nothing_of_it_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.arange(100_000.0), "y": torch.ones(7)}, path)
    records = read_header(path)
    with open_tensors((path,)) as opened:
        for record in records:
            assert not opened.raw(record).flags.writeable
        assert maps_of(path) == 1
    assert maps_of(path) == 0
    with open_tensors((path,)) as opened:
        left, own = opened.raw(records[0]), float32(opened, records[0])
    assert left.view("<f4").tolist() == own.tolist() == list(range(100_000))  # a view that is left may be read
    assert maps_of(path) == 1
    del left
    assert maps_of(path) == 0
    assert own[-1] == 99_999


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.EACCES])
def test_a_disk_that_maps_nothing_is_read(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def go(out: Path) -> str:
        plan = plan_for(resolve(collection), Settings(num_components=4, device="cpu"))
        compress(plan, out, executor=SerialExecutor())
        return tree_digest(out)

    def unproved(path: Any, framework: str) -> Any:
        if Path(path).name.startswith("lorashare-stream-"):
            return proof(path, framework=framework)
        raise OSError(number, os.strerror(number))

    def unmapped(fd: int, length: int, **options: Any) -> Any:
        if length:  # of NumPy
            return original(fd, length, **options)
        raise OSError(number, os.strerror(number))

    mapped, proof, original = go(tmp_path / "mapped"), tensorfile.safe_open, tensorfile.mmap.mmap
    monkeypatch.setattr(tensorfile.mmap, "mmap", unmapped)
    monkeypatch.setattr(tensorfile, "safe_open", unproved)
    tensorfile._header.cache_clear()
    assert go(tmp_path / "read") == mapped
    weights = Path(collection[0]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"more")
    with pytest.raises(AdapterError, match="cut short or padded"):
        read_header(weights)


@pytest.mark.parametrize("name", LIES)
def test_a_header_without_its_file_is_refused_for_the_same_reason(tmp_path: Path, name: str) -> None:
    header, data, message = LIES[name]
    path = raw_file(tmp_path / "adapter_model.safetensors", header, data)
    raw = path.read_bytes()
    path.unlink()
    with pytest.raises(AdapterError, match=message):
        parse_header(raw[: len(raw) - len(data)], len(raw), path)


def test_equal_headers_are_proved_once_and_no_other_passes_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path in paths:
        save_file({"x": torch.randn(3, 5)}, path)
    proved: list[Path] = []

    def counted(path: Path, framework: str) -> Any:
        proved.append(path)
        return proof(path, framework=framework)

    proof = tensorfile.safe_open
    monkeypatch.setattr(tensorfile, "safe_open", counted)
    tensorfile._header.cache_clear()
    assert len({read_header(path) for path in paths}) == 1
    assert proved == paths[:1]
    os.truncate(paths[1], paths[1].stat().st_size - 4)
    with pytest.raises(AdapterError, match=r"1\.safetensors: cut short"):
        read_header(paths[1])


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


# -- pickles, which are converted once -------------------------------------------------------------------------------


@pytest.fixture
def pickled(collection: list[str]) -> list[str]:
    for folder in collection:
        path = Path(folder) / "adapter_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    return collection


def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The `.bin` files that torch loads from now on."""
    seen: list[str] = []
    load = torch.load

    def counted(path: Path, **options: Any) -> Any:
        assert options["weights_only"]
        seen.append(str(Path(path).parent))
        return load(path, **options)

    monkeypatch.setattr(torch, "load", counted)
    return seen


def test_pickles_are_loaded_once_a_run_and_a_run_that_failed_has_left_them(
    tmp_path: Path, pickled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, kept, out = loads(monkeypatch), default_workspace(tmp_path / "out") / "converted", tmp_path / "out"
    plan = plan_for(resolve(pickled), Settings(num_components=4, device="cpu"))
    assert not seen
    with monkeypatch.context() as patch:
        patch.setattr("lorashare_stream.pipeline.write_bases", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(plan, out, executor=SerialExecutor())
    assert sorted(seen) == sorted(pickled)
    assert len(list(kept.iterdir())) == len(pickled)
    path = Path(pickled[0]) / "adapter_model.bin"
    os.utime(path, ns=(1, 1))  # perhaps another file: it is not taken for the one that was converted
    compress(plan_for(resolve(pickled), Settings(num_components=4, device="cpu")), out, executor=SerialExecutor())
    assert sorted(seen) == sorted([*pickled, pickled[0]])
    assert not kept.exists()
    compress(
        plan_for(resolve(pickled), Settings(num_components=4, device="cpu")), tmp_path / "x", executor=SerialExecutor()
    )
    assert tree_digest(out) == tree_digest(tmp_path / "x")
    model = SHAREModel.from_pretrained(out)
    assert all(v.problem is None for v in verify(model, originals_of(model, resolve(pickled))))


def test_a_plan_of_pickles_needs_no_torch(pickled: list[str]) -> None:
    code = f"""
import sys
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
assert len(plan_for(resolve({pickled!r}), Settings(device="cpu")).adapters) == {len(pickled)}
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_is_named_as_torch_loads_it(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "adapter_model.bin"
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(keep_vars=True)
    state["tied"], state["part"] = state["0.weight"], torch.arange(10)[2:8:3]
    state["transposed"], state["scalar"] = torch.randn(3, 4).T, torch.tensor(1.5, dtype=torch.float16)
    unread = {"uint16", "uint32", "uint64", *(d for d in TORCH_DTYPES if "float8" in d)}  # by torch, of the old format
    state |= {d: torch.ones(3).to(getattr(torch, d)) for d in TORCH_DTYPES.keys() - (unread if old else set())}
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    records = tensor_records((path,))
    assert [r.name for r in records] == list(state)
    with open_tensors((path,)) as opened:
        for record, tensor in zip(records, state.values(), strict=True):
            assert record.shape == tuple(tensor.shape)
            assert np.array_equal(opened.raw(record), raw_bytes(tensor))


def test_tensors_that_share_their_bytes_count_as_what_they_are_converted_to(pickled: list[str]) -> None:
    plan = plan_for(resolve(pickled), Settings(device="cpu"))
    path = Path(pickled[0]) / "adapter_model.bin"
    whole = torch.zeros(50_000)
    torch.save(torch.load(path, weights_only=True) | {f"base_model.model.{i}": whole for i in range(9)}, path)
    more = plan_for(resolve(pickled), Settings(device="cpu"))
    assert more.sizes["converted"] - plan.sizes["converted"] > 9 * 200_000 - 5_000
    assert more.steps[0].least_bytes - plan.steps[0].least_bytes > 9 * 200_000
