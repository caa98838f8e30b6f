"""No work is repeated: which bytes of an adapter are read how often, as the kernel sees it; how many files are open."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lorashare_stream.adapters import safetensors as tensorfile
from lorashare_stream.adapters.safetensors import read_header
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import make_collection

WEIGHTS = "adapter_model.safetensors"
CALL = re.compile(r"\d+ +(?P<call>\w+)\((?P<fd>\d+)<(?P<path>[^>]*)>(?P<rest>.*)\) += (?P<count>\d+)")


def parts_of(path: Path) -> tuple[set[int], set[int], set[int]]:
    """The bytes of a file that are header, LoRA, and something else."""
    records = read_header(path)
    spans = {r.name: set(range(r.offset, r.offset + r.nbytes)) for r in records}
    lora = {i for name, span in spans.items() if ".lora_" in name for i in span}
    other = {i for name, span in spans.items() if ".lora_" not in name for i in span}
    return set(range(records[0].offset)), lora, other


def ranges_of(calls: list[tuple[int, int]]) -> Counter[int]:
    return Counter(i for start, count in calls for i in range(start, start + count))


@pytest.mark.parametrize("objective", ["delta", "factors"])
@pytest.mark.parametrize("workers", [1, 2])
def test_tensors_are_read_three_times_and_only_they(
    tmp_path: Path, objective: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_collection(tmp_path / "adapters", 6)
    calls: dict[str, list[tuple[int, int]]] = {}

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = original(fd, buffers, offset)
        calls.setdefault(os.readlink(f"/proc/self/fd/{fd}"), []).append((offset, count))
        return count

    original = os.preadv
    plan = plan_for(
        resolve(folders), Settings.from_mapping({"device": "cpu", "objective": objective, "workers": workers})
    )
    monkeypatch.setattr(tensorfile.os, "preadv", counted)
    compress(plan, tmp_path / "out")
    for folder in folders:
        path = Path(folder) / WEIGHTS
        _, lora, other = parts_of(path)
        reads = ranges_of(calls[str(path)])
        assert {reads[i] for i in lora} == {3}  # ingest, accumulate, project
        assert {reads[i] for i in other} == {2}  # ingest, and to copy it
        assert reads.keys() == lora | other


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace here")
def test_the_kernel_sees_no_other_reads(tmp_path: Path) -> None:
    folders, log = make_collection(tmp_path / "adapters", 6), tmp_path / "strace.log"
    command = [sys.executable, "-m", "lorashare_stream", "compress", *folders, "-o", str(tmp_path / "out"), "-q"]
    trace = ["strace", "-f", "-y", "-qq", "-o", str(log), "-e", "trace=read,pread64,preadv,preadv2,mmap,lseek,openat"]
    done = subprocess.run([*trace, *command, "--device=cpu"], capture_output=True, text=True, timeout=120)
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    reads: dict[str, Counter[int]] = {}
    position: dict[str, int] = {}
    for line in whole_lines(log.read_text()):
        found = re.match(
            r"(?P<pid>\d+) +(?P<call>\w+)\((?P<fd>\d+)<(?P<path>[^>]*)>(?P<rest>.*)\) += (?P<count>\d+)", line
        )
        if found is None or not found["path"].endswith(WEIGHTS) or "/adapters/" not in found["path"]:
            continue
        call, path, count = found["call"], found["path"], int(found["count"])
        assert call != "mmap"
        key = found["fd"]
        if call == "lseek":
            position[key] = count
        elif call == "read":
            start = position[key]
            position[key] = start + count
            reads.setdefault(path, Counter()).update(range(start, start + count))
        else:
            numbers = re.findall(r"\d+", found["rest"].rpartition("]")[2])  # iovcnt, offset and flags; or size, offset
            offset = int(numbers[1] if call.startswith("preadv") else numbers[-1])
            reads.setdefault(path, Counter()).update(range(offset, offset + count))
    assert len(reads) == len(folders)
    for path, counts in reads.items():
        header, lora, other = parts_of(Path(path))
        assert max(counts[i] for i in lora | other) <= 3
        assert {counts[i] for i in lora} == {3}
        assert {counts[i] for i in other} == {2}
        assert max(counts[i] for i in header) <= 3


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


def test_few_files_are_open_at_a_time_however_many_adapters_there_are(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "adapters", 300, {"q": (12, 8)})
    assert len(folders) > 256
    program, out = [sys.executable, "-m", "lorashare_stream"], str(tmp_path / "out")

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    for command in (["compress", str(tmp_path / "adapters"), "-o", out], ["verify", out]):
        done = subprocess.run([*program, *command, "-q"], capture_output=True, text=True, preexec_fn=few, timeout=120)
        assert done.returncode == 0, done.stderr
    assert len(os.listdir(tmp_path / "out" / "adapters")) == 300
