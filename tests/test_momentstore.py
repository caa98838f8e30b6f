"""Moments on disk: arrays that zarr shows to anyone, and no damage that is believed."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from lorashare_stream.linalg.moments import Accumulator, HostSum, Moment, empty, of_columns
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import Mapper, SerialExecutor
from lorashare_stream.settings import QUANTUM, Settings
from lorashare_stream.stages.accumulate import accumulate_modules
from lorashare_stream.workspace import leases
from lorashare_stream.workspace import moments as momentstore
from lorashare_stream.workspace.leases import Need, arrange, height_of
from lorashare_stream.workspace.moments import DamagedMoment, Rows
from lorashare_stream.workspace.records import Marker, Slot
from lorashare_stream.workspace.workspace import Workspace

from .conftest import make_collection, tree_digest

WORDS = "of a test"


def numbers(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def summed(n: int, d: int, dtype: str = "float32") -> Moment:
    start = empty(d, dtype)
    into = Accumulator(start, HostSum(start))
    into.add(numbers((n, d), dtype))
    return into.finish()


MOMENTS = [of_columns(numbers((20, 30), "float32")), of_columns(numbers((40, 50), "float64")), summed(90, 40),
           summed(50, 60), summed(9, 3, "float64"), empty(3, stacked=True), empty(3)]  # fmt: skip


@pytest.fixture(params=["a chunk", "chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Moments of one chunk, and of several."""
    if request.param == "chunks":
        monkeypatch.setattr(leases, "SECOND_CHUNK", 4000)
        monkeypatch.setattr(leases, "COLUMNS_CHUNK", 1000)
        monkeypatch.setattr(leases, "QUANTUM", 8)
    return str(request.param)


def need_of(moment: Moment) -> Need:
    form = "columns" if moment.second is None else "second"
    return Need(form, moment.dim, moment.count if form == "columns" else moment.dim)


def places(root: Path, *moments: Moment, lease: str = "lease") -> list[Slot]:
    """Places for moments, in one array, of modules `q0`, `q1`, ..."""
    first = moments[0].second if moments[0].second is not None else moments[0].columns
    assert first is not None
    needs = {(f"q{i}", side): need_of(m) for i, m in enumerate(moments) for side in "A"}
    slots = leases.make_arrays(root, arrange(lease, needs, first.dtype.name), WORDS)
    return [slots[f"q{i}"]["A"] for i in range(len(moments))]


def kept(root: Path, *moments: Moment, lease: str = "lease") -> list[Marker]:
    """Markers of moments that are saved, as both sides of modules."""
    slots = places(root, *moments, lease=lease)
    records = momentstore.save(root, slots, ((moment, 0) for moment in moments))
    return [Marker(module=f"q{i}", entries=1, admitted="", A=each, B=each) for i, each in enumerate(records)]


def same(ours: Moment, theirs: Moment) -> None:
    for name in ("second", "columns", "sum"):
        a, b = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(a, b)
        assert a is None or a.dtype == b.dtype
    assert (ours.count, ours.energy) == (theirs.count, theirs.energy)
    assert ours.second is None or ours.second.flags.f_contiguous  # as syrk and the solvers take it


# -- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_moment_comes_back_to_the_last_bit_and_zarr_shows_it(tmp_path: Path, chunks: str, moment: Moment) -> None:
    double = Moment(*(x if x is None else 2 * x for x in (moment.second, moment.columns, moment.sum)), moment.count,
                    (4 if moment.second is None else 2) * moment.energy)  # fmt: skip
    markers = kept(tmp_path, moment, double)
    for i, (marker, expected) in enumerate(zip(markers, (moment, double), strict=True)):
        same(momentstore.load(tmp_path, marker.A), expected)
        group = zarr.open(str(tmp_path / "lease"), mode="r")
        array, sums = group[marker.A.slot.array], group[f"sum_of_{marker.A.slot.array}"]
        form = expected.second if expected.second is not None else expected.columns
        assert form is not None
        np.testing.assert_array_equal(np.asarray(array[i])[: len(form)], form)
        np.testing.assert_array_equal(np.asarray(sums[i]), expected.sum)
        assert array.attrs["modules"] == sums.attrs["modules"] == ["q0", "q1"]
        assert array.nchunks_initialized == array.nchunks  # those of zeros too
        assert {*array.metadata.to_dict()} == {*sums.metadata.to_dict()}
        assert [codec["name"] for codec in array.metadata.to_dict()["codecs"]] == ["bytes", "crc32c"]


