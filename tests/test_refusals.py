"""What is refused, or kept apart: the kind is named, and the way out; nothing is mixed, nothing passed over."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.numpy import load_file, save_file

from lorashare_stream.adapters import config as peftconfig
from lorashare_stream.cli.app import main
from lorashare_stream.errors import AdapterError, CollectionError, UsageError, WorkspaceError, problem_lines
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_text, plan_warnings
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import CONFIG, factor_keys, load_tensors, make_collection, make_tensors, write_adapter

Compress = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
A, B = factor_keys("layers.0.q")
OTHERS = sorted(set(peft.PeftType) - {peft.PeftType.LORA}, key=str)


def reason(folder: Path, **settings: Any) -> str:
    """Why the one adapter that is refused is refused."""
    plan = plan_for(resolve([folder]), Settings(**settings))
    (error,) = plan.refused
    return str(error)


def spoiled(collection: list[str], **tensors: np.ndarray) -> Path:
    folder = Path(collection[1])
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS)
    return folder.parent


# -- other methods ----------------------------------------------------------------------------------------------


def converts(kind: peft.PeftType) -> bool:
    """Whether the installed PEFT says of some layer of a method that it can be converted to LoRA."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    package = inspect.getmodule(tuner).__name__.rpartition(".")[0]
    module = __import__(f"{package}.layer", fromlist=["x"])
    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and "supports_lora_conversion" in vars(c)
    ]
    return any("return False" not in inspect.getsource(c.supports_lora_conversion) for c in own)


@pytest.mark.parametrize("kind", [k for k in OTHERS if k in PEFT_TYPE_TO_TUNER_MAPPING])
def test_the_way_out_is_that_of_the_installed_peft(kind: peft.PeftType) -> None:
    try:
        expected = converts(kind)
    except ModuleNotFoundError:  # prompt learning has no layers
        expected = False
    assert (kind.value in peftconfig._CONVERTIBLE) == expected


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "C3AConfig"])
def test_the_way_out_leads_out(tmp_path: Path, compressed: Compress, method: str) -> None:
    options = {"block_size": 4} if method == "C3AConfig" else {"r": 2}
    outputs = {}
    for seed in range(2):
        torch.manual_seed(0)
        net = torch.nn.Sequential()
        net.add_module("q", torch.nn.Linear(8, 8))
        model = peft.get_peft_model(net, getattr(peft, method)(target_modules=["q"], **options))
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape)) if parameter.requires_grad else None
        model.save_pretrained(str(tmp_path / "other" / f"a{seed}"))
        peft.save_as_lora(tmp_path / "lora" / f"a{seed}", model, rank=8)
        outputs[f"a{seed}"] = model(torch.eye(8))
    with pytest.raises(CollectionError, match="save_as_lora"):
        compressed([tmp_path / "other"])
    share = SHAREModel.from_pretrained(compressed([tmp_path / "lora"], num_components=100))
    for name, out in outputs.items():
        torch.manual_seed(0)
        net = torch.nn.Sequential()
        net.add_module("q", torch.nn.Linear(8, 8))
        assert torch.allclose(share.apply(net, name)(torch.eye(8)), out, atol=1e-4)


@pytest.mark.parametrize(
    "method", ["AdaLoraConfig", "LoHaConfig", "IA3Config", "VeraConfig", "OFTConfig", "RandLoraConfig"]
)
def test_another_method_is_known_by_its_keys_where_the_configuration_claims_lora(tmp_path: Path, method: str) -> None:
    net = torch.nn.Sequential()
    net.add_module("q", torch.nn.Linear(32, 32))
    options: dict[str, Any] = {"AdaLoraConfig": {"total_step": 10}, "IA3Config": {"feedforward_modules": []}}.get(
        method, {}
    )
    model = peft.get_peft_model(net, getattr(peft, method)(target_modules=["q"], **options))
    model.save_pretrained(str(tmp_path / "a"))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(CONFIG))
    assert "not a PEFT LoRA: the keys are those of" in reason(tmp_path / "a")


# -- other files ------------------------------------------------------------------------------------------------

