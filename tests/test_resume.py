"""The same command again: resumes, adds, changes k; never counts twice, never trusts what is damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashare_stream import pipeline
from lorashare_stream.checkpoint import reader
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.refit import refit
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import AdapterError, StreamError, UsageError, WorkspaceError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages import accumulate
from lorashare_stream.workspace.workspace import Workspace

from .conftest import load_tensors, make_collection, tree_digest, write_adapter

Compress = Callable[..., Path]


def go(sources: list[str], out: Path, progress: Any = pipeline.silent, **options: Any) -> list[AdapterError]:
    settings = Settings.from_mapping({"device": "cpu", "num_components": 5} | options)
    workspace = pipeline.default_workspace(out)
    return compress(
        plan_for(resolve(sources), settings, workspace), out, executor=SerialExecutor(), progress=progress
    ).skipped


class Kill(BaseException):
    """A stop at any point, as a signal brings it."""


@pytest.mark.few(4)
@pytest.mark.parametrize("step", ["ingest", "accumulate", "fit", "project"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_stopped_in_any_step_the_same_call_finishes_with_the_same_bytes(
    tmp_path: Path, collection: list[str], step: str, after: int
) -> None:
    go(collection, tmp_path / "whole" / "out")

    def stop(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for count, result in enumerate(results):
            if name == step and count == after:
                raise Kill
            yield result

    counted: dict[str, int] = {}

    def count(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        counted[name] = total
        return results

    out = tmp_path / "cut" / "out"
    with pytest.raises(Kill):
        go(collection, out, stop)
    assert not out.exists()
    go(collection, out, count)
    assert tree_digest(out) == tree_digest(tmp_path / "whole" / "out")
    total = len(collection) if step in ("ingest", "project") else 3
    redone = 1 if step == "ingest" else 0  # an admission that was not yet written
    left = total - after - 1 + redone
    assert counted[step] == left or (step == "accumulate" and counted[step] < left)  # modules are summed in portions
    assert not list(out.parent.glob(".*"))


def test_a_finished_run_does_nothing_and_another_k_only_fits_and_projects(
    tmp_path: Path, collection: list[str]
) -> None:
    steps: list[tuple[str, int]] = []

    def note(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        steps.append((name, total))
        return results

    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    go(collection, out, note)
    assert steps == [("ingest", 0)]
    assert tree_digest(out) == before
    steps.clear()
    go(collection, out, note, num_components=3)
    assert dict(steps) == {"ingest": 0, "accumulate": 0, "fit": 3, "project": len(collection)}
    go(collection, tmp_path / "fresh", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_more_adapters_are_added_to_the_moments_and_keep_the_names_of_the_first(tmp_path: Path) -> None:
    modules = {"q": (20, 70), "v": (12, 16)}  # with 8 adapters of rank 4 some groups are stacked, with 16 others are
    first, second = make_collection(tmp_path / "x", 8, modules), make_collection(tmp_path / "y", 8, modules, seed=1)
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    go(first, grown)
    names = SHAREModel.from_pretrained(grown).adapter_names
    go(first + second, grown)
    share = SHAREModel.from_pretrained(grown)
    assert share.adapter_names[:8] == names == [f"a{i:02}" for i in range(8)]
    assert all(name.startswith("a0") and len(name) == 3 + 9 for name in share.adapter_names[8:])
    go(first + second, whole)
    other = SHAREModel.from_pretrained(whole)
    for group, facts in share.config.ours["groups"].items():
        assert facts["n"] == other.config.ours["groups"][group]["n"] == 64
        assert facts["explained"] == pytest.approx(other.config.ours["groups"][group]["explained"], abs=1e-6)
        a, b = share.components[group].double(), other.components[group].double()
        assert torch.linalg.matrix_norm(a - b @ (b.T @ a), 2) < 1e-3


def test_sources_that_were_moved_are_told(tmp_path: Path, collection: list[str]) -> None:
    out, now = tmp_path / "out", tmp_path / "now"
    go(collection, out)
    before = Path(collection[0]).parent
    before.rename(now)
    with pytest.raises(WorkspaceError, match=rf"no longer where they were .found {before}/a00, .*Put them back there"):
        go([str(now)], out)
    now.rename(before)
    go(collection, out)


def test_adapters_that_went_missing_or_changed_are_named(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    with pytest.raises(WorkspaceError, match=r"no longer give.*a07"):
        go(collection[:7], out)
    tensors = load_tensors(collection[2])
    write_adapter(Path(collection[2]), {k: v + 1 for k, v in tensors.items()}, r=4, lora_alpha=8)
    with pytest.raises(AdapterError, match=r"'a02'.*has changed since"):
        go(collection, out)
    write_adapter(Path(collection[2]), tensors, r=4, lora_alpha=80)
    with pytest.raises(AdapterError, match=r"'a02'.*adapter_config.json has changed"):
        go(collection, out)
    write_adapter(Path(collection[2]), tensors, r=4, lora_alpha=8)  # another time stamp, the same content
    go(collection, out)


def test_a_workspace_is_bound_to_what_its_numbers_depend_on(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    with pytest.raises(WorkspaceError, match=r"objective=delta.*objective=factors"):
        go(collection, out, objective="factors")


def test_an_output_that_is_not_ours_is_not_touched(tmp_path: Path, collection: list[str]) -> None:
    for name, make in {
        "notes": lambda p: (p.mkdir(), (p / "notes.txt").write_text("dear diary")),
        "link": lambda p: p.symlink_to(tmp_path),
    }.items():
        make(tmp_path / name)
        before = tree_digest(tmp_path / "notes")
        with pytest.raises(UsageError, match=r"no checkpoint|is a link"):
            go(collection, tmp_path / name)
        assert tree_digest(tmp_path / "notes") == before
    go(collection, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(pipeline.default_workspace(tmp_path / "two"), ignore_errors=True)
    with pytest.raises(UsageError, match=r"another run.*overwrite=True"):
        go(collection, tmp_path / "two", num_components=2)


def test_a_second_run_is_told_who_holds_the_workspace(tmp_path: Path, collection: list[str]) -> None:
    go(collection, tmp_path / "out")
    plan = plan_for(resolve(collection), Settings(num_components=5, device="cpu"))
    held = Workspace.open(tmp_path / "out.workspace", plan.binding)
    with held, pytest.raises(WorkspaceError, match=f"another run holds.*pid {os.getpid()}"):
        go(collection, tmp_path / "out")


@pytest.mark.few(3)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("array", ["second", "columns"])
def test_a_damaged_moment_is_found_and_only_its_module_is_summed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, array: str
) -> None:
    collection = make_collection(tmp_path / "adapters", 8, {"q": (14, 70), "v": (14, 70)})
    out = tmp_path / "out"
    go(collection, out)
    (chunk,) = (tmp_path / "out.workspace" / "moments").glob(f"*/{array}_*/c.0.0.0")  # of q
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "flip" else content[:100])
    summed: list[str] = []
    original = accumulate._begin
    monkeypatch.setattr(accumulate, "_begin", lambda s: (summed.append(s.module), original(s))[1])
    go(collection, out, num_components=3)
    assert summed == ["q"]
    go(collection, tmp_path / "fresh", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_a_torn_journal_and_a_torn_adapter_are_done_again(tmp_path: Path, collection: list[str]) -> None:
    go(collection, tmp_path / "whole")
    out = tmp_path / "out"

    def stop(name: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for count, result in enumerate(results):
            yield result
            if name == "project" and count == 3:
                raise Kill

    with pytest.raises(Kill):
        go(collection, out, stop)
    staged = tmp_path / ".out.staging" / "adapters"
    (staged / "a01" / "loadings.safetensors").write_bytes(b"\0" * 50)  # what a power cut may leave
    (staged / "a02" / "adapter_meta.json").write_bytes(b"")
    journal = tmp_path / "out.workspace" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    go(collection, out)
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


def test_a_reader_of_a_replaced_checkpoint_gets_an_error_not_a_wrong_adapter(
    tmp_path: Path, collection: list[str]
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    old = SHAREModel.from_pretrained(out)
    go(collection, out, num_components=3)
    with pytest.raises(StreamError, match="replaced, open it again"):
        old.reconstruct("a00")
    shutil.copy(out / "share_config.json", tmp_path / "new.json")
    go(collection, out, num_components=4)
    shutil.copy(tmp_path / "new.json", out / "share_config.json")
    with pytest.raises(StreamError, match="belongs to another basis"):
        SHAREModel.from_pretrained(out)


def test_runs_that_never_came_to_publish_do_not_make_the_output_a_strangers(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    go(collection, out)

    def killed(*arguments: Any) -> None:
        raise Kill

    for k in (2, 3, 4):
        with monkeypatch.context() as patch:
            patch.setattr("lorashare_stream.checkpoint.staging.publish", killed)
            with pytest.raises(Kill):
                go(collection, out, num_components=k)
    go(collection, out, num_components=6)
    assert SHAREModel.from_pretrained(out).config.num_components == 6


def test_a_crash_between_the_two_renames_is_mended(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    out.rename(tmp_path / ".out.replaced")
    go(collection, out)
    assert tree_digest(out) == before


def flip_line(journal: Path, number: int) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[number] = lines[number].replace(b'"name"', b'"nbme"')
    journal.write_bytes(b"".join(lines))


def test_moments_that_have_seen_a_removal_which_the_journal_lost_are_summed_again(
    tmp_path: Path, collection: list[str]
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    remove(out, ["a07"], RunOptions(), refit=True)
    flip_line(pipeline.default_workspace(out) / "journal.jsonl", -1)
    go(collection, out, num_components=3)
    go(collection, tmp_path / "fresh", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["a line", "all", "gone"])
def test_a_damaged_journal_never_makes_a_checkpoint_smaller(
    tmp_path: Path, collection: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    before = tree_digest(out)
    journal = pipeline.default_workspace(out) / "journal.jsonl"
    if damage == "a line":
        flip_line(journal, 2)
    else:
        journal.write_bytes(b"")
    if damage == "gone":
        journal.unlink()
    for change in (
        lambda: add(out, resolve({"new": fresh[0]}), RunOptions()),
        lambda: remove(out, ["a00"], RunOptions(), refit=True),
        lambda: refit(out, {"num_components": 8}, out, RunOptions()),
    ):
        with pytest.raises(WorkspaceError, match=r"checkpoint has adapters that the workspace has not.*a07"):
            change()
    assert tree_digest(out) == before
    go(collection, out, num_components=3)  # from the sources all is made again
    assert ("the journal is damaged" in caplog.text) == (damage == "a line")
    go(collection, tmp_path / "fresh", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")
    assert add(out, resolve({"new": fresh[0]}), RunOptions(accept=1e-6)).method == "projection"


def test_a_damaged_journal_and_fewer_sources_do_not_make_a_checkpoint_smaller(
    tmp_path: Path, collection: list[str]
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    flip_line(pipeline.default_workspace(out) / "journal.jsonl", 5)
    with pytest.raises(WorkspaceError, match=r"has not, and the sources do not give .*a06, a07"):
        go(collection[:6], out)
    assert tree_digest(out) == before
    go(collection, out)
    assert tree_digest(out) == before


def test_a_damaged_tombstone_brings_nobody_back(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    remove(out, ["a01"], RunOptions(), refit=True)
    flip_line(pipeline.default_workspace(out) / "journal.jsonl", -1)
    with pytest.raises(WorkspaceError, match=r"workspace has adapters that the checkpoint has not.*a01"):
        add(out, resolve({"new": fresh[0]}), RunOptions())
    assert "a01" not in SHAREModel.from_pretrained(out).adapter_names


def test_an_adapter_that_changes_during_a_run_does_not_reach_the_moments(tmp_path: Path, collection: list[str]) -> None:
    go(collection, tmp_path / "whole")
    weights = Path(collection[2]) / "adapter_model.safetensors"
    original = weights.read_bytes()

    def change(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        if step == "accumulate":
            weights.write_bytes(original[:-4] + b"abcd")
        yield from results

    with pytest.raises(AdapterError, match=r"'a02': the adapter was changed while the run was reading it"):
        go(collection, tmp_path / "out", change)
    weights.write_bytes(original)
    go(collection, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")


def test_moments_that_changed_places_are_not_taken_for_each_other(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, {"q": (20, 30), "v": (20, 30)}), tmp_path / "out"
    go(collection, out)
    workspace = pipeline.default_workspace(out)
    pairs = [workspace.glob(f"moments/*/{name}_B_30*/c.?.*") for name in ("columns", "sum_of_columns")]
    for a, b in map(sorted, [*pairs, (workspace / "markers").iterdir()]):
        a.rename(workspace / "aside")
        b.rename(a)
        (workspace / "aside").rename(b)
    go(collection, out, num_components=3)
    go(collection, tmp_path / "fresh", num_components=3)
    assert tree_digest(out) == tree_digest(tmp_path / "fresh")


def test_shapes_of_an_adapter_that_was_taken_out_are_not_needed(tmp_path: Path) -> None:
    collection, out = make_collection(tmp_path / "adapters", 8, {"q": (40, 50)}), tmp_path / "out"
    (big,) = make_collection(tmp_path / "big", 1, {"q": (40, 50)}, r=8)
    settings = Settings(num_components=5, device="cpu")
    compress(plan_for([*resolve(collection), *resolve({"big": big})], settings), out)
    before = set((pipeline.default_workspace(out) / "shapes").iterdir())
    remove(out, ["big"], RunOptions())
    for path in before:
        path.write_text("{}")
    go(collection, out, num_components=3)
    go(collection, tmp_path / "fresh", num_components=3)
    a, b = (SHAREModel.from_pretrained(p).config.ours["groups"] for p in (out, tmp_path / "fresh"))
    assert all(a[g]["explained"] == pytest.approx(b[g]["explained"], abs=1e-6) for g in b)
    (path,) = set((pipeline.default_workspace(out) / "shapes").iterdir()) - {p for p in before if p.read_text() == "{}"}
    path.write_text("{}")
    for folder in collection:
        shutil.rmtree(folder)
    with pytest.raises(WorkspaceError, match=r"'a00': the workspace is damaged"):
        add(out, resolve({"big": big}), RunOptions())


def test_a_reader_that_is_overtaken_between_two_files_gets_an_error(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    go(collection, out)
    share = SHAREModel.from_pretrained(out)
    real = reader._load

    def overtaken(path: Path) -> Any:
        monkeypatch.setattr(reader, "_load", real)
        go(collection, out, num_components=3)
        return real(path)

    monkeypatch.setattr(reader, "_load", overtaken)
    with pytest.raises(StreamError, match="was replaced, open it again"):
        share.all_loadings["a00"]


def test_a_checkpoint_that_lost_a_file_is_not_up_to_date(tmp_path: Path, collection: list[str]) -> None:
    out = tmp_path / "out"
    go(collection, out)
    before = tree_digest(out)
    for lost in ("shared_components.safetensors", "adapters/a03/loadings.safetensors"):
        (out / lost).unlink()
        go(collection, out)
        assert tree_digest(out) == before
    (out / "adapters" / "a03" / "adapter_meta.json").write_text("{}")
    for change in (
        lambda: remove(out, ["a00"], RunOptions()),
        lambda: refit(out, {"num_components": 2}, tmp_path / "small", RunOptions()),
    ):
        with pytest.raises(StreamError, match=r"'a03': adapter_meta.json is damaged"):
            change()
    remove(out, ["a03"], RunOptions())
    (out / "adapters" / "a04" / "loadings.safetensors").write_bytes(b"torn")
    with pytest.raises(StreamError, match=r"'a04': loadings.safetensors is damaged"):
        refit(out, {"num_components": 2}, tmp_path / "small", RunOptions())


def test_damaged_components_are_not_projected_on(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    before = tree_digest(out)
    content = bytearray((out / "shared_components.safetensors").read_bytes())
    content[-3] ^= 1
    (out / "shared_components.safetensors").write_bytes(content)
    message = r"shared_components.safetensors is damaged.*Delete the checkpoint, not"
    with pytest.raises(StreamError, match=message):
        refit(out, {"num_components": 2}, tmp_path / "small", RunOptions())
    shutil.copytree(out, tmp_path / "damaged")
    with pytest.raises(StreamError, match=message):
        add(tmp_path / "damaged", resolve({"new": fresh[0]}), RunOptions(accept=1e-6))
    shutil.rmtree(out)
    go(collection, out)  # from the workspace
    assert tree_digest(out) == before


def test_cutting_in_place_again_changes_nothing(tmp_path: Path, collection: list[str]) -> None:
    out, fresh = tmp_path / "out", make_collection(tmp_path / "more", 1, seed=1)
    go(collection, out)
    add(out, resolve({"new": fresh[0]}), RunOptions(accept=1e-6))
    assert refit(out, {"num_components": 2}, out, RunOptions()) == "sliced"
    before = tree_digest(out)
    assert refit(out, {"num_components": 2}, out, RunOptions()) == "current"
    assert tree_digest(out) == before
