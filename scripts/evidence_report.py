"""Two pages from the JSON lines of one run, evidence.md and evidence-tables.md: for scripts/evidence.py --render.

Text between `<!-- keep NAME -->` and `<!-- /keep -->` of the first is written by hand and survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_report
import evidence_chart
import numpy as np

Line = dict[str, Any]
KEPT = {"summary": "", "limits": ""}
METHOD = """\
- **Error**: ||dW - dW^|| / ||dW|| of an adapter over all its modules together, in float64, from what is on the disk
  (`scripts/evidence_measure.py`, which shares no code with the library). Adapters with dW = 0 have none. Ours and
  lorashare are saved, opened, reconstructed into PEFT folders, and those are read.
- **Times smaller**: LoRA bytes of the originals over all files less heads: codes or bases and loadings, records,
  configurations, headers. Of what is computed here (integers, SVD) the numbers alone are counted, which favours it.
  *All*: every byte on the disk against every byte of the originals, heads and configurations too.
- **coded**: `compress --max-error E`. **-k**: SHARE with k components. **lorashare** 0.1.3, **vlora**: with their k
  (vlora flattens a tensor to one vector, so that its k is none of ours, and needs equal ranks).
- **bfloat16, int8, int4, int3**: A and B rounded, integers symmetric with a float32 scale for each of the r vectors.
- **SVD**: each adapter's own truncated SVD, triples taken where they keep most of ||dW||^2 per byte over all modules
  and adapters: the best that any choice of ranks can do. **SVD, int8**: the same in int8, at the same bytes.
