from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lorashare_stream.adapters.dtypes import ITEMSIZE
from lorashare_stream.adapters.folder import open_tensors, tensor_records
from lorashare_stream.checkpoint import index as indexes
from lorashare_stream.checkpoint import packs, planes
from lorashare_stream.checkpoint.format import INDEX, PACKS
from lorashare_stream.checkpoint.index import (
    CodedAdapter,
    Index,
    canonical,
    deflated,
    inflated,
    read_index,
    write_index,
)
from lorashare_stream.checkpoint.location import Folder
from lorashare_stream.checkpoint.packs import Coded, Verbatim
from lorashare_stream.errors import AdapterError, CheckpointError

from .conftest import CONFIG, tree_digest

WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"


def verbatim(raw: bytes, dtype: str = "F32", shape: tuple[int, ...] | None = None, step: int = 1000) -> Verbatim:
    shape = (len(raw) // ITEMSIZE[dtype],) if shape is None else shape
    parts = [memoryview(raw)[i : i + step] for i in range(0, len(raw), step)]
    return Verbatim(dtype, shape, lambda: iter(parts), packs.digest_of_tensor(dtype, shape, parts))


def head(seed: int, rows: int = 3) -> bytes:
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32).tobytes()


def coded(i: int, heads: bool = True, size: int = 300, name: str | None = None) -> Coded:
    """An adapter whose name, code, source digest and head nothing else has."""
    rng = random.Random(i)
    own = {WEIGHT: verbatim(head(i), shape=(3, 64)), BIAS: verbatim(rng.randbytes(12))} if heads else {}
    record = {"sha256": rng.randbytes(32).hex(), "error": float(f"{rng.random():.6g}"), "source": f"adapters/a{i:04}"}
    layout = {"modules": [["q", 384, 384], ["v", 384, 384]]}
    return Coded(name or f"a{i:04}", {**CONFIG}, layout, record, rng.randbytes(size), own)


def written(root: Path, adapters: Sequence[Coded], there: Index = Index()) -> Index:  # noqa: B008 - it is frozen
    index = packs.write_packs(root, iter(adapters), there)
    write_index(root / INDEX, index)
    return index


def sizes(index: Index) -> list[int]:
    """How many adapters are in each pack."""
    return [[a.code.pack for a in index.adapters.values()].count(pack) for pack in index.packs]


def content(root: Path) -> dict[str, Any]:
    """All that a coded checkpoint says, read from its files alone."""
    index = read_index(root / INDEX)
    return {name: adapter_content(root, index, adapter) for name, adapter in index.adapters.items()}


def adapter_content(root: Path, index: Index, adapter: CodedAdapter) -> Any:
    read, tensors = Folder(root).read, {}
    for key, digest in adapter.verbatim.items():
        tensor = index.tensors[digest]
        tensors[key] = tensor.dtype, tensor.shape, packs.read_verbatim(read, index, adapter, key)
    return adapter.config, adapter.layout, adapter.record, packs.read_code(read, adapter), tensors


def expected(adapters: Sequence[Coded]) -> dict[str, Any]:
    return {
        a.name: (
            a.config,
            a.layout,
            a.record,
            a.code,
            {key: (t.dtype, t.shape, b"".join(t.chunks())) for key, t in a.verbatim.items()},
        )
        for a in adapters
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "ADAPTERS_MOST", 3)


# -- byte planes -----------------------------------------------------------------------------------------------------


def code_planes(raw: bytes, itemsize: int, step: int = 1 << 20) -> bytes:
    return b"".join(planes.encoded((raw[i : i + step] for i in range(0, len(raw), step)), itemsize))


