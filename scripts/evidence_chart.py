"""Error against bytes as an SVG, a panel for each collection: for scripts/evidence.py --render."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Line = dict[str, Any]
LINES = {
    "lorashare": "#d95f02", "factors": "#e6ab02", "delta": "#1b6ca8", "truncated SVD": "#444444", "vlora": "#a6761d",
    "originals": "#66a61e", "delta, int8": "#7fb3d9", "truncated SVD, int8": "#aaaaaa",
}  # fmt: skip
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 250, 56, 42, 40
ERRORS = (1e-3, 1.0)
FEWER = (0.8, 100.0)


def chart(rows: list[Line], abouts: dict[str, Line]) -> str:
    """Mean error (down) against how many times fewer LoRA bytes than the originals (right), both logarithmic."""
    across = 2
    down = -(-len(abouts) // across)
    wide, high = across * (WIDTH + LEFT + GAP), down * (HEIGHT + TOP + GAP) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="11">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for i, (name, about) in enumerate(abouts.items()):
        x, y = (i % across) * (WIDTH + LEFT + GAP) + LEFT, (i // across) * (HEIGHT + TOP + GAP) + TOP
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel([r for r in rows if r["collection"] == name], about)
        parts.append("</g>")
    for i, (system, colour) in enumerate(LINES.items()):
        x, y = LEFT + (i % 4) * 175, high - 26 + (i // 4) * 16
        parts.append(f'<rect x="{x}" y="{y - 7}" width="16" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 22}" y="{y}">{system}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(rows: list[Line], about: Line) -> Iterator[str]:
    yield f'<text y="-14" font-size="13" font-weight="bold">{about["collection"]}, {about["adapters"]} adapters</text>'
    for error in (1e-3, 1e-2, 1e-1, 1.0):
        _, y = _place(1.0, error)
        yield f'<line x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{error:g}</text>'
    for fewer in (1, 2, 5, 10, 20, 50, 100):
        x, _ = _place(fewer, 1.0)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y2="{HEIGHT}" stroke="#eeeeee"/>'
        yield f'<text x="{x:.1f}" y="{HEIGHT + 14}" text-anchor="middle">{fewer}x</text>'
    for system, colour in LINES.items():
        chosen = [
            r for r in rows if r["system"] == system or (system == "originals" and r["system"].startswith(system))
        ]
        points = sorted(
            _place(about["lora"] / r["lora"], r["mean"]) for r in chosen if r["lora"] <= about["lora"] / FEWER[0]
        )
        words = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield f'<polyline points="{words}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
        yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points)


def _place(fewer: float, error: float) -> tuple[float, float]:
    x, y = (
        np.log(np.clip(v, *span) / span[0]) / np.log(span[1] / span[0]) for v, span in ((fewer, FEWER), (error, ERRORS))
    )
    return float(x) * WIDTH, (1 - float(y)) * HEIGHT