ONE = np.ones((2, 2), np.float32)
KOHYA = {"lora_unet_mid.lora_up.weight": ONE, "lora_unet_mid.lora_down.weight": ONE, "lora_unet_mid.alpha": ONE[0]}
DIFFUSERS = {"unet.mid_block.attn.to_q.lora.up.weight": ONE, "unet.mid_block.attn.to_q.lora.down.weight": ONE}
BY_PEFT = {"unet.mid_block.attn.to_q.lora_A.weight": ONE, "unet.mid_block.attn.to_q.lora_B.weight": ONE}


@pytest.mark.parametrize(
    ("file", "tensors", "kind"),
    [
        ("my_style.safetensors", KOHYA, "kohya LoRA"),
        ("pytorch_lora_weights.safetensors", DIFFUSERS, "diffusers LoRA"),
        ("pytorch_lora_weights.safetensors", BY_PEFT, "diffusers LoRA"),
        ("flux.safetensors", BY_PEFT, "diffusers LoRA"),
    ],
)
def test_files_of_kohya_and_diffusers_are_named_wherever_they_lie(
    tmp_path: Path, collection: list[str], file: str, tensors: dict[str, np.ndarray], kind: str
) -> None:
    folder = tmp_path / "adapters" / "style"
    folder.mkdir()
    save_file(tensors, folder / file)
    for source in (folder, tmp_path / "adapters"):  # itself, and in a tree of adapters, where it is not passed over
        text = reason(source)
        assert f"'style': a {kind}: {file} without adapter_config.json" in text
        assert "save_pretrained" in text
    with pytest.raises(UsageError, match=f"a {kind}, not a PEFT adapter.*save_pretrained"):
        resolve([folder / file])
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / file).rename(folder / WEIGHTS)
    if tensors is not BY_PEFT:  # with a configuration, PEFT takes it for its own, and so do we
        assert f"the keys are those of {kind}" in reason(folder)


def test_a_pickle_of_diffusers_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    torch.save({k: torch.from_numpy(v) for k, v in DIFFUSERS.items()}, tmp_path / "a" / "pytorch_lora_weights.bin")
    assert "a diffusers LoRA: pytorch_lora_weights.bin" in reason(tmp_path / "a")


def test_a_peft_file_under_another_name_is_not_passed_over(tmp_path: Path, collection: list[str]) -> None:
    folder = tmp_path / "adapters" / "renamed"
    folder.mkdir()
    save_file(load_tensors(collection[0]), folder / "lora_weights.safetensors")
    text = reason(tmp_path / "adapters")
    assert all(
        part in text
        for part in ("'renamed'", "no adapter_config.json", "lora_weights.safetensors", f"name it {WEIGHTS}")
    )
    with pytest.raises(UsageError, match=f"file of PEFT's LoRA tensors.*name it {WEIGHTS}"):
        resolve([folder / "lora_weights.safetensors"])
    with pytest.raises(UsageError, match=r"Name its folder: it has the adapter_config\.json"):
        resolve([Path(collection[0]) / WEIGHTS])


def test_adapters_that_share_nothing_are_told(tmp_path: Path) -> None:
    make_collection(tmp_path / "in", 3)
    write_adapter(tmp_path / "in" / "stranger", make_tensors(np.random.default_rng(0), {"other.q": (40, 24)}))
    (warning,) = [
        w for w in plan_warnings(plan_for(resolve([tmp_path / "in"]), Settings())) if "no module is shared" in w
    ]
    assert "1 adapter (stranger)" in warning


@pytest.mark.parametrize(
    ("settings", "idle"),
    [({"base_model": "nobody's"}, "nobody's"), ({"base_aliases": ("tiny-base", "a/path")}, "a/path")],
)
def test_a_name_of_the_base_that_no_adapter_gives_is_told(tmp_path: Path, settings: dict[str, Any], idle: str) -> None:
    folders = make_collection(tmp_path / "in", 3)
    plan = plan_for(resolve(folders), Settings(any_base=True, **settings))
    (warning,) = [w for w in plan_warnings(plan) if "no adapter names" in w]
    assert f"the base model {idle}:" in warning


def test_equal_refusals_are_said_once_with_every_name(collection: list[str]) -> None:
    for folder in collection[2:6]:
        Path(folder, "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": "other"}))
    Path(collection[6], "adapter_config.json").write_text("{")
    with pytest.raises(CollectionError) as caught:
        plan_for(resolve(collection), Settings(base_model="tiny-base")).validate()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(
        line.startswith("  - 4 adapters, 'a02', 'a03', 'a04', 'a05', key 'base_model_name_or_path': ") for line in lines
    )
    assert any(line.startswith("  - adapter 'a06': adapter_config.json is not valid JSON") for line in lines)


