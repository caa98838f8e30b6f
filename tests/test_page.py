"""The page of `lorashare-stream report`: what is on it, and what a real browser makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from lorashare_stream.adapters.keys import kind_and_depth
from lorashare_stream.checkpoint.location import Folder
from lorashare_stream.cli.app import main
from lorashare_stream.report import charts
from lorashare_stream.report.page import curve_of, findings_of, page

from .browser import Browser, chromium
from .conftest import make_collection
from .fakehub import FakeHub, patched
from .synthetic import synthetic

FIGURES = ["histogram", "bytes", "tradeoff", "spectrum", "heat.k", "heat.explained"]
OF_CODED = ["histogram", "bytes", "cloud"]
EVIL = ["<script>alert(1)<", "q\"uo'te onload=alert(1)", "rtl\u202eevil", "&lt;b&gt;", "x" * 190, "שלום"]
Compress = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def pages() -> Iterator[dict[str, Path]]:
    """Reports of one adapter, of ten thousand, of hostile strings, and of a coded checkpoint."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk may take a minute to drop so many files
    with tempfile.TemporaryDirectory(dir=memory) as root:
        yield made_pages(Path(root))


def made_pages(root: Path) -> dict[str, Path]:
    made = {}
    many = [f"someone--adapter-{i:05}" for i in range(10_000)]
    skipped = [{"adapter": name * 3, "reason": f"{name}: bad", "problem": f"rank {name}"} for name in EVIL]
    for name, adapters in (("one", ["only"]), ("many", many), ("evil", EVIL)):
        checkpoint = synthetic(root / name, adapters, hub=name != "one")
        if name == "evil":
            (checkpoint / "skipped.json").write_text(json.dumps(skipped))
            spoil(checkpoint)
        made[name] = root / f"{name}.html"
        begun = time.monotonic()
        assert main(["report", str(checkpoint), "-o", str(made[name])]) == 0
        assert time.monotonic() - begun < 120
    made["coded"], coded = root / "coded.html", str(root / "coded")
    folders = make_collection(root / "in", 6)
    (Path(folders[3]) / "adapter_config.json").write_text("{")
    command = ["compress", *folders, "-o", coded, "--max-error", "0.2", "-q", "--on-error", "skip"]
    assert main(command) == 3
    assert main(["report", coded, "-o", str(made["coded"])]) == 0
    return made


def spoil(checkpoint: Path) -> None:
    """Put hostile strings wherever a configuration has room for them."""
    path = checkpoint / "share_config.json"
    config = json.loads(path.read_text())
    ours = config["compression_stats"]["lorashare_stream"]
    config["base_model_name_or_path"] = ours["version"] = "".join(EVIL[:4])
    ours["removed"] = ours["projected"] = ours["verbatim_adapters"] = EVIL
    ours["digest"] = ours["components"] = EVIL[0]
    ours["settings"]["base_aliases"] = EVIL
    path.write_text(json.dumps(config))


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["one", "many", "evil", "coded"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_every_figure_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.open(pages[name], width)
    for opened in (False, True):
        browser.value(f"document.querySelectorAll('details').forEach(d => {{ d.open = {json.dumps(opened)} }})")
        assert browser.value("document.documentElement.scrollWidth") <= width, "the page can be moved sideways"
    for figure in OF_CODED if name == "coded" else FIGURES:
        boxes = f"[...document.querySelectorAll('.fig.{figure}')].map(e => e.getBoundingClientRect())"
        sizes = browser.value(f"{boxes}.map(r => [r.left, r.right, r.width, r.height])")
        assert sizes, figure
        assert all(x >= 0 and end <= width and w > 250 and h > 60 for x, end, w, h in sizes), (figure, sizes)
        drawn = f"[...document.querySelectorAll('.fig.{figure} :is(path, td, .bar i)')]"
        assert browser.value(f"{drawn}.filter(e => e.getBoundingClientRect().width > 0).length") > 0, figure
    outside = """[...document.querySelectorAll('svg.fig text')].filter(t => {
        const a = t.ownerSVGElement.getBoundingClientRect(), b = t.getBoundingClientRect();
        const wide = b.left < a.left - 4 || b.right > a.right + 14;
        return b.width && (wide || b.top < a.top - 6 || b.bottom > a.bottom + 6)
    }).map(t => t.ownerSVGElement.getAttribute('class') + ': ' + t.textContent)"""
    assert browser.value(outside) == []
    assert browser.told() == []
    assert browser.asked() == [pages[name].as_uri()]


@pytest.mark.parametrize("name", ["one", "many", "coded"])
def test_text_can_be_read_on_a_phone(browser: Browser, pages: dict[str, Path], name: str) -> None:
    browser.open(pages[name], 390)
    letters = "[...document.querySelectorAll('svg text, .fig div:not(.bar), .fig th, .fig caption')]"
    heights = browser.value(f"{letters}.map(t => t.getBoundingClientRect().height).filter(h => h > 0)")
    assert min(heights) >= 11  # of a line, of letters of about 10


def test_the_dark_page_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    shades = []
    for dark in (False, True):
        browser.open(pages["one"], 390, dark=dark)
        body = browser.value("getComputedStyle(document.body).backgroundColor + getComputedStyle(document.body).color")
        shades.append([sum(map(int, re.findall(r"\d+", colour))) for colour in body.split(")")[:2]])
    (light_ground, light_ink), (dark_ground, dark_ink) = shades
    assert light_ground > 700 > 150 > light_ink
    assert dark_ground < 150 < 600 < dark_ink


def test_hostile_strings_stay_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["evil"], 390)
    source = pages["evil"].read_text()
    assert browser.value("document.scripts.length") == 0
    found = browser.value("[...document.querySelectorAll('*')].flatMap(e => [e.localName, ...e.getAttributeNames()])")
    assert not {"script", "b", "onload", "src", "a"} & set(found)
    assert "alert(1)" in browser.value("document.body.innerText")
    assert source.replace("\n", "").isprintable()
    assert "<script" not in source
    assert "\\u202e" in source
    assert "שלום" in source
    assert browser.value("[...document.querySelectorAll('bdi')].some(e => e.textContent.includes('שלום'))")


