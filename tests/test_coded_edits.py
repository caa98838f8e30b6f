"""Coded checkpoints that change: more adapters, fewer, another limit or form, with their workspace and without one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashare_stream.checkpoint import packs
from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import CONFIG, INDEX, total_bytes
from lorashare_stream.checkpoint.index import inflated, read_index
from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import (
    BudgetError,
    CheckpointError,
    CollectionError,
    LockedError,
    UnknownAdapterError,
    UsageError,
    WorkspaceError,
)
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import Outcome, compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages import coding
from lorashare_stream.stages.verify import originals_of, verify
from lorashare_stream.workspace.workspace import Workspace

from .conftest import factor_keys, load_tensors, make_collection, tree_digest, write_adapter

Capture = pytest.CaptureFixture[str]
Modules = dict[str, tuple[int, int]]
WIDE: Modules = {"q": (300, 200), "v": (300, 100)}  # codes are more than what is recorded


def go(sources: Any, out: Path, **options: Any) -> Outcome:
    overwrite = options.pop("overwrite", False)
    settings = Settings.from_mapping({"device": "cpu"} | (options or {"max_error": 0.2}))
    plan = plan_for(resolve(sources), settings, default_workspace(out))
    return compress(plan, out, overwrite=overwrite)


def measured(out: Path, sources: Any) -> None:
    share = SHAREModel.from_pretrained(out)
    assert [v.problem for v in verify(share, originals_of(share, resolve(sources)))] == [None] * len(sources)


def alone(out: Path) -> Path:
    """Take a checkpoint's workspace away."""
    return Path(shutil.move(default_workspace(out), out.parent / "aside"))


def nodes(out: Path) -> dict[str, int]:
    return {p.name: os.stat(p).st_ino for p in (out / "packs").iterdir()}