def test_the_errors_are_those_of_what_is_compressed(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 6)
    plain = SHAREModel.from_pretrained(compressed(folders[:4], "plain", num_components=4)).config.ours["errors"]
    for folder in folders[4:]:
        Path(folder, "adapter_config.json").write_text(json.dumps(CONFIG | {"init_lora_weights": "pissa"}))
    mixed = SHAREModel.from_pretrained(compressed(folders, "mixed", num_components=4)).config.ours["errors"]
    assert mixed == plain
    assert mixed["adapters"] == 4


def test_the_python_interface_tells_what_the_command_line_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = make_collection(tmp_path / "in", 4, init_lora_weights="pissa")
    with caplog.at_level("WARNING", "lorashare_stream"):
        SHAREModel.from_adapters(folders)
    assert "part of the base model" in caplog.text
    Path(folders[3], "adapter_config.json").write_text("{")
    with pytest.warns(UserWarning, match=r"left out: a03\n.*not valid JSON"):
        SHAREModel.from_adapters(folders, on_error="skip")


def test_other_files_of_tensors_are_no_adapters(tmp_path: Path, collection: list[str]) -> None:
    (tmp_path / "adapters" / "base").mkdir()
    save_file({"model.layers.0.q.weight": ONE}, tmp_path / "adapters" / "base" / "model.safetensors")
    (tmp_path / "adapters" / "base" / "broken.safetensors").write_bytes(b"nothing")
    assert len(resolve([tmp_path / "adapters"])) == len(collection)


# -- files that were saved wrongly --------------------------------------------------------------------------------


# -- groups on which adapters disagree ------------------------------------------------------------------------------


def kernels(rng: np.random.Generator, module: str) -> dict[str, np.ndarray]:
    a, b = factor_keys(module)
    return {
        a: rng.standard_normal((4, 40, 3)).astype(np.float32),
        b: rng.standard_normal((24, 4, 1)).astype(np.float32),
    }


def test_a_convolution_beside_a_linear_layer_of_the_same_name_is_kept_apart(
    tmp_path: Path, compressed: Compress
) -> None:
    folders = make_collection(tmp_path / "adapters", 6)
    rng = np.random.default_rng(5)
    for folder in folders[:3]:
        tensors = load_tensors(folder) | kernels(rng, "layers.0.q")
        save_file(tensors, Path(folder) / WEIGHTS)
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    groups = share.config.ours["groups"]
    assert groups["layers.0.q:A"] | {"n": 3 * 4, "d": 40} == groups["layers.0.q:A"]  # of the other three alone
    assert groups["layers.0.v:A"]["n"] == 6 * 4
    for name, folder in zip(share.adapter_names[:3], folders, strict=False):
        tensors = load_tensors(folder)
        found = share.reconstruct(name)
        assert all(np.array_equal(found[key].numpy(), tensors[key]) for key in (A, B))
        assert any("a convolution" in note for note in share.certified(name)["notes"])


def test_another_d_in_a_group_is_refused_whoever_comes_first(tmp_path: Path) -> None:
    modules = {"layers.0.q": (40, 24)}
    rng = np.random.default_rng(0)
    for name, shape in {"a": (41, 24), "b": (40, 24), "c": (40, 24), "d": (40, 25)}.items():
        write_adapter(tmp_path / "in" / name, make_tensors(rng, modules | {"layers.0.q": shape}))
    plan = plan_for(resolve([tmp_path / "in"]), Settings())
    assert [e.name for e in plan.adapters] == ["b", "c"]
    first, second = map(str, plan.refused)
    assert all(part in first for part in ("'a'", A, "d_in = 41", "d_in = 40, as most"))
    assert all(part in second for part in ("'d'", B, "d_out = 25", "d_out = 24, as most"))


