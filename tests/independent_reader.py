"""A reader of coded checkpoints, written from docs/format.md: it shares no code with the package."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import constriction
import numpy as np

Model = constriction.stream.model
DATA = Path(__file__).parents[1] / "lorashare_stream"  # two files in it are a part of the format
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
Tensors = dict[str, tuple[str, list[int], bytes]]  # key -> dtype, shape, bytes


@cache
def table(kind: int) -> np.ndarray:
    weights = np.load(DATA / "codec/tables.npy").astype(np.int64)
    kind -= 4 * max(0, math.ceil((kind - 24) / 4))
    sizes = [math.ceil(8 * 2 ** (c / 4)) + 3 for c in range(-20, kind + 1)]
    at = sum(sizes[:-1])
    half = weights[at : at + sizes[-1]]
    return np.array([*half[-2:0:-1], *half]) / 2**24


@cache
def differences(most: int, rise: float, fall: float, center: int = 0) -> Any:
    likely = np.array([(rise if i > center else fall) ** abs(i - center) for i in range(-most, most + 1)])
    weights = np.maximum(np.rint(likely / likely.sum() * 2**24), 1)
    return Model.Categorical(weights / weights.sum(), perfect=False)


class Stream:
    """The range coder: integers are right when it has finished."""

    def __init__(self, words: bytes) -> None:
        self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
        self.escaped: list[tuple[np.ndarray, int, int]] = []
        self.halves: list[tuple[np.ndarray, int]] = []

    def get(self, model: Any, count: int) -> np.ndarray:
        return self.coder.decode(model, int(count)).astype(np.int64) if count else np.zeros(0, np.int64)

    def fill(self, kind: int, rows: list[np.ndarray]) -> None:
        """Decode the integers of one class, into arrays one after the other."""
        bits, k, count = max(0, math.ceil((kind - 24) / 4)), len(table(kind)) // 2 - 1, sum(map(len, rows))
        high = self.get(Model.Categorical(table(kind), perfect=False), count) - k
        low = self.get(Model.Uniform(1 << bits), count) if bits else 0
        for row, part in zip(rows, np.split((high << bits) + low, np.cumsum([*map(len, rows)])[:-1]), strict=True):
            row[:] = part
            self.halves.append((row, 1 << bits >> 1))
            self.escaped += [(row, i, bits) for i in np.flatnonzero(part >> bits > k)]

    def finish(self) -> None:
        lengths, signs = (self.get(Model.Uniform(n), len(self.escaped)).tolist() for n in (64, 2))
        for (row, i, bits), length, negative in zip(self.escaped, lengths, signs, strict=True):
            value = 1 << length - 1
            for low in range(0, length - 1, 16):
                value |= int(self.get(Model.Uniform(1 << min(16, length - 1 - low)), 1)[0]) << low
            row[i] = ((-value if negative else value) << bits) + (row[i] & (1 << bits) - 1)
        for row, half in self.halves:
            row -= half


def directions(stored: bytes) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Group -> directions (k, d) and the offset of each."""
    (length,) = struct.unpack_from("<I", stored)
    facts, stream = json.loads(zlib.decompress(stored[4 : 4 + length])), Stream(stored[4 + length :])
    numbers = {group: np.zeros((len(rows), d), np.int64) for group, (d, rows) in facts.items()}
    each = [(kind, numbers[group][i]) for group in sorted(facts) for i, (_, kind) in enumerate(facts[group][1])]
    for kind in sorted({c for c, _ in each}):
        stream.fill(kind, [row for c, row in each if c == kind])
    stream.finish()
    units = {group: 2.0 ** -(2 + math.ceil(math.log2(d) / 2)) for group, (d, _) in facts.items()}
    return {group: (numbers[group] * units[group], [offset for offset, _ in facts[group][1]]) for group in facts}


