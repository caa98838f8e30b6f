"""What is computed, against float64: captured energy, explained variance, errors, the published method."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lorashare_stream.model import SHAREModel

from .conftest import MODULES, load_tensors, make_collection, make_tensors, write_adapter
from .oracle import delta, groups, largest_angle, published, share_config, stacked, vectors

Compress = Callable[..., Path]
WIDE = {"q": (96, 64), "v": (48, 96)}


def as_float64(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {k: v.double().numpy() for k, v in tensors.items()}


@pytest.mark.few(4)
@pytest.mark.parametrize("objective", ["delta", "factors"])
@pytest.mark.parametrize("n", [6, 60])  # total rank 24 and 240: below and above every d of WIDE
@pytest.mark.parametrize("k", [1, 5, 48])
def test_captured_energy_is_the_optimum(tmp_path: Path, compressed: Compress, objective: str, n: int, k: int) -> None:
    folders = make_collection(tmp_path / "adapters", n, WIDE)
    out = compressed(folders, num_components=k, objective=objective)
    adapters, share = [load_tensors(f) for f in folders], SHAREModel.from_pretrained(out)
    for module, side in groups(adapters):
        x = stacked(adapters, [2.0] * n, module, side, objective)
        v = share.components[f"{module}:{side}"].double().numpy()
        best = np.linalg.svd(x, compute_uv=False) ** 2
        assert v.shape == (x.shape[0], min(k, *x.shape))
        captured = np.sum((v.T @ x) ** 2)
        assert captured >= (1 - 1e-6) * best[: v.shape[1]].sum()
        assert np.abs(v.T @ v - np.eye(v.shape[1])).max() <= 1e-5


@pytest.mark.few(3)
@pytest.mark.parametrize("objective", ["delta", "factors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_reported_is_what_the_stored_files_give(
    tmp_path: Path, compressed: Compress, objective: str, dtype: str
) -> None:
    folders = make_collection(tmp_path / "adapters", 20, WIDE)
    out = compressed(folders, num_components=6, objective=objective, dtype=dtype)
    adapters, share = [load_tensors(f) for f in folders], SHAREModel.from_pretrained(out)
    assert all(v.dtype == getattr(torch, dtype) for v in share.components.values())

    reported = share.config.compression_stats["per_layer_explained_variance"]
    for module, side in groups(adapters):
        x = stacked(adapters, [2.0] * 20, module, side, objective)
        v = share.components[f"{module}:{side}"].double().numpy()
        explained = 1 - np.sum((x - v @ (v.T @ x)) ** 2) / np.sum(x**2)
        assert reported[f"{module}:{side}"] == pytest.approx(explained, abs=1e-4)

    errors = []
    for name, original in zip(share.adapter_names, adapters, strict=True):
        found = as_float64(share.reconstruct(name))
        pairs = {m: (delta(original, m, 2.0), delta(found, m, 2.0)) for m in WIDE}
        total = np.sqrt(
            sum(np.sum((d - f) ** 2) for d, f in pairs.values()) / sum(np.sum(d**2) for d, _ in pairs.values())
        )
        certified = share.certified(name)
        assert certified["relative_error"] == pytest.approx(total, abs=1e-4)
        by_module = {m: np.linalg.norm(d - f) / np.linalg.norm(d) for m, (d, f) in pairs.items()}
        assert certified["worst_module"] == max(by_module, key=by_module.__getitem__)
        assert certified["worst_module_error"] == pytest.approx(max(by_module.values()), abs=1e-4)
        given = share.reconstruction_error(name, original_path=folders[share.adapter_names.index(name)])
        assert given["delta_relative"] == pytest.approx(total, abs=1e-4)
        assert given["delta_per_module"] == pytest.approx(by_module, abs=1e-4)
        errors.append(total)
    summary = share.config.ours["errors"]
    assert summary["mean"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert summary["max"] == pytest.approx(max(errors), abs=1e-4)
    if objective == "delta":
        low, high = summary["mean_square_bounds"]
        assert low - 1e-4 <= np.mean(np.square(errors)) <= high + 1e-4


def test_delta_is_nearer_in_dw_than_factors_where_strengths_differ(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    folders = []
    for i in range(30):
        tensors = {
            k: v * (100 if i == 0 and "lora_B" in k else 1) for k, v in make_tensors(rng, WIDE, latent=24).items()
        }
        folders.append(str(write_adapter(tmp_path / f"a{i}", tensors)))
    mean = {
        objective: share_config(compressed(folders, objective, num_components=8, objective=objective))[
            "compression_stats"
        ]["lorashare_stream"]["errors"]["mean"]
        for objective in ("delta", "factors")
    }
    assert mean["delta"] < 0.9 * mean["factors"]


@pytest.mark.parametrize("n", [6, 60])
def test_centred_factors_are_the_published_method(tmp_path: Path, compressed: Compress, n: int) -> None:
    folders = make_collection(tmp_path / "adapters", n, WIDE)
    out = compressed(folders, num_components=6, objective="factors", center=True)
    share = SHAREModel.from_pretrained(out)
    components, loadings, restored = published({Path(f).name: load_tensors(f) for f in folders}, k=6)
    for group, expected in components.items():
        v = share.components[group].double().numpy()
        assert largest_angle(v, expected) < 1e-4
        signs = np.sign(np.sum(v * expected, axis=0))
        assert np.allclose(v * signs, expected, atol=1e-4)
        for name in share.adapter_names:
            found = share.all_loadings[name][group].double().numpy() * signs[:, None]
            assert np.linalg.norm(found - loadings[name][group]) < 1e-4 * np.linalg.norm(loadings[name][group])
    for name, tensors in restored.items():
        found = as_float64(share.reconstruct(name))
        for key, expected in tensors.items():
            assert np.linalg.norm(found[key] - expected) < 1e-4 * np.linalg.norm(expected)


def test_centred_factors_are_what_lorashare_computes_where_there_is_an_eigengap(
    tmp_path: Path, compressed: Compress
) -> None:
    import lorashare

    folders = make_collection(tmp_path / "adapters", 30, WIDE)  # six planted directions over a weak tail
    ours = SHAREModel.from_pretrained(compressed(folders, num_components=6, objective="factors", center=True))
    theirs = lorashare.SHAREModel.from_adapters(folders, num_components=6, device="cpu")
    for group, v in theirs.components.items():
        assert largest_angle(ours.components[group].double().numpy(), v.double().numpy()) < 1e-3
    for name in theirs.adapter_names:
        a, b = ours.reconstruct(name), theirs.reconstruct(name)
        assert a.keys() == b.keys()
        assert all(torch.norm(a[k] - b[k]) < 1e-3 * torch.norm(b[k]) for k in a)


def test_a_shared_initialisation_is_lost_by_centring_and_kept_without(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    first = make_tensors(rng, {"q": (96, 64)}, r=8)["base_model.model.q.lora_A.weight"]
    folders = []
    for i in range(50):
        tensors = make_tensors(rng, {"q": (96, 64)}, r=8)
        drift = 0.01 * np.linalg.norm(first) * rng.standard_normal(first.shape) / np.sqrt(first.size)
        tensors["base_model.model.q.lora_A.weight"] = (first + drift).astype(np.float32)
        folders.append(str(write_adapter(tmp_path / f"a{i:02}", tensors, r=8)))

    def error(name: str, **options: Any) -> float:
        share = SHAREModel.from_pretrained(compressed(folders, name, num_components=8, objective="factors", **options))
        return float(np.mean([share.reconstruction_error(f.split("/")[-1], original_path=f)["per_layer"][
            "base_model.model.q.lora_A.weight"] for f in folders]))  # fmt: skip

    assert error("uncentred") < 0.02
    assert error("centred", center=True) > 5 * error("again")


def test_auto_reaches_the_threshold_in_every_group_with_its_own_k(tmp_path: Path, compressed: Compress) -> None:
    folders = make_collection(tmp_path / "adapters", 30, WIDE)
    out = compressed(folders, num_components="auto", variance_threshold=0.9)
    config = share_config(out)
    facts = config["compression_stats"]["lorashare_stream"]["groups"]
    adapters = [load_tensors(f) for f in folders]
    for (module, side), objective in itertools.product(groups(adapters), ["delta"]):
        share = np.cumsum(np.linalg.svd(stacked(adapters, [2.0] * 30, module, side, objective), compute_uv=False) ** 2)
        share /= share[-1]
        k = facts[f"{module}:{side}"]["k"]
        assert share[k - 1] >= 0.9 - 1e-6
        assert k == 1 or share[k - 2] < 0.9 + 1e-6
    assert config["num_components"] == max(f["k"] for f in facts.values())
    assert config["component_selection"] == "auto"


def test_adapters_may_differ_in_rank_modules_dtype_and_heads(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    folders = []
    for i, (r, names, dtype) in enumerate(
        [(2, "qv", torch.float32), (8, "q", torch.bfloat16), (1, "v", torch.float16), (4, "qv", torch.float32)]
    ):
        tensors = {
            k: torch.from_numpy(v).to(dtype) for k, v in make_tensors(rng, {m: WIDE[m] for m in names}, r).items()
        }
        tensors[f"base_model.model.head{i % 2}.weight"] = torch.randn(i + 1, 3)
        folder = write_adapter(tmp_path / f"a{i}", {}, r=r)
        save_file(tensors, folder / "adapter_model.safetensors")
        folders.append(str(folder))
    share = SHAREModel.from_pretrained(compressed(folders, num_components=100))  # full rank: lossless up to rounding
    facts = share.config.ours["groups"]
    assert (facts["q:A"]["n"], facts["v:B"]["n"]) == (2 + 8 + 4, 2 + 1 + 4)
    for folder, name in zip(folders, share.adapter_names, strict=True):
        original = save_and_load(folder)
        found = share.reconstruct(name)
        assert found.keys() == original.keys()
        for key, tensor in original.items():
            assert found[key].shape == tensor.shape
            assert torch.norm(found[key].float() - tensor.float()) <= 1e-5 * torch.norm(tensor.float())


def save_and_load(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter_model.safetensors")


def test_an_adapter_whose_dw_vanishes_is_exact_named_and_without_influence(
    tmp_path: Path, compressed: Compress
) -> None:
    folders = make_collection(tmp_path / "adapters", 6)
    without = compressed(folders, "without", num_components=4)
    zero = {k: np.zeros_like(v) if "lora_B" in k else v for k, v in load_tensors(folders[0]).items()}
    folders.append(str(write_adapter(tmp_path / "adapters" / "zero", zero)))
    share = SHAREModel.from_pretrained(compressed(folders, "with", num_components=4))
    assert share.config.ours["verbatim_adapters"] == ["zero"]
    assert share.certified("zero")["relative_error"] == 0.0
    assert "kept exact, since dW is 0 and tells nothing of lora_A and lora_B" in share.certified("zero")["notes"]
    found = share.reconstruct("zero")
    assert found.keys() == zero.keys()
    assert all(np.array_equal(v.numpy(), zero[k]) for k, v in found.items())
    plain = SHAREModel.from_pretrained(without)
    assert all(torch.equal(share.components[g], plain.components[g]) for g in plain.components)


def test_groups_of_one_adapter_are_lossless(tmp_path: Path, compressed: Compress) -> None:
    rng = np.random.default_rng(0)
    folders = [
        str(write_adapter(tmp_path / name, make_tensors(rng, {name: (40, 24)})))
        for name in ("layers.0.q", "layers.0.v")
    ]
    share = SHAREModel.from_pretrained(compressed(folders, num_components=32))
    assert {f["k"] for f in share.config.ours["groups"].values()} == {4}
    assert share.config.ours["errors"]["max"] < 1e-6


def test_vectors_are_oriented_by_side_not_by_shape(tmp_path: Path, compressed: Compress) -> None:
    """Square factors, and ranks above d, which lorashare orients by shape and so mixes up."""
    folders = make_collection(tmp_path / "adapters", 3, {"square": (4, 4), "flat": (3, 2)}, r=4)
    share = SHAREModel.from_pretrained(compressed(folders, num_components=4))
    for folder, name in zip(folders, share.adapter_names, strict=True):
        original, found = load_tensors(folder), share.reconstruct(name)
        for key in original:
            assert np.allclose(found[key].numpy(), original[key], atol=1e-5)
    assert vectors(load_tensors(folders[0]), "flat", "A").shape == (3, 4)
    assert MODULES


def test_each_module_is_weighted_by_its_own_scale(tmp_path: Path, compressed: Compress) -> None:
    """alpha, rsLoRA, alpha_pattern and rank_pattern, as PEFT multiplies by them."""
    ranks = {"layers.0.q": 4, "layers.0.v": 2, "layers.1.q": 4}
    configs: list[dict[str, Any]] = [
        {"lora_alpha": 4},
        {"lora_alpha": 64, "use_rslora": True},
        {"alpha_pattern": {"layers.0.q": 100, "v": 1}},
        {"alpha_pattern": {r"layers\.1\..*": 0.5}, "use_rslora": True},
    ]
    rng, folders, scales = np.random.default_rng(3), [], []
    for i in range(12):
        tensors: dict[str, np.ndarray] = {}
        for module, rank in ranks.items():
            tensors |= make_tensors(rng, {module: MODULES[module]}, rank)
        config = {"r": 4, "rank_pattern": {"v": 2}} | configs[i % 4]
        folders.append(str(write_adapter(tmp_path / "in" / f"a{i:02}", tensors, **config)))
        scales.append(
            [
                lambda m: 4 / ranks[m],
                lambda m: 64 / ranks[m] ** 0.5,
                lambda m: {"layers.0.q": 100 / 4, "layers.0.v": 1 / 2}.get(m, 8 / 4),
                lambda m: (0.5 if m == "layers.1.q" else 8) / ranks[m] ** 0.5,
            ][i % 4]
        )
    share = SHAREModel.from_pretrained(compressed(folders, num_components=5, moment_dtype="float64"))
    adapters = [load_tensors(f) for f in folders]
    plain = [2.0] * len(folders)
    for module, side in groups(adapters):
        x = stacked(adapters, scales, module, side, "delta")
        best = np.linalg.svd(x)[0][:, :5]
        v = share.components[f"{module}:{side}"].double().numpy()
        assert largest_angle(v, best) < 1e-4
        unscaled = np.linalg.svd(stacked(adapters, plain, module, side, "delta"))[0][:, :5]
        assert largest_angle(v, unscaled) > 1e-2  # the scales do matter
    for name, tensors, scale in zip(share.adapter_names, adapters, scales, strict=True):
        norm = np.sqrt(sum(np.sum(delta(tensors, m, scale(m)) ** 2) for m in ranks))
        assert share.certified(name)["delta_norm"] == pytest.approx(norm, rel=1e-5)