def test_stacked_experts_and_a_plain_layer_are_not_mixed(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    for name in "abc":
        write_adapter(tmp_path / "in" / name, make_tensors(rng, {"experts": (40, 24)}))
    stacked = make_tensors(rng, {"experts": (40, 24)}, r=8)
    write_adapter(tmp_path / "in" / "d", stacked, target_parameters=["experts.up"])
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], num_components=4))
    assert share.config.ours["groups"]["experts:A"]["n"] == 3 * 4
    assert share.config.ours["verbatim_adapters"] == ["d"]
    assert "target_parameters are others" in share.certified("d")["notes"][0]


def test_two_parameters_of_one_module_are_not_mixed(tmp_path: Path, compressed: Compress) -> None:
    """Equal shapes, but `experts.lora_A` is that of the gate in some adapters, and of another parameter in one."""
    rng = np.random.default_rng(0)
    for name, parameter in {"a": "gate", "b": "gate", "c": "down", "d": "gate"}.items():
        tensors = make_tensors(rng, {"experts": (40, 24)}, r=8)
        write_adapter(tmp_path / "in" / name, tensors, target_parameters=[f"experts.{parameter}"])
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], num_components=4))
    assert share.config.ours["groups"]["experts:A"]["n"] == 3 * 8
    assert share.config.ours["verbatim_adapters"] == ["c"]


