"""Uniform adapters: one rank, scale 1, the same dW, by the rules of every engine and by PEFT itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lorashare_stream.cli.app import main
from lorashare_stream.errors import CheckpointError, UsageError
from lorashare_stream.model import SHAREModel
from lorashare_stream.serving.engines import check_engine
from lorashare_stream.serving.uniform import REMEDY, uniform

from . import engine_table, engines
from .conftest import CONFIG, factor_keys
from .features import FEATURES, loaded, loftq, logits, trained
from .test_features import CODED, PEFTS_OWN, SHARED, WEIGHTS, Compress, adapters_of, check_landed
from .tiers import some_fast

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


# -- by the rules of engines -----------------------------------------------------------------------------------------

SHAPES = {"q": (24, 16), "v": (24, 8), "mlp.down": (12, 24)}
EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
ALPHAS = st.sampled_from([1, 3, 8, 16, 16.5, -8, 0, 0.25])
RANKS = st.integers(1, 5)


@dataclass(frozen=True)
class Made:
    """An adapter that PEFT would load, and the number of experts of each stack in it."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    experts: dict[str, int]


def made(
    modules: dict[str, tuple[int, int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    experts: int = 0,
    **fields: Any,
) -> Made:
    """Random factors of the ranks that a configuration gives, as PEFT reads it."""
    config = CONFIG | {"lora_alpha": 8, "target_modules": sorted({m.rpartition(".")[2] for m in modules})} | fields
    counts = dict.fromkeys(modules, 1)
    if experts:
        modules = modules | {"layers.0.experts": (10, 6)}
        counts["layers.0.experts"] = experts
        config["target_parameters"] = ["layers.0.experts.up"]
    generator = torch.Generator().manual_seed(seed)
    patterns = config.get("rank_pattern") or {}
    tensors = {}
    for module, (d_in, d_out) in modules.items():
        name = module if counts[module] == 1 else f"{module}.up"
        r = patterns.get(get_pattern_key(patterns, name), config["r"]) * counts[module]
        for key, shape in zip(factor_keys(module), ((r, d_in), (d_out, r)), strict=True):
            tensors[key] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return Made(tensors, config, {m: n for m, n in counts.items() if n > 1})


@st.composite
def adapters(draw: st.DrawFn) -> Made:
    names = [f"layers.{layer}.{kind}" for layer in range(2) for kind in SHAPES]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    patterns = st.sampled_from(["q", "v", r"layers\.1\..*", "layers.0.q", ".*down", "up", r".*\.experts\.up"])
    return made(
        {name: SHAPES[name.split(".", 2)[2]] for name in chosen},
        draw(st.integers(0, 9)),
        draw(st.sampled_from(list(EPS))),
        draw(st.sampled_from([0, 0, 2, 3])),
        r=draw(RANKS),
        lora_alpha=draw(ALPHAS),
        use_rslora=draw(st.booleans()),
        rank_pattern=draw(st.dictionaries(patterns, RANKS, max_size=3)),
        alpha_pattern=draw(st.dictionaries(patterns, ALPHAS, max_size=3)),
    )


def check_equal(found: engines.Deltas, truth: engines.Deltas, close: float) -> None:
    assert found.keys() == truth.keys()
    for module, delta in truth.items():
        assert float((found[module] - delta).norm()) <= close * float(delta.norm()), module


@given(adapters(), st.integers(0, 3))
def test_every_engine_makes_the_same_dw_of_it(adapter: Made, more: int) -> None:
    truth = engines.peft(adapter.tensors, adapter.config, adapter.experts)
    largest = uniform(adapter.tensors, adapter.config)[1]["r"]
    tensors, config = uniform(adapter.tensors, adapter.config, rank=largest + more)
    assert config["r"] == config["lora_alpha"] == largest + more
    assert {k: v.dtype for k, v in tensors.items()} == {k: v.dtype for k, v in adapter.tensors.items()}
    close = EPS[next(iter(tensors.values())).dtype]
    check_equal(engines.peft(tensors, config, adapter.experts), truth, close)
    layers = {k: v for k, v in tensors.items() if ".experts." not in k}
    for rule in engines.RULES.values():
        check_equal(rule(layers, config), {m: d for m, d in truth.items() if m not in adapter.experts}, close)
    again, config_again = uniform(tensors, config)
    assert same(again, tensors)
    assert config_again == config


LAYERS = {f"layers.{i}.q": (24, 16) for i in range(2)}
R = CONFIG["r"]


@pytest.mark.parametrize(
    ("engine", "fields", "times"),
    [
        ("sglang", {"use_rslora": True}, R**0.5),
        ("llama.cpp", {"use_rslora": True}, R**0.5),
        ("sglang", {"alpha_pattern": {"q": 32}}, 4),
        ("lorax", {"alpha_pattern": {"q": 32}}, 4),
        ("llama.cpp", {"alpha_pattern": {"q": 32}}, 4),
        ("sglang", {"rank_pattern": {"q": 2}}, 2),
        ("lorax", {"rank_pattern": {"q": 2}}, 2),
    ],
)
def test_engines_are_wrong_about_what_is_not_uniform(engine: str, fields: dict[str, Any], times: float) -> None:
    adapter = made(LAYERS, **fields)
    truth = engines.peft(adapter.tensors, adapter.config)
    weak = engines.RULES[engine](adapter.tensors, adapter.config)
    check_equal({module: times * delta for module, delta in weak.items()}, truth, 1e-12)


def test_lorax_stacks_no_unequal_ranks() -> None:
    adapter = made(LAYERS, rank_pattern={"layers.1.q": 2})
    with pytest.raises(RuntimeError, match="equal size"):
        engines.lorax(adapter.tensors, adapter.config)


def test_llama_cpp_takes_an_alpha_of_zero_for_none() -> None:
    adapter = made(LAYERS, lora_alpha=0)
    assert all(bool(delta.any()) for delta in engines.llama_cpp(adapter.tensors, adapter.config).values())
    assert not any(bool(delta.any()) for delta in engines.peft(adapter.tensors, adapter.config).values())


# -- what a dtype holds ----------------------------------------------------------------------------------------------

KEY_A, KEY_B = factor_keys("layers.0.q")


@pytest.mark.parametrize(("size", "alpha"), [(6e4, 64), (1e-6, 0.25), (-6e4, -64)])
def test_a_product_beyond_float16_goes_into_the_other_factor(size: float, alpha: float) -> None:
    adapter = made({"layers.0.q": (24, 16)}, dtype=torch.float16, lora_alpha=alpha)
    adapter.tensors[KEY_B] = torch.full_like(adapter.tensors[KEY_B], size)
    tensors, config = uniform(adapter.tensors, adapter.config)
    assert torch.equal(tensors[KEY_B], adapter.tensors[KEY_B])
    check_equal(engines.peft(tensors, config), engines.peft(adapter.tensors, adapter.config), EPS[torch.float16])


def test_a_product_beyond_both_factors_is_refused() -> None:
    adapter = made({"layers.0.q": (24, 16)}, dtype=torch.float16, lora_alpha=64)
    huge = {key: torch.full_like(tensor, 6e4) for key, tensor in adapter.tensors.items()}
    with pytest.raises(CheckpointError, match="float16 does not hold the product") as refusal:
        uniform(huge, adapter.config)
    assert refusal.value.key == KEY_B
    assert refusal.value.found == "scale 16"


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_rank_below_that_of_a_module_is_refused_by_its_name() -> None:
    adapter = made(LAYERS, rank_pattern={"layers.1.q": 7})
    with pytest.raises(CheckpointError, match="a module has a larger rank") as refusal:
        uniform(adapter.tensors, adapter.config, rank=6, adapter="mine")
    assert refusal.value.key == factor_keys("layers.1.q")[0]
    assert (refusal.value.adapter, refusal.value.found, refusal.value.expected) == ("mine", 7, "at most 6")
    for rank in (0, -1, 1 << 31):
        with pytest.raises(UsageError, match="a whole number"):
            uniform(adapter.tensors, adapter.config, rank=rank)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"init_lora_weights": "milora"}, "part of the base model"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"alpha_pattern": {r"(?=q)q": 2}}, "RE2"),
        ({"r": 5}, "disagree on the rank"),
        ({"r": "5"}, "unusable r"),
        ({"peft_type": "LOHA"}, "not a LoRA adapter"),
        ({"velora_config": {"scale": 1}}, "VeLoRA depends on the rank"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], problem: str) -> None:
    adapter = made(LAYERS)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        uniform(adapter.tensors, adapter.config | fields, adapter="mine")
    assert refusal.value.adapter == "mine"
    assert refusal.value.remedy == REMEDY


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(KEY_B), "one side of a factor"),
        (lambda t: t.update({KEY_A: t[KEY_A].to(torch.float8_e4m3fn)}), "dtype without products"),
        (lambda t: t.update({KEY_A: t[KEY_A].to(torch.int8)}), "dtype without products"),
        (lambda t: t.update({KEY_A.replace("lora_A.weight", "lora_diag"): t[KEY_A][:, 0]}), "beside the factors"),
    ],
)
def test_tensors_that_are_refused(change: Callable[[dict[str, torch.Tensor]], Any], problem: str) -> None:
    adapter = made(LAYERS)
    change(adapter.tensors)
    with pytest.raises(CheckpointError, match=problem) as refusal:
        uniform(adapter.tensors, adapter.config)
    assert refusal.value.key.startswith("base_model.model.layers.0.q")


