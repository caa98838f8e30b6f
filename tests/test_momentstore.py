"""Moments on disk: arrays as Zarr writes and reads them, and no damage that is believed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from lorashare_stream.linalg.moments import Accumulator, HostSum, Moment, empty, of_columns
from lorashare_stream.workspace import moments as momentstore
from lorashare_stream.workspace import zarrfile
from lorashare_stream.workspace.moments import DamagedMoment

ARRAYS = [
    ("sum", (1,)), ("sum", (1023,)), ("sum", (1024,)), ("sum", (2500,)), ("sum", (0,)),
    ("columns", (0, 5)), ("columns", (1, 1)), ("columns", (7, 30)), ("columns", (1500, 40)), ("columns", (300, 4095)),
    ("columns", (600, 4096)), ("columns", (513, 4097)), ("columns", (30, 9000)),
    ("second", (1, 1)), ("second", (40, 40)), ("second", (1023, 1023)), ("second", (1024, 1024)),
    ("second", (1025, 1025)), ("second", (2100, 2100)),
]  # fmt: skip


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_zarr(path: Path, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str) -> zarr.Array[Any]:
    return zarr.create_array(
        str(path), shape=shape, dtype=dtype, chunks=chunk, compressors=[Crc32cCodec()], fill_value=0,
        config={"write_empty_chunks": True},
    )  # fmt: skip


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "shape"), ARRAYS)
def test_what_zarr_would_write_is_written(tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
    values = numbers(shape, dtype)
    ours = momentstore.create(tmp_path / "ours" / name, shape, dtype)
    ours.write(values)
    theirs = by_zarr(tmp_path / "theirs" / name, shape, ours.chunk, dtype)
    theirs[...] = values
    found, expected = files(tmp_path / "ours"), files(tmp_path / "theirs")
    described = f"{name}/zarr.json"
    assert json.loads(found.pop(described)) == json.loads(expected.pop(described))
    assert found == expected
    array = zarr.open_array(str(tmp_path / "ours" / name), mode="r")
    assert array.nchunks_initialized == array.nchunks
    assert array.metadata == theirs.metadata
    for path in ("ours", "theirs"):
        read = zarrfile.opened(tmp_path / path / name).read()
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, values)
    np.testing.assert_array_equal(np.asarray(array[...]), values)


def test_chunks_are_at_most_4_MiB_of_float32_and_their_rows_divide_a_quantum(tmp_path: Path) -> None:
    for number, (name, shape) in enumerate(ARRAYS):
        chunk = momentstore.create(tmp_path / str(number) / name, shape, "float32").chunk
        assert np.prod(chunk) <= 1 << 20
        assert 1024 % chunk[0] == 0 or chunk[0] == shape[0]


def test_one_array_is_not_written_over_another(tmp_path: Path) -> None:
    momentstore.create(tmp_path / "sum", (3,), "float64")
    with pytest.raises(FileExistsError):
        momentstore.create(tmp_path / "sum", (3,), "float64")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_blocks_of_rows_of_any_size_in_any_order(tmp_path: Path, data: st.DataObject) -> None:
    n, d = data.draw(st.integers(1, 40), label="n"), data.draw(st.integers(1, 9), label="d")
    chunk = data.draw(st.integers(1, n), label="height"), data.draw(st.integers(1, d), label="width")
    flat = data.draw(st.booleans(), label="one axis")
    shape, chunk = ((n,), chunk[:1]) if flat else ((n, d), chunk)
    cuts = sorted(data.draw(st.sets(st.integers(0, n)), label="cuts") | {0, n})
    blocks = data.draw(st.permutations(list(itertools.pairwise(cuts))), label="blocks")
    wide = numbers((n, 2 * d), "float32")
    values = wide[:, 0] if flat else wide[:, ::2] if data.draw(st.booleans(), label="strided") else wide[:, :d].copy()
    shutil.rmtree(tmp_path / "array", ignore_errors=True)
    array = zarrfile.create(tmp_path / "array", shape, chunk, "float32")
    before = np.zeros(shape, "float32")
    for start, end in blocks:
        array.write(values[start:end], start)
        before[start:end] = values[start:end]
    np.testing.assert_array_equal(before, values)
    np.testing.assert_array_equal(array.read(), values)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(str(array.path), mode="r")[...]), values)


def test_rows_that_are_not_written_yet_are_zeros(tmp_path: Path) -> None:
    array = zarrfile.create(tmp_path / "array", (10, 3), (4, 3), "float64")
    ones = np.ones((3, 3))
    array.write(ones, 2)
    np.testing.assert_array_equal(np.asarray(zarr.open_array(str(array.path))[...])[:, 0], [0] * 2 + [1] * 3 + [0] * 5)
    for wrong, first in ((ones, 8), (ones, -1), (ones[:, :2], 0)):
        with pytest.raises(ValueError, match="do not fit"):
            array.write(wrong, first)


def test_quanta_are_written_as_they_lie_and_the_rest_one_chunk_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing needs to be copied the kernel gets the memory of the caller."""
    handed: list[Any] = []
    original = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: (handed.extend(views[:1]), original(fd, views))[1])

    def own(values: np.ndarray) -> list[bool]:
        return [np.shares_memory(np.frombuffer(view, np.uint8), values) for view in handed]

    rows = numbers((2048, 600), "float32")
    array = momentstore.create(tmp_path / "columns", (2048, 600), "float32")
    handed.clear()
    array.write(rows[:1024])
    array.write(rows[1024:], 1024)
    assert own(rows) == [True, True]
    second = np.asfortranarray(numbers((700, 700), "float32"))
    array = momentstore.create(tmp_path / "second", (700, 700), "float32")
    handed.clear()
    array.write(second.T)
    assert own(second) == [True]


