"""The torch path computes what the NumPy path computes; on a GPU where there is one, on the CPU anyhow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lorashare_stream.errors import UsageError
from lorashare_stream.linalg.basis import fit
from lorashare_stream.linalg.device import TorchSum, held_on, product, resolve_device, solver_on, torch_leading
from lorashare_stream.linalg.moments import Accumulator, HostSum, Moment, empty, of_columns
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.settings import Settings

from .oracle import share_config
from .test_moments import second_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("earlier", ["nothing", "columns", "second"])
def test_sums_on_a_torch_device(device: str, dtype: str, earlier: str) -> None:
    x, y = (np.random.default_rng(seed).standard_normal((n, 24)).astype(dtype) for seed, n in ((0, 20), (1, 300)))
    whole = of_columns(x)
    begun = Moment(np.asfortranarray(second_of(whole)), None, whole.sum, whole.count, whole.energy)
    starts = {"nothing": empty(24, dtype), "columns": whole, "second": begun}
    start = starts[earlier]
    acc = Accumulator(start, TorchSum(start, device), 64)
    acc.add(y)
    found = acc.finish()
    rows = y if earlier == "nothing" else np.concatenate([x, y])
    expected = rows.astype(np.float64).T @ rows
    assert np.allclose(second_of(found), expected, rtol=1e-4, atol=1e-5 * found.energy)
    assert second_of(found).flags.f_contiguous
    assert found.energy == pytest.approx(np.trace(expected))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(20, 1), (20, 20), (400, 1), (400, 8), (400, 64)])
def test_bases_from_a_torch_device(device: str, n: int, k: int) -> None:
    x = np.random.default_rng(0).standard_normal((n, 64)) * (1.0 + np.arange(64)) ** -1.0
    whole = of_columns(x.astype(np.float32))
    start = empty(64)
    acc = Accumulator(start, HostSum(start))
    acc.add(x.astype(np.float32))
    moment = whole if n <= 64 else acc.finish()
    check_basis(device, moment, x, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(700, 4), (900, 4), (900, 200), (1400, 4), (1400, 200)])
def test_large_bases_from_a_torch_device(device: str, n: int, k: int) -> None:
    """Block Krylov and LAPACK's like, for columns and for second moments."""
    d = 650
    x = (np.random.default_rng(0).standard_normal((n, d)) * (1.0 + np.arange(d)) ** -1.0).astype(np.float32)
    start = empty(d)
    acc = Accumulator(start, TorchSum(start, device))
    acc.add(x)
    check_basis(device, of_columns(x) if n <= 2 * d else acc.finish(), x, k)


def check_basis(device: str, moment: Moment, x: np.ndarray, k: int) -> None:
    basis = fit(moment, k, solver=lambda m, j: torch_leading(m, j, device))
    v = basis.components.astype(np.float64)
    best = (np.linalg.svd(x, compute_uv=False) ** 2)[:k].sum()
    assert np.sum((x @ v) ** 2) >= (1 - 1e-6) * best
    assert np.abs(v.T @ v - np.eye(k)).max() <= 1e-5


def test_what_device_there_is() -> None:
    assert resolve_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("auto") == resolve_device("cuda") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UsageError, match="torch sees no GPU"):
            resolve_device("cuda")
    assert solver_on("cpu")(of_columns(np.eye(3)), 1)[1].shape == (3, 1)


def test_the_pipeline_on_a_torch_device(tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own CPU device stands in for the GPU, so that sums, fits and projections run everywhere."""
    device = "cuda" if torch.cuda.is_available() else "cpu:0"
    plan = plan_for(resolve(collection), Settings(num_components=4, device="cpu"))
    compress(plan, tmp_path / "host")
    for module in ("pipeline", "stages.job"):
        monkeypatch.setattr(f"lorashare_stream.{module}.resolve_device", lambda asked: device)
    compress(plan, tmp_path / "torch")
    facts = [share_config(tmp_path / n)["compression_stats"]["per_layer_explained_variance"] for n in ("host", "torch")]
    assert facts[0] == pytest.approx(facts[1], abs=1e-6)
    errors = [
        json.loads((tmp_path / n / "adapters" / "a00" / "adapter_meta.json").read_text())["lorashare_stream"]
        for n in ("host", "torch")
    ]
    assert errors[0]["relative_error"] == pytest.approx(errors[1]["relative_error"], rel=1e-4)


def test_products_on_a_torch_device() -> None:
    rng = np.random.default_rng(0)
    v, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 20, 4), (3, 20, 2)))
    for device in ("cpu", "cuda:0" if torch.cuda.is_available() else "cpu:0"):
        assert np.allclose(product(held_on(device, v).mT, w), v.mT @ w, atol=1e-5)
