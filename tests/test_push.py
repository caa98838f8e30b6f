"""Pushing a checkpoint: the real client against a Hub on loopback."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lorashare
import pytest
import torch
import yaml

from lorashare_stream.adapters.hubid import HubId
from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import CONFIG, OURS
from lorashare_stream.checkpoint.records import HubOrigin, metas_of
from lorashare_stream.errors import CheckpointError, StreamError, UnreachableError, UsageError
from lorashare_stream.files import read_json, sealed, unsealed
from lorashare_stream.hub import card as modelcard
from lorashare_stream.hub import push as pushing
from lorashare_stream.hub import retry as patience
from lorashare_stream.hub.card import MARK, card, escaped
from lorashare_stream.hub.push import push
from lorashare_stream.hub.scrub import Scrubber
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.progress import silent
from lorashare_stream.settings import Settings

from .conftest import make_collection
from .fakehub import ALICE, FakeHub, patched

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the client, of its own PUT
REPO = "alice/share"
SHA = "0123456789" * 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six adapters of a base model in a folder, and one that was left out: paths are everywhere."""
    root = tmp_path_factory.mktemp("secretfolder")
    base = str(root / "models" / "tiny base")
    folders = make_collection(root / "my adapters", 6, base_model_name_or_path=base)
    config = json.loads(Path(folders[0], "adapter_config.json").read_text())
    config |= {"parent_library": str(root / "lib"), "auto_mapping": {"module": "~/private/module.py"}}
    Path(folders[0], "adapter_config.json").write_text(json.dumps(config))
    bad = Path(make_collection(root / "bad ones", 1, base_model_name_or_path=base)[0])
    bad = bad.rename(bad.with_name("bad"))
    (bad / "adapter_model.safetensors").write_bytes(b"x" * 100)
    settings = Settings.from_mapping({"device": "cpu", "num_components": 4, "on_error": "skip"})
    out = root / "out"
    compress(plan_for(resolve([*folders, str(bad)]), settings, default_workspace(out)), out)
    return out


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    with FakeHub() as fake:
        patched(monkeypatch, fake, tmp_path / "home", ALICE)
        yield fake