def test_what_a_workspace_has_summed_is_not_outvoted_by_what_comes_later(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    parameters = {"a": "gate", "b": "gate", "c": "down", "d": "down", "e": "down", "f": "down", "g": "gate"}
    for name, parameter in parameters.items():
        tensors = make_tensors(rng, {"experts": (40, 24)}, r=8)
        write_adapter(tmp_path / "in" / name, tensors, target_parameters=[f"experts.{parameter}"])
    for names in ("abc", "abcdef", "abcdefg"):  # the other meaning has the majority from the second run on
        share = SHAREModel.from_pretrained(compressed([tmp_path / "in" / n for n in names], num_components=4))
        assert share.config.ours["verbatim_adapters"] == [n for n in names if parameters[n] == "down"]
        assert share.config.ours["groups"]["experts:A"]["n"] == 8 * sum(parameters[n] == "gate" for n in names)
    fresh = plan_for(resolve([tmp_path / "in"]), Settings())
    assert [e.name for e in fresh.adapters if e.layout.modules] == ["c", "d", "e", "f"]


def test_another_number_of_experts_is_another_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, experts in {"a": 2, "b": 2, "c": 3}.items():
        tensors = make_tensors(rng, {"experts": (40, 24)}, r=4 * experts)
        write_adapter(tmp_path / "in" / name, tensors, target_parameters=["experts.up"])
    text = reason(tmp_path / "in")
    assert all(part in text for part in ("'c'", "stacked experts = 3", "stacked experts = 2, as most"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_factors_of_other_dtypes_are_verbatim_and_told(
    tmp_path: Path, compressed: Compress, dtype: torch.dtype
) -> None:
    from safetensors.torch import load_file, save_file

    folders = make_collection(tmp_path / "in", 5)
    tensors = load_file(Path(folders[1]) / WEIGHTS)
    save_file(tensors | {A: (8 * tensors[A]).to(dtype)}, Path(folders[1]) / WEIGHTS)
    plan = plan_for(resolve(folders), Settings())
    assert any("LoRA tensors kept verbatim, dtype" in w and "a01" in w for w in plan_warnings(plan))
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    found = share.reconstruct("a01")
    assert found[A].dtype == dtype
    assert torch.equal(found[A].float(), (8 * tensors[A]).to(dtype).float())
    assert torch.equal(found[B], tensors[B])
    assert share.config.ours["groups"]["layers.0.q:A"]["n"] == 4 * 4


@pytest.mark.parametrize("gone", [A, B])
def test_a_side_without_the_other_is_verbatim_and_told(tmp_path: Path, compressed: Compress, gone: str) -> None:
    folders = make_collection(tmp_path / "in", 3)
    tensors = load_tensors(folders[1])
    del tensors[gone]
    save_file(tensors, Path(folders[1]) / WEIGHTS)
    side = "lora_A" if gone == A else "lora_B"
    warnings = plan_warnings(plan_for(resolve(folders), Settings()))
    assert any(f"{side} is missing" in w and "in 1 adapter (a01)" in w for w in warnings)
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    found = share.reconstruct("a01")
    assert found.keys() == tensors.keys()
    left = B if gone == A else A
    assert np.array_equal(found[left].numpy(), tensors[left])
    assert any("is missing" in note for note in share.certified("a01")["notes"])


def test_a_square_matrix_is_oriented_by_its_key(tmp_path: Path, compressed: Compress) -> None:
    """r = d: the shapes of A and B are equal, and so are those of the two sides."""
    folders = make_collection(tmp_path / "adapters", 5, {"layers.0.q": (4, 4)}, r=4)
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    for name, folder in zip(share.adapter_names, folders, strict=True):
        found, tensors = share.reconstruct(name), load_tensors(folder)
        assert np.allclose(found[B].numpy() @ found[A].numpy(), tensors[B] @ tensors[A], atol=1e-5)


# -- the base model has many names ----------------------------------------------------------------------------------

NAMES = ["org/base", "org/base", "org/base", "mirror/base-4bit", "mirror/base-4bit", "/home/me/base", None]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    for i, (folder, name) in enumerate(zip(make_collection(tmp_path / "in", len(NAMES)), NAMES, strict=True)):
        Path(folder, "adapter_config.json").write_text(json.dumps(CONFIG | {"base_model_name_or_path": name}))
        assert folder.endswith(f"a{i:02}")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("settings", "base", "refused"),
    [
        ({}, "org/base", [3, 4, 5]),
        ({"base_model": "/home/me/base"}, "/home/me/base", [0, 1, 2, 3, 4]),
        ({"base_aliases": ("mirror/base-4bit", "/home/me/base")}, "org/base", []),
        ({"base_model": "org/base", "base_aliases": ("mirror/base-4bit",)}, "org/base", [5]),
        ({"base_model": "new/base", "base_aliases": ("org/base", "mirror/base-4bit", "/home/me/base")}, "new/base", []),
        ({"any_base": True}, "org/base", []),
    ],
)  # fmt: skip
def test_one_base_model_goes_by_many_names(
    named: Path, settings: dict[str, Any], base: str, refused: list[int]
) -> None:
    plan = plan_for(resolve([named]), Settings(**settings))
    assert plan.base_model == base
    assert [e.adapter for e in plan.refused] == [f"a{i:02}" for i in refused]
    for error in plan.refused:
        assert all(part in str(error) for part in ("base_model_name_or_path", base, "base_aliases", "any_base=True"))
    text = plan_text(plan)
    for name in {e.base_model for e in plan.adapters} - {None, base}:
        assert f"{name} by" in text  # what differs is listed before work
    assert any("no base model is named by 1 adapter" in w for w in plan_warnings(plan))
    assert any("adapters are accepted" in w for w in plan_warnings(plan)) == ("any_base" in settings)


def test_an_alias_is_the_name_only_where_no_other_is(named: Path) -> None:
    every = tuple(name for name in NAMES if name)
    plan = plan_for(resolve([named]), Settings(base_aliases=every))
    assert plan.base_model == "org/base"
    assert not plan.refused


def test_the_checkpoint_has_the_name_and_each_adapter_keeps_its_own(named: Path, compressed: Compress) -> None:
    share = SHAREModel.from_pretrained(compressed([named], base_model="org/base", any_base=True, num_components=4))
    assert share.config.base_model_name_or_path == "org/base"
    configs = [share.adapter_configs[name] for name in share.adapter_names]
    assert [c["base_model_name_or_path"] for c in configs] == NAMES


def test_a_workspace_keeps_its_base_model_when_others_outnumber_it(named: Path, compressed: Compress) -> None:
    compressed([named / f"a{i:02}" for i in range(3)], num_components=4)
    many = [named / f"a{i:02}" for i in range(3)]
    for i in range(5):
        shutil.copytree(named / "a03", named / f"b{i}")
        many.append(named / f"b{i}")
    with pytest.raises(CollectionError, match=r"\n  - 5 adapters, 'b0', 'b1', .*found mirror/base-4bit; expected"):
        compressed(many, num_components=4)
    share = SHAREModel.from_pretrained(compressed(many, num_components=4, base_aliases=["mirror/base-4bit"]))
    assert len(share.adapter_names) == 8


def test_adapters_that_are_refused_now_are_said_to_be(named: Path, compressed: Compress) -> None:
    compressed([named], num_components=4, any_base=True)
    with pytest.raises(WorkspaceError, match=r"no longer give.*a03.*refused now: .*mirror/base-4bit.*base_aliases"):
        compressed([named], num_components=4, on_error="skip")


def test_one_alias_may_be_a_text() -> None:
    assert Settings.from_mapping({"base_aliases": "org/base"}).base_aliases == ("org/base",)


def test_the_name_may_change_to_another_of_the_same_model(named: Path, compressed: Compress) -> None:
    three = [named / f"a{i:02}" for i in range(3)]
    compressed(three, num_components=4)
    share = SHAREModel.from_pretrained(
        compressed(three, num_components=4, base_model="org/base-v2", base_aliases=["org/base"])
    )
    assert share.config.base_model_name_or_path == "org/base-v2"
    with pytest.raises(WorkspaceError, match="base_model=org/base"):
        compressed(three, num_components=4, base_model="org/another", any_base=True)


# -- factors that hold a part of the base -----------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq"])
def test_what_holds_a_part_of_the_base_is_exact_unless_asked_otherwise(
    tmp_path: Path, compressed: Compress, init: str
) -> None:
    folders = make_collection(tmp_path / "in", 6)
    Path(folders[2], "adapter_config.json").write_text(json.dumps(CONFIG | {"init_lora_weights": init}))
    plan = plan_for(resolve(folders), Settings())
    (warning,) = [w for w in plan_warnings(plan) if "part of the base model" in w]
    assert all(part in warning for part in (init, "in 1 adapter (a02)", "--share-initial"))
    assert all(g.count == 5 * 4 for g in plan.groups)

    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    assert share.config.ours["verbatim_adapters"] == ["a02"]
    tensors = load_tensors(folders[2])
    found = share.reconstruct("a02")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[k].numpy(), tensors[k]) for k in tensors)
    assert not any(v.problem for v in verify(share, originals_of(share, resolve(folders))))

    asked = SHAREModel.from_pretrained(compressed(folders, "asked", num_components=4, share_initial=True))
    assert asked.config.ours["verbatim_adapters"] == []
    assert asked.certified("a02")["relative_error"] > 0.01
    assert not any(v.problem for v in verify(asked, originals_of(asked, resolve(folders))))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_other_initialisations_are_compressed(tmp_path: Path, init: object) -> None:
    folders = make_collection(tmp_path / "in", 2, init_lora_weights=init)
    plan = plan_for(resolve(folders), Settings())
    assert all(len(e.layout.modules) == 3 for e in plan.adapters)


