"""Another k from what was computed before: cut from what is stored, or fitted to the same moments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorashare
import numpy as np
import pytest
import torch

from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CollectionError, UsageError, WorkspaceError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import Outcome, compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import make_collection, tree_digest

Capture = pytest.CaptureFixture[str]


def go(sources: list[str], out: Path, **options: Any) -> Outcome:
    settings = Settings.from_mapping({"device": "cpu", "num_components": 6} | options)
    return compress(plan_for(resolve(sources), settings, default_workspace(out)), out)


def counting(steps: dict[str, int]) -> Any:
    def count(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        steps[step] = total
        return results

    return count


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_a_smaller_k_is_cut_from_what_is_stored_and_its_error_is_what_it_says(
    tmp_path: Path, collection: list[str], dtype: str, objective: str
) -> None:
    out, small, fresh = tmp_path / "out", tmp_path / "small", tmp_path / "fresh"
    go(collection, out, dtype=dtype, objective=objective)
    go(collection, fresh, dtype=dtype, objective=objective, num_components=3)
    shutil.rmtree(default_workspace(out))
    for folder in collection:
        shutil.move(folder, f"{folder}.away")
    assert refit(out, {"num_components": 3}, small, RunOptions()) == "sliced"
    for folder in collection:
        shutil.move(f"{folder}.away", folder)
    a, b = SHAREModel.from_pretrained(small), SHAREModel.from_pretrained(fresh)
    assert a.config.num_components == 3
    assert not default_workspace(small).exists()
    tolerance = 1e-3 if dtype == "float32" else 2e-2
    for name in b.adapter_names:
        x, y = a.reconstruct(name), b.reconstruct(name)
        assert x.keys() == y.keys()
        assert all(torch.norm(x[k].float() - y[k].float()) <= tolerance * torch.norm(y[k].float()) for k in x)
        assert a.certified(name)["relative_error"] == pytest.approx(b.certified(name)["relative_error"], abs=tolerance)
        assert "estimated" in a.certified(name)
    ours, theirs = a.config.ours["groups"], b.config.ours["groups"]
    assert all(ours[g]["explained"] == pytest.approx(theirs[g]["explained"], abs=tolerance) for g in theirs)
    assert all(ours[g]["k"] == theirs[g]["k"] == 3 for g in theirs)
    assert lorashare.SHAREModel.from_pretrained(small).reconstruct("a00").keys() == a.reconstruct("a00").keys()
    verdicts = list(verify(a, originals_of(a, resolve(collection))))
    assert [v.problem for v in verdicts] == [None] * 8


def test_cut_twice_or_at_once_is_the_same(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    assert refit(out, {"num_components": 4}, tmp_path / "four", RunOptions()) == "sliced"
    assert refit(tmp_path / "four", {"num_components": 2}, tmp_path / "twice", RunOptions()) == "sliced"
    assert refit(out, {"num_components": 2}, tmp_path / "once", RunOptions()) == "sliced"
    a, b = (SHAREModel.from_pretrained(tmp_path / n) for n in ("twice", "once"))
    for name in a.adapter_names:
        assert all(torch.equal(v, b.reconstruct(name)[k]) for k, v in a.reconstruct(name).items())
        assert a.certified(name)["relative_error"] == pytest.approx(b.certified(name)["relative_error"], abs=1e-6)
    assert all(facts == pytest.approx(b.config.ours["groups"][g]) for g, facts in a.config.ours["groups"].items())


@pytest.mark.few(2)
@pytest.mark.parametrize("k", [8, "auto"])
@pytest.mark.parametrize("place", ["checkpoint", "workspace"])
def test_a_larger_k_reads_the_sources_once_and_sums_nothing(
    tmp_path: Path, collection: list[str], k: int | str, place: str
) -> None:
    out, larger, fresh = tmp_path / "out", tmp_path / "larger", tmp_path / "fresh"
    go(collection, out)
    go(collection, fresh, num_components=k)
    steps: dict[str, int] = {}
    options = RunOptions(progress=counting(steps))
    source = out if place == "checkpoint" else default_workspace(out)
    assert refit(source, {"num_components": k}, larger, options) == "recompute"
    assert steps == {"ingest": 0, "accumulate": 0, "fit": 3, "project": 8}
    assert tree_digest(larger) == tree_digest(fresh)
    assert refit(source, {"num_components": k}, larger, options) == "current"


def test_in_place(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    go(collection, out)
    assert refit(out, {"num_components": 3}, out, RunOptions()) == "sliced"
    assert refit(out, {"num_components": 3}, out, RunOptions()) == "current"
    assert SHAREModel.from_pretrained(out).config.num_components == 3
    go(collection, fresh, num_components=8)
    assert refit(out, {"num_components": 8}, out, RunOptions()) == "recompute"
    assert tree_digest(out) == tree_digest(fresh)
    assert go(collection, out, num_components=8).method == "current"
    refit(out, {"num_components": 3}, out, RunOptions())
    assert go(collection, out, num_components=8).method == "recompute"  # it is still this workspace's own
    assert tree_digest(out) == tree_digest(fresh)


def test_the_same_k_for_all_that_was_added_since(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    fresh = {f"m{i}": p for i, p in enumerate(make_collection(tmp_path / "more", 3, seed=1))}
    assert add(out, resolve(fresh), RunOptions()).method == "projection"
    assert refit(out, {}, out, RunOptions()) == "recompute"
    assert SHAREModel.from_pretrained(out).config.ours["projected"] == []
    whole = tmp_path / "whole"
    settings = Settings(device="cpu", num_components=6)
    compress(plan_for([*resolve(collection), *resolve(fresh)], settings), whole)
    a, b = (SHAREModel.from_pretrained(p).config.ours["groups"] for p in (out, whole))
    assert all(a[g]["explained"] == pytest.approx(b[g]["explained"], abs=1e-6) for g in b)
    assert refit(out, {}, out, RunOptions()) == "current"


def test_what_cannot_be_done_is_said(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    go(collection, tmp_path / "other", num_components=2)
    with pytest.raises(UsageError, match="another run"):
        refit(out, {"num_components": 3}, tmp_path / "other", RunOptions())
    assert refit(out, {"num_components": 3}, tmp_path / "other", RunOptions(), overwrite=True) == "sliced"
    shutil.rmtree(collection[2])
    with pytest.raises(CollectionError, match=r"sources are gone(.|\n)*'a02'"):
        refit(out, {"num_components": 8}, tmp_path / "larger", RunOptions())
    assert not (tmp_path / "larger").exists()
    shutil.rmtree(default_workspace(out))
    with pytest.raises(WorkspaceError, match="only a smaller k can be cut"):
        refit(out, {"num_components": 8}, tmp_path / "larger", RunOptions())
    with pytest.raises(FileNotFoundError):
        refit(tmp_path / "nowhere", {"num_components": 8}, tmp_path / "larger", RunOptions())


def test_a_cut_of_what_has_changed_is_made_anew(tmp_path: Path, collection: list[str]) -> None:
    out, small = tmp_path / "out", tmp_path / "small"
    go(collection, out)
    remove(out, ["a03"], RunOptions())
    assert refit(out, {"num_components": 3}, small, RunOptions()) == "sliced"
    assert SHAREModel.from_pretrained(small).config.ours["removed"] == ["a03"]
    remove(out, ["a03"], RunOptions(), refit=True)
    assert (
        refit(out, {"num_components": 3}, small, RunOptions()) == "sliced"
    )  # it is this workspace's own, and is replaced
    assert SHAREModel.from_pretrained(small).config.ours["removed"] == []
    assert refit(out, {"num_components": 3}, small, RunOptions()) == "current"


def test_another_share_that_auto_keeps_is_another_k(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out, num_components="auto", variance_threshold=0.8)
    before = SHAREModel.from_pretrained(out).config.num_components
    assert refit(out, {"num_components": "auto"}, out, RunOptions(changes={"variance_threshold": 0.8})) == "current"
    assert refit(out, {"num_components": "auto"}, out, RunOptions(changes={"variance_threshold": 0.99})) == "recompute"
    assert SHAREModel.from_pretrained(out).config.num_components > before


def test_a_trace_in_discarded_moments_goes_too(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, {"q": (20, 12)}), tmp_path / "out"
    go(collection, out)
    remove(out, ["a03"], RunOptions())
    refit(out, {"num_components": 7}, out, RunOptions(changes={"discard_moments": True}))
    assert SHAREModel.from_pretrained(out).config.ours["removed"] == ["a03"]
    assert remove(out, [], RunOptions(), refit=True).in_bases == ()
    go([p for p in collection if not p.endswith("a03")], tmp_path / "rest", num_components=7)
    assert tree_digest(out) == tree_digest(tmp_path / "rest")


def test_moments_are_freed_group_by_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = make_collection(tmp_path / "adapters", 8, {f"layers.{i}.q": (20, 12) for i in range(5)})
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    go(collection, fresh)
    most = 0

    def watch(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        nonlocal most
        for result in results:
            yield result
            most = max(most, len(list((tmp_path / "out.workspace" / "moments").glob("*/*_A_*/c.*"))))

    settings = Settings(device="cpu", num_components=6, discard_moments=True, workers=1)
    plan = plan_for(resolve(collection), settings)
    assert plan.sizes["moments"] < plan_for(resolve(collection), Settings()).sizes["moments"]
    compress(plan, out, progress=watch)
    assert most <= 2 * 3  # sums, and chunks: of one in work, and of those that ran ahead of the count
    assert [p.name for p in (default_workspace(out) / "moments").iterdir()] == ["zarr.json"]
    assert tree_digest(out) == tree_digest(fresh)
    assert go(collection, out).method == "current"
    assert add(out, resolve(make_collection(tmp_path / "m", 1, {"layers.0.q": (20, 12)}, seed=1)), RunOptions()).method
    assert (
        refit(out, {"num_components": 8}, tmp_path / "eight", RunOptions()) == "recompute"
    )  # sums all again, from the sources
    share = SHAREModel.from_pretrained(tmp_path / "eight")
    assert share.config.num_adapters == 9


def test_discarding_stopped_in_the_middle_goes_on(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    go(collection, fresh)

    def stop(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for count, result in enumerate(results):
            yield result
            if step == "accumulate" and count == 1:
                raise KeyboardInterrupt

    plan = plan_for(resolve(collection), Settings(device="cpu", num_components=6, discard_moments=True, workers=1))
    with pytest.raises(KeyboardInterrupt):
        compress(plan, out, progress=stop)
    steps: dict[str, int] = {}
    compress(plan, out, progress=counting(steps))
    assert steps["accumulate"] <= 1
    assert tree_digest(out) == tree_digest(fresh)


def test_the_command(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out = tmp_path / "out"
    go(collection, out)
    assert main(["refit", str(out), "-k", "3", "-o", str(tmp_path / "small"), "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["k"]) == ("sliced", 3)
    assert main(["refit", str(out) + ".workspace", "-k", "8", "-o", str(tmp_path / "large"), "-q"]) == 0
    assert "components k         8" in capsys.readouterr().out
    assert main(["refit", str(out), "-k", "none", "-o", str(tmp_path / "x")]) == 2
    arguments = ["compress", *collection, "-o", str(tmp_path / "lean"), "-k", "6", "--discard-moments", "-q"]
    assert main(arguments) == 0
    assert [p.name for p in (tmp_path / "lean.workspace" / "moments").iterdir()] == ["zarr.json"]
    assert tree_digest(tmp_path / "lean") == tree_digest(out)
    assert np.isfinite(SHAREModel.from_pretrained(tmp_path / "lean").certified("a00")["relative_error"])
