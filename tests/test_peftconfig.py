from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorashare_stream.adapters.config import check_lora, scalings
from lorashare_stream.adapters.patterns import matcher
from lorashare_stream.errors import AdapterError, UndecidedError
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .conftest import make_collection, make_tensors, write_adapter

BASE: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def scale(config: dict[str, Any], module: str, rank: int = 8) -> float:
    found = scalings(BASE | config, {module: rank})
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
    ("pattern", "matches"),
    [
        ("(a+)+b", False), ("(a|a)*b", False), ("(a|aa)+$", True), ("((a*)*)*", True), ("(x+x+)+y", False),
        ("a*a*a*a*a*b", False), ("a?" * 34 + "a" * 34 + "b", False), ("(ab|a|b)" * 30 + "c", False),
        ("(?:a{0,9}){1}" * 25, True), ("[ab]*a[ab]{150}", True), ("q" * 20_000, False),
    ],
)  # fmt: skip
def test_a_pattern_that_would_take_re_forever_is_decided(pattern: str, matches: bool) -> None:
    assert scale({"alpha_pattern": {pattern: 8}}, "a" * 200) == (1.0 if matches else 2.0)


def test_patterns_and_names_are_bounded_together() -> None:
    modules = {f"layers.{i}.q": 8 for i in range(20)}
    for many in ((f"layers.{i}.x" for i in range(9000)), (rf"^layers\.{i}\.x" for i in range(1000))):
        assert scalings(BASE | {"alpha_pattern": dict.fromkeys(many, 1)}, modules)[0].scale == 2.0
    each = {f"model.layers.{i}.{part}_proj": 8 for i in range(80) for part in "qkvoudg"}  # as EVA writes them
    assert scalings(BASE | {"rank_pattern": each}, each)[0].scale == 2.0
    with pytest.raises(UndecidedError, match="1000 patterns are too many for 4000 modules"):
        scalings(
            BASE | {"alpha_pattern": {f"{i}.*.*.*": 1 for i in range(1000)}}, {f"layers.{i}.q": 8 for i in range(4000)}
        )
    for targets in ([f"q.w{i}" for i in range(9000)], [f"w{i}" for i in range(600_000)]):
        with pytest.raises(AdapterError, match="target_parameters"):
            scalings(BASE | {"target_parameters": targets}, modules)


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        (r"layers\.(?!0)\d+\.q", "q"), (r"layers.(?=1).*", "q"), (r"(l)ayers.1.q|\1", "q"), ("(?>q)", "q"),
        (r"(layers)?(?(1).1.q|x)", "q"), ("q++", "q"), (r"q\Z", "q"), ("(?x: q)", "q"), (r"\u0071", "q"),
        (f"{'q' * 300_000}", "q" * 300_000), (f"({'q' * 20_000})", "q"), ("(q{1000}){1000}", "q"),  # too large
        ("q{,3}", "q"), ("q{01}", "q"), ("q{1000000000}", "q"), ("[[:alpha:]]", "q"), ("[q[:alpha:]]", "q"),
        (r"(a)(b)(c)(d)(e)(f)(g)(h)(i)(j)(k)(l)\12", "q"), ("[q--]", "q"),  # RE2 takes these, as something else
        (r"\w", "\u00e9"), ("(?i:\u0131)", "i"), (r"\B", ""), ("q", "q\n"), ("q.", "q\ud800"),
    ],
)  # fmt: skip
def test_what_re2_does_not_decide_as_python_is_undecided(pattern: str, module: str) -> None:
    with pytest.raises(UndecidedError):
        scale({"alpha_pattern": {pattern: 64}}, module)


def test_an_adapter_with_such_a_pattern_is_kept_exact_and_named(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "in", 3)
    odd = make_tensors(np.random.default_rng(1), {"layers.0.q": (24, 24)})
    write_adapter(Path(folders[1]), odd, alpha_pattern={"layers.(?!0).q": 1})
    plan = plan_for(resolve(folders), Settings())
    assert [bool(a.layout.modules) for a in plan.adapters] == [True, False, True]
    assert plan.adapters[1].layout.notes[0] == (
        "kept exact, since RE2 cannot decide the module pattern 'layers.(?!0).q' (invalid perl operator: (?!)"
    )


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
    "q", "v", "a", "A", ".", r"\.", "h", "0", "1", r"\d", r"\w", r"\W", r"\s", r"\b", r"\B", "*", "+", "?", "(", ")",
    "[01]", "[^a]", "[a-v", "]", "-", "^", "$", "{2}", "{0,2}", "{1,}", "{", "}", ",", "(?i:", "(?:", "(?P<n>",
    r"\A", "\u00e9", r"\x61", "\\", "\n", "|", "_p", ".*",
]  # fmt: skip
# Short: they are given to Python's own matcher, too, which may take long.
NAMES = st.lists(
    st.sampled_from(["h", "0", "1", "q", "v", "a", "q_p", "aA", "\u00e9", "Q", ""]), min_size=1, max_size=4
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(st.sampled_from(BITS), max_size=7).map("".join), max_size=3), NAMES.map(".".join))
@example([r"(?:\b|a)*A"], "aA")
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