@given(st.binary(max_size=400), st.sampled_from([1, 2, 4, 8]), st.integers(1, 50), st.integers(1, 9))
def test_planes_give_back_every_byte(raw: bytes, itemsize: int, step: int, block: int) -> None:
    raw = raw[: len(raw) // itemsize * itemsize]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "BLOCK", 8 * block)
        stream = code_planes(raw, itemsize, step)
        assert stream == code_planes(raw, itemsize)
        assert planes.decoded(stream, itemsize, len(raw)) == raw


def test_planes_of_zeros_and_of_repeats_are_small() -> None:
    row = os.urandom(1 << 12)
    for raw in (bytes(1 << 20), row * 256):
        assert len(code_planes(raw, 4)) < len(raw) / 100
    assert len(code_planes(os.urandom(1 << 16), 4)) == (1 << 16) + 16  # no gain: as it is


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_no_stream_of_planes_takes_more_than_a_block(stream: bytes, elements: int) -> None:
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        planes.decoded(stream, 4, 4 * elements)
    assert tracemalloc.get_traced_memory()[1] < 2 * planes.BLOCK
    tracemalloc.stop()


def test_planes_that_inflate_beyond_their_size_are_refused() -> None:
    bomb = zlib.compress(bytes(1 << 24), 9, -15)
    for rest, why in ((bytes(5), "bytes follow"), (bytes(3), "ends too early")):
        with pytest.raises(ValueError, match=why):
            planes.decoded(struct.pack("<4I", 1, 1, 1, 1) + rest, 4, 4)
    tracemalloc.start()
    with pytest.raises(ValueError, match="not 262144 bytes when"):
        planes.decoded(struct.pack("<4I", *[len(bomb)] * 4) + bomb * 4, 4, 1 << 20)
    with pytest.raises(ValueError, match="a plane of 4294967295 bytes where 2 are the most"):
        planes.decoded(struct.pack("<4I", 1, 1, 1, (1 << 32) - 1) + bytes(1 << 10), 4, 8)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_real_heads_gain_a_seventh_in_planes(real: Path, record_property: Any) -> None:
    for collection in ("minilm", "distilbert"):
        before = after = 0
        for folder in sorted((real / collection).rglob("adapter_model.safetensors"))[:3]:
            with open_tensors((folder,)) as opened:
                for record in tensor_records((folder,)):
                    if "lora_" not in record.name and record.nbytes > 1000:
                        raw = opened.raw(record).tobytes()
                        stream = code_planes(raw, 4)
                        assert planes.decoded(stream, 4, len(raw)) == raw
                        before, after = before + len(raw), after + len(stream)
        record_property("told", f"{collection} {after / before:.3f}")
        assert after < 0.86 * before


# -- round trips -----------------------------------------------------------------------------------------------------


def test_what_is_packed_comes_back_in_order(tmp_path: Path, small: None) -> None:
    adapters = [coded(i) for i in (5, 3, 9, 1, 7, 2, 8)]
    adapters[3] = replace(adapters[3], config=CONFIG | {"r": 8}, record={"note": None})
    adapters[4] = replace(
        adapters[4], code=b"", verbatim={"w": verbatim(b"", shape=(0, 5)), "s": verbatim(b"1234", shape=())}
    )
    adapters[5] = replace(adapters[5], name="__metadata__", layout=[1, "x"])
    index = written(tmp_path / "out", adapters)
    assert len(index.packs) == 3
    assert content(tmp_path / "out") == expected(adapters)
    assert list(content(tmp_path / "out")) == [a.name for a in adapters]
    assert read_index(tmp_path / "out" / INDEX) == index == read_index((tmp_path / "out" / INDEX).read_bytes())
    for pack in index.packs:
        packs.check_pack(tmp_path / "out" / pack.file, pack)
    names = [a.name for a in index.adapters.values() if a.config is index.adapters["a0005"].config]
    assert len(names) == 6  # equal ones are one object


RECORDS = st.dictionaries(st.sampled_from("abcd"), st.none() | st.integers() | st.text(max_size=4) | st.floats(0, 1))


@given(st.lists(st.tuples(st.binary(max_size=9), RECORDS, st.dictionaries(st.text(max_size=2), st.integers(0, 4)))))
def test_any_collection_comes_back(tmp_path_factory: pytest.TempPathFactory, facts: list[Any]) -> None:
    root = tmp_path_factory.mktemp("any")
    adapters = [
        Coded(f"a{i}", {"r": len(code)}, len(record), record, code, {k: verbatim(head(n, n)) for k, n in keys.items()})
        for i, (code, record, keys) in enumerate(facts)
    ]
    index = written(root, adapters)
    assert content(root) == expected(adapters)
    assert len(index.tensors) == len({n for _, _, keys in facts for n in keys.values()})


def test_equal_tensors_are_stored_once(tmp_path: Path, small: None) -> None:
    shared = verbatim(head(0), shape=(3, 64))
    adapters = [replace(coded(i), verbatim={WEIGHT: shared, BIAS: verbatim(bytes([i] * 4))}) for i in range(8)]
    adapters[1] = replace(adapters[1], verbatim={WEIGHT: verbatim(head(0))})  # of another shape: another tensor
    index = written(tmp_path, adapters)
    assert len(index.tensors) == 1 + 1 + 7
    assert content(tmp_path) == expected(adapters)
    assert sum(p.nbytes for p in index.packs) < 8 * 300 + 2 * len(head(0)) + 2000


def test_bytes_depend_neither_on_the_order_of_keys_nor_on_chunks(tmp_path: Path) -> None:
    adapters = [coded(i) for i in range(4)]
    turned = [
        replace(
            a,
            config=dict(reversed(a.config.items())),
            record=dict(reversed(a.record.items())),
            verbatim={k: verbatim(b"".join(t.chunks()), t.dtype, t.shape, 7) for k, t in reversed(a.verbatim.items())},
        )
        for a in adapters
    ]
    written(tmp_path / "a", adapters)
    written(tmp_path / "b", turned)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")


def test_readers_of_safetensors_list_the_adapters(tmp_path: Path) -> None:
    adapters = [coded(i, name=f"größe {i}") for i in range(3)]
    last = coded(3, name="__metadata__")
    index = written(tmp_path, [*adapters, last])
    with safe_open(tmp_path / index.packs[0].file, framework="numpy") as f:
        assert sorted(f.keys()) == sorted([*(a.name for a in adapters), ":__metadata__", packs.VERBATIM_PART])
        assert all(f.get_tensor(a.name).tobytes() == a.code for a in adapters)


def test_each_part_is_one_request(tmp_path: Path) -> None:
    adapters = [coded(i) for i in range(3)]
    index = written(tmp_path, adapters)
    asked = []

    def ranged(file: str, offset: int, count: int) -> bytes:
        asked.append((file, offset, count))
        return (tmp_path / file).read_bytes()[offset : offset + count]

    for i, adapter in enumerate(adapters):
        assert packs.read_code(ranged, index.adapters[adapter.name]) == adapter.code
        assert packs.read_verbatim(ranged, index, index.adapters[adapter.name], WEIGHT) == head(i)
    assert len(asked) == 6  # one request each


def test_packs_are_cut_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "CODES_MOST", 700)
    assert sizes(written(tmp_path / "a", [coded(i) for i in range(7)])) == [3, 3, 1]
    monkeypatch.setattr(packs, "CODES_MOST", 1 << 20)
    monkeypatch.setattr(packs, "TENSORS_MOST", 1000)
    assert sizes(written(tmp_path / "b", [coded(i) for i in range(7)])) == [2, 2, 2, 1]


