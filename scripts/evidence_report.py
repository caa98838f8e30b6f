"""The tables of evidence.md and evidence-tables.md from the JSON lines of one run: for scripts/evidence.py --render.

What is between `<!-- table NAME -->` and `<!-- /table -->` is replaced; all other text is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_report
import evidence_chart
import numpy as np
from scipy.interpolate import PchipInterpolator

Line = dict[str, Any]
Curve = list[tuple[float, float]]  # mean error, bytes
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
COMPUTED = ("int", "SVD", "JD", "ternary", "LoRAQuant")  # begins of systems whose numbers alone are counted
SHOWN: dict[str, tuple[float, ...]] = {  # settings whose predictions are on the page, systems in the order of tables
    "coded": (0.1, 0.25, 0.4, 0.55, 0.7), "coded, directions": (), "SHARE": (32, 128), "SHARE factors": (),
    "SHARE bfloat16": (),
    "lorashare": (32,), "vlora": (32,), "JD": (32,), "JD, 8 clusters": (16,), "SVD": (), "SVD, int8": (16, 32),
    "int": (3, 4), "ternary": (0.5,), "LoRAQuant": (2.8,),
}  # fmt: skip
ORDER, OWN = list(SHOWN), ("coded", "coded, directions")
GROWN = {"SHARE": (8, 32, 128), "JD": (32,), "JD, 8 clusters": (16,), "lorashare": (32,)}  # k, of N
BY_ARM = (8, 32, 128)  # k of SHARE
SETTINGS = {
    "coded": "E = {:g}",
    "coded, directions": "E = {:g}",
    "SVD": "1/{:g}",
    "SVD, int8": "1/{:g}",
    "int": "{:g} bits",
    "ternary": "density {:g}",
}
PARTS = ("lora", "verbatim", "extras", "other")


class Run:
    """The lines of a run, those of the largest N last."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines
        self.counts = sorted({x["n"] for x in self.of("row", arm="all")})
        self.predicted = sorted({x["n"] for x in self.of("originals")} & set(self.counts))

    def of(self, kind: str, **facts: Any) -> list[Line]:
        return [x for x in self.lines if x["kind"] == kind and facts.items() <= x.items()]

    def rows(self, n: int, arm: str = "all", **facts: Any) -> list[Line]:
        return sorted(self.of("row", n=n, arm=arm, **facts), key=lambda x: (ORDER.index(x["system"]), x["setting"]))

    def about(self, row: Line) -> Line:
        return self.of("collection", n=row["n"], arm=row["arm"])[0]

    def fewer(self, row: Line, everything: bool = False) -> float:
        """Times smaller: LoRA's bytes with what is needed to read it, or all."""
        whole = sum(self.about(row)[part] for part in (PARTS if everything else ("lora",)))
        return float(whole / size(row, everything))

    def coded(self, row: Line) -> float | None:
        """Bytes of coded adapters at the mean error of a row."""
        return at(curve(self.rows(row["n"], row["arm"], system="coded")), row["mean"])

    def beside(self, row: Line) -> str:
        """Times smaller of a row at its error, and of coded at the same."""
        coded = self.coded(row)
        told = "" if coded is None else f"; {self.about(row)['lora'] / coded:.0f}"
        return f"{self.fewer(row):.1f} at {row['mean']:.2f}{told}"


def render(lines: list[Line], page: Path) -> None:
    """Fill the tables of the page and of the one beside it, and draw the chart."""
    run = Run(lines)
    for path in (page, page.with_name(f"{page.stem}-tables.md")):
        path.write_text(BLOCK.sub(lambda found: found[1] + _lines(TABLES[found[2]](run)) + found[3], path.read_text()))
    for n in run.predicted[-1:]:
        rows, original = [x for x in run.rows(n) if "agreement" in x], run.of("originals", n=n)[0]
        about = f"{n:,} MiniLM adapters, {len(original['accuracy'])} of them on {original['texts']:,} texts held out"
        points = [(x["system"], run.fewer(x), _mean(x["agreement"]), x["setting"]) for x in rows]
        evidence_chart.chart(points, f"{about}; LoRA bytes, all but heads counted", page.with_suffix(".svg"))


