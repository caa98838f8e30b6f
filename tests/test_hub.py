"""Adapters of the Hub: the real client against a Hub on loopback."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lorashare_stream.adapters.hubid import HubId, parse_hub_id
from lorashare_stream.adapters.safetensors import TensorRecord
from lorashare_stream.adapters.source import Listing
from lorashare_stream.cli.app import main
from lorashare_stream.errors import (
    AdapterError,
    BudgetError,
    CollectionError,
    DiskError,
    MissingFileError,
    StreamError,
    UnreachableError,
    UsageError,
    WorkspaceError,
)
from lorashare_stream.files import sealed, unsealed
from lorashare_stream.hub import client as hub_module
from lorashare_stream.hub import retry as patience
from lorashare_stream.hub.client import Hub
from lorashare_stream.hub.discover import models
from lorashare_stream.hub.ledger import Known, Ledger, digest_of_records
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings

from .conftest import CONFIG, factor_keys, load_tensors, make_collection, tree_digest, write_adapter
from .fakehub import ALICE, FakeHub, patched
from .tiers import slow, some_fast

WEIGHTS = "adapter_model.safetensors"


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "_said", [])
    with FakeHub() as fake:
        patched(monkeypatch, fake, tmp_path / "home", ALICE)
        yield fake


@pytest.fixture
def pins(hub: FakeHub, collection: list[str]) -> list[str]:
    """Pinned ids of eight adapters."""
    return [
        f"org/{Path(f).name}@{hub.add(f'org/{Path(f).name}', files_of(f), base_model='tiny-base')}" for f in collection
    ]


def plan(sources: Any, out: Path | None = None, **settings: Any) -> Any:
    chosen = Settings.from_mapping({"device": "cpu", "num_components": 4} | settings)
    return plan_for(resolve(sources, missing_ok=True), chosen, None if out is None else default_workspace(out))


def go(sources: Any, out: Path, **settings: Any) -> Any:
    return compress(plan(sources, out, **settings), out)


def content(out: Path) -> dict[str, str]:
    """What a checkpoint has but for where its adapters came from."""
    return {k: v for k, v in tree_digest(out).items() if k.endswith(".safetensors")}


# -- ids and sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("hf://org/name", HubId("org/name")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("org/name//sub", HubId("org/name", "", "sub")),
        ("org/na.me-1@v1.0//a b/c/", HubId("org/na.me-1", "v1.0", "a b/c")),
        *[(text, None) for text in (
            "name", "", "/org/name", "../name", "a/b/c", "org/na--me", "org/na..me", "org/-name", "org/name@",
            "org/name@a@b",
            "org/name@../x", "org/name//../x", "org/name//a//b", "org/name//a/./b", "org/na me", "org/name@x\ny",
            "org/name//a\x1bb", "org/" + "x" * 96, "C:/x/y", "./org/name", "org/name//a\\b", "~/x",
        )],
    ],
)  # fmt: skip
def test_what_is_a_hub_id(text: str, expected: HubId | None) -> None:
    found = parse_hub_id(text)
    assert found == expected
    if found is not None:
        assert parse_hub_id(str(found)) == found


def test_names_are_one_component_and_tell_the_repository() -> None:
    assert HubId("org/name", "x" * 40).name == "org--name"
    assert HubId("org/name", "", "a/b").name == "org--name--a--b"


def test_sources_of_the_hub_and_local_ones_are_mixed_freely(
    tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/many", {f"deep/er/{k}": v for k, v in files_of(collection[0]).items()})
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "org" / "here", load_tensors(collection[1]), lora_alpha=8)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.txt").write_text("../adapters/a05\norg/a06\n")
    repo, sha = pins[7].split("@")
    (tmp_path / "lists" / "m.jsonl").write_text(
        json.dumps({"repo": repo, "revision": sha, "name": "mine"}) + "\n" + json.dumps({"path": "org/a04"}) + "\n"
    )
    (tmp_path / "lists" / "m.yaml").write_text(f"- {pins[3]}\n- name: sub\n  repo: org/many\n  subfolder: deep/er\n")
    sources = [collection[0], pins[1], "org/a02@main", "org/here", "lists/m.txt", "lists/m.jsonl", "lists/m.yaml"]
    made = plan([*sources, "org/a02", "hf://org/a06"])
    named = {e.name: e.source_id for e in made.adapters}
    at = dict(pin.split("@") for pin in pins)
    assert named == {
        "a00": os.path.realpath(collection[0]),
        "org--a01": pins[1],
        "org--a02": pins[2],
        "here": str(tmp_path / "org" / "here"),  # a folder that is there is never an id
        "a05": os.path.realpath(collection[5]),
        "org--a06": pins[6],
        "mine": f"org/a07@{at['org/a07']}",
        "org--a04": pins[4],
        "org--a03": pins[3],
        "sub": f"org/many@{hub.repos['org/many'].refs['main']}//deep/er",
    }
    assert not made.refused


def test_from_adapters_takes_ids_and_names_for_them(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    share = SHAREModel.from_adapters(
        {"one": pins[0], "two": "org/a01"}, num_components=4, device="cpu", output_dir=tmp_path / "out"
    )
    assert share.adapter_names == ["one", "two"]
    assert share.adapter_sources["two"] == pins[1]
    assert share.certified("two")["hub"] == {
        "repo": "org/a01", "revision": pins[1][8:], "subfolder": "", "gated": False, "private": False, "license": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"repo": "no id", "revision": "main"}, "not an adapter of the Hub"),
        ({"repo": "org/a", "subfolder": "../x"}, "not an adapter of the Hub"),
        ({"repo": "org/a", "colour": 1}, "unknown field.*colour"),
        ({"repo": "org/a", "revision": 3}, "not an adapter of the Hub .found 3; expected a valid string"),
        ({"repo": ["org/a"]}, "not an adapter of the Hub"),
    ],
)
def test_manifest_entries_that_cannot_be_meant(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps(line))
    with pytest.raises(UsageError, match=f"entry 1: {message}"):
        resolve([tmp_path / "m.jsonl"])


# -- requests -------------------------------------------------------------------------------------------


def test_a_pinned_manifest_takes_one_ranged_request_to_plan_and_four_to_fetch(
    tmp_path: Path, hub: FakeHub, pins: list[str], collection: list[str]
) -> None:
    plan_for(resolve(pins), Settings(), runs=False)
    assert [(r.kind, r.range is not None) for r in hub.requests] == [("resolve", True)] * 8
    hub.requests.clear()
    out = tmp_path / "out"
    go(pins, out)
    for i in range(8):
        assert hub.count(repo=f"org/a{i:02}") == 5
        assert hub.count(repo=f"org/a{i:02}", method="GET", file=WEIGHTS) == 2  # the header, and all of it
    assert hub.count("resolve") == len(hub.requests)
    hub.requests.clear()
    assert go(pins, out).method == "current"
    assert go(pins, out, num_components=3).method == "recompute"
    assert not hub.requests  # all is in the cache, and what was read in the workspace
    local = tmp_path / "local"
    go({f"org--{Path(f).name}": f for f in collection}, local, num_components=3)
    assert content(out) == content(local)


def test_revisions_are_pinned_once(tmp_path: Path, hub: FakeHub, pins: list[str], collection: list[str]) -> None:
    out, names = tmp_path / "out", [pin.split("@")[0] for pin in pins]
    go(names[:7], out)
    assert hub.count("info") == 7
    for name in names:
        hub.update(name, {WEIGHTS: files_of(collection[0])[WEIGHTS], "other": b"x"})
    hub.requests.clear()
    assert go(names[:7], out).method == "current"
    assert not hub.requests
    go(names, out)  # the eighth is looked up; the others stay what they were
    assert hub.count("info") == 1
    share = SHAREModel.from_pretrained(out)
    expected = [*pins[:7], f"org/a07@{hub.repos['org/a07'].refs['main']}"]
    assert [share.certified(n)["source_id"] for n in share.adapter_names] == expected
    go([*names[:7], f"org/a07@{hub.repos['org/a07'].refs['main']}"], out)
    assert main(["verify", str(out), "--sources", *names, "--json"]) == 0  # as they were pinned, not as they are now


def test_long_headers_and_servers_without_ranges(
    tmp_path: Path, hub: FakeHub, pins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "FIRST_BYTES", 100)
    first = plan(pins)
    assert hub.count(file=WEIGHTS, method="GET") == 16
    hub.fault(kind="resolve", file=WEIGHTS, ignore_range=True, times=None)
    again = plan(pins)
    assert [e.layout for e in again.adapters] == [e.layout for e in first.adapters]
    assert [e.files for e in again.adapters] == [e.files for e in first.adapters]


def test_pickle_and_shards_and_subfolders(tmp_path: Path, hub: FakeHub, collection: list[str]) -> None:
    tensors = [load_tensors(f) for f in collection[:3]]
    config = files_of(collection[0])["adapter_config.json"]
    torch.save({k: torch.from_numpy(v) for k, v in tensors[0].items()}, tmp_path / "x.bin")
    hub.add("org/pickle", {"adapter_config.json": config, "adapter_model.bin": (tmp_path / "x.bin").read_bytes()})
    keys = sorted(tensors[1])
    shards, where = {}, {}
    for n, part in enumerate((keys[:3], keys[3:]), 1):
        name = f"adapter_model-0000{n}-of-00002.safetensors"
        save_file({k: tensors[1][k] for k in part}, tmp_path / name)
        shards[name] = (tmp_path / name).read_bytes()
        where |= dict.fromkeys(part, name)
    index = json.dumps({"weight_map": where}).encode()
    hub.add("org/shards", {"adapter_config.json": config, "adapter_model.safetensors.index.json": index, **shards})
    hub.add("org/sub", {f"one/{k}": v for k, v in files_of(collection[2]).items()} | {"one/notes.txt": b"x"})
    local = tmp_path / "local"
    go(dict(zip("xyz", collection, strict=False)), local)
    for number, settings in enumerate(({}, {"disk_budget": 1 << 20})):
        out = tmp_path / str(number)
        go({"x": "org/pickle", "y": "org/shards", "z": "org/sub//one"}, out, **settings)
        assert content(out)["shared_components.safetensors"] == content(local)["shared_components.safetensors"]


# -- what is permanent ----------------------------------------------------------------------------------


def spoiled(hub: FakeHub, collection: list[str]) -> dict[str, str]:
    """Ids of adapters that cannot be had or compressed, and what is said of each."""
    good = files_of(collection[0])
    config = json.loads(good["adapter_config.json"])
    hub.add("org/gated", good, gated="manual")
    hub.add("org/private", good, private=True)
    hub.add("org/ia3", {**good, "adapter_config.json": json.dumps({**config, "peft_type": "IA3"}).encode()})
    hub.add("org/empty", {"README.md": b"x"})
    hub.add("org/bare", {"adapter_config.json": good["adapter_config.json"]})
    hub.add("org/alone", {WEIGHTS: good[WEIGHTS]})
    hub.add("org/cut", {**good, WEIGHTS: good[WEIGHTS][:-10]})
    hub.add(
        "org/other", {**good, "adapter_config.json": json.dumps({**config, "base_model_name_or_path": "b"}).encode()}
    )
    hub.add("org/text", {**good, WEIGHTS: b"not found"})
    hub.add("org/broken", {**good, "adapter_config.json": b"{"})
    return {
        "org/gated": "gated", "org/private": "no such repository", "org/nothing": "no such repository",
        "org/ia3": "peft_type is 'IA3'", "org/empty": "no adapter_config.json", "org/bare": "no weights",
        "org/alone": "no adapter_config.json", "org/cut": "cut short", "org/other": "another base model",
        "org/text": "text, and no weights", "org/broken": "not valid JSON", "org/a00@nowhere": "no such revision",
        "org/a00//nowhere": "no adapter_config.json", f"org/a00@{'0' * 40}": "no such revision",
    }  # fmt: skip


def test_what_cannot_be_had_is_refused_alone_at_once_with_reason(
    tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str]
) -> None:
    bad = spoiled(hub, collection)
    with pytest.raises(CollectionError) as e:
        go([*pins, *bad], tmp_path / "out")
    for source, reason in bad.items():
        name = parse_hub_id(source).name
        assert any(name in str(p) and reason in str(p) for p in e.value.problems), (source, e.value.problems)
    assert len(e.value.problems) == len(bad)
    assert hub.count(repo="org/gated", method="GET") <= 2  # info, and one try; never again
    outcome = go([*pins, *bad], tmp_path / "out", on_error="skip")
    assert len(outcome.skipped) == len(bad)
    assert SHAREModel.from_pretrained(tmp_path / "out").config.num_adapters == 8
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {item["source"].split("@")[0].split("//")[0] for item in skipped} == {
        k.split("@")[0].split("//")[0] for k in bad
    }
    hub.users[ALICE] |= {"org/gated", "org/private"}  # access was given: the same command takes them
    outcome = go([*pins, *bad], tmp_path / "out", on_error="skip")
    assert len(outcome.skipped) == len(bad) - 2
    share = SHAREModel.from_pretrained(tmp_path / "out")
    assert share.certified("org--gated")["hub"]["gated"]
    assert share.certified("org--private")["hub"]["private"]


def test_values_are_looked_at_before_they_touch_a_moment(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    tensors = load_tensors(tmp_path / "adapters" / "a00")
    tensors[factor_keys("layers.0.q")[0]][0, 0] = np.nan
    hub.add("org/nan", files_of(write_adapter(tmp_path / "nan", tensors, lora_alpha=8)))
    with pytest.raises(CollectionError, match=r"org--nan.*not finite"):
        go([*pins, "org/nan"], tmp_path / "out")
    assert len(go([*pins, "org/nan"], tmp_path / "out", on_error="skip").skipped) == 1
    hub.update("org/nan", {WEIGHTS: files_of(tmp_path / "adapters" / "a00")[WEIGHTS]})
    assert not go([*pins, "org/nan"], tmp_path / "out").skipped  # it was not pinned by being refused


def test_a_file_that_is_not_the_one_that_was_planned(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    made = plan(pins, tmp_path / "out")
    sha = pins[0].split("@")[1]
    hub.repos["org/a00"].commits[sha][WEIGHTS] = files_of(tmp_path / "adapters" / "a01")[WEIGHTS] + b"0"
    with pytest.raises(CollectionError, match=r"org--a00.*not what was planned"):
        compress(made, tmp_path / "out")


def test_a_token_that_is_not_accepted_is_no_matter_of_an_adapter(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/x", {"a": b""})
    hub.fault(kind="info", status=401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(StreamError, match="does not accept the token") as e:
        Hub().info(HubId("org/x"))
    assert not isinstance(e.value, AdapterError)


# -- what may pass --------------------------------------------------------------------------------------

SOON = {"RateLimit": '"resolvers";r=0;t=0'}
AFTER = (datetime.now(UTC) + timedelta(seconds=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "info", "status": 429, "headers": SOON},
        {"kind": "info", "status": 429, "headers": {"Retry-After": "0"}},
        {"kind": "info", "status": 503, "headers": {"Retry-After": AFTER}},
        {"kind": "info", "status": 500, "times": 3},
        {"kind": "info", "drop": True, "times": 3},
        {"kind": "resolve", "method": "GET", "status": 429, "headers": SOON, "times": 3},
        {"kind": "resolve", "method": "GET", "status": 503, "times": 4},
        {"kind": "resolve", "method": "HEAD", "status": 503, "times": 1},
        {"kind": "resolve", "method": "HEAD", "drop": True, "times": 2},
        {"kind": "resolve", "method": "GET", "drop": True, "times": 3},
        {"kind": "resolve", "method": "GET", "file": WEIGHTS, "cut_after": 700, "times": 3},
        {"kind": "resolve", "method": "GET", "file": WEIGHTS, "cut_after": 700, "reset": False, "times": 1},
        {"kind": "resolve", "delay": 0.3, "times": 8},
    ],
    ids=lambda f: " ".join(f"{k}={v}" for k, v in f.items() if k != "headers"),
)  # fmt: skip
def test_what_may_pass_is_waited_out(
    tmp_path: Path, hub: FakeHub, pins: list[str], collection: list[str], fault: dict[str, Any]
) -> None:
    hub.fault(**fault)
    go([pin.split("@")[0] for pin in pins[:3]], tmp_path / "out")
    go({f"org--a{i:02}": collection[i] for i in range(3)}, tmp_path / "local")
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_what_was_given_up_is_not_waited_for_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    stopped = threading.Event()

    def gone() -> None:
        asked.append(1)
        raise ConnectionError("gone")

    with pytest.raises(UnreachableError, match="cannot be reached"):
        patience.retry(
            lambda: patience.retry(gone, "inner", stopped, patience.of_adapter, 0.05),
            "outer", stopped, patience.of_adapter, 1.0,
        )  # fmt: skip
    assert len(asked) <= 3  # within 0.05 s, by pauses from 0.02 s on


def test_an_outage_is_survived_and_said_once(
    tmp_path: Path, hub: FakeHub, pins: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    made = plan(pins, tmp_path / "out")
    with hub.outage():
        ends = threading.Timer(1.0, lambda: setattr(hub, "_down", False))
        ends.start()
        compress(made, tmp_path / "out")
        ends.join()
    assert sum("waiting" in r.getMessage() for r in caplog.records if r.name == "lorashare_stream.hub.retry") == 1


def test_an_outage_without_end_stops_the_run_and_keeps_what_is_done(
    tmp_path: Path, hub: FakeHub, pins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    out = tmp_path / "out"
    made = plan(pins, out)
    hub.fault(kind="resolve", repo="org/a0[4-7]", delay=1.0, times=None)

    def cut(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            yield result
            hub._down = True

    with pytest.raises(UnreachableError, match="cannot be reached") as e:
        compress(made, out, progress=cut)
    assert e.value.exit_code == 75
    hub.clear_faults()
    hub._down = False
    hub.requests.clear()
    go(pins, out)
    assert 1 <= hub.count(method="GET", file=WEIGHTS) < 8  # headers were kept, and what was fetched
    assert main(["compress", "org/unheard", "-o", str(tmp_path / "x")]) == 1


@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"cut_after": 100}, slow({"drop": True})]
)  # the client tries again for half a minute where a connection is dropped
def test_what_fails_for_one_adapter_only_is_given_up_for_it(
    tmp_path: Path, hub: FakeHub, pins: list[str], monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 2.0)
    monkeypatch.setattr(patience, "ANSWER", 0.0)  # given up after pauses of 2 s in all, whatever the client does
    made = plan(pins, tmp_path / "out", on_error="skip")
    hub.fault(kind="resolve", method="GET", repo="org/a05", times=None, **fault)
    for i, delay in enumerate((0.8, 0.9, 1.0, 1.1)):  # others are heard meanwhile
        hub.fault(kind="resolve", method="HEAD", repo=f"org/a0{i}", file=WEIGHTS, delay=delay)
    outcome = compress(made, tmp_path / "out")
    assert [e.adapter for e in outcome.skipped] == ["org--a05"]
    assert "not for others" in outcome.skipped[0].problem


def test_the_command_says_75_when_the_hub_is_gone(
    tmp_path: Path, hub: FakeHub, pins: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    with hub.outage():
        assert main(["compress", *pins, "-o", str(tmp_path / "out")]) == 75
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the disk budget ------------------------------------------------------------------------------------


class Gauge:
    """The most bytes of adapters that lay in a folder at a time, as the Hub served them."""

    def __init__(self, hub: FakeHub, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            try:
                sizes = [p.stat().st_size for p in self.folder.rglob("adapter_model*") if ".cache" not in p.parts]
            except FileNotFoundError:  # one was evicted meanwhile
                continue
            self.most = max(self.most, sum(sizes))

    def end(self) -> int:
        self.stop.set()
        self.thread.join()
        return self.most


@pytest.mark.slow
def test_a_disk_budget_is_kept_and_the_plan_says_how_often_each_is_fetched(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = make_collection(tmp_path / "many", 30)
    pins = [f"org/x{i}@{hub.add(f'org/x{i}', files_of(f), base_model='tiny-base')}" for i, f in enumerate(folders)]
    size = Path(folders[0], WEIGHTS).stat().st_size
    out, whole = tmp_path / "out", tmp_path / "whole"
    made = plan(pins, out, disk_budget=8 * size)
    assert [len(b) for b in made.batches] == [4] * 7 + [2]
    hub.requests.clear()
    gauge = Gauge(hub, default_workspace(out) / "hub")
    compress(made, out)
    assert size < gauge.end() <= 8 * size
    fetched = {e.source_id: hub.count(repo=e.origin.hub.repo, method="GET", file=WEIGHTS) for e in made.adapters}
    for entry in made.adapters:
        assert 1 <= fetched[entry.source_id] <= made.fetches(entry) <= 2
        assert hub.count(repo=entry.origin.hub.repo) <= 4 * made.fetches(entry)
    assert sum(fetched.values()) < 60  # those of the last batch are not fetched again
    assert not list((default_workspace(out) / "hub").rglob(WEIGHTS))
    assert not list((tmp_path / "home").rglob(WEIGHTS))  # nor into the user's cache
    go(pins, whole)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(whole)
    assert a.adapter_names == b.adapter_names
    for group, facts in a.config.ours["groups"].items():
        assert facts["n"] == b.config.ours["groups"][group]["n"] == 120
        assert facts["energy"] == pytest.approx(b.config.ours["groups"][group]["energy"], rel=1e-5)
        va, vb = a.components[group].double(), b.components[group].double()
        assert torch.linalg.matrix_norm(va - vb @ (vb.T @ va), 2) < 1e-3
    hub.requests.clear()
    assert go(pins, out, disk_budget=8 * size).method == "current"
    assert not hub.requests


def asked_again(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """Fetches that failed for nothing: all threads have one session, which one that finds no server closes."""
    ours, clients = r"the connection failed .*\((org/x\d+)@", r"Error while downloading from \S+?/(org/x\d+)/"
    return Counter(re.findall(ours, caplog.text) + re.findall(clients, caplog.text))


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "limit",
    [
        {"max_error": 0.2},
        {"ratio": 4},
        slow({"max_error": 0.2, "directions": True}),
        slow({"ratio": 4, "directions": True}),
    ],
)
def test_a_coded_checkpoint_keeps_a_disk_budget_too(
    tmp_path: Path,
    hub: FakeHub,
    limit: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(patience, "SAY_EVERY", 0.0)  # every failure, for `asked_again`
    folders = make_collection(tmp_path / "many", 14)
    pins = [
        f"org/x{i:02}@{hub.add(f'org/x{i:02}', files_of(f), base_model='tiny-base')}" for i, f in enumerate(folders)
    ]
    size = Path(folders[0], WEIGHTS).stat().st_size

    def planned(out: Path, **settings: Any) -> Any:
        return plan_for(
            resolve(pins), Settings.from_mapping({"device": "cpu", **limit, **settings}), default_workspace(out)
        )

    out, whole = tmp_path / "out", tmp_path / "whole"
    made = planned(out, disk_budget=8 * size)
    assert len(made.batches) > 2
    hub.requests.clear()
    gauge = Gauge(hub, default_workspace(out) / "hub")
    compress(made, out)
    assert size < gauge.end() <= 8 * size
    fetched = Counter(r.repo for r in hub.requests if r.file == WEIGHTS and r.method == "GET" and r.whole)
    again = asked_again(caplog)
    for entry in made.adapters:
        assert 1 <= fetched[entry.origin.hub.repo] <= made.fetches(entry) + again[entry.origin.hub.repo]
    assert not list((default_workspace(out) / "hub").rglob(WEIGHTS))
    compress(planned(whole), whole)
    assert content(out) == content(whole)
    share = SHAREModel.from_pretrained(out)
    assert share.certified(share.adapter_names[0])["hub"]["repo"] == "org/x00"
    hub.requests.clear()
    assert compress(planned(out, disk_budget=8 * size), out).method == "current"
    assert not hub.requests


def test_what_the_users_cache_has_is_used_and_never_removed(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    go(pins[:4], tmp_path / "first")
    before = tree_digest(tmp_path / "home")
    hub.requests.clear()
    go(pins, tmp_path / "out", disk_budget=10_000)
    assert hub.count(repo="org/a0[0-3]") == 0
    assert tree_digest(tmp_path / "home") == before


def test_a_budget_that_cannot_do_is_said_with_the_one_that_can(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    with pytest.raises(BudgetError, match=r'two of the largest adapter.*disk_budget="1MiB"'):
        go(pins, tmp_path / "out", disk_budget=5000)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("step", "after", "nan"),
    [
        case
        for i, step in enumerate(["ingest", "accumulate", "fit", "project"])
        for case in some_fast([(step, after, nan) for after in (0, 3, 5) for nan in (False, True)], 4, i)
    ],
)
def test_stopped_in_any_batch_it_gives_the_same_bytes_and_fetches_no_more_than_planned(
    tmp_path: Path, hub: FakeHub, step: str, after: int, nan: bool, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(patience, "SAY_EVERY", 0.0)  # every failure, for `asked_again`
    folders = make_collection(tmp_path / "many", 12)
    if nan:
        tensors = load_tensors(folders[4])
        tensors[factor_keys("layers.0.q")[0]][0, 0] = np.nan
        write_adapter(Path(folders[4]), tensors, lora_alpha=8)
    pins = [
        f"org/x{i:02}@{hub.add(f'org/x{i:02}', files_of(f), base_model='tiny-base')}" for i, f in enumerate(folders)
    ]
    size = Path(folders[0], WEIGHTS).stat().st_size
    settings = {"disk_budget": 6 * size + 10, "on_error": "skip", "workers": 1}
    whole, out = tmp_path / "whole" / "out", tmp_path / "cut" / "out"
    go(pins, whole, **settings)
    hub.requests.clear()
    made = plan(pins, out, **settings)
    assert len(made.batches) == 4
    seen = 0

    def stop(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        nonlocal seen
        for result in results:
            if name == step:
                seen += 1
                if seen > after:
                    raise KeyboardInterrupt
            yield result

    if step == "fit" and after > 2:
        after = 2
    with pytest.raises(KeyboardInterrupt):
        compress(made, out, progress=stop)
    go(pins, out, **settings)
    assert tree_digest(out) == tree_digest(whole)
    served = [r for r in hub.requests if r.file == WEIGHTS and r.status == 200 and r.method == "GET" and r.whole]
    fetched = Counter(r.repo for r in served)
    planned = {e.origin.hub.repo: made.fetches(e) for e in made.adapters}
    again = asked_again(caplog)
    assert {repo: n for repo, n in fetched.items() if n > planned[repo] + again[repo]} == {}


def test_growing_shrinking_and_refitting_fetch_again(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    size = 3676
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    budget = ["--disk-budget", str(4 * size)]
    go(pins[:6], out, disk_budget=4 * size)
    assert main(["add", str(out), "org/a06", pins[7], *budget]) == 0
    assert main(["remove", str(out), "org--a02", "--refit", *budget]) == 0
    rest = [pin for pin in pins if not pin.startswith("org/a02@")]
    go(rest, fresh)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(fresh)
    assert a.adapter_names == b.adapter_names
    assert not a.config.ours["removed"]
    for group in b.components:
        va, vb = a.components[group].double(), b.components[group].double()
        assert torch.linalg.matrix_norm(va - vb @ (vb.T @ va), 2) < 1e-3
    assert main(["refit", str(out), "-k", "6", "-o", str(tmp_path / "six"), *budget]) == 0
    assert main(["verify", str(tmp_path / "six"), "--sources", *rest]) == 0
    assert main(["verify", str(out)]) == 0
    hub.requests.clear()
    assert main(["add", str(out), "org/a07", *budget]) == 0  # it is there: as it was pinned
    assert not hub.requests
    assert not list((default_workspace(out) / "hub").rglob(WEIGHTS))


def test_adding_without_a_workspace(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"
    go(pins[:7], out)
    default_workspace(out).rename(tmp_path / "away")
    assert main(["add", str(out), "org/a07", "org/a00", "--variance", "0.1"]) == 0
    share = SHAREModel.from_pretrained(out)
    assert share.certified(share.adapter_names[-1])["source_id"] == pins[7]
    assert share.config.num_adapters == 8


def test_an_adapter_that_is_gone_when_it_is_needed_again(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"
    go(pins, out, disk_budget=4 * 3676)
    del hub.repos["org/a03"]
    with pytest.raises(CollectionError, match=r"were admitted before.*\n.*org--a03.*no such repository") as e:
        go(pins, out, disk_budget=4 * 3676, num_components=6)
    assert "lorashare-stream remove" in str(e.value)
    assert main(["remove", str(out), "org--a03", "--disk-budget", "14704"]) == 0
    go([p for p in pins if not p.startswith("org/a03@")], out, disk_budget=4 * 3676, num_components=6)
    assert SHAREModel.from_pretrained(out).config.num_adapters == 7


@pytest.mark.few(2)
@pytest.mark.parametrize("budget", [None, 4 * 3676])
def test_moments_that_were_discarded_or_damaged_are_summed_again(
    tmp_path: Path, hub: FakeHub, pins: list[str], budget: int | None
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    go(pins[:7], out, disk_budget=budget, discard_moments=True)
    assert [p.name for p in (default_workspace(out) / "moments").iterdir()] == ["zarr.json"]
    go(pins, out, disk_budget=budget, num_components=5)
    go(pins, fresh, num_components=5)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(fresh)
    for group in b.components:
        va, vb = a.components[group].double(), b.components[group].double()
        assert torch.linalg.matrix_norm(va - vb @ (vb.T @ va), 2) < 1e-3
    for chunk in (default_workspace(out) / "moments").glob("layers.0.q*/*/*/*/c/0/0"):
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"x")
    assert main(["remove", str(out), "org--a01"]) == 0
    go([p for p in pins if not p.startswith("org/a01@")], out, disk_budget=budget, num_components=6)
    go([p for p in pins if not p.startswith("org/a01@")], fresh.parent / "fresh2", num_components=6)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(fresh.parent / "fresh2")
    for group in (g for g in b.components if g.startswith("layers.0.q")):  # summed anew without what was removed
        va, vb = a.components[group].double(), b.components[group].double()
        assert torch.linalg.matrix_norm(va - vb @ (vb.T @ va), 2) < 1e-3


# -- offline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_offline_works_from_the_cache_and_names_what_is_missing(
    tmp_path: Path, hub: FakeHub, pins: list[str], way: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    go([pin.split("@")[0] for pin in pins[:6]], tmp_path / "first")
    flags = ["--offline"] if way == "flag" else []
    if way == "environment":
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    out = str(tmp_path / "out")
    assert main(["compress", *pins, "-o", out, *flags]) == 1
    err = capsys.readouterr().err
    assert "org--a06" in err
    assert "org--a07" in err
    assert "org--a05" not in err
    assert "offline" in err
    assert main(["compress", *pins[:6], "-o", out, *flags]) == 0
    assert main(["verify", out, *flags]) == 0
    assert main(["discover", "--base-model", "tiny-base", "-o", str(tmp_path / "m.jsonl"), *flags]) == 1
    assert not hub.requests


def test_offline_a_branch_is_what_the_cache_says(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    from huggingface_hub import hf_hub_download

    for name in (WEIGHTS, "adapter_config.json"):
        for repo in ("org/a00", "org/a01"):
            hf_hub_download(repo, name)
    hub.update("org/a00", {"x": b""})
    made = plan(["org/a00", "org/a01", "org/a02"], offline=True)
    assert [e.source_id for e in made.adapters] == pins[:2]
    assert [type(e) for e in made.refused] == [MissingFileError]


# -- secrets --------------------------------------------------------------------------------------------


def test_no_token_is_ever_written_or_said(
    tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str], capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    hub.add("org/gated", files_of(collection[0]), gated="auto", base_model="tiny-base")
    hub.add("org/closed", files_of(collection[0]), gated="auto", base_model="tiny-base")
    hub.users[ALICE].add("org/gated")
    places = tmp_path / "run"
    places.mkdir()
    manifest, out = str(places / "m.jsonl"), str(places / "out")
    assert main(["discover", "--base-model", "tiny-base", "-o", manifest]) == 0
    assert main(["plan", manifest, "-v", "-o", str(places / "plan.json"), "--on-error", "skip"]) == 3
    hub.fault(kind="resolve", method="GET", status=503, times=2)
    budget = ["--disk-budget", "20KiB"]
    assert main(["compress", manifest, "-v", "-o", out, "--on-error", "skip", *budget]) == 3
    assert main(["add", out, "org/closed", "-v"]) == 1
    assert main(["verify", out]) == 0
    assert any(r.token == ALICE for r in hub.requests)
    said = "".join(capsys.readouterr()) + caplog.text
    assert "gated" in said
    for secret in (ALICE, "Bearer"):
        assert secret not in said
        for path in (*places.rglob("*"), *(tmp_path / "home").rglob("*")):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


# -- discover -------------------------------------------------------------------------------------------


def manifest_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_discover_lists_by_page_and_leaves_out_what_cannot_be_lora(
    tmp_path: Path, hub: FakeHub, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    good = files_of(collection[0])
    for i in range(25):
        hub.add(
            f"org/a{i:02}", good, base_model="tiny-base", downloads=i, license="mit", gated="auto" if i == 3 else False
        )
    hub.add("org/ia3", good, base_model="tiny-base", peft_type="IA3", downloads=99)
    hub.add("org/full", {"model.safetensors": b"x"}, base_model="tiny-base", downloads=98)
    hub.add("org/none", {"adapter_config.json": b"{}"}, base_model="tiny-base", downloads=97)
    several = {f"{sub}{k}": v for sub in ("one/", "two/", "two/checkpoint-10/") for k, v in good.items()}
    hub.add("org/several", several, base_model="tiny-base", downloads=96)
    hub.add("org/root", good | {f"checkpoint-5/{k}": v for k, v in good.items()}, base_model="tiny-base", downloads=95)
    hub.add("mirror/one", good, base_model="mirror/tiny-4bit", downloads=50)
    hub.add("other/x", good, base_model="another", downloads=100)
    hub.page_size = 10
    out = tmp_path / "m.jsonl"
    common = ["discover", "--base-model", "tiny-base", "-o", str(out)]
    assert main([*common, "--base-alias", "mirror/tiny-4bit"]) == 0
    assert hub.count("list") == len(hub.requests) == 3 + 1  # pages of ten
    items = manifest_of(out)
    assert [i["repo"] for i in items][:3] == ["org/several", "org/several", "org/root"]
    assert [i.get("subfolder") for i in items][:3] == ["one", "two", None]
    assert len(items) == 25 + 2 + 1 + 1
    assert {i["repo"] for i in items} >= {"mirror/one"}
    entry = next(i for i in items if i["repo"] == "org/a03")
    assert entry["gated"] is True
    assert entry["revision"] == hub.repos["org/a03"].refs["main"]
    assert entry["license"] == "mit"
    assert sorted(entry["files"]) == ["adapter_config.json", WEIGHTS]
    err = capsys.readouterr().err
    for reason in ("peft_type IA3", "no adapter_config.json", f"no {WEIGHTS}"):
        assert reason in err
    assert main([*common, "--limit", "3", "--author", "org"]) == 0
    assert [i["repo"] for i in manifest_of(out)] == ["org/several", "org/several", "org/root"]
    assert main([*common, "--min-downloads", "20", "--search", "a2"]) == 0
    assert {i["repo"] for i in manifest_of(out)} == {"org/a20", "org/a21", "org/a22", "org/a23", "org/a24"}
    before = out.read_bytes()
    assert main([*common, "--search", "zzz"]) == 1
    assert out.read_bytes() == before
    hub.fault(kind="list", status=429, headers=SOON, times=2)
    assert main([*common, "--json"]) == 0
    assert len(manifest_of(out)) == 25 + 2 + 1
    chosen = plan([out], on_error="skip", any_base=True, base_model="tiny-base")
    assert len(chosen.adapters) == 27  # one is gated
    assert hub.count("info") == 0


def test_weights_beside_an_adapter_are_named_as_far_as_a_listing_is_at_hand(
    tmp_path: Path, hub: FakeHub, collection: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    more = {"value_head.bin": b"x", "2_Dense/model.safetensors": b"x", "optimizer.pt": b"x", "sub/value_head.bin": b"x"}
    files = files_of(collection[0])
    for i in range(2):
        hub.add(f"org/a{i}", files | more | {f"sub/{k}": v for k, v in files.items()}, base_model="tiny-base")
    out = tmp_path / "m.jsonl"
    assert main(["discover", "--base-model", "tiny-base", "-o", str(out)]) == 0
    expected = ("2_Dense/model.safetensors", "value_head.bin")
    for sources in ([out], ["org/a0", "org/a1"]):
        hub.requests.clear()
        assert [e.beside for e in plan(sources).adapters] == [expected, expected]
        assert hub.count("info") == (0 if sources == [out] else 2)  # as without such files
    (only,) = plan([f"org/a0@{hub.repos['org/a0'].refs['main']}//sub"], max_error=0.3).adapters
    assert only.beside == ()  # not listed, and not asked for
    (only,) = plan(["org/a0//sub"], tmp_path / "out", max_error=0.3).adapters
    assert only.beside == ("value_head.bin",)
    for _ in range(2):  # the second time from what is kept in the workspace
        assert main(["compress", "org/a0", "org/a1", "-o", str(tmp_path / "out"), "-k", "2"]) == 0
        assert "beside 2 adapters (org--a0, org--a1) are not taken into the checkpoint" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("settings", [{"num_components": 4}, {"max_error": 0.3}, {"disk_budget": 1 << 20}])
def test_files_that_are_something_else_are_named_for_it(
    tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str], settings: dict[str, Any]
) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 25984\n"
    page, good = b"<!DOCTYPE html><html>" + b"x" * 400, files_of(collection[0])
    saved = io.BytesIO()
    torch.save({k: torch.from_numpy(v) for k, v in load_tensors(collection[0]).items()}, saved)
    mlx = {"adapters.safetensors": good[WEIGHTS], "adapter_config.json": b'{"fine_tune_type": "lora"}'}
    config = {"adapter_config.json": good["adapter_config.json"]}
    reasons = {
        "org/lfs": ({**good, WEIGHTS: pointer}, f"{WEIGHTS}: a Git-LFS pointer"),
        "org/page": ({**good, WEIGHTS: page}, f"{WEIGHTS}: a web page"),
        "org/empty": ({**good, WEIGHTS: b""}, f"{WEIGHTS}: an empty file"),
        "org/pickle": ({**good, WEIGHTS: saved.getvalue()}, "a pickle of torch under another name"),
        "org/renamed": ({**config, "adapter_model.bin": good[WEIGHTS]}, "safetensors under another name"),
        "org/config": ({**good, "adapter_config.json": pointer}, "adapter_config.json: a Git-LFS pointer"),
        "org/index": ({**config, "adapter_model.safetensors.index.json": page}, "index.json: a web page"),
        "org/mlx": (mlx, "an adapter of mlx-lm, not of PEFT: adapters.safetensors"),
    }
    for repo, (files, _) in reasons.items():
        hub.add(repo, files, base_model="tiny-base")
    hub.add("org/bom", {**good, "adapter_config.json": b"\xef\xbb\xbf" + good["adapter_config.json"]})
    made = plan([*pins[:2], "org/bom", *reasons], **settings, on_error="skip")
    assert {e.name for e in made.adapters} == {"org--a00", "org--a01", "org--bom"}
    told = {str(e.source).partition("@")[0]: str(e) for e in made.refused}
    for repo, (_, reason) in reasons.items():
        assert reason in told[repo], told[repo]


def test_a_listing_is_foreign(tmp_path: Path, hub: FakeHub, collection: list[str]) -> None:
    good = files_of(collection[0])
    hub.add("org/fine", good, base_model="tiny-base")
    hub.add("org/--weird..", good, base_model="tiny-base")
    hub.add("org/sub", {f"a\x1b[2J/../b/{k}": v for k, v in good.items()}, base_model="tiny-base")
    hub.repos["org/sub"].license = "x\n\x1b[2J"
    out = tmp_path / "m.jsonl"
    assert main(["discover", "--base-model", "tiny-base", "-o", str(out)]) == 0
    for source in resolve([out]):
        assert source.hub is not None


def test_the_budget_of_a_plan_is_in_its_json(
    tmp_path: Path, hub: FakeHub, pins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "plan.json"
    assert main(["plan", *pins, "-k", "4", "-o", str(saved), "--disk-budget", str(4 * 3676)]) == 0
    made: Mapping[str, Any] = json.loads(saved.read_text())
    assert made["batches"] == 4
    assert [a["fetches"] for a in made["adapters"]] == [2] * 6 + [1] * 2
    assert [a["source_id"] for a in made["adapters"]] == pins
    code = main(["compress", "--plan", str(saved), "-o", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    assert hub.count("info") == 0


def test_configs_are_those_of_the_hub(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    go(pins, tmp_path / "out", disk_budget=4 * 3676)
    share = SHAREModel.from_pretrained(tmp_path / "out")
    assert share.adapter_configs["org--a03"] == json.loads(
        Path(tmp_path / "adapters/a03/adapter_config.json").read_text()
    )
    assert share.adapter_configs["org--a03"].keys() == CONFIG.keys()


def test_a_torn_or_damaged_ledger_is_asked_for_again(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"
    first = plan(pins, out)
    path = default_workspace(out) / "hub" / "facts.jsonl"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 1, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert plan(pins, out).fingerprint == first.fingerprint
    for _ in range(10):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        assert plan(pins, out).fingerprint == first.fingerprint
    path.write_bytes(b'{"id": 3}\nnull\n[]\n' + whole[: len(whole) // 2])
    assert plan(pins, out).fingerprint == first.fingerprint
    hub.requests.clear()
    assert plan(pins, out).fingerprint == first.fingerprint  # what was asked again was appended on a line of its own
    assert not hub.requests


@pytest.mark.parametrize("kind", ["serial", slow("dask")])
def test_other_executors_take_adapters_as_they_come(tmp_path: Path, hub: FakeHub, pins: list[str], kind: str) -> None:
    from distributed import Client, LocalCluster

    made = plan(pins, tmp_path / kind, disk_budget=4 * 3676)
    if kind == "serial":
        compress(made, tmp_path / kind, executor=SerialExecutor())
    else:
        with (
            LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster,
            Client(cluster) as client,
        ):
            compress(made, tmp_path / kind, executor=client)
    go(pins, tmp_path / "threads", disk_budget=4 * 3676)
    assert tree_digest(tmp_path / kind) == tree_digest(tmp_path / "threads")


def test_pins_outlive_other_commands(tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str]) -> None:
    out, sub = tmp_path / "out", {f"in/er/{k}": v for k, v in files_of(collection[0]).items()}
    sha = hub.add("org/deep", sub)
    given = ["org/deep@main//in/er", "org/a01@main", "org/a02", "org/a03"]
    go(given, out)
    for repo in ("org/deep", "org/a01", "org/a02"):
        hub.update(repo, {"x": b""})
    assert main(["remove", str(out), "org--a03"]) == 0
    assert main(["add", str(out), pins[4], "--variance", "0.01"]) == 0
    assert main(["refit", str(out), "-k", "3", "-o", str(tmp_path / "three")]) == 0
    hub.requests.clear()
    outcome = go([*given[:3], pins[4]], out)
    assert hub.count("info") == 0
    assert not outcome.skipped
    share = SHAREModel.from_pretrained(out)
    assert share.certified("org--deep--in--er")["source_id"] == f"org/deep@{sha}//in/er"
    assert main(["verify", str(out)]) == 0


def test_a_disk_without_room_for_what_is_fetched(
    tmp_path: Path, hub: FakeHub, pins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashare_stream.stages import run as stages

    made = plan(pins, tmp_path / "out")
    room = made.sizes["moments"] + made.sizes["basis"] + made.sizes["checkpoint"] + 4 * 3676
    monkeypatch.setattr(stages, "free_bytes", lambda folder: (1, room))
    with pytest.raises(DiskError, match=r"what is fetched.*by disk_budget"):
        compress(made, tmp_path / "out")
    assert hub.count(file=WEIGHTS, method="HEAD") == 0
    go(pins, tmp_path / "out", disk_budget=4 * 3676)


def test_the_next_batch_is_fetched_while_one_is_added(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    made = plan(pins, tmp_path / "out", disk_budget=8 * 3676 - 1)
    assert [len(batch) for batch in made.batches] == [3, 3, 2]
    overlapped = []

    def watch(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        if step == "accumulate" and not overlapped:
            end = time.monotonic() + 20
            while hub.count(repo="org/a0[345]", file=WEIGHTS, method="GET") < 6 and time.monotonic() < end:
                time.sleep(0.01)  # headers, and whole
            overlapped.append(hub.count(repo="org/a0[345]", file=WEIGHTS, method="GET"))
            overlapped.append(hub.count(repo="org/a0[67]", file=WEIGHTS, method="HEAD"))
        return results

    compress(made, tmp_path / "out", progress=watch)
    assert overlapped == [6, 0]  # the second batch, for which there is room, and not the third


def test_what_has_come_is_worked_on_while_another_is_slow(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    made = plan(pins, tmp_path / "out")
    hub.fault(kind="resolve", method="GET", repo="org/a00", file=WEIGHTS, delay=2.0)
    order: list[str] = []

    def watch(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            if step == "ingest":
                order.append(result[0])
            yield result

    compress(made, tmp_path / "out", progress=watch)
    assert order[-1] == "org--a00"
    assert sorted(order) == SHAREModel.from_pretrained(tmp_path / "out").adapter_names  # admitted in order all the same


def test_a_name_that_was_given_again_means_the_new_adapter(
    tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str]
) -> None:
    """The removed adapter dominates, so that its modules are summed anew, and its files are at hand just then."""
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    huge = {k: 1000 * v if "lora_" in k else v for k, v in load_tensors(collection[0]).items()}
    old = hub.add("org/x", files_of(write_adapter(tmp_path / "huge", huge, lora_alpha=8)), base_model="tiny-base")
    settings = {"objective": "factors"}
    go([f"org/x@{old}", *pins[1:7]], out, **settings)
    new = hub.update("org/x", {WEIGHTS: files_of(collection[7])[WEIGHTS]})
    assert main(["remove", str(out), "org--x"]) == 0
    assert main(["add", str(out), f"org/x@{new}", "--variance", "0.001"]) == 0
    assert main(["remove", str(out), "--refit"]) == 0
    assert main(["verify", str(out)]) == 0
    go([*pins[1:7], f"org/x@{new}"], fresh, **settings)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(fresh)
    assert a.certified("org--x")["source_id"] == f"org/x@{new}"
    for group, facts in b.config.ours["groups"].items():
        assert a.config.ours["groups"][group]["energy"] == pytest.approx(facts["energy"], rel=1e-4)


def test_one_repository_under_two_names(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    names = {f"{kind}{i}": pin for i, pin in enumerate(pins) for kind in ("n", "m")}
    go(names, tmp_path / "out", disk_budget=4 * 3676)
    share = SHAREModel.from_pretrained(tmp_path / "out")
    assert share.adapter_names == list(names)
    for group in share.all_loadings["n3"]:
        assert (share.all_loadings["n3"][group] == share.all_loadings["m3"][group]).all()


def test_many_that_are_gone_at_projection_do_not_hold_up_the_others(
    tmp_path: Path, hub: FakeHub, pins: list[str]
) -> None:
    out = tmp_path / "out"
    go(pins, out, disk_budget=4 * 3676)
    for i in range(6):
        del hub.repos[f"org/a0{i}"]
    with pytest.raises(CollectionError) as e:
        go(pins, out, disk_budget=4 * 3676, num_components=6)
    assert len(e.value.problems) == 6
    done = sorted(p.name for p in (tmp_path / ".out.staging" / "adapters").iterdir())
    assert done == ["org--a06", "org--a07"]


def test_more_are_removed_than_the_budget_holds(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    go(pins, out, disk_budget=4 * 3676)
    names = [f"org--a0{i}" for i in range(5)]
    assert main(["remove", str(out), *names, "--refit", "--disk-budget", str(4 * 3676)]) == 0
    go(pins[5:], fresh)
    a, b = (SHAREModel.from_pretrained(p).config.ours["groups"] for p in (out, fresh))
    for group, facts in b.items():
        assert a[group]["n"] == facts["n"]
        assert a[group]["energy"] == pytest.approx(facts["energy"], rel=1e-4)


def test_a_smaller_budget_after_a_kill(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"

    def stop(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for number, result in enumerate(results):
            if step == "project" and number == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        compress(plan(pins, out, disk_budget=6 * 3676), out, progress=stop)
    go(pins, out, disk_budget=2 * 3676)
    assert SHAREModel.from_pretrained(out).config.num_adapters == 8


def test_a_run_without_a_budget_clears_what_one_with_it_left(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"

    def stop(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for result in results:
            if step == "project":
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        compress(plan(pins, out, disk_budget=6 * 3676), out, progress=stop)
    assert list((default_workspace(out) / "hub").rglob(WEIGHTS))
    go(pins, out)
    assert not list((default_workspace(out) / "hub").rglob(WEIGHTS))


def test_addresses_are_never_told(
    tmp_path: Path, hub: FakeHub, pins: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The client's text has addresses, which may have passwords and signatures."""
    for status in (400, 403, 404, 410, 451):
        hub.fault(kind="resolve", method="HEAD", repo="org/a03", file=WEIGHTS, status=status, times=None)
        out = tmp_path / str(status)
        assert main(["compress", *pins, "-o", str(out), "--on-error", "skip", "-v"]) == 3
        hub.clear_faults()
        said = "".join(capsys.readouterr()) + (out / "skipped.json").read_text()
        assert hub.url not in said
        assert "org--a03" in said


