"""PEFT loads what a coded checkpoint gives back as it loads the original, also where it changes keys as it loads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorashare_stream.model import SHAREModel
from lorashare_stream.plan.sources import resolve
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import factor_keys, write_adapter

Compress = Callable[..., Path]
Shapes = Mapping[str, tuple[int, int]]
WEIGHTS, LIMIT = "adapter_model.safetensors", 0.1
HIDDEN, INNER, R, SCALE = 32, 24, 4, 2
TEXT = {
    "vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def mixtral() -> Any:
    config = MixtralConfig(**TEXT | {"intermediate_size": INNER, "num_local_experts": 3})
    return MixtralForCausalLM(config)


def qwen3_moe() -> Any:
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "head_dim": HIDDEN // 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **experts))


def llava() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16)
    config = LlavaConfig(vision_config=seen, text_config=LlamaConfig(**TEXT), image_token_index=49)
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 1}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    text = TEXT | SPECIAL | {"rope_parameters": rope}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def attention(stem: str) -> Shapes:
    shapes = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN, HIDDEN // 2)}
    return {f"{stem}.{n}.self_attn.{name}": shape for n in range(2) for name, shape in shapes.items()}


def experts(stem: str, names: tuple[str, str, str]) -> Shapes:
    up, gate, down = names
    shapes = {up: (HIDDEN, INNER), gate: (HIDDEN, INNER), down: (INNER, HIDDEN)}
    return {f"model.layers.{n}.{stem}.{e}.{name}": s for n in range(2) for e in range(3) for name, s in shapes.items()}


@dataclass(frozen=True)
class Old:
    """An adapter trained before transformers 5: a base model, modules as they were named then, and its targets."""

    base: Callable[[], Any]
    modules: Shapes
    targets: str | list[str]


W, PROJ = ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")
OLD = {
    "mixtral, an adapter of each expert": Old(
        mixtral,
        attention("model.layers") | experts("block_sparse_moe.experts", W),
        ["q_proj", "v_proj", *W],
    ),
    "qwen3-moe, an adapter of each expert": Old(
        qwen3_moe,
        attention("model.layers") | experts("mlp.experts", PROJ),
        ["q_proj", "v_proj", *PROJ],
    ),
    "llava, the language model outside": Old(
        llava, attention("language_model.model.layers"), r".*language_model.*\.[qv]_proj"
    ),
}
NOT_RENAMED = Old(qwen2_vl, attention("model.layers"), ["q_proj", "v_proj"])  # by PEFT 0.21: known by its class only


def tensors_of(seed: int, modules: Shapes, r: int) -> dict[str, np.ndarray]:
    """Random factors, whose singular values fall at a rate of each module's own."""
    rng, found = np.random.default_rng(seed), {}
    for module, (d_in, d_out) in modules.items():
        a, b = factor_keys(module)
        found[a] = rng.standard_normal((r, d_in)).astype(np.float32) / d_in**0.5
        found[b] = (rng.standard_normal((d_out, r)) * rng.uniform(0.4, 1) ** np.arange(r)).astype(np.float32)
    return found


def added(base: Callable[[], Any], folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT adds to each parameter of the base model when it merges the adapter of a folder."""
    torch.manual_seed(0)
    model = base().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    assert after.keys() == before.keys()
    return {key: after[key] - before[key] for key in after if not torch.equal(after[key], before[key])}


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    return float(sum(torch.sum(t.double() ** 2) for t in tensors.values())) ** 0.5


def given_back(root: Path, compressed: Compress, old: Old) -> tuple[SHAREModel, list[tuple[Path, Path]]]:
    """A coded checkpoint of two adapters, and where each lies beside what is reconstructed of it."""
    config = {"task_type": "CAUSAL_LM", "r": R, "lora_alpha": SCALE * R, "target_modules": old.targets}
    folders = [write_adapter(root / "in" / f"a{i}", tensors_of(i, old.modules, R), **config) for i in range(2)]
    share = SHAREModel.from_pretrained(compressed(folders, max_error=LIMIT))
    assert share.config.coded
    pairs = [(folder, root / "rec" / folder.name) for folder in folders]
    for original, written in pairs:
        share.reconstruct(original.name, output_dir=written)
        ours, theirs = load_file(written / WEIGHTS), load_file(original / WEIGHTS)
        assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
        first, second = (json.loads((f / "adapter_config.json").read_text()) for f in (original, written))
        assert first == second
    return share, pairs


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # PEFT does apply patterns to parameters
@pytest.mark.parametrize("case", OLD)
def test_keys_that_change_as_peft_loads_them(tmp_path: Path, compressed: Compress, case: str) -> None:
    old = OLD[case]
    share, pairs = given_back(tmp_path, compressed, old)
    for original, written in pairs:
        certified = share.certified(original.name)
        assert 0.01 < certified["relative_error"] <= LIMIT
        assert not certified["verbatim"]
        before, after = added(old.base, original), added(old.base, written)
        tensors = load_file(original / WEIGHTS)
        factors = [[tensors[key].double() for key in factor_keys(module)] for module in old.modules]
        products = {str(i): SCALE * b @ a for i, (a, b) in enumerate(factors)}
        assert norm(before) == pytest.approx(norm(products), rel=1e-4)  # every tensor of the original has landed
        assert before.keys() == after.keys()
        error = norm({key: after[key] - before[key] for key in before}) / norm(before)
        assert error == pytest.approx(certified["relative_error"], rel=1e-3)


def test_keys_that_peft_does_not_know_any_more_are_missed_alike(tmp_path: Path, compressed: Compress) -> None:
    _, pairs = given_back(tmp_path, compressed, NOT_RENAMED)
    for pair in pairs:
        said = []
        for folder in pair:
            with pytest.warns(UserWarning, match="missing adapter keys") as caught:
                assert not added(NOT_RENAMED.base, folder)
            said.append([str(warning.message) for warning in caught])
        assert said[0] == said[1]


@pytest.mark.slow
def test_thousands_of_experts_are_measured_in_seconds(tmp_path: Path, compressed: Compress) -> None:
    shapes = {"gate_proj": (16, 12), "up_proj": (16, 12), "down_proj": (12, 16)}
    stems = [f"model.layers.{n}.mlp.experts.{e}" for n in range(12) for e in range(128)]
    modules = {f"{stem}.{name}": shape for stem in stems for name, shape in shapes.items()}
    config = {"r": 12, "lora_alpha": 24, "target_modules": list(shapes)}
    folders = [write_adapter(tmp_path / "in" / f"m{i}", tensors_of(i, modules, 12), **config) for i in range(2)]
    share = SHAREModel.from_pretrained(compressed(folders, max_error=0.2))
    began = time.process_time()
    verdicts = list(verify(share, originals_of(share, resolve([str(f) for f in folders]))))
    assert time.process_time() - began < 60
    assert len(modules) == 4608
    assert [(v.name, v.problem) for v in verdicts] == [("m0", None), ("m1", None)]
    for verdict in verdicts:
        assert 0.05 < verdict.relative_error <= 0.2
        assert verdict.relative_error == pytest.approx(verdict.certified, rel=1e-4)
