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

from .conftest import make_collection, write_adapter

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import evidence_measure as em  # noqa: E402
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
    adapters = {str(i): adapter(i, {"q": 3, "v": 2}) for i in range(2)}
    adapters["zero"] = {"q": em.Module(np.ones((2, 11)), np.zeros((7, 2)), 1.0)}
    found, spent = em.truncated(adapters, budget)
    assert spent <= budget
    assert spent == sum(4 * (m.a.size + m.b.size) for a in found.values() for m in a.values())
    assert found["zero"] == {}
    mean = np.mean([em.dw_error(adapters[i], found[i]) ** 2 for i in "01"])
    values = {(i, n): np.linalg.svd(x, compute_uv=False) for i in "01" for n, x in dense(adapters[i]).items()}
    norms = {i: sum(np.sum(v**2) for (j, _), v in values.items() if j == i) for i in "01"}

    def left(ranks: tuple[int, ...]) -> float:
        """Mean squared error with a rank for each module of each adapter."""
        kept = zip(values.items(), ranks, strict=True)
        return sum(float(np.sum(v[t:] ** 2)) / norms[i] for ((i, _), v), t in kept) / 2

    every = itertools.product(range(4), range(3), range(4), range(3))
    best = min(left(ranks) for ranks in every if sum(ranks) * 4 * 18 <= budget)
    assert mean == pytest.approx(best, abs=1e-9)


def test_int8_is_off_by_half_a_step_of_its_column_at_most() -> None:
    x = (np.random.default_rng(0).standard_normal((50, 6)) * 10.0 ** np.arange(-3, 3)).astype(np.float32)
    x[:, 2] = 0
    back, size = em.int8(x)
    assert size == x.size + 4 * x.shape[1]
    assert np.all(np.abs(x - back) <= np.abs(x).max(axis=0) / 127 / 2 * (1 + 1e-5))
    assert np.all(back[:, 2] == 0)
    again, _ = em.int8(back)
    assert np.allclose(again, back, rtol=1e-6)
    coarse, size = em.integers(x, 4)
    assert size == x.size // 2 + 4 * x.shape[1]
    assert np.all(np.abs(x - coarse) <= np.abs(x).max(axis=0) / 7 / 2 * (1 + 1e-5))
    assert all(len(np.unique(column)) <= 15 for column in coarse.T)
    half, size = em.bfloat16(x)
    assert size == 2 * x.size
    assert np.all(np.abs(half - x) <= 2.0**-8 * np.abs(x))


def row(collection: str, system: str, setting: float, lora: int, mean: float, **more: Any) -> dict[str, Any]:
    errors = {"a": mean, "b": mean}
    facts = {"kind": "row", "collection": collection, "system": system, "setting": setting, "errors": errors}
    size = {"lora": lora, "verbatim": 0, "extras": 10, "other": 10, "apart": None}
    return facts | size | dict.fromkeys(("mean", "median", "p95", "max"), mean) | more


def fake() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"kind": "collection", "collection": name, "adapters": 2, "zero": ["z"] if name == "minilm" else [],
         "lora": 10**6, "verbatim": 0, "extras": 10**4, "other": 10**3, "ranks": [8], "modules": 4}
        for name in ("minilm", "trained")
    ]  # fmt: skip
    told = {"accuracy": {"a": 0.75, "b": 0.68}, "agreement": {"a": 0.9, "b": 0.85}}
    for name, more in (("minilm", {}), ("trained", told)):
        lines += [
            row(name, "coded", 0.1, 99_990, 0.1, apart=2e-6, **more),
            row(name, "coded", 0.4, 9_990, 0.4, apart=1e-6, **more),
            row(name, "-k", 8, 199_990, 0.3, **more),
            row(name, "lorashare", 8, 199_990, 0.6, **more),
            row(name, "int4", 0, 125_000, 0.12, **more),
            row(name, "int3", 0, 9_000, 0.38, **more),
        ]
    lines.append({"kind": "left", "collection": "minilm", "system": "vlora", "setting": 2, "why": "no such thing"})
    lines.append({"kind": "originals", "collection": "trained", "accuracy": {"a": 0.8, "b": 0.7}, "texts": 256,
                  "classes": 4})  # fmt: skip
    return [{"run": "here", "at": "2026-01-01", **x} for x in lines]


