"""What shows and measures a coded checkpoint: plan, info, verify, reconstruction_error, report."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorashare_stream.checkpoint.config import read_share_config
from lorashare_stream.checkpoint.format import total_bytes
from lorashare_stream.cli.app import main
from lorashare_stream.model import SHAREModel
from lorashare_stream.pipeline import plan_for
from lorashare_stream.plan.sources import resolve
from lorashare_stream.report.forecast import forecast_of
from lorashare_stream.report.text import summary_text
from lorashare_stream.settings import Settings
from lorashare_stream.stages import verify as verifying
from lorashare_stream.stages.verify import Verdict, originals_of, verify

from .conftest import factor_keys, load_tensors, make_collection, make_tensors, write_adapter
from .fakehub import FakeHub, patched
from .mixed import mixed_collection

Compress = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
MODULES = {f"layers.{i}.{kind}": (96, 64) for i in range(3) for kind in "qv"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coded checkpoint, out, of the mixed collection, in."""
    root = tmp_path_factory.mktemp("mixed")
    folders = mixed_collection(root / "in")
    assert main(["compress", *folders, "-o", str(root / "out"), "--max-error", "0.2", "-q", "--device", "cpu"]) == 0
    return root


def varied(root: Path, n: int) -> list[str]:
    """Adapters of several ranks and spectra, some with a head of their own, all with one tensor in common."""
    rng, folders = np.random.default_rng(n), []
    common = {"base_model.model.common.weight": rng.standard_normal((5, 30)).astype(np.float32)}
    for i in range(n):
        r = int(rng.choice([2, 4, 8]))
        tensors = make_tensors(rng, MODULES, r=r) | common
        decay = rng.uniform(0.3, 1.0) ** np.arange(r)
        tensors = {k: (t * decay).astype(np.float32) if "lora_B" in k else t for k, t in tensors.items()}
        if i % 3:
            tensors["base_model.model.head.weight"] = rng.standard_normal((2, 32)).astype(np.float32)
        folders.append(str(write_adapter(root / f"a{i:03}", tensors, r=r, lora_alpha=2 * r)))
    return folders


def as_used(limit: dict[str, float], ours: dict[str, Any]) -> Settings:
    """The limit; one of bytes as those that came of it, which may be a few per cent fewer."""
    return Settings.from_mapping(limit if "max_error" in limit else {"max_bytes": total_bytes(ours["bytes"])})


def verdicts(out: Path, folders: list[str]) -> dict[str, Verdict]:
    model = SHAREModel.from_pretrained(out)
    return {v.name: v for v in verify(model, originals_of(model, resolve(folders)))}


