"""The shell job: scripts/compress_hub.sh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import make_collection
from .fakehub import ALICE, FakeHub, environment
from .test_hub import files_of

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compress_hub.sh"


def stub(folder: Path, codes: dict[str, list[int]]) -> dict[str, str]:
    """A lorashare-stream that notes what it is asked, and ends with the given codes, then with 0."""
    folder.mkdir()
    script = folder / "lorashare-stream"
    script.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys, time\nhere = pathlib.Path({str(folder)!r})\n"
        f"codes = {codes!r}\nwords = sys.argv[1:]\n"
        "with (here / 'log').open('a') as f: f.write(json.dumps(words) + '\\n')\n"
        "done = [json.loads(line)[0] for line in (here / 'log').read_text().splitlines()].count(words[0])\n"
        "if words[0] == 'discover': pathlib.Path(words[words.index('-o') + 1]).write_text('')\n"
        "if words[-1] == 'slow': time.sleep(60)\n"
        "sys.exit((codes.get(words[0], []) + [0] * done)[done - 1])\n"
    )
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "BACKOFF": "0"}


def asked(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.parametrize(
    ("codes", "expected", "steps"),
    [
        ({}, 0, ["discover", "compress", "verify", "push"]),
        ({"compress": [75, 75, 0], "push": [75]}, 0, ["discover", *["compress"] * 3, "verify", "push", "push"]),
        ({"compress": [75, 3]}, 3, ["discover", "compress", "compress", "verify", "push"]),
        ({"compress": [1]}, 1, ["discover", "compress"]),
        ({"compress": [2]}, 2, ["discover", "compress"]),
        ({"discover": [75, 1]}, 1, ["discover", "discover"]),
        ({"compress": [3], "verify": [1]}, 1, ["discover", "compress", "verify"]),
        ({"push": [1]}, 1, ["discover", "compress", "verify", "push"]),
    ],
)
def test_what_the_job_does_after_each_exit_code(
    tmp_path: Path, codes: dict[str, list[int]], expected: int, steps: list[str]
) -> None:
    env = stub(tmp_path / "bin", codes)
    done = subprocess.run(
        [SCRIPT, "org/base", "me/share", "-k", "8"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr
    log = asked(tmp_path / "bin")
    assert [words[0] for words in log] == steps
    if "compress" in steps:
        manifest = "share.manifest.jsonl"
        assert ["compress", manifest, "-o", "share", "--base-model", "org/base", "-k", "8"] in log
    if "push" in steps:
        assert log[-1] == ["push", "share", "me/share"]


def test_a_second_run_does_not_discover_again_and_a_folder_is_not_pushed(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", {}) | {"DISCOVER": "--limit 3"}
    for _ in range(2):
        subprocess.run([SCRIPT, "org/base", "./share"], env=env, cwd=tmp_path, check=True, capture_output=True)
    log = asked(tmp_path / "bin")
    assert [words[0] for words in log] == ["discover", "compress", "verify", "compress", "verify"]
    assert log[0][-2:] == ["--limit", "3"]


def test_sigterm_stops_it_with_75(tmp_path: Path) -> None:
    env = stub(tmp_path / "bin", {})
    job = subprocess.Popen([SCRIPT, "org/base", "share", "slow"], env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "bin" / "log").exists() or len(asked(tmp_path / "bin")) < 2:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=10) == 75


@pytest.mark.slow
def test_the_job_from_the_hub_to_the_hub_through_an_outage(tmp_path: Path) -> None:
    with FakeHub() as hub:
        for folder in make_collection(tmp_path / "adapters", 5):
            hub.add(f"org/{Path(folder).name}", files_of(folder), base_model="tiny-base")
        hub.add("org/closed", files_of(tmp_path / "adapters" / "a00"), base_model="tiny-base", gated="manual")
        hub.fault(kind="list", status=503, times=2)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = environment(hub, tmp_path / "home", ALICE) | {"PATH": path, "BACKOFF": "1"}
        words = [SCRIPT, "tiny-base", "alice/share", "-k", "4", "--on-error", "skip", "--disk-budget", "1MiB"]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 3, done.stderr  # one is gated
        assert "share_config.json" in hub.files("alice/share")
        commits = hub.count("commit")
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 3, done.stderr
        assert hub.count("commit") == commits > 0  # nothing to push again


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "BASE_MODEL" in done.stderr
