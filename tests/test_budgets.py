"""Budgets of bytes and of error, ranks that are trimmed, adapters that are kept their own way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorashare
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import BertConfig, BertForSequenceClassification

from lorashare_stream.checkpoint.location import Folder
from lorashare_stream.cli.app import main
from lorashare_stream.errors import BudgetError, UsageError
from lorashare_stream.hub.card import card
from lorashare_stream.model import SHAREModel
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.page import page
from lorashare_stream.report.statistics import findings_of
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings
from lorashare_stream.stages.verify import originals_of, verify

from .conftest import MODULES, factor_keys, load_tensors, make_collection, make_tensors, tree_digest, write_adapter
from .tiers import slow

Compress = Callable[..., Path]
WIDE = {f"layers.{i}.{name}": (96, d) for i in range(2) for name, d in (("q", 96), ("v", 48))}


def disk_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file())


def delta_of(tensors: Any, module: str, scale: float = 2.0) -> np.ndarray:
    a, b = (np.asarray(tensors[key], np.float64) for key in factor_keys(module))
    return scale * b @ a


def error_of(out: Path, folder: str | Path, modules: Any = WIDE, scale: float = 2.0) -> float:
    """The relative dW error of one adapter, from dense matrices and what reconstruct gives."""
    share = SHAREModel.from_pretrained(out)
    name = Path(folder).name
    original, found = load_tensors(folder), {k: t.float().numpy() for k, t in share.reconstruct(name).items()}
    there = [m for m in modules if factor_keys(m)[0] in original]
    scales = {m: scale_of(share.adapter_configs[name], m) for m in there}
    error = sum(np.sum((delta_of(original, m, scale) - delta_of(found, m, scales[m])) ** 2) for m in there)
    return float(np.sqrt(error / sum(np.sum(delta_of(original, m, scale) ** 2) for m in there)))


def scale_of(config: dict[str, Any], module: str) -> float:
    """The scale that PEFT gives a module, looked up by PEFT's own function."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), config["r"])
    return alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"]) / r


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Thirty adapters of a common subspace, half of them of rank 2 saved at rank 4, and two of none."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(7)
    folders = []
    for i in range(30):
        tensors = make_tensors(rng, WIDE)
        if i % 2:
            for key in tensors:
                if "lora_B" in key:
                    tensors[key][:, 2:] = 0
        folders.append(write_adapter(root / f"a{i:02}", tensors, r=4, lora_alpha=8))
    for i in range(2):
        alone = {}
        for module, (d_in, d_out) in WIDE.items():
            a, b = factor_keys(module)
            alone[a] = rng.standard_normal((4, d_in)).astype(np.float32)
            alone[b] = rng.standard_normal((d_out, 4)).astype(np.float32)
        folders.append(write_adapter(root / f"stranger{i}", alone, r=4, lora_alpha=8))
    return [str(f) for f in folders]


@pytest.mark.parametrize("share", [0.4, slow(0.25), slow(0.7)])
def test_a_budget_of_bytes_is_kept_and_well_spent(mixed: list[str], compressed: Compress, share: float) -> None:
    limit = int(share * sum(disk_bytes(Path(f)) for f in mixed))
    out = compressed(mixed, max_bytes=limit)
    assert disk_bytes(out) <= limit
    config = SHAREModel.from_pretrained(out).config
    mean = np.sqrt(np.mean([error_of(out, f) ** 2 for f in mixed]))
    fixed = []
    for k in (1, 2, 4, 8, 16, 32):
        other = compressed(mixed, f"k{k}", num_components=k)
        if disk_bytes(other) <= limit:
            fixed.append(np.sqrt(np.mean([error_of(other, f) ** 2 for f in mixed])))
    assert mean <= min(fixed) * 1.001
    assert config.component_selection == "auto"