def test_large_tensors_are_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BLOCK", 1 << 17)
    monkeypatch.setattr(packs, "BLOCK", 1 << 17)
    parts = {
        "floats": np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32).tobytes(),
        "noise": os.urandom(1 << 20),
    }
    tensors = {}
    for key, part in parts.items():
        give = functools.partial(lambda part: iter([memoryview(part)] * 8), part)
        tensors[key] = Verbatim("F32", (8 << 18,), give, packs.digest_of_tensor("F32", (8 << 18,), give()))
    tracemalloc.start()
    index = packs.write_packs(tmp_path, [replace(coded(0), verbatim=tensors), coded(1)], Index())
    packs.remove_from_packs(tmp_path / "less", index, ["a0001"], Folder(tmp_path).read)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [t.coding for t in index.tensors.values()][:2] == ["planes", ""]
    assert peak < 2 << 20  # of 8 MiB each


def test_a_tensor_that_changes_under_the_writer_is_refused(tmp_path: Path) -> None:
    tensor = replace(verbatim(head(0)), chunks=lambda: iter([head(1)]))
    with pytest.raises(AdapterError, match=r"adapter 'a0000', key 'w': the tensor is not the one"):
        packs.write_packs(tmp_path, [replace(coded(0), verbatim={"w": tensor})], Index())
    assert not os.listdir(tmp_path / PACKS)


