"""Whatever stops a run, and whenever: the same command again gives the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream import pipeline
from lorashare_stream.checkpoint.staging import Staging
from lorashare_stream.errors import UsageError
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages import accumulate

from .conftest import make_collection, tree_digest
from .tiers import some_fast

TOP = Path(__file__).resolve().parents[1]
SHM = Path("/dev/shm")

# Every fault at every call of `compress`; the other commands at every call too, with the faults that are harshest to
# them. `python -m tests.crash` does any other pair. In each part, a fault at every 21st call, or every 42nd where a run
# takes long; one part is fast.
FAULTS = [
    *[("compress", mode) for mode in ("kill", "full", "power", "names")], ("replace", "power"),
    ("project", "power"), ("recompute", "kill"), ("remove", "power"), ("remove-refit", "kill"),
    ("slice", "power"), ("discard", "kill"),
    ("code", "full"), ("code", "names"), ("code-bytes", "kill"), ("code-add", "power"), ("code-remove", "power"),
    ("code-refit", "kill"), ("code-share", "power"),
    ("directions", "power"), ("directions-bytes", "kill"), ("directions-add", "full"), ("directions-remove", "power"),
    ("directions-refit", "names"),
]  # fmt: skip
PARTS = {scenario: 42 if scenario.startswith("directions") else 21 for scenario, _ in FAULTS}


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: a thousand runs sync a hundred times each."""
    folder = Path(tempfile.mkdtemp(dir=SHM if os.access(SHM, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def crasher() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.crash"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=TOP, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="calls are counted by /proc")
@pytest.mark.parametrize(("scenario", "mode", "part"), [
    case for scenario, mode in FAULTS
    for case in some_fast(((scenario, mode, part) for part in range(PARTS[scenario])), every=PARTS[scenario])
])  # fmt: skip
def test_a_fault_at_every_call_that_changes_the_disk(
    quick: Path, crasher: subprocess.Popen[str], scenario: str, mode: str, part: int
) -> None:
    parts = PARTS[scenario]
    print(json.dumps([str(quick), scenario, mode, str(parts), str(part + 1)]), file=crasher.stdin, flush=True)
    said = ""
    while (line := crasher.stdout.readline()) and not line.startswith("@"):
        said += line
    assert line == "@0\n", said
    told = json.loads(said)
    assert told["calls"] > 80
    assert told["tried"] == len(range(part, told["calls"], parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        ("-k 4", "-k 6"), ("--max-error 0.2", "--ratio 12"), ("-k 4", "--max-error 0.1"),
        ("--max-error 0.2 --directions", "--max-error 0.2"),
    ],
)  # fmt: skip
def test_killed_at_random_times(
    tmp_path: Path, quick: Path, asked: tuple[str, str], record_property: Callable[[str, object], None]
) -> None:
    make_collection(tmp_path / "adapters", 60, {f"layers.{i}.q": (128, 96) for i in range(6)})

    def start(out: str, k: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorashare_stream", "compress", tmp_path / "adapters", "-o", quick / out]
        return subprocess.Popen(
            [*map(str, command), *k.split(), "-q", "--device", "cpu"], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole: dict[str, dict[str, str]] = {}
    longest = 0.0
    for k in asked:
        begun = time.monotonic()
        process = start(f"whole{k}", k)
        assert process.communicate()[1] == ""
        longest = max(longest, time.monotonic() - begun)
        whole[k] = tree_digest(quick / f"whole{k}")
    chance, kills, finished = random.Random(), 0, 0
    while kills < 30 or not finished:
        k = chance.choice(asked)  # so that what is staged, and what is published, is replaced by another
        process = start("out", k)
        try:
            _, said = process.communicate(timeout=chance.uniform(0.3, 0.95) * longest)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        finished += 1
        assert process.returncode == 0, said
        assert tree_digest(quick / "out") == whole[k]
    for k in reversed(asked):  # one of them has something to do
        process = start("out", k)
        assert process.communicate()[1] == ""
        assert tree_digest(quick / "out") == whole[k]
    assert not list(quick.rglob(".*"))
    record_property("told", f"{kills} kills, {finished} runs came to their end between")


def go(sources: list[str], out: Path, **options: Any) -> None:
    settings = Settings.from_mapping({"device": "cpu"} | options)
    compress(plan_for(resolve(sources), settings, default_workspace(out)), out, executor=SerialExecutor())


def flips(path: Path) -> Iterator[bytes]:
    """The content of a file with one bit flipped: near its ends and in the middle."""
    content = path.read_bytes()
    for position in sorted({0, len(content) // 3, len(content) // 2, max(0, len(content) - 2)}):
        for bit in (1, 16):
            yield content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


@pytest.mark.parametrize("part", some_fast(range(7)))
def test_a_bit_flipped_anywhere_in_the_workspace_is_found_and_only_its_group_is_computed_again(
    tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    collection = make_collection(tmp_path / "adapters", 4, {"q": (20, 70), "v": (20, 9)})  # sums, and columns
    go(collection, quick / "out", num_components=4)
    go(collection, quick / "fresh", num_components=3)
    expected = tree_digest(quick / "fresh")
    summed: list[str] = []
    original = accumulate._begin
    monkeypatch.setattr(accumulate, "_begin", lambda s: (summed.append(s.module), original(s))[1])
    kept = quick / "kept"
    shutil.copytree(quick / "out.workspace", kept)
    shutil.copytree(quick / "out", quick / "before")
    for path in sorted(p for p in kept.rglob("*") if p.is_file() and p.stat().st_size)[part::7]:
        name = path.relative_to(kept)
        for content in flips(path):
            for folder, source in (("out.workspace", kept), ("out", quick / "before")):
                shutil.rmtree(quick / folder)
                shutil.copytree(source, quick / folder)
            (quick / "out.workspace" / name).write_bytes(content)
            summed.clear()
            if name == Path("published.json"):
                with pytest.raises(UsageError, match="another run"):
                    go(collection, quick / "out", num_components=3)
                continue
            go(collection, quick / "out", num_components=3)
            assert tree_digest(quick / "out") == expected, name
            assert set(summed) == module_of(kept, name), name


def module_of(workspace: Path, name: Path) -> set[str]:
    """The module, of a single letter, that is summed again if a file of a workspace is damaged."""
    if name.parts[0] == "markers":
        return {name.name[0]}
    if name.parts[0] != "moments" or name.name == "zarr.json":  # which is mended
        return set()
    described = json.loads((workspace / name).with_name("zarr.json").read_text())
    return {described["attributes"]["modules"][int(name.name.split(".")[1])]}


def test_a_bit_flipped_in_what_is_staged_is_found(tmp_path: Path, quick: Path) -> None:
    collection = make_collection(tmp_path / "adapters", 3, {"q": (20, 9)})
    go(collection, quick / "fresh", num_components=3)

    def stop(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        yield from results
        if step == "project":
            raise KeyboardInterrupt

    settings, out = Settings(num_components=3, device="cpu"), quick / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(plan_for(resolve(collection), settings), out, executor=SerialExecutor(), progress=stop)
    kept = quick / "kept"
    shutil.copytree(quick / ".out.staging", kept)
    for path in sorted(p for p in kept.rglob("*") if p.is_file()):
        for content in flips(path):
            shutil.rmtree(quick / ".out.staging", ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(kept, quick / ".out.staging")
            (quick / ".out.staging" / path.relative_to(kept)).write_bytes(content)
            go(collection, out, num_components=3)
            assert tree_digest(out) == tree_digest(quick / "fresh"), path
    assert pipeline.default_workspace(out).exists()


def test_what_a_killed_run_did_not_sync_is_synced_before_it_is_published(
    tmp_path: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection, out = make_collection(tmp_path / "adapters", 3, {"q": (20, 9)}), quick / "out"
    synced: list[str] = []
    original = Staging.sync
    monkeypatch.setattr(Staging, "sync", lambda self, names: (synced.extend(names), original(self, names))[1])

    def stop(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        yield from results
        if step == "project":
            raise KeyboardInterrupt

    settings = Settings(num_components=3, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        compress(plan_for(resolve(collection), settings), out, executor=SerialExecutor(), progress=stop)
    assert synced == []
    assert len(list((quick / ".out.staging" / "adapters").iterdir())) == 3
    go(collection, out, num_components=3)
    assert sorted(synced) == sorted(p.name for p in (out / "adapters").iterdir())
