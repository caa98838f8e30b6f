"""Two pages from the JSON lines of one run, evidence.md and evidence-tables.md: for scripts/evidence.py --render.

Text between `<!-- keep NAME -->` and `<!-- /keep -->` is written by hand and survives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_report
import evidence_chart
import numpy as np
from scipy.interpolate import PchipInterpolator

Line = dict[str, Any]
Curve = list[tuple[float, float]]  # mean error, bytes
METHOD = """\
- **Error**: ||dW - dW^|| / ||dW|| of an adapter over all its modules together, in float64, of what is restored from the
  files on disk (`scripts/evidence_measure.py`, which shares no code with the library).
- **Times smaller**: LoRA bytes of the originals over all files less heads: codes or bases and loadings, records,
  configurations, headers. Of what is computed here (int, SVD, JD, ternary, LoRAQuant) the numbers and scales alone are
  counted, which favours it. *All*: every byte, heads and configurations too, against every byte of the originals.
- **coded**: `compress --max-error E`. **SHARE**: `-k`, float32, objective delta; *factors*, *bfloat16*: that option.
  **lorashare** 0.1.3, **vlora**: with their k; a vector of vlora is a whole tensor, so that its k is none of ours.
- Each adapter alone. **int**: A and B in integers of so many bits, a float32 scale for each of the r vectors. **SVD**:
  its triples, those with most of ||dW||^2 per byte; **int8**: the same in int8. **ternary**: ComPEFT's rule,
  a share of A and of B, the largest, as a sign times one scalar of least squared error, entropy counted. **LoRAQuant**:
  its rule, triples up to a share of the energy in 2 or 3 bits, the others in 1, scales counted; not its fine-tuning.
- **JD**: Compress-then-Serve's full joint diagonalisation, dW_i = U S_i V' by alternating power iteration on
  dW_i / ||dW_i||, also with 8 clusters; numbers and bytes in float16, as there (`scripts/evidence_joint.py`).
- **Bjontegaard rate**: mean difference of log bytes to coded over the common range of mean errors, by monotone cubic
  interpolation; 3x is three times the bytes of coded at the same error.
- **Adapters** (`scripts/train_adapters.py`, [digests](evidence-digests.txt)): MiniLM, r = 8 on query, value; 25 steps;
  a task is to tell from a paragraph of documentation which of four packages it is of. Of ten adapters five have an
  initial A of their own (*own*), four share one (*shared*), one has its own and three times the steps (*long*); the
  first N are of the same mixture. Accuracy and agreement (same prediction as by the original) are on held-out files.
