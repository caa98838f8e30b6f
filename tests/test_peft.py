"""PEFT loads what `reconstruct` writes: the same keys, the same configuration, at full rank the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from lorashare_stream.model import SHAREModel

Compress = Callable[..., Path]


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()


CASES: dict[str, tuple[Callable[[], Any], list[dict[str, Any]]]] = {
    "bert with heads, ranks and scales of its own": (
        bert,
        [
            {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
            {"r": 2, "lora_alpha": 16, "target_modules": ["query"], "task_type": "SEQ_CLS", "use_rslora": True},
            {"r": 4, "rank_pattern": {"value": 8}, "alpha_pattern": {"query": 3}, "target_modules": ["query", "value"]},
        ],
    ),
    "gpt2 with Conv1D": (
        gpt2,
        [
            {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
            {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
        ],
    ),
}


def trained(base: Callable[[], Any], options: dict[str, Any], seed: int, folder: Path) -> torch.Tensor:
    """Save an adapter whose every tensor is random, and give the logits of its model."""
    model = get_peft_model(base(), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
                assert "lora_" in name or "classifier" in name
    model.save_pretrained(folder)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(12).reshape(2, 6)).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_peft(tmp_path: Path, compressed: Compress, case: str) -> None:
    base, adapters = CASES[case]
    expected = {f"a{i}": trained(base, options, i, tmp_path / f"a{i}") for i, options in enumerate(adapters)}
    assert all(not torch.allclose(out, logits(base()), atol=1e-2) for out in expected.values())
    share = SHAREModel.from_pretrained(compressed([tmp_path / name for name in expected], num_components=1000))
    for name, out in expected.items():
        folder = tmp_path / "rec" / name
        share.reconstruct(name, output_dir=folder)
        loaded = PeftModel.from_pretrained(base(), folder).eval()
        assert torch.allclose(logits(loaded), out, atol=1e-4)
        # PEFT warns of missing keys, and not at all of unexpected ones: compare the sets ourselves.
        assert get_peft_model_state_dict(loaded).keys() == load_file(folder / "adapter_model.safetensors").keys()
        original, written = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / name, folder))
        assert written == original
        assert LoraConfig.from_pretrained(folder).to_dict() == LoraConfig.from_pretrained(tmp_path / name).to_dict()
        applied = share.apply(base(), adapter_name=name)
        assert isinstance(applied, PeftModel)
        assert torch.allclose(logits(applied.eval()), out, atol=1e-4)


def test_a_coarser_basis_does_change_the_logits(tmp_path: Path, compressed: Compress) -> None:
    """The comparison above can fail."""
    base, adapters = CASES["gpt2 with Conv1D"]
    out = [trained(base, options, i, tmp_path / f"a{i}") for i, options in enumerate(adapters)]
    share = SHAREModel.from_pretrained(compressed([tmp_path / "a0", tmp_path / "a1"], num_components=1))
    assert not torch.allclose(logits(share.apply(base(), "a0").eval()), out[0], atol=1e-4)
