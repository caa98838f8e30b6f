from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorashare_stream.errors import UsageError
from lorashare_stream.plan.sources import resolve

from .conftest import make_collection


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
        ("name.jsonl", "name is not text"),
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


def test_a_single_string_is_not_a_list_of_letters() -> None:
    with pytest.raises(UsageError, match="must be a list"):
        resolve("adapters/")