def test_an_expression_stays_where_parameters_may_be_of_any_layer() -> None:
    adapter = made(LAYERS, target_modules=r".*\.q", target_parameters=["weight"])
    assert uniform(adapter.tensors, adapter.config)[1]["target_modules"] == r".*\.q"


def test_a_convolution_of_a_smaller_rank_is_refused(tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["conv1", "lin"], "rank_pattern": {"lin": 3}}
    trained(FEATURES["conv1d"], options, 0, tmp_path / "a")
    with pytest.raises(CheckpointError, match="convolution of a smaller rank"):
        uniform(*read(tmp_path / "a"))


# -- by PEFT ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize("name", some_fast(FEATURES, 3))
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


@pytest.mark.few(3)
@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(
    ("name", "options"), some_fast([(n, o) for o in (SHARED, CODED) for n in FEATURES if n not in REFUSED], 9)
)
def test_what_comes_out_of_a_checkpoint(
    tmp_path: Path, compressed: Compress, name: str, options: dict[str, Any]
) -> None:
    feature = FEATURES[name]
    for seed, (adapter, its_own) in enumerate(adapters_of(feature).items()):
        trained(feature, its_own, seed, tmp_path / "in" / adapter)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], **options))
    for adapter in share.adapter_names:
        share.reconstruct(adapter, tmp_path / "plain" / adapter)
        try:
            tensors = share.reconstruct(adapter, tmp_path / "uniform" / adapter, uniform=True)
        except CheckpointError:
            assert name == "many-in-one-collection"
            assert not (tmp_path / "uniform" / adapter).exists()
            continue
        model, truth = (loaded(feature, tmp_path / form / adapter) for form in ("uniform", "plain"))
        assert torch.allclose(logits(model), logits(truth), atol=1e-4)
        assert same(tensors, read(tmp_path / "uniform" / adapter)[0])