def test_a_summary_says_what_is_coded_and_nothing_of_bases(
    tmp_path: Path, compressed: Compress, capsys: Capture
) -> None:
    folders = make_collection(tmp_path / "in", 6)
    for limit, asked in (({"max_error": 0.2}, "at most 0.2"), ({"ratio": 3.0}, "3 times smaller")):
        out = compressed(folders, f"out{len(limit)}{asked[0]}", **limit)
        config, text = read_share_config(out), summary_text(read_share_config(out))
        size = config.ours["bytes"]
        assert re.search(r"coded modules +3 \(q, v\)", text)
        assert re.search(rf"asked for .*{asked}", text)
        assert ("step " in text) == ("ratio" in limit)
        assert not re.search("component|explained|basis|bases|share|objective|k;", text)
        assert total_bytes(size) == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        assert all(f"  {part} " in text for part in ("codes", "verbatim", "metadata"))
        SHAREModel.from_pretrained(out).summary()
        assert capsys.readouterr().out == text + "\n"
        assert main(["info", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["coded"] == config.coded
        assert told["errors"] == config.ours["errors"]


def test_a_limit_speaks_neither_of_sharing_nor_of_moments(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    folders = make_collection(tmp_path / "in", 3)
    with caplog.at_level(logging.INFO):
        assert main(["compress", *folders, "-o", str(tmp_path / "out"), "--max-error", "0.2"]) == 0
        assert main(["plan", *folders, "--max-error", "0.2"]) == 0
    captured = capsys.readouterr()
    assert not re.search("share[sd]|moment|bas[ie]s", captured.out + captured.err + caplog.text)


def test_what_is_measured_is_what_is_certified(mixed: Path) -> None:
    found = verdicts(mixed / "out", sorted(map(str, (mixed / "in").iterdir())))
    assert len(found) == len(list((mixed / "in").iterdir()))
    for v in found.values():
        assert v.problem is None, v
        assert v.relative_error == pytest.approx(v.certified, rel=1e-6, abs=1e-9)
        assert v.relative_error <= 0.2 * (1 + 1e-6)
    assert found["zero"].relative_error == 0
    assert found["plain"].relative_error > 0.19


def test_a_false_certificate_is_seen(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certified = SHAREModel.certified

    def better(self: SHAREModel, name: str) -> dict[str, object]:
        facts = certified(self, name)
        return facts | {"relative_error": facts["relative_error"] * (1 - 1e-5)} if name == "plain" else facts

    monkeypatch.setattr(SHAREModel, "certified", better)
    found = verdicts(mixed / "out", [str(mixed / "in" / name) for name in ("plain", "off")])
    assert "claims a relative error" in str(found["plain"].problem)
    assert found["off"].problem is None


def test_damaged_packs_are_named_and_other_adapters_verified(mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    sources = ["--sources", str(mixed / "in"), "--json"]
    whole = SHAREModel.from_pretrained(mixed / "out")
    at = whole._open_reader().index.adapters["plain"].code
    for offset, bad in ((at.offset + at.nbytes // 2, {"plain"}), (12, set())):  # of a code, and of the header
        out = tmp_path / f"out{offset}"
        shutil.copytree(mixed / "out", out)
        pack = out / at.pack.file
        data = bytearray(pack.read_bytes())
        data[offset] ^= 4
        pack.write_bytes(data)
        assert main(["verify", str(out), *sources]) == 1
        captured = capsys.readouterr()
        told = json.loads(captured.out)
        assert told["damaged"] == [f"{at.pack.file} is damaged"]
        assert at.pack.file in captured.err
        assert {v["name"] for v in told["adapters"] if v["problem"]} == bad
    assert main(["verify", str(mixed / "out"), *sources]) == 0
    assert json.loads(capsys.readouterr().out)["damaged"] == []


def test_many_modules_are_measured_together(
    tmp_path: Path, compressed: Compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = {f"layers.0.experts.{i}.{kind}": (8, 6) for i in range(60) for kind in ("gate", "up")}
    rng = np.random.default_rng(0)
    folders = [str(write_adapter(tmp_path / "in" / f"a{i}", make_tensors(rng, modules, r=2), r=2)) for i in range(2)]
    calls: list[int] = []
    for name in ("delta_errors", "errors_of_products"):
        real = getattr(verifying, name)
        monkeypatch.setattr(verifying, name, lambda a, *rest, real=real: calls.append(len(a)) or real(a, *rest))
    for options in ({"num_components": 2}, {"max_error": 0.1}):
        out = compressed(folders, f"out{len(calls)}", **options)
        calls.clear()
        assert all(v.problem is None for v in verdicts(out, folders).values())
        assert calls == [120, 120]


def test_reconstruction_error_of_what_is_coded_is_of_dw(mixed: Path) -> None:
    model = SHAREModel.from_pretrained(mixed / "out")
    for name in ("plain", "experts", "bfloat16"):
        found = model.reconstruction_error(name, original_path=str(mixed / "in" / name))
        worst = model.certified(name)
        assert found["delta_relative"] == pytest.approx(worst["relative_error"], rel=1e-5)
        assert found["per_layer"] == found["delta_per_module"]
        assert found["max"] == found["per_layer"][worst["worst_module"]]
        assert found["max"] == pytest.approx(worst["worst_module_error"], rel=1e-5)
        assert found["mean"] == pytest.approx(np.mean([*found["per_layer"].values()]))


def test_the_page_of_a_coded_checkpoint(mixed: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert main(["report", str(mixed / "out"), "-o", str(page)]) == 0
    text = page.read_text()
    config = read_share_config(mixed / "out")
    for key in ("mean", "median", "p95", "max"):
        assert f"{config.ours['errors'][key]:.4f}" in text
    for worst in config.ours["errors"]["worst"]:
        assert worst["name"] in text
    for what in (
        config.coded["index"],
        config.ours["digest"],
        "A coded checkpoint",
        "at most 0.2",
        "Error against bytes",
        "Times smaller",
    ):
        assert what in text
    shown = re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search("spectr[ua] by|loadings|eigenvalue|k = |bases by|SHARE checkpoint", shown, re.IGNORECASE)
    assert str(mixed) not in text
    path = tmp_path / "out" / "share_config.json"
    shutil.copytree(mixed / "out", path.parent)
    broken = json.loads(path.read_text())
    del broken["compression_stats"]["lorashare_stream"]["bytes"]["codes"]
    path.write_text(json.dumps(broken))
    assert main(["report", str(path.parent), "-o", str(page)]) == 1


@pytest.mark.parametrize("limit", [{"max_error": 0.15}, {"ratio": 20.0}])
def test_a_forecast_of_all_adapters_is_the_truth(tmp_path: Path, compressed: Compress, limit: dict[str, float]) -> None:
    folders = varied(tmp_path / "in", 12)
    ours = SHAREModel.from_pretrained(compressed(folders, **limit)).config.ours
    forecast = forecast_of(plan_for(resolve(folders), as_used(limit, ours)))
    size, near = ours["bytes"], 1e-9 if "max_error" in limit else 0.15  # of few bytes, of which paths are a part
    assert forecast.codes.value == pytest.approx(size["codes"], rel=near)
    assert forecast.verbatim.value == pytest.approx(size["verbatim"], rel=1e-9)
    assert forecast.metadata == pytest.approx(size["metadata"], rel=0.1)
    assert forecast.error.value == pytest.approx(ours["errors"]["mean"], rel=1e-6 if "max_error" in limit else 0.1)
    assert forecast.worst == pytest.approx(ours["errors"]["max"], rel=1e-6 if "max_error" in limit else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [{"max_error": 0.3}, {"max_error": 0.1}, {"ratio": 15.0}])
def test_the_truth_is_inside_the_interval_of_a_sample(
    tmp_path: Path, compressed: Compress, limit: dict[str, float]
) -> None:
    folders = varied(tmp_path / "in", 60)
    ours = SHAREModel.from_pretrained(compressed(folders, **limit)).config.ours
    plan, inside = plan_for(resolve(folders), as_used(limit, ours)), []
    for count in range(10, 22):  # samples are evenly spaced: another number is another sample
        f = forecast_of(plan, count)
        assert f.sample == count
        value, truth = (
            (f.total, total_bytes(ours["bytes"])) if "max_error" in limit else (f.error, ours["errors"]["mean"])
        )
        inside.append(abs(value.value - truth) <= value.margin)
        assert 0 < value.margin < truth
    assert sum(inside) >= 10, inside


def test_plan_shows_the_forecast_and_the_curve(tmp_path: Path, capsys: Capture) -> None:
    folders = varied(tmp_path / "in", 6)
    made = tmp_path / "plan.json"
    assert main(["plan", *folders, "--max-error", "0.25", "-o", str(made)]) == 0
    text = capsys.readouterr().out
    assert "foretold from" in text
    assert "6 adapters of 6" in text
    saved = json.loads(made.read_text())["forecast"]
    curve = saved["curve"]
    assert [p["error"] for p in curve] == [0.02, 0.05, 0.1, 0.25, 0.4, 0.6]
    sizes = [p["codes"] for p in curve]
    assert sizes == sorted(sizes, reverse=True)
    assert curve[3]["codes"] == pytest.approx(saved["codes"]["value"], rel=0.05)
    assert f"{curve[0]['times']:.1f}" in text
    assert main(["compress", "--plan", str(made), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert main(["plan", *folders, "--max-error", "0.25", "--sample", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["forecast"]
    assert (told["sample"], told["adapters"]) == (3, 6)
    assert told["codes"]["margin"] > 0
    assert main(["plan", *folders, "--sample", "3"]) == 2


def test_a_forecast_leaves_out_what_cannot_be_compressed(tmp_path: Path, capsys: Capture) -> None:
    folders = varied(tmp_path / "in", 3)
    bad = load_tensors(folders[1])
    bad[factor_keys("layers.0.q")[0]][0, 0] = np.nan
    write_adapter(Path(folders[1]), bad, r=len(bad[factor_keys("layers.0.q")[0]]))
    assert main(["plan", *folders, "--max-error", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "2 adapters of 3" in text
    assert re.search(r"cannot be compressed:\n.*a001", text)


def test_adapters_of_the_hub_are_fetched_for_a_forecast_only_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    folders = varied(tmp_path / "in", 3)
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        files = {p.name: p.read_bytes() for p in Path(folders[0]).iterdir()}
        pin = f"org/x@{hub.add('org/x', files, base_model='tiny-base')}"
        hub.requests.clear()
        assert main(["plan", *folders[1:], pin, "--max-error", "0.25", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["forecast"]
        assert (told["sample"], told["unfetched"]) == (2, 1)
        assert all(r.range for r in hub.requests if (r.file or "").endswith(".safetensors"))
        assert main(["plan", pin, "--max-error", "0.25"]) == 0
        assert "--analyze fetches a sample" in capsys.readouterr().out
        assert main(["plan", *folders[1:], pin, "--max-error", "0.25", "--analyze", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["forecast"]
        assert (told["sample"], told["unfetched"]) == (3, 0)


def test_a_report_of_a_checkpoint_on_the_hub_fetches_no_pack(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = mixed / "out"
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        hub.add("org/coded", {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()})
        for command in (["info", "org/coded"], ["report", "org/coded", "-o", str(tmp_path / "r.html")]):
            assert main(command) == 0
        assert not hub.count(file="packs/*")
    assert main(["report", str(out), "-o", str(tmp_path / "s.html")]) == 0
    assert (tmp_path / "r.html").read_text() == (tmp_path / "s.html").read_text()
