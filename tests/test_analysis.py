"""`plan --analyze`: what a sample says is what `compress` then finds, and chance is not sold as structure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.cli.app import main
from lorashare_stream.errors import BudgetError, CollectionError
from lorashare_stream.hub import retry as patience
from lorashare_stream.pipeline import compress, plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.analysis import LITTLE, Analysis, Outlook, _to_store, analyse, chosen_modules, measure
from lorashare_stream.report.forecast import Point
from lorashare_stream.report.sample import Part, probe, sampled, spread
from lorashare_stream.settings import Settings

from .conftest import factor_keys, load_tensors, write_adapter
from .fakehub import ALICE, FakeHub, patched

Capture = pytest.CaptureFixture[str]
DIMS = {"layers.0.q": (96, 64), "layers.1.q": (96, 64), "layers.0.v": (96, 48)}


def plan(folder: Path, **settings: Any) -> Any:
    return plan_for(resolve([str(folder)]), Settings.from_mapping({"device": "cpu", "on_error": "skip"} | settings))


def write(root: Path, count: int, tensors: Callable[[int, np.random.Generator], dict[str, np.ndarray]]) -> Path:
    for i in range(count):
        save(root / f"a{i:03}", tensors(i, np.random.default_rng([5, i])))
    return root


def save(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    rank = next(len(v) for k, v in tensors.items() if "lora_A" in k)
    write_adapter(folder, {k: np.float32(v) for k, v in tensors.items()}, r=rank, lora_alpha=2 * rank)


def adapters(root: Path, count: int, planted: float, seeds: Sequence[int | None] = (), r: int = 4) -> Path:
    """Adapters whose B are so much of eight planted directions, and whose A began by some seeds; None is an own one."""

    def tensors(i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        found, rank = {}, r if i % 3 else 2 * r
        began = seeds[i] if i < len(seeds) and seeds[i] is not None else 1000 + i
        for number, (module, (d_in, d_out)) in enumerate(DIMS.items()):
            a, b = factor_keys(module)
            start = np.random.default_rng([number, began]).uniform(-1, 1, (2 * r, d_in))[:rank]
            basis = np.linalg.qr(np.random.default_rng([6, number]).standard_normal((max(d_in, d_out), 16)))[0]
            common = [basis[:d, 8 * side : 8 * side + 8] for side, d in enumerate((d_in, d_out))]
            strength = np.exp(-0.3 * np.arange(8))[:, None]
            found[a] = start / np.sqrt(d_in) + planted * (common[0] @ (strength * rng.standard_normal((8, rank)))).T
            found[b] = planted * common[1] @ (strength * rng.standard_normal((8, rank)))
            found[b] = found[b] + 0.3 * rng.standard_normal((d_out, rank)) / np.sqrt(d_out)
        return found

    return write(root, count, tensors)


def measured(folder: Path, out: Path, ks: Sequence[int], **settings: Any) -> dict[int, float]:
    """The mean error that `compress` finds, by k."""
    errors = {}
    for k in ks:
        made = plan(folder, num_components=k, **settings)
        compress(made, out / f"{k}", workspace=out / "workspace")
        errors[k] = read_share_config(out / f"{k}").ours["errors"]["mean"]
    return errors


def outlook(a: Analysis, k: int) -> Outlook:
    return next(o for o in a.outlooks if o.k == k)


@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_of_a_whole_collection_the_errors_are_those_of_compress(tmp_path: Path, objective: str) -> None:
    folder = adapters(tmp_path / "in", 12, planted=1.0)
    ks = [1, 4, 8, 16]
    truth = measured(folder, tmp_path / "out", ks, objective=objective)
    found = analyse(plan(folder, objective=objective))
    for k in ks:
        o = outlook(found, k)
        assert o.low == pytest.approx(o.high, abs=1e-9)
        assert o.expected == pytest.approx(truth[k], abs=2e-4)


def test_centred_bases_are_those_of_compress(tmp_path: Path) -> None:
    folder = adapters(tmp_path / "in", 12, planted=0.5, seeds=[1] * 12)
    truth = measured(folder, tmp_path / "out", [4, 8], objective="factors", center=True)
    found = analyse(plan(folder, objective="factors", center=True))
    assert [outlook(found, k).expected for k in (4, 8)] == pytest.approx(list(truth.values()), abs=2e-4)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("planted", "objective", "near"),
    [(0.0, "delta", 0.1), (0.4, "delta", 0.1), (1.5, "delta", 0.03), (1.5, "factors", 0.03)],
)
def test_the_error_of_a_collection_is_between_the_bounds_of_its_sample(
    tmp_path: Path, planted: float, objective: str, near: float
) -> None:
    folder = adapters(tmp_path / "in", 60, planted)
    truth = measured(folder, tmp_path / "out", [4, 16], objective=objective)
    found = analyse(plan(folder, objective=objective), 24)
    assert len(found.sample) == 24
    for k, error in truth.items():
        o = outlook(found, k)
        assert o.low - 0.01 <= error <= o.high + 0.01
        assert o.low <= o.expected <= o.high
        assert o.expected == pytest.approx(error, abs=near)  # less so for unlike adapters and k near d: it is high then


def test_bytes_are_those_of_the_plan(tmp_path: Path, collection: list[str]) -> None:
    made = plan(Path(collection[0]).parent, num_components=5)
    o = outlook(analyse(made, 4), 5)
    assert o.bytes == made.sizes["basis"] + made.sizes["loadings"]
    assert o.ratio == made.sizes["lora"] / o.bytes


def test_chance_is_not_sold_as_structure(tmp_path: Path) -> None:
    for count, sample in ((60, 24), (12, None)):
        found = analyse(plan(adapters(tmp_path / f"{count}", count, planted=0.0)), sample)
        assert all(o.held == pytest.approx(o.chance, abs=0.05) for o in found.outlooks if o.k <= 24)
        assert found.serve.startswith(("they share too little", "no k saves much"))


def test_structure_is_recommended_with_the_k_that_has_it(tmp_path: Path) -> None:
    found = analyse(plan(adapters(tmp_path / "in", 60, planted=3.0)), 24)
    assert found.serve.startswith("-k ")
    best = outlook(found, int(found.serve.split()[1]))
    assert best.held - best.chance > 0.5 > LITTLE
    assert best.expected <= 0.25
    assert outlook(found, 8).held > outlook(found, 8).chance + 0.5


@pytest.mark.few(2)
@pytest.mark.parametrize("sample", [None, 16])
def test_the_rate_curve_is_that_of_coded_checkpoints(tmp_path: Path, sample: int | None) -> None:
    folder = adapters(tmp_path / "in", 40, planted=0.5)
    points = {p.error: p for p in analyse(plan(folder), sample).coded}
    assert [p.codes for p in points.values()] == sorted((p.codes for p in points.values()), reverse=True)
    for error in (0.1, 0.25):
        compress(plan(folder, max_error=error), tmp_path / f"{error}")
        size, p = read_share_config(tmp_path / f"{error}").ours["bytes"], points[error]
        assert (p.margin > 0.021 * p.codes) == (sample is not None)
        assert p.codes == pytest.approx(size["codes"], abs=p.margin + 0.03 * size["codes"])
        assert p.total == pytest.approx(sum(size[part] for part in ("codes", "verbatim", "metadata")), rel=0.05)


@pytest.mark.parametrize(("held", "count", "told"), [(0.3, 200, True), (0.3, 50, False), (0.1, 200, False)])
def test_directions_are_recommended_where_many_adapters_have_much_in_common(
    held: float, count: int, told: bool
) -> None:
    outlooks = [Outlook(k, 0, 1.0, 0.1, 0.1, 0.1, share, 0.05) for k, share in ((16, held), (64, 0.9))]
    text = _to_store(Point(0.25, 1e6, 0.0, 1e6, 20.0, 28.0), outlooks, count)
    assert ("--directions" in text) == told


def test_duplicates_are_named(tmp_path: Path) -> None:
    folder = adapters(tmp_path / "in", 12, planted=1.0)
    shutil.copytree(folder / "a004", folder / "b-copy")

    def turned(name: str, factor: float, noise: float) -> None:
        """The same dW by other factors, and another strength."""
        tensors, rng = load_tensors(folder / "a007"), np.random.default_rng(0)
        for module in DIMS:
            a, b = factor_keys(module)
            mixing = rng.standard_normal((len(tensors[a]),) * 2)
            tensors[a], tensors[b] = mixing @ tensors[a], factor * tensors[b] @ np.linalg.inv(mixing)
            tensors[b] = tensors[b] + noise * np.abs(tensors[b]).mean() * rng.standard_normal(tensors[b].shape)
        save(folder / name, tensors)

    turned("c-turned", 1.0, 0.0)
    turned("d-louder", 2.0, 0.0)
    turned("e-other", 1.0, 1.0)
    found = analyse(plan(folder))
    assert found.identical == (("a004", "b-copy"),)
    pairs = {frozenset(pair.names): (pair.distance, pair.cosine) for pair in found.duplicates}
    assert pairs.keys() == {
        frozenset(p) for p in (("a004", "b-copy"), ("a007", "c-turned"), ("a007", "d-louder"), ("c-turned", "d-louder"))
    }
    assert pairs[frozenset(("a007", "c-turned"))][0] < 1e-3
    assert pairs[frozenset(("a007", "d-louder"))] == pytest.approx((0.5, 1.0), abs=1e-3)
    assert analyse(plan(folder), 2).identical == found.identical  # of the whole collection


def test_bad_adapters_are_named_and_left_out(tmp_path: Path, capsys: Capture) -> None:
    folder = adapters(tmp_path / "in", 10, planted=1.0)

    def change(name: str, value: Callable[[np.ndarray], np.ndarray]) -> None:
        tensors = {k: value(v) if "lora_B" in k else v for k, v in load_tensors(folder / name).items()}
        save(folder / name, tensors)

    change("a001", lambda b: b * 0)
    change("a002", lambda b: np.where(np.arange(b.size).reshape(b.shape) == 3, np.nan, b))
    change("a003", lambda b: b + 1e13)
    change("a004", lambda b: b * 100)
    found = analyse(plan(folder))
    assert found.zero == ("a001",)
    assert [p.adapter for p in found.problems] == ["a002", "a003"]
    assert found.loud.keys() == {"a004"}
    assert not {"a001", "a002", "a003"} & set(found.sample)
    assert main(["plan", str(folder), "--analyze", "-q"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("a001", "a002", "a003", "a004", "not finite"))
    assert text.splitlines()[-2].startswith("for the smallest store, code each alone: --max-error 0.25 ")
    assert text.splitlines()[-1].startswith("to serve many at once, share bases: ")


def test_samples_are_spread_and_the_same_every_time(tmp_path: Path) -> None:
    folder = adapters(tmp_path / "in", 30, planted=1.0)
    made = plan(folder)
    found = analyse(made, 8)
    assert list(found.sample) == spread([e.name for e in made.adapters], 8) != [e.name for e in made.adapters[:8]]
    for again in (
        analyse(plan(folder, workers=3), 8),
        analyse(plan(folder, memory="300MiB"), 8),
    ):
        assert again == found


def test_work_and_memory_are_bounded(tmp_path: Path) -> None:
    made = plan(adapters(tmp_path / "in", 12, planted=1.0))
    chosen, in_all = chosen_modules(made.adapters, work=1.0)
    assert (chosen, in_all) == (["layers.0.q", "layers.0.v"], 3)  # one of each kind
    assert len(sampled(made.adapters * 10, None)) == 64
    with pytest.raises(BudgetError, match="--sample"):
        analyse(plan(tmp_path / "in", memory="192MiB"))


def test_there_must_be_two(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", 3, lambda i, rng: dict.fromkeys(factor_keys("layers.0.q"), np.zeros((4, 4))))
    with pytest.raises(CollectionError, match="nothing to analyse"):
        analyse(plan(folder))


def test_kinds_ranks_and_experts_are_mixed_freely(tmp_path: Path) -> None:
    def tensors(i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        keys = [*factor_keys("layers.0.q"), *factor_keys(f"layers.{i % 3}.v")]
        return {k: rng.standard_normal((4, 12) if "lora_A" in k else (3, 4)) for k in keys}  # r > d

    found = analyse(plan(write(tmp_path / "in", 9, tensors)))
    assert found.modules == 4
    assert found.outlooks[-1].expected <= found.outlooks[0].expected


@pytest.mark.parametrize("experts", [1, 2])
def test_bases_keep_what_their_projections_keep(experts: int) -> None:
    """Against dW itself: the energy of U'dW V on bases of all, of an adapter's half, and of the other half."""
    rng, dims, count, ks = np.random.default_rng(0), {"A": 10, "B": 7}, 5, [1, 3, 6]
    parts = {}
    for i in (0, 1, 2, 4):  # 3 has not the module
        weights = rng.uniform(0.5, 2.0, (experts, 2))
        rows = {side: rng.standard_normal((experts, 2, d)).astype(np.float32) for side, d in dims.items()}
        parts[i] = Part(rows, weights, rng.uniform(0.5, 2.0, (experts, 2)))
    found = measure(parts, count, ks, center=False)
    deltas = {
        i: [(p.rows["B"][e].T * p.strengths[e]) @ p.rows["A"][e] for e in range(experts)] for i, p in parts.items()
    }

    def kept(i: int, fitted: Sequence[int], k: int) -> float:
        bases = {}
        for side in "AB":
            x = np.concatenate(
                [(parts[j].weights[..., None] * parts[j].rows[side]).reshape(-1, dims[side]) for j in fitted]
            )
            bases[side] = np.linalg.svd(x, full_matrices=False)[2][:k]
        return float(sum(np.square(bases["B"] @ dw @ bases["A"].T).sum() for dw in deltas[i]))

    for j, k in enumerate(ks):
        for i in parts:
            own, other = ([n for n in parts if (n - i) % 2 == side] for side in (0, 1))
            truth = [kept(i, fitted, k) for fitted in (list(parts), own, other)]
            assert found.kept[:, j, i] == pytest.approx(truth, rel=1e-4)
        assert not found.kept[:, j, 3].any()
    for i in parts:
        for n in parts:
            inner = sum(float(np.sum(a * b)) for a, b in zip(deltas[i], deltas[n], strict=True))
            assert found.inner[i, n] == pytest.approx(inner, rel=1e-4)


@pytest.mark.parametrize("objective", ["delta", "factors"])
def test_parts_make_up_dw(tmp_path: Path, objective: str) -> None:
    made = plan(adapters(tmp_path / "in", 2, planted=1.0), objective=objective)
    found = probe(None, objective, frozenset(DIMS), made.adapters[0])
    tensors, total = load_tensors(made.adapters[0].folder), 0.0
    for module, (d_in, d_out) in DIMS.items():
        part, (a, b) = found.parts[module], (tensors[key] for key in factor_keys(module))
        ours = found.norm * (part.rows["B"][0].T * part.strengths[0]) @ part.rows["A"][0]
        assert ours.shape == (d_out, d_in)
        assert np.abs(ours - 2 * b @ a).max() < 1e-4
        total += float(np.square(2 * b @ a).sum())
    assert found.norm == pytest.approx(total**0.5, rel=1e-5)


def test_the_command_writes_it_beside_the_plan(tmp_path: Path, collection: list[str], capsys: Capture) -> None:
    folder, bare, path = Path(collection[0]).parent, tmp_path / "bare.json", tmp_path / "plan.json"
    assert main(["plan", str(folder), "-k", "4", "-o", str(bare), "-q"]) == 0
    capsys.readouterr()
    assert main(["plan", str(folder), "-k", "4", "--analyze", "--sample", "5", "-o", str(path), "--json"]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(path.read_text())
    assert printed["analysis"] == written["analysis"]
    assert len(printed["analysis"]["sample"]) == 5
    assert written["fingerprint"] == json.loads(bare.read_text())["fingerprint"]
    assert main(["compress", "--plan", str(path), "-o", str(tmp_path / "out"), "-q"]) == 0


@pytest.mark.parametrize("arguments", [["--sample", "5"], ["--analyze", "--sample", "1"]])
def test_samples_that_cannot_be_meant(collection: list[str], capsys: Capture, arguments: list[str]) -> None:
    assert main(["plan", *collection, *arguments]) == 2
    assert "--sample" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [{}, {"disk_budget": 10_000}])
def test_a_sample_of_the_hub_is_fetched(
    tmp_path: Path, collection: list[str], monkeypatch: pytest.MonkeyPatch, budget: dict[str, Any]
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home", ALICE)
        for name in map(Path, collection):
            files = {p.name: p.read_bytes() for p in name.iterdir()}
            hub.add(f"org/{name.name}", files, base_model="tiny-base")
        settings = Settings.from_mapping({"device": "cpu"} | budget)
        made = plan_for(resolve([f"org/{Path(f).name}" for f in collection]), settings, runs=False)
        found = analyse(made, 4)
    assert len(found.sample) == (4 if not budget else 2)
    local = analyse(plan(Path(collection[0]).parent), 4)
    if not budget:
        assert found.outlooks == local.outlooks


def test_real_collections(real: Path, tmp_path: Path) -> None:
    truth = measured(real / "minilm", tmp_path, [16])
    assert outlook(analyse(plan(real / "minilm")), 16).expected == pytest.approx(truth[16], abs=1e-3)
    o = outlook(analyse(plan(real / "minilm"), 10), 16)
    assert o.low <= truth[16] <= o.high
    found = analyse(plan(real / "gpt2"))
    assert found.zero == ("bhaveshasasik-generative_AI_model--gpt-lora",)
    assert found.loud.keys() == {"anirudh-ak-peft-gpt2--model-lora_model"}
    assert found.serve.startswith("they share too little to gain by it: ")
    assert [p.lora_times for p in found.coded][2:4] == pytest.approx([13.5, 31.7], rel=0.03)
