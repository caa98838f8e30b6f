"""The resolver of vLLM, without vLLM: what it answers, and the folders of its cache. scripts/test_vllm.sh has vLLM."""

from __future__ import annotations

import asyncio
import errno
import importlib
import logging
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import lorashare
import pytest
import torch
from safetensors.torch import load_file

import lorashare_stream.hub.retry
from lorashare_stream.checkpoint.config import SHAREConfig, read_share_config
from lorashare_stream.edits.add import add
from lorashare_stream.edits.options import RunOptions
from lorashare_stream.errors import CheckpointError, DiskError
from lorashare_stream.model import SHAREModel
from lorashare_stream.plan.sources import resolve
from lorashare_stream.serving import folders as room
from lorashare_stream.serving.folders import FolderCache, names_base

from .conftest import make_collection, tree_digest
from .fakehub import FakeHub, patched

Compress = Callable[..., Path]
BASE = "tiny-base"


@dataclass
class LoRARequest:
    """As vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0
        assert self.lora_path


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, Any] = {}

    def get_supported_resolvers(self) -> Set[str]:
        return self.resolvers.keys()

    def register_resolver(self, resolver_name: str, resolver: Any) -> None:
        self.resolvers[resolver_name] = resolver


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The module of the resolver, and the registry, beside a stand-in for what it imports of vLLM."""
    registry = Registry()
    names = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": registry},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    name = "lorashare_stream.serving.vllm"
    module = importlib.import_module(name)
    yield SimpleNamespace(module=module, registry=registry)
    del sys.modules[name]  # it has names of the stand-in


def resolver(plugin: SimpleNamespace, checkpoint: Path | str, cache: Path, **environment: str) -> Any:
    found = plugin.module.resolver_from(
        {"LORASHARE_CHECKPOINT": str(checkpoint), "LORASHARE_CACHE": str(cache)} | environment
    )
    assert found is not None
    return found


def ask(resolver: Any, name: str, base: str = BASE) -> LoRARequest | None:
    found: LoRARequest | None = asyncio.run(resolver.resolve_lora(base, name))
    return found


