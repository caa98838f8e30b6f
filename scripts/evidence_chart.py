"""Agreement with the original adapters against times smaller, as an SVG: for scripts/evidence.py --render."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

LINES = {  # system -> its colour and its name in the legend
    "coded": ("#1b6ca8", "coded (--max-error)"), "SHARE": ("#7fb3d9", "SHARE (-k)"),
    "lorashare": ("#d95f02", "lorashare"), "vlora": ("#a6761d", "vlora"), "JD": ("#7570b3", "joint diagonalisation"),
    "JD, 8 clusters": ("#e7298a", "JD, 8 clusters"), "SVD, int8": ("#444444", "truncated SVD, int8"),
    "LoRAQuant": ("#999999", "LoRAQuant"), "int": ("#66a61e", "A and B as int8, int4, int3"),
    "ternary": ("#e6ab02", "ternary (ComPEFT)"),
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "evidence", "font.size": 9, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.bottom": False, "ytick.left": False, "legend.frameon": False,
}  # fmt: skip
TIMES = tuple(2**i for i in range(10))
Point = tuple[str, float, float, float]  # system, times smaller, agreement, setting


def chart(points: Sequence[Point], subtitle: str, path: Path) -> None:
    """The mean share of held-out texts whose label stays; times smaller is logarithmic."""
    with rc_context(STYLE):
        figure = Figure((7.2, 5.2), layout="constrained")
        axes = figure.subplots()
        for system, (colour, name) in LINES.items():
            own = sorted(p[1:] for p in points if p[0] == system)
            if own:
                width = 2.4 if system == "coded" else 1.3
                axes.plot(*list(zip(*own, strict=True))[:2], "o-", color=colour, label=name, lw=width, ms=width + 2)
            for x, y, setting in own if system == "coded" else ():
                axes.annotate(f"{setting:g}", (x, y), (4, 4), textcoords="offset points", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks(TIMES, [f"{x}x" for x in TIMES])
        axes.minorticks_off()
        axes.set(xlim=(0.9, 1.1 * TIMES[-1]), ylim=(0.5, 1.01))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.set_title("Same prediction as the original adapter, against times smaller", loc="left", weight="bold")
        axes.set_xlabel(subtitle, color="#666666", loc="left")
        figure.legend(loc="outside lower left", ncols=3)
        figure.savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
