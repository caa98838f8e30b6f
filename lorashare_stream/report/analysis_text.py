"""An analysis, and a forecast, for people; an analysis as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..codec.rate import Estimate
from ..errors import problem_lines, skipped_as_json
from ..plan.plan import Plan
from ..schema import Skipped
from ..text import bytes_shown, counted, listed
from .analysis import LOUD, Analysis
from .copies import COPY, SAME_DIRECTION
from .forecast import Forecast, Point
from .text import Row, break_even_range, rows_text, table

_ROWS = 14  # of the table of k, at most


def analysis_as_json(a: Analysis) -> dict[str, Any]:
    """All of an analysis as plain values."""
    pairs = [{"names": [one, other], "distance": far, "cosine": cosine} for one, other, far, cosine in a.duplicates]
    return asdict(a) | {"problems": skipped_as_json(a.problems), "duplicates": pairs}


def analysis_text(a: Analysis, plan: Plan) -> str:
    """An analysis of a plan's adapters, what to do last."""
    parts = [
        rows_text(_looked_at(a)),
        *(["\n".join(["cannot be compressed:", *problem_lines(a.problems)])] if a.problems else []),
        f"coded, every adapter with one error\n{_curve(a.coded)}",
        f"bases of k components, break-even k {break_even_range(plan)}\n{_outlooks(a, plan.settings.num_components)}",
        f"for the smallest store, code each alone: {a.store}\nto serve many at once, share bases: {a.serve}",
    ]
    return "\n\n".join(parts)


def _looked_at(a: Analysis) -> list[Row]:
    """How much was looked at, and which adapters are odd."""
    pairs = [f"distance {d:.2g}, cosine {c:.4f}: {i}, {j}" for i, j, d, c in a.duplicates]
    near = f"{len(pairs)} of {counted(len(a.sample) * (len(a.sample) - 1) // 2, 'pair')}: {'; '.join(pairs[:3])}"
    none = f"no pair nearer than {COPY:.0%}, or with a cosine above {SAME_DIRECTION:g}"
    of = f"{len(a.sample)} of {counted(a.compressed, 'adapter')}"
    lines: list[Row] = [
        ("analysed", f"{of}; for bases {a.modules} of {counted(a.modules_in_all, 'module')}"),
        ("near duplicates", near if pairs else none),
        ("identical files", listed([" = ".join(group) for group in a.identical], 3) or "none in the whole collection"),
    ]
    if a.zero:
        lines.append(("all zero", f"{counted(len(a.zero), 'adapter')}: {listed(a.zero)}"))
    if a.loud:
        loud = [f"{name} ({times:.3g} times)" for name, times in a.loud.items()]
        lines.append(("diverged?", f"||dW|| above {LOUD:g} times the median: {listed(loud)}"))
    return lines


def _outlooks(a: Analysis, asked: int | str) -> str:
    some = [o for o in a.outlooks if o.k == asked or o.k & (o.k - 1) == 0 or o is a.outlooks[-1]][-_ROWS:]
    header = ("k", "basis+loadings", "LoRA, times smaller", "dW error", "from", "to", "kept of others", "by chance")
    rows = [
        (
            f"{o.k}", bytes_shown(o.bytes), f"{o.ratio:.2f}", f"{o.expected:.3f}", f"{o.low:.3f}", f"{o.high:.3f}",
            f"{o.held:.1%}", f"{o.chance:.1%}",
        )
        for o in some
    ]  # fmt: skip
    return table(rows, header)


def forecast_text(f: Forecast) -> str:
    """What is foretold of a coded checkpoint, and the curve: bytes against error."""
    pairs: list[Row] = [
        ("foretold from", f"{counted(f.sample, 'adapter')} of {f.adapters}, which were read and coded"),
        ("checkpoint", f"{_interval(f.total)}, {_times(f.times)}"),
        ("  codes", f"{_interval(f.codes)}, {_times(f.lora_times)} than the LoRA tensors"),
        ("  verbatim", _interval(f.verbatim)),
        ("  metadata", f"about {bytes_shown(f.metadata)}"),
        ("relative dW error", _errors(f)),
    ]
    if f.exact:
        pairs.append(("kept exact", f"{f.exact} of the sample: no code within the limit is smaller than the tensors"))
    if f.unfetched:
        pairs.append(("not looked at", f"{counted(f.unfetched, 'adapter')} of the Hub: --analyze fetches a sample"))
    parts = [rows_text(pairs), _curve(f.curve)]
    if f.problems:
        lines = problem_lines(Skipped(**problem).error() for problem in f.problems)
        parts.append("\n".join(["of the sample cannot be compressed:", *lines]))
    return "\n\n".join(parts)


def _curve(points: Sequence[Point]) -> str:
    """The rate curve; codes with half of their 95 % interval, which is that of the checkpoint too."""
    header = ("dW error of each", "codes", "95 %", "checkpoint", "times smaller", "LoRA, times smaller")
    rows = [
        (
            f"{p.error:g}", bytes_shown(p.codes), f"+- {p.margin / max(1.0, p.codes):.1%}", bytes_shown(p.total),
            f"{p.times:.1f}", f"{p.lora_times:.1f}",
        )
        for p in points
    ]  # fmt: skip
    return table(rows, header)


def _interval(e: Estimate) -> str:
    about, low, high = (bytes_shown(max(0.0, size)) for size in (e.value, e.value - e.margin, e.value + e.margin))
    return f"about {about}" + (f" ({low} to {high} at 95 %)" if e.margin > 0.005 * e.value else "")


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times smaller" if ratio >= 1 else "no smaller"


def _errors(f: Forecast) -> str:
    low, high = max(0.0, f.error.value - f.error.margin), f.error.value + f.error.margin
    between = "" if f.error.margin < 5e-4 else f" ({low:.3f} to {high:.3f} at 95 %)"
    text = f"mean about {f.error.value:.3f}{between}, {f.worst:.3f} at worst in the sample"
    if f.wanted is not None and f.total.value > 1.01 * f.wanted:
        text = f"cannot be as small: {bytes_shown(f.total.value - f.codes.value)} of it are not codes; {text}"
    return text
