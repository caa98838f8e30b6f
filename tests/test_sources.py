from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lorashare_stream.cli.app import main
from lorashare_stream.errors import UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of

from .conftest import make_collection, tree_digest


def names(sources: object) -> list[str]:
    return [s.wanted_name for s in resolve(sources)]


def test_folders_folders_of_folders_globs_and_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_collection(tmp_path / "deep" / "er", 3)
    all_of_them = ["a00", "a01", "a02"]
    assert names([tmp_path / "deep"]) == all_of_them
    assert names([tmp_path / "deep" / "er" / "a01"]) == ["a01"]
    assert names([str(tmp_path / "deep" / "*" / "a0[12]")]) == ["a01", "a02"]
    assert names([str(tmp_path / "**")]) == all_of_them
    monkeypatch.chdir(tmp_path / "deep")
    assert names(["er/a00", "er/a02"]) == ["a00", "a02"]
    (tmp_path / "list.txt").write_text("# a comment\n\ndeep/er/a01\ndeep/er/a0[02]\n")
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"name": "x", "path": "deep/er/a01"}) + '\n{"path": "deep/er/a02"}\n'
    )
    (tmp_path / "list.yaml").write_text("- name: y\n  path: deep/er/a00\n- deep/er/a02\n")
    assert names([tmp_path / "list.txt"]) == ["a01", "a00", "a02"]
    assert names([tmp_path / "list.jsonl"]) == ["x", "a02"]
    assert names([tmp_path / "list.yaml"]) == ["y", "a02"]
    assert names({"p": str(tmp_path / "deep/er/a00"), "q": str(tmp_path / "deep/er/a00")}) == ["p", "q"]


def test_a_folder_is_taken_once_and_a_given_name_wins(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "x", 2)
    (tmp_path / "list.jsonl").write_text(json.dumps({"name": "chosen", "path": "x/a00"}))
    assert names([*folders, tmp_path / "x", folders[0] + "/"]) == ["a00", "a01"]
    assert names([tmp_path / "x", tmp_path / "list.jsonl"]) == ["a01", "chosen"]


def test_training_checkpoints_below_an_adapter_are_not_taken_for_adapters(tmp_path: Path) -> None:
    make_collection(tmp_path / "x", 1)
    make_collection(tmp_path / "x" / "a00" / "checkpoint-100", 1)
    assert names([tmp_path]) == ["a00"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such source: 'nowhere'"),
        ("", "an empty source"),
        ("*nothing*", "no adapter matches"),
        ("empty", "no adapter in .*empty.*found nothing"),
        ("notes.md", "not a manifest"),
        ("adapter_model.safetensors", "Name the folder"),
        ("none.txt", "names no adapter"),
        ("nested.txt", "names another manifest"),
        ("bad.jsonl", "line 1: not JSON"),
        ("field.jsonl", "unknown field.*colour"),
        ("number.yaml", "entry 1: not a source"),
        ("mapping.yaml", "is not a list"),
        ("latin.txt", "not UTF-8"),
        ("name.jsonl", "key 'name': manifest .*name.jsonl, entry 1: .*found 3; expected a valid string"),
        ("twice.yaml", "twice.yaml gives two adapters the name 'X' .found a, b"),
        ("org.jsonl", "entry 1: unknown field .found colour; expected base_model, downloads, files"),
        ("nul\0", "NUL character"),
    ],
)
def test_what_is_no_source_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, text in {
        "notes.md": "x", "adapter_model.safetensors": "x", "none.txt": "# only a comment\n", "nested.txt": "none.txt\n",
        "bad.jsonl": "{\n", "field.jsonl": '{"path": "x", "colour": 1}\n', "number.yaml": "- 3\n",
        "mapping.yaml": "a: 1\n", "name.jsonl": '{"path": "x", "name": 3}\n',
        "org.jsonl": '{"repo": "org/x", "colour": 1}',
        "twice.yaml": "- {name: x, path: a}\n- {name: x, path: a}\n- {name: X, path: b}\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UsageError, match=message):
        resolve([source])


def test_what_is_not_there_and_may_be_on_the_hub_is_asked_for_there(tmp_path: Path) -> None:
    make_collection(tmp_path, 1)
    (source,) = resolve(["org/name"])
    assert source.hub is not None
    assert source.wanted_name == "org--name"
    with pytest.raises(UsageError, match="no such source"):
        resolve([tmp_path / "org" / "name"])  # an absolute path is none


def test_an_id_in_a_manifest_is_no_folder_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_collection(tmp_path / "org", 2)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "m.jsonl").write_text('{"path": "org/a00"}\n{"repo": "org/a01"}\n')
    monkeypatch.chdir(tmp_path)
    assert [str(s.hub) for s in resolve(["lists/m.jsonl"])] == ["org/a00", "org/a01"]
    assert resolve(["org/a00"])[0].hub is None


