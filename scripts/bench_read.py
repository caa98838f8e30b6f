"""How tensors are read: positioned reads against memory maps, on adapters made here (page cache warm).

    python scripts/bench_read.py [--adapters 300]

Every way fills the same blocks of columns, module by module. Prints microseconds a tensor; compare within one run.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lorashare_stream.adapters.safetensors import TensorRecord, read_header

D, R, MODULES = 768, 8, 24


def make(root: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        tensors = {f"m{m}.{s}": rng.standard_normal((R, D)).astype(np.float32) for m in range(MODULES) for s in "AB"}
        paths.append(root / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def positioned(path: Path, record: TensorRecord, out: np.ndarray) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.preadv(fd, [out.data], record.offset)
    os.close(fd)


def mapped(path: Path, record: TensorRecord, out: np.ndarray) -> None:
    fd = os.open(path, os.O_RDONLY)
    begin = record.offset // mmap.PAGESIZE * mmap.PAGESIZE
    view = mmap.mmap(fd, record.offset + record.nbytes - begin, access=mmap.ACCESS_READ, offset=begin)
    os.close(fd)
    out[:] = np.frombuffer(view, np.float32, R * D, record.offset - begin).reshape(R, D)
    view.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--adapters", type=int, default=300)
    with tempfile.TemporaryDirectory() as scratch:
        paths = make(Path(scratch), parser.parse_args().adapters)
        records = read_header(paths[0])
        block = np.empty((len(paths), R, D), np.float32)
        maps = {p: mmap.mmap(os.open(p, os.O_RDONLY), 0, access=mmap.ACCESS_READ) for p in paths}

        def kept(path: Path, record: TensorRecord, out: np.ndarray) -> None:
            out[:] = np.frombuffer(maps[path], np.float32, R * D, record.offset).reshape(R, D)

        ways: dict[str, Callable[[Path, TensorRecord, np.ndarray], None]] = {
            "pread": positioned,
            "mmap of the byte range": mapped,
            "mmap of the file, all kept open": kept,
        }
        for _ in range(3):
            for name, read in ways.items():
                begun = time.perf_counter()
                for record in records:
                    for i, path in enumerate(paths):
                        read(path, record, block[i])
                spent = (time.perf_counter() - begun) / len(records) / len(paths)
                print(f"{name:32} {spent * 1e6:6.1f} us a tensor", flush=True)


if __name__ == "__main__":
    main()
