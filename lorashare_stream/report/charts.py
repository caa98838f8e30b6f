"""Figures of the page, as SVG by matplotlib.

Text stays text, in the font of the page, and a colour is a variable of its style, so that one drawing suits a light and
a dark window. No string of strangers goes through matplotlib, whose font lacks most letters; labels are escaped.
Lengths are in units of the drawing, 480 or 320 wide, from its upper left corner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import StringIO
from threading import Lock
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ..adapters.keys import SIDES
from ..text import bytes_shown, counted, printable

if TYPE_CHECKING:
    from .page import Basis, Curve

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]  # left, right, top, bottom
Point = tuple[float, float]
P = ParamSpec("P")
DOTS = 400  # adapters that are drawn one by one
_POINTS = 96  # of a spectrum
_NAMES = ("ink", "soft", "rule", "bg", "accent", "a", "b")  # variables of page.css
_COLOUR = {name: f"#fe000{i}" for i, name in enumerate(_NAMES)}  # what is drawn in their place
_INK, _SOFT, _RULE, _BG, _ACCENT, _A, _B = _COLOUR.values()
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "path.simplify": False, "font.size": 12, "text.color": _SOFT,
    "axes.spines.left": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _SOFT,
    "axes.linewidth": 1, "axes.labelcolor": _INK, "axes.labelpad": 5, "axes.xmargin": 0, "axes.ymargin": 0,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": _RULE, "grid.linewidth": 1,
    "xtick.bottom": False, "xtick.labelcolor": _SOFT, "xtick.major.pad": 6, "ytick.left": False,
    "ytick.labelcolor": _SOFT, "ytick.major.pad": 6, "lines.solid_capstyle": "round", "patch.linewidth": 0,
}  # fmt: skip
_MARK: dict[str, Any] = {"color": _INK, "linewidth": 1, "linestyle": (0, (2, 3))}
_ONE = Lock()  # matplotlib's settings are those of the process
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def _figure(draw: Callable[P, tuple[Figure, str, str]]) -> Callable[P, Markup]:
    """A function that draws a figure and names its class and what it shows, as one that returns an SVG element."""

    @wraps(draw)
    def drawn(*args: P.args, **options: P.kwargs) -> Markup:
        out = StringIO()
        with _ONE, style.context(_STYLE, after_reset=True):
            figure, name, label = draw(*args, **options)
            for artist in figure.findobj():
                artist.set_clip_on(False)  # a clip path would need an id, which two figures may share
            figure.savefig(out, format="svg", metadata={"Date": None})
        width, height = figure.get_size_inches() * 72
        head = Markup('<svg class="fig {}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">')
        return head.format(name, width, height, label) + Markup(_inner(out.getvalue()))  # noqa: S704 (XML of matplotlib)

    return drawn


def _inner(text: str) -> str:
    """Content of an SVG, without ids, fonts and digits that nobody sees; groups named `title:` get that title."""
    text = re.sub(r'<g id="title:([^"]*)">', r"<g><title>\1</title>", text[text.index('<g id="figure') :])
    text = re.sub(r' id="[^"]*"| transform="rotate\(-0[^"]*"|font-(size|family): [^;"]*;? ?', "", text)
    text = re.sub(r"#fe000(\d)", lambda found: f"var(--{_NAMES[int(found[1])]})", text)
    text = re.sub(r'(?<=[ "-])\d+\.\d{2,}(?=[ "])', lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    return re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").replace(' "', '"')


def _axes(figure: Figure, box: Box, xscale: str = "linear", yscale: str = "linear") -> Axes:
    (left, right, top, bottom), (width, height) = box, figure.get_size_inches() * 72
    axes = figure.add_axes((left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height))
    axes.set(xscale=xscale, yscale=yscale)
    axes.patch.set_visible(False)
    axes.minorticks_off()
    for axis, scale in ((axes.xaxis, xscale), (axes.yaxis, yscale)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 12):g}"))
        if scale == "linear":
            axis.set_major_locator(_steps(5))
    return axes


def _new(width: float, height: float) -> Figure:
    return Figure((width / 72, height / 72), dpi=72, frameon=False)


def _steps(most: int, **options: Any) -> MaxNLocator:
    """Round values, at most so many steps apart."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], **options)


def _note(
    axes: Axes, text: str, at: tuple[float, float], by: tuple[float, float], where: Any = "data", **how: Any
) -> None:
    """Text that lies `by` from a point, upwards and to the right."""
    axes.annotate(text, at, by, xycoords=where, textcoords="offset points", **how)


