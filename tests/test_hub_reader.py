"""`SHAREModel.from_pretrained` on the Hub: what is fetched, of which commit, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lorashare
import pytest
import torch
from huggingface_hub import snapshot_download

import lorashare_stream.hub.retry
import lorashare_stream.model
from lorashare_stream.errors import (
    CheckpointError,
    MissingCheckpointError,
    UnknownAdapterError,
    UnreachableError,
    UsageError,
)
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import make_collection, make_tensors, tree_digest, write_adapter
from .fakehub import ALICE, FakeHub, environment, patched

CONFIG, COMPONENTS = "share_config.json", "shared_components.safetensors"
Files = dict[str, bytes]


def build(root: Path, k: int) -> Path:
    """Six adapters with a head, and one without."""
    import numpy as np

    folders = make_collection(root / "adapters", 6)
    tensors = make_tensors(np.random.default_rng(9), {"layers.0.q": (40, 24)})
    folders.append(str(write_adapter(root / "adapters" / "plain", tensors)))
    out = root / "out"
    plan = plan_for(resolve(folders), Settings.from_mapping({"device": "cpu", "num_components": k}), None)
    compress(plan, out, workspace=default_workspace(out))
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("one"), 4)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("two"), 3)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(lorashare_stream.hub.retry, "FIRST_PAUSE", 0.01)
        yield hub


def files_of(root: Path, prefix: str = "") -> Files:
    return {prefix + p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def fetched(hub: FakeHub) -> list[str]:
    """The files whose bytes were sent, and requests that are not for files."""
    return [str(r.file if r.kind == "resolve" else r.kind) for r in hub.requests if r.method == "GET"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_only_what_is_asked_for_is_fetched(hub: FakeHub, checkpoint: Path) -> None:
    hub.add("org/share", {**files_of(checkpoint), "README.md": b"hello", "extra/big.bin": b"x" * 1000})
    share, local = SHAREModel.from_pretrained("org/share"), SHAREModel.from_pretrained(checkpoint)
    assert fetched(hub) == ["info", CONFIG, COMPONENTS]
    assert share.adapter_names == local.adapter_names
    assert share.config == local.config
    hub.requests.clear()
    assert same(share.reconstruct("a00"), local.reconstruct("a00"))
    folder = "adapters/a00"
    names = ("loadings.safetensors", "adapter_meta.json", "classifier_head.safetensors")
    assert sorted(fetched(hub)) == sorted(f"{folder}/{name}" for name in names)
    hub.requests.clear()
    assert same(share.reconstruct("plain"), local.reconstruct("plain"))
    assert sorted(fetched(hub)) == ["adapters/plain/adapter_meta.json", "adapters/plain/loadings.safetensors"]
    assert hub.count(file="*classifier_head*") == 0  # it has none, says its meta
    hub.requests.clear()
    for name in ("a00", "plain"):
        assert share.certified(name) == local.certified(name)
        assert share.adapter_configs[name] == local.adapter_configs[name]
        assert share.adapter_sources[name] == local.adapter_sources[name]
        share.reconstruct(name)
    with pytest.raises(UnknownAdapterError, match="no adapter named 'a0'"):
        share.reconstruct("a0")
    assert not hub.requests
    with pytest.raises(UnknownAdapterError):
        share.reconstruct("../a00")
    assert not hub.requests


def test_every_adapter_is_that_of_the_local_checkpoint(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add("org/share", files_of(checkpoint))
    share, local = SHAREModel.from_pretrained("org/share"), SHAREModel.from_pretrained(checkpoint)
    for name in local.adapter_names:
        share.reconstruct(name, output_dir=tmp_path / "hub" / name)
        local.reconstruct(name, output_dir=tmp_path / "local" / name)
    assert tree_digest(tmp_path / "hub") == tree_digest(tmp_path / "local")


def test_two_hundred_adapters_open_with_two_files(hub: FakeHub, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    config = json.loads(files[CONFIG])
    config["adapter_names"] = [f"n{i:03}" for i in range(200)]
    one = {k.removeprefix("adapters/a00/"): v for k, v in files.items() if k.startswith("adapters/a00/")}
    many = {f"adapters/{n}/{file}": data for n in config["adapter_names"] for file, data in one.items()}
    hub.add("org/share", {CONFIG: json.dumps(config).encode(), COMPONENTS: files[COMPONENTS], **many})
    share = SHAREModel.from_pretrained("org/share")
    assert fetched(hub) == ["info", CONFIG, COMPONENTS]
    assert (len(share.adapter_names), hub.count("tree")) == (200, 0)
    assert share.reconstruct("n137")
    assert hub.count("info") == 1


def test_a_checkpoint_that_is_replaced_stays_what_it_was(hub: FakeHub, checkpoint: Path, other: Path) -> None:
    sha = hub.add("org/share", files_of(checkpoint))
    share, local = SHAREModel.from_pretrained("org/share"), SHAREModel.from_pretrained(checkpoint)
    hub.update("org/share", {**dict.fromkeys(files_of(checkpoint)), **files_of(other)})
    for name in local.adapter_names:
        assert same(share.reconstruct(name), local.reconstruct(name))
    assert {r.revision for r in hub.requests if r.kind == "resolve"} == {sha}
    new = SHAREModel.from_pretrained("org/share")
    assert new.config.num_components == 3
    assert same(new.reconstruct("a01"), SHAREModel.from_pretrained(other).reconstruct("a01"))


def test_revisions_and_subfolders(hub: FakeHub, checkpoint: Path, other: Path) -> None:
    sha = hub.add("org/share", files_of(checkpoint))
    hub.repos["org/share"].refs |= {"v1.0": sha, "refs/pr/1": sha}
    hub.update("org/share", {**files_of(other, "small/er/"), **dict.fromkeys(files_of(checkpoint))})
    open_ = SHAREModel.from_pretrained
    for text, how in [
        ("org/share@v1.0", {}), ("org/share", {"revision": "v1.0"}), ("org/share@v1.0", {"revision": "v1.0"}),
        ("hf://org/share@v1.0", {}), ("org/share", {"revision": "refs/pr/1"}),
    ]:  # fmt: skip
        assert open_(text, **how).config.num_components == 4  # type: ignore[arg-type]
    for text, how in [
        ("org/share//small/er", {}), ("org/share@main", {"subfolder": "small/er/"}),
        ("org/share//small/er", {"revision": "main", "subfolder": "small/er"}),
    ]:  # fmt: skip
        share = open_(text, **how)  # type: ignore[arg-type]
        assert share.config.num_components == 3
        assert same(share.reconstruct("a02"), open_(other).reconstruct("a02"))
    hub.requests.clear()
    assert open_("org/share", revision=sha, force_download=True).reconstruct("a00")
    assert hub.count("info") == 0  # it is pinned
    assert fetched(hub).count(COMPONENTS) == fetched(hub).count(CONFIG) == 1
    with pytest.raises(UsageError, match="two revisions"):
        open_("org/share@v1.0", revision="main")
    with pytest.raises(UsageError, match="no revision or subfolder"):
        open_("org/share", subfolder="../other")
    with pytest.raises(UsageError, match="exclude each other"):
        open_("org/share", local_files_only=True, force_download=True)
    with pytest.raises(MissingCheckpointError, match="no such revision"):
        open_("org/share@v9")


def test_a_folder_comes_first(hub: FakeHub, checkpoint: Path, other: Path, tmp_path: Path) -> None:
    hub.add("org/share", files_of(checkpoint))
    shutil.copytree(other, tmp_path / "org" / "share" / "inner")
    shutil.copytree(other, tmp_path / "org" / "share", dirs_exist_ok=True)
    assert SHAREModel.from_pretrained("org/share").config.num_components == 3
    assert SHAREModel.from_pretrained("org/share", subfolder="inner").config.num_components == 3
    with pytest.raises(UsageError, match="no revisions"):
        SHAREModel.from_pretrained("org/share", revision="main")
    assert SHAREModel.from_pretrained("hf://org/share").config.num_components == 4
    hub.requests.clear()
    with pytest.raises(MissingCheckpointError, match="no checkpoint at"):
        SHAREModel.from_pretrained(Path("nobody/nothing"))  # a path is no id
    with pytest.raises(MissingCheckpointError, match="no checkpoint at"):
        SHAREModel.from_pretrained("./nobody/nothing")
    assert not hub.requests


def test_tokens_are_passed_on_and_said_nowhere(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("eve/secret", files_of(checkpoint), private=True)
    hub.add("eve/gated", files_of(checkpoint), gated="manual")
    hub.add("alice/mine", files_of(checkpoint), private=True)
    share = SHAREModel.from_pretrained("alice/mine", token=ALICE)
    assert share.reconstruct("a00")
    assert {r.token for r in hub.requests} == {ALICE}
    assert ALICE not in repr(share) + str(share) + repr(share._reader) + str(share._reader.place)  # type: ignore[union-attr]
    for repo, token, kind, match in [
        ("alice/mine", None, MissingCheckpointError, "private one"),
        ("eve/secret", ALICE, MissingCheckpointError, "private one"),
        ("eve/gated", ALICE, CheckpointError, "gated"),
        ("eve/gated", None, CheckpointError, "gated"),
        ("eve/none", ALICE, MissingCheckpointError, "no such repository"),
    ]:
        with pytest.raises(kind, match=match) as caught:
            SHAREModel.from_pretrained(repo, token=token, cache_dir=tmp_path / "empty")
        assert caught.type is kind
        assert caught.value.remedy
        assert repo in str(caught.value)
        assert ALICE not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(UsageError, match="token") as bad:
        SHAREModel.from_pretrained("alice/mine", token=f"{ALICE}\n")
    assert ALICE not in str(bad.value)
    with pytest.raises(MissingCheckpointError, match="private one"):  # none, not that of the environment
        SHAREModel.from_pretrained("alice/mine", token=False, cache_dir=tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"not accept the token|private one"):
        SHAREModel.from_pretrained("alice/mine", token="hf_wrong", cache_dir=tmp_path / "empty")
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert SHAREModel.from_pretrained("alice/mine", cache_dir=tmp_path / "empty").reconstruct("a01")


def test_what_is_in_the_cache_does_offline_and_the_rest_is_named(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    sha = hub.add("org/share", files_of(checkpoint))
    hub.repos["org/share"].refs["v1"] = sha
    with pytest.raises(MissingCheckpointError, match=r"share_config.json is not in the cache.*org/share@v1"):
        SHAREModel.from_pretrained("org/share@v1", local_files_only=True)
    SHAREModel.from_pretrained("org/share@v1").reconstruct("a00")
    before = len(hub.requests)
    for how in ({"revision": "v1"}, {"revision": sha}):
        share = SHAREModel.from_pretrained("org/share", local_files_only=True, **how)  # type: ignore[arg-type]
        assert same(share.reconstruct("a00"), SHAREModel.from_pretrained(checkpoint).reconstruct("a00"))
        with pytest.raises(CheckpointError, match=rf"adapters/a01/loadings.*not in the cache.*org/share@{sha}"):
            share.reconstruct("a01")
        with pytest.raises(CheckpointError, match=r"a\d\d/.*not in the cache"):
            share.save_pretrained(tmp_path / "whole")
    for cache in (None, tmp_path / "elsewhere"):  # main was never asked for; nothing lies elsewhere
        with pytest.raises(MissingCheckpointError, match="not in the cache"):
            SHAREModel.from_pretrained("org/share" if cache is None else f"org/share@{sha}", local_files_only=True,
                                       cache_dir=cache)  # fmt: skip
    assert len(hub.requests) == before
    code = """
