"""Foreign strings are data: they choose neither what is written nor what is read, and are shown escaped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorashare_stream.cli.app import main
from lorashare_stream.errors import CheckpointError, UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.plan.sources import resolve

from .conftest import load_tensors, make_collection, tree_digest, write_adapter

Compress = Callable[..., Path]
UNSAFE = ["../x", "a/b", "..", ".", "", "a\\b", "a\nb", "a\x1b[31mb", "a\u202eb", "x" * 300, "nul\x00"]


def everything(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_in_a_mapping(tmp_path: Path, collection: list[str], name: str) -> None:
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="cannot be named") as caught:
        SHAREModel.from_adapters({name: collection[0], "b": collection[1]}, output_dir=tmp_path / "out")
    assert str(caught.value).isprintable()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", ["jsonl", "yaml"])
@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_in_a_manifest(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    entries = [{"name": name, "path": collection[0]}, {"path": collection[1]}]
    lines = "\n".join(json.dumps(e) for e in entries)
    manifest = tmp_path / f"list.{kind}"
    manifest.write_text(lines if kind == "jsonl" else json.dumps(entries))
    before = everything(tmp_path)
    assert main(["compress", str(manifest), "-o", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.replace("\n", "").isprintable()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_as_an_argument(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = everything(tmp_path)
    arguments = ["compress", *collection[:2], "--names", name, "b", "-o", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.replace("\n", "").isprintable()
    assert everything(tmp_path) == before


def test_folders_with_unsafe_names_get_safe_ones(tmp_path: Path, compressed: Compress) -> None:
    """A folder's name is not the user's choice: it is made safe, and stays unique."""
    rng = np.random.default_rng(0)
    for name in ("a\nb", "a\x1b[31mb", 'q"*?', "x" * 240, "-rf", "日本語", "<b>bold</b>", "{{x}}"):
        shapes = {"base_model.model.q.lora_A.weight": (4, 16), "base_model.model.q.lora_B.weight": (16, 4)}
        tensors = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        write_adapter(tmp_path / "adapters" / name, tensors)
    out = compressed([tmp_path / "adapters"], num_components=4)
    names = SHAREModel.from_pretrained(out).adapter_names
    assert len(names) == 8 == len({n.casefold() for n in names})
    assert all(n.isprintable() and "/" not in n and len(n.encode()) <= 200 for n in names)
    assert {"日本語", "-rf", "{{x}}"} <= set(names)
    assert {p.name for p in (out / "adapters").iterdir()} == set(names)


def test_names_that_differ_in_case_alone_do_not_meet(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "one", 1) + make_collection(tmp_path / "two", 1, seed=1)
    upper = Path(folders[1]).rename(tmp_path / "two" / "A00")
    names = SHAREModel.from_pretrained(compressed([folders[0], upper], num_components=4)).adapter_names
    assert [n[:4] for n in names] == ["a00-", "A00-"]


def test_names_are_shown_escaped_by_every_command(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a foreign checkpoint: base model, names and keys with control characters and markup."""
    assert main(["compress", *collection, "-o", str(tmp_path / "out"), "-k", "4", "-q"]) == 0
    config = json.loads((tmp_path / "out" / "share_config.json").read_text())
    evil = "evil\x1b[2J\u202e<script>"
    os.rename(tmp_path / "out" / "adapters" / "a00", tmp_path / "out" / "adapters" / evil)
    config["adapter_names"][0] = config["base_model_name_or_path"] = config["target_modules"][0] = evil
    config["compression_stats"]["lorashare_stream"]["errors"]["worst"][0]["name"] = evil
    (tmp_path / "out" / "share_config.json").write_text(json.dumps(config))
    capsys.readouterr()
    for command in (
        ["info", str(tmp_path / "out")],
        ["info", str(tmp_path / "out"), "--json"],
        ["verify", str(tmp_path / "out"), "-q"],
        ["reconstruct", str(tmp_path / "out"), "--adapter", "nobody", "-o", str(tmp_path / "rec")],
        ["reconstruct", str(tmp_path / "out"), "--all", "-o", str(tmp_path / "rec")],
    ):
        main(command)
        captured = capsys.readouterr()
        assert (captured.out + captured.err).replace("\n", "").isprintable(), command
    SHAREModel.from_pretrained(tmp_path / "out").summary()
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", ["../../secret", "a/b", "..", "/etc", ""])
def test_a_foreign_configuration_does_not_decide_what_is_read(
    tmp_path: Path, collection: list[str], compressed: Compress, name: str
) -> None:
    out = compressed(collection, num_components=4)
    shutil.copytree(out / "adapters" / "a00", tmp_path / "secret")
    config = json.loads((out / "share_config.json").read_text())
    config["adapter_names"][0] = name
    (out / "share_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no path components"):
        SHAREModel.from_pretrained(out)


def test_a_recorded_source_is_shown_and_never_followed(
    tmp_path: Path, collection: list[str], compressed: Compress, capsys: pytest.CaptureFixture[str]
) -> None:
    out = compressed(collection, num_components=4)
    for name in ("a00", "a01"):
        path = out / "adapters" / name / "adapter_meta.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps(meta | {"original_adapter_path": "/etc"}))
    shutil.rmtree(tmp_path / "out.workspace")
    assert main(["verify", str(out), "-q"]) == 2
    assert "--sources" in capsys.readouterr().err
    assert main(["verify", str(out), "--sources", *collection, "-q"]) == 0