@given(data=st.data())
def test_blocks_of_any_sizes_give_the_same_columns(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n, d = data.draw(st.integers(1, 60), label="n"), data.draw(st.integers(1, 5), label="d")
    cuts = sorted(data.draw(st.sets(st.integers(0, n)), label="cuts") | {0, n})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "COLUMNS_CHUNK", data.draw(st.integers(1, 2000), label="chunk"))
        patch.setattr(leases, "QUANTUM", data.draw(st.integers(1, 30), label="quantum"))
        root, values = tmp_path_factory.mktemp("moments"), numbers((n, d), "float32")
        whole = of_columns(values)
        (slot,) = places(root, whole)
        rows = Rows(root, slot, n)
        for start, end in itertools.pairwise(cuts):
            rows.add(values[start:end].copy())
        saved = Moment(None, rows.kept, whole.sum, n, whole.energy)
        (facts,) = momentstore.save(root, [slot], [(saved, rows.checksum)])
        same(momentstore.load(root, facts), whole)
        assert rows.kept is None or n <= slot.height
        assert len(list((root / "lease" / slot.array).glob("c.*"))) == len(slot.tops(n))
    shutil.rmtree(root)


@given(rows=st.integers(0, 40_000), dim=st.integers(1, 20_000), item=st.sampled_from([4, 8]))
def test_chunks_are_bounded_and_hardly_filled_up(rows: int, dim: int, item: int) -> None:
    for form, n in (("columns", rows), ("second", dim)):
        height = height_of(form, n, dim, item)
        limit = leases.SECOND_CHUNK if form == "second" else max(leases.COLUMNS_CHUNK, QUANTUM * dim * item)
        assert 1 <= height <= max(1, n)
        assert height * dim * item <= limit
        count = -(-n // height)
        assert count * height * 8 <= 9 * n + 8 * count
        assert count <= 1 + 2 * n * dim * item // min(limit, leases.COLUMNS_CHUNK)


@given(counts=st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_modules_of_many_numbers_of_vectors_have_few_arrays_and_places_of_their_own(counts: list[int]) -> None:
    needs = {(f"m{i}", "A"): Need("columns", 7, n) for i, n in enumerate(counts)}
    found = arrange("lease", needs, "float32")
    slots = [found[f"m{i}"]["A"] for i in range(len(counts))]
    assert len({(s.array, s.index) for s in slots}) == len(counts)
    assert len({s.array for s in slots}) <= min(len(set(counts)), 8 * 13 + 1)
    for slot, n in zip(slots, counts, strict=True):
        assert max(1, n) <= slot.shape[1] <= max(1, 1.1 * n)
        assert slot.index < slot.shape[0]


# -- what is not believed ----------------------------------------------------------------------------


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


@pytest.mark.few(4)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", range(4))
def test_no_damage_to_any_chunk_is_believed(tmp_path: Path, chunks: str, number: int, change: str) -> None:
    (marker,) = kept(tmp_path, MOMENTS[number])
    paths = sorted((tmp_path / "lease").rglob("*_A_*/c.*"))
    assert len(paths) >= (2 if chunks == "a chunk" else 3)
    for path in paths:
        content = path.read_bytes()
        damaged = CHANGES[change](content)
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(DamagedMoment, match="damaged"):
            momentstore.load(tmp_path, marker.A)
        path.write_bytes(content)
    same(momentstore.load(tmp_path, marker.A), MOMENTS[number])


@pytest.mark.parametrize("number", [0, 3])
def test_what_describes_an_array_is_mended_and_believed_never(tmp_path: Path, number: int) -> None:
    (marker,) = kept(tmp_path, MOMENTS[number])
    for path in sorted(tmp_path.rglob("zarr.json")):
        content = path.read_bytes()
        for position in range(0, len(content), 23):
            path.write_bytes(flipped(position)(content))
            momentstore._OPEN.clear()
            with suppress(DamagedMoment):  # words, or a fill value, may be others
                same(momentstore.load(tmp_path, marker.A), MOMENTS[number])
        leases.sweep(tmp_path, {"q0": marker}, WORDS)
        assert path.read_bytes() == content
    path.unlink()
    leases.sweep(tmp_path, {"q0": marker}, WORDS)
    assert path.read_bytes() == content


def test_a_moment_in_the_place_of_another_is_not_believed(tmp_path: Path) -> None:
    first, second = kept(tmp_path, summed(90, 40), summed(91, 40))
    for sums in ("", "sum_of_"):
        a, b = sorted((tmp_path / "lease" / f"{sums}{first.A.slot.array}").glob("c.*"))
        shutil.copy(b, a)
    with pytest.raises(DamagedMoment, match="fail their checksum"):
        momentstore.load(tmp_path, first.A)
    with pytest.raises(DamagedMoment, match="not what was written"):
        momentstore.load(tmp_path, second.A.model_copy(update={"energy": 1.0}))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_what_the_machine_cannot_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (marker,) = kept(tmp_path, MOMENTS[0])
    momentstore.load(tmp_path, marker.A)

    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("zarr.storage._local._get", fail)
    with pytest.raises(OSError, match="columns_A_30_20") as caught:
        momentstore.load(tmp_path, marker.A)
    assert caught.value.errno == number


# -- leases ------------------------------------------------------------------------------------------


def test_what_no_marker_names_is_swept(tmp_path: Path) -> None:
    markers = kept(tmp_path, summed(90, 40), summed(91, 40), summed(92, 40))
    kept(tmp_path, summed(90, 40), lease="dead")
    array = tmp_path / "lease" / markers[0].A.slot.array
    (array / "c.1.0.abc.partial").write_bytes(b"half")
    (tmp_path / "zarr.abc.partial").write_bytes(b"half")
    (tmp_path / "lease" / "columns_A_9_9").mkdir()
    leases.sweep(tmp_path, {"q1": markers[1]}, WORDS)
    assert [p.name for p in tmp_path.iterdir()] == ["lease"]
    assert sorted(p.name for p in array.iterdir()) == ["c.1.0.0", "zarr.json"]
    same(momentstore.load(tmp_path, markers[1].A), summed(91, 40))
    leases.remove(tmp_path, markers[1])
    assert sorted(p.name for p in array.iterdir()) == ["zarr.json"]
    leases.sweep(tmp_path, {}, WORDS)
    assert not list(tmp_path.iterdir())


class Dead(Exception):
    """The end of a driver."""


def test_a_task_of_a_dead_run_never_writes_where_a_later_one_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Callable[[], Any]] = []
    mapped = Mapper.map

    def dying(self: Mapper, fn: Any, tasks: Any, *rest: Any, **options: Any) -> Iterator[Any]:
        """The driver dies with all tasks begun: what they would do stays to be done."""
        if getattr(fn, "func", None) is accumulate_modules:
            begun.extend(lambda task=task: fn(task) for task in tasks)
            raise Dead
        return mapped(self, fn, tasks, *rest, **options)

    collection, out = make_collection(tmp_path / "adapters", 8, {"q": (14, 70), "v": (20, 9)}), tmp_path / "out"
    plan = plan_for(resolve(collection), Settings(device="cpu", num_components=4))
    monkeypatch.setattr(Mapper, "map", dying)
    with pytest.raises(Dead):
        compress(plan, out, executor=SerialExecutor())
    monkeypatch.setattr(Mapper, "map", mapped)
    begun[0]()  # one task comes to its end before the next run begins, the others while it is done, and after
    go = plan_for(resolve(collection), Settings(device="cpu", num_components=4), default_workspace(out))
    done = 0

    def watch(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        nonlocal done
        for result in results:
            if step in ("accumulate", "fit"):
                done += 1
                with suppress(FileNotFoundError):  # its lease was swept
                    begun[-1]()
            yield result

    compress(go, out, executor=SerialExecutor(), progress=watch)
    assert done == 4
    before = tree_digest(out)
    work = Workspace(default_workspace(out))
    moments = {path: path.read_bytes() for m in work.markers.values() for path in m.A.files(work.moments)}
    for task in begun:
        momentstore._OPEN.clear()
        with pytest.raises(FileNotFoundError):
            task()
    assert Workspace(work.root).markers == work.markers
    assert {path: path.read_bytes() for path in moments} == moments
    compress(
        plan_for(resolve(collection), Settings(device="cpu", num_components=4), work.root),
        out,
        executor=SerialExecutor(),
    )
    assert tree_digest(out) == before


# -- what a user sees --------------------------------------------------------------------------------


def test_the_lines_of_the_manual_show_named_second_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, {"q": (14, 70), "v": (14, 9)}), tmp_path / "OUT"
    plan = plan_for(resolve(collection), Settings(device="cpu", num_components=4))
    compress(plan, out, executor=SerialExecutor())
    manual = (Path(__file__).resolve().parents[1] / "docs" / "operations.md").read_text()
    lines = manual.partition("```python\n")[2].partition("```")[0].replace("768", "14")
    assert len([line for line in lines.splitlines() if line]) == 5
    exec(lines.replace("OUT.workspace", str(tmp_path / "OUT.workspace")), {})
    arrays, energies = capsys.readouterr().out.splitlines()
    assert "'second_A_14': ((2, 14, 14), 'A'" in arrays
    assert "'columns_B_70_32': ((1, 32, 70), 'B'" in arrays
    work = Workspace(default_workspace(out))
    read = eval(energies, {"np": np})
    assert read == {m: pytest.approx(work.markers[m].A.energy) for m in "qv"}


EXPERTS = {f"model.layers.{i}.mlp.experts.{j}.up_proj": (24, 12) for i in range(2) for j in range(128)}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("modules", "adapters", "options"),
    [
        pytest.param(EXPERTS, 4, {}, marks=pytest.mark.slow),
        pytest.param(EXPERTS, 3, {"num_components": "auto"}, marks=pytest.mark.slow),
        ({f"layers.{i}.q": (600, 300) for i in range(3)}, 200, {}),  # sums, and columns
        ({"q": (40, 30), "v": (20, 9)}, 400, {"num_components": 8}),  # mostly what is known of adapters
        pytest.param(EXPERTS, 8, {"discard_moments": True}, marks=pytest.mark.slow),
    ],
)
def test_a_plan_tells_bytes_and_files_of_the_workspace(
    tmp_path: Path, modules: dict[str, tuple[int, int]], adapters: int, options: dict[str, Any]
) -> None:
    collection, out = make_collection(tmp_path / "adapters", adapters, modules), tmp_path / "out"
    plan = plan_for(resolve(collection), Settings.from_mapping({"device": "cpu", "num_components": 16} | options))
    compress(plan, out)
    sizes = [path.stat().st_size for path in default_workspace(out).rglob("*") if path.is_file()]
    assert 1 / 1.5 <= plan.sizes["workspace_files"] / len(sizes) <= 1.5
    assert 1 / 1.5 <= plan.sizes["workspace"] / sum(sizes) <= 1.5
    assert len(sizes) <= 8 * len(modules) or modules is not EXPERTS


def test_columns_of_several_chunks_have_as_many_files_as_the_plan_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "COLUMNS_CHUNK", 40_000)
    monkeypatch.setattr(leases, "SECOND_CHUNK", 40_000)
    monkeypatch.setattr(leases, "QUANTUM", 16)
    modules = {f"layers.{i}.q": (150, 300) for i in range(3)}
    collection, out = make_collection(tmp_path / "adapters", 100, modules), tmp_path / "out"
    plan = plan_for(resolve(collection), Settings(device="cpu", num_components=16))
    compress(plan, out, executor=SerialExecutor())
    chunks = list((default_workspace(out) / "moments").rglob("c.*"))
    moments, files = plan._moments
    assert (len(chunks), sum(path.stat().st_size for path in chunks)) == (files, moments)
    assert len(chunks) == 3 * (3 + 13 + 2)