@pytest.mark.parametrize("field", ["kasa_config", "use_bdlora", "use_qalora", "arrow_config"])
def test_variants_of_another_product_are_kept_exact(tmp_path: Path, compressed: Compress, field: str) -> None:
    folders = make_collection(tmp_path / "in", 4)
    odd = make_tensors(np.random.default_rng(1), {"layers.0.q": (20, 24)})  # QALoRA, BD-LoRA: lora_A is narrower
    write_adapter(Path(folders[1]), odd, **{field: {"nblocks": 2} if field != "use_qalora" else True})
    for flag in (False, True):
        share = SHAREModel.from_pretrained(compressed(folders, f"out{flag}", num_components=4, share_initial=flag))
        assert share.config.ours["verbatim_adapters"] == ["a01"]
        found = share.reconstruct("a01")
        assert all(np.array_equal(found[k].numpy(), odd[k]) for k in odd)


def test_a_workspace_is_bound_to_what_it_shares(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 6, init_lora_weights="olora")
    compressed(folders, num_components=4)
    with pytest.raises(WorkspaceError, match="share_initial"):
        compressed(folders, num_components=4, share_initial=True)


def test_exact_adapters_alone_make_a_checkpoint_too(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 2, init_lora_weights="pissa")
    assert any("everything is kept verbatim" in w for w in plan_warnings(plan_for(resolve(folders), Settings())))
    share = SHAREModel.from_pretrained(compressed(folders))
    assert share.reconstruct("a01").keys() == load_tensors(folders[1]).keys()


def test_verify_finds_a_changed_byte_in_what_is_exact(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "in", 3, init_lora_weights="pissa")
    out = compressed(folders)
    path = out / "adapters" / "a01" / "classifier_head.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    share = SHAREModel.from_pretrained(out)
    verdicts = {v.name: v.problem for v in verify(share, originals_of(share, resolve(folders)))}
    assert "classifier_head.safetensors is damaged" in str(verdicts.pop("a01"))
    assert set(verdicts.values()) == {None}


