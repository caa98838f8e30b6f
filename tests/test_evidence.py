"""scripts/evidence.py: its errors, its rivals and its bytes on small cases, its page, and the split of the texts."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from .conftest import make_collection

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import evidence  # noqa: E402
import evidence_joint  # noqa: E402
import evidence_measure as em  # noqa: E402
import evidence_product  # noqa: E402
import evidence_report  # noqa: E402
import train_adapters  # noqa: E402

pytest.importorskip("lorashare")


def adapter(seed: int, ranks: dict[str, int], scale: float = 2.0) -> em.Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: em.Module(
            rng.standard_normal((r, 11)).astype(np.float32), rng.standard_normal((7, r)).astype(np.float32), scale
        )
        for name, r in ranks.items()
    }


def dense(a: em.Adapter) -> dict[str, np.ndarray]:
    return {name: m.scale * m.b.astype(np.float64) @ m.a.astype(np.float64) for name, m in a.items()}


def relative(original: em.Adapter, found: em.Adapter) -> float:
    """||dW - dW^|| / ||dW|| by forming dW."""
    x, y = dense(original), dense(found)
    off = sum(np.sum((x.get(n, 0) - y.get(n, np.zeros(1))) ** 2) for n in x.keys() | y.keys())
    return float(np.sqrt(off / sum(np.sum(v**2) for v in x.values())))


@pytest.mark.parametrize("ranks", [{"q": 3, "v": 3}, {"q": 2, "v": 5}, {"q": 8, "v": 7}])
def test_the_error_is_that_of_dense_matrices(ranks: dict[str, int]) -> None:
    original, other = adapter(0, ranks), adapter(1, {"q": 4, "v": 1}, scale=0.5)
    assert em.dw_error(original, other) == pytest.approx(relative(original, other), rel=1e-10)
    assert em.dw_error(original, {"q": other["q"]}) == pytest.approx(relative(original, {"q": other["q"]}), rel=1e-10)
    assert em.dw_error({"q": original["q"]}, other) == pytest.approx(relative({"q": original["q"]}, other), rel=1e-10)
    assert em.dw_error(original, original) < 1e-12


def test_a_small_error_is_not_lost_in_a_difference_and_no_dw_has_none() -> None:
    original = adapter(0, {"q": 3})
    q = original["q"]
    near = {"q": em.Module(q.a.astype(np.float64) * (1 + 1e-9), q.b, q.scale)}
    assert em.dw_error(original, near) == pytest.approx(1e-9, rel=1e-4)
    zero = {"q": em.Module(q.a, np.zeros_like(q.b), q.scale)}
    assert np.isnan(em.dw_error(zero, original))
    assert em.statistics({"a": 1.0, "b": float("nan"), "c": 3.0})["mean"] == 2.0


def test_another_gauge_is_no_error() -> None:
    original = adapter(0, {"q": 3})
    mix = np.random.default_rng(5).standard_normal((3, 3))
    q = original["q"]
    assert em.dw_error(original, {"q": em.Module(mix @ q.a, q.b @ np.linalg.inv(mix) * 2, q.scale / 2)}) < 1e-10


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}}, 4.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 2}, "alpha_pattern": {"layers.0.q": 6}}, 3.0),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"k": 2}}, 2.0),
    ],
)
def test_scales_are_those_of_peft(config: dict[str, Any], scale: float) -> None:
    assert em.scale_of(config, "model.layers.0.q") == scale


def test_adapters_are_read_and_their_bytes_told_apart(tmp_path: Path) -> None:
    folder = Path(make_collection(tmp_path, 1)[0])
    modules = em.read_adapter(folder)
    assert sorted(modules) == ["layers.0.q", "layers.0.v", "layers.1.q"]
    assert modules["layers.0.v"].a.shape == (4, 40)
    size = em.bytes_of(folder)
    assert size.lora == 4 * 4 * (3 * 40 + 24 + 12 + 24)
    assert (size.extras, size.verbatim) == (4 * 3 * 5, 0)
    assert sum(size.as_dict().values()) == sum(p.stat().st_size for p in folder.iterdir())


def test_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "adapters" / "a"
    place.mkdir(parents=True)
    ones = np.ones((5, 2), np.float32)
    save_file({"q:A": ones, "q:B": ones}, tmp_path / "shared_components.safetensors")
    save_file({"q:A": ones}, tmp_path / "eigenvalues.safetensors")
    save_file({"q:A": ones}, place / "loadings.safetensors")
    save_file({"base_model.model.v.lora_A.weight": ones, "head": ones}, place / "classifier_head.safetensors")
    (tmp_path / "share_config.json").write_text("{}")
    size = em.bytes_of(tmp_path)
    assert (size.lora, size.verbatim, size.extras) == (3 * 40, 40, 40)
    assert sum(size.as_dict().values()) == sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.parametrize("budget", [0, 150, 400, 1000, 10**6])
def test_truncated_svds_are_the_best_choice_of_ranks(budget: int) -> None:
    original = adapter(0, {"q": 3, "v": 2, "w": 3})
    found, spent = em.truncated(original, budget)
    assert spent <= budget
    assert spent == sum(4 * (m.a.size + m.b.size) for m in found.values())
    values = [np.linalg.svd(x, compute_uv=False) for x in dense(original).values()]
    every = itertools.product(range(4), range(3), range(4))
    fitting = (ranks for ranks in every if sum(ranks) * 4 * 18 <= budget)
    best = min(sum(float(np.sum(v[t:] ** 2)) for v, t in zip(values, ranks, strict=True)) for ranks in fitting)
    assert em.dw_error(original, found) ** 2 * em.norm(original) ** 2 == pytest.approx(best, abs=1e-9)
    assert em.truncated({"q": em.Module(np.ones((2, 11)), np.zeros((7, 2)), 1.0)}, budget) == ({}, 0)


def test_integers_are_off_by_half_a_step_of_their_column_at_most() -> None:
    x = (np.random.default_rng(0).standard_normal((50, 6)) * 10.0 ** np.arange(-3, 3)).astype(np.float32)
    x[:, 2] = 0
    back, size = em.integers(x, 8)
    assert size == x.size + 4 * x.shape[1]
    assert np.all(np.abs(x - back) <= np.abs(x).max(axis=0) / 127 / 2 * (1 + 1e-5))
    assert np.all(back[:, 2] == 0)
    again, _ = em.integers(back, 8)
    assert np.allclose(again, back, rtol=1e-6)
    coarse, size = em.integers(x, 4)
    assert size == x.size // 2 + 4 * x.shape[1]
    assert all(len(np.unique(column)) <= 15 for column in coarse.T)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ternary_keeps_the_largest_with_their_best_magnitude(density: float) -> None:
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    back, size = em.ternary(x, density)
    kept = back != 0
    assert kept.sum() == round(300 * density)
    assert np.abs(x[kept]).min() >= np.abs(x[~kept]).max(initial=0)
    for worse in (0.99, 1.01):
        assert np.linalg.norm(x - back) < np.linalg.norm(x - worse * back)
    assert size - 2 == pytest.approx({0.1: 300 * 0.569, 0.5: 300 * 1.5, 1.0: 300}[density] / 8, abs=1)


def test_mixed_bits_lie_between_one_bit_and_the_many() -> None:
    original = {
        "q": em.Module(*(np.random.default_rng(s).standard_normal(d) for s, d in ((0, (8, 256)), (1, (300, 8)))), 2.0)
    }
    found = [em.mixed(original, bits, energy) for bits, energy in ((2, 1e-9), (3, 0.5), (8, 1.0))]
    errors = [em.dw_error(original, x) for x, _ in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    assert [size for _, size in found] == sorted(size for _, size in found)
    assert found[-1][1] == 8 * (256 + 300) + 8 * 5 + 2 * 8 * 5  # of five groups a zero point and a scale a column


def common(n: int, modules: tuple[str, ...] = ("q", "v")) -> dict[str, em.Adapter]:
    """Adapters in spaces of two dimensions that all of them have."""
    rng = np.random.default_rng(3)
    spaces = {m: (rng.standard_normal((40, 2)), rng.standard_normal((30, 2))) for m in modules}
    return {
        str(i): {
            m: em.Module(rng.standard_normal((3, 2)) @ v.T, u @ rng.standard_normal((2, 3)), 2.0)
            for m, (u, v) in spaces.items()
        }
        for i in range(n)
    }


def test_joint_diagonalisation_finds_what_is_common() -> None:
    adapters = common(6)
    found, size = evidence_joint.joint(adapters, 2)
    assert em.statistics({i: em.dw_error(adapters[i], found[i]) for i in adapters})["max"] < 2e-3  # float16
    assert size == 2 * (2 * 2 * (40 + 30) + 6 * (1 + 2 * 4))
    assert (
        em.statistics({i: em.dw_error(adapters[i], evidence_joint.joint(adapters, 1)[0][i]) for i in adapters})["mean"]
        > 0.1
    )


def test_clusters_find_two_kinds() -> None:
    adapters = {f"{kind}{i}": x for kind in range(2) for i, x in _kind(kind).items()}
    errors = []
    for clusters in (1, 2):
        found, _ = evidence_joint.joint(adapters, 2, clusters)
        errors.append(em.statistics({i: em.dw_error(adapters[i], found[i]) for i in adapters})["mean"])
    assert errors[1] < 0.01 < errors[0]


def _kind(seed: int) -> dict[str, em.Adapter]:
    rng = np.random.default_rng(10 + seed)
    u, v = rng.standard_normal((40, 2)), rng.standard_normal((30, 2))
    return {
        str(i): {"q": em.Module(rng.standard_normal((3, 2)) @ v.T, u @ rng.standard_normal((2, 3)), 1.0)}
        for i in range(12)
    }


def row(n: int, system: str, setting: float, lora: int, mean: float, **more: Any) -> dict[str, Any]:
    facts = {"kind": "row", "n": n, "arm": "all", "system": system, "setting": setting, "seconds": 1.0}
    size = {"lora": lora, "verbatim": 0, "extras": 10, "other": 10, "arms": {"own": mean}}
    return facts | size | dict.fromkeys(("mean", "median", "p95", "max"), mean) | more


def fake() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"kind": "collection", "n": n, "arm": arm, "adapters": n, "lora": 10**5 * n, "verbatim": 0,
         "extras": 10**4, "other": 10**3}
        for n in (10, 20) for arm in ("all", "own")
    ]  # fmt: skip
    told = {"accuracy": {"a": 0.75, "b": 0.68}, "agreement": {"a": 0.9, "b": 0.85}}
    for n, more in ((10, {}), (20, told)):
        lines += [
            row(n, "coded", 0.1, 10_000 * n - 10, 0.1, apart=2e-6, **more),
            row(n, "coded", 0.4, 1000 * n - 10, 0.4, apart=1e-6, **more),
            row(n, "SHARE", 8, 50_000 + 5000 * n - 10, 0.3, **more),
            row(n, "SHARE", 16, 90_000 + 9000 * n - 10, 0.2, **more),
            row(n, "lorashare", 8, 50_000 + 5000 * n, 0.6, **more),
            row(n, "int", 4, 12_500 * n, 0.12, **more),
            row(n, "int", 3, 1000 * n, 0.38, **more),
        ]
    lines += [
        {**row(20, "coded", 0.1, 90_000, 0.1), "arm": "own"}, {**row(20, "coded", 0.4, 9000, 0.4), "arm": "own"},
        {**row(20, "SHARE", 8, 99_990, 0.3), "arm": "own"},
        {"kind": "left", "n": 10, "arm": "all", "system": "vlora", "setting": 2, "why": "no such thing"},
        {"kind": "originals", "n": 20, "accuracy": {"a": 0.8, "b": 0.7}, "texts": 256},
        {"kind": "heads", "accuracy": {"a": 0.5, "b": 0.4}},
        row(20, "coded, directions", 0.1, 179_991, 0.1, apart=1e-6, directions=17_999),
        {"kind": "product", "n": 20, "copies": 1, "options": "-k 32", "seconds": 9.0, "peak": 2**20, "bytes": 10**6,
         "verify": 2.0, "digest": "00"},
        *({"kind": "kill", "n": 20, "options": "-k 32", "moment": m, "killed": True, "same": m < 6} for m in (5, 6)),
        {"kind": "added", "n": 20, "arm": "all", "options": "-k 8", "counts": [18, 2], "before": 1800, "after": 2200,
         "fitted": {"mean": 0.3, "max": 0.4}, "added": {"mean": 0.35, "max": 0.45}},
    ]  # fmt: skip
    return [{"run": "here", "at": "2026-01-01", **x} for x in lines]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Copies of the pages."""
    for name in ("evidence.md", "evidence-tables.md"):
        (tmp_path / name).write_text((SCRIPTS.parent / "docs" / name).read_text())
    return tmp_path / "evidence.md"