def test_a_single_string_is_not_a_list_of_letters() -> None:
    with pytest.raises(UsageError, match="must be a list"):
        resolve("adapters/")


# -- output of ours among the sources --------------------------------------------------------------------------------


FORMS = pytest.mark.parametrize("form", [("-k", "4"), ("--max-error", "0.3")], ids=["share", "coded"])


@FORMS
def test_output_in_the_folder_of_the_sources_is_left_out_and_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, form: tuple[str, ...]
) -> None:
    make_collection(tmp_path, 3)
    shutil.move(make_collection(tmp_path / "x", 1, init_lora_weights="pissa")[0], tmp_path / "exact")
    (tmp_path / "x").rmdir()
    monkeypatch.chdir(tmp_path)
    command = ["compress", ".", "-o", "out.share/", *form]
    assert main(command) == 0
    assert "left out" not in caplog.text
    before = tree_digest(Path("out.share")), (default_workspace(Path("out.share")) / "journal.jsonl").read_bytes()
    assert main(["reconstruct", "out.share", "--all", "-o", "back/"]) == 0
    shutil.copytree("out.share", "half.share")
    Path("half.share", "share_config.json").unlink()
    shutil.copytree("out.share", ".other.staging")
    shutil.copytree("out.share", "given.staging")
    for left in ("share_config.json", "shared_components.safetensors", "index.json.zz"):
        Path("given.staging", left).unlink(missing_ok=True)
    Path("given.staging", "staging.json").write_text('"0"')
    for sources in (["."], sorted(os.listdir(".")), ["./*"]):  # the shell's glob, and ours
        caplog.clear()
        assert main([command[0], *sources, *command[2:]]) == 0
        assert "out.share is up to date" in caplog.text
        assert all(f"{name} (a " in caplog.text for name in ("out.share", "half.share", "out.share.workspace"))
        assert "given.staging (a checkpoint that is not whole yet)" in caplog.text
        assert "reconstructions are not taken, since their originals are there" in caplog.text
        assert "back/a00" in caplog.text
        after = tree_digest(Path("out.share")), (default_workspace(Path("out.share")) / "journal.jsonl").read_bytes()
        assert after == before
    for ours in ("out.share", "out.share.workspace", "half.share", "given.staging"):
        with pytest.raises(UsageError, match=r"but output of this program \(found .*reconstruct"):
            resolve([ours])
    share = SHAREModel.from_pretrained("out.share")
    found = originals_of(share, resolve(["back", "."]))
    assert {name: Path(source.path).parent for name, source in found.items()} == dict.fromkeys(found, Path())


def test_an_adapter_of_a_checkpoint_is_known_by_its_files(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="an adapter of a checkpoint"):
        resolve([checkpoint / "adapters"])


def test_a_reconstruction_is_taken_where_it_is_meant(tmp_path: Path, collection: list[str]) -> None:
    out, back = str(tmp_path / "out"), tmp_path / "back"
    assert main(["compress", *collection[:4], "-o", out, "-k", "4"]) == 0
    assert main(["reconstruct", out, "--all", "-o", str(back)]) == 0
    made = plan_for(resolve([back]), Settings())  # alone: what was lost is lost, and told
    assert [e.name for e in made.adapters] == ["a00", "a01", "a02", "a03"]
    assert any("4 adapters (a00, a01, a02 and 1 more) came out of a checkpoint" in w for w in plan_warnings(made))
    mixed = plan_for(resolve([*collection[2:], back]), Settings())  # of others the originals are not there
    assert [e.folder.parent.name for e in mixed.adapters if e.name in ("a00", "a01")] == ["back", "back"]
    assert [Path(path).name for path in mixed.doubles] == ["a02", "a03"]
    assert len(mixed.adapters) == 8
    named = plan_for(resolve({"again": str(back / "a02"), "first": collection[2]}), Settings())
    assert [e.name for e in named.adapters] == ["again", "first"]
    assert main(["add", out, str(back / "a02")]) == 0  # the original is in the checkpoint
    assert main(["add", out, str(back / "a02"), "--names", "again"]) == 0
    assert SHAREModel.from_pretrained(out).adapter_names == ["a00", "a01", "a02", "a03", "again"]
    assert main(["compress", *collection[:4], str(back), "-o", out, "-k", "4"]) == 0
    assert SHAREModel.from_pretrained(out).adapter_names == ["a00", "a01", "a02", "a03", "again"]


def test_an_id_that_may_be_a_path_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a folder that was moved it would only be said that the Hub cannot be reached, or has no such repository."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [str(s.hub) for s in resolve(["hf://runs/gone", "other/gone"])] == ["runs/gone", "other/gone"]
    assert not caplog.messages
    assert str(resolve(["runs/gone"])[0].hub) == "runs/gone"
    assert caplog.messages == ["runs/gone is not there, though runs is: taken for an id of the Hub"]
