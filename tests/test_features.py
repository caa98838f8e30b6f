"""Every LoRA that PEFT can save goes in and comes back the same model; `docs/adapters.md` is the table of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lorashare
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lorashare_stream.checkpoint.format import INDEX
from lorashare_stream.checkpoint.index import read_index
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.text import plan_warnings
from lorashare_stream.settings import Settings

from .features import FEATURES, QV, Feature, loaded, loftq, logits, prepare, trained
from .tiers import some_fast

Compress = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
PEFTS_OWN = [  # what PEFT says of adapters that are as they should be
    "ignore:.*has no bias",
    "ignore:.*invalid shape",
    "ignore:.*groups > 1",
    "ignore:.*eva initialization",
    "ignore:.*embedding layers found in `target_modules`",
    "ignore:.*Could not find a config file",
    "ignore:.*ensure_weight_tying",
    "ignore:.*did not match any targeted module",  # PEFT does apply patterns to parameters
    "ignore:Full backward hook is firing",
    "ignore:`is_gradient_checkpointing` is deprecated",
]


@pytest.fixture(autouse=True)
def loftq_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)


def adapters_of(feature: Feature) -> dict[str, dict[str, Any]]:
    options = feature.adapters if len(feature.adapters) > 1 else feature.adapters * 2
    return {f"a{i}": option for i, option in enumerate(options)}


def check_landed(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Every tensor of the file is in the model, by value, and every one of the adapter's in the model is in the file.

    PEFT warns of missing keys only, and passes over unexpected ones.
    """
    state = model.state_dict()
    own = [k for k in state if ".default" in k and "base_layer" not in k.split(".default")[0].rsplit(".", 1)[-1]]
    within = {tuple(v.shape): [] for v in state.values()}
    for value in state.values():
        within[tuple(value.shape)].append(value)
    for key, tensor in tensors.items():
        assert any(torch.equal(tensor, value) for value in within.get(tuple(tensor.shape), ())), f"{key} did not land"
    for key in own:
        same = [t for t in tensors.values() if t.shape == state[key].shape and torch.equal(t, state[key])]
        assert same, f"{key} is not from the file"


def check_same(
    feature: Feature, folder: Path, original: Path, truth: torch.Tensor, close: float | torch.Tensor = 1e-4
) -> None:
    model = loaded(feature, folder)
    assert torch.allclose(logits(model), truth, atol=float(close))
    tensors = load_file(folder / WEIGHTS)
    assert tensors.keys() == load_file(original / WEIGHTS).keys()
    check_landed(model, tensors)
    assert LoraConfig.from_pretrained(folder).to_dict() == LoraConfig.from_pretrained(original).to_dict()


SHARED, CODED = {"num_components": 10_000}, {"max_error": 1e-5}


@pytest.mark.few(3)
@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(
    ("name", "options"), [*((name, SHARED) for name in FEATURES), *some_fast([(name, CODED) for name in FEATURES], 5)]
)
def test_a_feature_of_peft(tmp_path: Path, compressed: Compress, name: str, options: dict[str, Any]) -> None:
    feature, adapters = FEATURES[name], adapters_of(FEATURES[name])
    truths = {}
    for seed, (adapter, its_own) in enumerate(adapters.items()):
        out = trained(feature, its_own, seed, tmp_path / adapter)
        truths[adapter] = logits(loaded(feature, tmp_path / adapter))
        if feature.reloads:
            assert torch.allclose(out, truths[adapter], atol=1e-5)
    assert not torch.allclose(truths["a0"], truths["a1"], atol=1e-2)

    checkpoint = compressed([tmp_path / a for a in adapters], **options)
    share = SHAREModel.from_pretrained(checkpoint)
    theirs = None if share.config.coded else lorashare.SHAREModel.from_pretrained(checkpoint)
    verbatim = {key for adapter in adapters for key in share.certified(adapter)["verbatim"]}
    assert set(share.config.target_modules) == feature.shared
    if not (share.config.coded and name == "target-parameters-of-others"):  # what is coded alone need not fit others
        assert not [part for part in feature.verbatim if not any(part in key for key in verbatim)]
    if feature.exact is not None:
        assert share.config.ours["verbatim_adapters"] == list(adapters)
        assert all(feature.exact in share.certified(adapter)["notes"][0] for adapter in adapters)

    for adapter, truth in truths.items():
        share.reconstruct(adapter, output_dir=tmp_path / "ours" / adapter)
        close = 1e-3 * truth.abs().max().clamp(min=1) if share.config.coded else 1e-4
        check_same(feature, tmp_path / "ours" / adapter, tmp_path / adapter, truth, close)
        written, original = (tmp_path / "ours" / adapter, tmp_path / adapter)
        assert json.loads((written / "adapter_config.json").read_text()) == json.loads(
            (original / "adapter_config.json").read_text()
        )
        assert share.reconstruction_error(adapter, original_path=str(original))["delta_relative"] < 1.1e-5
        if theirs is not None:
            theirs.reconstruct(adapter, output_dir=str(tmp_path / "theirs" / adapter))
            check_same(feature, tmp_path / "theirs" / adapter, tmp_path / adapter, truth)
    if share.config.coded and name in COARSE:
        assert max(share.certified(adapter)["relative_error"] for adapter in adapters) > 1e-6  # they are coded