def test_a_script_would_not_run(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """Were a string to slip through, the page's policy would still hold; and a browser that says so is listened to."""
    bad = tmp_path / "bad.html"
    evil = "<script>document.title='run'</script><img src='http://127.0.0.1:9/x'></body>"
    bad.write_text(pages["one"].read_text().replace("</body>", evil))
    browser.open(bad, 390)
    assert browser.value("document.title") != "run"
    assert len(browser.told()) >= 2


def test_the_page_does_not_grow_with_the_adapters(pages: dict[str, Path]) -> None:
    one, many = (pages[name].read_text() for name in ("one", "many"))
    assert len(many) < len(one) + 40_000 < 120_000
    assert many.count("someone--adapter-") <= 22
    assert "The worst 8 of 10,000" in many
    assert "The next 12" in many


def test_what_is_shown_is_what_is_recorded(collection: list[str], compressed: Compress, tmp_path: Path) -> None:
    out = compressed(collection, num_components=4)
    assert main(["report", str(out), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    ours = json.loads((out / "share_config.json").read_text())["compression_stats"]["lorashare_stream"]
    for value in (ours["errors"][key] for key in ("mean", "median", "p95", "max")):
        assert f"{value:.4f}" in text
    for worst in ours["errors"]["worst"]:
        assert worst["name"] in text
    for part in ("digest", "basis_digest", "components", "objective"):
        assert ours[part] in text
    assert str(tmp_path) not in text  # a page is sent to others
    assert main(["report", str(out), "-o", str(tmp_path / "r.html")]) == 0  # over the old one
    assert (tmp_path / "r.html").read_text() == text


def test_the_curve_ends_where_the_checkpoint_is(collection: list[str], compressed: Compress) -> None:
    """Bytes are those on disk, the bounds those that are recorded, and a smaller k as compressing with it gives."""
    wide = findings_of(Folder(compressed(collection, "wide", num_components=12)))
    curve = curve_of(wide)
    bounds = np.sqrt(wide.ours["errors"]["mean_square_bounds"])
    assert (curve.low[-1], curve.high[-1]) == pytest.approx(bounds, rel=1e-4, abs=1e-6)
    assert curve.bytes[-1] == wide.total
    assert (curve.low[0], curve.high[0]) == (1.0, 1.0)
    for k in (2, 4, 8):
        narrow = findings_of(Folder(compressed(collection, f"k{k}", num_components=k)))
        at = curve.k.tolist().index(k)
        rms = float(np.sqrt((narrow.errors**2).mean()))
        assert curve.low[at] - 1e-3 <= rms <= curve.high[at] + 1e-3
        assert curve.bytes[at] == pytest.approx(narrow.total, rel=0.02)


def test_other_objectives_have_no_bounds(
    browser: Browser, collection: list[str], compressed: Compress, tmp_path: Path
) -> None:
    out = compressed(collection, num_components=4, objective="factors", center=True)
    curve = curve_of(findings_of(Folder(out)))
    assert not curve.bounds
    assert (np.diff(curve.low) >= 0).all()
    assert main(["report", str(out), "-o", str(tmp_path / "r.html")]) == 0
    assert "Explained variance against bytes" in (tmp_path / "r.html").read_text()
    browser.open(tmp_path / "r.html", 390)
    assert browser.told() == []


def test_nothing_shared(tmp_path: Path) -> None:
    """Checkpoints that have no groups."""
    none = findings_of(Folder(synthetic(tmp_path / "none", ["a"], depths=0)))
    assert all(text in page(none) for text in ("Nothing is shared", "No adapter is compressed"))


def test_many_kinds_and_depths_are_bounded(tmp_path: Path) -> None:
    found = findings_of(Folder(synthetic(tmp_path / "deep", ["a"], k=2, depths=300, rank=1)))
    assert len(page(found)) < 300_000


def test_kinds_and_depths() -> None:
    assert kind_and_depth("model.layers.11.self_attn.q_proj") == ("q_proj", 11)
    assert kind_and_depth("down_blocks.2.attentions.1.to_out.0") == ("to_out.0", 2)
    assert kind_and_depth("q") == ("q", None)
    assert kind_and_depth("0") == ("0", None)
    assert kind_and_depth("a." + "9" * 5000 + ".b") == ("b", None)


def test_the_page_of_a_coded_checkpoint_has_errors_bytes_the_worst_and_what_was_left_out(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["coded"], 1200)
    shown = browser.value("document.body.innerText")
    titles = ("Distribution", "The worst 5 of 5", "By part", "Error against bytes, adapter by adapter")
    for text in (*titles, "asked for: a relative dW error of at most 0.2", "an adapter", "its worst module"):
        assert text in shown
    left_out = shown[shown.index("Adapters that were left out") : shown.index("Provenance")]
    assert "1 adapter, by reason." in left_out
    assert "adapter_config.json" in left_out
    cells = browser.value("[...document.querySelectorAll('.two td.n')].slice(0, 5).map(e => e.innerText)")
    worst = [float(text) for text in cells]
    assert 0.2 >= worst[0] > worst[-1] > 0
    assert worst == sorted(worst, reverse=True)


@pytest.mark.parametrize("name", ["one", "many", "coded"])
def test_figures_have_no_ids_and_no_colours_of_their_own(pages: dict[str, Path], name: str) -> None:
    """Several share a page, in a light or a dark window; and each says what it shows."""
    figures = re.findall(r'<svg class="fig.*?</svg>', pages[name].read_text(), re.DOTALL)
    assert len(figures) >= 2
    for figure in figures:
        assert 'role="img" aria-label="' in figure
        assert re.findall(r"(?:fill|stroke): var\(--[a-z]+\)", figure)
        for foreign in (" id=", "href", "#", "font-family", "<style", "nan"):
            assert foreign not in figure, foreign


def test_figures_are_the_same_whatever_matplotlib_is_told_and_in_threads() -> None:
    values = np.linspace(0.1, 0.3, 40)
    drawn = charts.histogram(values)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "lines.linewidth": 9}):
        assert charts.histogram(values) == drawn
        assert matplotlib.rcParams["font.size"] == 30
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(charts.histogram, [values] * 8)) == {drawn}


