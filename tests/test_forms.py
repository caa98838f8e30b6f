"""Forms: what they cost and lose, and which is taken, against dense matrices and all that could be chosen."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lorashare_stream.adapters.config import reranked, scalings
from lorashare_stream.adapters.scaling import Scaling
from lorashare_stream.budget.allotment import largest_within, smallest_with
from lorashare_stream.budget.forms import (
    Kept,
    Options,
    at_price,
    core_values,
    options,
    padded,
    pattern_bytes,
    reduced,
    within,
    without_own,
)
from lorashare_stream.budget.offers import Candidates, Spectra, Weighed, candidates_of, uniform_bytes
from lorashare_stream.linalg.delta import gram

SEEDS = st.integers(0, 2**32 - 1)


def module(rng: np.random.Generator, d_in: int, d_out: int, r: int) -> tuple[np.ndarray, np.ndarray]:
    decay = 0.5 ** np.arange(r)
    return rng.standard_normal((r, d_in)) * decay[:, None], rng.standard_normal((d_out, r))


def kept(ranks: list[int], dims: list[int], plain: list[bool] | None = None) -> Kept:
    names = [f"layers.{i}.q" for i in range(len(ranks))]
    each = np.array(dims)
    return Kept(names, np.array(ranks), each, 4 * each * np.array(ranks), np.array(plain or [True] * len(ranks)))


@given(SEEDS, st.sampled_from([2.0, -0.5]))
def test_errors_of_forms_are_those_of_dense_matrices(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = module(rng, 20, 15, 4)
    v, u = (np.linalg.qr(rng.standard_normal((d, 6)))[0] for d in (20, 15))
    delta, core = scale * b @ a, scale * (u.T @ b) @ (a @ v)
    scales = np.array([scale])
    own = core_values(gram(a)[None], gram(b.T)[None], scales)
    inside = core_values(gram(a @ v)[None], gram((u.T @ b).T)[None], scales)
    found = options(kept([4], [35]), own, inside, np.array([12]), "F32", float(np.sum(delta**2)))
    for j in range(1, 5):
        p, s, q = np.linalg.svd(core)
        stored = u @ (p[:, :j] * s[:j]) @ q[:j] @ v.T
        error = np.sum((delta - stored) ** 2) / np.sum(delta**2)
        assert found.errors[0, j - 1] == pytest.approx(error, abs=1e-9)
        best = np.sum(np.linalg.svd(delta, compute_uv=False)[j:] ** 2) / np.sum(delta**2)
        assert found.errors[0, 4 + j - 1] == pytest.approx(best, abs=1e-9)
    assert found.errors[0, 8] == 0
    assert np.all(np.diff(found.sizes[0, :3]) > 0)
    assert found.sizes[0, 3] < found.sizes[0, 2] + 4 * 12 + 1  # the full rank needs no pattern


@given(SEEDS, st.integers(1, 4), st.sampled_from([2.0, -0.5, 0.0]))
def test_reduced_factors_are_the_truncated_svd_and_balanced(seed: int, rank: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((9, 4)), rng.standard_normal((7, 4))
    p, q = reduced(left, right, scale, rank)
    u, s, vt = np.linalg.svd(scale * left @ right.T)
    assert np.allclose(scale * p @ q.T, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-10)
    assert np.allclose(p.T @ p, q.T @ q, atol=1e-10)


def some_options(seed: int, modules: int, alternatives: int = 1) -> Options:
    rng = np.random.default_rng(seed)
    ranks = rng.integers(1, 5, modules)
    own = np.zeros((modules, 4))
    for i, r in enumerate(ranks):
        own[i, :r] = np.sort(rng.exponential(size=r))[::-1]
    core = own * rng.uniform(0, 1, (alternatives, modules, 1))
    k = rng.integers(0, 2, (alternatives, modules)) * rng.integers(2, 60, (alternatives, modules))
    plain = (rng.random(modules) < 0.8).tolist()
    return options(kept(ranks.tolist(), [int(d) for d in rng.integers(20, 90, modules)], plain), own, core, k, "F32",
                   float(own.sum()))  # fmt: skip


def totals(found: Options, columns: Any) -> tuple[np.ndarray, np.ndarray]:
    sizes, errors = found.of(np.asarray(columns))
    return sizes.sum(axis=-1), errors.sum(axis=-1)


@given(SEEDS, st.floats(1e-6, 1e-1))
def test_forms_at_a_price_are_the_best_of_all(seed: int, price: float) -> None:
    found = some_options(seed, 3)
    best = min(
        e + price * s
        for s, e in (totals(found, [list(c)]) for c in itertools.product(range(found.sizes.shape[-1]), repeat=3))
    )
    size, error = totals(found, at_price(found, np.array([price])))
    assert error + price * size == pytest.approx(best, rel=1e-12)


@given(SEEDS, st.floats(0.01, 0.9))
def test_forms_within_a_limit_meet_it_and_are_optimal_for_their_own_error(seed: int, limit: float) -> None:
    found = some_options(seed, 3)
    size, error = totals(found, within(found, limit))
    assert error <= limit
    for c in itertools.product(range(found.sizes.shape[-1]), repeat=3):
        other, lost = totals(found, [list(c)])
        if np.all(np.asarray(c) == found.shared) or set(c) == {found.sizes.shape[-1] - 1}:
            assert not (lost <= limit and other < size)  # all shared, and all verbatim


@given(SEEDS)
def test_alternatives_are_judged_each_on_its_own(seed: int) -> None:
    found = some_options(seed, 5, 3)
    together = within(found, 0.1)
    for q in range(3):
        alone = Options(found.sizes[q : q + 1], found.errors[q : q + 1], found.shared)
        assert np.array_equal(within(alone, 0.1)[0], together[q])


@given(SEEDS)
def test_without_own_forms_what_has_a_basis_is_shared(seed: int) -> None:
    found = some_options(seed, 6)
    columns = at_price(without_own(found), np.array([1e-9]))
    has_basis = np.isfinite(found.sizes[..., :4]).any(axis=-1)
    assert np.all((columns < 4) == has_basis)


def test_patterns_are_counted_for_what_differs_from_the_commonest_rank() -> None:
    three = kept([4, 4, 4], [30, 30, 30])
    each = 2 * len("layers.0.q") + 24
    assert pattern_bytes(three, np.array([3, 3, 3]), 4) == 0  # unchanged
    assert pattern_bytes(three, np.array([1, 1, 1]), 4) == -math.floor(1.5 * each)  # one default for all
    assert pattern_bytes(three, np.array([1, 1, 3]), 4) == 0  # one pattern, two taken for half of one
    assert pattern_bytes(three, np.array([[3, 3, 3], [1, 1, 1]]), 4).shape == (2,)


def test_padding_keeps_values() -> None:
    assert padded(np.ones((2, 3)), 5).tolist() == [[1, 1, 1, 0, 0]] * 2


CONFIGS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16},
    {"r": 8, "lora_alpha": 16, "use_rslora": True},
    {"r": 8, "lora_alpha": 1, "rank_pattern": {"v": 4}, "alpha_pattern": {r"layers\.1.*": 7.5}},
    {"r": 8, "lora_alpha": 0, "alpha_pattern": {"q": -3}},
    {"r": 8, "lora_alpha": 16, "rank_pattern": {"layers.[01].q": 2}, "use_rslora": True},
]
NAMES = ["layers.0.q", "layers.1.q", "layers.0.v", "model.layers.0.q", "layers_0.q", "deep.layers.0-x.v"]


@pytest.mark.parametrize("config", CONFIGS)
@given(SEEDS, st.booleans())
def test_other_ranks_leave_every_scale_as_it_was(config: dict[str, Any], seed: int, alone: bool) -> None:
    rng = np.random.default_rng(seed)

    def resolve_on_hub(values: dict[str, Any], name: str) -> tuple[int, float]:
        ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
        r = ranks.get(get_pattern_key(ranks.keys(), name), values["r"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), values["lora_alpha"])
        return r, alpha / (math.sqrt(r) if values.get("use_rslora") else r)

    before = {name: resolve_on_hub(config, name) for name in NAMES}
    ranks = {name: int(rng.integers(1, before[name][0] + 1)) for name in NAMES}
    changed = [name for name in NAMES if ranks[name] != before[name][0]]
    modules = {name: (ranks[name], Scaling(before[name][1])) for name in NAMES}
    new = reranked(config, modules, changed, alone=alone)
    after = {name: resolve_on_hub(new, name) for name in NAMES}
    assert {name: r for name, (r, _) in after.items()} == ranks
    assert all(after[name][1] == pytest.approx(before[name][1], rel=1e-12) for name in NAMES)
    assert [p.scale for p in scalings(new, ranks) or ()] == pytest.approx([after[name][1] for name in NAMES])
    if not alone:
        assert (new["r"], new["lora_alpha"]) == (config["r"], config["lora_alpha"])


def spectra_of(seed: int, modules: int = 3, adapters: int = 10) -> Spectra:
    rng = np.random.default_rng(seed)
    dims = rng.integers(30, 80, (modules, 2))
    counts = np.full(modules, 4 * adapters)
    most = np.minimum(dims, counts[:, None])
    values = [tuple(np.sort(rng.exponential(size=n) ** 3)[::-1] for n in row) for row in most]
    return Spectra(tuple(f"m{i}" for i in range(modules)), [(a, b) for a, b in values], dims, counts, most, 4)


def arithmetic(spectra: Spectra, adapters: int = 10) -> Any:
    """Adapters that share all at full rank, and lose what components that are not bought would have kept."""

    def weigh(candidates: Candidates) -> Weighed:
        k = candidates.k
        lost = np.array(
            [[sum(float(v[n:].sum()) for v, n in zip(both, row, strict=True))
              for both, row in zip(spectra.eigenvalues, ks, strict=True)] for ks in k]
        )  # fmt: skip
        none = k.sum(axis=-1) == 0
        exact = 4.0 * spectra.dims.sum(axis=-1) * spectra.counts
        sizes = np.where(none, exact, 4.0 * k.sum(axis=-1) * spectra.counts)
        ranks = np.where(none, 0.0, spectra.counts)
        return Weighed(sizes, np.where(none, 0.0, lost), ranks, np.zeros(len(k), np.int64), 0)

    return weigh


@given(SEEDS, st.floats(0.05, 0.9))
def test_what_is_bought_fits_and_beats_every_uniform_k_that_fits(seed: int, share: float) -> None:
    spectra = spectra_of(seed)
    weigh = arithmetic(spectra)
    limit = int(share * 4 * (spectra.dims.sum(axis=-1) * spectra.counts).sum())
    best, tried = largest_within(spectra, weigh, limit, 0)

    def size_of(k: int) -> int:
        even = spectra.uniform(k)[None]
        return int((spectra.basis_bytes(even) + weigh(candidates_of(even, [1.0])).sizes).sum())

    fixed = [k for k in range(1, 80) if size_of(k) <= limit]
    if best is None:
        assert min(a.total for a in tried) > limit
        assert not fixed
        return
    assert best.total <= limit
    for k in fixed[-1:]:
        even = weigh(candidates_of(spectra.uniform(k)[None], [1.0]))
        assert best.error <= even.errors.sum() + 1e-9


@given(SEEDS)
def test_the_smallest_is_no_larger_than_nothing_shared_nor_the_least_uniform_k(seed: int) -> None:
    spectra = spectra_of(seed)
    plain = arithmetic(spectra)
    least = 7

    def weigh(candidates: Candidates) -> Weighed:
        found = plain(candidates)
        return Weighed(found.sizes, found.errors, found.ranks, found.fixed, least)

    best, told = smallest_with(spectra, weigh, 0)
    assert told == least
    assert best.total <= 4 * (spectra.dims.sum(axis=-1) * spectra.counts).sum()
    assert best.total <= uniform_bytes(spectra, least)


@given(SEEDS)
def test_at_a_price_of_zero_only_possible_forms_are_taken(seed: int) -> None:
    found = some_options(seed, 5)
    for given_options in (found, without_own(found)):
        columns = at_price(given_options, np.array([0.0]))
        sizes, errors = given_options.of(columns)
        assert np.all(np.isfinite(sizes))
        least = np.where(np.isfinite(given_options.sizes), given_options.errors, np.inf).min(axis=-1)
        assert np.array_equal(errors, least)


@given(SEEDS, st.sampled_from([2.0, -0.5]))
def test_of_stacked_experts_the_errors_are_those_of_dense_matrices(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    experts, r = 3, 2
    a, b = rng.standard_normal((experts * r, 20)), rng.standard_normal((15, r * experts))
    a[:r] *= 30
    v, u = (np.linalg.qr(rng.standard_normal((d, 6)))[0] for d in (20, 15))

    def each(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([scale * b[:, e::experts] @ a[e * r : (e + 1) * r] for e in range(experts)])

    norm = np.sum(each(a, b) ** 2)
    own = core_values(gram(a)[None], gram(b.T)[None], np.array([scale]), experts)
    inside = core_values(gram(a @ v)[None], gram((u.T @ b).T)[None], np.array([scale]), experts)
    found = options(kept([6], [35], [False]), own, inside, np.array([12]), "F32", float(norm))
    error = np.sum((each(a, b) - each(a @ v @ v.T, u @ u.T @ b)) ** 2)
    assert found.errors[0, found.shared[0]] == pytest.approx(error / norm, rel=1e-9)
    assert own.sum() == pytest.approx(norm)


def test_reduced_factors_have_the_rank_that_is_asked_even_if_there_is_less() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((2, 4)), rng.standard_normal((7, 4))
    p, q = reduced(left, right, 2.0, 3)
    assert (p.shape, q.shape) == ((2, 3), (7, 3))
    assert np.allclose(p @ q.T, left @ right.T)


BOUND: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["x.attn", "x.attn.base_layer.out_proj", "x.q"], ["x.q"]),  # PEFT has one rank for both of the attention
    ({"target_parameters": ["mlp.w"]}, ["x.mlp", "x.q", "mlp"], ["x.q"]),  # looked up as x.mlp.w
    ({"target_parameters": ["weight"]}, ["x.mlp", "x.q"], []),  # a layer, or its parameter: both names must agree
    ({"init_lora_weights": "pissa"}, ["x.mlp", "x.q"], []),  # W is split by the rank
]


@pytest.mark.parametrize(("extra", "modules", "free"), BOUND)
def test_ranks_that_more_depends_on_are_bound(extra: dict[str, Any], modules: list[str], free: list[str]) -> None:
    config = {"r": 4, "lora_alpha": 8, **extra}
    found = dict(zip(modules, scalings(config, dict.fromkeys(modules, 4)) or (), strict=True))
    assert [m for m in modules if not found[m].bound] == free
    ranks = {m: 2 if m in free else 4 for m in modules}
    new = reranked(config, {m: (ranks[m], found[m]) for m in modules}, free, alone=True)
    assert [p.scale for p in scalings(new, ranks) or ()] == [2.0] * len(modules)


def test_a_pattern_of_ours_matches_no_other_lora_layer() -> None:
    modules = {"q": (2, Scaling(2.0)), "v": (4, Scaling(2.0))}
    new = reranked({"r": 4, "lora_alpha": 8}, modules, ["q"], alone=False, others=["deep.q"])
    assert get_pattern_key(new["rank_pattern"].keys(), "deep.q") == "deep.q"  # none: the default
    assert new["rank_pattern"][get_pattern_key(new["rank_pattern"].keys(), "q")] == 2
