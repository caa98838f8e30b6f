"""The plan states the peak, and the process stays under it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.memory import WORKER_BYTES
from lorashare_stream.plan.plan import Plan
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import CONFIG
from .tiers import slow

FLAGS = {"variance_threshold": "variance"}


def collection_of(
    root: Path,
    n: int,
    d: int,
    r: int,
    suffix: str = "safetensors",
    extra: int = 0,
    modules: tuple[str, ...] = ("q",),
    own: float = 1.0,
) -> list[Path]:
    """Random adapters; `own` is how much of lora_A they do not have in common."""
    generator = torch.Generator().manual_seed(0)
    common = {module: torch.randn(r, d, generator=generator) if own < 1 else torch.zeros(()) for module in modules}
    for i in range(n):
        folder = root / f"a{i:03}"
        folder.mkdir(parents=True)
        tensors = {}
        for module in modules:
            alone = torch.randn(r, d, generator=generator)
            tensors[f"base_model.model.{module}.lora_A.weight"] = own * alone + common[module]
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(d, r, generator=generator)
        if extra:
            tensors["base_model.model.embed.weight"] = torch.zeros(extra, 1024)
        path = folder / f"adapter_model.{suffix}"
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": r, "lora_alpha": r}))
    return sorted(root.iterdir())


RUN = """
import resource, sys
from lorashare_stream.cli.app import main
assert main(sys.argv[1:]) == 0
own = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""

LACKING = """
from scipy.linalg import eigh
from lorashare_stream.linalg import eigen
def lacking(a, *, driver, **options):
    values, vectors = eigh(a, driver=driver, **options)
    return (values[2:], vectors[:, 2:]) if driver == "evr" else (values, vectors)
eigen.eigh = lacking
"""


def flags_of(options: dict[str, Any]) -> list[str]:
    """Settings on the command line."""
    names = {k: f"--{FLAGS.get(k, k).replace('_', '-')}" for k in options}
    return [names[k] if v is True else f"{names[k]}={v}" for k, v in options.items()]


def peak_of_a_run(out: Path, folders: list[Path], memory: int, before: str = "", **options: Any) -> int:
    """Peak resident bytes of a run and of its one worker, imports included, as the kernel counts them.

    What the two share is counted twice. Not `ru_maxrss` of the run, which begins with what held who forked it.
    """
    flags = flags_of(options)
    command = ["compress", str(folders[0].parent), "-o", str(out), f"--memory={memory}", "--device=cpu", "--json", "-q"]
    done = subprocess.run([sys.executable, "-c", before + RUN, *command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


def least_memory(folders: list[Path], **options: Any) -> tuple[Plan, int]:
    plan = plan_for(resolve(folders), Settings.from_mapping({"device": "cpu"} | options))
    return plan, max(s.least_bytes for s in plan.steps)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ({"n": 160, "d": 1024, "r": 16}, {"num_components": 32}),  # second moments, block Krylov
        slow({"n": 300, "d": 2048, "r": 16}, {"num_components": 32}),
        slow({"n": 300, "d": 2048, "r": 16}, {"num_components": 1024}),  # second moments, LAPACK
        slow({"n": 100, "d": 2048, "r": 16}, {"num_components": 800}),  # stacked columns
        slow({"n": 200, "d": 2048, "r": 16}, {"num_components": 32}),  # more columns than d, block Krylov
        slow({"n": 200, "d": 2048, "r": 16}, {"num_components": 800}),  # more columns than d, LAPACK
        slow({"n": 200, "d": 1536, "r": 16}, {"num_components": "auto", "variance_threshold": 0.99}),
        slow({"n": 6, "d": 512, "r": 8, "extra": 50_000}, {"num_components": 8}),  # 200 MB that is kept verbatim
        slow(
            {"n": 4, "d": 512, "r": 8, "extra": 20_000, "suffix": "bin"}, {"num_components": 8}
        ),  # read whole, with torch
    ],
)
def test_the_smallest_budget_that_the_plan_names_is_kept(
    tmp_path: Path, case: dict[str, Any], options: dict[str, Any]
) -> None:
    folders = collection_of(tmp_path / "adapters", **case)
    _, least = least_memory(folders, **options)
    assert peak_of_a_run(tmp_path / "out", folders, least, **options) <= least