@pytest.mark.parametrize("values", [[0.0], [0.3], [0.25] * 40, [1e-7, 0.5], [1e-3, 0.5, 0.9], list(range(1, 90))])
def test_a_histogram_has_every_adapter_and_names_its_axes(values: list[float]) -> None:
    drawn = charts.histogram(np.array(values, dtype=float))
    assert sum(map(int, re.findall(r"<title>[^<]*: (\d+) adapters?</title>", drawn))) == len(values)
    texts = re.findall(r">([^<>]+)</text>", drawn)
    assert len([text for text in texts if re.fullmatch(r"[\d.e-]+", text)]) >= 4, texts
    assert ("relative dW error, log scale" in texts) == (0 < values[0] * 100 < values[-1])


def test_a_cloud_does_not_grow_with_the_adapters() -> None:
    rng = np.random.default_rng(0)
    drawn = {}
    for count in (1, 50, 10_000):
        times, errors = rng.gamma(9, 4, count), np.sort(rng.uniform(0, 0.4, count))[::-1]
        drawn[count] = charts.cloud(times, errors, 2 * errors, 0.4)
        dots = min(count, charts.DOTS)
        assert len(re.findall(r"M (\S+) (\S+) L \1 \2(?=[ \"])", drawn[count])) == 2 * dots
    assert len(drawn[10_000]) < 60_000


