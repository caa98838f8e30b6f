"""An analysis for people, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import problem_lines, skipped_as_json
from ..plan.plan import Plan
from ..text import bytes_shown, counted, listed
from .analysis import LOUD, Analysis
from .outlook import COPY, SAME_DIRECTION, Outlook
from .text import rows_text, table

_ROWS = 14  # of the table of errors, at most


def analysis_as_json(a: Analysis) -> dict[str, Any]:
    """All of an analysis as plain values."""
    return asdict(a) | {
        "problems": skipped_as_json(a.problems),
        "duplicates": [
            {"names": [one, other], "distance": distance, "cosine": cosine}
            for one, other, distance, cosine in a.duplicates
        ],
    }


def analysis_text(a: Analysis, plan: Plan) -> str:
    """An analysis of a plan's adapters, the recommendations last."""
    parts = [
        rows_text(_looked_at(a)),
        _spectra(a),
        _errors(a, plan.settings.num_components),
        f"recommended for shared bases: {a.recommended}",
        "for the smallest store, code each alone: lorashare-stream plan SOURCES --max-error 0.25 foretells its bytes",
    ]
    if a.problems:
        parts.insert(1, "\n".join(["cannot be compressed:", *problem_lines(a.problems)]))
    return "\n\n".join(parts)


def _looked_at(a: Analysis) -> list[tuple[str, object]]:
    """How much was looked at, what adapters have in common by name, and which are odd."""
    count = len(a.sample)
    pairs = [f"distance {d:.2g}, cosine {c:.4f}: {i}, {j}" for i, j, d, c in a.duplicates]
    nearest = "; ".join(pairs[:3]) + ("; ..." if len(pairs) > 3 else "")
    lines: list[tuple[str, object]] = [
        (
            "analysed",
            f"{count} of {counted(a.compressed, 'adapter')}, {a.modules} of {counted(a.modules_in_all, 'module')}",
        ),
        ("common initial A", _common_initial(a)),
        (
            "near duplicates",
            f"{len(pairs)} of {counted(count * (count - 1) // 2, 'pair')}: {nearest}"
            if pairs
            else f"no pair nearer than {COPY:.0%} or with a cosine above {SAME_DIRECTION:g}",
        ),
        ("identical files", listed([" = ".join(group) for group in a.identical], 3) or "none in the whole collection"),
    ]
    if a.zero:
        lines.append(("all zero", f"{counted(len(a.zero), 'adapter')}: {listed(a.zero)}"))
    if a.loud:
        loud = [f"{name} ({times:.3g} times)" for name, times in a.loud.items()]
        lines.append(("diverged?", f"||dW|| above {LOUD:g} times the median: {listed(loud)}"))
    return lines


def _common_initial(a: Analysis) -> str:
    if not a.initial:
        return "none: no two lora_A began as the same matrix"
    count, sizes = len(a.sample), [len(group) for group in a.initial]
    text = f"{sizes[0] / count:.0%} of the sample, {sizes[0]} adapters ({listed(a.initial[0], 3)})"
    others = f"; another {sum(sizes[1:]) / count:.0%} in {counted(len(sizes) - 1, 'other group')}"
    return text + (others if sizes[1:] else "")


def _spectra(a: Analysis) -> str:
    header = (
        "spectrum", "modules", "d", "n", "top 1", "top 8", "top 32", "chance", "held 32", "chance", "eff. rank",
        "k 90%", "95%", "99%",
    )  # fmt: skip
    rows = [
        (
            f"{s.side} {s.kind}", f"{s.modules}", f"{s.dim}", f"{s.count}", f"{s.top[1]:.3f}", f"{s.top[8]:.3f}",
            f"{s.top[32]:.3f}", f"{s.top_chance[32]:.3f}", f"{s.held[32]:.3f}", f"{s.held_chance[32]:.3f}",
            f"{s.effective_rank:.0f}", *(f"{k:.0f}" for k in s.reach.values()),
        )
        for s in a.spectra
    ]  # fmt: skip
    return table(rows, header)


def _errors(a: Analysis, asked: int | str) -> str:
    header = ("k", "basis+loadings", "LoRA bytes", "dW error", "from", "to", "by chance")
    rows = [
        (
            f"{o.k}", bytes_shown(o.bytes), f"{o.ratio:.2f}x", f"{o.expected:.3f}", f"{o.low:.3f}", f"{o.high:.3f}",
            f"{o.chance:.3f}",
        )
        for o in _some(a.outlooks, asked)
    ]  # fmt: skip
    return "expected of all adapters\n" + table(rows, header)


def _some(outlooks: Sequence[Outlook], asked: int | str) -> list[Outlook]:
    """Powers of two, what is asked for, and the last: the largest that are not too many."""
    some = [o for o in outlooks if o.k == asked or o.k & (o.k - 1) == 0 or o is outlooks[-1]]
    return some[-_ROWS:]