def _title(axes: Axes, text: str, y: float = 12) -> None:
    """Label of the y axis, at the left above it."""
    _note(axes, text, (0, 1), (0, -y), "figure fraction", color=_INK)


def _dots(axes: Axes, x: Array, y: Array, colour: str, size: float) -> None:
    """Points, as lines of no length with round ends: a marker would need an id."""
    places = (np.stack([v, v, np.full(len(x), math.nan)], 1).ravel() for v in (x, y))
    axes.plot(*places, color=colour, linewidth=size, zorder=3)


def _edges(values: Array) -> tuple[Array, str]:
    """Round edges of the bins of a histogram, and the scale on which they are even."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 100:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return np.logspace(first, last, min(10 * (last - first), 60) + 1, dtype=np.float64), "log"
    if high - low <= 1e-6 * high:  # a single bin would be as wide as the figure
        low, high = 0.8 * low, 1.2 * high or 1.0
    return np.asarray(_steps(36).tick_values(low, high), dtype=np.float64), "linear"


def _bars(figure: Figure, box: Box, values: Array) -> Axes:
    """A histogram, with median, mean and 95th percentile marked above it."""
    edges, scale = _edges(values)
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    axes, most = _axes(figure, box, scale), int(counts.max())
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, most * 1.02))
    axes.yaxis.set_major_locator(_steps(4, integer=True))
    if scale == "linear":
        axes.xaxis.set_major_locator(_steps(6))
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:  # a low bar is still seen
            (bar,) = axes.bar(low, max(count, most / 110), high - low, align="edge", color=_ACCENT, alpha=0.8)
            bar.set(edgecolor=_BG, linewidth=1, gid=f"title:{low:.4g} to {high:.4g}: {counted(count, 'adapter')}")
    marks = (("median", np.median(values)), ("mean", values.mean()), ("p95", np.quantile(values, 0.95)))
    where = axes.get_xaxis_transform()
    for i, (name, value) in enumerate(marks):
        at, end = float(value), 1 + (46 - 17 * i) / (box[3] - box[2])
        late = axes.transData.transform((at, 0))[0] > (box[0] + box[1]) / 2
        axes.plot([at, at], [0, end], transform=where, **_MARK)
        _note(axes, f"{name} {at:.3g}", (at, end), (-4 if late else 4, -8), where, ha="right" if late else "left")
    _title(axes, "adapters")
    return axes


@_figure
def histogram(errors: Array) -> tuple[Figure, str, str]:
    """Histogram of the relative dW errors (n,) of adapters, n >= 1."""
    axes = _bars(figure := _new(480, 272), (44, 468, 64, 230), errors)
    axes.set_xlabel("relative dW error" + (", log scale" if axes.get_xscale() == "log" else ""))
    label = f"Histogram of the relative dW error of {counted(len(errors), 'adapter')}, from {errors.min():.3g} to "
    return figure, "histogram", f"{label}{errors.max():.3g}, median {np.median(errors):.3g}"


@_figure
def cloud(times: Array, errors: Array, worst: Array, asked: float | None) -> tuple[Figure, str, str]:
    """Histogram of the ratio of adapters of a coded checkpoint, and below it their errors against the ratio.

    Args:
        times: LoRA bytes over bytes of the code (n,), n >= 1.
        errors, worst: relative dW errors of the adapters, the largest first, and of their worst modules (n,); `DOTS`
            are drawn, evenly by rank.
        asked: the limit on errors.
    """
    upper = _bars(figure := _new(480, 400), (44, 468, 64, 168), times)
    upper.tick_params(labelbottom=False)
    lower = _axes(figure, (44, 468, 212, 358), upper.get_xscale())
    lower.set(xlim=upper.get_xlim(), ylim=(0, max(float(worst.max()), asked or 1e-9) * 1.05))
    lower.set_xlabel("times smaller" + (", log scale" if upper.get_xscale() == "log" else ""))
    some = np.unique(np.linspace(0, len(times) - 1, DOTS).round().astype(int))
    for values, colour in ((worst, _B), (errors, _ACCENT)):
        _dots(lower, times[some], values[some], colour, 7 if len(some) < 100 else 5)
    if asked is not None:
        lower.plot(lower.get_xlim(), [asked, asked], **_MARK)
    _title(lower, "relative dW error", 196)
    label = f"Times smaller, {times.min():.3g} to {times.max():.3g}, and relative dW error, {errors.min():.3g} to "
    return figure, "cloud", f"{label}{errors.max():.3g}, of {counted(len(times), 'adapter')}"


@_figure
def tradeoff(curve: Curve, measured: Mapping[str, float]) -> tuple[Figure, str, str]:
    """Errors against bytes of each smaller k, and this checkpoint.

    Args:
        curve: from k = 0 to that of this checkpoint.
        measured: certified errors of this checkpoint, rms and mean, drawn at its bytes.
    """
    axes = _axes(figure := _new(480, 272), (48, 466, 38, 230))
    power = min(int(math.log(max(float(curve.bytes.max()), 1.0), 1024)), len(_UNITS) - 1)
    x, here = curve.bytes / 1024.0**power, bytes_shown(round(float(curve.bytes[-1])))
    top = 1.05 * float(max(curve.low.max(), curve.high.max(), *measured.values(), 1e-9))
    axes.set(xlim=(0, max(x.max() * 1.05, 1e-9)), ylim=(0, top), xlabel="bytes on disk of the whole checkpoint")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 12):g} {_UNITS[power]}"))
    if curve.bounds:
        axes.fill(np.append(x, x[::-1]), np.append(curve.low, curve.high[::-1]), color=_ACCENT, alpha=0.16)
        axes.plot(x, curve.low, color=_ACCENT, linewidth=1.6)
    axes.plot(x, curve.high, color=_ACCENT, linewidth=1.6)
    free = 0.0  # from where on there is room to name a k
    for k, at, value in zip(curve.k.tolist(), x.tolist(), curve.high.tolist(), strict=True):
        if free <= at < x[-1] - 0.12 * axes.get_xlim()[1] and k & (k - 1) == 0:
            _dots(axes, np.array([at]), np.array([value]), _ACCENT, 5)
            _note(axes, f"k = {k}", (at, value), (6, -16 if not curve.bounds and value > 0.15 * top else 7))
            free = at + 0.14 * axes.get_xlim()[1]
    axes.plot([x[-1], x[-1]], [0, top], **_MARK)
    _note(axes, "this run", (x[-1], top), (0, 7), ha="right", color=_INK, weight="bold")
    for value, size, colour in zip(measured.values(), (11, 7), (_B, _INK), strict=False):
        for wide, what in ((size + 3, _BG), (size, colour)):
            _dots(axes, x[-1:], np.array([value]), what, wide)
    what = "rms relative dW error" if curve.bounds else "share of the energy"
    _title(axes, what)
    return figure, "tradeoff", f"{what} against bytes on disk for each k up to {curve.k[-1]}; this run is at {here}"


@_figure
def spectrum(kind: str, bases: Sequence[Basis], floor: float, most: int) -> tuple[Figure, str, str]:
    """Eigenvalues of one kind of module as shares of their group's energy: the mean over depths, and their range.

    Args:
        kind: its name.
        bases: its groups.
        floor: the least share that is drawn, a power of ten.
        most: the largest k of any kind.
    """
    axes = _axes(figure := _new(320, 188), (44, 312, 24, 150), yscale="log")
    axes.set(xlim=(1, max(most, 2)), ylim=(floor, 1), xlabel="component")
    decades = round(-math.log10(floor))
    axes.set_yticks([10.0**-n for n in range(0, decades + 1, math.ceil(decades / 4))])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v > 0.009 else f"1e{math.log10(v):.0f}"))
    axes.set_xticks([1, *(t for t in _steps(4, integer=True).tick_values(1, max(most, 2)) if 1 < t <= most)])
    for side, colour in zip(SIDES, (_A, _B), strict=True):
        rows = [b.eigenvalues / b.energy for b in bases if b.side == side and b.k and b.energy > 0]
        if not rows:
            continue
        table = np.full((len(rows), max(map(len, rows))), np.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        at = np.unique(np.linspace(0, table.shape[1] - 1, _POINTS).round().astype(int))
        low, mean, high = (how(table[:, at], 0).clip(floor, 1) for how in (np.nanmin, np.nanmean, np.nanmax))
        if len(rows) > 1:
            axes.fill(np.append(at, at[::-1]) + 1, np.append(low, high[::-1]), color=colour, alpha=0.18)
        axes.plot(np.append(at, at[-1]) + 1, np.append(mean, mean[-1]), color=colour, linewidth=2 if len(at) > 1 else 6)
    label = f"Eigenvalue spectra of {printable(kind, 40)}, sides A and B, {counted(len(bases), 'group')}, log scale"
    return figure, "spectrum", label
