"""Agreement with the original adapters against times smaller, as an SVG: for scripts/evidence.py --render."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

LINES = {
    "coded": "#1b6ca8", "SHARE": "#7fb3d9", "lorashare": "#d95f02", "vlora": "#a6761d", "JD": "#7570b3",
    "JD, 8 clusters": "#e7298a", "SVD, int8": "#444444", "LoRAQuant": "#999999", "int": "#66a61e", "ternary": "#e6ab02",
}  # fmt: skip
NAMES = {
    "coded": "coded (--max-error)", "SHARE": "SHARE (-k)", "JD": "joint diagonalisation",
    "SVD, int8": "truncated SVD, int8", "int": "A and B as int8, int4, int3", "ternary": "ternary (ComPEFT)",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP = 620, 330, 62, 64
FEWER = (1.0, 512.0)
LOWEST = 0.5
Point = tuple[str, float, float, float]  # system, times smaller, agreement, setting


def chart(points: Sequence[Point], texts: int, adapters: int, count: int) -> str:
    """The mean over the adapters of the share of held-out texts whose label stays; times smaller is logarithmic."""
    wide, high = WIDTH + LEFT + 30, HEIGHT + TOP + 122
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14" font-weight="bold">Same prediction as the original adapter, against '
        "times smaller</text>",
        f'<text x="{LEFT}" y="38" fill="#666666">{count:,} MiniLM adapters, {adapters} of them on {texts:,} held-out '
        "texts; LoRA bytes, all but heads counted</text>",
        f'<g transform="translate({LEFT} {TOP})">',
        *_axes(),
        *(word for system in LINES for word in _line(system, points)),
        "</g>",
    ]
    for i, (system, colour) in enumerate(LINES.items()):
        x, y = LEFT + (i % 3) * 215, HEIGHT + TOP + 52 + (i // 3) * 18
        parts.append(f'<rect x="{x}" y="{y - 7}" width="16" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 22}" y="{y}">{NAMES.get(system, system)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes() -> Iterator[str]:
    for percent in range(round(100 * LOWEST), 101, 10):
        _, y = _place(1.0, percent / 100)
        yield f'<line x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
        yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
    for fewer in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        x, _ = _place(fewer, 1.0)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y2="{HEIGHT}" stroke="#eeeeee"/>'
        yield f'<text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{fewer}x</text>'


def _line(system: str, points: Sequence[Point]) -> Iterator[str]:
    """One system's points, joined; those of `coded` have their limit beside them."""
    own = sorted(p[1:] for p in points if p[0] == system)
    if not own:
        return
    places = [_place(fewer, agreement) for fewer, agreement, _ in own]
    width = 3 if system == "coded" else 1.6
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{joined}" fill="none" stroke="{LINES[system]}" stroke-width="{width}"/>'
    for (x, y), (*_, setting) in zip(places, own, strict=True):
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width + 0.8:.1f}" fill="{LINES[system]}"/>'
        if system == "coded":
            yield f'<text x="{x + 7:.1f}" y="{y - 7:.1f}" fill="{LINES[system]}">{setting:g}</text>'


def _place(fewer: float, agreement: float) -> tuple[float, float]:
    x = np.log(np.clip(fewer, *FEWER) / FEWER[0]) / np.log(FEWER[1] / FEWER[0])
    y = (max(agreement, LOWEST) - LOWEST) / (1 - LOWEST)
    return float(x) * WIDTH, (1 - float(y)) * HEIGHT