def _lines(words: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in words) or "Not measured.\n"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Nothing, if there are no rows."""
    titles, lines = list(columns), [f"| {' | '.join(cells)} |" for cells in rows]
    if lines:
        yield f"| {' | '.join(titles)} |"
        yield "|---" * len(titles) + "|"
        yield from lines


def size(row: Line, everything: bool = False) -> float:
    """Bytes of a row: of LoRA with what is needed to read it, or all."""
    needed = PARTS[:2] + PARTS[3:] * (not row["system"].startswith(COMPUTED))
    return float(sum(row[part] for part in (PARTS if everything else needed)))


def curve(rows: list[Line], everything: bool = False) -> Curve:
    """(mean error, bytes), where a larger error is fewer bytes: what is larger and worse is no point."""
    points = sorted((x["mean"], size(x, everything)) for x in rows if x["mean"] > 1e-4)
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


def _task(run: Run) -> Iterator[str]:
    """Predictions at the largest N, and at the smallest for comparison."""
    columns, rows = ["system", "setting"], [[x, ""] for x in ("originals", "a trained head alone")]
    counts = [*run.predicted[-1:], *run.predicted[:-1][:1]]
    shown = [x for n in counts[:1] for x in run.rows(n) if "agreement" in x and x["setting"] in SHOWN[x["system"]]]
    rows += [[x["system"], _setting(x)] for x in shown]
    for n in counts:
        original = run.of("originals", n=n)[0]["accuracy"]
        heads = {i: x for row in run.of("heads") for i, x in row["accuracy"].items() if i in original}
        columns += [f"N = {n:,}: smaller", "error", f"accuracy of {len(original)}", "agreement", "fall, points"]
        rows[0] += ["1", "0", _both(original), "1", ""]
        rows[1] += ["", "", _both(heads) if heads else "", "", ""]
        for x, cells in zip(shown, rows[2:], strict=True):
            for y in (y for y in run.rows(n, system=x["system"], setting=x["setting"]) if "agreement" in y):
                cells += [f"{run.fewer(y):.1f}", _error(y["mean"]), *_predictions(original, y)]
            cells += [""] * (len(columns) - len(cells))
    yield from _table(columns[:11], (x[:11] for x in rows) if shown else ())  # the fall at the largest N alone


def _predictions(original: Mapping[str, float], row: Line) -> list[str]:
    """Accuracy, agreement, and the fall of accuracy."""
    falls = 100 * np.array([right - row["accuracy"][i] for i, right in original.items()])
    error = falls.std(ddof=1) / np.sqrt(len(falls)) if len(falls) > 1 else float("nan")
    return [_both(row["accuracy"]), _both(row["agreement"]), f"{falls.mean():+.1f} ± {error:.1f}"]


def _growth(run: Run) -> Iterator[str]:
    yield from _table(["system", "k", *_titles(run), "basis free"], (x for x in _grown(run) if any(x[2:])))


def _grown(run: Run) -> Iterator[list[str]]:
    for system, k in ((system, k) for system, ks in GROWN.items() for k in ks):
        found = {x["n"]: x for x in run.of("row", arm="all", system=system, setting=k) if x["mean"] > 1e-4}
        full, free = [n for n in sorted(found) if 8 * n > k][-2:], ""
        if len(full) == 2:
            (few, less), (many, more) = ((run.about(found[n])["lora"], size(found[n])) for n in full)
            free = f"{(many - few) / (more - less):.1f}"
        yield [system, str(k), *(run.beside(found[n]) if n in found else "" for n in run.counts), free]


def _rates(run: Run, systems: Iterable[str] = ORDER[2:]) -> Iterator[str]:
    cells = [[system, *(_rated(run, n, system) for n in run.counts)] for system in systems]
    yield from _table(["system", *_titles(run)], (x for x in cells if any(x[1:])))


def _rated(run: Run, n: int, system: str) -> str:
    rivals, own = run.rows(n, system=system), run.rows(n, system="coded")
    rates = [rate(curve(rivals, everything), curve(own, everything)) for everything in (False, True)]
    return "" if None in rates else f"{rates[0]:.1f}x ({rates[1]:.1f}x)"


def _arms(run: Run) -> Iterator[str]:
    n = max((x["n"] for x in run.of("row") if x["arm"] != "all"), default=0)
    arms = {x["arm"]: x["adapters"] for x in run.of("collection", n=n) if x["arm"] != "all"}
    rows = {k: [run.rows(n, arm, system="SHARE", setting=k) for arm in arms] for k in BY_ARM}
    cells = ([f"k = {k}", *(run.beside(x[0]) if x else "" for x in own)] for k, own in rows.items() if any(own))
    yield from _table([f"SHARE, N = {n:,}", *(f"{arm} ({count})" for arm, count in arms.items())], cells)


def _shared(run: Run) -> Iterator[str]:
    """What directions save of the bytes of codes, their own counted."""
    counts, rows = sorted({x["n"] for x in run.of("row", system="coded, directions")}), []
    for arm, limit in sorted({(x["arm"], x["setting"]) for x in run.of("row", system="coded, directions")}):
        cells = [arm, f"{limit:g}"]
        for n in counts:
            both = [run.rows(n, arm, system=s, setting=limit) for s in ("coded", "coded, directions")]
            alone, on = (x[0] if x else None for x in both)
            told = "" if alone is None or on is None else f"{1 - on['lora'] / alone['lora']:.1%}"
            cells.append(told + (f" ({on['directions'] / on['lora']:.1%})" if told and on is not None else ""))
        rows.append(cells)
    yield from _table(["arm", "E", *(f"N = {n:,}" for n in counts)], rows)


def _added(run: Run, least: int = 0) -> Iterator[str]:
    rows = []
    for x in (x for x in run.of("added") if x["n"] >= least):
        fit, late = x["counts"]
        sizes = [f"{x['before'] / fit:,.0f}", f"{(x['after'] - x['before']) / late:,.0f}"]
        errors = [f"{_error(x[part]['mean'])} ({_error(x[part]['max'])})" for part in ("fitted", "added")]
        rows.append([f"{fit} + {late}", f"`{x['options']}`", *sizes, *errors])
    yield from _table(["N", "`compress`", "bytes an adapter, fitted", "added", "error, fitted", "added"], rows)


def _product(run: Run) -> Iterator[str]:
    rows = []
    for x in sorted(run.of("product"), key=lambda x: (x["copies"], x["n"])):
        kills = [y for y in run.of("kill", n=x["n"], options=x["options"]) if x["copies"] == 1]
        told = [str(sum(y[what] for y in kills)) if kills else "" for what in ("killed", "same")]
        cells = [f"{x['seconds']:.0f}", f"{x['peak'] / 2**20:,.0f}", f"{x['bytes'] / 1e6:,.1f}", f"{x['verify']:.0f}"]
        count = f"{x['copies'] * x['n']:,}" + ", by noise" * (x["copies"] > 1)
        rows.append([count, f"`{x['options']}`", *cells, *told])
    columns = ("adapters", "`compress`", "s", "peak, MiB", "MB", "`verify`, s", "killed", "then the same bytes")
    yield from _table(columns, rows)


def _checks(run: Run) -> Iterator[str]:
    cells = ([claim, f"{value:.3g}", "yes" if holds else "**no**"] for claim, value, holds in _claims(run))
    yield from _table(["claim", "measured", "holds"], cells)


def _claims(run: Run) -> Iterator[tuple[str, float, bool]]:
    over = max((x["max"] / x["setting"] for x in run.of("row", system="coded")), default=0)
    yield "coded: every adapter's measured error over its limit E, at most 1", over, over <= 1.00001
    apart = max((x["apart"] for x in run.of("row") if "apart" in x), default=0)
    yield "certified errors are what is measured, to 1e-5", apart, apart <= 1e-5
    for n in run.counts[-1:]:
        rivals = {
            f"{x['system']} {_setting(x)}": (size(x), run.coded(x)) for x in run.rows(n) if x["system"] not in OWN
        }
        times = {name: own / coded for name, (own, coded) in rivals.items() if coded is not None}
        if times:
            nearest = min(times, key=lambda rival: times[rival])
            claim = f"N = {n:,}: coded is smaller than all at their mean error; times, least ({nearest})"
            yield claim, times[nearest], times[nearest] > 1
        peers = {x["setting"]: x["mean"] for x in run.rows(n, system="lorashare") if x["mean"] > 1e-6}
        same = [x["mean"] / peers[x["setting"]] for x in run.rows(n, system="SHARE") if x["setting"] in peers]
        if same:
            yield f"N = {n:,}: SHARE's mean error over lorashare's at the same k, at most 1", max(same), max(same) <= 1
    if kills := run.of("kill", killed=True):
        other = sum(not x["same"] for x in kills)
        yield f"{len(kills)} runs killed and resumed: those whose files are not the whole run's", other, other == 0


COLUMNS = ("system", "setting", "LoRA, MB", "heads", "other", "times smaller", "all", "mean", "p95", "max", "own",
           "shared", "long", "s", "peak", "accuracy", "agreement", "fall")  # fmt: skip


def _rows(run: Run) -> Iterator[str]:
    for n, arm in sorted({(x["n"], x["arm"]) for x in run.of("row")}, key=lambda x: (x[1], x[0])):
        about, rows = run.of("collection", n=n, arm=arm)[0], run.rows(n, arm)
        yield from ("", f"## {n:,}" + ("" if arm == "all" else f", {arm} alone"))
        yield f"{about['adapters']:,} adapters; LoRA {_mb(about['lora'])} MB, heads {_mb(about['extras'])} MB,"
        yield f"headers and configurations {_mb(about['other'])} MB."
        yield ""
        columns = COLUMNS if any("agreement" in x for x in rows) else COLUMNS[:-3]
        yield from _table(columns, (_cells(run, x)[: len(columns)] for x in rows))


def _cells(run: Run, x: Line) -> list[str]:
    cells = [x["system"], _setting(x), *map(_mb, (x["lora"] + x["verbatim"], x["extras"], x["other"]))]
    cells += [f"{run.fewer(x):.1f}", f"{run.fewer(x, everything=True):.1f}"]
    cells += [_error(x[key]) for key in ("mean", "p95", "max")]
    cells += [_error(x["arms"].get(arm)) for arm in ("own", "shared", "long")]
    cells += [f"{x['seconds']:.0f}", f"{x['peak'] / 2**20:.0f}" if "peak" in x else ""]
    return cells + (_predictions(run.of("originals", n=x["n"])[0]["accuracy"], x) if "agreement" in x else [""] * 3)


def _left(run: Run) -> Iterator[str]:
    found = run.of("left")
    yield from (f"- {x['system']}, {_setting(x)}, N = {x['n']:,}: {x['why']}." for x in found)
    yield from () if found else ("Nothing.",)


def _titles(run: Run) -> list[str]:
    return [f"N = {n:,}" for n in run.counts]


def _setting(row: Line) -> str:
    if row["system"] == "LoRAQuant":
        return f"{int(row['setting'])} bits @ {row['setting'] % 1:.1f}"
    return SETTINGS.get(row["system"], "k = {:g}").format(row["setting"])


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _both(values: Mapping[str, float]) -> str:
    """The mean, and that of the worst tenth."""
    ordered = sorted(values.values())
    return f"{np.mean(ordered):.3f} ({np.mean(ordered[: max(1, len(ordered) // 10)]):.2f})"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _mb(value: float) -> str:
    return f"{value / 1e6:.3f}"


TABLES: dict[str, Callable[[Run], Iterator[str]]] = {
    "task": _task, "growth": _growth, "arms": _arms, "shared": _shared, "product": _product, "checks": _checks,
    "rates": lambda run: _rates(run, (system for system in ORDER[2:] if SHOWN[system])), "all_rates": _rates,
    "added": lambda run: _added(run, max((x["n"] for x in run.of("added")), default=0)), "all_added": _added,
    "rows": _rows, "left": _left, "machine": lambda run: bench_report._machine(run.lines),
}  # fmt: skip