def integers(
    code: bytes, shapes: list[tuple[tuple[int, int, int], list[tuple[list[int], list[int]]]]]
) -> tuple[list[list[np.ndarray]], list[list[list[np.ndarray]]], float]:
    """[left (n, r, d_out), right (n, r, d_in)] of each shape (r, d_out, d_in), the loadings (r, k) of each of its n
    pairs on both sides, and the step; given are the offsets of the directions of each pair, left and right."""
    groups = [[np.zeros((len(of), r, d), np.int64) for d in (d_out, d_in)] for (r, d_out, d_in), of in shapes]
    loadings = [[[np.zeros((r, len(o[i])), np.int64) for o in of] for i in range(2)] for (r, *_), of in shapes]
    if not code:
        return groups, loadings, 0.0
    stream = Stream(code[8:])
    get, columns = stream.get, ([], [], [], [])  # rests left and right, loadings: class, and where its integers go
    for ((r, d_out, d_in), offsets), group, on in zip(shapes, groups, loadings, strict=True):
        counts = np.cumsum(get(differences(r, 0.45, 0.45), len(offsets)) - r)
        firsts = iter(np.cumsum(get(differences(108, 0.6, 0.6), (counts > 0).sum()) - 108))
        others = iter(get(differences(108, 0.35, 0.65, -1), (counts - (counts > 0)).sum()) - 108)
        left = [c for m in counts if m for c in accumulate([next(firsts), *islice(others, int(m) - 1)])]
        right = np.clip(np.array(left, int) + round(2 * math.log2(d_out / d_in)), -20, 88)
        right += get(differences(108, 0.1, 0.3), len(left)) - 108
        places = [(i, j) for i, m in enumerate(counts) for j in range(m)]
        for side, kinds in enumerate((left, right)):
            for c, (i, j) in zip(kinds, places, strict=True):
                columns[side].append((int(c), group[side][i, j]))
                for k, offset in enumerate(offsets[i][side]):
                    columns[2 + side].append((min(max(int(c) + offset, -20), 88), on[side][i][j, k : k + 1]))
    each = [pair for part in columns for pair in part]
    for kind in sorted({c for c, _ in each}):
        stream.fill(kind, [row for c, row in each if c == kind])
    stream.finish()
    return groups, loadings, struct.unpack_from("<d", code)[0]


