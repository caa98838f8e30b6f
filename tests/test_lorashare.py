"""lorashare 0.1.3 is the oracle of the format: it loads what we write, we load what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lorashare
import pytest
import torch

from lorashare_stream.model import SHAREModel

from .conftest import load_tensors, make_collection

Compress = Callable[..., Path]


@pytest.mark.parametrize("objective", ["delta", "factors"])
@pytest.mark.parametrize("k", [3, "auto"])
def test_lorashare_reconstructs_the_same_from_our_checkpoint(
    collection: list[str], compressed: Compress, objective: str, k: int | str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = compressed(collection, num_components=k, objective=objective)
    ours, theirs = SHAREModel.from_pretrained(out), lorashare.SHAREModel.from_pretrained(out)
    assert ours.adapter_names == theirs.adapter_names
    assert ours.config.to_dict() == theirs.config.to_dict()
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.norm(a[k] - b[k]) <= 1e-6 * torch.norm(b[k]) for k in a)
        assert ours.adapter_configs[name] == theirs.adapter_configs[name]
        assert ours.adapter_sources[name] == theirs.adapter_sources[name]
    theirs.summary()
    printed = capsys.readouterr().out
    assert "tiny-base" in printed
    assert "compression" in printed


def test_lorashare_reads_bfloat16(collection: list[str], compressed: Compress) -> None:
    out = compressed(collection, num_components=3, dtype="bfloat16")
    ours, theirs = SHAREModel.from_pretrained(out), lorashare.SHAREModel.from_pretrained(out)
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
        assert all(torch.norm(a[k].float() - b[k].float()) <= 1e-2 * torch.norm(b[k].float()) for k in a)


def test_we_reconstruct_the_same_from_its_checkpoint(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = lorashare.SHAREModel.from_adapters(collection, num_components=3, device="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = SHAREModel.from_pretrained(tmp_path / "theirs")
    assert sorted(ours.adapter_names) == sorted(theirs.adapter_names)
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.norm(a[k] - b[k]) <= 1e-6 * torch.norm(b[k]) for k in a)
    ours.summary()
    assert "tiny-base" in capsys.readouterr().out
    ours.save_pretrained(tmp_path / "copy")
    assert SHAREModel.from_pretrained(tmp_path / "copy").adapter_names == ours.adapter_names


def test_code_written_for_lorashare_works_after_changing_the_import(tmp_path: Path, collection: list[str]) -> None:
    results = {}
    for module in (lorashare, __import__("lorashare_stream")):
        share = module.SHAREModel.from_adapters(
            {Path(p).name: p for p in collection}, 3, variance_threshold=0.9, device="cpu", on_error="skip"
        )
        share.save_pretrained(tmp_path / module.__name__)
        share = module.SHAREModel.from_pretrained(tmp_path / module.__name__)
        name = share.adapter_names[0]
        weights = share.reconstruct(name, output_dir=tmp_path / module.__name__ / "rec")
        original = {k: torch.from_numpy(v) for k, v in load_tensors(collection[0]).items()}
        error = share.reconstruction_error(name, original_weights=original)
        results[module.__name__] = (
            sorted(share.adapter_names), sorted(weights), sorted(error["per_layer"]), sorted(share.components),
            sorted(share.all_loadings[name]), sorted(share.all_classifier_heads[name]), share.adapter_configs[name],
            share.adapter_sources[name], share.config.num_components, share.config.num_adapters,
            share.config.layer_keys, {"mean", "max", "per_layer"} <= error.keys(),
        )  # fmt: skip
    assert results["lorashare"] == results["lorashare_stream"]


def test_errors_are_of_the_types_that_lorashare_raises(tmp_path: Path, collection: list[str]) -> None:
    for module in (lorashare, __import__("lorashare_stream")):
        with pytest.raises(ValueError, match="2"):
            module.SHAREModel.from_adapters(collection[:1])
        with pytest.raises(ValueError, match="on_error"):
            module.SHAREModel.from_adapters(collection, on_error="ignore")
        share = module.SHAREModel.from_adapters(collection, 3)
        with pytest.raises(KeyError):
            share.reconstruct("nobody")
        with pytest.raises(ValueError, match="original"):
            share.reconstruction_error(share.adapter_names[0])


@pytest.mark.parametrize("argument", [{"layer_by_layer": True}, {"chunk_size": 3}])
def test_arguments_without_effect_say_so_once(collection: list[str], argument: dict[str, object]) -> None:
    from lorashare_stream import model

    model._say_void.cache_clear()
    with pytest.warns(UserWarning, match="has no effect"):
        SHAREModel.from_adapters(collection, 3, **argument)
    SHAREModel.from_adapters(collection, 3, **argument)  # warnings are errors here


def test_a_temporary_checkpoint_goes_with_its_object(collection: list[str]) -> None:
    import gc

    share = SHAREModel.from_adapters(collection, 3)
    root = share._folder().root
    assert root.is_dir()
    del share
    gc.collect()
    assert not root.parent.exists()


def test_a_model_built_from_tensors_works_as_in_lorashare(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "a", 4)
    theirs = lorashare.SHAREModel.from_adapters(folders, num_components=3, device="cpu")
    ours = SHAREModel(
        theirs.config, theirs.components, theirs.all_loadings, theirs.adapter_configs, theirs.all_classifier_heads
    )
    name = theirs.adapter_names[0]
    a, b = ours.reconstruct(name), theirs.reconstruct(name)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in b)
