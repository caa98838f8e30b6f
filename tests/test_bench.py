"""scripts/bench.py on a few small adapters: what it records, that its oracle agrees, and what it renders."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

measuring = pytest.mark.skipif(sys.platform != "linux", reason="processes are measured through /proc")
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FIELDS = {
    "run", "kind", "at", "collection", "adapters", "k", "system", "repeat", "status", "exit_code", "wall_s", "cpu_s",
    "peak_bytes", "rchar", "wchar", "read_bytes", "write_bytes", "memory", "dtype", "source_bytes", "checkpoint_bytes",
    "workspace_bytes", "captured", "dw_error", "kept",
}  # fmt: skip


def script(name: str, *words: object) -> str:
    command = [sys.executable, str(SCRIPTS / name), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()]


@pytest.mark.slow
@measuring
def test_a_run_is_recorded_once_and_rendered(tmp_path: Path) -> None:
    results, page = tmp_path / "bench.jsonl", tmp_path / "benchmarks.md"
    systems = ["ours-factors", "ours-delta", "ours-factors-f32", "lorashare"]
    if importlib.util.find_spec("vlora") is not None:
        systems.append("vlora")
    words = ["here", "--data", tmp_path / "data", "--results", results]
    chosen = ["--collections", "tiny", "--adapters", 6, "-k", 4, "--repeat", 1, "--systems", *systems]
    script("bench.py", *words, *chosen, "--keep", tmp_path / "kept")
    runs = {x["system"]: x for x in lines(results) if x["kind"] == "run"}
    assert list(runs) == systems
    for line in runs.values():
        assert line["status"] == "ok", line
        assert line.keys() >= FIELDS
        assert 0 < line["dw_error"] < 1
        assert 0 < line["kept"] < 1
        assert line["wchar"] >= line["checkpoint_bytes"] > 0
        assert line["peak_bytes"] > 30 << 20
    assert runs["ours-factors-f32"]["captured"] == pytest.approx(1, abs=1e-6)
    for system in ("ours-factors", "ours-delta"):  # rounded to bfloat16
        assert runs[system]["captured"] == pytest.approx(1, abs=1e-4)
        assert runs[system]["rchar"] > 2 * runs[system]["source_bytes"]
    assert runs["lorashare"]["captured"] < 1 + 1e-9
    assert runs["lorashare"]["work_s"] < runs["lorashare"]["wall_s"]
    assert runs["ours-delta"]["dw_error"] < runs["ours-factors"]["dw_error"]

    script("bench.py", *words, "--floor", "--collections", "tiny", "--adapters", 6, "-k", 4)
    kept = tmp_path / "kept" / "tiny-6-4-ours-delta"
    script("bench_open.py", kept, "--run", "here", "--results", results, "--repeat", 1)
    count = len(lines(results))
    script("bench.py", *words, *chosen)
    assert len(lines(results)) == count

    script("bench.py", *words, "--render", page)
    text = page.read_text()
    for heading in ("## Targets", "## tiny, k = 4", "## Efficiency", "## Opening a checkpoint"):
        assert heading in text
    assert "| open 10,000 adapters, 2 s | | not measured |" in text
    rows = [x for x in text.splitlines() if x.startswith("| lorashare | 6 | 1 |")]
    assert len(rows) == 1
    page.write_text(text.replace("<!-- keep profile -->\n", "<!-- keep profile -->\nWritten by hand.\n"))
    script("bench.py", *words, "--render", page)
    assert "Written by hand." in page.read_text()


@pytest.mark.slow
@measuring
def test_another_checkout_takes_part_in_every_round(tmp_path: Path) -> None:
    """Which is seen by what is wrong with it: the package of this one cannot end with that."""
    checkout, results, page = tmp_path / "checkout", tmp_path / "bench.jsonl", tmp_path / "benchmarks.md"
    shutil.copytree(SCRIPTS.parent / "lorashare_stream", checkout / "lorashare_stream")
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"]):
        subprocess.run(["git", "-C", checkout, *words], check=True)
    words = ["here", "--data", tmp_path / "data", "--results", results, "--collections", "tiny", "--adapters", 4]
    chosen = ["-k", 2, "--repeat", 2, "--systems", "ours-factors", "lorashare", "--before", checkout]
    script("bench.py", *words, *chosen)
    runs = [(x["system"], x["repeat"], x["status"]) for x in lines(results) if x["kind"] == "run"]
    systems = ["before-factors", "ours-factors", "lorashare"]
    assert runs == [(s, 0, "ok") for s in systems] + [(s, 1, "ok") for s in reversed(systems)]
    script("bench.py", *words, "--render", page)
    row = next(x for x in page.read_text().splitlines() if x.startswith("| tiny | 2 | ours-factors |"))
    assert all(float(cell) > 0 for cell in row.split("|")[4:-1])

    (checkout / "lorashare_stream" / "__main__.py").write_text("raise SystemExit('another one')")
    script("bench.py", "again", *words[1:], *chosen)
    again = [x for x in lines(results) if x["kind"] == "run" and x["run"] == "again"]
    assert {(x["system"], x["status"], x.get("reason")) for x in again} == {
        ("before-factors", "failed", "another one"), ("ours-factors", "ok", None), ("lorashare", "ok", None),
    }  # fmt: skip


@measuring
def test_a_peer_over_its_limit_gets_fewer_adapters(tmp_path: Path) -> None:
    results = tmp_path / "bench.jsonl"
    words = ["here", "--data", tmp_path / "data", "--results", results, "--collections", "tiny", "--adapters", 4]
    script("bench.py", *words, "-k", 2, "--repeat", 1, "--systems", "lorashare", "--limit-seconds", 0.1)
    runs = [x for x in lines(results) if x["kind"] == "run"]
    assert [(x["adapters"], x["status"]) for x in runs] == [(4, "time"), (2, "time")]
    page = tmp_path / "benchmarks.md"
    script("bench.py", *words, "--render", page)
    assert "- lorashare, N = 4, k = 2: killed after 0 s." in page.read_text()


def test_a_smaller_collection_is_the_beginning_of_a_larger_one(tmp_path: Path) -> None:
    for count in (2, 3):
        script("synthetic.py", "tiny", tmp_path / str(count), "--adapters", count)
    assert len(list((tmp_path / "3").iterdir())) == 3
    few = sorted(p.relative_to(tmp_path / "2") for p in (tmp_path / "2").rglob("*") if p.is_file())
    assert len(few) == 4
    for name in few:
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    first, second = (sorted((tmp_path / "3").glob("*/adapter_model.safetensors"))[i].read_bytes() for i in (0, 1))
    assert len(first) == len(second)
    assert first != second


def test_executors_are_compared_on_the_same_adapters(tmp_path: Path) -> None:
    script("synthetic.py", "tiny", tmp_path / "tiny", "--adapters", 4)
    found = script("bench_threads.py", tmp_path / "tiny", "-k", 4, "--repeat", 1)
    header, _, row = (line.strip("| ").split(" | ") for line in found.splitlines())
    assert header == ["collection", "serial", "threads", "processes"]
    assert all(float(seconds) > 0 for seconds in row[1:])
