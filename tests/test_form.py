"""What is stored of an adapter's modules, and the errors of that, by the bases that they are projected on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lorashare_stream.adapters.keys import SIDES, Side, group_id
from lorashare_stream.adapters.safetensors import write_arrays
from lorashare_stream.adapters.scaling import Scaling
from lorashare_stream.errors import AdapterError
from lorashare_stream.linalg.delta import delta_errors
from lorashare_stream.stages.components import Components, Part, Stack, projected, projection_errors, restored

D, R = 90, 4
Factors = dict[str, np.ndarray]


@pytest.fixture
def factors() -> Factors:
    rng = np.random.default_rng(0)
    return {
        "A": rng.standard_normal((3, R, D)).astype(np.float32), "B": rng.standard_normal((3, D, R)).astype(np.float32),
    }  # fmt: skip


def bases(folder: Path, ks: dict[str, int], stretch: float = 1.0) -> Components:
    """Random bases of modules with these k, stretched."""
    rng = np.random.default_rng(1)
    arrays = {
        group_id(m, side): np.ascontiguousarray(stretch * np.linalg.qr(rng.standard_normal((D, k)))[0], np.float32)
        for m, k in ks.items()
        for side in SIDES
    }
    path = folder / "components.safetensors"
    with path.open("wb") as f:
        write_arrays(f, arrays, "F32")
    return Components(path, 1 << 30, "cpu")


@pytest.mark.parametrize(("stretch", "forms"), [(1.0, False), (1 + 1e-4, True)])
def test_what_comes_back_is_formed_only_where_bases_are_not_orthonormal(
    tmp_path: Path, factors: Factors, stretch: float, forms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = bases(tmp_path, {"q": 8, "k": 20, "v": 8}, stretch)  # two parts: k differs
    scalings = [Scaling(2.0)] * 3
    on = {s: projected(components, [group_id(m, s) for m in "qkv"], factors[s], s, "F32") for s in SIDES}
    hats = {s: restored(components, on[s], factors[s], s, "F32") for s in SIDES}
    exact = delta_errors(factors["A"], factors["B"], hats["A"], hats["B"], scalings)
    formed: list[str] = []

    def watched(components: Components, parts: Sequence[Part], stack: Stack, side: Side, storage: str) -> Stack:
        formed.append(side)
        return restored(components, parts, stack, side, storage)

    monkeypatch.setattr("lorashare_stream.stages.components.restored", watched)
    found = projection_errors(components, factors, on, scalings, "F32")
    assert formed == (list(SIDES) if forms else [])
    for f, e in zip(found, exact, strict=True):
        assert f.error == pytest.approx(e.error, rel=1e-5)
        assert f.norm == pytest.approx(e.norm, rel=1e-6)
    if forms:
        assert found == exact


def test_only_modules_that_come_near_are_looked_at_closely(tmp_path: Path, factors: Factors) -> None:
    components = bases(tmp_path, dict.fromkeys("qkv", 8))
    for side in SIDES:  # q lies on its bases
        v = components[group_id("q", side)]
        vectors = v @ np.random.default_rng(2).standard_normal((8, R)).astype(np.float32)
        factors[side][0] = vectors.T if side == "A" else vectors
    scalings = [Scaling(1.0)] * 3
    on = {s: projected(components, [group_id(m, s) for m in "qkv"], factors[s], s, "F32") for s in SIDES}
    hats = {s: restored(components, on[s], factors[s], s, "F32") for s in SIDES}
    exact = delta_errors(factors["A"], factors["B"], hats["A"], hats["B"], scalings)
    found = projection_errors(components, factors, on, scalings, "F32")
    assert found[0] == exact[0]
    assert found[0].relative < 1e-6
    assert found[1:] != exact[1:]
    assert [f.error for f in found[1:]] == pytest.approx([e.error for e in exact[1:]], rel=1e-5)


def test_values_beyond_the_range_of_float32_are_refused(tmp_path: Path, factors: Factors) -> None:
    components = bases(tmp_path, dict.fromkeys("qkv", 8))
    factors["B"][1] = 3e38
    with np.errstate(over="ignore", invalid="ignore"):
        on = {s: projected(components, [group_id(m, s) for m in "qkv"], factors[s], s, "F32") for s in SIDES}
        with pytest.raises(AdapterError, match="range of F32") as caught:
            projection_errors(components, factors, on, [Scaling(1.0)] * 3, "F32")
    assert caught.value.key == "k:B"