def test_all_bytes_on_disk_are_told(tmp_path: Path, mixed: list[str], compressed: Compress) -> None:
    for name, options in {"k": {"num_components": 8}, "ratio": {"ratio": 3}, "skip": {"on_error": "skip"}}.items():
        bad = make_tensors(np.random.default_rng(0), WIDE)
        bad[factor_keys("layers.0.q")[0]][0, 0] = np.nan
        stranger = str(write_adapter(tmp_path / "bad", bad, r=4, lora_alpha=8))
        sources = [*mixed, stranger] if name == "skip" else mixed
        out = compressed(sources, name, **options)
        size = SHAREModel.from_pretrained(out).config.ours["bytes"]
        assert sum(size[part] for part in ("basis", "loadings", "verbatim", "metadata")) == disk_bytes(out)
        assert size["originals"] == sum(p.stat().st_size for f in mixed for p in Path(f).glob("*.safetensors"))


def test_a_ratio_is_of_the_originals_on_disk(mixed: list[str], compressed: Compress) -> None:
    out = compressed(mixed, ratio=3)
    originals = sum(p.stat().st_size for f in mixed for p in Path(f).glob("*.safetensors"))
    assert disk_bytes(out) <= originals / 3


@pytest.mark.parametrize("asked", [{"ratio": 1e4}, {"max_bytes": 20_000}])
def test_what_cannot_be_met_is_said_with_the_nearest_that_can(
    mixed: list[str], compressed: Compress, asked: dict[str, Any]
) -> None:
    with pytest.raises(BudgetError) as caught:
        compressed(mixed, **asked)
    assert next(iter(asked)) in str(caught.value)
    words = str(caught.value.remedy).split()
    nearest = float(words[2])
    out = compressed(mixed, **{next(iter(asked)): nearest if "ratio" in asked else int(nearest)})
    assert disk_bytes(out) > 20_000


@pytest.mark.parametrize("limit", [0.5, slow(0.2), slow(0.05)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_adapter_exceeds_a_limit_on_errors(mixed: list[str], compressed: Compress, limit: float, dtype: str) -> None:
    out = compressed(mixed, max_error=limit, dtype=dtype)
    share = SHAREModel.from_pretrained(out)
    for folder in mixed:
        error = error_of(out, folder)
        assert error <= limit * (1 + 1e-6)
        assert error == pytest.approx(share.certified(Path(folder).name)["relative_error"], abs=1e-3)
    verdicts = list(verify(share, originals_of(share, resolve(mixed))))
    assert [v.problem for v in verdicts] == [None] * len(mixed)
    assert share.config.ours["errors"]["max"] <= limit
    if dtype == "float32":  # all of them verbatim, and the least k at which all meet it
        verbatim = sum(disk_bytes(Path(f)) for f in mixed)
        assert disk_bytes(out) <= verbatim
        for k in (4, 8, 16, 32, 64, 96):
            fixed = compressed(mixed, f"k{k}", num_components=k)
            if SHAREModel.from_pretrained(fixed).config.ours["errors"]["max"] <= limit:
                assert disk_bytes(out) <= disk_bytes(fixed)
                break


def test_strangers_keep_factors_of_their_own(mixed: list[str], compressed: Compress) -> None:
    out = compressed(mixed, max_error=0.15)
    share = SHAREModel.from_pretrained(out)
    for name in ("stranger0", "stranger1"):
        told = share.certified(name)
        assert set(told.get("own", ())) | {
            k.split(".lora_")[0].removeprefix("base_model.model.") for k in told["verbatim"]
        } == {*WIDE}
    own = [name for name in share.adapter_names if "own" in share.certified(name)]
    assert len(own) < 10  # the others share


def test_ranks_are_trimmed_where_they_carry_nothing(mixed: list[str], compressed: Compress) -> None:
    plain, trimmed = compressed(mixed, "plain", num_components=16), compressed(mixed, num_components=16, trim_rank=True)
    before, after = SHAREModel.from_pretrained(plain), SHAREModel.from_pretrained(trimmed)
    assert after.config.ours["bytes"]["loadings"] < 0.85 * before.config.ours["bytes"]["loadings"]
    for folder in mixed:
        name = Path(folder).name
        assert after.certified(name)["relative_error"] <= before.certified(name)["relative_error"] + 0.02
        assert "own" not in after.certified(name)
    low = after.reconstruct("a01")
    assert low[factor_keys("layers.0.q")[0]].shape[0] <= 2
    assert after.certified("a01")["unchanged_config"] == json.loads(Path(mixed[1], "adapter_config.json").read_text())
    error = after.reconstruction_error("a01", original_path=mixed[1])
    assert error["delta_relative"] == pytest.approx(after.certified("a01")["relative_error"], abs=1e-4)
    assert before.reconstruct("a01")[factor_keys("layers.0.q")[0]].shape[0] == 4  # -k alone trims nothing


@pytest.mark.parametrize("asked", [{"ratio": 3}, {"max_error": 0.2}, {"num_components": 8, "trim_rank": True}])
def test_lorashare_reads_every_form(mixed: list[str], compressed: Compress, asked: dict[str, Any]) -> None:
    out = compressed(mixed, **asked)
    ours, theirs = SHAREModel.from_pretrained(out), lorashare.SHAREModel.from_pretrained(out)
    theirs.summary()
    for name in ours.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **size)).eval()