@pytest.mark.parametrize("options", [{"num_components": 4}, {"max_error": 0.2}], ids=["share", "coded"])
def test_a_name_is_a_folder_with_the_uniform_adapter(
    plugin: SimpleNamespace, tmp_path: Path, collection: list[str], compressed: Compress, options: dict[str, Any]
) -> None:
    out, cache = compressed(collection, **options), tmp_path / "cache"
    served = resolver(plugin, out, cache)
    # heads of its own (`head.weight`) are none that vLLM takes
    with pytest.raises(CheckpointError, match=r"a03.*head"):
        ask(served, "a03")
    assert not [p for p in cache.rglob("*") if p.is_file()]
    del collection[:]
    assert ask(served, "nobody") is None


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Adapters without heads."""
    from safetensors.torch import save_file

    folders = make_collection(tmp_path / "plain", 5, task_type="CAUSAL_LM", use_rslora=True)
    for folder in folders:
        path = Path(folder, "adapter_model.safetensors")
        save_file({k: t for k, t in load_file(path).items() if "lora_" in k}, path)
    return folders


@pytest.fixture(params=[{"num_components": 4}, {"max_error": 0.2}], ids=["share", "coded"])
def checkpoint(request: pytest.FixtureRequest, plain: list[str], compressed: Compress) -> Path:
    return compressed(plain, "served", **request.param)


def test_folders_are_written_once_and_hold_the_reconstruction(
    plugin: SimpleNamespace, tmp_path: Path, checkpoint: Path
) -> None:
    cache = tmp_path / "cache"
    served = resolver(plugin, checkpoint, cache)
    found = ask(served, "a03")
    assert found is not None
    assert found.lora_name == "a03"
    folder = Path(found.lora_path)
    assert folder.is_relative_to(cache)
    assert folder.name == "a03"
    wanted = SHAREModel.from_pretrained(checkpoint).reconstruct("a03", uniform=True)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in wanted.items())
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert ask(served, "a03") == found == ask(resolver(plugin, checkpoint, cache), "a03")
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert ask(served, "nobody") is None is ask(served, "../a03")
    assert sorted(p.name for p in cache.glob("*/*")) == ["a03"]


def test_another_base_is_refused_and_told_with_both_names(
    plugin: SimpleNamespace, tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ask(resolver(plugin, checkpoint, tmp_path / "cache"), "a01", "/models/other") is None
    assert BASE in caplog.text
    assert "/models/other" in caplog.text
    assert "LORASHARE_BASE_ALIAS=/models/other" in caplog.text
    again = resolver(plugin, checkpoint, tmp_path / "cache", LORASHARE_BASE_ALIAS="mirror, /models/other")
    assert ask(again, "a01", "/models/other") is not None
    assert ask(again, "a01", "mirror") is not None


def test_names_of_one_base(tmp_path: Path, compressed_once: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    config = SHAREConfig(base_model_name_or_path="org/base")
    snapshot = f"/home/u/hub/models--org--base/snapshots/{'0' * 40}"
    assert names_base(config, "org/base")
    assert names_base(config, snapshot)
    assert not names_base(config, snapshot.replace("org--base", "org--other"))
    assert not names_base(config, "")
    assert not names_base(config, "base")
    assert not names_base(SHAREConfig(), "org/base")
    assert names_base(SHAREConfig(base_model_name_or_path=str(tmp_path / "base")), str(tmp_path / "link"))
    for settings in ({"base_aliases": ["org/mirror"]}, {"any_base": True}):
        made = read_share_config(compressed_once)
        assert not names_base(made, "org/mirror")
        made.compression_stats["lorashare_stream"]["settings"] |= settings
        assert names_base(replace(made), "org/mirror")


def test_a_checkpoint_that_is_replaced_is_served_from_the_next_name_on(
    plugin: SimpleNamespace, tmp_path: Path, checkpoint: Path, plain: list[str]
) -> None:
    served = resolver(plugin, checkpoint, tmp_path / "cache")
    before = ask(served, "a01")
    assert before is not None
    folder = Path(before.lora_path)
    content = tree_digest(folder)
    late = Path(shutil.copytree(plain[1], tmp_path / "late"))
    assert ask(served, "late") is None
    add(checkpoint, resolve([str(late)]), RunOptions())
    assert ask(served, "late") is not None
    assert ask(served, "a01") == before  # of the same bases, or coded as before
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        ask(served, "a02")
    assert tree_digest(folder) == content


def test_what_is_replaced_while_it_is_read_is_read_again(
    plugin: SimpleNamespace, tmp_path: Path, plain: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = compressed(plain, num_components=4), compressed(plain[:4], "other", num_components=3)
    served = resolver(plugin, out, tmp_path / "cache")
    first = ask(served, "a01")
    real = room._digest

    def replaced(reader: Any, name: str) -> str:
        if not (tmp_path / "gone").exists():
            os.rename(out, tmp_path / "gone")
            os.rename(other, out)
        return real(reader, name)

    monkeypatch.setattr(room, "_digest", replaced)
    found = ask(served, "a02")
    assert found is not None
    assert first is not None
    wanted = SHAREModel.from_pretrained(out).reconstruct("a02", uniform=True)
    written = load_file(Path(found.lora_path, "adapter_model.safetensors"))
    assert all(torch.equal(written[key], tensor) for key, tensor in wanted.items())
    now = ask(served, "a01")
    assert now is not None
    assert now.lora_path != first.lora_path
    assert Path(first.lora_path).is_dir()


def test_what_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, plain: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = compressed(plain[:4], num_components=4), compressed(plain, "other", num_components=3)
    cache, real = FolderCache(str(out), tmp_path / "cache"), room.open_checkpoint

    def replaced(place: Any) -> Any:
        found = real(place)
        if not (tmp_path / "gone").exists():
            os.rename(out, tmp_path / "gone")
            os.rename(other, out)
        return found

    monkeypatch.setattr(room, "open_checkpoint", replaced)
    assert len(cache.reader().names) == 4
    assert len(cache.reader().names) == 5
    assert cache.folder("a04") is not None


def _folder(checkpoint: str, cache: str) -> str:
    return str(FolderCache(checkpoint, Path(cache)).folder("a01"))


@pytest.mark.slow
def test_one_name_asked_by_threads_and_processes_at_once(tmp_path: Path, checkpoint: Path) -> None:
    cache = FolderCache(str(checkpoint), tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: str(cache.folder("a01")), range(16)))
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        found |= set(processes.starmap(_folder, [(str(checkpoint), str(tmp_path / "other"))] * 4))
    assert len(found) == 2
    for path in map(Path, found):
        assert [p.name for p in path.parent.iterdir()] == ["a01"]
        assert len(load_file(path / "adapter_model.safetensors")) == 6


def test_a_full_disk_leaves_nothing_and_is_told(
    plugin: SimpleNamespace,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served, real = resolver(plugin, checkpoint, tmp_path / "cache"), room.save_adapter

    def full(folder: Path, *rest: Any) -> None:
        real(folder, *rest)
        (folder / "adapter_config.json").unlink()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "save_adapter", full)
    with pytest.raises(DiskError, match=r"a01.*full.*LORASHARE_CACHE"):
        ask(served, "a01")
    assert "disk of the cache is full" in caplog.text
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    monkeypatch.setattr(room, "save_adapter", real)
    assert ask(served, "a01") is not None


def test_a_damaged_adapter_is_told_by_name(plugin: SimpleNamespace, tmp_path: Path, checkpoint: Path) -> None:
    for path in [*checkpoint.glob("adapters/a01/loadings.safetensors"), *checkpoint.glob("packs/*")]:
        path.write_bytes(path.read_bytes()[:-40] + bytes(range(40)))
    served = resolver(plugin, checkpoint, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"a0\d"):
        list(map(partial(ask, served), ("a01", "a00", "a02", "a03", "a04")))
    assert not list((tmp_path / "cache").rglob("[.]*"))


def test_a_checkpoint_of_lorashare(plugin: SimpleNamespace, tmp_path: Path, plain: list[str]) -> None:
    for k in (3, 2):
        theirs = lorashare.SHAREModel.from_adapters(plain, num_components=k, device="cpu")
        theirs.save_pretrained(str(tmp_path / f"out{k}"))
    found = [ask(resolver(plugin, tmp_path / f"out{k}", tmp_path / "cache"), "a01") for k in (3, 2, 3)]
    assert found[0] == found[2] != found[1]


def test_a_checkpoint_on_the_hub(
    plugin: SimpleNamespace, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        monkeypatch.setattr(lorashare_stream.hub.retry, "LONGEST", 0.01)
        files = {str(p.relative_to(checkpoint)): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
        hub.add("org/served", files)
        monkeypatch.chdir(tmp_path)
        served = resolver(plugin, "org/served", tmp_path / "cache")
        assert not hub.requests  # nothing is asked for before a name is
        found = ask(served, "a01")
        assert found is not None
        before = len(hub.requests)
        assert ask(served, "a01") == found
        assert ask(served, "nobody") is None
        assert len(hub.requests) - before <= 1
    local = ask(resolver(plugin, checkpoint, tmp_path / "cache"), "a01")
    assert local == found


def test_the_entry_point_registers_what_the_environment_names(
    plugin: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for name in ("LORASHARE_CHECKPOINT", "LORASHARE_CACHE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    plugin.module.register()
    assert not plugin.registry.resolvers
    assert not caplog.text
    monkeypatch.setenv("LORASHARE_CHECKPOINT", str(tmp_path / "later"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    plugin.module.register()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in caplog.text
    (found,) = plugin.registry.resolvers.values()
    assert found.folders.cache == tmp_path / "xdg" / "lorashare-stream"
    caplog.clear()
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    plugin.module.register()
    assert not caplog.text
    with pytest.raises(CheckpointError, match="no checkpoint"):
        ask(found, "a01")
