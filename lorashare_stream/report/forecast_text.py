"""A forecast for people."""

from __future__ import annotations

from ..codec.rate import Estimate
from ..errors import problem_lines, problem_of
from ..text import bytes_shown, counted
from .forecast import Forecast
from .text import Row, rows_text, table


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
    rows = [
        (f"{p.error:g}", bytes_shown(p.codes), bytes_shown(p.total), f"{p.times:.1f}", f"{p.lora_times:.1f}")
        for p in f.curve
    ]
    header = ("dW error of each", "codes", "checkpoint", "times smaller", "LoRA, times smaller")
    parts = [rows_text(pairs), table(rows, header)]
    if f.problems:
        parts.append("\n".join(["of the sample cannot be compressed:", *problem_lines(map(problem_of, f.problems))]))
    return "\n\n".join(parts)


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