CONFIGS: list[dict[str, Any]] = [
    {"r": 6, "lora_alpha": 12, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    {"r": 6, "lora_alpha": 12, "use_rslora": True, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    {"r": 6, "rank_pattern": {"value": 3}, "alpha_pattern": {"query": 5}, "target_modules": ["query", "value"]},
    {"r": 6, "lora_alpha": 12, "use_dora": True, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
]


@pytest.mark.parametrize("asked", [{"max_error": 0.02}, {"num_components": 30, "trim_rank": True}])
def test_peft_gives_nearly_the_original_logits(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Adapters of rank 2 that were saved at 6 and 3: at a small error the logits are those of the originals."""
    inputs = torch.arange(24).reshape(2, 12)
    logits, folders = [], []
    for i, config in enumerate([*CONFIGS, *CONFIGS]):
        model = get_peft_model(bert(), LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                    if "lora_B" in name:
                        parameter[:, 2:] *= 1e-5
        folders.append(tmp_path / f"adapter{i}")
        model.save_pretrained(folders[-1])
        logits.append(model(inputs).logits)
    share = SHAREModel.from_adapters([str(f) for f in folders], output_dir=tmp_path / "out", device="cpu", **asked)
    trimmed = 0
    for folder, expected in zip(folders, logits, strict=True):
        share.reconstruct(folder.name, output_dir=tmp_path / "back" / folder.name)
        trimmed += "unchanged_config" in share.certified(folder.name)
        found = PeftModel.from_pretrained(bert(), tmp_path / "back" / folder.name).eval()(inputs).logits
        assert torch.norm(found - expected) <= 0.05 * torch.norm(expected)
    assert trimmed >= 4


@pytest.mark.slow
def test_nothing_but_the_adapters_and_what_is_asked_decides_the_bytes(mixed: list[str], compressed: Compress) -> None:
    digests = []
    for name, options in {
        "serial": {"executor": SerialExecutor(), "workers": 1},
        "threads": {"workers": 4, "memory": "2GiB"},
        "small": {"memory": "600MiB"},
    }.items():
        out = compressed(mixed, name, max_error=0.2, **options)
        digests.append(tree_digest(out))
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("asked", [slow({"max_error": 0.2}), {"ratio": 3}])
@pytest.mark.parametrize("step", ["appraise", "weigh", "project"])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    mixed: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], step: str
) -> None:
    from lorashare_stream.budget import allotting
    from lorashare_stream.stages import passes as stages

    whole = tree_digest(compressed(mixed, "whole", **asked))
    name = f"{'weigh' if step == 'weigh' else step}_adapter"
    home = stages if step == "project" else allotting
    real, calls = getattr(home, name), []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(home, name, broken)
    with pytest.raises(KeyboardInterrupt):
        compressed(mixed, "cut", **asked)
    monkeypatch.setattr(home, name, real)
    out = compressed(mixed, "cut", **asked)
    assert tree_digest(out) == whole


@pytest.mark.slow
def test_the_same_command_does_nothing_again_and_another_budget_reads_no_adapter_for_its_bases(
    mixed: list[str], compressed: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorashare_stream.budget import allotting

    out = compressed(mixed, max_error=0.2)
    before = tree_digest(out)

    def never(*_: Any) -> Any:
        raise AssertionError("appraised again")

    monkeypatch.setattr(allotting, "appraise_adapter", never)
    assert tree_digest(compressed(mixed, max_error=0.2)) == before
    assert tree_digest(compressed(mixed, max_error=0.3)) != before


@pytest.mark.slow
def test_adapters_are_added_within_the_limit_and_bases_fitted_again_when_bytes_run_out(
    tmp_path: Path, mixed: list[str]
) -> None:
    limit, out = 0.25, tmp_path / "errors"
    share = SHAREModel.from_adapters(mixed[:28], output_dir=out, max_error=limit, device="cpu")
    share.add_adapter(mixed[30])  # a stranger
    told = SHAREModel.from_pretrained(out).certified("stranger0")
    assert told["relative_error"] <= limit
    assert SHAREModel.from_pretrained(out).config.ours["projected"] == ["stranger0"]
    assert error_of(out, mixed[30]) <= limit

    sized = tmp_path / "bytes"
    size = int(0.25 * sum(disk_bytes(Path(f)) for f in mixed[:28]))
    share = SHAREModel.from_adapters(mixed[:28], output_dir=sized, max_bytes=size, device="cpu")
    for folder in mixed[28:]:
        share.add_adapter(folder, variance_threshold=0.001)
        assert disk_bytes(sized) <= size
    assert len(SHAREModel.from_pretrained(sized).config.ours["projected"]) < 4


@pytest.mark.slow
def test_refit_takes_a_budget_and_a_smaller_k_is_cut_only_from_plain_checkpoints(
    tmp_path: Path, mixed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    run = ["compress", *mixed, "-o", str(out), "-q", "--device", "cpu"]
    assert main([*run, "--max-error", "0.3"]) == 0
    assert main(["refit", str(out), "--max-error", "0.3", "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["method"] == "current"
    for asked, method in (("--ratio 3", "recompute"), ("-k 8 --trim-rank", "recompute"), ("-k 4", "recompute")):
        place = str(out if "ratio" in asked else other)
        arguments = ["refit", place, *asked.split(), "-o", str(other), "--overwrite", "--json", "--device", "cpu"]
        arguments += ["--workspace", str(tmp_path / "out.workspace")]
        assert main([*arguments, *(["--no-trim-rank"] if asked == "-k 4" else [])]) == 0
        assert json.loads(capsys.readouterr().out)["method"] == method
    trimmed = tmp_path / "trimmed"
    plain = ["compress", *mixed, "-o", str(trimmed), "-q", "--device", "cpu"]
    assert main([*plain, "-k", "16", "--trim-rank"]) == 0
    capsys.readouterr()
    assert main(["refit", str(trimmed), "-k", "8", "-o", str(trimmed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "sliced"
    share = SHAREModel.from_pretrained(trimmed)
    for folder in mixed[:6]:
        assert error_of(trimmed, folder) == pytest.approx(
            share.certified(Path(folder).name)["relative_error"], abs=0.01
        )


def test_more_than_one_budget_is_refused(mixed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compress", *mixed, "-o", str(tmp_path / "x"), "-k", "4", "--max-error", "0.1"])
    assert caught.value.code == 2
    for values in ({"max_bytes": 10, "ratio": 2.0}, {"max_error": 0.1, "ratio": 2.0}):
        with pytest.raises(UsageError, match="budget"):
            Settings.from_mapping(values)
    for values in ({"max_error": 0.0}, {"max_error": 1.0}, {"ratio": 0.5}, {"max_bytes": 0}, {"ratio": float("nan")}):
        with pytest.raises(UsageError):
            Settings.from_mapping(values)
    for values in ({"max_error": 0.1}, {"trim_rank": True}):
        with pytest.raises(UsageError, match="delta"):
            Settings.from_mapping({"objective": "factors", **values})
    config = tmp_path / "config.yaml"
    config.write_text("num_components: 8\nmax_error: 0.2\n")
    assert main(["plan", *mixed, "--config", str(config)]) == 2
    assert "twice" in capsys.readouterr().err
    config.write_text("num_components: 8\n")
    assert main(["plan", *mixed, "--config", str(config), "--max-error", "0.2", "--json"]) == 0


def test_zero_adapters_heads_and_single_modules_are_kept_under_a_budget(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "adapters", 8)
    rng = np.random.default_rng(1)
    zero = make_tensors(rng, MODULES)
    zero = {key: np.zeros_like(t) if "lora_B" in key else t for key, t in zero.items()}
    folders.append(str(write_adapter(tmp_path / "adapters" / "zero", zero, r=4, lora_alpha=8)))
    few = make_tensors(rng, {**MODULES, "layers.9.odd": (30, 20)})
    folders.append(str(write_adapter(tmp_path / "adapters" / "few", few, r=4, lora_alpha=8)))
    for name, asked in {"error": {"max_error": 0.1}, "bytes": {"ratio": 1.2}}.items():
        out = compressed(folders, name, **asked)
        share = SHAREModel.from_pretrained(out)
        assert "zero" in share.config.ours["verbatim_adapters"]
        head = "base_model.model.head.weight"
        assert np.array_equal(load_tensors(folders[0])[head], share.reconstruct("a00")[head])
        assert factor_keys("layers.9.odd")[0] in share.reconstruct("few")
        assert [v.problem for v in verify(share, originals_of(share, resolve(folders)))] == [None] * 10
        lorashare.SHAREModel.from_pretrained(out).reconstruct("few")


@pytest.mark.parametrize("asked", [{"ratio": 3}, {"max_error": 0.2}])
def test_the_page_shows_what_was_weighed_for_a_budget(
    mixed: list[str], compressed: Compress, asked: dict[str, Any]
) -> None:
    out = compressed(mixed, **asked)
    points = SHAREModel.from_pretrained(out).config.ours["weighed"]
    assert points == sorted(points)
    assert [error for _, error in points] == sorted((error for _, error in points), reverse=True)
    told = page(findings_of(Folder(out)))
    assert "Error against bytes" in told
    assert "what was weighed beside what is stored" in told


def few_of(root: Path, n: int = 6) -> list[str]:
    rng = np.random.default_rng(5)
    return [str(write_adapter(root / f"a{i}", make_tensors(rng, WIDE), r=4, lora_alpha=8)) for i in range(n)]


def test_where_all_components_are_there_trimming_loses_nothing(tmp_path: Path, compressed: Compress) -> None:
    folders = few_of(tmp_path / "few", 3)
    folders.append(str(write_adapter(tmp_path / "few" / "same", load_tensors(folders[0]), r=4, lora_alpha=8)))
    out = compressed(folders, num_components=64, trim_rank=True)  # the last eigenvalue is 0, and so is the price
    assert max(error_of(out, f) for f in folders) < 1e-5


def test_stacked_experts_under_a_limit_are_certified_as_they_are(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    folders = []
    for i in range(8):
        tensors = make_tensors(rng, {"l.0.q": (40, 24)}, r=2)
        a, b = rng.standard_normal((3, 2, 40)), rng.standard_normal((30, 2, 3))
        a[0] *= 30
        for key, array in zip(factor_keys("l.0.mlp.experts"), (a.reshape(6, 40), b.reshape(30, 6)), strict=True):
            tensors[key] = array.astype(np.float32)
        config = {"r": 2, "lora_alpha": 4, "target_parameters": ["mlp.experts.gate"]}
        folders.append(str(write_adapter(tmp_path / "moe" / f"a{i}", tensors, **config)))
    for limit in (0.3, 0.02):
        share = SHAREModel.from_pretrained(compressed(folders, f"e{limit}", max_error=limit))
        for folder in folders:
            told, original = share.certified(Path(folder).name), load_tensors(folder)
            a, b = (original[key].astype(np.float64) for key in factor_keys("l.0.mlp.experts"))
            dense = sum(np.sum((2 * b[:, e::3] @ a[2 * e : 2 * e + 2]) ** 2) for e in range(3))
            dense += np.sum(delta_of(original, "l.0.q") ** 2)
            assert told["delta_norm"] == pytest.approx(np.sqrt(dense), rel=1e-6)
            assert told["relative_error"] <= limit
        assert [v.problem for v in verify(share, originals_of(share, resolve(folders)))] == [None] * 8


@pytest.mark.parametrize("scale", [1e-21, 1e11])
def test_the_scale_of_weights_decides_nothing(tmp_path: Path, compressed: Compress, scale: float) -> None:
    sizes = []
    for name, factor in (("plain", 1.0), ("scaled", scale)):
        folders = []
        for folder in few_of(tmp_path / name, 8):
            tensors = {key: t * np.float32(factor) for key, t in load_tensors(folder).items()}
            folders.append(str(write_adapter(Path(folder), tensors, r=4, lora_alpha=8)))
        with np.errstate(all="raise", under="ignore"):
            sizes.append(
                disk_bytes(compressed(folders, f"{name}-out", max_error=0.2, workers=1, executor=SerialExecutor()))
            )
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_damaged_cores_are_made_again(tmp_path: Path, compressed: Compress, damage: str) -> None:
    folders = few_of(tmp_path / "few", 8)
    whole = tree_digest(compressed(folders, "whole", max_error=0.3))
    out = compressed(folders, max_error=0.2)
    core = min((tmp_path / "out.workspace" / "cores").rglob("*.safetensors"))
    data = core.read_bytes()
    changed = {"cut": data[: len(data) // 2], "flipped": data[:-1] + bytes([data[-1] ^ 64]), "empty": b""}
    core.unlink() if damage == "gone" else core.write_bytes(changed[damage])
    assert compressed(folders, max_error=0.3) == out
    assert tree_digest(out) == whole


def test_verify_compares_lora_that_is_kept_verbatim_byte_for_byte(tmp_path: Path, compressed: Compress) -> None:
    folders = few_of(tmp_path / "few")
    halves = {key: np.random.default_rng(1).standard_normal(t.shape) for key, t in load_tensors(folders[0]).items()}
    write_adapter(Path(folders[0]), {key: t.astype(np.float16) for key, t in halves.items()}, r=4, lora_alpha=8)
    out = compressed(folders, max_error=1e-2)
    assert len(SHAREModel.from_pretrained(out).certified("a0")["verbatim"]) == 8
    kept = out / "adapters" / "a0" / "classifier_head.safetensors"
    data = bytearray(kept.read_bytes())
    data[-2] ^= 1  # the last bit of a number
    kept.write_bytes(bytes(data))
    share = SHAREModel.from_pretrained(out)
    problems = [v.problem for v in verify(share, originals_of(share, resolve(folders)))]
    assert "differs from the original" in str(problems[0])
    assert problems[1:] == [None] * 5


def test_what_is_verbatim_by_a_budget_is_in_the_bases_all_the_same(tmp_path: Path, compressed: Compress) -> None:
    from lorashare_stream.edits.options import RunOptions
    from lorashare_stream.edits.remove import remove

    rng = np.random.default_rng(3)
    folders = few_of(tmp_path / "few", 24)
    odd = {}
    for key, t in make_tensors(rng, WIDE).items():  # in float16, its own factors would be no smaller
        odd[key] = rng.standard_normal(t.shape).astype(np.float16)
    folders.append(str(write_adapter(tmp_path / "few" / "odd", odd, r=4, lora_alpha=8)))
    out = compressed(folders, max_error=0.1)
    share = SHAREModel.from_pretrained(out)
    before = {group: facts["n"] for group, facts in share.config.ours["groups"].items()}
    assert before
    assert share.config.ours["verbatim_adapters"] == ["odd"]
    gone = remove(out, ["odd", "a3"], RunOptions())
    assert set(gone.names) == {"odd", "a3"}
    ours = SHAREModel.from_pretrained(out).config.ours
    assert ours["removed"] == ["a3", "odd"]
    assert {group: facts["n"] for group, facts in ours["groups"].items()} == {g: n - 8 for g, n in before.items()}


def test_a_cut_leaves_an_adapter_without_any_dw_kept_exact(tmp_path: Path, compressed: Compress) -> None:
    folders = few_of(tmp_path / "few")
    zero = {key: 0 * t if "lora_B" in key else t for key, t in load_tensors(folders[0]).items()}
    folders.append(str(write_adapter(tmp_path / "few" / "zero", zero, r=4, lora_alpha=8)))
    out = compressed(folders, num_components=8)
    assert main(["refit", str(out), "-k", "4", "-o", str(tmp_path / "cut")]) == 0
    for place in (out, tmp_path / "cut"):
        ours = SHAREModel.from_pretrained(place).config.ours
        assert ours["verbatim_adapters"] == ["zero"]
        assert ours["errors"]["adapters"] == 6


def test_a_ratio_that_cannot_be_had_is_never_answered_by_one_that_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tiny = {"q": (6, 5)}
    folders = [str(write_adapter(tmp_path / f"a{i}", make_tensors(rng, tiny), r=4, lora_alpha=8)) for i in range(4)]
    with pytest.raises(BudgetError, match="--max-bytes") as caught:  # metadata alone are more than the originals
        SHAREModel.from_adapters(folders, output_dir=tmp_path / "out", ratio=3, device="cpu")
    asked = int(str(caught.value).partition("--max-bytes ")[2].split()[0])
    SHAREModel.from_adapters(folders, output_dir=tmp_path / "out", max_bytes=asked, device="cpu")
    assert disk_bytes(tmp_path / "out") <= asked


@pytest.mark.slow
def test_discarded_moments_take_the_cores_with_them(mixed: list[str], compressed: Compress, tmp_path: Path) -> None:
    kept = tree_digest(compressed(mixed, "kept", max_error=0.3))
    assert list((tmp_path / "kept.workspace" / "cores").iterdir())
    assert tree_digest(compressed(mixed, max_error=0.3, discard_moments=True)) == kept
    assert not list((tmp_path / "out.workspace" / "cores").iterdir())


def test_the_card_says_what_was_asked_for_and_explains_no_variance_where_nothing_is_shared(
    tmp_path: Path, compressed: Compress
) -> None:
    out = compressed(few_of(tmp_path / "few"), max_error=0.05)
    config = SHAREModel.from_pretrained(out).config
    told = card(config, [], "org/name")
    assert "at most 0.05 of every adapter" in told
    assert "as many as explain" not in told
    assert ("factors of its own" in told) == (config.ours["kept_bytes"] > 0)
    assert ("explained variance" in told) == bool(config.layer_keys)
