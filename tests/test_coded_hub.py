"""Coded checkpoints on the Hub: what is uploaded, what of it is fetched for one adapter, and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lorashare_stream.checkpoint import packs
from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import CONFIG, INDEX, PACKS
from lorashare_stream.checkpoint.index import inflated, read_index
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.edits.remove import remove
from lorashare_stream.errors import CheckpointError, MissingCheckpointError, UsageError
from lorashare_stream.hub import retry as patience
from lorashare_stream.hub.push import push
from lorashare_stream.hub.repository import Repository
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, default_workspace, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import make_collection, make_tensors, tree_digest, write_adapter
from .fakehub import ALICE, FakeHub, patched

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # by the client, of its own PUT
REPO = "alice/coded"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters with heads, one without, in two packs and more, of a base model in a folder; and a bad one."""
    root = tmp_path_factory.mktemp("secretfolder")
    base = str(root / "models" / "tiny base")
    folders = make_collection(root / "my adapters", 4, base_model_name_or_path=base)
    tensors = make_tensors(np.random.default_rng(9), {"layers.0.q": (40, 24)})
    folders.append(str(write_adapter(root / "my adapters" / "plain", tensors, base_model_name_or_path=base)))
    config = json.loads(Path(folders[0], "adapter_config.json").read_text())
    config |= {"parent_library": str(root / "lib"), "auto_mapping": {"module": "~/private/module.py"}}
    Path(folders[0], "adapter_config.json").write_text(json.dumps(config))
    (root / "bad ones").mkdir()
    bad = shutil.copytree(folders[1], root / "bad ones" / "bad")
    (bad / "adapter_model.safetensors").write_bytes(b"x" * 100)
    out = root / "out"
    settings = Settings(max_error=0.2, device="cpu", on_error="skip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "ADAPTERS_MOST", 2)
        compress(plan_for(resolve([*folders, str(bad)]), settings, default_workspace(out)), out)
    return out


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "checkpoint"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(patience, "LONGEST", 0.01)
    with FakeHub() as fake:
        patched(monkeypatch, fake, tmp_path / "home", ALICE)
        yield fake


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def got(hub: FakeHub) -> list[tuple[str, str | None]]:
    """Files and ranges whose bytes were sent, and other requests; they are forgotten."""
    found = [(str(r.file if r.kind == "resolve" else r.kind), r.range) for r in hub.requests if r.method == "GET"]
    hub.requests.clear()
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_one_adapter_is_one_ranged_request(
    hub: FakeHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("org/coded", {**files_of(checkpoint), "extra/big.bin": b"x" * 1000})
    share, local = SHAREModel.from_pretrained("org/coded"), SHAREModel.from_pretrained(checkpoint)
    index = read_index(checkpoint / INDEX)
    assert got(hub) == [("info", None), (CONFIG, None), (INDEX, None)]
    for name in local.adapter_names:  # code and head of each
        assert same(share.reconstruct(name), local.reconstruct(name))
        ((file, asked),) = got(hub)
        at = index.adapters[name].code
        assert file == at.pack.file
        assert str(asked).startswith(f"bytes={at.offset}-")
    assert not list((tmp_path / "home").rglob("*.safetensors"))  # nothing of a pack is in the cache
    monkeypatch.setattr(Repository, "near", 1)
    plain, headed = index.adapters["plain"].code, index.adapters["a00"].code
    share.reconstruct("plain")
    assert got(hub) == [(plain.pack.file, f"bytes={plain.offset}-{plain.offset + plain.nbytes - 1}")]
    share.reconstruct("a00")  # its head lies behind the code of another
    assert [file for file, _ in got(hub)] == [headed.pack.file] * 2
    monkeypatch.setattr("lorashare_stream.hub.repository.LARGE", 10)
    share.reconstruct("a00")  # so large a part is fetched with all of its file
    assert {asked for _, asked in got(hub)} == {None}
    assert same(share.reconstruct("a00"), local.reconstruct("a00"))
    assert got(hub) == []
    with pytest.raises(CheckpointError, match="no components"):
        len(share.components)


PASSING = {"503": {"status": 503, "times": 2}, "reset": {"cut_after": 50}, "ignored": {"ignore_range": True}}


@pytest.mark.parametrize("fault", [*PASSING, "cut", "flipped", "gone"])
def test_what_can_happen_to_a_range(hub: FakeHub, checkpoint: Path, fault: str) -> None:
    files = files_of(checkpoint)
    code = read_index(checkpoint / INDEX).adapters["plain"].code
    whole = files[code.pack.file]
    if fault == "cut":
        files[code.pack.file] = whole[: code.offset]
    elif fault == "flipped":
        files[code.pack.file] = whole[: code.offset] + b"\xff" + whole[code.offset + 1 :]
    elif fault == "gone":
        del files[code.pack.file]
    hub.add("org/coded", files)
    share, local = SHAREModel.from_pretrained("org/coded"), SHAREModel.from_pretrained(checkpoint)
    if fault in PASSING:
        hub.fault(kind="resolve", method="GET", **PASSING[fault])
        assert same(share.reconstruct("plain"), local.reconstruct("plain"))
        return
    words = {"cut": "cut short", "flipped": "is damaged", "gone": "is missing"}[fault]
    with pytest.raises(CheckpointError, match=words):
        share.reconstruct("plain")
    other = next(n for n, a in read_index(checkpoint / INDEX).adapters.items() if a.code.pack != code.pack)
    assert same(share.reconstruct(other), local.reconstruct(other))


def test_all_of_it_is_saved_and_read_offline(hub: FakeHub, checkpoint: Path, tmp_path: Path) -> None:
    hub.add("org/coded", files_of(checkpoint))
    share = SHAREModel.from_pretrained("org/coded")
    cold = SHAREModel.from_pretrained("org/coded", local_files_only=True)
    with pytest.raises(MissingCheckpointError, match="not in the cache"):
        cold.reconstruct("a00")
    share.save_pretrained(tmp_path / "saved")
    assert tree_digest(tmp_path / "saved") == tree_digest(checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("of the user")
    share.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").unlink()
    assert tree_digest(tmp_path / "mine") == tree_digest(checkpoint)
    assert same(cold.reconstruct("a00"), SHAREModel.from_pretrained(checkpoint).reconstruct("a00"))


def test_what_is_pushed_names_no_folder_and_is_the_same_checkpoint(
    hub: FakeHub, made: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "private.txt").write_text("of the user")
    assert b"secretfolder" in inflated((checkpoint / INDEX).read_bytes())
    pushed = push(checkpoint, REPO, token=ALICE)
    stages = list(hub.repos[REPO].commits.values())
    assert all(CONFIG not in files for files in stages[:-1])  # it comes last
    files = hub.files(REPO)
    packed = {p.relative_to(checkpoint).as_posix() for p in (checkpoint / PACKS).iterdir()}
    assert len(packed) == 3
    assert files.keys() - {".gitattributes"} == {CONFIG, INDEX, "README.md", "skipped.json", *packed}
    told = b"\n".join([inflated(files[INDEX]), *(data for path, data in files.items() if path != INDEX)])
    for secret in (str(made.parent), str(tmp_path), "secretfolder", "my adapters", "bad ones", "models/", "~/", ALICE):
        assert secret.encode() not in told, secret
    index = read_index(files[INDEX])
    assert index.adapters["a00"].config["base_model_name_or_path"] == "tiny base"
    assert index.adapters["a00"].config["auto_mapping"] == {"module": ".../module.py"}
    assert str(index.adapters["a00"].record["source_id"]).startswith("local:a00-")
    share, local = SHAREModel.from_pretrained(REPO), SHAREModel.from_pretrained(checkpoint)
    for name in local.adapter_names:
        assert same(share.reconstruct(name), local.reconstruct(name))
        assert share.certified(name)["relative_error"] == local.certified(name)["relative_error"]
    assert push(checkpoint, REPO).files == 0
    share.save_pretrained(tmp_path / "saved")
    assert push(tmp_path / "saved", REPO).files == 0  # what has no path is what it was
    assert pushed.files == 4 + len(packed)


def test_a_push_of_what_has_changed_replaces_packs(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made, out)
    push(out, REPO)
    before = {path for path in hub.files(REPO) if path.startswith(PACKS)}
    make_collection(tmp_path / "new", 1, seed=5, base_model_name_or_path=str(made.parent / "models" / "tiny base"))
    add(out, resolve({"new": str(tmp_path / "new" / "a00")}), RunOptions())
    remove(out, ["a01"], RunOptions())
    done = push(out, REPO)
    after = {path for path in hub.files(REPO) if path.startswith(PACKS)}
    assert after == {pack.file for pack in read_index(out / INDEX).packs}
    assert (len(before - after), len(after - before), done.deleted) == (1, 2, 1)
    assert b'"a01"' not in inflated(hub.files(REPO)[INDEX])
    assert "new" in SHAREModel.from_pretrained(REPO).adapter_names


def test_another_checkpoint_and_another_form_are_replaced_only_by_overwrite(
    hub: FakeHub, checkpoint: Path, compressed_once: Path, tmp_path: Path
) -> None:
    push(checkpoint, REPO)
    others = tmp_path / "others"
    sources = make_collection(tmp_path / "b", 2)
    plan = plan_for(resolve({"b0": sources[0], "b1": sources[1]}), Settings(max_error=0.3, device="cpu"))
    compress(plan, others)
    with pytest.raises(UsageError, match="another checkpoint"):
        push(others, REPO)
    push(compressed_once, REPO)  # SHARE, with adapters of the same names
    files = hub.files(REPO)
    assert INDEX not in files
    assert not any(path.startswith(PACKS) for path in files)
    assert not SHAREModel.from_pretrained(REPO).config.coded
    push(others, REPO, overwrite=True)
    assert {path.partition("/")[0] for path in hub.files(REPO)} == {".gitattributes", CONFIG, INDEX, PACKS, "README.md"}


@pytest.mark.parametrize("part", ["index", "pack"])
def test_only_a_whole_checkpoint_is_pushed(hub: FakeHub, checkpoint: Path, part: str) -> None:
    path = checkpoint / INDEX if part == "index" else next((checkpoint / PACKS).iterdir())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|belongs to another"):
        push(checkpoint, REPO)
    assert REPO not in hub.repos


def test_the_card_says_what_it_is(hub: FakeHub, checkpoint: Path) -> None:
    push(checkpoint, REPO)
    text = hub.files(REPO)["README.md"].decode()
    assert "# 5 LoRA adapters in one coded checkpoint" in text
    assert "a relative dW error of at most 0.2 of every adapter" in text
    assert f'SHAREModel.from_pretrained("{REPO}")' in text
    assert "lorashare cannot read" in text
    assert "snapshot_download" not in text
    assert "loadings" not in text
    errors = read_share_config(checkpoint).ours["errors"]
    assert f"worst {errors['max']:.4f}" in text