COARSE = {  # features whose dW is a product of two tensors: what PEFT makes of them is the oracle
    "linear", "conv1d-of-gpt2", "multihead-attention", "multihead-attention-with-patterns", "base-within-a-base",
    "names-like-parts-of-keys", "target-parameters-of-others", "dora", "rslora", "rank-and-alpha-patterns",
    "layer-replication", "target-parameters", "target-parameters-with-patterns", "eva", "many-in-one-collection",
}  # fmt: skip


@pytest.mark.few(4)
@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize("options", [{"num_components": 3}, {"max_error": 0.3}])
@pytest.mark.parametrize("name", sorted(COARSE))
def test_the_certified_error_is_that_of_the_matrices_that_peft_adds(
    tmp_path: Path, compressed: Compress, name: str, options: dict[str, Any]
) -> None:
    feature, adapters = FEATURES[name], adapters_of(FEATURES[name])
    for seed, (adapter, its_own) in enumerate(adapters.items()):
        trained(feature, its_own, seed, tmp_path / adapter)
    share = SHAREModel.from_pretrained(compressed([tmp_path / a for a in adapters], **options))
    index = read_index(tmp_path / "out" / INDEX) if share.config.coded else None
    for adapter in adapters:
        certified = share.certified(adapter)
        if certified["worst_module"] is None:
            continue
        share.reconstruct(adapter, output_dir=tmp_path / "rec" / adapter)
        before, after = loaded(feature, tmp_path / adapter), loaded(feature, tmp_path / "rec" / adapter)
        error = norm = 0.0
        if index is None:
            modules = [group.removesuffix(":A") for group in share.all_loadings[adapter] if group.endswith(":A")]
        else:
            modules = [row[0] for row in index.adapters[adapter].layout]
        for module in modules:
            a, b = (m.base_model.model.get_submodule(module).get_delta_weight("default") for m in (before, after))
            error += float(torch.sum((a - b) ** 2))
            norm += float(torch.sum(a**2))
        assert certified["relative_error"] > 0.01
        assert certified["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-3)
        if index is None:
            assert certified["delta_norm"] == pytest.approx(norm**0.5, rel=1e-3)
        given = share.reconstruction_error(adapter, original_path=str(tmp_path / adapter))
        if not any(".lora_" in key for key in certified["verbatim"]):  # it is of all modules
            assert given["delta_relative"] == pytest.approx(certified["relative_error"], rel=1e-3)


# -- forms in which the same adapter lies about ----------------------------------------------------------------


def rewritten(folder: Path, rename: Callable[[str], str]) -> None:
    save_file({rename(k): v for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def as_state_dict(folder: Path, feature: Feature, name: str = "default", everything: bool = True) -> None:
    """The file as `torch.save(model.state_dict())` would make it."""
    config = LoraConfig.from_pretrained(folder)
    model = get_peft_model(prepare(feature, config), config, adapter_name=name)
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS), adapter_name=name)
    state = {k: v.clone() for k, v in model.state_dict().items() if everything or f".{name}" in k}
    assert any(f".{name}." in k for k in state)
    save_file(state, folder / WEIGHTS)


def as_pickle(folder: Path, **options: Any) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin", **options)
    (folder / WEIGHTS).unlink()


def as_pickle_of_a_gpu(folder: Path) -> None:
    """What a training run on a GPU leaves: storages that say that they belong there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        as_pickle(folder)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "adapter_model.bin", weights_only=True)


def as_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {f"adapter_model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FORMS: dict[str, Callable[[Path, Feature], Any]] = {
    "state dict of the whole model": lambda f, feature: as_state_dict(f, feature),
    "keys with the name default": lambda f, feature: as_state_dict(f, feature, everything=False),
    "keys with another name": lambda f, feature: as_state_dict(f, feature, "customer_17", everything=False),
    "prefix of DDP": lambda f, _: rewritten(f, lambda k: "module." + k),
    "prefix of torch.compile": lambda f, _: rewritten(f, lambda k: "_orig_mod." + k),
    "names of FSDP within": lambda f, _: rewritten(f, lambda k: k.replace(".layer", "._fsdp_wrapped_module.layer")),
    "no prefix": lambda f, _: rewritten(f, lambda k: k.removeprefix("base_model.model.")),
    "shards with an index": lambda f, _: as_shards(f),
    "pickle": lambda f, _: as_pickle(f),
    "pickle of old": lambda f, _: as_pickle(f, _use_new_zipfile_serialization=False),
    "pickle of a GPU": lambda f, _: as_pickle_of_a_gpu(f),
}
RICH = [
    "dora", "lora-bias", "modules-to-save", "head-of-the-task", "trainable-token-indices", "monteclora", "kasa",
    "embedding",
]  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(  # in the fast tier every form and every feature, of one another
    ("name", "form"),
    [case for i, form in enumerate(FORMS) for case in some_fast([(name, form) for name in RICH], len(RICH), i)],
)
def test_a_form_in_which_adapters_lie_about(tmp_path: Path, compressed: Compress, name: str, form: str) -> None:
    feature, adapters = FEATURES[name], adapters_of(FEATURES[name])
    truths = {}
    for seed, (adapter, options) in enumerate(adapters.items()):
        truths[adapter] = trained(feature, options, seed, tmp_path / adapter)
        shutil.copytree(tmp_path / adapter, tmp_path / "forms" / adapter)
        FORMS[form](tmp_path / "forms" / adapter, feature)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "forms"], num_components=10_000))
    for adapter, truth in truths.items():
        share.reconstruct(adapter, output_dir=tmp_path / "rec" / adapter)
        written, saved = (load_file(tmp_path / f / adapter / WEIGHTS) for f in ("rec", "."))
        assert written.keys() >= saved.keys()
        assert form.startswith("state dict") or written.keys() == saved.keys()
        model = loaded(feature, tmp_path / "rec" / adapter)
        assert torch.allclose(logits(model), truth, atol=1e-4)
        check_landed(model, {k: v for k, v in written.items() if k in saved})


def test_a_prefix_that_comes_twice_is_kept_and_told(tmp_path: Path, compressed: Compress) -> None:
    """PEFT saves it of a base model with such a path (base-within-a-base), and of one that it wrapped twice."""
    feature = FEATURES["linear"]
    for seed in range(2):
        trained(feature, QV, seed, tmp_path / "in" / f"a{seed}")
        rewritten(tmp_path / "in" / f"a{seed}", lambda k: "base_model.model." + k)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], num_components=1000))
    assert share.reconstruct("a0").keys() == load_file(tmp_path / "in" / "a0" / WEIGHTS).keys()
    assert "base_model.model. twice" in share.certified("a0")["notes"][0]


def test_keys_that_are_mended_are_told(tmp_path: Path) -> None:
    for seed in range(2):
        trained(FEATURES["linear"], QV, seed, tmp_path / f"a{seed}")
    rewritten(tmp_path / "a1", lambda k: "_orig_mod." + k)
    (warning,) = [w for w in plan_warnings(plan_for(resolve([tmp_path]), Settings())) if "as PEFT saves them" in w]
    assert "in 1 adapter (a1)" in warning


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_of_any_precision(tmp_path: Path, compressed: Compress, precision: torch.dtype) -> None:
    feature, truths = FEATURES["linear"], {}
    for seed in range(2):
        folder = tmp_path / "in" / f"a{seed}"
        trained(feature, QV, seed, folder)
        save_file({k: v.to(precision) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        truths[f"a{seed}"] = logits(loaded(feature, folder))
    wide = SHAREModel.from_pretrained(compressed([tmp_path / "in"], "wide", num_components=1000, dtype="float32"))
    own = SHAREModel.from_pretrained(compressed([tmp_path / "in"], "own", num_components=1000))
    for name, truth in truths.items():
        wide.reconstruct(name, output_dir=tmp_path / "rec" / name)
        assert torch.allclose(logits(loaded(feature, tmp_path / "rec" / name)), truth, atol=1e-4)
        rounding = own.certified(name)["relative_error"]
        expected = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-6}[precision]
        assert expected / 4 < rounding < expected * 2 or rounding < 1e-6
        assert {t.dtype for t in own.reconstruct(name).values()} == {
            precision if precision != torch.float64 else torch.float32
        }


def test_what_transformers_saves_without_the_prefix_and_in_shards(tmp_path: Path, compressed: Compress) -> None:
    feature, truths = FEATURES["linear"], {}
    for seed in range(2):
        model = feature.base()
        model.add_adapter(LoraConfig(**QV))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        truths[f"a{seed}"] = logits(model)
        model.save_pretrained(tmp_path / "in" / f"a{seed}", max_shard_size=2000, save_peft_format=seed == 0)
    assert (tmp_path / "in" / "a0" / "model.safetensors.index.json").exists()
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], num_components=1000))
    for name, truth in truths.items():
        share.reconstruct(name, output_dir=tmp_path / "rec" / name)
        assert torch.allclose(logits(loaded(feature, tmp_path / "rec" / name)), truth, atol=1e-4)


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_named_adapters_lie_in_subfolders(tmp_path: Path, compressed: Compress) -> None:
    feature = FEATURES["linear"]
    config = LoraConfig(**QV)
    model = get_peft_model(feature.base(), config)
    for name in ("mine", "yours"):
        model.add_adapter(name, config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    truths = {}
    for name in ("default", "mine", "yours"):
        model.set_adapter(name)
        truths[name] = logits(model)
    model.save_pretrained(tmp_path / "all")
    plan = plan_for(resolve([tmp_path / "all"]), Settings())
    assert plan.inner == {"all": ("mine", "yours")}  # said, not taken unasked: most subfolders are checkpoints
    assert any("all/mine, all/yours" in warning for warning in plan_warnings(plan))
    named = {"default": tmp_path / "all", "mine": tmp_path / "all" / "mine", "yours": tmp_path / "all" / "yours"}
    share = SHAREModel.from_pretrained(compressed(named, num_components=1000))
    for name, truth in truths.items():
        share.reconstruct(name, output_dir=tmp_path / "rec" / name)
        assert torch.allclose(logits(loaded(feature, tmp_path / "rec" / name)), truth, atol=1e-4)


# -- the table ---------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[1] / "docs" / "adapters.md"


def test_the_table_in_the_docs_names_every_feature_and_every_form_and_tests_that_are_there() -> None:
    text = DOCS.read_text()
    named = set(re.findall(r"`\[([^\]]+)\]`", text)) - {"name"}
    assert named == FEATURES.keys() | FORMS.keys()
    for file, test in re.findall(r"`tests/(\w+)\.py::(\w+)", text):
        assert f"\ndef {test}(" in (Path(__file__).parent / f"{file}.py").read_text(), test
    assert len(re.findall(r"`tests/\w+\.py::\w+", text)) > 15