def test_the_page_says_yes_and_no_and_keeps_what_was_written_by_hand(page: Path) -> None:
    places = (page, page.with_name("evidence-tables.md"))
    before = [evidence_report.BLOCK.sub("", path.read_text()) for path in places]
    evidence_report.render(fake(), page)
    text, tables = (path.read_text() for path in places)
    assert [evidence_report.BLOCK.sub("", x) for x in (text, tables)] == before
    assert "| coded: every adapter's measured error over its limit E, at most 1 | 1 | yes |" in text
    assert "| certified errors are what is measured, to 1e-5 | 2e-06 | yes |" in text
    assert "| N = 20: SHARE's mean error over lorashare's at the same k, at most 1 | 0.5 | yes |" in text
    assert "at their mean error; times, least (int 3 bits) | 0.858 | **no** |" in text
    assert "| coded | E = 0.1 | 10.0 | 0.100 | 0.715 (0.68) | 0.875 (0.85) | +3.5 ± 1.5 |" in text
    assert "| originals |  | 1 | 0 | 0.750 (0.70) | 1 |  |" in text
    assert "| a trained head alone |  |  |  | 0.450 (0.40) |  |  |" in text
    assert "| SHARE | 8 | 10.0 at 0.30; 46 | 13.3 at 0.30; 46 | 20.0 |" in text
    assert "| k = 8 | 20.0 at 0.30; 103 |" in text
    assert "| all | 0.1 | 10.0% (10.0%) |" in text
    assert "| 20 | `-k 32` | 9 | 1 | 1.0 | 2 | 2 | 1 |" in text
    assert "| 2 runs killed and resumed: those whose files are not the whole run's | 1 | **no** |" in text
    assert "| 18 + 2 | `-k 8` | 100 | 200 | 0.300 (0.400) | 0.350 (0.450) |" in text
    assert "| SHARE | k = 8 | 0.150 | 0.000 | 0.000 | 13.3 |" in tables
    assert "- vlora, k = 2, N = 10: no such thing." in tables
    chart = page.with_suffix(".svg").read_text()
    assert "SHARE (-k)" in chart
    assert "vlora" not in chart