- **The machine was busy**: it trained adapters meanwhile. Seconds are upper bounds, no measure of speed."""
COMPUTED = ("int", "SVD", "JD", "ternary", "LoRAQuant")  # begins of systems whose numbers alone are counted
ORDER = ("coded", "SHARE", "SHARE factors", "SHARE bfloat16", "lorashare", "vlora", "JD", "JD, 8 clusters", "SVD",
         "SVD, int8", "int", "ternary", "LoRAQuant")  # fmt: skip
ALSO = {"SHARE": (16, 64, 256), "JD": (16, 64), "int": (8,), "vlora": (8,)}  # in the tables alone
GROWN = {"SHARE": (8, 32, 128), "JD": (16, 32, 64), "lorashare": (32, 128)}  # k of these
COLUMNS = ("system", "setting", "LoRA, MB", "heads", "other", "times smaller", "all", "mean", "p95", "max", "own",
           "shared", "long", "s", "peak", "agreement")  # fmt: skip
SETTINGS = {"coded": "E = {:g}", "SVD": "1/{:g}", "SVD, int8": "1/{:g}", "int": "{:g} bits", "ternary": "density {:g}"}


def render(lines: list[Line], path: Path) -> None:
    """Write the page at `path`, the tables beside it, and the chart."""
    tables, chart = path.with_name(f"{path.stem}-tables.md"), path.with_suffix(".svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    for place, words in ((path, _page(lines, chart.name, tables.name)), (tables, _tables(lines, path.name))):
        kept = dict(bench_report.KEEP.findall(place.read_text())) if place.exists() else {}
        text = "\n".join(words)
        for name in ("summary", "limits", "before"):
            text = text.replace(f"<!-- keep {name} -->\n", f"<!-- keep {name} -->\n{kept.get(name, '')}")
        place.write_text(text.rstrip() + "\n")
    if n := _predicted(lines):
        about, rows = _about(lines, n), [x for x in _rows(lines, n) if "agreement" in x]
        points = [(x["system"], fewer(x, about), _mean(x["agreement"]), x["setting"]) for x in rows]
        chart.write_text(evidence_chart.chart(points, _originals(lines, n)["texts"], len(rows[0]["agreement"]), n))


def _page(lines: list[Line], chart: str, tables: str) -> Iterator[str]:
    yield from ("# Evidence", "", "<!-- keep summary -->\n<!-- /keep -->", "")
    yield "Written by `scripts/evidence.py --render`, but for the text between the marks."
    yield f"[How it is measured]({tables}#how-it-is-measured), and [all rows]({tables})."
    yield ""
    if n := _predicted(lines):
        yield from (f"![Agreement with the original adapter against how many times smaller]({chart})", "")
        yield from _task(lines, n)
    yield from _growth(lines)
    yield from _rates(lines)
    yield from _arms(lines)
    yield from _sharing(lines)
    yield from _added(lines)
    yield from _checks(lines)
    yield "<!-- keep limits -->\n<!-- /keep -->"


def counts(lines: list[Line]) -> list[int]:
    return sorted({x["n"] for x in lines if x["kind"] == "row" and x["arm"] == "all"})


def _predicted(lines: list[Line]) -> int | None:
    """The largest N with predictions."""
    return max((x["n"] for x in lines if x["kind"] == "originals" and x["n"] in counts(lines)), default=None)


def _rows(lines: list[Line], n: int, arm: str = "all", system: str | None = None) -> list[Line]:
    rows = [x for x in lines if x["kind"] == "row" and x["n"] == n and x["arm"] == arm]
    rows = [x for x in rows if system is None or x["system"] == system]
    return sorted(rows, key=lambda x: (ORDER.index(x["system"]), x["setting"]))


def _about(lines: list[Line], n: int, arm: str = "all") -> Line:
    return next(x for x in lines if x["kind"] == "collection" and x["n"] == n and x["arm"] == arm)


def _originals(lines: list[Line], n: int) -> Line:
    return next(x for x in lines if x["kind"] == "originals" and x["n"] == n)


def size(row: Line, *, everything: bool = False) -> float:
    """Bytes of a row: of LoRA with what is needed to read it, or all."""
    kinds = ["lora", "verbatim"] + ["other"] * (not row["system"].startswith(COMPUTED))
    return float(sum(row[kind] for kind in (("lora", "verbatim", "extras", "other") if everything else kinds)))


def fewer(row: Line, about: Line) -> float:
    """How many times fewer bytes than the LoRA bytes of the originals."""
    return float(about["lora"] / size(row))


def _all_fewer(row: Line, about: Line) -> float:
    return float(sum(about[kind] for kind in ("lora", "verbatim", "extras", "other")) / size(row, everything=True))


def curve(rows: list[Line], *, everything: bool = False) -> Curve:
    """(mean error, bytes), where a larger error is fewer bytes: what is larger and worse is no point."""
    points = sorted((x["mean"], size(x, everything=everything)) for x in rows if x["mean"] > 1e-4)
    return [p for i, p in enumerate(points) if all(q[1] > p[1] for q in points[:i])]


def at(points: Curve, error: float) -> float | None:
    """Bytes at a mean error, between measured ones."""
    if len(points) < 2 or not 0.98 * points[0][0] <= error <= 1.02 * points[-1][0]:
        return None
    errors, sizes = (np.array(v) for v in zip(*points, strict=True))
    return float(np.exp(PchipInterpolator(errors, np.log(sizes))(np.clip(error, errors[0], errors[-1]))))


def rate(rival: Curve, own: Curve) -> float | None:
    """Bjontegaard: how many times the bytes of `own` a rival takes, over the common range of errors."""
    if len(rival) < 2 or len(own) < 2:
        return None
    low, high = max(rival[0][0], own[0][0]), min(rival[-1][0], own[-1][0])
    if low >= high:
        return None
    logs = [PchipInterpolator([e for e, _ in p], np.log([s for _, s in p])).integrate(low, high) for p in (rival, own)]
    return float(np.exp((logs[0] - logs[1]) / (high - low)))


def _task(lines: list[Line], n: int) -> Iterator[str]:
    """What it does to the task: error, accuracy and agreement against bytes."""
    original, about = _originals(lines, n), _about(lines, n)
    names = list(original["accuracy"])
    right = np.array([original["accuracy"][i] for i in names])
    heads = next((x["accuracy"] for x in lines if x["kind"] == "heads"), {})
    floor = [heads[i] for i in names if i in heads]
    told = f"; a trained head alone {np.mean(floor):.3f} ({len(floor)} of them)" if floor else ""
    yield f"## What it does to the task, N = {n:,}"
    yield f"The first {len(names)} adapters, {original['texts']:,} held-out texts of 4 classes."
    yield f"Accuracy: originals {right.mean():.3f}{told}."
    yield "*Fall*: mean loss in points, with its standard error over adapters. *Worst*: mean of the worst tenth."
    yield ""
    yield "| system | setting | times smaller | all | error | p95 | max | accuracy | fall | agreement | worst |"
    yield "|---" * 11 + "|"
    for x in (x for x in _rows(lines, n) if "agreement" in x and x["setting"] not in ALSO.get(x["system"], ())):
        falls = 100 * (right - np.array([x["accuracy"][i] for i in names]))
        error = falls.std(ddof=1) / np.sqrt(len(falls)) if len(falls) > 1 else float("nan")
        cells = [x["system"], _setting(x), f"{fewer(x, about):.1f}", f"{_all_fewer(x, about):.1f}"]
        cells += [_error(x[key]) for key in ("mean", "p95", "max")] + [f"{_mean(x['accuracy']):.3f}"]
        cells += [f"{falls.mean():+.1f} ± {error:.1f}"]
        cells += [f"{_mean(x['agreement']):.3f}", f"{_worst(x['agreement']):.3f}"]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _growth(lines: list[Line]) -> Iterator[str]:
    yield "## A shared basis against coding each adapter alone"
    yield "Times smaller at a mean error; coded at that error. *Basis free*: by what an adapter more takes, for any N."
    yield ""
    yield f"| system | k | {' | '.join(f'N = {n:,}' for n in counts(lines))} | basis free |"
    yield "|---" * (len(counts(lines)) + 3) + "|"
    settings = {(x["system"], x["setting"]) for x in lines if x["kind"] == "row" and x["arm"] == "all"}
    for system, k in sorted(s for s in settings if s[1] in GROWN.get(s[0], ())):
        found = {
            n: row
            for n in counts(lines)
            for row in _rows(lines, n, system=system)
            if row["setting"] == k and row["mean"] > 1e-4
        }
        cells = [_beside(lines, found[n]) if n in found else "" for n in counts(lines)]
        full = [n for n in found if 8 * n > k][-2:]
        free = ""
        if len(full) == 2:
            (few, less), (many, more) = ((_about(lines, n)["lora"], size(found[n])) for n in full)
            free = f"{(many - few) / (more - less):.1f}"
        yield f"| {system} | {k:g} | {' | '.join(cells)} | {free} |"
    yield ""


def _beside(lines: list[Line], row: Line) -> str:
    """Times smaller of a row at its error, and of coded at the same."""
    about = _about(lines, row["n"], row["arm"])
    coded = at(curve(_rows(lines, row["n"], row["arm"], "coded")), row["mean"])
    told = "" if coded is None else f"; {about['lora'] / coded:.0f}"
    return f"{fewer(row, about):.1f} at {row['mean']:.2f}{told}"


def _rates(lines: list[Line]) -> Iterator[str]:
    yield "## Bytes at the same error, times those of coded"
    yield "Bjontegaard rate; LoRA bytes, all bytes in brackets. Empty where two errors are not in the range of coded."
    yield ""
    yield f"| system | {' | '.join(f'N = {n:,}' for n in counts(lines))} |"
    yield "|---" * (len(counts(lines)) + 1) + "|"
    for system in ORDER[1:]:
        cells = []
        for n in counts(lines):
            rivals, own = _rows(lines, n, system=system), _rows(lines, n, system="coded")
            rates = [rate(curve(rivals, everything=e), curve(own, everything=e)) for e in (False, True)]
            cells.append("" if None in rates else f"{rates[0]:.1f}x ({rates[1]:.1f}x)")
        if any(cells):
            yield f"| {system} | {' | '.join(cells)} |"
    yield ""


def _arms(lines: list[Line]) -> Iterator[str]:
    found = sorted({(x["n"], x["arm"]) for x in lines if x["kind"] == "row" and x["arm"] != "all"})
    if not found:
        return
    n = max(n for n, _ in found)
    yield f"## By arm, of the first {n:,}"
    yield "A fit of the arm's adapters alone: times smaller at a mean error; coded at that error."
    yield ""
    arms = [arm for m, arm in found if m == n]
    titles = [f"{arm} ({_about(lines, n, arm)['adapters']})" for arm in arms]
    yield f"| SHARE | {' | '.join(titles)} |"
    yield "|---" * (len(arms) + 1) + "|"
    for k in sorted({x["setting"] for arm in arms for x in _rows(lines, n, arm, "SHARE")}):
        rows = [next((x for x in _rows(lines, n, arm, "SHARE") if x["setting"] == k), None) for arm in arms]
        yield f"| k = {k:g} | {' | '.join('' if x is None else _beside(lines, x) for x in rows)} |"
    yield ""


def _sharing(lines: list[Line]) -> Iterator[str]:
    found = [x for x in lines if x["kind"] == "sharing"]
    if not found:
        return
    limits = sorted({x["limit"] for x in found})
    yield "## What a shared part of the codec would save"
    yield "Bytes less at the Gaussian bound with the best number of common directions of each module's side (the mean"
    yield "in brackets), 8 bits a number of theirs; the variances of coefficients are known for nothing. Then: of the"
    yield "last quarter, with directions and variances of the others for nothing: what an adapter more would save."
    yield ""
    yield f"| N | arm | {' | '.join(f'E = {e:g}' for e in limits)} |"
    yield "|---" * (len(limits) + 2) + "|"
    for n, arm in sorted({(x["n"], x["arm"]) for x in found}):
        own = {x["limit"]: x for x in found if (x["n"], x["arm"]) == (n, arm)}
        there = [own[e] for e in limits if e in own]
        cells = [f"{1 - x['with'] / x['alone']:.1%} ({np.mean(x['ks']):.0f}), {x['later']:.0%}" for x in there]
        yield f"| {n:,} | {arm} | {' | '.join(cells)} |"
    yield ""


def _added(lines: list[Line]) -> Iterator[str]:
    found = [x for x in lines if x["kind"] == "added"]
    if found:
        yield "## Kept out of the fit, and added afterwards"
        yield "SHARE, the last tenth by `add` on the bases as they are. A coded adapter does not depend on the others."
        yield ""
        yield "| N | k | bytes an adapter, fitted | added | error, fitted: mean (max) | added |"
        yield "|---" * 6 + "|"
    for x in found:
        fit, late = x["counts"]
        errors = [f"{_error(x[part]['mean'])} ({_error(x[part]['max'])})" for part in ("fitted", "added")]
        sizes = [f"{x['before'] / fit:,.0f}", f"{(x['after'] - x['before']) / late:,.0f}"]
        yield f"| {fit} + {late} | {x['k']} | {' | '.join(sizes)} | {' | '.join(errors)} |"
    yield ""


def _checks(lines: list[Line]) -> Iterator[str]:
    yield from ("## Checks", "| claim | measured | holds |", "|---|---|---|")
    rows = [x for x in lines if x["kind"] == "row"]
    over = max((x["max"] / x["setting"] for x in rows if x["system"] == "coded"), default=0)
    yield _check("coded: every adapter's measured error over its limit E, at most 1", over, over <= 1.00001)
    apart = max((x["apart"] for x in rows if "apart" in x), default=0)
    yield _check("certified errors are what is measured, to 1e-5", apart, apart <= 1e-5)
    for n in counts(lines)[-1:]:
        own, times = curve(_rows(lines, n, system="coded")), {}
        for x in (x for x in _rows(lines, n) if x["system"] != "coded"):
            if (coded := at(own, x["mean"])) is not None:
                times[f"{x['system']} {_setting(x)}"] = size(x) / coded
        if times:
            nearest = min(times, key=lambda rival: times[rival])
            claim = f"N = {n:,}: coded is smaller than all at their mean error; times, least ({nearest})"
            yield _check(claim, times[nearest], times[nearest] > 1)
        peers = {x["setting"]: x["mean"] for x in _rows(lines, n, system="lorashare") if x["mean"] > 1e-6}
        same = [x["mean"] / peers[x["setting"]] for x in _rows(lines, n, system="SHARE") if x["setting"] in peers]
        if same:
            yield _check(
                f"N = {n:,}: SHARE's mean error over lorashare's at the same k, at most 1", max(same), max(same) <= 1
            )
    yield ""


def _check(claim: str, measured: float, holds: bool) -> str:
    return f"| {claim} | {measured:.3g} | {'yes' if holds else '**no**'} |"


def _tables(lines: list[Line], page: str) -> Iterator[str]:
    yield from ("# Evidence: all rows", "")
    yield f"Written by `scripts/evidence.py --render`; words as in [evidence]({page}). MB are 10^6 bytes."
    yield "Peak: MiB, of what is a process; *own*, *shared*, *long*: mean errors of these arms."
    for n, arm in sorted({(x["n"], x["arm"]) for x in lines if x["kind"] == "row"}, key=lambda x: (x[1], x[0])):
        about = _about(lines, n, arm)
        yield from ("", f"## {n:,}" + ("" if arm == "all" else f", {arm} alone"))
        yield f"{about['adapters']:,} adapters; LoRA {_mb(about['lora'])} MB, heads {_mb(about['extras'])} MB,"
        yield f"headers and configurations {_mb(about['other'])} MB."
        yield ""
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        for x in _rows(lines, n, arm):
            sizes = " | ".join(_mb(v) for v in (x["lora"] + x["verbatim"], x["extras"], x["other"]))
            errors = " | ".join(
                _error(v)
                for v in [*(x[key] for key in ("mean", "p95", "max")), *map(x["arms"].get, ("own", "shared", "long"))]
            )
            peak = f"{x['peak'] / 2**20:.0f}" if "peak" in x else ""
            told = f"{x['seconds']:.0f} | {peak} | {_mean(x['agreement']) if 'agreement' in x else float('nan'):.3f}"
            times = f"{fewer(x, about):.1f} | {_all_fewer(x, about):.1f}"
            yield f"| {x['system']} | {_setting(x)} | {sizes} | {times} | {errors} | {told.replace('nan', '')} |"
    yield from ("", "## How it is measured", METHOD, "", *bench_report._machine(lines))
    left = [x for x in lines if x["kind"] == "left"]
    if left:
        yield from ("## Left out",)
        yield from (f"- {x['system']}, {_setting(x)}, N = {x['n']:,}: {x['why']}." for x in left)
    yield from ("", "<!-- keep before -->\n<!-- /keep -->")


def _setting(row: Line) -> str:
    if row["system"] == "LoRAQuant":
        return f"{int(row['setting'])} bits @ {row['setting'] % 1:.1f}"
    return SETTINGS.get(row["system"], "k = {:g}").format(row["setting"])


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _worst(values: Mapping[str, float]) -> float:
    """The mean of the worst tenth."""
    ordered = sorted(values.values())
    return float(np.mean(ordered[: max(1, len(ordered) // 10)]))


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3f}"
