"""The same command again: resumes, adds, changes k; never counts twice, never trusts what is damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashare_stream import pipeline, tasks
from lorashare_stream.errors import AdapterError, StreamError, UsageError, WorkspaceError
from lorashare_stream.executors import Serial
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.settings import Settings
from lorashare_stream.sources import resolve
from lorashare_stream.workspace import Workspace

from .conftest import load_tensors, make_collection, tree_digest, write_adapter

Compress = Callable[..., Path]


def go(sources: list[str], out: Path, progress: Any = pipeline.silent, **options: Any) -> list[AdapterError]:
    settings = Settings.from_mapping({"device": "cpu", "num_components": 5} | options)
    workspace = pipeline.default_workspace(out)
    return compress(plan_for(resolve(sources), settings, workspace), out, executor=Serial(), progress=progress).skipped


class Kill(BaseException):
    """A stop at any point, as a signal brings it."""


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
    assert counted[step] == total - after - 1 + redone
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
        with pytest.raises(UsageError, match=r"no SHARE checkpoint|is a link"):
            go(collection, tmp_path / name)
        assert tree_digest(tmp_path / "notes") == before
    go(collection, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(pipeline.default_workspace(tmp_path / "two"), ignore_errors=True)
    with pytest.raises(UsageError, match=r"another run.*--overwrite"):
        go(collection, tmp_path / "two", num_components=2)


def test_a_second_run_is_told_who_holds_the_workspace(tmp_path: Path, collection: list[str]) -> None:
    go(collection, tmp_path / "out")
    plan = plan_for(resolve(collection), Settings(num_components=5, device="cpu"))
    held = Workspace.open(tmp_path / "out.workspace", plan.binding)
    with held, pytest.raises(WorkspaceError, match=f"another run holds.*pid {os.getpid()}"):
        go(collection, tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("array", ["second", "columns"])
def test_a_damaged_moment_is_found_and_only_its_module_is_summed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, array: str
) -> None:
    collection = make_collection(tmp_path / "adapters", 8, {"q": (20, 70), "v": (20, 70)})
    out = tmp_path / "out"
    go(collection, out)
    (chunk,) = (tmp_path / "out.workspace" / "moments").glob(f"q-*/*/*/{array}/c/0/0")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        chunk.unlink()
    else:
        chunk.write_bytes(content if damage == "flip" else content[:100])
    summed: list[str] = []
    original = tasks.accumulate._accumulate
    monkeypatch.setattr(
        "lorashare_stream.tasks.accumulate._accumulate", lambda j, m: (summed.append(m), original(j, m))
    )
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
            patch.setattr("lorashare_stream.checkpoint.publish", killed)
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
