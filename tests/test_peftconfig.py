from __future__ import annotations

import math
from typing import Any

import pytest

from lorashare_stream.errors import AdapterError
from lorashare_stream.peftconfig import check_lora, products

BASE: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def scale(config: dict[str, Any], module: str, rank: int = 8) -> float:
    found = products(BASE | config, {module: rank})
    assert found is not None
    assert found[0].experts == 1
    return found[0].scale


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q": 64}},
        {"rank_pattern": {"layers.0.q": 2}},
        {"rank_pattern": {"q": 2}, "alpha_pattern": {r"layers\.\d\.q": 3}, "use_rslora": True},
        {"rank_pattern": {"ayers.0.q": 2}},
    ],
)
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
def test_scale_is_what_peft_computes(config: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in "qv"})])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0]["v"](self.layers[0]["q"](x))

    model = get_peft_model(Net(), LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"], **config))
    for name in "qv":
        layer = model.base_model.model.layers[0][name]
        assert scale(config, f"layers.0.{name}", layer.r["default"]) == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "has no peft_type"),
        ({"r": 0}, "unusable r"),
        ({"r": "8"}, "unusable r"),
        ({"lora_alpha": math.nan}, "unusable lora_alpha"),
        ({"rank_pattern": [1]}, "unusable rank_pattern"),
        ({"enable_lora": [True, False]}, "legacy MergedLinear"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        check_lora(BASE | change)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+$", "a*a*a*a*a*b", "(?=(a+))b", r"(a)\1", "((a*)*)*", "x{2}(ab){9,}"]
)
def test_a_pattern_that_could_take_forever_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match="take forever"):
        scale({"alpha_pattern": {pattern: 1}}, "a" * 60)


@pytest.mark.parametrize(
    "pattern",
    [
        "q",
        "layers.0.q",
        r"layers\.\d+\.(self_attn\.)?[qv]_proj",
        r".*\.(0|1|2)\..*_proj",
        "^model.*q$",
        "(q|v)_proj",
        "a{3}",
    ],
)
def test_patterns_as_people_write_them_are_taken(pattern: str) -> None:
    assert scale({"alpha_pattern": {pattern: 8}}, "no.match.here") == 2.0


def test_a_pattern_that_is_no_expression_is_an_error_of_ours() -> None:
    with pytest.raises(AdapterError, match="no regular expression"):
        scale({"alpha_pattern": {"(": 1}}, "q")
