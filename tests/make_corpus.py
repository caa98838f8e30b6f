"""Writes tests/corpus: files as no program should meet them, and each program does. Run: python -m tests.make_corpus

The files are kept in the repository; this says what they are. `good` is what each of them was before.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CORPUS = Path(__file__).parent / "corpus"
A, B = (f"base_model.model.q.lora_{side}.weight" for side in "AB")
SHAPES = {A: [2, 8], B: [6, 2]}
HUGE = 1 << 40
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", "target_modules": ["q"]}


def entry(shape: Any, start: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {A: entry(SHAPES[A], 0, 64), B: entry(SHAPES[B], 64, 112)}
DATA = struct.pack("<28f", *(0.1 * (i % 7 - 3) for i in range(28)))


def packed(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def headers() -> Iterator[tuple[str, bytes]]:
    yield "good", packed(GOOD)
    yield "empty", b""
    yield "seven-bytes", b"1234567"
    yield "only-a-length", struct.pack("<Q", 100)
    yield "length-huge", packed(GOOD, length=1 << 63)
    yield "length-negative", packed(GOOD, length=(1 << 64) - 1)
    yield "length-too-long", packed(GOOD, length=len(json.dumps(GOOD)) + len(DATA) + 1)
    yield "length-zero", packed(GOOD, length=0)
    yield "no-json", packed(b"{" * 50)
    yield "deep-json", packed(b"[" * 20_000)
    yield "not-utf8", packed(json.dumps(GOOD).encode().replace(b"F32", b"\xff\xfe\xfd", 1))
    yield "a-list", packed([1, 2])
    yield "a-number", packed(5)
    yield "a-long-number", packed(b"9" * 10_000)
    yield "nan", packed(b'{"a": NaN}')
    yield "duplicate-keys", packed(json.dumps(GOOD).replace(B, A).encode())
    yield "entry-a-list", packed(GOOD | {A: [1, 2]})
    yield "entry-null", packed(GOOD | {A: None})
    yield "entry-empty", packed(GOOD | {A: {}})
    yield "dtype-unknown", packed(GOOD | {A: entry([2, 8], 0, 64, "F33")})
    yield "dtype-a-list", packed(GOOD | {A: entry([2, 8], 0, 64, ["F32"])})
    yield "dtype-of-four-bits", packed(GOOD | {A: entry([2, 64], 0, 64, "F4")})
    yield "shape-huge", packed(GOOD | {A: entry([HUGE, HUGE], 0, 64)})
    yield "shape-huge-and-zero", packed(GOOD | {A: entry([HUGE, 0], 0, 0), B: entry([6, 2], 0, 48)}, DATA[:48])
    yield "shape-negative", packed(GOOD | {A: entry([-2, -8], 0, 64)})
    yield "shape-of-floats", packed(GOOD | {A: entry([2.0, 8.0], 0, 64)})
    yield "shape-of-booleans", packed(GOOD | {A: entry([True, 16], 0, 64)})
    yield "shape-of-text", packed(GOOD | {A: entry(["2", "8"], 0, 64)})
    yield "shape-a-number", packed(GOOD | {A: entry(16, 0, 64)})
    yield "shape-of-many", packed(GOOD | {A: entry([1] * 5000 + [16], 0, 64)})
    yield "shape-none", packed(GOOD | {A: entry([], 0, 4), B: entry([6, 2], 4, 52)}, DATA[:52])
    yield "offsets-swapped", packed(GOOD | {A: entry([2, 8], 64, 0)})
    yield "offsets-huge", packed(GOOD | {A: entry([2, 8], HUGE, HUGE + 64)})
    yield "offsets-beyond-64-bits", packed(GOOD | {A: entry([2, 8], 1 << 70, (1 << 70) + 64)})
    yield "offsets-negative", packed(GOOD | {A: entry([2, 8], -64, 0)})
    yield "offsets-three", packed(GOOD | {A: entry([2, 8], 0, 64) | {"data_offsets": [0, 64, 64]}})
    yield "overlapping", packed(GOOD | {B: entry([6, 2], 32, 80)})
    yield "a-hole", packed(GOOD | {B: entry([6, 2], 72, 120)}, DATA + bytes(8))
    yield "cut-short", packed(GOOD)[:-3]
    yield "padded", packed(GOOD) + b"more"
    yield "metadata-a-number", packed({"__metadata__": 7} | GOOD)
    yield "metadata-alone", packed({"__metadata__": {"format": "pt"}}, b"")
    yield "key-empty", packed({"": entry([2, 8], 0, 64), B: GOOD[B]})
    yield "key-with-control-characters", packed({"a\x1b[2Jb.lora_A.weight": GOOD[A], B: GOOD[B]})
    yield "key-with-a-surrogate", packed({"\ud800.lora_A.weight": GOOD[A], B: GOOD[B]})
    yield "key-with-a-path", packed({"../../x.lora_A.weight": GOOD[A], "../../x.lora_B.weight": GOOD[B]})
    yield "key-with-a-colon", packed({"q:A.lora_A.weight": GOOD[A], "q:A.lora_B.weight": GOOD[B]})
    yield "key-very-long", packed({"m." * 8000 + "lora_A.weight": GOOD[A], "m." * 8000 + "lora_B.weight": GOOD[B]})
    yield "key-of-markers", packed({".lora_A" * 3000 + ".weight": GOOD[A], ".lora_B" * 3000 + ".weight": GOOD[B]})
    yield "key-a-marker-alone", packed({".lora_A.weight": GOOD[A], ".lora_B.weight": GOOD[B]})
    yield "rank-zero", packed({A: entry([0, 8], 0, 0), B: entry([6, 0], 0, 0)}, b"")
    yield "values-not-finite", packed(GOOD, struct.pack("<28f", *([float("nan"), float("inf")] * 14)))
    yield "values-huge", packed(GOOD, struct.pack("<28f", *([3e38] * 28)))
    yield "integers", packed(GOOD | {A: entry([2, 8], 0, 64, "I32")})
    yield (
        "booleans-that-are-none",
        packed({A: entry([2, 8], 0, 16, "BOOL"), B: entry([6, 2], 16, 28, "BOOL")}, b"\x07" * 28),
    )
    yield "sides-of-two-dtypes", packed({A: entry([2, 8], 0, 32, "BF16"), B: entry([6, 2], 32, 80)}, DATA[:80])


class Attack:
    """What plain pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle was run",)


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def repacked(raw: bytes, change: Any, method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def pickles() -> Iterator[tuple[str, bytes]]:
    good = {A: torch.ones(2, 8), B: torch.ones(6, 2)}
    raw, old = saved(good), saved(good, _use_new_zipfile_serialization=False)
    yield "good", raw
    yield "good-old", old
    yield "empty", b""
    yield "noise", bytes(range(256)) * 4
    yield "cut-short", raw[:-40]
    yield "cut-in-half", raw[: len(raw) // 2]
    yield "old-cut-short", old[:-40]
    huge = old.replace(b"K\x10N", b"\x8a\x06\x00\x00\x00\x00\x00\x01N").replace(
        struct.pack("<q", 16), struct.pack("<q", HUGE)
    )
    assert len(huge) > len(old)
    yield "old-with-a-huge-storage", huge
    yield "plain-pickle", pickle.dumps({A: [1.0, 2.0]})
    yield "attack", pickle.dumps({A: Attack()})
    yield (
        "attack-in-an-archive",
        repacked(raw, lambda n, c: pickle.dumps({A: Attack()}) if n.endswith("data.pkl") else c),
    )
    yield "list", saved([torch.ones(2)])
    yield "nested", saved({"state_dict": good})
    yield "numbers-as-keys", saved({1: torch.ones(2, 8)})
    yield "values-no-tensors", saved({A: 1.0, B: "text"})
    yield "sparse", saved({A: torch.eye(4).to_sparse(), B: torch.ones(6, 2)})
    yield "view-that-repeats", saved({A: torch.zeros(1).expand(1 << 20, 1 << 20), B: torch.ones(6, 2)})
    yield "meta", saved({A: torch.empty(1 << 20, 1 << 20, device="meta"), B: torch.ones(6, 2)})
    yield "complex", saved({A: torch.ones(2, 8, dtype=torch.complex128), B: torch.ones(6, 2)})
    yield "transposed", saved({A: torch.ones(8, 2).T, B: torch.ones(2, 6).T})
    yield "compressed", repacked(raw, lambda n, c: c, zipfile.ZIP_DEFLATED)
    bomb = b"\x80\x02}" + b"(" * 4_000_000
    yield "bomb", repacked(raw, lambda n, c: bomb if n.endswith("data.pkl") else c, zipfile.ZIP_DEFLATED)
    yield (
        "bytearray-huge",
        repacked(
            raw,
            lambda n, c: (
                b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R." if n.endswith("data.pkl") else c
            ),
        ),
    )

    def asking(program: bytes) -> bytes:
        return repacked(raw, lambda n, c: program if n.endswith("data.pkl") else c)

    entry = b"\x80\x02}X\x01\x00\x00\x00q%ss."
    yield "tensor-by-number", asking(entry % b"ctorch\nTensor\n\x8a\x04\x00\x00\x00\x10\x85R")
    yield "storage-by-number", asking(entry % b"ctorch\nFloatStorage\n\x8a\x04\x00\x00\x00\x10\x85R")
    yield "old-memo-huge", b"\x80\x02r\xff\xff\xff\x7f."
    yield "tuples-in-tuples", asking(b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.")
    yield "tuples-doubled", asking(b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s.")
    yield "memo-in-text", asking(b"\x80\x02Np300000000\n0}.")
    yield "archive-behind-a-pickle", old + raw
    yield "archive-behind-an-attack", pickle.dumps({A: bytearray(1 << 10)}, 2) + raw
    yield "stand-in-changed", asking(b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb0.")
    program = zipfile.ZipFile(io.BytesIO(raw)).read("archive/data.pkl")
    larger = program.replace(b"K\x02K\x08\x86", b"K\xffK\xff\x86", 1)
    yield "tensor-larger-than-its-storage", asking(larger)
    yield "memo-huge", asking(b"\x80\x02}r\xff\xff\xff\x7f.")
    yield (
        "old-tensor-by-number",
        b"".join([pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)])
        + entry % b"ctorch\nTensor\n\x8a\x04\x00\x00\x00\x10\x85R"
        + pickle.dumps([], 2),
    )
    yield "storage-missing", repacked(raw, lambda n, c: None if n.endswith("data/0") else c)
    yield "storage-short", repacked(raw, lambda n, c: c[:8] if n.endswith("data/0") else c)
    yield "no-archive-of-torch", repacked(raw, lambda n, c: c if n.endswith("version") else None)
    yield "deep", b"\x80\x02" + b"(" * 20_000 + b"." + b"t" * 20_000


def configs() -> Iterator[tuple[str, bytes]]:
    def changed(**values: Any) -> bytes:
        return json.dumps(CONFIG | values).encode()

    yield "good", changed()
    yield "empty", b""
    yield "null", b"null"
    yield "text", b'"LORA"'
    yield "deep", b"[" * 20_000
    yield "not-utf8", b'{"peft_type": "\xff"}'
    yield "byte-order-mark", "\ufeff".encode() + changed()
    yield "rank-huge", changed(r=10**30)
    yield "rank-a-long-number", changed().replace(b'"r": 2', b'"r": ' + b"9" * 10_000)
    yield "rank-a-float", changed(r=2.0)
    yield "rank-true", changed(r=True)
    yield "alpha-infinite", changed(lora_alpha=float("inf"))
    yield "alpha-null", changed(lora_alpha=None)
    yield "alpha-zero", changed(lora_alpha=0)
    yield "pattern-a-list", changed(rank_pattern=["q"])
    yield "pattern-of-lists", changed(alpha_pattern={"q": [1]})
    yield "pattern-no-expression", changed(alpha_pattern={"(": 1})
    yield "pattern-exponential", changed(alpha_pattern={"(a+)+b": 1})
    yield "pattern-of-wildcards", changed(alpha_pattern={".*.*.*.*.*q": 1})
    yield "pattern-of-choices", changed(alpha_pattern={"(ab|a|b)" * 30 + "c": 1})
    yield "pattern-of-optionals", changed(alpha_pattern={"a?" * 34 + "a" * 34 + "b": 1})
    yield "pattern-very-long", changed(alpha_pattern={"q" * 20_000: 1})
    yield "pattern-deep", changed(alpha_pattern={"(" * 5000 + ")" * 5000: 1})
    yield "pattern-of-many", changed(alpha_pattern={f"m{i}": 1 for i in range(3000)})
    yield "pattern-of-counts", changed(alpha_pattern={"a{1000000000}q": 1})
    yield "base-a-number", changed(base_model_name_or_path=7)
    yield "base-with-control-characters", changed(base_model_name_or_path="base\x1b[2J\u202e")
    yield "parameters-a-text", changed(target_parameters="experts.up")
    yield "parameters-of-numbers", changed(target_parameters=[1])
    yield "parameters-empty-text", changed(target_parameters=[""])
    yield "parameters-of-everything", changed(target_parameters=["q"], rank_pattern={"q.q": 1})
    yield "init-a-list", changed(init_lora_weights=["pissa"])
    yield "type-a-list", changed(peft_type=["LORA"])
    yield "type-in-lower-case", changed(peft_type="lora")
    yield "tied-without-an-embedding", changed(ensure_weight_tying=True)


def indexes() -> Iterator[tuple[str, bytes]]:
    name = "adapter_model-00001-of-00001.safetensors"
    good = {"metadata": {}, "weight_map": {A: name, B: name}}
    yield "good", json.dumps(good).encode()
    yield "empty", b""
    yield "null", b"null"
    yield "no-map", b'{"metadata": {}}'
    yield "map-empty", b'{"weight_map": {}}'
    yield "map-of-numbers", b'{"weight_map": {"a": 1}}'
    yield "map-of-lists", b'{"weight_map": {"a": ["x.safetensors"]}}'
    yield "map-outside", b'{"weight_map": {"a": "../x.safetensors"}}'
    yield "map-absolute", b'{"weight_map": {"a": "/etc/x.safetensors"}}'
    yield "map-to-itself", b'{"weight_map": {"a": "adapter_model.safetensors.index.json"}}'
    yield "map-with-a-nul", b'{"weight_map": {"a": "x\\u0000.safetensors"}}'
    yield "map-missing-a-file", json.dumps({"weight_map": {A: name, B: "other.safetensors"}}).encode()
    yield "map-lists-too-little", json.dumps({"weight_map": {A: name}}).encode()
    yield "map-lists-more", json.dumps({"weight_map": {A: name, "more": name}}).encode()


KINDS = {
    "header": (headers, "safetensors"),
    "pickle": (pickles, "bin"),
    "config": (configs, "json"),
    "index": (indexes, "json"),
}


def main() -> None:
    for kind, (cases, suffix) in KINDS.items():
        for name, raw in cases():
            folder = CORPUS / kind
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.{suffix}").write_bytes(raw)
    total = sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file())
    print(f"{sum(p.is_file() for p in CORPUS.rglob('*'))} files, {total} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
