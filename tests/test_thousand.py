"""A thousand adapters: discovered, compressed in batches, killed and resumed, pushed, opened from the Hub."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.model import SHAREModel

from .conftest import load_tensors, make_collection, tree_digest
from .fakehub import ALICE, FakeHub, Request, environment, patched

COUNT = 1000
WEIGHTS = "adapter_model.safetensors"
IN_FLIGHT = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_collection(tmp_path_factory.mktemp("thousand"), COUNT)


@pytest.fixture
def hub(folders: list[str]) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        for number, folder in enumerate(folders):
            files = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
            fake.add(f"org/{Path(folder).name}", files, base_model="tiny-base", license="mit", downloads=number)
        yield fake


class Shell:
    """The command line, as a job has it."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.env = environment(hub, home, ALICE)

    def start(self, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorashare_stream", *map(str, words)]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *words: object) -> dict[str, Any]:
        job = self.start(*words, "--json")
        out, err = job.communicate(timeout=300)
        assert job.returncode == 0, err
        found: dict[str, Any] = json.loads(out)
        return found


def downloads(requests: list[Request]) -> Counter[str]:
    """How often the weights of each adapter were sent whole."""
    whole = [r for r in requests if r.file == WEIGHTS and r.method == "GET" and r.status == 200 and r.whole]
    return Counter(str(r.repo) for r in whole)


@pytest.mark.slow
def test_a_thousand_adapters_from_the_hub_and_back(
    tmp_path: Path, hub: FakeHub, folders: list[str], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    shell, manifest, out = Shell(hub, tmp_path / "home"), tmp_path / "manifest.jsonl", tmp_path / "out"
    begun = time.monotonic()
    assert shell.run("discover", "--base-model", "tiny-base", "-o", manifest)["adapters"] == COUNT
    assert hub.count("list") == COUNT / 100
    assert hub.count() == hub.count("list") + hub.count("other")

    size = Path(folders[0], WEIGHTS).stat().st_size
    budget = ["-k", 8, "--disk-budget", 400 * size]
    hub.requests.clear()
    plan = shell.run("plan", manifest, *budget)
    assert plan["batches"] == 5
    planned = {a["source_id"].split("@")[0]: a["fetches"] for a in plan["adapters"]}
    assert Counter(planned.values()) == {2: 800, 1: 200}
    resolved = [r for r in hub.requests if r.kind == "resolve"]
    assert Counter(r.repo for r in resolved) == Counter(planned.keys())  # one each, and
    assert all(r.range for r in resolved)
    assert len(resolved) == len([r for r in hub.requests if r.kind != "other"])  # none of the API

    hub.requests.clear()
    kills, workspace = 0, tmp_path / "out.workspace"
    for served in (700, 1500, 2600, 3700, 4600):  # requests, all told, after which it is killed
        job = shell.start("compress", manifest, "-o", out, *budget)
        while hub.count("resolve") < served and job.poll() is None:
            time.sleep(0.02)
        if job.poll() is None:
            job.send_signal(signal.SIGKILL)
            kills += 1
        job.communicate()
    result = shell.run("compress", manifest, "-o", out, *budget)
    assert result["num_adapters"] == COUNT
    assert not [r for r in hub.requests if r.kind in ("info", "tree", "list")]
    fetched = downloads(hub.requests)
    more = {repo: n - planned[repo] for repo, n in fetched.items() if n > planned[repo]}
    assert sum(more.values()) <= IN_FLIGHT * kills  # but for what was in flight when it was killed
    per_adapter = Counter(r.repo for r in hub.requests if r.kind == "resolve")
    slack = Counter({repo: 4 * n for repo, n in more.items()})
    over = {r: n for r, n in per_adapter.items() if n > 1 + 4 * planned[str(r)] + slack[str(r)]}
    assert len(over) <= IN_FLIGHT * kills
    assert sum(fetched.values()) >= COUNT
    whole = shell.run("compress", manifest, "-o", tmp_path / "whole", *budget)
    assert whole["errors"] == result["errors"]
    assert tree_digest(out) == tree_digest(tmp_path / "whole")  # as if it had never been killed
    assert not list((workspace / "hub").rglob(WEIGHTS))
    assert not list((tmp_path / "home").rglob(WEIGHTS))

    job = shell.start("push", out, "alice/share")
    while hub.count("lfs-put") < 400 and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert "share_config.json" not in hub.files("alice/share")
    uploaded = hub.count("lfs-put")
    pushed = shell.run("push", out, "alice/share")
    assert (
        pushed["uploaded"] + pushed["present"] == 3 * COUNT + 4
    )  # three of each, bases, spectrum, configuration, card
    assert hub.count("lfs-put") <= 2 * COUNT + 2 + IN_FLIGHT
    assert uploaded >= 400
    card = hub.files("alice/share")["README.md"].decode()
    assert "org/a00" in card
    assert "mit" in card

    patched(monkeypatch, hub, tmp_path / "other-home", ALICE)
    hub.requests.clear()
    share = SHAREModel.from_pretrained("alice/share")
    assert len(share.adapter_names) == COUNT
    assert hub.count("resolve", method="GET") == 2  # configuration and bases
    name = share.adapter_names[123]
    tensors = share.reconstruct(name)
    assert hub.count("resolve", method="GET") <= 5
    local = SHAREModel.from_pretrained(out).reconstruct(name)
    assert all((tensors[key] == local[key]).all() for key in local)
    original = load_tensors(Path(folders[0]).parent / name.removeprefix("org--"))
    assert tensors.keys() == original.keys()
    record_property("told", f"{kills} kills, {time.monotonic() - begun:.0f} s")