def test_adapters_that_are_mostly_other_tensors_are_told(tmp_path: Path) -> None:
    folders = make_collection(tmp_path / "in", 3)
    vocabulary = {"base_model.model.embed_tokens.weight": np.ones((2000, 40), np.float32)}
    save_file(load_tensors(folders[0]) | vocabulary, Path(folders[0]) / WEIGHTS)
    (warning,) = [w for w in plan_warnings(plan_for(resolve(folders), Settings())) if "not LoRA" in w]
    assert "1 adapter (a00)" in warning


BOUND = 4000  # characters


def _of_many_bases(root: Path) -> str:
    """68 adapters of 66 base models, by their names."""
    for i in range(68):
        make_collection(root / f"{i:02}", 1, {"q": (8, 8)}, seed=i, base_model_name_or_path=f"b/{max(i, 2)}")
    return str(root)


@pytest.mark.few(2)
@pytest.mark.parametrize("form", [["-k", "2"], ["--max-error", "0.3"]])
def test_messages_are_bounded_and_files_and_json_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, form: list[str]
) -> None:
    """66 names of one base model: one line, with some of the names, and how many there are."""
    source, out = _of_many_bases(tmp_path / "in"), str(tmp_path / "out")
    assert main(["plan", source, *form]) == 1
    err = capsys.readouterr().err
    assert len(err) < BOUND
    assert err.count("made for another base model") == 1
    assert "65 adapters, " in err
    assert " and 57 more, key 'base_model_name_or_path'" in err
    assert " and 60 more; expected b/2)" in err
    assert "With --json each of them is told" in err
    assert main(["plan", source, *form, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["refused"]) == 65
    assert main(["compress", source, "-o", out, *form, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["error"]["problems"]) == 65

    assert main(["compress", source, "-o", out, *form, "--on-error", "skip", "-q"]) == 3
    assert len(capsys.readouterr().err) < BOUND
    assert len(json.loads(Path(out, "skipped.json").read_text())) == 65
    assert main(["add", out, source]) == 1
    assert len(capsys.readouterr().err) < BOUND
    assert main(["plan", source, *form, "--any-base", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["base_models"]) == 66
    caplog.clear()
    assert main(["compress", source, "-o", out, *form, "--any-base", "-q"]) == 0
    assert len(caplog.text) + len(capsys.readouterr().out) < BOUND
    assert main(["plan", source, *form, "--any-base"]) == 0
    assert capsys.readouterr().out.count("also named") == 9

    Path(source).rename(tmp_path / "away")
    assert main(["verify", out]) == 1
    err = capsys.readouterr().err
    assert len(err) < BOUND
    assert "FAILED 68 adapters, " in err
    for file in (*Path(out).rglob("packs/*"), *Path(out).rglob("loadings.safetensors")):
        file.write_bytes(b"")
    assert main(["reconstruct", out, "--all", "-o", str(tmp_path / "rec")]) == 1
    assert len(capsys.readouterr().err) < BOUND


def test_messages_in_python_are_bounded_and_errors_whole(tmp_path: Path) -> None:
    source = _of_many_bases(tmp_path / "in")
    with pytest.raises(CollectionError) as caught:
        SHAREModel.from_adapters([source], num_components=2)
    assert len(str(caught.value)) < BOUND
    assert len(caught.value.problems) == 65
    with pytest.warns(UserWarning, match="left out: ") as warned:
        SHAREModel.from_adapters([source], num_components=2, on_error="skip", output_dir=tmp_path / "out")
    assert len(str(warned[0].message)) < BOUND


def test_of_many_kinds_of_problems_the_commonest_are_told_and_the_others_counted() -> None:
    problems = [AdapterError(f"kind {i}", adapter=f"a{i}{j}") for i in range(20) for j in range(i + 1)]
    lines = problem_lines(problems)
    assert lines[0].startswith("  - 20 adapters, 'a190', 'a191', ")
    assert lines[0].endswith("'a197' and 12 more: kind 19")
    assert lines[8:] == ["  - and 78 more, for 12 other reasons"]