def test_uniform_adapters_are_compressed_like_others(tmp_path: Path, compressed: Compress) -> None:
    adapter = made(LAYERS, use_rslora=True, rank_pattern={"layers.1.q": 2})
    for name in ("a0", "a1"):
        write(tmp_path / "in" / name, adapter.tensors, adapter.config)
    share = SHAREModel.from_pretrained(compressed([tmp_path / "in"], num_components=24))
    for name in share.adapter_names:
        share.reconstruct(name, tmp_path / "uniform" / name, uniform=True)
    again = SHAREModel.from_pretrained(compressed([tmp_path / "uniform"], "again", num_components=24))
    truth = engines.peft(adapter.tensors, adapter.config)
    for name in again.adapter_names:
        check_equal(engines.peft(again.reconstruct(name), again.adapter_configs[name]), truth, 1e-5)


# -- for an engine ---------------------------------------------------------------------------------------------------

COPY = "base_model.model.embed_tokens.base_layer.weight"


@pytest.fixture
def several(tmp_path: Path, compressed: Compress) -> Path:
    """A checkpoint of three adapters of rank 4: two plain ones, of which one has a copy of the base, and a DoRA."""
    adapter = made(LAYERS, use_rslora=True)
    magnitude = {f"base_model.model.{module}.lora_magnitude_vector": torch.ones(16) for module in LAYERS}
    write(tmp_path / "in" / "plain", adapter.tensors, adapter.config)
    write(tmp_path / "in" / "copied", adapter.tensors | {COPY: torch.ones(5, 24)}, adapter.config)
    write(tmp_path / "in" / "dora", adapter.tensors | magnitude, adapter.config | {"use_dora": True})
    return compressed([tmp_path / "in"], num_components=24)


def test_the_model_writes_what_an_engine_takes_and_nothing_else(tmp_path: Path, several: Path) -> None:
    share = SHAREModel.from_pretrained(several)
    notes = Counter[str]()
    share.reconstruct("copied", tmp_path / "copied", engine="vllm", notes=notes)
    assert read(tmp_path / "copied")[1]["use_rslora"] is False
    assert notes == {
        "copies of embed_tokens or lm_head of the base: vLLM passes over them and uses the weights of its own base": 1
    }
    assert share.reconstruct("plain", rank=9)[KEY_A].shape == (9, 24)
    assert share.reconstruct("plain", engine="peft", rank=5)[KEY_A].shape == (5, 24)
    assert same(share.reconstruct("plain", uniform=True), share.reconstruct("plain", engine="llama.cpp"))
    with pytest.raises(CheckpointError, match="vLLM does not take DoRA: it refuses use_dora") as refusal:
        share.reconstruct("dora", tmp_path / "dora", engine="vllm")
    assert (refusal.value.adapter, refusal.value.key) == ("dora", "use_dora")
    assert not (tmp_path / "dora").exists()
    with pytest.raises(UsageError, match="no such engine"):
        share.reconstruct("plain", engine="tgi")


