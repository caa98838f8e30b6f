"""Adapters are taken out: what of them goes, what stays and is said, and what computing anew takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorashare
import numpy as np
import pytest
import zarr

from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CheckpointError, UnknownAdapterError, UsageError, WorkspaceError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import Outcome, compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify
from lorashare_stream.workspace.records import Marker
from lorashare_stream.workspace.workspace import Workspace

from .conftest import make_collection, tree_digest

Capture = pytest.CaptureFixture[str]
SUMS = {"q": (14, 15), "v": (14, 12)}  # 2d is less than n = 32: second moments
COLUMNS = {"q": (40, 50), "v": (70, 60)}  # n is less than d: stacked columns


def go(sources: list[str], out: Path, **options: Any) -> Outcome:
    settings = Settings.from_mapping({"device": "cpu", "num_components": 6} | options)
    return compress(plan_for(resolve(sources), settings, default_workspace(out)), out)


def markers(out: Path) -> dict[str, Marker]:
    return dict(sorted(Workspace(default_workspace(out)).markers.items()))


def array(out: Path, module: str, side: str, form: str) -> np.ndarray:
    slot = markers(out)[module].sides["A" if side == "A" else "B"].slot
    assert slot.form == form
    array = zarr.open(str(default_workspace(out)), mode="r")[f"moments/{slot.lease}/{slot.array}"]
    return np.asarray(array[slot.index])


def measured(out: Path, sources: list[str]) -> None:
    share = SHAREModel.from_pretrained(out)
    verdicts = list(verify(share, originals_of(share, resolve(sources))))
    assert [v.problem for v in verdicts] == [None] * len(sources)


def test_its_files_go_and_sums_still_contain_it_and_say_so(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    done = remove(out, ["a03", "a05"], RunOptions())
    assert done.in_bases == ("a03", "a05")
    assert done.in_moments == {"a03": 2, "a05": 2}
    after = tree_digest(out)
    gone = {k for k in before if k.startswith(("adapters/a03/", "adapters/a05/"))}
    assert before.keys() - after.keys() == gone
    assert not (out / "adapters" / "a03").exists()
    assert {k for k in after if after[k] != before[k]} == {"share_config.json"}
    share = SHAREModel.from_pretrained(out)
    assert share.config.num_adapters == 6
    assert share.config.ours["removed"] == ["a03", "a05"]
    assert share.config.ours["groups"]["q:A"]["n"] == 24
    assert lorashare.SHAREModel.from_pretrained(out).adapter_names == share.adapter_names
    measured(out, [p for p in collection if p[-3:] not in ("a03", "a05")])
    assert remove(out, ["a03", "a05"], RunOptions()) == replace(done, names=(), before=done.names)  # again
    assert tree_digest(out) == after


def test_its_stacked_columns_go(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, COLUMNS), tmp_path / "out"
    rest = [p for p in collection if not p.endswith("a03")]
    go(collection, out)
    go(rest, tmp_path / "rest")
    done = remove(out, ["a03"], RunOptions())
    assert (done.in_bases, done.in_moments) == (("a03",), {})
    for module in COLUMNS:
        for side in "AB":
            assert np.array_equal(
                array(out, module, side, "columns"), array(tmp_path / "rest", module, side, "columns")
            )
    leases = {p.name for p in (default_workspace(out) / "moments").iterdir() if p.is_dir()}
    assert leases == {marker.lease for marker in markers(out).values()}  # what held it is gone
    assert compress_again(rest, out) == "current"  # the bases stay until they are fitted anew
    assert go_refit(rest, out).method == "recompute"
    assert tree_digest(out) == tree_digest(tmp_path / "rest")


def compress_again(sources: list[str], out: Path) -> str:
    return go(sources, out).method


def go_refit(sources: list[str], out: Path) -> Outcome:
    plan = plan_for(resolve(sources), Settings(device="cpu", num_components=6), default_workspace(out))
    return compress(plan, out, refit=True)


@pytest.mark.few(2)
@pytest.mark.parametrize("modules", [SUMS, COLUMNS], ids=["sums", "columns"])
@pytest.mark.parametrize("source", ["there", "gone"])
def test_computed_anew_it_is_as_if_it_had_never_been_there(
    tmp_path: Path, modules: dict[str, tuple[int, int]], source: str
) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, modules), tmp_path / "out"
    rest = [p for p in collection if not p.endswith("a03")]
    go(collection, out)
    go(rest, tmp_path / "rest")
    if source == "gone":
        shutil.rmtree(collection[3])
    done = remove(out, ["a03"], RunOptions(), refit=True)
    assert (done.in_bases, done.in_moments, done.absent) == ((), {}, ())
    assert tree_digest(out) == tree_digest(tmp_path / "rest")
    measured(out, rest)
    assert go(rest, out).method == "current"


def test_where_neither_can_be_done_it_is_named(tmp_path: Path, capsys: Capture) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    for gone in (3, 6):
        shutil.rmtree(collection[gone])
    done = remove(out, ["a03"], RunOptions(), refit=True)
    assert done.in_bases == ("a03",)
    assert done.in_moments == {"a03": 2}
    assert done.absent == ("a06",)
    share = SHAREModel.from_pretrained(out)
    assert share.config.ours["removed"] == ["a03"]
    share.summary()
    assert "1, still in the bases (remove --refit frees them, with the workspace): a03" in capsys.readouterr().out


def test_a_trace_in_the_moments_is_told_of_every_basis_that_is_fitted_to_them(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    rest = [p for p in collection if not p.endswith("a03")]
    go(collection, out)
    remove(out, ["a03"], RunOptions())
    go(rest, out, num_components=4)  # another k from the same moments
    assert SHAREModel.from_pretrained(out).config.ours["removed"] == ["a03"]
    remove(out, ["a03"], RunOptions(), refit=True)
    assert SHAREModel.from_pretrained(out).config.ours["removed"] == []
    go(rest, tmp_path / "rest", num_components=4)
    a, b = (SHAREModel.from_pretrained(p).config.ours["groups"] for p in (out, tmp_path / "rest"))
    assert all(a[g]["explained"] == pytest.approx(b[g]["explained"], abs=1e-6) for g in b)


def test_one_that_was_only_projected_leaves_no_trace_in_the_bases(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    fresh = make_collection(tmp_path / "more", 1, seed=1)
    assert add(out, resolve({"new": fresh[0]}), RunOptions()).method == "projection"
    done = remove(out, ["new"], RunOptions())
    assert done.in_bases == ()
    assert tree_digest(out) == before
    assert add(out, resolve({"new": fresh[0]}), RunOptions()).method == "projection"  # and may come back


def test_added_again_after_it_was_taken_out_it_is_there_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, COLUMNS), tmp_path / "out"
    go(collection, out)
    remove(out, ["a03"], RunOptions())
    go_refit(collection, out)
    assert "taken out before, and added again since their sources are named: a03" in caplog.text
    share = SHAREModel.from_pretrained(out)
    assert share.adapter_names[-1] == "a03"
    assert {record.count for m in markers(out).values() for record in m.sides.values()} == {32}
    measured(out, collection)


def test_without_a_workspace_the_checkpoint_alone_is_changed(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    shutil.copytree(out, tmp_path / "copy")
    done = remove(tmp_path / "copy", ["a03"], RunOptions())
    assert (done.in_bases, done.in_moments) == (("a03",), None)
    remove(out, ["a03"], RunOptions())
    assert tree_digest(tmp_path / "copy") == tree_digest(out)
    before = tree_digest(out)
    with pytest.raises(WorkspaceError, match="no workspace to compute anything anew from"):
        remove(tmp_path / "copy", ["a04"], RunOptions(), refit=True)
    assert tree_digest(tmp_path / "copy") == before
    assert remove(tmp_path / "copy", ["a03"], RunOptions()).in_bases == ("a03",)  # again
    with pytest.raises(UsageError, match="no adapter is named"):
        remove(out, [], RunOptions())


def test_a_checkpoint_is_not_changed_by_a_workspace_that_is_not_its_own(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 4, SUMS), tmp_path / "out"
    go(collection, out)
    go(make_collection(tmp_path / "others", 4, SUMS, seed=1), tmp_path / "other")
    before = tree_digest(out)
    with pytest.raises(WorkspaceError, match="not the one that the checkpoint was made with"):
        remove(out, ["a03"], RunOptions(workspace=default_workspace(tmp_path / "other")), refit=True)
    assert tree_digest(out) == before


def test_names_that_are_not_there_and_the_last_adapter(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    with pytest.raises(UnknownAdapterError, match=r"'a99'.*There are: a0"):
        remove(out, ["a01", "a99"], RunOptions())
    for name in ("../adapters", "..", "", "a01/../a02"):
        with pytest.raises(UnknownAdapterError):
            remove(out, [name], RunOptions())
    with pytest.raises(UsageError, match="no adapter would stay"):
        remove(out, [f"a{i:02}" for i in range(8)], RunOptions())
    with pytest.raises(WorkspaceError, match="no workspace"):
        remove(out, ["a01"], RunOptions(workspace=tmp_path / "nowhere"))
    assert tree_digest(out) == before
    remove(out, [f"a{i:02}" for i in range(1, 8)], RunOptions(), refit=True)
    assert SHAREModel.from_pretrained(out).adapter_names == ["a00"]
    measured(out, collection[:1])


def test_damaged_sums_without_sources_do_not_stop_a_removal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, COLUMNS), tmp_path / "out"
    go(collection, out)
    (chunk,) = default_workspace(out).glob("moments/*/columns_A_40_*/c.0.0.0")  # of q
    chunk.write_bytes(b"torn")
    for folder in collection:
        shutil.rmtree(folder)
    done = remove(out, ["a03"], RunOptions())
    assert (done.in_bases, done.in_moments) == (("a03",), {})
    assert "the moments of q are damaged, and are dropped" in caplog.text
    assert list(markers(out)) == ["v"]


def test_a_checkpoint_that_was_moved_with_its_workspace_is_changed_as_before(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    (tmp_path / "to").mkdir()
    moved = Path(shutil.move(out, tmp_path / "to"))
    shutil.move(default_workspace(out), tmp_path / "to")
    fresh = make_collection(tmp_path / "more", 1, SUMS, seed=1)
    assert add(moved, resolve({"new": fresh[0]}), RunOptions()).method == "projection"
    assert add(moved, resolve({"again": fresh[0]}), RunOptions(accept=1.0)).method == "recompute"
    assert remove(moved, ["a03"], RunOptions(), refit=True).in_bases == ()
    go(collection, tmp_path / "other")
    with pytest.raises(WorkspaceError, match="not the one that the checkpoint was made with"):
        add(moved, resolve({"x": fresh[0]}), RunOptions(workspace=default_workspace(tmp_path / "other")))


def test_an_adapter_whose_files_are_damaged_can_be_taken_out(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    (out / "adapters" / "a03" / "loadings.safetensors").write_bytes(b"torn")
    remove(out, ["a03"], RunOptions())
    assert SHAREModel.from_pretrained(out).config.ours["groups"]["q:A"]["n"] == 28
    measured(out, [p for p in collection if not p.endswith("a03")])


def test_a_removal_that_finds_another_adapter_damaged_takes_nothing_out(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    (out / "adapters" / "a05" / "adapter_meta.json").write_text("{")
    before = tree_digest(out), (default_workspace(out) / "journal.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"'a05'.*is damaged.*Take the adapter out"):
        remove(out, ["a03"], RunOptions())
    assert (tree_digest(out), (default_workspace(out) / "journal.jsonl").read_bytes()) == before
    for name in ("a05", "a03"):  # as it says
        remove(out, [name], RunOptions())
    measured(out, [p for p in collection if p[-3:] not in ("a03", "a05")])


def test_a_module_that_nobody_has_any_more_is_forgotten(tmp_path: Path) -> None:
    collection = make_collection(tmp_path / "adapters", 4, SUMS)
    extra = make_collection(tmp_path / "more", 1, {**SUMS, "k": (20, 12)}, seed=1)
    out = tmp_path / "out"
    go([*collection, extra[0]], out)
    (name,) = {n for n in SHAREModel.from_pretrained(out).adapter_names if n.startswith("a00-")} - {
        SHAREModel.from_pretrained(out).adapter_names[0]
    }
    assert "k" in markers(out)
    remove(out, [name], RunOptions(), refit=True)
    assert "k" not in markers(out)
    assert "k:A" not in SHAREModel.from_pretrained(out).components


def test_the_command(tmp_path: Path, capsys: Capture) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, SUMS), tmp_path / "out"
    go(collection, out)
    assert main(["remove", str(out), "a03", "-q"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("took out a03\nthe bases were fitted to a03 too, and still contain their trace")
    assert "the moments in the workspace still contain a03 (2 modules)" in said
    assert "--refit" in said
    assert main(["remove", str(out), "-q"]) == 2
    capsys.readouterr()
    assert main(["remove", str(out), "--refit", "-q"]) == 0
    assert capsys.readouterr().out.startswith("fitted bases again, without a03\nneither the bases nor the moments")
    assert main(["remove", str(out), "--refit", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "removed": [], "removed_before": [], "in_bases": [], "in_moments": {}, "absent": [],
    }  # fmt: skip
    for gone in (1, 2):
        shutil.rmtree(collection[gone])
    assert main(["remove", str(out), "a01", "--refit", "-q"]) == 1
    captured = capsys.readouterr()
    assert "took out a01" in captured.out
    assert "their trace could not be (found a01). Restore the sources of a02" in captured.err
    assert main(["remove", str(out), "a01", "--refit", "-q", "--json"]) == 1
    again = json.loads(capsys.readouterr().out)
    assert (again["removed"], again["removed_before"], again["absent"]) == ([], ["a01"], ["a02"])
    assert main(["info", str(out)]) == 0
    assert "a01" in capsys.readouterr().out