def test_a_write_that_fails_leaves_whole_packs_alone(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Iterator[Coded]:
        yield from (coded(i) for i in range(4))
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        packs.write_packs(tmp_path, failing(), Index())
    assert len(os.listdir(tmp_path / PACKS)) == 1

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packs, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        packs.write_packs(tmp_path, [coded(9)], Index())
    assert len(os.listdir(tmp_path / PACKS)) == 1


# -- growing and shrinking -------------------------------------------------------------------------------------------


def test_growing_leaves_packs_as_they_are(tmp_path: Path, small: None) -> None:
    adapters = [coded(i) for i in range(9)]
    adapters[7] = replace(adapters[7], verbatim=adapters[0].verbatim)
    before = written(tmp_path, adapters[:5])
    files = tree_digest(tmp_path / PACKS)
    after = written(tmp_path, adapters[5:], there=read_index(tmp_path / INDEX))
    assert files.items() <= tree_digest(tmp_path / PACKS).items()
    assert after.packs[:2] == before.packs
    assert len(after.packs) == 4
    assert content(tmp_path) == expected(adapters)
    assert len(after.tensors) == 16


def test_a_run_that_goes_on_after_a_pack_writes_the_same(tmp_path: Path, small: None) -> None:
    adapters = [coded(i) for i in range(10)]
    whole = written(tmp_path / "a", adapters)
    assert sizes(whole) == [3, 3, 3, 1]
    for packed in (3, 6, 9):
        there = written(tmp_path / f"b{packed}", adapters[:packed])
        assert written(tmp_path / "b", adapters[packed:], there) == whole
        assert (tmp_path / "b" / INDEX).read_bytes() == (tmp_path / "a" / INDEX).read_bytes()


def test_removing_from_one_pack_is_packing_the_rest(tmp_path: Path) -> None:
    adapters = [coded(i) for i in range(8)]
    adapters[1] = replace(adapters[1], config=CONFIG | {"r": 1}, layout="other", code=b"")
    adapters[5] = replace(adapters[5], verbatim=dict(zip("yx", adapters[1].verbatim.values(), strict=True)))
    index = written(tmp_path / "all", adapters)
    for gone in ([1], [0, 5], [1, 5], [7], range(7), range(8)):
        names = [adapters[i].name for i in gone]
        left = packs.remove_from_packs(tmp_path / f"left{gone}", index, names, Folder(tmp_path / "all").read)
        (tmp_path / f"left{gone}").mkdir(exist_ok=True)
        write_index(tmp_path / f"left{gone}" / INDEX, left)
        fresh = written(tmp_path / f"fresh{gone}", [a for a in adapters if a.name not in names])
        assert left == fresh
        assert tree_digest(tmp_path / f"left{gone}") == tree_digest(tmp_path / f"fresh{gone}")
        assert len(left.packs) == (len(gone) < 8)


def test_removing_leaves_no_trace_in_any_pack(tmp_path: Path, small: None) -> None:
    adapters = [coded(i) for i in range(12)]
    only, kept = verbatim(random.Random(100).randbytes(96), "U8"), verbatim(random.Random(101).randbytes(96), "U8")
    for i, tensors in ((1, {"o": only, "k": kept}), (4, {"o": only}), (10, {"k": kept})):
        adapters[i] = replace(adapters[i], verbatim=dict(adapters[i].verbatim) | tensors)
    adapters[4] = replace(adapters[4], code=b"", config=CONFIG | {"r": 77})  # its code has no bytes, but it has a name
    old = written(tmp_path / "old", adapters)
    assert len(old.packs) == 4
    gone = [adapters[1].name, adapters[4].name]
    new = packs.remove_from_packs(tmp_path / "new", old, gone, Folder(tmp_path / "old").read)
    write_index(tmp_path / "new" / INDEX, new)
    assert len(os.listdir(tmp_path / "new" / PACKS)) == 2
    assert new.packs[2:] == old.packs[2:]
    for pack in new.packs[2:]:
        os.link(tmp_path / "old" / pack.file, tmp_path / "new" / pack.file)
    assert content(tmp_path / "new") == expected([a for a in adapters if a.name not in gone])

    def stored(root: Path) -> bytes:
        raw = b"".join(p.read_bytes() for p in sorted((root / PACKS).iterdir()))
        return raw + inflated((root / INDEX).read_bytes())

    traces = [b'"r":77']
    for name in gone:
        adapter = old.adapters[name]
        traces += [name.encode(), adapter.record["sha256"].encode()]
        for at in (adapter.code, *(old.tensors[d].at for d in adapter.verbatim.values() if d != kept.digest)):
            raw = (tmp_path / "old" / at.pack.file).read_bytes()[at.offset :][: at.nbytes]
            traces += [
                at.digest.encode(),
                *(raw[i : i + 12] for i in range(16, len(raw) - 11, 12)),
            ]  # first lie lengths of planes
    assert all(trace in stored(tmp_path / "old") for trace in traces)
    assert not [trace for trace in traces if trace in stored(tmp_path / "new")]
    left = packs.remove_from_packs(tmp_path / "least", new, list(new.adapters)[:-2], Folder(tmp_path / "new").read)
    assert sizes(left) == [0, 2]  # a pack for `kept` alone
    none = packs.remove_from_packs(tmp_path / "none", left, list(left.adapters), Folder(tmp_path / "least").read)
    assert none == Index()


def test_a_tensor_that_only_removed_adapters_had_goes_from_another_pack(tmp_path: Path, small: None) -> None:
    tensor = verbatim(b"in the pack before" * 9, "U8")
    adapters = [replace(coded(i), verbatim={"t": tensor} if i in (0, 4) else {}) for i in range(6)]
    one = packs.remove_from_packs(tmp_path, written(tmp_path, adapters), ["a0000"], Folder(tmp_path).read)
    assert one.tensors[tensor.digest].at.pack == one.packs[0]
    two = packs.remove_from_packs(tmp_path, one, ["a0004"], Folder(tmp_path).read)
    assert not two.tensors
    assert not {p.file for p in one.packs} & {p.file for p in two.packs}
    assert all(b"in the pack before" not in (tmp_path / p.file).read_bytes() for p in two.packs)


# -- damage ----------------------------------------------------------------------------------------------------------


def harmed(root: Path, index: Index) -> list[str]:
    """The adapters that cannot be read."""
    errors = {}
    for name, adapter in index.adapters.items():
        try:
            adapter_content(root, index, adapter)
        except CheckpointError as e:
            errors[name] = e
    assert all(e.adapter == name and index.packs[0].file in e.problem for name, e in errors.items())
    return list(errors)


def test_a_flipped_bit_of_a_pack_is_found_and_harms_who_has_it(tmp_path: Path) -> None:
    adapters = [coded(i, size=20) for i in range(3)]
    index = written(tmp_path, adapters)
    pack = index.packs[0]
    path, rng = tmp_path / pack.file, random.Random(0)
    raw = path.read_bytes()
    owner: dict[int, str] = {}
    for adapter in index.adapters.values():
        for at in (adapter.code, *(index.tensors[d].at for d in adapter.verbatim.values())):
            owner |= dict.fromkeys(range(at.offset, at.offset + at.nbytes), adapter.name)
    assert set(owner) == set(range(pack.start, len(raw)))  # there is nothing else
    for at in [
        *range(0, pack.start, 16),
        *range(pack.start, pack.start + 60),
        *rng.sample(range(pack.start, len(raw)), 60),
    ]:
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match=f"{pack.file} is damaged"):
            packs.check_pack(path, pack)
        assert harmed(tmp_path, index) == ([owner[at]] if at in owner else [])