def test_the_command_writes_what_an_engine_takes_and_tells_the_others(
    tmp_path: Path, several: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def call(*words: object) -> int:
        return main(["reconstruct", str(several), *map(str, words)])

    assert call("--all", "-o", tmp_path / "vllm", "--for", "vllm", "--json") == 3
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["reconstructed"].keys() == {"plain", "copied"} == {p.name for p in (tmp_path / "vllm").iterdir()}
    assert "'dora', key 'use_dora': vLLM does not take DoRA" in result["failed"]["dora"]
    assert "without --uniform" in result["failed"]["dora"]
    assert [
        m for m in caplog.messages if m.endswith("uses the weights of its own base (in 1 adapter)")
    ] == caplog.messages[-1:]
    assert call("--all", "-o", tmp_path / "uniform", "--uniform") == 0
    assert call("--all", "-o", tmp_path / "rank", "--rank", 8, "-q") == 0
    assert {read(folder)[1]["r"] for folder in (tmp_path / "rank").iterdir()} == {8}
    assert {read(folder)[1]["r"] for folder in (tmp_path / "uniform").iterdir()} == {4}
    capsys.readouterr()
    assert call("--all", "-o", tmp_path / "low", "--rank", 2) == 1
    assert "3 adapters" in (said := capsys.readouterr()).out + said.err
    for words in (["--for", "tgi"], ["--rank", 0]):
        assert call("--all", "-o", tmp_path / "none", *words) == 2


REFUSALS = {
    "vllm": {"dora", "bias", "tokens", "norm", "head", "saved"},
    "sglang": {"dora", "bias", "tokens", "norm", "score", "head", "saved", "emb"},
    "lorax": {"dora", "bias", "tokens", "norm", "score", "head", "saved", "emb", "embed_tokens", "gap"},
    "llama.cpp": {"dora", "bias", "tokens", "score", "head", "saved"},
    "peft": set(),
}


@pytest.mark.parametrize("engine", REFUSALS)
def test_what_an_engine_refuses(engine: str) -> None:
    adapter = made(LAYERS)
    prefix = "base_model.model."
    embedding = {"lora_embedding_A": torch.ones(4, 9), "lora_embedding_B": torch.ones(6, 4)}
    more = {
        "nothing": ({}, {}),
        "dora": ({f"{prefix}layers.0.q.lora_magnitude_vector": torch.ones(16)}, {}),
        "bias": ({f"{prefix}layers.0.q.lora_B.bias": torch.ones(16)}, {}),
        "tokens": ({f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 6)}, {}),
        "norm": ({f"{prefix}layers.0.input_layernorm.weight": torch.ones(24)}, {}),
        "score": ({f"{prefix}score.weight": torch.ones(3, 24)}, {"modules_to_save": ["classifier", "score"]}),
        "head": ({f"{prefix}score.weight": torch.ones(3, 24)}, {}),
        "saved": ({f"{prefix}lm_head.weight": torch.ones(9, 24)}, {"modules_to_save": ["lm_head"]}),
        "emb": ({f"{prefix}emb.{key}": tensor for key, tensor in embedding.items()}, {}),
        "embed_tokens": ({f"{prefix}embed_tokens.{key}": tensor for key, tensor in embedding.items()}, {}),
        "gap": (made({"layers.1.v": (24, 8)}).tensors, {}),
    }
    refused: dict[str, str | None] = {}
    for name, (tensors, config) in more.items():
        try:
            check_engine(engine, *uniform(adapter.tensors | tensors, adapter.config | config))
        except CheckpointError as e:
            refused[name] = e.key
    assert refused.keys() == REFUSALS[engine]
    assert all(key in more[name][0] for name, key in refused.items())


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_the_table_of_what_is_not_uniform_is_what_the_rules_say() -> None:
    assert engine_table.marked("rules", engine_table.rule_table()) in engine_table.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_the_table_of_features_is_what_becomes_of_them() -> None:
    rows = engine_table.feature_rows()
    assert engine_table.marked("features", engine_table.feature_table(rows)) in engine_table.PAGE.read_text()
    assert {name for name, cells in rows.items() if cells[-1] != "yes"} == REFUSED.keys()
