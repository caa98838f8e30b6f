"""Adapters are added: on the bases that are there where these hold them well, else on bases fitted to all."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lorashare
import numpy as np
import pytest
import torch

from lorashare_stream.checkpoint.publish import replaced_folder
from lorashare_stream.cli.app import main
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import AdapterError, CheckpointError, CollectionError, UsageError, WorkspaceError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import Outcome, compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify
from lorashare_stream.workspace.workspace import Workspace

from .conftest import MODULES, load_tensors, make_collection, make_tensors, tree_digest, write_adapter

Capture = pytest.CaptureFixture[str]
ANY = RunOptions(accept=1e-6)
ALL = RunOptions(accept=1.0)


def go(sources: list[str], out: Path, **options: Any) -> Outcome:
    settings = Settings.from_mapping({"device": "cpu", "num_components": 6} | options)
    return compress(plan_for(resolve(sources), settings, default_workspace(out)), out)


def check_certified(out: Path, sources: list[str]) -> None:
    share = SHAREModel.from_pretrained(out)
    verdicts = list(verify(share, originals_of(share, resolve(sources))))
    assert len(verdicts) == len(sources)
    assert [v.problem for v in verdicts] == [None] * len(verdicts)


@pytest.fixture
def strangers(tmp_path: Path) -> list[str]:
    """Adapters of which the bases of the others hold little."""
    rng = np.random.default_rng(7)
    folders = []
    for i in range(2):
        tensors = make_tensors(rng, MODULES)
        noise = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in tensors.items()}
        folders.append(str(write_adapter(tmp_path / "strangers" / f"s{i}", noise)))
    return folders


def files_of(out: Path) -> dict[str, int]:
    """Path -> inode of every file of a checkpoint."""
    return {str(p.relative_to(out)): p.stat().st_ino for p in out.rglob("*") if p.is_file()}


@pytest.mark.parametrize("links", [True, False])
def test_what_stays_is_the_same_file_where_the_disk_has_links(
    tmp_path: Path, collection: list[str], links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    (out / "README.md").write_text("of the user")
    share, before, content = SHAREModel.from_pretrained(out), files_of(out), tree_digest(out)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    add(out, resolve({"new": fresh[0]}), RunOptions())
    remove(out, ["a03"], RunOptions())
    stays = {k for k in before if not k.startswith(("adapters/a03/", "share_config.json"))}
    assert all(tree_digest(out)[k] == content[k] for k in stays)
    assert all((files_of(out)[k] == before[k]) is links for k in stays - {"README.md"})
    assert share.reconstruct("a05")  # by a reader that was open all the while
    assert [p.name for p in tmp_path.glob(".out*")] == []


def test_a_reader_between_two_renames_looks_again(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    share, aside = SHAREModel.from_pretrained(out), replaced_folder(out)
    for read in (lambda: SHAREModel.from_pretrained(out), lambda: share.reconstruct("a02")):
        out.rename(aside)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: (time.sleep(0.2), aside.rename(out)))
            assert read()


@pytest.mark.parametrize("way", ["add", "compress"])
def test_what_the_bases_hold_well_is_projected_and_nothing_else_changes(
    tmp_path: Path, collection: list[str], way: str
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 3, seed=1)
    go(collection, out)
    before = tree_digest(out)
    named = {f"m{i}": path for i, path in enumerate(fresh)}
    if way == "add":
        outcome = add(out, resolve(named), RunOptions())
    else:
        settings = Settings(device="cpu", num_components=6)
        outcome = compress(plan_for([*resolve(collection), *resolve(named)], settings, default_workspace(out)), out)
    assert outcome.method == "projection"
    assert outcome.kept.keys() == set(named)
    after = tree_digest(out)
    assert {k: v for k, v in after.items() if k in before and k != "share_config.json"} == {
        k: v for k, v in before.items() if k != "share_config.json"
    }
    assert {k.split("/")[1] for k in after.keys() - before.keys()} == set(named)
    share = SHAREModel.from_pretrained(out)
    assert share.adapter_names == [*(f"a{i:02}" for i in range(8)), *named]
    assert share.config.num_adapters == 11
    assert share.config.ours["projected"] == list(named)
    for name, path in named.items():
        kept = 1 - share.certified(name)["relative_error"] ** 2
        assert kept == pytest.approx(outcome.kept[name])
        assert kept >= share.config.variance_threshold
        assert share.config.ours["groups"]["layers.0.q:A"]["n"] == 44
        theirs = lorashare.SHAREModel.from_pretrained(out).reconstruct(name)
        ours = share.reconstruct(name)
        assert theirs.keys() == ours.keys() == load_tensors(path).keys()
        assert all(torch.allclose(theirs[k], ours[k], atol=1e-6) for k in ours)
    check_certified(out, [*collection, *fresh])


def test_added_again_or_nothing_new_is_no_change(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 2, seed=1)
    go(collection, out)
    assert add(out, resolve(collection[2:4]), RunOptions()).method == "current"
    assert add(out, resolve(fresh), RunOptions()).method == "projection"
    before = tree_digest(out)
    assert add(out, resolve([*fresh, *collection]), RunOptions()).method == "current"
    assert go([*collection, *fresh], out).method == "current"
    assert tree_digest(out) == before


def test_what_the_bases_do_not_hold_is_fitted_with_all_as_from_scratch(
    tmp_path: Path, collection: list[str], strangers: list[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    go(collection, out)
    outcome = add(out, resolve(strangers), RunOptions())
    assert outcome.method == "recompute"
    assert all(share < 0.95 for share in outcome.kept.values())
    go([*collection, *strangers], whole)
    a, b = SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(whole)
    assert a.adapter_names == b.adapter_names
    assert a.config.ours["projected"] == []
    for group, explained in b.config.compression_stats["per_layer_explained_variance"].items():
        assert a.config.compression_stats["per_layer_explained_variance"][group] == pytest.approx(explained, abs=1e-6)
        assert a.config.ours["groups"][group]["energy"] == pytest.approx(
            b.config.ours["groups"][group]["energy"], rel=1e-6
        )
    check_certified(out, [*collection, *strangers])


def test_moments_take_new_adapters_in_either_way(tmp_path: Path, collection: list[str]) -> None:
    out, whole, fresh = tmp_path / "out", tmp_path / "whole", make_collection(tmp_path / "more", 3, seed=1)
    go(collection, out)
    add(out, resolve({f"m{i}": p for i, p in enumerate(fresh)}), ANY)
    work = Workspace(default_workspace(out))
    assert {marker.entries for marker in work.markers.values()} == {11}
    settings = Settings(device="cpu", num_components=6)
    sources = [*resolve(collection), *resolve({f"m{i}": p for i, p in enumerate(fresh)})]
    outcome = compress(plan_for(sources, settings, default_workspace(out)), out, refit=True)  # no moment pass
    assert outcome.method == "recompute"
    compress(plan_for(sources, settings, default_workspace(whole)), whole)
    for share in (SHAREModel.from_pretrained(out), SHAREModel.from_pretrained(whole)):
        assert share.config.ours["projected"] == []
    a, b = (SHAREModel.from_pretrained(p).config.ours["groups"] for p in (out, whole))
    assert all(a[g]["explained"] == pytest.approx(b[g]["explained"], abs=1e-6) for g in b)


def test_gone_sources_stop_a_refit_and_the_loss_of_doing_without_is_told(
    tmp_path: Path, collection: list[str], strangers: list[str]
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    shutil.rmtree(collection[3])
    with pytest.raises(CollectionError, match=r"sources are gone; what is lossy already is not compressed") as caught:
        add(out, resolve(strangers), RunOptions())
    assert "'a03'" in str(caught.value)
    assert tree_digest(out) == before
    threshold = float(str(caught.value).split("variance_threshold=")[1].split()[0].rstrip("."))
    outcome = add(out, resolve(strangers), RunOptions(accept=threshold))
    assert outcome.method == "projection"
    assert f"s0 {outcome.kept['s0']:.4f}" in str(caught.value)
    share = SHAREModel.from_pretrained(out)
    assert share.certified("s0")["relative_error"] == pytest.approx((1 - outcome.kept["s0"]) ** 0.5)


def test_a_projection_needs_no_source_but_that_of_the_new_adapter(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    for folder in collection:
        shutil.rmtree(folder)
    assert add(out, resolve({"new": fresh[0]}), RunOptions()).method == "projection"
    assert SHAREModel.from_pretrained(out).adapter_names[-1] == "new"


def test_new_modules_need_new_bases(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    wider = make_collection(tmp_path / "more", 1, {**MODULES, "layers.9.q": (40, 24)}, seed=1)
    outcome = add(out, resolve({"wide": wider[0]}), ANY)
    assert (outcome.method, outcome.kept) == ("recompute", {"wide": 0.0})
    assert "layers.9.q:A" in SHAREModel.from_pretrained(out).components
    shutil.rmtree(collection[0])
    wider = make_collection(tmp_path / "yet", 1, {"layers.8.q": (40, 24)}, seed=1)
    with pytest.raises(CollectionError, match="sources are gone") as caught:
        add(out, resolve({"wider": wider[0]}), ANY)
    assert "variance" not in str(caught.value)  # no share of it can be had without a basis


def test_shapes_in_the_workspace_bind_when_its_sources_are_gone(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    for folder in collection:
        shutil.rmtree(folder)
    other = make_collection(tmp_path / "more", 3, {"layers.0.q": (48, 24)}, seed=1)
    with pytest.raises(CollectionError, match=r"d_in = 48; expected d_in = 40"):
        add(out, resolve(other), RunOptions())


def test_without_a_workspace_adapters_can_be_projected_only(
    tmp_path: Path, collection: list[str], strangers: list[str]
) -> None:
    out, with_it, fresh = tmp_path / "out", tmp_path / "with", make_collection(tmp_path / "more", 2, seed=1)
    for place in (out, with_it):
        go(collection, place)
    shutil.rmtree(default_workspace(out))
    named = {f"m{i}": path for i, path in enumerate(fresh)}
    assert add(out, resolve(named), RunOptions()).method == "projection"
    assert add(with_it, resolve(named), RunOptions()).method == "projection"
    assert tree_digest(out) == tree_digest(with_it)
    assert add(out, resolve(named), RunOptions()).method == "current"
    with pytest.raises(
        WorkspaceError, match=r"no workspace with the moments .*s0, s1.*by workspace.*variance_threshold="
    ):
        add(out, resolve(strangers), RunOptions())
    other = make_collection(tmp_path / "other", 1, {"layers.0.q": (48, 24)}, seed=1)
    with pytest.raises(CollectionError, match=r"'o'.*found d_in = 48; expected d_in = 40"):
        add(out, resolve({"o": other[0]}), RunOptions())
    with pytest.raises(WorkspaceError, match="no workspace"):
        add(out, resolve(strangers), RunOptions(workspace=tmp_path / "nowhere"))


def test_a_vanishing_adapter_is_kept_exact(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    zero = {k: v * 0 if "lora_B" in k else v for k, v in load_tensors(collection[0]).items()}
    write_adapter(tmp_path / "zero", zero)
    outcome = add(out, resolve([str(tmp_path / "zero")]), ALL)
    assert (outcome.method, outcome.kept) == ("projection", {"zero": 1.0})
    share = SHAREModel.from_pretrained(out)
    assert share.config.ours["projected"] == []
    found = share.reconstruct("zero")
    assert all(np.array_equal(found[k].numpy(), v) for k, v in zero.items())
    remove(out, ["zero"], RunOptions())
    assert SHAREModel.from_pretrained(out).config.ours["groups"] == share.config.ours["groups"]


def test_a_changed_old_source_is_named(tmp_path: Path, collection: list[str], strangers: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    write_adapter(Path(collection[1]), {k: v + 1 for k, v in load_tensors(collection[1]).items()}, lora_alpha=8)
    with pytest.raises(AdapterError, match=r"'a01'.*has changed since"):
        add(out, resolve(strangers), RunOptions())


def test_only_a_checkpoint_of_ours_grows(tmp_path: Path, collection: list[str], strangers: list[str]) -> None:
    lorashare.SHAREModel.from_adapters(collection, num_components=4).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="not written by lorashare-stream"):
        add(tmp_path / "theirs", resolve(strangers), RunOptions())


def test_a_removal_without_the_workspace_is_not_undone_by_an_addition_with_it(
    tmp_path: Path, collection: list[str]
) -> None:
    out, elsewhere, fresh = tmp_path / "out", tmp_path / "W", make_collection(tmp_path / "more", 1, seed=1)
    settings = Settings(device="cpu", num_components=6)
    compress(plan_for(resolve(collection), settings), out, workspace=elsewhere)
    remove(out, ["a03"], RunOptions())
    with pytest.raises(WorkspaceError, match=r"workspace has adapters that the checkpoint has not.*a03"):
        add(out, resolve({"new": fresh[0]}), RunOptions(workspace=elsewhere))
    with pytest.raises(WorkspaceError, match="a03"):
        refit(out, {}, out, RunOptions(workspace=elsewhere))
    with pytest.raises(WorkspaceError, match="a03"):
        remove(out, ["a04"], RunOptions(workspace=elsewhere), refit=True)
    assert remove(out, ["a03"], RunOptions(workspace=elsewhere)).in_bases == ("a03",)
    assert add(out, resolve({"new": fresh[0]}), RunOptions(workspace=elsewhere)).method == "projection"
    assert "a03" not in SHAREModel.from_pretrained(out).adapter_names


def test_an_addition_without_the_workspace_is_not_lost_with_it(tmp_path: Path, collection: list[str]) -> None:
    out, elsewhere, fresh = tmp_path / "out", tmp_path / "W", make_collection(tmp_path / "more", 2, seed=1)
    compress(plan_for(resolve(collection), Settings(device="cpu", num_components=6)), out, workspace=elsewhere)
    add(out, resolve({"m0": fresh[0]}), RunOptions())
    for change in (
        lambda: add(out, resolve({"m1": fresh[1]}), RunOptions(workspace=elsewhere)),
        lambda: remove(out, ["a03"], RunOptions(workspace=elsewhere), refit=True),
        lambda: refit(out, {"num_components": 8}, tmp_path / "larger", RunOptions(workspace=elsewhere)),
    ):
        with pytest.raises(WorkspaceError, match=r"checkpoint has adapters that the workspace has not.*m0"):
            change()
    assert SHAREModel.from_pretrained(out).config.num_adapters == 9


def test_an_addition_that_failed_waits_for_its_end_and_is_not_published_by_another(
    tmp_path: Path, collection: list[str], strangers: list[str]
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    shutil.move(collection[3], tmp_path / "away")
    with pytest.raises(CollectionError, match=r"take out s0, which the workspace has by now"):
        add(out, resolve(strangers[:1]), RunOptions())
    shutil.move(tmp_path / "away", collection[3])
    for change in (
        lambda: add(out, resolve({"m": fresh[0]}), RunOptions()),
        lambda: refit(out, {"num_components": 8}, tmp_path / "larger", RunOptions()),
        lambda: remove(out, ["a00"], RunOptions(), refit=True),
    ):
        with pytest.raises(WorkspaceError, match=r"workspace has adapters that the checkpoint has not.*s0"):
            change()
    remove(out, ["s0"], RunOptions(), refit=True)
    assert add(out, resolve({"m": fresh[0]}), RunOptions()).method == "projection"


def test_what_must_be_kept_is_asked_for_once_and_not_recorded(
    tmp_path: Path, collection: list[str], strangers: list[str]
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 2, seed=1)
    go(collection, out, num_components="auto")
    k = SHAREModel.from_pretrained(out).config.num_components
    assert add(out, resolve({"m0": fresh[0]}), RunOptions(accept=0.3)).method == "projection"
    assert add(out, resolve(strangers[:1]), RunOptions(accept=1.0)).method == "recompute"
    config = SHAREModel.from_pretrained(out).config
    assert config.variance_threshold == config.ours["settings"]["variance_threshold"] == 0.95
    assert config.num_components >= k
    assert add(out, resolve({"m1": fresh[1]}), RunOptions(accept=1e-6)).method == "projection"


def test_adapters_of_one_source_and_names_that_are_taken(tmp_path: Path, collection: list[str]) -> None:
    for workspace in (True, False):
        out = tmp_path / f"out{workspace}"
        go(collection, out)
        if not workspace:
            shutil.rmtree(default_workspace(out))
        assert add(out, resolve({"twin": collection[0]}), ANY).method == "projection"
        assert add(out, resolve({"a00": collection[0], "twin": collection[0]}), ANY).method == "current"
        with pytest.raises(UsageError, match="an adapter named 'a00' already"):
            add(out, resolve({"a00": collection[1]}), ANY)
        assert SHAREModel.from_pretrained(out).config.num_adapters == 9


def test_a_changed_adapter_is_named_without_a_workspace_too(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    shutil.rmtree(default_workspace(out))
    write_adapter(Path(collection[1]), {k: v + 1 for k, v in load_tensors(collection[1]).items()}, r=4, lora_alpha=8)
    with pytest.raises(AdapterError, match=r"'a01'.*has changed since it was compressed.*remove, then add it again"):
        add(out, resolve(collection[:2]), RunOptions())


def test_adapters_that_were_left_out_stay_listed(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    bad = write_adapter(tmp_path / "bad", {k: v * np.nan for k, v in load_tensors(collection[0]).items()})
    go([*collection, str(bad)], out, on_error="skip")
    assert add(out, resolve(collection[:1]), RunOptions()).method == "current"
    add(out, resolve({"new": fresh[0]}), RunOptions())
    assert [e["adapter"] for e in json.loads((out / "skipped.json").read_text())] == ["bad"]
    assert SHAREModel.from_pretrained(out).config.ours["num_skipped"] == 1


def test_a_cut_checkpoint_grows_like_any_other(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out, num_components=8)
    assert refit(out, {"num_components": 6}, out, RunOptions()) == "sliced"
    shutil.rmtree(collection[0])
    assert add(out, resolve({"new": fresh[0]}), RunOptions()).method == "projection"


def test_a_link_to_a_checkpoint_leads_to_its_workspace(tmp_path: Path, collection: list[str]) -> None:
    go(collection, tmp_path / "out")
    (tmp_path / "current").symlink_to(tmp_path / "out")
    done = remove(tmp_path / "current", ["a03"], RunOptions())
    assert done.in_moments is not None
    assert "a03" not in {r.name for r in Workspace(default_workspace(tmp_path / "out")).journal().admissions}


def test_several_at_once_are_refused_before_anything_is_done(tmp_path: Path, collection: list[str]) -> None:
    make_collection(tmp_path / "more", 3, seed=1)
    share = SHAREModel.from_adapters(collection, num_components=6, device="cpu")
    with pytest.raises(ValueError, match="one adapter can be added at a time"):
        share.add_adapter(str(tmp_path / "more"))
    assert share.config.num_adapters == len(SHAREModel.from_pretrained(share._folder().root).adapter_names) == 8


def test_the_command(
    tmp_path: Path, collection: list[str], strangers: list[str], capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    assert call("compress", *collection, "-o", out, "-k", 6, "-q")[0] == 0
    code, said, _ = call("add", out, fresh[0], "--names", "new")
    assert code == 0
    assert re.match(r"added new on the bases that were there, for [\d.]+ KiB\nnew  keeps 0\.9", said)
    assert "1 adapter (new) was projected on the bases that are there" in caplog.text
    code, said, _ = call("add", out, *strangers, "--json", "-q")
    result = json.loads(said)
    assert (code, result["method"], result["added"]) == (0, "recompute", ["s0", "s1"])
    assert call("add", out, fresh[0], "--names", "new", "-q")[1].startswith("nothing to add")
    bad = write_adapter(tmp_path / "bad", {k: v * np.nan for k, v in load_tensors(collection[0]).items()})
    code, said, told = call("add", out, bad, "-q")
    assert code == 1
    assert "'bad'" in told
    code, said, told = call("add", out, bad, "--on-error", "skip", "-q")
    assert (code, SHAREModel.from_pretrained(out).config.num_adapters) == (3, 11)
    assert "left out 1 adapter" in told
    assert call("add", tmp_path / "nowhere", fresh[0])[0] == 1


def test_from_python_as_lorashare_does(tmp_path: Path, collection: list[str], strangers: list[str]) -> None:
    fresh = make_collection(tmp_path / "more", 2, seed=1)
    share = SHAREModel.from_adapters(collection, num_components=6, device="cpu")
    first = share.add_adapter(fresh[0], name="new")
    assert (first["method"], first["adapter_name"]) == ("projection", "new")
    assert first["min_explained_variance"] == first["mean_explained_variance"] > 0.95
    assert share.add_adapter(strangers[0])["method"] == "recompute"
    assert share.add_adapter(fresh[1], name="newer", force_recompute=True) == {
        "method": "recompute", "adapter_name": "newer",
    }  # fmt: skip
    assert share.adapter_names[-3:] == ["new", "s0", "newer"]
    assert share.reconstruct("newer").keys() == load_tensors(fresh[1]).keys()
    with pytest.raises(ValueError, match="already"):
        share.add_adapter(fresh[1], name="new")
    with pytest.raises(ValueError, match="has this adapter already"):
        share.add_adapter(strangers[0])
    share.remove_adapter("new")
    assert "new" not in share.adapter_names
    with pytest.raises(KeyError):
        share.remove_adapter("new")


def test_what_is_there_already_under_another_name_is_told(
    tmp_path: Path, collection: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Sources that were moved are other adapters than those that are there, whatever they hold."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(collection[1], tmp_path / "b1")
    assert main(["compress", *collection, str(tmp_path / "b1"), "-o", str(out), "-k", "6"]) == 0
    assert "1 adapter has the weights and the configuration of another one: b1 = a01; " in caplog.text
    shutil.move(Path(collection[0]).parent, moved)
    for n in (2, 1):
        if n == 1:
            shutil.rmtree(default_workspace(out))
        caplog.clear()
        assert main(["add", str(out), *(str(moved / f"a{i:02}") for i in range(n)), "--variance", "0.01"]) == 0
        found = [r.message for r in caplog.records if "another one" in r.message]
        assert len(found) == 1, found
        assert re.match(
            rf"{n} adapters? ha\w+ the weights and the configuration of another one: a00-\w+ = a00", found[0]
        )
        again = [name for name in SHAREModel.from_pretrained(out).adapter_names if "-" in name]
        assert main(["remove", str(out), *again, "-q"]) == 0


def test_that_it_is_there_already_is_told_where_bases_do_not_do(
    tmp_path: Path, collection: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    go(collection, out, num_components=2)
    Path(collection[0]).parent.rename(moved)
    assert main(["add", str(out), str(moved / "a00")]) == 1
    assert "1 adapter has the weights and the configuration of another one: a00-" in caplog.text


def test_sources_behind_a_link_are_said_to_have_moved(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    out, folder = tmp_path / "out", Path(collection[0]).parent
    assert main(["compress", str(folder), "-o", str(out), "-k", "4", "-q"]) == 0
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert main(["compress", str(folder), "-o", str(out), "-k", "4", "-q"]) == 1
    assert "adapters of the workspace are no longer where they were (found " in capsys.readouterr().err


def test_without_a_workspace_no_refit_is_promised(
    tmp_path: Path, collection: list[str], strangers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    shutil.rmtree(default_workspace(out))
    assert main(["add", str(out), strangers[0]]) == 1
    assert "(0." in caplog.text
    assert "fitted again" not in caplog.text
    assert main(["add", str(out), strangers[0], "--variance", "0.001"]) == 0
    assert "there is no workspace from which the bases could be fitted to all" in caplog.text
    assert "refit" not in caplog.text


def test_one_that_no_basis_was_fitted_to_is_taken_out_without_a_word_of_bases(
    tmp_path: Path, collection: list[str], strangers: list[str], capsys: Capture
) -> None:
    """It is in the workspace since it was to be added, and bases could not be fitted while a source was gone."""
    out = tmp_path / "out"
    go(collection, out)
    shutil.move(collection[0], tmp_path / "gone")
    assert main(["add", str(out), strangers[0], "-q"]) == 1
    assert "take out s0, which the workspace has by now" in capsys.readouterr().err
    before = tree_digest(out)
    shutil.move(tmp_path / "gone", collection[0])
    assert main(["remove", str(out), "s0", "--refit", "-q"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("took out s0\n")
    assert "fitted" not in said
    assert tree_digest(out) == before
