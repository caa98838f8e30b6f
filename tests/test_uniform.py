"""Uniform adapters: one rank, scale 1, the same dW, by the rules of every engine and by PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from lorashare_stream.errors import CheckpointError
from lorashare_stream.serving.uniform import uniform

from .features import FEATURES, loaded, loftq, logits, trained
from .test_features import PEFTS_OWN, WEIGHTS, adapters_of, check_landed

REFUSED = {  # what no uniform adapter can be made of, and a word of the reason
    "kasa": "KaSA", "bd-lora": "BD-LoRA", "monteclora": "MonteCLoRA", "velora": "VeLoRA",
    "target-parameters-that-differ": "only the base model tells",
    **dict.fromkeys(("pissa", "pissa-niter", "olora", "corda", "lora-ga", "loftq"), "part of the base model"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def loftq_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / WEIGHTS), json.loads((folder / "adapter_config.json").read_text())


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and torch.equal(a, other[k]) for k, a in one.items()
    )


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize("name", FEATURES)
def test_peft_makes_the_same_model_of_it(tmp_path: Path, name: str) -> None:
    feature = FEATURES[name]
    for seed, (adapter, options) in enumerate(adapters_of(feature).items()):
        trained(feature, options, seed, tmp_path / adapter)
        tensors, config = read(tmp_path / adapter)
        if name in REFUSED:
            with pytest.raises(CheckpointError, match=REFUSED[name]) as refusal:
                uniform(tensors, config, adapter=adapter)
            assert refusal.value.adapter == adapter
            assert "without" in str(refusal.value)
            continue
        try:
            plain, settings = uniform(tensors, config)
        except CheckpointError:
            assert name == "many-in-one-collection"
            assert config.get("kasa_config") or config["init_lora_weights"] == "olora"
            continue
        again, settings_again = uniform(plain, settings)
        assert same(plain, again)
        assert settings == settings_again
        model = loaded(feature, write(tmp_path / "uniform" / adapter, plain, settings))
        truth = logits(loaded(feature, tmp_path / adapter))
        assert torch.allclose(logits(model), truth, atol=1e-4)
        check_landed(model, plain)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert {scale for layer in layers for scale in layer.scaling.values()} == {1}
        assert {r for layer in layers for r in layer.r.values()} == {settings["r"]}
        assert isinstance(settings["target_modules"], list)