def test_links_in_an_output_folder_are_not_followed(
    tmp_path: Path, collection: list[str], compressed: Compress, capsys: pytest.CaptureFixture[str]
) -> None:
    out = compressed(collection, num_components=4)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep me")
    rec = tmp_path / "rec"
    rec.mkdir()
    (rec / "a00").symlink_to(outside)
    assert main(["reconstruct", str(out), "--all", "-o", str(rec), "-q"]) == 2
    assert "through a link" in capsys.readouterr().err
    (rec / "a00").unlink()
    (rec / "adapter_model.safetensors").symlink_to(outside / "precious")
    (rec / "adapter_config.json").symlink_to(outside / "precious")
    assert main(["reconstruct", str(out), "--adapter", "a00", "-o", str(rec), "-q"]) == 2
    (rec / "adapter_model.safetensors").unlink()
    assert main(["reconstruct", str(out), "--adapter", "a00", "-o", str(rec), "-q"]) == 0
    assert not (rec / "adapter_config.json").is_symlink()
    assert everything(outside) == {"precious"}
    assert (outside / "precious").read_text() == "keep me"


@pytest.mark.parametrize("name", ["moments", "bases", "moments/link", "lock", "journal.jsonl"])
def test_a_workspace_with_a_link_in_it_is_refused_and_nothing_is_removed(
    tmp_path: Path, collection: list[str], compressed: Compress, name: str
) -> None:
    outside, workspace = tmp_path / "outside", tmp_path / "out.workspace"
    (outside / "precious").mkdir(parents=True)
    (outside / "file.txt").write_text("keep")
    (workspace / name).parent.mkdir(parents=True)
    (workspace / name).symlink_to(outside / "file.txt" if name in ("lock", "journal.jsonl") else outside)
    (workspace / "workspace.json").write_text("{}")
    with pytest.raises(UsageError, match="through a link"):
        compressed(collection)
    assert (outside / "file.txt").read_text() == "keep"
    assert everything(outside) == {"precious", "file.txt"}


@pytest.mark.parametrize("kind", ["link", "folder"])
@pytest.mark.parametrize("name", [".out.staging", ".out.replaced"])
def test_what_has_a_name_that_we_need_is_left_alone(
    tmp_path: Path, collection: list[str], compressed: Compress, name: str, kind: str
) -> None:
    outside = tmp_path / ("outside" if kind == "link" else name)
    outside.mkdir()
    (outside / "mine").write_text("x")
    if kind == "link":
        (tmp_path / name).symlink_to(outside)
    with pytest.raises(UsageError, match="is taken"):
        compressed(collection, num_components=4)
    assert everything(outside) == {"mine"}


def test_links_are_followed_when_reading(tmp_path: Path, collection: list[str], compressed: Compress) -> None:
    """The Hub's cache is made of links."""
    cache = tmp_path / "cache"
    for folder in collection:
        (cache / Path(folder).name).mkdir(parents=True)
        for file in Path(folder).iterdir():
            (cache / Path(folder).name / file.name).symlink_to(file)
    assert (
        tree_digest(compressed([cache], "linked", num_components=4))["shared_components.safetensors"]
        == tree_digest(compressed(collection, num_components=4))["shared_components.safetensors"]
    )
    linked = tmp_path / "checkpoint"
    linked.symlink_to(tmp_path / "out")
    assert len(SHAREModel.from_pretrained(linked).adapter_names) == 8


YAML = {
    "object": "- !!python/object/apply:os.system ['touch {0}']\n",
    "name": "- path: !!python/name:os.system\n",
    "anchor": "a: &a [1]\nb: *a\n",
    "broken": "- [unclosed\n",
}


@pytest.mark.parametrize("name", YAML)
@pytest.mark.parametrize("option", ["--config", "manifest"])
def test_yaml_that_asks_for_objects_is_refused(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str], name: str, option: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(YAML[name].format(tmp_path / "pwned"))
    given = ["--config", str(path), *collection] if option == "--config" else [str(path)]
    assert main(["compress", *given, "-o", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "pwned").exists()
    assert capsys.readouterr().err.replace("\n", "").isprintable()


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "adapters", 2)
    (tmp_path / "adapters" / "again").symlink_to(tmp_path / "adapters")
    assert [s.id for s in resolve([tmp_path / "adapters"])] == [os.path.realpath(f) for f in folders]


def test_module_names_do_not_choose_files(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    module = "../../../escape:x/../<b>"
    for i in range(2):
        write_adapter(tmp_path / "adapters" / f"a{i}", {
            f"base_model.model.{module}.lora_A.weight": rng.standard_normal((4, 16)).astype(np.float32),
            f"base_model.model.{module}.lora_B.weight": rng.standard_normal((16, 4)).astype(np.float32),
        })  # fmt: skip
    out = compressed([tmp_path / "adapters"], num_components=100)
    assert {p.name for p in tmp_path.iterdir()} == {"adapters", "out", "out.workspace"}
    found = SHAREModel.from_pretrained(out).reconstruct("a0")
    for key, value in load_tensors(tmp_path / "adapters" / "a0").items():
        assert np.allclose(found[key].numpy(), value, atol=1e-5)