def test_an_adapter_above_the_limit_is_told(page: Path) -> None:
    lines = fake()
    next(x for x in lines if x["kind"] == "row")["max"] = 0.101
    evidence_report.render(lines, page)
    assert "over its limit E, at most 1 | 1.01 | **no** |" in page.read_text()


def test_bytes_between_measured_errors_and_the_rate_of_a_rival() -> None:
    rows = [row(1, "SHARE", k, size - 10, error) for k, size, error in ((1, 100, 0.4), (2, 400, 0.1), (3, 490, 0.2))]
    points = evidence_report.curve(rows)
    assert points == [(0.1, 400.0), (0.4, 100.0)]  # what is larger and worse is no point
    assert evidence_report.at(points, 0.25) == pytest.approx(200)
    assert evidence_report.at(points, 0.05) is None
    assert evidence_report.at(points, 0.9) is None
    assert evidence_report.rate([(e, 3 * size) for e, size in points], points) == pytest.approx(3)
    assert evidence_report.rate(points, [(0.5, 10.0), (0.6, 5.0)]) is None


def test_a_file_is_of_one_side_of_the_split() -> None:
    found = tuple((f"text {i}", f"file {i % 9}") for i in range(90))
    train, held_out = train_adapters.split(found, 30, 15)
    assert (len(train), len(held_out)) == (30, 15)
    files = dict(found)
    assert not {files[t] for t in train} & {files[t] for t in held_out}


