"""Limits of bytes and of error, one at a time; checkpoints in forms that are gone, refused with what to do instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashare_stream.cli.app import main
from lorashare_stream.errors import CheckpointError, UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.settings import Settings

from .conftest import factor_keys, load_tensors, make_collection, write_adapter

Compress = Callable[..., Path]


@pytest.mark.parametrize("values", [
    {"max_bytes": 10, "ratio": 2.0}, {"max_error": 0.1, "ratio": 2.0}, {"max_error": 0.0}, {"max_error": 1.0},
    {"ratio": 0.5}, {"max_bytes": 0}, {"ratio": float("nan")},
])  # fmt: skip
def test_limits_that_cannot_be_meant_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="more than one limit" if len(values) > 1 else "cannot be"):
        Settings.from_mapping(values)


def test_a_limit_takes_the_place_of_k(
    tmp_path: Path, collection: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *collection, "-o", str(tmp_path / "x"), "-k", "4", "--max-error", "0.1"]) == 2
    assert "--max-error is not allowed with -k" in capsys.readouterr().err
    config = tmp_path / "config.yaml"
    config.write_text("num_components: 8\nmax_error: 0.2\n")
    assert main(["plan", *collection, "--config", str(config)]) == 2
    assert "twice" in capsys.readouterr().err
    config.write_text("num_components: 8\n")
    assert main(["plan", *collection, "--config", str(config), "--max-error", "0.2", "--json"]) == 0


def test_a_limit_needs_errors_of_dw() -> None:
    with pytest.raises(UsageError, match="max_error needs objective delta"):
        Settings(objective="factors", max_error=0.1)
    assert Settings(ratio=20.0).bought == ("ratio", 20.0)
    assert Settings(objective="factors").bought == ()


@pytest.mark.parametrize("older", [{"dtype": "I8"}, {"rule": {"price": 1e-6, "limit": None, "own": True}}])
@pytest.mark.parametrize("command", [
    ["info", "OUT"], ["verify", "OUT"], ["add", "OUT", "OUT"], ["remove", "OUT", "a00"],
    ["report", "OUT", "-o", "x.html"], ["refit", "OUT", "-k", "2", "-o", "OUT"],
    ["reconstruct", "OUT", "--all", "-o", "x"],
])  # fmt: skip
def test_a_checkpoint_in_a_form_that_is_gone_is_to_be_compressed_again(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], older: dict[str, Any], command: list[str]
) -> None:
    path = checkpoint / "share_config.json"
    config = json.loads(path.read_text())
    config["compression_stats"]["lorashare_stream"] |= older
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="compress its sources again"):
        SHAREModel.from_pretrained(checkpoint)
    words = {"OUT": str(checkpoint), "x": str(checkpoint.parent / "x"), "x.html": str(checkpoint.parent / "x.html")}
    assert main([words.get(word, word) for word in command]) == 1
    assert "compress its sources again" in capsys.readouterr().err


def test_all_bytes_on_disk_are_told(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 12)
    bad = load_tensors(folders[0])
    bad[factor_keys("layers.0.q")[0]][0, 0] = np.nan
    stranger = str(write_adapter(tmp_path / "bad", bad, r=4, lora_alpha=8))
    for sources, options in ((folders, {}), ([*folders, stranger], {"on_error": "skip"})):
        out = compressed(sources, f"out{len(sources)}", num_components=8, **options)
        size = SHAREModel.from_pretrained(out).config.ours["bytes"]
        parts = sum(size[part] for part in ("basis", "loadings", "verbatim", "metadata"))
        assert parts == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        assert size["originals"] == sum(p.stat().st_size for f in folders for p in Path(f).glob("*.safetensors"))


def test_a_cut_leaves_an_adapter_without_any_dw_kept_exact(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 6)
    zero = {key: 0 * t if "lora_B" in key else t for key, t in load_tensors(folders[0]).items()}
    folders.append(str(write_adapter(tmp_path / "in" / "zero", zero, r=4, lora_alpha=8)))
    out = compressed(folders, num_components=8)
    assert main(["refit", str(out), "-k", "4", "-o", str(tmp_path / "cut")]) == 0
    for place in (out, tmp_path / "cut"):
        ours = SHAREModel.from_pretrained(place).config.ours
        assert ours["verbatim_adapters"] == ["zero"]
        assert ours["errors"]["adapters"] == 6
