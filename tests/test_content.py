"""Files that are something else than their names say are named for what they are, with what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save_file

from lorashare_stream.adapters.foreign import START, disguised
from lorashare_stream.cli.app import main
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings

from .conftest import CONFIG, load_tensors, make_collection

WEIGHTS, PICKLE, CONFIGURATION = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 25984\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head><body>" + b"x" * 400
APPLE = bytes.fromhex("00051607000200004d6163204f532058") + b"\0" * 100
NOT_THEMSELVES: dict[str, tuple[bytes, str, str]] = {
    "Git-LFS": (LFS, "a Git-LFS pointer", "git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s9--0\n", "a git-annex pointer", "git annex get"),
    "web page": (PAGE, "a web page", "with a token"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page", "Fetch it again"),
    "empty": (b"", "an empty file, cut short", "Fetch or save"),
    "zeros": (bytes(1000), "only zeros", "Fetch or save"),
    "AppleDouble": (APPLE, "what macOS keeps beside a file", "Fetch or save"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\1" * 99, "a GGUF file", "converted from"),
    "gzip": (b"\x1f\x8b\x08" + b"\1" * 99, "a gzip archive", "Unpack"),
}
MESSAGE = b'{"error": "Repository not found"}'


def bins(folder: Path) -> None:
    torch.save({k: torch.from_numpy(v) for k, v in load_tensors(folder).items()}, folder / PICKLE)
    (folder / WEIGHTS).unlink()


def refusal(folder: Path) -> str:
    (error,) = plan_for(resolve([folder]), Settings()).refused
    return str(error)


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE, CONFIGURATION, "adapter_model.safetensors.index.json"])
@pytest.mark.parametrize("kind", NOT_THEMSELVES)
def test_a_file_that_is_something_else(tmp_path: Path, name: str, kind: str) -> None:
    content, what, remedy = NOT_THEMSELVES[kind]
    folder = Path(make_collection(tmp_path, 1)[0])
    if name != CONFIGURATION:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    text = refusal(folder)
    assert text.startswith(f"adapter 'a00': {name}: {what}"), text
    assert remedy in text
    assert text.isprintable()


def old(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, old])
def test_each_is_told_under_the_name_of_the_other(tmp_path: Path, save: Callable[..., None]) -> None:
    one, other = (Path(f) for f in make_collection(tmp_path, 2))
    save({k: torch.from_numpy(v) for k, v in load_tensors(one).items()}, one / WEIGHTS)
    assert refusal(one).endswith("Rename it to adapter_model.bin.")
    assert "adapter_model.safetensors: a pickle of torch under another name" in refusal(one)
    (other / WEIGHTS).rename(other / PICKLE)
    assert "adapter_model.bin: safetensors under another name" in refusal(other)
    assert refusal(other).endswith("Rename it to adapter_model.safetensors.")
    (one / WEIGHTS).rename(one / PICKLE)
    (other / PICKLE).rename(other / WEIGHTS)
    assert len(plan_for(resolve([tmp_path]), Settings()).adapters) == 2  # what was said helps


def test_what_a_server_said_instead_of_a_file_is_shown(tmp_path: Path) -> None:
    folder = Path(make_collection(tmp_path, 1)[0])
    (folder / WEIGHTS).write_bytes(MESSAGE)
    assert 'text, and no weights (found {"error": "Repository not found"})' in refusal(folder)


def test_good_files_are_not_disguised(tmp_path: Path) -> None:
    one, other = (Path(f) for f in make_collection(tmp_path, 2))
    bins(other)
    for path in (one / WEIGHTS, other / PICKLE, one / CONFIGURATION):
        assert disguised(path, path.read_bytes()[:START], path.stat().st_size) is None


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "in", 2)
    path = Path(folders[0], CONFIGURATION)
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert main(["compress", *folders, "-o", str(tmp_path / "out"), "-k", "4"]) == 0
    assert SHAREModel.from_pretrained(tmp_path / "out").adapter_configs["a00"]["r"] == CONFIG["r"]


@pytest.mark.parametrize(
    "left",
    [
        "adapter_model.safetensors.1a2b3c4d.incomplete", "adapter_model.safetensors.part",
        "adapter_model.safetensors.crdownload", ".cache/huggingface/download/abc.1a2b.incomplete",
        "../../blobs/0f1e.incomplete",
    ],
)  # fmt: skip
def test_a_download_that_was_cut_short(tmp_path: Path, left: str) -> None:
    folder = Path(make_collection(tmp_path / "models--org--x" / "snapshots", 1)[0])
    part = folder / left
    part.parent.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).rename(part)
    assert f"no weights, but a download that was cut short: {left}" in refusal(folder)
    if part.parent == folder:
        (folder / CONFIGURATION).unlink()
        assert f"no {CONFIGURATION}, but a download that was cut short: {left}" in refusal(folder)


def test_what_macos_leaves_is_no_adapter(tmp_path: Path) -> None:
    for folder in make_collection(tmp_path / "in", 2):
        for name in (WEIGHTS, CONFIGURATION, "value_head.bin"):
            Path(folder, f"._{name}").write_bytes(APPLE)
        shutil.copytree(folder, tmp_path / "in" / "__MACOSX" / Path(folder).name)  # names of adapters in it, too
    made = plan_for(resolve([tmp_path / "in"]), Settings())
    assert [e.name for e in made.adapters] == ["a00", "a01"]
    assert not made.refused
    assert not any("value_head" in w for w in plan_warnings(made))


# -- the Hub's cache, given as a folder ------------------------------------------------------------------------------


def snapshot(cache: Path, repo: str, commit: str, adapter: Path) -> Path:
    """An adapter as the Hub's client keeps it: links to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for name in (WEIGHTS, CONFIGURATION):
        blob = root / "blobs" / f"{commit[:4]}{name}"
        shutil.copy(adapter / name, blob)
        (folder / name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_a_cache_gives_names_of_repositories_and_tells_commits(tmp_path: Path) -> None:
    adapters = [Path(f) for f in make_collection(tmp_path / "in", 5)]
    hub = tmp_path / "hub"
    for repo, commit, adapter in zip(
        ("org/one", "org/two-x", "org/two-x", "alone"), ("a" * 40, "b" * 40, "c" * 40, "d" * 40), adapters, strict=False
    ):
        snapshot(hub, repo, commit, adapter)
    shutil.copytree(adapters[4], hub / "models--org--many" / "snapshots" / ("e" * 40) / "sub" / "folder")
    made = plan_for(resolve([hub]), Settings())
    names = [e.name for e in made.adapters]
    assert [n for n in names if not n.startswith("org--two-x")] == ["alone", "org--many--sub--folder", "org--one"]
    assert sorted(n[:10] for n in names if n.startswith("org--two-x")) == ["org--two-x"] * 2
    (note,) = [w for w in plan_warnings(made) if "several commits of one repository" in w]
    assert "org/two-x (org--two-x-" in note
    assert "at bbbbbbbb" in note
    assert "at cccccccc" in note
    assert "org/one" not in note
    (source,) = resolve([hub / "models--org--one" / "snapshots" / ("a" * 40)])
    assert source.wanted_name == "org--one"


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    adapters = [Path(f) for f in make_collection(tmp_path / "in", 3)]
    folders = [snapshot(tmp_path / "hub", f"org/{i}", "a" * 40, adapter) for i, adapter in enumerate(adapters)]
    for folder, name in zip(folders, (WEIGHTS, CONFIGURATION), strict=False):
        (folder / name).resolve().unlink()
    sharded = folders[2]
    (sharded / "adapter_model-00001-of-00001.safetensors").symlink_to("../../blobs/gone")
    (sharded / WEIGHTS).unlink()
    index = {"weight_map": dict.fromkeys(load_tensors(adapters[2]), "adapter_model-00001-of-00001.safetensors")}
    (sharded / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    for folder, name in zip(folders, (WEIGHTS, CONFIGURATION, "adapter_model-00001-of-00001.safetensors"), strict=True):
        text = refusal(folder)
        assert f"{name} is a link to a file that is not there (found ../../blobs/" in text
        assert "copy what links lead to as well" in text


def test_a_shard_is_told_as_other_files(tmp_path: Path) -> None:
    folder = Path(make_collection(tmp_path, 1)[0])
    tensors = load_tensors(folder)
    (folder / WEIGHTS).unlink()
    names = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"]
    keys = sorted(tensors)
    save_file({k: tensors[k] for k in keys[:2]}, folder / names[0])
    (folder / names[1]).write_bytes(LFS)
    index = {"weight_map": {k: names[i >= 2] for i, k in enumerate(keys)}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{names[1]}: a Git-LFS pointer" in refusal(folder)


def test_every_command_that_reads_adapters_says_it_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compressed: Callable[..., Path]
) -> None:
    folders = make_collection(tmp_path / "in", 3)
    (new,) = make_collection(tmp_path / "new", 1, seed=5)
    for name, form in (("share", {"num_components": 4}), ("coded", {"max_error": 0.3})):
        out = compressed(folders, name, **form)
        before = (out / "share_config.json").read_bytes()
        kept = Path(new, WEIGHTS).read_bytes()
        Path(new, WEIGHTS).write_bytes(LFS)
        flags = ["-k", "4"] if name == "share" else ["--max-error", "0.3"]
        for command in (
            ["plan", *folders, new, *flags], ["compress", *folders, new, "-o", str(out), *flags], ["add", str(out), new]
        ):  # fmt: skip
            assert main(command) == 1
            assert "adapter_model.safetensors: a Git-LFS pointer" in capsys.readouterr().err
        assert (out / "share_config.json").read_bytes() == before
        Path(new, WEIGHTS).write_bytes(kept)
        original = Path(folders[0], WEIGHTS).read_bytes()
        Path(folders[0], WEIGHTS).write_bytes(LFS)
        assert main(["verify", str(out)]) == 1
        assert "FAILED adapter 'a00': adapter_model.safetensors: a Git-LFS pointer" in capsys.readouterr().err
        Path(folders[0], WEIGHTS).write_bytes(original)
        assert main(["add", str(out), new, "--names", "new"]) == 0
