"""`SHAREModel.swap`: whatever adapter was in a model, it then gives what PEFT gives with the other one alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorashare_stream.errors import CheckpointError, UnknownAdapterError, UsageError
from lorashare_stream.model import SHAREModel

from .features import IDS, bert, gpt2, llama

# PEFT takes the bias of lora_B for a shard of ZeRO-3.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. [0-9]+ LoRA tensor:peft.utils.warning.PeftWarning")

Compress = Callable[..., Path]
Base = Callable[[], Any]
COMMON = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
BERT: dict[str, dict[str, Any]] = {
    "plain": {},
    "other": {},
    "small": {"r": 2, "use_rslora": True},
    "large": {"r": 7, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"layer.0.attention.self.query": 6}, "alpha_pattern": {"value": 20}},
    "fewer": {"target_modules": ["query"]},
    "upper": {"layers_to_transform": [1]},
}
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "headless": ({"task_type": None}, r"classifier\.(weight|bias).*only the adapter in the model"),
    "wider": ({"target_modules": ["query", "key", "value"]}, r"key\.lora_A.*no such parameter"),
    "dora": ({"use_dora": True}, r"use_dora.*found True.*expected False"),
    "bias": ({"lora_bias": True}, r"lora_B\.bias"),
    "all biases": ({"bias": "all"}, r"\.bias.*no such parameter"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights"),
}


def train(base: Base, folder: Path, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(base(), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swap")
    for seed, (name, options) in enumerate(BERT.items()):
        train(bert, root / name, seed, **COMMON | options)
    return root


@pytest.fixture(params=[{"num_components": 16}, {"max_error": 0.2}], ids=["share", "coded"])
def share(request: pytest.FixtureRequest, sources: Path, compressed: Compress) -> SHAREModel:
    return SHAREModel.from_pretrained(compressed([str(sources)], **request.param))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def parameters(model: Any) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" in name}


def test_a_swapped_model_gives_what_a_fresh_one_gives(share: SHAREModel) -> None:
    names = list(BERT)
    wanted = {name: logits(share.apply(bert(), name).eval()) for name in names}
    model = share.apply(bert(), "plain").eval()
    for i in range(len(names)):  # each after each other, at least once
        for name in names[i:] + names[:i][::-1]:
            share.swap(model, name)
            assert torch.allclose(logits(model), wanted[name], atol=1e-4), name
            assert list(model.peft_config) == ["default"]


def test_parameters_stay_where_they_are_if_the_new_ones_fit(share: SHAREModel) -> None:
    model = share.apply(bert(), "large").eval()
    before = parameters(model)
    for name in ("plain", "small", "patterns", "fewer", "upper", "large", "other"):
        share.swap(model, name)
        assert parameters(model) == before, name
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, config.use_rslora, config.rank_pattern) == (7, 7, False, {})


def test_what_is_saved_after_a_swap_is_the_swapped_adapter(share: SHAREModel, tmp_path: Path) -> None:
    from peft import PeftModel

    model = share.apply(bert(), "large").eval()
    share.swap(model, "small")
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(bert(), str(tmp_path / "saved")).eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 1)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize("base", [gpt2, llama])
def test_language_models(base: Base, tmp_path: Path, compressed: Compress) -> None:
    targets = ["c_attn", "c_proj"] if base is gpt2 else ["q_proj", "down_proj"]
    for seed in range(3):
        options = {"r": 2 + seed, "target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": base is gpt2}
        train(base, tmp_path / "a" / f"t{seed}", seed, **options)
    share = SHAREModel.from_pretrained(compressed([str(tmp_path / "a")], num_components=8))
    model = share.apply(base(), "t0").eval()
    for name in ("t2", "t1", "t0", "t2"):
        share.swap(model, name)
        assert torch.allclose(logits(model), logits(share.apply(base(), name).eval()), atol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(share: SHAREModel) -> None:
    model = share.apply(bert(), "large").eval()
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        run(IDS)
        share.swap(model, "plain")  # scale 1 from here on
        run(IDS)
        count = len(seen)
        for name in ("other", "patterns", "small"):
            share.swap(model, name)
            wanted = logits(share.apply(bert(), name).eval())
            assert torch.allclose(run(IDS).logits, wanted, atol=1e-4)
    assert len(seen) == count
    torch.compiler.reset()


def test_models_without_a_place_are_refused(share: SHAREModel) -> None:
    base = bert()
    with pytest.raises(UsageError, match=r"BertForSequenceClassification.*share\.apply"):
        share.swap(base, "plain")
    model = share.apply(base, "plain").eval()
    before = logits(model)
    with pytest.raises(UnknownAdapterError, match="plane"):
        share.swap(model, "plane")
    model.merge_adapter()
    with pytest.raises(UsageError, match=r"merged.*unmerge_adapter"):
        share.swap(model, "other")
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(UsageError, match=r"several.*second"):
        share.swap(model, "other")


def test_what_does_not_fit_is_refused_and_loaded_anew(sources: Path, tmp_path: Path, compressed: Compress) -> None:
    for seed, (name, (options, _)) in enumerate(MISFITS.items()):
        train(bert, tmp_path / "misfits" / name, seed, **COMMON | options)
    share = SHAREModel.from_pretrained(compressed([str(sources), str(tmp_path / "misfits")], max_error=0.1))
    model = share.apply(bert(), "plain").eval()
    before = logits(model)
    for name, (_, said) in MISFITS.items():
        with pytest.raises((UsageError, CheckpointError), match=rf"{name}.*{said}"):
            share.swap(model, name)
        assert torch.equal(logits(model), before)
    model = share.apply(model.unload(), "wider").eval()  # as the error says
    assert torch.allclose(logits(model), logits(share.apply(bert(), "wider").eval()), atol=1e-5)
    share.swap(model, "plain")
    assert torch.allclose(logits(model), before, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "init_lora_weights"),
        ({"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}, "layer_replication"),
    ],
)
def test_a_base_that_an_adapter_has_changed_is_not_taken_for_the_base(
    options: dict[str, Any], said: str, tmp_path: Path, compressed: Compress
) -> None:
    train(llama, tmp_path / "a" / "changes", 0, r=4, **options)
    train(llama, tmp_path / "a" / "plain", 1, r=4, target_modules=["q_proj"])
    share = SHAREModel.from_pretrained(compressed([str(tmp_path / "a")], max_error=0.1))
    model = share.apply(llama(), "changes").eval()
    with pytest.raises(UsageError, match=said):
        share.swap(model, "plain")
    model = share.apply(llama(), "plain").eval()
    with pytest.raises((UsageError, CheckpointError), match=said):
        share.swap(model, "changes")