SEVEN_B = {"d": 4096, "r": 16, "modules": tuple(f"m{i}" for i in range(64))}  # q and v of 32 layers, all of one class


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ({"n": 8, "d": 768, "r": 8, "modules": tuple(f"m{i}" for i in range(24))}, {"max_error": 0.25}),
        slow(
            {"n": 12, "d": 768, "r": 8, "own": 0.05, "modules": tuple(f"m{i}" for i in range(24))},
            {"max_error": 0.1, "directions": True},
        ),
        slow({"n": 6, "own": 0.05, **SEVEN_B}, {"max_error": 0.1, "directions": True}),
        slow({"n": 2, **SEVEN_B}, {"max_error": 0.25}),
        slow({"n": 2, **SEVEN_B}, {"max_error": 0.05}),
        slow({"n": 2, **SEVEN_B}, {"ratio": 10}),
    ],
)
def test_coding_an_adapter_takes_what_the_plan_says(
    tmp_path: Path, case: dict[str, Any], options: dict[str, Any]
) -> None:
    folders = collection_of(tmp_path / "adapters", **case)
    plan, least = least_memory(folders, **options)
    one, together = peak_of_processes(tmp_path, least, 1, **options)
    assert together <= least
    (encode,) = (step for step in plan.steps if step.name == "encode")
    if "directions" not in options:  # whose moments take more
        assert one <= WORKER_BYTES + encode.task_bytes


@pytest.mark.slow
def test_so_it_is_where_lapack_finds_too_few_vectors(tmp_path: Path) -> None:
    folders, options = collection_of(tmp_path / "adapters", 200, 1536, 16), {"num_components": 200}
    _, least = least_memory(folders, moment_dtype="float64", **options)
    assert peak_of_a_run(tmp_path / "out", folders, least, LACKING, moment_dtype="float64", **options) <= least


def sizes_of(pid: int) -> list[int]:
    """Proportional sizes in bytes of a process and its children; a page that several have is shared among them."""
    pids, sizes = [pid], []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            pids += map(int, thread.read_text().split())
    for found in pids:
        with suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{found}/smaps_rollup").read_text().splitlines()
            sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
    return sizes


def peak_of_processes(root: Path, memory: int, workers: int, **options: Any) -> tuple[int, int]:
    """The largest proportional size of one process of a run, and of all together; there is one more than workers."""
    flags = flags_of(options)
    command = ["compress", str(root / "adapters"), "-o", str(root / "out"), "--device=cpu", "-q", *flags]
    command += [f"--workers={workers}", f"--memory={memory}"]
    found = [[0]]
    with subprocess.Popen([sys.executable, "-m", "lorashare_stream", *command], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            found.append(sizes_of(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    assert max(map(len, found)) == workers + 1
    return max(max(sizes, default=0) for sizes in found), max(map(sum, found))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ({"n": 24, "d": 1024, "r": 16}, {"num_components": 32}),
        slow({"n": 200, "d": 2048, "r": 24}, {"num_components": 32}),  # second moments
        slow({"n": 200, "d": 2048, "r": 16}, {"num_components": 64}),  # stacked columns
    ],
)
def test_processes_keep_the_budget_together(tmp_path: Path, case: dict[str, Any], options: dict[str, Any]) -> None:
    folders = collection_of(tmp_path / "adapters", modules=("q", "v", "o"), **case)
    ample, _ = least_memory(folders, workers=2, memory=1 << 34, **options)
    memory = max(step.peak_bytes for step in ample.steps)
    exact, _ = least_memory(folders, workers=2, memory=memory, **options)
    assert {step.concurrency for step in exact.steps} == {2}
    assert peak_of_processes(tmp_path, memory, 2, **options)[1] <= memory


@pytest.mark.slow
def test_memory_of_coding_does_not_grow_with_the_number_of_adapters(tmp_path: Path) -> None:
    modules, peaks = tuple(f"m{i}" for i in range(8)), []
    for n in (200, 800):
        collection_of(tmp_path / str(n) / "adapters", n, 512, 8, modules=modules)
        peaks.append(peak_of_processes(tmp_path / str(n), 1 << 30, 1, max_error=0.25)[1])
    assert peaks[1] - peaks[0] <= 600 * (15 << 10)  # the catalog and records of each; its factors have 256 KiB


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path: Path) -> None:
    few, many = collection_of(tmp_path / "few", 30, 1024, 16), collection_of(tmp_path / "many", 450, 1024, 16)
    peaks = [peak_of_a_run(tmp_path / name, f, 1 << 30, workers=1) for name, f in (("x", few), ("y", many))]
    assert peaks[1] <= 1.2 * peaks[0]
    sizes = [sum(f.stat().st_size for a in folders for f in a.iterdir()) for folders in (few, many)]
    assert sizes[1] - sizes[0] > 0.2 * peaks[1]


def test_fewer_tasks_run_at_a_time_when_memory_is_short(tmp_path: Path) -> None:
    folders = collection_of(tmp_path / "adapters", 200, 2048, 24)
    plan, _ = least_memory(folders, num_components=32)
    least = max(s.least_bytes for s in plan.steps)
    short, _ = least_memory(folders, num_components=32, memory=least, workers=8)
    ample, _ = least_memory(folders, num_components=32, memory=1 << 35, workers=8)
    assert max(s.peak_bytes for s in short.steps) <= least
    assert min(s.concurrency for s in short.steps) == 1
    assert {s.concurrency for s in ample.steps} == {8}
    assert plan.sizes["moments"] == 2 * (4 * 2048 * 2048 + 8 * 2048 + 2 * 4)  # S, s, and a checksum of each