def test_no_text_of_a_task_is_on_both_sides_or_of_two_classes() -> None:
    tasks = train_adapters.tasks(32)
    assert tasks == train_adapters.tasks(32)
    assert len({frozenset(t) for t in tasks}) == 32
    task = ("scipy.io", "sklearn.neighbors", "email", "zarr")
    facts = train_adapters.data(task)
    train, held_out = (dict(facts[part]) for part in ("train", "held_out"))
    assert len(train) == len(facts["train"])
    assert len(held_out) == len(facts["held_out"])
    assert not train.keys() & held_out.keys()
    files = {text: file for package in task for text, file in train_adapters.texts(package)}
    assert not {files[t] for t in train} & {files[t] for t in held_out}
    assert json.dumps(facts) == json.dumps(train_adapters.data(task))


def test_adapters_of_the_shared_arm_have_one_seed_and_the_others_their_own() -> None:
    numbers = range(40)
    arms = [train_adapters.arm_of(i) for i in numbers]
    assert [arms.count(arm) for arm in ("own", "shared", "long")] == [20, 16, 4]
    assert arms[:10] == arms[10:20]
    assert len({train_adapters.seed_of(i) for i in numbers if arms[i] == "shared"}) == 1
    assert len({train_adapters.seed_of(i) for i in numbers if arms[i] != "shared"}) == 24