# -- moments -----------------------------------------------------------------------------------------


def summed(n: int, d: int) -> Moment:
    start = empty(d)
    into = Accumulator(start, HostSum(start))
    into.add(numbers((n, d), "float32"))
    return into.finish()


MOMENTS = [of_columns(numbers((20, 30), "float32")), of_columns(numbers((1500, 50), "float64")), summed(90, 40),
           summed(50, 1100), empty(3, stacked=True), empty(3)]  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_moment_comes_back_to_the_last_bit(tmp_path: Path, moment: Moment) -> None:
    facts = momentstore.save(tmp_path, moment)
    back = momentstore.load(tmp_path, facts)
    for name in ("second", "columns", "sum"):
        ours, theirs = getattr(back, name), getattr(moment, name)
        np.testing.assert_array_equal(ours, theirs)
        if theirs is not None:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(np.asarray(zarr.open_array(str(tmp_path / name), mode="r")[...]), theirs)
    assert (back.count, back.energy) == (moment.count, moment.energy)
    assert back.second is None or back.second.flags.f_contiguous  # as syrk and the solvers take it


def flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        at = position % len(content)
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    return flip


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "first bit": flipped(0), "last number": flipped(-5), "checksum": flipped(-4), "end of checksum": flipped(-1),
    "cut by a byte": lambda c: c[:-1], "no checksum": lambda c: c[:-4], "cut to half": lambda c: c[: len(c) // 2],
    "empty": lambda c: b"", "longer": lambda c: c + b"\0", "twice": lambda c: c + c, "missing": lambda c: None,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", range(4))
def test_no_damage_to_any_file_is_believed(tmp_path: Path, number: int, change: str) -> None:
    facts = momentstore.save(tmp_path, MOMENTS[number])
    paths = [p for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert len(paths) >= 4
    for path in paths:
        content = path.read_bytes()
        damaged = CHANGES[change](content)
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(DamagedMoment, match="damaged"):
            momentstore.load(tmp_path, facts)
        path.write_bytes(content)
    momentstore.load(tmp_path, facts)


@pytest.mark.parametrize("number", range(4))
def test_chunks_of_another_moment_are_not_believed(tmp_path: Path, number: int) -> None:
    moment = MOMENTS[number]
    double = Moment(
        None if moment.second is None else 2 * moment.second, None if moment.columns is None else 2 * moment.columns,
        moment.sum, moment.count, moment.energy,
    )  # fmt: skip
    facts = momentstore.save(tmp_path, double)
    with pytest.raises(DamagedMoment, match="not what was written"):
        momentstore.load(tmp_path, facts)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_the_machine_cannot_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    facts = momentstore.save(tmp_path, MOMENTS[0])

    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="sum/c/0") as caught:
        momentstore.load(tmp_path, facts)
    assert caught.value.errno == number


def test_reads_and_writes_that_do_a_part_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance, moment = np.random.default_rng(0), MOMENTS[0]
    writev, preadv = os.writev, os.preadv

    def part(views: Any) -> list[bytes]:
        return [memoryview(views[0])[: chance.integers(1, 1 + len(views[0]))]]

    monkeypatch.setattr(os, "writev", lambda fd, views: writev(fd, part(views)))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, part(views), at))
    back = momentstore.load(tmp_path, momentstore.save(tmp_path, moment))
    np.testing.assert_array_equal(back.columns, moment.columns)


def test_a_disk_that_is_full_in_the_middle_of_a_chunk_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = os.writev, []

    def full(fd: int, views: Any) -> int:
        calls.append(fd)
        if len(calls) < 3:  # the metadata, and a part of the chunk
            return original(fd, [views[0][:100]] if len(calls) == 2 else views)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*columns/c/0/0'"):
        momentstore.save(tmp_path, MOMENTS[0])
    assert (tmp_path / "columns" / "c" / "0" / "0").stat().st_size == 100


def test_what_a_run_has_just_written_and_reads_otherwise_is_of_the_machine(tmp_path: Path) -> None:
    array = zarrfile.create(tmp_path / "columns", (8, 3), (8, 3), "float32")
    array.write(np.ones((4, 3), np.float32))
    chunk = tmp_path / "columns" / "c" / "0" / "0"
    chunk.write_bytes(flipped(7)(chunk.read_bytes()))
    with pytest.raises(OSError, match=r"fails its checksum.*columns/c/0/0"):
        array.write(np.ones((4, 3), np.float32), 4)