- **trained**: MiniLM adapters of `scripts/train_adapters.py`, r = 8 on query and value, each on a task of its own:
  which of four packages is a paragraph of documentation from? Half share one initial A, half have a seed each.
  Accuracy and agreement (same prediction as by the original adapter) are on held-out files."""
ERRORS = (0.05, 0.1, 0.25, 0.4)  # at which systems are compared
ORDER = ("coded", "-k", "lorashare", "vlora", "SVD", "SVD, int8", "bfloat16", "int8", "int4", "int3")
NOT_FILES = ("bfloat16", "int", "SVD")  # begins of systems whose numbers alone are counted


def render(lines: list[Line], path: Path) -> None:
    """Write the page at `path`, the tables beside it, and the chart."""
    kept = {**KEPT, **dict(bench_report.KEEP.findall(path.read_text()))} if path.exists() else KEPT
    tables, chart = path.with_name(f"{path.stem}-tables.md"), path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_page(lines, kept, chart.name, tables.name)).rstrip() + "\n")
    tables.write_text("\n".join(_tables(lines, path.name)).rstrip() + "\n")
    for original in (x for x in lines if x["kind"] == "originals"):
        about = _about(lines, original["collection"])
        rows = [x for x in _rows(lines, original["collection"]) if "agreement" in x]
        points = [(x["system"], fewer(x, about), _mean(x["agreement"]), x["setting"]) for x in rows]
        chart.write_text(evidence_chart.chart(points, original["texts"], len(original["accuracy"])))


def _page(lines: list[Line], kept: Mapping[str, str], chart: str, tables: str) -> Iterator[str]:
    yield from ("# Evidence", "")
    yield f"Written by `scripts/evidence.py --render`, but for the text between the marks. [All rows]({tables})."
    yield from ("", f"<!-- keep summary -->\n{kept['summary']}<!-- /keep -->", "")
    yield from (f"![Agreement with the original adapter against how many times smaller]({chart})", "")
    for original in (x for x in lines if x["kind"] == "originals"):
        yield from _task(lines, original)
    yield from _at_errors(lines)
    yield from _checks(lines)
    yield from ("## How it is measured", METHOD, "", *bench_report._machine(lines))
    yield f"<!-- keep limits -->\n{kept['limits']}<!-- /keep -->"


def _rows(lines: list[Line], name: str) -> list[Line]:
    rows = [x for x in lines if x["kind"] == "row" and x["collection"] == name]
    return sorted(rows, key=lambda x: ORDER.index(x["system"]))


def _names(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(x["collection"] for x in lines if x["kind"] == "row"))


def _about(lines: list[Line], name: str) -> Line:
    return next(x for x in reversed(lines) if x["kind"] == "collection" and x["collection"] == name)


def fewer(row: Line, about: Line) -> float:
    """How many times fewer bytes than the LoRA bytes of the originals."""
    beside = 0 if row["system"].startswith(NOT_FILES) else row["other"]
    return float(about["lora"] / (row["lora"] + row["verbatim"] + beside))


def _all_fewer(row: Line, about: Line) -> float:
    kinds = ("lora", "verbatim", "extras", "other")
    return float(sum(about[kind] for kind in kinds) / sum(row[kind] for kind in kinds))


def _task(lines: list[Line], original: Line) -> Iterator[str]:
    """What it does to the task: error, accuracy and agreement against bytes."""
    name, about = original["collection"], _about(lines, original["collection"])
    right = np.array(list(original["accuracy"].values()))
    yield f"## {name}: what it does to the task"
    yield f"{about['adapters']} adapters, {original['texts']:,} held-out texts of {original['classes']} classes."
    yield f"Originals: accuracy {right.mean():.3f}. Means over adapters, and the worst adapter's."
    yield "*Fall*: mean loss of accuracy in points, with its standard error over adapters."
    yield ""
    yield "| system | setting | times smaller | all | error | worst | accuracy | fall | agreement | worst |"
    yield "|---" * 10 + "|"
    for x in (x for x in _rows(lines, name) if "agreement" in x):
        falls = 100 * (right - np.array([x["accuracy"][i] for i in original["accuracy"]]))
        error = falls.std(ddof=1) / np.sqrt(len(falls)) if len(falls) > 1 else float("nan")
        cells = [x["system"], _setting(x), f"{fewer(x, about):.1f}", f"{_all_fewer(x, about):.1f}"]
        cells += [_error(x["mean"]), _error(x["max"]), f"{_mean(x['accuracy']):.3f}"]
        cells += [f"{falls.mean():+.1f} ± {error:.1f}", f"{_mean(x['agreement']):.3f}"]
        cells.append(f"{min(x['agreement'].values()):.3f}")
        yield f"| {' | '.join(cells)} |"
    yield ""


def curve(rows: list[Line], about: Line, system: str) -> list[tuple[float, float]]:
    """(mean error, times smaller) of a system, where a larger error is fewer bytes."""
    points = sorted((x["mean"], fewer(x, about)) for x in rows if x["system"] == system)
    return [p for i, p in enumerate(points) if all(q[1] < p[1] for q in points[:i])]


def at(points: list[tuple[float, float]], error: float) -> float | None:
    """Times smaller at a mean error, linear in logarithms between measured ones."""
    if len(points) < 2 or not 0.98 * points[0][0] <= error <= 1.02 * points[-1][0] or points[0][0] <= 0:
        return None
    errors, times = (np.log(v) for v in zip(*points, strict=True))
    return float(np.exp(np.interp(np.log(error), errors, times)))


def _at_errors(lines: list[Line]) -> Iterator[str]:
    yield "## Times smaller at the same mean error"
    yield "Between measured ones; empty where a system was not measured so near, or so far."
    yield ""
    yield f"| collection | system | {' | '.join(f'{e:g}' for e in ERRORS)} |"
    yield "|---" * (len(ERRORS) + 2) + "|"
    for name in _names(lines):
        rows, about = _rows(lines, name), _about(lines, name)
        for system in dict.fromkeys(x["system"] for x in rows):
            found = [at(curve(rows, about, system), e) for e in ERRORS]
            if any(found):
                yield f"| {name} | {system} | {' | '.join('' if t is None else f'{t:.1f}' for t in found)} |"
        for x in (x for x in rows if x["system"].startswith(("int", "bfloat16"))):
            yield f"| {name} | {x['system']} | {fewer(x, about):.1f} at {_error(x['mean'])} | | | |"
    yield ""


def _checks(lines: list[Line]) -> Iterator[str]:
    yield from ("## Checks", "| claim | measured | holds |", "|---|---|---|")
    rows = [x for x in lines if x["kind"] == "row"]
    over = [max(e for e in x["errors"].values() if not np.isnan(e)) / x["setting"] for x in rows if _is_coded(x)]
    if over:
        yield _check(
            "coded: every adapter's measured error over its limit E, at most 1", max(over), max(over) <= 1.00001
        )
    apart = [x["apart"] for x in rows if x.get("apart") is not None]
    if apart:
        yield _check("certified errors are what is measured, to 1e-5", max(apart), max(apart) <= 1e-5)
    for name in _names(lines):
        here, about = _rows(lines, name), _about(lines, name)
        ours = curve(here, about, "coded")
        ratios = {
            f"{x['system']} {_setting(x)}".strip(): own / fewer(x, about)
            for x in here
            if not _is_coded(x) and (own := at(ours, x["mean"])) is not None
        }
        if ratios:
            nearest = min(ratios, key=lambda rival: ratios[rival])
            claim = f"{name}: coded is smaller than every rival at the rival's mean error; times, least ({nearest})"
            yield _check(claim, ratios[nearest], ratios[nearest] > 1)
        peers = {x["setting"]: x["mean"] for x in here if x["system"] == "lorashare" and x["mean"] > 1e-6}
        same = {
            x["setting"]: x["mean"] / peers[x["setting"]] for x in here if x["system"] == "-k" and x["setting"] in peers
        }
        if same:
            yield _check(
                f"{name}: -k over lorashare's mean error at the same k, at most 1",
                max(same.values()),
                max(same.values()) <= 1,
            )
    yield ""


def _check(claim: str, measured: float, holds: bool) -> str:
    return f"| {claim} | {measured:.3g} | {'yes' if holds else '**no**'} |"


def _tables(lines: list[Line], page: str) -> Iterator[str]:
    yield from (
        "# Evidence: all rows",
        "",
        f"Written by `scripts/evidence.py --render`; words as in [evidence]({page}).",
        "",
    )
    for name in _names(lines):
        about = _about(lines, name)
        zero = f", of which {len(about['zero'])} with dW = 0" if about["zero"] else ""
        yield f"## {name}"
        yield f"{about['adapters']} adapters{zero}; ranks {', '.join(map(str, about['ranks']))};"
        yield f"{about['modules']} modules; LoRA {_mb(about['lora'])} MB,"
        yield f"heads and other extras {_mb(about['extras'])} MB, headers and configurations {_mb(about['other'])} MB."
        yield ""
        yield "| system | setting | LoRA, MB | kept | heads | other | times smaller | all | mean | median | p95 | max |"
        yield "|---" * 12 + "|"
        for x in _rows(lines, name):
            sizes = " | ".join(_mb(x[kind]) for kind in ("lora", "verbatim", "extras", "other"))
            errors = " | ".join(_error(x[key]) for key in ("mean", "median", "p95", "max"))
            times = f"{fewer(x, about):.1f} | {_all_fewer(x, about):.1f}"
            yield f"| {x['system']} | {_setting(x)} | {sizes} | {times} | {errors} |"
        yield ""
    yield from _left(lines)


def _left(lines: list[Line]) -> Iterator[str]:
    told: dict[tuple[str, str], list[str]] = {}
    for x in lines:
        if x["kind"] == "left":
            told.setdefault((x["system"], x["why"]), []).append(x["collection"])
        if x["kind"] == "row" and "refuses" in x:
            why = f"refuses by itself ({x['refuses'].lower()}); run without its check of configurations"
            told.setdefault((x["system"], why), []).append(x["collection"])
    if told:
        yield "## Left out, or helped"
        yield from (f"- {system}, {', '.join(dict.fromkeys(names))}: {why}." for (system, why), names in told.items())


def _is_coded(row: Line) -> bool:
    return bool(row["system"] == "coded")


def _setting(row: Line) -> str:
    name = {"coded": "E", "-k": "k", "lorashare": "k", "vlora": "k", "SVD": "1/", "SVD, int8": "1/"}.get(row["system"])
    return "" if name is None else f"{name}{row['setting']:g}" if name == "1/" else f"{name} = {row['setting']:g}"


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3f}"
