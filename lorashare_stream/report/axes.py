"""The axes of a figure: where a value is drawn, and which values are named. Lengths are in units of the drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, element, joined

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, drawn from `start` to `end`, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is drawn; one beyond the ends at the end."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values, about as many as asked for: powers of ten on a logarithmic axis."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first) / most))
            return [10.0**n for n in range(last, first - 1, -step)][::-1]
        width = nice_step((self.high - self.low) / most)
        first, last = math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9)
        return [width * n for n in range(first, last + 1)]


def nice_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`.

    >>> [nice_step(x) for x in (0.3, 7.0, 20.0)]
    [0.5, 10.0, 20.0]
    """
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9)))


def bytes_axis(high: float, start: float, end: float) -> tuple[Axis, list[tuple[float, str]]]:
    """An axis from 0 to some bytes, and its ticks in the unit that fits."""
    power = min(int(math.log(max(high, 1.0), 1024)), len(_UNITS) - 1)
    unit = 1024.0**power
    axis = Axis(0.0, max(high, 1.0) / unit, start, end)
    return Axis(0.0, max(high, 1.0), start, end), [(t * unit, f"{t:g} {_UNITS[power]}") for t in axis.ticks(4)]


def x_axis(axis: Axis, y: float, ticks: Sequence[tuple[float, str]], title: str) -> Html:
    """Ticks with their names below `y`, and what the axis is."""
    parts = [element("line", x1=num(axis.start), x2=num(axis.end), y1=num(y), y2=num(y), class_="base")]
    for value, name in ticks:
        x = num(axis.at(value))
        parts.append(element("line", x1=x, x2=x, y1=num(y), y2=num(y + 4), class_="base"))
        parts.append(element("text", name, x=x, y=num(y + 18), text_anchor="middle"))
    middle = num((axis.start + axis.end) / 2)
    return joined(*parts, element("text", title, x=middle, y=num(y + 36), text_anchor="middle", class_="of"))


def y_axis(axis: Axis, x: Axis, ticks: Sequence[tuple[float, str]], title: str) -> Html:
    """Lines across at the ticks, their names left of them, and above them what the axis is."""
    parts: list[Html] = []
    for value, name in ticks:
        y = axis.at(value)
        parts.append(element("line", x1=num(x.start), x2=num(x.end), y1=num(y), y2=num(y), class_="grid"))
        parts.append(element("text", name, x=num(x.start - 6), y=num(y + 4), text_anchor="end"))
    return joined(*parts, element("text", title, x=4, y=12, class_="of"))


def named(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their names: as few digits as tell them apart."""
    return [(tick, f"{round(tick, 12):g}") for tick in ticks]


def num(value: float) -> str:
    """A coordinate, to a tenth.

    >>> num(2.0), num(3.14159), num(-0.01)
    ('2', '3.1', '0')
    """
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """The `d` of a path through points; a single one is drawn as a dot by round caps."""
    text = "M" + "L".join(f"{num(x)} {num(y)}" for x, y in points)
    return text + ("Z" if closed else "h.1" if len(points) == 1 else "")


def drawing(name: str, width: float, height: float, label: str, *parts: object) -> Html:
    """One figure as SVG, which scales to the width that it is given.

    Args:
        name: its class, and what tests know it by.
        width, height: of the drawing.
        label: what it shows, for those who do not see it.
        parts: what is in it.
    """
    box = f"0 0 {num(width)} {num(height)}"
    return element("svg", *parts, viewBox=box, role="img", aria_label=label, class_=f"fig {name}")
