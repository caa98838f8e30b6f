"""No work is repeated: which bytes of an adapter are taken from its map how often; what the kernel sees; open files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.adapters import layout
from lorashare_stream.adapters.safetensors import TensorReader, TensorRecord, read_header
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings

from .conftest import make_collection
from .tiers import slow

WEIGHTS = "adapter_model.safetensors"


def parts_of(path: Path) -> tuple[set[int], set[int]]:
    """The bytes of a file that are LoRA, and what else is behind the header."""
    spans = {r.name: set(range(r.offset, r.offset + r.nbytes)) for r in read_header(path)}
    lora = {i for name, span in spans.items() if ".lora_" in name for i in span}
    return lora, {i for name, span in spans.items() if ".lora_" not in name for i in span}


class Taken:
    """Counts the bytes that are taken from the maps of files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, Counter[int]] = {}
        self._paths: dict[int, str] = {}  # by where they are mapped
        through, raw, stacked = TensorReader.through, TensorReader.raw, layout.stacked

        def mapped(reader: TensorReader, record: TensorRecord) -> Any:
            data = through(reader, record)
            self._paths[data.ctypes.data] = str(reader._paths[record.file])
            return data

        def one(reader: TensorReader, record: TensorRecord) -> Any:
            self._count(str(reader._paths[record.file]), record.offset, record.nbytes)
            return raw(reader, record)

        def several(data: Any, offsets: Sequence[int], dtype: str, shape: tuple[int, ...]) -> Any:
            found = stacked(data, offsets, dtype, shape)
            for offset in offsets:
                self._count(self._paths[data.ctypes.data], offset, found[0].nbytes)  # in float32, as it is stored
            return found

        monkeypatch.setattr(TensorReader, "through", mapped)
        monkeypatch.setattr(TensorReader, "raw", one)
        monkeypatch.setattr(layout, "stacked", several)

    def _count(self, path: str, start: int, size: int) -> None:
        self.counts.setdefault(path, Counter()).update(range(start, start + size))


@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_tensors_are_taken_three_times_and_only_they(
    tmp_path: Path, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_collection(tmp_path / "adapters", 6)
    plan = plan_for(resolve(folders), Settings.from_mapping({"device": "cpu", "objective": objective}))
    taken = Taken(monkeypatch)
    compress(plan, tmp_path / "out", executor=SerialExecutor())
    for folder in folders:
        path = Path(folder) / WEIGHTS
        lora, other = parts_of(path)
        counts = taken.counts[str(path)]
        assert {counts[i] for i in lora} == {3}  # ingest, accumulate, project
        assert {counts[i] for i in other} == {2}  # ingest, and to copy it
        assert counts.keys() == lora | other


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_the_kernel_sees_headers_read_and_files_mapped_once_a_pass(tmp_path: Path) -> None:
    folders, log = make_collection(tmp_path / "adapters", 6), tmp_path / "strace.log"
    command = [sys.executable, "-m", "lorashare_stream", "compress", *folders, "-o", str(tmp_path / "out")]
    command += ["-q", "--workers=1"]  # as many portions of modules are summed
    trace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=read,pread64,preadv,preadv2,mmap,openat"]
    done = subprocess.run([*trace, *command, "--device=cpu"], capture_output=True, text=True, timeout=120)
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    read: Counter[str] = Counter()
    maps: Counter[str] = Counter()
    for line in whole_lines(log.read_text()):
        found = re.match(r"\d+ +(?P<call>read|pread\w*|mmap)\(.*?\d<(?P<path>[^>]*)>.*\) += (?P<result>\w+)", line)
        if found is not None and found["path"].endswith(WEIGHTS) and "/adapters/" in found["path"]:
            if found["call"] == "mmap":
                maps[found["path"]] += 1
            else:
                read[found["path"]] += int(found["result"])
    assert len(read) == len(maps) == len(folders)
    assert sorted(maps.values()) == [3] * (len(folders) - 1) + [4]  # and once for the proof of a header that all have
    assert all(size == read_header(Path(path))[0].offset for path, size in read.items())


def whole_lines(text: str) -> list[str]:
    """Lines of strace, with what `<unfinished ...>` and `<... resumed>` tore apart put together again."""
    begun: dict[str, str] = {}
    lines = []
    for line in text.splitlines():
        pid = line.split(None, 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
        elif (resumed := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line)) and pid in begun:
            lines.append(begun.pop(pid) + resumed[1])
        else:
            lines.append(line)
    return lines


@pytest.mark.parametrize("count", [30, slow(300)])
def test_few_files_are_open_at_a_time_however_many_adapters_there_are(tmp_path: Path, count: int) -> None:
    make_collection(tmp_path / "adapters", count, {"q": (12, 8)})
    adapters, out = str(tmp_path / "adapters"), str(tmp_path / "out")
    commands = [["compress", adapters, "-o", out, "-q"], ["verify", out, "-q"]]
    code = f"import sys; from lorashare_stream.cli.app import main; sys.exit(any(map(main, {commands})))"

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=few, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / "out" / "adapters")) == count
