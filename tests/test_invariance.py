"""What may not change a byte, and what may change captured energy by less than 1e-6."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashare_stream.linalg.basis import fit
from lorashare_stream.linalg.moments import Accumulator, HostSum, empty
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.runtime.executors import SerialExecutor
from lorashare_stream.settings import Settings

from .conftest import load_tensors, make_collection, tree_digest
from .oracle import groups, stacked

Compress = Callable[..., Path]
MODULES = {"q": (96, 64), "v": (48, 96)}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Total rank above every d: both statistics occur, since k modules differ in d."""
    return make_collection(tmp_path_factory.mktemp("many"), 20, MODULES)


def run(root: Path, sources: object, executor: Executor | None = None, **options: object) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    plan = plan_for(resolve(sources), Settings.from_mapping({"device": "cpu", "num_components": 5} | options))
    compress(plan, root / "out", executor=executor)
    return root / "out"


@given(
    st.integers(1, 5),
    st.sampled_from(["512MiB", "600MiB", "8GiB"]),
    st.sampled_from([SerialExecutor(), ThreadPoolExecutor(3)]),
)
@settings(max_examples=12)
def test_memory_workers_and_executor_change_no_byte(
    many: list[str], tmp_path_factory: pytest.TempPathFactory, workers: int, memory: str, executor: Executor
) -> None:
    root = tmp_path_factory.getbasetemp() / "bytes"
    reference = tmp_path_factory.getbasetemp() / "reference"
    if not (reference / "out").exists():
        run(reference, many)
    assert tree_digest(run(root, many, executor, workers=workers, memory=memory)) == tree_digest(reference / "out")


@given(st.randoms(use_true_random=False), st.sampled_from(["delta", "factors"]))
@settings(max_examples=8)
def test_the_order_of_adapters_changes_energy_by_less_than_1e_6(
    many: list[str], tmp_path_factory: pytest.TempPathFactory, rnd: random.Random, objective: str
) -> None:
    shuffled = list(many)
    rnd.shuffle(shuffled)
    share = SHAREModel.from_pretrained(run(tmp_path_factory.getbasetemp() / "order", shuffled, objective=objective))
    adapters = [load_tensors(f) for f in many]
    for module, side in groups(adapters):
        x = stacked(adapters, [2.0] * len(adapters), module, side, objective)
        v = share.components[f"{module}:{side}"].double().numpy()
        best = (np.linalg.svd(x, compute_uv=False) ** 2)[: v.shape[1]].sum()
        assert abs(np.sum((v.T @ x) ** 2) - best) <= 1e-6 * best


@given(st.integers(1, 400), st.integers(0, 100))
@settings(max_examples=40)
def test_the_quantum_changes_energy_by_less_than_1e_6(quantum: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((300, 48)) * (1.0 + np.arange(48)) ** -1.0
    start = empty(48, "float32")
    acc = Accumulator(start, HostSum(start), quantum)
    acc.add(rows.astype(np.float32))
    v = fit(acc.finish(), 6).components.astype(np.float64)
    best = (np.linalg.svd(rows, compute_uv=False) ** 2)[:6].sum()
    assert np.sum((rows @ v) ** 2) >= (1 - 1e-6) * best


def test_names_do_not_depend_on_the_order_of_the_sources(tmp_path: Path) -> None:
    make_collection(tmp_path / "x", 2)
    make_collection(tmp_path / "y", 3)
    found = [
        {e.source_id: e.name for e in plan_for(resolve(order), Settings()).adapters}
        for order in ([tmp_path / "x", tmp_path / "y"], [tmp_path / "y", tmp_path / "x"])
    ]
    assert found[0] == found[1]
    assert len(set(found[0].values())) == 5
    assert "a02" in found[0].values()  # no clash, no suffix
