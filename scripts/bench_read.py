"""How tensors are read: memory maps against positioned reads, on adapters made here (page cache warm).

    python scripts/bench_read.py [--adapters 300]

Every way opens an adapter once and fills the same blocks of columns with its tensors. Prints microseconds a tensor, of
processor time; compare within one run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from lorashare_stream.adapters.safetensors import TensorReader, TensorRecord, read_header

D, R, MODULES = 768, 8, 24


def make(root: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        tensors = {f"m{m}.{s}": rng.standard_normal((R, D)).astype(np.float32) for m in range(MODULES) for s in "AB"}
        paths.append(root / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def mapped(path: Path, records: Sequence[TensorRecord], out: np.ndarray) -> None:
    with TensorReader([path]) as tensors:
        for record, block in zip(records, out, strict=True):
            block[:] = tensors.raw(record).view(np.float32).reshape(R, D)


def positioned(path: Path, records: Sequence[TensorRecord], out: np.ndarray) -> None:
    fd = os.open(path, os.O_RDONLY)
    for record, block in zip(records, out, strict=True):
        block[:] = np.frombuffer(os.pread(fd, record.nbytes, record.offset), np.float32).reshape(R, D)
    os.close(fd)


def by_library(path: Path, records: Sequence[TensorRecord], out: np.ndarray) -> None:
    with safe_open(path, framework="numpy") as tensors:
        for record, block in zip(records, out, strict=True):
            block[:] = tensors.get_tensor(record.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=300)
    with tempfile.TemporaryDirectory() as scratch:
        paths = make(Path(scratch), parser.parse_args().adapters)
        records = read_header(paths[0])
        blocks = np.ones((len(records), len(paths), R, D), np.float32)  # resident before the first way begins
        ways: dict[str, Callable[[Path, Sequence[TensorRecord], np.ndarray], None]] = {
            "mmap": mapped,
            "pread": positioned,
            "safe_open": by_library,
        }
        for _ in range(3):
            for name, read in ways.items():
                begun = time.process_time()
                for i, path in enumerate(paths):
                    read(path, records, blocks[:, i])
                spent = (time.process_time() - begun) / len(records) / len(paths)
                print(f"{name:10} {spent * 1e6:6.1f} us a tensor", flush=True)


if __name__ == "__main__":
    main()