import sys
from lorashare_stream import SHAREModel
share = SHAREModel.from_pretrained("org/share", revision="v1")
assert share.reconstruct("a00")
try:
    share.reconstruct("a01")
except ValueError as e:
    print(e)
"""
    env = environment(hub, tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "adapters/a01/loadings.safetensors is not in the cache of the Hub's files, and this is offline" in done.stdout
    )
    assert f"org/share@{sha}" in done.stdout
    assert len(hub.requests) == before


def test_the_cache_follows_the_branch(hub: FakeHub, checkpoint: Path, other: Path) -> None:
    hub.add("org/share", files_of(checkpoint))
    SHAREModel.from_pretrained("org/share")
    hub.update("org/share", files_of(other))
    assert SHAREModel.from_pretrained("org/share", local_files_only=True).config.num_components == 4
    SHAREModel.from_pretrained("org/share")
    assert SHAREModel.from_pretrained("org/share", local_files_only=True).config.num_components == 3


def test_what_passes_is_waited_out(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add("org/share", files_of(checkpoint))
    hub.fault(kind="info", status=503)
    hub.fault(kind="info", status=429)
    hub.fault(kind="resolve", method="HEAD", file=CONFIG, status=503)
    hub.fault(kind="resolve", method="GET", file=COMPONENTS, status=503)
    share = SHAREModel.from_pretrained("org/share")
    hub.fault(kind="resolve", method="GET", file="*/a03/loadings.safetensors", status=502)
    assert same(share.reconstruct("a03"), SHAREModel.from_pretrained(checkpoint).reconstruct("a03"))
    hub.fault(kind="resolve", method="GET", file="*/a04/*", status=503)
    share.save_pretrained(tmp_path / "copy")
    assert tree_digest(tmp_path / "copy") == tree_digest(checkpoint)


def test_what_the_client_leaves_out_of_a_snapshot_is_fetched_all_the_same(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    sha = hub.add("org/share", files_of(checkpoint))
    share = SHAREModel.from_pretrained("org/share")
    hub.fault(kind="tree", status=403, times=None)
    partial = Path(snapshot_download("org/share", revision=sha))
    assert tree_digest(partial).keys() == {CONFIG, COMPONENTS}  # and it says nothing
    share.save_pretrained(tmp_path / "copy")
    assert tree_digest(tmp_path / "copy") == tree_digest(checkpoint)


def test_a_hub_that_is_down_is_not_answered_from_the_cache(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = hub.add("org/share", files_of(checkpoint))
    SHAREModel.from_pretrained("org/share").reconstruct("a00")
    monkeypatch.setattr(lorashare_stream.hub.retry, "PATIENCE", 0.05)
    with hub.outage(), pytest.raises(UnreachableError, match="cannot be reached"):
        SHAREModel.from_pretrained("org/share")
    hub.fault(kind="info", status=503, times=None)
    with pytest.raises(UnreachableError, match="answers 503"):
        SHAREModel.from_pretrained("org/share")
    with hub.outage():  # a commit is what it is
        assert SHAREModel.from_pretrained("org/share", revision=sha).reconstruct("a00")


def test_a_file_that_fails_while_others_are_answered_is_an_error_of_the_checkpoint(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/share", files_of(checkpoint))
    share = SHAREModel.from_pretrained("org/share")
    hub.fault(kind="resolve", method="HEAD", file="*/a02/*", status=500, times=None)
    monkeypatch.setattr(lorashare_stream.hub.retry, "PATIENCE", 0.05)
    monkeypatch.setattr(lorashare_stream.hub.retry, "_heard", [float("inf")])
    with pytest.raises(CheckpointError, match="not for others: it answers 500"):
        share.reconstruct("a02")
    assert share.reconstruct("a01")


def test_what_is_no_checkpoint(hub: FakeHub, checkpoint: Path) -> None:
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}
    sha = hub.add("org/adapter", adapter)
    with pytest.raises(MissingCheckpointError, match="but a PEFT adapter") as caught:
        SHAREModel.from_pretrained("org/adapter")
    for part in (f"org/adapter@{sha}", "adapter_model.safetensors", CONFIG, "compress"):
        assert part in str(caught.value)
    hub.add(
        "org/readme", {"README.md": b"", "a\x1b[2Jb": b"", **{f"sub/{k}": v for k, v in files_of(checkpoint).items()}}
    )
    with pytest.raises(MissingCheckpointError, match=r"found .*README.md.*sub") as caught:
        SHAREModel.from_pretrained("org/readme")
    assert str(caught.value).isprintable()
    with pytest.raises(MissingCheckpointError, match="found nothing"):
        SHAREModel.from_pretrained("org/readme//none")
    with pytest.raises(MissingCheckpointError, match=rf"org/adapter@{sha} .*found nothing"):  # known from before
        SHAREModel.from_pretrained("org/adapter", revision=sha, local_files_only=True)
    hub.add("org/half", {k: v for k, v in files_of(checkpoint).items() if k != CONFIG})
    with pytest.raises(MissingCheckpointError, match=r"but a part of one.*push it again"):
        SHAREModel.from_pretrained("org/half")
    for bad in (b"{", b"[]", b"{}", b"\xff"):
        hub.update("org/readme", {CONFIG: bad})
        with pytest.raises(CheckpointError, match=CONFIG):
            SHAREModel.from_pretrained("org/readme")


@pytest.mark.parametrize(
    ("file", "match"),
    [
        (COMPONENTS, "shared_components.safetensors is missing"),
        ("adapters/a00/loadings.safetensors", "a00/loadings.safetensors is missing"),
        ("adapters/a00/adapter_meta.json", "a00/adapter_meta.json is missing"),
        ("adapters/a00/classifier_head.safetensors", "a00/classifier_head.safetensors is missing"),
    ],
)
def test_a_checkpoint_that_was_pushed_in_part(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, file: str, match: str
) -> None:
    sha = hub.add("org/share", {k: v for k, v in files_of(checkpoint).items() if k != file})
    for use in (lambda s: s.reconstruct("a00"), lambda s: s.save_pretrained(tmp_path / "copy")):
        with pytest.raises(CheckpointError, match=rf"{match} \(found org/share@{sha}\)"):
            use(SHAREModel.from_pretrained("org/share"))
    assert not (tmp_path / "copy").exists()


def test_a_commit_that_mixes_two_checkpoints(hub: FakeHub, checkpoint: Path, other: Path) -> None:
    hub.add("org/share", {**files_of(checkpoint), **files_of(other / "adapters" / "a00", "adapters/a00/")})
    share = SHAREModel.from_pretrained("org/share")
    assert share.reconstruct("a01")
    with pytest.raises(CheckpointError, match="another basis: this commit has parts of two checkpoints"):
        share.reconstruct("a00")
    hub.update("org/share", {COMPONENTS: (other / COMPONENTS).read_bytes()})
    with pytest.raises(CheckpointError, match="parts of two checkpoints"):
        SHAREModel.from_pretrained("org/share")


@pytest.mark.parametrize("name", ["../../secret", "a/b", "..", "/etc", "", "a\0b", "a\\b", "x" * 300, "\ud800"])
def test_foreign_adapter_names_decide_no_path(hub: FakeHub, checkpoint: Path, name: str) -> None:
    files = files_of(checkpoint)
    config = json.loads(files[CONFIG]) | {"adapter_names": [name]}
    hub.add("org/share", {**files, CONFIG: json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match="no path components") as caught:
        SHAREModel.from_pretrained("org/share")
    assert str(caught.value).isprintable()
    assert fetched(hub) == ["info", CONFIG]


def test_strange_adapter_names_are_quoted(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    files = files_of(checkpoint)
    for name in ("a ?#%2e&=+", "ü\u202e", "*[!]", "-"):
        config = json.loads(files[CONFIG]) | {"adapter_names": [name]}
        one = {k.replace("/a00/", f"/{name}/"): v for k, v in files.items() if "/a00/" in k}
        repo = f"org/share{len(hub.repos)}"
        hub.add(repo, {CONFIG: json.dumps(config).encode(), COMPONENTS: files[COMPONENTS], **one})
        share = SHAREModel.from_pretrained(repo)
        assert same(share.reconstruct(name), SHAREModel.from_pretrained(checkpoint).reconstruct("a00"))
        share.save_pretrained(tmp_path / f"copy{len(hub.repos)}")
        assert SHAREModel.from_pretrained(tmp_path / f"copy{len(hub.repos)}").adapter_names == [name]


def test_a_configuration_without_names_is_no_listing(hub: FakeHub, checkpoint: Path) -> None:
    files = files_of(checkpoint)
    hub.add("org/share", {**files, CONFIG: json.dumps(json.loads(files[CONFIG]) | {"adapter_names": []}).encode()})
    with pytest.raises(CheckpointError, match="names no adapters"):
        SHAREModel.from_pretrained("org/share")


def test_saving_gives_the_checkpoint_and_nothing_else(
    hub: FakeHub, checkpoint: Path, other: Path, tmp_path: Path
) -> None:
    extra = {"README.md": b"hello", "adapters/gone/loadings.safetensors": b"old", "x.bin": b"x" * 100}
    files = {f"s[1]/{k}": v for k, v in {**files_of(checkpoint), **extra}.items()}
    hub.add("org/share", {**files, **files_of(other)})
    share = SHAREModel.from_pretrained("org/share//s[1]")
    hub.update("org/share", dict.fromkeys(files))
    shutil.copytree(other, tmp_path / "copy")
    (tmp_path / "copy" / "NOTES").write_text("mine")
    share.save_pretrained(tmp_path / "copy")
    assert tree_digest(tmp_path / "copy").keys() - tree_digest(checkpoint).keys() == {"NOTES"}
    (tmp_path / "copy" / "NOTES").unlink()
    assert tree_digest(tmp_path / "copy") == tree_digest(checkpoint)
    assert not any(p.is_symlink() for p in (tmp_path / "copy").rglob("*"))
    assert not {f for f in fetched(hub) if "README" in f or "x.bin" in f or not f.startswith(("s[1]/", "info", "tree"))}
    hub.requests.clear()
    share.save_pretrained(tmp_path / "again")
    assert not hub.requests
    for change in (lambda: share.add_adapter(str(checkpoint)), lambda: share.remove_adapter("a00")):
        with pytest.raises(UsageError, match="save_pretrained"):
            change()
    copy = SHAREModel.from_pretrained(tmp_path / "again")
    copy.remove_adapter("a00")
    assert "a00" not in copy.adapter_names


def test_a_checkpoint_of_lorashare(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    adapters = sorted(str(p) for p in (checkpoint.parent / "adapters").iterdir() if p.name.startswith("a0"))
    theirs = lorashare.SHAREModel.from_adapters(adapters, num_components=3, device="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    head = tmp_path / "theirs" / "adapters" / "a00" / "classifier_head.safetensors"
    assert head.exists()
    (tmp_path / "theirs" / "adapters" / "a01" / head.name).unlink()
    hub.add("org/share", files_of(tmp_path / "theirs"))
    share, local = SHAREModel.from_pretrained("org/share"), SHAREModel.from_pretrained(tmp_path / "theirs")
    for _ in range(2):
        assert all(same(share.reconstruct(name), local.reconstruct(name)) for name in ("a00", "a01"))
    assert hub.count(file="adapters/a00/classifier_head.safetensors", method="GET") == 1
    assert hub.count(file="adapters/a01/classifier_head.safetensors") == 1  # it has none, and that is remembered
    offline = SHAREModel.from_pretrained("org/share", local_files_only=True)
    assert all(same(offline.reconstruct(name), local.reconstruct(name)) for name in ("a00", "a01"))
    share.save_pretrained(tmp_path / "copy")
    assert tree_digest(tmp_path / "copy") == tree_digest(tmp_path / "theirs")


def test_local_damage_is_no_silent_loss(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    for name in ("classifier_head.safetensors", "adapter_meta.json"):
        (tmp_path / "copy" / "adapters" / "a00" / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            SHAREModel.from_pretrained(tmp_path / "copy").reconstruct("a00")


def test_pushing_takes_the_whole_checkpoint(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    class Pushed:
        url = "https://hub/commit/1"

    def push(root: Path, repo_id: str, **how: Any) -> Pushed:
        given.append((tree_digest(root), repo_id, how))
        return Pushed()

    monkeypatch.setattr(lorashare_stream.model, "push", push)
    hub.add("org/share", {**files_of(checkpoint), "README.md": b"not mine"})
    how: dict[str, Any] = {"private": True, "token": ALICE, "commit_message": "m", "revision": "b", "create_pr": True}
    how["overwrite"] = True
    for share in (SHAREModel.from_pretrained("org/share"), SHAREModel.from_pretrained(checkpoint)):
        assert share.push_to_hub("alice/copy", **how) == Pushed.url
    assert given == [(tree_digest(checkpoint), "alice/copy", how)] * 2


def test_a_cache_that_is_only_read(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/share", files_of(checkpoint))
    SHAREModel.from_pretrained("org/share", cache_dir=tmp_path / "cache").reconstruct("a00")
    (tmp_path / "cache" / "models--org--share" / "refs" / "main").unlink()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "no")

    for name in ("open", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    share = SHAREModel.from_pretrained("org/share", cache_dir=tmp_path / "cache")
    assert len(share.reconstruct("a00")) == 7
    monkeypatch.undo()


def test_the_commands_that_read_take_ids(
    tmp_path: Path, hub: FakeHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorashare_stream.cli.app import main

    repo = "alice/readable"
    hub.add(repo, {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()})
    name = SHAREModel.from_pretrained(checkpoint).adapter_names[0]
    to = str(tmp_path / "one")
    assert main(["reconstruct", repo, "--adapter", name, "-o", to, "--offline"]) == 1  # nothing is in the cache
    assert "not in the cache" in capsys.readouterr().err
    assert main(["reconstruct", repo, "--adapter", name, "-o", to]) == 0
    assert main(["info", repo, "--json"]) == 0
    online = capsys.readouterr().out.splitlines()[-1]
    requests = len(hub.requests)
    assert main(["info", repo, "--json", "--offline"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == online
    assert main(["reconstruct", repo, "--adapter", name, "-o", to, "--offline"]) == 0
    assert len(hub.requests) == requests