def column(rest: np.ndarray, loadings: np.ndarray, vectors: np.ndarray, on: bool) -> np.ndarray:
    """Columns (r, d) of a pair on one side, of an adapter that is on directions or not."""
    found = rest.astype(np.float64) + loadings.astype(np.float64) @ vectors
    if not on:
        return found
    digits = min(21, (53 - math.ceil(math.log2(found.shape[-1]))) // 2)
    units = np.frexp(np.abs(found).max(axis=-1, keepdims=True))[1] - digits
    return np.ldexp(np.rint(np.ldexp(found, -units)), units)


def factor(values: np.ndarray, dtype: str) -> tuple[str, list[int], bytes]:
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
        raw = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    else:
        raw = (
            np.ascontiguousarray(values).astype({"F64": "<f8"}.get(dtype, "<f4")).astype(f"<f{SIZES[dtype]}").tobytes()
        )
    return dtype, list(values.shape), raw


def factors(code: bytes, layout: list[list[Any]], shared: bytes = b"") -> Tensors:
    modules: dict[tuple[int, int, int], list[list[Any]]] = {}
    for row in layout:
        _, rank, d_out, d_in, _, experts, _, _ = row
        modules.setdefault((min(rank // experts, d_out, d_in), d_out, d_in), []).append(row)
    known, on = directions(shared) if shared else {}, {}
    for name, _, d_out, d_in, *_ in layout:
        for side, d in (("B", d_out), ("A", d_in)):
            there = f"{name}:{side}" in known and known[f"{name}:{side}"][0].shape[1] == d
            on[name, side] = known[f"{name}:{side}"] if there else (np.zeros((0, d)), [])
    shapes = [
        (shape, [(on[m[0], "B"][1], on[m[0], "A"][1]) for m in modules[shape] for _ in range(m[5])])
        for shape in sorted(modules)
    ]
    groups, loadings, step = integers(code, shapes)
    found: Tensors = {}
    for shape, group, own in zip(sorted(modules), groups, loadings, strict=True):
        at = 0
        for name, rank, d_out, d_in, scale, experts, dtype_b, dtype_a in modules[shape]:
            left, right = (
                np.stack(
                    [
                        column(group[i][pair], own[i][pair], on[name, side][0], bool(shared))
                        for pair in range(at, at + experts)
                    ]
                )
                for i, side in enumerate("BA")
            )
            at += experts
            norms = [np.sqrt(np.square(side).sum(axis=-1, keepdims=True)) for side in (left, right)]
            norms[0][norms[0] == 0] = 1.0
            exponents = np.frexp(norms[1] / (np.square(norms[0]) * abs(scale) * (step or 1.0)))[1] // 2
            b, a = np.zeros((experts, rank // experts, d_out)), np.zeros((experts, rank // experts, d_in))
            b[:, : shape[0]] = np.ldexp(left * step, exponents)
            a[:, : shape[0]] = right * (np.ldexp(1.0, -exponents) / (norms[0] * scale))
            key = f"base_model.model.{name}.lora_"
            found[f"{key}A.weight"] = factor(a.reshape(rank, d_in), dtype_a)
            found[f"{key}B.weight"] = factor(b.transpose(2, 1, 0).reshape(d_out, rank), dtype_b)
    return found


def planes(stored: bytes, size: int, nbytes: int) -> Iterator[bytes]:
    at = 0
    for start in range(0, nbytes, 4 << 20):
        count = min(4 << 20, nbytes - start) // size
        lengths = struct.unpack_from(f"<{size}I", stored, at)
        at += 4 * size
        block = np.empty((count, size), np.uint8)
        for i, length in enumerate(lengths):
            plane = stored[at : at + length]
            block[:, i] = np.frombuffer(plane if length == count else zlib.decompress(plane, -15), np.uint8)
            at += length
        yield block.tobytes()


def objects(columns: dict[str, Any]) -> list[dict[str, Any]]:
    values = {key: iter(column) for key, column in columns["values"].items()}
    return [{key: next(values[key]) for key in columns["keys"][row]} for row in columns["rows"]]


def read(root: Path) -> Iterator[tuple[str, Tensors, dict[str, Any]]]:
    """Name, tensors and record of each adapter."""
    raw, coded = (root / "index.json.zz").read_bytes(), json.loads((root / "share_config.json").read_text())["coded"]
    assert coded["version"] in (1, 2)
    assert coded["index"] == hashlib.sha256(raw).hexdigest()
    index = json.loads(zlib.decompressobj(zdict=(DATA / "checkpoint/dictionary.json").read_bytes()).decompress(raw))
    adapters, tensors = index["adapters"], index["tensors"]
    codes, stored = [], []
    for sha256, nbytes, start, *counts in index["packs"]:
        pack, at = (root / "packs" / f"{sha256[:16]}.safetensors").read_bytes(), start
        assert (len(pack), hashlib.sha256(pack).hexdigest()) == (nbytes, sha256)
        for found, sizes, count in zip((codes, stored), (adapters["nbytes"], tensors["nbytes"]), counts, strict=True):
            for size in sizes[len(found) : len(found) + count]:
                found.append(pack[at : at + size])
                at += size
    verbatim = []
    for raw, kind in zip(stored, tensors["kind"], strict=True):
        dtype, shape, coding = index["kinds"][kind]
        nbytes = math.prod(shape) * SIZES[dtype]
        verbatim.append((dtype, shape, b"".join(planes(raw, SIZES[dtype], nbytes)) if coding else raw))
    records, keys = objects(adapters["record"]), objects(adapters["verbatim"])
    for name, code, layout, record, kept in zip(
        adapters["name"], codes, adapters["layout"], records, keys, strict=True
    ):
        shared = verbatim[kept.pop(":directions")][2] if ":directions" in kept else b""
        found = factors(code, index["layouts"][layout], shared)
        yield name, found | {key: verbatim[number] for key, number in kept.items()}, record