def said(out: Path) -> bytes:
    """All that a checkpoint says."""
    files = [p for p in out.rglob("*") if p.is_file()]
    return b"\n".join(inflated(p.read_bytes()) if p.suffix == ".zz" else p.read_bytes() for p in files)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of adapters that are encoded."""
    names: list[str] = []
    original = coding.encode_adapter
    monkeypatch.setattr(coding, "encode_adapter", lambda job, a: (names.append(a.name), original(job, a))[1])
    return names


# -- more adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [True, False])
def test_an_adapter_is_added_alone_in_a_pack_of_its_own(
    tmp_path: Path, encoded: list[str], workspace: bool, capsys: Capture
) -> None:
    sources, out = make_collection(tmp_path / "in", 5), tmp_path / "out"
    go(sources[:3], out)
    before, size = nodes(out), total_bytes(read_share_config(out).ours["bytes"])
    if not workspace:
        alone(out)
    encoded.clear()
    assert main(["add", str(out), sources[3], "-q"]) == 0
    cost = total_bytes(read_share_config(out).ours["bytes"]) - size
    assert f"added a03, coded alone, for {cost} B" in capsys.readouterr().out
    share = SHAREModel.from_pretrained(out)
    assert share.add_adapter(sources[4], name="fifth") == {
        "method": "projection", "adapter_name": "fifth", "relative_error": share.certified("fifth")["relative_error"],
    }  # fmt: skip
    assert encoded == ["a03", "fifth"]
    assert before.items() <= nodes(out).items()  # what was there is linked
    assert len(nodes(out)) == 3
    ours = read_share_config(out).ours
    assert total_bytes(ours["bytes"]) == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    measured(out, {**{f"a{i:02}": sources[i] for i in range(4)}, "fifth": sources[4]})
    assert add(out, resolve(sources[3:4]), RunOptions()).method == "current"
    go({**{f"a{i:02}": sources[i] for i in range(4)}, "fifth": sources[4]}, tmp_path / "whole")
    whole, parts = (read_index(p / INDEX) for p in (tmp_path / "whole", out))
    assert {n: (a.code.digest, a.record) for n, a in whole.adapters.items()} == {
        n: (a.code.digest, a.record) for n, a in parts.adapters.items()
    }  # halves joined are the whole
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_variance_means_nothing_and_that_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources, out = make_collection(tmp_path / "in", 3), tmp_path / "out"
    go(sources[:2], out)
    caplog.set_level(logging.WARNING, "lorashare_stream")
    assert add(out, resolve(sources[2:]), RunOptions(accept=1.0)).method == "projection"
    assert [r.message for r in caplog.records if "variance" in r.message] == [
        "variance_threshold says nothing of a coded checkpoint: each adapter is coded within its limit"
    ]


@pytest.mark.parametrize("workspace", [True, False])
def test_a_limit_on_bytes_takes_the_recorded_step_while_it_holds(
    tmp_path: Path, encoded: list[str], workspace: bool, capsys: Capture
) -> None:
    sources, out = make_collection(tmp_path / "in", 6, WIDE), tmp_path / "out"
    go(sources[:4], out, ratio=5)
    step, size = read_share_config(out).coded["step"], total_bytes(read_share_config(out).ours["bytes"])
    kept = None if workspace else alone(out)
    encoded.clear()
    assert add(out, resolve(sources[4:5]), RunOptions()).method == "projection"  # five may have more bytes than four
    assert (encoded, read_share_config(out).coded["step"]) == (["a04"], step)

    tight, limit = tmp_path / "tight", size + 200
    go(sources[:4], tight, max_bytes=limit)
    if kept is None:
        assert main(["add", str(tight), sources[4], "-q"]) == 0
        assert "all adapters were coded again" in capsys.readouterr().out
        config = read_share_config(tight)
        assert config.coded["step"] > step
        assert total_bytes(config.ours["bytes"]) <= limit
        assert [p.name for p in tight.parent.glob(".*")] == []
        measured(tight, sources[:5])
        for source in sources[:5]:
            shutil.rmtree(source)
        before = tree_digest(tight)
        with pytest.raises(BudgetError, match="no source is known of 5 adapters"):
            add(tight, resolve(sources[5:]), RunOptions())
        assert tree_digest(tight) == before
        assert [p.name for p in tight.parent.glob(".*")] == []
        remove(tight, ["a05"], RunOptions())  # the workspace has it by now
        assert tree_digest(tight) == before
        return
    shutil.move(default_workspace(tight), tmp_path / "second")
    before = tree_digest(tight)
    assert main(["add", str(tight), sources[4], "-q"]) == 1
    text = capsys.readouterr().err
    assert "no source is known of 4 adapters" in text
    least = int(text.partition("--max-bytes ")[2].split()[0])
    assert tree_digest(tight) == before
    shutil.move(tmp_path / "second", default_workspace(tight))
    go(sources[:5], tmp_path / "enough", max_bytes=least)  # what it names will do
    assert read_share_config(tmp_path / "enough").coded["step"] < 1.25 * read_share_config(tight).coded["step"]


# -- fewer -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [True, False])
def test_one_that_is_removed_leaves_no_trace(tmp_path: Path, workspace: bool, capsys: Capture) -> None:
    sources, out, rest = make_collection(tmp_path / "in", 4), tmp_path / "out", tmp_path / "rest"
    go(sources, out)
    go([s for s in sources if not s.endswith("a02")], rest)
    if not workspace:
        alone(out)
    assert b"a02" in said(out)
    assert main(["remove", str(out), "a02", *(["--refit"] if workspace else [])]) == 0
    text = capsys.readouterr().out
    assert ("the workspace's journal keeps their names and digests" in text) == workspace
    assert ("there is no workspace here" in text) != workspace
    assert tree_digest(out) == tree_digest(rest)
    assert b'/a02"' not in said(out)  # with what no digest has
    assert b'"a02"' not in said(out)
    work = default_workspace(out)
    assert [p.name for p in work.rglob("*") if p.is_file() and b'"a02"' in p.read_bytes()] == (
        ["journal.jsonl"] if workspace else []
    )
    assert [p.name for p in tmp_path.glob(".*")] == []
    again = RunOptions()
    if workspace:
        done = remove(out, ["a02"], again)
        assert (done.names, done.before) == ((), ("a02",))
        assert main(["remove", str(out), "a02"]) == 0
        assert capsys.readouterr().out.startswith("took out nothing more\ntaken out before: a02\n")
        assert go([s for s in sources if not s.endswith("a02")], out).method == "current"
    else:
        with pytest.raises(UnknownAdapterError):
            remove(out, ["a02"], again)
    with pytest.raises(UsageError, match="no adapter would stay"):
        remove(out, ["a00", "a01", "a03"], again)
    SHAREModel.from_pretrained(out).remove_adapter("a00")
    assert SHAREModel.from_pretrained(out).adapter_names == ["a01", "a03"]


def test_one_pack_is_rewritten_and_tensors_that_others_need_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packs, "ADAPTERS_MOST", 2)
    sources, out = make_collection(tmp_path / "in", 6), tmp_path / "out"
    head = load_tensors(sources[0])["base_model.model.head.weight"]
    for source in sources[1:5:2]:  # a01 and a03 have the head of a00, which lies in its pack
        write_adapter(Path(source), load_tensors(source) | {"base_model.model.head.weight": head}, r=4, lora_alpha=8)
    go(sources, out)
    before = nodes(out)
    remove(out, ["a00"], RunOptions())
    assert len(before.items() & nodes(out).items()) == 2
    measured(out, sources[1:])
    remove(out, ["a01"], RunOptions())  # what is left of its pack is a head that a03 needs
    assert len(nodes(out)) == 3
    measured(out, sources[2:])
    remove(out, ["a03"], RunOptions())
    assert len(nodes(out)) == 2
    measured(out, [sources[2], *sources[4:]])


def test_moments_of_a_time_when_it_was_no_coded_one_go_too(tmp_path: Path) -> None:
    sources, out = make_collection(tmp_path / "in", 4), tmp_path / "out"
    go(sources, out, num_components=3)
    assert refit(out, {"max_error": 0.2}, out, RunOptions()) == "recompute"
    work = Workspace(default_workspace(out))
    assert work.markers
    done = remove(out, ["a02"], RunOptions())
    assert (done.in_bases, done.in_moments, Workspace(work.root).markers) == ((), {}, {})
    assert not list(work.root.rglob("*.safetensors"))
    rest = [s for s in sources if not s.endswith("a02")]
    assert refit(out, {"num_components": 3}, out, RunOptions()) == "recompute"
    go(rest, tmp_path / "rest", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "rest")


def test_what_was_staged_of_one_that_is_given_up_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, out = make_collection(tmp_path / "in", 3), tmp_path / "out"
    go(sources[:2], out)
    before = tree_digest(out)
    with monkeypatch.context() as patch:
        patch.setattr(coding, "share_config", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add(out, resolve(sources[2:]), RunOptions())
    assert b"a02" in said(tmp_path / ".out.staging")
    assert remove(out, ["a02"], RunOptions()).names == ("a02",)
    assert [p.name for p in tmp_path.glob(".*")] == []
    assert tree_digest(out) == before


def test_others_in_the_pack_that_are_damaged_are_not_copied(tmp_path: Path) -> None:
    sources, out = make_collection(tmp_path / "in", 3), tmp_path / "out"
    go(sources, out)
    at = read_index(out / INDEX).adapters["a01"].code
    path = out / at.pack.file
    data = bytearray(path.read_bytes())
    data[at.offset] ^= 1
    path.write_bytes(data)
    before, journal = tree_digest(out), Workspace(default_workspace(out)).journal()
    with pytest.raises(CheckpointError, match=r"adapter 'a01'.*damaged"):
        remove(out, ["a00"], RunOptions())
    assert tree_digest(out) == before
    assert Workspace(default_workspace(out)).journal() == journal
    remove(out, ["a01"], RunOptions())
    assert add(out, resolve(sources[1:2]), RunOptions()).method == "projection"
    remove(out, ["a00"], RunOptions())
    measured(out, sources[1:])


def test_what_another_run_has_changed_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, out = make_collection(tmp_path / "in", 4), tmp_path / "out"
    go(sources[:3], out)
    alone(out)
    original: Callable[..., Any] = coding.reusable

    def slow(target: coding.Target) -> coding.Reusable:
        found = original(target)
        monkeypatch.setattr(coding, "reusable", original)
        remove(out, ["a00"], RunOptions())
        return found

    monkeypatch.setattr(coding, "reusable", slow)
    with pytest.raises((LockedError, FileNotFoundError)):
        add(out, resolve(sources[3:]), RunOptions())
    assert SHAREModel.from_pretrained(out).adapter_names == ["a01", "a02"]
    measured(out, sources[1:3])


# -- another limit, another form ---------------------------------------------------------------------------------------


def test_another_limit_and_another_form_are_made_from_the_sources(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lorashare_stream")
    sources, out = make_collection(tmp_path / "in", 4, WIDE), tmp_path / "out"
    go(sources, out)
    asked: list[dict[str, Any]] = [{"max_error": 0.1}, {"num_components": 3}, {"ratio": 4.0}, {"num_components": 2}]
    asked += [{"max_bytes": 16000}, {"max_error": 0.2}]
    for i, limit in enumerate(asked):
        assert refit(out, limit, out, RunOptions()) == "recompute"
        go(sources, tmp_path / f"fresh{i}", **limit)
        assert tree_digest(out) == tree_digest(tmp_path / f"fresh{i}"), limit
        assert refit(out, limit, out, RunOptions()) == refit(out, {}, out, RunOptions()) == "current"
    assert main(["refit", str(out), "--max-error", "0.3", "-o", str(out)]) == 0
    assert "all adapters coded from their sources" in caplog.text
    assert refit(default_workspace(out), {"max_error": 0.2}, out, RunOptions()) == "recompute"  # a workspace does too
    assert refit(out, {"max_error": 0.1}, tmp_path / "other", RunOptions()) == "recompute"
    assert read_share_config(out).ours["settings"]["max_error"] == 0.2
    for source in sources:
        shutil.rmtree(source)
    with pytest.raises(CollectionError, match="4 adapters must be coded from their sources, which are gone"):
        refit(out, {"max_error": 0.1}, out, RunOptions())
    alone(out)
    for limit in ({"max_error": 0.1}, {"num_components": 3}):
        with pytest.raises(WorkspaceError, match="which only the workspace knows"):
            refit(out, limit, out, RunOptions())
    assert refit(out, {}, out, RunOptions()) == "current"


def test_the_precision_of_sources_comes_back_with_k(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    sources, out = make_collection(tmp_path / "in", 3), tmp_path / "out"
    for source in sources:
        half = {k: torch.from_numpy(v).bfloat16() for k, v in load_tensors(source).items()}
        save_file(half, Path(source) / "adapter_model.safetensors")
    go(sources, out, num_components=3)
    before = tree_digest(out)
    for asked in ({"max_error": 0.2}, {"num_components": 3}):
        refit(out, asked, out, RunOptions())
    assert tree_digest(out) == before


def test_compress_again_grows_or_replaces(tmp_path: Path, encoded: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lorashare_stream")
    sources, out = make_collection(tmp_path / "in", 5), tmp_path / "out"
    go(sources[:3], out)
    before = nodes(out)
    encoded.clear()
    assert go(sources, out).method == "projection"
    assert encoded == ["a03", "a04"]
    assert before.items() <= nodes(out).items()
    assert go(sources, out).method == "current"
    (out / "README.md").write_text("of the user")
    for options in ({"num_components": 3}, {"max_error": 0.1}, {"ratio": 3.0}, {"max_error": 0.2}):
        assert go(sources, out, **options).method == "recompute"
        form = {"adapters"} if "num_components" in options else {"packs", INDEX}
        assert {p.name for p in out.iterdir()} & {"adapters", "packs", INDEX} == form
        assert (out / "README.md").read_text() == "of the user"
    other = make_collection(tmp_path / "b", 2, seed=7)
    alone(out)
    with pytest.raises(UsageError, match="another run"):
        go(other, out)
    assert go(other, out, overwrite=True, max_error=0.2).method == "recompute"
    measured(out, other)
    assert main(["compress", *other, "-o", str(out), "--max-error", "0.2"]) == 0
    assert "is up to date" in caplog.text


@pytest.mark.parametrize("damage", ["gone", "cut", "index"])
def test_what_is_missing_is_coded_again(tmp_path: Path, encoded: list[str], damage: str) -> None:
    sources, out = make_collection(tmp_path / "in", 3), tmp_path / "out"
    go(sources[:2], out)
    add(out, resolve(sources[2:]), RunOptions())
    before = tree_digest(out)
    at = read_index(out / INDEX).adapters["a02"].code
    encoded.clear()
    if damage == "gone":
        (out / at.pack.file).unlink()
    elif damage == "cut":
        os.truncate(out / at.pack.file, at.offset)
    else:
        (out / INDEX).write_bytes(b"")
    assert go(sources, out).method == ("recompute" if damage == "index" else "projection")
    assert encoded == (["a00", "a01", "a02"] if damage == "index" else ["a02"])
    if damage != "index":
        assert tree_digest(out) == before
    measured(out, sources)


def test_where_there_are_no_links_packs_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = make_collection(tmp_path / "in", 3)
    for name, links in (("links", True), ("copies", False)):
        go(sources[:2], tmp_path / name)
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no links")))
        add(tmp_path / name, resolve(sources[2:]), RunOptions())
    assert tree_digest(tmp_path / "links") == tree_digest(tmp_path / "copies")


def test_bad_ones_are_left_out_and_named(tmp_path: Path) -> None:
    sources, out = make_collection(tmp_path / "in", 4), tmp_path / "out"
    go(sources[:2], out)
    bad = load_tensors(sources[3])
    bad[factor_keys("layers.0.q")[0]][0, 0] = float("nan")
    write_adapter(Path(sources[3]), bad, r=4, lora_alpha=8)
    for workspace in (True, False):
        if not workspace:
            alone(out)
            remove(out, ["a02"], RunOptions())
        with pytest.raises(CollectionError):
            add(out, resolve(sources[3:]), RunOptions())
        done = add(out, resolve(sources[2:]), RunOptions(changes={"on_error": "skip"}))
        assert ([e.adapter for e in done.skipped], done.method) == (["a03"], "projection")
        left_out = json.loads((out / "skipped.json").read_text())
        assert {item["adapter"] for item in left_out} == {"a03"}
        assert json.loads((out / CONFIG).read_text())["adapter_names"] == ["a00", "a01", "a02"]
        assert total_bytes(read_share_config(out).ours["bytes"]) == sum(
            p.stat().st_size for p in out.rglob("*") if p.is_file()
        )
