from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashare_stream.adapters.config import check_lora, scalings
from lorashare_stream.adapters.patterns import matcher
from lorashare_stream.errors import AdapterError

BASE: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def scale(config: dict[str, Any], module: str, rank: int = 8) -> float:
    found = scalings(BASE | config, {module: rank})
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


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+$", "((a*)*)*", "x{2}(ab){9,}", r"(\w+\.)*q"])
def test_a_loop_within_a_loop_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"take forever.*a loop over more than single characters"):
        scale({"alpha_pattern": {pattern: 1}}, "q")


@pytest.mark.parametrize(
    "pattern",
    [
        "a*a*a*a*a*b",
        "(?=(a*a*a*a*))b",
        "a?" * 34 + "a" * 34 + "b",
        "(ab|a|b)" * 30 + "c",
        "(a)?" * 40,
        "(?:a{0,9}){1}" * 9,
    ],
)
def test_a_pattern_that_could_take_forever_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match=r"take forever.*fewer wildcards or alternatives"):
        scale({"alpha_pattern": {pattern: 1}}, "a" * 200)


def test_patterns_and_names_are_bounded_together() -> None:
    modules = {f"layers.{i}.q": 8 for i in range(20)}
    many = {f"layers.{i}.x": 1 for i in range(15_000)}
    assert scalings(BASE | {"alpha_pattern": many}, modules) is not None
    assert scalings(BASE | {"alpha_pattern": {rf"layers\.{i}\.x": 1 for i in range(15_000)}}, modules) is not None
    for patterns in ({f"{i}.*.*.*": 1 for i in range(20_000)}, {str(i): 1 for i in range(40_000)}):
        with pytest.raises(AdapterError, match="take forever"):
            scalings(BASE | {"alpha_pattern": patterns}, modules)
    for targets in ([f"q.w{i}" for i in range(9000)], [f"w{i}" for i in range(600_000)]):
        with pytest.raises(AdapterError, match="target_parameters"):
            scalings(BASE | {"target_parameters": targets}, modules)
    with pytest.raises(AdapterError, match="too long"):
        scalings(BASE | {"alpha_pattern": {"q" * 20_000: 1}}, modules)


@pytest.mark.parametrize(
    "pattern", [r"layers\.(?!0)\d+\.q", r"layers.(?=1).*", r"(l)ayers.1.q|\1", r"(layers)?(?(1).1.q|x)"]
)
def test_look_around_and_references_are_taken_as_peft_takes_them(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    for module in ("layers.0.q", "layers.1.q", "x.layers.1.q"):
        expected = 8 if get_pattern_key([pattern], module) == pattern else 2.0
        assert scale({"alpha_pattern": {pattern: 64}}, module) == expected


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


BITS = [
    "q",
    "v",
    "a",
    ".",
    r"\.",
    "layers",
    "0",
    "1",
    r"\d",
    "*",
    "+",
    "?",
    "(",
    ")",
    "|",
    "[01]",
    "_proj",
    ".*",
    "^",
    "$",
]
NAMES = st.lists(st.sampled_from(["layers", "0", "1", "q", "v", "a", "q_proj", "aa"]), min_size=1, max_size=5)


@settings(max_examples=400)
@given(st.lists(st.lists(st.sampled_from(BITS), max_size=7).map("".join), max_size=3), NAMES.map(".".join))
def test_patterns_match_as_those_of_peft(patterns: list[str], name: str) -> None:
    from peft.utils.other import get_pattern_key

    try:
        match = matcher(patterns, [name])
    except AdapterError:
        return
    found = match(name)
    assert (found if found is not None else name) == get_pattern_key(patterns, name)


def test_a_pattern_that_is_no_expression_is_an_error_of_ours() -> None:
    with pytest.raises(AdapterError, match="no regular expression"):
        scale({"alpha_pattern": {"(": 1}}, "q")