def collection(tmp_path: Path, count: int) -> evidence.Collection:
    make_collection(tmp_path / "adapters", count)
    names = []
    for i, path in enumerate(sorted((tmp_path / "adapters").iterdir())):
        names.append(train_adapters.name_of(i))
        path.rename(tmp_path / "adapters" / names[-1])
    return evidence.Collection.read(tmp_path, names)


@pytest.mark.slow
def test_checkpoints_measured_here_are_as_certified(tmp_path: Path) -> None:
    c = collection(tmp_path, 6)
    for number, (work, exact) in enumerate([
        (lambda s: evidence.ours(c, ("-k", "3"), s), False),
        (lambda s: evidence.peer(c, "lorashare", 3, s), False),
        (lambda s: evidence.ours(c, ("-k", "1000"), s), True),
        (lambda s: evidence.ours(c, ("--max-error", "0.2"), s), False),
    ]):  # fmt: skip
        scratch = tmp_path / str(number)
        scratch.mkdir()
        found = work(scratch)
        errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
        assert (em.statistics(errors)["max"] < 1e-4) is exact
        assert found.facts.get("apart", 0) < 1e-5
        assert found.facts["peak"] > 2**20
        assert (
            0 < found.bytes.extras <= c.bytes.extras
        )  # heads of a coded checkpoint are stored without loss, in planes
        if number == 3:
            assert em.statistics(errors)["max"] <= 0.2
        assert sum(found.bytes.as_dict().values()) == sum(
            p.stat().st_size for p in (scratch / "out").rglob("*") if p.is_file()
        )


@pytest.mark.slow
def test_what_is_added_stays_on_the_bases_of_the_others(tmp_path: Path) -> None:
    c = collection(tmp_path, 10)
    (tmp_path / "out").mkdir()
    told = evidence.added(c, ("-k", "3"), tmp_path / "out")
    assert told["counts"] == [9, 1]
    assert told["added"]["mean"] > told["fitted"]["mean"] > 0.01
    assert told["after"] > told["before"]


@pytest.mark.slow
def test_a_killed_run_comes_out_as_a_whole_one(tmp_path: Path) -> None:
    c, places = collection(tmp_path, 6), [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    sources = Path(c.manifest(tmp_path / "adapters.txt"))
    told = evidence_product.whole(sources, "-k 3", places[0])
    again = evidence_product.killed(sources, "-k 3", told["seconds"] / 2, told["digest"], places[1])
    assert (again["killed"], again["same"], again["bytes"]) == (True, True, told["bytes"])


def test_noise_is_a_hundredth_of_each_tensor(tmp_path: Path) -> None:
    folders = [Path(p) for p in make_collection(tmp_path / "originals", 2)]
    evidence_product.noisy(folders, 3, tmp_path / "copies")
    found = sorted((tmp_path / "copies").iterdir())
    assert len(found) == 6
    assert len({evidence_product.digest(folder) for folder in found}) == 6
    x, y = (em.tensors_of(folder) for folder in (folders[0], tmp_path / "copies" / f"{folders[0].name}-2"))
    for key in x:
        assert np.linalg.norm(x[key] - y[key]) / np.linalg.norm(x[key]) == pytest.approx(0.01, rel=0.6)


def test_what_cannot_be_done_is_told_and_not_raised(tmp_path: Path) -> None:
    c = collection(tmp_path, 2)
    with pytest.raises(evidence.Left, match="failed"):
        evidence.ours(c, ("-k", "3", "--max-error", "0.1"), tmp_path)


def test_ratios_count_every_file_but_what_is_verbatim(tmp_path: Path) -> None:
    import coded_ratios

    folders = [Path(p) for p in make_collection(tmp_path, 2)]
    lora = sum(em.bytes_of(folder).lora for folder in folders)
    times, worst = coded_ratios.measured(folders, 0.3)
    assert 0.25 < worst <= 0.3
    assert times == sorted(times)  # all files, without share_config.json, the codes alone
    files, without, codes = (lora / t for t in times)
    assert 1000 < files - without < 10_000
    assert codes < without