def test_a_pack_cut_short_is_found_and_the_rest_can_be_read(tmp_path: Path) -> None:
    index = written(tmp_path, [coded(i, heads=False) for i in range(4)])
    pack = index.packs[0]
    path = tmp_path / pack.file
    raw = path.read_bytes()
    for size, lost in ((len(raw) - 1, 1), (pack.start + 300, 3), (pack.start - 1, 4), (0, 4)):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            packs.check_pack(path, pack)
        assert len(harmed(tmp_path, index)) == lost
    path.unlink()
    with pytest.raises(CheckpointError, match="found no file"):
        packs.check_pack(path, pack)


def test_removing_does_not_copy_a_damaged_code(tmp_path: Path) -> None:
    index = written(tmp_path, [coded(i, heads=False) for i in range(4)])
    path = tmp_path / index.packs[0].file
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"adapter 'a0003': its code in .* is damaged"):
        packs.remove_from_packs(tmp_path / "new", index, ["a0000"], Folder(tmp_path).read)
    left = packs.remove_from_packs(tmp_path / "new", index, ["a0003"], Folder(tmp_path).read)
    assert list(left.adapters) == ["a0000", "a0001", "a0002"]


def test_every_flipped_bit_of_an_index_is_found(tmp_path: Path) -> None:
    index = written(tmp_path, [coded(0), coded(1)])
    raw = (tmp_path / INDEX).read_bytes()
    without_meaning = 0  # bits that fill up the last byte before the checksum
    for at in range(8 * len(raw)):
        flipped = raw[: at // 8] + bytes([raw[at // 8] ^ 1 << at % 8]) + raw[at // 8 + 1 :]
        try:
            found = read_index(flipped)
        except CheckpointError:
            continue
        assert found == index
        without_meaning += 1
    assert without_meaning < 8
    for cut in (b"", raw[:-1], raw[:50], raw + b"\0\0\0\0", raw + raw):
        with pytest.raises(CheckpointError, match=INDEX):
            read_index(cut)
    with pytest.raises(CheckpointError, match="is missing"):
        read_index(tmp_path / "nowhere")


def lie(value: Any) -> Index:
    return read_index(deflated(canonical(value).encode()))


def honest(root: Path) -> Any:
    written(root, [coded(i) for i in range(4)])
    return json.loads(inflated((root / INDEX).read_bytes()))


LIES = [
    ("version", 2), ("version", None), ("packs", []), ("packs", {}), ("packs/0/0", "../../etc"),
    ("packs/0/0", "A" * 64),
    ("packs/0/1", 1 << 62), ("packs/0/1", -1), ("packs/0/1", 1e9), ("packs/0/2", 1 << 80), ("packs/0/2", True),
    ("packs/0/3", 3), ("packs/0/3", 5), ("packs/0/3", 1 << 40), ("packs/0/4", 7), ("packs/0", [1]), ("configs/0", 5),
    ("configs", []), ("layouts", []), ("kinds/0/0", "F33"), ("kinds/0/0", []), ("kinds/0/1", [1 << 62, 1 << 62]),
    ("kinds/0/1", [-3, -64]), ("kinds/0/1", [1] * 17), ("kinds/0/1", "384"), ("kinds/0/2", "zip"), ("kinds/0/2", {}),
    ("kinds/0/1", [3, 65]), ("tensors/nbytes/0", 1 << 50), ("tensors/nbytes/0", 0), ("tensors/digest/0", "x" * 32),
    ("tensors/digest/0", 7), ("tensors/kind/0", 9), ("tensors/kind/0", -1), ("tensors/kind", []),
    ("adapters/name/0", "../up"), ("adapters/name/0", "a0001"), ("adapters/name/0", None),
    ("adapters/name/0", ":verbatim"),
    ("adapters/name", ["a0000"]), ("adapters/nbytes/0", 1 << 61), ("adapters/nbytes/0", -300),
    ("adapters/nbytes/0", "300"),
    ("adapters/digest/0", "0" * 31), ("adapters/digest", "0" * 4), ("adapters/config/0", 1), ("adapters/layout/0", -1),
    ("adapters/record/rows/0", 3), ("adapters/record/keys", []), ("adapters/record/values/error", [1]),
    ("adapters/record/values/more", [1]), ("adapters/record/keys/0", [[]]), ("adapters/record", []),
    ("adapters/verbatim/values", {}), ("adapters/verbatim/keys/0/0", 4), ("adapters", None), ("tensors", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return honest(tmp_path_factory.mktemp("honest"))


@pytest.mark.parametrize(("where", "what"), LIES)
def test_an_index_that_lies_is_refused(truth: Any, where: str, what: Any) -> None:
    root = json.loads(canonical(truth))
    assert lie(root).packs
    *path, last = [int(part) if part.isdigit() else part for part in where.split("/")]
    functools.reduce(lambda inner, part: inner[part], path, root)[last] = what
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged, or no index.*found .*Fetch the checkpoint again"):
        lie(root)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


VALUES = st.one_of(
    st.integers(-2, 1 << 64), st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.sampled_from([[[]], ["F32", [1], ""], "0" * 32, "__metadata__", 1 << 31, 1 << 62]),
)  # fmt: skip


@given(st.data())
def test_no_index_breaks_the_reader(truth: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = json.loads(canonical(truth))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(root)[1:]))
        functools.reduce(lambda inner, part: inner[part], path[:-1], root)[path[-1]] = copy.deepcopy(data.draw(VALUES))
    try:
        index = lie(root)
    except CheckpointError:
        return
    noise = random.Random(0).randbytes(4000)

    def pages(_: str, offset: int, count: int) -> bytes:
        return noise[offset : offset + count]

    for adapter in index.adapters.values():
        with contextlib.suppress(CheckpointError):
            packs.read_code(pages, adapter)
        for key in adapter.verbatim:
            with contextlib.suppress(CheckpointError):
                packs.read_verbatim(pages, index, adapter, key)


def test_numbers_in_an_index_cost_no_memory(truth: Any, tmp_path: Path) -> None:
    root = json.loads(canonical(truth))
    root["kinds"] = [["F64", [1 << 40], ""], ["F64", [1 << 40], "planes"]]
    root["tensors"] = {"digest": ["0" * 32, "1" * 32], "kind": [0, 1], "nbytes": [1 << 43, 1 << 42]}
    root["adapters"]["verbatim"] = {"keys": [["a", "b"]], "rows": [0] * 4, "values": {"a": [0] * 4, "b": [1] * 4}}
    root["adapters"]["nbytes"][3] = 1 << 44
    pack = root["packs"][0]
    pack[1:] = [pack[2] + 900 + (1 << 44) + (1 << 43) + (1 << 42), pack[2], 4, 2]
    index = lie(root)
    (tmp_path / PACKS).mkdir()
    (tmp_path / index.packs[0].file).write_bytes(bytes(5000))
    adapter, read = index.adapters["a0003"], Folder(tmp_path).read
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="cut short"):
        packs.read_code(read, adapter)
    for key in "ab":
        with pytest.raises(CheckpointError, match="cut short"):
            packs.read_verbatim(read, index, adapter, key)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "LIMIT", 1 << 20)
    with pytest.raises(CheckpointError, match="more than 1048576 bytes of JSON"):
        read_index(deflated(bytes(1 << 22)))
    for raw in (b"[" * 200_000, b'{"version":' * 50_000, b"1" * 100_000):
        with pytest.raises(CheckpointError, match="is damaged, or no index"):
            read_index(deflated(raw))
    for dictionary in ({}, {"zdict": b"of another version"}):
        z = zlib.compressobj(**dictionary)
        with pytest.raises(CheckpointError, match="is damaged, or no index"):
            read_index(z.compress(b'{"version":1}') + z.flush())


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "most"), [(16, 200), (1000, 150)])
def test_an_adapter_costs_few_bytes_beside_its_code(
    tmp_path: Path, record_property: Any, count: int, most: int
) -> None:
    index = written(tmp_path, [coded(i, heads=False, size=2900 + i % 200) for i in range(count)])
    headers, size = sum(pack.start for pack in index.packs), (tmp_path / INDEX).stat().st_size
    told = f"{count} adapters: {headers / count:.1f} bytes of headers, {size / count:.1f} of the index for each"
    record_property("told", told)
    assert (headers + size) / count < most