def test_what_people_paste(tmp_path: Path, hub: FakeHub, collection: list[str], pins: list[str]) -> None:
    hub.add("org/several", {f"v{i}/{k}": v for i in (1, 2) for k, v in files_of(collection[0]).items()})
    assert parse_hub_id("org/a00/") == HubId("org/a00")
    (error,) = plan(["org/several"]).refused
    assert "//v1" in str(error.remedy)
    for text, meant in (
        ("http://host/org/several/tree/main/v1", "org/several@main//v1"),
        ("org/several/v1", "org/several//v1"),
    ):
        with pytest.raises(UsageError, match=meant):
            resolve([text])
    out = tmp_path / "out"
    go(pins, out)
    assert main(["reconstruct", str(out), "--adapter", "org/a03", "-o", str(tmp_path / "r")]) == 0
    assert main(["remove", str(out), "org/a03"]) == 0
    assert main(["add", "org/share", "org/a03"]) == 2  # a checkpoint on the Hub is not changed where it is


def test_odd_names_on_the_hub_spoil_no_manifest(tmp_path: Path, hub: FakeHub, collection: list[str]) -> None:
    good = files_of(collection[0])
    odd = dict.fromkeys(("epoch:3.safetensors", "aux.safetensors", ".tmp.safetensors", "a\tb.safetensors"), b"x")
    hub.add("org/odd", good | odd, base_model="tiny-base")
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    whole = {index: json.dumps({"weight_map": {"a": shard}}).encode(), shard: b"x", "adapter_config.json": b"{}"}
    hub.add("org/merged", whole, base_model="tiny-base")
    out = tmp_path / "m.jsonl"
    assert main(["discover", "--base-model", "tiny-base", "-o", str(out)]) == 0
    assert [item["repo"] for item in manifest_of(out)] == ["org/odd"]
    assert len(plan([out]).adapters) == 1
    assert "no weights" in str(plan(["org/merged"]).refused[0])
    assert hub.count(repo="org/merged", file="model-*") == 0