def test_a_report_says_what_it_lacks(tmp_path: Path) -> None:
    checkpoint = synthetic(tmp_path / "out", ["a"], depths=1)
    code = """
import sys
sys.modules["matplotlib"] = None
from lorashare_stream.cli.app import main
sys.exit(main(["report", sys.argv[1], "-o", sys.argv[2]]))
"""
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "drawn by matplotlib, and there is none. Install it by: pip install matplotlib" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.html").exists()


def test_a_checkpoint_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture, compressed: Compress
) -> None:
    """Only what a report needs is fetched: no loadings, no components."""
    out = compressed(make_collection(tmp_path / "adapters"), num_components=4)
    with FakeHub() as hub:
        patched(monkeypatch, hub, tmp_path / "home")
        files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        hub.add("org/share", files)
        assert main(["report", "org/share", "-o", str(tmp_path / "r.html"), "--json"]) == 0
        assert hub.count(file="*loadings*") == hub.count(file="*components*") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"report": str(tmp_path / "r.html"), "bytes": (tmp_path / "r.html").stat().st_size}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ours: ours.clear(), "lorashare wrote it"),
        (lambda ours: ours["bytes"].pop("basis"), "figures"),
        (lambda ours: ours["groups"].update({"q": {}}), "'groups.q.n'"),
        (lambda ours: next(iter(ours["groups"].values())).update(k=3), "figures"),
        (lambda ours: next(iter(ours["groups"].values())).update(energy=float("nan")), ".energy'"),
        (lambda ours: ours["bytes"].update(basis=float("inf")), "'bytes.basis"),
        (lambda ours: ours.update(dtype=["F32"]), "'dtype'"),
        (lambda ours: ours.update(settings=3), "'settings'"),
        (lambda ours: ours.update(num_skipped="some"), "'num_skipped'"),
        (lambda ours: ours.update(anything=3), "'anything'"),
        (lambda ours: ours.update(format=2, anything=3), "written by a newer version of lorashare-stream"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, capsys: Capture, change: Callable[[Any], Any], said: str) -> None:
    checkpoint = synthetic(tmp_path / "out", ["a", "b"], depths=1)
    config = json.loads((checkpoint / "share_config.json").read_text())
    change(config["compression_stats"]["lorashare_stream"])
    (checkpoint / "share_config.json").write_text(json.dumps(config))
    assert main(["report", str(checkpoint), "-o", str(tmp_path / "r.html")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_damaged_part_is_said(tmp_path: Path, capsys: Capture) -> None:
    checkpoint = synthetic(tmp_path / "out", ["a", "b"], depths=1)
    report = ["report", str(checkpoint), "-o", str(tmp_path / "r.html")]
    (checkpoint / "eigenvalues.safetensors").write_bytes(b"x" * 100)
    assert main(report) == 1
    assert "eigenvalues.safetensors cannot be read" in capsys.readouterr().err
    (checkpoint / "adapters" / "b" / "adapter_meta.json").write_text("{}")
    assert main(report) == 1
    assert "adapter 'b': adapter_meta.json is damaged" in capsys.readouterr().err
    config = json.loads((checkpoint / "share_config.json").read_text())
    (checkpoint / "share_config.json").write_text(json.dumps(config | {"adapter_names": ["../a"]}))
    assert main(report) == 1
    assert "no path components" in capsys.readouterr().err


def test_local_paths_do_not_leave_the_machine(tmp_path: Path) -> None:
    checkpoint = synthetic(tmp_path / "out", ["a"], depths=1, base_model="/home/alice/secret/base")
    config = json.loads((checkpoint / "share_config.json").read_text())
    config["base_model_name_or_path"] = "/home/alice/secret/base"
    (checkpoint / "share_config.json").write_text(json.dumps(config))
    place = "/home/alice/secret/bad"
    skipped = [{"reason": f"no such folder, found {place}", "problem": "no such folder", "source": place}]
    (checkpoint / "skipped.json").write_text(json.dumps(skipped))
    text = page(findings_of(Folder(checkpoint)))
    assert "alice" not in text
    assert "of <bdi>base</bdi>" in text
    assert "no such folder, found" in text


@pytest.mark.parametrize("name", ["share_config.json", "nowhere/r.html", "r"])
def test_where_a_report_may_be_written(tmp_path: Path, capsys: Capture, name: str) -> None:
    checkpoint = synthetic(tmp_path / "out", ["a"], depths=1)
    before = (checkpoint / "share_config.json").read_text()
    assert main(["report", str(checkpoint), "-o", str(checkpoint / name)]) == 2
    assert "report" in capsys.readouterr().err
    assert (checkpoint / "share_config.json").read_text() == before
