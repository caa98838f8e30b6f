from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorashare_stream.adapters import config as peftconfig
from lorashare_stream.adapters.config import check_lora, matcher, scalings
from lorashare_stream.errors import AdapterError, CollectionError, UndecidedError
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

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


def test_a_pattern_that_is_the_whole_name_counts_though_as_a_pattern_it_does_not_match() -> None:
    from peft.utils.other import get_pattern_key

    name = "layers.0.w+"
    assert get_pattern_key(["w+", name], name) == name  # since none matches; PEFT looks it up
    assert scale({"alpha_pattern": {"w+": 64, name: 4}}, name) == 4 / 8


# -- configurations that people and other tools write -----------------------------------------------------------------


LOADED: dict[str, dict[str, Any]] = {  # a value of ... takes the field out
    "no alpha": {"lora_alpha": ...},
    "no r": {"r": ..., "lora_alpha": 4},
    "neither": {"r": ..., "lora_alpha": ..., "rank_pattern": ..., "alpha_pattern": ..., "bias": ...},
    "no r, rsLoRA": {"r": ..., "use_rslora": True},
    "no alpha, a pattern": {"lora_alpha": ..., "alpha_pattern": {"q": 2.5}},
    "alpha a float": {"lora_alpha": 12.0},
    "alpha below zero": {"lora_alpha": -8},
    "a field of later": {"use_newproduct": {"block": 4}, "peft_version": "0.99.0"},
    "Gaussian": {"init_lora_weights": "Gaussian"},
    "MiCA": {"init_lora_weights": "MiCA"},
    "no initialisation": {"init_lora_weights": None},
}
NOT_LOADED: dict[str, tuple[dict[str, Any], str]] = {
    "r a float": ({"r": 8.0}, "key 'r'.*found 8.0; expected a whole number"),
    "r a text": ({"r": "8"}, "key 'r'.*found \"8\"; expected a whole number"),
    "r null": ({"r": None}, "key 'r'.*found null"),
    "alpha a text": ({"lora_alpha": "16"}, "key 'lora_alpha'.*found \"16\"; expected a number"),
    "alpha null": ({"lora_alpha": None}, "key 'lora_alpha'.*found null"),
    "peft_type in small letters": ({"peft_type": "lora"}, "found lora; expected LORA.*capital letters"),
}


def written(folder: Path, change: dict[str, Any]) -> Path:
    write_adapter(folder, make_tensors(np.random.default_rng(0), {"layers.0.q": (8, 8), "layers.0.v": (8, 8)}, r=8))
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"], "bias": "none"} | change
    config = {name: value for name, value in plain.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_peft_loads(folder: Path) -> dict[str, float]:
    """PEFT's scale of each module, its tensors being those of the file."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({n: torch.nn.Linear(8, 8) for n in "qv"})])

    model, tensors = PeftModel.from_pretrained(Net(), str(folder)), load_file(folder / "adapter_model.safetensors")
    layers = {f"layers.0.{n}": model.base_model.model.layers[0][n] for n in "qv"}
    for name, layer in layers.items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert torch.equal(layer.lora_A["default"].weight, tensors[key])
    return {name: layer.scaling["default"] for name, layer in layers.items()}


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("name", LOADED)
def test_what_peft_loads_is_taken_with_its_scale(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "a", LOADED[name])
    (adapter,) = plan_for(resolve([folder]), Settings(max_error=0.1)).adapters
    found = dict(zip(adapter.layout.by_name, (p.scale for p in adapter.scalings), strict=True))
    assert found == pytest.approx(as_peft_loads(folder))


@pytest.mark.parametrize("name", NOT_LOADED)
def test_what_peft_does_not_load_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    change, text = NOT_LOADED[name]
    folder = written(tmp_path / "a", change)
    with pytest.raises((TypeError, KeyError)):
        as_peft_loads(folder)
    with pytest.raises(CollectionError, match=text):
        plan_for(resolve([folder]), Settings(max_error=0.1)).validate()


@pytest.mark.parametrize("options", [{"num_components": 4}, {"max_error": 0.3}], ids=["share", "coded"])
def test_configurations_without_r_and_alpha_go_through_and_come_back(
    tmp_path: Path, compressed: Callable[..., Path], options: dict[str, Any]
) -> None:
    folders = [written(tmp_path / name, LOADED[name]) for name in ("neither", "a field of later", "no alpha")]
    share = SHAREModel.from_pretrained(compressed(folders, **options))
    assert not any(v.problem for v in verify(share, originals_of(share, resolve(folders))))
    assert (share.config.lora_rank, share.config.lora_alpha) == (8, 8)
    for folder in folders:
        share.reconstruct(folder.name, output_dir=tmp_path / "back" / folder.name)
        both = (place / "adapter_config.json" for place in (folder, tmp_path / "back" / folder.name))
        assert len({json.dumps(json.loads(path.read_text()), sort_keys=True) for path in both}) == 1
    (note,) = share.certified("a field of later")["notes"]
    assert all(part in note for part in ("use_newproduct", "dW is taken to be s B A"))
    assert share.config.ours["verbatim_adapters"] == []


def test_an_initialisation_that_is_not_known_is_kept_exact_and_told(
    tmp_path: Path, compressed: Callable[..., Path]
) -> None:
    """MiLoRA, of another library, trains a part of the base as PiSSA does; PEFT 0.21 refuses its name."""
    folders = [written(tmp_path / str(i), {"init_lora_weights": "milora"} if i == 1 else {}) for i in range(3)]
    notes = plan_warnings(plan_for(resolve(folders), Settings()))
    (told,) = [note for note in notes if "milora" in note]
    assert all(part in told for part in ("kept exact", "may hold", "--share-initial", "in 1 adapter (1)"))
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    assert share.config.ours["verbatim_adapters"] == ["1"]
    asked = SHAREModel.from_pretrained(compressed(folders, "asked", num_components=4, share_initial=True))
    assert asked.config.ours["verbatim_adapters"] == []


@pytest.mark.parametrize("value", [{}, {"beta": 1e-4}])
def test_a_variant_with_its_defaults_is_that_variant(tmp_path: Path, value: dict[str, Any]) -> None:
    """PEFT makes a KasaConfig of {}, and the diagonal counts."""
    for name in "ab":
        written(tmp_path / name, {"kasa_config": value})
    assert not any(e.layout.modules for e in plan_for(resolve([tmp_path]), Settings()).adapters)


def test_every_field_of_the_installed_peft_is_known() -> None:
    import dataclasses

    from peft import LoraConfig

    assert {f.name for f in dataclasses.fields(LoraConfig)} == peftconfig._FIELDS
    default = {f.name: f.default for f in dataclasses.fields(LoraConfig)}
    assert peftconfig.rank_and_alpha({}) == (default["r"], default["lora_alpha"])