def test_what_is_too_large_is_not_fetched(tmp_path: Path, hub: FakeHub, collection: list[str]) -> None:
    good = files_of(collection[0])
    hub.add("org/pickle", {"adapter_config.json": good["adapter_config.json"], "adapter_model.bin": bytes(300_000)})
    hub.add("org/header", {**good, WEIGHTS: (1 << 25).to_bytes(8, "little") + bytes(1 << 25)})
    hub.add("org/config", {**good, "adapter_config.json": b"{" + b" " * (17 << 20) + b"}"})
    made = plan(["org/pickle", "org/header", "org/config"], disk_budget=100_000)
    reasons = {e.adapter: str(e) for e in made.refused}
    assert "larger than the memory or the disk budget" in reasons["org--pickle"]
    assert "longer than that of an adapter" in reasons["org--header"]
    assert "too large" in reasons["org--config"]
    assert all(r.sent <= 17 << 20 for r in hub.requests)


def test_a_server_that_never_answers(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    hub.add("org/x", {"a": b""})
    hub.fault(kind="info", delay=5.0, times=None)
    with pytest.raises(UnreachableError):
        Hub().info(HubId("org/x"))


@contextmanager
def nobody(*, accepts: bool) -> Iterator[str]:
    """An address on loopback that refuses, or that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if accepts:
            server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("command", ["discover", "push", "info", "plan", "pinned", "compress"])
def test_without_a_network_commands_give_up_within_the_limit_and_say_each_thing_once(
    tmp_path: Path, compressed_once: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, command: str, accepts: bool,
) -> None:  # fmt: skip
    """The client's own attempts and waits without end do not add to the limit of what was never answered."""
    monkeypatch.setattr(patience, "UNHEARD", 0.6)
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(patience, "_heard", [0.0])
    words = {
        "discover": ["discover", "--base-model", "org/base", "-o", tmp_path / "m.jsonl"],
        "push": ["push", compressed_once, "org/x"],
        "info": ["info", "org/x"],
        "plan": ["plan", "org/x", "org/y"],
        "pinned": ["plan", f"org/x@{40 * 'a'}"],
        "compress": ["compress", "org/x", "-o", tmp_path / "out", "--max-error", 0.2],
    }[command]
    with nobody(accepts=accepts) as url:
        patched(monkeypatch, SimpleNamespace(url=url), tmp_path / "home")
        begun = time.monotonic()
        assert main([str(word) for word in words]) == 75
        assert time.monotonic() - begun < 2.5
    err = capfd.readouterr().err
    assert err.count("the Hub cannot be reached") == 1
    assert [r.name for r in caplog.records] in ([], ["lorashare_stream.hub.retry"])
    assert "thrown while requesting" not in err


def test_pages_of_a_listing_are_asked_for_one_by_one(hub: FakeHub, collection: list[str]) -> None:
    """A page that fails is asked for again, and no other."""
    hub.page_size = 2
    for i in range(5):
        hub.add(f"org/a{i}", files_of(collection[i]), base_model="tiny-base", downloads=9 - i)
    listing = models(Hub(), filter=["base_model:adapter:tiny-base"], sort="downloads", author=None, search=None)
    found = [next(listing).id for _ in range(2)]
    hub.fault(kind="list", status=503)
    found += [model.id for model in listing]
    assert found == [f"org/a{i}" for i in range(5)]
    assert hub.count(kind="list") == 4


def test_what_one_thread_closes_another_asks_for_again(hub: FakeHub) -> None:
    """The Hub's client closes the session that all threads share where one of them cannot connect."""
    from huggingface_hub import close_session, get_session

    from lorashare_stream.hub.retry import transience

    session = get_session()
    close_session()
    with pytest.raises(RuntimeError) as caught:
        session.get("http://127.0.0.1:1/")
    assert transience(caught.value)[0] == "another request has closed the connection"


def test_errors_of_the_storage_client() -> None:
    from lorashare_stream.hub.retry import of_adapter, transience

    for text, waits in (
        ("Task error: File reconstruction error: CAS Client Error: status 503 for url", True),
        ("CAS Client Error: error sending request", True),
        ("CAS Client Error: HTTP status client error (403 Forbidden)", False),
        ("Task error: I/O error: No space left on device (os error 28)", False),
    ):
        assert (transience(RuntimeError(text))[0] is not None) == waits, text
    assert isinstance(of_adapter(RuntimeError("Task error: (os error 28)"), "x"), OSError)
    assert isinstance(of_adapter(RuntimeError("CAS Client Error: 404"), "x"), AdapterError)
    assert isinstance(of_adapter(ValueError("secret"), "x"), StreamError)
    kinds = {"XetObjectNotFoundError": FileNotFoundError, "XetAuthenticationError": PermissionError}
    for name, base in kinds.items():  # of one file, as an answer of the Hub is
        assert type(of_adapter(type(name, (base,), {})("secret"), "x")) is AdapterError
    assert "secret" not in str(of_adapter(ValueError("secret"), "x"))


def test_a_token_that_can_be_none_is_said_without_being_shown(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_gehe\u00efm")
    assert main(["compress", "org/a", "org/b", "-o", "x"]) == 2
    said = "".join(capsys.readouterr())
    assert "characters that none has" in said
    assert "gehe" not in said


def test_a_newer_commit_of_an_adapter_is_said_to_be_one(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"
    go(pins, out)
    new = hub.update("org/a00", {"x": b""})
    with pytest.raises(WorkspaceError, match=rf"at another commit.*org--a00 is now org/a00@{new}"):
        go([f"org/a00@{new}", *pins[1:]], out)
    assert main(["remove", str(out), "org--a00"]) == 0
    go([f"org/a00@{new}", *pins[1:]], out)
    assert SHAREModel.from_pretrained(out).certified("org--a00")["source_id"] == f"org/a00@{new}"


@pytest.mark.parametrize("budget", [None, 1 << 20])
def test_a_file_that_is_damaged_on_its_way_is_not_added(
    tmp_path: Path, hub: FakeHub, pins: list[str], budget: int | None
) -> None:
    out, settings = tmp_path / "out", {"on_error": "skip", "disk_budget": budget}
    made = plan(pins, out, **settings)
    files = hub.repos["org/a02"].commits[pins[2].split("@")[1]]
    whole = files[WEIGHTS]
    files[WEIGHTS] = whole[:-1] + bytes([whole[-1] ^ 1])
    outcome = compress(made, out)
    assert [e.adapter for e in outcome.skipped] == ["org--a02"]
    assert "not what the Hub lists" in str(outcome.skipped[0])
    files[WEIGHTS] = whole
    if budget is not None:  # nothing of it was kept
        assert not go(pins, out, **settings).skipped


def test_a_pickle_is_verified_without_a_workspace(tmp_path: Path, hub: FakeHub, collection: list[str]) -> None:
    config = files_of(collection[0])["adapter_config.json"]
    for i in range(2):
        tensors = {k: torch.from_numpy(v) for k, v in load_tensors(collection[i]).items()}
        torch.save(tensors, tmp_path / "x.bin")
        content = (tmp_path / "x.bin").read_bytes()
        hub.add(f"org/p{i}", {"adapter_config.json": config, "adapter_model.bin": content})
    out = tmp_path / "out"
    go(["org/p0", "org/p1"], out, disk_budget=1 << 20)
    default_workspace(out).rename(tmp_path / "away")
    assert main(["verify", str(out)]) == 0
    assert not list((tmp_path / "home").rglob("*.bin"))  # nor is the cache filled by it


def test_what_is_not_there_is_asked_for_once_by_add_too(tmp_path: Path, hub: FakeHub, pins: list[str]) -> None:
    out = tmp_path / "out"
    go(pins[:6], out)
    hub.requests.clear()
    gone = f"org/a07@{'0' * 40}"
    assert main(["add", str(out), "org/nothing", gone, pins[6], "--on-error", "skip", "--variance", "0.01"]) == 3
    assert hub.count(repo="org/nothing") == 1
    assert hub.count(repo="org/a07") == 1
    assert SHAREModel.from_pretrained(out).config.num_adapters == 7


def test_a_ledger_line_of_another_version_is_told_by_its_field(tmp_path: Path) -> None:
    path, records = tmp_path / "facts.jsonl", (TensorRecord("x", "F32", (2,), 100, 8),)
    known = Known((("adapter_model.safetensors", 500),), records, digest_of_records(records), "{}", Listing(("a",)))
    Ledger(path).put("id", known)
    assert Ledger(path).get("id") == known
    whole = path.read_bytes()
    for number, change in enumerate(({"colour": 1}, {"config": 1}, {"listing": {"colour": 1}})):
        lines = [unsealed(json.loads(line)) or {} for line in whole.splitlines()]
        path.write_text(
            "".join(json.dumps(sealed(line | (change if i == number else {}))) + "\n" for i, line in enumerate(lines))
        )
        with pytest.raises(WorkspaceError, match=rf"key '{next(iter(change))}.*another version.*delete this file"):
            Ledger(path)
