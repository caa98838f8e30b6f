"""The figures of the page, as SVG. Colours come from the page's style, so that they suit the light and the dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..adapters.keys import SIDES
from ..checkpoint.format import PARTS
from ..text import bytes_shown, counted
from .axes import Axis, bytes_axis, drawing, named, nice_step, num, path, x_axis, y_axis
from .markup import Html, element, joined
from .statistics import Basis, Curve

Array = NDArray[np.float64]
_WIDTH = 480.0
_LINES = 96  # points of a spectrum


def histogram(values: Array, what: str = "relative dW error") -> Html:
    """How many adapters have which value.

    Args:
        values: (n,), n >= 1.
        what: they are.
    """
    edges, log = _edges(values)
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    x, y = Axis(edges[0], edges[-1], 44, _WIDTH - 12, log), Axis(0, max(counts) * 1.02, 230, 64)
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            left, top = x.at(low) + 0.5, min(y.at(count), y.start - 1.5)
            shape = {"x": num(left), "y": num(top), "width": num(max(x.at(high) - left - 0.5, 1))}
            tip = element("title", f"{low:.4g} to {high:.4g}: {counted(count, 'adapter')}")
            bars.append(element("rect", tip, height=num(y.start - top), class_="bar", **shape))
    steps = [tick for tick in y.ticks(4) if tick == int(tick)]
    marks = (("median", np.median(values)), ("mean", values.mean()), ("p95", np.quantile(values, 0.95)))
    lines = [_mark(x, y, float(value), f"{name} {value:.3g}", 26 + 15 * i) for i, (name, value) in enumerate(marks)]
    label = f"Histogram of the {what} of {counted(len(values), 'adapter')}, from {values.min():.3g} to "
    return drawing(
        "histogram", _WIDTH, 272, f"{label}{values.max():.3g}, median {np.median(values):.3g}",
        y_axis(y, x, named(steps), "adapters"), *bars,
        x_axis(x, 230, named(x.ticks(6)), f"{what}{', log scale' if log else ''}"), *lines,
    )  # fmt: skip


def _edges(errors: Array) -> tuple[Array, bool]:
    """Edges of the bins of a histogram, and whether they are those of logarithms."""
    low, high = float(errors.min()), float(errors.max())
    if low > 0 and high / low > 100:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return np.logspace(first, last, min(10 * (last - first), 60) + 1, dtype=np.float64), True
    step = nice_step((high - low) / 36 if high > low else max(high, 1e-6) / 24)
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9) + 1
    spare = max(0, 12 - (last - first)) // 2  # a single bin would be as wide as the figure
    return np.arange(max(first - spare, 0), last + spare + 1, dtype=np.float64) * step, False


def _mark(x: Axis, y: Axis, value: float, text: str, height: float) -> Html:
    """A vertical line with a name at its upper end."""
    at = x.at(value)
    late = at > (x.start + x.end) / 2
    line = element("line", x1=num(at), x2=num(at), y1=num(height - 8), y2=num(y.start), class_="mark")
    anchor = "end" if late else "start"
    return joined(line, element("text", text, x=num(at + (-4 if late else 4)), y=num(height), text_anchor=anchor))


def bytes_bars(sizes: Mapping[str, int]) -> Html:
    """The originals and the checkpoint on one scale, and below them the parts of the checkpoint."""
    total = sum(sizes[part] for part in PARTS)
    whole = Axis(0, max(total, sizes["originals"], 1), 0, _WIDTH)
    rows: list[Html] = []
    for top, name, size, kind in ((18, "originals", sizes["originals"], "orig"), (76, "this checkpoint", total, "all")):
        rows.append(element("text", f"{name}, {bytes_shown(size)}", x=0, y=top - 5))
        rows.append(element("rect", x=0, y=top, width=num(max(whole.at(size), 1)), height=26, rx=2, class_=kind))
    rows.append(element("text", "what the checkpoint is made of", x=0, y=129))
    at, scale = 0.0, Axis(0, max(total, 1), 0, _WIDTH)
    parts = [part for part in PARTS if sizes[part]]
    for part in parts:
        width = scale.at(sizes[part])
        tip = element("title", f"{part}: {bytes_shown(sizes[part])}, {_percent(sizes[part], total)}")
        rows.append(element("rect", tip, x=num(at), y=134, width=num(width), height=26, class_=part))
        at += width
    foot = [f"M0 104L0 134M{num(whole.at(total))} 104L{num(_WIDTH)} 134"]
    label = f"Bytes: originals {bytes_shown(sizes['originals'])}, checkpoint {bytes_shown(total)}, of which "
    label += ", ".join(f"{part} {bytes_shown(sizes[part])}" for part in parts)
    return drawing("bytes", _WIDTH, 162, label, element("path", d=foot[0], class_="fan"), *rows)


def _percent(part: float, total: float) -> str:
    return f"{100 * part / total:.1f} %" if total else "0 %"


def tradeoff(curve: Curve, measured: Mapping[str, float]) -> Html:
    """What a smaller k takes and loses, and where this checkpoint is.

    Args:
        curve: from k = 0 to that of this checkpoint.
        measured: what is certified of this checkpoint, drawn where its bytes are, by the class of the dot.
    """
    values = np.concatenate([curve.low, curve.high, [*measured.values(), 0.0]])
    x, ticks = bytes_axis(float(curve.bytes.max()) * 1.05, 48, _WIDTH - 14)
    y = Axis(0, float(max(values.max(), 1e-9)) * 1.05, 230, 38)
    size = [x.at(b) for b in curve.bytes.tolist()]
    low, high = (list(zip(size, map(y.at, line.tolist()), strict=True)) for line in (curve.low, curve.high))
    parts = [element("path", d=path([*low, *high[::-1]], closed=True), class_="band")] if curve.bounds else []
    parts += [element("path", d=path(line), class_="curve") for line in ((low, high) if curve.bounds else (low,))]
    parts += _named_k(curve, high)
    end = size[-1]
    parts.append(element("line", x1=num(end), x2=num(end), y1=36, y2=230, class_="mark"))
    parts.append(element("text", "this run", x=num(end - 4), y=31, text_anchor="end", class_="strong"))
    for (name, value), radius in zip(measured.items(), (5.5, 3.5), strict=False):
        dot = element("circle", cx=num(end), cy=num(y.at(value)), r=radius)
        parts.append(element("g", element("title", f"{name} {value:.4f}"), dot, class_=f"dot {name}"))
    what = "rms relative dW error" if curve.bounds else "share of the energy"
    here = bytes_shown(round(float(curve.bytes[-1])))
    label = f"{what} against bytes on disk for each k up to {curve.k[-1]}; this run is at {here}"
    return drawing(
        "tradeoff", _WIDTH, 272, label, y_axis(y, x, named(y.ticks()), what), *parts,
        x_axis(x, 230, ticks, "bytes on disk of the whole checkpoint"),
    )  # fmt: skip


def _named_k(curve: Curve, points: Sequence[tuple[float, float]]) -> list[Html]:
    """Some k, named on the curve where there is room."""
    parts, free = [], points[0][0] - 1
    for k, (x, y) in zip(curve.k.tolist()[:-1], points[:-1], strict=True):
        if x >= free and (k & (k - 1) == 0) and x < points[-1][0] - 52:
            text = element(
                "text", f"k = {k}", x=num(x + 6), y=num(max(y - 7, 31) if curve.bounds else min(y + 16, 225))
            )
            parts.append(joined(element("circle", cx=num(x), cy=num(y), r=2.5, class_="point"), text))
            free = x + 56
    return parts


def spectrum(kind: str, bases: Sequence[Basis], floor: float, most: int) -> Html:
    """Eigenvalues of one kind of module as shares of their group's energy: the mean over depths, and all of them.

    Args:
        kind: its name.
        bases: its groups.
        floor: the least share that is drawn.
        most: the largest k of any kind.
    """
    x, y = Axis(1, max(most, 2), 44, 312), Axis(floor, 1, 150, 24, log=True)
    parts: list[Html] = []
    for side in SIDES:
        rows = [b.eigenvalues / b.energy for b in bases if b.side == side and b.k and b.energy > 0]
        if not rows:
            continue
        table = np.full((len(rows), max(map(len, rows))), np.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        at = np.unique(np.linspace(0, table.shape[1] - 1, _LINES).round().astype(int))
        low, mean, high = (
            [(x.at(i + 1), y.at(v)) for i, v in zip(at.tolist(), how(table[:, at], 0).tolist(), strict=True)]
            for how in (np.nanmin, np.nanmean, np.nanmax)
        )
        if len(rows) > 1:
            parts.append(element("path", d=path([*low, *high[::-1]], closed=True), class_=f"range {side}"))
        parts.append(element("path", d=path(mean), class_=f"line {side}"))
    xs = sorted({1.0, *(t for t in x.ticks(4) if t > 1 and t == int(t))})
    label = f"Eigenvalue spectra of {kind}, sides A and B, {counted(len(bases), 'group')}, log scale"
    names = [(t, _power(t)) for t in y.ticks(4)]
    return drawing("spectrum", 320, 188, label, y_axis(y, x, names, ""), *parts, x_axis(x, 150, named(xs), "component"))


def _power(value: float) -> str:
    return f"{value:g}" if value >= 0.01 else f"1e{round(math.log10(value))}"


def heatmap(name: str, rows: Sequence[str], columns: Sequence[str], cells: Array, *, whole: bool) -> Html:
    """One value for each kind of module and depth; the stronger its colour, the larger.

    Args:
        name: what the value is, and the class of the figure by its first word.
        rows, columns: the names of the kinds and sides, and of the depths.
        cells: (rows, columns); NaN where there is nothing.
        whole: whether the values are counts.
    """
    left, height, top = 118.0, 22.0, 26.0
    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))
    width = (_WIDTH - left - 4) / max(len(columns), 1)
    wide = min(width, 60.0)
    parts: list[Html] = []
    for i, row in enumerate(rows):
        y = top + height * i
        short = row if len(row) <= 16 else f"{row[:7]}\u2026{row[-8:]}"
        parts.append(element("text", short, x=num(left - 8), y=num(y + 15), text_anchor="end", class_="row"))
        for j, column in enumerate(columns):
            value = cells[i, j]
            if np.isnan(value):
                continue
            text = f"{value:.4g}" if whole else f"{value:.4f}"
            tip = element("title", f"{row}, depth {column}: {name} {text}")
            strength = 0.12 + 0.68 * ((value - low) / (high - low) if high > low else 0.5)
            shape = {"x": num(left + wide * j), "width": num(max(wide - 1, 0.8)), "height": num(height - 2)}
            parts.append(element("rect", tip, y=num(y), class_="cell", fill_opacity=f"{strength:.2f}", **shape))
            if wide >= 24 and len(text) <= 6:
                inner = text if whole else f"{value:.2f}".lstrip("0")
                at = {"x": num(left + wide * (j + 0.5)), "y": num(y + 14)}
                parts.append(element("text", inner, text_anchor="middle", class_="inner", **at))
    every = max(1, math.ceil(len(columns) * 34 / (wide * len(columns))))
    bottom = top + height * len(rows) + 14
    for j in range(0, len(columns), every):
        at = {"x": num(left + wide * (j + 0.5)), "y": num(bottom)}
        parts.append(element("text", columns[j], text_anchor="middle", **at))
    ends = f"{low:.4g}" if low == high else f"{low:.4g} (faint) to {high:.4g} (strong)"
    parts.append(element("text", f"{name}: {ends}", x=4, y=12, class_="of"))
    parts.append(element("text", "depth", x=num(left - 8), y=num(bottom), text_anchor="end", class_="of"))
    label = f"{name} by kind of module and depth, from {low:.4g} to {high:.4g}"
    return drawing(f"heat {name.split()[0]}", _WIDTH, bottom + 8, label, *parts)