def fetched(hub: FakeHub, folder: Path, revision: str = "main", repo: str = REPO) -> Path:
    """A repository as a folder."""
    for path, data in hub.files(repo, revision).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def local_files(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


def history(hub: FakeHub, repo: str = REPO) -> list[dict[str, bytes]]:
    """The files at each commit, in order."""
    return list(hub.repos[repo].commits.values())


def everything(hub: FakeHub) -> Iterator[bytes]:
    for repo in hub.repos.values():
        yield from repo.lfs.values()
        for files in repo.commits.values():
            yield from (path.encode() for path in files)
            yield from files.values()


def mark(root: Path, name: str, **told: Any) -> None:
    """Let an adapter come from the Hub."""
    path = root / "adapters" / name / "adapter_meta.json"
    meta = unsealed(read_json(path))
    assert meta is not None
    facts = origin(**told).model_dump()
    meta[OURS] |= {"source_id": str(HubId(facts["repo"], SHA)), "hub": facts}
    path.write_text(json.dumps(sealed(meta | {"original_adapter_path": str(HubId(facts["repo"], SHA))})))


def rename(root: Path, **config: Any) -> None:
    values = read_json(root / CONFIG)
    (root / CONFIG).write_text(json.dumps(values | config))


def without(root: Path, name: str) -> None:
    """Take an adapter out of a checkpoint."""
    names = [n for n in read_json(root / CONFIG)["adapter_names"] if n != name]
    shutil.rmtree(root / "adapters" / name)
    rename(root, adapter_names=names, num_adapters=len(names))


# -- what is uploaded -----------------------------------------------------------------------------------


def test_a_pushed_checkpoint_is_loaded_again(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    pushed = push(checkpoint, REPO)
    assert not pushed.private
    assert pushed.revision == hub.repos[REPO].refs["main"]
    assert pushed.url == f"{hub.url}/{REPO}/commit/{pushed.revision}"
    files = hub.files(REPO)
    assert files.keys() - {"README.md", ".gitattributes"} == local_files(checkpoint)
    assert (pushed.files, pushed.present) == (len(files) - 1, 0)
    copy = fetched(hub, tmp_path / "copy")
    before, ours = SHAREModel.from_pretrained(checkpoint), SHAREModel.from_pretrained(copy)
    of_the_hub, theirs = SHAREModel.from_pretrained(REPO), lorashare.SHAREModel.from_pretrained(copy)
    assert ours.adapter_names == theirs.adapter_names == before.adapter_names
    for name in ours.adapter_names:
        a, b, c, d = (s.reconstruct(name) for s in (before, ours, of_the_hub, theirs))
        assert a.keys() == b.keys() == c.keys() == d.keys()
        assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
        assert all(torch.allclose(a[k], d[k], atol=1e-6) for k in a)
    assert [m.adapter_name for m in metas_of(copy, ours.adapter_names)] == ours.adapter_names
    assert read_share_config(copy).ours["digest"] == read_share_config(checkpoint).ours["digest"]


def test_the_configuration_is_committed_last_and_alone(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "BATCH", 5)
    push(checkpoint, REPO, commit_message="all of it")
    commits = history(hub)
    assert len(commits) > 4
    assert [CONFIG in files for files in commits] == [False] * (len(commits) - 1) + [True]
    assert commits[-1].keys() - commits[-2].keys() == {CONFIG}
    assert all(commits[-1][path] == data for path, data in commits[-2].items())
    assert max(len(b) - len(a) for a, b in pairwise(commits)) == 5


def test_a_push_again_commits_nothing(hub: FakeHub, checkpoint: Path) -> None:
    first = push(checkpoint, REPO)
    made, sent = hub.count("commit"), hub.count("lfs-put")
    again = push(checkpoint, REPO)
    assert (hub.count("commit"), hub.count("lfs-put")) == (made, sent)
    assert (again.files, again.present, again.revision) == (0, first.files, first.revision)
    assert again.url == first.url


def test_a_push_that_is_killed_goes_on_where_it_was(
    hub: FakeHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "BATCH", 4)
    monkeypatch.setattr(patience, "PATIENCE", 0.05)
    push(checkpoint, REPO)
    shutil.rmtree(checkpoint / "adapters" / "a03")
    shutil.copytree(checkpoint / "adapters" / "a01", checkpoint / "adapters" / "a03")  # other values, the same name
    for name in ("a04", "a05"):
        path = checkpoint / "adapters" / name / "adapter_meta.json"
        meta = unsealed(read_json(path))
        assert meta is not None
        meta[OURS]["notes"].append("another note")
        path.write_text(json.dumps(sealed(meta)))

    def breaking(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for i, result in enumerate(results, 1):
            if step == "push" and i == 4:
                hub.fault(kind="commit", status=500, times=None)
            yield result

    with pytest.raises(UnreachableError, match="cannot be reached"):
        push(checkpoint, REPO, progress=breaking)
    assert CONFIG not in hub.files(REPO)
    with pytest.raises(CheckpointError):
        SHAREModel.from_pretrained(REPO)
    hub.clear_faults()
    pushed = push(checkpoint, REPO)
    assert 0 < pushed.files < 6
    assert SHAREModel.from_pretrained(REPO).adapter_names == SHAREModel.from_pretrained(checkpoint).adapter_names
    a, b = hub.files(REPO), local_files(checkpoint)
    assert all(a[p] == (checkpoint / p).read_bytes() for p in b if p.endswith(".safetensors"))


def test_a_first_push_that_is_killed_goes_on(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "BATCH", 4)
    monkeypatch.setattr(patience, "PATIENCE", 0.05)

    def breaking(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for i, result in enumerate(results, 1):
            if step == "push" and i == 8:
                hub.fault(kind="commit", drop=True, times=None)
            yield result

    with pytest.raises(UnreachableError):
        push(checkpoint, REPO, progress=breaking)
    there = hub.files(REPO).keys() - {".gitattributes"}
    assert len(there) == 8
    assert CONFIG not in there
    hub.clear_faults()
    pushed = push(checkpoint, REPO)
    assert pushed.present == 8
    assert pushed.files == len(hub.files(REPO)) - 1 - 8
    assert SHAREModel.from_pretrained(REPO).reconstruct("a00")


@pytest.mark.parametrize("fault", [{"cut_after": 10}, {"cut_after": 0, "reset": False}, {"drop": True}])
def test_an_answer_that_is_lost_is_no_second_commit(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    push(checkpoint, REPO)
    without(checkpoint, "a02")  # what is deleted cannot be deleted twice
    hub.fault(kind="commit", times=1, **fault)
    before = len(history(hub))
    pushed = push(checkpoint, REPO)
    assert len(history(hub)) == before + 2
    assert pushed.revision == hub.repos[REPO].refs["main"]
    assert "a02" not in SHAREModel.from_pretrained(REPO).adapter_names


def test_a_repository_that_is_not_for_it_is_left_alone(hub: FakeHub, checkpoint: Path) -> None:
    other = {"adapters/finance/adapter_model.safetensors": b"x", "adapter_config.json": b"{}", "README.md": b"mine"}
    hub.add(REPO, other)
    with pytest.raises(UsageError, match=r"something else than a checkpoint.*adapter_config.json.*overwrite"):
        push(checkpoint, REPO)
    assert hub.files(REPO).items() >= other.items()
    assert hub.count("commit") == 0
    push(checkpoint, REPO, overwrite=True)
    assert hub.files(REPO).items() >= other.items()  # nothing of it is deleted all the same
    theirs = {f"adapters/{name}/adapter_meta.json": b"{}" for name in ("x", "y")} | {CONFIG: b"{}"}
    hub.add("alice/second", theirs)
    with pytest.raises(UsageError, match=r"another checkpoint.*x, y"):
        push(checkpoint, "alice/second")
    assert push(checkpoint, "alice/second", overwrite=True).deleted == 2


def test_an_answer_to_the_last_commit_that_is_lost(hub: FakeHub, checkpoint: Path) -> None:
    def breaking(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        yield from results
        if step == "push":
            hub.fault(kind="commit", cut_after=3)

    pushed = push(checkpoint, REPO, progress=breaking)
    assert pushed.revision == hub.repos[REPO].refs["main"]
    assert len(history(hub)) == 3
    assert CONFIG in hub.files(REPO)


def test_what_is_taken_out_goes_from_the_hub_too(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    hub.update(REPO, {"adapters/stray.txt": b"x", "notes.txt": b"mine"})
    assert {"skipped.json", "eigenvalues.safetensors"} <= hub.files(REPO).keys()
    without(checkpoint, "a02")
    (checkpoint / "skipped.json").unlink()
    (checkpoint / "eigenvalues.safetensors").unlink()
    sent = hub.count("lfs-put")
    pushed = push(checkpoint, REPO)
    assert hub.files(REPO).keys() - {"README.md", ".gitattributes", "notes.txt", "adapters/stray.txt"} == local_files(
        checkpoint
    )
    assert hub.count("lfs-put") == sent
    assert pushed.files == 2  # the card and the configuration
    assert pushed.deleted == 2 + 3
    deleting, whole = history(hub)[-2:]
    assert CONFIG not in deleting
    assert CONFIG in whole
    assert "a02" not in SHAREModel.from_pretrained(REPO).adapter_names


def test_if_only_the_configuration_differs_it_is_replaced(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    rename(checkpoint, share_version="0.1.1")
    before = len(history(hub))
    assert push(checkpoint, REPO).files == 1
    assert len(history(hub)) == before + 1


def test_somebody_else_who_pushes_at_the_same_time_is_noticed(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "BATCH", 5)

    def meddling(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        for i, result in enumerate(results, 1):
            if step == "push" and i == 5:
                hub.update(REPO, {"adapters/other/loadings.safetensors": b"x"})
            yield result

    with pytest.raises(StreamError, match="somebody else"):
        push(checkpoint, REPO, progress=meddling)
    assert CONFIG not in hub.files(REPO)
    push(checkpoint, REPO)
    assert "adapters/other/loadings.safetensors" not in hub.files(REPO)


# -- where it is uploaded to ----------------------------------------------------------------------------


def test_a_pull_request_takes_all_commits(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "BATCH", 6)
    hub.add("org/share", {"README.md": b"# of another"}, peft_type=None)
    with pytest.raises(StreamError, match="may not write"):
        push(checkpoint, "org/share")
    hub.users[ALICE] = {"org/share"}
    hub.add(REPO, {}, peft_type=None)
    pushed = push(checkpoint, REPO, create_pr=True)
    assert pushed.revision == "refs/pr/1"
    assert pushed.url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.repos[REPO].pulls == 1
    assert not hub.files(REPO)
    assert SHAREModel.from_pretrained(REPO, revision="refs/pr/1").adapter_names
    without(checkpoint, "a02")
    again = push(checkpoint, REPO, revision="refs/pr/1")
    assert again.revision == "refs/pr/1"
    assert hub.repos[REPO].pulls == 1
    assert "adapters/a02/loadings.safetensors" not in hub.files(REPO, "refs/pr/1")


def test_a_branch_is_made_if_there_is_none(hub: FakeHub, checkpoint: Path) -> None:
    pushed = push(checkpoint, REPO, revision="v2")
    assert hub.repos[REPO].refs["v2"] == pushed.revision
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert push(checkpoint, REPO, revision="v2").files == 0
    assert SHAREModel.from_pretrained(REPO, revision="v2").adapter_names


@pytest.mark.parametrize(
    ("repo", "how", "match"),
    [
        ("share", {}, "no id of a repository"),
        ("../share", {}, "no id of a repository"),
        (REPO, {"revision": SHA}, "a commit cannot be pushed to"),
        (REPO, {"revision": "../x"}, "no name of a branch"),
        (REPO, {"revision": "a//b"}, "no name of a branch"),
        (REPO, {"token": "hf_abc\n"}, "characters that none has"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    hub: FakeHub, checkpoint: Path, repo: str, how: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        push(checkpoint, repo, **how)
    assert "hf_abc" not in str(caught.value)
    assert not hub.requests


def test_offline_says_so(hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        push(checkpoint, REPO)
    assert not hub.requests


def test_a_wrong_token_is_said_and_not_shown(hub: FakeHub, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(StreamError, match="token that may write") as caught:
        push(checkpoint, REPO, token="hf_wrongtoken_x")
    assert "hf_wrongtoken_x" not in f"{caught.value!r} {caught.value} {caplog.text}"
    with pytest.raises(StreamError, match="may not write"):
        push(checkpoint, "bob/share")
    assert not hub.repos


def test_rate_limits_and_failures_are_waited_out(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience, "_said", [])
    hub.fault(kind="commit", status=429, headers={"RateLimit": '"api";r=0;t=0'})
    hub.fault(kind="info", status=503)
    hub.fault(kind="create", drop=True)
    hub.fault(kind="validate-yaml", status=502, body=b"<html>")
    hub.fault(kind="tree", cut_after=5)
    push(checkpoint, REPO)
    assert len(history(hub)) == 3
    assert CONFIG in hub.files(REPO)
    assert "waiting" in caplog.text


# -- who may read it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["gated", "private"])
def test_closed_sources_make_the_repository_private(
    hub: FakeHub, checkpoint: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    mark(checkpoint, "a01", repo="org/closed", **{why: True})
    assert push(checkpoint, REPO).private
    assert hub.repos[REPO].private
    assert "made private" in caplog.text
    assert "a01" in caplog.text
    assert push(checkpoint, REPO).files == 0


def test_a_public_repository_does_not_get_closed_sources_unless_the_user_insists(
    hub: FakeHub, checkpoint: Path
) -> None:
    push(checkpoint, REPO)
    mark(checkpoint, "a01", repo="org/closed", gated=True)
    before = hub.files(REPO)
    with pytest.raises(UsageError, match=r"public.*a01.*private=False"):
        push(checkpoint, REPO)
    assert hub.files(REPO) == before
    assert not push(checkpoint, REPO, private=False).private
    assert not push(checkpoint, "alice/another", private=False).private
    assert b"gated" in hub.files("alice/another")["README.md"]


@pytest.mark.parametrize("private", [False, True])
def test_the_visibility_of_a_repository_is_not_changed(hub: FakeHub, checkpoint: Path, private: bool) -> None:
    assert push(checkpoint, REPO, private=private).private == private
    with pytest.raises(UsageError, match="the repository is there"):
        push(checkpoint, REPO, private=not private)
    assert push(checkpoint, REPO).private == private


# -- what does not leave the machine --------------------------------------------------------------------


def test_no_path_and_no_token_is_uploaded(
    hub: FakeHub, checkpoint: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (checkpoint / "README.md").write_text(MARK)  # the card of another push
    (checkpoint / "private.txt").write_text("a file of the user's own")
    (checkpoint / "adapters" / "a00" / "notes.txt").write_text("another")
    (checkpoint / "adapters" / "forgotten").mkdir()
    (checkpoint / "adapters" / "forgotten" / "adapter_meta.json").write_text("{}")
    there = b"\n".join(p.read_bytes() for p in made.rglob("*.json"))
    assert b"secretfolder" in there
    assert b"bad ones" in there
    push(checkpoint, REPO, token=ALICE)
    push(checkpoint, "alice/again", private=True)
    secrets = [str(made.parent), str(tmp_path), str(Path.home()) + "/", ALICE, "secretfolder", "pytest-of", "~/"]
    secrets += ["my adapters", "bad ones", "models/", "private/", "of the user's own", "notes.txt", "forgotten"]
    for data in everything(hub):
        assert not [s for s in secrets if s.encode() in data], data
    assert ALICE not in caplog.text
    files = hub.files(REPO)
    config = json.loads(files[CONFIG])
    assert config["base_model_name_or_path"] == "tiny base"
    meta = json.loads(files["adapters/a00/adapter_meta.json"])
    assert meta["original_config"]["base_model_name_or_path"] == "tiny base"
    assert meta["original_config"]["parent_library"] == ".../lib"
    assert meta["original_config"]["auto_mapping"] == {"module": ".../module.py"}
    assert meta["original_adapter_path"].startswith("local:a00-")
    assert meta["original_adapter_path"] == meta[OURS]["source_id"]
    assert unsealed(meta) is not None
    (skipped,) = json.loads(files["skipped.json"])
    assert skipped["source"].startswith("local:bad-")
    assert skipped["reason"]


def test_a_checkpoint_that_was_pushed_and_fetched_is_pushed_again_as_it_is(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    push(checkpoint, REPO)
    copy = fetched(hub, tmp_path / "copy")
    assert push(copy, REPO).files == 0
    assert SHAREModel.from_pretrained(REPO).push_to_hub("alice/third")
    assert hub.files("alice/third").keys() == hub.files(REPO).keys()


def test_what_a_scrubber_does_to_text() -> None:
    home = str(Path.home())
    scrub = Scrubber("org/base", ["/work/me here"])
    reason = (
        "no such file (found /data/x y/adapter_model.bin; expected '/z/a (1)/b'). See https://hf.co/docs/x and a/b."
    )
    text = {
        "reason": reason,
        "found": "C:\\Users\\me\\a.bin",
        "hub": f"org/name@{SHA}//sub/folder is kept",
        "notes": [
            f"in {home}/deep/down, {home}.",
            "file:///etc/x",
            "/work/me here/q/r",
            "1 / 2",
            "n/a",
            "~bob/k ../k/l",
        ],
        "base_aliases": ["/models/a", "org/other"],
        "original_config": {"target_modules": r".*/\(q|v)", "rank_pattern": {"^/x": 4}, "revision": "refs/pr/1"},
        "number": 3,
    }
    found = scrub(text)
    assert found == {
        "reason": "no such file (found .../adapter_model.bin; expected '.../b'). See https://hf.co/docs/x and a/b.",
        "found": ".../a.bin",
        "hub": text["hub"],
        "notes": ["in .../down, ....", ".../x", ".../r", "1 / 2", "n/a", ".../k .../l"],
        "base_aliases": ["org/base", "org/other"],
        "original_config": text["original_config"],
        "number": 3,
    }
    assert scrub(found) == found
    source = scrub({"source": "/a/b (c), d/e", "reason": "what /a/b (c), d/e/file says"})
    assert source["source"].startswith("local:e-")
    assert source["reason"] == "what .../e/file says"
    assert Scrubber("/x/llama")({"base_model": "/x/llama", "b": {"base_model_name_or_path": "../y/z"}}) == {
        "base_model": "llama",
        "b": {"base_model_name_or_path": "z"},
    }


# -- what may be pushed ---------------------------------------------------------------------------------


def test_a_checkpoint_of_lorashare_is_pushed_too(hub: FakeHub, collection: list[str], tmp_path: Path) -> None:
    theirs = lorashare.SHAREModel.from_adapters(collection, num_components=3, device="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    push(tmp_path / "theirs", REPO)
    copy = fetched(hub, tmp_path / "copy")
    assert str(tmp_path).encode() not in b"".join(everything(hub))
    again = lorashare.SHAREModel.from_pretrained(copy)
    assert sorted(again.adapter_names) == sorted(theirs.adapter_names)
    name = again.adapter_names[0]
    assert all(torch.equal(v, again.reconstruct(name)[k]) for k, v in theirs.reconstruct(name).items())
    assert b"# 8 LoRA adapters" in hub.files(REPO)["README.md"]


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("breaking", "match"),
    [
        (lambda root: (root / CONFIG).unlink(), "no checkpoint"),
        (lambda root: (root / "adapters/a01/loadings.safetensors").unlink(), "missing"),
        (lambda root: (root / "adapters/a01/classifier_head.safetensors").unlink(), "cannot be read"),
        (lambda root: _damage(root / "shared_components.safetensors"), "damaged"),
        (lambda root: _damage(root / "adapters/a01/loadings.safetensors"), "damaged"),
        (lambda root: _damage(root / "adapters/a01/adapter_meta.json"), "cannot be read"),
        (lambda root: (root / "adapters/a01/adapter_meta.json").write_text('{"auths": 1}'), "not that of an adapter"),
        (lambda root: (root / "eigenvalues.safetensors").write_text("secret"), "cannot be read"),
        (lambda root: (root / "skipped.json").write_text('{"auths": 1}'), "not what lorashare-stream writes"),
        (lambda root: rename(root, adapter_names=["../../x"]), "no path components"),
        (lambda root: rename(root, adapter_names=[]), "no path components"),
    ],
)
def test_only_a_whole_checkpoint_is_pushed(
    hub: FakeHub, checkpoint: Path, breaking: Callable[[Path], Any], match: str
) -> None:
    breaking(checkpoint)
    with pytest.raises(CheckpointError, match=match):
        push(checkpoint, REPO)
    assert not hub.requests


def test_a_checkpoint_that_changes_during_the_push_is_noticed(hub: FakeHub, checkpoint: Path) -> None:
    def meddling(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        if step == "push":
            _damage(checkpoint / "adapters/a01/loadings.safetensors")
        yield from results

    with pytest.raises(CheckpointError, match="changed during the push"):
        push(checkpoint, REPO, progress=meddling)
    assert CONFIG not in hub.files(REPO)


def test_many_adapters_are_said(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    push(checkpoint, REPO)
    assert "advises" not in caplog.text
    monkeypatch.setattr(pushing, "ENTRIES", 5)
    push(checkpoint, REPO)
    assert "6 adapters" in caplog.text
    assert "at most 5 entries" in caplog.text


# -- the card -------------------------------------------------------------------------------------------


def origin(repo: str, **told: Any) -> HubOrigin:
    facts = {"revision": SHA, "subfolder": "", "gated": False, "private": False, "license": None}
    return HubOrigin(repo=repo, **facts | told)


def front_matter(text: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return values


def test_the_card_says_what_it_is(hub: FakeHub, checkpoint: Path) -> None:
    for i in range(6):
        mark(checkpoint, f"a{i:02}", repo=f"org/adapter{i}", license="apache-2.0", gated=i == 1)
    rename(checkpoint, base_model_name_or_path="org/base")
    push(checkpoint, REPO, private=False)
    text = hub.files(REPO)["README.md"].decode()
    assert front_matter(text) == {
        "library_name": "lorashare-stream",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["lora", "peft", "share", "lorashare"],
        "license": "apache-2.0",
    }
    errors = read_share_config(checkpoint).ours["errors"]
    for part in (
        f"mean {errors['mean']:.4f}", f"worst {errors['max']:.4f}", "| objective | delta |", "| components k | 4 |",
        "the basis included", "[org/base](https://huggingface.co/org/base)", f'from_pretrained("{REPO}")',
        "[lorashare]",
        f"| a01 | [org/adapter1](https://huggingface.co/org/adapter1/tree/{SHA}) @ {SHA[:12]} | apache-2.0 | gated |",
    ):  # fmt: skip
        assert part in text
    assert push(checkpoint, REPO, private=False).files == 0


def test_the_card_of_local_adapters_names_no_base_and_no_licence(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    text = hub.files(REPO)["README.md"].decode()
    assert front_matter(text).keys() == {"library_name", "tags"}
    assert "| a01 | a local folder |  |  |" in text


def test_the_users_own_card_is_kept(hub: FakeHub, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    (checkpoint / "README.md").write_text("# Mine")
    push(checkpoint, REPO)
    assert hub.files(REPO)["README.md"] == b"# Mine"
    (checkpoint / "README.md").unlink()
    assert push(checkpoint, REPO).files == 0
    assert hub.files(REPO)["README.md"] == b"# Mine"
    assert "left as it is" in caplog.text
    hub.update(REPO, {"README.md": f"{MARK} old".encode()})
    assert push(checkpoint, REPO).files == 2
    assert b"# 6 LoRA adapters" in hub.files(REPO)["README.md"]


def test_a_card_that_links_elsewhere_is_not_followed(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret of the user")
    (checkpoint / "README.md").symlink_to(tmp_path / "id_rsa")
    push(checkpoint, REPO)
    assert b"secret of the user" not in b"".join(everything(hub))


HOSTILE = [
    "](javascript:alert(1))", "a|b", "a\n\n# b", "<img src=x onerror=alert(1)>", "---\nlicense: mit", "`x`", "*x*_y_",
    "x: [y", "&lt;b&gt;", "\u202eabc", "![i](http://x/y)", "www.evil.example", "http://evil.example", "\\|", "$x$", "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_strings_are_shown_and_do_nothing(checkpoint: Path, text: str) -> None:
    config = read_share_config(checkpoint)
    stats = json.loads(json.dumps(config.compression_stats))
    stats[OURS]["errors"]["worst"][0]["name"] = text
    stats[OURS] |= {"projected": [text], "verbatim_adapters": [text, "b"]}
    config = replace(config, base_model_name_or_path=text, compression_stats=stats)
    plain = card(replace(config, base_model_name_or_path="x"), {"n": origin("org/a")}, REPO)
    sources = {
        text: origin(text, revision=text, subfolder=text, license=text),
        f"{text} ": origin("org/a", license=text),
    }
    found = card(config, sources, REPO)
    assert front_matter(found).keys() - {"license"} == {"library_name", "tags"}
    assert front_matter(found).get("license") in (None, text)
    assert found.isascii() or "\u202e" not in found
    lines = found.splitlines()
    assert len(lines) - len(plain.splitlines()) == 1 + ("license" in front_matter(found))  # a row more
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3, 5}
    for line in rows:
        outside = re.sub(r"\\.", "", line)  # what is not escaped
        links = re.findall(r"\]\(([^)]*)\)", outside)
        assert all(link.startswith("https://huggingface.co/org/a/tree/") for link in links)
        assert not re.search(r"[<>`*]", re.sub(r"&\w+;", "", outside))


def test_escaped_text_is_what_it_was_once_rendered() -> None:
    for text in HOSTILE:
        if text.isprintable():
            assert html.unescape(re.sub(r"\\([\\`*_{}\[\]()#+!|~^$=@:.])", r"\1", escaped(text))) == text


def test_the_table_of_sources_is_bounded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelcard, "ROWS", 3)
    text = card(read_share_config(checkpoint), {f"n{i}": None for i in range(10)}, REPO)
    assert "| n2 |" in text
    assert "| n3 |" not in text
    assert "And 7 more" in text


def test_figures_that_cannot_be_read_are_an_error(checkpoint: Path) -> None:
    config = read_share_config(checkpoint)
    config.compression_stats[OURS]["errors"] = {"mean": "x"}
    with pytest.raises(CheckpointError, match=r"key 'errors\.adapters'"):
        card(replace(config), {}, REPO)


def test_progress_is_told_of_all_files(hub: FakeHub, checkpoint: Path) -> None:
    told: dict[str, list[int]] = {}

    def progress(step: str, total: int, results: Iterator[Any]) -> Iterator[Any]:
        told[step] = [total, 0]
        for result in silent(step, total, results):
            told[step][1] += 1
            yield result

    push(checkpoint, REPO, progress=progress)
    assert told == {"look": [6, 6], "push": [len(hub.files(REPO)) - 2] * 2}