def test_the_page_says_yes_and_no_and_keeps_what_was_written_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    evidence_report.render(fake(), page)
    text, tables = page.read_text(), (tmp_path / "evidence-tables.md").read_text()
    assert "| coded: every adapter's measured error over its limit E, at most 1 | 1 | yes |" in text
    assert "| certified errors are what is measured, to 1e-5 | 2e-06 | yes |" in text
    assert "| minilm: -k over lorashare's mean error at the same k, at most 1 | 0.5 | yes |" in text
    assert "at the rival's mean error; times, least (int3) | 0.826 | **no** |" in text
    assert "| minilm | coded |  | 10.0 | 45.8 | 100.0 |" in text
    assert "| minilm | int4 | 8.0 at 0.120 | | | |" in text
    assert "| coded | E = 0.1 | 10.0 | 10.1 | 0.100 | 0.100 | 0.715 | +3.5 ± 1.5 | 0.875 | 0.850 |" in text
    assert "of which 1 with dW = 0" in tables
    assert "| -k | k = 8 | 0.200 | 0.000 | 0.000 | 0.000 | 5.0 | 5.1 | 0.300 | 0.300 | 0.300 | 0.300 |" in tables
    assert "- vlora, minilm: no such thing." in tables
    assert (tmp_path / "evidence.svg").read_text().count("<polyline") == 4  # coded, -k, lorashare, integers
    page.write_text(text.replace("<!-- keep summary -->\n", "<!-- keep summary -->\nWritten by hand.\n"))
    evidence_report.render(fake(), page)
    assert "Written by hand." in page.read_text()


def test_an_adapter_above_the_limit_is_told(tmp_path: Path) -> None:
    lines = fake()
    lines[2]["errors"]["b"] = 0.101
    evidence_report.render(lines, tmp_path / "evidence.md")
    assert "over its limit E, at most 1 | 1.01 | **no** |" in (tmp_path / "evidence.md").read_text()


def test_times_smaller_between_measured_errors() -> None:
    about = {"lora": 1000}
    rows = [row("c", "-k", k, size, error) for k, size, error in ((1, 90, 0.4), (2, 390, 0.1), (3, 490, 0.2))]
    points = evidence_report.curve(rows, about, "-k")
    assert points == [(0.1, 2.5), (0.4, 10.0)]  # what is larger and worse is no point
    assert evidence_report.at(points, 0.2) == pytest.approx(5.0)
    assert evidence_report.at(points, 0.05) is None
    assert evidence_report.at(points, 0.9) is None


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


def test_even_adapters_share_a_seed() -> None:
    seeds = [train_adapters.seed_of(i) for i in range(8)]
    assert len(set(seeds[::2])) == 1
    assert len(set(seeds[1::2])) == 4


def test_a_checkpoint_measured_here_is_as_certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evidence

    monkeypatch.setattr(evidence, "BUILD", tmp_path)
    make_collection(tmp_path / "adapters", 6)
    zero = Path(tmp_path / "adapters" / "zero")
    tensors = {f"base_model.model.layers.0.q.lora_{s}.weight": x for s, x in
               (("A", np.ones((4, 40), np.float32)), ("B", np.zeros((24, 4), np.float32)))}  # fmt: skip
    write_adapter(zero, tensors)
    c = evidence.Collection("here", tmp_path / "adapters")
    for number, (work, exact) in enumerate([
        (lambda s: evidence.ours(c, {"num_components": 3}, s), False),
        (lambda s: evidence.lorashare(c, 3, s), False),
        (lambda s: evidence.ours(c, {"num_components": 1000}, s), True),
        (lambda s: evidence.ours(c, {"max_error": 0.2}, s), False),
    ]):  # fmt: skip
        scratch = tmp_path / str(number)
        scratch.mkdir()
        found = work(scratch)
        errors = {i: em.dw_error(c.adapters[i], found.adapters[i]) for i in c.adapters}
        assert np.isnan(errors["zero"])
        assert (em.statistics(errors)["max"] < 1e-4) is exact
        for name, claim in found.facts.get("claims", {}).items():
            assert np.isnan(errors[name]) or abs(claim - errors[name]) < 1e-5
        # Heads of a coded checkpoint are stored without loss, in planes; with them, the factors without any dW.
        assert 0 < found.bytes.extras <= c.bytes.extras + (number == 3) * sum(t.nbytes for t in tensors.values())
        assert number == 3 or found.bytes.extras == c.bytes.extras
        if number == 3:
            assert em.statistics(errors)["max"] <= 0.2
            size = sum(p.stat().st_size for p in (scratch / "out").rglob("*") if p.is_file())
            assert sum(found.bytes.as_dict().values()) == size


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
